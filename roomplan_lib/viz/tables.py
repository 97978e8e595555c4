"""Scores beside their controls, as text and as a figure."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from roomplan_lib.viz.style import CONTROL_COLOR, FONT_SIZE, PREDICTED_COLOR, PrintFigure, plain_axes

# key, title with unit, which way is better
MEASURES = {
    "anchors": (
        ("median_center_error_m", "median centre error (m)", "lower"),
        ("mean_iou_3d", "mean 3D IoU", "higher"),
        ("acc_iou25", "share with IoU >= 0.25", "higher"),
        ("valid_json_rate", "share of valid actions", "higher"),
    ),
    "qa": (("em", "exact match", "higher"),),
}
TASK_NAMES = {"anchors": "Anchors", "qa": "Questions"}
SHOWN = {
    "model": "model",
    "shuffled": "shuffled (another scene's views)",
    "blind": "blind (no views)",
    "constant": "constant (median training box)",
    "majority": "majority (commonest training answer)",
}


def scores_table(scores: dict) -> str:
    """A Markdown table per task of the scores of a run (scores.json): measures beside controls, 95 % intervals.

    Raises ValueError when there is no score.
    """
    parts = []
    for task, by_control in _tasks(scores).items():
        measures = MEASURES[task]
        head = ["", *(title for _, title, _ in measures)]
        if task == "qa":
            tasks = sorted({name for score in by_control.values() for name in score.get("em_by_task", {})})
            head += tasks if len(tasks) > 1 else []
        rows = []
        for control, score in by_control.items():
            cells = [_cell(score, key) for key, _, _ in measures]
            if task == "qa" and len(tasks) > 1:
                cells += [_number(score.get("em_by_task", {}).get(name)) for name in tasks]
            rows.append([SHOWN[control], *cells])
        parts.append(f"{_heading(task, by_control)}\n\n{_markdown(head, rows)}")
        protocol = scores.get("protocols", {}).get(task)
        if protocol:
            parts[-1] += f"\n\nProtocol {protocol}. In brackets: 95 % interval, bootstrap over scenes."
    return "\n\n".join(parts)


def scores_figure(scores: dict) -> PrintFigure:
    """One panel per measure: the model (orange) above its controls (grey), with 95 % intervals over scenes.

    Raises ValueError when there is no score.
    """
    panels = [
        (task, by_control, key, title, better)
        for task, by_control in _tasks(scores).items()
        for key, title, better in MEASURES[task]
        if key != "valid_json_rate"
    ]
    figure = PrintFigure(2.6, 1.75 * len(panels) + len(_tasks(scores)))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    seen: set[str] = set()
    for ax, (task, by_control, key, title, better) in zip(axes, panels, strict=True):
        names = list(by_control)
        reach = 0.0
        for place, name in enumerate(names):
            value, interval = by_control[name].get(key), by_control[name].get("ci95", {}).get(key)
            color = PREDICTED_COLOR if name == "model" else CONTROL_COLOR
            if value is None:
                ax.text(0.03, place, "none valid", fontsize=FONT_SIZE, va="center", transform=ax.get_yaxis_transform())
                continue
            if interval:
                ax.plot(interval, [place, place], color=color, linewidth=2, solid_capstyle="butt")
            ax.plot(value, place, "s" if name == "model" else "o", color=color, markersize=6)
            right = max(value, *(interval or [value]))
            ax.annotate(
                f"{value:.2f}", (right, place), (6, 0), textcoords="offset points", va="center", fontsize=FONT_SIZE
            )
            reach = max(reach, right)
        ax.set_yticks(range(len(names)), names if task not in seen else [""] * len(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlim(0, 1.3 * (reach or 1.0) if key.endswith("_m") else max(1.0, 1.25 * reach))
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        plain_axes(ax)
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel(f"{title}\n({better} is better)", fontsize=FONT_SIZE)
        if task not in seen:
            ax.set_title(_heading(task, by_control).replace(": ", "\n"), fontsize=FONT_SIZE + 1, loc="left", pad=8)
        seen.add(task)
    figure.tight_layout(w_pad=1.5)
    return figure


def _tasks(scores: dict) -> dict[str, dict[str, dict]]:
    """Scores by task and control, the model first."""
    tasks = {task: scores[task] for task in MEASURES if scores.get(task)}
    if not tasks:
        raise ValueError(f"scores: expected scores under {' or '.join(MEASURES)}, got the keys {sorted(scores)}")
    unknown = {name for part in tasks.values() for name in part} - SHOWN.keys()
    if unknown:
        raise ValueError(f"scores: expected the controls {', '.join(SHOWN)}, got {sorted(unknown)}")
    return {task: {name: part[name] for name in SHOWN if name in part} for task, part in tasks.items()}


def _heading(task: str, by_control: dict[str, dict]) -> str:
    score = next(iter(by_control.values()))
    return f"{TASK_NAMES[task]}: {score['num_samples']} samples of {score['num_scenes']} scenes"


def _cell(score: dict, key: str) -> str:
    interval = score.get("ci95", {}).get(key)
    text = _number(score.get(key))
    return f"{text} [{_number(interval[0])}, {_number(interval[1])}]" if interval else text


def _number(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.3f}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
