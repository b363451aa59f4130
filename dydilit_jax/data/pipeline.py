"""From a source to batches: seeded shuffle, repeat, transform, batch, each process its part.

The order is a function of (seed, epoch, index) alone. Batch n of the run is examples
n B to (n + 1) B of one endless order, of which process p of P reads the p-th of P equal parts; so
the position is a step number that means the same for any number of processes, and each epoch holds
every example once.
"""

from __future__ import annotations

from typing import Any, Protocol

import grain
import numpy as np

from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError

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
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """An iterator over this process's part of every batch.

    Args:
      source: the data set.
      batch_size: B, images of a step over all processes.
      seed: of the order and of the flips.
      horizontal_flip: mirror half of the images.
      read_threads: threads that read ahead.
      process_index: p.
      process_count: P, a divisor of B.

    Returns:
      Batches of `image` (B / P, H, W, C) float32 and `label` (B / P,) int32.

    Raises:
      UserError: an empty source, or a batch that the processes do not divide.
    """
    if len(source) == 0:
        raise UserError("the data source is empty")
    if batch_size % process_count:
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {process_count} processes"
        )
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if horizontal_flip:
        examples = examples.random_map(flip_at_random)
    batches = examples.batch(batch_size // process_count)[process_index::process_count]
    options = grain.ReadOptions(num_threads=read_threads, prefetch_buffer_size=2 * read_threads)
    return iter(batches.to_iter_dataset(options))
