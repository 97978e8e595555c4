"""Small text files of a scene, read within a limit; each error is one ValueError that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

MAX_BYTES = 64 * 2**20  # the largest file of a scan that is text, its segments, has a few megabytes
RIGID_TOLERANCE = 1e-2  # rounding of poses on disk; anything larger is a wrong file
FETCH_AGAIN = "fetch it again"


def read_text(path: Path) -> str:
    """UTF-8 text of at most MAX_BYTES, without the byte order mark that some editors put first."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: more than {MAX_BYTES} bytes of text are refused; {FETCH_AGAIN}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path}: file is missing; {FETCH_AGAIN}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the file ({error}); {FETCH_AGAIN}") from None


def read_json(path: Path) -> object:
    """JSON without NaN and Infinity, which are no JSON."""
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: invalid or truncated JSON ({error.msg}); {FETCH_AGAIN}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: invalid JSON ({error}); {FETCH_AGAIN}") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def numbers(text: str, where: str, count: int, meaning: str) -> list[float]:
    """`count` numbers between white space or commas, infinite ones and NaN among them."""
    try:
        values = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if len(values) != count:
        raise ValueError(f"{where}: expected {count} numbers ({meaning}), got {text.strip()!r:.120}; {FETCH_AGAIN}")
    return values


def read_intrinsics(path: Path) -> np.ndarray:
    """K [3, 3] of a file with 3x3 or 4x4 numbers, pixels."""
    text = read_text(path)
    side = 4 if len(text.split()) == 16 else 3
    return check_intrinsics(np.array(numbers(text, str(path), side * side, "a 3x3 or 4x4 matrix")), str(path))


def check_intrinsics(K: np.ndarray, where: str) -> np.ndarray:
    """K [3, 3] of 9 or 16 numbers, row by row. Raises ValueError when they are no camera matrix."""
    K = np.asarray(K, dtype=np.float64)
    K = K.reshape((3, 3) if K.size == 9 else (4, 4))[:3, :3]
    if not np.isfinite(K).all() or K[0, 0] <= 0 or K[1, 1] <= 0 or K[2].tolist() != [0, 0, 1]:
        raise ValueError(f"{where}: expected a camera matrix (fx 0 cx; 0 fy cy; 0 0 1), got {K.tolist()}")
    return K


def check_rigid(pose: np.ndarray, where: str) -> np.ndarray:
    """[4, 4] of 16 finite numbers, row by row. Raises ValueError when they are no rotation and translation."""
    pose = np.asarray(pose, dtype=np.float64).reshape(4, 4)
    rotation = pose[:3, :3]
    if (
        not np.isfinite(pose).all()
        or np.abs(rotation).max() > 2  # the next line's product could overflow
        or np.abs(rotation.T @ rotation - np.eye(3)).max() > RIGID_TOLERANCE
        or np.linalg.det(rotation) < 0
        or np.abs(pose[3] - [0, 0, 0, 1]).max() > RIGID_TOLERANCE
    ):
        raise ValueError(f"{where}: expected a 4x4 rotation and translation, got {pose.tolist()}; {FETCH_AGAIN}")
    return pose
