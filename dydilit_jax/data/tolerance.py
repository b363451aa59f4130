"""Examples that cannot be read: another takes the place, and somebody is told.

The stand-in of example i is the first readable one after it, so batches keep their shape and are
the same for any number of workers and processes. Which examples were replaced travels with the
batch to the process that trains; it names and counts them, in the order of use.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError

ON_ERROR = ("skip", "stop")


class Tolerant:
    """A source's items, each with the index of the unreadable one that it stands for, or -1.

    Args:
      source: whose items are read.
      skip: whether an unreadable item is replaced; if not, its error is raised.
      max_errors: unreadable items in a row that are passed over.
    """

    def __init__(self, source: Source, *, skip: bool, max_errors: int):
        self._source = source
        self._skip = skip
        self._max_errors = max_errors

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        index = int(index)
        for offset in range(min(self._max_errors + 1, len(self))):
            try:
                item = self._source[(index + offset) % len(self)]
            except UserError as error:
                if not self._skip:
                    raise UserError(f"{error} (data.on_error=skip goes on without it)") from error
                last = error
            else:
                return item, index if offset else -1
        raise too_many(self._max_errors, last)


class SkipReport:
    """Names and counts the examples that could not be read, each once.

    Args:
      source: they are of.
      max_errors: so many may be unreadable.
    """

    def __init__(self, source: Source, max_errors: int):
        self._source = source
        self._max_errors = max_errors
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Number of different unreadable examples so far."""
        return len(self._seen)

    def add(self, indices: np.ndarray) -> None:
        """Notes the `skipped` column (b,) of a batch.

        Raises:
          UserError: too many are unreadable.
        """
        for index in indices[indices >= 0].tolist():
            if index in self._seen:
                continue
            self._seen.add(index)
            # Read once more, for the reason: what happened in a worker stayed there.
            try:
                self._source[index]
                reason = f"example {index} could not be read at first"
            except UserError as error:
                reason = str(error)
            if self.count > self._max_errors:
                raise too_many(self._max_errors, UserError(reason))
            print(
                f"skipped: {reason} ({self.count} so far, data.max_errors={self._max_errors})",
                file=sys.stderr,
                flush=True,
            )


def too_many(max_errors: int, last: UserError) -> UserError:
    """The error that ends a run after this many examples were skipped."""
    return UserError(
        f"more than {max_errors} examples cannot be read (data.max_errors); the last: {last}"
    )
