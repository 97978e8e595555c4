"""A captured room in one form, whatever files it came from. Readers fill it, nothing else knows their formats."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from roomplan_lib.geometry import OrientedBox

# The 17 categories of ARKitScenes 3DOD.
CATEGORIES = (
    "cabinet", "refrigerator", "shelf", "stove", "bed", "sink", "washer", "toilet", "bathtub",
    "oven", "dishwasher", "fireplace", "stool", "chair", "table", "tv_monitor", "sofa",
)  # fmt: skip
MAX_PIXELS = 50_000_000  # a larger picture in a scene folder is a mistake or an attack


@dataclass(frozen=True, eq=False)
class View:
    """One posed image. K: [3, 3] pixels of the stored image. camera_to_world: [4, 4] metres, OpenCV camera."""

    view_id: str
    rgb_path: Path
    depth_path: Path | None
    K: np.ndarray
    camera_to_world: np.ndarray
    timestamp: float  # seconds
    width: int
    height: int

    def load_rgb(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return load_rgb(self.rgb_path)

    def load_depth(self) -> np.ndarray:
        """float32 [H, W] metres, 0 = missing. Raises ValueError when this view has no depth."""
        if self.depth_path is None:
            raise ValueError(f"view {self.view_id} has no depth image beside {self.rgb_path}")
        return load_depth(self.depth_path)


@dataclass(frozen=True, eq=False)
class Scene:
    """One captured room. World: metres, z up. `boxes` carry their category in `label`."""

    scene_id: str
    views: list[View]
    boxes: list[OrientedBox]
    source: str  # the reader: "arkitscenes", ...
    split: str = ""  # train, val, test or "" when the folder does not tell
    visit_id: str = ""  # scans of one visit show the same room
    mesh_path: Path | None = None
    colors: dict[str, str] = field(default_factory=dict)  # colour name by object_id, where a sidecar tells


def load_rgb(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] of any picture Pillow reads. Raises ValueError that names the file."""
    return np.asarray(_open_picture(path).convert("RGB"))


def load_depth(path: Path) -> np.ndarray:
    """float32 [H, W] metres of a 16-bit PNG in millimetres, 0 = missing. Raises ValueError that names the file."""
    picture = _open_picture(path)
    if picture.mode not in ("I;16", "I"):
        raise ValueError(f"{path}: expected a 16-bit depth image in millimetres, got mode {picture.mode}")
    return np.asarray(picture).astype(np.float32) / 1000


def _open_picture(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            picture = Image.open(path)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{path}: {picture.width}x{picture.height} pixels, more than {MAX_PIXELS} are refused")
        picture.load()
    except FileNotFoundError:
        raise ValueError(f"{path}: picture is missing") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot read the picture ({error}); fetch or render it again") from None
    return picture
