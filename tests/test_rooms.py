"""Procedural rooms: the written files are read back with json and NumPy alone, not with the project's reader."""

import colorsys
import csv
import hashlib
import json

import numpy as np
import pytest
import shapely
from PIL import Image
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

pytest.importorskip("open3d", reason="rooms are rendered with Open3D", exc_type=ImportError)

from roomplan_lib.cli import app
from roomplan_lib.geometry import box_corners, box_intersection_volume
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.scenes.arkitscenes import scene_membership
from roomplan_lib.scenes.rooms import make_room, write_rooms
from roomplan_lib.scenes.rooms.render import RoomRenderer
from roomplan_lib.scenes.rooms.shapes import PALETTE, Shape, material

NUM_ROOMS = 5
SETTINGS = {"num_poses": 6, "image_size": (128, 96), "progress": False, "workers": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("rooms")
    return output, write_rooms(output, NUM_ROOMS, seed=3, **SETTINGS)


def _hashes(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _poses(folder):
    """{timestamp: world_to_camera [4, 4]} of the .traj file."""
    poses = {}
    for line in (folder / f"{folder.name}_frames" / "lowres_wide.traj").read_text().splitlines():
        stamp, *rest = map(float, line.split())
        pose = np.eye(4)
        pose[:3, :3] = Rotation.from_rotvec(rest[:3]).as_matrix()
        pose[:3, 3] = rest[3:]
        poses[stamp] = pose
    return poses


def _views(folder):
    """The frames that have a pose within 5 ms: (depth [H, W] m, ids [H, W], K [3, 3], world_to_camera [4, 4])."""
    frames, poses, views = folder / f"{folder.name}_frames", _poses(folder), []
    stamps = np.array(list(poses))
    for path in sorted((frames / "lowres_depth").glob("*.png")):
        time = float(path.stem.split("_")[1])
        nearest = stamps[np.argmin(np.abs(stamps - time))]
        if abs(nearest - time) < 0.005:
            w, h, fx, fy, cx, cy = map(
                float, (frames / "lowres_wide_intrinsics" / f"{path.stem}.pincam").read_text().split()
            )
            depth = np.array(Image.open(path)) / 1000
            assert depth.shape == (h, w)
            ids = np.array(Image.open(frames / "instances" / path.name))
            views.append((depth, ids, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), poses[nearest]))
    return views


def _world_points(depth, K, world_to_camera):
    """[H, W, 3], written out pixel by pixel formula: the ray of (u, v) is K^-1 (u, v, 1)."""
    v, u = np.indices(depth.shape)
    camera = np.linalg.solve(K, np.stack([u, v, np.ones_like(u)]).reshape(3, -1).astype(float)) * depth.ravel()
    rotation, translation = world_to_camera[:3, :3], world_to_camera[:3, 3:]
    return (rotation.T @ (camera - translation)).T.reshape(*depth.shape, 3)


def _boxes(folder):
    """{objectId: (center, full lengths, rows are axes)} of the annotation."""
    data = json.loads((folder / f"{folder.name}_3dod_annotation.json").read_text())["data"]
    boxes = {}
    for item in data:
        obb = item["segments"]["obbAligned"]
        boxes[item["objectId"]] = tuple(
            np.array(x) for x in (obb["centroid"], obb["axesLengths"], np.reshape(obb["normalizedAxes"], (3, 3)))
        )
    return boxes


def test_same_seed_same_bytes_other_seed_other_bytes(written, tmp_path):
    _, folders = written
    again = write_rooms(tmp_path / "again", 2, seed=3, **SETTINGS | {"workers": 2})  # other processes, same bytes
    for first, second in zip(folders[:2], again, strict=True):
        assert _hashes(first) == _hashes(second)
    other = write_rooms(tmp_path / "other", 1, seed=4, **SETTINGS)
    assert not set(_hashes(other[0]).values()) & set(_hashes(folders[0]).values())
    a, b = make_room(3, 1), make_room(3, 1)
    assert np.array_equal(a.faces.corners, b.faces.corners) and [o.uid for o in a.objects] == [o.uid for o in b.objects]


def test_layout(written):
    output, folders = written
    assert [f.parent.name for f in folders] == ["Training"] * 4 + ["Validation"]
    assert [f.name for f in folders] == [f"8003{k:04d}" for k in range(NUM_ROOMS)]
    splits = list(csv.DictReader((output / "3dod_train_val_splits.csv").open()))
    assert [(r["video_id"], r["fold"]) for r in splits] == [(f.name, f.parent.name) for f in folders]
    assert len({r["visit_id"] for r in splits}) == NUM_ROOMS
    assert {r["sky_direction"] for r in csv.DictReader((output / "metadata.csv").open())} == {"Up"}
    assert not [p for p in output.rglob(".*")]  # nothing half written
    for folder in folders:
        names = [
            {p.stem for p in (folder / f"{folder.name}_frames" / sub).iterdir()}
            for sub in ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics", "instances")
        ]
        assert all(n == names[0] for n in names) and len(names[0]) == 12
        annotation = json.loads((folder / f"{folder.name}_3dod_annotation.json").read_text())
        assert set(annotation) == {"data", "stats", "comment", "confirm", "skipped"} and annotation["skipped"] is False
        assert 4 <= len(annotation["data"]) <= 10
        sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())
        for item in annotation["data"]:
            told = sidecar["instances"][str(item["objectId"])]
            assert (told["uid"], told["label"]) == (item["uid"], item["label"])
            assert item["label"] in CATEGORIES and told["color"] in PALETTE
            # The front is the direction of the second box axis.
            assert np.allclose(told["front"], np.reshape(item["segments"]["obbAligned"]["normalizedAxes"], (3, 3))[1])


def test_timestamps(written):
    for folder in written[1]:
        stamps = np.array(list(_poses(folder)))
        assert np.allclose(np.diff(stamps), 0.1, atol=0.0025)
        files = (folder / f"{folder.name}_frames" / "lowres_wide").glob("*.png")
        times = np.array(sorted(float(p.stem.split("_")[1]) for p in files))
        gap = np.abs(times[:, None] - stamps).min(axis=1)
        assert (gap[0::2] < 0.0016).all() and (gap[1::2] > 0.04).all()
    assert any(
        (np.abs(s * 1000 - np.round(s * 1000)) > 0.1).any() for s in (np.array(list(_poses(f))) for f in written[1])
    )


def test_depth_lies_on_the_objects(written):
    pixels = 0
    for folder in written[1]:
        boxes = _boxes(folder)
        for depth, ids, K, pose in _views(folder):
            points = _world_points(depth, K, pose)
            for number, (center, lengths, axes) in boxes.items():
                local = (points[ids == number] - center) @ axes.T
                assert (np.abs(local) <= lengths / 2 + 0.01).all()
                pixels += len(local)
    assert pixels > 50_000


def test_boxes_are_tight(written):
    """Geometry reaches every side of its box."""
    for k in range(NUM_ROOMS):
        room = make_room(3, k)
        for o in room.objects:
            points = room.faces.corners[room.faces.instance == o.instance_id].reshape(-1, 3)
            points = points @ room.room_to_world[:3, :3].T + room.room_to_world[:3, 3]
            local = (points - o.box.center) @ o.box.rotation
            assert np.allclose(local.max(axis=0), o.box.extent / 2, atol=1e-6)
            assert np.allclose(local.min(axis=0), -o.box.extent / 2, atol=1e-6)


def test_views_agree(written):
    """A point that two views both see is at the same place: depth of one against the other's, where not hidden."""
    compared = 0
    for folder in written[1]:
        views = _views(folder)
        for (depth_a, ids_a, K_a, pose_a), (depth_b, ids_b, K_b, pose_b) in zip(views[:-1], views[1:], strict=True):
            points = _world_points(depth_a, K_a, pose_a)
            camera = points @ pose_b[:3, :3].T + pose_b[:3, 3]
            z = camera[..., 2]
            front = z > 0.3
            uv = camera[front][:, :2] / z[front][:, None] * [K_b[0, 0], K_b[1, 1]] + K_b[:2, 2]
            low = np.floor(uv).astype(int)
            inside = ((low >= 0) & (low < [depth_b.shape[1] - 1, depth_b.shape[0] - 1])).all(axis=1)
            low, share = low[inside], (uv - low)[inside]
            ids, expected = ids_a[front][inside], z[front][inside]
            # Inverse depth is linear in the picture of a plane; all four neighbours on the same instance and plane.
            corners = [(low[:, 1] + j, low[:, 0] + i) for j in (0, 1) for i in (0, 1)]
            near = np.stack([1 / depth_b[c] for c in corners])
            same = np.all([ids_b[c] == ids for c in corners], axis=0)
            same &= np.abs(near[0] + near[3] - near[1] - near[2]) < 5e-4
            x, y = share[:, 0], share[:, 1]
            found = 1 / (near[0] * (1 - x) * (1 - y) + near[1] * x * (1 - y) + near[2] * (1 - x) * y + near[3] * x * y)
            visible = same & (found > expected - 0.05)  # else something of the same instance stands before it
            error = np.abs(found - expected)[visible]
            compared += len(error)
            if len(error) > 500:
                assert np.quantile(error, 0.95) < 0.01  # the rest: steps of fronts and handles
                assert np.median(error) < 0.001
    assert compared > 30_000


def test_furniture_stands_free_and_in_the_room():
    seen = set()
    for k in range(40):
        room = make_room(11, k)
        polygon = room.polygon
        for i, o in enumerate(room.objects):
            seen.add(o.label)
            corners = (box_corners(o.box) - room.room_to_world[:3, 3]) @ room.room_to_world[:3, :3]
            assert (corners[:, :2] > -1e-6).all() and (corners[:, :2] < polygon.max(axis=0) + 1e-6).all()
            assert (corners[:, 2] > -1e-6).all() and (corners[:, 2] < room.height).all()
            if len(polygon) == 6:  # no corner of the box in the notch, no corner of the notch in the box
                assert not (corners[:, :2] > polygon[3] + 1e-6).all(axis=1).any()
            for other in room.objects[:i]:
                assert box_intersection_volume(o.box, other.box) < 1e-6, (k, o.label, other.label)
    assert seen == set(CATEGORIES)


def test_unusual_rooms_are_like_no_other(tmp_path):
    """Shapes, colours and numbers of objects that no usual room has; still furnished as rooms are."""
    usual = [make_room(11, k) for k in range(60)]
    colors = {(o.label, o.color) for room in usual for o in room.objects}
    for k in range(15):
        room = make_room(11, k, unusual=True)
        floor = shapely.Polygon(room.polygon)
        assert len(room.polygon) == 8 > max(len(other.polygon) for other in usual) and floor.exterior.is_ccw
        assert len(room.objects) > max(len(other.objects) for other in usual)
        new = [(o.label, o.color) for o in room.objects if o.label != "tv_monitor"]
        assert new and colors.isdisjoint(new)
        for i, o in enumerate(room.objects):
            corners = (box_corners(o.box) - room.room_to_world[:3, 3]) @ room.room_to_world[:3, :3]
            assert floor.buffer(1e-6).contains(shapely.MultiPoint(corners[:, :2]).convex_hull)
            assert (corners[:, 2] > -1e-6).all() and (corners[:, 2] < room.height).all()
            for other in room.objects[:i]:
                assert box_intersection_volume(o.box, other.box) < 1e-6, (k, o.label, other.label)
    folder = write_rooms(tmp_path / "unusual", 1, 11, num_poses=2, image_size=(64, 48), unusual=True, progress=False)[0]
    assert folder.parent.name == "Validation" and scene_membership(folder)[0] == "val"
    sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())
    assert sidecar["settings"]["unusual"] and len(sidecar["polygon"]) == 8


def test_views_are_open(written):
    for folder in written[1]:
        for depth, ids, _, _ in _views(folder):
            assert (depth > 0.05).all()
            assert np.median(depth) > 0.75
            assert np.bincount(ids[ids < 1000], minlength=1).max() < 0.48 * ids.size


def _looks(name, rgb):
    """[N] bool: pixels rgb [N, 3] of 0 to 255 that can be the palette colour in some light.

    Shading scales a colour, so hue and saturation tell the coloured names (brown and orange share a hue); white, gray
    and black are told by little saturation and by brightness, in ranges that overlap as light does.
    """
    value = rgb.max(axis=-1) / 255
    saturation = 1 - rgb.min(axis=-1) / np.maximum(rgb.max(axis=-1), 1)
    if name in ("white", "gray", "black"):
        low, high = {"white": (0.42, 1), "gray": (0.2, 0.78), "black": (0, 0.33)}[name]
        return (value >= low) & (value <= high) & ((saturation < 0.25) | (name == "black"))
    hue = np.array([colorsys.rgb_to_hsv(*c)[0] for c in rgb])
    off = np.abs((hue - colorsys.rgb_to_hsv(*PALETTE[name])[0] + 0.5) % 1 - 0.5) * 360
    return (off < 25) & (saturation > (0.2 if name == "pink" else 0.3)) & (value > 0.06)


def test_colors_are_as_named(tmp_path):
    """Most of what is seen of every instance has its named colour; clearly most of it in every category."""
    shares = {}
    for folder in write_rooms(tmp_path, 24, seed=5, num_poses=5, frame_rate=10, image_size=(96, 72), progress=False):
        instances = json.loads((folder / f"{folder.name}_room.json").read_text())["instances"]
        frames, pixels = folder / f"{folder.name}_frames", {}
        for path in (frames / "lowres_wide").glob("*.png"):
            rgb, ids = np.array(Image.open(path), dtype=float), np.array(Image.open(frames / "instances" / path.name))
            for number in instances:
                pixels.setdefault(number, []).append(rgb[ids == int(number)])
        for number, told in instances.items():
            seen = np.concatenate(pixels[number])
            if len(seen) >= 300:
                share = _looks(told["color"], seen).mean()
                shares.setdefault(told["label"], []).append(share)
                assert share > 0.5, (folder.name, number, told["label"], told["style"], told["color"], share)
    assert len(shares) >= 15 and sum(map(len, shares.values())) > 100
    low = {label: np.median(found) for label, found in shares.items() if np.median(found) < 0.6}
    assert not low


def test_an_error_names_the_room(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("roomplan_lib.scenes.rooms.write.write_ply", fail)
    with pytest.raises(RuntimeError, match=r"room 80030000 \(seed 3, index 0\): OSError: No space left"):
        write_rooms(tmp_path, 1, seed=3, **SETTINGS | {"num_poses": 1})


def test_mesh(written):
    folder = written[1][0]
    raw = (folder / f"{folder.name}_3dod_mesh.ply").read_bytes()
    header, _, body = raw.partition(b"end_header\n")
    counts = [int(line.split()[-1]) for line in header.decode().splitlines() if line.startswith("element")]
    vertex = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)], count=counts[0])
    face = np.frombuffer(body, dtype=[("n", "u1"), ("index", "<i4", 3)], count=counts[1], offset=vertex.nbytes)
    assert vertex.nbytes + face.nbytes == len(body)
    assert (face["n"] == 3).all() and face["index"].max() < counts[0]
    # The floor's part of the mesh has the room's area: triangles at floor height, facing up.
    sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())
    polygon = np.array(sidecar["polygon"])
    x, y = polygon[:, 0], polygon[:, 1]
    area = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    triangle = vertex["xyz"][face["index"]].astype(float)
    cross = np.cross(triangle[:, 1] - triangle[:, 0], triangle[:, 2] - triangle[:, 0])
    floor = (np.abs(triangle[..., 2] - polygon[0, 2]) < 1e-5).all(axis=1) & (cross[:, 2] > 0)
    assert np.isclose(cross[floor, 2].sum() / 2, area, rtol=1e-4)
    assert vertex["rgb"].std() > 20


def test_rooms_are_reused_or_refused(written):
    output, folders = written
    before = {p: p.stat().st_mtime_ns for f in folders for p in f.rglob("*") if p.is_file()}
    assert write_rooms(output, NUM_ROOMS, seed=3, **SETTINGS) == folders
    assert before == {p: p.stat().st_mtime_ns for f in folders for p in f.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="80030000.*num_poses 6 instead of 7"):
        write_rooms(output, 1, seed=3, **SETTINGS | {"num_poses": 7})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rooms": 10_001}, "num_rooms"),
        ({"frame_rate": 25.0}, "frame_rate"),
        ({"seed": -1}, "seed"),
        ({"num_poses": 0}, "num_poses"),
    ],
)
def test_settings_out_of_range(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_rooms(**{"output": tmp_path, "num_rooms": 1} | change)


def test_shapes_are_closed_and_face_outwards():
    """Volume by the divergence theorem against the closed form: it only fits if every face is turned outwards."""

    def volume(shape):
        c = np.concatenate(shape.corners)
        triangles = np.concatenate([c[:, [0, 1, 2]], c[:, [0, 2, 3]]])
        return np.einsum("ij,ij->i", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])).sum() / 6

    paint = material("red")
    block, rod, ball, lathe = Shape(), Shape(), Shape(), Shape()
    block.block((0.1, 0.2, 0.3), (0.5, 0.9, 1.5), paint)
    assert np.isclose(volume(block), 0.4 * 0.7 * 1.2)
    rod.rod((0.1, 0.2, 0.3), (0.7, 1.0, 0.3), 0.1, paint, segments=64)
    assert np.isclose(volume(rod), np.pi * 0.01 * 1.0, rtol=3e-3)
    ball.cushion((0, 0, 0), (1, 2, 3), paint, roundness=1.0, segments=64)
    assert np.isclose(volume(ball), np.pi, rtol=6e-3)
    lathe.lathe([(0, 0), (0.5, 0), (0.5, 1), (0.4, 1), (0.4, 0.2), (0, 0.2)], paint, segments=64, axis="y")
    assert np.isclose(volume(lathe), np.pi * (0.25 - 0.16 * 0.8), rtol=3e-3)
    for shape in (block, rod, ball, lathe):  # the normals agree with the order of the corners
        c, n = np.concatenate(shape.corners), np.concatenate(shape.normals)
        flat = np.cross(c[:, 2] - c[:, 0], c[:, 3] - c[:, 1])
        assert (np.einsum("ij,ij->i", flat, n.mean(axis=1)) > 0).all()


def test_a_ray_that_slips_between_faces_is_cast_again():
    """Rays miss the seam of two faces now and then; the view must have no hole and nothing else may change."""

    class Leaky:
        def __init__(self, scene):
            self.scene, self.calls = scene, 0

        def cast_rays(self, rays, nthreads):
            hit = {key: value.clone() for key, value in self.scene.cast_rays(rays, nthreads=nthreads).items()}
            self.calls += 1
            if self.calls == 1:
                hit["t_hit"][7], hit["primitive_ids"][7] = np.inf, 2**32 - 1
            return hit

    room = make_room(3, 0)
    renderer = RoomRenderer(room)
    K = np.array([[50.0, 0, 15.5], [0, 50, 11.5], [0, 0, 1]])
    pose = np.eye(4)
    pose[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    pose[:3, 3] = [*np.mean(room.polygon, axis=0), 1.4]
    depth, ids = renderer.trace(K, pose, (32, 24))
    renderer._scene = Leaky(renderer._scene)
    again, ids_again = renderer.trace(K, pose, (32, 24))
    assert renderer._scene.calls == 2
    assert np.abs(again - depth).max() < 0.01 and (ids_again != ids).sum() <= 1


def test_the_command_takes_a_frame_rate(tmp_path):
    def run(*options):
        arguments = ["rooms", "--output", str(tmp_path), "--num-rooms", "1", "--num-poses", "3", "--workers", "1"]
        return CliRunner().invoke(app, [*arguments, *options])

    for rate, reason in (("15", "expected 10, 20, .. 60 pictures per second"), ("10", "layout of ScanNet have none")):
        layout = ["--layout", "scannet"] if rate == "10" else []
        refused = run("--frame-rate", rate, *layout)
        assert refused.exit_code == 1 and reason in refused.stderr and not list(tmp_path.iterdir())
    assert run("--frame-rate", "10").exit_code == 0
    (folder,) = tmp_path.glob("*/*/*_frames")
    poses = (folder / "lowres_wide.traj").read_text().splitlines()
    assert len(list((folder / "lowres_wide").iterdir())) == len(poses) == 3
