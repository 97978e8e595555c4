"""What a room looks like: its pictures, from outside, from above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from roomplan_lib.geometry import OrientedBox
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
from roomplan_lib.viz.tables import markdown_table

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
    figure = PrintFigure(height, few_colors=True)
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


def views_figure(
    pictures: Sequence[View | Path | str],
    true: Sequence[OrientedBox] = (),
    predicted: Sequence[OrientedBox] = (),
    *,
    columns: int = COLUMNS,
) -> PrintFigure:
    """The pictures in their order, first the reference view; views or files. Over views with a pose the boxes are
    drawn, true ones blue and predicted ones orange. Raises ValueError when there is none."""
    if not pictures:
        raise ValueError("views_figure: no picture to show")
    columns = min(columns, len(pictures))
    num_rows = -(-len(pictures) // columns)
    columns = -(-len(pictures) // num_rows)  # rows of equal length
    cell = WIDTH / COLUMNS
    images = [p if isinstance(p, View) else load_rgb(Path(p)) for p in pictures]
    sizes = [(i.width, i.height) if isinstance(i, View) else i.shape[1::-1] for i in images]
    row_height = cell * min(max(height / width for width, height in sizes), 1.4) + 0.18
    figure = PrintFigure(num_rows * row_height, columns * cell, few_colors=True)
    axes = figure.subplots(num_rows, columns, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.1})
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.01, top=1 - 0.2 / (num_rows * row_height))
    for ax in axes.flat:
        ax.set_axis_off()
    for number, (ax, image, size) in enumerate(zip(axes.flat, images, sizes, strict=False), 1):
        if isinstance(image, View) and image.posed:
            draw_boxes_on_view(ax, image, list(true), list(predicted))
        else:
            ax.imshow(image.load_rgb() if isinstance(image, View) else image)
        title = f"view {number} of {len(images)}{' (reference)' if number == 1 else ''}, {size[0]} x {size[1]} px"
        ax.set_title(title, fontsize=FONT_SIZE - 0.5, pad=3)
    return figure


def scene_table(scene: Scene) -> str:
    """Markdown: what a scene holds, and what that lets one see."""
    posed = [view for view in scene.views if view.posed]
    deep = [view for view in posed if view.depth_path is not None]
    sizes = sorted({(view.width, view.height) for view in scene.views})
    kinds = Counter(surface.kind for surface in scene.surfaces)
    labels = Counter(box.label or "without a name" for box in scene.boxes)

    def counted(counts: Counter) -> str:
        return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "none"

    rows = [
        ["scene", f"{scene.scene_id}, read as {scene.source}{', ' + scene.split if scene.split else ''}"],
        ["views", f"{len(scene.views)}" + (f" of {', '.join(f'{w} x {h}' for w, h in sizes)} px" if sizes else "")],
        ["... with pose; and depth", f"{len(posed)}; {len(deep)}"],
        ["boxes", counted(labels)],
        ["walls, doors, windows, floors", counted(kinds)],
        ["mesh", scene.mesh_path.name if scene.mesh_path else "none"],
    ]
    absent = [
        what
        for there, what in (
            (scene.views, "pictures"),
            (posed, "cameras and boxes on pictures (no view has a pose)"),
            (deep or scene.mesh_path, "a surface (neither depth nor mesh)"),
            (deep, "fused depth"),
            (scene.boxes, "true boxes"),
        )
        if not there
    ]
    rows.append(["cannot be shown", "; ".join(absent) or "-"])
    return markdown_table(["", ""], rows)
