"""Boxes, frames and cameras against closed forms, shapely and Monte Carlo."""

import numpy as np
import pytest
import shapely
from scipy.spatial.transform import Rotation

from roomplan_lib.geometry import (
    BOX_EDGES,
    BOX_FACES,
    OrientedBox,
    box_corners,
    box_intersection_volume,
    box_iou_3d,
    invert_pose,
    look_at,
    points_in_box,
    project,
    project_segments,
    resize_intrinsics,
    rotation_z,
    turn_camera,
    unproject,
    world_to_reference,
)


def random_box(rng: np.random.Generator, rotation: np.ndarray) -> OrientedBox:
    return OrientedBox(rng.uniform(-0.6, 0.6, 3), rng.uniform(0.2, 2, 3), rotation)


def upright_intersection(a: OrientedBox, b: OrientedBox) -> float:
    """Footprint overlap by shapely times the overlap in height."""
    footprint = [shapely.MultiPoint(box_corners(box)[:, :2]).convex_hull for box in (a, b)]
    low, high = (f(*(box.center[2] + s * box.extent[2] / 2 for box in (a, b))) for f, s in ((max, -1), (min, 1)))
    return footprint[0].intersection(footprint[1]).area * max(0.0, high - low)


def test_upright_iou_equals_shapely():
    rng = np.random.default_rng(0)
    for i in range(1000):
        yaw = rng.uniform(-4, 4, 2)
        if i % 4 == 0:
            yaw[1] = yaw[0] + (i % 8) * np.pi / 8  # parallel and perpendicular twins
        a, b = (random_box(rng, rotation_z(y)) for y in yaw)
        assert abs(box_intersection_volume(a, b) - upright_intersection(a, b)) < 1e-9


def test_general_iou_equals_monte_carlo_and_is_symmetric():
    rng = np.random.default_rng(1)
    for _ in range(8):
        a, b = (random_box(rng, Rotation.random(random_state=rng).as_matrix()) for _ in range(2))
        local = rng.uniform(-0.5, 0.5, (200_000, 3)) * a.extent
        share = points_in_box(local @ a.rotation.T + a.center, b).mean()
        assert abs(box_intersection_volume(a, b) / a.volume - share) < 5e-3
        assert abs(box_iou_3d(a, b) - box_iou_3d(b, a)) < 1e-12


@pytest.mark.parametrize("seed", range(20))
def test_box_against_itself_and_its_quarter_turn_is_one(seed):
    rng = np.random.default_rng(seed)
    box = random_box(rng, Rotation.random(random_state=seed).as_matrix())
    turned = OrientedBox(box.center, box.extent[[1, 0, 2]], box.rotation @ rotation_z(np.pi / 2))
    assert box_iou_3d(box, box) == pytest.approx(1, abs=1e-9)
    assert box_iou_3d(box, turned) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("yaw", [0.0, 0.3, np.pi / 4, 1.0])
def test_iou_closed_forms(yaw):
    turn = rotation_z(yaw)
    box = OrientedBox([1, 2, 3], [1, 2, 3], turn)
    shift = turn[:, 0]
    assert box_iou_3d(box, OrientedBox(box.center + 0.5 * shift, box.extent, turn)) == pytest.approx(1 / 3)
    assert box_iou_3d(box, OrientedBox(box.center + shift, box.extent, turn)) == pytest.approx(0, abs=1e-9)  # touching
    assert box_iou_3d(box, OrientedBox(box.center, box.extent / 2, turn)) == pytest.approx(1 / 8)  # nested
    assert box_iou_3d(box, OrientedBox(box.center + 9, box.extent, turn)) == 0
    assert box_iou_3d(box, OrientedBox(box.center, [0, 1, 1], turn)) == 0  # no volume


@pytest.mark.parametrize(
    "center, extent, rotation",
    [
        ([0, 0, np.nan], [1, 1, 1], np.eye(3)),
        ([0, 0, 0], [1, -1, 1], np.eye(3)),
        ([0, 0], [1, 1, 1], np.eye(3)),
        ([0, 0, 0], [1, 1, 1], np.diag([1.0, 1, -1])),
        ([0, 0, 0], [1, 1, 1], np.eye(3) * 1.1),
    ],
)
def test_bad_boxes_are_refused(center, extent, rotation):
    with pytest.raises(ValueError, match="OrientedBox"):
        OrientedBox(center, extent, rotation)


def test_faces_and_edges_belong_to_the_corners():
    corners = box_corners(OrientedBox([0, 0, 0], [2, 4, 6]))
    assert (
        sorted(np.linalg.norm(corners[BOX_EDGES[:, 0]] - corners[BOX_EDGES[:, 1]], axis=1))
        == [2] * 4 + [4] * 4 + [6] * 4
    )
    for face in BOX_FACES:
        p = corners[face]
        outward = np.cross(p[1] - p[0], p[2] - p[1])
        assert outward @ p.mean(0) > 0


def test_unproject_inverts_project_and_masks_missing_depth():
    rng = np.random.default_rng(2)
    K = np.array([[200.0, 0, 63.2], [0, 210, 47.7], [0, 0, 1]])
    pose = look_at(np.array([1.0, 2, 1.5]), np.array([0.0, 0, 1]))
    depth = rng.uniform(0.5, 4, (96, 128))
    depth[3, 5] = 0
    points, valid = unproject(depth, K, pose)
    assert not valid[3, 5] and valid.sum() == depth.size - 1 and np.isnan(points[3, 5]).all()
    pixels, z = project(points[valid], K, pose)
    v, u = np.nonzero(valid)
    assert np.allclose(pixels, np.stack([u, v], -1), atol=1e-9) and np.allclose(z, depth[valid])
    # the pixel (u, v) itself, not its corner, looks along ((u - cx) / fx, (v - cy) / fy, 1)
    direction = pose[:3, :3] @ [(10 - 63.2) / 200, (20 - 47.7) / 210, 1]
    assert np.allclose(points[20, 10], pose[:3, 3] + depth[20, 10] * direction)


def test_resized_intrinsics_see_the_same_pixel_centres():
    K = np.array([[200.0, 0, 63.5], [0, 200, 47.5], [0, 0, 1]])  # principal point in the middle of 128 x 96
    assert np.allclose(resize_intrinsics(K, (128, 96), (64, 48))[:2, 2], [31.5, 23.5])
    assert np.allclose(resize_intrinsics(resize_intrinsics(K, (128, 96), (56, 84)), (56, 84), (128, 96)), K)


@pytest.mark.parametrize("pitch", [-1.5, -0.4, 0.0, 0.7, 1.5])
def test_reference_frame_is_gravity_aligned_and_round_trips(pitch):
    for yaw in np.linspace(-3, 3, 7):
        pose = np.eye(4)
        level = look_at(np.zeros(3), np.array([np.sin(yaw), np.cos(yaw), 0.0]))[:3, :3]
        pose[:3, :3] = level @ Rotation.from_euler("x", pitch).as_matrix()
        pose[:3, 3] = [3, -2, 1.4]
        transform = world_to_reference(pose)
        assert np.allclose(transform[:3, :3] @ [0, 0, 1], [0, 0, 1])  # z stays up
        assert np.allclose(transform @ pose[:, 3], [0, 0, 0, 1], atol=1e-12)  # the camera is the origin
        heading = transform[:3, :3] @ [np.sin(yaw), np.cos(yaw), 0]
        assert np.allclose(heading, [0, 1, 0], atol=1e-6)  # what it faces lies along y, however it is pitched
        box = OrientedBox([1, 2, 3], [1, 2, 3], rotation_z(0.7))
        back = box.transformed(transform).transformed(invert_pose(transform))
        assert np.abs(box_corners(back) - box_corners(box)).max() < 1e-5


def test_segments_are_cut_at_the_near_plane():
    K, pose = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]]), np.eye(4)
    segments = np.array([[[0, 0, 1], [0, 0, 3]], [[1, 0, 2], [1, 0, -2]], [[0, 0, -1], [1, 0, -1]]], dtype=float)
    pixels, index = project_segments(segments, K, pose, near=0.5)
    assert index.tolist() == [0, 1]
    assert np.allclose(pixels[1], [[100, 50], [50 + 100 / 0.5, 50]])


@pytest.mark.parametrize("turns", range(-1, 5))
def test_a_turned_camera_sees_world_points_where_rot90_puts_their_pixels(turns):
    rng = np.random.default_rng(3)
    width, height = 7, 5
    K = np.array([[6.0, 0, 2.6], [0, 5.5, 1.3], [0, 0, 1]])  # off-centre, fx != fy
    pose = look_at(np.array([1.0, 2.0, 1.5]), np.array([-1.0, 0.5, 0.2]))
    depth = rng.uniform(1, 3, (height, width)).astype(np.float32)
    points, _ = unproject(depth, K, pose)
    turned_K, turned_pose, size = turn_camera(K, pose, (width, height), turns)
    turned_points, valid = unproject(np.rot90(depth, turns), turned_K, turned_pose)
    assert size == np.rot90(depth, turns).shape[::-1] and valid.all()
    np.testing.assert_allclose(turned_points, np.rot90(points, turns), atol=1e-12)
    assert np.linalg.det(turned_pose[:3, :3]) == pytest.approx(1)
