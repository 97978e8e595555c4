"""The training loop: Hugging Face's Trainer with our batches, parameter groups, metrics file and whole checkpoints."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from roomplan_lib.config import RunConfig
from roomplan_lib.files import write_whole
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.training.collator import Collator, Sample
from roomplan_lib.training.sampler import DrawnSamples, GroupedBatchSampler

CHECKPOINT_MARK = "trainer_state.json"  # the last file that a checkpoint gets


class RoomPlanTrainer(Trainer):
    """Steps are optimizer steps; the loss is averaged over the supervised tokens of a whole step."""

    def __init__(
        self,
        config: RunConfig,
        model: RoomPlanVLM,
        collator: Collator,
        train_samples: list[Sample],
        eval_samples: list[Sample],
        on_log: Callable[[dict], None] | None = None,
    ) -> None:
        settings = config.training
        evaluate = bool(settings.eval_every_steps and eval_samples)
        device = resolve_device(settings.device)
        arguments = TrainingArguments(
            output_dir=str(config.run_dir / "checkpoints"),
            num_train_epochs=1,  # the sampler's one pass is the whole run
            per_device_train_batch_size=settings.micro_batch_size,
            per_device_eval_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            lr_scheduler_type=settings.lr_scheduler,
            learning_rate=settings.learning_rate,
            warmup_steps=int(settings.warmup_ratio * settings.max_steps),
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.bf16,
            use_cpu=device == "cpu",
            logging_steps=settings.log_every_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # a NaN loss is to be seen, not replaced by an average
            eval_strategy="steps" if evaluate else "no",
            eval_steps=settings.eval_every_steps or None,
            save_strategy="steps",
            save_steps=settings.save_every_steps,
            dataloader_num_workers=config.data.num_workers,
            dataloader_pin_memory=device == "cuda",
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            disable_tqdm=True,
            report_to="none",
            seed=config.seed,
        )
        self.config, self.train_samples = config, train_samples
        self.counts = {"train": Counter(), "eval": Counter()}  # since the last log
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self._staging: str | None = None
        super().__init__(
            model=model,
            args=arguments,
            data_collator=collator,
            train_dataset=train_samples,
            eval_dataset=eval_samples or None,
            callbacks=[MetricsFile(self, config, on_log)],
        )
        self.remove_callback(PrinterCallback)  # MetricsFile prints a line that people can read

    def get_train_dataloader(self) -> DataLoader:
        settings = self.config.training
        sampler = GroupedBatchSampler(
            self.train_samples,
            micro_batch_size=settings.micro_batch_size,
            group_size=settings.group_size,
            num_batches=settings.max_steps * settings.gradient_accumulation_steps * self.args.world_size,
            seed=self.config.seed,
            shares=self.config.data.train_shares,
        )
        loader = DataLoader(
            DrawnSamples(self.train_samples),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.model, self.config), betas=(0.9, 0.95), fused=self.args.device.type == "cuda"
            )
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = model(**inputs, num_items_in_batch=num_items_in_batch).loss
        counts = self.counts["train" if model.training else "eval"]
        counts["samples"] += len(inputs["input_ids"])
        counts["tokens"] += int(inputs["attention_mask"].sum())
        if self.model.sets_with_positions is not None:
            counts["samples_with_positions"] += int(self.model.sets_with_positions[inputs["scene_index"]].sum())
        if not torch.isfinite(loss):
            raise ValueError(f"step {self.state.global_step + 1}: the loss is {loss.item()}; lower the learning rates")
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # ------------------------------------------------------------------ checkpoints: whole or not at all
    def _get_output_dir(self, trial) -> str:
        return self._staging or self.args.output_dir

    def _save_checkpoint(self, model, trial) -> None:
        """Saves under a temporary name and renames, then drops all but the newest `keep_checkpoints`."""
        final = Path(self.args.output_dir)
        self._staging = str(final / ".partial")
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(final / name, ignore_errors=True)
            (Path(self._staging) / name).rename(final / name)
            shutil.rmtree(self._staging)
            for old in list_checkpoints(final)[: -self.config.training.keep_checkpoints]:
                shutil.rmtree(old)
        self._staging = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.model.load_trained(resume_from_checkpoint)


def parameter_groups(model: RoomPlanVLM, config: RunConfig) -> list[dict]:
    """AdamW groups: the rate by part, weight decay on matrices only (no norms, biases, embeddings or latents)."""
    settings = config.training
    rates = {"encoder": settings.encoder_learning_rate, "language_model": settings.learning_rate}
    groups = []
    for name, part in model.parts().items():
        linear = {id(m.weight) for m in part.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        for decay in (True, False):
            parameters = [p for p in part.parameters() if p.requires_grad and (id(p) in linear) == decay]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": rates.get(name, settings.resampler_learning_rate),
                        "weight_decay": settings.weight_decay if decay else 0.0,
                        "name": name,
                    }
                )
    if not groups:
        raise ValueError("nothing to train: every part is frozen; see model.freeze_vggt and model.language_model")
    return groups


def resolve_device(name: str) -> str:
    """cpu or cuda for auto, cpu or cuda. ValueError for another name, or for cuda where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is asked for, but torch finds no CUDA device; use cpu or auto")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if (path / CHECKPOINT_MARK).is_file()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


class MetricsFile(TrainerCallback):
    """Writes each log to metrics.jsonl and TensorBoard, prints a line with rate and ETA, tells a listener."""

    def __init__(self, trainer: RoomPlanTrainer, config: RunConfig, listener: Callable[[dict], None] | None) -> None:
        self.trainer, self.listener = trainer, listener
        self.path = config.run_dir / "metrics.jsonl"
        self.max_steps = config.training.max_steps

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= state.global_step]
        if state.is_world_process_zero:
            write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=state.global_step + 1)
        self.earlier = kept[-1]["elapsed_s"] if kept else 0.0  # seconds that the run took before it was stopped
        self.start_step, self.start_time = state.global_step, time.monotonic()
        self.last_time = self.start_time

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & set(logs):
            return
        now = time.monotonic()
        entry = {"step": state.global_step, "elapsed_s": round(self.earlier + now - self.start_time, 2)}
        counts, with_positions = self.trainer.counts["train" if "loss" in logs else "eval"], ""
        if self.trainer.model.positions is not None:
            share = round(counts["samples_with_positions"] / counts["samples"], 4)
            with_positions = f"  3D positions {share:.0%}"
        if "loss" in logs:
            seconds = max(now - self.last_time, 1e-9)
            entry |= {"loss": logs["loss"], "grad_norm": logs["grad_norm"], "learning_rate": logs["learning_rate"]}
            entry |= {
                "samples_per_s": round(counts["samples"] / seconds, 2),
                "tokens_per_s": round(counts["tokens"] / seconds, 1),
            }
            rate = (state.global_step - self.start_step) / (now - self.start_time)
            eta = (self.max_steps - state.global_step) / rate
            print(
                f"step {state.global_step:>6}/{self.max_steps}  loss {entry['loss']:.4f}  "
                f"{entry['samples_per_s']:.1f} samples/s  {entry['tokens_per_s']:.0f} tokens/s{with_positions}  "
                f"ETA {int(eta) // 60:02d}:{int(eta) % 60:02d}",
                flush=True,
            )
        else:
            entry["eval_loss"] = logs["eval_loss"]
            print(
                f"step {state.global_step:>6}/{self.max_steps}  held-out loss {entry['eval_loss']:.4f}{with_positions}",
                flush=True,
            )
        if with_positions:
            entry["samples_with_positions"] = share  # of 1: those of which at least one patch had coordinates
        self.last_time = time.monotonic()
        for counter in self.trainer.counts.values():
            counter.clear()
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for name in entry.keys() - {"step", "elapsed_s"}:
            self.board.add_scalar(name, entry[name], state.global_step)
        if self.listener:
            self.listener(entry)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            self.board.close()


def read_metrics(path: Path) -> list[dict]:
    """Entries of a metrics.jsonl, [] when there is none; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries
