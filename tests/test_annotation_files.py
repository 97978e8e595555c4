"""Annotation files about rendered rooms: every statement is checked against mesh, segments and plan, read here anew."""

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("open3d", reason="rooms are rendered with Open3D", exc_type=ImportError)

from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.samples.annotation_files import write_annotations
from roomplan_lib.samples.grounding import read_multi3drefer, read_nr3d, read_scan2cap, read_scanrefer
from roomplan_lib.samples.scanqa import read_scanqa
from roomplan_lib.samples.sqa3d import agent_record, read_sqa3d
from roomplan_lib.scenes.rooms import write_scannet_rooms

NUM_ROOMS, SEED = 20, 6  # 16 for training, two each for validation and test
SQA3D = Path(__file__).parents[2] / "shared" / "data" / "sqa3d"
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SINGULAR = {"shelves": "shelf", "tvs": "tv"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    output = tmp_path_factory.mktemp("annotated")
    sizes = {"image_size": (64, 48), "depth_size": (64, 48)}
    write_scannet_rooms(output, NUM_ROOMS, seed=SEED, num_poses=8, **sizes, workers=1, progress=False)
    write_annotations(output, SEED, progress=False)
    return output


class _Truth:
    """One scan as its files tell: alignment, middle of the raw mesh, furniture by objectId."""

    def __init__(self, folder):
        name = folder.name
        lines = (folder / f"{name}.txt").read_text().splitlines()
        text = next(line.split("=")[1] for line in lines if line.startswith("axisAlignment"))
        self.alignment = np.array(text.split(), dtype=float).reshape(4, 4)
        header, _, body = (folder / f"{name}_vh_clean_2.ply").read_bytes().partition(b"end_header\n")
        count = int(re.search(rb"element vertex (\d+)", header)[1])
        vertices = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgba", "u1", 4)], count=count)["xyz"].astype(float)
        self.center = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        aligned = vertices @ self.alignment[:3, :3].T + self.alignment[:3, 3]
        segments = np.array(json.loads((folder / f"{name}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"])
        groups = json.loads((folder / f"{name}.aggregation.json").read_text())["segGroups"]
        sidecar = json.loads((folder / f"{name}_room.json").read_text())
        told = {entry["objectId"]: entry for entry in sidecar["instances"].values()}
        self.boxes, self.label, self.kind, self.color, self.visible = {}, {}, {}, {}, {}
        for group in groups:
            number = group["objectId"]
            if number in told:
                points = aligned[np.isin(segments, group["segments"])]
                self.boxes[number] = (points.min(axis=0), points.max(axis=0))
                self.label[number] = group["label"]
                self.kind[number] = "tv" if told[number]["label"] == "tv_monitor" else told[number]["label"]
                self.color[number] = told[number]["color"]
                self.visible[number] = told[number]["visible_share"] * 256 * 192 >= 150
        polygon = np.array(sidecar["polygon"]) @ self.alignment[:3, :3].T + self.alignment[:3, 3]
        self.polygon = polygon[:, :2]

    def middle(self, number):
        return (self.boxes[number][0] + self.boxes[number][1])[:2] / 2

    def matching(self, phrase):
        """objectIds that "red chair" or "chair" or "chairs" fits."""
        *color, kind = phrase.lower().split()
        kind = SINGULAR.get(kind, kind if kind in self.kind.values() else kind.removesuffix("s"))
        return [n for n in self.kind if self.kind[n] == kind and (not color or self.color[n] == color[0])]

    def the(self, phrase):
        found = self.matching(phrase)
        assert len(found) == 1, (phrase, found)
        return found[0]


@pytest.fixture(scope="module")
def truths(root):
    return {folder.name: _Truth(folder) for folder in sorted((root / "scans").iterdir())}


def _load(root, name):
    return json.loads((root / "annotations" / name).read_text())


def _sqa3d(root, split):
    questions = _load(root, f"sqa3d/v1_balanced_questions_{split}_scannetv2.json")["questions"]
    annotations = _load(root, f"sqa3d/v1_balanced_sqa_annotations_{split}_scannetv2.json")["annotations"]
    halves = {entry["question_id"]: entry for entry in annotations}
    assert len(halves) == len(annotations) == len(questions)
    return [(question, halves[question["question_id"]]) for question in questions]


def _agent(annotation, truth, facing_axis=(-1, 0, 0), centered=True):
    """Where SQA3D's agent stands and looks in the aligned frame: ([3] metres, [3] unit)."""
    position = np.array([annotation["position"][k] for k in "xyz"]) + centered * truth.center
    rotation = Rotation.from_quat([annotation["rotation"][k] for k in ("_x", "_y", "_z", "_w")]).as_matrix()
    to_aligned = truth.alignment
    return to_aligned[:3, :3] @ position + to_aligned[:3, 3], to_aligned[:3, :3] @ rotation @ np.array(facing_axis)


def _bearing(position, facing, point):
    """Degrees to the left of straight ahead, in (-180, 180]."""
    angle = np.arctan2(*(point - position[:2])[::-1]) - np.arctan2(facing[1], facing[0])
    return np.degrees(np.arctan2(np.sin(angle), np.cos(angle)))


def _holds(direction, bearing):
    """Whether something at this bearing is clearly (10 degrees) on that side; False where it is not."""
    return {
        "left": 10 < bearing < 170,
        "right": -170 < bearing < -10,
        "in front": abs(bearing) < 80,
        "behind": abs(bearing) > 100,
    }[direction]


def _direction(text):
    return next(d for d in ("left", "right", "in front", "behind") if re.search(rf"\b{d}( of me| me)?\?$", text))


def _situated_answer_holds(question, answer, truth, agent):
    position, facing = agent
    text = question["question"]

    def at(number):
        return _bearing(position, facing, truth.middle(number))

    if match := re.match(
        r"(?:Is the (.*) on my left or on my right|On which side of me is the (.*), left or right)", text
    ):
        return answer in ("left", "right") and _holds(answer, at(truth.the(match[1] or match[2])))
    if match := re.match(r"Is the (.*) in front of me or behind me", text):
        return answer in ("in front", "behind") and _holds(answer, at(truth.the(match[1])))
    if match := re.match(r"Can I find the (.*) on my (left|right)\?", text):
        opposite = {"left": "right", "right": "left"}[match[2]]
        return _holds(match[2] if answer == "yes" else opposite, at(truth.the(match[1])))
    if match := re.match(r"What color is the (\w+) ", text):
        number = truth.the(match[1])
        return answer == truth.color[number] and _holds(_direction(text.replace("on my ", "")), at(number))
    if match := re.match(
        r"Which is (?:on my )?(left|right|in front|behind)(?: of me| me)?, the (.*) or the (.*)\?", text
    ):
        one, other = (truth.the(match[k]) for k in (2, 3))
        if answer != match[2]:
            one, other = other, one
            assert answer == match[3]
        return _holds(match[1], at(one)) and not _holds(match[1], at(other))
    if match := re.match(r"How many (\w+) are ", text):
        direction = _direction(text.replace("on my ", ""))
        return sum(_holds(direction, at(n)) for n in truth.matching(match[1])) == WORDS.index(answer)
    raise AssertionError(text)


def _stands(question):
    match = re.match(
        r"I (?:am standing by|stand next to) the (.*) and (?:facing|look at) the (.*)\.", question["situation"]
    )
    return match[1], match[2]


def test_situated_answers_follow_from_position_and_rotation(root, truths):
    """World = axisAlignment (position + middle of the raw mesh); the agent looks along its own -x."""
    kinds = Counter()
    for split in ("train", "val", "test"):
        for question, annotation in _sqa3d(root, split):
            truth, answer = truths[question["scene_id"]], annotation["answers"][0]["answer"]
            agent = _agent(annotation, truth)
            assert _situated_answer_holds(question, answer, truth, agent), (question, annotation)
            kinds[question["question"].split()[0]] += 1
    assert set(kinds) == {"Is", "On", "Can", "What", "Which", "How"} and sum(kinds.values()) > 400


def test_situated_answers_fail_in_any_other_frame(root, truths):
    """The check above is no formality: +x for -x, or the mesh's own origin, and many answers are wrong."""
    pairs = [pair for pair in _sqa3d(root, "train") if re.match("Is the|On which", pair[0]["question"])]
    wrong = {
        "turned": {"facing_axis": (1, 0, 0)},
        "sideways": {"facing_axis": (0, 1, 0)},
        "origin": {"centered": False},
    }
    for name, change in wrong.items():
        held = [
            _situated_answer_holds(
                question, annotation["answers"][0]["answer"], truths[question["scene_id"]],
                _agent(annotation, truths[question["scene_id"]], **change),
            )
            for question, annotation in pairs
        ]  # fmt: skip
        assert np.mean(held) < (0.05 if name == "turned" else 0.8), name


def test_the_agent_stands_and_looks_as_the_situation_says(root, truths):
    for split in ("train", "val", "test"):
        for question, annotation in _sqa3d(root, split):
            truth = truths[question["scene_id"]]
            position, facing = _agent(annotation, truth)
            by, faced = _stands(question)
            low, high = (corner[:2] for corner in truth.boxes[truth.the(by)])
            gap = np.linalg.norm(np.maximum(np.maximum(low - position[:2], position[:2] - high), 0))
            assert gap < 0.65
            assert abs(_bearing(position, facing, truth.middle(truth.the(faced)))) < 4  # of the vertices' box's middle
            for text in question["alternative_situation"]:
                assert re.findall(rf"the ({by}|{faced})\b", text, re.IGNORECASE) == [by, faced]
            assert annotation["position"]["z"] == annotation["rotation"]["_x"] == annotation["rotation"]["_y"] == 0
            quaternion = np.array(list(annotation["rotation"].values()))
            assert np.isclose(np.linalg.norm(quaternion), 1) and abs(facing[2]) < 1e-6
            assert (truth.polygon.min(axis=0) < position[:2]).all() and (position[:2] < truth.polygon.max(axis=0)).all()
            for number, (low, high) in truth.boxes.items():  # on free floor: in no box that stands in the way
                if low[2] < 1.0:
                    assert not ((low[:2] + 0.1 < position[:2]) & (position[:2] < high[:2] - 0.1)).all(), number


def test_opposite_answers_come_equally_often(root):
    counts = defaultdict(Counter)
    for question, annotation in _sqa3d(root, "train"):
        counts[question["question"].split()[0]][annotation["answers"][0]["answer"]] += 1
    for word, one, other in (
        ("Is", "left", "right"), ("On", "left", "right"), ("Is", "in front", "behind"), ("Can", "yes", "no"),
    ):  # fmt: skip
        assert counts[word][one] == counts[word][other] > 0


def _shape(value):
    """Keys and types, recursively; a list has the shapes of its entries; whole numbers count as numbers."""
    if isinstance(value, dict):
        return {key: _shape(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [*{json.dumps(_shape(entry), sort_keys=True): None for entry in value}]
    return "number" if isinstance(value, (int, float)) else type(value).__name__


@pytest.mark.skipif(not SQA3D.is_dir(), reason="the real SQA3D test files are not here")
def test_sqa3d_files_have_the_shape_of_the_real_ones(root):
    for part, key in (("questions", "questions"), ("sqa_annotations", "annotations")):
        real = json.loads((SQA3D / f"v1_balanced_{part}_test_scannetv2.json").read_text())
        ours = _load(root, f"sqa3d/v1_balanced_{part}_test_scannetv2.json")
        full = [entry for entry in real[key] if len(entry.get("alternative_situation", "ab")) == 2]
        assert _shape(ours) == _shape(real | {key: full})
        assert type(ours[key][0]["question_id"]) is type(real[key][0]["question_id"]) is int
        assert not {entry["question_id"] for entry in ours[key]} & {entry["question_id"] for entry in real[key]}


def test_splits(root):
    scenes, ids = {}, defaultdict(list)
    for split, name in (("train", "train"), ("val", "val"), ("test", "test_w_obj")):
        scanqa = _load(root, f"scanqa/ScanQA_v1.0_{name}.json")
        scenes[split] = {e["scene_id"] for e in scanqa} | {q["scene_id"] for q, _ in _sqa3d(root, split)}
        ids["scanqa"] += [e["question_id"] for e in scanqa]
        ids["sqa3d"] += [q["question_id"] for q, _ in _sqa3d(root, split)]
        assert all(e["question_id"].startswith(f"{split}-{e['scene_id'][:9]}-") for e in scanqa)
        assert all(("answers" in e) == (split != "test") for e in scanqa)
    assert all(len(values) == len(set(values)) for values in ids.values())
    assert [len(scenes[split]) for split in ("train", "val", "test")] == [16, 2, 2]
    lists = {split: set((root / f"scannetv2_{split}.txt").read_text().split()) for split in ("train", "val")}
    assert scenes["train"] == lists["train"] and scenes["val"] | scenes["test"] == lists["val"]
    assert scenes["val"] == {"scene0004_00", "scene0014_00"} and scenes["test"] == {"scene0009_00", "scene0019_00"}
    for split in ("train", "val"):
        listed = (root / "annotations" / "scanrefer" / f"ScanRefer_filtered_{split}.txt").read_text().split()
        assert set(listed) == scenes[split]
        for name in (f"scanrefer/ScanRefer_filtered_{split}.json", f"multi3drefer/multi3drefer_{split}.json"):
            assert {e["scene_id"] for e in _load(root, name)} == scenes[split]


def test_scanqa_answers_are_true(root, truths):
    asked = Counter()
    for split in ("train", "val"):
        for entry in _load(root, f"scanqa/ScanQA_v1.0_{split}.json"):
            truth, ids, answers = truths[entry["scene_id"]], entry["object_ids"], entry["answers"]
            assert list(entry) == ["scene_id", "question_id", "question", "answers", "object_ids", "object_names"]
            assert entry["object_names"] == [truth.label[k].replace(" ", "_") for k in ids] and ids
            assert 1 <= len(answers) <= 2 and all(answer == answer.lower() for answer in answers)
            assert all(truth.visible[k] for k in ids)
            first = ids[0]
            if match := re.match(r"What (?:color is|is the color of) the (.*)\?", entry["question"]):
                assert truth.the(match[1]) == first and answers == [truth.color[first]]
            elif match := re.match(r"How many (\w+) are ", entry["question"]):
                found = truth.matching(match[1])
                assert sorted(ids) == sorted(found) and answers == [str(len(found)), WORDS[len(found)]]
            elif match := re.match(
                r"(?:Which object is closest|What is the object nearest) to the (.*)\?", entry["question"]
            ):
                assert truth.the(match[1]) == first and answers[0] == truth.kind[ids[1]]
                assert ids[1] in truth.matching(answers[1].split(" ", 1)[1])
                distances = {
                    k: np.linalg.norm(truth.middle(k) - truth.middle(first)) for k in truth.boxes if k != first
                }
                nearest = min(distances, key=distances.get)
                assert truth.kind[nearest] == answers[0]
            elif match := re.match(r"Where is the (.*) located\?", entry["question"]):
                assert truth.the(match[1]) == first
                place = re.fullmatch(r"next to (?:the|an?) (.*)", answers[0])[1]
                assert ids[1] in truth.matching(place) and answers[1].removeprefix("beside ").endswith(place)
            else:
                raise AssertionError(entry["question"])
            asked[entry["question"].split()[0]] += 1
    assert asked["What"] > 40 and asked["How"] > 15 and asked["Where"] > 20


def _described(truth, description):
    """objectIds that a description fits, told from middles of boxes."""
    if match := re.fullmatch(r"this is an? (.*)\.", description):
        return truth.matching(match[1])
    if match := re.fullmatch(r"there is an? (.*) in the room\. it is about (.*) meters high\.", description):
        found = truth.matching(match[1])
        assert all(abs(np.subtract(*truth.boxes[k])[2] + float(match[2])) < 0.06 for k in found)
        return found
    if match := re.fullmatch(r"the (.*) stands closest to (?:the|an?) (.*)\.", description):
        (target,) = found = truth.matching(match[1])
        rest = {k: np.linalg.norm(truth.middle(k) - truth.middle(target)) for k in truth.boxes if k != target}
        nearest = min(rest, key=rest.get)
        assert truth.kind[nearest] == match[2].split()[-1]
        return found
    if match := re.fullmatch(r"this (.*) is the one (nearest to|farthest from) the (.*)\. it is (.*)\.", description):
        landmark, rivals = truth.the(match[3]), truth.matching(match[1])
        distances = {k: np.linalg.norm(truth.middle(k) - truth.middle(landmark)) for k in rivals}
        found = (min if match[2] == "nearest to" else max)(distances, key=distances.get)
        assert truth.color[found] == match[4] and len(rivals) > 1
        return [found]
    if match := re.fullmatch(r"these are (?:all )?the (.*?)(?: in the room)?\.", description):
        return truth.matching(match[1])
    raise AssertionError(description)


def test_scanrefer_describes_one_object_each(root, truths):
    per_object = Counter()
    for split in ("train", "val"):
        for entry in _load(root, f"scanrefer/ScanRefer_filtered_{split}.json"):
            truth, number = truths[entry["scene_id"]], int(entry["object_id"])
            assert list(entry) == ["scene_id", "object_id", "object_name", "ann_id", "description", "token"]
            assert isinstance(entry["object_id"], str) and isinstance(entry["ann_id"], str)
            assert entry["object_name"] == truth.label[number].replace(" ", "_") and truth.visible[number]
            assert _described(truth, entry["description"]) == [number], entry
            assert "".join(entry["token"]) == entry["description"].replace(" ", "")
            assert entry["ann_id"] == str(per_object[entry["scene_id"], number])
            per_object[entry["scene_id"], number] += 1
    assert len(per_object) > 80 and np.mean([count > 1 for count in per_object.values()]) > 0.9  # Scan2Cap's captions


def test_multi3drefer_has_all_its_types(root, truths):
    kinds = Counter()
    for split in ("train", "val"):
        ids = set()
        for entry in _load(root, f"multi3drefer/multi3drefer_{split}.json"):
            truth, numbers, kind = truths[entry["scene_id"]], entry["object_ids"], entry["eval_type"]
            assert sorted(_described(truth, entry["description"])) == sorted(numbers), entry
            label = entry["object_name"].replace("_", " ")
            same = [k for k in truth.label if truth.label[k] == label]
            assert {
                "zt_w_d": not numbers and same, "zt_wo_d": not numbers and not same, "mt": len(numbers) > 1,
                "st_w_d": len(numbers) == 1 < len(same), "st_wo_d": numbers == same and len(same) == 1,
            }[kind]  # fmt: skip
            assert all(truth.label[k] == label and truth.visible[k] for k in numbers)
            kinds[kind] += 1
            assert (entry["scene_id"], entry["ann_id"]) not in ids
            ids.add((entry["scene_id"], entry["ann_id"]))
    assert set(kinds) == {"zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt"} and min(kinds.values()) >= 10


def test_nr3d_table(root, truths):
    with (root / "annotations" / "nr3d" / "nr3d.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 50 and len({row["assignmentid"] for row in rows}) == len(rows)
    for row in rows:
        scene, kind, count, target, *others = row["stimulus_id"].split("-")
        truth = truths[scene]
        assert (scene, kind, target) == (row["scan_id"], row["instance_type"], row["target_id"])
        same = {k for k in truth.label if truth.label[k] == kind}
        assert same == {int(target), *map(int, others)} and len(same) == int(count) > 1
        assert _described(truth, row["utterance"].lower()) == [int(target)]


def test_the_project_reads_them(root, truths):
    folder = root / "annotations"
    for split, name in (("train", "train"), ("val", "val"), ("test", "test_w_obj")):
        read = read_scanqa(folder / "scanqa" / f"ScanQA_v1.0_{name}.json")
        written = _load(root, f"scanqa/ScanQA_v1.0_{name}.json")
        assert [r["question_id"] for r in read.records] == [e["question_id"] for e in written] and read.split == split
        assert [r["answers"] for r in read.records] == [e.get("answers", []) for e in written]
        files = (
            folder / "sqa3d" / f"v1_balanced_{part}_{split}_scannetv2.json" for part in ("questions", "sqa_annotations")
        )
        situated = read_sqa3d(*files)
        for record, (_, annotation) in zip(situated.records, _sqa3d(root, split), strict=True):
            truth = truths[record["scene_id"]]
            agent = agent_record(*situated.agents[record["question_id"]], truth.alignment, truth.center)
            position, facing = _agent(annotation, truth)
            assert np.allclose(agent["position"], position, atol=1e-4)
            assert np.allclose(agent["facing"], facing, atol=1e-5)
    for split in ("train", "val"):
        scanrefer = folder / "scanrefer" / f"ScanRefer_filtered_{split}.json"
        entries = _load(root, f"scanrefer/ScanRefer_filtered_{split}.json")
        assert len(read_scanrefer(scanrefer).records) == len(entries)
        captions = read_scan2cap(scanrefer).records
        assert len(captions) == len({(e["scene_id"], e["object_id"]) for e in entries})
        assert sum(len(r["answers"]) for r in captions) == len(entries)
        multi = read_multi3drefer(folder / "multi3drefer" / f"multi3drefer_{split}.json").records
        assert len(multi) == len(_load(root, f"multi3drefer/multi3drefer_{split}.json"))
        assert read_nr3d(folder / "nr3d" / "nr3d.csv", root / f"scannetv2_{split}.txt").records


def test_same_seed_same_bytes_other_seed_other_words(root, tmp_path):
    for folder in ("scans", "posed_images"):
        (tmp_path / folder).symlink_to(root / folder)
    before = {p.relative_to(root): p.read_bytes() for p in (root / "annotations").rglob("*.*")}
    paths = write_annotations(tmp_path, SEED, progress=False)
    assert {p.relative_to(tmp_path): p.read_bytes() for p in paths} == before
    write_annotations(tmp_path, SEED + 1, progress=False)
    name = Path("annotations/sqa3d/v1_balanced_questions_train_scannetv2.json")
    assert (tmp_path / name).read_bytes() != before[name]


def test_what_cannot_be_annotated_is_told(tmp_path):
    with pytest.raises(ValueError, match="no rendered rooms; make them with"):
        write_annotations(tmp_path, progress=False)
    scan = tmp_path / "scans" / "scene0000_00"
    scan.mkdir(parents=True)
    (scan / "scene0000_00_room.json").write_text('{"scene_id": "scene0000_00"}')
    with pytest.raises(
        ValueError, match="scene0000_00_room.json: no sidecar .*KeyError 'axis_alignment'.*make it again"
    ):
        write_annotations(tmp_path, progress=False)
    assert not (tmp_path / "annotations").exists()


def test_the_command_writes_scans_and_annotations(tmp_path):
    options = ["--num-rooms", "1", "--num-poses", "2", "--workers", "1", "--seed", "8"]
    result = CliRunner().invoke(app, ["rooms", "--layout", "scannet", "--output", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "scans" / "scene0000_00" / "scene0000_00.sens").is_file()
    assert "ScanQA_v1.0_train.json" in result.output and "1 rooms" in result.output
    assert CliRunner().invoke(app, ["rooms", "--layout", "replica", "--output", str(tmp_path)]).exit_code == 2
