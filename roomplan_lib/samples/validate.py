"""Everything that can be wrong with a file of samples, found record by record, each with its remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from roomplan_lib.samples import (
    BUILD_AGAIN,
    DEPTH_BIN_EDGES,
    RECORD_KEYS,
    box_from_record,
    iter_samples,
    manifest_path,
    read_manifest,
    resolve_image,
    sample_root,
)
from roomplan_lib.scenes import CATEGORIES

MIN_BASELINE = 0.1  # metres: cameras closer together than this see almost the same picture
MAX_LENGTH = 50.0  # metres: a longer box or a target further from every camera is no furniture of the room
SPLITS = ("train", "val", "test")
GEOMETRY_WIDTHS = {"R": 9, "t": 3, "K": 9, "depth_hist": len(DEPTH_BIN_EDGES) - 1}
REMOVE_ONE = "remove one of them"
FETCH = "fetch or render the scene again"


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
    checker = _Checker(root)
    splits: dict[str, str] = {}
    number = 0
    try:
        for number, record in iter_samples(path):
            if isinstance(record, ValueError):
                faults.append(Fault(number, "", str(record), BUILD_AGAIN))
                continue
            name = str(record.get("question_id") or record.get("scene_id") or "")
            faults += [Fault(number, name, reason, remedy) for reason, remedy in checker.check(record, number)]
            splits[str(record.get("scene_id"))] = _split_of(path, record)
    except ValueError as error:
        faults.append(Fault(0, "", str(error), BUILD_AGAIN))
    if number == 0:
        faults.append(Fault(0, "", "the file holds no record", BUILD_AGAIN))
    faults += [Fault(0, scene_id, reason, remedy) for scene_id, reason, remedy in _overlaps(path, splits)]
    return faults


def summarise(path: Path | str, faults: list[Fault], limit: int = 20) -> str:
    """Text for people: the count and the first `limit` faults."""
    if not faults:
        return f"{path}: no faults"
    lines = [f"{path}: {len(faults)} fault{'s' if len(faults) > 1 else ''}"]
    lines += [f"  {fault}" for fault in faults[:limit]]
    if len(faults) > limit:
        lines.append(f"  ... and {len(faults) - limit} more")
    return "\n".join(lines)


# The file -------------------------------------------------------------------------------------------------------------


def _manifest_faults(path: Path) -> Iterator[tuple[str, str]]:
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
    remedy = "keep each scene and visit in one split and build both files again"
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
                yield scene_id, f"is in {splits[scene_id]} here and in {split} in {sibling.name}", remedy
            twin = own_visits.get(sibling_visits.get(scene_id, ""))
            if twin and twin != scene_id and splits[twin] not in ("", split):
                reason = f"visit {visits[twin]} is in {splits[twin]} here and in {split} in {sibling.name} ({scene_id})"
                yield twin, reason, remedy


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

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pictures: dict[str, tuple] = {}
        self.question_ids: dict[str, int] = {}
        self.contents: dict[str, int] = {}
        self.answers: dict[tuple, tuple[str, int]] = {}

    def check(self, record: dict, number: int) -> Iterator[tuple[str, str]]:
        """(reason, remedy) of every fault of one record."""
        missing = [key for key in RECORD_KEYS if key not in record]
        is_qa, is_action = "question" in record, "instruction" in record
        if is_qa == is_action:
            missing.append("question with answer, or instruction with action_json (one of the two)")
        elif is_qa and not (_is_text(record["question"]) and _is_text(record.get("answer"))):
            missing.append("question and answer as text that is not empty")
        elif is_action and not (_is_text(record["instruction"]) and _is_text(record.get("action_json"))):
            missing.append("instruction and action_json as text that is not empty")
        if missing:
            yield f"missing: {', '.join(missing)}", BUILD_AGAIN
            return
        sizes = yield from self._check_pictures(record)
        if record["geom_token"] is not None:
            yield from _check_geometry(record["geom_token"], sizes)
        yield from self._check_boxes(record)
        if is_action:
            yield from _check_action(record)
        yield from self._check_repeats(record, number)

    def _check_pictures(self, record: dict) -> Iterator[tuple[str, str]]:
        """Yields faults, returns the sizes of the pictures (None where unknown)."""
        images = record["images"]
        if not isinstance(images, list) or not images or not all(_is_text(name) for name in images):
            yield "images: expected a list of at least one path", BUILD_AGAIN
            return []
        for name in sorted({name for name in images if images.count(name) > 1}):
            yield f"picture {name} is shown twice", "choose the views again"
        sizes = []
        for name in images:
            size, fault = self._open_header(name)
            if fault:
                yield fault
            if not _shows_scene(name, record):
                yield f"picture {name} shows another scene than {record['scene_id']}", BUILD_AGAIN
            sizes.append(size)
        if "depths" in record:
            depths = record["depths"]
            if not isinstance(depths, list) or len(depths) != len(images) or not all(_is_text(name) for name in depths):
                yield f"depths: expected {len(images)} paths, one for each picture", BUILD_AGAIN
                return sizes
            for name in depths:
                _, fault = self._open_header(name)
                if fault:
                    yield f"depth: {fault[0]}", fault[1]
                if not _shows_scene(name, record):
                    yield f"depth {name} shows another scene than {record['scene_id']}", BUILD_AGAIN
        return sizes

    def _open_header(self, name: str) -> tuple[tuple[int, int] | None, tuple[str, str] | None]:
        """((width, height) of a picture or None, its fault (reason, remedy) or None)."""
        if name not in self.pictures:
            size, reason = None, ""
            try:
                with Image.open(resolve_image(self.root, name)) as picture:
                    size = picture.size
            except FileNotFoundError:
                reason = f"picture {name} is missing below {self.root}"
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:
                reason = f"picture {name} cannot be read ({error})"
            except ValueError as error:
                reason = str(error)
            self.pictures[name] = (size, (reason, FETCH) if reason else None)
        return self.pictures[name]

    def _check_boxes(self, record: dict) -> Iterator[tuple[str, str]]:
        boxes = record.get("boxes", [])
        if not isinstance(boxes, list):
            yield "boxes: expected a list", BUILD_AGAIN
            return
        for index, entry in enumerate(boxes):
            try:
                box = box_from_record(entry)
            except ValueError as error:
                yield f"boxes[{index}]: {error}", BUILD_AGAIN
                continue
            if (box.extent <= 0).any() or (box.extent > MAX_LENGTH).any():
                yield f"boxes[{index}]: extent {box.extent.tolist()} m is not that of a thing in a room", BUILD_AGAIN

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
        prompt = (record["scene_id"], record.get("situation"), record.get("question"), record.get("instruction"))
        response = record["action_json"] if "instruction" in record else record["answer"]
        known, first = self.answers.setdefault(json.dumps(prompt), (response, number))
        if known != response:
            yield (
                f"ambiguous: record {first} asks the same of this scene and expects another answer",
                "name the target by a relation or a colour that fits it alone, or remove both",
            )


def _check_geometry(geometry: object, sizes: list[tuple[int, int] | None]) -> Iterator[tuple[str, str]]:
    arrays = {}
    for key, width in GEOMETRY_WIDTHS.items():
        try:
            arrays[key] = np.array(geometry[key], dtype=np.float64)
        except (KeyError, TypeError, ValueError):
            yield f"geom_token.{key}: missing or not [{len(sizes)}, {width}] numbers", BUILD_AGAIN
            return
        if arrays[key].shape != (len(sizes), width) or not np.isfinite(arrays[key]).all():
            yield (
                f"geom_token.{key}: expected [{len(sizes)}, {width}] finite numbers, got {list(arrays[key].shape)}"
                + ("" if np.isfinite(arrays[key]).all() else " with NaN or infinity"),
                BUILD_AGAIN,
            )
            return
    for v, rotation in enumerate(arrays["R"].reshape(-1, 3, 3)):
        if np.abs(rotation.T @ rotation - np.eye(3)).max() > 1e-3 or np.linalg.det(rotation) < 0:
            yield f"geom_token.R of view {v} is no rotation", BUILD_AGAIN
    for v, K in enumerate(arrays["K"].reshape(-1, 3, 3)):
        if K[0, 0] <= 0 or K[1, 1] <= 0 or not np.array_equal(K[2], [0, 0, 1]):
            yield f"geom_token.K of view {v} is no camera matrix", BUILD_AGAIN
        elif sizes[v] and (np.abs(K[:2, 2] / sizes[v] - 0.5) > 0.25).any():
            yield (
                f"geom_token.K of view {v} does not fit its picture of {sizes[v]} pixels",
                "scale K with the picture",
            )
    for v, shares in enumerate(arrays["depth_hist"]):
        if (shares < 0).any() or not (abs(shares.sum() - 1) < 1e-3 or (shares == 0).all()):
            yield f"geom_token.depth_hist of view {v} does not add up to 1 (or to 0 for no depth)", BUILD_AGAIN
    centers = arrays["t"]
    baseline = np.linalg.norm(centers[:, None] - centers[None], axis=-1).max()
    if len(centers) > 1 and baseline < MIN_BASELINE:
        yield (
            f"views without parallax: no two cameras are more than {baseline:.3f} m apart, below {MIN_BASELINE} m",
            "choose views from the whole scan with select_views",
        )


def _check_action(record: dict) -> Iterator[tuple[str, str]]:
    try:
        action = json.loads(record["action_json"])
        kind = action["action"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"action_json is no JSON object with `action` ({type(error).__name__}: {error})", BUILD_AGAIN
        return
    if action.get("scene") != record["scene_id"]:
        yield (
            f"action_json is about scene {action.get('scene')!r}, not {record['scene_id']!r}",
            BUILD_AGAIN,
        )
    if kind != "place_anchor":
        return
    if action.get("category") not in CATEGORIES:
        yield f"action_json.category: expected one of {CATEGORIES}, got {action.get('category')!r}", BUILD_AGAIN
    vectors = {}
    for key in ("center", "normal", "extent"):
        try:
            vectors[key] = np.array(action.get(key), dtype=np.float64)
        except (TypeError, ValueError):
            vectors[key] = np.array(np.nan)
        if vectors[key].shape != (3,) or not np.isfinite(vectors[key]).all():
            yield f"action_json.{key}: expected 3 finite numbers, got {action.get(key)}", BUILD_AGAIN
            return
    if abs(np.linalg.norm(vectors["normal"]) - 1) > 1e-2:
        yield f"action_json.normal: expected a unit vector, got {action['normal']}", BUILD_AGAIN
    if (vectors["extent"] <= 0).any() or (vectors["extent"] > MAX_LENGTH).any():
        yield f"action_json.extent: {action['extent']} m is not that of a thing in a room", BUILD_AGAIN
    boxes = record.get("boxes")
    if isinstance(boxes, list) and boxes:
        try:
            targets = [box_from_record(entry) for entry in boxes]
        except ValueError:
            return  # listed with the boxes
        if min(np.abs(box.center - vectors["center"]).max() for box in targets) > 1e-3:
            yield "action_json.center is the center of none of the record's boxes", BUILD_AGAIN


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _shows_scene(name: str, record: dict) -> bool:
    """Whether a folder of the path, and for ARKitScenes also the file's name, is the scene's."""
    scene_id = str(record["scene_id"])
    *folders, file = name.split("/")
    if record.get("source") == "arkitscenes":
        return scene_id in folders and file.startswith(f"{scene_id}_")
    return scene_id in folders or file.startswith((f"{scene_id}_", f"{scene_id}."))
