"""Predictions, scores and their controls."""

import json
from pathlib import Path

# What the model is shown: the sample's views, no views, another scene's views, the first of the sample's views alone.
CONTROLS = ("model", "blind", "shuffled", "one_view")


def predictions_file(folder: Path, control: str = "model") -> Path:
    """Where a folder keeps the predictions of one control."""
    return folder / ("predictions.jsonl" if control == "model" else f"predictions_{control}.jsonl")


def manifest_file(path: Path) -> Path:
    """The manifest beside a predictions file: {"sha256": of the file, "made_from": weights, samples, settings}."""
    return path.with_suffix(".manifest.json")


def read_manifest(path: Path) -> dict | None:
    """The manifest of a predictions file; None where the file or its manifest is not there."""
    manifest = manifest_file(path)
    return json.loads(manifest.read_text()) if path.is_file() and manifest.is_file() else None
