"""Reader of ARKitScenes (Apple, 2021), in the raw download's layout and in the 3DOD one.

    <root>/{Training,Validation}/<video_id>/                                        raw: lowres_wide lies here
    <root>/{Training,Validation}/<video_id>/<video_id>_frames/                      3DOD: lowres_wide lies there
        lowres_wide/<video_id>_<seconds>.png              RGB
        lowres_depth/<video_id>_<seconds>.png             uint16 millimetres, 0 = missing
        lowres_wide_intrinsics/<video_id>_<seconds>.pincam    width height fx fy cx cy
        lowres_wide.traj                                  seconds rx ry rz tx ty tz: world_to_camera, axis-angle
    <video_id>/<video_id>_3dod_annotation.json, _3dod_mesh.ply, and for rendered rooms _room.json
    <root>/{metadata,3dod_train_val_splits,raw_train_val_splits}.csv                video_id,visit_id,...,fold

The meaning of every field follows the data set's own tools (`threedod/benchmark_scripts` of apple/ARKitScenes).
"""

from __future__ import annotations

import csv
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import OrientedBox, invert_pose
from roomplan_lib.scenes import CATEGORIES, Scene, View

SPLIT_OF_FOLD = {"Training": "train", "Validation": "val"}
METADATA_FILES = ("metadata.csv", "3dod_train_val_splits.csv", "raw_train_val_splits.csv")
POSE_TOLERANCE_MS = 5  # a frame takes a pose at most this far away, as in the official loader
AXES_TOLERANCE = 1e-2  # rounding of box axes on disk that is mended; anything larger is a wrong file
FETCH_AGAIN = "fetch the scene again"


class SkippedSceneError(ValueError):
    """The annotators marked the scene as skipped: it has no trustworthy boxes."""


def find_scenes(root: Path | str) -> list[Path]:
    """Scene folders at or below `root` (at most four levels deep), sorted by path.

    Raises ValueError when `root` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one that holds ARKitScenes scenes")
    found: list[Path] = []
    folders = [(root, 0)]
    while folders:
        folder, level = folders.pop()
        if _is_scene(folder):
            found.append(folder)
        elif level < 4:
            folders += [(child, level + 1) for child in folder.iterdir() if child.is_dir() and child.name[0] != "."]
    return sorted(found)


def scene_membership(scene_dir: Path | str) -> tuple[str, str]:
    """(split, visit_id) of a scene, from its parent folder's name and the tables in the root; "" where none tells."""
    scene_dir = Path(scene_dir).absolute()
    split = SPLIT_OF_FOLD.get(scene_dir.parent.name, "")
    visit_id = ""
    for folder in (scene_dir.parent.parent, scene_dir.parent):
        for path in (folder / name for name in METADATA_FILES):
            if path.is_file() and (row := _read_table(path, path.stat().st_mtime_ns).get(scene_dir.name)):
                visit_id = visit_id or row[0]
                split = split or row[1]
    return split, visit_id


def read_scene(scene_dir: Path | str) -> Scene:
    """Read one scene folder; of the pictures only the header of the first is opened.

    Views are the frames that have a pose (poses come at 10 Hz, frames at up to 60 Hz), sorted by time. Boxes are the
    17 categories' `obbAligned`, with the annotation's `uid` as `object_id`. World: the scan's own, metres, z up.

    Raises SkippedSceneError for a scene marked as skipped, ValueError that names the file (and line) for anything
    missing, malformed or incomplete.
    """
    scene_dir = Path(scene_dir).absolute()
    if not scene_dir.is_dir():
        raise ValueError(f"{scene_dir}: no such scene folder")
    video_id = scene_dir.name
    boxes = _read_boxes(scene_dir / f"{video_id}_3dod_annotation.json")
    split, visit_id = scene_membership(scene_dir)
    mesh_path = scene_dir / f"{video_id}_3dod_mesh.ply"
    return Scene(
        scene_id=video_id,
        views=_read_views(frames_dir(scene_dir), video_id),
        boxes=boxes,
        source="arkitscenes",
        split=split,
        visit_id=visit_id,
        mesh_path=mesh_path if mesh_path.is_file() else None,
        colors=_read_colors(scene_dir / f"{video_id}_room.json"),
    )


def frames_dir(scene_dir: Path) -> Path:
    """The folder that holds `lowres_wide` and `lowres_wide.traj` in either layout."""
    nested = scene_dir / f"{scene_dir.name}_frames"
    return nested if nested.is_dir() else scene_dir


def _is_scene(folder: Path) -> bool:
    name = folder.name
    marks = (f"{name}_3dod_annotation.json", f"{name}_frames", "lowres_wide", "lowres_wide.traj")
    return any((folder / mark).exists() for mark in marks)


# Frames ---------------------------------------------------------------------------------------------------------------


def _read_views(frames: Path, video_id: str) -> list[View]:
    rgb = _list_frames(frames / "lowres_wide", video_id)
    pose_times, poses = _read_trajectory(frames / "lowres_wide.traj")
    posed = {name: index for name, ms in rgb.items() if (index := _match_pose(ms, pose_times)) is not None}
    if not posed:
        raise ValueError(
            f"{frames / 'lowres_wide'}: none of {len(rgb)} pictures has a pose within {POSE_TOLERANCE_MS} ms in "
            f"lowres_wide.traj ({len(pose_times)} poses); {FETCH_AGAIN}"
        )
    depth_dir = frames / "lowres_depth"
    has_depth = depth_dir.exists()
    if has_depth:
        depth = _list_frames(depth_dir, video_id)
        for name in sorted(posed.keys() - depth.keys()):
            raise ValueError(f"{depth_dir / name}: depth of a posed picture is missing; {FETCH_AGAIN}")
        for name in sorted(depth.keys() - rgb.keys()):
            if _match_pose(depth[name], pose_times) is not None:
                raise ValueError(f"{frames / 'lowres_wide' / name}: picture of a posed depth is missing; {FETCH_AGAIN}")
    _require_frames(frames, video_id, set(rgb.values()), pose_times)
    views = []
    for name, index in sorted(posed.items(), key=lambda item: rgb[item[0]]):
        K, width, height = _read_pincam(frames / "lowres_wide_intrinsics", video_id, rgb[name])
        views.append(
            View(
                view_id=Path(name).stem,
                rgb_path=frames / "lowres_wide" / name,
                depth_path=depth_dir / name if has_depth else None,
                K=K,
                camera_to_world=poses[index],
                timestamp=rgb[name] / 1000,
                width=width,
                height=height,
            )
        )
    try:
        with Image.open(views[0].rgb_path) as picture:
            size = picture.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{views[0].rgb_path}: cannot read the picture ({error}); {FETCH_AGAIN}") from None
    check_picture_size(views[0], size)
    return views


def check_picture_size(view: View, size: tuple[int, int]) -> None:
    """Raise ValueError when the stored picture's (width, height) is not the one that its intrinsics are for."""
    if size != (view.width, view.height):
        raise ValueError(
            f"{view.rgb_path}: the picture has {size[0]}x{size[1]} pixels, its .pincam is for "
            f"{view.width}x{view.height}; fetch pictures and intrinsics of the same size again"
        )


def _require_frames(frames: Path, video_id: str, times: set[int], pose_times: np.ndarray) -> None:
    """Raise ValueError for intrinsics that have a pose, but no picture within their clock's millisecond.

    times: milliseconds of the pictures. Catches frames of which picture and depth are both missing.
    """
    for ms in sorted(_list_frames(frames / "lowres_wide_intrinsics", video_id, ".pincam").values()):
        if not times & {ms - 1, ms, ms + 1} and _match_pose(ms, pose_times) is not None:
            path = frames / "lowres_wide" / f"{video_id}_{ms / 1000:.3f}.png"
            raise ValueError(f"{path}: picture of posed intrinsics is missing; {FETCH_AGAIN}")


def _list_frames(folder: Path, video_id: str, suffix: str = ".png") -> dict[str, int]:
    """Milliseconds by file name of the files `<video_id>_<seconds><suffix>` in a folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: folder is missing; {FETCH_AGAIN}")
    frames = {}
    for path in folder.iterdir():
        if path.suffix != suffix or path.name.startswith("."):
            continue
        owner, _, seconds = path.stem.rpartition("_")
        try:
            time = float(seconds)
        except ValueError:
            time = np.nan
        if owner != video_id or not np.isfinite(time):
            raise ValueError(f"{path}: expected the name {video_id}_<seconds>{suffix}; a file of another scene?")
        frames[path.name] = _milliseconds(time)
    return frames


def _milliseconds(seconds: float) -> int:
    return round(round(seconds, 3) * 1000)


def _read_trajectory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(times [N] int milliseconds, ascending; camera_to_world [N, 4, 4]) of a `.traj` file."""
    rows = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            row = _numbers(line, 7, f"{path}:{number}", "seconds rx ry rz tx ty tz")
            rows[_milliseconds(row[0])] = row[1:]  # the last of equal times counts, as in the official loader
    if not rows:
        raise ValueError(f"{path}: no pose; {FETCH_AGAIN}")
    times = np.array(sorted(rows))
    values = np.array([rows[time] for time in times])
    world_to_camera = np.tile(np.eye(4), (len(times), 1, 1))
    world_to_camera[:, :3, :3] = Rotation.from_rotvec(values[:, :3]).as_matrix()
    world_to_camera[:, :3, 3] = values[:, 3:]
    return times, invert_pose(world_to_camera)


def _match_pose(ms: int, pose_times: np.ndarray) -> int | None:
    """Index of the pose nearest in time, None when it is further than the tolerance (an exact match is nearest)."""
    after = int(np.searchsorted(pose_times, ms))
    near = min((i for i in (after - 1, after) if 0 <= i < len(pose_times)), key=lambda i: abs(pose_times[i] - ms))
    return near if abs(pose_times[near] - ms) <= POSE_TOLERANCE_MS else None


def _read_pincam(folder: Path, video_id: str, ms: int) -> tuple[np.ndarray, int, int]:
    """(K [3, 3], width, height); the file's time may differ from the picture's by one millisecond."""
    paths = [folder / f"{video_id}_{time / 1000:.3f}.pincam" for time in (ms, ms - 1, ms + 1)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{paths[0]}: intrinsics of a posed picture are missing; {FETCH_AGAIN}")
    width, height, fx, fy, cx, cy = _numbers(_read_text(path), 6, str(path), "width height fx fy cx cy")
    if width < 1 or height < 1 or width % 1 or height % 1 or fx <= 0 or fy <= 0:
        raise ValueError(f"{path}: expected a whole size and focal lengths above 0, got {_read_text(path).strip()!r}")
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]), int(width), int(height)


def _numbers(text: str, count: int, where: str, meaning: str) -> list[float]:
    try:
        values = [float(word) for word in text.split()]
    except ValueError:
        values = []
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{where}: expected {count} finite numbers ({meaning}), got {text.strip()[:120]!r}")
    return values


# Boxes and tables -----------------------------------------------------------------------------------------------------


def _read_boxes(path: Path) -> list[OrientedBox]:
    annotation = _read_json(path)
    if not isinstance(annotation, dict) or not isinstance(annotation.get("data"), list):
        raise ValueError(f"{path}: expected an object with the list `data`; {FETCH_AGAIN}")
    if annotation.get("skipped"):
        raise SkippedSceneError(f"{path}: the annotators skipped this scene (`skipped: true`); leave it out")
    boxes = []
    for index, item in enumerate(annotation["data"]):
        where = f"{path}: data[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("label"), str):
            raise ValueError(f"{where}: expected an object with a `label`; {FETCH_AGAIN}")
        label = item["label"].replace(" ", "_").replace("-", "_").replace("/", "_")
        if label in CATEGORIES:
            boxes.append(_read_box(item, label, where))
    ids = [box.object_id for box in boxes]
    for object_id in ids:
        if ids.count(object_id) > 1:
            raise ValueError(f"{path}: two boxes have the uid {object_id!r}; {FETCH_AGAIN}")
    return boxes


def _read_box(item: dict, label: str, where: str) -> OrientedBox:
    try:
        aligned = item["segments"]["obbAligned"]
        center, extent, axes = (
            np.array(aligned[key], dtype=np.float64) for key in ("centroid", "axesLengths", "normalizedAxes")
        )
        object_id = str(item["uid"] if item.get("uid") not in (None, "") else item["objectId"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} ({label}): needs uid or objectId and segments.obbAligned with centroid, axesLengths and "
            f"normalizedAxes ({type(error).__name__}: {error}); {FETCH_AGAIN}"
        ) from None
    if center.shape != (3,) or extent.shape != (3,) or axes.size != 9 or not np.isfinite([*center, *extent]).all():
        raise ValueError(f"{where} ({label}): centroid or axesLengths are not 3 finite numbers; {FETCH_AGAIN}")
    if (extent < 0).any():
        raise ValueError(f"{where} ({label}): axesLengths {extent.tolist()} below 0; {FETCH_AGAIN}")
    rotation = _box_rotation(axes.reshape(3, 3).T, f"{where} ({label})")  # rows on disk, columns here
    return OrientedBox(center, extent, rotation, label, object_id)


def _read_colors(path: Path) -> dict[str, str]:
    """Colour name by `uid` from the sidecar of a rendered room; empty without one, as for all real scans."""
    if not path.is_file():
        return {}
    room = _read_json(path)
    try:
        instances = room["instances"].values()
        return {str(instance["uid"]): str(instance["color"]) for instance in instances if instance["color"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected `instances` with uid and color ({error!r}); {FETCH_AGAIN}") from None


def _box_rotation(axes: np.ndarray, where: str) -> np.ndarray:
    """The rotation nearest to `axes` [3, 3]; a left-handed set gets its second axis turned, which is the same box."""
    if not np.isfinite(axes).all() or np.abs(axes.T @ axes - np.eye(3)).max() > AXES_TOLERANCE:
        raise ValueError(f"{where}: normalizedAxes {axes.T.ravel().tolist()} are not orthonormal; {FETCH_AGAIN}")
    u, _, vt = np.linalg.svd(axes)  # the polar factor u @ vt is the nearest orthogonal matrix (Higham 1986)
    rotation = u @ vt
    if np.linalg.det(rotation) < 0:
        rotation[:, 1] *= -1
    return rotation


@lru_cache(maxsize=8)
def _read_table(path: Path, modified_ns: int) -> dict[str, tuple[str, str]]:
    """(visit_id, split) by video_id. `modified_ns` only makes a changed file a new cache entry."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not {"video_id", "visit_id", "fold"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected the columns video_id, visit_id, fold, got {reader.fieldnames}")
        return {
            row["video_id"]: (_visit(row["visit_id"]), SPLIT_OF_FOLD.get((row["fold"] or "").strip(), ""))
            for row in reader
        }


def _visit(text: str | None) -> str:
    """Visit ids as text; eight scenes of the official tables have none and say NA."""
    text = (text or "").strip()
    return "" if text in ("NA", "nan") else text.removesuffix(".0")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing; {FETCH_AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the file ({error}); {FETCH_AGAIN}") from None


def _read_json(path: Path) -> object:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: invalid or truncated JSON ({error.msg}); {FETCH_AGAIN}") from None
