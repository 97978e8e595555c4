"""Depth images fused into one coloured mesh: a truncated signed distance field (Curless and Levoy 1996) by Open3D."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from roomplan_lib.geometry import invert_pose
from roomplan_lib.samples.views import depth_intrinsics
from roomplan_lib.scenes import Scene, View
from roomplan_lib.viz.clouds import colors_at_depth
from roomplan_lib.viz.meshes import Mesh

BLOCK = 8  # voxels along a block's side
NUM_BLOCKS = 4_000  # to begin with, 10 kB each; the grid grows
TRUNCATION = 4.0  # voxels before and behind a surface that learn of it
MIN_WEIGHT = 0.5  # a voxel's weight, the number of views that saw it, must be more


def fuse_scene(
    scene: Scene,
    views: Sequence[View] | None = None,
    *,
    voxel_size: float = 0.03,
    max_depth: float = 6.0,
    progress: bool = False,
) -> Mesh:
    """The surface in the sensor depth of `views` (all of the scene's for None), in its world; see `fuse_depth`.

    Raises ValueError for no view, and for one without depth or pose.
    """
    views = list(scene.views) if views is None else list(views)
    for view in views:
        if not view.posed or view.depth_path is None:
            raise ValueError(f"scene {scene.scene_id}: view {view.view_id} has no pose or no depth to fuse")
    depths = [view.load_depth() for view in views]
    return fuse_depth(
        depths,
        [colors_at_depth(view, view.load_rgb(), depth) for view, depth in zip(views, depths, strict=True)],
        [depth_intrinsics(view, depth.shape[::-1]) for view, depth in zip(views, depths, strict=True)],
        [view.camera_to_world for view in views],
        voxel_size=voxel_size, max_depth=max_depth, progress=progress,
    )  # fmt: skip


def fuse_depth(
    depths: Sequence[np.ndarray],
    pictures: Sequence[np.ndarray],
    intrinsics: Sequence[np.ndarray],
    camera_to_world: Sequence[np.ndarray],
    *,
    voxel_size: float = 0.03,
    max_depth: float = 6.0,
    progress: bool = False,
) -> Mesh:
    """A coloured mesh from V posed depth images, whoever measured them.

    depths: [H, W] metres along z, 0 or not finite = missing. pictures: uint8 [H, W, 3] of the same size. intrinsics: K
    [3, 3] pixels, (0, 0) is a pixel's centre. camera_to_world: [4, 4] metres. voxel_size: metres. max_depth: metres
    beyond which depth is not trusted. progress: show a bar.

    Raises ValueError for sizes that differ, settings out of range, and depth that holds no surface.
    """
    import open3d as o3d

    if not 0 < voxel_size < max_depth:
        raise ValueError(f"fuse_depth: expected 0 < voxel_size < max_depth, got {voxel_size} m and {max_depth} m")
    if not len(depths) == len(pictures) == len(intrinsics) == len(camera_to_world) > 0:
        raise ValueError(f"fuse_depth: expected as many pictures and cameras as depths, {len(depths)}, and at least 1")
    grid = o3d.t.geometry.VoxelBlockGrid(
        attr_names=("tsdf", "weight", "color"),
        attr_dtypes=(o3d.core.float32, o3d.core.float32, o3d.core.float32),
        attr_channels=((1), (1), (3)),
        voxel_size=voxel_size,
        block_resolution=BLOCK,
        block_count=NUM_BLOCKS,
    )
    views = zip(depths, pictures, intrinsics, camera_to_world, strict=True)
    for number, (depth, picture, K, pose) in enumerate(
        tqdm(views, desc="fusing", unit="view", total=len(depths), disable=not progress)
    ):
        if picture.shape != (*depth.shape, 3):
            raise ValueError(f"view {number}: depth of {depth.shape} pixels, but a picture of {picture.shape}")
        known = np.isfinite(depth) & (depth > 0) & (depth < max_depth)
        if not known.any():
            continue
        _integrate(grid, np.where(known, depth, 0), picture, K, invert_pose(np.asarray(pose)), max_depth)
    mesh = None
    if grid.hashmap().size():
        mesh = grid.extract_triangle_mesh(weight_threshold=MIN_WEIGHT).to_legacy()
    if mesh is None or not len(mesh.triangles):
        raise ValueError(f"{len(depths)} depth images hold no surface nearer than {max_depth} m; is depth in metres?")
    return Mesh(
        np.asarray(mesh.vertices, np.float32),
        np.round(np.clip(np.asarray(mesh.vertex_colors), 0, 1) * 255).astype(np.uint8),
        np.asarray(mesh.triangles),
    )


def _integrate(
    grid, depth: np.ndarray, picture: np.ndarray, K: np.ndarray, world_to_camera: np.ndarray, far: float
) -> None:
    """Adds one view to the grid."""
    import open3d as o3d

    image = o3d.t.geometry.Image(o3d.core.Tensor(np.ascontiguousarray(depth, np.float32)))
    color = o3d.t.geometry.Image(o3d.core.Tensor(np.ascontiguousarray(picture, np.float32) / 255))
    # The grid cuts pixel coordinates to whole numbers: its pixel (0, 0) has its centre at (0.5, 0.5). Without the shift
    # fused rooms lie 5 mm beside their true mesh, with it 1 mm (256 x 192 pixels).
    K = np.array(K, np.float64)
    K[:2, 2] += 0.5
    intrinsic, extrinsic = o3d.core.Tensor(K), o3d.core.Tensor(world_to_camera)
    # depth_scale 1: our depth is in metres. Open3D's default takes millimetres, from float images too.
    blocks = grid.compute_unique_block_coordinates(image, intrinsic, extrinsic, 1.0, far, TRUNCATION)
    grid.integrate(blocks, image, color, intrinsic, intrinsic, extrinsic, 1.0, far, TRUNCATION)
