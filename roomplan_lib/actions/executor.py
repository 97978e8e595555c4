"""Carrying actions out on a room, and saying why one makes no sense in it.

An index (`wall`, `target`, `from`, `to`) is a position among the room's items in canonical order before the action:
walls first, then doors, windows, openings, anchors. In a room of anchors only, 0 is the one nearest to the origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from roomplan_lib.actions.order import canonical
from roomplan_lib.actions.spec import (
    LENGTH,
    MAX_ITEMS,
    UNIT_TOLERANCE,
    Action,
    ActionList,
    Measure,
    Move,
    PlaceAnchor,
    PlaceDoor,
    PlaceInWall,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    Remove,
    action_fields,
)
from roomplan_lib.geometry import OrientedBox, box_iou_3d

OFF_WALL = 0.2  # metres between a door's center and the line of its wall
ROUNDING = 0.01  # metres that two decimals may add
SAME_IOU = 0.7  # two things of one class that overlap more are one thing placed twice
YAW_TOLERANCE = 2.0  # degrees between yaw and normal


@dataclass(frozen=True)
class Problem:
    """Why an action was not carried out.

    kind: scene, number, normal, yaw, wall, outside_wall, duplicate, target, quantity or full. item: the position of the
    action in its plan or list, None for a single action.
    """

    kind: str
    reason: str
    item: int | None = None


@dataclass(frozen=True)
class RoomState:
    """A room: its items in canonical order, without scenes of their own. Not changed, only replaced."""

    items: tuple[Action, ...] = ()
    scene: str = ""

    @classmethod
    def from_plan(cls, plan: PlanRoom) -> RoomState:
        """The room as a plan has it, faults included; `apply` to an empty room would leave out what makes no sense."""
        return cls(canonical(plan).actions, plan.scene)

    def to_plan(self) -> PlanRoom:
        return PlanRoom(self.items, self.scene)

    @property
    def walls(self) -> tuple[PlaceWall, ...]:
        return self._all(PlaceWall)

    @property
    def doors(self) -> tuple[PlaceDoor, ...]:
        return self._all(PlaceDoor)

    @property
    def windows(self) -> tuple[PlaceWindow, ...]:
        return self._all(PlaceWindow)

    @property
    def openings(self) -> tuple[PlaceOpening, ...]:
        return self._all(PlaceOpening)

    @property
    def anchors(self) -> tuple[PlaceAnchor, ...]:
        return self._all(PlaceAnchor)

    def _all(self, kind: type) -> tuple:
        return tuple(item for item in self.items if isinstance(item, kind))


class RoomHistory:
    """A room and the states it had, for one who edits."""

    def __init__(self, state: RoomState | None = None) -> None:
        self._states = [state or RoomState()]

    @property
    def state(self) -> RoomState:
        return self._states[-1]

    def apply(self, action: Action | ActionList) -> list[Problem]:
        """Carry out an action; what changes nothing is no step to undo."""
        state, problems = apply(self.state, action)
        if state != self.state:
            self._states.append(state)
        return problems

    def undo(self) -> RoomState:
        """Back to the room before the last change. Raises ValueError when there was none."""
        if len(self._states) == 1:
            raise ValueError("nothing to undo: the room is as it was at the start")
        self._states.pop()
        return self.state


def apply(state: RoomState, action: Action | ActionList) -> tuple[RoomState, list[Problem]]:
    """The room after an action, and the problems that kept it, or parts of it, from being carried out.

    A plan's items are judged one by one, walls first, and `wall` counts the plan's own walls; what lies in a wall that
    was refused is refused with it. A list is carried out in its order, each action on the room that the last one left.
    `measure` and `none` leave the room as it is; `measured` computes the size.
    """
    if isinstance(action, ActionList):
        problems = []
        for number, part in enumerate(action.actions):
            state, found = apply(state, part)
            problems += [replace(problem, item=number) for problem in found]
        return state, problems
    if action.scene and state.scene and action.scene != state.scene:
        return state, [Problem("scene", f"{action.verb} is about scene {action.scene!r}, the room is {state.scene!r}")]
    if isinstance(action, PlanRoom):
        return _place_plan(state, action)
    if isinstance(action, Move | Remove):
        problem = _target_problem(state, action.target)
        if problem:
            return state, [problem]
        return _move(state, action) if isinstance(action, Move) else _remove(state, action)
    if isinstance(action, Measure):
        result = measured(state, action)
        return state, [result] if isinstance(result, Problem) else []
    if action.verb == "none":
        return state, []
    problem = _placement_problem(action, state.items)
    return (state, [problem]) if problem else (_with_items(state, (*state.items, action)), [])


def measured(state: RoomState, action: Measure) -> Measure | Problem:
    """The measure with its true value, in metres or square metres.

    distance: between the centers of two items. height: bottom to top. width: the longer level side, a wall's length;
    depth: the shorter level side, of anchors only. area: width times depth of an anchor (its footprint), width times
    height of what stands in a plane.
    """
    boxes = []
    for index in (action.source,) if action.target is None else (action.source, action.target):
        if problem := _target_problem(state, index):
            return problem
        box = _box(state.items[index], state.walls)
        if box is None:
            return Problem("wall", f"item {index} lies in wall {state.items[index].wall}, which the room has not")
        boxes.append(box)
    if (action.quantity == "distance") != (len(boxes) == 2):
        return Problem("quantity", f"{action.quantity} is not of {len(boxes)} item{'s' * (len(boxes) - 1)}")
    if action.quantity == "distance":
        return replace(action, value=float(np.linalg.norm(boxes[0].center - boxes[1].center)))
    item, box = state.items[action.source], boxes[0]
    depth, width = sorted(float(side) for side in box.extent[:2])
    height, flat = float(box.extent[2]), not isinstance(item, PlaceAnchor)
    if flat and action.quantity == "depth":
        return Problem("quantity", f"a {box.label} has no depth")
    sizes = {"width": width, "height": height, "depth": depth, "area": width * (height if flat else depth)}
    return replace(action, value=sizes[action.quantity])


def _place_plan(state: RoomState, plan: PlanRoom) -> tuple[RoomState, list[Problem]]:
    items, problems = list(state.items), []
    wall_index: list[int | None] = []  # of each wall of the plan among the room's, None where it was refused
    order = sorted(range(len(plan.actions)), key=lambda number: not isinstance(plan.actions[number], PlaceWall))
    num_walls = len(state.walls)
    for number in order:
        item = plan.actions[number]
        problem = None
        if isinstance(item, PlaceInWall):
            index = wall_index[item.wall] if 0 <= item.wall < len(wall_index) else None
            if index is None:
                problem = Problem("wall", f"{item.verb}: the plan has no wall {item.wall} that could be placed")
            else:
                item = replace(item, wall=index)
        problem = problem or _placement_problem(item, items)
        if isinstance(item, PlaceWall):
            wall_index.append(None if problem else num_walls)
            num_walls += problem is None
        if problem:
            problems.append(replace(problem, item=number))
        else:
            items.append(item)
    return _with_items(state, items, plan.scene), sorted(problems, key=lambda problem: problem.item)


def _move(state: RoomState, action: Move) -> tuple[RoomState, list[Problem]]:
    item = state.items[action.target]
    others = state.items[: action.target] + state.items[action.target + 1 :]
    if isinstance(item, PlaceWall):
        return state, [Problem("target", f"item {action.target} is a wall, which does not move")]
    if isinstance(item, PlaceInWall) and action.yaw is not None:
        return state, [Problem("yaw", f"item {action.target} is turned as its wall {item.wall}, not by a yaw")]
    moved = replace(item, center=action.center)
    if action.yaw is not None:
        angle = math.radians(action.yaw)
        normal = (math.cos(angle), math.sin(angle), 0.0) if item.level else item.normal
        keeps_yaw = item.yaw is not None or not item.level
        moved = replace(moved, normal=normal, yaw=action.yaw if keeps_yaw else None)
    problem = _placement_problem(moved, others)
    return (state, [problem]) if problem else (_with_items(state, (*others, moved)), [])


def _remove(state: RoomState, action: Remove) -> tuple[RoomState, list[Problem]]:
    item, index = state.items[action.target], action.target
    others = state.items[:index] + state.items[index + 1 :]
    if isinstance(item, PlaceWall):
        held = [k for k, other in enumerate(state.items) if isinstance(other, PlaceInWall) and other.wall == index]
        if held:
            return state, [Problem("target", f"wall {index} holds {_names(state, held)}; remove that first")]
        others = tuple(
            replace(other, wall=other.wall - 1) if isinstance(other, PlaceInWall) and other.wall > index else other
            for other in others
        )
    return _with_items(state, others), []


def _names(state: RoomState, indices: list[int]) -> str:
    return ", ".join(f"{state.items[k].verb.removeprefix('place_')} {k}" for k in indices)


def _with_items(state: RoomState, items: Sequence[Action], scene: str = "") -> RoomState:
    plan = PlanRoom(tuple(item.bound("") for item in items), state.scene or scene)
    return RoomState.from_plan(plan)


def _target_problem(state: RoomState, index: int) -> Problem | None:
    if not 0 <= index < len(state.items):
        return Problem("target", f"the room has no item {index}, only {len(state.items)}")
    return None


def _placement_problem(item: Action, items: Sequence[Action]) -> Problem | None:
    """What keeps an item from standing among others, whose walls its `wall` counts."""
    if len(items) >= MAX_ITEMS:
        return Problem("full", f"the room has {MAX_ITEMS} items already")
    for row in action_fields(item.verb):
        values = getattr(item, row.attribute)
        for value in values if row.count else (values,):
            if isinstance(value, float | int) and not math.isfinite(value):
                return Problem("number", f"{item.verb}.{row.key}: {value} is not finite")
            if row.value is LENGTH and not value > 0:
                return Problem("number", f"{item.verb}.{row.key}: {value} m is not positive")
    walls = [other for other in items if isinstance(other, PlaceWall)]
    problem = None
    if isinstance(item, PlaceWall) and item.length < ROUNDING:
        problem = Problem("number", f"place_wall: its ends {item.a} and {item.b} are one point")
    elif isinstance(item, PlaceInWall):
        problem = _wall_problem(item, walls)
    elif isinstance(item, PlaceAnchor):
        problem = _turn_problem(item)
    return problem or _duplicate_problem(item, items, walls)


def _wall_problem(item: PlaceInWall, walls: Sequence[PlaceWall]) -> Problem | None:
    if not 0 <= item.wall < len(walls):
        return Problem("wall", f"{item.verb}: the room has no wall {item.wall}, only {len(walls)}")
    box = walls[item.wall].to_box()
    along, across, up = np.abs((np.array(item.center) - box.center) @ box.rotation)
    length, _, height = box.extent
    if across > OFF_WALL + 1e-9:
        return Problem("outside_wall", f"{item.verb}: {across:.2f} m off the line of wall {item.wall}")
    beyond = max(along + (item.width - length) / 2, up + (item.height - height) / 2)
    if beyond > OFF_WALL + 1e-9:
        return Problem("outside_wall", f"{item.verb}: sticks out of wall {item.wall} by {beyond:.2f} m")
    return None


def _turn_problem(anchor: PlaceAnchor) -> Problem | None:
    if abs(math.hypot(*anchor.normal) - 1) > UNIT_TOLERANCE + 1e-9:
        return Problem("normal", f"place_anchor.normal: {anchor.normal} is no unit vector")
    if anchor.yaw is not None and anchor.level:
        turn = anchor.yaw - math.degrees(math.atan2(anchor.normal[1], anchor.normal[0]))
        if abs((turn + 90) % 180 - 90) > YAW_TOLERANCE:
            return Problem("yaw", f"place_anchor.yaw: {anchor.yaw} degrees, but the normal is {anchor.normal}")
    return None


def _duplicate_problem(item: Action, items: Sequence[Action], walls: Sequence[PlaceWall]) -> Problem | None:
    box = _box(item, walls, OFF_WALL)
    for index, other in enumerate(items):
        if isinstance(item, PlaceInWall) and isinstance(other, PlaceInWall) and _covers(item, other, walls):
            return Problem("duplicate", f"{item.verb}: lies over item {index} in wall {item.wall}")
        if other.verb != item.verb or getattr(other, "category", "") != getattr(item, "category", ""):
            continue
        other_box = _box(other, walls, OFF_WALL)
        iou = 0.0 if other_box is None else box_iou_3d(box, other_box)
        if iou > SAME_IOU:
            return Problem("duplicate", f"{item.verb}: overlaps item {index} of its class, IoU {iou:.2f}")
    return None


def _covers(a: PlaceInWall, b: PlaceInWall, walls: Sequence[PlaceWall]) -> bool:
    """Whether two rectangles of one wall share more than a strip that rounding may make."""
    if a.wall != b.wall:
        return False
    offset = np.abs((np.array(a.center) - b.center) @ walls[a.wall].to_box().rotation)
    width = (a.width + b.width) / 2 - offset[0]
    height = (a.height + b.height) / 2 - offset[2]
    return bool(min(width, height) > 2 * ROUNDING)


def _box(item: Action, walls: Sequence[PlaceWall], thickness: float = 0.0) -> OrientedBox | None:
    """The item's box, what is flat made `thickness` metres thick; None for what lies in a wall that is not there."""
    if isinstance(item, PlaceInWall):
        return item.to_box(walls[item.wall], thickness) if 0 <= item.wall < len(walls) else None
    return item.to_box(thickness) if isinstance(item, PlaceWall) else item.to_box()
