"""Numbers per patch of every view, laid over the pictures: attention of the resampler, or any other map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from roomplan_lib.scenes import View, load_rgb
from roomplan_lib.viz.style import FONT_SIZE, WIDTH, PrintFigure

COLUMNS = 4
COLORMAP = "inferno"
OPACITY = 0.85  # of the largest number; 0 lets all of the picture through
DIM = 0.75  # brightness of the picture under a map


def maps_figure(
    pictures: Sequence[View | Path | str | np.ndarray],
    maps: np.ndarray,
    *,
    title: str = "attention",
    unit: str = "share of a patch",
) -> PrintFigure:
    """Maps [V, rows, columns] over V pictures: views, files or uint8 [H, W, 3]; all on one scale, from 0.

    A map's cells divide the whole picture. Each title tells which share of the sum the view holds; the scale marks the
    number that every cell would have if all had the same. Raises ValueError for shapes that do not fit, and for
    numbers that are not finite or are below 0.
    """
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim != 3 or len(maps) != len(pictures) or not len(maps):
        raise ValueError(f"maps: expected [{len(pictures)}, rows, columns] for the pictures, got {list(maps.shape)}")
    if not np.isfinite(maps).all() or maps.min() < 0 or maps.max() == 0:
        raise ValueError(f"maps: expected finite numbers of at least 0, some above; got {maps.min()} to {maps.max()}")
    images = [_pixels(picture) for picture in pictures]
    columns = min(COLUMNS, len(images))
    num_rows = -(-len(images) // columns)
    columns = -(-len(images) // num_rows)
    cell = (WIDTH - 0.75) / COLUMNS
    row_height = cell * min(1.4, max(image.shape[0] / image.shape[1] for image in images)) + 0.2
    height = num_rows * row_height + 0.35
    figure = PrintFigure(height, columns * cell + 0.75)
    axes = figure.subplots(num_rows, columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.13})
    right = 1 - 0.7 / figure.get_figwidth()
    figure.subplots_adjust(left=0.005, right=right, bottom=0.01, top=1 - 0.52 / height)
    norm = Normalize(0, maps.max())
    for ax in axes.flat:
        ax.set_axis_off()
    shares = maps.sum(axis=(1, 2)) / maps.sum()
    for number, (ax, image, values, share) in enumerate(zip(axes.flat, images, maps, shares, strict=False), 1):
        extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        ax.imshow((image * DIM).astype(np.uint8), extent=extent)
        colors = colormaps[COLORMAP](norm(values))
        colors[..., 3] = OPACITY * np.sqrt(norm(values))  # the root lets small numbers show beside large ones
        ax.imshow(colors, extent=extent, interpolation="nearest")
        ax.set_title(f"view {number}: {100 * share:.0f} %", fontsize=FONT_SIZE, pad=3)
    scale = figure.add_axes((right + 0.012, 0.06, 0.012, 0.78))
    bar = figure.colorbar(ScalarMappable(norm, COLORMAP), cax=scale)
    bar.ax.tick_params(labelsize=FONT_SIZE - 1.5)
    bar.ax.axhline(maps.mean(), color="white", linewidth=1.2)
    bar.set_label(f"{unit} (white: all equal)", fontsize=FONT_SIZE - 1)
    figure.suptitle(
        f"{title}: {len(maps)} views of {maps.shape[1]} x {maps.shape[2]} patches",
        fontsize=FONT_SIZE + 1.5, y=1 - 0.06 / height, va="top", parse_math=False,
    )  # fmt: skip
    return figure


def _pixels(picture: View | Path | str | np.ndarray) -> np.ndarray:
    if isinstance(picture, np.ndarray):
        return picture
    return picture.load_rgb() if isinstance(picture, View) else load_rgb(Path(picture))
