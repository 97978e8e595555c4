"""A folder of scenes -> files of samples with their manifests."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from roomplan_lib.samples import manifest_path, rounded, write_samples
from roomplan_lib.samples.anchors import build_anchors, build_lists, build_negatives
from roomplan_lib.samples.build import digest, is_current, old_manifest, read_cache, run_all, write_cache
from roomplan_lib.samples.planes import build_planes
from roomplan_lib.samples.plans import build_plans
from roomplan_lib.samples.qa import QA_TASKS, build_qa
from roomplan_lib.samples.views import Selection, choose_view_sets, geometry_record, keep_depth
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, visible_boxes
from roomplan_lib.scenes import Scene
from roomplan_lib.scenes.arkitscenes import (
    SPLIT_OF_FOLD,
    SkippedSceneError,
    check_picture_size,
    find_scenes,
    frames_dir,
    read_scene,
    scene_membership,
    table_rows,
)

TASKS = ("anchors", "qa", *QA_TASKS, "lists", "negatives", "planes", "plans")  # "qa" has those of all QA_TASKS
DEFAULT_TASKS = ("anchors", "qa")
# Raised whenever the same scene and settings give other samples or manifests: files of old ones are rebuilt.
BUILDER_VERSION = 4
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
    tasks: Sequence[str] = DEFAULT_TASKS,
    strategy: str = "coverage",
    stop_ratio: float = 1.0,
    view_sets: int = 1,
    interpolate: bool = False,
    negative_share: float = 0.25,
    min_pixels: float = MIN_VISIBLE_PIXELS,
    exclude: Sequence[str] = (),
    skip_broken: bool = False,
) -> dict[str, Path]:
    """Build `<task>_<split>.jsonl` and its manifest for every task and split below `root`, and print a table of them.

    num_views, strategy, stop_ratio: see `views.choose_view_sets`. view_sets: choices of views per scene, each with its
    own records. split: only this one, by our name or by the data set's (Training, Validation). interpolate: see
    `arkitscenes.read_scene`. negative_share: see `anchors.build_negatives`. min_pixels: see `visibility.visible_boxes`.
    workers: processes, all cores by default, 1 = none besides this one (a script that starts more needs the
    `if __name__ == "__main__":` guard). exclude: scene ids to leave out.
    Scenes marked as skipped by the annotators are left out, and so are training scenes whose visit is also in
    validation: the same room; the manifest names both. Each scene's samples are kept in `<output_dir>/.scenes`, so an
    interrupted run continues and an unchanged one has nothing to do; other settings or changed scene files are built
    again.

    Returns the files by "<task>_<split>". Raises ValueError when there are no scenes, a scene's split is unknown, or
    scenes are broken (all are listed; `skip_broken` leaves them out instead).
    """
    root, output_dir = Path(root).absolute(), Path(output_dir).absolute()
    if not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"tasks: expected some of {TASKS}, got {tuple(tasks)}")
    if split not in (None, *SPLIT_OF_FOLD, *SPLIT_OF_FOLD.values()):
        raise ValueError(f"split: expected one of {(*SPLIT_OF_FOLD, *SPLIT_OF_FOLD.values())}, got {split!r}")
    members, twins = _split_scenes(root, SPLIT_OF_FOLD.get(split, split), exclude)
    settings = {
        "builder_version": BUILDER_VERSION,
        "num_views": num_views,
        "strategy": strategy,
        "stop_ratio": stop_ratio,
        "view_sets": view_sets,
        "interpolate": interpolate,
        "negative_share": negative_share,
        "seed": seed,
        "min_pixels": min_pixels,
    }
    cache_dir = output_dir / CACHE_DIR
    cache_dir.mkdir(parents=True, exist_ok=True)
    for name in (f"{task}_{part}" for task in tasks for part in members):
        _tell_changed_settings(output_dir / f"{name}.jsonl", settings)

    scene_dirs = [scene_dir for part in members.values() for scene_dir in part]
    work = partial(_build_cached, root=root, cache_dir=cache_dir, settings=settings, tasks=tuple(tasks))
    results = {result["scene_id"]: result for result in run_all(work, scene_dirs, workers, progress)}
    broken = {name: result["error"] for name, result in sorted(results.items()) if result["state"] == "broken"}
    if broken:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in broken.items())
        heading = f"{len(broken)} of {len(scene_dirs)} scenes cannot be used"
        if not skip_broken:
            raise ValueError(f"{heading}; mend them, or leave them out with --skip-broken:\n{listing}")
        print(f"{heading} and are left out:\n{listing}")
    if skipped := sorted(name for name, result in results.items() if result["state"] == "skipped"):
        print(f"{len(skipped)} scenes are left out, since the annotators skipped them: {', '.join(skipped)}")

    files = {}
    for part, part_dirs in members.items():
        good = [path for path in part_dirs if results[path.name]["state"] == "good"]
        left_out = {path.name: results[path.name]["error"] for path in part_dirs if path not in good}
        if not good:
            listing = "\n".join(f"  {name}: {reason}" for name, reason in left_out.items())
            raise ValueError(f"{root}: none of the {len(part_dirs)} {part} scenes can be used:\n{listing}")
        left_out |= twins if part == "train" else {}
        good_results = [results[path.name] for path in good]
        for task in tasks:
            path = files[f"{task}_{part}"] = output_dir / f"{task}_{part}.jsonl"
            num_samples = sum(result["counts"][task] for result in good_results)
            if num_samples == 0 and task in DEFAULT_TASKS:
                skipped = f" ({len(left_out)} are left out, such as {min(left_out)}: {left_out[min(left_out)]})"
                raise ValueError(
                    f"{path.name}: none of {len(good)} {part} scenes gives a sample{skipped if left_out else ''}; "
                    "look at one with select_views and visible_boxes, or raise num_views"
                )
            if num_samples == 0:  # small sets may well have no list or no wall to ask for
                print(f"{path}: none of {len(good)} scenes gives a sample, so there is no such file")
                for stale in (files.pop(path.stem), manifest_path(path)):
                    stale.unlink(missing_ok=True)
                continue
            inputs = digest([{result["scene_id"]: result["fingerprint"] for result in good_results}, left_out])
            if is_current(path, settings, inputs, root):
                print(f"{path}: up to date, {num_samples} samples")
                continue
            manifest = {
                "root": root,
                "source": "arkitscenes",
                "settings": settings,
                "inputs": inputs,
                "visits": {result["scene_id"]: result["visit_id"] for result in good_results},
                "categories": {result["scene_id"]: result["categories"] for result in good_results},
                "views": _view_statistics(good_results),
                "other_labels": dict(sum((Counter(result["other_labels"]) for result in good_results), Counter())),
                "sky_directions": dict(Counter(result["sky_direction"] for result in good_results)),
                "sky_differs_from_table": [
                    result["scene_id"]
                    for result in good_results
                    if result["table_sky_direction"] not in ("", result["sky_direction"])
                ],
                "left_out": left_out,
            }
            write_samples(path, _samples_of(good, cache_dir, task), manifest)
            print(f"{path}: {num_samples} samples from {len(good)} scenes")
        print(_summary(part, good_results, left_out))
    return files


def scene_record(scene: Scene, selection: Selection, root: Path) -> dict:
    """The keys that all samples of a scene's view set share; picture paths relative to `root`."""
    views = selection.views
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
        if (scale := views[0].depth_scale) != 1000:
            record["depth_scale"] = scale
        if all(view.depth_K is not None for view in views):
            record["depth_K"] = [rounded(view.depth_K, 5) for view in views]
    if any(view.quarter_turns for view in views):
        record["quarter_turns"] = [view.quarter_turns for view in views]
    if selection.coverage is not None:
        record["coverage"] = round(selection.coverage, 4)
    if selection.baseline_m is not None:
        record["baseline_m"] = round(selection.baseline_m, 3)
    return record


def build_scene(scene_dir: Path, root: Path, settings: dict, tasks: Sequence[str]) -> dict:
    """{sets, categories, ...} of one scene; sets: per view set {common, <task>, ...}, shared keys and samples' own.

    Raises ValueError for a scene that cannot be read or a chosen picture that is broken or of another size than its
    intrinsics say.
    """
    scene = read_scene(scene_dir, interpolate=settings["interpolate"])
    selections = choose_view_sets(
        scene,
        settings["num_views"],
        settings["view_sets"],
        strategy=settings["strategy"],
        stop_ratio=settings["stop_ratio"],
        seed=settings["seed"],
    )
    for view in {view.view_id: view for selection in selections for view in selection.views}.values():
        height, width, _ = view.load_rgb().shape
        check_picture_size(view, (width, height))
    seed, sets = settings["seed"], []
    for number, selection in enumerate(selections):
        selection = replace(selection, views=[keep_depth(view) for view in selection.views])
        visible = visible_boxes(scene, selection.views, settings["min_pixels"])
        common = scene_record(scene, selection, root)
        if settings["view_sets"] > 1:
            common["view_set"] = number
        built = {"common": common}
        for task in tasks:
            if task == "anchors":
                built[task] = build_anchors(scene, visible, seed)
            elif task == "qa" or task in QA_TASKS:
                built[task] = build_qa(scene, visible, seed, QA_TASKS if task == "qa" else (task,))
            elif task == "lists":
                built[task] = build_lists(scene, visible, seed)
            elif task == "negatives":
                built[task] = build_negatives(scene, visible, seed, settings["negative_share"])
            elif task == "plans":
                built[task] = build_plans(scene, visible, seed)
            else:
                built[task] = build_planes(scene, selection.views, visible, seed, settings["min_pixels"])
            for sample in built[task] if number else ():
                sample["question_id"] += f"-v{number}"
        sets.append(built)
    return {
        "sets": sets,
        "categories": dict(sorted(Counter(box.label for box in scene.boxes).items())),
        **{key: scene.metadata[key] for key in ("other_labels", "sky_direction", "table_sky_direction")},
    }


def _split_scenes(
    root: Path, split: str | None, exclude: Sequence[str]
) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """(scene folders by split, reason by id of the training scenes left out); checks names, splits and visits."""
    scene_dirs = find_scenes(root)
    names = [path.name for path in scene_dirs]
    if unknown := set(exclude) - set(names):
        raise ValueError(f"exclude: no scene {sorted(unknown)} below {root}")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{root}: scenes found in two folders: {twice}; keep one of each")
    members, held_out = defaultdict(list), defaultdict(set)
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
        if visit_id and part != "train":
            held_out[visit_id].add(path.name)
        # A validation scan that is not here may be prepared elsewhere: the tables know of it.
        for name, row in table_rows(path).items():
            if row.visit_id and row.split not in ("", "train") and name not in exclude:
                held_out[row.visit_id].add(name)
    twins = {
        path.name: f"its visit {visit_id} is the room of validation's {', '.join(sorted(held_out[visit_id]))}"
        for path in members["train"]
        if (visit_id := scene_membership(path)[1]) in held_out
    }
    if twins and split in (None, "train"):
        print(f"{root}: {len(twins)} training scenes are left out:")
        print("\n".join(f"  {name}: {reason}" for name, reason in twins.items()))
    members["train"] = [path for path in members["train"] if path.name not in twins]
    members = {part: paths for part, paths in members.items() if paths and split in (None, part)}
    if not members:
        raise ValueError(f"{root}: no {split or ''} scene found; expected {{Training,Validation}}/<video_id>/")
    return dict(sorted(members.items())), twins


def _build_cached(scene_dir: Path, root: Path, cache_dir: Path, settings: dict, tasks: tuple[str, ...]) -> dict:
    """Build a scene's samples into its cache file unless it holds them; returns what manifests and summary need."""
    result = {"scene_id": scene_dir.name, "state": "good"}
    try:
        _, result["visit_id"] = scene_membership(scene_dir)
        result["fingerprint"] = _fingerprint(scene_dir, root)
        key = digest({"settings": settings, "scene": result["fingerprint"]})
        cache_path = cache_dir / f"{scene_dir.name}.json"
        built = read_cache(cache_path, key)
        kept = set(built["sets"][0]) if built else set()
        if not kept.issuperset(tasks):
            built = build_scene(scene_dir, root, settings, [task for task in TASKS if task in kept | set(tasks)])
            write_cache(cache_path, key, built)
    except SkippedSceneError as error:
        return {**result, "state": "skipped", "error": str(error)}
    except ValueError as error:
        return {**result, "state": "broken", "error": str(error)}
    return {
        **result,
        "counts": {task: sum(len(view_set[task]) for view_set in built["sets"]) for task in tasks},
        "baseline_m": [view_set["common"]["baseline_m"] for view_set in built["sets"]],
        "coverage": [view_set["common"]["coverage"] for view_set in built["sets"] if "coverage" in view_set["common"]],
        "num_views": [len(view_set["common"]["images"]) for view_set in built["sets"]],
        **{key: value for key, value in built.items() if key not in ("key", "hash", "sets")},
    }


def _samples_of(scene_dirs: list[Path], cache_dir: Path, task: str) -> Iterator[dict]:
    for scene_dir in scene_dirs:
        built = json.loads((cache_dir / f"{scene_dir.name}.json").read_text(encoding="utf-8"))
        for view_set in built["sets"]:
            for sample in view_set[task]:
                yield {**view_set["common"], **sample}


def _fingerprint(scene_dir: Path, root: Path) -> str:
    """Changes with the scene's annotation, poses, intrinsics, split, and names, sizes and times of its pictures."""
    digest = hashlib.sha256(json.dumps([str(scene_dir.relative_to(root)), *scene_membership(scene_dir)]).encode())
    frames, name = frames_dir(scene_dir), scene_dir.name
    for path in (
        scene_dir / f"{name}_3dod_annotation.json",
        scene_dir / f"{name}_room.json",
        frames / "lowres_wide.traj",
    ):
        digest.update(path.read_bytes() if path.is_file() else b"absent")
    for folder in ("lowres_wide", "lowres_depth"):
        if (frames / folder).is_dir():
            stats = ((entry.name, entry.stat()) for entry in os.scandir(frames / folder))
            entries = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
            digest.update(json.dumps([folder, entries]).encode())
    for path in sorted((frames / "lowres_wide_intrinsics").glob("*.pincam")):  # all of one length, whatever they say
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _tell_changed_settings(path: Path, settings: dict) -> None:
    old = old_manifest(path).get("settings")
    if old is not None and old != settings:
        changes = [f"{key} {old.get(key)} -> {value}" for key, value in settings.items() if old.get(key) != value]
        print(f"{path}: settings changed ({', '.join(changes)}), building it again")


def _view_statistics(results: list[dict]) -> dict:
    """How well the chosen views show the scenes: parallax in metres and the share of seen voxels they cover."""
    return {
        key: {"min": min(values), "median": float(np.median(values))}
        for key in ("baseline_m", "coverage")
        if (values := [value for result in results for value in result[key]])
    }


def _summary(part: str, results: list[dict], left_out: dict[str, str]) -> str:
    """A table for people: what a split holds, and how well its view sets show their scenes."""
    num_views = [count for result in results for count in result["num_views"]]
    lines = [
        f"{part}: {len(results)} scenes ({len(left_out)} left out), {len(num_views)} view sets of "
        f"{min(num_views)} to {max(num_views)} views",
        f"  {'per view set':<14}{'min':>8}{'10 %':>8}{'median':>8}{'90 %':>8}{'max':>8}",
    ]
    for key, name in (("baseline_m", "parallax [m]"), ("coverage", "coverage")):
        values = [value for result in results for value in result[key]]
        if values:
            shares = np.quantile(values, (0, 0.1, 0.5, 0.9, 1))
            lines.append(f"  {name:<14}" + "".join(f"{value:8.2f}" for value in shares))
    return "\n".join(lines)
