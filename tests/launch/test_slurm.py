"""launch/slurm.sh on a real Slurm: a controller and two hosts on this machine.

`make test-launch` installs Slurm and runs these; `make test` leaves them out. Each start of a
training run imports its libraries anew, on both hosts; that is most of the time here.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dydilit_jax.sweeps.remote import job_prefix
from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import HOSTS, SlurmCluster, wait_for
from tests.tiny import ROOT

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing_programs()) or os.geteuid() != 0,
    reason="needs Slurm and root: make test-launch",
)

LAUNCH = ROOT / "launch" / "slurm.sh"
STEPS = 60
TINY = [
    *("--config.model.depth=1", "--config.model.width=16", "--config.model.attention.heads=2"),
    *("--config.data.batch_size=16", "--config.train.checkpoint_every=10"),
    *("--config.train.log_every=1", "--config.train.sample_every=0", "--config.evaluation.num=0"),
]
TRAIN = [
    *("python", "-m", "dydilit_jax.train", "--config=configs/digits.py:attention=relu"),
    *(*TINY, f"--config.train.steps={STEPS}"),
]
# What `python -m dydilit_jax.sweep` runs, but for the 15 s between two looks.
SWEEP = """
from dydilit_jax import cli, sweep
from dydilit_jax.sweeps.remote import Scheduler
Scheduler.interval = 0.5
cli.run(sweep.main)
"""
LONG = 200
SWEEP_FILE = f"""
from dydilit_jax.sweeps.notation import chain, fixed, minimize
from dydilit_jax.sweeps.runs import load_module

SCORE = minimize("loss")
SWEEP = chain(
    fixed({{"train.steps": 10}}, name="short"),
    fixed({{"train.steps": {LONG}}}, name="long"),
)

def get_config(argument=""):
    return load_module("{ROOT}/configs/digits.py").get_config("attention=relu")
"""
ONE_MORE = 'SWEEP = chain(SWEEP, fixed({"train.steps": 10, "seed": 1}, name="more"))\n'


@dataclasses.dataclass
class Launcher:
    """launch/slurm.sh on the test's cluster, with a shared folder."""

    cluster: SlurmCluster
    shared: Path

    @property
    def environment(self) -> dict[str, str]:
        """The cluster's, in which runs compile little and once."""
        return self.cluster.environment | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }

    def __call__(self, *arguments: object, expect: int = 0) -> str:
        done = subprocess.run(
            [str(LAUNCH), *map(str, arguments)],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == expect, done.stderr
        return done.stderr if expect else done.stdout

    def start(self, name: str, *options: str, program: list[str] | None = None) -> str:
        """Starts a job; its number."""
        behind = ["--", *program] if program else []
        base = [f"--job={name}", "--code=here", f"--venv={sys.prefix}"]
        if not any(each.startswith("--cpus-per-task") for each in options):
            base.append("--cpus-per-task=1")
        return self("start", *base, *options, *behind).strip()

    def states(self, name: str, folder: Path) -> dict[str, tuple[str, int]]:
        """State and restarts by number of a job or task."""
        lines = self("status", f"--job={name}", f"--folder={folder}").splitlines()
        rows = [line.split("\t") for line in lines]
        return {row[0]: (row[1], int(row[2] or 0)) for row in rows}

    def wait(self, name: str, folder: Path, job: str, state: str, seconds: float = 90) -> None:
        """Until a job has a state."""
        try:
            wait_for(
                lambda: self.states(name, folder).get(job, ("",))[0] == state,
                seconds,
                f"{state} of job {job}",
            )
        except TimeoutError:
            print(self.states(name, folder), *map(Path.read_text, (folder / "logs").iterdir()))
            raise


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "shared").mkdir()
    with SlurmCluster(folder / "cluster") as cluster:
        yield Launcher(cluster, folder / "shared")


def checkpointed(workdir: Path) -> int:
    """The newest finished checkpoint's step, 0 without one."""
    found = (workdir / "checkpoints").glob("*/manifest.json")
    return max((int(each.parent.name) for each in found), default=0)


def logged(workdir: Path) -> list[tuple[int, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, read without the trainer."""
    import jax
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    found: dict[str, np.ndarray] = {}
    for part in ("state", "ema"):
        path = workdir / "checkpoints" / str(step) / part
        # The devices that saved it are not here.
        plain = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
        )
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=plain))
        found |= {f"{part}/{k}": v for k, v in ocp.tree.to_flat_dict(tree, sep="/").items()}
    return found


def test_a_run_that_is_stopped_and_killed_ends_like_one_that_was_not(launcher):
    """Told to save by a signal; then a host dies; each time it is queued again by itself."""
    alone, broken = launcher.shared / "alone", launcher.shared / "broken it's $HOME"
    job = launcher.start("alone", "--nodes=2", program=[*TRAIN, f"--workdir={alone}"])
    launcher.wait("alone", alone / "launch", job, "FINISHED")

    job = launcher.start("broken", "--nodes=2", program=[*TRAIN, f"--workdir={broken}"])
    wait_for(lambda: checkpointed(broken) >= 10, 60, "a checkpoint")
    launcher.cluster.run("scancel", "--signal=TERM", job)
    wait_for(lambda: launcher.states("broken", broken / "launch")[job][1] == 1, 60, "a requeue")
    saved = checkpointed(broken)
    assert 10 <= saved < STEPS
    wait_for(lambda: checkpointed(broken) >= saved + 10, 60, "another checkpoint")
    launcher.cluster.kill_host(HOSTS[1])
    killed_at = checkpointed(broken)
    assert killed_at < STEPS
    wait_for(lambda: launcher.states("broken", broken / "launch")[job][1] == 2, 60, "a requeue")
    launcher.cluster.start_host(HOSTS[1])
    launcher.wait("broken", broken / "launch", job, "FINISHED")

    said = launcher("logs", "--job=broken", f"--workdir={broken}")
    assert f"stopped at step {saved} of {STEPS}" in said
    assert "stopped before the end; queued again" in said
    assert said.count("0: resumed from") == 2
    assert logged(broken) == logged(alone)
    assert [step for step, _ in logged(broken)] == list(range(1, STEPS + 1))
    expected, found = arrays(alone, STEPS), arrays(broken, STEPS)
    assert expected.keys() == found.keys()
    assert len(expected) > 20
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_an_array_runs_every_line_as_it_stands_there(launcher, tmp_path):
    folder = launcher.shared / "array, it's $1"
    words = ["a b", "it's", '"', "$HOME", "$(touch x)", "`id`", "*", "\\", "", "-n", "ü;&|<>#"]
    write = "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]))"
    lines = [
        ["python", "-c", write, f"{launcher.shared}/out {k}", str(k), *words] for k in range(3)
    ]
    lines.append(["bash", "-c", "exit 2"])
    file = tmp_path / "commands"
    file.write_text("".join(shlex.join(line) + "\n" for line in lines))
    job = launcher.start(
        "array", f"--array={file}", f"--folder={folder}", "--max-parallel=2", "--nodes=1"
    )
    file.unlink()  # The job has its own copy.
    for k in range(3):
        launcher.wait("array", folder, f"{job}_{k}", "FINISHED")
        assert (folder / "exit" / f"{job}_{k}").read_text() == "0\n"
        assert (launcher.shared / f"out {k}").read_text() == repr([str(k), *words])
    # A mistake is not tried again.
    launcher.wait("array", folder, f"{job}_3", "FAILED(2)")
    assert "start 2" not in launcher("logs", "--job=array", f"--folder={folder}", "--task=3")


def test_a_crash_is_tried_again_so_many_times(launcher):
    folder = launcher.shared / "crash"
    count = folder / "count"
    program = ["bash", "-c", 'echo x >>"$0"; exit 3', str(count)]
    job = launcher.start("crash", f"--folder={folder}", "--max-restarts=1", program=program)
    launcher.wait("crash", folder, job, "FAILED(3)")
    assert count.read_text() == "x\nx\n"


def test_delete_lets_a_run_save_and_does_not_queue_it_again(launcher):
    folder = launcher.shared / "deleted"
    saves = "trap 'sleep 1; echo saved; exit 75' TERM; echo running; while :; do sleep 0.1; done"
    job = launcher.start(
        "deleted", f"--folder={folder}", "--nodes=2", program=["bash", "-c", saves]
    )
    log = folder / "logs" / f"{job}.out"
    wait_for(lambda: log.is_file() and "1: running" in log.read_text(), 30, "running")
    launcher("delete", "--job=deleted")
    launcher.wait("deleted", folder, job, "STOPPED")
    assert log.read_text().count(": saved") == 2
    assert "it is not to be queued again" in log.read_text()
    time.sleep(2)
    assert launcher.states("deleted", folder) == {job: ("STOPPED", 0)}
    assert "no job of yours named deleted" in launcher("delete", "--job=deleted", expect=2)


def test_a_folder_that_only_one_host_sees_is_named(launcher):
    """The second host's file system has another folder at that place."""
    folder, workdir = launcher.shared / "blind", launcher.cluster.hidden / "run"
    job = launcher.start(
        "blind", f"--folder={folder}", "--nodes=2", program=["true", f"--workdir={workdir}"]
    )
    launcher.wait("blind", folder, job, "FAILED(2)")
    said = launcher("logs", "--job=blind", f"--folder={folder}")
    expected = f"error: {workdir} is not visible on {HOSTS[1]}: use storage that all hosts share"
    assert expected in said.splitlines()


class Screen:
    """A terminal, and what a program has drawn on it."""

    def __init__(self) -> None:
        self._terminal, self.end = os.openpty()
        os.set_blocking(self._terminal, False)
        self._drawn = b""

    def frames(self) -> list[str]:
        """The tables so far, each drawn over the one before."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._terminal, 65536):
                self._drawn += part
        return re.split(r"\x1b\[\d+F\x1b\[J", self._drawn.decode())

    def close(self) -> None:
        os.close(self._terminal)
        os.close(self.end)


def test_a_sweep_outlives_its_driver_and_a_preemption(launcher):
    """Its driver is killed, a run preempted; a new driver adopts it and starts only what is new."""
    file, workdir = launcher.shared / "file.py", launcher.shared / "sweep"
    page, folder, long = launcher.shared / "sweep.html", workdir / "launch", workdir / "long"
    job = f"{job_prefix(workdir)}-1"
    file.write_text(SWEEP_FILE)
    command = [
        *(sys.executable, "-c", SWEEP, f"--config={file}", f"--workdir={workdir}", "--on=slurm"),
        *("--max_parallel=2", f"--report={page}", *TINY),
        f"--launch=--nodes=1 --cpus-per-task=1 --code=here --venv={sys.prefix}",
    ]
    how = {"cwd": ROOT, "env": launcher.environment, "text": True}
    screen = Screen()
    first = subprocess.Popen(command, **how, stdout=screen.end)
    try:
        running = re.compile(rf"^long +running +[1-9]\d*/{LONG} ", re.MULTILINE)
        wait_for(lambda: bool(running.search(screen.frames()[-1])), 90, "a table with a step")
        wait_for(lambda: bool(screen.frames()) and checkpointed(long) >= 10, 60, "a checkpoint")
        first.kill()  # kill -9: it cannot tell anyone.
        first.wait()
        (number,) = {each.split("_")[0] for each in launcher.states(job, folder)}
        # A job of a higher tier takes both hosts: what runs there is told to go, and queued again.
        urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
        launcher.cluster.run("sbatch", *urgent, "--wrap=sleep 1")
        wait_for(lambda: launcher.states(job, folder)[f"{number}_1"][1] == 1, 60, "a requeue")
    finally:
        first.kill()
        first.wait()
        screen.close()
    saved = checkpointed(long)
    assert 10 <= saved < LONG
    launcher.wait(job, folder, f"{number}_0", "FINISHED")
    before = (workdir / "short" / "metrics.jsonl").stat().st_mtime_ns

    file.write_text(SWEEP_FILE + ONE_MORE)
    second = subprocess.run(command, **how, capture_output=True)
    assert second.returncode == 0, second.stdout + second.stderr
    told = second.stdout.splitlines()
    assert any(re.fullmatch(r"long: (queued|running)( at step .*)?", line) for line in told)
    assert "short: finished at step 10/10" in told
    assert "3 runs: 3 finished" in told
    record = json.loads((folder / "submissions.json").read_text())
    assert [each["runs"] for each in record["submissions"]] == [["short", "long"], ["more"]]
    assert (workdir / "short" / "metrics.jsonl").stat().st_mtime_ns == before
    said = launcher("logs", f"--job={job}", f"--folder={folder}", "--task=1")
    assert f"stopped at step {saved} of {LONG}" in said
    assert said.count(f"resumed from {long} at step {saved}\n") == 1
    assert [step for step, _ in logged(long)] == list(range(1, LONG + 1))

    assert "<html" in page.read_text()
    rows = {row["run"]: row for row in csv.DictReader(page.with_suffix(".csv").open())}
    assert {name: (row["state"], row["step"]) for name, row in rows.items()} == {
        "short": ("finished", "10"),
        "long": ("finished", str(LONG)),
        "more": ("finished", "10"),
    }
    assert float(rows["long"]["loss"]) == logged(long)[-1][1]
