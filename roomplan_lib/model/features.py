"""The feature cache: what the frozen encoder makes of an ordered set of views, computed once and read ever after.

    <folder>/hashes.json                     sha256 of each picture by path, so that a start reads no picture
    <folder>/features-<key>/settings.json    what decides the numbers: size, layers, type, sha256 of the encoder
    <folder>/features-<key>/<key>.safetensors    one ordered set of views, by the contents of its pictures
    <folder>/coordinates-<key>/...           3D coordinates of the patches, where they come from depth

A key is the sha256 of its parts, which each file also says in clear, so a file that lies under a wrong name is noticed.
Each file holds a sha256 over all of it, checked when a process first reads it. Tensors are mapped, not copied: what
several processes of a machine read lies in its memory once. With `data.features.resident` a training run keeps copies
of its own instead (`Residence`).

Two forms of storage lose precision, so they are chosen and never a default: `dtype: int8` rounds each token to 255
steps, `pool: 2` puts the mean of 2x2 patch tokens, and of their known 3D positions, in place of four; camera and
register tokens stay. A model is trained, evaluated and asked on the same form. `roomplan cache` measures what is lost:
of the tiny encoder 0.7 % (int8) and 45 % (pool 2, 112 pixels). After 150 steps of the tiny sizes on its frozen features
the held-out loss was 0.833 +- 0.002 exact, 0.835 +- 0.001 int8, 0.835 +- 0.004 pool 2 (three seeds, mean and standard
deviation): no difference beyond the spread, in a run too short to learn fine detail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from roomplan_lib.config import FeaturesConfig, ModelConfig, data_path
from roomplan_lib.files import file_hash, new_file, write_whole
from roomplan_lib.model.positions import VGGT_HEADS
from roomplan_lib.model.vggt import VGGT

VERSION = 1  # of the files and of the computation behind them; raised when either changes
RESAMPLING = (
    "JPEG decoded at 1/8, 1/4 or 1/2 where that divides it and holds the size, then PyTorch's bicubic, else Pillow's, "
    "to the nearest multiples of the patch size"
)
TINY = torch.finfo(torch.float32).tiny  # a token of zeros has no scale
LEFT_OVER_S = 3600  # a temporary file that is older was left by a process that was killed


@dataclass(frozen=True, eq=False)
class Entry:
    """What the cache holds of one set of views."""

    tensors: dict[str, Tensor]
    facts: dict  # numbers that go with them, such as the sizes of the pictures


class Store:
    """Tensors by content: one file per set of parts, in a folder of its own for each `settings`.

    content: what the files are, in one word; settings, parts and facts: plain data that JSON keeps as it is.
    """

    def __init__(self, folder: Path, content: str, settings: dict, on_missing: str = "compute") -> None:
        self.settings = {"version": VERSION, **settings}
        self.content, self.on_missing = content, on_missing
        self.folder = folder / f"{content}-{_key(self.settings)[:16]}"
        self.tells = True  # what it finds wrong, and the first time that an entry is not there
        self._told_missing = False
        self._full = False
        self._verified: dict[Path, tuple] = {}
        if not self.folder.is_dir():
            for other, different in self.others():
                print(f"{other}: made with other {', '.join(different)}; not used", flush=True)

    def path(self, parts: dict) -> Path:
        return self.folder / f"{_key(parts)}.safetensors"

    def others(self) -> list[tuple[Path, list[str]]]:
        """Folders beside this one with the same content and other settings, and the settings that differ."""
        found = []
        for file in sorted(self.folder.parent.glob(f"{self.content}-*/settings.json")):
            if file.parent != self.folder:
                try:
                    settings = json.loads(file.read_text())
                    different = [k for k, v in self.settings.items() if settings.get(k) != v]
                except (ValueError, AttributeError, OSError):
                    different = ["settings (unreadable)"]
                found.append((file.parent, different))
        return found

    def fault(self, parts: dict, contents: bool = False) -> str | None:
        """What is wrong with the file of these parts, None for nothing; contents: check its sha256 too."""
        try:
            self._load(self.path(parts), parts, contents)
        except FileNotFoundError:
            return "missing"
        except (ValueError, SafetensorError) as error:
            return str(error)
        return None

    def read(self, parts: dict, name: str) -> Entry | None:
        """The entry; None where there is none or a damaged or stale one, which is printed, with `on_missing: compute`.

        name: the set of views in messages. Raises ValueError instead with `on_missing: error`.
        """
        path = self.path(parts)
        try:
            return self._load(path, parts, contents=self._verified.get(path) != _stamp(path))
        except FileNotFoundError:
            fault, told = f"{self.folder}: holds no {self.content} of {name}", self._told_missing
            self._told_missing = True
        except (ValueError, SafetensorError) as error:
            fault, told = f"{path}: {error} ({self.content} of {name})", False
        if self.on_missing == "error":
            raise ValueError(
                f"{fault}; `roomplan cache STAGE.yaml --verify` computes it, as does data.features.on_missing: compute"
            )
        if self.tells and not told:
            print(f"{fault}; computed now and kept", flush=True)
        return None

    def is_as_read(self, path: Path) -> bool:
        """Whether the file is the one that this process has read and verified; tensors are mapped from it."""
        try:
            return self._verified.get(path) == _stamp(path)
        except OSError:
            return False

    def store(self, parts: dict, name: str, tensors: Mapping[str, Tensor], facts: dict) -> None:
        """Writes an entry whole; several processes may write the same one."""
        settings = self.folder / "settings.json"
        if not settings.is_file():
            write_whole(settings, json.dumps(self.settings, indent=1) + "\n")
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        about = {"settings": self.settings, "parts": parts, "facts": facts, "name": name}
        entry = json.dumps(about | {"sha256": _digest(about, tensors)})
        with new_file(self.path(parts)) as file:
            file.write(save(tensors, {"entry": entry}))

    def keep(self, parts: dict, name: str, tensors: Mapping[str, Tensor], facts: dict) -> None:
        """As `store`, for whoever can go on without it: what the disk does not take is printed once."""
        try:
            self.store(parts, name, tensors, facts)
        except OSError as error:
            if not self._full:
                print(f"{self.folder}: cannot keep the {self.content} of {name}: {error.strerror or error}", flush=True)
            self._full = True

    def _load(self, path: Path, parts: dict, contents: bool) -> Entry:
        """Raises FileNotFoundError, or ValueError or SafetensorError for a damaged or stale file."""
        stamp = _stamp(path)
        with safe_open(path, "pt") as file:
            try:
                about = json.loads(file.metadata()["entry"])
                facts, sha256 = about["facts"], about.pop("sha256")
                found = {**about["settings"], **about["parts"]}
                different = [key for key, value in {**self.settings, **parts}.items() if found.get(key) != value]
            except (KeyError, TypeError, AttributeError, ValueError):
                raise ValueError("damaged: its header says nothing about it") from None
            if different:
                raise ValueError(f"stale: made from other {', '.join(different)}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        if contents:
            if _digest(about, tensors) != sha256:
                raise ValueError("damaged: its contents do not have the sha256 that it states")
            self._verified[path] = stamp
        return Entry(tensors, facts)

    def sweep(self) -> None:
        """Removes temporary files that killed processes left."""
        for path in self.folder.glob(".*.tmp"):
            if time.time() - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink(missing_ok=True)


class Residence:
    """Features of the view sets of a run that stay in memory from their first read on, so that no later epoch reads
    their files. The process that trains holds them; its loader processes share with it which sets it has, and send it
    their numbers in place of tensors.

    What is held was verified when it was read and is a copy of its own: whatever happens to its file afterwards, the
    run goes on with what it has.
    """

    def __init__(self, on_device: bool, view_keys: Iterable[tuple]) -> None:
        """on_device: kept where the model is, else in the host's memory, pinned where there is CUDA; view_keys: of the
        samples of a run (`Sample.view_key`)."""
        self.on_device = on_device
        self.numbers = {key: number for number, key in enumerate(dict.fromkeys(view_keys))}
        # Of sets that are held: width and height of their pictures resized, and as stored; else zeros.
        self.sizes = torch.zeros(len(self.numbers), 4, dtype=torch.int32).share_memory_()
        self.held: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"held": {}}  # a loader process needs none, and could not have those of a GPU

    def label(self, view_key: tuple, image_size: tuple[int, int], stored_size: tuple[int, int]) -> dict:
        """What goes with the features of a set that are read now, so that they stay: nothing for one of no run."""
        number = self.numbers.get(view_key)
        return {} if number is None else {"number": number, "sizes": (*image_size, *stored_size)}

    def find(self, view_key: tuple) -> dict | None:
        """In place of the features of a set that is held: its number and the `sizes` of its pictures."""
        number = self.numbers.get(view_key)
        if number is None or not self.sizes[number, 0]:
            return None
        return {"number": number, "sizes": tuple(self.sizes[number].tolist())}

    def resolve(self, known: dict, device: torch.device) -> dict:
        """The features of a set on `device`: those that are held, or those that came with the batch, held from now."""
        if "number" not in known:
            return known
        known = dict(known)
        number, sizes = known.pop("number"), known.pop("sizes")
        if number not in self.held:
            self.held[number] = {name: self._own(value) for name, value in known.items() if name != "image_size"}
            self.sizes[number, 1:] = torch.tensor(sizes[1:], dtype=torch.int32)
            self.sizes[number, 0] = sizes[0]  # last: it tells the loader processes that the row is there
        held = {name: value.to(device, non_blocking=True) for name, value in self.held[number].items()}
        return held | {"image_size": sizes[:2]}

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy that no file and no other process can change."""
        if self.on_device:
            return tensor.clone() if tensor.device.type == "cpu" else tensor  # the batch's own copy on the device
        tensor = tensor.to("cpu", copy=True)
        return tensor.pin_memory() if torch.cuda.is_available() else tensor


class FileHashes:
    """sha256 of files, kept beside the cache by path, size and times, so that unchanged files are not read again."""

    def __init__(self, file: Path, trust: bool = True) -> None:
        """trust: use what `file` says; else every file is read."""
        self.file = file
        self.known: dict[str, list] = self._stored() if trust else {}
        self.new: dict[str, list] = {}

    def __call__(self, path: Path) -> str:
        path = path.absolute()
        stamp, (*known, sha256) = list(_stamp(path)), self.known.get(str(path), [None])
        if known != stamp:
            found = file_hash(path)
            if sha256 not in (None, found):
                print(f"{path}: has changed since it was cached", flush=True)
            sha256 = found
            self.known[str(path)] = self.new[str(path)] = [*stamp, sha256]
        return sha256

    def save(self) -> None:
        """Writes what is new into the file, beside what other processes have written."""
        if self.new:
            write_whole(self.file, json.dumps(self._stored() | self.new))
            self.new = {}

    def _stored(self) -> dict[str, list]:
        try:
            stored = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return {}  # absent or damaged: the files themselves tell
        entries = stored.items() if isinstance(stored, dict) else ()
        return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 4}


class FeatureCache:
    """The stores of one model's features and of its patch coordinates, and the hashes of the files behind them."""

    def __init__(
        self, settings: FeaturesConfig, encoder: VGGT, model: ModelConfig, image_size: int, trust_hashes: bool = True
    ) -> None:
        """image_size: pixels of a view's longest side. Raises ValueError for an encoder that is trained."""
        if not model.freeze_vggt:
            raise ValueError(
                "data.features.folder keeps the outputs of a frozen encoder, but model.freeze_vggt is false: they "
                "would change with every step; set it to true, or data.features.folder to ''"
            )
        folder = data_path(settings.folder)
        if settings.pool > 1 and model.positions.method != "base" and model.positions.n_points > 1:
            raise ValueError(
                f"data.features.pool {settings.pool} has one mean position per pooled patch, but "
                f"model.positions.n_points is {model.positions.n_points}; set it to 1, or pool to 1"
            )
        self.settings = settings
        self.residence: Residence | None = None  # where a training run keeps what was read
        self.patch_size, self.patch_token_start = encoder.config.patch_size, encoder.aggregator.patch_token_start
        self.hash = FileHashes(folder / "hashes.json", trust_hashes)
        pictures = {"image_size": image_size, "patch_size": encoder.config.patch_size, "resampling": RESAMPLING}
        heads = heads_of(model)
        self.features = Store(
            folder,
            "features",
            pictures
            | {
                "layers": encoder.aggregator.layer_indices(model.tap_layers),
                "heads": list(heads),
                "dtype": settings.dtype,
                "pool": settings.pool,
                "encoder": encoder_hash(encoder, heads),
            },
            settings.on_missing,
        )
        self.coordinates = None
        if model.positions.method != "base" and model.positions.source == "depth":
            points = {key: getattr(model.positions, key) for key in ("n_points", "min_valid_share")}
            self.coordinates = Store(folder, "coordinates", pictures | points, settings.on_missing)

    @property
    def stores(self) -> list[Store]:
        return [self.features] + ([self.coordinates] if self.coordinates else [])

    def pack(self, tokens: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Tokens [..., T, E] of pictures of `size` (H, W) as the files hold them: `tokens`, pooled and in the type that
        the settings name, and for int8 the float32 `scale` [..., T, 1] of each. `unpack` is the way back."""
        if self.settings.pool > 1:
            special, patches = tokens.float().tensor_split([self.patch_token_start], dim=-2)
            tokens = torch.cat([special, pool_patches(patches, self.grid(size), self.settings.pool)], dim=-2)
        if self.settings.dtype != "int8":
            return {"tokens": tokens.to(getattr(torch, self.settings.dtype))}
        tokens = tokens.float()
        scale = tokens.abs().amax(-1, keepdim=True) / 127
        return {"tokens": (tokens / scale.clamp(min=TINY)).round().to(torch.int8), "scale": scale}

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patches of a picture of `size` (H, W), before they are pooled."""
        return size[0] // self.patch_size, size[1] // self.patch_size

    def store(self, parts: dict, name: str, facts: dict, tensors: Mapping[str, Tensor], required: bool = False) -> None:
        """Keeps what `encode` made of one set of views: `pack`ed tokens [num_taps, V, T, E], predictions [V, ...].

        required: raise OSError where the disk does not take it.
        """
        write = self.features.store if required else self.features.keep
        write(parts, name, tensors, facts)


def heads_of(model: ModelConfig) -> tuple[str, ...]:
    """The heads of the encoder that the model's 3D positions read."""
    if model.positions.method == "base" or model.positions.source == "depth":
        return ()
    if model.positions.source == "vggt_depth" and model.vggt.get("metres_per_unit"):
        return ("depth",)
    return VGGT_HEADS


def encode(
    encoder: VGGT, pixels: Tensor, tap_layers: Sequence[int], heads: Sequence[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The encoder's outputs for S sets of V views: tapped tokens, each [S, V, T, E], and what `heads` say of them.

    pixels: uint8 [S, V, 3, H, W]. The heads' `pose_enc` [S, V, 9] and `depth` [S, V, H, W, 1] are float32, in the
    encoder's own unit. A frozen encoder runs in the type of its weights whatever surrounds it, so that training,
    prediction and the cache see the same numbers.
    """
    aggregator = encoder.aggregator
    wanted = aggregator.layer_indices(tap_layers)
    layers = sorted({*wanted, *encoder.head_layers(heads)}) if heads else wanted
    alone = torch.autocast(pixels.device.type, enabled=False) if encoder.frozen else nullcontext()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not encoder.frozen), alone:
        tokens, patch_token_start = aggregator(pixels.float() / 255, tap_layers=layers)
    by_layer, predictions = dict(zip(layers, tokens, strict=True)), {}
    if heads:
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            predictions = encoder.read_heads(heads, by_layer, patch_token_start, tuple(pixels.shape[-2:]))
    kept = {name: predictions[name] for name in ("pose_enc", "depth") if name in predictions}
    return [by_layer[layer] for layer in wanted], kept


def unpack(tensors: Mapping[str, Tensor]) -> Tensor:
    """The tokens that `FeatureCache.pack` packed; of int8 ones in float32."""
    return tensors["tokens"] * tensors["scale"] if "scale" in tensors else tensors["tokens"]


def pool_patches(values: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """Means [..., P', C] over squares of `pool` x `pool` patches of [..., P, C]; where (rows, columns) are no multiples
    of it, over what there is of a square."""
    maps = values.reshape(-1, *grid, values.shape[-1]).permute(0, 3, 1, 2)
    means = F.avg_pool2d(maps, pool, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1).reshape(*values.shape[:-2], -1, values.shape[-1])


def pool_coordinates(coordinates: Tensor, valid: Tensor, grid: tuple[int, int], pool: int) -> tuple[Tensor, Tensor]:
    """Coordinates [..., P', 3], metres, and validity [..., P'] of pooled patches: the means of the valid ones."""
    share = pool_patches(valid[..., None].float(), grid, pool)
    sums = pool_patches(coordinates.masked_fill(~valid[..., None], 0.0), grid, pool)
    return sums / share.clamp(min=1 / pool**2), share[..., 0] > 0


def pooled_grid(grid: tuple[int, int], pool: int) -> tuple[int, int]:
    """(rows, columns) of pooled patches."""
    return -(-grid[0] // pool), -(-grid[1] // pool)


def encoder_hash(encoder: VGGT, heads: Sequence[str] = ()) -> str:
    """sha256 of the weights that make the features, with their names and types, and of the encoder's settings."""
    config = dataclasses.asdict(encoder.config) | {"gradient_checkpointing": None}
    used = ("aggregator.", *(f"{head}_head." for head in heads))
    weights = {name: value for name, value in encoder.state_dict().items() if name.startswith(used)}
    return _digest(config, weights)


def entry_bytes(
    encoder: VGGT,
    num_taps: int,
    num_views: int,
    image_size: tuple[int, int],
    dtype: str,
    heads: Sequence[str] = (),
    pool: int = 1,
) -> int:
    """Bytes of the features of one set of views of `image_size` (width, height), without the file's header."""
    width, height = image_size
    rows, columns = pooled_grid((height // encoder.config.patch_size, width // encoder.config.patch_size), pool)
    tokens = num_taps * num_views * (encoder.aggregator.patch_token_start + rows * columns)
    predictions = num_views * (9 + width * height) * 4 if heads else 0
    scale = 4 if dtype == "int8" else 0
    return tokens * (2 * encoder.config.embed_dim * getattr(torch, dtype).itemsize + scale) + predictions


def free_bytes(folder: Path) -> int:
    """Free space for files in a folder that may not be there yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _key(parts: dict) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(about: dict, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _stamp(path: Path) -> tuple:
    """Changes whenever the file does: size, time of change of contents and of the file's entry, in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
