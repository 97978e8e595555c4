"""Trains runs one after the other in one group of processes, which spares the imports: torchrun ... YAML[@STEP|!|#] ...

@STEP: the run is asked to stop after that step's log. !: the last process's loss becomes no number. #: the last process
is killed in its second step. What a run ends with is printed by every process as `<rank> <run name>: <error>`.
"""

import os
import signal
import sys

import torch
import torch.distributed as dist

from roomplan_lib.config import load_run_config
from roomplan_lib.training.run import train
from roomplan_lib.training.strategy import Replicated


def main() -> None:
    dist.init_process_group("gloo")
    forward_backward = Replicated.forward_backward
    is_last = dist.get_rank() == dist.get_world_size() - 1

    def poisoned(self, batch, num_supervised, last):
        loss = forward_backward(self, batch, num_supervised, last)
        self.loss += float("nan")
        return loss + float("nan")

    def deadly(self, batch, num_supervised, last):
        if self.optimizers[0].state:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_backward(self, batch, num_supervised, last)

    for argument in sys.argv[1:]:
        path, _, stop_at = argument.rstrip("!#").partition("@")
        config = load_run_config(path)
        changed = {"!": poisoned, "#": deadly}.get(argument[-1], forward_backward)
        Replicated.forward_backward = changed if is_last else forward_backward

        def on_log(entry, config=config, stop_at=stop_at):
            if str(entry["step"]) == stop_at:
                (config.run_dir / "STOP").touch()

        try:
            train(config, on_log)
        except (ValueError, RuntimeError) as error:
            print(f"{os.environ['RANK']} {config.run_name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
