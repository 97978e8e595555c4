"""A run that is killed, asked to stop, or runs out of disk loses nothing, and goes on as if it had not been."""

import contextlib
import dataclasses
import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from roomplan_lib.config import FeaturesConfig, LoraSettings, load_run_config, to_dict
from roomplan_lib.files import file_hash
from roomplan_lib.model.vggt import VGGT
from roomplan_lib.model.vlm import RoomPlanVLM, vggt_settings
from roomplan_lib.training import checkpoint as checkpoint_module
from roomplan_lib.training import run as run_module
from roomplan_lib.training import status as status_module
from roomplan_lib.training import trainer as trainer_module
from roomplan_lib.training.answers import Answer, score_answers, summarise_answers
from roomplan_lib.training.checkpoint import list_checkpoints, newest_checkpoint, read_state
from roomplan_lib.training.collator import Sample, load_samples
from roomplan_lib.training.consolidate import consolidate
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.run import load_model_folder, make_collator, make_model, make_tokenizer, train
from roomplan_lib.training.start import start_folder
from roomplan_lib.training.status import Preempted
from roomplan_lib.training.strategy import Replicated

PROJECT = Path(__file__).parents[1]


def change(config, **sections):
    parts = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(config, **parts)


@pytest.fixture(scope="module")
def settings(sample_files, tmp_path_factory):
    """Ten steps of a few samples each, saved after every third, a model of one layer per part, with dropout."""
    config = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny.yaml")
    files = {s: tuple(str(sample_files[f"{kind}_{s}"]) for kind in ("anchors", "qa")) for s in ("train", "val")}
    model = config.model
    return change(
        config,
        run_name="test",
        runs_dir=str(tmp_path_factory.mktemp("whole")),
        data={"train_files": files["train"], "eval_files": files["val"], "image_size": 56},
        model={
            "vggt": model.vggt | {"depth": 1, "patch_embed_depth": 1},
            "freeze_vggt": True,
            "resampler": dataclasses.replace(model.resampler, num_layers=1),
            "language_model": dataclasses.replace(
                model.language_model,
                config=model.language_model.config | {"num_hidden_layers": 1},
                lora=LoraSettings(rank=4, alpha=8.0, dropout=0.2),
            ),
        },
        training={
            "max_steps": 10, "micro_batch_size": 4, "group_size": 2, "log_every_steps": 1, "save_every_steps": 3,
            "eval_every_steps": 5, "num_eval_samples": 8, "device": "cpu",
        },
    )  # fmt: skip


@pytest.fixture
def config(settings, tmp_path):
    return change(settings, runs_dir=str(tmp_path))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Runs in this process and in others are compared to the bit, and sums over threads round in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(settings):
    """The run's folder after an uninterrupted training."""
    return train(settings)


def losses(run_dir):
    return {e["step"]: e["loss"] for e in read_metrics(run_dir / "metrics.jsonl") if "loss" in e}


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def stop_in(config, step):
    """Trains until the run is asked to stop in `step` by its STOP file."""
    with pytest.raises(Preempted, match=rf"after step {step} of {config.training.max_steps}"):
        train(config, lambda entry: entry["step"] == step - 1 and (config.run_dir / "STOP").touch())


# ---------------------------------------------------------------------------- stopping and going on
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_repeats_the_uninterrupted_one_to_the_bit(config, tmp_path, optimizer):
    """Losses, gradients and every weight, with dropout, and with log entries that cover steps of two starts."""
    config = change(config, training={"log_every_steps": 4, "optimizer": optimizer})
    whole = train(change(config, runs_dir=str(tmp_path / "whole")))
    config = change(config, runs_dir=str(tmp_path / "cut"))
    (config.run_dir).mkdir(parents=True)
    for step in (1, 2):  # a STOP from before the first step: that step is made, saved, and the run ends
        (config.run_dir / "STOP").touch()
        with pytest.raises(Preempted, match=f"after step {step} of 10"):
            train(config)
        assert names(config.run_dir) == [f"checkpoint-{k}" for k in range(1, step + 1)]
        assert not (config.run_dir / "STOP").exists() and status(config.run_dir)["status"] == "preempted"
    stop_in(config, 6)
    train(config)
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    curves = [
        [{k: v for k, v in e.items() if k in kept} for e in read_metrics(d / "metrics.jsonl")]
        for d in (whole, config.run_dir)
    ]
    assert curves[0] == curves[1] and [e["step"] for e in curves[0]] == [1, 4, 5, 8, 10, 10]
    for file in ("model/model.safetensors", "checkpoints/checkpoint-10/optimizer.safetensors"):
        assert file_hash(whole / file) == file_hash(config.run_dir / file)
    elapsed = [entry["elapsed_s"] for entry in read_metrics(config.run_dir / "metrics.jsonl")]
    assert elapsed == sorted(elapsed)
    assert names(config.run_dir) == ["checkpoint-10", "checkpoint-9"]  # keep_checkpoints


@pytest.mark.parametrize("kind", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_a_stop_and_are_given_back(config, kind):
    before = [signal.getsignal(k) for k in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted):
        train(config, lambda entry: entry["step"] == 2 and os.kill(os.getpid(), kind))
    assert [signal.getsignal(k) for k in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)] == before
    assert status(config.run_dir) | {"time": 0} == {
        "status": "preempted", "step": 3, "max_steps": 10, "world_size": 1, "asked_by": kind.name, "time": 0,
    }  # fmt: skip
    assert names(config.run_dir) == ["checkpoint-3"]


def test_a_second_interrupt_does_not_wait(config):
    with pytest.raises(KeyboardInterrupt):
        train(config, lambda entry: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert status(config.run_dir)["status"] == "failed"


def test_a_run_in_another_thread_listens_to_the_file_alone(config):
    ends = []

    def work():
        try:
            train(config, lambda entry: entry["step"] == 1 and (config.run_dir / "STOP").touch())
        except Preempted as end:
            ends.append(str(end))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(ends) == 1 and "after step 2" in ends[0]


def test_a_stop_waits_for_no_evaluation_and_the_next_start_makes_it(config, whole):
    def evaluations(run_dir):
        entries = read_metrics(run_dir / "metrics.jsonl")
        return {e["step"]: e["eval_loss"] for e in entries if "eval_loss" in e}

    stop_in(config, 5)
    assert names(config.run_dir) == ["checkpoint-3", "checkpoint-5"] and evaluations(config.run_dir) == {}
    train(config)
    assert evaluations(config.run_dir) == evaluations(whole) and list(evaluations(whole)) == [5, 10]
    assert losses(config.run_dir) == losses(whole)


def test_a_signal_to_all_processes_of_a_job_ends_no_loader(config, whole):
    """As scancel sends it: the trainer still needs its loaders for the rest of the step, or of an evaluation."""

    def end_loaders(entry):
        loaders = multiprocessing.active_children()
        assert loaders
        for loader in loaders:
            os.kill(loader.pid, signal.SIGTERM)
        if entry["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    config = change(config, data={"num_workers": 2})
    with pytest.raises(Preempted, match="after step 6"):
        train(config, end_loaders)
    assert losses(config.run_dir) == {step: loss for step, loss in losses(whole).items() if step <= 6}


HOLDER = """
import sys, time
from pathlib import Path
from roomplan_lib.training.status import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(run_dir, seconds):
    """Another process that trains the run, for so long."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir), str(seconds)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"taken\n"
    return holder


def test_a_run_is_trained_by_one_start_at_a_time(config, monkeypatch):
    monkeypatch.setattr(status_module, "LOCK_WAIT_S", 0.0)
    stop_in(config, 2)
    before = {path.name: path.read_bytes() for path in config.run_dir.glob("*.*") if path.is_file()}
    holder = hold(config.run_dir, 60)
    for run in (config, change(config, training={"learning_rate": 0.5})):
        with pytest.raises(ValueError, match=rf"test is being trained by process {holder.pid} on .*another run_name"):
            train(run)
    assert before == {name: (config.run_dir / name).read_bytes() for name in before}
    holder.kill()  # the kernel gives its lock back
    holder.wait()
    train(config)
    assert not (config.run_dir / ".lock").exists()
    holder = hold(config.run_dir.with_name("new"), 1.5)
    monkeypatch.setattr(status_module, "LOCK_WAIT_S", 60.0)
    train(change(config, run_name="new", training={"max_steps": 1}))  # waits for the one that ends
    holder.wait()


def test_a_start_that_fails_at_once_leaves_no_folder(config):
    with pytest.raises(ValueError, match="absent.jsonl is missing"):
        train(change(config, data={"train_files": ("absent.jsonl",)}))
    assert not config.run_dir.exists()


def test_a_start_clears_what_killed_ones_left(config):
    left = [".model.partial/config.json", "checkpoints/.checkpoint-3.partial/x", ".status.json.12-0a1b.tmp"]
    for name in left:
        (config.run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (config.run_dir / name).write_text("half")
    train(change(config, training={"max_steps": 1}))
    assert not [path for path in config.run_dir.rglob(".*") if path.suffix in (".tmp", ".partial")]
    assert "half" not in (config.run_dir / "model" / "config.json").read_text()


KILLED = """
import os, random, signal, sys, threading, time
import torch
from roomplan_lib.config import load_run_config
from roomplan_lib.training import checkpoint
from roomplan_lib.training.run import train
from roomplan_lib.training.status import Preempted

torch.set_num_threads(1)
config, rng, seconds = load_run_config(sys.argv[1]), random.Random(int(sys.argv[3])), float(sys.argv[4])
save_file = checkpoint.save_file


def dies_while_writing(tensors, path):
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


for number in range(int(sys.argv[2]) + 1):
    child = os.fork()
    if child == 0:
        kind = ("save", signal.SIGKILL, signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM)[number % 5]
        if number == int(sys.argv[2]):
            pass
        elif kind == "save":
            checkpoint.save_file = dies_while_writing
        else:
            after = rng.uniform(0.05, seconds)
            threading.Timer(after, os.kill, (os.getpid(), kind)).start()
        try:
            train(config)
        except Preempted:
            pass
        os._exit(0)
    end = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("end", end, sorted(os.listdir(config.run_dir / "checkpoints")), flush=True)
"""


def kill_again_and_again(config, whole, tmp_path, num_kills, seconds):
    """Starts the run `num_kills` + 1 times; all starts but the last are killed within about `seconds`."""
    (config.run_dir / "checkpoints").mkdir(parents=True)
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    command = [sys.executable, "-c", KILLED, str(path), str(num_kills), "7", str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ends = [line for line in result.stdout.splitlines() if line.startswith("end ")]
    assert len(ends) == num_kills + 1 and ends[-1].startswith("end 0"), result.stdout[-2000:] + result.stderr[-2000:]
    assert any(line.startswith("end -9") for line in ends)
    assert losses(config.run_dir) == losses(whole)
    assert file_hash(config.run_dir / "model/model.safetensors") == file_hash(whole / "model/model.safetensors")
    for checkpoint in list_checkpoints(config.run_dir / "checkpoints"):
        read_state(checkpoint)  # whole
    assert names(config.run_dir) == names(whole)


def test_kills_at_any_moment_lose_nothing(config, whole, tmp_path):
    kill_again_and_again(config, whole, tmp_path, 4, 2.0)


@pytest.mark.slow
def test_twenty_kills_at_any_moment_lose_nothing(config, tmp_path):
    config = change(config, training={"max_steps": 60, "save_every_steps": 4})
    whole = train(change(config, runs_dir=str(tmp_path / "whole")))
    kill_again_and_again(config, whole, tmp_path, 20, 4.0)


# ---------------------------------------------------------------------------- damage and full disks
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(config, whole, tmp_path, capsys):
    for number, (file, damage) in enumerate(
        [
            ("model.safetensors", lambda path: os.truncate(path, path.stat().st_size - 100)),
            ("optimizer.safetensors", flip_a_bit),
            ("random.safetensors", lambda path: path.unlink()),
            ("state.json", lambda path: path.write_text(path.read_text()[:50])),
            ("state.json", lambda path: path.write_text(path.read_text().replace('"step": 7', '"step": 5'))),
        ]
    ):
        run = change(config, runs_dir=str(tmp_path / str(number)))
        stop_in(run, 7)
        damage(run.run_dir / "checkpoints" / "checkpoint-7" / file)
        capsys.readouterr()
        train(run)
        printed = capsys.readouterr().out
        assert f"checkpoint-7/{file}" in printed and "going on from checkpoint-6" in printed, printed
        assert "damaged-checkpoint-7" in names(run.run_dir)
        assert losses(run.run_dir) == losses(whole)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_when_all_checkpoints_are_damaged_a_person_decides(config):
    stop_in(config, 4)
    for checkpoint in list_checkpoints(config.run_dir / "checkpoints"):
        flip_a_bit(checkpoint / "optimizer.safetensors")
    for _ in range(2):  # nor does a start that is repeated by a queue decide it
        with pytest.raises(ValueError, match=r"every checkpoint is damaged \(.*optimizer.safetensors.*sha256.*delete"):
            train(config)
        assert names(config.run_dir) == ["checkpoint-3", "checkpoint-4"]


def test_a_folder_without_its_last_file_is_no_checkpoint(config):
    stop_in(config, 4)
    (config.run_dir / "checkpoints" / "checkpoint-4" / "state.json").unlink()
    (config.run_dir / "checkpoints" / "checkpoint-backup").mkdir()
    assert newest_checkpoint(config.run_dir / "checkpoints")[0].name == "checkpoint-3"


def test_a_full_disk_is_one_error_and_the_run_goes_on_later(config, whole):
    stop_in(config, 4)
    sizes = [path.stat().st_size for path in (config.run_dir / "checkpoints" / "checkpoint-4").glob("*.safetensors")]
    with files_up_to(max(sizes) // 2):
        with pytest.raises(OSError, match=r"checkpoint-6 could not be written \(.*Free space.*checkpoint-4 is whole"):
            train(config)
    assert names(config.run_dir) == ["checkpoint-3", "checkpoint-4"]
    assert status(config.run_dir)["status"] == "failed" and "could not be written" in status(config.run_dir)["error"]
    train(config)
    assert losses(config.run_dir) == losses(whole)


@contextlib.contextmanager
def files_up_to(num_bytes):
    """A limit on the size of a file stands for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def on_full_disk(function):
    def limited(*args):
        with files_up_to(4096):
            return function(*args)

    return limited


def test_a_disk_that_is_full_at_the_tokenizer_is_the_same_error(config, monkeypatch):
    """The tokenizers library says so by a plain Exception."""
    save = on_full_disk(PreTrainedTokenizerFast.save_pretrained)
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", save)
    with pytest.raises(OSError, match=r"checkpoint-3 could not be written \(.*os error.*Free space.*begins again"):
        train(config)
    assert names(config.run_dir) == []


def test_a_disk_that_is_full_at_the_end_is_told_and_the_run_then_finishes(config, monkeypatch):
    config = change(config, training={"max_steps": 3})
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "copy_model_folder", on_full_disk(run_module.copy_model_folder))
        with pytest.raises(OSError, match=r"model could not be written \(.*too large.*checkpoint-3 is whole"):
            train(config)
    assert status(config.run_dir)["status"] == "failed" and not (config.run_dir / "model").exists()
    load_model_folder(train(config) / "model")


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(config, monkeypatch):
    """A machine that is lost takes with it what its memory alone held; a disk that fails then is told as a full one."""
    folder, flushed, fsync = config.run_dir / "checkpoints", [], os.fsync

    def flush(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == folder and "checkpoint-6" in names(config.run_dir) and "checkpoint-6" not in flushed:
            assert names(config.run_dir) == ["checkpoint-3", "checkpoint-6"]  # its name, too
            flushed.append("checkpoint-6")
        if path.parent.name == ".checkpoint-6.partial":
            assert names(config.run_dir) == [".checkpoint-6.partial", "checkpoint-3"]
            flushed.append(path.name)
        if path.parent.name == ".checkpoint-9.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    config = change(config, training={"keep_checkpoints": 1})
    with pytest.raises(
        OSError, match=r"checkpoint-9 could not be written \(Input/output error\).*checkpoint-6 is whole"
    ):
        train(config)
    assert names(config.run_dir) == ["checkpoint-6"]
    assert sorted(flushed) == sorted(
        path.name for path in [folder / "checkpoint-6", *(folder / "checkpoint-6").iterdir()]
    )


def test_the_model_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    checkpoint, folder, flushed, fsync = tmp_path / "checkpoint-3", tmp_path / "model", [], os.fsync
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", checkpoint_module.STATE):
        (checkpoint / name).write_text(name)

    def flush(descriptor):
        flushed.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), folder.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", flush)
    checkpoint_module.copy_model_folder(checkpoint, folder)
    before = [(name, False) for name in ("config.json", "model.safetensors", ".model.partial")]
    assert sorted(flushed[:-1]) == sorted(before) and flushed[-1] == (tmp_path.name, True)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-3", "model"]
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


# ---------------------------------------------------------------------------- bad steps, dead processes
@pytest.mark.parametrize("value, what", [(float("nan"), "the loss is nan"), (float("inf"), "the loss is inf")])
def test_a_loss_that_is_no_number_names_its_samples(config, monkeypatch, value, what):
    forward = RoomPlanVLM.forward
    config = change(config, training={"gradient_accumulation_steps": 3, "num_eval_samples": 0})
    seen = []

    def poisoned(self, input_ids, **inputs):
        output = forward(self, input_ids, **inputs)
        seen.append(input_ids)
        output.loss = output.loss * value if len(seen) == 3 * 4 + 2 else output.loss  # step 5, its second micro-batch
        return output

    monkeypatch.setattr(RoomPlanVLM, "forward", poisoned)
    with pytest.raises(ValueError, match=rf"step 5: {what}; its samples: \d+ \(scene") as caught:
        train(config)
    sampler = trainer_module.GroupedBatchSampler(
        load_samples(config.data.train_paths), micro_batch_size=4, group_size=2, num_steps=10, seed=0, accumulation=3
    )
    blamed = sorted({i for i, _ in list(sampler)[13]})
    listed = [int(part.split(" (")[0]) for part in str(caught.value).split("samples: ")[1].split("; ")[0].split(", ")]
    assert listed == blamed
    assert status(config.run_dir)["status"] == "failed" and names(config.run_dir) == ["checkpoint-3"]


def test_an_exploding_loss_stops_the_run(config, monkeypatch):
    reduce = Replicated.reduce
    losses_seen = []

    def grows(self):
        losses_seen.append(reduce(self))
        return losses_seen[-1] * (30 if len(losses_seen) == 6 else 1)

    monkeypatch.setattr(Replicated, "reduce", grows)
    with pytest.raises(
        ValueError, match=r"step 6: the loss is .*explosion_factor \(20\) times the median .* 5 steps; .*raise"
    ):
        train(config)
    losses_seen.clear()
    train(change(config, run_name="never", training={"explosion_factor": 0.0}))


def test_a_gradient_that_is_no_number_stops_the_run(config, monkeypatch):
    step = Replicated.step

    def poisoned(self, rates):
        self.norm = float("inf") if next(iter(self.optimizers[0].state.values()), {}).get("step") == 3 else self.norm
        return step(self, rates)

    monkeypatch.setattr(Replicated, "step", poisoned)
    with pytest.raises(ValueError, match=r"step 4: the gradient is not finite.*samples: \d+ \(scene"):
        train(config)
    assert names(config.run_dir) == ["checkpoint-3"]


@pytest.mark.parametrize("files, step", [("train_paths", 0), ("eval_paths", 5)])
def test_a_dead_loader_process_is_named(config, monkeypatch, files, step):
    config = change(config, data={"num_workers": 1})

    class Deadly(list):
        def __getitem__(self, index):
            os._exit(1) if torch.utils.data.get_worker_info() else None
            found = super().__getitem__(index)
            return Deadly(found) if isinstance(index, slice) else found

    def load(paths):
        return (Deadly if paths == getattr(config.data, files) else list)(load_samples(paths))

    monkeypatch.setattr("roomplan_lib.training.run.load_samples", load)
    with pytest.raises(RuntimeError, match=rf"a loader process died after step {step} .*data.num_workers"):
        train(config)
    assert status(config.run_dir)["status"] == "failed"


# ---------------------------------------------------------------------------- settings of a run that goes on
def test_settings_that_change_nothing_learned_may_differ(config, whole, capsys):
    stop_in(config, 4)
    other = change(
        config,
        data={"num_workers": 1, "cache_scenes": 2, "features": FeaturesConfig(on_missing="error")},
        training={
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "save_every_steps": 5,
            "keep_checkpoints": 3,
        },
    )
    capsys.readouterr()
    train(other)
    printed = capsys.readouterr().out
    assert "data.num_workers is now 1, was 0" in printed and "training.micro_batch_size is now 2, was 4" in printed
    assert losses(config.run_dir) == pytest.approx(losses(whole), rel=0.02)  # dropout falls on other cuts


@pytest.mark.parametrize(
    "section, values, reason",
    [
        ("training", {"learning_rate": 5e-4}, r"training.learning_rate: 0.001 -> 0.0005"),
        ("training", {"max_steps": 12}, r"training.max_steps: 10 -> 12"),
        ("training", {"gradient_accumulation_steps": 2}, r"global batch size 4 -> 8"),
        ("data", {"view_dropout": 0.5}, r"data.view_dropout: 0.0 -> 0.5"),
    ],
)
def test_all_other_settings_are_refused(config, section, values, reason):
    stop_in(config, 2)
    with pytest.raises(ValueError, match=reason):
        train(change(config, **{section: values}))


def test_settings_newer_than_the_run_count_as_their_defaults(config):
    stop_in(config, 2)
    file = config.run_dir / "run.yaml"
    old = yaml.safe_load(file.read_text())
    del old["distributed"], old["data"]["features"], old["training"]["explosion_factor"]
    file.write_text(yaml.safe_dump(old))
    train(config)
    assert load_run_config(file) == config


# ---------------------------------------------------------------------------- starting from another run
def test_a_run_starts_from_what_another_has_learned(config, tmp_path, capsys):
    first = train(change(config, run_name="first", training={"max_steps": 4}))
    learned, tokenizer = load_model_folder(first / "model")
    below = "first/checkpoints/checkpoint-4"
    for name in ("first", below, str(first), str(first / "model"), str(first / "checkpoints" / "checkpoint-4")):
        second = change(config, run_name="second", training={"start_from": name, "learning_rate": 5e-4})
        own_tokenizer = make_tokenizer(second, [])
        assert own_tokenizer.get_vocab() == tokenizer.get_vocab()
        model = make_model(second, own_tokenizer)
        for key, value in learned.state_dict().items():
            assert torch.equal(value, model.state_dict()[key]), key
    run_dir = train(change(second, training={"max_steps": 2, "start_from": "first"}))
    record = json.loads((run_dir / "run.json").read_text())["started_from"]
    assert record == {"folder": str(first / "model"), "sha256": file_hash(first / "model" / "model.safetensors")}
    assert losses(run_dir)[1] < losses(first)[1] - 0.1
    shutil.rmtree(run_dir / "model")
    shutil.rmtree(first)  # a run that goes on has all it needs
    train(change(second, training={"max_steps": 2, "start_from": "first"}))
    assert "starts from" in capsys.readouterr().out


def test_a_run_starts_from_the_model_that_comes_with_the_package(tmp_path, monkeypatch):
    """With the encoder that it holds, for which the stage names no other weights; a folder of that name comes first."""
    monkeypatch.chdir(tmp_path)
    shipped, tokenizer = load_model_folder("roomplan-tiny")
    stage = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny_plans.yaml")
    start = {"start_from": "roomplan-tiny", "device": "cpu"}
    stage = change(stage, runs_dir=str(tmp_path), training=start, model={"vggt_weights": ""})
    own_tokenizer = make_tokenizer(stage, [])
    assert own_tokenizer.get_vocab() == tokenizer.get_vocab()
    state = make_model(stage, own_tokenizer).state_dict()
    assert all(torch.equal(value.float(), state[key].float()) for key, value in shipped.state_dict().items())

    encoder = shipped.encoder.to(torch.bfloat16)
    encoder.save_pretrained(tmp_path / "same")
    made = make_model(change(stage, model={"vggt_weights": "same"}), own_tokenizer)
    assert "encoder" in made.config.references  # not kept a second time
    with torch.no_grad():
        next(encoder.parameters()).add_(1)
    encoder.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="encoder is in it with other weights than those of .*other; name no pre"):
        make_model(change(stage, model={"vggt_weights": "other"}), own_tokenizer)

    (tmp_path / "roomplan-tiny").mkdir()
    (tmp_path / "roomplan-tiny" / "run.yaml").touch()
    with pytest.raises(ValueError, match="the run roomplan-tiny is not finished"):
        start_folder(stage)
    (tmp_path / "roomplan-tiny" / "model.safetensors").touch()
    assert start_folder(stage) == tmp_path / "roomplan-tiny"


def test_parts_that_the_former_run_lacks_are_new_and_all_else_must_fit(config, capsys):
    language_model = dataclasses.replace(config.model.language_model, lora=None)
    positions = dataclasses.replace(config.model.positions, method="base")
    plain = change(
        config, run_name="plain", training={"max_steps": 2},
        model={"language_model": language_model, "positions": positions},
    )  # fmt: skip
    train(plain)
    capsys.readouterr()
    train(change(config, training={"start_from": "plain", "max_steps": 2}))
    assert "new: LoRA adapters, positions" in capsys.readouterr().out
    train(change(config, run_name="full", training={"max_steps": 2}))
    resampler = dataclasses.replace(config.model.resampler, num_latents=16)
    wrong = [
        ({"resampler": resampler}, "full", r"model.resampler: .*'num_latents': 32.* there, .*16.* here"),
        ({"tap_layers": (0,)}, "full", r"model.tap_layers: \[-1\] there, \[0\] here"),
        ({"language_model": language_model}, "full", r"model.language_model.lora: .* there, None here"),
        ({}, "absent", r"training.start_from: absent: no run, model folder or checkpoint"),
    ]
    for changes, start_from, reason in wrong:
        with pytest.raises(ValueError, match=reason):
            train(change(config, run_name="wrong", model=changes, training={"start_from": start_from}))


def test_a_spatial_resampler_starts_from_one_of_other_places(config):
    """No weight of it depends on how many places there are."""

    def resampler(num_latents):
        return {"resampler": dataclasses.replace(config.model.resampler, kind="spatial", num_latents=num_latents)}

    first = train(change(config, run_name="first", training={"max_steps": 2}, model=resampler(8)))
    later = change(config, run_name="later", training={"start_from": "first"}, model=resampler(12))
    model = make_model(later, make_tokenizer(later, []))
    learned, _ = load_model_folder(first / "model")
    assert (learned.num_visual_tokens + 4, model.resampler.config.num_latents) == (model.num_visual_tokens, 12)
    for key, value in learned.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    other = dataclasses.replace(later.model.resampler, ffn_width=later.model.resampler.ffn_width * 2)
    with pytest.raises(ValueError, match="model.resampler: .*'ffn_width'"):
        train(change(later, model={"resampler": other}))


def test_a_start_with_missing_weights_lists_them(config):
    train(change(config, run_name="first", training={"max_steps": 1}))
    file = config.run_dir.with_name("first") / "model" / "model.safetensors"
    weights = load_file(file)
    lost = [key for key in weights if key.startswith("resampler")][:2]
    checkpoint_module.save_file({k: v for k, v in weights.items() if k not in lost}, file)
    with pytest.raises(ValueError, match=f"{lost[0]} is not in it; {lost[1]} is not in it"):
        train(change(config, training={"start_from": "first"}))


# ---------------------------------------------------------------------------- one folder, and peft's adapter
def test_a_run_becomes_one_folder_and_an_adapter_that_peft_alone_reads(config, tmp_path):
    run_dir = train(change(config, training={"max_steps": 4, "learning_rate": 0.02, "warmup_ratio": 0.0}))
    folder = consolidate(run_dir)
    assert folder == run_dir / "consolidated"
    model, tokenizer = load_model_folder(folder)
    trained, _ = load_model_folder(run_dir / "model")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in model.state_dict().items())
    base = AutoModelForCausalLM.from_pretrained(folder / "language_model")
    ids = torch.randint(0, len(tokenizer), (2, 9))
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
        expected = model.language_model(ids).logits
    assert torch.equal(adapted, expected) and (adapted - before).abs().max() > 1e-3
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        folder / "language_model"
    )
    with pytest.raises(ValueError, match=r"consolidated exists; delete it"):
        consolidate(run_dir)
    checkpoint = list_checkpoints(run_dir / "checkpoints")[0]
    other = consolidate(checkpoint, tmp_path / "other")
    assert file_hash(other / "model.safetensors") == file_hash(checkpoint / "model.safetensors")
    flip_a_bit(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: damaged"):
        consolidate(checkpoint)
    with pytest.raises(ValueError, match="no run with a trained model"):
        consolidate(tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_whole_folder_needs_nothing_else(config, tmp_path):
    """The frozen encoder that a run names by its folder goes into the file, all of it in bfloat16."""
    VGGT(vggt_settings(config.model)).save_pretrained(tmp_path / "vggt")
    named = change(
        config, model={"vggt_weights": str(tmp_path / "vggt"), "freeze_vggt": True}, training={"max_steps": 2}
    )
    run_dir = train(named)
    trained, _ = load_model_folder(run_dir / "model")
    folder = consolidate(run_dir, tmp_path / "whole", whole=True, dtype="bfloat16")
    assert (folder / "run.yaml").read_bytes() == (run_dir / "run.yaml").read_bytes()
    assert (folder / "metrics.jsonl").is_file() and not (folder / "scores.json").exists()
    shutil.rmtree(tmp_path / "vggt")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_model_folder(run_dir / "model")
    model, _ = load_model_folder(folder)
    state = model.state_dict()
    assert not model.config.references and set(state) == set(trained.state_dict())
    assert str(tmp_path) not in (folder / "config.json").read_text()
    for key, value in trained.state_dict().items():
        assert torch.equal(state[key].float(), value.bfloat16().float()), key
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}


# ---------------------------------------------------------------------------- answers while a run trains
def test_answers_are_scored_by_hand(config):
    question = Sample({"question": "?", "answer": "two chairs", "answers": ["two chairs", "2"]}, Path())
    anchor = next(s for s in load_samples(config.data.train_paths) if s.record["task"] == "place_anchor")
    tokenizer = make_tokenizer(config, load_samples(config.data.train_paths))
    batch = make_collator(make_model(config, tokenizer), tokenizer, config.data)([anchor])
    right = tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0][:-1])
    data = json.loads(right)
    data["center"][0] = round(data["center"][0] + 0.3, 2)
    data["center"][1] = round(data["center"][1] - 0.4, 2)
    texts = ["Two  chairs.", "2", "three", right, json.dumps(data), "{"]
    scores = score_answers([question] * 3 + [anchor] * 3, texts, "m2")
    assert [a.exact for a in scores[:3]] == [True, True, False] and [a.valid for a in scores[3:]] == [True, True, False]
    # The text is rounded to centimetres, the reference is not.
    assert [a.center_error_m for a in scores[3:]] == [pytest.approx(0, abs=0.01), pytest.approx(0.5, abs=0.01), None]
    summary = {"eval_em": 0.6667, "eval_valid_json_rate": 0.6667, "eval_center_error_m": pytest.approx(0.25, abs=0.01)}
    assert summarise_answers(scores) == summary
    assert summarise_answers([Answer(exact=True)]) == {"eval_em": 1.0}


def test_random_numbers_are_kept_per_process():
    states = {f"{rank}.cpu": torch.Generator().manual_seed(rank).get_state() for rank in range(2)}
    processes = dataclasses.replace(checkpoint_module.Processes(torch.device("cpu")), rank=1)
    checkpoint_module.restore_random_state(states, processes)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(1)).item()
