"""Scores of the ScanNet benchmarks: ScanRefer, Multi3DRefer, Scan2Cap and SQA3D, as their own evaluations count.

Boxes are compared by the IoU of their axis-aligned bounds in the scan's aligned frame, as the published evaluators do.
Acc, F1 and EM are fractions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from roomplan_lib.evaluation.box_metrics import THRESHOLDS, bounds_iou, cheapest_pairs
from roomplan_lib.evaluation.text_metrics import (
    answer_items,
    caption_items,
    check_texts,
    meteor_entry,
    set_scores,
    tokenize,
    totals,
)
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples.sqa3d import question_type

# Objects named by number ----------------------------------------------------------------------------------------------


def named_objects(text: str, num_objects: int, *, parity: bool = False, any_number: bool = False) -> list[int]:
    """The numbers below `num_objects` of the `<OBJ012>` in a text, in order, each once.

    parity: as often as they stand there, as GPT4Scene counts. any_number: every whole number counts unless it numbers
    an image or a line ("Image 3", "2."), which is how answers are read of models that never learned the markers.
    """
    if any_number:
        text = re.sub(r"Img_[0-9]+|Image [0-9]+|[0-9]+\.", "", text)
    found = re.findall(r"[0-9]{1,9}" if any_number else r"<OBJ([0-9]{3})>", text)
    numbers = [int(number) for number in found if int(number) < num_objects]
    return numbers if parity else list(dict.fromkeys(numbers))


def referred_object(text: str, num_objects: int, *, parity: bool = False) -> int | None:
    """The first object that a text names; None where it names none.

    parity: object 0 instead of None, as GPT4Scene guesses.
    """
    named = named_objects(text, num_objects)
    return named[0] if named else 0 if parity else None


# ScanRefer ------------------------------------------------------------------------------------------------------------


def score_scanrefer(
    predictions: Sequence[OrientedBox | None], references: Sequence[OrientedBox], unique: Sequence[bool]
) -> dict:
    """acc_iou25 and acc_iou50 of all descriptions, and under `unique` and `multiple` those of objects that are the only
    one of their class in the scan and of the others (None without any); num_samples beside each.

    predictions: a box, or None where the model gave none, which counts as wrong.
    """
    _same_length(predictions=predictions, references=references, unique=unique)
    ious = np.array(
        [0.0 if box is None else bounds_iou(box, truth) for box, truth in zip(predictions, references, strict=True)]
    )
    alone = np.array(unique, dtype=bool)

    def accuracy(part: np.ndarray) -> dict:
        shares = {f"acc_{name}": _mean(ious[part] >= least) for name, least in THRESHOLDS.items()}
        return shares | {"num_samples": int(part.sum())}

    return {**accuracy(np.ones(len(ious), dtype=bool)), "unique": accuracy(alone), "multiple": accuracy(~alone)}


# Multi3DRefer ---------------------------------------------------------------------------------------------------------


def score_multi3drefer(
    predictions: Sequence[Sequence[OrientedBox]],
    references: Sequence[Sequence[OrientedBox]],
    eval_types: Sequence[str],
) -> dict:
    """f1_iou25 and f1_iou50: mean over the descriptions of `query_f1`; `by_type` holds them and num_samples for each
    eval_type (zt_wo_d, zt_w_d, st_wo_d, st_w_d, mt)."""
    _same_length(predictions=predictions, references=references, eval_types=eval_types)
    scores = np.array(
        [
            [query_f1(*pair, least) for least in THRESHOLDS.values()]
            for pair in zip(predictions, references, strict=True)
        ]
    )

    def means(part: list[int]) -> dict:
        named = zip(THRESHOLDS, scores[part].mean(axis=0), strict=True)
        return {**{f"f1_{name}": float(value) for name, value in named}, "num_samples": len(part)}

    groups: dict[str, list[int]] = defaultdict(list)
    for i, kind in enumerate(eval_types):
        groups[kind].append(i)
    return {**means(list(range(len(scores)))), "by_type": {kind: means(part) for kind, part in sorted(groups.items())}}


def query_f1(predicted: Sequence[OrientedBox], true: Sequence[OrientedBox], least_iou: float) -> float:
    """2 TP / (predicted + true) of one description.

    The pairs are those of the largest summed IoU; one of at least `least_iou` is right. Where nothing is meant, saying
    nothing scores 1 and anything else 0.
    """
    if not predicted or not true:
        return float(not predicted and not true)
    ious = np.array([[bounds_iou(box, other) for other in true] for box in predicted])
    right = sum(ious[pair] >= least_iou for pair in cheapest_pairs(-ious))
    return float(2 * right / (len(predicted) + len(true)))


# Scan2Cap -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionProtocol:
    """How captions are scored: `tokens` makes a token string of a text, and `reached(iou, least)` says which boxes are
    good enough."""

    description: str
    tokens: Callable[[str], str]
    reached: Callable[[float, float], bool]


MAX_WORDS = 30  # of a description in Scan2Cap's own corpus


def _padded(text: str) -> str:
    return text.replace(".", " . ").replace(",", " , ").lower()


CAPTION_PROTOCOLS = {
    "chat-scene": CaptionProtocol("PTB tokens, IoU >= k (Chat-Scene, GPT4Scene)", tokenize, lambda iou, k: iou >= k),
    "scan2cap-official": CaptionProtocol(
        f"tokens between blanks, the first {MAX_WORDS}, IoU > k (Scan2Cap)",
        lambda text: " ".join(text.lower().split()[:MAX_WORDS]),
        lambda iou, k: iou > k,
    ),
    "vgllm": CaptionProtocol(
        "tokens between blanks, full stops and commas apart, IoU >= k (VG-LLM)", _padded, lambda iou, k: iou >= k
    ),
}


def score_scan2cap(
    predictions: Mapping[str, tuple[str, float]],
    corpus: Mapping[str, Sequence[str]],
    *,
    least_iou: float = 0.5,
    protocol: str = "chat-scene",
    meteor: bool = True,
    scenes: Sequence[str] | None = None,
) -> dict:
    """bleu_1 to bleu_4, rouge_l, cider and, as in `text_metrics.score`, meteor of captions: m@kIoU, k = `least_iou`.

    predictions: by object (such as "scene0011_00|3") the caption and the IoU of the box it was made for with the true
    one. corpus: by object its reference captions. scenes: the scene of each object of the corpus, in its order, for
    `with_intervals`. Every object of the corpus counts: one without a caption, or with its box in the wrong place,
    scores as the empty caption. All captions get the words "sos" and "eos" around them, which score too.
    Raises ValueError for an unknown protocol, an empty corpus or a prediction for another object.
    """
    if protocol not in CAPTION_PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(CAPTION_PROTOCOLS)}, got {protocol!r}")
    if unknown := sorted(set(predictions) - set(corpus)):
        raise ValueError(f"captions for objects that the corpus does not have: {', '.join(map(str, unknown[:3]))}")
    rules = CAPTION_PROTOCOLS[protocol]
    said = [
        predictions[key][0] if key in predictions and rules.reached(predictions[key][1], least_iou) else ""
        for key in corpus
    ]
    check_texts(said, list(corpus.values()))
    said = [_framed(rules, caption) for caption in said]
    wanted = [[_framed(rules, caption) for caption in captions] for captions in corpus.values()]
    result = set_scores(caption_items(said, wanted), scenes) | {"protocol": protocol}
    return result | (meteor_entry(said, wanted) if meteor else {})


def _framed(rules: CaptionProtocol, caption: str) -> str:
    """Tokens of "sos caption eos", whether the caption has the two words around it already or not."""
    bare = re.sub(r"^\s*sos\b|\beos\s*$", "", caption.replace("\n", " "))
    return " ".join(f"sos {rules.tokens(bare)} eos".split())


# SQA3D ----------------------------------------------------------------------------------------------------------------


def score_sqa3d(
    predictions: Sequence[str], references: Sequence[Sequence[str]], questions: Sequence[str], protocol: str = "leo"
) -> dict:
    """Scores of answers by `text_metrics` under `protocol`, and em, em_refined and num_samples `by_type` of question.

    The types are what, is, how, can, which and other, by how the question starts.
    """
    _same_length(predictions=predictions, questions=questions)
    items = answer_items(predictions, references, protocol)
    return {
        **totals(items),
        "num_samples": len(predictions),
        "protocol": protocol,
        "by_type": group_means(items, [question_type(question) for question in questions]),
    }


def group_means(items: dict[str, np.ndarray], groups: Sequence[str]) -> dict[str, dict]:
    """em, em_refined and num_samples of each group of answers, by its name."""
    names = np.array([str(group) for group in groups])
    return {
        str(name): {
            **{key: float(items[key][names == name].mean()) for key in ("em", "em_refined")},
            "num_samples": int((names == name).sum()),
        }
        for name in np.unique(names)
    }


def score_localization(
    positions: Sequence[np.ndarray],
    yaws: Sequence[np.ndarray],
    true_positions: np.ndarray,
    true_yaws: np.ndarray,
) -> dict:
    """Shares of situations placed right: acc_0.5m, acc_1m (horizontal distance) and acc_15deg, acc_30deg (heading).

    positions: per situation [<= 3, 2 or 3] guesses in metres; yaws: [<= 3] guesses in radians. The best guess counts,
    for position and heading apart, as in SQA3D. Raises ValueError for none or more than three guesses.
    """
    _same_length(positions=positions, yaws=yaws, true_positions=true_positions, true_yaws=true_yaws)
    distances, turns = [], []
    for place, yaw, true_place, true_yaw in zip(positions, yaws, true_positions, true_yaws, strict=True):
        if not 1 <= len(place) <= 3 or not 1 <= len(yaw) <= 3:
            raise ValueError(f"expected one to three guesses, got {len(place)} positions and {len(yaw)} headings")
        distances.append(np.linalg.norm(np.asarray(place)[:, :2] - np.asarray(true_place)[:2], axis=1).min())
        turns.append(np.abs((np.asarray(yaw) - true_yaw + np.pi) % (2 * np.pi) - np.pi).min())
    distances, turns = np.array(distances), np.degrees(turns)
    return {
        "acc_0.5m": _mean(distances < 0.5),
        "acc_1m": _mean(distances < 1.0),
        "acc_15deg": _mean(turns < 15),
        "acc_30deg": _mean(turns < 30),
        "num_samples": len(distances),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _same_length(**parts: Sequence) -> None:
    lengths = {name: len(part) for name, part in parts.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(f"expected as many of each and at least one, got {lengths}")
