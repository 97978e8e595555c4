"""Reader of ARKitScenes (Apple, 2021), in the raw download's layout and in the 3DOD one.

    <root>/{Training,Validation}/<video_id>/                                        raw: lowres_wide lies here
    <root>/{Training,Validation}/<video_id>/<video_id>_frames/                      3DOD: lowres_wide lies there
        lowres_wide/<video_id>_<seconds>.png              RGB
        lowres_depth/<video_id>_<seconds>.png             uint16 millimetres, 0 = missing
        lowres_wide_intrinsics/<video_id>_<seconds>.pincam    width height fx fy cx cy
        lowres_wide.traj                                  seconds rx ry rz tx ty tz: world_to_camera, axis-angle
    <video_id>/<video_id>_3dod_annotation.json, _3dod_mesh.ply, and for rendered rooms _room.json
    <root>/{metadata,3dod_train_val_splits,raw_train_val_splits}.csv    video_id,visit_id[,sky_direction],fold

The meaning of every field follows the data set's own tools (`threedod/benchmark_scripts` of apple/ARKitScenes).
Pictures are stored as the sensor lay; the poses tell which way is up, so that views come upright.
"""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation, Slerp

from roomplan_lib.geometry import OrientedBox, invert_pose, turn_camera
from roomplan_lib.scenes import CATEGORIES, Scene, Surface, View, picture_size
from roomplan_lib.scenes.text import FETCH_AGAIN, read_json, read_text

SPLIT_OF_FOLD = {"Training": "train", "Validation": "val"}
METADATA_FILES = ("metadata.csv", "3dod_train_val_splits.csv", "raw_train_val_splits.csv")
POSE_TOLERANCE_MS = 5  # a frame takes a pose at most this far away, as in the official loader
MAX_POSE_GAP_MS = 250  # poses further apart (10 a second is usual) are not interpolated between
MAX_UNPAIRED = 0.5  # share of a raw scan's posed pictures that may lack depth or intrinsics
# Where world up points in the stored picture -> counter-clockwise quarter turns that set it upright.
TURNS_OF_SKY = {"Up": 0, "Right": 1, "Down": 2, "Left": 3}
SKY_AXES = {"Up": (0, -1), "Right": (1, 0), "Down": (0, 1), "Left": (-1, 0)}  # in the picture: x right, y down
MIN_SKY_LENGTH = 0.2  # a camera within 11 degrees of the vertical does not tell which side of its picture is up
AXES_TOLERANCE = 1e-2  # rounding of box axes on disk that is mended; anything larger is a wrong file


class SkippedSceneError(ValueError):
    """The annotators marked the scene as skipped: it has no trustworthy boxes."""


class TableRow(NamedTuple):
    """A scan in one of METADATA_FILES; "" where the table does not tell."""

    visit_id: str
    split: str
    sky_direction: str


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
    row = table_rows(scene_dir).get(scene_dir.name, TableRow("", "", ""))
    return SPLIT_OF_FOLD.get(scene_dir.parent.name, "") or row.split, row.visit_id


def table_rows(scene_dir: Path | str) -> dict[str, TableRow]:
    """What the tables in a scene's root say, by scene id; the earlier of METADATA_FILES counts first."""
    scene_dir = Path(scene_dir).absolute()
    paths = [folder / name for folder in (scene_dir.parent.parent, scene_dir.parent) for name in METADATA_FILES]
    return _merge_tables(tuple((path, path.stat().st_mtime_ns) for path in paths if path.is_file()))


def read_scene(scene_dir: Path | str, *, interpolate: bool = False) -> Scene:
    """Read one scene folder; of the pictures only the header of the first is opened.

    Views are the frames that have a pose, sorted by time: poses come at 10 Hz, frames at up to 60 Hz, and a frame takes
    the nearest pose within POSE_TOLERANCE_MS. interpolate: the other frames get a pose between their two neighbours
    (rotation on the great arc, position on the line), where those are at most MAX_POSE_GAP_MS apart. All views are
    turned by the quarter turns that set most of them upright, as the poses tell. `metadata` holds that `sky_direction`,
    what the data set's table says of it (`table_sky_direction`; a difference only warns, since the table is known to be
    wrong for hundreds of scans), the counts of `other_labels` and of `unpaired` pictures, which a raw scan may have.
    Boxes are the 17 categories' `obbAligned`, with the annotation's `uid` as `object_id`. Surfaces come from a rendered
    room's sidecar. World: the scan's own, metres, z up.

    Raises SkippedSceneError for a scene marked as skipped, ValueError that names the file (and line) for anything
    missing, malformed or incomplete.
    """
    scene_dir = Path(scene_dir).absolute()
    if not scene_dir.is_dir():
        raise ValueError(f"{scene_dir}: no such scene folder")
    video_id = scene_dir.name
    boxes, other_labels = _read_boxes(scene_dir / f"{video_id}_3dod_annotation.json")
    split, visit_id = scene_membership(scene_dir)
    mesh_path = scene_dir / f"{video_id}_3dod_mesh.ply"
    colors, surfaces = _read_sidecar(scene_dir / f"{video_id}_room.json")
    stored, unpaired = _read_views(frames_dir(scene_dir), video_id, interpolate)
    sky = sky_direction([view.camera_to_world for view in stored])
    row = table_rows(scene_dir).get(video_id)
    if row and row.sky_direction and row.sky_direction != sky:
        warnings.warn(
            f"{scene_dir}: the table says sky_direction {row.sky_direction}, the poses say {sky}, which is followed",
            stacklevel=2,
        )
    return Scene(
        scene_id=video_id,
        views=[turn_view(view, TURNS_OF_SKY[sky]) for view in stored],
        boxes=boxes,
        source="arkitscenes",
        split=split,
        visit_id=visit_id,
        mesh_path=mesh_path if mesh_path.is_file() else None,
        colors=colors,
        surfaces=surfaces,
        metadata={
            "sky_direction": sky,
            "table_sky_direction": row.sky_direction if row else "",
            "other_labels": other_labels,
            "unpaired": unpaired,
        },
    )


def sky_direction(poses: list[np.ndarray]) -> str:
    """The side of the stored pictures where the sky is, for most of the poses (camera_to_world [4, 4]): a TURNS_OF_SKY.

    The third row of a pose's rotation is world up in the camera; the side is the image axis nearest to it. Cameras that
    look almost straight up or down are not asked; "Up" where none is left, and in a tie.
    """
    up = np.array([pose[2, :2] for pose in poses]).reshape(-1, 2)
    up = up[np.linalg.norm(up, axis=1) >= MIN_SKY_LENGTH]
    votes = np.bincount((up @ np.array(list(SKY_AXES.values())).T).argmax(axis=1), minlength=len(SKY_AXES))
    return list(SKY_AXES)[int(votes.argmax())]


def turn_view(view: View, quarter_turns: int) -> View:
    """A view as stored -> the view turned counter-clockwise, its camera turned with it."""
    K, camera_to_world, (width, height) = turn_camera(
        view.K, view.camera_to_world, (view.width, view.height), quarter_turns
    )
    return replace(
        view, K=K, camera_to_world=camera_to_world, width=width, height=height, quarter_turns=quarter_turns % 4
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


def _read_views(frames: Path, video_id: str, interpolate: bool) -> tuple[list[View], int]:
    """(posed views as stored, sorted by time; number of posed pictures left out for want of depth or intrinsics)."""
    rgb = _list_frames(frames / "lowres_wide", video_id)
    pose_times, poses = _read_trajectory(frames / "lowres_wide.traj")
    posed = {name: poses[index] for name, ms in rgb.items() if (index := _match_pose(ms, pose_times)) is not None}
    if interpolate:
        posed |= _interpolated({name: ms for name, ms in rgb.items() if name not in posed}, pose_times, poses)
    if not posed:
        raise ValueError(
            f"{frames / 'lowres_wide'}: none of {len(rgb)} pictures has a pose within {POSE_TOLERANCE_MS} ms in "
            f"lowres_wide.traj ({len(pose_times)} poses); {FETCH_AGAIN}"
        )
    depth_dir = frames / "lowres_depth"
    has_depth = depth_dir.exists()
    depth = _list_frames(depth_dir, video_id) if has_depth else {}
    pincams = set(_list_frames(frames / "lowres_wide_intrinsics", video_id, ".pincam").values())
    paired = {
        name
        for name in posed
        if (not has_depth or name in depth) and pincams & {rgb[name] - 1, rgb[name], rgb[name] + 1}
    }
    unpaired = len(posed) - len(paired)
    if frames.name != f"{video_id}_frames":
        # Of the raw download Apple says that not every time has every picture; much missing is a broken download.
        if unpaired > MAX_UNPAIRED * len(posed):
            raise ValueError(
                f"{frames}: {unpaired} of {len(posed)} posed pictures have no depth or no intrinsics; {FETCH_AGAIN}"
            )
        posed = {name: pose for name, pose in posed.items() if name in paired}
    elif has_depth:
        for name in sorted(posed.keys() - depth.keys()):
            raise ValueError(f"{depth_dir / name}: depth of a posed picture is missing; {FETCH_AGAIN}")
        for name in sorted(depth.keys() - rgb.keys()):
            if _match_pose(depth[name], pose_times) is not None:
                raise ValueError(f"{frames / 'lowres_wide' / name}: picture of a posed depth is missing; {FETCH_AGAIN}")
    if frames.name == f"{video_id}_frames":
        _require_frames(frames, video_id, set(rgb.values()), pose_times, pincams)
    views = []
    for name in sorted(posed, key=rgb.get):
        K, width, height = _read_pincam(frames / "lowres_wide_intrinsics", video_id, rgb[name])
        views.append(
            View(
                view_id=Path(name).stem,
                rgb_path=frames / "lowres_wide" / name,
                depth_path=depth_dir / name if has_depth else None,
                K=K,
                camera_to_world=posed[name],
                timestamp=rgb[name] / 1000,
                width=width,
                height=height,
            )
        )
    check_picture_size(views[0], picture_size(views[0].rgb_path))
    return views, unpaired


def check_picture_size(view: View, size: tuple[int, int]) -> None:
    """Raise ValueError when the picture's (width, height), turned as the view is, is not the one of its intrinsics."""
    if size != (view.width, view.height):
        raise ValueError(
            f"{view.rgb_path}: the picture has {size[0]}x{size[1]} pixels, its .pincam is for "
            f"{view.width}x{view.height}; fetch pictures and intrinsics of the same size again"
        )


def _require_frames(
    frames: Path, video_id: str, times: set[int], pose_times: np.ndarray, pincam_times: set[int]
) -> None:
    """Raise ValueError for intrinsics that have a pose, but no picture within their clock's millisecond.

    times: milliseconds of the pictures. Catches frames of which picture and depth are both missing.
    """
    for ms in sorted(pincam_times):
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
    for number, line in enumerate(read_text(path).splitlines(), 1):
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


def _interpolated(frames: dict[str, int], pose_times: np.ndarray, poses: np.ndarray) -> dict[str, np.ndarray]:
    """camera_to_world by name for those of the frames (milliseconds by name) that lie between two near poses."""
    found = {}
    for name, ms in frames.items():
        after = int(np.searchsorted(pose_times, ms))
        if not 0 < after < len(pose_times):
            continue
        before_ms, after_ms = pose_times[after - 1 : after + 1]
        if after_ms - before_ms > MAX_POSE_GAP_MS:
            continue
        pair = poses[after - 1 : after + 1]
        share = (ms - before_ms) / (after_ms - before_ms)
        found[name] = np.eye(4)
        found[name][:3, :3] = Slerp([0, 1], Rotation.from_matrix(pair[:, :3, :3]))(share).as_matrix()
        found[name][:3, 3] = (1 - share) * pair[0, :3, 3] + share * pair[1, :3, 3]
    return found


def _read_pincam(folder: Path, video_id: str, ms: int) -> tuple[np.ndarray, int, int]:
    """(K [3, 3], width, height); the file's time may differ from the picture's by one millisecond."""
    paths = [folder / f"{video_id}_{time / 1000:.3f}.pincam" for time in (ms, ms - 1, ms + 1)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{paths[0]}: intrinsics of a posed picture are missing; {FETCH_AGAIN}")
    width, height, fx, fy, cx, cy = _numbers(read_text(path), 6, str(path), "width height fx fy cx cy")
    if width < 1 or height < 1 or width % 1 or height % 1 or fx <= 0 or fy <= 0:
        raise ValueError(f"{path}: expected a whole size and focal lengths above 0, got {read_text(path).strip()!r}")
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


def _read_boxes(path: Path) -> tuple[list[OrientedBox], dict[str, int]]:
    """(boxes of the 17 categories, counts of the labels that are none of them)."""
    annotation = read_json(path)
    if isinstance(annotation, dict) and annotation.get("skipped"):
        raise SkippedSceneError(f"{path}: the annotators skipped this scene (`skipped: true`); leave it out")
    if not isinstance(annotation, dict) or not isinstance(annotation.get("data"), list):
        raise ValueError(f"{path}: expected an object with the list `data`; {FETCH_AGAIN}")
    boxes, others = [], Counter()
    for index, item in enumerate(annotation["data"]):
        where = f"{path}: data[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("label"), str):
            raise ValueError(f"{where}: expected an object with a `label`; {FETCH_AGAIN}")
        label = item["label"].replace(" ", "_").replace("-", "_").replace("/", "_")
        if label in CATEGORIES:
            boxes.append(_read_box(item, label, where))
        else:
            others[label] += 1
    ids = [box.object_id for box in boxes]
    for object_id in ids:
        if ids.count(object_id) > 1:
            raise ValueError(f"{path}: two boxes have the uid {object_id!r}; {FETCH_AGAIN}")
    return boxes, dict(sorted(others.items()))


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


def _read_sidecar(path: Path) -> tuple[dict[str, str], list[Surface]]:
    """(colour name by `uid`, walls, doors, windows and floor) of a rendered room; empty for all real scans."""
    if not path.is_file():
        return {}, []
    room = read_json(path)
    try:
        instances = room["instances"].values()
        colors = {str(instance["uid"]): str(instance["color"]) for instance in instances if instance["color"]}
        return colors, _sidecar_surfaces(room) if "walls" in room else []
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: expected `instances` with uid and color ({error!r}); {FETCH_AGAIN}") from None


def _sidecar_surfaces(room: dict) -> list[Surface]:
    """Walls run counter-clockwise around the floor's polygon, so that their normals point into the room."""
    surfaces = []
    for wall in room["walls"]:
        start, end = np.array(wall["start"], dtype=np.float64), np.array(wall["end"], dtype=np.float64)
        length = np.linalg.norm(end - start)
        along, up = (end - start) / length, np.array([0.0, 0.0, 1.0])
        axes = np.stack([along, np.cross(up, along), up], axis=1)
        center = (start + end) / 2 + up * wall["height"] / 2
        name = str(wall["instance_id"])
        surfaces.append(Surface("wall", OrientedBox(center, [length, 0.0, wall["height"]], axes, "wall", name)))
    walls = list(surfaces)
    for kind in ("door", "window"):
        for entry in room[f"{kind}s"]:
            wall = walls[entry["wall"]].box
            extent = [entry["width"], 0.0, entry["height"]]
            box = OrientedBox(entry["center"], extent, wall.rotation, kind, str(entry["instance_id"]))
            surfaces.append(Surface(kind, box, parent_id=wall.object_id))
    polygon = np.array(room["polygon"], dtype=np.float64)
    axes = walls[0].box.rotation
    local = polygon @ axes
    low, high = local.min(axis=0), local.max(axis=0)
    floor = OrientedBox(axes @ (low + high) / 2, high - low, axes, "floor", str(room["floor_instance_id"]))
    return [*surfaces, Surface("floor", floor, polygon=polygon)]


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
def _merge_tables(tables: tuple[tuple[Path, int], ...]) -> dict[str, TableRow]:
    """The tables (path, time of change) as one; of each field the first value that is not empty."""
    merged: dict[str, TableRow] = {}
    for path, _ in tables:
        for video_id, row in read_table(path).items():
            known = merged.get(video_id, TableRow("", "", ""))
            merged[video_id] = TableRow(*(old or new for old, new in zip(known, row, strict=True)))
    return merged


def read_table(path: Path | str) -> dict[str, TableRow]:
    """The rows of one of METADATA_FILES by video_id. Raises ValueError when a column is missing."""
    reader = csv.DictReader(read_text(Path(path)).splitlines())
    if not {"video_id", "visit_id", "fold"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: expected the columns video_id, visit_id, fold, got {reader.fieldnames}")
    return {
        row["video_id"].strip(): TableRow(
            _visit(row["visit_id"]),
            SPLIT_OF_FOLD.get((row["fold"] or "").strip(), ""),
            sky if (sky := (row.get("sky_direction") or "").strip()) in TURNS_OF_SKY else "",
        )
        for row in reader
    }


def _visit(text: str | None) -> str:
    """Visit ids as text; eight scenes of the official tables have none and say NA."""
    text = (text or "").strip()
    return "" if text in ("NA", "nan") else text.removesuffix(".0")
