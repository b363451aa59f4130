"""The grouped projection on a TPU: each token times its routed matrix, at one pass over the tokens.

Three kernels (tpu_kernels.py), all on blocks of consecutive tokens, so that HBM is read and written
in order and once; a block's rows are sorted by bank while they are in VMEM. With reference.py's
equations:

    routed_product   (1), and without straight-through (2) and (3) for the routed bank
    every_bank       (2) and (3) for all banks (straight-through), dense: each product serves both
    bank_gradient    (4), the routed rows of each bank

Why rows are not fetched from HBM one by one: a bfloat16 array is tiled by eight rows there, and the
compiler refuses the DMA of one; an array of rows that are tiles of their own (T, 8, D / 8) costs
copies and padding; and where it works (float32) issuing the DMA of a row takes 22 to 25 bundles,
more than the row's product (20 on v5e at 1152 x 1152). Inside VMEM a row is moved in 2.2. All
counted in compiled programs, not timed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dydilit_jax.kernels.grouped_projection import tpu_kernels
from dydilit_jax.kernels.grouped_projection.tpu_kernels import LANES, TILE, columns_shape
from dydilit_jax.kernels.platform import target

DTYPES = ("bfloat16", "float32")
MIB = 2**20
# Of the 64 MiB of VMEM that a core of v5p and TPU7x has (v5e, v6e: 128).
VMEM_BUDGET = 52 * MIB
# What the compiler adds to blocks and scratch: products on their way, spilled registers.
VMEM_RESERVE = 8 * MIB
LARGEST_BLOCK = 2048
# v4 and v5p run two cores as one device and split the grid's first axis over them.
CORES = 2


class Plan(NamedTuple):
    """The counting sort of every block of R tokens; T tokens make M blocks.

    Attributes:
      order: (M, 1, R) int32, positions in the block, by bank; positions past the last token last.
      start: (M, 1, n + 1) int32, where each bank's tokens begin in `order`, and the last one's end.
    """

    order: jax.Array
    start: jax.Array


def unsupported(x: jax.Array, bank: jax.Array) -> str | None:
    """Say why these kernels cannot run for x (..., D) and bank (n, D, E); None if they can."""
    n, D, E = bank.shape
    if x.dtype not in DTYPES:
        return f"tokens of {x.dtype}: it runs for {' and '.join(DTYPES)}"
    if D % LANES or E % LANES:
        return f"a bank {bank.shape}: it runs for widths that are multiples of {LANES}"
    if min(x.shape[:-1], default=1) == 0:
        return "there are no tokens"
    if not all(_block_rows(kernel, LARGEST_BLOCK, n, D, E, x.dtype) for kernel in _VMEM):
        return (
            f"a bank {bank.shape} in {x.dtype} and its float32 gradient do not fit into "
            f"{VMEM_BUDGET // MIB} MiB of VMEM: use fewer or narrower banks"
        )
    return None


def projection(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Equation (1); arguments and results as `xla.blocks`."""
    return _routed_product(x, bank.astype(x.dtype), _routed_weight(weights, index), index)[0]


def gradient(
    x: jax.Array,
    bank: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    dy: jax.Array,
    straight_through: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) to (4); arguments and results as `reference.dense_gradient`."""
    weight = _routed_weight(weights, index)
    dbank = _bank_gradient(x, bank, weight, index, dy).astype(bank.dtype)
    cast_bank = bank.astype(x.dtype)
    if straight_through:
        dx, dweights = _every_bank(x, cast_bank, weights, dy)
    else:
        dx, dot = _routed_product(dy, cast_bank, weight, index, other=x)
        routed = jax.nn.one_hot(index, weights.shape[1], dtype=jnp.float32)
        dweights = routed * dot[:, None]
    return dx, dbank, dweights.astype(weights.dtype)


def make_plan(index: jax.Array, banks: int, rows: int, blocks: int) -> Plan:
    """Sort each block's tokens by bank.

    Position and bank make one number, so that a plain sort is stable and its result is the order: a
    few microseconds on a TPU, where a scatter would write one element after another.

    Args:
      index: (T,) integers in [0, banks).
      banks: n.
      rows: R, a power of two.
      blocks: M, at least T / R; further blocks hold no tokens.
    """
    bank = _pad(index.astype(jnp.int32), blocks * rows, banks).reshape(blocks, rows)
    order = lax.sort(bank * rows + jnp.arange(rows), dimension=1) % rows
    start = jnp.sum(bank[:, None, :] < jnp.arange(banks + 1)[:, None], axis=2, dtype=jnp.int32)
    return Plan(order[:, None, :], start[:, None, :])


def _routed_product(
    x: jax.Array,
    bank: jax.Array,
    weight: jax.Array,
    index: jax.Array,
    other: jax.Array | None = None,
) -> list[jax.Array]:
    """Launch `tpu_kernels.routed_product`.

    Args:
      x: (T, D) tokens; with `other`, (T, E).
      bank: (n, D, E) in `x.dtype`.
      weight: (T,), of the routed bank.
      index: (T,), the routed bank.
      other: (T, D), or None.

    Returns:
      [w_i x_i W_u (T, E)], or with `other` [w_i x_i W_u^T (T, D), other_i . (x_i W_u^T) (T,)].
    """
    T, width = x.shape
    n, D, E = bank.shape
    result_width = E if other is None else D
    rows = _block_rows("routed_product", T, n, D, E, x.dtype)
    blocks = pl.cdiv(T, rows)
    plan = make_plan(index, n, rows, blocks)
    specs = _Specs(rows, blocks, lambda i: i)
    inputs: list[tuple[jax.Array, pl.BlockSpec]] = [
        (plan.order, specs.scalars(rows)),
        (plan.start, specs.scalars(n + 1)),
        (x, specs.tokens(width)),
        (bank, specs.whole(bank.shape)),
        (_rows_of_blocks(weight[None], rows, blocks), specs.numbers(1)),
    ]
    outputs = [(jax.ShapeDtypeStruct((T, result_width), x.dtype), specs.tokens(result_width))]
    if other is not None:
        inputs.append((other, specs.tokens(result_width)))
        outputs.append((jax.ShapeDtypeStruct((blocks, 1, rows), jnp.float32), specs.numbers(1)))
    y, *dot = _launch(
        tpu_kernels.routed_product if other is None else tpu_kernels.routed_product_and_dot,
        "grouped_projection",
        (blocks,),
        inputs,
        outputs,
        [pltpu.VMEM(columns_shape(rows, max(D, E)), jnp.float32)] * 2,
    )
    return [y, *(numbers.reshape(-1)[:T] for numbers in dot)]


def _every_bank(
    x: jax.Array, bank: jax.Array, weights: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dx (T, D) and dweights (T, n) of all banks, for x (T, D), bank (n, D, E), dy (T, E)."""
    T, D = x.shape
    n, _, E = bank.shape
    rows = _block_rows("every_bank", T, n, D, E, x.dtype)
    blocks = pl.cdiv(T, rows)
    specs = _Specs(rows, blocks, lambda i: i)
    dx, dweights = _launch(
        tpu_kernels.every_bank,
        "grouped_projection_dx",
        (blocks,),
        [
            (x, specs.tokens(D)),
            (dy, specs.tokens(E)),
            (_rows_of_blocks(weights.T, rows, blocks), specs.numbers(n)),
            (bank, specs.whole(bank.shape)),
        ],
        [
            (jax.ShapeDtypeStruct((T, D), x.dtype), specs.tokens(D)),
            (jax.ShapeDtypeStruct((blocks, n, rows), jnp.float32), specs.numbers(n)),
        ],
        [],
    )
    return dx, dweights.swapaxes(1, 2).reshape(-1, n)[:T]


def _bank_gradient(
    x: jax.Array, bank: jax.Array, weight: jax.Array, index: jax.Array, dy: jax.Array
) -> jax.Array:
    """dbank (n, D, E) float32 for x (T, D), weight (T,), index (T,), dy (T, E)."""
    T, D = x.shape
    n, _, E = bank.shape
    rows = _block_rows("bank_gradient", T, n, D, E, x.dtype)
    blocks = pl.cdiv(T, rows)
    cores = min(CORES, blocks)
    share = pl.cdiv(blocks, cores)
    # With an odd number of blocks the last core's last one is a repetition, planned to be empty.
    plan = make_plan(index, n, rows, cores * share)
    specs = _Specs(rows, blocks, lambda core, i: core * share + i)
    (total,) = _launch(
        tpu_kernels.bank_gradient,
        "grouped_projection_dbank",
        (cores, share),
        [
            (plan.order, specs.scalars(rows)),
            (plan.start, specs.scalars(n + 1)),
            (x, specs.tokens(D)),
            (dy, specs.tokens(E)),
            (_rows_of_blocks(weight[None], rows, cores * share), specs.numbers(1)),
        ],
        [
            (
                jax.ShapeDtypeStruct((cores, n, D, E), jnp.float32),
                pl.BlockSpec(memory_space=pl.ANY),
            )
        ],
        [
            pltpu.VMEM(columns_shape(rows, max(D, E)), jnp.float32),
            pltpu.VMEM(columns_shape(rows, D), jnp.float32),
            pltpu.VMEM(columns_shape(rows, E), jnp.float32),
            pltpu.VMEM((n, D, E), jnp.float32),
            pltpu.SemaphoreType.DMA(()),
        ],
    )
    return jnp.sum(total, axis=0)


class _Specs:
    """How a program's blocks are taken from the arrays; `number` maps grid indices to a block."""

    def __init__(self, rows: int, blocks: int, number: Any):
        self.rows, self.blocks, self.number = rows, blocks, number

    def scalars(self, count: int) -> pl.BlockSpec:
        """(M, 1, count) integers, in SMEM."""
        return pl.BlockSpec(
            (1, 1, count), lambda *i: (self.number(*i), 0, 0), memory_space=pltpu.SMEM
        )

    def numbers(self, count: int) -> pl.BlockSpec:
        """(M, count, R): `count` numbers for each token."""
        return pl.BlockSpec((1, count, self.rows), lambda *i: (self.number(*i), 0, 0))

    def tokens(self, width: int) -> pl.BlockSpec:
        """(T, width), of which the last block may be incomplete."""
        return pl.BlockSpec(
            (self.rows, width), lambda *i: (jnp.minimum(self.number(*i), self.blocks - 1), 0)
        )

    def whole(self, shape: Sequence[int]) -> pl.BlockSpec:
        """All of an array, fetched once."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec(tuple(shape), lambda *i: zeros, pipeline_mode=pl.Buffered(1))


def _launch(
    body: Any,
    name: str,
    grid: tuple[int, ...],
    inputs: list[tuple[jax.Array, pl.BlockSpec]],
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: list[Any],
) -> list[jax.Array]:
    """Run a kernel on a grid whose first axis may be split over a chip's cores."""
    semantics: tuple[Any, ...] = ("parallel", "arbitrary")[: len(grid)]
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=VMEM_BUDGET + VMEM_RESERVE,
        ),
        interpret=target().interpret,
        name=name,
    )(*(array for array, _ in inputs))


# VMEM of each kernel as (tokens' blocks of D + E in and out, twice buffered), (columns of D + E),
# (bank in the tokens' dtype), (bank in float32).
_VMEM = {
    "routed_product": (3, 2, 1, 0),
    "every_bank": (3, 0, 1, 0),
    "bank_gradient": (2, 2, 0, 1),
}


def _block_rows(kernel: str, tokens: int, n: int, D: int, E: int, dtype: Any) -> int:
    """R: the largest power of two up to LARGEST_BLOCK that fits VMEM; 0 if even TILE does not.

    Larger blocks multiply fewer tiles twice, at the boundaries of banks (n - 1 of R / TILE tiles).
    """
    itemsize = jnp.dtype(dtype).itemsize
    blocks, columns, cast_bank, float_bank = _VMEM[kernel]
    fixed = n * D * E * (cast_bank * itemsize + 4 * float_bank)
    row = (D + E) * (blocks * itemsize + 4 * columns)
    rows = min(LARGEST_BLOCK, max(TILE, 2 ** math.ceil(math.log2(tokens))))
    while rows >= TILE and fixed + rows * row > VMEM_BUDGET:
        rows //= 2
    return rows if rows >= TILE else 0


def _rows_of_blocks(numbers: jax.Array, rows: int, blocks: int) -> jax.Array:
    """(count, T) numbers of each token as (M, count, R) float32."""
    count, _ = numbers.shape
    padded = _pad(numbers.astype(jnp.float32), rows * blocks, 0)
    return padded.reshape(count, blocks, rows).swapaxes(0, 1)


def _pad(array: jax.Array, length: int, value: int) -> jax.Array:
    """Append `value` to the last axis up to `length`."""
    widths = [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])]
    return jnp.pad(array, widths, constant_values=value)


def _routed_weight(weights: jax.Array, index: jax.Array) -> jax.Array:
    """Return each token's weight of its routed bank, (T,)."""
    return jnp.sum(weights * jax.nn.one_hot(index, weights.shape[1], dtype=weights.dtype), axis=1)
