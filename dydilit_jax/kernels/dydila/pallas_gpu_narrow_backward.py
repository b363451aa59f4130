"""The first pass backward over a narrow head's tokens (see pallas_gpu_narrow).

With g = dO / den, F and phi recomputed, M, z and den those of the forward pass:

    queries    dF = g M^T + t z (`signed`), dphi = t z (`base`), t = -F . (g M^T) / den,
               dM = sum F^T g, dz = sum t phi
    keys       dF = V dM^T + dz (`signed`), dphi = dz (`base`), dV = F dM

and from dF and dphi the gradients of the tokens' scalars (`Features.scalar_gradients`).
pallas_gpu_narrow_tokens.py has the gradients of the tokens.
"""

from __future__ import annotations

import dataclasses
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
    added,
    launch,
    load_state,
    product,
    scalars_of,
    state_types,
    total,
    write_rows,
    write_state,
)
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    QuerySums,
    denominator_gradient,
    rounded,
    rows_to_block,
    scalar_gradients,
    through_denominator,
)


def query_sums(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    d_output: jax.Array,
    m: jax.Array,
    z: jax.Array,
    den: jax.Array | None,
) -> QuerySums:
    """The first pass over queries; of a core of one pass, also the gradients of Q and Q'.

    Args:
      core: static part.
      tokens: Q, or Q and Q', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      d_output: dO (B, N, H, d) bfloat16.
      m: (B H, channels, channels) bfloat16.
      z: (B H, d) float32.
      den: (B H, covered) float32; None for the normalizer `none`.
    """
    cut, sides = Cut.of(d_output), len(tokens)
    divided = den is not None
    tells_den = divided and not core.one_pass  # as one row more
    row_count = core.summed + tells_den
    plain = dataclasses.replace(core, normalizer="none")

    def dydila_gpu_query_sums(*references: Any) -> None:
        sources, (scalars_ref, m_ref, z_ref, *rest) = (
            references[: sides + 1],
            references[sides + 1 :],
        )
        den_ref = rest.pop(0) if divided else None
        outputs = [rest.pop(0) for _ in range(sides * core.one_pass)]
        d_rows_ref = rest.pop(0) if row_count else None
        d_m_ref = rest.pop(0)
        d_z_ref = rest.pop(0) if divided else None
        blocks_s, rows_s, den_s, m_s, z_s, d_z_s, d_rows_s, summed_s, loaded, ready = rest
        head = lax.axis_index("head")
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        if den_ref is not None:
            rows.append((lambda span: den_ref.at[head, span], den_s))
        stream = Stream(cut, sources, rows, blocks_s, ready)
        load_state(cut, m_ref, z_ref, m_s, z_s, loaded)

        def first_sums(slot: jax.Array, sums: State, scale: Any) -> tuple[Any, list[Any]]:
            """F . G, and what is linear in G and in z of the scalars' gradients; puts F and phi."""
            inner, of_products, of_z = jnp.zeros((BLOCK,), jnp.float32), [], []
            for piece in cut.pieces:
                features = stream.features(core, slot, rows_s, piece)
                difference, base = features.values()
                products = product(sums.values, m_s.at[piece, :].transpose((1, 0)))
                inner = inner + jnp.sum(rounded(difference) * products, axis=1)
                if divided:
                    summed = difference if core.normalizer == "signed" else base
                    summed_s[:, piece] = summed.astype(jnp.bfloat16)
                    difference = difference * rows_to_block(scale, piece.size)
                sums.put(difference, piece)
                if core.one_pass:
                    continue
                of_products.append(scalar_gradients(plain, features, products, None))
                if divided:
                    nothing = jnp.zeros_like(products)
                    of_z.append(scalar_gradients(core, features, nothing, z_s.at[piece]))
            return inner, [added(of_products), added(of_z)]

        def tokens_of(slot: jax.Array, sums: State, scale: Any, d_den: Any) -> list[jax.Array]:
            """Writes the tokens' gradients of a core of one pass; returns the scalars'."""
            d_rows = []
            for piece in cut.pieces:
                features = stream.features(core, slot, rows_s, piece)
                d_difference = product(sums.values, m_s.at[piece, :].transpose((1, 0)))
                if divided:
                    d_difference = d_difference * rows_to_block(scale, piece.size)
                d_features = through_denominator(core, d_difference, z_s.at[piece], d_den)
                d_tokens, _ = features.token_gradients(features.d_phi(*d_features))
                for i, d_token in enumerate(d_tokens):
                    stream.write(i, slot, d_token, piece)
                d_rows.append(features.scalar_gradients(*d_features))
            return added(d_rows)

        def accumulate(sums: State) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
            def body(step: jax.Array, d_z: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot = stream.step(step)
                sums.values[...] = stream.read(sides, slot)
                plgpu.commit_smem()
                den = den_s[slot] if divided else None
                scale = None if den is None else 1.0 / den
                inner, (d_rows, of_z) = first_sums(slot, sums, scale)
                sums.add()
                d_den = None
                if den is not None and scale is not None:
                    d_den = denominator_gradient(core, den, inner)
                    more = []
                    for piece in cut.pieces:
                        summed = summed_s[:, piece].astype(jnp.float32)
                        weighted = summed * rows_to_block(d_den, piece.size)
                        more.append(jnp.sum(weighted, axis=0))
                    d_z = tuple(a + b for a, b in zip(d_z, more, strict=True))
                    d_rows = [a * scale + b * d_den for a, b in zip(d_rows, of_z, strict=True)]
                if outputs:
                    d_rows = tokens_of(slot, sums, scale, d_den)
                    plgpu.commit_smem()
                    for i, output in enumerate(outputs):
                        stream.send(i, slot, output, step)
                if d_den is not None and tells_den:
                    d_rows = [*d_rows, d_den]
                if d_rows_ref is not None:
                    write_rows(d_rows, d_rows_s, d_rows_ref, stream.span(step))
                plgpu.wgmma_wait(0)
                return d_z

            d_z = lax.fori_loop(0, cut.steps, body, cut.no_sums)
            return sums.results(), d_z

        sums, d_z = State.while_summing(cut, accumulate)
        write_state(cut, sums, d_z if divided else (), d_m_ref, d_z_ref, d_z_s)

    d_m_type, d_z_type = state_types(cut)
    rows_type = jax.ShapeDtypeStruct((cut.batch * cut.heads, row_count, cut.covered), jnp.float32)
    results = list(
        launch(
            dydila_gpu_query_sums,
            core,
            cut,
            [*tokens, d_output, scalars, m, z, *(() if den is None else (den,))],
            [
                *[jax.ShapeDtypeStruct(d_output.shape, jnp.bfloat16)] * (sides * core.one_pass),
                *[rows_type] * (row_count > 0),
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
                plgpu.SMEM((max(1, row_count), BLOCK), jnp.float32),
                cut.operand(cut.channels),
                plgpu.Barrier(num_arrivals=2),
            ],
            copies=sides + 2 + divided,
        )
    )
    d_tokens = [results.pop(0) for _ in range(sides)] if core.one_pass else None
    rows = results.pop(0) if row_count else None
    no_row = jnp.zeros((cut.batch * cut.heads, 1, cut.width), jnp.float32)
    d_m, d_z = total(core, results[0], results[1] if divided else no_row)
    d_den = rows[:, -1] if tells_den and rows is not None else None
    rows = rows[:, : core.summed] if core.summed and rows is not None else None
    return QuerySums(d_tokens, rows, d_den, d_m, d_z)


def key_sums(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    d_m: jax.Array,
    d_z: jax.Array,
) -> jax.Array:
    """The first pass over keys, which a core of one pass does without.

    Args:
      core: static part.
      tokens: K, or K and K', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      value: V (B, N, H, d) bfloat16.
      d_m: (B H, channels, channels) bfloat16.
      d_z: (B H, d) float32; ignored by the normalizer `none`.

    Returns:
      (B H, core.summed, covered) float32.
    """
    cut, sides = Cut.of(value), len(tokens)

    def dydila_gpu_key_sums(*references: Any) -> None:
        sources, (scalars_ref, d_m_ref, d_z_ref, d_rows_ref, *memory) = (
            references[: sides + 1],
            references[sides + 1 :],
        )
        blocks_s, rows_s, d_m_s, d_z_s, d_rows_s, value_s, loaded, ready = memory
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        stream = Stream(cut, sources, rows, blocks_s, ready)
        load_state(cut, d_m_ref, d_z_ref, d_m_s, d_z_s, loaded)

        @pl.loop(0, cut.steps)
        def _(step: jax.Array) -> None:
            slot = stream.step(step)
            value_s[...] = stream.read(sides, slot)
            plgpu.commit_smem()
            d_rows = []
            for piece in cut.pieces:
                features = stream.features(core, slot, rows_s, piece)
                products = product(value_s, d_m_s.at[piece, :].transpose((1, 0)))
                d_rows.append(scalar_gradients(core, features, products, d_z_s.at[piece]))
            write_rows(added(d_rows), d_rows_s, d_rows_ref, stream.span(step))

        plgpu.wait_smem_to_gmem(0)

    (rows,) = launch(
        dydila_gpu_key_sums,
        core,
        cut,
        [*tokens, value, scalars, d_m, d_z],
        [jax.ShapeDtypeStruct((cut.batch * cut.heads, core.summed, cut.covered), jnp.float32)],
        [
            cut.block(sides + 1),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            cut.state,
            plgpu.SMEM((cut.channels,), jnp.float32),
            plgpu.SMEM((core.summed, BLOCK), jnp.float32),
            cut.operand(cut.channels),
            plgpu.Barrier(num_arrivals=2),
        ],
        copies=sides + 2,
    )
    return rows
