"""What training costs, as one figure: rates and bytes of the variants of each part of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from roomplan_lib.viz.style import CONTROL_COLOR, FONT_SIZE, PREDICTED_COLOR, PrintFigure, plain_axes

# By part: title, key of the bars with its factor, axis label.
PANELS = {
    "loop": ("our loop and the bare step, same batches", "samples_per_s", 1.0, "samples per second"),
    "peers": ("one small Qwen3 with LoRA, text only", "samples_per_s", 1.0, "samples per second"),
    "cache": ("frozen encoder: from the cache, and live", "samples_per_s", 1.0, "samples per second"),
    "miniature": ("the same, parts as at full size, views not shared", "samples_per_s", 1.0, "samples per second"),
    "distributed": ("one process and two, same global batch", "samples_per_s", 1.0, "samples per second"),
    "checkpoint": ("a checkpoint with its optimizer's state", "bytes", 1e-6, "10^6 bytes"),
}
OURS = ("ours", "cached", "DDP", "ZeRO-3")


def training_benchmark_figure(rows: Sequence[dict]) -> PrintFigure:
    """A panel of bars per part, from the rows of `benchmark_training`; beside each bar its number, its ratio to the
    first of its panel, and the peak of memory where it was measured. What is ours is orange.

    Raises ValueError when no row was measured.
    """
    panels = {}
    for part, (_, key, _, _) in PANELS.items():
        if members := [row for row in rows if row["part"] == part and key in row]:
            panels[part] = members
    if not panels:
        raise ValueError("no row was measured; there is nothing to draw")
    num_rows = -(-len(panels) // 2)
    height = 0.55 + 1.75 * num_rows
    figure = PrintFigure(height)
    grid = figure.add_gridspec(
        num_rows, min(2, len(panels)), left=0.13, right=0.97, bottom=0.42 / height, top=1 - 0.62 / height,
        wspace=0.45, hspace=0.75,
    )  # fmt: skip
    for place, (part, members) in enumerate(panels.items()):
        title, key, factor, label = PANELS[part]
        axes = figure.add_subplot(grid[divmod(place, 2)])
        values = [factor * row[key] for row in members]
        colors = [PREDICTED_COLOR if row["variant"] in OURS else CONTROL_COLOR for row in members]
        axes.barh(range(len(members)), values, color=colors, height=0.62)
        for i, (row, value) in enumerate(zip(members, values, strict=True)):
            text = f" {value:.3g}" + (f"  ({value / values[0]:.2f}x)" if i else "")
            text += f"  {row['memory_gb']:.2f} GB" if "memory_gb" in row else ""
            axes.text(value, i, text, va="center", fontsize=FONT_SIZE - 1)
        axes.set_yticks(range(len(members)), [row["variant"] for row in members])
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
