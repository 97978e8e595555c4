"""The numbers that define a VGGT."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_NAMES = ("camera", "depth", "point")


@dataclass(frozen=True)
class VGGTConfig:
    """Sizes of a VGGT; the defaults are the published VGGT-1B. JSON lists are accepted where tuples stand.

    Raises ValueError that names the field.
    """

    # Pictures and tokens.
    img_size: int = 518  # pixels, side of the square picture that the stored position embedding belongs to
    patch_size: int = 14  # pixels
    num_register_tokens: int = 4  # register tokens per view, in the DINOv2 part and in the aggregator alike
    # Aggregator: `depth` pairs of a frame block and a global block.
    embed_dim: int = 1024  # width of the blocks and of the DINOv2 part; tapped tokens are twice as wide
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0  # hidden width of every MLP over its input width
    rope_frequency: float = 100.0  # base of the rotary wavelengths, in patches
    layer_scale_init: float = 0.01  # of the frame, global and camera blocks when training from scratch
    gradient_checkpointing: bool = False  # recompute frame and global blocks in the backward pass, in training mode
    # DINOv2 encoder of a single view.
    patch_embed_depth: int = 24
    patch_embed_num_heads: int = 16
    # Heads.
    enable_camera: bool = True
    enable_depth: bool = True
    enable_point: bool = True
    head_layers: tuple[int, int, int, int] = (4, 11, 17, 23)  # layers that the depth and point heads read
    dpt_features: int = 256  # channels of the fused maps
    dpt_out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)  # channels per layer before the fusion
    dpt_last_channels: int = 32  # channels of the full-size map that the last layer reads
    frames_chunk_size: int = 8  # views that the depth and point heads process at once; bounds their memory
    camera_trunk_depth: int = 4
    camera_num_heads: int = 16
    camera_iterations: int = 4  # refinements of the pose encoding
    # Unit of depth, points and camera centres. 0 = as published: each set of views has its own, the mean distance of
    # its points, and only known poses can tell it in metres.
    metres_per_unit: float = 0.0

    def __post_init__(self) -> None:
        for name in ("head_layers", "dpt_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or len(value) != 4 or any(type(item) is not int for item in value):
                raise ValueError(f"VGGTConfig.{name}: expected four integers, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, field in self.__dataclass_fields__.items():
            value, expected = getattr(self, name), field.type
            if expected == "int" and (type(value) is not int or value < 1):
                raise ValueError(f"VGGTConfig.{name}: expected a positive integer, got {value!r}")
            if expected == "float" and (type(value) not in (int, float) or not 0 <= value < float("inf")):
                raise ValueError(f"VGGTConfig.{name}: expected a positive number, got {value!r}")
            if expected == "float" and not value and name != "metres_per_unit":
                raise ValueError(f"VGGTConfig.{name}: expected a positive number, got {value!r}")
            if expected == "bool" and type(value) is not bool:
                raise ValueError(f"VGGTConfig.{name}: expected true or false, got {value!r}")
        self._require_multiple("img_size", self.img_size, self.patch_size, "patch_size")
        self._require_multiple("embed_dim", self.embed_dim, self.patch_embed_num_heads, "patch_embed_num_heads")
        # A head's channels split into a vertical and a horizontal half, each rotated in pairs.
        self._require_multiple("embed_dim", self.embed_dim, 4 * self.num_heads, "4 * num_heads, for the 2D rotation")
        if self.enable_camera:
            self._require_multiple("2 * embed_dim", 2 * self.embed_dim, self.camera_num_heads, "camera_num_heads")
        if self.enable_depth or self.enable_point:
            if any(not 0 <= layer < self.depth for layer in self.head_layers):
                raise ValueError(
                    f"VGGTConfig.head_layers: expected layers in 0..{self.depth - 1} (depth {self.depth}), "
                    f"got {self.head_layers}; choose four of them or disable the depth and point heads"
                )
            for channels in self.dpt_out_channels:  # sine and cosine of two coordinates
                self._require_multiple("dpt_out_channels", channels, 4, "4")
            self._require_multiple("dpt_features", self.dpt_features, 8, "8")

    @staticmethod
    def _require_multiple(name: str, value: int, divisor: int, divisor_name: str) -> None:
        if value <= 0 or value % divisor:
            raise ValueError(f"VGGTConfig.{name}: expected a positive multiple of {divisor_name}, got {value}")

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the heads that are built, of `HEAD_NAMES`."""
        return tuple(name for name in HEAD_NAMES if getattr(self, f"enable_{name}"))
