"""Resamplers: from the encoder's tokens of all views to a fixed number of visual tokens.

The Perceiver's learned latents read all of them; a spatial resampler's tokens are places of the room.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roomplan_lib.config import ResamplerConfig


class Attention(nn.Module):
    """Multi-head attention from `width` queries to a context of `context_width`, in heads of `head_width`."""

    def __init__(self, width: int, context_width: int, head_width: int) -> None:
        super().__init__()
        if width % head_width:
            raise ValueError(f"attention width {width} is no multiple of head_width {head_width}")
        self.head_width = head_width
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        """x: [B, L, width], context: [B, N, context_width] -> [B, L, width].

        seen: [B, N] bool, False for context that has no part in it; None = all of it has.
        """

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        key, value = self.key_value(context).chunk(2, dim=-1)
        mask = None if seen is None else seen[:, None, None]
        y = F.scaled_dot_product_attention(heads(self.query(x)), heads(key), heads(value), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))


class ResamplerLayer(nn.Module):
    """Pre-norm cross-attention to the (already normalised) context, latent self-attention, feed-forward."""

    def __init__(self, width: int, context_width: int, ffn_width: int, head_width: int) -> None:
        super().__init__()
        self.cross_norm, self.self_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attention = Attention(width, context_width, head_width)
        self.self_attention = Attention(width, width, head_width)
        self.ffn = FeedForward(width, ffn_width)

    def forward(self, latents: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        latents = latents + self.cross_attention(self.cross_norm(latents), context, seen)
        normed = self.self_norm(latents)
        latents = latents + self.self_attention(normed, normed)
        return latents + self.ffn(self.ffn_norm(latents))


class ViewTokens(nn.Module):
    """What all resamplers but the reference one read of a view and a tapped layer: its camera token and patch tokens
    (registers are left out), each normalised per layer and marked with learned layer and view embeddings, patches also
    with a 2D sine embedding of their place."""

    def __init__(self, config: ResamplerConfig, num_taps: int, context_width: int) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.context_norms = nn.ModuleList(nn.LayerNorm(context_width) for _ in range(num_taps))
        self.layer_embedding = nn.Parameter(torch.randn(num_taps, context_width) * 0.02)
        self.view_embedding = nn.Parameter(torch.randn(config.max_views, context_width) * 0.02)
        self.patch_gain = nn.Parameter(torch.full((context_width,), 0.1))

    def marks(self, num_views: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """What is added to the normalised tokens of each of T tapped layers: to camera tokens [T, V, 1, E], to patch
        tokens [T, V, P, E]. Raises ValueError for more views than `max_views`."""
        if num_views > self.config.max_views:
            raise ValueError(f"{num_views} views, but model.resampler.max_views is {self.config.max_views}")
        of_views = self.layer_embedding[:, None, None] + self.view_embedding[:num_views, None]
        gain = self.patch_gain
        return of_views, of_views + sine_grid(grid, gain.shape[0], gain.device).to(gain.dtype) * gain


class PerceiverResampler(ViewTokens):
    """[B, V] views of tapped encoder tokens -> [B, num_latents, out_width] visual tokens, by learned latents that read
    the camera and patch tokens of all views."""

    def __init__(self, config: ResamplerConfig, num_taps: int, context_width: int, out_width: int) -> None:
        super().__init__(config, num_taps, context_width)
        self.camera_embedding = nn.Parameter(torch.randn(context_width) * 0.02)
        # As large as what the first layer adds: smaller ones drown in it, and all latents start as one (cosine 0.99).
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.width))
        self.layers = nn.ModuleList(
            ResamplerLayer(config.width, context_width, config.ffn_width, config.head_width)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, out_width, bias=False)

    def forward(
        self,
        taps: list[Tensor],
        patch_token_start: int,
        grid: tuple[int, int],
        positions: Tensor | None = None,
        view_mask: Tensor | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """taps: per tapped layer [B, V, patch_token_start + P, E]; grid: (rows, columns) of the P patches.

        positions: [B, V, P, E] encodings added to every tapped layer's normalised patch tokens, or None.
        view_mask: [B, V] bool, False for views whose tokens are left out of the context; None = all are in it.
        places: coordinates [B, V, P, 3] in metres and their validity [B, V, P], which only a spatial resampler reads.
        Returns [B, num_latents, out_width]. Raises ValueError for more views than `max_views`.
        """
        context, seen = [], None
        of_cameras, of_patches = self.marks(taps[0].shape[1], grid)
        for number, (tokens, norm) in enumerate(zip(taps, self.context_norms, strict=True)):
            cameras = norm(tokens[:, :, :1]) + (of_cameras[number] + self.camera_embedding)
            patches = norm(tokens[:, :, patch_token_start:]) + of_patches[number]
            patches = patches if positions is None else patches + positions
            context += [cameras.flatten(1, 2), patches.flatten(1, 2)]
        context = torch.cat(context, dim=1)
        if view_mask is not None:  # in the order of the context
            patches_seen = view_mask.repeat_interleave(grid[0] * grid[1], dim=1)
            seen = torch.cat([view_mask, patches_seen], dim=1).repeat(1, len(taps))
        latents = self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                latents = checkpoint(layer, latents, context, seen, use_reentrant=False)
            else:
                latents = layer(latents, context, seen)
        return self.out(self.norm(latents))


class SpatialResampler(ViewTokens):
    """[B, V] views of tapped encoder tokens -> [B, num_latents, out_width] visual tokens, each of them a place.

    Of the patches of all views `num_latents` are chosen that lie far apart; each stands for those that are nearest to
    it, by the mean of their tokens, of which a two-layer perceptron makes a visual token (the pooling of LLaVA-3D,
    Zhu et al. 2024). `num_layers`, `width` and `head_width` are not used: it has no attention.
    """

    layers: tuple[nn.Module, ...] = ()

    def __init__(self, config: ResamplerConfig, num_taps: int, context_width: int, out_width: int) -> None:
        super().__init__(config, num_taps, context_width)
        self.mlp = nn.Sequential(
            nn.Linear(context_width, config.ffn_width), nn.GELU(), nn.Linear(config.ffn_width, out_width)
        )

    @property
    def out(self) -> nn.Linear:
        return self.mlp[-1]

    def forward(
        self,
        taps: list[Tensor],
        patch_token_start: int,
        grid: tuple[int, int],
        positions: Tensor | Callable[[Tensor], Tensor] | None = None,
        view_mask: Tensor | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `PerceiverResampler.forward`. Patches without coordinates have no part in it; in a set of views where none
        has any, patches lie at their rows and columns and views side by side.

        positions: also as a function from the shares [B, num_latents, V * P] that places have of patches to the means
        [B, num_latents, E] of their encodings.
        """
        count, num_views, device = *taps[0].shape[:2], taps[0].device
        rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        views = torch.arange(num_views, device=device)[:, None] * 2 * max(grid)
        coordinates = torch.stack(torch.broadcast_tensors(rows.flatten(), columns.flatten(), views), dim=-1).float()
        coordinates = coordinates.expand(count, -1, -1, -1)
        valid = torch.ones(coordinates.shape[:3], dtype=torch.bool, device=device)
        if places is not None:
            known = places[1].flatten(1).any(1)[:, None, None]
            coordinates = torch.where(known[..., None], places[0], coordinates)
            valid = places[1] | ~known
        if view_mask is not None:
            valid = valid & view_mask[..., None]
        owner = nearest_of_spread(coordinates.flatten(1, 2), valid.flatten(1), self.config.num_latents)
        # A column more takes the patches that have no part in it.
        shares = F.one_hot(owner, self.config.num_latents + 1)[..., :-1].to(self.patch_gain.dtype)
        of_place = (shares / shares.sum(1, keepdim=True).clamp(min=1)).mT  # [B, num_latents, V * P]
        used = of_place.sum(-1, keepdim=True)  # 0 for a place without patches
        # Gains, biases and marks are added to means rather than to patches: less to write, less to keep.
        found = of_place @ self.marks(num_views, grid)[1].mean(0).flatten(0, 1)
        for tokens, norm in zip(taps, self.context_norms, strict=True):
            normed = F.layer_norm(tokens[:, :, patch_token_start:], norm.normalized_shape, eps=norm.eps)
            means = of_place @ normed.flatten(1, 2)
            found = found + (means * norm.weight + used * norm.bias) / len(taps)
        if positions is not None:
            found = found + (positions(of_place) if callable(positions) else of_place @ positions.flatten(1, 2))
        return self.mlp(found)


@torch.no_grad()
def nearest_of_spread(points: Tensor, valid: Tensor, count: int) -> Tensor:
    """[B, N] int: which of `count` chosen points is nearest to each of [B, N, 3]; `count` where not `valid` [B, N].

    Farthest point sampling (Gonzalez 1985): the first valid point, then always the one farthest from all chosen ones.
    With fewer valid points than `count` the last numbers have no points.
    """
    points, rows = points.float(), torch.arange(len(points), device=points.device)
    distance = torch.full(valid.shape, torch.inf, device=points.device).masked_fill(~valid, -1.0)
    owner = torch.full(valid.shape, count, device=points.device)
    chosen = valid.to(torch.uint8).argmax(1)
    for number in range(count):
        found = (points - points[rows, chosen][:, None]).square().sum(-1)
        closer = found < distance  # never of what is not valid, nor of a point that is chosen twice
        owner = owner.masked_fill(closer, number)
        distance = torch.where(closer, found, distance)
        chosen = distance.argmax(1)
    return owner


class ReferenceLayer(nn.Module):
    """Post-norm cross-attention and feed-forward, with the keys of vggt-qwen3's projector layers."""

    def __init__(self, width: int, ffn_width: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, num_heads, batch_first=True)  # its name; it reads the context
        self.mlp = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Identity(), nn.Linear(ffn_width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, latents: Tensor, context: Tensor, hidden: Tensor | None = None) -> Tensor:
        """hidden: [B, N] bool, True for context that has no part in it."""
        read = self.self_attn(latents, context, context, key_padding_mask=hidden, need_weights=False)[0]
        latents = self.norm1(latents + read)
        return self.norm2(latents + self.mlp(latents))


class ReferenceResampler(nn.Module):
    """The projector of vggt-qwen3 (`perceiver_small`, 1.2 B parameters): loads its checkpoints, no more.

    It has neither latent self-attention nor embeddings of views and places, and its heads of 512 are too wide for
    fused attention; `PerceiverResampler` is the better choice for training. Unlike vggt-qwen3 it is shown the camera
    and patch tokens of every view, not the first 128 tokens of the first.
    """

    def __init__(self, config: ResamplerConfig, num_taps: int, context_width: int, out_width: int) -> None:
        super().__init__()
        if num_taps != 1:
            raise ValueError(f"model.resampler.kind reference reads one of model.tap_layers, got {num_taps}")
        if config.width % config.head_width:
            raise ValueError(f"model.resampler.width {config.width} is no multiple of head_width {config.head_width}")
        self.config = config
        self.gradient_checkpointing = False
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.width) * 0.02)
        self.in_proj = nn.Linear(context_width, config.width)
        self.layers = nn.ModuleList(
            ReferenceLayer(config.width, config.ffn_width, config.width // config.head_width)
            for _ in range(config.num_layers)
        )
        self.out_proj = nn.Linear(config.width, out_width)

    @property
    def out(self) -> nn.Linear:
        return self.out_proj

    def forward(
        self,
        taps: list[Tensor],
        patch_token_start: int,
        grid: tuple[int, int],
        positions: Tensor | None = None,
        view_mask: Tensor | None = None,
        places: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `PerceiverResampler.forward`, for one tapped layer."""
        patches = taps[0][:, :, patch_token_start:]
        if positions is not None:
            patches = patches + positions
        tokens = torch.cat([taps[0][:, :, :1], patches], dim=2)
        hidden = None if view_mask is None else ~view_mask.repeat_interleave(tokens.shape[2], dim=1)
        context = self.in_proj(tokens.flatten(1, 2))
        latents = self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                latents = checkpoint(layer, latents, context, hidden, use_reentrant=False)
            else:
                latents = layer(latents, context, hidden)
        return self.out_proj(latents)


def build_resampler(
    config: ResamplerConfig, num_taps: int, context_width: int, out_width: int
) -> PerceiverResampler | SpatialResampler | ReferenceResampler:
    """The resampler of `config.kind` from `num_taps` encoder layers of `context_width` to `out_width`."""
    return KINDS[config.kind](config, num_taps, context_width, out_width)


KINDS = {"perceiver": PerceiverResampler, "spatial": SpatialResampler, "reference": ReferenceResampler}


def sine_grid(grid: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """[rows * columns, width] sine embedding of patch centres, half the width for each axis.

    Angles are those of the Transformer (Vaswani et al. 2017) with wavelengths from 2 pi to 100 * 2 pi patches.
    """
    quarter = width // 4
    frequency = torch.exp(torch.arange(quarter, device=device) * (-math.log(100.0) / quarter))
    angles = [torch.arange(n, device=device)[:, None] * frequency for n in grid]
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=-1) for a in angles)
    full = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1).flatten(
        0, 1
    )
    return F.pad(full, (0, width - full.shape[-1]))
