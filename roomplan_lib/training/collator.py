"""Samples to a batch: pictures resized, geometry in the reference frame, text tokenised with its placeholders."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roomplan_lib.config import DataConfig, PositionsConfig
from roomplan_lib.geometry import resize_intrinsics, unproject
from roomplan_lib.model.geometry_tokens import NUM_DEPTH_BINS, RECORD_WIDTH, normalise_records
from roomplan_lib.model.positions import patch_lattice
from roomplan_lib.samples import check_record, read_samples, resolve_image, sample_root
from roomplan_lib.samples.targets import response_text, sample_world_to_reference
from roomplan_lib.scenes import load_depth, load_rgb
from roomplan_lib.training.prompt import prompt_text

IGNORE_INDEX = -100


@dataclass(frozen=True, eq=False)
class Sample:
    """One record and the folder that its paths are relative to."""

    record: dict
    root: Path

    @property
    def view_key(self) -> tuple:
        """Samples with equal keys show the same ordered views, so they can share one encoding."""
        return (self.root, *self.record["images"])


@dataclass(frozen=True, eq=False)
class ViewSet:
    """The model's visual input for one ordered set of views, with everything in the reference frame."""

    pixel_values: Tensor  # uint8 [V, 3, H, W]
    geometry_records: Tensor  # float32 [V, RECORD_WIDTH]
    has_geometry: bool
    patch_coordinates: Tensor  # float32 [V, P, 3], or [V, P, n_points, 3], metres in the reference frame
    patch_valid: Tensor  # bool [V, P]: enough of the patch's pixels have depth


def load_samples(files: Iterable[str | Path]) -> list[Sample]:
    """All samples of the files, in order.

    Raises ValueError for a file without samples, and for the first record that is malformed or whose pictures are not
    there, so that a run stops before its first step and not when it comes to them.
    """
    samples = []
    for file in files:
        records = read_samples(file)
        if not records:
            raise ValueError(f"{file}: holds no samples")
        root, seen = sample_root(file), set()
        for number, record in enumerate(records, 1):
            check_record(record, f"{file}:{number}")
            for path in {*record["images"], *record.get("depths", ())} - seen:
                seen.add(path)
                if not resolve_image(root, path).is_file():
                    raise ValueError(f"{file}:{number}: {root / path} is missing; fetch or render the scene again")
            samples.append(Sample(record, root))
    return samples


def resized_size(width: int, height: int, longest: int, patch_size: int) -> tuple[int, int]:
    """(width, height) with the longest side near `longest`, both sides multiples of `patch_size`, nothing cropped."""
    scale = longest / max(width, height)
    sides = (max(1, round(side * scale / patch_size)) * patch_size for side in (width, height))
    return tuple(sides)


def patch_coordinates(
    points: np.ndarray, valid: np.ndarray, grid: tuple[int, int], n_points: int = 1, min_valid_share: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates that stand for each patch, from the valid points under it alone.

    points [H, W, 3], valid [H, W] bool, grid (rows, columns) laid over the whole image.
    n_points 1: their mean; 2: their minimum and maximum along each axis; 5, 9: for each place of `patch_lattice` the
    valid point of the patch whose pixel is nearest, so none is missing where the patch has any.
    Returns ([P, 3], or [P, n_points, 3] with more points than one, and [P] bool); patches without a valid point, or
    where a smaller share of the pixels than `min_valid_share` has one, are zero and False.
    """
    num_patches = grid[0] * grid[1]
    row, column = ((np.arange(n) + 0.5) * g / n for n, g in zip(valid.shape, grid, strict=True))  # pixels, in patches
    number = row.astype(int)[:, None] * grid[1] + column.astype(int)
    patch, inside = number[valid], points[valid]
    count = np.bincount(patch, minlength=num_patches)
    share = count / np.maximum(np.bincount(number.ravel(), minlength=num_patches), 1)
    known = (count > 0) & (share >= min_valid_share)
    if n_points == 1:
        sums = np.stack([np.bincount(patch, inside[:, k], num_patches) for k in range(3)], axis=-1)
        coordinates = sums / np.maximum(count, 1)[:, None]
    else:
        coordinates = np.zeros((num_patches, n_points, 3))
    if n_points == 2:
        coordinates[:, 0], coordinates[:, 1] = np.inf, -np.inf
        np.minimum.at(coordinates[:, 0], patch, inside)
        np.maximum.at(coordinates[:, 1], patch, inside)
    elif n_points > 2:
        for i, (r, c) in enumerate(patch_lattice(n_points)):
            distance = (((row % 1 - r) ** 2)[:, None] + (column % 1 - c) ** 2)[valid]
            least = np.full(num_patches, np.inf)
            np.minimum.at(least, patch, distance)
            nearest = np.flatnonzero(distance == least[patch])
            coordinates[patch[nearest], i] = inside[nearest]
    coordinates[~known] = 0.0
    return coordinates, known


class Collator:
    """Turns samples into a batch. Views shared by several samples are loaded, and later encoded, once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        *,
        num_visual_tokens: int,
        patch_size: int,
        needs_positions: PositionsConfig | None,
    ) -> None:
        """needs_positions: the patch coordinates that batches hold (`RoomPlanVLM.needs_positions`), None for none."""
        self.tokenizer = tokenizer
        self.data = data
        self.num_visual_tokens = num_visual_tokens
        self.patch_size = patch_size
        self.needs_positions = needs_positions
        self._cache: OrderedDict[tuple, ViewSet] = OrderedDict()

    def __call__(
        self, samples: list[Sample], *, generate: bool = False, blind: bool = False, views: list[Sample] | None = None
    ) -> dict:
        """A batch for `RoomPlanVLM.forward`, or for `generate` (prompts only, padded on the left).

        views: samples whose views are shown instead of each sample's own (the shuffled control).
        blind: no visual tokens at all. Labels cover the response and its end token.
        """
        shown = views or samples
        keys = list(dict.fromkeys(sample.view_key for sample in shown))
        first = {sample.view_key: sample for sample in reversed(shown)}
        prompts, responses = [], []
        for sample in samples:
            text = prompt_text(
                sample.record, self.tokenizer, 0 if blind else self.num_visual_tokens, self.data.visual_first
            )
            prompts.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if not generate:
                response = response_text(sample.record)
                ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
                responses.append([*ids, self.tokenizer.eos_token_id])
        batch = self._pad(samples, prompts, responses, generate)
        if not blind:
            sets = [self.view_set(first[key]) for key in keys]
            batch |= {
                "scene_index": torch.tensor([keys.index(sample.view_key) for sample in shown]),
                "pixel_values": [s.pixel_values for s in sets],
                "geometry_records": [s.geometry_records for s in sets],
                "has_geometry": torch.tensor([s.has_geometry for s in sets]),
            }
            if self.needs_positions:
                batch["patch_coordinates"] = [s.patch_coordinates for s in sets]
                batch["patch_valid"] = [s.patch_valid for s in sets]
        return batch

    def _pad(self, samples: list[Sample], prompts: list, responses: list, left: bool) -> dict:
        rows = [p + r for p, r in zip(prompts, responses or [[]] * len(prompts), strict=True)]
        length = max(map(len, rows))
        if length > self.data.max_length:
            worst = samples[max(range(len(rows)), key=lambda i: len(rows[i]))].record
            question = worst.get("question") or worst.get("instruction")
            raise ValueError(
                f"scene {worst['scene_id']}, {question!r}: {length} tokens, "
                f"but data.max_length is {self.data.max_length}; raise it"
            )
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        for i, row in enumerate(rows):
            start = length - len(row) if left else 0
            input_ids[i, start : start + len(row)] = torch.tensor(row)
            attention_mask[i, start : start + len(row)] = 1
            if responses:
                labels[i, len(prompts[i]) : len(row)] = torch.tensor(responses[i])
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        return batch | {"labels": labels} if responses else batch

    def view_set(self, sample: Sample) -> ViewSet:
        """The sample's views, decoded once and kept (least recently used go first)."""
        key = sample.view_key
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        views = self._load(sample)
        if self.data.cache_scenes:
            self._cache[key] = views
            if len(self._cache) > self.data.cache_scenes:
                self._cache.popitem(last=False)
        return views

    def _load(self, sample: Sample) -> ViewSet:
        record = sample.record
        pictures = [load_rgb(resolve_image(sample.root, image)) for image in record["images"]]
        stored = (pictures[0].shape[1], pictures[0].shape[0])
        if any((p.shape[1], p.shape[0]) != stored for p in pictures):
            raise ValueError(f"scene {record['scene_id']}: its views differ in size; give views of one size")
        size = resized_size(*stored, self.data.image_size, self.patch_size)
        resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
        grid = (size[1] // self.patch_size, size[0] // self.patch_size)
        num_views, num_patches = len(pictures), grid[0] * grid[1]
        records = torch.zeros(num_views, RECORD_WIDTH)
        coordinates = np.zeros((num_views, num_patches, 3))
        valid = np.zeros((num_views, num_patches), bool)
        geometry = record.get("geom_token")
        if geometry:
            poses = np.tile(np.eye(4), (num_views, 1, 1))
            poses[:, :3, :3] = np.reshape(geometry["R"], (num_views, 3, 3))
            poses[:, :3, 3] = np.reshape(geometry["t"], (num_views, 3))
            K = np.reshape(geometry["K"], (num_views, 3, 3)).astype(np.float64)
            poses = sample_world_to_reference(record) @ poses
            histogram = torch.tensor(np.reshape(geometry["depth_hist"], (num_views, NUM_DEPTH_BINS)))
            records = normalise_records(torch.tensor(poses), torch.tensor(K), stored, histogram)
        if self.needs_positions:
            if not geometry or not record.get("depths"):
                raise ValueError(
                    f"scene {record['scene_id']}: 3D positions need geom_token and depths, which this sample lacks; "
                    "set model.positions.method to base or prepare the samples with depth"
                )
            n_points, min_valid_share = self.needs_positions.n_points, self.needs_positions.min_valid_share
            if n_points > 1:
                coordinates = np.zeros((num_views, num_patches, n_points, 3))
            for v, path in enumerate(record["depths"]):
                depth = load_depth(resolve_image(sample.root, path))
                # depth may be stored at another size than the picture: its intrinsics are scaled, not its values
                K_depth = K[v] if depth.shape[::-1] == stored else resize_intrinsics(K[v], stored, depth.shape[::-1])
                points, known = unproject(depth, K_depth, poses[v])
                coordinates[v], valid[v] = patch_coordinates(points, known, grid, n_points, min_valid_share)
        return ViewSet(
            torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous(),
            records,
            bool(geometry),
            torch.tensor(coordinates, dtype=torch.float32),
            torch.tensor(valid),
        )
