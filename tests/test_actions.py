"""The action language: one text per action, one order per room, and a reason for every text that is none."""

import json
import math
import random
import time
import tracemalloc

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from roomplan_lib.actions import (
    CODECS,
    ActionError,
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
    action_record,
    anchor_from_box,
    anchor_text,
    canonical,
    format_action,
    parse_action,
)
from roomplan_lib.actions.text import place_digits
from roomplan_lib.geometry import OrientedBox, box_iou_3d, rotation_z

GOOD = (
    '{"action":"place_anchor","category":"chair",'
    '"center":[1.20,-0.84,0.36],"normal":[0.60,0.80,0.00],"extent":[0.37,0.89,1.83]}'
)


def test_canonical_text_is_a_fixed_point():
    action = parse_action(GOOD)
    assert action == PlaceAnchor("chair", (1.2, -0.84, 0.36), (0.6, 0.8, 0), (0.37, 0.89, 1.83))
    assert format_action(action) == GOOD
    assert format_action(PlaceAnchor("bed", (-0.001, 0, 0), (1, 0, 0), (1, 1, 1))).count("-0.00") == 0


def test_reference_form_without_category_is_read():
    text = '{"action":"place_anchor","scene":"47333462","center":[1,2,3],"normal":[0,1,0],"extent":[1,1,1]}'
    action = parse_action(text)
    assert action.scene == "47333462" and action.category == ""
    assert format_action(action).startswith('{"action":"place_anchor","scene":"47333462","center":[1.00,')


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[1]",
        GOOD[:-1],
        GOOD + GOOD,
        GOOD.replace("place_anchor", "drop"),
        GOOD.replace("0.60,0.80", "0.60,0.60"),  # no unit vector
        GOOD.replace("0.37", "0.00"),  # no extent
        GOOD.replace("0.37", "-0.37"),
        GOOD.replace("0.37", "NaN"),
        GOOD.replace("0.37", "1e400"),
        GOOD.replace("0.37", "1" + "0" * 5000),
        GOOD.replace("0.37", "-Infinity"),
        GOOD.replace("0.37", "1" + "0" * 400),  # an int, but no float
        GOOD.replace("0.37", "9" * 60_000),
        GOOD.replace("0.37", "0." + "9" * 60_000 + "e99999"),
        GOOD.replace("0.37", "1e" + "9" * 60_000),
        GOOD.replace("0.37", "٣"),  # Arabic-Indic
        GOOD.replace("0.37", "\uff13"),  # full width
        GOOD.replace("0.37", "0x1"),
        GOOD.replace("0.37", "+1"),
        GOOD.replace("0.37", "1_0"),
        GOOD.replace("0.37", "[0.37]"),
        GOOD.replace("0.37", '"0.37"'),
        GOOD.replace("0.37", "1000.01"),
        GOOD.replace("0.37", "null"),
        GOOD.replace("0.37", "true"),
        GOOD.replace('"chair"', '"spaceship"'),
        GOOD.replace('"chair"', "7"),
        GOOD.replace("[1.20,-0.84,0.36]", "[1.20,-0.84]"),
        GOOD.replace('"category"', '"center"'),  # a key twice
        GOOD.replace('"category":"chair"', '"eval":"x"'),
        "[" * 100_000,
        "{" * 30_000,
        "x" * 1_000_000,
        '"\\ud800"',
        "\ufeff" + GOOD,
        GOOD + " trailing",
        GOOD + "\x00",
        "\x00" + GOOD,
        GOOD.replace('"chair"', '"\\ud800"'),
        GOOD.replace('"chair"', '"\ud800"'),
        GOOD.replace('"category":"chair"', '"scene":"\\u0000"'),
        GOOD.replace('"category":"chair"', '"scene":"\\ud800"'),
        GOOD.replace('"category":"chair"', f'"scene":"{"x" * 201}"'),
        GOOD.replace('"category":"chair"', '"scene":7'),
        GOOD.replace('"place_anchor"', '["place_anchor"]'),
        GOOD.replace('"place_anchor"', '{"a":[]}'),
        GOOD.replace('"center"', '"Center"'),
        GOOD.replace("{", '{"yaw":360,', 1),
        GOOD.replace("{", '{"yaw":-1,', 1),
        GOOD.replace("{", '{"yaw":1.5,', 1),
        GOOD.replace("{", '{"yaw":true,', 1),
        GOOD.replace("{", '{"confidence":1.01,', 1),
        "{'action': 'none', 'reason': 'ambiguous'}",
        "__import__('os').system('false')",
        "```json\n" + GOOD + "\n```",
        '{"action":"none","reason":"because"}',
        '{"action":"none"}',
        '{"action":"remove","target":100}',
        '{"action":"remove","target":-1}',
        '{"action":"remove","target":1e400}',
        '{"action":"place_door","wall":0,"center":[0,0,0],"width":0,"height":2}',
        '{"action":"measure","quantity":"weight","from":1,"value":2}',
        '{"action":"plan_room"}',
        '{"action":"plan_room","actions":{}}',
        '{"action":"plan_room","actions":[{"action":"remove","target":1}]}',
        '{"action":"plan_room","actions":[{"action":"plan_room","actions":[]}]}',
        '{"action":"plan_room","actions":[{"action":"place_wall","scene":"a","a":[0,0],"b":[1,0],"z":0,"height":2}]}',
        '[{"action":"plan_room","actions":[]}]',
        "[[]]",
        "[" + ",".join(['{"action":"remove","target":1}'] * 101) + "]",
        '{"action":"none","reason":"ambiguous","x":' + "[" * 60_000,
        '{"a":1,' * 9_000,
    ],
    ids=lambda text: ascii(text[:24]),
)
@pytest.mark.parametrize("codec", CODECS)
def test_bad_text_returns_a_reason(text, codec):
    error = parse_action(text, codec=codec)
    assert isinstance(error, ActionError) and error.reason
    assert len(error.reason) < 1000 and error.reason.encode()  # writable to a file


def test_time_and_memory_are_bounded_whatever_the_text():
    million = 1_000_000
    texts = ["[" * million, '{"a":' * million, '"' + "\\u0041" * 160_000, "9" * million, " " * million + GOOD]
    texts += ["\U0001f600" * million, '{"action":"' * 90_000, GOOD * 9_000]
    texts += [text[:65_536] for text in texts] + ["[" + "1," * 32_000 + "1]", '{"x":[' + "{}," * 20_000 + "{}]}"]
    tracemalloc.start()
    start = time.perf_counter()
    for text in texts:
        for codec in CODECS:
            assert isinstance(parse_action(text, codec=codec), ActionError)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert time.perf_counter() - start < 5


def test_no_mutation_of_good_text_raises():
    rng = random.Random(0)
    pieces = list('{}[]",:-.0123456789eE\\ \x00\ud800٣') + [
        "NaN",
        "null",
        "true",
        "1e999",
        '"action"',
        "move",
        GOOD[:60],
    ]
    read = 0
    for _ in range(20_000):
        text = list(GOOD)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 4)] = [rng.choice(pieces)]
        action = parse_action("".join(text))
        if not isinstance(action, ActionError):
            read += 1
            assert parse_action(json.dumps(action_record(action))) == action
    assert 100 < read < 19_000


@pytest.mark.parametrize("seed", range(50))
def test_box_to_text_and_back_keeps_the_box(seed):
    rng = np.random.default_rng(seed)
    box = OrientedBox(rng.uniform(-5, 5, 3), rng.uniform(0.3, 2, 3), rotation_z(rng.uniform(-4, 4)), "table")
    action = anchor_from_box(box)
    assert action.normal[1] >= -0.005  # half a turn apart is one box and one text
    assert box_iou_3d(action.to_box(), box) == pytest.approx(1, abs=1e-9)
    turned = OrientedBox(box.center, box.extent, box.rotation @ rotation_z(np.pi), "table")
    assert format_action(anchor_from_box(turned)) == format_action(action)
    assert box_iou_3d(parse_action(format_action(action)).to_box(), box) > 0.9  # centimetres


def test_action_moves_with_its_frame():
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = rotation_z(0.8), [1, 2, 3]
    box = OrientedBox([1, 0, 0.5], [1, 2, 1], rotation_z(0.3), "bed")
    moved = anchor_from_box(box).transformed(transform).to_box()
    assert box_iou_3d(moved, box.transformed(transform)) == pytest.approx(1, abs=1e-9)


def test_tilted_box_is_no_anchor():
    with pytest.raises(ValueError, match="upright"):
        anchor_from_box(OrientedBox([0, 0, 0], [1, 1, 1], Rotation.from_euler("x", 0.5).as_matrix(), "bed"))


ANCHOR = PlaceAnchor("chair", (1.2, -0.84, 0.36), (0.6, 0.8, 0.0), (0.37, 0.89, 1.83), yaw=53, confidence=0.8)
WALL = PlaceWall((0.0, 0.0), (4.0, 0.0), -0.5, 2.5)
GOLDEN = [
    (ANCHOR, GOOD[:-1] + ',"yaw":53,"confidence":0.80}'),
    (WALL, '{"action":"place_wall","a":[0.00,0.00],"b":[4.00,0.00],"z":-0.50,"height":2.50}'),
    (
        PlaceDoor(0, (1.0, 0.0, 0.55), 0.9, 2.1, "s"),
        '{"action":"place_door","scene":"s","wall":0,"center":[1.00,0.00,0.55],"width":0.90,"height":2.10}',
    ),
    (
        PlaceWindow(12, (1.0, 0.0, 0.55), 0.9, 2.1),
        '{"action":"place_window","wall":12,"center":[1.00,0.00,0.55],"width":0.90,"height":2.10}',
    ),
    (
        PlaceOpening(0, (1.0, 0.0, 0.55), 0.9, 2.1),
        '{"action":"place_opening","wall":0,"center":[1.00,0.00,0.55],"width":0.90,"height":2.10}',
    ),
    (Move(3, (0.4, 1.1, 0.3), 90), '{"action":"move","target":3,"center":[0.40,1.10,0.30],"yaw":90}'),
    (Move(3, (0.4, 1.1, 0.3)), '{"action":"move","target":3,"center":[0.40,1.10,0.30]}'),
    (Remove(3, "s"), '{"action":"remove","scene":"s","target":3}'),
    (Measure("distance", 1, 4, 1.85), '{"action":"measure","quantity":"distance","from":1,"to":4,"value":1.85}'),
    (Measure("area", 1, None, 400.0), '{"action":"measure","quantity":"area","from":1,"value":400.00}'),
    (NoAction("not_present"), '{"action":"none","reason":"not_present"}'),
    (PlanRoom((), "s"), '{"action":"plan_room","scene":"s","actions":[]}'),
    (PlanRoom((WALL,)), '{"action":"plan_room","actions":[%s]}'),
    (ActionList((WALL, Remove(0))), '[%s,{"action":"remove","target":0}]'),
]


@pytest.mark.parametrize("action, text", GOLDEN, ids=lambda value: getattr(value, "verb", ""))
def test_text_of_every_verb(action, text):
    text = text.replace("%s", GOLDEN[1][1])
    assert format_action(action) == text and parse_action(text) == action
    if isinstance(action, ActionList | PlanRoom):
        return
    shuffled = dict(sorted(json.loads(text).items(), reverse=True))
    assert parse_action(json.dumps(shuffled, indent=2)) == action
    assert parse_action(json.dumps(action_record(action))) == action
    assert action.bound("t").scene == "t" and action.bound("t").bound(action.scene) == action


def test_digits_of_places():
    anchor = PlaceAnchor("sofa", (-1.23, 0.5, 0.41), (0.8, 0.6, 0.0), (2.0, 0.9, 0.8))
    wall = PlaceWall((0.04, -12.3), (3.0, 4.56), 0.0, 2.5)
    found = {
        "m2": ["[-1.2", ",0.5", "[0.0", ",-12.3", "[3.0", ",4.5"],
        "rows": [",-1.2", ",0.5", ",0.0", ",-12.3"],
        "cm": ["[-12", ",5", "[", ",-123", "[30", ",45"],
    }
    for codec, digits in found.items():
        text = [format_action(action, codec) for action in (anchor, wall)]
        assert [part[start:end] for part in text for start, end in place_digits(part, codec)] == digits
        plan = format_action(PlanRoom((wall, anchor)), codec)
        assert sorted(plan[start:end] for start, end in place_digits(plan, codec)) == sorted(digits)
    assert place_digits("none of 1.23, 4.56", "m2") == []


def test_text_of_the_other_codecs():
    room = PlanRoom((WALL, ANCHOR))
    assert format_action(room, "cm") == (
        '{"action":"plan_room","actions":[{"action":"place_wall","a":[0,0],"b":[400,0],"z":-50,"height":250},'
        '{"action":"place_anchor","category":"chair","center":[120,-84,36],"normal":[60,80,0],"extent":[37,89,183],'
        '"yaw":53,"confidence":80}]}'
    )
    assert format_action(room, "rows") == (
        '["plan_room",[["place_wall",0.00,0.00,4.00,0.00,-0.50,2.50],["chair",1.20,-0.84,0.36,0.37,0.89,1.83,53,0.80]]]'
    )
    for codec in CODECS:
        assert parse_action(format_action(room, codec), codec=codec) == room
    for text in (
        '["chair",1,2,3]',
        '["chair",1,2,3,1,1,1,0,0.5,0.5]',
        '["plan_room"]',
        '["plan_room",[["remove",1]]]',
        '["x"]',
    ):
        assert isinstance(parse_action(text, codec="rows"), ActionError)
    bare = PlaceAnchor("chair", ANCHOR.center, ANCHOR.normal, ANCHOR.extent)  # its yaw comes from the normal
    assert parse_action(format_action(bare, "rows"), codec="rows").yaw == 53
    for wrong in (ANCHOR.bound("s"), PlanRoom((), "s"), PlaceAnchor("move", *[(0, 1, 0)] * 2, (1, 1, 1))):
        with pytest.raises(ValueError):
            format_action(wrong, "rows")


@pytest.mark.parametrize(
    "action",
    [
        Move(0, (20.0, 0, 0)),
        Move(0, (19.995001, 0, 0)),
        Move(0, (math.nan, 0, 0)),
        Move(0, (math.inf, 0, 0)),
        Move(0, (0, 0)),
        Move(100, (0, 0, 0)),
        Move(-1, (0, 0, 0)),
        Move(0, (0, 0, 0), 360),
        Measure("weight", 0, None, 1),
        Measure("area", 0, None, 1000),
        NoAction("because"),
        NoAction("ambiguous", "a\n"),
        PlaceAnchor("Office Chair", (0, 0, 0), (1, 0, 0), (1, 1, 1)),
        PlaceAnchor("chair", (0, 0, 0), (1, 0, 0), (1, 1, 0.004)),
        PlaceAnchor("chair", (0, 0, 0), (1, 1, 0), (1, 1, 1)),
        PlaceAnchor("chair", (0, 0, 0), (0.8, 0, 0.6), (1, 1, 1)),
        PlaceAnchor("chair", (0, 0, 0), (1, 0, 0), (1, 1, 1), confidence=1.01),
        PlanRoom((WALL,) * 101),
        PlanRoom((Remove(0),)),
        PlanRoom((WALL.bound("s"),), "s"),
        ActionList((PlanRoom(()),)),
    ],
    ids=str,
)
def test_what_the_language_cannot_express_is_refused(action):
    with pytest.raises(ValueError):
        format_action(action)


def test_bounds_and_signs_survive():
    for value, text in ((19.99, "19.99"), (-19.99, "-19.99"), (-0.004, "0.00"), (-0.0, "0.00"), (19.9949, "19.99")):
        written = format_action(Move(0, (value, 0, 0)))
        assert f"[{text},0.00,0.00]" in written
        assert format_action(parse_action(written)) == written
    far = parse_action('{"action":"move","target":0,"center":[1000,-1000,20]}')
    assert far.center == (1000, -1000, 20)  # read, though not written


def test_seed_extents_and_open_categories():
    seed = '{"action":"place_anchor","scene":"1","center":[0,0,1],"normal":%s,"extent":[2.0,1.0]}'
    assert parse_action(seed % "[0,1,0]").extent == (0.01, 2, 1)  # a plane on a wall
    assert parse_action(seed % "[0,0,1]").extent == (2, 1, 0.01)  # a table top
    text = GOOD.replace("chair", "office_chair")
    assert isinstance(parse_action(text), ActionError)
    assert format_action(parse_action(text, categories=None)) == text
    assert isinstance(parse_action(text, categories=["sofa"]), ActionError)
    assert parse_action(text, categories=["office_chair"]).category == "office_chair"
    assert isinstance(parse_action(text.replace("office_chair", "Büro"), categories=None), ActionError)


def test_text_of_a_place_without_its_name():
    assert anchor_text(ANCHOR) == GOOD.replace('"action":"place_anchor","category":"chair",', "")


@pytest.mark.parametrize("seed", range(40))
def test_canonical_yaw_keeps_the_box_and_has_one_text(seed):
    """A box turned by half a turn, or a square one by a right angle, is the same box: one text."""
    rng = np.random.default_rng(seed)
    square = seed % 2 == 0
    extent = rng.uniform(0.3, 2, 3)
    extent[:2] = round(extent[0], 2) + np.array([0.004, -0.004] if square else [0, 0.5])  # square at 1 cm, no closer
    yaw, center = rng.uniform(0, 2 * np.pi), rng.uniform(-5, 5, 3)
    texts = set()
    for quarter in range(0, 4, 1 if square else 2):
        box = OrientedBox(center, extent, rotation_z(yaw + quarter * np.pi / 2), "table")
        action = canonical(anchor_from_box(box))
        assert box_iou_3d(action.to_box(), box) == pytest.approx(1, abs=1e-9)
        angle = math.degrees(math.atan2(round(action.normal[1], 2), round(action.normal[0], 2)))
        assert 0 <= angle < (90 if square else 180)
        texts.add(format_action(action))
        turned = PlaceAnchor("table", action.center, (1.0, 0.0, 0.0), action.extent, yaw=90 * quarter + 7)
        assert canonical(turned).yaw == (7 if square else 90 * quarter + 7) % 180
        assert box_iou_3d(canonical(turned).to_box(), turned.to_box()) == pytest.approx(1, abs=1e-9)
    assert len(texts) == 1


@pytest.mark.parametrize("normal", [(-1.0, 0.0, 0.0), (-0.99999, -0.004, 0.0), (0.004, 1.0, 0.0), (1.0, -0.004, 0.0)])
def test_canonical_yaw_at_the_seam(normal):
    """Normals that are written as 180 or 90 degrees, or as -0.00."""
    thing = PlaceAnchor("table", (0, 0, 0), normal, (1.0, 1.0, 1.0))
    assert '"normal":[1.00,0.00,0.00]' in format_action(canonical(thing))


def test_tilted_normals_are_levelled_to_the_box_they_meant():
    for normal in ((0.6, 0.64, 0.48), (0.36, 0.48, 0.8), (0.0, 0.6, -0.8)):
        thing = PlaceAnchor("table", (0, 0, 0), normal, (1.0, 2.0, 0.5))
        level = canonical(thing)
        assert box_iou_3d(level.to_box(), thing.to_box()) == pytest.approx(1, abs=1e-9)
        assert canonical(parse_action(format_action(level))) == parse_action(format_action(level))


def plan_of_square(order, flips):
    """A room of 4 x 3 m about the camera, its walls in some order and direction; a door in each, named by its width."""
    corners = [(-1.0, -0.5), (3.0, -0.5), (3.0, 2.5), (-1.0, 2.5)]
    walls, doors = [], []
    for index, (which, flip) in enumerate(zip(order, flips, strict=True)):
        ends = [corners[which], corners[(which + 1) % 4]]
        walls.append(PlaceWall(*(ends[::-1] if flip else ends), -1.0, 2.5))
        (ax, ay), (bx, by) = ends
        for share in (0.75, 0.25):
            place = (ax + share * (bx - ax), ay + share * (by - ay), 0.0)
            doors.append(PlaceDoor(index, place, 0.5 + which / 10 + share / 100, 2.0))
    return PlanRoom((*doors, *walls))


def test_canonical_order_of_walls_and_doors_whatever_the_input():
    rng = random.Random(0)
    expected = None
    for _ in range(30):
        order = rng.sample(range(4), 4)
        plan = canonical(plan_of_square(order, [rng.random() < 0.5 for _ in range(4)]))
        expected = expected or plan
        assert plan == expected
    walls, doors = plan.actions[:4], plan.actions[4:]
    # The south wall's middle (1, -0.5) is 1.12 m from the origin, the west wall's (-1, 1) is 1.41 m.
    assert [(wall.a, wall.b) for wall in walls] == [
        ((-1.0, -0.5), (3.0, -0.5)), ((3.0, -0.5), (3.0, 2.5)), ((3.0, 2.5), (-1.0, 2.5)), ((-1.0, 2.5), (-1.0, -0.5))
    ]  # fmt: skip
    assert [door.wall for door in doors] == [0, 0, 1, 1, 2, 2, 3, 3]
    widths = [0.5 + wall / 10 + share / 100 for wall in range(4) for share in (0.25, 0.75)]
    assert [door.width for door in doors] == pytest.approx(widths)


def test_walls_of_an_l_are_walked_and_loose_walls_go_by_angle():
    corners = [(0.5, 0.5), (5.0, 0.5), (5.0, 1.5), (2.0, 1.5), (2.0, 6.0), (0.5, 6.0)]
    walls = [PlaceWall(corners[i], corners[(i + 1) % 6], 0.0, 2.5) for i in range(6)]
    shuffled = PlanRoom(tuple(walls[i] for i in (3, 0, 5, 1, 4, 2)))
    assert [wall.a for wall in canonical(shuffled).actions] == corners  # counter-clockwise, from the nearest middle
    backwards = PlanRoom(tuple(PlaceWall(wall.b, wall.a, 0.0, 2.5) for wall in walls))
    assert canonical(backwards) == canonical(shuffled)
    loose = [PlaceWall((1.0, 1.0), (3.0, 1.0), 0.0, 2.0), PlaceWall((1.0, 4.0), (3.0, 4.0), 0.0, 2.0)]
    loose.append(PlaceWall((5.0, 2.0), (5.0, 3.0), 0.0, 2.0))
    ordered = canonical(PlanRoom(tuple(reversed(loose)))).actions
    assert [(wall.a, wall.b) for wall in ordered] == [
        ((1.0, 1.0), (3.0, 1.0)), ((5.0, 2.0), (5.0, 3.0)), ((3.0, 4.0), (1.0, 4.0))
    ]  # fmt: skip


def test_canonical_order_of_anchors_is_near_to_far():
    def at(category, x, y):
        return PlaceAnchor(category, (x, y, 9.0), (1.0, 0.0, 0.0), (0.5, 1.0, 1.0))

    things = [at("sofa", 3.0, 0), at("bed", 0, 1.04), at("bed", 0.98, 0), at("chair", -1.0, 0), at("bed", -1.0, 0)]
    expected = [things[4], things[1], things[2], things[3], things[0]]  # 1.0 m to 0.1 m: by category, then x
    for wrap in (PlanRoom, ActionList):
        assert list(canonical(wrap(tuple(things))).actions) == expected
    mixed = ActionList((things[0], Remove(0), things[1]))
    assert canonical(mixed) == mixed  # an order of work, not of things


@pytest.mark.parametrize("seed", range(30))
def test_canonical_is_decided_before_writing_as_after_reading(seed):
    rng = np.random.default_rng(seed)
    ends = rng.uniform(-6, 6, (4, 2))
    walls = [PlaceWall(tuple(a), tuple(b), 0.0, 2.5) for a, b in zip(ends, np.roll(ends, -1, 0), strict=True)]
    doors = [PlaceDoor(int(rng.integers(6)), tuple(rng.uniform(-6, 6, 3)), 0.9, 2.0) for _ in range(4)]
    boxes = [
        OrientedBox(rng.uniform(-2, 2, 3), rng.uniform(0.3, 2, 3), rotation_z(rng.uniform(-4, 4)), "bed") for _ in "123"
    ]
    plan = canonical(PlanRoom((*walls, *doors, *map(anchor_from_box, boxes))))
    assert canonical(plan) == plan
    read = parse_action(format_action(plan))
    assert canonical(read) == read and format_action(read) == format_action(plan)


def test_every_verb_moves_with_its_frame():
    """Against points moved by the matrix itself; lengths grow with a similarity, indices stay."""
    turn, scale = 0.7, 1.25
    transform = np.eye(4)
    transform[:3, :3], transform[:3, 3] = scale * rotation_z(turn), [1, 2, 3]

    def moved(point):
        return transform[:3, :3] @ point + transform[:3, 3]

    wall, door = WALL.transformed(transform), PlaceDoor(0, (1, 0, 0.5), 0.9, 2.1).transformed(transform)
    np.testing.assert_allclose([*wall.a, wall.z], moved([0, 0, -0.5]))
    np.testing.assert_allclose([*wall.b, wall.z + wall.height], moved([4, 0, 2.0]))
    np.testing.assert_allclose(door.center, moved([1, 0, 0.5]))
    assert (door.wall, door.width, door.height) == (0, pytest.approx(0.9 * scale), pytest.approx(2.1 * scale))
    np.testing.assert_allclose(door.to_box(wall).rotation, rotation_z(turn), atol=1e-12)
    move = Move(3, (1, 1, 1), 350).transformed(transform)
    np.testing.assert_allclose(move.center, moved([1, 1, 1]))
    assert move.yaw == round(350 + math.degrees(turn)) % 360
    assert Measure("distance", 0, 1, 2.0).transformed(transform).value == pytest.approx(2.0 * scale)
    assert Measure("area", 0, None, 2.0).transformed(transform).value == pytest.approx(2.0 * scale**2)
    assert Remove(1).transformed(transform) == Remove(1)
    top = PlaceAnchor("table", (0, 0, 1), (0, 0, 1), (2, 1, 0.05))  # its sides lie along x and y: the turn is kept
    assert top.transformed(transform).to_box().yaw == pytest.approx(turn, abs=0.01)
    thing = ANCHOR.transformed(transform)
    assert thing.yaw == round(53 + math.degrees(turn)) and thing.extent == tuple(np.multiply(ANCHOR.extent, scale))
    plan = PlanRoom((WALL, ANCHOR), "s")
    assert plan.transformed(transform).actions == (wall, thing)
    assert ActionList((WALL,)).transformed(transform).bound("s").actions == (wall.bound("s"),)
    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("x", 0.2).as_matrix()
    for action in (WALL, ANCHOR, move, plan):
        with pytest.raises(ValueError, match="z up"):
            action.transformed(tilted)


def test_thin_box_can_still_be_written():
    box = OrientedBox([0, 0, 0], [1, 0.0, 2], np.eye(3), "tv_monitor")
    assert '"extent":[1.00,0.01,2.00]' in format_action(anchor_from_box(box))
