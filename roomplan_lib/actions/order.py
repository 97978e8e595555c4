"""Canonical form and order: of all texts that mean one room in one frame, the one that is written."""

from __future__ import annotations

import math
from dataclasses import replace

from roomplan_lib.actions.spec import (
    PLAN_VERBS,
    Action,
    ActionList,
    Move,
    PlaceAnchor,
    PlaceWall,
    PlanRoom,
)

CORNER = 0.1  # metres between the ends of two walls that meet
NEAR_STEP = 0.1  # metres; anchors that are equally far to this step are ordered by name


def canonical(action: Action | ActionList) -> Action | ActionList:
    """The action with its yaw reduced, a plan's items in canonical order; the room stays as it is.

    A plan begins with its walls, counter-clockwise about the room from the one whose middle is nearest to the frame's
    origin, each from `a` to `b` in that sense; doors, windows and openings follow, each kind by wall and along it from
    `a`; then anchors from near to far (horizontally, to 0.1 m; equally far ones by category, x, y). `wall` is
    renumbered. A list is put in this order where it only places anchors: else its actions build on each other.
    Decided by numbers at two decimals, so that it is the same before writing and after reading.
    """
    if isinstance(action, PlanRoom):
        return replace(action, actions=_plan_order(action.actions))
    if isinstance(action, ActionList):
        actions = [canonical(item) for item in action.actions]
        if all(isinstance(item, PlaceAnchor) for item in actions):
            actions.sort(key=_nearness)
        return ActionList(tuple(actions))
    if isinstance(action, PlaceAnchor):
        return action.canonical()
    if isinstance(action, Move) and action.yaw is not None:
        return replace(action, yaw=action.yaw % 180)
    return action


def _plan_order(items: tuple[Action, ...]) -> tuple[Action, ...]:
    order = _wall_order([item for item in items if isinstance(item, PlaceWall)])
    walls = [wall for _, wall in order]
    number = {old: new for new, (old, _) in enumerate(order)}

    def along(item) -> tuple:
        center = _rounded(item.center)
        if not 0 <= item.wall < len(walls):
            return item.wall, 0.0, center
        a, b = _rounded(walls[item.wall].a), _rounded(walls[item.wall].b)
        return item.wall, round((center[0] - a[0]) * (b[0] - a[0]) + (center[1] - a[1]) * (b[1] - a[1]), 6), center

    result: list[Action] = list(walls)
    for verb in PLAN_VERBS[1:]:
        part = [item for item in items if item.verb == verb]
        if verb == PlaceAnchor.verb:
            result += sorted((item.canonical() for item in part), key=_nearness)
        else:
            result += sorted((replace(item, wall=number.get(item.wall, item.wall)) for item in part), key=along)
    return tuple(result)


def _nearness(anchor: PlaceAnchor) -> tuple:
    center = _rounded(anchor.center)
    distance = round(math.hypot(*center[:2]) / NEAR_STEP)
    return distance, anchor.category, center, _rounded(anchor.extent), _rounded(anchor.normal)


def _wall_order(walls: list[PlaceWall]) -> list[tuple[int, PlaceWall]]:
    """Each wall with its place in the input, turned and ordered as `canonical` says.

    Walls that close one loop are walked along it; others go by the angle of their middle about the mean of all middles.
    """
    if not walls:
        return []
    ends = [(_rounded(wall.a), _rounded(wall.b)) for wall in walls]
    middles = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in ends]
    steps = _loop(ends) or _by_angle(ends, middles)
    nearest = min(range(len(steps)), key=lambda k: (round(math.hypot(*middles[steps[k][0]]), 6), middles[steps[k][0]]))
    turned = [(i, replace(walls[i], a=walls[i].b, b=walls[i].a) if flipped else walls[i]) for i, flipped in steps]
    return turned[nearest:] + turned[:nearest]


def _loop(ends: list[tuple]) -> list[tuple[int, bool]] | None:
    """(wall, whether it is walked from b to a) counter-clockwise, where the walls close one loop; else None."""
    joined = {}
    for i, wall in enumerate(ends):
        for side, end in enumerate(wall):
            near = [(j, s) for j, w in enumerate(ends) for s in (0, 1) if j != i and math.dist(w[s], end) <= CORNER]
            if len(near) != 1:
                return None
            joined[i, side] = near[0]
    steps, at, side = [], 0, 0
    while len(steps) < len(ends):
        steps.append((at, side == 1))
        at, side = joined[at, 1 - side]
        if at == 0:
            break
    if len(steps) < len(ends) or (at, side) != (0, 0):
        return None
    corners = [ends[i][1 if flipped else 0] for i, flipped in steps]
    area = sum(p[0] * q[1] - q[0] * p[1] for p, q in zip(corners, corners[1:] + corners[:1], strict=True))
    return steps if area >= 0 else [(i, not flipped) for i, flipped in reversed(steps)]


def _by_angle(ends: list[tuple], middles: list[tuple]) -> list[tuple[int, bool]]:
    cx, cy = (round(math.fsum(values) / len(values), 6) for values in zip(*middles, strict=True))

    def angle(i: int) -> tuple:
        x, y = middles[i]
        return round(math.atan2(y - cy, x - cx), 6), middles[i], sorted(ends[i])

    def flipped(i: int) -> bool:
        a, b = ends[i]
        side = round((b[0] - a[0]) * (cy - a[1]) - (b[1] - a[1]) * (cx - a[0]), 6)
        return side < 0 or (side == 0 and b < a)

    return [(i, flipped(i)) for i in sorted(range(len(ends)), key=angle)]


def _rounded(values: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(round(value, 2) for value in values)
