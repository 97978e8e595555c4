"""Looking at runs from a terminal: what their files say, however few or broken they are at that moment."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from roomplan_lib import watch as watching
from roomplan_lib.cli import app
from roomplan_lib.watch import chart, eta_seconds, find_run, read_run, silent_seconds, watch, watch_text


def log(step, loss=1.0, seconds=None):
    return {
        "step": step, "elapsed_s": step / 2 if seconds is None else seconds, "loss": loss, "grad_norm": 1.0,
        "learning_rate": 1e-3, "samples_per_s": 20.0, "tokens_per_s": 1234.5, "memory_gb": 1.5,
    }  # fmt: skip


def write_run(folder, entries=(), status=None, max_steps=100, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({"training": {"max_steps": max_steps}}))
    if entries or tail:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + tail)
    if status:
        (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_a_running_run_tells_where_it_is(tmp_path):
    entries = [log(step, 5.0 - step / 20) for step in range(10, 70, 10)]
    entries.insert(4, {"step": 40, "elapsed_s": 21, "eval_loss": 3.25, "eval_em": 0.4})
    run = write_run(tmp_path / "a", entries, {"status": "running", "step": 60, "max_steps": 200, "world_size": 1})
    (run / "checkpoints" / "checkpoint-50").mkdir(parents=True)
    (run / "checkpoints" / "checkpoint-9").mkdir()
    for name in ("checkpoint-50", "checkpoint-9", ".partial-checkpoint-60"):
        (run / "checkpoints" / name).mkdir(exist_ok=True)
        (run / "checkpoints" / name / "state.json").write_text("{}")
    (run / "checkpoints" / "checkpoint-60").mkdir()  # its last file is not there yet
    state = read_run(run)
    assert (state.status, state.step, state.max_steps, state.saved_at) == ("running", 60, 200, 50)
    assert state.series("eval_loss") == [(40, 3.25)] and state.missing == ()
    assert eta_seconds(state) == pytest.approx(70)  # 140 steps at two a second
    text = watch_text([state], time.time())
    row = dict(zip(("run", "status", "step", "loss", "held out"), text.splitlines()[1].split(), strict=False))
    assert row == {"run": "a", "status": "running", "step": "60/200", "loss": "2.0000", "held out": "3.2500"}
    assert " 1:10 " in text and "1.5 GB" in text and "answers at step 40: em 0.4" in text
    assert "loss: 4.5 to 2, steps 10 to 60" in text


def test_half_a_line_and_repeated_steps(tmp_path):
    entries = [log(10, 3.0), log(20, 2.0), log(20, 1.5)]  # a resumed run did step 20 again
    run = write_run(tmp_path / "a", entries, tail='{"step": 30, "elapsed_s": 9, "lo')
    assert read_run(run).series("loss") == [(10, 3.0), (20, 1.5)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.25}\n\x00\xff garbage\n[1]\n{"loss": 3}\n')
    assert read_run(run).series("loss") == [(10, 3.0), (20, 1.5), (30, 1.25)]


def test_files_of_any_content_are_shown(tmp_path):
    """A run is watched while others write it: whatever its files hold, there is a table and nothing steers the
    terminal."""
    odd = [{"step": 1, "loss": 2.0, "elapsed_s": "x"}, {"step": 2, "loss": None, "elapsed_s": None}]
    odd += [{"step": 3, "loss": "a", "elapsed_s": math.nan}, {"step": 4, "loss": 1.0, "elapsed_s": 2}]
    error = "first\nbad \x1b]0;title\x07\x1b[2J"
    run = write_run(tmp_path / "a", odd, {"status": "failed\x1b[31m\nx", "step": 4, "error": error}, tail="[" * 100_000)
    text = watch_text([read_run(run)], time.time())
    assert all(c.isprintable() or c == "\n" for c in text) and "4/100" in text and len(text.splitlines()[1]) <= 100
    for settings, status in (("- a", "[1]"), ("training: 5", '"running"'), ("\0", "{")):
        (run / "run.yaml").write_text(settings)
        (run / "status.json").write_text(status)
        assert "started" in watch_text([read_run(run)], time.time())


def test_missing_files_are_named(tmp_path):
    state = read_run(write_run(tmp_path / "a"))
    assert state.status == "not started" and state.missing == ("status.json", "metrics.jsonl")
    text = watch_text([state], time.time())
    assert "a: no metrics.jsonl yet" in text and "a: no status.json yet" in text
    assert "0/100" in text and eta_seconds(state) is None
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "status.json").write_text('{"status": "run')  # being written
    (tmp_path / "b" / "run.yaml").write_text("training: [")
    assert read_run(tmp_path / "b").status == "not started"


def test_the_end_of_a_run(tmp_path):
    failed = write_run(
        tmp_path / "a", [log(10, math.nan)],
        {"status": "failed", "step": 10, "max_steps": 100, "error": "Traceback\nValueError: the loss is nan"},
    )  # fmt: skip
    old = write_run(tmp_path / "b", [log(100)])  # without a status.json, as older runs
    (old / "model").mkdir()
    (old / "model" / "config.json").write_text("{}")
    states = [read_run(failed), read_run(old)]
    assert [state.status for state in states] == ["failed", "finished"] and all(state.over for state in states)
    text = watch_text(states, time.time())
    assert "a: ValueError: the loss is nan" in text and "a: the loss of step 10 is no number" in text
    assert "b, loss: " in text and "no status.json yet" not in text


def test_time_left_is_that_of_the_latest_pace(tmp_path):
    slow = [log(step, seconds=10 * step) for step in range(1, 21)]
    fast = [log(20 + step, seconds=200 + step) for step in range(1, 21)]
    state = read_run(write_run(tmp_path / "a", slow + fast, {"status": "running", "step": 40, "max_steps": 100}))
    assert eta_seconds(state) == pytest.approx(60)  # 60 steps at one a second; all logs together say 165


def test_a_silent_run_is_noticed(tmp_path):
    status = {"status": "running", "step": 30, "max_steps": 100}
    run = write_run(tmp_path / "a", [log(10), log(20), log(30)], status)  # a log every five seconds
    now = read_run(run).written
    assert silent_seconds(read_run(run), now + 100) is None
    assert silent_seconds(read_run(run), now + 600) == pytest.approx(600)
    assert "a: silent for 10:00" in watch_text([read_run(run)], now + 600)
    slow = [log(10 * k, seconds=100.0 * k) for k in (1, 2, 3)]
    run = write_run(tmp_path / "a", slow, status)
    assert silent_seconds(read_run(run), read_run(run).written + 600) is None
    run = write_run(tmp_path / "a", slow, {**status, "status": "preempted"})
    assert silent_seconds(read_run(run), now + 1e6) is None


def test_charts_by_hand():
    assert chart([0, 1, 2, 3, 4, 5, 6, 7], 8) == ["▁▂▃▄▅▆▇█"]
    assert chart([0, 2, 4, 6], 2) == ["▁█"]  # columns are means
    assert chart([0, 15], 9, 2) == [" █", "▁█"]
    assert chart([5, math.nan, 1], 9) == ["█ ▁"]
    assert chart([2, 2], 9) == ["▄▄"] and chart([], 9) == [""] and chart([math.inf], 9, 2) == [" ", " "]


def test_lines_fit_the_terminal(tmp_path):
    runs = [write_run(tmp_path / ("run" + "x" * k), [log(s, 1 / s) for s in range(1, 999)]) for k in (1, 60)]
    for width in (40, 80, 200):
        lines = watch_text([read_run(run) for run in runs], time.time(), width).splitlines()
        assert max(map(len, lines)) <= width


def test_runs_are_found_by_name_or_folder(tmp_path, monkeypatch):
    run = write_run(tmp_path / "papermill_runs" / "a")
    monkeypatch.chdir(tmp_path)
    assert find_run("a") == Path("papermill_runs/a") and find_run(str(run)) == run
    assert find_run("a", tmp_path / "papermill_runs") == run
    result = CliRunner().invoke(app, ["watch", "a", "b", "--once"])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "roomplan watch: b: no run" in result.output and "runs there: a" in result.output
    result = CliRunner().invoke(app, ["watch", "a", str(run), "--once"])
    assert result.exit_code == 0 and result.output.count("not started") == 2


def test_watching_goes_on_until_all_runs_are_over(tmp_path, monkeypatch, capsys):
    status = {"status": "running", "step": 10, "max_steps": 20}
    run = write_run(tmp_path / "a", [log(10)], status)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            write_run(tmp_path / "a", [log(10), log(20, 0.5)], {**status, "status": "finished", "step": 20})

    monkeypatch.setattr(watching.time, "sleep", nap)
    watch([str(run)], interval=0.5)
    text = capsys.readouterr().out
    assert naps == [0.5] * 3 and "\033" not in text
    assert text.count("run ") == 2 and "finished" in text  # what did not change is not said again


def test_watching_needs_no_torch_and_starts_at_once(tmp_path):
    run = write_run(tmp_path / "a", [log(10)])
    code = (
        "import sys, time; t = time.perf_counter(); from roomplan_lib.cli import app; "
        f"app(['watch', {str(run)!r}, '--once'], standalone_mode=False); "
        "print(sorted(sys.modules.keys() & {'torch', 'numpy', 'matplotlib'}), time.perf_counter() - t)"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    modules, seconds = result.stdout.splitlines()[-1].rsplit(" ", 1)
    assert modules == "[]" and float(seconds) < 2, result.stdout + result.stderr
