"""Depth and cameras of VGGT's own, in metres: its unit is arbitrary, known poses give it one."""

from __future__ import annotations

import numpy as np
import torch

from roomplan_lib.model.positions import VGGT_HEADS, align_cameras
from roomplan_lib.model.vggt import VGGT, pose_encoding_to_cameras


@torch.no_grad()
def own_depth(
    vggt: VGGT, pictures: np.ndarray, camera_to_world: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """VGGT's depth [V, H, W] metres, its K [V, 3, 3] pixels and its camera_to_world [V, 4, 4] in the scene's world.

    pictures: uint8 [V, H, W, 3], sides multiples of the patch size. camera_to_world: [V, 4, 4] known poses, metres, of
    which only the frame and the scale are taken, as `vggt_patch_coordinates` does.
    Raises ValueError for a VGGT without camera and depth heads, and where the poses fix no scale.
    """
    device = next(vggt.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2)[None].float() / 255
    predictions = vggt(pixels, heads=VGGT_HEADS)
    world_to_camera, K = pose_encoding_to_cameras(predictions["pose_enc"], tuple(pixels.shape[-2:]))
    rotation = world_to_camera[..., :3].transpose(-1, -2)
    centers = -(rotation @ world_to_camera[..., 3:])[..., 0]
    known = torch.as_tensor(np.asarray(camera_to_world), dtype=torch.float32, device=device)[None]
    scale, turn, shift = align_cameras(rotation, centers, known[..., :3, :3], known[..., :3, 3])
    poses = torch.eye(4, device=device).repeat(len(pictures), 1, 1)
    poses[:, :3, :3] = turn @ rotation[0]
    poses[:, :3, 3] = scale * (centers[0] @ turn[0].T) + shift
    depth = scale[0] * predictions["depth"][0, ..., 0]
    return depth.cpu().numpy(), K[0].cpu().numpy(), poses.cpu().numpy().astype(np.float64)
