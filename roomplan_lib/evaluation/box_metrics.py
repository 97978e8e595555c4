"""How far predicted boxes lie from true ones: pair by pair, as sets, and ranked by confidence.

Lengths are metres, angles degrees; both boxes are in one frame, whichever. The same box has several descriptions (half
turns, and right angles with the level sides exchanged): every number here is the same for all of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from roomplan_lib.evaluation.bootstrap import weighted_mean
from roomplan_lib.geometry import OrientedBox, box_corners, box_iou_3d

THRESHOLDS = {"iou25": 0.25, "iou50": 0.5}
DISTANCES = {"25cm": 0.25, "50cm": 0.5}  # metres between centers, for things too thin for an IoU
CRITERIA = {name: {"least_iou": value} for name, value in THRESHOLDS.items()} | {
    name: {"most_distance": value} for name, value in DISTANCES.items()
}
AP3D_THRESHOLDS = tuple(0.05 * k for k in range(1, 11))  # Omni3D
NEARLY_SQUARE = 0.1  # |dx - dy| / max below which a right angle cannot be told
NO_MATCH = 1e6  # cost of a pair that may not be matched


# Pairs ----------------------------------------------------------------------------------------------------------------


def bounds_iou(a: OrientedBox, b: OrientedBox) -> float:
    """IoU of the axis-aligned bounds of two boxes: what ScanRefer and its successors call the IoU."""
    low_a, high_a, low_b, high_b = (f(box_corners(box), axis=0) for box in (a, b) for f in (np.min, np.max))
    shared = np.prod(np.maximum(np.minimum(high_a, high_b) - np.maximum(low_a, low_b), 0))
    union = np.prod(high_a - low_a) + np.prod(high_b - low_b) - shared
    return float(shared / union) if union > 0 else 0.0


def box_errors(predicted: OrientedBox, true: OrientedBox) -> dict[str, float]:
    """How far an upright box lies from the true one.

    center_error_m, horizontal_error_m, vertical_error_m: between the centers. extent_error_m: mean difference of the
    sides. ase: 1 - IoU of both boxes moved and turned onto each other. yaw_error_deg in [0, 90], or in [0, 45] where
    the true footprint is nearly square. iou_3d, and iou_bounds of the axis-aligned bounds.
    """
    offset = predicted.center - true.center
    # The two descriptions of a footprint: the one whose sides are nearer to the true ones is compared.
    sides = [predicted.extent, predicted.extent[[1, 0, 2]]]
    differences = [np.abs(side - true.extent).mean() for side in sides]
    turned = int(differences[1] < differences[0])
    shared = np.prod(np.minimum(sides[turned], true.extent))
    union = predicted.volume + true.volume - shared
    dx, dy = true.extent[:2]
    period = 90.0 if abs(dx - dy) < NEARLY_SQUARE * max(dx, dy) else 180.0
    yaw = math.degrees(predicted.yaw - true.yaw) + 90 * turned
    return {
        "center_error_m": float(np.linalg.norm(offset)),
        "horizontal_error_m": float(np.linalg.norm(offset[:2])),
        "vertical_error_m": float(abs(offset[2])),
        "extent_error_m": float(differences[turned]),
        "ase": float(1 - shared / union) if union > 0 else 0.0,
        "yaw_error_deg": abs((yaw + period / 2) % period - period / 2),
        "iou_3d": box_iou_3d(predicted, true),
        "iou_bounds": bounds_iou(predicted, true),
    }


def best_errors(predicted: OrientedBox, true: Sequence[OrientedBox]) -> dict[str, float]:
    """`box_errors` against the true box that it fits best, where several are right: largest IoU, then nearest."""
    assert true, "at least one true box"
    return max((box_errors(predicted, box) for box in true), key=lambda e: (e["iou_3d"], -e["center_error_m"]))


def normal_error_deg(predicted: Sequence[float], true: Sequence[float], *, directed: bool) -> float:
    """Angle between two normals. directed: of a surface, which has a front; a box's axis has none."""
    a, b = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return math.degrees(math.acos(np.clip(cosine if directed else abs(cosine), -1, 1)))


def scale_factor(predicted: np.ndarray, true: np.ndarray) -> float:
    """The factor on predicted centers [N, 3] that brings them nearest to the true ones (least squares); 1 for none.

    For centers in a reference frame whose origin both share. A factor that is not positive is no scale: 1.
    """
    square = float((predicted**2).sum())
    factor = float((predicted * true).sum()) / square if square > 0 else 1.0
    return factor if factor > 0 else 1.0


def scaled(box: OrientedBox, factor: float) -> OrientedBox:
    """The box with all lengths, also that from the origin, times `factor`."""
    return OrientedBox(box.center * factor, box.extent * factor, box.rotation, box.label, box.object_id)


# Sets -----------------------------------------------------------------------------------------------------------------


def cheapest_pairs(cost: np.ndarray) -> list[tuple[int, int]]:
    """(row, column) of as many pairs as possible at the smallest summed cost (Hungarian); none that costs NO_MATCH."""
    from scipy.optimize import linear_sum_assignment  # half of the time that importing figures would take

    pairs = zip(*linear_sum_assignment(cost), strict=True)
    return [(int(i), int(j)) for i, j in pairs if cost[i, j] < NO_MATCH]


def match_boxes(
    predicted: Sequence[OrientedBox],
    true: Sequence[OrientedBox],
    *,
    least_iou: float | None = None,
    most_distance: float | None = None,
) -> list[tuple[int, int]]:
    """(place in predicted, place in true) of boxes of one label that belong together; each box is in one pair at most.

    A pair needs an IoU of `least_iou`, or centers no farther apart than `most_distance` metres (give one of the two).
    """
    assert (least_iou is None) != (most_distance is None), "give least_iou or most_distance"
    cost = np.full((len(predicted), len(true)), NO_MATCH)
    for i, box in enumerate(predicted):
        for j, other in enumerate(true):
            if box.label != other.label:
                continue
            if least_iou is not None:
                iou = box_iou_3d(box, other)
                cost[i, j] = 1 - iou if iou >= least_iou else NO_MATCH
            elif (distance := np.linalg.norm(box.center - other.center)) <= most_distance:
                cost[i, j] = distance
    return cheapest_pairs(cost)


@dataclass(frozen=True)
class Counts:
    """How many things were predicted, how many there are, and how many of them were found."""

    predicted: float = 0
    true: float = 0
    found: float = 0

    @property
    def f1(self) -> float | None:
        """2 found / (predicted + true); None where there is neither."""
        total = self.predicted + self.true
        return 2 * self.found / total if total else None

    def scores(self) -> dict[str, float | None]:
        """precision, recall and f1; None where nothing was predicted, or nothing is there."""
        return {
            "precision": self.found / self.predicted if self.predicted else None,
            "recall": self.found / self.true if self.true else None,
            "f1": self.f1,
        }


def count_by_label(
    predicted: Sequence[OrientedBox], true: Sequence[OrientedBox], pairs: Sequence[tuple[int, int]]
) -> dict[str, Counts]:
    """Counts of each label of two sets of boxes and of their matched pairs."""
    labels = [[box.label for box in predicted], [box.label for box in true], [true[j].label for _, j in pairs]]
    return {label: Counts(*(part.count(label) for part in labels)) for label in dict.fromkeys(labels[0] + labels[1])}


@dataclass(frozen=True, eq=False)
class CountTable:
    """Counts by sample and label: `counts` [N, labels, 3] of predicted, true and found."""

    labels: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def of(cls, samples: Sequence[dict[str, Counts]]) -> CountTable:
        labels = sorted({label for sample in samples for label in sample})
        table = np.zeros((len(samples), len(labels), 3))
        for i, sample in enumerate(samples):
            for label, counts in sample.items():
                table[i, labels.index(label)] = counts.predicted, counts.true, counts.found
        return cls(tuple(labels), table)

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float | None]:
        """precision, recall and f1 pooled; macro_f1, the mean over the labels; sample_f1, the mean over the samples,
        those without anything on either side left out.

        weights: [N] how often each sample counts, once for None.
        """
        weights = np.ones(len(self.counts)) if weights is None else weights
        by_label = np.tensordot(weights, self.counts, axes=1)
        by_sample = [Counts(*row).f1 for row in self.counts.sum(axis=1)]
        return {
            **Counts(*by_label.sum(axis=0)).scores(),
            "macro_f1": mean_of_known([Counts(*row).f1 for row in by_label]),
            "sample_f1": weighted_mean(np.array(by_sample, dtype=np.float64), weights),
        }

    def by_label(self, weights: np.ndarray | None = None) -> dict[str, float | None]:
        """Pooled F1 of each label."""
        weights = np.ones(len(self.counts)) if weights is None else weights
        sums = np.tensordot(weights, self.counts, axes=1)
        return {label: Counts(*row).f1 for label, row in zip(self.labels, sums, strict=True)}


def set_items(
    predicted: Sequence[Sequence[OrientedBox]], true: Sequence[Sequence[OrientedBox]], *, least_extent: float = 0.0
) -> dict[str, CountTable]:
    """How many boxes of each sample and label were found, by what makes a match: iou25, iou50, and 25cm, 50cm between
    the centers.

    least_extent: metres that every side is brought up to first (SpatialLM: 0.1). Raises ValueError for no samples.
    """
    if len(predicted) != len(true) or not true:
        raise ValueError(f"expected as many predicted as true sets, at least one, got {len(predicted)}, {len(true)}")
    grown = [[[_grown(box, least_extent) for box in boxes] for boxes in part] for part in (predicted, true)]
    pairs = list(zip(*grown, strict=True))
    return {
        name: CountTable.of([count_by_label(*pair, match_boxes(*pair, **criterion)) for pair in pairs])
        for name, criterion in CRITERIA.items()
    }


def score_sets(
    predicted: Sequence[Sequence[OrientedBox]], true: Sequence[Sequence[OrientedBox]], *, least_extent: float = 0.0
) -> dict[str, dict]:
    """`CountTable.scores` of the boxes of all samples, and F1 `by_label`, for each criterion of `set_items`."""
    items = set_items(predicted, true, least_extent=least_extent)
    return {name: {**table.scores(), "by_label": table.by_label()} for name, table in items.items()}


def _grown(box: OrientedBox, least: float) -> OrientedBox:
    return OrientedBox(box.center, np.maximum(box.extent, least), box.rotation, box.label, box.object_id)


def mean_of_known(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are defined; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


# Ranked by confidence -------------------------------------------------------------------------------------------------


def average_precision(
    predicted: Sequence[Sequence[OrientedBox]],
    confidence: Sequence[Sequence[float]],
    true: Sequence[Sequence[OrientedBox]],
    least_ious: Sequence[float] = (0.25, 0.5),
    *,
    num_recalls: int | None = None,
) -> dict[float, dict[str, float]]:
    """Average precision by IoU and class; only classes that some scene truly has.

    predicted, true: the boxes of each scene; confidence: [as predicted] numbers, larger is surer. Over all scenes, in
    order of confidence, a box is right when the true box of its class that it overlaps most, of those not yet taken,
    has at least the IoU. The area lies under the precision that is made to fall with recall: all of it, or its mean
    at `num_recalls` recalls from 0 to 1 (Omni3D: 101).
    """
    ranked: dict[str, list[tuple[float, int, np.ndarray]]] = defaultdict(list)
    num_true: dict[str, int] = defaultdict(int)
    for scene, (boxes, sure, others) in enumerate(zip(predicted, confidence, true, strict=True)):
        for box in others:
            num_true[box.label] += 1
        for box, value in zip(boxes, sure, strict=True):
            ious = np.array([box_iou_3d(box, other) if other.label == box.label else -1.0 for other in others])
            ranked[box.label].append((value, scene, ious))
    result: dict[float, dict[str, float]] = {}
    for least in least_ious:
        result[least] = {}
        for label, count in sorted(num_true.items()):
            taken: set[tuple[int, int]] = set()
            right = []
            for _, scene, ious in sorted(ranked[label], key=lambda entry: -entry[0]):
                free = np.array([-1.0 if (scene, j) in taken else iou for j, iou in enumerate(ious)])
                best = int(free.argmax()) if len(free) else -1
                right.append(best >= 0 and free[best] >= least)
                if right[-1]:
                    taken.add((scene, best))
            result[least][label] = _area(np.array(right, dtype=bool), count, num_recalls)
    return result


def mean_ap(by_class: dict[str, float]) -> float | None:
    """Mean over the classes."""
    return mean_of_known(list(by_class.values()))


def ap3d(
    predicted: Sequence[Sequence[OrientedBox]],
    confidence: Sequence[Sequence[float]],
    true: Sequence[Sequence[OrientedBox]],
) -> float | None:
    """Omni3D's AP3D: mean over classes and IoU 0.05, 0.10, ... 0.50 of the precision at 101 recalls."""
    tables = average_precision(predicted, confidence, true, AP3D_THRESHOLDS, num_recalls=101)
    return mean_of_known([mean_ap(by_class) for by_class in tables.values()])


def _area(right: np.ndarray, count: int, num_recalls: int | None) -> float:
    if not len(right):
        return 0.0
    found = np.cumsum(right)
    precision = np.maximum.accumulate((found / np.arange(1, len(right) + 1))[::-1])[::-1]
    recall = found / count
    if num_recalls is None:
        return float((np.diff(recall, prepend=0.0) * precision).sum())
    place = np.searchsorted(recall, np.linspace(0, 1, num_recalls) - 1e-12)
    return float(np.where(place < len(precision), precision[np.minimum(place, len(precision) - 1)], 0.0).mean())
