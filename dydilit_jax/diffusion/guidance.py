"""Classifier-free guidance.

  guided = null + scale (conditional - null)

Sources: Ho & Salimans 2207.12598, with the scale as DiT and most samplers count it (1 is no
guidance); the interval, Kynkäänniemi et al. 2404.07724.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dydilit_jax.diffusion.process import Network, at_least_float32, like
from dydilit_jax.errors import UserError

ConditionalNetwork = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(x (B, H, W, C), time (B,), labels (a pytree of (B, ...) arrays)) -> (B, H, W, C or 2C)."""


def classifier_free(
    network: ConditionalNetwork,
    labels: Any,
    null_label: Any,
    scale: float | jax.Array,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    time_max: float = 1000.0,
) -> Network:
    """Bind labels to a conditional network, with guidance.

    Args:
      network: the conditional network; it is called once, on 2B examples.
      labels: the condition, a pytree of arrays with leading axis B (class labels: (B,) integers).
      null_label: the dropped condition, of the structure of `labels`, each leaf broadcast to its
        label's shape (class labels: the integer after the last class).
      scale: guidance scale, a number, a traced scalar or (B,). The number 1.0 skips the null half
        altogether, so that one evaluation costs B examples.
      interval: (low, high) in time / time_max, 0 at data and 1 at noise, both ends included.
        Outside of it the conditional prediction stands alone, and costs B examples.
      channels: guide the first so many channels of the prediction; None: all of it. Published DiT
        samples guide 3 of 4 (a slip of its code). Whatever is not guided, the learned variance in
        any case, is the conditional one.
      time_max: `Process.time_max`: maps the network's time to [0, 1].

    Returns:
      A `Network`, whose output is float32 at least.

    Raises:
      UserError: for an interval that is not 0 <= low <= high <= 1, or channels below 1.
    """
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"guidance interval must be 0 <= low <= high <= 1, not ({low}, {high}).")
    if channels is not None and channels < 1:
        raise UserError(f"guidance channels must be at least 1, not {channels}; None guides all.")

    always = (low, high) == (0.0, 1.0)

    def conditional(x: jax.Array, time: jax.Array) -> jax.Array:
        return at_least_float32(network(x, time, labels))

    def guided(x: jax.Array, time: jax.Array) -> jax.Array:
        outputs = network(_twice(x), _twice(time), _with_null(labels, null_label))
        outputs = at_least_float32(outputs).reshape(x.shape[0], 2, *outputs.shape[1:])
        with_label, without = outputs[:, 0], outputs[:, 1]
        difference = with_label - without
        everywhere = without + like(jnp.asarray(scale), difference) * difference
        is_guided = jnp.arange(outputs.shape[-1]) < min(channels or x.shape[-1], x.shape[-1])
        return jnp.where(is_guided & inside(x, time), everywhere, with_label)

    def inside(x: jax.Array, time: jax.Array) -> jax.Array | bool:
        if always:
            return True
        position = time / time_max
        return ((low <= position) & (position <= high)).reshape(-1, *[1] * (x.ndim - 1))

    def guided_inside(x: jax.Array, time: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(inside(x, time)), guided, conditional, x, time)

    if isinstance(scale, int | float) and scale == 1.0:
        return conditional
    return guided if always else guided_inside


def _twice(x: jax.Array) -> jax.Array:
    """(B, ...) -> (2B, ...), each example beside its copy: a sharded batch stays where it is."""
    return jnp.repeat(x, 2, axis=0)


def _with_null(labels: Any, null_label: Any) -> Any:
    """Labels of the 2B examples: each example's own, then the null one."""

    def pair(label: jax.Array, null: jax.Array) -> jax.Array:
        label = jnp.asarray(label)
        null = jnp.broadcast_to(jnp.asarray(null, label.dtype), label.shape)
        return jnp.stack([label, null], axis=1).reshape(2 * label.shape[0], *label.shape[1:])

    return jax.tree.map(pair, labels, null_label)
