"""The action language: what the model writes, read back without trust.

An action's text is JSON in one canonical form: compact separators, keys in the order of the reference code, metres with
two decimals. `extent` is measured along (normal, up x normal, up) for an anchor whose normal is horizontal, so that
the normal carries the box's yaw. `scene` is bound by the program that asks, not copied by the model: text without it is
valid and gets its scene from `PlaceAnchor.bound`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace

import numpy as np

from roomplan_lib.geometry import OrientedBox, rotation_z
from roomplan_lib.scenes import CATEGORIES

MAX_TEXT = 65_536  # characters; a longer text is refused unread
COORDINATE_LIMIT = 1_000.0  # metres; no room lies farther from its origin


@dataclass(frozen=True)
class PlaceAnchor:
    """An anchor: center [m], unit normal, extent [m]; in the frame the caller says."""

    category: str
    center: tuple[float, float, float]
    normal: tuple[float, float, float]
    extent: tuple[float, float, float]
    scene: str = ""

    def bound(self, scene: str) -> PlaceAnchor:
        """The same action with its scene filled in."""
        return replace(self, scene=scene)

    def to_box(self) -> OrientedBox:
        """The upright box that the anchor stands for. A normal within 60 degrees of vertical has no yaw: yaw 0."""
        yaw = math.atan2(self.normal[1], self.normal[0]) if abs(self.normal[2]) < 0.5 else 0.0
        return OrientedBox(self.center, self.extent, rotation_z(yaw), self.category)

    def transformed(self, transform: np.ndarray) -> PlaceAnchor:
        """The same anchor in another frame; `transform` is a rigid 4x4 from this frame to that one."""
        center = transform[:3, :3] @ self.center + transform[:3, 3]
        normal = transform[:3, :3] @ self.normal
        return replace(self, center=_triple(center), normal=_triple(normal))


@dataclass(frozen=True)
class ActionError:
    """Why a text is no action. Malformed model text is a result to count, so it is returned, never raised."""

    reason: str


def anchor_from_box(box: OrientedBox, scene: str = "") -> PlaceAnchor:
    """The anchor of an upright box, its normal along the first box axis with yaw in [0, 180) degrees.

    Raises ValueError for a box whose third axis is not vertical: an anchor cannot hold its rotation.
    """
    if abs(box.rotation[2, 2]) < 0.999:
        raise ValueError(f"an anchor needs an upright box, got rotation {box.rotation.tolist()}")
    normal = box.rotation[:, 0]
    if normal[1] < -0.005 or abs(normal[1]) <= 0.005 and normal[0] < 0:  # 0.005 is written as 0.00
        normal = -normal  # half a turn leaves a box as it is
    return PlaceAnchor(box.label, _triple(box.center), _triple(normal), _triple(box.extent), scene)


def format_action(action: PlaceAnchor) -> str:
    """The one canonical text of an action; `scene` and `category` are written only where they are known."""
    scene = f'"scene":{json.dumps(action.scene)},' if action.scene else ""
    vectors = ",".join(
        f'"{name}":[{",".join(_number(v) for v in getattr(action, name))}]' for name in ("center", "normal", "extent")
    )
    category = f'"category":{json.dumps(action.category)},' if action.category else ""
    return f'{{"action":"place_anchor",{scene}{category}{vectors}}}'


def parse_action(text: str) -> PlaceAnchor | ActionError:
    """Reads one action from model text or a file. Never raises on text and never evaluates it."""
    if len(text) > MAX_TEXT:
        return ActionError(f"text has {len(text)} characters, more than {MAX_TEXT}")
    try:
        data = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return ActionError(f"no JSON: {error}")
    if not isinstance(data, dict):
        return ActionError(f"expected a JSON object, got {type(data).__name__}")
    if data.get("action") != "place_anchor":
        return ActionError(f'expected "action":"place_anchor", got {data.get("action")!r:.80}')
    unknown = set(data) - {"action", "scene", "category", "center", "normal", "extent"}
    if unknown:
        return ActionError(f"unknown keys {sorted(unknown)!s:.200}")
    vectors = {}
    for key in ("center", "normal", "extent"):
        value = data.get(key)
        if not isinstance(value, list) or len(value) != 3 or any(type(v) not in (int, float) for v in value):
            return ActionError(f"{key}: expected three numbers")
        if any(not abs(v) <= COORDINATE_LIMIT for v in value):
            return ActionError(f"{key}: beyond {COORDINATE_LIMIT:g} m")
        vectors[key] = _triple(value)
    if min(vectors["extent"]) <= 0:
        return ActionError("extent: side lengths must be positive")
    if abs(math.hypot(*vectors["normal"]) - 1) > 0.02:
        return ActionError("normal: not a unit vector")
    scene, category = data.get("scene", ""), data.get("category", "")
    if not isinstance(scene, str) or not isinstance(category, str):
        return ActionError("scene and category must be strings")
    if category and category not in CATEGORIES:
        return ActionError(f"category: {category!r:.80} is none of the {len(CATEGORIES)} known ones")
    return PlaceAnchor(category, scene=scene, **vectors)


def _number(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def _triple(values) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z


def _unique_keys(pairs: list) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
