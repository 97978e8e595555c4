"""Boxes, sets, layouts and actions scored against second implementations, closed forms and cases worked by hand."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import shapely
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection, QhullError
from scipy.spatial.transform import Rotation

from roomplan_lib.actions import (
    ActionError,
    ActionList,
    Measure,
    Move,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceWall,
    PlanRoom,
    Remove,
    anchor_from_box,
    parse_action,
)
from roomplan_lib.actions.executor import RoomState
from roomplan_lib.evaluation.action_metrics import (
    confusion,
    inner_action,
    is_json,
    language_items,
    score_edits,
    score_measures,
)
from roomplan_lib.evaluation.bootstrap import weighted_mean, weighted_median, with_intervals
from roomplan_lib.evaluation.box_metrics import (
    ap3d,
    average_precision,
    best_errors,
    bounds_iou,
    box_errors,
    match_boxes,
    normal_error_deg,
    scale_factor,
    scaled,
    score_sets,
)
from roomplan_lib.evaluation.layout_metrics import (
    floor_iou,
    floor_polygon,
    layout_rectangles,
    rectangle_iou,
    room_corners,
    same_plane,
    score_corners,
    score_layouts,
)
from roomplan_lib.geometry import OrientedBox, box_corners, box_iou_3d, rotation_z

# Exact overlap --------------------------------------------------------------------------------------------------------

RELATIONS = ("free", "identical", "twin", "touching", "nested", "parallel", "perpendicular", "far", "thin", "edge")


def pair_of(relation: str, rng: np.random.Generator, upright: bool) -> tuple[OrientedBox, OrientedBox]:
    """Two boxes of metres' size in a relation that breaks careless code."""
    turns = [rng.uniform(-np.pi, np.pi, 2) for _ in range(2)]
    a_turn, b_turn = (
        rotation_z(turn[0]) if upright else Rotation.from_euler("zxz", [*turn, turn.sum()]).as_matrix()
        for turn in turns
    )
    a = OrientedBox(rng.uniform(-0.6, 0.6, 3), rng.uniform(0.2, 2, 3), a_turn)
    b = OrientedBox(rng.uniform(-0.6, 0.6, 3), rng.uniform(0.2, 2, 3), b_turn)
    axis, sign = int(rng.integers(3)), rng.choice([-1, 1])
    match relation:
        case "identical":
            return a, OrientedBox(a.center, a.extent, a.rotation)
        case "twin":  # the same box in other words
            return a, OrientedBox(a.center, a.extent[[1, 0, 2]], a.rotation @ rotation_z(sign * np.pi / 2))
        case "touching":  # they share a face
            offset = (a.extent[axis] + b.extent[axis]) / 2 * sign * a.rotation[:, axis]
            return a, OrientedBox(a.center + offset, b.extent, a.rotation)
        case "nested":
            return a, OrientedBox(a.center, a.extent * rng.uniform(0.1, 1, 3), a.rotation)
        case "parallel":
            return a, OrientedBox(b.center, b.extent, a.rotation)
        case "perpendicular":
            return a, OrientedBox(b.center, b.extent, a.rotation @ rotation_z(sign * np.pi / 2))
        case "far":
            return a, OrientedBox(b.center + 5, b.extent, b.rotation)
        case "thin":
            return a, OrientedBox(b.center, np.where(np.arange(3) == axis, 1e-3, b.extent), b.rotation)
        case "edge":  # an edge of one in a face of the other
            return a, OrientedBox(a.center + a.rotation @ (a.extent / 2), b.extent, a.rotation)
    return a, b


def shapely_iou(a: OrientedBox, b: OrientedBox) -> float:
    """Footprints of upright boxes by shapely, times the overlap in height.

    On a grid of a picometre: without one GEOS takes one in a thousand pairs that share an edge for nested.
    """
    prints = [shapely.Polygon(box_corners(box)[[0, 2, 6, 4], :2]) for box in (a, b)]
    low, high = (f(box.center[2] + s * box.extent[2] / 2 for box in (a, b)) for f, s in ((max, -1), (min, 1)))
    shared = shapely.intersection(*prints, grid_size=1e-12).area * max(0.0, high - low)
    return shared / (a.volume + b.volume - shared)


def halfspace_iou(a: OrientedBox, b: OrientedBox) -> float:
    """The twelve half-spaces intersected by Qhull, about the middle of the largest ball that fits in."""
    halfspaces = []
    for box in (a, b):
        for axis, sign in itertools.product(range(3), (-1, 1)):
            normal = sign * box.rotation[:, axis]
            halfspaces.append([*normal, -(normal @ box.center + box.extent[axis] / 2)])
    halfspaces = np.array(halfspaces)
    # Largest r with normal @ x + offset + r <= 0; the normals have length 1.
    ball = linprog([0, 0, 0, -1], np.column_stack([halfspaces[:, :3], np.ones(12)]), -halfspaces[:, 3],
                   bounds=[(None, None)] * 3 + [(0, None)])  # fmt: skip
    if not ball.success or ball.x[3] < 1e-9:
        return 0.0
    try:
        shared = ConvexHull(HalfspaceIntersection(halfspaces, ball.x[:3], qhull_options="QJ").intersections).volume
    except QhullError:  # too thin for Qhull
        return 0.0
    return shared / (a.volume + b.volume - shared)


def worst_difference(num_pairs: int, upright: bool, reference, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    worst = dict.fromkeys(RELATIONS, 0.0)
    for i in range(num_pairs):
        relation = RELATIONS[i % len(RELATIONS)]
        a, b = pair_of(relation, rng, upright)
        ours = box_iou_3d(a, b)
        assert 0 <= ours <= 1
        worst[relation] = max(worst[relation], abs(ours - reference(a, b)))
    return worst


def test_iou_of_10000_upright_pairs_equals_shapely():
    worst = worst_difference(10_000, True, shapely_iou, seed=0)
    assert max(worst.values()) < 1e-6, worst


def test_iou_of_boxes_of_any_turn_equals_qhull():
    worst = worst_difference(400, False, halfspace_iou, seed=1)
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.slow
def test_iou_of_10000_boxes_of_any_turn_equals_qhull():
    worst = worst_difference(10_000, False, halfspace_iou, seed=2)
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize("yaw", [0.0, 0.3, math.pi / 4, 1.0, 2.5])
def test_a_box_overlaps_itself_wholly(yaw):
    """The published clipping of coincident edges gives 2.20 at a yaw of 0.3 and 1.02 at 45 degrees."""
    box = OrientedBox([1.0, 2.0, 0.5], [1.2, 0.7, 1.0], rotation_z(yaw))
    assert box_iou_3d(box, box) == pytest.approx(1.0, abs=1e-12) and box_iou_3d(box, box) <= 1
    assert average_precision([[box]], [[1.0]], [[box]], (0.999,))[0.999] == {"": 1.0}


# Pairs ----------------------------------------------------------------------------------------------------------------


def bed(yaw_deg=0.0, extent=(2.2, 0.9, 0.5), center=(0.0, 0.0, 0.25), label="bed"):
    return OrientedBox(center, extent, rotation_z(math.radians(yaw_deg)), label)


def test_errors_of_a_pair_by_hand():
    errors = box_errors(bed(30, (2.0, 1.0, 0.5), (0.3, -0.4, 1.45)), bed(10))
    assert errors["center_error_m"] == pytest.approx(math.sqrt(0.25 + 1.44))
    assert errors["horizontal_error_m"] == pytest.approx(0.5) and errors["vertical_error_m"] == pytest.approx(1.2)
    assert errors["extent_error_m"] == pytest.approx(0.1) and errors["yaw_error_deg"] == pytest.approx(20)
    shared = 2.0 * 0.9 * 0.5
    assert errors["ase"] == pytest.approx(1 - shared / (1.0 + 0.99 - shared))
    assert errors["iou_3d"] == 0


@pytest.mark.parametrize("yaw, iou", [(15, 0.725), (30, 0.554), (45, 0.407), (90, 0.257)])
def test_a_dropped_yaw_costs_what_was_measured(yaw, iou):
    errors = box_errors(bed(0), bed(yaw))
    assert errors["iou_3d"] == pytest.approx(iou, abs=6e-4)
    assert errors["yaw_error_deg"] == pytest.approx(yaw) and errors["ase"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("true_yaw", [0, 37, 170])
def test_errors_are_those_of_the_box_not_of_its_description(true_yaw):
    true = bed(true_yaw)
    for turns in range(-4, 5):
        extent = true.extent if turns % 2 == 0 else true.extent[[1, 0, 2]]
        same = OrientedBox(true.center, extent, rotation_z(math.radians(true_yaw + 90 * turns)))
        errors = box_errors(same, true)
        assert errors["iou_3d"] == pytest.approx(1) and errors["ase"] == pytest.approx(0, abs=1e-12)
        assert errors["yaw_error_deg"] == pytest.approx(0, abs=1e-6) and errors["extent_error_m"] == pytest.approx(0)
    assert box_errors(bed(true_yaw + 90), true)["yaw_error_deg"] == pytest.approx(90)
    assert box_errors(bed(true_yaw - 30), true)["yaw_error_deg"] == pytest.approx(30)


def test_a_square_table_has_no_right_angle_to_miss():
    square, nearly, oblong = ((1.0, 1.0, 0.7), (1.0, 0.92, 0.7), (1.0, 0.88, 0.7))
    for extent, expected in ((square, 10), (nearly, 10), (oblong, 80)):
        assert box_errors(bed(80, extent), bed(0, extent))["yaw_error_deg"] == pytest.approx(expected)


def test_several_right_answers_count_the_best():
    chairs = [bed(0, center=(x, 0, 0)) for x in (0.0, 5.0, 10.0)]
    assert best_errors(bed(0, center=(5.1, 0, 0)), chairs)["center_error_m"] == pytest.approx(0.1)
    assert best_errors(bed(0, center=(70, 0, 0)), chairs)["center_error_m"] == pytest.approx(60)


def test_normals_of_surfaces_have_a_front_and_axes_of_boxes_none():
    up, down, tilted = (0, 0, 1), (0, 0, -1), (math.sin(0.1), 0, math.cos(0.1))
    assert normal_error_deg(down, up, directed=True) == pytest.approx(180)
    assert normal_error_deg(down, up, directed=False) == 0
    assert normal_error_deg(tilted, up, directed=True) == pytest.approx(math.degrees(0.1))
    assert normal_error_deg((3, 0, 0), (1, 0, 0), directed=True) == 0


def test_scale_is_the_least_squares_factor():
    rng = np.random.default_rng(0)
    true = rng.normal(size=(9, 3))
    predicted = true / 1.7 + rng.normal(scale=0.01, size=(9, 3))
    factor = scale_factor(predicted, true)
    assert factor == pytest.approx(np.linalg.lstsq(predicted.reshape(-1, 1), true.ravel(), rcond=None)[0][0])
    assert scale_factor(np.zeros((0, 3)), np.zeros((0, 3))) == 1 == scale_factor(-true, true)
    box = scaled(bed(30, center=(1, 2, 3)), 2)
    assert box.center.tolist() == [2, 4, 6] and box.extent.tolist() == [4.4, 1.8, 1.0]


# Sets -----------------------------------------------------------------------------------------------------------------


def cube(x, label="chair", size=1.0):
    return OrientedBox([x, 0, 0], [size] * 3, label=label)


def test_matching_is_the_best_of_all_one_to_one_pairings():
    rng = np.random.default_rng(3)
    for _ in range(30):
        predicted, true = ([cube(x) for x in rng.uniform(0, 2, rng.integers(1, 5))] for _ in range(2))
        ious = np.array([[box_iou_3d(a, b) for b in true] for a in predicted])
        wide = ious if ious.shape[0] <= ious.shape[1] else ious.T
        best = max(
            (
                sum(1 for i, j in enumerate(order) if wide[i, j] >= 0.25),
                sum(v for i, j in enumerate(order) if (v := wide[i, j]) >= 0.25),
            )
            for order in itertools.permutations(range(wide.shape[1]), wide.shape[0])
        )
        pairs = match_boxes(predicted, true, least_iou=0.25)
        assert len(pairs) == best[0] and sum(ious[pair] for pair in pairs) == pytest.approx(best[1])


def test_sets_by_hand():
    predicted = [[cube(0), cube(0.05), cube(9, "table")], [], [cube(0, "lamp")], []]
    true = [[cube(0), cube(5), cube(9.3, "table")], [cube(1, "sofa")], [], []]
    scores = score_sets(predicted, true)
    # of 4 placed and 4 there: one chair (the second is a double) and the table (IoU 0.7 / 1.3)
    assert scores["iou25"]["f1"] == scores["iou50"]["f1"] == pytest.approx(2 * 2 / 8)
    assert scores["iou25"]["by_label"] == {"chair": 0.5, "lamp": 0.0, "sofa": 0.0, "table": 1.0}
    assert scores["iou25"]["macro_f1"] == pytest.approx(1.5 / 4)
    assert scores["iou25"]["sample_f1"] == pytest.approx((2 / 3 + 0 + 0) / 3)  # the last sample is empty on both sides
    assert scores["25cm"]["by_label"]["table"] == 0 and scores["50cm"]["by_label"]["table"] == 1
    assert score_sets([[]], [[]])["iou25"]["f1"] is None and score_sets([[]], [[]])["iou25"]["sample_f1"] is None
    with pytest.raises(ValueError, match="as many predicted as true sets"):
        score_sets([[]], [])


def test_a_class_of_another_name_matches_nothing():
    assert match_boxes([cube(0, "stool")], [cube(0, "chair")], least_iou=0.25) == []
    assert match_boxes([cube(0, "stool")], [cube(0, "chair")], most_distance=0.5) == []


def test_thin_boxes_may_be_thickened_or_matched_by_distance():
    tv, seen = (OrientedBox([0, y, 1], [1.2, 0.02, 0.7], label="tv_monitor") for y in (0.0, 0.03))
    assert box_iou_3d(tv, seen) == 0
    assert score_sets([[seen]], [[tv]])["iou25"]["f1"] == 0 and score_sets([[seen]], [[tv]])["25cm"]["f1"] == 1
    assert score_sets([[seen]], [[tv]], least_extent=0.1)["iou50"]["f1"] == 1


def area_by_steps(right, num_true, recalls=None):
    """The area under the falling precision, by its definition."""
    points = [(sum(right[: k + 1]) / num_true, sum(right[: k + 1]) / (k + 1)) for k in range(len(right))]

    def precision(recall):
        return max((p for r, p in points if r >= recall - 1e-12), default=0.0)

    if recalls:
        return sum(precision(k / (recalls - 1)) for k in range(recalls)) / recalls
    levels = sorted({r for r, _ in points})
    return sum((r - previous) * precision(r) for previous, r in zip([0, *levels], levels, strict=False))


@pytest.mark.parametrize("recalls", [None, 101, 11])
def test_average_precision_equals_its_definition(recalls):
    rng = np.random.default_rng(5)
    for _ in range(20):
        scenes = range(3)
        true = [[cube(3.0 * k) for k in range(rng.integers(1, 4))] for _ in scenes]
        found = [[k for k in range(len(boxes)) if rng.random() < 0.7] for boxes in true]
        predicted = [[true[s][k] for k in found[s]] + [cube(100.0)] * int(rng.integers(3)) for s in scenes]
        sure = [list(rng.random(len(boxes))) for boxes in predicted]
        ranked = sorted(
            ((-c, box.center[0] < 50) for s in scenes for c, box in zip(sure[s], predicted[s], strict=True))
        )
        expected = area_by_steps([right for _, right in ranked], sum(map(len, true)), recalls)
        ours = average_precision(predicted, sure, true, (0.5,), num_recalls=recalls)[0.5]["chair"]
        assert ours == pytest.approx(expected)


def test_doubles_and_absent_classes_in_average_precision():
    true = [[cube(0), cube(5)]]
    doubled = average_precision([[cube(0), cube(0.01), cube(5)]], [[0.9, 0.8, 0.7]], true, (0.25,))[0.25]["chair"]
    assert doubled == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision([[cube(0, "lamp")]], [[0.9]], true, (0.25,)) == {0.25: {"chair": 0.0}}
    assert average_precision([[]], [[]], true, (0.25,)) == {0.25: {"chair": 0.0}}
    shifted = [[cube(0.5), cube(5.5)]]  # IoU 1/3: right at 0.05 to 0.30, wrong at 0.35 to 0.50
    assert ap3d(shifted, [[0.9, 0.8]], true) == pytest.approx(6 / 10)


# Layouts --------------------------------------------------------------------------------------------------------------


def room(*corners, height=2.5, z=0.0, extra=()):
    ends = zip(corners, corners[1:] + corners[:1], strict=True)
    return PlanRoom((*(PlaceWall(a, b, z, height) for a, b in ends), *extra))


OBLONG = ((0.0, 0.0), (4.0, 0.0), (4.0, 3.0), (0.0, 3.0))
L_SHAPE = ((0.0, 0.0), (4.0, 0.0), (4.0, 3.0), (2.0, 3.0), (2.0, 1.5), (0.0, 1.5))


def wall_box(y, yaw=0.0):
    return OrientedBox([2.0, y, 1.25], [4.0, 0.0, 2.5], rotation_z(yaw), "wall")


def test_a_wall_three_metres_away_is_not_close():
    """The published evaluator compares a signed distance, so one side of it counts as close however far."""
    true = wall_box(0.0)
    for distance in (3.0, -3.0, 0.25, -0.25):
        assert not same_plane(wall_box(distance), true) and rectangle_iou(wall_box(distance), true) == 0
    close = [same_plane(wall_box(distance), true, spatiallm_compat=True) for distance in (3.0, -3.0)]
    assert sorted(close) == [False, True]
    assert same_plane(wall_box(0.19), true) and same_plane(wall_box(-0.19), true)
    assert same_plane(wall_box(0.0, math.radians(4.9)), true) and not same_plane(wall_box(0.0, math.radians(5.1)), true)
    assert same_plane(wall_box(0.0, math.pi), true)  # walked the other way it is the same wall
    plan = PlanRoom((PlaceWall((0.0, 0.0), (4.0, 0.0), 0.0, 2.5),))
    away = [PlanRoom((PlaceWall((0.0, y), (4.0, y), 0.0, 2.5),)) for y in (3.0, -3.0)]
    assert [score_layouts([other], [plan])["wall_f1_iou50"] for other in away] == [0, 0]
    published = [score_layouts([other], [plan], spatiallm_compat=True)["wall_f1_iou50"] for other in away]
    assert sorted(published) == [0, 1]


def test_overlap_of_rectangles_in_their_plane():
    true = wall_box(0.0)
    half = OrientedBox([1.0, 0.1, 1.25], [2.0, 0.0, 2.5], label="wall")
    assert rectangle_iou(half, true) == pytest.approx(0.5)
    shifted = OrientedBox([4.0, 0.0, 2.5], [4.0, 0.0, 2.5], label="wall")  # a quarter of each is shared
    assert rectangle_iou(shifted, true) == pytest.approx(0.25 / 1.75)
    turned = wall_box(0.0, math.radians(3))
    assert rectangle_iou(turned, true) == pytest.approx(math.cos(math.radians(3)))  # its shadow is shorter


def test_layout_of_a_room_by_hand():
    door = PlaceDoor(0, (1.0, 0.0, 1.0), 0.8, 2.0)
    true = room(*OBLONG, extra=(door,))
    perfect = score_layouts([true, true], [true, true])
    assert perfect["f1_iou50"] == perfect["door_f1_iou50"] == perfect["host_accuracy"] == perfect["floor_iou"] == 1
    assert perfect["corner_error_m"] == perfect["height_error_m"] == 0 and perfect["window_f1_iou25"] is None
    # Without one wall, walls in another order, the door half a metre to the side, the ceiling higher.
    walls = [PlaceWall(w.a, w.b, 0.0, 2.6) for w in true.actions[:3]][::-1]
    moved = PlanRoom((*walls, PlaceDoor(2, (1.3, 0.05, 1.0), 0.8, 2.0)))
    scores = score_layouts([moved], [true])
    assert scores["wall_f1_iou50"] == pytest.approx(2 * 3 / 7) and scores["height_error_m"] == pytest.approx(0.1)
    assert scores["door_f1_iou25"] == 1 and scores["door_f1_iou50"] == 0 and scores["host_accuracy"] == 1  # IoU 5/11
    turned = PlanRoom((*walls, PlaceDoor(1, (1.0, 0.0, 1.0), 0.8, 2.0)))  # it lies as the wall beside it
    assert score_layouts([turned], [true])["door_f1_iou25"] == 0
    opposite = score_layouts([PlanRoom((*walls, PlaceDoor(0, (1.0, 0.0, 1.0), 0.8, 2.0)))], [true])
    assert opposite["door_f1_iou50"] == 1 and opposite["host_accuracy"] == 0  # it is there, but said to be elsewhere
    nowhere = PlanRoom((*walls, PlaceDoor(7, (1.0, 0.0, 1.0), 0.8, 2.0)))
    assert score_layouts([nowhere], [true])["door_f1_iou25"] == 0 and layout_rectangles(nowhere)[1][-1] == -1
    empty = score_layouts([PlanRoom(())], [true])
    assert empty["f1_iou25"] == empty["floor_iou"] == empty["corner_f1_50cm"] == 0 and empty["corner_error_m"] is None
    nothing = score_layouts([PlanRoom(())], [PlanRoom(())])
    assert set(nothing.values()) == {None}
    with pytest.raises(ValueError, match="at least one, got 0, 0"):
        score_layouts([], [])


def test_corners_within_reach():
    true = room(*OBLONG)
    moved = room((0.08, 0.0), (4.0, 0.2), (4.0, 3.4), (-1.5, 3.0))
    scores = score_corners(moved, true)
    assert len(room_corners(true)) == 4
    assert scores["corner_error_m"] == pytest.approx((0.08 + 0.2 + 0.4) / 3)
    assert [scores[f"corner_f1_{d}"] for d in ("10cm", "25cm", "50cm")] == pytest.approx([1 / 4, 2 / 4, 3 / 4])


def test_floors_of_any_outline():
    assert floor_polygon(room(*L_SHAPE)).area == pytest.approx(4 * 1.5 + 2 * 1.5)
    assert floor_iou(room(*OBLONG), room(*L_SHAPE)) == pytest.approx(9 / 12)
    for order in itertools.permutations(range(6)):
        shuffled = PlanRoom(tuple(room(*L_SHAPE).actions[k] for k in order))
        assert floor_iou(shuffled, room(*L_SHAPE)) == pytest.approx(1)
    shifted = room(*((x + 2, y) for x, y in OBLONG))
    assert floor_iou(shifted, room(*OBLONG)) == pytest.approx(6 / 18)
    lines = PlanRoom((PlaceWall((0.0, 0.0), (4.0, 0.0), 0.0, 2.5), PlaceWall((4.0, 0.0), (8.0, 0.0), 0.0, 2.5)))
    assert floor_polygon(lines).area == 0 and floor_iou(lines, room(*OBLONG)) == 0 and floor_iou(lines, lines) is None


# Actions --------------------------------------------------------------------------------------------------------------

CHAIR = PlaceAnchor("chair", (1.0, 1.0, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5, 1.0))
NONE = NoAction("not_present")


def test_language_level_by_hand():
    near = replace(CHAIR, center=(1.01, 1.0, 0.5))
    table = replace(CHAIR, category="table")
    write = '{"action":"place_anchor","center":[1,1,0.5],"normal":[1,0,0],"extent":[0.5,0.5,1]}'
    cases = [  # text, action, what was wanted
        ("", CHAIR, CHAIR),
        ("", ActionList((CHAIR, near)), ActionList((CHAIR,))),  # the second stands in the first
        ("[1e999]", ActionError("x"), CHAIR),
        (f"Sure: {write} there.", ActionError("x"), CHAIR),
        ("{}", table, CHAIR),
        ("{}", NONE, CHAIR),
        ("{}", NONE, NONE),
        ("{}", CHAIR, NONE),
        ("{}", PlanRoom((PlaceDoor(0, (0.0, 0.0, 1.0), 0.9, 2.0),)), PlanRoom(())),  # no wall to lie in
    ]
    texts, predicted, true = zip(*cases, strict=True)
    columns = language_items(texts, predicted, true)
    items = {name: [None if np.isnan(v) else v for v in values] for name, values in columns.items()}
    assert items["json_rate"] == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert items["valid_rate"] == [1, 1, 0, 0, 1, 1, 1, 1, 1]
    assert items["semantic_rate"] == [1, 0, 0, 0, 1, 1, 1, 1, 0]
    assert items["extra_text_rate"] == [0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert items["type_accuracy"] == [1, 1, 0, 0, 1, 0, 1, 0, 1]
    assert items["category_accuracy"] == [1, None, None, None, 0, None, None, None, None]
    assert items["abstain_recall"] == [None] * 6 + [1, 0, None]
    assert items["abstain_precision"] == [None] * 5 + [0, 1, None, None]
    assert items["duplicate_rate"] == [0, 0.5, None, None, 0, None, None, 0, 0]
    assert confusion(predicted, true) == {
        "list": {"list": 1},
        "none": {"none": 1, "place_anchor": 1},
        "place_anchor": {"invalid": 2, "none": 1, "place_anchor": 2},
        "plan_room": {"plan_room": 1},
    }


@pytest.mark.parametrize(
    "text, strict",
    [
        ('{"a":1}', True),
        ('{"a":1} ', True),
        ("", False),
        ('{"a":1', False),
        ('{"a":NaN}', False),
        ('{"a":1e400}', False),
        ('{"a":' + "9" * 400 + "}", False),
        ("[" * 100_000, False),
        ('"' + "x" * 1_000_000 + '"', False),
    ],
)
def test_what_counts_as_json(text, strict):
    assert is_json(text) is strict


def test_an_action_inside_other_text():
    write = '{"action":"none","reason":"ambiguous"}'
    assert inner_action(f"I think {write} fits") == NoAction("ambiguous")
    assert inner_action(f"[{write},{write}] done") == ActionList((NoAction("ambiguous"),) * 2)
    for text in ("", "no", "{", "[" * 100_000, "{" * 100_000, '{"action":"fly"}', "x" * 1_000_000):
        assert isinstance(inner_action(text), ActionError)


def test_measures_by_hand():
    true = [Measure("distance", 0, 1, 2.0), Measure("width", 3, None, 1.0), Measure("height", 1, None, 1.0)]
    predicted = [Measure("distance", 1, 0, 2.1), Measure("width", 3, None, 0.76), Measure("width", 1, None, 1.0)]
    scores = score_measures(predicted, true)  # the third measures something else
    assert scores["coverage"] == pytest.approx(2 / 3) and scores["abs_error"] == pytest.approx((0.1 + 0.24) / 2)
    assert scores["relative_error"] == pytest.approx((0.05 + 0.24) / 2)
    assert scores["within_10pct"] == pytest.approx(1 / 3) and scores["within_25pct"] == pytest.approx(2 / 3)
    assert scores["delta_125"] == pytest.approx(1 / 3)  # 1 / 0.76 is above 1.25
    assert score_measures([None], true[:1])["relative_error"] is None
    with pytest.raises(ValueError, match="at least one"):
        score_measures([], [])


def test_edits_are_judged_by_the_room_they_leave():
    chairs = [replace(CHAIR, center=(float(x), 1.0, 0.5)) for x in (1, 3, 5)]
    state = RoomState.from_plan(PlanRoom(tuple(chairs)))
    true = Move(1, (3.0, 4.0, 0.5))
    scores = score_edits(
        [state] * 5,
        [true, Move(2, (3.0, 4.0, 0.5)), Move(1, (3.1, 4.0, 0.5)), Move(9, (0.0, 0.0, 0.5)), ActionError("x")],
        [true] * 5,
    )
    assert scores["type_accuracy"] == 0.8 and scores["target_accuracy"] == 0.4 and scores["executed_rate"] == 0.6
    # right; two of three stay, and one stands where it should though it is another; near enough; as it was, twice
    assert scores["state_f1"] == pytest.approx((1 + 2 / 3 + 1 + 2 / 3 + 2 / 3) / 5)
    assert scores["state_f1_untouched"] == pytest.approx(2 / 3)
    assert score_edits([state], [Remove(0)], [Remove(0)])["state_f1"] == 1
    assert score_edits([state], [Remove(1)], [Remove(0)])["state_f1"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="the true move cannot be carried out"):
        score_edits([state], [true], [Move(9, (0.0, 0.0, 0.0))])


# Intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_draw_scenes_not_samples():
    scenes = ["b"] * 90 + ["a"] * 10
    values = np.array([1.0] * 90 + [0.0] * 10)
    result = with_intervals(lambda weights: {"mean": weighted_mean(values, weights), "none": None}, scenes)
    assert result["mean"] == 0.9 and result["ci95"] == {"mean": [0.0, 1.0]} and result["none"] is None
    assert result["num_samples"] == 100 and result["num_scenes"] == 2
    rng = np.random.default_rng(0)
    values, scenes = rng.normal(size=2000), [f"s{i // 5}" for i in range(2000)]
    low, high = with_intervals(lambda weights: {"mean": weighted_mean(values, weights)}, scenes)["ci95"]["mean"]
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(2000), rel=0.1)  # all independent: the textbook's interval


def test_weights_count_samples_that_often():
    values, weights = np.array([1.0, np.nan, 5.0, 2.0]), np.array([2, 7, 1, 0])
    assert weighted_mean(values, weights) == pytest.approx(7 / 3) and weighted_median(values, weights) == 1
    assert weighted_mean(values[1:2], weights[1:2]) is None and weighted_median(values[:0], weights[:0]) is None


def test_an_anchor_of_a_box_scores_as_the_box():
    box = bed(130, center=(1.0, -2.0, 0.3))
    anchor = anchor_from_box(box)
    assert box_errors(anchor.to_box(), box)["iou_3d"] == pytest.approx(1)
    assert bounds_iou(anchor.to_box(), box) == pytest.approx(1)
    assert parse_action(json.dumps({"action": "none", "reason": "ambiguous"})) == NoAction("ambiguous")
