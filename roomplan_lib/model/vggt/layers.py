"""Transformer parts that the DINOv2 encoder, the aggregator and the camera head share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, exact GELU, Linear on the last axis."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """Learned gain per channel of a residual branch (Touvron et al. 2021, CaiT)."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.init = init
        self.gamma = nn.Parameter(torch.full((width,), float(init)))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


Rope = tuple[Tensor, Tensor]


def rope_2d(grid_hw: tuple[int, int], num_special: int, head_dim: int, frequency: float, device: torch.device) -> Rope:
    """Cosines and sines, both fp32 [num_special + h * w, head_dim], of the 2D rotary embedding of one view.

    The first half of the channels turns with the row, the second with the column. Patches count from 1;
    the special tokens stand at (0, 0) and are therefore not turned.
    """
    quarter = head_dim // 4
    inverse = frequency ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, columns = (torch.arange(1, n + 1, device=device, dtype=torch.float32)[:, None] * inverse for n in grid_hw)
    rows = rows[:, None].expand(-1, grid_hw[1], -1)
    columns = columns[None].expand(grid_hw[0], -1, -1)
    angles = torch.cat((rows, rows, columns, columns), dim=-1).flatten(0, 1)
    angles = torch.cat((angles.new_zeros(num_special, head_dim), angles))
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rope: Rope) -> Tensor:
    """x [B, heads, views * tokens, head_dim], every view turned by the same table."""
    cos, sin = (table.to(x.dtype) for table in rope)
    a, b, c, d = x.chunk(4, dim=-1)  # (a, b) pair up within the row half, (c, d) within the column half
    turned = torch.cat((-b, a, -d, c), dim=-1)
    split = (-1, cos.shape[0])
    return (x.unflatten(2, split) * cos + turned.unflatten(2, split) * sin).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v of [B, heads, N, head_dim].

    Where bfloat16 is trained on a CPU the products are written out: torch's fused kernel has no fast backward pass
    there and takes 3 to 7 times as long at the sizes that a CPU trains.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention, with LayerNorm on queries and keys if `qk_norm`."""

    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, head_dim]
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        # Under autocast the norms return fp32.
        x = attend(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale; x [B, N, width]."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        layer_scale_init: float,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads, qk_norm)
        self.ls1 = LayerScale(width, layer_scale_init)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), width)
        self.ls2 = LayerScale(width, layer_scale_init)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rope))
        return x + self.ls2(self.mlp(self.norm2(x)))
