"""Small scene folders in the ARKitScenes layout, written by hand: every number in them is known to the test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.linalg import logm

from roomplan_lib.geometry import OrientedBox, look_at, rotation_z

SIZE = (64, 48)
K = np.array([[55.0, 0, 31.5], [0, 55.0, 23.5], [0, 0, 1]])
ROOM = OrientedBox([0, 0, 1.25], [6.0, 5.0, 2.5])  # floor at z = 0


def box(label: str, x: float, y: float, yaw: float = 0.0, size=(0.8, 0.6, 0.7), uid: str = "", z: float | None = None):
    """An upright box that stands on the floor unless `z` gives the height of its middle."""
    center = [x, y, size[2] / 2 if z is None else z]
    return OrientedBox(center, size, rotation_z(yaw), label, uid or f"{label}-{x:g}-{y:g}")


def walk(num: int = 8, radius: float = 1.2) -> list[np.ndarray]:
    """camera_to_world on a circle at 1.5 m, each looking over the room's middle to the far side."""
    angles = 0.1 + np.arange(num) / num * 2 * np.pi  # 0.1: no turn by exactly pi, whose axis-angle has two signs
    eyes = [np.array([radius * np.cos(a), radius * np.sin(a), 1.5]) for a in angles]
    return [look_at(eye, np.array([-eye[0] * 1.5, -eye[1] * 1.5, 0.5])) for eye in eyes]


def ray_depth(boxes, camera_to_world, K=K, size=SIZE, room=ROOM) -> np.ndarray:
    """float32 [H, W] metres: each pixel's ray against the boxes from outside and the room from inside (slab method)."""
    v, u = np.mgrid[: size[1], : size[0]].astype(float)
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1) @ camera_to_world[:3, :3].T
    depth = np.full(u.shape, np.inf)
    for item in [room, *boxes]:
        origin = (camera_to_world[:3, 3] - item.center) @ item.rotation
        direction = rays @ item.rotation
        direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)
        slabs = np.stack([(sign * item.extent / 2 - origin) / direction for sign in (-1, 1)])
        enter, leave = slabs.min(0).max(-1), slabs.max(0).min(-1)
        hit = leave if item is room else np.where((enter < leave) & (enter > 0), enter, np.inf)
        depth = np.minimum(depth, hit)
    return depth.astype(np.float32)


def traj_row(seconds: float, camera_to_world: np.ndarray) -> str:
    """A line of a .traj file; the axis-angle by the matrix logarithm, another route than the reader's."""
    world_to_camera = np.linalg.inv(camera_to_world)
    skew = np.real(logm(world_to_camera[:3, :3]))
    values = [skew[2, 1], skew[0, 2], skew[1, 0], *world_to_camera[:3, 3]]
    return f"{seconds:.8f} " + " ".join(f"{value:.9f}" for value in values)


def annotation(boxes) -> dict:
    """The 3DOD annotation: axes as rows, with the keys of Apple's files."""
    data = [
        {
            "uid": item.object_id,
            "label": item.label,
            "modelId": "",
            "children": [],
            "objectId": index + 1,
            "segments": {
                "obb": None,
                "obbAligned": {
                    "centroid": item.center.tolist(),
                    "axesLengths": item.extent.tolist(),
                    "normalizedAxes": item.rotation.T.ravel().tolist(),
                },
            },
            "hierarchy": [],
            "isInGroup": False,
            "labelType": "3D",
            "attributes": {},
        }
        for index, item in enumerate(boxes)
    ]
    return {"data": data, "stats": {}, "comment": "", "confirm": True, "skipped": False}


def write_scene(
    root: Path,
    boxes,
    *,
    scene_id: str = "42444499",
    fold: str = "Training",
    layout: str = "3dod",
    poses=None,
    times=None,
    pose_times=None,
    depth: bool = True,
    colors: dict[str, str] | None = None,
    size=SIZE,
    K=K,
) -> Path:
    """Write a scene; returns its folder. times: seconds of the pictures, pose_times: of the trajectory's rows."""
    poses = walk() if poses is None else poses
    times = [1000.0 + 0.1 * i for i in range(len(poses))] if times is None else times
    pose_times = times if pose_times is None else pose_times
    scene_dir = root / fold / scene_id
    frames = scene_dir / f"{scene_id}_frames" if layout == "3dod" else scene_dir
    for name in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics")[: None if depth else 1]:
        (frames / name).mkdir(parents=True, exist_ok=True)
    (frames / "lowres_wide_intrinsics").mkdir(exist_ok=True)
    for index, time in enumerate(times):
        stem = f"{scene_id}_{time:.3f}"
        pose = poses[min(index, len(poses) - 1)]
        metres = ray_depth(boxes, pose, K, size)
        shade = np.clip(metres / 6 * 255, 0, 255).astype(np.uint8)
        Image.fromarray(np.stack([shade] * 3, -1)).save(frames / "lowres_wide" / f"{stem}.png")
        if depth:
            millimetres = np.round(metres * 1000).astype(np.uint16)
            Image.fromarray(millimetres).save(frames / "lowres_depth" / f"{stem}.png")
        line = f"{size[0]} {size[1]} {K[0, 0]} {K[1, 1]} {K[0, 2]} {K[1, 2]}"
        (frames / "lowres_wide_intrinsics" / f"{stem}.pincam").write_text(line)
    rows = [traj_row(time, pose) for time, pose in zip(pose_times, poses, strict=True)]
    (frames / "lowres_wide.traj").write_text("\n".join(rows) + "\n")
    (scene_dir / f"{scene_id}_3dod_annotation.json").write_text(json.dumps(annotation(boxes)))
    if colors is not None:
        instances = {str(i): {"uid": uid, "color": color} for i, (uid, color) in enumerate(colors.items(), 1)}
        (scene_dir / f"{scene_id}_room.json").write_text(json.dumps({"instances": instances}))
    return scene_dir
