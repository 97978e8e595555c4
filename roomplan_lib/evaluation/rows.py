"""The rows of predictions files, and the files of an answerer that never looks: constant boxes, majority answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from roomplan_lib.actions import (
    ActionError,
    PlaceAnchor,
    action_record,
    format_action,
    parse_action,
)
from roomplan_lib.config import load_run_config
from roomplan_lib.evaluation import CONTROLS, manifest_file, predictions_file, read_manifest
from roomplan_lib.evaluation.baselines import TrainingAnswers
from roomplan_lib.evaluation.scores import read_predictions, score_predictions
from roomplan_lib.files import file_hash, write_whole
from roomplan_lib.geometry import invert_pose
from roomplan_lib.samples import read_samples, sample_root
from roomplan_lib.samples.targets import (
    question_text,
    reference_action,
    response_text,
    sample_world_to_reference,
    scene_action,
)
from roomplan_lib.scenes import CATEGORIES, Scene, arkitscenes, open_scene, scannet

KEPT_KEYS = (
    "situation", "answers", "question_id", "source", "split", "question_type", "eval_type", "protocol", "object_ids",
)  # fmt: skip
BASELINE = "constant and majority of the training samples"


def prediction_row(index: int, record: dict, text: str, codec: str, categories: Collection[str]) -> dict:
    """One row of a predictions file: what `record` asks, what was answered (`text`) and what should have been.

    index: the row's place in the file. prediction, reference: texts, of actions in the reference frame; reference is ""
    where a test hides it. action (None, and an `error`, for text that is none), reference_action: in the scene's frame.
    categories: what an action may name.
    """
    row = {
        "index": index,
        "scene_id": record["scene_id"],
        "task": record["task"],
        "question": question_text(record, codec=codec),
        "prediction": text,
        "reference": "" if record.get("answers") == [] else response_text(record, codec=codec),
    }
    row |= {key: record[key] for key in KEPT_KEYS if record.get(key) is not None}
    if "action_json" in record:
        action = parse_action(text, categories, codec)
        if isinstance(action, ActionError):
            row |= {"action": None, "error": action.reason}
        else:
            reference_to_world = invert_pose(sample_world_to_reference(record))
            row["action"] = action_record(action.transformed(reference_to_world).bound(record["scene_id"]))
        row["reference_action"] = action_record(scene_action(record))
        row |= {} if codec == "m2" else {"codec": codec}
    return row | {"view_ids": record.get("view_ids")}


def baseline_predictions(files: Sequence[str | Path], output: str | Path, codec: str = "m2") -> Path:
    """A predictions file of the answers that are the same whatever the room: the least that a model must beat.

    files: samples; those of split train are what is known, all others are answered: anchors by the median box of their
    category, plans by the median room (`TrainingAnswers.constant`), questions by the commonest answer of their task.
    What training has nothing for is answered by "". output: predictions.jsonl, written whole with its manifest, or
    reused where it was made from the same samples. No model, no torch.
    Raises ValueError for files that are not there and where one of the two sides is empty.
    """
    output = Path(output)
    files = [Path(file) for file in files]
    if missing := [file for file in files if not file.is_file()]:
        raise ValueError(f"{missing[0]}: no such file of samples; prepare it first (notebooks/00_prepare_data.ipynb)")
    made_from = {"baseline": BASELINE, "samples": [[str(file), file_hash(file)] for file in files], "codec": codec}
    manifest = read_manifest(output)
    if manifest and manifest == {"sha256": file_hash(output), "made_from": made_from}:
        return output
    records = [record for file in files for record in read_samples(file)]
    train = [record for record in records if record.get("split") == "train"]
    asked = [r for r in records if r.get("split") != "train" and ("answer" in r or "action_json" in r)]
    if not train or not asked:
        raise ValueError(
            f"{', '.join(map(str, files)) or 'no files'}: {len(train)} training samples and {len(asked)} others with a "
            "target; a baseline needs both"
        )
    known = TrainingAnswers(train)
    majority = known.majority([record["task"] for record in asked])
    true = [scene_action(record) for record in asked if "action_json" in record]
    inside = [part for action in true for part in getattr(action, "actions", (action,))]
    categories = {*CATEGORIES, *(part.category for part in inside if isinstance(part, PlaceAnchor))} - {""}
    rows = []
    for index, (record, answer) in enumerate(zip(asked, majority, strict=True)):
        if "action_json" in record:
            action = known.constant(reference_action(record))
            answer = None if action is None else format_action(action, codec)
        rows.append(prediction_row(index, record, answer or "", codec, categories))
    write_whole(output, "".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"sha256": file_hash(output), "made_from": made_from}
    write_whole(manifest_file(output), json.dumps(manifest, indent=1) + "\n")
    return output


def is_baseline(path: str | Path) -> bool:
    """Whether `baseline_predictions` wrote a predictions file."""
    manifest = read_manifest(Path(path))
    return manifest is not None and "baseline" in manifest["made_from"]


def find_predictions(
    named: str | Path | Sequence[str | Path] = (),
    *,
    runs_dir: str | Path = "papermill_runs",
    samples: str | Path = "data/processed/notebook",
    output: str | Path = "papermill_runs/baseline/predictions.jsonl",
) -> list[Path]:
    """Predictions files to look at: those named (files, or folders with one); else that of the run that predicted last.

    Where no run has any, `baseline_predictions` of all samples below `samples` are written to `output`.
    Raises ValueError where there is nothing to look at, with what to do.
    """
    named = [named] if isinstance(named, str | Path) else named  # `papermill -p` gives a single one as a text
    paths = [Path(name) / "predictions.jsonl" if Path(name).is_dir() else Path(name) for name in named]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{missing[0]}: no predictions there; predict the run first (roomplan predict STAGE.yaml)")
    output = Path(output)
    made = [p for p in Path(runs_dir).glob("*/predictions.jsonl") if not is_baseline(p)]
    if paths or made:
        return paths or [max(made, key=lambda path: path.stat().st_mtime)]
    files = sorted(Path(samples).rglob("*.jsonl"))
    if not files:
        raise ValueError(
            f"no run below {runs_dir} has predictions, and {samples} holds no samples for a baseline; train a run "
            "(notebooks/03_train.ipynb) or prepare samples (notebooks/00_prepare_data.ipynb)"
        )
    return [baseline_predictions(files, output)]


def run_names(files: Sequence[Path]) -> dict[str, Path]:
    """Predictions files by what to call them: the run's folder (with what other weights or controls they are of), or
    the file's own name where that is no run's; before it the folder above where that is taken."""
    named: dict[str, Path] = {}
    for file in files:
        place, stem = file.absolute().parent, file.stem
        run = place.parents[1] if place.parent.name == "predictions" else place
        is_runs = stem == "predictions" or stem.startswith("predictions_")
        parts = (run.name, *([] if run is place else [place.name]), *stem.split("_", 1)[1:])
        name = "_".join(parts) if is_runs else stem
        choices = (name, f"{(run.parent if is_runs else run).name}_{name}", f"{name}_{len(named) + 1}")
        named[next(choice for choice in choices if choice not in named)] = file
    return named


def answered(path: str | Path) -> dict[str, list[dict]]:
    """Rows of a predictions file under "model" ("baseline" for a baseline's), and of the controls that lie beside it.

    Raises ValueError, with file and line where there is one, for a file that is missing, empty or cut off.
    """
    path = Path(path)
    files = {"baseline" if is_baseline(path) else "model": path}
    if path.name == predictions_file(path.parent).name:
        beside = {name: predictions_file(path.parent, name) for name in CONTROLS[1:]}
        files |= {name: file for name, file in beside.items() if file.is_file()}
    rows = {name: read_predictions(file) for name, file in files.items()}
    if empty := [files[name] for name, part in rows.items() if not part]:
        raise ValueError(f"{empty[0]}: holds no prediction; predict again")
    return rows


def file_scores(path: str | Path) -> dict:
    """Scores of a predictions file beside its controls: scores.json where that was made from the same, else counted
    here, with baselines where the run's training samples are there.

    As `scores.score_predictions`; of a baseline's file the scores are under "baseline" instead of "model".
    """
    path = Path(path)
    manifest, kept = read_manifest(path), path.parent / "scores.json"
    if manifest and path.name == predictions_file(path.parent).name and kept.is_file():
        scores = json.loads(kept.read_text())
        if scores.get("made_from") == manifest["made_from"]:
            return scores
    (name, rows), *controls = answered(path).items()
    settings = path.parent / "run.yaml"
    files = load_run_config(settings).data.train_paths if settings.is_file() else []
    train = [record for file in files if file.is_file() for record in read_samples(file)]
    scores = score_predictions(rows, controls=dict(controls), train=train)
    protocols = scores.pop("protocols")
    named = {
        section: {name if who == "model" else who: part for who, part in by.items()} for section, by in scores.items()
    }
    return named | {"protocols": protocols}


def asked_scenes(path: str | Path, scene_ids: Iterable[str], folder: str | Path = "") -> dict[str, Scene]:
    """The scenes with these ids that lie below `folder` or, without one, where the samples that a predictions file was
    made from (its manifest says) keep their pictures; those that are nowhere there are left out.

    Raises ValueError for a `folder` that is none, and for a scene that cannot be read.
    """
    roots = [Path(folder)]
    if not str(folder):
        samples = (read_manifest(Path(path)) or {}).get("made_from", {}).get("samples", [])
        roots = sorted({sample_root(file) for file, _ in samples if Path(file).is_file()})
    found = {
        scene.name: scene for root in roots for reader in (arkitscenes, scannet) for scene in reader.find_scenes(root)
    }
    return {name: open_scene(found[name]) for name in dict.fromkeys(scene_ids) if name in found}
