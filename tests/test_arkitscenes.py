import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_files import SIZE, K, box, traj_row, walk, write_scene
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import box_corners, look_at, project, rotation_z
from roomplan_lib.scenes.arkitscenes import (
    SkippedSceneError,
    find_scenes,
    frames_dir,
    read_scene,
    scene_membership,
    sky_direction,
)

BOXES = [box("bed", 1.5, 0.5, 0.3, (2.0, 1.5, 0.6), uid="b1"), box("chair", -1, 1, -1.1, uid="c1")]


@pytest.fixture
def scene_dir(tmp_path):
    return write_scene(tmp_path, BOXES)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("layout", ["3dod", "raw"])
def test_known_scene_round_trips(tmp_path, layout):
    poses = walk(5)
    scene = read_scene(write_scene(tmp_path, BOXES, layout=layout, poses=poses))
    assert scene.scene_id == "42444499" and scene.source == "arkitscenes" and scene.split == "train"
    assert [view.view_id for view in scene.views] == [f"42444499_{1000 + i / 10:.3f}" for i in range(5)]
    for view, pose in zip(scene.views, poses, strict=True):
        assert np.abs(view.camera_to_world - pose).max() < 1e-6
        assert np.array_equal(view.K, K) and (view.width, view.height) == SIZE
        assert view.load_rgb().shape == (48, 64, 3) and view.load_depth().max() < 9
    for read, written in zip(scene.boxes, BOXES, strict=True):
        assert (read.label, read.object_id) == (written.label, written.object_id)
        assert np.abs(box_corners(read) - box_corners(written)).max() < 1e-9


def test_box_corners_as_in_the_official_tool(tmp_path):
    """`corners = R^T (+-l/2, +-h/2, +-w/2) + centroid` with R = the nine numbers row by row."""
    scene_dir = write_scene(tmp_path, BOXES)
    entry = json.loads((scene_dir / "42444499_3dod_annotation.json").read_text())["data"][1]["segments"]["obbAligned"]
    rows = np.array(entry["normalizedAxes"]).reshape(3, 3)
    signs = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]) / 2
    official = (rows.T @ (signs * entry["axesLengths"]).T).T + entry["centroid"]
    assert np.abs(box_corners(read_scene(scene_dir).boxes[1]) - official).max() < 1e-9


def test_times_as_in_real_scans(tmp_path):
    """60 Hz pictures, 10 Hz poses; the clocks differ by up to some milliseconds, intrinsics by one."""
    poses = walk(3)
    frame_times = [3000.0 + i / 60 for i in range(18)]
    pose_times = [3000.001, 3000.0962, 3000.2083]  # off by 1 ms, by 3.8 ms, by 8.3 ms from the nearest picture
    scene_dir = write_scene(tmp_path, BOXES, poses=poses, times=frame_times, pose_times=pose_times)
    folder = frames_dir(scene_dir) / "lowres_wide_intrinsics"
    (folder / "42444499_3000.000.pincam").rename(folder / "42444499_3000.001.pincam")
    (folder / "42444499_3000.100.pincam").rename(folder / "42444499_3000.099.pincam")
    scene = read_scene(scene_dir)
    assert [view.timestamp for view in scene.views] == [3000.0, 3000.1]
    for view, pose in zip(scene.views, poses, strict=False):
        assert np.abs(view.camera_to_world - pose).max() < 1e-6


def test_nearest_pose_wins(tmp_path):
    poses = walk(2)
    scene_dir = write_scene(tmp_path, BOXES, poses=poses, times=[10.0], pose_times=[9.996, 10.002])
    assert np.abs(read_scene(scene_dir).views[0].camera_to_world - poses[1]).max() < 1e-6


def test_interpolated_poses(tmp_path):
    """Between two poses the camera turns at one rate and moves on a line; frames outside, and in a gap, have none."""
    axis = np.array([1.0, 2.0, -1.0]) / np.sqrt(6)
    start = walk(1)[0]

    def pose_at(share: float) -> np.ndarray:
        pose = start.copy()
        pose[:3, :3] = Rotation.from_rotvec(axis * 0.4 * share).as_matrix() @ start[:3, :3]
        pose[:3, 3] += np.array([0.3, -0.1, 0.05]) * share
        return pose

    pose_times = [10.0, 10.1, 10.6, 10.7]
    frame_times = [9.98, 10.0, 10.017, 10.033, 10.05, 10.1, 10.3, 10.65, 10.72]
    scene_dir = write_scene(
        tmp_path, BOXES, poses=[pose_at(10 * (t - 10)) for t in pose_times], times=frame_times, pose_times=pose_times
    )
    assert [view.timestamp for view in read_scene(scene_dir).views] == [10.0, 10.1]
    views = read_scene(scene_dir, interpolate=True).views
    assert [view.timestamp for view in views] == [10.0, 10.017, 10.033, 10.05, 10.1, 10.65]
    for view in views:
        assert np.abs(view.camera_to_world - pose_at(10 * (view.timestamp - 10))).max() < 1e-6


# Which way is up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "up", "sky"),
    [
        (  # the first pose of scan 41048143, published with the data set's own script
            "1627.68140546 -1.5545600446434271 1.532901960141653 0.883467254271724 0.0450016 0.0506107 -0.000194237",
            (0.038, 0.884, -0.466),
            "Down",
        ),
        (  # of scan 41048169
            "803.47236621 1.6851560664954446 -1.7402208764128138 -0.8469396625258023 0.0404551 0.0562208 -0.00155703",
            (-0.768, 0.054, -0.639),
            "Left",
        ),
    ],
)
def test_published_sky_directions(tmp_path, row, up, sky):
    scene_dir = write_scene(tmp_path, BOXES, poses=walk(1), times=[round(float(row.split()[0]), 3)])
    (frames_dir(scene_dir) / "lowres_wide.traj").write_text(row + "\n")
    scene = read_scene(scene_dir)
    assert scene.metadata["sky_direction"] == sky
    view = scene.views[0]
    assert view.quarter_turns == {"Down": 2, "Left": 3}[sky]
    stored = Rotation.from_rotvec([float(x) for x in row.split()[1:4]]).as_matrix()  # world -> camera
    assert np.abs(stored @ [0, 0, 1] - up).max() < 1e-3
    x, y, _ = view.camera_to_world[2, :3]
    assert -y > 0.7 and abs(x) < 0.1  # upright now


def turned(pose: np.ndarray, quarters: int) -> np.ndarray:
    """camera_to_world of the same camera, held turned clockwise about its axis by quarters."""
    pose = pose.copy()
    pose[:3, :3] = pose[:3, :3] @ rotation_z(quarters * np.pi / 2)
    return pose


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_pictures_are_set_upright_with_their_camera(tmp_path, quarters):
    """However the phone was held, the upright pictures, K and poses are those of one held upright, point by point."""
    poses = [turned(pose, quarters) for pose in walk(4)]
    K_stored = np.array([[55.0, 0, 30.0], [0, 56.0, 25.0], [0, 0, 1]])
    scene = read_scene(write_scene(tmp_path, BOXES, poses=poses, K=K_stored))
    turns = {view.quarter_turns for view in scene.views}
    assert len(turns) == 1
    for view, pose, upright in zip(scene.views, poses, walk(4), strict=True):
        assert np.abs(view.camera_to_world - upright).max() < 1e-6
        assert view.load_rgb().shape[:2] == view.load_depth().shape == (view.height, view.width)
        assert (view.width, view.height) == (SIZE if quarters % 2 == 0 else SIZE[::-1])
        stored = read_picture(view.rgb_path)
        rows, columns = np.mgrid[5 : view.height : 9, 5 : view.width : 9].reshape(2, -1)
        camera = np.stack([(columns - view.K[0, 2]) / view.K[0, 0], (rows - view.K[1, 2]) / view.K[1, 1],
                           np.ones(len(rows))], -1)  # fmt: skip
        points = camera @ view.camera_to_world[:3, :3].T + view.camera_to_world[:3, 3]
        pixels, _ = project(points, K_stored, pose)  # where the same rays lie in the stored picture
        assert np.abs(pixels - pixels.round()).max() < 1e-6
        there = pixels.round().astype(int)
        assert (stored[there[:, 1], there[:, 0]] == view.load_rgb()[rows, columns]).all()


def read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_sky_is_that_of_most_poses():
    upright, left = walk(5), [turned(pose, 1) for pose in walk(5)]
    votes = [sky_direction([*upright[:3], *left[:count]]) for count in (0, 2, 5)]
    assert votes[0] == votes[1] == "Up" != votes[2]
    down = look_at(np.array([0, 0, 2.0]), np.array([0.05, 0.0, 0.0]))  # a look at the floor has no side that is up
    assert sky_direction([turned(down, 2)] * 9 + upright[:1]) == "Up"


def test_table_of_sky_directions_only_warns(tmp_path):
    table = "video_id,visit_id,sky_direction,fold\n42444499,421378,{},Training\n"
    scene_dir = write_scene(tmp_path, BOXES)
    (tmp_path / "metadata.csv").write_text(table.format("Left"))
    with pytest.warns(UserWarning, match="42444499: the table says sky_direction Left, the poses say Up"):
        scene = read_scene(scene_dir)
    assert scene.metadata["table_sky_direction"] == "Left" and scene.views[0].quarter_turns == 0


# What lies in the folder ----------------------------------------------------------------------------------------------


def test_raw_scans_may_lack_some_pictures(tmp_path):
    """Apple: no guarantee that all assets exist per time. Most missing is a broken download."""
    scene_dir = write_scene(tmp_path, BOXES, layout="raw", poses=walk(6))
    for name in ("lowres_depth/42444499_1000.100.png", "lowres_wide_intrinsics/42444499_1000.300.pincam"):
        (scene_dir / name).unlink()
    scene = read_scene(scene_dir)
    assert [view.timestamp for view in scene.views] == [1000.0, 1000.2, 1000.4, 1000.5]
    assert scene.metadata["unpaired"] == 2
    for time in ("000", "200", "400"):
        (scene_dir / "lowres_depth" / f"42444499_1000.{time}.png").unlink()
    with pytest.raises(ValueError, match="5 of 6 posed pictures have no depth or no intrinsics; fetch"):
        read_scene(scene_dir)


def test_surfaces_come_from_the_sidecar(rooms_root):
    """Walls of a rendered room: cameras before them, furniture and doors within them, and the floor below all."""
    for scene_dir in find_scenes(rooms_root)[:4]:
        scene = read_scene(scene_dir)
        walls = [surface for surface in scene.surfaces if surface.kind == "wall"]
        (floor,) = [surface for surface in scene.surfaces if surface.kind == "floor"]
        for wall in walls:
            ahead = [(view.camera_to_world[:3, 3] - wall.box.center) @ wall.box.rotation[:, 1] for view in scene.views]
            assert np.mean(ahead) > 0 and np.abs(wall.box.rotation[:, 2] - [0, 0, 1]).max() < 1e-9
            assert wall.box.center[2] - wall.box.extent[2] / 2 == pytest.approx(floor.box.center[2])
        for opening in (surface for surface in scene.surfaces if surface.kind in ("door", "window")):
            (wall,) = [wall.box for wall in walls if wall.box.object_id == opening.parent_id]
            local = np.abs((box_corners(opening.box) - wall.center) @ wall.rotation)
            assert (local <= wall.extent / 2 + 1e-6).all()
        for item in scene.boxes:
            local = np.abs((item.center - floor.box.center) @ floor.box.rotation)
            assert (local[:2] <= floor.box.extent[:2] / 2).all() and item.center[2] > floor.box.center[2]


def test_boxes_keep_the_17_categories_under_one_spelling(tmp_path):
    scene_dir = write_scene(tmp_path, [*BOXES, box("lamp", 0, 0), box("tv-monitor", 0, 1), box("tv monitor", 0, 2)])
    scene = read_scene(scene_dir)
    assert [item.label for item in scene.boxes] == ["bed", "chair", "tv_monitor", "tv_monitor"]
    assert scene.metadata["other_labels"] == {"lamp": 1}


def test_small_errors_of_box_axes_are_mended(tmp_path):
    scene_dir = write_scene(tmp_path, BOXES)

    def skew(annotation):
        axes = rotation_z(0.4).T.copy()
        axes[0] *= 1.003
        annotation["data"][0]["segments"]["obbAligned"]["normalizedAxes"] = axes.ravel().tolist()
        left_handed = rotation_z(0.4).T * [[1], [-1], [1]]
        annotation["data"][1]["segments"]["obbAligned"]["normalizedAxes"] = left_handed.ravel().tolist()

    edit(scene_dir / "42444499_3dod_annotation.json", skew)
    for item in read_scene(scene_dir).boxes:
        assert np.abs(item.rotation - rotation_z(0.4)).max() < 5e-3
        assert np.abs(item.rotation.T @ item.rotation - np.eye(3)).max() < 1e-12


def test_scene_without_depth(tmp_path):
    assert all(view.depth_path is None for view in read_scene(write_scene(tmp_path, BOXES, depth=False)).views)


def test_colors_come_from_the_sidecar(tmp_path):
    scene = read_scene(write_scene(tmp_path, BOXES, colors={"b1": "red", "c1": "blue"}))
    assert scene.colors == {"b1": "red", "c1": "blue"}


def test_split_and_visit(tmp_path):
    table = "video_id,visit_id,fold\n42444499,421378,Training\n41159519,NA,Validation\n"
    (tmp_path / "3dod_train_val_splits.csv").write_text(table)
    one = write_scene(tmp_path, BOXES)
    other = write_scene(tmp_path, BOXES, scene_id="41159519", fold="scans")
    assert scene_membership(one) == ("train", "421378")
    assert scene_membership(other) == ("val", "")
    assert read_scene(other).split == "val" and read_scene(one).visit_id == "421378"
    assert find_scenes(tmp_path) == [one, other] and find_scenes(one) == [one]


def test_official_table_of_splits():
    """Every video of the published table: 4498 + 549, eight of them without a visit."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "arkitscenes_meta"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not on this machine")
    from roomplan_lib.scenes.arkitscenes import read_table

    table = read_table(folder / "3dod_train_val_splits.csv")
    splits = [row.split for row in table.values()]
    assert (splits.count("train"), splits.count("val")) == (4498, 549)
    assert sum(row.visit_id == "" for row in table.values()) == 8
    assert table["41159521"][:2] == ("381879", "train") and table["41159519"][:2] == ("381879", "val")


# Bad input: (what is broken, words of the error) ----------------------------------------------------------------------

NAME = "42444499"


def annotation_of(scene_dir):
    return scene_dir / f"{NAME}_3dod_annotation.json"


def set_box(scene_dir, key, value):
    def change(annotation):
        annotation["data"][1]["segments"]["obbAligned"][key] = value

    edit(annotation_of(scene_dir), change)


def traj(scene_dir, line_number, text):
    path = frames_dir(scene_dir) / "lowres_wide.traj"
    lines = path.read_text().splitlines()
    lines[line_number - 1] = text
    path.write_text("\n".join(lines))


def pincam(scene_dir, text):
    (frames_dir(scene_dir) / "lowres_wide_intrinsics" / f"{NAME}_1000.300.pincam").write_text(text)


def frame(scene_dir, folder):
    return frames_dir(scene_dir) / folder / f"{NAME}_1000.300.png"


def truncate(path):
    path.write_text(path.read_text()[:300])


FAULTS = {
    "annotation missing": (lambda d: annotation_of(d).unlink(), "annotation.json: file is missing"),
    "annotation truncated": (lambda d: truncate(annotation_of(d)), "annotation.json:1: invalid or truncated JSON"),
    "annotation of another kind": (lambda d: annotation_of(d).write_text("[]"), "annotation.json: expected an object"),
    "annotation binary": (lambda d: annotation_of(d).write_bytes(b"\xff\xfe\x00"), "annotation.json: cannot read"),
    "label missing": (lambda d: edit(annotation_of(d), lambda a: a["data"][1].pop("label")), r"data\[1\]"),
    "no box": (lambda d: edit(annotation_of(d), lambda a: a["data"][1].update(segments={})), r"data\[1\] \(chair\)"),
    "box axes equal": (lambda d: set_box(d, "normalizedAxes", [1, 0, 0, 1, 0, 0, 0, 0, 1]), "not orthonormal"),
    "box axes zero": (lambda d: set_box(d, "normalizedAxes", [0] * 9), "not orthonormal"),
    "box axes short": (lambda d: set_box(d, "normalizedAxes", [1, 0, 0]), r"data\[1\] \(chair\)"),
    "box center NaN": (lambda d: set_box(d, "centroid", [0, 0, float("nan")]), "annotation.json: .*NaN is no number"),
    "box length negative": (lambda d: set_box(d, "axesLengths", [1, -1, 1]), "below 0"),
    "two boxes of one uid": (lambda d: edit(annotation_of(d), lambda a: a["data"][1].update(uid="b1")), "uid 'b1'"),
    "trajectory missing": (
        lambda d: (frames_dir(d) / "lowres_wide.traj").unlink(),
        "lowres_wide.traj: file is missing",
    ),
    "trajectory empty": (lambda d: (frames_dir(d) / "lowres_wide.traj").write_text(""), "no pose"),
    "NaN in a pose": (lambda d: traj(d, 3, "1000.2 0 0 nan 0 0 0"), "lowres_wide.traj:3: expected 7 finite"),
    "inf in a pose": (lambda d: traj(d, 3, "1000.2 0 0 0 inf 0 0"), "lowres_wide.traj:3: expected 7 finite"),
    "six numbers": (lambda d: traj(d, 2, "1000.1 0 0 0 0 0"), "lowres_wide.traj:2: expected 7"),
    "words in a pose": (lambda d: traj(d, 1, "a b c d e f g"), "lowres_wide.traj:1: expected 7"),
    "pincam of five": (lambda d: pincam(d, "64 48 55 55 31.5"), "1000.300.pincam: expected 6"),
    "pincam NaN": (lambda d: pincam(d, "64 48 nan 55 31.5 23.5"), "1000.300.pincam: expected 6 finite"),
    "pincam without focal length": (lambda d: pincam(d, "64 48 0 55 31.5 23.5"), "focal lengths above 0"),
    "pincam missing": (
        lambda d: (frames_dir(d) / "lowres_wide_intrinsics" / f"{NAME}_1000.300.pincam").unlink(),
        "1000.300.pincam: intrinsics of a posed picture are missing",
    ),
    "depth of a view missing": (
        lambda d: frame(d, "lowres_depth").unlink(),
        "lowres_depth/42444499_1000.300.png: depth of a posed picture is missing; fetch it again",
    ),
    "picture of a depth missing": (
        lambda d: frame(d, "lowres_wide").unlink(),
        "lowres_wide/42444499_1000.300.png: picture of a posed depth is missing; fetch it again",
    ),
    "picture and depth missing": (
        lambda d: (frame(d, "lowres_depth").unlink(), frame(d, "lowres_wide").unlink()),
        "lowres_wide/42444499_1000.300.png: picture of posed intrinsics is missing; fetch it again",
    ),
    "picture of another size": (
        lambda d: Image.new("RGB", (128, 96)).save(frames_dir(d) / "lowres_wide" / f"{NAME}_1000.000.png"),
        "1000.000.png: the picture has 128x96 pixels, its .pincam is for 64x48; fetch",
    ),
    "first picture is none": (
        lambda d: (frames_dir(d) / "lowres_wide" / f"{NAME}_1000.000.png").write_bytes(b"x"),
        "1000.000.png: cannot read the picture",
    ),
    "picture of another scene": (
        lambda d: frame(d, "lowres_wide").rename(frames_dir(d) / "lowres_wide" / "41048190_1000.300.png"),
        "41048190_1000.300.png: expected the name 42444499_",
    ),
    "no posed frame": (
        lambda d: (frames_dir(d) / "lowres_wide.traj").write_text(traj_row(5.0, np.eye(4))),
        "none of 8 pictures has a pose",
    ),
    "pictures missing": (
        lambda d: (frames_dir(d) / "lowres_wide").rename(d / "elsewhere"),
        "lowres_wide: folder is missing",
    ),
    "sidecar of another kind": (
        lambda d: (d / f"{NAME}_room.json").write_text("{}"),
        "_room.json: expected `instances`",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_input_is_named(scene_dir, name):
    read_scene(scene_dir)
    damage, words = FAULTS[name]
    damage(scene_dir)
    with pytest.raises(ValueError, match=words):
        read_scene(scene_dir)


def test_skipped_scene_and_missing_folder(scene_dir):
    edit(annotation_of(scene_dir), lambda annotation: annotation.update(skipped=True))
    with pytest.raises(SkippedSceneError, match="skipped this scene"):
        read_scene(scene_dir)
    with pytest.raises(ValueError, match="no such scene folder"):
        read_scene(scene_dir.parent / "40000000")
    with pytest.raises(ValueError, match="no such folder"):
        find_scenes(scene_dir.parent / "40000000")


def test_truncated_depth_is_named(scene_dir):
    path = frame(scene_dir, "lowres_depth")
    path.write_bytes(path.read_bytes()[:60])
    view = read_scene(scene_dir).views[3]
    with pytest.raises(ValueError, match="1000.300.png: cannot read the picture"):
        view.load_depth()


def test_unposed_frames_may_lack_depth(tmp_path):
    scene_dir = write_scene(tmp_path, BOXES, poses=walk(2), times=[1.0, 1.017, 1.1], pose_times=[1.0, 1.1])
    (frames_dir(scene_dir) / "lowres_depth" / f"{NAME}_1.017.png").unlink()
    Image.new("RGB", (8, 8)).save(frames_dir(scene_dir) / "lowres_wide" / "._42444499_1.100.png")
    assert [view.timestamp for view in read_scene(scene_dir).views] == [1.0, 1.1]
