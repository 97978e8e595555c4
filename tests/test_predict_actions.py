"""Predictions of actions: held to the grammar by one switch, in every codec, for lists, refusals and plans."""

import dataclasses
import json

import pytest

from roomplan_lib.actions import ActionError, ActionList, NoAction, PlanRoom, parse_action
from roomplan_lib.actions.decoding import GrammarEngine
from roomplan_lib.evaluation.predict import (
    Constraint,
    predict,
    predict_rows,
    predict_run,
    training_grammar,
    used_language,
)
from roomplan_lib.evaluation.scores import read_predictions, score_run
from roomplan_lib.samples import read_samples, sample_root, write_samples
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.samples.targets import response_text, scene_action
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import load_model_folder, make_collator, train

TASKS = ("anchors", "lists", "negatives", "plans")


@pytest.fixture(scope="module")
def action_files(rooms_root, tmp_path_factory):
    return prepare_arkitscenes(
        rooms_root, tmp_path_factory.mktemp("actions"), num_views=3, tasks=TASKS, workers=1, progress=False
    )


def run_config(tiny_config, files, **data):
    named = {
        f"{split}_files": tuple(str(files[f"{task}_{part}"]) for task in TASKS if f"{task}_{part}" in files)
        for split, part in (("train", "train"), ("eval", "val"))
    }
    return dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, max_length=4096, **named, **data),
        training=dataclasses.replace(tiny_config.training, max_steps=2, eval_every_steps=0),
        prediction=dataclasses.replace(
            tiny_config.prediction, num_scenes=1, max_new_tokens=1500, constrained="llguidance", controls=("blind",)
        ),
    )


@pytest.mark.parametrize("codec", ["m2", "cm"])
def test_every_constrained_action_is_valid_and_what_the_model_writes_alone_is_kept(tiny_config, action_files, codec):
    config = run_config(tiny_config, action_files, codec=codec)
    train(config)
    folder = predict_run(config)
    for name in ("predictions.jsonl", "predictions_blind.jsonl"):
        rows = read_predictions(folder / name)
        assert {row["task"] for row in rows} >= {"place_anchor", "plan_room", "none"}
        for row in rows:
            assert not isinstance(parse_action(row["prediction"], codec=codec), ActionError), row["prediction"]
            assert row["action"] is not None and "error" not in row
            assert all(0 <= confidence <= 1 for confidence in row["confidence"])
        # Two steps teach no JSON: without the grammar hardly any text is an action.
        alone = [parse_action(row["unconstrained"], codec=codec) for row in rows]
        assert sum(isinstance(action, ActionError) for action in alone) > len(rows) / 2
    scores = score_run(config)
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(scores))


def test_switching_the_grammar_off_gives_predictions_of_their_own(tiny_config, action_files):
    config = run_config(tiny_config, action_files)
    config = dataclasses.replace(config, prediction=dataclasses.replace(config.prediction, max_new_tokens=8))
    train(config)
    free = predict_run(config, constrained="none")
    assert free.name == "constrained-none"
    assert all("unconstrained" not in row for row in read_predictions(free / "predictions.jsonl"))


def test_too_few_tokens_are_one_error_and_what_is_cut_off_says_so(tiny_config, action_files, capsys):
    config = run_config(tiny_config, action_files)
    train(config)
    with pytest.raises(ValueError, match=r"max_new_tokens: 60 may be too few .* allow at least \d+$"):
        predict_run(config, max_new_tokens=60)
    assert not list(config.run_dir.rglob("predictions*.jsonl"))
    model, tokenizer = load_model_folder(config.run_dir / "model")
    engine = GrammarEngine(tokenizer, model.language_model.config.vocab_size)
    samples = load_samples(config.data.eval_paths)[:3]
    records = [record for file in config.data.train_paths for record in read_samples(file)]
    own = training_grammar(records, "lark", "m2")
    rows = {}
    for limit, given in ((12, own.text()), (own.num_tokens, own)):
        rows[limit] = predict(
            model.eval(), tokenizer, make_collator(model, tokenizer), samples, max_new_tokens=limit,
            constraint=Constraint(engine, given), progress=False,
        )  # fmt: skip
    cut, whole = rows.values()
    for row in cut:
        assert row["error"] == "cut off after 12 tokens" and row["action"] is None and row["finished"] is False
    assert "3 of 3 actions were cut off after 12 tokens" in capsys.readouterr().out
    assert all("error" not in row and row["action"] is not None and row["finished"] is True for row in whole)


def test_neither_split_nor_batch_changes_an_action_held_to_the_grammar(tiny_config, action_files):
    config = run_config(tiny_config, {name: action_files[name] for name in ("anchors_train", "anchors_val")})
    config = dataclasses.replace(config, prediction=dataclasses.replace(config.prediction, num_scenes=0))
    train(config)
    samples = load_samples(config.data.eval_paths)[:9]
    model, tokenizer = load_model_folder(config.run_dir / "model")
    engine = GrammarEngine(tokenizer, model.language_model.config.vocab_size)
    records = [record for file in config.data.train_paths for record in read_samples(file)]
    grammar = training_grammar(records, "lark", "m2")
    settings = {"max_new_tokens": grammar.num_tokens, "constraint": Constraint(engine, grammar)}

    def rows(batch_size, *parts):
        collator = make_collator(model, tokenizer)
        made = [
            predict_rows(model, tokenizer, collator, samples, part, batch_size=batch_size, **settings) for part in parts
        ]
        return sorted((row for part in made for batch in part for row in batch), key=lambda row: row["index"])

    whole, split = rows(9, range(9)), rows(2, [8, 0, 3], [1, 2, 4, 5, 6, 7])
    for row, other in zip(whole, split, strict=True):
        assert row.pop("confidence") == pytest.approx(other.pop("confidence"), abs=1e-5)
        assert row == other and row["finished"]


def test_the_grammar_holds_what_training_uses(action_files):
    records = [r for name, file in action_files.items() if name.endswith("train") for r in read_samples(file)]
    used = used_language(records)
    assert used.verbs == {"place_anchor", "list", "none", "plan_room"} and {"place_wall", "place_anchor"} <= used.items
    assert used.longest == max(
        len(json.loads(r["action_json"]).get("actions", ())) for r in records if r["task"] == "plan_room"
    )
    assert "chair" in used.categories and "place_wall" in training_grammar(records, "lark", "m2").text()
    questions = [{"question": "?", "answer": "yes"}]
    with pytest.raises(ValueError, match="hold no action"):
        training_grammar(questions, "lark", "m2")


@pytest.mark.parametrize("codec", ["m2", "cm", "rows"])
def test_references_of_every_kind_read_back(action_files, codec):
    for name, kind in (("lists", ActionList), ("negatives", NoAction), ("plans", PlanRoom)):
        for record in read_samples(action_files[f"{name}_train"]):
            text = response_text(record, codec=codec)
            assert isinstance(parse_action(text, codec=codec), kind) and isinstance(scene_action(record), kind)


def test_hidden_answers_are_predicted_and_not_trained_on(tiny_config, sample_files, tmp_path):
    records = [{**r, "answers": []} for r in read_samples(sample_files["qa_val"])[:4]]
    for record in records:
        del record["answer"]
    hidden = tmp_path / "hidden.jsonl"
    write_samples(hidden, records, {"root": sample_root(sample_files["qa_val"])})
    data = dataclasses.replace(tiny_config.data, eval_files=(str(hidden),))
    with pytest.raises(ValueError, match="answers are hidden"):
        train(dataclasses.replace(tiny_config, data=data, run_name="refused"))
    train(tiny_config)
    config = dataclasses.replace(tiny_config, data=data, run_name="other")
    prediction = dataclasses.replace(config.prediction, controls=())
    folder = predict_run(dataclasses.replace(config, prediction=prediction), tiny_config.run_dir / "model")
    rows = read_predictions(folder / "predictions.jsonl")
    assert len(rows) == 4 and all(row["reference"] == "" and row["answers"] == [] for row in rows)
