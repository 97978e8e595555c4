"""95 % intervals of scores: scenes are drawn with replacement, since samples of one scene stand and fall together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

NUM_DRAWS = 1000


def with_intervals(measure: Callable[[np.ndarray], dict[str, float | None]], scenes: Sequence[str]) -> dict:
    """What `measure` says of all samples, with num_samples, num_scenes and `ci95` (by measure the 2.5 % and 97.5 %
    quantiles over NUM_DRAWS draws of the scenes; fixed seed).

    measure: of weights [N], how often each sample counts, to numbers by name; None where a number is not defined, which
    leaves a draw out. scenes: [N] the scene of each sample.
    """
    _, index = np.unique(np.asarray(scenes), return_inverse=True)
    first = {number: None for number in index}  # scenes in order of appearance
    order = np.argsort(list(first))[index] if len(first) else index
    num_scenes = len(first)
    rng = np.random.default_rng(0)
    draws = defaultdict(list)
    for _ in range(NUM_DRAWS):
        times = np.bincount(rng.integers(num_scenes, size=num_scenes), minlength=num_scenes)
        for name, value in measure(times[order]).items():
            if value is not None:
                draws[name].append(value)
    return {
        **measure(np.ones(len(index), dtype=np.int64)),
        "num_samples": len(index),
        "num_scenes": num_scenes,
        "ci95": {name: np.quantile(values, [0.025, 0.975]).tolist() for name, values in draws.items()},
    }


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float | None:
    """Mean of the values that are not NaN, each counted `weights` times; None without any."""
    kept = ~np.isnan(values)
    total = weights[kept].sum()
    return float(weights[kept] @ values[kept] / total) if total else None


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float | None:
    """Median of the values that are not NaN, each counted `weights` times; None without any."""
    kept = ~np.isnan(values)
    repeated = np.repeat(values[kept], weights[kept])
    return float(np.median(repeated)) if len(repeated) else None
