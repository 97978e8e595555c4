"""Samples to a batch: pictures resized, geometry in the reference frame, text tokenised with its placeholders."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from roomplan_lib.actions.text import place_digits
from roomplan_lib.config import DataConfig, LossWeightsConfig, PositionsConfig
from roomplan_lib.geometry import resize_intrinsics, rotation_z, unproject
from roomplan_lib.model.features import FeatureCache, Residence, Store
from roomplan_lib.model.geometry_tokens import NUM_DEPTH_BINS, RECORD_WIDTH, normalise_records
from roomplan_lib.model.positions import patch_lattice
from roomplan_lib.model.shared_prefix import IGNORE_INDEX, lay_out, prefix_length
from roomplan_lib.samples import check_record, depth_histogram, each_sample, sample_root
from roomplan_lib.samples.targets import UNCHANGED, Augmentation, response_text, world_to_model
from roomplan_lib.scenes import load_depth, load_rgb, path_below, picture_size
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.tokenizer import IMAGE_TOKEN

REPEATED = ("images", "depths", "view_ids", "geom_token", "boxes")  # of a record, by all that are about the same views
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

    def turns(self, kind: str = "images") -> list[int]:
        """Counter-clockwise quarter turns that set each of its images, or depths, upright."""
        return self.record.get("quarter_turns") or [0] * len(self.record[kind])

    def paths(self, kind: str = "images") -> list[Path]:
        """Its images, or depths."""
        return [path_below(self.root, path) for path in self.record[kind]]


@dataclass(frozen=True, eq=False)
class ViewSet:
    """The model's visual input for one ordered set of views, with everything in the reference frame."""

    pixel_values: Tensor | None  # uint8 [V, 3, H, W]; None where the features are known
    image_size: tuple[int, int]  # (width, height) of these pictures
    stored_size: tuple[int, int]  # (width, height) of the upright pictures before they were resized
    features: dict | None  # what the feature cache holds of them
    geometry_records: Tensor  # float32 [V, RECORD_WIDTH]
    has_geometry: bool
    patch_coordinates: Tensor  # float32 [V, P, 3], or [V, P, n_points, 3], metres in the reference frame
    patch_valid: Tensor  # bool [V, P]: enough of the patch's pixels have depth

    @property
    def num_views(self) -> int:
        return len(self.geometry_records)


def load_samples(files: Iterable[str | Path]) -> list[Sample]:
    """All samples of the files, in order.

    Raises ValueError for a file without samples, and for the first record that is malformed or whose pictures are not
    there, so that a run stops before its first step and not when it comes to them.
    """
    samples = []
    for source, file in enumerate(files):
        root, seen, before = sample_root(file), set(), len(samples)
        shared: dict[tuple, dict] = {}  # by pictures: what many questions about them repeat is kept once
        for number, record in enumerate(each_sample(file), 1):
            check_record(record, f"{file}:{number}")
            first = shared.setdefault(tuple(record["images"]), record)
            for key in REPEATED:
                if key in record and record[key] == first.get(key):
                    record[key] = first[key]
            if record.get("without_views"):
                raise ValueError(
                    f"{file}:{number}: written without pictures (without_views); prepare the file again with --scans"
                )
            for path in {*record["images"], *record.get("depths", ())} - seen:
                seen.add(path)
                if not path_below(root, path).is_file():
                    raise ValueError(f"{file}:{number}: {root / path} is missing; fetch or render the scene again")
            samples.append(Sample(record, root, source))
        if len(samples) == before:
            raise ValueError(f"{file}: holds no samples")
    return samples


def resized_size(width: int, height: int, longest: int, patch_size: int) -> tuple[int, int]:
    """(width, height) with the longest side near `longest`, both sides multiples of `patch_size`, nothing cropped."""
    scale = longest / max(width, height)
    sides = (max(1, round(side * scale / patch_size)) * patch_size for side in (width, height))
    return tuple(sides)


def resize_picture(picture: np.ndarray, stored_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] of `size` (width, height), bicubic, from uint8 [h, w, 3], what was decoded of `stored_size`.

    A whole picture goes through Pillow. One that was decoded smaller, whose pixels differ from the whole's by more than
    that, goes through PyTorch: the same filter in a quarter of the time, to one grey level.
    """
    if picture.shape[1::-1] == stored_size:
        picture = np.array(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        return torch.from_numpy(picture).permute(2, 0, 1).contiguous()
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)[0].contiguous()


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


class ViewLoader:
    """Loads the views of samples: pictures, or what the feature cache holds of them, with their geometry."""

    def __init__(
        self,
        data: DataConfig,
        *,
        patch_size: int,
        needs_positions: PositionsConfig | None,
        features: FeatureCache | None = None,
    ) -> None:
        """needs_positions: the patch coordinates that views have (`RoomPlanVLM.needs_positions`), None for none.

        features: where the encoder's outputs are read from in place of the pictures (`RoomPlanVLM.open_features`).
        """
        self.data = data
        self.patch_size = patch_size
        self.needs_positions = needs_positions
        self.features = features
        # With the files of the feature cache that the views' tensors are mapped from.
        self._cache: OrderedDict[tuple, tuple[ViewSet, list[tuple[Store, Path]]]] = OrderedDict()

    def view_set(self, sample: Sample, augmentation: Augmentation = UNCHANGED) -> ViewSet:
        """The sample's views, decoded or read from the feature cache once and kept (least recently used go first); an
        augmentation changes no pixel, so it changes geometry and nothing else.

        A file of the feature cache that changes later is read, and verified, again: its tensors change with it; but
        features that are resident are not read again.
        """
        key = sample.view_key
        views, files = self._cache.pop(key, (None, []))
        if views is None or not all(store.is_as_read(path) for store, path in files):
            views = self._load(sample)
            files = self._cache_files(sample)
        elif held := self._held(sample):
            views = replace(views, features=held)
        # Views that the cache lacks are not kept: by the next time it has their features.
        if self.data.cache_scenes and (self.features is None or views.features is not None):
            self._cache[key] = views, files
            if len(self._cache) > self.data.cache_scenes:
                self._cache.popitem(last=False)
        return views if augmentation == UNCHANGED else self._with_geometry(sample, views, augmentation)

    def _load(self, sample: Sample) -> ViewSet:
        if held := self._held(sample):
            views = _blank(sample, None, held["sizes"][:2], held["sizes"][2:], held)
        elif entry := self.features and self.features.features.read(self.feature_parts(sample), _name(sample)):
            image_size, stored_size = (tuple(entry.facts[name]) for name in ("image_size", "stored_size"))
            features = {**entry.tensors, "image_size": image_size}
            if self.features.residence:
                features |= self.features.residence.label(sample.view_key, image_size, stored_size)
            views = _blank(sample, None, image_size, stored_size, features)
        else:
            pictures, stored_size = self.load_pictures(sample)
            views = _blank(sample, pictures, tuple(pictures.shape[:-3:-1]), stored_size, None)
        return self._with_geometry(sample, views, UNCHANGED)

    def hold(self, residence: Residence) -> None:
        """From now on, features that are read stay there."""
        self.features.residence = residence
        self._cache.clear()  # of features that were read before, it says nothing

    def _held(self, sample: Sample) -> dict | None:
        residence = self.features and self.features.residence
        return residence.find(sample.view_key) if residence else None

    def load_pictures(self, sample: Sample) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [V, 3, H, W], upright and resized, and the (width, height) they had before, which is that of the files:
        a JPEG that is decoded smaller (`RESAMPLING`) keeps the intrinsics of the whole."""
        files = list(zip(sample.paths(), sample.turns(), strict=True))
        stored, *others = (picture_size(path, turn) for path, turn in files)
        if any(other != stored for other in others):
            raise ValueError(f"{_name(sample)}: its views differ in size; give views of one size")
        size = resized_size(*stored, self.data.image_size, self.patch_size)
        pictures = [resize_picture(load_rgb(path, turn, at_least=size), stored, size) for path, turn in files]
        return torch.stack(pictures), stored

    def picture_size(self, sample: Sample) -> tuple[int, int]:
        """(width, height) that its pictures are resized to, from the header of the first."""
        stored = picture_size(sample.paths()[0], sample.turns()[0])
        return resized_size(*stored, self.data.image_size, self.patch_size)

    def feature_parts(self, sample: Sample) -> dict:
        """What the features of a sample's views depend on, beside the settings of the store."""
        return {"pictures": [self.features.hash(path) for path in sample.paths()], "quarter_turns": sample.turns()}

    def coordinate_parts(self, sample: Sample) -> dict:
        """What the patch coordinates of a sample's views depend on, beside the settings of the store."""
        record = self._require_depths(sample)
        return self.feature_parts(sample) | {
            "depths": [self.features.hash(path) for path in sample.paths("depths")],
            **{key: record["geom_token"][key] for key in ("R", "t", "K")},
            **{key: record.get(key) for key in ("depth_scale", "depth_K")},
        }

    def to_store(self, sample: Sample, image_size: tuple[int, int], stored_size: tuple[int, int]) -> dict:
        """What `FeatureCache.store` is told about a sample's views."""
        facts = {"image_size": list(image_size), "stored_size": list(stored_size)}
        return {"parts": self.feature_parts(sample), "name": _name(sample), "facts": facts}

    def fault(self, sample: Sample, contents: bool = False) -> str | None:
        """What the cache lacks of a sample's views, or holds damaged; contents: read its files to their end."""
        fault = self.features.features.fault(self.feature_parts(sample), contents)
        if not fault and self.features.coordinates:
            fault = self.features.coordinates.fault(self.coordinate_parts(sample), contents)
        return fault

    def _cache_files(self, sample: Sample) -> list[tuple[Store, Path]]:
        """The files of the feature cache that a sample's views were just read from."""
        if not self.features:
            return []
        files = [(self.features.features, self.feature_parts(sample))]
        if self.features.coordinates:
            files.append((self.features.coordinates, self.coordinate_parts(sample)))
        return [(store, path) for store, parts in files if store.is_as_read(path := store.path(parts))]

    def _with_geometry(self, sample: Sample, views: ViewSet, augmentation: Augmentation) -> ViewSet:
        """The views with the geometry of their record, changed by an augmentation."""
        record = sample.record
        geometry = record.get("geom_token")
        if not geometry:
            if self.needs_positions:
                raise ValueError(f"{_name(sample)}: {NEEDS_DEPTH}")
            return views
        num_views = len(record["images"])
        poses = np.tile(np.eye(4), (num_views, 1, 1))
        poses[:, :3, :3] = np.reshape(geometry["R"], (num_views, 3, 3))
        poses[:, :3, 3] = np.reshape(geometry["t"], (num_views, 3))
        poses = world_to_model(record, augmentation) @ poses
        poses[:, :3, :3] /= augmentation.scale
        K = np.reshape(geometry["K"], (num_views, 3, 3)).astype(np.float64)
        histograms = geometry["depth_hist"]
        if augmentation.scale != 1:
            histograms = np.stack([depth_histogram(depth * augmentation.scale) for depth in self._depths(sample)])
        histogram = torch.tensor(np.reshape(histograms, (num_views, NUM_DEPTH_BINS)))
        records = normalise_records(torch.tensor(poses), torch.tensor(K), views.stored_size, histogram)
        views = replace(views, geometry_records=records, has_geometry=True)
        if not self.needs_positions:
            return views
        if augmentation == UNCHANGED:
            coordinates, valid = self._coordinates(sample, views, poses, K)
        elif self.needs_positions.n_points != 2:
            turned = augmentation.scale * rotation_z(augmentation.yaw)
            coordinates = (views.patch_coordinates.double() @ torch.tensor(turned.T)).float()
            valid = views.patch_valid
        else:  # the corners of another frame's axis-aligned box
            coordinates, valid = self._coordinates_from_depth(sample, views, poses, K, augmentation.scale)
        return replace(views, patch_coordinates=coordinates, patch_valid=valid)

    def _coordinates(self, sample: Sample, views: ViewSet, poses: np.ndarray, K: np.ndarray) -> tuple[Tensor, Tensor]:
        """patch_coordinates and patch_valid in the reference frame, from the feature cache where there is one."""
        store = self.features and self.features.coordinates
        if not store:
            return self._coordinates_from_depth(sample, views, poses, K)
        parts = self.coordinate_parts(sample)
        if entry := store.read(parts, _name(sample)):
            return entry.tensors["coordinates"], entry.tensors["valid"]
        coordinates, valid = self._coordinates_from_depth(sample, views, poses, K)
        store.keep(parts, _name(sample), {"coordinates": coordinates, "valid": valid}, {})
        return coordinates, valid

    def _coordinates_from_depth(
        self, sample: Sample, views: ViewSet, poses: np.ndarray, K: np.ndarray, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """patch_coordinates and patch_valid for camera_to_reference `poses` [V, 4, 4] and K [V, 3, 3] of the stored
        pictures; scale: of all metres."""
        grid = (views.image_size[1] // self.patch_size, views.image_size[0] // self.patch_size)
        n_points, min_valid_share = self.needs_positions.n_points, self.needs_positions.min_valid_share
        own_K = np.reshape(sample.record["depth_K"], K.shape) if "depth_K" in sample.record else None
        patches = []
        for v, depth in enumerate(self._depths(sample)):
            # Depth may be stored at another size than the picture: its intrinsics are scaled, not its values.
            K_depth = resize_intrinsics(K[v], views.stored_size, depth.shape[::-1]) if own_K is None else own_K[v]
            points, known = unproject(depth * np.float32(scale), K_depth, poses[v])
            patches.append(patch_coordinates(points, known, grid, n_points, min_valid_share))
        coordinates, valid = (np.stack(part) for part in zip(*patches, strict=True))
        return torch.tensor(coordinates, dtype=torch.float32), torch.tensor(valid)

    def _require_depths(self, sample: Sample) -> dict:
        """The sample's record. ValueError where it has no depth, or no poses to bring it into the room."""
        if not sample.record.get("depths") or not sample.record.get("geom_token"):
            raise ValueError(f"{_name(sample)}: {NEEDS_DEPTH}")
        return sample.record

    def _depths(self, sample: Sample) -> list[np.ndarray]:
        """[V] of float32 [H, W] metres, upright."""
        self._require_depths(sample)
        scale = sample.record.get("depth_scale", 1000)
        pairs = zip(sample.paths("depths"), sample.turns("depths"), strict=True)
        return [load_depth(path, turn, scale) for path, turn in pairs]


class Collator(ViewLoader):
    """Turns samples into a batch. Views shared by several samples are loaded, and later encoded, once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        data: DataConfig,
        *,
        num_visual_tokens: int,
        share_prefix: bool = True,
        **views: Any,
    ) -> None:
        """share_prefix: tell the model how rows with the same views share what stands before their questions
        (`RoomPlanVLM.why_not_shared`); views: the other arguments of `ViewLoader`."""
        super().__init__(data, **views)
        self.tokenizer = tokenizer
        self.num_visual_tokens, self.share_prefix = num_visual_tokens, share_prefix
        self.placeholder = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.weighs = data.loss_weights != LossWeightsConfig()
        # By the identity of a training sample's record (kept, so that no other takes it): prompt, response, weights.
        self._known: dict[int, tuple[dict, array, array, array]] = {}

    def __call__(
        self, samples: list[Sample], *, generate: bool = False, blind: bool = False, views: list[Sample] | None = None
    ) -> dict:
        """A batch for `RoomPlanVLM.forward`, or for `generate` (prompts only, padded on the left).

        views: samples whose views are shown instead of each sample's own (the shuffled control).
        blind: no visual tokens at all. Labels cover the response and its end token. `loss_weights` of training samples
        go with them where `data.loss_weights` asks for it.
        """
        shown = views or samples
        changes = [self.augmentation(sample) for sample in shown]
        shown_as = [
            (sample.view_key, change, self.hidden_views(sample)) for sample, change in zip(shown, changes, strict=True)
        ]
        first = dict(zip(reversed(shown_as), reversed(shown), strict=True))
        keys = list(dict.fromkeys(shown_as))
        prompts, responses, weights = self._token_ids(samples, changes, generate, blind)
        batch = self._pad(samples, prompts, responses, generate)
        if self.weighs and responses and any(sample.draw is not None for sample in samples):
            batch["loss_weights"] = torch.ones_like(batch["labels"], dtype=torch.float32)
            for row, prompt, own in zip(batch["loss_weights"], prompts, weights, strict=True):
                row[len(prompt) : len(prompt) + len(own)] = torch.tensor(own)
        if not blind:
            sets = [self.view_set(first[key], key[1]) for key in keys]
            number = {key: i for i, key in enumerate(keys)}
            batch |= {
                "scene_index": torch.tensor([number[key] for key in shown_as]),
                "pixel_values": [s.pixel_values for s in sets],
                "geometry_records": [s.geometry_records for s in sets],
                "has_geometry": torch.tensor([s.has_geometry for s in sets]),
            }
            if self.needs_positions:
                batch["patch_coordinates"] = [s.patch_coordinates for s in sets]
                batch["patch_valid"] = [s.patch_valid for s in sets]
            if self.features:
                batch["features"] = [s.features for s in sets]
                batch["to_store"] = [
                    None if s.features else self.to_store(first[key], s.image_size, s.stored_size)
                    for key, s in zip(keys, sets, strict=True)
                ]
            if self.share_prefix and not generate and len(keys) < len(samples):
                if length := prefix_length(prompts, self.placeholder):
                    laid_out = batch["attention_mask"], batch["labels"], length, batch.get("loss_weights")
                    batch["shared_prefix"] = lay_out(*laid_out)
            if any(any(key[2]) for key in keys):
                batch["view_mask"] = [~torch.tensor(key[2]) for key in keys]
        return batch

    def _token_ids(
        self, samples: list[Sample], changes: list[Augmentation], generate: bool, blind: bool
    ) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
        """The tokens of each prompt, and of each response with its end token (none to generate) and their weights.

        Texts of training that no draw changes are written and tokenised once; one placeholder is tokenised in place of
        all, which are the same.
        """
        fixed = [change == UNCHANGED and not generate and not blind for change in changes]
        known = [self._known.get(id(s.record)) if kept else None for s, kept in zip(samples, fixed, strict=True)]
        new = [i for i, texts in enumerate(known) if texts is None]
        num_tokens = 0 if blind else self.num_visual_tokens
        if new:
            settings = min(num_tokens, 1), self.data.visual_first
            prompts = self._tokenise(
                prompt_text(samples[i].record, self.tokenizer, *settings, changes[i], self.data.codec) for i in new
            )
            responses, weights = [array("i")] * len(new), [array("f")] * len(new)
            if not generate:
                texts = [response_text(samples[i].record, changes[i], self.data.codec) for i in new]
                responses = self._tokenise(texts, self.tokenizer.eos_token_id)
                if self.weighs:
                    weights = self._weights([samples[i] for i in new], texts)
            for i, prompt, response, own in zip(new, prompts, responses, weights, strict=True):
                known[i] = samples[i].record, prompt, response, own
                if fixed[i]:
                    self._known[id(samples[i].record)] = known[i]
        prompts = [prompt.tolist() for _, prompt, _, _ in known]
        if num_tokens > 1:
            for ids in prompts:
                place = ids.index(self.placeholder)
                ids[place:place] = [self.placeholder] * (num_tokens - 1)
        responses = [] if generate else [response.tolist() for _, _, response, _ in known]
        return prompts, responses, [own.tolist() for *_, own in known]

    def _weights(self, samples: list[Sample], texts: list[str]) -> list[array]:
        """The weights of each response's tokens but the end token, which weighs 1."""
        offsets = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found = []
        for sample, text, places in zip(samples, texts, offsets, strict=True):
            weights = np.ones(len(text) + 1, dtype=np.float32)  # by character
            if "instruction" not in sample.record:
                weights[:] = self.data.loss_weights.answers
            else:
                for start, end in place_digits(text, self.data.codec):
                    weights[start:end] = self.data.loss_weights.places
            # A token weighs as much as the character of it that weighs most.
            found.append(array("f", [max(weights[start:end], default=1.0) for start, end in places]))
        return found

    def _tokenise(self, texts: Iterable[str], *end: int) -> list[array]:
        return [array("i", [*ids, *end]) for ids in self.tokenizer([*texts], add_special_tokens=False)["input_ids"]]

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

    def hidden_views(self, sample: Sample) -> tuple[bool, ...]:
        """Which views of a training sample its draw hides: each but the first with the chance `data.view_dropout`."""
        num_views, chance = len(sample.record["images"]), self.data.view_dropout
        if sample.draw is None or not chance:
            return (False,) * num_views
        rng = np.random.default_rng((sample.draw, 1))  # apart from what the draw decides by itself
        return (False, *(rng.random(num_views - 1) < chance).tolist())


def _name(sample: Sample) -> str:
    """A sample's set of views in messages."""
    number = sample.record.get("view_set")
    return f"scene {sample.record['scene_id']}" + (f", view set {number}" if number is not None else "")


def _blank(
    sample: Sample,
    pictures: Tensor | None,
    image_size: tuple[int, int],
    stored_size: tuple[int, int],
    features: dict | None,
) -> ViewSet:
    """Views without any geometry."""
    num_views = len(sample.record["images"])
    nowhere = torch.zeros(num_views, 0, 3), torch.zeros(num_views, 0, dtype=torch.bool)
    return ViewSet(pictures, image_size, stored_size, features, torch.zeros(num_views, RECORD_WIDTH), False, *nowhere)
