"""What scores without looking: answers made from the training samples alone, and the truth itself, blurred or rounded.

From training samples: `constant` (medians), `majority` (the commonest answer), `retrieval` (the most similar words).
From the truth: `noise` (each place moved by a given distance) and `quantised` (written as text and read again).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from roomplan_lib.actions import (
    Action,
    ActionError,
    ActionList,
    Measure,
    PlaceAnchor,
    PlaceWall,
    PlanRoom,
    anchor_from_box,
    format_action,
    parse_action,
)
from roomplan_lib.geometry import OrientedBox, rotation_z
from roomplan_lib.samples.targets import question_text, reference_action

NOISE_M = {"noise_5cm": 0.05, "noise_10cm": 0.10, "noise_20cm": 0.20}
ROWS_AT_ONCE = 256  # questions compared with all training questions in one matrix product


# From the truth -------------------------------------------------------------------------------------------------------


def moved(action: Action | ActionList, distance: float, rng: np.random.Generator) -> Action | ActionList:
    """The action with every place in it moved by `distance` metres in a direction of its own; walls move level."""
    if isinstance(action, ActionList | PlanRoom):
        return replace(action, actions=tuple(moved(part, distance, rng) for part in action.actions))
    step = rng.normal(size=3)
    if isinstance(action, PlaceWall):
        step = step[:2] / np.linalg.norm(step[:2]) * distance
        return replace(action, a=_sum(action.a, step), b=_sum(action.b, step))
    if not hasattr(action, "center"):
        return action
    return replace(action, center=_sum(action.center, step / np.linalg.norm(step) * distance))


def quantised(action: Action | ActionList, codec: str = "m2") -> Action | ActionList:
    """The action written by a codec and read again, in a frame that is shifted by whole metres to its own middle.

    The shift keeps it in the codec's range wherever the scene's origin is. Raises ValueError where the codec cannot
    express the action at all.
    """
    shift = np.eye(4)
    places = np.array(_places(action))
    if len(places):
        shift[:3, 3] = -np.round(places.mean(axis=0))
    written = format_action(action.transformed(shift).bound(""), codec)
    read = parse_action(written, None, codec)
    assert not isinstance(read, ActionError), read.reason
    return read.transformed(np.linalg.inv(shift))


def _places(action: Action | ActionList) -> list[tuple]:
    if isinstance(action, ActionList | PlanRoom):
        return [place for part in action.actions for place in _places(part)]
    if isinstance(action, PlaceWall):
        return [(*action.a, action.z)]
    return [action.center] if hasattr(action, "center") else []


def _sum(place: tuple, step: np.ndarray) -> tuple:
    return tuple(float(a + b) for a, b in zip(place, step, strict=True))


# From training samples ------------------------------------------------------------------------------------------------


class TrainingAnswers:
    """The training samples as far as they answer questions without views; actions in their reference frames.

    Samples whose target is in an unknown frame, or hidden, are left out.
    """

    def __init__(self, records: Sequence[dict]) -> None:
        self.records = [r for r in records if r.get("answer") or r.get("action_json") and r.get("geom_token")]
        self.actions = {i: reference_action(r) for i, r in enumerate(self.records) if "action_json" in r}
        single = [action for action in self.actions.values() if isinstance(action, PlaceAnchor)]
        inside = [part for action in self.actions.values() for part in getattr(action, "actions", ())]
        boxes: dict[tuple[str, bool], list[OrientedBox]] = defaultdict(list)
        for anchor in single or [part for part in inside if isinstance(part, PlaceAnchor)]:
            boxes[_kind(anchor)].append(anchor.to_box())
        self._medians = {kind: _median_anchor(part, level=kind[1]) for kind, part in boxes.items()}
        everything = [box for part in boxes.values() for box in part]
        self._median = _median_anchor(everything) if everything else None
        values: dict[str, list[float]] = defaultdict(list)
        for action in self.actions.values():
            if isinstance(action, Measure):
                values[action.quantity].append(action.value)
        self._values = {quantity: float(np.median(part)) for quantity, part in values.items()}
        self._plan = _median_plan([action for action in self.actions.values() if isinstance(action, PlanRoom)])

    def constant(self, true: Action | ActionList) -> Action | ActionList | None:
        """An action that is the same in every room; None where training had nothing of the kind.

        A single anchor: the median box of the category asked for, or of all where it is unseen; without a category
        that of all level planes, or of everything else without one. A list: that one box. A plan: the room of median
        walls, with the median box of every category that most rooms have. A measure: the median of its quantity.
        """
        if isinstance(true, PlanRoom):
            return self._plan
        if isinstance(true, Measure):
            value = self._values.get(true.quantity)
            return None if value is None else replace(true, value=value)
        parts = true.actions if isinstance(true, ActionList) else (true,)
        kind = next((_kind(part) for part in parts if isinstance(part, PlaceAnchor)), None)
        anchor = self._medians.get(kind, self._median)
        return ActionList((anchor,)) if isinstance(true, ActionList) and anchor else anchor

    def majority(self, tasks: Sequence[str | None]) -> list[str | None]:
        """For each task its commonest training answer, or that of all tasks where it is unseen; None without any."""
        counts: dict[str, Counter] = defaultdict(Counter)
        for record in self.records:
            if "answer" in record:
                counts[record["task"]][record["answer"]] += 1
        overall = sum(counts.values(), Counter())
        return [counts.get(task, overall).most_common(1)[0][0] if overall else None for task in tasks]

    def retrieved(self, rows: Sequence[dict], is_action: bool) -> list[int | None]:
        """For each row of predictions the place in `records` of the training sample with the most similar words.

        Similar: the share of common words in all words of situation and question (Jaccard), of samples with the row's
        task where there are any, else of all that are (or are not) actions; of equals the first. None without any.
        """
        pool = [i for i, record in enumerate(self.records) if ("action_json" in record) == is_action]
        by_task: dict[str, list[int]] = defaultdict(list)
        for i in pool:
            by_task[self.records[i]["task"]].append(i)
        found: list[int | None] = [None] * len(rows)
        tasks: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            tasks[row.get("task", "")].append(place)
        for task, places in tasks.items():
            candidates = by_task.get(task, pool)
            if candidates:
                best = most_similar(
                    [_words(rows[place].get("situation"), rows[place]["question"]) for place in places],
                    [_words(self.records[i].get("situation"), question_text(self.records[i])) for i in candidates],
                )
                for place, choice in zip(places, best, strict=True):
                    found[place] = candidates[choice]
        return found


def most_similar(queries: Sequence[frozenset[str]], candidates: Sequence[frozenset[str]]) -> np.ndarray:
    """[num_queries] the place of the candidate whose words overlap most (Jaccard); the first of equals."""
    places: dict[frozenset[str], int] = {}
    for place, words in enumerate(candidates):
        places.setdefault(words, place)
    unique, first = list(places), np.array(list(places.values()))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(word for words in unique for word in words))}
    sizes = np.array([len(words) for words in unique])
    matrix = _indicators(unique, vocabulary)
    best = []
    for start in range(0, len(queries), ROWS_AT_ONCE):
        part = queries[start : start + ROWS_AT_ONCE]
        shared = (_indicators(part, vocabulary) @ matrix.T).toarray()
        union = np.array([len(words) for words in part])[:, None] + sizes[None] - shared
        best.append(first[(shared / np.maximum(union, 1)).argmax(axis=1)])
    return np.concatenate(best) if best else np.zeros(0, dtype=int)


def _indicators(texts: Sequence[frozenset[str]], vocabulary: dict[str, int]) -> csr_array:
    known = [[vocabulary[word] for word in words if word in vocabulary] for words in texts]
    starts = np.cumsum([0, *(len(words) for words in known)])
    columns = np.array([word for words in known for word in words], dtype=np.int64)
    return csr_array((np.ones(len(columns)), columns, starts), shape=(len(texts), len(vocabulary)))


def _words(situation: str | None, question: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", f"{situation or ''} {question}".lower()))


def _kind(anchor: PlaceAnchor) -> tuple[str, bool]:
    """What is asked for: the category and, without one, whether a level plane (floor, table top) is."""
    return anchor.category, not anchor.category and not anchor.level


def _median_anchor(boxes: Sequence[OrientedBox], *, level: bool = False) -> PlaceAnchor:
    doubled = np.exp(2j * np.array([box.yaw for box in boxes])).mean()  # a box looks the same after half a turn
    center, extent = (np.median([getattr(box, name) for box in boxes], axis=0) for name in ("center", "extent"))
    median = OrientedBox(center, extent, rotation_z(np.angle(doubled) / 2), boxes[0].label)
    anchor = anchor_from_box(median)
    if level:
        anchor = replace(anchor, normal=(0.0, 0.0, 1.0), yaw=round(np.degrees(median.yaw)) % 180)
    return quantised(anchor)  # what an answer could say


def _median_plan(plans: Sequence[PlanRoom]) -> PlanRoom | None:
    if not plans:
        return None
    anchors: dict[str, list[OrientedBox]] = defaultdict(list)
    rooms: Counter = Counter()
    bounds = []
    for plan in plans:
        walls = [item for item in plan.actions if isinstance(item, PlaceWall)]
        if walls:
            ends = np.array([end for wall in walls for end in (wall.a, wall.b)])
            low, high = ends.min(axis=0), ends.max(axis=0)
            bounds.append([*low, *high, _median(walls, lambda w: w.z), _median(walls, lambda w: w.height)])
        boxes = [item.to_box() for item in plan.actions if isinstance(item, PlaceAnchor)]
        rooms.update({box.label for box in boxes})
        for box in boxes:
            anchors[box.label].append(box)
    items: list[Action] = []
    if bounds:
        x0, y0, x1, y1, z, height = (float(value) for value in np.median(bounds, axis=0))
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        ends = zip(corners, corners[1:] + corners[:1], strict=True)
        items += [PlaceWall(a, b, z, height) for a, b in ends]
    items += [_median_anchor(anchors[label]) for label, count in sorted(rooms.items()) if 2 * count > len(plans)]
    return PlanRoom(tuple(items))


def _median(items: Sequence, value: Callable) -> float:
    return float(np.median([value(item) for item in items]))
