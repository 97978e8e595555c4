"""What went wrong, drawn: scores of parts with intervals, classes of failure, calibration; runs side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from roomplan_lib.evaluation.errors import CLASSES, ErrorTable, bin_scores, calibration, examples, failure_counts
from roomplan_lib.viz.records import nothing_figure
from roomplan_lib.viz.style import (
    CONTROL_COLOR,
    FONT_SIZE,
    PREDICTED_COLOR,
    RUN_COLORS,
    RUN_DASHES,
    WIDTH,
    PrintFigure,
    plain_axes,
)
from roomplan_lib.viz.tables import markdown_table, text_cell

SECTION_NAMES = {
    "anchors": "anchors", "planes": "planes", "lists": "lists of anchors", "plans": "whole rooms",
    "refusals": "requests to refuse", "edits": "edits", "questions": "questions", "captions": "captions",
    "hidden": "questions with hidden answers",
}  # fmt: skip

BIN_TITLES = {
    "category": "category asked for",
    "distance_m": "distance from camera 1 (m)",
    "longest_side_m": "longest side (m)",
    "volume_m3": "volume (m³)",
    "visible_share": "views that show the object",
    "in_view_share": "views that hold its centre",
    "visible_pixels": "pixels in the best view",
    "num_views": "number of views",
    "question_type": "kind of question",
    "answer_kind": "kind of answer",
    "task": "task",
    "eval_type": "evaluation type",
}
MEASURE_TITLES = {
    "hit": "share that is right",
    "iou_3d": "mean 3D IoU",
    "center_error_m": "median centre error (m)",
    "em": "exact match",
    "em_refined": "refined match",
    "num_missing": "objects missing per answer",
    "num_extra": "boxes too many per answer",
}
MARKERS = "o^Dvx+"  # the first run, and the model, has squares
CONTROLS = ("blind", "shuffled", "constant", "majority", "baseline", "one_view")
# Okabe and Ito's colours, each a second time with a hatch, since no palette has twelve that everybody can tell apart.
CLASS_STYLES = {
    "right": ("#009E73", ""),
    "unscored": ("#DDDDDD", ""), "written": ("#DDDDDD", ""),
    "invalid text": ("#222222", ""), "empty": ("#222222", ""),
    "refused": ("#7F7F7F", ""),
    "other action": ("#7F7F7F", "///"), "wrong verb": ("#7F7F7F", "///"),
    "wrong object": ("#0072B2", ""), "wrong arguments": ("#0072B2", ""), "other kind": ("#0072B2", ""),
    "wrong category": ("#0072B2", "///"),
    "wrong scale": ("#CC79A7", ""), "wrong yes or no": ("#CC79A7", ""), "wrong plane": ("#CC79A7", ""),
    "mirrored": ("#CC79A7", "///"),
    "wrong yaw": ("#56B4E9", ""), "more words": ("#56B4E9", ""), "doubled": ("#56B4E9", ""),
    "wrong size": ("#F0E442", ""), "wrong number": ("#F0E442", ""), "extra": ("#F0E442", ""),
    "wrong rectangle": ("#F0E442", ""),
    "wrong place": ("#D55E00", ""), "wrong words": ("#D55E00", ""), "missing": ("#D55E00", ""),
    "placed": ("#D55E00", ""),
    "several": ("#E69F00", "///"), "missing and extra": ("#E69F00", "///"),
}  # fmt: skip
BAR_HEIGHT = 0.27  # inches
LEGEND_COLUMNS = 7
LABELLED_SHARE = 0.055  # of a bar; narrower pieces carry no number


def run_style(name: str, number: int) -> dict:
    """Colour and marker of the `number`th of several runs; the controls are grey, the model orange."""
    if name in CONTROLS:
        return {"color": CONTROL_COLOR, "marker": MARKERS[CONTROLS.index(name)]}
    if name == "model" or number == 0:
        return {"color": PREDICTED_COLOR, "marker": "s"}
    colors = [color for color in RUN_COLORS if color != PREDICTED_COLOR]
    return {"color": colors[(number - 1) % len(colors)], "marker": MARKERS[(number - 1) % len(MARKERS)]}


def _styles(tables: Mapping[str, ErrorTable]) -> dict[str, dict]:
    """The looks of runs by name: the same in every figure, whichever of them it shows."""
    return {name: run_style(name, number) for number, name in enumerate(tables)}


def _with_rows(tables: Mapping[str, ErrorTable], section: str) -> dict[str, ErrorTable]:
    """The rows of a section, of the runs that have any."""
    return {name: part for name, table in tables.items() if len(part := table.section(section))}


def bins_figure(
    tables: Mapping[str, ErrorTable],
    by: Sequence[str],
    measure: str = "hit",
    *,
    section: str = "anchors",
    columns: int = 3,
) -> PrintFigure:
    """A panel per column of `by`: the mean of `measure` in its parts with 95 % intervals (bootstrap over scenes).

    tables: by run or control; the parts are those of the first one with rows of the section, their numbers of samples
    in brackets. Where a part is of one scene alone there is no interval. Columns that nothing is known of are left out.
    """
    parts = _with_rows(tables, section)
    first = next(iter(parts.values()), None)
    panels = {} if first is None else {key: bin_scores(first, key, measure) for key in by}
    panels = {key: bins for key, bins in panels.items() if bins}
    if not panels:
        return nothing_figure(f"no {SECTION_NAMES[section]} with {MEASURE_TITLES[measure]} by {', '.join(by)}")
    styles = _styles(tables)
    columns = min(columns, len(panels))
    keys = list(panels)
    grid = [keys[start : start + columns] for start in range(0, len(keys), columns)]
    num_lines = [max(len(panels[key]) for key in row) for row in grid]
    heights = [0.16 * lines * (1 + 0.35 * (len(parts) - 1)) + 0.62 for lines in num_lines]
    height = sum(heights) + 0.42
    figure = PrintFigure(height)
    axes = figure.subplots(len(grid), columns, squeeze=False, height_ratios=heights)
    for row, line in zip(axes, grid, strict=True):
        for ax, key in zip(row, [*line, *[None] * (columns - len(line))], strict=True):
            if key is None:
                ax.set_axis_off()
            else:
                _draw_bins(ax, parts, styles, key, measure, panels[key])
    count = f"{len(first)} {SECTION_NAMES[section]} of {len(set(first['scene_id']))} scenes"
    figure.text(
        0.008, 1 - 0.1 / height, f"{MEASURE_TITLES[measure].capitalize()}: {count}", fontsize=FONT_SIZE + 2, va="top"
    )
    if len(parts) > 1:
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, fontsize=FONT_SIZE, frameon=False, ncols=len(parts), loc="upper right")
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height), w_pad=1.2, h_pad=1.0)
    return figure


def _draw_bins(
    ax, parts: Mapping[str, ErrorTable], styles: Mapping[str, dict], key: str, measure: str, first: list
) -> None:
    labels = [part.label for part in first]
    reach = 0.0
    for number, (name, table) in enumerate(parts.items()):
        offset = 0.62 * ((number + 0.5) / len(parts) - 0.5)
        style = styles[name]
        bins = first if number == 0 else bin_scores(table, key, measure, bins=labels)
        for part in bins:
            place = labels.index(part.label) + offset
            if part.interval:
                ax.plot(part.interval, [place] * 2, color=style["color"], lw=1.6, solid_capstyle="butt", alpha=0.75)
            reach = max(reach, part.value, *(part.interval or ()))
        places = [labels.index(part.label) + offset for part in bins]
        ax.plot([part.value for part in bins], places, ls="", ms=4.5, label=name, clip_on=False, zorder=3, **style)
    names = [f"{textwrap.shorten(part.label, 26, placeholder='…')} ({part.num_samples})" for part in first]
    ax.set_yticks(range(len(names)), [one_line(name) for name in names], parse_math=False)
    ax.set_ylim(len(names) - 0.5, -0.5)
    shares = measure in ("hit", "em", "em_refined", "iou_3d")
    ax.set_xlim(0, min(1.0, max(0.1, 1.15 * reach)) if shares else 1.15 * (reach or 1.0))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    plain_axes(ax)
    ax.tick_params(axis="y", length=0)
    ax.set_title(BIN_TITLES.get(key, key), fontsize=FONT_SIZE + 0.5, loc="left", pad=4)


def failures_figure(tables: Mapping[str, ErrorTable], sections: Sequence[str] | None = None) -> PrintFigure:
    """A bar per run and section: which share of its rows is right, and how the rest fails (classes of `CLASSES`).

    sections: which to show, all that have rows for None; of rows that nothing can be said about there is no bar.
    """
    counts = {name: failure_counts(table) for name, table in tables.items()}
    asked = sections or [name for name in CLASSES if name not in ("captions", "hidden")]
    shown = [name for name in asked if any(name in part for part in counts.values())]
    if not shown:
        return nothing_figure("none of the rows can be right or wrong")
    runs = {section: [name for name, part in counts.items() if section in part] for section in shown}
    present = {
        section: [name for name in CLASSES[section] if any(counts[run][section][name] for run in runs[section])]
        for section in shown
    }
    below = {section: 0.3 + 0.19 * -(-len(names) // LEGEND_COLUMNS) for section, names in present.items()}
    height = sum(0.26 + BAR_HEIGHT * len(runs[section]) + below[section] + 0.1 for section in shown)
    figure = PrintFigure(height)
    names = {run: one_line(f"{textwrap.shorten(run, 24, placeholder='…') or run[:24]}") for run in tables}
    left = 0.35 + 0.075 * max(len(name) + 6 for name in names.values())
    top = height
    for section in shown:
        tall = BAR_HEIGHT * len(runs[section])
        top -= 0.26 + tall
        ax = figure.add_axes((left / WIDTH, top / height, (WIDTH - left - 0.3) / WIDTH, tall / height))
        for place, run in enumerate(runs[section]):
            _stack(ax, place, counts[run][section])
        labels = [f"{names[run]} ({sum(counts[run][section].values())})" for run in runs[section]]
        ax.set_yticks(range(len(labels)), labels, parse_math=False)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.tick_params(axis="both", labelsize=FONT_SIZE, length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        title = f"{SECTION_NAMES[section].capitalize()} (rows in brackets)"
        ax.set_title(title, fontsize=FONT_SIZE + 1, loc="left", pad=4)
        ax.legend(
            handles=[_patch(name) for name in present[section]], fontsize=FONT_SIZE, frameon=False, handlelength=1.4,
            loc="upper left", bbox_to_anchor=(0, -0.22 / tall), ncols=LEGEND_COLUMNS, columnspacing=1.2,
            borderaxespad=0,
        )  # fmt: skip
        top -= below[section] + 0.1
    return figure


def _stack(ax, place: int, by_class: dict[str, int]) -> None:
    total = sum(by_class.values())
    start = 0.0
    for name, count in by_class.items():
        share = count / total
        color, hatch = CLASS_STYLES[name]
        ax.barh(place, share, 0.72, start, color=color, hatch=hatch, edgecolor="white", linewidth=0.6)
        if share >= LABELLED_SHARE:
            dark = color in ("#222222", "#0072B2", "#009E73", "#D55E00", "#7F7F7F")
            ax.text(
                start + share / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=FONT_SIZE,
                color="white" if dark else "black",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1.2} if hatch else None,
            )  # fmt: skip
        start += share


def _patch(name: str) -> Patch:
    color, hatch = CLASS_STYLES[name]
    return Patch(facecolor=color, hatch=hatch, edgecolor="white", label=name)


def calibration_figure(tables: Mapping[str, ErrorTable], num_bins: int = 10) -> PrintFigure:
    """How often anchors and planes are right against how sure the model says it is, and how many are how sure.

    On the diagonal a model knows what it knows; below it, it is too sure. ECE: expected calibration error.
    """
    found = {name: calibration(table, num_bins) for name, table in tables.items()}
    found, styles = {name: part for name, part in found.items() if part}, _styles(tables)
    if not found:
        return nothing_figure("no row has a confidence (predictions held to a grammar do)")
    height = 2.9 + 0.17 * (len(found) + 1)
    figure = PrintFigure(height, 7.2)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#888888", lw=1, ls=":", label="as often right as it is sure")
    width = 0.8 / num_bins / len(found)
    for number, (name, part) in enumerate(found.items()):
        style = styles[name]
        means, bins = zip(*part.bins, strict=True)
        for mean, entry in part.bins:
            if entry.interval:
                left.plot([mean, mean], entry.interval, color=style["color"], lw=1.6, alpha=0.75)
        label = f"{name}: ECE {part.ece:.2f}, {part.num_samples} placed"
        left.plot(means, [entry.value for entry in bins], ls=RUN_DASHES[number % 4], lw=1, ms=5, label=label, **style)
        middles = [float(entry.label.split()[0]) + 0.5 / num_bins for entry in bins]
        places = np.array(middles) + (number - (len(found) - 1) / 2) * width
        right.bar(places, [entry.num_samples for entry in bins], width, color=style["color"], label=name)
    for ax, title in ((left, "share that is right"), (right, "anchors and planes placed")):
        plain_axes(ax)
        ax.set_xlim(0, 1)
        ax.set_xlabel("confidence", fontsize=FONT_SIZE)
        ax.set_ylabel(title, fontsize=FONT_SIZE)
    left.set_ylim(0, 1)
    figure.legend(*left.get_legend_handles_labels(), fontsize=FONT_SIZE, frameon=False, loc="lower left")
    figure.tight_layout(rect=(0, 0.17 * (len(found) + 1.4) / height, 1, 1))
    return figure


def reach_figure(tables: Mapping[str, ErrorTable]) -> PrintFigure:
    """Share of all anchors within a centre error, and with an IoU of at least so much; an invalid one is in neither."""
    parts, styles = _with_rows(tables, "anchors"), _styles(tables)
    if not parts:
        return nothing_figure("no row asks for a single anchor")
    figure = PrintFigure(2.6)
    left, right = figure.subplots(1, 2)
    for number, (name, table) in enumerate(parts.items()):
        color, line = styles[name]["color"], RUN_DASHES[number % 4]
        label = f"{name} ({len(table)})"
        share = np.arange(1, len(table) + 1) / len(table)
        errors = np.sort(table["center_error_m"][np.isfinite(table["center_error_m"])])
        left.step([0, *errors], [0, *share[: len(errors)]], where="post", color=color, ls=line, lw=1.3, label=label)
        ious = np.sort(table["iou_3d"])[::-1]
        right.step([1, *ious, 0], [0, *share, 1], where="pre", color=color, ls=line, lw=1.3, label=label)
    known = [table for table in parts.values() if table.known("center_error_m")]  # not where all text is invalid
    errors = [table["center_error_m"] for table in known]  # a few may lie a kilometre off: the axis ends before them
    far = max((min(np.nanquantile(part, 0.98), 4 * np.nanmedian(part)) for part in errors), default=1.0)
    left.set_xlim(0, max(far, 0.05))
    left.set_xlabel("centre error up to (m)", fontsize=FONT_SIZE)
    right.set_xlim(0, 1)
    right.axvline(0.25, color="#888888", lw=1, ls=":")
    right.set_xlabel("3D IoU of at least; dotted: what counts as right", fontsize=FONT_SIZE)
    for ax in (left, right):
        plain_axes(ax)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("share of the anchors", fontsize=FONT_SIZE)
    right.legend(fontsize=FONT_SIZE, frameon=False)
    figure.tight_layout()
    return figure


def failures_table(table: ErrorTable) -> str:
    """Markdown: the classes that rows of a table are in, how many, and what each means."""
    rows = [
        [SECTION_NAMES[section], name, str(count), f"{count / sum(by_class.values()):.1%}", CLASSES[section][name]]
        for section, by_class in failure_counts(table).items()
        for name, count in by_class.items()
        if count
    ]
    return markdown_table(["", "class", "rows", "share", "what it means: the first that holds"], rows)


def failure_examples(table: ErrorTable, section: str, per_class: int = 2) -> str:
    """Markdown: the first rows of each class of failure of a section, of as many scenes as there are."""
    part = table.section(section)
    rows = [
        [failure, *map(text_cell, (row["scene_id"], str(row["question"]), row["prediction"], row["reference"]))]
        for failure in CLASSES[section]
        for row in examples(part, failure, per_class).rows
    ]
    return markdown_table(["class", "scene", "asked", "said", "true"], rows)


def one_line(text: str) -> str:
    """The text as one line without control characters, for figures and cells."""
    return "".join(c if c.isprintable() else " " for c in text)
