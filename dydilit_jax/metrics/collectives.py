"""What the processes of an evaluation tell each other: numbers of the host, exact to the last bit.

JAX computes in float32 unless told otherwise, so float64 travels as the 32-bit words it is made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

ROWS = "rows"


def gather(array: np.ndarray) -> np.ndarray:
    """(P, ...) every process's `array`, in the order of processes; a collective.

    Args:
      array: of the same shape and dtype (of 1, 4 or 8 bytes) on every process.
    """
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view(np.uint8 if flat.itemsize == 1 else np.uint32)
    gathered = np.asarray(multihost_utils.process_allgather(words))
    return np.ascontiguousarray(gathered).view(flat.dtype).reshape(-1, *array.shape)


def row_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh in one axis, process by process."""
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (ROWS,))


def every_device() -> Mesh:
    """A row_mesh of all devices of all processes."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), (ROWS,))


def from_each_process(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """One array over a row_mesh, each process bringing as many rows, in the order of processes."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(ROWS)), array)


def first_filled(array: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Rows of which each is filled on one process and zero on the others, on every process.

    A collective; exact, since every sum has one addend that is not zero.

    Args:
      array: (n, D) float32 on every process.
      mesh: a row_mesh of all processes.
    """
    if jax.process_count() == 1:
        return array
    local = np.zeros((len(mesh.local_devices), *array.shape), np.float32)
    local[0] = array
    return np.asarray(_total(mesh)(from_each_process(local, mesh)))


@functools.cache
def _total(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda parts: parts.sum(axis=0), out_shardings=NamedSharding(mesh, P()))
