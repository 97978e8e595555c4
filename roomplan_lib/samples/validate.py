"""Everything that can be wrong with a file of samples, found record by record, each with its remedy."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from roomplan_lib.actions import Action, ActionError, ActionList, NoAction, PlaceAnchor, parse_action
from roomplan_lib.files import file_hash
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import (
    BOX_MARKER,
    BUILD_AGAIN,
    GEOMETRY_WIDTHS,
    box_from_record,
    depth_histogram,
    is_text,
    iter_samples,
    manifest_path,
    read_manifest,
    record_faults,
    sample_root,
)
from roomplan_lib.samples.anchors import TEMPLATES
from roomplan_lib.samples.describe import category_text, plural, upright
from roomplan_lib.samples.planes import TASK as PLANE_TASK
from roomplan_lib.samples.views import MIN_BASELINE
from roomplan_lib.scenes import CATEGORIES, load_depth, load_rgb, path_below

# All keys of a record, see the docstring of `roomplan_lib.samples`; from `description` on as published annotations say.
KEYS = {
    "images", "geom_token", "task", "scene_id", "question", "answer", "instruction", "action_json", "situation",
    "question_id", "object_ids", "view_ids", "split", "source", "answers", "depths", "depth_scale", "depth_K",
    "quarter_turns", "boxes", "agent", "view_set", "coverage", "baseline_m", "without_views", "eval_type",
    "question_type", "protocol", "description", "alternative_situations", "position", "rotation", "object_name",
    "object_names",
}  # fmt: skip
# Annotations of others: that some repeat or contradict each other is counted, not for the user to mend.
PUBLISHED = {
    "scanqa", "sqa3d", "scanrefer", "multi3drefer", "scan2cap", "nr3d", "llava", "sharegpt4v", "docvqa", "chartqa",
}  # fmt: skip
# Words that ask for an anchor and tell nothing of its target.
COMMAND_WORDS = set(re.findall(r"\w+", " ".join(TEMPLATES).casefold())) | {"a", "please", "to", "this", "that"}
MAX_LENGTH = 50.0  # metres: no furniture of a room is longer
MAX_DISTANCE = 30.0  # metres: a target further from every camera is in another frame than they are
FOCAL_LENGTHS = (0.3, 5.0)  # of the picture's width: from 118 down to 11 degrees of view
OFF_CENTER = 0.12  # of the width or height: more is the point of a picture on its side (4:3: 0.125 and 0.167)
HISTOGRAM_TOLERANCE = 1e-3  # the record keeps five decimals
TARGET_TOLERANCE = 1e-3  # metres; record and action both keep four decimals
YAW_TOLERANCE_DEG = 0.51  # a plane's yaw is whole degrees
BASELINE_TOLERANCE = 2e-3  # metres; the record keeps three decimals
SPLITS = ("train", "val", "test")
LISTED = 10  # records that a line of the summary names
ONE_TARGET = {"place_anchor", "scanrefer", "nr3d"}  # tasks whose instruction means one object
REMOVE_ONE = "remove one of them"
NAME_IT = "name the target by a relation or a colour that fits it alone"
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


@dataclass
class Report:
    """What `check_file` found.

    counts: what a reader of the summary should know besides, and numbers: the records meant, where they may be looked
    at; figures: [N] per record.
    """

    faults: list[Fault] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    numbers: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def validate_file(path: Path | str) -> list[Fault]:
    """The faults of `check_file`."""
    return check_file(path).faults


def check_file(path: Path | str) -> Report:
    """All faults of a file of samples, in the order of its records, none for a good file; and what it holds.

    Every distinct picture is decoded once. A record that `record_faults` finds malformed is checked no further. Without
    a manifest nothing tells the file's hash and its scenes' visits; `summarise` says so.

    Raises ValueError only when the file itself does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of samples; {BUILD_AGAIN}")
    report = Report([Fault(0, "", reason, remedy) for reason, remedy in _manifest_faults(path)])
    faults = report.faults
    try:
        root = sample_root(path)
    except ValueError:
        return report  # the unreadable manifest is already listed; without its root no picture can be found
    checker = _Checker(path, root, report)
    number = 0
    try:
        for number, record in iter_samples(path, constants=True):
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
    return report


def summarise(path: Path | str, report: Report | list[Fault], limit: int = 20) -> str:
    """Text for people: the count, the first `limit` faults, the figures, and what could not be checked."""
    report = report if isinstance(report, Report) else Report(report)
    faults = report.faults
    lines = [f"{path}: {len(faults) or 'no'} fault{'' if len(faults) == 1 else 's'}"]
    lines += [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  ... and {len(faults) - limit} more")
    for words, count in report.counts.items():
        numbers = report.numbers.get(words, [])
        named = ", ".join(map(str, numbers[:LISTED])) + (", ..." if len(numbers) > LISTED else "")
        lines.append(f"  {count} {words}" + (f": records {named}" if numbers else ""))
    for name, values in report.figures.items():
        low, middle, high = np.quantile(values, (0, 0.5, 1))
        lines.append(f"  {name}: {low:.2f} to {high:.2f}, median {middle:.2f}")
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
    if manifest.get("sha256") != file_hash(path):
        yield f"its contents are not those that {manifest_path(path).name} was written for (sha256)", BUILD_AGAIN


def _split_of(path: Path, record: dict | None = None) -> str:
    """The record's own split, else the one the file is named after."""
    split = (record or {}).get("split") or path.stem.rpartition("_")[2]
    return split if split in SPLITS else ""


def _by_scene(path: Path, key: str) -> dict:
    """What the manifest tells by scene id ("visits", "categories"); empty without one."""
    try:
        told = read_manifest(path).get(key)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _overlaps(path: Path, splits: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(scene_id, reason, remedy) where a file beside this one shows the same scene or visit in another split."""
    visits = _by_scene(path, "visits")
    own_visits = {visits[scene_id]: scene_id for scene_id in splits if visits.get(scene_id)}
    for sibling in sorted(path.parent.glob("*.json*")):
        if not sibling.is_file():
            continue
        if sibling.suffix not in (".json", ".jsonl") or sibling.name.endswith(".manifest.json"):
            continue
        if sibling.samefile(path):
            continue
        sibling_visits, seen = _by_scene(sibling, "visits"), set()
        for scene_id, split in _scene_splits(sibling):
            if scene_id in seen or not split:
                continue
            seen.add(scene_id)
            if "train" in (split, splits.get(scene_id)) and splits.get(scene_id) not in (None, "", split):
                yield scene_id, f"is in {splits[scene_id]} here and in {split} in {sibling.name}", ONE_SPLIT
            twin = own_visits.get(sibling_visits.get(scene_id, ""))
            if twin and twin != scene_id and splits[twin] not in ("", split) and "train" in (split, splits[twin]):
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

    def __init__(self, path: Path, root: Path, report: Report) -> None:
        self.path = path
        self.root = root
        self.counts, self.figures, self.numbers = report.counts, report.figures, report.numbers
        self.visits = _by_scene(path, "visits")
        self.categories = _by_scene(path, "categories")
        self.splits: dict[str, str] = {}  # by scene id, as its first record has it
        self.visit_scenes: dict[str, str] = {}  # first scene of each visit
        self.sizes: dict[tuple, tuple[tuple[int, int] | None, str]] = {}  # (width, height) and fault by picture
        self.histograms: dict[tuple, tuple[np.ndarray | None, str]] = {}  # depth histogram and fault by picture
        self.question_ids: dict[str, int] = {}
        self.contents: dict[str, int] = {}
        self.answers: dict[str, tuple[str, int]] = {}

    def check(self, record: dict, number: int) -> Iterator[tuple[str, str]]:
        """(reason, remedy) of every fault of one record."""
        self.counts["records"] += 1
        if unknown := sorted(map(str, record.keys() - KEYS)):
            yield f"unknown keys: {', '.join(unknown)!s:.200}", "remove them, or write them as the record names them"
        malformed = list(record_faults(record))
        for key in record.keys() - {"geom_token"}:  # whose numbers `record_faults` has looked at
            try:
                json.dumps(record[key], allow_nan=False)
            except ValueError:
                malformed.append((f"{key}: holds a number that is not finite", BUILD_AGAIN))
        yield from malformed
        yield from self._check_split(record)
        if malformed:
            return
        if record.get("without_views") is True:
            self.counts["without views, for text-only use"] += 1
        if "answer" not in record and "instruction" not in record:
            self.counts["without answers, to be predicted on only"] += 1
        sizes = yield from self._check_images(record)
        histograms = yield from self._check_depths(record)
        if record["geom_token"] is not None:
            yield from _check_geometry(record, sizes, histograms)
        yield from self._check_figures(record)
        boxes = yield from _check_boxes(record)
        if "action_json" in record:
            action = yield from _check_action(record, boxes)
        elif record.get("answers"):
            answers = record["answers"]
            if not isinstance(answers, list) or record["answer"] not in answers:
                yield f"answers: expected a list with the answer {record['answer']!r}, got {answers!r:.80}", BUILD_AGAIN
        repeats = list(self._check_repeats(record, number))
        yield from repeats
        if "action_json" in record and action is not None and not repeats:
            yield from self._check_words(record, action, boxes)

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
        for name, turns in zip(images, record.get("quarter_turns", [0] * len(images)), strict=True):
            key = (name, turns)
            if key not in self.sizes:
                self.sizes[key] = self._decode(name, lambda path, turns=turns: load_rgb(path, turns).shape[1::-1])
            size, reason = self.sizes[key]
            if reason:
                yield reason, FETCH
            sizes.append(size)
        yield from _check_names(record, "images", "picture")
        return sizes

    def _check_depths(self, record: dict) -> Iterator[tuple[str, str]]:
        """Yields faults, returns the histogram of each depth picture (None where unknown)."""
        histograms, scale = [], record.get("depth_scale", 1000)
        for name in record.get("depths", ()):
            key = (name, scale)
            if key not in self.histograms:
                self.histograms[key] = self._decode(name, lambda path: depth_histogram(load_depth(path, scale=scale)))
            histogram, reason = self.histograms[key]
            if reason:
                yield f"depth: {reason}", FETCH
            histograms.append(histogram)
        if "depths" in record:
            yield from _check_names(record, "depths", "depth")
        elif record["geom_token"] is not None and np.any(record["geom_token"]["depth_hist"]):
            yield "depths are missing, though depth_hist was counted from some", BUILD_AGAIN
        return histograms

    def _check_figures(self, record: dict) -> Iterator[tuple[str, str]]:
        """coverage, baseline_m and view_set; they are kept for the summary."""
        for key, largest in (("coverage", 1.0), ("baseline_m", np.inf)):
            if key not in record:
                continue
            if type(record[key]) not in (int, float) or not 0 <= record[key] <= largest:
                yield f"{key}: expected a number from 0 to {largest:g}, got {record[key]!r:.80}", BUILD_AGAIN
            else:
                self.figures[key].append(record[key])
        view_set = record.get("view_set", 0)
        if type(view_set) is not int or view_set < 0:
            yield f"view_set: expected a number from 0, got {view_set!r:.80}", BUILD_AGAIN

    def _decode(self, name: str, load: Callable[[Path], object]) -> tuple:
        """(what `load` makes of a picture or None, its fault or "")."""
        try:
            return load(path_below(self.root, name)), ""
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
        published = str(record.get("source")) in PUBLISHED
        if first != number and published:
            self._count_published("that say the same as another, as published", number)
        elif first != number:
            yield f"says the same as record {first}", REMOVE_ONE
        words = [record.get(key, "") for key in ("situation", "question", "instruction")]
        marked = record.get("boxes") if BOX_MARKER.search(words[1] + words[2]) else None
        prompt = [record["scene_id"], sorted(record["images"]), marked, *map(_plain, words)]
        if "instruction" in record:
            response = record.get("action_json") or json.dumps(record.get("object_ids"))
        else:
            response = _plain(record.get("answer", ""))
        key = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()
        known, first = self.answers.setdefault(key, (response, number))
        one_target = "instruction" in record and record["task"] in ONE_TARGET
        if known != response and published and one_target:
            yield f"ambiguous: record {first} says the same of these views and means another object", REMOVE_ONE
        elif known != response and published:
            self._count_published("that ask the same as another and expect something else, as published", number)
        elif known != response:
            yield (
                f"ambiguous: record {first} asks the same of these views and expects another answer",
                f"{NAME_IT}, or remove both",
            )

    def _count_published(self, words: str, number: int) -> None:
        self.counts[words] += 1
        self.numbers[words].append(number)

    def _check_words(
        self, record: dict, action: Action | ActionList, boxes: list[OrientedBox] | None
    ) -> Iterator[tuple[str, str]]:
        """Whether an instruction of ours names what the scene holds, and its target."""
        if record.get("source") != "arkitscenes":
            return
        named = [category for category in CATEGORIES if _category_words(category).search(record["instruction"])]
        held = self.categories.get(record["scene_id"])
        remedy = "name an object of the scene, or remove the record"
        for category in named if isinstance(held, dict) else ():
            if isinstance(action, NoAction) and action.reason == "not_present" and category in held:
                yield f"the scene holds a {category}, which action_json says is not present", BUILD_AGAIN
            elif not isinstance(action, NoAction) and category not in held:
                yield f"the instruction names a {category}, and the scene holds none", remedy
            elif isinstance(action, PlaceAnchor) and _is_bare(record["instruction"], category):
                if type(held[category]) is int and held[category] > 1:
                    yield (
                        f"ambiguous: the instruction says {category} and no more, and the scene holds {held[category]}",
                        NAME_IT,
                    )
        labels = {box.label for box in boxes or ()}
        if record["task"] != PLANE_TASK and named and labels and not labels & set(named):
            yield f"the instruction names {', '.join(named)}, its target is a {', '.join(sorted(labels))}", remedy


def _category_words(category: str) -> re.Pattern:
    return re.compile(rf"\b(?:{category_text(category)}|{plural(category)})\b", re.IGNORECASE)


def _is_bare(instruction: str, category: str) -> bool:
    """Whether an instruction tells nothing of its target besides the category: no colour, no relation."""
    words = re.findall(r"\w+", instruction.casefold())
    return [word for word in words if word not in COMMAND_WORDS] == category_text(category).casefold().split()


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
    record: dict, sizes: list[tuple[int, int] | None], histograms: list[np.ndarray | None]
) -> Iterator[tuple[str, str]]:
    """sizes: (width, height) of each picture. histograms: of each depth picture; empty for a record without depths."""
    geometry = record["geom_token"]
    arrays = {key: np.array(geometry[key], dtype=np.float64) for key in GEOMETRY_WIDTHS}
    for v, rotation in enumerate(arrays["R"].reshape(-1, 3, 3)):
        if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
            yield f"geom_token.R of view {v} is no rotation", BUILD_AGAIN
    for v, K in enumerate(arrays["K"].reshape(-1, 3, 3)):
        if sizes[v] is None:
            continue
        focal = np.array([K[0, 0], K[1, 1]]) / sizes[v][0]
        off_center = (np.abs(K[:2, 2] / sizes[v] - 0.5) > OFF_CENTER).any()
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
        return
    told = record.get("baseline_m", baseline)
    if type(told) in (int, float) and not abs(told - baseline) <= BASELINE_TOLERANCE:
        yield f"baseline_m {told:g} is not that of its cameras, {baseline:.3f}", BUILD_AGAIN


def _check_action(record: dict, boxes: list[OrientedBox] | None) -> Iterator[tuple[str, str]]:
    """Yields faults, returns the action, or None when it is at fault."""
    categories = CATEGORIES if record.get("source") == "arkitscenes" else None  # the names of other sets are open
    action = parse_action(record["action_json"], categories)
    if isinstance(action, ActionError):
        yield f"action_json: {action.reason}", BUILD_AGAIN
        return None
    actions = action.actions if isinstance(action, ActionList) else (action,)
    if not actions:
        yield "action_json: an empty list; what is not there is answered by the action none", BUILD_AGAIN
        return None
    for scene in sorted({part.scene for part in actions} - {record["scene_id"]}):
        yield f"action_json is about scene {scene!r}, not {record['scene_id']!r}", BUILD_AGAIN
    if any(isinstance(part, NoAction) for part in actions):
        if len(actions) > 1:
            yield "action_json: none beside other actions", BUILD_AGAIN
            return None
        if record.get("boxes"):
            yield f"action_json is none, but the record has {len(record['boxes'])} boxes", BUILD_AGAIN
            return None
        return action
    left = list(boxes or ())
    for part in actions:
        if isinstance(part, PlaceAnchor):
            near = yield from _check_anchor(record, part, left if boxes else None)
            left = [box for box in left if box is not near]
    if isinstance(action, ActionList) and left:
        yield f"action_json marks {len(actions)} of the record's {len(boxes)} boxes", BUILD_AGAIN
    return action


def _check_anchor(record: dict, action: PlaceAnchor, boxes: list[OrientedBox] | None) -> Iterator[tuple[str, str]]:
    """Yields faults, returns the box that the anchor marks, or None. boxes: those that no earlier anchor marks."""
    is_plane = record["task"] == PLANE_TASK
    if not action.category and not is_plane:
        yield "action_json.category is missing", BUILD_AGAIN
    if max(action.extent) > MAX_LENGTH:
        yield f"action_json.extent: {action.extent} m is not that of a thing in a room", BUILD_AGAIN
    if record["geom_token"] is not None:
        offsets = np.array(record["geom_token"]["t"]) - action.center
        distance = np.linalg.norm(offsets, axis=1).min()
        if distance > MAX_DISTANCE:
            yield (
                f"action_json.center is {distance:.1f} m from the nearest camera, more than {MAX_DISTANCE:g} m",
                "give target and poses in one frame, in metres",
            )
    if boxes is None:
        return None
    if abs(action.normal[2]) > 0.02 and not (is_plane and action.normal[2] > 0.98 and action.yaw is not None):
        yield f"action_json.normal {action.normal} of a box is not horizontal, so it tells no yaw", BUILD_AGAIN
        return None
    near = min(boxes, key=lambda box: np.abs(box.center - action.center).max(), default=None)
    if near is None or np.abs(near.center - action.center).max() > TARGET_TOLERANCE:
        yield "action_json.center is the center of none of the record's boxes, or of one marked twice", BUILD_AGAIN
        return None
    if action.category and action.category != near.label:
        yield f"action_json.category is {action.category!r}, its box's label {near.label!r}", BUILD_AGAIN
    box = upright(near)
    if box is None:
        yield f"box {near.object_id!r} is tilted, so no anchor describes it", "remove the record"
        return near
    turn = np.degrees(action.to_box().yaw - box.yaw)
    if abs((turn + 90) % 180 - 90) > YAW_TOLERANCE_DEG:  # half a turn leaves a box as it is
        yield f"action_json.normal is turned by {turn:.1f} degrees from its box's first axis", BUILD_AGAIN
    if np.abs(box.extent - action.extent).max() > TARGET_TOLERANCE:
        yield f"action_json.extent {action.extent} is not that of its box, {box.extent.tolist()}", BUILD_AGAIN
    return near


def _plain(words: str) -> str:
    """Words without the differences that do not change their meaning: case and spaces."""
    return " ".join(words.split()).casefold()


def _shows_scene(name: str, record: dict) -> bool:
    """Whether a folder of the path, and for ARKitScenes also the file's name, is the scene's; or the whole path is."""
    scene_id = str(record["scene_id"])
    if name == scene_id:  # a picture about which there is instruction data is a scene of its own
        return True
    *folders, file = name.split("/")
    if record.get("source") == "arkitscenes":
        return scene_id in folders and file.startswith(f"{scene_id}_")
    return scene_id in folders or file.startswith((f"{scene_id}_", f"{scene_id}."))
