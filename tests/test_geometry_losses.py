"""What VGGT is trained on: targets that no scale or world changes, losses against second implementations, errors."""

import dataclasses

import numpy as np
import pytest
import torch

from roomplan_lib.config import GeometryLossConfig, parse
from roomplan_lib.geometry import invert_pose, look_at, rotation_z, unproject
from roomplan_lib.model.vggt import cameras_to_pose_encoding, pose_encoding_to_cameras
from roomplan_lib.training.geometry_losses import (
    camera_loss,
    category_loss,
    dense_loss,
    geometry_errors,
    geometry_loss,
    geometry_targets,
)

HEIGHT, WIDTH = 6, 8


def known(seed: int = 0, num_views: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Depth [1, S, H, W] metres with holes, K and camera_to_world of cameras about a point."""
    rng = np.random.default_rng(seed)
    depth = rng.uniform(1, 4, (1, num_views, HEIGHT, WIDTH)).astype(np.float32)
    depth[rng.random(depth.shape) < 0.2] = 0
    K = np.array([[7.0, 0, 3.4], [0, 7.2, 2.6], [0, 0, 1]])
    poses = [look_at(rng.uniform(-2, 2, 3) + [0, 0, 3], rng.uniform(-1, 1, 3)) for _ in range(num_views)]
    return (
        torch.tensor(depth),
        torch.tensor(K, dtype=torch.float32).expand(1, num_views, 3, 3),
        torch.tensor(np.stack(poses))[None],
    )


# Targets --------------------------------------------------------------------------------------------------------------


def test_targets_are_numpys_points_in_the_first_camera_over_their_mean_distance():
    depth, K, poses = known()
    targets = geometry_targets(depth, K, poses)
    first = invert_pose(poses[0, 0].numpy())
    points, valid = zip(
        *(unproject(d.numpy(), k.numpy(), first @ p.numpy()) for d, k, p in zip(depth[0], K[0], poses[0], strict=True)),
        strict=True,
    )
    points, valid = np.stack(points), np.stack(valid)
    unit = np.linalg.norm(points[valid], axis=-1).mean()
    assert targets["unit"].item() == pytest.approx(unit, rel=1e-5)
    assert np.array_equal(targets["valid"][0].numpy(), valid)
    np.testing.assert_allclose(targets["world_points"][0].numpy()[valid], points[valid] / unit, atol=1e-5)
    np.testing.assert_allclose(targets["depth"][0].numpy(), depth[0].numpy() / unit, rtol=1e-5)
    world_to_camera, K_again = pose_encoding_to_cameras(targets["pose_enc"][0], (HEIGHT, WIDTH))
    expected = np.stack([invert_pose(pose.numpy()) @ poses[0, 0].numpy() for pose in poses[0]])[:, :3]
    expected[:, :, 3] /= unit
    np.testing.assert_allclose(world_to_camera.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(K_again[..., [0, 1], [0, 1]].numpy(), K[0][..., [0, 1], [0, 1]].numpy(), rtol=1e-5)
    identity = [0, 0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(targets["pose_enc"][0, 0, :7].numpy(), identity, atol=1e-6)


def test_targets_do_not_depend_on_scale_or_world():
    depth, K, poses = known()
    before = geometry_targets(depth, K, poses)
    moved = torch.tensor(rotation_z(1.1) @ look_at(np.array([1.0, 2, 3]), np.zeros(3))[:3, :3])
    world = torch.eye(4, dtype=torch.float64)
    world[:3, :3], world[:3, 3] = moved, torch.tensor([5.0, -7.0, 2.0])
    other = world @ poses
    other[..., :3, 3] *= 2.5
    after = geometry_targets(2.5 * depth, K, other)
    assert after.pop("unit").item() == pytest.approx(2.5 * before.pop("unit").item(), rel=1e-5)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=2e-5, rtol=2e-5, msg=name)


def test_targets_of_a_fixed_unit_are_metres_over_it():
    depth, K, poses = known()
    free, fixed = geometry_targets(depth, K, poses), geometry_targets(depth, K, poses, 2.5)
    assert fixed["unit"].tolist() == [2.5]
    torch.testing.assert_close(fixed["depth"], depth / 2.5)
    torch.testing.assert_close(fixed["world_points"] * 2.5, free["world_points"] * free["unit"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fixed["pose_enc"][..., :3] * 2.5, free["pose_enc"][..., :3] * free["unit"])
    torch.testing.assert_close(fixed["pose_enc"][..., 3:], free["pose_enc"][..., 3:])
    far = {"depth": 1.2 * fixed["depth"][..., None]}
    errors = geometry_errors(far, fixed, 2.5)
    assert errors["depth_metric_abs_rel"].item() == pytest.approx(0.2, abs=1e-5)
    assert errors["depth_abs_rel"].item() == pytest.approx(0, abs=1e-5)
    assert "depth_metric_abs_rel" not in geometry_errors(far, free)


def test_a_set_without_depth_is_refused():
    depth, K, poses = known()
    with pytest.raises(ValueError, match="no valid depth"):
        geometry_targets(torch.zeros_like(depth), K, poses)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_camera_loss_is_numpys_and_zero_for_the_truth():
    rng = np.random.default_rng(1)
    target, encodings = rng.normal(size=(2, 3, 9)), rng.normal(size=(4, 2, 3, 9)) * 0.3
    delta, decay = 0.1, 0.6

    def huber(x):
        return np.where(np.abs(x) <= delta, 0.5 * x**2, delta * (np.abs(x) - 0.5 * delta)).mean()

    expected = sum(decay ** (3 - i) * huber(encodings[i] - target) for i in range(4))
    found = camera_loss([torch.tensor(e).float() for e in encodings], torch.tensor(target).float(), decay, delta)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert camera_loss([torch.tensor(target).float()] * 4, torch.tensor(target).float(), decay, delta) == 0


def maps(channels: int, seed: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 2, 4, 5)
    predicted, target = (torch.randn(*shape, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    confidence = 1 + torch.rand(shape, generator=generator, dtype=torch.float64)
    return [predicted, confidence, target, torch.rand(shape, generator=generator) > 0.3]


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_loss_is_numpys(channels):
    predicted, confidence, target, valid = (t.numpy() for t in maps(channels))
    total, count, steps, pairs = 0.0, 0, 0.0, 0
    error = predicted - target
    for b, s, i, j in np.ndindex(valid.shape):
        if not valid[b, s, i, j]:
            continue
        c = confidence[b, s, i, j]
        total += c * np.linalg.norm(error[b, s, i, j]) - 0.2 * np.log(c)
        count += 1
        for k, m in ((i + 1, j), (i, j + 1)):
            if k < valid.shape[2] and m < valid.shape[3] and valid[b, s, k, m]:
                steps += c * np.linalg.norm(error[b, s, k, m] - error[b, s, i, j])
                pairs += 1
    found = dense_loss(*maps(channels), alpha=0.2, gradient_weight=0.5)
    assert found.item() == pytest.approx(total / count + 0.5 * steps / pairs, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_dense_loss_has_the_gradient_of_finite_differences_and_none_where_depth_is_missing(channels):
    predicted, confidence, target, valid = maps(channels)
    predicted.requires_grad_()
    confidence.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, c: dense_loss(p, c, target, valid, 0.2, 0.7), (predicted, confidence), eps=1e-7, atol=1e-5
    )
    broken = torch.where(valid[..., None], target, torch.nan)
    gradients = torch.autograd.grad(dense_loss(predicted, confidence, broken, valid, 0.2, 0.7), (predicted, confidence))
    assert all(torch.isfinite(g).all() and (g[~valid] == 0).all() and g[valid].abs().min() > 0 for g in gradients)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_truth_is_the_minimum_and_confidence_is_best_at_alpha_over_error(channels):
    _, confidence, target, valid = maps(channels)
    best = dense_loss(target, confidence, target, valid, 0.2, 1.0)
    assert best.item() == pytest.approx(-0.2 * confidence[valid].log().mean().item(), rel=1e-6)
    for seed in range(5):
        noise = 0.01 * torch.randn(target.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert dense_loss(target + noise, confidence, target, valid, 0.2, 1.0) > best
    error = torch.full_like(target, 0.05 / channels**0.5)  # of length 0.05 in each pixel
    choices = torch.linspace(1, 10, 91, dtype=torch.float64)
    losses = [dense_loss(target + error, torch.full_like(confidence, c), target, valid, 0.2, 0.0) for c in choices]
    assert choices[int(torch.stack(losses).argmin())].item() == pytest.approx(0.2 / 0.05)


def test_category_loss_is_numpys():
    rng = np.random.default_rng(3)
    logits, pixels = rng.normal(size=(1, 2, 3, 5)), rng.integers(0, 9, (1, 2, 3, 5)).astype(float)
    pixels[0, 1, 2] = 0
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = [
        -(p / p.sum() * np.log(s)).sum()
        for p, s in zip(pixels.reshape(-1, 5), shares.reshape(-1, 5), strict=True)
        if p.sum()
    ]
    found = category_loss(torch.tensor(logits), torch.tensor(pixels).float())
    assert len(rows) == 5 and found.item() == pytest.approx(np.mean(rows), rel=1e-5)


def perfect(targets: dict) -> dict:
    confidence = torch.full(targets["valid"].shape, 2.0)
    return {
        "pose_enc": targets["pose_enc"],
        "pose_enc_list": [targets["pose_enc"]],
        "depth": targets["depth"][..., None],
        "depth_conf": confidence,
        "world_points": targets["world_points"],
        "world_points_conf": confidence,
        "categories": torch.zeros(1, 3, 1, 4),
    }


def test_each_weight_scales_its_own_loss():
    targets = geometry_targets(*known()) | {"categories": torch.ones(1, 3, 1, 4)}
    predictions = perfect(targets)
    predictions["pose_enc_list"] = [targets["pose_enc"] + 0.3]
    predictions["depth"] = predictions["depth"] + 0.1
    settings = parse(GeometryLossConfig, {"category_weight": 1.0})
    base, losses = geometry_loss(predictions, targets, settings)
    assert sorted(losses) == ["camera", "category", "depth", "point"]
    assert base.item() == pytest.approx(sum(loss.item() for loss in losses.values()))
    for name, loss in losses.items():
        heavier = dataclasses.replace(settings, **{f"{name}_weight": 3.0})
        more, _ = geometry_loss(predictions, targets, heavier)
        assert (more - base).item() == pytest.approx(2 * loss.item(), rel=1e-4)
        without, left = geometry_loss(predictions, targets, dataclasses.replace(settings, **{f"{name}_weight": 0.0}))
        assert name not in left and (base - without).item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"depth_weight": -1.0}, "loss.depth_weight: expected 0 or more"),
        ({"huber_delta": 0.0}, "loss.huber_delta"),
        ({"camera_weight": 0.0, "depth_weight": 0.0, "point_weight": 0.0, "category_weight": 1.0}, "above 0"),
    ],
)
def test_wrong_weights_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse(GeometryLossConfig, values)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_errors_of_the_truth_are_zero_in_any_unit():
    targets = geometry_targets(*known())
    predictions = perfect(targets)
    predictions["depth"] = 3 * predictions["depth"]
    predictions["world_points"] = 3 * predictions["world_points"]
    scaled = targets["pose_enc"].clone()
    scaled[..., :3] *= 3
    errors = geometry_errors(predictions | {"pose_enc": scaled}, targets)
    assert errors.pop("depth_delta_125").item() == 1
    for name, value in errors.items():
        assert value.item() == pytest.approx(0, abs=0.1 if name.endswith("_deg") else 1e-5), name


def test_errors_are_those_that_were_put_in():
    targets = geometry_targets(*known(num_views=3))
    predictions = perfect(targets)
    wrong = targets["depth"].clone()
    valid = targets["valid"]
    order = targets["depth"].flatten().masked_fill(~valid.flatten(), torch.inf).argsort()
    low = order[: int(valid.sum()) // 4]  # those below the median stay below it, so the scale does not move
    wrong.view(-1)[low] *= 0.7
    predictions["depth"] = wrong[..., None]
    world_to_camera, K = pose_encoding_to_cameras(targets["pose_enc"], (HEIGHT, WIDTH))
    angle = np.radians(10)
    turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]).float()
    world_to_camera[0, 1] = turn @ world_to_camera[0, 1]  # about its own axis: its centre stays
    predictions["pose_enc"] = cameras_to_pose_encoding(world_to_camera, K, (HEIGHT, WIDTH))
    errors = geometry_errors(predictions, targets)
    share = len(low) / int(valid.sum())
    assert errors["depth_abs_rel"].item() == pytest.approx(0.3 * share, rel=1e-3)
    assert errors["depth_delta_125"].item() == pytest.approx(1 - share, rel=1e-5)  # 1 / 0.7 is above 1.25
    assert errors["rotation_error_deg"].item() == pytest.approx(10 / 2, abs=0.05)
    assert errors["direction_error_deg"].item() == pytest.approx(0, abs=0.1)


def test_direction_error_is_the_angle_between_the_ways_to_the_other_cameras():
    targets = geometry_targets(*known(num_views=2))
    world_to_camera, K = pose_encoding_to_cameras(targets["pose_enc"], (HEIGHT, WIDTH))
    rotation = world_to_camera[0, 1, :, :3]
    center = -rotation.T @ world_to_camera[0, 1, :, 3]
    axis = torch.linalg.cross(center, torch.tensor([0.0, 0.0, 1.0]))
    axis /= axis.norm()
    angle = np.radians(25)
    turned = center * np.cos(angle) + torch.linalg.cross(axis, center) * np.sin(angle)  # Rodrigues
    world_to_camera[0, 1, :, 3] = -rotation @ (2 * turned)
    predicted = cameras_to_pose_encoding(world_to_camera, K, (HEIGHT, WIDTH))
    errors = geometry_errors({"pose_enc": predicted}, targets)
    assert errors["direction_error_deg"].item() == pytest.approx(25, abs=0.05)
    assert errors["rotation_error_deg"].item() == pytest.approx(0, abs=0.1)


def test_point_error_is_in_metres_after_scaling_by_the_medians():
    targets = geometry_targets(*known())
    found = 2 * targets["world_points"] + torch.tensor([0.0, 0.3, 0.0])
    errors = geometry_errors({"world_points": found}, targets)
    valid = targets["valid"][0].numpy()
    true, found = (points[0].numpy()[valid] for points in (targets["world_points"], found))
    lengths = [np.sort(np.linalg.norm(points, axis=-1)) for points in (true, found)]
    middle = (len(true) - 1) // 2  # torch's median is the lower of the two middle ones
    scaled = found * lengths[0][middle] / lengths[1][middle]
    expected = targets["unit"].item() * np.sqrt(np.square(scaled - true).sum(-1).mean())
    assert errors["point_rmse_m"].item() == pytest.approx(expected, rel=1e-4) and expected > 0.01
