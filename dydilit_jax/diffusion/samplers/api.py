"""What a sampler is, and the one loop that runs any of them.

A sampler is a table of coefficients with one row a step, computed beforehand in float64, and a pure
function from one state to the next. `sample` scans that function over the rows: one compilation
serves every batch of a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dydilit_jax.diffusion.process import Network, normal_each, require_typed_key
from dydilit_jax.errors import UserError

Row = dict[str, jax.Array]
Noise = Callable[[], jax.Array]
"""Draws this step's standard normal noise (B, H, W, C); a sampler that calls it not draws none."""


class State(NamedTuple):
    """What is carried from step to step: x (B, H, W, C), and whatever the sampler remembers."""

    x: jax.Array
    memory: Any = ()


class Sampler(Protocol):
    """A way from noise to data."""

    def tables(self) -> dict[str, np.ndarray]:
        """Coefficients by name, each (steps,) float64 or int, in the order they are used."""
        ...

    def start(self, x: jax.Array) -> State:
        """The state before the first step, at pure noise x (B, H, W, C)."""
        ...

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """The state after one step, whose coefficients are the scalars of `row`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Thresholding:
    """How an estimate of x_0 is kept in the range of pixels, [-1, 1]; off by default.

    Attributes:
      clip_denoised: clip to [-1, 1].
      dynamic_threshold: percentile p in (0, 100], 0 for off: with s the p-th percentile of |x_0| of
        an image, or 1 if that is larger, clip to [-s, s] and divide by s (Imagen, 2205.11487,
        section 2.3, where p is 99.5).

    Raises:
      UserError: for a percentile outside [0, 100], or both at once.
    """

    clip_denoised: bool = False
    dynamic_threshold: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dynamic_threshold <= 100.0:
            raise UserError(
                f"dynamic_threshold is a percentile in [0, 100], not {self.dynamic_threshold}."
            )
        if self.clip_denoised and self.dynamic_threshold:
            raise UserError("clip_denoised and dynamic_threshold exclude each other: choose one.")

    @property
    def thresholds(self) -> bool:
        """Whether `restrict` does anything."""
        return self.clip_denoised or self.dynamic_threshold > 0.0

    def restrict(self, x_0: jax.Array) -> jax.Array:
        """x_0 (B, H, W, C) brought into range."""
        if self.clip_denoised:
            return jnp.clip(x_0, -1.0, 1.0)
        if self.dynamic_threshold:
            axes = tuple(range(1, x_0.ndim))
            bound = jnp.percentile(jnp.abs(x_0), self.dynamic_threshold, axis=axes, keepdims=True)
            bound = jnp.maximum(bound, 1.0)
            return jnp.clip(x_0, -bound, bound) / bound
        return x_0


def sample(
    sampler: Sampler,
    network: Network,
    keys: jax.Array,
    shape: tuple[int, int, int],
    *,
    dtype: DTypeLike = jnp.float32,
    return_trajectory: bool = False,
) -> jax.Array:
    """Draw images; pure, to be called under `jax.jit`.

    All randomness of an image comes from its own key: fold_in(key, 0) draws the start, and
    fold_in(key, k) the k-th step's noise. So an image is the same whatever else is in its batch
    and on however many devices the batch lies, up to the network's own rounding.

    Args:
      sampler: see `make_sampler`.
      network: see `Network`; guidance and conditioning are bound to it.
      keys: (B,) typed PRNG keys, one an image.
      shape: (H, W, C) of one image.
      dtype: of the state: float32, or float64 if JAX has it enabled.
      return_trajectory: return every state rather than the last.

    Returns:
      x_0 (B, H, W, C); or (steps + 1, B, H, W, C) from noise to x_0.

    Raises:
      TypeError: for raw uint32 keys.
      ValueError: for keys not (B,), or a shape that is not one image's.
    """
    require_typed_key(keys)
    if keys.ndim != 1 or len(shape) != 3:
        raise ValueError(f"needs (B,) keys and one image's (H, W, C), not {keys.shape}, {shape}.")

    def noise_of(index: jax.Array | int) -> jax.Array:
        folded = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        return normal_each(folded, shape, dtype)

    return integrate(
        sampler,
        network,
        noise_of(0),
        lambda step: noise_of(step + 1),
        return_trajectory=return_trajectory,
    )


def integrate(
    sampler: Sampler,
    network: Network,
    x: jax.Array,
    noise_of_step: Callable[[jax.Array], jax.Array],
    *,
    return_trajectory: bool = False,
) -> jax.Array:
    """Run a sampler from given noise; `sample` is this with noise drawn from keys.

    Args:
      sampler, network, return_trajectory: as for `sample`.
      x: (B, H, W, C) pure noise.
      noise_of_step: from a traced step index, 0 first, to the noise (B, H, W, C) of that step.

    Returns:
      As `sample`.
    """
    rows = {name: _row_array(column, x.dtype) for name, column in sampler.tables().items()}
    count = next(iter(rows.values())).shape[0]

    def body(state: State, step: tuple[jax.Array, Row]) -> tuple[State, jax.Array | None]:
        index, row = step
        state = sampler.step(network, state, row, lambda: noise_of_step(index))
        return state, state.x if return_trajectory else None

    last, states = jax.lax.scan(body, sampler.start(x), (jnp.arange(count), rows))
    return last.x if states is None else jnp.concatenate([x[None], states])


def _row_array(column: np.ndarray, dtype: DTypeLike) -> jax.Array:
    """A column in the state's dtype, or in int32 if it counts."""
    is_float = np.issubdtype(column.dtype, np.floating)
    return jnp.asarray(column, dtype if is_float else jnp.int32)
