"""SQA3D (Ma et al., ICLR 2023): questions of somebody who stands in the scan, with where and how they stand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from roomplan_lib.samples import is_text, rounded
from roomplan_lib.samples.annotations import (
    AnnotationFile,
    file_split,
    id_of,
    numbers_of,
    read_entries,
    scene_id_of,
    text_of,
    unique,
)

SOURCE = "sqa3d"
QUESTION_TYPES = ("what", "is", "how", "can", "which")  # anything else counts as "other"


def question_type(question: str) -> str:
    """The type that SQA3D's evaluation counts a question to: what it starts with, in any case ("What's" is "what")."""
    start = question.lstrip().lower()
    return next((word for word in QUESTION_TYPES if start.startswith(word)), "other")


def read_sqa3d(questions: Path | str, annotations: Path | str, split: str | None = None) -> AnnotationFile:
    """The file of questions joined with its file of answers and positions, by `question_id`.

    split: see `annotations.file_split`. Raises ValueError for anything malformed, a question or an annotation without
    its other half, an id used twice, or two files of different splits.
    """
    questions, annotations = Path(questions), Path(annotations)
    split = file_split(questions, split)
    file_split(annotations, split)
    halves, known = {}, {}
    for where, entry in read_entries(annotations, "annotations"):
        halves[unique(known, id_of(entry, "question_id", where), where)] = where, entry
    records, agents, known = [], {}, {}
    for where, entry in read_entries(questions, "questions"):
        question_id = unique(known, id_of(entry, "question_id", where), where)
        if question_id not in halves:
            raise ValueError(
                f"{where}: question {question_id} has no annotation in {annotations}; give both of a split"
            )
        other, half = halves.pop(question_id)
        scene_id, question = scene_id_of(entry, where), text_of(entry, "question", where)
        if (elsewhere := scene_id_of(half, other)) != scene_id:
            raise ValueError(f"{where}: question {question_id} is about {scene_id}, its annotation about {elsewhere}")
        answers = [text_of(answer, "answer", other) for answer in _answers(half, other)]
        records.append(
            {
                "situation": text_of(entry, "situation", where),
                "question": question,
                "answer": answers[0],
                "answers": answers,
                "alternative_situations": _alternatives(entry, where),
                "task": SOURCE,
                "question_type": question_type(question),
                "scene_id": scene_id,
                "question_id": question_id,
                "split": split,
                "source": SOURCE,
            }
        )
        agents[question_id] = position, quaternion = _agent(half, other)
        # As annotated, for the official localization metric: metres and (x, y, z, w) in the scan's own, centred frame.
        records[-1] |= {"position": position.tolist(), "rotation": quaternion.tolist()}
    if halves:
        raise ValueError(
            f"{annotations}: {len(halves)} annotations have no question in {questions}, such as {min(halves)}; "
            "give both files of a split"
        )
    return AnnotationFile(SOURCE, split, (questions, annotations), records, agents)


def agent_record(
    position: np.ndarray, quaternion: np.ndarray, mesh_to_world: np.ndarray, mesh_center: np.ndarray
) -> dict:
    """{position [3] metres, facing [3] unit} of SQA3D's agent in the axis-aligned frame of the scene.

    position [3] and quaternion [4] (x, y, z, w) as annotated: in the scan's own frame, relative to the middle
    mesh_center [3] of its unaligned vertices' bounding box. mesh_to_world: [4, 4], the axis alignment.
    The agent looks along -x of its own axes, which is where the official viewer's arrow points.
    """
    world = mesh_to_world @ [*(position + mesh_center), 1.0]
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    first_axis = np.array([1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)])
    return {"position": rounded(world[:3], 4), "facing": rounded(-mesh_to_world[:3, :3] @ first_axis, 6)}


def type_counts(records: list[dict]) -> dict[str, int]:
    """Questions by type, in the order of the official tables."""
    counts = Counter(record["question_type"] for record in records)
    return {name: counts[name] for name in (*QUESTION_TYPES, "other")}


def _alternatives(entry: dict, where: str) -> list[str]:
    """The same situation in other words; annotators left some of the two fields empty."""
    texts = entry.get("alternative_situation", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: alternative_situation: expected a list of texts, got {texts!r:.80}")
    return [text.strip() for text in texts if is_text(text)]


def _answers(entry: dict, where: str) -> list[dict]:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, dict) for answer in answers):
        raise ValueError(f"{where}: answers: expected a list of objects with the key 'answer', got {answers!r:.80}")
    return answers


def _agent(entry: dict, where: str) -> tuple[np.ndarray, np.ndarray]:
    position = numbers_of(entry, "position", ("x", "y", "z"), where)
    quaternion = numbers_of(entry, "rotation", ("_x", "_y", "_z", "_w"), where)
    if abs(np.linalg.norm(quaternion) - 1) > 1e-3:
        raise ValueError(f"{where}: rotation: expected a unit quaternion, got {quaternion.tolist()}")
    return position, quaternion
