"""ScanQA, SQA3D, ScanRefer, Multi3DRefer, Scan2Cap and Nr3D: their files, and the records made of them."""

import hashlib
import json
import os
import re
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scannet_files import ALIGNMENT, BOXES, DEPTH_K, DEPTH_SIZE, SCENE_ID, color_and_depth, write_pictures, write_scan
from scene_files import walk
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

import roomplan_lib.samples.annotations as reading
from roomplan_lib.actions import ActionList, NoAction, PlaceAnchor, parse_action
from roomplan_lib.cli import app
from roomplan_lib.geometry import box_iou_3d
from roomplan_lib.samples import box_from_record, read_manifest, read_samples
from roomplan_lib.samples.annotated import prepare_annotations, summarise
from roomplan_lib.samples.annotation_files import write_annotations
from roomplan_lib.samples.annotations import file_split, iter_entries
from roomplan_lib.samples.grounding import read_multi3drefer, read_nr3d, read_scan2cap, read_scanrefer
from roomplan_lib.samples.scanqa import read_scanqa
from roomplan_lib.samples.sqa3d import question_type, read_sqa3d
from roomplan_lib.samples.targets import question_text, response_text
from roomplan_lib.samples.validate import validate_file
from roomplan_lib.scenes.rooms import write_scannet_rooms

SQA3D = Path(__file__).parents[2] / "shared" / "data" / "sqa3d"
QUESTIONS, ANNOTATIONS = "v1_balanced_questions_{}_scannetv2.json", "v1_balanced_sqa_annotations_{}_scannetv2.json"
QUIET = {"progress": False, "workers": 1}


def run(*arguments):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """One scan whose files were written by hand, its boxes known; pictures beside it."""
    root = tmp_path_factory.mktemp("scannet")
    write_scan(root)
    write_pictures(root / "posed_images" / SCENE_ID, "posed_images")
    return root / "scans"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """Five rendered rooms as ScanNet scans with annotation files about them: four to train, one to validate."""
    root = tmp_path_factory.mktemp("rooms")
    sizes = {"image_size": (96, 72), "depth_size": (64, 48)}
    write_scannet_rooms(root, 5, seed=2, num_poses=8, **sizes, workers=1, progress=False)
    write_annotations(root, 2, progress=False)
    return root


# Entries of each kind about the scan written by hand --------------------------------------------------------------


def qa_entry(number=0, **changes):
    entry = {
        "scene_id": SCENE_ID, "question_id": f"val-scene0123-{number}", "question": "what is by the couch?",
        "answers": ["chair", "brown chair", "chair"], "object_ids": [0, 2], "object_names": ["office chair", "couch"],
    }  # fmt: skip
    return entry | changes


def question_entry(number=7, **changes):
    entry = {
        "scene_id": SCENE_ID, "situation": "I am sitting on the couch.", "question": "What is on my left?",
        "alternative_situation": ["I just sat down on the couch.", ""], "question_id": number,
    }  # fmt: skip
    return entry | changes


def answer_entry(number=7, **changes):
    entry = {
        "scene_id": SCENE_ID, "question_type": "N/A", "answer_type": "other", "question_id": number,
        "answers": [{"answer": "chair", "answer_confidence": "yes", "answer_id": 1}],
        "rotation": {"_x": 0, "_y": 0, "_z": 0, "_w": 1}, "position": {"x": 0.5, "y": -1.25, "z": 0},
    }  # fmt: skip
    return entry | changes


def refer_entry(object_id="0", ann_id="0", **changes):
    entry = {
        "scene_id": SCENE_ID, "object_id": object_id, "object_name": "office_chair", "ann_id": ann_id,
        "description": "this is a chair. it is in front of the couch.", "token": ["this", "is"],
    }  # fmt: skip
    return entry | changes


def multi_entry(object_ids=(0, 2), eval_type="mt", ann_id=0, **changes):
    entry = {
        "scene_id": SCENE_ID, "object_ids": list(object_ids), "object_name": "chair", "ann_id": ann_id,
        "eval_type": eval_type, "description": "things to sit on", "spatial": True,
    }  # fmt: skip
    return entry | changes


def sqa3d_files(folder, questions, answers, split="val"):
    return (
        dump(folder / QUESTIONS.format(split), {"info": {}, "questions": questions}),
        dump(folder / ANNOTATIONS.format(split), {"info": {}, "annotations": answers}),
    )


# SQA3D ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SQA3D.is_dir(), reason="the published SQA3D test files are not at hand")
def test_the_published_sqa3d_test_set_from_the_shell(tmp_path):
    files = SQA3D / QUESTIONS.format("test"), SQA3D / ANNOTATIONS.format("test")
    output = tmp_path / "sqa3d_test.jsonl"
    result = run("sqa3d", "--questions", files[0], "--annotations", files[1], "--output", output)
    assert result.exit_code == 0, result.output
    assert "WITHOUT VIEWS" in result.stdout and "3519" in result.stdout and "67 scenes" in result.stdout
    records = read_samples(output)
    assert len(records) == 3519 and len({record["scene_id"] for record in records}) == 67
    types = Counter(record["question_type"] for record in records)
    assert [types[name] for name in ("what", "is", "how", "can", "which", "other")] == [1147, 652, 465, 338, 351, 566]
    assert len({record["question_id"] for record in records}) == 3519
    published = {str(entry["question_id"]): entry for entry in json.loads(files[0].read_text())["questions"]}
    answers = {str(entry["question_id"]): entry for entry in json.loads(files[1].read_text())["annotations"]}
    for record in records:
        entry, answer = published[record["question_id"]], answers[record["question_id"]]
        assert record["scene_id"] == entry["scene_id"] == answer["scene_id"]
        assert (record["situation"], record["question"]) == (entry["situation"].strip(), entry["question"].strip())
        assert record["answers"] == [answer["answers"][0]["answer"].strip()] == [record["answer"]]
        assert record["split"] == "test" and record["without_views"] is True
        assert record["images"] == [] and record["geom_token"] is None
    manifest = read_manifest(output)
    for path in files:
        assert manifest["annotations"][path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert not [fault for fault in validate_file(output) if "ambiguous" not in fault.reason]


def test_question_types_are_counted_by_the_first_letters():
    examples = {
        "What's up?": "what", " whatever it is?": "what", "Is it?": "is", "HOW many": "how", "Can I": "can",
        "which one": "which", "If I turn": "other", "wwhat is": "other", "Are there": "other", "I can": "other",
    }  # fmt: skip
    assert {question: question_type(question) for question in examples} == examples


@pytest.mark.parametrize("flip", [1, -1])
def test_the_agent_stands_and_looks_where_sqa3d_puts_it(scans, tmp_path, flip):
    """The annotation is derived the other way round: from a place and a heading in the aligned world."""
    position, heading = np.array([0.7, -0.4, 1.1]), 2.1
    facing = np.array([np.cos(heading), np.sin(heading), 0.0])
    data = (scans / SCENE_ID / f"{SCENE_ID}_vh_clean_2.ply").read_bytes()
    start = data.index(b"end_header\n") + len(b"end_header\n")
    count = int(re.search(rb"element vertex (\d+)", data)[1])
    rows = np.frombuffer(data, np.dtype([("xyz", "<f4", 3), ("rgba", "u1", 4)]), count, start)
    center = (rows["xyz"].min(0).astype(float) + rows["xyz"].max(0)) / 2
    to_mesh = np.linalg.inv(ALIGNMENT)
    backwards = -to_mesh[:3, :3] @ facing  # the agent's own x axis, in the mesh's world
    yaw = np.arctan2(backwards[1], backwards[0])
    quaternion = flip * Rotation.from_euler("z", yaw).as_quat()
    local = to_mesh[:3, :3] @ position + to_mesh[:3, 3] - center
    answer = answer_entry(
        position=dict(zip("xyz", local.tolist(), strict=True)),
        rotation=dict(zip(("_w", "_z", "_y", "_x"), quaternion[::-1].tolist(), strict=True)),
    )
    files = sqa3d_files(tmp_path, [question_entry()], [answer])
    prepare_annotations(read_sqa3d(*files), tmp_path / "out.jsonl", scans=scans, **QUIET)
    (record,) = read_samples(tmp_path / "out.jsonl")
    np.testing.assert_allclose(record["agent"]["position"], position, atol=2e-4)
    np.testing.assert_allclose(record["agent"]["facing"], facing, atol=2e-6)
    assert record["alternative_situations"] == ["I just sat down on the couch."]
    assert record["question_id"] == "7" and record["split"] == "val" and record["source"] == "sqa3d"


def test_a_scan_without_a_mesh_leaves_the_agent_out_and_says_so(scans, tmp_path):
    shutil.copytree(scans.parent, tmp_path / "root")
    folder = tmp_path / "root" / "scans" / SCENE_ID
    for name in ("_vh_clean_2.ply", "_vh_clean_2.0.010000.segs.json", ".aggregation.json"):
        (folder / f"{SCENE_ID}{name}").unlink()
    files = sqa3d_files(tmp_path, [question_entry()], [answer_entry()])
    manifest = prepare_annotations(read_sqa3d(*files), tmp_path / "o.jsonl", scans=tmp_path / "root", **QUIET)
    (record,) = read_samples(tmp_path / "o.jsonl")
    assert "agent" not in record and record["geom_token"] is not None
    assert "unknown for 1 records" in summarise(manifest)


def test_left_and_right_follow_from_the_agent_of_rendered_rooms(rooms, tmp_path):
    """The record's own position and facing, and the boxes of the record's scan, give the answer's word."""
    folder = rooms / "annotations" / "sqa3d"
    read = read_sqa3d(folder / QUESTIONS.format("train"), folder / ANNOTATIONS.format("train"))
    prepare_annotations(read, tmp_path / "sqa3d_train.jsonl", scans=rooms / "scans", **QUIET)
    qa = read_scanqa(rooms / "annotations" / "scanqa" / "ScanQA_v1.0_train.json")
    prepare_annotations(qa, tmp_path / "scanqa_train.jsonl", scans=rooms, **QUIET)
    boxes = {}
    for record in read_samples(tmp_path / "scanqa_train.jsonl"):
        for box in record["boxes"]:
            boxes.setdefault(record["scene_id"], {})[box["object_id"]] = box
    asked = 0
    for record in read_samples(tmp_path / "sqa3d_train.jsonl"):
        match = re.fullmatch(r"Is the (.+) on my left or on my right\?", record["question"])
        named = [box for box in boxes[record["scene_id"]].values() if match and box["label"] == match[1]]
        if not match or len(named) != 1:
            continue
        offset = np.array(named[0]["center"])[:2] - record["agent"]["position"][:2]
        ahead = record["agent"]["facing"]
        side = ahead[0] * offset[1] - ahead[1] * offset[0]  # of the cross product, up: counter-clockwise is left
        assert record["answer"] == ("left" if side > 0 else "right")
        asked += 1
    assert asked > 10
    for name in ("sqa3d_train", "scanqa_train"):
        assert validate_file(tmp_path / f"{name}.jsonl") == []


# ScanQA -----------------------------------------------------------------------------------------------------------


def test_scanqa_keeps_every_answer_and_the_boxes_of_its_objects(scans, tmp_path):
    entries = [qa_entry(0), qa_entry(1, object_ids=[7], answers=["curtain"])]
    path = dump(tmp_path / "ScanQA_v1.0_val.json", entries)
    output = tmp_path / "scanqa_val.jsonl"
    result = run("scanqa", "--qa-file", path, "--scans", scans, "--output", output, "--num-views", 4, "--workers", 1)
    assert result.exit_code == 0, result.output
    first, second = read_samples(output)
    assert first["answers"] == ["chair", "brown chair", "chair"] and first["answer"] == "chair"
    assert first["object_ids"] == ["0", "2"] and second["object_ids"] == ["7"]
    assert [box["label"] for box in first["boxes"] + second["boxes"]] == ["chair", "sofa", "curtain"]
    assert first["split"] == "val" and first["question_id"] == "val-scene0123-0" and first["scene_id"] == SCENE_ID
    for record, wanted in ((first["boxes"][1], BOXES[2]), (second["boxes"][0], BOXES[3])):
        np.testing.assert_allclose(record["center"], wanted.center, atol=2e-3)
        np.testing.assert_allclose(record["extent"], wanted.extent, atol=2e-3)
    assert len(first["images"]) == 4 and all(f"posed_images/{SCENE_ID}/" in name for name in first["images"])
    assert first["coverage"] > 0 and first["baseline_m"] > 0.5
    # The views' poses are those of the walk, in the aligned world.
    poses = {f"{10 * index:05}": pose for index, pose in enumerate(walk(6))}
    geometry = first["geom_token"]
    for name, rotation, center in zip(first["view_ids"], geometry["R"], geometry["t"], strict=True):
        np.testing.assert_allclose(np.reshape(rotation, (3, 3)), poses[name][:3, :3], atol=1e-5)
        np.testing.assert_allclose(center, poses[name][:3, 3], atol=1e-5)
    assert validate_file(output) == []


def test_test_files_hide_their_answers(tmp_path):
    hidden = {key: value for key, value in qa_entry(question_id="test-scene0123-0").items() if key != "answers"}
    path = dump(tmp_path / "ScanQA_v1.0_test_w_obj.json", [hidden])
    manifest = prepare_annotations(read_scanqa(path), tmp_path / "o.jsonl")
    (record,) = read_samples(tmp_path / "o.jsonl")
    assert record["answers"] == [] and "answer" not in record and record["split"] == "test"
    assert "hidden for 1 records" in summarise(manifest)
    assert validate_file(tmp_path / "o.jsonl") == []
    without = {key: value for key, value in hidden.items() if not key.startswith("object")}
    assert "object_ids" not in read_scanqa(dump(tmp_path / "ScanQA_v1.0_test_wo_obj.json", [without])).records[0]


# Grounding and captions -------------------------------------------------------------------------------------------


def test_scanrefer_descriptions_become_instructions_for_the_described_box(scans, tmp_path):
    entries = [
        refer_entry("0", "0"),
        refer_entry("0", "1", description="the only seat with wheels"),
        refer_entry("2", "0", object_name="couch", description="a long sofa"),
        refer_entry("1", "0", description="a low cupboard"),
    ]
    path = dump(tmp_path / "ScanRefer_filtered_val.json", entries)
    prepare_annotations(read_scanrefer(path), tmp_path / "o.jsonl", scans=scans, num_views=5, **QUIET)
    records = read_samples(tmp_path / "o.jsonl")
    for record, entry in zip(records, entries, strict=True):
        assert record["description"] == entry["description"] and entry["description"] in record["instruction"]
        truth = next(box for box in BOXES if box.object_id == entry["object_id"])
        action = parse_action(record["action_json"], categories=None)
        assert isinstance(action, PlaceAnchor) and action.scene == SCENE_ID
        assert box_iou_3d(action.to_box(), truth) > 0.99
        assert response_text(record).startswith('{"action":"place_anchor","category":')
    categories = [parse_action(record["action_json"], categories=None).category for record in records]
    assert categories == ["chair", "chair", "sofa", "cabinet"]
    # Objects 0 and 1 bear one name, object 2 has one of its own.
    assert [record["eval_type"] for record in records] == ["multiple", "multiple", "unique", "multiple"]
    assert [record["question_id"] for record in records][:2] == [f"{SCENE_ID}-0-0", f"{SCENE_ID}-0-1"]
    assert validate_file(tmp_path / "o.jsonl") == []
    wordings = {tuple(r["instruction"] for r in read_scanrefer(path, seed=seed).records) for seed in range(8)}
    assert len(wordings) > 1 and read_scanrefer(path, seed=3).records == read_scanrefer(path, seed=3).records


def test_multi3drefer_asks_for_none_one_or_several(scans, tmp_path):
    entries = [
        multi_entry((), "zt_w_d", 0),
        multi_entry((), "zt_wo_d", 1, description="pianos"),
        multi_entry((0,), "st_w_d", 2, description="a seat"),
        multi_entry((2,), "st_wo_d", 3, description="a long seat"),
        multi_entry((0, 2, 7), "mt", 4),
    ]
    path = dump(tmp_path / "multi3drefer_train.json", entries)
    prepare_annotations(read_multi3drefer(path), tmp_path / "o.jsonl", scans=scans, **QUIET)
    records = read_samples(tmp_path / "o.jsonl")
    actions = [parse_action(record["action_json"], categories=None) for record in records]
    assert [type(action) for action in actions] == [NoAction, NoAction, PlaceAnchor, PlaceAnchor, ActionList]
    assert json.loads(records[0]["action_json"]) == {"action": "none", "scene": SCENE_ID, "reason": "not_present"}
    assert [action.category for action in actions[4].actions] == ["chair", "sofa", "curtain"]
    assert [record["eval_type"] for record in records] == [entry["eval_type"] for entry in entries]
    assert [record["object_ids"] for record in records] == [[], [], ["0"], ["2"], ["0", "2", "7"]]
    assert len(json.loads(response_text(records[4]))) == 3
    assert validate_file(tmp_path / "o.jsonl") == []


def test_scan2cap_gathers_all_captions_of_an_object(scans, tmp_path):
    entries = [
        refer_entry("0", "0"),
        refer_entry("2", "0", object_name="couch", description="a long sofa"),
        refer_entry("0", "4", description="it has wheels"),
    ]
    path = dump(tmp_path / "ScanRefer_filtered_train.json", entries)
    prepare_annotations(read_scan2cap(path), tmp_path / "o.jsonl", scans=scans, **QUIET)
    chair, sofa = read_samples(tmp_path / "o.jsonl")
    assert chair["answers"] == [entries[0]["description"], "it has wheels"] and sofa["answers"] == ["a long sofa"]
    assert chair["question_id"] == f"{SCENE_ID}-0" and "<box_0>" in chair["question"]
    assert box_iou_3d(box_from_record(sofa["boxes"][0]), BOXES[2]) > 0.99
    written = question_text(sofa)
    assert "<box_0>" not in written and "2.00,0.90,0.60" in written.replace(" ", "")
    assert validate_file(tmp_path / "o.jsonl") == []


def test_nr3d_utterances_are_of_the_split_whose_list_names_their_scan(scans, tmp_path):
    path = tmp_path / "nr3d.csv"
    path.write_text(
        "assignmentid,stimulus_id,utterance,scan_id,instance_type,target_id\n"
        f'1,a,"the chair, not\nthe sofa",{SCENE_ID},office chair,0\n'
        "2,b,the other one,scene0999_00,chair,3\n"
    )
    (tmp_path / "scannetv2_val.txt").write_text(f"{SCENE_ID}\nscene0001_00\n")
    read = read_nr3d(path, tmp_path / "scannetv2_val.txt")
    prepare_annotations(read, tmp_path / "o.jsonl", scans=scans, **QUIET)
    (record,) = read_samples(tmp_path / "o.jsonl")
    assert record["split"] == "val" and record["description"] == "the chair, not\nthe sofa"
    assert parse_action(record["action_json"]).category == "chair"
    (tmp_path / "scannetv2_train.txt").write_text("scene0001_00\n")
    with pytest.raises(ValueError, match="none of 2 utterances"):
        read_nr3d(path, tmp_path / "scannetv2_train.txt")


def test_grounding_without_scans_is_text_only_and_marked(tmp_path):
    path = dump(tmp_path / "ScanRefer_filtered_val.json", [refer_entry()])
    for name in ("scanrefer", "scan2cap"):
        result = run(name, "--annotations", path, "--output", tmp_path / f"{name}.jsonl")
        assert result.exit_code == 0 and "WITHOUT VIEWS" in result.stdout
        (record,) = read_samples(tmp_path / f"{name}.jsonl")
        assert record["without_views"] is True and record["images"] == [] and record["geom_token"] is None
        assert record["object_ids"] == ["0"] and "action_json" not in record and "boxes" not in record
    assert validate_file(tmp_path / "scanrefer.jsonl") == []
    assert read_samples(tmp_path / "scanrefer.jsonl")[0]["description"] == refer_entry()["description"]


def test_instructions_about_objects_out_of_view_can_be_left_out(scans, tmp_path):
    """With one view; what it shows is counted here from its depth picture, point by point."""
    entries = [refer_entry(box.object_id, description=f"number {box.object_id}") for box in BOXES]
    path = dump(tmp_path / "ScanRefer_filtered_train.json", entries)
    read = read_scanrefer(path)
    options = {"scans": scans, "num_views": 1, **QUIET}
    everything = prepare_annotations(read, tmp_path / "all.jsonl", **options)
    manifest = prepare_annotations(read, tmp_path / "shown.jsonl", shown_only=True, **options)
    kept = {record["object_ids"][0] for record in read_samples(tmp_path / "shown.jsonl")}
    index = int(read_samples(tmp_path / "all.jsonl")[0]["view_ids"][0]) // 10
    _, depth = color_and_depth(index)
    v, u = np.mgrid[: DEPTH_SIZE[1], : DEPTH_SIZE[0]]
    z = depth / 1000
    camera = np.stack([(u - DEPTH_K[0, 2]) / DEPTH_K[0, 0] * z, (v - DEPTH_K[1, 2]) / DEPTH_K[1, 1] * z, z], -1)
    pose = walk(6)[index]
    points = (camera @ pose[:3, :3].T + pose[:3, 3]).reshape(-1, 3)
    counts = {}
    for box in BOXES:
        inside = (np.abs(points - box.center) <= box.extent / 2 + 0.02).all(-1) & (points[:, 2] > 0.06)
        counts[box.object_id] = inside.sum() * 256 * 192 / depth.size
    clear = {name for name, count in counts.items() if count > 400}
    hidden = {name for name, count in counts.items() if count < 50}
    assert clear and hidden and clear <= kept and not hidden & kept, counts
    assert everything["num_samples"] == len(BOXES) == len(kept) + manifest["num_not_shown"]
    assert everything["targets"] == {"asked": len(BOXES), "shown": len(kept)}
    assert "left out" in summarise(manifest)


# Scans ------------------------------------------------------------------------------------------------------------


def test_view_sets_have_records_and_ids_of_their_own(rooms, tmp_path):
    read = read_scanrefer(rooms / "annotations" / "scanrefer" / "ScanRefer_filtered_train.json")
    options = {"num_views": 3, "strategy": "random", "scans": rooms, **QUIET}
    prepare_annotations(read, tmp_path / "a_train.jsonl", view_sets=2, **options)
    records = read_samples(tmp_path / "a_train.jsonl")
    assert len(records) == 2 * len(read.records)
    assert [record["view_set"] for record in records[:4]] == [0, 1, 0, 1]
    assert records[1]["question_id"] == records[0]["question_id"] + "-v1"
    assert records[1]["images"] != records[0]["images"]
    assert validate_file(tmp_path / "a_train.jsonl") == []
    prepare_annotations(read, tmp_path / "other" / "a_train.jsonl", view_sets=2, seed=1, **options)
    assert [r["images"] for r in read_samples(tmp_path / "other" / "a_train.jsonl")] != [r["images"] for r in records]


def test_several_processes_write_the_same_bytes(rooms, tmp_path):
    read = read_multi3drefer(rooms / "annotations" / "multi3drefer" / "multi3drefer_train.json")
    for workers in (1, 2):
        output = tmp_path / str(workers) / "m_train.jsonl"
        prepare_annotations(read, output, scans=rooms, num_views=4, workers=workers, progress=False)
    assert (tmp_path / "1" / "m_train.jsonl").read_bytes() == (tmp_path / "2" / "m_train.jsonl").read_bytes()
    assert {r["eval_type"] for r in read.records} == {"zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt"}
    assert validate_file(tmp_path / "1" / "m_train.jsonl") == []


def test_scans_are_built_once_for_all_annotations_and_again_when_they_change(tmp_path):
    write_scan(tmp_path)
    pictures = write_pictures(tmp_path / "posed_images" / SCENE_ID, "posed_images")
    qa = read_scanqa(dump(tmp_path / "ScanQA_v1.0_val.json", [qa_entry()]))
    refer = read_scanrefer(dump(tmp_path / "ScanRefer_filtered_val.json", [refer_entry()]))
    options = {"scans": tmp_path / "scans", **QUIET}
    prepare_annotations(qa, tmp_path / "out" / "qa_val.jsonl", **options)
    (cached,) = (tmp_path / "out" / ".scans").iterdir()
    built, written = cached.stat().st_mtime_ns, (tmp_path / "out" / "qa_val.jsonl").stat().st_mtime_ns
    prepare_annotations(refer, tmp_path / "out" / "refer_val.jsonl", **options)
    prepare_annotations(qa, tmp_path / "out" / "qa_val.jsonl", **options | {"scans": tmp_path})
    assert cached.stat().st_mtime_ns == built
    assert (tmp_path / "out" / "qa_val.jsonl").stat().st_mtime_ns == written  # up to date, so left alone

    def build(**changes):
        prepare_annotations(qa, tmp_path / "out" / "qa_val.jsonl", **options | changes)
        return read_samples(tmp_path / "out" / "qa_val.jsonl")[0]

    whole = build()
    assert len(build(num_views=2)["images"]) == 2 < len(whole["images"])
    for damage in (cached.read_text()[:100], json.dumps({"key": json.loads(cached.read_text())["key"]})):
        cached.write_text(damage)
        (tmp_path / "out" / "qa_val.jsonl").unlink()
        assert build() == whole
    mesh = next((tmp_path / "scans" / SCENE_ID).glob("*_vh_clean_2.ply"))
    before = cached.stat().st_mtime_ns
    os.utime(mesh, ns=(1, 1))  # another mesh of the same size
    build()
    assert cached.stat().st_mtime_ns != before
    (pictures / "00000.jpg").unlink()
    assert f"posed_images/{SCENE_ID}/00000.jpg" in whole["images"]
    assert f"posed_images/{SCENE_ID}/00000.jpg" not in build()["images"]
    text = (tmp_path / "scans" / SCENE_ID / f"{SCENE_ID}.aggregation.json").read_text()
    (tmp_path / "scans" / SCENE_ID / f"{SCENE_ID}.aggregation.json").write_text(text.replace("couch", "bathtub"))
    assert [box["label"] for box in build()["boxes"]] == ["chair", "bathtub"]


def test_no_file_of_others_is_overwritten(tmp_path):
    path = dump(tmp_path / "ScanQA_v1.0_val.json", [qa_entry()])
    before = path.read_bytes()
    for output, reason in ((path, "is the file to read"), (dump(tmp_path / "mine.json", 1), "no builder wrote it")):
        result = run("scanqa", "--qa-file", path, "--output", output)
        assert result.exit_code == 1 and reason in result.output
    assert path.read_bytes() == before and (tmp_path / "mine.json").read_text() == "1"
    for _ in range(2):  # what a builder wrote is written again
        assert run("scanqa", "--qa-file", path, "--output", tmp_path / "out.jsonl").exit_code == 0


def test_a_byte_order_mark_is_no_json(tmp_path):
    path = dump(tmp_path / "ScanQA_v1.0_val.json", [qa_entry()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (record,) = read_scanqa(path).records
    assert record["object_names"] == ["office chair", "couch"]


def test_sqa3d_positions_are_kept_as_annotated(tmp_path):
    files = sqa3d_files(tmp_path, [question_entry()], [answer_entry()])
    (record,) = read_sqa3d(*files).records
    assert record["position"] == [0.5, -1.25, 0] and record["rotation"] == [0, 0, 0, 1]


def test_missing_and_broken_scans_are_named_or_left_out_on_demand(tmp_path):
    write_scan(tmp_path)
    write_pictures(tmp_path / "posed_images" / SCENE_ID, "posed_images")
    write_scan(tmp_path, "scene0200_00")
    broken = write_pictures(tmp_path / "posed_images" / "scene0200_00", "posed_images")
    for path in broken.glob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    entries = [qa_entry(k, scene_id=name) for k, name in enumerate([SCENE_ID, "scene0200_00", "scene0300_00"])]
    path = dump(tmp_path / "ScanQA_v1.0_val.json", entries)
    options = ("--qa-file", path, "--scans", tmp_path / "scans", "--workers", 1)
    refused = run("scanqa", *options, "--output", tmp_path / "o.jsonl")
    assert refused.exit_code == 1 and "scene0300_00: not there" in refused.stderr
    assert "1 of the 3 scans" in refused.stderr and "--skip-missing" in refused.stderr
    assert not (tmp_path / "o.jsonl").exists()
    result = run("scanqa", *options, "--output", tmp_path / "o.jsonl", "--skip-missing")
    assert result.exit_code == 0, result.output
    assert "scene0200_00" in result.stdout and "scene0300_00: not there" in result.stdout
    assert [record["scene_id"] for record in read_samples(tmp_path / "o.jsonl")] == [SCENE_ID]
    assert list(read_manifest(tmp_path / "o.jsonl")["left_out"]) == ["scene0200_00", "scene0300_00"]
    only_broken = read_scanqa(dump(tmp_path / "b" / "ScanQA_v1.0_val.json", entries[1:2]))
    with pytest.raises(ValueError, match=r"1 of the 1 scans.*\n.*scene0200_00.*jpg"):
        prepare_annotations(only_broken, tmp_path / "p.jsonl", scans=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="no record is left"):
        prepare_annotations(only_broken, tmp_path / "p.jsonl", scans=tmp_path, skip_missing=True, **QUIET)


def test_objects_that_the_scan_lacks_stop_the_run_with_nothing_written(scans, tmp_path):
    read = read_scanqa(dump(tmp_path / "ScanQA_v1.0_val.json", [qa_entry(), qa_entry(1, object_ids=[0, 55])]))
    with pytest.raises(ValueError, match=rf"val-scene0123-1.*{SCENE_ID} has no objects \['55'\]"):
        prepare_annotations(read, tmp_path / "out" / "o.jsonl", scans=scans, **QUIET)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".scans"]


def test_scans_of_the_test_set_have_no_boxes_to_ask_about(tmp_path):
    folder = write_scan(tmp_path, alignment=None)
    write_pictures(tmp_path / "posed_images" / SCENE_ID, "posed_images")
    (folder / f"{SCENE_ID}.aggregation.json").unlink()
    hidden = qa_entry(question_id="test-scene0123-0") | {"answers": []}
    read = read_scanqa(dump(tmp_path / "ScanQA_v1.0_test_w_obj.json", [hidden]))
    prepare_annotations(read, tmp_path / "o.jsonl", scans=tmp_path, **QUIET)
    (record,) = read_samples(tmp_path / "o.jsonl")
    assert "boxes" not in record and record["images"]
    path = dump(tmp_path / "ScanRefer_filtered_test.json", [refer_entry()])
    for read in (read_scanrefer(path), read_scan2cap(path)):
        with pytest.raises(ValueError, match="aggregation"):
            prepare_annotations(read, tmp_path / "p.jsonl", scans=tmp_path, **QUIET)


# Broken files -----------------------------------------------------------------------------------------------------

READERS = {
    "scanqa": (read_scanqa, "ScanQA_v1.0_val.json", qa_entry),
    "scanrefer": (read_scanrefer, "ScanRefer_filtered_val.json", refer_entry),
    "scan2cap": (read_scan2cap, "ScanRefer_filtered_val.json", refer_entry),
    "multi3drefer": (read_multi3drefer, "multi3drefer_val.json", multi_entry),
}


@pytest.mark.parametrize("name", READERS)
def test_every_missing_key_is_named_with_its_entry(name, tmp_path):
    read, file, make = READERS[name]
    unused = {"object_names", "token", "spatial"} | ({"object_name"} if name == "multi3drefer" else set())
    for key in set(make()) - unused:
        broken = {k: v for k, v in make().items() if k != key}
        other = {"question_id": "val-9"} if name == "scanqa" else {"ann_id": "9"}
        path = dump(tmp_path / file, [make(), broken | {k: v for k, v in other.items() if k != key}])
        with pytest.raises(ValueError, match=rf"{file}: entry 1: .*'{key}'"):
            read(path)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid or truncated JSON"),
        ('[{"scene_id": "scene0', "invalid or truncated JSON"),
        ("{}", "expected a list of objects, got dict"),
        ("[]", "no entry"),
        ("[1]", "entry 0: expected an object"),
        ('[{"scene_id": NaN}]', "NaN"),
        ("[" * 100_000, "recursion depth"),
        ("\xff", ""),
    ],
)
def test_files_that_are_no_annotations_are_refused(name, text, reason, tmp_path):
    read, file, _ = READERS[name]
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"(?s){file}.*{reason}"):
        read(tmp_path / file)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("scene_id", ["../scene0000_00", "a/b", "..", "scene\\..", "", 7, None, ".hidden", "x" * 200])
def test_scene_ids_name_a_folder_and_nothing_else(name, scene_id, tmp_path):
    read, file, make = READERS[name]
    with pytest.raises(ValueError, match="entry 0: scene_id: expected"):
        read(dump(tmp_path / file, [make(scene_id=scene_id)]))


@pytest.mark.parametrize(
    ("name", "entries", "reason"),
    [
        ("scanqa", [qa_entry(), qa_entry()], "entry 1: the id val-scene0123-0 is also that of .*entry 0"),
        ("scanqa", [qa_entry(question_id="train-scene0123-0")], "is of the split train, not of val"),
        ("scanqa", [qa_entry(answers=[])], "at least one"),
        ("scanqa", [qa_entry(answers="chair")], "answers: expected a list"),
        ("scanqa", [qa_entry(answers=["chair", " "])], "answers: expected a list"),
        ("scanqa", [qa_entry(question=3)], "question: expected text"),
        ("scanqa", [qa_entry(object_ids=[1.5])], "object_ids: expected a whole number"),
        ("scanqa", [qa_entry(object_ids=[True])], "object_ids: expected a whole number"),
        ("scanqa", [qa_entry(object_ids=[1, 1])], "stands twice"),
        ("scanrefer", [refer_entry(), refer_entry()], "entry 1: the id scene0123_01-0-0 is also"),
        ("scanrefer", [refer_entry(description="  ")], "description: expected text"),
        ("scanrefer", [refer_entry(object_id=None)], "object_id: expected a whole number"),
        ("scan2cap", [refer_entry(), refer_entry()], "entry 1: the id scene0123_01-0-0 is also"),
        ("multi3drefer", [multi_entry(), multi_entry()], "entry 1: the id scene0123_01-0 is also"),
        ("multi3drefer", [multi_entry(eval_type="many")], "eval_type: expected one of"),
        ("multi3drefer", [multi_entry((), "mt")], "mt does not go with 0"),
        ("multi3drefer", [multi_entry((0,), "mt")], "mt does not go with 1"),
        ("multi3drefer", [multi_entry((0, 2), "st_w_d")], "st_w_d does not go with 2"),
        ("multi3drefer", [multi_entry((0,), "zt_wo_d")], "zt_wo_d does not go with 1"),
    ],
)
def test_faulty_entries_are_named(name, entries, reason, tmp_path):
    read, file, _ = READERS[name]
    with pytest.raises(ValueError, match=rf"{file}: entry \d: .*{reason}|{file}: {reason}"):
        read(dump(tmp_path / file, entries))


@pytest.mark.parametrize(
    ("questions", "answers", "reason"),
    [
        ([question_entry(1), question_entry(2)], [answer_entry(1)], "entry 1: question 2 has no annotation"),
        ([question_entry(1)], [answer_entry(1), answer_entry(5)], "1 annotations have no question.*such as 5"),
        ([question_entry(1), question_entry(1)], [answer_entry(1)], "questions.*entry 1: the id 1 is also"),
        ([question_entry(1)], [answer_entry(1), answer_entry(1)], "annotations.*entry 1: the id 1 is also"),
        ([question_entry(1)], [answer_entry(1, scene_id="scene0009_00")], "about scene0123_01, its annotation about"),
        ([question_entry(1)], [answer_entry(1, answers=[])], "answers: expected a list"),
        ([question_entry(1)], [answer_entry(1, answers=[{"a": 1}])], "'answer' is missing"),
        ([question_entry(1)], [answer_entry(1, position={"x": 0, "y": 0})], "position: expected an object with"),
        ([question_entry(1)], [answer_entry(1, position={"x": "0", "y": 0, "z": 0})], "position: expected"),
        ([question_entry(1)], [answer_entry(1, rotation={"_x": 0, "_y": 0, "_z": 0, "_w": 0})], "unit quaternion"),
        ([question_entry(1)], [answer_entry(1, rotation=[0, 0, 0, 1])], "rotation: expected an object"),
        ([question_entry(1, situation=" ")], [answer_entry(1)], "situation: expected text"),
        ([question_entry(1, alternative_situation="x")], [answer_entry(1)], "alternative_situation: expected"),
    ],
)
def test_faulty_sqa3d_files_are_named(questions, answers, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        read_sqa3d(*sqa3d_files(tmp_path, questions, answers))


def test_infinite_positions_are_refused(tmp_path):
    files = sqa3d_files(tmp_path, [question_entry()], [answer_entry()])
    files[1].write_text(files[1].read_text().replace("-1.25", "1e999"))
    with pytest.raises(ValueError, match="entry 0: position: expected"):
        read_sqa3d(*files)


def test_files_of_another_split_or_kind_are_refused(tmp_path):
    questions, answers = sqa3d_files(tmp_path, [question_entry()], [answer_entry()])
    train = tmp_path / ANNOTATIONS.format("train")
    train.write_bytes(answers.read_bytes())
    with pytest.raises(ValueError, match="train, not of val"):
        read_sqa3d(questions, train)
    with pytest.raises(ValueError, match="val, not of test"):
        read_sqa3d(questions, answers, "test")
    with pytest.raises(ValueError, match="list 'questions'"):
        read_sqa3d(answers, answers)
    unnamed = dump(tmp_path / "questions.json", [qa_entry()])
    with pytest.raises(ValueError, match="does not tell the split"):
        read_scanqa(unnamed)
    assert read_scanqa(unnamed, "Validation").split == "val"
    missing = run("scanqa", "--qa-file", tmp_path / "no_val.json", "--output", tmp_path / "o.jsonl")
    assert missing.exit_code == 1 and "no such file of annotations" in missing.stderr
    assert missing.stderr.startswith("roomplan prepare scanqa: ") and missing.stderr.count("\n") == 1


def test_splits_are_read_from_official_names():
    names = {
        "ScanQA_v1.0_test_wo_obj.json": "test", "ScanQA_v1.0_train.json": "train", "scannetv2_val.txt": "val",
        "v1_balanced_questions_test_scannetv2.json": "test", "multi3drefer_train.json": "train",
        "ScanRefer_filtered_val.json": "val", "qa_Validation.json": "val",
    }  # fmt: skip
    assert {name: file_split(name, None) for name in names} == names
    for name, split in (("training_notes_val.json", None), ("constrain.json", None), ("a.json", "dev")):
        with pytest.raises(ValueError, match="split"):
            file_split(name, split)


@pytest.mark.parametrize("name", ["sqa3d", "scanqa", "scanrefer", "multi3drefer", "scan2cap", "nr3d", "instruct"])
def test_every_command_explains_itself(name):
    result = run(name, "--help")
    options = {"--output"} | ({"--scans", "--num-views", "--skip-missing"} if name != "instruct" else {"--images"})
    assert result.exit_code == 0 and all(option in result.output for option in options)


# Reading piece by piece -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64, 10_000])
def test_entries_come_one_by_one_as_json_would_read_them(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_CHARS", chunk)
    chance = np.random.default_rng(0)
    texts = ['a "quoted" ]}, [{', "\\", "ü\u2028漢", "", "{", '\\"', "1e5"]
    values = [{"id": k, "text": [str(chance.choice(texts)) for _ in range(3)], "x": -1.5e3} for k in range(40)]
    for name, text in (
        ("list.json", json.dumps(values)),
        ("indented.json", f"\n {json.dumps(values, indent=2, ensure_ascii=False)} \n"),
        ("lines.jsonl", "\n\n".join(json.dumps(entry) for entry in values) + "\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [entry for _, entry in iter_entries(tmp_path / name)] == values
    for name, text in (
        ("cut.json", json.dumps(values)[:-1]),
        ("cut_within.json", json.dumps(values)[:-9]),
        ("cut_line.jsonl", json.dumps(values[0]) + "\n" + json.dumps(values[1])[:-3]),
        ("more.json", json.dumps(values) + "x"),
        ("nan.json", '[{"a": NaN}]'),
        ("number.json", "[12]"),
        ("empty.json", "[]"),
        ("nothing.json", ""),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            list(iter_entries(tmp_path / name))


@pytest.mark.parametrize("filling", ["x", " ", "[", "\0"])
def test_a_line_without_end_is_refused_in_bounded_memory(filling, tmp_path):
    path = tmp_path / "line.json"
    with path.open("w") as file:
        file.write('[{"a": "' if filling == "x" else "[")
        for _ in range(40):
            file.write(filling * 1_000_000)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"line\.json"):
        list(iter_entries(path))
    assert tracemalloc.get_traced_memory()[1] < 25_000_000
    tracemalloc.stop()


def test_a_huge_annotation_file_is_refused_unread(tmp_path):
    path = tmp_path / "ScanQA_v1.0_val.json"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match=r"ScanQA_v1\.0_val\.json"):
        read_scanqa(path)
