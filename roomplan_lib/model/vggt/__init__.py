"""VGGT, the frozen encoder: our implementation, state-dict compatible with the published VGGT-1B."""

from roomplan_lib.model.vggt.aggregator import Aggregator
from roomplan_lib.model.vggt.cameras import (
    camera_points,
    cameras_to_pose_encoding,
    pose_encoding_to_cameras,
    unproject_depth,
)
from roomplan_lib.model.vggt.checkpoint import load_vggt, load_vggt_state_dict
from roomplan_lib.model.vggt.config import VGGTConfig
from roomplan_lib.model.vggt.model import VGGT

__all__ = [
    "VGGT",
    "Aggregator",
    "VGGTConfig",
    "camera_points",
    "cameras_to_pose_encoding",
    "load_vggt",
    "load_vggt_state_dict",
    "pose_encoding_to_cameras",
    "unproject_depth",
]
