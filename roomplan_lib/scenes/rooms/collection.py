"""Many rooms as folders: which are there already, which are still to be made, and what every layout has in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.scenes.rooms.plan import CEILING_ID, FIRST_WALL_ID, FLOOR_ID, Room, wall_frame

GENERATOR_VERSION = 3  # counts up when the same settings give other bytes
HELD_OUT_EVERY = 5  # the last of so many rooms is validation, in every layout


def check_settings(num_rooms: int, seed: int, num_poses: int, **sizes: Sequence[int]) -> None:
    """Raise ValueError for settings out of range; sizes: (width, height) of pictures by the argument's name."""
    if not 0 <= num_rooms <= 10_000:
        raise ValueError(f"num_rooms: expected 0 to 10000 (a scene id has four digits for it), got {num_rooms}")
    if seed < 0:
        raise ValueError(f"seed: expected a number of at least 0, got {seed}")
    if num_poses < 1:
        raise ValueError(f"num_poses: expected at least 1, got {num_poses}")
    for name, size in sizes.items():
        if len(size) != 2 or min(size) < 16 or max(size) > 4096:
            raise ValueError(f"{name}: expected (width, height) of 16 to 4096 pixels, got {size}")


def room_settings(seed: int, index: int, **others: object) -> dict:
    """What decides a room's bytes, as its sidecar holds it."""
    return {
        "generator": "roomplan_lib.scenes.rooms",
        "version": GENERATOR_VERSION,
        "seed": int(seed),
        "index": index,
        **others,
    }


def held_out(index: int) -> bool:
    """Whether a room is for validation."""
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def write_collection(
    rooms: list[tuple[Path, dict]], write: Callable[[Path, dict], None], workers: int | None, progress: bool
) -> None:
    """Make the rooms [(folder, settings)] that are not there yet, each by `write(folder, settings)`.

    write: makes a folder whole or not at all; a module's function, so that other processes find it. workers: processes,
    None for one per core. progress: show a bar.

    Raises ValueError for a folder that holds anything else than this room; RuntimeError naming the room when making
    one fails.
    """
    todo = [(folder, settings) for folder, settings in rooms if not _is_there(folder, settings)]
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(workers, len(todo)))
    bar = tqdm(total=len(rooms), initial=len(rooms) - len(todo), desc="rooms", unit="room", disable=not progress)
    with bar:
        if workers == 1:
            for job in todo:
                _write_room(write, *job)
                bar.update()
        else:
            with _one_thread_each(), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                jobs = [pool.submit(_write_room, write, *job) for job in todo]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise


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


def _write_room(write: Callable[[Path, dict], None], folder: Path, settings: dict) -> None:
    """An error that another process raised must say in which room."""
    try:
        write(folder, settings)
    except Exception as error:
        where = f"room {folder.name} (seed {settings['seed']}, index {settings['index']})"
        raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error


def room_sidecar(room: Room, settings: dict) -> dict:
    """What no layout of a data set can hold: plan, openings, styles, colours. World frame throughout, metres."""

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


def write_ply(path: Path, points: np.ndarray, colors: np.ndarray, triangles: np.ndarray) -> None:
    """Binary little-endian PLY. points [V, 3] metres, colors uint8 [V, 3 or 4], triangles [T, 3]."""
    vertex = np.empty(len(points), dtype=[("xyz", "<f4", 3), ("rgb", "u1", colors.shape[1])])
    vertex["xyz"], vertex["rgb"] = points, colors
    face = np.empty(len(triangles), dtype=[("count", "u1"), ("index", "<i4", 3)])
    face["count"], face["index"] = 3, triangles
    channels = ("red", "green", "blue", "alpha")[: colors.shape[1]]
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertex)}\n"
        "property float x\nproperty float y\nproperty float z\n"
        + "".join(f"property uchar {channel}\n" for channel in channels)
        + f"element face {len(face)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    path.write_bytes(header.encode() + vertex.tobytes() + face.tobytes())
