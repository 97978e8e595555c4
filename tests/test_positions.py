"""3D positions: coordinates of patches, their encodings, where these are added, and the proof that they are used."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_full_model import LORA, PAD, QWEN_FIELDS, SETTINGS, logits_of, make, make_batch, shake, split
from torch import nn

from roomplan_lib.config import LanguageModelConfig, PositionsConfig, ResamplerConfig, RunConfig, parse
from roomplan_lib.geometry import unproject
from roomplan_lib.model import positions as positions_module
from roomplan_lib.model.geometry_tokens import normalise_records, record_intrinsics, record_poses
from roomplan_lib.model.positions import (
    align_cameras,
    build_positions,
    encode_positions,
    register_positions,
    sin3d_encoding,
    vggt_patch_coordinates,
)
from roomplan_lib.model.vggt import cameras_to_pose_encoding
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.training import collator as collator_module
from roomplan_lib.training.collator import load_samples, patch_coordinates
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer, train
from roomplan_lib.training.trainer import RoomPlanTrainer, parameter_groups

K = np.array([[50.0, 0, 26], [0, 50, 18], [0, 0, 1]])


def change(config, part, **values):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


# ---------------------------------------------------------------------------- coordinates of patches
def test_patch_means_equal_brute_force_and_skip_missing_depth():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 3, (60, 80)).astype(np.float32)
    depth[:20, :20] = 0  # the first patch has no depth at all
    depth[25, 30] = 0
    points, valid = unproject(depth, np.array([[70.0, 0, 39.5], [0, 70, 29.5], [0, 0, 1]]), np.eye(4))
    means, known = patch_coordinates(points, valid, (3, 4))
    assert known.tolist() == [False] + [True] * 11 and (means[0] == 0).all()
    for row in range(3):
        for column in range(4):
            block = (slice(row * 20, row * 20 + 20), slice(column * 20, column * 20 + 20))
            if row + column:
                assert np.allclose(means[row * 4 + column], points[block][valid[block]].mean(0), atol=1e-9)


@pytest.mark.parametrize("size, grid", [((48, 64), (3, 4)), ((60, 80), (4, 5)), ((37, 53), (3, 4))])
def test_patch_means_are_two_dimensional(size, grid):
    height, width = size
    K = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    depth = np.random.default_rng(0).uniform(1, 3, size).astype(np.float32)
    depth[: height // 4, : width // 4] = 0
    points, valid = unproject(depth, K, np.eye(4))
    means, known = patch_coordinates(points, valid, grid)
    rows, columns = (np.floor((np.arange(n) + 0.5) * g / n).astype(int) for n, g in zip(size, grid, strict=True))
    for patch in range(grid[0] * grid[1]):
        inside = (rows[:, None] == patch // grid[1]) & (columns == patch % grid[1]) & valid
        assert known[patch] == inside.any()
        if inside.any():
            assert np.abs(means[patch] - points[inside].mean(0)).max() < 1e-5
    # The fork pools the flat list of pixels: its tokens average rows of the image, far from the patches they join.
    flat = torch.tensor(np.where(valid[..., None], points, 0).reshape(-1, 3).T)[None]
    pooled = nn.functional.adaptive_avg_pool1d(flat, grid[0] * grid[1])[0].T.numpy()
    assert np.linalg.norm(pooled - means, axis=1)[known].mean() > 0.3


def camera_at(*center):
    return np.block([[np.eye(3), np.array(center)[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]])


def naive_coordinates(depth, pose, grid):
    """What the published code does: no mask, so that missing depth puts the camera's own centre into the mean."""
    points, _ = unproject(np.where(depth > 0, depth, 1e-30), K, pose)
    return patch_coordinates(points, np.ones(depth.shape, bool), grid)


def test_missing_depth_is_masked_and_never_the_camera_centre():
    pose = camera_at(5.0, -2.0, 1.0)
    depth = np.full((36, 52), 2.0, np.float32)
    patches = depth.reshape(3, 12, 4, 13)
    patches[0, :, 0] = 0  # no depth at all
    patches[1, :5, 1] = 0  # 7 of 12 rows left
    patches[2, :7, 2] = np.nan  # 5 of 12
    points, valid = unproject(depth, K, pose)

    def near_camera(coordinates, known):
        """Patches nearer to the camera than the wall, which stands 2 m in front of it."""
        return ((coordinates[:, 2] - pose[2, 3] < 1.99) & known).nonzero()[0].tolist()

    coordinates, known = patch_coordinates(points, valid, (3, 4))
    assert near_camera(coordinates, known) == [] and known.tolist() == [False] + [True] * 11
    naive, naive_known = naive_coordinates(np.nan_to_num(depth), pose, (3, 4))
    assert near_camera(naive, naive_known) == [0, 5, 10] and np.allclose(naive[0], pose[:3, 3])
    for share, masked in ((0.0, [0]), (5 / 12, [0]), (0.5, [0, 10]), (7 / 12, [0, 10]), (0.6, [0, 5, 10])):
        for n_points in (1, 2, 5, 9):
            coordinates, known = patch_coordinates(points, valid, (3, 4), n_points, share)
            assert (~known).nonzero()[0].tolist() == masked and (coordinates[~known] == 0).all()
            assert np.isfinite(coordinates).all() and (coordinates[known][..., 2] > pose[2, 3] + 1.99).all()


@pytest.mark.parametrize("size, grid", [((36, 52), (3, 4)), ((37, 53), (3, 4)), ((27, 54), (1, 2))])
def test_points_of_a_patch_equal_brute_force(size, grid):
    rng = np.random.default_rng(1)
    depth = rng.uniform(1, 3, size).astype(np.float32) * (rng.random(size) > 0.3)
    depth[:13, :13] = 0
    points, valid = unproject(depth, K, camera_at(1.0, 2.0, 3.0))
    ends, _ = patch_coordinates(points, valid, grid, 2)
    lattice = {n: patch_coordinates(points, valid, grid, n) for n in (5, 9)}
    assert ends.shape == (grid[0] * grid[1], 2, 3) and lattice[9][0].shape == (grid[0] * grid[1], 9, 3)
    cell = (size[0] / grid[0], size[1] / grid[1])  # pixels
    for patch in range(grid[0] * grid[1]):
        top, left = patch // grid[1] * cell[0], patch % grid[1] * cell[1]
        v, u = np.nonzero(valid)
        mine = (top <= v + 0.5) & (v + 0.5 < top + cell[0]) & (left <= u + 0.5) & (u + 0.5 < left + cell[1])
        v, u = v[mine], u[mine]
        assert all(known[patch] == mine.any() for _, known in lattice.values())
        if not mine.any():
            continue
        assert np.array_equal(ends[patch], [points[v, u].min(0), points[v, u].max(0)])
        for n, places in ((9, range(9)), (5, (0, 2, 4, 6, 8))):
            for i, place in enumerate(places):
                target = ((place // 3 + 0.5) / 3, (place % 3 + 0.5) / 3)  # of the patch's sides
                distance = ((v + 0.5 - top) / cell[0] - target[0]) ** 2 + ((u + 0.5 - left) / cell[1] - target[1]) ** 2
                chosen = (points[v, u] == lattice[n][0][patch, i]).all(-1)
                assert chosen.sum() == 1 and distance[chosen][0] == pytest.approx(distance.min(), abs=1e-12)


def test_lattice_lies_where_video_3d_llm_has_it():
    """In its patches of 27 pixels: rows and columns 4, 13 and 22; sample5 is every other one of the nine."""
    points = np.stack(np.meshgrid(np.arange(27.0), np.arange(27.0), [7.0]), axis=-1)[:, :, 0]  # (column, row, 7)
    valid = np.ones((27, 27), bool)
    nine = patch_coordinates(points, valid, (1, 1), 9)[0][0]
    assert nine.tolist() == [[u, v, 7] for v in (4, 13, 22) for u in (4, 13, 22)]
    assert np.array_equal(patch_coordinates(points, valid, (1, 1), 5)[0][0], nine[::2])


def camera_path(num_views: int) -> torch.Tensor:
    """[V, 4, 4] camera_to_reference, metres."""
    torch.manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(num_views, 3, 3, dtype=torch.float64))[0]
    poses = torch.eye(4, dtype=torch.float64).repeat(num_views, 1, 1)
    poses[:, :3, :3] = rotation * torch.linalg.det(rotation)[:, None, None]
    poses[:, :3, 3] = torch.randn(num_views, 3, dtype=torch.float64) * 2
    return poses


def test_vggt_points_come_to_the_reference_frame_in_metres():
    """Exact predictions in VGGT's world (its first camera, unit 1 / 2.7 m) give the true metric patch means."""
    known = camera_path(4)
    height, width, patch, unit = 28, 42, 14, 2.7
    K = torch.tensor([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]], dtype=torch.float64).expand(4, 3, 3)
    depth = torch.rand(4, height, width, dtype=torch.float64) * 3 + 1  # metres
    vggt = torch.linalg.inv(known[0]) @ known  # camera to VGGT's world
    vggt[:, :3, 3] /= unit
    pose_enc = cameras_to_pose_encoding(torch.linalg.inv(vggt)[:, :3], K, (height, width))
    predictions = {"pose_enc": pose_enc[None].float(), "depth": (depth / unit)[None, ..., None].float()}
    coordinates, valid = vggt_patch_coordinates(predictions, known[None].float(), (height, width), patch)
    assert coordinates.shape == (1, 4, 6, 3) and valid.all()
    for view in range(4):
        points, mask = unproject(depth[view].numpy(), K[view].numpy(), known[view].numpy())
        means, _ = patch_coordinates(points, mask, (2, 3))
        assert np.abs(coordinates[0, view].numpy() - means).max() < 1e-4
    predictions["depth"][0, 0, :14, :14] = float("inf")
    coordinates, valid = vggt_patch_coordinates(predictions, known[None].float(), (height, width), patch)
    assert valid[0, 0].tolist() == [False] + [True] * 5 and coordinates.isfinite().all()


@pytest.mark.parametrize("n_points", [1, 2, 5, 9])
def test_vggt_points_of_a_patch_equal_those_of_depth(n_points):
    """The same depth through both sources, with holes; patches of an odd side, whose middle is one pixel."""
    known = camera_path(3)
    height, width, patch = 30, 45, 15
    intrinsics = torch.tensor([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]], dtype=torch.float64)
    depth = torch.rand(3, height, width, dtype=torch.float64) * 3 + 1
    depth[0, :15, :15] = torch.nan
    depth[2, :6, 15:30] = torch.nan
    depth[1, 15:, 1:15] = torch.nan  # one of fifteen columns left
    pose_enc = cameras_to_pose_encoding(torch.linalg.inv(known)[:, :3], intrinsics.expand(3, 3, 3), (height, width))
    predictions = {"pose_enc": pose_enc[None].float(), "depth": depth[None, ..., None].float()}
    got, valid = vggt_patch_coordinates(predictions, known[None].float(), (height, width), patch, n_points, 0.2)
    assert valid.sum() == 16 and not valid[0, 0, 0] and not valid[0, 1, 3]
    for view in range(3):
        points, mask = unproject(depth[view].numpy(), intrinsics.numpy(), known[view].numpy())
        expected, has = patch_coordinates(points, mask, (2, 3), n_points, 0.2)
        assert np.array_equal(valid[0, view].numpy(), has) and got[0, view].shape == expected.shape
        assert np.abs(got[0, view].numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("n_points", [1, 2, 9])
def test_vggt_depth_from_known_cameras_is_that_of_a_sensor(n_points):
    """Depth in units of 2.5 m; cameras that VGGT gets wrong do no harm."""
    known = camera_path(3)
    height, width, patch = 30, 45, 15
    intrinsics = torch.tensor([[41.0, 0, 20], [0, 43.0, 16], [0, 0, 1]], dtype=torch.float64)
    depth = torch.rand(3, height, width, dtype=torch.float64) * 3 + 1
    predictions = {"depth": depth[None, ..., None].float() / 2.5}
    K = intrinsics.expand(1, 3, 3, 3).float()
    shape = (height, width), patch, n_points, 0.0, K
    got, valid = vggt_patch_coordinates(predictions, known[None].float(), *shape, 2.5)
    assert valid.all()
    for view in range(3):
        points, mask = unproject(depth[view].numpy(), intrinsics.numpy(), known[view].numpy())
        expected, _ = patch_coordinates(points, mask, (2, 3), n_points)
        assert np.abs(got[0, view].numpy() - expected).max() < 1e-4
    # Of no fixed unit: the spread of the predicted centres against that of the known ones tells it.
    vggt = known.clone()
    vggt[:, :3, 3] /= 2.5
    wrong = vggt.clone()
    wrong[:, :3, :3] = wrong[[1, 2, 0], :3, :3]
    encoding = cameras_to_pose_encoding(torch.linalg.inv(wrong)[:, :3], intrinsics.expand(3, 3, 3), (height, width))
    again, _ = vggt_patch_coordinates(predictions | {"pose_enc": encoding[None].float()}, known[None].float(), *shape)
    assert torch.allclose(again, got, atol=1e-4)


def test_positions_from_vggts_depth_read_the_depth_head_alone():
    fields, positions = SETTINGS.vggt, PositionsConfig("mlp_pe", width=16, source="vggt_depth")
    both = make(vggt=fields | {"metres_per_unit": 0.0}, positions=positions)
    assert both.encoder.config.heads == ("camera", "depth")
    model = make(vggt=fields | {"metres_per_unit": 2.5}, positions=positions).eval()
    assert model.encoder.config.heads == ("depth",)
    batch = make_batch(model, (3, 3), (9, 6))
    batch["has_geometry"][:] = True
    for records in batch["geometry_records"]:
        records[:, 12:16] = torch.tensor([0.9, 1.3, 0.45, 0.55])
    seen = []
    model.positions.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    logits_of(model, batch)
    records = torch.stack(batch["geometry_records"])
    depth = model.encoder(torch.stack(batch["pixel_values"]).float() / 255, heads=("depth",))["depth"]
    K = record_intrinsics(records, (28, 42))
    for s in range(2):
        for v in range(3):
            points, mask = unproject(
                2.5 * depth[s, v, ..., 0].detach().double().numpy(), K[s, v].double().numpy(),
                record_poses(records)[s, v].double().numpy(),
            )  # fmt: skip
            expected, _ = patch_coordinates(points, mask, (2, 3))
            assert np.abs(seen[0][s, v].numpy() - expected).max() < 1e-3


def test_intrinsics_of_a_record_are_those_it_was_made_from():
    K = torch.tensor([[[41.0, 0, 20], [0, 43.0, 16], [0, 0, 1]]])
    records = normalise_records(torch.eye(4)[None], K, (45, 30), torch.zeros(1, 16))
    assert torch.allclose(record_intrinsics(records, (30, 45)), K, atol=1e-5)
    half = torch.tensor([[[20.5, 0, 9.75], [0, 21.5, 7.75], [0, 0, 1]]])  # the same camera, a picture of half the size
    assert torch.allclose(record_intrinsics(records, (15, 22.5)), half, atol=1e-5)


def test_alignment_equals_umeyama_and_survives_noise():
    known = camera_path(6)
    truth = camera_path(3)[1]
    rotation = truth[:3, :3].T @ known[:, :3, :3]
    centers = (known[:, :3, 3] - truth[:3, 3]) @ truth[:3, :3] / 0.4
    inputs = (rotation[None], centers[None], known[None, :, :3, :3], known[None, :, :3, 3])
    scale, turn, shift = align_cameras(*inputs)
    assert (
        scale.item() == pytest.approx(0.4)
        and torch.allclose(turn[0], truth[:3, :3])
        and torch.allclose(shift[0], truth[:3, 3])
    )
    # Umeyama 1991 on the centres alone
    x, y = centers - centers.mean(0), known[:, :3, 3] - known[:, :3, 3].mean(0)
    u, d, vh = torch.linalg.svd(y.T @ x / len(x))
    s = torch.diag(torch.tensor([1.0, 1.0, torch.linalg.det(u @ vh).sign()], dtype=torch.float64))
    assert scale.item() == pytest.approx(((d * s.diag()).sum() / x.square().sum(1).mean()).item())
    assert torch.allclose(turn[0], u @ s @ vh, atol=1e-6)
    noisy = align_cameras(inputs[0], inputs[1] + 0.02 * torch.randn(1, 6, 3), *inputs[2:])
    assert noisy[0].item() == pytest.approx(0.4, rel=0.05) and torch.linalg.det(noisy[1]).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="too close together"):
        align_cameras(inputs[0], inputs[1], inputs[2], inputs[3] * 0 + 1)
    with pytest.raises(ValueError, match="too close together"):
        align_cameras(*(x[:, :1] for x in inputs))


def test_positions_from_vggts_own_points():
    model = make(positions=PositionsConfig("mlp_pe", width=16, source="vggt"), tap_layers=(1, -1)).eval()
    with torch.no_grad():  # an untrained camera head puts all cameras in one place
        model.encoder.camera_head.pose_branch.fc2.weight.normal_()
    batch = make_batch(model, (3, 3), (9, 6))
    with pytest.raises(ValueError, match="source is vggt, whose points belong to no known frame"):
        model(**batch)
    batch["has_geometry"][:] = True
    seen = []
    model.positions.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    expected = logits_of(model, batch)
    predictions = model.encoder(torch.stack(batch["pixel_values"]).float() / 255, heads=("camera", "depth"))
    poses = record_poses(torch.stack(batch["geometry_records"]))
    coordinates, _ = vggt_patch_coordinates(predictions, poses, (28, 42), 14)
    assert torch.allclose(seen[0], coordinates, atol=1e-4)
    far = [records.clone() for records in batch["geometry_records"]]
    for records in far:
        records[:, 9:12] *= 3  # the same room three times as large
    assert not torch.allclose(logits_of(model, {**batch, "geometry_records": far}), expected, atol=1e-5)
    model.train()(**batch).loss.backward()
    assert model.positions[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.encoder.camera_head.parameters())  # coordinates are data


# ---------------------------------------------------------------------------- encodings
def test_sine_positions_match_published_numbers():
    golden = [0.841471, 0.540302, 0.01, 0.99995, 0.909297, -0.416147, 0.019999, 0.9998]
    golden += [0.14112, -0.989992, 0.029995, 0.99955]
    coords = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(sin3d_encoding(coords, 12), torch.tensor(golden), atol=1e-6)
    for width, norm, padding in ((2560, 35.75, 1), (3584, 42.32, 2)):
        encoding = sin3d_encoding(coords, width)
        assert encoding.norm().item() == pytest.approx(norm, abs=0.01) and (encoding[-padding:] == 0).all()


def test_discrete_positions_and_masked_depth():
    class Echo(torch.nn.Module):
        def forward(self, coordinates):
            return coordinates

    coords, valid = torch.tensor([[1.0, 2.0, 3.0], [99.0, 0, 0]]), torch.tensor([True, False])
    out = encode_positions(Echo(), PositionsConfig(coordinates="discrete"), coords, valid)
    assert out.tolist() == [[160, 170, 80], [0, 0, 0]]
    with pytest.raises(ValueError, match="unknown 'rope'; known: base, sin3d_pe, mlp_pe"):
        build_positions(PositionsConfig(method="rope"), 8)
    assert build_positions(PositionsConfig(method="base"), 8) is None


@pytest.mark.parametrize("n_points", [2, 5, 9])
@pytest.mark.parametrize("dim", [64, 2560])
def test_several_points_are_encoded_side_by_side(n_points, dim):
    torch.manual_seed(0)
    coordinates = torch.randn(4, n_points, 3) * 3
    n = dim // (3 * n_points)
    alone = [sin3d_encoding(coordinates[:, i], 3 * n) for i in range(n_points)]
    expected = nn.functional.pad(torch.cat(alone, dim=-1), (0, dim - 3 * n * n_points))
    encoding = sin3d_encoding(coordinates, dim, n_points)
    assert encoding.shape == (4, dim) and torch.equal(encoding, expected)
    config = PositionsConfig("mlp_pe", "discrete", width=16, n_points=n_points)
    encoder = build_positions(config, dim)
    voxels = ((coordinates + torch.tensor([15.0, 15, 5])) / 0.1).round()
    voxels = torch.minimum(voxels, torch.tensor([300.0, 300, 100])).clamp(min=0)
    valid = torch.tensor([True, True, False, True])
    hidden = nn.functional.gelu(voxels.flatten(1) @ encoder[0].weight.T + encoder[0].bias)
    for layer in list(encoder)[2:]:
        hidden = layer(hidden)
    expected = hidden * valid[:, None]
    assert torch.allclose(encode_positions(encoder, config, coordinates, valid), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"expected \(4, {n_points}, 3\) with model.positions.n_points {n_points}"):
        encode_positions(encoder, config, coordinates[:, 0], valid)


def test_settings_of_positions_are_checked():
    for value in (3, 0, True):
        with pytest.raises(ValueError, match="n_points: expected one of 1, 2, 5, 9"):
            parse(PositionsConfig, {"n_points": value})
    with pytest.raises(ValueError, match="add_to: expected one of encoder, resampler, got 'llm'"):
        parse(PositionsConfig, {"add_to": "llm"})
    for value in (-0.1, 1.5):
        with pytest.raises(ValueError, match="model.positions.min_valid_share: expected 0 to 1"):
            build_positions(PositionsConfig(min_valid_share=value), 64)
    with pytest.raises(ValueError, match="position_encoding_dim: expected 0 or at least 27, got 26"):
        build_positions(PositionsConfig("sin3d_pe", n_points=9, position_encoding_dim=26), 64)


def test_base_is_the_model_without_positions():
    plain = make(positions=PositionsConfig("base"))
    assert plain.positions is None and not plain.needs_positions
    torch.manual_seed(3)
    tokens = torch.randn(1, 2, 5 + 6, 64)
    coordinates, valid = torch.randn(1, 2, 6, 3), torch.zeros(1, 2, 6, dtype=torch.bool)
    none_valid = encode_positions(build_positions(SETTINGS.positions, 64), SETTINGS.positions, coordinates, valid)
    resampler = plain.resampler
    assert torch.equal(resampler([tokens], 5, (2, 3)), resampler([tokens], 5, (2, 3), none_valid))


def test_one_patch_moves_the_logits_and_gradients_reach_the_encoding():
    for method in ("mlp_pe", "sin3d_pe"):
        model = make(positions=PositionsConfig(method, "discrete", width=16)).eval()
        batch = make_batch(model, (3,), (9,))
        batch["patch_valid"][0][:] = True
        before = logits_of(model, batch)
        batch["patch_coordinates"][0][1, 2] += 2.0
        assert (logits_of(model, batch) - before).abs().max() > 1e-6
        batch["patch_valid"][0][1, 2] = False
        masked = logits_of(model, batch)
        batch["patch_coordinates"][0][1, 2] = float("nan")  # no depth there: whatever stands there is not read
        assert torch.equal(logits_of(model, batch), masked)


def test_a_class_from_a_notebook_cell(tmp_path):
    try:

        @register_positions("height")
        class Height(nn.Module):
            def __init__(self, config, width):
                super().__init__()
                self.up = nn.Linear(1, width)

            def forward(self, coordinates):
                return self.up(coordinates[..., 2:])

        model = make(positions=PositionsConfig("height")).eval()
        batch = make_batch(model)
        model.save_pretrained(tmp_path / "saved")
        loaded = RoomPlanVLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))
        batch["patch_coordinates"] = [c + torch.tensor([5.0, -5.0, 0]) for c in batch["patch_coordinates"]]
        assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))  # it reads heights alone
    finally:
        positions_module.METHODS.pop("height", None)
    with pytest.raises(ValueError, match="unknown 'height'; known: base, sin3d_pe, mlp_pe; .*register_positions"):
        RoomPlanVLM.from_pretrained(tmp_path / "saved")


def test_position_encoding_dim_is_the_width_of_what_it_is_added_to(tmp_path):
    assert build_positions(PositionsConfig("sin3d_pe"), 64)(torch.zeros(5, 3)).shape == (5, 64)
    model = make(positions=PositionsConfig("sin3d_pe", position_encoding_dim=12)).eval()
    projection = model.positions.projection
    assert projection.weight.shape == (64, 12)
    coordinates = torch.tensor([[1.0, 2.0, 3.0]])
    golden = [0.841471, 0.540302, 0.01, 0.99995, 0.909297, -0.416147, 0.019999, 0.9998, 0.14112, -0.989992, 0.029995]
    expected = projection(torch.tensor([[*golden, 0.99955]]))
    assert torch.allclose(model.positions(coordinates), expected, atol=1e-5)
    grouped = {id(p) for group in parameter_groups(model, RunConfig()) for p in group["params"]}
    assert id(projection.weight) in grouped
    model(**make_batch(model)).loss.backward()
    assert projection.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(RoomPlanVLM.from_pretrained(tmp_path / "saved").positions.projection.weight, projection.weight)
    with pytest.raises(ValueError, match="position_encoding_dim: expected 0 or at least 3"):
        build_positions(PositionsConfig("sin3d_pe", position_encoding_dim=2), 64)


@pytest.mark.parametrize("method", ["mlp_pe", "sin3d_pe"])
@pytest.mark.parametrize("n_points", [1, 2])
def test_sums_of_encodings_equal_encodings_that_are_summed(method, n_points):
    torch.manual_seed(0)
    config = PositionsConfig(method, width=16, n_points=n_points)
    encoder = build_positions(config, 24).double()
    coordinates = torch.randn(2, 3, 4, *((n_points,) if n_points > 1 else ()), 3, dtype=torch.float64)
    valid, shares = torch.rand(2, 3, 4) > 0.3, torch.rand(2, 5, 12, dtype=torch.float64)
    expected = shares @ encode_positions(encoder, config, coordinates, valid).flatten(1, 2)
    sums = encode_positions(encoder, config, coordinates, valid, shares)
    assert sums.shape == (2, 5, 24) and torch.allclose(sums, expected, atol=1e-6)
    weights = list(encoder.parameters())
    found = [torch.autograd.grad(y.square().sum(), weights) for y in (sums, expected)] if weights else []
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_encodings_are_computed_in_float32():
    coordinates = torch.tensor([157.3, 203.9, 77.7])
    exact = sin3d_encoding(coordinates.double(), 2560)
    assert (sin3d_encoding(coordinates, 2560) - exact).abs().max() < 1e-4
    assert (sin3d_encoding(coordinates.bfloat16(), 2560).float() - exact).abs().max() > 0.05  # so coordinates stay wide
    model = make(positions=PositionsConfig("sin3d_pe")).eval()
    batch = make_batch(model)
    wide = logits_of(model, batch)
    seen = []
    model.positions.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    model.bfloat16()
    narrow = logits_of(model, batch)
    assert set(seen) == {(torch.float32, torch.float32)} and (narrow.float() - wide).abs().max() < 0.1


@pytest.mark.parametrize("source", ["depth", "vggt"])
def test_autocast_leaves_positions_alone(source):
    model = make(positions=PositionsConfig("mlp_pe", width=16, source=source)).eval()
    if source == "vggt":
        with torch.no_grad():  # an untrained camera head puts all cameras in one place
            model.encoder.camera_head.pose_branch.fc2.weight.normal_()
    batch = make_batch(model, (3,), (9,))
    seen = []
    model.positions.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    coordinates, encoding = seen[0]
    assert encoding.dtype == torch.float32 and torch.equal(encoding, model.positions(coordinates))
    rounded = coordinates.bfloat16().float()
    assert (rounded - coordinates).abs().max() > 1e-3  # what autocast would have made of them


# ---------------------------------------------------------------------------- in the model
@pytest.mark.parametrize("n_points", [1, 9])
@pytest.mark.parametrize("add_to", ["encoder", "resampler"])
@pytest.mark.parametrize("method", ["sin3d_pe", "mlp_pe"])
def test_every_method_at_every_place(method, add_to, n_points, tmp_path):
    """LoRA, several views counts in a batch, gradient checkpointing, files and generation together."""
    model = make(
        positions=PositionsConfig(method, width=16, position_encoding_dim=36, n_points=n_points, add_to=add_to),
        language_model=LanguageModelConfig(config=QWEN_FIELDS, lora=LORA),
        freeze_vggt=True,
        tap_layers=(1, -1),
    )
    shake(model)

    def batch_of(**options):
        batch = make_batch(model, **options)
        if n_points > 1:
            batch["patch_coordinates"] = [torch.randn(*c.shape[:2], n_points, 3) for c in batch["patch_coordinates"]]
        return batch

    batch = batch_of()
    # where it is added, by hand for the first set of views
    model.eval()
    pixels = batch["pixel_values"][0][None].float() / 255
    taps, start = model.encoder.aggregator(pixels, tap_layers=(1, -1))
    config = dataclasses.replace(model.settings.positions)
    encoding = encode_positions(model.positions, config, batch["patch_coordinates"][0], batch["patch_valid"][0])[None]
    if add_to == "encoder":
        raw = [torch.cat([tap[:, :, :start], tap[:, :, start:] + encoding], dim=2) for tap in taps]
        expected = model.resampler(raw, start, (2, 3))
    else:
        expected = model.resampler(taps, start, (2, 3), encoding)
    views = split(batch)[3]
    assert torch.allclose(model.encode_views(**views)[0, : expected.shape[1]], expected[0], atol=1e-5)
    assert model.sets_with_positions.tolist() == [True, True]

    # gradients, with and without checkpoints
    model.train()
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all(plain[f"positions.{name}"].abs().sum() > 0 for name, _ in model.positions.named_parameters())
    assert any("lora_B" in name for name in plain)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    for name, gradient in plain.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6)

    # files
    model.eval().save_pretrained(tmp_path / "saved")
    loaded = RoomPlanVLM.from_pretrained(tmp_path / "saved")
    before = logits_of(model, batch)
    assert loaded.settings == model.settings and torch.equal(logits_of(loaded, batch), before)
    batch["patch_valid"][0][1, 2] = True
    shown = logits_of(loaded, batch)
    batch["patch_coordinates"][0][1, 2] += 2.0
    assert (logits_of(loaded, batch) - shown)[0].abs().max() > 1e-6
    assert torch.allclose(logits_of(loaded, batch)[1], before[1], atol=1e-6)  # no other sample's coordinates

    # generation
    ids, mask, index, views = split(batch_of(left=True))
    options = dict(max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    generated = loaded.generate(
        ids, mask, index, views=views, output_logits=True, return_dict_in_generate=True, **options
    )
    for step in range(2):
        with torch.no_grad():
            logits = loaded(ids, mask, scene_index=index, **views).logits[:, -1]
        assert torch.allclose(logits, generated.logits[step], atol=1e-4)
        ids = torch.cat([ids, generated.sequences[:, step : step + 1]], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)


def test_both_places_are_one_without_a_norm_and_differ_with_it():
    for kind, equal in (("reference", True), ("perceiver", False)):
        logits = []
        for add_to in ("encoder", "resampler"):
            resampler = ResamplerConfig(4, 2, 32, 64, 16, max_views=8, kind=kind)
            model = make(positions=PositionsConfig("sin3d_pe", add_to=add_to), resampler=resampler).eval()
            logits.append(logits_of(model, make_batch(model)))
        assert torch.allclose(*logits, atol=1e-6) == equal


# ---------------------------------------------------------------------------- in a run
def parts_of(config):
    """(model, collator, training samples) of a run that is not started."""
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer)
    return model, make_collator(model, tokenizer, config.data), samples


def with_positions(config, **values):
    positions = dataclasses.replace(config.model.positions, **values)
    return change(config, "model", positions=positions)


@pytest.mark.parametrize("n_points", [1, 2, 9])
def test_the_collator_follows_the_settings(tiny_config, monkeypatch, n_points):
    load_depth = collator_module.load_depth

    def with_holes(*stored):
        depth = load_depth(*stored).copy()
        depth[::7, ::5] = 0  # some pixels of every patch
        depth[: len(depth) // 2, 0] = 0
        return depth

    monkeypatch.setattr(collator_module, "load_depth", with_holes)
    for share in (0.0, 1.0):
        model, collator, samples = parts_of(with_positions(tiny_config, n_points=n_points, min_valid_share=share))
        batch = collator(samples[:1])
        (coordinates,), (valid,) = batch["patch_coordinates"], batch["patch_valid"]
        points = (n_points, 3) if n_points > 1 else (3,)
        assert coordinates.shape == (*valid.shape, *points) and coordinates.dtype == torch.float32
        assert valid.all() if share == 0 else not valid.any()
        assert torch.isfinite(model(**batch).loss) and model.sets_with_positions.tolist() == [share == 0]
        if n_points == 2 and share == 0:
            assert (coordinates[..., 0, :] < coordinates[..., 1, :]).any() and not (
                coordinates[..., 0, :] > coordinates[..., 1, :]
            ).any()


def test_a_run_tells_the_share_of_samples_with_positions(tiny_config, tmp_path, monkeypatch, capsys):
    config = change(tiny_config, "training", max_steps=5, group_size=2, log_every_steps=2, eval_every_steps=5)
    scenes = sorted({sample.record["scene_id"] for sample in load_samples(config.data.train_paths)})
    lost = scenes[::2]  # scenes whose depth sensor was off
    load_depth = collator_module.load_depth
    monkeypatch.setattr(
        collator_module,
        "load_depth",
        lambda path, *how: load_depth(path, *how) * (not any(s in str(path) for s in lost)),
    )
    model, collator, samples = parts_of(config)
    loader = RoomPlanTrainer(config, model, collator, samples, []).get_train_dataloader()
    shown = [[samples[i].record["scene_id"] not in lost for i, _ in batch] for batch in loader.batch_sampler]
    steps = (shown[:1], shown[1:2], shown[2:4], shown[4:5])  # logged after steps 1, 2, 4 and the last
    expected = [round(float(np.mean(sum(batches, []))), 4) for batches in steps]
    assert 0 < np.mean(expected) < 1
    entries = read_metrics(train(config) / "metrics.jsonl")
    assert [e["samples_with_positions"] for e in entries if "loss" in e] == expected
    assert [e["samples_with_positions"] for e in entries if "eval_loss" in e] == [1.0]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(printed) == 5 and all("3D positions" in line for line in printed)
    assert f"3D positions {expected[0]:.0%}" in printed[0] and "100%" in printed[-1]

    base = with_positions(dataclasses.replace(config, run_name="base"), method="base")
    entries = read_metrics(train(base) / "metrics.jsonl")
    assert entries and not any("samples_with_positions" in entry for entry in entries)
    assert "3D positions" not in capsys.readouterr().out.split("step ", 1)[1]


def test_gradient_checkpointing_is_a_setting_that_changes_no_number(tiny_config):
    model, collator, samples = parts_of(tiny_config)
    other = copy.deepcopy(model)
    batch = collator(samples[::40][:6])
    results = []
    for part, checkpointing in ((model, False), (other, True)):
        config = change(tiny_config, "training", gradient_checkpointing="always" if checkpointing else "never")
        RoomPlanTrainer(config, part, collator, samples, [])
        assert part.is_gradient_checkpointing == checkpointing
        assert part.encoder.aggregator.config.gradient_checkpointing == checkpointing
        calls = []
        part.resampler.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loss = part.train()(**batch).loss
        loss.backward()
        assert len(calls) == 1 + checkpointing  # once more in the backward pass
        results.append((loss.item(), {n: p.grad for n, p in part.named_parameters() if p.grad is not None}))
    (loss, gradients), (again, recomputed) = results
    assert loss == again and gradients.keys() == recomputed.keys()
    assert all(torch.allclose(gradients[name], recomputed[name], rtol=1e-5, atol=1e-7) for name in gradients)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize("n_points", [1, 9])
def test_thirty_two_large_depth_maps_fit_in_memory(n_points):
    """32 depth maps of 480 x 640 to encodings of width 2560: below 2 GiB more (pixel by pixel it takes 131 GiB)."""
    code = f"""
import re, numpy as np, torch
from pathlib import Path
from roomplan_lib.config import PositionsConfig
from roomplan_lib.geometry import unproject
from roomplan_lib.model.positions import build_positions, encode_positions
from roomplan_lib.training.collator import patch_coordinates
def peak():
    status = Path("/proc/self/status").read_text()  # getrusage would begin with the peak of the parent process
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) / 2**20  # GiB
depth = np.random.default_rng(0).uniform(1, 3, (32, 480, 640)).astype(np.float32)
before = peak()
K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
pairs = [patch_coordinates(*unproject(d, K, np.eye(4)), (24, 32), {n_points}) for d in depth]
coordinates, valid = (torch.tensor(np.stack(x)) for x in zip(*pairs))
config = PositionsConfig("sin3d_pe", "discrete", n_points={n_points})
encoding = encode_positions(build_positions(config, 2560), config, coordinates.float(), valid)
assert encoding.shape == (32, 768, 2560)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    gibibytes = float(result.stdout)
    assert 0.2 < gibibytes < 1.8  # the encoding alone has 0.23
