"""`place_plane` samples: anchors on the floor, on walls and on table tops, which carry the plane's own normal.

The action is a place_anchor without a category. For a level plane the normal is (0, 0, 1), `yaw` turns the rectangle
and extent is [length, width, THICKNESS]; for a wall the normal is horizontal and points into the room, and extent is
[THICKNESS, length, height]: in both cases the lengths along the axes of the box that the action stands for.

Floor and walls are those that the scene's reader tells; where it tells none, as for real ARKitScenes scans, they are
fitted to the depth pictures.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from roomplan_lib.geometry import OrientedBox, points_in_box, rotation_z, unproject
from roomplan_lib.samples import box_record, rounded
from roomplan_lib.samples.describe import CLEAR_MARGIN, footprint_gap, unique_phrases, upright
from roomplan_lib.samples.views import MAX_DEPTH, depth_intrinsics
from roomplan_lib.samples.visibility import pixels_in_boxes
from roomplan_lib.scenes import Scene, View

TASK = "place_plane"
FLOOR = ("Place an anchor on the floor.", "Put a plane anchor on the floor.", "Anchor the floor.")
TABLE_TOP = (
    "Place an anchor on the top of the {}.",
    "Put a plane anchor on the {} top.",
    "Anchor the upper surface of the {}.",
)
WALL = (
    "Place an anchor on the wall next to the {}.",
    "Put a plane anchor on the wall by the {}.",
    "Anchor the wall that the {} stands at.",
)
THICKNESS = 0.01  # metres, of every plane
NEXT_TO = 0.5  # metres between an object's side and the wall that is named after it
SLAB = 0.08  # metres: depth pixels this near to a plane, both sides together, show it
LARGE = 10  # floor and walls are shown by this many times the pixels that show an object

# Fitting: every FIT_STRIDE-th pixel of at most FIT_VIEWS views.
FIT_VIEWS = 60
FIT_STRIDE = 4
FIT_TOLERANCE = 0.04  # metres from a plane to its points
LEVEL, STEEP = 0.97, 0.15  # |z| of the normals of level and of upright surfaces
MIN_POINTS = 200
MIN_SHARE = 0.02  # of the upright surfaces' points that a wall holds
MIN_WALL = (0.8, 1.0)  # metres: length and height of the smallest wall
MAX_GAP = 0.6  # metres without a point along a wall that part it in two
MAX_WALLS = 12
HYPOTHESES = 200
EDGE_SHARE = 0.01  # of a plane's points that may lie beyond each edge of its rectangle


def build_planes(
    scene: Scene, views: list[View], visible: np.ndarray, seed: int = 0, min_pixels: float = 150
) -> list[dict]:
    """The plane samples of a scene, without the keys all its samples share (`images`, `geom_token`, ...).

    views: what a sample shows; visible: [num_boxes] bool, which boxes they show. The floor, the top of each table that
    can be named, and each wall that stands clearly nearest to a named object get a sample where the views show
    `min_pixels` of a table top, LARGE times that of floor or wall. Words depend on `seed` and the scene alone.
    """
    named = {
        index: phrase
        for index, phrase in unique_phrases(scene).items()
        if visible[index] and upright(scene.boxes[index]) is not None
    }
    floor, walls = room_planes(scene, seed)
    targets = [(box, FLOOR, "", LARGE * min_pixels) for box in floor]
    for index, phrase in named.items():
        if scene.boxes[index].label == "table":
            targets.append((table_top(scene.boxes[index]), TABLE_TOP, phrase, min_pixels))
    for wall, phrase in _named_walls(scene, walls, named):
        targets.append((wall, WALL, phrase, LARGE * min_pixels))
    shown = pixels_in_boxes(replace(scene, boxes=[_slab(target[0]) for target in targets]), views)
    samples = []
    for (box, templates, phrase, least), pixels in zip(targets, shown.max(axis=0, initial=0), strict=True):
        if pixels < least:
            continue
        chance = random.Random(f"{seed}/{scene.scene_id}/{box.object_id}/plane")
        samples.append(
            {
                "instruction": chance.choice(templates).format(phrase),
                "action_json": place_plane_action(scene.scene_id, box),
                "task": TASK,
                "question_id": f"{scene.scene_id}-{TASK}-{len(samples):03d}",
                "object_ids": [box.object_id],
                "boxes": [box_record(box)],
            }
        )
    return samples


def place_plane_action(scene_id: str, box: OrientedBox) -> str:
    """Text of the action that marks a plane's box: level where its third side is the thin one, else a wall."""
    level = box.extent[2] <= THICKNESS
    action = {
        "action": "place_anchor",
        "scene": scene_id,
        "center": rounded(box.center, 4),
        "normal": [0.0, 0.0, 1.0] if level else rounded(box.rotation[:, 0], 4),
        "extent": rounded(box.extent, 4),
    }
    if level:
        action["yaw"] = round(np.degrees(box.yaw)) % 180
    return json.dumps(action)


def room_planes(scene: Scene, seed: int = 0) -> tuple[list[OrientedBox], list[OrientedBox]]:
    """(the floor, where there is one; the walls) as thin boxes, third axis up, a wall's first axis into the room."""
    floors = [surface.box for surface in scene.surfaces if surface.kind == "floor"]
    walls = [surface.box for surface in scene.surfaces if surface.kind == "wall"]
    if not floors and not walls:
        return fit_planes(scene, seed)
    inside = np.mean([view.camera_to_world[:3, 3] for view in scene.views], axis=0)
    return [_level(box.center, box.extent[:2], box.yaw, "floor", box.object_id) for box in floors[:1]], [
        _upright(box.center, box.rotation[:, 1] * np.sign(box.rotation[:, 1] @ (inside - box.center) or 1.0),
                 box.extent[0], box.extent[2], box.object_id)
        for box in walls
    ]  # fmt: skip


def table_top(box: OrientedBox) -> OrientedBox:
    """The upper face of an upright box as a plane."""
    box = upright(box)
    center = box.center + [0.0, 0.0, box.extent[2] / 2]
    return _level(center, box.extent[:2], box.yaw, box.label, f"{box.object_id}-top")


def _named_walls(scene: Scene, walls: list[OrientedBox], named: dict[int, str]) -> Iterator[tuple[OrientedBox, str]]:
    """Each wall once, with the phrase of the object that stands nearest to it and clearly nearest to no other wall."""
    best: dict[int, tuple[float, str]] = {}
    for index, phrase in named.items():
        gaps = [footprint_gap(upright(scene.boxes[index]), wall) for wall in walls]
        order = np.argsort(gaps)
        if len(walls) < 2 or gaps[order[0]] > NEXT_TO or gaps[order[1]] < gaps[order[0]] + CLEAR_MARGIN:
            continue
        best[order[0]] = min(best.get(order[0], (np.inf, "")), (gaps[order[0]], phrase))
    for number in sorted(best):
        yield walls[number], best[number][1]


def _level(center: np.ndarray, size: np.ndarray, yaw: float, label: str, object_id: str) -> OrientedBox:
    return OrientedBox(center, [*size, THICKNESS], rotation_z(yaw % np.pi), label, object_id)


def _upright(center: np.ndarray, normal: np.ndarray, length: float, height: float, object_id: str) -> OrientedBox:
    yaw = np.arctan2(normal[1], normal[0])
    return OrientedBox(center, [THICKNESS, length, height], rotation_z(yaw), "wall", object_id)


def _slab(box: OrientedBox) -> OrientedBox:
    """The plane, thick enough to hold its noisy depth pixels."""
    return replace(box, extent=np.maximum(box.extent, SLAB))


# Fitting --------------------------------------------------------------------------------------------------------------


def fit_planes(scene: Scene, seed: int = 0) -> tuple[list[OrientedBox], list[OrientedBox]]:
    """Floor and walls of a scene from its depth pictures, see `room_planes`; nothing for a scene without depth.

    Points in annotated boxes are furniture and left out. The floor is the lowest height at which much is level; walls
    are found one after another by RANSAC (Fischler and Bolles 1981) on upright surfaces, a hypothesis being one point
    with its normal.
    """
    points, normals = _surface_points(scene)
    steep = np.abs(normals[:, 2]) < STEEP
    floor = _floor_points(points[normals[:, 2] > LEVEL])
    bottom = float(np.median(floor[:, 2])) if len(floor) else None
    walls = _fit_walls(points[steep], normals[steep], bottom, np.random.default_rng([seed, *scene.scene_id.encode()]))
    return [_rectangle(floor, walls)] if len(floor) else [], walls


def _surface_points(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """(points [N, 3] metres, unit normals [N, 3] towards the camera) of the scene outside its boxes."""
    views = [view for view in scene.views if view.posed and view.depth_path is not None]
    views = views[:: max(1, len(views) // FIT_VIEWS)]
    all_points, all_normals = [np.zeros((0, 3))], [np.zeros((0, 3))]
    for view in views:
        depth = view.load_depth()
        grid, valid = unproject(depth, depth_intrinsics(view, depth.shape[::-1]), view.camera_to_world)
        grid = grid[::FIT_STRIDE, ::FIT_STRIDE]
        near = (depth <= MAX_DEPTH)[::FIT_STRIDE, ::FIT_STRIDE] & valid[::FIT_STRIDE, ::FIT_STRIDE]
        across, down = grid[1:-1, 2:] - grid[1:-1, :-2], grid[2:, 1:-1] - grid[:-2, 1:-1]
        normal = np.cross(across, down)
        with np.errstate(invalid="ignore", divide="ignore"):
            normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        middle = grid[1:-1, 1:-1]
        good = near[1:-1, 1:-1] & np.isfinite(normal).all(axis=-1)
        points, normal = middle[good], normal[good]
        facing = np.einsum("ni,ni->n", normal, view.camera_to_world[:3, 3] - points)
        normal = normal * np.sign(facing)[:, None]
        all_points.append(points)
        all_normals.append(normal)
    points, normals = np.concatenate(all_points), np.concatenate(all_normals)
    free = np.ones(len(points), dtype=bool)
    for box in scene.boxes:
        free &= ~points_in_box(points, box, FIT_TOLERANCE)
    return points[free], normals[free]


def _floor_points(points: np.ndarray) -> np.ndarray:
    """Those of the points [N, 3] of level surfaces that lie at the lowest height where there are many."""
    if len(points) < MIN_POINTS:
        return points[:0]
    heights = points[:, 2]
    counts, edges = np.histogram(heights, np.arange(heights.min(), heights.max() + 2 * FIT_TOLERANCE, FIT_TOLERANCE))
    lowest = int(np.argmax(counts >= 0.2 * counts.max()))
    return points[np.abs(heights - (edges[lowest] + edges[lowest + 1]) / 2) <= FIT_TOLERANCE]


def _rectangle(floor: np.ndarray, walls: list[OrientedBox]) -> OrientedBox:
    """The rectangle of the floor's points [N, 3]: along the longest wall, without walls the smallest of all yaws."""
    angles = [max(walls, key=lambda wall: wall.extent[1]).yaw] if walls else np.radians(np.arange(90))
    rectangles = []
    for yaw in angles:
        low, high = np.quantile(floor @ rotation_z(yaw), (EDGE_SHARE, 1 - EDGE_SHARE), axis=0)[:, :2]
        rectangles.append((np.prod(high - low), yaw, low, high))
    _, yaw, low, high = min(rectangles, key=lambda rectangle: rectangle[:2])
    center = rotation_z(yaw) @ [*(low + high) / 2, 0.0] + [0.0, 0.0, np.median(floor[:, 2])]
    return _level(center, high - low, yaw, "floor", "floor")


def _fit_walls(
    points: np.ndarray, normals: np.ndarray, bottom: float | None, rng: np.random.Generator
) -> list[OrientedBox]:
    """Walls from points [N, 3] of upright surfaces and their normals; they stand on `bottom` where it is known."""
    walls: list[OrientedBox] = []
    least = max(MIN_POINTS, MIN_SHARE * len(points))
    flat = normals[:, :2] / np.linalg.norm(normals[:, :2], axis=1, keepdims=True)
    while len(points) >= least and len(walls) < MAX_WALLS:
        best = np.zeros(len(points), dtype=bool)
        for index in rng.integers(len(points), size=HYPOTHESES):
            inliers = _on_wall(points, flat, flat[index], flat[index] @ points[index, :2])
            best = inliers if inliers.sum() > best.sum() else best
        if best.sum() < least:
            break
        middle = points[best, :2].mean(axis=0)  # the line of least squares through the best hypothesis' points
        normal = np.linalg.svd(points[best, :2] - middle, full_matrices=False)[2][1]
        normal = normal * np.sign(normal @ flat[best].mean(axis=0))
        best |= _on_wall(points, flat, normal, normal @ middle)
        walls += _runs(points[best], normal, bottom, len(walls))
        points, flat = points[~best], flat[~best]
    return walls


def _on_wall(points: np.ndarray, flat: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    return (np.abs(points[:, :2] @ normal - offset) <= FIT_TOLERANCE) & (flat @ normal > 0.9)


def _runs(points: np.ndarray, normal: np.ndarray, bottom: float | None, first: int) -> list[OrientedBox]:
    """The rectangles of one plane's points, parted where nothing is seen for MAX_GAP along it."""
    along = np.array([-normal[1], normal[0]])
    order = np.argsort(points[:, :2] @ along)
    points = points[order]
    walls = []
    for run in np.split(points, np.flatnonzero(np.diff(points[:, :2] @ along) > MAX_GAP) + 1):
        if len(run) < MIN_POINTS:
            continue
        start, end = np.quantile(run[:, :2] @ along, (EDGE_SHARE, 1 - EDGE_SHARE))
        low, high = np.quantile(run[:, 2], (EDGE_SHARE, 1 - EDGE_SHARE))
        low = low if bottom is None else min(low, bottom)
        if end - start < MIN_WALL[0] or high - low < MIN_WALL[1]:
            continue
        at = along * (start + end) / 2 + normal * np.median(run[:, :2] @ normal)
        center = np.array([*at, (low + high) / 2])
        walls.append(_upright(center, normal, end - start, high - low, f"wall-{first + len(walls)}"))
    return walls
