"""Runs as processes of this machine.

A run is started under a lock on RUN/launch.lock that its process inherits (flock belongs to the
open file), so the kernel holds it for as long as the process lives, whatever becomes of the sweep.
A sweep that starts again finds the lock taken and waits for that run instead of starting it twice;
there is no moment between the start of a process and the taking of its lock. The run's own lock
(training/lock.py) stands behind this one, and keeps out runs that were started elsewhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.observe import LOG_FILE, State, last_word, read_tail
from dydilit_jax.sweeps.runs import Command, Run

LOCK_FILE = "launch.lock"
STOPPED_STATUS = 75  # what a launcher says of a run that was asked to stop, and can go on

# The process's number is written by the process, before it becomes the run: it is there for whoever
# finds the lock taken.
_SHELL = 'echo "$$ $DYDILIT_DEVICE" > "$0"; exec "$@"'


@dataclasses.dataclass(frozen=True)
class Ended:
    """A run that has ended.

    Attributes:
      code: its exit status; None if nobody of us waited for it.
    """

    code: int | None


class Backend(Protocol):
    """A place where runs run; its scheduler is the engine.

    Attributes:
      queues: whether runs may be handed over all at once, to wait there.
      outlives: whether runs go on when the sweep is stopped.
      interval: seconds between two looks.
    """

    queues: bool
    outlives: bool
    interval: float

    def adopt(self, runs: Sequence[Run]) -> set[str]:
        """Names of the runs that an earlier sweep started, and that are still alive."""

    def start(self, runs: Sequence[Run]) -> None:
        """Starts runs, or hands them over."""

    def poll(self) -> dict[str, State | Ended]:
        """How all runs stand that were started or adopted; an end is told once."""

    def stop(self, name: str) -> None:
        """Asks a run to save and end."""

    def last_word(self, name: str) -> str:
        """What a run's log says went wrong."""


def train_command(workdir: Path) -> Command:
    """The command of a run on this machine, under the sweep's workdir."""

    def command(run: Run) -> list[str]:
        return [
            sys.executable, "-m", "dydilit_jax.train",
            *run.arguments, f"--workdir={workdir / run.name}",
            f"--stopped_status={STOPPED_STATUS}",
        ]  # fmt: skip

    return command


class LocalProcesses:
    """Starts runs as processes, each in a session of its own, with a log in its workdir.

    Args:
      workdir: the sweep's.
      command: of a run.
      devices: GPUs that runs get one of each (CUDA_VISIBLE_DEVICES); empty to leave that alone.
    """

    queues = False
    outlives = False
    interval = 1.0

    def __init__(self, workdir: Path, command: Command, devices: Sequence[str] = ()):
        self._workdir, self._command, self._devices = workdir, command, tuple(devices)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._adopted: set[str] = set()
        self._given: dict[str, str] = {}  # devices of our own processes

    def adopt(self, runs: Sequence[Run]) -> set[str]:
        """Names of the runs whose lock is taken."""
        for run in runs:
            if (self._workdir / run.name / LOCK_FILE).is_file():
                lock = self._take_lock(run.name)
                if lock is None:
                    self._adopted.add(run.name)
                else:
                    os.close(lock)
        return set(self._adopted)

    def start(self, runs: Sequence[Run]) -> None:
        """Starts processes.

        Raises:
          UserError: a workdir cannot be written, or has no locks.
        """
        for run in runs:
            lock = self._take_lock(run.name)
            if lock is None:
                self._adopted.add(run.name)
                continue
            folder = self._workdir / run.name
            self._given[run.name] = device = self._free_device()
            environment = os.environ | {"DYDILIT_DEVICE": device}
            if device:
                environment |= {"CUDA_VISIBLE_DEVICES": device}
            try:
                with (folder / LOG_FILE).open("ab") as log:
                    self._children[run.name] = subprocess.Popen(
                        ["/bin/sh", "-c", _SHELL, str(folder / LOCK_FILE), *self._command(run)],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        pass_fds=(lock,),
                        env=environment,
                    )
            except OSError as error:
                raise UserError(f"run {run.name!r} cannot be started: {error}") from error
            finally:
                os.close(lock)

    def poll(self) -> dict[str, State | Ended]:
        """How processes stand."""
        found: dict[str, State | Ended] = {}
        for name, child in list(self._children.items()):
            code = child.poll()
            found[name] = State.RUNNING if code is None else Ended(code)
            if code is not None:
                del self._children[name]
        for name in list(self._adopted):
            lock = self._take_lock(name)
            found[name] = State.RUNNING if lock is None else Ended(None)
            if lock is not None:
                os.close(lock)
                self._adopted.remove(name)
        return found

    def stop(self, name: str) -> None:
        """Sends SIGTERM."""
        child = self._children.get(name)
        pid = child.pid if child is not None else self._holder(name)[0]
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def last_word(self, name: str) -> str:
        """What the run's log says went wrong."""
        return last_word(read_tail(self._workdir / name / LOG_FILE))

    def _take_lock(self, name: str) -> int | None:
        """The run's lock, an open file; None if a process has it."""
        path = self._workdir / name / LOCK_FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write workdir {str(path.parent)!r}: {error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise UserError(
                f"the file system of {str(self._workdir)!r} has no locks (flock): use another "
                "--workdir, or --on=slurm"
            ) from error
        return file

    def _holder(self, name: str) -> tuple[int | None, str]:
        """Process and device of a run whose lock is taken."""
        words = read_tail(self._workdir / name / LOCK_FILE).split()
        return (int(words[0]) if words else None), " ".join(words[1:])

    def _free_device(self) -> str:
        """A device that no living run has; the first where all have one."""
        used = {self._given[name] for name in self._children}
        used |= {self._holder(name)[1] for name in self._adopted}
        free = [each for each in self._devices if each not in used]
        return (free or self._devices or ("",))[0]
