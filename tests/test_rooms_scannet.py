"""Rooms in ScanNet's layout: the files are read back with struct, json and NumPy; then with the project's reader."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open3d", reason="rooms are rendered with Open3D", exc_type=ImportError)

import open3d as o3d

from roomplan_lib.geometry import box_corners
from roomplan_lib.scenes.rooms import make_room, write_scannet_rooms
from roomplan_lib.scenes.rooms.plan import FIRST_WALL_ID, FLOOR_ID
from roomplan_lib.scenes.scannet import find_scenes, mesh_center, read_scene

NUM_ROOMS, NUM_POSES = 5, 11  # two frames without a pose
SETTINGS = {"num_poses": NUM_POSES, "image_size": (160, 120), "depth_size": (96, 72), "progress": False, "workers": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("scannet")
    return output, write_scannet_rooms(output, NUM_ROOMS, seed=3, **SETTINGS)


def _info(folder):
    """{key: text} of <id>.txt."""
    lines = (folder / f"{folder.name}.txt").read_text().splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}


def _alignment(folder):
    return np.array(_info(folder)["axisAlignment"].split(), dtype=float).reshape(4, 4)


def _mesh(folder):
    """(vertices [V, 3], colours [V, 4], triangles [T, 3]) of the .ply file, raw frame."""
    header, _, body = (folder / f"{folder.name}_vh_clean_2.ply").read_bytes().partition(b"end_header\n")
    counts = [int(line.split()[-1]) for line in header.decode().splitlines() if line.startswith("element")]
    assert header.count(b"property uchar") == 4 and b"alpha" in header
    vertex = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgba", "u1", 4)], count=counts[0])
    face = np.frombuffer(body, dtype=[("n", "u1"), ("index", "<i4", 3)], count=counts[1], offset=vertex.nbytes)
    assert vertex.nbytes + face.nbytes == len(body) and face["index"].max() < counts[0]
    return vertex["xyz"].astype(float), vertex["rgba"], face["index"]


def _instances(folder):
    """{objectId: (label, vertex rows)} from the aggregation and the segments."""
    groups = json.loads((folder / f"{folder.name}.aggregation.json").read_text())["segGroups"]
    segments = np.array(json.loads((folder / f"{folder.name}_vh_clean_2.0.010000.segs.json").read_text())["segIndices"])
    return {g["objectId"]: (g["label"], np.flatnonzero(np.isin(segments, g["segments"]))) for g in groups}


def _read_sens(path):
    """(header, frames) of a .sens file of version 4, all at once."""
    data = path.read_bytes()
    version, length = struct.unpack_from("<IQ", data)
    at = 12 + length
    name = data[12:at].decode()
    matrices = np.array(struct.unpack_from("<64f", data, at)).reshape(4, 4, 4)
    at += 256
    color, depth, cw, ch, dw, dh, shift, count = struct.unpack_from("<iiIIIIfQ", data, at)
    at += 36
    frames = []
    for _ in range(count):
        *pose, _, _, color_bytes, depth_bytes = struct.unpack_from("<16f4Q", data, at)
        at += 96
        jpeg, packed = data[at : at + color_bytes], data[at + color_bytes : at + color_bytes + depth_bytes]
        at += color_bytes + depth_bytes
        raw = np.frombuffer(zlib.decompress(packed), "<u2").reshape(dh, dw)
        frames.append((np.array(pose).reshape(4, 4), jpeg, raw))
    assert struct.unpack_from("<Q", data, at) == (0,) and at + 8 == len(data)
    return (version, name, matrices, color, depth, (cw, ch), (dw, dh), shift), frames


def _pictures(output, folder):
    return output / "posed_images" / folder.name


def _views(output, folder):
    """The frames with a pose: (jpeg as an array, depth metres, camera_to_raw)."""
    for path in sorted(_pictures(output, folder).glob("0*.txt")):
        pose = np.loadtxt(path)
        if np.isfinite(pose).all():
            depth = np.array(Image.open(path.with_suffix(".png"))) / 1000
            yield np.array(Image.open(path.with_suffix(".jpg"))), depth, pose


def _cast(vertices, triangles, K, pose, size):
    """Depth along z [H, W] of a mesh, ray by ray; infinite where nothing is hit."""
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(vertices.astype(np.float32), np.ascontiguousarray(triangles, dtype=np.uint32))
    u, v = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    rays = np.linalg.solve(K[:3, :3], np.stack([u, v, np.ones_like(u)]).reshape(3, -1)).T @ pose[:3, :3].T
    rays = np.concatenate([np.broadcast_to(pose[:3, 3], rays.shape), rays], axis=1).astype(np.float32)
    return scene.cast_rays(o3d.core.Tensor(rays), nthreads=1)["t_hit"].numpy().reshape(size[::-1])


def test_layout(written):
    output, folders = written
    names = [f"scene{k:04d}_00" for k in range(NUM_ROOMS)]
    assert [f.relative_to(output).as_posix() for f in folders] == [f"scans/{name}" for name in names]
    assert (output / "scannetv2_train.txt").read_text().split() == names[:4]
    assert (output / "scannetv2_val.txt").read_text().split() == names[4:]
    assert not [p for p in output.rglob(".*")]  # nothing half written
    suffixes = (".txt", "_vh_clean_2.ply", ".aggregation.json", "_vh_clean_2.0.010000.segs.json", ".sens", "_room.json")
    for folder in folders:
        assert {p.name for p in folder.iterdir()} == {folder.name + suffix for suffix in suffixes}
        frames = [f"{k:05d}.{kind}" for k in range(NUM_POSES + 2) for kind in ("jpg", "png", "txt")]
        found = {p.name for p in _pictures(output, folder).iterdir()}
        assert found == {*frames, "intrinsic.txt", "depth_intrinsic.txt"}


def test_scan_text_agrees_with_the_pictures(written):
    output, folders = written
    for folder in folders:
        info, pictures = _info(folder), _pictures(output, folder)
        cameras = {}
        for name, file, size, suffix in (
            ("color", "intrinsic.txt", (160, 120), ".jpg"),
            ("depth", "depth_intrinsic.txt", (96, 72), ".png"),
        ):
            K = cameras[name] = np.loadtxt(pictures / file)
            assert K.shape == (4, 4) and np.isclose(K[0, 0] / size[0], 0.9, atol=0.02)
            assert [float(info[f"{key}_{name}"]) for key in ("fx", "fy", "mx", "my")] == [*K[[0, 1], [0, 1]], *K[:2, 2]]
            assert (int(info[f"{name}Width"]), int(info[f"{name}Height"])) == size
            assert int(info[f"num{name.capitalize()}Frames"]) == NUM_POSES + 2
            assert {Image.open(p).size for p in pictures.glob(f"*{suffix}")} == {size}
        assert abs(cameras["color"][0, 0] / 160 - cameras["depth"][0, 0] / 96) > 1e-4  # two cameras, not one scaled


def test_sens_holds_the_same_pictures(written):
    output, folders = written
    for folder in folders[:2]:
        header, frames = _read_sens(folder / f"{folder.name}.sens")
        version, name, matrices, color, depth, color_size, depth_size, shift = header
        assert (version, name, color, depth, color_size, depth_size, shift) == (
            4, folder.name, 2, 1, (160, 120), (96, 72), 1000,
        )  # fmt: skip
        pictures = _pictures(output, folder)
        assert np.allclose(matrices[0], np.loadtxt(pictures / "intrinsic.txt"), rtol=1e-6)
        assert np.allclose(matrices[2], np.loadtxt(pictures / "depth_intrinsic.txt"), rtol=1e-6)
        assert len(frames) == NUM_POSES + 2
        for k, (pose, jpeg, raw) in enumerate(frames):
            assert jpeg == (pictures / f"{k:05d}.jpg").read_bytes()
            assert np.array_equal(raw, np.array(Image.open(pictures / f"{k:05d}.png")))
            told = np.loadtxt(pictures / f"{k:05d}.txt")
            assert np.allclose(pose, told, rtol=1e-6, atol=1e-6)
            assert np.isfinite(told).all() or (told == -np.inf).all()
        assert sum(not np.isfinite(pose).all() for pose, _, _ in frames) == 2


def test_the_alignment_turns_the_walls_onto_the_axes(written):
    yaws = []
    for folder in written[1]:
        alignment, (vertices, _, _) = _alignment(folder), _mesh(folder)
        assert np.allclose(alignment[:3, :3] @ alignment[:3, :3].T, np.eye(3), atol=3e-6)
        assert np.allclose(alignment[2, :3], [0, 0, 1]) and np.allclose(alignment[3], [0, 0, 0, 1])
        yaws.append(np.arctan2(alignment[1, 0], alignment[0, 0]))
        assert np.linalg.norm(alignment[:3, 3]) > 0.1
        aligned = vertices @ alignment[:3, :3].T + alignment[:3, 3]
        instances = _instances(folder)
        walls = [aligned[rows] for label, rows in instances.values() if label == "wall"]
        assert len(walls) in (4, 6)
        # Skirting and pictures stand out of a wall by a few centimetres.
        assert all(min(np.ptp(wall[:, 0]), np.ptp(wall[:, 1])) < 0.03 < np.ptp(wall[:, 2]) for wall in walls)
        assert any(min(np.ptp(v[:, 0]), np.ptp(v[:, 1])) > 0.3 for v in (vertices[instances[k][1]] for k in instances))
        (floor,) = (aligned[rows] for label, rows in instances.values() if label == "floor")
        assert abs(floor[:, 2].min()) < 1e-5 and np.abs(floor.min(axis=0) + floor.max(axis=0))[:2].max() < 1e-5
    turned = np.abs((np.array(yaws) + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    assert (np.abs(yaws) > 0.01).all() and turned.max() > 0.2  # none is the identity, some are no quarter turn either


def test_boxes_of_the_vertices_are_those_of_the_room(written):
    shared = 0
    for index, folder in enumerate(written[1]):
        room, alignment, (vertices, _, _) = make_room(3, index), _alignment(folder), _mesh(folder)
        aligned = vertices @ alignment[:3, :3].T + alignment[:3, 3]
        instances = _instances(folder)
        assert list(instances) == list(range(len(instances)))
        rows = np.concatenate([rows for _, rows in instances.values()])
        assert len(rows) == len(np.unique(rows)) < len(vertices)  # a vertex is of one instance, the ceiling's of none
        sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())["instances"]
        told = {entry["objectId"]: (int(number), entry) for number, entry in sidecar.items()}
        to_aligned = alignment @ room.room_to_world
        for object_id, (number, entry) in told.items():
            label, rows = instances[object_id]
            assert label == entry["scannet_label"] and entry["label"] == room.objects[number - 1].label
            found = aligned[rows]
            corners = room.faces.corners[room.faces.instance == number].reshape(-1, 3)
            corners = corners @ to_aligned[:3, :3].T + to_aligned[:3, 3]
            assert np.allclose(found.min(axis=0), corners.min(axis=0), atol=2e-5)
            assert np.allclose(found.max(axis=0), corners.max(axis=0), atol=2e-5)
            box = room.objects[number - 1].box.transformed(alignment)
            outer = box_corners(box)
            assert (found.min(axis=0) > outer.min(axis=0) - 1e-4).all()
            assert (found.max(axis=0) < outer.max(axis=0) + 1e-4).all()
            if abs((box.yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4) < 1e-6:  # along the walls: the same box
                assert np.allclose(
                    [found.min(axis=0), found.max(axis=0)], [outer.min(axis=0), outer.max(axis=0)], atol=1e-4
                )
                shared += 1
        labels = [label for label, _ in instances.values()]
        assert labels.count("wall") == len(room.polygon) and labels.count("floor") == 1
        assert {kind: labels.count(kind) for kind in ("door", "window")} == {
            kind: sum(o.kind == kind for o in room.openings) for kind in ("door", "window")
        }
        assert len(told) == len(room.objects) and len(told) + len(room.polygon) + len(room.openings) + 1 == len(labels)
        assert FLOOR_ID not in [n for n, _ in told.values()] and max(n for n, _ in told.values()) < FIRST_WALL_ID
    assert shared > 10


def test_depth_and_poses_agree_with_the_mesh(written):
    """In millimetres; ten times that and more with the poses turned round."""
    output, folders = written
    for folder in folders[:3]:
        vertices, _, triangles = _mesh(folder)
        K = np.loadtxt(_pictures(output, folder) / "depth_intrinsic.txt")
        errors, flipped = [], []
        for _, depth, pose in _views(output, folder):
            errors.append(np.abs(_cast(vertices, triangles, K, pose, (96, 72)) - depth))
            flipped.append(np.abs(_cast(vertices, triangles, K, np.linalg.inv(pose), (96, 72)) - depth))
        assert len(errors) == NUM_POSES
        error = np.concatenate(errors).ravel()
        assert np.median(error) < 0.0006 and np.mean(error < 0.002) > 0.995
        assert np.median(np.concatenate(flipped)) > 0.1


def test_colour_pictures_show_the_mesh(written):
    """Visible vertices have the colour of the pixel they fall on; less so a few pixels beside it."""
    output, folders = written
    folder = folders[2]
    vertices, colors, triangles = _mesh(folder)
    K = np.loadtxt(_pictures(output, folder) / "intrinsic.txt")
    wrong = K.copy()
    wrong[:2, 2] += 4
    agreement = {}
    for name, camera in (("right", K), ("wrong", wrong)):
        pixels, expected = [], []
        for picture, _, pose in _views(output, folder):
            local = (vertices - pose[:3, 3]) @ pose[:3, :3]
            z = np.maximum(local[:, 2], 1e-6)
            u, v = (np.round(local[:, k] / z * camera[k, k] + camera[k, 2]).astype(int) for k in (0, 1))
            seen = _cast(vertices, triangles, K, pose, (160, 120))
            inside = (local[:, 2] > 0.3) & (u >= 2) & (v >= 2) & (u < 158) & (v < 118)
            rows = np.flatnonzero(inside)
            rows = rows[np.abs(seen[v[rows], u[rows]] - local[rows, 2]) < 0.02]
            pixels.append(picture[v[rows], u[rows]])
            expected.append(colors[rows, :3])
        pixels, expected = np.concatenate(pixels).astype(float), np.concatenate(expected).astype(float)
        assert len(pixels) > 2000
        agreement[name] = np.median(np.abs(pixels - expected).mean(axis=1))
    assert agreement["right"] < 8 and agreement["right"] < agreement["wrong"]


def test_the_reader_finds_what_was_written(written):
    output, folders = written
    assert sorted(p.name for p in find_scenes(output)) == [f.name for f in folders]
    for folder in folders:
        scene, alignment, (vertices, _, _) = read_scene(folder), _alignment(folder), _mesh(folder)
        assert scene.scene_id == folder.name and scene.split == ("val" if folder is folders[4] else "train")
        assert np.allclose(mesh_center(folder), (vertices.min(axis=0) + vertices.max(axis=0)) / 2, atol=1e-6)
        sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())
        assert np.allclose(sidecar["mesh_center"], mesh_center(folder), atol=1e-6)
        assert np.allclose(sidecar["axis_alignment"], alignment)
        aligned, instances = vertices @ alignment[:3, :3].T + alignment[:3, 3], _instances(folder)
        assert {box.object_id: box.label for box in scene.boxes} == {str(k): v[0] for k, v in instances.items()}
        for box in scene.boxes:
            found = aligned[instances[int(box.object_id)][1]]
            assert np.allclose(box.center - box.extent / 2, found.min(axis=0), atol=1e-6)
            assert np.allclose(box.center + box.extent / 2, found.max(axis=0), atol=1e-6)
        views = list(_views(output, folder))
        assert len(scene.views) == len(views) == NUM_POSES
        for view, (picture, depth, pose) in zip(scene.views, views, strict=True):
            assert np.array_equal(view.load_rgb(), picture) and np.allclose(view.load_depth(), depth)
            assert np.allclose(view.camera_to_world, alignment @ pose, atol=1e-5)
            assert np.allclose(view.K, np.loadtxt(_pictures(output, folder) / "intrinsic.txt")[:3, :3])
            assert np.allclose(view.depth_K, np.loadtxt(_pictures(output, folder) / "depth_intrinsic.txt")[:3, :3])


def test_visible_share_is_that_of_the_best_view(written):
    """Pixels whose surface point lies in the vertices' box, counted from the files; the box also holds its floor."""
    output, folders = written
    folder = folders[1]
    room, K = make_room(3, 1), np.loadtxt(_pictures(output, folder) / "depth_intrinsic.txt")
    best = np.zeros(len(room.objects))
    for _, depth, pose in _views(output, folder):
        v, u = np.indices(depth.shape)
        local = (
            np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(depth)], axis=-1)
            * depth[..., None]
        )
        points = local @ pose[:3, :3].T + pose[:3, 3]
        for k, o in enumerate(room.objects):
            inside = np.abs((points - o.box.center) @ o.box.rotation) <= o.box.extent / 2 + 0.002
            best[k] = max(best[k], inside.all(axis=-1).mean())
    told = json.loads((folder / f"{folder.name}_room.json").read_text())["instances"].values()
    shares = np.array([entry["visible_share"] for entry in told])
    assert shares.max() > 0.02 and (shares <= best + 1e-3).all() and np.abs(shares - best).mean() < 0.01


def test_same_settings_same_bytes(written, tmp_path):
    output, folders = written
    again = write_scannet_rooms(tmp_path, 2, seed=3, **SETTINGS | {"workers": 2})  # other processes
    for first, second in zip(folders, again, strict=False):
        for a, b in ((first, second), (_pictures(output, first), _pictures(tmp_path, second))):
            assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_rooms_are_kept_or_refused(written, tmp_path):
    output, folders = written
    before = {p: p.stat().st_mtime_ns for p in (output / "scans").rglob("*")}
    assert write_scannet_rooms(output, NUM_ROOMS, seed=3, **SETTINGS) == folders
    assert before == {p: p.stat().st_mtime_ns for p in (output / "scans").rglob("*")}
    assert write_scannet_rooms(output, 2, seed=3, **SETTINGS) == folders[:2]
    assert len((output / "scannetv2_train.txt").read_text().split()) == 4  # rooms of an earlier call stay listed
    with pytest.raises(ValueError, match="scene0000_00.*seed 3 instead of 4"):
        write_scannet_rooms(output, 1, seed=4, **SETTINGS)
    (tmp_path / "posed_images" / "scene0000_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="scans/scene0000_00 and .*one is there without the other"):
        write_scannet_rooms(tmp_path, 1, seed=3, **SETTINGS)
    (tmp_path / "scans" / "scene0000_00").mkdir(parents=True)  # a real scan, for one
    with pytest.raises(ValueError, match="no procedural room; move the folder away"):
        write_scannet_rooms(tmp_path, 1, seed=3, **SETTINGS)


def test_an_error_names_the_room_and_leaves_no_scan(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    small = SETTINGS | {"num_poses": 1}
    with monkeypatch.context() as patch:
        patch.setattr("roomplan_lib.scenes.rooms.scannet.write_ply", fail)
        with pytest.raises(RuntimeError, match=r"room scene0000_00 \(seed 3, index 0\): OSError: No space left"):
            write_scannet_rooms(tmp_path, 1, seed=3, **small)
    assert not (tmp_path / "scans" / "scene0000_00").exists()
    (folder,) = write_scannet_rooms(tmp_path, 1, seed=3, **small)  # goes on where it was stopped
    assert folder.is_dir() and not [p for p in tmp_path.rglob(".*")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rooms": 10_001}, "num_rooms"),
        ({"seed": -1}, "seed"),
        ({"num_poses": 0}, "num_poses"),
        ({"image_size": (8, 6)}, "image_size"),
        ({"depth_size": (96, 5000)}, "depth_size"),
    ],
)
def test_settings_out_of_range_are_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_scannet_rooms(**{"output": tmp_path, "num_rooms": 1} | SETTINGS | change)
    assert not list(tmp_path.iterdir())
