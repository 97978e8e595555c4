"""Draws the README's pictures: `python -m roomplan_lib.viz.readme SCENES RUN FIGURES`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from roomplan_lib.samples.views import select_views
from roomplan_lib.scenes.arkitscenes import read_scene
from roomplan_lib.viz import room_figure

ROOM = "Training/80000002"


def draw(scenes: Path, run_dir: Path, figures: Path) -> None:
    """Writes room.png of one room below `scenes`, and <run>_anchors.png and <run>_curve.png of the run.

    All have 256 colours, a third of the size in git.
    """
    figures.mkdir(exist_ok=True)
    scene = read_scene(scenes / ROOM)
    room = figures / "room.png"
    room_figure(scene, select_views(scene, 8)).savefig(room)
    sources = {room: room} | {figures / f"{run_dir.name}_{n}.png": run_dir / f"{n}.png" for n in ("anchors", "curve")}
    for target, source in sources.items():
        with Image.open(source) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(target, optimize=True)
        print(target)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
