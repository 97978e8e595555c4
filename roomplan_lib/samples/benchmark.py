"""How fast scans become samples, beside how fast their files can be read, and in how much memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm

from roomplan_lib.samples.build import run_all
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.scenes import load_depth, load_rgb
from roomplan_lib.scenes.arkitscenes import find_scenes, frames_dir
from roomplan_lib.scenes.rooms import write_rooms

NUM_TEMPLATES = 5  # rooms that are rendered; the scans are hard links to their files, under names of their own
NUM_FEW = 200  # scans of the second measurement of memory, or a quarter of all where that is less
FOLDERS = ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics")


def benchmark_prepare(
    num_scenes: int = 2000, *, num_poses: int = 32, num_views: int = 8, workers: int = 1, folder: Path | None = None
) -> dict:
    """Make `num_scenes` scans of `num_poses` posed pictures, 256x192, prepare them, and read and decode their files.

    folder: where a temporary folder is made; it must allow hard links. Preparing runs in a process of its own, once
    for all scans and once for NUM_FEW. Files come from the disk's cache in either case.

    Returns {num_scenes, num_few, workers, num_samples, seconds, decode_seconds (the same files, nothing else done with
    them), peak_mb, few_peak_mb} (memory of the main process and the largest worker together, MiB).
    Raises ValueError for a `folder` that is none.
    """
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; make it, or leave it out")
    num_few = min(NUM_FEW, max(1, num_scenes // 4))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        make_scans(root / "many", num_scenes, num_poses)
        make_scans(root / "few", num_few, num_poses)
        started = time.perf_counter()
        for _ in run_all(partial(read_scan, num_views=num_views), find_scenes(root / "many"), workers):
            pass
        decode_seconds = time.perf_counter() - started
        few, many = (_measured(root / part, num_views, workers) for part in ("few", "many"))
    return {
        "num_scenes": num_scenes,
        "num_few": num_few,
        "workers": workers,
        "decode_seconds": decode_seconds,
        "few_peak_mb": few["peak_mb"],
        **many,
    }


def benchmark_table(result: dict) -> str:
    """What `benchmark_prepare` found, for people."""
    rate, decode_rate = (result["num_scenes"] / result[key] for key in ("seconds", "decode_seconds"))
    return "\n".join(
        [
            f"{result['num_scenes']} scans, {result['workers']} processes: {result['num_samples']} samples",
            f"prepare           {rate:8.1f} scans/s",
            f"read and decode   {decode_rate:8.1f} scans/s: {rate / decode_rate:.0%} of the time of preparing",
            f"peak memory       {result['peak_mb']:8.0f} MiB, at {result['num_few']} scans "
            f"{result['few_peak_mb']:.0f} MiB",
        ]
    )


def make_scans(root: Path, num_scenes: int, num_poses: int) -> None:
    """Scans in the raw layout, hard links to the files of a few rendered rooms; every fifth is Validation."""
    templates = write_rooms(root / "templates", NUM_TEMPLATES, num_poses=num_poses, frame_rate=10, workers=1)
    rows = ["video_id,visit_id,fold"]
    for number in tqdm(range(num_scenes), desc="scans", unit="scan"):
        template, scene_id = templates[number % NUM_TEMPLATES], f"4{number:07d}"
        fold = "Validation" if number % 5 == 4 else "Training"
        scene_dir = root / "scans" / fold / scene_id
        for name in FOLDERS:
            (scene_dir / name).mkdir(parents=True)
            for entry in os.scandir(frames_dir(template) / name):
                os.link(entry.path, scene_dir / name / entry.name.replace(template.name, scene_id))
        os.link(frames_dir(template) / "lowres_wide.traj", scene_dir / "lowres_wide.traj")
        for kind in ("3dod_annotation", "room"):
            os.link(template / f"{template.name}_{kind}.json", scene_dir / f"{scene_id}_{kind}.json")
        rows.append(f"{scene_id},{500_000 + number},{fold}")
    (root / "scans" / "3dod_train_val_splits.csv").write_text("\n".join(rows) + "\n")


def read_scan(scene_dir: Path, num_views: int) -> dict:
    """Read and decode what preparing a scan reads: every depth picture, `num_views` pictures and all small files."""
    frames = frames_dir(scene_dir)
    for path in [*scene_dir.glob("*.json"), frames / "lowres_wide.traj", *(frames / FOLDERS[2]).iterdir()]:
        path.read_bytes()
    for path in (frames / FOLDERS[1]).iterdir():
        load_depth(path)
    for path in sorted((frames / FOLDERS[0]).iterdir())[:num_views]:
        load_rgb(path)
    return {}


def _measured(root: Path, num_views: int, workers: int) -> dict:
    command = [sys.executable, "-m", __name__, str(root / "scans"), str(root / "samples"), str(num_views), str(workers)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def _prepare_and_tell(root: str, output: str, num_views: str, workers: str) -> None:
    """Prepare the scans below `root` and print, as the last line, how long that took and in how much memory."""
    started = time.perf_counter()
    files = prepare_arkitscenes(root, output, num_views=int(num_views), workers=int(workers))
    seconds = time.perf_counter() - started
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    num_samples = 0
    for path in files.values():
        with path.open("rb") as file:
            num_samples += sum(1 for _ in file)
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "num_samples": num_samples}))


if __name__ == "__main__":
    _prepare_and_tell(*sys.argv[1:])
