"""Reader of EmbodiedScan's infos (Wang et al., 2024): one pickle per split that names the pictures, cameras and boxes
of many scans of ScanNet, 3RScan, Matterport3D and ARKitScenes.

    {"metainfo": {"categories": {name: id}},
     "data_list": [{"sample_idx": "scannet/scene0191_00", "axis_align_matrix" 4x4, "cam2img" and "depth_cam2img" 4x4,
                    "images": [{"img_path", "depth_path", "cam2global" 4x4, "cam2img" 4x4 where each has its own}],
                    "instances": [{"bbox_3d" [9], "bbox_label_3d", "bbox_id"}]}]}

`bbox_3d` is center, full extent (metres) and three angles (radians) about z, then the new x, then the new y axis, in
the axis-aligned world; `cam2global` leads to the world before the alignment.

A pickle is a program. Only plain containers, numbers, text and arrays of numbers are read here; anything else that it
asks for is refused by name, before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from roomplan_lib.geometry import OrientedBox
from roomplan_lib.scenes import Scene, View, path_below, picture_size
from roomplan_lib.scenes.text import check_intrinsics, check_rigid

MAX_BYTES = 4 * 2**30  # of an infos file; what is made of it takes a few times as much memory
DEPTH_SCALES = {"matterport3d": 4000.0}  # stored depth units per metre, where they are not millimetres
SPLITS = ("train", "val", "test")
FETCH_AGAIN = "fetch the file again"
# Codes of the array types that are read: truth values, whole and floating-point numbers.
DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"b1", "f2", "f4", "f8"}


def read_infos(
    path: Path | str,
    data_root: Path | str,
    datasets: Sequence[str] = ("scannet",),
    progress: bool = True,
) -> Iterator[Scene]:
    """The scenes of an infos file one by one; their pictures lie below `data_root` as the file names them.

    datasets: which parts to read, the first part of `sample_idx`. The file's name tells the split
    (`embodiedscan_infos_train.pkl`). World: the axis-aligned one. Boxes keep all three angles, `object_id` is
    `bbox_id`. Views whose pose is not finite are dropped; metadata: sample_idx, num_invalid_poses.

    Raises ValueError that names the file, and the entry, for a pickle with code, anything malformed, and a scene
    whose pictures are missing.
    """
    path, data_root = Path(path), Path(data_root).absolute()
    infos = load_numbers(path, progress)
    entries = _get(infos, "data_list", list, str(path))
    categories = _get(_get(infos, "metainfo", dict, str(path)), "categories", dict, f"{path}: metainfo")
    if not all(isinstance(name, str) and type(number) is int for name, number in categories.items()):
        raise ValueError(f"{path}: metainfo.categories: expected ids by name; {FETCH_AGAIN}")
    labels = {number: name for name, number in categories.items()}
    split = next((split for split in SPLITS if path.stem.endswith(f"_{split}")), "")
    for number, entry in enumerate(entries):
        sample_idx = _get(entry, "sample_idx", str, f"{path}: data_list[{number}]")
        if sample_idx.partition("/")[0] in datasets:
            yield _read_entry(entry, sample_idx, f"{path}: {sample_idx}", data_root, labels, split)


def _read_entry(entry: dict, sample_idx: str, where: str, root: Path, labels: dict[int, str], split: str) -> Scene:
    dataset, _, scene_id = sample_idx.partition("/")
    scene_id = scene_id.replace("/", "_")
    to_world = check_rigid(_matrix(entry, "axis_align_matrix", where), f"{where}: axis_align_matrix")
    images = _get(entry, "images", list, where)
    views = []
    for number, image in enumerate(images):
        view = _read_view(entry, image, number, f"{where}: images[{number}]", root, to_world, dataset)
        if view is not None:
            views.append(view)
    boxes = [
        _read_box(instance, labels, f"{where}: instances[{number}]")
        for number, instance in enumerate(_get(entry, "instances", list, where) if "instances" in entry else [])
    ]
    return Scene(
        scene_id=scene_id,
        views=views,
        boxes=boxes,
        source="embodiedscan",
        split=split,
        visit_id=scene_id.rpartition("_")[0] if dataset == "scannet" else "",
        metadata={"sample_idx": sample_idx, "num_invalid_poses": len(images) - len(views)},
    )


def _read_view(entry, image, number: int, where: str, root: Path, to_world: np.ndarray, dataset: str) -> View | None:
    pose = _matrix(image, "cam2global", where)
    if not np.isfinite(pose).all():
        return None
    try:
        rgb_path = path_below(root, _get(image, "img_path", str, where))
        depth_path = path_below(root, _get(image, "depth_path", str, where)) if "depth_path" in image else None
        width, height = picture_size(rgb_path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    K, depth_K = (
        check_intrinsics(_matrix(image if key in image else entry, key, where), f"{where}: {key}")
        if key in image or key in entry
        else None
        for key in ("cam2img", "depth_cam2img")
    )
    if K is None:
        raise ValueError(f"{where}: neither it nor its scene has cam2img; {FETCH_AGAIN}")
    return View(
        view_id=rgb_path.stem,
        rgb_path=rgb_path,
        depth_path=depth_path,
        K=K,
        camera_to_world=to_world @ check_rigid(pose, f"{where}: cam2global"),
        timestamp=float(number),  # the file tells no times
        width=width,
        height=height,
        depth_scale=DEPTH_SCALES.get(dataset, 1000.0),
        depth_K=depth_K if depth_path is not None else None,
    )


def _read_box(instance: object, labels: dict[int, str], where: str) -> OrientedBox:
    values = _array(instance, "bbox_3d", (9,), where)
    number = _get(instance, "bbox_label_3d", int, where)
    if number not in labels:
        raise ValueError(f"{where}: bbox_label_3d {number} is not in metainfo.categories; {FETCH_AGAIN}")
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: bbox_3d has infinite numbers or NaN; {FETCH_AGAIN}")
    rotation = Rotation.from_euler("ZXY", values[6:]).as_matrix()
    try:
        return OrientedBox(
            values[:3], values[3:6], rotation, labels[number], str(_get(instance, "bbox_id", int, where))
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}; {FETCH_AGAIN}") from None


def _get(entry: object, key: str, kind: type, where: str):
    value = entry.get(key) if isinstance(entry, dict) else None
    if kind is int and isinstance(value, np.integer):
        value = int(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: {key}: expected {kind.__name__}, got {type(value).__name__}; {FETCH_AGAIN}")
    return value


def _matrix(entry: object, key: str, where: str) -> np.ndarray:
    """[4, 4]; of a 3x3 matrix the rest is filled up."""
    value = entry.get(key) if isinstance(entry, dict) else None
    side = 3 if isinstance(value, list | tuple | _Array) and len(value) == 3 else 4
    matrix = np.eye(4)
    matrix[:side, :side] = _array(entry, key, (side, side), where)
    return matrix


def _array(entry: object, key: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    """float64 of an array or of nested lists. Their lengths are compared first: lists in a pickle may share parts."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not _has_shape(value, shape):
        raise ValueError(f"{where}: {key}: expected {shape} numbers, got {type(value).__name__}; {FETCH_AGAIN}")
    return np.array(_plain(value), dtype=np.float64)


def _has_shape(value: object, shape: tuple[int, ...]) -> bool:
    if isinstance(value, _Array):
        return value.values is not None and value.values.shape == shape
    if not shape:
        return isinstance(value, int | float | np.number)
    return (
        isinstance(value, list | tuple)
        and len(value) == shape[0]
        and all(_has_shape(part, shape[1:]) for part in value)
    )


def _plain(value: object) -> object:
    if isinstance(value, _Array):
        return value.values
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


# Pickles --------------------------------------------------------------------------------------------------------------


def load_numbers(path: Path | str, progress: bool = True) -> object:
    """What a pickle of containers, numbers, text and number arrays holds (arrays as `_Array`).

    Raises ValueError that names the file, and the class or function, for a pickle that asks for any other one, and
    for a truncated or malformed one. Memory stays within a few times the file's size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file ({error.strerror}); {FETCH_AGAIN}") from None
    with file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=not progress) as bar:
        if size > MAX_BYTES:
            raise ValueError(f"{path}: {size} bytes, more than {MAX_BYTES} are refused")
        try:
            return _Unpickler(_BoundedFile(file, size, bar)).load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path}: {error}") from None
        except (ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError,
                RecursionError, TypeError, ValueError) as error:  # fmt: skip
            told = f"{type(error).__name__} {error}".strip()
            raise ValueError(f"{path}: truncated or malformed pickle ({told:.120}); {FETCH_AGAIN}") from None


class _BoundedFile:
    """A file that tells a read beyond its end before memory is set aside for it."""

    def __init__(self, file: io.BufferedReader, size: int, bar: tqdm):
        self.file, self.left, self.bar = file, size, bar

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count} bytes expected, {self.left} are left")
        self._count(count)
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self._count(len(line))
        return line

    def _count(self, count: int) -> None:
        self.left -= count
        if self.bar.total - self.left - self.bar.n > 2**20:  # the bar is too slow to hear of each byte
            self.bar.update(self.bar.total - self.left - self.bar.n)


class _Array:
    """An array of a pickle before and after its numbers arrived."""

    values: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, column_major, stored = state
        self.values = _numbers_of(stored, dtype, shape, "F" if column_major else "C")

    def __len__(self) -> int:
        return 0 if self.values is None or self.values.ndim == 0 else len(self.values)


class _Dtype:
    """The type of an array of a pickle; the state only tells the order of bytes."""

    def __init__(self, code: str):
        if code not in DTYPES:
            raise pickle.UnpicklingError(f"arrays of the type {code!r:.40} are not read, only numbers are")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(">" if state[1] == ">" else "<")


def _numbers_of(stored: object, dtype: object, shape: object, order: str) -> np.ndarray:
    if not (isinstance(stored, bytes | bytearray) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
        raise pickle.UnpicklingError("an array without bytes, type or shape; only arrays of numbers are read")
    return np.frombuffer(stored, dtype.dtype).reshape(shape, order=order)


# In the methods below a pickle's calls end. They are bound methods, whose attributes a pickle cannot set.
class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python: the one in C sets memory aside for any memo number that a pickle names."""

    def find_class(self, module: str, name: str) -> object:
        module = module.replace("numpy._core.", "numpy.core.")
        known = {
            ("numpy.core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy.core.numeric", "_frombuffer"): self._from_buffer,
            ("numpy", "ndarray"): "numpy.ndarray",
            ("numpy", "dtype"): self._dtype,
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): self._no_bytes,
            ("builtins", "bytes"): self._no_bytes,
            ("collections", "OrderedDict"): dict,
        }
        known |= {(part, kind.__name__): kind for part in ("builtins", "__builtin__") for kind in (set, frozenset)}
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"asks for {module}.{name}, which an infos file has no use for; it may run code, so do not load it "
                "elsewhere either"
            )
        return known[module, name]

    def _reconstruct(self, kind: str, shape: tuple, code: bytes) -> _Array:
        return _Array()

    def _scalar(self, dtype: _Dtype, stored: bytes) -> np.generic:
        return _numbers_of(stored, dtype, (), "C")[()]

    def _from_buffer(self, stored: bytes, dtype: _Dtype, shape: tuple, order: str) -> _Array:
        array = _Array()
        array.values = _numbers_of(stored, dtype, shape, order)
        return array

    def _dtype(self, code: str, align: bool = False, copy: bool = True) -> _Dtype:
        return _Dtype(code)

    def _no_bytes(self) -> bytes:
        return b""

    def _encode(self, text: str, encoding: str) -> bytes:
        """How the older protocols hold bytes."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"bytes encoded as {encoding!r:.40}, expected latin1")
        return text.encode("latin1")
