"""What the processes of a run must decide alike; with one process nothing is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

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
    """Raises a UserError of any process on every process; a collective."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    if (problem := common_text(problem)) is not None:
        raise UserError(problem)


def of_first_process(value: int) -> int:
    """The first process's whole number, on every process; a collective."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


class AnyProcess:
    """Asks whether any process has raised its flag, without waiting for the answer.

    The question is a program of its own on the devices, queued behind the step that was dispatched
    before it; so its answer is there when that step's metrics are, and is the same everywhere.

    Args:
      mesh: all devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        sharding = NamedSharding(mesh, P(mesh.axis_names))

        def flags(value: int) -> jax.Array:
            local = np.full(len(mesh.local_devices), value, np.int32)
            return jax.make_array_from_process_local_data(sharding, local, (mesh.size,))

        self._flags = {raised: flags(raised) for raised in (False, True)}
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def ask(self, raised: bool) -> jax.Array:
        """() int32, not zero if any process asked with `raised`; a collective."""
        return self._largest(self._flags[raised])
