"""Predicted beside true anchors: rooms from outside, the views that show them, a map and the numbers."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpecFromSubplotSpec
from matplotlib.lines import Line2D

from roomplan_lib.actions import parse_action
from roomplan_lib.geometry import OrientedBox, box_corners, box_iou_3d, resize_intrinsics
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, pixels_in_boxes
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.answers import Answer, Answers, Room, Scenes, nearest_pairs, placed_boxes
from roomplan_lib.viz.boxes import HIDDEN_MARGIN, draw_boxes_on_view
from roomplan_lib.viz.clouds import backdrop, find_views, scene_surface
from roomplan_lib.viz.oblique import (
    TOP,
    best_direction,
    draw_boxes,
    draw_cameras,
    draw_connectors,
    draw_surfels,
    map_axes,
    place_labels,
    scale_bar,
    set_limits,
)
from roomplan_lib.viz.style import CAMERA_COLOR, DASHES, FONT_SIZE, PREDICTED_COLOR, TRUE_COLOR, PrintFigure

ENOUGH_PIXELS = 8 * MIN_VISIBLE_PIXELS
COMPARED_HEIGHT = 2.3
GRID_COLUMNS = 64  # rays across a picture
ROW_HEIGHT = 3.45  # inches of a room's row


@dataclass(frozen=True, eq=False)
class AnchorPair:
    """One prediction in the scene's frame. predicted: None when the model's text was invalid. number: from 1, of the
    true box among the scene's; two instructions that mean one object share it."""

    number: int
    true: OrientedBox
    predicted: OrientedBox | None

    @property
    def center_error_m(self) -> float | None:
        if self.predicted is None:
            return None
        return float(np.linalg.norm(self.predicted.center - self.true.center))

    @property
    def iou_3d(self) -> float:
        """0 for an invalid prediction."""
        return 0.0 if self.predicted is None else box_iou_3d(self.true, self.predicted)


def anchor_pairs(scene: Scene, rows: list[dict]) -> list[AnchorPair]:
    """The anchors of this scene's rows (others are passed over), in their order, as boxes in the scene's frame.

    Where a row has several, each true one is paired with a prediction so that the distances add up to the least;
    predictions beyond their number are in no pair. Raises ValueError when there is no true anchor.
    """
    pairs: list[AnchorPair] = []
    for row in rows:
        if row["scene_id"] != scene.scene_id or "reference_action" not in row:
            continue
        trues, predicted = action_boxes(row["reference_action"]), action_boxes(row["action"])
        matches = nearest_pairs(trues, predicted)
        for k, true in enumerate(trues):
            same = [p.number for p in pairs if p.true.label == true.label and np.allclose(p.true.center, true.center)]
            number = same[0] if same else 1 + max((p.number for p in pairs), default=0)
            pairs.append(AnchorPair(number, true, predicted[matches[k]] if k in matches else None))
    if not pairs:
        raise ValueError(f"scene {scene.scene_id}: none of the {len(rows)} predictions is an anchor in it")
    return pairs


def action_boxes(action: dict | list | None) -> list[OrientedBox]:
    """The upright boxes of an action, or list of actions, as prediction files hold it; none for what places nothing."""
    return placed_boxes(parse_action(json.dumps(action), categories=None)) if action else []


def best_views(scene: Scene, views: list[View], boxes: list[OrientedBox], num_views: int) -> list[View]:
    """The views that together show most of the boxes by depth; each further one adds what is still small."""
    all_pixels = pixels_in_boxes(replace(scene, boxes=boxes), views)
    pixels = np.minimum(all_pixels, ENOUGH_PIXELS)  # many boxes shown well rather than one that fills the picture
    chosen: list[int] = []
    best = np.zeros(len(boxes))
    for _ in range(min(num_views, len(views))):
        gains = np.maximum(pixels, best).sum(axis=1) + 1e-3 * all_pixels.sum(axis=1)
        gains[chosen] = -1
        chosen.append(int(np.argmax(gains)))
        best = np.maximum(best, pixels[chosen[-1]])
    return [views[i] for i in chosen]


def shown_share(view: View, box: OrientedBox) -> float:
    """Share of the view's picture in which the box is seen from outside, 0 for a view without a pose.

    Rays through a grid of pixels meet the box or do not, so what is behind the camera or beyond the rim never counts;
    where the view has depth, neither does a ray that ends on a surface more than HIDDEN_MARGIN before the box.
    """
    if not view.posed:
        return 0.0
    columns = min(GRID_COLUMNS, view.width)
    rows = max(1, round(columns * view.height / view.width))
    K = resize_intrinsics(view.K, (view.width, view.height), (columns, rows))
    v, u = np.mgrid[:rows, :columns]
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], axis=-1)  # camera z = 1
    directions = rays @ view.camera_to_world[:3, :3].T @ box.rotation
    directions = np.where(np.abs(directions) < 1e-12, 1e-12, directions)
    origin = (view.camera_to_world[:3, 3] - box.center) @ box.rotation
    slabs = np.stack([(sign * box.extent / 2 - origin) / directions for sign in (-1, 1)])
    enter, leave = slabs.min(axis=0).max(axis=-1), slabs.max(axis=0).min(axis=-1)  # metres along the camera's z
    seen = (enter <= leave) & (enter > 0)
    if view.depth_path is not None and seen.any():
        depth = view.load_depth()
        pixels = [
            ((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip((rows, columns), depth.shape, strict=True)
        ]
        surface = depth[np.ix_(*pixels)]
        seen &= (surface == 0) | (surface > enter - HIDDEN_MARGIN)
    return float(seen.mean())


def anchors_figure(scene: Scene, rows: list[dict], *, max_anchors: int = 12) -> PrintFigure:
    """True and predicted anchors of one room: from outside, in the two views that show most, from above, as numbers.

    rows: as in predictions.jsonl. max_anchors: the first so many rows of the room are shown (and counted in the title).
    Raises ValueError when no row is an anchor in the room, or a row names a view that the scene lacks.
    """
    return _figure([scene], rows, max_anchors)


def save_anchors_figure(
    scenes: list[Scene], rows: list[dict], path: str | Path, *, max_anchors: int = 12
) -> PrintFigure:
    """`anchors_figure` of several rooms, one row each, written to `path` (PNG, PDF or SVG) and returned."""
    figure = _figure(list(scenes), rows, max_anchors)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return figure


def compared_figure(answers: Answers, scenes: Scenes, places: Sequence[int], *, run: int = 0) -> PrintFigure:
    """Samples of a predictions file, a row each: the two views that show most, the room from above, the numbers.

    answers, scenes: see `viz.answers`; places: of the samples in it, such as those of the worst, the middle and the
    best. Without a scene the map shows the boxes alone. Raises ValueError for no places.
    """
    if not len(places):
        raise ValueError("compared_figure: no sample to show")
    height = COMPARED_HEIGHT * len(places) + 0.3
    figure = PrintFigure(height)
    figure.suptitle(
        f"{len(places)} of {len(answers)} samples of {answers.names[run]}: true blue, predicted orange",
        fontsize=FONT_SIZE + 2, y=1 - 0.05 / height, va="top", parse_math=False,
    )  # fmt: skip
    grid = figure.add_gridspec(
        len(places), 4, width_ratios=(2.6, 2.6, 2.2, 2.0), left=0.01, right=0.99, top=1 - 0.62 / height,
        bottom=0.32 / height, hspace=0.42, wspace=0.16,
    )  # fmt: skip
    for row, place in enumerate(places):
        answer = answers.answers[place][run]
        if answer is not None:
            cells = [figure.add_subplot(grid[row, column]) for column in range(4)]
            _draw_compared(cells, answers, answer, Room(answer, scenes), place, run)
    return figure


def _draw_compared(axes: list[Axes], answers: Answers, answer: Answer, room: Room, place: int, run: int) -> None:
    pictures, above, table = axes[:2], axes[2], axes[3]
    true, predicted = answer.true_boxes, answer.predicted_boxes
    for ax in (*pictures, table):
        ax.set_axis_off()
    target = (true or predicted or [None])[0]
    shares = [0.0 if target is None else shown_share(view, target) for view in room.views]
    for ax, k in zip(pictures, np.argsort(-np.array(shares), kind="stable"), strict=False):
        view = room.views[k]
        if view.posed:
            draw_boxes_on_view(ax, view, true, predicted, title=f"view {k + 1} of {len(room.views)}")
    if true or predicted:
        surface = scene_surface(room.scene, room.views)[0] if room.views else None
        flat = np.concatenate([TOP.flat(box_corners(box)) for box in (*true, *predicted)])
        corners = np.stack([flat.min(axis=0), flat.max(axis=0)])
        corners = corners if surface is None else draw_surfels(above, surface, TOP)
        set_limits(above, corners, TOP, predicted)
        draw_boxes(above, TOP, true, predicted, labels=False)
        draw_connectors(above, TOP, [(true[t], predicted[p]) for t, p in answer.pairs if None not in (t, p)])
        map_axes(above)
        above.set_title("from above", fontsize=FONT_SIZE, pad=3)
    else:
        above.set_axis_off()
    outcome = answers.outcomes[place, run]
    failure = answers.failure(place, run)
    lines = textwrap.wrap(str(answer.row["question"]), 30)[:4]
    lines += ["", f"scene {answer.row['scene_id']}", outcome if failure in ("", outcome) else f"{outcome}: {failure}"]
    lines += answers.told_errors(place, run)
    if answer.true is None:
        lines += textwrap.wrap(f"true: {answer.row['reference']}", 30)[:3]
        lines += textwrap.wrap(f"predicted: {answer.row['prediction']}", 30)[:3]
    lines += textwrap.wrap(room.problem or answer.reason, 30)[:4]
    table.text(
        0, 1, "\n".join(lines), fontsize=FONT_SIZE - 0.3, va="top", linespacing=1.3, transform=table.transAxes,
        parse_math=False,
    )  # fmt: skip


def _figure(scenes: list[Scene], rows: list[dict], max_anchors: int) -> PrintFigure:
    if not scenes:
        raise ValueError("anchors_figure: no scene to show")
    height = ROW_HEIGHT * len(scenes) + 0.85
    figure = PrintFigure(height)
    grid = figure.add_gridspec(
        len(scenes), 1, left=0.01, right=0.985, top=1 - 0.42 / height, bottom=0.36 / height, hspace=0.13
    )
    shown: list[AnchorPair] = []
    for cell, scene in zip(grid, scenes, strict=True):
        pairs = anchor_pairs(scene, rows)
        view_ids = {v: None for row in rows if row["scene_id"] == scene.scene_id for v in row["view_ids"] or []}
        shown += pairs[:max_anchors]
        _draw_room(figure, cell, scene, pairs, max_anchors, find_views(scene, list(view_ids) or None))
    errors = [p.center_error_m for p in shown if p.predicted is not None]
    invalid = len(shown) - len(errors)
    error = f"median centre error {np.median(errors):.2f} m, " if errors else ""
    rooms = f"{len(scenes)} room{'s' if len(scenes) > 1 else ''}"
    figure.suptitle(
        f"{len(shown)} anchors in {rooms}: {error}mean IoU {np.mean([p.iou_3d for p in shown]):.2f}, {invalid} invalid",
        fontsize=FONT_SIZE + 2.5, y=1 - 0.06 / height, va="top",
    )  # fmt: skip
    figure.legend(
        handles=[
            Line2D([], [], color=TRUE_COLOR, lw=2, marker="o", ms=4, label="true box and centre"),
            Line2D([], [], color=PREDICTED_COLOR, lw=2, ls=DASHES, marker="s", ms=4, label="predicted box and centre"),
            Line2D([], [], color="black", lw=1.2, label="centre error"),
            Line2D([], [], color=CAMERA_COLOR, lw=0, marker="$\u25b7$", ms=7, label="camera of a view"),
        ],
        loc="lower center", ncols=4, fontsize=FONT_SIZE + 0.5, frameon=False, bbox_to_anchor=(0.5, 0.0),
        borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _draw_room(figure, cell, scene: Scene, pairs: list[AnchorPair], max_anchors: int, views: list[View]) -> None:
    shown = pairs[:max_anchors]
    numbered = {p.number: replace(p.true, label=str(p.number)) for p in shown}
    true = list(numbered.values())
    predicted = [replace(p.predicted, label="") for p in shown if p.predicted is not None]
    joined = [(p.true, p.predicted) for p in shown if p.predicted is not None]
    surfels = backdrop(scene, views)

    columns = GridSpecFromSubplotSpec(1, 4, cell, width_ratios=(4.15, 2.35, 0.35, 2.2), wspace=0.04)
    ax = figure.add_subplot(columns[0])
    direction = best_direction(surfels, true)
    set_limits(ax, draw_surfels(ax, surfels, direction), direction, predicted)
    draw_boxes(ax, direction, true, predicted, labels=False)
    draw_connectors(ax, direction, joined)
    draw_cameras(ax, direction, views)
    tops = [direction.flat(box.center + [0, 0, box.extent[2] / 2]) for box in true]
    place_labels(ax, [(*top, box.label) for top, box in zip(tops, true, strict=True)])
    count = f"{len(shown)}" if len(shown) == len(pairs) else f"first {len(shown)} of {len(pairs)}"
    ax.set_title(f"Room {scene.scene_id}: {count} anchors, {len(views)} views", fontsize=FONT_SIZE + 1, pad=3)
    scale_bar(ax)

    stack = GridSpecFromSubplotSpec(2, 1, columns[1], hspace=0.14)
    for place, view in zip(stack, best_views(scene, views, true, 2), strict=False):
        draw_boxes_on_view(
            figure.add_subplot(place), view, true, predicted, title=f"view {1 + views.index(view)} of {len(views)}"
        )

    lines = [f"{p.number:>2} {p.true.label:<13.13}{_numbers(p)}" for p in shown]
    table_share = min(0.55, 0.075 + 0.0445 * (len(lines) + 1))
    stack = GridSpecFromSubplotSpec(2, 1, columns[3], height_ratios=(1 - table_share, table_share), hspace=0.22)
    ax = figure.add_subplot(stack[0])
    set_limits(ax, draw_surfels(ax, surfels, TOP), TOP, predicted)
    draw_boxes(ax, TOP, true, predicted, labels=False)
    draw_connectors(ax, TOP, joined)
    draw_cameras(ax, TOP, views)
    map_axes(ax)
    ax.set_title("from above", fontsize=FONT_SIZE, pad=3)
    ax = figure.add_subplot(stack[1])
    ax.set_axis_off()
    header = f"{'':3}{'anchor':<12} error (m)   IoU"
    ax.text(
        0.04, 1.0, "\n".join([header, *lines]), fontsize=FONT_SIZE - 0.8, family="monospace", va="top",
        linespacing=1.25, transform=ax.transAxes,
    )  # fmt: skip


def _numbers(pair: AnchorPair) -> str:
    return "    invalid" if pair.predicted is None else f"{pair.center_error_m:>9.2f} {pair.iou_3d:>6.2f}"
