"""Checkpoints: all that a run needs to go on as if it had never stopped, whole or not there at all.

A checkpoint is the model folder of its step (weights that are trained, config, tokenizer) and beside it
optimizer.safetensors (AdamW's moments by the weights' names), random.safetensors (the state of every process's
generators) and state.json, written last, with the step, the curve's loose ends, the size and sha256 of each file, and a
sha256 of itself.
Nothing in it depends on how many processes wrote it or how they shared the weights.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roomplan_lib.files import file_hash, flush_to_disk, write_whole
from roomplan_lib.model.vggt import VGGT
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.training.processes import Processes

STATE = "state.json"  # the last file that a checkpoint gets
OPTIMIZER, RANDOM = "optimizer.safetensors", "random.safetensors"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    named = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    found = [path for path in named if (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json once every file has its recorded size and sha256; ValueError names one that has not.

    Keys: step, world_size, strategy, global_batch_size, curve and to_evaluate (see `RoomPlanTrainer`), files.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text())
        sha256 = state.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / STATE}: damaged or cut off: {error}") from None
    if _digest(state) != sha256:
        raise ValueError(f"{checkpoint / STATE}: damaged: its sha256 is not the one that it was written with")
    for name, recorded in state["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        if (size := file.stat().st_size) != recorded["bytes"]:
            raise ValueError(f"{file}: damaged: {size} bytes, written with {recorded['bytes']}")
        if file_hash(file) != recorded["sha256"]:
            raise ValueError(f"{file}: damaged: its sha256 is not the one that it was written with")
    return state


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest undamaged checkpoint and its state, None when there is none at all.

    Damaged ones after it are renamed to damaged-<name>, which is printed. ValueError, again at every start, when all of
    them are damaged: starting again from nothing is for a person to decide.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            state = read_state(checkpoint)
        except ValueError as error:
            damaged[checkpoint] = str(error)
            continue
        for other, reason in damaged.items():
            aside = other.with_name(f"damaged-{other.name}")
            shutil.rmtree(aside, ignore_errors=True)
            other.rename(aside)
            print(f"warning: {reason}; {other.name} is set aside as {aside.name}", flush=True)
        return checkpoint, state
    if damaged:
        reasons = "; ".join(damaged.values())
        raise ValueError(f"every checkpoint is damaged ({reasons}); delete {folder} to train from the start")
    return None


def save_checkpoint(
    folder: Path,
    model: RoomPlanVLM | VGGT,
    tokenizer: PreTrainedTokenizerBase | None,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    random: Mapping[str, Tensor],
    state: dict,
    keep: int,
) -> Path:
    """Writes checkpoint-<step> under a temporary name, completes and renames it, then drops all but the newest `keep`.

    Raises OSError, with the older ones as they were, when it cannot be written; nothing of it is left on the disk then,
    unless all but its name came there.
    """
    final = folder / f"checkpoint-{state['step']}"
    staging = folder / f".{final.name}.partial"
    clear_partial(folder)
    try:
        model.save_pretrained(staging, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        save_file(dict(moments), staging / OPTIMIZER)
        save_file(dict(random), staging / RANDOM)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(staging.iterdir())
        }
        written = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        state = state | {"written": written, "files": files}
        write_whole(staging / STATE, json.dumps(state | {"sha256": _digest(state)}, indent=1) + "\n")
        flush_to_disk(*staging.iterdir(), staging)  # before older ones go
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
    except Exception as error:
        if not _is_of_disk(error):
            raise
        older = list_checkpoints(folder)
        left = f"{older[-1].name} is whole, and the run goes on from it" if older else "the run begins again"
        raise OSError(
            f"{final} could not be written ({_reason(error)}). Free space on that disk, or ask for fewer with "
            f"training.keep_checkpoints, and start the run again: {left}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    flush_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        old.rename(folder / f".{old.name}.partial")  # a kill between two of its files must not leave half of it
    clear_partial(folder)
    return final


def clear_partial(folder: Path) -> None:
    """Removes what processes that were killed while they wrote or deleted a checkpoint have left."""
    for left in folder.glob(".checkpoint-*.partial"):
        shutil.rmtree(left)


def _digest(state: dict) -> str:
    """sha256 of what state.json holds beside it."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _is_of_disk(error: Exception) -> bool:
    """Whether a file could not be written; tokenizers says so by a plain Exception."""
    return isinstance(error, (OSError, SafetensorError)) or (type(error) is Exception and "os error" in str(error))


def _reason(error: Exception) -> str:
    if isinstance(error, shutil.Error):  # of copytree: source, destination and reason of each file
        return error.args[0][0][2]
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]


def load_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files, on the host. ValueError for a damaged file."""
    try:
        return load_file(checkpoint / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{checkpoint / name}: damaged or cut off: {error}") from None


def random_state(processes: Processes) -> dict[str, Tensor]:
    """The state of every process's generators: "<rank>.cpu" and "<rank>.cuda"."""
    own = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(processes.device)
    return {f"{rank}.{kind}": t for rank, states in enumerate(processes.gather(own)) for kind, t in states.items()}


def restore_random_state(states: Mapping[str, Tensor], processes: Processes) -> None:
    """This process's generators as they were; one that was not there when they were kept stays as it was seeded."""
    if f"{processes.rank}.cpu" in states:
        torch.set_rng_state(states[f"{processes.rank}.cpu"])
    if processes.device.type == "cuda" and f"{processes.rank}.cuda" in states:
        torch.cuda.set_rng_state(states[f"{processes.rank}.cuda"], processes.device)


def copy_model_folder(checkpoint: Path, folder: Path) -> None:
    """The checkpoint's model folder as `folder`, whole or not at all. Raises OSError when it cannot be written."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed here
    try:
        shutil.copytree(checkpoint, staging, ignore=shutil.ignore_patterns(OPTIMIZER, RANDOM, STATE))
        flush_to_disk(*staging.iterdir(), staging)
        staging.rename(folder)
        flush_to_disk(folder.parent)
    except OSError as error:
        raise OSError(
            f"{folder} could not be written ({_reason(error)}). Free space on that disk and start the run again: it is "
            f"trained, and {checkpoint.name} is whole"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
