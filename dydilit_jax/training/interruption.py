"""Being asked to stop: signals, and the step at which all processes stop together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh

from dydilit_jax.training.agreement import AnyProcess

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Whether the run is to stop, the same answer on every process.

    With several processes an answer is that of the step before, read when that step's metrics are;
    a signal that reaches only one of them stops all, at one step.

    Args:
      mesh: all devices; None for one process.
      requested: set when this process is asked to stop.
    """

    def __init__(self, mesh: Mesh | None, requested: threading.Event):
        self._requested = requested
        self._any = AnyProcess(mesh) if mesh is not None and jax.process_count() > 1 else None
        self._asked: list[jax.Array] = []

    def propose(self) -> None:
        """Called after a step was dispatched."""
        if self._any is not None:
            self._asked.append(self._any.ask(self._requested.is_set()))

    def agreed(self) -> bool:
        """Whether to stop after the step that was dispatched last."""
        if self._any is None:
            return self._requested.is_set()
        return len(self._asked) > 1 and bool(self._asked.pop(0))

    def agreed_now(self) -> bool:
        """Whether to stop, asked and answered at once, between parts of something long."""
        if self._any is None:
            return self._requested.is_set()
        return bool(self._any.ask(self._requested.is_set()))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second one does what it did before."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {name: signal.getsignal(name) for name in SIGNALS}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for name in previous:
        signal.signal(name, handle)
    try:
        yield stop
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
