"""From pictures to tokens: the DINOv2 encoder of each view and the alternating attention over all views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from roomplan_lib.model.vggt.config import VGGTConfig
from roomplan_lib.model.vggt.layers import Block, rope_2d

# ImageNet statistics of RGB in [0, 1].
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


class PatchProjection(nn.Module):
    """[B, 3, H, W] -> [B, P, width], patches row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class DinoEncoder(nn.Module):
    """DINOv2 vision transformer with registers (Oquab et al. 2023, Darcet et al. 2024), one view at a time."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        width, grid = config.embed_dim, config.img_size // config.patch_size
        self.grid = grid
        self.num_special = 1 + config.num_register_tokens
        self.patch_embed = PatchProjection(config.patch_size, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_tokens = nn.Parameter(torch.empty(1, config.num_register_tokens, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid * grid, width))
        # DINOv2 hid patches behind it in its own training; it stays in the checkpoint and is read by nothing.
        self.mask_token = nn.Parameter(torch.empty(1, width), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, config.patch_embed_num_heads, config.mlp_ratio, layer_scale_init=1.0, norm_eps=1e-6)
            for _ in range(config.patch_embed_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def reset_parameters(self) -> None:
        for parameter in (self.cls_token, self.register_tokens, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.mask_token)

    def _patch_positions(self, grid_hw: tuple[int, int]) -> Tensor:
        """[1, h * w, width]: the stored square grid resized to the picture's, as DINOv2 does with registers."""
        stored = self.pos_embed[:, 1:]
        if grid_hw == (self.grid, self.grid):
            return stored
        stored = stored.float().unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        resized = F.interpolate(stored, size=grid_hw, mode="bicubic", antialias=True)
        return resized.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)

    def forward(self, pixels: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """Normalised pixels [B, 3, H, W] -> normalised patch tokens [B, P, width]."""
        patches = self.patch_embed(pixels) + self._patch_positions(grid_hw)
        special = torch.cat((self.cls_token + self.pos_embed[:, :1], self.register_tokens), dim=1)
        x = torch.cat((special.to(patches.dtype).expand(len(patches), -1, -1), patches), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, self.num_special :]


class Aggregator(nn.Module):
    """VGGT's encoder (Wang et al. 2025, section 3.2): frame attention within a view alternates with global attention.

    The first view is the reference: it has its own camera and register tokens, and world coordinates are its own.
    """

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patch_token_start = 1 + config.num_register_tokens
        self.patch_embed = DinoEncoder(config)
        # Slot 0 belongs to the first view, slot 1 to every other.
        self.camera_token = nn.Parameter(torch.empty(1, 2, 1, width))
        self.register_token = nn.Parameter(torch.empty(1, 2, config.num_register_tokens, width))

        def blocks() -> nn.ModuleList:
            return nn.ModuleList(
                Block(width, config.num_heads, config.mlp_ratio, config.layer_scale_init, qk_norm=True)
                for _ in range(config.depth)
            )

        self.frame_blocks, self.global_blocks = blocks(), blocks()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.camera_token, std=0.02)
        nn.init.trunc_normal_(self.register_token, std=0.02)

    def layer_indices(self, tap_layers: Sequence[int] | None) -> list[int]:
        """`tap_layers` counted from 0; None = every layer. Raises ValueError for none at all or one out of range."""
        depth = self.config.depth
        if tap_layers is None:
            return list(range(depth))
        layers = [int(layer) for layer in tap_layers]
        if not layers or any(not -depth <= layer < depth for layer in layers):
            raise ValueError(f"tap_layers: expected layers in {-depth}..{depth - 1} (depth {depth}), got {layers}")
        return [layer % depth for layer in layers]

    def forward(self, images: Tensor, tap_layers: Sequence[int] | None = None) -> tuple[list[Tensor], int]:
        """Tokens of the tapped layers and the index of the first patch token.

        images: [B, S, 3, H, W] RGB in [0, 1], H and W multiples of the patch size; view 0 is the reference.
        tap_layers: layers in the order wanted, negative ones count from the end; None = all. Blocks after the last
            tapped one do not run and other layers are not kept.

        Returns one tensor [B, S, 1 + R + P, 2 * embed_dim] per tapped layer, in the dtype of the weights: camera
        token, R register tokens, patches row by row; frame-block output first, global-block output second.
        Raises ValueError for other shapes or layers out of range.
        """
        layers, size = self.layer_indices(tap_layers), self.config.patch_size
        if images.ndim != 5 or images.shape[2] != 3 or 0 in images.shape or not images.is_floating_point():
            raise ValueError(
                f"images: expected floating-point [B, S, 3, H, W] in [0, 1], got {images.dtype} {tuple(images.shape)}"
            )
        batch, views, _, height, width = images.shape
        if height % size or width % size:
            raise ValueError(f"images: height {height} and width {width} must be multiples of the patch size {size}")

        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        pixels = ((images - mean) / std).to(self.camera_token.dtype).flatten(0, 1)
        grid_hw = (height // size, width // size)
        patches = self.patch_embed(pixels, grid_hw).unflatten(0, (batch, views))  # [B, S, P, embed_dim]
        special = torch.cat((self.camera_token, self.register_token), dim=2).to(patches.dtype)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), dim=1)
        x = torch.cat((special.expand(batch, -1, -1, -1), patches), dim=2)

        head_dim = self.config.embed_dim // self.config.num_heads
        rope = rope_2d(grid_hw, self.patch_token_start, head_dim, self.config.rope_frequency, images.device)
        tapped: dict[int, Tensor] = {}
        for layer in range(max(layers) + 1):
            frame = self._run(self.frame_blocks[layer], x.flatten(0, 1), rope).view_as(x)
            x = self._run(self.global_blocks[layer], frame.flatten(1, 2), rope).view_as(x)
            if layer in layers:
                tapped[layer] = torch.cat((frame, x), dim=-1)
        return [tapped[layer] for layer in layers], self.patch_token_start

    def _run(self, block: Block, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        if self.training and self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope)
