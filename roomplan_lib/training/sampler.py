"""The order of samples in a run: batches made of groups of samples that share their views."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler

from roomplan_lib.training.collator import Sample


class GroupedBatchSampler(BatchSampler):
    """All batches of a run: each `micro_batch_size // group_size` groups of up to `group_size` samples of one view set.

    One pass shuffles every view set's samples, cuts them into groups and shuffles the groups; a run is as many passes
    as `num_batches` needs. The order depends on the seed alone, so a resumed run skips what it has seen, and ranks that
    take every n-th batch see different samples.
    """

    def __init__(
        self, samples: list[Sample], *, micro_batch_size: int, group_size: int, num_batches: int, seed: int
    ) -> None:
        if not samples:
            raise ValueError("no samples to train on")
        self.groups_per_batch, self.group_size = micro_batch_size // group_size, group_size
        self.batch_size, self.drop_last = micro_batch_size, False  # what data-parallel wrappers read
        self.num_batches, self.seed = num_batches, seed
        members: dict[tuple, list[int]] = {}
        for i, sample in enumerate(samples):
            members.setdefault(sample.view_key, []).append(i)
        self.members = [np.array(indices) for indices in members.values()]

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        groups = self._groups()
        for _ in range(self.num_batches):
            yield np.concatenate([next(groups) for _ in range(self.groups_per_batch)]).tolist()

    def _groups(self) -> Iterator[np.ndarray]:
        number = 0
        while True:
            rng = np.random.default_rng((self.seed, number))
            groups = []
            for indices in self.members:
                shuffled = rng.permutation(indices)
                groups += [shuffled[i : i + self.group_size] for i in range(0, len(shuffled), self.group_size)]
            for i in rng.permutation(len(groups)):
                yield groups[i]
            number += 1
