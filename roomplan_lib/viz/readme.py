"""Draws the README's pictures: `python -m roomplan_lib.viz.readme SCENES RUN FIGURES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from roomplan_lib.evaluation.rows import asked_scenes
from roomplan_lib.evaluation.scores import is_action_row, read_predictions
from roomplan_lib.samples.views import select_views
from roomplan_lib.scenes.arkitscenes import read_scene
from roomplan_lib.viz import curve_figure, room_figure, save_anchors_figure

ROOM = "Training/80000002"
SHIPPED = "roomplan-tiny"
WEIGHTS = Path(__file__).parents[1] / "weights" / SHIPPED
STAGES = {  # that trained it, one after another
    "tiny_rooms": "metrics_tiny_rooms.jsonl",
    "tiny_colors": "metrics_tiny_colors.jsonl",
    "tiny_plans": "metrics.jsonl",
}


def draw(scenes: Path, run_dir: Path, figures: Path) -> None:
    """Writes room.png of one room below `scenes`, <run>_curve.png and <run>_anchors.png of the run, and of the model
    that comes with the package roomplan-tiny_curve.png, how it was trained, and roomplan-tiny_anchors.png, what it says
    of the same rooms.

    All have 256 colours, a third of the size in git.
    """
    figures.mkdir(exist_ok=True)
    scene = read_scene(scenes / ROOM)
    room = figures / "room.png"
    room_figure(scene, select_views(scene, 8)).savefig(room)
    sources = {room: room} | {figures / f"{run_dir.name}_{n}.png": run_dir / f"{n}.png" for n in ("anchors", "curve")}
    shipped, file = figures / f"{SHIPPED}_anchors.png", run_dir / "predictions" / SHIPPED / "predictions.jsonl"
    rows = [row for row in read_predictions(file) if is_action_row(row)]
    shown = sorted({row["scene_id"] for row in rows})[:2]
    save_anchors_figure(list(asked_scenes(file, shown).values()), rows, shipped, max_anchors=8)
    curve = figures / f"{SHIPPED}_curve.png"
    metrics = {name: (WEIGHTS / file).read_text().splitlines() for name, file in STAGES.items()}
    curve_figure({name: [json.loads(line) for line in lines] for name, lines in metrics.items()}).savefig(curve)
    sources |= {shipped: shipped, curve: curve}
    for target, source in sources.items():
        with Image.open(source) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(target, optimize=True)
        print(target)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
