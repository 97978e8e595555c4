"""Reading VGGT's weights. What does not fit is an error that names the keys; code in a file never runs."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from roomplan_lib.model.vggt.config import HEAD_NAMES, VGGTConfig
from roomplan_lib.model.vggt.model import VGGT

_WRAPPERS = ("model", "state_dict")
_LISTED = 20  # keys per kind in an error message
# Of Trainer and accelerate; they lie beside weights and end as weights do.
_TRAINING_STATE = {f"{name}.{end}" for name in ("optimizer", "scheduler", "scaler") for end in ("bin", "pt")}
_TRAINING_STATE |= {"training_args.bin", "rng_state.pth"}
_log = logging.getLogger(__name__)


def unwrapped(state_dict: Mapping) -> dict:
    """The flat mapping inside {"model": ...} and {"state_dict": ...}, without the "module." of wrapped training."""
    while inner := next((name for name in _WRAPPERS if isinstance(state_dict.get(name), Mapping)), None):
        state_dict = state_dict[inner]
    if state_dict and all(str(key).startswith("module.") for key in state_dict):
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return dict(state_dict)


def load_vggt_state_dict(model: VGGT, state_dict: Mapping) -> list[str]:
    """Loads weights into `model`, all of them or none; returns the names of the checkpoint's heads that were left out.

    state_dict: key -> tensor, as it is or inside {"model": ...} or {"state_dict": ...}, with or without "module.".
    Left out are the track head, which is never built, and heads that the model's config disables. Weights take the
    model's dtype and device, unless the model is on the meta device: it then takes theirs.
    Raises ValueError that lists every other missing, unexpected or misshapen key.
    """
    weights, expected = unwrapped(state_dict), model.state_dict()
    absent = ["track_head", *(f"{name}_head" for name in HEAD_NAMES if name not in model.config.heads)]
    ignored = sorted({name for name in absent for key in weights if str(key).startswith(f"{name}.")})
    weights = {key: value for key, value in weights.items() if str(key).split(".", 1)[0] not in ignored}

    def shape(value) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    problems = {
        "missing": [key for key in expected if key not in weights],
        "unexpected": [str(key) for key in weights if key not in expected],
        "misshapen": [
            f"{key} (expected {shape(expected[key])}, got {shape(value)})"
            for key, value in weights.items()
            if key in expected and shape(value) != shape(expected[key])
        ],
    }
    if any(problems.values()):
        lines = []
        for kind, keys in problems.items():
            if keys:
                more = f", ... and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
                lines.append(f"{len(keys)} {kind}: {', '.join(keys[:_LISTED])}{more}")
        raise ValueError("weights do not fit this VGGT's config. " + "; ".join(lines))
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(weights, assign=on_meta)
    if ignored:
        _log.info("VGGT weights: left out %s, which this model does not build", ", ".join(ignored))
    return ignored


def weight_files(path: Path) -> list[Path]:
    """The files that hold the weights behind `path`: a file, an index of shards, or a folder (safetensors first).

    Raises ValueError when there are none, when a shard is missing, and for a folder that leaves a choice.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; weights are expected there, download them first")
    if path.is_dir():
        for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.pt", "*.pth", "*.bin"):
            found = sorted(file for file in path.glob(pattern) if file.name not in _TRAINING_STATE)
            if _is_shard_set(found):
                return found
            if len(found) > 1:
                raise ValueError(f"{path}: several weight files, name one: {', '.join(file.name for file in found)}")
            if found:
                path = found[0]
                break
        else:
            raise ValueError(f"{path}: expected a .safetensors file (or its .index.json), .pt, .pth or .bin in it")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        entries = json.loads(path.read_text())["weight_map"].values()
        # vggt-qwen3 reads its own indices as {key: {"filename": ...}}; everybody else writes {key: filename}.
        names = sorted({entry["filename"] if isinstance(entry, dict) else entry for entry in entries})
        shards = [path.parent / name for name in names]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected an index of shards with a weight_map") from error
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ValueError(f"{path}: shards missing beside the index: {', '.join(missing) or 'it names none'}")
    return shards


def _is_shard_set(files: list[Path]) -> bool:
    """Whether the files are shards of one checkpoint, as `x-00001-of-00002.bin`; ValueError if one is missing."""
    numbers = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.\w+", file.name) for file in files]
    if not files or not all(numbers) or len({(match[1], match[3]) for match in numbers}) > 1:
        return False
    missing = set(range(1, int(numbers[0][3]) + 1)) - {int(match[2]) for match in numbers}
    if missing:
        raise ValueError(f"{files[0].parent}: of {numbers[0][3]} shards, number {sorted(missing)} is missing")
    return True


def read_weights(path: Path) -> dict:
    """Contents of one weight file, mapped from disk where the format allows it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in (".pt", ".pth", ".bin"):
            raise ValueError(f"{path}: expected .safetensors, .pt, .pth or .bin")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a file of plain weights (damaged, or a pickle with code in it, which is never run); "
            f"fetch it again or convert it to .safetensors. {error}"
        ) from error
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: expected a mapping from key to tensor, got {type(contents).__name__}")
    return contents


def _config_beside(path: Path) -> VGGTConfig:
    """config.json of the weights' folder; VGGT-1B, which is published without one of ours, when there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return VGGTConfig()
    values = json.loads(file.read_text())
    values.pop("enable_track", None)  # in the published constructor's arguments; the track head is never built
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(VGGTConfig)})
    if unknown:
        raise ValueError(f"{file}: unknown keys {', '.join(unknown)}; pass a VGGTConfig to load these weights")
    try:
        return VGGTConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_vggt(path: str | Path, config: VGGTConfig | None = None) -> VGGT:
    """A VGGT with the weights at `path`, on the CPU, in their dtype, in eval mode.

    path: .safetensors, its .safetensors.index.json, .pt, .pth or .bin, or a folder that holds one of them.
    config: None = the config.json beside the weights, or `VGGTConfig()` (VGGT-1B) where there is none.
    Raises ValueError for a missing or damaged file and for weights that do not fit the config, listing the keys.
    """
    path = Path(path)
    weights: dict = {}
    for file in weight_files(path):
        weights |= read_weights(file)
    with torch.device("meta"):
        model = VGGT(_config_beside(path) if config is None else config)
    try:
        load_vggt_state_dict(model, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval()
