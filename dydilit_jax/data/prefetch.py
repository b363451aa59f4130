"""Batches placed on the devices ahead of use, and the position of the last one handed out."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from dydilit_jax.data.pipeline import Batch, BatchIterator

T = TypeVar("T")


class _Ready(NamedTuple):
    """A placed batch with the position after it; or the error that came instead."""

    batch: Any
    state: Any
    error: BaseException | None


class DevicePrefetch(Generic[T]):
    """Reads and places batches in a thread while the caller computes.

    Its position is that of the batch last handed out, whatever was read beyond: a checkpoint holds
    what the step that it is of has seen.

    Args:
      batches: to read.
      place: puts a batch where it is needed, such as `lambda batch: to_mesh(batch, mesh)`.
      depth: batches that wait; 0 reads and places in the caller's own thread.
    """

    def __init__(self, batches: BatchIterator, place: Callable[[Batch], T], *, depth: int = 2):
        self._batches = batches
        self._place = place
        self._depth = depth
        self._state = batches.get_state()
        self._ready: queue.Queue[_Ready] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __next__(self) -> T:
        """The next batch, placed.

        Raises:
          Whatever reading or placing raises, when it is this batch's turn.
        """
        if self._depth == 0:
            ready = self._read()
        else:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._fill, args=(self._stop, self._ready), daemon=True
                )
                self._thread.start()
            ready = self._ready.get()
        if ready.error is not None:
            self.close()
            raise ready.error
        self._state = ready.state
        return ready.batch

    def get_state(self) -> dict[str, Any]:
        """The position after the batch that was last handed out."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position; what was read ahead is dropped."""
        self.close()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Stops reading, and drops what was read ahead; the next batch starts it anew."""
        if self._thread is not None:
            self._stop.set()
            while self._thread.is_alive():
                # The thread may wait for room.
                _drain(self._ready)
                self._thread.join(0.05)
            self._thread = None
        self._stop = threading.Event()
        self._ready = queue.Queue(max(1, self._depth))
        self._batches.set_state(self._state)

    def _read(self) -> _Ready:
        try:
            batch = next(self._batches)
            return _Ready(self._place(batch), self._batches.get_state(), None)
        except BaseException as error:
            return _Ready(None, None, error)

    def _fill(self, stop: threading.Event, ready: queue.Queue[_Ready]) -> None:
        while not stop.is_set():
            item = self._read()
            ready.put(item)
            if item.error is not None:
                return


def _drain(ready: queue.Queue[_Ready]) -> None:
    while True:
        try:
            ready.get_nowait()
        except queue.Empty:
            return
