"""The action language: one text per action, and a reason for every text that is none."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from roomplan_lib.actions import ActionError, PlaceAnchor, anchor_from_box, format_action, parse_action
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
    ],
    ids=lambda text: text[:24],
)
def test_bad_text_returns_a_reason(text):
    error = parse_action(text)
    assert isinstance(error, ActionError) and error.reason
    assert len(error.reason) < 1000


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
