"""What the benchmark measured, as Markdown for people."""

from __future__ import annotations

from collections.abc import Sequence

from roomplan_lib.training.benchmark import SECOND

MET = {True: "met", False: "missed"}


def benchmark_table(rows: Sequence[dict]) -> str:
    """The rows of `benchmark_training` as Markdown tables, one per part, and what they were measured on."""
    columns = {
        "wall ms a step": ("step_s", 1e3),
        "CPU ms a step": ("step_cpu_s", 1e3),
        "ms more": ("overhead_ms", 1),
        "samples/s": ("samples_per_s", 1),
        "samples/CPU-s": ("samples_per_cpu_s", 1),
        "peak GB": ("memory_gb", 1),
        "GB above start": ("memory_above_start_gb", 1),
        "MB": ("bytes", 1e-6),
        "save ms": ("save_s", 1e3),
        "load ms": ("load_s", 1e3),
    }
    texts = []
    for part in dict.fromkeys(row["part"] for row in rows if row["part"] not in ("goal", "full size")):
        members = [row for row in rows if row["part"] == part]
        shown = {title: keys for title, keys in columns.items() if any(keys[0] in row for row in members)}
        lines = [[part, *shown]]
        for row in members:
            cells = []
            for key, factor in shown.values():
                ratios = [f"{row[name]:.3g}x" for name in (f"{key}_ratio", f"{key}_second_ratio") if name in row]
                cells.append(
                    (f"{factor * row[key]:.4g}" if key in row else "") + (ratios and f" ({', '.join(ratios)})" or "")
                )
            lines.append([row["variant"] + (f": {row['skipped']}" if "skipped" in row else ""), *cells])
        texts.append(_table(lines))
        texts[-1] += "".join(f"\n\n{row['variant']}: {row['note']}." for row in members if "note" in row)
        if part in SECOND:
            texts[-1] += f"\n\nSecond ratio: over {SECOND[part]}."
    if goals := [row for row in rows if row["part"] == "goal"]:
        lines = [["goal", "measured", "asked", ""]]
        for row in goals:
            what = f"{row['part_of']}: {row['what']} of {row['variant']}" + (
                f" over {row['over']}" if row["over"] else ""
            )
            lines.append([what, f"{row['value']:.3g}", f"{row['relation']} {row['limit']:.3g}", MET[row["met"]]])
        texts.append(_table(lines))
    for row in rows:
        if row["part"] == "full size":
            first = row["tflop"][next(iter(row["tflop"]))]
            lines = [[f"arithmetic for {row['variant']}", "TFLOP a question", "times fewer"]]
            lines += [[name, f"{value:.3g}", f"{first / value:.3g}"] for name, value in row["tflop"].items()]
            texts.append(
                f"{_table(lines)}\n\nAn exact checkpoint {row['bytes'] / 1e9:.2f} GB, a ZeRO-3 state of all weights "
                f"{row['zero3_bytes'] / 1e9:.1f} GB."
            )
    loads = [load for row in rows for load in row.get("load_average", ())]
    first = rows[0]
    return "\n\n".join(texts) + (
        f"\n\nMedians; in brackets: over the first line. {first['processor']}, {first['cores']} cores, "
        f"{first['threads']} thread{'s' * (first['threads'] > 1)} a process, torch {first['torch']}, transformers "
        f"{first['transformers']}; load average {min(loads, default=0):.1f} to {max(loads, default=0):.1f} before each."
    )


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])
