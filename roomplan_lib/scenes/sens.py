"""ScanNet's `.sens` files, version 4: the whole recording of one scan as a stream of frames.

Little endian:

    u32 version 4; u64 length, sensor name
    4 x 16 f32 row-major: intrinsics and extrinsics of the colour camera, then of the depth camera
    i32 colour compression (0 raw, 1 PNG, 2 JPEG); i32 depth compression (0 raw, 1 zlib; uint16 either way)
    u32 colour width, height, depth width, height; f32 depth shift (stored units per metre); u64 number of frames
    each frame: 16 f32 camera_to_world, -inf where tracking was lost; u64 colour and depth time in microseconds;
                u64 colour and depth size in bytes; colour bytes; depth bytes
    u64 number of inertial measurements, 128 bytes each (not read here)

After `SensReader/` of ScanNet's own tools. The readers hold one frame in memory, and trust no size in the file.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from roomplan_lib.files import new_file, write_whole
from roomplan_lib.scenes import MAX_PIXELS, open_picture

VERSION = 4
COLOR_RAW, COLOR_PNG, COLOR_JPEG = 0, 1, 2
DEPTH_RAW, DEPTH_ZLIB = 0, 1
MAX_NAME = 4096  # bytes of the sensor's name
FRAME_RATE = 30  # frames per second of ScanNet's recordings
FETCH_AGAIN = "fetch the file again"
_FRAME = struct.Struct("<16f4Q")


@dataclass(frozen=True, eq=False)
class SensHeader:
    """What a `.sens` file says of all its frames. Sizes are (width, height) in pixels, matrices [4, 4]."""

    name: str
    color_intrinsics: np.ndarray
    color_extrinsics: np.ndarray
    depth_intrinsics: np.ndarray
    depth_extrinsics: np.ndarray
    color_compression: int
    depth_compression: int
    color_size: tuple[int, int]
    depth_size: tuple[int, int]
    depth_shift: float  # stored depth units per metre
    num_frames: int


@dataclass(frozen=True, eq=False)
class SensFrame:
    """One frame of a `.sens` file. Times in microseconds."""

    index: int
    camera_to_world: np.ndarray | None  # [4, 4] metres, None where tracking was lost
    color_time: int
    depth_time: int
    color_bytes: bytes  # as stored: a JPEG file in ScanNet
    depth: np.ndarray  # float32 [H, W] metres, 0 = missing
    header: SensHeader = field(repr=False)
    where: str = field(repr=False)  # file and frame, for messages

    @cached_property
    def color(self) -> np.ndarray:
        """uint8 [H, W, 3]. Raises ValueError for bytes that are no picture of the header's size."""
        width, height = self.header.color_size
        if self.header.color_compression == COLOR_RAW:
            return np.frombuffer(self.color_bytes, np.uint8).reshape(height, width, 3)
        picture = open_picture(io.BytesIO(self.color_bytes), f"{self.where}: colour", decode=False)
        if picture.size != (width, height):
            raise ValueError(
                f"{self.where}: the colour picture has {picture.width}x{picture.height} pixels, the header says "
                f"{width}x{height}; {FETCH_AGAIN}"
            )
        return np.asarray(open_picture(io.BytesIO(self.color_bytes), f"{self.where}: colour").convert("RGB"))


class SensReader:
    """Iterator of the frames of a `.sens` file; `header` is read at once. Usable as a context manager.

    wanted: which frames to read, by index; the others are passed over without decoding. None: all.
    Raises ValueError naming file, frame and offset for another version, an absurd size or a truncated file.
    """

    def __init__(self, path: Path | str, wanted: Callable[[int], bool] | None = None):
        self.path = Path(path)
        self.wanted = wanted
        self._index = 0
        try:
            self._file = self.path.open("rb")
            self._size = self.path.stat().st_size
        except OSError as error:
            raise ValueError(f"{self.path}: cannot read the file ({error.strerror}); {FETCH_AGAIN}") from None
        try:
            self.header = self._read_header()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self.header.num_frames

    def __iter__(self) -> SensReader:
        return self

    def __next__(self) -> SensFrame:
        try:
            while not self._file.closed and self._index < self.header.num_frames:
                index, self._index = self._index, self._index + 1
                frame = self._read_frame(index)
                if frame is not None:
                    return frame
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def __enter__(self) -> SensReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def _read_header(self) -> SensHeader:
        (version,) = self._unpack("<I", "version")
        if version != VERSION:
            raise ValueError(f"{self.path}: offset 0: version {version}; only version {VERSION} is read")
        (length,) = self._unpack("<Q", "length of the sensor name")
        if length > MAX_NAME:
            self._refuse("header", f"a sensor name of {length} bytes, at most {MAX_NAME} are read", 8)
        name = self._read(length, "sensor name").decode("utf-8", "replace").rstrip("\0")
        matrices = np.array(self._unpack("<64f", "camera matrices"), dtype=np.float64).reshape(4, 4, 4)
        color_compression, depth_compression = self._unpack("<2i", "compressions")
        if color_compression not in (COLOR_RAW, COLOR_PNG, COLOR_JPEG):
            self._refuse("header", f"colour compression {color_compression}; 0, 1 and 2 (raw, PNG, JPEG) are read", 8)
        if depth_compression not in (DEPTH_RAW, DEPTH_ZLIB):
            self._refuse("header", f"depth compression {depth_compression}; 0 and 1 (raw, zlib) are read", 4)
        sizes = self._unpack("<4I", "picture sizes")
        for width, height in (sizes[:2], sizes[2:]):
            if not 0 < width * height <= MAX_PIXELS:
                self._refuse("header", f"pictures of {width}x{height} pixels, 1 to {MAX_PIXELS} are read", 16)
        (shift,) = self._unpack("<f", "depth shift")
        if not (np.isfinite(shift) and shift > 0):
            self._refuse("header", f"depth shift {shift}, expected a number above 0", 4)
        if not np.isfinite(matrices).all():
            self._refuse("header", "camera matrices with infinite numbers or NaN")
        (num_frames,) = self._unpack("<Q", "number of frames")
        if num_frames * _FRAME.size > self._size - self._file.tell():
            self._refuse("header", f"{num_frames} frames, more than a file of {self._size} bytes can hold", 8)
        return SensHeader(
            name,
            *matrices,
            color_compression,
            depth_compression,
            sizes[:2],
            sizes[2:],
            float(shift),
            num_frames,
        )

    def _read_frame(self, index: int) -> SensFrame | None:
        header, where = self.header, f"frame {index}"
        *pose, color_time, depth_time, color_bytes, depth_bytes = _FRAME.unpack(self._read(_FRAME.size, where))
        for kind, size, (width, height) in (
            ("colour", color_bytes, header.color_size),
            ("depth", depth_bytes, header.depth_size),
        ):
            # No codec makes four bytes or more of a pixel, but for the overhead of tiny pictures.
            limit = min(4 * width * height + 65536, self._size - self._file.tell())
            if size > limit:
                self._refuse(where, f"{kind} of {size} bytes, at most {limit} can be there", _FRAME.size)
        if self.wanted is not None and not self.wanted(index):
            self._file.seek(color_bytes + depth_bytes, io.SEEK_CUR)
            if self._file.tell() > self._size:
                self._refuse(where, "the file ends here")
            return None
        color = self._read(color_bytes, f"{where}, colour")
        if header.color_compression == COLOR_RAW and color_bytes != 3 * header.color_size[0] * header.color_size[1]:
            self._refuse(where, f"raw colour of {color_bytes} bytes for {header.color_size} pixels", color_bytes)
        depth = self._decode_depth(self._read(depth_bytes, f"{where}, depth"), where)
        camera_to_world = np.array(pose, dtype=np.float64).reshape(4, 4)
        return SensFrame(
            index=index,
            camera_to_world=camera_to_world if np.isfinite(camera_to_world).all() else None,
            color_time=color_time,
            depth_time=depth_time,
            color_bytes=color,
            depth=depth,
            header=header,
            where=f"{self.path}: {where}",
        )

    def _decode_depth(self, stored: bytes, where: str) -> np.ndarray:
        width, height = self.header.depth_size
        expected = 2 * width * height
        raw = stored
        if self.header.depth_compression == DEPTH_ZLIB:
            decoder = zlib.decompressobj()
            try:
                raw = decoder.decompress(stored, expected + 1)  # a bomb is cut off after the first byte too many
            except zlib.error as error:
                self._refuse(where, f"depth cannot be decompressed ({error})", len(stored))
            if len(raw) <= expected and not decoder.eof:
                self._refuse(where, "the compressed depth ends too early", len(stored))
        if len(raw) != expected:
            told = "more than" if len(raw) > expected else f"{len(raw)} instead of"
            self._refuse(where, f"depth has {told} the {expected} bytes of {width}x{height} pixels", len(stored))
        depth = np.frombuffer(raw, "<u2").reshape(height, width).astype(np.float32)
        return depth / np.float32(self.header.depth_shift)

    def _unpack(self, layout: str, what: str) -> tuple:
        return struct.unpack(layout, self._read(struct.calcsize(layout), what))

    def _read(self, size: int, what: str) -> bytes:
        """`size` bytes, after a look at how many there are."""
        start = self._file.tell()
        if size > self._size - start or len(data := self._file.read(size)) != size:
            raise ValueError(
                f"{self.path}: {what} at offset {start}: {size} bytes expected, the file ends after "
                f"{max(self._size - start, 0)}; {FETCH_AGAIN}"
            )
        return data

    def _refuse(self, where: str, reason: str, back: int = 0) -> None:
        """Raise ValueError for what was just read, `back` bytes ago."""
        raise ValueError(f"{self.path}: {where} at offset {self._file.tell() - back}: {reason}; {FETCH_AGAIN}")


def read_sens(path: Path | str, wanted: Callable[[int], bool] | None = None) -> SensReader:
    """The frames of a `.sens` file one by one, as an iterator with a `header` and a length. See `SensReader`."""
    return SensReader(path, wanted)


def write_sens(
    path: Path | str,
    scene_name: str,
    color_intrinsics: np.ndarray,
    depth_intrinsics: np.ndarray,
    frames: Iterable[tuple[np.ndarray | None, bytes, np.ndarray]],
    depth_shift: float = 1000.0,
) -> int:
    """Write a `.sens` file with JPEG colour and zlib depth; it appears whole or not at all. Returns how many frames.

    color_intrinsics, depth_intrinsics: K [3, 3] or [4, 4], pixels. frames: (camera_to_world [4, 4] metres or None
    where it is unknown, bytes of a JPEG file, depth uint16 [H, W] with `depth_shift` units per metre); may be a
    generator, one frame is held at a time. Times are set for 30 frames a second.
    Raises ValueError for no frames, or a frame whose pose, picture or depth does not fit.
    """
    path = Path(path)
    count, sizes = 0, None
    with new_file(path) as file:
        for camera_to_world, color, depth in frames:
            where = f"{path}: frame {count}"
            found = (_jpeg_size(color, where), _depth_size(depth, where))
            if sizes is None:
                sizes = found
                count_offset = _write_header(file, scene_name, color_intrinsics, depth_intrinsics, sizes, depth_shift)
            if found != sizes:
                raise ValueError(f"{where}: colour and depth of {found} pixels, those of the first frame have {sizes}")
            pose = np.full((4, 4), -np.inf) if camera_to_world is None else np.asarray(camera_to_world, np.float64)
            if pose.shape != (4, 4):
                raise ValueError(f"{where}: camera_to_world has shape {pose.shape}, expected (4, 4)")
            packed = zlib.compress(np.ascontiguousarray(depth, "<u2").tobytes())
            time = count * 1_000_000 // FRAME_RATE
            file.write(_FRAME.pack(*pose.ravel(), time, time, len(color), len(packed)))
            file.write(color)
            file.write(packed)
            count += 1
        if sizes is None:
            raise ValueError(f"{path}: no frames to write")
        file.write(struct.pack("<Q", 0))  # no inertial measurements
        file.seek(count_offset)
        file.write(struct.pack("<Q", count))
    return count


def _write_header(file: BinaryIO, name: str, color_K, depth_K, sizes, depth_shift: float) -> int:
    """Returns the offset of the number of frames, which is known only at the end."""
    encoded = name.encode()
    file.write(struct.pack("<IQ", VERSION, len(encoded)) + encoded)
    for K in (color_K, depth_K):
        intrinsics = np.eye(4)
        intrinsics[: len(K), : len(K)] = K
        file.write(struct.pack("<32f", *intrinsics.ravel(), *np.eye(4).ravel()))
    (color_size, depth_size) = sizes
    file.write(struct.pack("<2i4If", COLOR_JPEG, DEPTH_ZLIB, *color_size, *depth_size, depth_shift))
    file.write(struct.pack("<Q", 0))
    return file.tell() - 8


def _jpeg_size(color: bytes, where: str) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(color), formats=("JPEG",)) as picture:
            return picture.size
    except (OSError, TypeError) as error:
        raise ValueError(f"{where}: colour must be the bytes of a JPEG file ({error})") from None


def _depth_size(depth: np.ndarray, where: str) -> tuple[int, int]:
    if not isinstance(depth, np.ndarray) or depth.dtype != np.uint16 or depth.ndim != 2:
        raise ValueError(f"{where}: depth must be a uint16 array [H, W], got {getattr(depth, 'dtype', type(depth))}")
    return depth.shape[1], depth.shape[0]


def export_sens(path: Path | str, folder: Path | str | None = None, every: int = 1, progress: bool = True) -> Path:
    """Write a `.sens` file's frames as pictures, in the layout of ScanNet's own exporter; returns the folder.

        <folder>/color/<f>.jpg (the stored bytes)   depth/<f>.png (uint16 millimetres)   pose/<f>.txt (4x4)
        <folder>/intrinsic/{intrinsic,extrinsic}_{color,depth}.txt

    folder: the `.sens` file's own when left out. every: only frames 0, every, 2 * every, ...
    An interrupted export continues: a frame whose pose file is there is complete, since that is written last.
    Raises ValueError for a broken file, or a folder that holds the export of another one.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")

    def missing(index: int) -> bool:
        return index % every == 0 and not (folder / "pose" / f"{index}.txt").exists()

    with read_sens(path, missing) as frames:
        header = frames.header
        _claim(folder / "export.json", path, header)
        for kind in ("color", "depth"):
            for part in ("intrinsic", "extrinsic"):
                matrix = getattr(header, f"{kind}_{part}s")
                write_whole(folder / "intrinsic" / f"{part}_{kind}.txt", _matrix_text(matrix))
        todo = sum(map(missing, range(header.num_frames)))
        for frame in tqdm(frames, total=todo, desc=path.name, unit="frame", disable=not progress):
            _export_frame(frame, folder)
    return folder


def _export_frame(frame: SensFrame, folder: Path) -> None:
    if frame.header.color_compression == COLOR_JPEG:
        with new_file(folder / "color" / f"{frame.index}.jpg") as file:
            file.write(frame.color_bytes)
    else:  # stays without loss
        with new_file(folder / "color" / f"{frame.index}.png") as file:
            Image.fromarray(frame.color).save(file, format="PNG")
    millimetres = np.round(frame.depth * 1000)
    if millimetres.max() > np.iinfo(np.uint16).max:
        raise ValueError(
            f"{frame.where}: depth of {frame.depth.max():.1f} m does not fit 16-bit millimetres; "
            "read the file with read_sens instead"
        )
    with new_file(folder / "depth" / f"{frame.index}.png") as file:
        Image.fromarray(millimetres.astype(np.uint16)).save(file, format="PNG", compress_level=1)
    pose = np.full((4, 4), -np.inf) if frame.camera_to_world is None else frame.camera_to_world
    write_whole(folder / "pose" / f"{frame.index}.txt", _matrix_text(pose))


def _claim(mark: Path, path: Path, header: SensHeader) -> None:
    """Note whose frames the folder holds; refuse a folder that holds those of another file."""
    wanted = {"file": path.name, "bytes": path.stat().st_size, "num_frames": header.num_frames}
    try:
        found = json.loads(mark.read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_whole(mark, json.dumps(wanted) + "\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{mark}: cannot read it ({error}); choose another folder or delete this one") from None
    else:
        if found != wanted:
            raise ValueError(
                f"{mark.parent}: holds the export of {found}, not of {wanted}; choose another folder or delete this one"
            )


def _matrix_text(matrix: np.ndarray) -> str:
    return "".join(" ".join(f"{value:.9g}" for value in row) + "\n" for row in matrix)
