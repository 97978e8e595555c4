"""A captured room in one form, whatever files it came from. Readers fill it, nothing else knows their formats."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from PIL import Image

from roomplan_lib.geometry import OrientedBox

# The 17 categories of ARKitScenes 3DOD.
CATEGORIES = (
    "cabinet", "refrigerator", "shelf", "stove", "bed", "sink", "washer", "toilet", "bathtub",
    "oven", "dishwasher", "fireplace", "stool", "chair", "table", "tv_monitor", "sofa",
)  # fmt: skip
MAX_PIXELS = 50_000_000  # a larger picture in a scene folder is a mistake or an attack
PICTURE_FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # others only widen what a bad file can reach
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises for those
JPEG_SCALES = (8, 4, 2)  # parts of its sides at which libjpeg decodes a JPEG from fewer DCT coefficients
MISSING_DEPTH = 65535


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
    mesh_path: Path | None = None  # vertices in the scene's world, or in the frame of metadata["mesh_to_world"]
    colors: dict[str, str] = field(default_factory=dict)  # colour name by object_id, where a sidecar tells
    surfaces: list[Surface] = field(default_factory=list)  # walls, doors, windows, openings, floors, where known
    attributes: dict[str, dict] = field(default_factory=dict)  # by object_id: what the source says of a box besides
    metadata: dict = field(default_factory=dict)  # what the source says of the scene besides


def load_rgb(path: Path, quarter_turns: int = 0, at_least: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3] of a picture in one of PICTURE_FORMATS, turned counter-clockwise.

    at_least: the (width, height) of the turned picture that will do, for which a JPEG may be decoded smaller than it
    is (see `open_picture`). Raises ValueError that names the file.
    """
    if at_least and quarter_turns % 2:
        at_least = at_least[::-1]
    return np.rot90(np.asarray(open_picture(path, at_least=at_least).convert("RGB")), quarter_turns)


def load_depth(path: Path, quarter_turns: int = 0, scale: float = 1000.0) -> np.ndarray:
    """float32 [H, W] metres of a 16-bit PNG or PGM with `scale` units per metre; turned counter-clockwise.

    0 = missing; the largest number, which no depth camera reaches, is how some recordings (7-Scenes) say missing.
    Raises ValueError that names the file.
    """
    picture = open_picture(path)
    if picture.mode not in ("I;16", "I;16B", "I"):
        raise ValueError(f"{path}: expected a 16-bit depth image in millimetres, got mode {picture.mode}")
    stored = np.asarray(picture).astype(np.float32)
    stored[stored >= MISSING_DEPTH] = 0
    return np.rot90(stored / np.float32(scale), quarter_turns)


def open_picture(
    file: Path | BinaryIO, name: str = "", decode: bool = True, at_least: tuple[int, int] | None = None
) -> Image.Image:
    """The picture of a file, decoded unless told otherwise; nothing larger than MAX_PIXELS is decoded.

    name: what messages call it, the path when left out. at_least: a (width, height) that will do: a JPEG is decoded at
    the least of JPEG_SCALES that holds it, which costs a fraction of the time, other formats as they are. Raises
    ValueError for whatever is no good picture.
    """
    name = name or str(file)
    with picture_errors(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is stricter
            picture = Image.open(file, formats=PICTURE_FORMATS)
        fits = picture.width * picture.height <= MAX_PIXELS
        if fits and decode:
            if at_least:
                _reduce(picture, at_least)
            picture.load()
    if not fits:
        raise ValueError(f"{name}: {picture.width}x{picture.height} pixels, more than {MAX_PIXELS} are refused")
    return picture


def _reduce(picture: Image.Image, at_least: tuple[int, int]) -> None:
    """Tells a JPEG that is not decoded yet to come out smaller, by a scale that divides both of its sides: then its
    pixels cover the whole picture evenly, and a resize maps it as it would map the picture."""
    width, height = picture.size
    for scale in JPEG_SCALES:
        fits = width >= scale * at_least[0] and height >= scale * at_least[1]
        if fits and width % scale == height % scale == 0:
            picture.draft(None, (width // scale, height // scale))  # does nothing to other formats
            return


@contextmanager
def picture_errors(name: str) -> Iterator[None]:
    """Turns what Pillow raises for a missing or bad picture into one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{name}: picture is missing") from None
    except (*PICTURE_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot read the picture ({error}); fetch or render it again") from None


def picture_size(path: Path, quarter_turns: int = 0) -> tuple[int, int]:
    """(width, height) in pixels of the turned picture, from the header alone. Raises ValueError as `open_picture`."""
    with open_picture(path, decode=False) as picture:
        return picture.size[::-1] if quarter_turns % 2 else picture.size


def path_below(root: Path, relative: str) -> Path:
    """`root / relative` for a path that a file of others names.

    Raises ValueError for one that is absolute or climbs out of `root`.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\\" in relative or "\0" in relative or not parts.parts:
        raise ValueError(
            f"{relative!r:.99}: expected a path below {root}, without `..`, absolute starts or backslashes"
        )
    return Path(root) / parts


def open_scene(path: Path | str) -> Scene:
    """Read a scene in whatever layout lies at `path`, told by the names of the files (of JSON by its keys).

    A folder: one scene of ScanNet (scan or exported pictures) or of ARKitScenes, RGB-D pictures with poses (7-Scenes,
    3DMatch, Redwood, TUM), or plain pictures. A file: an Apple CapturedRoom (JSON), or a list of pictures (JSON, text).
    Raises ValueError for anything else, with what to do or what was looked for.
    """
    from roomplan_lib.scenes import arkitscenes, pictures, rgbd, scannet  # the readers import this package

    path = Path(path).absolute()
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if scannet.is_scene(path):
        return scannet.read_scene(path)
    if rgbd.layout_of(path):
        return rgbd.read_scene(path)
    for reader in (arkitscenes, scannet):
        found = reader.find_scenes(path)
        if found == [path]:
            return reader.read_scene(path)
        if found:
            raise ValueError(f"{path}: holds {len(found)} scenes; open one of them, such as {found[0]}")
    if pictures.find_pictures(path):
        return pictures.read_pictures(path)
    raise ValueError(
        f"{path}: no scene found. Looked for ScanNet (<id>.aggregation.json, <id>_vh_clean_2.ply, color/ and pose/, "
        "intrinsic.txt), ARKitScenes (lowres_wide, <id>_3dod_annotation.json), RGB-D pictures (frame-*.pose.txt, "
        "trajectory.log, groundtruth.txt) and plain pictures"
    )


def _open_file(path: Path) -> Scene:
    from roomplan_lib.scenes import pictures, roomplan, scannet
    from roomplan_lib.scenes.text import read_json

    suffix = path.suffix.lower()
    if suffix == ".sens":
        raise ValueError(scannet.export_first(path))
    if suffix == ".pkl":
        raise ValueError(f"{path}: infos of many scenes; read them with roomplan_lib.scenes.embodiedscan.read_infos")
    if suffix == ".json" and roomplan.is_captured_room(read_json(path)):
        return roomplan.read_captured_room(path)
    if suffix in (".json", ".txt"):
        return pictures.read_pictures(path)
    raise ValueError(f"{path}: expected a CapturedRoom (.json), a list of pictures (.json, .txt) or a scene's folder")
