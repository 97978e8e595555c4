"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file open for writing bytes, with a temporary name until the block ends well; else nothing is left of it.

    A reader therefore never sees half a file. Missing parent folders are made. A link stays one: the file that it
    leads to is written. What is no regular file, such as /dev/stdout, is written to as it is.
    Raises ValueError for a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not path.is_file():  # unresolved: /dev/stdout leads to `pipe:[..]`, which is no path
        with path.open("wb") as file:
            yield file
        return
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on two nodes may share a number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 by `new_file`."""
    with new_file(path) as file:
        file.write(text.encode())


def flush_to_disk(*paths: Path) -> None:
    """Returns once these files and folders are on their disk: until then a lost machine may take them with it."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that flush no folders
                raise OSError(error.errno, error.strerror, str(path)) from error
        finally:
            os.close(descriptor)


def file_hash(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
