"""The record: one training or evaluation sample as a line of a JSONL file, with a manifest beside the file.

Keys of a record (* = always there):

    images*      [V] paths of the pictures, POSIX, relative to the manifest's `root`; [] with `without_views`
    geom_token*  {R [V, 9], t [V, 3], K [V, 9], depth_hist [V, 16]}, or null (questions only). R, t: camera_to_world
                 in the scene's own frame (row-major; metres). K: row-major, pixels of the picture set upright.
                 depth_hist: share of the valid depth pixels per bin of DEPTH_BIN_EDGES, all zero for a view without
                 depth
    task*        "place_anchor", "qa_existence", "qa_count", ...
    scene_id*
    question + answer, or instruction + action_json (text of one action or of a JSON array of actions, metres in the
                 scene's own frame). "<box_0>" in a question stands for boxes[0]; the program writes it in the
                 reference frame
    situation, question_id, object_ids, view_ids, split, source
    answers      every reference answer; [] where a test set hides them (then there is no `answer`: predicted on only)
    depths       [V] paths of the depth pictures, like images; depth_scale: their units per metre (1000); depth_K
                 [V, 9]: their own intrinsics, where those are not K scaled to their size
    quarter_turns  [V] counter-clockwise turns by 90 degrees that set each stored picture upright (0)
    boxes        [{label, center [3], extent [3], rotation [9] row-major, object_id}] of the instances asked for
    agent        {position [3], facing [3]}: where the situation's speaker stands and looks, scene's frame
    view_set     number of the scene's view set, from 0, where it was prepared with several; each epoch draws one
    coverage     share of the seen voxels that the views show; baseline_m: largest distance between two cameras
    without_views  true: written without the scans, for text-only use; geom_token is null, training refuses it
    eval_type, question_type, protocol   what an official evaluation groups by
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from roomplan_lib.files import new_file, write_whole
from roomplan_lib.geometry import OrientedBox

# Metres. Finer where indoor depth lies; fixed, so that a histogram keeps the metric scale.
DEPTH_BIN_EDGES = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, np.inf])
RECORD_KEYS = ("images", "geom_token", "task", "scene_id")
PER_VIEW = ("images", "depths", "view_ids", "quarter_turns", "depth_K")  # and each array of geom_token
GEOMETRY_WIDTHS = {"R": 9, "t": 3, "K": 9, "depth_hist": len(DEPTH_BIN_EDGES) - 1}
MAX_NUMBER = 1e9  # beyond is a mistake in any unit; NaN and infinity fail the comparison too
BOX_MARKER = re.compile(r"<box_([0-9]{1,3})>")
MAX_LINE = 2**24  # characters; a longer line is no record, and is not kept in memory
MAX_ARRAY = 2**28  # bytes; a JSON array is read whole
BUILD_AGAIN = "build the file again with `prepare`"


def depth_histogram(depth: np.ndarray | None) -> np.ndarray:
    """[16] share of the valid pixels of a depth image [H, W] (metres, 0 = missing) per bin of DEPTH_BIN_EDGES.

    All zero when there is no depth image or no valid pixel.
    """
    if depth is None:
        return np.zeros(len(DEPTH_BIN_EDGES) - 1)
    counts, _ = np.histogram(depth[np.isfinite(depth) & (depth > 0)], DEPTH_BIN_EDGES)
    return counts / max(counts.sum(), 1)


def box_record(box: OrientedBox) -> dict:
    """A box as the record holds it; rounded to 0.1 mm and 1e-6 in the rotation."""
    return {
        "label": box.label,
        "center": rounded(box.center, 4),
        "extent": rounded(box.extent, 4),
        "rotation": rounded(box.rotation, 6),
        "object_id": box.object_id,
    }


def box_from_record(entry: dict) -> OrientedBox:
    """Inverse of `box_record`. Raises ValueError for a missing key or numbers that make no box."""
    try:
        rotation = np.array(entry["rotation"], dtype=np.float64).reshape(3, 3)
        return OrientedBox(entry["center"], entry["extent"], rotation, entry["label"], str(entry["object_id"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"box of a record: {type(error).__name__} {error}; {BUILD_AGAIN}") from None


def check_record(record: dict, where: str) -> None:
    """Raise ValueError "where: reason; remedy" for the first of `record_faults`; opens no picture.

    where: what the message calls the record, such as "anchors_train.jsonl:3".
    """
    for reason, remedy in record_faults(record):
        raise ValueError(f"{where}: {reason}; {remedy}")


def record_faults(record: dict) -> Iterator[tuple[str, str]]:
    """(reason, remedy) for everything wrong with a record's keys, types, lengths and numbers; opens no picture."""
    missing = [key for key in RECORD_KEYS if key not in record]
    is_action, without_views = "instruction" in record, record.get("without_views") is True
    hidden = record.get("answers") == [] and "answer" not in record  # a test set whose answers only its server knows
    if ("question" in record) == is_action:
        missing.append("question with answer, or instruction with action_json (one of the two)")
    elif not is_action and not (is_text(record["question"]) and (hidden or is_text(record.get("answer")))):
        missing.append("question and answer as text that is not empty (answers [] where they are hidden)")
    elif is_action and not (is_text(record["instruction"]) and (without_views or is_text(record.get("action_json")))):
        missing.append("instruction and action_json as text that is not empty")
    if missing:
        yield f"missing: {', '.join(missing)}", BUILD_AGAIN
        return
    for key in ("task", "scene_id"):
        if not is_text(record[key]):
            yield f"{key}: expected text that is not empty, got {record[key]!r:.80}", BUILD_AGAIN
    if not isinstance(record.get("situation", ""), str):
        yield f"situation: expected text, got {record['situation']!r:.80}", BUILD_AGAIN
    images = record["images"]
    if without_views and images == [] and record["geom_token"] is None:
        return
    if not images or not _is_texts(images):
        yield "images: expected a list of at least one path", BUILD_AGAIN
        return
    for key, meaning in (("depths", "paths"), ("view_ids", "names")):
        if key in record and not (_is_texts(record[key]) and len(record[key]) == len(images)):
            yield f"{key}: expected {len(images)} {meaning}, one for each picture", BUILD_AGAIN
    turns = record.get("quarter_turns", [0] * len(images))
    if not isinstance(turns, list) or [type(n) for n in turns] != [int] * len(images) or not {*turns} <= {0, 1, 2, 3}:
        yield f"quarter_turns: expected {len(images)} numbers of turns, 0 to 3", BUILD_AGAIN
    scale = record.get("depth_scale", 1000)
    if type(scale) not in (int, float) or not 0 < scale <= MAX_NUMBER:
        yield f"depth_scale: expected units per metre above 0, got {scale!r:.80}", BUILD_AGAIN
    if "depth_K" in record and not _is_matrix(record["depth_K"], len(images), 9):
        yield f"depth_K: expected [{len(images)}, 9] finite numbers", BUILD_AGAIN
    num_boxes = len(record["boxes"]) if isinstance(record.get("boxes"), list) else 0
    for marker in BOX_MARKER.findall(record["instruction"] if is_action else record["question"]):
        if int(marker) >= num_boxes:
            yield f"<box_{marker}> in the question, but the record has {num_boxes} boxes", BUILD_AGAIN
    geometry = record["geom_token"]
    if geometry is None:
        if is_action:
            yield "geom_token is null, so the action's target is in an unknown frame", "prepare the sample with poses"
        return
    if not isinstance(geometry, dict):
        yield f"geom_token: expected an object or null, got {type(geometry).__name__}", BUILD_AGAIN
        return
    bad = [key for key, width in GEOMETRY_WIDTHS.items() if not _is_matrix(geometry.get(key), len(images), width)]
    for key in bad:
        yield f"geom_token.{key}: expected [{len(images)}, {GEOMETRY_WIDTHS[key]}] finite numbers", BUILD_AGAIN
    if "K" not in bad:
        for v, K in enumerate(geometry["K"]):
            if K[0] <= 0 or K[4] <= 0 or list(K[6:]) != [0, 0, 1]:
                yield f"geom_token.K of view {v} is no camera matrix", BUILD_AGAIN


def is_text(value: object) -> bool:
    """A string with more than white space in it."""
    return isinstance(value, str) and bool(value.strip())


def iter_samples(path: Path | str, constants: bool = False) -> Iterator[tuple[int, dict | ValueError]]:
    """(line number, record) of a JSONL file or (position, record) of a JSON array, from 1.

    constants: let NaN and Infinity through, which are no JSON, so that `validate` can name where they stand.

    A line that is no JSON object, or longer than MAX_LINE, comes as a ValueError that names file and line, for the
    caller to raise or to list. Raises ValueError for a file that cannot be read as text and an array above MAX_ARRAY.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            file.seek(0)
            if start == "[":
                if (size := path.stat().st_size) > MAX_ARRAY:
                    raise ValueError(f"{path}: a JSON array of {size} bytes is too large; write one record per line")
                entries = enumerate(_parse(file.read(), f"{path}", constants), 1)
                for number, entry in entries:
                    yield number, _as_record(entry, f"{path}: record {number}")
                return
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                if len(line) > MAX_LINE:
                    while line and not line.endswith("\n"):
                        line = file.readline(MAX_LINE)
                    yield number, ValueError(f"{path}:{number}: longer than {MAX_LINE} characters; {BUILD_AGAIN}")
                    continue
                if not line.strip():
                    continue
                try:
                    entry = _parse(line, f"{path}:{number}", constants)
                except ValueError as error:
                    yield number, error
                    continue
                yield number, _as_record(entry, f"{path}:{number}")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of samples; {BUILD_AGAIN}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); {BUILD_AGAIN}") from None


def read_samples(path: Path | str) -> list[dict]:
    """All records of a JSONL file or JSON array. Raises ValueError naming file and line for anything unreadable."""
    return list(each_sample(path))


def each_sample(path: Path | str) -> Iterator[dict]:
    """As `read_samples`, one record in memory at a time."""
    for _, sample in iter_samples(path):
        if isinstance(sample, ValueError):
            raise sample
        yield sample


def write_samples(path: Path | str, samples: Iterable[dict], manifest: dict) -> None:
    """Write a JSONL file and its manifest; each appears whole or not at all (temporary name, then rename).

    manifest: needs `root`, the folder that image paths are relative to; stored relative to the manifest's own folder.
    What else it holds (`settings`, `visits`, ...) is kept. Counts per task and split, scene ids and the file's sha256
    are added. `samples` may be a generator: one record is held at a time.
    Raises ValueError for a manifest without `root` or a sample that is not finite JSON.
    """
    path = Path(path)
    if "root" not in manifest:
        raise ValueError("manifest: needs `root`, the folder that the samples' image paths are relative to")
    tasks, splits, scene_ids, digest = Counter(), Counter(), set(), hashlib.sha256()
    with new_file(path) as file:
        for number, sample in enumerate(samples, 1):
            try:
                line = json.dumps(sample, allow_nan=False, ensure_ascii=False).encode() + b"\n"
                tasks[sample["task"]] += 1
                splits[sample.get("split", "")] += 1
                scene_ids.add(sample["scene_id"])
            except (TypeError, ValueError, KeyError) as error:
                raise ValueError(f"{path}: sample {number}: {type(error).__name__} {error}") from None
            digest.update(line)
            file.write(line)
    entries = {
        **manifest,
        "root": Path(os.path.relpath(Path(manifest["root"]).resolve(), path.parent.resolve())).as_posix(),
        "file": path.name,
        "sha256": digest.hexdigest(),
        "num_samples": tasks.total(),
        "tasks": dict(sorted(tasks.items())),
        "splits": dict(sorted(splits.items())),
        "scene_ids": sorted(scene_ids),
    }
    # The manifest goes last: a crash in between leaves a hash that does not match, which `validate` reports.
    write_json(manifest_path(path), entries)


def join_samples(files: Iterable[Path], output: Path | str) -> None:
    """Write the records of several files, in order, as one file with a manifest; what theirs differ in is left out.

    The files' pictures must lie below one root. Raises ValueError when they do not, or a file is unreadable.
    """
    files = list(files)
    manifests = [read_manifest(file) for file in files]
    roots = {sample_root(file) for file in files}
    if len(roots) != 1:
        raise ValueError(f"{output}: the files to join have pictures below {sorted(map(str, roots))}, not one folder")
    shared = {key: value for key, value in manifests[0].items() if all(m.get(key) == value for m in manifests)}
    records = (record for file in files for record in read_samples(file))
    write_samples(output, records, {**shared, "root": roots.pop()})


def write_json(path: Path, value: object) -> None:
    """Write a JSON file; it appears whole or not at all."""
    write_whole(path, json.dumps(value, allow_nan=False, ensure_ascii=False) + "\n")


def manifest_path(path: Path | str) -> Path:
    """`<stem>.manifest.json` beside a file of samples."""
    path = Path(path)
    return path.with_name(f"{path.stem}.manifest.json")


def read_manifest(path: Path | str) -> dict:
    """The manifest of a file of samples. Raises ValueError when it is missing or unreadable."""
    where = manifest_path(path)
    try:
        manifest = _parse(where.read_text(encoding="utf-8"), str(where))
    except FileNotFoundError:
        raise ValueError(f"{where}: the manifest is missing; {BUILD_AGAIN}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("root"), str):
        raise ValueError(f"{where}: expected an object with the text `root`; {BUILD_AGAIN}")
    return manifest


def sample_root(path: Path | str) -> Path:
    """Absolute folder that the image paths of a file of samples are relative to.

    A file without a manifest (written by hand or by other tools) keeps its pictures below its own folder.
    """
    path = Path(path).absolute()
    if not manifest_path(path).exists():
        return path.parent
    return Path(os.path.normpath(path.parent.resolve() / read_manifest(path)["root"]))


def rounded(values: np.ndarray, decimals: int) -> list[float]:
    """Flat list of rounded floats, without negative zeros."""
    return [float(value) + 0.0 for value in np.round(np.asarray(values, dtype=np.float64), decimals).ravel()]


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _is_matrix(value: object, height: int, width: int) -> bool:
    """Nested lists of numbers; text and booleans are none, though NumPy would convert them."""
    if not isinstance(value, list) or len(value) != height:
        return False
    if not all(isinstance(row, list) and len(row) == width for row in value):
        return False
    numbers = [number for row in value for number in row]  # seven hundred of each record: no Python code for each
    if not set(map(type, numbers)) <= {int, float}:
        return False
    if not numbers or min(numbers) < -MAX_NUMBER or max(numbers) > MAX_NUMBER:
        return False
    return not math.isnan(sum(numbers))  # which may pass by min and max


def _as_record(entry: object, where: str) -> dict | ValueError:
    if isinstance(entry, dict):
        return entry
    return ValueError(f"{where}: expected a JSON object, got {type(entry).__name__}; {BUILD_AGAIN}")


def _parse(text: str, where: str, constants: bool = False) -> object:
    """JSON without NaN and Infinity, which are no JSON, unless `constants`."""
    try:
        return json.loads(text, parse_constant=float if constants else _refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: invalid or truncated JSON ({error}); {BUILD_AGAIN}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
