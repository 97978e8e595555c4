"""Predictions in parts: the split, resuming behind the last whole row, what a merge refuses, several processes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import yaml

from roomplan_lib.cli import app
from roomplan_lib.config import FeaturesConfig, to_dict
from roomplan_lib.evaluation.parts import Part, PartFile, is_current, merge_parts, read_part, split_rows
from roomplan_lib.evaluation.predict import first_scenes, merge_run, other_scenes, predict_run
from roomplan_lib.evaluation.scores import read_predictions
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.run import train

MADE_FROM = {"weights": "a1", "samples": [["val.jsonl", "b2"]], "max_new_tokens": 8}


@pytest.fixture(scope="module")
def many_scenes(rooms_root, tmp_path_factory):
    """The anchors and questions of all ten rooms in one file that is held out."""
    files = prepare_arkitscenes(
        rooms_root, tmp_path_factory.mktemp("all"), num_views=2, tasks=("qa",), workers=1, progress=False
    )
    return files["qa_train"]


@pytest.fixture
def run(tiny_config, many_scenes):
    """A trained tiny run that predicts on eight scenes."""
    config = dataclasses.replace(
        tiny_config,
        data=dataclasses.replace(tiny_config.data, eval_files=(str(many_scenes),)),
        training=dataclasses.replace(tiny_config.training, max_steps=2, eval_every_steps=0),
        prediction=dataclasses.replace(
            tiny_config.prediction, num_scenes=0, max_new_tokens=4, batch_size=16, controls=("blind",)
        ),
    )
    train(config)
    return config


def rows_of(indices):
    return [{"index": i, "prediction": f"answer {i}"} for i in indices]


def write_part(path, number, count, indices, made_from=MADE_FROM):
    part = Part(number, count)
    with PartFile(path, part, sorted(indices), made_from) as file:
        file.append(rows_of(indices))
    return part.file(path)


# The split ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 40])
def test_parts_hold_whole_scenes_and_equal_work(num_parts):
    rng = np.random.default_rng(num_parts)
    scenes = [f"scene{i:02d}" for i in rng.integers(30, size=600)]
    parts = split_rows(scenes, num_parts)
    assert sorted(i for part in parts for i in part) == list(range(600))
    assert all(part == sorted(part) for part in parts)
    owners = {scene: {k for k, part in enumerate(parts) for i in part if scenes[i] == scene} for scene in scenes}
    assert all(len(owner) == 1 for owner in owners.values())
    largest = max(Counter(scenes).values())
    assert max(map(len, parts)) - min(map(len, parts)) <= largest
    assert split_rows(scenes, num_parts) == parts


def test_large_scenes_go_first():
    assert split_rows(["a", "b", "c", "c"], 2) == [[2, 3], [0, 1]]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/2/3", ""])
def test_a_part_is_one_of_n(text):
    with pytest.raises(ValueError, match="part: expected"):
        Part.parse(text)
    assert Part.parse("2/4") == Part(2, 4)


# The file of a part ---------------------------------------------------------------------------------------------------


def test_rows_that_are_there_are_not_made_again(tmp_path):
    path, part = tmp_path / "predictions.jsonl", Part(1, 2)
    with PartFile(path, part, range(6), MADE_FROM) as file:
        assert file.todo == list(range(6))
        file.append(rows_of([4, 0]))
        whole = file.path.read_bytes()
        file.append(rows_of([1]))
    rest = file.path.read_bytes()[len(whole) :]
    for cut in range(len(rest)):  # a kill at any byte of the last row
        file.path.write_bytes(whole + rest[:cut])
        with PartFile(path, part, range(6), MADE_FROM) as again:
            assert again.todo == [1, 2, 3, 5]
        assert again.path.read_bytes() == whole
    header, rows, _ = read_part(file.path)
    assert header == {"part": [1, 2], "made_from": MADE_FROM} and rows == rows_of([4, 0])


def test_rows_of_something_else_are_begun_anew(tmp_path, capsys):
    path, part = tmp_path / "predictions.jsonl", Part(1, 1)
    file = write_part(path, 1, 1, [0, 1])
    with PartFile(path, part, range(3), MADE_FROM | {"weights": "other"}) as other:
        assert other.todo == [0, 1, 2]
    assert "begun anew" in capsys.readouterr().out
    for damaged in ([0, 0], [0, 7]):  # there twice; not of this part
        file.unlink()
        with PartFile(path, part, range(8), MADE_FROM) as written:
            written.append(rows_of(damaged))
        with PartFile(path, part, range(3), MADE_FROM) as again:
            assert again.todo == [0, 1, 2]


def test_two_processes_do_not_write_one_part(tmp_path):
    path = tmp_path / "predictions.jsonl"
    with PartFile(path, Part(1, 2), range(3), MADE_FROM):
        with pytest.raises(ValueError, match="part-1-of-2.jsonl: another process"):
            PartFile(path, Part(1, 2), range(3), MADE_FROM).__enter__()
        with PartFile(path, Part(2, 2), range(3), MADE_FROM):
            pass


# The merge ------------------------------------------------------------------------------------------------------------


def test_merge_restores_the_order_and_removes_the_parts(tmp_path):
    path = tmp_path / "predictions.jsonl"
    split = [[0, 3, 4], [], [1, 2]]
    for number, rows in enumerate(split, 1):
        write_part(path, number, 3, rows[::-1])
    merge_parts(path, MADE_FROM, split)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows_of(range(5))
    assert is_current(path, MADE_FROM) and not is_current(path, MADE_FROM | {"weights": "z"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.jsonl", "predictions.manifest.json"]


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda f, p: f.unlink(), "predictions.part-2-of-2.jsonl is missing"),
        (lambda f, p: f.write_bytes(f.read_bytes()[:-3]), r"part-2-of-2.jsonl has rows 3 not made"),
        (lambda f, p: f.write_text(f.read_text() + json.dumps(rows_of([1])[0]) + "\n"), "rows 1 there twice"),
        (lambda f, p: f.write_text(f.read_text() + json.dumps(rows_of([2])[0]) + "\n"), "rows 2 of other parts"),
        (lambda f, p: f.write_text(f.read_text() + "half a ro"), "part-2-of-2.jsonl has more than its 2 rows"),
        (lambda f, p: write_part(p, 2, 2, [1, 3], MADE_FROM | {"weights": "c3"}), "another state: weights differ"),
        (lambda f, p: f.write_bytes(Part(1, 2).file(p).read_bytes()), "part-2-of-2.jsonl holds part 1/2"),
        (lambda f, p: f.write_text(""), "no whole first line"),
        (lambda f, p: f.write_text("[1]\n"), "no whole first line"),
    ],
)
def test_merge_refuses_and_names_what_is_wrong(tmp_path, damage, named):
    path = tmp_path / "predictions.jsonl"
    write_part(path, 1, 2, [0, 2])
    damage(write_part(path, 2, 2, [1, 3]), path)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=named):
        merge_parts(path, MADE_FROM, [[0, 2], [1, 3]])
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not path.exists()


def test_every_missing_part_counts(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_part(path, 1, 9, [0])
    with pytest.raises(ValueError, match=r"part-2-of-9.*part-3-of-9.*part-4-of-9.* and 5 more"):
        merge_parts(path, MADE_FROM, [[i] for i in range(9)])


# Whole runs -----------------------------------------------------------------------------------------------------------


def texts(config, name="predictions.jsonl"):
    return (config.run_dir / name).read_text()


def test_parts_batches_and_interruptions_change_no_row(run, monkeypatch):
    predict_run(run)
    whole = {name: texts(run, name) for name in ("predictions.jsonl", "predictions_blind.jsonl")}
    assert len(read_predictions(run.run_dir / "predictions.jsonl")) == len({*whole["predictions.jsonl"].splitlines()})
    for name in whole:
        (run.run_dir / name).unlink()
    other = dataclasses.replace(run, prediction=dataclasses.replace(run.prediction, batch_size=5))
    # The second part is stopped after its third batch, as a kill would: what it wrote is there.
    predict_run(other, part=Part(1, 3))
    made = []

    def append_thrice(file, rows, append=PartFile.append):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(rows)
        append(file, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartFile, "append", append_thrice)
        predict_run(other, part=Part(2, 3))
    with pytest.raises(ValueError, match="part-2-of-3.jsonl.*part-3-of-3.jsonl is missing"):
        merge_run(other, num_parts=3)
    stopped = Part(2, 3).file(run.run_dir / "predictions.jsonl")
    before = stopped.read_bytes()
    predict_run(other, part=Part(2, 3))
    assert stopped.read_bytes().startswith(before) and len(before) < stopped.stat().st_size
    predict_run(other, part=Part(3, 3))
    assert merge_run(other, num_parts=3) == run.run_dir
    assert {name: texts(run, name) for name in whole} == whole
    assert not list(run.run_dir.glob("*part*"))
    merge_run(other, num_parts=3)  # again: nothing to do
    # other settings: no part of them passes for one of these
    predict_run(run, part=Part(1, 2), max_new_tokens=3)
    with pytest.raises(ValueError, match="part-1-of-2.jsonl is missing"):
        merge_run(dataclasses.replace(run, run_name="test"), num_parts=2, max_new_tokens=2)


def test_predictions_read_the_feature_cache(run, tmp_path):
    run = dataclasses.replace(
        run,
        run_name="frozen",
        model=dataclasses.replace(run.model, freeze_vggt=True),
        prediction=dataclasses.replace(run.prediction, controls=("shuffled",)),
    )
    live = [texts(run, path.relative_to(run.run_dir)) for path in predicted(run)]
    features = FeaturesConfig(folder=str(tmp_path / "features"), dtype="float32")
    cached = dataclasses.replace(run, data=dataclasses.replace(run.data, features=features))
    assert [path.read_text() for path in predicted(cached)] == live
    pool = load_samples(run.data.eval_paths)
    samples = first_scenes(pool, 2)
    shown = {sample.view_key for sample in [*samples, *other_scenes(samples, pool)]}
    assert len(list((tmp_path / "features").glob("features-*/*.safetensors"))) == len(shown) == 3
    for path in predicted(cached):
        path.unlink()
    whole = dataclasses.replace(features, on_missing="error")  # all is there, so nothing is encoded
    cached = dataclasses.replace(cached, data=dataclasses.replace(cached.data, features=whole))
    assert [path.read_text() for path in predicted(cached)] == live


def predicted(config):
    """The two prediction files of the untrained model."""
    folder = predict_run(config, "base", num_scenes=2)
    return [folder / "predictions.jsonl", folder / "predictions_shuffled.jsonl"]


def stage_file(config, folder):
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(to_dict(config)))
    return path


def command(*arguments):
    return [sys.executable, "-m", "roomplan_lib.cli", "predict", *map(str, arguments)]


def test_two_processes_make_what_one_does_and_a_kill_loses_nothing(run, tmp_path):
    predict_run(run, "base")
    folder = run.run_dir / "predictions" / "base"
    whole = (folder / "predictions.jsonl").read_text()
    num_rows = len(whole.splitlines())
    (folder / "predictions.jsonl").unlink()
    slow = dataclasses.replace(run, prediction=dataclasses.replace(run.prediction, batch_size=1))
    arguments = stage_file(slow, tmp_path), "--checkpoint", "base", "--num-processes", "2"
    parts = [Part(number, 2).file(folder / "predictions.jsonl") for number in (1, 2)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True, env=environment)
    try:
        while not all(part.is_file() and part.read_bytes().count(b"\n") > 3 for part in parts):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        children = process_children(process.pid)
        assert len(children) == 2
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "a child outlived its parent"
        time.sleep(0.05)
    kept = [part.read_bytes() for part in parts]
    kept = [lines[: lines.rindex(b"\n") + 1] for lines in kept]
    assert sum(lines.count(b"\n") - 1 for lines in kept) < num_rows
    again = subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, check=True)
    assert (folder / "predictions.jsonl").read_text() == whole and not any(part.exists() for part in parts)
    bars = re.findall(r"predict, 2 parts:.*?(\d+)/(\d+) \[.*?(?:sample/s|s/sample)", again.stdout)
    assert bars[-1] == (str(num_rows), str(num_rows)) and int(bars[0][0]) >= 6  # what was there counts as done


def process_children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failed_process_is_one_line_and_the_rows_stay(run, tmp_path):
    """The second part is being made by somebody else, so its process refuses."""
    path = run.run_dir / "predictions" / "scenes-3" / "predictions.jsonl"
    with PartFile(path, Part(2, 2), [], MADE_FROM):
        pass
    with PartFile(path, Part(2, 2), [], MADE_FROM):
        result = subprocess.run(
            command(stage_file(run, tmp_path), "--num-scenes", 3, "--num-processes", 2),
            capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
    assert result.returncode == 1 and not path.exists()
    assert result.stderr.splitlines()[-1].startswith("roomplan predict: part 2/2 ended with status 1: roomplan predict")
    assert "another process is making this part" in result.stderr


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (("--part", "3/2"), "part: expected 1/2 to 2/2, got 3/2"),
        (("--part", "1/2", "--merge", "2"), "give one of them"),
        (("--part", "1/2", "--num-processes", "2"), "give one of them"),
        (("--merge", "2"), "part-1-of-2.jsonl is missing"),
    ],
)
def test_wrong_use_is_one_line(run, tmp_path, arguments, reason):
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["predict", str(stage_file(run, tmp_path)), *arguments])
    assert result.exit_code == 1 and reason in result.stderr and len(result.stderr.splitlines()) == 1
