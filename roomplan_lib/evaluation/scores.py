"""Scores of predictions, always beside their controls."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from roomplan_lib.actions import ActionError, PlaceAnchor, anchor_from_box, format_action, parse_action
from roomplan_lib.config import RunConfig
from roomplan_lib.evaluation import CONTROLS, predictions_file, read_manifest
from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox, box_iou_3d, rotation_z
from roomplan_lib.samples import read_samples
from roomplan_lib.samples.targets import reference_action

PROTOCOLS = {
    "anchors": "place-anchor-1: one upright box per instruction, metres; invalid text has IoU 0 and no centre error",
    "qa": "exact-match-1: equal after lower-casing, trimming, dropping articles and end punctuation",
}
NUM_BOOTSTRAP = 1000


def score_run(config: RunConfig, folder: Path | None = None) -> dict:
    """Scores of prediction files and of two controls made from the run's training answers; writes scores.json.

    folder: where the predictions are, the run's own for None; scores.json goes there too.
    anchors: model, blind, shuffled, and constant (the median training box of the category asked for, reference frame).
    qa: model, blind, shuffled, and majority (the most frequent training answer to that kind of question).
    made_from: weights, samples and settings of the predictions. Raises ValueError when there is no predictions.jsonl,
    or when its controls were made from other weights, samples or settings.
    """
    folder = folder or config.run_dir
    files = {name: predictions_file(folder, name) for name in CONTROLS}
    if not files["model"].is_file():
        others = sorted(str(path.parent) for path in (config.run_dir / "predictions").glob("*/predictions.jsonl"))
        advice = f"; there are predictions in {', '.join(others)}" if others else ""
        raise ValueError(f"{files['model']} is missing; predict the run first{advice}")
    manifests = {name: read_manifest(path) for name, path in files.items() if path.is_file()}
    made_from = {name: manifest and manifest["made_from"] for name, manifest in manifests.items()}
    for name in made_from:
        if made_from[name] != made_from["model"]:
            raise ValueError(
                f"{files[name]} was made from other weights or settings than {files['model']}; predict again"
            )
    rows = {name: read_predictions(files[name]) for name in manifests}
    train = [record for file in config.data.train_paths for record in read_samples(file)]
    anchors = {name: [r for r in part if "reference_action" in r] for name, part in rows.items()}
    answers = {name: [r for r in part if "reference_action" not in r] for name, part in rows.items()}
    anchors["constant"] = constant_predictions(train, anchors["model"])
    answers["majority"] = majority_predictions(train, answers["model"])
    scores = {
        "anchors": {name: score_anchors(part) for name, part in anchors.items() if part},
        "qa": {name: score_answers(part) for name, part in answers.items() if part},
        "protocols": PROTOCOLS,
        "made_from": made_from["model"],
    }
    write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    return scores


def read_predictions(path: str | Path) -> list[dict]:
    """Rows of a predictions file. Raises ValueError with file and line for one that is cut off or lacks a key."""
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            missing = {"scene_id", "question", "prediction", "reference"} - set(row)
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no prediction ({error}); predict again") from None
        if missing:
            raise ValueError(f"{path}:{number}: keys {sorted(missing)} are missing")
        rows.append(row)
    return rows


def anchor_error(prediction: str, reference: str) -> dict:
    """center_error_m (None for an invalid prediction), iou_3d and valid of one anchor; texts of one frame."""
    action, truth = parse_action(prediction), parse_action(reference)
    if isinstance(truth, ActionError):
        raise ValueError(f"reference {reference!r:.120} is no action: {truth.reason}")
    if isinstance(action, ActionError):
        return {"center_error_m": None, "iou_3d": 0.0, "valid": False}
    return {
        "center_error_m": float(np.linalg.norm(np.subtract(action.center, truth.center))),
        "iou_3d": box_iou_3d(action.to_box(), truth.to_box()),
        "valid": True,
    }


def score_anchors(rows: list[dict]) -> dict:
    """median_center_error_m over valid predictions (None without any), mean_iou_3d, acc_iou25 and valid_json_rate over
    all, num_samples; `ci95` holds bootstrap intervals over scenes."""
    errors = [anchor_error(row["prediction"], row["reference"]) for row in rows]
    scenes = [row["scene_id"] for row in rows]

    def median(part: list[dict]) -> float | None:
        valid = [e["center_error_m"] for e in part if e["valid"]]
        return float(np.median(valid)) if valid else None

    measures = {
        "median_center_error_m": median,
        "mean_iou_3d": lambda part: float(np.mean([e["iou_3d"] for e in part])),
        "acc_iou25": lambda part: float(np.mean([e["iou_3d"] >= 0.25 for e in part])),
        "valid_json_rate": lambda part: float(np.mean([e["valid"] for e in part])),
    }
    return _with_intervals(measures, errors, scenes)


def score_answers(rows: list[dict]) -> dict:
    """em over all rows and per task, num_samples; `ci95` holds bootstrap intervals over scenes."""
    hits = [exact_match(row["prediction"], [row["reference"]]) for row in rows]
    by_task: dict[str, list[bool]] = defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        by_task[row.get("task", "qa")].append(hit)
    score = _with_intervals({"em": lambda part: float(np.mean(part))}, hits, [row["scene_id"] for row in rows])
    return score | {"em_by_task": {task: float(np.mean(part)) for task, part in sorted(by_task.items())}}


def exact_match(prediction: str, references: list[str]) -> bool:
    """Whether the normalised prediction equals a normalised reference; an empty prediction never does."""
    text = normalise_answer(prediction)
    return bool(text) and any(text == normalise_answer(reference) for reference in references)


def normalise_answer(text: str) -> str:
    """Lower case, without articles, end punctuation and doubled spaces."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.lower())
    return " ".join(text.split()).strip(" .,!?")


def constant_predictions(train: list[dict], rows: list[dict]) -> list[dict]:
    """`rows` answered with the median training box of the category asked for, or of all where it is unseen."""
    boxes: dict[str, list[OrientedBox]] = defaultdict(list)
    for record in train:
        if "action_json" in record:
            box = reference_action(record).to_box()
            boxes[box.label].append(box)
    if not boxes:
        return []
    medians = {label: _median_anchor(part) for label, part in boxes.items()}
    overall = _median_anchor([box for part in boxes.values() for box in part])
    return [
        row | {"prediction": format_action(medians.get(row["reference_action"]["category"], overall))} for row in rows
    ]


def majority_predictions(train: list[dict], rows: list[dict]) -> list[dict]:
    """`rows` answered with the most frequent training answer of their task, or of all where the task is unseen."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for record in train:
        if "answer" in record:
            counts[record["task"]][record["answer"]] += 1
    if not counts:
        return []
    overall = sum(counts.values(), Counter())
    return [row | {"prediction": counts.get(row.get("task"), overall).most_common(1)[0][0]} for row in rows]


def _median_anchor(boxes: list[OrientedBox]) -> PlaceAnchor:
    doubled = np.exp(2j * np.array([box.yaw for box in boxes])).mean()  # a box looks the same after half a turn
    center, extent = (np.median([getattr(box, name) for box in boxes], axis=0) for name in ("center", "extent"))
    return anchor_from_box(OrientedBox(center, extent, rotation_z(np.angle(doubled) / 2), boxes[0].label))


def _with_intervals(measures: dict[str, Callable], values: list, scenes: list[str]) -> dict:
    """Each measure over all values, and its 95 % interval when scenes are drawn with replacement (fixed seed)."""
    by_scene: dict[str, list] = defaultdict(list)
    for scene, value in zip(scenes, values, strict=True):
        by_scene[scene].append(value)
    groups = list(by_scene.values())
    rng = np.random.default_rng(0)
    draws = defaultdict(list)
    for _ in range(NUM_BOOTSTRAP):
        part = [value for i in rng.integers(len(groups), size=len(groups)) for value in groups[i]]
        for name, measure in measures.items():
            result = measure(part)
            if result is not None:
                draws[name].append(result)
    intervals = {name: np.quantile(d, [0.025, 0.975]).tolist() for name, d in draws.items()}
    return {
        **{name: measure(values) for name, measure in measures.items()},
        "num_samples": len(values),
        "num_scenes": len(groups),
        "ci95": intervals,
    }
