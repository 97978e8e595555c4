"""Annotation files about rendered rooms, in the formats and under the names of ScanQA, SQA3D, ScanRefer, Multi3DRefer
and Nr3D.

    annotations/scanqa/ScanQA_v1.0_{train,val,test_w_obj}.json
    annotations/sqa3d/v1_balanced_{questions,sqa_annotations}_{train,val,test}_scannetv2.json
    annotations/scanrefer/ScanRefer_filtered_{train,val}.json, .txt     also what Scan2Cap groups by object
    annotations/multi3drefer/multi3drefer_{train,val}.json
    annotations/nr3d/nr3d.csv

Everything that is asked or told follows from the room's plan with a margin (see `samples.qa`) and is about furniture
that some posed view shows. Objects go by ScanNet's objectId.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples.describe import (
    CLEAR_MARGIN,
    category_text,
    center_distance,
    footprint_gap,
    plural,
    unique_phrases,
    with_article,
)
from roomplan_lib.samples.qa import (
    FRONT_OR_BEHIND,
    LEFT_OR_RIGHT,
    SITUATION,
    build_qa,
    clear_sides,
    standing_places,
)
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, REFERENCE_PIXELS
from roomplan_lib.scenes import CATEGORIES, Scene
from roomplan_lib.scenes.rooms.collection import HELD_OUT_EVERY, held_out
from roomplan_lib.scenes.rooms.plan import CELL, rectangle_corners, walkable_grid
from roomplan_lib.scenes.rooms.scannet import SCANNET_LABELS

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OTHER_SITUATIONS = (
    "The {} is right beside me and I am looking straight at the {}.",
    "I have stopped next to the {}, with the {} straight ahead of me.",
)
DIRECTIONS = {"left": "on my left", "right": "on my right", "in front": "in front of me", "behind": "behind me"}
OPPOSITE = {"left": "right", "right": "left", "in front": "behind", "behind": "in front", "yes": "no", "no": "yes"}
MAX_PER_ANSWER = 3  # SQA3D questions of one kind with one answer in one scene
MAX_OBSTACLE_HEIGHT = 1.2  # metres above the floor from which furniture hangs over a standing person's way
FIRST_QUESTION_ID = 900_000_000_000  # SQA3D's own ids start with 2206
SQA3D_HEADER = {
    "info": {
        "description": "Questions about rendered rooms, in the format of SQA3D v1.0.", "url": "", "version": "1.0",
        "year": 2022, "contributor": "roomplan_lib", "date_created": "",
    },
    "license": {"url": "", "name": "that of the program that made them"},
    "data_type": "scannet",
    "data_subtype": "v2",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Room:
    """What is known of a rendered room. scene: aligned frame; its box k is the furniture with objectId k."""

    scene: Scene
    visible: np.ndarray  # [num_boxes] bool
    names: list[str]  # of the boxes, as ScanRefer and ScanQA write ScanNet's labels
    polygon: np.ndarray  # [N, 2] metres, aligned frame
    axis_alignment: np.ndarray  # [4, 4] raw to aligned
    mesh_center: np.ndarray  # [3] metres, raw frame: middle of the mesh's bounding box
    index: int

    @property
    def split(self) -> str:
        """Held-out rooms are by turns for validation and for test."""
        if not held_out(self.index):
            return "train"
        return ("val", "test")[self.index // HELD_OUT_EVERY % 2]


def write_annotations(root: Path | str, seed: int = 0, progress: bool = True) -> list[Path]:
    """Write the annotation files about all rendered rooms under root/scans; returns their paths.

    Words and choice of questions depend on `seed` and the room alone. A split without rooms has no file: the test
    split starts with the tenth room. Files that are there are replaced.
    Raises ValueError when there are no rooms or a sidecar cannot be read.
    """
    root = Path(root)
    sidecars = sorted(root.glob("scans/*/*_room.json"))
    if not sidecars:
        raise ValueError(f"{root}/scans: no rendered rooms; make them with `roomplan rooms --layout scannet`")
    files: dict[str, list] = defaultdict(list)
    for path in tqdm(sidecars, desc="annotations", unit="room", disable=not progress):
        for name, entries in _entries(_read_room(path), seed).items():
            files[name] += entries
    for name, entries in files.items():
        write_whole(root / "annotations" / name, _file_text(name, entries))
    return [root / "annotations" / name for name in sorted(files)]


def _entries(room: _Room, seed: int) -> dict[str, list]:
    """What each file below annotations/ says of a room; files that say nothing of it are left out."""
    split = room.split
    samples, situated = build_qa(room.scene, room.visible, seed), _sqa3d(room, seed)
    files = {
        f"scanqa/ScanQA_v1.0_{'test_w_obj' if split == 'test' else split}.json": _scanqa(room, samples),
        f"sqa3d/v1_balanced_questions_{split}_scannetv2.json": [question for question, _ in situated],
        f"sqa3d/v1_balanced_sqa_annotations_{split}_scannetv2.json": [annotation for _, annotation in situated],
    }
    if split != "test":
        told = list(_descriptions(room, samples))
        files |= {
            f"scanrefer/ScanRefer_filtered_{split}.json": _scanrefer(room, told),
            f"scanrefer/ScanRefer_filtered_{split}.txt": [room.scene.scene_id],
            f"multi3drefer/multi3drefer_{split}.json": _multi3drefer(room, told, seed),
            "nr3d/nr3d.csv": _nr3d(room, told),
        }
    return {name: entries for name, entries in files.items() if entries}


def _file_text(name: str, entries: list) -> str:
    if name.endswith(".txt"):
        return "".join(f"{entry}\n" for entry in entries)
    if name.endswith(".csv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, entries[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
        return table.getvalue()
    if name.startswith("sqa3d/"):
        parts = {"task_type": "Situated question answering", "questions": entries}
        body = SQA3D_HEADER | (parts if "questions" in name else {"annotations": entries})
    else:
        body = entries
    return json.dumps(body, allow_nan=False, indent=1) + "\n"


def _read_room(path: Path) -> _Room:
    try:
        told = json.loads(path.read_text())
        alignment = np.array(told["axis_alignment"])
        instances = sorted(told["instances"].values(), key=lambda instance: instance["objectId"])
        boxes = [
            OrientedBox(i["center"], i["extent"], i["rotation"], i["label"], str(k)).transformed(alignment)
            for k, i in enumerate(instances)
        ]
        return _Room(
            Scene(told["scene_id"], [], boxes, "rooms", colors={str(k): i["color"] for k, i in enumerate(instances)}),
            np.array([i["visible_share"] >= MIN_VISIBLE_PIXELS / REFERENCE_PIXELS for i in instances], dtype=bool),
            [i["scannet_label"].replace(" ", "_") for i in instances],
            (np.array(told["polygon"]) @ alignment[:3, :3].T + alignment[:3, 3])[:, :2],
            alignment,
            np.array(told["mesh_center"]),
            told["settings"]["index"],
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: no sidecar of a room in ScanNet's layout ({type(error).__name__} {error}); "
            "delete the room's folders and make it again"
        ) from None


def _named(room: _Room) -> dict[int, str]:
    """The phrase that fits it alone, by index of the visible boxes that have one."""
    return {index: phrase for index, phrase in unique_phrases(room.scene).items() if room.visible[index]}


def _phrase(room: _Room, index: int) -> str:
    """ "the bed", or "a chair" where no phrase fits one chair alone."""
    phrase = unique_phrases(room.scene).get(index)
    return f"the {phrase}" if phrase else with_article(category_text(room.scene.boxes[index].label))


# ScanQA


def _scanqa(room: _Room, samples: list[dict]) -> list[dict]:
    """Questions with one or two answers, in lower case as ScanQA's; without answers for the test split."""
    entries = []
    for sample in samples:
        indices = [int(object_id) for object_id in sample["object_ids"]]
        for question, answers in _scanqa_forms(room, sample):
            entry = {
                "scene_id": room.scene.scene_id,
                "question_id": f"{room.split}-{room.scene.scene_id[:9]}-{len(entries)}",
                "question": question,
                "answers": [answer.lower() for answer in answers],
                "object_ids": indices,
                "object_names": [room.names[index] for index in indices],
            }
            if room.split == "test":
                del entry["answers"]
            entries.append(entry)
    return entries


def _scanqa_forms(room: _Room, sample: dict) -> list[tuple[str, list[str]]]:
    """(question, answers) that a sample of `build_qa` gives in ScanQA's manner; none for its other tasks."""
    question, answer = sample["question"], sample["answer"]
    if sample["task"] == "qa_color":
        return [(question, [answer])]
    if sample["task"] == "qa_count":
        return [(question, [answer, NUMBER_WORDS[int(answer)]])]
    if sample["task"] == "qa_nearest":
        thing, neighbour = (_phrase(room, int(object_id)) for object_id in sample["object_ids"])
        place = (f"Where is {thing} located?", [f"next to {neighbour}", f"beside {neighbour}"])
        return [(question, [answer, neighbour]), place]
    return []


# SQA3D


def _sqa3d(room: _Room, seed: int) -> list[tuple[dict, dict]]:
    """(question, annotation) entries. The agent stands on free floor and faces the middle of the object it names."""
    chance = random.Random(f"{seed}/{room.scene.scene_id}/sqa3d")
    named = _named(room)
    by_answer: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    places = _free_places(room, list(named))
    poses = {}
    for by, faced in permutations(named, 2):
        if not len(places[by]):
            continue
        poses[by, faced] = chance.choice(places[by].tolist())
        for kind, question, answer in _situated_questions(room, named, by, faced, chance):
            by_answer[kind][answer].append((question, answer, by, faced))
    chosen = []
    for answers in by_answer.values():
        for answer, questions in answers.items():
            # Of two opposite answers both come equally often, so that neither is the better guess.
            count = min(MAX_PER_ANSWER, len(questions), len(answers.get(OPPOSITE.get(answer, answer), ())))
            chosen += chance.sample(questions, count)
    entries = []
    for number, (question, answer, by, faced) in enumerate(chosen):
        question_id = FIRST_QUESTION_ID + 1000 * room.index + number
        names = named[by], named[faced]
        position, rotation = _agent(room, np.array(poses[by, faced]), room.scene.boxes[faced].center[:2])
        entries.append(
            (
                {
                    "scene_id": room.scene.scene_id,
                    "situation": SITUATION[by % len(SITUATION)].format(*names),
                    "alternative_situation": [text.format(*names) for text in OTHER_SITUATIONS],
                    "question": question,
                    "question_id": question_id,
                },
                {
                    "scene_id": room.scene.scene_id,
                    "question_type": "N/A",
                    "answer_type": "other",
                    "question_id": question_id,
                    "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}],
                    "rotation": rotation,
                    "position": position,
                },
            )
        )
    return entries


def _situated_questions(
    room: _Room, named: dict[int, str], by: int, faced: int, chance: random.Random
) -> Iterator[tuple[str, str, str]]:
    """(kind, question, answer) for one who stands by box `by` and faces box `faced`."""
    boxes = room.scene.boxes
    sides = {i: clear_sides(boxes[by], boxes[faced], boxes[i]) for i in range(len(boxes)) if i not in (by, faced)}
    for index, name in named.items():
        for answer in sides.get(index, ()):
            if answer in ("left", "right"):
                for number, wording in enumerate(LEFT_OR_RIGHT):
                    yield f"side{number}", wording.format(name), answer
                asked = chance.choice(("left", "right"))
                yield "can", f"Can I find the {name} {DIRECTIONS[asked]}?", "yes" if asked == answer else "no"
            else:
                yield "front", chance.choice(FRONT_OR_BEHIND).format(name), answer
            if name == category_text(boxes[index].label):  # a colour in the name would give the answer away
                color = room.scene.colors[boxes[index].object_id]
                yield "color", f"What color is the {name} {DIRECTIONS[answer]}?", color
    for first, second in permutations(set(named) & set(sides), 2):
        for side in sides[first]:
            if OPPOSITE[side] in sides[second]:
                pair = chance.sample([named[first], named[second]], 2)
                yield "which", f"Which is {DIRECTIONS[side]}, the {pair[0]} or the {pair[1]}?", named[first]
    for category in CATEGORIES:
        group = [index for index, box in enumerate(boxes) if box.label == category]
        if not group or not room.visible[group].all() or by in group or faced in group:
            continue
        for side, words in DIRECTIONS.items():
            if all(side in sides[index] or OPPOSITE[side] in sides[index] for index in group):
                count = sum(side in sides[index] for index in group)
                yield "count", f"How many {plural(category)} are {words}?", NUMBER_WORDS[count]


def _free_places(room: _Room, indices: list[int]) -> dict[int, np.ndarray]:
    """[N, 2] metres, aligned frame: where on the free floor one stands by each of the boxes."""
    low = room.polygon.min(axis=0)
    obstacles = [
        rectangle_corners(box.center[:2] - low, box.extent[:2] / 2, box.yaw)
        for box in room.scene.boxes
        if box.center[2] - box.extent[2] / 2 < MAX_OBSTACLE_HEIGHT
    ]
    free = walkable_grid(room.polygon - low, obstacles)
    found = {}
    for index in indices:
        places = standing_places(room.scene.boxes[index])
        cells = np.floor((places - low) / CELL).astype(int)
        inside = ((cells >= 0) & (cells < free.shape)).all(axis=1)
        found[index] = places[inside][free[tuple(cells[inside].T)]]
    return found


def _agent(room: _Room, place: np.ndarray, target: np.ndarray) -> tuple[dict, dict]:
    """SQA3D's position and rotation of one who stands at `place` [2] and faces `target` [2], aligned frame.

    Position: raw frame, metres from the middle of the mesh's bounding box, z = 0. Rotation: quaternion about z, raw
    frame, of an agent that faces its own -x.
    """
    turn = room.axis_alignment[:2, :2]  # axisAlignment turns about z alone
    raw = turn.T @ (place - room.axis_alignment[:2, 3]) - room.mesh_center[:2]
    facing = turn.T @ (target - place)
    angle = np.arctan2(facing[1], facing[0]) + np.pi
    position = {"x": float(raw[0]), "y": float(raw[1]), "z": 0}
    return position, {"_x": 0, "_y": 0, "_z": float(np.sin(angle / 2)), "_w": float(np.cos(angle / 2))}


# ScanRefer, Multi3DRefer, Nr3D


def _descriptions(room: _Room, samples: list[dict]) -> Iterator[tuple[int, str]]:
    """(index of the box, description that fits it alone), several for most objects that views show."""
    neighbours = dict(map(int, sample["object_ids"]) for sample in samples if sample["task"] == "qa_nearest")
    named = _named(room)
    for index, box in enumerate(room.scene.boxes):
        if not room.visible[index]:
            continue
        category, color = category_text(box.label), room.scene.colors[box.object_id]
        thing = f"{color} {category}"
        if index in named:
            yield index, f"This is {with_article(thing)}."
            yield index, f"There is {with_article(thing)} in the room. It is about {box.extent[2]:.1f} meters high."
            if index in neighbours:
                yield index, f"The {thing} stands closest to {_phrase(room, neighbours[index])}."
        for place in _places(room, index, named):
            yield index, f"This {category} is the one {place}. It is {color}."


def _places(room: _Room, index: int, named: dict[int, str]) -> list[str]:
    """ "nearest to the bed": what tells a box from the others of its category; none for the only one of its kind.

    Both people's measure, the gap, and the record's, the centre, must agree by CLEAR_MARGIN.
    """
    boxes = room.scene.boxes
    rivals = [box for box in boxes if box.label == boxes[index].label and box is not boxes[index]]
    places = []
    for landmark, name in named.items():
        if not rivals or boxes[landmark].label == boxes[index].label:
            continue
        found = set()
        for measure in (center_distance, footprint_gap):
            own, others = measure(boxes[index], boxes[landmark]), [measure(box, boxes[landmark]) for box in rivals]
            near, far = own + CLEAR_MARGIN <= min(others), own >= max(others) + CLEAR_MARGIN
            found.add(f"nearest to the {name}" if near else f"farthest from the {name}" if far else "")
        if len(found) == 1:
            places += filter(None, found)
    return places


def _scanrefer(room: _Room, told: list[tuple[int, str]]) -> list[dict]:
    counts: dict[int, int] = defaultdict(int)
    entries = []
    for index, description in told:
        entries.append(
            {
                "scene_id": room.scene.scene_id,
                "object_id": room.scene.boxes[index].object_id,
                "object_name": room.names[index],
                "ann_id": str(counts[index]),
                "description": description.lower(),
                "token": _tokens(description),
            }
        )
        counts[index] += 1
    return entries


def _multi3drefer(room: _Room, told: list[tuple[int, str]], seed: int) -> list[dict]:
    """Descriptions of no, one or several objects; "with distractors" means that others of the category are there."""
    chance = random.Random(f"{seed}/{room.scene.scene_id}/multi3drefer")
    groups: dict[str, list[int]] = defaultdict(list)
    for index, box in enumerate(room.scene.boxes):
        groups[box.label].append(index)
    name_of = {label: SCANNET_LABELS.get(label, label).replace(" ", "_") for label in CATEGORIES}
    asked: list[tuple[str, str, list[int], str]] = []  # eval_type, category, boxes, description
    for index, description in told:
        label = room.scene.boxes[index].label
        asked.append(("st_wo_d" if len(groups[label]) == 1 else "st_w_d", label, [index], description))
    for label, group in groups.items():
        colors = {index: room.scene.colors[room.scene.boxes[index].object_id] for index in group}
        missing = sorted(set(room.scene.colors.values()) - set(colors.values()))
        if missing:
            thing = f"{chance.choice(missing)} {category_text(label)}"
            asked.append(("zt_w_d", label, [], f"This is {with_article(thing)}."))
        if len(group) > 1 and room.visible[group].all():
            asked.append(("mt", label, group, f"These are all the {plural(label)} in the room."))
            for color in sorted(set(colors.values())):
                same = [index for index in group if colors[index] == color]
                if 1 < len(same) < len(group):
                    asked.append(("mt", label, same, f"These are the {color} {plural(label)}."))
    for label in chance.sample([label for label in CATEGORIES if label not in groups], 3):
        thing = f"{chance.choice(sorted(set(room.scene.colors.values())))} {category_text(label)}"
        asked.append(("zt_wo_d", label, [], f"This is {with_article(thing)}."))
    return [
        {
            "scene_id": room.scene.scene_id,
            "object_ids": indices,
            "object_name": name_of[label],
            "ann_id": number,
            "eval_type": eval_type,
            "description": description.lower(),
        }
        for number, (eval_type, label, indices, description) in enumerate(asked)
    ]


def _nr3d(room: _Room, told: list[tuple[int, str]]) -> list[dict]:
    """Rows of Nr3D's table: descriptions of objects that have others of their kind in the scene.

    stimulus_id: scene, kind, how many of the kind, the target and then the others, joined by "-".
    """
    boxes, rows = room.scene.boxes, []
    for index, description in told:
        others = [box.object_id for box in boxes if box.label == boxes[index].label and box is not boxes[index]]
        if not others:
            continue
        kind, target = room.names[index].replace("_", " "), boxes[index].object_id
        rows.append(
            {
                "assignmentid": 1000 * room.index + len(rows) + 1,
                "stimulus_id": "-".join([room.scene.scene_id, kind, str(len(others) + 1), target, *others]),
                "utterance": description,
                "dataset": "nr3d",
                "scan_id": room.scene.scene_id,
                "instance_type": kind,
                "target_id": target,
                "tokens": str(_tokens(description)),
                "correct_guess": True,
                "mentions_target_class": True,
            }
        )
    return rows


def _tokens(text: str) -> list[str]:
    """Words and punctuation marks, in lower case, as ScanRefer's `token`."""
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?|[.,?]", text.lower())
