"""A run before it starts: its tokens, memory, steps and cost, reckoned from its settings without a weight in memory.

The arithmetic of one sample is `model_card`'s. GPU-hours are an estimate for one kind of GPU, whose speed stands below
with its source; every table says what it assumes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerBase

from roomplan_lib.config import DataConfig, ModelConfig, RunConfig, to_dict
from roomplan_lib.model.describe import GIB, activations_per_token, model_card
from roomplan_lib.model.features import entry_bytes, heads_of
from roomplan_lib.model.vlm import RoomPlanConfig, RoomPlanVLM, qwen3_config
from roomplan_lib.samples.targets import response_text
from roomplan_lib.scenes import path_below
from roomplan_lib.training.collator import Sample, resized_size
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.tokenizer import TURN_END

GPU = "H200"
GPU_FLOPS = 790e12  # bf16 matrix products, measured on an H200 (989e12 on its data sheet)
ENCODER_SHARE = (0.25, 0.40)  # of GPU_FLOPS that VGGT reaches; its authors publish 0.18 for 8 views on an H100
LANGUAGE_SHARE = (0.30, 0.45)  # torchtitan reaches 0.40 (Llama-3.1-8B on H100s, bf16, eager), 0.46 compiled
NUM_MEASURED = 5000  # samples that are tokenised to learn how long they are
# Shapes of language models that a plan can be made for before their files are here (their config.json).
KNOWN_SHAPES = {
    "Qwen/Qwen3-4B-Instruct-2507": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": True,
    }
}


@dataclass(frozen=True)
class Workload:
    """What a run reads: numbers of tokens are per sample, without the visual tokens."""

    num_samples: int  # records; those of a scene's other view sets count
    num_view_sets: int
    num_scenes: int  # a pass over the data takes one view set of each
    num_views: int
    picture_size: tuple[int, int]  # (width, height) as the encoder sees it, pixels
    prompt_tokens: float  # mean
    response_tokens: float  # mean, with the end token
    longest_prompt: int
    longest_response: int
    longest: int  # prompt + response of one sample
    num_measured: int = 0  # samples that the lengths come from; 0 = assumed


# ScanQA (25,563) and SQA3D (26,623 questions to train on) about 562 scans in 4 view sets each. Lengths are assumed.
SCANNET_QUESTIONS = Workload(4 * 52_186, 4 * 562, 562, 8, (448, 336), 60, 6, 160, 40, 170)


def measure_workload(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, data: DataConfig, patch_size: int = 14
) -> Workload:
    """The workload of training samples; lengths of NUM_MEASURED of them, evenly spaced.

    Raises ValueError without samples and for a first picture that cannot be read.
    """
    if not samples:
        raise ValueError("no samples to plan a run for")
    measured = samples[:: -(-len(samples) // NUM_MEASURED)]
    prompts, responses = [], []
    for sample in measured:
        prompts.append(prompt_text(sample.record, tokenizer, 1, data.visual_first, codec=data.codec))
        responses.append(response_text(sample.record, codec=data.codec) + TURN_END)
    prompt, response = (
        np.array([len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]])
        for texts in (prompts, responses)
    )
    prompt -= 1  # the placeholder
    return Workload(
        num_samples=len(samples),
        num_view_sets=len({sample.view_key for sample in samples}),
        # As the sampler has it: view sets without a number are all taken in every pass.
        num_scenes=len({(s.root, s.record["scene_id"]) if "view_set" in s.record else s.view_key for s in samples}),
        num_views=round(float(np.median([len(sample.record["images"]) for sample in measured]))),
        picture_size=_picture_size(samples[0], data.image_size, patch_size),
        prompt_tokens=float(prompt.mean()),
        response_tokens=float(response.mean()),
        longest_prompt=int(prompt.max()),
        longest_response=int(response.max()),
        longest=int((prompt + response).max()),
        num_measured=len(measured),
    )


def planned_model(settings: ModelConfig, data: DataConfig, vocab_size: int = 0) -> RoomPlanVLM:
    """The model of the settings on the meta device: all of its shapes, none of its weights.

    vocab_size: entries of the tokenizer, where the run trains its own. Raises ValueError when the shape of a named
    language model is not known.
    """
    name = settings.language_model.name
    if not name:
        shape = qwen3_config(settings.language_model, vocab_size or settings.language_model.vocab_size)
    elif name in KNOWN_SHAPES:
        shape = KNOWN_SHAPES[name]
    else:
        try:
            shape = AutoConfig.from_pretrained(name).to_dict()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"model.language_model.name: cannot read the config of {name}: {reason}") from None
    with torch.device("meta"):
        return RoomPlanVLM(RoomPlanConfig(to_dict(settings), shape, {"max_length": data.max_length}))


def training_plan(config: RunConfig, workload: Workload, *, num_processes: int = 0, vocab_size: int = 0) -> dict:
    """Tokens, memory of one process, steps and cost of the run, as plain numbers: bytes, FLOPs, hours of one GPU.

    num_processes: of all nodes together; 0 = what the settings say of one node, or 1 where that is one per GPU.
    GPU-hours come as (least, most). Raises ValueError as `planned_model` and `model_card` do.
    """
    training = config.training
    processes = num_processes or config.distributed.num_processes or 1
    model = planned_model(config.model, config.data, vocab_size)
    text, response = (round(workload.prompt_tokens + workload.response_tokens), round(workload.response_tokens))
    card = model_card(model, workload.num_views, workload.picture_size, max(text, 1), max(response, 1))
    longest = model_card(model, workload.num_views, workload.picture_size, workload.longest, workload.longest_response)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cached = bool(config.data.features.folder) and config.model.freeze_vggt
    feature_bytes = entry_bytes(
        model.encoder, len(config.model.tap_layers), workload.num_views, workload.picture_size,
        config.data.features.dtype, heads_of(config.model), config.data.features.pool,
    )  # fmt: skip
    resident = feature_bytes * workload.num_view_sets if config.data.features.resident == "device" else 0.0
    global_batch = training.micro_batch_size * training.gradient_accumulation_steps * processes
    seen = global_batch * training.max_steps
    per_set = workload.num_samples / max(workload.num_view_sets, 1)
    share = per_set / math.ceil(per_set / training.group_size)  # samples that share one encoding, on average
    per_sample = {
        part: flops / (1 if part == "language_model" else share) for part, flops in card["train_flops"].items()
    }
    encode_once = 0.0
    if cached:
        per_sample["encoder"] = 0.0
        encode_once = card["forward_flops"]["encoder"] * workload.num_view_sets
    flops = {part: value * seen for part, value in per_sample.items()}
    hours = tuple(
        ((flops["encoder"] + encode_once) / encoder + (sum(flops.values()) - flops["encoder"]) / language)
        / GPU_FLOPS
        / 3600
        for encoder, language in zip(reversed(ENCODER_SHARE), reversed(LANGUAGE_SHARE), strict=True)
    )
    return {
        "workload": dataclasses.asdict(workload),
        "tokens": {
            "visual": model.num_visual_tokens,
            "prompt": workload.longest_prompt,
            "response": workload.longest_response,
            "longest": model.num_visual_tokens + workload.longest,
            "max_length": config.data.max_length,
        },
        "parameters": {"all": card["parts"][-1][1], "trainable": trainable},
        "memory_bytes": _memory(
            config, longest, model, workload.longest_response, processes, share, feature_bytes if cached else None
        )
        | {"resident features": resident},
        "steps": {
            "steps": training.max_steps,
            "processes": processes,
            "samples a step": global_batch,
            "samples seen": seen,
            "passes": seen * workload.num_view_sets / (workload.num_samples * workload.num_scenes),
            "evaluations": training.max_steps // training.eval_every_steps if training.eval_every_steps else 0,
            "checkpoints": -(-training.max_steps // training.save_every_steps),
            "checkpoint bytes": 12 * trainable,  # float32 weights and AdamW's two moments
        },
        "features": {"cached": cached, "bytes": feature_bytes * workload.num_view_sets, "encode flops": encode_once},
        "flops_per_sample": per_sample,
        "flops": flops,
        "gpu_hours": hours,
    }


def plan_table(plans: dict[str, dict]) -> str:
    """Plans of runs side by side as a Markdown table, with what they assume below it."""
    rows = {
        "**tokens**: visual + prompt + response, longest": lambda p: (
            f"{p['tokens']['visual']} + {p['tokens']['prompt']} + {p['tokens']['response']}"
        ),
        "longest sample of data.max_length": lambda p: (
            f"{p['tokens']['longest']:,} of {p['tokens']['max_length']:,}"
            + (" **too long**" if p["tokens"]["longest"] > p["tokens"]["max_length"] else "")
        ),
        "**parameters**, of them trained": lambda p: (
            f"{p['parameters']['all'] / 1e6:,.1f} M, {p['parameters']['trainable'] / 1e6:,.1f} M"
        ),
        "**memory** of a process (GiB)": lambda p: f"**{sum(p['memory_bytes'].values()) / GIB:.2f}**",
        **{
            f"... {part}": lambda p, part=part: f"{p['memory_bytes'][part] / GIB:.2f}"
            for part in next(iter(plans.values()))["memory_bytes"]
        },
        "**steps** x samples a step, on processes": lambda p: (
            f"{p['steps']['steps']:,} x {p['steps']['samples a step']:,}, {p['steps']['processes']}"
        ),
        "samples seen, passes over the data": lambda p: f"{p['steps']['samples seen']:,}, {p['steps']['passes']:,.1f}",
        "evaluations, checkpoints of so many GB": lambda p: (
            f"{p['steps']['evaluations']}, {p['steps']['checkpoints']} of {p['steps']['checkpoint bytes'] / 1e9:.2g}"
        ),
        "encoder": lambda p: (
            f"once, {p['features']['bytes'] / 1e9:,.3g} GB on disk" if p["features"]["cached"] else "in every step"
        ),
        "**cost**: TFLOP a sample": lambda p: f"{sum(p['flops_per_sample'].values()) / 1e12:.3g}",
        "... encoder, resampler, language model": lambda p: ", ".join(
            f"{p['flops_per_sample'][part] / 1e12:.2g}" for part in ("encoder", "resampler", "language_model")
        ),
        "EFLOP in all, with filling the cache": lambda p: (
            f"{(sum(p['flops'].values()) + p['features']['encode flops']) / 1e18:,.3g}"
        ),
        f"**{GPU}-hours**": lambda p: _span(p["gpu_hours"]),
        f"hours on so many {GPU}s as processes": lambda p: _span([h / p["steps"]["processes"] for h in p["gpu_hours"]]),
    }
    lines = [["", *plans], ["---"] * (len(plans) + 1)]
    lines += [[title, *(cell(plan) for plan in plans.values())] for title, cell in rows.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told = "; ".join(
        f"{name}: {w['num_samples']:,} samples, {w['num_scenes']:,} scenes, {w['num_view_sets']:,} sets of "
        f"{w['num_views']} views, "
        f"{w['picture_size'][0]} x {w['picture_size'][1]} pixels, lengths "
        + (f"of {w['num_measured']:,} samples" if w["num_measured"] else "assumed")
        for name, w in ((name, plan["workload"]) for name, plan in plans.items())
    )
    return (
        f"{table}\n\nReckoned, not measured. {told}. Memory is for samples of the longest length. {GPU}-hours: "
        f"{GPU_FLOPS / 1e12:.0f} TFLOP/s in bf16, of which the encoder reaches {ENCODER_SHARE[0]:.0%} to "
        f"{ENCODER_SHARE[1]:.0%} and the rest {LANGUAGE_SHARE[0]:.0%} to {LANGUAGE_SHARE[1]:.0%}; evaluation, loading "
        "and starting come on top, and models too small to fill a GPU take longer."
    )


def _memory(
    config: RunConfig,
    card: dict,
    model: RoomPlanVLM,
    num_logits: int,
    processes: int,
    share: float,
    feature_bytes: float | None,
) -> dict[str, float]:
    """Bytes of one process by part, for a micro batch of samples as `card` describes one.

    share: samples that share one encoding; feature_bytes: of one view set from the cache, None = encoded live.
    """
    training, distributed, one = config.training, config.distributed, card["memory_bytes"]
    sets = training.micro_batch_size / share
    shards = processes if distributed.strategy == "zero3" and processes > 1 else 1
    optimizer = one["gradients and AdamW"]
    language = one["language model activations"]
    if training.gradient_checkpointing:  # a layer's input is kept of all layers, the rest of one at a time
        lm = model.language_model.config
        kept = lm.num_hidden_layers * lm.hidden_size + activations_per_token(lm) / lm.num_hidden_layers
        logits = 16 * num_logits * lm.vocab_size  # as in `model_card`
        language = (language - logits) * kept / activations_per_token(lm) + logits
    return {
        "weights": 0.0 if distributed.offload == "all" else one["weights"] / shards,
        "gradients and AdamW": optimizer / shards * (1 if distributed.offload == "none" else 1 / 3),
        "encoder activations": sets * (one["encoder activations"] if feature_bytes is None else feature_bytes),
        "resampler activations": sets * one["resampler activations"],
        "language model activations": training.micro_batch_size * language,
    }


def _picture_size(sample: Sample, image_size: int, patch_size: int) -> tuple[int, int]:
    path = path_below(sample.root, sample.record["images"][0])
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except OSError as error:
        raise ValueError(f"{path}: cannot read the picture: {error}") from None
    if (sample.record.get("quarter_turns") or [0])[0] % 2:
        width, height = height, width
    return resized_size(width, height, image_size, patch_size)


def _span(hours: Sequence[float]) -> str:
    least, most = hours
    return "below 0.01" if most < 0.01 else f"{least:.3g} to {most:.3g}"
