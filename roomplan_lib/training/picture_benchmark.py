"""What a picture costs on its way to the encoder, and how far the pixels of a JPEG that is decoded smaller differ."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from roomplan_lib.config import DataConfig
from roomplan_lib.scenes import load_rgb
from roomplan_lib.training.collator import Sample, ViewLoader, resize_picture, resized_size

# (width, height) of made pictures: common depth cameras, ScanNet's colour camera, a phone's video.
SIZES = ((640, 480), (1296, 968), (1920, 1440))
PATCH_SIZE = 14  # pixels, VGGT's


def benchmark_pictures(
    pictures: Sequence[Path] = (), *, image_size: int = 448, rounds: int = 25, progress: bool = True
) -> Iterator[dict]:
    """One row per picture: milliseconds of CPU time, medians of `rounds` in which all ways take turns, and pixels.

    pictures: files to measure; without them one JPEG of each of SIZES is made. image_size: pixels of the longest side.
    A row: {name, width, height, kilobytes, image_size; reference_ms: the transform of vggt-qwen3 (`reference_pixels`);
    full_ms: ours with the whole picture decoded; ours_ms: `ViewLoader.load_pictures`; max_difference, mean_difference:
    of ours to full, grey levels}. Raises ValueError for a file that is no picture.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(file) for file in pictures] or [make_picture(Path(folder), *size) for size in SIZES]
        loader = ViewLoader(DataConfig(image_size=image_size), patch_size=PATCH_SIZE, needs_positions=None)
        for file in tqdm(files, "pictures", unit="picture", disable=not progress):
            sample = Sample({"images": [file.name]}, file.parent)
            (ours,), (width, height) = loader.load_pictures(sample)
            size = resized_size(width, height, image_size, PATCH_SIZE)
            difference = (ours.int() - full_pixels(file, size).int()).abs()
            ways = {
                "reference_ms": lambda file=file: reference_pixels(file, image_size),
                "full_ms": lambda file=file, size=size: full_pixels(file, size),
                "ours_ms": lambda sample=sample: loader.load_pictures(sample),
            }
            times = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    start = time.process_time()
                    way()
                    times[name].append(1e3 * (time.process_time() - start))
            yield {
                "name": file.name,
                "width": width,
                "height": height,
                "kilobytes": file.stat().st_size / 1e3,
                "image_size": image_size,
                **{name: float(np.median(values)) for name, values in times.items()},
                "max_difference": int(difference.max()),
                "mean_difference": float(difference.float().mean()),
            }


def reference_pixels(file: Path, image_size: int) -> Tensor:
    """float32 [3, image_size, image_size] in [0, 1] as the collator of vggt-qwen3 makes it: the whole picture decoded,
    its shorter side resized (bicubic), the middle cropped, converted in the process that trains."""
    picture = Image.open(file).convert("RGB")
    scale = image_size / min(picture.size)
    picture = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - image_size) // 2 for side in picture.size)
    pixels = np.array(picture.crop((left, top, left + image_size, top + image_size)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def full_pixels(file: Path, size: tuple[int, int]) -> Tensor:
    """uint8 [3, H, W] of the picture decoded whole and resized to `size` (width, height), as ours does the rest."""
    picture = load_rgb(file)
    return resize_picture(picture, picture.shape[1::-1], size)


def make_picture(folder: Path, width: int, height: int) -> Path:
    """A JPEG of smooth shapes with a camera's grain, about as large a file as a photograph of a room."""
    rng = np.random.default_rng(0)
    shapes = Image.fromarray(rng.integers(0, 256, (height // 60, width // 60, 3), dtype=np.uint8))
    smooth = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    path = folder / f"{width}x{height}.jpg"
    grainy = smooth + rng.normal(0, 3, (height, width, 3))
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return path


def pictures_table(rows: Sequence[dict]) -> str:
    """The rows of `benchmark_pictures` for people."""
    lines = [
        f"{'picture':<20} {'size':>10} {'kB':>6} {'reference':>10} {'full':>8} {'ours':>8} {'reference/ours':>15} "
        f"{'full/ours':>10} {'difference':>16}"
    ]
    for row in rows:
        reference, full, ours = (row[f"{name}_ms"] for name in ("reference", "full", "ours"))
        difference = f"max {row['max_difference']}, mean {row['mean_difference']:.2f}"
        lines.append(
            f"{row['name']:<20.20} {row['width']:>5}x{row['height']:<4} {row['kilobytes']:>6.0f} {reference:>10.2f} "
            f"{full:>8.2f} {ours:>8.2f} {reference / ours:>15.2f} {full / ours:>10.2f} {difference:>16}"
        )
    return "\n".join(lines) + (
        f"\nCPU milliseconds, to a longest side of {rows[0]['image_size']} pixels, medians of interleaved rounds. "
        "reference: decoded whole, bicubic, cropped, float32. full: ours without the smaller decoding. "
        "difference: of ours to full, grey levels of 255."
    )
