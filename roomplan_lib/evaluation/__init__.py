"""Predictions, scores and their controls."""

from pathlib import Path

# What the model is shown: its own views, no views, another scene's views.
CONTROLS = ("model", "blind", "shuffled")


def predictions_file(run_dir: Path, control: str = "model") -> Path:
    """Where a run keeps its predictions under one control."""
    return run_dir / ("predictions.jsonl" if control == "model" else f"predictions_{control}.jsonl")
