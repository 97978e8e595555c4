"""3D position encodings: where in the room each patch lies, added to patch tokens before the resampler.

Coordinates are metres in the sample's reference frame: the mean of a patch's points or `n_points` of them, from sensor
depth and pose (`patch_coordinates` of the collator), or from VGGT's own depth (`vggt_patch_coordinates`): seen from the
cameras that VGGT predicts with it, which the known poses bring to that frame and scale, or from the known ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roomplan_lib.config import PositionsConfig
from roomplan_lib.model.vggt import camera_points, pose_encoding_to_cameras

METHODS: dict[str, Callable[[PositionsConfig, int], nn.Module]] = {}
VOXEL = 0.1  # metres, and the bounds below: Video-3D-LLM's discrete coordinates
LOWER, UPPER = (-15.0, -15.0, -5.0), (15.0, 15.0, 5.0)


def register_positions(name: str) -> Callable:
    """Class decorator: makes a module built from (PositionsConfig, width) known as `model.positions.method: name`.

    Its forward takes float32 coordinates [..., 3] (metres, or voxel numbers when discrete) and returns [..., width];
    with `n_points` above 1 it takes [..., n_points, 3].
    Registering a name again replaces the class, so that a notebook cell can be run twice.
    """

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        METHODS[name] = cls
        return cls

    return register


def build_positions(config: PositionsConfig, width: int) -> nn.Module | None:
    """The encoder named by `config.method` for tokens of `width`; None for "base".

    With a `position_encoding_dim` other than `width` the encoding has that size and a learned projection widens it.
    Raises ValueError for unknown names, a size without a channel per axis and point, a share that is none.
    """
    if config.method == "base":
        return None
    if config.method not in METHODS:
        raise ValueError(
            f"model.positions.method: unknown {config.method!r}; known: base, {', '.join(METHODS)}; "
            "a class of your own is known once register_positions has run"
        )
    if not 0 <= config.min_valid_share <= 1:
        raise ValueError(f"model.positions.min_valid_share: expected 0 to 1, got {config.min_valid_share}")
    size, channels = config.position_encoding_dim or width, 3 * config.n_points
    if size < channels:
        raise ValueError(f"model.positions.position_encoding_dim: expected 0 or at least {channels}, got {size}")
    encoder = METHODS[config.method](config, size)
    return encoder if size == width else ProjectedPositions(encoder, size, width)


class ProjectedPositions(nn.Module):
    """An encoding of `size` channels, then a learned projection to `width`."""

    def __init__(self, encoder: nn.Module, size: int, width: int) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, nn.Linear(size, width, bias=False)

    def forward(self, coordinates: Tensor) -> Tensor:
        return self.projection(self.encoder(coordinates).to(self.projection.weight.dtype))


def encode_positions(
    encoder: nn.Module, config: PositionsConfig, coordinates: Tensor, valid: Tensor, shares: Tensor | None = None
) -> Tensor:
    """[..., width] encodings of float32 patch coordinates in metres; exactly zero where not `valid` [...].

    coordinates: [..., 3], or [..., n_points, 3] with `config.n_points` above 1. shares: [B, L, V * P] of patches that
    are `valid` [B, V, P]; with them the sums [B, L, width] of encodings, each so many times.
    Raises ValueError for coordinates of another shape and when the encoder returns another than the tokens have.
    """
    points = (config.n_points, 3) if config.n_points > 1 else (3,)
    if coordinates.shape != (*valid.shape, *points):
        raise ValueError(
            f"patch coordinates: expected {(*valid.shape, *points)} with model.positions.n_points {config.n_points}, "
            f"got {tuple(coordinates.shape)}"
        )
    if config.coordinates == "discrete":
        lower, upper = coordinates.new_tensor(LOWER), coordinates.new_tensor(UPPER)
        coordinates = ((coordinates.clamp(lower, upper) - lower) / VOXEL).round()
    with torch.autocast(coordinates.device.type, enabled=False):  # bfloat16 would round metres to centimetres
        if shares is not None and isinstance(encoder, MlpPositions):
            return encoder.sums(coordinates.flatten(1, 2), shares.float() * valid.flatten(1)[:, None])
        encoding = encoder(coordinates)
    if encoding.shape[:-1] != valid.shape:
        raise ValueError(
            f"model.positions.method {config.method!r}: expected encodings [{', '.join(map(str, valid.shape))}, width] "
            f"for coordinates {tuple(coordinates.shape)}, got {tuple(encoding.shape)}"
        )
    encoding = encoding.masked_fill(~valid[..., None], 0.0)
    return encoding if shares is None else shares.to(encoding.dtype) @ encoding.flatten(1, 2)


def sin3d_encoding(coords: Tensor, dim: int, n_points: int = 1) -> Tensor:
    """Sine encoding of coordinates [..., 3], or [..., n_points, 3] with more points than one -> [..., dim].

    As in Video-3D-LLM: n = dim // (3 n_points) channels per point and axis, of which channel k holds sin (k even) or
    cos (k odd) of a * 10000^(-2 floor(k/2) / n); x, y, z of point after point are concatenated and padded with zeros.
    Computed in fp32, returned in the dtype of `coords`.
    """
    coords = coords.flatten(-2) if n_points > 1 else coords
    n = dim // (3 * n_points)
    channel = torch.arange(n, device=coords.device)
    frequency = 10000.0 ** (-2.0 * torch.div(channel, 2, rounding_mode="floor") / n)
    angles = coords.float()[..., None] * frequency
    encoding = torch.where(channel % 2 == 0, angles.sin(), angles.cos()).flatten(-2)
    return nn.functional.pad(encoding, (0, dim - 3 * n_points * n)).to(coords.dtype)


@register_positions("sin3d_pe")
class SinePositions(nn.Module):
    """`sin3d_encoding` at the tokens' width."""

    def __init__(self, config: PositionsConfig, width: int) -> None:
        super().__init__()
        self.width, self.n_points = width, config.n_points

    def forward(self, coordinates: Tensor) -> Tensor:
        return sin3d_encoding(coordinates, self.width, self.n_points)


@register_positions("mlp_pe")
class MlpPositions(nn.Sequential):
    """Linear(3 n_points, d), GELU, Linear(d, d), GELU, Linear(d, width)."""

    def __init__(self, config: PositionsConfig, width: int) -> None:
        d = config.width
        inputs = 3 * config.n_points
        super().__init__(nn.Linear(inputs, d), nn.GELU(), nn.Linear(d, d), nn.GELU(), nn.Linear(d, width))
        self.n_points = config.n_points

    def forward(self, coordinates: Tensor) -> Tensor:
        return self[-1](self._hidden(coordinates))

    def sums(self, coordinates: Tensor, shares: Tensor) -> Tensor:
        """shares [B, L, N] @ self(coordinates [B, N, ...]): [B, L, width]. The last layer, which is the widest and
        linear, comes after the sum."""
        last = self[-1]
        shares = shares.to(last.weight.dtype)
        return F.linear(shares @ self._hidden(coordinates), last.weight) + shares.sum(-1, keepdim=True) * last.bias

    def _hidden(self, coordinates: Tensor) -> Tensor:
        coordinates = coordinates.flatten(-2) if self.n_points > 1 else coordinates
        coordinates = coordinates.to(self[0].weight.dtype)
        for layer in list(self)[:-1]:
            coordinates = layer(coordinates)
        return coordinates


def patch_lattice(n_points: int) -> list[tuple[float, float]]:
    """Where 9 or 5 points lie in a patch, (row, column) in shares of its sides, row by row: in the middle of each of
    3 x 3 equal parts, or of every other one (corners and centre). Video-3D-LLM's sample9 and sample5."""
    middles = [((i // 3 + 0.5) / 3, (i % 3 + 0.5) / 3) for i in range(9)]
    return middles if n_points == 9 else middles[::2]


VGGT_HEADS = ("camera", "depth")  # more accurate together than the point head (VGGT's README)
MIN_BASELINE = 0.05  # metres, of camera centres about their mean; less of it fixes no scale


def vggt_patch_coordinates(
    predictions: dict[str, Tensor],
    camera_to_reference: Tensor,
    image_size_hw: tuple[int, int],
    patch_size: int,
    n_points: int = 1,
    min_valid_share: float = 0.0,
    known_K: Tensor | None = None,
    metres_per_unit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Patch coordinates [S, V, P, 3] in metres in the reference frame, and which of them are valid [S, V, P].

    With `n_points` above 1 [S, V, P, n_points, 3]; both settings are those of the collator's `patch_coordinates`.

    predictions: VGGT's `depth` and, unless known_K and metres_per_unit are given, its `pose_enc` (unit of its own;
    world = its first camera) for pictures of (H, W) pixels. camera_to_reference: [S, V, 4, 4] known poses in metres.
    known_K: [S, V, 3, 3] pixels; with it depth is seen from the known cameras, else from the predicted ones.
    metres_per_unit: VGGT's unit of length where known cameras see its depth; 0 = known and predicted cameras fix it.
    Raises ValueError where they do not.
    """
    depth = predictions["depth"]
    depth = depth[..., 0] if depth.ndim == 5 else depth
    if known_K is not None and metres_per_unit:
        scale = depth.new_full(depth.shape[:1], metres_per_unit)
    else:
        world_to_camera, K = pose_encoding_to_cameras(predictions["pose_enc"], image_size_hw)
        rotation = world_to_camera[..., :3].transpose(-1, -2)
        centers = -(rotation @ world_to_camera[..., 3:])[..., 0]
        known_rotation, known_centers = camera_to_reference[..., :3, :3], camera_to_reference[..., :3, 3]
        scale, turn, shift = align_cameras(rotation, centers, known_rotation, known_centers)
    # reference = axes @ (point seen from the camera, in VGGT's unit) + origin, per view
    if known_K is None:
        axes = scale[:, None, None, None] * (turn[:, None] @ rotation)
        origin = scale[:, None, None] * (centers @ turn.mT) + shift[:, None]
    else:
        K, origin = known_K, camera_to_reference[..., :3, 3]
        axes = scale[:, None, None, None] * camera_to_reference[..., :3, :3]
    if n_points == 1 and depth.isfinite().all():  # the mean of points that are moved is the mean moved
        points = torch.stack(camera_points(depth, K), dim=2).flatten(0, 1)  # [S * V, 3, H, W]
        means = F.avg_pool2d(points, patch_size).flatten(2).mT
        coordinates = means.unflatten(0, depth.shape[:2]) @ axes.mT + origin[:, :, None]
        return coordinates, torch.ones_like(coordinates[..., 0], dtype=torch.bool)
    points = torch.stack(camera_points(depth, K), dim=-1)  # [S, V, H, W, 3]
    points = points @ axes[:, :, None].mT + origin[:, :, None, None]
    rows = points.shape[2] // patch_size
    blocks = points.unflatten(3, (-1, patch_size)).unflatten(2, (rows, patch_size))  # [S, V, rows, p, columns, p, 3]
    blocks = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # [S, V, P, p * p, 3]
    known = blocks.isfinite().all(-1)
    count = known.sum(-1)
    valid = (count > 0) & (count / known.shape[-1] >= min_valid_share)
    if n_points == 1:
        coordinates = torch.where(known[..., None], blocks, 0).sum(-2) / count.clamp(min=1)[..., None]
    elif n_points == 2:
        ends = [torch.where(known[..., None], blocks, sign * torch.inf) for sign in (1, -1)]
        coordinates = torch.stack([ends[0].amin(-2), ends[1].amax(-2)], dim=-2)
    else:
        side = (torch.arange(patch_size, device=points.device) + 0.5) / patch_size
        lattice = side.new_tensor(patch_lattice(n_points))
        distance = (lattice[:, None] - torch.cartesian_prod(side, side)).square().sum(-1)  # [n_points, p * p]
        nearest = distance.masked_fill(~known[..., None, :], torch.inf).argmin(-1)  # [S, V, P, n_points]
        coordinates = blocks.gather(-2, nearest[..., None].expand(*nearest.shape, 3))
    masked = ~valid[..., None] if n_points == 1 else ~valid[..., None, None]
    return coordinates.masked_fill(masked, 0.0), valid


def align_cameras(
    rotation: Tensor, centers: Tensor, known_rotation: Tensor, known_centers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale [S], rotation [S, 3, 3] and shift [S, 3] with known = scale * rotation @ x + shift (a Sim(3)).

    rotation, known_rotation: [S, V, 3, 3] camera to world; centers, known_centers: [S, V, 3]; equal cameras in two
    worlds. The rotation is the mean of the cameras' own (projected to SO(3)), which few centres on a line would not
    fix; the scale is the ratio of the centres' spreads about their means (Horn 1987, section 2.D), which equals
    Umeyama's where the cameras agree and stays positive where they do not.
    Raises ValueError when either set of centres has too little spread.
    """
    u, _, vh = torch.linalg.svd((known_rotation @ rotation.transpose(-1, -2)).sum(1))
    sign = torch.ones_like(u[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vh)
    turn = (u * sign[..., None, :]) @ vh
    mean, known_mean = centers.mean(1), known_centers.mean(1)
    spread, known_spread = (
        (points - middle[:, None]).square().sum(-1).mean(-1).sqrt()
        for points, middle in ((centers, mean), (known_centers, known_mean))
    )
    if (known_spread < MIN_BASELINE).any() or (spread < 1e-6).any():
        raise ValueError(
            f"VGGT's points have no unit, and the cameras are too close together to give them one: spread "
            f"{known_spread.min():.3f} m (at least {MIN_BASELINE} m), {spread.min():.1e} in VGGT's own unit; "
            "select views with parallax or set model.positions.source to depth"
        )
    scale = known_spread / spread
    return scale, turn, known_mean - scale[:, None] * (turn @ mean[..., None])[..., 0]
