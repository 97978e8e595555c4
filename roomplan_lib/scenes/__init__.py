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
    """One image, posed unless K and camera_to_world are None.

    K [3, 3] pixels, camera_to_world [4, 4] metres (OpenCV camera), width and height describe the picture as it is
    looked at: the stored one after `quarter_turns`.
    """

    view_id: str
    rgb_path: Path
    depth_path: Path | None
    K: np.ndarray | None
    camera_to_world: np.ndarray | None
    timestamp: float  # seconds
    width: int
    height: int
    quarter_turns: int = 0  # counter-clockwise turns by 90 degrees that set the stored picture upright
    depth_scale: float = 1000.0  # stored depth units per metre
    depth_K: np.ndarray | None = None  # [3, 3] pixels of the depth picture, where its camera is another

    @property
    def posed(self) -> bool:
        return self.K is not None and self.camera_to_world is not None

    def load_rgb(self) -> np.ndarray:
        """uint8 [H, W, 3], upright."""
        return load_rgb(self.rgb_path, self.quarter_turns)

    def load_depth(self) -> np.ndarray:
        """float32 [H, W] metres, 0 = missing, upright. Raises ValueError when this view has no depth."""
        if self.depth_path is None:
            raise ValueError(f"view {self.view_id} has no depth image beside {self.rgb_path}")
        return load_depth(self.depth_path, self.quarter_turns, self.depth_scale)


@dataclass(frozen=True, eq=False)
class Surface:
    """A flat part of a room.

    kind: wall, door, window, opening or floor. box: its rectangle, thickness often 0; the box axes run along the width,
    along the normal and up, extent [width, thickness, height] (a floor: two axes in its plane, the third up).
    """

    kind: str
    box: OrientedBox  # its object_id is the surface's own name
    parent_id: str = ""  # the wall that a door, window or opening lies in
    polygon: np.ndarray | None = None  # [N, 3] corners in metres, where the outline is no plain rectangle
    attributes: dict = field(default_factory=dict)  # what the source says besides: confidence, story, isOpen, ...


@dataclass(frozen=True, eq=False)
class Scene:
    """One captured room. World: metres, z up. `boxes` carry their category in `label`, `views` may be empty."""

    scene_id: str
    views: list[View]
    boxes: list[OrientedBox]
    source: str  # the reader: "arkitscenes", ...
    split: str = ""  # train, val, test or "" when the folder does not tell
    visit_id: str = ""  # scans of one visit show the same room
    mesh_path: Path | None = None
    colors: dict[str, str] = field(default_factory=dict)  # colour name by object_id, where a sidecar tells
    surfaces: list[Surface] = field(default_factory=list)  # walls, doors, windows, openings, floors, where known
    attributes: dict[str, dict] = field(default_factory=dict)  # by object_id: what the source says of a box besides
    metadata: dict = field(default_factory=dict)  # what the source says of the scene besides


def load_rgb(path: Path, quarter_turns: int = 0) -> np.ndarray:
    """uint8 [H, W, 3] of any picture Pillow reads, turned counter-clockwise. Raises ValueError that names the file."""
    return np.rot90(np.asarray(_open_picture(path).convert("RGB")), quarter_turns)


def load_depth(path: Path, quarter_turns: int = 0, scale: float = 1000.0) -> np.ndarray:
    """float32 [H, W] metres of a 16-bit PNG with `scale` units per metre, 0 = missing; turned counter-clockwise.

    Raises ValueError that names the file.
    """
    picture = _open_picture(path)
    if picture.mode not in ("I;16", "I"):
        raise ValueError(f"{path}: expected a 16-bit depth image in millimetres, got mode {picture.mode}")
    return np.rot90(np.asarray(picture).astype(np.float32) / np.float32(scale), quarter_turns)


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
