"""What several processes must decide alike; with one process nothing is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np

from dydilit_jax.errors import UserError

TEXT_BYTES = 1000


def common_text(text: str | None) -> str | None:
    """The text of the first process that has one, on every process; None if none has one.

    A collective: every process calls it.

    Args:
      text: this process's, of which 1,000 bytes are kept where there are several.
    """
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    encoded = np.zeros(TEXT_BYTES, np.uint8)
    raw = np.frombuffer((text or "").encode()[:TEXT_BYTES], np.uint8)
    encoded[: len(raw)] = raw
    gathered = np.asarray(multihost_utils.process_allgather(encoded)).reshape(-1, TEXT_BYTES)
    for row in gathered:
        if row.any():
            return bytes(row[row != 0]).decode(errors="ignore")
    return None


@contextmanager
def raised_together() -> Iterator[None]:
    """Raises what goes wrong on any process on every process; a collective.

    So that none waits in its next collective for a process that has ended. A UserError is raised
    alike everywhere; of another exception the other processes raise a UserError that tells of it.
    Nothing within may wait for the other processes, unless it raises on all of them.
    """
    problem, own = None, None
    try:
        yield
    except UserError as error:
        problem = str(error)
    except Exception as error:
        own = error
        where = f"process {jax.process_index()} has failed"
        problem = f"{where}: {type(error).__name__}: {error}"
    problem = common_text(problem)
    if own is not None:
        raise own
    if problem is not None:
        raise UserError(problem)


def of_first_process(value: int) -> int:
    """The first process's whole number, on every process; a collective."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
