"""What the action language is made of: classes of values, and one dataclass per verb whose fields are its table.

Parser, writer, JSON Schema, grammars and documentation all follow from `VERBS`; no verb is written a second time.
Coordinates are metres in the frame the caller says: the reference frame where a model writes, the scene's in files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import ClassVar

import numpy as np

from roomplan_lib.geometry import OrientedBox, rotation_z

MAX_ITEMS = 100  # of a plan or a list; two digits number them
READ_LIMIT = 1_000.0  # metres; what is read may lie farther out than what is written, but in no room so far
UNIT_TOLERANCE = 0.02  # by which the length of a normal may differ from 1: rounding to two decimals takes 0.009
MAX_SCENE = 200  # characters of a scene id
MAX_CATEGORY = 40  # characters
CATEGORY_FORM = ("[a-z0-9]", f"[a-z0-9_]{{0,{MAX_CATEGORY - 1}}}")  # character classes of any category
PLAIN_SCENE_FORM = (rf"[ !\x23-\x5b\x5d-\x7e]{{1,{MAX_SCENE}}}",)  # of a scene id that JSON writes without escapes


@dataclass(frozen=True)
class Number:
    """A class of numbers. low, high: bounds, both included, of written text in steps of 1/100 or, `whole`, of 1.

    read: bounds of what is read, in the unit. Where `low` is above 0, only positive numbers are read.
    """

    name: str
    low: int
    high: int
    read: tuple[float, float]
    doc: str
    whole: bool = False


@dataclass(frozen=True)
class Word:
    """A class of words. words: the choices; None for the open classes, scene and category."""

    name: str
    words: tuple[str, ...] | None
    doc: str


COORDINATE = Number("coordinate", -1999, 1999, (-READ_LIMIT, READ_LIMIT), "metres")
LENGTH = Number("length", 1, 1999, (0.0, READ_LIMIT), "metres, full size")
COMPONENT = Number("component", -100, 100, (-1.02, 1.02), "of a unit vector")
CONFIDENCE = Number("confidence", 0, 100, (0.0, 1.0), "share")
AMOUNT = Number("amount", 0, 99_999, (0.0, READ_LIMIT), "metres, or square metres of an area")
DEGREES = Number("degrees", 0, 359, (0.0, 359.0), "counter-clockwise seen from above", whole=True)
INDEX = Number("index", 0, MAX_ITEMS - 1, (0.0, MAX_ITEMS - 1.0), "position in canonical order, from 0", whole=True)
SCENE = Word("scene", None, f"the scene's id, at most {MAX_SCENE} printable characters")
CATEGORY = Word("category", None, f"at most {MAX_CATEGORY} lower-case letters, digits and _")
QUANTITY = Word("quantity", ("distance", "width", "height", "depth", "area"), "what is measured")
REASON = Word("reason", ("not_visible", "not_present", "ambiguous"), "why nothing is done")


@dataclass(frozen=True)
class ActionField:
    """One key of a verb's JSON object. count: how many numbers its array holds, 0 for a bare value."""

    attribute: str
    key: str
    value: Number | Word
    count: int
    required: bool  # in the text
    doc: str


def _key(value: Number | Word, doc: str, count: int = 0, *, key: str = "", required: bool = True, default=MISSING):
    row = {"value": value, "doc": doc, "count": count, "key": key, "required": required}
    return field(default=default, metadata=row)


def _scene():
    return _key(SCENE, "the room; bound by the program, a model leaves it out", required=False, default="")


class Action:
    """What all verbs share. `scene` is bound by the program that asks: a model's text leaves it out."""

    verb: ClassVar[str]
    scene: str

    def bound(self, scene: str) -> Action:
        """The same action with its scene filled in."""
        return replace(self, scene=scene)

    def transformed(self, transform: np.ndarray) -> Action:
        """The same action in another frame; `transform` is a 4x4 from this frame to that one, rigid or a similarity.

        Lengths grow with its scale. Raises ValueError for one that does not keep z up: walls and boxes would lean.
        """
        return self


@dataclass(frozen=True)
class PlaceAnchor(Action):
    """A thing in the room: an upright box, or a level surface whose normal is vertical."""

    verb = "place_anchor"
    category: str = _key(CATEGORY, 'what it is; "" and left out where unknown', required=False)
    center: tuple[float, float, float] = _key(COORDINATE, "of the box", 3)
    normal: tuple[float, float, float] = _key(
        COMPONENT, "the box's first axis, level, so that it has the yaw; or vertical", 3
    )
    extent: tuple[float, float, float] = _key(LENGTH, "along (normal, up x normal, up) where the normal is level", 3)
    scene: str = _scene()
    yaw: int | None = _key(
        DEGREES, "of the first axis; rules over the normal where it is given", required=False, default=None
    )
    confidence: float | None = _key(CONFIDENCE, "from token probabilities", required=False, default=None)

    @property
    def level(self) -> bool:
        """Whether the normal is nearer to the horizontal than 30 degrees, so that it tells a yaw."""
        return abs(self.normal[2]) < 0.5

    def to_box(self) -> OrientedBox:
        """The upright box that the anchor stands for: by `yaw`, else by a level normal, else unturned."""
        if self.yaw is not None:
            angle = math.radians(self.yaw)
        else:
            angle = math.atan2(self.normal[1], self.normal[0]) if self.level else 0.0
        return OrientedBox(self.center, self.extent, rotation_z(angle), self.category)

    def canonical(self) -> PlaceAnchor:
        """The same box as it is written: its normal level or vertical, its yaw in [0, 180) degrees.

        Where the box is square at 1 cm the yaw is in [0, 90), and after a right angle its level sides change places.
        """
        (x, y, z), (dx, dy, dz) = self.normal, self.extent
        if self.level and round(z, 2) and (x or y):
            x, y, z = x / math.hypot(x, y), y / math.hypot(x, y), 0.0
        elif not self.level and (round(x, 2) or round(y, 2)):
            x, y, z = 0.0, 0.0, math.copysign(1.0, z)
        angle = self.yaw or 0
        if self.yaw is None and self.level:  # as the text will have it: 0.004 is written 0.00
            angle = math.degrees(math.atan2(round(y, 2), round(x, 2))) % 360
        period = 1 if round(dx, 2) == round(dy, 2) else 2
        turns = int(angle // (90 * period)) * period  # right angles to turn back
        for _ in range(turns % 4):
            x, y = y, -x
        if turns % 2:
            dx, dy = dy, dx
        yaw = None if self.yaw is None else self.yaw - 90 * turns
        return replace(self, normal=(x, y, z), extent=(dx, dy, dz), yaw=yaw)

    def transformed(self, transform: np.ndarray) -> PlaceAnchor:
        scale, turn = _scale_and_turn(transform)
        yaw = self.yaw
        if yaw is not None or not self.level and round(turn) % 360:  # a vertical normal cannot tell the turn
            yaw = round((yaw or 0) + turn) % 360
        return replace(
            self,
            center=_moved(transform, self.center),
            normal=_triple(rotation_z(math.radians(turn)) @ self.normal),
            extent=_triple(np.multiply(self.extent, scale)),
            yaw=yaw,
        )


@dataclass(frozen=True)
class PlaceWall(Action):
    """An upright wall without thickness."""

    verb = "place_wall"
    a: tuple[float, float] = _key(COORDINATE, "one end on the floor plan", 2)
    b: tuple[float, float] = _key(COORDINATE, "the other end, counter-clockwise about the room", 2)
    z: float = _key(COORDINATE, "of the wall's bottom")
    height: float = _key(LENGTH, "from bottom to top")
    scene: str = _scene()

    @property
    def length(self) -> float:
        return math.dist(self.a, self.b)

    def to_box(self, thickness: float = 0.0) -> OrientedBox:
        """The wall as a box: axes along a to b, across, and up; extent (length, thickness, height)."""
        center = [(self.a[0] + self.b[0]) / 2, (self.a[1] + self.b[1]) / 2, self.z + self.height / 2]
        yaw = math.atan2(self.b[1] - self.a[1], self.b[0] - self.a[0])
        return OrientedBox(center, (self.length, thickness, self.height), rotation_z(yaw), "wall")

    def transformed(self, transform: np.ndarray) -> PlaceWall:
        scale, _ = _scale_and_turn(transform)
        (ax, ay, z), (bx, by, _) = (_moved(transform, (*end, self.z)) for end in (self.a, self.b))
        return replace(self, a=(ax, ay), b=(bx, by), z=z, height=self.height * scale)


@dataclass(frozen=True)
class PlaceInWall(Action):
    """A rectangle in a wall."""

    wall: int = _key(INDEX, "the wall it lies in")
    center: tuple[float, float, float] = _key(COORDINATE, "of the rectangle", 3)
    width: float = _key(LENGTH, "along the wall")
    height: float = _key(LENGTH, "from bottom to top")
    scene: str = _scene()

    def to_box(self, wall: PlaceWall, thickness: float = 0.0) -> OrientedBox:
        """The rectangle as a box turned like its wall; extent (width, thickness, height)."""
        turned = wall.to_box().rotation
        return OrientedBox(self.center, (self.width, thickness, self.height), turned, self.verb.removeprefix("place_"))

    def transformed(self, transform: np.ndarray) -> PlaceInWall:
        scale, _ = _scale_and_turn(transform)
        center = _moved(transform, self.center)
        return replace(self, center=center, width=self.width * scale, height=self.height * scale)


class PlaceDoor(PlaceInWall):
    """A door."""

    verb = "place_door"


class PlaceWindow(PlaceInWall):
    """A window."""

    verb = "place_window"


class PlaceOpening(PlaceInWall):
    """A passage without a door."""

    verb = "place_opening"


@dataclass(frozen=True)
class Move(Action):
    """Give an item another place, and another yaw where one is written."""

    verb = "move"
    target: int = _key(INDEX, "the item")
    center: tuple[float, float, float] = _key(COORDINATE, "its new center", 3)
    yaw: int | None = _key(DEGREES, "its new yaw; left out to keep it", required=False, default=None)
    scene: str = _scene()

    def transformed(self, transform: np.ndarray) -> Move:
        yaw = None if self.yaw is None else round(self.yaw + _scale_and_turn(transform)[1]) % 360
        return replace(self, center=_moved(transform, self.center), yaw=yaw)


@dataclass(frozen=True)
class Remove(Action):
    """Take an item out of the room."""

    verb = "remove"
    target: int = _key(INDEX, "the item")
    scene: str = _scene()


@dataclass(frozen=True)
class Measure(Action):
    """State a size of an item, or the distance between the centers of two."""

    verb = "measure"
    quantity: str = _key(QUANTITY, "what is measured")
    source: int = _key(INDEX, "the item", key="from")
    target: int | None = _key(INDEX, "the second item, of a distance only", key="to", required=False)
    value: float = _key(AMOUNT, "the answer")
    scene: str = _scene()

    def transformed(self, transform: np.ndarray) -> Measure:
        scale, _ = _scale_and_turn(transform)
        return replace(self, value=self.value * (scale**2 if self.quantity == "area" else scale))


@dataclass(frozen=True)
class NoAction(Action):
    """Nothing can be done, and why."""

    verb = "none"
    reason: str = _key(REASON, "why")
    scene: str = _scene()


@dataclass(frozen=True)
class PlanRoom(Action):
    """A whole room at once: walls, doors, windows, openings, anchors. `wall` counts the plan's own walls.

    The items carry no scene of their own.
    """

    verb = "plan_room"
    actions: tuple[Action, ...]
    scene: str = ""

    def transformed(self, transform: np.ndarray) -> PlanRoom:
        return replace(self, actions=tuple(action.transformed(transform) for action in self.actions))


@dataclass(frozen=True)
class ActionList:
    """Several actions, done one after the other; a JSON array."""

    verb: ClassVar[str] = "list"
    actions: tuple[Action, ...]

    def bound(self, scene: str) -> ActionList:
        """The same list with every action's scene filled in."""
        return ActionList(tuple(action.bound(scene) for action in self.actions))

    def transformed(self, transform: np.ndarray) -> ActionList:
        """The same list in another frame; as `Action.transformed`."""
        return ActionList(tuple(action.transformed(transform) for action in self.actions))


@dataclass(frozen=True)
class ActionError:
    """Why a text is no action. Malformed model text is a result to count, so it is returned, never raised."""

    reason: str


VERBS: dict[str, type[Action]] = {
    cls.verb: cls
    for cls in (PlaceWall, PlaceDoor, PlaceWindow, PlaceOpening, PlaceAnchor, Move, Remove, Measure, NoAction)
}
PLAN_VERBS = tuple(verb for verb in VERBS if verb.startswith("place_"))  # in the order of a plan's items


def action_fields(verb: str) -> tuple[ActionField, ...]:
    """The fields of a verb in the order of its text: scene first, then as the dataclass has them."""
    rows = [
        ActionField(attribute=f.name, **{**f.metadata, "key": f.metadata["key"] or f.name}) for f in fields(VERBS[verb])
    ]
    return tuple(sorted(rows, key=lambda row: row.value is not SCENE))


def row_fields(verb: str) -> tuple[ActionField, ...]:
    """The fields of a verb's row after its head, of which at most one may be left out.

    A row has no scene; an anchor's has its category as head and, in place of the normal, always its yaw.
    """
    rows = [row for row in action_fields(verb) if row.value not in (SCENE, CATEGORY, COMPONENT)]
    return tuple(replace(row, required=True) if verb == PlaceAnchor.verb and row.key == "yaw" else row for row in rows)


def is_direction(hundredths: Sequence[int]) -> bool:
    """Whether x, y, z in hundredths are a normal that can be written: level and of length 1 (rounded), or vertical."""
    x, y, z = hundredths
    return abs(z) == 100 if x == y == 0 else z == 0 and abs(math.hypot(x, y) - 100) <= 100 * UNIT_TOLERANCE


def anchor_from_box(box: OrientedBox, scene: str = "") -> PlaceAnchor:
    """The anchor of an upright box, its normal along the first box axis with yaw in [0, 180) degrees.

    Of a box that is square at 1 cm the yaw is in [0, 90): the sides change places where it turns by a right angle.
    A side below 1 cm becomes 1 cm, the least that the language can write.
    Raises ValueError for a box whose third axis is not vertical: an anchor cannot hold its rotation.
    """
    if abs(box.rotation[2, 2]) < 0.999:
        raise ValueError(f"an anchor needs an upright box, got rotation {box.rotation.tolist()}")
    extent = _triple(np.maximum(box.extent, LENGTH.low / 100))
    normal = (math.cos(box.yaw), math.sin(box.yaw), 0.0)
    return PlaceAnchor(box.label, _triple(box.center), normal, extent, scene).canonical()


def _scale_and_turn(transform: np.ndarray) -> tuple[float, float]:
    """Scale of a similarity, and the degrees by which it turns about z. Raises ValueError where it tilts."""
    scale = float(np.cbrt(np.linalg.det(transform[:3, :3])))
    if not transform[2, 2] > 0.999 * scale > 0:
        raise ValueError(f"actions move only with a transform that keeps z up, got {np.asarray(transform).tolist()}")
    turn = math.degrees(math.atan2(transform[1, 0], transform[0, 0]))
    return (1.0 if abs(scale - 1) < 1e-9 else scale), turn


def _moved(transform: np.ndarray, point: tuple[float, float, float]) -> tuple[float, float, float]:
    return _triple(transform[:3, :3] @ point + transform[:3, 3])


def _triple(values) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
