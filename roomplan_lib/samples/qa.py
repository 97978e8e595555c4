"""Question-answer samples whose answers follow from the boxes, for objects that the views show.

Every object in a question is named by a phrase that fits it alone, and every answer holds with a margin, so that a
few centimetres or degrees of annotation noise do not change it. Positions and directions are horizontal.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations

import numpy as np

from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import box_record
from roomplan_lib.samples.describe import (
    CLEAR_MARGIN,
    category_text,
    center_distance,
    footprint_gap,
    plural,
    unique_phrases,
    upright,
    with_article,
)
from roomplan_lib.scenes import CATEGORIES, Scene

QA_TASKS = ("qa_existence", "qa_count", "qa_color", "qa_side", "qa_nearest", "qa_distance")
MAX_PER_TASK = 6  # questions of one task in one scene, so that a crowded scene does not drown the others
SIDE_MARGIN_DEG = 25.0  # left and right keep this far from straight ahead and straight behind, and the reverse
STANDING_DISTANCES = (0.2, 0.6)  # metres from an object's side to somebody who stands by it: nearest and farthest
DISTANCE_STEP = 0.5  # metres to which distances are asked
DISTANCE_MARGIN = 0.17  # metres a distance may lie off its rounded value; 0.25 would be on the edge

EXISTENCE = ("Is there {} in the room?", "Can you see {} in this room?", "Does the room have {}?")
COUNT = ("How many {} are there in the room?", "How many {} are in this room?")
COLOR = ("What color is the {}?", "What is the color of the {}?")
NEAREST = ("Which object is closest to the {}?", "What is the object nearest to the {}?")
DISTANCE = (
    "How far apart are the {} and the {}, measured horizontally from center to center, in meters rounded to 0.5?",
    "What is the horizontal distance between the centers of the {} and the {}, in meters rounded to 0.5?",
)
SITUATION = (
    "I am standing by the {} and facing the {}.",
    "I stand next to the {} and look at the {}.",
)
LEFT_OR_RIGHT = ("Is the {} on my left or on my right?", "On which side of me is the {}, left or right?")
FRONT_OR_BEHIND = ("Is the {} in front of me or behind me?",)


def build_qa(scene: Scene, visible: np.ndarray, seed: int = 0, tasks: Sequence[str] = QA_TASKS) -> list[dict]:
    """The question-answer samples of a scene, without the keys all its samples share (`images`, ...).

    visible: [num_boxes] bool, which boxes the sample's views show. tasks: which of QA_TASKS to ask. Within a scene the
    answers yes and no, left and right, in front and behind come equally often. Words and order depend on `seed` and the
    scene alone.
    """
    named = {
        index: phrase
        for index, phrase in unique_phrases(scene).items()
        if visible[index] and upright(scene.boxes[index]) is not None
    }
    samples: list[dict] = []
    for task, build in zip(QA_TASKS, (_existence, _count, _color, _side, _nearest, _distance), strict=True):
        if task not in tasks:
            continue
        chance = random.Random(f"{seed}/{scene.scene_id}/{task}")
        for number, (question, answer, indices, situation) in enumerate(build(scene, visible, named, chance)):
            boxes = [scene.boxes[index] for index in indices]
            samples.append(
                {
                    **({"situation": situation} if situation else {}),
                    "question": question,
                    "answer": answer,
                    "task": task,
                    "question_id": f"{scene.scene_id}-{task}-{number:03d}",
                    "object_ids": [box.object_id for box in boxes],
                    "boxes": [box_record(box) for box in boxes],
                }
            )
    return samples


def side_of(agent: np.ndarray, faced: np.ndarray, thing: np.ndarray) -> np.ndarray:
    """[...] bearing of `thing` [2] for somebody at `agent` [..., 2] who faces `faced` [2], metres, world x and y.

    Radians in (-pi, pi], 0 straight ahead, positive to the left (z points up).
    """
    ahead, there = faced - agent, thing - agent
    cross = ahead[..., 0] * there[..., 1] - ahead[..., 1] * there[..., 0]
    return np.arctan2(cross, (ahead * there).sum(-1))


@lru_cache(maxsize=256)
def standing_places(box: OrientedBox) -> np.ndarray:
    """[49, 2] metres: where one who stands by an upright box may be.

    The middle, and 24 places on the footprint's outline grown by each of STANDING_DISTANCES (corners rounded).
    """
    half_x, half_y = box.extent[:2] / 2
    places = [np.zeros((1, 2))]
    for distance in STANDING_DISTANCES:
        across = np.linspace(-1, 1, 4)
        for sign in (-1, 1):
            places.append(np.stack([across * half_x, np.full(4, sign * (half_y + distance))], -1))
            places.append(np.stack([np.full(4, sign * (half_x + distance)), across * half_y], -1))
        corner = np.array([half_x, half_y]) + distance * np.array([[np.sqrt(3), 1], [1, np.sqrt(3)]]) / 2
        places += [corner * signs for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1])]
    return box.center[:2] + np.concatenate(places) @ box.rotation[:2, :2].T


# Each builder returns (question, answer, indices of the boxes asked for, situation or "").
Question = tuple[str, str, list[int], str]


def _existence(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    present = {box.label for box in scene.boxes}
    shown = {box.label for box, seen in zip(scene.boxes, visible, strict=True) if seen}
    yes = [category for category in CATEGORIES if category in shown]
    no = [category for category in CATEGORIES if category not in present]
    count = min(len(yes), len(no), MAX_PER_TASK // 2)
    questions = []
    asked = [(category, "yes") for category in chance.sample(yes, count)]
    asked += [(category, "no") for category in chance.sample(no, count)]
    for category, answer in asked:
        question = chance.choice(EXISTENCE).format(with_article(category_text(category)))
        questions.append((question, answer, [i for i in _instances(scene, category) if visible[i]], ""))
    return questions


def _count(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    groups = {category: _instances(scene, category) for category in CATEGORIES}
    groups = {category: indices for category, indices in groups.items() if indices and visible[indices].all()}
    several = [category for category, indices in groups.items() if len(indices) > 1]
    single = [category for category, indices in groups.items() if len(indices) == 1]
    # Most categories occur once: one such question per scene keeps "1" from being the usual answer.
    asked = several[: MAX_PER_TASK - 1] + chance.sample(single, min(1, len(single)))
    return [
        (chance.choice(COUNT).format(plural(category)), str(len(groups[category])), groups[category], "")
        for category in asked
    ]


def _color(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    options = []
    for index in named:
        box = scene.boxes[index]
        # A phrase with a colour in it would give the answer away.
        if len(_instances(scene, box.label)) == 1 and box.object_id in scene.colors:
            question = chance.choice(COLOR).format(category_text(box.label))
            options.append((question, scene.colors[box.object_id], [index], ""))
    return _some(options, chance)


def _side(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    by_answer: dict[str, list[Question]] = {"left": [], "right": [], "in front": [], "behind": []}
    for by, faced, thing in permutations(named, 3):
        for answer in clear_sides(*(upright(scene.boxes[i]) for i in (by, faced, thing))):
            wording = LEFT_OR_RIGHT if answer in ("left", "right") else FRONT_OR_BEHIND
            by_answer[answer].append(
                (
                    chance.choice(wording).format(named[thing]),
                    answer,
                    [by, faced, thing],
                    chance.choice(SITUATION).format(named[by], named[faced]),
                )
            )
    questions = []
    for pair, limit in ((("left", "right"), MAX_PER_TASK // 2), (("in front", "behind"), MAX_PER_TASK // 2)):
        count = min(limit, *(len(by_answer[answer]) for answer in pair))
        questions += [question for answer in pair for question in chance.sample(by_answer[answer], count)]
    return questions


def clear_sides(by: OrientedBox, faced: OrientedBox, thing: OrientedBox) -> list[str]:
    """Which of left / right and of in front / behind hold for `thing`, clearly, for one by `by` who faces `faced`.

    "By" leaves open where exactly, so the answer must be the same from all `standing_places`, with SIDE_MARGIN_DEG
    to spare. All three are upright boxes.
    """
    if center_distance(by, faced) < 1.0 or footprint_gap(by, thing) < CLEAR_MARGIN:
        return []
    bearings = np.degrees(side_of(standing_places(by), faced.center[:2], thing.center[:2]))
    margin = SIDE_MARGIN_DEG
    holds = {
        "left": (bearings > margin) & (bearings < 180 - margin),
        "right": (bearings < -margin) & (bearings > margin - 180),
        "in front": np.abs(bearings) < 90 - margin,
        "behind": np.abs(bearings) > 90 + margin,
    }
    return [answer for answer, everywhere in holds.items() if everywhere.all()]


def _nearest(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    standing = [upright(box) for box in scene.boxes]
    if any(box is None for box in standing):
        return []
    questions = []
    for index, phrase in named.items():
        others = [i for i in range(len(standing)) if i != index]
        answers = set()
        for measure in (center_distance, footprint_gap):  # the gap is what people see; the centre must agree
            ranked = sorted((measure(standing[index], standing[i]), i) for i in others)
            if not ranked:
                break
            first = ranked[0][1]
            rest = [distance for distance, i in ranked if standing[i].label != standing[first].label]
            clear = not rest or ranked[0][0] + CLEAR_MARGIN <= rest[0]
            answers.add(first if clear else -1)
        if len(answers) == 1 and (nearest := answers.pop()) >= 0:
            same_label = standing[nearest].label == standing[index].label
            if visible[nearest] and not same_label:
                question = chance.choice(NEAREST).format(phrase)
                questions.append((question, category_text(standing[nearest].label), [index, nearest], ""))
    return _some(questions, chance)


def _distance(scene: Scene, visible: np.ndarray, named: dict[int, str], chance: random.Random) -> list[Question]:
    questions = []
    for a in named:
        for b in named:
            metres = center_distance(scene.boxes[a], scene.boxes[b])
            answer = round(metres / DISTANCE_STEP) * DISTANCE_STEP
            if a < b and answer > 0 and abs(metres - answer) <= DISTANCE_MARGIN:
                questions.append((chance.choice(DISTANCE).format(named[a], named[b]), f"{answer:.1f}", [a, b], ""))
    return _some(questions, chance)


def _instances(scene: Scene, category: str) -> list[int]:
    return [index for index, box in enumerate(scene.boxes) if box.label == category]


def _some(questions: list[Question], chance: random.Random) -> list[Question]:
    return chance.sample(questions, min(len(questions), MAX_PER_TASK))
