"""The target of a sample in the frames that matter: the scene's own, and the reference frame that the model writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roomplan_lib.actions import (
    Action,
    ActionError,
    anchor_from_box,
    anchor_text,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.geometry import rotation_z, world_to_reference
from roomplan_lib.samples import BOX_MARKER, box_from_record


@dataclass(frozen=True)
class Augmentation:
    """A change of the frame that the model reads and writes: a turn about z, then all lengths times a factor."""

    yaw: float = 0.0  # radians
    scale: float = 1.0


UNCHANGED = Augmentation()


def sample_world_to_reference(sample: dict) -> np.ndarray:
    """[4, 4] from the scene's frame to the reference frame of the first view; identity without geometry."""
    geometry = sample.get("geom_token")
    if not geometry:
        return np.eye(4)
    pose = np.eye(4)
    pose[:3, :3] = np.reshape(geometry["R"][0], (3, 3))
    pose[:3, 3] = geometry["t"][0]
    return world_to_reference(pose)


def world_to_model(sample: dict, augmentation: Augmentation = UNCHANGED) -> np.ndarray:
    """[4, 4] similarity from the scene's frame to the reference frame, turned and scaled by the augmentation."""
    change = np.eye(4)
    change[:3, :3] = augmentation.scale * rotation_z(augmentation.yaw)
    return change @ sample_world_to_reference(sample)


def scene_action(sample: dict) -> Action:
    """The sample's action, or list of actions, in the scene's frame.

    Raises ValueError when the record's text is none.
    """
    action = parse_action(sample["action_json"], categories=None)
    if isinstance(action, ActionError):
        raise ValueError(f"{sample['scene_id']}: action_json {sample['action_json']!r:.120}: {action.reason}")
    return action


def reference_action(sample: dict, augmentation: Augmentation = UNCHANGED) -> Action:
    """The sample's action in the reference frame, without its scene, in canonical form and order.

    Raises ValueError for an action that cannot be read, or one without geometry: its frame would be unknown.
    """
    if not sample.get("geom_token"):
        raise ValueError(
            f"scene {sample['scene_id']}: an action without geom_token has a target in an unknown frame; "
            "prepare the sample with poses"
        )
    return canonical(scene_action(sample).transformed(world_to_model(sample, augmentation)).bound(""))


def response_text(sample: dict, augmentation: Augmentation = UNCHANGED, codec: str = "m2") -> str:
    """The supervised text: the answer, or the action in the reference frame, without its scene.

    codec: how its numbers are written, see `actions.format_action`.
    """
    if "action_json" not in sample:
        return sample["answer"]
    return format_action(reference_action(sample, augmentation), codec)


def question_text(sample: dict, augmentation: Augmentation = UNCHANGED, codec: str = "m2") -> str:
    """The question or instruction, each "<box_k>" in it replaced by boxes[k] as an anchor in the reference frame."""
    text = sample["instruction"] if "instruction" in sample else sample["question"]

    def written(marker) -> str:
        box = box_from_record(sample["boxes"][int(marker[1])])
        return anchor_text(canonical(anchor_from_box(box).transformed(world_to_model(sample, augmentation))), codec)

    return BOX_MARKER.sub(written, text) if sample.get("boxes") else text  # prepared without scans: nowhere to point


def text_length(record: dict) -> int:
    """Characters that a sample is asked and answers with."""
    words = sum(len(str(record.get(key) or "")) for key in ("situation", "question", "instruction", "answer"))
    return words + len(str(record.get("action_json") or ""))
