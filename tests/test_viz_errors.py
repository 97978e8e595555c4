"""Figures of errors: the numbers in them are the table's, the words in them are whole, texts of others do no harm."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from roomplan_lib import viz
from roomplan_lib.actions import PlaceAnchor, action_record, anchor_from_box, format_action
from roomplan_lib.evaluation.errors import CLASSES, bin_scores, calibration, error_table, failure_counts, worst
from roomplan_lib.evaluation.scores import score_predictions
from roomplan_lib.geometry import box_corners, project
from roomplan_lib.scenes.arkitscenes import read_scene
from roomplan_lib.viz.answers import load_answers
from roomplan_lib.viz.errors import CLASS_STYLES
from roomplan_lib.viz.examples import examples_table
from roomplan_lib.viz.gallery import MAX_CARDS
from roomplan_lib.viz.tables import runs_table, text_cell

sys.path.insert(0, str(Path(__file__).parent))
import scene_files

PROJECT = Path(__file__).parents[1]
HOSTILE = (
    "$\\frac$",
    "<script>alert(1)</script>|`x`",
    "\x00\x1b[31m\u2028\n# head",
    "x" * 30_000,
    "家具 🪑",
    "",
)


def anchor_rows(count, rng, scenes=6):
    rows = []
    for k in range(count):
        category = str(rng.choice(["bed", "chair", "sofa"]))
        true = PlaceAnchor(category, tuple(rng.uniform(-4, 4, 3).tolist()), (1.0, 0.0, 0.0), (1.0, 0.6, 0.8))
        center = tuple(np.add(true.center, rng.normal(0, 0.3, 3)).tolist())
        said = PlaceAnchor(category, center, (1.0, 0.0, 0.0), (1.0, 0.6, 0.8))
        row = {"scene_id": f"s{k % scenes}", "task": "place_anchor", "question": f"Where is the {category}?"}
        row |= {"reference": format_action(true, "m2"), "reference_action": action_record(true)}
        row |= {"confidence": [float(rng.uniform())], "view_ids": [str(v) for v in range(2 + k % 3)]}
        text = "?" if k % 10 == 9 else format_action(said, "m2")
        rows.append(row | {"prediction": text, "action": None if text == "?" else action_record(said)})
    return rows


def question_rows(count, rng, scenes=6):
    words = rng.choice(["What", "How", "Is"], count)
    return [
        {"scene_id": f"s{k % scenes}", "task": "qa", "question": f"{word} is it?", "reference": "2",
         "prediction": str(rng.choice(["2", "3", "a chair"]))} for k, word in enumerate(words)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tables():
    """Two runs of 200 anchors and 100 questions each."""
    runs = {}
    for seed, name in enumerate(("model", "blind")):
        rng = np.random.default_rng(seed)
        runs[name] = error_table(anchor_rows(200, rng) + question_rows(100, rng))
    return runs


def assert_words_are_whole(figure):
    """Every letter lies inside the figure, and no two texts lie on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    texts = list(figure.texts)
    for ax in figure.axes:
        if ax.axison:
            texts += [ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
            for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
                low, high = min(limits) - 1e-6, max(limits) + 1e-6
                texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += ax.get_legend().get_texts() if ax.get_legend() else []
    for legend in figure.legends:
        texts += legend.get_texts()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts if t.get_text().strip() and t.get_visible()]
    for text, box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, f"cut: {text!r}"
    for k, (text, box) in enumerate(boxes):
        for other, second in boxes[k + 1 :]:
            shared = min(box.x1, second.x1) - max(box.x0, second.x0), min(box.y1, second.y1) - max(box.y0, second.y0)
            assert min(shared) < 3, f"{text!r} lies on {other!r}"


def picture(figure):
    figure.savefig(buffer := io.BytesIO(), format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


PARTS = ["category", "distance_m", "longest_side_m", "volume_m3", "num_views"]


def test_parts_are_drawn_at_their_values(tables):
    figure = viz.bins_figure(tables, PARTS)
    assert_words_are_whole(figure)
    assert "200 anchors of 6 scenes" in figure.texts[0].get_text()
    drawn = [ax for ax in figure.axes if ax.axison]
    assert len(drawn) == len(PARTS)
    for ax, by in zip(drawn, PARTS, strict=True):
        labels = [part.label for part in bin_scores(tables["model"], by)]
        markers = [line for line in ax.lines if line.get_marker() != "None"]
        for line, (name, table) in zip(markers, tables.items(), strict=True):
            assert line.get_label() == name
            bins = bin_scores(table, by, bins=labels)
            np.testing.assert_allclose(line.get_xdata(), [part.value for part in bins])
        bars = [tuple(line.get_xdata()) for line in ax.lines if line.get_marker() == "None"]
        expected = [part.interval for table in tables.values() for part in bin_scores(table, by, bins=labels)]
        assert sorted(bars) == sorted(interval for interval in expected if interval)
        counts = [part.num_samples for part in bin_scores(tables["model"], by)]
        assert [int(t.get_text().split("(")[-1][:-1]) for t in ax.get_yticklabels()] == counts


def test_bars_of_failures_have_the_shares_of_the_classes(tables):
    figure = viz.failures_figure(tables)
    assert_words_are_whole(figure)
    for ax, section in zip(figure.axes, ("anchors", "questions"), strict=True):
        widths = [patch.get_width() for patch in ax.patches]
        expected = []
        for table in tables.values():
            counts = failure_counts(table)[section]
            expected += [count / sum(counts.values()) for count in counts.values()]
        np.testing.assert_allclose(widths, expected)
        shown = {text.get_text() for text in ax.get_legend().get_texts()}
        assert shown == {n for t in tables.values() for n, count in failure_counts(t)[section].items() if count}


def test_every_class_has_a_look_of_its_own_in_its_section():
    for section, classes in CLASSES.items():
        looks = [CLASS_STYLES[name] for name in classes]
        assert len(set(looks)) == len(looks), section


def test_calibration_is_drawn_at_its_numbers(tables):
    figure = viz.calibration_figure(tables)
    assert_words_are_whole(figure)
    left, right = figure.axes
    lines = [line for line in left.lines if line.get_marker() != "None"]
    for line, table in zip(lines, tables.values(), strict=True):
        found = calibration(table)
        np.testing.assert_allclose(line.get_xydata(), [(mean, part.value) for mean, part in found.bins])
        assert f"ECE {found.ece:.2f}" in line.get_label()
    total = sum(patch.get_height() for patch in right.patches)
    assert total == sum(calibration(table).num_samples for table in tables.values())


def test_reach_ends_at_the_share_of_valid_anchors(tables):
    figure = viz.reach_figure(tables)
    assert_words_are_whole(figure)
    left, right = figure.axes
    errors, shares = left.lines[0].get_data()
    table = tables["model"].section("anchors")
    assert shares[-1] == pytest.approx(np.isfinite(table["center_error_m"]).mean())
    assert shares[np.searchsorted(errors, 0.5, side="right") - 1] == pytest.approx(
        (table["center_error_m"] <= 0.5).mean()
    )
    ious, reached = right.lines[0].get_data()
    assert reached[ious >= 0.25].max() == pytest.approx((table["iou_3d"] >= 0.25).mean())


def test_where_nothing_is_known_a_line_says_so():
    table = error_table(question_rows(4, np.random.default_rng(0)))
    for figure in (
        viz.bins_figure({"model": table}, PARTS), viz.calibration_figure({"model": table}),
        viz.reach_figure({"model": table}), viz.gallery_figure(table.section("anchors")),
        viz.failures_figure({"model": table}, ["plans"]), viz.examples_figure(table),
    ):  # fmt: skip
        assert figure.texts[0].get_text().startswith("nothing to show")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("said", ["nonsense", '{"action":"no_action"}', None], ids=["invalid", "refused", "perfect"])
def test_runs_without_an_error_in_metres_have_figures(said):
    rows = anchor_rows(4, np.random.default_rng(0))
    table = error_table([row | {"prediction": said or row["reference"], "action": None} for row in rows])
    for figure in (viz.reach_figure({"model": table}), viz.bins_figure({"model": table}, PARTS)):
        picture(figure)


def test_a_run_that_was_asked_something_else_does_not_hide_the_others():
    rng = np.random.default_rng(0)
    tables = {"words": error_table(question_rows(4, rng)), "anchors": error_table(anchor_rows(30, rng))}
    figure = viz.bins_figure(tables, ["category"])
    alone = viz.bins_figure({"anchors": tables["anchors"]}, ["category"])
    places, expected = (part.axes[0].lines[-1].get_xydata() for part in (figure, alone))
    np.testing.assert_array_equal(places, expected)
    # A run looks the same in all figures, whichever others have something to show there.
    colors = {part.axes[0].lines[-1].get_color() for part in (figure, viz.reach_figure(tables))}
    assert len(colors) == 1 and colors != {viz.PREDICTED_COLOR}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    boxes = [
        scene_files.box("bed", 1.5, 1.2, 0.4, (2.0, 1.5, 0.6)),
        scene_files.box("table", -1.2, -1.0, -0.3, (1.2, 0.8, 0.75)),
    ]
    scene = read_scene(scene_files.write_scene(tmp_path_factory.mktemp("scene"), boxes))
    rows = []
    for k, text in enumerate(HOSTILE):
        true = anchor_from_box(scene.boxes[k % 2], scene.scene_id)
        said = anchor_from_box(scene.boxes[(k + k // 2) % 2], scene.scene_id)
        row = {"scene_id": scene.scene_id, "question": f"Where? {text}", "view_ids": [v.view_id for v in scene.views]}
        row |= {"reference": format_action(true.bound(""), "m2"), "reference_action": action_record(true)}
        valid = k < 4
        row |= {"prediction": format_action(said.bound(""), "m2") if valid else text}
        rows.append(row | {"action": action_record(said) if valid else None})
    return scene, error_table(rows, {scene.scene_id: scene})


def test_a_gallery_draws_boxes_in_the_view_that_shows_most(room):
    scene, table = room
    figure = viz.gallery_figure(table, {scene.scene_id: scene}, title="Worst $x$")
    assert_words_are_whole(figure)
    image = picture(figure).astype(int)
    for color in (viz.TRUE_COLOR, viz.PREDICTED_COLOR):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(image - rgb).max(axis=-1) < 12).sum() > 200, color
    texts = [text.get_text() for text in figure.texts]
    assert f"{len(HOSTILE)}" in texts[-1] and all(name in " ".join(texts) for name in set(table["failure"]))
    pictures = [ax for ax in figure.axes if ax.images]
    assert len(pictures) == len(HOSTILE)
    blue = [part for part in pictures[2].collections if to_hex(part.get_colors()[0]) == viz.TRUE_COLOR.lower()]
    drawn = np.concatenate([segment for part in blue for segment in part.get_segments()])
    view = next(v for v in scene.views if (v.load_rgb() == pictures[2].images[0].get_array()).all())
    corners, depth = project(
        box_corners(scene.boxes[0]), view.K, view.camera_to_world
    )  # another than the predicted one
    assert (depth > 0.05).all()
    corners = np.clip(corners, -0.5, [view.width - 0.5, view.height - 0.5])
    np.testing.assert_allclose(drawn.min(axis=0), corners.min(axis=0), atol=2)  # a piece of an edge ends outside
    np.testing.assert_allclose(drawn.max(axis=0), corners.max(axis=0), atol=2)
    from roomplan_lib.samples.visibility import pixels_in_boxes

    best = pixels_in_boxes(scene, scene.views)[:, 0].argmax()
    np.testing.assert_array_equal(pictures[0].images[0].get_array(), scene.views[best].load_rgb())
    # On the map: the true centre and the predicted one, at the ends of one black line.
    maps = [ax for ax in figure.axes if not ax.images]
    first = table.rows[0]
    ends = [np.round(line.get_xydata(), 6).tolist() for line in maps[0].lines if line.get_color() == "black"]
    assert [np.round(first[key]["center"][:2], 6).tolist() for key in ("reference_action", "action")] in ends


def test_texts_of_others_do_no_harm(room):
    _, table = room
    questions = error_table(
        [{"scene_id": text, "question": text, "prediction": text, "reference": "2"} for text in HOSTILE]
    )
    for part in (table, questions):
        figure = viz.gallery_figure(part)
        picture(figure)
        assert len(figure.axes) == 0
    picture(viz.bins_figure({"$x": questions}, ["question_type"], "em", section="questions"))
    picture(viz.failures_figure({"$\\frac": questions, "x" * 200: questions}))
    for text in (viz.failure_examples(questions, "questions", 9), viz.failures_table(questions)):
        lines = text.splitlines()
        assert {line.replace("\\|", "").count("|") for line in lines} == {lines[0].count("|")}
        assert all(c.isprintable() or c == "\n" for c in text) and max(map(len, lines)) < 1000
    assert text_cell("<b>|`x`") == "`<b>\\|'x'`" and text_cell(" \n") == "-"
    assert len(text_cell("x" * 500)) <= 92


def test_examples_of_a_run_are_shown_as_they_are(tmp_path):
    rows = [{"scene_id": "s", "question": text, "prediction": text, "reference": "2"} for text in HOSTILE]
    rows.append({"scene_id": "s", "question": None, "prediction": '{"a":[1,2],"b":3}', "reference": "2"})
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    total, _, *lines = examples_table(load_answers(tmp_path), count=9).splitlines()
    assert total == f"0 right, {len(rows)} wrong, 0 invalid" and len(lines) == 2 + len(rows)
    assert {line.replace("\\|", "").count("|") for line in lines} == {5} and max(map(len, lines)) < 1000
    assert '`{"a":[1,2], "b":3}`' in lines[-1]  # a line may break behind the comma


def test_a_gallery_says_how_many_it_shows():
    rng = np.random.default_rng(0)
    table = error_table(question_rows(MAX_CARDS + 5, rng))
    assert f"{MAX_CARDS} of {MAX_CARDS + 5}" in viz.gallery_figure(table).texts[-1].get_text()


def test_runs_stand_side_by_side_with_their_controls():
    rng = np.random.default_rng(3)
    rows = question_rows(60, rng)
    scores = score_predictions(rows, controls={"blind": [row | {"prediction": "9"} for row in rows]})
    text = runs_table({"a": scores, "b": score_predictions(rows)})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [line[:2] for line in lines[2:]] == [["`a`", "model"], ["`a`", "blind"], ["`b`", "model"]]
    column = lines[0].index("exact match")
    low, high = scores["qa"]["model"]["ci95"]["em"]
    assert lines[2][column] == f"{scores['qa']['model']['em']:.3f} [{low:.3f}, {high:.3f}]"
    assert lines[3][column].startswith("0.000")
    assert runs_table({"a": scores, "hidden": {"protocols": {}}}).count("\n| `hidden`") == 0
    assert runs_table({"hidden": {"protocols": {}}}).startswith("Nothing to score")


def test_figures_of_a_thousand_samples_take_less_than_a_minute():
    rng = np.random.default_rng(5)
    start = time.process_time()
    runs = {name: error_table(anchor_rows(700, rng, 40) + question_rows(300, rng, 40)) for name in ("model", "blind")}
    figures = [
        viz.bins_figure(runs, PARTS), viz.bins_figure(runs, ["question_type"], "em", section="questions"),
        viz.failures_figure(runs), viz.calibration_figure(runs), viz.reach_figure(runs),
        viz.gallery_figure(worst(runs["model"], 12)), viz.examples_figure(runs["model"]),
    ]  # fmt: skip
    for figure in figures:
        picture(figure)
    seconds = time.process_time() - start
    print(f"tables and {len(figures)} figures of 2 x 1000 samples: {seconds:.1f} s of CPU")
    assert seconds < 60


@pytest.mark.slow
def test_the_notebook_is_useful_on_rows_without_geometry(tmp_path):
    rows = [
        {"index": k, "scene_id": f"scene{k % 9:04}_00", "question": q, "prediction": p, "reference": r}
        for k, (q, p, r) in enumerate(
            [("What is it?", "a chair", "chair"), ("Is it red?", "yes", "no"), ("How many?", "{'x'", "2")] * 20
        )
    ]
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, made = PROJECT / "notebooks" / "04_error_analysis.ipynb", tmp_path / "04.ipynb"
    command = [sys.executable, "-m", "papermill", str(source), str(made), "-y", f"predictions: [{path}]"]
    command += ["-p", "output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert made.stat().st_size < 3_000_000
    outputs = json.dumps([cell.get("outputs") for cell in json.loads(made.read_text())["cells"]])
    assert all(text in outputs for text in ("given: ", "wrong yes or no", "other kind", "exact match"))
    assert len((tmp_path / "out" / "given" / "model.csv").read_text().splitlines()) == 61
