"""Arithmetic for the full size, where the benchmark measures a miniature: FLOPs of a question by the way it is trained
on, bytes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

FULL_STAGE = Path("papermill_runs/params/stage2_3d.yaml")
ADAM_BYTES = 12  # of a trained weight in an exact checkpoint: float32 weight and two moments
ZERO3_BYTES = 14  # of every weight in a ZeRO-3 state in bf16: the weight, its float32 copy, two moments


def full_size_row() -> dict:
    """For FULL_STAGE, nothing measured: TFLOP of a question by variant of the part `groups`, bytes of its checkpoint
    and of a ZeRO-3 state.

    The state is that of the language model, resampler and geometry tokens trained whole in bf16, with the frozen
    encoder beside it in float32.
    """
    from roomplan_lib.config import load_run_config
    from roomplan_lib.training.plan import planned_model

    config = load_run_config(FULL_STAGE)
    model = planned_model(config.model, config.data)
    num_weights = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_encoder = sum(p.numel() for p in model.encoder.parameters())
    ours = ADAM_BYTES * num_trained
    zero3 = ZERO3_BYTES * (num_weights - num_encoder) + 4 * num_encoder
    return {
        "part": "full size",
        "variant": FULL_STAGE.stem,
        "note": "arithmetic, not measured",
        "tflop": question_tflop(model, 8, config.data.image_size),
        "bytes": ours,
        "zero3_bytes": zero3,
        "bytes_ratio": zero3 / ours,
    }


def question_tflop(model, num_views: int, image_size: int) -> dict[str, float]:
    """TFLOP that training on one question takes, by variant of the part `groups`; model: a RoomPlanVLM with LoRA, which
    may be on the meta device.

    The reference loop passes the resampler without gradients, trains the language model whole and has logits at every
    position. Ours has them where there is an answer; a group shares encoder, resampler, geometry tokens and the visual
    tokens' part of the language model.
    """
    from roomplan_lib.model.describe import language_model_flops, language_model_training_flops, model_card

    card = model_card(model, num_views, image_size)
    tokens, forward, lm = card["tokens"], card["forward_flops"], model.language_model.config
    length, prefix = tokens["sequence"], tokens["visual"]
    of_prefix = language_model_training_flops(model, prefix, 0)
    of_views = sum(card["train_flops"][part] for part in ("positions", "resampler", "geometry_encoder"))

    def ours(group_size: int, cached: bool) -> float:
        shared = of_views + of_prefix + (0.0 if cached else forward["encoder"])
        return shared / group_size + card["train_flops"]["language_model"] - of_prefix

    whole = 3 * language_model_flops(lm, length, length)
    flops = {
        "reference loop": forward["encoder"] + forward["resampler"] + 3 * forward["geometry_encoder"] + whole,
        "live, ungrouped": ours(1, False),
        "live, groups of 8": ours(8, False),
        "cached, ungrouped": ours(1, True),
        "cached, groups of 8": ours(8, True),
        "cached, groups of 16": ours(16, True),
    }
    return {name: value / 1e12 for name, value in flops.items()}
