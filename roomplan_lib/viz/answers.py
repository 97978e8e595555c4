"""What one or several runs answered to the same samples: read, compared with the truth, filtered and sorted.

No widgets and no figures: `browser` and `anchors` draw what is found here. Errors are metres and degrees.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import shapely

from roomplan_lib.actions import (
    Action,
    ActionError,
    ActionList,
    NoAction,
    PlaceAnchor,
    PlanRoom,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.config import load_run_config
from roomplan_lib.evaluation import read_manifest
from roomplan_lib.evaluation.box_metrics import NEARLY_SQUARE, cheapest_pairs
from roomplan_lib.evaluation.errors import PLANE_M, RIGHT_IOU, error_table
from roomplan_lib.evaluation.layout_metrics import layout_rectangles, match_rectangles, plane_rectangle, rectangle_iou
from roomplan_lib.evaluation.rows import find_predictions, run_names
from roomplan_lib.evaluation.scores import is_action_row, read_predictions
from roomplan_lib.evaluation.text_metrics import match_words, normalise_answer
from roomplan_lib.files import write_whole
from roomplan_lib.geometry import CORNER_SIGNS, OrientedBox
from roomplan_lib.samples import sample_root
from roomplan_lib.scenes import Scene, View, arkitscenes, open_scene, scannet
from roomplan_lib.viz.clouds import find_views
from roomplan_lib.viz.tables import markdown_table

ERRORS = ("iou_3d", "center_error_m", "yaw_error_deg", "extent_error_m")
ERROR_TEXTS = dict(zip(ERRORS, ("IoU {:.2f}", "centre {:.2f} m", "yaw {:.0f}°", "size {:.2f} m"), strict=True))
MOST_VIEWS = 8  # of a scene, evenly chosen, where a sample does not name its own
OUTCOMES = ("right", "wrong", "invalid", "hidden", "missing")
SORTS = ("as in the file", "worst first", "best first", "IoU", "centre error", "yaw error", "size error")
CLASSED_AT_ONCE = 200  # samples of a scene whose classes of failure are told while a reader waits
NO_CATEGORY = "no category"  # of planes
WORDS = "words"  # the category of samples that are answered in words


@dataclass(frozen=True, eq=False)
class Answer:
    """One run's answer to one sample, and the truth.

    predicted, true: what the texts mean, in one frame; both None for answers in words, `predicted` an ActionError for
    a text that is no action. in_scene: whether that frame is the scene's own; else it is that of the texts.
    """

    row: dict
    predicted: Action | ActionList | ActionError | None
    true: Action | ActionList | None
    in_scene: bool

    @property
    def reason(self) -> str:
        """Why the text is no action; "" where it is one, or words."""
        if not isinstance(self.predicted, ActionError):
            return ""
        return str(self.row.get("error") or self.predicted.reason)

    @property
    def is_plane(self) -> bool:
        """Whether one flat thing without a category was asked for, and placed."""
        both = isinstance(self.true, PlaceAnchor) and isinstance(self.predicted, PlaceAnchor)
        return both and not self.true.category and min(self.true.extent) < PLANE_M

    @cached_property
    def true_boxes(self) -> list[OrientedBox]:
        return placed_boxes(self.true)

    @cached_property
    def predicted_boxes(self) -> list[OrientedBox]:
        return placed_boxes(self.predicted)

    @cached_property
    def pairs(self) -> list[tuple[int | None, int | None]]:
        """(place in true_boxes, place in predicted_boxes), the true ones in order, then what was predicted beside."""
        matches = nearest_pairs(self.true_boxes, self.predicted_boxes)
        extra = sorted({*range(len(self.predicted_boxes))} - {*matches.values()})
        return [(k, matches.get(k)) for k in range(len(self.true_boxes))] + [(None, k) for k in extra]


def placed_boxes(action: Action | ActionList | ActionError | None) -> list[OrientedBox]:
    """The upright boxes of the anchors that an action, list or plan places."""
    parts = action.actions if isinstance(action, ActionList | PlanRoom) else (action,)
    return [part.to_box() for part in parts if isinstance(part, PlaceAnchor)]


def nearest_pairs(true: Sequence[OrientedBox], predicted: Sequence[OrientedBox]) -> dict[int, int]:
    """Place of the predicted box that belongs to each true one, so that the distances of centres add up to the least.

    As many pairs as the smaller side has boxes, whatever their categories.
    """
    if not true or not predicted:
        return {}
    if len(true) == len(predicted) == 1:
        return {0: 0}
    places = [np.array([box.center for box in boxes]) for boxes in (true, predicted)]
    distances = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
    return dict(cheapest_pairs(distances))


def read_answer(row: dict) -> Answer:
    """A row of predictions with its actions read. Whatever a text holds, this does not raise."""
    codec = row.get("codec", "m2")
    if "reference_action" in row:  # files hold actions in the scene's frame as JSON data, codec m2
        true = parse_action(json.dumps(row["reference_action"]), None)
        stored = row.get("action")
        predicted = parse_action(json.dumps(stored) if stored else row["prediction"], None, "m2" if stored else codec)
        if not stored and not isinstance(predicted, ActionError):
            predicted = ActionError("refused when it was predicted")
        if not isinstance(true, ActionError):
            return Answer(row, predicted, true, in_scene=True)
    if is_action_row(row):
        true = parse_action(row["reference"], None, codec)
        if not isinstance(true, ActionError):
            return Answer(row, parse_action(row["prediction"], None, codec), true, in_scene=False)
    return Answer(row, None, None, in_scene=False)


def upright_errors(predicted: Sequence[OrientedBox], true: Sequence[OrientedBox]) -> dict[str, np.ndarray]:
    """[N] `ERRORS` of pairs of upright boxes, all pairs at once; the numbers of `box_metrics.box_errors`.

    The overlap is that of the footprints (polygons) times that of the heights, which is exact for upright boxes.
    """
    if not true:
        return {name: np.zeros(0) for name in ERRORS}
    (centers, extents, yaws), (true_centers, true_extents, true_yaws) = map(_stacked, (predicted, true))
    areas = shapely.area(
        shapely.intersection(_footprints(centers, extents, yaws), _footprints(true_centers, true_extents, true_yaws))
    )
    tops = np.minimum(centers[:, 2] + extents[:, 2] / 2, true_centers[:, 2] + true_extents[:, 2] / 2)
    bottoms = np.maximum(centers[:, 2] - extents[:, 2] / 2, true_centers[:, 2] - true_extents[:, 2] / 2)
    shared = areas * np.maximum(tops - bottoms, 0)
    union = extents.prod(axis=1) + true_extents.prod(axis=1) - shared
    # Of the two descriptions of a footprint the one whose sides are nearer to the true ones is compared.
    sides = np.stack([extents, extents[:, [1, 0, 2]]])
    differences = np.abs(sides - true_extents).mean(axis=2)
    turned = differences[1] < differences[0]
    dx, dy = true_extents[:, 0], true_extents[:, 1]
    period = np.where(np.abs(dx - dy) < NEARLY_SQUARE * np.maximum(dx, dy), 90.0, 180.0)
    yaw = np.degrees(yaws - true_yaws) + 90 * turned
    return {
        "iou_3d": np.divide(shared, union, out=np.zeros(len(true)), where=union > 0),
        "center_error_m": np.linalg.norm(centers - true_centers, axis=1),
        "yaw_error_deg": np.abs((yaw + period / 2) % period - period / 2),
        "extent_error_m": differences.min(axis=0),
    }


def _stacked(boxes: Sequence[OrientedBox]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rotations = np.array([box.rotation for box in boxes])
    yaws = np.arctan2(rotations[:, 1, 0], rotations[:, 0, 0])
    return np.array([box.center for box in boxes]), np.array([box.extent for box in boxes]), yaws


def _footprints(centers: np.ndarray, extents: np.ndarray, yaws: np.ndarray) -> np.ndarray:
    signs = CORNER_SIGNS[[0, 2, 6, 4], :2]  # around the rectangle
    local = signs * extents[:, None, :2] / 2
    cos, sin = np.cos(yaws)[:, None], np.sin(yaws)[:, None]
    turned = np.stack([local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos], axis=-1)
    return shapely.polygons(turned + centers[:, None, :2])


# Samples and runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """N samples as R runs answered them, in the order of the first run's file; then what only others were asked.

    names, files: of the runs. answers: [N][R], None where a run was not asked. errors: `ERRORS`, each [N, R]: of the
    pairs of a sample the mean, but iou_3d is shared among all boxes of both sides, so that missing and needless ones
    count as 0, and that of a plane is of its rectangle; NaN where there is nothing to measure. outcomes: [N, R] of
    `OUTCOMES`, right as `evaluation.errors` has it.
    """

    names: tuple[str, ...]
    files: tuple[Path, ...]
    answers: list[list[Answer | None]]
    errors: dict[str, np.ndarray]
    outcomes: np.ndarray
    keys: list[str]  # [N] of the notes
    scene_ids: np.ndarray  # [N]
    tasks: np.ndarray  # [N] the record's task, "" where the file does not tell
    categories: np.ndarray  # [N] of the true anchors, joined; WORDS for answers in words
    texts: list[str]  # [N] lower case, what a search looks through
    _failures: dict[int, np.ndarray] = field(default_factory=dict)
    _scene_failures: dict[tuple[int, str], dict[int, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answers)

    def choose(
        self,
        *,
        run: int = 0,
        scene: str | None = None,
        task: str | None = None,
        category: str | None = None,
        outcome: str | None = None,
        failure: str | None = None,
        search: str = "",
        most_iou: float = 1.0,
        least_center_error: float = 0.0,
        sort: str = SORTS[0],
    ) -> np.ndarray:
        """Places of the samples that fit, in order; None and the limits' defaults let everything through.

        run: whose outcome and errors are looked at. search: words that all stand somewhere in the sample's texts. A
        limit that is set leaves out samples without that error. "worst first": invalid, then wrong ones by IoU and
        centre error, right ones last; sorting by an error puts its largest (the smallest IoU) first, and those
        without it last. Raises ValueError for an unknown sort.
        """
        keep = np.ones(len(self), dtype=bool)
        for column, wanted in ((self.scene_ids, scene), (self.tasks, task)):
            if wanted is not None:
                keep &= column == wanted
        if category is not None:
            keep &= np.array([category in labels.split(", ") for labels in self.categories], dtype=bool)
        if outcome is not None:
            keep &= self.outcomes[:, run] == outcome
        if failure is not None:
            keep &= self.failures(run) == failure
        if most_iou < 1:
            keep &= self.errors["iou_3d"][:, run] <= most_iou
        if least_center_error > 0:
            keep &= self.errors["center_error_m"][:, run] >= least_center_error
        for word in search.lower().split():
            keep &= np.array([word in text for text in self.texts], dtype=bool)
        places = np.flatnonzero(keep)
        return places[np.lexsort(self._sort_keys(sort, run, places))] if sort != SORTS[0] else places

    def _sort_keys(self, sort: str, run: int, places: np.ndarray) -> tuple[np.ndarray, ...]:
        iou, distance, yaw, size = (self.errors[name][places, run] for name in ERRORS)
        if sort in ("worst first", "best first"):
            ranks = {"invalid": 0, "wrong": 1, "right": 2, "hidden": 3, "missing": 4}
            rank = np.array([ranks[outcome] for outcome in self.outcomes[places, run]], dtype=int)
            if sort == "worst first":
                return -np.nan_to_num(distance, nan=-1.0), np.nan_to_num(iou, nan=2.0), rank
            rank = np.where(rank < 3, 2 - rank, rank)
            return np.nan_to_num(distance, nan=np.inf), -np.nan_to_num(iou, nan=-1.0), rank
        values = {"IoU": iou, "centre error": -distance, "yaw error": -yaw, "size error": -size}
        if sort not in values:
            raise ValueError(f"sort: expected one of {', '.join(SORTS)}, got {sort!r}")
        return (np.nan_to_num(values[sort], nan=np.inf),)

    def told_errors(self, place: int, run: int) -> list[str]:
        """The errors of a sample that are known, in words and units."""
        values = {name: self.errors[name][place, run] for name in ERRORS}
        return [text.format(values[name]) for name, text in ERROR_TEXTS.items() if not math.isnan(values[name])]

    def furnished(self, scene: Scene, run: int) -> Scene:
        """The room as a run furnished it: the scene's walls, and every object that the run was asked to place in it, in
        the scene's frame. Planes and whole plans are left out.

        Of boxes that are the same to the centimetre one is kept, such as where two instructions mean one object.
        """
        boxes: dict[tuple, OrientedBox] = {}
        for place in np.flatnonzero(self.scene_ids == scene.scene_id):
            answer = self.answers[place][run]
            asked = answer is not None and answer.in_scene and not isinstance(answer.true, PlanRoom)
            for box in answer.predicted_boxes if asked else ():
                if not box.label:
                    continue
                boxes.setdefault((box.label, *np.round(np.concatenate([box.center, box.extent]), 2)), box)
        return replace(scene, boxes=list(boxes.values()), views=[], mesh_path=None, colors={}, attributes={})

    def table(self, places: Sequence[int], run: int = 0) -> str:
        """Markdown: a line a box of the samples, true ones with what was placed for them, then what is needless."""
        lines = []
        for place in places:
            answer = self.answers[place][run]
            errors = None if answer is None else self.box_errors(place, run)
            for k, (true, predicted) in enumerate(() if answer is None else answer.pairs):
                box = answer.predicted_boxes[predicted] if true is None else answer.true_boxes[true]
                missing = "needless" if true is None else "not placed" if predicted is None else ""
                numbers = ["-" if missing else f"{errors[name][k]:.2f}" for name in ERRORS]
                lines.append(
                    [str(place + 1), self.scene_ids[place], box.label or NO_CATEGORY, missing or "placed", *numbers]
                )
        head = ["sample", "scene", "box", "", "IoU", "centre (m)", "yaw (°)", "size (m)"]
        return markdown_table(head, lines) if lines else "None of these samples has a box."

    def failures(self, run: int) -> np.ndarray:
        """[N] class of failure of each sample (`evaluation.errors`), "" where the run was not asked.

        About a millisecond a sample, once; kept.
        """
        if run not in self._failures:
            there = [i for i, part in enumerate(self.answers) if part[run] is not None]
            classes = np.full(len(self), "", dtype=object)
            classes[there] = error_table([self.answers[i][run].row for i in there])["failure"]
            self._failures[run] = classes
        return self._failures[run]

    def failure(self, place: int, run: int) -> str:
        """The class of one sample, told by the samples of its scene; "" where those are too many to do so at once."""
        if run in self._failures:
            return self._failures[run][place]
        key = (run, self.scene_ids[place])
        if key not in self._scene_failures:
            there = [i for i in np.flatnonzero(self.scene_ids == key[1]) if self.answers[i][run] is not None]
            rows = [self.answers[i][run].row for i in there]
            classes = error_table(rows)["failure"] if len(rows) <= CLASSED_AT_ONCE else [""] * len(rows)
            self._scene_failures[key] = dict(zip(there, classes, strict=True))
        return self._scene_failures[key].get(place, "")

    def box_errors(self, place: int, run: int) -> dict[str, np.ndarray]:
        """`ERRORS` of each of the sample's `Answer.pairs`, NaN for a box without a partner (its IoU is 0)."""
        answer = self.answers[place][run]
        return _pair_errors([answer])[0]


def load_answers(sources: str | Path | Sequence[str | Path] | dict[str, str | Path]) -> Answers:
    """Reads predictions files, or those of run folders, side by side.

    sources: one or several, by name in a dict. Samples of two files are the same where scene and question id, or
    question, agree (the second of equals is that of the other file). Raises ValueError for a file that is not there,
    empty, or holds a line that is no prediction.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    named = list(sources.values() if isinstance(sources, dict) else sources)
    if not named:
        raise ValueError("no predictions to show: name a run folder or a predictions.jsonl")
    files = find_predictions(named)
    names = tuple(sources) if isinstance(sources, dict) else tuple(run_names(files))
    rows = [read_predictions(file) for file in files]
    if empty := [file for file, part in zip(files, rows, strict=True) if not part]:
        raise ValueError(f"{empty[0]}: holds no prediction; predict again")
    by_id = all("question_id" in row for part in rows for row in part)
    found: dict[str, list[Answer | None]] = {}
    for run, part in enumerate(rows):
        seen: Counter = Counter()
        for row in part:
            asked = json.dumps([row["scene_id"], str(row["question_id" if by_id else "question"])])
            seen[asked] += 1
            key = asked if seen[asked] == 1 else f"{asked} {seen[asked]}"
            found.setdefault(key, [None] * len(rows))[run] = read_answer(row)
    answers = list(found.values())
    first = [next(filter(None, part)) for part in answers]
    errors = {name: np.full((len(answers), len(files)), math.nan) for name in ERRORS}
    outcomes = np.full((len(answers), len(files)), "missing", dtype=object)
    for run in range(len(files)):
        there = [i for i, part in enumerate(answers) if part[run] is not None]
        asked = [answers[i][run] for i in there]
        tables = _pair_errors(asked)
        for place, answer, table in zip(there, asked, tables, strict=True):
            outcomes[place, run] = _outcome(answer, table)
            for name, value in _means(answer, table).items():
                errors[name][place, run] = value
    return Answers(
        names, tuple(files), answers, errors, outcomes, list(found),
        np.array([answer.row["scene_id"] for answer in first], dtype=object),
        np.array([str(answer.row.get("task", "")) for answer in first], dtype=object),
        np.array([_category(answer) for answer in first], dtype=object),
        [_search_text(part) for part in answers],
    )  # fmt: skip


def _pair_errors(answers: Sequence[Answer]) -> list[dict[str, np.ndarray]]:
    """`ERRORS` of the pairs of each answer, all computed at once."""
    joined = [
        (i, k, answer.predicted_boxes[p], answer.true_boxes[t])
        for i, answer in enumerate(answers)
        for k, (t, p) in enumerate(answer.pairs)
        if t is not None and p is not None
    ]
    values = upright_errors([entry[2] for entry in joined], [entry[3] for entry in joined])
    tables = [{name: np.full(len(answer.pairs), math.nan) for name in ERRORS} for answer in answers]
    for table in tables:
        table["iou_3d"][:] = 0
    for number, (i, k, _, _) in enumerate(joined):
        for name in ERRORS:
            tables[i][name][k] = values[name][number]
        if answers[i].is_plane:
            tables[i]["iou_3d"][k] = rectangle_iou(*map(plane_rectangle, (answers[i].predicted, answers[i].true)))
    return tables


def _means(answer: Answer, table: dict[str, np.ndarray]) -> dict[str, float]:
    """Of a sample: see `Answers.errors`."""
    paired = ~np.isnan(table["center_error_m"])
    means = {name: table[name][paired].mean() if paired.any() else math.nan for name in ERRORS}
    return means | {"iou_3d": table["iou_3d"].mean() if answer.true_boxes else math.nan}


def _outcome(answer: Answer, table: dict[str, np.ndarray]) -> str:
    if answer.true is None:
        wanted = answer.row.get("answers", [answer.row["reference"]])
        if not any(text.strip() for text in wanted):
            return "hidden"
        said = normalise_answer(answer.row["prediction"])
        return "right" if match_words(said, [normalise_answer(text) for text in wanted])[0] else "wrong"
    if isinstance(answer.predicted, ActionError):
        return "invalid"
    if isinstance(answer.true, PlaceAnchor):
        right = isinstance(answer.predicted, PlaceAnchor) and table["iou_3d"][0] >= RIGHT_IOU
    elif isinstance(answer.true, PlanRoom) or answer.true_boxes:
        right = bool((table["iou_3d"] >= RIGHT_IOU).all()) and _same_labels(answer) and _same_walls(answer)
    elif isinstance(answer.true, NoAction):
        right = isinstance(answer.predicted, NoAction)
    else:
        right = _written(answer.predicted) == _written(answer.true)
    return "right" if right else "wrong"


def _same_labels(answer: Answer) -> bool:
    return all(answer.true_boxes[t].label == answer.predicted_boxes[p].label for t, p in answer.pairs)


def _same_walls(answer: Answer) -> bool:
    """Whether every wall, door and window of a plan is found, and no other; lists have none."""
    if not isinstance(answer.true, PlanRoom):
        return True
    plans = (answer.predicted, answer.true)
    predicted, true = (layout_rectangles(plan)[0] if isinstance(plan, PlanRoom) else [] for plan in plans)
    return len(predicted) == len(true) == len(match_rectangles(predicted, true, RIGHT_IOU))


def _written(action: Action | ActionList) -> str:
    try:
        return format_action(canonical(action.bound("")))
    except ValueError:  # read, but beyond what can be written: as it is
        return repr(action)


def _category(answer: Answer) -> str:
    if answer.true is None:
        return WORDS
    labels = sorted({box.label or NO_CATEGORY for box in answer.true_boxes})
    return ", ".join(labels) or answer.true.verb


def _search_text(answers: Sequence[Answer | None]) -> str:
    rows = [answer.row for answer in answers if answer is not None]
    parts = [rows[0]["scene_id"], str(rows[0]["question"]), str(rows[0].get("situation", "")), rows[0]["reference"]]
    return "\n".join(parts + [row["prediction"] for row in rows]).lower()


# Scenes ---------------------------------------------------------------------------------------------------------------


class Scenes:
    """The scenes of a set of answers, opened when they are asked for; the last few are kept.

    folders: where scene folders lie, at any depth; a scene's folder has its id as name.
    """

    KEPT = 4

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.folders = [Path(folder) for folder in dict.fromkeys(map(str, folders))]
        if missing := [folder for folder in self.folders if not folder.is_dir()]:
            raise ValueError(f"{missing[0]}: no such folder of scenes")
        self._open: dict[str, Scene | str] = {}

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Scene folders by id; of two with one id the first."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in (*arkitscenes.find_scenes(folder), *scannet.find_scenes(folder)):
                found.setdefault(path.name, path)
        return found

    def get(self, scene_id: str) -> Scene | str:
        """The scene, or a sentence that tells why there is none."""
        if scene_id not in self._open:
            while len(self._open) >= self.KEPT:
                self._open.pop(next(iter(self._open)))
            self._open[scene_id] = self._find(scene_id)
        return self._open[scene_id]

    def _find(self, scene_id: str) -> Scene | str:
        if not self.folders:
            return "No folder of scenes is known, so boxes and texts stand alone; name one with `scenes`."
        if scene_id not in self.paths:
            where = ", ".join(map(str, self.folders))
            return f"Scene {scene_id} is not below {where}, so boxes and texts stand alone."
        try:
            return open_scene(self.paths[scene_id])
        except ValueError as error:
            return f"Scene {scene_id} cannot be read ({error})."


def scene_folders(files: Sequence[Path]) -> list[Path]:
    """Where the scenes of predictions files lie: told by the manifest beside a file, or by the run.yaml of its folder.

    [] for files that have neither, and for folders that are not there.
    """
    roots: dict[Path, None] = {}
    for file in files:
        made_from = (read_manifest(file) or {}).get("made_from", {})
        samples = [Path(path) for path, _ in made_from.get("samples", [])]
        settings = file.parent / "run.yaml"
        if not samples and settings.is_file():
            samples = list(load_run_config(settings).data.eval_paths)
        roots |= {sample_root(path): None for path in samples if path.is_file()}
    return [root for root in roots if root.is_dir()]


class Room:
    """What is shown of one sample: its scene, views and surface, as far as they are there.

    problem: a sentence about what is missing, "" for nothing.
    """

    def __init__(self, answer: Answer, scenes: Scenes) -> None:
        self.views: list[View] = []
        self.problem = ""
        scene_id = answer.row["scene_id"]
        self.scene = Scene(scene_id, [], [], "predictions")
        if answer.true is not None and not answer.in_scene:
            self.problem = "The file does not tell where the scene's frame is, so boxes stand in that of the texts."
            return
        found = scenes.get(scene_id)
        if isinstance(found, str):
            self.problem = found
            return
        self.scene = found
        try:
            self.views = find_views(found, answer.row.get("view_ids") or None)
        except ValueError as error:
            self.problem = f"The views of this sample are not in its scene ({error})."
            self.views = list(found.views)
        if not answer.row.get("view_ids") and len(self.views) > MOST_VIEWS:
            self.views = [self.views[i] for i in np.linspace(0, len(self.views) - 1, MOST_VIEWS).astype(int)]

    @property
    def key(self) -> tuple:
        return (self.scene.scene_id, *(view.view_id for view in self.views))


# Notes ----------------------------------------------------------------------------------------------------------------


class Notes:
    """What a reader writes about samples, in a JSONL file beside the predictions: {"sample", "question", "note"}.

    Raises ValueError that names file and line for a file that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, dict] = {}
        if not path.is_file():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if not all(isinstance(row[key], str) for key in ("sample", "note")):
                    raise TypeError("sample and note must be text")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: no note ({error!r}); mend the line or move the file away") from None
            self._rows[row["sample"]] = row

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def get(self, key: str) -> str:
        return self._rows[key]["note"] if key in self._rows else ""

    def set(self, key: str, note: str, question: str = "") -> None:
        """Keeps the note, or forgets it where it is empty, and writes the file whole."""
        rows = {other: row for other, row in self._rows.items() if other != key}
        if note.strip():
            rows[key] = {"sample": key, "question": question, "note": note}
        write_whole(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
        self._rows = rows


def notes_file(predictions: Path) -> Path:
    """notes.jsonl beside predictions.jsonl, <stem>.notes.jsonl beside another file."""
    name = "notes.jsonl" if predictions.name == "predictions.jsonl" else f"{predictions.stem}.notes.jsonl"
    return predictions.absolute().with_name(name)
