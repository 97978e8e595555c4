"""Scores beside their controls, as text and as a figure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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
        ("acc_iou50", "share with IoU >= 0.5", "higher"),
        ("extent_error_m", "mean size error (m)", "lower"),
        ("yaw_error_deg", "mean yaw error (deg)", "lower"),
        ("scaled_mean_iou_3d", "mean 3D IoU, one scale per scene", "higher"),
    ),
    "qa": (
        ("em", "exact match", "higher"),
        ("em_refined", "refined match", "higher"),
        ("bleu_4", "BLEU-4", "higher"),
        ("rouge_l", "ROUGE-L", "higher"),
        ("cider", "CIDEr", "higher"),
        ("meteor", "METEOR", "higher"),
    ),
    "lists": (
        ("f1_iou25", "F1, IoU >= 0.25", "higher"),
        ("f1_iou50", "F1, IoU >= 0.5", "higher"),
        ("f1_50cm", "F1, centres within 50 cm", "higher"),
        ("query_f1_iou25", "mean F1 per question, bounds, IoU >= 0.25", "higher"),
        ("ap_iou25", "AP, IoU >= 0.25", "higher"),
        ("valid_json_rate", "share of valid actions", "higher"),
    ),
    "plans": (
        ("f1_iou25", "walls, doors, windows: F1, IoU >= 0.25", "higher"),
        ("corner_error_m", "corner error (m)", "lower"),
        ("corner_f1_25cm", "corners within 25 cm, F1", "higher"),
        ("floor_iou", "floor IoU", "higher"),
        ("object_f1_iou25", "furniture: F1, IoU >= 0.25", "higher"),
        ("object_f1_50cm", "furniture: F1, centres within 50 cm", "higher"),
        ("valid_json_rate", "share of valid actions", "higher"),
    ),
    "measures": (
        ("relative_error", "relative error", "lower"),
        ("within_10pct", "within 10 %", "higher"),
        ("within_25pct", "within 25 %", "higher"),
        ("coverage", "measures of the right things", "higher"),
    ),
    "captions": (
        ("bleu_4", "BLEU-4", "higher"),
        ("rouge_l", "ROUGE-L", "higher"),
        ("cider", "CIDEr", "higher"),
        ("meteor", "METEOR", "higher"),
    ),
    "language": (
        ("json_rate", "JSON", "higher"),
        ("valid_rate", "valid action", "higher"),
        ("semantic_rate", "makes sense in a room", "higher"),
        ("type_accuracy", "right verb", "higher"),
        ("category_accuracy", "right category", "higher"),
        ("abstain_precision", "refusals that are right", "higher"),
        ("abstain_recall", "refused where it should", "higher"),
        ("duplicate_rate", "placed twice", "lower"),
    ),
}
FIGURE_MEASURES = {
    "anchors": MEASURES["anchors"][:3],
    "qa": MEASURES["qa"][:1],
    "lists": MEASURES["lists"][:1],
    "plans": MEASURES["plans"][3:5],
}
TASK_NAMES = {
    "anchors": "Anchors", "qa": "Questions", "lists": "Lists of anchors", "plans": "Whole rooms",
    "measures": "Measures", "captions": "Captions", "language": "Actions as text",
}  # fmt: skip
SHOWN = {
    "model": "model",
    "baseline": "no model (median training box, commonest training answer)",
    "unconstrained": "model without the grammar",
    "shuffled": "shuffled (another scene's views)",
    "one_view": "one view (the first)",
    "blind": "blind (no views)",
    "constant": "constant (median training box)",
    "majority": "majority (commonest training answer)",
    "retrieval": "retrieval (training sample of most similar words)",
    "noise_5cm": "truth moved by 5 cm",
    "noise_10cm": "truth moved by 10 cm",
    "noise_20cm": "truth moved by 20 cm",
    "quantised": "truth as text has it",
}
IN_FIGURE = ("model", "baseline", "one_view", "shuffled", "blind", "constant", "majority")


def scores_table(scores: dict) -> str:
    """A Markdown table per task of the scores of a run (scores.json): measures beside controls, 95 % intervals.

    Raises ValueError when there is no score.
    """
    parts = []
    for task, by_control in _tasks(scores, MEASURES).items():
        measures = [entry for entry in MEASURES[task] if any(entry[0] in score for score in by_control.values())]
        head = ["", *(title for _, title, _ in measures)]
        kinds = sorted({name for score in by_control.values() for name in score.get("em_by_task", {})})
        kinds = kinds if len(kinds) > 1 else []
        rows = [
            [
                SHOWN[control],
                *(_cell(score, key) for key, _, _ in measures),
                *(_number(score.get("em_by_task", {}).get(name)) for name in kinds),
            ]
            for control, score in by_control.items()
        ]
        parts.append(f"{_heading(task, by_control)}\n\n{markdown_table(head + kinds, rows)}")
        protocol = scores.get("protocols", {}).get(task)
        if protocol:
            parts[-1] += f"\n\nProtocol {protocol}. In brackets: 95 % interval, bootstrap over scenes."
        published = by_control.get("model", {}).get("published", {})
        if published:
            head = ["model, as papers count", *(title for _, title, _ in measures)]
            rows = [
                [f"{source}: {protocol}", *(_number(score.get(key)) for key, _, _ in measures)]
                for source, by_protocol in published.items()
                for protocol, score in by_protocol.items()
            ]
            parts[-1] += f"\n\n{markdown_table(head, rows)}"
    return "\n\n".join(parts)


def runs_table(scores: Mapping[str, dict]) -> str:
    """A Markdown table per task of the scores of several runs, by name: each run beside its controls IN_FIGURE.

    A run without a score, whose rows hide the true answers, is left out; a sentence where no run has one.
    """
    by_run = {name: _tasks(part, MEASURES) for name, part in scores.items() if any(map(part.get, MEASURES))}
    if not by_run:
        return "Nothing to score: no row holds the true answer."
    parts = []
    for task in [name for name in MEASURES if any(name in tasks for tasks in by_run.values())]:
        entries = [
            (run, control, score)
            for run, tasks in by_run.items()
            for control, score in tasks.get(task, {}).items()
            if control in IN_FIGURE
        ]
        measures = [entry for entry in MEASURES[task] if any(entry[0] in score for _, _, score in entries)]
        rows = [
            [
                text_cell(run),
                SHOWN[control].split(" (")[0],
                str(score["num_samples"]),
                *(_cell(score, key) for key, _, _ in measures),
            ]
            for run, control, score in entries
        ]
        head = ["run", "who answers", "samples", *(title for _, title, _ in measures)]
        parts.append(f"{TASK_NAMES[task]}\n\n{markdown_table(head, rows)}")
    return "\n\n".join(parts)


def scores_figure(scores: dict) -> PrintFigure:
    """One panel per measure of FIGURE_MEASURES: the model (orange) above its controls (grey), with 95 % intervals.

    Raises ValueError when there is no score of these.
    """
    tasks = {
        task: {name: score for name, score in by_control.items() if name in IN_FIGURE}
        for task, by_control in _tasks(scores, FIGURE_MEASURES).items()
    }
    panels = [
        (task, by_control, key, title, better)
        for task, by_control in tasks.items()
        for key, title, better in FIGURE_MEASURES[task]
    ]
    figure = PrintFigure(2.6, 1.75 * len(panels) + len(tasks))
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


def _tasks(scores: dict, known: Collection[str]) -> dict[str, dict[str, dict]]:
    """Scores by task, of those `known`, and by control, the model first."""
    tasks = {task: scores[task] for task in known if scores.get(task)}
    if not tasks:
        raise ValueError(f"scores: expected scores under {' or '.join(known)}, got the keys {sorted(scores)}")
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


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, *rows)
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def text_cell(text: str, max_letters: int = 90) -> str:
    """A text of others for a Markdown cell: one line, cut at `max_letters`, shown as it is, without any markup."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= max_letters else f"{text[: max_letters - 1]}…"
    return f"`{text.replace('`', chr(39))}`".replace("|", "\\|") if text else "-"
