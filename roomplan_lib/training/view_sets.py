"""Random sets of posed RGB-D views, for training an encoder: scenes packed at training size, drawn step by step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from roomplan_lib.config import PretrainDataConfig, data_path
from roomplan_lib.files import new_file
from roomplan_lib.geometry import OrientedBox, box_corners, points_in_box, resize_intrinsics, unproject
from roomplan_lib.samples.visibility import FLOOR_MARGIN, MARGIN
from roomplan_lib.scenes import CATEGORIES, Scene
from roomplan_lib.scenes.arkitscenes import find_scenes, read_scene, scene_membership
from roomplan_lib.training.collator import resized_size

VERSION = 1  # counts up when the same scene is packed as other bytes
NUM_CATEGORIES = 1 + len(CATEGORIES)  # 0 is everything that has no box


@dataclass(frozen=True, eq=False)
class PackedScene:
    """All posed RGB-D views of a scene at training size.

    rgb uint8 [V, H, W, 3], depth uint16 [V, H, W] millimetres (0 = missing), K [V, 3, 3] pixels, camera_to_world
    [V, 4, 4] metres, categories uint8 [V, P, C]: pixels of each patch by category, without those that
    have no depth.
    """

    rgb: np.ndarray
    depth: np.ndarray
    K: np.ndarray
    camera_to_world: np.ndarray
    categories: np.ndarray


def pack_scene(scene: Scene, image_size: int, patch_size: int) -> PackedScene:
    """Decode and resize all views of a scene: pictures smoothed, depth by its nearest pixel.

    Raises ValueError for views of different sizes, for fewer than two, and for views without depth.
    """
    views = [view for view in scene.views if view.posed]
    sizes = {(view.width, view.height) for view in views}
    if len(views) < 2 or len(sizes) != 1:
        raise ValueError(
            f"scene {scene.scene_id}: expected two or more posed views of one size, got {len(views)} of {sorted(sizes)}"
        )
    size = resized_size(*sizes.pop(), image_size, patch_size)
    rows = {name: [] for name in PackedScene.__dataclass_fields__}
    for view in views:
        if view.depth_K is not None:
            raise ValueError(f"scene {scene.scene_id}: its depth camera is another one than that of the pictures")
        depth = view.load_depth()
        row, column = (
            ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size[::-1], depth.shape, strict=True)
        )
        depth = depth[row[:, None], column]
        K = resize_intrinsics(view.K, (view.width, view.height), size)
        labels = _categories(scene.boxes, depth, K, view.camera_to_world)
        labels = labels.reshape(size[1] // patch_size, patch_size, -1, patch_size)
        labels = labels.swapaxes(1, 2).reshape(-1, patch_size**2)
        pixels = np.stack([(labels == k).sum(1) for k in range(NUM_CATEGORIES)], axis=-1)
        picture = Image.fromarray(view.load_rgb()).resize(size, Image.Resampling.BICUBIC)
        rows["rgb"].append(np.asarray(picture))
        rows["depth"].append(np.round(depth * 1000).astype(np.uint16))
        rows["K"].append(K)
        rows["camera_to_world"].append(view.camera_to_world)
        rows["categories"].append(pixels.clip(max=255).astype(np.uint8))
    return PackedScene(**{name: np.stack(values) for name, values in rows.items()})


def _categories(boxes: list[OrientedBox], depth: np.ndarray, K: np.ndarray, camera_to_world: np.ndarray) -> np.ndarray:
    """[H, W] int: 1 + the index of the category in whose box a pixel's point lies, the smallest box first.

    0 for points in no box and for the floor under a box's legs, -1 where there is no depth.
    """
    points, valid = unproject(depth, K, camera_to_world)
    labels = np.full(depth.shape, -1)
    points, found = points[valid], np.zeros(valid.sum(), dtype=np.int64)
    for box in sorted(boxes, key=lambda box: -box.volume):
        bottom = box_corners(box)[:, 2].min()
        inside = points_in_box(points, box, MARGIN) & (points[:, 2] > bottom + min(FLOOR_MARGIN, box.extent[2] / 4))
        found[inside] = 1 + CATEGORIES.index(box.label)
    labels[valid] = found
    return labels


class PackedScenes:
    """The scenes below the settings' folders that are of one split, packed on first use into files of their own."""

    def __init__(self, settings: PretrainDataConfig, split: str, patch_size: int, num_scenes: int = 0) -> None:
        """split: train or val. num_scenes: the first so many, 0 = all. Raises ValueError where there are fewer."""
        self.settings, self.patch_size, self.folder = settings, patch_size, data_path(settings.packed)
        self.scenes: list[Path] = []
        for root in map(data_path, settings.scenes):
            found = [scene for scene in find_scenes(root) if scene_membership(scene)[0] == split]
            if not found:
                raise ValueError(f"data.scenes: {root} has no scene of split {split}; `roomplan rooms` renders some")
            self.scenes += found
        if num_scenes > len(self.scenes):
            raise ValueError(
                f"data.num_scenes: expected at most the {len(self.scenes)} {split} scenes that are there, "
                f"got {num_scenes}"
            )
        self.scenes = self.scenes[: num_scenes or None]

    def __len__(self) -> int:
        return len(self.scenes)

    def first(self, count: int) -> PackedScenes:
        """The first `count` scenes alone, or all where there are fewer."""
        others = copy(self)
        others.scenes = self.scenes[:count]
        return others

    @property
    def names_sha256(self) -> str:
        """Of the scenes' names in order: what a draw of random scenes depends on."""
        return sha256("\n".join(scene.name for scene in self.scenes).encode()).hexdigest()

    def draw(self, index: int, num_views: int, rng: np.random.Generator) -> tuple[PackedScene, np.ndarray]:
        """A scene and the numbers of `num_views` of its views in random order. ValueError where it has fewer."""
        packed = self[index]
        if len(packed.rgb) < num_views:
            raise ValueError(
                f"scene {self.scenes[index].name} has {len(packed.rgb)} posed views, a set of {num_views} is wanted; "
                "lower data.max_views and training.num_eval_views, or leave the scene out"
            )
        return packed, rng.permutation(len(packed.rgb))[:num_views]

    def pack(self) -> None:
        """Packs the scenes that are not packed yet. Raises ValueError that names a scene which cannot be."""
        missing = [scene for scene in self.scenes if not self._file(scene).is_file()]
        for scene in tqdm(missing, desc="packing", unit="scene", disable=None if missing else True):
            packed = pack_scene(read_scene(scene), self.settings.image_size, self.patch_size)
            with new_file(self._file(scene)) as file:
                np.savez(file, **vars(packed))

    def __getitem__(self, index: int) -> PackedScene:
        """A packed scene. ValueError names a damaged file."""
        path = self._file(self.scenes[index])
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return PackedScene(**{name: arrays[name] for name in PackedScene.__dataclass_fields__})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise ValueError(f"{path}: damaged or gone ({error}); delete it, it is packed again at the start") from None

    def _file(self, scene: Path) -> Path:
        """A scene's file: of another name once the scene is written anew or packed by other settings."""
        key = [VERSION, str(scene), scene.stat().st_mtime_ns, self.settings.image_size, self.patch_size]
        return self.folder / f"{scene.name}-{sha256(json.dumps(key).encode()).hexdigest()[:12]}.npz"


def draw_step(
    scenes: PackedScenes, seed: int, step: int, num_views: int, settings: PretrainDataConfig
) -> dict[str, Tensor]:
    """The view sets of a training step: equal numbers give equal sets, so a resumed run needs no state.

    One size of set from min_views to max_views per step, as many sets as `num_views` views allow, each of a random
    scene's views in random order; the colours of each view are changed by `jitter_colors`.
    Returns a batch, see `collate_sets`.
    """
    rng = np.random.default_rng((seed, step))
    size = int(rng.integers(settings.min_views, settings.max_views + 1))
    sets = []
    while len(sets) < max(1, num_views // size):
        drawn = scenes.draw(int(rng.integers(len(scenes))), size, rng)
        if not sets or drawn[0].rgb.shape[1:] == sets[0][0].rgb.shape[1:]:
            sets.append(drawn)  # an upright scan does not fit beside one that lies
    batch = collate_sets(sets)
    batch["images"] = jitter_colors(batch["images"], settings.color_jitter, rng)
    return batch


@dataclass(frozen=True)
class DrawnSteps(Dataset):
    """The batches of `draw_step` from the step after `first_step` to the last, for loader processes."""

    scenes: PackedScenes
    seed: int
    first_step: int
    max_steps: int
    num_views: int
    settings: PretrainDataConfig

    def __len__(self) -> int:
        return self.max_steps - self.first_step

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return draw_step(self.scenes, self.seed, self.first_step + index, self.num_views, self.settings)


def held_out_sets(
    scenes: PackedScenes, seed: int, num_sets: int, num_views: int, batch_size: int
) -> Iterable[dict[str, Tensor]]:
    """Batches of `num_sets` fixed view sets of `num_views` views, of scene after scene; nothing is changed in them."""
    for start in range(0, num_sets, batch_size):
        sets: list[tuple[PackedScene, np.ndarray]] = []
        for number in range(start, min(start + batch_size, num_sets)):
            drawn = scenes.draw(number % len(scenes), num_views, np.random.default_rng((seed, 1, number)))
            if sets and drawn[0].rgb.shape[1:] != sets[0][0].rgb.shape[1:]:
                yield collate_sets(sets)
                sets = []
            sets.append(drawn)
        yield collate_sets(sets)


def collate_sets(sets: list[tuple[PackedScene, np.ndarray]]) -> dict[str, Tensor]:
    """Chosen views of scenes as `images` [B, S, 3, H, W] in [0, 1], `depth` [B, S, H, W] metres, `K` [B, S, 3, 3],
    `camera_to_world` [B, S, 4, 4] and `categories` [B, S, P, C] pixels, all float32 but the poses (float64)."""

    def stack(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(packed, name)[chosen] for packed, chosen in sets]))

    return {
        "images": stack("rgb").permute(0, 1, 4, 2, 3).float() / 255,
        "depth": stack("depth").float() / 1000,
        "K": stack("K").float(),
        "camera_to_world": stack("camera_to_world"),
        "categories": stack("categories").float(),
    }


def jitter_colors(images: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Images [B, S, 3, H, W] with brightness, contrast and the balance of the channels of each view changed.

    Brightness and contrast are factors from [1 - strength, 1 + strength], channels from half of that. Geometry stays,
    so there is neither a crop nor a mirror image.
    """
    if not strength:
        return images
    shape = (*images.shape[:2], 1, 1, 1)
    brightness, contrast = (rng.uniform(1 - strength, 1 + strength, shape) for _ in range(2))
    balance = rng.uniform(1 - strength / 2, 1 + strength / 2, (*images.shape[:3], 1, 1))
    mean = images.mean(dim=(2, 3, 4), keepdim=True)
    changed = (images - mean) * torch.from_numpy(contrast).float() + mean
    return (changed * torch.from_numpy(brightness * balance).float()).clamp(0, 1)
