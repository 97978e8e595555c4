"""Annotation files, and the scans they are about where those are at hand -> a file of samples with its manifest."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from roomplan_lib.files import file_hash
from roomplan_lib.geometry import OrientedBox
from roomplan_lib.samples import (
    BOX_MARKER,
    box_from_record,
    box_record,
    read_manifest,
    rounded,
    write_samples,
)
from roomplan_lib.samples.anchors import MIN_EXTENT, place_anchor_action
from roomplan_lib.samples.annotations import AnnotationFile
from roomplan_lib.samples.build import digest, is_current, read_cache, refuse_overwriting, run_all, write_cache
from roomplan_lib.samples.prepare import scene_record
from roomplan_lib.samples.sqa3d import agent_record, type_counts
from roomplan_lib.samples.views import choose_view_sets, keep_depth
from roomplan_lib.samples.visibility import visible_boxes
from roomplan_lib.scenes import Scene
from roomplan_lib.scenes.scannet import find_scenes, mesh_center, read_scene

BUILDER_VERSION = 1  # raised whenever the same scans, annotations and settings give other samples
CACHE_DIR = ".scans"
MAX_LISTED = 10  # scans that a message names


def prepare_annotations(
    annotations: AnnotationFile,
    output: Path | str,
    *,
    scans: Path | str | None = None,
    num_views: int = 8,
    strategy: str = "coverage",
    stop_ratio: float = 1.0,
    view_sets: int = 1,
    seed: int = 0,
    shown_only: bool = False,
    skip_missing: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict:
    """Write `output`, a JSONL file with a record for each entry of the annotations, and its manifest; returns that.

    scans: folder of ScanNet scans, see `scenes.scannet` for where their pictures may lie. Without it the records have
    no pictures and say so (`without_views`): for text-only use.
    num_views, strategy, stop_ratio, view_sets, seed: see `views.choose_view_sets`. The records of a second view set
    have "-v1" after their question_id, and so on. shown_only: leave out records about objects that their views do not
    show: right for training, never for an official evaluation. skip_missing: leave out the questions about scans that
    are not there or cannot be read, and name them; else they are an error. workers, progress: see `build.run_all`.

    Views and boxes of a scan are kept in `.scans` beside `output`, for an interrupted run and for other annotations of
    the same scans. A file that is up to date is left alone.

    Raises ValueError for missing or broken scans, objects that a scan does not have, or when no record is left.
    """
    output = Path(output).absolute()
    refuse_overwriting(output, annotations.paths)
    settings = {"builder_version": BUILDER_VERSION, "seed": seed}
    wanted = {record["scene_id"] for record in annotations.records}
    root, scenes = output.parent, {}
    if scans is not None:
        choice = {"num_views": num_views, "strategy": strategy, "stop_ratio": stop_ratio, "view_sets": view_sets}
        settings |= {**choice, "shown_only": shown_only}
        choice["seed"] = seed if strategy == "random" else 0
        cache_dir = output.parent / CACHE_DIR
        root, scenes, left_out = _build_scans(wanted, scans, cache_dir, choice, skip_missing, workers, progress)
    inputs = digest(
        {
            "annotations": [file_hash(path) for path in annotations.paths],
            "split": annotations.split,
            "scenes": {name: scene["key"] for name, scene in sorted(scenes.items())},
        }
    )
    if is_current(output, settings, inputs, root):
        return read_manifest(output)
    manifest = {
        "root": root,
        "source": annotations.source,
        "annotations": {path.name: file_hash(path) for path in annotations.paths},
        "settings": settings,
        "inputs": inputs,
    }
    if scans is None:
        manifest |= {"without_views": True, **_group_counts(annotations.records)}
        records = ({"images": [], "geom_token": None, "without_views": True, **r} for r in annotations.records)
    else:
        every = [
            (record, number)
            for record in annotations.records
            if record["scene_id"] in scenes
            for number in range(len(scenes[record["scene_id"]]["view_sets"]))
        ]
        chosen = [pair for pair in every if not shown_only or _is_shown(*pair, scenes)]
        if not chosen:
            raise ValueError(f"{output}: no record is left of {len(annotations.records)}; give more scans or views")
        manifest |= {
            **_group_counts([record for record, _ in chosen]),
            "visits": {name: scene["visit_id"] for name, scene in sorted(scenes.items())},
            "views": _view_statistics(scenes),
            "targets": _target_counts(chosen, scenes),
            "num_not_shown": len(every) - len(chosen),
            "num_without_agent": _without_agent(chosen, annotations, scenes),
            "left_out": left_out,
        }
        records = (_located(record, number, annotations, scenes) for record, number in chosen)
    write_samples(output, records, manifest)
    return read_manifest(output)


def summarise(manifest: dict) -> str:
    """Text for people about a file that `prepare_annotations` wrote: counts, answers, views, what is left out."""
    rows = [("records", f"{manifest['num_samples']} about {len(manifest['scene_ids'])} scenes")]
    rows.append(("splits", _counts_text(manifest["splits"])))
    rows += [(name, _counts_text(manifest[name])) for name in ("question_type", "eval_type") if name in manifest]
    if "answers" in manifest:
        hidden = manifest["answers"]["hidden"]
        rows.append(
            ("answers", f"{manifest['answers']['given']}" + (f", hidden for {hidden} records" if hidden else ""))
        )
    for name, numbers in manifest.get("views", {}).items():
        rows.append((name, f"median {numbers['median']:.2f}, least {numbers['min']:.2f}"))
    if targets := manifest.get("targets", {}).get("asked"):
        rows.append(("targets", f"{manifest['targets']['shown']} of {targets} are shown by their records' views"))
    if manifest.get("num_not_shown"):
        rows.append(("not shown", f"{manifest['num_not_shown']} records are left out"))
    if manifest.get("num_without_agent"):
        rows.append(("agent", f"unknown for {manifest['num_without_agent']} records: their scans have no mesh"))
    if left_out := manifest.get("left_out"):
        rows.append(("left out", f"{len(left_out)} scenes"))
        rows += [("", f"{name}: {reason}") for name, reason in left_out.items()]
    lines = [f"{manifest['file']}:", *(f"  {name:14}{text}" for name, text in rows)]
    if manifest.get("without_views"):
        lines.append("  WITHOUT VIEWS: no scans were given, so no record has pictures or geometry (text-only use)")
    return "\n".join(lines)


def build_scan(scan_dir: Path, root: Path, cache_dir: Path, settings: dict) -> dict:
    """{key, scene_id, view_sets, boxes, mesh_to_world, mesh_center} of one scan, from its cache file if that is right.

    view_sets: [{record: the keys all its samples share, shown: object ids in view, None where no depth tells}].
    Of a scan that cannot be read: {scene_id, error}.
    """
    try:
        scene = read_scene(scan_dir)
        key = digest({"version": BUILDER_VERSION, "settings": settings, "scene": _fingerprint(scene, root)})
        cache_path = cache_dir / f"{scene.scene_id}.json"
        built = read_cache(cache_path, key)
        if built is None:
            built = {"key": key, **_build_scan(scene, scan_dir, root, settings)}
            write_cache(cache_path, key, {name: value for name, value in built.items() if name != "key"})
        return built
    except ValueError as error:
        return {"scene_id": scan_dir.name, "error": str(error)}


def _build_scan(scene: Scene, scan_dir: Path, root: Path, settings: dict) -> dict:
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
        if (width, height) != (view.width, view.height):
            raise ValueError(f"{view.rgb_path}: {width}x{height} pixels, others of the scan {view.width}x{view.height}")
    boxes = [_labelled(scene, box) for box in scene.boxes]
    view_sets = []
    for number, selection in enumerate(selections):
        selection = replace(selection, views=[keep_depth(view) for view in selection.views])
        record = scene_record(scene, selection, root)
        if settings["view_sets"] > 1:
            record["view_set"] = number
        has_depth = all(view.depth_path is not None for view in selection.views)
        shown = visible_boxes(scene, selection.views) if has_depth and scene.boxes else None
        view_sets.append(
            {
                "record": record,
                "shown": None if shown is None else [boxes[index].object_id for index in np.flatnonzero(shown)],
            }
        )
    center = mesh_center(scan_dir)
    return {
        "scene_id": scene.scene_id,
        "visit_id": scene.visit_id,
        "view_sets": view_sets,
        "boxes": [box_record(box) for box in boxes],
        "mesh_to_world": rounded(scene.metadata["mesh_to_world"], 9),
        "mesh_center": None if center is None else rounded(center, 6),
    }


def _build_scans(
    wanted: set[str],
    scans: Path | str,
    cache_dir: Path,
    settings: dict,
    skip_missing: bool,
    workers: int | None,
    progress: bool,
) -> tuple[Path, dict[str, dict], dict[str, str]]:
    """(folder that holds scans and pictures, what `build_scan` makes by scene id, reason by scene id left out)."""
    scan_dirs = find_scenes(scans)
    # Scan folders and exported pictures lie side by side: <root>/scans/<id>, <root>/posed_images/<id>.
    root = Path(os.path.commonpath([scan_dir.parent.parent for scan_dir in scan_dirs] or [Path(scans).absolute()]))
    scenes, left_out = {}, {name: "not there" for name in wanted - {scan_dir.name for scan_dir in scan_dirs}}
    if not left_out or skip_missing:
        work = partial(build_scan, root=root, cache_dir=cache_dir, settings=settings)
        paths = [scan_dir for scan_dir in scan_dirs if scan_dir.name in wanted]
        for built in run_all(work, paths, workers, progress):
            if "error" in built:
                left_out[built["scene_id"]] = built["error"]
            else:
                scenes[built["scene_id"]] = built
    if left_out and not skip_missing:
        raise ValueError(f"{scans}: {_listing(left_out, len(wanted))}")
    return root, scenes, dict(sorted(left_out.items()))


def _listing(left_out: dict[str, str], num_wanted: int) -> str:
    lines = [f"  {name}: {reason}" for name, reason in sorted(left_out.items())[:MAX_LISTED]]
    if len(left_out) > MAX_LISTED:
        lines.append(f"  ... and {len(left_out) - MAX_LISTED} more")
    heading = f"{len(left_out)} of the {num_wanted} scans that are asked about are missing or broken"
    return "\n".join([f"{heading}; mend them, or leave their questions out with --skip-missing:", *lines])


def _located(record: dict, number: int, annotations: AnnotationFile, scenes: dict[str, dict]) -> dict:
    """The whole sample: the record with its scan's view set of that number and all that only the scan tells."""
    scene = scenes[record["scene_id"]]
    sample = {**scene["view_sets"][number]["record"], **record}
    if number:
        sample["question_id"] += f"-v{number}"
    return sample | _places(record, annotations.agents.get(record["question_id"]), scene)


def _places(record: dict, agent: tuple[np.ndarray, np.ndarray] | None, scene: dict) -> dict:
    """{boxes of the record's objects, action_json of an instruction, agent: where its speaker is}, as far as known.

    Questions about a scan whose instances nobody knows (ScanNet's own test scans) stay without boxes.
    """
    places = {}
    boxes = {box["object_id"]: box for box in scene["boxes"]}
    unknown = [name for name in record.get("object_ids", ()) if name not in boxes]
    needs_boxes = "instruction" in record or BOX_MARKER.search(record["question"])
    if unknown and (boxes or needs_boxes):
        raise ValueError(
            f"question {record['question_id']}: the scan {record['scene_id']} has no objects {unknown}; fetch its "
            "aggregation and segments, in the version that the annotations are about"
        )
    if "object_ids" in record and not unknown:
        places["boxes"] = [boxes[name] for name in record["object_ids"]]
    if "instruction" in record:
        places["action_json"] = _action(record["scene_id"], [box_from_record(box) for box in places["boxes"]])
    if agent is not None and scene["mesh_center"] is not None:
        mesh_to_world = np.reshape(scene["mesh_to_world"], (4, 4))
        places["agent"] = agent_record(*agent, mesh_to_world, np.array(scene["mesh_center"]))
    return places


def _action(scene_id: str, boxes: list[OrientedBox]) -> str:
    """Text of the action that marks the boxes: one anchor, an array of several, or none."""
    if not boxes:
        return json.dumps({"action": "none", "scene": scene_id, "reason": "not_present"})
    anchors = [place_anchor_action(scene_id, box) for box in boxes]
    return anchors[0] if len(anchors) == 1 else f"[{', '.join(anchors)}]"


def _labelled(scene: Scene, box: OrientedBox) -> OrientedBox:
    """The box with the category that actions know it by, and at least MIN_EXTENT (metres) thick."""
    category = scene.attributes.get(box.object_id, {}).get("category") or box.label
    label = re.sub(r"[^a-z0-9]+", "_", category.lower()).strip("_")
    return replace(box, label=label, extent=np.maximum(box.extent, MIN_EXTENT))


def _fingerprint(scene: Scene, root: Path) -> str:
    """Changes with the scan's boxes and poses, and size and time of its mesh and its pictures."""
    views = [
        [
            path.relative_to(root).as_posix() if path else None,
            _stamp(path),
        ]
        for view in scene.views
        for path in (view.rgb_path, view.depth_path)
    ]
    geometry = [[view.K.tolist(), view.camera_to_world.tolist()] for view in scene.views if view.posed]
    mesh = [_stamp(scene.mesh_path), scene.metadata["mesh_to_world"]]
    return digest([scene.scene_id, scene.visit_id, views, geometry, mesh, [box_record(box) for box in scene.boxes]])


def _stamp(path: Path | None) -> list[int] | None:
    return [path.stat().st_size, path.stat().st_mtime_ns] if path and path.is_file() else None


def _is_shown(record: dict, number: int, scenes: dict[str, dict]) -> bool:
    """Whether the views of that set show every object that the record is about, as far as depth tells."""
    shown = scenes[record["scene_id"]]["view_sets"][number]["shown"]
    return shown is None or set(record.get("object_ids", ())) <= set(shown)


def _group_counts(records: list[dict]) -> dict:
    """Manifest entries: records by question_type and eval_type where they have one, and the number of answers."""
    counts = {}
    if "question_type" in records[0]:
        counts["question_type"] = type_counts(records)
    if "eval_type" in records[0]:
        counts["eval_type"] = dict(sorted(Counter(record["eval_type"] for record in records).items()))
    if "answers" in records[0]:
        answers = [len(record["answers"]) for record in records]
        counts["answers"] = {"given": sum(answers), "hidden": answers.count(0)}
    return counts


def _target_counts(chosen: list[tuple[dict, int]], scenes: dict[str, dict]) -> dict:
    """How many objects the records ask for, and how many of them their own views show, where depth tells."""
    asked = shown = 0
    for record, number in chosen:
        in_view = scenes[record["scene_id"]]["view_sets"][number]["shown"]
        if in_view is not None:
            asked += len(record.get("object_ids", ()))
            shown += len(set(record.get("object_ids", ())) & set(in_view))
    return {"asked": asked, "shown": shown}


def _without_agent(chosen: list[tuple[dict, int]], annotations: AnnotationFile, scenes: dict[str, dict]) -> int:
    """Records whose speaker's place is told, but relative to a mesh that is not there."""
    return sum(
        record["question_id"] in annotations.agents and scenes[record["scene_id"]]["mesh_center"] is None
        for record, _ in chosen
    )


def _view_statistics(scenes: dict[str, dict]) -> dict:
    """How well the chosen views show the scans: parallax in metres and the share of seen voxels they cover."""
    records = [view_set["record"] for scene in scenes.values() for view_set in scene["view_sets"]]
    statistics = {}
    for name in ("baseline_m", "coverage"):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            statistics[name] = {"min": min(values), "median": float(np.median(values))}
    return statistics


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
