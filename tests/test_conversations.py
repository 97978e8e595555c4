"""Conversations about single pictures: what they say against the depth of the picture, and on their way to samples."""

import json

import numpy as np
import pytest

from roomplan_lib.samples import read_samples
from roomplan_lib.samples.conversations import write_conversations
from roomplan_lib.samples.instruct import prepare_instruct
from roomplan_lib.scenes.rooms import write_scannet_rooms
from roomplan_lib.scenes.scannet import find_scenes, read_scene


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Five rooms, of which the fifth is held out."""
    root = tmp_path_factory.mktemp("scannet")
    write_scannet_rooms(root, 5, seed=3, num_poses=6, progress=False)
    return root


@pytest.fixture(scope="module")
def told(root):
    files = write_conversations(root, seed=1, every=2, progress=False)
    assert [file.relative_to(root).as_posix() for file in files] == [
        f"annotations/llava/llava_{split}.json" for split in ("train", "val")
    ]
    return {file.stem: json.loads(file.read_text()) for file in files}


def pixels_of(scene, view, label):
    """Depth pixels of a picture that lie in boxes of a label, grown by 2 cm; another way than the library's."""
    depth = view.load_depth()
    v, u = np.nonzero(depth)
    z = depth[v, u]
    K = view.K.copy()
    K[:2] *= depth.shape[1] / view.width
    points = np.stack([(u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z, z, np.ones_like(z)])
    world = (view.camera_to_world @ points)[:3]
    inside = np.zeros(len(z), bool)
    for box in scene.boxes:
        if box.label == label:
            local = box.rotation.T @ (world - box.center[:, None])
            inside |= (np.abs(local) <= box.extent[:, None] / 2 + 0.02).all(axis=0)
    return inside.sum() * 256 * 192 / depth.size


def test_what_is_said_is_seen(root, told):
    scenes = {path.name: read_scene(path) for path in find_scenes(root)}
    answers = {"yes": 0, "no": 0, "more": 0}
    for entry in told["llava_train"] + told["llava_val"]:
        scene_id, view_id = entry["id"].split("-")
        scene = scenes[scene_id]
        view = next(view for view in scene.views if view.view_id == view_id)
        assert view.rgb_path == root / entry["image"]
        texts = [turn["value"] for turn in entry["conversations"]]
        assert [turn["from"] for turn in entry["conversations"]] == ["human", "gpt"] * (len(texts) // 2)
        assert texts[0] == "<image>\nWhich things does the picture show?"
        shown = [pixels_of(scene, view, label) for label in texts[1].split(", ")]
        # Largest first, as the library counts, which leaves out the floor under a box.
        assert min(shown) >= 100 and shown[0] >= 0.5 * max(shown)
        for question, answer in zip(texts[2::2], texts[3::2], strict=True):
            if question.startswith("Does"):
                label = question.removesuffix("?").split("show ")[1].split(" ", 1)[1]
                count = pixels_of(scene, view, label)
                assert count >= 100 if answer == "yes" else count < 400, (entry["id"], question, answer, count)
                answers[answer] += 1
            else:
                pair = question.removesuffix("?").split(", the ")[1].split(" or the ")
                counts = {label: pixels_of(scene, view, label) for label in pair}
                assert answer == f"the {max(counts, key=counts.get)}"
                answers["more"] += 1
    assert min(answers.values()) >= 3, answers


def test_they_become_samples_of_the_right_split(root, told, tmp_path):
    held_out = (root / "scannetv2_val.txt").read_text().split()
    for name, entries in told.items():
        assert {entry["id"].split("-")[0] in held_out for entry in entries} == {name == "llava_val"}
        file = root / "annotations" / "llava" / f"{name}.json"
        output = tmp_path / f"{name}.jsonl"
        prepare_instruct(file, root, output, layout="llava", progress=False)
        records = read_samples(output)
        assert len(records) == sum(len(entry["conversations"]) // 2 for entry in entries)
        assert {record["split"] for record in records} == {name.removeprefix("llava_")}
        assert all((root / record["images"][0]).is_file() and record["geom_token"] is None for record in records)


def test_they_depend_on_the_seed_alone(root, told):
    write_conversations(root, seed=2, every=2, progress=False)
    file = root / "annotations" / "llava" / "llava_train.json"
    assert json.loads(file.read_text()) != told["llava_train"]
    write_conversations(root, seed=1, every=2, progress=False)
    assert json.loads(file.read_text()) == told["llava_train"]


def test_a_folder_without_scans_is_named(tmp_path):
    with pytest.raises(ValueError, match="no ScanNet scan; make some with `roomplan rooms --layout scannet`"):
        write_conversations(tmp_path)
    assert not list(tmp_path.iterdir())
