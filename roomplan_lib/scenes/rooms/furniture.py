"""Furniture of the 17 ARKitScenes categories, built from blocks, rods, surfaces of revolution and cushions.

`build(category, rng, style)` returns a `Piece`; sizes are those of common furniture, varied within their usual range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roomplan_lib.scenes.rooms.shapes import PALETTE, Material, Shape, material, vary

# Share of each main colour; a category only lists colours it is sold in. Builders keep to one rule: clearly most of
# what any view sees of a piece has its named colour, from above and inside too.
COLORS = {
    "cabinet": {"white": 4, "brown": 4, "gray": 2, "black": 1, "green": 1, "blue": 1, "red": 1, "yellow": 1},
    "refrigerator": {"white": 4, "gray": 4, "black": 2, "red": 1, "blue": 1, "green": 1, "pink": 1},
    "shelf": {"brown": 4, "white": 3, "black": 2, "gray": 1, "red": 1, "blue": 1, "green": 1},
    "stove": {"white": 3, "gray": 3, "black": 3, "red": 1},
    "bed": {"white": 3, "blue": 3, "gray": 2, "red": 2, "green": 2, "purple": 2, "pink": 2, "yellow": 2, "orange": 1},
    "sink": {"white": 5, "brown": 2, "gray": 2, "blue": 1, "green": 1},
    "washer": {"white": 5, "gray": 2, "black": 1, "red": 1},
    "toilet": {"white": 7, "gray": 1, "black": 1, "pink": 1},
    "bathtub": {"white": 5, "gray": 1, "blue": 1, "pink": 1, "green": 1, "black": 1},
    "oven": {"black": 3, "gray": 4, "white": 3, "red": 1},
    "dishwasher": {"white": 4, "gray": 4, "black": 2},
    "fireplace": {"white": 3, "red": 3, "gray": 3, "brown": 2},
    "stool": {"brown": 3, "white": 1, "black": 2, "red": 2, "yellow": 2, "green": 2, "blue": 2, "orange": 1},
    "chair": {"brown": 4, "black": 2, "white": 2, "red": 2, "blue": 2, "green": 2, "yellow": 2, "orange": 2, "gray": 1},
    "table": {"brown": 6, "white": 3, "black": 2, "gray": 1, "blue": 1},
    "tv_monitor": {"black": 1},  # the screen is what one sees
    "sofa": {"gray": 3, "blue": 3, "green": 2, "red": 2, "brown": 2, "yellow": 2, "purple": 2, "orange": 1, "pink": 1},
}

CHROME = material((0.74, 0.75, 0.77), (0.62, 0.63, 0.66), "plain", 0.3)
STEEL = material((0.60, 0.61, 0.62), (0.52, 0.53, 0.55), "plain", 0.3)
GLASS = material((0.07, 0.08, 0.09), (0.16, 0.18, 0.20), "screen", 0.9)
DARK = material((0.05, 0.05, 0.05))
CERAMIC = material((0.93, 0.93, 0.92), (0.90, 0.90, 0.90))


@dataclass(frozen=True, eq=False)
class Piece:
    """One piece of furniture: middle of its footprint at the origin, standing on z = 0, its front towards +y.

    size: [3] metres, tight. color: palette name of clearly most of what one sees of it.
    """

    label: str
    style: str
    color: str
    shape: Shape
    size: np.ndarray


def build(category: str, rng: np.random.Generator, style: str = "", color: str = "") -> Piece:
    """A piece of the category. style: one of the builder's own names, "" for any. color: palette name, "" for any."""
    names = list(COLORS[category])
    if not color:
        weights = np.array([COLORS[category][n] for n in names], dtype=np.float64)
        color = str(rng.choice(names, p=weights / weights.sum()))
    shape = Shape()
    style = _BUILDERS[category](shape, rng, color, style)
    low, high = shape.bounds()
    middle = (low + high) / 2
    return Piece(category, style, color, shape.moved([-middle[0], -middle[1], -low[2]]), high - low)


def _pick(rng: np.random.Generator, style: str, *choices: str) -> str:
    assert not style or style in choices, f"style {style!r} is none of {choices}"
    return style or str(rng.choice(choices))


def _coat(rng: np.random.Generator, color: str, upright: bool = True) -> Material:
    """Varnish or paint: brown is wood, everything else mostly plain."""
    tone = vary(rng, color)
    if color == "brown":
        return material(tone, tone * rng.uniform(0.55, 0.72), "wood_upright" if upright else "wood", 1.0)
    return material(tone, tone * 0.94, "plain", 1.0)


def _cloth(rng: np.random.Generator, color: str, patterned: float = 0.25) -> Material:
    tone = vary(rng, color)
    if rng.random() < patterned:
        return material(
            tone, tone * 0.72 + 0.06, str(rng.choice(["stripes", "plaid", "checker"])), rng.uniform(0.5, 0.9)
        )
    return material(tone, tone * 0.78, "fabric", 0.5)


def _legs(shape: Shape, w: float, d: float, h: float, mat: Material, inset: float, radius: float, square: bool) -> None:
    for sx in (-1, 1):
        for sy in (-1, 1):
            x, y = sx * (w / 2 - inset), sy * (d / 2 - inset)
            if square:
                shape.block((x - radius, y - radius, 0), (x + radius, y + radius, h), mat)
            else:
                shape.rod((x, y, 0), (x, y, h), radius * 0.75, mat, tip=radius)


def _handle(shape: Shape, x: float, y: float, z0: float, z1: float, mat: Material, along_x: float = 0.0) -> None:
    """Bar handle before a front at `y`; upright from z0 to z1, or `along_x` metres wide at height z0."""
    if along_x:
        shape.block((x - along_x / 2, y + 0.02, z0 - 0.009), (x + along_x / 2, y + 0.036, z0 + 0.009), mat)
        for sx in (-1, 1):
            e = x + sx * (along_x / 2 - 0.02)
            shape.block((e - 0.006, y, z0 - 0.006), (e + 0.006, y + 0.025, z0 + 0.006), mat)
    else:
        shape.block((x - 0.009, y + 0.02, z0), (x + 0.009, y + 0.036, z1), mat)
        for z in (z0 + 0.015, z1 - 0.027):
            shape.block((x - 0.006, y, z), (x + 0.006, y + 0.025, z + 0.012), mat)


def _fronts(
    shape: Shape, rng: np.random.Generator, x: tuple[float, float], z: tuple[float, float], y: float, columns: int,
    rows: int, mat: Material, drawers: bool,
) -> None:  # fmt: skip
    """Doors or drawer fronts, a gap between them, each with a handle or knob."""
    dark = material(np.array(mat.color) * 0.45)
    shape.block((x[0], y - 0.004, z[0]), (x[1], y, z[1]), dark)  # what shows in the gaps
    gap, thickness = 0.006, 0.018
    grip = CHROME if rng.random() < 0.6 or max(mat.color) < 0.3 else DARK
    knobs = rng.random() < 0.4
    xs, zs = np.linspace(*x, columns + 1), np.linspace(*z, rows + 1)
    for i in range(columns):
        for j in range(rows):
            x0, x1, z0, z1 = xs[i] + gap / 2, xs[i + 1] - gap / 2, zs[j] + gap / 2, zs[j + 1] - gap / 2
            shape.block((x0, y, z0), (x1, y + thickness, z1), mat)
            front = y + thickness
            if drawers and knobs:
                for k in (0.25, 0.75) if x1 - x0 > 0.6 else (0.5,):
                    at = x0 + k * (x1 - x0)
                    shape.rod((at, front, (z0 + z1) / 2), (at, front + 0.025, (z0 + z1) / 2), 0.016, grip)
            elif drawers:
                _handle(shape, (x0 + x1) / 2, front, (z0 + z1) / 2, 0, grip, min(0.2, (x1 - x0) * 0.5))
            else:
                at = x1 - 0.05 if i % 2 == 0 else x0 + 0.05
                middle = np.clip(1.0, z0 + 0.15, z1 - 0.15) if z1 - z0 > 0.3 else (z0 + z1) / 2
                if knobs:
                    shape.rod((at, front, middle), (at, front + 0.025, middle), 0.016, grip)
                else:
                    reach = min(0.09, (z1 - z0) / 3)
                    _handle(shape, at, front, middle - reach, middle + reach, grip)


def _cabinet(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "wardrobe", "dresser", "nightstand", "base", "upper", "tv", "sideboard")
    w, d, h = {
        "wardrobe": (rng.uniform(0.9, 1.9), rng.uniform(0.55, 0.62), rng.uniform(1.85, 2.15)),
        "dresser": (rng.uniform(0.7, 1.3), rng.uniform(0.42, 0.5), rng.uniform(0.75, 1.1)),
        "nightstand": (rng.uniform(0.38, 0.5), rng.uniform(0.34, 0.42), rng.uniform(0.42, 0.58)),
        "base": (rng.uniform(0.5, 1.0), 0.58, 0.90),
        "upper": (rng.uniform(0.6, 1.1), rng.uniform(0.32, 0.36), rng.uniform(0.55, 0.7)),
        "tv": (rng.uniform(1.2, 1.8), rng.uniform(0.38, 0.46), rng.uniform(0.42, 0.55)),
        "sideboard": (rng.uniform(1.1, 1.7), rng.uniform(0.4, 0.48), rng.uniform(0.75, 0.9)),
    }[style]
    coat = _coat(rng, color)
    body = material(np.array(coat.color) * 0.93, np.array(coat.second) * 0.93, coat.texture, coat.period)
    foot = 0.0 if style == "upper" else (0.09 if style == "base" else rng.choice([0.06, 0.13]))
    if foot >= 0.1:
        _legs(shape, w, d, foot, DARK if rng.random() < 0.5 else body, 0.05, 0.02, True)
    elif foot:
        shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.06, foot), DARK)
    top = 0.035 if style == "base" else (0.0 if style == "upper" else 0.022)
    shape.block((-w / 2, -d / 2, foot), (w / 2, d / 2 - 0.02, h - top), body)
    if style == "base":
        shape.block((-w / 2, -d / 2, h - top), (w / 2, d / 2 + 0.015, h), _worktop(rng, color))
    elif top:
        shape.block((-w / 2 - 0.008, -d / 2, h - top), (w / 2 + 0.008, d / 2 + 0.01, h), coat)
    z = (foot + 0.012, h - top - 0.006)
    x = (-w / 2 + 0.006, w / 2 - 0.006)
    y = d / 2 - 0.02
    doors = max(1, round(w / 0.5))
    if style in ("dresser", "nightstand"):
        _fronts(shape, rng, x, z, y, 1 if w < 0.9 else 2, max(2, round((z[1] - z[0]) / 0.21)), coat, True)
    elif style == "wardrobe" and rng.random() < 0.4:
        split = foot + 0.42
        _fronts(shape, rng, x, (z[0], split), y, 1 if w < 1.2 else 2, 2, coat, True)
        _fronts(shape, rng, x, (split, z[1]), y, doors, 1, coat, False)
    elif style == "base" and rng.random() < 0.5:
        split = h - 0.22
        _fronts(shape, rng, x, (split, z[1]), y, doors, 1, coat, True)
        _fronts(shape, rng, x, (z[0], split), y, doors, 1, coat, False)
    elif style == "tv":
        _fronts(shape, rng, x, z, y, max(2, round(w / 0.55)), 1 if rng.random() < 0.6 else 2, coat, True)
    else:
        _fronts(shape, rng, x, z, y, doors, 1, coat, False)
    return style


def _worktop(rng: np.random.Generator, color: str) -> Material:
    """Of the unit's own colour: seen from standing height it is a large part of a low unit."""
    if color == "brown":
        return _coat(rng, color, upright=False)
    tone = vary(rng, color) * 0.95
    return material(tone, tone * 0.85, "stone", 0.8)


def _refrigerator(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "top_freezer", "side_by_side")
    wide = style == "side_by_side"
    w = rng.uniform(0.85, 0.95) if wide else rng.uniform(0.58, 0.72)
    d, h = rng.uniform(0.64, 0.72), rng.uniform(1.72, 1.85) if wide else rng.uniform(1.5, 1.85)
    coat = _coat(rng, color)
    body = material(np.array(coat.color) * 0.9)
    shape.block((-w / 2 + 0.01, -d / 2, 0.0), (w / 2 - 0.01, d / 2 - 0.075, 0.04), DARK)
    shape.block((-w / 2, -d / 2, 0.04), (w / 2, d / 2 - 0.065, h), body)
    shape.block((-w / 2 + 0.012, d / 2 - 0.065, 0.05), (w / 2 - 0.012, d / 2 - 0.05, h - 0.01), DARK)
    back, front = d / 2 - 0.05, d / 2
    grip = CHROME if color != "gray" else DARK
    if wide:
        split = rng.uniform(-0.1, 0.0) * w
        shape.block((-w / 2, back, 0.05), (split - 0.004, front, h), coat)
        shape.block((split + 0.004, back, 0.05), (w / 2, front, h), coat)
        for x in (split - 0.05, split + 0.05):
            _handle(shape, x, front, 0.7, 1.45, grip)
        if rng.random() < 0.6:
            x = (-w / 2 + split) / 2
            shape.block((x - 0.09, front - 0.001, 1.0), (x + 0.09, front + 0.006, 1.32), DARK)
            shape.block((x - 0.07, front, 1.03), (x + 0.07, front + 0.008, 1.12), STEEL)
    else:
        split = h * rng.uniform(0.60, 0.70) if rng.random() < 0.6 else h * rng.uniform(0.3, 0.38)
        shape.block((-w / 2, back, 0.05), (w / 2, front, split - 0.005), coat)
        shape.block((-w / 2, back, split + 0.005), (w / 2, front, h), coat)
        x = (w / 2 - 0.05) * rng.choice([-1, 1])
        _handle(shape, x, front, max(0.3, split - 0.45), split - 0.06, grip)
        _handle(shape, x, front, split + 0.06, min(h - 0.1, split + 0.4), grip)
    return style


def _shelf(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "bookcase", "low", "ladder")
    w = rng.uniform(0.6, 1.2)
    d = rng.uniform(0.26, 0.36)
    h = rng.uniform(0.75, 1.1) if style == "low" else rng.uniform(1.5, 2.0)
    coat = _coat(rng, color)
    t = rng.uniform(0.03, 0.04) if style == "ladder" else rng.uniform(0.022, 0.034)
    num_boards = max(3, round(h / 0.36) + 1)
    heights = np.linspace(0.06, h - t, num_boards)
    if style == "ladder":
        for sx in (-1, 1):
            for y in (-d / 2 + 0.018, d / 2 - 0.018):
                x = sx * (w / 2 - 0.018)
                shape.block((x - 0.018, y - 0.018, 0), (x + 0.018, y + 0.018, h), coat)
        for sx in (-1, 1):
            shape.block(
                (sx * (w / 2 - 0.012) - 0.012, -d / 2, h - 0.03), (sx * (w / 2 - 0.012) + 0.012, d / 2, h), coat
            )
    else:
        for sx in (-1, 1):
            x = sx * (w / 2 - t / 2)
            shape.block((x - t / 2, -d / 2, 0), (x + t / 2, d / 2, h), coat)
        shape.block((-w / 2 + t, -d / 2, 0.02), (w / 2 - t, -d / 2 + 0.012, h - 0.01), coat)
        shape.block((-w / 2 + t, -d / 2, 0), (w / 2 - t, d / 2 - 0.01, 0.06), coat)
    for z in heights:
        shape.block((-w / 2 + t, -d / 2 + 0.002, z), (w / 2 - t, d / 2 - 0.002, z + t), coat)
    room = heights[1] - heights[0] - t
    for z in heights[:-1]:
        if rng.random() < (0.35 if style == "ladder" else 0.15):
            continue
        x, end = -w / 2 + t + 0.02, w / 2 - t - 0.02
        if style == "ladder":  # has no back and no sides: few books, or one sees more of them than of the shelf
            end = x + (end - x) * rng.uniform(0.12, 0.28)
        elif style == "low" or rng.random() < 0.6:
            end = x + (end - x) * rng.uniform(0.3, 0.7)
        while x < end - 0.05:
            what = rng.random()
            if what < 0.90:  # a book
                width, height = rng.uniform(0.02, 0.05), room * rng.uniform(0.55, 0.88)
                cover = material(vary(rng, str(rng.choice(list(PALETTE)))) * 0.9)
                shape.block(
                    (x, -d / 2 + 0.03, z + t),
                    (x + width - 0.002, d / 2 - rng.uniform(0.03, 0.09), z + t + height),
                    cover,
                )
            elif end - x > 0.16:  # a vase
                width = 0.15
                tone = material(vary(rng, str(rng.choice(list(PALETTE)))))
                r, height = 0.05, room * 0.7
                vase = [(0, 0), (r * 0.7, 0), (r, height * 0.4), (r * 0.4, height * 0.8), (r * 0.55, height)]
                shape.lathe([*vase, (0, height * 0.97)], tone, (x + 0.075, 0, z + t), segments=12)
            else:
                width = 0.05
            x += width
    return style


def _knobs(shape: Shape, xs, y: float, z: float, mat: Material, radius: float = 0.018) -> None:
    for x in xs:
        shape.rod((x, y, z), (x, y + 0.025, z), radius, mat, segments=10)


def _stove(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "gas", "electric")
    w, d, h = rng.uniform(0.56, 0.76), 0.60, rng.uniform(0.88, 0.92)
    coat = _coat(rng, color)
    shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.06, 0.07), DARK)
    shape.block((-w / 2, -d / 2, 0.07), (w / 2, d / 2 - 0.03, h - 0.02), coat)
    front = d / 2 - 0.03
    shape.block((-w / 2 + 0.01, front, 0.08), (w / 2 - 0.01, front + 0.02, 0.21), coat)  # drawer
    shape.block((-w / 2 + 0.01, front, 0.22), (w / 2 - 0.01, front + 0.025, h - 0.15), coat)  # oven door
    shape.block((-w / 2 + 0.13, front + 0.02, 0.38), (w / 2 - 0.13, front + 0.029, h - 0.28), GLASS)
    _handle(shape, 0, front + 0.025, h - 0.19, 0, CHROME, w * 0.8)
    shape.block((-w / 2, front, h - 0.14), (w / 2, front + 0.02, h - 0.02), coat)
    _knobs(shape, np.linspace(-w * 0.36, w * 0.36, 5), front + 0.02, h - 0.08, DARK if color != "black" else CHROME)
    shape.block((-w / 2, -d / 2, h - 0.02), (w / 2, d / 2 - 0.01, h), coat)
    for x, y, r in ((-0.24, -0.2, 0.085), (0.24, -0.2, 0.105), (-0.24, 0.22, 0.105), (0.24, 0.22, 0.085)):
        at = (x * w, y * d - 0.02, h)
        if style == "gas":
            shape.rod(at, (at[0], at[1], h + 0.015), r * 0.45, DARK, segments=12)
            for k in range(2):  # the pan grid
                a, b = (r, 0.008) if k else (0.008, r)
                shape.block((at[0] - a, at[1] - b, h + 0.018), (at[0] + a, at[1] + b, h + 0.032), DARK)
        else:
            hot = material((0.30, 0.29, 0.29) if color != "gray" else (0.16, 0.16, 0.16))
            shape.lathe([(r, 0), (r, 0.004), (r * 0.72, 0.004), (r * 0.72, 0)], hot, at, segments=20)
            shape.lathe([(r * 0.45, 0), (r * 0.45, 0.004), (0, 0.004)], hot, at, segments=16)
    if rng.random() < 0.5:
        shape.block((-w / 2, -d / 2, h), (w / 2, -d / 2 + 0.05, h + 0.14), coat)
        shape.block((-0.08, -d / 2 + 0.05, h + 0.06), (0.08, -d / 2 + 0.054, h + 0.11), GLASS)
    return style


def _bed(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "single", "double")
    w = rng.uniform(0.92, 1.1) if style == "single" else rng.uniform(1.4, 1.85)
    length, deck = rng.uniform(2.0, 2.12), rng.uniform(0.24, 0.34)
    frame = _coat(rng, str(rng.choice(["brown", "brown", "white", "black", "gray"])), upright=False)
    head = rng.uniform(0.85, 1.2)
    back, foot = -length / 2, length / 2
    if rng.random() < 0.5:  # upholstered headboard
        shape.cushion((-w / 2, back, 0.1), (w / 2, back + 0.11, head), _cloth(rng, color, 0), 0.18)
        inner = back + 0.10
    else:
        shape.block((-w / 2, back, 0), (w / 2, back + 0.05, head), frame)
        for x in np.linspace(-w / 2 + 0.06, w / 2 - 0.06, 4)[:-1]:
            shape.block(
                (x + 0.02, back + 0.05, head * 0.5), (x + (w - 0.12) / 3 - 0.02, back + 0.062, head - 0.06), frame
            )
        inner = back + 0.06
    _legs(shape, w, length, deck - 0.12, frame, 0.06, 0.035, True)
    shape.block((-w / 2, inner - 0.01, deck - 0.14), (w / 2, foot, deck), frame)
    if rng.random() < 0.4:
        shape.block((-w / 2, foot - 0.04, deck), (w / 2, foot, deck + rng.uniform(0.22, 0.35)), frame)
        foot -= 0.04
    top = deck + rng.uniform(0.17, 0.24)
    sheet = material((0.90, 0.90, 0.88), (0.83, 0.83, 0.82), "fabric", 0.5)
    shape.cushion((-w / 2 + 0.03, inner, deck - 0.02), (w / 2 - 0.03, foot - 0.01, top), sheet, 0.12)
    cover = _cloth(rng, color)
    start = inner + rng.uniform(0.42, 0.5)
    drop = rng.uniform(0.05, 0.14)
    shape.cushion((-w / 2 - 0.015, start, deck - drop * 0.2), (w / 2 + 0.015, foot + 0.0, top + 0.055), cover, 0.16)
    shape.cushion(
        (-w / 2 - 0.01, start - 0.10, top - 0.02), (w / 2 + 0.01, start + 0.06, top + 0.075), cover, 0.5
    )  # turned edge
    for x in (0.0,) if style == "single" else (-w / 4, w / 4):
        half = min(0.36, w / (2.3 if style == "single" else 4.4))
        case = sheet if rng.random() < 0.4 else _cloth(rng, color, 0)
        shape.cushion((x - half, inner + 0.02, top - 0.02), (x + half, inner + 0.40, top + 0.13), case, 0.55)
    return style


def _tap(shape: Shape, x: float, y: float, z: float, reach: float, height: float) -> None:
    """Tap at (x, y, z) whose spout reaches towards +y."""
    shape.rod((x, y, z), (x, y, z + height), 0.014, CHROME, segments=10)
    shape.rod((x, y - 0.01, z + height - 0.012), (x, y + reach, z + height - 0.03), 0.012, CHROME, segments=10)
    shape.rod((x, y + reach - 0.01, z + height - 0.03), (x, y + reach - 0.01, z + height - 0.06), 0.011, CHROME)
    shape.rod((x, y, z + height), (x, y, z + height + 0.025), 0.018, CHROME, tip=0.012)


def _sink(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "vanity", "kitchen", "pedestal")
    if style == "pedestal":
        w, d, h = rng.uniform(0.52, 0.62), rng.uniform(0.42, 0.48), rng.uniform(0.82, 0.88)
        stone = material(vary(rng, color), vary(rng, color) * 0.96)
        shape.lathe(
            [(0, 0), (0.12, 0), (0.10, 0.05), (0.075, 0.3), (0.09, h - 0.2), (0.0, h - 0.2)], stone, (0, -0.06, 0)
        )
        basin = [(0, h - 0.24), (0.35, h - 0.22), (0.85, h - 0.1), (1, h - 0.02), (1, h)]
        basin += [(0.86, h), (0.78, h - 0.06), (0.4, h - 0.14), (0, h - 0.15)]
        shape.lathe(basin, stone, scale=(w / 2, d / 2), power=2.8, segments=24)
        shape.block((-w * 0.32, -d / 2 - 0.03, h - 0.12), (w * 0.32, -d / 2 + 0.075, h + 0.015), stone)
        _tap(shape, 0, -d / 2 + 0.03, h + 0.015, 0.11, 0.12)
        return style
    kitchen = style == "kitchen"
    w, d, h = (rng.uniform(0.8, 1.1), 0.58, 0.90) if kitchen else (rng.uniform(0.6, 1.0), rng.uniform(0.44, 0.5), 0.85)
    coat = _coat(rng, color)
    foot, top = 0.09, 0.035
    shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.06, foot), DARK)
    shape.block((-w / 2, -d / 2, foot), (w / 2, d / 2 - 0.02, h - 0.20), coat)
    for sx in (-1, 1):  # the body reaches the worktop only round the basin
        x = sx * (w / 2 - 0.01)
        shape.block((x - 0.01, -d / 2, h - 0.20), (x + 0.01, d / 2 - 0.02, h - top), coat)
    shape.block((-w / 2 + 0.02, d / 2 - 0.04, h - 0.20), (w / 2 - 0.02, d / 2 - 0.02, h - top), coat)
    doors = max(1, round(w / 0.48))
    _fronts(
        shape, rng, (-w / 2 + 0.006, w / 2 - 0.006), (foot + 0.01, h - top - 0.006), d / 2 - 0.02, doors, 1, coat, False
    )
    # A vanity is of one colour, seen from above too.
    slab, bowl = (_worktop(rng, color), STEEL) if kitchen else (coat, coat)
    bw, by0, by1 = min(0.46, w * 0.62), -d / 2 + 0.12, d / 2 - 0.07  # the hole
    bx = rng.uniform(-1, 1) * (w / 2 - bw / 2 - 0.06) if kitchen else 0.0
    for low, high in (
        ((-w / 2, -d / 2), (bx - bw / 2, d / 2 + 0.01)),
        ((bx + bw / 2, -d / 2), (w / 2, d / 2 + 0.01)),
        ((bx - bw / 2, -d / 2), (bx + bw / 2, by0)),
        ((bx - bw / 2, by1), (bx + bw / 2, d / 2 + 0.01)),
    ):
        shape.block((*low, h - top), (*high, h), slab)
    depth = 0.16
    inner = [(1, h + 0.004), (0.96, h + 0.004), (0.9, h - depth + 0.03), (0.8, h - depth), (0.0, h - depth)]
    shape.lathe(inner, bowl, (bx, (by0 + by1) / 2, 0), (bw / 2 * 1.04, (by1 - by0) / 2 * 1.04), 10, 32)
    shape.lathe([(0.025, 0), (0.025, 0.004), (0, 0.004)], DARK, (bx, (by0 + by1) / 2, h - depth), segments=8)
    _tap(shape, bx, by0 - 0.045, h, 0.17 if kitchen else 0.12, 0.24 if kitchen else 0.15)
    if not kitchen and rng.random() < 0.5:
        shape.block((-w / 2, -d / 2, h), (w / 2, -d / 2 + 0.015, h + 0.08), coat)
    return style


def _washer(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "front_loader")
    w, d, h = rng.uniform(0.58, 0.66), rng.uniform(0.56, 0.64), rng.uniform(0.84, 0.95)
    coat = _coat(rng, color)
    shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.03, 0.03), DARK)
    shape.block((-w / 2, -d / 2, 0.03), (w / 2, d / 2 - 0.02, h), coat)
    front = d / 2 - 0.02
    shape.block(
        (-w / 2 + 0.005, front, h - 0.13),
        (w / 2 - 0.005, front + 0.012, h - 0.015),
        material(np.array(coat.color) * 0.8),
    )
    shape.block((-w / 2 + 0.02, front + 0.01, h - 0.12), (-w / 2 + 0.19, front + 0.018, h - 0.03), coat)
    shape.rod((0.0, front + 0.01, h - 0.072), (0.0, front + 0.035, h - 0.072), 0.03, CHROME, segments=14)
    shape.block((0.07, front + 0.01, h - 0.1), (w / 2 - 0.03, front + 0.015, h - 0.045), GLASS)
    r, middle = w * 0.34, (h - 0.13) * 0.52
    ring = CHROME if rng.random() < 0.7 else DARK
    at = (0, front, middle)
    shape.lathe(
        [(r, 0), (r, 0.02), (r * 0.93, 0.035), (r * 0.76, 0.03), (r * 0.72, 0.012)], ring, at, segments=28, axis="y"
    )
    shape.lathe([(r * 0.74, 0.012), (r * 0.5, 0.03), (0, 0.036)], GLASS, at, segments=28, axis="y")
    shape.block(
        (r * 0.78, front + 0.02, middle - 0.05),
        (r * 0.92, front + 0.045, middle + 0.05),
        DARK if ring is CHROME else CHROME,
    )
    return style


def _toilet(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "close_coupled")
    w, length, seat = rng.uniform(0.36, 0.40), rng.uniform(0.62, 0.72), rng.uniform(0.39, 0.43)
    tone = vary(rng, color)
    stone, lid = material(tone, tone * 0.97), material(np.clip(tone * 1.03, 0, 0.97))
    back = -length / 2
    tank, tank_top = rng.uniform(0.17, 0.2), rng.uniform(0.74, 0.84)
    middle, half = (back + tank - 0.03 + length / 2) / 2, (length / 2 - back - tank + 0.03) / 2
    at = (0, middle, 0)
    profile = [(0, 0), (0.62, 0), (0.58, 0.08), (0.56, seat * 0.4), (0.75, seat * 0.72), (0.97, seat * 0.93), (1, seat)]
    shape.lathe(
        [*profile, (0.72, seat), (0.6, seat - 0.1), (0.25, seat - 0.18), (0, seat - 0.18)],
        stone,
        at,
        (w / 2, half),
        2.3,
        24,
    )
    shape.block((-0.1, back + 0.02, 0), (0.1, middle, seat * 0.6), stone)
    shape.block((-w * 0.35, back + 0.01, seat * 0.55), (w * 0.35, middle - half * 0.5, seat - 0.005), stone)
    shape.cushion((-w * 0.52, back, seat - 0.02), (w * 0.52, back + tank, tank_top), stone, 0.14)
    shape.cushion(
        (-w * 0.54, back - 0.002, tank_top - 0.015), (w * 0.54, back + tank + 0.008, tank_top + 0.025), lid, 0.2
    )
    shape.rod((0, back + tank / 2, tank_top + 0.02), (0, back + tank / 2, tank_top + 0.032), 0.03, CHROME, segments=12)
    if rng.random() < 0.5:  # lid open: seat ring, lid leaning on the tank
        shape.lathe(
            [(1, seat), (1.02, seat + 0.022), (0.66, seat + 0.022), (0.64, seat)], lid, at, (w / 2, half), 2.3, 24
        )
        hinge = (0, back + tank + 0.025, seat + 0.02 + half * 0.9)
        shape.lathe([(0, 0), (1, 0), (1, 0.02), (0, 0.02)], lid, hinge, (half * 0.9, w / 2), 2.3, 24, "y")
    else:
        shape.lathe(
            [(1, seat), (1.02, seat + 0.02), (1, seat + 0.036), (0, seat + 0.042)], lid, at, (w / 2, half), 2.3, 24
        )
    return style


def _bathtub(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "built_in", "free_standing")
    w, d, h = rng.uniform(1.5, 1.75), rng.uniform(0.7, 0.8), rng.uniform(0.52, 0.6)
    tone = vary(rng, color)
    # Views look down into a tub: were it white inside, its named colour would be the lesser part of what they see.
    outside, inside = material(tone, tone * 0.96), material(0.85 * tone + 0.15, 0.85 * tone + 0.13)
    scale = (w / 2, d / 2)
    rim = h - 0.018
    if style == "built_in":
        shape.lathe([(1, 0), (1, h), (0.995, h)], outside, scale=scale, power=60, segments=40)
        shape.lathe([(0.998, h), (0.90, h)], inside, scale=scale, power=30, segments=40)
        shape.lathe(
            [(0.905, h), (0.86, h - 0.03), (0.74, 0.16), (0.62, 0.12), (0, 0.12)],
            inside,
            scale=scale,
            power=6,
            segments=40,
        )
        shape.lathe([(0.93, h - 0.001), (0.86, h - 0.004)], inside, scale=scale, power=6, segments=40)
    else:
        shape.lathe(
            [(0, 0), (0.70, 0), (0.76, 0.1), (0.93, rim - 0.03), (1, rim), (1, h)],
            outside,
            scale=scale,
            power=2.8,
            segments=40,
        )
        shape.lathe(
            [(1, h), (0.92, h), (0.88, h - 0.03), (0.68, 0.16), (0.5, 0.12), (0, 0.12)],
            inside,
            scale=scale,
            power=2.8,
            segments=40,
        )
    shape.rod((w * 0.3, 0, 0.12), (w * 0.3, 0, 0.126), 0.03, CHROME, segments=10)
    side = w / 2 - 0.07
    shape.rod((side, -0.06, h - 0.012), (side, -0.06, h + 0.05), 0.012, CHROME)
    shape.rod((side, 0.06, h - 0.012), (side, 0.06, h + 0.05), 0.012, CHROME)
    shape.rod((side, -0.09, h + 0.06), (side, 0.09, h + 0.06), 0.02, CHROME)
    shape.rod((side, 0, h + 0.06), (side - 0.14, 0, h + 0.05), 0.014, CHROME)
    return style


def _oven(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "column", "under_counter")
    w, d = rng.uniform(0.58, 0.64), 0.58
    bottom, h = (rng.uniform(0.55, 0.8), rng.uniform(1.45, 2.1)) if style == "column" else (0.2, 0.90)
    coat = _coat(rng, color)
    shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.06, 0.08), DARK)
    top = 0.035 if style == "under_counter" else 0.0
    shape.block((-w / 2, -d / 2, 0.08), (w / 2, d / 2 - 0.03, h - top), coat)
    if top:
        shape.block((-w / 2, -d / 2, h - top), (w / 2, d / 2 + 0.01, h), _worktop(rng, color))
    front = d / 2 - 0.03
    shape.block((-w / 2 + 0.004, front, 0.09), (w / 2 - 0.004, front + 0.018, bottom - 0.006), coat)
    high = min(bottom + 0.6, h - top - 0.005)
    shape.block((-w / 2 + 0.004, front, bottom), (w / 2 - 0.004, front + 0.02, high - 0.11), coat)  # oven door
    shape.block((-w / 2 + 0.1, front + 0.015, bottom + 0.11), (w / 2 - 0.1, front + 0.024, high - 0.21), GLASS)
    _handle(shape, 0, front + 0.02, high - 0.15, 0, CHROME, w * 0.78)
    shape.block(
        (-w / 2 + 0.004, front, high - 0.105), (w / 2 - 0.004, front + 0.02, high), DARK if color != "black" else STEEL
    )
    _knobs(shape, (-w * 0.33, -w * 0.2, w * 0.2, w * 0.33), front + 0.02, high - 0.052, CHROME)
    shape.block((-0.06, front + 0.015, high - 0.075), (0.06, front + 0.023, high - 0.03), material((0.1, 0.3, 0.25)))
    if h - high > 0.08:
        _fronts(shape, rng, (-w / 2 + 0.004, w / 2 - 0.004), (high + 0.005, h - 0.004), front, 1, 1, coat, False)
    return style


def _dishwasher(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "standard")
    w, d, h = rng.uniform(0.58, 0.61), 0.58, 0.90
    coat = _coat(rng, color)
    shape.block((-w / 2 + 0.02, -d / 2, 0), (w / 2 - 0.02, d / 2 - 0.07, 0.1), DARK)
    shape.block((-w / 2, -d / 2, 0.1), (w / 2, d / 2 - 0.03, h - 0.035), material(np.array(coat.color) * 0.9))
    shape.block((-w / 2, -d / 2, h - 0.035), (w / 2, d / 2 + 0.01, h), _worktop(rng, color))
    front = d / 2 - 0.03
    shape.block((-w / 2 + 0.004, front, 0.11), (w / 2 - 0.004, front + 0.022, h - 0.17), coat)
    panel = DARK if color in ("gray", "white") else STEEL
    shape.block((-w / 2 + 0.004, front, h - 0.165), (w / 2 - 0.004, front + 0.022, h - 0.04), panel)
    _handle(shape, 0, front + 0.022, h - 0.21, 0, CHROME, w * 0.82)
    _knobs(shape, np.linspace(0.1, w / 2 - 0.05, 4), front + 0.006, h - 0.1, CHROME, 0.009)
    shape.block(
        (-w / 2 + 0.05, front + 0.02, h - 0.125), (-w / 2 + 0.16, front + 0.025, h - 0.075), material((0.15, 0.45, 0.5))
    )
    return style


def _fireplace(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "mantel")
    w, d, h = rng.uniform(1.2, 1.6), rng.uniform(0.36, 0.46), rng.uniform(1.05, 1.3)
    tone = vary(rng, color)
    if color in ("red", "brown", "gray") and rng.random() < 0.75:
        face = material(tone * 0.9, 0.55 * tone + 0.28 if color != "gray" else (0.32, 0.32, 0.32), "bricks", 1.0)
    else:
        face = material(tone, tone * 0.85, "stone", 1.2)
    pillar, lintel = w * rng.uniform(0.2, 0.26), h * rng.uniform(0.58, 0.68)
    y = d / 2 - 0.12  # front of the face; the hearth lies before it
    for sx in (-1, 1):
        x0, x1 = sorted((sx * w / 2 * 0.94, sx * (w / 2 * 0.94 - pillar)))
        shape.block((x0, -d / 2, 0.05), (x1, y, h - 0.08), face)
        shape.block((x0 - 0.01, -d / 2, 0.05), (x1 + 0.01, y + 0.02, 0.17), face)
    shape.block((-w / 2 * 0.94 + pillar, -d / 2, lintel), (w / 2 * 0.94 - pillar, y, h - 0.08), face)
    mantel = face if rng.random() < 0.4 else _coat(rng, color, upright=False)
    shape.block((-w / 2 * 0.97, -d / 2, h - 0.08), (w / 2 * 0.97, y + 0.04, h - 0.045), mantel)
    shape.block((-w / 2, -d / 2, h - 0.045), (w / 2, y + 0.08, h), mantel)
    shape.block(
        (-w / 2, -d / 2, 0), (w / 2, d / 2, 0.05), material((0.25, 0.25, 0.26), (0.34, 0.34, 0.35), "stone", 0.8)
    )
    inside = w / 2 * 0.94 - pillar
    soot = material((0.045, 0.042, 0.04), (0.10, 0.095, 0.09), "bricks", 0.8)
    shape.block((-inside, -d / 2, 0.05), (inside, -d / 2 + 0.03, lintel), soot)
    for sx in (-1, 1):
        shape.block(
            (min(sx * inside, sx * (inside - 0.01)), -d / 2 + 0.03, 0.05),
            (max(sx * inside, sx * (inside - 0.01)), y - 0.005, lintel),
            soot,
        )
    log = material((0.28, 0.17, 0.09), (0.15, 0.09, 0.05), "wood", 0.5)
    for z, dy, dx in ((0.10, -0.04, 0.0), (0.10, 0.06, 0.02), (0.18, 0.01, -0.02)):
        shape.rod((-inside * 0.65 + dx, dy - 0.06, z), (inside * 0.65 + dx, dy - 0.03, z), 0.045, log)
    if rng.random() < 0.6:
        ember = material((1.0, 0.45, 0.08), (0.9, 0.15, 0.02), "carpet", 0.3, emission=1.0)
        shape.cushion((-inside * 0.5, -0.1, 0.05), (inside * 0.5, 0.06, 0.13), ember, 1.0, 12)
        for x in (-0.25, 0.0, 0.22):
            shape.rod(
                (x * inside, -0.04, 0.18), (x * inside, -0.05, 0.18 + rng.uniform(0.1, 0.22)), 0.045, ember, tip=0.008
            )
    return style


def _stool(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "round", "square", "bar", "pouf")
    if style == "pouf":
        w, h = rng.uniform(0.4, 0.5), rng.uniform(0.38, 0.46)
        cloth = _cloth(rng, color)
        shape.lathe(
            [(0, 0.0), (0.9, 0.0), (1.0, 0.06), (1.0, h - 0.07), (0.92, h - 0.01), (0, h)],
            cloth,
            scale=(w / 2, w / 2),
            segments=24,
        )
        return style
    w = rng.uniform(0.32, 0.40)
    h = rng.uniform(0.62, 0.76) if style == "bar" else rng.uniform(0.43, 0.5)
    coat = _coat(rng, color, upright=False)
    leg = coat if style == "bar" or rng.random() < 0.6 else (CHROME if rng.random() < 0.5 else DARK)
    seat = coat if rng.random() < 0.6 else _cloth(rng, color, 0)
    if style == "square":
        shape.block((-w / 2, -w / 2, h - 0.045), (w / 2, w / 2, h), seat)
        _legs(shape, w, w, h - 0.045, leg, 0.03, 0.019, True)
        for z in (0.16,):
            for s in (-1, 1):
                y = s * (w / 2 - 0.03)
                shape.block((-w / 2 + 0.03, y - 0.01, z), (w / 2 - 0.03, y + 0.01, z + 0.022), leg)
    else:
        shape.lathe(
            [(0, h - 0.05), (0.94, h - 0.05), (1, h - 0.035), (1, h - 0.012), (0.94, h), (0, h)],
            seat,
            scale=(w / 2, w / 2),
            segments=24,
        )
        for a in np.arange(4) * np.pi / 2 + np.pi / 4:
            c, s = np.cos(a), np.sin(a)
            shape.rod((c * w * 0.54, s * w * 0.54, 0), (c * w * 0.32, s * w * 0.32, h - 0.04), 0.013, leg, tip=0.016)
        if style == "bar":
            r = w * 0.5
            shape.lathe([(r, 0.2), (r, 0.222), (r - 0.02, 0.222), (r - 0.02, 0.2)], leg, segments=20)
    return style


def _chair(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "slat", "panel", "upholstered", "swivel")
    w, d = rng.uniform(0.42, 0.50), rng.uniform(0.43, 0.50)
    seat, h = rng.uniform(0.43, 0.47), rng.uniform(0.82, 0.98)
    if style == "swivel":
        w, d = w + 0.04, d + 0.04
        cloth = _cloth(rng, color, 0)
        for a in np.arange(5) * 2 * np.pi / 5 + 0.3:
            c, s = np.cos(a), np.sin(a)
            shape.rod((0, 0, 0.11), (c * 0.28, s * 0.28, 0.065), 0.026, DARK, tip=0.018)
            shape.rod((c * 0.27, s * 0.27 - 0.014, 0.028), (c * 0.27, s * 0.27 + 0.014, 0.028), 0.028, DARK, 10)
        shape.rod((0, 0, 0.08), (0, 0, seat - 0.05), 0.026, STEEL)
        shape.cushion((-w / 2, -d / 2, seat - 0.06), (w / 2, d / 2, seat + 0.03), cloth, 0.3)
        shape.block((-0.035, -d / 2 - 0.02, seat - 0.03), (0.035, -d / 2 + 0.02, seat + 0.25), DARK)
        shape.cushion((-w / 2 + 0.02, -d / 2 - 0.04, seat + 0.12), (w / 2 - 0.02, -d / 2 + 0.05, h + 0.04), cloth, 0.3)
        if rng.random() < 0.6:
            for sx in (-1, 1):
                x = sx * (w / 2 + 0.02)
                shape.block((x - 0.02, -0.12, seat + 0.17), (x + 0.02, 0.12, seat + 0.2), DARK)
                shape.block((x - 0.015, -0.03, seat - 0.04), (x + 0.015, 0.03, seat + 0.18), DARK)
        return style
    upholstered = style == "upholstered"
    coat = _coat(rng, str(rng.choice(["brown", "black"])) if upholstered else color)
    cloth = _cloth(rng, color, 0.15) if upholstered or rng.random() < 0.25 else coat
    if upholstered:
        shape.cushion((-w / 2, -d / 2, seat - 0.09), (w / 2, d / 2, seat + 0.02), cloth, 0.25)
        shape.cushion((-w / 2 + 0.01, -d / 2 - 0.02, seat - 0.02), (w / 2 - 0.01, -d / 2 + 0.07, h), cloth, 0.25)
        _legs(shape, w, d, seat - 0.07, coat, 0.035, 0.019, False)
        if rng.random() < 0.35:
            for sx in (-1, 1):
                x = sx * (w / 2 + 0.02)
                shape.cushion((x - 0.035, -d / 2, seat - 0.06), (x + 0.035, d / 2 - 0.06, seat + 0.2), cloth, 0.3)
        return style
    r = rng.uniform(0.016, 0.022)
    shape.block((-w / 2, -d / 2, seat - 0.035), (w / 2, d / 2, seat), cloth)
    for sx in (-1, 1):
        x = sx * (w / 2 - r)
        shape.block((x - r, d / 2 - 2 * r, 0), (x + r, d / 2, seat - 0.035), coat)  # front legs
        shape.block((x - r, -d / 2, 0), (x + r, -d / 2 + 2 * r, seat - 0.035), coat)
        shape.block((x - r, -d / 2 - 0.002, seat), (x + r, -d / 2 + 2 * r, h), coat)  # posts of the back
        shape.block((x - r * 0.6, -d / 2 + 2 * r, 0.17), (x + r * 0.6, d / 2 - 2 * r, 0.2), coat)
    shape.block((-w / 2 + r, -d / 2 + 0.005, seat - 0.09), (w / 2 - r, -d / 2 + 0.025, seat - 0.035), coat)
    shape.block((-w / 2 + r, d / 2 - 0.025, seat - 0.09), (w / 2 - r, d / 2 - 0.005, seat - 0.035), coat)
    if style == "slat":
        for z0, z1 in ((h - 0.09, h - 0.005), (seat + 0.16, seat + 0.22)):
            shape.block((-w / 2 + r, -d / 2 + 0.004, z0), (w / 2 - r, -d / 2 + 0.026, z1), coat)
        for x in np.linspace(-w / 2 + 0.09, w / 2 - 0.09, 4):
            shape.block((x - 0.013, -d / 2 + 0.006, seat + 0.22), (x + 0.013, -d / 2 + 0.022, h - 0.09), coat)
    else:
        shape.block((-w / 2 + r, -d / 2 + 0.002, seat + 0.12), (w / 2 - r, -d / 2 + 0.026, h), cloth)
    return style


def _table(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "dining", "round", "coffee", "desk", "side")
    coat = _coat(rng, color, upright=False)
    upright = _coat(rng, color)
    if style in ("round", "side"):
        r = rng.uniform(0.42, 0.55) if style == "round" else rng.uniform(0.2, 0.27)
        h = rng.uniform(0.72, 0.76) if style == "round" else rng.uniform(0.48, 0.6)
        shape.lathe(
            [(0, h - 0.035), (0.98, h - 0.035), (1, h - 0.02), (1, h - 0.005), (0.99, h), (0, h)],
            coat,
            scale=(r, r),
            segments=32,
        )
        k = r / 0.5
        shape.lathe(
            [(0.045 * k + 0.01, 0.03), (0.035 * k + 0.01, h * 0.5), (0.05 * k + 0.01, h - 0.035)], upright, segments=12
        )
        shape.lathe(
            [(0, 0), (0.28 * k + 0.03, 0), (0.27 * k + 0.03, 0.02), (0.05 * k, 0.05), (0, 0.06)], upright, segments=24
        )
        return style
    w, d, h = {
        "dining": (rng.uniform(1.15, 1.8), rng.uniform(0.75, 0.95), rng.uniform(0.72, 0.77)),
        "coffee": (rng.uniform(0.8, 1.2), rng.uniform(0.45, 0.65), rng.uniform(0.36, 0.46)),
        "desk": (rng.uniform(1.0, 1.5), rng.uniform(0.55, 0.7), rng.uniform(0.72, 0.76)),
    }[style]
    t = rng.uniform(0.025, 0.045)
    shape.block((-w / 2, -d / 2, h - t), (w / 2, d / 2, h), coat)
    leg = upright if rng.random() < 0.75 else DARK
    radius = rng.uniform(0.022, 0.036)
    square = bool(rng.random() < 0.6)
    _legs(shape, w, d, h - t, leg, radius + 0.02, radius, square)
    if style == "desk":
        bw = min(0.42, w * 0.36)
        x0 = -w / 2 + 0.02 if rng.random() < 0.5 else w / 2 - 0.02 - bw
        shape.block((x0, -d / 2 + 0.03, 0.1), (x0 + bw, d / 2 - 0.05, h - t), upright)
        _fronts(shape, rng, (x0 + 0.004, x0 + bw - 0.004), (0.11, h - t - 0.005), d / 2 - 0.05, 1, 3, upright, True)
    else:
        a = radius + 0.03
        for y in (-d / 2 + a, d / 2 - a):
            shape.block((-w / 2 + a, y - 0.009, h - t - 0.07), (w / 2 - a, y + 0.009, h - t), upright)
        for x in (-w / 2 + a, w / 2 - a):
            shape.block((x - 0.009, -d / 2 + a, h - t - 0.07), (x + 0.009, d / 2 - a, h - t), upright)
        if style == "coffee" and rng.random() < 0.6:
            shape.block((-w / 2 + a, -d / 2 + a, 0.12), (w / 2 - a, d / 2 - a, 0.14), coat)
    return style


def _tv_monitor(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "wall", "stand", "monitor")
    w = rng.uniform(0.5, 0.62) if style == "monitor" else rng.uniform(0.9, 1.35)
    h = w * 0.575
    frame = material(vary(rng, color))
    base = 0.0 if style == "wall" else (0.12 if style == "monitor" else 0.06)
    t = 0.03
    y = 0.0
    shape.block((-w / 2, y - t / 2, base), (w / 2, y + t / 2, base + h), frame)
    shape.block((-w * 0.3, y - t / 2 - 0.025, base + h * 0.2), (w * 0.3, y - t / 2, base + h * 0.75), DARK)
    edge = 0.014
    screen = material((0.035, 0.04, 0.05), (0.11, 0.12, 0.14), "screen", 2.0)  # off: on, it would have no one colour
    shape.block(
        (-w / 2 + edge, y + t / 2 - 0.002, base + edge), (w / 2 - edge, y + t / 2 + 0.002, base + h - edge), screen
    )
    if style == "monitor":
        shape.block((-0.03, y - 0.05, 0.012), (0.03, y - 0.02, base + h * 0.4), frame)
        shape.block((-w * 0.22, -0.11, 0), (w * 0.22, 0.09, 0.014), frame)
    elif style == "stand":
        for sx in (-1, 1):
            x = sx * w * 0.32
            shape.rod((x, y - 0.11, 0.008), (x, y, base + 0.02), 0.011, frame)
            shape.rod((x, y + 0.11, 0.008), (x, y, base + 0.02), 0.011, frame)
    return style


def _sofa(shape: Shape, rng: np.random.Generator, color: str, style: str) -> str:
    style = _pick(rng, style, "two_seat", "three_seat", "armchair")
    seats = {"armchair": 1, "two_seat": 2, "three_seat": 3}[style]
    arm = rng.uniform(0.13, 0.21)
    w = seats * rng.uniform(0.56, 0.68) + 2 * arm
    d, h = rng.uniform(0.82, 0.95), rng.uniform(0.76, 0.90)
    seat, arm_top = rng.uniform(0.40, 0.45), rng.uniform(0.56, 0.66)
    cloth = _cloth(rng, color, 0.08)
    darker = material(np.array(cloth.color) * 0.88, np.array(cloth.second) * 0.88, cloth.texture, cloth.period)
    foot = rng.uniform(0.06, 0.13)
    _legs(shape, w, d, foot, DARK if rng.random() < 0.5 else _coat(rng, "brown"), 0.06, 0.024, False)
    shape.block((-w / 2 + 0.02, -d / 2 + 0.02, foot), (w / 2 - 0.02, d / 2 - 0.03, seat - 0.12), darker)
    roundness = rng.uniform(0.16, 0.34)
    for sx in (-1, 1):
        x = sx * (w / 2 - arm / 2)
        shape.cushion((x - arm / 2, -d / 2 + 0.01, foot), (x + arm / 2, d / 2 - 0.01, arm_top), darker, roundness)
    shape.cushion(
        (-w / 2 + arm * 0.6, -d / 2, foot), (w / 2 - arm * 0.6, -d / 2 + 0.2, h - 0.04), darker, roundness * 0.8
    )
    inner = w - 2 * arm
    for k in range(seats):
        x0 = -inner / 2 + k * inner / seats
        x1 = x0 + inner / seats
        shape.cushion((x0 + 0.004, -d / 2 + 0.16, seat - 0.14), (x1 - 0.004, d / 2, seat + 0.02), cloth, 0.22)
        shape.cushion((x0 + 0.01, -d / 2 + 0.13, seat - 0.02), (x1 - 0.01, -d / 2 + 0.34, h), cloth, 0.35)
    for sx in (-1, 1):
        if rng.random() < 0.45 and seats > 1:
            x = sx * (inner / 2 - 0.2)
            other = _cloth(rng, str(rng.choice([c for c in PALETTE if c != color])), 0.3)
            shape.cushion((x - 0.19, -d / 2 + 0.33, seat + 0.015), (x + 0.19, -d / 2 + 0.46, seat + 0.36), other, 0.55)
    return style


_BUILDERS = {
    "cabinet": _cabinet,
    "refrigerator": _refrigerator,
    "shelf": _shelf,
    "stove": _stove,
    "bed": _bed,
    "sink": _sink,
    "washer": _washer,
    "toilet": _toilet,
    "bathtub": _bathtub,
    "oven": _oven,
    "dishwasher": _dishwasher,
    "fireplace": _fireplace,
    "stool": _stool,
    "chair": _chair,
    "table": _table,
    "tv_monitor": _tv_monitor,
    "sofa": _sofa,
}
