"""Hostile files of samples, and records of other kinds than the anchors and questions of `test_samples.py`."""

import json
import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from scene_files import box, walk, write_scene
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.samples import MAX_LINE, iter_samples, read_manifest, read_samples, sample_root, write_samples
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.samples.validate import check_file, summarise, validate_file

FURNITURE = [
    box("bed", 1.8, 1.2, 0.3, (2.0, 1.5, 0.6), "b1"),
    box("chair", -1.5, 1.2, -1.1, uid="c1"),
    box("chair", -1.5, -1.2, 0.4, uid="c2"),
    box("table", 1.5, -1.5, 0.1, (1.2, 0.8, 0.75), "t1"),
]
TASKS = ("anchors", "qa", "lists", "negatives", "planes")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    for scene_id, fold in (("42444499", "Training"), ("42444501", "Validation")):
        write_scene(folder / "raw", FURNITURE, scene_id=scene_id, fold=fold, poses=walk(12), size=(128, 96),
                    K=np.array([[100.0, 0, 63.5], [0, 100, 47.5], [0, 0, 1]]))  # fmt: skip
    return prepare_arkitscenes(folder / "raw", folder / "out", num_views=8, workers=1, progress=False, tasks=TASKS)


def replanted(good, tmp_path, name, change, **manifest) -> Path:
    """The file's records after `change`, under a new name with a good manifest."""
    records = read_samples(good[name])
    change(records)
    path = tmp_path / f"{name}.jsonl"
    write_samples(path, records, {"root": sample_root(good[name]), **manifest})
    return path


def test_held_out_sets_of_others_may_share_scenes(good, tmp_path):
    """Officially SQA3D's test and ScanQA's val do; only training on what is held out is a fault."""
    record = read_samples(good["qa_val"])[0]
    for split, source in (("val", "scanqa"), ("test", "sqa3d")):
        path = tmp_path / f"{source}_{split}.jsonl"
        write_samples(path, [record | {"split": split, "source": source}], {"root": sample_root(good["qa_val"])})
    assert reasons(tmp_path / "scanqa_val.jsonl") == [] == reasons(tmp_path / "sqa3d_test.jsonl")
    path = tmp_path / "scanqa_train.jsonl"
    write_samples(path, [record | {"split": "train", "source": "scanqa"}], {"root": sample_root(good["qa_val"])})
    assert any("is in train here and in test in sqa3d_test.jsonl" in reason for _, reason in reasons(path))


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e400"])
def test_a_number_that_is_not_finite_is_named_with_its_record(good, tmp_path, number):
    path = replanted(good, tmp_path, "anchors_train", lambda records: None)
    lines = path.read_text().splitlines()
    record = json.loads(lines[1])
    old = json.dumps(record["geom_token"]["t"][0])
    lines[1] = lines[1].replace(old, old.replace(json.dumps(record["geom_token"]["t"][0][0]), number, 1), 1)
    lines[2] = re.sub(r'"coverage": [0-9.]+', f'"coverage": {number}', lines[2])
    path.write_text("\n".join(lines) + "\n")
    faults = {fault.record: fault for fault in validate_file(path)}
    assert "geom_token.t" in faults[2].reason and faults[2].id == record["question_id"]
    assert "coverage: holds a number that is not finite" in faults[3].reason


def test_a_folder_that_ends_like_a_file_is_passed_over(good, tmp_path):
    path = replanted(good, tmp_path, "anchors_train", lambda records: None)
    (tmp_path / "other.jsonl").mkdir()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark changes the hash and nothing else
    assert [record for record, _ in reasons(path)] == [0]


def reasons(path: Path) -> list[tuple[int, str]]:
    faults = validate_file(path)
    assert all(fault.remedy for fault in faults)
    return [(fault.record, fault.reason) for fault in faults]


def set_action(record: dict, **values) -> None:
    record["action_json"] = json.dumps({**json.loads(record["action_json"]), **values})


# Lists, none and planes -----------------------------------------------------------------------------------------------


def test_all_kinds_are_good(good):
    for name, path in good.items():
        assert len(read_samples(path)) and reasons(path) == [], name


def change_list(record: dict, change) -> None:
    actions = json.loads(record["action_json"])
    change(actions)
    record["action_json"] = json.dumps(actions)


KINDS = {
    "list with one too few": ("lists", lambda r: change_list(r, lambda a: a.pop()), "marks 1 of the record's 2 boxes"),
    "list with one twice": ("lists", lambda r: change_list(r, lambda a: a.append(a[0])), "or of one marked twice"),
    "list of another scene": (
        "lists",
        lambda r: change_list(r, lambda a: a[1].update(scene="42444501")),
        "action_json is about scene '42444501', not '42444499'",
    ),
    "list with a wrong extent": (
        "lists",
        lambda r: change_list(r, lambda a: a[1].update(extent=[0.5, 0.5, 0.5])),
        "extent .* is not that of its box",
    ),
    "list with none in it": (
        "lists",
        lambda r: change_list(r, lambda a: a.append({"action": "none", "scene": "42444499", "reason": "ambiguous"})),
        "none beside other actions",
    ),
    "none for what is there": (
        "negatives",
        lambda r: r.update(instruction="Place an anchor on the bed."),
        "the scene holds a bed, which action_json says is not present",
    ),
    "none for a reason of its own": ("negatives", lambda r: set_action(r, reason="tired"), "action_json: reason"),
    "none with a target": (
        "negatives",
        lambda r: r.update(
            boxes=[{"label": "bed", "center": [0, 0, 0], "extent": [1, 1, 1], "rotation": np.eye(3).ravel().tolist(),
                    "object_id": "x"}],
            object_ids=["x"],
        ),
        "action_json is none, but the record has 1 boxes",
    ),
    "plane with another normal": ("planes", lambda r: set_action(r, normal=[0, 1, 0], yaw=45), "turned by"),
    "plane without yaw": (
        "planes",
        lambda r: r.update(action_json=r["action_json"][: r["action_json"].index(', "yaw"')] + "}"),
        "normal .* of a box is not horizontal",
    ),
    "plane elsewhere": ("planes", lambda r: set_action(r, center=[0, 0, 1]), "center of none of the record's boxes"),
    "plane of another size": ("planes", lambda r: set_action(r, extent=[1, 1, 0.01]), "extent .* not that of its box"),
    "instruction about nothing there": (
        "anchors",
        lambda r: r.update(instruction="Place an anchor on the bed nearest to the bathtub."),
        "the instruction names a bathtub, and the scene holds none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_fault_of_another_kind_is_found(good, tmp_path, name):
    kind, change, words = KINDS[name]
    categories = {"42444499": {"bed": 1, "chair": 2, "table": 1}}
    path = replanted(good, tmp_path, f"{kind}_train", lambda records: change(records[0]), categories=categories)
    found = reasons(path)
    assert len(found) == 1 and found[0][0] == 1, found
    assert re.search(words, found[0][1]), found


@pytest.mark.parametrize("words", ["Place an anchor on the chair.", "please MARK a chair with an anchor"])
def test_a_bare_category_that_the_scene_holds_twice_is_ambiguous(good, tmp_path, words):
    """Every other record of the file stays good; the counts come from the manifest that preparing wrote."""
    told = read_manifest(good["anchors_train"])["categories"]
    assert told == {"42444499": {"bed": 1, "chair": 2, "table": 1}}

    def shorten(records):
        index = next(i for i, r in enumerate(records) if "chair nearest" in r["instruction"])
        records[index]["instruction"] = words
        records.insert(0, records.pop(index))

    found = reasons(replanted(good, tmp_path, "anchors_train", shorten, categories=told))
    assert found == [(1, "ambiguous: the instruction says chair and no more, and the scene holds 2")]


@pytest.mark.parametrize("source", ["scanrefer", "nr3d", "arkitscenes"])
def test_one_instruction_for_two_targets_is_a_fault(good, tmp_path, source):
    def repeat(records):
        del records[2:]
        for record in records:
            task = "place_anchor" if source == "arkitscenes" else source
            record.update(source=source, task=task, instruction="Place an anchor on it.")

    (fault,) = validate_file(replanted(good, tmp_path, "anchors_train", repeat))
    assert fault.record == 2 and fault.reason.startswith("ambiguous: record 1 ")
    assert fault.remedy.startswith("name the target" if source == "arkitscenes" else "remove one of them")


# What a record may hold -----------------------------------------------------------------------------------------------


def text_only(record: dict) -> None:
    for key in ("depths", "view_ids", "coverage", "baseline_m", "boxes", "object_ids"):
        record.pop(key, None)
    record.update(images=[], geom_token=None, without_views=True, source="sqa3d", task="sqa3d")


def test_records_without_views_are_counted(good, tmp_path):
    path = replanted(good, tmp_path, "qa_train", lambda records: list(map(text_only, records)))
    report = check_file(path)
    assert report.faults == []
    count = len(read_samples(path))
    assert report.counts["records"] == report.counts["without views, for text-only use"] == count
    assert f"{count} without views" in summarise(path, report)


def test_hidden_answers_are_counted(good, tmp_path):
    def hide(records):
        del records[0]["answer"]
        records[0]["answers"] = []

    path = replanted(good, tmp_path, "qa_train", hide)
    report = check_file(path)
    assert report.faults == [] and report.counts["without answers, to be predicted on only"] == 1


def test_published_annotations_may_contradict_themselves(good, tmp_path):
    """SQA3D's test set asks one question twice in the same words, with two answers: to be counted, not mended."""

    def repeat(records):
        del records[2:]
        for record in records:
            text_only(record)
        records[1].update(question=records[0]["question"], situation=records[0].get("situation", ""), answer="backward")
        records[0].setdefault("situation", "")

    path = replanted(good, tmp_path, "qa_train", repeat)
    report = check_file(path)
    assert report.faults == []
    assert report.counts["that ask the same as another and expect something else, as published"] == 1
    assert "expect something else, as published: records 2\n" in summarise(path, report) + "\n"
    ours = replanted(good, tmp_path, "qa_train", lambda r: (repeat(r), [x.update(source="arkitscenes") for x in r]))
    assert [reason for _, reason in reasons(ours)] == [
        "ambiguous: record 1 asks the same of these views and expects another answer"
    ]


def test_same_words_about_other_views_or_boxes_are_no_contradiction(good, tmp_path):
    def ask(records):
        del records[2:]
        for number, record in enumerate(records):
            record.update(question="Describe the object in <box_0>.", answer=f"it is {number}", task="scan2cap")
            record.update(boxes=read_samples(good["anchors_train"])[number]["boxes"])
            record.update(object_ids=[record["boxes"][0]["object_id"]], situation="")

    assert reasons(replanted(good, tmp_path, "qa_train", ask)) == []


def test_another_view_set_may_show_other_instances(good, tmp_path):
    """The same words of other views may mean more or fewer objects; of the same views in another order they may not."""

    def split(records):
        del records[1:]
        twin = json.loads(json.dumps(records[0]))
        actions, keep = json.loads(twin["action_json"]), slice(0, 1)
        twin.update(action_json=json.dumps(actions[keep]), boxes=twin["boxes"][keep], question_id="other")
        twin["object_ids"] = twin["object_ids"][keep]
        for key in ("images", "depths", "view_ids"):
            twin[key] = twin[key][::-1]
        twin["geom_token"] = {key: rows[::-1] for key, rows in twin["geom_token"].items()}
        records.append(twin)

    def drop_a_view(records):
        split(records)
        for key in ("images", "depths", "view_ids"):
            records[1][key].pop()
        for rows in records[1]["geom_token"].values():
            rows.pop()
        del records[1]["baseline_m"]

    found = reasons(replanted(good, tmp_path, "lists_train", split))
    assert len(found) == 1 and "ambiguous: record 1 asks the same of these views" in found[0][1]
    assert reasons(replanted(good, tmp_path, "lists_train", drop_a_view)) == []


def test_depth_in_other_units(good, tmp_path):
    """Stored depth with 4000 units per metre has another histogram than with 1000."""
    path = replanted(good, tmp_path, "qa_train", lambda records: records[0].update(depth_scale=4000))
    assert {reason[:27] for _, reason in reasons(path)} == {"geom_token.depth_hist of vi"}


def test_summary_tells_coverage_and_parallax(good):
    text = summarise(good["qa_train"], check_file(good["qa_train"]))
    assert "no faults" in text and "coverage: 0." in text and "baseline_m: " in text


# Hostile files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_non_finite_pose(good, tmp_path, word):
    path = tmp_path / "anchors_train.jsonl"
    record = read_samples(good["anchors_train"])[1]
    record["geom_token"]["R"][0][0] = "HERE"
    path.write_text(json.dumps(record).replace('"HERE"', word) + "\n")
    found = reasons(path)
    assert len(found) == 1 and found[0][0] == 1
    assert "is no number" in found[0][1] or "geom_token.R: expected [8, 9] finite numbers" in found[0][1]
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 1 and "record 1" in result.output and "Remedy: build the file again" in result.output


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a picture of this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("side", "words"), [(100_000, "exceeds limit"), (8_000, "8000x8000 pixels, more than 50000000 are refused")]
)
def test_picture_of_too_many_pixels(good, tmp_path, side, words):
    record = read_samples(good["qa_train"])[0]
    name = record["images"][0]
    for other in record["images"] + record["depths"]:
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).symlink_to(sample_root(good["qa_train"]) / other)
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(huge_png(side, side))
    path = tmp_path / "qa_train.jsonl"
    write_samples(path, [record], {"root": tmp_path})
    found = reasons(path)
    assert len(found) == 1 and found[0][0] == 1 and name in found[0][1] and words in found[0][1]


@pytest.mark.parametrize("name", ["../raw/x.png", "/etc/passwd", "a/../../x.png", "..\\x.png"])
def test_path_that_climbs_out(good, tmp_path, name):
    path = replanted(good, tmp_path, "anchors_train", lambda records: records[1]["images"].__setitem__(0, name))
    found = reasons(path)
    assert found[0][0] == 2 and "expected a path below" in found[0][1]


def test_line_of_a_gigabyte_is_refused_in_little_memory(good, tmp_path):
    """A process that may use 600 MB reads past the line, names it, and checks the record after it."""
    path = tmp_path / "anchors_train.jsonl"
    record = json.dumps(read_samples(good["anchors_train"])[0])
    with path.open("wb") as file:
        file.write(b'{"images": "')
        file.truncate(2**30)  # zeros that take no place on the disk
        file.seek(0, 2)
        file.write(b'"}\n' + record.encode() + b"\n")
    (tmp_path / "Training").symlink_to(sample_root(good["anchors_train"]) / "Training")
    code = (
        "import re, sys; from roomplan_lib.samples.validate import validate_file\n"
        "for fault in validate_file(sys.argv[1]): print(fault)\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())\n"
        "print(int(peak[1]) // 1024, 'MB')"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120)
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and f":1: longer than {MAX_LINE} characters" in lines[0], result.stdout + result.stderr
    assert int(lines[1].split()[0]) < 600


def test_long_lines_are_counted_right(tmp_path, monkeypatch):
    monkeypatch.setattr("roomplan_lib.samples.MAX_LINE", 20)
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n' + "x" * 100 + '\n{"b": 2}\n\n{"c": "' + "y" * 15 + '"}')
    found = list(iter_samples(path))
    assert [number for number, _ in found] == [1, 2, 3, 5]
    assert found[0][1] == {"a": 1} and found[2][1] == {"b": 2}
    assert "x.jsonl:2: longer than 20" in str(found[1][1]) and "x.jsonl:5: longer" in str(found[3][1])


def test_array_of_a_gigabyte_is_refused(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.write(b"[")
        file.truncate(2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = "a JSON array of 1073741824 bytes is too large; write one record per line"
    assert any(words in reason for _, reason in reasons(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
