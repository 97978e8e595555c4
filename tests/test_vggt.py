"""Our VGGT against the published numbers, and the properties that the rest of the workbench relies on."""

import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from roomplan_lib.model.vggt import (
    VGGT,
    Aggregator,
    VGGTConfig,
    cameras_to_pose_encoding,
    load_vggt,
    load_vggt_state_dict,
    pose_encoding_to_cameras,
    unproject_depth,
)
from roomplan_lib.model.vggt.layers import _rotate, rope_2d

PARITY = Path(__file__).parents[2] / "shared" / "parity"
needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason=f"no reference outputs of the published VGGT in {PARITY}")
TINY = VGGTConfig(
    img_size=56,
    embed_dim=32,
    depth=4,
    num_heads=4,
    mlp_ratio=2,
    layer_scale_init=1.0,
    patch_embed_depth=2,
    patch_embed_num_heads=2,
    head_layers=(0, 1, 2, 3),
    dpt_features=16,
    dpt_out_channels=(8, 8, 16, 16),
    camera_trunk_depth=1,
    camera_num_heads=2,
)


@pytest.fixture
def tiny() -> VGGT:
    torch.manual_seed(0)
    return VGGT(TINY).eval()


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def fill():
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes(name: str) -> dict[str, list[int]]:
    return json.loads((PARITY / f"vggt_{name}_state_dict.json").read_text())


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> None:
    make = fill().weight
    for key, tensor in model.state_dict().items():
        tensor.copy_(torch.from_numpy(make(key, tensor.shape)))


def assert_matches_reference(outputs: dict[str, torch.Tensor], name: str) -> None:
    reference = load_file(PARITY / f"vggt_{name}_reference.safetensors")
    assert outputs.keys() >= reference.keys()
    for key, expected in reference.items():
        got = outputs[key][0]
        assert got.shape == expected.shape and got.dtype == expected.dtype, key
        error = (got - expected).norm() / expected.norm()
        assert error < 1e-5, f"{key}: relative error {error:.1e}"


# Against the published code.


@needs_parity
def test_aggregator_matches_published_small():
    config = VGGTConfig(
        embed_dim=384,
        depth=2,
        num_heads=6,
        patch_embed_depth=12,
        patch_embed_num_heads=6,
        enable_camera=False,
        enable_depth=False,
        enable_point=False,
    )
    aggregator = Aggregator(config).eval()
    assert {key: list(value.shape) for key, value in aggregator.state_dict().items()} == shapes("small")
    fill_weights(aggregator)
    with torch.no_grad():
        tokens, patch_token_start = aggregator(torch.from_numpy(fill().images("images", 3, 56, 84)))
    assert patch_token_start == 5
    assert_matches_reference({f"tokens_{i:02d}": value for i, value in enumerate(tokens)}, "small")


@needs_parity
def test_keys_and_shapes_are_those_of_the_published_checkpoint():
    with torch.device("meta"):
        model = VGGT(VGGTConfig())
    published = {key: value for key, value in shapes("1b").items() if not key.startswith("track_head.")}
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published


@needs_parity
@pytest.mark.slow
def test_vggt_1b_matches_published():
    """Half a minute and 6 GB."""
    with torch.device("meta"):
        model = VGGT(VGGTConfig())
    model.to_empty(device="cpu").eval()
    fill_weights(model)
    images = torch.from_numpy(fill().images("images", 3, 56, 84))
    with torch.no_grad():
        tokens, _ = model.aggregator(images, model.config.head_layers)
        outputs = model(images)
    outputs |= {f"tokens_{i:02d}": value for i, value in zip(model.config.head_layers, tokens, strict=True)}
    assert_matches_reference(outputs, "1b")


@needs_parity
def test_pose_encoding_matches_published():
    reference = load_file(PARITY / "pose_encoding_reference.safetensors")
    world_to_camera, K = pose_encoding_to_cameras(reference["pose_enc"], (56, 84))
    torch.testing.assert_close(world_to_camera, reference["extrinsics"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(K, reference["intrinsics"], atol=1e-5, rtol=1e-5)


# Cameras.


def test_pose_encoding_round_trip():
    generator = torch.Generator().manual_seed(0)
    encoding = torch.randn(500, 9, generator=generator)
    # Half turns about each axis, where w = 0 and three of the four ways to read a quaternion break down.
    encoding[:4, 3:7] = torch.eye(4)
    encoding[:, 3:7] /= encoding[:, 3:7].norm(dim=-1, keepdim=True)
    encoding[:, 3:7] *= torch.where(encoding[:, 6:7] < 0, -1, 1)
    encoding[:, 7:] = 0.2 + 2 * torch.rand(500, 2, generator=generator)
    encoding = encoding.view(5, 100, 9)
    world_to_camera, K = pose_encoding_to_cameras(encoding, (392, 518))
    rotation = world_to_camera[..., :3]
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(5, 100, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(5, 100))
    torch.testing.assert_close(cameras_to_pose_encoding(world_to_camera, K, (392, 518)), encoding, atol=2e-5, rtol=1e-4)


def test_pose_encoding_of_a_known_camera():
    """A quarter turn about z, 90 degrees across 80 columns, 2 * atan(1/2) down 40 rows."""
    half = math.sqrt(0.5)
    encoding = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, half, half, 2 * math.atan(0.5), math.pi / 2])
    world_to_camera, K = pose_encoding_to_cameras(encoding, (40, 80))
    torch.testing.assert_close(
        world_to_camera, torch.tensor([[0.0, -1, 0, 1], [1, 0, 0, 2], [0, 0, 1, 3]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(K, torch.tensor([[40.0, 0, 40], [0, 40, 20], [0, 0, 1]]))


def test_unprojected_depth_projects_back_to_its_pixels():
    generator = torch.Generator().manual_seed(0)
    encoding = torch.randn(2, 3, 9, generator=generator)
    encoding[..., 7:] = 1.0
    world_to_camera, K = pose_encoding_to_cameras(encoding, (5, 7))
    K[..., 0, 2] += 0.75  # a principal point off the centre
    depth = 0.5 + torch.rand(2, 3, 5, 7, generator=generator)
    points = unproject_depth(depth, world_to_camera, K)
    homogeneous = torch.cat((points, torch.ones(2, 3, 5, 7, 1)), dim=-1)
    projected = torch.einsum("bvij,bvjk,bvhwk->bvhwi", K, world_to_camera, homogeneous)
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    expected = torch.stack((columns, rows, torch.ones(5, 7)), dim=-1) * depth[..., None]
    torch.testing.assert_close(projected, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(unproject_depth(depth[..., None], world_to_camera, K), points)
    with pytest.raises(ValueError, match="leading axes"):
        unproject_depth(depth[0], world_to_camera, K)


# The aggregator.


def test_rotary_embedding_sees_offsets_alone():
    rope = rope_2d((6, 7), 2, 16, 100.0, torch.device("cpu"))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double()
    turned_q, turned_k = (_rotate(x.expand(1, 1, 44, 16), rope)[0, 0] for x in (q, k))
    assert torch.equal(turned_q[:2], q.expand(2, 16))  # special tokens are not turned
    products = (turned_q[2:] @ turned_k[2:].T).view(6, 7, 6, 7)
    torch.testing.assert_close(products[1, 2, 4, 3], products[2, 5, 5, 6], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products[4, 4, 3, 1], products[5, 5, 4, 2], atol=1e-5, rtol=1e-5)
    assert (products[1, 2, 4, 3] - products[1, 2, 3, 4]).abs() > 1e-3


@torch.no_grad()
def test_tapped_layers_equal_the_full_run_and_later_blocks_do_not_run(tiny):
    images = pictures(1, 3, 3, 28, 42)
    everything, start = tiny.aggregator(images)
    assert len(everything) == 4 and start == 5
    assert everything[0].shape == (1, 3, 5 + 2 * 3, 64)
    ran = []
    for index, block in enumerate(tiny.aggregator.global_blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    tapped, _ = tiny.aggregator(images, [2, -4])
    assert len(tapped) == 2 and torch.equal(tapped[0], everything[2]) and torch.equal(tapped[1], everything[0])
    assert ran == [0, 1, 2]
    for layers in ([], [4], [-5]):
        with pytest.raises(ValueError, match="tap_layers"):
            tiny.aggregator(images, layers)


@torch.no_grad()
def test_permuting_later_views_permutes_the_outputs(tiny):
    images, order = pictures(1, 4, 3, 28, 42), [0, 3, 1, 2]
    plain, permuted = (tiny.aggregator(x, [-1])[0][0] for x in (images, images[:, order]))
    torch.testing.assert_close(permuted, plain[:, order], atol=1e-5, rtol=1e-5)
    moved = tiny.aggregator(images[:, [1, 0, 2, 3]], [-1])[0][0]
    assert (moved[:, [1, 0, 2, 3]] - plain).abs().max() > 1e-3  # another reference view is another scene frame


@torch.no_grad()
def test_every_view_reaches_the_first_views_tokens(tiny):
    images = pictures(1, 3, 3, 28, 42)
    changed = images.clone()
    changed[:, -1] = 1 - changed[:, -1]
    before, after = (tiny.aggregator(x, [-1])[0][0][:, 0] for x in (images, changed))
    assert (before - after).abs().mean() > 1e-4


@torch.no_grad()
def test_a_batch_of_two_equals_two_singles(tiny):
    images = pictures(2, 3, 3, 28, 56)
    both, singles = tiny(images), [tiny(images[i]) for i in range(2)]  # singles without the batch axis
    assert {key: tuple(value.shape) for key, value in both.items()} == {
        "pose_enc": (2, 3, 9),
        "depth": (2, 3, 28, 56, 1),
        "depth_conf": (2, 3, 28, 56),
        "world_points": (2, 3, 28, 56, 3),
        "world_points_conf": (2, 3, 28, 56),
    }
    for key, value in both.items():
        torch.testing.assert_close(value, torch.cat([single[key] for single in singles]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_heads_read_only_what_they_need(tiny):
    images, calls = pictures(1, 5, 3, 28, 28), []
    for name in ("camera_head", "depth_head", "point_head"):
        getattr(tiny, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    everything = tiny(images)
    calls.clear()
    depth = tiny(images, heads=["depth"])
    assert calls == ["depth_head"] and list(depth) == ["depth", "depth_conf"]
    assert torch.equal(depth["depth"], everything["depth"])
    with pytest.raises(ValueError, match="track"):
        tiny(images, heads=["track"])
    chunked = VGGT(dataclasses.replace(TINY, frames_chunk_size=2)).eval()
    chunked.load_state_dict(tiny.state_dict())
    torch.testing.assert_close(chunked(images)["world_points"], everything["world_points"], atol=1e-6, rtol=1e-5)


def test_pictures_of_other_shapes_are_refused(tiny):
    for shape, message in (
        ((1, 2, 3, 30, 28), "height 30"),
        ((1, 2, 4, 28, 28), "floating-point"),
        ((3, 28, 28), "B, S"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.aggregator(torch.zeros(shape))
    with pytest.raises(ValueError, match="uint8"):
        tiny(torch.zeros(1, 1, 3, 28, 28, dtype=torch.uint8))


@torch.no_grad()
def test_bf16_weights_give_bf16_tokens_and_fp32_heads(tiny):
    images = pictures(1, 2, 3, 28, 42)
    exact, exact_tokens = tiny(images), tiny.aggregator(images, [-1])[0][0]
    half = tiny.to(torch.bfloat16)
    tokens, predictions = half.aggregator(images, [-1])[0][0], half(images)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - exact_tokens).norm() / exact_tokens.norm() < 0.03
    for key, value in predictions.items():
        assert value.dtype == torch.float32
        assert (value - exact[key]).norm() / exact[key].norm() < 0.1, key
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.float().aggregator(images, [-1])[0][0].dtype == torch.float32


@torch.no_grad()
def test_aggregator_compiles_without_graph_breaks(tiny):
    images = pictures(1, 2, 3, 28, 42)
    compiled = torch.compile(tiny.aggregator, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images, [1, 3])[0][1], tiny.aggregator(images)[0][3])


# Training.


def training_loss(model: VGGT, images: torch.Tensor) -> torch.Tensor:
    tokens, start = model.aggregator(images)
    size_hw = tuple(images.shape[-2:])
    maps = [*model.depth_head(tokens, start, size_hw), *model.point_head(tokens, start, size_hw)]
    return sum((value - 0.7).square().mean() for value in maps + model.camera_head(tokens[-1]))


def test_tiny_trains_with_gradients_everywhere(tiny):
    tiny.train()
    images = pictures(2, 2, 3, 28, 42)
    first = training_loss(tiny, images)
    first.backward()
    without = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == ["aggregator.patch_embed.mask_token"]
    optimizer = torch.optim.Adam(tiny.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        loss = training_loss(tiny, images)
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first


def test_gradient_checkpointing_changes_no_gradient(tiny):
    images = pictures(1, 2, 3, 28, 42)
    again = VGGT(dataclasses.replace(TINY, gradient_checkpointing=True))
    again.load_state_dict(tiny.state_dict())
    calls = []
    again.aggregator.frame_blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    for model in (tiny.train(), again.train()):
        training_loss(model, images).backward()
    assert len(calls) == 2  # forward, and once more in the backward pass
    for (name, expected), got in zip(tiny.named_parameters(), again.parameters(), strict=True):
        if expected.requires_grad:
            torch.testing.assert_close(got.grad, expected.grad, msg=name)


def test_frozen_stays_frozen_and_in_eval_mode(tiny):
    wrapper = torch.nn.ModuleDict({"encoder": tiny.train(), "other": torch.nn.Linear(1, 1)})
    assert tiny.aggregator.training
    assert tiny.freeze() is tiny
    wrapper.train()
    assert wrapper["other"].training
    assert not any(module.training for module in tiny.modules())
    assert not any(parameter.requires_grad for parameter in tiny.parameters())
    assert not tiny(pictures(1, 1, 3, 28, 28))["depth"].requires_grad


# Configuration and checkpoints.


def test_config_errors_name_the_field():
    assert VGGTConfig(**json.loads(json.dumps(dataclasses.asdict(TINY)))) == TINY
    for name, value in (
        ("img_size", 60),
        ("embed_dim", 30),
        ("depth", 0),
        ("depth", 2.0),
        ("head_layers", (0, 1, 2, 4)),
        ("head_layers", (0, 1, 2)),
        ("dpt_out_channels", (6, 8, 16, 16)),
        ("enable_depth", 1),
        ("mlp_ratio", "4"),
    ):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(TINY, **{name: value})


def test_state_dict_wrappers_and_unbuilt_heads(tiny):
    weights = dict(tiny.state_dict())
    small = VGGT(dataclasses.replace(TINY, enable_depth=False, enable_camera=False))
    wrapped = {"module." + key: value for key, value in (weights | {"track_head.x": torch.zeros(1)}).items()}
    ignored = load_vggt_state_dict(small, {"epoch": 3, "model": {"state_dict": wrapped}})
    assert ignored == ["camera_head", "depth_head", "track_head"]
    for key, value in small.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_weights_that_do_not_fit_are_listed_and_nothing_is_loaded(tiny):
    weights = {key: torch.zeros_like(value) for key, value in tiny.state_dict().items()}
    before = tiny.aggregator.camera_token.clone()
    del weights["depth_head.norm.bias"]
    weights["aggregator.surprise"] = torch.zeros(1)
    weights["point_head.norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        load_vggt_state_dict(tiny, weights)
    for text in (
        "1 missing: depth_head.norm.bias",
        "1 unexpected: aggregator.surprise",
        "point_head.norm.weight",
        "[64]",
    ):
        assert text in str(error.value)
    assert torch.equal(tiny.aggregator.camera_token, before)


def test_every_weight_format_loads(tiny, tmp_path):
    weights, images = tiny.state_dict(), pictures(1, 2, 3, 28, 42)
    (tmp_path / "sharded").mkdir()
    torch.save({"model": weights}, tmp_path / "model.pt")
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(TINY) | {"enable_track": True}))
    names = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(weights)}
    for name in set(names.values()):
        save_file({key: weights[key] for key in weights if names[key] == name}, tmp_path / "sharded" / name)
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with torch.no_grad():
        expected = tiny(images)["depth"]
        for path in (tmp_path, tmp_path / "model.pt", tmp_path / "model.safetensors", tmp_path / "sharded"):
            model = load_vggt(path, TINY if path.name == "sharded" else None)
            assert not model.training and torch.equal(model(images)["depth"], expected)
    (tmp_path / "sharded" / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match="shards missing.*part-1.safetensors"):
        load_vggt(tmp_path / "sharded", TINY)
    with pytest.raises(ValueError, match="missing: aggregator"):  # tiny weights are not VGGT-1B's
        load_vggt(tmp_path / "model.pt", VGGTConfig())


class Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_bad_weight_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_vggt(tmp_path / "nowhere.pt", TINY)
    with pytest.raises(ValueError, match="safetensors"):
        load_vggt(tmp_path, TINY)
    torch.save({"model": Payload(f"touch {tmp_path}/ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt.*never run"):
        load_vggt(tmp_path / "evil.pt", TINY)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ValueError, match="cut.safetensors"):
        load_vggt(tmp_path / "cut.safetensors", TINY)
