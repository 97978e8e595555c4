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
from roomplan_lib.samples import read_manifest, write_json


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


def write_cache(path: Path, key: str, built: dict) -> None:
    """Keep what was built for `key`, with its hash, for `read_cache`."""
    write_json(path, {"key": key, "hash": digest(built), **built})


def read_cache(path: Path, key: str) -> dict | None:
    """What `write_cache` kept for `key`; None for anything else or damaged, which is then built again."""
    try:
        built = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(built, dict) or built.get("key") != key:
        return None
    body = {name: value for name, value in built.items() if name not in ("key", "hash")}
    return built if built.get("hash") == digest(body) else None


def refuse_overwriting(output: Path, inputs: Sequence[Path]) -> None:
    """Raise ValueError where writing `output` would destroy an input, or a file that no builder of ours wrote."""
    if any(output.resolve() == Path(path).resolve() for path in inputs):
        raise ValueError(f"{output}: is the file to read; give another --output")
    if output.exists() and "sha256" not in old_manifest(output):
        raise ValueError(
            f"{output}: is there already and no builder wrote it (it has no manifest); give another --output"
        )


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
