"""Scores of predictions, always beside their controls and baselines."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from roomplan_lib.actions import (
    Action,
    ActionError,
    ActionList,
    Measure,
    NoAction,
    PlaceAnchor,
    PlanRoom,
    parse_action,
)
from roomplan_lib.config import RunConfig
from roomplan_lib.evaluation import CONTROLS, predictions_file, read_manifest
from roomplan_lib.evaluation.action_metrics import confusion, language_items, measure_items
from roomplan_lib.evaluation.baselines import NOISE_M, TrainingAnswers, moved, quantised
from roomplan_lib.evaluation.bootstrap import weighted_mean, weighted_median, with_intervals
from roomplan_lib.evaluation.box_metrics import (
    AP3D_THRESHOLDS,
    THRESHOLDS,
    average_precision,
    box_errors,
    mean_of_known,
    normal_error_deg,
    scale_factor,
    scaled,
    set_items,
)
from roomplan_lib.evaluation.grounding import group_means, query_f1, score_scan2cap
from roomplan_lib.evaluation.layout_metrics import is_plane, layout_items, plane_rectangle, rectangle_iou
from roomplan_lib.evaluation.text_metrics import PROTOCOLS, answer_items, meteor_entry, set_scores, token_strings
from roomplan_lib.evaluation.text_metrics import score as score_texts
from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import read_samples
from roomplan_lib.scenes import CATEGORIES

QA_PROTOCOL = "roomplan-1"
CAPTION_PROTOCOL = "chat-scene"
# What papers report on these benchmarks, scored beside our own protocol.
PUBLISHED = {
    "scanqa": ("scanqa-official", "leo", "leo-parity", "gpt4scene", "v3dllm"),
    "sqa3d": ("leo", "leo-parity", "gpt4scene"),
}
PROTOCOL_TEXTS = {
    "anchors": "place-anchor-1: one upright box per instruction, metres; invalid text has IoU 0 and no centre error",
    "lists": "anchor-lists-1: boxes of one category matched one to one (Hungarian), pooled over all lists; invalid "
    "text is an empty list",
    "plans": "plan-room-1: walls, doors and windows matched in their planes, furniture as boxes; invalid text is an "
    "empty plan",
    "measures": "measures-1: the value of a measure of the right things; any other answer is not near",
    "language": "actions-1: strict JSON, the action language, and whether a program can carry it out",
    "qa": f"{QA_PROTOCOL}: {PROTOCOLS[QA_PROTOCOL].description}",
    "captions": f"{CAPTION_PROTOCOL}: Scan2Cap's captions of given boxes, with its sos and eos, PTB tokens",
}
DISTANCES = {"10cm": 0.1, "25cm": 0.25, "50cm": 0.5, "1m": 1.0}


@dataclass(frozen=True, eq=False)
class ActionAnswer:
    """An action row: what was written, what it means, what was wanted; both in one frame."""

    row: dict
    text: str
    action: Action | ActionList | ActionError
    true: Action | ActionList

    @property
    def scene_id(self) -> str:
        return self.row["scene_id"]

    @property
    def section(self) -> str | None:
        """Which table it is scored in beside `language`; None for refusals and edits, which have only that."""
        if self.row.get("task") == "multi3drefer":
            return "lists"
        if isinstance(self.true, ActionList):
            return "lists" if all(isinstance(part, PlaceAnchor) for part in self.true.actions) else None
        return {PlaceAnchor: "anchors", PlanRoom: "plans", Measure: "measures"}.get(type(self.true))

    def boxes(self) -> tuple[list[OrientedBox], list[OrientedBox]]:
        """The boxes that were placed and those that should have been."""
        return [a.to_box() for a in _anchors(self.action)], [a.to_box() for a in _anchors(self.true)]


def score_run(config: RunConfig, folder: Path | None = None) -> dict:
    """Scores of prediction files beside controls and baselines; writes scores.json.

    folder: where the predictions are, the run's own for None; scores.json goes there too. See `score_predictions` for
    the result, which also says what it was made_from: weights, samples and settings of the predictions.
    Raises ValueError when there is no predictions.jsonl, or when its controls were made from other weights, samples or
    settings.
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
    scores = score_predictions(rows.pop("model"), controls=rows, train=train) | {"made_from": made_from["model"]}
    write_whole(folder / "scores.json", json.dumps(scores, indent=1) + "\n")
    return scores


def read_predictions(path: str | Path) -> list[dict]:
    """Rows of a predictions file. Raises ValueError with file and line for one that is cut off or lacks a key."""
    rows, data = [], Path(path).read_bytes()
    # Line feeds alone end a row: texts may hold other signs that end a line, such as U+2028.
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n") if data else [], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: no prediction ({error}); predict again") from None
        check_row(row, f"{path}:{number}")
        rows.append(row)
    return rows


def check_row(row: dict, where: str) -> None:
    """Raise ValueError unless a row of predictions has what scoring needs, as text."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got {type(row).__name__}; predict again")
    if missing := sorted({"scene_id", "question", "prediction", "reference"} - set(row)):
        raise ValueError(f"{where}: keys {missing} are missing")
    for key in ("scene_id", "prediction", "reference"):
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: {key}: expected text, got {row[key]!r:.80}")
    answers = row.get("answers", [])
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: answers: expected a list of texts, got {answers!r:.80}")
    view_ids = row.get("view_ids")
    if view_ids is not None and not (isinstance(view_ids, list) and all(isinstance(name, str) for name in view_ids)):
        raise ValueError(f"{where}: view_ids: expected a list of texts, got {view_ids!r:.80}")
    confidence = row.get("confidence", [])
    if not isinstance(confidence, list) or not all(
        type(value) in (int, float) and math.isfinite(value) for value in confidence
    ):
        raise ValueError(f"{where}: confidence: expected a list of finite numbers, got {confidence!r:.80}")


def _asked(row: dict) -> tuple[str, str, str]:
    return row["scene_id"], str(row["question"]), row["reference"]


def score_predictions(
    rows: Sequence[dict], *, controls: dict[str, Sequence[dict]] | None = None, train: Sequence[dict] = ()
) -> dict:
    """Scores by section and by who answered.

    rows: of a predictions file; scene_id, question, prediction and reference suffice. A reference that is an action
    makes it an action row. Rows of tests whose answers are hidden are left out.
    controls: the same rows as "blind" or "shuffled" answered them. train: the training records, for baselines.

    Sections, those that have rows: `anchors` (one box asked for), `lists` (several, or Multi3DRefer), `plans`,
    `measures`, `language` (all actions as text), `qa`, `captions` (Scan2Cap), and `protocols`, what each means. Edits
    of a room are scored as text alone: a row does not hold the room that `action_metrics.score_edits` needs.
    Who: model; unconstrained (what the model writes without the grammar), blind, shuffled; constant and majority (the
    same answer whatever the room), retrieval (the answer of the training sample with the most similar words);
    noise_5cm, _10cm, _20cm (the truth moved by as much) and quantised (the truth as text has it).
    """
    answered = {"model": rows, **(controls or {})}
    if not rows:
        raise ValueError("no predictions; there is nothing to score")
    for name, part in answered.items():
        for number, row in enumerate(part):
            check_row(row, f"{name} row {number}")
    for name, part in (controls or {}).items():
        if [_asked(row) for row in part] != [_asked(row) for row in rows]:
            raise ValueError(f"{name}: {len(part)} rows that are not the same questions as the model's {len(rows)}")
    known = TrainingAnswers(train)
    action_rows, text_rows = defaultdict(list), defaultdict(list)
    for name, part in answered.items():
        for row in part:
            (action_rows if is_action_row(row) else text_rows)[name].append(row)
    if any("unconstrained" in row for row in action_rows["model"]):
        action_rows["unconstrained"] = [
            row | {"prediction": row.get("unconstrained", row["prediction"])} for row in action_rows["model"]
        ]
    sections: dict[str, dict] = {}
    actions = {name: read_actions(part) for name, part in action_rows.items() if part}
    if actions:
        actions |= action_baselines(known, actions["model"])
        sections["language"] = {name: score_language(part) for name, part in actions.items()}
        scorers = {"anchors": score_anchors, "lists": score_lists, "plans": score_plans, "measures": score_measured}
        for section, measure in scorers.items():
            parts = {name: [answer for answer in part if answer.section == section] for name, part in actions.items()}
            sections[section] = {name: measure(part) for name, part in parts.items() if part}
    texts = {name: [row for row in part if _references(row)] for name, part in text_rows.items()}
    if texts.get("model"):
        texts |= text_baselines(known, texts["model"])
        for section, measure in (("qa", score_answers), ("captions", score_captions)):
            parts = {n: [r for r in part if _text_section(r) == section] for n, part in texts.items()}
            sections[section] = {n: measure(part, meteor=n == "model") for n, part in parts.items() if part}
    order = [name for name in PROTOCOL_TEXTS if sections.get(name)]
    return {**{name: sections[name] for name in order}, "protocols": {name: PROTOCOL_TEXTS[name] for name in order}}


# Actions --------------------------------------------------------------------------------------------------------------


def is_action_row(row: dict) -> bool:
    """Whether a row asks for an action: it says so, or its reference is one."""
    if "reference_action" in row:
        return True
    text = row["reference"].lstrip()
    return text[:1] in ("{", "[") and not isinstance(parse_action(text, None, row.get("codec", "m2")), ActionError)


def read_actions(rows: Sequence[dict]) -> list[ActionAnswer]:
    """Action rows with their texts read. Categories may be the 17 and those that the references use.

    Raises ValueError for a reference that is no action.
    """
    truths = []
    for row in rows:
        true = parse_action(row["reference"], None, row.get("codec", "m2"))
        if isinstance(true, ActionError):
            raise ValueError(f"reference {row['reference']!r:.120} is no action: {true.reason}")
        truths.append(true)
    categories = {*CATEGORIES, *(anchor.category for true in truths for anchor in _anchors(true))} - {""}
    return [
        ActionAnswer(row, row["prediction"], _read(row["prediction"], categories, row), true)
        for row, true in zip(rows, truths, strict=True)
    ]


def anchor_error(prediction: str, reference: str) -> dict:
    """center_error_m (None for anything but a single anchor), iou_3d and valid of one anchor; texts of one frame."""
    answer = read_actions([{"scene_id": "", "prediction": prediction, "reference": reference}])[0]
    items = anchor_items([answer])
    valid = isinstance(answer.action, PlaceAnchor)
    return {
        "center_error_m": float(items["center_error_m"][0]) if valid else None,
        "iou_3d": float(items["iou_3d"][0]),
        "valid": valid,
    }


def anchor_items(answers: Sequence[ActionAnswer]) -> dict[str, np.ndarray]:
    """[N] numbers of single anchors: those of `box_errors`, normal_error_deg, valid (an action at all), answered (a
    single anchor) and right_category. What is no single anchor has IoUs of 0 and NaN for every error.

    scaled_iou_3d, scaled_center_error_m: after one factor on all lengths of a scene that brings its predicted centers
    nearest to the true ones, since the views alone may not tell the scale. plane_iou: `rectangle_iou` where the
    truth is a plane, else NaN.
    """
    factors = _scale_factors(answers)
    columns: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        row = dict.fromkeys(ERRORS, math.nan) | {"iou_3d": 0.0, "iou_bounds": 0.0, "scaled_iou_3d": 0.0}
        row |= {"valid": not isinstance(answer.action, ActionError), "answered": False, "right_category": False}
        row["plane_iou"] = 0.0 if is_plane(answer.true) else math.nan
        if isinstance(answer.action, PlaceAnchor):
            box, true = answer.action.to_box(), answer.true.to_box()
            aligned = box_errors(scaled(box, factors[answer.scene_id]), true)
            normal = normal_error_deg(answer.action.normal, answer.true.normal, directed=not answer.true.level)
            row |= box_errors(box, true) | {"normal_error_deg": normal, "answered": True}
            row |= {"scaled_iou_3d": aligned["iou_3d"], "scaled_center_error_m": aligned["center_error_m"]}
            if is_plane(answer.true):
                row["plane_iou"] = rectangle_iou(plane_rectangle(answer.action), plane_rectangle(answer.true))
            row["right_category"] = answer.action.category == answer.true.category
        for name, value in row.items():
            columns[name].append(float(value))
    return {name: np.array(values) for name, values in columns.items()}


ERRORS = (
    "center_error_m", "horizontal_error_m", "vertical_error_m", "extent_error_m", "ase", "yaw_error_deg",
    "normal_error_deg", "scaled_center_error_m",
)  # fmt: skip


def score_anchors(answers: Sequence[ActionAnswer]) -> dict:
    """Scores of single anchors with `ci95`, bootstrap intervals over scenes; num_samples, num_scenes.

    Over all: mean_iou_3d, acc_iou25, acc_iou50, mean_iou_bounds, acc_bounds25, acc_bounds50 (axis-aligned),
    within_10cm, _25cm, _50cm, _1m (of the center), category_accuracy, valid_json_rate, answered_rate (is a single
    anchor). Over the answered: medians of the center's error and its horizontal and vertical part, means of the other
    errors. scaled_...: the same after one scale per scene. Over true planes, where there are any: mean_plane_iou,
    acc_plane25, acc_plane50. by_eval_type and by_task where rows have one.
    """
    items = anchor_items(answers)
    planes = items["plane_iou"]
    reached = {f"acc_plane{p}": np.where(np.isnan(planes), np.nan, planes >= p / 100) for p in (25, 50)}
    of_planes = {} if np.isnan(planes).all() else {"mean_plane_iou": planes, **reached}

    def measure(weights: np.ndarray) -> dict[str, float | None]:
        def mean(values: np.ndarray) -> float | None:
            return weighted_mean(values, weights)

        return {
            "median_center_error_m": weighted_median(items["center_error_m"], weights),
            "mean_iou_3d": mean(items["iou_3d"]),
            "acc_iou25": mean(_reached(items["iou_3d"], 0.25)),
            "acc_iou50": mean(_reached(items["iou_3d"], 0.5)),
            "valid_json_rate": mean(items["valid"]),
            "answered_rate": mean(items["answered"]),
            "category_accuracy": mean(items["right_category"]),
            "median_horizontal_error_m": weighted_median(items["horizontal_error_m"], weights),
            "median_vertical_error_m": weighted_median(items["vertical_error_m"], weights),
            **{
                f"within_{name}": mean((items["center_error_m"] <= most).astype(float))
                for name, most in DISTANCES.items()
            },
            **{name: mean(items[name]) for name in ("extent_error_m", "ase", "yaw_error_deg", "normal_error_deg")},
            "mean_iou_bounds": mean(items["iou_bounds"]),
            "acc_bounds25": mean(_reached(items["iou_bounds"], 0.25)),
            "acc_bounds50": mean(_reached(items["iou_bounds"], 0.5)),
            "scaled_median_center_error_m": weighted_median(items["scaled_center_error_m"], weights),
            "scaled_mean_iou_3d": mean(items["scaled_iou_3d"]),
            "scaled_acc_iou25": mean(_reached(items["scaled_iou_3d"], 0.25)),
            **{name: mean(values) for name, values in of_planes.items()},
        }

    result = with_intervals(measure, [answer.scene_id for answer in answers])
    groups = {"by_eval_type": "eval_type", "by_task": "task"}  # a plane is 1 cm thick, so its IoU says little
    for name, key in groups.items():
        result |= _grouped(name, [answer.row.get(key) for answer in answers], measure)
    return result


def score_lists(answers: Sequence[ActionAnswer]) -> dict:
    """Scores of lists of anchors with `ci95`, num_samples, num_scenes; boxes match one to one within their category.

    f1, precision, recall, macro_f1 (over categories) and sample_f1 by IoU (_iou25, _iou50), f1_25cm and f1_50cm by
    distance of the centers, valid_json_rate; query_f1_iou25, _iou50: Multi3DRefer's mean F1 of axis-aligned bounds
    whatever their category. by_eval_type where rows have one. ap_iou25, ap_iou50 and ap3d where the rows hold
    confidences.
    """
    pairs = [answer.boxes() for answer in answers]
    tables = set_items(*([pair[side] for pair in pairs] for side in (0, 1)))
    # Text that is no action answers nothing: it must not pass for the right "there is none".
    is_action = np.array([not isinstance(answer.action, ActionError) for answer in answers], dtype=float)
    queries = {name: is_action * [query_f1(*pair, least) for pair in pairs] for name, least in THRESHOLDS.items()}
    valid = _valid(answers)

    def measure(weights: np.ndarray) -> dict[str, float | None]:
        return {
            **_set_scores(tables, weights),
            **{f"query_f1_{name}": weighted_mean(values, weights) for name, values in queries.items()},
            "valid_json_rate": weighted_mean(valid, weights),
        }

    result = with_intervals(measure, [answer.scene_id for answer in answers]) | _ranked(answers)
    return result | _grouped("by_eval_type", [answer.row.get("eval_type") for answer in answers], measure)


def score_plans(answers: Sequence[ActionAnswer]) -> dict:
    """Scores of whole rooms with `ci95`, num_samples, num_scenes: what `LayoutItems.scores` has, and of the furniture
    as `score_lists`, its names with object_ before them; valid_json_rate. An answer that is no plan is an empty one."""
    empty = PlanRoom(())
    layout = layout_items(
        [answer.action if isinstance(answer.action, PlanRoom) else empty for answer in answers],
        [answer.true for answer in answers],
    )
    pairs = [answer.boxes() for answer in answers]
    tables = set_items(*([pair[side] for pair in pairs] for side in (0, 1)))
    valid = _valid(answers)

    def measure(weights: np.ndarray) -> dict[str, float | None]:
        objects = {f"object_{name}": value for name, value in _set_scores(tables, weights).items()}
        return {**layout.scores(weights), **objects, "valid_json_rate": weighted_mean(valid, weights)}

    result = with_intervals(measure, [answer.scene_id for answer in answers])
    return result | {f"object_{name}": value for name, value in _ranked(answers).items()}


def score_measured(answers: Sequence[ActionAnswer]) -> dict:
    """What `score_measures` tells of measures, with `ci95`, num_samples, num_scenes, valid_json_rate; by_quantity."""
    items = measure_items(
        [answer.action if isinstance(answer.action, Measure) else None for answer in answers],
        [answer.true for answer in answers],
    )
    items["valid_json_rate"] = _valid(answers)

    def measure(weights: np.ndarray) -> dict[str, float | None]:
        return {name: weighted_mean(values, weights) for name, values in items.items()}

    result = with_intervals(measure, [answer.scene_id for answer in answers])
    return result | _grouped("by_quantity", [answer.true.quantity for answer in answers], measure)


def score_language(answers: Sequence[ActionAnswer]) -> dict:
    """Means of `language_items` with `ci95`, num_samples, num_scenes; `confusion` of verbs, mean_characters."""
    parts = [answer.action for answer in answers], [answer.true for answer in answers]
    texts = [answer.text for answer in answers]
    items = language_items(texts, *parts, codecs=[answer.row.get("codec", "m2") for answer in answers])

    def measure(weights: np.ndarray) -> dict[str, float | None]:
        return {name: weighted_mean(values, weights) for name, values in items.items()}

    result = with_intervals(measure, [answer.scene_id for answer in answers])
    return result | {"confusion": confusion(*parts), "mean_characters": float(np.mean([len(text) for text in texts]))}


def action_baselines(known: TrainingAnswers, answers: Sequence[ActionAnswer]) -> dict[str, list[ActionAnswer]]:
    """The same rows answered by constant, retrieval, the truth with noise, and the truth as text has it.

    A row that a baseline has no answer to is left out of it; refusals only have the first two, measures no noise.
    Retrieval takes of a measure the value: what it is measured between is another room's.
    """
    found = known.retrieved([answer.row for answer in answers], is_action=True)
    rng = np.random.default_rng(0)
    result: dict[str, list[ActionAnswer]] = defaultdict(list)
    for answer, place in zip(answers, found, strict=True):
        if (action := known.constant(answer.true)) is not None:
            result["constant"].append(replace(answer, action=action))
        if place is not None:
            found_action = known.actions[place]
            if isinstance(found_action, Measure) and isinstance(answer.true, Measure):
                found_action = replace(answer.true, value=found_action.value)
            result["retrieval"].append(replace(answer, action=found_action))
        if isinstance(answer.true, NoAction):
            continue
        for name, distance in NOISE_M.items() if not isinstance(answer.true, Measure) else ():
            result[name].append(replace(answer, action=moved(answer.true, distance, rng)))
        if "reference_action" in answer.row:
            true = parse_action(json.dumps(answer.row["reference_action"]), None)
            if isinstance(true, ActionError):
                raise ValueError(f"reference_action of a row of {answer.scene_id} is no action: {true.reason}")
            result["quantised"].append(
                replace(answer, action=quantised(true, answer.row.get("codec", "m2")), true=true)
            )
    return dict(result)


def _set_scores(tables: dict, weights: np.ndarray) -> dict[str, float | None]:
    result = {}
    for name, table in tables.items():
        scores = table.scores(weights)
        kept = scores if name in THRESHOLDS else {"f1": scores["f1"]}
        result |= {f"{key}_{name}": value for key, value in kept.items()}
    return result


def _ranked(answers: Sequence[ActionAnswer]) -> dict[str, float | None]:
    """Average precisions, where every answer that places something holds a confidence for each of its actions."""
    boxes, sure = [], []
    for answer in answers:
        anchors, values = _anchors(answer.action), answer.row.get("confidence")
        parts = getattr(answer.action, "actions", (answer.action,))
        if anchors and (not isinstance(values, list) or len(values) != len(parts)):
            return {}
        boxes.append([anchor.to_box() for anchor in anchors])
        sure.append([v for v, part in zip(values or [], parts, strict=False) if isinstance(part, PlaceAnchor)])
    true = [[anchor.to_box() for anchor in _anchors(answer.true)] for answer in answers]
    tables = average_precision(boxes, sure, true, tuple(THRESHOLDS.values()))
    ranks = average_precision(boxes, sure, true, AP3D_THRESHOLDS, num_recalls=101)
    return {
        **{f"ap_{name}": mean_of_known(list(tables[least].values())) for name, least in THRESHOLDS.items()},
        "ap3d": mean_of_known([mean_of_known(list(table.values())) for table in ranks.values()]),
    }


def _scale_factors(answers: Sequence[ActionAnswer]) -> dict[str, float]:
    centers: dict[str, list[tuple]] = defaultdict(list)
    for answer in answers:
        pairs = centers[answer.scene_id]
        if isinstance(answer.action, PlaceAnchor):
            pairs.append((answer.action.center, answer.true.center))
    return {scene: scale_factor(*np.array(pairs).reshape(-1, 2, 3).swapaxes(0, 1)) for scene, pairs in centers.items()}


def _anchors(action: Action | ActionList | ActionError) -> list[PlaceAnchor]:
    parts = action.actions if isinstance(action, ActionList | PlanRoom) else (action,)
    return [part for part in parts if isinstance(part, PlaceAnchor)]


def _read(text: str, categories: Collection[str], row: dict) -> Action | ActionList | ActionError:
    return parse_action(text, categories, row.get("codec", "m2"))


def _valid(answers: Sequence[ActionAnswer]) -> np.ndarray:
    return np.array([float(not isinstance(answer.action, ActionError)) for answer in answers])


def _reached(values: np.ndarray, least: float) -> np.ndarray:
    return (values >= least).astype(float)


def _grouped(key: str, names: Sequence[str | None], measure: Callable) -> dict:
    """{key: {group: measures and num_samples}} of the samples that have a group; {} where none has."""
    groups = {name: np.array([int(other == name) for other in names]) for name in sorted({n for n in names if n})}
    return {key: {n: measure(w) | {"num_samples": int(w.sum())} for n, w in groups.items()}} if groups else {}


# Answers in words -----------------------------------------------------------------------------------------------------


def score_answers(rows: Sequence[dict], protocol: str = QA_PROTOCOL, *, meteor: bool = False) -> dict:
    """em, em_refined, bleu_1 to bleu_4, rouge_l and cider under `protocol` with `ci95`, num_samples, num_scenes.

    meteor: that too, without an interval; see `text_metrics.meteor_entry`.
    em_by_task; by_question_type and by_eval_type where rows have one (em, em_refined, num_samples); published: of each
    benchmark among the sources the scores under the protocols of papers, see PUBLISHED, with `ci95` too.
    """
    said, wanted = [row["prediction"] for row in rows], [_references(row) for row in rows]
    items, scenes = answer_items(said, wanted, protocol), [row["scene_id"] for row in rows]
    result = set_scores(items, scenes)
    tasks = group_means(items, [row.get("task", "qa") for row in rows])
    result |= {"protocol": protocol, "em_by_task": {name: part["em"] for name, part in tasks.items()}}
    result |= meteor_entry(*token_strings(said, wanted, protocol)) if meteor else {}
    for key in ("question_type", "eval_type"):
        kept = [i for i, row in enumerate(rows) if row.get(key)]
        if kept:
            part = {name: values[kept] for name, values in items.items() if name in ("em", "em_refined")}
            result[f"by_{key}"] = group_means(part, [rows[i][key] for i in kept])
    published = {}
    for source, protocols in PUBLISHED.items():
        kept = [i for i, row in enumerate(rows) if row.get("source") == source]
        if kept:
            columns = [[column[i] for i in kept] for column in (said, wanted, scenes)]
            published[source] = {
                name: score_texts(*columns[:2], name, meteor=False, scenes=columns[2]) for name in protocols
            }
    return result | ({"published": published} if published else {})


def score_captions(rows: Sequence[dict], *, meteor: bool = False) -> dict:
    """Scan2Cap's scores of captions of given boxes with `ci95`; num_samples, num_scenes.

    The box being given, its IoU is 1, so these are the scores at any k.
    """
    said = {str(i): (row["prediction"], 1.0) for i, row in enumerate(rows)}
    corpus = {str(i): _references(row) for i, row in enumerate(rows)}
    scenes = [row["scene_id"] for row in rows]
    return score_scan2cap(said, corpus, protocol=CAPTION_PROTOCOL, meteor=meteor, scenes=scenes)


def text_baselines(known: TrainingAnswers, rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The same rows answered by majority and retrieval, {} without training answers."""
    majority = known.majority([row.get("task") for row in rows])
    found = known.retrieved(rows, is_action=False)
    answers = {"majority": majority, "retrieval": [i if i is None else known.records[i]["answer"] for i in found]}
    return {
        name: [row | {"prediction": text} for row, text in zip(rows, texts, strict=True)]
        for name, texts in answers.items()
        if None not in texts
    }


def _references(row: dict) -> list[str]:
    """The accepted answers of a row; none where they are hidden."""
    answers = row.get("answers")
    return [row["reference"]] * bool(row["reference"].strip()) if answers is None else answers


def _text_section(row: dict) -> str:
    return "captions" if row.get("task") == "scan2cap" else "qa"
