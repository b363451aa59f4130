"""Bodies of the grouped projection's TPU kernels; pallas_tpu.py launches them.

A program holds a block of R consecutive tokens in VMEM. Its rows are brought into the order of
their banks, multiplied 128 at a time by the bank (or at a boundary, the banks) they belong to, and
brought back. Rows move inside VMEM only: one at a time, by strided loads and stores.

A block is stored for that as *columns*: float32, 128 lanes wide, column c of row r at line
c (R + 1) + r. A row is then every (R + 1)-th line, and since R + 1 is odd its lines lie in
different memory banks: one instruction moves eight of them. (With an even stride the compiler emits
one instruction for each line.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Ref = Any

LANES = 128
# Rows of a product: the fewest that keep the matrix unit busy while the next weights are loaded.
TILE = 128
# Rows moved by one iteration of a loop: enough to hide the latency of loading their numbers.
UNROLL = 16


def columns_shape(rows: int, width: int) -> tuple[int, int]:
    """Shape of a block of `rows` tokens stored as columns."""
    return (width // LANES * (rows + 1), LANES)


def routed_product(
    order: Ref,
    start: Ref,
    x: Ref,
    bank: Ref,
    weight: Ref,
    y: Ref,
    first: Ref,
    second: Ref,
    *,
    other: Ref | None = None,
    dot: Ref | None = None,
) -> None:
    """y_i = w_i x_i W_u for a block of tokens.

    Args:
      order: (1, 1, R) in SMEM, the block's tokens by bank.
      start: (1, 1, n + 1) in SMEM, where each bank's tokens begin in `order`.
      x: (R, D).
      bank: (n, D, E).
      weight: (1, 1, R).
      y: (R, E), written.
      first, second: scratch blocks of columns.
      other, dot: (R, E) and (1, 1, R). With them W_u^T multiplies, and `dot` becomes
        other_i . (x_i W_u^T).
    """
    rows, width = x.shape
    result_width = y.shape[1]

    write_columns(first, x, rows, width)
    move_rows(order, first, second, rows, width, into_order=True)

    def multiply(j: jax.Array, tile: jax.Array) -> None:
        tokens = read_columns(second, tile * TILE, rows, width).astype(x.dtype)
        product = contract(tokens, bank[j], 1, 0 if other is None else 1)
        mask = in_run(start, j, tile)
        for c in range(result_width // LANES):
            lines = first.at[pl.ds(c * (rows + 1) + tile * TILE, TILE), :]
            lines[...] = jnp.where(mask, product[:, c * LANES : (c + 1) * LANES], lines[...])

    for_each_product(start, bank.shape[0], multiply)
    move_rows(order, first, second, rows, result_width, into_order=False)

    @for_each_tile(rows)
    def _(row: jax.Array) -> None:
        weights = to_column(weight[0, :, pl.ds(row, TILE)])
        total = jnp.zeros((TILE, LANES), jnp.float32)
        for c in range(result_width // LANES):
            here = (pl.ds(row, TILE), slice(c * LANES, (c + 1) * LANES))
            product = second[pl.ds(c * (rows + 1) + row, TILE), :]
            y[here] = (weights * product).astype(y.dtype)
            if other is not None:
                total += other[here].astype(jnp.float32) * product
        if dot is not None:
            dot[0, :, pl.ds(row, TILE)] = to_row(total)


def routed_product_and_dot(
    order: Ref,
    start: Ref,
    x: Ref,
    bank: Ref,
    weight: Ref,
    other: Ref,
    y: Ref,
    dot: Ref,
    first: Ref,
    second: Ref,
) -> None:
    """`routed_product` with W_u^T and `dot`, its references in the order of a launch."""
    routed_product(order, start, x, bank, weight, y, first, second, other=other, dot=dot)


def every_bank(x: Ref, dy: Ref, weights: Ref, bank: Ref, dx: Ref, dweights: Ref) -> None:
    """dx_i = sum_j w_ij dy_i W_j^T and dw_ij = x_i . (dy_i W_j^T) for a block of tokens.

    Args:
      x: (R, D).
      dy: (R, E).
      weights: (1, n, R).
      bank: (n, D, E).
      dx: (R, D), written.
      dweights: (1, n, R), written.
    """
    rows, width = x.shape

    @for_each_tile(rows)
    def _(row: jax.Array) -> None:
        here = pl.ds(row, TILE)
        total = jnp.zeros((TILE, width), jnp.float32)
        for j in range(bank.shape[0]):
            dy_back = contract(dy[here, :], bank[j], 1, 1)
            weight = to_column(weights[0, pl.ds(j, 1), here])
            total += jnp.concatenate([weight] * (width // LANES), axis=1) * dy_back
            terms = x[here, :].astype(jnp.float32) * dy_back
            dweights[0, pl.ds(j, 1), here] = to_row(
                sum(terms[:, c : c + LANES] for c in range(0, width, LANES))
            )
        dx[here, :] = total.astype(dx.dtype)


def bank_gradient(
    order: Ref,
    start: Ref,
    x: Ref,
    dy: Ref,
    weight: Ref,
    dbank: Ref,
    unsorted: Ref,
    sorted_x: Ref,
    sorted_dy: Ref,
    total: Ref,
    done: Ref,
) -> None:
    """dW_j = sum over the tokens routed to j of w_i x_i^T dy_i.

    The grid is (cores, blocks of a core); a core's sum stays in VMEM until its last block.

    Args:
      order, start, weight: as for `routed_product`.
      x: (R, D).
      dy: (R, E).
      dbank: (cores, n, D, E) float32 in HBM, written.
      unsorted, sorted_x, sorted_dy: scratch blocks of columns.
      total: (n, D, E) float32 scratch.
      done: DMA semaphore.
    """
    rows, width = x.shape
    result_width = dy.shape[1]
    core, block = pl.program_id(0), pl.program_id(1)

    @pl.when(block == 0)
    def clear() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    write_columns(unsorted, x, rows, width)
    move_rows(order, unsorted, sorted_x, rows, width, into_order=True)
    write_columns(unsorted, dy, rows, result_width, weight)
    move_rows(order, unsorted, sorted_dy, rows, result_width, into_order=True)

    def multiply(j: jax.Array, tile: jax.Array) -> None:
        # Rows of other banks count nothing; those past the last token may hold anything, even NaN.
        mask = in_run(start, j, tile)
        tokens, gradient = (
            jnp.concatenate(
                [
                    jnp.where(mask, lines, 0.0)
                    for lines in column_list(columns, tile * TILE, rows, across)
                ],
                axis=1,
            ).astype(x.dtype)
            for columns, across in ((sorted_x, width), (sorted_dy, result_width))
        )
        total[j] += contract(tokens, gradient, 0, 0)

    for_each_product(start, total.shape[0], multiply)

    @pl.when(block == pl.num_programs(1) - 1)
    def write() -> None:
        copy = pltpu.make_async_copy(total, dbank.at[core], done)
        copy.start()
        copy.wait()


def contract(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """Product of two matrices over the given axes, summed in float32 without rounding float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def for_each_product(start: Ref, banks: int, body: Callable[[jax.Array, jax.Array], None]) -> None:
    """Calls `body(bank, tile)` for every bank and every tile of sorted rows that has its tokens."""

    def of_bank(j: jax.Array, _: None) -> None:
        begin, end = start[0, 0, j], start[0, 0, j + 1]
        # lax.div: for counts `//` means the same and lowers to more.
        lower = lax.div(begin, TILE)
        upper = jnp.where(end > begin, lax.div(end + TILE - 1, TILE), lower)
        lax.fori_loop(lower, upper, lambda tile, _: body(j, tile), None)

    lax.fori_loop(0, banks, of_bank, None)


def for_each_tile(rows: int) -> Callable[[Callable[[jax.Array], None]], None]:
    """Decorator: runs the function at the first row of every tile of a block."""

    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, rows // TILE, lambda i, _: body(pl.multiple_of(i * TILE, TILE)), None)

    return run


def in_run(start: Ref, j: jax.Array, tile: jax.Array) -> jax.Array:
    """Which rows of a tile of sorted rows belong to bank j: (TILE, LANES)."""
    row = tile * TILE + lax.broadcasted_iota(jnp.int32, (TILE, LANES), 0)
    return (row >= start[0, 0, j]) & (row < start[0, 0, j + 1])


def move_rows(
    order: Ref, source: Ref, target: Ref, rows: int, width: int, *, into_order: bool
) -> None:
    """Brings a block's rows into the order of their banks, or back out of it."""

    def move(position: jax.Array, _: None) -> None:
        token = order[0, 0, position]
        here, there = (token, position) if into_order else (position, token)
        count, stride = width // LANES, rows + 1
        target[pl.ds(there, count, stride), :] = source[pl.ds(here, count, stride), :]

    lax.fori_loop(0, rows, move, None, unroll=UNROLL)


def write_columns(
    columns: Ref, block: Ref, rows: int, width: int, weight: Ref | None = None
) -> None:
    """Stores a block (R, width), times its rows' weights (1, 1, R) if given, as columns."""

    @for_each_tile(rows)
    def _(row: jax.Array) -> None:
        here = pl.ds(row, TILE)
        scale = None if weight is None else to_column(weight[0, :, here])
        for c in range(width // LANES):
            value = block[here, c * LANES : (c + 1) * LANES].astype(jnp.float32)
            columns[pl.ds(c * (rows + 1) + row, TILE), :] = (
                value if scale is None else scale * value
            )


def column_list(columns: Ref, row: jax.Array, rows: int, width: int) -> list[jax.Array]:
    """The columns of TILE rows of a block, each (TILE, LANES) float32."""
    return [columns[pl.ds(c * (rows + 1) + row, TILE), :] for c in range(width // LANES)]


def read_columns(columns: Ref, row: jax.Array, rows: int, width: int) -> jax.Array:
    """TILE rows of a block: (TILE, width) float32."""
    return jnp.concatenate(column_list(columns, row, rows, width), axis=1)


def to_column(row: jax.Array) -> jax.Array:
    """(1, TILE) numbers, one for each row, as (TILE, LANES) with equal lanes."""
    return jnp.broadcast_to(row, (LANES, TILE)).T


def to_row(terms: jax.Array) -> jax.Array:
    """Sum over lanes of (TILE, LANES), as (1, TILE)."""
    return jnp.sum(terms.T, axis=0, keepdims=True)
