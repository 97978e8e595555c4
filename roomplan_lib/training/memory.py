"""The memory probe: which micro batch fits, measured with the largest samples of a run before it starts.

`python -m roomplan_lib.training.memory RUN.yaml LIMIT SIZE..` measures in a process of its own, so that nothing of it
stays behind on the device, and a size for which the machine has no memory ends that process alone.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import yaml

from roomplan_lib.config import RunConfig, load_run_config, to_dict
from roomplan_lib.files import write_whole
from roomplan_lib.samples.targets import text_length
from roomplan_lib.system import available_memory, peak_memory

USABLE = 0.9  # of the free memory; the rest is for fragmentation and what a probe does not see
MB = 1e6


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One optimizer step, and a forward and backward pass after it, at one micro batch."""

    micro_batch_size: int
    peak: int  # bytes: of the GPU's memory, or of the process without a GPU
    limit: int  # bytes that one process may take
    samples_per_s: float | None  # None: did not get through

    @property
    def fits(self) -> bool:
        return self.samples_per_s is not None and self.peak <= self.limit


def fit_memory(config: RunConfig, limit: int | None = None) -> RunConfig:
    """`config` with a micro batch that fits: its own, or else the largest that does.

    The global batch stays the same: gradient_accumulation_steps makes up for it, and the micro batch stays a multiple
    of group_size. With training.gradient_checkpointing auto it is tried when not even one group fits without.
    limit: bytes per process; default: nine tenths of what is free on the GPU, or of the machine's memory divided among
    its processes. A process is measured without sharding, so for zero3 the figures are an upper bound.
    Raises ValueError when nothing fits, with what the smallest takes and what may help.
    """
    setting = config.training.gradient_checkpointing
    for recompute in ["never", "always"] if setting == "auto" else [setting]:
        tried = _with_training(config, gradient_checkpointing=recompute)
        measured = measure(tried, candidate_sizes(tried), limit)
        print(memory_table(tried, measured))
        fitting = [m.micro_batch_size for m in measured if m.fits]
        if fitting:
            size, training = max(fitting), config.training
            steps = training.micro_batch_size * training.gradient_accumulation_steps // size
            print(
                f"training with micro_batch_size {size}, gradient_accumulation_steps {steps}, "
                f"gradient_checkpointing {recompute} (the stage says {training.micro_batch_size}, "
                f"{training.gradient_accumulation_steps}, {setting})"
            )
            return _with_training(tried, micro_batch_size=size, gradient_accumulation_steps=steps)
    least = measured[0]
    raise ValueError(
        f"one group of training.group_size {config.training.group_size} samples takes "
        f"{least.peak / MB:,.0f} MB {'with' if recompute == 'always' else 'without'} gradient checkpointing, "
        f"{least.limit / MB:,.0f} MB may be used; set a smaller group_size or data.image_size, fewer views, "
        f"model.frozen_dtype bfloat16, {'training.gradient_checkpointing auto, ' * (setting == 'never')}"
        "or distributed.strategy zero3"
    )


def candidate_sizes(config: RunConfig) -> list[int]:
    """Micro batches up to the stage's own that keep the global batch, smallest first, each about twice the former."""
    training = config.training
    groups = training.micro_batch_size * training.gradient_accumulation_steps // training.group_size
    own = training.micro_batch_size // training.group_size
    divisors = [n for n in range(1, own + 1) if groups % n == 0]
    chosen = [n for n in divisors if n & (n - 1) == 0 or n == own]
    return [n * training.group_size for n in chosen]


def memory_table(config: RunConfig, measured: list[Measurement]) -> str:
    """The measurements as lines of text."""
    note = ", gradient checkpointing" if config.training.gradient_checkpointing == "always" else ""
    rows = [f"{'micro batch':>11} {'peak MB':>10} {'may use MB':>10} {'samples/s':>10}  fits  (largest samples{note})"]
    for m in measured:
        rate = f"{m.samples_per_s:.1f}" if m.samples_per_s else "-"
        fits = "yes" if m.fits else "no"
        rows.append(f"{m.micro_batch_size:>11} {m.peak / MB:>10,.0f} {m.limit / MB:>10,.0f} {rate:>10}  {fits}")
    return "\n".join(rows)


def measure(config: RunConfig, sizes: list[int], limit: int | None = None) -> list[Measurement]:
    """Measures ascending `sizes` until one does not fit; that one is the last.

    A size that the two before it let expect beyond the limit is not tried. Raises ValueError when the run cannot be
    built, RuntimeError when the probe fails otherwise.
    """
    from roomplan_lib.training.processes import resolve_device

    if limit is None and resolve_device(config.training.device) == "cpu":
        limit = int(USABLE * available_memory() / max(1, config.distributed.num_processes))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        write_whole(path, yaml.safe_dump(to_dict(config), sort_keys=False))
        command = [sys.executable, "-m", "roomplan_lib.training.memory", str(path), str(limit or 0), *map(str, sizes)]
        result = subprocess.run(command, capture_output=True, text=True)
    measured = [Measurement(**json.loads(line)) for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode == 1:
        *_, last = result.stderr.strip().splitlines() or ["no message"]
        if last.startswith("ValueError: "):
            raise ValueError(last.removeprefix("ValueError: "))
        raise RuntimeError(f"the memory probe failed\n{result.stderr}")
    if result.returncode:  # killed: the machine had no memory for the next size
        limit = measured[-1].limit if measured else limit or 0
        measured.append(Measurement(sizes[len(measured)], limit + 1, limit, None))
    return measured


def _with_training(config: RunConfig, **changes) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


def _expected(measured: list[Measurement], size: int) -> float:
    """Peak at `size` on the line through the last two measurements."""
    (a, b), (x, y) = ((m.micro_batch_size, m.peak) for m in measured[-2:])
    return y + (y - b) / (x - a) * (size - x)


def main(path: Path, sizes: list[int], limit: int | None) -> None:
    """Prints one JSON line for each size, made by the run's own model, collator and optimizer steps."""
    import torch

    from roomplan_lib.training.collator import load_samples
    from roomplan_lib.training.processes import Processes, resolve_device
    from roomplan_lib.training.residence import resident_bytes
    from roomplan_lib.training.run import make_collator, make_model, make_tokenizer
    from roomplan_lib.training.strategy import Replicated, compiled_layers
    from roomplan_lib.training.trainer import count_supervised, parameter_groups, to_device

    config = load_run_config(path)
    device = torch.device(resolve_device(config.training.device))
    cuda = device.type == "cuda"
    if limit is None:
        limit = int(USABLE * torch.cuda.mem_get_info()[0])
    samples = load_samples(config.data.train_paths)
    if not samples:
        raise ValueError("data.train_files is empty; make samples with `roomplan prepare` and name them there")
    with redirect_stdout(sys.stderr):  # stdout is for the figures
        tokenizer = make_tokenizer(config, samples)
        model = make_model(config, tokenizer).train()
    if config.training.gradient_checkpointing == "always":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    collator = make_collator(model, tokenizer, config.data)
    if cuda and config.data.features.resident == "device":
        limit -= resident_bytes(config, model, collator, samples)
    groups = parameter_groups(model, config)
    strategy = Replicated(config, model, groups, Processes(device), compiled_layers(config, model, device))

    def step(batch: dict) -> None:
        strategy.forward_backward(batch, count_supervised(batch), last=True)
        strategy.reduce()  # waits for the device
        strategy.step([0.0 for _ in groups])  # the first one makes the optimizer's state

    measured: list[Measurement] = []
    for size in sizes:
        if len(measured) > 1 and (expected := _expected(measured, size)) > limit:
            measured.append(Measurement(size, int(expected), limit, None))
        else:
            batch = to_device(collator(largest_samples(samples, size, config.training.group_size)), device)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                step(batch)
                start = time.perf_counter()
                step(batch)
                rate = size / (time.perf_counter() - start)
            except torch.cuda.OutOfMemoryError:
                rate = None
            peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
            measured.append(Measurement(size, peak, limit, rate))
        print(json.dumps(dataclasses.asdict(measured[-1])), flush=True)
        if not measured[-1].fits:
            return


def largest_samples(samples: list, size: int, group_size: int) -> list:
    """The micro batch that takes the most memory: groups of most views and longest text, each of its longest sample.

    The text is measured in characters of question and answer.
    """
    longest: dict[tuple, tuple[int, int]] = {}  # by view set: characters, index
    for i, sample in enumerate(samples):
        length = text_length(sample.record)
        longest[sample.view_key] = max(longest.get(sample.view_key, (0, 0)), (length, i))
    order = sorted(longest, key=lambda key: (len(key), longest[key][0]), reverse=True)
    chosen = [samples[longest[order[i % len(order)]][1]] for i in range(size // group_size)]
    return [sample for sample in chosen for _ in range(group_size)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(size) for size in sys.argv[3:]], int(sys.argv[2]) or None)
