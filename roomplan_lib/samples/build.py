"""What every builder of sample files does: many scenes in parallel with progress, and telling whether anything changed.

Nothing here knows a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from roomplan_lib.files import file_hash
from roomplan_lib.samples import read_manifest


def run_all(
    work: Callable[[Path], dict], paths: Sequence[Path], workers: int | None = None, progress: bool = True
) -> Iterator[dict]:
    """`work(path)` of every scene, as they get ready, with a progress bar.

    workers: processes, all cores by default, 1 = none besides this one. `work` must then be picklable, and a script
    needs the `if __name__ == "__main__":` guard. What `work` raises ends the run.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers, len(paths))
    with tqdm(total=len(paths), unit="scene", desc="scenes", disable=not progress) as bar:
        if workers <= 1:
            for path in paths:
                yield work(path)
                bar.update()
            return
        # Spawned, since forking a process with threads (a notebook, torch) may hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            try:
                for job in as_completed([pool.submit(work, path) for path in paths]):
                    yield job.result()
                    bar.update()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def digest(value: object) -> str:
    """sha256 in hex of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_cache(path: Path, key: str) -> dict | None:
    """The object of a JSON file whose "key" is `key`; None for anything else, which is then built again."""
    try:
        built = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return built if isinstance(built, dict) and built.get("key") == key else None


def old_manifest(path: Path) -> dict:
    """What an earlier run wrote beside `path`; empty when there is nothing readable, so the file is built again."""
    try:
        return read_manifest(path) if path.exists() else {}
    except ValueError:
        return {}


def is_current(path: Path, settings: dict, inputs: str, root: Path) -> bool:
    """The file was made from these inputs with these settings and has not been touched since."""
    manifest = old_manifest(path)
    return (
        manifest.get("settings") == settings
        and manifest.get("inputs") == inputs
        and (path.parent / manifest["root"]).resolve() == root.resolve()
        and manifest.get("sha256") == file_hash(path)
    )
