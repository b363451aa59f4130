"""Whether any process wants something, asked while the devices are at work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


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
