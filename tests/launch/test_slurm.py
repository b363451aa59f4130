"""launch/slurm.sh on a real Slurm: a controller and two hosts on this machine.

`make test-launch` installs Slurm and runs these; `make test` leaves them out. Each start of a
training run imports its libraries anew, on both hosts; that is most of the time here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.launch import slurm_cluster
from tests.launch.slurm_cluster import HOSTS, SlurmCluster, wait_for
from tests.tiny import ROOT

pytestmark = pytest.mark.skipif(
    bool(slurm_cluster.missing_programs()) or os.geteuid() != 0,
    reason="needs Slurm and root: make test-launch",
)

LAUNCH = ROOT / "launch" / "slurm.sh"
STEPS = 60
TRAIN = [
    *("python", "-m", "dydilit_jax.train", "--config=configs/digits.py:attention=relu"),
    *("--config.model.depth=1", "--config.model.width=16", "--config.model.attention.heads=2"),
    *("--config.data.batch_size=16", f"--config.train.steps={STEPS}"),
    *("--config.train.checkpoint_every=10", "--config.train.log_every=1"),
    *("--config.train.sample_every=0", "--config.evaluation.num=0"),
]


@dataclasses.dataclass
class Launcher:
    """launch/slurm.sh on the test's cluster, with a shared folder."""

    cluster: SlurmCluster
    shared: Path

    def __call__(self, *arguments: object, expect: int = 0) -> str:
        environment = self.cluster.environment | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.shared / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        done = subprocess.run(
            [str(LAUNCH), *map(str, arguments)], env=environment, capture_output=True, text=True
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
