"""A scene as flat-sided meshes: walls and floors with holes where doors, windows and openings are, boxes as cuboids."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from roomplan_lib.geometry import BOX_FACES, CORNER_SIGNS, OrientedBox
from roomplan_lib.scenes import Scene, Surface

# Linear RGB and opacity by group; what one sees through is more than half transparent.
GROUP_COLORS = {
    "Walls": (0.83, 0.82, 0.78, 1.0),
    "Floors": (0.55, 0.46, 0.36, 1.0),
    "Doors": (0.62, 0.42, 0.22, 1.0),
    "Windows": (0.45, 0.70, 0.90, 0.45),
    "Openings": (0.90, 0.90, 0.60, 0.15),
    "Objects": (0.20, 0.45, 0.75, 1.0),
}


@dataclass(frozen=True, eq=False)
class Part:
    """A mesh of the room.

    group: a key of GROUP_COLORS. name: unique in the room. category: what it is. box: where its own frame lies in
    the world (metres, z up). vertices: [V, 3] metres in that frame. quads: [F, 4] of their numbers, the corners
    counter-clockwise seen from outside. Every face has vertices of its own.
    """

    group: str
    name: str
    category: str
    box: OrientedBox
    vertices: np.ndarray
    quads: np.ndarray

    @property
    def box_to_world(self) -> np.ndarray:
        """[4, 4] rigid."""
        transform = np.eye(4)
        transform[:3, :3], transform[:3, 3] = self.box.rotation, self.box.center
        return transform


def room_parts(scene: Scene, notes: list[str] | None = None) -> list[Part]:
    """The meshes of a scene's surfaces and boxes, in its order, named `Wall_0`, `Door_1`, `TvMonitor_0`, ..

    notes: gets a sentence for each surface without a face, such as a wall that its opening takes up, which is left out.
    Raises ValueError for a scene in which nothing has a face.
    """
    notes = [] if notes is None else notes
    if not scene.surfaces and not scene.boxes:
        raise ValueError(f"scene {scene.scene_id}: no surface and no box, so there is nothing to export")
    parts, counts = [], {}
    for group, category, box, (vertices, quads) in [
        *((f"{s.kind.capitalize()}s", s.kind, s.box, _surface_mesh(s, scene)) for s in scene.surfaces),
        *(("Objects", box.label or "object", box, _cuboid(box.extent)) for box in scene.boxes),
    ]:
        base = "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", category))
        base = base if base[:1].isalpha() else f"Object{base}"
        number = counts[base] = counts.get(base, -1) + 1
        if not len(quads):
            notes.append(
                f"{base}_{number} {box.object_id} left out: it has no face, as it has no length or no height, "
                "or what lies in it takes up all of it"
            )
            continue
        parts.append(Part(group, f"{base}_{number}", category, box, vertices, quads))
    if not parts:
        raise ValueError(f"scene {scene.scene_id}: nothing to export: {'; '.join(notes)}")
    return parts


def _surface_mesh(surface: Surface, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """A surface less its holes: one face where it has no thickness, else two and the rims around them."""
    box, level = surface.box, surface.kind == "floor"
    across, up, through = (0, 1, 2) if level else (0, 2, 1)
    if surface.polygon is None:
        outline = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * box.extent[[across, up]] / 2
    else:
        outline = ((surface.polygon - box.center) @ box.rotation)[:, [across, up]]
    holes = []
    for other in scene.surfaces:
        if surface.kind == "wall" and other.parent_id and other.parent_id == box.object_id:
            corners = CORNER_SIGNS[[0, 1, 5, 4]] * other.box.extent / 2 @ other.box.rotation.T + other.box.center
            corners = ((corners - box.center) @ box.rotation)[:, [across, up]]
            holes.append(np.clip(corners, outline.min(axis=0), outline.max(axis=0)))
    face = trapezoids(outline, holes)
    half, quads = box.extent[through] / 2, []
    for depth in (-half, half) if half else (0.0,):
        sheet = np.full((len(face), 4, 3), depth)
        sheet[..., [across, up]] = face
        quads.append(sheet[:, ::-1] if depth > 0 else sheet)
    for ring in [outline, *holes] if half else []:
        rim = np.empty((len(ring), 4, 3))
        rim[:, [0, 1], through], rim[:, [2, 3], through] = -half, half
        rim[..., [across, up]] = np.stack([ring, np.roll(ring, -1, axis=0)] * 2, axis=1)[:, [0, 1, 3, 2]]
        quads.append(rim)
    vertices = np.concatenate(quads).reshape(-1, 3)
    return vertices, np.arange(len(vertices)).reshape(-1, 4)


def _cuboid(extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vertices = (CORNER_SIGNS * extent / 2)[BOX_FACES].reshape(-1, 3)
    return vertices, np.arange(24).reshape(-1, 4)


def trapezoids(outline: np.ndarray, holes: list[np.ndarray] = ()) -> np.ndarray:
    """[N, 4, 2] convex quads, counter-clockwise, that fill a simple polygon [C, 2] less its holes (even-odd within).

    Vertical strips between neighbouring corners hold no corner inside, so that the edges which cross a strip bound
    trapezoids in it. Holes are clipped to the polygon and may overlap.
    """
    edges = [np.stack([ring, np.roll(ring, -1, axis=0)], axis=1) for ring in (outline, *holes)]
    crossings = _crossings(np.concatenate(edges))
    xs = np.unique(np.concatenate([np.concatenate(edges)[:, :, 0].ravel(), crossings]).round(9))
    quads = []
    for left, right in zip(xs[:-1], xs[1:], strict=True):
        spans = [_spans(ring, left, right) for ring in edges]
        for low, high in _subtract(spans[0], [span for ring in spans[1:] for span in ring]):
            quads.append([[left, low[0]], [right, low[1]], [right, high[1]], [left, high[0]]])
    return np.array(quads).reshape(-1, 4, 2)


def _crossings(edges: np.ndarray) -> np.ndarray:
    """x of the points where two of the edges [E, 2, 2] cross."""
    p, d = edges[:, 0], edges[:, 1] - edges[:, 0]
    denominator = d[:, None, 0] * d[None, :, 1] - d[:, None, 1] * d[None, :, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = p[None] - p[:, None]
        t = (offset[..., 0] * d[None, :, 1] - offset[..., 1] * d[None, :, 0]) / denominator
        u = (offset[..., 0] * d[:, None, 1] - offset[..., 1] * d[:, None, 0]) / denominator
    i, j = np.nonzero((t > 0) & (t < 1) & (u > 0) & (u < 1))
    return p[i, 0] + t[i, j] * d[i, 0]


def _spans(edges: np.ndarray, left: float, right: float) -> list[tuple[np.ndarray, np.ndarray]]:
    """The parts of a ring in a strip, upwards: pairs of (y at left, y at right) of their lower and upper edge."""
    lines = []
    for (x0, y0), (x1, y1) in edges:
        if min(x0, x1) < (left + right) / 2 < max(x0, x1):
            lines.append(np.interp([left, right], sorted([x0, x1]), [y0, y1] if x0 < x1 else [y1, y0]))
    lines.sort(key=lambda line: line.sum())
    return list(zip(lines[::2], lines[1::2], strict=False))


def _subtract(spans: list, holes: list) -> list:
    """Spans of a strip less the holes'; no two edges cross in a strip, so that their middles order them."""
    for low_hole, high_hole in holes:
        kept = []
        for low, high in spans:
            below, above = (low, min(high, low_hole, key=np.sum)), (max(low, high_hole, key=np.sum), high)
            kept += [span for span in (below, above) if np.sum(span[1]) > np.sum(span[0]) + 1e-12]
        spans = kept
    return spans
