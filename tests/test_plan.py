"""The plan of a run against published and counted numbers, and against what real models and files hold."""

import dataclasses

import pytest
import torch

from roomplan_lib.config import DistributedConfig, FeaturesConfig, load_run_config
from roomplan_lib.model.describe import GIB
from roomplan_lib.training.collator import load_samples
from roomplan_lib.training.plan import (
    GPU_FLOPS,
    SCANNET_QUESTIONS,
    Workload,
    measure_workload,
    plan_table,
    planned_model,
    training_plan,
)
from roomplan_lib.training.run import make_collator, make_model, make_tokenizer

PARAMS = "papermill_runs/params"
TERA = 1e12
# 8 square views of 448 pixels, one tapped layer, 200 tokens of which 64 are text: the case that was counted.
COUNTED = Workload(51, 1, 1, 8, (448, 448), 58, 6, 58, 6, 64)


def full_config(**training):
    config = load_run_config(f"{PARAMS}/stage2_3d.yaml")
    positions = dataclasses.replace(config.model.positions, method="base")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, tap_layers=(23,), positions=positions),
        data=dataclasses.replace(config.data, features=FeaturesConfig()),
        training=dataclasses.replace(config.training, micro_batch_size=1, group_size=1, **training),
    )  # fmt: skip


def test_full_size_agrees_with_counted_flops_and_parameters():
    """23.25 TFLOP of VGGT and 1.39 of the resampler, counted by torch; 4 N T of the language model, answers alone."""
    plan = training_plan(full_config(), COUNTED, num_processes=8)
    flops = {part: value / TERA for part, value in plan["flops_per_sample"].items()}
    assert flops["encoder"] == pytest.approx(23.25, rel=0.01)
    assert flops["resampler"] == pytest.approx(1.39, rel=0.05)
    assert flops["language_model"] == pytest.approx(2.97, rel=0.05)  # 136 visual + 64 text = 200 tokens
    assert plan["parameters"]["all"] == pytest.approx(909.1e6 + 4022.5e6 + 116.1e6 + 11.8e6, rel=0.002)
    everything = dataclasses.replace(COUNTED, prompt_tokens=0, response_tokens=64)
    fully = training_plan(full_config(), everything)["flops_per_sample"]["language_model"] / TERA
    logits = 2 * 2560 * 151_936 * 136 * 2 / TERA  # of the visual tokens, which the counted 3.27 had as well
    assert fully + logits == pytest.approx(3.27, rel=0.05)


def test_steps_samples_and_hours_by_hand():
    config = load_run_config(f"{PARAMS}/stage2_3d.yaml")
    plan = training_plan(config, SCANNET_QUESTIONS, num_processes=8)
    steps = plan["steps"]
    assert steps["samples a step"] == 6 * 32 * 8 and steps["samples seen"] == 30_000 * 1536
    assert steps["passes"] == pytest.approx(30_000 * 1536 / 52_186)
    assert steps["checkpoints"] == 20 and steps["evaluations"] == 60
    assert steps["checkpoint bytes"] == 12 * plan["parameters"]["trainable"]
    # Three taps of 8 x (1 + 4 + 32 x 24) tokens of 2048 values in two bytes, for four sets of 562 scans.
    assert plan["features"]["bytes"] == 3 * 8 * 773 * 2048 * 2 * 4 * 562
    assert plan["flops_per_sample"]["encoder"] == 0 and plan["features"]["encode flops"] > 0
    least, most = plan["gpu_hours"]
    total = sum(plan["flops"].values())
    encode = plan["features"]["encode flops"]
    assert least == pytest.approx((total / 0.45 + encode / 0.40) / GPU_FLOPS / 3600)
    assert most == pytest.approx((total / 0.30 + encode / 0.25) / GPU_FLOPS / 3600)
    text = plan_table({"stage2_3d": plan})
    assert f"{least:.3g} to {most:.3g}" in text and "306 of 512" in text and "30,000 x 1,536, 8" in text
    assert "lengths assumed" in text


def test_what_is_shared_or_cached_costs_less():
    live = training_plan(full_config(), COUNTED)
    config = full_config()
    grouped = dataclasses.replace(
        config, training=dataclasses.replace(config.training, micro_batch_size=8, group_size=8)
    )
    plan = training_plan(grouped, COUNTED)  # 51 questions in 7 groups
    for part, ratio in (("encoder", 51 / 7), ("resampler", 51 / 7), ("language_model", 1)):
        assert live["flops_per_sample"][part] / plan["flops_per_sample"][part] == pytest.approx(ratio)
    cached = dataclasses.replace(
        config, data=dataclasses.replace(config.data, features=FeaturesConfig("data/features"))
    )
    assert training_plan(cached, COUNTED)["flops_per_sample"]["encoder"] == 0
    thawed = dataclasses.replace(cached, model=dataclasses.replace(cached.model, freeze_vggt=False))
    assert training_plan(thawed, COUNTED)["flops_per_sample"]["encoder"] == pytest.approx(
        3 * live["flops_per_sample"]["encoder"]
    )


def test_memory_of_the_full_size():
    """Weights and states by hand; 4.51 MB of activations a token were measured on Qwen3-4B's own layers."""
    config = full_config()
    plan = training_plan(config, COUNTED)
    memory, trainable = plan["memory_bytes"], plan["parameters"]["trainable"]
    frozen = plan["parameters"]["all"] - trainable
    assert memory["weights"] == 2 * frozen + 4 * trainable
    assert memory["gradients and AdamW"] == 12 * trainable
    assert memory["language model activations"] == pytest.approx(200 * 4.51e6, rel=0.1)
    assert memory["resampler activations"] == pytest.approx(270e6, rel=0.15)  # with one context norm for all layers
    eight = dataclasses.replace(config, distributed=DistributedConfig("zero3", 8, "optimizer"))
    shared = training_plan(eight, COUNTED)["memory_bytes"]
    assert shared["weights"] == memory["weights"] / 8 and shared["gradients and AdamW"] == 4 * trainable / 8
    assert shared["language model activations"] == memory["language model activations"]
    spared = training_plan(full_config(gradient_checkpointing=True), COUNTED)["memory_bytes"]
    kept = 200 * 2 * 36 * 2560  # a layer's input each
    assert kept < spared["language model activations"] < memory["language model activations"] / 4
    away = dataclasses.replace(config, distributed=DistributedConfig("zero3", 1, "all"))
    assert training_plan(away, COUNTED)["memory_bytes"]["weights"] == 0
    assert sum(memory.values()) / GIB == pytest.approx(13, abs=2)


def test_the_workload_is_what_the_collator_makes(tiny_config):
    samples = load_samples(tiny_config.data.train_paths)
    tokenizer = make_tokenizer(tiny_config, samples)
    model = make_model(tiny_config, tokenizer)
    collator = make_collator(model, tokenizer, tiny_config.data)
    found = measure_workload(samples, tokenizer, tiny_config.data)
    lengths, responses = [], []
    for start in range(0, len(samples), 64):
        batch = collator(samples[start : start + 64])
        lengths += batch["attention_mask"].sum(1).tolist()
        responses += (batch["labels"] >= 0).sum(1).tolist()
    assert found.num_samples == found.num_measured == len(samples)
    assert found.longest + model.num_visual_tokens == max(lengths) and found.longest_response == max(responses)
    assert found.prompt_tokens + found.response_tokens + model.num_visual_tokens == pytest.approx(
        sum(lengths) / len(lengths)
    )
    views = collator.view_set(samples[0])
    assert found.picture_size == tuple(views.pixel_values.shape[:1:-1]) and found.num_views == len(views.pixel_values)
    assert (found.num_view_sets, found.num_scenes) == (8, 8)
    planned = planned_model(tiny_config.model, tiny_config.data, len(tokenizer))
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(p.is_meta for p in planned.parameters())
    plan = training_plan(tiny_config, found, vocab_size=len(tokenizer))
    assert plan["parameters"]["all"] == sum(p.numel() for p in model.parameters())
    short = dataclasses.replace(tiny_config, data=dataclasses.replace(tiny_config.data, max_length=20))
    assert "**too long**" in plan_table({"a": plan, "b": training_plan(short, found)}).splitlines()[3]


def test_an_unknown_language_model_is_named(tiny_config, tmp_path):
    language_model = dataclasses.replace(tiny_config.model.language_model, name=str(tmp_path / "nowhere"))
    settings = dataclasses.replace(tiny_config.model, language_model=language_model)
    with pytest.raises(ValueError, match="model.language_model.name: cannot read the config of .*nowhere"):
        planned_model(settings, tiny_config.data)
    with pytest.raises(ValueError, match="no samples"):
        measure_workload([], None, tiny_config.data)


def test_a_plan_touches_no_memory_of_the_full_size():
    before = torch.get_default_device()
    model = planned_model(full_config().model, full_config().data)
    assert all(p.is_meta for p in model.parameters()) and torch.get_default_device() == before
