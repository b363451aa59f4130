"""Runs as tasks of Slurm and of GKE, with a stand-in for the launch scripts."""

import io
import json
import re
import shlex
import subprocess
import sys
import threading

import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.sweeps import remote
from dydilit_jax.sweeps.driver import Listed, Sweep
from dydilit_jax.sweeps.local import Ended
from dydilit_jax.sweeps.notation import Score, product, seeds, values
from dydilit_jax.sweeps.observe import State
from dydilit_jax.sweeps.remote import Scheduler, job_prefix, parse_state, remote_command
from dydilit_jax.sweeps.runs import open_path
from dydilit_jax.sweeps.table import Table
from tests.sweep.fakes import finished_run
from tests.sweep.test_notation import sweep_file
from tests.tiny import ROOT

SCORE = Score("loss")


class Cluster:
    """The stand-in's folder, and what it was asked."""

    def __init__(self, folder, workdir):
        self.folder, self.workdir = folder, workdir

    def calls(self, command):
        lines = (self.folder / "calls.jsonl").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[1] == command]

    def set_states(self, *states, number=1):
        job = f"{job_prefix(self.workdir)}-{number}"
        (self.folder / f"{job}.states").write_text("\n".join(states))

    def commands(self, number=1):
        job = f"{job_prefix(self.workdir)}-{number}"
        return [
            shlex.split(line) for line in (self.folder / f"{job}.commands").read_text().splitlines()
        ]


def install(folder, monkeypatch):
    """Launch scripts and scheduler's commands that are the stand-in."""
    (folder / "launch").mkdir()
    (folder / "bin").mkdir()
    fake = ROOT / "tests/sweep/fake_launch.py"
    for place, (script, program) in remote.PLACES.items():
        path = folder / "launch" / script
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {fake} {folder} {place} "$@"\n')
        path.chmod(0o755)
        (folder / "bin" / program).write_text("#!/bin/sh\n")
        (folder / "bin" / program).chmod(0o755)
    monkeypatch.setattr(remote, "ROOT", folder)
    monkeypatch.chdir(folder)  # As if it was the checkout, whose config files have relative paths.
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder, workdir = tmp_path / "cluster", tmp_path / "My Sweep"
    folder.mkdir()
    workdir.mkdir()
    install(folder, monkeypatch)
    return Cluster(folder, workdir)


RUNS = sweep_file(SWEEP=product(values("optimizer.learning_rate", [0.1]), seeds(3))).runs()


def scheduler(cluster, place="slurm", **options):
    backend = Scheduler(place, cluster.workdir, remote_command(str(cluster.workdir)), **options)
    backend.interval = 0.01
    return backend


def make_sweep(cluster, backend, runs=RUNS):
    table = Table(SCORE, io.StringIO())
    return Sweep(cluster.workdir, Listed(runs), backend, SCORE, table, max_parallel=None)


def follow(cluster, backend, *states):
    """Runs a sweep to its end, while the cluster's tasks come to these states."""
    sweep = make_sweep(cluster, backend)
    poll = backend.poll
    script = list(states)

    def next_states():
        if script:
            cluster.set_states(*script.pop(0))
        return poll()

    backend.poll = next_states
    return sweep.run(threading.Event()), sweep.statuses


def test_all_runs_are_one_array_and_its_states_are_theirs(cluster):
    backend = scheduler(cluster, options=["--nodes=2"], max_parallel=2)
    (cluster.workdir / RUNS[0].name).mkdir()
    code, statuses = follow(
        cluster,
        backend,
        ("RUNNING", "PENDING", "PENDING"),
        ("FINISHED", "FAILED(2)", "RUNNING"),
        ("FINISHED", "FAILED(2)", "STOPPED"),
    )
    assert code == 1
    assert [each.state for each in statuses.values()] == [
        State.FINISHED,
        State.FAILED,
        State.STOPPED,
    ]
    assert statuses[RUNS[1].name].error == "ValueError: of task 1"
    (start,) = cluster.calls("start")
    job = f"--job={job_prefix(cluster.workdir)}-1"
    folder = f"--folder={cluster.workdir}/launch"
    assert start[:5] == ["slurm", "start", job, "--nodes=2", folder]
    assert start[6:] == ["--max-parallel=2"]
    assert cluster.commands() == [
        [
            "python", "-m", "dydilit_jax.train", "--config=configs/test.py",
            "--config.optimizer.learning_rate=0.1", f"--config.seed={seed}",
            f"--workdir={cluster.workdir}/learning_rate=0.1-seed={seed}",
        ]
        for seed in range(3)
    ]  # fmt: skip


def test_started_again_it_watches_what_lives_and_submits_what_failed(cluster):
    follow(cluster, scheduler(cluster), ("FINISHED", "FAILED(1)", "FAILED(1)"))
    finished_run(cluster.workdir / RUNS[1].name, RUNS[1].config)  # By hand, meanwhile.
    sweep = make_sweep(cluster, scheduler(cluster))
    stop = threading.Event()
    stop.set()
    sweep.run(stop)
    assert len(cluster.calls("start")) == 1  # Asked to stop, it starts nothing.
    backend = scheduler(cluster)
    poll = backend.poll
    backend.poll = lambda: (cluster.set_states("FINISHED", number=2), poll())[1]
    sweep = make_sweep(cluster, backend)
    assert sweep.run(threading.Event()) == 0
    assert len(cluster.calls("start")) == 2
    assert [line[-1] for line in cluster.commands(2)] == [
        f"--workdir={cluster.workdir}/{RUNS[2].name}"
    ]
    # A third start finds all finished, though the workdirs of two were never seen.
    assert make_sweep(cluster, scheduler(cluster)).run(threading.Event()) == 0
    assert len(cluster.calls("start")) == 2
    assert not cluster.calls("delete")


KILLED = """
import sys
from pathlib import Path
import pytest
from tests.sweep import test_remote as t
cluster = t.Cluster(Path(sys.argv[1]), Path(sys.argv[2]))
t.remote.ROOT = cluster.folder
t.scheduler(cluster).start(t.RUNS)
"""


def test_killed_while_it_submits_a_sweep_submits_nothing_twice(cluster):
    (cluster.folder / "kill_sweep").touch()
    command = [sys.executable, "-c", KILLED, str(cluster.folder), str(cluster.workdir)]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    assert killed.returncode == -9
    code, _ = follow(cluster, scheduler(cluster), ("RUNNING",) * 3, ("FINISHED",) * 3)
    assert code == 0
    assert len(cluster.calls("start")) == 1


def test_a_task_that_vanished_and_a_scheduler_that_does_not_answer(cluster, capsys):
    backend = scheduler(cluster)
    sweep = make_sweep(cluster, backend)
    poll = backend.poll
    looks: list[None] = []

    def look():
        looks.append(None)
        if len(looks) == 1:
            script = cluster.folder / "launch" / "slurm.sh"
            text = script.read_text()
            script.write_text("#!/bin/sh\necho 'error: slurm_load_jobs: timeout' >&2\nexit 1\n")
            found = poll()
            script.write_text(text)
            return found
        cluster.set_states("FINISHED", "FINISHED", "")
        return poll()

    backend.poll = look
    assert sweep.run(threading.Event()) == 1
    lost = sweep.statuses[RUNS[2].name]
    assert lost.state is State.FAILED
    assert len(looks) > remote.MISSING
    assert "slurm_load_jobs: timeout" in capsys.readouterr().err


def test_what_the_launch_script_refuses_is_told_in_its_words(cluster):
    (cluster.folder / "refusal").write_text("error: --account is missing")
    with pytest.raises(UserError, match=r"launch/slurm.sh start .*: --account is missing"):
        scheduler(cluster).start(RUNS)


def test_on_gke_a_jobset_for_each_run(cluster):
    backend = scheduler(cluster, "gke", options=["--project=p"])
    assert backend.adopt(RUNS) == set()
    backend.start(RUNS)
    cluster.set_states("ACTIVE", "FINISHED", "FAILED")
    assert backend.poll() == {
        RUNS[0].name: State.RUNNING,
        RUNS[1].name: Ended(0),
        RUNS[2].name: Ended(1),
    }
    backend.stop(RUNS[0].name)
    (delete,) = cluster.calls("delete")
    assert delete[2:] == [f"--job={job_prefix(cluster.workdir)}-1", "--project=p", "--task=0"]
    assert [backend.poll() for _ in range(remote.MISSING)][-1] == {RUNS[0].name: Ended(None)}


def test_a_bucket_is_named_as_it_is(cluster):
    bucket = open_path("gs://bucket/sweeps/one")
    assert str(bucket) == "gs://bucket/sweeps/one"
    command = remote_command(str(bucket))(RUNS[0])
    assert command[-1] == f"--workdir=gs://bucket/sweeps/one/{RUNS[0].name}"
    assert re.fullmatch(r"one-[0-9a-f]{6}", job_prefix(bucket))


def test_names_and_states_of_schedulers():
    assert re.fullmatch(r"my-sweep-[0-9a-f]{6}", job_prefix(open_path("/a/My Sweep")))
    assert job_prefix(open_path("/a/x")) != job_prefix(open_path("/b/x"))
    assert re.fullmatch(r"sweep-7-[0-9a-f]{6}", job_prefix(open_path("/a/7")))
    assert len(job_prefix(open_path("/a/" + "long" * 30))) < 36
    states = {"PENDING": State.QUEUED, "COMPLETING": State.RUNNING, "FINISHED": Ended(0)}
    states |= {"FAILED(-9)": Ended(-9), "STOPPED": Ended(75), "CANCELLED": Ended(None)}
    assert {text: parse_state(text) for text in states} == states


def test_without_the_schedulers_command_it_says_so(cluster, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="--on=slurm needs sbatch, which is not on PATH"):
        scheduler(cluster)
    with pytest.raises(UserError, match="--on=gke needs kubectl, which is not on PATH"):
        scheduler(cluster, "gke")
