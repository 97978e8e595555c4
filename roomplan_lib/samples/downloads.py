"""A folder of downloads -> the data sets in it, each prepared by its own builder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from roomplan_lib.samples.annotated import prepare_annotations
from roomplan_lib.samples.annotations import AnnotationFile
from roomplan_lib.samples.grounding import read_multi3drefer, read_scan2cap, read_scanrefer
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.samples.scanqa import read_scanqa
from roomplan_lib.samples.sqa3d import read_sqa3d
from roomplan_lib.scenes import scannet
from roomplan_lib.scenes.arkitscenes import SPLIT_OF_FOLD

MAX_DEPTH = 5  # folders below the one that is searched
# Official names of annotation files, and what reads them.
ANNOTATION_FILES: tuple[tuple[str, str, Callable[[Path], AnnotationFile]], ...] = (
    ("scanqa", r"ScanQA_v1\.0_(train|val|test\w*)\.json", read_scanqa),
    (
        "sqa3d",
        r"v1_balanced_questions_(train|val|test)_scannetv2\.json",
        lambda path: read_sqa3d(path, path.with_name(path.name.replace("questions", "sqa_annotations"))),
    ),
    ("scanrefer", r"ScanRefer_filtered_(train|val)\.json", read_scanrefer),
    ("scan2cap", r"ScanRefer_filtered_(train|val)\.json", read_scan2cap),
    ("multi3drefer", r"multi3drefer_(train|val)\.json", read_multi3drefer),
)


@dataclass(frozen=True)
class Download:
    """One data set of one split found below a folder. split: "" for scenes of several."""

    dataset: str
    path: Path
    split: str = ""
    scans: Path | None = None  # the ScanNet scans that an annotation file is about, where they were found too


def find_downloads(raw: Path | str) -> list[Download]:
    """Everything below `raw` that a builder reads: ARKitScenes folders, and annotation files by their official names.

    Annotation files get the ScanNet scans that lie nearest to them, beside or below their folder or one above it.
    Raises ValueError when `raw` is no folder.
    """
    raw = Path(raw)
    if not raw.is_dir():
        raise ValueError(f"{raw}: no such folder; download or render scenes into it")
    found, scans = [], []
    for folder, files in _walk(raw):
        if any((folder / fold).is_dir() for fold in SPLIT_OF_FOLD):
            found.append(Download("arkitscenes", folder))
        if scannet.is_scene(folder) and folder.parent not in scans:
            scans.append(folder.parent)
        for dataset, name, _ in ANNOTATION_FILES:
            for file in sorted(file for file in files if re.fullmatch(name, file)):
                found.append(Download(dataset, folder / file, re.fullmatch(name, file)[1]))
    return [
        download
        if download.dataset == "arkitscenes"
        else Download(download.dataset, download.path, download.split, _nearest(download.path.parent, scans))
        for download in sorted(found, key=lambda item: (item.dataset, str(item.path)))
    ]


def prepare_downloads(
    raw: Path | str, output: Path | str, *, num_views: int = 8, seed: int = 0, workers: int | None = None
) -> list[Path]:
    """Prepare all of `find_downloads(raw)`; returns the JSONL files, `<output>/<folder of the scenes>/*.jsonl`.

    Annotation files whose scans are not there go to `<output>/without_views/`.

    num_views, seed, workers: as for each builder. Scans that an annotation file names and that are not there are left
    out and told. Raises ValueError when nothing is found, and as the builders do.
    """
    downloads, readers = find_downloads(raw), {(name, pattern): read for name, pattern, read in ANNOTATION_FILES}
    if not downloads:
        names = ", ".join(sorted({name for name, _, _ in ANNOTATION_FILES}))
        raise ValueError(
            f"{raw}: found no ARKitScenes folder (Training/, Validation/) and no annotation file of {names} under its "
            "official name"
        )
    files = []
    for download in downloads:
        if download.dataset == "arkitscenes":
            folder = Path(output) / download.path.absolute().name
            made = prepare_arkitscenes(download.path, folder, num_views=num_views, seed=seed, workers=workers)
            files += made.values()
            continue
        read = next(r for (name, _), r in readers.items() if name == download.dataset)
        folder = download.scans.parent.absolute().name if download.scans else "without_views"
        path = Path(output) / folder / f"{download.dataset}_{download.split}.jsonl"
        manifest = prepare_annotations(
            read(download.path), path, scans=download.scans, num_views=num_views, seed=seed, skip_missing=True,
            workers=workers,
        )  # fmt: skip
        pictures = "without pictures: no scans found" if download.scans is None else f"scans of {download.scans}"
        print(f"{path}: {manifest['num_samples']} records, {pictures}")
        files.append(path)
    return files


def _walk(raw: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `raw` down to MAX_DEPTH, but not inside scenes, with their files."""
    for folder, subfolders, files in os.walk(raw, followlinks=True):
        path = Path(folder)
        yield path, files
        inside = scannet.is_scene(path) or path.name in SPLIT_OF_FOLD or len(path.relative_to(raw).parts) >= MAX_DEPTH
        subfolders[:] = [] if inside else sorted(name for name in subfolders if not name.startswith("."))


def _nearest(folder: Path, scans: list[Path]) -> Path | None:
    """The folder of scans that shares the longest path with `folder`; one called scans before one of pictures."""

    def nearness(path: Path) -> tuple[int, bool]:
        return len(Path(os.path.commonpath([folder.absolute(), path.absolute()])).parts), path.name.startswith("scans")

    return max(scans, key=nearness, default=None)
