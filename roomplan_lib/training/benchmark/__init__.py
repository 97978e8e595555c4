"""What training costs: our loop beside the bare computation, cached beside live features, two processes beside one,
checkpoints beside a full ZeRO-3 state, and other trainers of the same small language model beside ours.

Every variant runs in a process of its own, `python -m roomplan_lib.training.benchmark JOB.json`, with a fixed number of
threads; the rounds take the variants in turn (A B A B), so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.config import FeaturesConfig, LoraSettings, ResamplerConfig, RunConfig, load_run_config, to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.system import peak_memory

WINDOW = 10  # steps whose mean time is one measurement; as many are made before the first
FULL_STAGE = Path("papermill_runs/params/stage2_3d.yaml")
ADAM_BYTES = 12  # of a trained weight in an exact checkpoint: float32 weight and two moments
ZERO3_BYTES = 14  # of every weight in a ZeRO-3 state in bf16: the weight, its float32 copy, two moments


# By part of the benchmark: the variants, the first of which the others are compared with.
VARIANTS = {
    "loop": ("bare", "bare with collator", "ours"),
    "peers": ("bare", "ours", "HF Trainer", "TRL"),
    "cache": ("cached", "live"),
    "miniature": ("cached", "live"),
    "distributed": ("single", "DDP", "ZeRO-3"),
    "checkpoint": ("ours", "ZeRO-3 state"),
}
TEXT_SIZES = ("vocab_size", "width", "num_layers", "num_rows", "length", "num_supervised", "rank")  # of the peers
# Variants of these parts must begin with the same loss, but for this share of it: peers draw their rows in any order.
SAME_LOSS = {"loop": 1e-4, "distributed": 1e-4, "peers": 0.02}


def benchmark_training(
    stage: str | Path = "papermill_runs/params/tiny.yaml",
    *,
    parts: Sequence[str] = tuple(VARIANTS),
    steps: int = 40,
    rounds: int = 3,
    threads: int = 1,
    num_rooms: int = 10,
    text: dict[str, int] | None = None,
    folder: Path | None = None,
    progress: bool = True,
) -> Iterator[dict]:
    """One row per variant: medians over `rounds` processes, and ratios to the first variant of its part.

    stage: the settings that are trained with, on `num_rooms` procedural rooms that are made for it, whatever its files.
    parts: of VARIANTS. steps: measured in each process, after WINDOW that are not. threads: of each process.
    folder: where the rooms and runs are made and removed again; the system's temporary folder for None.
    A row: part, variant, and what applies of step_s and step_cpu_s (wall and CPU seconds of a step), samples_per_s,
    memory_gb (the process's peak), bytes, save_s, load_s; <name>_ratio of those; load_average before each process; and
    the machine. A variant whose package is missing, or that this machine cannot run, has `skipped`, the reason.
    Raises ValueError for an unknown part, and RuntimeError with the output of a variant that failed.
    """
    if unknown := [part for part in parts if part not in VARIANTS]:
        raise ValueError(f"part: expected {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if steps < WINDOW or steps % WINDOW:
        raise ValueError(f"steps: expected a multiple of {WINDOW}, got {steps}")
    config = load_run_config(stage)
    machine = describe_machine(threads)
    chosen = [(part, variant) for part in parts for variant in VARIANTS[part]]
    with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark_training_") as scratch:
        place = Path(scratch)
        config = _on_own_rooms(config, place, num_rooms)
        total = len(chosen) * rounds
        with tqdm(total=total, desc="benchmark", unit="process", disable=not progress) as bar:
            for part in parts:
                results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS[part]}
                for number in range(rounds):
                    for variant in VARIANTS[part]:
                        bar.set_postfix_str(f"{part}: {variant}")
                        job = {
                            "part": part,
                            "variant": variant,
                            "config": to_dict(config),
                            "steps": steps,
                            "text": text or {},
                            "folder": str(place / f"{part}-{number}"),
                            "features": str(place / f"features-{part}"),
                        }
                        results[variant].append(run_job(job, place, threads))
                        bar.update(1)
                yield from (row | machine for row in compare(part, results))
        if "checkpoint" in parts and FULL_STAGE.is_file():
            yield full_size_row() | machine


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """Fields of `peers.TextSizes` from "vocab_size=8192" and the like. ValueError for anything else."""
    sizes = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in TEXT_SIZES or not value.isdecimal() or not int(value):
            raise ValueError(f"size: expected one of {', '.join(TEXT_SIZES)} with a number from 1, got {word!r}")
        sizes[name] = int(value)
    return sizes


def describe_machine(threads: int) -> dict:
    """What the times depend on beside the code."""
    return {
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "device": "cpu",
        "processor": _processor(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _on_own_rooms(config: RunConfig, place: Path, num_rooms: int) -> RunConfig:
    """The settings with training files of rooms that are rendered below `place`, one process, on the CPU."""
    from roomplan_lib.samples.prepare import prepare_arkitscenes
    from roomplan_lib.scenes.rooms import write_rooms

    write_rooms(place / "rooms", num_rooms, seed=0, num_poses=10)
    files = prepare_arkitscenes(place / "rooms", place / "samples", num_views=8, progress=False)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            train_files=tuple(str(files[f"{kind}_train"]) for kind in ("anchors", "qa")),
            train_shares=(),
            eval_files=(),
            num_workers=0,
            features=FeaturesConfig(),
        ),
        training=dataclasses.replace(config.training, start_from="", device="cpu", bf16=False),
        distributed=dataclasses.replace(config.distributed, strategy="ddp", num_processes=1, offload="none"),
    )


def run_job(job: dict, place: Path, threads: int) -> dict:
    """What the process of one variant measured, with the load average before it began."""
    load_average = os.getloadavg()[0]
    file, result = place / "job.json", place / "result.json"
    write_whole(file, json.dumps(job))
    result.unlink(missing_ok=True)
    surroundings = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "roomplan_lib.training.benchmark", str(file), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    if done.returncode or not result.is_file():
        shown = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{job['part']}, {job['variant']}: ended with exit status {done.returncode}\n{shown}")
    return json.loads(result.read_text()) | {"load_average": round(load_average, 2)}


def compare(part: str, results: dict[str, list[dict]]) -> list[dict]:
    """A row per variant from what its processes measured: medians, and ratios to the first variant.

    A measurement is a list of numbers or one number; those of all processes are pooled. RuntimeError where variants
    begin with other losses than SAME_LOSS allows: they do not do the same work.
    """
    rows = []
    for variant, measured in results.items():
        row: dict = {"part": part, "variant": variant, "rounds": len(measured)}
        row["load_average"] = [one["load_average"] for one in measured]
        for name in dict.fromkeys(name for one in measured for name in one):
            values = [one[name] for one in measured if name in one]
            if name in ("skipped", "note"):
                row[name] = values[0]
            elif name != "load_average":
                row[name] = float(np.median(np.concatenate([np.atleast_1d(value) for value in values])))
        rows.append(row)
    first = rows[0]
    for row in rows[1:]:
        if (
            part in SAME_LOSS
            and "first_loss" in row
            and not math.isclose(row["first_loss"], first["first_loss"], rel_tol=SAME_LOSS[part])
        ):
            raise RuntimeError(
                f"{part}: {row['variant']} begins with loss {row['first_loss']}, {first['variant']} with "
                f"{first['first_loss']}; they do not do the same work"
            )
    for row in rows:
        for name in ("step_s", "step_cpu_s", "samples_per_s", "memory_gb", "bytes"):
            if first.get(name) and name in row:
                row[f"{name}_ratio"] = row[name] / first[name]
    return rows


def full_size_row() -> dict:
    """Arithmetic for FULL_STAGE, nothing measured: its cache's gain, bytes of its checkpoint and of a ZeRO-3 state.

    The state is that of the language model, resampler and geometry tokens trained whole in bf16, with the frozen
    encoder beside it in float32.
    """
    from roomplan_lib.model.describe import cache_card
    from roomplan_lib.training.plan import planned_model

    config = load_run_config(FULL_STAGE)
    model = planned_model(config.model, config.data)
    card = cache_card(model, 8, config.data.image_size, config.data.features.dtype, config.training.group_size)
    num_weights = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_encoder = sum(p.numel() for p in model.encoder.parameters())
    ours = ADAM_BYTES * num_trained
    zero3 = ZERO3_BYTES * (num_weights - num_encoder) + 4 * num_encoder
    return {
        "part": "full size",
        "variant": FULL_STAGE.stem,
        "note": "arithmetic, not measured",
        "live_tflop": card["live_flops"] / 1e12,
        "cached_tflop": card["cached_flops"] / 1e12,
        "live_ratio": card["live_flops"] / card["cached_flops"],
        "bytes": ours,
        "zero3_bytes": zero3,
        "bytes_ratio": zero3 / ours,
    }


