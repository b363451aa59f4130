"""The grouped projection with only the routed product of each token: tokens in blocks of one bank.

A plan (a counting sort of the tokens by bank, each bank's run padded to whole blocks) is followed
by one loop over the blocks in use. A block gathers its tokens' rows, multiplies them by the one
bank it belongs to and writes the result rows back where they came from. What a block gathers stays
in the cache, and nothing of the size of the activations is stored besides the result; the loop ends
with the last block in use, so padding costs at most one partial block a bank.

Forward (1), and backward with the routed bank u = index_i only, cost three products:

    y_i   = w_iu x_i W_u                                                           (1)
    g_i   = dy_i W_u^T,   dx_i = w_iu g_i,   dw_iu = x_i . g_i                     (2)
    dW_j  = sum over i routed to j of w_ij x_i^T dy_i                              (3)

With straight-through, g is needed for every bank: n products without any routing, n + 2 in all.
Chosen by measurement on CPU over one batched product with the blocks' banks gathered (as fast
forward, but up to twice the time backward at 4,096 x 384, from its larger temporaries), a
`lax.scan` over all possible blocks, and `jax.lax.ragged_dot` (dense inside there); see
benchmarks/projection.py.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels.grouped_projection.reference import (
    accumulator,
    every_bank_gradient,
    one_hot,
)


class Plan(NamedTuple):
    """Which tokens each block holds.

    Attributes:
      token: (M, B) int32, the tokens of each block; T (one past the last) marks padding.
      owner: (M,) int32, the bank of each block.
      blocks: () int32, how many of the M blocks are in use.
    """

    token: jax.Array
    owner: jax.Array
    blocks: jax.Array


def block_size(tokens: int, banks: int) -> int:
    """Return B, the tokens in a block: 128 to 512, about four blocks a bank where they fit.

    Smaller blocks waste less padding, larger ones have less overhead. Measured on CPU, three banks,
    forward and gradients in units of the plain product's, B = 64 / 128 / 256 / 512:
    2,048 tokens of width 64 2.1 / 2.0 / 2.1 / 2.3; 4,096 of 384 1.9 / 1.5 / 1.5 / 1.4;
    16,384 of 384 1.6 / 1.2 / 1.1 / 1.1. Forward alone, 4,096 of 384: - / 2.0 / 1.8 / 1.7.
    """
    size = 128
    while size < 512 and size * 4 * banks < tokens:
        size *= 2
    return size


def make_plan(index: jax.Array, banks: int, size: int) -> Plan:
    """Sort tokens by bank into blocks of `size`, by counting: several times faster than argsort.

    Args:
      index: (T,) integers in [0, banks).
      banks: n.
      size: B, tokens in a block.

    Returns:
      The plan, with M = (T + n (B - 1)) // B, the most blocks that any routing can need.
    """
    T = index.shape[0]
    M = (T + banks * (size - 1)) // size
    member = (index[:, None] == jnp.arange(banks)).astype(jnp.int32)
    count = jnp.cumsum(member, axis=0)
    bank_blocks = -(-count[-1] // size)
    end = jnp.cumsum(bank_blocks)
    slot = jnp.sum(member * ((end - bank_blocks) * size + count - 1), axis=1)
    token = jnp.full((M * size,), T, jnp.int32)
    token = token.at[slot].set(
        jnp.arange(T, dtype=jnp.int32), unique_indices=True, mode="promise_in_bounds"
    )
    owner = jnp.sum(jnp.arange(M)[:, None] >= end, axis=1, dtype=jnp.int32)
    return Plan(token.reshape(M, size), jnp.minimum(owner, banks - 1), end[-1])


def blocks(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Equation (1).

    Args:
      x: (T, D) tokens.
      bank: (n, D, E), cast to `x.dtype` for the product.
      weights: (T, n), read at `index` only.
      index: (T,) integers, the routed bank.

    Returns:
      (T, E) in `x.dtype`, summed in float32 (float64 for float64).
    """
    T, n = weights.shape
    acc = accumulator(x.dtype)
    plan = make_plan(index, n, block_size(T, n))
    bank = bank.astype(x.dtype)
    weight = _routed_weight(weights, index).astype(acc)

    def project(m: jax.Array, y: jax.Array) -> jax.Array:
        token = plan.token[m]
        product = jnp.dot(_rows(x, token), bank[plan.owner[m]], preferred_element_type=acc)
        return _set_rows(y, token, _rows(weight, token)[:, None] * product)

    y = jnp.zeros((T, bank.shape[2]), x.dtype)
    return lax.fori_loop(0, plan.blocks, project, y)


def blocks_gradient(
    x: jax.Array,
    bank: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    dy: jax.Array,
    straight_through: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) and (3), given the gradient of the output.

    Args:
      x: (T, D) tokens.
      bank: (n, D, E).
      weights: (T, n), zero off `index`.
      index: (T,) integers, the routed bank.
      dy: (T, E) in `x.dtype`.
      straight_through: whether `dw` is wanted for every bank, or only for the routed one.

    Returns:
      dx (T, D), dbank (n, D, E), dweights (T, n), in the dtypes of x, bank and weights.
    """
    T, n = weights.shape
    acc = accumulator(x.dtype)
    plan = make_plan(index, n, block_size(T, n))
    weight = _routed_weight(weights, index).astype(acc)
    dbank = jnp.zeros(bank.shape, acc)

    def add_bank_gradient(m: jax.Array, dbank: jax.Array) -> jax.Array:
        token, owner = plan.token[m], plan.owner[m]
        block_weight = weight.at[token].get(mode="fill", fill_value=0)
        weighted_dy = (block_weight[:, None] * _rows(dy, token)).astype(x.dtype)
        product = jnp.dot(_rows(x, token).T, weighted_dy, preferred_element_type=acc)
        return lax.dynamic_update_index_in_dim(dbank, dbank[owner] + product, owner, 0)

    if straight_through:
        dbank = lax.fori_loop(0, plan.blocks, add_bank_gradient, dbank)
        dx, dweights = every_bank_gradient(x, bank, weights, dy)
        return dx, dbank.astype(bank.dtype), dweights

    transposed_bank = bank.astype(x.dtype).swapaxes(1, 2)

    def add_all_gradients(
        m: jax.Array, gradients: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        dx, dbank, dweight = gradients
        token = plan.token[m]
        dy_back = jnp.dot(
            _rows(dy, token), transposed_bank[plan.owner[m]], preferred_element_type=acc
        )
        dx = _set_rows(dx, token, _rows(weight, token)[:, None] * dy_back)
        dweight = _set_rows(dweight, token, jnp.sum(_rows(x, token) * dy_back, axis=1))
        return dx, add_bank_gradient(m, dbank), dweight

    start = (jnp.zeros_like(x), dbank, jnp.zeros((T,), weights.dtype))
    dx, dbank, dweight = lax.fori_loop(0, plan.blocks, add_all_gradients, start)
    return dx, dbank.astype(bank.dtype), one_hot(index, weights) * dweight[:, None]


def _routed_weight(weights: jax.Array, index: jax.Array) -> jax.Array:
    """Return each token's weight of its routed bank, (T,)."""
    return jnp.sum(weights * one_hot(index, weights), axis=1)


def _rows(array: jax.Array, token: jax.Array) -> jax.Array:
    """Gather a block's rows; padding reads the last token's, whose results are never kept."""
    return array.at[token].get(mode="clip")


def _set_rows(array: jax.Array, token: jax.Array, rows: jax.Array) -> jax.Array:
    """Write a block's rows back, dropping padding."""
    return array.at[token].set(rows.astype(array.dtype), mode="drop")
