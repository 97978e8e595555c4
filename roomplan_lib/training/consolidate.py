"""What a run has learned as one folder, and its LoRA adapters in the form that peft reads on its own."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file

from roomplan_lib.training.checkpoint import list_checkpoints, read_state
from roomplan_lib.training.run import load_model_folder

ADAPTER, BASE = "adapter", "language_model"
RECORDS = ("run.yaml", "metrics.jsonl", "scores.json")


def consolidate(
    source: str | Path,
    output: str | Path | None = None,
    *,
    whole: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Writes a model folder that `RoomPlanVLM.from_pretrained` loads, and returns it.

    source: a run's folder (its trained model, else its newest checkpoint), a model folder or a checkpoint. output: the
    new folder; consolidated/ in the run's folder, or <checkpoint>-consolidated beside a checkpoint, when left out.
    whole: with the frozen pretrained weights, which the folder otherwise names and does not hold. dtype: of all weights
    in the files; they are widened when they are loaded. What tells how a run went (run.yaml, metrics.jsonl,
    scores.json, as far as they are there) goes beside its weights.
    A model with LoRA adapters also gets adapter/ (adapter_model.safetensors, adapter_config.json), which
    `peft.PeftModel.from_pretrained` puts on the base language model, and language_model/ with that base unless a hub
    id or folder already has its weights. Raises ValueError when there is no model, it is damaged, or output exists.
    """
    source = Path(source)
    weights = source
    if not (source / "model.safetensors").is_file():
        checkpoints = list_checkpoints(source / "checkpoints")
        weights = source / "model" if (source / "model" / "model.safetensors").is_file() else None
        weights = weights or (checkpoints[-1] if checkpoints else None)
        if weights is None:
            raise ValueError(f"{source}: no run with a trained model or checkpoint, no model folder, no checkpoint")
    if weights.name.startswith("checkpoint-"):
        read_state(weights)
    default = source.with_name(f"{source.name}-consolidated") if weights == source else source / "consolidated"
    output = default if output is None else Path(output)
    if output.exists():
        raise ValueError(f"{output} exists; delete it or choose another --output")
    model, tokenizer = load_model_folder(weights)
    model.to(getattr(torch, dtype))
    if whole:  # nothing is elsewhere, so nothing says where it was
        model.config.references.clear()
        model.config.model["vggt_weights"] = model.config.model["language_model"]["name"] = ""
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if model.settings.language_model.lora:
            _write_adapter(model, staging, output)
        for name in RECORDS if weights != source else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def _write_adapter(model, folder: Path, final: Path) -> None:
    """adapter/ and, where nothing else holds it, language_model/; `final` is where the folder will be."""
    name, language_model = "default", model.language_model
    config: LoraConfig = copy.copy(language_model.peft_config[name])
    state = {
        f"base_model.model.{key.replace(f'.{name}.', '.')}": value.contiguous()
        for key, value in language_model.state_dict().items()
        if "lora_" in key
    }
    reference = model.config.references.get("language_model")
    rows = model.get_input_embeddings().num_embeddings
    elsewhere = reference is not None and reference["vocab_size"] == rows  # rows that were added are nowhere else
    config.base_model_name_or_path = reference["source"] if elsewhere else str((final / BASE).absolute())
    config.task_type, config.inference_mode = TaskType.CAUSAL_LM, True
    config.save_pretrained(folder / ADAPTER)
    save_file(state, folder / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    if not elsewhere:
        model.unload_lora()
        language_model.save_pretrained(folder / BASE)
