"""Fetching data sets: Apple's published steps for ARKitScenes, and the way to the licences of the others.

A file has its final name only when it is whole. What has arrived is kept as `<name>.part` (with `<name>.part.tag`, the
server's name for this version of the file), and the next run goes on from there. Archives are unpacked beside their
place and renamed. Standard library only.
"""

from __future__ import annotations

import csv
import http.client
import re
import shlex
import shutil
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from roomplan_lib.files import write_whole
from roomplan_lib.scenes.arkitscenes import SPLIT_OF_FOLD
from roomplan_lib.scenes.text import read_text

ARKITSCENES_URL = "https://docs-assets.developer.apple.com/ml-research/datasets/arkitscenes/v1"
ARKITSCENES_LICENCE = "https://github.com/apple/ARKitScenes/blob/main/LICENSE"
FOLDS = tuple(SPLIT_OF_FOLD)
FOLDER_ON_SERVER = {"raw": "raw", "3dod": "threedod"}
# The assets of the raw data set and their file names; "highres_depth" is there only for scans with `is_in_upsampling`.
ZIPPED_ASSETS = (
    "confidence", "highres_depth", "lowres_depth", "lowres_wide", "lowres_wide_intrinsics", "ultrawide",
    "ultrawide_intrinsics", "vga_wide", "vga_wide_intrinsics",
)  # fmt: skip
ASSET_FILES = {
    "mov": "{id}.mov", "annotation": "{id}_3dod_annotation.json", "mesh": "{id}_3dod_mesh.ply",
    "lowres_wide.traj": "lowres_wide.traj", **{name: f"{name}.zip" for name in ZIPPED_ASSETS},
}  # fmt: skip
DEFAULT_ASSETS = ("annotation", "lowres_depth", "lowres_wide", "lowres_wide.traj", "lowres_wide_intrinsics", "mesh")
# Apple's list of raw scans that have no annotation, mesh and trajectory.
BARE_SCANS = frozenset("""
    47334522 47334523 42897421 45261582 47333152 47333155 48458535 48018733 47429677 48458541 42897848 47895482
    47333960 47430089 42899148 42897612 42899153 42446164 48018149 47332198 47334515 45663223 45663226 45663227
""".split())  # fmt: skip
CHUNK = 2**20
TIMEOUT = 60  # seconds without a byte
MAX_TRIES = 5  # one after another that bring nothing
MAX_WAIT = 60.0  # seconds between two tries
MAX_RATIO = 200  # of unpacked to packed size; text of numbers reaches about 10, pictures 1
MAX_UNPACKED = 200 * 2**30  # bytes of one archive
AGAIN = "run the same command again, it goes on where it stopped"

SCANNET = """\
ScanNet (Dai et al., CVPR 2017), about 1.3 TB with all recordings.
Licence: fill in the terms of use at http://kaldir.vc.in.tum.de/scannet/ScanNet_TOS.pdf with your institutional address,
  send them to scannet@googlegroups.com, and you are sent the link to download-scannet.py.
Then, in {output}:
  python download-scannet.py -o . --type .txt
  python download-scannet.py -o . --type _vh_clean_2.ply
  python download-scannet.py -o . --type .aggregation.json
  python download-scannet.py -o . --type _vh_clean_2.0.010000.segs.json
  python download-scannet.py -o . --type .sens          (or pictures that were exported already, see below)
  python download-scannet.py -o . --label_map           (scannetv2-labels.combined.tsv)
  and the lists of splits from https://github.com/ScanNet/ScanNet/tree/master/Tasks/Benchmark
Expected:
  {output}/
    scans/scene0000_00/scene0000_00.txt
    scans/scene0000_00/scene0000_00_vh_clean_2.ply
    scans/scene0000_00/scene0000_00.aggregation.json
    scans/scene0000_00/scene0000_00_vh_clean_2.0.010000.segs.json
    scans/scene0000_00/scene0000_00.sens
    posed_images/scene0000_00/00000.{{jpg,png,txt}}, intrinsic.txt          (instead of .sens)
    scannetv2_{{train,val,test}}.txt
Then: roomplan prepare scanqa|sqa3d|scanrefer|... --scans {output}/scans ..."""

SCANQA = """\
ScanQA (Azuma et al., CVPR 2022), questions about ScanNet; the scans come with `roomplan download scannet`.
Licence: CC BY-NC-SA 3.0, and ScanNet's terms of use. Follow the link to the data set in
  https://github.com/ATR-DBI/ScanQA/blob/main/docs/dataset.md
Expected:
  {output}/ScanQA_v1.0_train.json
  {output}/ScanQA_v1.0_val.json
  {output}/ScanQA_v1.0_test_w_obj.json
  {output}/ScanQA_v1.0_test_wo_obj.json
Then: roomplan prepare scanqa --qa-file {output}/ScanQA_v1.0_val.json --scans data/raw/scannet/scans --output FILE"""

SQA3D = """\
SQA3D (Ma et al., ICLR 2023), questions in a situation about ScanNet; the scans come with `roomplan download scannet`.
Licence: CC BY 4.0, and ScanNet's terms of use. Get sqa_task.zip from https://zenodo.org/record/7792397 (linked in
  https://github.com/SilongYong/SQA3D) and unpack its folder balanced/ here.
Expected, for each split of train, val, test:
  {output}/v1_balanced_questions_<split>_scannetv2.json
  {output}/v1_balanced_sqa_annotations_<split>_scannetv2.json
Then: roomplan prepare sqa3d --questions {output}/v1_balanced_questions_test_scannetv2.json \\
  --annotations {output}/v1_balanced_sqa_annotations_test_scannetv2.json --scans data/raw/scannet/scans --output FILE"""


@dataclass(frozen=True)
class Step:
    """One file to fetch; `unpacked` is the folder that a zip archive becomes, None for other files."""

    url: str
    path: Path
    unpacked: Path | None = None

    @property
    def done(self) -> bool:
        return self.unpacked.exists() if self.unpacked else is_whole(self.path)


def read_scene_list(path: Path | str, split: str | None = None) -> dict[str, str]:
    """Fold by scene id of a CSV with the columns video_id and fold, of one fold only where `split` is given.

    Raises ValueError that names the line of a wrong id or fold.
    """
    path, wanted = Path(path), split and fold_name(split)
    reader = csv.DictReader(read_text(path).splitlines())
    if not {"video_id", "fold"} <= set(reader.fieldnames or ()):
        raise ValueError(f"{path}: expected the columns video_id and fold, got {reader.fieldnames}")
    folds = {}
    for row in reader:
        scene_id, fold = (row["video_id"] or "").strip(), (row["fold"] or "").strip()
        if fold not in FOLDS:
            raise ValueError(f"{path}:{reader.line_num}: fold: expected one of {FOLDS}, got {fold!r:.80}")
        if wanted in (None, fold):
            folds[check_scene_id(scene_id, f"{path}:{reader.line_num}")] = fold
    return folds


def check_scene_id(scene_id: str, where: str) -> str:
    """The id itself. Raises ValueError for what is no video id of ARKitScenes: it becomes part of paths and URLs."""
    if not re.fullmatch(r"[0-9]{8}", scene_id):
        raise ValueError(f"{where}: expected a video id of eight digits, got {scene_id!r:.80}")
    return scene_id


def fold_name(split: str) -> str:
    """Training or Validation, for either that or our own name of the split."""
    fold = {ours: theirs for theirs, ours in SPLIT_OF_FOLD.items()}.get(split, split)
    if fold not in FOLDS:
        raise ValueError(f"split: expected Training or Validation, got {split!r}")
    return fold


def download_arkitscenes(
    output: Path | str,
    scenes: Sequence[str] = (),
    *,
    table: Path | str | None = None,
    split: str | None = None,
    dataset: str = "raw",
    assets: Sequence[str] = DEFAULT_ASSETS,
    url: str = ARKITSCENES_URL,
    keep_zip: bool = False,
    progress: bool = True,
    wait: float = 1.0,
) -> list[Path]:
    """Fetch scenes to `<output>/<dataset>/{Training,Validation}/<video_id>/`, as Apple's own script lays them out.

    scenes, table, split: as for `arkitscenes_folds`; scenes whose fold nothing else tells are looked up in the data
    set's metadata.csv, which is fetched first. assets: of the raw data set, see ASSET_FILES. url: another server of the
    same files. wait: seconds before the second try of a file, doubled for each further one.
    Files that are there already are kept. One that cannot be fetched does not keep the others from it.

    Returns the folders of the scenes. Raises ValueError that lists what could not be fetched, and why.
    """
    output, url = Path(output), url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: expected http:// or https://, got {url!r}")
    metadata = metadata_step(output, dataset, url)
    try:
        fetch(metadata, wait=wait, progress=progress)
    except ValueError as error:
        print(f"going on without the table of scans: {error}")
    folds = arkitscenes_folds(scenes, table, split, metadata.path)
    steps = arkitscenes_steps(folds, output, dataset, assets, url, _upsampling_scans(metadata.path))
    failed = []
    for step in tqdm(steps, unit="file", desc="files", disable=not progress):
        try:
            fetch(step, wait=wait, progress=progress)
            if step.unpacked is not None:
                unpack(step.path, step.unpacked)
                if not keep_zip:
                    step.path.unlink(missing_ok=True)
        except ValueError as error:
            failed.append(str(error))
    if failed:
        listing = "\n".join(f"  {reason}" for reason in failed)
        raise ValueError(f"{len(failed)} of {len(steps)} files could not be fetched; {AGAIN}:\n{listing}")
    return [output / dataset / fold / scene_id for scene_id, fold in folds.items()]


def arkitscenes_folds(
    scenes: Sequence[str], table: Path | str | None, split: str | None, metadata: Path
) -> dict[str, str]:
    """Fold by scene id, sorted by id.

    scenes: video ids; empty = all of the table. table: CSV with video_id and fold. split: the fold of `scenes` where
    there is no table, else which rows of the table count. metadata: a table that is used where it exists and neither
    is given. Raises ValueError for a scene whose fold nothing tells.
    """
    for scene_id in scenes:
        check_scene_id(scene_id, "scenes")
    if not scenes and table is None:
        raise ValueError(
            "nothing to fetch: name scenes, or a CSV with video_id and fold (Apple's 3dod_train_val_splits)"
        )
    if table is not None:
        known = read_scene_list(table, split)
    elif split is not None:
        known = dict.fromkeys(scenes, fold_name(split))
    else:
        known = read_scene_list(metadata) if metadata.is_file() else {}
    wanted = scenes or known
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"nothing tells the fold of {', '.join(unknown)!s:.200}; give --split Training or Validation")
    return {scene_id: known[scene_id] for scene_id in sorted(wanted)}


def metadata_step(output: Path, dataset: str, url: str = ARKITSCENES_URL) -> Step:
    """The data set's table of scans."""
    if dataset not in FOLDER_ON_SERVER:
        raise ValueError(f"dataset: expected one of {tuple(FOLDER_ON_SERVER)}, got {dataset!r}")
    return Step(f"{url}/{FOLDER_ON_SERVER[dataset]}/metadata.csv", Path(output) / dataset / "metadata.csv")


def arkitscenes_steps(
    folds: dict[str, str],
    output: Path,
    dataset: str = "raw",
    assets: Sequence[str] = DEFAULT_ASSETS,
    url: str = ARKITSCENES_URL,
    upsampling: set[str] | None = None,
) -> list[Step]:
    """The files of the scenes (fold by id), as Apple's script fetches them.

    upsampling: ids of the scans that have highres_depth, None where that is not known.
    """
    assets = [asset.strip() for asset in assets]
    if unknown := sorted(set(assets) - set(ASSET_FILES)):
        raise ValueError(f"assets: {', '.join(unknown)} not in {', '.join(ASSET_FILES)}")
    url, server = url.rstrip("/"), FOLDER_ON_SERVER[dataset]
    steps = []
    for scene_id, fold in folds.items():
        folder = Path(output) / dataset / fold
        if dataset == "3dod":
            steps.append(Step(f"{url}/{server}/{fold}/{scene_id}.zip", folder / f"{scene_id}.zip", folder / scene_id))
            continue
        for asset in assets:
            if asset in ("annotation", "mesh", "lowres_wide.traj") and scene_id in BARE_SCANS:
                continue
            if asset == "highres_depth" and upsampling is not None and scene_id not in upsampling:
                continue
            name = ASSET_FILES[asset].format(id=scene_id)
            unpacked = folder / scene_id / asset if asset in ZIPPED_ASSETS else None
            steps.append(Step(f"{url}/{server}/{fold}/{scene_id}/{name}", folder / scene_id / name, unpacked))
    return steps


def shell_lines(steps: Sequence[Step]) -> Iterator[str]:
    """The steps as commands of a shell, for those that are not done."""
    steps = [step for step in steps if not step.done]
    for folder in dict.fromkeys(step.path.parent for step in steps):
        yield f"mkdir -p {shlex.quote(str(folder))}"
    for step in steps:
        path = shlex.quote(str(step.path))
        yield f"curl --fail --continue-at - --output {path}.part {shlex.quote(step.url)} && mv {path}.part {path}"
        if step.unpacked is not None:
            yield f"unzip -oq {path} -d {shlex.quote(str(step.path.parent))} && rm {path}"


def _upsampling_scans(metadata: Path) -> set[str] | None:
    """Scans with `is_in_upsampling`; None where there is no table or it has no such column."""
    if not metadata.is_file():
        return None
    reader = csv.DictReader(read_text(metadata).splitlines())
    if "is_in_upsampling" not in (reader.fieldnames or ()):
        return None
    return {
        row["video_id"] for row in reader if (row["is_in_upsampling"] or "").strip() in ("True", "true", "1", "1.0")
    }


# One file -------------------------------------------------------------------------------------------------------------


def fetch(step: Step, *, wait: float = 1.0, progress: bool = True) -> None:
    """Fetch one file, going on from what an earlier try left; nothing to do when the step is done.

    After a lost connection, a silent server or its error comes another try, `wait` seconds later and doubled each time;
    MAX_TRIES that bring nothing are the end. Raises ValueError then, and for an answer that no further try mends.
    """
    if step.done or is_whole(step.path):
        return
    step.path.parent.mkdir(parents=True, exist_ok=True)
    part = _part(step.path)
    attempt, size = 0, -1
    while attempt < MAX_TRIES:
        if attempt:
            time.sleep(min(wait * 2 ** (attempt - 1), MAX_WAIT))
        before, size = size, part.stat().st_size if part.exists() else 0
        attempt = 1 if size > max(before, 0) else attempt + 1
        try:
            _fetch_rest(step, progress)
            return
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code not in (408, 416, 425, 429) and error.code < 500:
                raise ValueError(f"{step.url}: {reason}; check scene id, fold and asset") from None
        except (OSError, http.client.HTTPException, _BrokenOff) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    raise ValueError(f"{step.url}: {reason} (in each of {MAX_TRIES} tries)")


class _BrokenOff(Exception):
    """The server sent less, or other bytes, than it announced."""


def _fetch_rest(step: Step, progress: bool) -> None:
    part = _part(step.path)
    tag_path = part.with_name(f"{part.name}.tag")
    start = part.stat().st_size if part.exists() else 0
    known_tag = tag_path.read_text() if start and tag_path.exists() else ""
    request = urllib.request.Request(step.url, headers={"Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
        if known_tag:
            request.add_header("If-Range", known_tag)  # another version comes whole
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is there is no beginning of the file, or all of it
            if _total(error.headers) == start:
                _finish(step.path, part, tag_path)
                return
            part.unlink(missing_ok=True)
        raise
    with answer:
        tag = answer.headers.get("ETag", "")
        tag = tag if tag.startswith('"') else answer.headers.get("Last-Modified", "")  # If-Range takes no weak ETag
        if answer.status == 206:
            first = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
            if not first or int(first[1]) != start or tag != (known_tag or tag):
                part.unlink(missing_ok=True)
                raise _BrokenOff(
                    f"asked for the bytes from {start}, got {answer.headers.get('Content-Range')!r}, {tag}"
                )
            total = _total(answer.headers)
        else:
            start = 0
            length = answer.headers.get("Content-Length")
            total = int(length) if length is not None and length.isdigit() else None
        if total is None and not answer.chunked:
            raise ValueError(f"{step.url}: the server does not tell the size, so nothing tells when the file is whole")
        if total is not None and (free := shutil.disk_usage(part.parent).free) < total - start:
            raise ValueError(f"{step.path}: needs {total - start} bytes, {free} are free; make room")
        if tag:
            write_whole(tag_path, tag)
        else:
            tag_path.unlink(missing_ok=True)
        bar = tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            desc=step.path.name,
            leave=False,
            disable=not progress,
        )
        with bar, part.open("r+b" if start else "wb") as file:
            file.seek(start)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
            size = file.tell()
    if total is not None and size != total:
        raise _BrokenOff(f"got {size} of {total} bytes")
    _finish(step.path, part, tag_path)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def is_whole(path: Path) -> bool:
    """Whether a file is there, of the size that it had when it was fetched; one that was put there by hand is."""
    if not path.exists():
        return False
    size = _size_path(path)
    return not size.exists() or size.read_text().strip() == str(path.stat().st_size)


def _size_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.size")


def _finish(path: Path, part: Path, tag_path: Path) -> None:
    write_whole(_size_path(path), str(part.stat().st_size))
    part.replace(path)
    tag_path.unlink(missing_ok=True)


def _total(headers) -> int | None:
    """Size of the whole file by a Content-Range; None where it does not tell."""
    match = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return int(match[1]) if match else None


# Archives -------------------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive whose one folder is named as `folder`; that appears whole or not at all.

    A broken archive is removed, so that it is fetched again. Raises ValueError for one that is broken, larger than it
    pretends, or holds a link, two files of one name, or a path out of its folder.
    """
    if folder.exists():
        return
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = _checked_members(content, archive, folder.name)
            for member in members:
                target = part.joinpath(*PurePosixPath(member.filename).parts)
                if member.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, target.open("xb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
        (part / folder.name).rename(folder)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, zlib.error) as error:
        if isinstance(error, OSError):
            raise ValueError(f"{archive}: cannot unpack it ({error})") from None
        archive.unlink()
        _size_path(archive).unlink(missing_ok=True)
        raise ValueError(f"{archive}: broken archive ({error}), removed; {AGAIN}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _checked_members(content: zipfile.ZipFile, archive: Path, name: str) -> list[zipfile.ZipInfo]:
    members, seen = content.infolist(), set()
    packed = archive.stat().st_size
    unpacked = sum(member.file_size for member in members)
    if unpacked > MAX_UNPACKED or unpacked > MAX_RATIO * packed + CHUNK:
        raise ValueError(
            f"{archive}: {packed} bytes would become {unpacked}, which no archive of pictures does; refused"
        )
    for member in members:
        path = PurePosixPath(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or path.parts[:1] != (name,):
            raise ValueError(f"{archive}: {member.filename!r:.120} is not below {name}/; refused")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"{archive}: {member.filename!r:.120} is a link; refused")
        if path in seen:
            raise ValueError(f"{archive}: {member.filename!r:.120} is there twice; refused")
        seen.add(path)
    if not members:
        raise ValueError(f"{archive}: it is empty; refused")
    if (free := shutil.disk_usage(archive.parent).free) < unpacked:
        raise ValueError(f"{archive}: needs {unpacked} bytes, {free} are free; make room")
    return members
