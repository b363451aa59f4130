"""A sweep of four fake runs, two at a time: python -m tests.sweep.killed_sweep WORKDIR."""

import sys
import threading
from pathlib import Path

from dydilit_jax.sweeps.driver import Listed, Sweep
from dydilit_jax.sweeps.local import LocalProcesses
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.runs import Run
from dydilit_jax.sweeps.table import Table
from dydilit_jax.training.lock import WorkdirLock
from tests.sweep.fakes import fake_command
from tests.tiny import plain_config

STEPS = 10
BOOT = 3.0  # seconds in which the first two runs have not taken their own locks yet


def main(workdir: Path) -> int:
    config = plain_config(train={"steps": STEPS})
    arguments = (f"--steps={STEPS}", "--seconds=0.05")
    boots = {"a": BOOT, "b": BOOT, "c": 0.0, "d": 0.0}
    runs = [
        Run(
            name=name,
            config=config,
            overrides={},
            tags=(),
            arguments=(*arguments, f"--boot={boot}"),
        )
        for name, boot in boots.items()
    ]
    backend = LocalProcesses(workdir, fake_command(workdir))
    backend.interval = 0.1
    lock = WorkdirLock(workdir)
    score = Score("loss")
    sweep = Sweep(workdir, Listed(runs), backend, score, Table(score, sys.stdout), max_parallel=2)
    code = sweep.run(threading.Event())
    lock.release()
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
