"""VGGT's 9-number cameras and what follows from them. OpenCV cameras, torch, any leading axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _rotation_from_quaternion(q: Tensor) -> Tensor:
    """[..., 4] xyzw of any length but 0 -> [..., 3, 3]."""
    x, y, z, w = q.unbind(-1)
    two = 2 / q.square().sum(-1)
    entries = (
        *(1 - two * (y * y + z * z), two * (x * y - z * w), two * (x * z + y * w)),
        *(two * (x * y + z * w), 1 - two * (x * x + z * z), two * (y * z - x * w)),
        *(two * (x * z - y * w), two * (y * z + x * w), 1 - two * (x * x + y * y)),
    )
    return torch.stack(entries, dim=-1).unflatten(-1, (3, 3))


def _quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """[..., 3, 3] -> unit [..., 4] xyzw with w >= 0."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = (row.unbind(-1) for row in rotation.unbind(-2))
    # Row i is 4 * q_i * (x, y, z, w); the row of the largest component is the best conditioned one.
    products = torch.stack(
        (
            torch.stack((1 + xx - yy - zz, xy + yx, xz + zx, zy - yz), dim=-1),
            torch.stack((xy + yx, 1 - xx + yy - zz, yz + zy, xz - zx), dim=-1),
            torch.stack((xz + zx, yz + zy, 1 - xx - yy + zz, yx - xy), dim=-1),
            torch.stack((zy - yz, xz - zx, yx - xy, 1 + xx + yy + zz), dim=-1),
        ),
        dim=-2,
    )
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*products.shape[:-2], 1, 4)
    q = F.normalize(products.gather(-2, largest).squeeze(-2), dim=-1)
    return torch.where(q[..., 3:] < 0, -q, q)


def pose_encoding_to_cameras(pose_encoding: Tensor, image_size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """World_to_camera [..., 3, 4] and K [..., 3, 3] of pose encodings [..., 9] ("absT_quaR_FoV").

    Translation, quaternion xyzw of any length, vertical and horizontal field of view in radians. K is in pixels of
    a picture of (H, W) pixels, with the principal point at (W / 2, H / 2) as VGGT assumes. Computed in fp32.
    Raises ValueError for another last axis.
    """
    if pose_encoding.shape[-1:] != (9,):
        raise ValueError(f"pose_encoding: expected [..., 9], got {tuple(pose_encoding.shape)}")
    pose_encoding = pose_encoding.float()
    translation, quaternion, fov = pose_encoding.split((3, 4, 2), dim=-1)
    world_to_camera = torch.cat((_rotation_from_quaternion(quaternion), translation[..., None]), dim=-1)
    height, width = image_size_hw
    focal_y, focal_x = (pose_encoding.new_tensor((height, width)) / 2 / torch.tan(fov / 2)).unbind(-1)
    zero, one = torch.zeros_like(focal_x), torch.ones_like(focal_x)
    K = torch.stack((focal_x, zero, one * width / 2, zero, focal_y, one * height / 2, zero, zero, one), dim=-1)
    return world_to_camera, K.unflatten(-1, (3, 3))


def cameras_to_pose_encoding(world_to_camera: Tensor, K: Tensor, image_size_hw: tuple[int, int]) -> Tensor:
    """Pose encodings [..., 9] of world_to_camera [..., 3, 4] (or 4x4) and K [..., 3, 3] for pictures of (H, W) pixels.

    The inverse of `pose_encoding_to_cameras`, with a unit quaternion of w >= 0. The encoding has no place for the
    principal point and takes it to be the picture's centre. Raises ValueError for other shapes.
    """
    if world_to_camera.shape[-2:] not in ((3, 4), (4, 4)) or K.shape[-2:] != (3, 3):
        raise ValueError(
            "expected world_to_camera [..., 3, 4] and K [..., 3, 3], "
            f"got {tuple(world_to_camera.shape)}, {tuple(K.shape)}"
        )
    world_to_camera, K = world_to_camera.float(), K.float()
    size_hw = K.new_tensor(image_size_hw)
    fov = 2 * torch.atan(size_hw / 2 / torch.stack((K[..., 1, 1], K[..., 0, 0]), dim=-1))
    return torch.cat(
        (world_to_camera[..., :3, 3], _quaternion_from_rotation(world_to_camera[..., :3, :3]), fov), dim=-1
    )


def camera_points(depth: Tensor, K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x, y, z [..., H, W] as the camera sees them, of depth [..., H, W] along its z and K [..., 3, 3] in pixels."""
    depth = depth.to(torch.promote_types(depth.dtype, K.dtype))  # bfloat16 has no pixel 257
    rows, columns = (torch.arange(count, device=depth.device, dtype=depth.dtype) for count in depth.shape[-2:])
    K = K[..., None, None, :, :]
    x = (columns - K[..., 0, 2]) / K[..., 0, 0] * depth
    return x, (rows[:, None] - K[..., 1, 2]) / K[..., 1, 1] * depth, depth


def unproject_depth(depth: Tensor, world_to_camera: Tensor, K: Tensor) -> Tensor:
    """World points [..., H, W, 3] of depth maps [..., H, W] or [..., H, W, 1], in the unit of depth and translation.

    depth: along the camera's z. world_to_camera: rigid [..., 3, 4] (or 4x4). K: [..., 3, 3] pixels of this picture;
    pixel (0, 0) has its centre at (0, 0). A depth of 0 lands on the camera's centre: mask such pixels.
    Raises ValueError for other shapes.
    """
    if depth.ndim == world_to_camera.ndim + 1 and depth.shape[-1] == 1:
        depth = depth[..., 0]
    if (
        depth.ndim != world_to_camera.ndim
        or K.shape[-2:] != (3, 3)
        or world_to_camera.shape[-2:] not in ((3, 4), (4, 4))
    ):
        raise ValueError(
            "expected depth [..., H, W], world_to_camera [..., 3, 4] and K [..., 3, 3] with the same leading axes, "
            f"got {tuple(depth.shape)}, {tuple(world_to_camera.shape)}, {tuple(K.shape)}"
        )
    points = torch.stack(camera_points(depth, K), dim=-1)
    rotation, translation = world_to_camera[..., None, :3, :3], world_to_camera[..., None, None, :3, 3]
    return (points - translation) @ rotation  # row vectors times R are columns under its transpose
