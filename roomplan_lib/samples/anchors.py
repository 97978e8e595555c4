"""`place_anchor` samples: an instruction that names one visible object, and the action that marks it.

A target that no view shows, or words that fit two objects, would teach the model to guess, so neither gets a sample.
"""

from __future__ import annotations

import json
import random

import numpy as np

from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import box_record, rounded
from roomplan_lib.samples.describe import (
    CLEAR_MARGIN,
    category_text,
    center_distance,
    footprint_gap,
    unique_phrases,
    upright,
)
from roomplan_lib.scenes import Scene

TASK = "place_anchor"
TEMPLATES = (
    "Place an anchor on the {}.",
    "Put an anchor on the {}.",
    "Anchor the {}.",
    "Find the {} and place an anchor on it.",
    "Mark the {} with an anchor.",
    "Where is the {}? Place an anchor there.",
)
NEAREST = ("{} nearest to the {}", "{} closest to the {}")
FARTHEST = ("{} farthest from the {}",)


def place_anchor_action(scene_id: str, box: OrientedBox) -> str:
    """Text of the action that marks `box`: center, normal, extent in metres, in the box's own frame of reference.

    normal: the first horizontal box axis, (cos yaw, sin yaw, 0). extent: full lengths along normal, up x normal, up.
    Raises ValueError for a box that is not upright.
    """
    box = _require_upright(box)
    action = {
        "action": TASK,
        "scene": scene_id,
        "category": box.label,
        "center": rounded(box.center, 4),
        "normal": rounded([np.cos(box.yaw), np.sin(box.yaw), 0.0], 4),
        "extent": rounded(box.extent, 4),
    }
    return json.dumps(action)


def build_anchors(scene: Scene, visible: np.ndarray, seed: int = 0) -> list[dict]:
    """The anchor samples of a scene, without the keys all its samples share (`images`, `geom_token`, ...).

    visible: [num_boxes] bool, which boxes the sample's views show. Every visible, upright box that can be named
    without doubt gets a sample for its phrase ("bed", "red chair"); one of a category with several instances also
    gets one for its place ("chair nearest to the bed"), where it is the nearest or farthest by CLEAR_MARGIN.
    Words and order depend on `seed` and the scene alone.
    """
    phrases = unique_phrases(scene)
    samples: list[dict] = []
    targets: dict[str, str] = {}
    for index, box in enumerate(scene.boxes):
        if not visible[index] or upright(box) is None or (box.extent < 0.01).any():
            continue
        chance = random.Random(f"{seed}/{scene.scene_id}/{box.object_id}/anchor")
        names = [phrases[index]] if index in phrases else []
        names += _relations(scene, index, visible, phrases, chance)
        for name in names:
            instruction = chance.choice(TEMPLATES).format(name)
            assert targets.setdefault(instruction, box.object_id) == box.object_id, instruction
            samples.append(
                {
                    "instruction": instruction,
                    "action_json": place_anchor_action(scene.scene_id, box),
                    "task": TASK,
                    "question_id": f"{scene.scene_id}-{TASK}-{len(samples):03d}",
                    "object_ids": [box.object_id],
                    "boxes": [box_record(box)],
                }
            )
    return samples


def _relations(
    scene: Scene, index: int, visible: np.ndarray, phrases: dict[int, str], chance: random.Random
) -> list[str]:
    """At most one phrase that tells a box from the others of its category by its distance to a named object."""
    box = scene.boxes[index]
    rivals = [other for other in scene.boxes if other.label == box.label and other is not box]
    if not rivals or any(upright(other) is None for other in rivals):
        return []
    options = []
    for landmark_index, landmark_name in phrases.items():
        landmark = scene.boxes[landmark_index]
        if not visible[landmark_index] or landmark.label == box.label or upright(landmark) is None:
            continue
        center, gap = center_distance(box, landmark), footprint_gap(upright(box), upright(landmark))
        rival_centers = [center_distance(other, landmark) for other in rivals]
        rival_gaps = [footprint_gap(upright(other), upright(landmark)) for other in rivals]
        # People judge by the gap, the record by the centre: both must agree, clearly.
        if center + CLEAR_MARGIN <= min(rival_centers) and gap + CLEAR_MARGIN <= min(rival_gaps):
            options.append((0, center, NEAREST, landmark_name))
        elif center >= max(rival_centers) + CLEAR_MARGIN and gap >= max(rival_gaps) + CLEAR_MARGIN:
            options.append((1, center, FARTHEST, landmark_name))
    if not options:
        return []
    _, _, wording, landmark_name = min(options, key=lambda option: (option[:2], option[3]))
    return [chance.choice(wording).format(category_text(box.label), landmark_name)]


def _require_upright(box: OrientedBox) -> OrientedBox:
    standing = upright(box)
    if standing is None:
        raise ValueError(f"box {box.object_id!r} ({box.label}): tilted, so no yaw describes it; got {box.rotation}")
    return standing
