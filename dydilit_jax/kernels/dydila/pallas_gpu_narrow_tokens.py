"""The last pass backward over a narrow head's tokens (see pallas_gpu_narrow_backward).

It knows what the first pass over all heads has left of each token (`Known`), and so the gradients
of F and phi with all that comes through the denominator, the norms and the routers.
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
    added,
    in_tiles,
    launch,
    load_state,
    product,
    scalars_of,
    write_rows,
    write_sums,
)
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    Known,
    TokenGradients,
    head_index,
    rows_to_block,
    through_denominator,
)


def token_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    known: Known,
    y: jax.Array,
    m: jax.Array,
    z: jax.Array,
    *,
    with_value: bool,
) -> TokenGradients:
    """The last pass over queries or keys.

    Args:
      core: static part.
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      known: what is known of each token and of the router.
      y: (B, N, H, d) bfloat16: dO for queries, V for keys.
      m: (B H, channels, channels) bfloat16: M for queries, dM for keys.
      z: (B H, d) float32: z for queries, dz for keys; ignored by the normalizer `none`.
      with_value: whether F M is wanted: dV, for keys.
    """
    cut, sides = Cut.of(y), len(tokens)
    row_count = core.summed if core.one_pass else core.powers
    choices = 0 if known.router is None else known.router.shape[2]
    router = known.router
    if router is not None:
        router = jnp.pad(router, ((0, 0), (0, 0), (0, 0), (0, cut.channels - cut.width)))
    heads = cut.batch * cut.heads
    operands = {
        "scalars": known.scalars,
        "through_norms": known.through_norms,
        "weights": known.weights,
        "d_logits": known.d_logits,
        "router": router,
        "m": m,
        "z": z,
    }
    rows_type = jax.ShapeDtypeStruct((heads, row_count, cut.covered), jnp.float32)
    router_shape = (sides, heads, cut.programs, BLOCK * cut.halves, choices)
    router_type = jax.ShapeDtypeStruct(router_shape, jnp.float32)
    results = {
        "value": jax.ShapeDtypeStruct(y.shape, jnp.bfloat16) if with_value else None,
        "rows": rows_type if row_count else None,
        "d_router": router_type if choices else None,
    }
    scratch: dict[str, Any] = {
        "blocks_s": cut.block(sides + 1),
        "rows_s": plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
        "through_norms_s": plgpu.SMEM((2, max(1, 3 * core.powers), BLOCK), jnp.float32),
        "weights_s": plgpu.SMEM((2, 2, BLOCK), jnp.float32),
        "m_s": cut.state,
        "z_s": plgpu.SMEM((cut.channels,), jnp.float32),
        "d_rows_s": plgpu.SMEM((max(1, row_count), BLOCK), jnp.float32),
        "y_s": cut.operand(cut.channels),
        "loaded": plgpu.Barrier(num_arrivals=2),
    }
    if with_value:
        scratch["features_s"] = cut.operand(cut.channels)
    if choices:
        scratch["d_logits_s"] = in_tiles(16, 2, BLOCK, choices)
        scratch["router_s"] = in_tiles(16, sides, choices, cut.channels)
        scratch["router_loaded"] = plgpu.Barrier(num_arrivals=sides)
    given = {name: array for name, array in operands.items() if array is not None}
    wanted = {name: array for name, array in results.items() if array is not None}

    def dydila_gpu_token_gradients(*references: Any) -> None:
        names = [*given, *range(sides), *wanted, *scratch, "ready"]
        sources, of = (
            references[: sides + 1],
            dict(zip(names, references[sides + 1 :], strict=True)),
        )
        head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
        b, h, _ = head_index(core.heads)
        rows = [(scalars_of(of["scalars"], core.heads), of["rows_s"])]
        if "through_norms" in given:
            rows.append((scalars_of(of["through_norms"], core.heads), of["through_norms_s"]))
        if "weights" in given:
            rows.append((lambda span: of["weights"].at[head, :, span], of["weights_s"]))
        if choices:
            rows.append((lambda span: of["d_logits"].at[b, span], of["d_logits_s"]))
        stream = Stream(cut, sources, rows, of["blocks_s"], of["ready"])
        load_state(cut, of["m"], of["z"], of["m_s"], of["z_s"], of["loaded"])
        if choices:
            for i in range(sides):
                plgpu.copy_gmem_to_smem(
                    of["router"].at[i, h], of["router_s"].at[i], of["router_loaded"]
                )
            plgpu.barrier_wait(of["router_loaded"])
        through_norms_s = of["through_norms_s"] if "through_norms" in given else None

        def gradients_of(slot: jax.Array, piece: Any, sums: State | None) -> list[jax.Array]:
            """Writes those of a piece's channels; returns its part of the rows."""
            columns = piece.size
            features = stream.features(core, slot, of["rows_s"], piece, through_norms_s)
            d_difference = product(of["y_s"], of["m_s"].at[piece, :].transpose((1, 0)))
            weight = None
            if "weights" in given:
                scale, weight = of["weights_s"][slot, 0], of["weights_s"][slot, 1]
                d_difference = d_difference * rows_to_block(scale, columns)
            d_features = through_denominator(core, d_difference, of["z_s"].at[piece], weight)
            d_phi = features.d_phi(*d_features)
            if sums is not None:
                d_logits = of["d_logits_s"].at[slot]
                for i, side in enumerate(features.sides):
                    d_phi[i] = d_phi[i] + product(d_logits, of["router_s"].at[i, :, piece])
                    sums.put(side.value(), piece, i)
            d_tokens, d_rows = features.token_gradients(d_phi)
            if core.one_pass:
                d_rows = features.scalar_gradients(*d_features)
            for i, d_token in enumerate(d_tokens):
                stream.write(i, slot, d_token, piece)
            return d_rows

        def body(step: jax.Array, sums: State | None) -> None:
            slot = stream.step(step)
            of["y_s"][...] = stream.read(sides, slot)
            if with_value:
                for piece in cut.pieces:
                    features = stream.features(core, slot, of["rows_s"], piece)
                    of["features_s"][:, piece] = features.values()[0].astype(jnp.bfloat16)
            plgpu.commit_smem()
            if with_value:
                stream.write(sides, slot, product(of["features_s"], of["m_s"]))
            d_rows = [gradients_of(slot, piece, sums) for piece in cut.pieces]
            if sums is not None:
                sums.add(of["d_logits_s"].at[slot])
            plgpu.commit_smem()
            for i in range(sides):
                stream.send(i, slot, of[i], step)
            if with_value:
                stream.send(sides, slot, of["value"], step)
            if row_count:
                write_rows(added(d_rows), of["d_rows_s"], of["rows"], stream.span(step))
            plgpu.wgmma_wait(0)

        def loop(sums: State | None) -> list[list[jax.Array]]:
            pl.loop(0, cut.steps)(lambda step: body(step, sums))
            return [] if sums is None else [sums.results(i) for i in range(sides)]

        d_router = State.while_summing_each(cut, sides, choices, loop) if choices else loop(None)
        plgpu.wait_smem_to_gmem(0)
        for i, halves in enumerate(d_router):
            write_sums(halves, of["d_router"].at[i, head, chunk])

    if with_value:
        dydila_gpu_token_gradients.__name__ = "dydila_gpu_key_gradients"  # it computes more
    tensor = jax.ShapeDtypeStruct(y.shape, jnp.bfloat16)
    out = list(
        launch(
            dydila_gpu_token_gradients,
            core,
            cut,
            [*tokens, y, *given.values()],
            [*[tensor] * sides, *wanted.values()],
            list(scratch.values()),
            copies=sides + 2 + sum(x is not None for x in known[1:4]),
        )
    )
    by_name = dict(zip(wanted, out[sides:], strict=True))
    d_router = by_name.get("d_router")
    if d_router is not None:
        d_router = d_router.sum(axis=2)[:, :, : cut.width]
        d_router = d_router.reshape(sides, cut.batch, cut.heads, cut.width, choices)
    return TokenGradients(out[:sides], by_name.get("value"), by_name.get("rows"), d_router)
