"""Scores of actions as text and as actions: is it JSON, is it an action, the right one, does it make sense; what is
measured, and what an edit leaves behind."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from roomplan_lib.actions import (
    Action,
    ActionError,
    ActionList,
    Measure,
    Move,
    NoAction,
    PlaceAnchor,
    PlanRoom,
    Remove,
    parse_action,
)
from roomplan_lib.actions.executor import RoomState, apply
from roomplan_lib.actions.text import MAX_TEXT
from roomplan_lib.evaluation.bootstrap import weighted_mean
from roomplan_lib.evaluation.box_metrics import match_boxes, mean_of_known

INVALID = "invalid"  # what the confusion table calls a text that is no action
WITHIN = {"10pct": 0.1, "25pct": 0.25}  # share of the true value that a measure may be off
DELTA = 1.25  # largest ratio of a measure to the true value, either way, that counts (as for depth)


def language_items(
    texts: Sequence[str],
    predicted: Sequence[Action | ActionList | ActionError],
    true: Sequence[Action | ActionList],
    codecs: str | Sequence[str] = "m2",
) -> dict[str, np.ndarray]:
    """[N] numbers whose means are scores, NaN where a sample does not count. codecs: of all texts, or of each.

    json_rate: strict JSON with finite numbers. valid_rate: an action of the language. semantic_rate: valid and carried
    out on an empty room without a problem; only what places things is judged. extra_text_rate: no action, but one
    stands in the text. type_accuracy: the true verb. category_accuracy: of single anchors answered by single anchors.
    abstain_recall, abstain_precision: of samples that should, or do, end in "none". duplicate_rate: of items placed,
    those that stand where one of their class stands already.
    """
    columns: dict[str, list[float]] = defaultdict(list)
    codecs = [codecs] * len(texts) if isinstance(codecs, str) else codecs
    for text, action, truth, codec in zip(texts, predicted, true, codecs, strict=True):
        valid = not isinstance(action, ActionError)
        problems = _placement_problems(action) if valid else []
        num_items = _num_placed(action)
        refuses, should = isinstance(action, NoAction), isinstance(truth, NoAction)
        single = isinstance(action, PlaceAnchor) and isinstance(truth, PlaceAnchor)
        duplicates = sum(problem.kind == "duplicate" for problem in problems)
        row = {
            "json_rate": is_json(text),
            "valid_rate": valid,
            "semantic_rate": valid and not problems,
            "extra_text_rate": not valid and not isinstance(inner_action(text, codec), ActionError),
            "type_accuracy": valid and action.verb == truth.verb,
            "category_accuracy": action.category == truth.category if single else math.nan,
            "abstain_recall": refuses if should else math.nan,
            "abstain_precision": should if refuses else math.nan,
            "duplicate_rate": duplicates / num_items if num_items else math.nan,
        }
        for name, value in row.items():
            columns[name].append(float(value))
    return {name: np.array(values) for name, values in columns.items()}


def confusion(
    predicted: Sequence[Action | ActionList | ActionError], true: Sequence[Action | ActionList]
) -> dict[str, dict[str, int]]:
    """How often each true verb was answered by which verb; "list" is a list, "invalid" a text that is no action."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for action, truth in zip(predicted, true, strict=True):
        table[truth.verb][INVALID if isinstance(action, ActionError) else action.verb] += 1
    return {verb: dict(sorted(row.items())) for verb, row in sorted(table.items())}


def is_json(text: str) -> bool:
    """Whether the whole text is JSON, without NaN and with numbers that are finite as floats."""
    if len(text) > MAX_TEXT:
        return False
    try:
        json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite)
    except (ValueError, RecursionError):
        return False
    return True


def inner_action(text: str, codec: str = "m2") -> Action | ActionList | ActionError:
    """The action that begins at the first bracket of a text and has other text around it."""
    starts = [place for place in (text.find("{"), text.find("[")) if place >= 0]
    if not starts or len(text) > MAX_TEXT:
        return ActionError("no bracket")
    start = min(starts)
    try:
        _, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        return ActionError(f"no JSON: {error}")
    return parse_action(text[start:end], None, codec)


def score_measures(predicted: Sequence[Measure | None], true: Sequence[Measure]) -> dict[str, float | None]:
    """abs_error (metres or square metres) and relative_error, means over the answers that are measures of the same
    things; coverage, the share of those; within_10pct, within_25pct and delta_125 (ratio below 1.25), shares of all.

    None stands for an answer that is no measure. A true value of 0 has no relative error; only 0 is near it.
    """
    _require_pairs(predicted, true)
    items = measure_items(predicted, true)
    return {name: weighted_mean(values, np.ones(len(true))) for name, values in items.items()}


def measure_items(predicted: Sequence[Measure | None], true: Sequence[Measure]) -> dict[str, np.ndarray]:
    """[N] numbers whose means `score_measures` tells, NaN where a sample does not count."""
    same = [a if a and _what(a) == _what(b) else None for a, b in zip(predicted, true, strict=True)]
    errors = [None if a is None else abs(a.value - b.value) for a, b in zip(same, true, strict=True)]
    relative = [None if e is None or b.value == 0 else e / b.value for e, b in zip(errors, true, strict=True)]
    close = [
        a is not None and (a.value == b.value or max(a.value, b.value) < DELTA * min(a.value, b.value))
        for a, b in zip(same, true, strict=True)
    ]
    within = {
        name: [e is not None and e <= share * b.value for e, b in zip(errors, true, strict=True)]
        for name, share in WITHIN.items()
    }
    columns = {
        "abs_error": errors,
        "relative_error": relative,
        "coverage": [a is not None for a in same],
        **{f"within_{name}": part for name, part in within.items()},
        "delta_125": close,
    }
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}  # None becomes NaN


def score_edits(
    rooms: Sequence[RoomState], predicted: Sequence[Action | ActionList | ActionError], true: Sequence[Move | Remove]
) -> dict[str, float | None]:
    """What edits of rooms leave behind, compared with what the true edits leave.

    type_accuracy and target_accuracy: the right verb, and the right item too. executed_rate: carried out without a
    problem. state_f1: F1 of the anchors of the two rooms afterwards (same class, IoU >= 0.5), mean over the samples; an
    edit that cannot be carried out leaves the room as it was. state_f1_untouched: the same for doing nothing at all.
    Raises ValueError where the true edit itself cannot be carried out.
    """
    _require_pairs(predicted, true)
    columns: dict[str, list[float | None]] = defaultdict(list)
    for number, (room, action, truth) in enumerate(zip(rooms, predicted, true, strict=True)):
        goal, problems = apply(room, truth)
        if problems:
            raise ValueError(f"edit {number}: the true {truth.verb} cannot be carried out: {problems[0].reason}")
        after, faults = (room, [action]) if isinstance(action, ActionError) else apply(room, action)
        right = not isinstance(action, ActionError) and action.verb == truth.verb
        columns["type_accuracy"].append(right)
        columns["target_accuracy"].append(right and action.target == truth.target)
        columns["executed_rate"].append(not faults)
        columns["state_f1"].append(_state_f1(after, goal))
        columns["state_f1_untouched"].append(_state_f1(room, goal))
    return {name: mean_of_known(values) for name, values in columns.items()}


def _state_f1(room: RoomState, goal: RoomState) -> float:
    boxes, others = ([anchor.to_box() for anchor in state.anchors] for state in (room, goal))
    if not boxes and not others:
        return 1.0
    return 2 * len(match_boxes(boxes, others, least_iou=0.5)) / (len(boxes) + len(others))


def _placement_problems(action: Action | ActionList) -> list:
    """Problems of what an action places in an empty room; edits and measures need a room and are not judged."""
    parts = action.actions if isinstance(action, ActionList) else (action,)
    placed = tuple(part for part in parts if part.verb.startswith("place_") or isinstance(part, PlanRoom))
    return apply(RoomState(), ActionList(placed))[1] if placed else []


def _num_placed(action: Action | ActionList | ActionError) -> int:
    if isinstance(action, ActionList | PlanRoom):
        return sum(_num_placed(part) for part in action.actions)
    return int(not isinstance(action, ActionError) and action.verb.startswith("place_"))


def _what(measure: Measure) -> tuple:
    ends = {measure.source, measure.target} if measure.quantity == "distance" else measure.source
    return measure.quantity, frozenset(ends) if isinstance(ends, set) else ends


def _require_pairs(predicted: Sequence, true: Sequence) -> None:
    if len(predicted) != len(true) or not true:
        raise ValueError(f"expected as many predicted as true actions, at least one, got {len(predicted)}, {len(true)}")


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.20} is too large")
    return value
