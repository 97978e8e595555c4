"""VGGT trained on rooms: what it is shown, that it learns, goes on as if never stopped, and that the model reads it."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import ModelConfig, PretrainConfig, load_pretrain_config, parse, to_dict
from roomplan_lib.geometry import unproject
from roomplan_lib.model.pretrained import load_encoder
from roomplan_lib.model.vggt import VGGT, VGGTConfig, load_vggt
from roomplan_lib.model.vggt.layers import attend
from roomplan_lib.model.vlm import vggt_settings
from roomplan_lib.scenes import CATEGORIES
from roomplan_lib.scenes.arkitscenes import read_scene
from roomplan_lib.training.checkpoint import list_checkpoints, load_tensors
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.pretrain import GeometryLearner, evaluate, pretrain
from roomplan_lib.training.view_sets import (
    PackedScenes,
    collate_sets,
    draw_step,
    held_out_sets,
    jitter_colors,
    pack_scene,
)

PARAMS = Path(__file__).parents[1] / "papermill_runs" / "params"
MICRO = {
    "img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2, "patch_embed_depth": 1, "patch_embed_num_heads": 2,
    "layer_scale_init": 1.0, "head_layers": [0, 0, 1, 1], "dpt_features": 8, "dpt_out_channels": [8, 8, 8, 8],
    "dpt_last_channels": 8, "camera_trunk_depth": 1, "camera_num_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def micro(rooms_root, tmp_path_factory) -> PretrainConfig:
    """A run of ten steps of a micro VGGT on the session's rooms."""
    folder = tmp_path_factory.mktemp("pretrain")
    values = {
        "run_name": "test",
        "runs_dir": str(folder),
        "data": {
            "scenes": [str(rooms_root)], "packed": str(folder / "packed"), "image_size": 28, "max_views": 4,
        },
        "vggt": MICRO,
        "loss": {"category_weight": 0.1},
        "training": {
            "max_steps": 10, "num_views": 8, "learning_rate": 3e-3, "log_every_steps": 2, "eval_every_steps": 5,
            "num_eval_sets": 2, "num_eval_views": 3, "save_every_steps": 5, "device": "cpu",
        },
    }  # fmt: skip
    return parse(PretrainConfig, values)


def changed(config: PretrainConfig, section: str = "", **values) -> PretrainConfig:
    if section:
        return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
    return dataclasses.replace(config, **values)


@pytest.fixture(scope="session")
def scenes(micro) -> PackedScenes:
    packed = PackedScenes(dataclasses.replace(micro.data, image_size=112), "train", 14)
    packed.pack()
    return packed


# Views ----------------------------------------------------------------------------------------------------------------


def test_packed_views_are_the_scenes_own_at_training_size(scenes):
    scene, packed = read_scene(scenes.scenes[0]), scenes[0]
    assert packed.rgb.shape[1:] == (84, 112, 3) and len(packed.rgb) == len(scene.views)
    full, valid = zip(*(unproject(v.load_depth(), v.K, v.camera_to_world) for v in scene.views), strict=True)
    for v in (0, 5):
        points, found = unproject(packed.depth[v] / 1000, packed.K[v], packed.camera_to_world[v])
        rows, columns = (np.arange(84) + 0.5) * 192 / 84, (np.arange(112) + 0.5) * 256 / 112
        own = full[v][rows.astype(int)[:, None], columns.astype(int)]
        distance = np.linalg.norm(points - own, axis=-1)[found]
        assert found.all() == valid[v].all() and np.median(distance) < 0.01 and distance.max() < 0.2
        smooth = np.asarray(Image.fromarray(scene.views[v].load_rgb()).resize((112, 84), Image.Resampling.BOX))
        assert np.abs(smooth.astype(int) - packed.rgb[v]).mean() < 4


def test_categories_agree_with_the_renderers_instances(scenes):
    """Boxes and depth give the labels; the renderer's own pictures of instances know better, and nearly agree."""
    right = total = furniture = 0
    for index in range(3):
        folder, packed = scenes.scenes[index], scenes[index]
        sidecar = json.loads((folder / f"{folder.name}_room.json").read_text())
        names = {int(k): 1 + CATEGORIES.index(v["label"]) for k, v in sidecar["instances"].items()}
        for v, view in enumerate(read_scene(folder).views):
            ids = np.asarray(Image.open(view.rgb_path.parents[1] / "instances" / view.rgb_path.name))
            truth = np.vectorize(lambda i, names=names: names.get(int(i), 0))(ids)
            rows, columns = (np.arange(84) + 0.5) * 192 / 84, (np.arange(112) + 0.5) * 256 / 112
            truth = truth[rows.astype(int)[:, None], columns.astype(int)].reshape(6, 14, 8, 14).swapaxes(1, 2)
            counts = np.stack([(truth == k).sum((2, 3)) for k in range(18)], axis=-1).reshape(48, 18)
            assert (packed.categories[v].sum(1) == 196).all()
            right += np.minimum(counts, packed.categories[v]).sum()
            total += counts.sum()
            furniture += counts[:, 1:].sum()
    assert right / total > 0.97 and furniture / total > 0.1


def test_pixels_without_depth_have_no_category(scenes, tmp_path):
    scene = read_scene(scenes.scenes[0])
    depth = np.asarray(Image.open(scene.views[0].depth_path)).copy()
    depth[:96, :128] = 0  # the upper left quarter
    Image.fromarray(depth).save(tmp_path / "depth.png")
    views = [dataclasses.replace(scene.views[0], depth_path=tmp_path / "depth.png"), *scene.views[1:]]
    counts = pack_scene(dataclasses.replace(scene, views=views), 112, 14).categories[0].sum(1).reshape(6, 8)
    assert (counts[:3, :4] == 0).all() and counts.sum() == 36 * 196


def test_a_scene_written_anew_is_packed_anew_and_a_damaged_file_is_named(rooms_root, micro, tmp_path):
    settings = dataclasses.replace(micro.data, packed=str(tmp_path), num_scenes=1)
    packed = PackedScenes(settings, "train", 14, 1)
    packed.pack()
    (file,) = tmp_path.glob("*.npz")
    before = file.stat().st_mtime_ns
    packed.pack()
    assert file.stat().st_mtime_ns == before
    PackedScenes(dataclasses.replace(settings, image_size=56), "train", 14, 1).pack()
    assert len(list(tmp_path.glob("*.npz"))) == 2
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{file.name}: damaged.*delete it"):
        packed[0]
    with pytest.raises(ValueError, match="data.num_scenes: expected at most the 8 train scenes"):
        PackedScenes(settings, "train", 14, 9)
    with pytest.raises(ValueError, match="data.scenes: .*no scene of split train"):
        PackedScenes(dataclasses.replace(settings, scenes=(str(rooms_root / "Validation"),)), "train", 14)


def test_steps_draw_random_sets_of_equal_numbers_alone(scenes):
    settings = dataclasses.replace(scenes.settings, min_views=2, max_views=6, color_jitter=0.0)
    steps = [draw_step(scenes, 7, step, 24, settings) for step in range(40)]
    sizes = [batch["images"].shape[1] for batch in steps]
    assert set(sizes) == {2, 3, 4, 5, 6}
    assert all(len(batch["images"]) == 24 // size for batch, size in zip(steps, sizes, strict=True))
    again = draw_step(scenes, 7, 3, 24, settings)
    assert all(torch.equal(steps[3][name], again[name]) for name in again)
    other = draw_step(scenes, 8, 3, 24, settings)
    assert other["images"].shape != again["images"].shape or not torch.equal(other["images"], again["images"])
    poses = {scenes[i].camera_to_world[k].tobytes(): (i, k) for i in range(len(scenes)) for k in range(10)}
    shown = [[poses[p.numpy().tobytes()] for p in views] for batch in steps for views in batch["camera_to_world"]]
    assert all(len({i for i, _ in views}) == 1 and len(set(views)) == len(views) for views in shown)
    assert {views[0][1] for views in shown} == set(range(10))  # any view is the reference
    assert any([k for _, k in views] != sorted(k for _, k in views) for views in shown)
    i, k = shown[0][1]
    assert torch.equal(steps[0]["images"][0, 1], torch.tensor(scenes[i].rgb[k]).permute(2, 0, 1) / 255)
    assert torch.equal(steps[0]["depth"][0, 1], torch.tensor(scenes[i].depth[k]).float() / 1000)
    with pytest.raises(ValueError, match=r"scene 8\d+ has 10 posed views, a set of 11 is wanted; lower data.max_views"):
        draw_step(scenes, 0, 0, 24, dataclasses.replace(settings, min_views=11, max_views=11))


def test_colors_change_within_their_bounds_and_nothing_else_does(scenes):
    batch = collate_sets([(scenes[0], np.arange(4)), (scenes[1], np.arange(4))])
    images = 0.25 + batch["images"] / 4  # so that nothing is cut off
    changed = jitter_colors(images, 0.2, np.random.default_rng(0))
    ratio = changed.mean(dim=(-2, -1)) / images.mean(dim=(-2, -1))
    assert 0.7 < ratio.min() < 0.95 and 1.05 < ratio.max() < 1.35  # 0.8 * 0.9 and 1.2 * 1.1, about
    assert ratio.flatten(2).std(dim=1).min() > 0.005  # each view by itself
    for image, other in zip(images.flatten(0, 2), changed.flatten(0, 2), strict=True):
        assert torch.corrcoef(torch.stack([image.flatten(), other.flatten()]))[0, 1] > 0.999  # not moved or mirrored
    assert torch.equal(jitter_colors(images, 0.0, np.random.default_rng(0)), images)


def test_held_out_sets_are_fixed(scenes):
    first, second = (list(held_out_sets(scenes, 0, 10, 3, 4)) for _ in range(2))
    assert [len(batch["images"]) for batch in first] == [4, 4, 2]
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    more = list(held_out_sets(scenes, 0, 12, 3, 5))
    assert torch.equal(more[0]["images"][:4], first[0]["images"])  # a set does not depend on how many there are


# Training -------------------------------------------------------------------------------------------------------------


def losses(run_dir: Path) -> list[dict]:
    times = ("elapsed_s", "samples_per_s", "tokens_per_s", "memory_gb")
    return [{k: v for k, v in e.items() if k not in times} for e in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="session")
def finished(micro) -> Path:
    return pretrain(micro)


def test_run_folder_holds_everything(micro, finished):
    entries = losses(finished)
    assert [e["step"] for e in entries if "loss" in e] == [2, 4, 6, 8, 10]
    assert [e["step"] for e in entries if "eval_depth_abs_rel" in e] == [5, 10]
    names = ("camera_loss", "depth_loss", "point_loss", "category_loss")
    assert all(
        e["loss"] == pytest.approx(sum(e[n] for n in names[:3]) + 0.1 * e[names[3]], rel=1e-5)
        for e in entries
        if "loss" in e
    )
    assert yaml.safe_load((finished / "run.yaml").read_text()) == to_dict(micro)
    assert json.loads((finished / "status.json").read_text())["status"] == "finished"
    assert json.loads((finished / "run.json").read_text())["num_scenes"] == {"train": 8, "val": 2}
    assert [p.name for p in list_checkpoints(finished / "checkpoints")] == ["checkpoint-5", "checkpoint-10"]
    before = (finished / "model" / "model.safetensors").stat().st_mtime_ns
    assert pretrain(micro) == finished
    assert (finished / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_the_model_reads_what_it_made(micro, finished):
    folder = finished / "model"
    stored = load_file(folder / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert stored.keys() == VGGT(parse(VGGTConfig, MICRO)).state_dict().keys()
    settings = parse(ModelConfig, {"vggt": MICRO, "vggt_weights": str(folder), "freeze_vggt": True})
    encoder, _ = load_encoder(str(folder), vggt_settings(settings))
    aggregator = encoder.aggregator.state_dict()
    assert all(torch.equal(value, stored[f"aggregator.{key}"]) for key, value in aggregator.items())
    last = load_tensors(finished / "checkpoints" / "checkpoint-10", "model.safetensors")
    assert all(torch.equal(value.bfloat16(), stored[key]) for key, value in last.items())
    learner = GeometryLearner(load_vggt(folder).float(), changed(micro, "loss", category_weight=0.0))
    held_out = PackedScenes(micro.data, "val", 14)
    scores = evaluate(learner, held_out, micro.seed, 2, 3)
    told = json.loads((finished / "scores.json").read_text())
    assert {name: told[name] for name in scores} == pytest.approx(scores, rel=1e-6)


def test_it_learns(micro, tmp_path):
    """The ten views of one room, in bfloat16: every loss falls."""
    config = changed(micro, runs_dir=str(tmp_path))
    config = changed(config, "data", num_scenes=1, min_views=4, color_jitter=0.0)
    config = changed(config, "training", max_steps=100, learning_rate=1e-2, log_every_steps=20, eval_every_steps=0)
    entries = losses(pretrain(config))
    for name in ("camera_loss", "depth_loss", "point_loss", "category_loss"):
        assert entries[-1][name] < 0.8 * entries[0][name], (name, [e[name] for e in entries])


def test_loader_processes_change_nothing(micro, finished, tmp_path):
    config = changed(changed(micro, runs_dir=str(tmp_path)), "data", num_workers=2)
    assert losses(pretrain(config)) == losses(finished)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_run_goes_on_as_if_never_interrupted(micro, finished, tmp_path, how):
    config = changed(micro, runs_dir=str(tmp_path))
    config = changed(config, "training", save_every_steps=3 if how == "killed" else 5)
    params = tmp_path / "stage.yaml"
    params.write_text(yaml.safe_dump(to_dict(config)))

    def interrupt(entry):
        if entry["step"] == 4:
            if how == "killed":
                raise KeyboardInterrupt  # nothing of steps 4 and on is saved
            (config.run_dir / "STOP").touch()

    if how == "killed":
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, on_log=interrupt)
        assert [p.name for p in list_checkpoints(config.run_dir / "checkpoints")] == ["checkpoint-3"]
        assert len(losses(config.run_dir)) == 2
        pretrain(config)
    else:
        with pytest.raises(RuntimeError, match="stopped on request after step 4 of 10"):
            pretrain(config, on_log=interrupt)
        assert json.loads((config.run_dir / "status.json").read_text())["status"] == "preempted"
        (config.run_dir / "STOP").unlink()
        pretrain(config)
    assert losses(config.run_dir) == losses(finished)
    mine, other = (load_file(run / "model" / "model.safetensors") for run in (config.run_dir, finished))
    assert all(torch.equal(mine[key], other[key]) for key in other)
    ends = (run / "checkpoints" / "checkpoint-10" for run in (config.run_dir, finished))
    mine, other = (load_tensors(end, "optimizer.safetensors") for end in ends)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in other)


def test_a_run_starts_from_the_weights_that_are_named(micro, finished, tmp_path):
    config = changed(micro, runs_dir=str(tmp_path), vggt_weights=str(finished / "model"))
    config = changed(config, "training", max_steps=1, learning_rate=0.0, warmup_ratio=0.0, weight_decay=0.0)
    mine, other = (load_file(run / "model" / "model.safetensors") for run in (pretrain(config), finished))
    assert all(torch.equal(mine[key], other[key]) for key in other)
    with pytest.raises(ValueError, match="no such file or folder"):
        pretrain(changed(config, run_name="other", vggt_weights=str(tmp_path / "none")))


def test_other_settings_are_refused_by_name(micro, finished, tmp_path):
    config = changed(micro, runs_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="stopped on request"):
        pretrain(config, on_log=lambda entry: (config.run_dir / "STOP").touch())
    (config.run_dir / "STOP").unlink()
    with pytest.raises(ValueError, match=r"loss.depth_weight: 1.0 -> 2.0.*choose another run_name"):
        pretrain(changed(config, "loss", depth_weight=2.0))


def test_other_scenes_are_refused(micro, rooms_root, tmp_path):
    """With num_scenes 0 a run takes all scenes that are there; one more would change every draw."""
    folder = tmp_path / "rooms"
    folder.mkdir()
    for scene in sorted(rooms_root.glob("*/*"))[:5] + sorted(rooms_root.glob("Validation/*")):
        (folder / scene.parent.name).mkdir(exist_ok=True)
        (folder / scene.parent.name / scene.name).symlink_to(scene)
    config = changed(changed(micro, runs_dir=str(tmp_path)), "data", scenes=(str(folder),))
    with pytest.raises(RuntimeError, match="stopped on request"):
        pretrain(config, on_log=lambda entry: (config.run_dir / "STOP").touch())
    (config.run_dir / "STOP").unlink()
    (folder / "Training" / sorted(rooms_root.glob("Training/*"))[6].name).symlink_to(
        sorted(rooms_root.glob("Training/*"))[6]
    )
    with pytest.raises(ValueError, match=r"begun with other training scenes than the 6 .*data.num_scenes"):
        pretrain(config)


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(micro, finished, tmp_path):
    """The command, its process killed without warning after its first checkpoint."""
    config = changed(changed(micro, runs_dir=str(tmp_path)), "training", save_every_steps=2)
    params = tmp_path / "stage.yaml"
    params.write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "roomplan_lib.cli", "pretrain", str(params)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    while not list_checkpoints(config.run_dir / "checkpoints") and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "going on from checkpoint-" in done.stdout, done.stderr
    mine, other = (load_file(run / "model" / "model.safetensors") for run in (config.run_dir, finished))
    assert all(torch.equal(mine[key], other[key]) for key in other)


# Settings and parts ---------------------------------------------------------------------------------------------------


def test_stage_file_states_every_field_and_builds_a_small_enough_vggt():
    path = PARAMS / "tiny_pretrain_vggt.yaml"
    values = yaml.safe_load(path.read_text())
    config = load_pretrain_config(path)
    assert config.run_name == path.stem and values == to_dict(config)
    assert values["vggt"].keys() == VGGTConfig.__dataclass_fields__.keys()
    with torch.device("meta"):
        model = VGGT(parse(VGGTConfig, config.vggt))
    assert 2 * sum(p.numel() for p in model.parameters()) < 18e6  # bytes in bfloat16


# What each setting that a run learns from is changed to; two steps of training then end in other weights.
LEARNED = {
    "seed": 1,
    "data.num_scenes": 2,
    "data.image_size": 42,
    "data.min_views": 4,
    "data.max_views": 2,
    "data.color_jitter": 0.0,
    "loss.camera_weight": 2.0,
    "loss.depth_weight": 2.0,
    "loss.point_weight": 2.0,
    "loss.category_weight": 0.0,
    "loss.camera_decay": 0.5,
    "loss.huber_delta": 0.05,
    "loss.confidence_alpha": 0.1,
    "loss.gradient_weight": 0.0,
    "training.max_steps": 1,
    "training.num_views": 4,
    "training.learning_rate": 1e-3,
    "training.weight_decay": 0.5,
    "training.warmup_ratio": 0.5,
    "training.lr_scheduler": "linear",
    "training.optimizer": "muon",
    "training.max_grad_norm": 0.01,
    "training.bf16": False,
}
# Those that change what is read, shown or kept, each with a test above; `scenes` and `packed` are the folders it needs.
OTHERS = {
    "run_name", "runs_dir", "vggt", "vggt_weights", "data.scenes", "data.packed", "data.num_workers",
    "training.log_every_steps", "training.eval_every_steps", "training.num_eval_sets", "training.num_eval_views",
    "training.save_every_steps", "training.keep_checkpoints", "training.device",
}  # fmt: skip


def with_value(config: PretrainConfig, key: str, value) -> PretrainConfig:
    section, _, name = key.rpartition(".")
    return changed(config, section, **{name: value})


def test_every_setting_is_accounted_for():
    values = to_dict(PretrainConfig())
    keys = {k for k, v in values.items() if k == "vggt" or not isinstance(v, dict)}
    keys |= {f"{section}.{key}" for section in ("data", "loss", "training") for key in values[section]}
    assert keys == LEARNED.keys() | OTHERS


@pytest.fixture(scope="session")
def short(micro) -> tuple[PretrainConfig, bytes]:
    """A run of three steps, and its weights."""
    config = changed(micro, "training", max_steps=3, eval_every_steps=0, num_eval_sets=1, lr_scheduler="cosine")
    config = changed(config, run_name="short")
    return config, (pretrain(config) / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("key", LEARNED)
def test_each_setting_changes_what_is_learned(short, tmp_path, key):
    config, weights = short
    run_dir = pretrain(with_value(changed(config, runs_dir=str(tmp_path)), key, LEARNED[key]))
    assert (run_dir / "model" / "model.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    "values, message",
    [
        ({"data": {"min_views": 1}}, "data.min_views: expected 2 to max_views"),
        ({"data": {"color_jitter": 1.0}}, "data.color_jitter: expected 0 to below 1"),
        ({"data": {"scenes": []}}, "data.scenes: expected one folder"),
        ({"training": {"num_views": 0}}, "training.num_views: expected at least 1"),
        ({"training": {"num_eval_views": 1}}, "training.num_eval_views: expected at least 2"),
        ({"training": {"warmup_ratio": 2.0}}, "training.warmup_ratio: expected 0 to 1"),
        ({"vgt": {}}, "vgt: unknown setting"),
        ({"run_name": "a/b"}, "run_name: expected a plain folder name"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        parse(PretrainConfig, values)


def test_a_loss_without_its_head_is_refused(micro):
    vggt = VGGT(parse(VGGTConfig, MICRO | {"enable_point": False}))
    with pytest.raises(ValueError, match=r"loss.point_weight: vggt.enable_point builds no such head"):
        GeometryLearner(vggt, micro)
    GeometryLearner(vggt, changed(micro, "loss", point_weight=0.0))


def test_the_command_says_what_is_wrong_in_one_line(micro, tmp_path):
    params = tmp_path / "stage.yaml"
    values = to_dict(changed(micro, runs_dir=str(tmp_path)))
    params.write_text(yaml.safe_dump(values | {"vggt": {"embed_dims": 3}}))
    result = CliRunner().invoke(app, ["pretrain", str(params)])
    assert result.exit_code == 1 and "vggt.embed_dims: unknown setting" in result.stderr


def test_attention_written_out_is_the_fused_one():
    q, k, v = (torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), expected)
    q, k, v = (t.bfloat16().requires_grad_() for t in (q, k, v))
    written = attend(q, k, v)
    assert written.grad_fn.name() == "UnsafeViewBackward0"
    torch.testing.assert_close(written.float(), expected, atol=0.02, rtol=0.02)
