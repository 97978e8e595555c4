"""A run before it starts: its tokens, memory, steps, speed and cost, reckoned from its settings without a weight in
memory; and once it has run, what was planned beside what was measured.

The arithmetic of one sample is `model_card`'s; what the questions of one view set share is counted once for all of
them. How fast the machine is comes from `machine`; every table says what it assumes.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, PreTrainedTokenizerBase

from roomplan_lib.config import DataConfig, ModelConfig, RunConfig, to_dict
from roomplan_lib.model.describe import (
    GIB,
    language_model_bytes,
    language_model_flops,
    language_model_training_flops,
    model_card,
)
from roomplan_lib.model.features import entry_bytes, heads_of
from roomplan_lib.model.shared_prefix import prefix_length
from roomplan_lib.model.vlm import RoomPlanConfig, RoomPlanVLM, qwen3_config
from roomplan_lib.samples.targets import response_text
from roomplan_lib.scenes import path_below
from roomplan_lib.training.collator import Sample, resized_size
from roomplan_lib.training.launch import num_nodes, processes_per_node
from roomplan_lib.training.machine import Machine, free_memory, known_gpu, machine_at_hand
from roomplan_lib.training.memory import USABLE
from roomplan_lib.training.processes import Processes, resolve_device
from roomplan_lib.training.prompt import prompt_text
from roomplan_lib.training.sampler import GroupedBatchSampler
from roomplan_lib.training.strategy import compiled_layers
from roomplan_lib.training.tokenizer import IMAGE_TOKEN, TURN_END

GPU = "H200"  # whose hours a run on no GPU is told in
NUM_MEASURED = 5000  # samples that are tokenised to learn how long they are
FILLS_A_GPU = 4096  # tokens of a micro-batch from which on a large model keeps a GPU busy
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
    prefix_tokens: int | None = 4  # of the prompt, before the visual tokens; None = not all begin alike, up to these
    group_samples: float = 0.0  # samples of a group, mean; 0 = as the numbers above give it
    row_tokens: float = 0.0  # prompt + response and padding to the longest of a micro-batch, mean; 0 = no padding


# ScanQA (25,563) and SQA3D (26,623 questions to train on) about 562 scans in 4 view sets each. Lengths are assumed.
SCANNET_QUESTIONS = Workload(4 * 52_186, 4 * 562, 562, 8, (448, 336), 60, 6, 160, 40, 170)


def measure_workload(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    num_processes: int = 0,
    patch_size: int = 14,
) -> Workload:
    """The workload of training samples, as the run's own sampler draws them: means over its first steps, up to
    NUM_MEASURED samples; the longest of these and of as many that are evenly spaced.

    num_processes: of the run; 0 = as many as `launch` would start here.
    Raises ValueError without samples and for a first picture that cannot be read.
    """
    training, data = config.training, config.data
    sampler = GroupedBatchSampler(
        samples,
        micro_batch_size=training.micro_batch_size,
        group_size=training.group_size,
        num_steps=training.max_steps,
        seed=config.seed,
        shares=data.train_shares,
        accumulation=training.gradient_accumulation_steps * (num_processes or num_nodes() * processes_per_node(config)),
    )
    drawn: list[list[int]] = []
    for batch in sampler:
        drawn.append([i for i, _ in batch])
        if sum(map(len, drawn)) >= NUM_MEASURED:
            break
    order = [i for batch in drawn for i in batch]
    measured = sorted({*range(0, len(samples), -(-len(samples) // NUM_MEASURED)), *order})
    records = [samples[i].record for i in measured]
    prompts = tokenizer(
        [prompt_text(record, tokenizer, 1, data.visual_first, codec=data.codec) for record in records],
        add_special_tokens=False,
    )["input_ids"]
    responses = tokenizer(
        [response_text(record, codec=data.codec) + TURN_END for record in records], add_special_tokens=False
    )["input_ids"]
    prefix = prefix_length(prompts, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    prompt, response = (np.array([len(ids) for ids in texts]) for texts in (prompts, responses))
    prompt -= 1  # the placeholder
    place = {i: k for k, i in enumerate(measured)}
    batches = [[place[i] for i in batch] for batch in drawn]
    padded = sum(len(batch) * int((prompt + response)[batch].max()) for batch in batches)
    rows = [k for batch in batches for k in batch]
    return Workload(
        num_samples=len(samples),
        num_view_sets=len({sample.view_key for sample in samples}),
        # As the sampler has it: view sets without a number are all taken in every pass.
        num_scenes=len({(s.root, s.record["scene_id"]) if "view_set" in s.record else s.view_key for s in samples}),
        num_views=round(float(np.median([len(record["images"]) for record in records]))),
        picture_size=_picture_size(samples[0], data.image_size, patch_size),
        prompt_tokens=float(prompt[rows].mean()),
        response_tokens=float(response[rows].mean()),
        longest_prompt=int(prompt.max()),
        longest_response=int(response.max()),
        longest=int((prompt + response).max()),
        num_measured=len(measured),
        prefix_tokens=prefix - 1 if prefix else None,
        group_samples=len(rows) / (len(drawn) * sampler.groups_per_batch),
        row_tokens=padded / len(rows),
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


@dataclass(frozen=True)
class _Cut:
    """How the micro-batches of one process are cut, in tokens: of a shared prefix (0 = none is shared), and of what a
    question has of its own, mean and longest."""

    groups: int  # of a micro-batch
    samples: float  # of a group
    prefix: int
    own: float
    longest_own: int
    whole: float  # of a question with its prefix, without padding
    row: float  # as it is in a row of its own, padded

    @property
    def tokens(self) -> dict[str, float]:
        """Of a micro-batch: those that the language model reads, and that it would read if nothing was shared."""
        prefix, own = self.groups * self.prefix, self.groups * self.samples * self.own
        return {"prefix": prefix, "own": own, "all": prefix + own, "unshared": self.groups * self.samples * self.row}


def _cut(config: RunConfig, workload: Workload, model: RoomPlanVLM) -> _Cut:
    training = config.training
    per_set = workload.num_samples / max(workload.num_view_sets, 1)
    samples = workload.group_samples or per_set / math.ceil(per_set / training.group_size)
    whole = model.num_visual_tokens + workload.prompt_tokens + workload.response_tokens
    row = model.num_visual_tokens + workload.row_tokens if workload.row_tokens else whole
    longest, prefix = model.num_visual_tokens + workload.longest, 0
    shared = config.data.visual_first and workload.prefix_tokens is not None and not model.why_not_shared
    if shared and training.group_size > 1 and model.num_visual_tokens:
        prefix = model.num_visual_tokens + workload.prefix_tokens
    own = whole - prefix if prefix else row
    groups = training.micro_batch_size // training.group_size
    return _Cut(groups, samples, prefix, own, longest - prefix, whole, row)


def training_plan(
    config: RunConfig,
    workload: Workload,
    machine: Machine | None = None,
    *,
    num_processes: int = 0,
    vocab_size: int = 0,
) -> dict:
    """Tokens, memory of one process, steps, speed and cost of the run, as plain numbers: tokens, bytes, FLOPs, hours.

    machine: where it runs; a GPU of the kind GPU for None. num_processes: of all nodes together; 0 = as many as
    `launch` would start here. What is not known exactly comes as (least, most).
    Raises ValueError as `planned_model`, `model_card` and `processes_per_node` do.
    """
    training, machine = config.training, machine or known_gpu(GPU)
    processes = num_processes or num_nodes() * processes_per_node(config)
    model = planned_model(config.model, config.data, vocab_size)
    cut = _cut(config, workload, model)
    without = planned_memory(config, workload, model, processes, machine)
    needed, usable = sum(without.values()) - machine.held, USABLE * machine.memory
    recompute = training.gradient_checkpointing == "always"
    if training.gradient_checkpointing == "auto":
        recompute = needed > usable
    memory = planned_memory(config, workload, model, processes, machine, recompute=True) if recompute else without

    card = model_card(model, workload.num_views, workload.picture_size, recompute=recompute)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cached = bool(config.data.features.folder) and config.model.freeze_vggt
    feature_bytes = _feature_bytes(config, workload, model)
    lm, response = model.language_model.config, workload.response_tokens
    per_sample, forward = (
        {part: flops / cut.samples for part, flops in card[kind].items()} for kind in ("train_flops", "forward_flops")
    )
    per_sample["language_model"] = (
        language_model_training_flops(model, cut.prefix, 0, recompute=recompute) / cut.samples
        + language_model_training_flops(model, cut.own, response, cut.prefix, recompute=recompute)
    )  # fmt: skip
    forward["language_model"] = language_model_flops(lm, cut.prefix, 0) / cut.samples + language_model_flops(
        lm, cut.own, response, cut.prefix
    )
    encode_once = 0.0
    if cached:
        encode_once = card["forward_flops"]["encoder"] * workload.num_view_sets
        per_sample["encoder"] = forward["encoder"] = 0.0

    global_batch = cut.groups * cut.samples * training.gradient_accumulation_steps * processes
    seen = global_batch * training.max_steps
    evaluations = training.max_steps // training.eval_every_steps if training.eval_every_steps else 0
    evaluated = evaluations * training.num_eval_samples * bool(config.data.eval_files)
    question_s = _seconds(per_sample, machine)
    training_h = [
        (seen * train + evaluated * look) / processes / 3600
        for train, look in zip(question_s, _seconds(forward, machine), strict=True)
    ]
    fill_h = [s / processes / 3600 for s in machine.seconds(encode_once, 0.0)]
    gpu = machine if machine.device == "cuda" else known_gpu(GPU)
    flops = {part: value * seen for part, value in per_sample.items()}
    return {
        "workload": dataclasses.asdict(workload),
        "machine": dataclasses.asdict(machine) | {"assumes": machine.assumptions()},
        "tokens": {
            "visual": model.num_visual_tokens,
            "prompt": workload.longest_prompt,
            "response": workload.longest_response,
            "longest": model.num_visual_tokens + workload.longest,
            "max_length": config.data.max_length,
            "question": cut.whole,
            "micro-batch": cut.tokens,
            "step": {k: v * training.gradient_accumulation_steps * processes for k, v in cut.tokens.items()},
        },
        "not shared": _why_not_shared(config, workload, model, cut),
        "parameters": {"all": card["parts"][-1][1], "trainable": trainable},
        "memory_bytes": memory,
        "gradient_checkpointing": {
            "setting": training.gradient_checkpointing, "on": recompute, "needed without": needed, "usable": usable,
        },
        "steps": {
            "steps": training.max_steps,
            "processes": processes,
            "samples a step": global_batch,
            "samples a prefix": cut.samples,
            "samples seen": seen,
            "passes": seen * workload.num_view_sets / (workload.num_samples * workload.num_scenes),
            "evaluations": evaluations,
            "checkpoints": -(-training.max_steps // training.save_every_steps),
            "checkpoint bytes": 12 * trainable,  # float32 weights and AdamW's two moments
        },
        "features": {"cached": cached, "bytes": feature_bytes * workload.num_view_sets, "encode flops": encode_once},
        "flops_per_sample": per_sample,
        "flops": flops,
        "samples_per_s": tuple(processes / s for s in reversed(question_s)),
        "hours": tuple(training_h),
        "fill_hours": tuple(fill_h),
        "gpu": gpu.name,
        "gpu_hours": tuple(s / 3600 for s in _seconds({**flops, "encoder": flops["encoder"] + encode_once}, gpu)),
    }  # fmt: skip


def planned_memory(
    config: RunConfig,
    workload: Workload,
    model: RoomPlanVLM,
    processes: int,
    machine: Machine,
    *,
    recompute: bool = False,
) -> dict[str, float]:
    """Bytes of one process by part, for a micro-batch of samples of the longest length.

    model: may be on the meta device; recompute: with gradient checkpointing.
    """
    training, distributed, cut = config.training, config.distributed, _cut(config, workload, model)
    one = model_card(model, workload.num_views, workload.picture_size, recompute=recompute)["memory_bytes"]
    shards = processes if distributed.strategy == "zero3" and processes > 1 else 1
    encoder, resident = one["encoder activations"], 0.0
    if config.data.features.folder and config.model.freeze_vggt:
        encoder, held = _feature_bytes(config, workload, model), config.data.features.resident
        if held == "device" or (held == "host" and machine.device == "cpu"):
            resident = encoder * workload.num_view_sets
    num_tokens = cut.groups * cut.prefix + training.micro_batch_size * cut.longest_own
    return {
        "the program": machine.held,
        "weights": 0.0 if distributed.offload == "all" else one["weights"] / shards,
        "gradients and AdamW": one["gradients and AdamW"] / shards * (1 if distributed.offload == "none" else 1 / 3),
        "encoder activations": cut.groups * encoder,
        "resampler activations": cut.groups * one["resampler activations"],
        "language model activations": language_model_bytes(
            model,
            num_tokens,
            training.micro_batch_size * workload.longest_response,
            compiled=distributed.strategy == "ddp"
            and bool(compiled_layers(config, model, torch.device(machine.device))),
            recompute=recompute,
        ),
        "resident features": resident,
    }


def settle_checkpointing(
    config: RunConfig, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> RunConfig:
    """`config` with training.gradient_checkpointing auto made always or never, for all processes alike: never where
    the memory of the plan is below nine tenths of what is free. Prints which, with the two numbers."""
    if config.training.gradient_checkpointing != "auto":
        return config
    free = min(processes.gather(free_memory(processes.device.type, processes_per_node(config))))
    workload = processes.on_first(measure_workload, samples, tokenizer, config, processes.world_size)
    model = planned_model(config.model, config.data, len(tokenizer))
    machine = Machine("", "", (), (), free, processes.device.type)  # no speed is asked for
    needed = sum(planned_memory(config, workload, model, processes.world_size, machine).values())
    fits = needed <= USABLE * free
    print(
        f"gradient checkpointing {'off' if fits else 'on'}: without it a process takes about {needed / GIB:.2f} GiB, "
        f"of {USABLE * free / GIB:.2f} GiB that it may use"
    )
    training = dataclasses.replace(config.training, gradient_checkpointing="never" if fits else "always")
    return dataclasses.replace(config, training=training)


def plan_machine(config: RunConfig, workload: Workload, vocab_size: int = 0) -> Machine:
    """The machine at hand, measured where need be with the matrix products of the run's own step."""
    model = planned_model(config.model, config.data, vocab_size)
    cut = _cut(config, workload, model)
    tokens = model_card(model, workload.num_views, workload.picture_size)["tokens"]
    latents = cut.groups * config.model.resampler.num_latents
    rows = {"encoder": cut.groups * tokens["encoder"], "resampler": latents, "language_model": cut.tokens["all"]}
    products: dict[str, Counter] = {"encoder": Counter(), "rest": Counter()}
    for name, part in model.parts().items():
        for path, module in part.named_modules():
            if not isinstance(module, torch.nn.Linear) or name not in rows:
                continue
            length = rows[name]
            if name == "resampler" and module.in_features == 2 * model.encoder.config.embed_dim:
                length = cut.groups * tokens["context"]  # keys and values
            elif path.endswith("lm_head"):
                length = cut.groups * cut.samples * workload.response_tokens
            kind = "encoder" if name == "encoder" else "rest"
            products[kind][round(length), module.in_features, module.out_features] += 1
    dtypes = [
        torch.bfloat16 if config.training.bf16 or str(next(p.dtype for p in part.parameters())) == "torch.bfloat16"
        else torch.float32
        for part in (model.encoder, model.language_model)
    ]  # fmt: skip
    return machine_at_hand(
        resolve_device(config.training.device),
        *([(*shape, count) for shape, count in part.items()] for part in products.values()),
        tuple(dtypes),
        processes_per_node(config),
    )


def plan_table(plans: dict[str, dict]) -> str:
    """Plans of runs side by side as a Markdown table, with what they assume below it."""
    rows = {
        "machine": lambda p: f"{p['machine']['name']}, {p['steps']['processes']} process(es)",
        "**tokens**: visual + prompt + response, longest": lambda p: (
            f"{p['tokens']['visual']} + {p['tokens']['prompt']} + {p['tokens']['response']}"
        ),
        "longest sample of data.max_length": lambda p: (
            f"{p['tokens']['longest']:,} of {p['tokens']['max_length']:,}"
            + (" **too long**" if p["tokens"]["longest"] > p["tokens"]["max_length"] else "")
        ),
        "questions that share a prefix, mean": lambda p: (
            f"{p['steps']['samples a prefix']:.1f}"
            + (f" (**not shared**: {p['not shared']})" if p["not shared"] else "")
        ),
        "tokens of a micro-batch: prefixes + own (unshared)": lambda p: (
            _tokens(p["tokens"]["micro-batch"])
            + (
                " **few for a GPU**"
                * (p["machine"]["device"] == "cuda" and p["tokens"]["micro-batch"]["all"] < FILLS_A_GPU)
            )
        ),
        "tokens of a step: prefixes + own (unshared)": lambda p: _tokens(p["tokens"]["step"]),
        "**parameters**, of them trained": lambda p: (
            f"{p['parameters']['all'] / 1e6:,.1f} M, {p['parameters']['trainable'] / 1e6:,.1f} M"
        ),
        "**memory** of a process (GiB), of those free": lambda p: (
            f"**{sum(p['memory_bytes'].values()) / GIB:.2f}** of {p['machine']['memory'] / GIB:.1f}"
        ),
        **{
            f"... {part}": lambda p, part=part: f"{p['memory_bytes'][part] / GIB:.2f}"
            for part in next(iter(plans.values()))["memory_bytes"]
        },
        "gradient checkpointing": lambda p: _checkpointing(p["gradient_checkpointing"]),
        "**steps** x questions a step": lambda p: f"{p['steps']['steps']:,} x {p['steps']['samples a step']:,.0f}",
        "questions seen, passes over the data": lambda p: (
            f"{p['steps']['samples seen']:,.0f}, {p['steps']['passes']:,.1f}"
        ),
        "evaluations, checkpoints of so many GB": lambda p: (
            f"{p['steps']['evaluations']}, {p['steps']['checkpoints']} of {p['steps']['checkpoint bytes'] / 1e9:.2g}"
        ),
        "encoder": lambda p: (
            f"once, {p['features']['bytes'] / 1e9:,.3g} GB on disk, {_span(p['fill_hours'])} hours"
            if p["features"]["cached"]
            else "in every step"
        ),
        "**cost**: TFLOP a question": lambda p: f"{sum(p['flops_per_sample'].values()) / 1e12:.3g}",
        "... encoder, resampler, language model": lambda p: ", ".join(
            f"{p['flops_per_sample'][part] / 1e12:.2g}" for part in ("encoder", "resampler", "language_model")
        ),
        "EFLOP in all, with filling the cache": lambda p: (
            f"{(sum(p['flops'].values()) + p['features']['encode flops']) / 1e18:,.3g}"
        ),
        "**questions/s**": lambda p: _span(p["samples_per_s"]),
        "**hours**": lambda p: _span(p["hours"]),
        "**GPU-hours**": lambda p: f"{_span(p['gpu_hours'])} ({p['gpu']})",
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
    machines = "; ".join(dict.fromkeys(plan["machine"]["assumes"] for plan in plans.values()))
    return (
        f"{table}\n\nReckoned, not measured. {told}. Memory is for samples of the longest length. Speed: {machines}. "
        "Hours are of training and of the held-out losses; written answers, saving and starting come on top, and "
        "micro-batches too small to fill a GPU take longer."
    )


def measured_table(plan: dict, entries: Sequence[dict]) -> str:
    """What was planned beside what was measured, as a Markdown table.

    entries: of a run's metrics.jsonl, of any length; rates are medians of its entries but the first, which warms up,
    hours those to the last entry, with the part of the plan that was made until there. Raises ValueError when no step
    is logged yet.
    """
    steps = [entry for entry in entries if "samples_per_s" in entry]
    if not steps:
        raise ValueError("no step is logged yet: there is nothing to compare the plan with")
    rates = {
        name: statistics.median(entry[name] for entry in steps[1:] or steps)
        for name in ("samples_per_s", "tokens_per_s")
    }
    done = steps[-1]["step"] / plan["steps"]["steps"]
    least, most = plan["hours"]
    rows = [
        ("questions/s", plan["samples_per_s"], rates["samples_per_s"]),
        (
            "tokens/s, each question's whole sequence counted",
            [rate * plan["tokens"]["question"] for rate in plan["samples_per_s"]],
            rates["tokens_per_s"],
        ),
        ("peak memory of a process, GB", [sum(plan["memory_bytes"].values()) / 1e9], steps[-1]["memory_gb"]),
        (
            f"hours to step {steps[-1]['step']:,}",
            (done * least, done * most + plan["fill_hours"][1]),
            max(entry["elapsed_s"] for entry in entries) / 3600,
        ),
    ]
    lines = ["| | planned | measured | measured / planned | |", "| --- | --- | --- | --- | --- |"]
    for title, planned, measured in rows:
        middle = math.prod(planned) ** (1 / len(planned))
        inside = "" if len(planned) == 1 else "inside" if min(planned) <= measured <= max(planned) else "**outside**"
        lines.append(f"| {title} | {_between(planned)} | {_between([measured])} | {measured / middle:.2f} | {inside} |")
    return "\n".join(lines) + (
        "\n\nMeasured: medians over the log's entries but the first, and the largest peak. A planned range is divided "
        "by at its geometric mean."
    )


def _feature_bytes(config: RunConfig, workload: Workload, model: RoomPlanVLM) -> float:
    """Of one view set in the feature cache."""
    return entry_bytes(
        model.encoder, len(config.model.tap_layers), workload.num_views, workload.picture_size,
        config.data.features.dtype, heads_of(config.model), config.data.features.pool,
    )  # fmt: skip


def _why_not_shared(config: RunConfig, workload: Workload, model: RoomPlanVLM, cut: _Cut) -> str:
    if cut.prefix or config.training.group_size == 1:
        return ""
    if not config.data.visual_first or workload.prefix_tokens is None:
        return "questions stand before their views, see data.visual_first"
    return model.why_not_shared


def _seconds(flops: dict[str, float], machine: Machine) -> tuple[float, float]:
    return machine.seconds(flops["encoder"], sum(flops.values()) - flops["encoder"])


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


def _tokens(tokens: dict[str, float]) -> str:
    return f"{tokens['prefix']:,.0f} + {tokens['own']:,.0f} ({tokens['unshared']:,.0f})"


def _checkpointing(settled: dict) -> str:
    on, setting = "on" if settled["on"] else "off", settled["setting"]
    if setting != "auto":
        return f"{on} ({setting})"
    return f"{on} (auto: without it {settled['needed without'] / GIB:.2f} of {settled['usable'] / GIB:.2f} GiB usable)"


def _span(numbers: Sequence[float]) -> str:
    return "below 0.01" if numbers[1] < 0.01 else _between(numbers)


def _between(numbers: Sequence[float]) -> str:
    return " to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in numbers)
