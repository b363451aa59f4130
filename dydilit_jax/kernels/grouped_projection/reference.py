"""The grouped projection over all banks at once: the specification, and the default on TPU and GPU.

    y_i   = sum_j w_ij x_i W_j                                                     (1)
    dx_i  = sum_j w_ij dy_i W_j^T                                                  (2)
    dw_ij = x_i . (dy_i W_j^T)                                                     (3)
    dW_j  = sum_i w_ij x_i^T dy_i                                                  (4)

(1), (4), and (2) for the routed bank alone are each one product over the joint axis of banks and
features, with the weights folded into an operand, so that a compiler which fuses operands never
stores n times the tokens. In units of one T x D x E product, forward and backward cost 3n.
Source: DyDiLA (arXiv 2601.13683), dynamic projection; Switch Transformer (arXiv 2101.03961) for
top-1 routing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accumulator(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """Return the dtype of sums over operands of `dtype`: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dense(x: jax.Array, bank: jax.Array, weights: jax.Array) -> jax.Array:
    """Equation (1). Any weights are allowed, so this is the soft (mixture) projection as well.

    Args:
      x: (T, D) tokens.
      bank: (n, D, E), cast to `x.dtype` for the product.
      weights: (T, n); their product with x is rounded to `x.dtype`.

    Returns:
      (T, E) in `accumulator(x.dtype)`.
    """
    T, D = x.shape
    n, _, E = bank.shape
    weighted_x = _weigh(x, weights).reshape(T, n * D)
    joined_bank = bank.astype(x.dtype).reshape(n * D, E)
    return jnp.dot(weighted_x, joined_bank, preferred_element_type=accumulator(x.dtype))


def dense_gradient(
    x: jax.Array,
    bank: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    dy: jax.Array,
    straight_through: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) to (4), given the gradient of the output.

    Args:
      x: (T, D) tokens.
      bank: (n, D, E).
      weights: (T, n), zero off `index` unless `straight_through`.
      index: (T,) integers, the routed bank.
      dy: (T, E) in `x.dtype`.
      straight_through: whether `dw` is wanted for every bank, or only for the routed one.

    Returns:
      dx (T, D), dbank (n, D, E), dweights (T, n), in the dtypes of x, bank and weights.
    """
    if straight_through:
        dx, dweights = every_bank_gradient(x, bank, weights, dy)
    else:
        routed = one_hot(index, weights)
        routed_dy = dense(dy, bank.swapaxes(1, 2), routed)
        dx = (jnp.sum(weights * routed, axis=1, keepdims=True) * routed_dy).astype(x.dtype)
        dweights = (routed * jnp.sum(x * routed_dy, axis=1, keepdims=True)).astype(weights.dtype)
    dbank = jnp.einsum(
        "tnd,te->nde", _weigh(x, weights), dy, preferred_element_type=accumulator(x.dtype)
    )
    return dx, dbank.astype(bank.dtype), dweights


def every_bank_gradient(
    x: jax.Array, bank: jax.Array, weights: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Equations (2) and (3) for all banks: n products, since (2) reuses the ones that (3) needs.

    Bank by bank, so that the live intermediate is (T, D) and not (T, n, D).

    Args:
      x: (T, D) tokens.
      bank: (n, D, E).
      weights: (T, n).
      dy: (T, E) in `x.dtype`.

    Returns:
      dx (T, D) and dweights (T, n), in the dtypes of x and weights.
    """
    acc = accumulator(x.dtype)
    dx = jnp.zeros(x.shape, acc)
    dweights = []
    for j in range(bank.shape[0]):
        dy_back = jnp.dot(dy, bank[j].astype(x.dtype).T, preferred_element_type=acc)
        dx = dx + weights[:, j : j + 1].astype(acc) * dy_back
        dweights.append(jnp.sum(x.astype(acc) * dy_back, axis=1))
    return dx.astype(x.dtype), jnp.stack(dweights, axis=1).astype(weights.dtype)


def one_hot(index: jax.Array, weights: jax.Array) -> jax.Array:
    """Return the one-hot rows of `index` (T,), with the shape (T, n) and dtype of `weights`."""
    return jax.nn.one_hot(index, weights.shape[1], dtype=weights.dtype)


def _weigh(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Return w_ij x_i, (T, n, D), rounded once to `x.dtype`."""
    acc = accumulator(x.dtype)
    return (weights.astype(acc)[:, :, None] * x.astype(acc)[:, None, :]).astype(x.dtype)
