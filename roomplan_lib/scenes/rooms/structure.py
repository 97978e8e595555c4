"""Everything of a room that is no furniture: floor, walls, doors, windows, skirting, rugs, pictures and lamps."""

from __future__ import annotations

import numpy as np

from roomplan_lib.scenes.rooms.furniture import CHROME
from roomplan_lib.scenes.rooms.layout import Layout
from roomplan_lib.scenes.rooms.plan import CEILING_ID, CELL, FIRST_WALL_ID, FLOOR_ID, Light, Opening
from roomplan_lib.scenes.rooms.shapes import PALETTE, FaceCollector, Material, Shape, material, vary

# sRGB pairs: the covering and its grain, joint or shade.
_FLOORS = {
    "wood": [
        ((0.62, 0.43, 0.26), (0.36, 0.22, 0.12)),
        ((0.76, 0.60, 0.42), (0.48, 0.34, 0.21)),
        ((0.42, 0.28, 0.19), (0.22, 0.13, 0.08)),
        ((0.66, 0.62, 0.57), (0.42, 0.39, 0.36)),
    ],
    "tile": [
        ((0.80, 0.78, 0.74), (0.52, 0.50, 0.47)),
        ((0.48, 0.50, 0.52), (0.72, 0.72, 0.71)),
        ((0.72, 0.52, 0.40), (0.82, 0.77, 0.70)),
    ],
    "carpet": [
        ((0.66, 0.62, 0.55), (0.47, 0.44, 0.38)),
        ((0.42, 0.45, 0.50), (0.28, 0.30, 0.34)),
        ((0.56, 0.45, 0.40), (0.40, 0.31, 0.28)),
    ],
}
_WALLS = (
    (0.90, 0.89, 0.86),
    (0.86, 0.83, 0.76),
    (0.78, 0.83, 0.86),
    (0.80, 0.86, 0.78),
    (0.90, 0.83, 0.78),
    (0.87, 0.82, 0.86),
    (0.74, 0.76, 0.78),
    (0.92, 0.88, 0.72),
)


def build_structure(layout: Layout, builder: FaceCollector) -> list[Light]:
    """Floor, ceiling, walls with their openings, skirting, rug, pictures and lamps; returns the lights."""
    rng, height, theme = layout.rng, layout.height, layout.theme
    wet = theme == "bathroom" or (theme == "kitchen" and rng.random() < 0.5)
    kind = "tile" if wet else str(rng.choice(["wood", "wood", "carpet"] if theme != "kitchen" else ["wood"]))
    tone, second = _FLOORS[kind][rng.integers(len(_FLOORS[kind]))]
    ground = {
        "wood": material(tone, second, "planks", 2.4),
        "tile": material(tone, second, "tiles", rng.uniform(2.4, 4.0)),
        "carpet": material(tone, second, "carpet", 0.7),
    }[kind]
    floor, ceiling = Shape(), Shape()
    for x0, x1, y0, y1 in layout.rectangle_list():
        corners = np.array([[x0, y0, 0], [x1, y0, 0], [x1, y1, 0], [x0, y1, 0]], dtype=np.float64)
        floor.add(corners[None], ground)
        ceiling.add(corners[None, ::-1] + [0, 0, height], material((0.93, 0.93, 0.92)))
    walk = layout.walkable()
    middle = np.argwhere(walk).mean(axis=0) * CELL
    if not wet and rng.random() < 0.6:
        sofa = next((i for i in layout.placed if i.piece.label in ("sofa", "bed")), None)
        at = middle
        if sofa is not None and sofa.piece.label == "sofa":
            at = sofa.position[:2] + np.array([-np.sin(sofa.yaw), np.cos(sofa.yaw)]) * (sofa.piece.size[1] / 2 + 0.6)
        half = rng.uniform((0.8, 0.55), (1.2, 0.8))
        low, high = layout.between_notches()
        half = np.minimum(half, np.minimum(at - low, high - at) - 0.1)
        if half.min() > 0.35:
            color = vary(rng, str(rng.choice(list(PALETTE)[2:])))
            cloth = material(
                color,
                np.clip(color * 0.6 + 0.15, 0, 1),
                str(rng.choice(["plaid", "stripes", "carpet", "checker"])),
                1.2,
            )
            edge = material(color * 0.55, None, "fabric", 0.5)
            floor.block((*(at - half), 0.0005), (*(at + half), 0.006), edge)
            floor.block((*(at - half + 0.06), 0.001), (*(at + half - 0.06), 0.008), cloth)
    builder.add(floor, FLOOR_ID)
    builder.add(ceiling, CEILING_ID)

    color = np.array(_WALLS[rng.integers(len(_WALLS))])
    style = "tiles" if wet and theme == "bathroom" else ("stripes" if rng.random() < 0.12 else "plain")
    paint = material(color, color * (0.84 if style == "tiles" else 0.95), style, 1.6 if style != "plain" else 2.0)
    accent = vary(rng, str(rng.choice(["green", "blue", "red", "gray", "purple", "yellow", "pink"]))) * 0.5 + 0.35
    accent_wall = int(rng.integers(len(layout.polygon))) if rng.random() < 0.35 else -1
    trim = material((0.90, 0.90, 0.88) if rng.random() < 0.7 else (0.46, 0.30, 0.18))
    for k in range(len(layout.polygon)):
        skin = material(accent, accent * 0.95, "plain", 2.0) if k == accent_wall and style != "tiles" else paint
        origin = np.array([*layout.polygon[k], 0.0])
        length = layout.wall_length[k]
        openings = sorted((o for o in layout.openings if o.wall == k), key=lambda o: o.start)
        wall = Shape()
        _wall_faces(wall, length, height, openings, skin)
        s = 0.0
        for o in [o for o in openings if o.kind == "door"] + [None]:
            end = length if o is None else o.start - 0.07
            if end - s > 0.02:
                wall.block((s, 0.0, 0.0), (end, 0.011, 0.075), trim)
            s = 0.0 if o is None else o.start + o.width + 0.07
        _pictures(layout, k, wall)
        builder.add(wall, FIRST_WALL_ID + k, origin, layout.wall_yaw[k])
        for o in openings:
            shape = Shape()
            (_door if o.kind == "door" else _window)(shape, o, rng, trim)
            builder.add(shape, o.instance_id, origin, layout.wall_yaw[k])

    lights = []
    warm = np.array([1.0, rng.uniform(0.88, 0.97), rng.uniform(0.74, 0.92)])
    spots = [np.array([(x0 + x1) / 2, (y0 + y1) / 2]) for x0, x1, y0, y1 in layout.rectangle_list()]
    if len(spots) == 1 and rng.random() < 0.4:
        reach = np.array([layout.size[0] / 4, 0.0])
        spots = [spots[0] - reach, spots[0] + reach]
    for xy in spots:
        xy = xy + rng.uniform(-0.25, 0.25, 2)
        lamp = Shape()
        glow = material((1.0, 0.97, 0.88), (1.0, 0.95, 0.85), emission=1.0)
        if rng.random() < 0.5:
            lamp.lathe([(0.16, height - 0.07), (0.19, height)], glow, segments=20)
            lamp.lathe([(0, height - 0.08), (0.16, height - 0.07)], glow, segments=20)
            drop = 0.09
        else:
            drop = 0.42
            lamp.rod((0, 0, height - drop + 0.16), (0, 0, height), 0.008, CHROME)
            shade = material(vary(rng, str(rng.choice(["white", "white", "gray", "orange"]))))
            lamp.lathe(
                [(0.18, height - drop), (0.06, height - drop + 0.18), (0, height - drop + 0.19)], shade, segments=20
            )
            lamp.lathe(
                [
                    (0, height - drop),
                    (0.05, height - drop + 0.03),
                    (0.05, height - drop + 0.07),
                    (0, height - drop + 0.1),
                ],
                glow,
                segments=12,
            )
        builder.add(lamp, CEILING_ID, (*xy, 0.0))
        lights.append(Light(np.array([*xy, height - drop - 0.02]), warm * rng.uniform(2.0, 2.8) / len(spots) ** 0.5))
    return lights


def _wall_faces(wall: Shape, length: float, height: float, openings: list[Opening], skin: Material) -> None:
    """The wall (x along it, z up, seen from +y) as rectangles round its openings."""

    def sheet(x0, x1, z0, z1):
        if x1 - x0 > 1e-6 and z1 - z0 > 1e-6:
            wall.add(np.array([[[x1, 0, z0], [x0, 0, z0], [x0, 0, z1], [x1, 0, z1]]]), skin)

    at = 0.0
    for o in openings:
        sheet(at, o.start, 0.0, height)
        sheet(o.start, o.start + o.width, 0.0, o.bottom)
        sheet(o.start, o.start + o.width, o.top, height)
        at = o.start + o.width
    sheet(at, length, 0.0, height)


def _reveal(shape: Shape, o: Opening, depth: float, mat: Material) -> None:
    """The four inner sides of an opening, `depth` metres out from the wall's face."""
    x0, x1, z0, z1, y = o.start, o.start + o.width, o.bottom, o.top, -depth
    shape.add(
        np.array(
            [
                [[x0, y, z0], [x0, y, z1], [x0, 0, z1], [x0, 0, z0]],
                [[x1, 0, z0], [x1, 0, z1], [x1, y, z1], [x1, y, z0]],
                [[x0, 0, z0], [x1, 0, z0], [x1, y, z0], [x0, y, z0]],
                [[x0, y, z1], [x1, y, z1], [x1, 0, z1], [x0, 0, z1]],
            ]
        ),
        mat,
    )


def _casing(shape: Shape, o: Opening, mat: Material, sill: bool) -> None:
    """Frame on the wall round an opening."""
    x0, x1, z0, z1, t, y = o.start, o.start + o.width, o.bottom, o.top, 0.06, 0.014
    shape.block((x0 - t, 0, z0), (x0, y, z1 + t), mat)
    shape.block((x1, 0, z0), (x1 + t, y, z1 + t), mat)
    shape.block((x0, 0, z1), (x1, y, z1 + t), mat)
    if sill:
        shape.block((x0 - t, -0.02, z0 - 0.03), (x1 + t, y - 0.002, z0), mat)


def _door(shape: Shape, o: Opening, rng: np.random.Generator, trim: Material) -> None:
    _casing(shape, o, trim, sill=False)
    _reveal(shape, o, 0.06, trim)
    brown = rng.random() < 0.45
    tone = vary(rng, "brown") * 1.15 if brown else np.array([0.88, 0.88, 0.86])
    leaf = material(tone, tone * (0.65 if brown else 0.95), "wood_upright" if brown else "plain", 1.0)
    x0, x1, y = o.start, o.start + o.width, -0.045
    shape.block((x0, y - 0.03, o.bottom), (x1, y, o.top), leaf)
    panel = material(np.array(leaf.color) * 0.93, np.array(leaf.second) * 0.93, leaf.texture, leaf.period)
    for low, high in ((0.12, 0.43), (0.5, 0.93)):
        z0, z1 = o.top * low, o.top * high
        shape.block((x0 + 0.13, y - 0.001, z0), (x1 - 0.13, y + 0.008, z1), panel)
    side = x1 - 0.07 if rng.random() < 0.5 else x0 + 0.07
    reach = -0.11 if side > (x0 + x1) / 2 else 0.11
    shape.rod((side, y, 1.02), (side, y + 0.05, 1.02), 0.012, CHROME)
    shape.rod((side, y + 0.045, 1.02), (side + reach, y + 0.045, 1.02), 0.010, CHROME)


def _window(shape: Shape, o: Opening, rng: np.random.Generator, trim: Material) -> None:
    frame = material((0.90, 0.90, 0.89)) if rng.random() < 0.75 else trim
    _casing(shape, o, frame, sill=True)
    _reveal(shape, o, 0.10, frame)
    x0, x1, z0, z1, y, t = o.start, o.start + o.width, o.bottom, o.top, -0.08, 0.045
    sky = rng.uniform(0.85, 1.0) * np.array([0.80, 0.90, 1.0])
    view = material(sky, np.array([0.34, 0.46, 0.30]) * rng.uniform(0.8, 1.2), "outside", 3.0, emission=1.0)
    shape.add(np.array([[[x1, y, z0], [x0, y, z0], [x0, y, z1], [x1, y, z1]]]), view)
    for low, high in (
        ((x0, z0), (x0 + t, z1)),
        ((x1 - t, z0), (x1, z1)),
        ((x0, z0), (x1, z0 + t)),
        ((x0, z1 - t), (x1, z1)),
    ):
        shape.block((low[0], y, low[1]), (high[0], y + 0.04, high[1]), frame)
    for x in np.linspace(x0, x1, max(1, round(o.width / 0.7)) + 1)[1:-1]:
        shape.block((x - t / 2, y, z0), (x + t / 2, y + 0.035, z1), frame)
    if rng.random() < 0.4:
        z = z0 + (z1 - z0) * 0.68
        shape.block((x0, y, z - 0.018), (x1, y + 0.035, z + 0.018), frame)


def _pictures(layout: Layout, k: int, wall: Shape) -> None:
    """A framed picture where the wall is bare at eye height."""
    rng = layout.rng
    if rng.random() > 0.45 or layout.theme == "bathroom" or layout.wall_length[k] < 1.4:
        return
    w, h = rng.uniform(0.4, 0.9), rng.uniform(0.35, 0.65)
    x, z = rng.uniform(w / 2 + 0.2, layout.wall_length[k] - w / 2 - 0.2), rng.uniform(1.45, 1.6)
    if any(
        o.wall == k and o.start - 0.15 < x + w / 2 and x - w / 2 < o.start + o.width + 0.15 for o in layout.openings
    ):
        return
    if not layout.fits(layout.strip(k, x - w / 2, x + w / 2, 0.1), z - h / 2, z + h / 2, through_clear=True):
        return
    frame = material(vary(rng, str(rng.choice(["black", "brown", "white"]))))
    names = list(PALETTE)[3:]
    one, two = (vary(rng, str(rng.choice(names))) * 0.7 + 0.2 for _ in range(2))
    wall.block((x - w / 2, 0, z - h / 2), (x + w / 2, 0.018, z + h / 2), frame)
    canvas = material(np.clip(one, 0, 1), np.clip(two, 0, 1), "painting", rng.uniform(1.0, 2.0))
    wall.block((x - w / 2 + 0.03, 0.001, z - h / 2 + 0.03), (x + w / 2 - 0.03, 0.021, z + h / 2 - 0.03), canvas)
