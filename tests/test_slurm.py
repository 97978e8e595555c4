"""Batch jobs on a real Slurm of this machine: queued, run by papermill, stopped by all that stops jobs, gone on."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from test_launch import changed, entries, losses, processes_of, ranks_of, status, wait_until

from roomplan_lib.config import to_dict
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.launch import launch

from conftest import PROJECT  # isort: skip

SCRIPT = PROJECT / "slurm" / "local_cluster.sh"
HEADER = ("--partition=hpg-b200", "--gpus-per-node=8", "--signal=B:USR1@", "--requeue", "--open-mode=append")


def free_ports():
    """The first of a row of free ports, as the cluster takes them."""
    for first in range(31000 + os.getpid() % 20000, 60000, 200):
        try:
            for port in (*range(first, first + 4), first + 100, first + 101):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue


@pytest.fixture(scope="module")
def cluster():
    """Variables of a rehearsal cluster with accounting, in a folder of its own (its sockets need a short path)."""
    if os.geteuid() != 0:
        pytest.skip("the rehearsal cluster needs root: its daemons run jobs as their users")
    folder = tempfile.mkdtemp(prefix="slurm")
    variables = os.environ | {
        "LOCAL_CLUSTER_DIR": folder, "LOCAL_CLUSTER_PORT": str(free_ports()), "LOCAL_CLUSTER_ACCT": "1",
        "SLURM_CONF": f"{folder}/etc/slurm.conf", "OMP_NUM_THREADS": "1", "TMPDIR": folder,
    }  # fmt: skip
    installed = subprocess.run([SCRIPT, "install"], env=variables, capture_output=True, text=True)
    if installed.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"Slurm cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    started = subprocess.run([SCRIPT, "start"], env=variables, stderr=subprocess.PIPE, text=True)
    try:
        assert started.returncode == 0, started.stderr
        yield variables
    finally:
        subprocess.run([SCRIPT, "stop"], env=variables, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def project(tmp_path):
    """The project's folder as a user has it, whose papermill_runs are the test's own."""
    folder = tmp_path / "project"
    (folder / "papermill_runs").mkdir(parents=True)
    for name in ("notebooks", "slurm"):
        (folder / name).symlink_to(PROJECT / name)
    (folder / "papermill_runs" / "params").symlink_to(PROJECT / "papermill_runs" / "params")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


class Jobs:
    """The queue, as a user at a shell sees it."""

    def __init__(self, variables, project):
        self.variables, self.project = variables, project

    def run(self, *command):
        result = subprocess.run(
            [str(part) for part in command], env=self.variables, cwd=self.project, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def submit(self, *arguments):
        return self.run("sbatch", *arguments).split()[-1]

    def fields(self, job):
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", job)))

    def state(self, job):
        """The state of a job; of an array, the one that its tasks have in common, else RUNNING."""
        states = set(re.findall(r"JobState=(\S+)", self.run("scontrol", "-o", "show", "job", job)))
        return states.pop() if len(states) == 1 else "RUNNING"

    def hasten(self, job):
        """A requeued job would wait two minutes."""
        wait_until(lambda: self.state(job) not in ("RUNNING", "COMPLETING"), 90)
        assert self.state(job) == "PENDING", self.log(job)
        time.sleep(1.5)  # at once it would meet its own end
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    def finish(self, job, seconds=600):
        wait_until(lambda: self.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), seconds)
        return self.state(job)

    def log(self, job):
        path = self.project / "papermill_runs" / f"slurm-{job}.log"
        return path.read_text() if path.is_file() else ""


@pytest.fixture
def jobs(cluster, project):
    queue = Jobs(cluster, project)
    yield queue
    queue.run("scancel", "-u", "root")
    wait_until(lambda: not queue.run("squeue", "-h", "-t", "R,CG"), 40)


@pytest.fixture
def stage(tiny_config, project):
    """The tiny run for two processes that share its weights by ZeRO-3, as a stage file, and its settings."""

    def make(**training):
        config = changed(tiny_config, strategy="zero3", **training)
        config = dataclasses.replace(config, run_name="run", runs_dir=str(project / "papermill_runs"))
        (project / "stage.yaml").write_text(yaml.safe_dump(to_dict(config)))
        return config

    return make


def uninterrupted(config, tmp_path):
    """Losses of the same run that nothing stops."""
    return losses(launch(dataclasses.replace(config, runs_dir=str(tmp_path / "whole"))))


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended


def test_header_asks_for_a_b200_node():
    lines = [line for line in (PROJECT / "slurm" / "train.sbatch").read_text().splitlines() if "#SBATCH" in line]
    for option in HEADER:
        assert any(option in line for line in lines), option


@pytest.mark.parametrize("file", sorted((PROJECT / "slurm").glob("*"), key=str), ids=lambda path: path.name)
def test_shell_files_are_well_formed(file):
    assert subprocess.run(["bash", "-n", file]).returncode == 0
    text = file.read_text()
    assert "NCCL_P2P_DISABLE" not in text and "NCCL_IB_DISABLE" not in text


def test_batch_files_say_what_they_lack(tmp_path):
    """No project, no environment, neither module nor conda: one line each, and no traceback of bash."""
    variables = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "HOME": str(tmp_path)}

    def run(*arguments):
        command = ["bash", PROJECT / "slurm" / "train.sbatch", *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    (tmp_path / "slurm").symlink_to(PROJECT / "slurm")
    result = run("stage.yaml")
    assert result.returncode == 1 and "submit from the project's folder" in result.stderr
    (tmp_path / "notebooks").symlink_to(PROJECT / "notebooks")
    result = run("stage.yaml")
    assert result.returncode == 1 and "neither .venv/bin/activate nor conda is here" in result.stderr
    (tmp_path / ".venv").symlink_to(sys.prefix)
    result = run()
    assert result.returncode == 1 and "usage: sbatch slurm/train.sbatch" in result.stderr
    (tmp_path / "papermill_runs").mkdir()
    (tmp_path / "stage.yaml").write_text("run_name: a\n")
    result = run("stage.yaml", "training.max_stps=3")
    assert result.returncode == 1 and "training.max_stps: unknown setting" in result.stderr
    assert not list((tmp_path / "papermill_runs").iterdir())


def test_parts_of_an_array():
    command = ["bash", "-c", "cd $ROOT; . slurm/environment.sh; array_part"]
    for first, last, count, task, part in ((1, 8, 8, 3, "3/8"), (0, 3, 4, 0, "1/4"), (5, 5, 1, 5, "1/1")):
        names = ("MIN", "MAX", "COUNT", "ID")
        array = dict(zip((f"SLURM_ARRAY_TASK_{n}" for n in names), map(str, (first, last, count, task)), strict=True))
        result = subprocess.run(
            command, env=os.environ | array | {"ROOT": str(PROJECT)}, capture_output=True, text=True
        )
        assert result.stdout.strip() == part, result.stderr
    gap = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_COUNT": "2"}
    result = subprocess.run(command, env=os.environ | gap | {"ROOT": str(PROJECT)}, capture_output=True, text=True)
    assert result.returncode == 1 and "submit all parts" in result.stderr


def test_job_is_preempted_and_killed_and_ends_as_if_nothing_had_happened(jobs, stage, tmp_path):
    """The B200 header unchanged: ZeRO-3 on two processes under papermill, preempted by a job of the urgent partition,
    requeued, a rank killed with -9, requeued, finished; the losses are those of a run that nothing stopped."""
    config = stage(max_steps=24, save_every_steps=4)
    run_dir = config.run_dir
    job = jobs.submit("slurm/train.sbatch", "stage.yaml", "training.max_steps=24")
    assert "hpg-b200" in jobs.run("squeue", "-h", "-j", job, "-o", "%P")
    wait_until(lambda: len(losses(run_dir)) >= 2 or jobs.state(job) == "FAILED", 400)
    assert jobs.state(job) == "RUNNING", jobs.log(job)
    assert jobs.fields(job)["TresPerNode"] == "gres:gpu:8"

    urgent = jobs.submit("-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    wait_until(lambda: status(run_dir)["status"] != "running", 60)
    assert status(run_dir)["status"] == "preempted" and 2 <= (stopped_at := status(run_dir)["step"]) < 24
    assert jobs.finish(urgent) == "COMPLETED"
    jobs.hasten(job)
    assert jobs.fields(job)["Restarts"] == "1"

    checkpoints = run_dir / "checkpoints"
    newer = f"checkpoint-{(stopped_at // 4 + 1) * 4}"
    wait_until(lambda: (checkpoints / newer).is_dir() or jobs.state(job) == "FAILED", 400)
    wait_until(lambda: len(ranks_of(run_dir)) == 2, 60)
    kill(ranks_of(run_dir)[1])
    jobs.hasten(job)
    assert jobs.fields(job)["Restarts"] == "2"
    assert jobs.finish(job) == "COMPLETED", jobs.log(job)

    log = jobs.log(job)
    assert "USR1: the run is asked to save and stop" in log and "rank 1 was killed by SIGKILL" in log
    assert re.search(r"start 1, .*start 2, .*start 3, ", log, re.DOTALL)
    assert "zero3, WORLD_SIZE 2 on cpu" in log

    def accounted():
        return jobs.run("sacct", "-n", "-X", "-P", "-D", "-j", job, "-o", "State,Partition,AllocTRES").splitlines()

    # The controller tells the accounting daemon when it has time to, after it calls the job completed.
    wait_until(lambda: accounted()[-1:] and accounted()[-1].startswith("COMPLETED"), 90)
    rows = accounted()
    assert len(rows) == 3, rows
    assert all("hpg-b200" in row and "gres/gpu=8" in row for row in rows)
    assert losses(run_dir) == uninterrupted(config, tmp_path)
    assert not [path for path in checkpoints.iterdir() if path not in list_checkpoints(checkpoints)]
    assert not (run_dir / "STOP").exists() and not processes_of(run_dir)

    assert {path.name for path in run_dir.glob("*.ipynb")} == {
        "03_train.r0.ipynb", "03_train.r1.ipynb", "03_train.r2.ipynb", "03_train.ipynb"
    }  # fmt: skip
    notebook = json.loads((run_dir / "03_train.ipynb").read_text())
    assert notebook["metadata"]["papermill"]["exception"] is None
    parameters = notebook["metadata"]["papermill"]["parameters"]
    assert parameters["training"]["max_steps"] == 24 and parameters["distributed"]["strategy"] == "zero3"
    outputs = [o for cell in notebook["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    text = "".join("".join(o.get("text", [])) for o in outputs)
    assert re.search(r"step +24/24 +loss", text)
    stopped = json.loads((run_dir / "03_train.r1.ipynb").read_text())
    errors = [o for cell in stopped["cells"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert "rank 1 was killed by SIGKILL" in errors[-1]["evalue"]


@pytest.mark.slow
def test_what_ends_a_job_for_good(jobs, stage):
    """scancel saves and does not requeue, nor does a process that dies after a user has asked for a stop; an error of
    the run fails the job with the worker's traceback."""
    config = stage(max_steps=4000, save_every_steps=1000)
    job = jobs.submit("slurm/train.sbatch", "stage.yaml")
    wait_until(lambda: len(losses(config.run_dir)) >= 3, 400)
    jobs.run("scancel", job)
    assert jobs.finish(job) == "CANCELLED"
    assert status(config.run_dir)["status"] == "preempted" and "TERM: the run is asked" in jobs.log(job)
    (saved,) = list_checkpoints(config.run_dir / "checkpoints")
    assert saved.name == f"checkpoint-{status(config.run_dir)['step']}"

    job = jobs.submit("slurm/train.sbatch", "stage.yaml", "run_name=hangs", "training.save_every_steps=2")
    run_dir = config.run_dir.with_name("hangs")
    wait_until(lambda: len(losses(run_dir)) >= 3, 400)
    kill(ranks_of(run_dir)[1])
    (run_dir / "STOP").touch()  # by a user who saw it hang
    assert jobs.finish(job) == "FAILED" and jobs.fields(job)["Restarts"] == "0"
    assert "ended while it was stopping; submit again" in jobs.log(job)

    job = jobs.submit("slurm/train.sbatch", "stage.yaml", "run_name=explodes", "training.learning_rate=1.0e+30")
    assert jobs.finish(job) == "FAILED"
    log = jobs.log(job)
    assert "Traceback" in log and re.search(r"ValueError: step \d+: the (loss|gradient)", log)
    assert "not queued again" in log and jobs.fields(job)["Restarts"] == "0"

    job = jobs.submit("slurm/train.sbatch", "stage.yaml", "run_name=nodata", "data.train_files=[absent.jsonl]")
    assert jobs.finish(job) == "FAILED" and "absent.jsonl is missing" in jobs.log(job)
    assert "Executing notebook" not in jobs.log(job)  # the preflight saw it


@pytest.mark.slow
def test_time_limit(jobs, stage, tmp_path):
    """Slurm sends the signal of the header ten minutes before the limit; here the limit is shorter than that."""
    config = stage(max_steps=4000, save_every_steps=1000)
    job = jobs.submit("--time=2", "--signal=B:USR1@60", "slurm/train.sbatch", "stage.yaml")
    wait_until(
        lambda: (config.run_dir / "status.json").is_file() and status(config.run_dir)["status"] == "preempted", 180
    )
    wait_until(lambda: jobs.state(job) == "PENDING", 30)
    assert jobs.fields(job)["Restarts"] == "1" and "USR1" in jobs.log(job)


def processes_on(node, variables):
    """Processes of a node of this rehearsal cluster: its daemon, what its steps started, their step daemons."""
    cluster = variables["LOCAL_CLUSTER_DIR"]
    found = {int(Path(cluster, "run", f"slurmd-{node}.pid").read_text())}
    here = {f"SLURMD_NODENAME={node}".encode(), f"LOCAL_CLUSTER_DIR={cluster}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if here <= set((folder / "environ").read_bytes().split(b"\0")):
                found.add(int(folder.name))
                parent = int(re.search(r"PPid:\s+(\d+)", (folder / "status").read_text()).group(1))
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    found.add(parent)
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            pass  # it has just ended, or is not ours to read
    return found


@pytest.fixture
def two_nodes(jobs, stage, tmp_path):
    """A job of one process on each of two nodes that has trained eight steps, and what its losses have to be."""
    config = stage(max_steps=60, save_every_steps=5)
    config = dataclasses.replace(
        config, distributed=dataclasses.replace(config.distributed, num_processes=1, strategy="ddp")
    )
    (jobs.project / "stage.yaml").write_text(yaml.safe_dump(to_dict(config)))
    job = jobs.submit("--nodes=2", "slurm/train.sbatch", "stage.yaml")
    wait_until(lambda: len(losses(config.run_dir)) >= 8 or jobs.state(job) == "FAILED", 400)
    assert status(config.run_dir)["world_size"] == 2, jobs.log(job)

    def whole():
        distributed = dataclasses.replace(config.distributed, num_processes=2)
        return losses(launch(dataclasses.replace(config, runs_dir=str(tmp_path / "whole"), distributed=distributed)))

    return job, config.run_dir, whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, told",
    [(signal.SIGKILL, "rank 1 was killed by SIGKILL"), (signal.SIGTERM, "told to end; queued again")],
)
def test_two_nodes_and_the_loss_of_a_process(jobs, two_nodes, number, told):
    """One process on each of two nodes by srun; one of them alone is ended, the job is requeued, and goes on later."""
    job, run_dir, whole = two_nodes
    os.kill(ranks_of(run_dir)[1], number)
    wait_until(lambda: jobs.state(job) != "RUNNING", 90)
    assert told in jobs.log(job)
    wait_until(lambda: not processes_of(run_dir), 30)
    jobs.hasten(job)
    assert jobs.finish(job) == "COMPLETED", jobs.log(job)
    assert losses(run_dir) == whole()


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["n1", "n2"])
def test_two_nodes_and_the_loss_of_one(jobs, two_nodes, lost):
    """A node vanishes with all that runs on it, n1 with the batch shell and the notebook: nothing of the job lives on
    elsewhere, only whole checkpoints are left, and once the node is back the job goes on as if nothing had happened."""
    job, run_dir, whole = two_nodes
    gone = processes_on(lost, jobs.variables)
    assert len(gone) >= 3 and set(ranks_of(run_dir).values()) & gone, "daemon, step daemon and a rank"
    for pid in gone:
        kill(pid)
    try:
        wait_until(lambda: jobs.state(job) == "PENDING", 120)  # SlurmdTimeout, then KillWait
        wait_until(lambda: not processes_of(run_dir), 30)
        assert jobs.fields(job)["Restarts"] == "1"
        checkpoints = list_checkpoints(run_dir / "checkpoints")
        assert checkpoints and checkpoints[-1].name != "checkpoint-60"
    finally:
        jobs.run("slurmd", "-N", lost)
    wait_until(lambda: jobs.state(job) == "RUNNING", 240)  # no sooner: Slurm first ends what the node may still run
    assert jobs.finish(job) == "COMPLETED", jobs.log(job)
    assert losses(run_dir) == whole()
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path not in list_checkpoints(path.parent)]


@pytest.mark.slow
def test_arrays_fill_the_cache_and_predict(jobs, stage):
    """Two tasks each: the cache holds every view set, the parts of the predictions are one file in order."""
    config = stage(max_steps=2)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, features=dataclasses.replace(config.data.features, folder=str(jobs.project / "features"))
        ),
        model=dataclasses.replace(config.model, freeze_vggt=True),
        distributed=dataclasses.replace(config.distributed, num_processes=1, strategy="ddp"),
        prediction=dataclasses.replace(config.prediction, controls=()),
    )
    (jobs.project / "stage.yaml").write_text(yaml.safe_dump(to_dict(config)))
    job = jobs.submit("--array=1-2", "slurm/cache.sbatch", "stage.yaml")
    assert jobs.finish(job) == "COMPLETED", jobs.log(f"{job}_1") + jobs.log(f"{job}_2")
    assert (
        len(list((jobs.project / "features").glob("features-*/*.safetensors"))) == 10
    )  # one view set in each of ten rooms
    launch(config)
    job = jobs.submit("--array=0-1", "--gpus-per-node=1", "slurm/predict.sbatch", "stage.yaml")
    logs = [path.name for path in (jobs.project / "papermill_runs").glob("*.log")]
    assert jobs.finish(job) == "COMPLETED", logs
    rows = [json.loads(line) for line in (config.run_dir / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(len(rows))) and len({r["scene_id"] for r in rows}) == 2
    assert not list((jobs.project / "papermill_runs").glob("*.parts"))


def reached(jobs, job, run_dir, step):
    wait_until(lambda: max(losses(run_dir), default=0) >= step or jobs.state(job) == "FAILED", 400)
    assert jobs.state(job) == "RUNNING", jobs.log(job)[-3000:]


def gone_on(jobs, job, run_dir):
    """The job once it has started again: as itself where it was requeued, else submitted again as a user would."""
    wait_until(lambda: jobs.state(job) not in ("RUNNING", "COMPLETING"), 120)
    wait_until(lambda: not processes_of(run_dir), 30)
    if jobs.state(job) != "PENDING":
        return jobs.submit("slurm/train.sbatch", "stage.yaml")
    jobs.hasten(job)
    return job


@pytest.mark.slow
def test_twenty_random_kills(jobs, stage, tmp_path):
    """-9 of a rank, of the launcher or of the kernel, USR1, TERM and scancel at random moments, also while saving."""
    config = stage(max_steps=150, save_every_steps=2)
    run_dir, rng = config.run_dir, random.Random(0)
    job, deeds = jobs.submit("slurm/train.sbatch", "stage.yaml"), []
    while len(deeds) < 20 and max(losses(run_dir), default=0) < 140:
        reached(jobs, job, run_dir, max(losses(run_dir), default=0) + rng.randint(3, 7))
        time.sleep(rng.random() * 0.3)
        deeds.append(("rank", "launcher", "USR1", "TERM", "scancel", "saving")[len(deeds) % 6])
        if deeds[-1] == "USR1":
            jobs.run("scancel", "-s", "USR1", "--batch", job)
        elif deeds[-1] == "TERM":
            jobs.run("scancel", "-s", "TERM", "--full", job)
        elif deeds[-1] == "scancel":
            jobs.run("scancel", job)
        elif deeds[-1] == "launcher":
            kill(min(processes_of(run_dir)))
        else:
            if deeds[-1] == "saving":
                wait_until(lambda: list((run_dir / "checkpoints").glob(".*")), 60)
            kill(ranks_of(run_dir)[rng.randint(0, 1)])
        job = gone_on(jobs, job, run_dir)
    assert jobs.finish(job, 400) == "COMPLETED", jobs.log(job)[-3000:]
    assert len(deeds) == 20, deeds
    assert losses(run_dir) == uninterrupted(config, tmp_path)
    assert [e["step"] for e in entries(run_dir)] == list(range(1, 151))
    assert not [path for path in (run_dir / "checkpoints").iterdir() if path not in list_checkpoints(path.parent)]
