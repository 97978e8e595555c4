"""Tables of errors: every class of failure by hand, parts and calibration against slow loops and closed forms."""

import csv
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from roomplan_lib.actions import ActionList, NoAction, PlaceAnchor, PlanRoom, Remove, action_record, format_action
from roomplan_lib.evaluation import manifest_file, predictions_file
from roomplan_lib.evaluation.errors import (
    CLASSES,
    EDGES,
    anchor_failures,
    answer_kind,
    bin_scores,
    calibration,
    error_table,
    examples,
    failure_counts,
    read_error_table,
    upright_ious,
    worst,
    write_error_table,
)
from roomplan_lib.evaluation.rows import (
    answered,
    asked_scenes,
    baseline_predictions,
    file_scores,
    find_predictions,
    is_baseline,
    prediction_row,
    run_names,
)
from roomplan_lib.evaluation.scores import read_predictions, score_predictions
from roomplan_lib.geometry import OrientedBox, box_iou_3d, rotation_z
from roomplan_lib.samples import read_samples
from roomplan_lib.scenes.arkitscenes import read_scene

sys.path.insert(0, str(Path(__file__).parent))
import scene_files


def anchor(center=(2, 3, -1), extent=(1, 1, 1), yaw=0, category="chair"):
    angle = math.radians(yaw)
    normal = (round(math.cos(angle), 4), round(math.sin(angle), 4), 0.0)
    return PlaceAnchor(category, tuple(map(float, center)), normal, tuple(map(float, extent)))


def action_row(true, predicted, *, scene="s", task="place_anchor", **more):
    """A row whose scene frame is its reference frame. predicted: an action, or text that is none."""
    row = {"index": 0, "scene_id": scene, "task": task, "question": "Where?", "reference": format_action(true, "m2")}
    row["reference_action"] = action_record(true.bound(scene))
    if isinstance(predicted, str):
        return row | {"prediction": predicted, "action": None, "error": "?", "view_ids": None} | more
    row |= {"prediction": format_action(predicted, "m2"), "action": action_record(predicted.bound(scene))}
    return json.loads(json.dumps(row | {"view_ids": None} | more))


def failure(true, predicted, *others, **more):
    """The class of one row in a room where `others` are asked for too."""
    rows = [action_row(true, predicted, **more), *(action_row(other, other) for other in others)]
    return error_table(rows)["failure"][0]


def question_row(prediction, reference="2", question="How many?", scene="s", **more):
    return {"scene_id": scene, "question": question, "prediction": prediction, "reference": reference} | more


# Anchors --------------------------------------------------------------------------------------------------------------

TRUE = anchor((2, 3, -1), (1, 0.4, 1))


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (anchor((2.1, 3, -1), (1, 0.4, 1)), "right"),
        (anchor((2.1, 3, -1), (1, 0.4, 1), category="sofa"), "right"),
        ("I see no chair", "invalid text"),
        ('{"action":"place_anchor"', "invalid text"),
        (NoAction("not_present"), "refused"),
        (Remove(3), "other action"),
        (ActionList((TRUE, TRUE)), "other action"),
        (anchor((-2, 1.2, -1), (1, 1, 1)), "wrong object"),
        (anchor((-2.2, 1, -1.2), (0.1, 0.1, 0.1)), "wrong object"),  # near its centre, though without much overlap
        (anchor((-3, -4, 1), (1, 0.4, 1), category="sofa"), "wrong category"),
        (anchor((4, 6, -2), (1, 0.4, 1)), "wrong scale"),  # twice as far, as large
        (anchor((1, 1.5, -0.5), (0.5, 0.2, 0.5)), "wrong scale"),  # half as far and half as large
        (anchor((-2, 3, -1), (1, 0.4, 1)), "mirrored"),
        (anchor((3, 2, -1), (0.4, 1, 1)), "mirrored"),
        (anchor((2.25, 3.1, -1), (1, 0.2, 1), 90), "wrong yaw"),
        (anchor((2, 3, -1), (0.3, 0.3, 0.3)), "wrong size"),
        (anchor((2, -1, 1), (1, 0.4, 1)), "wrong place"),
        (anchor((2, -1, 1), (0.3, 0.2, 0.3)), "several"),
    ],
)
def test_each_class_of_anchors(predicted, expected):
    other = anchor((-2, 1, -1), (1, 1, 1), category="table")
    assert failure(TRUE, predicted, other) == expected


def test_borders_belong_to_the_better_class():
    cube = anchor((0, 3, -1))
    # Two cubes shifted by d share (1 - d) / (1 + d): 0.25 at d = 0.6.
    assert failure(cube, anchor((0.6, 3, -1))) == "right"
    assert failure(cube, anchor((0.61, 3, -1))) == "wrong place"
    # 0.3 m from another object's centre.
    small, other = {"extent": (0.1, 0.1, 0.1)}, anchor((-2, 1, -1), (0.1, 0.1, 0.1))
    true = anchor((2, 3, -1), **small)
    assert failure(true, anchor((-2, 1.3, -1), **small), other) == "wrong object"
    assert failure(true, anchor((-2, 1.31, -1), **small), other) == "wrong place"
    # A tenth too near is a wrong scale, a twentieth is not.
    true = anchor((0, 4.4, 0), **small)
    assert failure(true, anchor((0, 4.0, 0), **small)) == "wrong scale"
    assert failure(true, anchor((0, 4.2, 0), **small)) == "wrong place"


def test_the_object_asked_for_is_never_another_one():
    """The same object named by two rows, and by its scene with other digits, stays one object."""
    rows = [action_row(TRUE, anchor((2.2, 3.1, -1), (0.1, 0.1, 0.1))), action_row(TRUE, TRUE)]
    table = error_table(rows)
    assert table["failure"].tolist() == ["wrong size", "right"]
    assert table["num_others"].tolist() == [0, 0]


def test_rows_without_a_reference_frame_have_no_distance_scale_or_mirror():
    bare = ("scene_id", "question", "prediction", "reference")
    for predicted in (anchor((4, 6, -2), (1, 0.4, 1)), anchor((-2, 3, -1), (1, 0.4, 1))):
        row = {key: value for key, value in action_row(TRUE, predicted).items() if key in bare}
        table = error_table([row])
        assert table["failure"][0] == "wrong place"
        assert not any(table.known(name) for name in ("distance_m", "scale", "num_others", "num_views", "confidence"))
        assert table["center_error_m"][0] > 3


def slow_class(predicted, true, others):
    """The rules one by one, with the exact IoU of oriented boxes; boxes [x, y, z, dx, dy, dz, yaw]."""

    def iou(a, b=true):
        return box_iou_3d(*(OrientedBox(x[:3], x[3:6], rotation_z(x[6])) for x in (a, b)))

    def put(places, values):
        changed = np.array(predicted)
        changed[places] = values
        return changed

    p, t = predicted[:3], true[:3]
    if iou(predicted) >= 0.25:
        return "right"
    for other in others:
        gap = np.linalg.norm(p - other[:3])
        if iou(predicted, other) >= 0.25 or gap <= 0.3 and gap < np.linalg.norm(p - t):
            return "wrong object"
    factor = p @ t / (p @ p)
    if factor >= 1.1 or 0 < factor <= 1 / 1.1:
        if max(iou(put([0, 1, 2], factor * p)), iou(put(range(6), factor * predicted[:6]))) >= 0.25:
            return "wrong scale"
    x, y, yaw = *p[:2], predicted[6]
    for values in ((-x, y, -yaw), (x, -y, -yaw), (-x, -y, yaw), (y, x, math.pi / 2 - yaw)):
        if max(iou(put([0, 1, 6], values)), iou(put([0, 1], values[:2]))) >= 0.25:
            return "mirrored"
    sides = predicted[3:6], predicted[[4, 3, 5]]
    gaps = [np.abs(side - true[3:6]).sum() for side in sides]
    if gaps[1] < gaps[0]:
        predicted = put(range(3, 7), [*sides[1], yaw + math.pi / 2])
    found = {
        "wrong yaw": iou(put([6], true[6])),
        "wrong size": iou(put([3, 4, 5], true[3:6])),
        "wrong place": iou(put([0, 1, 2], t)),
    }
    best = max(found, key=found.get)
    return best if found[best] >= 0.25 else "several"


def random_boxes(rng, count, reach=3.0):
    size = np.exp(rng.normal(-0.3, 0.5, (count, 3)))
    return np.column_stack([rng.uniform(-reach, reach, (count, 3)) * [1, 1, 0.3], size, rng.uniform(-3, 3, count)])


def test_classes_agree_with_the_rules_taken_one_by_one():
    rng = np.random.default_rng(4)
    true, other = random_boxes(rng, 300), random_boxes(rng, 300)
    predicted = true + rng.normal(0, 0.25, true.shape)
    predicted[:, 3:6] = np.abs(predicted[:, 3:6]) + 0.02
    predicted[100:130] = random_boxes(rng, 30)
    predicted[130:170, :3] *= rng.uniform(0.3, 2, (40, 1))
    predicted[170:200, 0] *= -1
    predicted[200:230, 6] += np.pi / 2
    predicted[230:260, 3:6] *= 0.4
    predicted[260:, :3] = other[260:, :3] + rng.normal(0, 0.2, (40, 3))
    slow = [slow_class(p, t, [o]) for p, t, o in zip(predicted, true, other, strict=True)]
    gap = [np.linalg.norm(a[:, :3] - predicted[:, :3], axis=1) for a in (other, true)]
    on_other = (upright_ious(predicted, other) >= 0.25) | (gap[0] <= 0.3) & (gap[0] < gap[1])
    assert anchor_failures(predicted, true, on_other=on_other).tolist() == slow
    assert len(set(slow)) >= 7, set(slow)


def test_ious_of_many_upright_boxes_are_the_exact_ones():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 400, 0.8), random_boxes(rng, 400, 0.8)
    b[:20], b[20:40, :3] = a[:20], a[20:40, :3]
    exact = [
        box_iou_3d(*(OrientedBox(x[:3], x[3:6], rotation_z(x[6])) for x in pair)) for pair in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(upright_ious(a, b), exact, atol=1e-9)
    assert (np.array(exact) > 0).mean() > 0.3


def test_numbers_of_an_anchor():
    true, predicted = anchor((1, 2, -2), (2, 1, 0.5), 30, "sofa"), anchor((1, 2.5, -2), (1, 0.5, 0.25), 50, "bed")
    table = error_table([action_row(true, predicted, confidence=[0.75], view_ids=["a", "b", "c"])])
    expected = {
        "distance_m": 3.0, "longest_side_m": 2.0, "volume_m3": 1.0, "num_views": 3, "confidence": 0.75,
        "center_error_m": 0.5, "yaw_error_deg": 20.0, "size_ratio": 0.5, "extent_error_m": 1.75 / 3, "hit": 0,
        "scale": (1 + 5 + 4) / (1 + 6.25 + 4),
    }  # fmt: skip
    for name, value in expected.items():
        assert table[name][0] == pytest.approx(value, abs=0.5 if name.endswith("deg") else 0.01), name
    assert (table["category"][0], table["predicted_category"][0]) == ("sofa", "bed")
    assert table["iou_3d"][0] == pytest.approx(box_iou_3d(true.to_box(), predicted.to_box()), abs=0.01)


def test_planes_are_judged_in_their_plane():
    def floor(z=-1.5, x=0.0, size=4.0, category=""):
        return PlaceAnchor(category, (x, 2.0, z), (0.0, 0.0, 1.0), (size, 3.0, 0.01), yaw=0)

    cases = {
        "right": floor(-1.4), "wrong plane": floor(-1.2), "wrong rectangle": floor(x=3.5), "wrong category":
        floor(category="table"), "refused": NoAction("not_visible"), "invalid text": "floor",
    }  # fmt: skip
    table = error_table([action_row(floor(), predicted, task="place_plane") for predicted in cases.values()])
    assert table["failure"].tolist() == list(cases)
    assert table.sections == ["planes"]


# Sets, plans, refusals, edits -----------------------------------------------------------------------------------------


def test_each_class_of_lists():
    chairs = [anchor((x, 3, -1)) for x in (-2.0, 0.0, 2.0)]
    far = anchor((0, -4, -1))
    cases = {
        "right": (ActionList(tuple(chairs[::-1])), (3, 0, 0, 0)),
        "invalid text": ("[{", (0, 3, 0, 0)),
        "refused": (NoAction("not_present"), (0, 3, 0, 0)),
        "other action": (Remove(1), (0, 3, 0, 0)),
        "doubled": (ActionList((*chairs, anchor((2.2, 3, -1)))), (3, 0, 1, 1)),
        "missing and extra": (ActionList((chairs[0], far)), (1, 2, 1, 0)),
        "missing": (ActionList((chairs[1],)), (1, 2, 0, 0)),
        "extra": (ActionList((*chairs, far)), (3, 0, 1, 0)),
    }
    true = ActionList(tuple(chairs))
    rows = []
    for predicted, _ in cases.values():
        row = action_row(chairs[0], chairs[0], task="place_anchors")
        text = predicted if isinstance(predicted, str) else format_action(predicted, "m2")
        rows.append(row | {"reference": format_action(true, "m2"), "prediction": text})
    table = error_table(rows)
    assert table["failure"].tolist() == [name if name != "other action" else "refused" for name in cases]
    counts = np.column_stack([table[f"num_{name}"] for name in ("found", "missing", "extra", "doubled")])
    assert counts.tolist() == [list(map(float, numbers)) for _, numbers in cases.values()]
    assert table["category"].tolist() == ["chair"] * len(rows)


def test_plans_count_walls_and_furniture():
    from roomplan_lib.actions import PlaceDoor, PlaceWall

    walls = [PlaceWall((0.0, 0.0), (4.0, 0.0), -1.5, 2.5), PlaceWall((4.0, 0.0), (4.0, 3.0), -1.5, 2.5)]
    door = PlaceDoor(0, (2.0, 0.0, -0.5), 0.9, 2.0)
    plan = PlanRoom((*walls, door, anchor((1, 1, -1))))
    cases = {
        plan: ("right", 4, 4, 0),
        PlanRoom((walls[0], door, anchor((1, 1, -1)))): ("missing", 4, 3, 0),
        PlanRoom((*plan.actions, anchor((1, 1.2, -1)))): ("doubled", 4, 5, 1),
        PlanRoom((*plan.actions, anchor((3, 2, 1)))): ("extra", 4, 5, 0),
        walls[0]: ("other action", 4, 0, 0),
    }
    table = error_table([action_row(plan, predicted, task="plan_room") for predicted in cases])
    for name, column in (("num_true", 1), ("num_predicted", 2), ("num_doubled", 3)):
        assert table[name].tolist() == [case[column] for case in cases.values()], name
    assert table["failure"].tolist() == ["right", "missing", "doubled", "extra", "refused"]


def test_refusals_and_edits():
    none = NoAction("not_present")
    rows = [action_row(none, p) for p in (none, NoAction("ambiguous"), anchor(), "no")]
    assert error_table(rows)["failure"].tolist() == ["right", "right", "placed", "invalid text"]
    rows = [action_row(Remove(2), p) for p in (Remove(2), Remove(3), none, "{}")]
    table = error_table(rows)
    assert table["failure"].tolist() == ["right", "wrong arguments", "wrong verb", "invalid text"]
    assert table["hit"].tolist() == [1, 0, 0, 0]


# Questions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Two.", "2", "right"),
        ("2 chairs", "2", "more words"),
        (" \n", "2", "empty"),
        ("brown", "2", "other kind"),
        ("no", "yes", "wrong yes or no"),
        ("3", "2", "wrong number"),
        ("brown", "white", "wrong words"),
        ("yes", "white", "other kind"),
    ],
)
def test_each_class_of_questions(prediction, reference, expected):
    table = error_table([question_row(prediction, reference)])
    assert table["failure"][0] == expected
    assert table["hit"][0] == table["em"][0] == (expected == "right")


def test_questions_keep_their_own_type_and_fall_back_on_the_first_word():
    rows = [
        question_row("1", question="What is  it?"),
        question_row("1", question="  «Où» est-il?"),
        question_row("1", question="123?"),
        question_row("1", question="What?", question_type="Number", eval_type="mt"),
        question_row("a chair", task="scan2cap"),
        question_row("1", answers=[]),
    ]
    table = error_table(rows)
    assert table["question_type"].tolist() == ["what", "où", "", "Number", "how", "how"]
    assert table["section"].tolist() == ["questions"] * 4 + ["captions", "hidden"]
    assert math.isnan(table["hit"][4]) and math.isnan(table["hit"][5])
    assert [answer_kind(text) for text in ("Yes, two", "3.5 m", "seven", "a table", "", "?")] == [
        "yes or no", "number", "number", "words", "words", "words",
    ]  # fmt: skip


def test_any_of_several_answers_is_right():
    table = error_table([question_row("brown", "white", answers=["white", "brown"]), question_row("no", "2")])
    assert table["em"].tolist() == [1, 0]


# Parts and calibration ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many():
    """400 anchors of 12 scenes with confidences, some answers invalid."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(400):
        true = anchor(rng.uniform(-4, 4, 3), np.exp(rng.normal(-0.5, 0.6, 3)), int(rng.integers(180)))
        true = dataclasses.replace(true, category=str(rng.choice(["bed", "chair", "sofa", "table"])))
        step = rng.normal(0, 0.3, 3)
        moved = dataclasses.replace(true, center=tuple(float(a + b) for a, b in zip(true.center, step, strict=True)))
        predicted = "?" if rng.random() < 0.1 else moved
        views = [str(v) for v in range(int(rng.integers(2, 5)))]
        sure = [float(rng.uniform())]
        rows.append(action_row(true, predicted, scene=f"scene{k % 12}", confidence=sure, view_ids=views))
    return error_table(rows)


@pytest.mark.parametrize("by", ["category", "distance_m", "longest_side_m", "num_views"])
@pytest.mark.parametrize("measure", ["hit", "center_error_m"])
def test_parts_equal_a_slow_loop(many, by, measure):
    bins = bin_scores(many, by, measure)
    groups = {}
    for place in range(len(many)):
        key, value = many[by][place], many[measure][place]
        if by in EDGES:
            edges = EDGES[by]
            k = next(i for i in range(len(edges) - 1) if edges[i] <= key < edges[i + 1])
            key = f"{edges[k]:g} and more" if math.isinf(edges[k + 1]) else f"{edges[k]:g} to {edges[k + 1]:g}"
        elif by == "num_views":
            key = f"{key:g}"
        if not math.isnan(value):
            groups.setdefault(key, []).append((value, many["scene_id"][place]))
    assert {part.label for part in bins} == set(groups)
    for part in bins:
        values, scenes = zip(*groups[part.label], strict=True)
        expected = statistics.median(values) if measure == "center_error_m" else sum(values) / len(values)
        assert part.value == pytest.approx(expected)
        assert (part.num_samples, part.num_scenes) == (len(values), len(set(scenes)))
        if part.interval:
            assert part.interval[0] <= part.value <= part.interval[1]
    assert sum(part.num_samples for part in bins) == np.isfinite(many[measure]).sum()


def test_intervals_are_those_of_drawn_scenes(many):
    """The spread of a mean over drawn scenes, against its own simulation."""
    part = next(part for part in bin_scores(many, "category") if part.label == "chair")
    chairs = many.select(many["category"] == "chair")
    scenes = sorted(set(many["scene_id"]))
    sums = np.array([chairs["hit"][chairs["scene_id"] == s].sum() for s in scenes])
    counts = np.array([(chairs["scene_id"] == s).sum() for s in scenes])
    drawn = np.random.default_rng(9).integers(len(scenes), size=(20_000, len(scenes)))
    expected = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    np.testing.assert_allclose(part.interval, expected, atol=0.02)


def test_a_part_of_one_scene_has_no_interval_and_rare_texts_are_joined():
    rows = [question_row("2", "2", question=f"w{chr(97 + k)} is?", scene="ab"[k % 2]) for k in range(26) for _ in "aa"]
    rows += [question_row("1", "2", question="zz?", scene=s) for s in "abc"]
    bins = bin_scores(error_table(rows), "question_type", "em")
    assert bins[0].label == "zz" and bins[0].value == 0 and bins[0].interval is not None
    assert bins[1].interval is None
    assert bins[-1].label == "others" and len(bins) == 12
    assert sum(part.num_samples for part in bins) == len(rows)
    assert bin_scores(error_table(rows), "distance_m") == []
    # In another table the same labels mean the same: what they do not name is among the others.
    rest = error_table(
        [question_row("2", question=f"{word} is?", scene="ab"[k]) for k, word in enumerate(("wa", "new"))]
    )
    other = bin_scores(rest, "question_type", "em", bins=[part.label for part in bins])
    assert [(part.label, part.num_samples) for part in other] == [("wa", 1), ("others", 1)]


def test_parts_of_another_table_keep_its_labels(many):
    labels = [part.label for part in bin_scores(many, "category")][:2]
    assert [part.label for part in bin_scores(many, "category", bins=[*labels, "none of these"])] == labels


def calibrated(pairs):
    cube, off = anchor(), anchor((2, -3, 1))
    return error_table(
        [
            action_row(cube, cube if hit else off, confidence=[sure], scene=f"s{i}")
            for i, (sure, hit) in enumerate(pairs)
        ]
    )


def test_expected_calibration_error_in_closed_form():
    pairs = [(0.95, k < 8) for k in range(10)] + [(0.15, k < 3) for k in range(30)]
    found = calibration(calibrated(pairs))
    assert found.ece == pytest.approx(10 / 40 * abs(0.8 - 0.95) + 30 / 40 * abs(0.1 - 0.15))
    assert [(mean, part.value, part.num_samples) for mean, part in found.bins] == [
        (pytest.approx(0.15), pytest.approx(0.1), 30), (pytest.approx(0.95), pytest.approx(0.8), 10),
    ]  # fmt: skip
    assert calibration(calibrated([(0.5, k < 5) for k in range(10)])).ece == pytest.approx(0)
    # Bins are open to the left, and 0 is in the first: 0.2 and 0.15 share a bin, 0.21 has its own.
    found = calibration(calibrated([(0.2, True), (0.15, False), (0.21, True), (0.0, False), (1.0, True)]))
    assert [(part.label, part.num_samples) for _, part in found.bins] == [
        ("0 to 0.1", 1), ("0.1 to 0.2", 2), ("0.2 to 0.3", 1), ("0.9 to 1", 1),
    ]  # fmt: skip
    assert calibration(error_table([action_row(TRUE, TRUE)])) is None


def test_ece_of_many_equals_a_loop(many):
    total = 0.0
    for k in range(10):
        kept = (many["confidence"] > k / 10) & (many["confidence"] <= (k + 1) / 10)
        total += abs(many["hit"][kept].sum() - many["confidence"][kept].sum())
    assert calibration(many).ece == pytest.approx(total / len(many))


# Scenes ---------------------------------------------------------------------------------------------------------------


def test_scenes_tell_what_views_show_and_what_else_is_there(tmp_path):
    boxes = [
        scene_files.box("bed", 1.5, 1.2, 0.4, (2.0, 1.5, 0.6)),
        scene_files.box("table", -1.2, -1.0, -0.3, (1.2, 0.8, 0.75)),
        scene_files.box("shelf", -2.2, 1.5, 0.0, (0.6, 1.0, 1.6)),
    ]
    scene = read_scene(scene_files.write_scene(tmp_path, boxes))
    from roomplan_lib.actions import anchor_from_box

    views = [view.view_id for view in scene.views][:4]
    true = [anchor_from_box(box) for box in scene.boxes]
    rows = [action_row(a, true[1], scene=scene.scene_id, view_ids=views) for a in true]
    table = error_table(rows, {scene.scene_id: scene})
    alone = error_table([rows[0]])
    assert table["num_others"].tolist() == [2, 2, 2] and alone["num_others"][0] == 0
    assert error_table([rows[0]], {scene.scene_id: scene})["failure"][0] == "wrong object" != alone["failure"][0]
    for k, box in enumerate(scene.boxes):
        inside = 0
        for view in scene.views[:4]:
            x, y, z, _ = np.linalg.inv(view.camera_to_world) @ [*box.center, 1]
            u, v = view.K[0, 0] * x / z + view.K[0, 2], view.K[1, 1] * y / z + view.K[1, 2]
            inside += z > 0 and -0.5 <= u <= view.width - 0.5 and -0.5 <= v <= view.height - 0.5
        assert table["in_view_share"][k] == inside / 4
    # A box grown over the whole room holds every pixel with depth.
    room = anchor((0, 0, 0.5), (12, 12, 6))
    whole = error_table([action_row(room, room, scene=scene.scene_id, view_ids=views)], {scene.scene_id: scene})
    assert whole["visible_share"][0] == 1 and whole["visible_pixels"][0] > 1000
    unknown = error_table([rows[0] | {"view_ids": ["nowhere"]}], {scene.scene_id: scene})
    assert not unknown.known("in_view_share") and not alone.known("visible_pixels")


# Files ----------------------------------------------------------------------------------------------------------------


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_other_programs_are_read_for_what_they_hold(tmp_path):
    """index, scene_id, question, prediction and reference, texts of any kind."""
    texts = ["two", "<script>alert(1)</script>", "$\\frac{1}{0}$", "\x00\x1b[31m", "{" * 50_000, "", "\ud83e\uddf8"]
    rows = [
        {"index": k, "scene_id": "scene0011_00", "question": f"How many {text}?", "prediction": text, "reference": "2"}
        for k, text in enumerate(texts)
    ]
    reference = '{"action":"place_anchor","scene":"scene0011_00","center":[1,2,3],"normal":[0,1,0],"extent":[1,1,1]}'
    rows.append({"index": 9, "scene_id": "x", "question": "Where?", "prediction": "{'a': 1}", "reference": reference})
    table = read_error_table(write_rows(tmp_path / "predictions.jsonl", rows))
    assert failure_counts(table)["questions"]["right"] == 1
    assert failure_counts(table)["anchors"]["invalid text"] == 1
    assert [part.label for part in bin_scores(table, "question_type", "em")] == ["how"]
    write_error_table(table, tmp_path / "errors.csv")
    with open(tmp_path / "errors.csv", newline="") as file:
        lines = list(csv.DictReader(line.replace("\0", "") for line in file))
    assert [line["failure"] for line in lines] == table["failure"].tolist()
    assert lines[1]["prediction"] == texts[1] and lines[-1]["distance_m"] == ""


def test_texts_may_hold_what_ends_a_line_elsewhere_and_half_a_sign(tmp_path):
    text = "a\u2028b\x85c\u2029"
    rows = [question_row(text), question_row("2"), question_row("\ud83e")]
    lines = [json.dumps(rows[0], ensure_ascii=False), json.dumps(rows[1]) + "\r", json.dumps(rows[2])]
    for end in ("\n", ""):
        (tmp_path / "predictions.jsonl").write_bytes(("\n".join(lines) + end).encode())
        table = read_error_table(tmp_path / "predictions.jsonl")
        assert [row["prediction"] for row in table.rows] == [row["prediction"] for row in rows]
    write_error_table(table, tmp_path / "errors.csv")
    with open(tmp_path / "errors.csv", newline="", encoding="utf-8") as file:
        assert [line["prediction"] for line in csv.DictReader(file)] == [text, "2", "?"]


def test_one_file_may_be_named_without_a_list(tmp_path):
    path = write_rows(tmp_path / "predictions.jsonl", [question_row("2")])
    assert find_predictions(str(path)) == find_predictions(str(tmp_path)) == find_predictions([path]) == [path]


def test_bad_files_are_one_clear_error(tmp_path):
    rows = [question_row("2"), question_row("3")]
    path = write_rows(tmp_path / "predictions.jsonl", rows)
    path.write_text(path.read_text()[:-20])
    other = json.dumps(rows[0] | {"view_ids": 5}) + "\n"
    for text, said in (
        (path.read_text(), "predictions.jsonl:2"), ("", "no prediction"), ("[1]\n", ":1"), (other, ":1: view_ids"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_error_table(path)
        with pytest.raises(ValueError, match=said):
            answered(path)
    with pytest.raises(ValueError, match="missing"):
        read_error_table(tmp_path / "missing.jsonl")


def test_worst_and_examples(many):
    chosen = worst(many, 90)
    assert (chosen["hit"] == 0).all()
    assert chosen["failure"].tolist()[:20] == ["invalid text"] * 20  # about 40 of 400 are
    valid = chosen.select(chosen["failure"] != "invalid text")
    assert len(valid) and (np.diff(valid["iou_3d"]) >= 0).all()
    kept = examples(many, "right", 12)
    assert len(set(kept["scene_id"])) == 12 and set(kept["failure"]) == {"right"}


def test_the_baseline_is_the_constant_and_the_majority_of_the_training_samples(sample_files, tmp_path):
    files = [sample_files[f"{kind}_{split}"] for kind in ("anchors", "qa") for split in ("train", "val")]
    path = baseline_predictions(files, tmp_path / "base" / "predictions.jsonl")
    rows = read_predictions(path)
    train = [record for file in files for record in read_samples(file) if record["split"] == "train"]
    scores = score_predictions(rows, train=train)
    for section, control in (("anchors", "constant"), ("qa", "majority")):
        ours, theirs = (scores[section][name] for name in ("model", control))
        numbers = [name for name, value in ours.items() if isinstance(value, float)]
        assert len(numbers) > 5
        assert [ours[name] for name in numbers] == pytest.approx([theirs[name] for name in numbers])
    asked = [r for file in files for r in read_samples(file) if r["split"] != "train"]
    assert [row["question"] for row in rows] == [r.get("question") or r["instruction"] for r in asked]
    assert is_baseline(path) and list(answered(path)) == ["baseline"]
    written = path.stat().st_mtime_ns
    assert baseline_predictions(files, path).stat().st_mtime_ns == written
    path.write_text("")  # changed since: made again
    assert read_predictions(baseline_predictions(files, path)) == rows
    with pytest.raises(ValueError, match="0 others"):
        baseline_predictions(files[:1], tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"gone\.jsonl"):
        baseline_predictions([tmp_path / "gone.jsonl"], tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()
    found = asked_scenes(path, [row["scene_id"] for row in rows] + ["elsewhere"])
    assert set(found) == {row["scene_id"] for row in rows}


def test_rows_of_an_answer_come_back_in_the_scenes_frame(sample_files):
    from roomplan_lib.samples.targets import response_text

    record = read_samples(sample_files["anchors_val"])[0]
    row = prediction_row(7, record, response_text(record), "m2", {"bed"} | {b["label"] for b in record["boxes"]})
    np.testing.assert_allclose(row["action"]["center"], row["reference_action"]["center"], atol=0.02)
    assert row["index"] == 7 and row["prediction"] == row["reference"]
    assert prediction_row(0, record, "?", "m2", ())["action"] is None


def test_the_newest_run_is_looked_at_and_a_baseline_only_where_there_is_none(tmp_path, sample_files):
    runs, samples = tmp_path / "runs", Path(sample_files["anchors_val"]).parent
    settings = {"runs_dir": runs, "samples": samples, "output": runs / "analysis" / "predictions.jsonl"}
    with pytest.raises(ValueError, match="00_prepare_data"):
        find_predictions(runs_dir=runs, samples=tmp_path / "none", output=tmp_path / "x.jsonl")
    [made] = find_predictions(**settings)
    assert is_baseline(made)
    old, new = (write_rows(runs / name / "predictions.jsonl", [question_row("2")]) for name in ("old", "new"))
    old.touch()
    time.sleep(0.02)
    new.touch()
    assert find_predictions(**settings) == [new]
    assert find_predictions([runs / "old", new]) == [old, new]
    with pytest.raises(ValueError, match="nowhere"):
        find_predictions([runs / "nowhere"])
    blind, weights = runs / "new" / "predictions_blind.jsonl", runs / "new" / "predictions" / "base" / old.name
    names = run_names([old, new, blind, weights, tmp_path / "other" / "new" / old.name, new])
    assert list(names) == ["old", "new", "new_blind", "new_base", "other_new", f"{runs.name}_new"]
    names = run_names([tmp_path / "a" / "mine.jsonl", tmp_path / "b" / "mine.jsonl", tmp_path / "b" / "mine.jsonl"])
    assert list(names) == ["mine", "b_mine", "mine_3"]


def test_scores_of_a_file_are_those_kept_beside_it_or_counted(tmp_path):
    rows = [question_row(text, scene=scene) for text in ("2", "3") for scene in "ab"]
    path = write_rows(tmp_path / "run" / "predictions.jsonl", rows)
    write_rows(predictions_file(path.parent, "blind"), [row | {"prediction": "2"} for row in rows])
    scores = file_scores(path)
    assert scores["qa"]["model"]["em"] == 0.5 and scores["qa"]["blind"]["em"] == 1.0
    assert list(answered(path)) == ["model", "blind"]
    manifest_file(path).write_text(json.dumps({"sha256": "", "made_from": {"weights": "w"}}))
    kept = {"qa": {"model": {"em": 0.25}}, "made_from": {"weights": "w"}}
    (path.parent / "scores.json").write_text(json.dumps(kept))
    assert file_scores(path) == kept
    (path.parent / "scores.json").write_text(json.dumps(kept | {"made_from": {"weights": "others"}}))
    assert file_scores(path)["qa"]["model"]["em"] == 0.5


def test_every_class_has_a_rule_and_every_row_one_class(many):
    assert all(rule for classes in CLASSES.values() for rule in classes.values())
    counts = failure_counts(many)
    assert sum(sum(part.values()) for part in counts.values()) == len(many)
    assert counts["anchors"]["right"] == (many["iou_3d"] >= 0.25).sum() == many["hit"].sum()


def test_tables_need_no_torch():
    code = "import sys, roomplan_lib.evaluation.errors, roomplan_lib.evaluation.rows, roomplan_lib.viz.gallery; "
    code += "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_ten_thousand_rows_take_seconds(many):
    rows = [row | {"scene_id": f"{row['scene_id']}_{k}"} for k in range(25) for row in many.rows]
    start = time.process_time()
    table = error_table(rows)
    seconds = time.process_time() - start
    print(f"{len(table)} anchors: {seconds:.1f} s of CPU")
    assert len(table) == 10_000 and seconds < 25  # 5 on a quiet core
