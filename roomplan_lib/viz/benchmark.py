"""What training and answering cost, as one figure: rates and bytes of the variants of each part of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from roomplan_lib.viz.style import CONTROL_COLOR, FONT_SIZE, PREDICTED_COLOR, PrintFigure, plain_axes

PER_CPU = "per CPU second"
# By part: title, key of the bars with its factor, axis label.
PANELS = {
    "groups": ("training on a miniature, 32 questions a step", "samples_per_cpu_s", 1.0, f"questions {PER_CPU}"),
    "full size": ("full size, by arithmetic: the same ways", "tflop", 1.0, "TFLOP a question"),
    "inference": ("16 questions of a room, 24 tokens each", "samples_per_cpu_s", 1.0, f"answers {PER_CPU}"),
    "constrained": ("actions held to the grammar", "samples_per_cpu_s", 1.0, f"actions {PER_CPU}"),
    "loop": ("our loop and the bare step, one group a step", "step_cpu_s", 1e3, "CPU ms a step"),
    "peers": ("one small Qwen3 with LoRA, text only", "step_cpu_s", 1e3, "CPU ms a step"),
    "head": ("the same with a vocabulary of 151,936", "step_cpu_s", 1.0, "CPU s a step"),
    "cache": ("tiny stage, encoder frozen, from the cache and live", "samples_per_cpu_s", 1.0, f"samples {PER_CPU}"),
    "miniature": ("parts as at full size, views not shared", "samples_per_cpu_s", 1.0, f"samples {PER_CPU}"),
    "distributed": ("one process and two, same global batch", "samples_per_s", 1.0, "samples per second"),
    "checkpoint": ("a checkpoint with its optimizer's state", "bytes", 1e-6, "10^6 bytes"),
}
THEIRS = (
    "reference loop", "HF Trainer + PEFT, cached", "one at a time", "left-padded batch", "bare", "bare with collator",
    "HF Trainer", "TRL", "LLaMA-Factory", "ZeRO-3 state",
)  # fmt: skip


def training_benchmark_figure(rows: Sequence[dict]) -> PrintFigure:
    """A panel of bars per part, from the rows of `benchmark_training`; beside each bar its number, its ratio to the
    first of its panel, and the memory it takes where it was measured. What is ours is orange.

    Raises ValueError when no row was measured.
    """
    panels = {}
    for part, (_, key, factor, _) in PANELS.items():
        members = [row for row in rows if row["part"] == part and key in row]
        if part == "full size" and members:
            panels[part] = [(name, value, "") for name, value in members[0][key].items()]
        elif members:
            panels[part] = [(row["variant"], factor * row[key], _memory(row)) for row in members]
    if not panels:
        raise ValueError("no row was measured; there is nothing to draw")
    # As many lines of bars in both columns as the longer panel of each pair has.
    pairs = [list(panels.items())[i : i + 2] for i in range(0, len(panels), 2)]
    lines = [max(len(members) for _, members in pair) + 3.6 for pair in pairs]
    height = 0.5 + 0.2 * sum(lines)
    figure = PrintFigure(height)
    grid = figure.add_gridspec(
        len(pairs), len(pairs[0]), left=0.185, right=0.985, bottom=0.42 / height, top=1 - 0.6 / height,
        wspace=0.56, hspace=3.2 * len(pairs) / (sum(lines) - 3.6 * len(pairs)), height_ratios=[n - 3.6 for n in lines],
    )  # fmt: skip
    for i, pair in enumerate(pairs):
        for j, (part, members) in enumerate(pair):
            title, _, _, label = PANELS[part]
            axes = figure.add_subplot(grid[i, j])
            names, values, notes = zip(*members, strict=True)
            colors = [CONTROL_COLOR if name in THEIRS else PREDICTED_COLOR for name in names]
            axes.barh(range(len(values)), values, color=colors, height=0.68)
            for k, (value, note) in enumerate(zip(values, notes, strict=True)):
                ratio = f"  ({value / values[0]:.3g}x)" if k else ""
                axes.text(value, k, f" {value:.3g}{ratio}{note}", va="center", fontsize=FONT_SIZE - 1)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_xlim(0, 1.75 * max(values))
            axes.set_xlabel(label, fontsize=FONT_SIZE)
            axes.set_title(title, fontsize=FONT_SIZE, loc="left")
            plain_axes(axes)
    first = rows[0]
    figure.suptitle(
        f"{first['processor']}, {first['cores']} cores, {first['threads']} thread(s) a process, torch "
        f"{first['torch']}; medians of {first.get('rounds', 1)} rounds",
        fontsize=FONT_SIZE + 1, x=0.02, ha="left",
    )  # fmt: skip
    return figure


def _memory(row: dict) -> str:
    if "memory_above_start_gb" in row:
        return f"  +{row['memory_above_start_gb']:.2f} GB"
    return f"  {row['memory_gb']:.2f} GB" if "memory_gb" in row else ""
