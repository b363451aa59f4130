"""How fast a run is, where its time goes, and how much of it was of use.

    model FLOP/s utilisation = 6 (multiply-adds of an image) (images a second) / peak FLOP/s
    goodput                  = seconds of steps that the run still has / seconds since it began

A training step is two FLOPs a multiply-add forward and four backward (PaLM, arXiv 2204.02311,
appendix B): only what the model asks for counts, not what rematerialisation computes again or a
dense form of the routed projection computes besides.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from dydilit_jax.training.chips import peak_flops

FLOPS_PER_MULTIPLY_ADD = 6
GOODPUT_FILE = "goodput.json"
PROFILES = "profiles"


def memory_in_use(devices: Sequence[Any] | None = None) -> dict[str, float]:
    """GiB in use on the fullest of this process's devices, now and at most; {} where unknown."""
    stats = [device.memory_stats() or {} for device in devices or jax.local_devices()]
    names = {"bytes_in_use": "memory/in_use_gib", "peak_bytes_in_use": "memory/peak_gib"}
    return {
        ours: max(each[theirs] for each in stats) / 2**30
        for theirs, ours in names.items()
        if all(theirs in each for each in stats)
    }


class Clock:
    """Adds up wall time by what it was spent on.

    `data` is waiting for a batch and placing it, `dispatch` handing the step over, `device` waiting
    for its results, `checkpoint` and `samples` their own; the rest is `other`.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._spent: dict[str, float] = {}
        self._since = now()

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Counts what happens inside as time spent on `part`; not to be nested."""
        start = self._now()
        try:
            yield
        finally:
            self._spent[part] = self._spent.get(part, 0.0) + self._now() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last reading, and the seconds of each part; starts again from zero."""
        now = self._now()
        total, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return total, {**spent, "other": max(total - sum(spent.values()), 0.0)}


class Goodput:
    """Useful time over wall time, across restarts; kept in workdir/goodput.json.

    Time is useful when it was spent on steps that the run still has: what lies beyond the
    checkpoint that a restart goes on from was of no use, nor was starting, compiling, waiting for
    data, saving, drawing samples, or standing still between two starts.

    Args:
      workdir: the run's directory.
      step: the step that the run goes on from.
      writes: whether this process writes the file.
      now: seconds since 1970.
    """

    KEPT = 1000  # readings in the file, for a restart to go back to

    def __init__(
        self, workdir: Path, step: int, *, writes: bool, now: Callable[[], float] = time.time
    ):
        self._path, self._writes, self._now = workdir / GOODPUT_FILE, writes, now
        self._began, self._readings = self._load(step)

    def _load(self, step: int) -> tuple[float, list[tuple[int, float]]]:
        try:
            saved = json.loads(self._path.read_text())
            readings = [(int(s), float(useful)) for s, useful in saved["useful_seconds"]]
            began = float(saved["began"])
        except (OSError, ValueError, KeyError, TypeError):
            return self._now(), [(step, 0.0)]
        kept = [reading for reading in readings if reading[0] <= step]
        return began, kept or [(step, 0.0)]

    def add(self, step: int, useful_seconds: float) -> float:
        """Counts seconds spent on steps up to `step`; returns the goodput, 0 to 1."""
        total = self._readings[-1][1] + useful_seconds
        self._readings = [*self._readings, (step, total)][-self.KEPT :]
        if self._writes:
            saved = {"began": self._began, "useful_seconds": self._readings}
            unfinished = self._path.with_suffix(".writing")
            unfinished.write_text(json.dumps(saved))
            unfinished.replace(self._path)
        return min(total / max(self._now() - self._began, 1e-9), 1.0)


class Profiler:
    """Writes traces of a few steps to workdir/profiles, at a step or on SIGUSR1.

    Args:
      workdir: the run's directory.
      first: the first step to trace; 0 for none.
      steps: steps in a trace.
    """

    def __init__(self, workdir: Path, first: int, steps: int):
        self._folder, self._first, self._steps = workdir / PROFILES, first, steps
        self._asked = threading.Event()
        self._until: int | None = None
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())

    def before_step(self, step: int) -> None:
        """To be called before each step, numbered from 1, is dispatched."""
        if self._until is None and (step == self._first or self._asked.is_set()):
            self._asked.clear()
            self._until = step + self._steps
            jax.profiler.start_trace(str(self._folder))

    def after_step(self, step: int, metrics: Any) -> None:
        """To be called after each step was dispatched; waits for the last one of a trace."""
        if self._until is not None and step + 1 >= self._until:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        self._until = None
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            print(f"wrote a profile to {self._folder}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends a trace that is not finished, and gives the signal back."""
        if self._until is not None:
            self._stop()
        if self._previous is not None:
            signal.signal(signal.SIGUSR1, self._previous)
            self._previous = None


class Throughput:
    """What the loop asks: times its parts, and reports rates when metrics are written.

    Args:
      workdir: the run's directory.
      step: the step that the run goes on from.
      batch_size: images in a step, over all devices.
      multiply_adds: of one forward pass for one image.
      devices: those of the mesh.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        *,
        batch_size: int,
        multiply_adds: int,
        devices: Sequence[Any],
    ):
        self.clock = Clock()
        self._goodput = Goodput(workdir, step, writes=jax.process_index() == 0)
        self._batch_size, self._devices = batch_size, len(devices)
        self._flops = FLOPS_PER_MULTIPLY_ADD * multiply_adds
        self._peak = peak_flops(devices[0].device_kind)
        self._step, self._compiled = step, False

    def measure(self, part: str) -> Any:
        """A context whose time counts as `part`; see Clock."""
        return self.clock.measure(part)

    def compiled(self, step: int) -> None:
        """The first step, with its compilation, is done: it counts for nothing."""
        self.clock.read()
        self._step, self._compiled = step, True

    def report(self, step: int) -> dict[str, float]:
        """Scalars about the steps since the last report; none when there were none.

        `throughput/`: images per second, the same per device, and `mfu`, model FLOP/s over the
        devices' peak where that is known; all of the time in which steps ran, without checkpoints
        and samples. `time/`: shares of the whole time by part, and `goodput`. `memory/`: GiB.
        """
        steps = step - self._step
        if steps <= 0 or not self._compiled:
            return {}
        total, spent = self.clock.read()
        self._step = step
        stepping = max(total - spent.get("checkpoint", 0.0) - spent.get("samples", 0.0), 1e-9)
        rate = steps * self._batch_size / stepping
        report = {
            "throughput/images_per_second": rate,
            "throughput/images_per_second_per_device": rate / self._devices,
        }
        if self._peak is not None:
            report["throughput/mfu"] = rate * self._flops / (self._peak * self._devices)
        report |= {f"time/{part}": seconds / total for part, seconds in spent.items()}
        useful = stepping - spent.get("data", 0.0)
        report["time/goodput"] = self._goodput.add(step, useful)
        return report | memory_in_use()
