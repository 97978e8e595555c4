"""What VGGT reads from its tokens: camera poses, depth maps, point maps. All of it runs in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roomplan_lib.model.vggt.config import VGGTConfig
from roomplan_lib.model.vggt.layers import Block, Mlp

POSE_ENCODING_SIZE = 9  # translation 3, quaternion xyzw 4, vertical and horizontal field of view


class CameraHead(nn.Module):
    """Pose encoding from the camera tokens, refined by a few passes through one small transformer."""

    def __init__(self, config: VGGTConfig) -> None:
        super().__init__()
        width = 2 * config.embed_dim
        self.num_iterations = config.camera_iterations
        self.empty_pose_tokens = nn.Parameter(torch.empty(1, 1, POSE_ENCODING_SIZE))
        self.token_norm = nn.LayerNorm(width)
        self.embed_pose = nn.Linear(POSE_ENCODING_SIZE, width)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.trunk = nn.Sequential(
            *(
                Block(width, config.camera_num_heads, config.mlp_ratio, config.layer_scale_init)
                for _ in range(config.camera_trunk_depth)
            )
        )
        self.trunk_norm = nn.LayerNorm(width)
        self.pose_branch = Mlp(width, width // 2, POSE_ENCODING_SIZE)

    def reset_parameters(self) -> None:
        """Starts at the identity rotation and a field of view of one radian, off the flat side of its ReLU."""
        nn.init.zeros_(self.empty_pose_tokens)
        with torch.no_grad():
            self.pose_branch.fc2.bias[6:] = 1 / self.num_iterations

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """Last layer's tokens fp32 [B, S, 1 + R + P, 2 * embed_dim] -> one pose encoding [B, S, 9] per iteration.

        Translation (scene units), quaternion xyzw (not normalised), vertical and horizontal field of view (radians);
        the last iteration is the prediction. Each iteration takes the previous one as given: no gradient through it.
        """
        camera = self.token_norm(tokens[:, :, 0])
        conditioned = F.layer_norm(camera, camera.shape[-1:], eps=1e-6)
        previous, encodings = None, []
        for _ in range(self.num_iterations):
            known = self.empty_pose_tokens.expand(*camera.shape[:2], -1) if previous is None else previous.detach()
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(known)).chunk(3, dim=-1)
            x = self.trunk(camera + gate * (conditioned * (1 + scale) + shift))
            update = self.pose_branch(self.trunk_norm(x))
            previous = update if previous is None else previous.detach() + update
            encodings.append(torch.cat((previous[..., :7], F.relu(previous[..., 7:])), dim=-1))
        return encodings


class ResidualConvUnit(nn.Module):
    """Two 3x3 convolutions. The skip carries relu(x): the published one rectifies its input in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return x + self.conv2(F.relu(self.conv1(x)))


class FusionBlock(nn.Module):
    """Adds a finer map to the coarser one so far and resizes the sum (RefineNet's fusion as in DPT)."""

    def __init__(self, channels: int, has_residual: bool) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        if has_residual:
            self.resConfUnit1 = ResidualConvUnit(channels)
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, x: Tensor, finer: Tensor | None, size_hw: tuple[int, int]) -> Tensor:
        if finer is not None:
            x = x + self.resConfUnit1(finer)
        x = F.interpolate(self.resConfUnit2(x), size=size_hw, mode="bilinear", align_corners=True)
        return self.out_conv(x)


class DPTScratch(nn.Module):
    """The convolutions after the four maps are in place; `scratch` in the published keys."""

    def __init__(self, config: VGGTConfig, num_outputs: int) -> None:
        super().__init__()
        features = config.dpt_features
        for index, channels in enumerate(config.dpt_out_channels, start=1):
            setattr(self, f"layer{index}_rn", nn.Conv2d(channels, features, 3, padding=1, bias=False))
            setattr(self, f"refinenet{index}", FusionBlock(features, has_residual=index < 4))
        self.output_conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.output_conv2 = nn.Sequential(
            nn.Conv2d(features // 2, config.dpt_last_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(config.dpt_last_channels, num_outputs, 1),
        )

    def fuse(self, maps: list[Tensor]) -> Tensor:
        """Four maps, finest first, to one of half the channels at twice the finest map's size."""
        maps = [getattr(self, f"layer{index}_rn")(x) for index, x in enumerate(maps, start=1)]
        sizes = [(2 * maps[0].shape[-2], 2 * maps[0].shape[-1]), *(tuple(x.shape[-2:]) for x in maps[:3])]
        x = self.refinenet4(maps[3], None, sizes[3])
        for index in (3, 2, 1):
            x = getattr(self, f"refinenet{index}")(x, maps[index - 1], sizes[index - 1])
        return self.output_conv1(x)


def _uv_embedding(x: Tensor, aspect: float) -> Tensor:
    """[1, channels, h, w], a tenth of the sines and cosines of each cell's place in the picture.

    Places span the rectangle of unit diagonal and `aspect` = W / H about (0, 0), columns in the first half of the
    channels and rows in the second, wavelengths up to 100 (VGGT's DPT heads).
    """
    channels, height, width = x.shape[1:]
    diagonal = (aspect**2 + 1) ** 0.5
    frequencies = 100.0 ** (-torch.arange(channels // 4, device=x.device, dtype=torch.float64) / (channels // 4))

    def embed(span: float, count: int) -> Tensor:
        edge = span * (count - 1) / count
        places = torch.linspace(-edge, edge, count, device=x.device, dtype=torch.float32).double()
        angles = frequencies[:, None] * places
        return torch.cat((angles.sin(), angles.cos())).to(x.dtype)  # [channels / 2, count]

    columns = embed(aspect / diagonal, width)[:, None, :].expand(-1, height, -1)
    rows = embed(1 / diagonal, height)[:, :, None].expand(-1, -1, width)
    return 0.1 * torch.cat((columns, rows))[None]


def _inverse_log(x: Tensor) -> Tensor:
    """sign(x) * (exp(|x|) - 1): linear near the camera, exponential far away."""
    return x.sign() * x.abs().expm1()


class DPTHead(nn.Module):
    """Dense prediction (Ranftl et al. 2021) from four layers' patch tokens; `activation` maps raw outputs to values."""

    def __init__(self, config: VGGTConfig, num_outputs: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width, channels = 2 * config.embed_dim, config.dpt_out_channels
        self.patch_size, self.chunk_size = config.patch_size, config.frames_chunk_size
        self.activation = activation
        self.norm = nn.LayerNorm(width)
        self.projects = nn.ModuleList(nn.Conv2d(width, count, 1) for count in channels)
        self.resize_layers = nn.ModuleList(
            (
                nn.ConvTranspose2d(channels[0], channels[0], 4, stride=4),
                nn.ConvTranspose2d(channels[1], channels[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels[3], channels[3], 3, stride=2, padding=1),
            )
        )
        self.scratch = DPTScratch(config, num_outputs + 1)

    def forward(
        self, layers: list[Tensor], patch_token_start: int, image_size_hw: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Four layers' tokens fp32 [B, S, T, 2 * embed_dim] -> values [B, S, H, W, C], confidence [B, S, H, W] > 1."""
        batch, views = layers[0].shape[:2]
        patches = [tokens[:, :, patch_token_start:].flatten(0, 1) for tokens in layers]
        # Views do not see each other here, so a few at a time give the same numbers in less memory.
        chunks = zip(*(tokens.split(self.chunk_size) for tokens in patches), strict=True)
        raw = torch.cat([self._predict(chunk, image_size_hw) for chunk in chunks])
        # Exponentials of bfloat16 numbers, as training under autocast has them, would be off by a percent.
        raw = raw.float().permute(0, 2, 3, 1).unflatten(0, (batch, views))
        return self.activation(raw[..., :-1]), 1 + raw[..., -1].exp()

    def _predict(self, patches: tuple[Tensor, ...], image_size_hw: tuple[int, int]) -> Tensor:
        """Four times [views, P, 2 * embed_dim] -> raw maps [views, C + 1, H, W]."""
        height, width = image_size_hw
        grid_hw = (height // self.patch_size, width // self.patch_size)
        maps = []
        for tokens, project, resize in zip(patches, self.projects, self.resize_layers, strict=True):
            x = project(self.norm(tokens).transpose(1, 2).unflatten(2, grid_hw))
            maps.append(resize(x + _uv_embedding(x, width / height)))
        x = F.interpolate(self.scratch.fuse(maps), size=image_size_hw, mode="bilinear", align_corners=True)
        return self.scratch.output_conv2(x + _uv_embedding(x, width / height))


def depth_head(config: VGGTConfig) -> DPTHead:
    """Depth along the camera's z axis, [B, S, H, W, 1] in scene units, positive."""
    return DPTHead(config, 1, torch.exp)


def point_head(config: VGGTConfig) -> DPTHead:
    """Points [B, S, H, W, 3] in the first camera's frame, in scene units."""
    return DPTHead(config, 3, _inverse_log)
