"""One process, two that replicate the weights, and two that shard them by ZeRO-3 learn the same; two processes on this
machine's CPU stand for any number."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from roomplan_lib.config import LoraSettings, load_run_config, to_dict
from roomplan_lib.files import file_hash
from roomplan_lib.training.checkpoint import list_checkpoints, read_state
from roomplan_lib.training.collator import Sample
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.processes import join_processes
from roomplan_lib.training.run import load_model_folder, train
from roomplan_lib.training.sampler import GroupedBatchSampler

PROJECT = Path(__file__).parents[1]
STEPS = 20
DIGITS = 5e-5  # half of the last printed one: losses that print alike, wherever they are rounded


def change(config, **sections):
    """The config with fields replaced, section by section, and top-level ones."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(config, **parts)


def losses(run_dir, key="loss"):
    return {e["step"]: e[key] for e in read_metrics(run_dir / "metrics.jsonl") if key in e}


@pytest.fixture(scope="module")
def runs(sample_files, tmp_path_factory):
    """Config per way of training, every run but those of one process trained, and what the processes printed.

    16 samples per step: 4 micro-batches of one process, 2 of each of two.
    """
    config = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny.yaml")
    files = {s: tuple(str(sample_files[f"{kind}_{s}"]) for kind in ("anchors", "qa")) for s in ("train", "val")}
    folder = tmp_path_factory.mktemp("runs")
    one = change(
        config,
        runs_dir=str(folder),
        data={"train_files": files["train"], "eval_files": files["val"], "image_size": 56},
        training={
            "max_steps": STEPS, "micro_batch_size": 4, "group_size": 2, "gradient_accumulation_steps": 4,
            "log_every_steps": 1, "eval_every_steps": 10, "num_eval_samples": 11, "num_generated_samples": 5,
            "save_every_steps": 10, "device": "cpu",
        },
        model={
            "vggt": config.model.vggt | {"depth": 1, "patch_embed_depth": 1},
            "resampler": dataclasses.replace(config.model.resampler, num_layers=1),
            "language_model": dataclasses.replace(
                config.model.language_model, config=config.model.language_model.config | {"num_hidden_layers": 2}
            ),
        },
        prediction={"max_new_tokens": 6, "batch_size": 2},
    )  # fmt: skip
    one = dataclasses.replace(one, run_name="one")
    two = change(one, training={"gradient_accumulation_steps": 2}, distributed={"num_processes": 2})
    language_model = dataclasses.replace(one.model.language_model, lora=LoraSettings(rank=4, alpha=8.0, dropout=0.2))
    exact = change(
        two,
        model={"freeze_vggt": True, "language_model": language_model},
        training={"max_steps": 5, "log_every_steps": 3, "eval_every_steps": 2},
    )
    configs = {
        "one": one,
        "large": change(one, run_name="large", training={"micro_batch_size": 16, "gradient_accumulation_steps": 1}),
        "ddp": change(two, run_name="ddp"),
        "zero3": change(two, run_name="zero3", distributed={"strategy": "zero3"}),
        "mixed": change(two, run_name="mixed", distributed={"strategy": "zero3"}),
        "bad": change(two, run_name="bad"),
        **{
            f"{strategy} {end}": change(
                exact,
                run_name=f"{strategy} {end}",
                distributed={"strategy": strategy},
                training={"optimizer": optimizer},
            )
            for strategy, optimizer in (("ddp", "muon"), ("zero3", "adamw"))
            for end in ("whole", "cut")
        },
        "dead": change(two, run_name="dead", training={"save_every_steps": 1}),
    }
    paths = {name: folder / f"{name}.yaml" for name in configs}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump(to_dict(configs[name]), sort_keys=False))
    (folder / "mixed_ddp.yaml").write_text(
        yaml.safe_dump(to_dict(change(configs["mixed"], distributed={"strategy": "ddp"})), sort_keys=False)
    )
    jobs = [paths["ddp"], paths["zero3"], f"{paths['mixed']}@3", f"{folder / 'mixed_ddp.yaml'}@7", f"{paths['bad']}!"]
    for strategy in ("ddp", "zero3"):
        cut = paths[f"{strategy} cut"]
        jobs += [paths[f"{strategy} whole"], f"{cut}@1", f"{cut}@3", cut]
    return configs, start_group([*map(str, jobs), f"{paths['dead']}#"])


def start_group(jobs):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run(
        [*launcher, str(PROJECT / "tests" / "train_group.py"), *jobs],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "Signal 9 (SIGKILL)" in result.stderr, result.stdout[-3000:] + result.stderr[-3000:]  # of the last job
    return result.stdout


@pytest.fixture(scope="module")
def single(runs):
    return train(runs[0]["one"])


@pytest.mark.parametrize("name", ["ddp", "zero3"])
def test_two_processes_repeat_the_losses_of_one(runs, single, name):
    run_dir = runs[0][name].run_dir
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    for key in ("loss", "eval_loss"):
        one, two = losses(single, key), losses(run_dir, key)
        assert two == pytest.approx(one, abs=DIGITS)
    assert losses(run_dir, "grad_norm") == pytest.approx(losses(single, "grad_norm"), rel=1e-4)
    for key in ("eval_em", "eval_valid_json_rate"):  # answers in words, shared out over the processes
        assert losses(run_dir, key) == losses(single, key) and len(losses(single, key)) == 2


def test_micro_batches_equal_one_large_batch(runs, single):
    """Answers differ in length, so a mean over means of micro-batches would be another number."""
    large = losses(train(runs[0]["large"]))
    assert large == pytest.approx(losses(single), abs=DIGITS)


def test_the_files_of_a_sharded_run_are_those_of_one_process(runs, single):
    one, zero3 = (list_checkpoints(path / "checkpoints")[-1] for path in (single, runs[0]["zero3"].run_dir))
    assert read_state(zero3)["strategy"] == "zero3" and read_state(zero3)["world_size"] == 2
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / name), load_file(zero3 / name)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].shape == b[key].shape
            assert torch.allclose(a[key], b[key], atol=2e-3 if name.startswith("model") else 1e-4), key
    load_model_folder(runs[0]["zero3"].run_dir / "model")


def test_a_run_goes_on_with_other_processes_and_another_strategy(runs, single, capsys):
    """Stopped after step 4 of ZeRO-3 on two, after step 8 of replicas on two, then finished by one process."""
    config = runs[0]["mixed"]
    assert "mixed: Preempted" in runs[1] and "after step 4 of 20" in runs[1] and "after step 8 of 20" in runs[1]
    assert not (config.run_dir / "STOP").exists()
    assert json.loads((config.run_dir / "status.json").read_text())["status"] == "preempted"
    train(change(config, distributed={"strategy": "ddp", "num_processes": 1}))
    printed = capsys.readouterr().out
    assert "begun with 16 samples per step" in printed and "accumulates 4 micro-batches" in printed
    assert "distributed.num_processes is now 1, was 2" in printed
    assert losses(config.run_dir) == pytest.approx(losses(single), abs=DIGITS)
    assert json.loads((config.run_dir / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_stopped_processes_repeat_uninterrupted_ones_to_the_bit(runs, strategy):
    """LoRA with dropout, stopped after steps 2 and 4 of 5, on as many processes each time; replicas with Muon."""
    whole, cut = (runs[0][f"{strategy} {end}"].run_dir for end in ("whole", "cut"))
    for step in (2, 4):
        assert runs[1].count(f"{cut}: stopped on request after step {step} of 5") == 2  # both processes say so
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert file_hash(whole / "checkpoints/checkpoint-5" / file) == file_hash(
            cut / "checkpoints/checkpoint-5" / file
        )
    for key in ("loss", "grad_norm", "eval_loss"):
        assert losses(whole, key) == losses(cut, key) and losses(whole, key)


def test_all_processes_stop_at_a_loss_that_is_no_number(runs):
    config = runs[0]["bad"]
    ends = [line for line in runs[1].splitlines() if " bad: ValueError: step " in line]
    assert sorted(line[0] for line in ends) == ["0", "1"]
    assert "the loss is nan" in ends[0] and "scene" in ends[0]
    status = json.loads((config.run_dir / "status.json").read_text())
    assert status["status"] == "failed" and "the loss is nan" in status["error"]
    assert not list_checkpoints(config.run_dir / "checkpoints")


def test_when_a_process_is_killed_the_others_end_and_say_so(runs):
    run_dir = runs[0]["dead"].run_dir
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "failed" and status["step"] == 1
    assert "another process of this run is gone" in status["error"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "1"}, {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}])
def test_another_number_of_processes_than_asked_for_is_an_error(runs, variables, monkeypatch):
    """A launcher that starts processes which do not know of each other must not train the run twice."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"distributed.num_processes asks for 2 on each node, but [14] were started"):
        train(runs[0]["ddp"])


def test_two_hundred_samples_cannot_be_cut_by_three(runs):
    config = change(runs[0]["one"], training={"micro_batch_size": 6, "gradient_accumulation_steps": 4})
    with pytest.raises(ValueError, match=r"micro_batch_size: 4 -> 6; global batch size 16 -> 24"):
        train(config)


# ---------------------------------------------------------------------------- who sees what
def samples_of(sizes, tmp_path):
    return [
        Sample({"images": [f"{scene}.png"], "scene_id": str(scene)}, tmp_path)
        for scene, size in enumerate(sizes)
        for _ in range(size)
    ]


@pytest.mark.parametrize("cut", [(8, 1, 4), (8, 2, 2), (8, 4, 1), (4, 1, 8), (16, 2, 1), (32, 1, 1), (4, 4, 2)])
def test_a_step_holds_the_same_samples_however_it_is_cut(cut, tmp_path):
    size, world_size, accumulation = cut
    samples = samples_of([7, 4, 9, 1, 12, 5], tmp_path)
    options = {"group_size": 4, "num_steps": 9, "seed": 3}
    whole = list(GroupedBatchSampler(samples, micro_batch_size=32, **options))
    options |= {"micro_batch_size": size, "accumulation": accumulation, "world_size": world_size}
    parts = [list(GroupedBatchSampler(samples, rank=rank, **options)) for rank in range(world_size)]
    assert all(len(part) == 9 * accumulation for part in parts)
    for step in range(9):
        drawn = [draw for part in parts for batch in part[step * accumulation :][:accumulation] for draw in batch]
        assert sorted(drawn) == sorted(whole[step])
        for part in parts:
            for batch in part[step * accumulation :][:accumulation]:
                views = [(samples[i].view_key, draw) for i, draw in batch]
                changes = 1 + sum(a != b for a, b in zip(views, views[1:], strict=False))
                assert changes <= size // 4  # a group stays whole
    later = [list(GroupedBatchSampler(samples, rank=rank, start_step=5, **options)) for rank in range(world_size)]
    assert later == [part[5 * accumulation :] for part in parts]


def test_processes_share_a_step_by_the_sources_shares(tmp_path):
    samples = [
        Sample({"images": [f"{source}/{i // 5}"], "scene_id": "a"}, tmp_path, source)
        for source, count in enumerate((10, 100))
        for i in range(count)
    ]
    options = {"micro_batch_size": 10, "group_size": 5, "num_steps": 50, "seed": 0, "shares": (0.7, 0.3)}
    seen = [
        samples[i].source
        for rank in range(2)
        for batch in GroupedBatchSampler(samples, accumulation=2, rank=rank, world_size=2, **options)
        for i, _ in batch
    ]
    assert np.mean(seen) == pytest.approx(0.3, abs=0.01)


def test_one_process_joins_no_group(tiny_config):
    with join_processes(tiny_config) as processes:
        assert processes.world_size == 1 and not torch.distributed.is_initialized()
        assert processes.sum(2, 3.5) == [2, 3.5] and processes.gather("a") == ["a"]
