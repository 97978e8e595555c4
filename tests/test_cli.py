"""The commands that a newcomer types, and what they say when something is wrong."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import to_dict

PROJECT = Path(__file__).parents[1]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("name", ["rooms", "prepare", "validate", "train", "predict", "score", "compare"])
def test_every_command_explains_itself(name):
    result = run(name, "--help")
    assert result.exit_code == 0 and "Usage" in result.output
    assert f" {name} " in run("--help").output


def test_validate_exits_with_the_verdict(sample_files, tmp_path):
    good = run("validate", sample_files["qa_train"])
    assert good.exit_code == 0, good.output
    lines = sample_files["anchors_train"].read_text().splitlines()
    record = json.loads(lines[0]) | {"scene_id": "47333462"}
    (tmp_path / "bad.jsonl").write_text(json.dumps(record) + "\n")
    bad = run("validate", tmp_path / "bad.jsonl")
    assert bad.exit_code == 1 and "47333462" in bad.output


def test_unreadable_stage_files_are_one_line(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00seed: 1")
    for name, reason in (
        ("list.yaml", "expected a mapping"),
        ("bytes.yaml", "cannot read"),
        ("no.yaml", "cannot read"),
    ):
        result = run("train", tmp_path / name)
        assert result.exit_code == 1 and name in result.stderr and reason in result.stderr
    result = run("prepare", "arkitscenes", "--root", tmp_path / "none", "--output", tmp_path)
    assert result.exit_code == 1 and result.stderr.startswith("roomplan prepare arkitscenes: ")


@pytest.mark.parametrize("name", ["train", "predict", "score"])
def test_wrong_settings_are_one_line_and_exit_1(name, tmp_path):
    (tmp_path / "stage.yaml").write_text('training: {learning_rate: "1e-4"}\n')
    result = run(name, tmp_path / "stage.yaml")
    assert result.exit_code == 1
    assert "training.learning_rate: expected float" in result.stderr and "Traceback" not in result.output


def test_train_predict_score_from_the_shell(tiny_config, tmp_path):
    stage = tmp_path / "stage.yaml"
    stage.write_text(yaml.safe_dump(to_dict(tiny_config)))
    assert "no trained model" in run("predict", stage).stderr
    options = ("--num-scenes", 2, "--max-new-tokens", 3, "--device", "cpu")
    untrained = run("predict", stage, "--checkpoint", "base", *options)
    assert untrained.exit_code == 0, untrained.output
    folder = Path(tiny_config.runs_dir) / "test" / "predictions" / "base_tokens-3"
    assert str(folder) in untrained.output.replace("\n", "")
    assert str(folder) in run("score", stage).stderr  # not the run's own result: it has to be named
    assert run("score", stage, "--predictions", folder).exit_code == 0
    assert run("train", stage).exit_code == 0
    assert run("predict", stage).exit_code == 0
    result = run("score", stage)
    assert result.exit_code == 0 and "constant" in result.output and "majority" in result.output
    both = run("compare", Path(tiny_config.runs_dir) / "test", folder)
    assert both.exit_code == 0, both.output
    assert "| `test` " in both.output and "| `test_base_tokens-3` " in both.output
    assert "no predictions there" in run("compare", tmp_path).stderr
    curves = tmp_path / "curves.png"
    assert f"{folder}: no metrics.jsonl" in run("compare", folder, "--curves", curves).stderr and not curves.exists()
    assert run("compare", Path(tiny_config.runs_dir) / "test", "--curves", curves).exit_code == 0
    with Image.open(curves) as picture:
        assert picture.size[0] > 1000


def test_notebook_runs_under_papermill(tiny_config, tmp_path):
    """The user's path: papermill with a stage file; figures, scores and curve in the executed copy."""
    stage, output = tmp_path / "stage.yaml", tmp_path / "out.ipynb"
    stage.write_text(yaml.safe_dump(to_dict(dataclasses.replace(tiny_config, runs_dir=str(tmp_path)))))
    command = [
        sys.executable, "-m", "papermill", PROJECT / "notebooks" / "03_train.ipynb", output,
        "-f", stage, "-p", "run_name", "papermilled", "--no-progress-bar",
    ]  # fmt: skip
    result = subprocess.run(
        [str(c) for c in command],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    run_dir = tmp_path / "papermilled"
    for name in (
        "run.yaml",
        "run.json",
        "metrics.jsonl",
        "predictions.jsonl",
        "scores.json",
        "anchors.png",
        "curve.png",
    ):
        assert (run_dir / name).stat().st_size > 0
    cells = json.loads(output.read_text())["cells"]
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 4
    wrong = subprocess.run(
        [str(c) for c in command] + ["-p", "learning_rte", "0.1"], cwd=PROJECT, capture_output=True, text=True
    )
    assert wrong.returncode != 0 and "learning_rte: unknown setting" in wrong.stderr
