"""The training loop: whole optimizer steps over all processes, watched, evaluated, saved, and stopped when asked."""

from __future__ import annotations

import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from roomplan_lib.config import RunConfig, TrainingConfig
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.system import peak_memory
from roomplan_lib.training import checkpoint as checkpoints
from roomplan_lib.training.answers import Answer, greedy_answers, score_answers, summarise_answers
from roomplan_lib.training.collator import IGNORE_INDEX, Collator, Sample
from roomplan_lib.training.processes import Processes
from roomplan_lib.training.sampler import Draw, DrawnSamples, GroupedBatchSampler
from roomplan_lib.training.strategy import make_strategy

RECENT = 50  # losses whose median says what is usual
NAMED = 48  # samples that an error names at most


@dataclass
class Curve:
    """What the log and the watch over the loss remember between two log entries; a checkpoint holds it."""

    loss_sum: float = 0.0  # of the steps since the last entry
    num_losses: int = 0
    recent: list[float] = field(default_factory=list)  # losses of the last RECENT steps


class RoomPlanTrainer:
    """Steps are optimizer steps; the loss is the mean over the supervised tokens of a whole step, whatever cuts it.

    A step costs two exchanges between the processes: its counts before, and its gradients with its loss after, which
    is also the one time that the loop waits for the device.
    """

    def __init__(
        self,
        config: RunConfig,
        model: RoomPlanVLM,
        collator: Collator,
        train_samples: list[Sample],
        eval_samples: list[Sample],
        *,
        processes: Processes | None = None,
        accumulation: int | None = None,
        on_entry: Callable[[dict], None] | None = None,
        on_save: Callable[[int], None] | None = None,
        wants_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """accumulation: micro-batches of this process per step; the settings' gradient_accumulation_steps when left
        out. on_entry: told each entry of the metrics, on every process, with equal numbers. on_save: told the step of
        each checkpoint once it is whole. wants_stop: asked once per step.
        """
        self.config, self.model, self.collator = config, model, collator
        self.train_samples, self.eval_samples = train_samples, eval_samples
        self.processes = processes or Processes(torch.device("cpu"))
        self.accumulation = accumulation or config.training.gradient_accumulation_steps
        self.on_entry, self.on_save, self.wants_stop = on_entry, on_save, wants_stop
        self.step, self.saved_step = 0, 0
        self.curve = Curve()
        if config.training.gradient_checkpointing == "always":  # `run` has settled what auto means
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def global_batch_size(self) -> int:
        return self.config.training.micro_batch_size * self.accumulation * self.processes.world_size

    def get_train_dataloader(self) -> DataLoader:
        """This process's micro-batches from the next step to the last."""
        settings = self.config.training
        sampler = GroupedBatchSampler(
            self.train_samples,
            micro_batch_size=settings.micro_batch_size,
            group_size=settings.group_size,
            num_steps=settings.max_steps,
            seed=self.config.seed,
            shares=self.config.data.train_shares,
            accumulation=self.accumulation,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            start_step=self.step,
        )
        return self._loader(DrawnSamples(self.train_samples), sampler, self.collator)

    def _loader(self, dataset, batches, collate) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.config.data.num_workers,
            pin_memory=self.processes.device.type == "cuda",
            generator=torch.Generator(),  # the loader's own: drawing its seed must not move the model's
            worker_init_fn=begin_loader_process,
        )

    def _read(self, loader: DataLoader) -> Iterator:
        """The loader's batches. RuntimeError that says what to do when one of its processes dies."""
        try:
            yield from loader
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"a loader process died after step {self.step} ({reason}); it may have run out of memory: lower "
                "data.num_workers or data.cache_scenes, and start the run again: it goes on from its newest checkpoint"
            ) from error

    # ------------------------------------------------------------------ the loop
    def train(self, checkpoint=None, state: dict | None = None) -> None:
        """Trains to the last step, or to the one after which a stop was asked for and saved (`step` tells), from a
        checkpoint's folder and state where they are given.

        Raises ValueError when the loss or gradient is no number or explodes, OSError when
        a checkpoint cannot be written, RuntimeError when a loader process or another process of the run dies.
        """
        settings, processes = self.config.training, self.processes
        groups = parameter_groups(self.model, self.config)
        base_rates = [group["lr"] for group in groups]
        # The language model's rate is the one that is logged, where it is trained.
        shown = next((i for i, group in enumerate(groups) if group["name"] == "language_model"), 0)
        if checkpoint is not None:
            self.model.load_trained(checkpoint)
        self.model.train()
        self.strategy = make_strategy(self.config, self.model, groups, processes)
        try:
            if checkpoint is not None:
                self._restore(checkpoint, state)
            batches = self._micro_batches()
            self.counts = _Counts(processes.device)
            if checkpoint is not None and state["to_evaluate"] and self.eval_samples:
                self._evaluate()
            while self.step < settings.max_steps:
                factor = schedule_factor(self.step, settings)
                stop = self._make_step(batches, [rate * factor for rate in base_rates])
                is_last = self.step == settings.max_steps
                if self.step == 1 or self.step % settings.log_every_steps == 0 or is_last:
                    self._log(base_rates[shown] * factor)
                evaluates = settings.eval_every_steps and self.step % settings.eval_every_steps == 0
                # Who asks for a stop may not wait as long as an evaluation takes: the next start makes it.
                to_evaluate = bool(evaluates and stop and not is_last)
                if evaluates and self.eval_samples and not to_evaluate:
                    self._evaluate()
                if stop or self.step % settings.save_every_steps == 0 or is_last:
                    self._save(to_evaluate)
                if stop:
                    break
        finally:
            self.strategy.close()

    def _micro_batches(self) -> Iterator[tuple[list[Draw], dict]]:
        """This process's micro-batches and what is in them."""
        loader = self.get_train_dataloader()
        return zip(iter(loader.batch_sampler), self._read(loader), strict=True)

    def _make_step(self, batches: Iterator[tuple[list[Draw], dict]], rates: list[float]) -> bool:
        """One optimizer step; whether the processes have agreed to stop after it."""
        drawn, micro_batches = zip(*(next(batches) for _ in range(self.accumulation)), strict=True)
        num_supervised, num_samples, num_tokens, stops = self.processes.sum(
            sum(count_supervised(batch) for batch in micro_batches),
            sum(len(batch["input_ids"]) for batch in micro_batches),
            sum(int(batch["attention_mask"].sum()) for batch in micro_batches),
            self.wants_stop(),
        )
        losses = []
        for i, batch in enumerate(micro_batches):
            inputs = to_device(batch, self.processes.device)
            losses.append(self.strategy.forward_backward(inputs, num_supervised, last=i == self.accumulation - 1))
            self.counts.add_positions(self.model, inputs)
        loss = self.strategy.reduce()
        self._refuse_bad(loss, losses, drawn, micro_batches)
        grad_norm = self.strategy.step(rates)
        if not math.isfinite(grad_norm):
            everyone = self._names([i for part in drawn for i, _ in part])
            raise ValueError(
                f"step {self.step + 1}: the gradient is not finite, though the loss is {loss:.4f}; its samples: "
                f"{everyone}; lower the learning rates or training.max_grad_norm. Nothing of this step was saved"
            )
        self.step += 1
        self.counts.samples += num_samples
        self.counts.tokens += num_tokens
        self.curve.loss_sum += loss
        self.curve.num_losses += 1
        self.curve.recent = [*self.curve.recent[1 - RECENT :], loss]
        self.grad_norm = grad_norm
        self.counts.end_step()
        return bool(stops)

    def _refuse_bad(self, loss: float, losses: list[Tensor], drawn: tuple, micro_batches: tuple) -> None:
        """ValueError, on all processes, for a loss that is no number or far above the usual ones."""
        limit = math.inf
        if self.config.training.explosion_factor and self.curve.recent:
            limit = self.config.training.explosion_factor * statistics.median(self.curve.recent)
        if math.isfinite(loss) and loss <= limit:
            return
        # Per micro-batch the loss per token, to find the ones to blame.
        counts = [count_supervised(batch) for batch in micro_batches]
        values = [value.item() / count for value, count in zip(losses, counts, strict=True)]
        bad = [not math.isfinite(value) for value in values]
        if not any(self.processes.gather(any(bad))):
            worst = max(self.processes.gather(max(values)))
            bad = [value == worst for value in values]
        names = self._names([i for part, is_bad in zip(drawn, bad, strict=True) if is_bad for i, _ in part])
        what, remedy = f"the loss is {loss}", "lower the learning rates"
        if math.isfinite(loss):
            usual = statistics.median(self.curve.recent)
            what += (
                f", more than training.explosion_factor ({self.config.training.explosion_factor:g}) times the median "
                f"{usual:.4f} of the last {len(self.curve.recent)} steps"
            )
            remedy = "raise training.explosion_factor (0 = never stop) to go on, or lower the learning rates"
        raise ValueError(
            f"step {self.step + 1}: {what}; its samples: {names}; look at them, or {remedy}. "
            "Nothing of this step was saved"
        )

    def _names(self, indices: list[int]) -> str:
        """All processes' samples: index among the training samples, scene, question id."""
        found = [i for part in self.processes.gather(sorted(set(indices))) for i in part]
        texts = []
        for i in found[:NAMED]:
            record = self.train_samples[i].record
            name = f" {record['question_id']}" if record.get("question_id") else ""
            texts.append(f"{i} (scene {record['scene_id']}{name})")
        return ", ".join(texts) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")

    # ------------------------------------------------------------------ log and evaluation
    def _log(self, learning_rate: float) -> None:
        entry = {
            "loss": self.curve.loss_sum / self.curve.num_losses,
            "grad_norm": self.grad_norm,
            "learning_rate": learning_rate,
            **self.counts.entry(self.processes, self.model),
        }
        self.curve.loss_sum, self.curve.num_losses = 0.0, 0
        self.counts.clear()
        self._tell(entry)

    def _tell(self, entry: dict) -> None:
        if self.on_entry:
            self.on_entry({"step": self.step} | entry)

    def _evaluate(self) -> None:
        """Held-out loss, the mean over all supervised tokens of the samples, each seen by one process once; then, for
        the first `num_generated_samples` of them, scores of what the model answers."""
        settings, processes = self.config.training, self.processes
        self.model.eval()
        counts = _Counts(processes.device)
        total, num_supervised = torch.zeros((), dtype=torch.float64, device=processes.device), 0
        for batch, is_own in self._shared_batches(self.eval_samples, settings.micro_batch_size, self.collator):
            inputs, count = to_device(batch, processes.device), count_supervised(batch)
            loss = self.strategy.evaluate(inputs, count)
            if is_own:
                total += loss.double() * count
                num_supervised += count
                counts.samples += len(batch["input_ids"])
                counts.add_positions(self.model, inputs)
        loss_sum, num_supervised, counts.samples = processes.sum(total.item(), num_supervised, counts.samples)
        entry = {"eval_loss": loss_sum / num_supervised} | counts.positions_entry(processes, self.model)
        if count := settings.num_generated_samples:
            entry |= self._answer(self.eval_samples[:: max(1, len(self.eval_samples) // count)][:count])
        self.model.train()
        self.counts.restart_clock()
        self._tell(entry)

    def _answer(self, samples: list[Sample]) -> dict[str, float]:
        def collate(part: list[Sample]) -> tuple[list[Sample], dict]:
            return part, self.collator(part, generate=True)

        answers: list[Answer] = []
        size = self.config.prediction.batch_size
        for (part, batch), is_own in self._shared_batches(samples, size, collate):
            texts = greedy_answers(
                self.model,
                self.collator.tokenizer,
                to_device(batch, self.processes.device),
                max_new_tokens=self.config.prediction.max_new_tokens,
                synced=self.config.distributed.strategy == "zero3" and self.processes.world_size > 1,
                bf16=self.config.training.bf16,
            )
            if is_own:
                answers += score_answers(part, texts, self.collator.data.codec)
        return summarise_answers([answer for part in self.processes.gather(answers) for answer in part])

    def _shared_batches(self, samples: list[Sample], size: int, collate) -> Iterator[tuple]:
        """This process's batches of `samples`, and whether each is its own: under ZeRO-3 all processes work on each
        batch together, so one that has fewer repeats its first without counting it."""
        parts = [range(i, min(i + size, len(samples))) for i in range(0, len(samples), size)]
        own = [list(part) for part in parts[self.processes.rank :: self.processes.world_size]]
        num_own = len(own)
        if self.config.distributed.strategy == "zero3":
            own += [list(parts[0])] * (math.ceil(len(parts) / self.processes.world_size) - num_own)
        for i, batch in enumerate(self._read(self._loader(samples, own, collate))):
            yield batch, i < num_own

    # ------------------------------------------------------------------ checkpoints
    def _save(self, to_evaluate: bool) -> None:
        """A whole checkpoint of this step, written by the first process; OSError on all of them when it cannot be.

        to_evaluate: the start that goes on from it begins with this step's evaluation.
        """
        if self.saved_step == self.step:
            return
        weights, moments = self.strategy.weights(), self.strategy.moments()
        random = checkpoints.random_state(self.processes)
        state = {
            "step": self.step,
            "world_size": self.processes.world_size,
            "strategy": self.config.distributed.strategy,
            "global_batch_size": self.global_batch_size,
            "curve": vars(self.curve),
            "to_evaluate": to_evaluate,
        }
        folder, keep = self.config.run_dir / "checkpoints", self.config.training.keep_checkpoints
        tokenizer = self.collator.tokenizer
        save = checkpoints.save_checkpoint
        self.processes.on_first(save, folder, self.model, tokenizer, weights, moments, random, state, keep)
        self.saved_step = self.step
        self.counts.restart_clock()
        if self.on_save:
            self.on_save(self.step)

    def _restore(self, checkpoint, state: dict) -> None:
        self.step = self.saved_step = state["step"]
        self.curve = Curve(**state["curve"])
        self.strategy.load_moments(checkpoints.load_tensors(checkpoint, checkpoints.OPTIMIZER), self.step)
        random = checkpoints.load_tensors(checkpoint, checkpoints.RANDOM)
        checkpoints.restore_random_state(random, self.processes)


class _Counts:
    """What the steps since the last log entry have seen, over all processes."""

    def __init__(self, device: torch.device) -> None:
        self.with_positions = torch.zeros((), dtype=torch.long, device=device)  # of this process; read when logged
        self.clear()

    def clear(self) -> None:
        self.samples, self.tokens, self.seconds = 0.0, 0.0, 0.0
        self.with_positions.zero_()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves out what was done since a step ended: evaluation, saving."""
        self.started = time.monotonic()

    def end_step(self) -> None:
        self.seconds += time.monotonic() - self.started
        self.started = time.monotonic()

    def add_positions(self, model: RoomPlanVLM, inputs: dict) -> None:
        """Counts the samples of which at least one patch had coordinates."""
        if model.sets_with_positions is not None:
            self.with_positions += model.sets_with_positions[inputs["scene_index"]].sum()

    def entry(self, processes: Processes, model: RoomPlanVLM) -> dict:
        """Rates over all processes, the largest process's peak memory in 10**9 bytes, share with 3D positions."""
        if processes.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(processes.device)
        else:
            memory = peak_memory()
        seconds = max(self.seconds, 1e-9)
        return {
            "samples_per_s": round(self.samples / seconds, 2),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "memory_gb": round(max(processes.gather(memory)) / 1e9, 3),
            **self.positions_entry(processes, model),
        }

    def positions_entry(self, processes: Processes, model: RoomPlanVLM) -> dict:
        if model.positions is None:
            return {}
        (count,) = processes.sum(self.with_positions.item())
        return {"samples_with_positions": round(count / self.samples, 4)}


def begin_loader_process(_worker: int) -> None:
    """A signal to the whole process group asks the trainer for a stop, which still needs this process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the main process's, which it would warn about
    for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)


def count_supervised(batch: dict) -> float:
    """Tokens of a batch that the loss is taken over, or the sum of their weights."""
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX
    if "loss_weights" in batch:
        return batch["loss_weights"][:, 1:][supervised].sum(dtype=torch.float64).item()
    return int(supervised.sum())


def schedule_factor(step: int, settings: TrainingConfig) -> float:
    """What the learning rates are multiplied with in the step after `step` steps; as transformers' schedules, so the
    first step of a warm-up has 0."""
    warmup = int(settings.warmup_ratio * settings.max_steps)
    if step < warmup:
        return step / warmup
    if settings.lr_scheduler == "constant_with_warmup":
        return 1.0
    progress = (step - warmup) / max(1, settings.max_steps - warmup)
    return 1.0 - progress if settings.lr_scheduler == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def parameter_groups(model: RoomPlanVLM, config: RunConfig) -> list[dict]:
    """Optimizer groups: the rate by part, weight decay on matrices only (no norms, biases, embeddings or latents).

    `muon` says which of them Muon is asked for: the weights of linear layers, but for embeddings and the head.
    """
    settings = config.training
    rates = {"encoder": settings.encoder_learning_rate, "language_model": settings.learning_rate}
    groups = []
    for name, part in model.parts().items():
        linear = {id(m.weight) for m in part.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
        matrices = muon_weights(part) if settings.optimizer == "muon" else set()
        for decay, muon in ((True, False), (True, True), (False, False)):
            parameters = [
                p
                for p in part.parameters()
                if p.requires_grad and (id(p) in linear) == decay and (id(p) in matrices) == muon
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr": rates.get(name, settings.resampler_learning_rate),
                        "weight_decay": settings.weight_decay if decay else 0.0,
                        "name": name,
                    }
                    | ({"muon": True} if muon else {})
                )
    if not groups:
        raise ValueError("nothing to train: every part is frozen; see model.freeze_vggt and model.language_model")
    return groups


def muon_weights(part: torch.nn.Module) -> set[int]:
    """The identities of the weights that Muon is meant for: matrices of linear layers, no embedding and no head."""
    kinds = torch.nn.Linear, torch.nn.Embedding
    linear, embedding = ({id(m.weight) for m in part.modules() if isinstance(m, kind)} for kind in kinds)
    head = getattr(part, "lm_head", None)
    return linear - embedding - ({id(head.weight)} if head is not None else set())


def to_device(value, device: torch.device):
    """A batch with its tensors, also those in lists, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(v, device) for key, v in value.items()}
    return [to_device(v, device) for v in value] if isinstance(value, list) else value
