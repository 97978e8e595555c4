"""Instruction data about single pictures, for stage 1: one view, no geometry.

    llava        LLaVA (Liu et al., 2023): [{id, image, conversations: [{from: human|gpt, value}]}]; "<image>" in the
                 first value stands for the picture
    sharegpt4v   ShareGPT4V (Chen et al., 2023): the same, in LLaMA-Factory's spellings too:
                 [{images: [path], conversations: ...}] or [{images, messages: [{role: user|assistant, content}]}]
    docvqa       DocVQA (Mathew et al., 2021): {data: [{questionId, question, image, answers, data_split}]}
    chartqa      ChartQA (Masry et al., 2022): [{imgname, query, label}]

A list may also come as JSON lines. Every answer becomes a record of its own: a training step supervises one response.
The turns before it stand in its question (see `with_history`), since records are mixed and know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

from roomplan_lib.files import file_hash
from roomplan_lib.samples import is_text, read_manifest, write_samples
from roomplan_lib.samples.annotations import (
    SPLIT_WORDS,
    file_split,
    file_words,
    id_of,
    iter_entries,
    read_entries,
    text_of,
    texts_of,
    unique,
)
from roomplan_lib.samples.build import refuse_overwriting
from roomplan_lib.scenes import path_below

TASK = "instruct"
MAX_LISTED = 10  # broken entries that the manifest names
IMAGE = "<image>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


def prepare_instruct(
    path: Path | str,
    images: Path | str,
    output: Path | str,
    *,
    layout: str,
    split: str | None = None,
    history: int = 8,
    skip_broken: bool = False,
    progress: bool = True,
) -> dict:
    """Write `output`, a JSONL file with a record for each answer of the file, and its manifest; returns that.

    images: folder that the file's picture names are relative to; the pictures must be there and are not opened.
    layout: one of LAYOUTS. split: train where nothing tells. history: earlier turns of a conversation that a question
    repeats at most. skip_broken: leave out entries that are malformed or whose picture is missing, and count them;
    else the first is an error. Conversations about no picture are always left out and counted.
    One entry is held at a time, so files of any size can be read (DocVQA's is read whole).

    Raises ValueError for an unknown layout, a broken file, a faulty entry, or when no record is left.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"format: expected one of {tuple(LAYOUTS)}, got {layout!r}")
    if history < 0:
        raise ValueError(f"history: expected a number of turns of at least 0, got {history}")
    path, images, output = Path(path), Path(images).absolute(), Path(output).absolute()
    refuse_overwriting(output, [path])
    if not images.is_dir():
        raise ValueError(f"{images}: no such folder of pictures")
    if split is not None or not file_words(path).isdisjoint(SPLIT_WORDS):
        split = file_split(path, split)
    left_out = {"without_picture": 0, "broken": 0, "first_broken": []}
    manifest = {
        "root": images,
        "source": layout,
        "annotations": {path.name: file_hash(path) if path.is_file() else ""},
        "settings": {"history": history, "skip_broken": skip_broken},
        "left_out": left_out,  # filled while the records are written
    }
    entries = read_entries(path, "data") if layout == "docvqa" else iter_entries(path)
    entries = tqdm(entries, unit="entry", desc=path.name, disable=not progress)
    read = partial(LAYOUTS[layout], split=split or "train", history=history)
    write_samples(output, _records(entries, read, images, layout, skip_broken, left_out), manifest)
    return read_manifest(output)


def summarise(manifest: dict) -> str:
    """Text for people about a file that `prepare_instruct` wrote."""
    splits = ", ".join(f"{name} {count}" for name, count in manifest["splits"].items())
    lines = [f"{manifest['file']}:", f"  {manifest['num_samples']} records about {len(manifest['scene_ids'])} pictures"]
    lines.append(f"  splits: {splits}")
    left_out = manifest["left_out"]
    if left_out["without_picture"]:
        lines.append(f"  left out: {left_out['without_picture']} conversations about no picture")
    if left_out["broken"]:
        lines += [
            f"  left out: {left_out['broken']} broken entries, first:",
            *map("    {}".format, left_out["first_broken"]),
        ]
    return "\n".join(lines)


def with_history(question: str, turns: list[tuple[str, str]]) -> str:
    """The question after the earlier (question, answer) turns of its conversation, a line each."""
    lines = [line for asked, answered in turns for line in (f"Question: {asked}", f"Answer: {answered}")]
    return "\n".join([*lines, f"Question: {question}"]) if lines else question


def _records(
    entries: Iterable[tuple[str, dict]],
    read: Callable[[dict, str], tuple[str | None, list[dict]]],
    images: Path,
    layout: str,
    skip_broken: bool,
    left_out: dict,
) -> Iterator[dict]:
    """The records of all entries; those left out are counted in `left_out`."""
    known: dict[str, str] = {}
    num_records = 0
    for index, (where, entry) in enumerate(entries):
        try:
            picture, answers = read(entry, where)
            if picture is None:
                left_out["without_picture"] += 1
                continue
            try:
                found = path_below(images, picture).is_file()
            except ValueError as error:
                raise ValueError(f"{where}: picture {error}") from None
            if not found:
                raise ValueError(f"{where}: the picture {picture} is not in {images}; fetch it or skip such entries")
            for turn, answer in enumerate(answers):
                if "question_id" in answer:
                    unique(known, answer["question_id"], where)
                else:  # LLaVA's own ids repeat
                    answer["question_id"] = f"{layout}-{index}-{turn}"
        except ValueError as error:
            if not skip_broken:
                raise
            left_out["broken"] += 1
            if len(left_out["first_broken"]) < MAX_LISTED:
                left_out["first_broken"].append(str(error))
            continue
        shared = {"images": [picture], "geom_token": None, "task": TASK, "scene_id": picture}
        for answer in answers:
            yield {**shared, **answer, "source": layout}
            num_records += 1
    if not num_records:
        raise ValueError(f"no record is left, entries left out: {left_out}; give the file's own layout and pictures")


# Layouts: (entry, where, split, history) -> (picture or None, the own keys of a record for each of its answers) -------


def _read_conversation(entry: dict, where: str, split: str, history: int) -> tuple[str | None, list[dict]]:
    turns = [_read_turn(turn, where) for turn in _turns(entry, where)]
    if turns and turns[0][0] == "system":
        turns = turns[1:]  # the model has its own
    pictures = entry.get("images", [entry["image"]] if entry.get("image") is not None else [])
    if not pictures:
        return None, []  # about no picture: left out and counted, whatever its turns
    roles = [role for role, _ in turns]
    if roles != ["human", "gpt"] * (len(roles) // 2) or not roles:
        raise ValueError(f"{where}: expected human and gpt by turns, human first, got {roles[:6]}")
    if not isinstance(pictures, list) or not all(map(is_text, pictures)):
        raise ValueError(f"{where}: image: expected a path or, as images, a list of paths, got {pictures!r:.80}")
    num_markers = sum(text.count(IMAGE) for _, text in turns)
    if not num_markers and len(pictures) == 1:
        num_markers = 1  # one picture needs no marker to tell where it belongs
    if num_markers != len(pictures):
        raise ValueError(f"{where}: {num_markers} times {IMAGE} in the text, but {len(pictures)} pictures")
    if len(pictures) > 1:
        raise ValueError(f"{where}: {len(pictures)} pictures; an instruction is about one view")
    texts = [text.replace(IMAGE, "").strip() for _, text in turns]
    if not all(texts):
        raise ValueError(f"{where}: a turn holds no words")
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    answers = [
        {
            "question": with_history(question, pairs[max(0, number - history) : number]),
            "answer": answer,
            "answers": [answer],
            "split": split,
        }
        for number, (question, answer) in enumerate(pairs)
    ]
    return (pictures[0] if pictures else None), answers


def _turns(entry: dict, where: str) -> list[dict]:
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{where}: conversations: expected a list of turns, got {turns!r:.80}")
    return turns


def _read_turn(turn: dict, where: str) -> tuple[str, str]:
    role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise ValueError(f"{where}: a turn: expected from human or gpt and its value, got {turn!r:.80}")
    return ROLES[role], text


def _read_docvqa(entry: dict, where: str, split: str, history: int) -> tuple[str, list[dict]]:
    if SPLIT_WORDS.get(str(entry.get("data_split", split))) != split:
        raise ValueError(f"{where}: data_split {entry['data_split']!r:.80}, but the file is taken for {split}")
    answers = texts_of(_worded(entry, "answers"), "answers", where) if "answers" in entry or split != "test" else []
    if not answers and split != "test":
        raise ValueError(f"{where}: answers: expected at least one; only a test file may hide them")
    record = {"question": text_of(entry, "question", where), "answers": answers, "split": split}
    record |= {"answer": answers[0]} if answers else {}
    return text_of(entry, "image", where), [record | {"question_id": f"docvqa-{id_of(entry, 'questionId', where)}"}]


def _worded(entry: dict, key: str) -> dict:
    """The entry with numbers at `key`, alone or in a list, as text: some files hold 4 for "4"."""

    def word(value: object) -> object:
        return str(value) if type(value) in (int, float) else value

    value = entry.get(key)
    return {**entry, key: [word(part) for part in value] if isinstance(value, list) else word(value)}


def _read_chartqa(entry: dict, where: str, split: str, history: int) -> tuple[str, list[dict]]:
    answer = text_of(_worded(entry, "label"), "label", where)
    record = {"question": text_of(entry, "query", where), "answer": answer, "answers": [answer], "split": split}
    return text_of(entry, "imgname", where), [record]


LAYOUTS = {
    "llava": _read_conversation,
    "sharegpt4v": _read_conversation,
    "docvqa": _read_docvqa,
    "chartqa": _read_chartqa,
}
