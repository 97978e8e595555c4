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
from roomplan_lib.samples import check_record, depth_histogram, read_samples, sample_root
from roomplan_lib.samples.targets import UNCHANGED, Augmentation, response_text, world_to_model
from roomplan_lib.scenes import load_depth, load_rgb, path_below
from roomplan_lib.training.prompt import prompt_text

IGNORE_INDEX = -100
NEEDS_DEPTH = (
    "3D positions and scale jitter need geom_token and depths, which this sample lacks; set model.positions.method to "
    "base and data.augmentation.scale_jitter to 0, or prepare the samples with depth"
)


@dataclass(frozen=True, eq=False)
class Sample:
    """One record and the folder that its paths are relative to."""

    record: dict
    root: Path
    source: int = 0  # which of the files it came from
    draw: int | None = None  # decides the augmentation of a training sample; None = shown as it is

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
    stored_size: tuple[int, int]  # (width, height) of the upright pictures before they were resized


def load_samples(files: Iterable[str | Path]) -> list[Sample]:
    """All samples of the files, in order.

    Raises ValueError for a file without samples, and for the first record that is malformed or whose pictures are not
    there, so that a run stops before its first step and not when it comes to them.
    """
    samples = []
    for source, file in enumerate(files):
        records = read_samples(file)
        if not records:
            raise ValueError(f"{file}: holds no samples")
        root, seen = sample_root(file), set()
        for number, record in enumerate(records, 1):
            check_record(record, f"{file}:{number}")
            if record.get("without_views"):
                raise ValueError(
                    f"{file}:{number}: written without pictures (without_views); prepare the file again with --scans"
                )
            for path in {*record["images"], *record.get("depths", ())} - seen:
                seen.add(path)
                if not path_below(root, path).is_file():
                    raise ValueError(f"{file}:{number}: {root / path} is missing; fetch or render the scene again")
            samples.append(Sample(record, root, source))
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
        changes = [self.augmentation(sample) for sample in shown]
        shown_as = [(sample.view_key, change) for sample, change in zip(shown, changes, strict=True)]
        first = dict(zip(reversed(shown_as), reversed(shown), strict=True))
        keys = list(dict.fromkeys(shown_as))
        prompts, responses = [], []
        for sample, change in zip(samples, changes, strict=True):
            num_tokens = 0 if blind else self.num_visual_tokens
            text = prompt_text(
                sample.record, self.tokenizer, num_tokens, self.data.visual_first, change, self.data.codec
            )
            prompts.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if not generate:
                response = response_text(sample.record, change, self.data.codec)
                ids = self.tokenizer(response, add_special_tokens=False)["input_ids"]
                responses.append([*ids, self.tokenizer.eos_token_id])
        batch = self._pad(samples, prompts, responses, generate)
        if not blind:
            sets = [self.view_set(first[key], key[1]) for key in keys]
            batch |= {
                "scene_index": torch.tensor([keys.index(key) for key in shown_as]),
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

    def augmentation(self, sample: Sample) -> Augmentation:
        """What the draw of a training sample changes; equal draws and settings give equal changes."""
        settings = self.data.augmentation
        if sample.draw is None or not (settings.yaw_deg or settings.scale_jitter):
            return UNCHANGED
        rng = np.random.default_rng(sample.draw)
        yaw = np.radians(rng.uniform(-settings.yaw_deg, settings.yaw_deg))
        return Augmentation(float(yaw), float(np.exp(rng.uniform(-1, 1) * np.log1p(settings.scale_jitter))))

    def view_set(self, sample: Sample, augmentation: Augmentation = UNCHANGED) -> ViewSet:
        """The sample's views, decoded once and kept (least recently used go first); an augmentation changes no pixel,
        so it reads depth again and nothing else."""
        key = sample.view_key
        views = self._cache.get(key)
        if views is None:
            pictures, stored = self._pictures(sample)
            views = ViewSet(pictures, *self._geometry(sample, pictures, stored, UNCHANGED), stored)
            if self.data.cache_scenes:
                self._cache[key] = views
                if len(self._cache) > self.data.cache_scenes:
                    self._cache.popitem(last=False)
        elif self.data.cache_scenes:
            self._cache.move_to_end(key)
        if augmentation == UNCHANGED:
            return views
        geometry = self._geometry(sample, views.pixel_values, views.stored_size, augmentation)
        return ViewSet(views.pixel_values, *geometry, views.stored_size)

    def _pictures(self, sample: Sample) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [V, 3, H, W], upright and resized, and the (width, height) they had before."""
        record = sample.record
        turns = record.get("quarter_turns") or [0] * len(record["images"])
        pictures = [
            load_rgb(path_below(sample.root, image), turn) for image, turn in zip(record["images"], turns, strict=True)
        ]
        stored = (pictures[0].shape[1], pictures[0].shape[0])
        if any((p.shape[1], p.shape[0]) != stored for p in pictures):
            raise ValueError(f"scene {record['scene_id']}: its views differ in size; give views of one size")
        size = resized_size(*stored, self.data.image_size, self.patch_size)
        resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
        return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous(), stored

    def _geometry(
        self, sample: Sample, pictures: Tensor, stored: tuple[int, int], augmentation: Augmentation
    ) -> tuple[Tensor, bool, Tensor, Tensor]:
        """geometry_records, has_geometry, patch_coordinates, patch_valid of a `ViewSet`."""
        record = sample.record
        num_views, _, height, width = pictures.shape
        grid = (height // self.patch_size, width // self.patch_size)
        num_patches = grid[0] * grid[1]
        records = torch.zeros(num_views, RECORD_WIDTH)
        coordinates = np.zeros((num_views, num_patches, 3))
        valid = np.zeros((num_views, num_patches), bool)
        geometry = record.get("geom_token")
        if not geometry:
            if self.needs_positions:
                raise ValueError(f"scene {record['scene_id']}: {NEEDS_DEPTH}")
            return records, False, torch.tensor(coordinates, dtype=torch.float32), torch.tensor(valid)
        poses = np.tile(np.eye(4), (num_views, 1, 1))
        poses[:, :3, :3] = np.reshape(geometry["R"], (num_views, 3, 3))
        poses[:, :3, 3] = np.reshape(geometry["t"], (num_views, 3))
        poses = world_to_model(record, augmentation) @ poses
        poses[:, :3, :3] /= augmentation.scale
        K = np.reshape(geometry["K"], (num_views, 3, 3)).astype(np.float64)
        depths = []
        if self.needs_positions or augmentation.scale != 1:
            depths = [depth * np.float32(augmentation.scale) for depth in self._depths(sample)]
        histograms = geometry["depth_hist"]
        if augmentation.scale != 1:
            histograms = np.stack([depth_histogram(depth) for depth in depths])
        histogram = torch.tensor(np.reshape(histograms, (num_views, NUM_DEPTH_BINS)))
        records = normalise_records(torch.tensor(poses), torch.tensor(K), stored, histogram)
        if self.needs_positions:
            n_points, min_valid_share = self.needs_positions.n_points, self.needs_positions.min_valid_share
            if n_points > 1:
                coordinates = np.zeros((num_views, num_patches, n_points, 3))
            own_K = np.reshape(record["depth_K"], (num_views, 3, 3)) if "depth_K" in record else None
            for v, depth in enumerate(depths):
                # Depth may be stored at another size than the picture: its intrinsics are scaled, not its values.
                K_depth = resize_intrinsics(K[v], stored, depth.shape[::-1]) if own_K is None else own_K[v]
                points, known = unproject(depth, K_depth, poses[v])
                coordinates[v], valid[v] = patch_coordinates(points, known, grid, n_points, min_valid_share)
        return records, True, torch.tensor(coordinates, dtype=torch.float32), torch.tensor(valid)

    def _depths(self, sample: Sample) -> list[np.ndarray]:
        """[V] of float32 [H, W] metres, upright."""
        record = sample.record
        if not record.get("depths"):
            raise ValueError(f"scene {record['scene_id']}: {NEEDS_DEPTH}")
        turns = record.get("quarter_turns") or [0] * len(record["depths"])
        scale = record.get("depth_scale", 1000)
        paths = (path_below(sample.root, path) for path in record["depths"])
        return [load_depth(path, turn, scale) for path, turn in zip(paths, turns, strict=True)]
