"""Geometry tokens: what the cameras and depths of the views say, without their pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roomplan_lib.config import GeometryConfig
from roomplan_lib.model.resampler import Attention, FeedForward

NUM_DEPTH_BINS = 16
RECORD_WIDTH = 9 + 3 + 4 + NUM_DEPTH_BINS  # R, t, K by image size, log-depth histogram


class GeometryEncoder(nn.Module):
    """[B, V, RECORD_WIDTH] normalised geometry records -> [B, num_tokens, out_width].

    Learned queries attend to one embedding per view. A sample without a record uses a learned null record in every
    view, through the same modules, so that each rank runs the same ones.
    """

    def __init__(self, config: GeometryConfig, out_width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(RECORD_WIDTH, config.width)
        self.null_record = nn.Parameter(torch.randn(config.width) * 0.02)
        self.view_ffn = FeedForward(config.width, 4 * config.width)
        self.view_norm, self.context_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.queries = nn.Parameter(torch.randn(config.num_tokens, config.width))  # large, as the resampler's latents
        self.attention = Attention(config.width, config.width, config.head_width)
        self.query_norm, self.norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, out_width, bias=False)

    def forward(self, records: Tensor, has_geometry: Tensor, view_mask: Tensor | None = None) -> Tensor:
        """records: [B, V, RECORD_WIDTH] (see `normalise_records`); has_geometry: [B] bool.

        view_mask: [B, V] bool, False for views that are not read; None = all are.
        """
        x = torch.where(has_geometry[:, None, None], self.embed(records), self.null_record)
        x = x + self.view_ffn(self.view_norm(x))
        queries = self.queries.expand(len(x), -1, -1)
        tokens = queries + self.attention(self.query_norm(queries), self.context_norm(x), view_mask)
        return self.out(self.norm(tokens))


def normalise_records(
    camera_to_reference: Tensor, K: Tensor, image_size: tuple[int, int], depth_hist: Tensor
) -> Tensor:
    """[V, RECORD_WIDTH] records from poses in the reference frame [V, 4, 4] (metres), K [V, 3, 3] in pixels of an
    image of `image_size` (width, height), and depth_hist [V, 16] shares.

    K becomes focal lengths and principal point as shares of the image's sides; a histogram share p becomes
    log(1 + 15 p) / log(16), which keeps rare bins apart from empty ones.
    """
    width, height = image_size
    intrinsics = torch.stack(
        [K[:, 0, 0] / width, K[:, 1, 1] / height, (K[:, 0, 2] + 0.5) / width, (K[:, 1, 2] + 0.5) / height], dim=-1
    )
    histogram = torch.log1p(15 * depth_hist) / torch.log(torch.tensor(16.0))
    rotation = camera_to_reference[:, :3, :3].flatten(1)
    return torch.cat([rotation, camera_to_reference[:, :3, 3], intrinsics, histogram], dim=-1).float()


def record_poses(records: Tensor) -> Tensor:
    """Camera_to_reference [..., 4, 4] in metres that normalised records [..., RECORD_WIDTH] hold."""
    poses = torch.eye(4, dtype=records.dtype, device=records.device).repeat(*records.shape[:-1], 1, 1)
    poses[..., :3, :3] = records[..., :9].unflatten(-1, (3, 3))
    poses[..., :3, 3] = records[..., 9:12]
    return poses


def record_intrinsics(records: Tensor, image_size_hw: tuple[int, int]) -> Tensor:
    """K [..., 3, 3] in pixels of a picture of (H, W) that normalised records [..., RECORD_WIDTH] hold."""
    height, width = image_size_hw
    fx, fy, cx, cy = records[..., 12:16].unbind(-1)
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = (fx * width, zero, cx * width - 0.5), (zero, fy * height, cy * height - 0.5), (zero, zero, one)
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
