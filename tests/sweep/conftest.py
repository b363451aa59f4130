"""A sweep of fake runs, in this process."""

import io
import sys
import threading

import pytest

from dydilit_jax.sweeps.driver import Listed, Sweep
from dydilit_jax.sweeps.local import LocalProcesses
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.runs import Run
from dydilit_jax.sweeps.table import Table
from tests.sweep.fakes import FAKE
from tests.tiny import plain_config


@pytest.fixture
def sweep_of(tmp_path):
    """Makes a sweep of runs by name and the fake's arguments; (exit status, sweep, output)."""

    def make(options, *, max_parallel=1, max_restarts=0, devices=(), stop=None, steps=4):
        config = plain_config(train={"steps": steps})
        runs = [
            Run(name=name, config=config, overrides={}, tags=(), arguments=tuple(arguments))
            for name, arguments in options.items()
        ]

        def command(run):
            return [sys.executable, "-S", str(FAKE), str(tmp_path / run.name), *run.arguments]

        backend = LocalProcesses(tmp_path, command, devices)
        backend.interval = 0.05
        output = io.StringIO()
        sweep = Sweep(
            tmp_path,
            Listed(runs),
            backend,
            Score("quality", maximize=True),
            Table(Score("quality", maximize=True), output),
            max_parallel=max_parallel,
            max_restarts=max_restarts,
        )
        code = sweep.run(stop or threading.Event())
        return code, sweep.statuses, output.getvalue()

    return make
