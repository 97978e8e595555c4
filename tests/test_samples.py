import hashlib
import itertools
import json
import re
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_files import SIZE, K, box, ray_depth, walk, write_scene
from shapely.geometry import Point, Polygon

from roomplan_lib.geometry import OrientedBox, box_corners, points_in_box, project, rotation_z, unproject
from roomplan_lib.samples import (
    DEPTH_BIN_EDGES,
    box_from_record,
    box_record,
    check_record,
    depth_histogram,
    manifest_path,
    read_manifest,
    read_samples,
    sample_root,
    write_samples,
)
from roomplan_lib.samples.anchors import build_anchors, build_lists, build_negatives, place_anchor_action
from roomplan_lib.samples.describe import category_text, footprint_gap, plural, unique_phrases, upright, with_article
from roomplan_lib.samples.prepare import prepare_arkitscenes
from roomplan_lib.samples.qa import MAX_PER_TASK, build_qa, clear_sides, standing_places
from roomplan_lib.samples.validate import summarise, validate_file
from roomplan_lib.samples.views import (
    choose_view_sets,
    choose_views,
    geometry_record,
    greedy_coverage,
    max_baseline,
    select_views,
    view_points,
)
from roomplan_lib.samples.visibility import pixels_in_boxes, visible_boxes
from roomplan_lib.scenes import CATEGORIES, Scene, load_depth, path_below
from roomplan_lib.scenes.arkitscenes import read_scene

FURNITURE = [
    box("bed", 1.8, 1.2, 0.3, (2.0, 1.5, 0.6), "b1"),
    box("chair", -2, 1.5, -1.1, uid="c1"),
    box("chair", -2, -1.5, 0.4, uid="c2"),
    box("table", 1.5, -1.5, 0.1, (1.2, 0.8, 0.75), "t1"),
    box("tv_monitor", -2.8, 0, 1.57, (1, 0.1, 0.6), "tv", z=1.2),
    box("cabinet", 0, 2.2, 0, (1, 0.5, 1.5), "k1"),
]
COLORS = {"b1": "red", "c1": "blue", "c2": "green", "t1": "brown", "tv": "black", "k1": "white"}


def scene_of(boxes, colors=None, scene_id="42444499") -> Scene:
    """A scene without pictures, for the builders, which look at boxes alone."""
    return Scene(scene_id, [], list(boxes), "arkitscenes", "train", colors=colors or {})


def random_scene(seed: int) -> Scene:
    """Boxes at random places, sizes and angles; some categories several times, some objects near each other."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CATEGORIES, rng.integers(4, 9)).tolist()
    boxes = [
        box(label, *rng.uniform(-3, 3, 2), rng.uniform(-3.1, 3.1), rng.uniform(0.3, 2.0, 3), uid=f"u{i}")
        for i, label in enumerate(labels)
    ]
    colors = {item.object_id: str(rng.choice(["red", "blue", "green"])) for item in boxes}
    return scene_of(boxes, colors if seed % 2 else {}, f"{seed:08d}")


def all_seen(scene: Scene) -> np.ndarray:
    return np.ones(len(scene.boxes), dtype=bool)


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return read_scene(write_scene(tmp_path_factory.mktemp("scene"), FURNITURE, colors=COLORS, poses=walk(12)))


# The record -----------------------------------------------------------------------------------------------------------


def test_samples_and_manifest_round_trip(tmp_path):
    samples = [
        {"task": "qa_count", "scene_id": "b", "split": "val", "answer": "zwölf"},
        {"task": "place_anchor", "scene_id": "a", "split": "val"},
    ]
    path = tmp_path / "processed" / "qa_val.jsonl"
    (tmp_path / "raw").mkdir()
    write_samples(path, iter(samples), {"root": tmp_path / "raw", "settings": {"seed": 3}})
    assert read_samples(path) == samples
    manifest = read_manifest(path)
    assert manifest["root"] == "../raw" and sample_root(path) == tmp_path / "raw"
    assert manifest["tasks"] == {"place_anchor": 1, "qa_count": 1} and manifest["splits"] == {"val": 2}
    assert manifest["scene_ids"] == ["a", "b"] and manifest["settings"] == {"seed": 3}
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    array = tmp_path / "processed" / "array.json"
    array.write_text(json.dumps(samples, indent=1))
    assert read_samples(array) == samples and sample_root(array) == array.parent


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    sample = {"task": "t", "scene_id": "s"}
    write_samples(path, [sample], {"root": tmp_path})
    before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())
    with pytest.raises(ValueError, match="a.jsonl: sample 2"):
        write_samples(path, [sample, {**sample, "x": float("nan")}], {"root": tmp_path})
    with pytest.raises(ValueError, match="needs `root`"):
        write_samples(path, [sample], {})
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1}\n{"a": 2', "x.jsonl:2: invalid or truncated"),
        ('{"a": 1}\n\n[1]\n', "x.jsonl:3: expected a JSON object, got list"),
        ('{"a": NaN}', "x.jsonl:1: .*NaN is no number"),
        ("[" * 100_000, "x.jsonl"),
        ('[{"a": 1}, 3]', "record 2: expected a JSON object"),
    ],
)
def test_unreadable_samples_are_named(tmp_path, text, words):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_samples(path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x.png", "", "a\\..\\x.png", "a/.."])
def test_paths_out_of_the_root_are_refused(name):
    with pytest.raises(ValueError, match="expected a path below"):
        path_below("/data", name)


def test_path_below_the_root():
    assert path_below("/data", "a/b..c/x.png") == Path("/data/a/b..c/x.png")


def test_depth_histogram_counts_valid_pixels():
    assert len(DEPTH_BIN_EDGES) == 17 and DEPTH_BIN_EDGES[0] == 0 and np.isinf(DEPTH_BIN_EDGES[-1])
    depth = np.array([[0, 0.1, 1.1], [1.2, 20.0, np.nan]], dtype=np.float32)
    expected = np.zeros(16)
    expected[[0, 4, 15]] = 0.25, 0.5, 0.25  # 0.1 m; 1.1 and 1.2 m; 20 m
    assert np.allclose(depth_histogram(depth), expected)
    assert not depth_histogram(np.zeros((2, 2))).any() and not depth_histogram(None).any()


def test_geometry_record_round_trips(scene):
    views = scene.views[:5]
    record = geometry_record(views)
    for v, (view, pose) in enumerate(zip(views, walk(12), strict=False)):
        assert np.abs(np.reshape(record["R"][v], (3, 3)) - pose[:3, :3]).max() < 1e-6
        assert np.abs(np.array(record["t"][v]) - pose[:3, 3]).max() < 1e-5
        assert np.allclose(np.reshape(record["K"][v], (3, 3)), K)
        assert sum(record["depth_hist"][v]) == pytest.approx(1, abs=1e-4)
        assert np.allclose(record["depth_hist"][v], depth_histogram(view.load_depth()), atol=1e-5)


def test_box_record_round_trips():
    for item in FURNITURE:
        again = box_from_record(json.loads(json.dumps(box_record(item))))
        assert np.abs(box_corners(again) - box_corners(item)).max() < 1e-4
        assert (again.label, again.object_id) == (item.label, item.object_id)


# Views ----------------------------------------------------------------------------------------------------------------


def test_depth_of_one_view_reprojects_into_another(scene):
    """No point seen in one view lies before the surface that another view sees; unhidden ones lie on it."""
    a, b = scene.views[0], scene.views[1]
    points, valid = unproject(a.load_depth(), a.K, a.camera_to_world)
    pixels, z = project(points[valid], b.K, b.camera_to_world)
    inside = (z > 0.1) & (pixels > 0).all(-1) & (pixels < np.array(SIZE) - 1).all(-1)
    rounded = pixels[inside].round().astype(int)
    gap = z[inside] - b.load_depth()[rounded[:, 1], rounded[:, 0]]
    assert inside.sum() > 500
    assert np.median(np.abs(gap)) < 0.02 and (np.abs(gap) < 0.1).mean() > 0.8 and (gap > -0.15).mean() > 0.97


def test_view_points_lie_on_surfaces(scene):
    """Points of the thinned depth image lie on the room's or a box's faces."""
    for view in scene.views[:3]:
        points = view_points(view, stride=3)
        assert len(points) == 16 * 21  # rows 1, 4, ... 46 and columns 1, 4, ... 61
        distances = []
        for item in [OrientedBox([0, 0, 1.25], [6.0, 5.0, 2.5]), *FURNITURE]:
            local = np.abs((points - item.center) @ item.rotation) - item.extent / 2
            outside = np.linalg.norm(np.maximum(local, 0), axis=1)
            distances.append(np.abs(outside + np.minimum(local.max(1), 0)))
        assert np.min(distances, axis=0).max() < 2e-3  # millimetres on disk


def test_greedy_coverage_against_all_choices():
    rng = np.random.default_rng(0)
    for _ in range(20):
        seen = [np.flatnonzero(rng.random(30) < rng.uniform(0.05, 0.5)) for _ in range(7)]
        chosen, covered = greedy_coverage(seen, 30, 3)
        best = max(len(np.unique(np.concatenate(c))) for c in itertools.combinations(seen, 3))
        assert covered.sum() == len(np.unique(np.concatenate([seen[i] for i in chosen])))
        assert covered.sum() >= (1 - 1 / np.e) * best
        assert len(seen[chosen[0]]) == max(map(len, seen))
    # Hand-worked: the largest first, then what adds most, not what is second largest.
    seen = [np.array([0, 1, 2]), np.array([0, 1, 2, 3]), np.array([4, 5]), np.array([6])]
    assert greedy_coverage(seen, 7, 4)[0] == [1, 2, 3]
    assert greedy_coverage(seen, 7, 4, stop_ratio=0.8)[0] == [1, 2]


def test_selection(scene):
    selection = choose_views(scene, 4)
    assert len({view.view_id for view in selection.views}) == 4
    assert [v.view_id for v in selection.views] == [v.view_id for v in select_views(scene, 4)]
    assert 0.5 < selection.coverage < 1 and selection.baseline_m == pytest.approx(max_baseline(selection.views))
    assert selection.baseline_m > 0.5
    everything = choose_views(scene, 50)
    assert len(everything.views) == 12 and everything.coverage == 1
    # With the coverage reached early, the furthest viewpoint comes next: the far side of the circle, 2.4 m away.
    filled = choose_views(scene, 2, stop_ratio=0.01)
    assert filled.baseline_m == pytest.approx(2.4, abs=1e-5)
    uniform = choose_views(scene, 3, strategy="uniform")
    assert [view.timestamp for view in uniform.views] == [1000.0, 1000.6, 1001.1]
    assert select_views(scene, 2, max_candidates=3)[0].view_id in {v.view_id for v in uniform.views}
    assert len(select_views(scene, 500)) == len(scene.views)  # more than there are, and than candidates
    for wrong in ({"num_views": 0}, {"num_views": 3, "strategy": "best"}, {"num_views": 3, "stop_ratio": 2}):
        with pytest.raises(ValueError, match="expected"):
            select_views(scene, **wrong)


def test_coverage_ends_at_its_share(scene):
    """With a stop ratio below 1 there are as many views as it takes, and two at least."""
    everything = choose_views(scene, 12)
    for ratio in (0.5, 0.8, 0.95):
        some = choose_views(scene, 12, stop_ratio=ratio)
        assert some.coverage >= ratio and len(some.views) < len(everything.views)
        fewer = choose_views(scene, max(1, len(some.views) - 1))
        assert fewer.coverage < ratio or len(some.views) == 2
    assert len(choose_views(scene, 12, stop_ratio=0.01).views) == 2


def test_random_views_depend_on_the_seed_alone(scene):
    def names(seed):
        return [view.view_id for view in select_views(scene, 4, strategy="random", seed=seed)]

    assert names(1) == names(1) and len({tuple(names(seed)) for seed in range(20)}) > 15
    sets = choose_view_sets(scene, 4, 200, strategy="random")
    shown = Counter(view.view_id for selection in sets for view in selection.views)
    assert len(shown) == 12 and max(shown.values()) < 2 * min(shown.values())  # each about 67 times
    assert all(selection.baseline_m >= 0.1 for selection in sets)


@pytest.mark.parametrize("strategy", ["coverage", "uniform", "random"])
def test_view_sets(scene, strategy):
    """Sets are chosen from what earlier ones left, random ones anew; each tells its own coverage and baseline."""
    sets = choose_view_sets(scene, 4, 5, strategy=strategy)
    shown = [[view.view_id for view in selection.views] for selection in sets]
    assert len(sets) == (5 if strategy == "random" else 3) and all(len(set(names)) == 4 for names in shown)
    if strategy == "random":
        assert len({tuple(names) for names in shown}) == 5
    else:
        assert sorted(sum(shown, [])) == [view.view_id for view in scene.views]
    assert shown[0] == [view.view_id for view in choose_views(scene, 4, strategy=strategy).views]
    cells = {view.view_id: voxels_of(view) for view in scene.views}
    total = len(set().union(*cells.values()))
    for selection, names in zip(sets, shown, strict=True):
        assert selection.coverage == pytest.approx(len(set().union(*(cells[name] for name in names))) / total)
        centers = [view.camera_to_world[:3, 3] for view in selection.views]
        assert selection.baseline_m == max(np.linalg.norm(a - b) for a, b in itertools.combinations(centers, 2))


def voxels_of(view) -> set[tuple[int, int, int]]:
    """Voxels of 0.2 m that a view shows, pixel by pixel."""
    depth, found = view.load_depth(), set()
    for v in range(2, depth.shape[0], 4):
        for u in range(2, depth.shape[1], 4):
            ray = np.array([(u - view.K[0, 2]) / view.K[0, 0], (v - view.K[1, 2]) / view.K[1, 1], 1.0])
            point = view.camera_to_world[:3, :3] @ (ray * depth[v, u]) + view.camera_to_world[:3, 3]
            if depth[v, u] > 0 and np.linalg.norm(point - view.camera_to_world[:3, 3]) <= 5:
                found.add(tuple(np.floor(point / 0.2).astype(int).tolist()))
    return found


def test_depth_of_another_camera(scene):
    """Points of a depth picture with half the pixels and a K of its own are those of the full one."""
    view = scene.views[0]
    half = view.load_depth()[::2, ::2]
    K_half = np.array([[K[0, 0] / 2, 0, K[0, 2] / 2], [0, K[1, 1] / 2, K[1, 2] / 2], [0, 0, 1]])
    points = view_points(replace(view, depth_K=K_half), 1, half)
    full, _ = unproject(view.load_depth(), K, view.camera_to_world)
    assert np.abs(points - full[::2, ::2].reshape(-1, 3)).max() < 1e-9


def test_scene_without_depth_gets_even_views(tmp_path):
    scene = read_scene(write_scene(tmp_path, FURNITURE, depth=False))
    selection = choose_views(scene, 3)
    assert selection.coverage is None and len(selection.views) == 3
    with pytest.raises(ValueError, match="fetch lowres_depth"):
        visible_boxes(scene, selection.views)


def test_visible_pixels_against_ray_casting(tmp_path):
    """Pixels whose ray meets a box first, counted by casting rays with and without the box."""
    hidden = box("stool", 2.45, 2.2, 0, (0.3, 0.3, 0.3), "s1")  # in the corner behind the bed
    boxes = [*FURNITURE, hidden]
    size, camera = (128, 96), np.array([[110.0, 0, 63.5], [0, 110.0, 47.5], [0, 0, 1]])
    scene = read_scene(write_scene(tmp_path, boxes, poses=walk(4), size=size, K=camera))
    counts = pixels_in_boxes(scene, scene.views)
    for v, pose in enumerate(walk(4)):
        full = ray_depth(boxes, pose, camera, size)
        for b in range(len(boxes)):
            without = ray_depth(boxes[:b] + boxes[b + 1 :], pose, camera, size)
            expected = (without > full + 0.05).sum() * (256 * 192) / (128 * 96)
            assert counts[v, b] == pytest.approx(expected, rel=0.25, abs=200), (v, boxes[b].label)
    assert visible_boxes(scene, scene.views).tolist() == (counts.max(0) >= 150).tolist()
    assert not visible_boxes(scene, scene.views, min_pixels=1e6).any()
    for v, view in enumerate(scene.views):  # every point against every box
        points = view_points(view, 2)
        for b, thing in enumerate(scene.boxes):
            local = np.abs((points - thing.center) @ thing.rotation) <= thing.extent / 2 + 0.02
            z = box_corners(thing)[:, 2]
            above = points[:, 2] > z.min() + min(0.05, (z.max() - z.min()) / 4)
            assert counts[v, b] == 4 * 256 * 192 / (128 * 96) * (local.all(1) & above).sum(), thing.label


# Words ----------------------------------------------------------------------------------------------------------------


def test_words():
    assert [category_text(c) for c in ("tv_monitor", "bed")] == ["TV", "bed"]
    assert [plural(c) for c in ("shelf", "tv_monitor", "bed")] == ["shelves", "TVs", "beds"]
    assert [with_article(w) for w in ("oven", "TV", "bed")] == ["an oven", "a TV", "a bed"]


def test_unique_phrases():
    scene = scene_of(FURNITURE, COLORS)
    assert unique_phrases(scene) == {0: "bed", 1: "blue chair", 2: "green chair", 3: "table", 4: "TV", 5: "cabinet"}
    same = scene_of(FURNITURE, {**COLORS, "c2": "blue"})
    unknown = scene_of(FURNITURE, {key: value for key, value in COLORS.items() if key != "c2"})
    assert 1 not in unique_phrases(same) and 1 not in unique_phrases(unknown)


def test_footprint_gap_against_shapely():
    rng = np.random.default_rng(1)
    for _ in range(200):
        a, b = (box("bed", *rng.uniform(-2, 2, 2), rng.uniform(-3, 3), rng.uniform(0.2, 2, 3)) for _ in range(2))
        outlines = [Polygon(box_corners(item)[[0, 2, 6, 4], :2]) for item in (a, b)]
        assert footprint_gap(a, b) == pytest.approx(outlines[0].distance(outlines[1]), abs=1e-9)


def test_upright_renames_axes_and_keeps_the_box():
    item = box("bed", 1, 2, 0.7, (2.0, 1.5, 0.6))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            rotation = item.rotation[:, order] * signs
            if np.linalg.det(rotation) > 0:
                again = upright(OrientedBox(item.center, item.extent[list(order)], rotation))
                assert again.rotation[2, 2] == pytest.approx(1)
                corners = {tuple(corner) for corner in box_corners(again).round(6)}
                assert corners == {tuple(corner) for corner in box_corners(item).round(6)}
    tilt = np.array([[np.cos(0.4), 0, np.sin(0.4)], [0, 1, 0], [-np.sin(0.4), 0, np.cos(0.4)]])
    assert upright(OrientedBox([0, 0, 0], [1, 1, 1], tilt)) is None


# Anchors --------------------------------------------------------------------------------------------------------------


def corners_of_action(action: dict) -> np.ndarray:
    """Corners by the words of the format: extent along normal, up x normal, up."""
    normal, up = np.array(action["normal"]), np.array([0.0, 0.0, 1.0])
    axes = [normal, np.cross(up, normal), up]
    signs = itertools.product((-0.5, 0.5), repeat=3)
    return np.array(
        [
            action["center"] + sum(s * e * a for s, e, a in zip(sign, action["extent"], axes, strict=True))
            for sign in signs
        ]
    )


def test_action_describes_the_whole_box():
    for item in FURNITURE:
        action = json.loads(place_anchor_action("42444499", item))
        assert list(action) == ["action", "scene", "category", "center", "normal", "extent"]
        assert (action["action"], action["scene"], action["category"]) == ("place_anchor", "42444499", item.label)
        ours, true = corners_of_action(action), box_corners(item)
        assert np.linalg.norm(ours[:, None] - true[None], axis=-1).min(1).max() < 5e-4


def test_anchors_of_a_known_room():
    scene = scene_of(FURNITURE, COLORS)
    samples = build_anchors(scene, all_seen(scene))
    by_target = defaultdict(list)
    for sample in samples:
        by_target[sample["object_ids"][0]].append(sample["instruction"])
    assert {target: len(words) for target, words in by_target.items()} == dict(b1=1, c1=2, c2=2, t1=1, tv=1, k1=1)
    assert "blue chair" in by_target["c1"][0] and "chair nearest to" in by_target["c1"][1].replace("closest", "nearest")
    seen = all_seen(scene)
    seen[[0, 1]] = False
    assert {s["object_ids"][0] for s in build_anchors(scene, seen)} == {"c2", "t1", "tv", "k1"}
    assert not any("bed" in s["instruction"] for s in build_anchors(scene, seen))


def test_twins_that_words_cannot_tell_apart_get_no_anchor():
    twins = scene_of([box("bed", 0, 0), box("chair", -1.5, 0, uid="a"), box("chair", 1.6, 0, uid="b")])
    assert {s["boxes"][0]["label"] for s in build_anchors(twins, all_seen(twins))} == {"bed"}


def test_anchors_name_one_object_each():
    """Over random rooms: every instruction is read back by an independent rule and must mean its target alone."""
    kinds = Counter()
    for seed in range(60):
        scene = random_scene(seed)
        samples = build_anchors(scene, all_seen(scene), seed)
        assert len({s["instruction"] for s in samples}) == len(samples)
        assert samples == build_anchors(scene, all_seen(scene), seed)
        for sample in samples:
            words = " ".join(sample["instruction"].replace(".", " ").replace("?", " ").split())
            meant = [item for item in scene.boxes if category_text(item.label) in words.split()]
            relation = next((r for r in ("nearest to", "closest to", "farthest from") if r in words), None)
            kinds[relation] += 1
            if relation is None:
                colors = [c for c in ("red", "blue", "green") if c in words]
                meant = [item for item in meant if not colors or scene.colors[item.object_id] == colors[0]]
            else:
                before, after = words.split(relation)
                landmarks = matching(scene, after)
                assert len(landmarks) == 1, words
                meant = matching(scene, before)
                order = sorted(meant, key=lambda item: np.hypot(*(item.center - landmarks[0].center)[:2]))
                meant = [order[-1 if relation == "farthest from" else 0]]
            assert [item.object_id for item in meant] == sample["object_ids"], words
    assert kinds[None] > 50 and kinds["nearest to"] > 5 and kinds["farthest from"] > 2


def test_lists_mark_every_instance():
    """Over random rooms: a list stands for all instances of a category of several, where the views show all of them."""
    rng, count = np.random.default_rng(0), 0
    for seed in range(60):
        scene = random_scene(seed)
        visible = rng.random(len(scene.boxes)) < 0.8
        samples = build_lists(scene, visible, seed)
        labels = Counter(item.label for item in scene.boxes)
        hidden = {item.label for item, seen in zip(scene.boxes, visible, strict=True) if not seen}
        assert [s["boxes"][0]["label"] for s in samples] == [c for c in CATEGORIES if labels[c] > 1 and c not in hidden]
        for sample in samples:
            category = sample["boxes"][0]["label"]
            assert f" {plural(category)} " in sample["instruction"].replace(".", " ")
            actions = json.loads(sample["action_json"])
            assert [json.dumps(action) for action in actions] == [
                place_anchor_action(scene.scene_id, item) for item in scene.boxes if item.label == category
            ]
            assert sample["object_ids"] == [item.object_id for item in scene.boxes if item.label == category]
            count += 1
    assert count >= 15


def test_negatives_name_what_is_not_there():
    for seed in range(60):
        scene = random_scene(seed)
        seen = all_seen(scene)
        num_positive = len(build_anchors(scene, seen, seed))
        for share in (0.1, 0.25, 0.5):
            samples = build_negatives(scene, seen, seed, share)
            assert len(samples) == max(1, round(num_positive * share / (1 - share)))
            for sample in samples:
                words = sample["instruction"].replace(".", " ").replace("?", " ").split()
                assert not any(category_text(item.label) in words for item in scene.boxes)
                assert sum(category_text(category) in words for category in CATEGORIES) == 1
                assert json.loads(sample["action_json"]) == {
                    "action": "none", "scene": scene.scene_id, "reason": "not_present"
                }  # fmt: skip
            assert len({sample["instruction"] for sample in samples}) == len(samples)
    full = scene_of([box(category, i, 0) for i, category in enumerate(CATEGORIES)])
    assert build_negatives(full, all_seen(full)) == []
    with pytest.raises(ValueError, match="negative_share: expected a share"):
        build_negatives(full, all_seen(full), 0, 1.0)


def matching(scene: Scene, words: str) -> list:
    """Boxes that fit all the words about category and colour."""
    found = []
    for item in scene.boxes:
        color = [c for c in ("red", "blue", "green") if c in words.split()]
        if category_text(item.label) in words.split() and (not color or scene.colors.get(item.object_id) == color[0]):
            found.append(item)
    return found


# Questions ------------------------------------------------------------------------------------------------------------


def test_questions_hold_in_random_rooms():
    """Every answer again by another route than the builder's."""
    tally, answers = Counter(), defaultdict(Counter)
    for seed in range(60):
        scene = random_scene(seed)
        by_id = {item.object_id: item for item in scene.boxes}
        outlines = {i: Polygon(box_corners(item)[[0, 2, 6, 4], :2]) for i, item in by_id.items()}
        samples = build_qa(scene, all_seen(scene), seed)
        assert samples == build_qa(scene, all_seen(scene), seed)
        asked = [(s.get("situation"), s["question"]) for s in samples]
        assert len(set(asked)) == len(asked)
        assert max(Counter(s["task"] for s in samples).values()) <= 2 * MAX_PER_TASK
        for sample in samples:
            task, answer, ids = sample["task"], sample["answer"], sample["object_ids"]
            tally[task] += 1
            answers[task][answer] += 1
            things = [by_id[i] for i in ids]
            if task == "qa_existence":
                named = [c for c in CATEGORIES if f" {category_text(c)} " in sample["question"].replace("?", " ")]
                assert len(named) == 1
                assert answer == ("yes" if any(item.label == named[0] for item in scene.boxes) else "no")
            elif task == "qa_count":
                named = [c for c in CATEGORIES if f" {plural(c)} " in sample["question"]]
                assert len(named) == 1 and int(answer) == sum(item.label == named[0] for item in scene.boxes)
            elif task == "qa_color":
                assert answer == scene.colors[ids[0]] and answer not in sample["question"]
            elif task == "qa_side":
                by, faced, thing = things
                assert category_text(by.label) in sample["situation"].split(" and ")[0]
                assert category_text(faced.label) in sample["situation"].split(" and ")[1]
                assert category_text(thing.label) in sample["question"]
                # The agent's frame: x right, y ahead. Turn the world so that the faced object lies on +y.
                ahead = faced.center[:2] - by.center[:2]
                turn = rotation_z(np.pi / 2 - np.arctan2(ahead[1], ahead[0]))[:2, :2]
                x, y = turn @ (thing.center[:2] - by.center[:2])
                assert np.allclose((turn @ ahead)[0], 0)
                assert answer == (("left" if x < 0 else "right") if "left" in sample["question"] else
                                  ("in front" if y > 0 else "behind"))  # fmt: skip
                assert abs(x if "left" in sample["question"] else y) > 0.1
            elif task == "qa_nearest":
                others = [i for i in by_id if i != ids[0]]
                nearest = min(others, key=lambda i: outlines[ids[0]].distance(outlines[i]))
                by_center = min(others, key=lambda i: np.linalg.norm((by_id[i].center - things[0].center)[:2]))
                assert nearest == by_center == ids[1] and answer == category_text(by_id[nearest].label)
                rest = [outlines[ids[0]].distance(outlines[i]) for i in others if by_id[i].label != things[1].label]
                assert not rest or min(rest) >= outlines[ids[0]].distance(outlines[nearest]) + 0.299
            elif task == "qa_distance":
                metres = np.linalg.norm((things[0].center - things[1].center)[:2])
                assert abs(float(answer) - metres) < 0.2 and float(answer) % 0.5 == 0
    assert all(tally[f"qa_{kind}"] > 20 for kind in ("existence", "count", "side", "nearest", "distance", "color"))
    assert answers["qa_existence"]["yes"] == answers["qa_existence"]["no"]
    assert answers["qa_side"]["left"] == answers["qa_side"]["right"] > 20
    assert answers["qa_side"]["in front"] == answers["qa_side"]["behind"] > 5


def test_left_and_right_by_hand():
    """Facing north (+y) from the origin, east (+x) is on the right. Seen from above, z up."""
    scene = scene_of([box("bed", 0, 0), box("table", 0, 3), box("sofa", 4, 0.2), box("chair", -4, 0.2)])
    found = {}
    for seed in range(20):
        for sample in build_qa(scene, all_seen(scene), seed):
            if sample["task"] == "qa_side" and sample["object_ids"][:2] == ["bed-0-0", "table-0-3"]:
                found[sample["boxes"][2]["label"]] = sample["answer"]
    assert found == {"sofa": "right", "chair": "left"}


def test_side_holds_all_around():
    """Standing anywhere within the reach of an object, by shapely's rings of another density."""
    count = 0
    for seed in range(60):
        boxes = [item for item in random_scene(seed).boxes if upright(item) is not None]
        for by, faced, thing in itertools.permutations(boxes, 3):
            answers = clear_sides(by, faced, thing)
            outline = Polygon(box_corners(by)[[0, 2, 6, 4], :2])
            for distance in (0.2, 0.4, 0.6) if answers else ():
                ring = outline.buffer(distance).exterior
                places = np.array([ring.interpolate(u, normalized=True).coords[0] for u in np.linspace(0, 1, 30)])
                ahead, there = faced.center[:2] - places, thing.center[:2] - places
                left = ahead[:, 0] * there[:, 1] - ahead[:, 1] * there[:, 0] > 0
                front = (ahead * there).sum(1) > 0
                holds = {"left": left, "right": ~left, "in front": front, "behind": ~front}
                assert all(holds[answer].all() for answer in answers), (seed, answers)
                count += 1
    assert count > 300


def test_standing_places():
    item = box("bed", 1.0, -2.0, 0.7, (2.0, 1.5, 0.6))
    outline = Polygon(box_corners(item)[[0, 2, 6, 4], :2])
    places = standing_places(item)
    gaps = np.array([outline.distance(Point(place)) for place in places])
    assert np.allclose(places[0], [1, -2]) and np.allclose(gaps[1:25], 0.2) and np.allclose(gaps[25:], 0.6)
    assert len(places) == 49 and len(np.unique(places.round(9), axis=0)) == 49


def test_hidden_objects_are_not_asked_for():
    scene = scene_of(FURNITURE, COLORS)
    seen = all_seen(scene)
    seen[[1, 4]] = False  # a chair and the TV
    for seed in range(10):
        for sample in build_qa(scene, seen, seed):
            assert not {"c1", "tv"} & set(sample["object_ids"])
            assert not (sample["task"] == "qa_count" and "chairs" in sample["question"])
            assert "TV" not in sample["question"] + sample.get("situation", "")


# A folder of scenes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path):
    for scene_id, fold in (("42444499", "Training"), ("42444500", "Training"), ("42444501", "Validation")):
        write_scene(tmp_path / "raw", FURNITURE, scene_id=scene_id, fold=fold, colors=COLORS, layout="raw")
    (tmp_path / "raw" / "metadata.csv").write_text(
        "video_id,visit_id,sky_direction,fold\n42444499,1,Up,Training\n42444500,1,Up,Training\n42444501,NA,Up,Validation\n"
    )
    return tmp_path / "raw"


def prepare(raw, **settings):
    return prepare_arkitscenes(
        raw, raw.parent / "processed", **{"num_views": 4, "workers": 1, "progress": False, **settings}
    )


def test_prepared_files_are_good_and_reused(raw, capsys):
    files = prepare(raw)
    assert list(files) == ["anchors_train", "qa_train", "anchors_val", "qa_val"]
    for path in files.values():
        assert validate_file(path) == [], summarise(path, validate_file(path))
    record = read_samples(files["anchors_train"])[0]
    scene = read_scene(raw / "Training" / record["scene_id"])
    poses = {view.view_id: view.camera_to_world for view in scene.views}
    for v, view_id in enumerate(record["view_ids"]):
        assert path_below(sample_root(files["anchors_train"]), record["images"][v]).stem == view_id
        assert np.abs(np.reshape(record["geom_token"]["R"][v], (3, 3)) - poses[view_id][:3, :3]).max() < 1e-4
        assert np.abs(np.array(record["geom_token"]["t"][v]) - poses[view_id][:3, 3]).max() < 1e-4
    manifest = read_manifest(files["qa_train"])
    assert manifest["visits"] == {"42444499": "1", "42444500": "1"} and manifest["root"] == "../raw"
    assert manifest["views"]["baseline_m"]["min"] > 1 and 0.4 < manifest["views"]["coverage"]["min"] <= 1

    first = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    capsys.readouterr()
    prepare(raw, workers=2)
    assert capsys.readouterr().out.count("up to date") == 4
    assert {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()} == first
    files["qa_val"].unlink()
    prepare(raw)  # from the kept scenes
    assert files["qa_val"].read_bytes() == first["qa_val"][0]
    capsys.readouterr()
    prepare(raw, num_views=3)
    assert "settings changed (num_views 4 -> 3)" in capsys.readouterr().out
    assert {len(sample["images"]) for sample in read_samples(files["qa_val"])} == {3}


def test_every_task_and_view_set_is_good(raw, capsys):
    files = prepare(raw, tasks=["anchors", "qa", "lists", "negatives", "planes"], view_sets=2, strategy="random")
    assert len(files) == 10
    for path in files.values():
        assert validate_file(path) == [], summarise(path, validate_file(path))
    records = read_samples(files["anchors_train"])
    assert {record["view_set"] for record in records} == {0, 1}
    by_set = defaultdict(set)
    for record in records:
        by_set[record["scene_id"], record["view_set"]].add(tuple(record["view_ids"]))
    assert len(by_set) == 4 and all(len(views) == 1 for views in by_set.values())
    assert len({record["question_id"] for record in records}) == len(records)
    for record in records:
        centers = np.array(record["geom_token"]["t"])
        farthest = max(np.linalg.norm(a - b) for a, b in itertools.combinations(centers, 2))
        assert record["baseline_m"] == pytest.approx(farthest, abs=1e-3)
        assert 0 < record["coverage"] <= 1
    out = capsys.readouterr().out
    assert re.search(r"train: 2 scenes \(0 left out\), 4 view sets of 4 to 4 views", out)
    assert re.search(r"parallax \[m\] +\d\.\d\d", out) and re.search(r"coverage +0\.\d\d", out)
    first = {name: path.read_bytes() for name, path in files.items()}
    again = prepare(raw, tasks=["lists"], view_sets=2, strategy="random")  # from the kept scenes
    assert again["lists_val"].read_bytes() == first["lists_val"]


def test_kinds_of_questions_have_files_of_their_own_when_asked_for(raw):
    """The files of all kinds hold the records of `qa`, word for word."""
    from roomplan_lib.samples.qa import QA_TASKS

    files = prepare(raw, tasks=["qa", *QA_TASKS])
    for split in ("train", "val"):
        kinds = {task: list(read_samples(files[f"{task}_{split}"])) for task in QA_TASKS if f"{task}_{split}" in files}
        assert len(kinds) > 2 and all(record["task"] == task for task in kinds for record in kinds[task])
        together = {record["question_id"]: record for record in itertools.chain(*kinds.values())}
        assert together == {record["question_id"]: record for record in read_samples(files[f"qa_{split}"])}
        assert len(together) == sum(map(len, kinds.values()))
    assert validate_file(files["qa_side_val"]) == []


def test_task_without_samples_has_no_file(raw, capsys):
    for scene_id, fold in (("42444499", "Training"), ("42444500", "Training"), ("42444501", "Validation")):
        write_scene(
            raw, [item for item in FURNITURE if item.object_id != "c2"], scene_id=scene_id, fold=fold, layout="raw"
        )
    files = prepare(raw, tasks=["anchors", "lists"])
    assert (
        list(files) == ["anchors_train", "anchors_val"]
        and "lists_val.jsonl: none of 1 scenes" in capsys.readouterr().out
    )
    assert not (raw.parent / "processed" / "lists_val.jsonl").exists()


def test_turned_scans_give_good_samples(raw, tmp_path):
    """Pictures that lie on their side: the record tells by how much, and its K is that of the upright picture."""
    poses = [pose @ np.diag([-1.0, -1, 1, 1]) @ np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
             for pose in walk(8)]  # fmt: skip
    write_scene(raw, FURNITURE, scene_id="42444501", fold="Validation", layout="raw", colors=COLORS, poses=poses)
    table = raw / "metadata.csv"
    table.write_text(table.read_text().replace("42444501,NA,Up", "42444501,NA,Left"))
    files = prepare(raw, split="Validation", tasks=["anchors", "planes"])
    for path in files.values():
        assert validate_file(path) == [], summarise(path, validate_file(path))
    manifest = read_manifest(files["anchors_val"])
    assert list(manifest["sky_directions"].values()) == [1]
    record = read_samples(files["anchors_val"])[0]
    assert record["quarter_turns"] == [record["quarter_turns"][0]] * 4 and record["quarter_turns"][0] in (1, 3)
    assert np.array(record["geom_token"]["R"])[:, 7].max() < 0  # every picture's y axis points down
    assert np.allclose(np.array(record["geom_token"]["K"])[:, 2], 23.5)


def test_preparing_does_not_depend_on_workers_or_earlier_runs(raw, tmp_path):
    one = prepare(raw)
    two = prepare_arkitscenes(raw, tmp_path / "other", num_views=4, workers=2, progress=False)
    for name in one:
        assert one[name].read_bytes() == two[name].read_bytes()
    other_seed = prepare(raw, seed=1)
    assert other_seed["qa_train"].read_bytes() != two["qa_train"].read_bytes()


def test_changed_scene_is_built_again(raw, capsys):
    before = prepare(raw, tasks=["anchors"])["anchors_val"].read_bytes()
    write_scene(raw, FURNITURE[:4], scene_id="42444501", fold="Validation", layout="raw", colors=COLORS)
    capsys.readouterr()
    after = prepare(raw, tasks=["anchors"])["anchors_val"].read_bytes()
    out = capsys.readouterr().out
    assert after != before and out.count("up to date") == 1


def test_broken_scenes_are_all_listed(raw):
    (raw / "Training" / "42444499" / "lowres_wide.traj").unlink()
    (raw / "Validation" / "42444501" / "42444501_3dod_annotation.json").write_text("{")
    with pytest.raises(ValueError, match="(?s)2 of 3 scenes.*42444499.*traj: file is missing.*42444501.*truncated"):
        prepare(raw)
    files = prepare(raw, split="train", skip_broken=True)
    assert {sample["scene_id"] for sample in read_samples(files["qa_train"])} == {"42444500"}
    assert "traj" in read_manifest(files["qa_train"])["left_out"]["42444499"]


@pytest.mark.parametrize("fault", ["truncated", "size"])
def test_chosen_pictures_are_decoded(raw, fault):
    scene_dir = raw / "Training" / "42444499"
    for path in sorted((scene_dir / "lowres_wide").iterdir())[1:]:
        if fault == "truncated":
            path.write_bytes(path.read_bytes()[:-60])
        else:
            Image.new("RGB", (128, 96)).save(path)
    words = "cannot read the picture" if fault == "truncated" else "has 128x96 pixels, its .pincam is for 64x48; fetch"
    with pytest.raises(ValueError, match=f"42444499_1000.*png: .*{words}"):
        prepare(raw)


def test_other_intrinsics_of_the_same_length_are_noticed(raw):
    before = read_samples(prepare(raw)["anchors_train"])[0]["geom_token"]["K"]
    for path in raw.rglob("*.pincam"):
        path.write_text(path.read_text().replace("55.0", "66.0"))
    after = read_samples(prepare(raw)["anchors_train"])[0]["geom_token"]["K"]
    assert before[0][0] == 55 and after[0][0] == 66


def test_a_scene_that_is_skipped_before_it_was_annotated_is_left_out(raw):
    path = raw / "Training" / "42444499" / "42444499_3dod_annotation.json"
    path.write_text('{"skipped": true, "data": null}')
    manifest = read_manifest(prepare(raw)["anchors_train"])
    assert "skipped" in manifest["left_out"]["42444499"]
    for path in raw.rglob("*_3dod_annotation.json"):
        path.write_text('{"skipped": true}')
    with pytest.raises(ValueError, match="(?s)none of the 2 train scenes.*42444499: .*skipped.*42444500: .*skipped"):
        prepare(raw)


def test_damaged_caches_are_built_again(raw):
    files = prepare(raw)
    wanted = {name: path.read_bytes() for name, path in files.items()}
    for change in (lambda kept: kept.update(sets=[]), lambda kept: kept.pop("sets"), lambda kept: kept.pop("hash")):
        for path in (raw.parent / "processed" / ".scenes").iterdir():
            kept = json.loads(path.read_text())
            change(kept)
            path.write_text(json.dumps(kept))
        files["qa_train"].unlink()
        assert {name: path.read_bytes() for name, path in prepare(raw).items()} == wanted


def test_skipped_scenes_are_left_out(raw, capsys):
    path = raw / "Training" / "42444499" / "42444499_3dod_annotation.json"
    path.write_text(path.read_text().replace('"skipped": false', '"skipped": true'))
    manifest = read_manifest(prepare(raw)["qa_train"])
    assert manifest["scene_ids"] == ["42444500"] and "skipped" in manifest["left_out"]["42444499"]
    assert "1 scenes are left out, since the annotators skipped them: 42444499" in capsys.readouterr().out


def test_visits_stay_in_one_split(raw, capsys):
    """A visit of both folds shows one room: it is kept for validation and left out of training."""
    table = raw / "metadata.csv"
    table.write_text(table.read_text().replace("42444500,1", "42444500,2").replace("NA", "1"))
    files = prepare(raw)
    assert read_manifest(files["qa_train"])["scene_ids"] == ["42444500"]
    assert read_manifest(files["qa_val"])["scene_ids"] == ["42444501"]
    left_out = read_manifest(files["qa_train"])["left_out"]
    assert list(left_out) == ["42444499"] and "visit 1 is the room of validation's 42444501" in left_out["42444499"]
    assert "42444499: its visit 1" in capsys.readouterr().out
    assert all(validate_file(path) == [] for path in files.values())
    again = prepare(raw, exclude=["42444501"])  # without that one, the visit is training's alone
    assert read_manifest(again["qa_train"])["scene_ids"] == ["42444499", "42444500"]


def test_visit_of_both_folds_is_left_out_of_training_alone(raw):
    """The table tells of validation scans that are not in this folder."""
    (raw / "Validation").rename(raw.parent / "Validation")
    table = raw / "metadata.csv"
    table.write_text(table.read_text().replace("42444500,1", "42444500,2").replace("NA", "1"))
    for split in ("train", "Training"):
        assert read_manifest(prepare(raw, split=split)["qa_train"])["scene_ids"] == ["42444500"]


def test_official_visit_in_both_folds(tmp_path):
    """Visit 381879: 41159521 and 41159526 are Training, 41159519 and 41159525 Validation in the published table."""
    table = Path(__file__).parents[2] / "shared" / "data" / "arkitscenes_meta" / "3dod_train_val_splits.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not on this machine")
    raw = tmp_path / "raw"
    folds = {"41159521": "Training", "41159526": "Training", "40753679": "Training", "41159519": "Validation"}
    for scene_id, fold in folds.items():
        write_scene(raw, FURNITURE, scene_id=scene_id, fold=fold, colors=COLORS)
    (raw / table.name).write_bytes(table.read_bytes())
    files = prepare(raw)
    assert read_manifest(files["anchors_train"])["scene_ids"] == ["40753679"]
    assert read_manifest(files["anchors_val"])["scene_ids"] == ["41159519"]
    assert set(read_manifest(files["anchors_train"])["left_out"]) == {"41159521", "41159526"}


def test_impossible_requests(raw, tmp_path):
    with pytest.raises(ValueError, match="tasks: expected some of"):
        prepare(raw, tasks=["captions"])
    for split in ("test", "bogus"):
        with pytest.raises(ValueError, match=rf"split: expected one of \('Training', .*'val'\), got '{split}'"):
            prepare(raw, split=split)
    with pytest.raises(ValueError, match="exclude: no scene"):
        prepare(raw, exclude=["1"])
    (raw / "Validation").rename(raw / "elsewhere")
    (raw / "metadata.csv").unlink()
    with pytest.raises(ValueError, match="nothing tells its split"):
        prepare(raw)


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A prepared folder that tests copy lines from."""
    folder = tmp_path_factory.mktemp("good")
    for scene_id, fold in (("42444499", "Training"), ("42444500", "Training"), ("42444501", "Validation")):
        write_scene(folder / "raw", FURNITURE, scene_id=scene_id, fold=fold, colors=COLORS)
    return prepare(folder / "raw")


def set_in(record, keys, value):
    for key in keys[:-1]:
        record = record[key]
    record[keys[-1]] = value


def set_action(record, **values):
    record["action_json"] = json.dumps({**json.loads(record["action_json"]), **values})


def other_view(record: dict, key: str) -> str:
    """A picture of the record's scene that the record does not show."""
    return next(name for i in range(8) if (name := re.sub(r"1000\.\d", f"1000.{i}", record[key][0])) not in record[key])


def other_scene(text: str) -> str:
    return text.replace("42444499", "42444500")


# What is done to the records of anchors_train, and the words of the only kind of fault that may follow.
PLANTED = {
    "unknown key": (lambda r: r[1].update(colour="red"), 2, "unknown keys: colour"),
    "absent object": (
        lambda r: r[1].update(instruction="Place an anchor on the bathtub."),
        2,
        "names bathtub, its tar",
    ),
    "depths left out": (lambda r: r[1].pop("depths"), 2, "depths are missing"),
    "baseline of other views": (lambda r: r[1].update(baseline_m=0.2), 2, "baseline_m 0.2 is not that of its cameras"),
    "coverage above 1": (lambda r: r[1].update(coverage=1.5), 2, "coverage: expected a number from 0 to 1"),
    "picture turned": (lambda r: r[1].update(quarter_turns=[1, 0, 0, 0]), 2, "K of view 0 does not fit its picture"),
    "none, though there is a target": (
        lambda r: r[1].update(action_json='{"action": "none", "scene": "42444499", "reason": "not_present"}'),
        2,
        "action_json is none, but the record has 1 boxes",
    ),
    "two actions for one box": (
        lambda r: r[1].update(action_json=f"[{r[1]['action_json']}, {r[1]['action_json']}]"),
        2,
        "of one marked twice",
    ),
    "one action for two boxes": (
        lambda r: r[1].update(
            action_json=f"[{r[1]['action_json']}]",
            boxes=r[1]["boxes"] + r[0]["boxes"],
            object_ids=r[1]["object_ids"] + r[0]["object_ids"],
        ),
        2,
        "marks 1 of the record's 2 boxes",
    ),
    "missing key": (lambda r: r[1].pop("geom_token"), 2, "missing: geom_token"),
    "no answer": (lambda r: r[1].pop("action_json"), 2, "instruction and action_json"),
    "question and instruction": (lambda r: r[1].update(question="Is it?", answer="yes"), 2, "one of the two"),
    "wrong shape": (lambda r: r[1]["geom_token"]["t"].pop(), 2, r"geom_token.t: expected \[4, 3\]"),
    "ragged": (lambda r: r[1]["geom_token"]["R"][0].pop(), 2, r"geom_token.R: expected \[4, 9\] finite"),
    "null in the pose": (lambda r: set_in(r[1], ["geom_token", "t", 0, 0], None), 2, "geom_token.t: .* finite numbers"),
    "no rotation": (lambda r: set_in(r[1], ["geom_token", "R", 2], [1, 0, 0, 0, 1, 0, 0, 0, -1]), 2, "R of view 2"),
    "no camera": (lambda r: set_in(r[1], ["geom_token", "K", 1, 0], 0), 2, "K of view 1 is no camera"),
    "K of a larger picture": (
        lambda r: set_in(r[1], ["geom_token", "K", 1], [400, 0, 320, 0, 400, 240, 0, 0, 1]),
        2,
        "K of view 1 does not fit its picture of",
    ),
    "histogram": (lambda r: set_in(r[1], ["geom_token", "depth_hist", 0], [0.2] * 16), 2, "depth_hist of view 0"),
    "picture missing": (
        lambda r: set_in(r[1], ["images", 0], r[1]["images"][0].replace("lowres", "highres")),
        2,
        "highres_wide.*picture is missing",
    ),
    "picture climbs out": (
        lambda r: set_in(r[1], ["images", 0], "../raw/" + r[1]["images"][0]),
        2,
        "expected a path below",
    ),
    "picture of another scene": (
        lambda r: set_in(r[1], ["images", 0], other_scene(r[1]["images"][0])),
        2,
        "shows another scene than 42444499",
    ),
    "picture twice": (
        lambda r: r[1].pop("view_ids") and set_in(r[1], ["images", 0], r[1]["images"][1]),
        2,
        "is shown twice",
    ),
    "depth missing": (
        lambda r: set_in(r[1], ["depths", 0], r[1]["depths"][0].replace("lowres", "highres")),
        2,
        "depth: .*highres_depth.*picture is missing",
    ),
    "depths too few": (lambda r: r[1]["depths"].pop(), 2, "depths: expected 4 paths"),
    "same question_id": (lambda r: r[1].update(question_id=r[0]["question_id"]), 2, "also that of record 1"),
    "same record": (lambda r: r.append({**r[0], "question_id": "new"}), None, "says the same as record 1"),
    "ambiguous": (lambda r: r[1].update(instruction=r[0]["instruction"]), 2, "ambiguous: record 1 asks the same"),
    "no parallax": (
        lambda r: r[1]["geom_token"].update(t=[[1, 2, 1 + 0.01 * i] for i in range(4)]),
        2,
        "views without parallax",
    ),
    "action is no JSON": (lambda r: r[1].update(action_json='{"action": "place'), 2, "action_json: no JSON"),
    "empty list of actions": (lambda r: r[1].update(action_json="[]"), 2, "an empty list"),
    "action of another scene": (lambda r: set_action(r[1], scene="42444500"), 2, "about scene '42444500'"),
    "action of an unknown category": (lambda r: set_action(r[1], category="lamp"), 2, "action_json: category"),
    "action without center": (lambda r: set_action(r[1], center=None), 2, "center: expected 3 numbers"),
    "action with a flat center": (lambda r: set_action(r[1], center=[1, 2]), 2, "center: expected 3 numbers"),
    "action elsewhere": (lambda r: set_action(r[1], center=[9, 9, 9]), 2, "center of none of the record's boxes"),
    "long normal": (lambda r: set_action(r[1], normal=[1, 1, 0]), 2, "not a unit vector"),
    "negative extent": (lambda r: set_action(r[1], extent=[1, -1, 1]), 2, "extent: -1 is beyond"),
    "box of no size": (lambda r: set_in(r[1], ["boxes", 0, "extent", 0], 0), 2, r"boxes\[0\]: extent"),
    "box without rotation": (lambda r: r[1]["boxes"][0].pop("rotation"), 2, r"boxes\[0\]: box of a record"),
    "box that is no rotation": (lambda r: set_in(r[1], ["boxes", 0, "rotation", 0], 3), 2, "expected a rotation"),
    "unknown action": (lambda r: set_action(r[1], action="teleport"), 2, "action: expected one of place_wall"),
    "action with a key too many": (lambda r: set_action(r[1], colour=1), 2, "unknown keys .*colour"),
    "action with a key twice": (
        lambda r: r[1].update(action_json=r[1]["action_json"][:-1] + ', "category": "bed"}'),
        2,
        "a key stands twice",
    ),
    "numbers as text": (lambda r: set_action(r[1], extent=["1", "1", "1"]), 2, "extent: expected a number"),
    "numbers as booleans": (lambda r: set_action(r[1], extent=[True, 1, 1]), 2, "extent: expected a number"),
    "action without category": (lambda r: set_action(r[1], category=""), 2, "category is missing"),
    "category of another box": (lambda r: set_action(r[1], category="fireplace"), 2, "its box's label"),
    "extent of another box": (lambda r: set_action(r[1], extent=[3, 3, 3]), 2, "extent .* is not that of its box"),
    "turned normal": (lambda r: set_action(r[1], normal=[0, 1, 0]), 2, "turned by .* degrees"),
    "upright normal": (lambda r: set_action(r[1], normal=[0, 0, 1]), 2, "not horizontal"),
    "target far away": (
        lambda r: set_action(r[1], center=[200, 0, 0]) or set_in(r[1], ["boxes", 0, "center"], [200, 0, 0]),
        2,
        "m from the nearest camera",
    ),
    "object_ids of other boxes": (lambda r: r[1].update(object_ids=["x"]), 2, "object_ids .* not those of the boxes"),
    "action without geometry": (lambda r: r[1].update(geom_token=None), 2, "target is in an unknown frame"),
    "K of far too long a lens": (
        lambda r: set_in(r[1], ["geom_token", "K", 1], [5500, 0, 31.5, 0, 5500, 23.5, 0, 0, 1]),
        2,
        "K of view 1 does not fit its picture of .* focal lengths 5500",
    ),
    "histogram of another picture": (
        lambda r: set_in(r[1], ["geom_token", "depth_hist", 0], [1.0] + [0.0] * 15),
        2,
        "depth_hist of view 0 is not that of its depth picture",
    ),
    "picture of another view": (
        lambda r: set_in(r[1], ["images", 0], other_view(r[1], "images")),
        2,
        r"picture .* is not that of view_ids\[0\]",
    ),
    "depth that is a picture": (
        lambda r: set_in(r[1], ["depths", 0], r[1]["images"][0]),
        2,
        "depth: .* expected a 16-bit depth image",
    ),
    "numbers of geometry as text": (
        lambda r: set_in(r[1], ["geom_token", "t", 0, 0], "1.0"),
        2,
        "geom_token.t: .* finite numbers",
    ),
    "unknown split": (lambda r: r[1].update(split="valid"), 2, "split: expected one of .* got 'valid'"),
    "ambiguous but for case and spaces": (
        lambda r: r[1].update(instruction=" " + r[0]["instruction"].upper().replace(" ", "  ")),
        2,
        "ambiguous: record 1 asks the same",
    ),
}


def replanted(good, tmp_path, records) -> Path:
    """The records under a new name with a good manifest, so that only the planted fault is left."""
    path = tmp_path / "anchors_train.jsonl"
    write_samples(path, records, {"root": sample_root(good["anchors_train"])})
    return path


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found(good, tmp_path, name):
    damage, number, words = PLANTED[name]
    records = read_samples(good["anchors_train"])
    damage(records)
    faults = validate_file(replanted(good, tmp_path, records))
    assert len(faults) == 1, summarise("x", faults)
    assert faults[0].record == (number or len(records)) and faults[0].remedy
    assert re.search(words, faults[0].reason), faults[0]


def test_good_records_have_no_fault(good, tmp_path):
    path = replanted(good, tmp_path, read_samples(good["anchors_train"]))
    assert validate_file(path) == [] and "no faults" in summarise(path, [])
    questions = read_samples(good["qa_train"])
    questions[0]["geom_token"] = None  # a question trains with the learned null geometry
    questions[1]["answers"] = ["something else", questions[1]["answer"]]
    path = tmp_path / "qa_train.jsonl"
    write_samples(path, questions, {"root": sample_root(good["qa_train"])})
    assert validate_file(path) == []
    questions[1]["answers"] = ["something else"]
    write_samples(path, questions, {"root": sample_root(good["qa_train"])})
    assert ["answers: expected a list with the answer" in fault.reason for fault in validate_file(path)] == [True]


def test_shuffled_and_foreign_geometry_is_found(good, tmp_path):
    """The poses of other views fit as well as the right ones; the histograms of the depth pictures do not."""
    records = read_samples(good["anchors_train"])
    records[0]["geom_token"] = {key: rows[::-1] for key, rows in records[0]["geom_token"].items()}
    records[1]["depths"] = records[1]["depths"][::-1]
    del records[1]["view_ids"]
    for record in records[:2]:
        faults = validate_file(replanted(good, tmp_path, [record]))
        assert faults and all("is not that of its depth picture" in fault.reason for fault in faults)


def test_file_without_manifest(good, tmp_path):
    """Its root is its own folder; its hash is not checked, its pictures are."""
    (tmp_path / "Training").symlink_to(sample_root(good["anchors_train"]) / "Training")
    path = tmp_path / "anchors_train.jsonl"
    path.write_bytes(good["anchors_train"].read_bytes())
    assert validate_file(path) == []
    assert "counts and hashes were not checked" in summarise(path, [])
    assert "not checked" not in summarise(good["anchors_train"], [])
    (tmp_path / "Training").unlink()
    assert any("picture is missing" in fault.reason for fault in validate_file(path))


# What is done to a record, and the words of the error. Each line stands for one rule.
STRUCTURE = {
    "scene_id missing": (lambda r: r.pop("scene_id"), "missing: scene_id"),
    "task null": (lambda r: r.update(task=None), "task: expected text"),
    "scene_id a number": (lambda r: r.update(scene_id=42), "scene_id: expected text"),
    "images missing": (lambda r: r.pop("images"), "missing: images"),
    "images empty": (lambda r: r.update(images=[]), "images: expected a list"),
    "images one text": (lambda r: r.update(images="a.png"), "images: expected a list"),
    "images numbers": (lambda r: r.update(images=[1, 2, 3, 4]), "images: expected a list"),
    "too few depths": (lambda r: r["depths"].pop(), "depths: expected 4 paths"),
    "too few view_ids": (lambda r: r["view_ids"].pop(), "view_ids: expected 4 names"),
    "geometry a list": (lambda r: r.update(geom_token=[]), "geom_token: expected an object or null"),
    "no K": (lambda r: r["geom_token"].pop("K"), r"geom_token.K: expected \[4, 9\]"),
    "too many poses": (lambda r: r["geom_token"]["R"].append([1, 0, 0, 0, 1, 0, 0, 0, 1]), "geom_token.R: expected"),
    "infinite": (lambda r: set_in(r, ["geom_token", "t", 1, 2], float("inf")), "geom_token.t: expected"),
    "not a number": (lambda r: set_in(r, ["geom_token", "depth_hist", 1, 2], float("nan")), "depth_hist: expected"),
    "a boolean": (lambda r: set_in(r, ["geom_token", "t", 1, 2], True), "geom_token.t: expected"),
    "a huge integer": (lambda r: set_in(r, ["geom_token", "t", 1, 2], 10**400), "geom_token.t: expected"),
    "focal length of 0": (lambda r: set_in(r, ["geom_token", "K", 2, 4], 0), "K of view 2 is no camera matrix"),
    "negative focal length": (lambda r: set_in(r, ["geom_token", "K", 2, 0], -9), "K of view 2 is no camera matrix"),
    "no question": (lambda r: r.pop("question"), "one of the two"),
    "no answer": (lambda r: r.pop("answer"), "question and answer as text"),
    "answer a number": (lambda r: r.update(answer=3), "question and answer as text"),
    "instruction without action": (
        lambda r: r.update(instruction="Anchor it.") or r.pop("question"),
        "instruction and action_json as text",
    ),
    "situation a number": (lambda r: r.update(situation=5), "situation: expected text"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_check_record(good, name):
    record = read_samples(good["qa_train"])[0]
    check_record(record, "here:1")
    check_record({**record, "images": ["no/such.png"] * 4}, "here:1")  # no picture is opened
    damage, words = STRUCTURE[name]
    damage(record)
    with pytest.raises(ValueError, match=f"^here:1: .*{words}.*; build the file again"):
        check_record(record, "here:1")


def test_faults_of_the_whole_file(good, tmp_path):
    path = replanted(good, tmp_path, read_samples(good["anchors_train"]))
    text = path.read_text()
    path.write_text(text[:-30])
    reasons = [str(fault) for fault in validate_file(path)]
    assert (
        len(reasons) == 2 and "sha256" in reasons[0] and f":{text.count(chr(10))}: invalid or truncated" in reasons[1]
    )
    path.write_text(text)
    assert validate_file(path) == []
    path.write_text("")
    assert any("no record" in fault.reason for fault in validate_file(path))
    path.write_text(text)
    manifest_path(path).write_text("{}")
    assert ["expected an object with the text `root`" in fault.reason for fault in validate_file(path)] == [True]
    with pytest.raises(ValueError, match="no such file"):
        validate_file(tmp_path / "absent.jsonl")


def test_broken_picture_is_found(good, tmp_path):
    records = read_samples(good["anchors_train"])[:1]
    path = replanted(good, tmp_path, records)
    for name in records[0]["images"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((sample_root(path) / name).read_bytes())
    for name in records[0]["depths"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((sample_root(path) / name).read_bytes())
    write_samples(path, records, {"root": tmp_path})
    assert validate_file(path) == []
    for key, damage in (("images", lambda _: b"not a picture"), ("images", half), ("depths", half)):
        file = tmp_path / records[0][key][1]
        content = file.read_bytes()
        file.write_bytes(damage(content))
        with Image.open(file) if damage is half else nullcontext():  # its header is good
            pass
        reasons = [fault.reason for fault in validate_file(path)]
        assert len(reasons) == 1 and f"{file}: cannot read the picture" in reasons[0]
        file.write_bytes(content)


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def test_splits_within_one_file(good, tmp_path):
    records = read_samples(good["anchors_train"])
    root = sample_root(good["anchors_train"])
    ids = [record["scene_id"] for record in records]
    second = ids.index("42444500")

    def reasons(name: str, changed: dict[int, str], visits=()) -> list[tuple[int, str]]:
        path = tmp_path / f"{name}.jsonl"
        mixed = [{**record, "split": changed.get(i, record["split"])} for i, record in enumerate(records)]
        write_samples(path, mixed, {"root": root, "visits": dict(visits)})
        found = [(fault.record, fault.reason) for fault in validate_file(path)]
        path.unlink()
        return found

    assert reasons("anchors", {}) == []
    assert reasons("anchors", {1: "val"}) == [(2, "scene 42444499 is in val here and in train above")]
    assert reasons("anchors_train", {}, {"42444499": "7", "42444500": "7"}.items()) == []
    other = dict.fromkeys(range(second, len(ids)), "val")
    assert reasons("anchors", other) == []
    found = reasons("anchors", other, {"42444499": "7", "42444500": "7"}.items())
    assert {reason for _, reason in found} == {"visit 7 is in val here and in train above (42444499)"}
    assert {reason for _, reason in reasons("anchors_val", {})} == {"split 'train' in a file named after 'val'"}


def test_split_overlap_by_scene_and_by_visit(good, tmp_path):
    train = read_samples(good["anchors_train"])
    val = read_samples(good["anchors_val"])
    root = sample_root(good["anchors_train"])
    write_samples(tmp_path / "anchors_train.jsonl", train, {"root": root, "visits": {"42444499": "7"}})
    write_samples(tmp_path / "anchors_val.jsonl", val, {"root": root, "visits": {"42444501": "7"}})
    write_samples(tmp_path / "qa_train.jsonl", read_samples(good["qa_train"]), {"root": root})
    faults = validate_file(tmp_path / "anchors_val.jsonl")
    assert [fault.reason for fault in faults] == [
        "visit 7 is in val here and in train in anchors_train.jsonl (42444499)"
    ]
    leaked = [{**record, "split": "val"} for record in train[:1]]
    write_samples(tmp_path / "anchors_val.jsonl", val + leaked, {"root": root})
    faults = validate_file(tmp_path / "anchors_val.jsonl")
    assert {fault.id for fault in faults} == {"42444499"} and len(faults) == 2  # in anchors_train and in qa_train
    assert "is in val here and in train" in faults[0].reason


def test_validation_survives_any_value(good, tmp_path):
    """A wrong type anywhere is a fault of its record, never an exception."""
    record = read_samples(good["anchors_train"])[0]
    path = tmp_path / "odd_train.jsonl"
    for keys in [(key,) for key in record] + [("geom_token", key) for key in record["geom_token"]]:
        for value in (None, 3, "x", "", [], {}, [[]], [None] * 4, [{}], [[1, "x"]] * 4, True, {"a": 1}):
            odd = json.loads(json.dumps(record))
            set_in(odd, keys, value)
            path.write_text(json.dumps(odd) + "\n")
            faults = validate_file(path)
            assert all(isinstance(fault.reason, str) and fault.remedy for fault in faults)
            if keys[0] in ("images", "scene_id", "action_json", "instruction"):
                assert any(fault.record == 1 for fault in faults), (keys, value)


# Rendered rooms -------------------------------------------------------------------------------------------------------


def test_rendered_rooms_give_good_samples(sample_files):
    for path in sample_files.values():
        assert validate_file(path) == [], summarise(path, validate_file(path))
    tasks = Counter(sample["task"] for path in sample_files.values() for sample in read_samples(path))
    assert set(tasks) >= {
        "place_anchor",
        "qa_existence",
        "qa_count",
        "qa_color",
        "qa_side",
        "qa_nearest",
        "qa_distance",
    }


def test_rendered_depth_reprojects(sample_files):
    """Surfaces of a room agree between views by the records' own poses and intrinsics."""
    root = sample_root(sample_files["anchors_train"])
    record = read_samples(sample_files["anchors_train"])[0]
    geometry, depths = record["geom_token"], [load_depth(path_below(root, name)) for name in record["depths"]]
    poses = np.tile(np.eye(4), (len(depths), 1, 1))
    poses[:, :3, :3] = np.reshape(geometry["R"], (-1, 3, 3))
    poses[:, :3, 3] = geometry["t"]
    cameras = np.reshape(geometry["K"], (-1, 3, 3))
    gaps = []
    for a, b in itertools.permutations(range(len(depths)), 2):
        points, valid = unproject(depths[a], cameras[a], poses[a])
        pixels, z = project(points[valid][::7], cameras[b], poses[b])
        height, width = depths[b].shape
        inside = (z > 0.1) & (pixels > 0).all(-1) & (pixels < [width - 1, height - 1]).all(-1)
        column, row = pixels[inside].round().astype(int).T
        gap = z[inside] - depths[b][row, column]
        gaps.append(gap[depths[b][row, column] > 0])
    gaps = np.concatenate(gaps)
    assert len(gaps) > 1000
    assert (gaps < -0.1).mean() < 0.03  # a point before the seen surface cannot be, save at edges
    assert (np.abs(gaps) < 0.05).mean() > 0.6  # the rest is hidden behind something in the other view


def test_anchor_targets_are_seen_in_the_pictures(sample_files):
    """Each target's box holds depth points of the record's own views."""
    root = sample_root(sample_files["anchors_train"])
    for record in read_samples(sample_files["anchors_train"])[:12]:
        target = box_from_record(record["boxes"][0])
        geometry, most = record["geom_token"], 0
        for v, name in enumerate(record["depths"]):
            pose = np.eye(4)
            pose[:3, :3], pose[:3, 3] = np.reshape(geometry["R"][v], (3, 3)), geometry["t"][v]
            points, valid = unproject(load_depth(path_below(root, name)), np.reshape(geometry["K"][v], (3, 3)), pose)
            most = max(most, points_in_box(points[valid], target, 0.03).sum())
        assert most >= 150
