"""Depth fused into meshes, meshes drawn without a screen, and where a model looks and how deep it thinks things are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from roomplan_lib import viz
from roomplan_lib.config import ResamplerConfig, load_run_config
from roomplan_lib.geometry import look_at
from roomplan_lib.model.attention import attention_weights, resampler_attention
from roomplan_lib.model.own_depth import own_depth
from roomplan_lib.model.positions import vggt_patch_coordinates
from roomplan_lib.model.resampler import Attention
from roomplan_lib.model.vggt import VGGT, VGGTConfig
from roomplan_lib.samples.prepare import scene_record
from roomplan_lib.samples.views import choose_view_sets
from roomplan_lib.scenes import open_scene
from roomplan_lib.viz.meshes import BACKGROUND, Mesh, cut_above, read_mesh

o3d = pytest.importorskip("open3d")
PROJECT = Path(__file__).parents[1]
VOXEL = 0.02  # metres


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A procedural room: its pictures and its true mesh come from one model of it."""
    from roomplan_lib.scenes.rooms import write_rooms

    return open_scene(write_rooms(tmp_path_factory.mktemp("room"), 1, seed=2, num_poses=8, progress=False)[0])


@pytest.fixture(scope="module")
def truth(room):
    return viz.scene_mesh(room)


def distances(points, mesh):
    """Metres from points to the nearest point of a mesh."""
    caster = o3d.t.geometry.RaycastingScene(nthreads=1)
    triangles = np.ascontiguousarray(mesh.triangles, np.uint32)
    caster.add_triangles(o3d.core.Tensor(mesh.vertices), o3d.core.Tensor(triangles))
    return caster.compute_distance(o3d.core.Tensor(np.ascontiguousarray(points, np.float32)), nthreads=1).numpy()


# Fusion ---------------------------------------------------------------------------------------------------------------


def test_fused_depth_lies_on_the_true_mesh(room, truth):
    mesh = viz.fuse_scene(room, voxel_size=VOXEL)
    error = distances(mesh.vertices, truth)
    assert np.median(error) < 0.002 and np.percentile(error, 90) < VOXEL  # 5 mm with pixel centres half a pixel off
    sides = np.linalg.norm(mesh.vertices[mesh.triangles] - mesh.vertices[mesh.triangles[:, [1, 2, 0]]], axis=-1)
    assert 0.3 * VOXEL < np.median(sides) < 1.5 * VOXEL
    eye = np.mean([view.camera_to_world[:3, 3] for view in room.views], axis=0)
    outwards = mesh.vertices[mesh.triangles].mean(axis=1) - eye
    assert ((mesh.normals * outwards).sum(axis=1) < 0).mean() > 0.9  # surfaces face those who saw them


def test_fused_colours_are_the_pictures(room):
    view = room.views[0]
    mesh = viz.fuse_scene(room, [view], voxel_size=VOXEL)
    homogeneous = np.column_stack([mesh.vertices, np.ones(len(mesh.vertices))]) @ np.linalg.inv(view.camera_to_world).T
    pixels = homogeneous[:, :3] @ view.K.T
    u, v = np.round(pixels[:, :2] / pixels[:, 2:]).astype(int).T
    inside = (u > 2) & (v > 2) & (u < view.width - 3) & (v < view.height - 3)
    difference = np.abs(view.load_rgb()[v[inside], u[inside]].astype(int) - mesh.colors[inside])
    assert inside.sum() > 2000 and np.median(difference) <= 4 and np.percentile(difference, 80) < 30


def test_far_and_missing_depth_is_left_out(room):
    near = viz.fuse_scene(room, voxel_size=0.05, max_depth=1.5)
    centers = np.array([view.camera_to_world[:3, 3] for view in room.views])
    reach = np.linalg.norm(near.vertices[:, None] - centers, axis=-1).min(axis=1)
    assert reach.max() < 1.5 * np.sqrt(1 + 0.62**2 + 0.47**2) + 0.2  # depth is along z, corners are farther
    view = room.views[0]
    depth = view.load_depth()
    holed = depth.copy()
    holed[:, : view.width // 2] = np.nan
    args = [view.load_rgb()], [view.K], [view.camera_to_world]
    both = [viz.fuse_depth([d], *args, voxel_size=0.05) for d in (depth, holed)]
    assert 0.2 * len(both[0]) < len(both[1]) < 0.8 * len(both[0])


def test_bad_depth_and_settings_are_named(room):
    view = room.views[0]
    depth, rgb = view.load_depth(), view.load_rgb()
    args = [view.K], [view.camera_to_world]
    with pytest.raises(ValueError, match="is depth in metres"):
        viz.fuse_depth([depth * 1000], [rgb], *args)
    with pytest.raises(ValueError, match="view 0: depth of"):
        viz.fuse_depth([depth], [rgb[:-1]], *args)
    with pytest.raises(ValueError, match="0 < voxel_size < max_depth"):
        viz.fuse_depth([depth], [rgb], *args, voxel_size=0.0)
    with pytest.raises(ValueError, match="as many pictures"):
        viz.fuse_depth([depth, depth], [rgb], *args)
    with pytest.raises(ValueError, match=f"{view.view_id} has no pose or no depth"):
        viz.fuse_scene(room, [replace(view, depth_path=None)])


# Meshes ---------------------------------------------------------------------------------------------------------------


def test_rendered_mesh_has_the_sensors_depth_and_the_pictures_colours(room, truth):
    view = room.views[1]
    rgb, depth = viz.render_mesh(truth, view.K, view.camera_to_world, (view.width, view.height))
    assert rgb.shape == (view.height, view.width, 3) and rgb.dtype == np.uint8
    known = depth > 0
    assert known.mean() > 0.99 and np.median(np.abs(depth - view.load_depth())[known]) < 0.001
    likeness = np.corrcoef(rgb.reshape(-1).astype(float), view.load_rgb().reshape(-1).astype(float))[0, 1]
    assert likeness > 0.8


def test_a_triangle_is_seen_from_its_front_alone():
    mesh = Mesh(
        np.float32([[-1, 2, 0], [1, 2, 0], [0, 2, 1]]), np.uint8([[255, 0, 0]] * 3), np.int32([[0, 1, 2]])
    )  # counter-clockwise seen from -y
    K = np.array([[40.0, 0, 31.5], [0, 40, 23.5], [0, 0, 1]])
    front = look_at(np.array([0, 0, 0.4]), np.array([0, 2.0, 0.4]))
    rgb, depth = viz.render_mesh(mesh, K, front, (64, 48))
    assert depth[24, 32] == pytest.approx(2, abs=1e-5) and rgb[24, 32, 0] > 240 and (rgb[24, 32, 1:] == 0).all()
    assert depth[0, 0] == 0 and (rgb[0, 0] == BACKGROUND).all()
    assert (depth > 0).sum() == pytest.approx(40 * 40 / 4, rel=0.1)  # one square metre at two metres
    rgb, depth = viz.render_mesh(mesh, K, look_at(np.array([0, 4, 0.4]), np.array([0, 2.0, 0.4])), (64, 48))
    assert (depth == 0).all() and (rgb == BACKGROUND).all()


def test_a_scene_from_outside_fits_into_its_picture(room, truth):
    for azimuth, elevation, size in ((-1.0, 0.7, (320, 240)), (2.0, 0.3, (200, 300))):
        image = viz.render_scene(room, azimuth=azimuth, elevation=elevation, size=size)
        assert image.shape == (size[1], size[0], 3)
        drawn = (image != BACKGROUND).any(axis=-1)
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        assert rows[0] > 0 and rows[-1] < size[1] - 1 and columns[0] > 0 and columns[-1] < size[0] - 1
        assert max(np.ptp(rows) / size[1], np.ptp(columns) / size[0]) > 0.6
    low = cut_above(truth, 1.0)
    assert 0 < len(low) < len(truth)
    floor = np.percentile(truth.vertices[:, 2], 1)
    assert low.vertices[np.unique(low.triangles)][:, 2].max() < floor + 1.0


def test_sampled_points_lie_on_the_mesh_as_dense_everywhere(truth):
    surfels = viz.mesh_surfels(truth, 20_000)
    assert distances(surfels.points, truth).max() < 1e-4 and len(surfels) == 20_000
    assert np.array_equal(surfels.points, viz.mesh_surfels(truth, 20_000).points)
    area = np.linalg.norm(truth.normals, axis=1).sum() / 2
    floor = np.percentile(truth.vertices[:, 2], 1)
    half = truth.vertices[truth.triangles].mean(axis=1)[:, 2] < floor + 1.0
    share = np.linalg.norm(truth.normals[half], axis=1).sum() / 2 / area
    below = surfels.points[:, 2] < floor + 1.0
    assert below.mean() == pytest.approx(share, abs=0.05)
    assert np.allclose(np.linalg.norm(surfels.normals, axis=1), 1, atol=1e-5)


def test_meshes_are_read_moved_and_refused(room, truth, tmp_path):
    turn = np.eye(4)
    turn[:3, :3], turn[:3, 3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [1, 2, 3]
    there = read_mesh(room.mesh_path, turn)
    assert np.allclose(there.vertices, truth.vertices @ turn[:3, :3].T + turn[:3, 3], atol=1e-5)
    assert np.array_equal(there.triangles, truth.triangles) and truth.colors.std() > 5
    scannet = replace(room, metadata={"mesh_to_world": turn.tolist()})
    assert np.allclose(viz.scene_mesh(scannet).vertices, there.vertices)
    bad = tmp_path / "bad.ply"
    bad.write_text("ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n")
    with pytest.raises(ValueError, match="bad.ply: no mesh"):
        read_mesh(bad)
    with pytest.raises(ValueError, match="none.ply: file is missing"):
        read_mesh(tmp_path / "none.ply")
    with pytest.raises(ValueError, match="has no mesh file; fuse"):
        viz.scene_mesh(replace(room, mesh_path=None))


def test_a_mesh_stands_in_for_depth(room, monkeypatch):
    monkeypatch.setattr("roomplan_lib.viz.clouds.MESH_POINTS", 30_000)
    bare = replace(room, views=[replace(view, depth_path=None) for view in room.views])
    cloud = viz.full_cloud(bare, cut_height=None)
    assert "(mesh)" in cloud.title and len(cloud.points) == 30_000
    assert "mesh" in viz.scene_figure(bare, max_points=500).layout.title.text


# Where the model looks, and how deep it thinks things are -------------------------------------------------------------


def test_attention_weights_are_those_the_layer_uses():
    torch.manual_seed(0)
    layer, x, context = Attention(32, 24, 8), torch.randn(2, 5, 32), torch.randn(2, 7, 24)
    seen = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    for mask in (None, seen):
        weights = attention_weights(layer, x, context, mask)
        assert weights.shape == (2, 4, 5, 7) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 5), atol=1e-6)
        values = layer.key_value(context).chunk(2, dim=-1)[1].unflatten(-1, (4, 8)).transpose(1, 2)
        output = layer.out((weights @ values).transpose(1, 2).flatten(2))
        assert torch.allclose(output, layer(x, context, mask), atol=1e-6)
    assert (weights[1, :, :, 4:] == 0).all()


def test_maps_of_a_model_are_its_resamplers_attention(room):
    from roomplan_lib.training.collator import Sample
    from roomplan_lib.training.run import make_collator, make_model, make_tokenizer

    tiny_config = load_run_config(PROJECT / "papermill_runs" / "params" / "tiny.yaml")
    records = [scene_record(room, selection, Path("/")) for selection in choose_view_sets(room, 3, 2)]
    samples = [Sample(record | {"question": "What is here?", "answer": "a bed"}, Path("/")) for record in records]
    tokenizer = make_tokenizer(tiny_config, samples)
    config = replace(tiny_config, model=replace(tiny_config.model, tap_layers=(0, 1)))
    model = make_model(config, tokenizer).train()
    batch = make_collator(model, tokenizer, config.data)(samples[:1], generate=True)
    patches, cameras = resampler_attention(model, batch, layer=0)
    views, (_, height, width) = batch["pixel_values"][0].shape[0], batch["pixel_values"][0].shape[1:]
    latents = config.model.resampler.num_latents
    assert patches.shape == (latents, views, height // 14, width // 14) and cameras.shape == (latents, views)
    assert torch.allclose(patches.sum((1, 2, 3)) + cameras.sum(1), torch.ones(latents), atol=1e-5)
    assert model.training and not model.resampler._forward_hooks

    # Another route: values that name their own place turn the fused attention into its weights.
    seen = {}
    cross = model.resampler.layers[0].cross_attention
    hook = cross.register_forward_hook(lambda module, args, output: seen.update(x=args[0], context=args[1]))
    model.eval().encode_views(
        **{k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask", "scene_index")}
    )
    hook.remove()
    heads = config.model.resampler.width // config.model.resampler.head_width
    query = cross.query(seen["x"]).unflatten(-1, (heads, -1)).transpose(1, 2)
    key = cross.key_value(seen["context"]).chunk(2, dim=-1)[0].unflatten(-1, (heads, -1)).transpose(1, 2)
    count = key.shape[2]
    weights = F.scaled_dot_product_attention(query, key, torch.eye(count).expand(1, heads, -1, -1))[0].mean(0)
    num_patches = patches[0].numel()
    by_tap = [weights[:, i * (views + num_patches) : (i + 1) * (views + num_patches)] for i in range(2)]
    assert torch.allclose(sum(part[:, views:] for part in by_tap), patches.flatten(1), atol=1e-6)
    assert torch.allclose(sum(part[:, :views] for part in by_tap), cameras, atol=1e-6)

    with pytest.raises(ValueError, match="has 2 layers, got 2"):
        resampler_attention(model, batch, layer=2)
    with pytest.raises(ValueError, match="expected one set of views"):
        resampler_attention(model, make_collator(model, tokenizer, config.data)(samples, generate=True))
    reference = ResamplerConfig(8, 1, 64, 64, 32, kind="reference")
    with pytest.raises(ValueError, match="kind perceiver, this one is reference"):
        model = make_model(replace(tiny_config, model=replace(tiny_config.model, resampler=reference)), tokenizer)
        resampler_attention(model, batch)


def test_own_depth_and_cameras_meet_in_the_points_that_positions_use(room):
    """Unprojected by hand, VGGT's depth gives the patch coordinates of model.positions.source: vggt."""
    torch.manual_seed(1)
    vggt = VGGT(
        VGGTConfig(
            img_size=56, embed_dim=32, depth=4, num_heads=2, patch_embed_depth=1, patch_embed_num_heads=2,
            camera_num_heads=2, head_layers=(0, 1, 2, 3), dpt_features=16, dpt_out_channels=(8, 8, 8, 8),
            enable_point=False,
        )
    ).eval()  # fmt: skip
    views = room.views[:4]
    pictures = np.stack([np.asarray(Image.fromarray(view.load_rgb()).resize((56, 42))) for view in views])
    known = np.stack([view.camera_to_world for view in views])
    depth, K, cameras = own_depth(vggt, pictures, known)
    assert depth.shape == (4, 42, 56) and depth.min() > 0
    assert np.allclose(cameras[:, :3, :3] @ cameras[:, :3, :3].transpose(0, 2, 1), np.eye(3), atol=1e-5)
    spreads = [np.sqrt(((c - c.mean(0)) ** 2).sum(1).mean()) for c in (cameras[:, :3, 3], known[:, :3, 3])]
    assert spreads[0] == pytest.approx(spreads[1], rel=1e-4)  # the known poses' scale
    assert np.allclose(cameras[:, :3, 3].mean(0), known[:, :3, 3].mean(0), atol=1e-4)
    points = np.zeros((4, 42, 56, 3))
    for i, (v, u) in enumerate(np.ndindex(42, 56)):
        ray = (np.array([u, v]) - K[:, :2, 2]) / K[:, [0, 1], [0, 1]]
        local = np.column_stack([ray, np.ones(4)]) * depth[:, v, u, None]
        points.reshape(4, -1, 3)[:, i] = np.einsum("vij,vj->vi", cameras[:, :3, :3], local) + cameras[:, :3, 3]
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)[None].float() / 255
    with torch.no_grad():
        predictions = vggt(pixels)
    expected, _ = vggt_patch_coordinates(predictions, torch.from_numpy(known)[None].float(), (42, 56), 14)
    means = points.reshape(4, 3, 14, 4, 14, 3).mean(axis=(2, 4)).reshape(1, 4, 12, 3)
    assert np.abs(means - expected.numpy()).max() < 1e-3 * max(1.0, np.abs(means).max())
    with pytest.raises(ValueError, match="cameras are too close together"):
        own_depth(vggt, pictures, np.tile(known[:1], (4, 1, 1)))
