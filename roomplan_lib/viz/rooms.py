"""What a room looks like: its pictures, from outside, from above."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from roomplan_lib.scenes import Scene, View, load_rgb
from roomplan_lib.viz.boxes import draw_boxes_on_view
from roomplan_lib.viz.clouds import backdrop
from roomplan_lib.viz.oblique import (
    TOP,
    best_direction,
    draw_boxes,
    draw_cameras,
    draw_surfels,
    map_axes,
    place_labels,
    scale_bar,
    set_limits,
)
from roomplan_lib.viz.style import FONT_SIZE, WIDTH, PrintFigure

COLUMNS = 4
GAP = 0.48  # inches between the map and the pictures


def room_figure(scene: Scene, views: list[View] | None = None, *, max_views: int = 8) -> PrintFigure:
    """A room from outside and from above with its boxes and the cameras' path, and the views' pictures.

    views: the selected ones, all of the scene's for None. The room itself is drawn from them and from others of the
    scene's, so that it has few holes. At most `max_views` pictures are shown, evenly chosen.
    Raises ValueError for no views or one without depth.
    """
    views = list(scene.views) if views is None else list(views)
    if not views:
        raise ValueError(f"scene {scene.scene_id}: no view to show")
    pictured = [views[i] for i in sorted(set(np.linspace(0, len(views) - 1, min(max_views, len(views))).astype(int)))]
    num_rows = -(-len(pictured) // COLUMNS)
    picture_height = WIDTH / COLUMNS * pictured[0].height / pictured[0].width + 0.16
    height = 0.5 + 3.7 + GAP + num_rows * picture_height
    figure = PrintFigure(height)
    figure.suptitle(
        f"Scene {scene.scene_id}: {len(scene.boxes)} boxes, {len(views)} of {len(scene.views)} views",
        fontsize=FONT_SIZE + 2.5, y=1 - 0.06 / height, va="top",
    )  # fmt: skip
    grid = figure.add_gridspec(
        3, 1, height_ratios=(3.7, GAP, num_rows * picture_height), left=0.01, right=0.99, top=1 - 0.5 / height,
        bottom=0.01, hspace=0,
    )  # fmt: skip
    surfels = backdrop(scene, views)
    top = grid[0].subgridspec(1, 2, width_ratios=(1.25, 1), wspace=0.12)
    for place, direction in zip(top, (best_direction(surfels, scene.boxes), TOP), strict=True):
        ax = figure.add_subplot(place)
        set_limits(ax, draw_surfels(ax, surfels, direction), direction)
        draw_boxes(ax, direction, scene.boxes, labels=False)
        draw_cameras(ax, direction, views, path=True)
        heights = [box.center + [0, 0, box.extent[2] / 2] for box in scene.boxes]
        place_labels(ax, [(*direction.flat(p), b.label) for p, b in zip(heights, scene.boxes, strict=True)])
        if direction is TOP:
            map_axes(ax)
        else:
            scale_bar(ax)
        ax.set_title("from above" if direction is TOP else "from outside", fontsize=FONT_SIZE + 1, pad=3)
    pictures = grid[2].subgridspec(num_rows, COLUMNS, wspace=0.03, hspace=0.13)
    for place, view in zip(pictures, pictured, strict=False):
        number = views.index(view) + 1
        title = f"view {number}" + (" (reference)" if number == 1 else "")
        draw_boxes_on_view(figure.add_subplot(place), view, scene.boxes, title=title)
    return figure


def views_figure(pictures: list[View | Path | str], *, columns: int = COLUMNS) -> PrintFigure:
    """The pictures in their order, first the reference view; views or files. Raises ValueError when there is none."""
    if not pictures:
        raise ValueError("views_figure: no picture to show")
    images = [p.load_rgb() if isinstance(p, View) else load_rgb(Path(p)) for p in pictures]
    columns = min(columns, len(images))
    num_rows = -(-len(images) // columns)
    columns = -(-len(images) // num_rows)  # rows of equal length
    cell = WIDTH / COLUMNS
    tallest = max(image.shape[0] / image.shape[1] for image in images)
    row_height = cell * min(tallest, 1.4) + 0.18
    figure = PrintFigure(num_rows * row_height, columns * cell)
    axes = figure.subplots(num_rows, columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.1})
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.2 / (num_rows * row_height))
    for ax in axes.flat:
        ax.set_axis_off()
    for number, (ax, image) in enumerate(zip(axes.flat, images, strict=False), 1):
        ax.imshow(image)
        height, width = image.shape[:2]
        title = f"view {number} of {len(images)}{' (reference)' if number == 1 else ''}, {width} x {height} px"
        ax.set_title(title, fontsize=FONT_SIZE - 0.5, pad=3)
    return figure
