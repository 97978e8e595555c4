"""The anchor browser in JupyterLab, in Chromium: run all, move a slider, pick samples and boxes, watch the pixels."""

import dataclasses
import io
import json
import re

import numpy as np
import pytest
from lab import PROJECT, missing_browser, open_notebook, open_page, run_all, start_lab
from PIL import Image

from roomplan_lib.actions import action_record, format_action
from roomplan_lib.evaluation.baselines import moved
from roomplan_lib.evaluation.rows import baseline_predictions
from roomplan_lib.samples import read_samples
from roomplan_lib.samples.targets import reference_action, scene_action

pytestmark = pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "a browser is there")

NUM_POINTS = 1500


@pytest.fixture(scope="module")
def answered(sample_files, tmp_path_factory):
    """Two runs about two rooms: the constant baseline, and the truth moved by 20 cm, a list of two boxes first."""
    folder = tmp_path_factory.mktemp("runs")
    path = baseline_predictions(list(sample_files.values()), folder / "constant" / "predictions.jsonl")
    rng = np.random.default_rng(0)
    rows = []
    for number, record in enumerate(read_samples(sample_files["anchors_val"])):
        true, scene = moved(reference_action(record), 0.2, rng), scene_action(record)
        near = dataclasses.replace(scene, center=tuple(np.add(scene.center, [0.1, 0.1, 0.1])))
        rows.append({
            "index": number, "scene_id": record["scene_id"], "task": record["task"],
            "question": record["instruction"], "prediction": format_action(true),
            "reference": format_action(reference_action(record)), "question_id": record["question_id"],
            "action": action_record(near), "reference_action": action_record(scene), "view_ids": record["view_ids"],
        })  # fmt: skip
    same = [row for row in rows[1:] if row["scene_id"] == rows[0]["scene_id"]][0]
    pair = rows[0] | {"task": "place_anchors", "question": "Place an anchor on both.", "question_id": "pair"}
    pair |= {key: [rows[0][key], same[key]] for key in ("action", "reference_action")}
    pair |= {key: f"[{rows[0][key]},{same[key]}]" for key in ("prediction", "reference")}
    near = folder / "near" / "predictions.jsonl"
    near.parent.mkdir()
    near.write_text("".join(json.dumps(row) + "\n" for row in [pair, *rows]))
    (near.parent / "predictions.manifest.json").write_text(path.with_suffix(".manifest.json").read_text())
    return [near, path]


@pytest.fixture(scope="module")
def lab(answered, tmp_path_factory):
    """JupyterLab over a copy of notebook 05 whose parameters name these runs."""
    root = tmp_path_factory.mktemp("lab")
    notebook = json.loads((PROJECT / "notebooks" / "05_compare_anchors.ipynb").read_text())
    values = {"predictions": list(map(str, answered)), "output": str(root / "out"), "max_points": NUM_POINTS}
    cell = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = "".join(cell["source"]) + "".join(f"\n{name} = {value!r}" for name, value in values.items())
    (root / "05_compare_anchors.ipynb").write_text(json.dumps(notebook))
    with start_lab(root, tmp_path_factory.mktemp("scratch")) as server:
        yield server


@pytest.fixture(scope="module")
def page(lab):
    with open_page(lab) as page:
        open_notebook(page, lab, "05_compare_anchors.ipynb")
        run_all(page)
        page.locator(".anchor-browser").first.scroll_into_view_if_needed()
        page.locator(".anchor-browser .js-plotly-plot canvas").first.wait_for()
        yield page


def pixels(page, locator) -> np.ndarray:
    """uint8 [H, W, 3] once two pictures in a row are the same: WebGL without a GPU takes its time."""
    before = None
    for _ in range(30):
        shown = locator.screenshot()
        if shown == before:
            break
        before = shown
        page.wait_for_timeout(400)
    return np.asarray(Image.open(io.BytesIO(shown)).convert("RGB"))


def changed_share(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a.astype(int) - b).max(axis=2) > 40).mean())


def test_the_room_is_drawn(page):
    figure = page.locator(".anchor-browser .js-plotly-plot").first
    shown = pixels(page, figure)
    assert len(np.unique(shown.reshape(-1, 3) // 16, axis=0)) > 40
    traces = figure.evaluate("e => e.data.map(t => [t.name, (t.x || []).length])")
    sizes = dict(traces)
    assert 0 < sizes["surface"] <= NUM_POINTS
    assert page.locator(".anchor-browser figure svg").count() == 6
    assert page.locator(".jp-OutputArea-output img").count() >= 2  # the figure of the worst, middle and best; the plan


def test_picking_a_box_highlights_it_everywhere(page):
    figure = page.locator(".anchor-browser .js-plotly-plot").first
    boxes = page.locator(".anchor-browser select[size='4']")
    first, strip = pixels(page, figure), page.locator(".anchor-browser figcaption").all_inner_texts()
    boxes.select_option(index=1)
    page.wait_for_function(
        "n => { const t = document.querySelector('.anchor-browser .js-plotly-plot').data"
        ".find(t => t.name === 'true selected'); return t && t.x.length > 0 && t.x[0] !== n }",
        arg=figure.evaluate("e => e.data.find(t => t.name === 'true').x[0]"),
    )
    page.wait_for_timeout(500)
    second = pixels(page, figure)
    assert changed_share(first, second) > 0.002
    assert page.locator(".anchor-browser .widget-dropdown", has_text="box").locator("select").last.input_value()
    assert page.locator(".anchor-browser figcaption").all_inner_texts() != strip


def test_picking_a_sample_by_keyboard_changes_the_figure(page):
    figure = page.locator(".anchor-browser .js-plotly-plot").first
    before, asked = pixels(page, figure), page.get_by_text("Place an anchor on both.").first
    asked.wait_for()
    page.locator(".anchor-browser select[size='11']").focus()
    page.keyboard.press("ArrowDown")
    page.get_by_text("sample 2 of").first.wait_for()
    page.wait_for_timeout(500)
    assert changed_share(before, pixels(page, figure)) > 0.002


def test_a_slider_leaves_only_what_fits(page):
    count = page.get_by_text(re.compile(r"^\d+ of \d+ samples$")).first
    everything = count.inner_text()
    slider = page.locator(".anchor-browser .widget-slider", has_text="IoU at most")
    slider.locator(".noUi-handle").focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("before => !document.body.innerText.includes(before)", arg=everything)
    kept, total = map(int, re.findall(r"\d+", count.inner_text()))
    assert 0 < kept < total


def test_next_worst_and_a_note(page, answered):
    page.get_by_role("button", name="next worst").click()
    page.wait_for_timeout(500)
    note = page.locator(".anchor-browser textarea")
    note.fill("a note from the test")
    page.locator(".anchor-browser select[size='11']").focus()
    page.get_by_text("kept in").first.wait_for()
    kept = [json.loads(line) for line in (answered[0].parent / "notes.jsonl").read_text().splitlines()]
    assert [row["note"] for row in kept] == ["a note from the test"]


def test_turning_the_room_by_mouse(page):
    figure = page.locator(".anchor-browser .js-plotly-plot").first
    before, place = pixels(page, figure), figure.bounding_box()
    x, y = place["x"] + place["width"] * 0.6, place["y"] + place["height"] * 0.5
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 120, y + 20, steps=3)
    page.mouse.up()
    page.wait_for_timeout(500)
    assert changed_share(before, pixels(page, figure)) > 0.02


def test_nothing_was_asked_of_the_network_and_nothing_failed(page):
    assert page.external == []
    assert page.errors == []
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
