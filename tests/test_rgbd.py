"""Folders of posed RGB-D pictures: the real Redwood frames, and 7-Scenes, 3DMatch and TUM written by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import invert_pose, project, unproject
from roomplan_lib.scenes import rgbd

REDWOOD = Path(__file__).parents[2] / "shared" / "data" / "rgbd_redwood"
needs_redwood = pytest.mark.skipif(not REDWOOD.is_dir(), reason="the Redwood frames are not at hand")
# A walk in a world whose y axis points down, as a first camera that was held level makes it.
POSES = [np.eye(4) for _ in range(3)]
for k, pose in enumerate(POSES):
    pose[:3, :3] = Rotation.from_euler("y", 20 * k, degrees=True).as_matrix()
    pose[:3, 3] = [0.1 * k, 0.02 * k, 0.3 * k]


def reprojection_error_mm(source, target, pose_of) -> float:
    """Median difference between the depth of one view's points in another view and that view's own depth there."""
    points, valid = unproject(source.load_depth(), source.K, pose_of(source))
    pixels, z = project(points[valid], target.K, pose_of(target))
    depth = target.load_depth()
    inside = (np.isfinite(pixels) & (pixels > -0.5) & (pixels < np.array(depth.shape[::-1]) - 0.5)).all(-1)
    column, row = np.round(pixels[inside]).astype(int).T
    seen = depth[row, column]
    return float(np.median(np.abs(seen - z[inside])[seen > 0]) * 1000)


@needs_redwood
def test_redwood_reprojects_within_millimetres_and_not_with_flipped_poses():
    scene = rgbd.read_scene(REDWOOD)
    assert [view.view_id for view in scene.views] == [f"{i:05}" for i in range(5)]
    first, second, last = scene.views[0], scene.views[1], scene.views[4]
    np.testing.assert_allclose(first.K, [[525, 0, 319.5], [0, 525, 239.5], [0, 0, 1]])
    for a, b in ((first, second), (first, last), (last, first)):
        assert reprojection_error_mm(a, b, lambda view: view.camera_to_world) < 6
    for a, b in ((first, last), (last, first)):
        assert reprojection_error_mm(a, b, lambda view: invert_pose(view.camera_to_world)) > 60
        assert reprojection_error_mm(a, b, lambda view: np.eye(4)) == pytest.approx(40, abs=3)
    assert np.linalg.norm(first.camera_to_world[:3, 3] - last.camera_to_world[:3, 3]) == pytest.approx(0.098, abs=5e-4)


@needs_redwood
def test_redwood_worlds_with_y_up_and_y_down_both_become_z_up(tmp_path):
    shutil.copytree(REDWOOD, tmp_path / "copy")
    y_up = rgbd.read_scene(tmp_path / "copy")
    (tmp_path / "copy" / "trajectory.log").unlink()  # the other list has its first camera's axes: y down
    y_down = rgbd.read_scene(tmp_path / "copy")
    assert (y_up.metadata["up_axis"], y_down.metadata["up_axis"]) == ("+y", "-y")
    for scene in (y_up, y_down):
        for view in scene.views:
            assert -view.camera_to_world[2, 1] > 0.99  # the picture's upward direction is the world's
            assert np.linalg.det(view.camera_to_world[:3, :3]) == pytest.approx(1, abs=1e-5)
        assert reprojection_error_mm(scene.views[0], scene.views[4], lambda view: view.camera_to_world) < 6


def test_each_up_axis_becomes_plus_z():
    for axis, turn in rgbd.UP_ROTATIONS.items():
        up = np.zeros(3)
        up["xyz".index(axis[1])] = 1 if axis[0] == "+" else -1
        np.testing.assert_array_equal(np.array(turn) @ up, [0, 0, 1])
        assert np.linalg.det(turn) == pytest.approx(1)


def write_frames(folder: Path, size=(640, 480), ending="png") -> Path:
    folder.mkdir(parents=True)
    for k, pose in enumerate(POSES):
        Image.new("RGB", size, (k, 0, 0)).save(folder / f"frame-{k:06}.color.png")
        depth = np.full(size[::-1], 1500 + k, np.uint16)
        depth[0, :2] = 0, 65535  # both mean missing
        if ending == "pgm":
            header = f"P5\n{size[0]} {size[1]}\n65535\n".encode()
            (folder / f"frame-{k:06}.depth.pgm").write_bytes(header + depth.astype(">u2").tobytes())
        else:
            Image.fromarray(depth).save(folder / f"frame-{k:06}.depth.png")
        rows = "\n".join("\t ".join(f"{x:.7e}" for x in row) for row in pose)
        (folder / f"frame-{k:06}.pose.txt").write_text(rows + "\n")
    return folder


@pytest.mark.parametrize("ending", ["png", "pgm"])
def test_seven_scenes(tmp_path, ending):
    scene = rgbd.read_scene(write_frames(tmp_path / "chess" / "seq-01", ending=ending))
    assert scene.scene_id == "chess_seq-01" and scene.metadata["up_axis"] == "-y" and len(scene.views) == 3
    view = scene.views[1]
    np.testing.assert_array_equal(view.K, [[585, 0, 320], [0, 585, 240], [0, 0, 1]])
    depth = view.load_depth()
    assert depth[0, :3].tolist() == [0, 0, np.float32(1501 / 1000)]
    # y down becomes z up: (x, y, z) -> (x, z, -y).
    np.testing.assert_allclose(view.camera_to_world[:3, 3], [0.1, 0.3, -0.02], atol=1e-7)
    np.testing.assert_allclose(view.camera_to_world[:3, 1], [0, 0, -1], atol=1e-7)
    kept = rgbd.read_scene(tmp_path / "chess" / "seq-01", up="+z")
    np.testing.assert_allclose([view.camera_to_world for view in kept.views], POSES, atol=1e-7)
    with pytest.raises(ValueError, match="up: expected one of"):
        rgbd.read_scene(tmp_path / "chess" / "seq-01", up="y")


def test_3dmatch_intrinsics_lie_here_or_one_folder_up(tmp_path):
    folder = write_frames(tmp_path / "sun3d" / "seq-01", size=(64, 48))
    with pytest.raises(ValueError, match="camera-intrinsics.txt"):  # no camera is made up for other sizes
        rgbd.read_scene(folder)
    (tmp_path / "sun3d" / "camera-intrinsics.txt").write_text(" 58.5 0 32\n0 58.5 24\n0 0 1\n")
    np.testing.assert_array_equal(rgbd.read_scene(folder).views[0].K, [[58.5, 0, 32], [0, 58.5, 24], [0, 0, 1]])
    (folder / "camera-intrinsics.txt").write_text("57 0 31 0 57 25 0 0 1")
    assert rgbd.read_scene(folder).views[0].K[1, 2] == 25


def write_tum(folder: Path) -> Path:
    (folder / "rgb").mkdir(parents=True)
    (folder / "depth").mkdir()
    rgb, depth, truth = ["# color images"], ["# depth maps"], ["# timestamp tx ty tz qx qy qz qw"]
    for k, pose in enumerate(POSES):
        time = 1305031102.0 + k / 10
        Image.new("RGB", (64, 48)).save(folder / "rgb" / f"{time:.6f}.png")
        Image.fromarray(np.full((48, 64), 5000 * (k + 1), np.uint16)).save(folder / "depth" / f"{time + 0.015:.6f}.png")
        rgb.append(f"{time:.6f} rgb/{time:.6f}.png")
        depth.append(f"{time + 0.015:.6f} depth/{time + 0.015:.6f}.png")
        numbers = [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]
        if k < 2:  # the third picture has no pose near enough
            truth.append(f"{time - 0.01:.4f} " + " ".join(f"{x:.6f}" for x in numbers))
    for name, lines in (("rgb", rgb), ("depth", depth), ("groundtruth", truth)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    camera = {"width": 128, "height": 96, "intrinsic_matrix": [100, 0, 0, 0, 102, 0, 63.5, 47.5, 1]}
    (folder / "camera.json").write_text(json.dumps(camera))
    return folder


def test_tum(tmp_path):
    scene = rgbd.read_scene(write_tum(tmp_path / "rgbd_dataset_freiburg1_xyz"), up="+z")
    assert len(scene.views) == 2 and scene.metadata["num_without_pose"] == 1
    for k, view in enumerate(scene.views):
        np.testing.assert_allclose(view.camera_to_world, POSES[k], atol=1e-5)
        assert view.load_depth()[5, 5] == k + 1  # 5000 units per metre
    # The camera file is for pictures of twice the size; a pixel's centre is its integer coordinate.
    np.testing.assert_allclose(scene.views[0].K, [[50, 0, 31.5], [0, 51, 23.5], [0, 0, 1]])


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("rgb.txt", lambda t: t.replace("rgb/", "../rgb/"), r"rgb\.txt:2: '\.\./rgb.*without `\.\.`"),
        ("depth.txt", lambda t: t.replace("depth/", "/depth/"), r"depth\.txt:2: .*absolute"),
        ("groundtruth.txt", lambda t: "1 2 3\n", r"groundtruth\.txt:1: expected 8 numbers"),
        ("groundtruth.txt", lambda t: "", "none of 0 pictures"),
        ("groundtruth.txt", lambda t: "1305031102 0 0 0 0 0 0 0\n", "quaternion 0"),
        ("camera.json", lambda t: t.replace("100", "NaN", 1), r"camera\.json.*NaN"),
        ("camera.json", lambda t: "{}", r"camera\.json: expected width"),
        ("camera.json", lambda t: t.replace("100", "-5", 1), r"camera\.json.*camera matrix"),
        ("camera.json", None, r"0 files camera\*\.json"),
    ],
)
def test_malformed_lists_name_file_and_line(tmp_path, name, change, expected):
    folder = write_tum(tmp_path / "tum")
    path = folder / name
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=expected):
        rgbd.read_scene(folder)


@needs_redwood
@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda text: text.replace("4 4 5", "7 7 8"), "pose 4: frame 7, expected each of 0 to 4"),
        (lambda text: text.replace("4 4 5", "3 3 4"), "pose 4: frame 3, expected"),
        (lambda text: text[:-40], "pose 4: expected 16 numbers"),
        (lambda text: text.replace("-0.9997426093226981", "-1.5"), "frame 0: expected a 4x4 rotation"),
    ],
)
def test_malformed_trajectories_name_the_pose(tmp_path, change, expected):
    shutil.copytree(REDWOOD, tmp_path / "copy")
    path = tmp_path / "copy" / "trajectory.log"
    path.chmod(0o644)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"trajectory.log: {expected}"):
        rgbd.read_scene(tmp_path / "copy")


@needs_redwood
def test_redwood_pictures_without_depth_are_dropped_and_the_others_keep_their_poses(tmp_path):
    shutil.copytree(REDWOOD, tmp_path / "copy")
    whole = rgbd.read_scene(tmp_path / "copy", up="+y")
    depths = [view.depth_path for view in whole.views]
    depths[1].unlink()
    depths[3].rename(depths[3].with_suffix(".PNG"))
    scene = rgbd.read_scene(tmp_path / "copy", up="+y")
    assert [view.view_id for view in scene.views] == ["00000", "00002", "00003", "00004"]
    assert scene.metadata["num_without_depth"] == 1 and scene.metadata["num_without_pose"] == 0
    for view in scene.views:
        np.testing.assert_array_equal(view.camera_to_world, whole.views[int(view.view_id)].camera_to_world)
    depths[0].unlink()
    assert len(rgbd.read_scene(tmp_path / "copy").views) == 3  # two of five missing are still the lesser part
    depths[2].unlink()
    with pytest.raises(ValueError, match=r"00000\.jpg: its depth picture is missing, like those of 3 of 5"):
        rgbd.read_scene(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "depth")  # pictures and poses alone are a scene too
    assert [view.depth_path for view in rgbd.read_scene(tmp_path / "copy").views] == [None] * 5


@needs_redwood
def test_pictures_that_the_trajectory_leaves_out_are_counted(tmp_path):
    shutil.copytree(REDWOOD, tmp_path / "copy")
    path = tmp_path / "copy" / "trajectory.log"
    path.chmod(0o644)
    path.write_text("\n".join(path.read_text().splitlines()[5:15]) + "\n")  # frames 1 and 2
    scene = rgbd.read_scene(tmp_path / "copy")
    assert [view.view_id for view in scene.views] == ["00001", "00002"] and scene.metadata["num_without_pose"] == 3
    assert reprojection_error_mm(*scene.views, lambda view: view.camera_to_world) < 6
