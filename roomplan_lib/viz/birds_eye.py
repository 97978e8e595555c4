"""A scene from above, for print: its surface, boxes with their headings, cameras with their fields of view."""

from __future__ import annotations

from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.patches import Wedge

from roomplan_lib.geometry import OrientedBox, box_corners
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.clouds import Surfels, find_views, scene_surface
from roomplan_lib.viz.interactive import surface_segments
from roomplan_lib.viz.oblique import (
    CUT_HEIGHT,
    TOP,
    draw_boxes,
    draw_connectors,
    draw_segments,
    draw_surfels,
    map_axes,
    place_labels,
    set_limits,
)
from roomplan_lib.viz.style import (
    CAMERA_COLOR,
    FONT_SIZE,
    PREDICTED_COLOR,
    ROOM_COLOR,
    TRUE_COLOR,
    WIDTH,
    PrintFigure,
    halo,
)

SIGHT = 0.6  # metres of a camera's field of view that are drawn
CELL = 0.05  # metres a side, for the density of points
MARGIN = 0.35  # metres around what is shown
MAX_HEIGHT = 6.8  # inches


def birds_eye_figure(
    scene: Scene,
    views: list[View] | None = None,
    true: list[OrientedBox] | None = None,
    predicted: list[OrientedBox] = (),
    *,
    surface: Surfels | None = None,
    show: Literal["color", "density"] = "color",
    cut_height: float = CUT_HEIGHT,
) -> PrintFigure:
    """The scene from above to scale; x to the right and y up are the scene's own axes, metres.

    views: cameras, numbered in their order, and the source of the surface; all for None. true: blue boxes, the scene's
    own for None; predicted: orange boxes, as many are joined to the true ones in their order. A tick leads from a
    box's middle along its first axis: its yaw. surface: in place of that of the scene's depth or mesh. show: "color"
    of the surface below `cut_height` metres above the floor, or "density", points a square metre of floor.
    Raises ValueError for a scene in which nothing has a place.
    """
    if show not in ("color", "density"):
        raise ValueError(f"show: expected color or density, got {show!r}")
    views = find_views(scene) if views is None else list(views)
    posed = [view for view in views if view.posed]
    true = list(scene.boxes if true is None else true)
    source = "points given"
    if surface is None:
        surface, source = scene_surface(scene, views)
    corners = [box_corners(box)[:, :2] for box in [*true, *predicted]]
    corners += [view.camera_to_world[None, :2, 3] for view in posed]
    if scene.surfaces:
        corners.append(surface_segments(scene.surfaces).reshape(-1, 3)[:, :2])
    if surface is not None:
        corners.append(np.percentile(surface.points[:, :2], [0.5, 99.5], axis=0))
    if not corners:
        raise ValueError(f"scene {scene.scene_id}: no box, surface or camera has a place, so there is no map to draw")
    corners = np.concatenate(corners)
    limits = np.stack([corners.min(axis=0) - MARGIN, corners.max(axis=0) + MARGIN])
    size = np.ptp(limits, axis=0)
    inches = min((WIDTH - 1.6) / size[0], MAX_HEIGHT / size[1])  # per metre
    figure = PrintFigure(size[1] * inches + 0.95, few_colors=show == "color")
    ax = figure.add_axes(
        (0.07, 0.42 / figure.get_figheight(), 0.86, size[1] * inches / figure.get_figheight()), anchor="C"
    )
    if surface is not None:
        _draw_surface(ax, surface, show, cut_height)
    set_limits(ax, limits, TOP)
    if scene.surfaces:
        draw_segments(ax, TOP, surface_segments(scene.surfaces), ROOM_COLOR)
    draw_boxes(ax, TOP, true, predicted, labels=False)
    for boxes, color in ((true, TRUE_COLOR), (predicted, PREDICTED_COLOR)):
        ax.add_collection(
            LineCollection(
                [[b.center[:2], b.center[:2] + b.rotation[:2, 0] * b.extent[0] / 2] for b in boxes],
                colors=color, linewidths=1.0, path_effects=halo(1.8), zorder=3,
            ),
            autolim=False,
        )  # fmt: skip
    if len(true) == len(predicted):
        draw_connectors(ax, TOP, list(zip(true, predicted, strict=True)))
    _draw_cameras(ax, posed)
    place_labels(ax, [(*box.center[:2], box.label) for box in true or predicted])
    _draw_scale(ax)
    map_axes(ax)
    figure.suptitle(
        f"Scene {scene.scene_id} from above: {len(true)} true and {len(predicted)} predicted boxes, {len(posed)} "
        f"cameras; {source}",
        fontsize=FONT_SIZE + 1.5, y=1 - 0.08 / figure.get_figheight(), va="top", parse_math=False,
    )  # fmt: skip
    return figure


def _draw_surface(ax: Axes, surface: Surfels, show: str, cut_height: float) -> None:
    if show == "color":
        draw_surfels(ax, surface, TOP, cut_height)
        return
    x, y = surface.points[:, :2].T
    edges = [np.arange(v.min() - CELL, v.max() + 2 * CELL, CELL) for v in (x, y)]
    density = np.histogram2d(x, y, bins=edges)[0].T / CELL**2
    picture = ax.pcolormesh(
        *edges, np.ma.masked_equal(density, 0), cmap="Greys", norm=LogNorm(), rasterized=True, zorder=0
    )
    bar = ax.figure.colorbar(picture, ax=ax, fraction=0.03, pad=0.02)
    bar.set_label("points per m²", fontsize=FONT_SIZE)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1)


def _draw_cameras(ax: Axes, views: list[View]) -> None:
    """A camera's centre, its number, and a wedge as wide as its field of view, its length foreshortened by its tilt."""
    path = np.array([view.camera_to_world[:2, 3] for view in sorted(views, key=lambda v: v.timestamp)]).reshape(-1, 2)
    ax.plot(*path.T, color=CAMERA_COLOR, linewidth=0.7, linestyle=":", zorder=4)
    for number, view in enumerate(views, 1):
        x, y = view.camera_to_world[:2, 3]
        ahead = view.camera_to_world[:2, 2]
        heading, level = np.degrees(np.arctan2(ahead[1], ahead[0])), np.linalg.norm(ahead)
        half = np.degrees(np.arctan(view.width / 2 / view.K[0, 0]))
        ax.add_patch(
            Wedge(
                (x, y), SIGHT * level, heading - half, heading + half, facecolor=CAMERA_COLOR, alpha=0.13,
                edgecolor="none", zorder=4,
            )
        )  # fmt: skip
        ax.annotate(
            "", (x, y) + ahead * SIGHT, (x, y), zorder=5,
            arrowprops={"arrowstyle": "-|>", "color": CAMERA_COLOR, "linewidth": 0.8, "mutation_scale": 7},
        )  # fmt: skip
        ax.text(
            x - ahead[0] * 0.12, y - ahead[1] * 0.12, str(number), fontsize=FONT_SIZE - 1.5, color=CAMERA_COLOR,
            ha="center", va="center", path_effects=halo(), zorder=5, clip_on=True,
        )  # fmt: skip


def _draw_scale(ax: Axes) -> None:
    """A bar of one metre and arrows along the scene's x and y in the lower corners, outside the room's middle."""
    (x0, x1), y0 = ax.get_xlim(), ax.get_ylim()[0]
    x, y = x0 + 0.15, y0 + 0.1
    ax.plot([x, x + 1], [y, y], color="black", linewidth=2.2, solid_capstyle="butt", path_effects=halo(3.5), zorder=6)
    ax.text(x + 0.5, y + 0.04, "1 m", fontsize=FONT_SIZE, ha="center", va="bottom", path_effects=halo(), zorder=6)
    origin = np.array([x1 - 0.55, y0 + 0.12])
    for name, tip in (("x", np.array([0.35, 0])), ("y", np.array([0, 0.35]))):
        ax.annotate("", origin + tip, origin, arrowprops={"arrowstyle": "->", "linewidth": 1.0}, zorder=6)
        ax.text(*(origin + 1.25 * tip), name, fontsize=FONT_SIZE, ha="center", va="center", zorder=6)
