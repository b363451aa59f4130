"""What a diffusion process is to the trainer, and the few helpers every process needs.

Shapes: x_0, x_t, noise (B, H, W, C) float; t, time, per-example losses (B,) float.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Network = Callable[[jax.Array, jax.Array], jax.Array]
"""(x (B, H, W, C), time (B,)) -> (B, H, W, C), or (B, H, W, 2C) with a learned variance: the
prediction's channels first, the variance's second. Conditioning is already bound; `time` is what
the network is fed (a timestep, or a scaled flow time), float32."""


class Process(Protocol):
    """The forward noising process: what the network is trained to undo."""

    @property
    def time_max(self) -> float:
        """The largest `time` the network is fed: time / time_max is 0 at data and 1 at noise."""
        ...

    def output_channels(self, channels: int) -> int:
        """Channels the network must put out for data of `channels` channels."""
        ...

    def loss(
        self, network: Network, x_0: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Training loss at a random time of each example.

        Args:
          network: see `Network`.
          x_0: (B, H, W, C) data.
          key: one typed PRNG key, or (B,) keys, one an example (see `example_keys`).

        Returns:
          The loss (B,) and its terms by name, each (B,), all in float32.
        """
        ...


def example_keys(key: jax.Array, batch: int) -> jax.Array:
    """One key per example, (batch,), which no sharding of the batch changes.

    Args:
      key: one typed PRNG key, which is folded with each example's index; or (batch,) keys, which
        are returned as they are. A caller that splits its batch makes the keys of the whole batch
        and passes each part its own.
      batch: number of examples.

    Raises:
      TypeError: for a raw uint32 key: make keys with `jax.random.key`.
      ValueError: for an array of keys of another length than `batch`.
    """
    require_typed_key(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"{key.shape} keys for a batch of {batch}: pass one key, or one each.")
    return key


def require_typed_key(key: jax.Array) -> None:
    """Raise a TypeError for anything but typed PRNG keys, whose shape tells how many they are."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"a typed PRNG key is needed, not {key.dtype}: make it with jax.random.key")


def split_each(keys: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """Split each of (B,) keys into `count` streams: `count` arrays of (B,) keys."""
    streams = jax.vmap(lambda key: jax.random.split(key, count))(keys)
    return tuple(streams[:, index] for index in range(count))


def normal_each(keys: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Standard normal noise (B, *shape), each example's from its own key of (B,) keys."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, or in float64 if it is: processes never compute in half precision."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def like(coefficient: jax.Array, x: jax.Array) -> jax.Array:
    """A coefficient, scalar or (B,), in the dtype of x (B, ...) and ready to multiply it."""
    coefficient = jnp.asarray(coefficient, x.dtype)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def mean_each(x: jax.Array) -> jax.Array:
    """Mean over all but the batch axis: (B, ...) -> (B,)."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
