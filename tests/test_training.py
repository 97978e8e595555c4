"""Runs: batches in order, the same loss twice, resuming where a run was stopped, and one clear error for bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import get_scheduler

from roomplan_lib.config import parse, to_dict
from roomplan_lib.files import file_hash
from roomplan_lib.samples import read_manifest, read_samples, sample_root
from roomplan_lib.training.checkpoint import list_checkpoints
from roomplan_lib.training.collator import Sample, load_samples
from roomplan_lib.training.metrics import read_metrics
from roomplan_lib.training.run import load_model_folder, make_collator, make_model, make_tokenizer, train
from roomplan_lib.training.sampler import GroupedBatchSampler
from roomplan_lib.training.trainer import parameter_groups, schedule_factor


def losses(run_dir):
    return {e["step"]: e["loss"] for e in read_metrics(run_dir / "metrics.jsonl") if "loss" in e}


def with_training(config, **changes):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def test_run_folder_holds_everything_and_the_loss_falls(tiny_config):
    config = with_training(tiny_config, max_steps=12, resampler_learning_rate=5e-4, encoder_learning_rate=2e-4)
    entries = []
    run_dir = train(config, on_log=entries.append)
    assert entries == read_metrics(run_dir / "metrics.jsonl")
    assert list(losses(run_dir)) == list(range(1, 13))
    language_model = config.training.learning_rate  # the rate that is shown
    assert [e["learning_rate"] for e in entries if "loss" in e] == pytest.approx(
        [language_model * schedule_factor(step, config.training) for step in range(12)]
    )
    assert np.mean(list(losses(run_dir).values())[-3:]) < losses(run_dir)[1] - 0.5
    assert [e["step"] for e in entries if "eval_loss" in e] == [3, 6, 9, 12]
    rates = ("samples_per_s", "tokens_per_s", "memory_gb", "grad_norm")
    assert all(e[name] > 0 for e in entries if "loss" in e for name in rates)
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["step"], status["max_steps"], status["world_size"]) == ("finished", 12, 12, 1)
    record = json.loads((run_dir / "run.json").read_text())
    assert record["global_batch_size"] == 8 and record["model_sha256"] == file_hash(run_dir / "model/model.safetensors")
    assert yaml.safe_load((run_dir / "run.yaml").read_text()) == to_dict(config)
    assert json.loads((run_dir / "run.json").read_text())["versions"]["torch"] == torch.__version__
    assert [p.name for p in list_checkpoints(run_dir / "checkpoints")] == ["checkpoint-10", "checkpoint-12"]
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 13))
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(list(losses(run_dir).values()))
    trained, _ = load_model_folder(run_dir / "model")
    assert parse(type(config.model), trained.config.model) == config.model
    before = (run_dir / "model" / "model.safetensors").stat().st_mtime_ns
    assert train(config) == run_dir  # complete: nothing is done again
    assert (run_dir / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_same_seed_same_loss_other_seed_other_loss(tiny_config, tmp_path):
    config = with_training(tiny_config, max_steps=3, eval_every_steps=0)
    runs = [
        losses(train(dataclasses.replace(config, runs_dir=str(tmp_path / name), seed=seed)))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_other_settings_are_refused_by_name(tiny_config):
    train(with_training(tiny_config, max_steps=1))
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.001 -> 0.002.*choose another run_name"):
        train(with_training(tiny_config, max_steps=1, learning_rate=0.002))


def test_other_samples_are_refused_by_name(tiny_config, sample_files, tmp_path):
    config = damaged_copy(tiny_config, sample_files, tmp_path, lambda lines: lines)
    config = with_training(config, max_steps=1, eval_every_steps=0)
    train(config)
    damaged_copy(tiny_config, sample_files, tmp_path, lambda lines: lines[:-1])
    with pytest.raises(ValueError, match=r"other samples than .*damaged.jsonl"):
        train(config)
    with pytest.raises(ValueError, match=r"absent.jsonl is missing; make samples"):
        train(
            dataclasses.replace(
                config, run_name="b", data=dataclasses.replace(config.data, train_files=("absent.jsonl",))
            )
        )


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_rates_are_those_of_the_published_schedules(tiny_config, name):
    """transformers' own schedulers, stepped once per optimizer step."""
    settings = with_training(tiny_config, max_steps=40, warmup_ratio=0.15, lr_scheduler=name).training
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"num_warmup_steps": 6} | ({} if name.startswith("constant") else {"num_training_steps": 40})
    scheduler = get_scheduler(name, optimizer, **options)
    expected = []
    for _ in range(40):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert [schedule_factor(step, settings) for step in range(40)] == pytest.approx(expected)


def test_nothing_to_train_is_an_error(tiny_config):
    tokenizer = make_tokenizer(tiny_config, load_samples(tiny_config.data.train_paths))
    model = make_model(tiny_config, tokenizer)
    assert parameter_groups(model, tiny_config)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model.requires_grad_(False), tiny_config)


def test_a_device_that_is_not_there_is_an_error(tiny_config):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA device"):
            train(with_training(tiny_config, device="cuda"))
    with pytest.raises(ValueError, match=r"training.device: expected one of auto, cpu, cuda, got 'gqu'"):
        parse(type(tiny_config), {"training": {"device": "gqu"}})


# ---------------------------------------------------------------------------- order of samples
def fake_samples(sizes, tmp_path):
    return [
        Sample({"images": [f"{scene}.png"], "scene_id": str(scene)}, tmp_path)
        for scene, size in enumerate(sizes)
        for _ in range(size)
    ]


def test_sampler_groups_by_views_and_covers_every_sample(tmp_path):
    samples = fake_samples([7, 4, 9, 1], tmp_path)
    order = list(GroupedBatchSampler(samples, micro_batch_size=8, group_size=4, num_steps=40, seed=0))
    assert len(order) == 40
    groups = 2 + 1 + 3 + 1  # groups in one pass
    flat = [i for batch in order for i, _ in batch]
    counts = np.bincount(flat)
    assert len(counts) == len(samples) and np.ptp(counts) <= 2  # a group that waits for a step is in the next pass
    for batch in order:
        drawn = [(samples[i].view_key, draw) for i, draw in batch]
        runs = 1 + sum(a != b for a, b in zip(drawn, drawn[1:], strict=False))
        assert runs <= 2 and len(batch) <= 8  # a group has one view set and one draw
    assert len({draw for batch in order for _, draw in batch}) == 80  # and each its own
    again = list(GroupedBatchSampler(samples, micro_batch_size=8, group_size=4, num_steps=40, seed=0))
    other = list(GroupedBatchSampler(samples, micro_batch_size=8, group_size=4, num_steps=40, seed=1))
    assert again == order and other != order
    assert order[:groups] != order[groups : 2 * groups]


def test_a_step_mixes_eight_scenes_and_cuts_by_length(tmp_path):
    """Twelve scenes, one of them with a third of all questions; steps of ten groups in five micro-batches."""
    samples = [
        Sample({"images": [str(scene)], "scene_id": str(scene), "question": "?" * (5 + 3 * scene)}, tmp_path)
        for scene, size in enumerate([66] + [12] * 11)
        for _ in range(size)
    ]
    options = {"micro_batch_size": 6, "group_size": 3, "num_steps": 40, "seed": 0, "accumulation": 5}
    sampler = GroupedBatchSampler(samples, **options)
    batches = list(sampler)
    for number, drawn in enumerate(sampler.steps()):
        scenes = [samples[members[0]].record["scene_id"] for members, _ in drawn]
        assert len(drawn) == 10 and len(set(scenes)) >= 8
        lengths = [sum(len(samples[i].record["question"]) for i, _ in b) for b in batches[5 * number : 5 * number + 5]]
        assert lengths == sorted(lengths)
        step = sorted(i for batch in batches[5 * number : 5 * number + 5] for i, _ in batch)
        assert step == sorted(int(i) for members, _ in drawn for i in members)
    assert list(GroupedBatchSampler(samples, start_step=23, **options)) == batches[23 * 5 :]
    counts = np.bincount([i for batch in batches for i, _ in batch], minlength=len(samples))
    assert counts.min() >= 5 and counts.max() <= 7  # 1,200 draws of 198 samples


def test_sources_are_drawn_by_their_shares(tmp_path):
    """0.7 of the samples from a file of ten, 0.3 from one of a hundred, evenly throughout the run."""
    samples = [
        Sample({"images": [f"{source}/{i // 5}"], "scene_id": "a"}, tmp_path, source)
        for source, count in enumerate((10, 100))
        for i in range(count)
    ]
    sampler = GroupedBatchSampler(samples, micro_batch_size=10, group_size=5, num_steps=400, seed=0, shares=(0.7, 0.3))
    sources = np.array([[samples[i].source for i, _ in batch] for batch in sampler])
    for part in (sources[:50], sources[50:200], sources[200:]):
        assert part.mean() == pytest.approx(0.3, abs=0.02)
    counts = np.bincount([i for batch in sampler for i, _ in batch])
    assert np.ptp(counts[:10]) <= 1 and np.ptp(counts[10:]) <= 1  # within a source all are seen equally often
    with pytest.raises(ValueError, match=r"train_shares: file 3 has share 0.5 and no samples"):
        GroupedBatchSampler(samples, micro_batch_size=10, group_size=5, num_steps=1, seed=0, shares=(0.3, 0.2, 0.5))


def test_each_pass_takes_one_view_set_of_a_scene(tmp_path):
    samples = [
        Sample({"images": [f"{scene}/{view_set}"], "scene_id": scene, "view_set": view_set}, tmp_path)
        for scene in "abc"
        for view_set in range(3)
        for _ in range(4)
    ]
    sampler = GroupedBatchSampler(samples, micro_batch_size=4, group_size=4, num_steps=9, seed=0)
    passes = np.array([[samples[batch[0][0]].record["images"][0] for batch in sampler]]).reshape(3, 3)
    for number in range(3):
        assert sorted(name[0] for name in passes[number]) == ["a", "b", "c"]
    assert len(set(passes.ravel())) == 9  # three passes have shown every view set once


# ---------------------------------------------------------------------------- bad input
def damaged_copy(tiny_config, sample_files, tmp_path, change):
    """The training samples in a folder of their own after `change(lines)`; pictures stay where they are."""
    source = sample_files["anchors_train"]
    lines = source.read_text().splitlines()
    target = tmp_path / "damaged.jsonl"
    target.write_text("\n".join(change(lines)) + "\n")
    manifest = read_manifest(source) | {"root": str(sample_root(source).resolve())}
    target.with_suffix(".manifest.json").write_text(json.dumps(manifest))
    return dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, train_files=(str(target),)))


def test_truncated_samples_are_named(tiny_config, sample_files, tmp_path):
    config = damaged_copy(tiny_config, sample_files, tmp_path, lambda lines: [lines[0], lines[1][:80]])
    with pytest.raises(ValueError, match=r"damaged.jsonl:2"):
        train(config)


def test_missing_picture_is_named(tiny_config, sample_files, tmp_path):
    def rename(lines):
        return [line.replace("lowres_wide/", "lowres_wide/gone_", 1) for line in lines]

    with pytest.raises(ValueError, match=r"gone_.*missing"):
        train(damaged_copy(tiny_config, sample_files, tmp_path, rename))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda r: {**r, "depths": r["depths"][:-1]}, "depths: expected 6"),
        (lambda r: {**r, "images": []}, "images"),
        (lambda r: {k: v for k, v in r.items() if k != "scene_id"}, "scene_id"),
        (lambda r: {k: v for k, v in r.items() if k != "action_json"}, "action_json"),
        (lambda r: {**r, "geom_token": {**r["geom_token"], "t": [["nan"] * 3] * 6}}, "geom_token.t"),
        (lambda r: {**r, "geom_token": {**r["geom_token"], "R": r["geom_token"]["R"][:-1]}}, "geom_token.R"),
        (lambda r: {**r, "geom_token": {**r["geom_token"], "K": [[0.0] * 9] * 6}}, "geom_token.K"),
    ],
    ids=["short depths", "no images", "no scene", "no action", "text for numbers", "short R", "zero K"],
)
def test_malformed_records_stop_the_run_before_it_starts(tiny_config, sample_files, tmp_path, change, reason):
    def damage(lines):
        return [lines[0], json.dumps(change(json.loads(lines[1])))]

    config = damaged_copy(tiny_config, sample_files, tmp_path, damage)
    with pytest.raises(ValueError, match=rf"damaged.jsonl:2: .*{reason}"):
        train(config)


def test_corrupt_picture_is_named(tiny_config, rooms_root, sample_files, tmp_path):
    record = read_samples(sample_files["anchors_train"])[0]
    copy = tmp_path / "scenes"
    for image in record["images"] + record["depths"]:
        (copy / image).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(rooms_root / image, copy / image)
    (copy / record["images"][1]).write_bytes((rooms_root / record["images"][1]).read_bytes()[:500])
    config = dataclasses.replace(tiny_config)
    samples = [Sample(record, copy)]
    tokenizer = make_tokenizer(config, samples)
    collator = make_collator(make_model(config, tokenizer), tokenizer, config.data)
    with pytest.raises(ValueError, match=r"cannot read the picture"):
        collator(samples)
    with pytest.raises(ValueError, match=r"\.\./"):
        collator([Sample({**record, "images": ["../x.png", *record["images"][1:]]}, copy)])


def test_positions_without_depth_are_an_error(tiny_config, sample_files, tmp_path):
    def drop(lines):
        return [json.dumps({k: v for k, v in json.loads(line).items() if k != "depths"}) for line in lines]

    with pytest.raises(ValueError, match="3D positions and scale jitter need geom_token and depths"):
        train(damaged_copy(tiny_config, sample_files, tmp_path, drop))


def test_empty_file_is_an_error(tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="none.jsonl"):
        load_samples([tmp_path / "none.jsonl"])
