"""The training notebook: its parameters, what it refuses, and what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from roomplan_lib.config import RunConfig, to_dict
from roomplan_lib.training.metrics import read_metrics

PROJECT = Path(__file__).parents[1]
NOTEBOOK = PROJECT / "notebooks" / "03_train.ipynb"
MOST_BYTES = 3_000_000  # of an executed copy

pytest.importorskip("papermill")


def papermill(*arguments, cwd=PROJECT):
    command = [sys.executable, "-m", "papermill", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def code_cells(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_parameter_is_listed_with_help():
    result = papermill("--help-notebook", NOTEBOOK)
    listed = dict(re.findall(r"^  (\w+): \w+ \(default .*\)\s+(\S.*)$", result.stdout, flags=re.MULTILINE))
    assert list(listed) == list(to_dict(RunConfig())), result.stdout + result.stderr
    assert all(len(text.split()) >= 3 for text in listed.values())


def test_cells_are_short_and_import_what_they_use():
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    sizes = sorted(len(cell.splitlines()) for cell in cells)
    assert sizes[-1] <= 20 and sizes[len(sizes) // 2] <= 6
    assert not any(re.search(r"^\s*(def|class) ", cell, flags=re.MULTILINE) for cell in cells)
    texts = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "markdown"]
    assert all(word in texts[0] for word in ("**Reads**", "**Writes**", "**Takes**")) and "04_error" in texts[-1]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"learning_rate": 1}, "learning_rate: unknown setting"),
        ({"seed": "one"}, "seed: expected int, got str 'one'"),
        ({"training": {"max_stpes": 3}}, "training.max_stpes: unknown setting"),
        ({"model": {"language_model": {"lora": {"rang": 3}}}}, "model.language_model.lora.rang: unknown setting"),
        ({"distributed": {"strategy": "fsdp"}}, "distributed.strategy: expected one of ddp, zero3"),
    ],
    ids=["unknown", "wrong type", "unknown in a section", "unknown deep down", "wrong choice"],
)
def test_wrong_parameters_stop_the_run(parameters, message, tmp_path):
    """Checked on the cells that a run begins with, as papermill injects into them."""
    cells = code_cells(json.loads(NOTEBOOK.read_text()))
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    program = f"{cells[0]}\nruns_dir = {str(tmp_path / 'runs')!r}\n{lines}\n{cells[1]}"
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 1 and f"ValueError: {message}" in result.stderr
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def micro_params(sample_files, tmp_path_factory):
    """A stage file of a very small run on the session's samples."""
    folder = tmp_path_factory.mktemp("stage")
    data = yaml.safe_load((PROJECT / "papermill_runs" / "params" / "tiny_short.yaml").read_text())
    for split in ("train", "eval"):
        kind = "train" if split == "train" else "val"
        data["data"][f"{split}_files"] = [str(sample_files[f"{name}_{kind}"]) for name in ("anchors", "qa")]
    data |= {"run_name": "micro", "runs_dir": str(folder / "runs")}
    data["training"] |= {
        "max_steps": 4, "micro_batch_size": 8, "group_size": 4, "log_every_steps": 1, "eval_every_steps": 2,
        "num_eval_samples": 8, "device": "cpu",
    }  # fmt: skip
    data["prediction"] |= {"num_scenes": 1, "max_new_tokens": 180, "controls": []}
    (folder / "micro.yaml").write_text(yaml.safe_dump(data))
    return folder / "micro.yaml"


def test_an_unknown_parameter_stops_it_under_papermill(micro_params, tmp_path):
    result = papermill(NOTEBOOK, tmp_path / "out.ipynb", "-f", micro_params, "-p", "learning_rate", 1)
    assert result.returncode == 1 and "learning_rate: unknown setting" in result.stderr
    executed = json.loads((tmp_path / "out.ipynb").read_text())
    assert executed["metadata"]["papermill"]["exception"]
    assert not (micro_params.parent / "runs").exists()


def test_a_run_from_plan_to_anchors(micro_params, tmp_path):
    result = papermill(NOTEBOOK, tmp_path / "out.ipynb", "-f", micro_params)
    assert result.returncode == 0, result.stderr[-3000:]
    run = micro_params.parent / "runs" / "micro"
    written = {
        "run.yaml",
        "status.json",
        "metrics.jsonl",
        "predictions.jsonl",
        "scores.json",
        "curve.png",
        "anchors.png",
    }
    assert written <= {path.name for path in run.iterdir()}
    assert [e["step"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e] == [1, 2, 3, 4]
    text = (tmp_path / "out.ipynb").read_text()
    assert len(text) < MOST_BYTES
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    told = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "| micro | stage2_3d |" in told and "GPU-hours" in told  # the plan
    assert re.search(r"asked *\| true *\| predicted", told)  # the samples after
    training = next(c for c in json.loads(text)["cells"] if "launch(config" in "".join(c["source"]))
    drawn = [output for output in training["outputs"] if "image/png" in output.get("data", {})]
    assert len(drawn) == 1  # the live curve is one picture, however often it was drawn


@pytest.mark.slow
def test_a_stopped_run_ends_the_notebook(micro_params, tmp_path):
    """A STOP file saves a checkpoint; the cells behind the training do not run; the next start goes on."""
    data = yaml.safe_load(micro_params.read_text()) | {"run_name": "stopped"}
    (tmp_path / "stopped.yaml").write_text(yaml.safe_dump(data))
    run = micro_params.parent / "runs" / "stopped"
    run.mkdir(parents=True)
    (run / "STOP").touch()
    result = papermill(NOTEBOOK, tmp_path / "out.ipynb", "-f", tmp_path / "stopped.yaml")
    assert result.returncode == 1 and "Preempted" in result.stderr, result.stderr[-3000:]
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"
    cells = [c for c in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    after = cells[[("launch(config" in "".join(c["source"])) for c in cells].index(True) + 1 :]
    assert after and all(not cell["outputs"] and cell["execution_count"] is None for cell in after)
    assert not (run / "STOP").exists() and not (run / "predictions.jsonl").exists()


@pytest.mark.slow
def test_opened_by_hand_it_makes_its_own_rooms(tmp_path):
    """With nothing there but the stage files, in less than five minutes on a quiet machine."""
    shutil.copytree(PROJECT / "papermill_runs" / "params", tmp_path / "papermill_runs" / "params")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(NOTEBOOK, tmp_path / "notebooks")
    result = papermill("notebooks/03_train.ipynb", "out.ipynb", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "out.ipynb").stat().st_size < MOST_BYTES
    losses = [e["loss"] for e in read_metrics(tmp_path / "papermill_runs/tiny_short/metrics.jsonl") if "loss" in e]
    assert losses[-1] < 0.25 * losses[0]
