"""The DyDiLA core's Mosaic GPU kernels for heads of up to 128 channels.

The sums of pallas_gpu_features.py, of which a program here holds all d channels of a head, so that
whatever reads the same tokens is one kernel:

    state            sum_i Kd_i^T V_i, sum_i phi(K_i)                         reads K, K', V
    apply            O_i = Qd_i M / den_i                                     Q, Q'; writes O
    query_sums       sum_i Qd_i^T dO_i / den_i, that for dz, gradients of c   Q, Q', dO
                     and lambda
    key_sums         gradients of c and lambda                                K, K', V
    token_gradients  dQ, dQ'                                                  Q, Q', dO
                     dK, dK', dV_i = Kd_i dM                                  K, K', V

The last three (pallas_gpu_narrow_backward.py, pallas_gpu_narrow_tokens.py) know M, z and den from
the forward pass. A core of one pass has no gradients of c and lambda that other heads wait for:
query_sums writes its dQ.
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
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    columns_to_block,
    guarded,
    rounded,
    rows_to_block,
)

# Channels of a head. One warpgroup holds the sums for dM, rounded up to 64 rows, and the product
# under way: at 128 that is 128 + 64 registers of each thread's 255, at 136 already 216 + 72. Wider
# heads take kernels that hold parts of a head, and read the tokens again for each.
WIDEST = 128


def covered(B: int, N: int, H: int, d: int) -> int:
    """Tokens of all programs: what the arrays of scalars are rounded up to."""
    return Cut(B, N, H, d).covered


def state(
    core: Core, tokens: Sequence[jax.Array], scalars: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens of F^T V and of phi (`signed`: of F).

    Args:
      core: static part.
      tokens: K, or K and K', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      value: V (B, N, H, d) bfloat16.

    Returns:
      (B H, channels, channels) and (B H, d) float32.
    """
    cut, sides = Cut.of(value), len(tokens)

    def dydila_gpu_state(*references: Any) -> None:
        sources, rest = references[: sides + 1], references[sides + 1 :]
        scalars_ref, m_ref, z_ref, blocks_s, rows_s, z_s, ready = rest
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        stream = Stream(cut, sources, rows, blocks_s, ready)

        def accumulate(sums: State) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
            def body(step: jax.Array, z: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot = stream.step(step)
                sums.values[...] = stream.read(sides, slot)
                more = []
                for piece in cut.pieces:
                    difference, base = stream.features(core, slot, rows_s, piece).values()
                    sums.put(difference, piece)
                    summed = difference if core.normalizer == "signed" else base
                    more.append(jnp.sum(rounded(summed), axis=0))
                sums.add()
                plgpu.wgmma_wait(0)
                return tuple(a + b for a, b in zip(z, more, strict=True))

            z = lax.fori_loop(0, cut.steps, body, cut.no_sums)
            return sums.results(), z

        sums, z = State.while_summing(cut, accumulate)
        write_state(cut, sums, z, m_ref, z_ref, z_s)

    m, z = launch(
        dydila_gpu_state,
        core,
        cut,
        [*tokens, value, scalars],
        state_types(cut),
        [
            cut.block(sides + 1),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((cut.channels,), jnp.float32),
        ],
        copies=sides + 2,
    )
    return total(core, m, z)


def apply(
    core: Core, tokens: Sequence[jax.Array], scalars: jax.Array, m: jax.Array, z: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """O_i = F_i M / den_i, the division as `core.normalizer` says.

    Args:
      core: static part.
      tokens: Q, or Q and Q', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, covered) float32.
      m: (B H, channels, channels) bfloat16.
      z: (B H, d) float32.

    Returns:
      O (B, N, H, d) bfloat16 and den (B H, covered) float32; None for the normalizer `none`.
    """
    cut, sides = Cut.of(tokens[0]), len(tokens)
    divided = core.normalizer != "none"

    def dydila_gpu_apply(*references: Any) -> None:
        sources, (scalars_ref, m_ref, z_ref, output_ref, *rest) = (
            references[:sides],
            references[sides:],
        )
        den_ref = rest.pop(0) if divided else None
        blocks_s, rows_s, m_s, z_s, features_s, den_s, loaded, ready = rest
        rows = [(scalars_of(scalars_ref, core.heads), rows_s)]
        stream = Stream(cut, sources, rows, blocks_s, ready)
        load_state(cut, m_ref, z_ref, m_s, z_s, loaded)
        head = lax.axis_index("head")

        @pl.loop(0, cut.steps)
        def _(step: jax.Array) -> None:
            slot = stream.step(step)
            den = jnp.zeros((BLOCK,), jnp.float32)
            for piece in cut.pieces:
                difference, base = stream.features(core, slot, rows_s, piece).values()
                features_s[:, piece] = difference.astype(jnp.bfloat16)
                summed = rounded(difference if core.normalizer == "signed" else base)
                if divided:
                    den = den + jnp.sum(summed * columns_to_block(z_s[piece]), axis=1)
            plgpu.commit_smem()
            output = product(features_s, m_s)
            if divided:
                den = guarded(den, core)
                output = output / rows_to_block(den, cut.channels)
                den_s[...] = den
            stream.write(0, slot, output)
            plgpu.commit_smem()
            stream.send(0, slot, output_ref, step)
            if den_ref is not None:
                plgpu.copy_smem_to_gmem(den_s, den_ref.at[head, stream.span(step)])

        plgpu.wait_smem_to_gmem(0)

    den_type = jax.ShapeDtypeStruct((cut.batch * cut.heads, cut.covered), jnp.float32)
    output, *den = launch(
        dydila_gpu_apply,
        core,
        cut,
        [*tokens, scalars, m, z],
        [jax.ShapeDtypeStruct(tokens[0].shape, jnp.bfloat16), *[den_type] * divided],
        [
            cut.block(sides),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            cut.state,
            plgpu.SMEM((cut.channels,), jnp.float32),
            cut.operand(cut.channels),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        copies=sides + 1,
    )
    return output, den[0] if den else None
