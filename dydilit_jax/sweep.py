"""Trains many runs, and reports on them.

python -m dydilit_jax.sweep --config=configs/sweeps/ladder.py --workdir=runs/ladder
python -m dydilit_jax.sweep --workdir=runs/ladder --report=ladder.html
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PosixPath

from absl import flags

from dydilit_jax import cli
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.sweeps.driver import Listed, Plan, Sweep
from dydilit_jax.sweeps.local import Backend, LocalProcesses, train_command
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.remote import Scheduler, remote_command
from dydilit_jax.sweeps.runs import SweepFile, load_sweep, open_path, open_sweep
from dydilit_jax.sweeps.table import Table
from dydilit_jax.training.interruption import stop_signals
from dydilit_jax.training.lock import WorkdirLock

PLACES = ("local", "slurm", "gke")
GOALS = ("minimize", "maximize")

_CONFIG = cli.define_config_flag()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the sweep: a workdir for each run in it."
)
_ON = flags.DEFINE_string("on", "local", "Where runs run: local, slurm or gke.")
_MAX_PARALLEL = flags.DEFINE_integer(
    "max_parallel",
    None,
    "Runs alive at once; default: 1, or one for each of --devices; a scheduler decides itself.",
    lower_bound=1,
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    None,
    "How often a run that crashed is started again; default: local 0, else the launch script's.",
    lower_bound=0,
)
_DEVICES = flags.DEFINE_list(
    "devices", [], "GPUs of this machine, one for each local run, like 0,1,2,3."
)
_LAUNCH = flags.DEFINE_string(
    "launch", "", "Options of launch/slurm.sh or launch/gke.sh, like '--nodes=2 --partition=gpu'."
)
_SCORE = flags.DEFINE_string(
    "score", None, "Metric of metrics.jsonl that ranks runs; default: the config file's SCORE."
)
_GOAL = flags.DEFINE_string("goal", None, "minimize or maximize the score.")
_REPORT = flags.DEFINE_string(
    "report", None, "Write a page (.html) and a table (.csv) about the runs in --workdir."
)


def main() -> None:
    """Runs the sweep of --config, or writes the report of --workdir, or both in this order."""
    workdir = open_path(cli.required(_WORKDIR.value, "workdir"))
    has_config = cli.flag_text("config") is not None
    if not has_config and not _REPORT.value:
        raise UserError("--config is missing: a sweep's config file, or give --report=OUT.html")
    if _REPORT.value:
        from dydilit_jax.sweeps.report import check_output

        check_output(Path(_REPORT.value))
    code = sweep(workdir) if has_config else 0
    if _REPORT.value:
        from dydilit_jax.sweeps.report import write_report

        page, table = write_report(workdir, Path(_REPORT.value), asked_score(None))
        print(f"report: {page}, {table}")
    sys.exit(code)


def sweep(workdir: Path) -> int:
    """Runs all runs of --config; returns the exit status."""
    if _ON.value not in PLACES:
        raise unknown_name("place for --on", _ON.value, PLACES)
    file = load_sweep(*cli.config_source())
    search = file.search
    score = asked_score(file.score) or file.score
    runs = [] if search else file.runs()
    backend = make_backend(workdir, searching=search is not None)
    with held(workdir), stop_signals() as stop:
        if search:
            open_sweep(workdir, file, [], score)
            plan = make_search(workdir, file, score)
            open_sweep(workdir, file, plan.known(), score)
        else:
            open_sweep(workdir, file, runs, score)
            plan = Listed(runs)
        return Sweep(
            workdir,
            plan,
            backend,
            score,
            Table(score, sys.stdout),
            max_parallel=parallel(backend, searching=search is not None),
            max_restarts=0 if backend.queues else _MAX_RESTARTS.value or 0,
        ).run(stop)


def make_search(workdir: Path, file: SweepFile, score: Score) -> Plan:
    """The plan of a search."""
    from dydilit_jax.sweeps.search import Searched

    if not isinstance(workdir, PosixPath):
        raise UserError(
            f"a search keeps its journal in --workdir, which {str(workdir)!r} has no locks for: "
            "use a folder of this machine, or a mounted one"
        )
    assert file.search is not None
    return Searched(workdir, file, file.search, score)


def make_backend(workdir: Path, searching: bool) -> Backend:
    """Where runs run, by the flags."""
    is_local = _ON.value == "local"
    if not is_local and _DEVICES.value:
        raise UserError("--devices is for --on=local: say what a task gets in --launch")
    if is_local and _LAUNCH.value:
        raise UserError("--launch is for --on=slurm and --on=gke, this is --on=local")
    if is_local:
        if not isinstance(workdir, PosixPath):
            raise UserError(f"--on=local needs a --workdir of this machine, not {str(workdir)!r}")
        return LocalProcesses(workdir, train_command(workdir), _DEVICES.value)
    if _ON.value == "gke" and _MAX_PARALLEL.value is not None and not searching:
        raise UserError(
            "--max_parallel is not for --on=gke: how many JobSets run at once is decided by the "
            "node pools' size, or by Kueue (--launch='--queue=...')"
        )
    if isinstance(workdir, PosixPath):
        workdir = workdir.resolve()
    options = shlex.split(_LAUNCH.value)
    if _MAX_RESTARTS.value is not None:
        options.append(f"--max-restarts={_MAX_RESTARTS.value}")
    command = remote_command(str(workdir))
    return Scheduler(_ON.value, workdir, command, options, _MAX_PARALLEL.value)


def parallel(backend: Backend, searching: bool) -> int | None:
    """How many runs may be alive; None for the scheduler's own limit."""
    if backend.queues and not searching:
        return None
    return _MAX_PARALLEL.value or len(_DEVICES.value) or 1


def asked_score(default: Score | None) -> Score | None:
    """The score that --score and --goal ask for; None if neither was given."""
    if _GOAL.value is not None and _GOAL.value not in GOALS:
        raise unknown_name("goal", _GOAL.value, GOALS)
    if _SCORE.value is None and _GOAL.value is None:
        return None
    if _SCORE.value is None and default is None:
        raise UserError("--goal needs --score: the metric that is to be more, or less")
    score = default if _SCORE.value is None else Score(_SCORE.value)
    assert score is not None
    return (
        score
        if _GOAL.value is None
        else dataclasses.replace(score, maximize=_GOAL.value == "maximize")
    )


@contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Keeps a second sweep out of the workdir, where its storage has locks."""
    lock = WorkdirLock(workdir) if isinstance(workdir, PosixPath) else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


if __name__ == "__main__":
    cli.run(main, buckets=True)
