"""3D position encodings: where in the room each patch lies, added to patch tokens before the resampler.

Coordinates are metres in the sample's reference frame, averaged over the valid depth pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from roomplan_lib.config import PositionsConfig

METHODS: dict[str, Callable[[PositionsConfig, int], nn.Module]] = {}
VOXEL = 0.1  # metres, and the bounds below: Video-3D-LLM's discrete coordinates
LOWER, UPPER = (-15.0, -15.0, -5.0), (15.0, 15.0, 5.0)


def register_positions(name: str) -> Callable:
    """Class decorator: makes a module built from (PositionsConfig, width) known as `model.positions.method: name`.

    Its forward takes coordinates [..., 3] (metres, or voxel numbers when discrete) and returns [..., width].
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        METHODS[name] = cls
        return cls

    return register


def build_positions(config: PositionsConfig, width: int) -> nn.Module | None:
    """The encoder named by `config.method` for tokens of `width`; None for "base". ValueError for unknown names."""
    if config.method == "base":
        return None
    if config.method not in METHODS:
        raise ValueError(f"model.positions.method: unknown {config.method!r}; known: base, {', '.join(METHODS)}")
    return METHODS[config.method](config, width)


def encode_positions(encoder: nn.Module, config: PositionsConfig, coordinates: Tensor, valid: Tensor) -> Tensor:
    """[..., width] encodings of patch coordinates [..., 3] in metres; exactly zero where `valid` [...] is False."""
    if config.coordinates == "discrete":
        lower, upper = coordinates.new_tensor(LOWER), coordinates.new_tensor(UPPER)
        coordinates = ((coordinates.clamp(lower, upper) - lower) / VOXEL).round()
    return encoder(coordinates).masked_fill(~valid[..., None], 0.0)


def sin3d_encoding(coords: Tensor, dim: int) -> Tensor:
    """Sine encoding of coordinates [..., 3] -> [..., dim], as in Video-3D-LLM.

    dim // 3 channels per axis: channel k holds sin (k even) or cos (k odd) of a * 10000^(-2 floor(k/2) / (dim // 3));
    axes are concatenated and padded with zeros. Computed in fp32, returned in the dtype of `coords`.
    """
    n = dim // 3
    channel = torch.arange(n, device=coords.device)
    frequency = 10000.0 ** (-2.0 * torch.div(channel, 2, rounding_mode="floor") / n)
    angles = coords.float()[..., None] * frequency
    encoding = torch.where(channel % 2 == 0, angles.sin(), angles.cos()).flatten(-2)
    return nn.functional.pad(encoding, (0, dim - 3 * n)).to(coords.dtype)


@register_positions("sin3d_pe")
class SinePositions(nn.Module):
    """`sin3d_encoding` at the tokens' width."""

    def __init__(self, config: PositionsConfig, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, coordinates: Tensor) -> Tensor:
        return sin3d_encoding(coordinates, self.width)


@register_positions("mlp_pe")
class MlpPositions(nn.Sequential):
    """Linear(3, d), GELU, Linear(d, d), GELU, Linear(d, width)."""

    def __init__(self, config: PositionsConfig, width: int) -> None:
        d = config.width
        super().__init__(nn.Linear(3, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, width))
