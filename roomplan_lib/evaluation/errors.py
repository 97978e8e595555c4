"""What went wrong, row by row: a table of a predictions file with sizes, distances, errors and one class of failure.

Works from the file alone; scenes add what their views show and the objects that nobody asked for. What cannot be known
is NaN (numbers) or "" (texts): rows without geometry keep their texts, errors of texts in one frame, and no more.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import shapely

from roomplan_lib.actions import (
    ActionError,
    ActionList,
    NoAction,
    PlaceAnchor,
    PlanRoom,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.evaluation.bootstrap import weighted_median, with_intervals
from roomplan_lib.evaluation.box_metrics import box_errors, match_boxes, scale_factor
from roomplan_lib.evaluation.layout_metrics import (
    PLANE_M,
    SAME_PLANE_DEG,
    SAME_PLANE_M,
    is_plane,
    layout_rectangles,
    match_rectangles,
    plane_rectangle,
    rectangle_iou,
    same_plane,
)
from roomplan_lib.evaluation.scores import (
    QA_PROTOCOL,
    ActionAnswer,
    is_action_row,
    read_actions,
    read_predictions,
)
from roomplan_lib.evaluation.text_metrics import PROTOCOLS
from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox, box_iou_3d, project
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, pixels_in_boxes
from roomplan_lib.scenes import Scene

RIGHT_IOU = 0.25
NEAR_M = 0.3  # between centers: a box this near to another object is on it
SAME_OBJECT_M = 0.02  # centers this near along every axis are one object, named twice
SCALE_OFF = 1.1  # a factor on lengths that is nearer to 1 is no wrong scale
ROUNDING = 1e-9  # of an IoU or a distance that is at its threshold

# Classes of each section, in the order in which they are tried: the first that holds is a row's only one.
_ACTION_CLASSES = {
    "right": "",
    "invalid text": "no action of the language",
    "refused": "says that there is nothing to place",
    "other action": "an action, but not the one asked for",
}
CLASSES: dict[str, dict[str, str]] = {
    "anchors": _ACTION_CLASSES
    | {
        "right": f"IoU with the true box of at least {RIGHT_IOU}",
        "wrong object": f"on another object of the room: IoU of at least {RIGHT_IOU} with it, or a centre within "
        f"{NEAR_M} m of that one's and farther from the true one",
        "wrong category": "names another category than was asked for",
        "wrong scale": f"on the ray from the reference camera to the truth: the centre, or all lengths, times one "
        f"factor, at least {round(100 * (SCALE_OFF - 1))} % off 1, reach that IoU",
        "mirrored": "reaches it with left and right exchanged, or ahead and behind, or both, or x and y",
        "wrong yaw": "reaches it when only turned to the true yaw, and no other single repair brings more",
        "wrong size": "reaches it when only given the true size, and no other single repair brings more",
        "wrong place": "reaches it when only moved onto the true centre, and no other single repair brings more",
        "several": "no single repair of scale, axes, yaw, size or place reaches it",
    },
    "planes": _ACTION_CLASSES
    | {
        "right": f"in the true plane, and there IoU of at least {RIGHT_IOU} with the true rectangle",
        "wrong category": f"names a category; a plane has none and is thinner than {PLANE_M} m",
        "wrong plane": f"{SAME_PLANE_DEG:g} degrees or {SAME_PLANE_M} m out of the true plane, or more",
        "wrong rectangle": "in the true plane, at another place or of another size",
    },
    "lists": _ACTION_CLASSES
    | {
        "right": f"every object found (IoU of at least {RIGHT_IOU}, same category) and nothing else placed",
        "doubled": "at least one box too many lies on an object that is already placed",
        "missing and extra": "objects are missing and others are placed where none is",
        "missing": "objects are missing",
        "extra": "boxes are placed where no object is",
    },
    "refusals": {
        "right": "refuses, as it should",
        "invalid text": "no action of the language",
        "placed": "does something about what is not there",
    },
    "edits": {
        "right": "the action asked for, to the last digit",
        "invalid text": "no action of the language",
        "wrong verb": "another kind of action",
        "wrong arguments": "the right kind of action about something else, or with other numbers",
    },
    "questions": {
        "right": f"exact match ({QA_PROTOCOL})",
        "more words": "the right answer within more words, at most twice its length",
        "empty": "no answer",
        "other kind": "yes or no, a number, words: another kind of answer than any right one",
        "wrong yes or no": "the other one",
        "wrong number": "another number",
        "wrong words": "other words",
    },
    "captions": {"empty": "no caption", "written": "a caption; Scan2Cap's scores tell how good"},
    "hidden": {"unscored": "the answer is not in the file"},
}
CLASSES["plans"] = CLASSES["lists"] | {
    "right": f"every wall, door, window and object found (IoU of at least {RIGHT_IOU}) and nothing else placed"
}

NUMBERS = (
    "distance_m", "longest_side_m", "volume_m3", "num_views", "in_view_share", "visible_share", "visible_pixels",
    "num_others", "confidence", "hit", "iou_3d", "center_error_m", "horizontal_error_m", "vertical_error_m",
    "extent_error_m", "yaw_error_deg", "size_ratio", "scale", "em", "em_refined", "num_true", "num_predicted",
    "num_found", "num_missing", "num_extra", "num_doubled",
)  # fmt: skip
MEDIANS = ("center_error_m", "horizontal_error_m", "vertical_error_m", "extent_error_m")  # metres without a limit
TEXTS = (
    "scene_id", "task", "section", "failure", "category", "predicted_category", "question_type", "answer_kind",
    "eval_type",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """A predictions file as columns [N], in the file's order; see `error_table` for what they are."""

    rows: list[dict]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def select(self, kept: np.ndarray) -> ErrorTable:
        """The rows that `kept` names, [N] bool or places, in its order."""
        places = np.arange(len(self))[kept]
        return ErrorTable([self.rows[i] for i in places], {k: values[places] for k, values in self.columns.items()})

    def section(self, name: str) -> ErrorTable:
        """The rows of one section of CLASSES."""
        return self.select(self["section"] == name)

    @property
    def sections(self) -> list[str]:
        """The sections that have rows, in the order of CLASSES."""
        return [name for name in CLASSES if (self["section"] == name).any()]

    def known(self, name: str) -> bool:
        """Whether any row knows this column."""
        values = self[name]
        return bool((values != "").any() if values.dtype == object else np.isfinite(values).any())


def read_error_table(path: str | Path, scenes: Mapping[str, Scene] | None = None) -> ErrorTable:
    """`error_table` of a predictions file.

    Raises ValueError, with file and line where there is one, for a file that is missing, empty or cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such predictions file; predict first (roomplan predict STAGE.yaml)")
    rows = read_predictions(path)
    if not rows:
        raise ValueError(f"{path}: holds no prediction; predict again")
    return error_table(rows, scenes)


def error_table(rows: Sequence[dict], scenes: Mapping[str, Scene] | None = None) -> ErrorTable:
    """One row per prediction. Lengths in metres, angles in degrees; NaN and "" where nothing is known.

    scene_id, task, section (a key of CLASSES), failure (its class), eval_type; hit: 1 where the class is right.
    Single anchors: category, predicted_category, distance_m of the true centre from the reference camera,
    longest_side_m and volume_m3 of the true box, the errors of `box_metrics.box_errors`, size_ratio (cube root of
    predicted over true volume), scale (the factor on the predicted centre that brings it nearest), confidence,
    num_others (other objects of the room that are known). Lists and plans: num_true, num_predicted, num_found,
    num_missing, num_extra (no true one, doubled included) and num_doubled. Questions: question_type (what the row says,
    else the first word), answer_kind of the reference, em and em_refined. All: num_views.
    With scenes (by id): visible_pixels, of the true box in the view that shows most of it (of 256x192, by depth),
    visible_share, the share of the row's views with MIN_VISIBLE_PIXELS of it, in_view_share, the share whose picture
    holds its centre, hidden or not.

    Raises ValueError for rows that `scores.read_actions` refuses.
    """
    rows, scenes = list(rows), scenes or {}
    table = ErrorTable(rows, {name: np.full(len(rows), math.nan) for name in NUMBERS})
    for name in TEXTS:
        table.columns[name] = np.full(len(rows), "", dtype=object)
    is_action = [is_action_row(row) for row in rows]
    answers = read_actions([row for row, kept in zip(rows, is_action, strict=True) if kept])
    by_place = dict(zip(np.flatnonzero(is_action).tolist(), answers, strict=True))
    for place, row in enumerate(rows):
        values: dict = {name: str(row.get(name) or "") for name in ("scene_id", "task", "eval_type")}
        values["num_views"] = len(row["view_ids"]) if row.get("view_ids") else math.nan
        values |= _action_values(by_place[place]) if place in by_place else _text_values(row)
        for name, value in values.items():
            table.columns[name][place] = value
    _add_anchor_failures(table, by_place, _Objects(answers, scenes))
    _add_visibility(table, by_place, scenes)
    for section, classes in CLASSES.items():
        part = table["section"] == section
        assert set(table["failure"][part]) <= set(classes), section
        if "right" in classes:
            table["hit"][part] = table["failure"][part] == "right"
    return table


# Actions --------------------------------------------------------------------------------------------------------------


def _action_values(answer: ActionAnswer) -> dict:
    action, true, section = answer.action, answer.true, answer.section
    if section == "anchors":
        return _anchor_values(answer)
    if section in ("lists", "plans"):
        return {"section": section} | _set_values(answer)
    if isinstance(true, NoAction):
        failure = _unreadable(action) or ("right" if isinstance(action, NoAction) else "placed")
        return {"section": "refusals", "failure": failure}
    failure = _unreadable(action)
    if not failure:
        same = not isinstance(action, ActionError) and _written(action) == _written(true)
        failure = "right" if same else "wrong arguments" if action.verb == true.verb else "wrong verb"
    return {"section": "edits", "failure": failure}


def _unreadable(action) -> str:
    return "invalid text" if isinstance(action, ActionError) else ""


def _written(action) -> str:
    return format_action(canonical(action.bound("")))


def _anchor_values(answer: ActionAnswer) -> dict:
    """What one anchor or plane tells; without a class where `anchor_failures` has to find it."""
    row, action, true = answer.row, answer.action, answer.true
    box = true.to_box()
    values = {"section": "planes" if is_plane(true) else "anchors", "category": true.category, "iou_3d": 0.0}
    values |= {"longest_side_m": float(box.extent.max()), "volume_m3": box.volume}
    framed = "reference_action" in row  # then the texts are in the frame of the first view, else in any
    if framed:
        values["distance_m"] = float(np.linalg.norm(box.center))
    confidence = row.get("confidence")
    if isinstance(confidence, list) and len(confidence) == 1:
        values["confidence"] = float(confidence[0])
    if isinstance(action, ActionError):
        return values | {"failure": "invalid text"}
    if isinstance(action, NoAction) or isinstance(action, ActionList | PlanRoom) and not action.actions:
        return values | {"failure": "refused"}
    if not isinstance(action, PlaceAnchor):
        return values | {"failure": "other action"}
    predicted = action.to_box()
    values |= {name: value for name, value in box_errors(predicted, box).items() if name in NUMBERS}
    values |= {"predicted_category": action.category, "size_ratio": float(np.cbrt(predicted.volume / box.volume))}
    if framed:
        values["scale"] = scale_factor(predicted.center[None], box.center[None])
    return values | ({"failure": _plane_failure(action, true)} if is_plane(true) else {})


def _add_anchor_failures(table: ErrorTable, answers: dict[int, ActionAnswer], objects: _Objects) -> None:
    anchors = {place: answer for place, answer in answers.items() if table["section"][place] == "anchors"}
    for place, answer in anchors.items():
        if objects.true_box(answer):
            table["num_others"][place] = len(objects.others(answer))
    kept = {place: answer for place, answer in anchors.items() if not table["failure"][place]}
    if not kept:
        return
    on_other = np.zeros(len(table), dtype=bool)
    in_scene = {place: _record_boxes(answer.row.get("action")) for place, answer in kept.items()}
    located = [place for place in kept if objects.true_box(kept[place]) and len(in_scene[place]) == 1]
    on_other[located] = _on_other(
        [in_scene[place][0] for place in located],
        [objects.true_box(kept[place]) for place in located],
        [objects.others(kept[place]) for place in located],
    )
    places = list(kept)
    table["failure"][places] = anchor_failures(
        np.array([_upright(answer.action.to_box()) for answer in kept.values()]),
        np.array([_upright(answer.true.to_box()) for answer in kept.values()]),
        framed=np.isfinite(table["distance_m"][places]),
        on_other=on_other[places],
        same_category=table["category"][places] == table["predicted_category"][places],
    )


def _plane_failure(predicted: PlaceAnchor, true: PlaceAnchor) -> str:
    if predicted.category:
        return "wrong category"
    pair = plane_rectangle(predicted), plane_rectangle(true)
    if not same_plane(*pair):
        return "wrong plane"
    return "right" if rectangle_iou(*pair) >= RIGHT_IOU - ROUNDING else "wrong rectangle"


def anchor_failures(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    framed: np.ndarray | bool = True,
    on_other: np.ndarray | bool = False,
    same_category: np.ndarray | bool = True,
) -> np.ndarray:
    """[N] the class of CLASSES["anchors"] of predicted upright boxes; those before "wrong object" but "right" are not
    among them.

    predicted, true: [N, 7] center, extent (metres) and yaw (radians) of both, in one frame. framed: [N] that frame is
    the reference frame, its origin the first camera; else scale and axes cannot be told. on_other: [N] the box lies on
    another object. same_category: [N] the category is the one asked for.
    """
    count = len(true)
    framed, on_other, same_category = (np.broadcast_to(a, count) for a in (framed, on_other, same_category))
    x, y, z, dx, dy, dz, yaw = predicted.T
    _, _, _, tx, ty, tz, tyaw = true.T
    # Of the two descriptions of a footprint the one whose sides are nearer to the true ones, as in `box_errors`.
    turned = np.abs(dy - tx) + np.abs(dx - ty) < np.abs(dx - tx) + np.abs(dy - ty)
    dx, dy, yaw = np.where(turned, dy, dx), np.where(turned, dx, dy), np.where(turned, yaw + np.pi / 2, yaw)

    def best(*candidates: tuple) -> np.ndarray:
        return np.max([upright_ious(np.stack(boxes, axis=1), true) for boxes in candidates], axis=0, initial=0.0)

    along = np.einsum("ni,ni->n", predicted[:, :3], predicted[:, :3])
    factor = np.einsum("ni,ni->n", predicted[:, :3], true[:, :3]) / np.where(along > 0, along, np.inf)
    scaled = factor > 0
    f = np.where(scaled, factor, 1.0)
    scaled &= np.maximum(f, 1 / f) >= SCALE_OFF - ROUNDING
    mirrors = [(-x, y, -yaw), (x, -y, -yaw), (-x, -y, yaw), (y, x, np.pi / 2 - yaw)]
    repairs = {
        "wrong yaw": best((x, y, z, dx, dy, dz, tyaw)),
        "wrong size": best((x, y, z, tx, ty, tz, yaw)),
        "wrong place": best((*true[:, :3].T, dx, dy, dz, yaw)),
    }
    most = np.max(list(repairs.values()), axis=0)
    rules = {
        "right": upright_ious(predicted, true),
        "wrong object": on_other,
        "wrong category": ~same_category,
        "wrong scale": framed
        * scaled
        * best((f * x, f * y, f * z, dx, dy, dz, yaw), (f * x, f * y, f * z, f * dx, f * dy, f * dz, yaw)),
        "mirrored": framed * best(*((a, b, z, dx, dy, dz, c) for a, b, own in mirrors for c in (own, yaw))),
        **{name: np.where(iou == most, iou, 0.0) for name, iou in repairs.items()},
    }
    holds = [values if values.dtype == bool else values >= RIGHT_IOU - ROUNDING for values in rules.values()]
    return np.select(holds, list(rules), "several").astype(object)


def upright_ious(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[N] IoU of upright boxes [N, 7] (center, extent, yaw), pair by pair: `box_iou_3d` for many at once."""
    low = np.maximum(a[:, 2] - a[:, 5] / 2, b[:, 2] - b[:, 5] / 2)
    height = np.minimum(a[:, 2] + a[:, 5] / 2, b[:, 2] + b[:, 5] / 2) - low
    reach = (np.hypot(a[:, 3], a[:, 4]) + np.hypot(b[:, 3], b[:, 4])) / 2
    near = (height > 0) & (np.hypot(*(a[:, :2] - b[:, :2]).T) < reach)
    footprints = []
    for boxes in (a[near], b[near]):
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2 * boxes[:, None, 3:5]
        c, s = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
        corners = np.stack([c * signs[..., 0] - s * signs[..., 1], s * signs[..., 0] + c * signs[..., 1]], axis=-1)
        footprints.append(shapely.polygons(corners + boxes[:, None, :2] - b[near, None, :2]))
    shared = np.zeros(len(a))
    shared[near] = shapely.area(shapely.intersection(*footprints)) * height[near]
    union = a[:, 3:6].prod(axis=1) + b[:, 3:6].prod(axis=1) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0)


def _upright(box: OrientedBox) -> np.ndarray:
    return np.array([*box.center, *box.extent, box.yaw])


def _on_other(boxes: list[OrientedBox], true: list[OrientedBox], others: list[list[OrientedBox]]) -> np.ndarray:
    """[N] bool: whether a box lies on one of the other objects of its room, all in the scene's frame."""
    index = np.repeat(np.arange(len(boxes)), [len(part) for part in others])
    flat = [box for part in others for box in part]
    if not flat:
        return np.zeros(len(boxes), dtype=bool)
    centers = np.array([box.center for box in boxes])
    distance = np.linalg.norm(centers - [box.center for box in true], axis=1)
    between = np.linalg.norm(centers[index] - [box.center for box in flat], axis=1)
    on = (between <= NEAR_M + ROUNDING) & (between < distance[index])
    level = np.array([box.rotation[2, 2] > 0.9999 for box in flat])
    rows = np.array([_upright(box) for box in boxes])[index[level]], np.array([_upright(box) for box in flat])[level]
    on[level] |= upright_ious(*rows) >= RIGHT_IOU - ROUNDING
    for k in np.flatnonzero(~level):
        on[k] |= box_iou_3d(boxes[index[k]], flat[k]) >= RIGHT_IOU - ROUNDING
    return np.bincount(index, on, len(boxes)) > 0


def _record_boxes(action: dict | list | None) -> list[OrientedBox]:
    read = parse_action(json.dumps(action), None) if action else ActionError("")
    parts = read.actions if isinstance(read, ActionList | PlanRoom) else (read,)
    return [part.to_box() for part in parts if isinstance(part, PlaceAnchor)]


class _Objects:
    """The objects of each room in its own frame: of its scene where that is given, and those that rows ask for."""

    def __init__(self, answers: Sequence[ActionAnswer], scenes: Mapping[str, Scene]) -> None:
        self._true: dict[int, OrientedBox] = {}
        self._boxes: dict[str, list[OrientedBox]] = defaultdict(list)
        for scene_id in {answer.scene_id for answer in answers} & set(scenes):
            self._boxes[scene_id] = list(scenes[scene_id].boxes)
        self._centers = {name: np.array([b.center for b in part]) for name, part in self._boxes.items() if part}
        for answer in answers:
            boxes = _record_boxes(answer.row.get("reference_action"))
            if answer.section == "anchors" and len(boxes) == 1:
                self._true[id(answer.row)] = boxes[0]
            for box in boxes:
                if box.label and self._apart(answer.scene_id, box).all():  # planes have no label and are no objects
                    self._boxes[answer.scene_id].append(box)
                    known = self._centers.get(answer.scene_id, np.zeros((0, 3)))
                    self._centers[answer.scene_id] = np.vstack([known, box.center])

    def _apart(self, scene_id: str, box: OrientedBox) -> np.ndarray:
        """[N] bool: which objects of the room are other ones than this."""
        known = self._centers.get(scene_id, np.zeros((0, 3)))
        return np.abs(known - box.center).max(axis=1, initial=0.0) > SAME_OBJECT_M

    def true_box(self, answer: ActionAnswer) -> OrientedBox | None:
        """The box asked for, in the scene's frame; None where the row does not hold it."""
        return self._true.get(id(answer.row))

    def others(self, answer: ActionAnswer) -> list[OrientedBox]:
        """The other objects of the room; none where the row does not tell where its own is in the scene."""
        true = self.true_box(answer)
        if true is None:
            return []
        return [self._boxes[answer.scene_id][i] for i in np.flatnonzero(self._apart(answer.scene_id, true))]


def _set_values(answer: ActionAnswer) -> dict:
    """Counts and class of a list of anchors or a plan."""
    action = answer.action
    predicted, true = answer.boxes()
    pairs = match_boxes(predicted, true, least_iou=RIGHT_IOU)
    taken = {i for i, _ in pairs}
    doubled = _num_doubled(predicted, taken)
    num_found, num_predicted, num_true = len(pairs), len(predicted), len(true)
    if answer.section == "plans":
        walls = [layout_rectangles(plan)[0] if isinstance(plan, PlanRoom) else [] for plan in (action, answer.true)]
        matched = match_rectangles(*walls, RIGHT_IOU)
        num_found, num_predicted = num_found + len(matched), num_predicted + len(walls[0])
        num_true += len(walls[1])
    values = {
        "num_true": num_true,
        "num_predicted": num_predicted,
        "num_found": num_found,
        "num_missing": num_true - num_found,
        "num_extra": num_predicted - num_found,
        "num_doubled": doubled,
    }
    labels = {box.label for box in true}
    values["category"] = labels.pop() if len(labels) == 1 else ""
    fits = PlanRoom if answer.section == "plans" else ActionList | PlaceAnchor | NoAction
    if isinstance(action, ActionError):
        failure = "invalid text"
    elif not values["num_missing"] and not values["num_extra"] and isinstance(action, fits):
        failure = "right"
    elif isinstance(action, NoAction) or num_predicted == 0:
        failure = "refused"
    elif not isinstance(action, fits):
        failure = "other action"
    elif doubled:
        failure = "doubled"
    else:
        failure = " and ".join(name for name in ("missing", "extra") if values[f"num_{name}"])
    return values | {"failure": failure}


def _num_doubled(predicted: Sequence[OrientedBox], matched: set[int]) -> int:
    """How many boxes lie on one of their own category that comes before them, matched ones first."""
    order = sorted(range(len(predicted)), key=lambda i: (i not in matched, i))
    count = 0
    for place, i in enumerate(order):
        if i not in matched:
            before = (predicted[j] for j in order[:place])
            count += any(b.label == predicted[i].label and box_iou_3d(b, predicted[i]) >= RIGHT_IOU for b in before)
    return count


def _add_visibility(table: ErrorTable, answers: dict[int, ActionAnswer], scenes: Mapping[str, Scene]) -> None:
    groups: dict[tuple[str, tuple], list[tuple[int, OrientedBox]]] = defaultdict(list)
    for place, answer in answers.items():
        view_ids, boxes = answer.row.get("view_ids"), _record_boxes(answer.row.get("reference_action"))
        if answer.section == "anchors" and view_ids and len(boxes) == 1 and answer.scene_id in scenes:
            groups[answer.scene_id, tuple(view_ids)].append((place, boxes[0]))
    for (scene_id, view_ids), part in groups.items():
        scene = scenes[scene_id]
        by_id = {view.view_id: view for view in scene.views}
        views = [by_id[view_id] for view_id in view_ids if view_id in by_id]
        if len(views) != len(view_ids) or not all(view.posed for view in views):
            continue
        places = [place for place, _ in part]
        centers = np.array([box.center for _, box in part])
        inside = []
        for view in views:
            pixels, z = project(centers, view.K, view.camera_to_world)
            sides = (pixels >= -0.5) & (pixels <= [view.width - 0.5, view.height - 0.5])
            inside.append((z > 0) & sides.all(axis=1))
        table["in_view_share"][places] = np.mean(inside, axis=0)
        if all(view.depth_path is not None for view in views):
            pixels = pixels_in_boxes(replace(scene, boxes=[box for _, box in part]), views)
            table["visible_pixels"][places] = pixels.max(axis=0)
            table["visible_share"][places] = (pixels >= MIN_VISIBLE_PIXELS).mean(axis=0)


# Answers in words -----------------------------------------------------------------------------------------------------


def _text_values(row: dict) -> dict:
    text = row["prediction"]
    references = row.get("answers")
    references = [row["reference"]] * bool(row["reference"].strip()) if references is None else references
    kind = str(row.get("question_type") or "") or first_word(str(row["question"]))
    values = {"question_type": kind}
    if row.get("task") == "scan2cap":
        return values | {"section": "captions", "failure": "written" if text.strip() else "empty"}
    if not references:
        return values | {"section": "hidden", "failure": "unscored"}
    rules = PROTOCOLS[QA_PROTOCOL]
    em, refined = rules.match(rules.answer(text), [rules.reference(reference) for reference in references])
    kinds = [answer_kind(reference) for reference in references]
    values |= {"section": "questions", "em": float(em), "em_refined": float(refined), "answer_kind": kinds[0]}
    if em:
        failure = "right"
    elif refined:
        failure = "more words"
    elif not text.strip():
        failure = "empty"
    elif answer_kind(text) not in kinds:
        failure = "other kind"
    else:
        failure = f"wrong {answer_kind(text)}"
    return values | {"failure": failure}


NUMBER_WORDS = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
}  # fmt: skip


def answer_kind(text: str) -> str:
    """ "yes or no", "number" (digits or a word up to twelve) or "words"."""
    words = re.findall(r"[\w.]+", text.lower())
    first = words[0].strip(".") if words else ""
    if first in ("yes", "no"):
        return "yes or no"
    return "number" if first in NUMBER_WORDS or re.fullmatch(r"\d+([.,]\d+)?", first) else "words"


def first_word(question: str) -> str:
    """What a question begins with, in lower case; "" for one without words."""
    words = re.findall(r"[^\W\d_]+", question.lower())
    return words[0] if words else ""


def write_error_table(table: ErrorTable, path: str | Path) -> None:
    """The columns as a CSV file for other programs, with each row's index, question, prediction and reference."""
    texts = ("index", "question", "prediction", "reference")
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*texts[:1], *TEXTS, *NUMBERS, *texts[1:]])
    for place, row in enumerate(table.rows):
        values = (table[name][place] for name in NUMBERS)
        numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
        index = row.get("index", place)
        writer.writerow([index, *(table[name][place] for name in TEXTS), *numbers, *(row[name] for name in texts[1:])])
    write_whole(path, file.getvalue().encode(errors="replace").decode())  # halves of surrogate pairs are no UTF-8


# Numbers of parts -----------------------------------------------------------------------------------------------------

EDGES = {
    "distance_m": (0, 1, 2, 3, 4, 6, math.inf),
    "longest_side_m": (0, 0.5, 1, 1.5, 2, 3, math.inf),
    "volume_m3": (0, 0.1, 0.25, 0.5, 1, 2, math.inf),
    "in_view_share": (0, 0.01, 0.25, 0.5, 0.75, 1.01),
    "visible_share": (0, 0.01, 0.25, 0.5, 0.75, 1.01),
    "visible_pixels": (0, MIN_VISIBLE_PIXELS, 500, 1000, 2000, 5000, math.inf),
}
MAX_BINS = 12


@dataclass(frozen=True)
class Bin:
    """A number of a part of the rows. interval: 95 % by bootstrap over scenes; None for parts of a single scene."""

    label: str
    value: float
    interval: tuple[float, float] | None
    num_samples: int
    num_scenes: int


def bin_scores(table: ErrorTable, by: str, measure: str = "hit", *, bins: Sequence[str] | None = None) -> list[Bin]:
    """The mean of a column in parts of another, those without either left out; [] where nothing is known.

    Of MEDIANS the median: one answer that puts a box a kilometre away would be the mean of its part.

    by: numbers are cut at EDGES (lower edge included) or, without any, taken one by one; of texts the commonest come
    first, at most MAX_BINS, the rest are "others". bins: the labels to have, in their order, of another table: those
    that are empty here are left out.
    """
    keys = _bin_labels(table, by)
    values = table[measure]
    kept = (keys != "") & np.isfinite(values)
    keys, values, scenes = keys[kept], values[kept], table["scene_id"][kept]
    if not len(keys):
        return []
    names = list(_bin_order(keys, by) if bins is None else bins)
    if "others" in names:
        keys = np.where(np.isin(keys, names), keys, "others")
    names = [name for name in names if (keys == name).any()]
    index = np.array([names.index(key) if key in names else len(names) for key in keys])

    def medians(weights: np.ndarray) -> dict[int, float | None]:
        return {k: weighted_median(values[index == k], weights[index == k]) for k in range(len(names))}

    def means(weights: np.ndarray) -> dict[int, float | None]:
        sums = np.bincount(index, weights * values, len(names) + 1)
        counts = np.bincount(index, weights, len(names) + 1)
        return {k: sums[k] / counts[k] if counts[k] else None for k in range(len(names))}

    scores = with_intervals(medians if measure in MEDIANS else means, list(scenes))
    result = []
    for k, name in enumerate(names):
        num_scenes = len(set(scenes[index == k]))
        interval = tuple(scores["ci95"][k]) if num_scenes > 1 else None
        result.append(Bin(name, float(scores[k]), interval, int((index == k).sum()), num_scenes))
    return result


def _bin_labels(table: ErrorTable, by: str) -> np.ndarray:
    values = table[by]
    if values.dtype == object:
        return values
    labels = np.full(len(values), "", dtype=object)
    known = np.isfinite(values)
    if by in EDGES:
        edges = np.array(EDGES[by])
        names = _edge_names(by)
        labels[known] = np.array(names, dtype=object)[
            np.clip(np.searchsorted(edges, values[known], side="right") - 1, 0, len(names) - 1)
        ]
    else:
        labels[known] = [f"{value:g}" for value in values[known]]
    return labels


def _edge_names(by: str) -> list[str]:
    edges = EDGES[by]
    if by.endswith("_share"):
        return ["none", *(f"{a:.0%} to {min(b, 1):.0%}" for a, b in zip(edges[1:], edges[2:], strict=False))]
    ends = zip(edges, edges[1:], strict=False)
    return [f"{a:g} and more" if math.isinf(b) else f"{a:g} to {b:g}" for a, b in ends]


def _bin_order(keys: np.ndarray, by: str) -> list[str]:
    counts = Counter(keys.tolist())
    if by in EDGES:
        return [name for name in _edge_names(by) if name in counts]
    if by in NUMBERS:
        return sorted(counts, key=float)
    names = [name for name, _ in counts.most_common()]
    return names if len(names) <= MAX_BINS else [*names[: MAX_BINS - 1], "others"]


def failure_counts(table: ErrorTable) -> dict[str, dict[str, int]]:
    """Rows by section and class of failure, every class of a section in the order of CLASSES."""
    counts = Counter(zip(table["section"], table["failure"], strict=True))
    return {name: {failure: counts[name, failure] for failure in CLASSES[name]} for name in table.sections}


@dataclass(frozen=True)
class Calibration:
    """How sure a model says it is, and how often it is right. bins: mean confidence, and share of hits as a Bin."""

    bins: list[tuple[float, Bin]]
    ece: float
    num_samples: int


def calibration(table: ErrorTable, num_bins: int = 10) -> Calibration | None:
    """Reliability of the confidences of single anchors, in bins of equal width over [0, 1]; None without any.

    ece: sum over the bins of n_b / N |share of hits - mean confidence|, the expected calibration error (Guo et al.
    2017, "On calibration of modern neural networks", equation 3; there bins are open to the left, as here).
    """
    anchors = table.select(np.isfinite(table["confidence"]) & np.isfinite(table["hit"]))
    if not len(anchors):
        return None
    sure, hit = anchors["confidence"], anchors["hit"]
    index = np.clip(np.ceil(np.round(sure * num_bins, 9)).astype(int) - 1, 0, num_bins - 1)
    labels = [f"{k / num_bins:g} to {(k + 1) / num_bins:g}" for k in range(num_bins)]
    columns = anchors.columns | {"bin": np.array([labels[k] for k in index], dtype=object)}
    binned = {part.label: part for part in bin_scores(ErrorTable(anchors.rows, columns), "bin", bins=labels)}
    means = [float(sure[index == k].mean()) for k in range(num_bins) if labels[k] in binned]
    parts = list(zip(means, binned.values(), strict=True))
    ece = sum(part.num_samples * abs(part.value - mean) for mean, part in parts) / len(hit)
    return Calibration(parts, float(ece), len(hit))


def worst(table: ErrorTable, count: int) -> ErrorTable:
    """The `count` rows that are farthest off: wrong before right, then by smallest IoU and largest centre error, what
    has none first; the file's order decides between equals."""
    error = np.nan_to_num(table["center_error_m"], nan=math.inf)
    order = np.lexsort((-error, np.nan_to_num(table["iou_3d"], nan=1.0), np.nan_to_num(table["hit"], nan=1.0)))
    return table.select(order[:count])


def examples(table: ErrorTable, failure: str, count: int) -> ErrorTable:
    """`count` rows of one class of failure, of as many scenes as there are: the first of each, then the second, ..."""
    kept = table.select(table["failure"] == failure)
    seen: Counter = Counter()
    turns = []
    for scene_id in kept["scene_id"]:
        turns.append(seen[scene_id])
        seen[scene_id] += 1
    return kept.select(np.argsort(np.array(turns, dtype=int), kind="stable")[:count])
