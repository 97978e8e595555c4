"""Scenes that are plain pictures, without poses, depth or annotation: a folder of them, or a list of their paths."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from PIL import Image

from roomplan_lib.scenes import Scene, View, open_picture, path_below, picture_errors
from roomplan_lib.scenes.text import read_json, read_text

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PICTURES = 100_000
EXIF_ORIENTATION = 0x0112
# Counter-clockwise quarter turns that set a picture upright, by its orientation tag; mirrored ones are no photographs.
TURNS = {3: 2, 6: 3, 8: 1}


def find_pictures(folder: Path) -> list[Path]:
    """The pictures that lie in a folder itself, numbers in their names counted as numbers."""
    paths = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    return sorted(paths, key=lambda path: _natural(path.name))


def read_pictures(path: Path | str) -> Scene:
    """A scene of unposed views, in the order of the list or of the names; only the pictures' headers are read.

    path: a folder; a JSON file with a list of paths, or an object with such a list as `images`; a text file with a
    path per line. Paths are relative to the file's folder. Orientation tags of cameras become `quarter_turns`,
    `timestamp` counts the pictures, `view_id` is the path as listed.
    Raises ValueError for no pictures, one twice, a path that climbs out of the folder, and no good picture.
    """
    path = Path(path).absolute()
    if path.is_dir():
        root, names = path, [picture.name for picture in find_pictures(path)]
    else:
        root, names = path.parent, _read_list(path)
    if not 0 < len(names) <= MAX_PICTURES:
        raise ValueError(f"{path}: {len(names)} pictures, expected 1 to {MAX_PICTURES} ({', '.join(SUFFIXES)})")
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise ValueError(f"{path}: the picture {name} is listed {times} times; list it once")
    try:
        paths = [path_below(root, name) for name in names]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    views = [_read_view(picture, name, index) for index, (picture, name) in enumerate(zip(paths, names, strict=True))]
    return Scene(scene_id=path.stem if path.is_file() else path.name, views=views, boxes=[], source="pictures")


def _read_list(path: Path) -> list[str]:
    if path.suffix.lower() != ".json":
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    data = read_json(path)
    names = data.get("images") if isinstance(data, dict) else data
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"{path}: expected a list of paths, or an object with the list `images`")
    return names


def _read_view(path: Path, name: str, index: int) -> View:
    with open_picture(path, decode=False) as picture, picture_errors(str(path)):
        exif = Image.Exif()  # not the picture's own method, which decodes a PNG to its end
        exif.load(picture.info.get("exif", b""))
        turns = TURNS.get(exif.get(EXIF_ORIENTATION), 0)
        size = picture.size[::-1] if turns % 2 else picture.size
    return View(
        view_id=name,
        rgb_path=path,
        depth_path=None,
        K=None,
        camera_to_world=None,
        timestamp=float(index),
        width=size[0],
        height=size[1],
        quarter_turns=turns,
    )


def _natural(name: str) -> list:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]
