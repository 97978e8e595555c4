"""Actions carried out: what they change, what they leave, and the reasons against them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from roomplan_lib.actions import (
    ActionList,
    Measure,
    Move,
    NoAction,
    PlaceAnchor,
    PlaceDoor,
    PlaceOpening,
    PlaceWall,
    PlaceWindow,
    PlanRoom,
    Remove,
    canonical,
)
from roomplan_lib.actions.executor import Problem, RoomHistory, RoomState, apply, measured
from roomplan_lib.geometry import rotation_z

# A room of 4 x 3 m, 2.5 m high; the origin is nearest to the south wall, so canonical order is S, E, N, W.
WALLS = (
    PlaceWall((-1.0, -0.5), (3.0, -0.5), -1.0, 2.5),
    PlaceWall((3.0, -0.5), (3.0, 2.5), -1.0, 2.5),
    PlaceWall((3.0, 2.5), (-1.0, 2.5), -1.0, 2.5),
    PlaceWall((-1.0, 2.5), (-1.0, -0.5), -1.0, 2.5),
)
DOOR = PlaceDoor(0, (0.0, -0.5, 0.0), 0.9, 2.0)
WINDOW = PlaceWindow(1, (3.0, 1.0, 0.5), 1.2, 1.0)
CHAIR = PlaceAnchor("chair", (0.5, 0.5, -0.5), (1.0, 0.0, 0.0), (0.5, 0.6, 1.0))
BED = PlaceAnchor("bed", (1.5, 1.5, -0.7), (0.0, 1.0, 0.0), (1.4, 2.0, 0.6))
ROOM = PlanRoom((*WALLS, DOOR, WINDOW, CHAIR, BED), "room")


@pytest.fixture
def state():
    state, problems = apply(RoomState(), ROOM)
    assert problems == []
    return state


def kinds(problems):
    return [(problem.kind, problem.item) for problem in problems]


def test_plan_becomes_the_room_and_comes_back(state):
    assert canonical(ROOM) == ROOM == state.to_plan() == RoomState.from_plan(ROOM).to_plan()
    assert (state.walls, state.doors, state.windows, state.openings) == (WALLS, (DOOR,), (WINDOW,), ())
    assert state.anchors == (CHAIR, BED) and state.scene == "room"
    mixed = PlanRoom((BED, DOOR, *WALLS, CHAIR, WINDOW), "room")
    assert apply(RoomState(), mixed)[0] == state


def test_place_one_by_one_makes_the_same_room(state):
    built = RoomState(scene="room")
    for item in state.items:
        built, problems = apply(built, item.bound("room"))
        assert problems == []
    assert built == state
    listed, problems = apply(RoomState(scene="room"), ActionList(state.items))
    assert listed == state and problems == []


def test_move_and_remove_count_in_canonical_order(state):
    moved, problems = apply(state, Move(6, (2.9, 2.0, -0.5)))  # the chair goes behind the bed
    assert problems == [] and [item.category for item in moved.anchors] == ["bed", "chair"]
    assert moved.anchors[1] == replace(CHAIR, center=(2.9, 2.0, -0.5))
    gone, problems = apply(moved, Remove(6))
    assert problems == [] and gone.anchors == (moved.anchors[1],)
    assert state.anchors == (CHAIR, BED)  # the room before is what it was


def test_move_turns_the_normal_or_the_yaw(state):
    turned = apply(state, Move(6, CHAIR.center, 30))[0].anchors[0]
    assert turned.yaw is None and turned.normal == pytest.approx((math.cos(math.pi / 6), 0.5, 0))
    np.testing.assert_allclose(turned.to_box().rotation, rotation_z(math.pi / 6), atol=1e-12)
    with_yaw = RoomState.from_plan(PlanRoom((replace(CHAIR, yaw=0),)))
    turned = apply(with_yaw, Move(0, CHAIR.center, 30))[0].anchors[0]
    assert turned.yaw == 30 and turned.normal[1] == pytest.approx(0.5)


def test_door_moves_along_its_wall_only(state):
    moved, problems = apply(state, Move(4, (1.0, -0.5, 0.0)))
    assert problems == [] and moved.doors[0].center == (1.0, -0.5, 0.0)
    for action, kind in ((Move(4, (1.0, 0.5, 0.0)), "outside_wall"), (Move(4, DOOR.center, 90), "yaw")):
        same, problems = apply(state, action)
        assert same == state and kinds(problems) == [(kind, None)]


def test_removing_a_wall_renumbers_and_spares_what_it_holds(state):
    same, problems = apply(state, Remove(1))
    assert same == state and problems[0].kind == "target" and "window 5" in problems[0].reason
    west_gone, problems = apply(state, Remove(3))
    assert problems == [] and len(west_gone.walls) == 3
    both = ActionList((Remove(4), Remove(0)))  # the door, then its wall: the window's wall is numbered anew
    left, problems = apply(state, both)
    assert problems == [] and left.doors == () and len(left.walls) == 3
    wall = left.walls[left.windows[0].wall]
    assert {wall.a, wall.b} == {WALLS[1].a, WALLS[1].b}


def test_undo_goes_back_one_change_at_a_time(state):
    history = RoomHistory(state)
    assert history.apply(Move(6, (0.6, 0.5, -0.5))) == []
    assert history.apply(Remove(99))[0].kind == "target"  # changes nothing, so it is no step
    assert history.apply(NoAction("ambiguous")) == []
    assert history.apply(Remove(7)) == [] and len(history.state.items) == 7
    assert history.undo().anchors[0].center == (0.6, 0.5, -0.5)
    assert history.undo() == state == history.state
    with pytest.raises(ValueError, match="nothing to undo"):
        history.undo()


@pytest.mark.parametrize(
    "action, kind",
    [
        (PlaceDoor(4, (0.0, -0.5, 0.0), 0.9, 2.0), "wall"),
        (PlaceDoor(-1, (0.0, -0.5, 0.0), 0.9, 2.0), "wall"),
        (PlaceDoor(0, (2.0, -0.71, 0.0), 0.9, 2.0), "outside_wall"),  # 0.21 m off its line
        (PlaceDoor(0, (3.1, -0.5, 0.0), 0.9, 2.0), "outside_wall"),  # beyond its end
        (PlaceDoor(0, (2.0, -0.5, 1.6), 0.9, 2.0), "outside_wall"),  # above it
        (PlaceDoor(0, (2.0, -0.5, -1.1), 0.9, 2.0), "outside_wall"),  # below it
        (PlaceOpening(1, (3.0, 1.0, 0.0), 3.5, 2.0), "outside_wall"),  # wider than it
        (PlaceDoor(0, (2.9, -0.5, 0.0), 0.9, 2.0), "outside_wall"),  # half of it beyond its end
        (PlaceDoor(0, (2.0, -0.5, -0.4), 0.9, 2.0), "outside_wall"),  # its bottom 0.4 m below the wall's
        (PlaceWindow(0, DOOR.center, 0.5, 0.5), "duplicate"),  # in the door
        (PlaceDoor(0, (2.0, -0.5, 0.0), 0.0, 2.0), "number"),
        (PlaceDoor(0, (2.0, math.nan, 0.0), 0.9, 2.0), "number"),
        (PlaceWall((1.0, 1.0), (1.0, 1.0), 0.0, 2.0), "number"),
        (PlaceWall((1.0, 1.0), (2.0, 1.0), 0.0, -2.0), "number"),
        (replace(CHAIR, center=(2, 0, 0), extent=(0.5, 0.0, 1.0)), "number"),
        (replace(CHAIR, center=(2, 0, math.inf)), "number"),
        (replace(CHAIR, center=(2, 0, 0), normal=(1.0, 1.0, 0.0)), "normal"),
        (replace(CHAIR, center=(2, 0, 0), yaw=3), "yaw"),
        (replace(CHAIR, center=(2, 0, 0), yaw=177), "yaw"),
        (replace(CHAIR, center=(0.52, 0.5, -0.5)), "duplicate"),
        (replace(WALLS[0], a=(-0.9, -0.5)), "duplicate"),
        (PlaceWall(WALLS[0].b, WALLS[0].a, -1.0, 2.5), "duplicate"),
        (replace(DOOR, center=(0.05, -0.5, 0.0)), "duplicate"),
        (PlaceWindow(0, (0.82, -0.5, 0.5), 0.8, 1.0), "duplicate"),  # over the door by 3 cm
        (PlaceWindow(0, (0.0, -0.5, 1.2), 0.8, 0.5), "duplicate"),  # likewise, from above
        (PlaceOpening(0, (0.0, -0.5, 0.0), 0.5, 0.5), "duplicate"),  # within the door
        (Move(6, (2.9, 2.4, math.nan)), "number"),
        (Move(0, (0.0, 0.0, 0.0)), "target"),
        (Move(8, (0.0, 0.0, 0.0)), "target"),
        (Remove(8), "target"),
        (Remove(-1), "target"),
        (Remove(0), "target"),
        (Measure("width", 8, None, 0.0), "target"),
        (Measure("distance", 6, 8, 0.0), "target"),
        (Measure("distance", 6, None, 0.0), "quantity"),
        (Measure("width", 6, 7, 0.0), "quantity"),
        (Measure("depth", 0, None, 0.0), "quantity"),
        (CHAIR.bound("another"), "scene"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_told_and_not_done(state, action, kind):
    same, problems = apply(state, action)
    assert same is state and [problem.kind for problem in problems] == [kind] and problems[0].reason


@pytest.mark.parametrize(
    "action",
    [
        PlaceDoor(0, (2.0, -0.69, 0.0), 0.9, 2.0),  # 0.19 m off its line
        PlaceDoor(0, (2.55, -0.5, 0.5), 0.9, 2.0),  # in its corner
        PlaceOpening(2, (1.0, 2.5, 0.25), 4.0, 2.5),  # all of it
        replace(DOOR, center=(0.9, -0.5, 0.0)),  # beside the other
        PlaceWindow(0, (0.835, -0.5, 0.5), 0.8, 1.0),  # over the door by 1.5 cm, as rounding may have it
        PlaceWindow(0, (0.0, -0.5, 1.25), 0.8, 0.5),  # above the door
        replace(CHAIR, center=(2, 0, 0), yaw=2),
        replace(CHAIR, center=(2, 0, 0), yaw=178),  # half a turn is none
        replace(CHAIR, center=(0.5, 0.5, -0.5), category="stool"),
        replace(CHAIR, center=(0.6, 0.5, -0.5)),  # IoU 0.67
        PlaceAnchor("table", (2, 0, 0), (0.0, 0.0, 1.0), (1, 1, 0.05), yaw=40),  # a top has any yaw
        Measure("width", 6, None, 0.0),
        NoAction("not_present"),
        CHAIR.bound("room").transformed(np.block([[np.eye(3), np.ones((3, 1))], [np.zeros(3), 1]])),
    ],
    ids=str,
)
def test_what_makes_sense_is_not_refused(state, action):
    assert apply(state, action)[1] == []


def test_faults_of_a_plan_are_told_by_item_and_the_rest_is_placed():
    bad_wall = PlaceWall((0.0, 0.0), (0.0, 0.0), 0.0, 2.0)
    plan = PlanRoom(
        (bad_wall, *WALLS, replace(DOOR, wall=0), replace(DOOR, wall=1), replace(WINDOW, wall=5), CHAIR, CHAIR)
    )
    state, problems = apply(RoomState(), plan)
    assert kinds(problems) == [("number", 0), ("wall", 5), ("wall", 7), ("duplicate", 9)]
    assert state.walls == WALLS and state.doors == (DOOR,) and state.anchors == (CHAIR,)  # the door kept its own wall
    assert RoomState.from_plan(plan).to_plan() == canonical(plan)  # as it is, faults included


def test_a_second_plan_counts_its_own_walls(state):
    """A room next door: its wall 0 is not the first room's."""
    shifted = np.eye(4)
    shifted[0, 3] = 6.0
    both, problems = apply(state, replace(PlanRoom((WALLS[1], WALLS[2], replace(WINDOW, wall=0))).transformed(shifted)))
    assert problems == [] and len(both.walls) == 6 and len(both.windows) == 2
    far = max(both.windows, key=lambda window: window.center[0])
    assert both.walls[far.wall].a[0] == both.walls[far.wall].b[0] == 9.0


def test_a_room_is_full_at_a_hundred_items():
    things = tuple(replace(CHAIR, center=(float(i), 0.0, 0.0)) for i in range(101))
    state, problems = apply(RoomState(), PlanRoom(things))
    assert len(state.items) == 100 and kinds(problems) == [("full", 100)]


def test_measures_are_what_a_ruler_says(state):
    def value(quantity, source, target=None):
        result = measured(state, Measure(quantity, source, target, 0.0))
        assert isinstance(result, Measure)
        return result.value

    assert value("distance", 6, 7) == pytest.approx(math.sqrt(1 + 1 + 0.04))
    assert value("distance", 4, 6) == pytest.approx(math.sqrt(0.25 + 1 + 0.25))  # door to chair
    assert (value("width", 7), value("depth", 7), value("height", 7)) == pytest.approx((2.0, 1.4, 0.6))
    assert value("area", 7) == pytest.approx(2.8)
    assert (value("width", 0), value("height", 0), value("area", 0)) == pytest.approx((4.0, 2.5, 10.0))
    assert (value("width", 4), value("height", 4), value("area", 4)) == pytest.approx((0.9, 2.0, 1.8))
    tall = RoomState.from_plan(PlanRoom((PlaceAnchor("bed", (0, 0, 0), (1, 0, 0), (2.0, 1.4, 0.6)),)))
    assert measured(tall, Measure("width", 0, None, 0.0)).value == 2.0  # whichever axis is the first
    assert isinstance(measured(state, Measure("depth", 4, None, 0.0)), Problem)
    assert apply(state, Measure("width", 7, None, 123.0)) == (state, [])  # a wrong value is no nonsense


def test_a_room_with_faults_can_still_be_edited():
    """A door whose wall is missing, as a model's plan may have it, is told where it matters and can be taken out."""
    state = RoomState.from_plan(PlanRoom((DOOR, CHAIR)))
    assert measured(state, Measure("height", 0, None, 0.0)).kind == "wall"
    assert kinds(apply(state, Move(0, DOOR.center))[1]) == [("wall", None)]
    assert apply(state, ActionList((*WALLS[:1], replace(DOOR, center=(1.5, -0.5, 0.0)))))[1] == []
    assert apply(state, Remove(0))[0].items == (CHAIR,)


def test_duplicate_limit_is_an_overlap_of_70_percent(state):
    """A shift s along 0.5 m has IoU (0.5 - s) / (0.5 + s): 0.7 at s = 0.0882."""
    for shift, count in ((0.087, 1), (0.089, 0)):
        assert len(apply(state, replace(CHAIR, center=(0.5 + shift, 0.5, -0.5)))[1]) == count
