"""Predictions and scores: order, frames, controls and hand-worked numbers."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest

from roomplan_lib.actions import PlaceAnchor, format_action
from roomplan_lib.evaluation.predict import find_weights, first_scenes, other_scenes, predict, predict_run
from roomplan_lib.evaluation.scores import (
    anchor_error,
    constant_predictions,
    exact_match,
    majority_predictions,
    read_predictions,
    score_anchors,
    score_answers,
    score_run,
)
from roomplan_lib.geometry import OrientedBox, box_iou_3d
from roomplan_lib.samples import read_samples
from roomplan_lib.samples.targets import reference_action, response_text, scene_action
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer, train


def anchor(center, extent=(1.0, 1.0, 1.0), category="chair", normal=(1.0, 0.0, 0.0)):
    return format_action(PlaceAnchor(category, tuple(center), normal, tuple(extent)))


def test_anchor_scores_by_hand():
    truth = anchor((0, 0, 0))
    rows = [
        {"scene_id": "a", "prediction": anchor((0.5, 0, 0)), "reference": truth},  # IoU 1/3
        {"scene_id": "a", "prediction": anchor((0, 3, 4)), "reference": truth},  # 5 m off
        {"scene_id": "b", "prediction": truth, "reference": truth},
        {"scene_id": "b", "prediction": truth[:-1], "reference": truth},  # no JSON
    ]
    scores = score_anchors(rows)
    assert scores["median_center_error_m"] == pytest.approx(0.5)
    assert scores["mean_iou_3d"] == pytest.approx((1 / 3 + 0 + 1 + 0) / 4)
    assert scores["acc_iou25"] == 0.5 and scores["valid_json_rate"] == 0.75
    assert scores["num_samples"] == 4 and scores["num_scenes"] == 2
    low, high = scores["ci95"]["mean_iou_3d"]
    assert low == pytest.approx(1 / 6) and high == pytest.approx(1 / 2)  # all draws of one scene or the other
    nothing = score_anchors([{"scene_id": "a", "prediction": "", "reference": truth}])
    assert nothing["median_center_error_m"] is None and nothing["mean_iou_3d"] == 0
    json.dumps(nothing, allow_nan=False)


def test_damaged_reference_is_an_error_not_a_score():
    with pytest.raises(ValueError, match="reference"):
        anchor_error(anchor((0, 0, 0)), "nothing")


@pytest.mark.parametrize(
    "prediction, reference, match",
    [
        ("Yes.", "yes", True),
        (" the  brown table ", "brown table", True),
        ("", "yes", False),
        ("", "", False),
        ("the", "a", False),
        ("1.5", "15", False),
        ("yes yes", "yes", False),
        ("table", "brown table", False),
    ],
)
def test_exact_match(prediction, reference, match):
    assert exact_match(prediction, [reference]) is match
    assert exact_match(prediction, ["other", reference]) is match


def test_constant_and_majority_know_only_training_answers(sample_files):
    train = read_samples(sample_files["anchors_train"])
    rows = [{"scene_id": "x", "reference": "", "reference_action": {"category": label}} for label in ("chair", "none")]
    chairs = [reference_action(r) for r in train if scene_action(r).category == "chair"]
    predicted = json.loads(constant_predictions(train, rows)[0]["prediction"])
    assert predicted["center"] == pytest.approx(np.median([c.center for c in chairs], axis=0), abs=0.0051)
    assert constant_predictions(train, rows)[1]["prediction"] != constant_predictions(train, rows)[0]["prediction"]
    answers = [{"task": "t", "answer": a} for a in ("2", "1", "2")] + [{"task": "u", "answer": "yes"}]
    rows = [{"scene_id": "x", "task": task, "reference": ""} for task in ("t", "u", "new")]
    assert [row["prediction"] for row in majority_predictions(answers, rows)] == ["2", "yes", "2"]
    score = score_answers([{"scene_id": "x", "task": "t", "prediction": "2", "reference": "2"}])
    assert score["em"] == 1 and score["em_by_task"] == {"t": 1.0}


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


def test_predicted_actions_return_to_the_scene_frame(base, monkeypatch):
    """With the right text in the reference frame, the action in the scene's frame is the annotated one."""
    model, tokenizer, collator, samples = base
    samples = [s for s in samples if "action_json" in s.record]
    texts = iter([response_text(s.record) for s in sorted(samples, key=lambda s: (str(s.view_key), s.record["task"]))])
    monkeypatch.setattr(tokenizer.__class__, "batch_decode", lambda self, ids, **_: [next(texts) for _ in ids])
    for row in predict(model, tokenizer, collator, samples, max_new_tokens=1, progress=False):
        assert row["action"]["scene"] == row["scene_id"] == row["reference_action"]["scene"]
        assert row["action"]["center"] == pytest.approx(row["reference_action"]["center"], abs=0.01)
        boxes = [PlaceAnchor(**row[key]).to_box() for key in ("action", "reference_action")]
        assert box_iou_3d(*boxes) > 0.8


def test_run_is_predicted_scored_and_reused(tiny_config, capsys):
    with pytest.raises(ValueError, match="no trained model"):
        find_weights(tiny_config, None)
    run_dir = train(tiny_config)
    assert predict_run(tiny_config) == run_dir
    scores = score_run(tiny_config)
    assert json.loads((run_dir / "scores.json").read_text()) == json.loads(json.dumps(scores))
    assert set(scores["anchors"]) == {"model", "blind", "shuffled", "constant"}
    assert set(scores["qa"]) == {"model", "blind", "shuffled", "majority"}
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
    config = dataclasses.replace(tiny_config, prediction=dataclasses.replace(tiny_config.prediction, controls=()))
    train(config)
    folder = predict_run(config)
    assert [path.name for path in folder.glob("predictions*.jsonl")] == ["predictions.jsonl"]
    assert set(score_run(config)["anchors"]) == {"model", "constant"}
