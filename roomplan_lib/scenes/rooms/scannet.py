"""Rooms as files, in the layout of ScanNet, with a sidecar for what that cannot hold.

    scans/<id>/<id>.txt                               camera and axisAlignment, raw frame to aligned frame
    scans/<id>/<id>_vh_clean_2.ply                    mesh, raw frame
    scans/<id>/<id>_vh_clean_2.0.010000.segs.json     segment per vertex
    scans/<id>/<id>.aggregation.json                  instances: label, objectId, segments
    scans/<id>/<id>.sens                              all pictures with their poses
    scans/<id>/<id>_room.json                         sidecar
    posed_images/<id>/<00000>.jpg|.png|.txt           the same pictures and poses one by one; intrinsic.txt and
                                                      depth_intrinsic.txt beside them, 4x4
    scannetv2_train.txt, scannetv2_val.txt            scene ids of each split

The raw frame is the room's world, turned and shifted against the walls; the aligned one has its axes along the walls,
the floor at z = 0 and the middle of the room at x = y = 0. Where tracking was lost, a pose is all -inf.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from roomplan_lib.files import write_whole
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
from roomplan_lib.scenes.rooms.plan import FIRST_WALL_ID, FLOOR_ID, Room, room_rng
from roomplan_lib.scenes.sens import write_sens

SCENE_TYPES = {
    "bedroom": "Bedroom / Hotel", "living_room": "Living room / Lounge", "kitchen": "Kitchen", "bathroom": "Bathroom",
    "studio": "Apartment",
}  # fmt: skip
# ScanNet's annotators write free text; where they usually say something else than the category.
SCANNET_LABELS = {"sofa": "couch", "tv_monitor": "tv", "washer": "washing machine"}
FRAMES_PER_LOST = 10  # tracking is lost in one of so many frames
_JPEG_QUALITY = 92


def scannet_id(index: int) -> str:
    """ "scene0007_00"."""
    return f"scene{index:04d}_00"


def write_scannet_rooms(
    output: Path,
    num_rooms: int,
    seed: int = 0,
    *,
    num_poses: int = 24,
    image_size: tuple[int, int] = (320, 240),
    depth_size: tuple[int, int] = (256, 192),
    workers: int | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write procedural rooms 0 .. num_rooms - 1 of a seed under `output` in the layout of ScanNet.

    num_poses: views with a pose per room; one frame in ten more has none. image_size, depth_size: (width, height) in
    pixels of the two cameras, which share their pose. workers, bytes and errors: as for `write_rooms`. Every fifth room
    is in the list of validation scenes. A scene id has no place for the seed: another seed needs another folder.

    Returns the folders scans/<id> in order. Raises also ValueError for pictures without their scan, or the reverse.
    """
    output = Path(output)
    check_settings(num_rooms, seed, num_poses, image_size=image_size, depth_size=depth_size)
    sizes = {"image_size": [int(n) for n in image_size], "depth_size": [int(n) for n in depth_size]}
    rooms = []
    for index in range(num_rooms):
        settings = room_settings(seed, index, layout="scannet", num_poses=int(num_poses), **sizes)
        rooms.append((output / "scans" / scannet_id(index), settings))
    for folder, _ in rooms:
        if folder.exists() != _pictures(folder).exists():
            raise ValueError(f"{folder} and {_pictures(folder)}: one is there without the other; move it away")
    write_collection(rooms, _make_and_write, workers, progress)
    if num_rooms:
        _write_lists(output, range(num_rooms))
    return [folder for folder, _ in rooms]


def _pictures(folder: Path) -> Path:
    """posed_images/<id> of scans/<id>."""
    return folder.parents[1] / "posed_images" / folder.name


def _make_and_write(folder: Path, settings: dict) -> None:
    """Everything goes under temporary names beside the two folders; the scan gets its own last."""
    from roomplan_lib.scenes.rooms.camera import camera_path  # Open3D takes a second to import
    from roomplan_lib.scenes.rooms.render import RoomRenderer

    room = dataclasses.replace(make_room(settings["seed"], settings["index"]), scene_id=folder.name)
    renderer = RoomRenderer(room)
    rng = room_rng(room.seed, room.index, 3)
    image_size, depth_size = (tuple(settings[key]) for key in ("image_size", "depth_size"))
    num_poses = settings["num_poses"]
    path = camera_path(room, renderer, num_poses + -(-num_poses // FRAMES_PER_LOST))
    lost = set(rng.choice(len(path), len(path) - num_poses, replace=False).tolist())
    color_K, depth_K = _camera(rng, image_size, 0.903), _camera(rng, depth_size, 0.893)  # as ScanNet's share of width

    part, pictures_part = (f.with_name(f".{f.name}.part") for f in (folder, _pictures(folder)))
    for temporary in (part, pictures_part):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    for name, K in (("intrinsic.txt", color_K), ("depth_intrinsic.txt", depth_K)):
        (pictures_part / name).write_text(_matrix_text(K, 6))
    visible_pixels = np.zeros(len(room.objects) + 1, dtype=int)  # by instance id, in its best view

    def frames():
        for k, camera_to_room in enumerate(path):
            rgb, _, _ = renderer.view(color_K, camera_to_room, image_size)
            depth, ids = renderer.trace(depth_K, camera_to_room, depth_size)
            camera_to_world = np.full((4, 4), -np.inf) if k in lost else room.room_to_world @ camera_to_room
            millimetres = np.round(depth * 1000).astype(np.uint16)
            jpeg = io.BytesIO()
            Image.fromarray(rgb).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
            stem = pictures_part / f"{k:05d}"
            stem.with_suffix(".jpg").write_bytes(jpeg.getvalue())
            Image.fromarray(millimetres).save(stem.with_suffix(".png"), compress_level=1)
            stem.with_suffix(".txt").write_text(_matrix_text(camera_to_world, 9))
            if k not in lost:
                furniture = np.bincount(ids[ids < len(visible_pixels)], minlength=len(visible_pixels))
                np.maximum(visible_pixels, furniture, out=visible_pixels)
            yield camera_to_world, jpeg.getvalue(), millimetres

    write_sens(part / f"{folder.name}.sens", folder.name, color_K, depth_K, frames())
    points, colors, triangles, face = renderer.colored_mesh()
    points = (points @ room.room_to_world[:3, :3].T + room.room_to_world[:3, 3]).astype(np.float32)
    opaque = np.full((len(colors), 1), 255, dtype=np.uint8)
    write_ply(part / f"{folder.name}_vh_clean_2.ply", points, np.concatenate([colors, opaque], axis=1), triangles)
    labels = _write_instances(part, room, face)
    alignment = axis_alignment(room)
    (part / f"{folder.name}.txt").write_text(
        _scan_text(room, alignment, (color_K, image_size), (depth_K, depth_size), len(path))
    )
    sidecar = room_sidecar(room, settings)
    sidecar["axis_alignment"] = alignment.tolist()
    sidecar["mesh_center"] = ((points.min(axis=0) + points.max(axis=0)) / 2).tolist()
    for o in room.objects:
        sidecar["instances"][str(o.instance_id)] |= {
            "objectId": list(labels).index(o.instance_id),
            "scannet_label": labels[o.instance_id],
            "center": o.box.center.tolist(),
            "extent": o.box.extent.tolist(),
            "rotation": o.box.rotation.tolist(),
            "visible_share": visible_pixels[o.instance_id] / (depth_size[0] * depth_size[1]),
        }
    (part / f"{folder.name}_room.json").write_text(json.dumps(sidecar, indent=1))
    pictures_part.rename(_pictures(folder))
    part.rename(folder)


def axis_alignment(room: Room) -> np.ndarray:
    """[4, 4] raw to aligned, rounded as ScanNet's files have it."""
    middle = (room.polygon.min(axis=0) + room.polygon.max(axis=0)) / 2
    aligned = invert_pose(room.room_to_world)
    aligned[:2, 3] -= middle
    return np.round(aligned, 6) + 0.0


def _camera(rng: np.random.Generator, size: tuple[int, int], focal: float) -> np.ndarray:
    """[4, 4] intrinsics of one device, in the digits of the files. focal: in widths of the picture."""
    K = np.eye(4)
    K[0, 0] = K[1, 1] = size[0] * focal * rng.uniform(0.99, 1.01)
    K[:2, 2] = (np.array(size) - 1) / 2 + rng.normal(0, 0.4, 2)
    return np.round(K, 6)


def _write_instances(part: Path, room: Room, face: np.ndarray) -> dict[int, str]:
    """Segments and instances of a mesh, given the face [V] of each vertex; returns ScanNet's label by instance id.

    Furniture, walls, doors, windows and the floor are instances, their objectId the place in what is returned; the
    ceiling with its lamps is none. A segment is what one instance has of one material, and goes by the number of its
    first vertex.
    """
    scan = room.scene_id
    instance = room.faces.instance[face].astype(np.int64)
    material = room.faces.material[face].astype(np.int64)
    _, first, segment = np.unique(instance << 32 | material, return_index=True, return_inverse=True)
    segment = first[segment]
    segments = {"params": {}, "sceneId": scan, "segIndices": segment.tolist()}
    (part / f"{scan}_vh_clean_2.0.010000.segs.json").write_text(json.dumps(segments))

    labels = {o.instance_id: SCANNET_LABELS.get(o.label, o.label) for o in room.objects}
    labels |= {FIRST_WALL_ID + k: "wall" for k in range(len(room.polygon))}
    labels |= {o.instance_id: o.kind for o in room.openings} | {FLOOR_ID: "floor"}
    groups = [
        {"id": k, "objectId": k, "segments": np.unique(segment[instance == number]).tolist(), "label": label}
        for k, (number, label) in enumerate(labels.items())
    ]
    aggregation = {
        "sceneId": f"scannet.{scan}", "appId": "roomplan_lib.scenes.rooms", "segGroups": groups,
        "segmentsFile": f"scannet.{scan}_vh_clean_2.0.010000.segs.json",
    }  # fmt: skip
    (part / f"{scan}.aggregation.json").write_text(json.dumps(aggregation))
    return labels


def _scan_text(room: Room, alignment: np.ndarray, color: tuple, depth: tuple, num_frames: int) -> str:
    """The lines `key = value` of <id>.txt. color, depth: (K [4, 4], (width, height))."""

    def numbers(matrix: np.ndarray) -> str:
        return " ".join(f"{x:.6f}" for x in matrix.ravel()) + " "

    values = {"axisAlignment": numbers(alignment), "colorToDepthExtrinsics": numbers(np.eye(4))}
    for name, (K, (width, height)) in (("color", color), ("depth", depth)):
        values |= {f"{name}Width": width, f"{name}Height": height, f"num{name.capitalize()}Frames": num_frames}
        for key, (row, column) in {"fx": (0, 0), "fy": (1, 1), "mx": (0, 2), "my": (1, 2)}.items():
            values[f"{key}_{name}"] = f"{K[row, column]:.6f}"
    values |= {"numIMUmeasurements": 0, "sceneType": SCENE_TYPES[room.theme]}
    return "".join(f"{key} = {values[key]}\n" for key in sorted(values))


def _matrix_text(matrix: np.ndarray, decimals: int) -> str:
    return "".join(" ".join(f"{x:.{decimals}f}" for x in row) + "\n" for row in matrix)


def _write_lists(output: Path, indices: range) -> None:
    """The scene ids of each split; those of an earlier call stay."""
    for split, wanted in (("train", False), ("val", True)):
        path = output / f"scannetv2_{split}.txt"
        listed = set(path.read_text().split()) if path.exists() else set()
        listed |= {scannet_id(index) for index in indices if held_out(index) == wanted}
        write_whole(path, "".join(f"{scene_id}\n" for scene_id in sorted(listed)))
