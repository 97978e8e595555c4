"""Pretrained parts: by file, folder or hub id, with a record that proves later that they are still the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, PreTrainedModel

from roomplan_lib.files import file_hash
from roomplan_lib.model.vggt import VGGT, VGGTConfig, load_vggt
from roomplan_lib.model.vggt.checkpoint import weight_files

# Models that come with the package: by their names alone.
SHIPPED = {"roomplan-tiny": Path(__file__).resolve().parents[1] / "weights" / "roomplan-tiny"}
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.json")
TOKENIZER = ("*.json", "merges.txt", "*.jinja")


def find_source(source: str, setting: str, patterns: Sequence[str] = WEIGHTS, revision: str | None = None) -> Path:
    """The file or folder that `source` names: a path, a model of `SHIPPED`, or a hub id whose files (`patterns`) are
    cached or downloaded.

    A cached repository is used without a network. Raises ValueError that starts with `setting` and says what is
    missing and how to get it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source in SHIPPED:
        return SHIPPED[source]
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith((".pt", ".pth", ".bin", ".safetensors")):
        raise ValueError(f"{setting}: {source}: no such file or folder")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise ValueError(
            f"{setting}: {source} is given out only after its form at https://huggingface.co/{source} is accepted; "
            f"do that, run `hf auth login`, then `hf download {source}` ({error})"
        ) from None
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub does not give it ({reason})"
        raise ValueError(
            f"{setting}: {source}{f' (revision {revision})' if revision else ''} is neither a path here nor in the "
            f"cache {constants.HF_HUB_CACHE}, and {why}. Where there is a network run `hf download {source}` and, for "
            "another machine, copy that cache (or name it with HF_HUB_CACHE), or set this to a folder with the files"
        ) from None


def load_language_model(
    source: str, dtype: torch.dtype, setting: str = "model.language_model.name", revision: str | None = None
) -> tuple[PreTrainedModel, Path]:
    """The causal language model at a folder or hub id, in `dtype`, and the folder.

    Raises ValueError for missing files and for missing, unexpected or misshapen keys, which it lists.
    """
    folder = find_source(source, setting, revision=revision)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{setting}: {folder} holds no config.json; expected the folder of a language model")
    try:
        weight_files(folder)  # a partial download is an error here, with the names of its missing shards
    except ValueError as error:
        raise ValueError(f"{setting}: {error}; fetch {source} again") from None
    try:
        model, keys = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"{setting}: {folder}: {error}") from error
    problems = {kind: sorted(map(str, keys[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names[:20])}" for kind, names in problems.items() if names)
        raise ValueError(f"{setting}: {folder}: weights do not fit the config. {listed}")
    return model, folder


def load_encoder(
    source: str, config: VGGTConfig, setting: str = "model.vggt_weights", revision: str | None = None
) -> tuple[VGGT, Path]:
    """VGGT with the weights at a file, folder or hub id, and where they were found. ValueError as `load_vggt`."""
    path = find_source(source, setting, revision=revision)
    if path.is_dir() and str(path) != str(Path(source).expanduser()) and not list(path.glob("*.safetensors*")):
        path = find_source(source, setting, ("*.pt",), revision)  # VGGT-1B-Commercial is published as a .pt
    return load_vggt(path, config), path


def reference_to(source: str, path: Path) -> dict:
    """What a model folder says of a part that it does not hold: source, hub revision, sha256 per weight file."""
    is_path = Path(source).expanduser().exists()
    return {
        "source": str(Path(source).expanduser().absolute()) if is_path else source,
        "revision": None if is_path else path.name,
        "sha256": {file.name: file_hash(file) for file in weight_files(path)},
    }


def check_reference(part: str, reference: Mapping, path: Path, keyword: str) -> None:
    """ValueError unless the weight files at `path` are those of the reference, naming the ones that differ."""
    found = {file.name: file_hash(file) for file in weight_files(path)}
    if sorted(found.values()) == sorted(reference["sha256"].values()):
        return  # a renamed file holds the same weights
    expected = reference["sha256"]
    different = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
    raise ValueError(
        f"{path}: not the weights that this model was trained on for its {part} (sha256 differs for "
        f"{', '.join(different)}; expected {json.dumps(dict(expected))}); get {reference['source']}"
        f"{' at revision ' + reference['revision'] if reference['revision'] else ''}, or say where they are with "
        f"from_pretrained(folder, {keyword}=...)"
    )
