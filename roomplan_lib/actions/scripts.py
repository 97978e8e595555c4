"""The scene scripts of SpatialLM (Manycore, 2025) and SceneScript (Meta, 2024), read into actions and written.

    wall_0=Wall(ax,ay,az,bx,by,bz,height,thickness)                         SpatialLM, one entity a line
    door_0=Door(wall_0,position_x,position_y,position_z,width,height)       likewise window_0=Window(..)
    bbox_0=Bbox(class,position_x,position_y,position_z,angle_z,scale_x,scale_y,scale_z)

    make_wall, id=0, a_x=.., a_y=.., a_z=.., b_x=.., b_y=.., b_z=.., height=.., thickness=0.0         SceneScript
    make_door, id=1000, wall0_id=0, wall1_id=0, position_x=.., .., width=.., height=..    windows from id=2000
    make_bbox, id=3000, class=.., position_x=.., .., angle_z=.., scale_x=.., scale_y=.., scale_z=..

Both: metres, z up, positions are middles (of a wall: its lower ends), scales full lengths, angle_z radians. SpatialLM's
model writes whole numbers instead, `BINS` bins over the ranges of `RANGES`, of a scene shifted into the positive
octant; SceneScript's model writes no text. Neither language has openings, and SpatialLM's doors name one wall.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from roomplan_lib.actions import Action, ActionList, PlaceAnchor, PlaceDoor, PlaceWall, PlaceWindow, PlanRoom

BINS = 1280  # of SpatialLM; 640 in its model for Structured3D
RANGES = {"position": (0.0, 32.0), "size": (0.0, 25.6), "scale": (0.0, 20.0), "angle": (-2 * math.pi, 2 * math.pi)}
MAX_CHARACTERS = 2**20
MAX_NUMBER = 10_000.0  # metres or bins
POSITION = ("position_x", "position_y", "position_z")
WALL = ("a_x", "a_y", "a_z", "b_x", "b_y", "b_z", "height", "thickness")
FIELDS = {
    "wall": WALL,
    "door": ("wall", *POSITION, "width", "height"),
    "window": ("wall", *POSITION, "width", "height"),
    "bbox": ("class", *POSITION, "angle_z", "scale_x", "scale_y", "scale_z"),
}
FIRST_ID = {"wall": 0, "door": 1000, "window": 2000, "bbox": 3000}  # SceneScript's running numbers
IN_WALL = {"door": PlaceDoor, "window": PlaceWindow}
_SPATIALLM = re.compile(r"(wall|door|window|bbox)_(\d{1,6})\s*=\s*(Wall|Door|Window|Bbox)\((.*)\)", re.ASCII)
_SCENESCRIPT = re.compile(r"make_(wall|door|window|bbox)\s*,(.*)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})([eE][+-]?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class _Entity:
    """One line: its kind, its name as doors cite it, and its values by the names of FIELDS (numbers but two)."""

    kind: str
    name: str
    values: dict[str, float | str]


def read_spatiallm(
    text: str, notes: list[str] | None = None, *, quantised: bool = False, bins: int = BINS, offset=(0.0, 0.0, 0.0)
) -> PlanRoom:
    """The plan of a SpatialLM script in metres, or `quantised` in bins.

    offset: [3] metres, added to the positions of a quantised script: the lower corner that its scene was shifted from.
    A bin stands for its lower edge, as in SpatialLM. notes: gets a sentence for each line or value that is no part
    of the plan. Never raises on model text; a text longer than MAX_CHARACTERS gives an empty plan and a note.
    """
    notes = [] if notes is None else notes
    entities = []
    for place, line in _lines(text, notes):
        match = _SPATIALLM.fullmatch(line)
        words = [word.strip() for word in match[4].split(",")] if match else []
        if not match or match[1] != match[3].lower() or len(words) != len(FIELDS[match[1]]):
            notes.append(f"{place} left out, no entity of SpatialLM: {line[:80]!r}")
            continue
        entity = _entity(match[1], f"{match[1]}_{match[2]}", dict(zip(FIELDS[match[1]], words, strict=True)))
        if isinstance(entity, str):
            notes.append(f"{place} left out, {entity}: {line[:80]!r}")
            continue
        if quantised:
            entity = _Entity(entity.kind, entity.name, {
                key: value if isinstance(value, str) else _from_bin(key, value, bins, offset)
                for key, value in entity.values.items()
            })  # fmt: skip
        entities.append((place, entity))
    return _plan(entities, notes)


def write_spatiallm(
    plan: Action | ActionList, notes: list[str] | None = None, *, quantised: bool = False, bins: int = BINS,
    offset=(0.0, 0.0, 0.0),
) -> str:  # fmt: skip
    """The SpatialLM script of a plan, in metres, or `quantised` after a shift by -offset [3] metres.

    Quantised as SpatialLM does it: downwards to a bin's edge, values beyond the ranges clipped to them; `notes` gets a
    sentence for each clipped value and for whatever the language cannot hold.
    """
    notes = [] if notes is None else notes
    lines = []
    for entity in _entities(plan, notes):
        values = entity.values
        if quantised:
            values = {
                key: value if isinstance(value, str) else _to_bin(key, value, bins, offset, entity.name, notes)
                for key, value in values.items()
            }
        words = ",".join(value if isinstance(value, str) else repr(value) for value in values.values())
        lines.append(f"{entity.name}={entity.kind.capitalize()}({words})\n")
    return "".join(lines)


def read_scenescript(text: str, notes: list[str] | None = None) -> PlanRoom:
    """The plan of a SceneScript script; keys in any order, `notes` and failures as in `read_spatiallm`."""
    notes = [] if notes is None else notes
    entities = []
    for place, line in _lines(text, notes):
        match = _SCENESCRIPT.fullmatch(line)
        pairs = [pair.partition("=")[::2] for pair in match[2].split(",")] if match else []
        words = {key.strip(): word.strip() for key, word in pairs}
        if not match or len(words) < len(pairs) or not words.get("id", "").isdigit():
            notes.append(f"{place} left out, no command of SceneScript: {line[:80]!r}")
            continue
        kind, name = match[1], words.pop("id")
        first, second = words.pop("wall0_id", ""), words.pop("wall1_id", "")
        if kind in IN_WALL:
            words["wall"] = f"wall_{first}"
            if second not in ("", first):
                notes.append(f"{place}: lies in walls {first} and {second}, kept in {first}")
        words = {"thickness": "0.0"} | words if kind == "wall" else words
        unknown = sorted(words.keys() - set(FIELDS[kind]))
        if unknown:
            notes.append(f"{place}: {', '.join(unknown)[:80]} left out")
        missing = [key for key in FIELDS[kind] if key not in words]
        entity = f"no {missing[0]}" if missing else _entity(kind, f"{kind}_{name}", {k: words[k] for k in FIELDS[kind]})
        if isinstance(entity, str):
            notes.append(f"{place} left out, {entity}: {line[:80]!r}")
        else:
            entities.append((place, entity))
    return _plan(entities, notes)


def write_scenescript(plan: Action | ActionList, notes: list[str] | None = None) -> str:
    """The SceneScript script of a plan in metres; `notes` gets a sentence for whatever the language cannot hold."""
    lines = []
    for entity in _entities(plan, [] if notes is None else notes):
        kind, number = entity.name.split("_")
        words = [f"make_{kind}", f"id={FIRST_ID[kind] + int(number)}"]
        for key, value in entity.values.items():
            if key == "wall":
                wall = value.removeprefix("wall_")
                words += [f"wall0_id={wall}", f"wall1_id={wall}"]
            else:
                words.append(f"{key}={value if isinstance(value, str) else repr(value)}")
        lines.append(", ".join(words) + "\n")
    return "".join(lines)


def _lines(text: str, notes: list[str]) -> list[tuple[str, str]]:
    """(place, line) of the lines that hold something; of SpatialLM's special tokens around them nothing is kept."""
    if len(text) > MAX_CHARACTERS:
        notes.append(f"left out: a script of {len(text)} characters, more than {MAX_CHARACTERS}")
        return []
    text = re.sub(r"<\|layout_[se]\|>", "\n", text)
    return [(f"line {i}", line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _entity(kind: str, name: str, words: dict[str, str]) -> _Entity | str:
    """The entity of a line's words, or what is wrong with them."""
    values = {}
    for key, word in words.items():
        if key in ("wall", "class"):
            if not re.fullmatch(r"\w[\w \-/]{0,39}", word, re.ASCII):
                return f"{key} is no name"
            values[key] = word
        elif not _NUMBER.fullmatch(word) or not abs(float(word)) <= MAX_NUMBER:
            return f"{key} is no number"
        else:
            values[key] = float(word)
    return _Entity(kind, name, values)


def _from_bin(key: str, value: float, bins: int, offset) -> float:
    low, high = RANGES[_range(key)]
    shift = offset["xyz".index(key[-1])] if _range(key) == "position" else 0.0
    return value / bins * (high - low) + low + shift


def _to_bin(key: str, value: float, bins: int, offset, name: str, notes: list[str]) -> int:
    low, high = RANGES[_range(key)]
    shift = offset["xyz".index(key[-1])] if _range(key) == "position" else 0.0
    index = math.floor(round((value - shift - low) / (high - low) * bins, 6))  # an edge stays its own bin
    if not 0 <= index < bins:
        notes.append(f"{name}.{key}: {value:.2f} clipped, the bins span {low + shift:.2f} to {high + shift:.2f}")
    return min(max(index, 0), bins - 1)


def _range(key: str) -> str:
    if key == "angle_z":
        return "angle"
    if key in ("height", "width", "thickness"):
        return "size"
    return "scale" if key.startswith("scale") else "position"


def _plan(entities: list[tuple[str, _Entity]], notes: list[str]) -> PlanRoom:
    walls = [(place, entity) for place, entity in entities if entity.kind == "wall"]
    number_of, actions = {}, []
    for place, entity in walls:
        v = entity.values
        if not (v["height"] > 0 and math.dist((v["a_x"], v["a_y"]), (v["b_x"], v["b_y"])) > 0):
            notes.append(f"{place} left out: {entity.name} has no length or no height")
            continue
        if entity.name in number_of:
            notes.append(f"{place}: {entity.name} stands twice; what it holds is put into the last one")
        if v["a_z"] != v["b_z"]:
            notes.append(f"{place}: {entity.name} rises from {v['a_z']:.2f} to {v['b_z']:.2f} m, set level")
        if v["thickness"]:
            notes.append(f"{place}: thickness {v['thickness']:.2f} m of {entity.name} left out")
        number_of[entity.name] = len(actions)
        actions.append(PlaceWall((v["a_x"], v["a_y"]), (v["b_x"], v["b_y"]), min(v["a_z"], v["b_z"]), v["height"]))
    for kind, verb in IN_WALL.items():
        for place, entity in (item for item in entities if item[1].kind == kind):
            v = entity.values
            if v["wall"] not in number_of:
                notes.append(f"{place} left out: {entity.name} lies in {v['wall']!r}, which is not there")
            elif min(v["width"], v["height"]) <= 0:
                notes.append(f"{place} left out: {entity.name} has no width or no height")
            else:
                actions.append(verb(number_of[v["wall"]], _triple(v), v["width"], v["height"]))
    for place, entity in (item for item in entities if item[1].kind == "bbox"):
        v = entity.values
        extent = (v["scale_x"], v["scale_y"], v["scale_z"])
        if min(extent) <= 0:
            notes.append(f"{place} left out: {entity.name} has a scale of 0 or less")
            continue
        category = re.sub(r"[^a-z0-9]+", "_", v["class"].lower()).strip("_")
        if category != v["class"]:
            notes.append(f"{place}: class {v['class']!r} written as {category!r}")
        normal = (math.cos(v["angle_z"]), math.sin(v["angle_z"]), 0.0)
        actions.append(PlaceAnchor(category, _triple(v), normal, extent))
    return PlanRoom(tuple(actions))


def _triple(values: dict) -> tuple[float, float, float]:
    return tuple(values[key] for key in POSITION)


def _entities(plan: Action | ActionList, notes: list[str]) -> list[_Entity]:
    actions = plan.actions if isinstance(plan, (PlanRoom, ActionList)) else (plan,)
    num_walls = sum(isinstance(action, PlaceWall) for action in actions)
    rows = {kind: [] for kind in FIELDS}
    for number, action in enumerate(actions):
        if isinstance(action, PlaceWall):
            rows["wall"].append([*action.a, action.z, *action.b, action.z, action.height, 0.0])
        elif isinstance(action, (PlaceDoor, PlaceWindow)):
            if action.wall >= num_walls:
                notes.append(f"{action.verb} left out: names wall {action.wall}, there are {num_walls}")
                continue
            row = [f"wall_{action.wall}", *action.center, action.width, action.height]
            rows[action.verb.removeprefix("place_")].append(row)
        elif isinstance(action, PlaceAnchor):
            box = action.to_box()
            rows["bbox"].append([action.category or "unknown", *action.center, box.yaw, *action.extent])
            if not action.category:
                notes.append(f"anchor {number}: has no category, its class is written as unknown")
            if abs(action.normal[2]) > 1e-3:
                notes.append(f"anchor {number} ({action.category}): normal {list(action.normal)} made level")
            if action.confidence is not None:
                notes.append(f"anchor {number} ({action.category}): confidence {action.confidence:.2f} left out")
        else:
            notes.append(f"{action.verb} left out: the language has no such entity")
    return [
        _Entity(kind, f"{kind}_{i}", {
            key: value if isinstance(value, str) else float(value) for key, value in zip(FIELDS[kind], row, strict=True)
        })
        for kind, table in rows.items() for i, row in enumerate(table)
    ]  # fmt: skip


def lower_corner(plan: Action | ActionList) -> np.ndarray:
    """[3] metres: the least x, y and z of the positions of a plan's script, the offset that SpatialLM shifts by."""
    rows = [entity.values for entity in _entities(plan, [])]
    keys = [key for key in (*POSITION, *WALL) if _range(key) == "position"]
    return np.array(
        [min((row[k] for row in rows for k in keys if k in row and k[-1] == axis), default=0.0) for axis in "xyz"]
    )
