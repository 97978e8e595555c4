"""Scores of a room's layout: walls, doors and windows as rectangles in their planes, corners, and the floor's outline.

Lengths are metres; both plans are in one frame.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from roomplan_lib.actions import PlaceAnchor, PlaceWall, PlanRoom, canonical
from roomplan_lib.evaluation.bootstrap import weighted_mean
from roomplan_lib.evaluation.box_metrics import (
    NO_MATCH,
    THRESHOLDS,
    Counts,
    CountTable,
    cheapest_pairs,
    count_by_label,
    mean_of_known,
)
from roomplan_lib.geometry import OrientedBox

KINDS = ("wall", "door", "window", "opening")
SAME_PLANE_DEG, SAME_PLANE_M = 5.0, 0.2  # how far the planes of two rectangles may be turned and apart (SpatialLM)
CORNER_DISTANCES = {"10cm": 0.1, "25cm": 0.25, "50cm": 0.5}
CORNER_REACH = 1.0  # metres; corners farther apart are not each other's
PLANE_M = 0.05  # metres; an anchor without a category that is thinner marks a plane
SAME_CORNER = 0.05  # metres within which the ends of two walls are one corner


def layout_rectangles(plan: PlanRoom) -> tuple[list[OrientedBox], list[int | None]]:
    """The walls, doors, windows and openings of a plan as boxes without thickness, and the wall of each.

    A box's axes run along the wall, across it and up; its label is the kind. The wall is its place among the plan's
    walls, None for walls themselves. A door in a wall that the plan does not have is nowhere and gets a wall of -1
    and a box without size, so that it counts as predicted and matches nothing.
    """
    walls = [item for item in plan.actions if isinstance(item, PlaceWall)]
    boxes: list[OrientedBox] = [wall.to_box() for wall in walls]
    hosts: list[int | None] = [None] * len(walls)
    for item in plan.actions:
        kind = item.verb.removeprefix("place_")
        if kind not in KINDS or isinstance(item, PlaceWall):
            continue
        known = 0 <= item.wall < len(walls)
        boxes.append(item.to_box(walls[item.wall]) if known else OrientedBox(item.center, (0, 0, 0), label=kind))
        hosts.append(item.wall if known else -1)
    return boxes, hosts


def is_plane(anchor: PlaceAnchor) -> bool:
    """Whether an anchor marks a plane: it has no category and is thin one way."""
    return not anchor.category and min(anchor.extent) < PLANE_M


def plane_rectangle(anchor: PlaceAnchor) -> OrientedBox:
    """The plane that an anchor marks, axes as in `layout_rectangles`: along it, its normal, and the other way along.

    A normal within 60 degrees of the vertical is that of a level plane, any other that of an upright one.
    """
    box = anchor.to_box()
    axes, signs = ([1, 0, 2], [-1, 1, 1]) if anchor.level else ([0, 2, 1], [1, 1, -1])
    return OrientedBox(box.center, box.extent[axes], box.rotation[:, axes] * signs)


def same_plane(predicted: OrientedBox, true: OrientedBox, *, spatiallm_compat: bool = False) -> bool:
    """Whether two rectangles lie in one plane: turned by less than 5 degrees, less than 0.2 m apart.

    spatiallm_compat: as SpatialLM's evaluator has it, which compares the signed distance, so that planes any distance
    apart on the one side count as one.
    """
    a, b = predicted.rotation[:, 1], true.rotation[:, 1]
    if np.linalg.norm(np.cross(a, b)) >= math.sin(math.radians(SAME_PLANE_DEG)):
        return False
    distance = float((predicted.center - true.center) @ b)
    return (distance if spatiallm_compat else abs(distance)) < SAME_PLANE_M


def rectangle_iou(predicted: OrientedBox, true: OrientedBox, *, spatiallm_compat: bool = False) -> float:
    """IoU of two rectangles, the predicted one projected onto the true one's plane; 0 unless they are in one plane."""
    if not same_plane(predicted, true, spatiallm_compat=spatiallm_compat):
        return 0.0
    polygons = []
    for box in (predicted, true):
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2
        corners = box.center + (signs * box.extent[[0, 2]]) @ box.rotation[:, [0, 2]].T
        polygons.append(shapely.Polygon((corners - true.center) @ true.rotation[:, [0, 2]]))
    shared = polygons[0].intersection(polygons[1]).area
    union = polygons[0].area + polygons[1].area - shared
    return shared / union if union > 0 else 0.0


def match_rectangles(
    predicted: Sequence[OrientedBox], true: Sequence[OrientedBox], least_iou: float, *, spatiallm_compat: bool = False
) -> list[tuple[int, int]]:
    """(place in predicted, place in true) of rectangles of one kind that belong together (Hungarian on the IoU)."""
    cost = np.full((len(predicted), len(true)), NO_MATCH)
    for i, box in enumerate(predicted):
        for j, other in enumerate(true):
            if box.label == other.label:
                iou = rectangle_iou(box, other, spatiallm_compat=spatiallm_compat)
                cost[i, j] = 1 - iou if iou >= least_iou else NO_MATCH
    return cheapest_pairs(cost)


@dataclass(frozen=True, eq=False)
class LayoutItems:
    """The layouts of rooms, compared one by one."""

    found: dict[str, CountTable]  # by IoU; the labels are the kinds
    hosts: np.ndarray  # [N, 2] doors, windows and openings found (IoU >= 0.25), and those of them in the right wall
    means: dict[str, np.ndarray]  # [N] each, NaN where a room has nothing to score

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float | None]:
        """f1_iou25, f1_iou50 of all kinds pooled, and of each as wall_f1_iou25, ...; host_accuracy, the share of the
        doors, windows and openings found whose wall is found too and is the right one; corner_error_m,
        corner_f1_10cm, _25cm, _50cm, floor_iou and height_error_m, means over the rooms. None where nothing is there.

        weights: [N] how often each room counts, once for None.
        """
        weights = np.ones(len(self.hosts)) if weights is None else weights
        result: dict[str, float | None] = {}
        for name, table in self.found.items():
            by_kind = table.by_label(weights)
            result[f"f1_{name}"] = table.scores(weights)["f1"]
            result |= {f"{kind}_f1_{name}": by_kind.get(kind) for kind in KINDS}
        found, right = weights @ self.hosts
        result["host_accuracy"] = float(right / found) if found else None
        return result | {name: weighted_mean(values, weights) for name, values in self.means.items()}


def layout_items(
    predicted: Sequence[PlanRoom], true: Sequence[PlanRoom], *, spatiallm_compat: bool = False
) -> LayoutItems:
    """Walls, doors, windows and openings, corners and floors of several rooms, compared.

    spatiallm_compat: distances of planes signed, as SpatialLM's evaluator has them. Raises ValueError for no rooms.
    """
    if len(predicted) != len(true) or not true:
        raise ValueError(f"expected as many predicted as true rooms, at least one, got {len(predicted)}, {len(true)}")
    found: dict[str, list] = {name: [] for name in THRESHOLDS}
    hosts, columns = [], defaultdict(list)
    for plan, other in zip(predicted, true, strict=True):
        (boxes, walls), (others, true_walls) = layout_rectangles(plan), layout_rectangles(other)
        for name, least in THRESHOLDS.items():
            pairs = match_rectangles(boxes, others, least, spatiallm_compat=spatiallm_compat)
            found[name].append(count_by_label(boxes, others, pairs))
            if name == "iou25":
                wall_of = {i: j for i, j in pairs if others[j].label == "wall"}
                inside = [(i, j) for i, j in pairs if others[j].label != "wall"]
                hosts.append([len(inside), sum(wall_of.get(walls[i], -1) == true_walls[j] for i, j in inside)])
        tops = [_top(plan), _top(other)]
        values = score_corners(plan, other) | {
            "floor_iou": floor_iou(plan, other),
            "height_error_m": None if None in tops else abs(tops[0] - tops[1]),
        }
        for name, value in values.items():
            columns[name].append(np.nan if value is None else value)
    tables = {name: CountTable.of(samples) for name, samples in found.items()}
    return LayoutItems(tables, np.array(hosts), {name: np.array(values) for name, values in columns.items()})


def score_layouts(predicted: Sequence[PlanRoom], true: Sequence[PlanRoom], *, spatiallm_compat: bool = False) -> dict:
    """`LayoutItems.scores` of several rooms."""
    return layout_items(predicted, true, spatiallm_compat=spatiallm_compat).scores()


def room_corners(plan: PlanRoom) -> np.ndarray:
    """[N, 2] where the plan's walls end, on the floor plan; ends within 5 cm of each other are one corner."""
    corners: list[np.ndarray] = []
    for wall in (item for item in plan.actions if isinstance(item, PlaceWall)):
        for end in (wall.a, wall.b):
            if all(np.linalg.norm(corner - end) > SAME_CORNER for corner in corners):
                corners.append(np.array(end))
    return np.array(corners).reshape(-1, 2)


def score_corners(predicted: PlanRoom, true: PlanRoom) -> dict[str, float | None]:
    """corner_error_m: mean distance of the corners that belong together (Hungarian, at most 1 m apart); and
    corner_f1_10cm, _25cm, _50cm. None where neither plan has walls."""
    a, b = room_corners(predicted), room_corners(true)
    distances = np.linalg.norm(a[:, None] - b[None], axis=-1)

    def matched(reach: float) -> list[float]:
        return [distances[pair] for pair in cheapest_pairs(np.where(distances <= reach, distances, NO_MATCH))]

    scores = {f"corner_f1_{name}": Counts(len(a), len(b), len(matched(d))).f1 for name, d in CORNER_DISTANCES.items()}
    return {"corner_error_m": mean_of_known(matched(CORNER_REACH)), **scores}


def floor_polygon(plan: PlanRoom) -> shapely.Geometry:
    """The floor that the plan's walls go round, in their canonical order; gaps between walls are closed straight."""
    walls = [item for item in canonical(plan).actions if isinstance(item, PlaceWall)]
    if len(walls) < 2:
        return shapely.Polygon()
    outline = shapely.make_valid(shapely.Polygon([end for wall in walls for end in (wall.a, wall.b)]))
    return shapely.union_all([part for part in shapely.get_parts(outline) if part.area > 0])


def floor_iou(predicted: PlanRoom, true: PlanRoom) -> float | None:
    """IoU of the floors of two plans; None where neither has any."""
    a, b = floor_polygon(predicted), floor_polygon(true)
    union = a.union(b).area
    return a.intersection(b).area / union if union > 0 else None


def _top(plan: PlanRoom) -> float | None:
    return max((wall.z + wall.height for wall in plan.actions if isinstance(wall, PlaceWall)), default=None)
