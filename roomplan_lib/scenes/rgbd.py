"""Readers of folders with posed RGB-D pictures, told apart by their files' names.

    exported        color/<f>.jpg depth/<f>.png pose/<f>.txt, intrinsic/intrinsic_{color,depth}.txt: ScanNet's exporter
    frames_25k      the same with intrinsics_{color,depth}.txt: scannet_frames_25k
    posed_images    <f>.jpg <f>.png <f>.txt, intrinsic.txt, depth_intrinsic.txt: EmbodiedScan and mmdetection3d
    frame_files     frame-<f>.color.jpg frame-<f>.depth.png frame-<f>.pose.txt: 7-Scenes; with camera-intrinsics.txt
                    here or one folder up: 3DMatch; with _info.txt: ScanNet's C++ exporter
    redwood         color|image|rgb/, depth/, trajectory.log or odometry.log, camera*.json: Open3D and Redwood
    tum             rgb.txt, depth.txt, groundtruth.txt, camera*.json (not in the download: TUM RGB-D lists its cameras)

All poses are camera_to_world (OpenCV camera, metres). Depth is uint16 millimetres, in TUM 5000 units a metre.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import resize_intrinsics
from roomplan_lib.scenes import Scene, View, path_below, picture_size
from roomplan_lib.scenes.text import (
    FETCH_AGAIN,
    check_intrinsics,
    check_rigid,
    numbers,
    read_intrinsics,
    read_json,
    read_text,
)

FRAME_RATE = 30  # pictures per second of the cameras behind these layouts; file names count pictures
# 7-Scenes comes without calibration; its page names this default camera of the depth sensor for 640x480 pixels.
SEVEN_SCENES_K = np.array([[585.0, 0, 320], [0, 585.0, 240], [0, 0, 1]])
SEVEN_SCENES_SIZE = (640, 480)
TUM_DEPTH_SCALE = 5000.0  # stored units per metre
TUM_TOLERANCE = 0.02  # seconds between picture, depth and pose that still belong together, as in the set's own tool
COLOR_DIRS = ("color", "image", "rgb")
COLOR_SUFFIXES = (".jpg", ".jpeg", ".png")
# Rotations that turn the named axis of a world up, to +z.
UP_ROTATIONS = {
    "+x": [[0, 0, -1], [0, 1, 0], [1, 0, 0]],
    "-x": [[0, 0, 1], [0, 1, 0], [-1, 0, 0]],
    "+y": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
    "-y": [[1, 0, 0], [0, 0, 1], [0, -1, 0]],
    "+z": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "-z": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
}


@dataclass(frozen=True, eq=False)
class _Frame:
    name: str
    rgb_path: Path
    depth_path: Path | None
    camera_to_world: np.ndarray  # [4, 4], not finite where unknown
    where: str  # file (and line) of the pose, for messages
    seconds: float


@dataclass(frozen=True, eq=False)
class _Recording:
    """A folder's frames; K is for pictures of `size`, the pictures' own where None."""

    frames: list[_Frame]
    K: np.ndarray
    depth_K: np.ndarray | None = None
    depth_scale: float = 1000.0
    size: tuple[int, int] | None = None
    num_unmatched: int = 0  # pictures that the list of poses leaves out
    has_depth: bool = True  # then a frame without depth misses a file
    notes: dict = field(default_factory=dict)  # for the scene's metadata


def layout_of(folder: Path | str) -> str:
    """The name of a folder's layout (see the module), "" when it has none of them."""
    folder = Path(folder)
    if not folder.is_dir():
        return ""
    if (folder / "color").is_dir() and (folder / "pose").is_dir():
        if (folder / "intrinsic" / "intrinsic_color.txt").is_file():
            return "exported"
        if (folder / "intrinsics_color.txt").is_file():
            return "frames_25k"
    if (folder / "intrinsic.txt").is_file():
        return "posed_images"
    if (folder / "groundtruth.txt").is_file() and (folder / "rgb.txt").is_file():
        return "tum"
    if _trajectory_path(folder) and _color_dir(folder):
        return "redwood"
    return "frame_files" if next(folder.glob("frame-*.pose.txt"), None) else ""


def read_scene(folder: Path | str, up: str | None = None) -> Scene:
    """Read a folder in one of the module's layouts as a scene without boxes.

    The worlds of 7-Scenes, 3DMatch and Redwood have no common up direction, and the scene's is z up: the world is
    turned by multiples of 90 degrees so that the axis `up` ("-y", ...), which is the one nearest to the pictures' mean
    upward direction when left out, becomes +z. The turn does not level a world whose first camera was tilted.
    metadata: up_axis and the notes of `read_views`.

    Raises ValueError that names the file for anything missing or malformed.
    """
    folder = Path(folder).absolute()
    if up is not None and up not in UP_ROTATIONS:
        raise ValueError(f"up: expected one of {', '.join(UP_ROTATIONS)}, got {up!r}")
    views, notes = read_views(folder)
    axis = up or _upward_axis(views)
    turn = np.eye(4)
    turn[:3, :3] = UP_ROTATIONS[axis]
    return Scene(
        scene_id=f"{folder.parent.name}_{folder.name}" if folder.name.startswith("seq-") else folder.name,
        views=[replace(view, camera_to_world=turn @ view.camera_to_world) for view in views],
        boxes=[],
        source="rgbd",
        metadata={**notes, "up_axis": axis},
    )


def read_views(folder: Path | str) -> tuple[list[View], dict]:
    """(views with valid poses in the folder's own world, notes).

    notes: layout; of the pictures dropped num_invalid_poses, num_without_pose and num_without_depth, whose depth file
    is missing; depth_intrinsics, where they are not the folder's own. Raises ValueError as `read_scene` does, and when
    more than half of the depth files are missing.
    """
    folder = Path(folder)
    layout = layout_of(folder)
    if not layout:
        raise ValueError(f"{folder}: no RGB-D pictures in a known layout ({', '.join(_RECORDINGS)})")
    recording = _RECORDINGS[layout](folder)
    missing = [frame for frame in recording.frames if recording.has_depth and frame.depth_path is None]
    if 2 * len(missing) > len(recording.frames):
        raise ValueError(
            f"{missing[0].rgb_path}: its depth picture is missing, like those of {len(missing)} of "
            f"{len(recording.frames)} pictures here; {FETCH_AGAIN}"
        )
    complete = [frame for frame in recording.frames if frame.depth_path is not None or not recording.has_depth]
    frames = [frame for frame in complete if np.isfinite(frame.camera_to_world).all()]
    if not frames:
        raise ValueError(
            f"{folder}: none of {len(recording.frames)} pictures has a valid pose; open the folder of the pictures "
            "itself to use them without poses"
        )
    size = picture_size(frames[0].rgb_path)
    K = recording.K if recording.size is None else resize_intrinsics(recording.K, recording.size, size)
    _check_size(K, size, frames[0].rgb_path)
    if recording.depth_K is not None and frames[0].depth_path is not None:
        _check_size(recording.depth_K, picture_size(frames[0].depth_path), frames[0].depth_path)
    views = [
        View(
            view_id=frame.name,
            rgb_path=frame.rgb_path,
            depth_path=frame.depth_path,
            K=K,
            camera_to_world=check_rigid(frame.camera_to_world, frame.where),
            timestamp=frame.seconds,
            width=size[0],
            height=size[1],
            depth_scale=recording.depth_scale,
            depth_K=recording.depth_K if frame.depth_path is not None else None,
        )
        for frame in frames
    ]
    notes = {
        "layout": layout,
        "num_invalid_poses": len(complete) - len(frames),
        "num_without_pose": recording.num_unmatched,
        "num_without_depth": len(missing),
        **recording.notes,
    }
    return views, notes


def _check_size(K: np.ndarray, size: tuple[int, int], path: Path) -> None:
    """A principal point far from the middle means that pictures were resized and their intrinsics were not."""
    if (np.abs(K[:2, 2] / size - 0.5) > 0.25).any():
        raise ValueError(
            f"{path}: the picture has {size[0]}x{size[1]} pixels, its intrinsics put the principal point at "
            f"{K[0, 2]:.1f}, {K[1, 2]:.1f}; export pictures and intrinsics of the same size"
        )


def _upward_axis(views: list[View]) -> str:
    upward = -np.mean([view.camera_to_world[:3, 1] for view in views], axis=0)
    axis = int(np.abs(upward).argmax())
    return ("+" if upward[axis] > 0 else "-") + "xyz"[axis]


# Layouts with a pose file for each picture ----------------------------------------------------------------------------


def _exported(folder: Path) -> _Recording:
    nested = (folder / "intrinsic").is_dir()
    prefix = folder / "intrinsic" / "intrinsic" if nested else folder / "intrinsics"
    pictures = _files(folder / "color", *COLOR_SUFFIXES)
    depths = _files(folder / "depth", ".png")
    return _Recording(
        _posed_frames(folder, pictures, depths, lambda name: folder / "pose" / f"{name}.txt"),
        read_intrinsics(Path(f"{prefix}_color.txt")),
        read_intrinsics(Path(f"{prefix}_depth.txt")) if depths is not None else None,
        has_depth=depths is not None,
    )


def _posed_images(folder: Path) -> _Recording:
    pictures = _files(folder, ".jpg", ".jpeg")
    depths = _files(folder, ".png") or None
    depth_K_path = folder / "depth_intrinsic.txt"
    own_camera = depths is not None and depth_K_path.is_file()
    return _Recording(
        _posed_frames(folder, pictures, depths, lambda name: folder / f"{name}.txt"),
        read_intrinsics(folder / "intrinsic.txt"),
        read_intrinsics(depth_K_path) if own_camera else None,
        has_depth=depths is not None,
        # ScanNet's depth is in line with its colour: there the scaled intrinsics differ by about a pixel.
        notes={} if own_camera or depths is None else {"depth_intrinsics": f"scaled: no {depth_K_path.name}"},
    )


def _frame_files(folder: Path) -> _Recording:
    def files(kind: str) -> dict[str, Path]:
        return {path.name.split(".")[0]: path for path in folder.glob(f"frame-*.{kind}.*") if path.name[0] != "."}

    depths = files("depth") or None
    frames = _posed_frames(folder, files("color"), depths, lambda name: folder / f"{name}.pose.txt")
    if (folder / "_info.txt").is_file():
        return replace(_with_info(frames, folder / "_info.txt"), has_depth=depths is not None)
    for path in (folder / "camera-intrinsics.txt", folder.parent / "camera-intrinsics.txt"):
        if path.is_file():
            return _Recording(frames, read_intrinsics(path), has_depth=depths is not None)
    size = picture_size(frames[0].rgb_path)
    if size != SEVEN_SCENES_SIZE:
        raise ValueError(
            f"{folder}: no camera-intrinsics.txt here or one folder up, and {size[0]}x{size[1]} pictures are not "
            "those of 7-Scenes, whose camera is known; write the file with the 3x3 matrix"
        )
    return _Recording(frames, SEVEN_SCENES_K, has_depth=depths is not None)


def _with_info(frames: list[_Frame], path: Path) -> _Recording:
    """Cameras and depth units from the header file of ScanNet's C++ exporter."""
    info = read_assignments(path)
    try:
        K, depth_K = (
            check_intrinsics(numbers(info[key], f"{path}: {key}", 16, "a 4x4 matrix"), f"{path}: {key}")
            for key in ("m_calibrationColorIntrinsic", "m_calibrationDepthIntrinsic")
        )
        (scale,) = numbers(info["m_depthShift"], f"{path}: m_depthShift", 1, "depth units per metre")
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing; {FETCH_AGAIN}") from None
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{path}: m_depthShift {scale}, expected a number above 0; {FETCH_AGAIN}")
    return _Recording(frames, K, depth_K, scale)


def read_assignments(path: Path) -> dict[str, str]:
    """Values by key of a file with lines `key = value`."""
    lines = (line.partition("=") for line in read_text(path).splitlines())
    return {key.strip(): value.strip() for key, sign, value in lines if sign}


def _files(folder: Path, *suffixes: str) -> dict[str, Path] | None:
    """Numbered files by stem; None where there is no such folder."""
    if not folder.is_dir():
        return None
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.stem.isdecimal()}


def _posed_frames(folder: Path, pictures: dict[str, Path], depths: dict[str, Path] | None, pose_path) -> list[_Frame]:
    """Frames in the order of their numbers; each picture must have its pose, a missing depth is None."""
    if not pictures:
        raise ValueError(f"{folder}: no pictures; {FETCH_AGAIN}")
    frames = []
    for name in sorted(pictures, key=_frame_number):
        path = pose_path(name)
        # Programs built with Microsoft's compiler write infinity and NaN like this.
        text = re.sub(r"1\.#(INF|IND|QNAN)\w*", lambda match: "inf" if match[1] == "INF" else "nan", read_text(path))
        pose = np.array(numbers(text, str(path), 16, "camera_to_world")).reshape(4, 4)
        depth_path = depths.get(name) if depths is not None else None
        frames.append(_Frame(name, pictures[name], depth_path, pose, str(path), _frame_number(name) / FRAME_RATE))
    return frames


def _frame_number(name: str) -> int:
    digits = name.removeprefix("frame-")
    if not digits.isdecimal():
        raise ValueError(f"{name!r}: expected a picture named by its number; move other pictures away")
    return int(digits)


# Layouts with one list of poses ---------------------------------------------------------------------------------------


def _redwood(folder: Path) -> _Recording:
    """Pose k of the log belongs to the picture that its header's first number counts, from 0."""
    path = _trajectory_path(folder)
    pairs = _redwood_pairs(folder)
    poses = {}
    rows = [line for line in read_text(path).splitlines() if line.strip()]
    for start in range(0, len(rows), 5):
        where = f"{path}: pose {start // 5}"
        index = numbers(rows[start], where, 3, "three frame numbers")[0]
        pose = numbers(" ".join(rows[start + 1 : start + 5]), where, 16, "camera_to_world")
        if index not in range(len(pairs)) or index in poses:
            raise ValueError(f"{where}: frame {index:g}, expected each of 0 to {len(pairs) - 1} at most once")
        poses[int(index)] = np.array(pose).reshape(4, 4)
    K, size = _camera(folder)
    frames = [
        _Frame(rgb.stem, rgb, depth, poses[index], f"{path}: frame {index}", index / FRAME_RATE)
        for index, (rgb, depth) in enumerate(pairs)
        if index in poses
    ]
    has_depth = (folder / "depth").is_dir()
    return _Recording(frames, K, size=size, num_unmatched=len(pairs) - len(frames), has_depth=has_depth)


def _trajectory_path(folder: Path) -> Path | None:
    paths = (folder / name for name in ("trajectory.log", "odometry.log"))
    return next((path for path in paths if path.is_file()), None)


def _color_dir(folder: Path) -> Path | None:
    return next((folder / name for name in COLOR_DIRS if (folder / name).is_dir()), None)


def _redwood_pairs(folder: Path) -> list[tuple[Path, Path | None]]:
    """(picture, depth or None) in order: the names' part before a "-" (then follows a time) is the same."""
    colors = sorted(path for path in _color_dir(folder).iterdir() if path.suffix.lower() in COLOR_SUFFIXES)
    if not (folder / "depth").is_dir():
        return [(path, None) for path in colors]
    depths = {path.stem.split("-")[0]: path for path in (folder / "depth").iterdir() if path.suffix.lower() == ".png"}
    return [(path, depths.get(path.stem.split("-")[0])) for path in colors]


def _camera(folder: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """(K [3, 3], (width, height)) of Open3D's camera file, whose matrix is stored column by column."""
    paths = sorted(folder.glob("camera*.json"))
    if len(paths) != 1:
        raise ValueError(
            f"{folder}: {len(paths)} files camera*.json, expected one with width, height and intrinsic_matrix "
            "(9 numbers, column by column), as Open3D writes it"
        )
    camera = read_json(paths[0])
    try:
        K = check_intrinsics(np.array(camera["intrinsic_matrix"], dtype=np.float64).reshape(3, 3).T, str(paths[0]))
        size = (int(camera["width"]), int(camera["height"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{paths[0]}: expected width, height and intrinsic_matrix ({error}); {FETCH_AGAIN}") from None
    if min(size) < 1:
        raise ValueError(f"{paths[0]}: expected a size above 0, got {size}; {FETCH_AGAIN}")
    return K, size


def _tum(folder: Path) -> _Recording:
    """The nearest depth and pose in time belong to a picture, if they are near enough."""
    pictures, depths = (_tum_list(folder / name) for name in ("rgb.txt", "depth.txt"))
    path = folder / "groundtruth.txt"
    rows = sorted(
        numbers(line, f"{path}:{number}", 8, "seconds tx ty tz qx qy qz qw") for number, line in _tum_lines(path)
    )
    times = np.array([row[0] for row in rows])
    K, size = _camera(folder)
    frames = []
    for seconds, rgb in pictures:
        depth, pose = _nearest([time for time, _ in depths], seconds), _nearest(times, seconds)
        if depth is None or pose is None:
            continue
        camera_to_world = np.eye(4)
        camera_to_world[:3, 3] = rows[pose][1:4]
        if not np.any(rows[pose][4:]):
            raise ValueError(f"{path}: pose at {times[pose]} s has the quaternion 0; {FETCH_AGAIN}")
        camera_to_world[:3, :3] = Rotation.from_quat(rows[pose][4:]).as_matrix()
        frames.append(_Frame(rgb.stem, rgb, depths[depth][1], camera_to_world, f"{path}: {times[pose]} s", seconds))
    return _Recording(frames, K, depth_scale=TUM_DEPTH_SCALE, size=size, num_unmatched=len(pictures) - len(frames))


def _tum_lines(path: Path) -> Iterable[tuple[int, str]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield number, line


def _tum_list(path: Path) -> list[tuple[float, Path]]:
    entries = []
    for number, line in _tum_lines(path):
        time, _, name = line.strip().partition(" ")
        try:
            entries.append((float(time), path_below(path.parent, name.strip())))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}; expected `seconds path`") from None
    return sorted(entries)


def _nearest(times, seconds: float) -> int | None:
    """Index of the nearest of ascending `times`, None when it is too far."""
    after = int(np.searchsorted(times, seconds))
    close = [i for i in (after - 1, after) if 0 <= i < len(times) and abs(times[i] - seconds) <= TUM_TOLERANCE]
    return min(close, key=lambda i: abs(times[i] - seconds), default=None)


_RECORDINGS = {
    "exported": _exported,
    "frames_25k": _exported,
    "posed_images": _posed_images,
    "frame_files": _frame_files,
    "redwood": _redwood,
    "tum": _tum,
}
