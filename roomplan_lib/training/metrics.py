"""What a run tells while it trains: metrics.jsonl, TensorBoard, and a line for people."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from roomplan_lib.files import write_whole


class Metrics:
    """Writes each entry to metrics.jsonl and TensorBoard, prints a line with rate and ETA, tells a listener."""

    def __init__(self, run_dir: Path, step: int, max_steps: int, listener: Callable[[dict], None] | None) -> None:
        """Entries after `step`, from which the run goes on, are dropped: their steps are made again."""
        self.path, self.max_steps, self.listener = run_dir / "metrics.jsonl", max_steps, listener
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
        write_whole(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        self.earlier = kept[-1]["elapsed_s"] if kept else 0.0  # seconds that the run took before it was stopped
        self.start_step, self.start_time = step, time.monotonic()

    def __call__(self, entry: dict) -> None:
        elapsed = time.monotonic() - self.start_time
        step = entry["step"]
        entry = {"step": step, "elapsed_s": round(self.earlier + elapsed, 2)} | {
            key: value for key, value in entry.items() if key != "step"
        }
        parts = [f"step {step:>6}/{self.max_steps}"]
        if "loss" in entry:
            eta = int((self.max_steps - step) * elapsed / (step - self.start_step))
            parts += [
                f"loss {entry['loss']:.4f}",
                f"grad {entry['grad_norm']:.2f}",
                f"{entry['samples_per_s']:.1f} samples/s",
                f"{entry['tokens_per_s']:.0f} tokens/s",
                f"{entry['memory_gb']:.1f} GB",
            ]
        else:
            names = {"eval_loss": "held-out loss", "eval_em": "exact", "eval_valid_json_rate": "valid actions"}
            names |= {"eval_center_error_m": "center error (m)", "eval_depth_abs_rel": "held-out depth AbsRel"}
            names |= {"eval_rotation_error_deg": "rotation error (deg)", "eval_point_rmse_m": "points RMSE (m)"}
            parts += [f"{text} {entry[key]:.4f}" for key, text in names.items() if key in entry]
        if "samples_with_positions" in entry:  # of 1: those of which at least one patch had coordinates
            parts.append(f"3D positions {entry['samples_with_positions']:.0%}")
        if "loss" in entry:
            parts.append(f"ETA {eta // 60:02d}:{eta % 60:02d}")
        print("  ".join(parts), flush=True)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        for name in entry.keys() - {"step", "elapsed_s"}:
            self.board.add_scalar(name, entry[name], step)
        if self.listener:
            self.listener(entry)

    def close(self) -> None:
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
