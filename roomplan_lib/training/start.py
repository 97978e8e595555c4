"""Starting a run from what a former run has learned."""

from __future__ import annotations

from pathlib import Path

import torch

from roomplan_lib.config import ModelConfig, RunConfig, parse, to_dict
from roomplan_lib.model.pretrained import SHIPPED
from roomplan_lib.model.vlm import RoomPlanConfig, RoomPlanVLM
from roomplan_lib.training.checkpoint import load_tensors

LISTED = 20  # keys in an error message
# Fields of the language model's own config that say what its weights mean.
LANGUAGE_MODEL = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def start_folder(config: RunConfig) -> Path:
    """The model folder that `training.start_from` means, looked for below runs_dir and from here: a run's, or itself a
    model folder or checkpoint; where nothing is there, the model of that name that comes with the package. ValueError
    when there is no trained model."""
    name = config.training.start_from
    tried = [Path(config.runs_dir) / Path(name).expanduser(), Path(name).expanduser()]
    if name in SHIPPED and not any(folder.exists() for folder in tried):
        return SHIPPED[name]
    for folder in tried:
        for candidate in (folder / "model", folder):
            if (candidate / "model.safetensors").is_file():
                return candidate
    if any((folder / "run.yaml").is_file() for folder in tried):
        raise ValueError(
            f"training.start_from: the run {name} is not finished: it has no model folder; finish it, or name one of "
            "its checkpoints"
        )
    raise ValueError(f"training.start_from: {name}: no run, model folder or checkpoint is there")


def load_start(model: RoomPlanVLM, folder: Path) -> None:
    """Loads the trained weights of a former run's model folder into `model`, part by part.

    A part that the former run did not have (3D positions, LoRA adapters) stays as it is, which is printed. Raises
    ValueError, with nothing loaded, for a part whose settings or weights differ, or that the former run alone has.
    """
    config = RoomPlanConfig.from_pretrained(folder)
    former = parse(ModelConfig, config.model, f"{folder / 'config.json'}: model")
    differences = _differences(to_dict(former), to_dict(model.settings), config, model)
    if differences:
        raise ValueError(f"training.start_from: {folder} was trained with other settings: {'; '.join(differences)}")
    weights = load_tensors(folder, "model.safetensors")
    state = {_plain(key): (key, value) for key, value in model.state_dict().items()}
    given = {_plain(key): value for key, value in weights.items()}
    places = {value.data_ptr() for key, (_, value) in state.items() if key in given}  # tied weights are there once
    parts = {_part(key) for key in given}
    wanted = {_plain(key): value for key, value in model.stored_state().items()}
    fresh = sorted({_part(key) for key in wanted} - parts)
    problems = [
        f"{key} is not in it"
        for key, value in wanted.items()
        if _part(key) in parts and key not in given and value.data_ptr() not in places
    ]
    problems += [f"{key} is in it alone" for key in given if key not in state]
    problems += [
        f"{key} has shape {list(value.shape)} there, {list(state[key][1].shape)} here"
        for key, value in given.items()
        if key in state and state[key][1].shape != value.shape
    ]
    problems += [
        f"{part} is in it with other weights than those of {reference['source']}; name no pretrained weights for it"
        for part, reference in model.config.references.items()
        if any(
            not torch.equal(state[key][1].to(value.device, value.dtype), value)
            for key, value in given.items()
            if _part(key) == part and key in state and state[key][1].shape == value.shape
        )
    ]
    if problems:
        more = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"training.start_from: {folder} does not fit: {'; '.join(problems[:LISTED])}{more}")
    model.load_state_dict({state[key][0]: value for key, value in given.items()}, strict=False)
    print(f"starts from {folder}: {', '.join(sorted(parts))}" + (f"; new: {', '.join(fresh)}" if fresh else ""))


def _plain(key: str) -> str:
    """The same name for a weight with and without an adapter beside it."""
    return key.replace(".base_layer.", ".")


def _part(key: str) -> str:
    return "LoRA adapters" if "lora_" in key else key.split(".", 1)[0]


def _shaping(settings):
    """Settings of a part less what no weight depends on: a spatial resampler pools into any number of places."""
    if isinstance(settings, dict) and settings.get("kind") == "spatial":
        return {key: value for key, value in settings.items() if key != "num_latents"}
    return settings


def _differences(former: dict, here: dict, config: RoomPlanConfig, model: RoomPlanVLM) -> list[str]:
    """Settings of parts that both models have and that differ, and frozen parts that have other pretrained weights."""
    found = []
    same = ["vggt", "tap_layers", "resampler", "geometry"]
    if former["positions"]["method"] != "base":  # a model without them may get some
        same.append("positions")
    found += [
        f"model.{key}: {former[key]} there, {here[key]} here"
        for key in same
        if _shaping(former[key]) != _shaping(here[key])
    ]
    lora, own = former["language_model"]["lora"], here["language_model"]["lora"]
    if lora is not None and lora != own:
        found.append(f"model.language_model.lora: {lora} there, {own} here")
    there, own = config.language_model, model.config.language_model
    found += [
        f"the language model's {key}: {there.get(key)} there, {own.get(key)} here"
        for key in LANGUAGE_MODEL
        if there.get(key) != own.get(key)
    ]
    for part, reference in config.references.items():
        other = model.config.references.get(part)
        if other is None or sorted(other["sha256"].values()) != sorted(reference["sha256"].values()):
            found.append(f"{part}: trained on the pretrained weights of {reference['source']}, here others")
    return found
