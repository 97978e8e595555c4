"""Settings of a run: strict frozen dataclasses. The defaults make the tiny run; a stage file states every field."""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")
# Keys of the vggt-qwen3 reference code that are not taken over, with the reason.
REFUSED = {
    "loss_heads": (
        "not a setting here: there is one loss, cross-entropy on the response and its end token. An action is text, so "
        "a head `action_json` would count it twice, and `geometry_consistency` compares numbers that no gradient "
        "reaches once they are text. Remove the key; data.train_shares weighs questions against actions"
    )
}


@dataclass(frozen=True)
class AugmentationConfig:
    yaw_deg: float = 0.0  # turn of the frame that the model reads and writes, drawn from [-yaw_deg, yaw_deg]
    # All metres of a sample times a factor drawn log-uniformly from [1 / (1 + j), 1 + j]. The pictures stay, so only
    # geometry and depth tell the scale; for action samples alone, since answers in words are not rewritten.
    scale_jitter: float = 0.0


@dataclass(frozen=True)
class LossWeightsConfig:
    """Weights of tokens in the training loss; all others weigh 1. The held-out loss knows none."""

    # x and y of what an action places, down to decimetres: two of an action's eight numbers, and those that only seeing
    # tells. Digits that nobody can see would drown them for the first ten thousands of samples.
    places: float = 1.0
    answers: float = 1.0  # answers to questions: two tokens beside an action's forty

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"data.loss_weights.{name}: expected a number above 0, got {value:g}")


@dataclass(frozen=True)
class FeaturesConfig:
    folder: str = ""  # cache of the frozen encoder's outputs; data/... as in train_files; "" = encode in every step
    # In which the cache keeps them. int8 loses: one float32 scale per token, half the bytes of bfloat16.
    dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    on_missing: Literal["compute", "error"] = "compute"  # a view set that the cache lacks, or holds stale or damaged
    pool: Literal[1, 2] = 1  # 2 loses: the mean of 2x2 patch tokens in place of four, a quarter of the bytes
    # Where training keeps features once they are read, so that later epochs read no file: memory of the host (pinned
    # beside a GPU), or of the device that trains.
    resident: Literal["none", "host", "device"] = "none"

    def __post_init__(self) -> None:
        for name, chosen in (
            ("dtype", self.dtype == "int8"),
            ("pool", self.pool > 1),
            ("resident", self.resident != "none"),
        ):
            if chosen and not self.folder:
                raise ValueError(
                    f"data.features.{name}: {getattr(self, name)} is for features that lie in a folder; name one in "
                    f"data.features.folder, or set {name} to {getattr(FeaturesConfig, name)}"
                )

    @property
    def is_lossy(self) -> bool:
        return self.dtype == "int8" or self.pool > 1


@dataclass(frozen=True)
class DataConfig:
    train_files: tuple[str, ...] = ()  # JSONL files of samples; a leading data/ is $ROOMPLAN_DATA where that is set
    train_shares: tuple[float, ...] = ()  # share of the samples drawn from each train file; () = as many as each holds
    eval_files: tuple[str, ...] = ()  # held-out samples for the validation loss and for predictions
    image_size: int = 112  # pixels of a view's longest side; both sides become multiples of the patch size
    max_length: int = 384  # tokens of prompt + response; a longer sample is an error, never cut
    visual_first: bool = True  # visual tokens before the question (else after it)
    codec: Literal["m2", "cm", "rows"] = "m2"  # how actions write numbers: metres with 2 decimals, centimetres, rows
    loss_weights: LossWeightsConfig = field(default_factory=LossWeightsConfig)
    cache_scenes: int = 4096  # decoded view sets kept in memory (uint8), 0 = decode every time
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    # Chance of each view but the first to be hidden from resampler and geometry tokens, per training sample. The
    # encoder still sees it; view sets of other views (`roomplan prepare --view-sets`) vary what that sees.
    view_dropout: float = 0.0
    num_workers: int = 0  # loader processes
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

    def __post_init__(self) -> None:
        if self.train_shares and (
            len(self.train_shares) != len(self.train_files) or min(self.train_shares) < 0 or not sum(self.train_shares)
        ):
            raise ValueError(
                f"data.train_shares: expected one share of at least 0 for each of {len(self.train_files)} train_files, "
                f"not all 0, got {list(self.train_shares)}"
            )
        for name, least in (("image_size", 1), ("max_length", 1), ("cache_scenes", 0), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: expected at least {least}, got {getattr(self, name)}")
        if not 0 <= self.view_dropout < 1:
            raise ValueError(f"data.view_dropout: expected a chance from 0 to below 1, got {self.view_dropout:g}")
        if not 0 <= self.augmentation.yaw_deg <= 180 or not 0 <= self.augmentation.scale_jitter <= 1:
            raise ValueError(
                "data.augmentation: expected yaw_deg from 0 to 180 and scale_jitter from 0 to 1, "
                f"got {self.augmentation.yaw_deg:g} and {self.augmentation.scale_jitter:g}"
            )

    @property
    def train_paths(self) -> tuple[Path, ...]:
        return tuple(map(data_path, self.train_files))

    @property
    def eval_paths(self) -> tuple[Path, ...]:
        return tuple(map(data_path, self.eval_files))


@dataclass(frozen=True)
class ResamplerConfig:
    num_latents: int = 32  # visual tokens it writes
    num_layers: int = 2
    width: int = 128  # latent width
    ffn_width: int = 512
    head_width: int = 32
    max_views: int = 32  # rows of the learned view embedding
    # perceiver: learned latents read all patches. spatial: a visual token is the mean of a place's patches, through a
    # perceptron of ffn_width; it learns from far fewer samples. reference: the layers of vggt-qwen3 checkpoints.
    kind: Literal["perceiver", "spatial", "reference"] = "perceiver"


# Resamplers at full size; `resampler_table` (model/describe.py) compares them.
RESAMPLER_PRESETS = {
    "default": ResamplerConfig(128, 6, 1024, 4096, 64),
    "small": ResamplerConfig(128, 3, 1024, 4096, 64),
    "perceiver_small": ResamplerConfig(128, 6, 4096, 16384, 512, kind="reference"),  # vggt-qwen3's, 1.2 B parameters
}


@dataclass(frozen=True)
class GeometryConfig:
    num_tokens: int = 4  # geometry tokens (G); 0 = none
    width: int = 128
    head_width: int = 32


@dataclass(frozen=True)
class PositionsConfig:
    method: str = "mlp_pe"  # base | sin3d_pe | mlp_pe | a registered name
    coordinates: Literal["metric", "discrete"] = "metric"  # metres, or 0.1 m voxels as Video-3D-LLM
    width: int = 128  # hidden width of mlp_pe
    # depth: sensor depth and known pose. vggt: VGGT's depth and cameras, brought to the known poses by a similarity.
    # vggt_depth: VGGT's depth seen from the known poses, in metres by model.vggt.metres_per_unit where that is set.
    source: Literal["depth", "vggt", "vggt_depth"] = "depth"
    position_encoding_dim: int = 0  # 0 = the patch tokens' width; another width gets a learned projection to it
    n_points: Literal[1, 2, 5, 9] = 1  # per patch: 1 mean, 2 minimum and maximum of each axis, 5 and 9 on a lattice
    min_valid_share: float = 0.0  # of a patch's pixels that need depth, or it has no coordinates; 0 = one is enough
    # encoder: the raw patch tokens; resampler: its normalised context (the reference kind has no norm: the same).
    # There is no third place behind the resampler: a latent belongs to no pixel.
    add_to: Literal["encoder", "resampler"] = "resampler"


@dataclass(frozen=True)
class LoraSettings:
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LanguageModelConfig:
    name: str = ""  # hub id or folder of a causal language model; "" = built from `config`, random weights
    config: dict = field(default_factory=dict)  # fields of transformers.Qwen3Config, read when name is ""
    tokenizer: str = ""  # hub id or folder; "" = that of `name`, or a byte-level BPE trained on the run's own text
    vocab_size: int = 640  # of the trained BPE
    freeze: bool = False
    lora: LoraSettings | None = None


@dataclass(frozen=True)
class ModelConfig:
    vggt: dict = field(default_factory=dict)  # fields of VGGTConfig; {} = VGGT-1B
    vggt_weights: str = ""  # .pt, .safetensors, folder or hub id such as facebook/VGGT-1B; "" = random weights
    freeze_vggt: bool = False
    tap_layers: tuple[int, ...] = (-1,)  # aggregator outputs that the resampler reads
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    geometry: GeometryConfig = field(default_factory=GeometryConfig)
    positions: PositionsConfig = field(default_factory=PositionsConfig)
    language_model: LanguageModelConfig = field(default_factory=LanguageModelConfig)
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # of weights that are not trained; trained ones: float32


@dataclass(frozen=True)
class TrainingConfig:
    # Run name, run folder, model folder, checkpoint or roomplan-tiny, whose weights this run starts from; "" = none.
    start_from: str = ""
    max_steps: int = 600  # optimizer steps
    micro_batch_size: int = 64  # samples per process and forward pass
    # Samples of one view set that share its encoding and their prefix; micro_batch_size is a multiple of it.
    group_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1.0e-3  # language model or its LoRA
    resampler_learning_rate: float = 1.0e-3  # resampler, geometry tokens, positions
    encoder_learning_rate: float = 1.0e-3  # VGGT, where it is not frozen
    weight_decay: float = 0.01  # matrices only
    warmup_ratio: float = 0.05
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    # muon: orthogonal updates for matrices (Jordan et al. 2024), AdamW for the rest. From random weights it found
    # places in less than half of the samples (papermill_runs/README.md).
    optimizer: Literal["adamw", "muon"] = "adamw"
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it, 0 = never
    explosion_factor: float = 20.0  # a loss above so many times the median of the last 50 stops the run, 0 = never
    bf16: bool = False
    # The layers of language model and resampler; auto = on a GPU with strategy ddp. It takes minutes before step one.
    compile: Literal["auto", "always", "never"] = "auto"
    # Layers forget their activations and are computed again in the backward pass: less memory, more time.
    # auto = where the plan of the run (training/plan.py) does not fit into the free memory without.
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
    log_every_steps: int = 10
    eval_every_steps: int = 100  # 0 = never
    num_eval_samples: int = 256  # of the held-out samples, for the validation loss
    num_generated_samples: int = 0  # of those, answered in words and scored at each evaluation
    save_every_steps: int = 100
    keep_checkpoints: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class DistributedConfig:
    """How processes share a run. Nothing here changes what is learned, so a resumed run may change it."""

    strategy: Literal["ddp", "zero3"] = "ddp"  # of more than one process; zero3 = DeepSpeed shards all weights
    num_processes: int = 1  # on each node; 0 = one per GPU, or 1 without a GPU
    offload: Literal["none", "optimizer", "all"] = "none"  # zero3: what lies in the host's memory; all = weights too


@dataclass(frozen=True)
class PredictionConfig:
    num_scenes: int = 0  # held-out scenes, 0 = all
    max_new_tokens: int = 192  # one anchor held to the grammar needs up to 169, a plan more
    batch_size: int = 64
    controls: tuple[str, ...] = ("blind", "shuffled")
    # Engine that holds actions to the grammar while they are written; what the model writes without it is kept beside.
    constrained: Literal["none", "llguidance", "xgrammar"] = "none"


@dataclass(frozen=True)
class RunConfig:
    run_name: str = "tiny"
    runs_dir: str = "papermill_runs"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)

    def __post_init__(self) -> None:
        _check_run(self)
        training = self.training
        for name in (
            "max_steps", "micro_batch_size", "group_size", "gradient_accumulation_steps", "log_every_steps",
            "save_every_steps", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(training, name) < 1:
                raise ValueError(f"training.{name}: expected at least 1, got {getattr(training, name)}")
        for name in (
            "eval_every_steps", "num_eval_samples", "num_generated_samples", "explosion_factor", "max_grad_norm",
            "learning_rate", "resampler_learning_rate", "encoder_learning_rate", "weight_decay",
        ):  # fmt: skip
            if getattr(training, name) < 0:
                raise ValueError(f"training.{name}: expected 0 or more, got {getattr(training, name):g}")
        if training.warmup_ratio > 1 or training.warmup_ratio < 0:
            raise ValueError(f"training.warmup_ratio: expected 0 to 1, got {training.warmup_ratio:g}")
        if self.distributed.num_processes < 0:
            raise ValueError(f"distributed.num_processes: expected 0 or more, got {self.distributed.num_processes}")
        if training.optimizer == "muon" and self.distributed.strategy == "zero3":
            raise ValueError(
                "training.optimizer: muon works on whole matrices, which strategy zero3 divides; set it to adamw, or "
                "distributed.strategy to ddp"
            )
        if self.distributed.offload != "none" and self.distributed.strategy != "zero3":
            raise ValueError("distributed.offload: only strategy zero3 offloads; set it to none")
        if training.micro_batch_size % training.group_size:
            raise ValueError(
                f"training.micro_batch_size: expected a multiple of group_size {training.group_size}, "
                f"got {training.micro_batch_size}"
            )

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name


@dataclass(frozen=True)
class PretrainDataConfig:
    """View sets that VGGT learns geometry from."""

    scenes: tuple[str, ...] = ("data/raw/rooms",)  # folders of posed RGB-D scenes in an ARKitScenes layout
    packed: str = "data/processed/packed"  # folder for their views at training size, made on first use
    num_scenes: int = 0  # training scenes, the first so many; 0 = all
    image_size: int = 112  # pixels of a view's longest side; both sides become multiples of the patch size
    min_views: int = 2  # views of a set, drawn for each step from min_views to max_views
    max_views: int = 10
    color_jitter: float = 0.3  # each view's brightness and contrast change by up to this share; 0 = never
    num_workers: int = 0  # loader processes

    def __post_init__(self) -> None:
        if not 2 <= self.min_views <= self.max_views:
            raise ValueError(
                f"data.min_views: expected 2 to max_views {self.max_views}, got {self.min_views}; one view has no "
                "camera to learn"
            )
        for name, least in (("num_scenes", 0), ("image_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.scenes:
            raise ValueError("data.scenes: expected one folder or more, got none")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"data.color_jitter: expected 0 to below 1, got {self.color_jitter:g}")


@dataclass(frozen=True)
class GeometryLossConfig:
    """Weights of VGGT's losses; 0 = a loss that is left out."""

    camera_weight: float = 1.0
    depth_weight: float = 1.0
    point_weight: float = 1.0
    category_weight: float = 0.0  # of each patch's furniture category, read by a linear layer that is thrown away
    camera_decay: float = 0.6  # weight of a refinement's camera loss over that of the next one
    huber_delta: float = 0.1  # of the camera loss, in units of the pose encoding
    confidence_alpha: float = 0.2  # reward for confidence; an error above it is best given no more than confidence 1
    gradient_weight: float = 1.0  # of the differences between neighbouring pixels, in the depth and point losses

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"loss.{name}: expected 0 or more, got {value:g}")
        if not self.camera_weight + self.depth_weight + self.point_weight:
            raise ValueError("loss: expected a weight above 0 for camera, depth or point")
        if not self.huber_delta:
            raise ValueError("loss.huber_delta: expected a number above 0, got 0")


@dataclass(frozen=True)
class PretrainTrainingConfig:
    max_steps: int = 2000
    num_views: int = 32  # views per step, shared by as many view sets as they are enough for
    learning_rate: float = 1.0e-3
    weight_decay: float = 0.05  # matrices only
    warmup_ratio: float = 0.05
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "adamw"  # as in a stage
    max_grad_norm: float = 1.0  # a longer gradient is scaled down to it, 0 = never
    bf16: bool = True  # forward and backward pass under autocast; losses and weights stay float32
    log_every_steps: int = 20
    eval_every_steps: int = 250  # 0 = never
    num_eval_sets: int = 64  # held-out view sets
    num_eval_views: int = 8  # of each
    save_every_steps: int = 250
    keep_checkpoints: int = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "num_views", "log_every_steps", "num_eval_sets", "save_every_steps", "keep_checkpoints",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "eval_every_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}: expected 0 or more, got {getattr(self, name):g}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"training.warmup_ratio: expected 0 to 1, got {self.warmup_ratio:g}")
        if self.num_eval_views < 2:
            raise ValueError(f"training.num_eval_views: expected at least 2, got {self.num_eval_views}")


@dataclass(frozen=True)
class PretrainConfig:
    """A run that trains VGGT itself; what it makes is read by `model.vggt_weights` of a RunConfig."""

    run_name: str = "tiny_pretrain_vggt"
    runs_dir: str = "papermill_runs"
    seed: int = 0
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    vggt: dict = field(default_factory=dict)  # fields of VGGTConfig; {} = VGGT-1B
    vggt_weights: str = ""  # file or folder of weights that the run starts from; "" = random weights
    loss: GeometryLossConfig = field(default_factory=GeometryLossConfig)
    training: PretrainTrainingConfig = field(default_factory=PretrainTrainingConfig)

    def __post_init__(self) -> None:
        _check_run(self)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run_name


def _check_run(config: RunConfig | PretrainConfig) -> None:
    """ValueError for a run's name that is no plain folder, or a seed that NumPy's generators do not take."""
    if config.run_name in ("", "..") or Path(config.run_name).name != config.run_name:
        raise ValueError(f"run_name: expected a plain folder name, got {config.run_name!r}")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed: expected 0 to {2**32 - 1}, got {config.seed}")


def data_path(path: str) -> Path:
    """Where a file named in a stage file lies: `data/...` moves below $ROOMPLAN_DATA when that is set."""
    root = os.environ.get("ROOMPLAN_DATA")
    parts = Path(path).expanduser().parts
    return Path(root, *parts[1:]) if root and parts[:1] == ("data",) else Path(*parts)


def parse(kind: type[T], data: Any, path: str = "") -> T:
    """Builds the dataclass `kind` from plain data; an unknown key or a wrong type raises ValueError with its path."""
    if not isinstance(data, dict):
        raise ValueError(f"{path or kind.__name__}: expected a mapping of settings, got {type(data).__name__} {data!r}")
    hints = typing.get_type_hints(kind)
    known = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    for key in data:
        if key in REFUSED:
            raise ValueError(f"{_join(path, key)}: {REFUSED[key]}")
        if key not in known:
            raise ValueError(f"{_join(path, key)}: unknown setting; known here: {', '.join(known)}")
    return kind(**{key: _convert(known[key], value, _join(path, key)) for key, value in data.items()})


def load_run_config(path: str | Path, **overrides: Any) -> RunConfig:
    """The run described by a YAML stage file, with top-level `overrides`.

    Raises ValueError for an unreadable file, an unknown key or a value of the wrong type.
    """
    return _load(RunConfig, path, overrides)


def load_pretrain_config(path: str | Path, **overrides: Any) -> PretrainConfig:
    """As `load_run_config`, for a stage file that trains VGGT itself."""
    return _load(PretrainConfig, path, overrides)


def _load(kind: type[T], path: str | Path, overrides: dict[str, Any]) -> T:
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot read the settings: {error}") from None
    if not isinstance(data or {}, dict):
        raise ValueError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    try:
        return parse(kind, {**(data or {}), **{k: v for k, v in overrides.items() if v is not None}})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def run_config_from_notebook(namespace: dict[str, Any]) -> RunConfig:
    """The run that a notebook's parameters describe; pass `globals()` right after the parameters cell.

    papermill injects unknown parameters without a word, so every public variable that is no field of RunConfig
    is refused here.
    """
    notebook_names = {"In", "Out", "exit", "quit", "open", "get_ipython"}
    values = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in notebook_names
        and not callable(value)
        and not isinstance(value, types.ModuleType)
    }
    return parse(RunConfig, values)


def to_dict(config: Any) -> dict:
    """Plain data (dicts, lists, scalars) of a config, as written to run.yaml."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        if value not in args or isinstance(value, bool):  # True == 1
            advice = f"; write {'always' if value else 'never'}" if isinstance(value, bool) and "never" in args else ""
            raise ValueError(f"{path}: expected one of {', '.join(map(str, args))}, got {value!r}{advice}")
        return value
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{path}: expected a list, got {type(value).__name__} {value!r}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(value):
            raise ValueError(f"{path}: expected {len(kinds)} values, got {len(value)}")
        return tuple(_convert(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and type(value) in (int, float):
        if not math.isfinite(value):
            raise ValueError(f"{path}: expected a finite number, got {value!r}")
        return float(value)
    if type(value) is hint:
        return value
    advice = ""
    if hint in (int, float) and isinstance(value, str):
        try:
            example = f"{float(value):.1e}" if hint is float else int(float(value))
            advice = f" (YAML reads this as text; write {example})"
        except ValueError:
            pass
    raise ValueError(f"{path}: expected {hint.__name__}, got {type(value).__name__} {value!r}{advice}")
