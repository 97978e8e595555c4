"""Parallel views of a scene from outside: the walls between the viewer and the room are left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from roomplan_lib.geometry import BOX_EDGES, OrientedBox, box_corners, points_in_box
from roomplan_lib.scenes import View
from roomplan_lib.viz.clouds import Surfels
from roomplan_lib.viz.style import CAMERA_COLOR, DASHES, FONT_SIZE, PREDICTED_COLOR, TRUE_COLOR, halo

CUT_HEIGHT = 2.0  # metres above the floor; what is higher hides the room
LONGEST_LABEL = 32  # letters
FADE = 0.3  # share of white in the surfaces, so that boxes stand out
PIXELS_PER_METRE = 140
LARGEST_SPLAT = 13  # pixels
FRUSTUM_DEPTH = 0.22  # metres
STRAY = 0.5  # metres beside the room that a figure still shows of boxes outside it


@dataclass(frozen=True)
class Direction:
    """Where a viewer at infinity stands, radians: azimuth about world z from x, elevation above the horizon.

    Picture coordinates are metres along `right` and `up`.
    """

    azimuth: float
    elevation: float

    @property
    def towards(self) -> np.ndarray:
        """[3] unit vector from the scene to the viewer."""
        ca, sa, ce, se = (f(a) for a in (self.azimuth, self.elevation) for f in (np.cos, np.sin))
        return np.array([ca * ce, sa * ce, se])

    @property
    def right(self) -> np.ndarray:
        return np.array([-np.sin(self.azimuth), np.cos(self.azimuth), 0.0])

    @property
    def up(self) -> np.ndarray:
        return np.cross(self.towards, self.right)

    def flat(self, points: np.ndarray) -> np.ndarray:
        """[..., 2] metres in the picture of world points [..., 3]."""
        return points @ np.stack([self.right, self.up], axis=-1)


TOP = Direction(-np.pi / 2, np.pi / 2)  # picture x and y are world x and y


def best_direction(surfels: Surfels, boxes: list[OrientedBox], elevation: float = np.radians(48)) -> Direction:
    """The corner-on direction, of the four that go with the room's walls, that shows most of the boxes' surfaces."""
    surfels = surfels[:: max(1, len(surfels) // 50_000)]  # an even part of them decides as well
    yaws = np.radians(np.arange(0, 90, 2))
    xy = surfels.points[:: max(1, len(surfels) // 5000), :2]
    areas = [np.prod(np.ptp(xy @ [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], axis=0)) for a in yaws]
    wall = yaws[int(np.argmin(areas))]
    inside = np.zeros(len(surfels), dtype=bool)
    for box in boxes:
        inside |= points_in_box(surfels.points, box, 0.02)
    normals = surfels.normals[inside]
    choices = [Direction(wall + np.radians(a), elevation) for a in (30, 60, 120, 150, 210, 240, 300, 330)]
    return max(choices, key=lambda d: (np.maximum(normals @ d.towards, 0) - np.ptp(xy @ d.right[:2]) * 1e-9).sum())


def draw_surfels(ax: Axes, surfels: Surfels, direction: Direction, cut_height: float | None = CUT_HEIGHT) -> np.ndarray:
    """Draw the surface as seen from `direction`; returns its [2, 2] (lower, upper) corner in picture metres.

    What turns its back to the viewer is left out, and so is what lies `cut_height` metres above the floor.
    """
    keep = surfels.normals @ direction.towards > 0.05
    if cut_height is not None:
        keep &= surfels.points[:, 2] < surfels.floor + cut_height
    seen = surfels[keep]
    nearness = seen.points @ direction.towards - seen.spacing / 2  # of two pictures of a surface the finer one counts
    seen = seen[np.argsort(nearness, kind="stable")]  # far to near: the last one written stays
    xy = direction.flat(seen.points)
    lower, upper = xy.min(axis=0) - 0.05, xy.max(axis=0) + 0.05
    width, height = np.ceil((upper - lower) * PIXELS_PER_METRE).astype(int)
    size = np.clip(np.ceil(seen.spacing * PIXELS_PER_METRE), 1, LARGEST_SPLAT).astype(int)
    corner = np.floor((xy - lower) * PIXELS_PER_METRE - (size[:, None] - 1) / 2).astype(int)
    steps = np.arange(LARGEST_SPLAT)
    canvas = np.zeros((height, width, 4), dtype=np.uint8)
    for part in np.array_split(np.arange(len(seen)), max(1, len(seen) // 20_000)):
        covers = steps < size[part, None]
        point, dy, dx = np.nonzero(covers[:, :, None] & covers[:, None, :])
        columns, rows = corner[part[point], 0] + dx, corner[part[point], 1] + dy
        fits = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        canvas[rows[fits], columns[fits], :3] = seen.colors[part[point[fits]]]
        canvas[rows[fits], columns[fits], 3] = 255
    canvas[..., :3] = (canvas[..., :3] * (1 - FADE) + 255 * FADE).astype(np.uint8)
    far = lower + np.array([width, height]) / PIXELS_PER_METRE
    ax.imshow(
        canvas, origin="lower", extent=(lower[0], far[0], lower[1], far[1]), interpolation="antialiased", zorder=0
    )
    return np.stack([lower, upper])


def draw_boxes(
    ax: Axes, direction: Direction, true: list[OrientedBox] = (), predicted: list[OrientedBox] = (), labels: bool = True
) -> None:
    """Box edges, true blue and solid, predicted orange and dashed; labels stand at the true boxes' centres."""
    for boxes, color, style in ((true, TRUE_COLOR, "-"), (predicted, PREDICTED_COLOR, DASHES)):
        for box in boxes:
            edges = direction.flat(box_corners(box)[BOX_EDGES])
            ax.add_collection(
                LineCollection(
                    edges, colors=color, linewidths=1.4, linestyles=[style], path_effects=halo(2.4), zorder=3
                ),
                autolim=False,
            )
    if labels:
        place_labels(ax, [(*direction.flat(box.center), box.label) for box in true or predicted])


def draw_connectors(ax: Axes, direction: Direction, pairs: list[tuple[OrientedBox, OrientedBox]]) -> None:
    """A line from each true centre (blue dot) to its predicted one (orange square)."""
    for true, predicted in pairs:
        a, b = direction.flat(np.stack([true.center, predicted.center]))
        ax.plot(*np.stack([a, b]).T, color="black", linewidth=1.2, path_effects=halo(2.6), zorder=4)
        ax.plot(*a, "o", color=TRUE_COLOR, markersize=4, markeredgecolor="white", markeredgewidth=0.6, zorder=5)
        ax.plot(*b, "s", color=PREDICTED_COLOR, markersize=4, markeredgecolor="white", markeredgewidth=0.6, zorder=5)


def draw_segments(ax: Axes, direction: Direction, segments: np.ndarray, color: str) -> None:
    """World segments [N, 2, 3] as plain lines."""
    ax.add_collection(LineCollection(direction.flat(segments), colors=color, linewidths=0.9, zorder=2), autolim=False)


def frustum(view: View, depth: float = FRUSTUM_DEPTH) -> np.ndarray:
    """[8, 2, 3] world segments, metres, of a view's pyramid: centre to the four picture corners, then its rim."""
    u, v = np.array([0, 1, 1, 0]) * view.width - 0.5, np.array([0, 0, 1, 1]) * view.height - 0.5
    K = view.K
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(4)], axis=-1) * depth
    corners = rays @ view.camera_to_world[:3, :3].T + view.camera_to_world[:3, 3]
    center = np.broadcast_to(view.camera_to_world[:3, 3], corners.shape)
    return np.concatenate([np.stack([center, corners], 1), np.stack([corners, np.roll(corners, -1, axis=0)], 1)])


def draw_cameras(ax: Axes, direction: Direction, views: list[View], path: bool = False) -> None:
    """The views' pyramids; with `path` also a line through their centres in order of time."""
    for view in views:
        ax.add_collection(
            LineCollection(
                direction.flat(frustum(view)), colors=CAMERA_COLOR, linewidths=0.8, path_effects=halo(1.8), zorder=4
            ),
            autolim=False,
        )
    if path:
        centers = np.array([v.camera_to_world[:3, 3] for v in sorted(views, key=lambda v: v.timestamp)])
        ax.plot(*direction.flat(centers).T, color=CAMERA_COLOR, linewidth=0.8, linestyle=":", zorder=3)


def set_limits(ax: Axes, corners: np.ndarray, direction: Direction, boxes: list[OrientedBox] = ()) -> None:
    """Equal axes around the surface's [2, 2] corners and the boxes, up to STRAY metres outside; the rest is cut off."""
    lower, upper = corners
    for box in boxes:
        flat = direction.flat(box_corners(box))
        lower = np.minimum(lower, np.maximum(flat.min(axis=0), corners[0] - STRAY))
        upper = np.maximum(upper, np.minimum(flat.max(axis=0), corners[1] + STRAY))
    ax.set_xlim(lower[0] - 0.1, upper[0] + 0.1)
    ax.set_ylim(lower[1] - 0.1, upper[1] + 0.1)
    ax.set_aspect("equal")


def map_axes(ax: Axes) -> None:
    """Axes of a view from above: world x and y, metres."""
    ax.set_xlabel("x (m)", fontsize=FONT_SIZE, labelpad=1)
    ax.set_ylabel("y (m)", fontsize=FONT_SIZE, labelpad=1)
    ax.tick_params(labelsize=FONT_SIZE - 1, length=2, pad=1.5)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.spines[["top", "right"]].set_visible(False)


def scale_bar(ax: Axes) -> None:
    """A bar of one metre instead of axes: true to scale along the picture's horizontal."""
    ax.set_axis_off()
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    x, y = x0 + 0.03 * (x1 - x0), y0 + 0.03 * (y1 - y0)
    ax.plot([x, x + 1], [y, y], color="black", linewidth=2, solid_capstyle="butt", path_effects=halo(3.5), zorder=6)
    ax.text(
        x + 0.5,
        y + 0.02 * (y1 - y0),
        "1 m",
        fontsize=FONT_SIZE,
        ha="center",
        va="bottom",
        path_effects=halo(),
        zorder=6,
    )


def short_label(text: str) -> str:
    """The text, cut at LONGEST_LABEL."""
    return text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL - 1]}…"


def place_labels(ax: Axes, labels: list[tuple[float, float, str]], color: str = "black") -> None:
    """Texts near their points, cut at LONGEST_LABEL and pushed apart so that none covers another; those for which there
    is no room are left out. Call when the axes have their limits."""
    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    box = ax.get_position().transformed(ax.figure.transFigure)
    per_point = abs(x1 - x0) / max(box.width, 1) * ax.figure.dpi / 72
    left, right, lower, upper = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    width, height = 0.62 * FONT_SIZE * per_point, 1.35 * FONT_SIZE * per_point
    taken: list[tuple[float, float, float]] = []
    for x, y, text in sorted(labels, key=lambda item: item[1]):
        if not (left <= x <= right and lower <= y <= upper):
            continue
        text = short_label(text)
        half = width * len(text) / 2
        x = float(np.clip(x, left + half, right - half))
        moves = sorted(((i, j) for i in range(-3, 4) for j in range(-6, 7)), key=lambda m: abs(m[0]) * 1.5 + abs(m[1]))
        for i, j in moves:
            place = (x + i * half, y + j * height / 2)
            cut = i and not left + half <= place[0] <= right - half or j and not lower <= place[1] <= upper
            if not cut and all(abs(place[0] - px) >= half + h or abs(place[1] - py) >= height for px, py, h in taken):
                break
        else:
            continue
        taken.append((*place, half))
        ax.text(
            *place, text, fontsize=FONT_SIZE, color=color, ha="center", va="center", zorder=6, clip_on=True,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
