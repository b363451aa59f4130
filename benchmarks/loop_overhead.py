"""How much of a training step is the loop's own time, and where it goes.

    python -m benchmarks.loop_overhead

One real run of the digits config. After every block of steps it pauses, and the compiled step alone
is timed over as many steps, on the same shapes, with a batch that stays on the device. The loop's
own time is the difference of the medians of the two: reading the data, placing it, dispatching,
reading metrics, logging, saving. Checkpoints and log lines come more often than in the config.
Exit status 1 if it is 5% of the step or more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import digits
from dydilit_jax.config import Config
from dydilit_jax.training import loop
from dydilit_jax.training.step import TrainStep

LIMIT = 0.05


class Clock:
    """Seconds that the host spent in each part of the loop."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.running = False

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed under `name` while the clock runs."""

        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if self.running:
                self.seconds[name] += time.perf_counter() - started
            return result

        return call


class Alternating:
    """A compiled step that, every `block` calls, times itself alone.

    Args:
      step: (state, batch) -> (state, metrics), which takes over the state's memory.
      block: calls between two measurements, and steps of each.
      clock: runs within the loop's blocks only, from the second on.
    """

    def __init__(self, step: TrainStep, block: int, clock: Clock):
        self.step, self.block, self.clock = step, block, clock
        self.calls = 0
        self.resumed = 0.0
        self.alone: list[float] = []
        self.in_loop: list[float] = []

    def __call__(self, state: Any, batch: Any) -> Any:
        """One step of the loop; before every block of them, the measurement."""
        if self.calls % self.block == 0:
            jax.block_until_ready(state)
            self.clock.running = False
            if self.calls > self.block:  # The first block has the compilation in it.
                self.in_loop.append((time.perf_counter() - self.resumed) / self.block)
            seconds = self._alone(state, batch)
            if self.calls:
                self.alone.append(seconds)
                self.clock.running = True
            self.resumed = time.perf_counter()
        self.calls += 1
        return self.clock.timed("dispatch", self.step)(state, batch)

    def _alone(self, state: Any, batch: Any) -> float:
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        started = time.perf_counter()
        for _ in range(self.block):
            state, metrics = self.step(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - started) / self.block


def measure(config: Config, block: int, workdir: Path) -> tuple[Alternating, dict[str, float]]:
    """Runs it; the times by block, and host seconds by part."""
    clock = Clock()
    alternating: list[Alternating] = []
    compile_step, prefetch = loop.compile_step, loop.DevicePrefetch

    def compiled(*args: Any) -> TrainStep:
        alternating.append(Alternating(compile_step(*args), block, clock))
        return alternating[0]

    timed = {
        (prefetch, "__next__"): clock.timed("wait for data", prefetch.__next__),
        (prefetch, "get_state"): clock.timed("position of the data", prefetch.get_state),
        (loop, "compile_step"): compiled,
        (loop.Run, "review"): clock.timed("metrics", loop.Run.review),
        (loop.Run, "save"): clock.timed("save", loop.Run.save),
        (loop.jax, "device_get"): clock.timed("metrics: wait for the step", jax.device_get),
    }
    before = {key: getattr(*key) for key in timed}
    for (owner, name), function in timed.items():
        setattr(owner, name, function)
    try:
        loop.train(config, workdir)
    finally:
        for (owner, name), function in before.items():
            setattr(owner, name, function)
    return alternating[0], dict(clock.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--block", type=int, default=25)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loop_overhead.json"))
    given = parser.parse_args()
    config = Config.from_dict(digits.get_config())
    steps = given.block * (given.blocks + 2) + 1
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            config.train,
            steps=steps,
            log_every=given.block,
            checkpoint_every=4 * given.block,
            sample_every=0,
        ),
        evaluation=dataclasses.replace(config.evaluation, num=0),
    )
    with tempfile.TemporaryDirectory() as folder:
        result, seconds = measure(config, given.block, Path(folder))
    alone, in_loop = statistics.median(result.alone), statistics.median(result.in_loop)
    mean_alone, mean_loop = statistics.mean(result.alone), statistics.mean(result.in_loop)
    counted = given.block * len(result.in_loop)
    share = in_loop / alone - 1
    print(f"\nthe step alone    {alone * 1e3:9.2f} ms (mean {mean_alone * 1e3:.2f})")
    print(f"in the loop       {in_loop * 1e3:9.2f} ms (mean {mean_loop * 1e3:.2f})")
    print(f"the loop's own    {(in_loop - alone) * 1e3:9.2f} ms, {share:.1%} of the step")
    print("\nhost time by part, a step; it overlaps with the devices' work")
    waited = seconds.get("metrics: wait for the step", 0.0)
    seconds["metrics: judge and log"] = seconds.pop("metrics", 0.0) - waited
    for name, total in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:28s}{total / counted * 1e3:9.3f} ms")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "config": f"configs/digits.py, a log line every {given.block} steps, a checkpoint every "
        f"{4 * given.block}",
        "step_alone_ms": [round(s * 1e3, 3) for s in result.alone],
        "step_in_loop_ms": [round(s * 1e3, 3) for s in result.in_loop],
        "own_share_of_medians": round(share, 4),
        "host_ms_a_step": {k: round(v / counted * 1e3, 4) for k, v in seconds.items()},
    }
    given.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if share < LIMIT else 1)


if __name__ == "__main__":
    main()
