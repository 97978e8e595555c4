"""Features that stay in memory: whether a run's fit, said before it starts."""

from __future__ import annotations

import os

import torch

from roomplan_lib.config import RunConfig
from roomplan_lib.model.features import Residence, entry_bytes, heads_of
from roomplan_lib.model.vlm import RoomPlanVLM
from roomplan_lib.system import available_memory
from roomplan_lib.training.collator import Sample, ViewLoader
from roomplan_lib.training.memory import USABLE
from roomplan_lib.training.processes import Processes

GB = 1e9


def hold_features(
    config: RunConfig, model: RoomPlanVLM, loader: ViewLoader, samples: list[Sample], processes: Processes
) -> None:
    """Lets the features of the samples' views stay where `data.features.resident` says from their first read on.

    Every process comes to hold those of all samples. Prints what that takes; raises ValueError, on all processes, when
    it is more than is free now, which on a GPU is what training itself needs as well.
    """
    resident = config.data.features.resident
    sets = {sample.view_key: sample for sample in samples}
    needed = resident_bytes(config, model, loader, samples)
    on_gpu = resident == "device" and processes.device.type == "cuda"
    sharing = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))
    free = torch.cuda.mem_get_info(processes.device)[0] if on_gpu else available_memory()
    place = f"the memory of {processes.device}" if on_gpu else "the host's memory"
    print(
        f"data.features.resident {resident}: {len(sets)} view sets take {needed / GB:,.3g} GB of {place}"
        f"{f' in each of {sharing} processes' if sharing > 1 else ''}; {free / GB:,.3g} GB are free",
        flush=True,
    )
    if not all(processes.gather(needed * sharing <= USABLE * free)):
        raise ValueError(
            f"data.features.resident {resident}: {len(sets)} view sets take {needed * sharing / GB:,.3g} GB and "
            f"{USABLE * free / GB:,.3g} GB of {place} may be used; set it to none{' or host' if on_gpu else ''}, or "
            "data.features.pool to 2 or dtype to int8, which lose precision"
        )
    loader.hold(Residence(resident == "device", sets))


def resident_bytes(config: RunConfig, model: RoomPlanVLM, loader: ViewLoader, samples: list[Sample]) -> int:
    """Bytes that the features of the samples' views take in memory, each set once."""
    settings, sets = config.data.features, {sample.view_key: sample for sample in samples}
    return sum(
        entry_bytes(
            model.encoder, len(config.model.tap_layers), len(sample.record["images"]), loader.picture_size(sample),
            settings.dtype, heads_of(config.model), settings.pool,
        )
        for sample in sets.values()
    )  # fmt: skip
