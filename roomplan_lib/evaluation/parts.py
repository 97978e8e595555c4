"""Predictions made in parts: which rows are whose, rows kept as they are made, parts put together again."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TextIO

from tqdm import tqdm

from roomplan_lib.evaluation import manifest_file, read_manifest
from roomplan_lib.files import file_hash, write_whole
from roomplan_lib.training.launch import die_with_parent

POLL_S = 0.5  # between two looks at the processes and their rows
NAMED = 3  # faults and rows that a message names, the others it counts


@dataclass(frozen=True)
class Part:
    """One of `count` parts of the rows, `number` from 1."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"part: expected 1/{self.count} to {self.count}/{self.count}, got {self}")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that "2/4" means. Raises ValueError for anything else than two whole numbers from 1."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(count)):
            raise ValueError(f"part: expected i/n, such as 1/4 for the first of four parts, got {text!r}")
        return cls(int(number), int(count))

    def file(self, path: Path) -> Path:
        """Where this part of the predictions file `path` grows."""
        return path.with_name(f"{path.stem}.part-{self.number}-of-{self.count}.jsonl")


def split_rows(scene_ids: Sequence[str], num_parts: int) -> list[list[int]]:
    """The rows of each part, ascending; scene_ids: [N] the scene of each row.

    All rows of a scene are in one part, since they share its encoding. Scenes go in order of their number of rows,
    largest first, to the part that has fewest, so parts differ by no more rows than one scene has. The scenes alone
    decide, so every process comes to the same split.
    """
    sizes = Counter(scene_ids)  # in order of appearance
    loads, owner = [0] * num_parts, {}
    for scene_id in sorted(sizes, key=sizes.get, reverse=True):  # stable
        part = loads.index(min(loads))
        owner[scene_id] = part
        loads[part] += sizes[scene_id]
    rows: list[list[int]] = [[] for _ in range(num_parts)]
    for i, scene_id in enumerate(scene_ids):
        rows[owner[scene_id]].append(i)
    return rows


class PartFile:
    """A part's rows in a file that grows as they are made; `todo`: the indices of those that it still lacks.

    The first line is {"part": [number, count], "made_from": weights, samples, settings}. A file of the same is gone on
    with behind its last whole row, any other one is begun anew. To be used with `with`, which locks it.
    rows: the indices of all rows of the part. Raises ValueError where another process has it open.
    """

    def __init__(self, path: Path, part: Part, rows: Sequence[int], fingerprint: dict) -> None:
        self.path, self.rows = part.file(path), rows
        self.header = _header(part, fingerprint)

    def __enter__(self) -> PartFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{self.path}: another process is making this part; let it end") from None
        header, found, size = read_part(self.path)
        done = {row["index"] for row in found}
        if header != self.header or len(done) < len(found) or not done <= set(self.rows):
            if header is not None:
                print(f"{self.path}: made from other weights, samples or settings, or damaged; begun anew")
            done, size = set(), 0
        self._file.truncate(size)
        self.todo = [i for i in self.rows if i not in done]
        if not size:
            self._write([self.header])
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error and len(self.todo) == len(self.rows):
            self.path.unlink()
        self._file.close()

    def append(self, rows: Iterable[dict]) -> None:
        """Add rows; when this returns they outlive the process."""
        rows = list(rows)
        self._write(rows)
        made = {row["index"] for row in rows}
        self.todo = [i for i in self.todo if i not in made]

    def _write(self, lines: Iterable[dict]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()


def read_part(path: Path) -> tuple[dict | None, list[dict], int]:
    """First line, rows, and the bytes that they take, of a part's file; all before the first line that is not whole.

    None, [] and 0 where the first line is not whole, as in a file that is only just made.
    """
    lines, size = [], 0
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                break
            known = isinstance(value, dict) and isinstance(value.get("index" if lines else "part"), int | list)
            if not line.endswith(b"\n") or not known:
                break
            lines.append(value)
            size += len(line)
    return (lines[0], lines[1:], size) if lines else (None, [], 0)


def is_current(path: Path, fingerprint: dict) -> bool:
    """Whether the predictions at `path` are whole and were made from this."""
    manifest = read_manifest(path)
    return manifest is not None and manifest == {"sha256": file_hash(path), "made_from": fingerprint}


def merge_parts(path: Path, fingerprint: dict, rows_of_parts: Sequence[Sequence[int]]) -> None:
    """Write the predictions file `path` with its manifest, whole and in order, from its parts, and remove those.

    rows_of_parts: the rows of each part, as `split_rows` has them.
    Raises ValueError that names every part that is missing, not done or made from something else, and rows that are
    there twice or in a part that they do not belong to; nothing is written or removed then.
    """
    count = len(rows_of_parts)
    parts = [Part(number, count) for number in range(1, count + 1)]
    rows: dict[int, dict] = {}
    faults = []
    for part, expected in zip(parts, rows_of_parts, strict=True):
        file = part.file(path)
        if not file.is_file():
            faults.append(f"{file.name} is missing")
            continue
        header, found, size = read_part(file)
        if header != _header(part, fingerprint):
            faults.append(f"{file.name} {_difference(header, part, fingerprint)}")
            continue
        times = Counter(row["index"] for row in found)
        wrong = {
            "not made": [i for i in expected if i not in times],
            "there twice": [i for i, n in times.items() if n > 1],
            "of other parts": sorted(times.keys() - set(expected)),
        }
        faults += [f"{file.name} has rows {_listed(which)} {what}" for what, which in wrong.items() if which]
        if not any(wrong.values()) and size < file.stat().st_size:
            faults.append(f"{file.name} has more than its {len(found)} rows")
        rows |= {row["index"]: row for row in found}
    if faults:
        raise ValueError(
            f"{path}: the parts are not whole: {_listed(faults, '; ')}; predict those parts again, "
            f"`--part i/{count}`, which goes on where one stopped"
        )
    write_whole(path, "".join(json.dumps(rows[i]) + "\n" for i in sorted(rows)))
    manifest = {"sha256": file_hash(path), "made_from": fingerprint}
    write_whole(manifest_file(path), json.dumps(manifest, indent=1) + "\n")
    remove_parts(path, count)


def remove_parts(path: Path, count: int) -> None:
    """Remove what there is of `count` parts of the predictions file `path`."""
    for number in range(1, count + 1):
        Part(number, count).file(path).unlink(missing_ok=True)


def run_parts(
    settings: str, options: dict[str, object], paths: Sequence[Path], num_rows: int, count: int, gpus: Sequence[str]
) -> None:
    """Makes all parts of predictions files at a time, each by a `roomplan predict --part` that dies with this process.

    settings: the run's, as YAML. options: of the command, None for those to leave out. paths: the predictions files,
    each of `num_rows` rows. gpus: names of the GPUs that the processes take in turn; none = they share the CPU's cores.
    Their lines are printed with the part before them.
    Raises ChildProcessError with the last line of a process that failed. The others are ended then; rows that were
    written stay, and the next call goes on behind them.
    """
    surroundings = os.environ | {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    surroundings.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    arguments = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    parts = [Part(number, count) for number in range(1, count + 1)]
    files = [part.file(path) for path in paths for part in parts]
    own = os.getpid()
    with ExitStack() as stack:
        processes = {}
        for part in parts:
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[(part.number - 1) % len(gpus)]} if gpus else {}
            command = [sys.executable, "-m", "roomplan_lib.cli", "predict", "/dev/stdin", "--part", str(part)]
            process = subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=surroundings | gpu,
                start_new_session=True,  # an interrupt in the terminal reaches this process, which ends them
                preexec_fn=lambda: die_with_parent(own),
            )
            stack.callback(_end, process)
            process.stdin.write(settings)
            process.stdin.close()
            last: deque[str] = deque([""], maxlen=1)
            reader = Thread(target=_relay, args=(process.stdout, part, last), daemon=True)
            reader.start()
            processes[part] = process, reader, last
        done = sum(map(_num_rows, files))
        total = num_rows * len(paths)
        with tqdm(total=total, initial=done, desc=f"predict, {count} parts", unit="sample", file=sys.stdout) as bar:
            while any(process.poll() is None for process, _, _ in processes.values()):
                failed = any(process.poll() for process, _, _ in processes.values())
                bar.update(sum(map(_num_rows, files)) - bar.n)
                if failed:
                    break
                time.sleep(POLL_S)
            bar.update(sum(map(_num_rows, files)) - bar.n)
        for part, (process, reader, last) in processes.items():
            if status := process.poll():
                reader.join(1.0)
                raise ChildProcessError(
                    f"part {part} ended with status {status}: {last[0]}; what was written is kept, predict again to go "
                    "on"
                )


def _relay(lines: TextIO, part: Part, last: deque[str]) -> None:
    """Prints a process's lines and keeps the last one."""
    for line in lines:
        if line.strip():
            last.append(line.strip())
            tqdm.write(f"[{part}] {line.rstrip()}")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _num_rows(file: Path) -> int:
    """Whole rows of a part's file, which has one line more; 0 where it is not there."""
    return max(file.read_bytes().count(b"\n") - 1, 0) if file.is_file() else 0


def _header(part: Part, fingerprint: dict) -> dict:
    return {"part": [part.number, part.count], "made_from": fingerprint}


def _difference(header: dict | None, part: Part, fingerprint: dict) -> str:
    if header is None:
        return "has no whole first line"
    if header["part"] != [part.number, part.count]:
        return f"holds part {'/'.join(map(str, header['part']))}"
    made_from = header.get("made_from") or {}
    differing = [key for key in fingerprint.keys() | made_from.keys() if fingerprint.get(key) != made_from.get(key)]
    return f"was made from another state: {', '.join(sorted(differing))} differ"


def _listed(items: Sequence, separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return separator.join(map(str, items[:NAMED])) + more
