"""Starting a run: in this process, or as a group of processes on one or several nodes that dies with this one.

The group is started by `accelerate launch`, in a Slurm job of several nodes by `srun` from the first of them. Its lines
stream here and into the run's train.log. `python -m roomplan_lib.training.launch RUN.yaml` is one process of a group.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from roomplan_lib.config import RunConfig, load_run_config, parse, to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.system import free_port, local_caches
from roomplan_lib.training.status import Preempted

POLL_S = 0.2  # between two looks at the group and its metrics
NUM_SHOWN_LINES = 40  # of a group that failed without a traceback of its own
DEBUG = "ROOMPLAN_DEBUG"  # =1: as `debug`, for runs that are started by a batch script
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)

# Wrong input and a full or read-only disk are one clear line, from a group as from a single process.
EXPECTED = {"ValueError": ValueError, "OSError": OSError}

# Chatty and slow, but they tell which collective, kernel or operation went wrong.
DEBUG_SETTINGS = {
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
    "TORCH_SHOW_CPP_STACKTRACES": "1",
    "NCCL_DEBUG": "INFO",
    "CUDA_LAUNCH_BLOCKING": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what deterministic matrix products need
}


def launch(
    config: RunConfig, on_log: Callable[[dict], None] | None = None, *, safe: bool = False, debug: bool = False
) -> Path:
    """Trains the run that `config` describes, on as many processes as it says, and returns its folder.

    on_log: called here with each new entry of metrics.jsonl. safe: measure memory first and train with the micro batch
    that fits (`memory.fit_memory`). debug: detect anomalies, deterministic operations, no loader processes, all that
    NCCL and torch have to say.

    An interrupt, SIGTERM or SIGUSR1 asks the run to save and stop; a second interrupt ends it at once. Raises
    `Preempted` after a requested stop, ValueError and OSError as `train` does (a group's have a RuntimeError with the
    traceback as their cause), and RuntimeError with the traceback of the first process that failed otherwise.
    """
    os.environ.update(local_caches())
    debug = debug or os.environ.get(DEBUG) == "1"
    if debug:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    if safe:
        from roomplan_lib.training.memory import fit_memory

        config = fit_memory(config)
    nodes, per_node = num_nodes(), processes_per_node(config)
    if nodes * per_node > 1:
        return _train_group(config, nodes, per_node, on_log, debug)
    from roomplan_lib.training.run import train

    with _debugging(debug):
        return train(config, on_log)


def num_nodes() -> int:
    """Nodes of the Slurm job that this process runs in; 1 outside of one."""
    return int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if "SLURM_JOB_ID" in os.environ else 1


def processes_per_node(config: RunConfig) -> int:
    """distributed.num_processes, with 0 = one per GPU. ValueError for more processes than GPUs."""
    asked, device = config.distributed.num_processes, config.training.device
    if asked == 1 or device == "cpu":
        return asked or 1
    import torch

    num_gpus = torch.cuda.device_count()  # by NVML: no context is made in this process
    if num_gpus and asked > num_gpus:
        raise ValueError(
            f"distributed.num_processes: {asked} processes need a GPU each, this machine shows {num_gpus}; "
            "lower it, or set training.device to cpu"
        )
    return asked or num_gpus or 1


def changed_stage(path: str | Path, changes: Iterable[str]) -> RunConfig:
    """The run of a stage file with settings changed by `key=value`, e.g. `training.max_steps=100`; values are YAML.

    Raises ValueError for a change without `=`, an unknown key or a wrong type, with the key's path.
    """
    data = to_dict(load_run_config(path))
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change}: expected key=value, e.g. training.max_steps=100")
        *groups, name = key.split(".")
        place = data
        for group in groups:
            place[group] = place.get(group) or {}  # a section that is null, as lora, begins with its defaults
            place = place[group]
            if not isinstance(place, dict):
                raise ValueError(f"{key}: {group} is no section of the settings, it holds {place!r}")
        try:
            place[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{key}: {text!r} is no YAML value: {error}") from None
    return parse(RunConfig, data)


# ------------------------------------------------------------------ the group of processes
def _train_group(
    config: RunConfig, nodes: int, per_node: int, on_log: Callable[[dict], None] | None, debug: bool
) -> Path:
    run_dir, folder = config.run_dir, config.run_dir / "launch"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*.json"):
        old.unlink()
    write_whole(folder / "run.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    # A file of our own, so that the user's own `accelerate config` does not change what is started.
    write_whole(folder / "accelerate.yaml", "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n")
    command = group_command(folder, nodes, per_node)
    print(f"{run_dir}: {nodes * per_node} processes on {nodes} node{'s' * (nodes > 1)}; log: {run_dir / 'train.log'}")
    status_before = _read_status(run_dir)
    metrics = _NewEntries(run_dir / "metrics.jsonl")
    lines: deque[str] = deque(maxlen=400)
    end = signal.SIGTERM if nodes > 1 else signal.SIGKILL  # srun ends its tasks when it is asked to, not when killed
    own = os.getpid()
    with (run_dir / "train.log").open("a") as log:
        log.write(f"{time.strftime('%F %T')} {shlex.join(command)}\n")
        group = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=group_environment(per_node, nodes, debug),
            start_new_session=True,  # an interrupt in the terminal reaches this process alone
            preexec_fn=lambda: die_with_parent(own, end),
        )
        try:
            with _stop_on_signals(run_dir):
                for new in _whole_lines(group):
                    if new:
                        print("\n".join(new), flush=True)  # at once: a notebook keeps each print for itself
                        log.write("".join(line + "\n" for line in new))
                        log.flush()
                        lines.extend(new)
                    for entry in metrics.read():
                        if on_log:
                            on_log(entry)
        finally:
            if group.poll() is None:  # this process is on its way out with an error of its own
                group.send_signal(end)
            group.wait()
    status = _read_status(run_dir)
    if status != status_before and status.get("status") == "preempted":
        raise Preempted(
            f"{run_dir}: stopped as requested at step {status['step']} of {status['max_steps']}; "
            "start it again and it goes on from there"
        )
    if group.returncode:
        _raise_failure(run_dir, folder, list(lines), group.returncode, nodes * per_node, status != status_before)
    return run_dir


def group_command(folder: Path, nodes: int, per_node: int) -> list[str]:
    """The command that starts the group; `folder` holds run.yaml and accelerate.yaml and is seen by all nodes.

    accelerate's `--multi_gpu` starts processes by torch's launcher on CPUs as well; with --cpu it would start one
    alone. What the processes are to each other (DDP, ZeRO-3) the trainer decides from the settings.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = [
        "--config_file", str(folder / "accelerate.yaml"), "--multi_gpu", "--mixed_precision", "no",
        "--num_machines", str(nodes), "--num_processes", str(nodes * per_node), "--rdzv_backend", "static",
        "--max_restarts", "0", "--main_process_ip", _first_address() if nodes > 1 else "127.0.0.1",
        "--main_process_port", str(free_port()), "--dynamo_backend", "no", "--num_cpu_threads_per_process",
        os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // per_node)),
        "-m", "roomplan_lib.training.launch", str(folder / "run.yaml"),
    ]  # fmt: skip
    if nodes == 1:
        return [*launcher, "--machine_rank", "0", *options]
    step = [
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--cpu-bind=none",
        f"--cpus-per-task={os.environ.get('SLURM_CPUS_ON_NODE', 1)}", "--kill-on-bad-exit=1",
    ]  # fmt: skip
    return [*step, "bash", "-c", f'exec {shlex.join(launcher)} --machine_rank "$SLURM_NODEID" "$@"', "_", *options]


def group_environment(per_node: int, nodes: int, debug: bool) -> dict[str, str]:
    """This environment with what the processes need, as far as it does not say otherwise.

    Nothing is said about NCCL's transports: left alone it finds NVLink, and InfiniBand between nodes.
    """
    settings = {
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if nodes == 1:
        settings["GLOO_SOCKET_IFNAME"] = "lo"  # a host name without an address is no obstacle then
    if debug:
        settings |= DEBUG_SETTINGS | {DEBUG: "1"}
    return {**settings, **os.environ}


def _first_address() -> str:
    """The address by which Slurm reaches the job's first node, where this process runs."""
    node = os.environ["SLURMD_NODENAME"]
    shown = subprocess.run(["scontrol", "-o", "show", "node", node], capture_output=True, text=True, check=True).stdout
    return re.search(r"NodeAddr=(\S+)", shown).group(1)


@contextmanager
def _stop_on_signals(run_dir: Path) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 ask the run to save and stop while the block runs; a second SIGINT interrupts it.

    Only in the main thread, where Python runs handlers.
    """
    interrupts = 0

    def stop(number: int, _frame: Any) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        (run_dir / "STOP").touch()
        again = "; interrupt again to end it without" if number == signal.SIGINT else ""
        print(f"{signal.Signals(number).name}: the run saves and stops after this step{again}", flush=True)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _whole_lines(group: subprocess.Popen) -> Iterator[list[str]]:
    """The group's new lines, about every POLL_S, maybe none; ends when the group has ended and is read out."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in group.stdout:
            lines.put(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    ended_at = math.inf
    # A loader process may hold the pipe open a little longer than its trainer lives.
    while reader.is_alive() and time.monotonic() - ended_at < 10:
        reader.join(POLL_S)
        yield [lines.get() for _ in range(lines.qsize())]
        if group.poll() is not None:
            ended_at = min(ended_at, time.monotonic())
    group.wait()
    yield [lines.get() for _ in range(lines.qsize())]  # and the last metrics


class _NewEntries:
    """Entries that appear in a metrics file; those that a resumed run only keeps are not new."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept = set(path.read_text().splitlines()) if path.is_file() else set()
        self.inode, self.offset = None, 0

    def read(self) -> list[dict]:
        """What has come since the last call; a line that is still being written waits."""
        try:
            stat = self.path.stat()
            if stat.st_ino != self.inode or stat.st_size < self.offset:  # the trainer replaces the file when it starts
                self.inode, self.offset = stat.st_ino, 0
            if stat.st_size <= self.offset:
                return []
            with self.path.open("rb") as file:
                file.seek(self.offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self.offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.decode().splitlines() if line not in self.kept]


def _read_status(run_dir: Path) -> dict:
    path = run_dir / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _raise_failure(
    run_dir: Path, folder: Path, lines: list[str], returncode: int, world_size: int, begun: bool
) -> None:
    """Raise what the process said that failed first, or how it died.

    The others then fail in the middle of an exchange, maybe sooner than it ends, so they are asked last; where only
    they have something to say, the one that is silent is lost. status.json tells it too, unless the run was not
    `begun`: then it still tells of the run that the folder holds.
    """
    reports = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    again = "start the run again and it goes on from its newest whole checkpoint"
    first = min(reports, key=lambda report: (report["in_exchange"], report["time"]), default=None)
    killed = _killed_rank(lines) if first is None or first["in_exchange"] else None
    number = returncode - 128 if returncode > 128 else -returncode  # srun says it as a shell does
    if killed is None and first is None and number in set(signal.Signals):
        killed = "the launcher of its processes", number
    lost = begun and not killed and first is not None and first["lost"] and len(reports) < world_size
    if killed:
        who, number = killed
        memory = " (out of memory?)" * (number == signal.SIGKILL)
        text = f"{who} was killed by {signal.Signals(number).name}{memory}; {again}"
    elif lost:
        reason = first["message"].partition("\n")[0]
        text = f"rank {first['rank']} lost a silent process: its node is gone, or it hangs; {again} ({reason})"
    elif first:
        text = f"rank {first['rank']} failed: {first['message']}"
    else:
        text = f"the processes ended with exit status {returncode}"
    status = _read_status(run_dir) or {"step": 0, "max_steps": 0, "world_size": 0}
    if status.get("status") == "running" or ((killed or lost) and status.get("status") != "finished"):
        status |= {"status": "failed", "error": text, "time": time.strftime("%FT%T%z")}
        status |= {"signal": killed[1]} if killed else {"lost": True} if lost else {}
        write_whole(run_dir / "status.json", json.dumps(status, indent=1) + "\n")
    if killed:
        raise RuntimeError(f"{run_dir}: {text}; its last lines are in train.log")
    if not first:
        shown = "\n".join(lines[-NUM_SHOWN_LINES:])
        raise RuntimeError(f"{run_dir}: {text}\n{shown}")
    what = text if lost else f"rank {first['rank']} failed"
    failure = RuntimeError(f"{run_dir}: {what}\n{first['traceback']}")
    if first["kind"]:
        raise EXPECTED[first["kind"]](first["message"]) from failure
    raise failure


def _killed_rank(lines: list[str]) -> tuple[str, int] | None:
    """Name and signal of a process that was killed from outside, as torch's launcher reports it.

    The launcher itself ends the others with SIGTERM, so that one does not count.
    """
    report = re.findall(r"^ *rank +: (\d+) .*\n *exitcode +: -(\d+) ", "\n".join(lines), flags=re.MULTILINE)
    return next(((f"rank {rank}", int(number)) for rank, number in report if int(number) != signal.SIGTERM), None)


# ------------------------------------------------------------------ one process of the group
def die_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """From now on the kernel sends this process `number` when its parent, process `parent`, dies (Linux)."""
    _libc.prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)  # it died before


@contextmanager
def _debugging(debug: bool) -> Iterator[None]:
    """Anomaly detection and deterministic operations while the block runs."""
    if not debug:
        yield
        return
    import torch

    os.environ.update({name: value for name, value in DEBUG_SETTINGS.items() if name not in os.environ})
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autograd.detect_anomaly():
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def main(path: Path) -> int:
    """Trains as one rank; what goes wrong is printed and left in rank-N.json beside `path`. Exit status."""
    die_with_parent(os.getppid())
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(
            line_buffering=True, write_through=False
        )  # whole lines, so that those of two ranks never mix
    rank = int(os.environ["RANK"])
    from roomplan_lib.training.processes import is_lost
    from roomplan_lib.training.run import train

    try:
        with _debugging(os.environ.get(DEBUG) == "1"):
            train(load_run_config(path))
    except Preempted:
        return 0
    except Exception as error:
        kind = next((k for k in EXPECTED if isinstance(error, EXPECTED[k])), "")
        report = {"rank": rank, "time": time.time(), "kind": kind, "message": str(error)}
        report["traceback"] = traceback.format_exc()
        # With another process; DeepSpeed waits for one outside torch's module of collectives.
        lost = is_lost(error) or error.__cause__ is not None and is_lost(error.__cause__)
        report["lost"] = lost
        report["in_exchange"] = lost or "torch/distributed/distributed_c10d.py" in report["traceback"]
        write_whole(path.with_name(f"rank-{rank}.json"), json.dumps(report))
        print(f"rank {rank}: {report['traceback']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
