"""Rooms as files, in the layout of the ARKitScenes 3DOD download, with a sidecar for what that cannot hold."""

from __future__ import annotations

import csv
import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from roomplan_lib.geometry import invert_pose
from roomplan_lib.scenes.rooms.make import make_room
from roomplan_lib.scenes.rooms.plan import (
    CEILING_ID,
    FIRST_WALL_ID,
    FLOOR_ID,
    Room,
    room_rng,
    scene_id_of,
    wall_frame,
)

GENERATOR_VERSION = 3  # counts up when the same settings give other bytes
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
) -> list[Path]:
    """Write procedural rooms 0 .. num_rooms - 1 of a seed under `output` in the ARKitScenes 3DOD layout.

    num_poses: posed views per room, 10 a second. frame_rate: pictures per second, a multiple of 10; only every
    (frame_rate / 10)th has a pose. image_size: (width, height) in pixels. workers: processes, None for one per core;
    a script that starts more than one needs the `if __name__ == "__main__":` guard. Every fifth room is Validation.

    Returns the scene folders in order. A room that is there already with the same settings is kept; each is built
    beside its place and renamed when whole. The same arguments give the same bytes.

    Raises ValueError for settings out of range and for a folder that holds a room made with other settings;
    RuntimeError naming the room when making one fails (a full disk, for one).
    """
    output = Path(output)
    if not 0 <= num_rooms <= 10_000:
        raise ValueError(f"num_rooms: expected 0 to 10000 (a scene id has four digits for it), got {num_rooms}")
    if seed < 0:
        raise ValueError(f"seed: expected a number of at least 0, got {seed}")
    if num_poses < 1:
        raise ValueError(f"num_poses: expected at least 1, got {num_poses}")
    if frame_rate < POSE_RATE or frame_rate % POSE_RATE or frame_rate > 60:
        raise ValueError(f"frame_rate: expected 10, 20, .. 60 pictures per second, got {frame_rate}")
    if len(image_size) != 2 or min(image_size) < 16 or max(image_size) > 4096:
        raise ValueError(f"image_size: expected (width, height) of 16 to 4096 pixels, got {image_size}")
    settings = [_settings(seed, index, num_poses, frame_rate, image_size) for index in range(num_rooms)]
    folders = [output / _fold(s["index"]) / scene_id_of(seed, s["index"]) for s in settings]
    todo = [(f, s) for f, s in zip(folders, settings, strict=True) if not _is_there(f, s)]
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers, len(todo)))
    with tqdm(total=num_rooms, initial=num_rooms - len(todo), desc="rooms", unit="room", disable=not progress) as bar:
        if workers == 1:
            for folder, wanted in todo:
                _write_room(folder, wanted)
                bar.update()
        else:
            with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_write_room, *job) for job in todo]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    if num_rooms:
        _write_tables(output, [(scene_id_of(seed, s["index"]), _fold(s["index"])) for s in settings])
    return folders


def _fold(index: int) -> str:
    return "Validation" if index % 5 == 4 else "Training"


def _settings(seed: int, index: int, num_poses: int, frame_rate: float, image_size) -> dict:
    return {
        "generator": "roomplan_lib.scenes.rooms",
        "version": GENERATOR_VERSION,
        "seed": int(seed),
        "index": index,
        "num_poses": int(num_poses),
        "frame_rate": float(frame_rate),
        "image_size": [int(n) for n in image_size],
    }


def _is_there(folder: Path, settings: dict) -> bool:
    if not folder.exists():
        return False
    sidecar = folder / f"{folder.name}_room.json"
    try:
        found = json.loads(sidecar.read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}: no readable {sidecar.name}, so it is no procedural room; move the folder away"
        ) from None
    if found != settings:
        other = {k: (found.get(k), settings[k]) for k in settings if found.get(k) != settings[k]}
        told = ", ".join(f"{k} {a} instead of {b}" for k, (a, b) in other.items())
        raise ValueError(
            f"{folder}: made with other settings ({told}); choose another output folder or delete this one"
        )
    return True


@contextmanager
def _one_thread_each():
    """Numeric libraries of the worker processes use one thread each; they read these when they are imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _write_room(folder: Path, settings: dict) -> None:
    """Build, render and write one room. An error that another process raised must say in which room."""
    try:
        _make_and_write(folder, settings)
    except Exception as error:
        where = f"room {folder.name} (seed {settings['seed']}, index {settings['index']})"
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def _make_and_write(folder: Path, settings: dict) -> None:
    """Everything goes under a temporary name beside `folder`, renamed at the end."""
    from roomplan_lib.scenes.rooms.camera import camera_path  # Open3D takes a second to import
    from roomplan_lib.scenes.rooms.render import RoomRenderer

    room = make_room(settings["seed"], settings["index"])
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

    points, colors, triangles = renderer.colored_mesh()
    points = np.einsum("ij,nj->ni", room.room_to_world[:3, :3], points) + room.room_to_world[:3, 3]
    _write_ply(part / f"{room.scene_id}_3dod_mesh.ply", points, colors, triangles)
    (part / f"{room.scene_id}_3dod_annotation.json").write_text(json.dumps(_annotation(room), indent=1))
    (part / f"{room.scene_id}_room.json").write_text(json.dumps(_sidecar(room, settings), indent=1))
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


def _sidecar(room: Room, settings: dict) -> dict:
    """World frame throughout, metres."""

    def world(points):
        return (np.asarray(points) @ room.room_to_world[:3, :3].T + room.room_to_world[:3, 3]).tolist()

    floor = [[x, y, 0.0] for x, y in room.polygon]
    walls, doors, windows = [], [], []
    for k in range(len(floor)):
        a, along, inward = wall_frame(room.polygon, k)
        b = np.array(floor[(k + 1) % len(floor)])
        walls.append({"instance_id": FIRST_WALL_ID + k, "start": world(a), "end": world(b), "height": room.height})
        for o in (o for o in room.openings if o.wall == k):
            low = a + along * o.start + [0, 0, o.bottom]
            high = a + along * (o.start + o.width) + [0, 0, o.top]
            opening = {
                "instance_id": o.instance_id,
                "wall": k,
                "center": world((low + high) / 2),
                "width": o.width,
                "height": o.top - o.bottom,
                "normal": (room.room_to_world[:3, :3] @ inward).tolist(),  # into the room
            }
            (doors if o.kind == "door" else windows).append(opening)
    return {
        "settings": settings,
        "scene_id": room.scene_id,
        "theme": room.theme,
        "polygon": world(floor),
        "height": room.height,
        "walls": walls,
        "doors": doors,
        "windows": windows,
        "floor_instance_id": FLOOR_ID,
        "ceiling_instance_id": CEILING_ID,
        "instances": {
            str(o.instance_id): {
                "objectId": o.instance_id,
                "uid": o.uid,
                "label": o.label,
                "style": o.style,
                "color": o.color,
                "front": o.front.tolist(),
            }
            for o in room.objects
        },
    }


def _write_ply(path: Path, points: np.ndarray, colors: np.ndarray, triangles: np.ndarray) -> None:
    """Binary little-endian PLY. points [V, 3] metres, colors uint8 [V, 3], triangles [T, 3]."""
    vertex = np.empty(len(points), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertex["xyz"], vertex["rgb"] = points, colors
    face = np.empty(len(triangles), dtype=[("count", "u1"), ("index", "<i4", 3)])
    face["count"], face["index"] = 3, triangles
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertex)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        "property uchar red\nproperty uchar green\nproperty uchar blue\n"
        f"element face {len(face)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    path.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())


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
