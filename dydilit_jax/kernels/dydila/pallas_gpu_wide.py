"""The DyDiLA core's Mosaic GPU kernels for wide heads, of which a program holds parts.

The sums of pallas_gpu_features.py, in blocks of 64 tokens by 64 channels, in the tiles that wgmma
reads: 8 tokens by 64, 32 or 16 channels, of which N and d are multiples. Here `state` and `apply`;
pallas_gpu_wide_backward.py has what only gradients need.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    PROGRAMS,
    Core,
    Features,
    columns_to_block,
    compiler_params,
    first_channel,
    guarded,
    head_index,
    rows_to_block,
)

WIDEST = 704  # channels of a head: a gradient keeps 64 rows of M, 90 KB, and most of a block of Y
STATE_BYTES = 150_000  # of a program's 227 KB of shared memory, for `apply`'s columns of M
FEWEST_BLOCKS = 4  # of tokens that one program of `state` sums


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a head of d channels is cut: `count` blocks of 64, and `columns` of M at a time."""

    width: int

    @property
    def count(self) -> int:
        """Blocks of 64 channels."""
        return -(-self.width // BLOCK)

    @property
    def columns(self) -> int:
        """At most 256 (one wgmma), as many as leave M's columns room; 0 for too wide a head."""
        if self.width > WIDEST:
            return 0
        for parts in range(1, self.count + 1):
            columns = BLOCK * -(-self.count // parts)
            if columns <= 256 and 2 * columns * self.count * BLOCK <= STATE_BYTES:
                return columns
        return 0

    @property
    def parts(self) -> int:
        """How many times `columns` cover a head."""
        return -(-self.width // self.columns)

    @property
    def padded(self) -> tuple[int, int]:
        """Shape of M in memory: whole blocks, zero beyond d."""
        return self.count * BLOCK, self.parts * self.columns


def block_copier(
    core: Core,
    tokens: Sequence[Any],
    scalars: Any,
    into: Sequence[Any],
    rows_into: Any,
    barrier: Any,
) -> Callable[[jax.Array, jax.Array, jax.Array], None]:
    """Starts the copies of one block of Z, Z' and of the tokens' scalars: (block, tile, slot)."""
    b, h, _ = head_index(core.heads)
    group = h if scalars.shape[1] > 1 else 0
    origin = first_channel(tokens[0].shape[-1])

    def start(block: jax.Array, tile: jax.Array, slot: jax.Array) -> None:
        for source, target in zip(tokens, into, strict=True):
            span, channels = pl.ds(block * BLOCK, BLOCK), pl.ds(origin + tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(
                source.at[b, span, h, channels], target.at[slot], barrier.at[slot]
            )
        rows = scalars.at[b, group, :, pl.ds(block * BLOCK, BLOCK)]
        plgpu.copy_gmem_to_smem(rows, rows_into.at[slot], barrier.at[slot])

    return start


def state(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sums over tokens M and z of each head.

    Args:
      core: static part; `normalizer` says whether z sums phi (`base`) or F (`signed`).
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      value: (B, N, H, d) bfloat16.
      weights: (B H, 2, covered) float32, w and x; None for ones.

    Returns:
      M (B H, *Tiles(d).padded) and z (B H, d) float32, zero beyond the head's width.
    """
    B, N, H, d = value.shape
    tiles = Tiles(d)
    columns, (padded_rows, padded_columns) = tiles.columns, tiles.padded
    splits, steps = token_splits(B, N, H, d)

    def dydila_gpu_state(*references: Any) -> None:
        sources, (scalars_ref, value_ref, *rest) = (
            references[: len(tokens)],
            references[len(tokens) :],
        )
        weights_ref = rest.pop(0) if weights is not None else None
        m_ref, z_ref, blocks_s, value_s, rows_s, weights_s, features_s, m_s, z_s, ready = rest
        b, h, _ = head_index(core.heads)
        head, split = lax.axis_index("head"), lax.axis_index("split")
        tile = lax.div(lax.axis_index("tile"), jnp.int32(tiles.parts))
        part = lax.rem(lax.axis_index("tile"), jnp.int32(tiles.parts))
        start_blocks = block_copier(
            core, sources, scalars_ref, [blocks_s.at[i] for i in range(len(tokens))], rows_s, ready
        )

        def fetch(step: jax.Array, slot: jax.Array) -> None:
            block = split * steps + step
            start_blocks(block, tile, slot)
            span = pl.ds(block * BLOCK, BLOCK)
            channels = pl.ds(first_channel(d) + part * columns, columns)
            plgpu.copy_gmem_to_smem(
                value_ref.at[b, span, h, channels], value_s.at[slot], ready.at[slot]
            )
            if weights_ref is not None:
                rows = weights_ref.at[head, :, pl.ds(block * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(rows, weights_s.at[slot], ready.at[slot])

        fetch(jnp.int32(0), jnp.int32(0))

        def accumulate(m: Any) -> tuple[jax.Array, jax.Array]:
            def body(step: jax.Array, total: jax.Array) -> jax.Array:
                slot = lax.rem(step, jnp.int32(2))

                @pl.when(step + 1 < steps)
                def _() -> None:
                    fetch(step + 1, lax.rem(step + 1, jnp.int32(2)))

                plgpu.barrier_wait(ready.at[slot])
                blocks_in = [blocks_s[i, slot] for i in range(len(tokens))]
                features = Features.of(core, blocks_in, rows_s.at[slot])
                difference, base = features.values()
                summed = difference if core.normalizer == "signed" else base
                summed = summed.astype(jnp.bfloat16).astype(jnp.float32)
                if weights_ref is not None:
                    difference = difference * rows_to_block(weights_s[slot, 0])
                    summed = summed * rows_to_block(weights_s[slot, 1])
                features_s[slot] = difference.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.wgmma(m, features_s.at[slot].transpose((1, 0)), value_s.at[slot])
                plgpu.wgmma_wait(0)
                return total + summed

            total = lax.fori_loop(0, steps, body, jnp.zeros((BLOCK, BLOCK), jnp.float32))
            return m[...], jnp.sum(total, axis=0)

        m_s[...], z_s[...] = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, columns), jnp.float32))
        plgpu.commit_smem()
        channels, span = pl.ds(tile * BLOCK, BLOCK), pl.ds(part * columns, columns)
        plgpu.copy_smem_to_gmem(m_s, m_ref.at[head, split, channels, span])
        # Every part computes the same z; they write it to places of their own.
        plgpu.copy_smem_to_gmem(z_s, z_ref.at[head, split, part, channels])
        plgpu.wait_smem_to_gmem(0)

    copies = len(tokens) + 2 + (weights is not None)
    m, z = plgpu.kernel(
        dydila_gpu_state,
        out_type=[
            jax.ShapeDtypeStruct((B * H, splits, padded_rows, padded_columns), jnp.float32),
            jax.ShapeDtypeStruct((B * H, splits, tiles.parts, padded_rows), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((len(tokens), 2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((2, BLOCK, columns), jnp.bfloat16),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((2, 2, BLOCK), jnp.float32),
            plgpu.SMEM((2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((BLOCK, columns), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=2),
        ],
        grid=(B * H, tiles.count * tiles.parts, splits),
        grid_names=("head", "tile", "split"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*tokens, scalars, value, *(() if weights is None else (weights,)))
    # Channels beyond the width hold zeros, whose phi is not quite zero.
    inside = jnp.arange(padded_rows) < core.width
    m = jnp.where(inside[:, None], m.sum(axis=1), 0.0)
    return m, jnp.where(inside, z[:, :, 0].sum(axis=1), 0.0)


def token_splits(B: int, N: int, H: int, d: int) -> tuple[int, int]:
    """Programs of `state` along the tokens, and blocks of tokens for each."""
    tiles, blocks = Tiles(d), -(-N // BLOCK)
    wanted = -(-PROGRAMS // (B * H * tiles.count * tiles.parts))
    splits = max(1, min(wanted, blocks // FEWEST_BLOCKS))
    return splits, -(-blocks // splits)


def chunks(B: int, N: int, H: int, parts: int) -> tuple[int, int]:
    """Programs along the tokens, and blocks of tokens for each: M is read once by a program."""
    blocks = -(-N // BLOCK)
    count = min(blocks, max(1, -(-PROGRAMS // (B * H * parts)), -(-blocks // 16)))
    steps = math.ceil(blocks / count)
    return -(-blocks // steps), steps


def apply(
    core: Core, tokens: Sequence[jax.Array], scalars: jax.Array, m: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Y_i = F_i M / den_i, the division as `core.normalizer` says.

    Args:
      core: static part.
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      m: (B H, *Tiles(d).padded) bfloat16.
      z: (B H, d) float32.

    Returns:
      Y (B, N, H, d) bfloat16 and den (B H, covered) float32; None for the normalizer `none`.
    """
    B, N, H, d = tokens[0].shape
    tiles = Tiles(d)
    columns, count = tiles.columns, tiles.count
    blocks = -(-N // BLOCK)
    programs, steps = chunks(B, N, H, tiles.parts)
    normalised = core.normalizer != "none"

    def dydila_gpu_apply(*references: Any) -> None:
        sources, rest = references[: len(tokens)], references[len(tokens) :]
        scalars_ref, m_ref, z_ref, y_ref, *scratch = rest
        den_ref = scratch.pop(0) if normalised else None
        blocks_s, rows_s, m_s, z_s, features_s, y_s, den_s, ready, loaded = scratch
        b, h, zero = head_index(core.heads)
        head, part = lax.axis_index("head"), lax.axis_index("part")
        first = lax.axis_index("chunk") * steps
        start_blocks = block_copier(
            core, sources, scalars_ref, [blocks_s.at[i] for i in range(len(tokens))], rows_s, ready
        )

        def fetch(step: jax.Array) -> None:
            start_blocks(
                first + lax.div(step, jnp.int32(count)),
                lax.rem(step, jnp.int32(count)),
                lax.rem(step, jnp.int32(2)),
            )

        for tile in range(count):
            channels = pl.ds(zero + tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(
                m_ref.at[head, channels, pl.ds(part * columns, columns)], m_s.at[tile], loaded
            )
            plgpu.copy_gmem_to_smem(z_ref.at[head, channels], z_s.at[tile], loaded)
        fetch(zero)
        plgpu.barrier_wait(loaded)

        @pl.loop(0, steps)
        def _(block: jax.Array) -> None:
            def multiply(y: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
                def body(tile: jax.Array, den: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    step = block * count + tile
                    slot = lax.rem(step, jnp.int32(2))

                    @pl.when(step + 1 < steps * count)
                    def _() -> None:
                        fetch(step + 1)

                    plgpu.barrier_wait(ready.at[slot])
                    blocks_in = [blocks_s[i, slot] for i in range(len(tokens))]
                    features = Features.of(core, blocks_in, rows_s.at[slot])
                    difference, base = features.values()
                    features_s[slot] = difference.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    plgpu.wgmma(y, features_s.at[slot], m_s.at[tile])
                    plgpu.wgmma_wait(0)
                    if not normalised:
                        return ()
                    summed = difference if core.normalizer == "signed" else base
                    summed = summed.astype(jnp.bfloat16).astype(jnp.float32)
                    return (den[0] + jnp.sum(summed * columns_to_block(z_s[tile]), axis=1),)

                zeros = (jnp.zeros((BLOCK,), jnp.float32),) * normalised
                den = lax.fori_loop(0, count, body, zeros)
                return y[...], den

            y, product = pl.run_scoped(multiply, plgpu.ACC((BLOCK, columns), jnp.float32))
            start = (first + block) * BLOCK
            plgpu.wait_smem_to_gmem(0)  # the block before has left y_s and den_s
            if den_ref is not None:
                den = guarded(product[0], core)
                den_s[...] = den
                y = y / lax.broadcast_in_dim(den, y.shape, (0,))
            y_s[...] = y.astype(jnp.bfloat16)
            plgpu.commit_smem()
            span, channels = pl.ds(start, BLOCK), pl.ds(first_channel(d) + part * columns, columns)
            plgpu.copy_smem_to_gmem(y_s, y_ref.at[b, span, h, channels])
            if den_ref is not None:
                plgpu.copy_smem_to_gmem(den_s, den_ref.at[head, part, pl.ds(start, BLOCK)])

        plgpu.wait_smem_to_gmem(0)

    den_type = jax.ShapeDtypeStruct((B * H, tiles.parts, blocks * BLOCK), jnp.float32)
    y, *den = plgpu.kernel(
        dydila_gpu_apply,
        out_type=[jax.ShapeDtypeStruct((B, N, H, d), jnp.bfloat16), *[den_type] * normalised],
        scratch_types=[
            plgpu.SMEM((len(tokens), 2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((count, BLOCK, columns), jnp.bfloat16),
            plgpu.SMEM((count, BLOCK), jnp.float32),
            plgpu.SMEM((2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((BLOCK, columns), jnp.bfloat16),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=len(tokens) + 1, num_barriers=2),
            plgpu.Barrier(num_arrivals=2 * count),
        ],
        grid=(B * H, tiles.parts, programs),
        grid_names=("head", "part", "chunk"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*tokens, scalars, m, z)
    if not den:
        return y, None
    added = covered(B, N, H, d) - blocks * BLOCK
    return y, jnp.pad(den[0][:, 0], ((0, 0), (0, added)), constant_values=1.0)


def covered(B: int, N: int, H: int, d: int) -> int:
    """Tokens of all programs: what the arrays of scalars are rounded up to."""
    tiles = Tiles(d)
    each = (
        token_splits(B, N, H, d),
        chunks(B, N, H, tiles.parts),
        chunks(B, N, H, tiles.count),
    )
    return BLOCK * max(map(math.prod, each))
