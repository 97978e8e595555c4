"""The preflight: is all that a run needs there, before it waits in a queue or stops hours later.

Each check is one line: what was looked at, what was found, and the remedy where something is wrong. `fail` stops a
batch job, `warn` does not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from roomplan_lib.config import RunConfig, data_path
from roomplan_lib.system import DEBIAN_PACKAGES, available_memory, free_port, scratch_folder

GB = 1e9
PROJECT = "roomplan_lib"
B200 = (10, 0)  # its compute capability; its kernels in torch are called sm_100


@dataclass(frozen=True)
class Check:
    """What one look found."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:<5}{self.name:<16}{self.found}{f' -> {self.remedy}' if self.remedy else ''}"


def examine(config: RunConfig | None = None) -> Iterator[Check]:
    """All checks of this machine, and with `config` of what that run reads, writes and starts."""
    # Open3D takes seconds to import, and says what it lacks only by failing: meanwhile the rest is looked at.
    command = [sys.executable, "-c", "import open3d; print(open3d.__version__)"]
    open3d = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield from check_packages(config)
    yield from check_gpus(config)
    yield check_memory()
    yield check_shared_memory(config)
    yield check_scratch()
    yield check_slurm()
    if config is not None:
        yield check_run_folder(config)
        yield from check_data(config)
        yield from check_weights(config)
        yield check_processes(config)
    yield check_open3d(*open3d.communicate(), open3d.returncode)


def check_packages(config: RunConfig | None) -> Iterator[Check]:
    """Python and the installed packages against the versions that roomplan_lib asks for."""
    from packaging.requirements import Requirement

    version = ".".join(map(str, sys.version_info[:3]))
    wanted = importlib.metadata.metadata(PROJECT)["Requires-Python"]
    yield Check("python", "ok", f"{version} ({wanted} is wanted), {sys.executable}")
    needs_deepspeed = config is not None and config.distributed.strategy == "zero3"
    for text in importlib.metadata.requires(PROJECT) or ():
        requirement = Requirement(text)
        if requirement.name not in ("torch", "transformers", "peft", "accelerate", "deepspeed"):
            continue
        missing_is: Literal["warn", "fail"] = (
            "warn" if requirement.name == "deepspeed" and not needs_deepspeed else "fail"
        )
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            remedy = f"pip install '{requirement.name}{requirement.specifier}'"
            yield Check(requirement.name, missing_is, "not installed", remedy)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        remedy = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Check(
            requirement.name, "ok" if fits else missing_is, f"{found} ({requirement.specifier} is wanted)", remedy
        )


def check_gpus(config: RunConfig | None) -> Iterator[Check]:
    """GPUs, the driver, whether torch has kernels for them, bfloat16, NCCL and its settings."""
    import torch

    wants_gpu = config is not None and config.training.device == "cuda"
    driver = _nvidia_driver()
    if not torch.cuda.is_available():
        found = f"torch {torch.__version__} finds none" + (f", though driver {driver} shows some" if driver else "")
        remedy = ""
        if driver and torch.version.cuda is None:
            remedy = "this torch is built without CUDA: conda env create -f environment.yml"
        elif driver:
            remedy = f"torch is built for CUDA {torch.version.cuda}: a newer driver, or fewer CUDA_VISIBLE_DEVICES"
        elif wants_gpu:
            remedy = "ask for GPUs (--gpus-per-node), or set training.device to auto or cpu"
        yield Check("gpus", "fail" if wants_gpu or driver else "warn", found, remedy)
        if torch.version.cuda is not None:  # a login node: the batch job's GPUs are elsewhere
            yield check_kernels(torch._C._cuda_getArchFlags().split(), B200, "warn")
    else:
        count = torch.cuda.device_count()
        shown = f"{count} x {torch.cuda.get_device_name(0)}, driver {driver}, CUDA {torch.version.cuda}"
        yield Check("gpus", "ok", shown)
        for capability in sorted({torch.cuda.get_device_capability(i) for i in range(count)}):
            yield check_kernels(torch.cuda.get_arch_list(), capability, "fail")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        asked = config is not None and (config.training.bf16 or config.model.frozen_dtype == "bfloat16")
        remedy = "" if bf16 else "set training.bf16 to false and model.frozen_dtype to float32"
        yield Check("bfloat16", "ok" if bf16 else "fail" if asked else "warn", "native" if bf16 else "emulated", remedy)
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
        remedy = "" if nccl else "this torch lacks NCCL, which several GPUs need"
        yield Check("nccl", "ok" if nccl else "fail" if count > 1 else "warn", nccl or "not there", remedy)
    slow = {"NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"}
    slow = sorted(name for name in slow if os.environ.get(name, "0") not in ("", "0"))
    if slow:
        yield Check("nccl settings", "warn", f"{', '.join(slow)} set: NVLink or InfiniBand is not used", "unset them")


def check_kernels(kernels: list[str], capability: tuple[int, int], otherwise: Literal["warn", "fail"]) -> Check:
    """Whether torch's compiled `kernels` (sm_90, compute_120 ...) run on a GPU of this compute capability.

    CUDA's rule: machine code (sm) runs on its own generation from its own minor number on, with a letter behind it on
    that chip alone; PTX (compute) is compiled at the start for that and every later chip.
    """
    good = False
    for kernel in kernels:
        kind, major, minor, letter = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", kernel).groups()
        made_for = int(major), int(minor)
        if letter:
            good |= made_for == capability
        elif kind == "sm":
            good |= made_for[0] == capability[0] and made_for <= capability
        else:
            good |= made_for <= capability
    found = f"for {'sm_{}{}'.format(*capability)}{' (B200)' * (capability == B200)}: torch has {' '.join(kernels)}"
    remedy = "" if good else "pip install 'torch>=2.7', from an index for CUDA 12.8 or newer"
    return Check("kernels", "ok" if good else otherwise, found, remedy)


def check_memory() -> Check:
    """Memory that a process may take here."""
    free = available_memory()
    return Check("memory", "ok" if free > 4 * GB else "warn", f"{free / GB:.1f} GB free")


def check_shared_memory(config: RunConfig | None) -> Check:
    """/dev/shm, through which loader processes and NCCL pass their data."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "fail", "not there", "mount it; loader processes and NCCL need it")
    free = shutil.disk_usage(folder).free
    workers = config is not None and config.data.num_workers > 0
    if free < GB:
        remedy = "in a container: --ipc=host or --shm-size=16g; or set data.num_workers to 0"
        return Check("/dev/shm", "fail" if workers and free < GB / 8 else "warn", f"{free / GB:.2f} GB free", remedy)
    return Check("/dev/shm", "ok", f"{free / GB:.1f} GB free")


def check_scratch() -> Check:
    """Local scratch, where caches of compiled kernels go."""
    folder = scratch_folder()
    return _writable("scratch", folder, 2 * GB, "name another disk of this machine with TMPDIR")


def check_slurm() -> Check:
    """Whether batch jobs can be submitted from here."""
    if shutil.which("sbatch") is None:
        return Check("slurm", "warn", "no sbatch", "runs start here alone: roomplan train, or slurm/local_cluster.sh")
    job = os.environ.get("SLURM_JOB_ID")
    return Check("slurm", "ok", shutil.which("sbatch") + (f", in job {job}" if job else ""))


def check_run_folder(config: RunConfig) -> Check:
    """The run's folder: writable, room for its checkpoints."""
    return _writable("run folder", config.run_dir, 5 * GB, "free space, or set runs_dir to a larger disk")


def check_data(config: RunConfig) -> Iterator[Check]:
    """The stage's files of samples, and the pictures of the first and last sample of each."""
    from roomplan_lib.samples import sample_root

    for path in dict.fromkeys((*config.data.train_paths, *config.data.eval_paths)):
        name = "data"
        if not path.is_file():
            remedy = "make it with `roomplan prepare`, or name another in data.train_files and data.eval_files"
            yield Check(name, "fail", f"{path} is missing", remedy)
            continue
        try:
            first, last = _first_and_last(path)
        except ValueError as error:
            yield Check(name, "fail", f"{path}: {error}", "prepare the file again")
            continue
        root = sample_root(path)
        absent = [image for record in (first, last) for image in record["images"] if not (root / image).is_file()]
        if absent:
            remedy = "fetch or render the scene again, or set ROOMPLAN_DATA to where data/ lies"
            yield Check(name, "fail", f"{path}: picture {root / absent[0]} is missing", remedy)
        else:
            yield Check(name, "ok", f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    if not config.data.train_files:
        yield Check("data", "fail", "data.train_files is empty", "name the files that `roomplan prepare` made")
    if config.data.features.folder:
        yield _writable(
            "feature cache", data_path(config.data.features.folder), 5 * GB, "free space, or another folder"
        )


def check_weights(config: RunConfig) -> Iterator[Check]:
    """Pretrained weights that the stage names: a path, or a hub id that is in the cache."""
    language = config.model.language_model
    named = {
        "model.vggt_weights": config.model.vggt_weights,
        "model.language_model.name": language.name,
        "model.language_model.tokenizer": language.tokenizer,
    }
    for setting, source in named.items():
        if not source:
            continue
        path = Path(source).expanduser()
        if path.exists():
            yield Check("weights", "ok", f"{setting}: {path}")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            from huggingface_hub import constants, snapshot_download
            from huggingface_hub.errors import LocalEntryNotFoundError

            try:
                folder = snapshot_download(source, local_files_only=True)
                yield Check("weights", "ok", f"{setting}: {source}, in {folder}")
            except LocalEntryNotFoundError:
                status = "fail" if constants.HF_HUB_OFFLINE else "warn"
                found = f"{setting}: {source} is not in {constants.HF_HUB_CACHE} and would be downloaded at the start"
                yield Check("weights", status, found, f"hf download {source}, where there is a network")
        else:
            yield Check("weights", "fail", f"{setting}: {source} is not there", "name a file, a folder or a hub id")
    if config.training.start_from:
        from roomplan_lib.training.start import start_folder

        try:
            start_folder(config)
        except ValueError as error:
            yield Check("weights", "fail", str(error), "train that run first")


def check_processes(config: RunConfig) -> Check:
    """How many processes the run starts here, and that they can meet on a port."""
    from roomplan_lib.training.launch import num_nodes, processes_per_node

    try:
        count, nodes = processes_per_node(config), num_nodes()
    except ValueError as error:
        return Check("processes", "fail", str(error))
    try:
        port = free_port()
    except OSError as error:
        return Check("processes", "fail", f"no free port to meet on: {error}", "end what holds them (ss -ltn)")
    found = f"{count} on each of {nodes} nodes" if nodes > 1 else f"{count}"
    return Check("processes", "ok", f"{found}, {config.distributed.strategy}; port {port} is free")


def check_open3d(output: str, errors: str, returncode: int) -> Check:
    """What `import open3d` said, which renders and meshes the rooms."""
    if returncode == 0:
        return Check("open3d", "ok", output.strip())
    *_, last = errors.strip().splitlines() or ["no message"]
    library = next((name for name in DEBIAN_PACKAGES if name in last), None)
    remedy = f"apt-get install {DEBIAN_PACKAGES[library]}" if library else "pip install open3d"
    return Check("open3d", "warn", last, f"{remedy}; rooms cannot be rendered, runs on prepared files go")


def _nvidia_driver() -> str:
    """Version of NVIDIA's driver, "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout else ""


def _writable(name: str, folder: Path, wanted: float, remedy: str) -> Check:
    """Whether `folder`, or the nearest parent that is there, can be written to and has `wanted` bytes free."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        return Check(name, "fail", f"{folder}: {place} cannot be written to", remedy)
    free = shutil.disk_usage(place).free
    status = "ok" if free >= wanted else "fail" if free < wanted / 20 else "warn"
    return Check(name, status, f"{folder}: {free / GB:.1f} GB free", remedy if status != "ok" else "")


def _first_and_last(path: Path) -> tuple[dict, dict]:
    """First and last record of a JSONL file, or of a JSON array. ValueError when they cannot be read."""
    from roomplan_lib.samples import read_samples

    with path.open("rb") as file:
        first = file.readline()
        if first.lstrip().startswith(b"["):
            records = read_samples(path)
            return records[0], records[-1]
        file.seek(max(0, path.stat().st_size - 1_000_000))
        last = file.read().rstrip().rpartition(b"\n")[2] or first
    try:
        records = json.loads(first), json.loads(last)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"its first or last line is no record: {error}") from None
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("images"), list):
            raise ValueError("its first or last line is no record with images")
    return records
