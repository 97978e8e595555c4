"""What files of samples hold: counts, lengths, answers, labels, views and their coverage, one record as it is asked."""

from __future__ import annotations

import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from roomplan_lib.samples import box_from_record, manifest_path, read_manifest, read_samples, sample_root
from roomplan_lib.samples.targets import question_text, response_text
from roomplan_lib.scenes import View, load_rgb, path_below
from roomplan_lib.viz.boxes import draw_boxes_on_view
from roomplan_lib.viz.frontend import live_frontend
from roomplan_lib.viz.style import FONT_SIZE, RUN_COLORS, RUN_DASHES, TRUE_COLOR, WIDTH, PrintFigure, plain_axes
from roomplan_lib.viz.tables import markdown_table

COLUMNS = 4
TEXT_WIDTH = 126  # characters of a line under the pictures
MAX_LINES = 8  # of an answer
SMALL_BASELINE = 0.1  # metres, as in `validate`: closer cameras show almost the same picture


def read_files(files: Sequence[str | Path]) -> dict[str, list[dict]]:
    """Records by file, named "<folder>/<file without ending>", in the order of `files`.

    Raises ValueError as `read_samples`.
    """
    return {_name(file): read_samples(file) for file in files}


def by_source(records: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The same records by where they come from and what they ask: "sqa3d questions", "arkitscenes actions", ..."""
    groups = defaultdict(list)
    for record in (record for part in records.values() for record in part):
        kind = "actions" if "instruction" in record else "questions"
        groups[f"{record.get('source', 'no source')} {kind}"].append(record)
    return dict(sorted(groups.items()))


def by_split(records: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The same records by split: train, val, test, "no split"."""
    groups = {split: [] for split in ("train", "val", "test")}
    for record in (record for part in records.values() for record in part):
        groups.setdefault(record.get("split") or "no split", []).append(record)
    return {split: part for split, part in groups.items() if part}


def records_table(records: dict[str, list[dict]]) -> str:
    """Markdown: per file its records, scenes, splits, views per record, and how many have pictures and geometry."""
    rows = []
    for name, part in records.items():
        views = sorted({len(record["images"]) for record in part}) or [0]
        rows.append(
            [
                name,
                str(len(part)),
                str(len({record["scene_id"] for record in part})),
                ", ".join(sorted({record.get("split", "") or "-" for record in part})),
                str(views[0]) if len(views) == 1 else f"{views[0]} to {views[-1]}",
                str(sum(bool(record["images"]) for record in part)),
                str(sum(bool(record["geom_token"]) for record in part)),
            ]
        )
    return markdown_table(["file", "records", "scenes", "split", "views", "with pictures", "with geometry"], rows)


def tasks_table(records: dict[str, list[dict]]) -> str:
    """Markdown: number of records by source, task and split."""
    counts = Counter(
        (record.get("source", "-"), record["task"], split)
        for split, part in by_split(records).items()
        for record in part
    )
    splits = list(by_split(records))
    rows = [[*pair, *(str(counts[(*pair, split)]) for split in splits)] for pair in sorted({key[:2] for key in counts})]
    return markdown_table(["source", "task", *splits], rows)


def overlap_table(files: Sequence[str | Path]) -> str:
    """Markdown: per pair of splits the scenes and visits that both have, which should be none, and in which files."""
    scenes, visits = defaultdict(set), defaultdict(set)  # by split; (name, file)
    for file in files:
        known = read_manifest(file).get("visits", {}) if manifest_path(file).exists() else {}
        for record in read_samples(file):
            split, scene_id = record.get("split") or "no split", record["scene_id"]
            scenes[split].add((scene_id, _name(file)))
            if known.get(scene_id):
                visits[split].add((known[scene_id], _name(file)))
    rows = []
    for a, b in combinations(scenes, 2):
        shared = [{x for x, _ in part[a]} & {x for x, _ in part[b]} for part in (scenes, visits)]
        where = sorted(
            {f for n, part in zip(shared, (scenes, visits), strict=True) for x, f in part[a] | part[b] if x in n}
        )
        rows.append([f"{a} and {b}", str(len(shared[0])), str(len(shared[1])), ", ".join(where) or "-"])
    return markdown_table(["splits", "shared scenes", "shared visits", "in files"], rows)


def lengths_figure(records: dict[str, list[dict]]) -> PrintFigure:
    """Words of the questions (with situation) and of the answers, as cumulative share of each group."""
    figure = PrintFigure(2.5)
    axes = figure.subplots(1, 2)
    for ax, title, words in (
        (
            axes[0],
            "words in the question or instruction",
            lambda r: len(f"{r.get('situation', '')} {question_text(r)}".split()),
        ),
        (axes[1], "words in the first answer, numbers in an action", lambda r: _answer_length(r)),
    ):
        for number, (name, part) in enumerate(records.items()):
            lengths = np.sort([length for length in map(words, part) if length])
            if len(lengths):
                share = np.arange(1, len(lengths) + 1) / len(lengths)
                style = {"color": RUN_COLORS[number % len(RUN_COLORS)], "ls": RUN_DASHES[number % len(RUN_DASHES)]}
                ax.step([0, *lengths], [0, *share], where="post", label=f"{name} ({len(lengths)})", **style)
        plain_axes(ax)
        ax.set_xlabel(title, fontsize=FONT_SIZE)
        ax.set_ylabel("share of records up to this", fontsize=FONT_SIZE)
        ax.set_ylim(0, 1.03)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend(fontsize=FONT_SIZE - 0.5, frameon=False)
    figure.tight_layout()
    return figure


def answers_figure(records: list[dict], *, max_answers: int = 20) -> PrintFigure:
    """The commonest answers, and per task the share of its commonest one: what guessing would score."""
    answered = [record for record in records if record.get("answer")]
    if not answered:
        return nothing_figure("none of the records has an answer in words")
    by_task: dict[str, Counter] = defaultdict(Counter)
    for record in answered:
        by_task[f"{record['task']} {record.get('question_type', '')}".strip()][record["answer"].lower()] += 1
    common = sum(by_task.values(), Counter()).most_common(max_answers)
    common = [(textwrap.shorten(answer, 28, placeholder="...") or answer[:28], count) for answer, count in common]
    tasks = sorted(by_task, key=lambda task: -by_task[task].total())
    figure = PrintFigure(max(2.2, 0.155 * max(len(common), len(tasks)) + 0.75))
    left, right = figure.subplots(1, 2)
    _bars(left, [answer for answer, _ in common], [count / len(answered) for _, count in common])
    left.set_xlabel(f"share of {len(answered)} answers", fontsize=FONT_SIZE)
    firsts = [by_task[task].most_common(1)[0] for task in tasks]
    names = [f"{task} ({by_task[task].total()}): {first}" for task, (first, _) in zip(tasks, firsts, strict=True)]
    shares = [count / by_task[task].total() for task, (_, count) in zip(tasks, firsts, strict=True)]
    _bars(right, [textwrap.shorten(name, 44, placeholder="...") for name in names], shares)
    right.set_xlabel("share of the commonest answer of its kind", fontsize=FONT_SIZE)
    figure.tight_layout()
    return figure


def labels_figure(records: dict[str, list[dict]]) -> PrintFigure:
    """How often each category is asked for (boxes of the target instances), a bar per group."""
    counts = {name: Counter(box["label"] for r in part for box in r.get("boxes", ())) for name, part in records.items()}
    counts = {name: part for name, part in counts.items() if part}
    if not counts:
        return nothing_figure("none of the records has boxes")
    labels = [label for label, _ in sum(counts.values(), Counter()).most_common(30)]
    figure = PrintFigure(2.6)
    ax = figure.subplots()
    width = 0.8 / len(counts)
    for number, (name, part) in enumerate(counts.items()):
        places = np.arange(len(labels)) + (number - (len(counts) - 1) / 2) * width
        shares = [part[label] / part.total() for label in labels]
        color = RUN_COLORS[number % len(RUN_COLORS)]
        ax.bar(places, shares, width, color=color, label=f"{name} ({part.total()} boxes)")
    ax.set_xticks(range(len(labels)), labels, rotation=35, ha="right")
    plain_axes(ax)
    ax.grid(False, axis="x")
    ax.set_ylabel("share of the group's boxes", fontsize=FONT_SIZE)
    ax.legend(fontsize=FONT_SIZE - 0.5, frameon=False)
    figure.tight_layout()
    return figure


def coverage_figure(records: dict[str, list[dict]]) -> PrintFigure:
    """One dot per view set: how far apart its cameras are, and how much of what any view sees its views show."""
    figure = PrintFigure(2.8, 0.62 * WIDTH)
    ax = figure.subplots()
    shown = False
    for number, (name, part) in enumerate(records.items()):
        sets = {
            tuple(r["images"]): (r["baseline_m"], r.get("coverage")) for r in part if r.get("baseline_m") is not None
        }
        points = np.array([(b, c) for b, c in sets.values() if c is not None]).reshape(-1, 2)
        if len(points):
            shown = True
            marker = "os^Dvx"[number % 6]
            ax.plot(*points.T, marker, color=RUN_COLORS[number % len(RUN_COLORS)], ms=4, alpha=0.7,
                    label=f"{name} ({len(points)})")  # fmt: skip
    if not shown:
        return nothing_figure("none of the records has coverage and baseline_m; they need views with depth")
    ax.axvline(SMALL_BASELINE, color="#888888", lw=1, ls=":")
    plain_axes(ax)
    ax.set_xlim(left=0)
    ax.set_xlabel("largest distance between two cameras of a view set (m); dotted: too small", fontsize=FONT_SIZE)
    ax.set_ylabel("share of seen voxels covered", fontsize=FONT_SIZE)
    ax.legend(fontsize=FONT_SIZE - 0.5, frameon=False, title="group (view sets)", title_fontsize=FONT_SIZE - 0.5)
    figure.tight_layout()
    return figure


def record_views(record: dict, root: str | Path) -> list[View]:
    """The record's views, as its geometry says; unposed for a record without."""
    turns = record.get("quarter_turns") or [0] * len(record["images"])
    geometry, views = record["geom_token"], []
    for v, image in enumerate(record["images"]):
        path = path_below(root, image)
        height, width, _ = load_rgb(path, turns[v]).shape
        K = pose = None
        if geometry:
            K, pose = np.reshape(geometry["K"][v], (3, 3)), np.eye(4)
            pose[:3, :3], pose[:3, 3] = np.reshape(geometry["R"][v], (3, 3)), geometry["t"][v]
        depth = path_below(root, record["depths"][v]) if record.get("depths") else None
        name = record["view_ids"][v] if record.get("view_ids") else path.stem
        views.append(View(name, path, depth, K, pose, 0.0, width, height, turns[v], record.get("depth_scale", 1000.0)))
    return views


def record_figure(record: dict, root: str | Path) -> PrintFigure:
    """A record's pictures with the boxes it asks for, and under them what is asked and what must be answered.

    root: folder of the picture paths, see `sample_root`.
    """
    views = record_views(record, root)
    boxes = [box_from_record(entry) for entry in record.get("boxes", ())]
    asked = " ".join(filter(None, (record.get("situation"), question_text(record))))
    answer = _answer(record)
    place = f"{record.get('source', '')} {record['scene_id']} {record.get('question_id', '')}".strip()
    text = [f"{place}, {record['task']}", *_wrapped(f"asked: {asked}")]
    text += _wrapped(f"answer: {answer}")[:MAX_LINES]
    rows = -(-len(views) // COLUMNS)
    columns = -(-len(views) // rows) if views else 1
    aspect = max((view.height / view.width for view in views), default=0)
    cell = WIDTH / COLUMNS
    picture_height = rows * (cell * min(aspect, 1.4) + 0.18)
    text_height = 0.16 * len(text) + 0.12
    height = picture_height + text_height
    figure = PrintFigure(height)
    if views:
        grid = figure.add_gridspec(
            rows, columns, left=0.005, right=0.005 + 0.99 * columns / COLUMNS, top=1 - 0.18 / height,
            bottom=text_height / height, wspace=0.03, hspace=0.12,
        )  # fmt: skip
        for number, (place, view) in enumerate(zip(grid, views, strict=False), 1):
            ax = figure.add_subplot(place)
            title = f"view {number}{' (reference)' if number == 1 else ''}"
            if view.posed:
                draw_boxes_on_view(ax, view, boxes, title=title)
            else:
                ax.imshow(view.load_rgb())
                ax.set_axis_off()
                ax.set_title(title, fontsize=FONT_SIZE, pad=3)
    figure.text(
        0.005, (text_height - 0.05) / height, "\n".join(text), fontsize=FONT_SIZE, va="top", family="monospace",
        linespacing=1.35,
    )  # fmt: skip
    return figure


def browse_records(files: Sequence[str | Path]):
    """A file chooser and a slider over its records, each drawn by `record_figure` (an ipywidgets box).

    A line that says so where no browser is open on the notebook, such as under papermill.
    """
    if not live_frontend():
        return nothing_figure("the slider needs JupyterLab")
    import ipywidgets as widgets
    from IPython.display import display

    files = {_name(file): Path(file) for file in files}
    chooser = widgets.Dropdown(options=list(files), description="file")
    slider = widgets.IntSlider(min=0, max=0, description="record", continuous_update=False)
    out = widgets.Output()
    held: dict[str, list[dict]] = {}

    def show(_=None) -> None:
        path = files[chooser.value]
        if chooser.value not in held:
            held.clear()
            held[chooser.value] = read_samples(path)
        records = held[chooser.value]
        slider.max = max(len(records) - 1, 0)
        with out:
            out.clear_output(wait=True)
            display(record_figure(records[slider.value], sample_root(path)))

    def change_file(_) -> None:
        slider.value = 0
        show()

    chooser.observe(change_file, "value")
    slider.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([chooser, slider]), out])


def _answer(record: dict) -> str:
    if "action_json" in record and record.get("geom_token"):
        return f"{response_text(record)}   (reference frame)"
    if record.get("answers"):
        return " | ".join(record["answers"])
    return record.get("answer") or record.get("action_json") or "(hidden)"


def _answer_length(record: dict) -> int:
    """Words of an answer, numbers of an action."""
    if "action_json" in record:
        return _count_numbers(json.loads(record["action_json"]))
    return len(record.get("answer", "").split())


def _count_numbers(value: object) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return sum(map(_count_numbers, value))
    return int(type(value) in (int, float))


def nothing_figure(reason: str) -> PrintFigure:
    """A line in place of a figure, so that a notebook about any files runs to its end."""
    figure = PrintFigure(0.4)
    figure.text(0.01, 0.5, f"nothing to show: {reason}", fontsize=FONT_SIZE + 1, va="center")
    return figure


def _name(file: str | Path) -> str:
    return f"{Path(file).absolute().parent.name}/{Path(file).stem}"


def _wrapped(text: str) -> list[str]:
    """Lines for the figure; a minus is no hyphen."""
    return textwrap.wrap(text.replace(",{", ", {"), TEXT_WIDTH, break_on_hyphens=False)


def _bars(ax, names: list[str], shares: list[float]) -> None:
    ax.barh(range(len(names)), shares, color=TRUE_COLOR, height=0.7)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, min(1.0, 1.15 * max(shares)))
    plain_axes(ax)
    ax.grid(False, axis="y")
