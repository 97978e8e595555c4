"""From a seed to a furnished room."""

from __future__ import annotations

import numpy as np

from roomplan_lib.geometry import OrientedBox, rotation_z
from roomplan_lib.scenes.rooms.layout import FURNISH, MIN_OBJECTS, MIN_UNUSUAL, THEMES, Layout
from roomplan_lib.scenes.rooms.plan import Room, RoomObject, room_rng, scene_id_of
from roomplan_lib.scenes.rooms.shapes import FaceCollector
from roomplan_lib.scenes.rooms.structure import build_structure


def make_room(seed: int, index: int, unusual: bool = False) -> Room:
    """Room `index` of the collection `seed`: the same numbers give the same room, whatever else was made before.

    unusual: of a shape, of colours and with a number of objects that no other room has, for tests of what was learned.
    Raises ValueError for a negative seed or an index outside 0..9999.
    """
    if seed < 0 or not 0 <= index < 10_000:
        raise ValueError(f"make_room: expected seed >= 0 and 0 <= index < 10000, got seed {seed}, index {index}")
    for attempt in range(100):
        layout = Layout(room_rng(seed, index, 0, attempt), THEMES[_theme_order(seed, index)], unusual)
        FURNISH[layout.theme](layout)
        if unusual:
            layout.crowd()
        if (MIN_UNUSUAL if unusual else MIN_OBJECTS) <= len(layout.placed) and layout.walkable() is not None:
            return _assemble(layout, seed, index)
    raise AssertionError(f"no furnished room after 100 attempts: seed {seed}, index {index}")


def _theme_order(seed: int, index: int) -> int:
    """Every run of five rooms has each theme once, in an order of its own."""
    block, place = divmod(index, len(THEMES))
    return int(np.random.default_rng(np.random.SeedSequence([seed, block, 77])).permutation(len(THEMES))[place])


def _assemble(layout: Layout, seed: int, index: int) -> Room:
    rng = layout.rng
    room_to_world = np.eye(4)
    yaw = rng.uniform(-np.pi, np.pi)
    room_to_world[:3, :3] = rotation_z(yaw)
    # A capture's origin is where the device was switched on, so the floor is not at z = 0.
    room_to_world[:3, 3] = [*rng.uniform(-3, 3, 2), rng.uniform(-1.6, 0.2)]
    builder = FaceCollector()
    objects = []
    for number, item in enumerate(layout.placed, start=1):
        shape = item.piece.shape
        builder.add(shape, number, item.position, item.yaw)
        center = item.position + [0, 0, item.piece.size[2] / 2]
        rotation = room_to_world[:3, :3] @ rotation_z(item.yaw)
        box = OrientedBox(
            room_to_world[:3, :3] @ center + room_to_world[:3, 3],
            item.piece.size,
            rotation,
            item.piece.label,
            str(number),
        )
        uid = rng.bytes(16).hex()
        uid = "-".join((uid[:8], uid[8:12], uid[12:16], uid[16:20], uid[20:]))
        objects.append(
            RoomObject(
                number,
                uid,
                item.piece.label,
                item.piece.style,
                item.piece.color,
                box,
                rotation[:, 1],
                item.position,
                item.yaw,
            )
        )
    lights = build_structure(layout, builder)
    sun_window = next((o for o in layout.openings if o.kind == "window"), None)
    azimuth = rng.uniform(-0.7, 0.7)
    if sun_window is not None:
        outward = -layout.wall_normal[sun_window.wall]
        azimuth += np.arctan2(outward[1], outward[0])
    elevation = rng.uniform(0.45, 0.85)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    return Room(
        scene_id_of(seed, index), seed, index, layout.theme, layout.polygon, layout.height, room_to_world,
        layout.openings, objects, lights, sun, builder.faces(),
    )  # fmt: skip
