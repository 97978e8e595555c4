"""How the processes of a run share its weights: each holds them all, or DeepSpeed ZeRO-3 shards them."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roomplan_lib.config import PretrainConfig, RunConfig
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.training.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a weight, beside the number of steps
MUON = ("momentum_buffer",)  # Muon's
# Weights of fewer numbers are held by every process under ZeRO-3: per unit of the language model's width, as in
# transformers' own choice, so that norms stay whole and matrices are sharded at every size.
PERSISTENT_PER_WIDTH = 10


class Replicated:
    """Every process holds all weights; the gradients of those that are trained are summed once per step.

    Of several processes the gradients lie in one flat buffer, behind them the step's loss, so that a step needs one
    collective; a process alone spares itself the pass over all weights that adding to a buffer takes. What is frozen
    (the encoder, the base of the language model) is never looked at.
    """

    def __init__(
        self,
        config: RunConfig | PretrainConfig,
        model: nn.Module,
        groups: list[dict],
        processes: Processes,
        compiled: Sequence[nn.Module] = (),
    ) -> None:
        """compiled: layers to compile, see `compiled_layers`."""
        self.settings, self.processes, self.compiled = config.training, processes, compiled
        self.model = model.to(processes.device)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        other = [name for name, p in self.trained.items() if p.dtype != torch.float32]
        assert not other, f"weights are trained in float32, not so: {other[:5]}"
        sizes = [p.numel() for p in self.trained.values()]
        self.buffer = torch.zeros(sum(sizes) + 1 if processes.world_size > 1 else 1, device=processes.device)
        self.loss = self.buffer[-1:]
        if processes.world_size > 1:
            for parameter, flat in zip(self.trained.values(), self.buffer[:-1].split(sizes), strict=True):
                parameter.grad = flat.view_as(parameter)
        for layer in self.compiled:
            layer.compile()
        self.optimizers = _optimizers(groups)
        self.order = [id(group["params"][0]) for group in groups]
        check = sum(p.detach().double().sum().item() for p in self.trained.values())
        assert len(set(processes.gather(check))) == 1, "the processes start with different weights"

    def forward_backward(self, batch: dict, num_supervised: int, last: bool) -> Tensor:
        """Adds the gradients of one micro-batch; its share of the step's loss, a scalar that no one has waited for."""
        with self._autocast():
            loss = self.model(**batch, num_items_in_batch=num_supervised).loss
        loss.backward()
        self.loss += loss.detach()
        return loss.detach()

    def reduce(self) -> float:
        """The step's loss over all processes; the one place of a step that waits for the device."""
        if self.processes.world_size > 1:
            dist.all_reduce(self.buffer)
        for parameter in self.trained.values():
            if parameter.grad is None:  # had no part in this step; its moments fade all the same, as with a buffer
                parameter.grad = torch.zeros_like(parameter)
        self.found = [p.grad for p in self.trained.values()]
        norm = torch.nn.utils.get_total_norm(self.found)  # one sum over all numbers would lose digits
        loss, self.norm = torch.stack([self.loss[0], norm]).tolist()
        return loss

    def step(self, rates: list[float]) -> float:
        """One optimizer step at these learning rates, one per parameter group; the norm of its gradient before it is
        clipped. A gradient that is not finite moves no weight."""
        if math.isfinite(self.norm):
            limit = self.settings.max_grad_norm
            if limit and self.norm > limit:
                torch._foreach_mul_(self.found, limit / (self.norm + 1e-6))
            found = {id(g["params"][0]): g for optimizer in self.optimizers for g in optimizer.param_groups}
            for first, rate in zip(self.order, rates, strict=True):
                found[first]["lr"] = rate
            for optimizer in self.optimizers:
                optimizer.step()
        self.buffer.zero_()
        if self.processes.world_size == 1:
            for parameter in self.trained.values():
                parameter.grad = None
        return self.norm

    @torch.no_grad()
    def evaluate(self, batch: dict, num_supervised: int) -> Tensor:
        with self._autocast():
            return self.model(**batch, num_items_in_batch=num_supervised).loss

    def _autocast(self):
        bf16 = self.settings.bf16
        return torch.autocast(self.processes.device.type, torch.bfloat16) if bf16 else nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """What a model folder is written from, on the first process."""
        return self.model.state_dict()

    def moments(self) -> dict[str, Tensor]:
        """The optimizers' state on the host: `<moment>.<weight's name>`, on the first process."""
        found = {id(p): (values, _moments_of(o)) for o in self.optimizers for p, values in o.state.items()}
        states = {name: found[id(p)] for name, p in self.trained.items()}
        return {f"{key}.{name}": values[key].cpu() for name, (values, keys) in states.items() for key in keys}

    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        names = {id(p): name for name, p in self.trained.items()}
        for optimizer in self.optimizers:
            state = optimizer.state_dict()
            order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            state["state"] = {
                i: {"step": torch.tensor(float(step))} | {k: moments[f"{k}.{name}"] for k in _moments_of(optimizer)}
                for i, name in enumerate(order)
            }
            optimizer.load_state_dict(state)

    def close(self) -> None:
        """Gives the model back as it was taken, but for what it has learned."""
        for layer in self.compiled:
            layer._compiled_call_impl = None
        for parameter in self.trained.values():
            parameter.grad = None


def _optimizers(groups: list[dict]) -> list[torch.optim.Optimizer]:
    """AdamW for all groups, or Muon for those that say `muon` (matrices) and AdamW for the rest."""
    found: list[torch.optim.Optimizer] = []
    if rest := [group for group in groups if not group.get("muon")]:
        found.append(torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True))
    if matrices := [group for group in groups if group.get("muon")]:
        # With updates as large as AdamW's, so that one learning rate means the same for both (Liu et al. 2025).
        found.append(torch.optim.Muon(matrices, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    return found


def _moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MUON if isinstance(optimizer, torch.optim.Muon) else MOMENTS


class Sharded:
    """DeepSpeed ZeRO-3: each process holds a part of every weight, gradient and moment.

    A frozen encoder stays outside: each process holds it whole and none of it is ever sent. The methods do what those
    of `Replicated` do; all processes call them together.
    """

    def __init__(self, config: RunConfig, model: RoomPlanVLM, groups: list[dict], processes: Processes) -> None:
        deepspeed = _import_deepspeed(processes.device.type)
        self.settings, self.processes, self.model = config.training, processes, model
        self.encoder = None
        if not any(p.requires_grad for p in model.encoder.parameters()):
            self.encoder = model.encoder.to(processes.device)
            self.order = list(model._modules)
            del model._modules["encoder"]
            model.__dict__["encoder"] = self.encoder  # found by name, but no submodule
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        host = {"device": "cpu", "pin_memory": processes.device.type == "cuda"}
        offload = config.distributed.offload
        sharding = {
            "stage": 3,
            "overlap_comm": processes.device.type == "cuda",
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": PERSISTENT_PER_WIDTH * model.language_model.config.hidden_size,
            **({"offload_optimizer": host} if offload != "none" else {}),
            **({"offload_param": host} if offload == "all" else {}),
        }
        if self.settings.bf16:  # inside the engine, which turns off an autocast around it
            model.forward = torch.autocast(processes.device.type, torch.bfloat16)(model.forward)
        fused = processes.device.type == "cuda" and offload == "none"
        alone = "LOCAL_RANK" not in os.environ
        if alone:  # DeepSpeed asks for it, and others would take it for a group that waits for this process
            os.environ["LOCAL_RANK"] = "0"
        try:
            self.engine, self.optimizer, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=fused),
                dist_init_required=False,
                config={
                    "train_micro_batch_size_per_gpu": self.settings.micro_batch_size,
                    "gradient_accumulation_steps": 1,  # a step's end is told by set_gradient_accumulation_boundary
                    "gradient_clipping": self.settings.max_grad_norm,
                    "zero_optimization": sharding,
                    "zero_allow_untested_optimizer": True,
                    "zero_force_ds_cpu_optimizer": False,  # torch's AdamW on the host as well: nothing to compile
                    "steps_per_print": 2**31,
                },
            )
        finally:
            if alone:
                del os.environ["LOCAL_RANK"]
        self.loss = torch.zeros((), device=processes.device)

    def forward_backward(self, batch: dict, num_supervised: int, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss = self.engine(**batch, num_items_in_batch=num_supervised).loss
        # DeepSpeed takes the mean over processes; the sum is meant, of shares of one loss.
        self.engine.backward(loss * self.processes.world_size, scale_wrt_gas=False)
        self.loss += loss.detach()
        return loss.detach()

    def reduce(self) -> float:
        if self.processes.world_size > 1:
            dist.all_reduce(self.loss)
        return self.loss.item()

    def step(self, rates: list[float]) -> float:
        """As `Replicated.step`; DeepSpeed tells the norm only once the weights have moved."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self.engine.step()
        self.loss.zero_()
        norm = self.engine.get_global_grad_norm()
        return math.nan if norm is None or not self.engine.was_step_applied() else float(norm)

    @torch.no_grad()
    def evaluate(self, batch: dict, num_supervised: int) -> Tensor:
        return self.engine(**batch, num_items_in_batch=num_supervised).loss

    def weights(self) -> dict[str, Tensor]:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        first = self.processes.is_first
        state = self.model.state_dict(keep_vars=True)
        if self.encoder is not None:
            state |= {f"encoder.{key}": value for key, value in self.encoder.state_dict().items()}
        whole: dict[int, Tensor] = {}
        stored = self.model.stored_state(state)
        for value in stored.values():
            if id(value) in whole:
                continue  # a tied weight
            if not hasattr(value, "ds_id"):
                whole[id(value)] = value.detach()
            elif value.requires_grad:
                tensor = safe_get_full_fp32_param(value)
                whole[id(value)] = tensor.cpu() if first else tensor.new_empty(0)
            else:
                with deepspeed.zero.GatheredParameters([value]):
                    whole[id(value)] = value.detach().cpu().clone() if first else value.new_empty(0)
        return {key: whole[id(value)] for key, value in stored.items()}

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        gathered = {}
        for name, parameter in self.trained.items():
            for key in MOMENTS:
                value = safe_get_full_optimizer_state(parameter, key)
                if self.processes.is_first:
                    gathered[f"{key}.{name}"] = value.cpu()
        return gathered

    def load_moments(self, moments: Mapping[str, Tensor], step: int) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for part in self.optimizer.fp32_partitioned_groups_flat:
            empty = {key: torch.zeros_like(part, requires_grad=False) for key in MOMENTS}
            self.optimizer.optimizer.state[part] = {"step": torch.tensor(float(step))} | empty
        for name, parameter in self.trained.items():
            size = parameter.ds_tensor.ds_numel  # the last processes' parts are filled up with zeros
            for key in MOMENTS:
                own = moments[f"{key}.{name}"].flatten()[self.processes.rank * size :][:size]
                safe_set_local_optimizer_state(parameter, F.pad(own, (0, size - len(own))), key)

    def close(self) -> None:
        self.model.__dict__.pop("forward", None)
        if self.encoder is not None:
            del self.model.__dict__["encoder"]
            parts = self.model._modules | {"encoder": self.encoder}
            self.model._modules.clear()
            self.model._modules |= {name: parts[name] for name in self.order}
        self.engine.destroy()


def _import_deepspeed(device: str):
    """DeepSpeed, told to be brief. ValueError where it is not installed.

    On the CPU two things are different: the accelerator is named, and the op for reductions in shared memory, which
    would be compiled for a minute and hang for ever once a process died meanwhile, is left out.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    warnings.filterwarnings("ignore", category=FutureWarning)  # one per collective
    try:
        import deepspeed
    except ImportError:
        raise ValueError(
            "distributed.strategy zero3 needs DeepSpeed: pip install 'roomplan_lib[distributed]', or set it to ddp"
        ) from None
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def compiled_layers(config: RunConfig, model: RoomPlanVLM, device: torch.device) -> list[nn.Module]:
    """The layers that `training.compile` asks to be compiled, each by itself: one compilation serves all of a kind."""
    wanted = config.training.compile
    if wanted == "never" or (wanted == "auto" and device.type != "cuda"):
        return []
    return [*model.language_model.get_decoder().layers, *model.resampler.layers]


def make_strategy(config: RunConfig, model: RoomPlanVLM, groups: list[dict], processes: Processes):
    """The strategy that the settings name; one process alone holds everything unless ZeRO-3 is asked for."""
    if config.distributed.strategy == "zero3":
        return Sharded(config, model, groups, processes)
    return Replicated(config, model, groups, processes, compiled_layers(config, model, processes.device))
