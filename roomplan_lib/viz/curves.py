"""Training curves, after a run and while it runs."""

from __future__ import annotations

import time
import uuid

import numpy as np

from roomplan_lib.viz.style import FONT_SIZE, RUN_COLORS, RUN_DASHES, PrintFigure, plain_axes

SMOOTH_FROM = 40  # logged losses; from here on a running mean is drawn over them
MANY = 40  # held-out losses; more are drawn without marks


def curve_figure(metrics: dict[str, list[dict]]) -> PrintFigure:
    """Training and held-out loss, and samples per second, of one or more runs against the optimizer step.

    metrics: by run name, the entries of its metrics.jsonl. A log that a resumed run repeats replaces the earlier one.
    Raises ValueError when no run has an entry.
    """
    if not any(metrics.values()):
        raise ValueError(f"no logged step in the metrics of {', '.join(metrics) or 'no run'}")
    title_height = 0.12 + 0.16 * len(metrics)
    height = 2.9 + title_height
    figure = PrintFigure(height)
    figure.subplots_adjust(left=0.065, right=0.985, bottom=0.14, top=1 - (title_height + 0.08) / height, wspace=0.2)
    loss_ax, rate_ax = figure.subplots(1, 2, gridspec_kw={"width_ratios": (2, 1)})
    counts = []
    for i, (name, entries) in enumerate(metrics.items()):
        color, dash = RUN_COLORS[i % len(RUN_COLORS)], RUN_DASHES[i // len(RUN_COLORS) % len(RUN_DASHES)]
        steps, loss = _series(entries, "loss")
        eval_steps, eval_loss = _series(entries, "eval_loss")
        label = f"{name}, " if len(metrics) > 1 else ""
        if len(loss) >= SMOOTH_FROM:
            window = max(3, len(loss) // 25)
            loss_ax.plot(steps, loss, color=color, alpha=0.25, linewidth=0.7)
            loss_ax.plot(
                steps, _running_mean(loss, window), dash, color=color, linewidth=1.4,
                label=f"{label}training (mean of {window} logs)",
            )  # fmt: skip
        elif len(loss):
            loss_ax.plot(
                steps, loss, dash, marker=".", markersize=4, color=color, linewidth=1.2, label=f"{label}training"
            )
        if len(eval_loss):
            loss_ax.plot(
                eval_steps, eval_loss, linestyle=(0, (2, 1)), color="black" if len(metrics) == 1 else color, lw=1,
                marker="o" if len(eval_loss) <= MANY else "", markersize=4.5, markerfacecolor="white",
                label=f"{label}held out (last {eval_loss[-1]:.3f})",
            )  # fmt: skip
        rate_steps, rate = _series(entries, "samples_per_s")
        if len(rate):
            rate_ax.plot(
                rate_steps, rate, dash, color=color, linewidth=1.2, label=f"{label}median {np.median(rate):.3g}"
            )
        last = max((int(steps.max()) for steps in (steps, eval_steps) if len(steps)), default=0)
        counts.append(f"{name}: {last:,} steps, {len(loss)} training and {len(eval_loss)} held-out logs")
    loss_ax.set_ylabel("loss (nats per answer token)", fontsize=FONT_SIZE)
    rate_ax.set_ylabel("samples per second", fontsize=FONT_SIZE)
    rate_ax.set_ylim(bottom=0)
    for ax in (loss_ax, rate_ax):
        plain_axes(ax)
        ax.set_xlabel("optimizer step", fontsize=FONT_SIZE)
        ax.margins(x=0.02)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=FONT_SIZE, frameon=False)
    figure.suptitle("\n".join(counts), fontsize=FONT_SIZE + 1, y=1 - 0.06 / height, va="top")
    return figure


class LiveCurve:
    """Listener of a training run: call it with each entry of metrics.jsonl; it keeps one figure up to date in place.

    interval: seconds between two drawings, so that drawing costs little; a held-out loss is drawn at once. `finish`
    draws the last state. Outside a notebook it only collects entries.
    """

    def __init__(self, name: str = "this run", interval: float = 5.0) -> None:
        self.name = name
        self.interval = interval
        self.entries: list[dict] = []
        self._drawn_at = -np.inf
        self._display_id: str | None = None

    def __call__(self, entry: dict) -> None:
        self.entries.append(dict(entry))
        if "eval_loss" in entry or time.monotonic() - self._drawn_at >= self.interval:
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
        self._drawn_at = time.monotonic()

    def figure(self) -> PrintFigure:
        """The curves so far. Raises ValueError before the first entry."""
        return curve_figure({self.name: self.entries})


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


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of up to `window` values; at the ends of those there are."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
