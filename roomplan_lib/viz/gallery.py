"""Small multiples of single answers: the view that shows the object best with both boxes, the words and the numbers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.lines import Line2D

from roomplan_lib.evaluation.errors import CLASSES, ErrorTable, examples
from roomplan_lib.geometry import OrientedBox, box_corners
from roomplan_lib.samples.visibility import pixels_in_boxes
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.anchors import action_boxes
from roomplan_lib.viz.boxes import draw_boxes_on_view
from roomplan_lib.viz.errors import one_line
from roomplan_lib.viz.records import nothing_figure
from roomplan_lib.viz.style import CAMERA_COLOR, DASHES, FONT_SIZE, PREDICTED_COLOR, TRUE_COLOR, WIDTH, PrintFigure

COLUMNS = 3
LINE_WIDTH = 46  # characters of a line under a picture
LINE_HEIGHT = 0.145  # inches
PICTURE, MAP = (1.9, 1.425), 0.92  # inches: width and height of a picture, width of the map beside it
MAX_CARDS = 36
OTHER_COLOR = "#BBBBBB"


def gallery_figure(table: ErrorTable, scenes: Mapping[str, Scene] | None = None, *, title: str = "") -> PrintFigure:
    """A card per row, in the table's order: its best view with the true (blue) and predicted (orange) box, the class of
    failure, what was asked, what was said and the numbers.

    Without its scene a row has its texts alone. The first MAX_CARDS are shown, and counted in the title.
    """
    if not len(table):
        return nothing_figure("no row is of this kind")
    shown = table.select(np.arange(min(len(table), MAX_CARDS)))
    found = [_best_view(row, (scenes or {}).get(row["scene_id"])) for row in shown.rows]
    texts = [_lines(shown, number, found[number]) for number in range(len(shown))]
    picture = PICTURE[1] if any(found) else 0.0
    card = picture + LINE_HEIGHT * max(map(len, texts)) + 0.2
    height = -(-len(shown) // COLUMNS) * card + 0.42
    figure = PrintFigure(height, few_colors=True)
    for number, (card_view, text) in enumerate(zip(found, texts, strict=True)):
        left = WIDTH / COLUMNS * (number % COLUMNS) + 0.06
        top = height - 0.36 - (number // COLUMNS) * card
        if card_view:
            place = (left / WIDTH, (top - picture) / height, PICTURE[0] / WIDTH, picture / height)
            ax = figure.add_axes(place)
            draw_boxes_on_view(ax, card_view.view, card_view.true, card_view.predicted, labels=False)
            ax.set_anchor("NW")
            if card_view.true or card_view.predicted:
                place = ((left + PICTURE[0] + 0.04) / WIDTH, place[1], MAP / WIDTH, place[3])
                _draw_map(figure.add_axes(place), card_view)
        figure.text(
            left / WIDTH, (top - picture - 0.05) / height, "\n".join(text), fontsize=FONT_SIZE - 0.7, va="top",
            linespacing=1.3, parse_math=False,
        )  # fmt: skip
    count = f"{len(shown)} of {len(table)}" if len(shown) < len(table) else f"{len(shown)}"
    figure.text(
        0.06 / WIDTH, 1 - 0.1 / height, f"{title or 'Answers'}: {count}", fontsize=FONT_SIZE + 2, va="top",
        parse_math=False,
    )  # fmt: skip
    if any(view and (view.true or view.predicted) for view in found):
        handles = [
            Line2D([], [], color=TRUE_COLOR, lw=2, label="true"),
            Line2D([], [], color=PREDICTED_COLOR, lw=2, ls=DASHES, label="predicted"),
            Line2D([], [], color=OTHER_COLOR, lw=1.5, label="other objects (from above)"),
            Line2D([], [], color=CAMERA_COLOR, lw=0, marker="o", ms=3, label="camera of this view"),
        ]
        figure.legend(handles=handles, loc="upper right", ncols=4, fontsize=FONT_SIZE, frameon=False)
    return figure


def _draw_map(ax, shown: BestView) -> None:
    """The room from above, x to the right and y up, with a bar of a metre."""
    groups = (
        (shown.scene.boxes, OTHER_COLOR, 0.8, "-"),
        (shown.true, TRUE_COLOR, 1.6, "-"),
        (shown.predicted, PREDICTED_COLOR, 1.6, DASHES),
    )
    for boxes, color, width, dashes in groups:
        for box in boxes:
            ring = box_corners(box)[[1, 3, 7, 5, 1], :2]
            ax.plot(*ring.T, color=color, lw=width, ls=dashes, solid_capstyle="butt")
    for true, predicted in zip(shown.true, shown.predicted, strict=False):
        if len(shown.true) == len(shown.predicted) == 1:
            ax.plot(*np.stack([true.center, predicted.center])[:, :2].T, color="black", lw=0.7)
    camera = shown.view.camera_to_world
    ahead = camera[:2, 3] + 0.6 * camera[:2, 2]
    ax.plot(*np.stack([camera[:2, 3], ahead]).T, color=CAMERA_COLOR, lw=0.8)
    ax.plot(*camera[:2, 3], "o", color=CAMERA_COLOR, ms=2.5)
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.06)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("#CCCCCC")
    ax.autoscale_view()
    (x, _), (y, _) = ax.get_xlim(), ax.get_ylim()
    ax.plot([x + 0.15, x + 1.15], [y + 0.15] * 2, color="black", lw=1.5, scalex=False, scaley=False)
    ax.text(x + 0.65, y + 0.25, "1 m", fontsize=FONT_SIZE - 2, ha="center")


def examples_figure(
    table: ErrorTable, scenes: Mapping[str, Scene] | None = None, *, section: str = "anchors", per_class: int = 2
) -> PrintFigure:
    """`gallery_figure` of the first rows of each class of failure of a section, of different scenes."""
    part = table.section(section)
    rows = [row for name in CLASSES[section] for row in examples(part, name, per_class).rows]
    index = {id(row): place for place, row in enumerate(part.rows)}
    chosen = part.select(np.array([index[id(row)] for row in rows], dtype=int))
    return gallery_figure(chosen, scenes, title=f"Up to {per_class} of each class of failure")


@dataclass(frozen=True, eq=False)
class BestView:
    """What a card draws: boxes in the frame of the scene; number: the view's place among those of the row, from 1."""

    scene: Scene
    view: View
    number: int
    true: list[OrientedBox]
    predicted: list[OrientedBox]


def _best_view(row: dict, scene: Scene | None) -> BestView | None:
    """The row's view that shows most of the true boxes (by depth), the first one where nothing tells; None without."""
    if scene is None:
        return None
    by_id = {view.view_id: view for view in scene.views}
    views = [by_id[name] for name in row.get("view_ids") or () if name in by_id] or scene.views
    views = [view for view in views if view.posed]
    if not views:
        return None
    true, predicted = (action_boxes(row.get(key)) for key in ("reference_action", "action"))
    place = 0
    if (true or predicted) and all(view.depth_path is not None for view in views):
        place = int(pixels_in_boxes(replace(scene, boxes=true or predicted), views).sum(axis=1).argmax())
    return BestView(scene, views[place], place + 1, true, predicted)


def _lines(table: ErrorTable, place: int, shown: BestView | None) -> list[str]:
    """Class, scene and view, numbers, question and answers of a card."""
    row, failure = table.rows[place], table["failure"][place]
    view = f", view {shown.number}" if shown else ""
    numbers = [
        f"{name} {table[key][place]:{form}}"
        for key, name, form in (
            ("iou_3d", "IoU", ".2f"),
            ("center_error_m", "centre error (m)", ".2f"),
            ("yaw_error_deg", "yaw error (°)", ".0f"),
            ("size_ratio", "size ×", ".2f"),
            ("num_missing", "missing", ".0f"),
            ("num_extra", "extra", ".0f"),
        )
        if np.isfinite(table[key][place])
    ]
    lines = [f"{failure}: scene {one_line(row['scene_id'])[:30]}{view}"]
    lines += [", ".join(part) for part in (numbers[:2], numbers[2:]) if part]
    lines += textwrap.wrap(one_line(str(row["question"]))[:400], LINE_WIDTH)[:2]
    in_words = table["section"][place] in ("questions", "captions", "hidden")
    if in_words or failure == "invalid text":
        lines.append(_short(f"said: {one_line(row['prediction'])}"))
    if in_words:
        lines.append(_short(f"true: {one_line(row['reference'])}"))
    return lines


def _short(text: str) -> str:
    return textwrap.shorten(text, LINE_WIDTH, placeholder=" …") if " " in text[6:LINE_WIDTH] else text[:LINE_WIDTH]
