"""Weights of vggt-qwen3 (the code that this project follows), and of our own models, from the layouts they come in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from roomplan_lib.model.vggt.checkpoint import read_weights, unwrapped, weight_files
from roomplan_lib.model.vlm import RoomPlanVLM

MERGED_FOLDERS = ("pytorch_model_fp32", "pytorch_model_fp32.bin")  # what DeepSpeed's zero_to_fp32.py was told to write
# Part names of vggt-qwen3 and ours. Its geometry head turned the mean of all views into one vector, repeated for each
# token: nothing here does that, so it is left out.
PARTS = {"vision_model": "encoder", "projector": "resampler", "text_model": "language_model"}
LEFT_OUT = {
    "geom_head": "its one vector for the mean of all views has no counterpart",
    "vision_model.track_head": "never built",
}
_LISTED = 20


@dataclass
class ImportReport:
    """What became of each key."""

    files: list[Path]
    loaded: list[str] = field(default_factory=list)  # our keys
    left_out: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys of the checkpoint
    padded: list[str] = field(default_factory=list)  # our keys that got their first rows only, with the row counts
    kept: list[str] = field(default_factory=list)  # our parts that the checkpoint does not hold

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded from {', '.join(file.name for file in self.files)}"]
        lines += [f"{len(keys)} left out ({reason}): {_listed(keys)}" for reason, keys in self.left_out.items()]
        lines += [f"padded: {entry}" for entry in self.padded]
        lines += [f"kept as it was, not in the checkpoint: {part}" for part in self.kept]
        return "\n".join(lines)


def checkpoint_files(path: str | Path) -> list[Path]:
    """All weight files of a checkpoint in one of these layouts:

    a file; `pytorch_model_fp32/` or `pytorch_model_fp32.bin/` (sharded, with index or without) in the folder or as the
    folder; `*.safetensors` or `*.bin` in the folder; accelerate's `step_N/`. Raises ValueError for a missing shard, for
    a choice to make, and for DeepSpeed's own shards, which its script merges first.
    """
    path = Path(path).expanduser()
    for name in MERGED_FOLDERS:
        if (path / name).exists():
            return weight_files(path / name)
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("pytorch_model*.bin"))
        shards = list(path.glob("**/*zero_pp_rank_*_states.pt")) + list(path.glob("**/mp_rank_*_model_states.pt"))
        if shards and not has_weights:
            raise ValueError(
                f"{path}: holds DeepSpeed's own shards ({shards[0].relative_to(path)}, ...); merge them with "
                f"`python {path / 'zero_to_fp32.py'} {path} {path / MERGED_FOLDERS[0]}` and import that"
            )
        steps = sorted(path.glob("step_*"))
        if steps and not has_weights and not any(path.glob("*.bin")):
            raise ValueError(f"{path}: several checkpoints, name one: {', '.join(step.name for step in steps)}")
    return weight_files(path)


def import_checkpoint(model: RoomPlanVLM, path: str | Path, parts: Sequence[str] | None = None) -> ImportReport:
    """Loads a checkpoint into `model` in place, all of it or nothing, and returns what became of each key; print it.

    parts: names of our parts to import (see `RoomPlanVLM.parts`); None = every part that the checkpoint holds. Parts
    that it does not hold stay as they are. vggt-qwen3's projector needs the resampler preset `perceiver_small`.
    Pickles are read with `weights_only`. Raises ValueError for layouts as `checkpoint_files` and for every key that is
    missing from a part, unexpected or misshapen.
    """
    known = model.parts()
    wrong = [part for part in parts or () if part not in known]
    if wrong:
        raise ValueError(f"parts: unknown {wrong}; this model has {', '.join(known)}")
    report = ImportReport(checkpoint_files(path))
    weights: dict[str, Tensor] = {}
    for file in report.files:
        shard = unwrapped(read_weights(file))
        twice = [key for key in shard if key in weights]
        if twice:
            raise ValueError(f"{file}: {_listed(twice)} are in another shard already")
        weights |= shard

    state = model.state_dict()
    lora_names = {key.replace(".base_layer.", "."): key for key in state}
    chosen: dict[str, Tensor] = {}
    given: set[int] = set()  # where its tensors go; tied weights may be there under one name only
    unexpected, misshapen = [], []
    for key, value in weights.items():
        reason = next((why for prefix, why in LEFT_OUT.items() if key.startswith(f"{prefix}.")), None)
        first, _, rest = key.partition(".")
        part = PARTS.get(first, first)
        if reason is None and parts is not None and part in known and part not in parts:
            reason = f"{part} is not among the parts to import"
        if reason is None and part == "encoder" and re.match(r"(camera|depth|point|track)_head\.", rest):
            if f"encoder.{rest}" not in state:
                reason = "a head that this encoder does not build"
        if reason is not None:
            report.left_out.setdefault(reason, []).append(key)
            continue
        target = lora_names.get(f"{part}.{rest}")
        if target is None or not isinstance(value, Tensor):
            unexpected.append(key)
            continue
        given.add(state[target].data_ptr())
        expected = state[target].shape
        if value.shape != expected:
            fewer_rows = value.shape[1:] == expected[1:] and len(value) < expected[0]
            if not (fewer_rows and target.endswith(("embed_tokens.weight", "lm_head.weight"))):
                misshapen.append(f"{key} (expected {list(expected)}, got {list(value.shape)})")
                continue
            report.padded.append(f"{target}: {len(value)} of {expected[0]} rows, the rest are kept")
        chosen[target] = value

    held = {key.split(".", 1)[0] for key in chosen}
    report.kept = [part for part in known if part not in held]
    missing = [
        key
        for key, value in state.items()
        if key.split(".", 1)[0] in held and value.data_ptr() not in given and "lora_" not in key
    ]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(problems.values()) or not chosen:
        listed = "; ".join(f"{len(keys)} {kind}: {_listed(keys)}" for kind, keys in problems.items() if keys)
        hint = ""
        if any(key.startswith("projector.") for key in unexpected):
            hint = (
                ". vggt-qwen3's projector needs RESAMPLER_PRESETS['perceiver_small'] as model.resampler, or leave it "
                "out with parts=('encoder', 'language_model')"
            )
        raise ValueError(f"{path}: does not fit this model. {listed or 'None of its keys is known'}{hint}")
    with torch.no_grad():
        for key, value in chosen.items():
            state[key][: len(value)].copy_(value) if value.ndim else state[key].copy_(value)
    for part in held:
        model.config.references.pop(part, None)  # no longer the weights that the reference names
    report.loaded = sorted(chosen)
    return report


def _listed(keys: Sequence[str]) -> str:
    more = f", ... and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
