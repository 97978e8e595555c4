"""Reader of ScanNet (Dai et al., 2017), from the scan folders and any of the usual exports of its pictures.

    <root>/scans|scans_test/<id>/
        <id>.txt                                `key = value`: axisAlignment (16 numbers, row by row), sceneType, ...
        <id>_vh_clean_2.ply                     mesh, metres, not axis-aligned
        <id>_vh_clean_2.0.010000.segs.json      segment of each vertex
        <id>.aggregation.json                   segments of each object, with its label
        <id>.sens                               the recording; `export_sens` makes pictures of it
    <root>/posed_images/<id>/, <root>/scannet_frames_25k/<id>/, ...     pictures in a layout of `scenes.rgbd`
    scannetv2_{train,val,test}.txt              official lists of scans; scannetv2-labels.combined.tsv: classes

The scene's world is the axis-aligned one, in which the benchmarks' boxes are. Scans of the test set come without an
alignment, their world is the mesh's own. `<id>` is scene<room>_<scan>; scans of one room are one visit.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from roomplan_lib.geometry import OrientedBox
from roomplan_lib.scenes import Scene, rgbd
from roomplan_lib.scenes.ply import read_vertices, vertex_positions
from roomplan_lib.scenes.sens import export_sens, read_sens, write_sens
from roomplan_lib.scenes.text import FETCH_AGAIN, check_rigid, numbers, read_json, read_text

__all__ = [
    "CATEGORY_OF_LABEL", "export_first", "export_sens", "find_scenes", "is_scene", "mesh_center", "read_axis_alignment",
    "read_scene", "read_sens", "scene_split", "write_sens",
]  # fmt: skip

SCAN_FOLDERS = ("scans", "scans_test")
PICTURE_FOLDERS = ("posed_images", "scannet_frames_25k")  # looked at before other folders beside the scans
SPLITS = ("train", "val", "test")
LABELS_FILE = "scannetv2-labels.combined.tsv"
# ScanNet's own words for the 17 categories of ARKitScenes, where there is no doubt.
CATEGORY_OF_LABEL = {
    "cabinet": "cabinet", "kitchen cabinet": "cabinet", "bathroom cabinet": "cabinet", "file cabinet": "cabinet",
    "wardrobe": "cabinet", "wardrobe cabinet": "cabinet", "dresser": "cabinet", "cupboard": "cabinet",
    "refrigerator": "refrigerator", "mini fridge": "refrigerator", "fridge": "refrigerator",
    "shelf": "shelf", "bookshelf": "shelf", "shelves": "shelf", "bookshelves": "shelf",
    "stove": "stove", "bed": "bed", "bunk bed": "bed", "sink": "sink", "washing machine": "washer",
    "toilet": "toilet", "bathtub": "bathtub", "oven": "oven",
    "dishwasher": "dishwasher", "fireplace": "fireplace", "stool": "stool", "bar stool": "stool", "chair": "chair",
    "office chair": "chair", "armchair": "chair", "table": "table", "coffee table": "table", "end table": "table",
    "dining table": "table", "side table": "table", "desk": "table", "tv": "tv_monitor", "monitor": "tv_monitor",
    "television": "tv_monitor", "couch": "sofa", "sofa": "sofa", "loveseat": "sofa",
}  # fmt: skip


def find_scenes(root: Path | str) -> list[Path]:
    """One folder per scene at or below `root` (at most four levels deep), sorted by scene id.

    A scan folder where there is one, else a folder of exported pictures. Raises ValueError when `root` is no folder.
    """
    root = Path(root).absolute()
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; expected one that holds ScanNet scenes")
    found: dict[str, Path] = {}
    folders = [(root, 0)]
    while folders:
        folder, level = folders.pop()
        if is_scene(folder):
            if folder.name not in found or (_is_scan(folder) and not _is_scan(found[folder.name])):
                found[folder.name] = folder
        elif level < 4:
            folders += [(child, level + 1) for child in _subfolders(folder)]
    return [found[name] for name in sorted(found)]


def is_scene(folder: Path) -> bool:
    """Whether a folder is a scan, or exported pictures under a scan's name."""
    return _is_scan(folder) or (folder.name.startswith("scene") and bool(rgbd.layout_of(folder)))


def read_scene(
    scene_dir: Path | str, images_dir: Path | str | None = None, lists_dir: Path | str | None = None
) -> Scene:
    """Read one scene from its scan folder or from a folder of its exported pictures; the other is found beside it.

    scene_dir: `<root>/scans/<id>` or, for instance, `<root>/posed_images/<id>`. images_dir: the pictures, looked for
    in the scan folder and in `<root>/*/<id>` when left out. lists_dir: folder of the official lists of scans and of the
    table of labels, looked for in the folders above the scene when left out.

    Views are the pictures with a valid pose, sorted by number; none when the scan has no pictures. Boxes are the
    axis-aligned bounding boxes of the objects' vertices in the aligned world, as the benchmarks have them, with
    ScanNet's own label and its `objectId` as `object_id`. attributes: `category` (of the 17, where the label tells) and
    `nyu40` (with the table of labels). metadata: `axis_alignment` [4][4] (mesh world to scene world; None when the
    scan says nothing), `mesh_to_world` likewise, `scene_type`, the notes of `rgbd.read_views`, `num_empty_objects`,
    and `no_views`, how to export a recording (`.sens`) that no pictures have been made of.

    Raises ValueError that names the file for anything missing or malformed.
    """
    scene_dir = Path(scene_dir).absolute()
    if not scene_dir.is_dir():
        raise ValueError(f"{scene_dir}: no such scene folder")
    scene_id = scene_dir.name
    scan_dir = _scan_dir(scene_dir)
    images_dir = _images_dir(scene_dir) if images_dir is None else Path(images_dir).absolute()
    if images_dir is None and scan_dir is None:
        raise ValueError(f"{scene_dir}: neither a ScanNet scan nor its exported pictures; {FETCH_AGAIN}")
    info, alignment = _read_info(scan_dir) if scan_dir and _needs_info(scan_dir) else ({}, None)
    to_world = np.eye(4) if alignment is None else alignment
    views, notes = rgbd.read_views(images_dir) if images_dir else ([], {})
    if images_dir is None and (scan_dir / f"{scene_id}.sens").is_file():
        notes["no_views"] = export_first(scan_dir / f"{scene_id}.sens")
    tables = Path(lists_dir).absolute() if lists_dir is not None else None
    boxes, num_empty = _read_boxes(scan_dir, to_world) if scan_dir else ([], 0)
    mesh_path = _mesh_path(scan_dir) if scan_dir else None
    return Scene(
        scene_id=scene_id,
        views=[replace(view, camera_to_world=to_world @ view.camera_to_world) for view in views],
        boxes=boxes,
        source="scannet",
        split=scene_split(scene_dir, tables),
        visit_id=scene_id.rpartition("_")[0],
        mesh_path=mesh_path,
        attributes=_attributes(boxes, _find_table(scene_dir, LABELS_FILE, tables)),
        metadata={
            **notes,
            "axis_alignment": None if alignment is None else alignment.tolist(),
            "mesh_to_world": to_world.tolist(),
            "scene_type": info.get("sceneType", ""),
            "num_empty_objects": num_empty,
        },
    )


def read_axis_alignment(scene_dir: Path | str) -> np.ndarray:
    """[4, 4] from the mesh's world to the aligned one, identity for a scan (of the test set) that names none.

    scene_dir: as in `read_scene`. Raises ValueError when `<id>.txt` is missing or malformed.
    """
    scene_dir = Path(scene_dir).absolute()
    alignment = _read_info(_scan_dir(scene_dir) or scene_dir)[1]
    return np.eye(4) if alignment is None else alignment


def mesh_center(scene_dir: Path | str) -> np.ndarray | None:
    """[3] metres: middle of the bounding box of the mesh's vertices in the mesh's own world; None without a mesh.

    SQA3D counts its positions from there. scene_dir: as in `read_scene`.
    """
    scan_dir = _scan_dir(Path(scene_dir).absolute())
    path = _mesh_path(scan_dir) if scan_dir else None
    if path is None:
        return None
    points = _mesh_points(path)
    return (points.min(0) + points.max(0)) / 2


def scene_split(scene_dir: Path | str, lists_dir: Path | None = None) -> str:
    """train, val or test from the official lists (see `read_scene`) or from the folder `scans_test`, else "".

    Raises ValueError for a scan that two lists name.
    """
    scene_dir = Path(scene_dir).absolute()
    splits = []
    for split in SPLITS:
        path = _find_table(scene_dir, f"scannetv2_{split}.txt", lists_dir)
        if path is not None and scene_dir.name in _read_list(path, path.stat().st_mtime_ns):
            splits.append(split)
    if len(splits) > 1:
        raise ValueError(f"{scene_dir.name}: in the lists of {' and '.join(splits)}; fetch ScanNet's lists again")
    return splits[0] if splits else "test" if scene_dir.parent.name == "scans_test" else ""


def export_first(path: Path) -> str:
    """What to tell somebody who wants the pictures of a `.sens` file."""
    return (
        f"{path}: a recording must be exported to pictures first: "
        f"`roomplan prepare sens --scans {path.parent} --every 10`"
    )


# Folders --------------------------------------------------------------------------------------------------------------


def _is_scan(folder: Path) -> bool:
    endings = (".aggregation.json", "_vh_clean_2.ply", ".sens", ".txt")[: 4 if folder.name.startswith("scene") else 3]
    return any((folder / f"{folder.name}{ending}").is_file() for ending in endings)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")


def _scan_dir(scene_dir: Path) -> Path | None:
    if _is_scan(scene_dir):
        return scene_dir
    folders = (scene_dir.parent.parent / name / scene_dir.name for name in SCAN_FOLDERS)
    return next((folder for folder in folders if _is_scan(folder)), None)


def _images_dir(scene_dir: Path) -> Path | None:
    """The folder itself, else the scene's folder in one of the folders beside its parent."""
    root = scene_dir.parent.parent
    if rgbd.layout_of(scene_dir):
        return scene_dir
    known = [root / name for name in PICTURE_FOLDERS]
    others = [folder for folder in _subfolders(root) if folder not in known] if _is_scan(scene_dir) else []
    folders = (folder / scene_dir.name for folder in known + others)
    return next((folder for folder in folders if rgbd.layout_of(folder)), None)


def _find_table(scene_dir: Path, name: str, lists_dir: Path | None) -> Path | None:
    """A file of the whole data set: in `lists_dir`, else in the three folders above the scene or one folder below."""
    if lists_dir is not None:
        return lists_dir / name if (lists_dir / name).is_file() else None
    for folder in list(scene_dir.parents)[:3]:
        if (folder / name).is_file():
            return folder / name
        for below in ("meta_data", "metadata", "splits"):
            if (folder / below / name).is_file():
                return folder / below / name
    return None


@lru_cache(maxsize=8)
def _read_list(path: Path, modified_ns: int) -> frozenset[str]:
    """`modified_ns` only makes a changed file a new cache entry."""
    return frozenset(read_text(path).split())


@lru_cache(maxsize=2)
def _read_labels(path: Path, modified_ns: int) -> dict[str, str]:
    """Name of the NYU40 class by ScanNet's own label."""
    rows = csv.DictReader(read_text(path).splitlines(), delimiter="\t")
    if not {"raw_category", "nyu40class"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path}: expected the columns raw_category and nyu40class, got {rows.fieldnames}")
    return {row["raw_category"]: row["nyu40class"] or "" for row in rows}


# Annotation -----------------------------------------------------------------------------------------------------------


def _read_info(scan_dir: Path) -> tuple[dict[str, str], np.ndarray | None]:
    """(values by key of `<id>.txt`, axis alignment [4, 4] or None)."""
    path = scan_dir / f"{scan_dir.name}.txt"
    info = rgbd.read_assignments(path)
    if "axisAlignment" not in info:
        return info, None
    where = f"{path}: axisAlignment"
    return info, check_rigid(np.array(numbers(info["axisAlignment"], where, 16, "a 4x4 matrix")), where)


def _needs_info(scan_dir: Path) -> bool:
    """Whether the scan has `<id>.txt`, or should: objects without it would be in another world than the benchmarks'."""
    return any((scan_dir / f"{scan_dir.name}{ending}").is_file() for ending in (".txt", ".aggregation.json"))


def _mesh_path(scan_dir: Path) -> Path | None:
    path = scan_dir / f"{scan_dir.name}_vh_clean_2.ply"
    return path if path.is_file() else None


def _mesh_points(path: Path) -> np.ndarray:
    points = vertex_positions(read_vertices(path))
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: vertices with infinite numbers or NaN; {FETCH_AGAIN}")
    return points


def _read_boxes(scan_dir: Path, to_world: np.ndarray) -> tuple[list[OrientedBox], int]:
    """(boxes in the aligned world, number of objects without a vertex); none of either without an annotation."""
    path = scan_dir / f"{scan_dir.name}.aggregation.json"
    if not path.is_file():
        return [], 0
    segments_path = scan_dir / f"{scan_dir.name}_vh_clean_2.0.010000.segs.json"
    segment_of_vertex = _segment_of_vertex(segments_path)
    mesh_path = scan_dir / f"{scan_dir.name}_vh_clean_2.ply"
    points = _mesh_points(mesh_path) @ to_world[:3, :3].T + to_world[:3, 3]
    if len(points) != len(segment_of_vertex):
        raise ValueError(
            f"{segments_path}: segments of {len(segment_of_vertex)} vertices, the mesh has {len(points)}; {FETCH_AGAIN}"
        )
    segments, vertex_segment = np.unique(segment_of_vertex, return_inverse=True)
    position = {segment: k for k, segment in enumerate(segments.tolist())}
    groups = list(_groups(path))
    owner = np.full(len(segments), -1)
    for number, (_, _, members) in enumerate(groups):
        for segment in members:
            if segment not in position:
                raise ValueError(f"{path}: segGroups[{number}]: segment {segment} is not in {segments_path.name}")
            owner[position[segment]] = number  # of two objects the later one, as when the benchmarks are prepared
    owner = owner[vertex_segment]
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(groups) + 1))
    boxes = []
    for (object_id, label, _), start, stop in zip(groups, starts[:-1], starts[1:], strict=True):
        if start < stop:
            part = points[order[start:stop]]
            low, high = part.min(0), part.max(0)
            boxes.append(OrientedBox((low + high) / 2, high - low, label=label, object_id=str(object_id)))
    return boxes, len(groups) - len(boxes)


def _segment_of_vertex(path: Path) -> np.ndarray:
    data = read_json(path)
    segments = data.get("segIndices") if isinstance(data, dict) else None
    if not isinstance(segments, list) or not segments or not all(type(segment) is int for segment in segments):
        raise ValueError(f"{path}: expected the list `segIndices` with a whole number for each vertex; {FETCH_AGAIN}")
    return np.array(segments)


def _groups(path: Path) -> Iterator[tuple[int, str, list[int]]]:
    """(objectId, label, segments) of each object."""
    data = read_json(path)
    groups = data.get("segGroups") if isinstance(data, dict) else None
    if not isinstance(groups, list):
        raise ValueError(f"{path}: expected the list `segGroups`; {FETCH_AGAIN}")
    seen = set()
    for number, group in enumerate(groups):
        where = f"{path}: segGroups[{number}]"
        try:
            object_id, label, members = group["objectId"], group["label"], group["segments"]
        except (TypeError, KeyError):
            raise ValueError(f"{where}: expected objectId, label and segments; {FETCH_AGAIN}") from None
        if type(object_id) is not int or not isinstance(label, str) or not isinstance(members, list):
            raise ValueError(f"{where}: expected objectId as a whole number, label as text, segments as a list")
        if not all(type(segment) is int for segment in members):
            raise ValueError(f"{where}: segments are not whole numbers; {FETCH_AGAIN}")
        if object_id in seen:
            raise ValueError(f"{where}: two objects have the objectId {object_id}; {FETCH_AGAIN}")
        seen.add(object_id)
        yield object_id, label, members


def _attributes(boxes: list[OrientedBox], labels_path: Path | None) -> dict[str, dict]:
    labels = _read_labels(labels_path, labels_path.stat().st_mtime_ns) if labels_path else {}
    attributes = {}
    for box in boxes:
        category = CATEGORY_OF_LABEL.get(box.label) or CATEGORY_OF_LABEL.get(box.label.removesuffix("s"))
        told = {"category": category, "nyu40": labels.get(box.label)}
        attributes[box.object_id] = {key: value for key, value in told.items() if value}
    return {object_id: told for object_id, told in attributes.items() if told}
