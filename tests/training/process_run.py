"""A run of several real processes on this machine, forked from a server that has the imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

STOPPED = 75  # exit status of a process whose run is not finished
PRELOADED = ["sklearn.datasets", "clu.metric_writers", "dydilit_jax.training.loop"]


def connect(address: str, index: int, count: int) -> None:
    """Joins the processes of the run."""
    import jax

    jax.distributed.initialize(address, count, index)


def run_process(
    index: int,
    count: int,
    address: str,
    config: str,
    workdir: str,
    log: str,
    compiled: str,
    before: Callable[[int], None] | None,
) -> None:
    """In the child: process `index` of `count`, with one device, trains."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    )
    import jax

    jax.config.update("jax_compilation_cache_dir", compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from dydilit_jax.config import Config
    from dydilit_jax.errors import UserError
    from dydilit_jax.training.loop import train

    connect(address, index, count)
    if before is not None:
        before(index)
    try:
        outcome = train(Config.from_json(config), Path(workdir))
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
    jax.distributed.shutdown()  # As at an interpreter's exit: no process leaves before the others.
    sys.exit(0 if outcome.finished else STOPPED)


class Processes:
    """The processes of one run, which are started together.

    Args:
      count: how many.
      config: the run's, as JSON.
      workdir: the run's, shared.
      log: a file for what each of them says; its number is appended.
      compiled: folder of compiled programs.
      before: called in each of them, with its number, before it trains.
    """

    def __init__(
        self,
        count: int,
        config: str,
        workdir: Path,
        log: Path,
        compiled: Path,
        before: Callable[[int], None] | None = None,
    ):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.logs = [log.with_name(f"{log.name}.{index}") for index in range(count)]
        self.processes = [
            context.Process(
                target=run_process,
                args=(
                    index,
                    count,
                    address,
                    config,
                    str(workdir),
                    str(self.logs[index]),
                    str(compiled),
                    before,
                ),
            )
            for index in range(count)
        ]
        for process in self.processes:
            process.start()

    def join(self, seconds: float) -> list[int | None]:
        """Exit codes, None where a process has not ended in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Ends those that are left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def said(self) -> str:
        """What all of them said, with their numbers."""
        return "\n".join(
            f"[{i}] {line}"
            for i, log in enumerate(self.logs)
            for line in (log.read_text().splitlines() if log.exists() else [])
        )
