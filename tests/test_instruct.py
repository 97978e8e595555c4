"""Instruction data about single pictures: LLaVA, ShareGPT4V, DocVQA, ChartQA."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.samples import read_manifest, read_samples
from roomplan_lib.samples.instruct import prepare_instruct, with_history
from roomplan_lib.samples.validate import validate_file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number, name in enumerate(["coco/train2017/0001.jpg", "gqa/0002.jpg", "documents/xnbl0037_1.png", "41.png"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (50 * number, 80, 20)).save(root / name)
    return root


def conversation(*texts, image="coco/train2017/0001.jpg", **changes):
    turns = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]
    return {"id": "000000033471", "image": image, "conversations": turns} | changes


def prepare(tmp_path, images, layout, data, name="file.json", **options):
    path = tmp_path / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    prepare_instruct(path, images, tmp_path / "out.jsonl", layout=layout, progress=False, **options)
    return read_samples(tmp_path / "out.jsonl")


TALK = conversation(
    "<image>\nWhat is in the room?", "A bed.", "Of what colour?", "Red.", "And where?", "By the wall.\nNear a window."
)


def test_every_answer_of_a_conversation_is_a_record_with_the_turns_before_it(tmp_path, images):
    other = conversation("Is this a street?\n<image>", "No.", image="gqa/0002.jpg")
    records = prepare(tmp_path, images, "llava", [TALK, other])
    assert [record["answer"] for record in records] == ["A bed.", "Red.", "By the wall.\nNear a window.", "No."]
    assert records[0]["question"] == "What is in the room?" and records[3]["question"] == "Is this a street?"
    assert records[2]["question"].split("\n") == [
        "Question: What is in the room?", "Answer: A bed.", "Question: Of what colour?", "Answer: Red.",
        "Question: And where?",
    ]  # fmt: skip
    assert all(record["geom_token"] is None and len(record["images"]) == 1 for record in records)
    assert [record["images"][0] for record in records[2:]] == ["coco/train2017/0001.jpg", "gqa/0002.jpg"]
    assert len({record["question_id"] for record in records}) == 4
    assert {(r["task"], r["split"], r["source"]) for r in records} == {("instruct", "train", "llava")}
    assert validate_file(tmp_path / "out.jsonl") == []
    short = prepare(tmp_path, images, "llava", [TALK], history=1)
    assert short[2]["question"] == "Question: Of what colour?\nAnswer: Red.\nQuestion: And where?"
    assert prepare(tmp_path, images, "llava", [TALK], history=0)[2]["question"] == "And where?"
    assert with_history("Why?", []) == "Why?"


def test_the_spellings_of_sharegpt_mean_the_same(tmp_path, images):
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in TALK["conversations"]]
    entries = [
        TALK,
        {"conversations": TALK["conversations"], "images": [TALK["image"]]},
        {"messages": turns, "images": [TALK["image"]]},
    ]
    told = []
    for number, entry in enumerate(entries):
        lines = json.dumps(entry) + "\n"
        records = prepare(tmp_path, images, "sharegpt4v", lines if number == 1 else [entry], name=f"{number}.json")
        told.append([(record["images"], record["question"], record["answer"]) for record in records])
    assert told[0] == told[1] == told[2] and len(told[0]) == 3


def test_docvqa_and_chartqa(tmp_path, images):
    document = {
        "questionId": 337, "question": "What is the date?", "image": "documents/xnbl0037_1.png", "docId": 279,
        "answers": ["1/8/93", "January 8"], "data_split": "val", "question_types": ["handwritten"],
    }  # fmt: skip
    data = {"dataset_name": "SP-DocVQA", "data": [document, document | {"questionId": 338, "answers": ["x"]}]}
    first, second = prepare(tmp_path, images, "docvqa", data, name="val_v1.0_withQT.json")
    assert first["answers"] == ["1/8/93", "January 8"] and first["answer"] == "1/8/93" and first["split"] == "val"
    assert (first["question_id"], second["question_id"]) == ("docvqa-337", "docvqa-338")
    assert first["scene_id"] == "documents/xnbl0037_1.png" and validate_file(tmp_path / "out.jsonl") == []
    with pytest.raises(ValueError, match="entry 1: the id docvqa-337 is also"):
        prepare(tmp_path, images, "docvqa", {"data": [document, document]}, name="val_v1.0.json")
    with pytest.raises(ValueError, match="data_split 'val', but the file is taken for train"):
        prepare(tmp_path, images, "docvqa", {"data": [document]}, name="train_v1.0.json")
    with pytest.raises(ValueError, match="only a test file may hide"):
        prepare(tmp_path, images, "docvqa", {"data": [document | {"answers": []}]}, name="val_v1.0.json")
    hidden = {key: value for key, value in document.items() if key != "answers"} | {"data_split": "test"}
    (record,) = prepare(tmp_path, images, "docvqa", {"data": [hidden]}, name="test_v1.0.json")
    assert record["answers"] == [] and "answer" not in record and record["split"] == "test"

    chart = [{"imgname": "41.png", "query": "How many bars?", "label": "14"}]
    (record,) = prepare(tmp_path, images, "chartqa", chart, name="test_human.json")
    assert (record["question"], record["answer"], record["images"]) == ("How many bars?", "14", ["41.png"])
    assert record["split"] == "test" and record["question_id"] == "chartqa-0-0"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (conversation("<image><image> What?", "That."), "2 times <image>"),
        (conversation("<image> What?", "That.", "<image> And?", "This."), "2 times <image>"),
        (conversation("<image><image> What?", "That.", images=["41.png", "gqa/0002.jpg"]), "about one view"),
        (conversation("<image>", "That."), "no words"),
        (conversation("<image> What?", "  "), "no words"),
        (conversation("<image> What?"), "human first"),
        (conversation(), "human first"),
        (conversation("<image> What?", "That.", conversations=[{"from": "gpt", "value": "Hm"}]), "human first"),
        (conversation("<image> What?", "That.", conversations="hello"), "conversations: expected a list"),
        (conversation(conversations=[{"from": "tool", "value": "x"}]), "a turn: expected"),
        (conversation(conversations=[{"from": ["human"], "value": "x"}]), "a turn: expected"),
        (conversation(conversations=[{"from": "human", "value": 3}]), "a turn: expected"),
        (conversation("<image> What?", "That.", image="coco/none.jpg"), "coco/none.jpg is not in"),
        (conversation("<image> What?", "That.", image="../41.png"), r"picture '\.\./41\.png'"),
        (conversation("<image> What?", "That.", image="/etc/passwd"), "picture '/etc/passwd'"),
        (conversation("<image> What?", "That.", image=7), "image: expected a path"),
        ({"id": 3}, "conversations: expected a list"),
    ],
)
def test_broken_entries_are_named_or_left_out_and_counted(entry, reason, tmp_path, images):
    with pytest.raises(ValueError, match=rf"file\.json: entry 1: .*{reason}"):
        prepare(tmp_path, images, "llava", [TALK, entry])
    assert not (tmp_path / "out.jsonl").exists()
    assert len(prepare(tmp_path, images, "llava", [TALK, entry], skip_broken=True)) == 3
    left_out = read_manifest(tmp_path / "out.jsonl")["left_out"]
    assert left_out["broken"] == 1 and "entry 1" in left_out["first_broken"][0]
    with pytest.raises(ValueError, match="no record is left"):
        prepare(tmp_path, images, "llava", [entry], skip_broken=True)


def test_conversations_about_no_picture_are_left_out_and_counted(tmp_path, images):
    words_only = {"id": "x", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    path = tmp_path / "mix.json"
    path.write_text(json.dumps([words_only, TALK, words_only]))
    arguments = ["--file", path, "--images", images, "--output", tmp_path / "out.jsonl"]
    result = CliRunner().invoke(app, ["prepare", "instruct", "--format", "llava", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "3 records about 1 pictures" in result.stdout and "2 conversations about no picture" in result.stdout
    wrong = CliRunner().invoke(app, ["prepare", "instruct", "--format", "docvqa", *map(str, arguments)])
    assert wrong.exit_code == 1 and "mix.json" in wrong.stderr and wrong.stderr.count("\n") == 1
    assert CliRunner().invoke(app, ["prepare", "instruct", "--format", "coco", *map(str, arguments)]).exit_code == 2


def test_folders_and_files_that_are_not_there(tmp_path, images):
    with pytest.raises(ValueError, match="no such folder of pictures"):
        prepare(tmp_path, tmp_path / "none", "llava", [TALK])
    with pytest.raises(ValueError, match="no such file of annotations"):
        prepare_instruct(tmp_path / "no.json", images, tmp_path / "o.jsonl", layout="llava", progress=False)
    with pytest.raises(ValueError, match="format: expected one of"):
        prepare(tmp_path, images, "coco", [TALK])
    with pytest.raises(ValueError, match="train, not of val"):
        prepare(tmp_path, images, "llava", [TALK], name="train.json", split="val")
    assert prepare(tmp_path, images, "llava", [TALK], name="mix665k.json", split="val")[0]["split"] == "val"


def test_ordinary_turns_of_such_files_are_read(tmp_path, images):
    """A system turn, a picture without its marker, talk about no picture in any order, numbers as answers."""
    system = conversation(
        conversations=[{"from": "system", "value": "Be kind."}, {"from": "human", "value": "What is it?"},
                       {"from": "gpt", "value": "A street."}]
    )  # fmt: skip
    talk = {"id": "1", "image": None, "conversations": [{"from": "gpt", "value": "Hello."}]}
    records = prepare(tmp_path, images, "llava", [system, talk])
    assert [(r["question"], r["answer"]) for r in records] == [("What is it?", "A street.")]
    (record,) = prepare(
        tmp_path, images, "chartqa", [{"imgname": "gqa/0002.jpg", "query": "How many?", "label": 4}], "train_human.json"
    )
    assert record["answer"] == "4" and validate_file(tmp_path / "out.jsonl") == []


def test_pictures_of_one_name_in_two_folders_are_two_scenes(tmp_path, images):
    (images / "gqa" / "0001.jpg").write_bytes((images / "gqa" / "0002.jpg").read_bytes())
    talks = [
        conversation("<image> What?", "That.", image=image) for image in ("coco/train2017/0001.jpg", "gqa/0001.jpg")
    ]
    records = prepare(tmp_path, images, "llava", talks)
    assert len({record["scene_id"] for record in records}) == 2 and validate_file(tmp_path / "out.jsonl") == []


def test_no_file_of_others_is_overwritten(tmp_path, images):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps([TALK]))
    with pytest.raises(ValueError, match="is the file to read"):
        prepare_instruct(path, images, path, layout="llava", progress=False)
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious")
    with pytest.raises(ValueError, match="no builder wrote it"):
        prepare_instruct(path, images, mine, layout="llava", progress=False)
    assert mine.read_text() == "precious" and json.loads(path.read_text()) == [TALK]
