"""The two kernels of a narrow head's backward pass (see pallas_gpu_narrow).

With g = dO / den, F and phi recomputed, M, z and den those of the forward pass:

    query_gradients    dF = g M^T + t z (`signed`), dphi = t z (`base`), t = -F . (g M^T) / den,
                       dM = sum F^T g, dz = sum t phi
    key_gradients      dF = V dM^T + dz (`signed`), dphi = dz (`base`), dV = F dM

and from dF and dphi the gradients of Z, Z' and of the tokens' scalars (`Features.gradients`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.pallas_gpu_blocks import (
    Cut,
    State,
    Stream,
    launch,
    load_state,
    product,
    scalars_of,
    state_types,
    total,
    write_state,
)
from dydilit_jax.kernels.dydila.pallas_gpu_kernels import (
    BLOCK,
    Core,
    columns_to_block,
    rows_to_block,
)


def write_rows(rows: Sequence[jax.Array], rows_s: Any, reference: Any, span: Any) -> None:
    """Writes the gradients of a block's scalars to (B H, learned, covered)."""
    for row, values in enumerate(rows):
        rows_s[row] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_s, reference.at[lax.axis_index("head"), :, span])


def query_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    d_output: jax.Array,
    m: jax.Array,
    z: jax.Array,
    den: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array, jax.Array]:
    """Gradients of Q, Q' and their scalars, and the sums for those of M and z.

    Args:
      core: static part.
      tokens: Q, or Q and Q', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      d_output: dO (B, N, H, d) bfloat16.
      m: (B H, channels, channels) bfloat16.
      z: (B H, d) float32.
      den: (B H, covered) float32; None for the normalizer `none`.

    Returns:
      Gradients of the tokens (B, N, H, d) bfloat16; of the scalars (B H, learned, covered) float32,
      None if there are none; sums over the tokens (B H, channels, channels) and (B H, d) float32,
      the latter zero without den.
    """
    cut, sides = Cut.of(d_output), len(tokens)
    learned, divided = len(core.learned), den is not None

    def kernel(*references: Any) -> None:
        sources, (scalars_ref, m_ref, z_ref, *rest) = (
            references[: sides + 1],
            references[sides + 1 :],
        )
        den_ref = rest.pop(0) if divided else None
        outputs, rest = rest[:sides], rest[sides:]
        d_rows_ref = rest.pop(0) if learned else None
        d_m_ref = rest.pop(0)
        d_z_ref = rest.pop(0) if divided else None
        blocks_s, rows_s, den_s, m_s, z_s, d_z_s, d_rows_s, loaded, ready = rest
        head = lax.axis_index("head")
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        if den_ref is not None:
            rows.append((lambda span: den_ref.at[head, span], den_s))
        stream = Stream(cut, sources, rows, blocks_s, ready)
        load_state(cut, m_ref, z_ref, m_s, z_s, loaded)

        def accumulate(sums: State) -> tuple[list[jax.Array], jax.Array]:
            def body(step: jax.Array, d_z: jax.Array) -> jax.Array:
                slot = stream.step(step)
                features = stream.features(core, slot, rows_s)
                difference, base = features.values()
                sums.values[...] = stream.read(sides, slot)
                plgpu.commit_smem()
                d_difference = product(sums.values, m_s.transpose((1, 0)))
                d_base = jnp.zeros_like(d_difference)
                if divided:
                    den = den_s[slot]
                    scale = 1.0 / den
                    rounded = difference.astype(jnp.bfloat16).astype(jnp.float32)
                    d_den = -jnp.sum(rounded * d_difference, axis=1) * scale * scale
                    if core.normalizer == "signed":  # where it was held at eps, den is a constant
                        d_den = jnp.where(jnp.abs(den) <= core.eps, 0.0, d_den)
                    across = rows_to_block(d_den, cut.channels)
                    through_den = columns_to_block(z_s[...]) * across
                    scale_block = rows_to_block(scale, cut.channels)
                    d_difference, difference = d_difference * scale_block, difference * scale_block
                    if core.normalizer == "signed":
                        d_difference = d_difference + through_den
                        summed = rounded
                    else:
                        d_base = through_den
                        summed = base.astype(jnp.bfloat16).astype(jnp.float32)
                    d_z = d_z + jnp.sum(summed * across, axis=0)
                sums.add(difference)
                d_tokens, d_rows = features.gradients(d_difference, d_base)
                for i, d_token in enumerate(d_tokens):
                    stream.write(i, slot, d_token)
                plgpu.commit_smem()
                for i, output in enumerate(outputs):
                    stream.send(i, slot, output, step)
                if d_rows_ref is not None:
                    write_rows(d_rows, d_rows_s, d_rows_ref, stream.span(step))
                plgpu.wgmma_wait(0)
                return d_z

            zeros = jnp.zeros((cut.channels,), jnp.float32)
            d_z = lax.fori_loop(0, cut.steps, body, zeros)
            return sums.results(), d_z

        sums, d_z = State.while_summing(cut, accumulate)
        write_state(cut, sums, d_z if divided else None, d_m_ref, d_z_ref, d_z_s)

    d_m_type, d_z_type = state_types(cut)
    d_rows_type = jax.ShapeDtypeStruct((cut.batch * cut.heads, learned, cut.covered), jnp.float32)
    results = launch(
        kernel,
        core,
        cut,
        [*tokens, d_output, scalars, m, z, *(() if den is None else (den,))],
        [
            *[jax.ShapeDtypeStruct(d_output.shape, jnp.bfloat16)] * sides,
            *[d_rows_type] * (learned > 0),
            d_m_type,
            *[d_z_type] * divided,
        ],
        [
            cut.block(sides + 1),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((2, BLOCK), jnp.float32),
            cut.state,
            plgpu.SMEM((cut.channels,), jnp.float32),
            plgpu.SMEM((cut.channels,), jnp.float32),
            plgpu.SMEM((max(1, learned), BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        copies=sides + 2 + divided,
    )
    d_rows = results[sides] if learned else None
    d_m = results[sides + (learned > 0)]
    no_row = jnp.zeros((cut.batch * cut.heads, 1, cut.width), jnp.float32)
    return list(results[:sides]), d_rows, *total(core, d_m, results[-1] if divided else no_row)


def key_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    d_m: jax.Array,
    d_z: jax.Array,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array]:
    """Gradients of K, K', their scalars and V.

    Args:
      core: static part.
      tokens: K, or K and K', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      value: V (B, N, H, d) bfloat16.
      d_m: (B H, channels, channels) bfloat16.
      d_z: (B H, d) float32; ignored by the normalizer `none`.

    Returns:
      Gradients of the tokens (B, N, H, d) bfloat16; of the scalars (B H, learned, covered) float32,
      None if there are none; and of V (B, N, H, d) bfloat16.
    """
    cut, sides = Cut.of(value), len(tokens)
    learned = len(core.learned)

    def kernel(*references: Any) -> None:
        sources, (scalars_ref, d_m_ref, d_z_ref, *rest) = (
            references[: sides + 1],
            references[sides + 1 :],
        )
        outputs, rest = rest[: sides + 1], rest[sides + 1 :]
        d_rows_ref = rest.pop(0) if learned else None
        blocks_s, rows_s, d_m_s, d_z_s, d_rows_s, features_s, value_s, loaded, ready = rest
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        stream = Stream(cut, sources, rows, blocks_s, ready)
        load_state(cut, d_m_ref, d_z_ref, d_m_s, d_z_s, loaded)

        @pl.loop(0, cut.steps)
        def _(step: jax.Array) -> None:
            slot = stream.step(step)
            features = stream.features(core, slot, rows_s)
            features_s[...] = features.values()[0].astype(jnp.bfloat16)
            value_s[...] = stream.read(sides, slot)
            plgpu.commit_smem()
            stream.write(sides, slot, product(features_s, d_m_s))
            d_difference = product(value_s, d_m_s.transpose((1, 0)))
            d_base = jnp.zeros_like(d_difference)
            if core.normalizer == "signed":
                d_difference = d_difference + columns_to_block(d_z_s[...])
            elif core.normalizer == "base":
                d_base = columns_to_block(d_z_s[...])
            d_tokens, d_rows = features.gradients(d_difference, d_base)
            for i, d_token in enumerate(d_tokens):
                stream.write(i, slot, d_token)
            plgpu.commit_smem()
            for i, output in enumerate(outputs):
                stream.send(i, slot, output, step)
            if d_rows_ref is not None:
                write_rows(d_rows, d_rows_s, d_rows_ref, stream.span(step))

        plgpu.wait_smem_to_gmem(0)

    d_rows_type = jax.ShapeDtypeStruct((cut.batch * cut.heads, learned, cut.covered), jnp.float32)
    results = launch(
        kernel,
        core,
        cut,
        [*tokens, value, scalars, d_m, d_z],
        [
            *[jax.ShapeDtypeStruct(value.shape, jnp.bfloat16)] * (sides + 1),
            *[d_rows_type] * (learned > 0),
        ],
        [
            cut.block(sides + 1),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            cut.state,
            plgpu.SMEM((cut.channels,), jnp.float32),
            plgpu.SMEM((max(1, learned), BLOCK), jnp.float32),
            cut.operand(cut.channels),
            cut.operand(cut.channels),
            plgpu.Barrier(num_arrivals=2),
        ],
        copies=sides + 2,
    )
    return list(results[:sides]), results[-1] if learned else None, results[sides]
