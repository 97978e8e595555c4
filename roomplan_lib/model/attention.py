"""Where the resampler looks: the attention of its latents to the views' patches, worked out anew from its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from roomplan_lib.model.resampler import Attention, PerceiverResampler
from roomplan_lib.model.vlm import RoomPlanVLM

# Of a batch; the rest are its views.
OF_TEXT = ("input_ids", "attention_mask", "labels", "scene_index", "shared_prefix", "loss_weights")


def attention_weights(attention: Attention, x: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
    """[B, heads, L, N] shares that queries x [B, L, width] give to context [B, N, context_width]; they add up to 1.

    softmax(q k^T / sqrt(head_width)), which the layer's own fused attention never writes down; 0 where `seen` [B, N]
    is False.
    """

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, attention.head_width)).transpose(1, 2)

    query, key = heads(attention.query(x)), heads(attention.key_value(context).chunk(2, dim=-1)[0])
    scores = (query @ key.transpose(-1, -2) / attention.head_width**0.5).float()
    if seen is not None:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return scores.softmax(dim=-1)


@torch.no_grad()
def resampler_attention(model: RoomPlanVLM, batch: dict, layer: int = -1) -> tuple[Tensor, Tensor]:
    """What each visual token of the resampler reads of one set of views.

    batch: the collator's, of which the arguments of `encode_views` are read. layer: of the resampler. Returns shares on
    patches [L, V, rows, columns] and on camera tokens [L, V], the mean over heads and the sum over tapped layers; both
    together add up to 1 for each latent. Raises ValueError for several sets of views, a layer that is not there, and a
    resampler of another kind than `perceiver`.
    """
    resampler = model.resampler
    if not isinstance(resampler, PerceiverResampler):
        raise ValueError(
            f"model.resampler.kind: maps are read from kind perceiver, this one is {resampler.config.kind}"
        )
    views = {key: value for key, value in batch.items() if key not in OF_TEXT}
    if len(views["has_geometry"]) != 1:
        raise ValueError(f"expected one set of views, got {len(views['has_geometry'])}")
    if not -len(resampler.layers) <= layer < len(resampler.layers):
        raise ValueError(f"layer: the resampler has {len(resampler.layers)} layers, got {layer}")
    attention = resampler.layers[layer].cross_attention
    inputs: list[tuple] = []
    sizes: list[tuple[int, int, tuple[int, int]]] = []  # tapped layers, views, (rows, columns) of patches
    hooks = [
        attention.register_forward_hook(lambda module, args, output: inputs.append(args)),
        resampler.register_forward_hook(
            lambda module, args, output: sizes.append((len(args[0]), args[0][0].shape[1], args[2]))
        ),
    ]
    was_training = model.training
    try:
        model.eval().encode_views(**views)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    num_taps, num_views, (rows, columns) = sizes[0]
    shares = attention_weights(attention, *inputs[0])[0].mean(dim=0)  # [L, N]
    # The context is, for each tapped layer, the camera tokens of all views and then the patches of all views.
    shares = shares.unflatten(1, (num_taps, -1)).sum(dim=1)
    patches = shares[:, num_views:].unflatten(1, (num_views, rows, columns))
    return patches, shares[:, :num_views]
