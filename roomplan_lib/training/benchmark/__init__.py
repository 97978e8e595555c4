"""What training and answering cost: scene groups and the cache beside the reference code's loop, our loop beside the
bare computation, answers behind a shared prefix beside one at a time, two processes beside one, checkpoints beside a
full ZeRO-3 state, and other trainers beside ours.

Every variant runs in a process of its own, `python -m roomplan_lib.training.benchmark`, with a fixed number of
threads; the rounds take the variants in turn (A B A B), so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.config import FeaturesConfig, RunConfig, load_run_config, to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.training.benchmark.full_size import FULL_STAGE, full_size_row

WINDOW = 10  # steps whose mean time is one measurement; as many are made before the first
# By part of the benchmark: the variants, the first of which the others are compared with.
VARIANTS = {
    "groups": (
        "reference loop",
        "HF Trainer + PEFT, cached",
        "live, ungrouped",
        "live, groups of 8",
        "cached, ungrouped",
        "cached, groups of 8",
        "cached, groups of 16",
        "in memory, groups of 8",
    ),
    "inference": ("one at a time", "left-padded batch", "shared prefix"),
    "constrained": ("a pass for every token", "jump-forward"),
    "loop": ("bare", "bare with collator", "ours"),
    "peers": ("bare", "ours", "HF Trainer", "TRL", "LLaMA-Factory"),
    "head": ("HF Trainer", "ours", "TRL"),
    "cache": ("cached", "live"),
    "miniature": ("cached", "live"),
    "distributed": ("single", "DDP", "ZeRO-3"),
    "checkpoint": ("ours", "ZeRO-3 state"),
}
MANY_ROOMS = 40  # of the part `groups`, whose steps show up to 32 view sets; a fifth of the rooms is held out
# Parts whose steps are long enough to be measured one by one: of the variants named, and of all in the other parts, a
# tenth of the steps.
STEP_BY_STEP = {
    "groups": ("reference loop", "live, ungrouped"),
    "inference": VARIANTS["inference"],
    "constrained": VARIANTS["constrained"],
    "head": VARIANTS["head"],
}
# Of Qwen3's vocabulary: the sizes of the part `head`, where others are not given.
HEAD_SIZES = {"vocab_size": 151_936, "width": 256, "num_layers": 4, "length": 200}
ON_GPU = ("peers", "head")
TEXT_SIZES = ("vocab_size", "width", "num_layers", "num_rows", "length", "num_supervised", "rank")  # of the peers
# Variants of these parts must begin with the same loss, but for this share of it: peers draw their rows in any order.
SAME_LOSS = {"groups": 1e-4, "loop": 1e-4, "distributed": 1e-4, "peers": 0.02, "head": 0.02}
UNEQUAL = "they do not do the same work"
RATIOS = (
    "step_s", "step_cpu_s", "samples_per_s", "samples_per_cpu_s", "memory_gb", "memory_above_start_gb", "bytes",
)  # fmt: skip
SECOND = {"groups": "live, ungrouped"}  # which the others are compared with as well
# What is to be reached: part, variant, measurement, the variant it is divided by ("" = as it is), and the least or the
# most that it may be.
GOALS = (
    ("groups", "cached, groups of 8", "samples_per_cpu_s", "reference loop", "at least", 15.0),
    ("groups", "cached, groups of 8", "samples_per_cpu_s", "live, ungrouped", "at least", 10.0),
    ("groups", "cached, groups of 8", "step_cpu_s", "in memory, groups of 8", "at most", 1.1),
    ("inference", "shared prefix", "samples_per_cpu_s", "one at a time", "at least", 4.0),
    ("loop", "ours", "overhead_ms", "", "at most", 2.0),
    ("head", "ours", "step_cpu_s", "HF Trainer", "at most", 1 / 6),
    ("head", "ours", "memory_above_start_gb", "HF Trainer", "at most", 0.4),
    ("cache", "cached", "samples_per_cpu_s", "live", "at least", 5.0),
)
TINY = "papermill_runs/params/tiny.yaml"
# The tiny stage that has a cache: its encoder is frozen and deep enough for one. Of the part `cache`.
TINY_CACHED = "papermill_runs/params/tiny_rooms.yaml"


def benchmark_training(
    stage: str | Path | None = None,
    *,
    parts: Sequence[str] = tuple(VARIANTS),
    steps: int = 40,
    rounds: int = 3,
    threads: int = 1,
    num_rooms: int = 10,
    text: dict[str, int] | None = None,
    device: str = "cpu",
    folder: Path | None = None,
    progress: bool = True,
) -> Iterator[dict]:
    """One row per variant: medians over `rounds` processes, and ratios to the first variant of its part.

    stage: the settings that are trained with, on `num_rooms` procedural rooms that are made for it, whatever its files;
    None = TINY, in the part `cache` TINY_CACHED. In fp32, but for the part `cache`, which keeps the stage's bf16.
    parts: of VARIANTS. steps: measured in each process, after WINDOW that are not. threads: of each process.
    text: sizes of the parts `peers` and `head`, see `peers.TextSizes`. device: cuda for those two parts on a GPU, where
    the wall times count.
    folder: where the rooms and runs are made and removed again; the system's temporary folder for None.
    A row: part, variant, and what applies of step_s and step_cpu_s (wall and CPU seconds of a step), samples_per_s,
    samples_per_cpu_s, overhead_ms (CPU, of a step over the first variant's), memory_gb (the process's peak) and
    memory_above_start_gb, bytes, save_s, load_s; <name>_ratio of those, <name>_second_ratio to the part's SECOND;
    load_average before each process; and the machine. After them the goals that were measured: part "goal", part_of,
    variant, what, over, value, relation, limit, met. A variant whose package is missing, or that this machine cannot
    run, has `skipped`, the reason.
    Raises ValueError for an unknown part, and RuntimeError with the output of a variant that failed.
    """
    if unknown := [part for part in parts if part not in VARIANTS]:
        raise ValueError(f"part: expected {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    if steps < WINDOW or steps % WINDOW:
        raise ValueError(f"steps: expected a multiple of {WINDOW}, got {steps}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}")
    if device == "cuda" and (others := [part for part in parts if part not in ON_GPU]):
        raise ValueError(f"device: {', '.join(others)} run on the CPU; on a GPU there are {', '.join(ON_GPU)}")
    configs = {part: load_run_config(stage or (TINY_CACHED if part == "cache" else TINY)) for part in parts}
    machine = describe_machine(threads, device)
    chosen = [(part, variant) for part in parts for variant in VARIANTS[part]]
    with tempfile.TemporaryDirectory(dir=folder, prefix="benchmark_training_") as scratch:
        place, measured = Path(scratch), []
        few = _make_rooms(place / "few", num_rooms) if {*parts} - {"groups"} else {}
        many = _make_rooms(place / "many", max(num_rooms, MANY_ROOMS)) if "groups" in parts else {}
        total = len(chosen) * rounds
        with tqdm(total=total, desc="benchmark", unit="process", disable=not progress) as bar:
            for part in parts:
                config = _on_rooms(configs[part], many if part == "groups" else few, device)
                if part == "cache":  # both of its variants as the stage trains; others are set beside fp32 peers
                    bf16 = configs[part].training.bf16
                    config = dataclasses.replace(config, training=dataclasses.replace(config.training, bf16=bf16))
                results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS[part]}
                for number in range(rounds):
                    for variant in VARIANTS[part]:
                        bar.set_postfix_str(f"{part}: {variant}")
                        job = {
                            "part": part,
                            "variant": variant,
                            "config": to_dict(config),
                            "window": 1 if part in STEP_BY_STEP else WINDOW,
                            "steps": steps // 10 if variant in STEP_BY_STEP.get(part, ()) else steps,
                            "text": (HEAD_SIZES if part == "head" else {}) | (text or {}),
                            "folder": str(place / f"{part}-{number}"),
                            "features": str(place / f"features-{part}"),
                        }
                        results[variant].append(run_job(job, place, threads))
                        bar.update(1)
                rows = compare(part, results)
                measured += rows
                yield from (row | machine for row in rows)
        yield from (row | machine for row in reached(measured))
        if {"groups", "cache", "checkpoint"} & {*parts} and FULL_STAGE.is_file():
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


def describe_machine(threads: int, device: str = "cpu") -> dict:
    """What the times depend on beside the code."""
    return {
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "processor": _processor(),
        "torch": importlib.metadata.version("torch"),
        "transformers": importlib.metadata.version("transformers"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _make_rooms(place: Path, num_rooms: int) -> dict[str, Path]:
    """Samples files of procedural rooms that are rendered below `place`."""
    from roomplan_lib.samples.prepare import prepare_arkitscenes
    from roomplan_lib.scenes.rooms import write_rooms

    write_rooms(place / "rooms", num_rooms, seed=0, num_poses=10)
    return prepare_arkitscenes(place / "rooms", place / "samples", num_views=8, progress=False)


def _on_rooms(config: RunConfig, files: dict[str, Path], device: str) -> RunConfig:
    """The settings with these training files, one process and an encoder of random weights, which cost the same."""
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
        model=dataclasses.replace(config.model, vggt_weights=""),
        training=dataclasses.replace(config.training, start_from="", device=device, bf16=False),
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
        **({"CUDA_VISIBLE_DEVICES": ""} if job["config"]["training"]["device"] == "cpu" else {}),
    }
    command = [sys.executable, "-m", __name__, str(file), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings, check=False)
    if done.returncode or not result.is_file():
        shown = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise RuntimeError(f"{job['part']}, {job['variant']}: ended with exit status {done.returncode}\n{shown}")
    return json.loads(result.read_text()) | {"load_average": round(load_average, 2)}


def compare(part: str, results: dict[str, list[dict]]) -> list[dict]:
    """A row per variant from what its processes measured: medians, and ratios to the first variant.

    A measurement is a list of numbers or one number; those of all processes are pooled. RuntimeError where variants
    begin with other losses than SAME_LOSS allows, or write other tokens: they do not do the same work.
    """
    rows, answers = [], []
    for variant, measured in results.items():
        row: dict = {"part": part, "variant": variant, "rounds": len(measured)}
        row["load_average"] = [one["load_average"] for one in measured]
        for name in dict.fromkeys(name for one in measured for name in one):
            values = [one[name] for one in measured if name in one]
            if name in ("skipped", "note"):
                row[name] = values[0]
            elif name == "tokens":
                answers += values
                if any(tokens != answers[0] for tokens in answers):
                    raise RuntimeError(f"{part}: {variant} writes other tokens than {next(iter(results))}; {UNEQUAL}")
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
                f"{first['first_loss']}; {UNEQUAL}"
            )
    second = next((row for row in rows if row["variant"] == SECOND.get(part)), {})
    for row in rows:
        for name in RATIOS:
            for base, ratio in ((first, "ratio"), (second, "second_ratio")):
                if base.get(name) and name in row:
                    row[f"{name}_{ratio}"] = row[name] / base[name]
        if part == "loop" and "step_cpu_s" in row:
            row["overhead_ms"] = 1e3 * (row["step_cpu_s"] - first["step_cpu_s"])
    return rows


def reached(rows: Sequence[dict]) -> list[dict]:
    """A row for each of GOALS whose variants are among the rows."""
    found = {(row["part"], row["variant"]): row for row in rows}
    goals = []
    for part, variant, what, over, relation, limit in GOALS:
        values = [found.get((part, name), {}).get(what) for name in (variant, over) if name]
        if None not in values:
            value = values[0] / values[1] if over else values[0]
            met = value >= limit if relation == "at least" else value <= limit
            goal = {"part": "goal", "part_of": part, "variant": variant, "what": what, "over": over}
            goals.append(goal | {"value": value, "relation": relation, "limit": limit, "met": bool(met)})
    return goals
