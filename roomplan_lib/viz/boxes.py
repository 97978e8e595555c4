"""Oriented boxes drawn over a view's picture."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners, project_segments
from roomplan_lib.samples.views import depth_intrinsics
from roomplan_lib.scenes import View
from roomplan_lib.viz.oblique import place_labels
from roomplan_lib.viz.style import FONT_SIZE, PREDICTED_COLOR, TRUE_COLOR

PIECES = 24  # of an edge, each with a thickness of its own
GAP = 4  # a predicted edge is dashed: every fourth piece is left out
NEAR = 0.05  # metres before the camera at which edges are cut
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
    Raises ValueError for a view without a pose.
    """
    if not view.posed and (len(true) or len(predicted)):
        raise ValueError(f"view {view.view_id} has no pose, so no box can be drawn on {view.rgb_path}")
    ax.imshow(view.load_rgb(), extent=(-0.5, view.width - 0.5, view.height - 0.5, -0.5), zorder=0)
    ax.set_xlim(-0.5, view.width - 0.5)
    ax.set_ylim(view.height - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_yticks([])
    depth = view.load_depth() if view.depth_path is not None else None
    texts = []
    for boxes, color in ((true, TRUE_COLOR), (predicted, PREDICTED_COLOR)):
        for box in boxes:
            lines, index, hidden, z = box_lines(view, box, depth)
            widths = np.clip(3.0 / z, 0.8, 2.0)
            drawn = np.full(len(lines), True) if color == TRUE_COLOR else index % GAP != GAP - 1
            for part, alpha, casing in ((drawn & hidden, 0.45, 0.0), (drawn & ~hidden, 1.0, 0.9)):
                for paint, extra in (("white", casing), (color, 0.0)):
                    if part.any() and (extra or paint == color):
                        lines_of_part = LineCollection(
                            lines[part], colors=paint, linewidths=widths[part] + extra, alpha=alpha, capstyle="butt",
                            zorder=3 + (paint == color),
                        )  # fmt: skip
                        ax.add_collection(lines_of_part, autolim=False)
            if labels and box.label and (~hidden).sum() >= PIECES and (color == TRUE_COLOR or not true):
                texts.append((*lines.mean(axis=(0, 1)), box.label))
    place_labels(ax, texts)
    if title:
        ax.set_title(title, fontsize=FONT_SIZE, pad=3)


def box_lines(
    view: View, box: OrientedBox, depth: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What a posed view shows of a box's edges, each cut into PIECES.

    Pieces are cut at a plane just before the camera and at the picture's border. depth: the view's, [h, w] metres.
    Returns lines [M, 2, 2] pixels, index [M] of the piece in `edge_pieces(box, PIECES)`, hidden [M] bool: a surface in
    `depth` lies before it, z [M] metres of the piece along the camera's axis.
    """
    segments = edge_pieces(box, PIECES)
    lines, index = project_segments(segments, view.K, view.camera_to_world, NEAR)
    lines, kept = clip_lines(lines, view.width, view.height)
    index = index[kept]
    # Pieces are short: the mean depth of its ends serves all of a piece.
    ends = (segments[index] - view.camera_to_world[:3, 3]) @ view.camera_to_world[:3, 2]
    z = np.maximum(ends, NEAR).mean(axis=1)
    hidden = np.zeros(len(lines), dtype=bool)
    if depth is not None and len(lines):
        own = depth_intrinsics(view, depth.shape[::-1])
        focal, center = own[[0, 1], [0, 1]], own[:2, 2]
        rays = (lines.mean(axis=1) - view.K[:2, 2]) / view.K[[0, 1], [0, 1]]
        pixels = np.floor(rays * focal + center + 0.5).astype(int)
        fits = ((pixels >= 0) & (pixels < depth.shape[::-1])).all(axis=1)
        surface = depth[pixels[fits, 1], pixels[fits, 0]]
        hidden[fits] = (surface > 0) & (surface < z[fits] - HIDDEN_MARGIN)
    return lines, index, hidden, z


def clip_lines(lines: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """The parts of lines [M, 2, 2], pixels, within a picture's border, and which lines they are of.

    The picture reaches from -0.5 to its size - 0.5. Each border bounds the share of the line that is inside from below
    or from above (Liang and Barsky 1984).
    """
    start, step = lines[:, 0], lines[:, 1] - lines[:, 0]
    first, last = np.zeros(len(lines)), np.ones(len(lines))
    for axis, size in enumerate((width, height)):
        for sign, border in ((-1.0, 0.5), (1.0, size - 0.5)):
            towards = sign * step[:, axis]
            room = border - sign * start[:, axis]  # inside while share * towards <= room
            with np.errstate(divide="ignore", invalid="ignore"):
                share = room / towards
            last = np.where(towards > 0, np.minimum(last, share), last)
            first = np.where(towards < 0, np.maximum(first, share), first)
            last = np.where((towards == 0) & (room < 0), -1.0, last)
    kept = np.flatnonzero(first < last)
    ends = np.stack([first[kept], last[kept]], axis=1)[..., None]
    return start[kept, None] + ends * step[kept, None], kept
