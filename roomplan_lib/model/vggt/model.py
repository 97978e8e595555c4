"""VGGT as a whole (Wang et al. 2025, "VGGT: Visual Geometry Grounded Transformer")."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from roomplan_lib.files import new_file, write_whole
from roomplan_lib.model.vggt.aggregator import Aggregator
from roomplan_lib.model.vggt.config import VGGTConfig
from roomplan_lib.model.vggt.heads import CameraHead, depth_head, point_head


class VGGT(nn.Module):
    """Aggregator and heads, with the keys of the published checkpoint (its track head is not built).

    `VGGT(config)` has weights for training from scratch; `load_vggt` reads a checkpoint.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        self.frozen = False
        self.aggregator = Aggregator(config)
        if config.enable_camera:
            self.camera_head = CameraHead(config)
        if config.enable_depth:
            self.depth_head = depth_head(config)
        if config.enable_point:
            self.point_head = point_head(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Weights for training from scratch: linear layers and tokens truncated normal 0.02, biases 0, LayerScale 1
        in the DINOv2 part and `layer_scale_init` elsewhere, convolutions as torch has them."""
        for module in reversed(list(self.modules())):  # children first: the camera head sets a bias of its own
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def freeze(self) -> VGGT:
        """No gradients, and eval mode whatever `train()` is called on this model or around it."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> VGGT:
        return super().train(mode and not self.frozen)

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes a folder that `load_vggt` reads: config.json and model.safetensors, with the published keys.

        state_dict: the weights that are written, in their dtype; the model's own when left out.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        with new_file(Path(folder) / "model.safetensors") as file:
            file.write(save({key: value.contiguous() for key, value in weights.items()}))
        write_whole(Path(folder) / "config.json", json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")

    def forward(self, images: Tensor, heads: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Predictions of `heads` ("camera", "depth", "point"; None = all that are built), all fp32.

        images: [B, S, 3, H, W] or [S, 3, H, W] (then B = 1) RGB in [0, 1], H and W multiples of the patch size.

        camera: `pose_enc` [B, S, 9], see `pose_encoding_to_cameras`.
        depth: `depth` [B, S, H, W, 1] along the camera's z and `depth_conf` [B, S, H, W], above 1.
        point: `world_points` [B, S, H, W, 3] and `world_points_conf` [B, S, H, W].
        Lengths are in the scene's own unit, not metres; the world is the first view's camera frame. A head that is
        not asked for costs nothing. Raises ValueError for pictures of other shapes or a head that is not built.
        """
        heads = self.config.heads if heads is None else tuple(heads)
        unknown = [head for head in heads if head not in self.config.heads]
        if unknown or not heads:
            raise ValueError(f"heads: expected some of {list(self.config.heads)}, those built, got {list(heads)}")
        if images.ndim == 4:
            images = images[None]

        layers = self.head_layers(heads)
        tokens, patch_token_start = self.aggregator(images, layers)
        return self.read_heads(
            heads, dict(zip(layers, tokens, strict=True)), patch_token_start, tuple(images.shape[-2:])
        )

    def head_layers(self, heads: Sequence[str]) -> list[int]:
        """Aggregator layers that `heads` read, in order."""
        layers = {self.config.depth - 1} if "camera" in heads else set()
        if "depth" in heads or "point" in heads:
            layers |= set(self.config.head_layers)
        return sorted(layers)

    def read_heads(
        self, heads: Sequence[str], tokens: dict[int, Tensor], patch_token_start: int, image_size_hw: tuple[int, int]
    ) -> dict[str, Tensor]:
        """`forward` from tokens that are already there: aggregator outputs by layer, at least `head_layers(heads)`."""
        predictions: dict[str, Tensor] = {}
        with torch.autocast(next(iter(tokens.values())).device.type, enabled=False):
            tokens = {layer: tokens[layer].float() for layer in self.head_layers(heads)}
            if "camera" in heads:
                predictions["pose_enc"] = _in_fp32(self.camera_head, tokens[self.config.depth - 1])[-1]
            dense = ("depth", ("depth", "depth_conf")), ("point", ("world_points", "world_points_conf"))
            for head, names in dense:
                if head in heads:
                    taps = [tokens[layer] for layer in self.config.head_layers]
                    values = _in_fp32(getattr(self, f"{head}_head"), taps, patch_token_start, image_size_hw)
                    predictions |= dict(zip(names, values, strict=True))
        return predictions


def _in_fp32(head: nn.Module, *args):
    """`head(*args)`, with its weights widened for the call if they are kept in a narrower type."""
    if all(parameter.dtype == torch.float32 for parameter in head.parameters()):
        return head(*args)
    weights = {name: parameter.float() for name, parameter in head.named_parameters()}
    return torch.func.functional_call(head, weights, args)
