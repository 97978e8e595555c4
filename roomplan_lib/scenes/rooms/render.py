"""Pictures of a room on the CPU: colour, depth and instance ids by ray casting (Open3D), shading in NumPy.

Pixel (u, v) is the ray through ((u - cx) / fx, (v - cy) / fy, 1) of an OpenCV camera: pixel (0, 0) has its centre at
(0, 0). Rays keep z = 1 in the camera, so the hit parameter is the depth along z.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import open3d as o3d

from roomplan_lib.scenes.rooms.plan import CEILING_ID, Room, wall_frame
from roomplan_lib.scenes.rooms.shapes import TEXTURES, Faces

_TEXELS = 512  # side of a texture tile
_LEVELS = 7  # of its halvings, for surfaces seen from afar
# Further rays of a pixel on an edge, in pixels from its centre, beside the one through the centre.
_SAMPLES = np.array([[0.10, -0.38], [0.30, 0.26], [-0.38, 0.12]])
LIGHT_CELL = 0.04  # metres between the points where light is worked out; shadows blur over as much
_AMBIENT = np.array([0.34, 0.35, 0.37], dtype=np.float32)
_SKY = np.array([0.85, 0.95, 1.10], dtype=np.float32)
_SUN = np.array([1.25, 1.12, 0.90], dtype=np.float32)


class RoomRenderer:
    """Ray casting scene of one room, in the room frame. Runs on one thread.

    No surface shines, so light does not depend on the viewer: it is worked out once, on a grid over every face, and
    looked up for every view.
    """

    def __init__(self, room: Room) -> None:
        self.room, self.faces = room, room.faces
        self._scene = _ray_scene(self.faces.corners)
        self._look = _Look(self.faces)
        self._grid = _FaceGrid(self.faces, LIGHT_CELL)
        self._light = _Lamps(room).light(*self._grid.points_and_normals())
        self._flat_normals = self.faces.normals.mean(axis=1).astype(np.float32)

    def trace(self, K: np.ndarray, camera_to_room: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Depth and ids alone, for many cameras [..., 4, 4] at once.

        K: [3, 3] pixels. size: (width, height). Returns depth float32 [..., H, W] metres, ids uint16 [..., H, W].
        """
        rays = camera_rays(K, camera_to_room, size)
        depth, triangle, _ = self._cast(rays.reshape(-1, 6))
        return depth.reshape(rays.shape[:-1]), self.faces.instance[triangle >> 1].reshape(rays.shape[:-1])

    def _cast(self, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distance [N], triangle [N] and barycentric coordinates [N, 2] of the first hit of rays [N, 6].

        About one ray in ten million slips through the edge that two faces share; it is turned by a ten-thousandth of
        its length until it hits one of them.
        """
        hit = self._scene.cast_rays(o3d.core.Tensor(rays), nthreads=1)
        depth, triangle, uv = (hit[k].numpy() for k in ("t_hit", "primitive_ids", "primitive_uvs"))
        for turn in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, -1, 0), (1, 0, -1)):
            missed = np.flatnonzero(~np.isfinite(depth))
            if not len(missed):
                break
            again = rays[missed]
            again[:, 3:] += np.float32(1e-4) * np.array(turn, dtype=np.float32)
            hit = self._scene.cast_rays(o3d.core.Tensor(again), nthreads=1)
            depth, triangle, uv = depth.copy(), triangle.copy(), uv.copy()
            depth[missed], triangle[missed], uv[missed] = (
                hit[k].numpy() for k in ("t_hit", "primitive_ids", "primitive_uvs")
            )
        assert np.isfinite(depth).all(), f"room {self.room.scene_id} has a hole in its walls"
        return depth, triangle, uv

    def view(
        self, K: np.ndarray, camera_to_room: np.ndarray, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One view. K: [3, 3] pixels. camera_to_room: [4, 4]. size: (width, height).

        Returns rgb uint8 [H, W, 3] (sRGB; edges are smoothed), depth float32 [H, W] metres, ids uint16 [H, W].
        """
        width, height = size
        rays = camera_rays(K, camera_to_room, size).reshape(-1, 6)
        focal = float(K[0, 0])
        depth, face, linear = self._shade(rays, focal)
        ids = self.faces.instance[face].reshape(height, width)
        edge = _edges(ids, self.faces.material[face].reshape(height, width), linear.reshape(height, width, 3))
        where = np.flatnonzero(edge)
        if len(where):
            steps = np.concatenate([_SAMPLES / [focal, float(K[1, 1])], np.zeros((len(_SAMPLES), 1))], axis=1)
            offsets = np.zeros((len(_SAMPLES), 6), dtype=np.float32)
            offsets[:, 3:] = steps @ camera_to_room[:3, :3].T
            _, _, more = self._shade((rays[where] + offsets[:, None]).reshape(-1, 6), focal)
            samples = np.concatenate([linear[where][None], more.reshape(len(_SAMPLES), -1, 3)])
            linear[where] = np.minimum(samples, 1).mean(axis=0)
        return to_srgb(linear).reshape(height, width, 3), depth.reshape(height, width), ids

    def _shade(self, rays: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Depth [N], face [N] and linear RGB [N, 3] of rays [N, 6]."""
        depth, triangle, uv = self._cast(rays)
        face = (triangle >> 1).astype(np.int32)
        # Triangles of a face are its corners 0 1 2 and 0 2 3; (s, t) runs over the face from corner 0 to corner 2.
        both = uv[:, 0] + uv[:, 1]
        odd = (triangle & 1).astype(bool)
        s, t = np.where(odd, uv[:, 0], both), np.where(odd, both, uv[:, 1])
        light = self._grid.look_up(self._light, face, s, t)
        # Metres that a pixel covers on the surface.
        slant = np.abs(_dot(self._flat_normals[face], rays[:, 3:]))
        albedo, emission = self._look(
            rays[:, :3] + rays[:, 3:] * depth[:, None], face, depth / (focal * np.maximum(slant, 0.2))
        )
        return depth, face, albedo * np.where(emission > 0, emission, light)

    def colored_mesh(self, edge: float = 0.12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The room as a mesh with lit vertex colours; faces are cut to about `edge` metres.

        Returns vertices float32 [V, 3] (room frame), colours uint8 [V, 3], triangles int32 [T, 3] and the face [V] that
        each vertex lies on.
        """
        grid = _FaceGrid(self.faces, edge)
        points, _ = grid.points_and_normals(inset=0.0)
        inside, _ = grid.points_and_normals()
        light = self._grid.look_up(self._light, grid.owner, grid.s, grid.t)
        albedo, emission = self._look(inside, grid.owner, np.full(len(points), edge / 3, dtype=np.float32))
        rgb = to_srgb(albedo * np.where(emission > 0, emission, light))
        triangles = grid.triangles()
        p = points[triangles]
        area = np.linalg.norm(np.cross(p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]), axis=1)
        return points, rgb, triangles[area > 1e-10], grid.owner


class _FaceGrid:
    """Points spread over every face in rows and columns, about `cell` metres apart."""

    def __init__(self, faces: Faces, cell: float) -> None:
        self.faces = faces
        c = faces.corners
        sides = np.linalg.norm(np.roll(c, -1, axis=1) - c, axis=2)
        longest = np.stack([sides[:, ::2].max(axis=1), sides[:, 1::2].max(axis=1)], axis=1)
        self.cuts = np.maximum(np.ceil(longest / cell), 1).astype(np.int32)  # [F, 2] cells along s and t
        count = (self.cuts + 1).prod(axis=1)
        self.start = (np.cumsum(count) - count).astype(np.int32)
        self.owner = np.repeat(np.arange(len(c)), count)
        number = np.arange(len(self.owner)) - self.start[self.owner]
        columns = self.cuts[self.owner, 1] + 1
        self.s = (number // columns / self.cuts[self.owner, 0]).astype(np.float32)
        self.t = (number % columns / self.cuts[self.owner, 1]).astype(np.float32)

    def points_and_normals(self, inset: float = 0.03) -> tuple[np.ndarray, np.ndarray]:
        """float32 [V, 3] each. inset: share by which the points leave the rim, where the next face begins."""
        s, t = (np.clip(x, inset, 1 - inset)[:, None] for x in (self.s, self.t))
        weights = ((1 - s) * (1 - t), s * (1 - t), s * t, (1 - s) * t)
        corners, normals = self.faces.corners.astype(np.float32), self.faces.normals.astype(np.float32)
        points = sum(w * corners[self.owner, k] for k, w in enumerate(weights))
        normal = sum(w * normals[self.owner, k] for k, w in enumerate(weights))
        return points, normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)

    def look_up(self, values: np.ndarray, face: np.ndarray, s: np.ndarray, t: np.ndarray) -> np.ndarray:
        """[N, C] bilinear values at (s, t) of the faces, from values [V, C] at the grid's points."""
        cuts = self.cuts[face]
        x, y = s * cuts[:, 0], t * cuts[:, 1]
        i, j = np.minimum(x.astype(np.int32), cuts[:, 0] - 1), np.minimum(y.astype(np.int32), cuts[:, 1] - 1)
        x, y = (x - i)[:, None], (y - j)[:, None]
        columns = cuts[:, 1] + 1
        first = self.start[face] + i * columns + j
        a, b = values.take(first, axis=0), values.take(first + 1, axis=0)
        a += (b - a) * y
        c, d = values.take(first + columns, axis=0), values.take(first + columns + 1, axis=0)
        c += (d - c) * y
        return a + (c - a) * x

    def triangles(self) -> np.ndarray:
        """int32 [T, 3] rows of the grid's points, two for every cell."""
        cells = self.cuts.prod(axis=1)
        face = np.repeat(np.arange(len(cells)), cells)
        number = np.arange(len(face)) - np.repeat(np.cumsum(cells) - cells, cells)
        columns = self.cuts[face, 1] + 1
        a = self.start[face] + number // self.cuts[face, 1] * columns + number % self.cuts[face, 1]
        b, d = a + columns, a + 1
        return np.concatenate([np.stack([a, b, b + 1], axis=1), np.stack([a, b + 1, d], axis=1)]).astype(np.int32)


class _Lamps:
    """All light in a room."""

    def __init__(self, room: Room) -> None:
        self.room = room
        # Lamps hang before their own light; they throw no shadow.
        self._occluders = _ray_scene(room.faces.corners[room.faces.instance != CEILING_ID])

    def light(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Linear RGB float32 [N, 3] that falls on surface points.

        points, normals: float32 [N, 3], room frame. Lambert's cosine under the lamps and under the sun through the
        windows, both with hard shadows; the sky's share of each window; ambient light.
        """
        light = _AMBIENT * (0.80 + 0.20 * normals[:, 2:3])
        start = points + normals * np.float32(0.003)
        for lamp in self.room.lights:
            way = lamp.position.astype(np.float32) - start
            square = _dot(way, way)
            cosine = _dot(way, normals) / np.sqrt(square)
            lit = np.flatnonzero(cosine > 0)
            lit = lit[~self._hidden(start[lit], way[lit])]
            # The constant stands for the lamp's own size.
            light[lit] += (cosine[lit] / (0.8 + square[lit]))[:, None] * lamp.power.astype(np.float32)
        sun = self.room.sun.astype(np.float32)
        for o in self.room.openings:
            if o.kind != "window":
                continue
            origin, along, inward = (x.astype(np.float32) for x in wall_frame(self.room.polygon, o.wall))
            center = (
                origin
                + along * np.float32(o.start + o.width / 2)
                + np.array([0, 0, (o.bottom + o.top) / 2], np.float32)
            )
            way = center - points
            square = _dot(way, way)
            cosine = np.maximum(_dot(way, normals), 0) * np.maximum(-_dot(way, inward), 0)
            area = np.float32(o.width * (o.top - o.bottom))
            light += (cosine / (square * (square + 0.6)) * 0.55 * area)[:, None] * _SKY
            through = -float(_dot(sun, inward))
            if through > 0.15:
                offset = points - origin
                reach = _dot(offset, inward) / np.float32(through)  # along the sun to the wall
                entry = offset + reach[:, None] * sun
                x, z = _dot(entry, along), entry[:, 2]
                inside = (x > o.start) & (x < o.start + o.width) & (z > o.bottom) & (z < o.top)
                cosine = _dot(normals, sun)
                lit = np.flatnonzero(inside & (cosine > 0) & (reach > 0.02))
                lit = lit[~self._hidden(start[lit], sun * (reach[lit, None] - 0.02))]
                light[lit] += cosine[lit, None] * _SUN
        return light

    def _hidden(self, start: np.ndarray, way: np.ndarray) -> np.ndarray:
        """[N] bool: whether something stands between start and start + way."""
        if len(start) == 0:
            return np.zeros(0, dtype=bool)
        rays = np.concatenate([start, way], axis=1).astype(np.float32)
        return self._occluders.test_occlusions(o3d.core.Tensor(rays), tnear=0.0, tfar=0.995, nthreads=1).numpy()


def camera_rays(K: np.ndarray, camera_to_room: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float32 [..., H, W, 6] origins and directions of the pixels' rays; directions have z = 1 in the camera."""
    width, height = size
    rotation = camera_to_room[..., :3, :3].astype(np.float32)
    x = ((np.arange(width) - K[0, 2]) / K[0, 0]).astype(np.float32)[:, None]
    y = ((np.arange(height) - K[1, 2]) / K[1, 1]).astype(np.float32)[:, None, None]
    right, down, forward = (rotation[..., None, None, :, k] for k in range(3))
    rays = np.empty((*camera_to_room.shape[:-2], height, width, 6), dtype=np.float32)
    rays[..., :3] = camera_to_room[..., None, None, :3, 3]
    rays[..., 3:] = right * x + (down * y + forward)
    return rays


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """uint8 sRGB of linear values; what exceeds 0.8 is rolled off."""
    return _srgb_table()[np.clip(linear * 1365, 0, 4095).astype(np.int16)]


@cache
def _srgb_table() -> np.ndarray:
    value = np.arange(4096) / 1365.0  # linear light up to 3
    value = np.where(value < 0.7, value, 0.7 + 0.3 * (1 - np.exp(-(value - 0.7) / 0.3)))
    srgb = np.where(value <= 0.0031308, 12.92 * value, 1.055 * np.maximum(value, 1e-9) ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)


def _ray_scene(corners: np.ndarray) -> o3d.t.geometry.RaycastingScene:
    vertices = np.ascontiguousarray(corners.reshape(-1, 3), dtype=np.float32)
    first = np.arange(len(corners), dtype=np.uint32)[:, None] * 4
    triangles = np.stack([first + [0, 1, 2], first + [0, 2, 3]], axis=1).reshape(-1, 3).astype(np.uint32)
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(o3d.core.Tensor(vertices), o3d.core.Tensor(triangles))
    return scene


def _edges(ids: np.ndarray, mat: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """[H, W] bool: pixels beside another instance, material or a step in brightness."""
    grey = np.clip(linear.sum(axis=-1), 0, 3)
    edge = np.zeros(ids.shape, dtype=bool)
    for axis in (0, 1):
        a = (slice(None, -1), slice(1, None))
        low = (a[0],) if axis == 0 else (slice(None), a[0])
        high = (a[1],) if axis == 0 else (slice(None), a[1])
        step = (ids[low] != ids[high]) | (mat[low] != mat[high])
        step |= np.abs(grey[low] - grey[high]) > 0.12 * (grey[low] + grey[high]) + 0.02
        edge[low] |= step
        edge[high] |= step
    return edge


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner product over the last axis. Without BLAS, whose sums depend on the number of threads."""
    return np.einsum("...i,...i->...", a, b)


class _Look:
    """Albedo of surface points: the face's material, its texture looked up in the frame of its instance."""

    def __init__(self, faces: Faces) -> None:
        mats = faces.materials
        self.table, self.offset, self.width = _texture_pyramid()
        self.color = _linear(np.array([m.color for m in mats]))
        self.change = _linear(np.array([m.second for m in mats])) - self.color
        self.kind = np.array([TEXTURES.index(m.texture) for m in mats])
        self.density = np.array([_TEXELS / m.period for m in mats], dtype=np.float32)  # texels per metre
        self.emission = np.array([m.emission for m in mats], dtype=np.float32)
        self.material = faces.material
        # A face is textured along the two axes of its frame that it lies in: (x, y) if it is level, else (side, z).
        local = np.einsum("fij,fi->fj", faces.frame_rotation[faces.frame], faces.normals[:, 0])
        axis = np.argmax(np.abs(local), axis=1)
        rotation, origin = faces.frame_rotation[faces.frame], faces.frame_origin[faces.frame]
        first, second = np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)
        rows = np.arange(len(axis))
        along = np.stack([rotation[rows, :, first], rotation[rows, :, second]], axis=1)  # [F, 2, 3]
        shift = -np.einsum("fij,fj->fi", along, origin)
        fixed = np.isin(self.kind[self.material], [TEXTURES.index(t) for t in ("outside", "planks", "tiles", "bricks")])
        shift = shift + np.where(fixed, 0.0, (faces.frame * 0.377) % 3.1)[:, None]  # no two objects alike
        density = self.density[self.material]  # `along` and `shift` lead from metres to texels
        self.along = (along * density[:, None, None]).astype(np.float32)
        self.shift = (shift * density[:, None]).astype(np.float32)

    def __call__(self, points: np.ndarray, face: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Linear albedo [N, 3] and emission [N, 1] at points [N, 3] (room frame) of faces [N].

        footprint: [N] metres that a sample covers; it chooses how much a texture is blurred.
        """
        mat = self.material[face]
        texel = np.einsum("nij,nj->ni", self.along.take(face, axis=0), points) + self.shift.take(face, axis=0)
        level = np.log2(np.maximum(footprint * self.density[mat], 1.0)) + 0.5
        level = np.minimum(level, _LEVELS - 1).astype(np.int32)
        width = self.width[level]
        texel = (np.floor(texel).astype(np.int32) >> level[:, None]) & (width - 1)[:, None]
        value = self.table[self.offset[self.kind[mat], level] + texel[:, 1] * width + texel[:, 0]]
        mix = (value * np.float32(1 / 255))[:, None]
        return self.color.take(mat, axis=0) + self.change.take(mat, axis=0) * mix, self.emission[mat, None]


def _linear(srgb: np.ndarray) -> np.ndarray:
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


@cache
def _texture_pyramid() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint8 texels of all kinds and levels in a row, start [kinds, levels], side per level)."""
    table, offset, at = [], np.zeros((len(TEXTURES), _LEVELS), dtype=np.int32), 0
    for k, kind in enumerate(TEXTURES):
        image = _bake(kind)
        for level in range(_LEVELS):
            offset[k, level] = at
            table.append(np.round(image * 255).astype(np.uint8).ravel())
            at += image.size
            image = image.reshape(image.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3))
    return np.concatenate(table), offset, _TEXELS >> np.arange(_LEVELS, dtype=np.int32)


def _bake(kind: str) -> np.ndarray:
    """[512, 512] in [0, 1]: how much of a material's second colour shows; tiles seamlessly. Rows run along v."""
    rng = np.random.default_rng(TEXTURES.index(kind) + 100)
    n = _TEXELS
    v, u = np.mgrid[:n, :n] / n

    def noise(slope, stretch=(1.0, 1.0)):
        """1/f noise, scaled to [0, 1]; a stretch above 1 lengthens it along u or v."""
        fu, fv = np.meshgrid(np.fft.fftfreq(n) * n * stretch[0], np.fft.fftfreq(n) * n * stretch[1])
        spectrum = np.fft.fft2(rng.normal(size=(n, n))) / np.maximum(np.hypot(fu, fv), 1.0) ** slope
        spectrum[0, 0] = 0
        field = np.fft.ifft2(spectrum).real
        return np.clip(0.5 + field / (5 * field.std()), 0, 1)

    def grid(count_u, count_v, joint, shift=0.0):
        """Joints of a masonry bond: ([n, n] bool, [n, n] a random tone per stone)."""
        row = np.floor(v * count_v).astype(int)
        x = (u * count_u + row * shift) % count_u
        tone = rng.random((count_v, count_u))[row, np.floor(x).astype(int)]
        near = np.minimum(
            np.minimum(x % 1, 1 - x % 1) / count_u, np.minimum(v * count_v % 1, 1 - v * count_v % 1) / count_v
        )
        return near < joint / 2, tone

    def grain(stretch_u):
        warp = noise(1.6, (stretch_u, 1.0))
        return np.clip(
            0.5 + 0.3 * np.sin(2 * np.pi * (v * 14 + warp * 5)) * noise(1.0) + (noise(0.9, (stretch_u, 1)) - 0.5), 0, 1
        )

    if kind in ("wood", "wood_upright"):
        image = np.clip(grain(9.0) * 0.75, 0, 1)
        return image.T.copy() if kind == "wood_upright" else image
    if kind == "planks":
        joint, tone = grid(2, 16, 0.0022, 0.37)
        return np.where(joint, 1.0, np.clip(0.1 + 0.28 * tone + 0.4 * (grain(8.0) - 0.3), 0, 0.8))
    if kind == "tiles":
        joint, tone = grid(8, 8, 0.004)
        return np.where(joint, 1.0, 0.16 * tone + 0.12 * noise(1.2))
    if kind == "bricks":
        joint, tone = grid(4, 12, 0.011, 0.5)
        return np.where(joint, 1.0, 0.25 * tone + 0.2 * noise(0.8))
    if kind == "fabric":
        weave = 0.25 * (np.sin(2 * np.pi * u * 96) * np.sin(2 * np.pi * v * 96))
        return np.clip(0.45 + weave + 0.7 * (noise(0.5) - 0.5), 0, 1)
    if kind == "carpet":
        return np.clip(0.5 + 1.3 * (noise(0.35) - 0.5) + 0.4 * (noise(1.5) - 0.5), 0, 1)
    if kind == "stripes":
        return np.clip(np.where((u * 8) % 1 < 0.4, 0.9, 0.05) + 0.15 * (noise(0.6) - 0.5), 0, 1)
    if kind == "checker":
        return np.clip((np.floor(u * 6) + np.floor(v * 6)) % 2 * 0.85 + 0.2 * (noise(0.6) - 0.3), 0, 1)
    if kind == "plaid":
        lines = ((u * 6) % 1 < 0.35) * 0.4 + ((v * 6) % 1 < 0.35) * 0.4 + ((u * 6) % 1 > 0.93) * 0.3
        return np.clip(lines + 0.1 * noise(0.6), 0, 1)
    if kind == "stone":
        return np.clip(np.abs(noise(1.3) - 0.5) * 2.2 + 0.5 * (noise(0.5) - 0.4), 0, 1)
    if kind == "screen":
        return np.clip(0.5 + 0.5 * np.sin(2 * np.pi * (u + v)), 0, 1)
    if kind == "outside":
        # Repeats every 3 m of height: hedges up to about eye height, sky with thin clouds above.
        skyline = 0.36 + 0.24 * (noise(1.9)[:1] - 0.5) + 0.02 * noise(1.0)[1:2]
        return np.clip(np.where(v < skyline, 0.65 + 0.6 * (noise(1.1) - 0.5), 0.25 * (noise(1.6) - 0.45)), 0, 1)
    if kind == "painting":
        return np.clip(np.round(noise(1.8) * 5) / 5 + 0.2 * (noise(0.9) - 0.5), 0, 1)
    return noise(1.4)  # plain
