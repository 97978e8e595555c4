"""A scene as a floor plan to scale: walls with their doors and windows, furniture, lengths."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Arc, Polygon
from matplotlib.path import Path as Ring

from roomplan_lib.files import new_file
from roomplan_lib.geometry import OrientedBox, box_corners, rotation_z
from roomplan_lib.scenes import Scene
from roomplan_lib.viz.oblique import place_labels, scale_bar
from roomplan_lib.viz.style import FONT_SIZE, TRUE_COLOR, WIDTH, PrintFigure

WALL_WIDTH = 0.08  # metres a wall is drawn wide that has no thickness of its own
MARGIN = 0.6  # metres around the room, for lengths and the scale bar
MAX_HEIGHT = 9.0  # inches
FLOOR_COLOR, WALL_COLOR, FURNITURE_COLOR = "#F3F0E8", "#333333", "#D5E5F2"
TOP_CORNERS = [1, 5, 7, 3]  # of box_corners, around the box seen from above


def floor_plan_figure(scene: Scene) -> PrintFigure:
    """The scene from above, turned so that its longest wall is level or upright on the page.

    Labels give a piece's category and yaw in the scene's frame, degrees; numbers at walls are lengths in metres. Doors
    are drawn as opening into the room, hinged at either end: files do not tell. Raises ValueError for an empty scene.
    """
    if not scene.surfaces and not scene.boxes:
        raise ValueError(f"scene {scene.scene_id}: no surface and no box, so there is no floor plan to draw")
    walls = [s for s in scene.surfaces if s.kind == "wall"]
    longest = max([s.box for s in walls] or scene.boxes or [s.box for s in scene.surfaces], key=lambda b: b.extent[0])
    turn = rotation_z(-((longest.yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4))  # by at most 45 degrees
    outlines = {id(b): _outline(b, turn) for b in [*scene.boxes, *(s.box for s in scene.surfaces)]}
    points = np.concatenate(list(outlines.values()))
    lower, upper = points.min(axis=0) - [MARGIN, MARGIN + 0.15], points.max(axis=0) + MARGIN
    scale = min((WIDTH - 0.2) / (upper - lower)[0], (MAX_HEIGHT - 0.5) / (upper - lower)[1])
    figure = PrintFigure((upper - lower)[1] * scale + 0.5, max((upper - lower)[0] * scale + 0.2, WIDTH / 2))
    height = figure.get_figheight()
    ax = figure.add_axes((0.0, 0.1 / height, 1.0, 1 - 0.5 / height))
    ax.set(xlim=(lower[0], upper[0]), ylim=(lower[1], upper[1]), aspect="equal")
    figure.suptitle(_title(scene), fontsize=FONT_SIZE + 1.5, y=1 - 0.1 / height, va="top", parse_math=False)
    floors = []
    for surface in (s for s in scene.surfaces if s.kind == "floor"):
        corners = outlines[id(surface.box)] if surface.polygon is None else (surface.polygon @ turn.T)[:, :2]
        ax.add_patch(Polygon(corners, facecolor=FLOOR_COLOR, edgecolor="none", zorder=0))
        floors.append(Ring(corners))
    room = _Inside(floors, (turn @ np.mean([s.box.center for s in walls] or [longest.center], axis=0))[:2])
    labels = []
    for wall in walls:
        children = [s for s in scene.surfaces if s.parent_id == wall.box.object_id != ""]
        labels.append(_draw_wall(ax, wall, children, turn, room))
    for surface in (s for s in scene.surfaces if s.kind in ("door", "window", "opening")):
        _draw_in_wall(ax, surface.kind, surface.box, turn, room)
    for box in sorted(scene.boxes, key=lambda b: b.center[2] + b.extent[2] / 2):
        ax.add_patch(
            Polygon(outlines[id(box)], facecolor=FURNITURE_COLOR, edgecolor=TRUE_COLOR, linewidth=1.0, zorder=4)
        )
    labels += [
        (*(turn @ box.center)[:2], f"{box.label or 'object'} {np.degrees(box.yaw) % 180:.0f}°".replace("$", r"\$"))
        for box in scene.boxes
    ]
    place_labels(ax, labels)
    scale_bar(ax)
    _draw_axes(ax, turn)
    return figure


def save_floor_plan(scene: Scene, path: Path | str, kind: str = "png") -> None:
    """Write `floor_plan_figure(scene)` as "svg" or "png"; the same scene gives the same bytes."""
    figure = floor_plan_figure(scene)
    # Text stays text in the SVG; its generated names and its date would differ from call to call.
    with new_file(path) as file, matplotlib.rc_context({"svg.hashsalt": "roomplan", "svg.fonttype": "none"}):
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)


@dataclass(frozen=True)
class _Inside:
    """Where the room is: floor outlines on the page and, where those do not tell, the room's middle [2]."""

    floors: list[Ring]
    middle: np.ndarray

    def towards(self, point: np.ndarray, across: np.ndarray) -> np.ndarray:
        """`across` or its opposite, whichever leads from a point of a wall into the room."""
        ahead, behind = (any(f.contains_point(point + s * 0.2 * across) for f in self.floors) for s in (1, -1))
        forward = ahead if ahead != behind else (self.middle - point) @ across > 0
        return across if forward else -across


def _title(scene: Scene) -> str:
    parts = [f"{len(scene.boxes)} pieces"]
    floors = [s for s in scene.surfaces if s.kind == "floor"]
    if floors:
        parts.append(f"floor {sum(_area(s) for s in floors):.1f} m²")
    heights = [s.box.extent[2] for s in scene.surfaces if s.kind == "wall"]
    if heights:
        parts.append(f"walls {max(heights):.2f} m high")
    return f"Scene {scene.scene_id}: {', '.join(parts)}"


def _area(floor) -> float:
    """Square metres of a floor's outline, by the shoelace formula."""
    if floor.polygon is None:
        return float(np.prod(floor.box.extent[:2]))
    x, y = ((floor.polygon - floor.box.center) @ floor.box.rotation)[:, :2].T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _outline(box: OrientedBox, turn: np.ndarray) -> np.ndarray:
    """[4, 2] corners of an upright box on the page, metres."""
    return (box_corners(box)[TOP_CORNERS] @ turn.T)[:, :2]


def _frame(box: OrientedBox, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(middle, unit vector along the width, unit vector across), [2] each, on the page."""
    along = (turn @ box.rotation[:, 0])[:2]
    along = along / max(np.linalg.norm(along), 1e-9)
    return (turn @ box.center)[:2], along, np.array([-along[1], along[0]])


def _draw_wall(ax: Axes, wall, children: list, turn: np.ndarray, room: _Inside) -> tuple[float, float, str]:
    """The wall less the spans of its doors, windows and openings; returns (x, y, text) of its length, outside."""
    center, along, across = _frame(wall.box, turn)
    half = wall.box.extent[0] / 2
    width = max(wall.box.extent[1], WALL_WIDTH) / 2
    spans = [(-half - width, half + width)]  # beyond its ends, so that corners are closed
    for child in children:
        at = ((turn @ child.box.center)[:2] - center) @ along
        low, high = at - child.box.extent[0] / 2, at + child.box.extent[0] / 2
        spans = [s for a, b in spans for s in ((a, min(b, low)), (max(a, high), b)) if s[1] > s[0]]
    for low, high in spans:
        corners = [
            center + along * s + across * t for s, t in ((low, -width), (high, -width), (high, width), (low, width))
        ]
        ax.add_patch(Polygon(corners, facecolor=WALL_COLOR, edgecolor="none", zorder=2))
    outwards = -room.towards(center, across)
    return (*(center + outwards * (width + 0.18 + 0.16 * abs(outwards[0]))), f"{wall.box.extent[0]:.2f} m")


def _draw_in_wall(ax: Axes, kind: str, box: OrientedBox, turn: np.ndarray, room: _Inside) -> None:
    center, along, across = _frame(box, turn)
    half, width = box.extent[0] / 2, WALL_WIDTH / 2
    inwards = room.towards(center, across)
    if kind == "door":
        hinge = center - along * half
        ax.plot(*np.stack([hinge, hinge + inwards * 2 * half]).T, color=WALL_COLOR, linewidth=1.6, zorder=3)
        start = np.degrees(np.arctan2(along[1], along[0]))
        first = start if along[0] * inwards[1] - along[1] * inwards[0] > 0 else start - 90
        ax.add_patch(
            Arc(hinge, 4 * half, 4 * half, angle=first, theta1=0, theta2=90, color=WALL_COLOR, linewidth=0.7, zorder=3)
        )
    lines = {"window": (-width, 0.0, width), "opening": (-width, width), "door": ()}[kind]
    for offset in lines:
        ends = np.stack([center - along * half, center + along * half]) + across * offset
        ax.plot(*ends.T, color=WALL_COLOR, linewidth=0.9, linestyle="--" if kind == "opening" else "-", zorder=3)


def _draw_axes(ax: Axes, turn: np.ndarray) -> None:
    """Arrows along the scene's x and y in the lower right corner."""
    origin = np.array([ax.get_xlim()[1] - 0.4, ax.get_ylim()[0] + 0.35])
    for name, tip in zip("xy", (turn[:2, :2] * 0.24).T, strict=True):
        ax.annotate("", origin + tip, origin, arrowprops={"arrowstyle": "->", "linewidth": 0.9}, zorder=6)
        ax.text(*(origin + tip * 1.35), name, fontsize=FONT_SIZE, ha="center", va="center", zorder=6)
