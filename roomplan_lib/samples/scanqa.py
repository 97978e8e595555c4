"""ScanQA (Azuma et al., CVPR 2022): questions about a scan, with several answers and the objects they are about."""

from __future__ import annotations

from pathlib import Path

from roomplan_lib.samples.annotations import (
    SPLIT_WORDS,
    AnnotationFile,
    file_split,
    id_of,
    ids_of,
    read_entries,
    scene_id_of,
    text_of,
    texts_of,
    unique,
)

SOURCE = "scanqa"


def read_scanqa(path: Path | str, split: str | None = None) -> AnnotationFile:
    """The records of `ScanQA_v1.0_{train,val,test_w_obj,test_wo_obj}.json`; the test files hide their answers.

    Every answer is kept, twins too, since the official metrics count them. split: see `annotations.file_split`.
    Raises ValueError for anything malformed, an id used twice or of another split than the file's.
    """
    path = Path(path)
    split = file_split(path, split)
    records, known = [], {}
    for where, entry in read_entries(path):
        question_id = unique(known, id_of(entry, "question_id", where), where)
        prefix = question_id.partition("-")[0]
        if SPLIT_WORDS.get(prefix, split) != split:
            raise ValueError(f"{where}: question {question_id} is of the split {prefix}, not of {split}")
        record = {"question": text_of(entry, "question", where)}
        if split != "test" or entry.get("answers"):
            record["answers"] = texts_of(entry, "answers", where)
            if not record["answers"]:
                raise ValueError(f"{where}: answers: expected at least one; only a test file may hide them")
            record["answer"] = record["answers"][0]
        else:
            record["answers"] = []
        if split != "test" or entry.get("object_ids"):
            record["object_ids"] = ids_of(entry, "object_ids", where)
        if "object_names" in entry:
            record["object_names"] = texts_of(entry, "object_names", where)
        records.append(
            {
                **record,
                "task": SOURCE,
                "scene_id": scene_id_of(entry, where),
                "question_id": question_id,
                "split": split,
                "source": SOURCE,
            }
        )
    return AnnotationFile(SOURCE, split, (path,), records)
