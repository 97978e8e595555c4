"""Perceiver resampler: learned latents read the encoder's tokens of all views and become the visual tokens."""

from __future__ import annotations

import math

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


class PerceiverResampler(nn.Module):
    """[B, V] views of tapped encoder tokens -> [B, num_latents, out_width] visual tokens.

    The context of one view and one tapped layer is its camera token and its patch tokens (registers are left out),
    each normalised per layer and marked with learned layer and view embeddings and a 2D sine embedding of the patch.
    """

    def __init__(self, config: ResamplerConfig, num_taps: int, context_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.context_norms = nn.ModuleList(nn.LayerNorm(context_width) for _ in range(num_taps))
        self.layer_embedding = nn.Parameter(torch.randn(num_taps, context_width) * 0.02)
        self.view_embedding = nn.Parameter(torch.randn(config.max_views, context_width) * 0.02)
        self.camera_embedding = nn.Parameter(torch.randn(context_width) * 0.02)
        self.patch_gain = nn.Parameter(torch.full((context_width,), 0.1))
        self.latents = nn.Parameter(torch.randn(config.num_latents, config.width) * 0.02)
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
    ) -> Tensor:
        """taps: per tapped layer [B, V, patch_token_start + P, E]; grid: (rows, columns) of the P patches.

        positions: [B, V, P, E] encodings added to every tapped layer's normalised patch tokens, or None.
        view_mask: [B, V] bool, False for views whose tokens are left out of the context; None = all are in it.
        Returns [B, num_latents, out_width]. Raises ValueError for more views than `max_views`.
        """
        num_views = taps[0].shape[1]
        if num_views > self.config.max_views:
            raise ValueError(f"{num_views} views, but model.resampler.max_views is {self.config.max_views}")
        patch_2d = sine_grid(grid, self.patch_gain.shape[0], taps[0].device).to(taps[0].dtype) * self.patch_gain
        views = self.view_embedding[:num_views, None]
        context = []
        for tokens, norm, layer in zip(taps, self.context_norms, self.layer_embedding, strict=True):
            tokens = norm(tokens) + layer + views
            patches = tokens[:, :, patch_token_start:] + patch_2d
            if positions is not None:
                patches = patches + positions
            context += [(tokens[:, :, :1] + self.camera_embedding).flatten(1, 2), patches.flatten(1, 2)]
        context, seen = torch.cat(context, dim=1), None
        if view_mask is not None:  # in the order of the context
            of_patches = view_mask.repeat_interleave(grid[0] * grid[1], dim=1)
            seen = torch.cat([view_mask, of_patches], dim=1).repeat(1, len(taps))
        latents = self.latents.expand(len(context), -1, -1)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                latents = checkpoint(layer, latents, context, seen, use_reentrant=False)
            else:
                latents = layer(latents, context, seen)
        return self.out(self.norm(latents))


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
) -> PerceiverResampler | ReferenceResampler:
    """The resampler of `config.kind` from `num_taps` encoder layers of `context_width` to `out_width`."""
    kind = ReferenceResampler if config.kind == "reference" else PerceiverResampler
    return kind(config, num_taps, context_width, out_width)


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
