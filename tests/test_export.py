"""Rooms on their way to other programs and back: what comes out is what went in, and what does not is said."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from roomplan_lib.actions import (
    ActionList,
    Move,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    Remove,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.actions.rooms import plan_scene, room_actions
from roomplan_lib.actions.scripts import (
    lower_corner,
    read_scenescript,
    read_spatiallm,
    write_scenescript,
    write_spatiallm,
)
from roomplan_lib.cli import app
from roomplan_lib.export import FORMATS, export_room, load_room
from roomplan_lib.export.meshes import room_parts, trapezoids
from roomplan_lib.files import write_whole
from roomplan_lib.geometry import OrientedBox, box_corners, box_iou_3d, rotation_z
from roomplan_lib.scenes import Scene, Surface
from roomplan_lib.scenes.arkitscenes import find_scenes, read_scene
from roomplan_lib.scenes.roomplan import captured_room, read_captured_room, write_captured_room
from roomplan_lib.viz.floorplan import floor_plan_figure, save_floor_plan

REAL = Path(__file__).parents[2] / "shared" / "data" / "roomplan" / "single.json"
ROOM = PlanRoom(
    (
        PlaceWall((0.0, 0.0), (4.0, 0.0), 0.1, 2.5),
        PlaceWall((4.0, 0.0), (4.0, 3.0), 0.1, 2.5),
        PlaceWall((4.0, 3.0), (0.0, 3.0), 0.1, 2.5),
        PlaceWall((0.0, 3.0), (0.0, 0.0), 0.1, 2.5),
        PlaceDoor(0, (1.0, 0.0, 1.1), 0.9, 2.0),
        PlaceWindow(1, (4.0, 1.5, 1.6), 1.2, 1.0),
        PlaceOpening(2, (2.0, 3.0, 1.1), 1.0, 2.0),
        PlaceAnchor("sofa", (2.0, 2.4, 0.5), (1.0, 0.0, 0.0), (2.0, 0.9, 0.8)),
        PlaceAnchor("stool", (1.0, 1.0, 0.3), (0.6, 0.8, 0.0), (0.4, 0.3, 0.4)),
        PlaceAnchor("shelf", (3.8, 0.5, 1.0), (0.0, 1.0, 0.0), (0.8, 0.3, 1.8)),
    ),
    scene="flat",
)


@pytest.fixture(scope="module")
def scan():
    if not REAL.is_file():
        pytest.skip("the real RoomPlan scan lies in the shared data folder")
    return read_captured_room(REAL)


def assert_same(a, b, tolerance=1e-6):
    """Two actions agree in kind and text exactly, in numbers to a tolerance."""
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "actions":
            assert len(x) == len(y)
            for pair in zip(x, y, strict=True):
                assert_same(*pair, tolerance)
        elif isinstance(x, (float, tuple)):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance, err_msg=field.name)
        else:
            assert x == y, field.name


def through_captured_room(plan, folder):
    write_captured_room(plan_scene(plan), folder / f"{plan.scene}.json")
    return room_actions(read_captured_room(folder / f"{plan.scene}.json"))


# Actions and scenes ---------------------------------------------------------------------------------------------------


def test_real_scan_to_actions_to_captured_room_is_the_identity(scan, tmp_path):
    notes = []
    plan = room_actions(scan, notes)
    assert [a.verb for a in plan.actions] == ["place_wall"] * 4 + ["place_door"] * 2 + ["place_window"] * 2 + [
        "place_anchor"
    ] * 5
    assert [a.wall for a in plan.actions[4:8]] == [3, 3, 0, 1]
    again = through_captured_room(plan, tmp_path)
    assert_same(plan, again)
    assert_same(plan, again, tolerance=1e-9)
    for anchor, box in zip(plan.actions[8:], scan.boxes, strict=True):
        assert box_iou_3d(anchor.to_box(), box) > 1 - 1e-5
    for told in ("isOpen", "coreModel", "attributes", "floors", "half or quarter turns", "names of 13"):
        assert any(told in note for note in notes), told
    assert not any("tilted" in note or "thickness" in note for note in notes)


def test_shelf_and_stool_keep_their_names(tmp_path):
    assert_same(through_captured_room(ROOM, tmp_path), ROOM)
    data = json.loads((tmp_path / "flat.json").read_text())
    assert [list(entry["category"])[0] for entry in data["objects"]] == ["sofa", "chair", "storage"]
    assert {"version", "story", "sections", "referenceOriginTransform", "walls", "doors", "windows", "openings",
            "objects", "floors"} == set(data)  # fmt: skip
    ids = [e["identifier"] for key in ("walls", "doors", "windows", "openings", "objects", "floors") for e in data[key]]
    assert len(set(ids)) == 11 and all(len(i) == 36 and i == i.upper() for i in ids)
    assert data["doors"][0]["parentIdentifier"] == data["walls"][0]["identifier"]
    wall = data["walls"][1]  # along +y of the actions is along -z of the file
    np.testing.assert_allclose(wall["transform"], [0, 0, -1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 4, 1.35, -1.5, 1], atol=1e-12)
    assert wall["dimensions"] == [3, 2.5, 0]
    first = (tmp_path / "flat.json").read_bytes()
    through_captured_room(ROOM, tmp_path)
    assert (tmp_path / "flat.json").read_bytes() == first


def test_random_plans_survive(tmp_path):
    rng = np.random.default_rng(3)
    for index in range(30):
        walls = [
            PlaceWall(tuple(rng.uniform(-9, 9, 2)), tuple(rng.uniform(-9, 9, 2)), rng.uniform(-2, 2), rng.uniform(2, 3))
            for _ in range(rng.integers(1, 6))
        ]
        doors = [
            verb(int(rng.integers(len(walls))), tuple(rng.uniform(-9, 9, 3)), rng.uniform(0.5, 2), rng.uniform(0.5, 2))
            for verb in (PlaceDoor, PlaceWindow, PlaceOpening)
        ]
        anchors = []
        for label in rng.choice(["cabinet", "shelf", "stool", "chair", "tv_monitor", "washer", "bed"], 5):
            yaw = rng.uniform(0, np.pi)
            normal = (math.cos(yaw), math.sin(yaw), 0.0)
            extent = tuple(rng.uniform(0.1, 1) + np.array([0.0, 0.3, 0.6]))
            anchors.append(PlaceAnchor(str(label), tuple(rng.uniform(-9, 9, 3)), normal, extent))
        plan = PlanRoom((*walls, *doors, *anchors), scene=f"r{index}")
        assert_same(through_captured_room(plan, tmp_path), plan, 1e-9)


def test_the_floor_follows_the_walls():
    (floor,) = [s for s in plan_scene(ROOM).surfaces if s.kind == "floor"]
    np.testing.assert_allclose(sorted(map(tuple, floor.polygon)), [[0, 0, 0.1], [0, 3, 0.1], [4, 0, 0.1], [4, 3, 0.1]])
    np.testing.assert_allclose(sorted(floor.box.extent), [0, 3, 4], atol=1e-12)
    gap = PlanRoom(ROOM.actions[:3])
    assert not [s for s in plan_scene(gap).surfaces if s.kind == "floor"]


def test_what_actions_cannot_hold_is_said():
    upright, tilted = np.eye(3), np.array([[0.8, 0.6, 0], [-0.36, 0.48, 0.8], [0.48, -0.64, 0.6]])
    wall = Surface("wall", OrientedBox([0, 0, 1], [4, 0.2, 2], upright, "wall", "w"), polygon=np.eye(3))
    lost = Surface("door", OrientedBox([1, 0.5, 1], [1, 0, 2], upright, "door", "d"), parent_id="gone")
    boxes = [
        OrientedBox([0, 0, 0], [1, 2, 3], tilted, "table", "t"),
        OrientedBox([0, 0, 0], [1, 2, 3], upright[:, [2, 0, 1]], "office chair", "c"),  # lies on its side
        OrientedBox([0, 0, 0], [1, 2, 0.001], upright, "table", "thin"),
    ]
    scene = Scene(
        "s", [], boxes, "scannet", surfaces=[wall, lost], attributes={"t": {"nyu": "desk"}}, colors={"t": "red"}
    )
    notes = []
    plan = room_actions(scene, notes)
    told = "\n".join(notes)
    for words in (
        "outline of 3 corners", "thickness of 1", "names no wall of the scene, put into the nearest, wall 0", "tilted",
        "office_chair", "1 boxes made thicker", "nyu of boxes", "colours left out",
    ):  # fmt: skip
        assert words in told, words
    table, chair, _ = (a.to_box() for a in plan.actions[2:])
    assert (np.abs((box_corners(boxes[0]) - table.center) @ table.rotation) <= table.extent / 2 + 1e-9).all()
    assert box_iou_3d(chair, boxes[1]) == pytest.approx(1)
    no_wall = []
    assert room_actions(dataclasses.replace(scene, surfaces=[lost], boxes=[]), no_wall).actions == ()
    assert "door d left out: the scene has no wall" in no_wall


def test_what_a_scene_cannot_hold_is_said(tmp_path):
    actions = ActionList(
        (
            PlaceDoor(3, (0, 0, 1), 1, 2),
            Move(0, (1, 1, 1)),
            PlaceAnchor("lamp", (0.0, 0.0, 1.0), (0.0, 0.0, 1.0), (0.3, 0.3, 0.3), scene="x", confidence=0.9),
            PlaceAnchor("sofa", (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (2.0, 0.9, 0.3), confidence=0.4),
        )
    )
    notes = []
    scene = plan_scene(actions, notes)
    assert scene.scene_id == "x" and len(scene.boxes) == 2 and scene.surfaces == []
    data = captured_room(scene, notes)
    assert [e["confidence"] for e in data["objects"]] == [{"medium": {}}]
    told = "\n".join(notes)
    for words in ("names wall 3, there are 0", "move left out", "made level", "'lamp'", "low, medium or high"):
        assert words in told, words
    with pytest.raises(ValueError, match="none left out: it places nothing"):
        export_room(NoAction("ambiguous"), "capturedroom", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


# Scripts of SpatialLM and SceneScript -----------------------------------------------------------------------------


def test_spatiallm_in_metres_by_hand_and_back():
    text = (
        "wall_0=Wall(0.0,0.0,0.1,4.0,0.0,0.1,2.5,0.0)\nwall_1=Wall(4,0,.1,4,3,1e-1,2.5,0)\n"
        "door_0=Door(wall_1,4.0,1.5,1.1,0.9,2.0)\nwindow_0=Window(wall_0,2,0,1.5,1.2,1)\n"
        "bbox_0=Bbox(coffee table,1.0,1.0,0.25,1.5707963267948966,0.8,0.6,0.5)\n"
    )
    notes = []
    plan = read_spatiallm(text, notes)
    expected = PlanRoom(
        (
            PlaceWall((0.0, 0.0), (4.0, 0.0), 0.1, 2.5),
            PlaceWall((4.0, 0.0), (4.0, 3.0), 0.1, 2.5),
            PlaceDoor(1, (4.0, 1.5, 1.1), 0.9, 2.0),
            PlaceWindow(0, (2.0, 0.0, 1.5), 1.2, 1.0),
            PlaceAnchor("coffee_table", (1.0, 1.0, 0.25), (0.0, 1.0, 0.0), (0.8, 0.6, 0.5)),
        )
    )
    assert_same(plan, expected)
    assert notes == ["line 5: class 'coffee table' written as 'coffee_table'"]
    assert_same(read_spatiallm(write_spatiallm(plan)), plan, 1e-12)
    assert write_spatiallm(plan).splitlines()[2] == "door_0=Door(wall_1,4.0,1.5,1.1,0.9,2.0)"


def test_spatiallm_in_bins_as_its_code_has_them():
    # floor((v - low) / (high - low) * 1280): 32 m for positions, 25.6 m for sizes, 20 m for scales, 4 pi for angles.
    plan = PlanRoom(
        (
            PlaceWall((-1.0, -2.0), (3.01, -2.0), -0.5, 2.51),
            PlaceDoor(0, (1.0, -2.0, 0.52), 0.9, 2.03),
            PlaceAnchor("bed", (0.5, 0.5, 0.0), (math.cos(0.5), math.sin(0.5), 0.0), (2.01, 1.6, 0.53)),
        )
    )
    offset = lower_corner(plan)
    np.testing.assert_allclose(offset, [-1, -2, -0.5])
    notes = []
    text = write_spatiallm(plan, notes, quantised=True, offset=offset)
    assert text == (
        "wall_0=Wall(0,0,0,160,0,0,125,0)\ndoor_0=Door(wall_0,80,0,40,45,101)\nbbox_0=Bbox(bed,60,100,20,690,128,102,33)\n"
    )
    assert notes == []
    back = read_spatiallm(text, quantised=True, offset=offset)
    steps = {"PlaceWall": 0.025, "PlaceDoor": 0.025, "PlaceAnchor": 0.025}
    for a, b in zip(plan.actions, back.actions, strict=True):
        assert_same(a, b, steps[type(a).__name__] + 1e-9)
    assert write_spatiallm(back, quantised=True, offset=offset) == text  # a fixed point
    (wall,) = read_spatiallm("wall_0=Wall(64,0,0,640,0,0,64,0)", quantised=True, bins=640).actions
    assert_same(wall, PlaceWall((3.2, 0.0), (32.0, 0.0), 0.0, 2.56))
    write_spatiallm(PlanRoom((PlaceWall((-1.0, 0.0), (40.0, 0.0), 0.0, 30.0),)), notes, quantised=True)
    assert len(notes) == 3 and "wall_0.b_x: 40.00 clipped, the bins span 0.00 to 32.00" in notes


def test_scenescript_by_hand_and_back():
    text = (
        "make_wall, id=0, a_x=0.0, a_y=0.0, a_z=0.1, b_x=4.0, b_y=0.0, b_z=0.1, height=2.5, thickness=0.0\n"
        "make_wall, id=7, a_x=4.0, a_y=0.0, a_z=0.1, b_x=4.0, b_y=3.0, b_z=0.1, height=2.5\n"
        "make_door, id=1000, wall0_id=7, wall1_id=7, position_x=4, position_y=1.5, position_z=1.1, width=.9, height=2\n"
        "make_bbox, id=3000, class=bed, position_x=1, position_y=1, position_z=0.25, angle_z=0, "
        "scale_x=2, scale_y=1.6, scale_z=0.5\n"
    )
    notes = []
    plan = read_scenescript(text, notes)
    assert notes == []
    assert plan.actions[2] == PlaceDoor(1, (4.0, 1.5, 1.1), 0.9, 2.0)
    assert plan.actions[3] == PlaceAnchor("bed", (1.0, 1.0, 0.25), (1.0, 0.0, 0.0), (2.0, 1.6, 0.5))
    written = write_scenescript(plan)
    assert written.splitlines()[0] == text.splitlines()[0]
    assert "make_door, id=1000, wall0_id=1, wall1_id=1, position_x=4.0" in written
    assert_same(read_scenescript(written), plan, 1e-12)


def test_scripts_hold_rooms_and_say_what_not(scan):
    for write, read in ((write_spatiallm, read_spatiallm), (write_scenescript, read_scenescript)):
        plan, notes = room_actions(scan), []
        assert_same(read(write(plan, notes), notes), dataclasses.replace(plan, scene=""), 1e-9)
        assert notes == []
        write(ActionList((PlaceOpening(0, (0, 0, 0), 1, 1), *plan.actions[:1], PlaceDoor(4, (0, 0, 1), 1, 2))), notes)
        assert notes == [
            "place_opening left out: the language has no such entity",
            "place_door left out: names wall 4, there are 1",
        ]


@pytest.mark.parametrize(
    "line, told",
    [
        ("import os", "no entity"),
        ("wall_0=Wall(1,2,3)", "no entity"),
        ("wall_0=Door(wall_0,1,2,3,1,2)", "no entity"),
        ("wall_0=Wall(__import__('os'),0,0,4,0,0,2.5,0)", "no number"),
        ("wall_0=Wall(nan,0,0,4,0,0,2.5,0)", "no number"),
        ("wall_0=Wall(1e999,0,0,4,0,0,2.5,0)", "no number"),
        ("wall_0=Wall(١,0,0,4,0,0,2.5,0)", "no number"),
        ("wall_0=Wall(1,1,0,1,1,0,2.5,0)", "no length or no height"),
        ("door_0=Door(wall_9,1,2,3,1,2)", "'wall_9', which is not there"),
        ("bbox_0=Bbox(bed,1,2,3,0,1,0,1)", "scale of 0 or less"),
        ("bbox_0=Bbox(,1,2,3,0,1,1,1)", "class is no name"),
    ],
)
def test_bad_lines_are_said_not_dropped(line, told):
    notes = []
    plan = read_spatiallm(f"<|layout_s|>{line}\n\nbbox_3=Bbox(bed,1,2,3,0,1,1,1)<|layout_e|>", notes)
    assert len(plan.actions) == 1 and len(notes) == 1 and told in notes[0] and notes[0].startswith("line 2")


def test_scripts_bend_what_they_must_and_say_so():
    notes = []
    assert read_spatiallm("wall_0=Wall(0,0,0,4,0,0,2.5,0)\n" + "y" * 2**20, notes).actions == ()
    assert notes == [f"left out: a script of {2**20 + 31} characters, more than {2**20}"]
    notes.clear()
    read_spatiallm("wall_0=Wall(0,0,0,4,0,1,2.5,0.2)\nwall_0=Wall(0,0,0,0,4,0,2.5,0)", notes)
    assert [note.split(": ")[1].split(" ")[0] for note in notes] == ["wall_0", "thickness", "wall_0"]
    notes.clear()
    read_scenescript("make_door, id=1, wall0_id=0, wall1_id=1, width=1\nmake_lamp, id=3\nmake_wall, id=0, a_x=1", notes)
    assert "lies in walls 0 and 1" in notes[0] and "no position_x" in notes[1]
    assert "no command" in notes[2] and "no a_y" in notes[3]


# Meshes, USDZ, GLB --------------------------------------------------------------------------------------------------


def mesh_area(part) -> float:
    corners = part.vertices[part.quads]
    fan = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return float(np.linalg.norm(fan, axis=1).sum() / 2 + np.linalg.norm(
        np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 0]), axis=1).sum() / 2)  # fmt: skip


def test_trapezoids_fill_a_polygon_less_its_holes():
    from shapely import Polygon, box, union_all

    rng = np.random.default_rng(1)
    for _ in range(200):
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 9)))
        if np.diff([*angles, angles[0] + 2 * np.pi]).max() > 3:
            continue
        ring = np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(1, 3, (len(angles), 1))
        holes = [box(*(c := rng.uniform(-2, 2, 2)), *(c + rng.uniform(0.1, 1, 2))) for _ in range(rng.integers(0, 4))]
        quads = trapezoids(ring, [np.array(h.exterior.coords)[:-1] for h in holes])
        expected = Polygon(ring) - union_all(holes)
        pieces = [Polygon(q) for q in quads]
        assert sum(p.area for p in pieces) == pytest.approx(expected.area, abs=1e-6)  # no piece overlaps another
        assert union_all([p.buffer(1e-9) for p in pieces]).symmetric_difference(expected).area < 1e-5
        x, y = np.moveaxis(quads, -1, 0)
        assert ((x * np.roll(y, -1, axis=1) - np.roll(x, -1, axis=1) * y).sum(axis=1) > 0).all()  # counter-clockwise


def test_walls_have_holes_and_thickness():
    parts = {part.name: part for part in room_parts(plan_scene(ROOM))}
    assert list(parts)[:5] == ["Wall_0", "Wall_1", "Wall_2", "Wall_3", "Door_0"]
    assert mesh_area(parts["Wall_0"]) == pytest.approx(4 * 2.5 - 0.9 * 2)
    assert mesh_area(parts["Wall_1"]) == pytest.approx(3 * 2.5 - 1.2)
    assert mesh_area(parts["Floor_0"]) == pytest.approx(12)
    assert mesh_area(parts["Sofa_0"]) == pytest.approx(2 * (2 * 0.9 + 2 * 0.8 + 0.9 * 0.8))
    thick = Surface("wall", OrientedBox([0, 0, 1], [4, 0.2, 2], np.eye(3), "wall", "w"))
    hole = Surface("window", OrientedBox([0.5, 0, 1], [1, 0, 0.5], np.eye(3), "window", "v"), parent_id="w")
    wall = room_parts(Scene("s", [], [], "x", surfaces=[thick, hole]))[0]
    assert mesh_area(wall) == pytest.approx(2 * (8 - 0.5) + 0.2 * (2 * 6 + 2 * 1.5))
    with pytest.raises(ValueError, match="nothing to export"):
        room_parts(Scene("s", [], [], "x"))


def y_up_bounds(scene) -> np.ndarray:
    """[2, 3] from the boxes and polygons alone, in the file's frame."""
    corners = [box_corners(b) for b in scene.boxes]
    corners += [box_corners(s.box) if s.polygon is None else s.polygon for s in scene.surfaces]
    points = np.concatenate(corners)[:, [0, 2, 1]] * [1, 1, -1]
    return np.stack([points.min(axis=0), points.max(axis=0)])


@pytest.fixture(scope="module", params=["scan", "plan"])
def room(request):
    return request.getfixturevalue("scan") if request.param == "scan" else plan_scene(ROOM)


def test_usdz_is_valid_and_to_scale(room, tmp_path):
    pytest.importorskip("pxr")
    from pxr import Usd, UsdGeom, UsdShade, UsdValidation

    export_room(room, "usdz", tmp_path / "room.usdz")
    stage = Usd.Stage.Open(str(tmp_path / "room.usdz"))
    validators = UsdValidation.ValidationRegistry().GetOrLoadAllValidators()
    assert len(validators) >= 20
    assert [str(e.GetMessage()) for e in UsdValidation.ValidationContext(validators).Validate(stage)] == []
    assert UsdGeom.GetStageUpAxis(stage) == "Y" and UsdGeom.GetStageMetersPerUnit(stage) == 1
    bound = UsdGeom.BBoxCache(Usd.TimeCode.Default(), ["default"]).ComputeWorldBound(stage.GetDefaultPrim())
    extremes = bound.ComputeAlignedRange()
    np.testing.assert_allclose([extremes.GetMin(), extremes.GetMax()], y_up_bounds(room), atol=1e-5)
    sofa = next(b for b in room.boxes if b.label == "sofa")
    prim = stage.GetPrimAtPath("/Room/Objects/Sofa_0")
    assert prim.GetCustomDataByKey("roomplan:category") == "sofa"
    matrix = np.array(UsdGeom.Xformable(prim).GetLocalTransformation()).T  # USD multiplies rows
    np.testing.assert_allclose(matrix[:3, 3], sofa.center[[0, 2, 1]] * [1, 1, -1], atol=1e-12)
    assert np.arctan2(-matrix[2, 0], matrix[0, 0]) == pytest.approx(sofa.yaw, abs=1e-9)
    color = UsdShade.MaterialBindingAPI(prim).ComputeBoundMaterial()[0]
    assert color.GetPath() == "/Room/Materials/Objects"


def test_glb_reloads_with_equal_bounds(room, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    export_room(room, "glb", tmp_path / "room.glb")
    loaded = trimesh.load_scene(tmp_path / "room.glb")
    np.testing.assert_allclose(loaded.bounds, y_up_bounds(room), atol=1e-6)
    parts = room_parts(room)
    assert sorted(loaded.graph.nodes_geometry) == sorted(part.name for part in parts)
    assert {g.metadata["category"] for g in loaded.geometry.values()} == {part.category for part in parts}
    for part in parts:
        transform, name = loaded.graph[part.name]
        mesh = loaded.geometry[name]
        assert mesh.area == pytest.approx(mesh_area(part), rel=1e-5)
        if part.group == "Objects":
            merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
            assert merged.volume == pytest.approx(part.box.volume, rel=1e-5)  # positive: faces look outwards
            np.testing.assert_allclose(np.linalg.det(transform[:3, :3]), 1, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_room_gives_the_same_bytes(format, tmp_path, monkeypatch):
    pytest.importorskip("pxr")
    first, second = tmp_path / "a", tmp_path / "b"
    export_room(ROOM, format, first)
    code = (
        "import sys, time; from roomplan_lib.export import export_room; sys.path.insert(0, 'tests');"
        f"from test_export import ROOM; export_room(ROOM, {format!r}, {str(second)!r})"
    )
    if format in ("usdz", "glb", "svg"):  # another process, another second, another hash seed
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
    else:
        export_room(ROOM, format, second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_missing_packages_are_named(tmp_path, monkeypatch):
    for module, format in (("pxr", "usdz"), ("trimesh", "glb")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=r"pip install 'roomplan_lib\[export\]'"):
            export_room(ROOM, format, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# The floor plan -----------------------------------------------------------------------------------------------------


def test_floor_plan_is_to_scale_and_labelled(tmp_path):
    scene = plan_scene(ROOM)
    figure = floor_plan_figure(scene)
    (ax,) = figure.axes
    texts = [t.get_text() for t in ax.texts]
    for words in ("4.00 m", "3.00 m", "sofa 0°", "stool 53°", "shelf 90°", "1 m", "x", "y"):
        assert words in texts
    assert "floor 12.0 m²" in figure._suptitle.get_text() and "2.50 m high" in figure._suptitle.get_text()
    assert ax.get_aspect() == 1
    outlines = [p.get_xy()[:4] for p in ax.patches if hasattr(p, "get_xy") and len(np.atleast_2d(p.get_xy())) == 5]
    stool = box_corners(scene.boxes[1])[[1, 5, 7, 3], :2]
    assert any(np.allclose(o, stool, atol=1e-9) for o in outlines)
    black = [o for o in outlines if np.allclose(o[:, 1].mean(), 0, atol=1e-9)]  # wall 0 but for the door
    assert sorted(o[:, 0].min() for o in black) == pytest.approx([-0.04, 1.45])
    assert sorted(o[:, 0].max() for o in black) == pytest.approx([0.55, 4.04])


def test_floor_plan_turns_the_room_straight(scan, tmp_path):
    figure = floor_plan_figure(scan)
    walls = [p.get_xy() for p in figure.axes[0].patches if p.get_zorder() == 2]
    for corners in walls:
        edges = np.abs(np.diff(corners, axis=0))
        assert (edges.min(axis=1) < 1e-5).all()
    save_floor_plan(scan, tmp_path / "plan.svg", "svg")
    svg = ElementTree.parse(tmp_path / "plan.svg").getroot()
    texts = {"".join(node.itertext()).strip() for node in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"sofa 43°", "cabinet 133°", "3.33 m", "4.62 m"} <= texts
    save_floor_plan(scan, tmp_path / "plan.png")
    picture = np.asarray(Image.open(tmp_path / "plan.png").convert("L"))
    assert picture.shape[0] > 600 and (picture < 80).mean() > 0.01


def test_labels_of_a_floor_plan_do_not_cover_each_other(rooms_root):
    for folder in find_scenes(rooms_root)[:4]:
        figure = floor_plan_figure(read_scene(folder))
        figure.canvas.draw()
        boxes = [t.get_window_extent() for t in figure.axes[0].texts if " " in t.get_text()]
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.9).overlaps(b)]
        assert not overlaps, folder.name


# The command --------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_export_from_every_kind_of_room(rooms_root, tmp_path):
    write_captured_room(plan_scene(ROOM), tmp_path / "room.json")
    (tmp_path / "plan.json").write_text(format_action(canonical(ROOM)))
    (tmp_path / "anchors.json").write_text(format_action(ActionList(ROOM.actions[7:])))
    (tmp_path / "spatiallm.txt").write_text(write_spatiallm(ROOM))
    (tmp_path / "scenescript.txt").write_text(write_scenescript(ROOM))
    row = {"scene_id": "flat", "prediction": format_action(ROOM.actions[7])}
    (tmp_path / "predictions.jsonl").write_text("{}\n" + json.dumps(row) + "\n")
    folder = find_scenes(rooms_root)[0]
    for source, options, num_boxes in (
        (tmp_path / "room.json", (), 3), (tmp_path / "plan.json", (), 3), (tmp_path / "anchors.json", (), 3),
        (tmp_path / "spatiallm.txt", (), 3), (tmp_path / "scenescript.txt", (), 3),
        (tmp_path / "predictions.jsonl", ("--index", 1), 1), (folder, (), len(read_scene(folder).boxes)),
    ):  # fmt: skip
        output = tmp_path / "out" / f"{source.stem}.json"
        result = run(source, "--format", "capturedroom", "--output", output, *options)
        assert result.exit_code == 0, result.output
        assert len(read_captured_room(output).boxes) == num_boxes
    assert "note: " in result.stderr and result.stdout.strip() == str(output)
    walls = read_captured_room(output).surfaces
    assert {"wall", "door", "floor"} <= {s.kind for s in walls}


def test_export_in_every_format(tmp_path):
    pytest.importorskip("pxr")
    (tmp_path / "plan.json").write_text(format_action(ROOM))
    for format in FORMATS:
        output = tmp_path / f"room.{format}"
        result = run(tmp_path / "plan.json", "--format", format, "--output", output)
        assert result.exit_code == 0, result.output
        assert output.stat().st_size > 100
    assert parse_action((tmp_path / "room.actions").read_text()) == canonical(parse_action(format_action(ROOM)))
    notes = []
    back = load_room(tmp_path / "room.spatiallm-bins", notes)
    assert len(back.actions) == 9 and notes == ["all numbers are whole, so they are taken for bins of 1280"]
    assert back.actions[0].b == pytest.approx((4.0, 0.0), abs=0.025)
    assert len(load_room(tmp_path / "room.spatiallm", notes).actions) == 9 and len(notes) == 1


def test_export_refuses_in_one_line(tmp_path):
    (tmp_path / "bad.json").write_text('{"action": "fly"}')
    (tmp_path / "words.txt").write_text("hello\n")
    (tmp_path / "rows.jsonl").write_text('{"scene_id": 1}\n')
    (tmp_path / "half.json").write_text('{"walls": []}')
    (tmp_path / "script.txt").write_text("wall_0=Wall(1,2)\n")
    for name, options, told in (
        ("bad.json", (), "fly"), ("words.txt", (), "no CapturedRoom, no action text"),
        ("rows.jsonl", ("--index", 0), "needs prediction"), ("rows.jsonl", ("--index", 5), "no row 5"),
        ("rows.jsonl", (), "--index"), ("half.json", (), "`objects` is missing"), ("none.json", (), "missing"),
        ("script.txt", (), "no wall, door, window or box"),
    ):  # fmt: skip
        result = run(tmp_path / name, "--format", "glb", "--output", tmp_path / "out.glb", *options)
        assert result.exit_code == 1 and told in result.stderr and name in result.stderr, result.output
        assert result.stderr.startswith("roomplan export: ") and "Traceback" not in result.output
        assert not (tmp_path / "out.glb").exists()
    assert run(tmp_path / "bad.json", "--format", "obj", "--output", "x").exit_code == 2
    assert "CapturedRoom" in run("--help").output


def test_yaw_of_an_anchor_is_kept_in_every_format(tmp_path):
    """A box at 30 degrees stays at 30 degrees (axis-aligned readers would give an IoU of about 0.55)."""
    box = OrientedBox([1, 2, 0.5], [2.2, 0.9, 1.0], rotation_z(np.radians(30)), "bed", "b")
    scene = Scene("one", [], [box], "x")
    for format in ("capturedroom", "spatiallm", "scenescript", "actions"):
        path = tmp_path / ("room.json" if format in ("capturedroom", "actions") else "room.txt")
        export_room(scene, format, path)
        loaded = load_room(path)
        back = loaded.boxes[0] if isinstance(loaded, Scene) else loaded.actions[0].to_box()
        assert box_iou_3d(back, box) > (0.97 if format == "actions" else 1 - 1e-9), format


def test_a_prediction_is_read_in_the_codec_it_was_written_in(tmp_path):
    plan = PlanRoom((PlaceWall((0.0, 0.0), (4.0, 0.0), 0.0, 2.5),))
    rows = [{"scene_id": "s", "prediction": format_action(plan, codec), "codec": codec} for codec in ("cm", "m2")]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rooms = [load_room(tmp_path / "predictions.jsonl", index=index) for index in (0, 1)]
    assert rooms[0] == rooms[1] == plan.bound("s")
    (tmp_path / "plan.txt").write_text(format_action(plan, "cm"))
    assert load_room(tmp_path / "plan.txt", codec="cm") == plan
    result = run(tmp_path / "plan.txt", "--codec", "cm", "--format", "actions", "--output", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out").read_text() == format_action(plan) + "\n"
    (tmp_path / "predictions.jsonl").write_text(json.dumps(rows[0] | {"codec": "inch"}) + "\n")
    with pytest.raises(ValueError, match="predictions.jsonl: row 0: codec: expected one of m2, cm, rows, got 'inch'"):
        load_room(tmp_path / "predictions.jsonl", index=0)


def test_a_list_that_moves_and_removes_is_carried_out(tmp_path):
    chair = PlaceAnchor("chair", (1.0, 1.0, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5, 1.0))
    bed = PlaceAnchor("bed", (3.0, 1.0, 0.3), (1.0, 0.0, 0.0), (2.0, 1.5, 0.6))
    edits = ActionList((chair, bed, Move(0, (0.5, 1.0, 0.5)), Remove(1), Remove(7)))
    notes = export_room(edits, "actions", tmp_path / "room.txt")
    left = parse_action((tmp_path / "room.txt").read_text())
    assert [(a.category, a.center) for a in left.actions] == [("chair", (0.5, 1.0, 0.5))]
    assert any(note.startswith("action 4 not carried out") for note in notes)
    export_room(edits.bound("home"), "actions", tmp_path / "room.txt")
    assert parse_action((tmp_path / "room.txt").read_text()).scene == "home"
    export_room(edits, "spatiallm", tmp_path / "room.txt")
    assert [a.category for a in load_room(tmp_path / "room.txt").actions] == ["chair"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_anything_in_it_is_not_written(tmp_path, format):
    unnamed = PlaceAnchor("", (1.0, 1.0, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5, 1.0))
    rooms = [PlanRoom(()), NoAction("not_present"), ActionList((unnamed, Remove(0))), Scene("s", [], [], "x")]
    rooms += [unnamed] if format == "capturedroom" else []
    rooms += [PlaceOpening(0, (0.0, 0.0, 1.0), 1.0, 2.0)] if format != "actions" else []  # its wall is not there
    for nothing in rooms:
        with pytest.raises(ValueError, match="no room to write"):
            export_room(nothing, format, tmp_path / "room")
        assert list(tmp_path.iterdir()) == []
    if format == "capturedroom":  # with something beside it the rest is written and the anchor named
        notes = export_room(ActionList((unnamed, ROOM.actions[7])), format, tmp_path / "room.json")
        assert len(read_captured_room(tmp_path / "room.json").boxes) == 1
        assert any("anchor-0 left out" in note for note in notes)


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_whole(tmp_path / "pipe", "through")
    reader.join(timeout=10)
    assert read == ["through"] and (tmp_path / "pipe").is_fifo()
    with pytest.raises(ValueError, match="is a folder"):
        write_whole(tmp_path, "x")
    result = run(tmp_path / "target", "--format", "glb", "--output", "")
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/stdout").exists(), reason="the system has no /dev/stdout")
def test_a_pipe_is_written_through_the_link_that_leads_to_it():
    code = "from roomplan_lib.files import write_whole; write_whole('/dev/stdout', 'through')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"through"


def test_parts_without_a_face_are_named(tmp_path):
    pytest.importorskip("pxr")
    trimesh = pytest.importorskip("trimesh")
    whole = PlaceOpening(1, (4.0, 1.5, 1.35), 3.0, 2.5)  # all of wall 1
    point = PlaceWall((9.0, 9.0), (9.0, 9.0), 0.1, 2.5)
    plan = PlanRoom((*ROOM.actions[:4], point, whole))
    for format in ("glb", "usdz"):
        notes = export_room(plan, format, tmp_path / f"room.{format}")
        told = [note for note in notes if "no face" in note]
        assert [note.split()[0] for note in told] == ["Wall_1", "Wall_4"], notes
    nodes = set(trimesh.load_scene(tmp_path / "room.glb").graph.nodes_geometry)
    assert nodes == {"Wall_0", "Wall_2", "Wall_3", "Opening_0"}
    with pytest.raises(ValueError, match="nothing to export.*no face"):
        export_room(point, "glb", tmp_path / "none.glb")
    assert not (tmp_path / "none.glb").exists()


def test_files_are_known_by_what_they_hold(tmp_path):
    """With a byte order mark, another suffix, or other lines before the first that is a script's."""
    metres, steps = write_spatiallm(ROOM), write_spatiallm(ROOM, quantised=True)
    for text, num_items in (
        (metres, 9), (f"# a room, v1.5\n{metres}", 9), (f"lamp_0=Lamp(1)\n\n{metres}", 9),
        (f"<|layout_s|>\n{steps}<|layout_e|>", 9), (f"# v1.5\n{steps}", 9),
        (f"# a room\n{write_scenescript(ROOM)}", 9), (format_action(ROOM), 10),
    ):  # fmt: skip
        for suffix, encoding in ((".txt", "utf-8-sig"), (".json", "utf-8"), ("", "utf-8-sig")):
            path = tmp_path / f"room{suffix}"
            path.write_text(text, encoding=encoding)
            room = load_room(path)
            assert len(room.actions) == num_items
            assert room.actions[0].b == pytest.approx((4.0, 0.0), abs=0.025)
    write_captured_room(plan_scene(ROOM), tmp_path / "captured.json")
    data = (tmp_path / "captured.json").read_bytes()
    (tmp_path / "captured.txt").write_bytes(b"\xef\xbb\xbf" + data)
    assert len(load_room(tmp_path / "captured.txt").boxes) == 3
