"""Files of questions and descriptions about scans, read without trust; every fault names the file and the entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from roomplan_lib.samples import MAX_NUMBER, is_text
from roomplan_lib.scenes.text import read_json

MAX_ENTRY_CHARS = 4_000_000  # of one entry of a file that is read piece by piece
CHUNK_CHARS = 1_000_000
SEPARATORS = re.compile(r"[ \t\r\n,]*")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
FETCH_FILE = "fetch the file again"
SCENE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, eq=False)
class AnnotationFile:
    """What an annotation file says by itself.

    records: per entry, in the file's order, the keys of a record that need no scan (see `roomplan_lib.samples`).
    agents: by question_id the position [3] (metres) and the quaternion [4] (x, y, z, w) of the one who speaks, in the
    scan's own frame and relative to the middle of its mesh (SQA3D).
    """

    source: str
    split: str
    paths: tuple[Path, ...]
    records: list[dict]
    agents: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def read_entries(path: Path | str, key: str | None = None) -> list[tuple[str, dict]]:
    """[(where, entry)] of a JSON list of objects, or of the one that an object holds under `key`; at most 256 MB.

    where: "file: entry 3", counted from 0, for messages. Raises ValueError for another shape or an empty list.
    """
    data = read_json(_require_file(path))
    entries = data if key is None else data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list):
        shape = "a list of objects" if key is None else f"an object with the list {key!r}"
        raise ValueError(f"{path}: expected {shape}, got {type(data).__name__}; is it the right file?")
    return list(_objects(path, entries))


def iter_entries(path: Path | str) -> Iterator[tuple[str, dict]]:
    """The entries of `read_entries` one by one, of a JSON list or of JSON lines of any size in bounded memory.

    Raises ValueError for anything but objects, a file without any, or an entry beyond MAX_ENTRY_CHARS.
    """
    yield from _objects(path, _iter_values(_require_file(path)))


def file_split(path: Path | str, split: str | None) -> str:
    """train, val or test, as the file's name or `split` tells; "Training" and "Validation" are understood.

    Raises ValueError when neither tells, or both and they differ.
    """
    named = {SPLIT_WORDS[word] for word in file_words(path) if word in SPLIT_WORDS}
    if split is not None and split.lower() not in SPLIT_WORDS:
        raise ValueError(f"split: expected train, val or test, got {split!r}")
    wanted = SPLIT_WORDS[split.lower()] if split else None
    if len(named) == 1 and wanted and named != {wanted}:
        raise ValueError(f"{path}: by its name a file of the split {named.pop()}, not of {wanted}; give the other file")
    if not wanted and len(named) != 1:
        raise ValueError(f"{path}: its name does not tell the split; say train, val or test with `split`")
    return wanted or named.pop()


def file_words(path: Path | str) -> set[str]:
    """The words of a file's name, in lower case, without its suffix: "ScanQA_v1.0_val.json" -> scanqa, v, val."""
    return set(re.split(r"[^a-z]+", Path(path).stem.lower())) - {""}


def text_of(entry: dict, key: str, where: str) -> str:
    """`entry[key]` without white space around it. Raises ValueError unless it is text that is not empty."""
    value = _value(entry, key, where)
    if not is_text(value):
        raise ValueError(f"{where}: {key}: expected text that is not empty, got {value!r:.80}")
    return value.strip()


def texts_of(entry: dict, key: str, where: str) -> list[str]:
    """`entry[key]` as a list of texts. Raises ValueError unless it is one; it may be empty."""
    value = _value(entry, key, where)
    if not isinstance(value, list) or not all(map(is_text, value)):
        raise ValueError(f"{where}: {key}: expected a list of texts that are not empty, got {value!r:.80}")
    return [text.strip() for text in value]


def id_of(entry: dict, key: str, where: str) -> str:
    """`entry[key]`, a whole number or a text of one word, as text."""
    return _id(_value(entry, key, where), f"{where}: {key}")


def ids_of(entry: dict, key: str, where: str) -> list[str]:
    """`entry[key]`, a list of different ids as `id_of` reads them, as texts."""
    values = _value(entry, key, where)
    if not isinstance(values, list):
        raise ValueError(f"{where}: {key}: expected a list of ids, got {values!r:.80}")
    ids = [_id(value, f"{where}: {key}") for value in values]
    if len(set(ids)) < len(ids):
        raise ValueError(f"{where}: {key}: an id stands twice in {ids!r:.80}")
    return ids


def scene_id_of(entry: dict, where: str, key: str = "scene_id") -> str:
    """`entry[key]`. Raises ValueError unless it names a folder: no slashes, no dot in front."""
    scene_id = text_of(entry, key, where)
    if not SCENE_ID.fullmatch(scene_id):
        raise ValueError(f"{where}: {key}: expected the name of a scan such as scene0000_00, got {scene_id!r:.80}")
    return scene_id


def numbers_of(entry: dict, key: str, names: tuple[str, ...], where: str) -> np.ndarray:
    """[len(names)] numbers of the object `entry[key]`, by `names`. Raises ValueError unless all are finite."""
    values = _value(entry, key, where)
    numbers = [values.get(name) for name in names] if isinstance(values, dict) else [None]
    if any(type(number) not in (int, float) or not abs(number) <= MAX_NUMBER for number in numbers):
        raise ValueError(f"{where}: {key}: expected an object with the numbers {', '.join(names)}, got {values!r:.80}")
    return np.array(numbers, dtype=np.float64)


def unique(known: dict[str, str], name: str, where: str) -> str:
    """`name`, noted in `known` with where it stands. Raises ValueError when it stands there already."""
    first = known.setdefault(name, where)
    if first != where:
        raise ValueError(f"{where}: the id {name} is also that of {first}; keep one of them")
    return name


def _require_file(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file of annotations")
    return path


def _value(entry: dict, key: str, where: str) -> object:
    if key not in entry:
        raise ValueError(f"{where}: the key {key!r} is missing; it has {sorted(map(str, entry))!s:.120}")
    return entry[key]


def _id(value: object, where: str) -> str:
    name = str(value) if type(value) is int else value
    if not isinstance(name, str) or not re.fullmatch(r"\S{1,100}", name):
        raise ValueError(f"{where}: expected a whole number or a short text without spaces, got {value!r:.80}")
    return name


def _objects(path: Path | str, values) -> Iterator[tuple[str, dict]]:
    index = -1
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: entry {index}: expected an object, got {type(value).__name__}")
        yield f"{path}: entry {index}", value
    if index < 0:
        raise ValueError(f"{path}: the file has no entry; {FETCH_FILE}")


def _iter_values(path: Path) -> Iterator[object]:
    """The values of a JSON list, or those that follow one another in a file of JSON lines; commas are not counted."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    with path.open(encoding="utf-8-sig") as file:
        text = more = _read_chunk(path, file)
        while more and not text.strip():
            text = more = _read_chunk(path, file)
        text = text.lstrip()
        is_list = text.startswith("[")
        position, at_end = int(is_list), False
        while True:
            position = SEPARATORS.match(text, position).end()
            if is_list and text[position : position + 1] == "]":
                if text[position + 1 :].strip() or _read_chunk(path, file).strip():
                    raise ValueError(f"{path}: text follows the end of the list; {FETCH_FILE}")
                return
            try:
                value, position = decoder.raw_decode(text, position)
            except (ValueError, RecursionError) as error:
                if at_end and not is_list and position == len(text):
                    return
                if at_end or not isinstance(error, json.JSONDecodeError):
                    raise _broken(path, error) from None
                if len(text) - position > MAX_ENTRY_CHARS:
                    reason = f"an entry of more than {MAX_ENTRY_CHARS} characters, or none that can be read"
                    raise ValueError(f"{path}: {reason}; {FETCH_FILE}") from None
                more = _read_chunk(path, file)
                text, position, at_end = text[position:] + more, 0, not more
                continue
            yield value


def _read_chunk(path: Path, file: TextIO) -> str:
    try:
        return file.read(CHUNK_CHARS)
    except UnicodeDecodeError as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: invalid or truncated JSON ({error!s:.200}); {FETCH_FILE}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")
