"""EmbodiedScan's infos: boxes with three angles in the aligned world, and pickles that are no plain numbers."""

import math
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scannet_files import ALIGNMENT, COLOR_K, COLOR_SIZE, DEPTH_K, DEPTH_SIZE, LOST, homogeneous, poses
from scene_files import walk

from roomplan_lib.scenes.embodiedscan import read_infos

ANGLES = (0.7, -0.2, 0.35)


def rotation_about(axis: int, angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def infos(per_image_cameras: bool = False, dataset: str = "scannet") -> dict:
    cameras = {"cam2img": homogeneous(COLOR_K), "depth_cam2img": homogeneous(DEPTH_K)}
    images = [
        {
            "img_path": f"{dataset}/posed_images/scene0123_01/{index * 10:05}.jpg",
            "depth_path": f"{dataset}/posed_images/scene0123_01/{index * 10:05}.png",
            "cam2global": pose,
            "visible_instance_ids": [1, 4],
            **(cameras if per_image_cameras else {}),
        }
        for index, pose in enumerate(poses())
    ]
    entry = {
        "sample_idx": f"{dataset}/scene0123_01",
        "images": images,
        "axis_align_matrix": ALIGNMENT,
        **({} if per_image_cameras else cameras),
        "instances": [
            {"bbox_3d": [1.0, 2.0, 0.5, 0.8, 0.6, 1.0, *ANGLES], "bbox_label_3d": 7, "bbox_id": 4},
            {"bbox_3d": np.array([0.0, 0, 1, 2, 3, 4, 0.25, 0, 0]), "bbox_label_3d": np.int64(2), "bbox_id": 1},
        ],
    }
    other = {**entry, "sample_idx": "3rscan/0ad2d38f"}
    return {"metainfo": {"categories": {"desk": 2, "chair": 7}, "DATASET": "EmbodiedScan"}, "data_list": [other, entry]}


@pytest.fixture
def data_root(tmp_path):
    for dataset in ("scannet", "matterport3d"):
        folder = tmp_path / "data" / dataset / "posed_images" / "scene0123_01"
        folder.mkdir(parents=True)
        for index in range(6):
            Image.new("RGB", COLOR_SIZE).save(folder / f"{index * 10:05}.jpg")
            Image.fromarray(np.full(DEPTH_SIZE[::-1], 2000, np.uint16)).save(folder / f"{index * 10:05}.png")
    return tmp_path / "data"


def write(path: Path, data: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_views_and_boxes_are_in_the_aligned_world(tmp_path, data_root, protocol):
    path = write(tmp_path / "embodiedscan_infos_val.pkl", infos(per_image_cameras=protocol % 2 == 1), protocol)
    (scene,) = read_infos(path, data_root, progress=False)
    assert (scene.scene_id, scene.visit_id, scene.split, scene.source) == (
        "scene0123_01",
        "scene0123",
        "val",
        "embodiedscan",
    )
    assert scene.metadata == {"sample_idx": "scannet/scene0123_01", "num_invalid_poses": 1}
    kept = [index for index in range(6) if index != LOST]
    for view, index in zip(scene.views, kept, strict=True):
        assert view.view_id == f"{index * 10:05}" and (view.width, view.height) == COLOR_SIZE
        np.testing.assert_allclose(view.camera_to_world, walk(6)[index], atol=1e-9)
        np.testing.assert_array_equal(view.K, COLOR_K)
        np.testing.assert_array_equal(view.depth_K, DEPTH_K)
        assert view.load_depth()[3, 3] == 2.0
    chair, desk = scene.boxes
    assert (chair.label, chair.object_id, desk.label, desk.object_id) == ("chair", "4", "desk", "1")
    # Intrinsic turns about z, the new x, the new y: the matrices multiply from left to right.
    expected = rotation_about(2, ANGLES[0]) @ rotation_about(0, ANGLES[1]) @ rotation_about(1, ANGLES[2])
    np.testing.assert_allclose(chair.rotation, expected, atol=1e-12)
    np.testing.assert_array_equal(chair.center, [1, 2, 0.5])
    np.testing.assert_array_equal(chair.extent, [0.8, 0.6, 1.0])
    assert desk.yaw == pytest.approx(0.25)


def test_matterport_depth_has_4000_units_per_metre(tmp_path, data_root):
    path = write(tmp_path / "infos.pkl", infos(dataset="matterport3d"))
    (scene,) = read_infos(path, data_root, datasets=("matterport3d",), progress=False)
    assert scene.views[0].load_depth()[0, 0] == 0.5 and scene.split == "" and scene.visit_id == ""


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def test_pickles_with_code_are_refused_by_name_and_run_nothing(tmp_path, data_root):
    mark = tmp_path / "ran"
    for function, args, name in (
        (os.system, (f"touch {mark}",), "system"),
        (eval, (f"open({str(mark)!r}, 'w')",), "eval"),
        (getattr, ("text", "upper"), "getattr"),
        (bytearray, (10**12,), "bytearray"),
        (np.lib.format.open_memmap, (str(mark), "w+", "f4", (2,)), "open_memmap"),
        (np.load, (str(mark),), "load"),
    ):
        for protocol in (0, 2, 4, 5):
            path = write(tmp_path / "bad.pkl", {"data_list": [Runs(function, *args)]}, protocol)
            with pytest.raises(ValueError, match=rf"bad\.pkl: asks for [\w.]+\.{name}, .*may run code"):
                list(read_infos(path, data_root, progress=False))
            assert not mark.exists()


@pytest.mark.parametrize(
    "values",
    [np.array([print, None], dtype=object), np.zeros(2, dtype=[("a", "f4"), ("b", "O")]), np.array(["text"])],
    ids=["objects", "record", "text"],
)
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, data_root, values):
    path = write(tmp_path / "bad.pkl", {"data_list": values})
    with pytest.raises(ValueError, match=r"bad\.pkl: (arrays of the type|asks for builtins\.print)"):
        list(read_infos(path, data_root, progress=False))


def array_pickle(code: str, shape: tuple, stored: bytes) -> bytes:
    """An array's pickle whose type, shape and bytes need not fit."""

    class Array:
        def __reduce__(self):
            reconstruct = np.zeros(1).__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(code), False, stored)

    return pickle.dumps({"data_list": Array()}, 4)


def test_memory_stays_bounded(tmp_path, data_root):
    huge = {
        "memo": b"\x80\x02N" + b"r" + struct.pack("<I", 2**24) + b"}.",
        "text memo": b"\x80\x02Np99999999999999999999\n}.",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
        "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b"x.",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.",
        "number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
        "shape": array_pickle("<f8", (10**6, 10**6), bytes(80)),
        "negative shape": array_pickle("<f8", (-3,), bytes(80)),
    }
    for name, data in huge.items():
        path = tmp_path / "huge.pkl"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=r"huge\.pkl: "):
                list(read_infos(path, data_root, progress=False))
            assert tracemalloc.get_traced_memory()[1] < 1_000_000, name
        finally:
            tracemalloc.stop()


def test_lists_that_hold_each_other_many_times_are_refused_at_once(tmp_path, data_root):
    laughs = [1.0]
    for _ in range(60):
        laughs = [laughs] * 4
    data = infos()
    data["data_list"][1]["axis_align_matrix"] = laughs
    path = write(tmp_path / "bad.pkl", data)
    with pytest.raises(ValueError, match="axis_align_matrix: expected"):
        list(read_infos(path, data_root, progress=False))


def test_truncated_and_other_files(tmp_path, data_root):
    good = pickle.dumps(infos(), 4)
    path = tmp_path / "cut.pkl"
    for end in range(0, len(good) - 1, 97):
        path.write_bytes(good[:end])
        with pytest.raises(ValueError, match=r"cut\.pkl: "):
            list(read_infos(path, data_root, progress=False))
    rng = np.random.default_rng(0)
    for _ in range(300):  # changed bytes end in scenes or in one kind of error
        bad = bytearray(good)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        try:
            list(read_infos(path, data_root, progress=False))
        except ValueError as error:
            assert "cut.pkl" in str(error)
    with pytest.raises(ValueError, match=r"none\.pkl: cannot read the file"):
        list(read_infos(tmp_path / "none.pkl", data_root, progress=False))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda e: e["images"][1].update(img_path="../../etc/passwd.jpg"), r"images\[1\].*without `\.\.`"),
        (lambda e: e["images"][1].update(img_path="scannet/none.jpg"), r"images\[1\].*picture is missing"),
        (
            lambda e: e["images"][1].update(cam2global=np.ones((4, 4))),
            r"images\[1\]: cam2global: expected a 4x4 rotation",
        ),
        (
            lambda e: e["images"][1].pop("cam2global"),
            r"images\[1\]: cam2global: expected \(4, 4\) numbers, got NoneType",
        ),
        (lambda e: e.pop("cam2img"), "neither it nor its scene has cam2img"),
        (lambda e: e.pop("axis_align_matrix"), "axis_align_matrix: expected"),
        (lambda e: e["instances"][0].update(bbox_3d=[1.0] * 6), r"instances\[0\]: bbox_3d: expected \(9,\) numbers"),
        (lambda e: e["instances"][0].update(bbox_3d=[float("nan")] * 9), r"instances\[0\]: bbox_3d has infinite"),
        (lambda e: e["instances"][0].update(bbox_3d=[1.0] * 3 + [-1.0] * 6), r"instances\[0\].*at least 0 m"),
        (lambda e: e["instances"][0].update(bbox_label_3d=99), r"instances\[0\]: bbox_label_3d 99 is not in"),
        (lambda e: e["instances"][0].update(bbox_id="four"), r"instances\[0\]: bbox_id: expected int, got str"),
    ],
)
def test_malformed_entries_are_named(tmp_path, data_root, change, expected):
    data = infos()
    change(data["data_list"][1])
    path = write(tmp_path / "infos.pkl", data)
    with pytest.raises(ValueError, match=rf"infos\.pkl: scannet/scene0123_01: .*{expected}|infos\.pkl: .*{expected}"):
        list(read_infos(path, data_root, progress=False))
