"""What a run is doing, for the terminal: read from its folder alone, on any machine that sees the disk."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import yaml

BLOCKS = " ▁▂▃▄▅▆▇█"
RATE_LOGS = 20  # the latest training logs that the time left is reckoned from
SILENT_FACTOR = 10  # times the usual time between two logs: a run that says "running" and is quiet for longer
SILENT_LEAST_S = 120.0  # but never less: saving, evaluating and starting take their time
CHART_HEIGHT = 6  # lines of a curve where one run is watched alone


@dataclass(frozen=True)
class RunState:
    """What the files of a run's folder say at one moment."""

    folder: Path
    status: str  # as in status.json, else what the files tell: finished, started, not started
    error: str
    step: int
    max_steps: int | None
    entries: list[dict]  # of metrics.jsonl: the latest of each step and kind, by step
    saved_at: int | None  # step of the newest whole checkpoint
    written: float | None  # seconds since the epoch of the newest log or status, None = there is neither
    missing: tuple[str, ...]  # files that there is nothing to read in

    def series(self, key: str, beside: str = "step") -> list[tuple[int, float]]:
        """(step, value) of the entries with a number under `key`, and with a key `beside`."""
        return [
            (entry["step"], entry[key])
            for entry in self.entries
            if isinstance(entry.get(key), int | float) and beside in entry
        ]

    @property
    def over(self) -> bool:
        return self.status in ("finished", "failed")


def find_run(name: str, runs_dir: Path | str = "papermill_runs") -> Path:
    """The folder of a run, given it or its name below `runs_dir`. ValueError where there is none; it lists the runs."""
    runs_dir = Path(runs_dir)
    for folder in (Path(name), runs_dir / name):
        if any((folder / file).is_file() for file in ("run.yaml", "status.json", "metrics.jsonl")):
            return folder
    known = sorted(path.parent.name for path in runs_dir.glob("*/run.yaml"))
    raise ValueError(f"{name}: no run, neither here nor in {runs_dir}; runs there: {', '.join(known) or 'none'}")


def read_run(folder: Path | str) -> RunState:
    """The state of a run that may be writing at this moment: half a last line is left for the next look."""
    folder = Path(folder)
    settings = _fields(_read(folder / "run.yaml", yaml.safe_load, yaml.YAMLError))
    status = _fields(_read(folder / "status.json", json.loads, ValueError))
    entries = _entries(folder / "metrics.jsonl")
    missing = [name for name, found in (("run.yaml", settings), ("status.json", status)) if not found]
    missing += [] if entries else ["metrics.jsonl"]
    finished = (folder / "model" / "config.json").is_file()
    guess = "finished" if finished else "started" if entries else "not started"
    step = max([entry["step"] for entry in entries] + [_whole(status.get("step")) or 0])
    max_steps = _whole(status.get("max_steps")) or _whole(_fields(settings.get("training")).get("max_steps"))
    marks = [path.parent for path in (folder / "checkpoints").glob("checkpoint-*/state.json")]
    numbers = sorted(int(found[1]) for path in marks if (found := re.fullmatch(r"checkpoint-(\d+)", path.name)))
    times = [_mtime(folder / name) for name in ("metrics.jsonl", "status.json")]
    return RunState(
        folder,
        str(status.get("status") or guess),
        str(status.get("error") or ""),
        step,
        max_steps or None,
        entries,
        numbers[-1] if numbers else None,
        max((t for t in times if t is not None), default=None),
        tuple(missing),
    )


def eta_seconds(state: RunState) -> float | None:
    """Seconds of training left at the pace of the latest logs; None before there are two, or without a last step.

    `elapsed_s` counts the time that a run was at work, so a pause between two starts does not slow it here.
    """
    times = [(step, seconds) for step, seconds in state.series("elapsed_s", beside="loss") if math.isfinite(seconds)]
    if state.max_steps is None or len(times) < 2:
        return None
    (first, start), (last, end) = times[-min(len(times), RATE_LOGS + 1)], times[-1]
    return max(state.max_steps - last, 0) * (end - start) / (last - first) if end > start else None


def silent_seconds(state: RunState, now: float) -> float | None:
    """For how long a run that is said to be running has been quiet for too long; None where all is well."""
    if state.status not in ("running", "started") or state.written is None:
        return None
    times = [seconds for _, seconds in state.series("elapsed_s")[-RATE_LOGS:]]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False) if b > a]
    quiet = now - state.written
    return quiet if quiet > max(SILENT_LEAST_S, SILENT_FACTOR * median(gaps or [0.0])) else None


def chart(values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """`height` lines of at most `width` block characters: a column is the mean of its share of the values.

    The highest column is full, the lowest one eighth of a line. What is not finite leaves a gap; a single value, or
    values that are all the same, make half columns.
    """
    count = min(width, len(values))
    parts = [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]
    columns = [fmean(known) if (known := [v for v in part if math.isfinite(v)]) else None for part in parts]
    known = [column for column in columns if column is not None]
    if not known:
        return [" " * count] * height
    low, high = min(known), max(known)
    eighths = [
        0
        if column is None
        else round(1 + (column - low) / (high - low) * (8 * height - 1))
        if high > low
        else 4 * height
        for column in columns
    ]
    return [
        "".join(BLOCKS[min(max(eighth - 8 * line, 0), 8)] for eighth in eighths) for line in reversed(range(height))
    ]


def watch_text(states: Sequence[RunState], now: float, width: int = 100) -> str:
    """The table of all runs, and below it the curves and what is amiss; `width` columns at most.

    now: seconds since the epoch.
    """
    rows = [("run", "status", "step", "loss", "held out", "samples/s", "tokens/s", "memory", "left", "saved at")]
    rows += [_row(state) for state in states]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    height = CHART_HEIGHT if len(states) == 1 else 1
    for state in states:
        lines += ["", *_curves(state, width, height), *_notes(state, now)]
    # Errors are texts of other programs: no sign of theirs may steer the terminal.
    return "\n".join("".join(c if c.isprintable() else " " for c in line).rstrip()[:width] for line in lines)


def watch(
    names: Sequence[str], runs_dir: Path | str = "papermill_runs", *, once: bool = False, interval: float = 2.0
) -> None:
    """Prints the state of runs until all are over, in place on a terminal; `once` prints it and returns.

    Into a file or a pipe only what changed is printed. Ctrl-C ends it. Raises ValueError for a run that is not there.
    """
    folders = [find_run(name, runs_dir) for name in names]
    in_place, shown = sys.stdout.isatty() and not once, ""
    try:
        while True:
            states = [read_run(folder) for folder in folders]
            text = watch_text(states, time.time(), max(40, shutil.get_terminal_size((100, 40)).columns))
            if in_place:
                print("\033[H\033[J" + text, end="\n", flush=True)
            elif text != shown:
                print(text if not shown else "\n" + text, flush=True)
            shown = text
            if once or all(state.over for state in states):
                return
            time.sleep(interval)
    except KeyboardInterrupt:
        print()


def _row(state: RunState) -> tuple[str, ...]:
    def last(key: str, form: str, factor: float = 1.0) -> str:
        series = state.series(key)
        return format(series[-1][1] * factor, form) if series else "-"

    left = eta_seconds(state)
    step = f"{state.step:,}" + (f"/{state.max_steps:,}" if state.max_steps else "")
    return (
        state.folder.name,
        state.status,
        step,
        last("loss", ".4f"),
        last("eval_loss", ".4f"),
        last("samples_per_s", ",.1f"),
        last("tokens_per_s", ",.0f"),
        last("memory_gb", ".1f") + (" GB" if state.series("memory_gb") else ""),
        "-" if left is None or state.over else _duration(left),
        "-" if state.saved_at is None else f"{state.saved_at:,}",
    )


def _curves(state: RunState, width: int, height: int) -> list[str]:
    lines = []
    for key, title in (("loss", "loss"), ("eval_loss", "held out")):
        series = state.series(key)
        if not series:
            continue
        values = [value for _, value in series]
        finite = [value for value in values if math.isfinite(value)]
        title = title if height > 1 else f"{state.folder.name}, {title}"
        span = f"{max(finite):.4g} to {min(finite):.4g}, " if finite else ""
        lines.append(f"{title}: {span}steps {series[0][0]:,} to {series[-1][0]:,}")
        # Logarithms, so that the fall of the first steps leaves the later ones some room.
        logs = [math.log(value) if value > 0 else math.nan for value in values]
        lines += chart(logs, width, height if key == "loss" else 1)
    return lines


def _notes(state: RunState, now: float) -> list[str]:
    name, quiet = state.folder.name, silent_seconds(state, now)
    notes = [f"{name}: no {file} yet" for file in state.missing if file != "run.yaml" and not state.over]
    if not state.entries and state.over:
        notes.append(f"{name}: no metrics.jsonl, so there is no curve")
    if quiet is not None:
        notes.append(f"{name}: silent for {_duration(quiet)}; is its process still there?")
    held_out = [entry for entry in state.entries if "eval_loss" in entry]
    for entry in held_out[-1:]:
        scores = [f"{key.removeprefix('eval_')} {entry[key]:.4g}" for key in _scores(entry)]
        notes += [f"{name}: answers at step {entry['step']:,}: {', '.join(scores)}"] if scores else []
    if state.error:
        notes.append(f"{name}: {state.error.strip().splitlines()[-1]}")
    losses = state.series("loss")
    if losses and not math.isfinite(losses[-1][1]):
        notes.append(f"{name}: the loss of step {losses[-1][0]:,} is no number")
    return notes


def _scores(entry: dict) -> list[str]:
    """Keys of a held-out log that are scores of generated answers."""
    keys = (key for key in entry if key.startswith("eval_") and key != "eval_loss")
    return [key for key in keys if isinstance(entry[key], int | float)]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _entries(path: Path) -> list[dict]:
    """The latest entry of each step and kind (training or held out), by step; broken lines are left out."""
    latest: dict[tuple[int, bool], dict] = {}
    for line in _read(path, str.splitlines, ValueError) or ():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and _whole(entry.get("step")) is not None:
            latest[entry["step"], "loss" in entry] = entry
    return [latest[key] for key in sorted(latest)]


def _read(path: Path, parse, error: type[Exception]):
    """What `parse` makes of a file's text; {} where there is no file, or none that can be read at this moment."""
    try:
        return parse(path.read_text(errors="replace")) or {}
    except (OSError, error):
        return {}


def _fields(value: object) -> dict:
    return value if isinstance(value, dict) else {}


def _whole(value: object) -> int | None:
    return value if type(value) is int else None


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
