def benchmark_table(rows: Sequence[dict]) -> str:
    """The rows of `benchmark_training` as Markdown tables, one per part, and what they were measured on."""
    columns = {
        "wall ms a step": ("step_s", 1e3, "step_s_ratio"),
        "CPU ms a step": ("step_cpu_s", 1e3, "step_cpu_s_ratio"),
        "samples/s": ("samples_per_s", 1, "samples_per_s_ratio"),
        "peak GB": ("memory_gb", 1, "memory_gb_ratio"),
        "MB": ("bytes", 1e-6, "bytes_ratio"),
        "save ms": ("save_s", 1e3, ""),
        "load ms": ("load_s", 1e3, ""),
    }
    texts = []
    for part in dict.fromkeys(row["part"] for row in rows):
        members = [row for row in rows if row["part"] == part]
        shown = {title: keys for title, keys in columns.items() if any(keys[0] in row for row in members)}
        lines = [[part, *shown], ["---"] * (len(shown) + 1)]
        for row in members:
            cells = []
            for key, factor, ratio in shown.values():
                cell = f"{factor * row[key]:.4g}" if key in row else ""
                cells.append(f"{cell} ({row[ratio]:.3g}x)" if ratio in row else cell)
            lines.append([row["variant"] + (f": {row['skipped']}" if "skipped" in row else ""), *cells])
        texts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        if "zero3_bytes" in members[0]:
            row = members[0]
            texts[-1] += (
                f"\n\nArithmetic for {row['variant']}: {row['live_tflop']:.1f} TFLOP a sample live, "
                f"{row['cached_tflop']:.1f} cached; an exact checkpoint {row['bytes'] / 1e9:.2f} GB, a ZeRO-3 state of "
                f"all weights {row['zero3_bytes'] / 1e9:.1f} GB."
            )
    loads = [load for row in rows for load in row.get("load_average", ())]
    first = rows[0]
    return "\n\n".join(texts) + (
        f"\n\nMedians; in brackets: over the first line. {first['processor']}, {first['cores']} cores, "
        f"{first['threads']} thread{'s' * (first['threads'] > 1)} a process, torch {first['torch']}, transformers "
        f"{first['transformers']}; load average {min(loads, default=0):.1f} to {max(loads, default=0):.1f} before each."
    )


