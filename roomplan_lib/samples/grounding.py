"""Descriptions of objects in a scan, asked either way: words to boxes, or a box to words.

ScanRefer (Chen et al., ECCV 2020) and Nr3D (Achlioptas et al., ECCV 2020): one object. Multi3DRefer (Zhang et al.,
ICCV 2023): none, one or several. Scan2Cap (Chen et al., CVPR 2021): ScanRefer's descriptions, grouped by object.
"""

from __future__ import annotations

import csv
import io
import random
from collections import defaultdict
from pathlib import Path

from roomplan_lib.samples.annotations import (
    FETCH_FILE,
    AnnotationFile,
    file_split,
    id_of,
    ids_of,
    read_entries,
    scene_id_of,
    text_of,
    unique,
)
from roomplan_lib.scenes.text import read_text

ONE_TARGET = (
    'Place an anchor on the object that is described so: "{}"',
    'Find the object of this description and place an anchor on it: "{}"',
    'Which object is meant? Place an anchor on it. "{}"',
)
ANY_TARGETS = (
    'Place an anchor on every object that fits this description, or on none if no object does: "{}"',
    'Mark all objects that are described here with anchors; there may be none: "{}"',
)
CAPTION = "Describe the object in <box_0>."
EVAL_TYPES = {"zt_w_d": (0, 0), "zt_wo_d": (0, 0), "st_w_d": (1, 1), "st_wo_d": (1, 1), "mt": (2, None)}


def read_scanrefer(path: Path | str, split: str | None = None, seed: int = 0) -> AnnotationFile:
    """The records of `ScanRefer_filtered_{train,val,test}.json`: an instruction for each description of one object.

    eval_type: "unique" where the file describes no other object of the same name in the scan, else "multiple".
    split: see `annotations.file_split`. seed: of the instructions' wording. Raises ValueError for anything malformed
    or a description given twice.
    """
    path = Path(path)
    split = file_split(path, split)
    entries = _scanrefer_entries(path)
    namesakes = defaultdict(set)
    for entry in entries:
        namesakes[entry["scene_id"], entry["object_name"]].add(entry["object_id"])
    records = [
        {
            **_instruction(ONE_TARGET, entry["description"], entry["question_id"], seed),
            "task": "scanrefer",
            "scene_id": entry["scene_id"],
            "question_id": entry["question_id"],
            "object_ids": [entry["object_id"]],
            "object_name": entry["object_name"],
            "eval_type": "unique" if len(namesakes[entry["scene_id"], entry["object_name"]]) == 1 else "multiple",
            "split": split,
            "source": "scanrefer",
        }
        for entry in entries
    ]
    return AnnotationFile("scanrefer", split, (path,), records)


def read_multi3drefer(path: Path | str, split: str | None = None, seed: int = 0) -> AnnotationFile:
    """The records of `multi3drefer_{train,val}.json`; `eval_type` says how many targets (zero zt, single st, multiple
    mt) and whether distractors of their class are there (w_d, wo_d).

    split, seed: as for `read_scanrefer`. Raises ValueError for anything malformed, an `ann_id` used twice in a scan, or
    a number of targets that is not its eval_type's.
    """
    path = Path(path)
    split = file_split(path, split)
    records, known = [], {}
    for where, entry in read_entries(path):
        scene_id = scene_id_of(entry, where)
        question_id = unique(known, f"{scene_id}-{id_of(entry, 'ann_id', where)}", where)
        object_ids, eval_type = ids_of(entry, "object_ids", where), text_of(entry, "eval_type", where)
        if eval_type not in EVAL_TYPES:
            raise ValueError(f"{where}: eval_type: expected one of {tuple(EVAL_TYPES)}, got {eval_type!r:.80}")
        least, most = EVAL_TYPES[eval_type]
        if len(object_ids) < least or most is not None and len(object_ids) > most:
            raise ValueError(f"{where}: eval_type {eval_type} does not go with {len(object_ids)} object_ids")
        records.append(
            {
                **_instruction(ANY_TARGETS, text_of(entry, "description", where), question_id, seed),
                "task": "multi3drefer",
                "scene_id": scene_id,
                "question_id": question_id,
                "object_ids": object_ids,
                "eval_type": eval_type,
                "split": split,
                "source": "multi3drefer",
            }
        )
    return AnnotationFile("multi3drefer", split, (path,), records)


def read_scan2cap(path: Path | str, split: str | None = None) -> AnnotationFile:
    """One record for each object that ScanRefer's file describes; all its descriptions are the answers.

    "<box_0>" in the question stands for the object's box. Raises ValueError as `read_scanrefer` does.
    """
    path = Path(path)
    split = file_split(path, split)
    captions = defaultdict(list)
    for entry in _scanrefer_entries(path):
        captions[entry["scene_id"], entry["object_id"]].append(entry["description"])
    records = [
        {
            "question": CAPTION,
            "answer": answers[0],
            "answers": answers,
            "task": "scan2cap",
            "scene_id": scene_id,
            "question_id": f"{scene_id}-{object_id}",
            "object_ids": [object_id],
            "split": split,
            "source": "scan2cap",
        }
        for (scene_id, object_id), answers in captions.items()
    ]
    return AnnotationFile("scan2cap", split, (path,), records)


def read_nr3d(path: Path | str, scene_list: Path | str, split: str | None = None, seed: int = 0) -> AnnotationFile:
    """The records of `nr3d.csv` about the scans of `scene_list`, such as ScanNet's `scannetv2_val.txt`: the table holds
    the utterances of all splits.

    split: see `annotations.file_split`, of the list. Raises ValueError for anything malformed, an `assignmentid` used
    twice, or no utterance about these scans.
    """
    split = file_split(scene_list, split)
    scene_ids = set(read_text(Path(scene_list)).split())
    path = Path(path)
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: no CSV table ({error}); {FETCH_FILE}") from None
    records, known = [], {}
    for index, row in enumerate(rows):
        where = f"{path}: row {index}"
        scene_id = scene_id_of(row, where, "scan_id")
        if scene_id not in scene_ids:
            continue
        question_id = unique(known, f"{scene_id}-nr3d-{id_of(row, 'assignmentid', where)}", where)
        records.append(
            {
                **_instruction(ONE_TARGET, text_of(row, "utterance", where), question_id, seed),
                "task": "nr3d",
                "scene_id": scene_id,
                "question_id": question_id,
                "object_ids": [id_of(row, "target_id", where)],
                "split": split,
                "source": "nr3d",
            }
        )
    if not records:
        raise ValueError(
            f"{path}: none of {len(rows)} utterances is about one of the {len(scene_ids)} scans of {split}"
        )
    return AnnotationFile("nr3d", split, (path, Path(scene_list)), records)


def _scanrefer_entries(path: Path) -> list[dict]:
    """{scene_id, object_id, object_name, description, question_id} of every entry, checked."""
    entries, known = [], {}
    for where, entry in read_entries(path):
        scene_id, object_id = scene_id_of(entry, where), id_of(entry, "object_id", where)
        question_id = unique(known, f"{scene_id}-{object_id}-{id_of(entry, 'ann_id', where)}", where)
        entries.append(
            {
                "scene_id": scene_id,
                "object_id": object_id,
                "object_name": text_of(entry, "object_name", where),
                "description": text_of(entry, "description", where),
                "question_id": question_id,
            }
        )
    return entries


def _instruction(templates: tuple[str, ...], description: str, question_id: str, seed: int) -> dict:
    chance = random.Random(f"{seed}/{question_id}")
    return {"instruction": chance.choice(templates).format(description), "description": description}
