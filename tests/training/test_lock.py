"""Two runs in one workdir: the second is refused while the first lives."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.training import lock as lock_module
from dydilit_jax.training.lock import LOCK_FILE, WorkdirLock
from dydilit_jax.training.loop import train
from tests.tiny import ROOT, plain_config

HOLDER = """
import sys, time
from pathlib import Path
from dydilit_jax.training.lock import WorkdirLock
lock = WorkdirLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the workdir."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_a_killed_one_lets_go(tmp_path, holder):
    config = plain_config(train={"steps": 1})
    with pytest.raises(UserError) as error:
        train(config, tmp_path)
    line = str(error.value)
    assert "\n" not in line
    assert f"workdir '{tmp_path}' is in use by a run on " in line
    assert f"(process {holder.pid})" in line
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "checkpoints").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    WorkdirLock(tmp_path).release()
    assert time.monotonic() - started < 2


def test_in_one_process_too(tmp_path):
    first = WorkdirLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        WorkdirLock(tmp_path)
    first.release()
    WorkdirLock(tmp_path).release()


def other_machine(path, beat, token="theirs"):
    """What a run on another machine, whose kernel's lock does not reach here, writes."""
    record = {"host": "far", "pid": 7, "boot": "another", "token": token, "beat": beat}
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(json.dumps(record).encode().ljust(512))


def test_a_run_on_another_machine_that_lives_is_seen_by_its_signs(tmp_path, monkeypatch, capsys):
    path = tmp_path / LOCK_FILE
    other_machine(path, beat=1)
    beats = iter(range(2, 99))
    real = time.sleep

    def sleep(seconds):
        real(min(seconds, 0.01))
        other_machine(path, beat=next(beats))

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    with pytest.raises(UserError, match=r"in use by a run on far \(process 7\)"):
        WorkdirLock(tmp_path, heartbeat=0.2)
    assert "waiting up to 0.8 s for a sign of life" in capsys.readouterr().err


def test_a_dead_run_on_another_machine_is_followed(tmp_path):
    other_machine(tmp_path / LOCK_FILE, beat=5)
    started = time.monotonic()
    lock = WorkdirLock(tmp_path, heartbeat=0.05)
    assert time.monotonic() - started >= 0.2
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_run_gives_signs_of_life_and_sees_when_it_is_taken_over(tmp_path):
    lock = WorkdirLock(tmp_path, heartbeat=0.02)
    path = tmp_path / LOCK_FILE
    first = json.loads(path.read_text())["beat"]
    deadline = time.monotonic() + 5
    while json.loads(path.read_text())["beat"] == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads(path.read_text())["beat"] > first
    lock.check()
    other_machine(path, beat=1)
    while lock._taken_by is None and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match=r"taken over by a run on far \(process 7\)"):
        lock.check()
    lock.release()
    assert "theirs" in path.read_text()


def test_without_the_kernels_lock_the_signs_decide(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(lock_module.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    first = WorkdirLock(tmp_path, heartbeat=0.05)
    with pytest.raises(UserError, match="in use by"):
        WorkdirLock(tmp_path, heartbeat=0.05)
    first.release()
    WorkdirLock(tmp_path, heartbeat=0.05).release()
