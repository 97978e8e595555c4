"""Cameras, frames, oriented boxes and their exact overlap. NumPy only: no files, no torch.

World: metres, right-handed, z up. Camera: OpenCV (x right, y down, z forward). Pixel (0, 0) has its
centre at (0, 0). Poses are 4x4, act on column vectors and are named by their direction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, eq=False)
class OrientedBox:
    """A box in space.

    center: [3] metres. extent: [3] full side lengths in metres, along the box axes.
    rotation: [3, 3], its columns are the box axes in the frame of `center` (right-handed).
    label: category name, "" when unknown. object_id: the source's own name for the instance, "" when it has none.

    Raises ValueError for wrong shapes, non-finite numbers, negative extents or a matrix that is no rotation.
    """

    center: np.ndarray
    extent: np.ndarray
    rotation: np.ndarray = field(default_factory=lambda: np.eye(3))
    label: str = ""
    object_id: str = ""

    def __post_init__(self) -> None:
        for name, shape in (("center", (3,)), ("extent", (3,)), ("rotation", (3, 3))):
            value = np.array(getattr(self, name), dtype=np.float64)
            if value.shape != shape or not np.isfinite(value).all():
                raise ValueError(f"OrientedBox.{name}: expected {shape} finite numbers, got {value.tolist()}")
            value.flags.writeable = False
            object.__setattr__(self, name, value)
        if (self.extent < 0).any():
            raise ValueError(f"OrientedBox.extent: expected lengths of at least 0 m, got {self.extent.tolist()}")
        if np.abs(self.rotation.T @ self.rotation - np.eye(3)).max() > 1e-3 or np.linalg.det(self.rotation) < 0:
            raise ValueError(f"OrientedBox.rotation: expected a rotation matrix, got {self.rotation.tolist()}")

    @property
    def volume(self) -> float:
        """Cubic metres."""
        return float(np.prod(self.extent))

    @property
    def yaw(self) -> float:
        """Angle of the first box axis about world z, radians in (-pi, pi]."""
        return float(np.arctan2(self.rotation[1, 0], self.rotation[0, 0]))

    def transformed(self, transform: np.ndarray) -> OrientedBox:
        """The same box in another frame; `transform` is a rigid 4x4 from this frame to that one."""
        rotation = transform[:3, :3]
        return OrientedBox(
            rotation @ self.center + transform[:3, 3], self.extent, rotation @ self.rotation, self.label, self.object_id
        )


def rotation_z(yaw: float) -> np.ndarray:
    """[3, 3] rotation about world z by `yaw` radians, counter-clockwise seen from above."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


# Corner k of a box has the sign of bit 2, 1, 0 of k along the box's x, y, z axis.
CORNER_SIGNS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
BOX_EDGES = np.array([(a, b) for a in range(8) for b in range(a) if bin(a ^ b).count("1") == 1])
# Faces with their corners counter-clockwise seen from outside: -x, +x, -y, +y, -z, +z.
BOX_FACES = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])


def box_corners(box: OrientedBox) -> np.ndarray:
    """[8, 3] corners in metres, in the order of `CORNER_SIGNS` (x slowest, z fastest, minus before plus)."""
    return box.center + (CORNER_SIGNS * box.extent / 2) @ box.rotation.T


def points_in_box(points: np.ndarray, box: OrientedBox, margin: float = 0.0) -> np.ndarray:
    """[N] bool: which of the points [N, 3] lie in the box grown by `margin` metres on every side."""
    local = (points - box.center) @ box.rotation
    return (np.abs(local) <= box.extent / 2 + margin).all(axis=-1)


def box_intersection_volume(a: OrientedBox, b: OrientedBox) -> float:
    """Cubic metres shared by two boxes of any rotation, exact up to rounding.

    Box `a` is clipped by the six half-spaces of `b`; the volume of what is left follows from the divergence theorem.
    """
    if a.volume == 0 or b.volume == 0 or np.linalg.norm(a.center - b.center) >= (_radius(a) + _radius(b)):
        return 0.0
    tolerance = 1e-12 * max(_radius(a), _radius(b))
    corners = (box_corners(a) - b.center) @ b.rotation  # in b's own frame
    faces = [corners[face] for face in BOX_FACES]
    for axis in range(3):
        for sign in (-1.0, 1.0):
            faces = _clip_polyhedron(faces, axis, sign, b.extent[axis] / 2, tolerance)
            if not faces:
                return 0.0
    reference = faces[0][0]
    volume = 0.0
    for face in faces:
        fan = face - reference
        volume += np.einsum("ij,ij->i", np.cross(fan[1:-1], fan[2:]), fan[:1].repeat(len(fan) - 2, 0)).sum() / 6
    return float(min(max(volume, 0.0), a.volume, b.volume))


def box_iou_3d(a: OrientedBox, b: OrientedBox) -> float:
    """Intersection over union of two oriented boxes, in [0, 1]; exact for any pair of rotations.

    Two boxes without volume have IoU 0.
    """
    shared = box_intersection_volume(a, b)
    union = a.volume + b.volume - shared
    return shared / union if union > 0 else 0.0


def _radius(box: OrientedBox) -> float:
    return float(np.linalg.norm(box.extent)) / 2


def _clip_polyhedron(faces: list, axis: int, sign: float, offset: float, tolerance: float) -> list:
    """Faces of the part of a convex polyhedron where `sign * point[axis] <= offset`."""
    distances = [sign * face[:, axis] - offset for face in faces]
    if max(d.max() for d in distances) <= tolerance:
        return faces
    kept, rim = [], []
    for face, d in zip(faces, distances, strict=True):
        polygon = []
        for i in range(len(face)):
            j = (i + 1) % len(face)
            if d[i] <= tolerance:
                polygon.append(face[i])
                if d[i] >= -tolerance:
                    rim.append(face[i])
            if (d[i] < -tolerance and d[j] > tolerance) or (d[i] > tolerance and d[j] < -tolerance):
                crossing = face[i] + (face[j] - face[i]) * (d[i] / (d[i] - d[j]))
                polygon.append(crossing)
                rim.append(crossing)
        if len(polygon) >= 3:
            kept.append(np.array(polygon))
    if len(kept) < 2:  # only a face or an edge touches the half-space
        return []
    if len(rim) >= 3:  # close the cut: convex, so sorting by angle about the middle orders it
        rim = np.array(rim)
        u, v = (axis + 1) % 3, (axis + 2) % 3
        angle = np.arctan2(rim[:, v] - rim[:, v].mean(), rim[:, u] - rim[:, u].mean()) * sign
        kept.append(rim[np.argsort(angle)])
    return kept


def invert_pose(pose: np.ndarray) -> np.ndarray:
    """Inverse of a rigid 4x4 transform (or a stack [..., 4, 4])."""
    inverse = np.zeros_like(pose)
    rotation = np.swapaxes(pose[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = rotation
    inverse[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation, pose[..., :3, 3])
    inverse[..., 3, 3] = 1
    return inverse


def look_at(eye: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[4, 4] camera_to_world of an upright OpenCV camera at `eye` that looks at `target` (both [3], metres)."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = eye
    return pose


def world_to_reference(camera_to_world: np.ndarray) -> np.ndarray:
    """[4, 4] rigid transform from the scene's world into the reference frame `cam0_gravity` of a first view.

    Origin at the camera, z up, y its horizontal heading, x right. A camera that looks within about 11 degrees of
    straight up or down has no heading of its own; there the image's up direction gives it.
    """
    rotation = camera_to_world[:3, :3]
    heading = rotation[:2, 2]
    if np.linalg.norm(heading) < 0.2:
        heading = -rotation[:2, 1] * (-np.sign(rotation[2, 2]) or 1.0)
    heading = heading / np.linalg.norm(heading)
    axes = np.array([[heading[1], -heading[0], 0.0], [heading[0], heading[1], 0.0], [0.0, 0.0, 1.0]])
    transform = np.eye(4)
    transform[:3, :3] = axes
    transform[:3, 3] = -axes @ camera_to_world[:3, 3]
    return transform


def resize_intrinsics(K: np.ndarray, old_size: tuple[int, int], new_size: tuple[int, int]) -> np.ndarray:
    """K [3, 3] of an image resized from `old_size` to `new_size`, both (width, height) in pixels.

    The integer coordinate is a pixel's centre, so the principal point moves by half a pixel before and after scaling.
    """
    if old_size == new_size:
        return np.array(K, dtype=np.float64)  # to the last digit
    sx, sy = new_size[0] / old_size[0], new_size[1] / old_size[1]
    scaled = np.array(K, dtype=np.float64)
    scaled[0, :2] *= sx
    scaled[1, :2] *= sy
    scaled[0, 2] = (K[0, 2] + 0.5) * sx - 0.5
    scaled[1, 2] = (K[1, 2] + 0.5) * sy - 0.5
    return scaled


def turn_camera(
    K: np.ndarray, camera_to_world: np.ndarray, size: tuple[int, int], quarter_turns: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """K [3, 3], camera_to_world [4, 4] and (width, height) of a picture turned counter-clockwise by quarter turns.

    The picture turns as `np.rot90` does; the pixel of a world point turns with it.
    """
    K, camera_to_world = np.array(K, dtype=np.float64), np.array(camera_to_world, dtype=np.float64)
    width, height = size
    for _ in range(quarter_turns % 4):
        # Pixel (u, v) moves to (v, width - 1 - u): the new x axis is the old y axis, the new y axis the old -x.
        fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
        K = np.array([[fy, 0.0, cy], [0.0, fx, width - 1 - cx], [0.0, 0.0, 1.0]])
        axes = camera_to_world[:3, :3]
        camera_to_world[:3, :3] = np.stack([axes[:, 1], -axes[:, 0], axes[:, 2]], axis=1)
        width, height = height, width
    return K, camera_to_world, (width, height)


def unproject(depth: np.ndarray, K: np.ndarray, camera_to_world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points of a depth image.

    depth: [H, W] metres along the camera's z, 0 = missing. K: [3, 3] pixels, for this H and W.
    Returns points [H, W, 3] in metres (world frame) and valid [H, W] bool; points of missing pixels are NaN.
    """
    height, width = depth.shape
    valid = np.isfinite(depth) & (depth > 0)
    z = np.where(valid, depth, np.nan)
    v, u = np.mgrid[:height, :width]
    camera = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z], axis=-1)
    return camera @ camera_to_world[:3, :3].T + camera_to_world[:3, 3], valid


def project(points: np.ndarray, K: np.ndarray, camera_to_world: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of world points [..., 3]: returns (pixels [..., 2] as (u, v), depth [...] metres along z).

    Points at or behind the camera plane get NaN pixels; their depth stays, so the caller can tell.
    """
    camera = (points - camera_to_world[:3, 3]) @ camera_to_world[:3, :3]
    z = camera[..., 2]
    safe = np.where(z > 1e-6, z, np.nan)[..., None]
    return camera[..., :2] / safe * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]], z


def project_segments(
    segments: np.ndarray, K: np.ndarray, camera_to_world: np.ndarray, near: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """Image lines of world segments [N, 2, 3], cut at the plane `near` metres before the camera.

    Returns (pixels [M, 2, 2], index [M] of the segment each line came from); segments wholly behind are dropped.
    """
    camera = (segments - camera_to_world[:3, 3]) @ camera_to_world[:3, :3]
    z = camera[..., 2]
    index = np.flatnonzero((z > near).any(axis=1))
    camera, z = camera[index], z[index]
    share = (near - z[:, 0]) / np.where(z[:, 1] == z[:, 0], 1.0, z[:, 1] - z[:, 0])
    cut = camera[:, 0] + share[:, None] * (camera[:, 1] - camera[:, 0])
    camera = np.where((z <= near)[..., None], cut[:, None], camera)
    pixels = camera[..., :2] / camera[..., 2:] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]]
    return pixels, index
