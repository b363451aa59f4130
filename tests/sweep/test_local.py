"""Runs as processes: started, resumed, told apart, and neither lost nor doubled by a kill."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from dydilit_jax.sweeps.observe import State
from tests.sweep.fakes import starts, wait_for
from tests.tiny import ROOT


def test_runs_finish_broken_ones_resume_and_finished_ones_are_skipped(sweep_of, tmp_path):
    options = {
        "good": ["--rate=2"],
        "crashing": ["--crash=3"],
        "mistaken": ["--mistake"],
    }
    code, statuses, output = sweep_of(options, max_parallel=2)
    assert code == 1
    assert {name: each.state for name, each in statuses.items()} == {
        "good": State.FINISHED,
        "crashing": State.FAILED,
        "mistaken": State.FAILED,
    }
    good = statuses["good"]
    assert (good.step, good.loss) == (4, 0.5)
    assert good.score == pytest.approx(0.6065306597)
    assert statuses["crashing"].error == "MemoryError: no room for step 3"
    assert statuses["mistaken"].error.startswith("error: model.width 7 is not divisible")
    assert "crashing: failed at step 2/4: MemoryError: no room for step 3" in output
    assert "3 runs: 2 failed, 1 finished" in output
    states = json.loads((tmp_path / "states.json").read_text())
    assert states["crashing"] == {"state": "failed", "error": "MemoryError: no room for step 3"}

    options["mistaken"] = []
    code, statuses, _ = sweep_of(options)
    assert code == 0
    assert {each.state for each in statuses.values()} == {State.FINISHED}
    assert starts(tmp_path / "good") == [0]
    assert len(starts(tmp_path / "crashing")) == 2


def test_a_crash_is_tried_again_a_mistake_is_not(sweep_of, tmp_path):
    options = {"once": ["--crash=2"], "always": ["--crash=2", "--always"], "bad": ["--mistake"]}
    code, statuses, output = sweep_of(options, max_parallel=3, max_restarts=2)
    assert code == 1
    assert statuses["once"].state is State.FINISHED
    assert statuses["once"].restarts == 1
    assert statuses["always"].state is State.FAILED
    assert len(starts(tmp_path / "once")) == 2
    assert len(starts(tmp_path / "always")) == 3
    assert statuses["bad"].restarts == 0
    assert "always  failed (2 restarts)" in output


def test_each_living_run_has_a_device_of_its_own(sweep_of, tmp_path):
    options = {name: ["--seconds=0.2", "--steps=1"] for name in "abcd"}
    assert sweep_of(options, max_parallel=2, devices=("5", "7"), steps=1)[0] == 0
    given = [(tmp_path / name / "starts.txt").read_text().split()[1] for name in "abcd"]
    assert sorted(given) == ["5", "5", "7", "7"]
    assert given[0] != given[1]


def test_a_sweep_that_is_asked_to_stop_lets_its_runs_save(sweep_of, tmp_path):
    stop = threading.Event()
    path = tmp_path / "long" / "metrics.jsonl"

    def ask():
        wait_for(lambda: path.exists() and path.stat().st_size)
        stop.set()

    asking = threading.Thread(target=ask)
    asking.start()
    options = {"long": ["--seconds=0.05", "--steps=1000"], "next": []}
    code, statuses, _ = sweep_of(options, stop=stop, steps=1000)
    asking.join()
    assert code == 1
    assert statuses["long"].state is State.STOPPED
    assert statuses["next"].state is State.WAITING
    assert (tmp_path / "long" / "checkpoints").is_dir()  # It was let save.
    assert not (tmp_path / "next").exists()


def test_a_killed_sweep_leaves_nothing_double_and_nothing_lost(tmp_path):
    command = [sys.executable, "-m", "tests.sweep.killed_sweep", str(tmp_path)]
    pids = [tmp_path / name / "launch.lock" for name in "ab"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as first:
        # The moment in which runs have been started and have not yet taken their own locks.
        wait_for(lambda: all(path.exists() and path.read_text() for path in pids))
        first.send_signal(signal.SIGKILL)
    for path in pids:
        os.kill(int(path.read_text().split()[0]), 0)  # They live on.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 runs: 4 finished" in again.stdout
    for name in "abcd":
        assert starts(tmp_path / name) == [0], name
        assert not (tmp_path / name / "doubles.txt").exists()
