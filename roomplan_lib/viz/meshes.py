"""Coloured triangle meshes: read, sampled, and drawn without a screen by ray casting. Needs Open3D."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from roomplan_lib.geometry import look_at
from roomplan_lib.scenes import Scene
from roomplan_lib.viz.clouds import Surfels
from roomplan_lib.viz.oblique import CUT_HEIGHT

BACKGROUND = 255  # grey of pixels that no ray hits
HEADLIGHT = 0.35  # share of the shading that follows the angle to the viewer; the rest is the mesh's own colour
FIELD_OF_VIEW = np.radians(45)  # of `render_scene`, along the picture's width


@dataclass(frozen=True, eq=False)
class Mesh:
    """vertices: float32 [N, 3] metres. colors: uint8 [N, 3]. triangles: int32 [T, 3], their corners counter-clockwise
    seen from where the surface is seen."""

    vertices: np.ndarray
    colors: np.ndarray
    triangles: np.ndarray

    def __len__(self) -> int:
        return len(self.triangles)

    @property
    def normals(self) -> np.ndarray:
        """float32 [T, 3] of the triangles, as long as twice their area in square metres."""
        a, b, c = self.vertices[self.triangles].transpose(1, 0, 2)
        return np.cross(b - a, c - a)


def read_mesh(path: Path | str, to_world: np.ndarray | None = None) -> Mesh:
    """The triangle mesh of a PLY, OBJ, STL, OFF or GLTF file, moved by the rigid 4x4 `to_world`; grey without colours.

    Raises ValueError for a file without triangles.
    """
    import open3d as o3d

    if not Path(path).is_file():
        raise ValueError(f"{path}: file is missing; fetch the mesh again")
    with o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        mesh = o3d.io.read_triangle_mesh(str(path))  # warns where it should raise
    vertices = np.asarray(mesh.vertices)
    if not len(mesh.triangles) or not np.isfinite(vertices).all():
        raise ValueError(f"{path}: no mesh with triangles and finite vertices can be read here; fetch it again")
    if to_world is not None:
        vertices = vertices @ to_world[:3, :3].T + to_world[:3, 3]
    colors = np.asarray(mesh.vertex_colors) if mesh.has_vertex_colors() else np.full(vertices.shape, 0.7)
    return Mesh(vertices.astype(np.float32), np.round(colors * 255).astype(np.uint8), np.asarray(mesh.triangles))


def scene_mesh(scene: Scene) -> Mesh:
    """The scene's mesh in its world. Raises ValueError when it has none, or one that cannot be read."""
    if scene.mesh_path is None:
        raise ValueError(f"scene {scene.scene_id} has no mesh file; fuse its depth with fuse_scene")
    to_world = scene.metadata.get("mesh_to_world")
    return read_mesh(scene.mesh_path, None if to_world is None else np.asarray(to_world))


def mesh_surfels(mesh: Mesh, num_points: int) -> Surfels:
    """Points spread evenly over a mesh's area, by a generator of a fixed seed."""
    rng = np.random.default_rng(0)
    normals = mesh.normals
    area = np.linalg.norm(normals, axis=1) / 2
    face = np.sort(rng.choice(len(mesh), num_points, p=area / area.sum()))
    u, v = rng.random((2, num_points, 1), dtype=np.float32)
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    corners = mesh.triangles[face]

    def mix(values: np.ndarray) -> np.ndarray:
        a, b, c = values[corners].astype(np.float32).transpose(1, 0, 2)
        return a + u * (b - a) + v * (c - a)

    return Surfels(
        mix(mesh.vertices),
        mix(mesh.colors).round().astype(np.uint8),
        (normals[face] / (2 * area[face, None])).astype(np.float32),
        np.full(num_points, 1.5 * np.sqrt(area.sum() / num_points), np.float32),
    )


def render_mesh(
    mesh: Mesh, K: np.ndarray, camera_to_world: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A mesh as a camera sees it: rgb uint8 [H, W, 3], depth float32 [H, W] metres along z, 0 where nothing is.

    K: [3, 3] pixels, (0, 0) is a pixel's centre. size: (width, height). Triangles that turn their back to the camera
    are not drawn, so that one looks into a room from outside.
    """
    import open3d as o3d

    from roomplan_lib.scenes.rooms.render import camera_rays  # imports Open3D

    normals = mesh.normals
    towards = camera_to_world[:3, 3] - mesh.vertices[mesh.triangles].mean(axis=1)
    facing = np.flatnonzero((normals * towards).sum(axis=1) > 0)
    width, height = size
    if not len(facing):
        return np.full((height, width, 3), BACKGROUND, np.uint8), np.zeros((height, width), np.float32)
    triangles = mesh.triangles[facing]
    caster = o3d.t.geometry.RaycastingScene(nthreads=1)
    caster.add_triangles(
        o3d.core.Tensor(np.ascontiguousarray(mesh.vertices, np.float32)),
        o3d.core.Tensor(np.ascontiguousarray(triangles, np.uint32)),
    )
    rays = camera_rays(K, camera_to_world, size).reshape(-1, 6)
    hit = caster.cast_rays(o3d.core.Tensor(rays), nthreads=1)
    depth, triangle, uv = (hit[key].numpy() for key in ("t_hit", "primitive_ids", "primitive_uvs"))
    seen = np.isfinite(depth)
    triangle, (u, v) = triangle[seen], uv[seen].T[..., None]
    a, b, c = mesh.colors[triangles[triangle]].astype(np.float32).transpose(1, 0, 2)
    normal, ray = normals[facing][triangle], rays[seen, 3:]
    cosine = np.abs((normal * ray).sum(1)) / (np.linalg.norm(normal, axis=1) * np.linalg.norm(ray, axis=1))
    rgb = np.full((height * width, 3), BACKGROUND, np.uint8)
    rgb[seen] = (a + u * (b - a) + v * (c - a)) * (1 - HEADLIGHT + HEADLIGHT * cosine[:, None])
    return rgb.reshape(height, width, 3), np.where(seen, depth, 0).astype(np.float32).reshape(height, width)


def cut_above(mesh: Mesh, height: float = CUT_HEIGHT) -> Mesh:
    """The mesh without the triangles that reach `height` metres above its floor."""
    floor = np.percentile(mesh.vertices[:, 2], 1)
    top = mesh.vertices[mesh.triangles][..., 2].max(axis=1)
    return Mesh(mesh.vertices, mesh.colors, mesh.triangles[top < floor + height])


def render_scene(
    scene: Scene,
    mesh: Mesh | None = None,
    *,
    azimuth: float = np.radians(-60),
    elevation: float = np.radians(40),
    size: tuple[int, int] = (640, 480),
    cut_height: float | None = CUT_HEIGHT,
) -> np.ndarray:
    """uint8 [H, W, 3] picture of a scene from outside and above, without a screen; all of it fits.

    mesh: what to draw, the scene's own for None. azimuth, elevation: radians, where the camera stands as seen from the
    scene's middle. cut_height: metres above the floor beyond which nothing is drawn, None draws all.
    """
    mesh = scene_mesh(scene) if mesh is None else mesh
    if cut_height is not None:
        mesh = cut_above(mesh, cut_height)
    points = mesh.vertices[np.unique(mesh.triangles)]
    lower, upper = points.min(axis=0), points.max(axis=0)
    middle = (lower + upper) / 2
    width, height = size
    focal = width / 2 / np.tan(FIELD_OF_VIEW / 2)
    K = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    towards = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    camera = look_at(middle + towards, middle)
    # Each point must lie within the picture: |x| <= z * slope along each axis gives a distance; the largest fits all.
    local = (points - middle) @ camera[:3, :3]
    slopes = np.array([width, height]) * 0.48 / focal
    distance = (np.abs(local[:, :2]) / slopes - local[:, 2:]).max()
    return render_mesh(mesh, K, look_at(middle + towards * distance, middle), size)[0]
