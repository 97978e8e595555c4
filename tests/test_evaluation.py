"""Predictions and scores: order, frames, controls and hand-worked numbers."""

import dataclasses
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import shapely

from roomplan_lib.actions import (
    ActionError,
    ActionList,
    Measure,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceWall,
    PlanRoom,
    action_record,
    format_action,
    parse_action,
)
from roomplan_lib.evaluation.baselines import NOISE_M, TrainingAnswers, most_similar, moved, quantised
from roomplan_lib.evaluation.layout_metrics import floor_polygon
from roomplan_lib.evaluation.predict import (
    find_weights,
    first_scenes,
    first_view,
    other_scenes,
    predict,
    predict_run,
)
from roomplan_lib.evaluation.scores import (
    ActionAnswer,
    anchor_error,
    anchor_items,
    read_actions,
    read_predictions,
    score_anchors,
    score_answers,
    score_predictions,
    score_run,
)
from roomplan_lib.geometry import OrientedBox, box_iou_3d
from roomplan_lib.samples import read_samples, record_faults
from roomplan_lib.samples.targets import reference_action, response_text, scene_action
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer, train
from roomplan_lib.viz import scores_table


def anchor(center, extent=(1.0, 1.0, 1.0), category="chair", normal=(1.0, 0.0, 0.0)):
    return format_action(PlaceAnchor(category, tuple(center), normal, tuple(extent)))


def rows_of(*pairs, **more):
    return [{"scene_id": s, "question": "?", "prediction": p, "reference": r} | more for s, p, r in pairs]


def test_anchor_scores_by_hand():
    truth = anchor((0, 0, 0))
    rows = rows_of(
        ("a", anchor((0.5, 0, 0)), truth),  # IoU 1/3
        ("a", anchor((0, 3, 4)), truth),  # 5 m off
        ("b", truth, truth),
        ("b", truth[:-1], truth),  # no JSON
    )
    scores = score_anchors(read_actions(rows))
    assert scores["median_center_error_m"] == pytest.approx(0.5)
    assert scores["mean_iou_3d"] == pytest.approx((1 / 3 + 0 + 1 + 0) / 4)
    assert scores["acc_iou25"] == 0.5 and scores["acc_iou50"] == 0.25 and scores["valid_json_rate"] == 0.75
    assert scores["num_samples"] == 4 and scores["num_scenes"] == 2
    low, high = scores["ci95"]["mean_iou_3d"]
    assert low == pytest.approx(1 / 6) and high == pytest.approx(1 / 2)  # all draws of one scene or the other
    assert [scores[f"within_{d}"] for d in ("10cm", "25cm", "50cm", "1m")] == [0.25, 0.25, 0.5, 0.5]  # of all four
    assert (scores["median_horizontal_error_m"], scores["median_vertical_error_m"]) == (0.5, 0)
    nothing = score_anchors(read_actions(rows_of(("a", "", truth))))
    assert nothing["median_center_error_m"] is None and nothing["mean_iou_3d"] == 0 and nothing["yaw_error_deg"] is None
    json.dumps(nothing, allow_nan=False)
    refused = '{"action":"none","reason":"not_present"}'
    refusal = score_anchors(read_actions(rows_of(("a", refused, truth))))
    assert refusal["valid_json_rate"] == 1 and refusal["answered_rate"] == 0 and refusal["mean_iou_3d"] == 0


def test_one_scale_per_scene_is_taken_out():
    centers = [(1.0, 2.0, 0.5), (-1.5, 1.0, 0.0)]
    rows = [("a", anchor(np.multiply(c, 2), (2.0, 2.0, 2.0)), anchor(c)) for c in centers]
    rows.append(("b", anchor((1, 0, 0)), anchor((1, 0, 0))))
    scores = score_anchors(read_actions(rows_of(*rows)))
    assert scores["scaled_mean_iou_3d"] == pytest.approx(1) and scores["scaled_median_center_error_m"] < 1e-9
    assert scores["mean_iou_3d"] == pytest.approx(1 / 3)


def test_damaged_reference_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="reference"):
        anchor_error(anchor((0, 0, 0)), "nothing")


@pytest.mark.parametrize(
    "prediction, reference, match",
    [
        ("Yes.", "yes", True),
        (" the  brown table ", "brown table", True),
        ("", "yes", False),
        ("", "?", False),
        ("the", "a", False),
        ("1.5", "15", False),
        ("yes yes", "yes", False),
        ("table", "brown table", False),
    ],
)
def test_exact_match(prediction, reference, match):
    row = {"scene_id": "x", "prediction": prediction, "reference": reference}
    assert score_answers([row])["em"] == match
    assert score_answers([row | {"answers": ["other", reference]}])["em"] == match


def test_answers_are_grouped_and_scored_as_papers_do():
    sqa3d = {"task": "sqa3d", "source": "sqa3d"}
    rows = [
        sqa3d | {"scene_id": "x", "question_type": "how", "prediction": "2", "reference": "two"},
        sqa3d | {"scene_id": "y", "question_type": "is", "prediction": "", "reference": "yes"},
        {"scene_id": "y", "task": "scanqa", "source": "scanqa", "prediction": "2", "reference": "2"},
    ]
    rows[2]["answers"] = ["2", "two"]
    scores = score_answers(rows)
    assert scores["em"] == pytest.approx(2 / 3) and scores["em_by_task"] == {"scanqa": 1.0, "sqa3d": 0.5}
    assert scores["by_question_type"]["how"] == {"em": 1.0, "em_refined": 1.0, "num_samples": 1}
    assert scores["published"]["sqa3d"]["leo"]["em"] == 0.5
    low, high = scores["published"]["sqa3d"]["leo"]["ci95"]["em"]
    assert (low, high) == (0, 1) and scores["published"]["sqa3d"]["leo"]["num_scenes"] == 2
    assert scores["published"]["scanqa"]["gpt4scene"]["em"] == 1  # "two" stands among the answers as it is
    assert {"bleu_4", "rouge_l", "cider", "em_refined"} <= set(scores["ci95"])


# Baselines ------------------------------------------------------------------------------------------------------------


def test_constant_and_majority_know_only_training_answers(sample_files):
    train = read_samples(sample_files["anchors_train"])
    known = TrainingAnswers(train)
    chairs = [reference_action(r) for r in train if scene_action(r).category == "chair"]
    chair, unseen = (known.constant(PlaceAnchor(label, (0, 0, 0), (1, 0, 0), (1, 1, 1))) for label in ("chair", "lamp"))
    assert chair.center == pytest.approx(np.median([c.center for c in chairs], axis=0), abs=0.0051)  # as text has it
    assert unseen != chair and known.constant(ActionList((chair,))) == ActionList((chair,))
    assert known.constant(PlanRoom(())) is None and TrainingAnswers([]).constant(chair) is None
    answers = [{"task": "t", "question": "?", "answer": a} for a in ("2", "1", "2")]
    known = TrainingAnswers([*answers, {"task": "u", "question": "?", "answer": "yes"}])
    assert known.majority(["t", "u", "new"]) == ["2", "yes", "2"]
    assert TrainingAnswers([]).majority(["t"]) == [None]


def test_retrieval_takes_the_most_similar_words():
    def jaccard(a, b):
        return len(a & b) / len(a | b)

    rng = np.random.default_rng(0)
    sets = [frozenset(map(str, rng.integers(12, size=rng.integers(1, 7)))) for _ in range(400)]
    queries, candidates = sets[:300], sets[300:]
    expected = [max(range(100), key=lambda j: (jaccard(q, candidates[j]), -j)) for q in queries]
    assert most_similar(queries, candidates).tolist() == expected
    assert most_similar([frozenset({"new"})], candidates).tolist() == [0]
    records = [
        {"task": "color", "question": "What color is the red sofa?", "answer": "red"},
        {"task": "color", "question": "What color is the table?", "answer": "brown"},
        {"task": "count", "question": "What color is the sofa?", "answer": "2"},
    ]
    known = TrainingAnswers(records)
    rows = [{"task": task, "question": "What color is the sofa?"} for task in ("color", "count", "new")]
    assert known.retrieved(rows, is_action=False) == [0, 2, 2]  # of its task; of all where the task is new
    assert known.retrieved(rows, is_action=True) == [None] * 3


def test_the_constant_plan_is_the_room_of_medians():
    """The reference frame of a camera that looks along y at the origin is the scene's own."""
    look = {"R": [[1, 0, 0, 0, 0, 1, 0, -1, 0]], "t": [[0, 0, 0]]}

    def record(width, depth, *labels):
        corners = [(0.0, 0.0), (width, 0.0), (width, depth), (0.0, depth)]
        walls = [PlaceWall(a, b, -1.5, 2.5) for a, b in zip(corners, corners[1:] + corners[:1], strict=True)]
        things = [PlaceAnchor(label, (width / 2, 1.0, 0.0), (1.0, 0.0, 0.0), (0.5, 0.6, 1.0)) for label in labels]
        action = json.dumps(action_record(PlanRoom((*walls, *things))))
        return {
            "task": "plan_room",
            "instruction": "Plan it.",
            "action_json": action,
            "geom_token": look,
            "scene_id": "s",
        }

    records = [record(3.0, 4.0, "bed"), record(5.0, 4.0, "bed", "sofa"), record(4.0, 3.0, "sofa", "bed")]
    plan = TrainingAnswers(records).constant(PlanRoom(()))
    assert floor_polygon(plan).equals(shapely.box(0, 0, 4, 4))
    assert [item.z + item.height for item in plan.actions[:4]] == [1.0] * 4
    # the sofa too, since two rooms of three have one; its places are 2.5 and 2
    assert [(item.category, item.center[0]) for item in plan.actions[4:]] == [("bed", 2.0), ("sofa", 2.25)]
    own = [{"scene_id": "s", "question": "Plan it.", "prediction": "", "reference": response_text(records[0])}]
    scores = score_predictions(own, train=records)["plans"]
    assert scores["constant"]["floor_iou"] == pytest.approx(12 / 16) and scores["retrieval"]["f1_iou50"] == 1


def test_noise_and_text_move_places_by_what_they_say():
    chair = PlaceAnchor("chair", (123.4567, -7.0, 0.333), (math.cos(0.5), math.sin(0.5), 0.0), (0.5, 0.6, 0.7))
    wall = PlaceWall((0.0, 0.0), (4.0, 0.0), 0.0, 2.5)
    plan = PlanRoom((wall, PlaceDoor(0, (1.0, 0.0, 1.0), 0.9, 2.0), chair))
    rng = np.random.default_rng(0)
    for distance in NOISE_M.values():
        assert math.dist(moved(chair, distance, rng).center, chair.center) == pytest.approx(distance)
        new_wall, door, new_chair = moved(plan, distance, rng).actions
        places = [
            (new_wall.a, wall.a),
            (new_wall.b, wall.b),
            (door.center, (1, 0, 1)),
            (new_chair.center, chair.center),
        ]
        assert [math.dist(*pair) for pair in places] == pytest.approx([distance] * 4)
    assert moved(NoAction("ambiguous"), 1.0, rng) == NoAction("ambiguous")
    for codec in ("m2", "cm"):
        read = quantised(chair, codec)  # 123 m is beyond the codec, which a shift by whole metres mends
        assert read.center == pytest.approx((123.46, -7.0, 0.33)) and read.normal == (0.88, 0.48, 0.0)
    assert quantised(ActionList((chair, chair))).actions[1].center == pytest.approx((123.46, -7.0, 0.33))


def test_a_file_of_five_keys_can_be_scored():
    """Questions and anchors, without anything but scene, question, prediction and reference."""
    truth = '{"action":"place_anchor","scene":"1","center":[0.123456,0,0],"normal":[0,1,0],"extent":[1,1,1]}'
    rows = [
        {"index": 0, "scene_id": "1", "question": "Where?", "prediction": anchor((0, 0, 0)), "reference": truth},
        {"index": 1, "scene_id": "1", "question": "What color?", "prediction": "Brown.", "reference": "brown"},
        {"index": 2, "scene_id": "2", "question": "What color?", "prediction": "", "reference": ""},  # hidden
    ]
    scores = score_predictions(rows)
    assert set(scores) == {"anchors", "language", "qa", "protocols"}
    assert scores["anchors"]["model"]["median_center_error_m"] == pytest.approx(0.123456)
    assert set(scores["anchors"]) == {"model", *NOISE_M}
    errors = [scores["anchors"][name]["median_center_error_m"] for name in NOISE_M]
    assert errors == pytest.approx(list(NOISE_M.values()))
    assert scores["qa"]["model"]["em"] == 1 and scores["qa"]["model"]["num_samples"] == 1
    for key, value in (("prediction", None), ("scene_id", 3), ("answers", "brown")):
        with pytest.raises(ValueError, match=f"model row 1: {key}: expected"):
            score_predictions([rows[0], rows[1] | {key: value}])
    with pytest.raises(ValueError, match="no predictions"):
        score_predictions([])
    assert "| truth moved by 20 cm" in scores_table(scores)


def test_lists_refusals_and_plans_have_tables_of_their_own():
    chairs = [parse_action(anchor((float(x), 1.0, 0.5))) for x in range(4)]
    two, none = format_action(ActionList(tuple(chairs[:2]))), '{"action":"none","reason":"not_present"}'
    walls = [((0, 0), (4, 0)), ((4, 0), (4, 3)), ((4, 3), (0, 3)), ((0, 3), (0, 0))]
    plan = PlanRoom((*(PlaceWall(a, b, 0.0, 2.5) for a, b in walls), PlaceDoor(0, (2, 0, 1), 0.9, 2.0), *chairs))
    text = format_action(plan)
    rows = rows_of(
        ("a", two, format_action(ActionList(tuple(chairs[:3])))),
        ("a", none, two),
        ("b", two, two),
        ("b", none, none),
        ("c", anchor((0, 0, 0)), none),
        ("c", text, text),
        ("d", "{", text),
    )
    scores = score_predictions(rows)
    lists = scores["lists"]["model"]
    assert lists["f1_iou25"] == pytest.approx(2 * 4 / (4 + 7)) and lists["num_samples"] == 3
    assert lists["recall_iou25"] == pytest.approx(4 / 7) and lists["precision_iou25"] == 1
    assert lists["query_f1_iou25"] == pytest.approx((0.8 + 0 + 1) / 3)
    assert scores["lists"]["noise_5cm"]["f1_iou50"] == 1
    plans = scores["plans"]["model"]
    assert plans["f1_iou25"] == pytest.approx(2 * 5 / 15) and plans["floor_iou"] == 0.5 and plans["corner_error_m"] == 0
    assert plans["object_f1_iou25"] == pytest.approx(2 * 4 / 12) and plans["valid_json_rate"] == 0.5
    language = scores["language"]["model"]
    assert language["abstain_precision"] == language["abstain_recall"] == 0.5
    assert language["type_accuracy"] == pytest.approx(4 / 7) and language["valid_rate"] == pytest.approx(6 / 7)
    assert language["confusion"]["none"] == {"none": 1, "place_anchor": 1}
    assert language["confusion"]["plan_room"] == {"invalid": 1, "plan_room": 1}
    json.dumps(scores, allow_nan=False)
    table = scores_table(scores)
    assert "Whole rooms: 2 samples of 2 scenes" in table and "Lists of anchors: 3 samples of 2 scenes" in table


def test_a_grammar_is_compared_with_none():
    truth = anchor((0, 0, 0))
    rows = rows_of(("a", truth, truth), unconstrained=truth[:-1], confidence=[0.9])
    rows += rows_of(("b", truth, truth), unconstrained=truth, confidence=[0.5])
    scores = score_predictions(rows)
    assert scores["language"]["model"]["valid_rate"] == 1 and scores["language"]["unconstrained"]["valid_rate"] == 0.5
    assert scores["anchors"]["unconstrained"]["mean_iou_3d"] == 0.5


def test_average_precision_where_rows_hold_confidences():
    here, away = parse_action(anchor((0, 0, 0))), parse_action(anchor((9, 0, 0)))
    texts = [format_action(ActionList(part)) for part in ((here, away), (here,))]
    wanted = format_action(ActionList((here, replace(here, center=(5.0, 0.0, 0.0)))))
    rows = rows_of(("a", texts[0], wanted), ("b", texts[1], wanted))
    rows = [row | {"confidence": sure} for row, sure in zip(rows, ([0.9, 0.8], [0.7]), strict=True)]
    scores = score_predictions(rows)["lists"]["model"]
    # right, wrong, right of four: precision 1 up to recall 1/4, then 2/3 up to 1/2
    assert scores["ap_iou25"] == scores["ap_iou50"] == pytest.approx(1 / 4 + 2 / 3 / 4)
    assert scores["ap3d"] == pytest.approx((26 * 1 + 25 * 2 / 3) / 101)
    del rows[0]["confidence"]
    assert "ap_iou25" not in score_predictions(rows)["lists"]["model"]


def test_multi3drefer_rows_count_by_their_type():
    chair = anchor((0, 0, 0))
    none = '{"action":"none","reason":"not_present"}'
    rows = rows_of(("a", none, none), ("a", chair, none), ("b", f"[{chair}]", chair), task="multi3drefer")
    kinds = ("zt_wo_d", "zt_w_d", "st_wo_d")
    rows = [row | {"eval_type": kind} for kind, row in zip(kinds, rows, strict=True)]
    scores = score_predictions(rows)["lists"]["model"]
    assert {kind: part["query_f1_iou25"] for kind, part in scores["by_eval_type"].items()} == {
        "zt_wo_d": 1, "zt_w_d": 0, "st_wo_d": 1,
    }  # fmt: skip
    assert scores["query_f1_iou25"] == pytest.approx(2 / 3)


def test_scanrefer_rows_count_unique_and_multiple_apart():
    truth = anchor((0, 0, 0))
    rows = rows_of(("a", truth, truth), ("a", anchor((0.3, 0, 0)), truth), ("b", anchor((3, 0, 0)), truth))
    kinds = ("unique", "multiple", "multiple")
    rows = [row | {"eval_type": kind} for kind, row in zip(kinds, rows, strict=True)]
    groups = score_predictions(rows)["anchors"]["model"]["by_eval_type"]
    assert groups["unique"]["acc_bounds50"] == 1 and groups["multiple"]["acc_bounds50"] == 0.5
    assert groups["multiple"]["num_samples"] == 2


def test_captions_are_scored_as_scan2cap_does():
    captions = [
        ("a", "A brown chair next to the desk.", ["A brown chair next to the desk.", "The chair is brown."]),
        ("a", "", ["A white table."]),
        ("b", "", ["A small box on the floor."]),
    ]
    rows = [row | {"answers": texts} for *pair, texts in captions for row in rows_of((*pair, ""), task="scan2cap")]
    scores = score_predictions(rows)
    assert set(scores) == {"captions", "protocols"}
    golden = {"bleu_4": 0.473268, "rouge_l": 0.630461, "cider": 1.862381}  # GPT4Scene's evaluator
    assert {key: scores["captions"]["model"][key] for key in golden} == pytest.approx(golden, abs=6e-7)


# Predictions ----------------------------------------------------------------------------------------------------------


def test_reference_frame_text_is_the_scene_box(sample_files):
    """The text that the model must write, brought back by the poses of the record, is the annotated box."""
    for record in read_samples(sample_files["anchors_train"])[::5]:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = np.reshape(record["geom_token"]["R"][0], (3, 3)), record["geom_token"]["t"][0]
        written = json.loads(response_text(record))
        assert "scene" not in written
        forward, up = pose[:3, 2], np.array([0, 0, 1.0])
        ahead = np.array([forward[0], forward[1], 0]) / math.hypot(forward[0], forward[1])
        right = np.cross(ahead, up)
        center = pose[:3, 3] + np.array([right, ahead, up]).T @ written["center"]
        box = record["boxes"][0]
        assert np.linalg.norm(center - box["center"]) < 0.01
        truth = OrientedBox(box["center"], box["extent"], np.reshape(box["rotation"], (3, 3)))
        assert box_iou_3d(scene_action(record).to_box(), truth) > 0.99


@pytest.fixture
def base(tiny_config):
    samples = load_samples(tiny_config.data.eval_files)
    tokenizer = make_tokenizer(tiny_config, load_samples(tiny_config.data.train_files))
    model = make_model(tiny_config, tokenizer).eval()
    return model, tokenizer, make_collator(model, tokenizer, tiny_config.data), samples


def test_predictions_keep_their_order_whatever_the_batch(base):
    model, tokenizer, collator, samples = base
    samples = samples[::3]
    together = predict(model, tokenizer, collator, samples, max_new_tokens=5, batch_size=16, progress=False)
    single = predict(model, tokenizer, collator, samples, max_new_tokens=5, batch_size=1, progress=False)
    assert together == single
    assert [row["index"] for row in together] == list(range(len(samples)))
    assert [row["scene_id"] for row in together] == [s.record["scene_id"] for s in samples]
    with pytest.raises(ValueError, match="control"):
        predict(model, tokenizer, collator, samples, control="deaf")


def test_controls_change_what_is_shown(base):
    model, tokenizer, collator, samples = base
    for sample, other in zip(samples, other_scenes(samples, samples), strict=True):
        assert other.record["scene_id"] != sample.record["scene_id"]
    one_scene = first_scenes(samples, 1)
    assert {s.record["scene_id"] for s in one_scene} == {samples[0].record["scene_id"]}
    with pytest.raises(ValueError, match="second scene"):
        other_scenes(one_scene, one_scene)
    batch = collator(samples[:1], generate=True, views=[other_scenes(samples[:1], samples)[0]])
    own = collator(samples[:1], generate=True)
    assert (batch["input_ids"] == own["input_ids"]).all()  # the same question
    assert not np.array_equal(batch["pixel_values"][0], own["pixel_values"][0])
    first = collator(samples[:1], generate=True, views=[first_view(samples[0])])
    assert (first["input_ids"] == own["input_ids"]).all()
    for key in ("pixel_values", "geometry_records", *(k for k in ("patch_coordinates", "patch_valid") if k in own)):
        assert len(own[key][0]) > 1 and len(first[key][0]) == 1
        assert (first[key][0] == own[key][0][:1]).all(), key
    assert not list(record_faults(first_view(samples[0]).record))
    alone = predict(model, tokenizer, collator, samples[:2], control="one_view", max_new_tokens=2)
    assert [row["reference"] for row in alone] == [
        row["reference"] for row in predict(model, tokenizer, collator, samples[:2], max_new_tokens=2)
    ]


def test_predicted_actions_return_to_the_scene_frame(base, monkeypatch):
    """With the right text in the reference frame, the action in the scene's frame is the annotated one."""
    model, tokenizer, collator, samples = base
    samples = [s for s in samples if "action_json" in s.record]
    texts = iter([response_text(s.record) for s in sorted(samples, key=lambda s: (str(s.view_key), s.record["task"]))])
    monkeypatch.setattr(tokenizer.__class__, "batch_decode", lambda self, ids, **_: [next(texts) for _ in ids])
    for row in predict(model, tokenizer, collator, samples, max_new_tokens=1, progress=False):
        assert row["action"]["scene"] == row["scene_id"] == row["reference_action"]["scene"]
        assert row["action"]["center"] == pytest.approx(row["reference_action"]["center"], abs=0.01)
        boxes = [parse_action(json.dumps(row[key])).to_box() for key in ("action", "reference_action")]
        assert box_iou_3d(*boxes) > 0.8


def test_run_is_predicted_scored_and_reused(tiny_config, capsys):
    with pytest.raises(ValueError, match="no trained model"):
        find_weights(tiny_config, None)
    run_dir = train(tiny_config)
    assert predict_run(tiny_config) == run_dir
    scores = score_run(tiny_config)
    assert json.loads((run_dir / "scores.json").read_text()) == json.loads(json.dumps(scores))
    of_the_truth = {*NOISE_M, "quantised"}
    assert set(scores["anchors"]) == {"model", "blind", "shuffled", "constant", "retrieval"} | of_the_truth
    assert set(scores["qa"]) == {"model", "blind", "shuffled", "majority", "retrieval"}
    assert {"model", "blind", "shuffled", "constant", "quantised"} <= set(scores["language"])
    for name, distance in NOISE_M.items():
        assert scores["anchors"][name]["median_center_error_m"] == pytest.approx(distance)
    quantised_scores = scores["anchors"]["quantised"]
    assert quantised_scores["mean_iou_3d"] > 0.93 and 0 < quantised_scores["median_center_error_m"] < 0.009
    assert all(name in scores_table(scores) for name in ("retrieval", "truth moved by 5 cm", "truth as text has it"))
    rows = read_predictions(run_dir / "predictions.jsonl")
    assert len(rows) == sum(len(read_samples(file)) for file in tiny_config.data.eval_files)
    assert {"index", "scene_id", "question", "prediction", "reference"} <= set(rows[0])
    assert scores["anchors"]["constant"]["valid_json_rate"] == 1
    assert scores["made_from"]["checkpoint"] == "model"
    capsys.readouterr()
    predict_run(tiny_config)
    assert capsys.readouterr().out.count("reused") == 3


def test_other_weights_and_settings_leave_the_runs_results_alone(tiny_config):
    run_dir = train(tiny_config)
    predict_run(tiny_config)
    score_run(tiny_config)
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.json*")}
    folder = predict_run(tiny_config, "base", num_scenes=1)
    assert folder == run_dir / "predictions" / "base_scenes-1"
    assert len({row["scene_id"] for row in read_predictions(folder / "predictions.jsonl")}) == 1
    assert score_run(tiny_config, folder)["made_from"]["checkpoint"] == "base"
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.json*")} == before
    shutil.copy(folder / "predictions_blind.jsonl", run_dir)
    shutil.copy(folder / "predictions_blind.manifest.json", run_dir)
    with pytest.raises(ValueError, match="predictions_blind.jsonl was made from other weights"):
        score_run(tiny_config)
    with pytest.raises(ValueError, match="no model here"):
        predict_run(tiny_config, run_dir / "nowhere")
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda, got 'gqu'"):
        predict_run(tiny_config, device="gqu")


def test_damaged_predictions_are_named_and_made_again(tiny_config):
    path = train(tiny_config) / "predictions.jsonl"
    predict_run(tiny_config)
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"predictions.jsonl:\d+.*predict again"):
        score_run(tiny_config)
    predict_run(tiny_config)
    assert path.read_text() == whole


def test_settings_of_the_run_choose_the_controls(tiny_config):
    config = dataclasses.replace(
        tiny_config, prediction=dataclasses.replace(tiny_config.prediction, controls=("one_view",))
    )
    train(config)
    folder = predict_run(config)
    assert {path.name for path in folder.glob("predictions*.jsonl")} == {
        "predictions.jsonl", "predictions_one_view.jsonl"
    }  # fmt: skip
    scores = score_run(config)["anchors"]
    assert not {"blind", "shuffled"} & set(scores) and "one_view" in scores


@pytest.mark.parametrize("text", ["", "garbage", '{"action":"place_anchor"}'])
@pytest.mark.parametrize("reference", ['{"action":"none","reason":"not_present"}', "[]"])
def test_text_that_is_no_action_is_no_right_refusal(text, reference):
    row = {"scene_id": "s", "question": "q", "task": "multi3drefer", "eval_type": "zt_wo_d", "reference": reference}
    scores = score_predictions([row | {"prediction": text}])["lists"]["model"]
    assert scores["query_f1_iou25"] == scores["by_eval_type"]["zt_wo_d"]["query_f1_iou25"] == 0
    right = score_predictions([row | {"prediction": reference}])["lists"]["model"]
    assert right["query_f1_iou25"] == 1


def test_controls_must_answer_the_same_questions():
    rows = [{"scene_id": "s", "question": q, "prediction": "a", "reference": "a"} for q in ("1", "2")]
    with pytest.raises(ValueError, match="blind: 1 rows that are not the same questions"):
        score_predictions(rows, controls={"blind": rows[:1]})


@pytest.mark.parametrize("confidence", [["x"], [float("nan")], 0.5])
def test_confidences_that_are_no_numbers_are_named(confidence):
    row = {"scene_id": "s", "question": "q", "prediction": "[]", "reference": "[]", "confidence": confidence}
    with pytest.raises(ValueError, match="model row 0: confidence"):
        score_predictions([row])


def test_planes_are_scored_in_their_plane():
    """A floor of 4 x 2 m, turned by 30 degrees, and a wall of 3 x 2 m, each answered half a side too far along."""
    turn = math.radians(30)
    along = np.array([math.cos(turn), math.sin(turn), 0])
    floor = PlaceAnchor("", (1.0, 1.0, -1.5), (0.0, 0.0, 1.0), (4.0, 2.0, 0.01), yaw=30)
    wall = PlaceAnchor("", (0.0, 3.0, 0.0), (-math.sin(turn), math.cos(turn), 0.0), (0.01, 3.0, 2.0))
    chair = PlaceAnchor("chair", (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def shifted(anchor, step):
        return replace(anchor, center=tuple(np.add(anchor.center, step)))

    def iou(said, true):
        answer = ActionAnswer({"scene_id": "s"}, "", said, true)
        return float(anchor_items([answer])["plane_iou"][0])

    assert iou(floor, floor) == pytest.approx(1) and iou(shifted(floor, 2 * along), floor) == pytest.approx(1 / 3)
    assert iou(wall, wall) == pytest.approx(1) and iou(shifted(wall, 1.5 * along), wall) == pytest.approx(1 / 3)
    assert iou(shifted(floor, (0, 0, 0.15)), floor) == pytest.approx(1)  # as boxes of 1 cm they share nothing
    assert iou(shifted(floor, (0, 0, 0.25)), floor) == 0 and iou(floor, wall) == 0 and iou(chair, floor) < 0.3
    assert iou(ActionError("?"), floor) == 0 and math.isnan(iou(chair, chair))
    rows = rows_of(("a", format_action(floor), format_action(floor)), ("b", "no", format_action(wall)))
    scores = score_predictions(rows + rows_of(("b", format_action(chair), format_action(chair))))["anchors"]["model"]
    assert scores["mean_plane_iou"] == scores["acc_plane50"] == 0.5 and scores["mean_iou_3d"] == pytest.approx(2 / 3)
    assert "mean_plane_iou" not in score_predictions(rows_of(("b", "no", format_action(chair))))["anchors"]["model"]


def test_constant_planes_are_level_or_upright_as_asked():
    look = {"R": [[1, 0, 0, 0, 0, 1, 0, -1, 0]], "t": [[0, 0, 0]]}  # the reference frame is the scene's own

    def record(anchor):
        return {
            "task": "place_plane",
            "instruction": "Anchor it.",
            "action_json": json.dumps(action_record(anchor)),
            "geom_token": look,
            "scene_id": "s",
        }

    floors = [PlaceAnchor("", (0.0, 1.0, z), (0.0, 0.0, 1.0), (4.0, 3.0, 0.01), yaw=10) for z in (-1.4, -1.5, -1.6)]
    walls = [PlaceAnchor("", (x, 2.0, 0.0), (1.0, 0.0, 0.0), (0.01, 3.0, 2.5)) for x in (1.0, 2.0, 4.0)]
    known = TrainingAnswers([record(anchor) for anchor in floors + walls])
    floor, wall = known.constant(floors[0]), known.constant(walls[0])
    assert floor.center == (0.0, 1.0, -1.5) and floor.normal == (0.0, 0.0, 1.0) and floor.extent == (4.0, 3.0, 0.01)
    assert floor.yaw == 10 and wall.center == (2.0, 2.0, 0.0) and wall.level and wall.extent == (0.01, 3.0, 2.5)


def test_measures_have_a_table_of_their_own():
    """Distances of 2 and 4 m; training knows 1, 3 and 8."""

    def text(value, quantity="distance"):
        return format_action(Measure(quantity, 0, 1 if quantity == "distance" else None, value))

    look = {"R": [[1, 0, 0, 0, 0, 1, 0, -1, 0]], "t": [[0, 0, 0]]}
    train = [
        {
            "task": "measure",
            "instruction": f"How far, {v}?",
            "action_json": text(v),
            "geom_token": look,
            "scene_id": "s",
        }
        for v in (1.0, 8.0, 3.0)
    ]
    rows = rows_of(("a", text(2.1), text(2.0)), ("b", text(4.0, "width"), text(4.0)), ("b", text(1.5), text(1.0)))
    scores = score_predictions([row | {"question": "How far, 8.0?"} for row in rows], train=train)
    model = scores["measures"]["model"]
    assert model["coverage"] == model["within_10pct"] * 2 == pytest.approx(2 / 3) and model["num_scenes"] == 2
    assert model["relative_error"] == pytest.approx((0.05 + 0.5) / 2) and model["valid_json_rate"] == 1
    assert scores["measures"]["constant"]["abs_error"] == pytest.approx((1 + 1 + 2) / 3)  # 3 m, whatever is asked
    assert scores["measures"]["retrieval"]["abs_error"] == pytest.approx((6 + 4 + 7) / 3)
    assert not set(NOISE_M) & set(scores["measures"]) and model["by_quantity"]["distance"]["num_samples"] == 3
    assert "Measures: 3 samples of 2 scenes" in scores_table(scores)


def test_every_row_is_read_by_its_own_codec():
    rows = rows_of(("a", anchor((0, 0, 0)), anchor((0, 0, 0))))
    centimetres = format_action(parse_action(anchor((1, 0, 0))), "cm")
    rows += [row | {"codec": "cm"} for row in rows_of(("b", f"Here: {centimetres}", centimetres))]
    assert score_predictions(rows)["language"]["model"]["extra_text_rate"] == 0.5


def test_planes_are_told_apart_from_objects():
    anchor = '{"action":"place_anchor","center":[0,0,0],"normal":[1,0,0],"extent":[1,1,1]}'
    rows = [
        {"scene_id": "s", "question": str(i), "task": task, "prediction": said, "reference": anchor}
        for i, (task, said) in enumerate((("place_anchor", anchor), ("place_plane", "no")))
    ]
    by_task = score_predictions(rows)["anchors"]["model"]["by_task"]
    assert by_task["place_anchor"]["acc_iou25"] == 1 and by_task["place_plane"]["acc_iou25"] == 0
