"""The two Mosaic GPU kernels that write tokens: `apply` and `gradient` (see pallas_gpu_kernels).

`query_gradients` and `key_gradients` are what they and `state` make of the backward pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.pallas_gpu_kernels import (
    BLOCK,
    Core,
    Features,
    Tiles,
    block_copier,
    chunks,
    columns_to_block,
    compiler_params,
    first_channel,
    guarded,
    head_index,
    rows_to_block,
    state,
    token_splits,
)


def apply(
    core: Core, tokens: Sequence[jax.Array], scalars: jax.Array, m: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Y_i = F_i M / den_i, the division as `core.normalizer` says.

    Args:
      core: static part.
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, N) float32.
      m: (B H, *Tiles(d).padded) bfloat16.
      z: (B H, d) float32.

    Returns:
      Y (B, N, H, d) bfloat16 and den (B H, N) float32; None for the normalizer `none`.
    """
    B, N, H, d = tokens[0].shape
    tiles = Tiles(d)
    columns, count = tiles.columns, tiles.count
    blocks = -(-N // BLOCK)
    programs, steps = chunks(B, N, H, tiles.parts)
    normalised = core.normalizer != "none"

    def kernel(*references: Any) -> None:
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
        kernel,
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
    return y, den[0][:, 0] if den else None


def gradient(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    m: jax.Array,
    z: jax.Array,
    den: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array | None]:
    """Gradients of Z, Z' and the tokens' scalars.

    Args:
      core: static part.
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, N) float32.
      value: (B, N, H, d) bfloat16: dO for queries, V for keys.
      m: (B H, *Tiles(d).padded) bfloat16: M for queries, dM for keys.
      z: (B H, d) float32: z for queries, dz for keys.
      den: (B H, N) float32 for queries; None for keys, and without a denominator.

    Returns:
      Gradients of the tokens (B, N, H, d) bfloat16; of the learned scalars (B H, learned, N)
      float32, None if there are none; and of den (B H, N) float32, None without den.
    """
    B, N, H, d = value.shape
    count = Tiles(d).count
    blocks = -(-N // BLOCK)
    divided = den is not None
    sides = len(tokens)
    learned = len(core.learned)

    def kernel(*references: Any) -> None:
        sources, (scalars_ref, value_ref, m_ref, z_ref, *rest) = (
            references[:sides],
            references[sides:],
        )
        den_ref = rest.pop(0) if divided else None
        outputs, scratch = rest[:sides], rest[sides:]
        d_rows_ref = scratch.pop(0) if learned else None
        d_den_ref = scratch.pop(0) if divided else None
        blocks_s, rows_s, value_s, m_s, z_s, den_s, out_s, d_rows_s, d_den_s = scratch[:9]
        ready, m_ready, loaded = scratch[9:]
        b, h, zero = head_index(core.heads)
        head, span = lax.axis_index("head"), pl.ds(lax.axis_index("block") * BLOCK, BLOCK)
        start_blocks = block_copier(
            core, sources, scalars_ref, [blocks_s.at[i] for i in range(sides)], rows_s, ready
        )
        for tile in range(count):
            across = pl.ds(first_channel(d) + tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(value_ref.at[b, span, h, across], value_s.at[tile], loaded)
            channels = pl.ds(zero + tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(z_ref.at[head, channels], z_s.at[tile], loaded)
        if den_ref is not None:
            plgpu.copy_gmem_to_smem(den_ref.at[head, span], den_s, loaded)
        plgpu.barrier_wait(loaded)

        def product(tile: jax.Array) -> tuple[Features, jax.Array]:
            """The features of a tile of channels, and Y M^T there."""
            plgpu.commit_smem()  # every warp has read the tile that this one overwrites
            start_blocks(lax.axis_index("block"), tile, zero)
            channels = pl.ds(tile * BLOCK, BLOCK)
            for part in range(count):
                across = pl.ds(zero + part * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(m_ref.at[head, channels, across], m_s.at[part], m_ready)
            plgpu.barrier_wait(ready.at[zero])
            plgpu.barrier_wait(m_ready)

            def multiply(acc: Any) -> jax.Array:
                for part in range(count):
                    plgpu.wgmma(acc, value_s.at[part], m_s.at[part].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return acc[...]

            y = pl.run_scoped(multiply, plgpu.ACC((BLOCK, BLOCK), jnp.float32))
            blocks_in = [blocks_s[i, zero] for i in range(sides)]
            return Features.of(core, blocks_in, rows_s.at[zero]), y

        scale, d_den = None, None
        if divided:
            # dO . (F M) = F . (dO M^T), which the gradient needs anyway.
            def project(tile: jax.Array, total: jax.Array) -> jax.Array:
                features, y = product(tile)
                difference = features.values()[0].astype(jnp.bfloat16).astype(jnp.float32)
                return total + jnp.sum(difference * y, axis=1)

            projected = lax.fori_loop(0, count, project, jnp.zeros((BLOCK,), jnp.float32))
            den = den_s[...]
            scale = 1.0 / den
            d_den = -projected * scale * scale
            if core.normalizer == "signed":  # where it was held at eps, den is a constant
                d_den = jnp.where(jnp.abs(den) <= core.eps, 0.0, d_den)

        def differentiate(tile: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            features, d_difference = product(tile)
            if scale is not None:
                d_difference = d_difference * rows_to_block(scale)
            d_base = jnp.zeros((BLOCK, BLOCK), jnp.float32)
            if core.normalizer != "none":
                through_den = columns_to_block(z_s[tile])
                if d_den is not None:
                    through_den = through_den * rows_to_block(d_den)
                if core.normalizer == "signed":
                    d_difference = d_difference + through_den
                else:
                    d_base = through_den
            d_tokens, d_rows = features.gradients(d_difference, d_base)
            plgpu.wait_smem_to_gmem(0)  # the tile before has left out_s
            for i, d_token in enumerate(d_tokens):
                out_s[i] = d_token.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for i, output in enumerate(outputs):
                channels = pl.ds(first_channel(d) + tile * BLOCK, BLOCK)
                plgpu.copy_smem_to_gmem(out_s.at[i], output.at[b, span, h, channels])
            return tuple(total + row for total, row in zip(totals, d_rows, strict=True))

        zeros = jnp.zeros((BLOCK,), jnp.float32)
        totals = lax.fori_loop(0, count, differentiate, (zeros,) * learned)
        for row, total in enumerate(totals):
            d_rows_s[row] = total
        if d_den is not None:
            d_den_s[...] = d_den
        plgpu.commit_smem()
        if d_rows_ref is not None:
            plgpu.copy_smem_to_gmem(d_rows_s, d_rows_ref.at[head, :, span])
        if d_den_ref is not None:
            plgpu.copy_smem_to_gmem(d_den_s, d_den_ref.at[head, span])
        plgpu.wait_smem_to_gmem(0)

    d_rows_type = jax.ShapeDtypeStruct((B * H, learned, blocks * BLOCK), jnp.float32)
    d_den_type = jax.ShapeDtypeStruct((B * H, blocks * BLOCK), jnp.float32)
    results = plgpu.kernel(
        kernel,
        out_type=[
            *[jax.ShapeDtypeStruct((B, N, H, d), jnp.bfloat16)] * sides,
            *[d_rows_type] * (learned > 0),
            *[d_den_type] * divided,
        ],
        scratch_types=[
            plgpu.SMEM((sides, 1, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((1, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((count, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((count, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((count, BLOCK), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.SMEM((sides, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((max(1, learned), BLOCK), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=sides + 1, num_barriers=1),
            plgpu.Barrier(num_arrivals=count),
            plgpu.Barrier(num_arrivals=2 * count + divided),
        ],
        grid=(B * H, blocks),
        grid_names=("head", "block"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*tokens, scalars, value, m, z, *(() if den is None else (den,)))
    d_rows = results[sides] if learned else None
    return list(results[:sides]), d_rows, results[-1] if divided else None


def covered(B: int, N: int, H: int, d: int) -> int:
    """Tokens of all programs: what the arrays of scalars are rounded up to."""
    return BLOCK * max(
        math.prod(chunks(B, N, H, Tiles(d).parts)), math.prod(token_splits(B, N, H, d))
    )


def query_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    d_output: jax.Array,
    m: jax.Array,
    z: jax.Array,
    den: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array, jax.Array]:
    """Gradients of Q, Q' (B, N, H, d) and their scalars (B H, learned, N); sums for dM and dz.

    Arguments are those of `gradient` for queries; the sums are as `state` has them.
    """
    d_tokens, d_rows, d_den = gradient(core, tokens, scalars, d_output, m, z, den)
    weights = None
    if den is not None:
        assert d_den is not None
        weights = jnp.stack([1.0 / den, d_den], axis=1)
    d_m, d_z = state(core, tokens, scalars, d_output, weights)
    return d_tokens, d_rows, d_m, d_z


def key_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    d_m: jax.Array,
    d_z: jax.Array,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array]:
    """Gradients of K, K' (B, N, H, d), of their scalars (B H, learned, N), and of V (B, N, H, d).

    Arguments are those of `gradient` for keys.
    """
    d_tokens, d_rows, _ = gradient(core, tokens, scalars, value, d_m, d_z, None)
    plain = dataclasses.replace(core, normalizer="none")
    d_value, _ = apply(plain, tokens, scalars, d_m, d_z)
    return d_tokens, d_rows, d_value
