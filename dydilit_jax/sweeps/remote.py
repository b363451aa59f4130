"""Runs as tasks of a scheduler, through launch/slurm.sh and launch/gke.sh.

A submission is an array of commands under a job name of its own. WORKDIR/launch/submissions.json
has the job's name and its runs before the scheduler is asked, so a sweep that was killed in
between looks the job up by name. The launch script inherits a lock while it submits, and the sweep
that comes after waits for it before it looks: no run is submitted twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PosixPath
from typing import Any

from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.local import STOPPED_STATUS, Ended
from dydilit_jax.sweeps.observe import State, last_word
from dydilit_jax.sweeps.runs import (
    LAUNCH_FOLDER,
    Command,
    Run,
    command_path,
    read_json,
    write_json,
)
from dydilit_jax.training.storage import warn

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = {"slurm": ("slurm.sh", "sbatch"), "gke": ("gke.sh", "kubectl")}
SUBMISSIONS = "submissions.json"
LOCK_FILE = "submit.lock"
MISSING = 3  # looks in a row that a task may be missing from the scheduler's answers

_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING", "SUSPENDED", "CREATED", "WAITING")
_RUNNING = ("RUNNING", "COMPLETING", "ACTIVE", "RESTARTING", "STARTING", "STOPPING")
_FINISHED = ("FINISHED", "COMPLETED", "SUCCEEDED")


class Scheduler:
    """Hands runs to Slurm or to a GKE cluster.

    Args:
      place: `slurm` or `gke`.
      workdir: the sweep's, which the hosts see.
      command: of a run there.
      options: of the launch script: hosts, partition, image and the like.
      max_parallel: tasks of an array that run at once; None for no limit.

    Raises:
      UserError: the launch script or the scheduler's command is missing.
    """

    queues = True
    outlives = True
    interval = 15.0

    def __init__(
        self,
        place: str,
        workdir: Path,
        command: Command,
        options: Sequence[str] = (),
        max_parallel: int | None = None,
    ):
        script, program = PLACES[place]
        self._script = ROOT / "launch" / script
        if shutil.which(program) is None:
            raise UserError(
                f"--on={place} needs {program}, which is not on PATH: start the sweep on a host "
                "that has it, or use --on=local"
            )
        if not self._script.is_file():
            raise UserError(f"--on={place} needs {self._script}: run it from a checkout")
        self._options = list(options)
        if place == "slurm":
            self._options.append(f"--folder={workdir / LAUNCH_FOLDER}")
        limited = place == "slurm" and max_parallel is not None
        self._limit = [f"--max-parallel={max_parallel}"] if limited else []
        self._workdir, self._command = workdir, command
        self._path = workdir / LAUNCH_FOLDER / SUBMISSIONS
        self._places: dict[str, tuple[str, int]] = {}  # job and task of each run, the newest
        self._alive: dict[str, int] = {}  # with looks in a row that did not find it

    def adopt(self, runs: Sequence[Run]) -> set[str]:
        """Names of the runs that the scheduler has, or has finished.

        Raises:
          UserError: the scheduler does not answer.
        """
        names = {run.name for run in runs}
        with self._submitting():
            pass
        for submission in self._submissions():
            for task, name in enumerate(submission["runs"]):
                if name in names:
                    self._places[name] = (submission["job"], task)
        for name, state in self._states(set(self._places)).items():
            if state in ALIVE_OR_FINISHED:
                self._alive[name] = 0
        return set(self._alive)

    def start(self, runs: Sequence[Run]) -> None:
        """Submits runs as one array.

        Raises:
          UserError: the launch script refuses.
        """
        submissions = self._submissions()
        job = f"{job_prefix(self._workdir)}-{len(submissions) + 1}"
        submissions.append({"job": job, "runs": [run.name for run in runs]})
        write_json(self._path, {"submissions": submissions})
        with (
            self._submitting() as locks,
            tempfile.NamedTemporaryFile("w", suffix=".commands") as file,
        ):
            file.write("".join(shlex.join(self._command(run)) + "\n" for run in runs))
            file.flush()
            # One task is its own limit.
            limit = self._limit if len(runs) > 1 else []
            self._launch("start", job, f"--array={file.name}", *limit, locks=locks)
        for task, run in enumerate(runs):
            self._places[run.name], self._alive[run.name] = (job, task), 0

    def poll(self) -> dict[str, State | Ended]:
        """How the tasks stand; where the scheduler does not answer, as they stood."""
        try:
            states = self._states(set(self._alive))
        except UserError as error:
            warn(str(error))
            return {}
        found: dict[str, State | Ended] = {}
        for name in list(self._alive):
            if name in states:
                self._alive[name] = 0
                found[name] = states[name]
            else:
                self._alive[name] += 1
                if self._alive[name] >= MISSING:
                    found[name] = Ended(None)
            if isinstance(found.get(name), Ended):
                del self._alive[name]
        return found

    def stop(self, name: str) -> None:
        """Tells a task to save and end."""
        job, task = self._places[name]
        try:
            self._launch("delete", job, f"--task={task}")
        except UserError as error:
            warn(f"run {name!r} could not be stopped: {error}")

    def last_word(self, name: str) -> str:
        """What the task's log says went wrong."""
        job, task = self._places[name]
        try:
            return last_word(self._launch("logs", job, f"--task={task}"))
        except UserError as error:
            return str(error)

    def _states(self, names: set[str]) -> dict[str, State | Ended]:
        """What the scheduler says of runs; one that it does not know is left out."""
        jobs = {self._places[name][0] for name in names}
        told = {job: self._launch("status", job).splitlines() for job in jobs}
        states: dict[str, State | Ended] = {}
        for name in names:
            job, task = self._places[name]
            for line in told[job]:
                number, _, rest = line.partition("\t")
                # Slurm's tasks are JOB_TASK, JobSets are NAME-TASK.
                if re.search(rf"[_-]{task}$", number):
                    states[name] = parse_state(rest.partition("\t")[0])
        return states

    def _submissions(self) -> list[dict[str, Any]]:
        record = read_json(self._path)
        return [] if record is None else list(record["submissions"])

    @contextlib.contextmanager
    def _submitting(self) -> Iterator[tuple[int, ...]]:
        """Waits until nobody submits; the open files of the lock, none where storage has none."""
        if not isinstance(self._workdir, PosixPath) or not self._path.parent.is_dir():
            yield ()
            return
        file = os.open(self._path.parent / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            with contextlib.suppress(OSError):  # A file system without locks.
                fcntl.flock(file, fcntl.LOCK_EX)
            yield (file,)
        finally:
            os.close(file)

    def _launch(self, command: str, job: str, *arguments: str, locks: tuple[int, ...] = ()) -> str:
        """Standard output of the launch script."""
        words = [str(self._script), command, f"--job={job}", *self._options, *arguments]
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            pass_fds=locks,
            start_new_session=True,  # Ctrl-C is for the sweep.
        )
        if done.returncode:
            word = last_word(done.stderr).removeprefix("error: ")
            raise UserError(f"launch/{self._script.name} {command} --job={job}: {word}")
        return done.stdout


ALIVE_OR_FINISHED = (State.QUEUED, State.RUNNING, Ended(0))


def parse_state(text: str) -> State | Ended:
    """What a scheduler's word for a task means."""
    if text in _QUEUED:
        return State.QUEUED
    if text in _RUNNING:
        return State.RUNNING
    if text in _FINISHED:
        return Ended(0)
    if text == "STOPPED":
        return Ended(STOPPED_STATUS)
    code = re.search(r"\((-?\d+)\)", text)
    if text.startswith("FAILED"):
        return Ended(int(code.group(1)) if code else 1)
    return Ended(None)


def job_prefix(workdir: Path) -> str:
    """A job's name for a sweep's workdir: of its letters and digits, and its own by a hash."""
    words = re.sub(r"[^a-z0-9]+", "-", workdir.name.lower()).strip("-")
    if not words[:1].isalpha():
        words = f"sweep-{words}".rstrip("-")
    digest = hashlib.sha256(str(workdir).encode()).hexdigest()[:6]
    return f"{words[:24].rstrip('-')}-{digest}"


def remote_command(workdir: str) -> Command:
    """The command of a run on hosts that have their own copy of this checkout.

    Args:
      workdir: the sweep's, as the hosts see it.
    """

    def command(run: Run) -> list[str]:
        source, colon, argument = run.arguments[0].partition("=")[2].partition(":")
        config = command_path(source, ROOT) + colon + argument
        return [
            "python", "-m", "dydilit_jax.train",
            f"--config={config}", *run.arguments[1:], f"--workdir={workdir}/{run.name}",
        ]  # fmt: skip

    return command
