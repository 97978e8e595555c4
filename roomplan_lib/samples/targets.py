"""The target of a sample in the frames that matter: the scene's own, and the reference frame that the model writes."""

from __future__ import annotations

import numpy as np

from roomplan_lib.actions import ActionError, PlaceAnchor, anchor_from_box, format_action, parse_action
from roomplan_lib.geometry import world_to_reference


def sample_world_to_reference(sample: dict) -> np.ndarray:
    """[4, 4] from the scene's frame to the reference frame of the first view; identity without geometry."""
    geometry = sample.get("geom_token")
    if not geometry:
        return np.eye(4)
    pose = np.eye(4)
    pose[:3, :3] = np.reshape(geometry["R"][0], (3, 3))
    pose[:3, 3] = geometry["t"][0]
    return world_to_reference(pose)


def reference_action(sample: dict) -> PlaceAnchor:
    """The sample's action in the reference frame, unbound, in canonical form."""
    if not sample.get("geom_token"):
        raise ValueError(
            f"scene {sample['scene_id']}: an action without geom_token has a target in an unknown frame; "
            "prepare the sample with poses"
        )
    action = scene_action(sample).transformed(sample_world_to_reference(sample))
    return anchor_from_box(action.to_box())


def scene_action(sample: dict) -> PlaceAnchor:
    """The sample's action in the scene's frame. Raises ValueError when the record's text is no action."""
    action = parse_action(sample["action_json"])
    if isinstance(action, ActionError):
        raise ValueError(f"{sample['scene_id']}: action_json {sample['action_json']!r:.120}: {action.reason}")
    return action


def response_text(sample: dict) -> str:
    """The supervised text: the answer, or the action in the reference frame (metres), without its scene.

    Raises ValueError for an action that cannot be read, or one without geometry: its frame would be unknown.
    """
    if "action_json" not in sample:
        return sample["answer"]
    return format_action(reference_action(sample))
