"""The feature cache: equal to encoding live, found damaged or stale wherever it is, filled by many and cut off at will;
and views hidden from everything behind the encoder."""

import copy
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_full_model import make, make_batch, shake
from typer.testing import CliRunner

from roomplan_lib.cli import app
from roomplan_lib.config import AugmentationConfig, FeaturesConfig, PositionsConfig, ResamplerConfig, to_dict
from roomplan_lib.evaluation.predict import predict
from roomplan_lib.model import features as features_module
from roomplan_lib.model import vlm as vlm_module
from roomplan_lib.model.describe import cache_card, describe
from roomplan_lib.model.features import (
    FileHashes,
    Residence,
    Store,
    entry_bytes,
    pool_coordinates,
    pool_patches,
    pooled_grid,
    unpack,
)
from roomplan_lib.samples import read_samples, write_samples
from roomplan_lib.training import cache as cache_module
from roomplan_lib.training import collator as collator_module
from roomplan_lib.training import residence as residence_module
from roomplan_lib.training.cache import fill_cache
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.run import Preempted, load_model_folder, make_collator, make_model, make_tokenizer, train

HEADS = {"head_layers": [0, 0, 1, 1], "dpt_features": 16, "dpt_out_channels": [8, 8, 16, 16], "camera_trunk_depth": 1}


def change(config, part, **values):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


def with_features(config, folder, dtype="float32", on_missing="compute"):
    return change(config, "data", features=FeaturesConfig(str(folder), dtype, on_missing))


@pytest.fixture
def frozen(tiny_config):
    """The tiny run with a frozen encoder, small pictures and a small language model."""
    config = change(tiny_config, "model", freeze_vggt=True)
    return change(config, "data", image_size=56)


@pytest.fixture
def cached(frozen, tmp_path):
    return with_features(frozen, tmp_path / "cache")


@pytest.fixture
def copied(cached, sample_files, tmp_path):
    """A cached run on two scenes whose pictures are copies in `tmp_path`, and those pictures."""
    records = read_samples(sample_files["anchors_train"])
    scenes = list(dict.fromkeys(record["scene_id"] for record in records))[:2]
    records = [record for record in records if record["scene_id"] in scenes]
    root = load_samples([sample_files["anchors_train"]])[0].root
    for name in {name for record in records for name in (*record["images"], *record["depths"])}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    write_samples(tmp_path / "copied.jsonl", records, {"root": tmp_path})
    config = change(cached, "data", train_files=(str(tmp_path / "copied.jsonl"),), eval_files=())
    return config, [tmp_path / name for name in records[0]["images"]]


def parts_of(config):
    samples = load_samples(config.data.train_paths)
    tokenizer = make_tokenizer(config, samples)
    model = make_model(config, tokenizer).train()
    if model.settings.positions.source == "vggt":
        with torch.no_grad():  # an untrained camera head puts all cameras in one place
            torch.manual_seed(0)
            model.encoder.camera_head.pose_branch.fc2.weight.normal_()
    return model, make_collator(model, tokenizer, config.data), samples


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def files_of(config, content="features"):
    return sorted(features_module.data_path(config.data.features.folder).glob(f"{content}-*/*.safetensors"))


def refuse(*args, **kwargs):
    raise AssertionError("not to be called")


# ---------------------------------------------------------------------------- equal to live
@pytest.mark.parametrize(
    "positions, tap_layers",
    [
        (PositionsConfig("base"), (-1,)),
        pytest.param(PositionsConfig("mlp_pe", width=16), (0, -1), marks=pytest.mark.slow),
        (PositionsConfig("sin3d_pe", add_to="encoder", n_points=9), (-1,)),
        pytest.param(PositionsConfig("mlp_pe", width=16, source="vggt"), (-1, 0), marks=pytest.mark.slow),
        (PositionsConfig("sin3d_pe", source="vggt", add_to="encoder", n_points=2, min_valid_share=0.5), (-1,)),
    ],
)
def test_training_from_a_float32_cache_equals_training_live(frozen, tmp_path, monkeypatch, positions, tap_layers):
    config = change(frozen, "model", positions=positions, tap_layers=tap_layers, vggt={**frozen.model.vggt, **HEADS})
    config = change(config, "data", view_dropout=0.4, augmentation=AugmentationConfig(yaw_deg=90))
    model, collator, samples = parts_of(config)
    picked = [dataclasses.replace(s, draw=i // 2) for i, s in enumerate(samples[:: len(samples) // 6][:6])]
    live = loss_and_gradients(model, collator(picked))
    model, collator, _ = parts_of(with_features(config, tmp_path / "cache"))
    filling = loss_and_gradients(model, collator(picked))  # as on_missing: compute does it
    for name in ("load_rgb", "load_depth"):
        if name == "load_rgb" or positions.n_points != 2:
            monkeypatch.setattr(collator_module, name, refuse)
    monkeypatch.setattr(model.encoder.aggregator, "forward", refuse)
    again = loss_and_gradients(model, collator(picked))
    model, collator, _ = parts_of(with_features(config, tmp_path / "cache", on_missing="error"))
    batch = collator(picked)
    assert all(pixels is None for pixels in batch["pixel_values"]) and len(batch["features"]) > 1
    fresh = loss_and_gradients(model, batch)
    for loss, gradients in (filling, again, fresh):
        assert torch.equal(loss, live[0])
        assert gradients.keys() == live[1].keys()
        assert all(torch.equal(gradients[name], value) for name, value in live[1].items())


def test_a_bfloat16_cache_equals_live_to_its_rounding(cached):
    model, collator, samples = parts_of(change(cached, "data", features=FeaturesConfig()))
    live = collator(samples[:4])
    expected, gradients = loss_and_gradients(model, live)
    with torch.no_grad():
        (tokens,), _ = model.encoder.aggregator(live["pixel_values"][0][None].float() / 255, [-1])
    fill_cache(with_features(cached, cached.data.features.folder, "bfloat16"))
    model, collator, _ = parts_of(with_features(cached, cached.data.features.folder, "bfloat16", "error"))
    batch = collator(samples[:4])
    assert torch.equal(batch["features"][0]["tokens"][0], tokens[0].bfloat16())
    loss, rounded = loss_and_gradients(model, batch)
    assert 0 < abs(loss - expected) / expected < 2e-3
    for name, value in gradients.items():
        assert (rounded[name] - value).norm() <= 0.03 * value.norm() + 1e-6, name


def test_a_frozen_encoder_is_not_changed_by_autocast(frozen):
    """Else training in bfloat16, predicting, and filling the cache would each see other features."""
    model, collator, samples = parts_of(frozen)
    seen = []
    model.resampler.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    batch = collator(samples[:2])
    model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)
    assert torch.equal(seen[0], seen[1])


def test_a_cached_run_repeats_the_live_run(cached, monkeypatch, tmp_path, capsys):
    """Training, evaluation and prediction; nothing is decoded or encoded once the cache is filled."""
    cached = change(cached, "training", max_steps=3, eval_every_steps=3)
    live = change(dataclasses.replace(cached, run_name="live"), "data", features=FeaturesConfig())
    curves = [[e["loss"] for e in read_metrics(train(live) / "metrics.jsonl") if "loss" in e]]
    fill_cache(cached)
    monkeypatch.setattr(collator_module, "load_rgb", refuse)
    monkeypatch.setattr(collator_module, "load_depth", refuse)
    run = train(change(cached, "data", features=dataclasses.replace(cached.data.features, on_missing="error")))
    curves.append([e["loss"] for e in read_metrics(run / "metrics.jsonl") if "loss" in e])
    assert curves[0] == curves[1] and len(curves[0]) == 3
    assert "feature cache: once a view set is encoded" in capsys.readouterr().out
    monkeypatch.undo()
    model, collator, _ = parts_of(cached)
    other, plain, _ = parts_of(live)
    samples = load_samples(cached.data.eval_paths)[:4]
    tokenizer = collator.tokenizer
    answers = [
        predict(m.eval(), tokenizer, c, samples, max_new_tokens=4, progress=False)
        for m, c in ((model, collator), (other, plain))
    ]
    assert answers[0] == answers[1]


def test_a_resumed_run_finds_the_features_of_the_encoder_it_started_from(cached):
    """Its weights come from a former run that trained it, not from the seed."""
    former = train(change(change(cached, "model", freeze_vggt=False), "data", features=FeaturesConfig()))
    config = change(dataclasses.replace(cached, run_name="later"), "training", start_from=str(former), max_steps=3)
    fill_cache(config)

    def stop(entry):
        if entry["step"] == 1:
            (config.run_dir / "STOP").touch()

    config = with_features(config, config.data.features.folder, on_missing="error")
    with pytest.raises(Preempted):
        train(config, on_log=stop)
    train(config)
    assert len({path.parent for path in files_of(config)}) == 1
    model, tokenizer = load_model_folder(config.run_dir / "model")
    collator = make_collator(model, tokenizer, features=config.data.features)  # as prediction does it
    samples = load_samples(config.data.eval_paths)
    assert collator(samples[:2], generate=True)["pixel_values"][0] is None


def test_an_encoder_that_is_trained_has_no_cache(cached):
    with pytest.raises(ValueError, match=r"model.freeze_vggt is false.*set it to true"):
        parts_of(change(cached, "model", freeze_vggt=False))
    with pytest.raises(ValueError, match="data.features.folder is empty"):
        fill_cache(change(cached, "data", features=FeaturesConfig()))


# ---------------------------------------------------------------------------- damaged and stale
@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path, "features", {"image_size": 56, "encoder": "abc"})
    tensors = {"tokens": torch.randn(1, 2, 3, 8).bfloat16(), "depth": torch.randn(2, 4)}
    store.store({"pictures": ["a", "b"]}, "scene 1", tensors, {"image_size": [56, 42]})
    return store


def reopened(store, **changes):
    settings = {key: value for key, value in store.settings.items() if key != "version"}
    return Store(store.folder.parent, store.content, settings, **changes)


PARTS = {"pictures": ["a", "b"]}


def test_every_flipped_bit_is_found(store, capsys):
    path = store.path(PARTS)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert store.fault(PARTS, contents=True), position
        assert store.read(PARTS, "scene 1") is None, position
    assert f"{path}: damaged" in capsys.readouterr().out
    path.write_bytes(good)
    assert store.fault(PARTS, contents=True) is None and store.read(PARTS, "scene 1").facts == {"image_size": [56, 42]}


def test_truncated_and_foreign_files_are_found(store):
    path = store.path(PARTS)
    good = path.read_bytes()
    for content in (b"", good[:5], good[:40], good[: len(good) // 2], good[:-1], good + b"\0", b"\0" * len(good)):
        path.write_bytes(content)
        assert store.read(PARTS, "scene 1") is None
        with pytest.raises(ValueError, match=r"scene 1.*roomplan cache STAGE.yaml --verify"):
            reopened(store, on_missing="error").read(PARTS, "scene 1")
    path.unlink()
    with pytest.raises(ValueError, match=r"holds no features of scene 1.*roomplan cache"):
        reopened(store, on_missing="error").read(PARTS, "scene 1")


def test_a_file_of_other_weights_or_pictures_is_stale(store, capsys):
    """Also where somebody copied it to the right place under the right name."""
    other = Store(store.folder.parent, "features", {"image_size": 56, "encoder": "def"})
    assert f"{store.folder}: made with other encoder; not used" in capsys.readouterr().out
    assert other.fault(PARTS) == "missing"
    other.folder.mkdir()
    other.path(PARTS).write_bytes(store.path(PARTS).read_bytes())
    assert other.fault(PARTS) == "stale: made from other encoder"
    moved = {"pictures": ["a", "c"]}
    store.path(moved).write_bytes(store.path(PARTS).read_bytes())
    assert store.fault(moved) == "stale: made from other pictures"


def test_contents_are_verified_once_and_again_when_the_file_changed(store, monkeypatch):
    digests = []
    digest = features_module._digest
    monkeypatch.setattr(features_module, "_digest", lambda *args: digests.append(1) or digest(*args))
    for _ in range(3):
        assert store.read(PARTS, "scene 1")
    assert len(digests) == 1
    os.utime(store.path(PARTS))
    assert store.read(PARTS, "scene 1") and len(digests) == 2


def test_what_the_disk_does_not_take_stops_nobody_who_can_go_on(store, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features_module, "save", full)
    for number in range(2):
        store.keep({"pictures": [str(number)]}, f"scene {number}", {"tokens": torch.ones(1)}, {})
    assert capsys.readouterr().out.count("No space left on device") == 1
    with pytest.raises(OSError):
        store.store(PARTS, "scene 1", {"tokens": torch.ones(1)}, {})
    assert store.read(PARTS, "scene 1") and not list(store.folder.glob(".*.tmp"))


def damage(path):
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def test_training_repairs_what_is_damaged(cached, capsys):
    fill_cache(cached)
    model, collator, samples = parts_of(cached)
    expected = loss_and_gradients(model, collator(samples[:2]))[0]
    good = {path: path.read_bytes() for path in (*files_of(cached), *files_of(cached, "coordinates"))}
    for path in good:
        damage(path)
    capsys.readouterr()
    model, collator, _ = parts_of(cached)
    assert torch.equal(loss_and_gradients(model, collator(samples[:2]))[0], expected)
    printed = capsys.readouterr().out
    assert printed.count("damaged: its contents do not have the sha256") == 2  # its features and its coordinates
    assert sum(path.read_bytes() == content for path, content in good.items()) == 2
    model, collator, _ = parts_of(with_features(cached, cached.data.features.folder, on_missing="error"))
    with pytest.raises(ValueError, match=r"safetensors: damaged.*--verify"):
        collator(samples)
    fill_cache(cached)  # looks at headers alone
    assert sum(path.read_bytes() == content for path, content in good.items()) == 2
    fill_cache(cached, verify=True)
    assert all(path.read_bytes() == content for path, content in good.items())
    assert f"{len(files_of(cached)) - 1} files are damaged or stale and computed again" in capsys.readouterr().out


def test_damage_to_files_that_are_in_use_is_noticed(cached, capsys):
    """Their tensors are mapped, so what is written over a file while a run goes on changes what the run has read."""
    fill_cache(cached)
    _, collator, samples = parts_of(cached)
    expected = copy.deepcopy(collator(samples))
    stores = collator.features
    files = [
        stores.features.path(collator.feature_parts(samples[0])),
        stores.coordinates.path(collator.coordinate_parts(samples[-1])),
    ]
    good = [path.read_bytes() for path in files]
    for path in files:
        damage(path)
    capsys.readouterr()
    batch = collator(samples)
    printed = capsys.readouterr().out
    assert all(f"{path}: damaged" in printed for path in files)
    assert sum(pixels is not None for pixels in batch["pixel_values"]) == 1
    assert files[1].read_bytes() == good[1]  # computed again; features are, by the model
    for path, content in zip(files, good, strict=True):
        path.write_bytes(content)
    again = collator(samples)
    for key in ("features", "patch_coordinates"):
        for a, b in zip(expected[key], again[key], strict=True):
            assert torch.equal(a["tokens"], b["tokens"]) if key == "features" else torch.equal(a, b)


def test_a_changed_picture_is_noticed(copied, capsys):
    config, pictures = copied
    picture = np.asarray(Image.open(pictures[0])).copy()
    Image.fromarray(picture).save(pictures[0], compress_level=0)  # of one size whatever it shows
    fill_cache(config)
    assert len(files_of(config)) == 2
    before, status = pictures[0].read_bytes(), pictures[0].stat()
    picture[0, 0] ^= 255
    Image.fromarray(picture).save(pictures[0], compress_level=0)
    assert pictures[0].stat().st_size == status.st_size
    os.utime(pictures[0], ns=(status.st_atime_ns, status.st_mtime_ns))  # a program that keeps times
    capsys.readouterr()
    model, collator, samples = parts_of(config)
    batch = collator(samples)
    assert sum(pixels is not None for pixels in batch["pixel_values"]) == 1
    assert f"{pictures[0]}: has changed since it was cached" in capsys.readouterr().out
    fill_cache(config)
    assert len(files_of(config)) == 3
    pictures[0].write_bytes(before)  # as it was: so is its key
    fill_cache(config)
    assert len(files_of(config)) == 3
    model, collator, samples = parts_of(config)
    assert all(pixels is None for pixels in collator(samples)["pixel_values"])


def test_hashes_are_kept_and_damaged_ones_are_made_anew(tmp_path, monkeypatch):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"one")
    hashes = FileHashes(tmp_path / "hashes.json")
    first = hashes(picture)
    hashes.save()
    with monkeypatch.context() as patched:
        patched.setattr(features_module, "file_hash", refuse)
        assert FileHashes(tmp_path / "hashes.json")(picture) == first
        with pytest.raises(AssertionError):
            FileHashes(tmp_path / "hashes.json", trust=False)(picture)
    for content in ("{", "[1]", json.dumps({str(picture): [1, 2]}), ""):
        (tmp_path / "hashes.json").write_text(content)
        assert FileHashes(tmp_path / "hashes.json")(picture) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"image_size": 70}},
        {"data": {"features": FeaturesConfig("", "bfloat16")}},
        {"model": {"tap_layers": (0,)}},
        {"model": {"frozen_dtype": "bfloat16"}},
        {"": {"seed": 1}},  # other random weights
    ],
)
def test_other_settings_or_weights_make_other_entries(copied, changes, capsys):
    config, _ = copied
    fill_cache(config)
    for part, values in changes.items():
        config = change(config, part, **values) if part else dataclasses.replace(config, **values)
    config = with_features(config, copied[0].data.features.folder, config.data.features.dtype)
    capsys.readouterr()
    fill_cache(config)
    printed = capsys.readouterr().out
    assert "not used" in printed and "0 are in the cache, 2 to compute" in printed and "the cache is whole" in printed
    assert len(files_of(config)) == 4


# ---------------------------------------------------------------------------- filling
def test_parts_are_the_whole_and_each_is_done_once(cached, monkeypatch, capsys):
    encoded = []
    encode = cache_module.encode
    monkeypatch.setattr(cache_module, "encode", lambda *args: encoded.append(len(args[1])) or encode(*args))
    sets = len({s.view_key for s in load_samples([*cached.data.train_paths, *cached.data.eval_paths])})
    for number in (2, 1, 3):
        fill_cache(cached, part=(number, 3), batch_size=2)
    assert sum(encoded) == sets == len(files_of(cached)) and max(encoded) == 2
    assert "the cache is whole" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(cache_module, "encode", refuse)
    fill_cache(cached)  # nothing is left to do
    model, collator, samples = parts_of(with_features(cached, cached.data.features.folder, on_missing="error"))
    for sample in samples:
        assert collator.view_set(sample).pixel_values is None
    with pytest.raises(ValueError, match="expected i/n with i from 1 to n, got 4/3"):
        fill_cache(cached, part=(4, 3))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(cached, monkeypatch):
    monkeypatch.setattr(cache_module, "encode", refuse)
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=300_000))
    with pytest.raises(ValueError, match=r"875 kB are needed and 300 kB are free; choose another data.features.folder"):
        fill_cache(cached)
    assert not files_of(cached)


@pytest.mark.parametrize("source", ["depth", "vggt"])
def test_the_estimate_is_what_the_files_hold(cached, source):
    positions = PositionsConfig("mlp_pe", width=16, source=source)
    config = change(cached, "model", positions=positions, tap_layers=(0, 1), vggt={**cached.model.vggt, **HEADS})
    model, collator, samples = parts_of(config)
    model(**collator(samples[:1]))
    (file,) = files_of(config)
    held = sum(tensor.nbytes for tensor in load_file(file).values())
    views = collator.view_set(samples[0])
    heads = ("camera", "depth") if source == "vggt" else ()
    assert entry_bytes(model.encoder, 2, views.num_views, views.image_size, "float32", heads) == held
    assert held < file.stat().st_size < held + cache_module.HEADER_BYTES
    assert cache_card(model, views.num_views, views.image_size, "float32")["set_bytes"] == held


def stage_file(config, path):
    path.write_text(yaml.safe_dump(to_dict(config)))
    return str(path)


def start(config):
    """A job of its own that shares what is imported here, with one thread: those of others do not survive a fork."""

    def fill():
        torch.set_num_threads(1)
        fill_cache(config, batch_size=1)

    job = multiprocessing.get_context("fork").Process(target=fill, daemon=True)
    job.start()
    return job


def test_two_writers_at_once(cached):
    jobs = [start(cached) for _ in range(2)]
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0, 0]
    check_whole(cached)


def check_whole(config, num_sets=10):
    """Every file is there, once, and says what it should."""
    files = files_of(config)
    times = [path.stat().st_mtime_ns for path in files]
    fill_cache(config, verify=True)
    assert files_of(config) == files and [path.stat().st_mtime_ns for path in files] == times
    assert len(files) == len(files_of(config, "coordinates")) == num_sets and not list(files[0].parent.glob(".*"))


@pytest.mark.slow
def test_several_processes_and_the_death_of_one(cached, tmp_path):
    stage = stage_file(cached, tmp_path / "stage.yaml")
    command = [sys.executable, "-m", "roomplan_lib.cli", "cache", stage, "--batch-size", "1", "--num-processes", "2"]
    job = subprocess.run(command, capture_output=True, text=True)
    assert job.returncode == 0 and "the cache is whole" in job.stdout, job.stderr
    check_whole(cached)
    for path in files_of(cached)[1:]:
        path.unlink()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = f"/proc/{job.pid}/task/{job.pid}/children"
    while len(files_of(cached)) < 3:
        time.sleep(0.01)
    workers = [pid for pid in map(int, open(children).read().split()) if b"spawn_main" in read_command(pid)]
    os.kill(workers[0], signal.SIGKILL)
    _, printed = job.communicate()
    assert (
        job.returncode == 1 and "was killed" in printed and "start it again" in printed and "Traceback" not in printed
    )
    assert subprocess.run(command, capture_output=True).returncode == 0
    check_whole(cached)


def read_command(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def halting(path_of_file):
    """Half of the fourth file, then nothing more."""
    with new_file(path_of_file) as file:
        halting.calls += 1
        if halting.calls == 4:
            file.write(b"half")
            file.flush()
            time.sleep(60)
        yield file


new_file, halting.calls = features_module.new_file, 0


def test_a_killed_job_leaves_whole_files_and_goes_on(cached, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(features_module, "new_file", contextmanager(halting))
        job = start(cached)
    while not (left := list((tmp_path / "cache").rglob(".*.tmp"))) or left[0].read_bytes() != b"half":
        time.sleep(0.05)
        assert job.is_alive()
    os.kill(job.pid, signal.SIGKILL)
    job.join()
    written = [*files_of(cached), *files_of(cached, "coordinates")]
    assert len(written) == 3
    times = {path: path.stat().st_mtime_ns for path in written}
    fill_cache(cached)
    assert left[0].exists()  # it may belong to a job that is at work
    os.utime(left[0], (time.time() - 2 * features_module.LEFT_OVER_S,) * 2)
    check_whole(cached)
    assert all(path.stat().st_mtime_ns == changed for path, changed in times.items())


def test_the_command(copied, tmp_path):
    config, pictures = copied
    stage = stage_file(config, tmp_path / "stage.yaml")
    result = CliRunner().invoke(app, ["cache", stage, "--part", "1/2"])
    assert result.exit_code == 0 and "1 are left to the other parts" in result.output
    for arguments, words in (
        (["--part", "3"], "expected i/n such as 1/8, got '3'"),
        (["--part", "0/2"], "got 0/2"),
        (["--device", "gpu"], "expected auto, cpu or cuda"),
    ):
        result = CliRunner().invoke(app, ["cache", stage, *arguments])
        assert result.exit_code == 1 and words in result.output and result.output.count("\n") == 1
    pictures[1].write_bytes(b"no picture")
    result = CliRunner().invoke(app, ["cache", stage])
    assert result.exit_code == 1 and f"{pictures[1]}: cannot read the picture" in result.output


def test_arithmetic_of_the_full_size(capsys):
    """33.7 MB and 23.25 TFLOP for 8 views of 448 pixels: the figures of FlopCounterMode on the published modules."""
    from test_full_model import full_size

    model = full_size()
    card = cache_card(model, 8, 448, "bfloat16")
    assert card["set_bytes"] == 8 * 1029 * 2048 * 2
    assert card["live_flops"] - card["cached_flops"] == pytest.approx(23.25e12, rel=0.01)
    describe(model, 8, 448, features=FeaturesConfig("cache"), num_view_sets=800)
    assert "33.72 MB per view set in bfloat16, 26.97 GB for 800" in capsys.readouterr().out


# ---------------------------------------------------------------------------- lossy storage
def by_hand(tokens, valid, grid):
    """Means of the valid rows of [P, C] over squares of 2x2 patches, and which squares have any."""
    means, known = [], []
    for row in range(0, grid[0], 2):
        for column in range(0, grid[1], 2):
            square = [(r, c) for r in (row, row + 1) for c in (column, column + 1) if r < grid[0] and c < grid[1]]
            rows = [tokens[p] for p in (r * grid[1] + c for r, c in square) if valid[p]]
            known.append(bool(rows))
            means.append(torch.stack(rows).mean(0) if rows else torch.zeros_like(tokens[0]))
    return torch.stack(means), torch.tensor(known)


@pytest.mark.parametrize("grid", [(4, 6), (3, 4), (3, 5), (1, 1)])
def test_pooled_patches_and_their_positions_are_means_over_squares(grid):
    torch.manual_seed(0)
    num_patches = grid[0] * grid[1]
    values, coordinates = torch.randn(2, num_patches, 5), torch.randn(2, num_patches, 3)
    valid = torch.rand(2, num_patches) < 0.4
    pooled, (positions, known) = pool_patches(values, grid, 2), pool_coordinates(coordinates, valid, grid, 2)
    assert pooled.shape[1] == np.prod(pooled_grid(grid, 2)) == positions.shape[1]
    for v in range(2):
        assert torch.allclose(pooled[v], by_hand(values[v], torch.ones(num_patches, dtype=bool), grid)[0], atol=1e-6)
        expected, has_any = by_hand(coordinates[v], valid[v], grid)
        assert torch.equal(known[v], has_any) and torch.allclose(positions[v], expected, atol=1e-6)


def test_int8_is_off_by_half_a_step_of_each_token(cached):
    model, _, _ = parts_of(with_features(cached, cached.data.features.folder, "int8"))
    tokens = torch.randn(1, 2, 7, 64) * torch.logspace(-4, 4, 7)[:, None]  # each token of another size
    tokens[0, 1, 3] = 0
    packed = model.features.pack(tokens, (14, 28))
    assert packed["tokens"].dtype == torch.int8 and packed["scale"].shape == (1, 2, 7, 1)
    assert torch.equal(packed["tokens"].abs().amax(-1)[0, 0], torch.full((7,), 127, dtype=torch.int8))
    steps = tokens.abs().amax(-1, keepdim=True) / 127
    assert ((unpack(packed) - tokens).abs() <= 0.501 * steps).all() and not unpack(packed)[0, 1, 3].any()


LOSSY = [("int8", 1), ("float32", 2), ("int8", 2)]


@pytest.mark.parametrize("dtype, pool", LOSSY)
@pytest.mark.parametrize("source", ["depth", "vggt"])
def test_a_lossy_cache_trains_on_what_it_holds(frozen, tmp_path, monkeypatch, dtype, pool, source):
    """The same while it is filled and from then on; and what a live model gives whose tokens are treated by hand."""
    positions = PositionsConfig("mlp_pe", width=16, source=source)
    config = change(frozen, "model", positions=positions, tap_layers=(0, -1), vggt={**frozen.model.vggt, **HEADS})
    lossy = change(config, "data", features=FeaturesConfig(str(tmp_path / "cache"), dtype, pool=pool))
    model, collator, samples = parts_of(lossy)
    picked = samples[:: len(samples) // 4][:4]
    filling = loss_and_gradients(model, collator(picked))
    monkeypatch.setattr(model.encoder.aggregator, "forward", refuse)
    filled = loss_and_gradients(model, collator(picked))
    assert torch.equal(filling[0], filled[0])
    assert all(torch.equal(filling[1][name], value) for name, value in filled[1].items())
    live, collator, _ = parts_of(config)
    batch = collator(picked)
    exact = loss_and_gradients(live, batch)[0]
    grid, start = tuple(side // 14 for side in batch["pixel_values"][0].shape[-2:]), 5
    assert grid == (3, 4)  # a row is left over

    def treated(tokens):
        if pool == 2:
            special, patches = tokens[..., :start, :], tokens[..., start:, :]
            whole = torch.ones(12, dtype=bool)
            pooled = [[by_hand(patch, whole, grid)[0] for patch in one] for one in patches]
            tokens = torch.cat([special, torch.stack([torch.stack(one) for one in pooled])], dim=2)
        if dtype == "int8":
            scale = tokens.abs().amax(-1, keepdim=True) / 127
            tokens = (tokens / scale).round() * scale
        return tokens

    def by_pools(module, args):
        coordinates, valid = caught.pop(0)
        if pool == 2:
            shape, pairs = coordinates.shape[:2], zip(coordinates.flatten(0, 1), valid.flatten(0, 1), strict=True)
            means = [by_hand(points, known, grid) for points, known in pairs]
            coordinates, valid = (torch.stack(part).unflatten(0, shape) for part in zip(*means, strict=True))
        encoded = encode_positions(live.positions, live.settings.positions, coordinates, valid)
        new_grid = tuple(-(-n // pool) for n in grid)
        return ([treated(tap) for tap in args[0]], args[1], new_grid, encoded, *args[4:])

    caught = []
    encode_positions = vlm_module.encode_positions

    def catch(module, settings, coordinates, valid):
        caught.append((coordinates, valid))
        return encode_positions(module, settings, coordinates, valid)

    monkeypatch.setattr(vlm_module, "encode_positions", catch)
    live.resampler.register_forward_pre_hook(by_pools)
    expected = loss_and_gradients(live, batch)[0]
    assert torch.allclose(filled[0], expected, rtol=1e-5) and abs(exact - expected) > 1e-6


@pytest.mark.parametrize("dtype, pool", LOSSY)
def test_the_command_says_what_lossy_storage_takes_and_loses(copied, tmp_path, dtype, pool):
    config, _ = copied
    exact = with_features(config, config.data.features.folder)
    fill_cache(exact)
    (model, collator, samples), sets = parts_of(exact), {}
    for sample in samples:
        sets[sample.view_key] = collator.view_set(sample).features["tokens"]
    lossy = change(config, "data", features=FeaturesConfig(str(tmp_path / "lossy"), dtype, pool=pool))
    result = CliRunner().invoke(app, ["cache", stage_file(lossy, tmp_path / "stage.yaml")])
    form = f"{dtype}{', pooled 2x2' if pool == 2 else ''} (lossy)"
    assert result.exit_code == 0 and f"2 to compute in {form}: up to " in result.output
    _, collator, _ = parts_of(lossy)
    error = total = 0.0
    for sample in samples:
        if sample.view_key in sets:
            tokens, stored = sets.pop(sample.view_key), collator.view_set(sample).features
            held = sum(stored[name].nbytes for name in ("tokens", "scale") if name in stored)
            assert entry_bytes(model.encoder, 1, 6, (56, 42), dtype, (), pool) == held < tokens.nbytes
            stored = stored["tokens"] * stored.get("scale", 1.0)
            for v in range(6):
                for p in range(12):  # 3 rows of 4 patches behind 5 special tokens
                    at = 5 + (p // 4 // 2 * 2 + p % 4 // 2 if pool == 2 else p)
                    error += (stored[0, v, at] - tokens[0, v, 5 + p]).square().sum().item()
            error += (stored[0, :, :5] - tokens[0, :, :5]).square().sum().item()
            total += tokens.square().sum().item()
    said = f"{form}: the stored features are {(error / total) ** 0.5:.2%} off the exact ones"
    assert said in result.output and "of 2 view sets" in result.output and error > 0


def test_settings_that_need_a_cache_are_refused_without_one(cached):
    for settings in ({"dtype": "int8"}, {"pool": 2}, {"resident": "host"}):
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=rf"features.{name}: {value} is for features.*set {name} to (none|1|bf)"):
            FeaturesConfig(**settings)
    config = change(cached, "model", positions=PositionsConfig("mlp_pe", n_points=5))
    with pytest.raises(ValueError, match=r"n_points is 5; set it to 1, or pool to 1"):
        parts_of(change(config, "data", features=FeaturesConfig("cache", pool=2)))


def test_a_run_keeps_the_form_of_its_features(cached):
    cached = change(cached, "training", max_steps=1)
    train(cached)
    for settings in ({"dtype": "int8"}, {"pool": 2}):
        (name,) = settings
        other = change(cached, "data", features=dataclasses.replace(cached.data.features, **settings))
        with pytest.raises(ValueError, match=rf"run of other settings \(data.features.{name}"):
            train(other)
    train(change(cached, "data", features=dataclasses.replace(cached.data.features, resident="host")))


# ---------------------------------------------------------------------------- resident
def resident(config, where, **data):
    return change(config, "data", features=dataclasses.replace(config.data.features, resident=where), **data)


def curve_of(config, on_log=None):
    run = train(config, on_log)
    metrics = [{k: e[k] for k in ("loss", "eval_loss") if k in e} for e in read_metrics(run / "metrics.jsonl")]
    return metrics, load_file(run / "model" / "model.safetensors")


@pytest.fixture
def mixed(cached, sample_files, tmp_path):
    """A short cached run over several epochs, with hidden views and with sets of different numbers of views."""
    records = read_samples(sample_files["anchors_train"])
    scenes = list(dict.fromkeys(record["scene_id"] for record in records))[:3]
    records = [record for record in records if record["scene_id"] in scenes]
    for record in records:
        if record["scene_id"] == scenes[0]:
            for key in ("images", "depths", "view_ids", "quarter_turns"):
                record.update({key: record[key][:4]} if record.get(key) else {})
            record["geom_token"] = {key: values[:4] for key, values in record["geom_token"].items()}
    root = load_samples([sample_files["anchors_train"]])[0].root
    write_samples(tmp_path / "mixed.jsonl", records, {"root": root})
    config = change(cached, "data", train_files=(str(tmp_path / "mixed.jsonl"),), view_dropout=0.4)
    return change(config, "training", max_steps=6, eval_every_steps=3, num_eval_samples=2, save_every_steps=6)


@pytest.mark.parametrize(
    "where, num_workers",
    [
        ("host", 0),
        ("device", 2),
        pytest.param("device", 0, marks=pytest.mark.slow),
        pytest.param("host", 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_on_resident_features_repeats_the_run_on_files(mixed, where, num_workers, capsys):
    """Also where the cache is filled as it goes; what is held is read no more, so its files may go."""
    expected, weights = curve_of(mixed)
    num_sets = len(files_of(mixed))
    assert len({file.stat().st_size // 1000 for file in files_of(mixed)}) == 2  # sets of different sizes
    gone = []

    def remove(entry):
        if "eval_loss" in entry and not gone:  # by now, all sets were seen
            gone.extend(files_of(mixed))
            for file in gone:
                file.unlink()

    config = with_features(mixed, mixed.data.features.folder, on_missing="error")
    config = resident(dataclasses.replace(config, run_name="resident"), where, num_workers=num_workers)
    found, held = curve_of(config, remove)
    assert found == expected and len(gone) == num_sets
    assert all(torch.equal(held[name], value) for name, value in weights.items())
    printed = capsys.readouterr().out
    assert f"data.features.resident {where}: {num_sets} view sets take 0.000" in printed and "GB are free" in printed
    filling = resident(dataclasses.replace(mixed, run_name="filling"), where, num_workers=num_workers)
    assert curve_of(filling)[0] == expected and len(files_of(mixed)) == num_sets


def test_files_of_resident_features_are_read_once(mixed, monkeypatch):
    fill_cache(mixed)
    reads = []
    load = Store._load
    monkeypatch.setattr(Store, "_load", lambda self, path, *a, **k: reads.append(path) or load(self, path, *a, **k))
    curve_of(resident(mixed, "host", cache_scenes=0))
    features = [path for path in reads if path.parent.name.startswith("features")]
    # The samples that say how large the run is are read before anything can stay.
    before = len({s.view_key for s in load_samples(mixed.data.train_paths)[:16]}) + 1
    assert len(set(features)) == 4 and len(features) <= 4 + before


def test_what_is_held_does_not_change_with_its_file(mixed):
    fill_cache(mixed)
    model, collator, samples = parts_of(mixed)
    collator.hold(Residence(False, [sample.view_key for sample in samples]))
    expected = loss_and_gradients(model, collator(samples[:2]))[0]
    for file in files_of(mixed):
        file.write_bytes(bytes(file.stat().st_size))  # over what is mapped
    batch = collator(samples[:2])
    assert set(batch["features"][0]) == {"number", "sizes"} and batch["pixel_values"] == [None]
    assert torch.equal(loss_and_gradients(model, batch)[0], expected)


def test_features_that_do_not_fit_are_refused_before_the_run(mixed, monkeypatch):
    monkeypatch.setattr(residence_module, "available_memory", lambda: 100_000)
    with pytest.raises(
        ValueError, match=r"host: 4 view sets take 0.000287 GB and 9e-05 GB of the host's memory may be"
    ):
        train(resident(mixed, "host"))
    assert not list(mixed.run_dir.glob("checkpoints/*"))


# ---------------------------------------------------------------------------- hidden views
@pytest.mark.parametrize("kind", ["perceiver", "reference"])
def test_hidden_views_equal_views_whose_tokens_are_not_there(kind):
    model = make(resampler=ResamplerConfig(4, 2, 32, 64, 16, max_views=8, kind=kind)).eval()
    shake(model)
    width = 2 * model.encoder.config.embed_dim
    taps, positions = [torch.randn(2, 4, 11, width)], torch.randn(2, 4, 6, width)
    seen = torch.tensor([[True, False, True, False], [True, True, True, True]])
    masked = model.resampler(taps, 5, (2, 3), positions, seen)
    whole = model.resampler(taps, 5, (2, 3), positions)
    assert torch.allclose(masked[1], whole[1], atol=1e-6) and not torch.allclose(masked[0], whole[0], atol=1e-3)
    if kind == "perceiver":  # its view embeddings are not renumbered: the third view keeps the third
        with torch.no_grad():
            model.resampler.view_embedding[1] = model.resampler.view_embedding[2]
    kept = [taps[0][:1, [0, 2]]], positions[:1, [0, 2]]
    assert torch.allclose(model.resampler(kept[0], 5, (2, 3), kept[1])[0], masked[0], atol=1e-6)

    records, has = torch.randn(2, 4, 32), torch.tensor([True, True])
    masked = model.geometry_encoder(records, has, seen)
    kept = model.geometry_encoder(records[:1, [0, 2]], has[:1])
    assert torch.allclose(masked[0], kept[0], atol=1e-6)


def test_nothing_behind_the_encoder_sees_a_hidden_view():
    """Not its features, geometry or positions; the encoder does see its pixels."""
    model = make(freeze_vggt=True, tap_layers=(0, -1)).train()
    shake(model)
    batch = make_batch(model, (3, 3), (9, 6))
    batch["has_geometry"][:] = True
    hidden = [torch.tensor([True, False, True]), torch.tensor([True, True, True])]
    batch |= {"view_mask": hidden}
    caught = []

    def catch(module, args):
        taps = [tap.detach().requires_grad_() for tap in args[0]]
        caught.extend(taps)
        return (taps, *args[1:])

    handle = model.resampler.register_forward_pre_hook(catch)
    for name in ("geometry_records", "patch_coordinates"):
        batch[name] = [value.clone().requires_grad_() for value in batch[name]]
    loss, _ = loss_and_gradients(model, batch)
    gradients = [tap.grad for tap in caught] + [
        torch.stack([value.grad for value in batch[name]]) for name in ("geometry_records", "patch_coordinates")
    ]
    for gradient in gradients:
        assert (gradient[0, 1] == 0).all()
        assert all(gradient[s, v].abs().sum() > 0 for s in range(2) for v in range(3) if (s, v) != (0, 1))
    handle.remove()
    batch = {name: value for name, value in batch.items()}
    batch["pixel_values"] = [p.clone() for p in batch["pixel_values"]]
    batch["pixel_values"][0][1] = 255 - batch["pixel_values"][0][1]
    assert model(**batch).loss != loss


def test_views_are_hidden_by_the_draw_of_their_group(tiny_config):
    config = change(tiny_config, "data", view_dropout=0.3)
    _, collator, samples = parts_of(config)
    sample = samples[0]
    drawn = [dataclasses.replace(sample, draw=draw) for draw in range(4000)]
    hidden = np.array([collator.hidden_views(s) for s in drawn])
    assert not hidden[:, 0].any()
    assert np.abs(hidden[:, 1:].mean(0) - 0.3).max() < 4 * np.sqrt(0.21 / 4000)
    assert np.abs(np.corrcoef(hidden[:, 1:].T) - np.eye(5)).max() < 0.07  # views are hidden one by one
    assert collator.hidden_views(drawn[7]) == collator.hidden_views(drawn[7])
    assert collator.hidden_views(sample) == (False,) * 6  # a held-out sample has no draw
    same = [s for s in samples if s.view_key == sample.view_key][:4]
    batch = collator([dataclasses.replace(s, draw=7) for s in same])
    assert len(batch["pixel_values"]) == 1 and batch["view_mask"][0].tolist() == (~hidden[7]).tolist()
    assert "view_mask" not in collator(same)
    plain = change(tiny_config, "data", augmentation=AugmentationConfig(yaw_deg=90))
    both = change(plain, "data", view_dropout=0.3)
    changes = [parts_of(c)[1].augmentation(drawn[3]) for c in (plain, both)]
    assert changes[0] == changes[1]  # what a draw turns does not depend on what it hides
