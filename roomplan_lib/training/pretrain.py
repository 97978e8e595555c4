"""Training VGGT itself on posed RGB-D views, for a size of which nobody publishes weights."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from roomplan_lib.config import PretrainConfig, PretrainTrainingConfig, data_path, load_pretrain_config, parse, to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.model.vggt import VGGT, VGGTConfig, load_vggt
from roomplan_lib.system import peak_memory
from roomplan_lib.training import checkpoint as checkpoints
from roomplan_lib.training.geometry_losses import geometry_errors, geometry_loss, geometry_targets
from roomplan_lib.training.metrics import Metrics
from roomplan_lib.training.processes import Processes, resolve_device
from roomplan_lib.training.run import changed_settings, surroundings
from roomplan_lib.training.status import Preempted, RunLock, StopRequest, write_status
from roomplan_lib.training.strategy import Replicated
from roomplan_lib.training.trainer import begin_loader_process, muon_weights, schedule_factor, to_device
from roomplan_lib.training.view_sets import NUM_CATEGORIES, DrawnSteps, PackedScenes, held_out_sets

# Settings that change nothing learned, so a run that goes on may have others.
FREE = (
    "run_name", "runs_dir", "data.scenes", "data.packed", "data.num_workers", "training.log_every_steps",
    "training.eval_every_steps", "training.num_eval_sets", "training.num_eval_views", "training.save_every_steps",
    "training.keep_checkpoints", "training.device",
)  # fmt: skip
CATEGORY_HEAD = "category_head."  # its weights lie beside the moments: no model folder has them
EVAL_BATCH = 8  # view sets
HEADS = ("camera", "depth", "point")


class GeometryLearner(nn.Module):
    """VGGT with what it needs to be trained alone: the losses, and the layer that reads each patch's category."""

    def __init__(self, vggt: VGGT, config: PretrainConfig) -> None:
        super().__init__()
        self.vggt, self.settings = vggt, config.loss
        self.heads = tuple(name for name in HEADS if getattr(config.loss, f"{name}_weight"))
        missing = [name for name in self.heads if name not in vggt.config.heads]
        if missing:
            raise ValueError(f"loss.{missing[0]}_weight: vggt.enable_{missing[0]} builds no such head; set it to 0")
        width = 2 * vggt.config.embed_dim
        self.category_head = nn.Linear(width, NUM_CATEGORIES) if config.loss.category_weight else None
        self.losses: dict[str, Tensor] = {}  # of the last `forward`, by name

    def forward(self, images: Tensor, num_items_in_batch: int, **known: Tensor) -> SimpleNamespace:
        """`loss` of a batch of `draw_step`, as its share of a step with `num_items_in_batch` view sets."""
        predictions = self.predict(images)
        with torch.autocast(images.device.type, enabled=False):
            unit = self.vggt.config.metres_per_unit
            targets = geometry_targets(known["depth"], known["K"], known["camera_to_world"], unit)
            targets["categories"] = known["categories"]
            loss, losses = geometry_loss(predictions, targets, self.settings)
        self.losses = {name: value.detach() for name, value in losses.items()}
        return SimpleNamespace(loss=loss * len(images) / num_items_in_batch)

    def predict(self, images: Tensor) -> dict:
        """All that `geometry_loss` and `geometry_errors` read, in fp32; the heads follow an autocast around this."""
        last = self.vggt.config.depth - 1
        layers = sorted({*self.vggt.head_layers(self.heads), last})
        outputs, start = self.vggt.aggregator(images, layers)
        tokens, predictions = dict(zip(layers, outputs, strict=True)), {}
        if "camera" in self.heads:
            encodings = [encoding.float() for encoding in self.vggt.camera_head(tokens[last])]
            predictions |= {"pose_enc_list": encodings, "pose_enc": encodings[-1]}
        for head, name in (("depth", "depth"), ("point", "world_points")):
            if head in self.heads:
                taps = [tokens[layer] for layer in self.vggt.config.head_layers]
                values = getattr(self.vggt, f"{head}_head")(taps, start, tuple(images.shape[-2:]))
                predictions |= dict(zip((name, f"{name}_conf"), values, strict=True))
        if self.category_head is not None:
            predictions["categories"] = self.category_head(tokens[last][:, :, start:]).float()
        return predictions


def pretrain(config: PretrainConfig, on_log: Callable[[dict], None] | None = None) -> Path:
    """Trains the VGGT that `config` describes, in one process, and returns the run's folder.

    The folder gets run.yaml (every field), run.json (versions, devices), metrics.jsonl, status.json, checkpoints/ and,
    at the end, model/ (`load_vggt` reads it: config.json, weights in bfloat16) and scores.json (`evaluate` of those). A
    run that was stopped or killed goes on from its newest undamaged checkpoint as if it had not been; a finished one is
    left as it is.

    on_log: called with each entry of metrics.jsonl. Raises Preempted once a requested stop (the STOP file, USR1, TERM
    or INT) is saved; ValueError when another process trains the run, when the folder holds one of other settings, for
    wrong input and for a loss that is no number; OSError when a checkpoint cannot be written.
    """
    lock = RunLock(config.run_dir)
    lock.take()
    try:
        if (config.run_dir / "scores.json").is_file():
            print(f"{config.run_dir}: training is complete, reusing {config.run_dir / 'model'}")
            return config.run_dir
        run = _Run(config, on_log)
        try:
            run.train()
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the reason
                stopped = "preempted" if isinstance(error, Preempted) else "failed"
                run.tell(stopped, "" if stopped == "preempted" else f"{type(error).__name__}: {error}")
            raise
        run.tell("finished")
        return config.run_dir
    finally:
        lock.release()


class _Run:
    """One start of a run: its folder checked, its scenes packed, its learner as it was left."""

    def __init__(self, config: PretrainConfig, on_log: Callable[[dict], None] | None) -> None:
        self.config, self.on_log, self.run_dir = config, on_log, config.run_dir
        self.folder = self.run_dir / "checkpoints"
        vggt_config = parse(VGGTConfig, config.vggt, "vggt")
        self.scenes = {
            "train": PackedScenes(config.data, "train", vggt_config.patch_size, config.data.num_scenes),
            "val": PackedScenes(config.data, "val", vggt_config.patch_size).first(config.training.num_eval_sets),
        }
        names = self.scenes["train"].names_sha256
        checkpoints.clear_partial(self.folder)
        found = checkpoints.newest_checkpoint(self.folder)
        if found:
            _check_settings(config, load_pretrain_config(self.run_dir / "run.yaml"))
            if json.loads((self.run_dir / "run.json").read_text())["scenes_sha256"] != names:
                raise ValueError(
                    f"{self.run_dir} was begun with other training scenes than the {len(self.scenes['train'])} there "
                    "are now; set data.num_scenes to as many as it had, choose another run_name or delete it"
                )
            print(f"{self.run_dir}: going on from {found[0].name}")
        write_whole(self.run_dir / "run.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        record = surroundings() | {"scenes_sha256": names}
        record["num_scenes"] = {split: len(scenes) for split, scenes in self.scenes.items()}
        write_whole(self.run_dir / "run.json", json.dumps(record, indent=1) + "\n")

        torch.manual_seed(config.seed)
        # The random weights are drawn in any case, so that the category layer's are the same.
        self.learner = GeometryLearner(VGGT(vggt_config), config)
        if config.vggt_weights and not found:
            start = load_vggt(data_path(config.vggt_weights), vggt_config)
            self.learner.vggt.load_state_dict(start.state_dict())
        self.groups = _parameter_groups(self.learner, config.training)
        self.processes = Processes(torch.device(resolve_device(config.training.device)))
        self.step = 0
        self._clear()
        if found:
            self._load_weights(found[0])
        self.strategy = Replicated(config, self.learner, self.groups, self.processes)
        if found:
            self.step = found[1]["step"]
            self.sums, self.num_summed = found[1]["curve"]["sums"], found[1]["curve"]["num_summed"]
            moments = checkpoints.load_tensors(found[0], checkpoints.OPTIMIZER)
            self.strategy.load_moments(moments, self.step)

    def _load_weights(self, checkpoint: Path) -> None:
        self.learner.vggt.load_state_dict(checkpoints.load_tensors(checkpoint, "model.safetensors"))
        if self.learner.category_head is not None:
            beside = checkpoints.load_tensors(checkpoint, checkpoints.OPTIMIZER)
            self.learner.category_head.load_state_dict(
                {name: beside[CATEGORY_HEAD + name] for name in self.learner.category_head.state_dict()}
            )

    def tell(self, status: str, error: str = "") -> None:
        write_status(self.run_dir, status, self.step, self.config.training.max_steps, 1, error)

    def train(self) -> None:
        """To the last step and the model folder, or to a checkpoint and Preempted."""
        settings = self.config.training
        for scenes in self.scenes.values():
            scenes.pack()
        sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in self.learner.vggt.named_children()}
        print(
            f"{len(self.scenes['train'])} training and {len(self.scenes['val'])} held-out scenes; "
            f"{sum(sizes.values()):,} parameters on {self.processes.device}: "
            + ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        )
        self.metrics = Metrics(self.run_dir, self.step, settings.max_steps, self.on_log)
        stop = StopRequest(self.run_dir / "STOP")
        self.tell("running")
        self.clock = time.monotonic()
        try:
            with stop.listening():
                for batch in self._batches():
                    self._make_step(batch)
                    is_last = self.step == settings.max_steps
                    if self.step % settings.log_every_steps == 0 or is_last:
                        self._log()
                    asked = stop()
                    if settings.eval_every_steps and self.step % settings.eval_every_steps == 0:
                        self.metrics({"step": self.step} | self._evaluate(self.learner))
                    if asked or is_last or self.step % settings.save_every_steps == 0:
                        self._save()
                    self.clock = time.monotonic()  # neither evaluation nor saving counts as training
                    if asked and not is_last:
                        raise Preempted(
                            f"{self.run_dir}: stopped on request after step {self.step} of {settings.max_steps}; a "
                            "whole checkpoint is written, and the next start goes on from it"
                        )
        finally:
            self.metrics.close()
            self.strategy.close()
        stop.stop_file.unlink(missing_ok=True)
        self._finish()

    def _batches(self) -> DataLoader:
        """Those of the steps that are still to be made."""
        settings, data = self.config.training, self.config.data
        steps = DrawnSteps(
            self.scenes["train"], self.config.seed, self.step, settings.max_steps, settings.num_views, data
        )
        return DataLoader(
            steps,
            batch_size=None,
            num_workers=data.num_workers,
            pin_memory=self.processes.device.type == "cuda",
            worker_init_fn=begin_loader_process,
        )

    def _make_step(self, batch: dict[str, Tensor]) -> None:
        settings = self.config.training
        batch = to_device(batch, self.processes.device)
        self.rate = settings.learning_rate * schedule_factor(self.step, settings)
        self.strategy.forward_backward(batch, len(batch["images"]), last=True)
        losses = {"loss": self.strategy.reduce()} | {f"{k}_loss": v.item() for k, v in self.learner.losses.items()}
        self.norm = self.strategy.step([self.rate] * len(self.groups))
        if not math.isfinite(losses["loss"]) or not math.isfinite(self.norm):
            raise ValueError(
                f"step {self.step + 1}: the losses are {losses}, the gradient's norm {self.norm}; lower "
                "training.learning_rate. Nothing of this step was saved"
            )
        self.step += 1
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in losses.items()}
        self.num_summed += 1
        self.num_sets += len(batch["images"])
        self.num_tokens += batch["categories"].shape[:3].numel()
        self.seconds += time.monotonic() - self.clock
        self.clock = time.monotonic()

    def _log(self) -> None:
        """Means of the losses since the last entry, the rate of the steps that this start has made."""
        rates = {"samples_per_s": self.num_sets / self.seconds, "tokens_per_s": self.num_tokens / self.seconds}
        self.metrics(
            {"step": self.step, **{name: total / self.num_summed for name, total in self.sums.items()}}
            | {"grad_norm": self.norm, "learning_rate": self.rate}
            | {name: round(value, 2) for name, value in rates.items()}
            | {"memory_gb": round(peak_memory() / 1e9, 3)}
        )
        self._clear()

    def _clear(self) -> None:
        self.sums, self.num_summed, self.num_sets, self.num_tokens, self.seconds = {}, 0, 0, 0, 0.0

    def _evaluate(self, learner: GeometryLearner) -> dict[str, float]:
        settings = self.config.training
        return evaluate(learner, self.scenes["val"], self.config.seed, settings.num_eval_sets, settings.num_eval_views)

    def _save(self) -> None:
        moments = self.strategy.moments()
        if self.learner.category_head is not None:
            moments |= {CATEGORY_HEAD + name: t.cpu() for name, t in self.learner.category_head.state_dict().items()}
        state = {"step": self.step, "curve": {"sums": self.sums, "num_summed": self.num_summed}}
        vggt = self.learner.vggt
        weights = {name: tensor.cpu() for name, tensor in vggt.state_dict().items()}
        keep = self.config.training.keep_checkpoints
        checkpoints.save_checkpoint(self.folder, vggt, None, weights, moments, {}, state, keep)
        self.tell("running")

    def _finish(self) -> None:
        """The model folder, in bfloat16 for what ships with a package, and the errors of just these weights."""
        weights = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in self.learner.vggt.state_dict().items()}
        folder = self.run_dir / "model"
        self.learner.vggt.save_pretrained(folder, weights)
        self.learner.vggt = load_vggt(folder).float().to(self.processes.device)
        scores = self._evaluate(self.learner)
        write_whole(self.run_dir / "scores.json", json.dumps({"step": self.step} | scores, indent=1) + "\n")
        print(", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in scores.items()))


@torch.no_grad()
def evaluate(
    learner: GeometryLearner, scenes: PackedScenes, seed: int, num_sets: int, num_views: int
) -> dict[str, float]:
    """Held-out errors in fp32: `eval_` and the names of `geometry_errors`, each the mean over the view sets (angles and
    lengths: their median); `eval_category_accuracy` is the share of pixels whose patch's first guess is theirs."""
    device, was_training = next(learner.parameters()).device, learner.training
    learner.eval()
    found: dict[str, list[Tensor]] = {}
    for batch in held_out_sets(scenes, seed, num_sets, num_views, EVAL_BATCH):
        batch = to_device(batch, device)
        predictions = learner.predict(batch["images"])
        unit = learner.vggt.config.metres_per_unit
        targets = geometry_targets(batch["depth"], batch["K"], batch["camera_to_world"], unit)
        errors = geometry_errors(predictions, targets, unit)
        if "categories" in predictions:
            guessed = predictions["categories"].argmax(-1, keepdim=True)
            right = batch["categories"].gather(-1, guessed).flatten(1).sum(1)
            errors["category_accuracy"] = right / batch["categories"].flatten(1).sum(1)
        for name, values in errors.items():
            found.setdefault(name, []).append(values.float().cpu())
    learner.train(was_training)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {
        f"eval_{name}": (values.median() if name.endswith(("_deg", "_m")) else values.mean()).item()
        for name, values in joined.items()
    }


def _parameter_groups(learner: GeometryLearner, settings: PretrainTrainingConfig) -> list[dict]:
    """Weight decay on matrices and kernels only: no norms, biases, tokens or gains. `muon`: linear layers, if asked."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    decayed = {id(module.weight) for module in learner.modules() if isinstance(module, layers)}
    matrices = muon_weights(learner) if settings.optimizer == "muon" else set()
    trained = [p for p in learner.parameters() if p.requires_grad]
    kinds = ((True, False), (True, True), (False, False))
    groups = [
        {
            "params": [p for p in trained if (id(p) in decayed) == decay and (id(p) in matrices) == muon],
            "weight_decay": settings.weight_decay * decay,
        }
        | ({"muon": True} if muon else {})
        for decay, muon in kinds
    ]
    return [group for group in groups if group["params"]]


def _check_settings(config: PretrainConfig, old: PretrainConfig) -> None:
    """ValueError for settings that a run of `old` cannot go on with."""
    changed = changed_settings(old, config).items()
    refused = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in changed if not key.startswith(FREE)]
    if refused:
        raise ValueError(
            f"{config.run_dir} holds a run of other settings ({'; '.join(refused)}); choose another run_name or "
            "delete it"
        )
