"""What stands where: floor plan, doors and windows, and furniture placed as people place it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from roomplan_lib.scenes.rooms.furniture import COLORS, Piece, build
from roomplan_lib.scenes.rooms.plan import (
    CELL,
    FIRST_DOOR_ID,
    FIRST_WINDOW_ID,
    Opening,
    rectangle_corners,
    walkable_grid,
)
from roomplan_lib.scenes.rooms.shapes import PALETTE

THEMES = ("bedroom", "living_room", "kitchen", "bathroom", "studio")
MIN_OBJECTS, MAX_OBJECTS = 4, 10
MIN_UNUSUAL, MAX_UNUSUAL = 11, 14
KITCHEN_COLORS = ("white", "white", "gray", "brown", "green", "blue")
SOFA_COLORS = tuple(color for color in PALETTE if color not in ("white", "black"))
# Colours that a category has in no usual room. Of a television one sees the screen.
UNUSUAL_COLORS = {
    category: sorted(
        {*PALETTE}
        - {*usual}
        - {"cabinet": {*KITCHEN_COLORS}, "sink": {*KITCHEN_COLORS}, "sofa": {*SOFA_COLORS}}.get(category, set())
    )
    for category, usual in COLORS.items()
    if category != "tv_monitor"
}


@dataclass
class Placed:
    piece: Piece
    position: np.ndarray  # [3] room frame, middle of the footprint, bottom
    yaw: float

    def rectangle(self, grow: float = 0.0) -> np.ndarray:
        return rectangle_corners(self.position[:2], self.piece.size[:2] / 2 + grow, self.yaw)


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two rectangles [4, 2] share area (separating axes)."""
    for axis in (a[1] - a[0], a[2] - a[1], b[1] - b[0], b[2] - b[1]):
        pa, pb = a @ axis, b @ axis
        if pa.max() <= pb.min() or pb.max() <= pa.min():
            return False
    return True


@dataclass
class _Zone:
    rectangle: np.ndarray
    bottom: float
    top: float


@dataclass(eq=False)
class Layout:
    """A room being furnished, in the room frame.

    unusual: outside of what other rooms are like: T- or Z-shaped, its furniture in colours that it never has elsewhere,
    and more of it.
    """

    rng: np.random.Generator
    theme: str
    unusual: bool = False
    polygon: np.ndarray = field(init=False)
    openings: list[Opening] = field(init=False)
    placed: list[Placed] = field(init=False)
    solid: list[_Zone] = field(init=False)  # what bodies must not touch
    clear: list[_Zone] = field(init=False)  # what bodies must leave free

    def __post_init__(self) -> None:
        rng = self.rng
        self.placed, self.solid, self.clear = [], [], []
        lx, ly = sorted(
            {
                "bedroom": rng.uniform((3.2, 3.2), (4.8, 4.4)),
                "living_room": rng.uniform((4.2, 3.6), (6.0, 5.0)),
                "kitchen": rng.uniform((3.4, 3.0), (5.2, 4.2)),
                "bathroom": rng.uniform((3.0, 2.7), (4.0, 3.4)),
                "studio": rng.uniform((4.6, 4.0), (6.0, 5.4)),
            }[self.theme],
            reverse=True,
        )
        self.height = float(rng.uniform(2.4, 2.9))
        self.size = np.array([lx, ly])
        if self.unusual:
            self.size += (1.0, 0.8)
            lx, ly = self.size
        shape_l = rng.random() < {"bathroom": 0.15, "studio": 0.6, "living_room": 0.5}.get(self.theme, 0.35)
        # Notches by the corner that they take, which side of x and of y; what is left stays at least 1.9 m wide.
        corners = [(1, 1)] if shape_l else []
        if self.unusual:
            corners = [(1, 1), (0, 1) if rng.random() < 0.5 else (0, 0)]
        self.notches: dict[tuple[int, int], np.ndarray] = {}
        for corner in corners:
            notch = np.array([rng.uniform(0.22, 0.42) * lx, rng.uniform(0.22, 0.42) * ly])
            self.notches[corner] = notch = np.minimum(notch, (self.size - 1.9) / len(corners))
            middle = np.where(corner, self.size - notch / 2, notch / 2)
            self.solid.append(_Zone(rectangle_corners(middle, notch / 2 - 1e-6, 0.0), 0.0, self.height))
        self.polygon = polygon = self._outline()
        ends = np.roll(polygon, -1, axis=0)
        self.wall_length = np.linalg.norm(ends - polygon, axis=1)
        self.wall_direction = (ends - polygon) / self.wall_length[:, None]
        self.wall_normal = np.stack([-self.wall_direction[:, 1], self.wall_direction[:, 0]], axis=1)  # into the room
        self.wall_yaw = np.arctan2(self.wall_direction[:, 1], self.wall_direction[:, 0])
        self._cut_openings()

    def _outline(self) -> np.ndarray:
        """[W, 2] corners of the floor, counter-clockwise."""
        points: list[np.ndarray] = []
        for corner in ((0, 0), (1, 0), (1, 1), (0, 1)):
            at = self.size * corner
            notch = self.notches.get(corner)
            if notch is None:
                points.append(at)
                continue
            inner = np.where(corner, self.size - notch, notch)
            beside = [np.array([inner[0], at[1]]), np.array([at[0], inner[1]])]  # along x, along y
            along_x_first = corner in ((1, 0), (0, 1))
            points += [beside[0], inner, beside[1]] if along_x_first else [beside[1], inner, beside[0]]
        return np.array(points)

    def between_notches(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper corner of a rectangle that no notch reaches into, by x or by y."""
        low, high = np.zeros(2), self.size.copy()
        for corner, notch in self.notches.items():
            low = np.where(corner, low, np.maximum(low, notch))
            high = np.where(corner, np.minimum(high, self.size - notch), high)
        return low, high

    def build(self, category: str, style: str = "", color: str = "") -> Piece:
        """As `furniture.build`; in an unusual room in a colour of those."""
        if self.unusual and category in UNUSUAL_COLORS:
            color = str(self.rng.choice(UNUSUAL_COLORS[category]))
        return build(category, self.rng, style, color)

    def crowd(self) -> None:
        """More furniture of any kind, against the walls and off them."""
        kinds = sorted(COLORS)
        for _ in range(60):
            if len(self.placed) >= MAX_UNUSUAL:
                return
            kind = kinds[self.rng.integers(len(kinds))]
            if kind == "tv_monitor":
                continue
            piece = self.build(kind)
            if kind in ("stool", "chair", "table") and self.rng.random() < 0.5:
                self.free(piece, border=0.6)
            else:
                self.at_wall(piece, front=0.3)

    def _cut_openings(self) -> None:
        rng = self.rng
        self.openings = []
        doors = 1 if rng.random() < 0.75 or self.theme == "bathroom" else 2
        windows = int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2])) if self.theme != "bathroom" else 1
        tries = 0
        while (doors or windows) and tries < 200:
            tries += 1
            is_door = doors > 0
            wall = int(rng.choice(len(self.polygon), p=self.wall_length / self.wall_length.sum()))
            if is_door:
                width, bottom, top = rng.uniform(0.80, 0.95), 0.0, rng.uniform(1.98, 2.1)
            else:
                low = self.theme in ("living_room", "studio") and rng.random() < 0.35
                width = rng.uniform(0.6, 0.9) if self.theme == "bathroom" else rng.uniform(0.9, 1.9)
                bottom, top = rng.uniform(0.3, 0.5) if low else rng.uniform(0.95, 1.15), rng.uniform(2.0, 2.2)
            margin = 0.22 if is_door else 0.3
            if self.wall_length[wall] < width + 2 * margin:
                continue
            start = rng.uniform(margin, self.wall_length[wall] - width - margin)
            if is_door and rng.random() < 0.6:  # most doors are near a corner
                start = margin if rng.random() < 0.5 else self.wall_length[wall] - width - margin
            if any(
                o.wall == wall and start < o.start + o.width + 0.3 and o.start < start + width + 0.3
                for o in self.openings
            ):
                continue
            kind = "door" if is_door else "window"
            number = sum(o.kind == kind for o in self.openings)
            first = FIRST_DOOR_ID if is_door else FIRST_WINDOW_ID
            self.openings.append(Opening(kind, first + number, wall, start, width, bottom, min(top, self.height - 0.2)))
            if is_door:
                doors -= 1
                self.clear.append(_Zone(self.strip(wall, start - 0.05, start + width + 0.05, 0.95), 0.0, 2.0))
            else:
                windows -= 1
                self.clear.append(_Zone(self.strip(wall, start - 0.05, start + width + 0.05, 0.5), bottom + 0.02, top))

    def strip(self, wall: int, start: float, end: float, depth: float) -> np.ndarray:
        """Rectangle along a wall, from `start` to `end` metres, `depth` into the room."""
        origin, along, inward = self.polygon[wall], self.wall_direction[wall], self.wall_normal[wall]
        center = origin + along * (start + end) / 2 + inward * (depth / 2 + 0.004)
        return rectangle_corners(center, np.array([(end - start) / 2, depth / 2]), self.wall_yaw[wall])

    def fits(self, rectangle: np.ndarray, bottom: float, top: float, through_clear: bool = False) -> bool:
        """Whether a body may stand there: in the room, touching nothing, leaving what must be free."""
        if (rectangle < 0.012).any() or (rectangle > self.size - 0.012).any():
            return False
        zones = self.solid if through_clear else self.solid + self.clear
        return not any(z.bottom < top and bottom < z.top and _overlap(rectangle, z.rectangle) for z in zones)

    def place(
        self, piece: Piece, xy, yaw: float, z: float = 0.0, front: float = 0.0, through_clear: bool = False
    ) -> Placed | None:
        """Put the piece there if it fits, with `front` metres before it left free; None if not."""
        if len(self.placed) >= (MAX_UNUSUAL if self.unusual else MAX_OBJECTS):
            return None
        item = Placed(piece, np.array([*xy, z]), yaw)
        top = z + piece.size[2]
        if not self.fits(item.rectangle(0.008), z, top, through_clear):
            return None
        if front:
            way = np.array([-np.sin(yaw), np.cos(yaw)])
            middle = np.asarray(xy) + way * (piece.size[1] / 2 + front / 2)
            zone = _Zone(
                rectangle_corners(middle, np.array([piece.size[0] / 2 - 0.03, front / 2 - 0.01]), yaw), 0.0, 1.9
            )
            if not self.fits(zone.rectangle, 0.0, 1.9, through_clear=True):
                return None
            self.clear.append(zone)
        self.solid.append(_Zone(item.rectangle(), z, top))
        self.placed.append(item)
        return item

    def at_wall(
        self, piece: Piece, front: float = 0.0, corner: float = 0.25, wall: int | None = None, at: float | None = None,
        z: float = 0.0, gap: float | None = None, tries: int = 40,
    ) -> Placed | None:  # fmt: skip
        """Stand the piece with its back to a wall. corner: how often a corner is tried. at: metres along the wall."""
        w, d = piece.size[:2]
        for _ in range(tries):
            k = (
                int(self.rng.choice(len(self.polygon), p=self.wall_length / self.wall_length.sum()))
                if wall is None
                else wall
            )
            length = self.wall_length[k]
            if length < w + 0.05:
                continue
            s = self.rng.uniform(w / 2 + 0.02, length - w / 2 - 0.02)
            if self.rng.random() < corner:
                s = w / 2 + 0.022 if self.rng.random() < 0.5 else length - w / 2 - 0.022
            if at is not None:
                s = at
            distance = d / 2 + (self.rng.uniform(0.018, 0.05) if gap is None else gap)
            xy = self.polygon[k] + self.wall_direction[k] * s + self.wall_normal[k] * distance
            item = self.place(piece, xy, self.wall_yaw[k], z, front)
            if item is not None:
                return item
            if at is not None and wall is not None:
                return None
        return None

    def beside(self, item: Placed, piece: Piece, side: int, gap: float = 0.06, back: bool = True) -> Placed | None:
        """Next to another piece (side -1 or 1 along its width), backs in line."""
        along = np.array([np.cos(item.yaw), np.sin(item.yaw)])
        way = np.array([-along[1], along[0]])
        shift = -(item.piece.size[1] - piece.size[1]) / 2 if back else 0.0
        xy = item.position[:2] + along * side * (item.piece.size[0] / 2 + piece.size[0] / 2 + gap) + way * shift
        return self.place(piece, xy, item.yaw)

    def before(self, item: Placed, piece: Piece, gap: float, turn: float, offset: float = 0.0) -> Placed | None:
        """In the free space before another piece, turned by `turn` radians against it."""
        along = np.array([np.cos(item.yaw), np.sin(item.yaw)])
        way = np.array([-along[1], along[0]])
        depth = abs(np.cos(turn)) * piece.size[1] + abs(np.sin(turn)) * piece.size[0]
        xy = item.position[:2] + way * (item.piece.size[1] / 2 + depth / 2 + gap) + along * offset
        return self.place(piece, xy, item.yaw + turn, through_clear=True)

    def free(self, piece: Piece, tries: int = 40, border: float = 0.75, front: float = 0.0) -> Placed | None:
        """Somewhere off the walls, along the room's axes."""
        for _ in range(tries):
            xy = self.rng.uniform(border, self.size - border)
            yaw = self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.06)
            item = self.place(piece, xy, yaw, front=front)
            if item is not None:
                return item
        return None

    def seat_around(self, table: Placed, category: str, count: int, style: str, color: str) -> None:
        """Chairs or stools at a table's sides, facing it."""
        w, d = table.piece.size[:2]
        slots = [(0.0, s, side) for side in (-1, 1) for s in ((-0.27, 0.27) if w > 1.1 else (0.0,))]  # long sides
        slots += [(np.pi / 2, 0.0, side) for side in (-1, 1)]  # ends
        order = self.rng.permutation(len(slots))
        for k in order[:count]:
            turn, share, side = slots[k]
            piece = self.build(category, style, color)
            c, s = np.cos(table.yaw), np.sin(table.yaw)
            reach = (d if turn == 0 else w) / 2 + piece.size[1] / 2 + self.rng.uniform(0.03, 0.16)
            local = np.array([share * w, side * reach]) if turn == 0 else np.array([side * reach, 0.0])
            xy = table.position[:2] + np.array([c * local[0] - s * local[1], s * local[0] + c * local[1]])
            facing = np.arctan2(-local[1], -local[0] if turn else 0.0) + table.yaw - np.pi / 2
            self.place(piece, xy, facing + self.rng.normal(0, 0.12))

    def rectangle_list(self) -> list[tuple[float, float, float, float]]:
        """The floor as rectangles (x0, x1, y0, y1)."""
        lx, ly = self.size
        levels = {0.0, ly} | {ly - notch[1] if corner[1] else notch[1] for corner, notch in self.notches.items()}
        levels, found = sorted(levels), []
        for y0, y1 in zip(levels[:-1], levels[1:], strict=True):
            x0, x1 = 0.0, lx
            for (right, upper), (nx, ny) in self.notches.items():
                if (y1 > ly - ny) if upper else (y0 < ny):
                    x0, x1 = (x0, min(x1, lx - nx)) if right else (max(x0, nx), x1)
            found.append((x0, x1, y0, y1))
        return found

    def walkable(self) -> np.ndarray | None:
        """[X, Y] bool, the largest free part of the floor in cells of `CELL`; None if there is no room to walk."""
        free = walkable_grid(self.polygon, [i.rectangle() for i in self.placed if i.position[2] < 1.2])
        return free if free.sum() * CELL**2 > 0.5 else None


def _bedroom(room: Layout) -> None:
    rng = room.rng
    bed = room.at_wall(room.build("bed"), front=0.35, corner=0.1)
    if bed is None:
        return
    color = str(rng.choice(["white", "brown", "brown", "gray", "black"]))
    for side in (-1, 1):
        if rng.random() < 0.7:
            room.beside(bed, room.build("cabinet", "nightstand", color), side)
    room.at_wall(room.build("cabinet", "wardrobe", color if rng.random() < 0.6 else ""), front=0.5, corner=0.6)
    extras = [lambda: _desk(room), lambda: _television(room, bed), lambda: _wall(room, "shelf", 0.4)]
    extras += [lambda: _wall(room, "cabinet", 0.4, "dresser"), lambda: _stool(room)]
    extras += [lambda: room.at_wall(room.build("sofa", "armchair"), front=0.3)]
    for k in rng.permutation(len(extras))[: rng.integers(2, 6)]:
        extras[k]()


def _living_room(room: Layout) -> None:
    rng = room.rng
    color = str(rng.choice(SOFA_COLORS))
    sofa = room.at_wall(room.build("sofa", str(rng.choice(["two_seat", "three_seat"])), color), front=0.9, corner=0.05)
    if sofa is None:
        return
    _television(room, sofa)
    if rng.random() < 0.75:
        coffee = room.build("table", "coffee")
        room.before(sofa, coffee, rng.uniform(0.32, 0.42), 0.0, rng.uniform(-0.2, 0.2))
    if rng.random() < 0.5:
        _wall(room, "fireplace", 0.6)
    extras = [
        lambda: _wall(room, "shelf", 0.4),
        lambda: room.at_wall(room.build("sofa", "armchair", color if rng.random() < 0.6 else ""), front=0.3),
        lambda: room.at_wall(room.build("sofa", "two_seat", color), front=0.4),
        lambda: room.beside(sofa, room.build("table", "side"), int(rng.choice([-1, 1]))),
        lambda: _dining(room),
        lambda: _stool(room),
        lambda: _wall(room, "cabinet", 0.45, "sideboard"),
        lambda: _wall(room, "shelf", 0.4),
    ]
    for k in rng.permutation(len(extras))[: rng.integers(3, 7)]:
        extras[k]()


def _kitchen(room: Layout) -> None:
    rng = room.rng
    units = ["sink", "stove", "cabinet"]
    units += [u for u in ("dishwasher", "oven", "refrigerator", "cabinet", "washer") if rng.random() < 0.6]
    _run(room, [str(u) for u in rng.permutation(units)])
    if rng.random() < 0.85:
        _dining(room)
    if rng.random() < 0.3:
        _wall(room, "shelf", 0.4)
    if rng.random() < 0.4:
        _stool(room)


def _bathroom(room: Layout) -> None:
    rng = room.rng
    room.at_wall(room.build("bathtub"), front=0.4, corner=0.85)
    room.at_wall(room.build("toilet"), front=0.45, corner=0.05)
    room.at_wall(room.build("sink", str(rng.choice(["vanity", "pedestal"]))), front=0.5, corner=0.05)
    extras = [
        lambda: _wall(room, "washer", 0.5),
        lambda: _wall(room, "cabinet", 0.4, "nightstand"),
        lambda: _stool(room),
        lambda: _wall(room, "shelf", 0.35),
        lambda: _wall(room, "washer", 0.5),
        lambda: _wall(room, "cabinet", 0.4, "dresser"),
    ]
    for k in rng.permutation(len(extras))[: rng.integers(1, 5)]:
        extras[k]()


def _studio(room: Layout) -> None:
    rng = room.rng
    _run(room, [str(u) for u in rng.permutation(["sink", "stove", "refrigerator"])][: rng.integers(2, 4)], uppers=False)
    bed = room.at_wall(room.build("bed"), front=0.3, corner=0.5)
    facing = bed
    if rng.random() < 0.7:
        sofa = room.at_wall(room.build("sofa", str(rng.choice(["two_seat", "armchair"]))), front=0.5)
        facing = sofa or bed
    extras = [lambda: _dining(room), lambda: _desk(room), lambda: _wall(room, "shelf", 0.4), lambda: _stool(room)]
    extras += [lambda: _wall(room, "cabinet", 0.5, "wardrobe"), lambda: _wall(room, "washer", 0.5)]
    if facing is not None:
        extras.append(lambda: _television(room, facing))
    for k in rng.permutation(len(extras))[: rng.integers(2, 6)]:
        extras[k]()


FURNISH = {
    "bedroom": _bedroom,
    "living_room": _living_room,
    "kitchen": _kitchen,
    "bathroom": _bathroom,
    "studio": _studio,
}


def _wall(room: Layout, category: str, front: float, style: str = "") -> Placed | None:
    corner = 0.05 if category == "fireplace" else 0.4
    return room.at_wall(room.build(category, style), front=front, corner=corner)


def _stool(room: Layout) -> None:
    if room.rng.random() < 0.5:
        room.at_wall(room.build("stool"), gap=room.rng.uniform(0.05, 0.3))
    else:
        room.free(room.build("stool"))


def _desk(room: Layout) -> None:
    rng = room.rng
    desk = room.at_wall(room.build("table", "desk"), front=0.85)
    if desk is None:
        return
    chair = room.build("chair", "swivel" if rng.random() < 0.5 else "")
    room.before(desk, chair, rng.uniform(0.02, 0.15), np.pi + rng.normal(0, 0.15), rng.uniform(-0.1, 0.1))
    if rng.random() < 0.6:
        screen = room.build("tv_monitor", "monitor")
        back = -desk.piece.size[1] / 2 + screen.size[1] / 2 + 0.04
        way = np.array([-np.sin(desk.yaw), np.cos(desk.yaw)])
        room.place(screen, desk.position[:2] + way * back, desk.yaw, z=desk.piece.size[2])


def _dining(room: Layout) -> None:
    rng = room.rng
    big = room.size.min() > 3.6
    table = room.free(room.build("table", str(rng.choice(["dining", "round"])) if big else "round"), border=1.0)
    if table is None:
        table = room.at_wall(room.build("table", "dining"), front=0.5)
    if table is None:
        return
    category = "stool" if rng.random() < 0.2 else "chair"
    style = str(rng.choice(["round", "square"] if category == "stool" else ["slat", "panel", "upholstered"]))
    color = room.build(category).color
    room.seat_around(table, category, int(rng.integers(2, 5)), style, color)


def _television(room: Layout, seat: Placed) -> None:
    """On the wall that the seat faces, or on a low cabinet there; on any other wall if that one is taken."""
    rng = room.rng
    way = np.array([-np.sin(seat.yaw), np.cos(seat.yaw)])
    facing = [k for k in range(len(room.polygon)) if room.wall_normal[k] @ way < -0.9]
    walls = sorted(facing, key=lambda k: -room.wall_length[k]) + [
        k for k in range(len(room.polygon)) if k not in facing
    ]
    for k in walls:
        along = (seat.position[:2] - room.polygon[k]) @ room.wall_direction[k]
        for shift in (0.0, 0.4, -0.4, 0.9, -0.9):
            at = along + shift if k in facing else room.wall_length[k] / 2 + shift
            if rng.random() < 0.55:
                low = room.at_wall(room.build("cabinet", "tv"), front=0.3, wall=k, at=at)
                if low is not None:
                    screen = room.build("tv_monitor", "stand")
                    while screen.size[0] > low.piece.size[0]:
                        screen = room.build("tv_monitor", "stand")
                    room.place(screen, low.position[:2], low.yaw, z=low.piece.size[2], through_clear=True)
                    return
            screen = room.build("tv_monitor", "wall")
            if 0.3 < at - screen.size[0] / 2 and at + screen.size[0] / 2 < room.wall_length[k] - 0.1:
                if room.at_wall(screen, wall=k, at=at, z=rng.uniform(1.0, 1.25), gap=0.013) is not None:
                    return


def _run(room: Layout, units: list[str], uppers: bool = True) -> None:
    """Kitchen units side by side along the walls, longest stretch first, with cabinets above."""
    rng = room.rng
    color = str(rng.choice(KITCHEN_COLORS))
    pieces = []
    for unit in units:
        style = {"cabinet": "base", "sink": "kitchen"}.get(unit, "")
        pieces.append(room.build(unit, style, color if unit in ("cabinet", "sink") else ""))
    order = np.argsort(-room.wall_length + rng.uniform(0, 1.0, len(room.wall_length)))
    for k in order:
        at = 0.025
        while pieces and at + pieces[0].size[0] < room.wall_length[k]:
            piece = pieces[0]
            item = room.at_wall(piece, front=0.6, wall=int(k), at=at + piece.size[0] / 2, gap=0.02)
            if item is None:
                at += 0.15
                continue
            at += piece.size[0] + 0.018
            pieces.pop(0)
            if uppers and piece.size[2] < 0.95 and rng.random() < 0.35 and piece.label != "stove":
                upper = room.build("cabinet", "upper", color)
                room.at_wall(upper, wall=int(k), at=at - 0.009 - piece.size[0] / 2, z=rng.uniform(1.42, 1.5), gap=0.006)
        if not pieces:
            return
