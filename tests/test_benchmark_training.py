"""The benchmark of training: its arithmetic, what it refuses, and that its variants do the same work."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import load_run_config, to_dict
from roomplan_lib.training import benchmark, peers
from roomplan_lib.training.benchmark import (
    ADAM_BYTES,
    FULL_STAGE,
    Clock,
    benchmark_table,
    compare,
    describe_machine,
    full_size_row,
    parse_sizes,
)
from roomplan_lib.viz.benchmark import training_benchmark_figure

PROJECT = Path(__file__).parents[1]
SIZES = peers.TextSizes(vocab_size=64, width=32, num_layers=1, num_rows=4, length=24, num_supervised=4, rank=4)


def measured(step_s, loss=2.0, **more):
    return {"step_s": step_s, "first_loss": loss, "load_average": 0.5} | more


def test_medians_and_ratios_by_hand():
    results = {
        "bare": [measured([1.0, 2.0], memory_gb=1.0), measured([3.0, 9.0], memory_gb=3.0)],
        "ours": [measured([4.0]), measured([2.0, 6.0])],
    }
    bare, ours = compare("loop", results)
    assert bare["step_s"] == 2.5 and bare["memory_gb"] == 2.0 and bare["rounds"] == 2
    assert ours["step_s"] == 4.0 and ours["step_s_ratio"] == 1.6 and bare["step_s_ratio"] == 1.0
    assert ours["load_average"] == [0.5, 0.5]
    skipped = compare("peers", {"bare": [measured([1.0])], "TRL": [{"skipped": "no TRL", "load_average": 1.0}]})[1]
    assert skipped["skipped"] == "no TRL" and "step_s_ratio" not in skipped


def test_variants_that_do_other_work_are_refused():
    with pytest.raises(RuntimeError, match="ours begins with loss 2.001, bare with 2.0; they do not do the same work"):
        compare("loop", {"bare": [measured([1.0])], "ours": [measured([1.0], loss=2.001)]})
    compare("cache", {"cached": [measured([1.0])], "live": [measured([1.0], loss=2.001)]})  # rounded to bfloat16


def test_the_clock_leaves_out_the_first_window():
    clock = Clock()
    for step in range(1, 31):
        clock.mark(step, 7.0 - step)
    assert len(clock.marks) == 3
    clock.marks = [(0.0, 0.0), (20.0, 10.0), (60.0, 15.0)]
    result = clock.result(num_samples=8)
    assert result["step_s"] == [2.0, 4.0] and result["step_cpu_s"] == [1.0, 0.5]
    assert result["samples_per_s"] == [4.0, 2.0] and result["first_loss"] == 6.0


@pytest.mark.parametrize("word", ["depth=2", "width", "width=0", "width=-3", "width=a"])
def test_sizes_are_named_numbers(word):
    with pytest.raises(ValueError, match="size: expected one of vocab_size"):
        parse_sizes([word])
    assert parse_sizes(["width=64", "rank=8"]) == {"width": 64, "rank": 8}
    assert set(benchmark.TEXT_SIZES) == {field.name for field in dataclasses.fields(peers.TextSizes)}


def test_wrong_use_is_one_line():
    for arguments, reason in (
        (("--part", "speed"), "part: expected loop, peers"),
        (("--steps", "15"), "steps: expected a multiple of 10, got 15"),
        (("--params", "nowhere.yaml"), "nowhere.yaml"),
    ):
        result = CliRunner().invoke(app, ["benchmark", "training", *arguments])
        assert result.exit_code == 1 and reason in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("train", [peers.train_bare, peers.train_ours, peers.train_hf])
def test_peers_do_the_same_work(tmp_path, train):
    """All rows are one row, so that the order in which a trainer draws them is no matter."""
    config = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny.yaml", runs_dir=str(tmp_path))
    config = dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, max_steps=20, micro_batch_size=4, group_size=1, log_every_steps=10,
            eval_every_steps=0, save_every_steps=100, learning_rate=0.01, lr_scheduler="constant_with_warmup",
            warmup_ratio=0.0, device="cpu",
        ),
    )  # fmt: skip
    row = np.random.default_rng(3).integers(8, 64, 24).tolist()
    clock, losses = Clock(), []
    mark = clock.mark
    clock.mark = lambda step, loss: (losses.append(loss), mark(step, loss))
    train(config, SIZES, [row] * 80, clock)
    assert len(clock.marks) == 2 and clock.result(4)["samples_per_s"][0] > 0
    batch = peers.batch_of(SIZES, [row])
    expected = peers.base_model(SIZES)(**batch).loss.item()  # LoRA begins as nothing
    assert clock.first_loss == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < 0.97 * losses[0]


def test_tables_and_figures_hold_every_variant():
    machine = describe_machine(1)
    rows = [row | machine for row in compare("loop", {"bare": [measured([0.1])], "ours": [measured([0.104])]})]
    saved = {
        "ours": [{"bytes": 1e6, "save_s": [0.01], "load_average": 2.0}],
        "ZeRO-3 state": [{"bytes": 5e6, "load_average": 1.0}],
    }
    rows += [row | machine for row in compare("checkpoint", saved)]
    table = benchmark_table(rows)
    assert "| ours | 104 (1.04x) |" in table and "| ZeRO-3 state | 5 (5x) |" in table
    assert f"torch {machine['torch']}" in table and "load average 0.5 to 2.0" in table
    figure = training_benchmark_figure(rows)
    assert len(figure.axes) == 1  # the loop's rows have no rate
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["ours", "ZeRO-3 state"]
    with pytest.raises(ValueError, match="nothing to draw"):
        training_benchmark_figure([])


@pytest.mark.slow
def test_full_size_by_hand():
    row = full_size_row()
    # LoRA of rank 16 on q (2560 -> 4096), k, v (-> 1024), o (4096 -> 2560) in 36 layers.
    lora = 36 * 16 * (2 * (2560 + 4096) + 2 * (2560 + 1024))
    rest = row["bytes"] / ADAM_BYTES - lora
    assert lora == 11_796_480 and 110e6 < rest < 125e6  # the resampler of 116 M, geometry tokens, positions
    assert 40 < row["bytes_ratio"] < 50 and row["zero3_bytes"] == pytest.approx(73.6e9 * 4.15 / 5.26 + 3.6e9, rel=0.1)
    assert row["live_ratio"] > 1.5 and load_run_config(FULL_STAGE).training.group_size > 1


@pytest.mark.slow
def test_the_command_measures_and_draws(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["--part", "loop", "--part", "peers", "--steps", 10, "--rounds", 1, "--num-rooms", 5]
    arguments += ["--output", tmp_path / "rows.jsonl", "--figure", tmp_path / "bars.png", "--folder", scratch]
    result = CliRunner().invoke(app, ["benchmark", "training", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = {(row["part"], row["variant"]): row for row in map(json.loads, (tmp_path / "rows.jsonl").open())}
    assert {("loop", "bare"), ("loop", "ours"), ("peers", "ours"), ("peers", "HF Trainer")} <= set(rows)
    ours = rows["loop", "ours"]
    # Whatever else the machine does, the loop must not cost half as much as what it is for.
    assert 0.5 < ours["step_cpu_s_ratio"] < 1.5 and ours["first_loss"] > 1 and math.isfinite(ours["memory_gb"])
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG" and not list(scratch.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ours", "ZeRO-3 state"])
def test_bytes_of_a_checkpoint(tiny_config, tmp_path, variant):
    """AdamW's two moments and the weight itself, 12 bytes for each weight that is trained, and little else."""
    if variant != "ours":
        pytest.importorskip("deepspeed")
    job = {"part": "checkpoint", "variant": variant, "config": to_dict(tiny_config), "steps": 10, "text": {}}
    place = tmp_path / "place"
    place.mkdir()
    result = benchmark.run_job(job | {"folder": str(tmp_path / "runs"), "features": ""}, place, threads=1)
    exact = ADAM_BYTES * result["num_trained"]
    assert exact < result["bytes"] < (1.1 * exact if variant == "ours" else math.inf)
