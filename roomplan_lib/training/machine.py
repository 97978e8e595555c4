"""How fast a machine is and how much memory a process of a run has there: from a table for GPUs whose numbers are
known, measured for about a second for any other."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from roomplan_lib.system import available_memory, held_memory

REACHED = 790 / 989  # of its data sheet: an H200's bf16 matrix products, measured
# Dense bf16 TFLOP/s and bytes of memory on NVIDIA's data sheets, of the SXM boards.
DATA_SHEETS = {
    "B200": (2250, 180e9),
    "H200": (989, 141e9),
    "H100": (989, 80e9),
    "A100": (312, 80e9),
}
# Of the speed of matrix products, what each part reaches on a GPU. VGGT's authors publish 0.18 of the data sheet for 8
# views on an H100; torchtitan reaches 0.40 (Llama-3.1-8B on H100s, bf16, eager) and 0.46 compiled.
GPU_SHARES = ((0.25, 0.40), (0.30, 0.45))
# On a CPU, around what was measured of runs of the tiny stage (live) and stage2_mini (cached) with group_size 1 to 12
# on a busy core: 0.33 to 0.65 of the rest alone, most with group_size 1, and 0.42 to 0.56 of both.
CPU_SHARES = ((0.35, 0.80), (0.25, 0.80))
MEASURED_S = 0.5  # of each part
PRODUCT_FLOPS = {"cpu": 1e9, "cuda": 1e12}  # of one measured product at most, or a large model takes minutes

Product = tuple[int, int, int, int]  # rows, in and out features of a matrix product, and how often it is made


@dataclass(frozen=True)
class Machine:
    """What one process of a run has."""

    name: str
    told: str  # where its speed comes from
    speeds: tuple[float, float]  # FLOP/s of matrix products, as they come in the encoder and in all else
    shares: tuple[tuple[float, float], tuple[float, float]]  # of it that each part reaches, (least, most)
    memory: float  # bytes, of which `memory.USABLE` may be used
    device: str  # cpu or cuda
    held: float = 0.0  # bytes of the program itself, where they count: in a process's own memory

    def seconds(self, encoder: float, rest: float) -> tuple[float, float]:
        """(least, most) that so many FLOPs of the encoder and of all else take."""
        return tuple(
            encoder / (self.speeds[0] * of_encoder) + rest / (self.speeds[1] * of_rest)
            for of_encoder, of_rest in zip(*map(reversed, self.shares), strict=True)
        )

    def assumptions(self) -> str:
        (e, E), (r, R) = self.shares
        return f"{self.told}, of which the encoder reaches {e:.0%} to {E:.0%} and the rest {r:.0%} to {R:.0%}"


def known_gpu(name: str) -> Machine:
    """A GPU of DATA_SHEETS. Raises ValueError for another."""
    if name not in DATA_SHEETS:
        raise ValueError(f"no numbers are known for the GPU {name!r}, only for {', '.join(DATA_SHEETS)}")
    sheet, memory = DATA_SHEETS[name]
    speed = sheet * REACHED * 1e12
    source = "measured" if name == "H200" else f"as large a part of its data sheet's {sheet:,} as an H200 reaches"
    told = f"{name}: {speed / 1e12:,.0f} TFLOP/s in bf16 ({source})"
    return Machine(name, told, (speed, speed), GPU_SHARES, memory, "cuda")


def machine_at_hand(
    device: str, encoder: Sequence[Product], rest: Sequence[Product], dtypes: tuple[torch.dtype, torch.dtype],
    num_processes: int = 1,
) -> Machine:  # fmt: skip
    """The machine that this process runs on, for each of `num_processes` on it.

    device: cpu or cuda. encoder, rest: the matrix products of a step, by which it is measured unless it is a GPU of
    DATA_SHEETS; dtypes: in which each is computed.
    """
    memory = free_memory(device, num_processes)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    found = re.search(rf"\b({'|'.join(DATA_SHEETS)})\b(?!.*(PCIe|NVL))", name)  # boards of other speed are measured
    if device == "cuda" and found:
        known = known_gpu(found[1])
        return Machine(name, known.told, known.speeds, GPU_SHARES, memory, "cuda")
    speeds = tuple(measure_speed(part, device, dtype) for part, dtype in zip((encoder, rest), dtypes, strict=True))
    told = " and ".join(f"{speed / 1e9:,.0f} GFLOP/s" for speed in speeds)
    if device == "cuda":
        return Machine(name, f"{name}: {told} measured for encoder and rest", speeds, GPU_SHARES, memory, "cuda")
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    as_here = num_processes == 1 or os.environ.get("OMP_NUM_THREADS")
    each = threads if as_here else max(1, cores // num_processes)  # as `launch` starts them
    share = min(each, cores / num_processes) / threads
    told = f"CPU: {told} measured for encoder and rest on {threads} thread{'s' * (threads > 1)}"
    speeds = tuple(speed * share for speed in speeds)
    return Machine(name, told, speeds, CPU_SHARES, memory, "cpu", held_memory())


def free_memory(device: str, num_processes: int = 1) -> float:
    """Bytes that a process may still take: of its GPU's memory, or its part of the machine's."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory() / max(1, num_processes)


def measure_speed(products: Sequence[Product], device: str, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products [rows, in] x [in, out], weighed by how often each is made: the median of rounds of
    all, as busy as the machine is."""
    made = []
    for rows, width, out, count in products:
        few = max(1, min(rows, int(PRODUCT_FLOPS[device] / (2 * width * out))))
        tensors = [torch.randn(*shape, device=device).to(dtype) for shape in ((few, width), (width, out))]
        made.append((tensors, count * rows / few, 2.0 * count * rows * width * out))
    rounds, begun = [], time.perf_counter()
    while len(rounds) < 4 or time.perf_counter() - begun < MEASURED_S:
        seconds = 0.0
        for (left, right), times, _ in made:
            start = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            seconds += times * (time.perf_counter() - start)
        rounds.append(seconds)
    return sum(flops for *_, flops in made) / statistics.median(rounds[1:])  # the first one warms up
