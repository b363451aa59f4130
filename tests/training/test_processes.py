"""Four real processes: stopped by a signal to one, killed, started again; nothing is lost."""

import os
import signal
import time

import pytest

from benchmarks.chaos import without_clock
from dydilit_jax.training.checkpoint import Checkpointer
from dydilit_jax.training.lock import WorkdirLock
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.writers import read_metrics
from tests.tiny import mesh_of, plain_config, state_arrays
from tests.training.process_run import STOPPED, Processes

COUNT = 4
PATIENCE = 300.0  # seconds; of a machine that does much else
CONFIG = plain_config(
    model={"label_dropout": 0.3},
    data={"horizontal_flip": True},
    mesh={"data": -1, "fsdp": 2},
    optimizer={"learning_rate": 1e-2, "clip_norm": 1.0},
    train={
        "steps": 30,
        "checkpoint_every": 4,
        "log_every": 2,
        "sample_every": 15,
        "keep_checkpoints": 2,
    },
)


@pytest.fixture
def start(tmp_path, compiled_programs):
    """Starts four processes in a workdir; all are ended at the end of the test."""
    started: list[Processes] = []

    def start(workdir, count=COUNT):
        log = tmp_path / f"{workdir.name}.{len(started)}"
        folder = compiled_programs / "processes"
        started.append(Processes(count, CONFIG.to_json(), workdir, log, folder))
        return started[-1]

    yield start
    for processes in started:
        processes.end()


def wait_for(workdir, step, processes, seconds=PATIENCE):
    """Waits until a checkpoint of `step` or later is finished."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        steps = [
            int(path.parent.name) for path in (workdir / "checkpoints").glob("*/manifest.json")
        ]
        if max(steps, default=0) >= step:
            return
        if any(process.exitcode is not None for process in processes.processes):
            break
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step}:\n{processes.said()}")


def final(workdir):
    abstract = abstract_state(Network.create(CONFIG), mesh_of(2, 2))
    checkpointer = Checkpointer(workdir)
    state, data = checkpointer.restore(abstract)
    checkpointer.close()
    records = [without_clock(record) for record in read_metrics(workdir)]
    return state_arrays(state), data, records


def test_stopped_killed_and_started_again_four_processes_end_as_if_nothing_had_been(
    tmp_path, start
):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    processes = start(straight)
    assert processes.join(PATIENCE) == [0] * COUNT, processes.said()

    # SIGTERM reaches one of them; all stop at one step, save and say that they are not finished.
    processes = start(broken)
    wait_for(broken, 8, processes)
    os.kill(processes.processes[2].pid, signal.SIGTERM)
    assert processes.join(PATIENCE) == [STOPPED] * COUNT, processes.said()
    stopped = {line for line in processes.said().splitlines() if "stopped at step" in line}
    assert len(stopped) == COUNT
    assert len({line.partition("] ")[2] for line in stopped}) == 1
    step = Checkpointer(broken).latest_step() or 0
    assert all(f"stopped at step {step} of 30" in line for line in stopped)
    assert 8 < step < 30

    # SIGKILL ends another; the rest end, or are ended, and nothing finished is lost.
    processes = start(broken)
    wait_for(broken, step + 4, processes)
    processes.processes[1].kill()
    codes = processes.join(5)
    assert codes[1] == -signal.SIGKILL
    assert 0 not in codes
    processes.end()
    saved = Checkpointer(broken).latest_step() or 0
    assert step < saved < 30

    processes = start(broken)
    assert processes.join(PATIENCE) == [0] * COUNT, processes.said()
    assert f"resumed from {broken} at step {saved}" in processes.said()
    one, other = final(straight), final(broken)
    assert one[0].keys() == other[0].keys()
    for name, value in one[0].items():
        assert value.tobytes() == other[0][name].tobytes(), name
    assert one[1] == other[1]
    for path in (straight / "samples").iterdir():
        assert path.read_bytes() == (broken / "samples" / path.name).read_bytes()
    # The stopped run also logged the step it stopped at.
    assert one[2] == [record for record in other[2] if record["step"] % 2 == 0]


def test_a_second_run_is_refused_on_all_its_processes(tmp_path, start):
    workdir = tmp_path / "run"
    lock = WorkdirLock(workdir)
    processes = start(workdir, 2)
    assert processes.join(PATIENCE) == [2, 2], processes.said()
    lock.release()
    lines = [line for line in processes.said().splitlines() if "error: " in line]
    assert len(lines) == 2
    for line in lines:
        assert f"workdir '{workdir}' is in use by a run on " in line
        assert f"(process {os.getpid()})" in line
    assert [path.name for path in workdir.iterdir()] == ["run.lock"]
