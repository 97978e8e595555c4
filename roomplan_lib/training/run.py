"""A run: its folder, its model, its training from the newest whole checkpoint to the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.utils import logging as transformers_logging

from roomplan_lib.config import DataConfig, RunConfig, parse, to_dict
from roomplan_lib.files import file_hash, write_whole
from roomplan_lib.model.describe import describe
from roomplan_lib.model.vlm import RoomPlanVLM, build_model
from roomplan_lib.samples.targets import response_text
from roomplan_lib.training.collator import Collator, Sample, load_samples
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, load_tokenizer, train_tokenizer
from roomplan_lib.training.trainer import RoomPlanTrainer, list_checkpoints

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "open3d", "open3d-cpu", "deepspeed")


def train(config: RunConfig, on_log: Callable[[dict], None] | None = None) -> Path:
    """Trains the run that `config` describes and returns its folder; a finished run is left as it is.

    The folder gets run.yaml (every field), run.json (versions, devices), metrics.jsonl, checkpoints/ and, at the end,
    model/ (weights, config, tokenizer). A run that was stopped goes on from its newest whole checkpoint.
    on_log: called with each entry of metrics.jsonl. Raises ValueError when the folder holds a run of other settings.
    """
    run_dir = open_run(config)
    if (run_dir / "model" / "config.json").is_file():
        print(f"{run_dir}: training is complete, reusing {run_dir / 'model'}")
        return run_dir
    transformers_logging.set_verbosity_error()
    set_seed(config.seed)
    train_samples = load_samples(config.data.train_paths)
    eval_samples = load_samples(config.data.eval_paths) if config.data.eval_paths else []
    refuse_hidden_answers([*train_samples, *eval_samples])
    if config.data.augmentation.scale_jitter and any("question" in sample.record for sample in train_samples):
        raise ValueError(
            "data.augmentation.scale_jitter changes all metres, but answers in words would keep theirs; "
            "set it to 0 or train on action records alone"
        )
    tokenizer = make_tokenizer(config, train_samples)
    model = make_model(config, tokenizer)
    collator = make_collator(model, tokenizer, config.data)
    shown = collator(train_samples[:16])
    num_views, _, height, width = shown["pixel_values"][0].shape
    num_tokens, num_supervised = (int(t.sum(1).max()) for t in (shown["attention_mask"], shown["labels"] >= 0))
    describe(model, num_views, (width, height), num_tokens - model.num_visual_tokens, num_supervised)
    count = config.training.num_eval_samples
    trainer = RoomPlanTrainer(
        config,
        model,
        collator,
        train_samples,
        eval_samples[:: max(1, len(eval_samples) // count)][:count] if count else [],
        on_log,
    )
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if checkpoints:
        print(f"{run_dir}: going on from {checkpoints[-1].name}")
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
    if trainer.args.should_save:
        save_model_folder(run_dir / "model", model, tokenizer)
    return run_dir


def refuse_hidden_answers(samples: list[Sample]) -> None:
    """Raise ValueError for a sample of a test set whose answers are hidden: there is nothing to compute a loss from."""
    for sample in samples:
        if sample.record.get("answers") == []:
            name = sample.record.get("question_id") or sample.record["scene_id"]
            raise ValueError(
                f"{name}: its answers are hidden; such a file can be predicted on, not trained or evaluated on"
            )


def open_run(config: RunConfig) -> Path:
    """The run's folder with run.yaml and run.json in it. ValueError when it belongs to other settings or samples."""
    run_dir = config.run_dir
    settings = yaml.safe_dump(to_dict(config), sort_keys=False)
    existing = run_dir / "run.yaml"
    if existing.is_file() and existing.read_text() != settings:
        old, new = _flat(yaml.safe_load(existing.read_text())), _flat(to_dict(config))
        changed = [f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
        raise ValueError(
            f"{run_dir} holds a run of other settings ({'; '.join(changed)}); choose another run_name or delete it"
        )
    missing = [file for file in (*config.data.train_paths, *config.data.eval_paths) if not file.is_file()]
    if missing or not config.data.train_paths:
        what = f"{missing[0]} is missing" if missing else "data.train_files is empty"
        raise ValueError(f"{what}; make samples with `roomplan prepare` and name them in data.train_files")
    samples = {str(file): file_hash(file) for file in (*config.data.train_paths, *config.data.eval_paths)}
    record = run_dir / "run.json"
    if record.is_file() and (old := json.loads(record.read_text())["samples"]) != samples:
        changed = [file for file in samples if old.get(file) != samples[file]]
        raise ValueError(f"{run_dir} was made from other samples than {changed}; choose another run_name or delete it")
    write_whole(existing, settings)
    write_whole(record, json.dumps(_surroundings() | {"samples": samples}, indent=1) + "\n")
    return run_dir


def make_tokenizer(config: RunConfig, train_samples: list[Sample]) -> PreTrainedTokenizerBase:
    """The run's tokenizer: by name, or a BPE trained on the prompts and responses of its training samples."""
    settings = config.model.language_model
    if settings.tokenizer or settings.name:
        return load_tokenizer(settings.tokenizer or settings.name)
    blank = train_tokenizer([], vocab_size=0)
    records = [sample.record for sample in train_samples]
    data = config.data
    texts = (
        prompt_text(r, blank, 1, data.visual_first, codec=data.codec) + response_text(r, codec=data.codec)
        for r in records
    )
    return train_tokenizer(texts, settings.vocab_size)


def make_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RoomPlanVLM:
    """The run's model before training: random weights, or the pretrained ones that the settings name."""
    set_seed(config.seed)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return build_model(config.model, config.data, len(tokenizer), image_token_id)


def make_collator(model: RoomPlanVLM, tokenizer: PreTrainedTokenizerBase, data: DataConfig | None = None) -> Collator:
    """The collator that shows `model` what it was trained on; `data` overrides what its folder remembers."""
    return Collator(
        tokenizer,
        data or parse(DataConfig, model.config.data, "data"),
        num_visual_tokens=model.num_visual_tokens,
        patch_size=model.encoder.config.patch_size,
        needs_positions=model.needs_positions,
    )


def save_model_folder(folder: Path, model: RoomPlanVLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes weights, config and tokenizer to `folder`, whole or not at all."""
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(folder)


def load_model_folder(folder: Path) -> tuple[RoomPlanVLM, PreTrainedTokenizerBase]:
    """The model (eval mode) and tokenizer of a model folder or a checkpoint."""
    return RoomPlanVLM.from_pretrained(folder), load_tokenizer(folder)


def _flat(data: dict, prefix: str = "") -> dict:
    items = {}
    for key, value in (data or {}).items():
        items |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return items


def _surroundings() -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    return {
        "git_commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "versions": versions,
        "devices": devices,
        "cpu_count": os.cpu_count(),
    }
