"""A folder of scenes -> files of samples with their manifests."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.samples import read_manifest, write_json, write_samples
from roomplan_lib.samples.anchors import build_anchors
from roomplan_lib.samples.qa import build_qa
from roomplan_lib.samples.views import choose_views, geometry_record
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, visible_boxes
from roomplan_lib.scenes import Scene, View
from roomplan_lib.scenes.arkitscenes import (
    SkippedSceneError,
    check_picture_size,
    find_scenes,
    frames_dir,
    read_scene,
    scene_membership,
)

TASKS = ("anchors", "qa")
BUILDER_VERSION = 2  # raised whenever the same scene and settings give other samples: files of old ones are rebuilt
CACHE_DIR = ".scenes"


def prepare_arkitscenes(
    root: Path | str,
    output_dir: Path | str,
    *,
    num_views: int = 8,
    split: str | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    tasks: Sequence[str] = TASKS,
    strategy: str = "coverage",
    min_pixels: float = MIN_VISIBLE_PIXELS,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
) -> dict[str, Path]:
    """Build `<task>_<split>.jsonl` and its manifest for every task and split below `root`.

    num_views, strategy: see `views.choose_views`. split: only this one. min_pixels: see `visibility.visible_boxes`.
    workers: processes, all cores by default, 1 = none besides this one (a script that starts more needs the
    `if __name__ == "__main__":` guard). exclude: scene ids to leave out.
    Scenes marked as skipped by the annotators are left out; the manifest names them. Each scene's samples are kept in
    `<output_dir>/.scenes`, so an interrupted run continues and an unchanged one has nothing to do; other settings or
    changed scene files are built again.

    Returns the files by "<task>_<split>". Raises ValueError when there are no scenes, a scene's split is unknown, one
    visit is in two splits, or scenes are broken (all are listed; `skip_broken` leaves them out instead).
    """
    root, output_dir = Path(root).absolute(), Path(output_dir).absolute()
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"tasks: expected some of {TASKS}, got {tuple(tasks)}")
    members = _split_scenes(root, split, exclude)
    settings = {
        "builder_version": BUILDER_VERSION,
        "num_views": num_views,
        "strategy": strategy,
        "seed": seed,
        "min_pixels": min_pixels,
    }
    cache_dir = output_dir / CACHE_DIR
    cache_dir.mkdir(parents=True, exist_ok=True)
    for name in (f"{task}_{part}" for task in tasks for part in members):
        _tell_changed_settings(output_dir / f"{name}.jsonl", settings)

    scene_dirs = [scene_dir for part in members.values() for scene_dir in part]
    results = _build_all(scene_dirs, root, cache_dir, settings, workers, progress)
    broken = {name: result["error"] for name, result in sorted(results.items()) if result["state"] == "broken"}
    if broken:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in broken.items())
        heading = f"{len(broken)} of {len(scene_dirs)} scenes cannot be used"
        if not skip_broken:
            raise ValueError(f"{heading}; mend them, or leave them out with skip_broken:\n{listing}")
        print(f"{heading} and are left out:\n{listing}")

    files = {}
    for part, part_dirs in members.items():
        good = [path for path in part_dirs if results[path.name]["state"] == "good"]
        left_out = {path.name: results[path.name]["error"] for path in part_dirs if path not in good}
        for task in tasks:
            path = files[f"{task}_{part}"] = output_dir / f"{task}_{part}.jsonl"
            num_samples = sum(results[scene_dir.name]["counts"][task] for scene_dir in good)
            if num_samples == 0:
                raise ValueError(
                    f"{path.name}: none of {len(good)} {part} scenes gives a sample; "
                    "look at one with select_views and visible_boxes, or raise num_views"
                )
            inputs = _digest({name: results[name]["fingerprint"] for name in sorted(p.name for p in good)})
            if _is_current(path, settings, inputs, root):
                print(f"{path}: up to date, {num_samples} samples")
                continue
            manifest = {
                "root": root,
                "source": "arkitscenes",
                "settings": settings,
                "inputs": inputs,
                "visits": {scene_dir.name: results[scene_dir.name]["visit_id"] for scene_dir in good},
                "views": _view_statistics([results[scene_dir.name] for scene_dir in good]),
                "left_out": left_out,
            }
            write_samples(path, _samples_of(good, cache_dir, task), manifest)
            print(f"{path}: {num_samples} samples from {len(good)} scenes")
    return files


def scene_record(scene: Scene, views: list[View], root: Path) -> dict:
    """The keys that all samples of a scene share; picture paths relative to `root`."""
    record = {
        "images": [view.rgb_path.relative_to(root).as_posix() for view in views],
        "geom_token": geometry_record(views),
        "scene_id": scene.scene_id,
        "view_ids": [view.view_id for view in views],
        "split": scene.split,
        "source": scene.source,
    }
    if all(view.depth_path is not None for view in views):
        record["depths"] = [view.depth_path.relative_to(root).as_posix() for view in views]
    return record


def build_scene(scene_dir: Path, root: Path, settings: dict) -> dict:
    """{common, anchors, qa, baseline_m, coverage} of one scene: the shared keys, and the samples without them.

    Raises ValueError for a scene that cannot be read or a chosen picture that is broken or of another size than its
    intrinsics say.
    """
    scene = read_scene(scene_dir)
    selection = choose_views(scene, settings["num_views"], strategy=settings["strategy"])
    for view in selection.views:
        height, width, _ = view.load_rgb().shape
        check_picture_size(view, (width, height))
    visible = visible_boxes(scene, selection.views, settings["min_pixels"])
    return {
        "common": scene_record(scene, selection.views, root),
        "anchors": build_anchors(scene, visible, settings["seed"]),
        "qa": build_qa(scene, visible, settings["seed"]),
        "baseline_m": round(selection.baseline_m, 3),
        "coverage": None if selection.coverage is None else round(selection.coverage, 4),
    }


def _split_scenes(root: Path, split: str | None, exclude: Sequence[str]) -> dict[str, list[Path]]:
    """Scene folders by split; checks names, splits and visits."""
    scene_dirs = find_scenes(root)
    names = [path.name for path in scene_dirs]
    if unknown := set(exclude) - set(names):
        raise ValueError(f"exclude: no scene {sorted(unknown)} below {root}")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{root}: scenes found in two folders: {twice}; keep one of each")
    members, splits_of_visit = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for path in scene_dirs:
        if path.name in exclude:
            continue
        part, visit_id = scene_membership(path)
        if not part:
            raise ValueError(
                f"{path}: nothing tells its split; move it into Training/ or Validation/, or put "
                f"3dod_train_val_splits.csv into {root}"
            )
        members[part].append(path)
        if visit_id:
            splits_of_visit[visit_id][part].append(path.name)
    shared = {visit: dict(parts) for visit, parts in splits_of_visit.items() if len(parts) > 1}
    if shared:
        raise ValueError(
            f"{root}: visits in two splits show the same room in training and in validation: {shared}; "
            "name the scenes of one side in `exclude`"
        )
    if split is not None:
        members = {part: paths for part, paths in members.items() if part == split}
    if not members:
        raise ValueError(f"{root}: no {split or ''} scene found; expected {{Training,Validation}}/<video_id>/")
    return dict(sorted(members.items()))


def _build_all(
    scene_dirs: list[Path], root: Path, cache_dir: Path, settings: dict, workers: int | None, progress: bool
) -> dict[str, dict]:
    """Result by scene id, see `_build_cached`."""
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, len(scene_dirs))
    results = {}
    with tqdm(total=len(scene_dirs), unit="scene", desc="scenes", disable=not progress) as bar:

        def take(result: dict) -> None:
            results[result["scene_id"]] = result
            bar.update()

        if workers <= 1:
            for scene_dir in scene_dirs:
                take(_build_cached(scene_dir, root, cache_dir, settings))
            return results
        # Spawned, since forking a process with threads (a notebook, torch) may hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                jobs = [pool.submit(_build_cached, path, root, cache_dir, settings) for path in scene_dirs]
                for job in as_completed(jobs):
                    take(job.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return results


def _build_cached(scene_dir: Path, root: Path, cache_dir: Path, settings: dict) -> dict:
    """Build a scene's samples into its cache file unless it holds them; returns what the manifests need."""
    result = {"scene_id": scene_dir.name, "state": "good", "counts": dict.fromkeys(TASKS, 0)}
    try:
        _, result["visit_id"] = scene_membership(scene_dir)
        result["fingerprint"] = _fingerprint(scene_dir, root)
        key = _digest({"settings": settings, "scene": result["fingerprint"]})
        cache_path = cache_dir / f"{scene_dir.name}.json"
        built = _read_cache(cache_path, key)
        if built is None:
            built = {"key": key, **build_scene(scene_dir, root, settings)}
            write_json(cache_path, built)
    except SkippedSceneError as error:
        return {**result, "state": "skipped", "error": str(error)}
    except ValueError as error:
        return {**result, "state": "broken", "error": str(error)}
    result["counts"] = {task: len(built[task]) for task in TASKS}
    return {**result, "baseline_m": built["baseline_m"], "coverage": built["coverage"]}


def _read_cache(path: Path, key: str) -> dict | None:
    try:
        built = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return built if isinstance(built, dict) and built.get("key") == key else None


def _samples_of(scene_dirs: list[Path], cache_dir: Path, task: str) -> Iterator[dict]:
    for scene_dir in scene_dirs:
        built = json.loads((cache_dir / f"{scene_dir.name}.json").read_text(encoding="utf-8"))
        for sample in built[task]:
            yield {**built["common"], **sample}


def _fingerprint(scene_dir: Path, root: Path) -> str:
    """Changes with the scene's annotation, poses, split, and the names and sizes of its frames."""
    digest = hashlib.sha256(json.dumps([str(scene_dir.relative_to(root)), *scene_membership(scene_dir)]).encode())
    frames, name = frames_dir(scene_dir), scene_dir.name
    for path in (
        scene_dir / f"{name}_3dod_annotation.json",
        scene_dir / f"{name}_room.json",
        frames / "lowres_wide.traj",
    ):
        digest.update(path.read_bytes() if path.is_file() else b"absent")
    for folder in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics"):
        if (frames / folder).is_dir():
            entries = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(frames / folder))
            digest.update(json.dumps([folder, entries]).encode())
    return digest.hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _old_manifest(path: Path) -> dict:
    """What an earlier run wrote beside `path`; empty when there is nothing readable, so the file is built again."""
    try:
        return read_manifest(path) if path.exists() else {}
    except ValueError:
        return {}


def _tell_changed_settings(path: Path, settings: dict) -> None:
    old = _old_manifest(path).get("settings")
    if old is not None and old != settings:
        changes = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
        print(f"{path}: settings changed ({', '.join(changes)}), building it again")


def _is_current(path: Path, settings: dict, inputs: str, root: Path) -> bool:
    """The file was made from these scenes with these settings and has not been touched since."""
    manifest = _old_manifest(path)
    return (
        manifest.get("settings") == settings
        and manifest.get("inputs") == inputs
        and (path.parent / manifest["root"]).resolve() == root.resolve()
        and manifest.get("sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    )


def _view_statistics(results: list[dict]) -> dict:
    """How well the chosen views show the scenes: parallax in metres and the share of seen voxels they cover."""
    baselines = [result["baseline_m"] for result in results]
    coverages = [result["coverage"] for result in results if result["coverage"] is not None]
    statistics = {"baseline_m": {"min": min(baselines), "median": float(np.median(baselines))}}
    if coverages:
        statistics["coverage"] = {"min": min(coverages), "median": float(np.median(coverages))}
    return statistics
