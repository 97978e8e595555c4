"""Groups of processes: their lines, metrics and errors arrive, they stop when asked, and none outlives its parent."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from roomplan_lib.config import to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.system import available_memory, local_caches
from roomplan_lib.training import launch as launching
from roomplan_lib.training import memory
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.launch import changed_stage, group_command, group_environment, launch
from roomplan_lib.training.status import Preempted

CHILD = "import sys; from roomplan_lib.config import load_run_config; from roomplan_lib.training.launch import launch; "
CHILD += "launch(load_run_config(sys.argv[1]))"


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in local_caches():  # launch sets them for good
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def changed(config, *, strategy="ddp", num_processes=2, **training):
    """The tiny run, smaller still, for several processes."""
    values = {"micro_batch_size": 4, "eval_every_steps": 0, "save_every_steps": 3, "max_steps": 6} | training
    return dataclasses.replace(
        config,
        training=dataclasses.replace(config.training, **values),
        distributed=dataclasses.replace(config.distributed, strategy=strategy, num_processes=num_processes),
    )


def entries(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(run_dir):
    return {e["step"]: e["loss"] for e in entries(run_dir) if "loss" in e}


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())


def processes_of(run_dir):
    """Ids of the living processes, launchers and ranks, that have the run's folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, state = (path / "cmdline").read_bytes(), (path / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(run_dir / "launch" / "run.yaml").encode() in command and state != "Z":
            found.append(int(path.name))
    return found


def ranks_of(run_dir):
    """By rank, the process ids of the group."""
    found = {}
    for pid in processes_of(run_dir):
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        rank = next((v.split(b"=")[1] for v in variables if v.startswith(b"RANK=")), None)
        if rank is not None:
            found[int(rank)] = pid
    return found


def wait_until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def started(config, tmp_path):
    """A program that launches the run, in a process of its own."""
    stage = tmp_path / f"{config.run_name}.yaml"
    stage.write_text(yaml.safe_dump(to_dict(config)))
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, stage], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_train_and_tell(tiny_config, capfd):
    """Interrupted by the notebook's user after a step, then trained to the end: every entry and line arrives once."""
    config = changed(tiny_config)
    told, before = [], signal.getsignal(signal.SIGINT)  # ignored in a suite that a shell runs in the background

    def interrupt(entry):
        told.append(entry)
        if len(told) == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Preempted, match=r"stopped as requested at step \d of 6"):
        launch(config, interrupt)
    stopped_at = status(config.run_dir)["step"]
    assert 1 <= stopped_at < 6 and status(config.run_dir)["status"] == "preempted"
    assert status(config.run_dir)["asked_by"] == "STOP file"
    assert not (config.run_dir / "STOP").exists()
    assert list_checkpoints(config.run_dir / "checkpoints")[-1].name == f"checkpoint-{stopped_at}"
    assert told == entries(config.run_dir)
    assert signal.getsignal(signal.SIGINT) is before

    told_later = []
    assert launch(config, told_later.append) == config.run_dir
    assert [e["step"] for e in told_later] == list(range(stopped_at + 1, 7))
    assert told + told_later == entries(config.run_dir)
    assert status(config.run_dir) | {"time": ""} == {
        "status": "finished", "step": 6, "max_steps": 6, "world_size": 2, "time": ""
    }  # fmt: skip
    printed = capfd.readouterr().out
    assert "SIGINT: the run saves and stops" in printed
    lines = [line for line in printed.splitlines() if re.match(r"step +\d+/6 +loss", line)]
    assert [int(line.split("/")[0][4:]) for line in lines] == list(range(1, 7))
    assert set(lines) <= set((config.run_dir / "train.log").read_text().splitlines())
    assert not processes_of(config.run_dir)


def test_killed_rank_is_named_and_the_run_goes_on_later(tiny_config):
    config = changed(tiny_config, max_steps=400)

    def kill_rank_1(entry):
        if entry["step"] == 4:
            os.kill(ranks_of(config.run_dir)[1], signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"rank 1 was killed by SIGKILL \(out of memory\?\); start the run again"):
        launch(config, kill_rank_1)
    assert status(config.run_dir)["status"] == "failed" and status(config.run_dir)["signal"] == signal.SIGKILL
    assert "rank 1 was killed" in status(config.run_dir)["error"]
    assert not processes_of(config.run_dir)
    assert list_checkpoints(config.run_dir / "checkpoints")


def test_error_of_one_rank_arrives_with_its_traceback(tiny_config):
    """A file where rank 0 needs a folder; rank 1 then fails in an exchange with it, which is not the reason."""
    config = changed(tiny_config, max_steps=2)
    config.run_dir.mkdir()
    (config.run_dir / "tensorboard").write_text("")
    with pytest.raises(OSError, match="tensorboard") as caught:
        launch(config)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert re.search(r"rank 0 failed\nTraceback .*tensorboard", str(caught.value.__cause__), re.DOTALL)
    assert status(config.run_dir)["status"] == "failed" and "signal" not in status(config.run_dir)
    assert "Traceback" in (config.run_dir / "train.log").read_text()


# What torch's launcher prints (2.13) when rank 1 is killed and it has ended rank 0 itself.
KILLED = """Failures:
[1]:
  time      : 2026-11-21_11:58:22
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 26088)  (SIGTERM)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_11:58:22
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 26090)  (SIGKILL)
  error_file: <N/A>
"""


@pytest.mark.parametrize(
    "reports, lines, returncode, expected",
    [
        # rank, second, expected kind, message, in an exchange
        ([(1, 5.0, "", "peer is gone", True), (0, 6.0, "ValueError", "bad sample", False)], "", 1, "^bad sample$"),
        ([(1, 5.0, "ValueError", "first", False), (0, 6.0, "ValueError", "second", False)], "", 1, "^first$"),
        ([(0, 5.0, "", "peer is gone", True)], KILLED, 1, "rank 1 was killed by SIGKILL"),
        ([(0, 5.0, "", "peer is gone", True)], "", 1, r"rank 0 lost a silent process.* \(peer is gone\)\nTraceback"),
        ([(k, 5.0 + k, "", "CUDA error", True) for k in (0, 1)], "", 1, "rank 0 failed\nTraceback of CUDA error"),
        (
            [(0, 5.0, "", "a bug", False)],
            KILLED,
            1,
            "rank 0 failed\nTraceback of a bug",
        ),  # the other hung and was ended
        ([], "", -9, "the launcher of its processes was killed by SIGKILL"),
        ([], "", 137, "the launcher of its processes was killed by SIGKILL"),  # by srun's word
        ([], "out of memory", 253, "the processes ended with exit status 253\nout of memory"),
        ([], "no such option", 2, "the processes ended with exit status 2\nno such option"),
    ],
)
def test_the_reason_is_told_apart_from_its_consequences(tmp_path, reports, lines, returncode, expected):
    for rank, second, kind, message, in_exchange in reports:
        report = {"rank": rank, "time": second, "kind": kind, "message": message, "in_exchange": in_exchange}
        report["lost"] = in_exchange and message == "peer is gone"
        report["traceback"] = f"Traceback of {message}"
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(report))
    running = {"status": "running", "step": 3, "max_steps": 9, "world_size": 2, "time": ""}
    (tmp_path / "status.json").write_text(json.dumps(running))
    with pytest.raises((RuntimeError, ValueError), match=expected):
        launching._raise_failure(tmp_path, tmp_path, lines.splitlines(), returncode, 2, True)
    told = status(tmp_path)
    assert told["status"] == "failed" and told["step"] == 3
    assert (told.get("signal") == 9) == ("killed" in expected) and ("lost" in told) == ("lost" in expected)


def test_a_run_that_another_one_was_refused_in_keeps_its_status(tmp_path):
    finished = {"status": "finished", "step": 9, "max_steps": 9, "world_size": 2, "time": ""}
    (tmp_path / "status.json").write_text(json.dumps(finished))
    report = {"rank": 0, "time": 1.0, "kind": "ValueError", "message": "other settings", "in_exchange": False}
    (tmp_path / "rank-0.json").write_text(json.dumps(report | {"traceback": "Traceback"}))
    with pytest.raises(ValueError, match="other settings"):
        launching._raise_failure(tmp_path, tmp_path, [], 1, 2, False)
    assert status(tmp_path) == finished


def test_nothing_outlives_a_killed_parent(tiny_config, tmp_path):
    """Not even ranks that print nothing, which a broken pipe would end."""
    config = changed(tiny_config, max_steps=2000, log_every_steps=1000)
    program = started(config, tmp_path)
    try:
        wait_until(lambda: losses(config.run_dir))
        assert sorted(ranks_of(config.run_dir)) == [0, 1]
        program.kill()
        program.wait()
        wait_until(lambda: not processes_of(config.run_dir), seconds=10)
    finally:
        for pid in processes_of(config.run_dir):
            os.kill(pid, signal.SIGKILL)
    assert all((path / "state.json").is_file() for path in list_checkpoints(config.run_dir / "checkpoints"))


@pytest.mark.slow
def test_second_interrupt_ends_the_group_at_once(tiny_config, tmp_path):
    config = changed(tiny_config, max_steps=2000, micro_batch_size=96, gradient_accumulation_steps=8)
    program = started(config, tmp_path)
    wait_until(lambda: len(ranks_of(config.run_dir)) == 2)
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=20)
    assert "interrupt again to end it" in output and "KeyboardInterrupt" in output
    wait_until(lambda: not processes_of(config.run_dir), seconds=10)


def test_metrics_that_a_resumed_run_keeps_are_not_new(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "elapsed_s": 1.0}\n{"step": 2, "elapsed_s": 2.0}\n')
    new = launching._NewEntries(path)
    assert new.read() == []
    write_whole(path, '{"step": 1, "elapsed_s": 1.0}\n{"step": 2, "elapsed_s": 2.1}\n{"step": 3, "ela')  # 2 done again
    assert [e["step"] for e in new.read()] == [2]
    with path.open("a") as file:
        file.write('psed_s": 3.0}\n')
    assert [e["step"] for e in new.read()] == [3]
    assert new.read() == []


def test_command_and_environment_of_a_group(tmp_path, monkeypatch):
    """Golden: one node by accelerate alone, several by srun; nothing that turns NVLink or InfiniBand off."""
    monkeypatch.setattr(launching, "free_port", lambda: 12345)
    command = group_command(tmp_path, 1, 8)
    assert "srun" not in command and command[1:3] == ["-m", "accelerate.commands.launch"]
    assert command[-3:] == ["-m", "roomplan_lib.training.launch", str(tmp_path / "run.yaml")]
    shown = " ".join(command)
    assert "--machine_rank 0" in shown and "--num_processes 8" in shown and "--main_process_ip 127.0.0.1" in shown
    monkeypatch.setattr(launching, "_first_address", lambda: "10.0.0.7")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "32")
    command = group_command(tmp_path, 4, 8)
    shown = " ".join(command)
    assert shown.startswith("srun --nodes=4 --ntasks=4 --ntasks-per-node=1 ") and "--kill-on-bad-exit=1" in shown
    assert '--machine_rank "$SLURM_NODEID"' in shown and "--num_machines 4 --num_processes 32" in shown
    assert "--main_process_ip 10.0.0.7 --main_process_port 12345" in shown and "--rdzv_backend static" in shown
    for debug in (False, True):
        names = group_environment(8, 4, debug).keys() - os.environ.keys()
        assert not {name for name in names if name.endswith("_DISABLE")}
        assert ("NCCL_DEBUG" in names) == debug
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert group_environment(8, 1, True)["NCCL_DEBUG"] == "WARN"  # what the user says stays


def test_nodes_and_processes(tiny_config, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    assert launching.num_nodes() == 1
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert launching.num_nodes() == 1
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launching.num_nodes() == 4
    on_gpus = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, device="auto"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launching.processes_per_node(changed(on_gpus, num_processes=0)) == 8
    assert launching.processes_per_node(changed(on_gpus, num_processes=3)) == 3
    assert launching.processes_per_node(changed(tiny_config, num_processes=0)) == 1  # device: cpu
    with pytest.raises(
        ValueError, match="distributed.num_processes: 9 processes need a GPU each, this machine shows 8"
    ):
        launching.processes_per_node(changed(on_gpus, num_processes=9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launching.processes_per_node(changed(on_gpus, num_processes=0)) == 1


CACHES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH", "TORCH_HOME", "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR", "CUDA_CACHE_PATH",
)  # fmt: skip


def test_caches_move_to_scratch_unless_set(tmp_path, monkeypatch):
    for name in CACHES:  # an earlier test of this process may have moved them, torch sets one
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "local"))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    moved = local_caches()
    assert moved.keys() >= {
        "HF_HOME",
        "TORCH_HOME",
        "TORCH_EXTENSIONS_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
        "CUDA_CACHE_PATH",
    }
    assert "TRITON_CACHE_DIR" not in moved and "HF_HUB_CACHE" not in moved
    assert all(path.startswith(str(tmp_path / "local" / "roomplan-")) for path in moved.values())
    hub = tmp_path / "home" / ".cache" / "huggingface" / "hub"
    hub.mkdir(parents=True)
    assert local_caches()["HF_HUB_CACHE"] == str(hub)  # downloaded models are found all the same
    monkeypatch.setenv("HF_HOME", "/models")
    assert not {"HF_HOME", "HF_HUB_CACHE"} & local_caches().keys()
    printed = subprocess.run([sys.executable, "-m", "roomplan_lib.system", "--caches"], capture_output=True, text=True)
    assert f"export TORCH_HOME={tmp_path / 'local'}" in printed.stdout and "TRITON" not in printed.stdout


def test_stage_with_changes(tmp_path):
    stage = Path(__file__).parents[1] / "papermill_runs" / "params" / "tiny.yaml"
    config = changed_stage(
        stage, ["run_name=mine", "training.max_steps=7", "model.language_model.lora.rank=8", "data.eval_files=[]"]
    )
    assert (config.run_name, config.training.max_steps, config.data.eval_files) == ("mine", 7, ())
    assert (config.model.language_model.lora.rank, config.model.language_model.lora.alpha) == (8, 32.0)
    for change, reason in {
        "training.max_stps=7": "training.max_stps: unknown setting",
        "training.learning_rate=fast": "training.learning_rate: expected float",
        "training": "expected key=value",
        "seed.x=1": "seed: expected int",
        "run_name.x=1": "run_name.x: run_name is no section",
        "seed=[": "no YAML value",
        "traning.max_steps=7": "traning: unknown setting",
    }.items():
        with pytest.raises(ValueError, match=reason):
            changed_stage(stage, [change])


# ------------------------------------------------------------------ memory
def test_probe_proposes_what_fits_and_training_uses_it(tiny_config, monkeypatch, capfd):
    """The limit lies between the peaks of the probed micro batches; the run then has the numbers that fit."""
    config = changed(tiny_config, num_processes=1, micro_batch_size=32, gradient_accumulation_steps=2, max_steps=1)
    sizes = memory.candidate_sizes(config)
    assert sizes == [4, 8, 16, 32]
    peaks = [m.peak for m in memory.measure(config, sizes)]
    assert peaks == sorted(peaks) and peaks[-1] > peaks[1] + 50e6  # bytes: more samples take more
    limit = (peaks[1] + peaks[3]) // 2
    monkeypatch.setattr(memory, "available_memory", lambda: limit / memory.USABLE)
    run_dir = launch(config, safe=True)
    used = yaml.safe_load((run_dir / "run.yaml").read_text())["training"]
    assert used["micro_batch_size"] in (8, 16) and used["gradient_checkpointing"] == "never"
    assert used["micro_batch_size"] * used["gradient_accumulation_steps"] == 64
    assert losses(run_dir).keys() == {1}
    assert "global batch 64 samples = micro-batch " + str(used["micro_batch_size"]) in capfd.readouterr().out


def test_candidates_keep_the_global_batch_and_whole_groups(tiny_config):
    cases = {(6, 32, 1): [1, 2, 4, 6], (48, 1, 12): [12, 24, 48], (8, 3, 8): [8], (12, 2, 4): [4, 8, 12]}
    for (micro, accumulation, group), expected in (cases | {(10, 1, 2): [2, 10]}).items():
        config = changed(
            tiny_config, micro_batch_size=micro, gradient_accumulation_steps=accumulation, group_size=group
        )
        sizes = memory.candidate_sizes(config)
        assert sizes == expected
        assert all(micro * accumulation % size == 0 and size % group == 0 for size in sizes)


def test_gradient_checkpointing_is_tried_before_giving_up(tiny_config, monkeypatch):
    config = changed(tiny_config, gradient_accumulation_steps=4)
    asked = []

    def measure(tried, sizes, limit):
        asked.append(tried.training.gradient_checkpointing)
        peak = 100 if tried.training.gradient_checkpointing == "always" else 200
        return [memory.Measurement(sizes[0], peak, limit, 1.0)]

    monkeypatch.setattr(memory, "measure", measure)
    fitted = memory.fit_memory(config, limit=150)
    assert asked == ["never", "always"] and fitted.training.gradient_checkpointing == "always"
    with pytest.raises(ValueError, match="one group of training.group_size 4 samples takes .* zero3"):
        memory.fit_memory(config, limit=50)


def test_probe_shows_the_largest_samples(sample_files):
    from roomplan_lib.training.collator import load_samples

    samples = load_samples([sample_files["anchors_train"], sample_files["qa_train"]])
    chosen = memory.largest_samples(samples, 8, 4)
    assert len(chosen) == 8 and len({sample.view_key for sample in chosen}) == 2
    assert len({id(sample) for sample in chosen}) == 2

    def length(sample):
        record = sample.record
        return sum(len(record.get(k) or "") for k in ("situation", "question", "instruction", "answer", "action_json"))

    assert length(chosen[0]) == max(length(s) for s in samples if len(s.view_key) == len(chosen[0].view_key))


def test_peak_memory_is_this_programs_own():
    held = b"x" * 400_000_000  # touched, so resident in the parent of the child below
    code = "from roomplan_lib.system import peak_memory; print(peak_memory())"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 5_000_000 < peak < len(held)


def test_available_memory_is_at_most_the_machines():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= total


def test_debug_looks_for_anomalies_in_one_process(tiny_config):
    config = changed(tiny_config, num_processes=1, max_steps=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=2))
    seen = []
    launch(
        config,
        lambda _: seen.append((torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled())),
        debug=True,
    )
    assert seen == [(True, True)]
    assert (torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()) == (False, False)
    assert yaml.safe_load((config.run_dir / "run.yaml").read_text())["data"]["num_workers"] == 0


@pytest.mark.parametrize(
    "message, in_exchange",
    [
        ("gloo/pair.cc: Connection closed by peer [127.0.0.1]:1", True),
        ("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 1800000 ms", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("NCCL error: unhandled cuda error, out of memory", False),
        ("no such key", False),
    ],
)
def test_a_lost_process_is_told_from_a_failure(tiny_config, tmp_path, monkeypatch, message, in_exchange):
    """DeepSpeed waits for the others outside torch's module of collectives, so its traceback does not name that."""

    def fail(config):
        raise RuntimeError("another process of this run is gone or hangs") from RuntimeError(message)

    monkeypatch.setattr("roomplan_lib.training.run.train", fail)
    monkeypatch.setenv("RANK", "1")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(to_dict(tiny_config)))
    monkeypatch.setattr(launching, "die_with_parent", lambda parent: None)  # this process is no rank
    with open(tmp_path / "out", "w") as out:  # pytest's own streams cannot be set to whole lines
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(launching.sys, name, out)
        assert launching.main(path) == 1
        monkeypatch.undo()
    report = json.loads((tmp_path / "rank-1.json").read_text())
    assert report["in_exchange"] is in_exchange and report["lost"] is in_exchange
