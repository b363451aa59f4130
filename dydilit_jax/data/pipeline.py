"""From a source to batches: seeded shuffle, repeat, transform, batch, each process its part.

The order is a function of (seed, epoch, index) alone. Batch n of the run is examples
n B to (n + 1) B of one endless order, of which process p of P reads the p-th of P equal parts; so
the position is a step number that means the same for any number of processes and workers, and each
epoch holds every example once.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from dydilit_jax.data.sources import Source
from dydilit_jax.data.tolerance import ON_ERROR, SkipReport, Tolerant
from dydilit_jax.errors import UserError, unknown_name

Batch = dict[str, np.ndarray]


class BatchIterator(Protocol):
    """Batches without end, with a position that can be saved and set."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON can hold it."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position."""
        ...


class StepBatches:
    """Batches whose position is the number of the next one.

    Args:
      batches: all batches, by number.
      read: starts reading batches from the first of those it is given.
      report: told of the examples that could not be read.
      examples: number of examples in an epoch, which a position must agree with.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        read: Callable[[grain.MapDataset], Iterator[Batch]],
        report: SkipReport,
        examples: int,
    ):
        self._batches = batches
        self._read = read
        self._report = report
        self._examples = examples
        self._position = 0
        self._reading: Any = None

    @property
    def skipped(self) -> int:
        """Number of different examples that could not be read so far."""
        return self._report.count

    def __next__(self) -> Batch:
        if self._reading is None:
            self._reading = self._read(self._batches[self._position :])
        try:
            batch = dict(next(self._reading))
        except UserError as error:
            # Grain adds lines of its own to messages.
            raise UserError(str(error).partition("\n")[0]) from error
        self._position += 1
        self._report.add(batch.pop("skipped"))
        return batch

    def get_state(self) -> dict[str, Any]:
        """The position: number of the next batch, and size of the data set it is of."""
        return {"next_index": self._position, "examples": self._examples}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to a position.

        Raises:
          UserError: it is a position in a data set of another size.
        """
        examples = state.get("examples", self._examples)
        if examples != self._examples:
            raise UserError(
                f"the checkpoint was trained on {examples} examples, the data set now has "
                f"{self._examples}: restore data.source, data.split and data.classes"
            )
        self.close()
        self._position = int(state["next_index"])

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them anew."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None


def flip_at_random(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Mirrors the image (H, W, C) left to right in half of the cases."""
    if rng.random() < 0.5:
        return {**example, "image": example["image"][:, ::-1]}
    return example


def make_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    horizontal_flip: bool = False,
    read_threads: int = 2,
    workers: int = 0,
    on_error: str = "skip",
    max_errors: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> StepBatches:
    """An iterator over this process's part of every batch.

    Args:
      source: the data set.
      batch_size: B, images of a step over all processes.
      seed: of the order and of the flips.
      horizontal_flip: mirror half of the images. A source with a `transform` does it itself.
      read_threads: threads that read ahead, in each worker.
      workers: processes that read ahead; 0 for none but this one.
      on_error: `skip` replaces an example that cannot be read by the next that can; `stop` raises.
      max_errors: with `skip`, so many different examples may be unreadable here.
      process_index: p.
      process_count: P, a divisor of B.

    Returns:
      Batches of `image` (B / P, H, W, C) float32 and `label` (B / P,) int32.

    Raises:
      UserError: an empty source, or a batch that the processes do not divide. Its iterator raises
        it for examples that cannot be read.
    """
    if len(source) == 0:
        raise UserError("the data source is empty")
    if batch_size % process_count:
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {process_count} processes"
        )
    if on_error not in ON_ERROR:
        raise unknown_name("data.on_error", on_error, ON_ERROR)
    items = Tolerant(source, skip=on_error == "skip", max_errors=max_errors)
    examples = grain.MapDataset.source(items).seed(seed).shuffle().repeat()
    transform = getattr(source, "transform", None) or (flip_at_random if horizontal_flip else None)
    if transform is None:
        examples = examples.map(_example)
    else:
        examples = examples.random_map(functools.partial(_random_example, transform))
    batches = examples.batch(batch_size // process_count)[process_index::process_count]

    def read(batches: grain.MapDataset) -> Iterator[Batch]:
        options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
        reading = batches.to_iter_dataset(options)
        if workers:
            # Grain asks flags of its own, which only entry points parse.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            reading = reading.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
                worker_init_fn=_start_worker,
            )
        return iter(reading)

    return StepBatches(batches, read, SkipReport(source, max_errors), len(source))


def _example(item: tuple[Any, int]) -> dict[str, Any]:
    example, skipped = item
    return {**example, "skipped": np.int64(skipped)}


def _random_example(
    transform: Callable[[Any, np.random.Generator], Any],
    item: tuple[Any, int],
    rng: np.random.Generator,
) -> dict[str, Any]:
    example, skipped = item
    return _example((transform(example, rng), skipped))


def _start_worker(index: int, count: int) -> None:
    """Keeps a worker off accelerators and signals, and ends it with its parent."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    # Ctrl-C reaches a whole group of processes; it is the trainer's to answer, and it still wants
    # the batches that belong to its last step.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: Any) -> None:
    parent.join()
    os._exit(1)
