"""Rooms as files, in the layout of the ARKitScenes 3DOD download, with a sidecar for what that cannot hold."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import invert_pose
from roomplan_lib.scenes.rooms.collection import (
    check_settings,
    held_out,
    room_settings,
    room_sidecar,
    write_collection,
    write_ply,
)
from roomplan_lib.scenes.rooms.make import make_room
from roomplan_lib.scenes.rooms.plan import Room, room_rng, scene_id_of

POSE_RATE = 10  # poses per second, as ARKitScenes has them
_PNG_LEVEL = 1  # more costs time and saves little


def write_rooms(
    output: Path,
    num_rooms: int,
    seed: int = 0,
    *,
    num_poses: int = 24,
    frame_rate: float = 20.0,
    image_size: tuple[int, int] = (256, 192),
    workers: int | None = None,
    progress: bool = True,
    unusual: bool = False,
) -> list[Path]:
    """Write procedural rooms 0 .. num_rooms - 1 of a seed under `output` in the ARKitScenes 3DOD layout.

    num_poses: posed views per room, 10 a second. frame_rate: pictures per second, a multiple of 10; only every
    (frame_rate / 10)th has a pose. image_size: (width, height) in pixels. workers: processes, None for one per core;
    a script that starts more than one needs the `if __name__ == "__main__":` guard. Every fifth room is Validation;
    unusual rooms (see `make_room`), which are there to test on, are all.

    Returns the scene folders in order. A room that is there already with the same settings is kept; each is built
    beside its place and renamed when whole. The same arguments give the same bytes.

    Raises ValueError for settings out of range and for a folder that holds a room made with other settings;
    RuntimeError naming the room when making one fails (a full disk, for one).
    """
    output = Path(output)
    check_settings(num_rooms, seed, num_poses, image_size=image_size)
    if frame_rate < POSE_RATE or frame_rate % POSE_RATE or frame_rate > 60:
        raise ValueError(f"frame_rate: expected 10, 20, .. 60 pictures per second, got {frame_rate}")
    rooms = []
    for index in range(num_rooms):
        settings = room_settings(
            seed, index, num_poses=int(num_poses), frame_rate=float(frame_rate), image_size=[int(n) for n in image_size]
        ) | ({"unusual": True} if unusual else {})
        fold = "Validation" if unusual or held_out(index) else "Training"
        rooms.append((output / fold / scene_id_of(seed, index), settings))
    write_collection(rooms, _make_and_write, workers, progress)
    folders = [folder for folder, _ in rooms]
    if num_rooms:
        _write_tables(output, [(folder.name, folder.parent.name) for folder in folders])
    return folders


def _make_and_write(folder: Path, settings: dict) -> None:
    """Everything goes under a temporary name beside `folder`, renamed at the end."""
    from roomplan_lib.scenes.rooms.camera import camera_path  # Open3D takes a second to import
    from roomplan_lib.scenes.rooms.render import RoomRenderer

    room = make_room(settings["seed"], settings["index"], settings.get("unusual", False))
    renderer = RoomRenderer(room)
    size, num_poses = tuple(settings["image_size"]), settings["num_poses"]
    per_pose = round(settings["frame_rate"] / POSE_RATE)
    path = camera_path(room, renderer, num_poses * per_pose)
    rng = room_rng(room.seed, room.index, 2)

    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    frames = part / f"{room.scene_id}_frames"
    for name in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics", "instances"):
        (frames / name).mkdir(parents=True)

    start = round(rng.uniform(1000, 9000), 3)
    focal = size[0] * rng.uniform(0.815, 0.84)
    rows = []
    for k, camera_to_room in enumerate(path):
        stamp = f"{start + k / settings['frame_rate']:.3f}"
        world_to_camera = invert_pose(room.room_to_world @ camera_to_room)
        if k % per_pose == 0:
            axis_angle = Rotation.from_matrix(world_to_camera[:3, :3]).as_rotvec()
            # Poses and pictures come from two clocks: in some rows they differ by up to a millisecond.
            drift = rng.choice([0.0, 0.0, 0.0004, -0.0004, 0.001, -0.001])
            numbers = " ".join(f"{x:.9f}" for x in (*axis_angle, *world_to_camera[:3, 3]))
            rows.append(f"{float(stamp) + drift:.9f} {numbers}\n")
        # Autofocus changes the focal length a little; the camera is the one that the file states.
        f = focal * rng.uniform(0.999, 1.001)
        numbers = [
            f"{x:.6g}" for x in (f, f, (size[0] - 1) / 2 + rng.normal(0, 0.4), (size[1] - 1) / 2 + rng.normal(0, 0.4))
        ]
        fx, fy, cx, cy = map(float, numbers)
        K = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
        rgb, depth, ids = renderer.view(K, camera_to_room, size)
        name = f"{room.scene_id}_{stamp}"
        (frames / "lowres_wide_intrinsics" / f"{name}.pincam").write_text(f"{size[0]} {size[1]} {' '.join(numbers)}\n")
        millimetres = np.round(depth * 1000).astype(np.uint16)
        for sub, image in (("lowres_wide", rgb), ("lowres_depth", millimetres), ("instances", ids)):
            Image.fromarray(image).save(frames / sub / f"{name}.png", compress_level=_PNG_LEVEL)
    (frames / "lowres_wide.traj").write_text("".join(rows))

    points, colors, triangles, _ = renderer.colored_mesh()
    points = np.einsum("ij,nj->ni", room.room_to_world[:3, :3], points) + room.room_to_world[:3, 3]
    write_ply(part / f"{room.scene_id}_3dod_mesh.ply", points, colors, triangles)
    (part / f"{room.scene_id}_3dod_annotation.json").write_text(json.dumps(_annotation(room), indent=1))
    (part / f"{room.scene_id}_room.json").write_text(json.dumps(room_sidecar(room, settings), indent=1))
    part.rename(folder)


def _annotation(room: Room) -> dict:
    data = []
    for o in room.objects:
        box = {
            "centroid": o.box.center.tolist(),
            "axesLengths": o.box.extent.tolist(),
            "normalizedAxes": o.box.rotation.T.ravel().tolist(),  # rows are the box axes
        }
        data.append(
            {
                "uid": o.uid,
                "label": o.label,
                "modelId": "",
                "children": [],
                "objectId": o.instance_id,
                "segments": {"obb": box, "obbAligned": box},
                "hierarchy": None,
                "isInGroup": False,
                "labelType": "custom",
                "attributes": {},
            }
        )
    return {"data": data, "stats": {"numObjects": len(data)}, "comment": "", "confirm": True, "skipped": False}


def _write_tables(output: Path, rooms: list[tuple[str, str]]) -> None:
    """The split list and the metadata; rows of other rooms (another seed, an earlier call) stay."""
    splits = {
        scene_id: {"video_id": scene_id, "visit_id": f"9{scene_id[1:]}", "fold": fold} for scene_id, fold in rooms
    }
    for name, columns in (
        ("3dod_train_val_splits.csv", ("video_id", "visit_id", "fold")),
        ("metadata.csv", ("video_id", "visit_id", "sky_direction", "fold")),
    ):
        path = output / name
        table = {}
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                if tuple(reader.fieldnames or ()) != columns:
                    raise ValueError(
                        f"{path}: expected columns {', '.join(columns)}, got {reader.fieldnames}; move it away"
                    )
                table = {row["video_id"]: row for row in reader}
        table |= {scene_id: row | {"sky_direction": "Up"} for scene_id, row in splits.items()}
        part = path.with_name(f".{name}.part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[key] for key in sorted(table))
        part.replace(path)
