"""Apple RoomPlan's files: a real scan keeps its invariants and all that it says; broken ones are refused in a line."""

import copy
import json
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from roomplan_lib.geometry import box_corners, rotation_z
from roomplan_lib.scenes import open_scene
from roomplan_lib.scenes.roomplan import (
    MAX_BYTES,
    captured_room,
    read_captured_room,
    read_captured_structure,
    write_captured_room,
    write_captured_structure,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "roomplan" / "single.json"
real = pytest.mark.skipif(not REAL.is_file(), reason="the real RoomPlan scan lies in the shared data folder")


def columns(yaw: float, center) -> list:
    """transform of the file's frame (y up), turned by `yaw` about y, written out: x, y, z axis and origin."""
    c, s = float(np.cos(yaw)), float(np.sin(yaw))
    return [c, 0, -s, 0, 0, 1, 0, 0, s, 0, c, 0, *center, 1]


@pytest.fixture
def room() -> dict:
    """A room with the fields of iOS 16: a wall along x at z = -2, a door in it, a washer turned by 30 degrees."""
    name = "00000000-0000-4000-8000-00000000000{}".format
    return {
        "walls": [
            {"identifier": name(1), "category": {"wall": {}}, "confidence": {"high": {}}, "dimensions": [4, 2.5, 0],
             "transform": columns(0, [1, 0.25, -2])}
        ],
        "doors": [
            {"identifier": name(2), "category": {"door": {"isOpen": True}}, "confidence": {"low": {}},
             "dimensions": [0.9, 2, 0], "transform": columns(np.pi, [0.5, 0, -2]), "parentIdentifier": name(1)}
        ],
        "windows": [],
        "openings": [],
        "objects": [
            {"identifier": name(3), "category": {"washerDryer": {}}, "confidence": {"medium": {}},
             "dimensions": [0.6, 0.85, 0.7], "transform": columns(np.radians(30), [2, -0.575, -1])}
        ],
    }  # fmt: skip


def read(data: object, folder: Path, name: str = "room.json"):
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_captured_room(path)


def in_frame(points: np.ndarray, box) -> np.ndarray:
    return (points - box.center) @ box.rotation


# The real scan ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan():
    if not REAL.is_file():
        pytest.skip("the real RoomPlan scan lies in the shared data folder")
    return read_captured_room(REAL)


def surfaces(scan, *kinds):
    return [s for s in scan.surfaces if s.kind in kinds]


def test_real_scan_says_what_is_in_its_file(scan):
    assert (scan.scene_id, scan.source, scan.views) == ("single", "roomplan", [])
    assert sorted(b.label for b in scan.boxes) == ["cabinet", "chair", "sofa", "table", "table"]
    kinds = [s.kind for s in scan.surfaces]
    assert [kinds.count(k) for k in ("wall", "door", "window", "opening", "floor")] == [4, 2, 2, 0, 1]
    chair = next(b for b in scan.boxes if b.label == "chair")
    table = next(b for b in scan.boxes if b.label == "table" and b.extent[0] > 1)
    told = scan.attributes[chair.object_id]
    assert told["parentIdentifier"] == table.object_id and told["confidence"] == "low" and told["story"] == 0
    assert told["attributes"]["ChairType"] == "swivel" and told["category"] == "chair"
    assert [s.attributes["isOpen"] for s in surfaces(scan, "door")] == [False, True]
    assert scan.metadata["version"] == 2 and scan.metadata["sections"][0]["label"] == "livingRoom"
    assert len(scan.metadata["referenceOriginTransform"]) == 16 and len(scan.metadata["coreModel"]) > 80_000


def test_real_scan_stands_upright_at_42_degrees(scan):
    for box in [s.box for s in scan.surfaces] + scan.boxes:
        assert np.abs(box.rotation.T @ box.rotation - np.eye(3)).max() < 1e-4
        assert np.linalg.det(box.rotation) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(box.rotation[:, 2], [0, 0, 1], atol=1e-5)
    sofa = next(b for b in scan.boxes if b.label == "sofa")
    assert np.degrees(sofa.yaw) == pytest.approx(42.74, abs=0.01)
    # RoomPlan: x to z of the transform's first column turn by minus the yaw about y.
    assert sofa.yaw == pytest.approx(np.arctan2(0.67870605, 0.73441005), abs=1e-7)
    np.testing.assert_allclose(sofa.center, [-0.16666663, 1.2816986, -0.53158647], atol=1e-12)
    np.testing.assert_allclose(sofa.extent, [1.8994142, 0.7896086, 0.9830544])  # width, depth, height


def test_real_doors_and_windows_lie_in_their_walls(scan):
    walls = {s.box.object_id: s.box for s in surfaces(scan, "wall")}
    for surface in surfaces(scan, "door", "window"):
        wall = walls[surface.parent_id]
        corners = in_frame(box_corners(surface.box), wall)
        assert np.abs(corners[:, 1]).max() < 1e-3
        assert (np.abs(corners[:, [0, 2]]) <= wall.extent[[0, 2]] / 2 + 1e-3).all()


def test_real_walls_meet_and_stand_on_the_floor(scan):
    (floor,) = surfaces(scan, "floor")
    ends = []
    for wall in surfaces(scan, "wall"):
        assert wall.box.center[2] - wall.box.extent[2] / 2 == pytest.approx(floor.box.center[2], abs=1e-6)
        half = wall.box.rotation[:2, 0] * wall.box.extent[0] / 2
        ends += [wall.box.center[:2] - half, wall.box.center[:2] + half]
    gaps = np.linalg.norm(np.array(ends)[:, None] - np.array(ends)[None], axis=-1) + 9 * np.eye(8)
    assert gaps.min(axis=1).max() < 1e-4


def test_real_objects_stand_within_the_floor(scan):
    from shapely import Point, Polygon

    (floor,) = surfaces(scan, "floor")
    outline = Polygon(floor.polygon[:, :2])
    assert outline.area == pytest.approx(15.37, abs=0.005)
    assert np.prod(floor.box.extent[:2]) == pytest.approx(15.68, abs=0.005)
    bottoms = {b.object_id: b.center[2] - b.extent[2] / 2 for b in scan.boxes}
    np.testing.assert_allclose(list(bottoms.values()), floor.box.center[2], atol=1e-5)
    assert all(outline.contains(Point(b.center[:2])) for b in scan.boxes)
    x, y, z = scan.metadata["sections"][0]["center"]  # in the file's frame
    assert outline.contains(Point(x, -z))


@real
def test_real_scan_is_written_back_as_it_was(tmp_path):
    notes = []
    write_captured_room(read_captured_room(REAL), tmp_path / "single.json", notes)
    assert json.loads((tmp_path / "single.json").read_text()) == json.loads(REAL.read_text()) and notes == []


# Both ways, on rooms written here -------------------------------------------------------------------------------------


def test_ios_16_room_in_numbers_worked_by_hand(room, tmp_path):
    scene = read(room, tmp_path)
    wall, door = scene.surfaces
    np.testing.assert_allclose(wall.box.center, [1, 2, 0.25])  # (x, y, z) -> (x, -z, y)
    np.testing.assert_allclose(wall.box.extent, [4, 0, 2.5])
    np.testing.assert_allclose(wall.box.rotation, np.eye(3))
    np.testing.assert_allclose(door.box.rotation, rotation_z(np.pi), atol=1e-12)
    assert door.parent_id == wall.box.object_id and door.attributes["isOpen"] is True
    (washer,) = scene.boxes
    assert washer.label == "washer" and scene.attributes[washer.object_id]["category"] == "washerDryer"
    np.testing.assert_allclose(washer.center, [2, 1, -0.575])
    np.testing.assert_allclose(washer.extent, [0.6, 0.7, 0.85])
    np.testing.assert_allclose(washer.rotation, rotation_z(np.radians(30)), atol=1e-12)
    assert scene.metadata == {}
    assert open_scene(tmp_path / "room.json").boxes[0].object_id == washer.object_id


def test_bare_enums_and_labels(room, tmp_path):
    plain = copy.deepcopy(room)
    plain["walls"][0]["category"] = "wall"
    plain["objects"][0]["confidence"] = "medium"
    assert captured_room(read(plain, tmp_path)) == captured_room(read(room, tmp_path))
    entry = room["objects"][0]
    for category, attributes, label in (
        ("storage", {}, "cabinet"), ("television", {}, "tv_monitor"), ("stairs", {}, "stairs"), ("stove", {}, "stove"),
        ("storage", {"StorageType": "shelf"}, "shelf"), ("chair", {"ChairType": "stool"}, "stool"),
        ("airFryer", {}, "air_fryer"),
    ):  # fmt: skip
        entry |= {"category": {category: {}}, "attributes": attributes}
        scene = read(room, tmp_path)
        assert scene.boxes[0].label == label
        assert captured_room(scene)["objects"][0]["category"] == {category: {}}
        assert captured_room(scene)["objects"][0]["attributes"] == attributes


def test_nothing_is_lost_on_the_way_to_a_scene_and_back(room, tmp_path):
    rich = copy.deepcopy(room)
    rich["walls"][0] |= {
        "polygonCorners": [[-2, -1.25, 0], [2, -1.25, 0], [2, 1.25, 0], [0, 1.5, 0], [-2, 0.5, 0]], "story": 1,
        "curve": {"radius": 3, "startAngle": 0.5}, "completedEdges": [{"left": {}}], "parentIdentifier": None,
        "shade": [1, {"a": None}],
    }  # fmt: skip
    rich["doors"][0] |= {"category": {"door": {"isOpen": False, "hinge": "left"}}, "confidence": {"high": {"of": 2}}}
    tilt = np.array([[0.8, 0.6, 0], [-0.36, 0.48, 0.8], [0.48, -0.64, 0.6]])  # a rotation with rational numbers
    rich["objects"][0]["transform"] = [*tilt[:, 0], 0, *tilt[:, 1], 0, *tilt[:, 2], 0, 1, 2, 3, 1]
    rich |= {"floors": [], "coreModel": "b64", "sections": [{"center": [1, 2, 3], "label": "kitchen", "story": 0}]}
    scene = read(rich, tmp_path)
    np.testing.assert_allclose(scene.surfaces[0].polygon[3], [1, 2, 1.75])  # wall centre, 1.5 m up
    written = captured_room(scene)
    np.testing.assert_allclose(
        written["walls"][0].pop("polygonCorners"), rich["walls"][0].pop("polygonCorners"), atol=1e-12
    )
    np.testing.assert_allclose(written["objects"][0].pop("transform"), rich["objects"][0].pop("transform"), atol=1e-12)
    np.testing.assert_allclose(written["doors"][0].pop("transform"), rich["doors"][0].pop("transform"), atol=1e-12)
    assert written["doors"][0].pop("polygonCorners") == []
    assert written == rich


def test_edited_box_is_written_where_it_is_now(room, tmp_path):
    scene = read(room, tmp_path)
    moved = scene.boxes[0].transformed(np.array([[1.0, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1]]))
    scene.boxes[0] = moved
    write_captured_room(scene, tmp_path / "moved.json")
    back = read_captured_room(tmp_path / "moved.json").boxes[0]
    np.testing.assert_allclose(back.center, [7, 7, 6.425])
    assert back.label == "washer"


def test_structure_holds_its_rooms_and_their_merger(room, tmp_path):
    second = json.loads(json.dumps(room).replace("00000000-0000-4000-8000", "11111111-0000-4000-8000"))
    merged = {key: room[key] + second[key] for key in room}
    structure = merged | {"rooms": [room, second], "identifier": "C1", "version": 2}
    (tmp_path / "home.json").write_text(json.dumps(structure))
    whole, rooms = read_captured_structure(tmp_path / "home.json")
    assert [s.scene_id for s in rooms] == ["home_0", "home_1"] and len(whole.boxes) == 2
    assert [len(s.boxes) for s in rooms] == [1, 1] and whole.metadata["identifier"] == "C1"
    write_captured_structure(whole, rooms, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["rooms"][1]["walls"][0]["identifier"] == second["walls"][0]["identifier"]
    write_captured_room(read_captured_room(tmp_path / "home.json"), tmp_path / "merged.json")
    assert json.loads((tmp_path / "merged.json").read_text())["rooms"] == structure["rooms"]
    structure = json.loads(json.dumps(structure))  # the merged lists share nothing with the rooms
    structure["rooms"][1]["walls"][0]["transform"][5] = 7
    (tmp_path / "home.json").write_text(json.dumps(structure))
    with pytest.raises(ValueError, match=r"home\.json: rooms\[1\]\.walls\[0\] \(11111111.*transform"):
        read_captured_structure(tmp_path / "home.json")
    with pytest.raises(ValueError, match="no list `rooms`"):
        read(room, tmp_path)
        read_captured_structure(tmp_path / "room.json")


def test_optional_fields_that_are_null_count_as_absent_and_stay_null(room, tmp_path):
    plain = read(room, tmp_path)
    room["openings"] = room["floors"] = None
    for entry in (room["walls"][0], room["doors"][0]):
        entry |= {"polygonCorners": None, "confidence": None, "completedEdges": None, "curve": None, "story": None}
    room["walls"][0]["parentIdentifier"] = None
    room["objects"][0] |= {"attributes": None, "confidence": None, "parentIdentifier": None}
    scene = read(room, tmp_path)
    for mine, other in zip([*scene.surfaces, *plain.surfaces], [*plain.surfaces, *scene.surfaces], strict=True):
        assert (mine.kind, mine.parent_id, mine.polygon) == (other.kind, other.parent_id, None)
        np.testing.assert_array_equal(mine.box.center, other.box.center)
    assert scene.boxes[0].label == "washer"
    write_captured_room(scene, tmp_path / "again.json")
    written = json.loads((tmp_path / "again.json").read_text())
    for key in ("doors", "objects"):  # turned by angles whose sine is rounded
        np.testing.assert_allclose(written[key][0].pop("transform"), room[key][0].pop("transform"), atol=1e-12)
    assert written == room
    room["walls"] = None
    with pytest.raises(ValueError, match="`walls` is missing"):
        read(room, tmp_path)


def test_a_byte_order_mark_or_capital_ending_changes_nothing(room, tmp_path):
    path = tmp_path / "ROOM.JSON"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(room).encode())
    assert open_scene(path).scene_id == "ROOM" and captured_room(open_scene(path)) == captured_room(
        read(room, tmp_path)
    )


@pytest.mark.parametrize("absent", [{}, {"walls": None, "objects": None, "windows": None}])
def test_structure_with_rooms_alone_joins_their_lists(room, tmp_path, absent):
    second = json.loads(json.dumps(room).replace("00000000-0000-4000-8000", "11111111-0000-4000-8000"))
    second["walls"][0]["polygonCorners"] = [[-2, -1.25, 0], [2, -1.25, 0], [0.1, 1.3, 0]]
    structure = {"rooms": [room, second], "identifier": "C1", **absent}
    path = tmp_path / "home.json"
    path.write_text(json.dumps(structure))
    scene = open_scene(path)
    assert [s.kind for s in scene.surfaces] == ["wall", "door"] * 2 and scene.metadata["merged_from_rooms"] is True
    for entry, surface in zip((room["walls"] + second["walls"]), scene.surfaces[::2], strict=True):
        x, y, z = entry["transform"][12:15]
        assert surface.box.object_id == entry["identifier"] and surface.box.center.tolist() == [x, -z, y]
    assert [box.object_id for box in scene.boxes] == [r["objects"][0]["identifier"] for r in (room, second)]
    assert scene.surfaces[3].parent_id == second["walls"][0]["identifier"]
    write_captured_room(scene, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == structure
    whole, rooms = read_captured_structure(path)
    assert [len(s.boxes) for s in (whole, *rooms)] == [2, 1, 1]
    write_captured_structure(whole, rooms, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again.keys() == structure.keys() and len(again["rooms"]) == 2

    scene.boxes[1] = replace(scene.boxes[1], center=[9, 8, 7])  # an edit must reach the file
    write_captured_room(scene, tmp_path / "moved.json")
    moved = read_captured_room(tmp_path / "moved.json")
    assert moved.boxes[1].center.tolist() == [9, 8, 7] and len(moved.surfaces) == 4
    assert "merged_from_rooms" not in json.loads((tmp_path / "moved.json").read_text())

    structure["rooms"][1] = room
    path.write_text(json.dumps(structure))
    with pytest.raises(ValueError, match=r"home\.json: identifier 0+-.* is used twice"):
        read_captured_room(path)
    structure["rooms"][1] = {**second, "objects": [3]}
    path.write_text(json.dumps(structure))
    with pytest.raises(ValueError, match=r"home\.json: rooms\[1\]\.objects\[0\]: expected an object"):
        read_captured_room(path)


# What is refused ----------------------------------------------------------------------------------------------------


def put(path: str, value):
    def change(room):
        *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        entry = room
        for key in way:
            entry = entry[key]
        if value is ...:
            del entry[last]
        else:
            entry[last] = value

    return change


@pytest.mark.parametrize(
    "change, told",
    [
        (put("walls", ...), "`walls` is missing"),
        (put("objects", ...), "`objects` is missing"),
        (put("doors", {}), r"doors: expected a list"),
        (put("objects.0", 3), r"objects\[0\]: expected an object"),
        (put("objects.0.identifier", ...), r"objects\[0\]\.identifier"),
        (put("objects.0.transform", ...), r"objects\[0\] \(0+-.*3\)\.transform: expected 16 numbers.*got nothing"),
        (put("objects.0.transform", [1] * 15), r"transform: expected 16"),
        (put("objects.0.transform.12", float("nan")), r"objects\[0\]\.transform\[12\] is nan"),
        (put("objects.0.dimensions.1", float("inf")), r"objects\[0\]\.dimensions\[1\] is inf"),
        (put("objects.0.transform.12", 10**400), "transform"),
        (put("objects.0.transform.12", True), "transform"),
        (put("objects.0.transform.0", 1.2), r"\.transform: its axes are no rotation"),
        (put("objects.0.transform", [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]), "no rotation"),
        (put("objects.0.transform.3", 0.5), "last row"),
        (put("objects.0.dimensions", [1, 2]), r"dimensions: expected 3"),
        (put("objects.0.dimensions", [1, -2, 3]), "at least 0 m"),
        (put("objects.0.category", {}), r"category: expected one name"),
        (put("objects.0.category", {"a": {}, "b": {}}), r"category: expected one name"),
        (put("objects.0.category", {"<script>": {}}), r"category: expected one name"),
        (put("objects.0.attributes", []), r"attributes: expected an object"),
        (put("objects.0.confidence", 3), r"confidence: expected one name"),
        (put("doors.0.category", {"window": {}}), r"doors\[0\].*expected 'door', got 'window'"),
        (put("doors.0.parentIdentifier", 4), "parentIdentifier"),
        (put("doors.0.identifier", "00000000-0000-4000-8000-000000000001"), "used twice"),
        (put("walls.0.polygonCorners", [[0, 0, 0], [1, 0, 0]]), "three corners"),
        (put("walls.0.polygonCorners", [[0, 0, 0], [1, 0, 0], [1, 1]]), r"polygonCorners\[2\]: expected 3"),
        (put("sections", [{"center": [0, float("nan"), 0]}]), r"sections\[0\]\.center\[1\] is nan"),
    ],
)
def test_a_wrong_entry_is_named(room, tmp_path, change, told):
    change(room)
    with pytest.raises(ValueError, match=told) as caught:
        read(room, tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "room.json")) and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    "text, told",
    [
        ("", "truncated"),
        ('{"walls": [], "objects": [', "truncated"),
        ("[]", "expected an object"),
        ('{"walls": [], "walls": [], "objects": []}', "stands twice"),
        ('{"walls": [], "objects": [], "a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"walls": [], "objects": [], "a": ' + "[" * 70 + "]" * 70 + "}", "nested"),
        ('{"walls": [], "objects": [], "a": 1e999}', "a is inf"),
        ('{"walls": [], "objects": [], "a": ' + "9" * 10_000 + "}", "invalid JSON"),
    ],
)
def test_broken_json_is_refused(text, told, tmp_path):
    with pytest.raises(ValueError, match=told) as caught:
        read(text, tmp_path)
    assert "room.json" in str(caught.value) and len(str(caught.value)) < 500
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "bytes.json", tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match=path.name):
            read_captured_room(path)


def test_a_huge_line_is_refused_unread(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:  # a sparse gigabyte
        file.write(b'{"walls": "')
        file.truncate(2**30)
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"huge\.json: larger than"):
        read_captured_room(path)
    assert tracemalloc.get_traced_memory()[1] < 3 * MAX_BYTES and time.monotonic() - start < 5
    tracemalloc.stop()


def test_nothing_half_written(room, tmp_path):
    scene = read(room, tmp_path)
    scene.metadata["odd"] = float("nan")
    with pytest.raises(ValueError):
        write_captured_room(scene, tmp_path / "out" / "room.json")
    assert not (tmp_path / "out").exists()
