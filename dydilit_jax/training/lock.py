"""One run in a workdir at a time.

WORKDIR/run.lock names the run that holds it: host, process, and a number that rises every few
seconds. On one machine the kernel's lock on the file (flock) decides, which ends with the process,
however it ends. Where another machine held it, and the file system does not carry the kernel's lock
from machine to machine, the rising number tells whether that run lives; no clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from dydilit_jax.agreement import raised_together
from dydilit_jax.errors import UserError

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 5.0
MISSED = 4  # heartbeats without which another machine's run counts as dead

_UNSUPPORTED = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)


class WorkdirLock:
    """Holds a workdir until `release`, or until the process ends.

    Args:
      workdir: made if it does not exist.
      heartbeat: seconds between two signs of life.

    Raises:
      UserError: another run lives in it, or it cannot be written.
    """

    def __init__(self, workdir: Path, heartbeat: float = HEARTBEAT_SECONDS):
        self._path = workdir / LOCK_FILE
        self._heartbeat = heartbeat
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._taken_by: dict[str, Any] | None = None
        self._released = threading.Event()
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot write workdir {str(workdir)!r}: {reason}") from error
        try:
            self._acquire()
            self._beat()
        except BaseException:
            os.close(self._file)
            raise
        self._thread = threading.Thread(target=self._live, name="workdir_lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises UserError if another run took the workdir, as after a long pause of this one."""
        if self._taken_by is not None:
            raise UserError(
                f"workdir {str(self._path.parent)!r} was taken over by {_name(self._taken_by)} "
                "while this run did not move; this one ends"
            )

    def release(self) -> None:
        """Lets another run have the workdir, at once."""
        self._released.set()
        self._thread.join()
        if self._taken_by is None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, 0)
        os.close(self._file)

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            enforced = True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise self._refusal(_read(self._file)) from error
            enforced = False
        holder = _read(self._file)
        if holder is None or (enforced and holder.get("boot") == _boot()):
            return  # It ended: its kernel, which is ours, let go of the lock.
        seconds = self._heartbeat * MISSED
        print(
            f"{self._path} names {_name(holder)}: waiting up to {seconds:g} s for a sign of life",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(self._heartbeat / 2, 0.5))
            now = _read(self._file)
            if now is None:
                return
            if now != holder:
                raise self._refusal(now)

    def _refusal(self, holder: dict[str, Any] | None) -> UserError:
        return UserError(
            f"workdir {str(self._path.parent)!r} is in use by {_name(holder)}: wait until that run "
            "ends, stop it, or use another --workdir"
        )

    def _beat(self) -> None:
        self._beats += 1
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "boot": _boot(),
                "token": self._token,
                "beat": self._beats,
            }
        ).encode()
        # One write; a reader on another machine that sees half of it sees no holder's change.
        os.pwrite(self._file, text.ljust(512), 0)

    def _live(self) -> None:
        while not self._released.wait(self._heartbeat):
            with contextlib.suppress(OSError):  # Storage that is away for a while.
                holder = _read(self._file)
                if holder is not None and holder.get("token") != self._token:
                    self._taken_by = holder
                    return
                self._beat()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[WorkdirLock | None]:
    """Holds a workdir for all processes of a run, by the first of them; a collective.

    Raises:
      UserError: on every process, if another run lives in it, or it cannot be written.
    """
    lock = None
    with raised_together():
        if jax.process_index() == 0:
            lock = WorkdirLock(workdir)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _read(file: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) else None


def _name(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another run"
    return f"a run on {holder.get('host')} (process {holder.get('pid')})"


def _boot() -> str:
    """What tells this kernel's start from all others; the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
