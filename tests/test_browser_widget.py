"""The anchor browser without a browser: what is read, compared, chosen, shown and kept."""

import dataclasses
import html.parser
import json
import math
import time

import numpy as np
import pytest
from scene_files import SIZE, K, box, ray_depth
from scipy.optimize import linear_sum_assignment

from roomplan_lib import viz
from roomplan_lib.actions import action_record, anchor_from_box, format_action
from roomplan_lib.evaluation.box_metrics import box_errors
from roomplan_lib.evaluation.errors import error_table
from roomplan_lib.evaluation.rows import baseline_predictions
from roomplan_lib.geometry import OrientedBox, box_corners, look_at, rotation_z
from roomplan_lib.scenes import View, arkitscenes
from roomplan_lib.viz.anchors import shown_share
from roomplan_lib.viz.answers import (
    ERRORS,
    SORTS,
    Notes,
    Scenes,
    load_answers,
    nearest_pairs,
    notes_file,
    read_answer,
    scene_folders,
    upright_errors,
)
from roomplan_lib.viz.marking import MOST_SHOWN, marked_texts

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&amp;</td></table>"


def anchor_row(true, predicted=None, *, scene="room", index=0, text=None, **others):
    """A row as `predict` writes it, in a scene whose frame is also that of the texts."""
    read = None if predicted is None else anchor_from_box(predicted)
    row = {
        "index": index, "scene_id": scene, "task": "place_anchor", "question": f"Where is the {true.label}?",
        "prediction": text if text is not None else format_action(read),
        "reference": format_action(anchor_from_box(true)),
        "action": None if read is None else action_record(read),
        "reference_action": action_record(anchor_from_box(true)), "view_ids": None,
    }  # fmt: skip
    return row | others


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def predictions(sample_files, tmp_path_factory):
    """The constant baseline's answers about two held-out rooms, with their manifest."""
    folder = tmp_path_factory.mktemp("runs") / "constant"
    return baseline_predictions(list(sample_files.values()), folder / "predictions.jsonl")


@pytest.fixture
def hand_made(tmp_path):
    """Six answers about one scene, worst to best known by hand: see the expectations of the tests."""
    sofa, chair = box("sofa", 1, 2, size=(2, 1, 0.8)), box("chair", 0, 0)
    near = dataclasses.replace(sofa, center=sofa.center + [0.5, 0, 0])  # shares 1.5 of 2 m: IoU 1.5 / 2.5
    rows = [
        anchor_row(sofa, near, index=0),
        anchor_row(sofa, dataclasses.replace(sofa, center=sofa.center + [9, 0, 0]), index=1),
        anchor_row(chair, text="I cannot see it", index=2),
        anchor_row(chair, chair, index=3),
        {"index": 4, "scene_id": "hall", "question": "How many?", "prediction": "The three", "reference": "three"},
        {"index": 5, "scene_id": "hall", "question": "Where?", "prediction": "left", "reference": ""},
    ]
    return load_answers(write_rows(tmp_path / "run" / "predictions.jsonl", rows))


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_of_many_pairs_equal_the_exact_ones():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(300):
        boxes = [
            OrientedBox(rng.normal(size=3) * 0.4, rng.uniform(0.1, 2, 3), rotation_z(rng.uniform(-9, 9)))
            for _ in range(2)
        ]
        pairs.append(boxes)
    square = OrientedBox([0, 0, 0], [1, 1, 1], rotation_z(0.3))
    pairs += [[square, square], [square, OrientedBox([5, 5, 5], [1, 1, 1])], [OrientedBox([0, 0, 0], [0, 0, 0])] * 2]
    found = upright_errors([p for p, _ in pairs], [t for _, t in pairs])
    for i, (predicted, true) in enumerate(pairs):
        exact = box_errors(predicted, true)
        for name in ERRORS:
            assert found[name][i] == pytest.approx(exact[name], abs=1e-9), (name, i)
    assert (found["iou_3d"] > 0.05).sum() > 50


def test_outcomes_and_errors_by_hand(hand_made):
    assert hand_made.outcomes[:, 0].tolist() == ["right", "wrong", "invalid", "right", "right", "hidden"]
    assert hand_made.errors["iou_3d"][:4, 0] == pytest.approx([0.6, 0, 0, 1])
    assert hand_made.errors["center_error_m"][[0, 1, 3], 0] == pytest.approx([0.5, 9, 0])
    assert np.isnan(hand_made.errors["center_error_m"][[2, 4, 5], 0]).all()
    assert hand_made.categories.tolist() == ["sofa", "sofa", "chair", "chair", "words", "words"]
    assert "no JSON" in hand_made.answers[2][0].reason


def test_outcomes_agree_with_the_error_table(predictions):
    answers = load_answers(predictions)
    table = error_table([part[0].row for part in answers.answers])
    scored = np.isfinite(table["hit"])
    assert scored.sum() > 30 and 0 < np.nansum(table["hit"]) < scored.sum()
    assert ((answers.outcomes[:, 0] == "right") == (table["hit"] == 1))[scored].all()
    assert answers.failures(0).tolist() == table["failure"].tolist()
    assert answers.failure(5, 0) == table["failure"][5]


def test_pairs_minimise_distances_and_count_what_is_missing():
    true = [box("chair", 0, 0), box("chair", 4, 0), box("table", 2, 2)]
    predicted = [box("chair", 3.9, 0), box("chair", 0.2, 0)]
    assert nearest_pairs(true, predicted) == {0: 1, 1: 0}
    row = anchor_row(true[0], predicted[0])
    row["reference_action"] = [action_record(anchor_from_box(b)) for b in true]
    row["action"] = [action_record(anchor_from_box(b)) for b in predicted]
    assert read_answer(row).pairs == [(0, 1), (1, 0), (2, None)]
    row["reference_action"], row["action"] = row["action"], row["reference_action"]
    assert sorted(read_answer(row).pairs, key=str) == sorted([(0, 1), (1, 0), (None, 2)], key=str)
    distances = np.random.default_rng(1).normal(size=(2, 5, 3))
    many = [[OrientedBox(p, [1, 1, 1]) for p in part] for part in distances]
    cost = np.linalg.norm(distances[0][:, None] - distances[1][None], axis=-1)
    assert nearest_pairs(*many) == dict(zip(*map(list, linear_sum_assignment(cost)), strict=True))


def test_texts_alone_are_compared_in_their_own_frame(tmp_path):
    """Rows of another program: five keys, some texts no actions at all."""
    true, near = box("bed", 1, 1), box("bed", 1.1, 1)
    rows = [
        {"index": 0, "scene_id": "s", "question": "bed?", "prediction": format_action(anchor_from_box(near)),
         "reference": format_action(anchor_from_box(true))},
        {"index": 1, "scene_id": "s", "question": "bed?", "prediction": "{'broken': ",
         "reference": format_action(anchor_from_box(true))},
        {"index": 2, "scene_id": "s", "question": "colour?", "prediction": HOSTILE, "reference": '{"a": 1'},
    ]  # fmt: skip
    answers = load_answers(write_rows(tmp_path / "theirs.jsonl", rows))
    assert len(answers) == 3  # the question that stands twice is two samples
    assert answers.outcomes[:, 0].tolist() == ["right", "invalid", "wrong"]
    assert not answers.answers[0][0].in_scene
    browser = viz.anchor_browser(tmp_path / "theirs.jsonl", static=True)
    page = browser.to_html()
    assert "frame of the texts" in browser.room().problem or "does not tell" in browser.room().problem
    assert "<script>alert" not in page and "onerror=alert(1)>" not in page


# Choosing -------------------------------------------------------------------------------------------------------------


def test_choosing_and_sorting(hand_made):
    choose = hand_made.choose
    assert choose().tolist() == [0, 1, 2, 3, 4, 5]
    assert choose(sort="worst first").tolist() == [2, 1, 0, 3, 4, 5]
    assert choose(sort="best first").tolist()[:2] == [3, 0]
    assert choose(sort="IoU", category="sofa").tolist() == [1, 0]
    assert choose(sort="centre error").tolist()[:3] == [1, 0, 3]
    assert choose(scene="hall").tolist() == [4, 5]
    assert choose(outcome="invalid").tolist() == [2]
    assert choose(failure="invalid text").tolist() == [2]
    assert choose(most_iou=0.5).tolist() == [1, 2]  # answers in words have no IoU
    assert choose(least_center_error=0.4).tolist() == [0, 1]
    assert choose(search="CANNOT chair").tolist() == [2]
    assert choose(search="nowhere").tolist() == []
    with pytest.raises(ValueError, match="worst first"):
        choose(sort="IOU")


def test_runs_beside_each_other(tmp_path):
    sofa = box("sofa", 1, 2)
    good, bad = sofa, dataclasses.replace(sofa, center=sofa.center + 3)
    write_rows(tmp_path / "a" / "predictions.jsonl", [anchor_row(sofa, good), anchor_row(sofa, bad, scene="two")])
    write_rows(tmp_path / "b" / "predictions.jsonl", [anchor_row(sofa, bad, scene="three"), anchor_row(sofa, bad)])
    answers = load_answers([tmp_path / "a", tmp_path / "b"])
    assert answers.names == ("a", "b")
    assert answers.outcomes.tolist() == [["right", "wrong"], ["wrong", "missing"], ["missing", "wrong"]]
    assert answers.choose(run=1, outcome="wrong").tolist() == [0, 2]
    named = load_answers({"first": tmp_path / "a", "again": tmp_path / "a"})
    assert named.names == ("first", "again")
    browser = viz.anchor_browser([tmp_path / "a", tmp_path / "b"], static=True)
    assert "A: a" in browser.texts_html() and "B: b" in browser.texts_html()


@pytest.mark.parametrize(
    "text, message",
    [("", "holds no prediction"), ('{"scene_id": "a"}\n', "missing"), ('{"scene_id": "a", "ques', ":1: no prediction")],
)
def test_bad_predictions_are_named(tmp_path, text, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        viz.anchor_browser(path)
    assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="no predictions"):
        viz.anchor_browser(tmp_path / "nothing")


# Views and scenes -----------------------------------------------------------------------------------------------------


def posed_view(camera_to_world, depth_path=None):
    return View("v", None, depth_path, K, camera_to_world, 0.0, *SIZE)


def test_share_of_a_picture_by_dense_sampling(tmp_path):
    """Against points all over the box's surface, projected: the share of pixels that they hit."""
    camera = look_at(np.array([0.0, -3, 1.5]), np.array([0.0, 0, 0.4]))
    item = box("cabinet", 0.2, 0, yaw=0.4, size=(1.2, 0.7, 0.9))
    u = np.linspace(-0.5, 0.5, 400)
    grid = np.stack(np.meshgrid(u, u), -1).reshape(-1, 2)
    faces = []
    for axis in range(3):
        for side in (-0.5, 0.5):
            faces.append(np.insert(grid, axis, side, axis=1))
    points = (np.concatenate(faces) * item.extent) @ item.rotation.T + item.center
    seen = (points - camera[:3, 3]) @ camera[:3, :3]
    fine = 8  # cells a pixel, so that the rim's cells count little
    cells = np.floor((seen[:, :2] / seen[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2] + 0.5) * fine).astype(int)
    hit = {(x, y) for x, y in map(tuple, cells) if 0 <= x < SIZE[0] * fine and 0 <= y < SIZE[1] * fine}
    assert shown_share(posed_view(camera), item) == pytest.approx(len(hit) / np.prod(SIZE) / fine**2, abs=0.005)
    behind = box("cabinet", 0, -6)
    assert shown_share(posed_view(camera), behind) == 0
    around = OrientedBox(camera[:3, 3], [1, 1, 1])  # from within, nothing is seen of a box
    assert shown_share(posed_view(camera), around) == 0
    assert shown_share(View("v", None, None, None, None, 0.0, *SIZE), item) == 0


def test_hidden_boxes_are_not_shown(tmp_path):
    from PIL import Image

    camera = look_at(np.array([0.0, -2.2, 1.2]), np.array([0.0, 2, 0.4]))
    wall, item = box("shelf", 0, -0.6, size=(3, 0.1, 2)), box("bed", 0, 1.2)
    for boxes, expected in (([item], True), ([item, wall], False)):
        millimetres = (ray_depth(boxes, camera) * 1000).astype(np.uint16)
        path = tmp_path / f"{expected}.png"
        Image.fromarray(millimetres).save(path)
        assert (shown_share(posed_view(camera, path), item) > 0.02) is expected
    assert shown_share(posed_view(camera), item) > 0.02  # without depth nothing hides it


def test_best_view_comes_first(predictions, rooms_root):
    browser = viz.anchor_browser(predictions, static=True)
    browser.select(int(browser.answers.choose(sort="IoU")[0]))
    ranked = browser.ranked_views(browser.room())
    shares = [share for _, share in ranked]
    assert len(ranked) == 6 and shares == sorted(shares, reverse=True) and shares[0] > 0
    by_hand = [shown_share(view, browser.true_box) for view, _ in ranked]
    assert by_hand == shares
    strip = browser.strip_html(browser.room())
    assert strip.count("<svg") == 6 and strip.index(f"fills {shares[0]:.0%}") < strip.index("</figure>")


def test_scenes_are_found_by_manifest_or_settings_or_not_at_all(predictions, rooms_root, tmp_path, tiny_config):
    import yaml

    from roomplan_lib.config import to_dict

    assert scene_folders([predictions]) == [rooms_root]
    scene_id = load_answers(predictions).scene_ids[0]
    assert Scenes([rooms_root]).get(scene_id).scene_id == scene_id
    assert "not below" in Scenes([rooms_root]).get("elsewhere")
    assert "No folder" in Scenes([]).get("elsewhere")
    with pytest.raises(ValueError, match="no such folder"):
        viz.anchor_browser(predictions, tmp_path / "nowhere")
    copy = tmp_path / "predictions.jsonl"
    copy.write_bytes(predictions.read_bytes())
    assert scene_folders([copy]) == []
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(tiny_config)))
    assert scene_folders([copy]) == [rooms_root]
    browser = viz.anchor_browser(copy, [], static=True)
    assert "No folder of scenes" in browser.to_html()


# Texts ----------------------------------------------------------------------------------------------------------------


class Text(html.parser.HTMLParser):
    """The text of a page, that of its marked parts, and all tags."""

    def __init__(self, page):
        super().__init__()
        self.text, self.marked, self.tags, self.depth = "", [], set(), 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.depth += tag == "span"
        self.marked += [""] if tag == "span" else []

    def handle_endtag(self, tag):
        self.depth -= tag == "span"

    def handle_data(self, data):
        self.text += data
        if self.depth:
            self.marked[-1] += data


def test_differences_are_marked_word_by_word():
    true, predicted = (Text(page) for page in marked_texts("the red chair at 1.20 m", "the blue chair at 1.25 m"))
    assert true.marked == ["red", "1.20"] and predicted.marked == ["blue", "1.25"]
    assert [Text(page).marked for page in marked_texts("a b", "a  b")] == [[], []]
    assert [Text(page).marked for page in marked_texts("", "two words")] == [[], ["two words"]]
    assert [Text(page).marked for page in marked_texts("-0.62", "0.62")] == [["-0.62"], ["0.62"]]


@pytest.mark.parametrize("text", [HOSTILE, "<" * 50, "]]>&lt;", "\u202e\x00<svg/onload=x>", '{"a": "</span><b>"}'])
def test_hostile_texts_stay_texts(text):
    for page in marked_texts(text, "something else"), marked_texts("something else", text), marked_texts(text, text):
        for side in map(Text, page):
            assert side.tags <= {"span", "br"}
    assert Text(marked_texts(text, "x")[0]).text.replace("\ufffd", "\x00") == text


def test_long_texts_are_cut_and_stay_fast():
    start = time.perf_counter()
    page = marked_texts("a b " * 20_000, "b a " * 20_000)[0]
    assert time.perf_counter() - start < 2
    assert f"{80_000 - MOST_SHOWN:,} more characters" in page
    listed = marked_texts('[{"a":1},{"a":2}]', '[{"a":1},{"a":3}]')[0]
    assert listed.count("<br>") == 1


def test_hostile_rows_make_no_markup_anywhere(tmp_path):
    row = anchor_row(box("bed", 0, 0), box("bed", 1, 0), scene=HOSTILE, question=HOSTILE, text=HOSTILE, task=HOSTILE)
    answered = {"index": 1, "scene_id": HOSTILE, "question": HOSTILE, "prediction": HOSTILE, "reference": HOSTILE,
                "answers": [HOSTILE, HOSTILE + "2"], "situation": HOSTILE}  # fmt: skip
    path = write_rows(tmp_path / "predictions.jsonl", [row, answered])
    browser = viz.anchor_browser(path, static=False)
    pages = [browser.to_html(), *(w.value for w in (browser._texts, browser._strip, browser._count, browser._status))]
    for place in (0, 1):
        browser.select(place)
        pages += [browser.texts_html(), browser._texts.value]
    assert not any("<img src=x" in page or "<script" in page for page in pages)
    assert "&lt;script&gt;" in pages[0]
    assert not set("/\\.<>\0") & set(browser.file_name)


# Notes ----------------------------------------------------------------------------------------------------------------


def test_notes_come_back_and_are_written_whole(tmp_path, hand_made):
    path = notes_file(hand_made.files[0])
    assert path.name == "notes.jsonl" and notes_file(tmp_path / "p_blind.jsonl").name == "p_blind.notes.jsonl"
    notes = Notes(path)
    notes.set(hand_made.keys[1], "behind the camera\n<b>", "Where?")
    notes.set(hand_made.keys[2], "unreadable")
    again = Notes(path)
    assert again.get(hand_made.keys[1]) == "behind the camera\n<b>" and len(again) == 2
    again.set(hand_made.keys[1], "  ")
    assert hand_made.keys[1] not in Notes(path) and len(Notes(path)) == 1
    path.write_text('{"sample": "x", "note": "y"}\n{"sample": 3}\n')
    with pytest.raises(ValueError, match="notes.jsonl:2"):
        Notes(path)


# Widgets --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(predictions, tmp_path):
    copy = tmp_path / "run" / "predictions.jsonl"
    copy.parent.mkdir()
    for file in predictions.parent.iterdir():
        (copy.parent / file.name).write_bytes(file.read_bytes())
    return viz.anchor_browser(copy, max_points=500, static=False)


def trace(browser, name):
    return next(trace for trace in browser.figure.data if trace.name == name)


def test_selecting_a_sample_moves_everything(browser):
    place = int(browser.answers.choose(sort="IoU")[3])
    browser._list.value = place
    assert browser.place == place and browser.answer.true_boxes
    drawn = trace(browser, "true")
    corners = np.stack([drawn.x, drawn.y, drawn.z], axis=1)
    corners = corners[~np.isnan(corners[:, 0])].reshape(-1, 3)
    expected = box_corners(browser.true_box)
    assert np.abs(corners[:, None] - expected[None]).max(axis=-1).min(axis=1).max() < 1e-3
    assert np.abs(corners[:, None] - expected[None]).max(axis=-1).min(axis=0).max() < 1e-3
    assert str(browser.answer.row["question"]) in html.unescape(browser._texts.value)
    assert len(trace(browser, "surface").x) <= 500


def test_filters_and_next_worst_walk_through_the_list(browser):
    browser._filters["outcome"].value = "wrong"
    wrong = browser.answers.choose(outcome="wrong")
    assert browser.places.tolist() == wrong.tolist()
    browser._filters["most_iou"].value = 0.1
    kept = browser.answers.choose(outcome="wrong", most_iou=0.1)
    assert 0 < len(kept) < len(wrong) and [value for _, value in browser._list.options] == kept.tolist()
    ranked = browser.answers.choose(sort="worst first", outcome="wrong", most_iou=0.1)
    seen = []
    for _ in range(3):
        browser._next.click()
        seen.append(browser.place)
    assert seen == ranked[:3].tolist() and browser._list.value == seen[-1]
    browser._filters["search"].value = "no such words"
    assert len(browser.places) == 0 and browser._list.options == ()
    browser._next.click()  # nothing to go to, nothing to break
    browser._filters["search"].value = ""
    assert len(browser.places) == len(kept)


def test_one_box_of_several_stands_out_everywhere(tmp_path):
    chairs = [box("chair", x, 0) for x in (0, 2, 4)]
    row = anchor_row(chairs[0], chairs[0], task="place_anchors")
    row["reference_action"] = [action_record(anchor_from_box(b)) for b in chairs]
    row["action"] = [action_record(anchor_from_box(box("chair", b.center[0] + 0.2, 0))) for b in chairs]
    browser = viz.anchor_browser(write_rows(tmp_path / "predictions.jsonl", [row]), static=False)
    for k in (1, 2):
        browser._boxes.value = k
        assert browser._box.value == k and browser.pair == k
        for name, shift in (("true selected", 0), ("predicted selected", 0.2)):
            x = np.array(trace(browser, name).x, dtype=float)
            assert np.nanmean(x) == pytest.approx(chairs[k].center[0] + shift, abs=1e-3)
    labels = trace(browser, "predicted labels")
    browser._clicked(labels, type("Points", (), {"point_inds": [0]}), None)
    assert browser.pair == labels.customdata[0][0] and browser._boxes.value == browser.pair


def test_a_note_in_the_widget_is_kept(browser):
    browser._note.value = "look here"
    assert Notes(notes_file(browser.answers.files[0])).get(browser.answers.keys[0]) == "look here"
    browser.select(1)
    assert browser._note.value == ""
    browser.select(0)
    assert browser._note.value == "look here"


def test_a_still_page_where_nobody_can_press_buttons(predictions):
    browser = viz.anchor_browser(predictions)
    assert browser.static  # there is no frontend under pytest
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    page = bundle["text/html"]
    assert page.count("<h4>") == 3 and "data:image/jpeg" in page and "<script" not in page
    assert len(page) < 1_000_000


def test_browser_shows_both_where_widgets_work(browser):
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and "text/html" in bundle


def test_compared_figure_and_table(predictions, tmp_path):
    browser = viz.anchor_browser(predictions, static=True)
    places = browser.still_places()
    figure = viz.compared_figure(browser.answers, browser.scenes, places)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles.count("from above") == sum(bool(browser.answers.answers[p][0].true_boxes) for p in places)
    figure.savefig(tmp_path / "compared.png")
    lines = browser.answers.table(places).splitlines()
    assert len(lines) - 2 == sum(len(browser.answers.answers[p][0].pairs) for p in places)
    with pytest.raises(ValueError, match="no sample"):
        viz.compared_figure(browser.answers, browser.scenes, [])


def test_the_furnished_room_holds_what_was_placed(browser):
    room = browser.furnished_room()
    scene = arkitscenes.read_scene(browser.scenes.paths[room.scene_id])
    assert len(room.surfaces) == len(scene.surfaces) > 0 and not room.views
    placed = [
        b for i in np.flatnonzero(browser.answers.scene_ids == room.scene_id)
        for b in browser.answers.answers[i][0].predicted_boxes
    ]  # fmt: skip
    assert 0 < len(room.boxes) <= len(placed)
    assert {b.label for b in room.boxes} == {b.label for b in placed if b.label}


def test_ten_thousand_samples(tmp_path):
    """Built within seconds, and a sample is chosen without a wait; limits leave room for a busy machine."""
    rng = np.random.default_rng(2)
    rows = []
    for index in range(10_000):
        true = box("sofa", *rng.uniform(-3, 3, 2), yaw=0.1 * (index % 30))
        predicted = dataclasses.replace(true, center=true.center + rng.normal(size=3) * 0.3)
        rows.append(anchor_row(true, predicted, index=index, scene=f"room{index // 20}", question_id=f"q{index}"))
    path = write_rows(tmp_path / "predictions.jsonl", rows)
    start = time.process_time()
    browser = viz.anchor_browser(path, static=False)
    built = time.process_time() - start
    times = []
    for place in (5, 5_000, 9_999):
        start = time.process_time()
        browser.select(place)
        times.append(time.process_time() - start)
    start = time.process_time()
    browser._filters["search"].value = "sofa"
    browser._filters["sort"].value = SORTS[1]
    chosen = time.process_time() - start
    print(f"\n10,000 samples: built in {built:.1f} s, selection {max(times):.2f} s, filter and sort {chosen:.2f} s")
    assert built < 8 and max(times) < 0.6 and chosen < 1.2
    assert len(browser._list.options) <= 200 and not math.isnan(browser.answers.errors["iou_3d"].max())
