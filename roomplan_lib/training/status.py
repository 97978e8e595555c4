"""How a run and the world agree: one start of it trains at a time, status.json says how it goes, a STOP file or a
signal asks it to stop."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from roomplan_lib.files import write_whole

LOCK_WAIT_S = 30.0  # for the processes of a start that was killed to end
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Preempted(RuntimeError):
    """The run was asked to stop and has saved where it was."""


def write_status(
    run_dir: Path, status: str, step: int, max_steps: int, world_size: int, error: str = "", asked_by: str = ""
) -> None:
    """status.json: running, preempted (asked by what), finished or failed (why), and how far the run has come."""
    record = {"status": status, "step": step, "max_steps": max_steps, "world_size": world_size}
    record |= {key: text for key, text in (("error", error), ("asked_by", asked_by)) if text}
    record["time"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    write_whole(run_dir / "status.json", json.dumps(record, indent=1) + "\n")


class RunLock:
    """The right to train in a run's folder, which one process has at a time: two would overwrite each other's files.

    It is a lock on `.lock` there, seen by other nodes on file systems that share locks, and the kernel takes it back
    when the process ends, however it ends; its loader processes do not inherit it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path, self.file = run_dir / ".lock", None

    def take(self) -> None:
        """Waits up to LOCK_WAIT_S for the one who has it; ValueError says who that is."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while not self._try():
            if time.monotonic() >= deadline:
                holder = self.path.read_text().strip() or "another process"
                raise ValueError(
                    f"{self.path.parent} is being trained by {holder}; stop that with `touch "
                    f"{self.path.parent / 'STOP'}`, choose another run_name, or delete {self.path} if it is long gone"
                )
            time.sleep(min(0.2, LOCK_WAIT_S))

    def _try(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(
                    f"{self.path.parent}: its file system has no locks; nothing keeps a second start from training it"
                )
                file.close()
                return True
            file.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        try:
            is_there = os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_there = False
        if not is_there:  # its holder has deleted it meanwhile
            file.close()
            return False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.file = file
        return True

    def release(self) -> None:
        """Nothing is left of a start that has written nothing."""
        if self.file is not None:
            self.path.unlink(missing_ok=True)
            self.file.close()
            with suppress(OSError):
                self.path.parent.rmdir()


class StopRequest:
    """Whether this process was asked to stop: by the run's STOP file, or by a signal."""

    def __init__(self, stop_file: Path | None) -> None:
        """stop_file: looked for once per step; None where another process of the run does that."""
        self.stop_file, self.signal = stop_file, 0

    def __call__(self) -> bool:
        return bool(self.signal) or (self.stop_file is not None and self.stop_file.exists())

    def asked_by(self) -> str:
        """`STOP file`, the name of the signal, or `another process`, once the processes of a run agree to stop."""
        if self.stop_file is not None and self.stop_file.exists():
            return "STOP file"
        return signal.Signals(self.signal).name if self.signal else "another process"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """USR1, TERM and INT ask for a stop inside the block; a second INT interrupts at once.

        Only the main thread of a program can listen; elsewhere the STOP file alone is looked for.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {kind: signal.signal(kind, self._take) for kind in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler or signal.SIG_DFL)

    def _take(self, kind: int, frame) -> None:
        if kind == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = kind
