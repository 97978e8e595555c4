"""The job that fills the feature cache: in parts, by several processes, and on from where it was cut off."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from roomplan_lib.config import FeaturesConfig, RunConfig
from roomplan_lib.model.features import (
    FeatureCache,
    encode,
    entry_bytes,
    free_bytes,
    heads_of,
    pooled_grid,
    unpack,
)
from roomplan_lib.model.pretrained import load_encoder
from roomplan_lib.model.vggt import VGGT
from roomplan_lib.model.vlm import freeze, vggt_settings
from roomplan_lib.scenes import picture_size
from roomplan_lib.training.collator import Sample, ViewLoader, load_samples
from roomplan_lib.training.processes import resolve_device
from roomplan_lib.training.run import make_model, make_tokenizer

LISTED = 20  # faults that are printed one by one
MEASURED = 4  # view sets whose stored features are compared with exact ones
HEADER_BYTES = 4096  # of a file, at most, with the hashes and names of its pictures


@dataclass
class Filler:
    """One process's means to fill the cache."""

    config: RunConfig
    encoder: VGGT
    loader: ViewLoader
    device: str = "cpu"

    def to(self, device: str) -> Filler:
        self.encoder.to(device)
        return replace(self, device=device)

    def fill(self, samples: list[Sample]) -> int:
        """Computes and keeps what the cache lacks of views of equal number and size; returns how many sets they are."""
        model, cache = self.config.model, self.loader.features
        wanted = [sample for sample in samples if cache.features.fault(self.loader.feature_parts(sample), True)]
        if wanted:
            loaded = [self.loader.load_pictures(sample) for sample in wanted]
            pixels = torch.stack([pictures for pictures, _ in loaded]).to(self.device)
            taps, predictions = encode(self.encoder, pixels, model.tap_layers, heads_of(model))
            tensors = cache.pack(torch.stack(taps, dim=1), tuple(pixels.shape[-2:])) | predictions
            for i, (sample, (pictures, stored)) in enumerate(zip(wanted, loaded, strict=True)):
                kept = self.loader.to_store(sample, tuple(pictures.shape[:-3:-1]), stored)
                cache.store(**kept, tensors={name: values[i] for name, values in tensors.items()}, required=True)
        for sample in samples:
            self.loader.view_set(sample)  # reads back what was written, and adds the coordinates
        return len(samples)


def fill_cache(
    config: RunConfig,
    *,
    part: tuple[int, int] = (1, 1),
    num_processes: int = 1,
    batch_size: int = 4,
    verify: bool = False,
    device: str | None = None,
) -> None:
    """Brings every view set of the run's train and eval files into its feature cache; what is there already is kept.

    part: (i, n) does the i-th of n parts, i from 1; the parts of all n are the whole. num_processes: on this machine,
    each with the encoder; 0 = one per GPU. batch_size: view sets per pass. verify: read every file and every picture to
    its end, and compute again what is damaged or stale. Of a lossy form a few sets are encoded once more, to print how
    far from exact they are stored.
    Raises ValueError for settings without a cache, and before anything is computed when the disk cannot hold it.
    """
    if not config.data.features.folder:
        raise ValueError("data.features.folder is empty; name a folder for the encoder's outputs, e.g. data/features")
    number, count = part
    if not 1 <= number <= count:
        raise ValueError(f"part: expected i/n with i from 1 to n, got {number}/{count}")
    device = resolve_device(device or config.training.device)
    train_samples, eval_samples = map(load_samples, (config.data.train_paths, config.data.eval_paths))
    by_views: dict[tuple, Sample] = {}
    for sample in [*train_samples, *eval_samples]:
        by_views.setdefault(sample.view_key, sample)
    samples = list(by_views.values())
    filler = make_filler(config, train_samples, verify)
    for store in filler.loader.features.stores:
        store.sweep()
    faults = find_faults(filler.loader, samples, verify)
    num_train, num_eval = (len({sample.view_key for sample in part}) for part in (train_samples, eval_samples))
    print(f"{len(samples)} view sets, {num_train} in train_files and {num_eval} in eval_files")
    check_size(filler, samples, faults)
    todo = [sample for sample in samples[number - 1 :: count] if sample.view_key in faults]
    batches = list(_batches(filler.loader, todo, batch_size))
    num_processes = num_processes or max(1, torch.cuda.device_count() if device == "cuda" else 1)
    with tqdm(total=len(todo), desc="cache", unit="set", file=sys.stdout, disable=not todo) as bar:
        for done in _run(filler, batches, device, min(num_processes, len(batches))):
            bar.update(done)
    missing = find_faults(filler.loader, samples)
    if own := [sample for sample in todo if sample.view_key in missing]:
        raise ValueError(f"{len(own)} view sets could not be kept, the first of scene {own[0].record['scene_id']}")
    rest = "the cache is whole" if not missing else f"{len(missing)} are left to the other parts"
    print(f"{len(samples) - len(missing)} of {len(samples)} are in {filler.loader.features.features.folder}; {rest}")
    whole = [sample for sample in samples if sample.view_key not in missing]
    if config.data.features.is_lossy and whole:
        chosen = whole[:: max(1, len(whole) // MEASURED)][:MEASURED]
        error = storage_error(filler.to(device), chosen)
        print(
            f"{_form(config.data.features)}: the stored features are {error:.2%} off the exact ones (root of the mean "
            f"square, of {len(chosen)} view sets)"
        )


def make_filler(config: RunConfig, train_samples: list[Sample], verify: bool = False) -> Filler:
    """The encoder that the run would train with, and the reader of its cache; verify: trust no hash of a picture."""
    model = config.model
    if model.vggt_weights and model.freeze_vggt and not config.training.start_from:
        encoder, _ = load_encoder(model.vggt_weights, vggt_settings(model))
        freeze(encoder.freeze(), model.frozen_dtype)
    else:  # its weights come with the rest of the model
        encoder = make_model(config, make_tokenizer(config, train_samples)).encoder
    settings = replace(config.data.features, on_missing="compute")
    cache = FeatureCache(settings, encoder, model, config.data.image_size, trust_hashes=not verify)
    for store in cache.stores:
        store.tells = False  # `find_faults` does
    loader = ViewLoader(
        replace(config.data, cache_scenes=0),
        patch_size=encoder.config.patch_size,
        needs_positions=model.positions if cache.coordinates else None,
        features=cache,
    )
    return Filler(config, encoder, loader)


def find_faults(loader: ViewLoader, samples: list[Sample], contents: bool = False) -> dict[tuple, str]:
    """By view key what the cache lacks or holds damaged, "missing" or why; contents: read every file to its end."""
    faults = {}
    for sample in tqdm(samples, desc="look", unit="set", file=sys.stdout, leave=False, delay=2):
        if fault := loader.fault(sample, contents):
            faults[sample.view_key] = fault
    loader.features.hash.save()
    return faults


def storage_error(filler: Filler, samples: list[Sample]) -> float:
    """How far stored features of some view sets are from the exact ones, root mean square over root mean square. A
    pooled patch token stands for each of those that it is the mean of."""
    cache, model = filler.loader.features, filler.config.model
    error = total = 0.0
    for sample in samples:
        pictures, _ = filler.loader.load_pictures(sample)
        taps, _ = encode(filler.encoder, pictures[None].to(filler.device), model.tap_layers)
        exact = torch.cat(taps).float().cpu()
        stored = unpack(filler.loader.view_set(sample).features).float()
        if (pool := cache.settings.pool) > 1:
            grid = cache.grid(tuple(pictures.shape[-2:]))
            special, patches = stored.tensor_split([cache.patch_token_start], dim=-2)
            patches = patches.unflatten(-2, pooled_grid(grid, pool))
            patches = patches.repeat_interleave(pool, -3).repeat_interleave(pool, -2)[..., : grid[0], : grid[1], :]
            stored = torch.cat([special, patches.flatten(-3, -2)], dim=-2)
        error += (stored - exact).square().sum().item()
        total += exact.square().sum().item()
    return (error / total) ** 0.5


def check_size(filler: Filler, samples: list[Sample], faults: dict[tuple, str]) -> None:
    """Prints what is there, what is damaged, and what the rest takes. ValueError when the disk cannot hold that."""
    config, folder = filler.config, filler.loader.features.features.folder
    damaged = [s for s in samples if faults.get(s.view_key, "missing") != "missing"]
    for sample in damaged[:LISTED]:
        print(f"scene {sample.record['scene_id']}: {faults[sample.view_key]}")
    if damaged:
        print(f"{len(damaged)} files are damaged or stale and computed again")
    sizes = {sample.view_key: _set_bytes(filler, sample) for sample in samples}
    needed, free = sum(sizes[key] for key in faults), free_bytes(folder)
    print(
        f"{len(samples) - len(faults)} are in the cache, {len(faults)} to compute in {_form(config.data.features)}: "
        f"up to {_size(max(sizes.values()))} each, {_size(needed)} of {_size(sum(sizes.values()))} in all; "
        f"{_size(free)} free",
        flush=True,
    )
    if needed > free:
        raise ValueError(
            f"{folder}: {_size(needed)} are needed and {_size(free)} are free; choose another data.features.folder, "
            "dtype bfloat16, fewer model.tap_layers or fewer view sets; dtype int8 and pool 2 take less, at a loss"
        )


def _set_bytes(filler: Filler, sample: Sample) -> int:
    """Bytes that one set of views takes in the cache, file headers included."""
    model, settings, num_views = filler.config.model, filler.config.data.features, len(sample.record["images"])
    size = filler.loader.picture_size(sample)
    features = entry_bytes(
        filler.encoder, len(model.tap_layers), num_views, size, settings.dtype, heads_of(model), settings.pool
    )
    patches = size[0] * size[1] // filler.loader.patch_size**2
    positions = filler.loader.needs_positions
    return (
        features
        + HEADER_BYTES
        + (positions and num_views * patches * (12 * positions.n_points + 1) + HEADER_BYTES or 0)
    )


def _batches(loader: ViewLoader, samples: Iterable[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Samples of equal numbers of views and equal picture sizes, up to `batch_size` of them."""
    open_batches: dict[tuple, list[Sample]] = {}
    for sample in samples:
        key = (len(sample.record["images"]), picture_size(sample.paths()[0], sample.turns()[0]))
        batch = open_batches.setdefault(key, [])
        batch.append(sample)
        if len(batch) == batch_size:
            yield open_batches.pop(key)
    yield from open_batches.values()


def _run(filler: Filler, batches: list[list[Sample]], device: str, num_processes: int) -> Iterator[int]:
    """Fills all batches, here or in `num_processes` others; yields the number of view sets of each as it is done."""
    if num_processes <= 1:
        yield from map(filler.to(device).fill, batches)
        return
    context = torch.multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for i in range(num_processes):
        numbers.put(i)
    filler.encoder.share_memory()
    arguments = (filler, device, numbers, max(1, torch.get_num_threads() // num_processes))
    with ProcessPoolExecutor(num_processes, context, _begin, arguments) as pool:
        try:
            for future in as_completed([pool.submit(_fill, batch) for batch in batches]):
                yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process of the cache job was killed, perhaps for its memory; what was finished is kept, so start it "
                "again, with fewer processes or a smaller batch size"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_filler: Filler | None = None  # of a process that `_run` started


def _begin(filler: Filler, device: str, numbers: multiprocessing.SimpleQueue, num_threads: int) -> None:
    global _filler
    # A process whose parent was killed must not go on alone.
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(num_threads)
    number = numbers.get()
    _filler = filler.to(f"cuda:{number % torch.cuda.device_count()}" if device == "cuda" else device)


def _fill(samples: list[Sample]) -> int:
    return _filler.fill(samples)


def _form(settings: FeaturesConfig) -> str:
    """In which form features are stored, for people."""
    return f"{settings.dtype}{', pooled 2x2' if settings.pool > 1 else ''}{' (lossy)' if settings.is_lossy else ''}"


def _size(num_bytes: int) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
