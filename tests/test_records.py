"""Tables and figures of records against counts by hand; the folder of downloads prepared as a whole; plans of rooms."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from roomplan_lib import viz
from roomplan_lib.actions import PlaceAnchor, PlaceWall, parse_action
from roomplan_lib.cli import app
from roomplan_lib.config import DataConfig
from roomplan_lib.geometry import box_iou_3d
from roomplan_lib.samples import box_from_record, read_samples, sample_root, write_samples
from roomplan_lib.samples.annotation_files import write_annotations
from roomplan_lib.samples.downloads import find_downloads, prepare_downloads
from roomplan_lib.samples.plans import build_plans
from roomplan_lib.samples.targets import reference_action, response_text
from roomplan_lib.samples.validate import validate_file
from roomplan_lib.scenes import open_scene
from roomplan_lib.scenes.arkitscenes import find_scenes
from roomplan_lib.scenes.rooms import write_scannet_rooms
from roomplan_lib.training.collator import Collator, load_samples
from roomplan_lib.training.prompt import batch_text
from roomplan_lib.training.tokenizer import train_tokenizer
from roomplan_lib.viz.records import record_views


def cells(table: str) -> list[list[str]]:
    """Rows of a Markdown table below its head."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.fixture(scope="module")
def files(sample_files):
    return list(sample_files.values())


def test_tables_count_the_records(files):
    records = viz.read_files(files)
    rows = {row[0]: row for row in cells(viz.records_table(records))}
    for file in files:
        part = [json.loads(line) for line in file.read_text().splitlines()]
        row = rows[f"{file.parent.name}/{file.stem}"]
        assert row[1:3] == [str(len(part)), str(len({r["scene_id"] for r in part}))] and row[4] == "6"
    total = sum(int(count) for row in cells(viz.tasks_table(records)) for count in row[2:])
    assert total == sum(map(len, records.values()))


def test_shared_scenes_are_counted(files, tmp_path):
    assert [row[1:3] for row in cells(viz.overlap_table(files))] == [["0", "0"]]
    val = read_samples(files[-1]) + [read_samples(files[0])[0] | {"split": "val"}]
    write_samples(tmp_path / "mixed.jsonl", val, {"root": sample_root(files[-1])})
    (row,) = cells(viz.overlap_table([files[0], tmp_path / "mixed.jsonl"]))
    assert row[:3] == ["train and val", "1", "0"] and "mixed" in row[3]


def test_figures_show_what_the_records_hold(files):
    records = viz.read_files(files)
    answered = [r for part in records.values() for r in part if r.get("answer")]
    left, right = viz.answers_figure(answered).axes
    shares = {
        label.get_text(): bar.get_width() for label, bar in zip(left.get_yticklabels(), left.patches, strict=True)
    }
    answers = [r["answer"] for r in answered]
    assert shares["yes"] == pytest.approx(answers.count("yes") / len(answers))
    assert all(0 < bar.get_width() <= 1 for bar in right.patches)
    (ax,) = viz.coverage_figure(viz.by_split(records)).axes
    drawn = np.concatenate([line.get_xydata() for line in ax.lines if line.get_label()[0] != "_"])
    expected = {(r["baseline_m"], r["coverage"]) for part in records.values() for r in part}
    assert {tuple(point) for point in drawn} == expected
    (ax,) = viz.labels_figure(viz.by_split(records)).axes
    for bars in ax.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    lengths = viz.lengths_figure(viz.by_source(records)).axes[0].lines
    assert all(line.get_ydata()[-1] == pytest.approx(1) for line in lengths)
    for figure in (viz.answers_figure([]), viz.labels_figure({"a": []}), viz.coverage_figure({"a": []})):
        assert not figure.axes and "nothing to show" in figure.texts[0].get_text()


def test_a_record_gives_back_its_views(files, rooms_root):
    """Views made of a record are those of the scene that it was made from."""
    record, root = read_samples(files[0])[0], sample_root(files[0])
    scene = open_scene(next(path for path in find_scenes(rooms_root) if path.name == record["scene_id"]))
    by_id = {view.view_id: view for view in scene.views}
    for view in record_views(record, root):
        original = by_id[view.view_id]
        np.testing.assert_allclose(view.camera_to_world, original.camera_to_world, atol=1e-6)
        np.testing.assert_allclose(view.K, original.K, atol=1e-5)
        assert (view.load_rgb() == original.load_rgb()).all() and (view.load_depth() == original.load_depth()).all()
    figure = viz.record_figure(record, root)
    assert len(figure.axes) == 6 and record["instruction"] in figure.texts[0].get_text()


def test_slider_browses_every_file(files, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "as a server's kernel")
    box = viz.browse_records(files)
    chooser, slider = box.children[0].children
    assert len(chooser.options) == 4 and slider.max == len(read_samples(files[0])) - 1
    slider.value = 3
    chooser.value = chooser.options[-1]
    assert slider.value == 0 and slider.max == len(read_samples(files[-1])) - 1
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert "JupyterLab" in viz.browse_records(files).texts[0].get_text()


def test_a_batch_reads_as_text(files):
    tokenizer = train_tokenizer([], 0)
    collator = Collator(
        tokenizer, DataConfig(max_length=4096), num_visual_tokens=5, patch_size=14, needs_positions=None
    )
    samples = load_samples([files[0]])[:2]
    rows = batch_text(collator(samples), tokenizer).split("\n\n")
    for row, sample in zip(rows, samples, strict=True):
        prompt, response = row.split("\n=> ")
        assert sample.record["instruction"] in prompt and "<|image_pad|> x 5<" in prompt
        assert response == response_text(sample.record) + tokenizer.eos_token


def test_a_plan_holds_the_visible_boxes_and_the_walls(rooms_root):
    scene = open_scene(find_scenes(rooms_root)[0])
    visible = np.arange(len(scene.boxes)) % 2 == 0
    (sample,) = build_plans(scene, visible)
    plan = parse_action(sample["action_json"])
    anchors = [action.to_box() for action in plan.actions if isinstance(action, PlaceAnchor)]
    seen = [box for box, shown in zip(scene.boxes, visible, strict=True) if shown]
    assert len(anchors) == len(seen) == len(sample["boxes"])
    for box in seen:
        assert max(box_iou_3d(box, anchor) for anchor in anchors) > 0.99
    walls = [action for action in plan.actions if isinstance(action, PlaceWall)]
    room = json.loads(next(find_scenes(rooms_root)[0].glob("*_room.json")).read_text())
    assert len(walls) == len(room["walls"])
    assert sorted(wall.length for wall in walls) == pytest.approx(
        sorted(np.linalg.norm(np.subtract(w["end"], w["start"])) for w in room["walls"]), abs=1e-3
    )


def test_downloads_are_found_and_prepared(rooms_root, tmp_path):
    """A folder with both layouts and the annotation files, as a user drops them; every record is without fault."""
    raw, output = tmp_path / "raw", tmp_path / "processed"
    write_scannet_rooms(raw / "scans_of_mine" / "scannet", 5, seed=5, num_poses=8, progress=False)
    write_annotations(raw / "scans_of_mine" / "scannet", progress=False)
    (raw / "rooms").symlink_to(rooms_root)
    found = find_downloads(raw)
    assert {item.dataset for item in found} >= {
        "arkitscenes",
        "scanqa",
        "sqa3d",
        "scanrefer",
        "scan2cap",
        "multi3drefer",
    }
    assert all(item.scans.name == "scans" for item in found if item.dataset != "arkitscenes")
    files = prepare_downloads(raw, output, num_views=4, workers=1)
    assert all(file.parent.name in ("scannet", "rooms") for file in files)
    for file in files:
        assert validate_file(file) == [], file
    placing = [r for r in read_samples(output / "scannet" / "scanrefer_train.jsonl")][:5]
    for record in placing:
        target = box_from_record(record["boxes"][0])
        world = parse_action(record["action_json"], categories=None)
        assert box_iou_3d(world.to_box(), target) > 0.99
        assert re.fullmatch(r"[a-z_0-9 ]+", reference_action(record).category)
    with pytest.raises(ValueError, match="found no ARKitScenes folder"):
        prepare_downloads(tmp_path / "processed" / "scannet" / ".scans", output)
    with pytest.raises(ValueError, match="no such folder"):
        find_downloads(tmp_path / "nowhere")


def test_one_file_holds_all_tasks_of_a_split(rooms_root, tmp_path):
    output = tmp_path / "new" / "train.jsonl"
    arguments = ["prepare", "arkitscenes", "--root", str(rooms_root), "--num-views", "3", "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--split", "Training", "--output", str(output)])
    assert result.exit_code == 0, result.output
    records = read_samples(output)
    assert {r["split"] for r in records} == {"train"} and {"place_anchor", "qa_side"} <= {r["task"] for r in records}
    assert validate_file(output) == []
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 1 and "say --split" in result.output


def test_an_unwritable_output_is_one_line(rooms_root, tmp_path):
    (tmp_path / "taken").write_text("a file")
    result = CliRunner().invoke(
        app, ["prepare", "arkitscenes", "--root", str(rooms_root), "--output", str(tmp_path / "taken")]
    )
    assert result.exit_code == 1 and result.output.strip().splitlines()[-1].startswith("roomplan prepare arkitscenes:")
    assert (tmp_path / "taken").read_text() == "a file"
