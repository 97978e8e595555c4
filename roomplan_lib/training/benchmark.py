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
REPEATS = 5  # of saving and loading
# A model whose encoder, resampler and language model share the FLOPs of a sample about as those of full size do (84,
# 5 and 11 %), so that its gain by the cache on a CPU tells of that on a GPU. The tiny stage's encoder is smaller.
MINIATURE = {
    "vggt": {
        "img_size": 112,
        "embed_dim": 256,
        "depth": 6,
        "num_heads": 4,
        "patch_embed_depth": 6,
        "patch_embed_num_heads": 4,
        "layer_scale_init": 1.0,
    },
    "language_model": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
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


# ------------------------------------------------------------------ in the process of a variant
class Clock:
    """Wall and CPU seconds of a step, from windows of WINDOW steps; the first window is not counted."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []
        self.first_loss: float | None = None

    def mark(self, step: int, loss: float) -> None:
        """A step has ended, counted from 1; loss: its own, or that of the steps since the last mark."""
        if self.first_loss is None:
            self.first_loss = loss
        if step % WINDOW == 0:
            self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, num_samples: int) -> dict:
        """num_samples: of a step."""
        wall_s, cpu_s = np.diff(np.array(self.marks), axis=0).T / WINDOW
        return {
            "step_s": wall_s.tolist(),
            "step_cpu_s": cpu_s.tolist(),
            "samples_per_s": (num_samples / wall_s).tolist(),
            "memory_gb": peak_memory() / 1e9,
            "first_loss": self.first_loss,
        }


def measure(job: dict) -> dict:
    """What the variant of a job costs; {"skipped": reason} where it cannot run here."""
    from roomplan_lib.config import parse

    config = parse(RunConfig, job["config"])
    steps = WINDOW + job["steps"]
    config = dataclasses.replace(
        config,
        run_name=job["variant"].replace(" ", "-"),
        runs_dir=job["folder"],
        training=dataclasses.replace(
            config.training, max_steps=steps, log_every_steps=WINDOW, eval_every_steps=0, save_every_steps=steps
        ),
    )
    from roomplan_lib.training.peers import measure_peer

    function = {
        "loop": measure_loop,
        "peers": measure_peer,
        "cache": measure_cache,
        "miniature": measure_cache,
        "distributed": measure_processes,
        "checkpoint": measure_checkpoint,
    }[job["part"]]
    return function(config, job)


def measure_loop(config: RunConfig, job: dict) -> dict:
    """Ours: the run as `roomplan train` makes it, with its log, its metrics file and its watch over the loss. Bare:
    forward, backward, clipping and AdamW on the same batches, which are there before or are made in the loop."""
    if job["variant"] == "ours":
        return _train(config)
    trainer = _trainer(config)
    batches = iter(trainer.get_train_dataloader())
    if job["variant"] == "bare":
        batches = iter(list(batches))
    return _bare_loop(trainer, batches)


def _train(config: RunConfig) -> dict:
    from roomplan_lib.training.run import train

    clock = Clock()
    train(config, on_log=lambda entry: clock.mark(entry["step"], entry["loss"]))
    return clock.result(config.training.micro_batch_size * config.training.gradient_accumulation_steps)


def _trainer(config: RunConfig):
    """The trainer of a run, with nothing that listens to it."""
    import torch

    from roomplan_lib.training.collator import load_samples
    from roomplan_lib.training.run import make_collator, make_model, make_tokenizer
    from roomplan_lib.training.trainer import RoomPlanTrainer

    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer)
    torch.manual_seed(config.seed)
    return RoomPlanTrainer(config, model, make_collator(model, tokenizer, config.data), samples, [])


def _bare_loop(trainer, batches: Iterator[dict]) -> dict:
    """The computation of a trainer's steps and nothing else."""
    import torch

    from roomplan_lib.training.trainer import count_supervised, parameter_groups, schedule_factor

    settings, model = trainer.config.training, trainer.model
    groups = parameter_groups(model, trainer.config)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    clock = Clock()
    for step in range(settings.max_steps):
        micro_batches = [next(batches) for _ in range(settings.gradient_accumulation_steps)]
        count = sum(map(count_supervised, micro_batches))
        total = 0.0
        for batch in micro_batches:
            loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule_factor(step, settings)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark(step + 1, total)
    return clock.result(settings.micro_batch_size * settings.gradient_accumulation_steps)


def measure_cache(config: RunConfig, job: dict) -> dict:
    """Training on a frozen encoder that runs in every step, and on its outputs from the cache, filled before.

    `cache` has the stage's sizes, `miniature` those of MINIATURE.
    """
    if job["part"] == "miniature":
        config = _miniature(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze_vggt=True))
    seconds = 0.0
    if job["variant"] == "cached":
        from roomplan_lib.training.cache import fill_cache

        features = FeaturesConfig(folder=job["features"], on_missing="error")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=features))
        start = time.perf_counter()
        fill_cache(config)
        seconds = time.perf_counter() - start
    return _train(config) | ({"fill_s": seconds} if seconds else {})


def _miniature(config: RunConfig) -> RunConfig:
    """The settings with MINIATURE's sizes and LoRA; a step is of two samples, each with views of its own."""
    language_model = dataclasses.replace(
        config.model.language_model, name="", config=MINIATURE["language_model"], lora=LoraSettings()
    )
    model = dataclasses.replace(
        config.model,
        vggt=MINIATURE["vggt"],
        resampler=ResamplerConfig(num_latents=32, num_layers=2, width=192, ffn_width=768, head_width=32),
        language_model=language_model,
    )
    training = dataclasses.replace(
        config.training, micro_batch_size=2, group_size=1, gradient_accumulation_steps=1, learning_rate=1e-4
    )
    return dataclasses.replace(config, model=model, training=training)


def measure_processes(config: RunConfig, job: dict) -> dict:
    """Samples per second of one process, and of two with half of its micro-batch each: the same global batch."""
    from roomplan_lib.training.launch import launch

    if job["variant"] == "ZeRO-3" and importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "needs DeepSpeed: pip install 'roomplan_lib[distributed]'"}
    training = config.training
    if job["variant"] != "single":
        if training.micro_batch_size % 2 or (training.micro_batch_size // 2) % training.group_size:
            return {"skipped": f"micro_batch_size {training.micro_batch_size} has no half of whole groups"}
        strategy = "zero3" if job["variant"] == "ZeRO-3" else "ddp"
        config = dataclasses.replace(
            config,
            training=dataclasses.replace(training, micro_batch_size=training.micro_batch_size // 2),
            distributed=dataclasses.replace(config.distributed, strategy=strategy, num_processes=2),
        )
    entries: list[dict] = []
    launch(config, on_log=entries.append)
    windows = [entry for entry in entries if entry["step"] > WINDOW]
    return {
        "samples_per_s": [entry["samples_per_s"] for entry in windows],
        "memory_gb": max(entry["memory_gb"] for entry in entries),  # of the larger process
        "first_loss": entries[0]["loss"],
    }


def measure_checkpoint(config: RunConfig, job: dict) -> dict:
    """Bytes and seconds of a checkpoint of LoRA, resampler and geometry tokens beside a frozen base; and bytes of
    DeepSpeed's ZeRO-3 state, frozen weights included, of the same model with its language model trained whole."""
    import torch

    from roomplan_lib.training import checkpoint as checkpoints
    from roomplan_lib.training.processes import join_processes
    from roomplan_lib.training.strategy import make_strategy
    from roomplan_lib.training.trainer import count_supervised, parameter_groups

    ours = job["variant"] == "ours"
    if not ours and importlib.util.find_spec("deepspeed") is None:
        return {"skipped": "needs DeepSpeed: pip install 'roomplan_lib[distributed]'"}
    folder = Path(job["folder"]) / "checkpoints"
    if ours:
        config = _with_named_base(config, folder.with_name("base"))
    else:
        os.environ["LOCAL_RANK"] = "0"  # which DeepSpeed's saving reads
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, freeze_vggt=True),
            distributed=dataclasses.replace(config.distributed, strategy="zero3"),
        )
    with join_processes(config) as processes:
        trainer = _trainer(config)
        model = trainer.model.train()
        strategy = make_strategy(config, model, parameter_groups(model, config), processes)
        batch = next(iter(trainer.get_train_dataloader()))
        strategy.forward_backward(batch, count_supervised(batch), last=True)
        strategy.reduce()
        strategy.step([1e-4] * len(parameter_groups(model, config)))
        num_trained = sum(getattr(p, "ds_numel", p.numel()) for p in strategy.trained.values())
        if not ours:
            strategy.engine.save_checkpoint(str(folder))
            state_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            encoder_bytes = sum(p.numel() * p.element_size() for p in model.encoder.parameters())
            return {"bytes": state_bytes + encoder_bytes, "num_trained": num_trained}
        save_s, load_s = [], []
        for step in range(REPEATS):
            start = time.perf_counter()
            path = checkpoints.save_checkpoint(
                folder, model, trainer.collator.tokenizer, strategy.weights(), strategy.moments(),
                checkpoints.random_state(processes), {"step": step, "curve": vars(trainer.curve)}, keep=1,
            )  # fmt: skip
            saved = time.perf_counter()
            checkpoints.read_state(path)
            model.load_trained(path)
            strategy.load_moments(checkpoints.load_tensors(path, checkpoints.OPTIMIZER), step)
            torch.set_rng_state(checkpoints.load_tensors(path, checkpoints.RANDOM)["0.cpu"])
            save_s.append(saved - start)
            load_s.append(time.perf_counter() - saved)
        tensors = sum((path / name).stat().st_size for name in (checkpoints.OPTIMIZER, "model.safetensors"))
        return {"bytes": tensors, "save_s": save_s, "load_s": load_s, "num_trained": num_trained}


def _with_named_base(config: RunConfig, folder: Path) -> RunConfig:
    """The settings with their own random encoder and language model as frozen weights from files, and LoRA, so that a
    checkpoint refers to those as it does to VGGT-1B and Qwen3-4B."""
    from safetensors.torch import save_file

    trainer = _trainer(config)
    model, encoder = trainer.model, folder.with_name("encoder.safetensors")
    model.language_model.save_pretrained(folder)
    trainer.collator.tokenizer.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in model.encoder.state_dict().items()}, encoder)
    language_model = dataclasses.replace(config.model.language_model, name=str(folder), config={}, lora=LoraSettings())
    settings = dataclasses.replace(
        config.model, vggt_weights=str(encoder), freeze_vggt=True, language_model=language_model
    )
    return dataclasses.replace(config, model=settings)


def benchmark_table(rows: Sequence[dict]) -> str:
    """The rows of `benchmark_training` as Markdown tables, one per part, and what they were measured on."""
    columns = {
        "wall ms a step": ("step_s", 1e3, "step_s_ratio"),
        "CPU ms a step": ("step_cpu_s", 1e3, "step_cpu_s_ratio"),
        "samples/s": ("samples_per_s", 1, "samples_per_s_ratio"),
        "peak GB": ("memory_gb", 1, "memory_gb_ratio"),
        "MB": ("bytes", 1e-6, "bytes_ratio"),
        "save ms": ("save_s", 1e3, ""),
        "load ms": ("load_s", 1e3, ""),
    }
    texts = []
    for part in dict.fromkeys(row["part"] for row in rows):
        members = [row for row in rows if row["part"] == part]
        shown = {title: keys for title, keys in columns.items() if any(keys[0] in row for row in members)}
        lines = [[part, *shown], ["---"] * (len(shown) + 1)]
        for row in members:
            cells = []
            for key, factor, ratio in shown.values():
                cell = f"{factor * row[key]:.4g}" if key in row else ""
                cells.append(f"{cell} ({row[ratio]:.3g}x)" if ratio in row else cell)
            lines.append([row["variant"] + (f": {row['skipped']}" if "skipped" in row else ""), *cells])
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if "zero3_bytes" in members[0]:
            row = members[0]
            texts[-1] += (
                f"\n\nArithmetic for {row['variant']}: {row['live_tflop']:.1f} TFLOP a sample live, "
                f"{row['cached_tflop']:.1f} cached; an exact checkpoint {row['bytes'] / 1e9:.2f} GB, a ZeRO-3 state of "
                f"all weights {row['zero3_bytes'] / 1e9:.1f} GB."
            )
    loads = [load for row in rows for load in row.get("load_average", ())]
    first = rows[0]
    return "\n\n".join(texts) + (
        f"\n\nMedians; in brackets: over the first line. {first['processor']}, {first['cores']} cores, "
        f"{first['threads']} thread{'s' * (first['threads'] > 1)} a process, torch {first['torch']}, transformers "
        f"{first['transformers']}; load average {min(loads, default=0):.1f} to {max(loads, default=0):.1f} before each."
    )


if __name__ == "__main__":
    write_whole(sys.argv[2], json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
