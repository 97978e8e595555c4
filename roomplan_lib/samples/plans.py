"""`plan_room` samples: a whole room at once, its walls, doors, windows and every piece that the views show."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np

from roomplan_lib.actions import PlanRoom, action_record
from roomplan_lib.actions.rooms import room_actions
from roomplan_lib.samples import box_record
from roomplan_lib.samples.describe import upright
from roomplan_lib.scenes import Scene

TASK = "plan_room"
WITH_WALLS = (
    "Plan the room.",
    "Write the plan of this room: walls, doors, windows and furniture.",
    "Describe the whole room as a plan.",
)
FURNITURE = (
    "Plan the furniture of the room.",
    "Write a plan of everything that stands in this room.",
    "Place all the furniture that you see, as a plan.",
)


def build_plans(scene: Scene, visible: np.ndarray, seed: int = 0) -> list[dict]:
    """One sample: the room as a plan, without the keys all its samples share (`images`, `geom_token`, ...).

    visible: [num_boxes] bool, which boxes the sample's views show; the others and boxes that stand on no face are left
    out of the plan. Walls, doors and windows are those that the scene's reader tells; where it tells none, as for real
    ARKitScenes scans, the instruction asks for furniture alone. Nothing for a scene of which the views show nothing.
    """
    boxes = [box for box, seen in zip(scene.boxes, visible, strict=True) if seen and (box.extent >= 0.01).all()]
    boxes = [standing for box in boxes if (standing := upright(box)) is not None]
    plan = room_actions(replace(scene, boxes=boxes))
    if not plan.actions:
        return []
    chance = random.Random(f"{seed}/{scene.scene_id}/plan")
    wording = WITH_WALLS if any(surface.kind == "wall" for surface in scene.surfaces) else FURNITURE
    return [
        {
            "instruction": chance.choice(wording),
            "action_json": json.dumps(_rounded(action_record(PlanRoom(plan.actions, scene.scene_id)))),
            "task": TASK,
            "question_id": f"{scene.scene_id}-{TASK}-000",
            "object_ids": [box.object_id for box in boxes],
            "boxes": [box_record(box) for box in boxes],
        }
    ]


def _rounded(value: object) -> object:
    """The same JSON data with its numbers at four decimals."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return round(value, 4) + 0.0 if isinstance(value, float) else value
