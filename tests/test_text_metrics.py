"""Text metrics against numbers of the published evaluators: CoreNLP's lexer, pycocoevalcap 1.2, GPT4Scene, LEO."""

import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from roomplan_lib.evaluation import text_metrics
from roomplan_lib.evaluation.text_metrics import (
    PROTOCOLS,
    answer_items,
    clean_answer,
    normalise_answer,
    score,
    tokenize,
    totals,
)

SQA3D = Path(__file__).parents[2] / "shared" / "data" / "sqa3d"
needs_sqa3d = pytest.mark.skipif(not SQA3D.is_dir(), reason="SQA3D's test set lies in shared/ only")
CAPTION_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider")

SCANQA = (
    ["Brown.", "2", "to the left of the desk", "A white table in the middle of the room."],
    [["brown", "dark brown"], ["2", "two chairs"], ["left of desk", "next to the desk"], ["white table"]],
)
SQA = (
    ["Brown.", "Yes.", "2", "No.", "left side", "The sofa"],
    [["brown"], ["yes"], ["two"], ["yes"], ["left"], ["couch"]],
)


@pytest.fixture(scope="module")
def sqa3d():
    """[(question, answer, situation, other wordings of it)] of SQA3D's test set."""
    questions = json.loads((SQA3D / "v1_balanced_questions_test_scannetv2.json").read_text())["questions"]
    annotations = json.loads((SQA3D / "v1_balanced_sqa_annotations_test_scannetv2.json").read_text())["annotations"]
    answers = {entry["question_id"]: entry["answers"][0]["answer"] for entry in annotations}
    return [(q["question"], answers[q["question_id"]], q["situation"], q["alternative_situation"]) for q in questions]


# Golden numbers -------------------------------------------------------------------------------------------------------


def test_gpt4scene_numbers_on_scanqa_answers():
    scores = score(*SCANQA, "gpt4scene", meteor=False)
    golden = {"em": 0.25, "em_refined": 1.0, "bleu_1": 0.666667, "bleu_2": 0.5, "bleu_3": 0.346681, "bleu_4": 5.681e-05,
              "rouge_l": 0.764556, "cider": 2.153809}  # fmt: skip
    assert {key: scores[key] for key in golden} == pytest.approx(golden, abs=6e-7)
    fixed = score(*SCANQA, "gpt4scene-fixed", meteor=False)
    assert (fixed["em"], fixed["em_refined"]) == (0.5, 1.0)  # "2" is "two" on both sides
    assert scores["num_samples"] == 4 and scores["protocol"] == "gpt4scene"


def test_gpt4scene_numbers_on_sqa3d_answers():
    for protocol in ("gpt4scene", "gpt4scene-fixed"):
        scores = score(*SQA, protocol, meteor=False)
        golden = {"em": 0.5, "em_refined": 2 / 3, "rouge_l": 0.618217, "cider": 1.540564}
        assert {key: scores[key] for key in golden} == pytest.approx(golden, abs=6e-7)


@needs_sqa3d
def test_scores_of_trivial_answers_to_sqa3d(sqa3d):
    answers = [[answer] for _, answer, _, _ in sqa3d]
    assert len(answers) == 3519 and all(clean_answer(a) == a for (a,) in answers)

    def percent(text: str, protocol: str) -> tuple[float, float]:
        scores = totals({k: v for k, v in answer_items([text] * len(answers), answers, protocol).items() if "em" in k})
        return round(100 * scores["em"], 1), round(100 * scores["em_refined"], 1)

    for protocol in ("leo-parity", "gpt4scene"):
        assert percent("yes", protocol) == (10.9, 11.0)
        assert percent("e", protocol) == (0.0, 54.5)
    assert percent("", "leo-parity") == (0.0, 100.0)  # as published
    for protocol in ("leo", "roomplan-1"):
        assert percent("yes", protocol) == (10.9, 10.9)
        assert percent("e", protocol) == percent("", protocol) == (0.0, 0.0)


@needs_sqa3d
def test_a_list_of_all_words_is_right_to_leos_scorer_alone(sqa3d):
    answers = [[answer] for _, answer, _, _ in sqa3d][::35]
    vocabulary = " ".join(sorted({answer for _, answer, _, _ in sqa3d}))
    em_refined = {p: score([vocabulary] * len(answers), answers, p, meteor=False)["em_refined"] for p in PROTOCOLS}
    assert em_refined["leo-parity"] == 1 and em_refined["leo"] == 0
    ours = score([vocabulary] * len(answers), answers, "roomplan-1", meteor=False)
    assert (ours["em"], ours["em_refined"]) == (0, 0) and ours["bleu_1"] < 0.01 and ours["rouge_l"] < 0.01


@needs_sqa3d
def test_captions_score_as_by_pycocoevalcap(sqa3d):
    """Golden: pycocoevalcap 1.2 with Java's PTBTokenizer, and without a tokenizer, on 3,494 situations and answers."""
    texts = [(situation, [*others]) for _, _, situation, others in sqa3d]
    plain = [all(t.strip() and t.isascii() and t.isprintable() for t in (text, *others)) for text, others in texts]
    kept = [entry for entry, fine in zip(sqa3d, plain, strict=True) if fine and entry[3]]
    assert len(kept) == 3494
    situations = [entry[2] for entry in kept], [entry[3] for entry in kept]
    answers = [f"so the {entry[1]}." for entry in kept], [[entry[1]] for entry in kept]
    golden = {
        "scanqa-official": (
            [0.50363, 0.33763, 0.21531, 0.139993, 0.369721, 0.450757],
            [0.353887, 0.127046, 0.070181, 0.08389, 0.562183, 0.935314],
        ),
        "v3dllm": (
            [0.471658, 0.310118, 0.195242, 0.125476, 0.345669, 0.366043],
            [0.35398, 0.127253, 0.070257, 0.083959, 0.562284, 0.936385],
        ),
    }
    for protocol, values in golden.items():
        for (predictions, references), expected in zip((situations, answers), values, strict=True):
            items = text_metrics.caption_items(
                [PROTOCOLS[protocol].said(text) for text in predictions],
                [[PROTOCOLS[protocol].wanted(text) for text in texts] for texts in references],
            )
            scores = totals(items)
            assert [scores[key] for key in CAPTION_KEYS] == pytest.approx(expected, abs=6e-7)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("java") is None or find_spec("pycocoevalcap") is None, reason="needs Java, pycocoevalcap"
)
def test_meteor_where_java_is():
    assert score(*SCANQA, "gpt4scene")["meteor"] == pytest.approx(0.401434, abs=6e-7)
    assert score(*SQA, "gpt4scene")["meteor"] == pytest.approx(0.433910, abs=6e-7)


def test_meteor_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(text_metrics.shutil, "which", lambda name: None)
    scores = score(*SQA, "leo")
    assert "meteor" not in scores and "java" in scores["skipped"]["meteor"]
    assert "skipped" not in score(*SQA, "leo", meteor=False)


# Answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("The TV.", "TV"),
        ("2 chairs", "two chairs"),
        ("None", "zero"),
        ("mat2", "mat"),
        ("21", "21"),
        ("23", "twenty-three"),
        ("Behine the couch", "behind couch"),
        ("a", "a"),
        ("a a table", "a table"),
        ("  go backwards  ", "go backward"),
        ("o'  clock", "o'clock"),
        ("2.5 m (left)", "25 m left"),
    ],
)
def test_answers_are_cleaned_as_leo_cleans_them(text, cleaned):
    assert clean_answer(text) == cleaned


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The  TV.", "TV"),
        ("Two chairs!", "two chairs"),
        ("2 chairs", "two chairs"),
        ("1.5", "1.5"),
        ("2.", "two"),
        ("1.5 m.", "1.5 m"),
        ("Türe", "türe"),
        ("a-frame", "a-frame"),
        ("the a", ""),
        ("...", ""),
        ("clothes'", "clothes"),
    ],
)
def test_answers_are_normalised(text, normalised):
    assert normalise_answer(text) == normalised
    assert normalise_answer(normalised) == normalised


def em(prediction, references, protocol):
    items = answer_items([prediction], [references], protocol)
    return int(items["em"][0]), int(items["em_refined"][0])


@pytest.mark.parametrize(
    "prediction, references, leo, gpt4scene, ours",
    [
        ("no", ["north"], (0, 0), (0, 1), (0, 0)),
        ("a", ["table"], (0, 0), (0, 1), (0, 0)),
        ("", ["table"], (0, 0), (0, 0), (0, 0)),
        ("?!", ["table"], (0, 0), (0, 0), (0, 0)),
        ("brown table", ["brown", "brown table"], (0, 1), (1, 1), (1, 1)),  # LEO stops at the first that fits at all
        ("yes yes yes", ["yes"], (0, 0), (0, 1), (0, 0)),  # three words for one
        ("yes yes", ["yes"], (0, 1), (0, 1), (0, 1)),
        ("to the left", ["left"], (0, 1), (0, 1), (0, 1)),
        ("table", ["brown table"], (0, 1), (0, 1), (0, 1)),
        ("table brown", ["brown table"], (0, 0), (0, 0), (0, 0)),
        ("left", ["right"], (0, 0), (0, 0), (0, 0)),
        ("Yes.", ["yes"], (1, 1), (1, 1), (1, 1)),
        ("15", ["1.5"], (1, 1), (0, 0), (0, 0)),
    ],
)
def test_what_counts_as_a_match(prediction, references, leo, gpt4scene, ours):
    assert em(prediction, references, "leo") == leo
    assert em(prediction, references, "gpt4scene") == gpt4scene
    assert em(prediction, references, "roomplan-1") == ours


def test_a_reference_that_is_cleaned_away_matches_nothing():
    assert em("yes", ["?", "yes"], "leo") == (1, 1) and em("yes", ["?!"], "leo") == (0, 0)
    assert em("yes", ["?", "yes"], "leo-parity") == (0, 1)  # as published: nothing is contained in everything


def test_raw_strings_decide_for_scanqa_and_video_3d_llm():
    for protocol in ("scanqa-official", "v3dllm"):
        assert em("brown", ["brown"], protocol) == (1, 1)
        assert em("Brown.", ["brown"], protocol) == (0, 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_answer_is_never_right(protocol):
    scores = score(["", " ", ""], [["yes"], ["a chair"], ["2"]], protocol, meteor=False)
    refined = scores.pop("em_refined")
    assert refined == (1.0 if protocol == "leo-parity" else 0.0)
    assert all(scores[key] < 1e-6 for key in ("em", *CAPTION_KEYS))
    assert "leo-parity" not in PROTOCOLS[protocol].description or protocol == "leo"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_true_answers_are_right(protocol):
    """Four references of as many words each, all different: every n-gram is found, and CIDEr is at its largest, 10."""
    texts = [f"{word} thing that stands by window" for word in ("brown", "red", "tall", "old")]
    scores = score(texts, [[text] for text in texts], protocol, meteor=False)
    values = [scores[key] for key in ("em", "em_refined", *CAPTION_KEYS)]
    assert values == pytest.approx([1.0] * 7 + [10.0], abs=1e-6)


# Tokens ---------------------------------------------------------------------------------------------------------------

# What `java edu.stanford.nlp.process.PTBTokenizer -lowerCase` of CoreNLP 3.4.1 wrote, punctuation taken out.
LEXER = {
    "The dog's tail isn't here, don't can't cannot won't I'm we've they'll":
        "the dog 's tail is n't here do n't ca n't can not wo n't i 'm we 've they 'll",
    "left/right/back/front and/or w/o 1/2 1/2-inch": "left/right/back / front and/or w/o 1/2 1/2-inch",
    '3.5 1,000.5 .5 -3 2x4 24" 5\'10"': "3.5 1,000.5 .5 -3 2x4 24 5 10",
    "5 o'clock (brackets) [square] {curly}": "5 o'clock -lrb- brackets -rrb- -lsb- square -rsb- -lcb- curly -rcb-",
    "mr. smith etc. u.s. a.m. vs. wait... what?! no!!": "mr. smith etc. u.s. a.m. vs. wait what ?! no !!",
    "t-shirt x-ray -dash dash- a--b": "t-shirt x-ray dash dash a b",
    "$5 £3 50% 100° #3 @home & at&t AT&T": "$ 5 # 3 50 % 100 ° # 3 @home & at & t at&t",
    "tv's TVs TV. T.V. gonna lemme": "tv 's tvs tv t.v. gon na lem me",
    "the chairs' legs; boss's desk: yes": "the chairs legs boss 's desk yes",
    "2019-01-02 10:30 5pm 3-4 3x": "2019-01-02 10:30 5pm 3-4 3x",
    "brown.The table": "brown.the table",
    "don’t “hi” – — …": "do n't hi",
    "number 3. room 2. A. yes": "number 3 room 2 a. yes",
    "<OBJ012> and <OBJ003>.": "<obj012> and <obj003>",
    "**bold** a*b hello_world": "** bold ** a * b hello_world",
    "the sofa, etc., no. 5": "the sofa etc. no. 5",
    "café 中文 :)": "café 中文 :-rrb-",
    "": "",
    "?": "",
}  # fmt: skip


@pytest.mark.parametrize("text", LEXER)
def test_tokens_are_the_lexers(text):
    assert tokenize(text) == LEXER[text]


def test_adversarial_texts_cost_little_time():
    start = time.perf_counter()
    for unit in ("a", "a,", "a'", "a-", "a/", "(", "a@", "<a", "1,", "x:", "n't", "a.b-", "😀"):
        tokenize(unit * 20_000)
        normalise_answer(unit * 20_000)
    assert time.perf_counter() - start < 15


# Formulas, written a second time --------------------------------------------------------------------------------------


def subsequence(a, b):
    """Longest common subsequence by its recursion over prefixes."""
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    for i in range(len(a)):
        for j in range(len(b)):
            same = a[i] == b[j]
            table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
    return table[-1, -1]


def test_rouge_takes_the_best_precision_and_the_best_recall():
    said, wanted = "a white table in the room", ["white table", "the table in the room is white"]
    items = text_metrics.caption_items([said], [wanted])
    lengths = [subsequence(said.split(), text.split()) for text in wanted]
    precision = max(lengths) / 6
    recall = max(length / len(text.split()) for length, text in zip(lengths, wanted, strict=True))
    beta = 1.2
    assert items["rouge_l"][0] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))


def test_cider_needs_a_corpus_and_weighs_rare_words():
    alone = score(["brown"], [["brown"]], "leo", meteor=False)
    assert alone["cider"] == 0  # log(1 document) = 0
    references = [["brown chair"], ["brown table"], ["red table"], ["brown lamp"]]
    items = text_metrics.caption_items([text for (text,) in references], references)
    assert items["cider"] == pytest.approx([5.0] * 4)  # one and two words: n = 1, 2 match fully, 3 and 4 have nothing
    partly = text_metrics.caption_items(["brown sofa", "red sofa", "x", "y"], references)["cider"]
    assert partly[0] > 0 and partly[1] == 0
    # by hand: idf of brown log(4/3), of chair log 4, of a word nobody else says log 4
    brown, rare = np.log(4 / 3), np.log(4)
    assert partly[0] == pytest.approx(10 / 4 * brown**2 / (brown**2 + rare**2))


def test_a_bootstrap_draw_counts_samples_as_often_as_it_says():
    items = answer_items(*SQA, "leo")
    twice = [0, 0, 3, 5]
    weights = np.bincount(twice, minlength=6)
    drawn = answer_items([SQA[0][i] for i in twice], [SQA[1][i] for i in twice], "leo")
    expected, found = totals(drawn), totals(items, weights)
    assert {k: found[k] for k in expected if k != "cider"} == pytest.approx(
        {k: v for k, v in expected.items() if k != "cider"}
    )


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predictions, references, protocol, message",
    [
        ([], [], "leo", "no predictions"),
        (["a"], [["a"], ["b"]], "leo", "1 predictions but 2 lists"),
        ([None], [["a"]], "leo", "prediction 0: expected text, got NoneType"),
        (["a", 3], [["a"], ["b"]], "leo", "prediction 1: expected text, got int"),
        (["a"], ["a"], "leo", "references 0: expected a list of at least one text"),
        (["a"], [[]], "leo", "references 0"),
        (["a"], [[1]], "leo", "references 0"),
        (["a"], [["a"]], "bleu", "protocol: expected one of roomplan-1"),
    ],
)
def test_wrong_input_is_refused(predictions, references, protocol, message):
    with pytest.raises(ValueError, match=message):
        score(predictions, references, protocol)


def test_five_thousand_answers_take_seconds():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(800)]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 12))) for _ in range(10_000)]
    start = time.perf_counter()
    score(texts[:5000], [[text, texts[i]] for i, text in enumerate(texts[5000:])], "roomplan-1", meteor=False)
    assert time.perf_counter() - start < 20


@pytest.mark.skipif(find_spec("pycocoevalcap") is None, reason=text_metrics.METEOR_NEEDS)
@pytest.mark.parametrize("answer", ["", "echo Error: no tables", "while read line; do echo; done"])
def test_a_failed_meteor_is_skipped_and_said(answer, tmp_path, monkeypatch):
    """A Java that ends at once, says something else than numbers, or nothing."""
    (tmp_path / "java").write_text(f"#!/bin/sh\n{answer}\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    scores = score(["brown", "a chair"], [["brown"], ["the chair"]], "roomplan-1")
    assert "meteor" not in scores and scores["skipped"]["meteor"].startswith("the Java program failed")
    assert scores["em"] == 1
