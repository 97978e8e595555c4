"""Anchors on floor, walls and table tops, from a room's plan and fitted to depth, in rooms whose planes are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scene_files import box, ray_depth, write_scene

from roomplan_lib.actions import parse_action
from roomplan_lib.geometry import OrientedBox, box_iou_3d, look_at, points_in_box
from roomplan_lib.samples import box_from_record
from roomplan_lib.samples.planes import build_planes, fit_planes, room_planes, table_top
from roomplan_lib.samples.views import select_views
from roomplan_lib.samples.visibility import visible_boxes
from roomplan_lib.scenes.arkitscenes import find_scenes, read_scene

FURNITURE = [
    box("bed", 1.9, 1.6, 0.0, (2.0, 1.5, 0.6), "b1"),
    box("table", -0.6, -0.3, 0.5, (1.2, 0.8, 0.75), "t1"),
    box("cabinet", -2.7, 0.3, 0.0, (0.5, 1.8, 1.2), "k1"),
]
SIZE, CAMERA = (96, 72), np.array([[70.0, 0, 47.5], [0, 70.0, 35.5], [0, 0, 1]])


def around(num: int = 16) -> list[np.ndarray]:
    """Views from near the middle to all sides, and down on what stands there."""
    angles = 0.07 + np.arange(num) / num * 2 * np.pi
    eyes = [np.array([0.4 * np.cos(a), 0.4 * np.sin(a) + 0.9, 1.5]) for a in angles]
    return [look_at(eye, eye + [2 * np.cos(a), 2 * np.sin(a), -0.9]) for eye, a in zip(eyes, angles, strict=True)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A room of 6 x 5 x 2.5 m, floor at z = 0, walls at x = -3 and 3 and y = -2.5 and 2.5; nothing but depth tells."""
    return read_scene(write_scene(tmp_path_factory.mktemp("s"), FURNITURE, poses=around(), size=SIZE, K=CAMERA))


def test_fitted_planes_are_those_of_the_room(scene):
    (floor,), walls = fit_planes(scene)
    assert np.abs(floor.center - [0, 0, 0]).max() < 0.25 and abs(floor.center[2]) < 1e-3
    assert abs(np.sin(2 * floor.yaw)) < np.sin(np.radians(2))  # along the walls, either way
    assert sorted(floor.extent[:2])[0] > 4.4 and sorted(floor.extent[:2])[1] > 5.4 and floor.extent[:2].prod() < 30.1
    sides = {}
    for wall in walls:
        assert abs(np.linalg.norm(wall.rotation[:, 0]) - 1) < 1e-9 and wall.rotation[:, 0] @ wall.center < 0  # inwards
        axis = int(np.argmax(np.abs(wall.rotation[:, 0])))
        assert np.abs(wall.rotation[axis, 0]) > np.cos(np.radians(1))
        sides[axis, wall.center[axis] > 0] = wall
        assert abs(wall.center[axis]) == pytest.approx((3, 2.5)[axis], abs=0.01)
        assert wall.center[2] - wall.extent[2] / 2 == pytest.approx(0, abs=0.01) and 1.2 < wall.extent[2] < 2.51
        assert wall.extent[1] < (5, 6)[axis] + 0.01
    assert len(sides) == len(walls) == 4


def test_furniture_is_no_wall(scene):
    """With the boxes unknown, the front of the cabinet is a wall as good as any; with them it is none."""
    walls = fit_planes(replace(scene, boxes=[]))[1]
    fronts = [wall for wall in walls if abs(wall.center[0] + 2.45) < 0.02 and abs(wall.rotation[0, 0]) > 0.99]
    assert len(fronts) == 1
    assert not any(points_in_box(wall.center[None], item, 0.03).any() for wall in fit_planes(scene)[1]
                   for item in FURNITURE)  # fmt: skip


def test_fit_finds_the_planes_of_rendered_rooms(rooms_root):
    """Against the plan that the room was built from, in a world turned about z: no false wall, most walls."""
    found = total = 0
    for scene_dir in find_scenes(rooms_root)[:6]:
        scene = read_scene(scene_dir)
        (true_floor,), true_walls = room_planes(scene)
        (floor,), walls = fit_planes(replace(scene, surfaces=[]))
        assert abs(floor.center[2] - true_floor.center[2]) < 0.005
        assert abs(np.sin(2 * (floor.yaw - true_floor.yaw))) < np.sin(np.radians(4))
        matched = set()
        for wall in walls:
            fits = [
                index
                for index, true in enumerate(true_walls)
                if true.rotation[:, 0] @ wall.rotation[:, 0] > np.cos(np.radians(5))
                and abs((wall.center - true.center) @ true.rotation[:, 0]) < 0.1
                and abs((wall.center - true.center) @ true.rotation[:, 1]) < true.extent[1] / 2
            ]
            assert fits, (scene_dir.name, wall)
            matched.update(fits)
        found, total = found + len(matched), total + len(true_walls)
    assert found > 0.75 * total


def test_same_seed_same_planes(scene):
    one, two = fit_planes(scene, 3), fit_planes(scene, 3)
    for a, b in zip([*one[0], *one[1]], [*two[0], *two[1]], strict=True):
        assert np.array_equal(a.center, b.center) and np.array_equal(a.extent, b.extent)


def test_scene_without_depth_has_no_fitted_planes(tmp_path):
    assert fit_planes(read_scene(write_scene(tmp_path, FURNITURE, depth=False))) == ([], [])


def test_table_top_is_the_upper_face():
    top = table_top(FURNITURE[1])
    assert np.allclose(top.center, [-0.6, -0.3, 0.75]) and np.allclose(top.extent, [1.2, 0.8, 0.01])
    lying = OrientedBox(
        [0, 0, 0.4], [0.75, 1.2, 0.8], FURNITURE[1].rotation @ np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0.0]])
    )
    assert np.allclose(table_top(lying).extent, [1.2, 0.8, 0.01]) and table_top(lying).center[2] == pytest.approx(0.775)


@pytest.mark.parametrize("fitted", [True, False])
def test_plane_samples(scene, rooms_root, fitted):
    """Each action stands for the box of its record, seen in the views; the words name it alone."""
    scenes = [scene] if fitted else [read_scene(path) for path in find_scenes(rooms_root)[:4]]
    for scene in scenes:
        views = select_views(scene, 6)
        visible = visible_boxes(scene, views)
        samples = build_planes(scene, views, visible)
        assert samples == build_planes(scene, views, visible)
        assert len({sample["instruction"] for sample in samples}) == len(samples)
        kinds = [sample["boxes"][0]["label"] for sample in samples]
        assert kinds.count("floor") == 1 and (not fitted or kinds == ["floor", "table", *["wall"] * (len(kinds) - 2)])
        for sample in samples:
            data, (target,) = json.loads(sample["action_json"]), map(box_from_record, sample["boxes"])
            assert list(data)[:5] == ["action", "scene", "center", "normal", "extent"] and "category" not in data
            action = parse_action(sample["action_json"])
            true = replace(target, extent=np.maximum(target.extent, 0.1))  # thin boxes overlap by chance
            ours = replace(action.to_box(), extent=np.maximum(action.extent, 0.1))
            assert box_iou_3d(ours, true) > 0.97
            words = sample["instruction"].casefold()
            if target.label == "wall":
                assert data["normal"][2] == 0 and data["extent"][0] == 0.01 and "wall" in words
                inside = np.mean([view.camera_to_world[:3, 3] for view in scene.views], axis=0)
                assert np.dot(data["normal"], inside - target.center) > 0
            else:
                assert data["normal"] == [0, 0, 1] and data["extent"][2] == 0.01 and type(data["yaw"]) is int
                assert target.label in words


def test_walls_are_named_by_what_stands_at_them(scene):
    samples = build_planes(scene, scene.views, np.ones(3, dtype=bool))
    walls = {
        sample["instruction"]: sample["boxes"][0]["center"] for sample in samples if "wall" in sample["instruction"]
    }
    (cabinet,) = [center for words, center in walls.items() if "cabinet" in words]
    assert cabinet[0] == pytest.approx(-3, abs=0.01)
    assert not any("bed" in words or "table" in words for words in walls)  # in a corner; far from all walls
    hidden = build_planes(scene, scene.views, np.zeros(3, dtype=bool))
    assert [sample["object_ids"] for sample in hidden] == [["floor"]]


def test_planes_out_of_sight_get_no_sample(scene):
    """Views of one corner from close by: the floor lies below them."""
    up = [look_at(np.array([2.0, -1.5, 1.6]), np.array([3.0, -2.5, 2.2]))]
    views = [replace(scene.views[0], camera_to_world=up[0])]
    depth = ray_depth(FURNITURE, up[0], CAMERA, SIZE)
    object.__setattr__(views[0], "load_depth", lambda: depth)
    assert build_planes(scene, views, np.zeros(3, dtype=bool)) == []
