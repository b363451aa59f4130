"""The grouped projection on Hopper GPUs, by Mosaic GPU kernels (gpu_kernels.py).

wgmma takes its operands as 64 or more consecutive rows, and Hopper's TMA unit copies boxes, not
lists of rows (that came with Blackwell). So XLA gathers the rows once, sorted by bank into blocks
of 128, as xla.py's plan has them; a product then writes its rows where their tokens are, one TMA
copy a row, which saves the pass that would put them back.

In activations T x D of bfloat16 read and written, besides the banks: forward 4 (two of them the
gather); the straight-through gradient 9: three by `every_bank`, which needs no order, two gathers
of x and dy, two for the gradient of the banks. A gather in the kernel would have to copy each row
for each 128 columns of the result, in pieces of 128 bytes, and would save two of these; one that
kept 64 whole rows in shared memory would read every bank once for 64 tokens, more than it saves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dydilit_jax.kernels.grouped_projection import gpu_kernels, xla
from dydilit_jax.kernels.grouped_projection.gpu_kernels import ROWS, Blocks
from dydilit_jax.kernels.platform import not_hopper

ALIGNMENT = 64  # bfloat16 channels of the tiles that wgmma reads: widths are rounded up to it
MOST_BANKS = 16  # whose weights of 128 tokens leave `every_bank` its shared memory


def unsupported(x: jax.Array, bank: jax.Array) -> str | None:
    """Say why these kernels cannot run for x (..., D) and bank (n, D, E); None if they can."""
    n = bank.shape[0]
    if x.dtype != jnp.bfloat16:
        return f"tokens of {x.dtype}, which the tensor cores would round: it runs for bfloat16"
    if n > MOST_BANKS:
        return f"{n} banks: it runs for up to {MOST_BANKS}"
    if 0 in x.shape:
        return "there are no tokens"
    return not_hopper()


def projection(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Equation (1); arguments and results as `xla.blocks`."""
    blocks = make_blocks(index, len(bank))
    weight = gathered(routed_weight(weights, index), blocks)
    rows, cast_bank = gathered(rounded_up(x), blocks), rounded_up(bank.astype(x.dtype), 2)
    y, _ = gpu_kernels.routed_product(rows, cast_bank, weight, blocks, len(x))
    return y[:, : bank.shape[2]]


def gradient(
    x: jax.Array,
    bank: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    dy: jax.Array,
    straight_through: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) to (4); arguments and results as `reference.dense_gradient`."""
    T, n = weights.shape
    _, D, E = bank.shape
    blocks = make_blocks(index, n)
    weight = gathered(routed_weight(weights, index), blocks)
    x, dy, cast_bank = rounded_up(x), rounded_up(dy), rounded_up(bank.astype(x.dtype), 2)
    rows, dy_rows = gathered(x, blocks), gathered(dy, blocks)
    weighted = (weight[:, None] * dy_rows.astype(jnp.float32)).astype(dy.dtype)
    dbank = gpu_kernels.bank_gradient(rows, weighted, blocks.start)[:, :D, :E].astype(bank.dtype)
    if straight_through:
        padded = jnp.pad(weights.astype(jnp.float32), ((0, -T % ROWS), (0, 0)))
        dx, dweights = gpu_kernels.every_bank(x, dy, cast_bank, padded.T)
        return dx[:, :D], dbank, dweights.T[:T].astype(weights.dtype)
    dx, dot = gpu_kernels.routed_product(dy_rows, cast_bank, weight, blocks, T, other=rows)
    assert dot is not None  # with `other`
    dweight = jnp.zeros((T,), jnp.float32).at[blocks.token.reshape(-1)].set(dot, mode="drop")
    dweights = xla.one_hot(index, weights) * dweight[:, None]
    return dx[:, :D], dbank, dweights.astype(weights.dtype)


def make_blocks(index: jax.Array, banks: int) -> Blocks:
    """Sort tokens by their bank, index (T,) in [0, banks), into blocks of ROWS."""
    plan = xla.make_plan(index, banks, ROWS)
    used = jnp.where(jnp.arange(len(plan.owner)) < plan.blocks, plan.owner, banks)
    start = jnp.sum(used[:, None] < jnp.arange(banks + 1), axis=0, dtype=jnp.int32)
    return Blocks(plan.token, plan.owner, start)


def gathered(array: jax.Array, blocks: Blocks) -> jax.Array:
    """Rows of `array` (T, ...) in the order of `blocks`, zeros where there is no token."""
    return array.at[blocks.token.reshape(-1)].get(mode="fill", fill_value=0)


def routed_weight(weights: jax.Array, index: jax.Array) -> jax.Array:
    """Each token's weight of its routed bank, (T,) float32."""
    return jnp.sum(weights * xla.one_hot(index, weights), axis=1).astype(jnp.float32)


def rounded_up(array: jax.Array, axes: int = 1) -> jax.Array:
    """Zeros appended to the last axes, up to multiples of ALIGNMENT."""
    widths = [(0, 0)] * (array.ndim - axes)
    widths += [(0, -size % ALIGNMENT) for size in array.shape[-axes:]]
    return jnp.pad(array, widths) if any(map(sum, widths)) else array
