"""Vertices of a PLY mesh, binary or text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float": "f4", "double": "f8", "float32": "f4", "float64": "f8",
}  # fmt: skip
ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "<"}
MAX_HEADER = 65536  # bytes
FETCH_AGAIN = "fetch the mesh again"


def read_vertices(path: Path | str) -> np.ndarray:
    """Structured array [N] of the element `vertex`, with the file's own property names: x, y, z, red, label, ...

    Raises ValueError that names the file: no PLY, no vertices with x, y, z at its beginning, truncated.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            layout, count, is_text = _read_header(file, path)
            # A number of text has at least a digit, and a blank or the end of the file.
            least = 2 * len(layout.names) * count - 1 if is_text else count * layout.itemsize
            rest = path.stat().st_size - file.tell()
            if least > rest:
                raise ValueError(f"{path}: the header tells of {count} vertices, {rest} bytes follow; {FETCH_AGAIN}")
            if not is_text:
                data = file.read(count * layout.itemsize)
                return np.frombuffer(data, layout)
            return _read_rows(file, layout, count, path)
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing; {FETCH_AGAIN}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read the file ({error}); {FETCH_AGAIN}") from None


def vertex_positions(vertices: np.ndarray) -> np.ndarray:
    """[N, 3] float64 metres."""
    return np.stack([vertices[axis] for axis in "xyz"], axis=-1).astype(np.float64)


def _read_header(file, path: Path) -> tuple[np.dtype, int, bool]:
    """(one vertex, number of vertices, whether the body is text); leaves the file at the body."""
    header = file.read(MAX_HEADER)
    end = header.find(b"end_header")
    body = header.find(b"\n", end) + 1
    if not header.startswith(b"ply") or end < 0 or body == 0:
        raise ValueError(f"{path}: no PLY file with a header of at most {MAX_HEADER} bytes; {FETCH_AGAIN}")
    lines = [line.split() for line in header[:end].decode("ascii", "replace").splitlines()]
    form = next((words[1] for words in lines if words[:1] == ["format"] and len(words) > 1), "")
    if form not in ORDERS:
        raise ValueError(f"{path}: format {form!r}, expected one of {', '.join(ORDERS)}; {FETCH_AGAIN}")
    starts = [i for i, words in enumerate(lines) if words[:1] == ["element"]]
    first = lines[starts[0]] if starts else []
    if len(first) != 3 or first[1] != "vertex" or not first[2].isdecimal() or int(first[2]) == 0:
        raise ValueError(f"{path}: expected vertices as the first element, got {' '.join(first)!r}; {FETCH_AGAIN}")
    fields = []
    for words in lines[starts[0] + 1 : (starts + [len(lines)])[1]]:
        if words[:1] != ["property"]:
            continue
        if len(words) != 3 or words[1] not in TYPES:
            raise ValueError(f"{path}: vertex property {' '.join(words[1:])!r} is not read; {FETCH_AGAIN}")
        fields.append((words[2], ORDERS[form] + TYPES[words[1]]))
    names = [name for name, _ in fields]
    if not {"x", "y", "z"} <= set(names) or len(set(names)) < len(names):
        raise ValueError(f"{path}: vertices with the properties {names}, expected x, y and z once; {FETCH_AGAIN}")
    file.seek(body)
    return np.dtype(fields), int(first[2]), form == "ascii"


def _read_rows(file, layout: np.dtype, count: int, path: Path) -> np.ndarray:
    vertices = np.empty(count, layout)
    for number in range(count):
        words = file.readline(4096).split()
        try:
            if len(words) != len(layout.names):
                raise ValueError
            vertices[number] = tuple(float(word) for word in words)
        except (ValueError, OverflowError):
            raise ValueError(
                f"{path}: vertex {number}: expected {len(layout.names)} numbers, got {b' '.join(words)!r:.120}; "
                f"{FETCH_AGAIN}"
            ) from None
    return vertices
