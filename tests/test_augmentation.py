"""Augmentation: target, poses, depth and 3D positions turn and grow together; pictures and held-out samples stay."""

import dataclasses
import json

import numpy as np
import pytest

from roomplan_lib.actions import parse_action
from roomplan_lib.config import AugmentationConfig, DataConfig, PositionsConfig, load_run_config
from roomplan_lib.geometry import OrientedBox, points_in_box
from roomplan_lib.samples import box_record, write_samples
from roomplan_lib.samples.targets import Augmentation, question_text, reference_action, response_text
from roomplan_lib.training.collator import Collator, load_samples
from roomplan_lib.training.run import train
from roomplan_lib.training.tokenizer import train_tokenizer

PLAIN = AugmentationConfig()
TURNED = AugmentationConfig(yaw_deg=180, scale_jitter=0.5)


def make_collator(augmentation=PLAIN, n_points=1):
    data = DataConfig(image_size=112, max_length=4096, augmentation=augmentation)
    positions = PositionsConfig(n_points=n_points)
    return Collator(train_tokenizer([], 0), data, num_visual_tokens=4, patch_size=14, needs_positions=positions)


@pytest.fixture(scope="module")
def anchors(sample_files):
    return load_samples([sample_files["anchors_train"]])


def drawn(sample, draw):
    return dataclasses.replace(sample, draw=draw)


def test_patches_on_the_target_stay_in_it(anchors):
    """The patch whose point lies in the true box before lies in the box of the augmented target after."""
    inside = 0
    for sample in anchors[:12]:
        plain, turned = make_collator(), make_collator(TURNED)
        change = turned.augmentation(drawn(sample, 7))
        points = [c.view_set(sample, change if c is turned else Augmentation()) for c in (plain, turned)]
        boxes = [reference_action(sample.record, a).to_box() for a in (Augmentation(), change)]
        before, after = (
            points_in_box(views.patch_coordinates.numpy().reshape(-1, 3).astype(float), box)
            for views, box in zip(points, boxes, strict=True)
        )
        inside += before.sum()
        assert (before == after).all()
    assert inside > 20


def test_turn_and_scale_are_what_the_draw_says(anchors):
    sample = anchors[0]
    collator = make_collator(TURNED)
    change = collator.augmentation(drawn(sample, 3))
    assert change == collator.augmentation(drawn(sample, 3)) != collator.augmentation(drawn(sample, 4))
    assert abs(change.yaw) <= np.pi and 1 / 1.5 <= change.scale <= 1.5
    plain, turned = make_collator().view_set(sample), collator.view_set(sample, change)
    c, s = np.cos(change.yaw), np.sin(change.yaw)
    matrix = change.scale * np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    known = plain.patch_valid.numpy()
    assert (turned.patch_valid.numpy() == known).all() and (turned.pixel_values == plain.pixel_values).all()
    expected = plain.patch_coordinates.numpy()[known] @ matrix.T
    np.testing.assert_allclose(turned.patch_coordinates.numpy()[known], expected, atol=1e-4)
    first, second = (reference_action(sample.record, a) for a in (Augmentation(), change))
    np.testing.assert_allclose(second.center, matrix @ first.center, atol=1e-9)
    np.testing.assert_allclose(second.extent, np.multiply(first.extent, change.scale), atol=1e-9)
    axis = abs(np.dot(second.normal, matrix @ first.normal)) / change.scale
    # A record keeps four decimals; a normal may flip, since half a turn leaves the box as it is.
    assert axis == pytest.approx(1, abs=1e-3)


def test_held_out_samples_and_no_augmentation_change_nothing(anchors):
    batch = make_collator()([*anchors[:4]])
    for collator, samples in (
        (make_collator(TURNED), anchors[:4]),
        (make_collator(), [drawn(sample, 5) for sample in anchors[:4]]),
    ):
        other = collator(samples)
        assert (other["input_ids"] == batch["input_ids"]).all()
        for a, b in zip(other["geometry_records"], batch["geometry_records"], strict=True):
            assert (a == b).all()


def test_draws_of_one_view_set_are_encoded_apart_only_where_they_differ(anchors):
    same = [sample for sample in anchors if sample.view_key == anchors[0].view_key][:2]
    pair = [drawn(sample, number) for number, sample in enumerate(same)]
    assert len(make_collator(TURNED)(pair)["pixel_values"]) == 2
    assert len(make_collator()(pair)["pixel_values"]) == 1


def test_scale_jitter_counts_depth_anew(anchors):
    """Everything twice as far: the histogram of doubled depth, not the old one with new poses."""
    collator = make_collator(TURNED)
    sample = anchors[0]
    plain = collator.view_set(sample).geometry_records
    doubled = collator.view_set(sample, Augmentation(0.0, 2.0)).geometry_records
    assert not np.allclose(plain[:, -16:], doubled[:, -16:])
    turned = collator.view_set(sample, Augmentation(1.0, 1.0)).geometry_records
    assert np.allclose(plain[:, -16:], turned[:, -16:])


def test_scale_jitter_is_refused_for_answers_in_words(tiny_config):
    data = dataclasses.replace(tiny_config.data, augmentation=AugmentationConfig(scale_jitter=0.1))
    with pytest.raises(ValueError, match="answers in words would keep theirs"):
        train(dataclasses.replace(tiny_config, data=data))


def test_settings_out_of_range_are_refused(tmp_path):
    for text, words in (
        ("data: {augmentation: {yaw_deg: 181.0}}", "yaw_deg from 0 to 180"),
        ("data: {train_files: [a.jsonl], train_shares: [0.5, 0.5]}", "one share"),
        ("training: {loss_heads: [language]}", "loss_heads"),
    ):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            load_run_config(tmp_path / "run.yaml")


def test_box_in_a_question_is_written_in_the_reference_frame(anchors):
    record = anchors[0].record | {"question": "Describe the object in <box_0>.", "answer": "a chair"}
    for key in ("instruction", "action_json"):
        record.pop(key)
    text = question_text(record)
    written = json.loads(text[text.index("{") : text.rindex("}") + 1])
    expected = json.loads(response_text(anchors[0].record))
    assert {key: written[key] for key in ("center", "extent")} == {key: expected[key] for key in ("center", "extent")}
    assert "category" not in written  # it would give the answer away


def test_a_picture_turned_upright_is_shown_upright(anchors, tmp_path):
    """A record with quarter turns gives the same batch as one whose pictures were stored upright."""
    from PIL import Image

    sample = anchors[0]
    record = dict(sample.record)
    for kind in ("images", "depths"):
        names = []
        for number, name in enumerate(record[kind]):
            picture = np.asarray(Image.open(sample.root / name))
            names.append(f"{kind}{number}.png")
            Image.fromarray(np.ascontiguousarray(np.rot90(picture, -1))).save(tmp_path / names[-1])
        record[kind] = names
    record["quarter_turns"] = [1] * len(record["images"])
    write_samples(tmp_path / "turned.jsonl", [record], {"root": tmp_path})
    turned = make_collator()(load_samples([tmp_path / "turned.jsonl"]))
    plain = make_collator()([sample])
    for key in ("pixel_values", "patch_coordinates", "geometry_records"):
        assert (turned[key][0] == plain[key][0]).all(), key


def test_boxes_of_any_yaw_survive_the_turn():
    rng = np.random.default_rng(0)
    from roomplan_lib.actions import anchor_from_box, canonical, format_action
    from roomplan_lib.geometry import box_iou_3d, rotation_z

    for _ in range(200):
        box = OrientedBox(rng.uniform(-3, 3, 3), rng.uniform(0.3, 2, 3), rotation_z(rng.uniform(-4, 4)), "bed", "1")
        turn = np.eye(4)
        turn[:3, :3] = rotation_z(rng.uniform(-4, 4))
        action = canonical(anchor_from_box(box).transformed(turn))
        assert box_iou_3d(action.to_box(), box.transformed(turn)) == pytest.approx(1, abs=1e-9)
        assert box_iou_3d(parse_action(format_action(action)).to_box(), box.transformed(turn)) > 0.9
    assert box_record(box)["label"] == "bed"
