"""The line that tells how training goes."""

from __future__ import annotations

import sys
import time

import jax


def duration(seconds: float) -> str:
    """Seconds as `42s`, `3m05s`, `2h07m` or `1d04h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class Progress:
    """Measures the rate of training, without what interrupts it, and prints a line.

    Args:
      total: steps of the run.
      batch_size: images in a step.
    """

    def __init__(self, total: int, batch_size: int):
        self._total = total
        self._batch_size = batch_size
        self._step: int | None = None
        self._seconds = 0.0
        self._resumed = 0.0

    def start(self, step: int) -> None:
        """Starts the clock: `step` steps are done, and the next are to be measured."""
        self._step, self._seconds, self._resumed = step, 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stops the clock for something that is not training."""
        self._seconds += time.perf_counter() - self._resumed

    def resume(self) -> None:
        """Lets the clock run again."""
        self._resumed = time.perf_counter()

    def _print(self, line: str) -> None:
        if jax.process_index() == 0:
            print(line, file=sys.stderr, flush=True)

    def report(self, step: int, loss: float) -> dict[str, float]:
        """Prints the line for `step` steps done, restarts the clock; returns the rates."""
        self.pause()
        if self._step is None or step <= self._step:
            self._print(f"step {step}/{self._total}  loss {loss:.4f}")
            self.start(step)
            return {}
        rate = (step - self._step) / max(self._seconds, 1e-9)
        left = duration((self._total - step) / rate)
        self._print(
            f"step {step}/{self._total}  loss {loss:.4f}  "
            f"{rate * self._batch_size:,.0f} images/s  {left} left"
        )
        self.start(step)
        return {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
