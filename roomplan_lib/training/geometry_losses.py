"""What VGGT learns geometry from: its targets, its losses (Wang et al. 2025, section 3.3), and how wrong it is.

Shapes: B view sets of S views of H x W pixels. Targets are in the frame of a set's first camera, in units of the mean
distance of the set's valid points from that camera, so a room and its model in any scale have the same ones.
Predictions are not normalised: the network has to find that unit itself. A VGGT of one fixed unit (`metres_per_unit`)
learns metres instead, where all cameras are of one kind and all rooms of one size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from roomplan_lib.config import GeometryLossConfig
from roomplan_lib.model.vggt import cameras_to_pose_encoding, pose_encoding_to_cameras, unproject_depth


def geometry_targets(
    depth: Tensor, K: Tensor, camera_to_world: Tensor, metres_per_unit: float = 0.0
) -> dict[str, Tensor]:
    """What the heads are to predict for view sets of known depth [B, S, H, W], K [B, S, 3, 3] and poses [B, S, 4, 4].

    depth: metres along the camera's z, 0 = missing. Poses: rigid, metres, any world.
    metres_per_unit: 0 = each set's own unit, the mean distance of its points from its first camera.
    Returns `pose_enc` [B, S, 9], `depth` [B, S, H, W], `world_points` [B, S, H, W, 3], `valid` [B, S, H, W] bool and
    `unit` [B], metres. Raises ValueError for a set without any depth.
    """
    valid = depth > 0
    world_to_camera = torch.linalg.inv(camera_to_world.double()) @ camera_to_world[:, :1].double()
    points = unproject_depth(depth, world_to_camera.to(depth.dtype), K.to(depth.dtype))
    count = valid.flatten(1).sum(1)
    if not count.all():
        raise ValueError("a view set has no valid depth in any of its views; leave out scenes without depth")
    unit = (points.norm(dim=-1) * valid).flatten(1).sum(1) / count
    if metres_per_unit:
        unit = torch.full_like(unit, metres_per_unit)
    world_to_camera = world_to_camera.clone()
    world_to_camera[..., :3, 3] /= unit[:, None, None]
    return {
        "pose_enc": cameras_to_pose_encoding(world_to_camera, K, tuple(depth.shape[-2:])),
        "depth": depth / unit[:, None, None, None],
        "world_points": points / unit[:, None, None, None, None],
        "valid": valid,
        "unit": unit,
    }


def camera_loss(encodings: list[Tensor], target: Tensor, decay: float, delta: float) -> Tensor:
    """Huber loss of pose encodings [B, S, 9], mean over all numbers, summed over the refinements.

    The last refinement counts 1, each one before it `decay` times the one after (0.6 in the published training code).
    delta: where the Huber loss turns from a parabola to a line of slope `delta`.
    """
    losses = [F.huber_loss(encoding.float(), target, delta=delta) for encoding in encodings]
    return sum(decay**age * loss for age, loss in enumerate(reversed(losses)))


def dense_loss(
    predicted: Tensor, confidence: Tensor, target: Tensor, valid: Tensor, alpha: float, gradient_weight: float
) -> Tensor:
    """Loss of maps [B, S, H, W, C], each pixel weighted by the confidence [B, S, H, W] that is predicted with it.

    c ||p - t|| - alpha log c, mean over the `valid` pixels, plus `gradient_weight` times the mean of
    c ||dp - dt|| over the pairs of neighbours of which both are valid, d being their difference and c the first
    one's confidence. For a fixed error e the best confidence is alpha / e, where that is above 1. A pixel that is not
    valid has no part in it.
    """
    error = torch.where(valid[..., None], predicted - target, 0.0)
    count = valid.sum().clamp(min=1)
    loss = ((confidence * _norm(error) - alpha * confidence.log()) * valid).sum() / count
    if not gradient_weight:
        return loss
    total, pairs = 0.0, 0
    for axis in (2, 3):
        first = confidence.narrow(axis, 0, confidence.shape[axis] - 1)
        both = valid.narrow(axis, 0, valid.shape[axis] - 1) & valid.narrow(axis, 1, valid.shape[axis] - 1)
        total = total + (first * _norm(error.diff(dim=axis)) * both).sum()
        pairs = pairs + both.sum()
    return loss + gradient_weight * total / pairs.clamp(min=1)


def _norm(x: Tensor) -> Tensor:
    """Length of the last axis, with a gradient of 0 where it is 0."""
    return x[..., 0].abs() if x.shape[-1] == 1 else (x.square().sum(-1) + 1e-12).sqrt() - 1e-6


def category_loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross-entropy of patch logits [B, S, P, C] with each patch's shares of pixels [B, S, P, C] by category.

    pixels: counts; patches without any have no part in it.
    """
    count = pixels.sum(-1)
    log_shares = logits.float().log_softmax(dim=-1)
    known = count > 0
    loss = -(pixels * log_shares).sum(-1) / count.clamp(min=1)
    return loss.sum() / known.sum().clamp(min=1)


def geometry_loss(
    predictions: dict, targets: dict[str, Tensor], settings: GeometryLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses, and each of them by name; one of weight 0 is not worked out.

    predictions: `pose_enc_list` (a pose encoding per refinement), `depth`, `depth_conf`, `world_points`,
    `world_points_conf` as VGGT has them, and `categories` [B, S, P, C]. targets: of `geometry_targets`, with the
    pixels of each patch by category as `categories`.
    """
    alpha, gradient = settings.confidence_alpha, settings.gradient_weight
    losses = {}
    if settings.camera_weight:
        encodings = predictions["pose_enc_list"]
        losses["camera"] = camera_loss(encodings, targets["pose_enc"], settings.camera_decay, settings.huber_delta)
    if settings.depth_weight:
        losses["depth"] = dense_loss(
            predictions["depth"], predictions["depth_conf"], targets["depth"][..., None], targets["valid"], alpha,
            gradient,
        )  # fmt: skip
    if settings.point_weight:
        losses["point"] = dense_loss(
            predictions["world_points"], predictions["world_points_conf"], targets["world_points"], targets["valid"],
            alpha, gradient,
        )  # fmt: skip
    if settings.category_weight:
        losses["category"] = category_loss(predictions["categories"], targets["categories"])
    return sum(getattr(settings, f"{name}_weight") * loss for name, loss in losses.items()), losses


def geometry_errors(
    predictions: dict[str, Tensor], targets: dict[str, Tensor], metres_per_unit: float = 0.0
) -> dict[str, Tensor]:
    """How wrong predictions are, one number [B] per view set.

    `depth_abs_rel`: mean of |p - t| / t over the set's valid pixels, after p is multiplied by the ratio of the medians;
    `depth_delta_125`: share of them with max(p / t, t / p) below 1.25. `rotation_error_deg`: mean angle between
    predicted and true orientation of the views but the first, relative to the first. `direction_error_deg`: mean angle
    between predicted and true direction from the first camera to the others. `point_rmse_m`: of the point map in
    metres, after the same kind of scaling. Heads that were not asked for are left out. With `metres_per_unit` also
    `depth_metric_abs_rel`: as `depth_abs_rel`, of depth as it is predicted.
    """
    valid, errors = targets["valid"].flatten(1), {}
    if "depth" in predictions:
        found, true = predictions["depth"][..., 0].flatten(1).float(), targets["depth"].flatten(1)
        safe = torch.where(valid, true, 1.0)
        if metres_per_unit:
            errors["depth_metric_abs_rel"] = _mean((found - true).abs() / safe, valid)
        found = found * _median_ratio(true, found, valid)[:, None]
        errors["depth_abs_rel"] = _mean((found - true).abs() / safe, valid)
        errors["depth_delta_125"] = _mean((torch.maximum(found / safe, safe / found) < 1.25).float(), valid)
    if "pose_enc" in predictions:
        cameras = (_relative_cameras(encoding, valid) for encoding in (predictions["pose_enc"], targets["pose_enc"]))
        (rotation, centers), (true_rotation, true_centers) = cameras
        trace = (rotation.transpose(-1, -2) @ true_rotation).diagonal(dim1=-2, dim2=-1).sum(-1)
        errors["rotation_error_deg"] = ((trace - 1) / 2).clamp(-1, 1).acos().rad2deg().mean(1)
        cosine = F.cosine_similarity(centers, true_centers, dim=-1)
        errors["direction_error_deg"] = cosine.clamp(-1, 1).acos().rad2deg().mean(1)
    if "world_points" in predictions:
        found, true = predictions["world_points"].flatten(1, 3).float(), targets["world_points"].flatten(1, 3)
        found = found * _median_ratio(true.norm(dim=-1), found.norm(dim=-1), valid)[:, None, None]
        errors["point_rmse_m"] = _mean((found - true).square().sum(-1), valid).sqrt() * targets["unit"]
    return errors


def _relative_cameras(encoding: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Camera to first camera of the views but the first: rotations [B, S - 1, 3, 3] and centres [B, S - 1, 3]."""
    world_to_camera, _ = pose_encoding_to_cameras(encoding, (1, 1))
    rotation = world_to_camera[..., :3].transpose(-1, -2)
    centers = -(rotation @ world_to_camera[..., 3:])[..., 0]
    first = rotation[:, :1].transpose(-1, -2)
    return first @ rotation[:, 1:], (first @ (centers[:, 1:] - centers[:, :1])[..., None])[..., 0]


def _median_ratio(true: Tensor, found: Tensor, valid: Tensor) -> Tensor:
    """[B] median of the true values over that of the found ones, of each row's valid entries."""
    rows = zip(true, found, valid, strict=True)
    return torch.stack([t[v].median() / f[v].median().clamp(min=1e-9) for t, f, v in rows])


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """[B] mean of each row's valid entries."""
    return (values * valid).sum(1) / valid.sum(1)
