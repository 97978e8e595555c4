"""One small Qwen3 with LoRA on one set of rows, trained by ours and by other trainers: the peers of the benchmark."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from roomplan_lib.config import LoraSettings, RunConfig, to_dict
from roomplan_lib.model.vlm import RoomPlanConfig, RoomPlanVLM
from roomplan_lib.system import held_memory, peak_memory
from roomplan_lib.training.benchmark.measure import Clock
from roomplan_lib.training.collator import IGNORE_INDEX, Sample
from roomplan_lib.training.metrics import Metrics
from roomplan_lib.training.processes import Processes
from roomplan_lib.training.tokenizer import train_tokenizer
from roomplan_lib.training.trainer import RoomPlanTrainer, to_device

HEAD_WIDTH = 32
# By variant what it is made by, and how to get that.
PACKAGES = {
    "TRL": ("trl", "pip install 'roomplan_lib[peers]'"),
    "LLaMA-Factory": ("llamafactory", "an environment of its own, since it takes older versions of transformers"),
}


@dataclass(frozen=True)
class TextSizes:
    """The language model and its rows: random tokens of equal lengths, of which the last are supervised."""

    vocab_size: int = 512
    width: int = 64
    num_layers: int = 2
    num_rows: int = 8  # of a step
    length: int = 128  # tokens of a row
    num_supervised: int = 8
    rank: int = 16  # LoRA


def measure_peer(config: RunConfig, job: dict) -> dict:
    """What one trainer needs for the steps, rates and clipping of `config`; {"skipped": reason} for one not there.

    The first step's loss is the same for all but for the rows that it sees, since LoRA begins as nothing.
    """
    package, remedy = PACKAGES.get(job["variant"], ("torch", ""))
    if importlib.util.find_spec(package) is None:
        return {"skipped": f"needs {job['variant']}: {remedy}"}
    sizes = TextSizes(**job["text"])
    config = replace(
        config,
        training=replace(
            config.training,
            micro_batch_size=sizes.num_rows,
            group_size=1,
            gradient_accumulation_steps=1,
            lr_scheduler="constant_with_warmup",
            warmup_ratio=0.0,
        ),
    )
    rng = np.random.default_rng(0)
    # The first eight tokens are left to special ones.
    rows = rng.integers(8, sizes.vocab_size, (config.training.max_steps * sizes.num_rows, sizes.length)).tolist()
    trainers = {
        "bare": train_bare,
        "ours": train_ours,
        "HF Trainer": train_hf,
        "TRL": train_trl,
        "LLaMA-Factory": train_llama_factory,
    }
    clock, start = Clock(config.training.log_every_steps), held_memory()
    trainers[job["variant"]](config, sizes, rows, clock)
    used = torch.cuda.max_memory_allocated() if config.training.device == "cuda" else peak_memory() - start
    return clock.result(sizes.num_rows) | {"memory_above_start_gb": used / 1e9}


def train_bare(config: RunConfig, sizes: TextSizes, rows: list[list[int]], clock: Clock) -> None:
    """Forward, backward, clipping and AdamW; logits on the supervised positions alone, as `RoomPlanVLM` has them."""
    settings, device = config.training, torch.device(config.training.device)
    model = peft_model(sizes).train().to(device)
    decoder, head = model.get_base_model().model, model.get_base_model().lm_head
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings.learning_rate, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    for step in range(settings.max_steps):
        batch = to_device(batch_of(sizes, rows[step * sizes.num_rows :][: sizes.num_rows]), device)
        labels = batch.pop("labels")[:, 1:]
        hidden = decoder(**batch, use_cache=False).last_hidden_state[:, :-1]
        loss = F.cross_entropy(head(hidden[labels >= 0]).float(), labels[labels >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark(step + 1, loss.item())


def train_ours(config: RunConfig, sizes: TextSizes, rows: list[list[int]], clock: Clock) -> None:
    """`RoomPlanTrainer` with its metrics; the samples show no views, so that nothing is encoded."""
    settings = config.model
    settings = replace(
        settings,
        freeze_vggt=True,
        geometry=replace(settings.geometry, num_tokens=0),
        positions=replace(settings.positions, method="base"),
        language_model=replace(settings.language_model, lora=LoraSettings(rank=sizes.rank)),
    )
    config = replace(config, model=settings, data=replace(config.data, train_shares=()))
    base = base_model(sizes)
    model = RoomPlanVLM(RoomPlanConfig(to_dict(settings), base.config.to_dict(), {"max_length": sizes.length}), base)
    model.resampler.requires_grad_(False)
    samples = [Sample({"scene_id": str(i), "images": [], "input_ids": row}, Path(str(i))) for i, row in enumerate(rows)]
    config.run_dir.mkdir(parents=True)
    metrics = Metrics(config.run_dir, 0, config.training.max_steps, lambda e: clock.mark(e["step"], e["loss"]))
    collator = TextCollator(sizes)
    processes = Processes(torch.device(config.training.device))
    RoomPlanTrainer(config, model, collator, samples, [], processes=processes, on_entry=metrics).train()
    metrics.close()


class TextCollator:
    """What the trainer asks of a collator, for samples that are tokens."""

    def __init__(self, sizes: TextSizes) -> None:
        self.sizes, self.tokenizer = sizes, train_tokenizer([], vocab_size=0)

    def __call__(self, samples: list[Sample]) -> dict:
        return batch_of(self.sizes, [sample.record["input_ids"] for sample in samples])


class Marks(TrainerCallback):
    """Tells the clock of the steps of transformers' Trainer, or of one that is made from it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in logs:
            self.clock.mark(state.global_step, logs["loss"])


def train_hf(config: RunConfig, sizes: TextSizes, rows: list[list[int]], clock: Clock) -> None:
    """transformers' Trainer with PEFT."""
    data = [{"input_ids": row} for row in rows]

    def collate(part: list[dict]) -> dict:
        return batch_of(sizes, [row["input_ids"] for row in part])

    arguments = TrainingArguments(**hf_arguments(config), remove_unused_columns=False)
    model = peft_model(sizes)
    Trainer(model, arguments, collate, data, callbacks=[Marks(clock)]).train()


def train_trl(config: RunConfig, sizes: TextSizes, rows: list[list[int]], clock: Clock) -> None:
    """TRL's SFTTrainer with PEFT."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"input_ids": rows, "labels": labels_of(sizes, rows)})
    arguments = SFTConfig(
        **hf_arguments(config),
        max_length=None,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    tokenizer = train_tokenizer([], vocab_size=0)
    SFTTrainer(
        peft_model(sizes), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Marks(clock)]
    ).train()


def train_llama_factory(config: RunConfig, sizes: TextSizes, rows: list[list[int]], clock: Clock) -> None:
    """LLaMA-Factory's SFT stage with LoRA, on rows that are tokens already."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    base, tokens, lora = config.run_dir / "base", config.run_dir / "rows", LoraSettings(rank=sizes.rank)
    base_model(sizes).save_pretrained(base)
    train_tokenizer([], vocab_size=0).save_pretrained(base)
    masks = [[1] * sizes.length] * len(rows)
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "labels": labels_of(sizes, rows)})
    DatasetDict({"train": data}).save_to_disk(tokens)
    arguments = hf_arguments(config) | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(base),
        "dataset": "rows",  # which has to have a name, though its tokens are there
        "tokenized_path": str(tokens),
        "template": "empty",
        "finetuning_type": "lora",
        "lora_rank": lora.rank,
        "lora_alpha": round(lora.alpha),
        "lora_dropout": lora.dropout,
        "lora_target": ",".join(lora.target_modules),
        "disable_gradient_checkpointing": True,
    }
    run_exp(arguments, [Marks(clock)])


def labels_of(sizes: TextSizes, rows: list[list[int]]) -> list[list[int]]:
    hidden = [IGNORE_INDEX] * (sizes.length - sizes.num_supervised)
    return [hidden + row[-sizes.num_supervised :] for row in rows]


def hf_arguments(config: RunConfig) -> dict:
    settings = config.training
    return {
        "output_dir": str(config.run_dir),
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "adam_beta2": 0.95,
        "lr_scheduler_type": "constant",
        "logging_steps": settings.log_every_steps,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": settings.device == "cpu",
        "bf16": False,
        "optim": "adamw_torch",
        "seed": config.seed,
    }


def batch_of(sizes: TextSizes, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """[B, T] input_ids, attention_mask and labels of rows of equal lengths."""
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:, : -sizes.num_supervised] = IGNORE_INDEX
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def base_model(sizes: TextSizes) -> Qwen3ForCausalLM:
    """Random weights, the same for all."""
    heads = max(1, sizes.width // HEAD_WIDTH)
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            intermediate_size=3 * sizes.width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=HEAD_WIDTH,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def peft_model(sizes: TextSizes) -> torch.nn.Module:
    """The base model with LoRA by PEFT."""
    lora = LoraSettings(rank=sizes.rank)
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules), task_type="CAUSAL_LM"
    )
    return get_peft_model(base_model(sizes), settings)
