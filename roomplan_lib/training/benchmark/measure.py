"""What one variant costs, in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from roomplan_lib.config import FeaturesConfig, LoraSettings, ResamplerConfig, RunConfig, parse
from roomplan_lib.system import peak_memory
from roomplan_lib.training import checkpoint as checkpoints
from roomplan_lib.training.benchmark import WINDOW
from roomplan_lib.training.cache import fill_cache
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.launch import launch
from roomplan_lib.training.processes import join_processes
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer, train
from roomplan_lib.training.strategy import make_strategy
from roomplan_lib.training.trainer import RoomPlanTrainer, count_supervised, parameter_groups, schedule_factor

REPEATS = 5  # of saving and loading
WARMUP = 2  # steps that are not counted, at least
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
        "vocab_size": 8192,
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


class Clock:
    """Wall and CPU seconds of a step, from windows of `window` steps; the first window, or WARMUP steps if that is
    more, is not counted."""

    def __init__(self, window: int = WINDOW) -> None:
        self.window = window
        self.marks: list[tuple[float, float]] = []
        self.first_loss: float | None = None

    def mark(self, step: int, loss: float | None = None) -> None:
        """A step has ended, counted from 1; loss: its own, or that of the steps since the last mark, if it has one."""
        if self.first_loss is None:
            self.first_loss = loss
        if step % self.window == 0 and step >= WARMUP:
            self.marks.append((time.perf_counter(), time.process_time()))

    def result(self, num_samples: int) -> dict:
        """num_samples: of a step."""
        wall_s, cpu_s = np.diff(np.array(self.marks), axis=0).T / self.window
        return {
            "step_s": wall_s.tolist(),
            "step_cpu_s": cpu_s.tolist(),
            "samples_per_s": (num_samples / wall_s).tolist(),
            "samples_per_cpu_s": (num_samples / cpu_s).tolist(),
            "memory_gb": peak_memory() / 1e9,
            **({} if self.first_loss is None else {"first_loss": self.first_loss}),
        }


def measure(job: dict) -> dict:
    """What the variant of a job costs; {"skipped": reason} where it cannot run here."""
    # They measure with what is here.
    from roomplan_lib.training.benchmark import groups, inference, peers

    functions = {
        "loop": measure_loop,
        "groups": groups.measure_groups,
        "peers": peers.measure_peer,
        "head": peers.measure_peer,
        "inference": inference.measure_inference,
        "constrained": inference.measure_inference,
        "cache": measure_cache,
        "miniature": measure_cache,
        "distributed": measure_processes,
        "checkpoint": measure_checkpoint,
    }
    config = parse(RunConfig, job["config"])
    steps = max(job["window"], WARMUP) + job["steps"]
    config = dataclasses.replace(
        config,
        run_name=job["variant"].replace(" ", "-"),
        runs_dir=job["folder"],
        training=dataclasses.replace(
            config.training, max_steps=steps, log_every_steps=job["window"], eval_every_steps=0, save_every_steps=steps
        ),
    )
    return functions[job["part"]](config, job)


def measure_loop(config: RunConfig, job: dict) -> dict:
    """Ours: the run as `roomplan train` makes it, with its log, its metrics file and its watch over the loss. Bare:
    forward, backward, clipping and AdamW on the same batches, which are there before or are made in the loop.

    A step is one group, so that what the loop adds is not lost in what it is for; the samples are the anchors alone,
    which are all tokenised before the clock starts, as they are after the first pass of a run.
    """
    training = config.training
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_files=config.data.train_files[:1]),
        training=dataclasses.replace(training, micro_batch_size=training.group_size, gradient_accumulation_steps=1),
    )
    if job["variant"] == "ours":
        return _train(config)
    trainer = make_trainer(config)
    batches = iter(trainer.get_train_dataloader())
    if job["variant"] == "bare":
        batches = iter(list(batches))
    return _bare_loop(trainer, batches)


def _train(config: RunConfig) -> dict:
    clock = Clock(config.training.log_every_steps)
    train(config, on_log=lambda entry: clock.mark(entry["step"], entry["loss"]))
    return clock.result(config.training.micro_batch_size * config.training.gradient_accumulation_steps)


def make_trainer(config: RunConfig, kind: type[RoomPlanTrainer] = RoomPlanTrainer) -> RoomPlanTrainer:
    """The trainer of a run, with nothing that listens to it."""
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer)
    torch.manual_seed(config.seed)
    return kind(config, model, make_collator(model, tokenizer, config.data), samples, [])


def _bare_loop(trainer: RoomPlanTrainer, batches: Iterator[dict]) -> dict:
    """The computation of a trainer's steps and nothing else."""
    settings, model = trainer.config.training, trainer.model
    groups = parameter_groups(model, trainer.config)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    clock = Clock(settings.log_every_steps)
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

    `cache` has the stage's sizes, `miniature` those of MINIATURE; in both each question has views of its own.
    """
    if job["part"] == "miniature":
        config = miniature(config)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, group_size=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, freeze_vggt=True))
    seconds = 0.0
    if job["variant"] == "cached":
        features = FeaturesConfig(folder=job["features"], on_missing="error")
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=features))
        start = time.perf_counter()
        fill_cache(config)
        seconds = time.perf_counter() - start
    return _train(config) | ({"fill_s": seconds} if seconds else {})


def miniature(config: RunConfig) -> RunConfig:
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
    windows = [entry for entry in entries if entry["step"] > max(job["window"], WARMUP)]
    return {
        "samples_per_s": [entry["samples_per_s"] for entry in windows],
        "memory_gb": max(entry["memory_gb"] for entry in entries),  # of the larger process
        "first_loss": entries[0]["loss"],
    }


def measure_checkpoint(config: RunConfig, job: dict) -> dict:
    """Bytes and seconds of a checkpoint of LoRA, resampler and geometry tokens beside a frozen base; and bytes of
    DeepSpeed's ZeRO-3 state, frozen weights included, of the same model with its language model trained whole."""
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
        trainer = make_trainer(config)
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
    trainer = make_trainer(config)
    model, encoder = trainer.model, folder.with_name("encoder.safetensors")
    model.language_model.save_pretrained(folder)
    trainer.collator.tokenizer.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in model.encoder.state_dict().items()}, encoder)
    language_model = dataclasses.replace(config.model.language_model, name=str(folder), config={}, lora=LoraSettings())
    settings = dataclasses.replace(
        config.model, vggt_weights=str(encoder), freeze_vggt=True, language_model=language_model
    )
    return dataclasses.replace(config, model=settings)
