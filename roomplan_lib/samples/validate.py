"""Everything that can be wrong with a file of samples, found record by record, each with its remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from roomplan_lib.actions import ActionError, parse_action
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import (
    BUILD_AGAIN,
    GEOMETRY_WIDTHS,
    box_from_record,
    depth_histogram,
    is_text,
    iter_samples,
    manifest_path,
    read_manifest,
    record_faults,
    resolve_image,
    sample_root,
)
from roomplan_lib.samples.describe import upright
from roomplan_lib.scenes import load_depth, load_rgb

MIN_BASELINE = 0.1  # metres: cameras closer together than this see almost the same picture
MAX_LENGTH = 50.0  # metres: no furniture of a room is longer
MAX_DISTANCE = 30.0  # metres: a target further from every camera is in another frame than they are
FOCAL_LENGTHS = (0.3, 5.0)  # of the picture's width: from 118 down to 11 degrees of view
HISTOGRAM_TOLERANCE = 1e-3  # the record keeps five decimals
TARGET_TOLERANCE = 1e-3  # metres; record and action both keep four decimals
YAW_TOLERANCE_DEG = 0.5
SPLITS = ("train", "val", "test")
REMOVE_ONE = "remove one of them"
FETCH = "fetch or render the scene again"
ONE_SPLIT = "keep each scene and visit in one split and build the files again"


@dataclass(frozen=True)
class Fault:
    """Something wrong. record: line of a JSONL file or position in a JSON array, from 1; 0 = the file as a whole.

    id: the record's question_id or scene_id, "" when it has none.
    """

    record: int
    id: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        place = f"record {self.record}" if self.record else "file"
        return f"{place}{f' ({self.id})' if self.id else ''}: {self.reason}. Remedy: {self.remedy}"


def validate_file(path: Path | str) -> list[Fault]:
    """All faults of a file of samples, in the order of its records; an empty list for a good file.

    Every distinct picture is decoded once. A record that `record_faults` finds malformed is checked no further. Without
    a manifest nothing tells the file's hash and its scenes' visits; `summarise` says so.

    Raises ValueError only when the file itself does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of samples; {BUILD_AGAIN}")
    faults = [Fault(0, "", reason, remedy) for reason, remedy in _manifest_faults(path)]
    try:
        root = sample_root(path)
    except ValueError:
        return faults  # the unreadable manifest is already listed; without its root no picture can be found
    checker = _Checker(path, root)
    number = 0
    try:
        for number, record in iter_samples(path):
            if isinstance(record, ValueError):
                faults.append(Fault(number, "", str(record), BUILD_AGAIN))
                continue
            name = str(record.get("question_id") or record.get("scene_id") or "")
            faults += [Fault(number, name, reason, remedy) for reason, remedy in checker.check(record, number)]
    except ValueError as error:
        faults.append(Fault(0, "", str(error), BUILD_AGAIN))
    if number == 0:
        faults.append(Fault(0, "", "the file holds no record", BUILD_AGAIN))
    faults += [Fault(0, scene_id, reason, remedy) for scene_id, reason, remedy in _overlaps(path, checker.splits)]
    return faults


def summarise(path: Path | str, faults: list[Fault], limit: int = 20) -> str:
    """Text for people: the count, the first `limit` faults, and what could not be checked."""
    lines = [f"{path}: {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'}"]
    lines += [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  ... and {len(faults) - limit} more")
    if not manifest_path(path).exists():
        lines.append(f"  counts and hashes were not checked: there is no {manifest_path(path).name}")
    return "\n".join(lines)


# The file -------------------------------------------------------------------------------------------------------------


def _manifest_faults(path: Path) -> Iterator[tuple[str, str]]:
    if not manifest_path(path).exists():
        return  # a file from elsewhere, see `sample_root`
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        yield str(error), BUILD_AGAIN
        return
    if manifest.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        yield f"its contents are not those that {manifest_path(path).name} was written for (sha256)", BUILD_AGAIN


def _split_of(path: Path, record: dict | None = None) -> str:
    """The record's own split, else the one the file is named after."""
    split = (record or {}).get("split") or path.stem.rpartition("_")[2]
    return split if split in SPLITS else ""


def _visits(path: Path) -> dict[str, str]:
    """Visit by scene id as the manifest tells; empty without one."""
    try:
        visits = read_manifest(path).get("visits")
    except ValueError:
        return {}
    return visits if isinstance(visits, dict) else {}


def _overlaps(path: Path, splits: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(scene_id, reason, remedy) where a file beside this one shows the same scene or visit in another split."""
    visits = _visits(path)
    own_visits = {visits[scene_id]: scene_id for scene_id in splits if visits.get(scene_id)}
    for sibling in sorted(path.parent.glob("*.json*")):
        if sibling.suffix not in (".json", ".jsonl") or sibling.name.endswith(".manifest.json"):
            continue
        if sibling.samefile(path):
            continue
        sibling_visits, seen = _visits(sibling), set()
        for scene_id, split in _scene_splits(sibling):
            if scene_id in seen or not split:
                continue
            seen.add(scene_id)
            if splits.get(scene_id) not in (None, "", split):
                yield scene_id, f"is in {splits[scene_id]} here and in {split} in {sibling.name}", ONE_SPLIT
            twin = own_visits.get(sibling_visits.get(scene_id, ""))
            if twin and twin != scene_id and splits[twin] not in ("", split):
                reason = f"visit {visits[twin]} is in {splits[twin]} here and in {split} in {sibling.name} ({scene_id})"
                yield twin, reason, ONE_SPLIT


def _scene_splits(path: Path) -> Iterator[tuple[str, str]]:
    try:
        for _, record in iter_samples(path):
            if isinstance(record, dict) and "scene_id" in record:
                yield str(record["scene_id"]), _split_of(path, record)
    except ValueError:
        return  # a file of another kind, or a broken one that its own validation reports


# The records ----------------------------------------------------------------------------------------------------------


class _Checker:
    """Checks records one by one and remembers what must not come twice."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.visits = _visits(path)
        self.splits: dict[str, str] = {}  # by scene id, as its first record has it
        self.visit_scenes: dict[str, str] = {}  # first scene of each visit
        self.sizes: dict[str, tuple[tuple[int, int] | None, str]] = {}  # (width, height) and fault by name
        self.histograms: dict[str, tuple[np.ndarray | None, str]] = {}  # depth histogram and fault by name
        self.question_ids: dict[str, int] = {}
        self.contents: dict[str, int] = {}
        self.answers: dict[str, tuple[str, int]] = {}

    def check(self, record: dict, number: int) -> Iterator[tuple[str, str]]:
        """(reason, remedy) of every fault of one record."""
        malformed = list(record_faults(record))
        yield from malformed
        yield from self._check_split(record)
        if malformed:
            return
        sizes = yield from self._check_images(record)
        histograms = yield from self._check_depths(record)
        if record["geom_token"] is not None:
            yield from _check_geometry(record["geom_token"], sizes, histograms)
        boxes = yield from _check_boxes(record)
        if "instruction" in record:
            yield from _check_action(record, boxes)
        elif "answers" in record:
            answers = record["answers"]
            if not isinstance(answers, list) or record["answer"] not in answers:
                yield f"answers: expected a list with the answer {record['answer']!r}, got {answers!r:.80}", BUILD_AGAIN
        yield from self._check_repeats(record, number)

    def _check_split(self, record: dict) -> Iterator[tuple[str, str]]:
        split = record.get("split")
        if split not in (None, "", *SPLITS):
            yield f"split: expected one of {SPLITS}, got {split!r:.80}", BUILD_AGAIN
            return
        named = _split_of(self.path)
        if split and named and split != named:
            yield f"split {split!r} in a file named after {named!r}", "rename the file, or keep one split in it"
        scene_id, own = record.get("scene_id"), _split_of(self.path, record)
        if not is_text(scene_id):
            return
        first = self.splits.setdefault(scene_id, own)
        if first != own:
            yield f"scene {scene_id} is in {own or 'no split'} here and in {first or 'no split'} above", ONE_SPLIT
        visit = self.visits.get(scene_id)
        if not is_text(visit):
            return
        twin = self.visit_scenes.setdefault(visit, scene_id)
        if twin != scene_id and self.splits[twin] != own:
            yield f"visit {visit} is in {own or 'no split'} here and in {self.splits[twin]} above ({twin})", ONE_SPLIT

    def _check_images(self, record: dict) -> Iterator[tuple[str, str]]:
        """Yields faults, returns the sizes of the pictures (None where unknown)."""
        images = record["images"]
        for name in sorted({name for name in images if images.count(name) > 1}):
            yield f"picture {name} is shown twice", "choose the views again"
        sizes = []
        for name in images:
            if name not in self.sizes:
                self.sizes[name] = self._decode(name, lambda path: load_rgb(path).shape[1::-1])
            size, reason = self.sizes[name]
            if reason:
                yield reason, FETCH
            sizes.append(size)
        yield from _check_names(record, "images", "picture")
        return sizes

    def _check_depths(self, record: dict) -> Iterator[tuple[str, str]]:
        """Yields faults, returns the histogram of each depth picture (None where unknown)."""
        histograms = []
        for name in record.get("depths", ()):
            if name not in self.histograms:
                self.histograms[name] = self._decode(name, lambda path: depth_histogram(load_depth(path)))
            histogram, reason = self.histograms[name]
            if reason:
                yield f"depth: {reason}", FETCH
            histograms.append(histogram)
        if "depths" in record:
            yield from _check_names(record, "depths", "depth")
        return histograms

    def _decode(self, name: str, load: Callable[[Path], object]) -> tuple:
        """(what `load` makes of a picture or None, its fault or "")."""
        try:
            return load(resolve_image(self.root, name)), ""
        except ValueError as error:
            return None, str(error)

    def _check_repeats(self, record: dict, number: int) -> Iterator[tuple[str, str]]:
        question_id = record.get("question_id")
        if question_id is not None:
            first = self.question_ids.setdefault(str(question_id), number)
            if first != number:
                yield f"question_id {question_id!r} is also that of record {first}", "give every record its own"
        content = json.dumps({k: v for k, v in record.items() if k != "question_id"}, sort_keys=True)
        first = self.contents.setdefault(hashlib.sha256(content.encode()).hexdigest(), number)
        if first != number:
            yield f"says the same as record {first}", REMOVE_ONE
        words = [record.get(key, "") for key in ("situation", "question", "instruction")]
        prompt = [record["scene_id"], *map(_plain, words)]
        response = record["action_json"] if "instruction" in record else _plain(record["answer"])
        known, first = self.answers.setdefault(json.dumps(prompt), (response, number))
        if known != response:
            yield (
                f"ambiguous: record {first} asks the same of this scene and expects another answer",
                "name the target by a relation or a colour that fits it alone, or remove both",
            )


def _check_names(record: dict, key: str, what: str) -> Iterator[tuple[str, str]]:
    """Faults of pictures that by their names show another scene or view than the record says."""
    for v, name in enumerate(record[key]):
        if not _shows_scene(name, record):
            yield f"{what} {name} shows another scene than {record['scene_id']}", BUILD_AGAIN
        elif "view_ids" in record and PurePosixPath(name).stem != record["view_ids"][v]:
            yield f"{what} {name} is not that of view_ids[{v}], {record['view_ids'][v]}", BUILD_AGAIN


def _check_boxes(record: dict) -> Iterator[tuple[str, str]]:
    """Yields faults, returns the boxes, or None when one is at fault or there are none."""
    entries, boxes, usable = record.get("boxes", []), [], True
    if not isinstance(entries, list):
        yield "boxes: expected a list", BUILD_AGAIN
        return None
    for index, entry in enumerate(entries):
        try:
            boxes.append(box_from_record(entry))
        except ValueError as error:
            usable = False
            yield f"boxes[{index}]: {error}", BUILD_AGAIN
            continue
        extent = boxes[-1].extent
        if (extent <= 0).any() or (extent > MAX_LENGTH).any():
            usable = False
            yield f"boxes[{index}]: extent {extent.tolist()} m is not that of a thing in a room", BUILD_AGAIN
    if not usable:
        return None
    if "boxes" in record and "object_ids" in record:
        object_ids = [box.object_id for box in boxes]
        if record["object_ids"] != object_ids:
            yield f"object_ids {record['object_ids']!r:.80} are not those of the boxes, {object_ids!r:.80}", BUILD_AGAIN
    return boxes or None


def _check_geometry(
    geometry: dict, sizes: list[tuple[int, int] | None], histograms: list[np.ndarray | None]
) -> Iterator[tuple[str, str]]:
    """sizes: (width, height) of each picture. histograms: of each depth picture; empty for a record without depths."""
    arrays = {key: np.array(geometry[key], dtype=np.float64) for key in GEOMETRY_WIDTHS}
    for v, rotation in enumerate(arrays["R"].reshape(-1, 3, 3)):
        if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
            yield f"geom_token.R of view {v} is no rotation", BUILD_AGAIN
    for v, K in enumerate(arrays["K"].reshape(-1, 3, 3)):
        if sizes[v] is None:
            continue
        focal = np.array([K[0, 0], K[1, 1]]) / sizes[v][0]
        off_center = (np.abs(K[:2, 2] / sizes[v] - 0.5) > 0.25).any()
        if off_center or (focal < FOCAL_LENGTHS[0]).any() or (focal > FOCAL_LENGTHS[1]).any():
            yield (
                f"geom_token.K of view {v} does not fit its picture of {sizes[v]} pixels: focal lengths "
                f"{K[0, 0]:g} and {K[1, 1]:g}, principal point {K[:2, 2].tolist()}",
                "scale K with the picture",
            )
    for v, shares in enumerate(arrays["depth_hist"]):
        if (shares < 0).any() or not (abs(shares.sum() - 1) < 1e-3 or (shares == 0).all()):
            yield f"geom_token.depth_hist of view {v} does not add up to 1 (or to 0 for no depth)", BUILD_AGAIN
        elif histograms and histograms[v] is not None and np.abs(shares - histograms[v]).max() > HISTOGRAM_TOLERANCE:
            yield f"geom_token.depth_hist of view {v} is not that of its depth picture", BUILD_AGAIN
    centers = arrays["t"]
    baseline = np.linalg.norm(centers[:, None] - centers[None], axis=-1).max()
    if len(centers) > 1 and baseline < MIN_BASELINE:
        yield (
            f"views without parallax: no two cameras are more than {baseline:.3f} m apart, below {MIN_BASELINE} m",
            "choose views from the whole scan with select_views",
        )


def _check_action(record: dict, boxes: list[OrientedBox] | None) -> Iterator[tuple[str, str]]:
    action = parse_action(record["action_json"])
    if isinstance(action, ActionError):
        yield f"action_json: {action.reason}", BUILD_AGAIN
        return
    if action.scene != record["scene_id"]:
        yield f"action_json is about scene {action.scene!r}, not {record['scene_id']!r}", BUILD_AGAIN
    if not action.category:
        yield "action_json.category is missing", BUILD_AGAIN
    if max(action.extent) > MAX_LENGTH:
        yield f"action_json.extent: {action.extent} m is not that of a thing in a room", BUILD_AGAIN
    offsets = np.array(record["geom_token"]["t"]) - action.center
    distance = np.linalg.norm(offsets, axis=1).min()
    if distance > MAX_DISTANCE:
        yield (
            f"action_json.center is {distance:.1f} m from the nearest camera, more than {MAX_DISTANCE:g} m",
            "give target and poses in one frame, in metres",
        )
    if boxes is None:
        return
    if abs(action.normal[2]) > 0.02:
        yield f"action_json.normal {action.normal} of a box is not horizontal, so it tells no yaw", BUILD_AGAIN
        return
    near = min(boxes, key=lambda box: np.abs(box.center - action.center).max())
    if np.abs(near.center - action.center).max() > TARGET_TOLERANCE:
        yield "action_json.center is the center of none of the record's boxes", BUILD_AGAIN
        return
    if action.category and action.category != near.label:
        yield f"action_json.category is {action.category!r}, its box's label {near.label!r}", BUILD_AGAIN
    box = upright(near)
    if box is None:
        yield f"box {near.object_id!r} is tilted, so no anchor describes it", "remove the record"
        return
    turn = np.degrees(action.to_box().yaw - box.yaw)
    if abs((turn + 90) % 180 - 90) > YAW_TOLERANCE_DEG:  # half a turn leaves a box as it is
        yield f"action_json.normal is turned by {turn:.1f} degrees from its box's first axis", BUILD_AGAIN
    if np.abs(box.extent - action.extent).max() > TARGET_TOLERANCE:
        yield f"action_json.extent {action.extent} is not that of its box, {box.extent.tolist()}", BUILD_AGAIN


def _plain(words: str) -> str:
    """Words without the differences that do not change their meaning: case and spaces."""
    return " ".join(words.split()).casefold()


def _shows_scene(name: str, record: dict) -> bool:
    """Whether a folder of the path, and for ARKitScenes also the file's name, is the scene's."""
    scene_id = str(record["scene_id"])
    *folders, file = name.split("/")
    if record.get("source") == "arkitscenes":
        return scene_id in folders and file.startswith(f"{scene_id}_")
    return scene_id in folders or file.startswith((f"{scene_id}_", f"{scene_id}."))
