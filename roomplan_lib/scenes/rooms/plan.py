"""What a procedural room is: floor polygon, openings, furniture, light and faces.

Room frame: metres, z up, floor at z = 0, walls along x and y. `Room.room_to_world` turns and shifts it. Boxes and
fronts of the furniture are in world, all else is in the room frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from scipy import ndimage

from roomplan_lib.geometry import OrientedBox
from roomplan_lib.scenes.rooms.shapes import Faces

# Furniture has the instance ids 1, 2, ..; every other surface has one from here on.
FLOOR_ID, CEILING_ID, FIRST_WALL_ID, FIRST_DOOR_ID, FIRST_WINDOW_ID = 1001, 1002, 1011, 1101, 1201
CELL = 0.05  # metres of the grid on which free floor is searched
BODY_RADIUS = 0.28  # metres a person with a camera keeps from furniture and walls


@dataclass(frozen=True, eq=False)
class Opening:
    """A door or window. `start`, `width`: metres along its wall; `bottom`, `top`: metres above the floor."""

    kind: str  # door or window
    instance_id: int
    wall: int
    start: float
    width: float
    bottom: float
    top: float


@dataclass(frozen=True, eq=False)
class RoomObject:
    """An annotated piece of furniture. box, front: world. position [3] and yaw: of its footprint in the room frame."""

    instance_id: int
    uid: str
    label: str
    style: str
    color: str
    box: OrientedBox
    front: np.ndarray
    position: np.ndarray
    yaw: float


@dataclass(frozen=True, eq=False)
class Light:
    """Point light. position: [3] metres, room frame. power: [3] linear RGB at 1 m."""

    position: np.ndarray
    power: np.ndarray


@dataclass(frozen=True, eq=False)
class Room:
    """A furnished room.

    polygon: [N, 2] metres, room frame, counter-clockwise; wall k runs from corner k to corner k + 1 and has instance
    id FIRST_WALL_ID + k. height: metres. room_to_world: rigid 4x4. sun: [3] unit vector towards the sun (room frame).
    """

    scene_id: str
    seed: int
    index: int
    theme: str
    polygon: np.ndarray
    height: float
    room_to_world: np.ndarray
    openings: list[Opening]
    objects: list[RoomObject]
    lights: list[Light]
    sun: np.ndarray
    faces: Faces


def scene_id_of(seed: int, index: int) -> str:
    """The eight-digit name of a room."""
    return f"8{seed % 1000:03d}{index:04d}"


def room_rng(seed: int, index: int, *purpose: int) -> np.random.Generator:
    """The generator of one room, independent of all others; `purpose` numbers make further ones."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(index, *purpose)))


def rectangle_corners(center, half, yaw: float) -> np.ndarray:
    """[4, 2] corners of a turned rectangle."""
    c, s = np.cos(yaw), np.sin(yaw)
    signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    return np.asarray(center) + (signs * half) @ np.array([[c, s], [-s, c]])


def wall_frame(polygon: np.ndarray, wall: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start corner of a wall, unit vector along it and unit normal into the room; [3] each, room frame."""
    start, end = polygon[wall], polygon[(wall + 1) % len(polygon)]
    along = (end - start) / np.linalg.norm(end - start)
    return np.array([*start, 0.0]), np.array([*along, 0.0]), np.array([-along[1], along[0], 0.0])


def footprint(item: RoomObject) -> np.ndarray:
    """[4, 2] corners of where an object stands, metres, room frame."""
    return rectangle_corners(item.position[:2], item.box.extent[:2] / 2, item.yaw)


def walkable_grid(polygon: np.ndarray, footprints: list[np.ndarray]) -> np.ndarray:
    """[X, Y] bool: the largest connected part of the floor that keeps BODY_RADIUS from walls and footprints [4, 2].

    Cell (i, j) has its middle at ((i + 0.5) * CELL, (j + 0.5) * CELL) in the room frame.
    """
    size = polygon.max(axis=0)
    x, y = (np.arange(int(np.ceil(n / CELL))) * CELL + CELL / 2 for n in size)
    points = np.stack(np.meshgrid(x, y, indexing="ij"), axis=-1)
    free = shapely.contains_xy(shapely.Polygon(polygon), points[..., 0], points[..., 1])
    for corners in footprints:
        inside = np.ones(free.shape, dtype=bool)
        for k in range(4):
            edge = corners[(k + 1) % 4] - corners[k]
            offset = points - corners[k]
            inside &= edge[0] * offset[..., 1] - edge[1] * offset[..., 0] > 0
        free &= ~inside
    distance = ndimage.distance_transform_edt(np.pad(free, 1)) * CELL
    labels, count = ndimage.label(distance[1:-1, 1:-1] > BODY_RADIUS)
    if count == 0:
        return np.zeros_like(free)
    return labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
