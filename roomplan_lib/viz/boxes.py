"""Oriented boxes drawn over a view's picture."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners, project_segments
from roomplan_lib.scenes import View
from roomplan_lib.viz.oblique import place_labels
from roomplan_lib.viz.style import FONT_SIZE, PREDICTED_COLOR, TRUE_COLOR

PIECES = 24  # of an edge, each with a thickness of its own
GAP = 4  # a predicted edge is dashed: every fourth piece is left out
HIDDEN_MARGIN = 0.12  # metres behind the seen surface at which a piece counts as hidden


def edge_pieces(box: OrientedBox, pieces: int = 1) -> np.ndarray:
    """[12 * pieces, 2, 3] world segments, metres, of a box's edges cut into equal pieces."""
    ends = box_corners(box)[BOX_EDGES]
    share = np.linspace(0, 1, pieces + 1)
    points = ends[:, None, 0] + share[None, :, None] * (ends[:, 1] - ends[:, 0])[:, None]
    return np.stack([points[:, :-1], points[:, 1:]], axis=2).reshape(-1, 2, 3)


def draw_boxes_on_view(
    ax: Axes,
    view: View,
    true: list[OrientedBox] = (),
    predicted: list[OrientedBox] = (),
    *,
    labels: bool = True,
    title: str = "",
) -> None:
    """The view's picture with true (blue) and predicted (orange) boxes, axes in pixels.

    Lines are thicker when nearer, and pale where the view's depth (if it has one) lies before them. Labels stand at
    the middle of the part of a box that the picture shows; a box that is hidden or cut off gets none.
    """
    ax.imshow(view.load_rgb(), extent=(-0.5, view.width - 0.5, view.height - 0.5, -0.5), zorder=0)
    ax.set_xlim(-0.5, view.width - 0.5)
    ax.set_ylim(view.height - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_yticks([])
    depth = view.load_depth() if view.depth_path is not None else None
    texts = []
    for boxes, color in ((true, TRUE_COLOR), (predicted, PREDICTED_COLOR)):
        for box in boxes:
            lines, index, hidden, widths = _box_lines(view, depth, box)
            drawn = np.full(len(lines), True) if color == TRUE_COLOR else index % GAP != GAP - 1
            for part, alpha, casing in ((drawn & hidden, 0.45, 0.0), (drawn & ~hidden, 1.0, 0.9)):
                for paint, extra in (("white", casing), (color, 0.0)):
                    if part.any() and (extra or paint == color):
                        lines_of_part = LineCollection(
                            lines[part], colors=paint, linewidths=widths[part] + extra, alpha=alpha, capstyle="butt",
                            zorder=3 + (paint == color),
                        )  # fmt: skip
                        ax.add_collection(lines_of_part, autolim=False)
            middle = lines.mean(axis=1)
            inside = ((middle >= 0) & (middle <= [view.width - 1, view.height - 1])).all(axis=1)
            seen = inside & ~hidden
            if labels and box.label and seen.sum() >= PIECES and (color == TRUE_COLOR or not true):
                texts.append((*middle[inside].mean(axis=0), box.label))
    place_labels(ax, texts)
    if title:
        ax.set_title(title, fontsize=FONT_SIZE, pad=3)


def _box_lines(view: View, depth: np.ndarray | None, box: OrientedBox) -> tuple[np.ndarray, ...]:
    """(pixels [M, 2, 2], index [M], hidden [M] bool, line widths [M] in points) of the pieces before the camera."""
    segments = edge_pieces(box, PIECES)
    lines, index = project_segments(segments, view.K, view.camera_to_world)
    to_middle = segments[index].mean(axis=1) - view.camera_to_world[:3, 3]
    z = np.maximum(to_middle @ view.camera_to_world[:3, 2], 0.05)
    hidden = np.zeros(len(lines), dtype=bool)
    if depth is not None and len(lines):
        scale = np.array([depth.shape[1] / view.width, depth.shape[0] / view.height])
        pixels = np.floor((lines.mean(axis=1) + 0.5) * scale).astype(int)
        fits = ((pixels >= 0) & (pixels < depth.shape[::-1])).all(axis=1)
        surface = depth[pixels[fits, 1], pixels[fits, 0]]
        hidden[fits] = (surface > 0) & (surface < z[fits] - HIDDEN_MARGIN)
    return lines, index, hidden, np.clip(3.0 / z, 0.8, 2.0)
