"""The order of samples in a run: optimizer steps made of groups of samples that share their views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset, Sampler

from roomplan_lib.samples.targets import text_length
from roomplan_lib.training.collator import Sample

Draw = tuple[int, int]  # index of a sample, and the number that decides its augmentation
Group = tuple[np.ndarray, int]  # the indices of samples of one view set, and their draw
MIXED = 8  # scenes of a step at least, where it has so many groups: questions of one scene teach much the same


class DrawnSamples(Dataset):
    """Training samples by `Draw`, each told its draw."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, drawn: Draw) -> Sample:
        return replace(self.samples[drawn[0]], draw=drawn[1])


class GroupedBatchSampler(Sampler[list[Draw]]):
    """One process's micro-batches, each `micro_batch_size // group_size` groups of up to `group_size` samples of one
    view set.

    A step is drawn whole and then cut into `accumulation x world_size` micro-batches, of which a process takes every
    `world_size`-th. So what a step holds depends on the seed and on its number of groups alone, not on how it is cut,
    and a resumed run begins at `start_step`. Before it is cut its groups are put in order of the length of their text,
    so that what is padded to one length, or waits for one another, is of about one length.

    One pass over a source shuffles every view set's samples, cuts them into groups and shuffles the groups; of a scene
    with several view sets each pass takes one, in turn. A run is as many passes as its steps need. A group of a scene
    that a step has already waits for the next step, until the step has MIXED scenes.

    shares: share of the samples that come from each source (`Sample.source`), kept as even as whole groups allow
    throughout the run; () = all sources mixed as if one.
    """

    def __init__(
        self,
        samples: list[Sample],
        *,
        micro_batch_size: int,
        group_size: int,
        num_steps: int,
        seed: int,
        shares: Sequence[float] = (),
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        if not samples:
            raise ValueError("no samples to train on")
        self.groups_per_batch, self.group_size = micro_batch_size // group_size, group_size
        self.num_steps, self.start_step, self.seed = num_steps, start_step, seed
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.shares = np.array(shares or (1.0,)) / sum(shares or (1.0,))
        # by source, by scene, by view set: the samples of it
        self.members: list[dict[tuple, dict[tuple, list[int]]]] = [{} for _ in self.shares]
        for i, sample in enumerate(samples):
            scenes = self.members[sample.source if shares else 0]
            numbered = "view_set" in sample.record
            # View sets without a number (files that name none) are all taken in every pass.
            scene = (sample.root, sample.record["scene_id"]) if numbered else sample.view_key
            scenes.setdefault(scene, {}).setdefault(sample.view_key, []).append(i)
        for source, share in enumerate(self.shares):
            if share > 0 and not self.members[source]:
                raise ValueError(f"data.train_shares: file {source + 1} has share {share:g} and no samples")
        self.scenes = [str((sample.root, sample.record["scene_id"])) for sample in samples]
        self.mixed = min(MIXED, len(set(self.scenes)))
        self.lengths = [text_length(sample.record) for sample in samples]

    def __len__(self) -> int:
        return (self.num_steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Draw]]:
        micro_batches = self.accumulation * self.world_size
        for number, step in enumerate(self.steps()):
            if number < self.start_step:
                continue
            step = sorted(step, key=lambda group: sum(self.lengths[i] for i in group[0]))
            for k in range(self.rank, micro_batches, self.world_size):
                groups = step[k * self.groups_per_batch : (k + 1) * self.groups_per_batch]
                yield [(int(i), draw) for members, draw in groups for i in members]

    def steps(self) -> Iterator[list[Group]]:
        """Per step its groups, in the order they are drawn."""
        streams = [
            _Waiting(self._groups(source), self.scenes, self._pass_length(source)) for source in range(len(self.shares))
        ]
        taken = np.zeros(len(self.shares))
        rng = np.random.default_rng((self.seed, 2**32 - 1))
        for _ in range(self.num_steps):
            step, scenes = [], set()
            for _ in range(self.groups_per_batch * self.accumulation * self.world_size):
                # The source that lags furthest behind its share of what has been drawn.
                source = int(np.argmax(self.shares * (taken.sum() + self.group_size) - taken))
                group = streams[source].take(scenes if len(scenes) < self.mixed else set())
                scenes.add(self.scenes[group[0]])
                taken[source] += len(group)
                step.append((group, int(rng.integers(2**31))))
            yield step

    def _pass_length(self, source: int) -> int:
        """Groups of one pass over a source at most."""
        return sum(
            max(-(-len(indices) // self.group_size) for indices in view_sets.values())
            for view_sets in self.members[source].values()
        )

    def _groups(self, source: int) -> Iterator[np.ndarray]:
        number = 0
        while True:
            rng = np.random.default_rng((self.seed, number, source) if source else (self.seed, number))
            groups = []
            for scene_number, view_sets in enumerate(self.members[source].values()):
                indices = list(view_sets.values())[(scene_number + number) % len(view_sets)]
                shuffled = rng.permutation(indices)
                groups += [shuffled[i : i + self.group_size] for i in range(0, len(shuffled), self.group_size)]
            for i in rng.permutation(len(groups)):
                yield groups[i]
            number += 1


class _Waiting:
    """Groups in the order of a stream, but for those whose scene is not wanted yet: they come later, first of all."""

    def __init__(self, stream: Iterator[np.ndarray], scenes: list[str], limit: int) -> None:
        """limit: groups that may wait; a scene with far more questions than others fills it in time."""
        self.stream, self.scenes, self.limit = stream, scenes, limit
        self.waiting: list[np.ndarray] = []

    def take(self, unwanted: set[str]) -> np.ndarray:
        """The next group of another scene than the unwanted ones; the next of all when no more may wait."""
        for number, group in enumerate(self.waiting):
            if self.scenes[group[0]] not in unwanted:
                return self.waiting.pop(number)
        while len(self.waiting) < self.limit:
            group = next(self.stream)
            if self.scenes[group[0]] not in unwanted:
                return group
            self.waiting.append(group)
        return self.waiting.pop(0)
