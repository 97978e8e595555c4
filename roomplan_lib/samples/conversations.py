"""Conversations about single pictures of ScanNet scans, in LLaVA's format: what stage 1 learns from on a small machine.

    annotations/llava/llava_{train,val}.json    [{id, image, conversations: [{from: human|gpt, value}]}]

What is said follows from how many pixels of a picture lie in each box of its scan, with a margin: an object that few
pixels show is neither there nor missing. `image` is relative to the folder that holds the scans.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from roomplan_lib.files import write_whole
from roomplan_lib.samples.describe import with_article
from roomplan_lib.samples.visibility import MIN_VISIBLE_PIXELS, pixels_in_boxes
from roomplan_lib.scenes import View
from roomplan_lib.scenes.scannet import find_scenes, read_scene

STRUCTURE = frozenset({"wall", "floor", "ceiling"})  # in every picture of a room, so nothing to ask about
CLEARLY_LARGER = 2.0  # times as many pixels: then one thing takes up more of the picture than another


def write_conversations(root: Path | str, seed: int = 0, every: int = 4, progress: bool = True) -> list[Path]:
    """Write conversations about every `every`-th picture of each scan below `root`; returns the files' paths.

    The split is that of root/scannetv2_val.txt. Files that are there are replaced; one without a picture to talk
    about is not written. Raises ValueError when there is no scan, or a scan lacks its depth.
    """
    root = Path(root)
    scans = find_scenes(root)
    if not scans:
        raise ValueError(f"{root}: no ScanNet scan; make some with `roomplan rooms --layout scannet`")
    listed = root / "scannetv2_val.txt"
    held_out = set(listed.read_text().split()) if listed.is_file() else set()
    entries: dict[str, list[dict]] = {"train": [], "val": []}
    for path in tqdm(scans, desc="conversations", unit="scan", disable=not progress):
        scene = read_scene(path)
        views = scene.views[::every]
        labels = [box.label for box in scene.boxes]
        for view, pixels in zip(views, pixels_in_boxes(scene, views), strict=True):
            turns = list(_turns(scene.scene_id, view, labels, pixels, seed))
            if turns:
                picture = view.rgb_path.relative_to(root.absolute()).as_posix()
                split = "val" if scene.scene_id in held_out else "train"
                entries[split].append({"id": f"{scene.scene_id}-{view.view_id}", "image": picture, **_told(turns)})
    files = []
    for split, told in entries.items():
        if told:
            files.append(root / "annotations" / "llava" / f"llava_{split}.json")
            write_whole(files[-1], json.dumps(told, indent=1) + "\n")
    return files


def _turns(scene_id: str, view: View, labels: list[str], pixels: np.ndarray, seed: int) -> Iterator[tuple[str, str]]:
    """(question, answer) about one picture; pixels [num_boxes], of a picture of 256x192."""
    area: dict[str, float] = {}
    for label, count in zip(labels, pixels, strict=True):
        if label not in STRUCTURE:
            area[label] = area.get(label, 0.0) + float(count)
    shown = sorted((label for label in area if area[label] >= MIN_VISIBLE_PIXELS), key=lambda label: -area[label])
    hidden = sorted(label for label in area if area[label] == 0)
    if not shown:
        return
    chance = random.Random(f"{seed}/{scene_id}/{view.view_id}")
    yield "Which things does the picture show?", ", ".join(shown)
    asked = [(chance.choice(shown), "yes")] + ([(chance.choice(hidden), "no")] if hidden else [])
    chance.shuffle(asked)
    for label, answer in asked:
        yield f"Does the picture show {with_article(label)}?", answer
    if len(shown) > 1 and area[shown[0]] >= CLEARLY_LARGER * area[shown[1]]:
        first, second = chance.sample(shown[:2], 2)
        yield f"What takes up more of the picture, the {first} or the {second}?", f"the {shown[0]}"


def _told(turns: list[tuple[str, str]]) -> dict:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        marker = "<image>\n" if number == 0 else ""
        conversation += [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"conversations": conversation}
