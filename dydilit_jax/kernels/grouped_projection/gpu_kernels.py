"""Three Mosaic GPU kernels (Hopper) that the grouped projection is made of.

With reference.py's equations:

    routed_product   (1), and without straight-through (2) and (3) for the routed bank
    every_bank       (2) and (3) for all banks (straight-through): each product serves both
    bank_gradient    (4), the routed rows of each bank

A program is one warpgroup and multiplies one tile, 128 x 128, in steps of 64 along what is summed
over: bfloat16 operands in shared memory, sums in float32 registers. Arrays need be no multiples of
a tile: the TMA unit reads zeros beyond an array and writes nothing there. No atomics: results
repeat bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.platform import target

Ref = Any

ROWS = 128  # tokens of one tile
COLUMNS = 128  # channels of one tile
STEP = 64  # of what is summed over, in one product
SLOTS = 3  # steps whose operands are in shared memory or on their way
PROGRAMS = 2 * 132  # of `bank_gradient`: two for each multiprocessor of an H100 or H200


class Blocks(NamedTuple):
    """Tokens sorted by bank into blocks of ROWS tokens of one bank each.

    Attributes:
      token: (M, ROWS) int32, the tokens of each block; T, one past the last, where there is none.
      owner: (M,) int32, the bank of each block.
      start: (n + 1,) int32, each bank's first block, and one past the last block in use.
    """

    token: jax.Array
    owner: jax.Array
    start: jax.Array


def routed_product(
    rows: jax.Array,
    bank: jax.Array,
    weight: jax.Array,
    blocks: Blocks,
    tokens: int,
    other: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Each row times the bank of its block, put where its token is.

    Args:
      rows: (M ROWS, D) bfloat16, in the order of `blocks`; with `other`, (M ROWS, E).
      bank: (n, D, E) bfloat16.
      weight: (M ROWS,) float32.
      blocks: where the rows come from.
      tokens: T.
      other: (M ROWS, D) bfloat16, or None.

    Returns:
      w_i x_i W_u (T, E) bfloat16 and None; with `other`, w_i x_i W_u^T (T, D) and
      other_i . (x_i W_u^T), (M ROWS,) float32 in the order of `blocks`.
    """
    transposed = other is not None
    width = bank.shape[1] if transposed else bank.shape[2]
    count, parts = len(blocks.owner), pl.cdiv(width, COLUMNS)
    steps = pl.cdiv(rows.shape[1], STEP)

    def grouped_projection_rows(*references: Ref) -> None:
        rows_ref, bank_ref, weight_ref, token_ref, owner_ref, start_ref, *rest = references
        other_ref = rest.pop(0) if transposed else None
        y_ref = rest.pop(0)
        dot_ref = rest.pop(0) if transposed else None
        rows_s, bank_s, weight_s, token_s, other_s, y_s, dot_s, ready, loaded = rest
        block, part = lax.axis_index("block"), lax.axis_index("part")
        span, across = pl.ds(block * ROWS, ROWS), pl.ds(part * COLUMNS, COLUMNS)

        @pl.when(block < start_ref[bank.shape[0]])
        def _() -> None:
            owner = owner_ref[block]

            def fetch(step: jax.Array, slot: jax.Array) -> None:
                channels = pl.ds(step * STEP, STEP)
                plgpu.copy_gmem_to_smem(
                    rows_ref.at[span, channels], rows_s.at[slot], ready.at[slot]
                )
                tile = (across, channels) if transposed else (channels, across)
                plgpu.copy_gmem_to_smem(bank_ref.at[owner, *tile], bank_s.at[slot], ready.at[slot])

            plgpu.copy_gmem_to_smem(weight_ref.at[span], weight_s, loaded)
            plgpu.copy_gmem_to_smem(token_ref.at[block], token_s, loaded)
            if other_ref is not None:
                plgpu.copy_gmem_to_smem(other_ref.at[span, across], other_s, loaded)

            def multiply(product: Ref) -> jax.Array:
                def step(slot: jax.Array) -> None:
                    weights = bank_s.at[slot]
                    weights = weights.transpose((1, 0)) if transposed else weights
                    plgpu.wgmma(product, rows_s.at[slot], weights)

                pipelined(steps, fetch, step, ready)
                return product[...]

            y = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            plgpu.barrier_wait(loaded)
            y_s[...] = (y * of_rows(weight_s[...])).astype(jnp.bfloat16)
            if dot_ref is not None:
                dot_s[...] = jnp.sum(y * other_s[...].astype(jnp.float32), axis=1)
            plgpu.commit_smem()

            @pl.loop(0, ROWS)
            def _(row: jax.Array) -> None:
                token = token_s[row]

                @pl.when(token < tokens)
                def _() -> None:
                    # Rows are tiles of one row in shared memory; its swizzle goes by the address.
                    plgpu.copy_smem_to_gmem(
                        y_s.at[pl.ds(row, 1)], y_ref.at[pl.ds(token, 1), across]
                    )

            if dot_ref is not None:
                plgpu.copy_smem_to_gmem(dot_s, dot_ref.at[part, span])
            plgpu.wait_smem_to_gmem(0)

    bank_tile = (COLUMNS, STEP) if transposed else (STEP, COLUMNS)
    y, *dot = launch(
        grouped_projection_rows,
        out_type=[
            jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
            *[jax.ShapeDtypeStruct((parts, count * ROWS), jnp.float32)] * transposed,
        ],
        scratch_types=[
            plgpu.SMEM((SLOTS, ROWS, STEP), jnp.bfloat16),
            plgpu.SMEM((SLOTS, *bank_tile), jnp.bfloat16),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.int32),
            plgpu.SMEM((ROWS, COLUMNS), jnp.bfloat16),
            plgpu.SMEM((ROWS, COLUMNS), jnp.bfloat16),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2 + transposed),
        ],
        grid={"block": count, "part": parts},
    )(rows, bank, weight, *blocks, *(() if other is None else (other,)))
    return y, dot[0].sum(axis=0) if dot else None


def every_bank(
    x: jax.Array, dy: jax.Array, bank: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Equations (2) and (3) of tokens in their own order.

    Args:
      x: (T, D) bfloat16.
      dy: (T, E) bfloat16.
      bank: (n, D, E) bfloat16.
      weights: (n, T') float32, T' being T rounded up to whole blocks of ROWS.

    Returns:
      dx (T, D) bfloat16, and dweights (n, T') float32.
    """
    T, D = x.shape
    n, _, E = bank.shape
    parts, steps = pl.cdiv(D, COLUMNS), pl.cdiv(E, STEP)

    def grouped_projection_every_bank(*references: Ref) -> None:
        x_ref, dy_ref, bank_ref, weights_ref, dx_ref, dot_ref, *scratch = references
        dy_s, bank_s, x_s, dx_s, weights_s, dot_s, ready, loaded = scratch
        part = lax.axis_index("part")
        span = pl.ds(lax.axis_index("block") * ROWS, ROWS)
        across = pl.ds(part * COLUMNS, COLUMNS)

        def fetch(step: jax.Array, slot: jax.Array) -> None:
            j = lax.div(step, jnp.int32(steps))
            channels = pl.ds(lax.rem(step, jnp.int32(steps)) * STEP, STEP)
            plgpu.copy_gmem_to_smem(dy_ref.at[span, channels], dy_s.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(
                bank_ref.at[j, across, channels], bank_s.at[slot], ready.at[slot]
            )

        plgpu.copy_gmem_to_smem(x_ref.at[span, across], x_s, loaded)
        plgpu.copy_gmem_to_smem(weights_ref.at[:, span], weights_s, loaded)
        dx_s[...] = jnp.zeros((ROWS, COLUMNS), jnp.float32)
        plgpu.commit_smem()  # layouts in registers may differ: another thread reads it next
        for slot in range(min(SLOTS - 1, n * steps)):
            fetch(jnp.int32(slot), jnp.int32(slot))
        plgpu.barrier_wait(loaded)

        @pl.loop(0, n)
        def _(j: jax.Array) -> None:
            def multiply(product: Ref) -> jax.Array:
                def step(slot: jax.Array) -> None:
                    plgpu.wgmma(product, dy_s.at[slot], bank_s.at[slot].transpose((1, 0)))

                pipelined(n * steps, fetch, step, ready, first=j * steps, count=steps)
                return product[...]

            g = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            dot_s[j] = jnp.sum(g * x_s[...].astype(jnp.float32), axis=1)
            dx_s[...] = dx_s[...] + g * of_rows(weights_s[j])

        plgpu.commit_smem()
        x_s[...] = dx_s[...].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(x_s, dx_ref.at[span, across])
        plgpu.copy_smem_to_gmem(dot_s, dot_ref.at[part, :, span])
        plgpu.wait_smem_to_gmem(0)

    dx, dot = launch(
        grouped_projection_every_bank,
        out_type=[
            jax.ShapeDtypeStruct((T, D), jnp.bfloat16),
            jax.ShapeDtypeStruct((parts, *weights.shape), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((SLOTS, ROWS, STEP), jnp.bfloat16),
            plgpu.SMEM((SLOTS, COLUMNS, STEP), jnp.bfloat16),
            plgpu.SMEM((ROWS, COLUMNS), jnp.bfloat16),
            plgpu.SMEM((ROWS, COLUMNS), jnp.float32),
            plgpu.SMEM((n, ROWS), jnp.float32),
            plgpu.SMEM((n, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=2),
        ],
        grid={"block": pl.cdiv(T, ROWS), "part": parts},
    )(x, dy, bank, weights)
    return dx, dot.sum(axis=0)


def bank_gradient(x: jax.Array, dy: jax.Array, start: jax.Array) -> jax.Array:
    """Equation (4) of rows in the order of their blocks, their weights within x or dy.

    Args:
      x: (M ROWS, D) bfloat16.
      dy: (M ROWS, E) bfloat16, zero in rows without a token.
      start: (n + 1,) int32, see Blocks.

    Returns:
      (n, D, E) float32.
    """
    D, E, n = x.shape[1], dy.shape[1], len(start) - 1
    blocks = x.shape[0] // ROWS
    tiles = pl.cdiv(D, ROWS), pl.cdiv(E, COLUMNS)
    # Each writes a sum of its own: no more than the programs that fill a chip.
    splits = max(1, min(blocks, PROGRAMS // (n * tiles[0] * tiles[1])))
    steps_of_block = ROWS // STEP

    def grouped_projection_bank_gradient(
        x_ref: Ref, dy_ref: Ref, start_ref: Ref, sum_ref: Ref, x_s: Ref, dy_s: Ref, sum_s: Ref,
        ready: Ref,
    ) -> None:  # fmt: skip
        j, split = lax.axis_index("bank"), lax.axis_index("split")
        down = pl.ds(lax.axis_index("down") * ROWS, ROWS)
        across = pl.ds(lax.axis_index("across") * COLUMNS, COLUMNS)
        end = start_ref[j + 1]
        share = lax.div(end - start_ref[j] + (splits - 1), jnp.int32(splits))
        first = jnp.minimum(start_ref[j] + split * share, end)
        steps = (jnp.minimum(first + share, end) - first) * steps_of_block

        def fetch(step: jax.Array, slot: jax.Array) -> None:
            span = pl.ds(first * ROWS + step * STEP, STEP)
            plgpu.copy_gmem_to_smem(x_ref.at[span, down], x_s.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(dy_ref.at[span, across], dy_s.at[slot], ready.at[slot])

        def multiply(total: Ref) -> jax.Array:
            def step(slot: jax.Array) -> None:
                plgpu.wgmma(total, x_s.at[slot].transpose((1, 0)), dy_s.at[slot])

            pipelined(steps, fetch, step, ready)
            return total[...]

        sum_s[...] = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sum_s, sum_ref.at[split, j, down, across])
        plgpu.wait_smem_to_gmem(0)

    (sums,) = launch(
        grouped_projection_bank_gradient,
        out_type=[jax.ShapeDtypeStruct((splits, n, D, E), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((SLOTS, STEP, ROWS), jnp.bfloat16),
            plgpu.SMEM((SLOTS, STEP, COLUMNS), jnp.bfloat16),
            plgpu.SMEM((ROWS, COLUMNS), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
        ],
        grid={"bank": n, "split": splits, "down": tiles[0], "across": tiles[1]},
    )(x, dy, start)
    return sums.sum(axis=0)


def pipelined(
    steps: int | jax.Array,
    fetch: Callable[[jax.Array, jax.Array], None],
    multiply: Callable[[jax.Array], None],
    ready: Ref,
    *,
    first: jax.Array | None = None,
    count: int | None = None,
) -> None:
    """Products whose operands are fetched SLOTS - 1 steps ahead.

    Args:
      steps: of all products.
      fetch: starts the copies of a step into a slot; (step, slot).
      multiply: starts the product of a slot's operands.
      ready: SLOTS barriers that the copies arrive at.
      first, count: only these steps, the first fetches having been started before; None for all.
    """
    if first is None:
        for slot in range(SLOTS - 1):

            @pl.when(slot < steps)
            def _(slot: int = slot) -> None:
                fetch(jnp.int32(slot), jnp.int32(slot))

    begin = jnp.int32(0) if first is None else first

    @pl.loop(0, steps if count is None else count)
    def _(index: jax.Array) -> None:
        step = begin + index
        slot, ahead = lax.rem(step, jnp.int32(SLOTS)), step + (SLOTS - 1)
        plgpu.barrier_wait(ready.at[slot])
        multiply(slot)
        plgpu.wgmma_wait(1)  # the product before has left the slot that is filled now

        @pl.when(ahead < steps)
        def _() -> None:
            fetch(ahead, lax.rem(ahead, jnp.int32(SLOTS)))

    plgpu.wgmma_wait(0)


def of_rows(numbers: jax.Array) -> jax.Array:
    """A number for each row, (ROWS,), as a tile."""
    return lax.broadcast_in_dim(numbers, (ROWS, COLUMNS), (0,))


def launch(
    kernel: Any, *, out_type: Any, scratch_types: Any, grid: dict[str, int]
) -> Callable[..., list[jax.Array]]:
    """A kernel on a grid, the last axis of which varies fastest.

    Layouts of registers and shared memory are inferred for a warpgroup as a whole.
    """
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=target().interpret,
    )
