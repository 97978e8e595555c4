"""Training curves, after a run and while it runs."""

from __future__ import annotations

import time
import uuid

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from roomplan_lib.viz.style import FONT_SIZE, RUN_COLORS, RUN_DASHES, PrintFigure, plain_axes

SMOOTH_FROM = 40  # logged losses; from here on a running mean is drawn over them
MANY = 40  # held-out losses; more are drawn without marks
MAX_POINTS = 2000  # of a line: more than a figure has pixels for
# Key of metrics.jsonl and title with unit of the small panels; those that no run has are left out.
PANELS = (
    ("eval_center_error_m", "median centre error of held-out anchors (m)"),
    ("eval_em", "exact match of held-out questions"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("samples_per_s", "samples per second"),
)
HEIGHT = 4.3  # inches without the title: 16:10 with a title of two lines; for as many small panels as FIT
FIT = 3
WIDE, VERY_WIDE = 3.0, 30.0  # greatest loss and gradient norm over the least: from here on the axis is logarithmic


def curve_figure(metrics: dict[str, list[dict]]) -> PrintFigure:
    """Training and held-out loss, errors on held-out samples, learning rate, gradient norm and samples per second of
    runs against the step.

    metrics: by run name, the entries of its metrics.jsonl. A log that a resumed run repeats replaces the earlier one.
    The loss is drawn as it was logged (faint) and smoothed; its axis is logarithmic where it falls to less than a
    third. Raises ValueError when no run has an entry.
    """
    metrics = {name: entries for name, entries in metrics.items() if entries}
    if not metrics:
        raise ValueError("no logged step in the metrics of any run")
    title_height = 0.12 + 0.16 * len(metrics)
    panels = [(key, title) for key, title in PANELS if any(len(_series(e, key)[0]) for e in metrics.values())]
    height = HEIGHT * max(1.0, len(panels) / FIT) ** 0.6 + title_height
    figure = PrintFigure(height)
    columns = figure.add_gridspec(
        max(len(panels), 1), 2 if panels else 1, width_ratios=(2.1, 1) if panels else None, left=0.07, right=0.985,
        bottom=0.1, top=1 - (title_height + 0.1) / height, wspace=0.2, hspace=0.3,
    )  # fmt: skip
    loss_ax = figure.add_subplot(columns[:, 0])
    small = {key: figure.add_subplot(columns[i, 1], sharex=loss_ax) for i, (key, _) in enumerate(panels)}
    counts, logged = [], []
    for i, (name, entries) in enumerate(metrics.items()):
        color, dash = RUN_COLORS[i % len(RUN_COLORS)], RUN_DASHES[i // len(RUN_COLORS) % len(RUN_DASHES)]
        label = f"{name}, " if len(metrics) > 1 else ""
        steps, loss = _series(entries, "loss")
        eval_steps, eval_loss = _series(entries, "eval_loss")
        _draw_loss(loss_ax, steps, loss, color, dash, label)
        if len(eval_loss):
            loss_ax.plot(
                eval_steps, eval_loss, linestyle=(0, (2, 1)), color="black" if len(metrics) == 1 else color, lw=1,
                marker="o" if len(eval_loss) <= MANY else "", markersize=4.5, markerfacecolor="white",
                label=f"{label}held out (last {eval_loss[-1]:.3f})",
            )  # fmt: skip
        for key, ax in small.items():
            at, values = _series(entries, key)
            if len(values):
                mark = "." if key.startswith("eval_") and len(values) <= MANY else ""
                ax.plot(*_thinned(at, values), dash, color=color, linewidth=1.0, marker=mark)
        logged += [*loss, *eval_loss]
        last = max((int(s.max()) for s in (steps, eval_steps) if len(s)), default=0)
        rates = _series(entries, "samples_per_s")[1]
        rate = f", median {np.median(rates):.3g} samples per second" if len(rates) else ""
        counts.append(f"{name}: {last:,} steps, {len(loss)} training and {len(eval_loss)} held-out logs{rate}")
    _log_axis_of_wide(loss_ax, logged, WIDE)
    loss_ax.set_ylabel("loss (nats per answer token)", fontsize=FONT_SIZE)
    for (key, title), ax in zip(panels, small.values(), strict=True):
        ax.set_title(title, fontsize=FONT_SIZE, loc="left", pad=3)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.locator_params(nbins=4)
        ax.set_ylim(bottom=0)
        if key == "grad_norm":
            _log_axis_of_wide(ax, [v for entries in metrics.values() for v in _series(entries, key)[1]], VERY_WIDE)
        ax.tick_params(labelbottom=ax is list(small.values())[-1])
    for ax in (loss_ax, *small.values()):
        plain_axes(ax)
        ax.margins(x=0.02)
    loss_ax.legend(fontsize=FONT_SIZE, frameon=False)
    for ax in [loss_ax, *small.values()][:: max(len(small), 1)]:
        ax.set_xlabel("optimizer step", fontsize=FONT_SIZE)
    figure.suptitle("\n".join(counts), fontsize=FONT_SIZE + 1, y=1 - 0.06 / height, va="top", parse_math=False)
    return figure


class LiveCurve:
    """Listener of a training run: call it with each entry of metrics.jsonl; it keeps one figure up to date in place.

    interval: seconds between two drawings, each of which takes about a fifth of one; a held-out loss is drawn at once.
    `finish` draws the last state. Outside a notebook it only collects entries.
    """

    def __init__(self, name: str = "this run", interval: float = 5.0) -> None:
        self.name = name
        self.interval = interval
        self.entries: list[dict] = []
        self._next_at = -np.inf
        self._display_id: str | None = None

    def __call__(self, entry: dict) -> None:
        self.entries.append(dict(entry))
        if "eval_loss" in entry or time.monotonic() >= self._next_at:
            self.finish()

    def finish(self) -> None:
        """Draw what has come so far."""
        if not self.entries or not _in_notebook():
            return
        from IPython.display import display, update_display

        if self._display_id is None:
            self._display_id = uuid.uuid4().hex
            display(self.figure(), display_id=self._display_id)
        else:
            update_display(self.figure(), display_id=self._display_id)
        self._next_at = time.monotonic() + self.interval

    def figure(self) -> PrintFigure:
        """The curves so far. Raises ValueError before the first entry."""
        return curve_figure({self.name: self.entries})


def _draw_loss(ax, steps: np.ndarray, loss: np.ndarray, color: str, dash: str, label: str) -> None:
    if len(loss) >= SMOOTH_FROM:
        window = max(3, len(loss) // 25)
        ax.plot(*_thinned(steps, loss), color=color, alpha=0.25, linewidth=0.7)
        smooth = _running_mean(loss, window)
        name = f"{label}training (mean of {window} logs)"
        ax.plot(*_thinned(steps, smooth), dash, color=color, linewidth=1.4, label=name)
    elif len(loss):
        ax.plot(steps, loss, dash, marker=".", markersize=4, color=color, linewidth=1.2, label=f"{label}training")


def _log_axis_of_wide(ax, values: list[float], factor: float) -> None:
    """A logarithmic axis, with plain numbers, for values above 0 of which some are `factor` times others."""
    finite = [value for value in values if np.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) < factor * min(finite):
        return
    ax.set_yscale("log")
    ax.set_ylim(min(finite) / 1.1, max(finite) * 1.1)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


def _series(entries: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the entries that have a number under `key`, by step; the last entry of a step counts."""
    by_step = {entry["step"]: entry[key] for entry in entries if entry.get(key) is not None}
    steps = sorted(by_step)
    return np.array(steps, dtype=int), np.array([by_step[step] for step in steps], dtype=float)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS of the points, the last one among them."""
    stride = -(-len(steps) // MAX_POINTS)
    return steps[::-stride][::-1], values[::-stride][::-1]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of up to `window` values; at the ends of those there are."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
