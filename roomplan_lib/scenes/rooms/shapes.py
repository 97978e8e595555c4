"""What furniture and walls are built from: four-cornered faces with a material.

An object's own frame: x along its width, y towards its front, z up, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from roomplan_lib.geometry import rotation_z

# Names of main colours and their sRGB values in [0, 1]; far enough apart to be told from each other in a picture.
PALETTE = {
    "white": (0.92, 0.91, 0.89),
    "black": (0.075, 0.075, 0.085),
    "gray": (0.50, 0.51, 0.52),
    "red": (0.76, 0.10, 0.09),
    "orange": (0.94, 0.47, 0.06),
    "yellow": (0.93, 0.79, 0.13),
    "green": (0.15, 0.50, 0.20),
    "blue": (0.12, 0.29, 0.72),
    "purple": (0.46, 0.17, 0.60),
    "brown": (0.43, 0.26, 0.14),
    "pink": (0.93, 0.52, 0.67),
}
TEXTURES = (
    "plain", "wood", "wood_upright", "planks", "tiles", "bricks", "fabric", "carpet", "stripes", "checker",
    "plaid", "stone", "screen", "outside", "painting",
)  # fmt: skip


@dataclass(frozen=True)
class Material:
    """A surface: `texture` mixes sRGB `color` with `second`; one tile of it covers `period` metres.

    An `emission` above 0 replaces the light that falls on the surface (lamps, embers, the sky behind a window).
    """

    color: tuple[float, float, float]
    second: tuple[float, float, float]
    texture: str = "plain"
    period: float = 1.0
    emission: float = 0.0


def material(color, second=None, texture: str = "plain", period: float = 1.0, emission: float = 0.0) -> Material:
    """Material from an sRGB triple or a palette name; without `second` the texture only darkens a little."""
    color = np.array(PALETTE[color] if isinstance(color, str) else color, dtype=np.float64)
    if second is None:
        second = color * {"plain": 0.93, "fabric": 0.80, "plaid": 0.7, "stripes": 0.8}.get(texture, 0.74)
    elif isinstance(second, str):
        second = PALETTE[second]
    return Material(tuple(color.tolist()), tuple(np.asarray(second).tolist()), texture, period, emission)


def vary(rng: np.random.Generator, name: str) -> np.ndarray:
    """sRGB of a palette colour, a little lighter or darker and off in hue."""
    color = np.array(PALETTE[name]) * rng.uniform(0.93, 1.07) + rng.uniform(-0.015, 0.015, 3)
    return np.clip(color, 0.03, 0.97)


@dataclass
class Shape:
    """A growing list of faces.

    corners: per entry [F, 4, 3] metres, counter-clockwise seen from outside. normals: the same shape, per corner.
    materials: per entry one Material for its F faces.
    """

    corners: list[np.ndarray] = field(default_factory=list)
    normals: list[np.ndarray] = field(default_factory=list)
    materials: list[Material] = field(default_factory=list)

    def add(self, corners: np.ndarray, mat: Material, normals: np.ndarray | None = None) -> None:
        """Faces [F, 4, 3]; flat normals where none are given."""
        corners = np.asarray(corners, dtype=np.float64).reshape(-1, 4, 3)
        if normals is None:
            flat = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
            flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
            normals = np.repeat(flat[:, None], 4, axis=1)
        self.corners.append(corners)
        self.normals.append(normals)
        self.materials.append(mat)

    def block(self, low, high, mat: Material, tilt: float = 0.0) -> None:
        """Box between two corners; `tilt` radians turns it about the x axis through its lower middle."""
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        assert (high > low).all(), f"empty block {low} .. {high}"
        corners = np.where(_BOX_FACES > 0, high, low)
        if tilt:
            pivot = np.array([0.0, (low[1] + high[1]) / 2, low[2]])
            c, s = np.cos(tilt), np.sin(tilt)
            corners = (corners - pivot) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]).T + pivot
        self.add(corners, mat)

    def lathe(
        self, profile, mat: Material, center=(0.0, 0.0, 0.0), scale=(1.0, 1.0), power: float = 2.0,
        segments: int = 16, axis: str = "z",
    ) -> None:  # fmt: skip
        """Surface of revolution about `axis` through `center`.

        profile: (radius, height) pairs from the lower outside upwards; a radius of 0 closes the surface.
        scale: of the cross-section's two directions; power: 2 is an ellipse, larger is nearer to a rectangle.
        segments: an even count of faces round about.
        """
        angle = np.arange(segments + 1) * (2 * np.pi / segments)
        ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        ring = np.sign(ring) * np.abs(ring) ** (2 / power) * scale
        ring[-1] = ring[0]
        outward = np.zeros_like(ring)
        step = np.roll(ring[:-1], -1, axis=0) - np.roll(ring[:-1], 1, axis=0)
        outward[:-1] = np.stack([step[:, 1], -step[:, 0]], axis=-1)
        outward[:-1] /= np.linalg.norm(outward[:-1], axis=-1, keepdims=True)
        outward[-1] = outward[0]
        turn = _AXIS_FRAMES[axis]
        for (r0, z0), (r1, z1) in zip(profile[:-1], profile[1:], strict=True):
            slope = np.array([z1 - z0, r0 - r1]) / np.hypot(z1 - z0, r1 - r0)  # outward and up parts of the normal
            normal = np.concatenate([outward * slope[0], np.full((segments + 1, 1), slope[1])], axis=-1)
            low = np.concatenate([ring * r0, np.full((segments + 1, 1), z0)], axis=-1)
            high = np.concatenate([ring * r1, np.full((segments + 1, 1), z1)], axis=-1)
            if r0 == 0 or r1 == 0:  # a fan, two segments to a face
                tip, rim = (low, high) if r0 == 0 else (high, low)
                i = np.arange(0, segments, 2)
                order = (i + 2, i + 1, i) if r0 == 0 else (i, i + 1, i + 2)
                faces = np.stack([tip[i], *(rim[k] for k in order)], axis=1)
                normals = np.stack([normal[i + 1], *(normal[k] for k in order)], axis=1)
            else:
                i = np.arange(segments)
                faces = np.stack([low[i], low[i + 1], high[i + 1], high[i]], axis=1)
                normals = np.stack([normal[i], normal[i + 1], normal[i + 1], normal[i]], axis=1)
            self.add(faces @ turn.T + center, mat, normals @ turn.T)

    def rod(self, start, end, radius: float, mat: Material, segments: int = 8, tip: float | None = None) -> None:
        """Closed cylinder from `start` to `end`; `tip` is the radius at the end if it differs."""
        start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        length = np.linalg.norm(end - start)
        up = (end - start) / length
        side = np.cross(up, [1.0, 0, 0] if abs(up[0]) < 0.9 else [0, 1.0, 0])
        side /= np.linalg.norm(side)
        frame = np.stack([side, np.cross(up, side), up], axis=1)
        rod = Shape()
        tip = radius if tip is None else tip
        rod.lathe([(0, 0), (radius, 0), (tip, length), (0, length)], mat, segments=segments)
        for corners, normals in zip(rod.corners, rod.normals, strict=True):
            self.add(corners @ frame.T + start, mat, normals @ frame.T)

    def cushion(self, low, high, mat: Material, roundness: float = 0.5, segments: int = 16) -> None:
        """Box with rounded edges between two corners (superquadric; `roundness` 1 is an ellipsoid, 0 a box)."""
        low, high = np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
        assert (high > low).all(), f"empty cushion {low} .. {high}"
        half, exponent = (high - low) / 2, max(roundness, 0.05)
        longitude = np.linspace(-np.pi, np.pi, segments + 1) + np.pi / 4
        latitude = np.linspace(-np.pi / 2, np.pi / 2, segments // 2 + 1)

        def bend(value, power):
            return np.sign(value) * np.abs(value) ** power

        lat, lon = latitude[:, None], longitude[None]
        lon = np.repeat(lon, len(latitude), axis=0)
        lat = np.repeat(lat, segments + 1, axis=1)
        lon[:, -1] = lon[:, 0]

        def surface(power):
            return np.stack(
                [
                    bend(np.cos(lat), power) * bend(np.cos(lon), power),
                    bend(np.cos(lat), power) * bend(np.sin(lon), power),
                    bend(np.sin(lat), power),
                ],
                axis=-1,
            )

        points = surface(exponent) * half
        normal = surface(2 - exponent) / half
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        points = points + (low + high) / 2

        def faces(grid):
            return np.stack([grid[:-1, :-1], grid[:-1, 1:], grid[1:, 1:], grid[1:, :-1]], axis=2).reshape(-1, 4, 3)

        self.add(faces(points), mat, faces(normal))

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner, [3] each, metres."""
        points = np.concatenate([c.reshape(-1, 3) for c in self.corners])
        return points.min(axis=0), points.max(axis=0)

    def moved(self, offset) -> Shape:
        """The same shape shifted by `offset` [3] metres."""
        return Shape([c + offset for c in self.corners], list(self.normals), list(self.materials))


@dataclass(frozen=True, eq=False)
class Faces:
    """All four-cornered faces of a room.

    corners, normals: [F, 4, 3] float64, room frame, metres. instance: [F] uint16. frame, material: [F] int, which row
    of `frame_rotation` [M, 3, 3] and `frame_origin` [M, 3] (columns and origin of the frame its texture lives in) and
    of `materials` belongs to the face.
    """

    corners: np.ndarray
    normals: np.ndarray
    instance: np.ndarray
    frame: np.ndarray
    material: np.ndarray
    frame_rotation: np.ndarray
    frame_origin: np.ndarray
    materials: list[Material]


@dataclass
class FaceCollector:
    """Collects shapes into one `Faces`."""

    corners: list = field(default_factory=list)
    normals: list = field(default_factory=list)
    instance: list = field(default_factory=list)
    frame: list = field(default_factory=list)
    material: list = field(default_factory=list)
    rotations: list = field(default_factory=list)
    origins: list = field(default_factory=list)
    materials: list = field(default_factory=list)
    known: dict = field(default_factory=dict)

    def add(self, shape: Shape, instance: int, origin=(0.0, 0.0, 0.0), yaw: float = 0.0) -> None:
        rotation = rotation_z(yaw)
        for corners, normals, mat in zip(shape.corners, shape.normals, shape.materials, strict=True):
            if mat not in self.known:
                self.known[mat] = len(self.materials)
                self.materials.append(mat)
            self.corners.append(corners @ rotation.T + origin)
            self.normals.append(normals @ rotation.T)
            self.instance.append(np.full(len(corners), instance, dtype=np.uint16))
            self.frame.append(np.full(len(corners), len(self.rotations)))
            self.material.append(np.full(len(corners), self.known[mat]))
        self.rotations.append(rotation)
        self.origins.append(np.asarray(origin, dtype=np.float64))

    def faces(self) -> Faces:
        return Faces(
            np.concatenate(self.corners), np.concatenate(self.normals), np.concatenate(self.instance),
            np.concatenate(self.frame), np.concatenate(self.material), np.stack(self.rotations),
            np.stack(self.origins), self.materials,
        )  # fmt: skip


# Faces of a box, -x +x -y +y -z +z, corners counter-clockwise seen from outside; 1 picks the high side.
_BOX_FACES = np.array(
    [
        [[0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]],
        [[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]],
        [[0, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1, 0]],
        [[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 0]],
        [[0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]],
    ]
)
# Columns: where the cross-section's two directions and the axis of a lathe point.
_AXIS_FRAMES = {
    "z": np.eye(3),
    "x": np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]]),
    "y": np.array([[0, 1.0, 0], [0, 0, 1], [1, 0, 0]]),
}
