"""Coloured points of a scene: from the depth and colour images of its views, or from its mesh."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from roomplan_lib.geometry import unproject
from roomplan_lib.samples.views import depth_intrinsics
from roomplan_lib.scenes import Scene, View

MAX_PIXELS = 1_300_000  # read from all views together; more are thinned evenly
MAX_JUMP = 0.06  # share of its depth by which a pixel's neighbours may differ; beyond is the rim between two surfaces
SMALLEST_VOXEL = 0.01  # metres
MESH_POINTS = 400_000  # drawn from a mesh
BACKDROP_VIEWS = 24
FLOOR_PERCENTILE = 1.0  # of the points' heights


@dataclass(frozen=True, eq=False)
class Surfels:
    """Seen surface. points: float32 [N, 3] metres, world. colors: uint8 [N, 3]. normals: float32 [N, 3], unit, towards
    the camera that saw them. spacing: float32 [N] metres to the neighbouring pixels' points."""

    points: np.ndarray
    colors: np.ndarray
    normals: np.ndarray
    spacing: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, chosen: np.ndarray) -> Surfels:
        return Surfels(self.points[chosen], self.colors[chosen], self.normals[chosen], self.spacing[chosen])

    @property
    def floor(self) -> float:
        """Height of the floor, metres."""
        return float(np.percentile(self.points[:, 2], FLOOR_PERCENTILE))


def find_views(scene: Scene, view_ids: list[str] | None = None) -> list[View]:
    """The views with these ids, in their order; all for None. Raises ValueError for an unknown id."""
    if view_ids is None:
        return list(scene.views)
    by_id = {view.view_id: view for view in scene.views}
    unknown = [view_id for view_id in view_ids if view_id not in by_id]
    if unknown:
        raise ValueError(
            f"scene {scene.scene_id} has no view {unknown[0]!r}; it has {len(by_id)}, e.g. {next(iter(by_id))!r}"
        )
    return [by_id[view_id] for view_id in view_ids]


def scene_surfels(scene: Scene, view_ids: list[str] | None = None) -> Surfels:
    """The surface that the views (all for None) show. Raises ValueError for a view without depth."""
    views = find_views(scene, view_ids)
    stride = max(1, int(np.ceil(np.sqrt(sum(v.width * v.height for v in views) / MAX_PIXELS))))
    parts = [_view_surfels(view, stride) for view in views]
    surfels = Surfels(*(np.concatenate([getattr(p, name) for p in parts]) for name in Surfels.__dataclass_fields__))
    if not len(surfels):
        raise ValueError(f"scene {scene.scene_id}: the depth images of {len(views)} views hold no valid pixel")
    return surfels


def backdrop(scene: Scene, views: list[View]) -> Surfels:
    """What a figure draws a room with: the surface in `views` and, up to BACKDROP_VIEWS, in others of the scene's."""
    chosen = {view.view_id for view in views}
    others = [view.view_id for view in scene.views if view.view_id not in chosen and view.depth_path is not None]
    num = min(len(others), max(0, BACKDROP_VIEWS - len(views)))
    picked = [others[i] for i in np.linspace(0, len(others) - 1, num).astype(int)]
    return scene_surfels(scene, [view.view_id for view in views] + picked)


def scene_surface(scene: Scene, views: list[View]) -> tuple[Surfels | None, str]:
    """What there is to show of a scene's surface, and where it comes from, in words.

    The depth of `views`, of those that have one; else the scene's mesh; else None.
    """
    deep = [view.view_id for view in views if view.posed and view.depth_path is not None]
    if deep:
        return scene_surfels(scene, deep), f"depth of {len(deep)} views"
    if scene.mesh_path is not None:
        from roomplan_lib.viz.meshes import mesh_surfels, scene_mesh  # imports this module

        return mesh_surfels(scene_mesh(scene), MESH_POINTS), "mesh"
    return None, "neither depth nor mesh"


def scene_cloud(
    scene: Scene, max_points: int = 40_000, view_ids: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(points float32 [N, 3] metres in the world frame, colors uint8 [N, 3]), N <= max_points.

    The views' depth, thinned by `thin_surfels`. Raises ValueError for a view without depth and for max_points < 1.
    """
    thinned = thin_surfels(scene_surfels(scene, view_ids), max_points)
    return thinned.points, thinned.colors


def thin_surfels(surfels: Surfels, max_points: int) -> Surfels:
    """One mean point per voxel; the voxels, 1 cm or more, are as large as `max_points` asks for. Deterministic.

    Raises ValueError for max_points < 1.
    """
    if max_points < 1:
        raise ValueError(f"max_points: expected at least 1, got {max_points}")
    voxel = SMALLEST_VOXEL
    while True:
        cells = np.floor((surfels.points - surfels.points.min(axis=0)) / voxel).astype(np.int64)
        size = cells.max(axis=0) + 1
        keys, index, count = np.unique(np.ravel_multi_index(cells.T, size), return_inverse=True, return_counts=True)
        if len(keys) <= max_points:
            break
        voxel *= max(1.05, np.sqrt(len(keys) / max_points) * 0.98)  # surfaces: the count falls with the square
    points, colors, normals = (
        np.stack([np.bincount(index, a[:, i]) for i in range(3)], 1) / count[:, None]
        for a in (surfels.points, surfels.colors, surfels.normals)
    )
    length = np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)  # a voxel may see both sides of a sheet
    return Surfels(
        points.astype(np.float32),
        colors.round().astype(np.uint8),
        (normals / length).astype(np.float32),
        np.full(len(points), 1.5 * voxel, np.float32),
    )


def colors_at_depth(view: View, rgb: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: for each pixel of a posed view's depth [h, w] the nearest one of its picture [H, W, 3]."""
    own = depth_intrinsics(view, depth.shape[::-1])
    nearest = [
        np.floor((np.arange(depth.shape[1 - i]) - own[i, 2]) / own[i, i] * view.K[i, i] + view.K[i, 2] + 0.5)
        for i in (0, 1)
    ]
    columns, rows = (np.clip(n, 0, rgb.shape[1 - i] - 1).astype(int) for i, n in enumerate(nearest))
    return rgb[rows[:, None], columns]


def _view_surfels(view: View, stride: int) -> Surfels:
    depth, rgb = view.load_depth(), view.load_rgb()
    height, width = depth.shape
    K = depth_intrinsics(view, (width, height))
    points, valid = unproject(depth, K, view.camera_to_world)
    jump = np.full(depth.shape, np.inf)
    across, down = np.full(points.shape, np.nan), np.full(points.shape, np.nan)
    across[:, 1:-1] = (points[:, 2:] - points[:, :-2]) / 2
    down[1:-1] = (points[2:] - points[:-2]) / 2
    inner = depth[1:-1, 1:-1]
    around = np.stack([depth[1:-1, 2:], depth[1:-1, :-2], depth[2:, 1:-1], depth[:-2, 1:-1]])
    jump[1:-1, 1:-1] = np.abs(around - inner).max(axis=0)
    normals = np.cross(down, across)  # image y down, x right: towards the camera
    length = np.linalg.norm(normals, axis=-1)
    keep = valid & (jump <= MAX_JUMP * depth) & (length > 0)
    keep[np.arange(height) % stride != stride // 2] = False
    keep[:, np.arange(width) % stride != stride // 2] = False
    spacing = np.maximum(np.linalg.norm(across, axis=-1), np.linalg.norm(down, axis=-1)) * stride
    return Surfels(
        points[keep].astype(np.float32),
        colors_at_depth(view, rgb, depth)[keep],
        (normals[keep] / length[keep, None]).astype(np.float32),
        spacing[keep].astype(np.float32),
    )
