"""ScanNet: recordings (`.sens`), the exports of their pictures, boxes in the aligned world, splits."""

import io
import json
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scannet_files import (
    ALIGNMENT,
    BOXES,
    COLOR_K,
    COLOR_SIZE,
    DEPTH_K,
    DEPTH_SIZE,
    LOST,
    SCENE_ID,
    color_and_depth,
    jpeg,
    pack_ply,
    pack_sens,
    parse_sens,
    poses,
    sens_frames,
    write_pictures,
    write_scan,
)
from scene_files import ROOM, walk
from typer.testing import CliRunner

from roomplan_lib import cli
from roomplan_lib.geometry import resize_intrinsics, unproject
from roomplan_lib.samples.views import depth_intrinsics
from roomplan_lib.scenes import scannet
from roomplan_lib.scenes.ply import read_vertices, vertex_positions

META = Path(__file__).parents[2] / "shared" / "data" / "scannet_meta"
LAYOUTS = ("exported", "frames_25k", "posed_images", "frame_files")
needs_meta = pytest.mark.skipif(not META.is_dir(), reason="ScanNet's lists are not at hand")


# .sens ----------------------------------------------------------------------------------------------------------------


def test_a_recording_is_read_as_a_second_writer_wrote_it(tmp_path):
    frames = sens_frames()
    (tmp_path / "a.sens").write_bytes(pack_sens(frames))
    reader = scannet.read_sens(tmp_path / "a.sens")
    header = reader.header
    assert (header.name, header.num_frames, len(reader)) == ("StructureSensor", 6, 6)
    assert (header.color_size, header.depth_size, header.depth_shift) == (COLOR_SIZE, DEPTH_SIZE, 1000.0)
    np.testing.assert_allclose(header.color_intrinsics[:3, :3], COLOR_K)
    np.testing.assert_allclose(header.depth_intrinsics[:3, :3], DEPTH_K)
    np.testing.assert_array_equal(header.depth_extrinsics, np.eye(4))
    found = list(reader)
    assert [frame.index for frame in found] == list(range(6))
    for frame, (pose, color, depth) in zip(found, frames, strict=True):
        assert frame.color_bytes == color
        assert (frame.color_time, frame.depth_time) == (1000 + 33333 * frame.index, 1017 + 33333 * frame.index)
        np.testing.assert_array_equal(frame.color, np.asarray(Image.open(io.BytesIO(color))))
        assert frame.depth.dtype == np.float32
        np.testing.assert_allclose(frame.depth, depth / 1000, rtol=1e-6)
        if frame.index == LOST:
            assert frame.camera_to_world is None
        else:
            np.testing.assert_allclose(frame.camera_to_world, pose, atol=1e-6)


def test_our_recording_is_read_by_a_second_reader(tmp_path):
    frames = [(None if i == LOST else pose, color, depth) for i, (pose, color, depth) in enumerate(sens_frames())]
    count = scannet.write_sens(tmp_path / "a.sens", SCENE_ID, COLOR_K, DEPTH_K, iter(frames))
    assert count == 6
    read = parse_sens((tmp_path / "a.sens").read_bytes())
    assert (read["version"], read["name"], read["num_imu"]) == (4, SCENE_ID, 0)
    assert (read["compressions"], read["sizes"], read["depth_shift"]) == ((2, 1), (*COLOR_SIZE, *DEPTH_SIZE), 1000.0)
    np.testing.assert_allclose(read["matrices"][0][:3, :3], COLOR_K)
    np.testing.assert_array_equal(read["matrices"][1], np.eye(4))
    np.testing.assert_allclose(read["matrices"][2][:3, :3], DEPTH_K)
    for index, ((pose, times, color, depth), wanted) in enumerate(zip(read["frames"], frames, strict=True)):
        assert color == wanted[1] and times[0] == index * 1_000_000 // 30
        np.testing.assert_array_equal(depth, wanted[2])
        if wanted[0] is None:
            assert (pose == -np.inf).all()
        else:
            np.testing.assert_allclose(pose, wanted[0], atol=1e-6)


def test_other_compressions_and_units(tmp_path):
    color, depth = color_and_depth(0)
    png = io.BytesIO()
    Image.fromarray(color).save(png, format="PNG")
    pose = poses()[0]
    cases = {"raw": (0, 0, color.tobytes(), depth), "png": (1, 1, png.getvalue(), depth)}
    for name, (color_compression, depth_compression, stored, millimetres) in cases.items():
        data = pack_sens(
            [(pose, stored, millimetres)],
            color_compression=color_compression,
            depth_compression=depth_compression,
            depth_shift=4000.0,
        )
        (tmp_path / f"{name}.sens").write_bytes(data)
        (frame,) = scannet.read_sens(tmp_path / f"{name}.sens")
        np.testing.assert_array_equal(frame.color, color)
        np.testing.assert_allclose(frame.depth, depth / 4000, rtol=1e-6)
        folder = scannet.export_sens(tmp_path / f"{name}.sens", tmp_path / name, progress=False)
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "color" / "0.png")), color)
        exported = np.asarray(Image.open(folder / "depth" / "0.png"))
        np.testing.assert_allclose(exported, depth / 4, atol=0.501)  # millimetres


def test_memory_does_not_grow_with_the_recording(tmp_path):
    def peak(num: int) -> int:
        frame = sens_frames(1)[0]
        (tmp_path / "a.sens").write_bytes(pack_sens([frame] * num))
        tracemalloc.start()
        count = sum(1 for _ in scannet.read_sens(tmp_path / "a.sens"))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num
        return top

    peak(2)  # what is imported on the first use
    assert peak(400) < peak(4) + 200_000  # Python keeps some freed tuples; the 396 frames have 2.8 million bytes


BOMB = zlib.compress(bytes(60_000_000), 9)  # small enough to pass for the depth of a picture of its size


@pytest.mark.parametrize(
    "changes, frame, expected",
    [
        ({"version": 3}, None, "version 3"),
        ({"name_length": 2**60}, None, f"offset 4: a sensor name of {2**60} bytes"),
        ({"num_frames": 10**12}, None, "1000000000000 frames"),
        ({"num_frames": 2**64 - 1}, None, "frames, more than a file"),
        ({"num_frames": 7}, None, "frame 3 at offset"),
        ({"sizes": (10**6, 10**6, 40, 30)}, None, "1000000x1000000"),
        ({"sizes": (64, 48, 0, 30)}, None, "0x30"),
        ({"sizes": (64, 48, 30, 40 * 2)}, None, "frame 0.*4800 bytes"),
        ({"depth_shift": 0.0}, None, "depth shift 0.0"),
        ({"depth_shift": float("nan")}, None, "depth shift nan"),
        ({"color_compression": 7}, None, "colour compression 7"),
        ({"depth_compression": 2}, None, "depth compression 2"),
        ({}, lambda f: (*f, 2**62, 10), f"frame 1 at offset.*colour of {2**62} bytes"),
        ({}, lambda f: (*f, len(f[1]), 2**40), f"frame 1 at offset.*depth of {2**40} bytes"),
        ({}, lambda f: (f[0], f[1], BOMB), "frame 1 at offset.*more than the 2400 bytes"),
        ({}, lambda f: (f[0], f[1], zlib.compress(bytes(2402))), "frame 1.*more than the 2400 bytes"),
        ({}, lambda f: (f[0], f[1], zlib.compress(bytes(2398))), "frame 1.*2398 instead of the 2400"),
        ({}, lambda f: (f[0], f[1], zlib.compress(bytes(2400))[:-5]), "frame 1.*too early"),
        ({}, lambda f: (f[0], f[1], b"no zlib stream"), "frame 1.*cannot be decompressed"),
    ],
)
def test_hostile_recordings_are_refused_in_bounded_memory(tmp_path, changes, frame, expected):
    frames = sens_frames(3)
    if frame is not None:
        frames[1] = frame(frames[1])
    path = tmp_path / "bad.sens"
    path.write_bytes(pack_sens(frames, **changes))
    del frames
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"bad\.sens: .*{expected}"):
            for _ in scannet.read_sens(path):
                pass
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()


def test_every_truncation_of_a_recording_is_told(tmp_path):
    data = pack_sens(sens_frames(2), num_imu=0)
    path = tmp_path / "cut.sens"
    for end in [*range(0, 340, 7), *range(340, len(data) - 8, 211)]:
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=r"cut\.sens: .*offset \d+: .*fetch the file again"):
            list(scannet.read_sens(path))
    for wanted in (lambda index: False, lambda index: index == 0):  # frames passed over are missed too
        path.write_bytes(data[:-20])
        with pytest.raises(ValueError, match="frame 1"):
            list(scannet.read_sens(path, wanted))


def test_color_of_another_size_or_no_picture_is_refused(tmp_path):
    depth = color_and_depth(0)[1]
    for color, expected in ((jpeg(np.zeros((9, 7, 3), np.uint8)), "7x9 pixels"), (b"no jpeg", "cannot read")):
        (tmp_path / "a.sens").write_bytes(pack_sens([(np.eye(4), color, depth)]))
        (frame,) = scannet.read_sens(tmp_path / "a.sens")
        with pytest.raises(ValueError, match=rf"a\.sens: frame 0.*{expected}"):
            _ = frame.color


def test_write_sens_refuses_what_does_not_fit(tmp_path):
    pose, color, depth = sens_frames(1)[0]
    small = jpeg(np.zeros((8, 8, 3), np.uint8))
    for frames, expected in (
        ([], "no frames"),
        ([(pose, color, depth.astype(np.float32))], "frame 0: depth must be a uint16"),
        ([(pose, b"PNG", depth)], "frame 0: colour must be the bytes of a JPEG"),
        ([(pose, color, depth), (pose, small, depth)], "frame 1: colour and depth"),
        ([(pose[:3], color, depth)], r"frame 0: camera_to_world has shape \(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=expected):
            scannet.write_sens(tmp_path / "a.sens", SCENE_ID, COLOR_K, DEPTH_K, iter(frames))
        assert list(tmp_path.iterdir()) == []


def test_export_is_the_official_layout_and_continues(tmp_path):
    frames = sens_frames()
    sens = tmp_path / SCENE_ID / f"{SCENE_ID}.sens"
    sens.parent.mkdir()
    sens.write_bytes(pack_sens(frames))
    folder = scannet.export_sens(sens, tmp_path / "out", every=2, progress=False)
    for kind, ending in (("color", "jpg"), ("depth", "png"), ("pose", "txt")):
        assert {path.name for path in (folder / kind).iterdir()} == {f"{i}.{ending}" for i in (0, 2, 4)}
    assert (folder / "color" / "4.jpg").read_bytes() == frames[4][1]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "depth" / "4.png")), frames[4][2])
    np.testing.assert_allclose(np.loadtxt(folder / "pose" / "4.txt"), frames[4][0], atol=1e-6)
    assert (np.loadtxt(folder / "pose" / f"{LOST}.txt") == -np.inf).all()
    np.testing.assert_allclose(np.loadtxt(folder / "intrinsic" / "intrinsic_depth.txt")[:3, :3], DEPTH_K)
    assert (folder / "intrinsic" / "extrinsic_color.txt").is_file()

    # What an interrupted export left: the picture of frame 4, not yet its pose.
    (folder / "pose" / "4.txt").unlink()
    (folder / "color" / "4.jpg").write_bytes(b"half")
    before = (folder / "color" / "0.jpg").stat().st_mtime_ns
    scannet.export_sens(sens, tmp_path / "out", progress=False)
    assert (folder / "color" / "4.jpg").read_bytes() == frames[4][1]
    assert (folder / "color" / "0.jpg").stat().st_mtime_ns == before
    assert len(list((folder / "pose").iterdir())) == 6

    other = tmp_path / "other.sens"
    other.write_bytes(pack_sens(frames[:3]))
    with pytest.raises(ValueError, match="holds the export of"):
        scannet.export_sens(other, tmp_path / "out", progress=False)

    scannet.export_sens(sens, progress=False)  # beside the recording
    assert len(scannet.read_scene(sens.parent).views) == 5


def test_a_recording_without_pictures_leaves_mesh_and_boxes(tmp_path):
    scan = write_scan(tmp_path)
    (scan / f"{SCENE_ID}.sens").write_bytes(pack_sens(sens_frames()))
    scene = scannet.read_scene(scan)
    assert scene.views == [] and [box.object_id for box in scene.boxes] == [box.object_id for box in BOXES]
    assert scene.mesh_path.is_file() and f"roomplan prepare sens --scans {scan}" in scene.metadata["no_views"]

    bare = tmp_path / "bare" / "scene0200_00"  # nothing but the recording
    bare.mkdir(parents=True)
    (bare / "scene0200_00.sens").write_bytes(pack_sens(sens_frames()))
    scene = scannet.read_scene(bare)
    assert (scene.views, scene.boxes, scene.mesh_path) == ([], [], None) and "prepare sens" in scene.metadata[
        "no_views"
    ]


def test_recordings_exported_to_a_folder_are_found_beside_their_scans(tmp_path):
    scan = write_scan(tmp_path)
    other = tmp_path / "scans" / "scene0200_00"
    other.mkdir()
    for folder in (scan, other):
        (folder / f"{folder.name}.sens").write_bytes(pack_sens(sens_frames()))
    before = set(scan.iterdir())
    options = ["--scans", str(tmp_path / "scans"), "--output", str(tmp_path / "exported"), "--every", "1"]
    result = CliRunner().invoke(cli.app, ["prepare", "sens", *options])
    assert result.exit_code == 0, result.output
    assert {folder.name for folder in (tmp_path / "exported").iterdir()} == {SCENE_ID, other.name}
    assert set(scan.iterdir()) == before
    for folder in (scan, tmp_path / "exported" / SCENE_ID):
        scene = scannet.read_scene(folder)
        assert len(scene.views) == 5 and len(scene.boxes) == 4 and "no_views" not in scene.metadata
        assert scene.views[0].rgb_path == tmp_path / "exported" / SCENE_ID / "color" / "0.jpg"


# Views ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_exports_give_the_same_aligned_views(tmp_path, layout):
    scan = write_scan(tmp_path)
    folder = write_pictures(tmp_path / "pictures" / SCENE_ID, layout)
    scene = scannet.read_scene(scan)
    assert scene.metadata["layout"] == layout and scene.metadata["num_invalid_poses"] == 1
    kept = [i for i in range(6) if i != LOST]
    assert len(scene.views) == 5 and all(view.posed and view.rgb_path.is_relative_to(folder) for view in scene.views)
    assert [view.timestamp for view in scene.views] == sorted(view.timestamp for view in scene.views)
    for view, index in zip(scene.views, kept, strict=True):
        assert (view.width, view.height) == COLOR_SIZE and view.load_rgb().shape == (48, 64, 3)
        np.testing.assert_allclose(view.K, COLOR_K)
        np.testing.assert_allclose(view.depth_K, DEPTH_K)
        np.testing.assert_allclose(view.camera_to_world, walk(6)[index], atol=1e-5)  # 6 digits on disk
        # Depth, with its own camera, lands on the walls and boxes of the aligned world.
        points, valid = unproject(view.load_depth(), view.depth_K, view.camera_to_world)
        points = points[valid]
        gaps = [np.abs(np.abs(points - box.center) - box.extent / 2).min(-1) for box in (*BOXES, ROOM)]
        assert valid.all() and np.min(gaps, axis=0).max() < 0.002
        shifted, _ = unproject(
            view.load_depth(), resize_intrinsics(view.K, COLOR_SIZE, DEPTH_SIZE), view.camera_to_world
        )
        gaps = [np.abs(np.abs(shifted - box.center) - box.extent / 2).min(-1) for box in (*BOXES, ROOM)]
        assert np.min(gaps, axis=0).max() > 0.01  # the check tells the two cameras apart


def test_scan_and_pictures_find_each_other(tmp_path):
    scan = write_scan(tmp_path)
    posed = write_pictures(tmp_path / "posed_images" / SCENE_ID, "posed_images")
    inside = write_pictures(tmp_path / "elsewhere" / "deep" / SCENE_ID, "exported")
    from_scan, from_pictures = scannet.read_scene(scan), scannet.read_scene(posed)
    for a, b in zip(from_scan.views, from_pictures.views, strict=True):
        assert a.rgb_path == b.rgb_path
        np.testing.assert_array_equal(a.camera_to_world, b.camera_to_world)
    assert [box.object_id for box in from_pictures.boxes] == [box.object_id for box in from_scan.boxes]
    assert scannet.read_scene(scan, images_dir=inside).views[0].rgb_path.parent == inside / "color"
    np.testing.assert_allclose(scannet.read_axis_alignment(posed), ALIGNMENT, atol=1e-6)
    assert scannet.find_scenes(tmp_path) == [scan]
    assert scannet.find_scenes(tmp_path / "posed_images") == [posed]

    shutil.rmtree(scan)
    alone = scannet.read_scene(posed)  # without the scan: the mesh's world, no boxes, and the metadata says so
    assert alone.metadata["axis_alignment"] is None and alone.boxes == []
    np.testing.assert_allclose(alone.views[0].camera_to_world, poses()[0], atol=1e-6)


def test_resized_pictures_with_old_intrinsics_are_refused(tmp_path):
    folder = write_pictures(tmp_path / SCENE_ID, "exported")
    for path in (folder / "color").iterdir():
        Image.open(path).resize((32, 24)).save(path)
    with pytest.raises(ValueError, match="32x24 pixels, its intrinsics put the principal point at 32.5, 23.0"):
        scannet.read_scene(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_that_lacks_its_depth_is_dropped_and_counted(tmp_path, layout):
    folder = write_pictures(tmp_path / SCENE_ID, layout)
    whole = scannet.read_scene(folder)
    assert whole.metadata["num_without_depth"] == 0
    whole.views[2].depth_path.unlink()
    scene = scannet.read_scene(folder)
    assert [v.view_id for v in scene.views] == [v.view_id for i, v in enumerate(whole.views) if i != 2]
    assert scene.metadata["num_without_depth"] == 1 and scene.metadata["num_invalid_poses"] == 1
    for view in scene.views:
        assert view.load_depth().shape == (30, 40)


def test_endings_in_capitals_are_read_alike(tmp_path):
    for layout in LAYOUTS[:3]:
        folder = write_pictures(tmp_path / layout / SCENE_ID, layout)
        for path in [*folder.rglob("*.jpg"), *folder.rglob("*.png")]:
            path.rename(path.with_suffix(path.suffix.upper()))
        views = scannet.read_scene(folder).views
        assert len(views) == 5 and views[0].rgb_path.suffix == ".JPG"
        assert views[0].load_rgb().shape == (48, 64, 3) and views[0].load_depth().shape == (30, 40)


def test_depth_without_intrinsics_of_its_own_has_the_color_camera_s_scaled(tmp_path):
    folder = write_pictures(tmp_path / SCENE_ID, "posed_images")
    assert "depth_intrinsics" not in scannet.read_scene(folder).metadata
    (folder / "depth_intrinsic.txt").unlink()
    scene = scannet.read_scene(folder)
    assert scene.metadata["depth_intrinsics"] == "scaled: no depth_intrinsic.txt"
    # 64x48 to 40x30 is 5/8; a pixel's centre is its integer coordinate, so 32.5 becomes 33 * 5/8 - 1/2.
    expected = [[57 * 0.625, 0, 20.125], [0, 58 * 0.625, 14.1875], [0, 0, 1]]
    np.testing.assert_allclose(depth_intrinsics(scene.views[0], DEPTH_SIZE), expected)


def test_missing_and_malformed_pictures_name_the_file(tmp_path):
    def broken(change) -> str:
        folder = write_pictures(tmp_path / SCENE_ID, "exported")
        change(folder)
        try:
            with pytest.raises(ValueError) as error:
                scannet.read_scene(folder)
            return str(error.value)
        finally:
            shutil.rmtree(folder)

    assert "pose/3.txt: file is missing" in broken(lambda f: (f / "pose/3.txt").unlink())
    assert "0.jpg: its depth picture is missing, like those of 4 of 6" in broken(
        lambda f: [(f / f"depth/{i}.png").unlink() for i in range(4)]
    )
    assert "like those of 6 of 6" in broken(lambda f: [path.unlink() for path in (f / "depth").iterdir()])
    assert "intrinsic_depth.txt: file is missing" in broken(lambda f: (f / "intrinsic/intrinsic_depth.txt").unlink())
    assert "pose/1.txt: expected 16 numbers" in broken(lambda f: (f / "pose/1.txt").write_text("1 0 0"))
    sheared = "1 0.2 0 0 0 1 0 0 0 0 1 0 0 0 0 1"
    assert "pose/1.txt: expected a 4x4 rotation" in broken(lambda f: (f / "pose/1.txt").write_text(sheared))
    K = "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0"
    assert "intrinsic_color.txt" in broken(lambda f: (f / "intrinsic/intrinsic_color.txt").write_text(K))
    lost = [f"pose/{i}.txt" for i in range(6)]
    assert "none of 6 pictures" in broken(lambda f: [(f / p).write_text("-1.#INF " * 16) for p in lost])
    assert "cannot read the picture" in broken(lambda f: (f / "color/0.jpg").write_bytes(b"\xff\xd8\xff"))


# Boxes and tables -----------------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_aligned_vertices(tmp_path):
    scene = scannet.read_scene(write_scan(tmp_path))
    assert scene.views == [] and scene.visit_id == "scene0123" and scene.split == "" and scene.source == "scannet"
    assert [(box.object_id, box.label) for box in scene.boxes] == [(box.object_id, box.label) for box in BOXES]
    for box, wanted in zip(scene.boxes, BOXES, strict=True):
        # Single precision of the mesh and six digits of the alignment stay below 0.01 mm.
        np.testing.assert_allclose(box.center, wanted.center, atol=1e-5)
        np.testing.assert_allclose(box.extent, wanted.extent, atol=1e-5)
        np.testing.assert_array_equal(box.rotation, np.eye(3))
    assert scene.metadata["num_empty_objects"] == 1 and scene.metadata["scene_type"] == "Bedroom / Hotel"
    assert {key: told["category"] for key, told in scene.attributes.items()} == {
        "0": "chair",
        "1": "cabinet",
        "2": "sofa",
    }

    mesh = vertex_positions(read_vertices(scene.mesh_path))
    to_world = np.array(scene.metadata["mesh_to_world"])
    on_floor = mesh[:2] @ to_world[:3, :3].T + to_world[:3, 3]
    np.testing.assert_allclose(on_floor, [[-3, -2.5, 0], [3, 2.5, 0]], atol=1e-5)


def test_mesh_center_is_in_the_mesh_s_own_world(tmp_path):
    scan = write_scan(tmp_path)
    posed = write_pictures(tmp_path / "posed_images" / SCENE_ID, "posed_images")
    rows = (scan / f"{SCENE_ID}_vh_clean_2.ply").read_bytes().split(b"end_header\n")[1]
    xyz = np.array([struct.unpack_from("<3f", rows, 16 * i) for i in range(3 + 160 + 1)])
    expected = [(min(axis) + max(axis)) / 2 for axis in xyz.T]
    np.testing.assert_allclose(scannet.mesh_center(scan), expected, atol=1e-6)
    np.testing.assert_allclose(scannet.mesh_center(posed), expected, atol=1e-6)
    aligned = (ALIGNMENT @ [*expected, 1])[:3]
    assert np.linalg.norm(aligned - [0, 0, 1.25]) > 0.02  # which is not the middle of the aligned mesh
    (scan / f"{SCENE_ID}_vh_clean_2.ply").unlink()
    assert scannet.mesh_center(scan) is None


def test_a_test_scan_has_no_alignment(tmp_path):
    scan = write_scan(tmp_path, alignment=None, folder="scans_test")
    np.testing.assert_array_equal(scannet.read_axis_alignment(scan), np.eye(4))
    scene = scannet.read_scene(scan)
    assert scene.split == "test" and scene.metadata["axis_alignment"] is None
    np.testing.assert_allclose(scene.boxes[0].center, BOXES[0].center, atol=1e-5)


@needs_meta
def test_the_real_alignment_of_scene0000_00(tmp_path):
    folder = tmp_path / "scene0000_00"
    folder.mkdir()
    shutil.copy(META / "scene0000_00.txt", folder)
    alignment = scannet.read_axis_alignment(folder)
    np.testing.assert_array_equal(alignment[0], [0.945519, 0.325568, 0, -5.384390])
    np.testing.assert_array_equal(alignment[:, 3], [-5.384390, -2.871780, -0.064350, 1])
    # aligned = A p: the room's origin lies at the translation, z stays up.
    np.testing.assert_allclose(alignment @ [0, 0, 1, 1], [-5.384390, -2.871780, 0.93565, 1])


@needs_meta
def test_splits_come_from_the_official_lists(tmp_path):
    counts = {}
    for split in ("train", "val", "test"):
        shutil.copy(META / f"scannetv2_{split}.txt", tmp_path)
        counts[split] = len((META / f"scannetv2_{split}.txt").read_text().split())
    assert counts == {"train": 1201, "val": 312, "test": 100}
    for scene_id, split in (("scene0191_00", "train"), ("scene0011_00", "val"), ("scene0707_00", "test")):
        scan = write_scan(tmp_path, scene_id)
        assert scannet.read_scene(scan).split == split == scannet.scene_split(scan)
        assert scannet.scene_split(scan, tmp_path / "scans") == ""
        assert scannet.read_scene(scan, lists_dir=META).split == split
    (tmp_path / "scannetv2_val.txt").write_text("scene0191_00\n")
    with pytest.raises(ValueError, match="scene0191_00: in the lists of train and val"):
        scannet.read_scene(tmp_path / "scans" / "scene0191_00")


def test_the_table_of_labels_names_nyu40_classes(tmp_path):
    scan = write_scan(tmp_path)
    rows = [
        ("id", "raw_category", "category", "nyu40class"),
        ("1", "curtain", "curtain", "curtain"),
        ("2", "couch", "sofa", "sofa"),
    ]
    (tmp_path / "scannetv2-labels.combined.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    attributes = scannet.read_scene(scan).attributes
    assert attributes["2"] == {"category": "sofa", "nyu40": "sofa"} and attributes["7"] == {"nyu40": "curtain"}
    assert attributes["0"] == {"category": "chair"}


def test_a_byte_order_mark_changes_nothing(tmp_path):
    plain = scannet.read_scene(write_scan(tmp_path / "plain"))
    scan = write_scan(tmp_path / "marked")
    texts = [path for path in scan.iterdir() if path.suffix in (".txt", ".json")]
    assert len(texts) == 3
    for path in texts:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (tmp_path / "marked" / "scannetv2_val.txt").write_bytes(b"\xef\xbb\xbf" + SCENE_ID.encode())
    marked = scannet.read_scene(scan)
    assert marked.metadata == plain.metadata and marked.split == "val"
    assert [box.center.tolist() for box in marked.boxes] == [box.center.tolist() for box in plain.boxes]


def test_malformed_annotation_names_the_file(tmp_path):
    def broken(ending: str, change) -> str:
        scan = write_scan(tmp_path)
        path = scan / f"{SCENE_ID}{ending}"
        if change is None:
            path.unlink()
        elif ending.endswith(".json"):
            data = json.loads(path.read_text())
            path.write_text(json.dumps(change(data)))
        else:
            path.write_bytes(change(path.read_bytes()))
        try:
            with pytest.raises(ValueError, match=path.name) as error:
                scannet.read_scene(scan)
            return str(error.value)
        finally:
            shutil.rmtree(scan)

    aggregation, segments = ".aggregation.json", "_vh_clean_2.0.010000.segs.json"
    assert "missing" in broken(".txt", None)
    assert "16 numbers" in broken(".txt", lambda text: b"axisAlignment = 1 2 3")
    assert "rotation" in broken(".txt", lambda text: b"axisAlignment = " + b"2 " * 16)
    assert "rotation" in broken(".txt", lambda text: b"axisAlignment = " + b"nan " * 16)
    assert "missing" in broken(segments, None)
    assert "164" in broken(segments, lambda data: {"segIndices": data["segIndices"][:-1]})
    assert "whole number" in broken(segments, lambda data: {"segIndices": [0.5]})
    assert "NaN" in broken(segments, lambda data: {"segIndices": [float("nan")]})
    assert "segment 9" in broken(aggregation, lambda d: {"segGroups": [{"objectId": 1, "label": "a", "segments": [9]}]})
    group = {"objectId": 1, "label": "a", "segments": []}
    assert "two objects have the objectId 1" in broken(aggregation, lambda data: {"segGroups": [group, group]})
    assert "segGroups" in broken(aggregation, lambda data: [])
    assert "missing" in broken("_vh_clean_2.ply", None)
    assert "header tells of 164" in broken("_vh_clean_2.ply", lambda data: data[:900])


# Meshes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["binary_little_endian", "binary_big_endian", "ascii"])
def test_vertices_of_each_ply_format(tmp_path, form):
    points = np.random.default_rng(0).normal(size=(17, 3)).astype(np.float32)
    (tmp_path / "a.ply").write_bytes(pack_ply(points, form))
    vertices = read_vertices(tmp_path / "a.ply")
    np.testing.assert_allclose(vertex_positions(vertices), points, rtol=1e-6)
    assert vertices["green"].tolist() == [20] * 17 and vertices["alpha"].tolist() == [255] * 17


def test_malformed_meshes_are_refused(tmp_path):
    good = pack_ply(np.zeros((4, 3)))
    text = pack_ply(np.zeros((4, 3)), "ascii")
    path = tmp_path / "bad.ply"
    for data, expected in (
        (b"", "no PLY"),
        (good[:60], "no PLY"),
        (good.replace(b"vertex 4", b"vertex 999999999999"), "999999999999 vertices"),
        (text.replace(b"vertex 4", b"vertex 999999999999"), "999999999999 vertices"),
        (good.replace(b"vertex 4", b"vertex -4"), "vertices as the first element"),
        (good.replace(b"float x", b"list uchar int x"), "is not read"),
        (good.replace(b"float x", b"float y"), "x, y and z once"),
        (good.replace(b"little_endian", b"middle_endian"), "format"),
        (text.replace(b"0 0 0 10", b"0 zero 0 10", 1), "vertex 0"),
        (text.replace(b"0 0 0 10", b"0 0 10", 1), "vertex 0"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"bad\.ply: .*{expected}"):
            read_vertices(path)
