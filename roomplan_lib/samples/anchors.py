"""`place_anchor` samples: an instruction that names visible objects, and the action or list of actions that marks them.

A target that no view shows, or words that fit two objects, would teach the model to guess, so neither gets a sample; an
object that the scene does not hold is answered by the action "none".
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
    plural,
    unique_phrases,
    upright,
)
from roomplan_lib.scenes import CATEGORIES, Scene

TASK = "place_anchor"
TEMPLATES = (
    "Place an anchor on the {}.",
    "Put an anchor on the {}.",
    "Anchor the {}.",
    "Find the {} and place an anchor on it.",
    "Mark the {} with an anchor.",
    "Where is the {}? Place an anchor there.",
)
LIST_TEMPLATES = (
    "Place anchors on all {}.",
    "Put an anchor on every one of the {}.",
    "Mark all the {} with anchors.",
    "Find all {} and place an anchor on each.",
)
MIN_EXTENT = 0.01  # metres: an anchor's number with two decimals must not be 0
NEAREST = ("{} nearest to the {}", "{} closest to the {}")
FARTHEST = ("{} farthest from the {}",)


def place_anchor_action(scene_id: str, box: OrientedBox) -> str:
    """Text of the action that marks `box`: center, normal, extent in metres, in the box's own frame of reference.

    normal: the first horizontal box axis, (cos yaw, sin yaw, 0). extent: full lengths along normal, up x normal, up.
    Raises ValueError for a box that is not upright.
    """
    return json.dumps(_anchor(scene_id, box))


def _anchor(scene_id: str, box: OrientedBox) -> dict:
    box = _require_upright(box)
    return {
        "action": TASK,
        "scene": scene_id,
        "category": box.label,
        "center": rounded(box.center, 4),
        "normal": rounded([np.cos(box.yaw), np.sin(box.yaw), 0.0], 4),
        "extent": rounded(box.extent, 4),
    }


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
        if not visible[index] or not _can_be_marked(box):
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


def build_lists(scene: Scene, visible: np.ndarray, seed: int = 0) -> list[dict]:
    """ "Place anchors on all chairs.": one sample per category of several instances that the views all show.

    The target is a JSON array of place_anchor actions in the order of the scene's boxes; the program sorts it.
    Otherwise as `build_anchors`.
    """
    samples = []
    for category in CATEGORIES:
        indices = [index for index, box in enumerate(scene.boxes) if box.label == category]
        boxes = [scene.boxes[index] for index in indices]
        if len(boxes) < 2 or not visible[indices].all() or not all(map(_can_be_marked, boxes)):
            continue
        chance = random.Random(f"{seed}/{scene.scene_id}/{category}/list")
        samples.append(
            {
                "instruction": chance.choice(LIST_TEMPLATES).format(plural(category)),
                "action_json": json.dumps([_anchor(scene.scene_id, box) for box in boxes]),
                "task": "place_anchors",
                "question_id": f"{scene.scene_id}-place_anchors-{len(samples):03d}",
                "object_ids": [box.object_id for box in boxes],
                "boxes": [box_record(box) for box in boxes],
            }
        )
    return samples


def build_negatives(scene: Scene, visible: np.ndarray, seed: int = 0, share: float = 0.25) -> list[dict]:
    """Instructions that name a category of which the scene's annotation holds no instance; the target is "none".

    share: of the scene's place_anchor samples with these views and these together, at least one. One category is asked
    for once, so a scene that holds most of them gets fewer. Otherwise as `build_anchors`.
    Raises ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"negative_share: expected a share between 0 and 1, got {share}")
    present = {box.label for box in scene.boxes}
    absent = [category for category in CATEGORIES if category not in present]
    num_positive = len(build_anchors(scene, visible, seed))
    count = min(len(absent), max(1, round(num_positive * share / (1 - share))))
    chance = random.Random(f"{seed}/{scene.scene_id}/negative")
    action = json.dumps({"action": "none", "scene": scene.scene_id, "reason": "not_present"})
    return [
        {
            "instruction": chance.choice(TEMPLATES).format(category_text(category)),
            "action_json": action,
            "task": "none",
            "question_id": f"{scene.scene_id}-none-{number:03d}",
            "object_ids": [],
            "boxes": [],
        }
        for number, category in enumerate(chance.sample(absent, count))
    ]


def _can_be_marked(box: OrientedBox) -> bool:
    return upright(box) is not None and bool((box.extent >= MIN_EXTENT).all())


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
