"""Scores of the ScanNet benchmarks against numbers of GPT4Scene's own evaluator and against cases worked by hand."""

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from roomplan_lib.evaluation.box_metrics import bounds_iou
from roomplan_lib.evaluation.grounding import (
    named_objects,
    query_f1,
    referred_object,
    score_localization,
    score_multi3drefer,
    score_scan2cap,
    score_scanrefer,
    score_sqa3d,
)
from roomplan_lib.evaluation.text_metrics import METEOR_NEEDS
from roomplan_lib.geometry import OrientedBox, rotation_z
from roomplan_lib.samples.sqa3d import question_type

SQA3D = Path(__file__).parents[2] / "shared" / "data" / "sqa3d"


def box(x, y, z, *extent):
    return OrientedBox([x, y, z], extent)


# The room on which GPT4Scene's evaluator was run.
TRUE = [box(0, 0, 0.5, 1, 1, 1), box(2, 0, 0.5, 1, 1, 1), box(0, 2, 0.5, 0.8, 0.6, 1), box(2, 2, 0.4, 0.5, 0.5, 0.8)]
PROPOSED = [TRUE[0], box(2.2, 0, 0.5, 1, 1, 1), box(0, 2.6, 0.5, 0.8, 0.6, 1), TRUE[3], box(4, 4, 1, 1, 1, 1)]


def test_overlaps_of_the_room():
    assert bounds_iou(TRUE[1], PROPOSED[1]) == pytest.approx(0.666667, abs=5e-7)
    assert bounds_iou(TRUE[2], PROPOSED[2]) == 0
    turned = OrientedBox([0, 0, 0.5], [1, 1, 1], rotation_z(np.pi / 4))
    assert bounds_iou(TRUE[0], turned) == pytest.approx(0.5)  # its bounds are sqrt(2) wide and deep
    assert bounds_iou(TRUE[0], TRUE[0]) == 1 and bounds_iou(TRUE[0], OrientedBox([0, 0, 0], [0, 1, 1])) == 0


def test_scanrefer_as_gpt4scene_counts():
    texts = ["<OBJ000>.", "It is <OBJ001>.", "<OBJ099> or <OBJ003>.", "no idea"]
    chosen = [PROPOSED[referred_object(text, len(PROPOSED), parity=True)] for text in texts]
    scores = score_scanrefer(chosen, TRUE, [False, True, True, False])
    six = [part[key] for part in (scores, scores["unique"], scores["multiple"]) for key in ("acc_iou25", "acc_iou50")]
    assert six == [0.5] * 6
    assert scores["unique"]["num_samples"] == scores["multiple"]["num_samples"] == 2
    # The guess "object 0" is no answer: with object 0 wanted, it would have scored.
    assert referred_object("no idea", 5) is None
    assert score_scanrefer([None], [TRUE[0]], [True])["acc_iou25"] == 0
    assert score_scanrefer([PROPOSED[referred_object("no idea", 5, parity=True)]], [TRUE[0]], [True])["acc_iou25"] == 1
    assert score_scanrefer([None], [TRUE[0]], [True])["multiple"]["acc_iou25"] is None


def test_multi3drefer_as_gpt4scene_counts():
    rows = [
        ("zt_wo_d", "No.", []),
        ("zt_w_d", "Yes. <OBJ001>.", []),
        ("st_w_d", "Yes. <OBJ001>.", [1]),
        ("mt", "<OBJ000>, <OBJ001>, and <OBJ004>", [0, 1, 3]),
        ("st_wo_d", "<OBJ000> and <OBJ000>", [0]),
    ]

    def scores(parity):
        predicted = [[PROPOSED[i] for i in named_objects(text, len(PROPOSED), parity=parity)] for _, text, _ in rows]
        return score_multi3drefer(predicted, [[TRUE[i] for i in ids] for *_, ids in rows], [kind for kind, *_ in rows])

    golden = {"zt_wo_d": 1, "zt_w_d": 0, "st_w_d": 1, "mt": 2 / 3, "st_wo_d": 2 / 3}
    for key in ("f1_iou25", "f1_iou50"):
        assert {kind: part[key] for kind, part in scores(True)["by_type"].items()} == pytest.approx(golden)
        assert scores(True)[key] == pytest.approx(2 / 3)
        assert scores(False)["by_type"]["st_wo_d"][key] == 1  # named twice is still one object
    assert scores(True)["num_samples"] == 5 and scores(True)["by_type"]["mt"]["num_samples"] == 1


def test_query_f1_pairs_boxes_for_the_largest_overlap():
    assert query_f1([], [], 0.25) == 1
    assert query_f1([TRUE[0]], [], 0.25) == query_f1([], [TRUE[0]], 0.25) == 0
    # One box between two: it is right for one of them only.
    between = box(1, 0, 0.5, 3, 1, 1)
    assert bounds_iou(between, TRUE[0]) == pytest.approx(1 / 3)
    assert query_f1([between], TRUE[:2], 0.25) == pytest.approx(2 / 3)
    assert query_f1([between, between], TRUE[:2], 0.25) == 1
    assert query_f1([between, between], TRUE[:2], 0.5) == 0


def test_objects_named_without_markers():
    text = "1. In Img_3 and Image 12 I see 2 objects: 7 and 7, 900."
    assert named_objects(text, 100, any_number=True) == [2, 7]
    assert named_objects("<OBJ7> <OBJ0071> <obj007> <OBJ042>", 100) == [42]
    assert named_objects("9" * 5000, 100, any_number=True) == []


CORPUS = {
    "room|0": ["A brown chair next to the desk.", "The chair is brown."],
    "room|1": ["A white table."],
    "room|3": ["A small box on the floor."],
}


@pytest.mark.parametrize("least", [0.25, 0.5])
def test_scan2cap_as_gpt4scene_counts(least):
    said = {
        "room|0": ("A brown chair next to the desk.", bounds_iou(PROPOSED[0], TRUE[0])),
        "room|1": ("A white table.", bounds_iou(PROPOSED[4], TRUE[1])),
    }
    scores = score_scan2cap(said, CORPUS, least_iou=least, meteor=False)
    golden = {"bleu_4": 0.473268, "rouge_l": 0.630461, "cider": 1.862381}
    assert {key: scores[key] for key in golden} == pytest.approx(golden, abs=6e-7)
    framed = {key: [f"sos {caption} eos" for caption in captions] for key, captions in CORPUS.items()}
    assert score_scan2cap(said, framed, least_iou=least, meteor=False) == scores  # as Scan2Cap's own corpus has them
    assert scores["num_samples"] == 3


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("java") and find_spec("pycocoevalcap")), reason=METEOR_NEEDS)
def test_scan2cap_meteor_where_java_is():
    said = {"room|0": ("A brown chair next to the desk.", 1.0), "room|1": ("A white table.", 0.0)}
    assert score_scan2cap(said, CORPUS)["meteor"] == pytest.approx(0.353167, abs=6e-7)


def test_scan2cap_protocols_differ_where_they_say():
    right = {key: (captions[0], 0.5) for key, captions in CORPUS.items()}
    for protocol, at_the_edge in (("chat-scene", 1), ("vgllm", 1), ("scan2cap-official", 0)):
        scores = score_scan2cap(right, CORPUS, protocol=protocol, meteor=False)
        assert (scores["rouge_l"] > 0.99) == bool(at_the_edge)  # IoU >= 0.5, or > 0.5
        above = {key: (caption, 0.51) for key, (caption, _) in right.items()}
        assert score_scan2cap(above, CORPUS, protocol=protocol, meteor=False)["bleu_4"] == pytest.approx(1, abs=1e-6)
    # Without a tokenizer "floor." is one word and another than "floor".
    plain = {"room|3": ("A small box on the floor", 1.0)}
    corpus = {"room|3": CORPUS["room|3"]}
    words = [score_scan2cap(plain, corpus, protocol=p, meteor=False)["rouge_l"] for p in ("chat-scene", "vgllm")]
    assert words[0] == pytest.approx(1) and 0.8 < words[1] < 1
    # The first 30 words count; the frame stays.
    long = {"a": ("word " * 30 + "left", 1.0)}
    cut = score_scan2cap(long, {"a": ["word " * 30 + "right"]}, protocol="scan2cap-official", meteor=False)
    assert cut["rouge_l"] == pytest.approx(1)


def test_captions_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no predictions"):
        score_scan2cap({}, {})
    with pytest.raises(ValueError, match="objects that the corpus does not have: room|9"):
        score_scan2cap({"room|9": ("x", 1.0)}, CORPUS)
    with pytest.raises(ValueError, match="protocol: expected one of chat-scene"):
        score_scan2cap({}, CORPUS, protocol="leo")
    with pytest.raises(ValueError, match="expected as many of each"):
        score_scanrefer([None], TRUE, [True])
    with pytest.raises(ValueError, match="expected as many of each and at least one"):
        score_multi3drefer([], [], [])


def test_sqa3d_by_type_as_gpt4scene_counts():
    answers = [
        ("Brown.", "brown", "What color?"),
        ("Yes.", "yes", "Is it?"),
        ("2", "two", "How many?"),
        ("No.", "yes", "Can I?"),
        ("left side", "left", "Which side?"),
        ("The sofa", "couch", "On what?"),
    ]
    said, wanted, questions = zip(*answers, strict=True)
    scores = score_sqa3d(said, [[text] for text in wanted], questions, "gpt4scene")
    assert scores["em"] == 0.5 and scores["em_refined"] == pytest.approx(2 / 3)
    by_type = [(part["em"], part["em_refined"]) for part in map(scores["by_type"].get, TYPES)]
    assert by_type == [(1, 1), (1, 1), (1, 1), (0, 0), (0, 1), (0, 0)]


TYPES = ("what", "is", "how", "can", "which", "other")


@pytest.mark.skipif(not SQA3D.is_dir(), reason="SQA3D's test set lies in shared/ only")
def test_sqa3d_test_set_by_type():
    questions = json.loads((SQA3D / "v1_balanced_questions_test_scannetv2.json").read_text())["questions"]
    annotations = json.loads((SQA3D / "v1_balanced_sqa_annotations_test_scannetv2.json").read_text())["annotations"]
    answer = {entry["question_id"]: entry["answers"][0]["answer"] for entry in annotations}
    texts = [entry["question"] for entry in questions]
    answers = [answer[entry["question_id"]] for entry in questions]
    types = [question_type(text) for text in texts]

    def scores(by_type):
        return score_sqa3d([by_type[kind] for kind in types], [[text] for text in answers], texts, "leo")

    # One answer for each type, as a guesser would give who has seen other questions.
    guesses = dict(zip(TYPES, ("white", "no", "one", "yes", "left", "yes"), strict=True))
    guessed = scores(guesses)
    assert [guessed["by_type"][kind]["num_samples"] for kind in TYPES] == [1147, 652, 465, 338, 351, 566]
    assert round(100 * guessed["em"], 1) == 19.7
    published = score_sqa3d([guesses[kind] for kind in types], [[text] for text in answers], texts, "leo-parity")
    assert round(100 * published["em_refined"], 1) == 20.7 > 100 * guessed["em_refined"]
    counts = {kind: Counter(a for a, t in zip(answers, types, strict=True) if t == kind) for kind in TYPES}
    best = scores({kind: count.most_common(1)[0][0] for kind, count in counts.items()})
    assert best["em"] == sum(count.most_common(1)[0][1] for count in counts.values()) / 3519 > guessed["em"]


def test_localization_takes_the_best_guess_of_each():
    positions = [np.array([[0.4, 0, 9]]), np.array([[5, 5], [0, 0.9], [2, 2]]), np.array([[1, 0]])]
    yaws = [np.array([np.radians(352)]), np.array([np.pi, np.radians(20)]), np.array([np.radians(-31)])]
    scores = score_localization(positions, yaws, np.zeros((3, 3)), np.zeros(3))
    golden = {"acc_0.5m": 1 / 3, "acc_1m": 2 / 3, "acc_15deg": 1 / 3, "acc_30deg": 2 / 3, "num_samples": 3}
    assert scores == pytest.approx(golden)
    with pytest.raises(ValueError, match="one to three guesses, got 4"):
        score_localization([np.zeros((4, 2))], [np.zeros(1)], np.zeros((1, 2)), np.zeros(1))
