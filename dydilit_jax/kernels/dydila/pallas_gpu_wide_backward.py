"""The kernels of a wide head's backward pass (see pallas_gpu_wide).

With F and phi recomputed, M, z and den those of the forward pass, in a tile of 64 channels

    queries    dF = G / den + t z (`signed`), dphi = t z (`base`), t = -F . G / den^2,  G = dO M^T
    keys       dF = G + dz (`signed`), dphi = dz (`base`), dV = F dM,                   G = V dM^T

A program holds the 64 rows of M of its tile and goes through blocks of tokens; for each it reads a
tile of Z and Z', and all channels of Y. It knows F . G of its own tile only. But sums over channels
are linear in G and z: query_sums leaves those of G, of z and of F . G, for each tile, and XLA adds
them up. The gradients of Q, which a core of one pass has from query_sums too, are not such sums;
there a program holds 64 tokens of dO and goes through the tiles of M's rows, twice if t is wanted.

In activations, query_sums reads 6 (`state` for dM, dz is half of it), key_sums 3, token_gradients
moves 5, and 3 for dV; of a core of one pass query_sums moves 8.
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

from dydilit_jax.kernels.dydila.pallas_gpu_blocks import product
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    Features,
    Known,
    QuerySums,
    TokenGradients,
    denominator_gradient,
    rounded,
    rows_to_block,
    scalar_gradients,
    through_denominator,
    zeros_up,
)
from dydilit_jax.kernels.dydila.pallas_gpu_wide import apply, covered, state
from dydilit_jax.kernels.dydila.pallas_gpu_wide_stream import Stream, Walk, launch


def named(tokens: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """Z, or Z and Z', as a kernel's operands."""
    return {f"tokens{side}": x for side, x in enumerate(tokens)}


def row_sums(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    y: jax.Array,
    m: jax.Array,
    z: jax.Array,
    *,
    apart: bool,
) -> jax.Array:
    """Sums over channels, (B H, rows, covered) float32, of each token.

    Those that `core.summed` counts; or `apart` F . G, then these sums of G, then of z.
    """
    walk = Walk(y.shape)
    row_count = 1 + 2 * core.summed if apart else core.summed
    plain = dataclasses.replace(core, normalizer="none")

    def dydila_gpu_row_sums(of: dict[str, Any]) -> None:
        stream = Stream(core, walk, of)

        @pl.loop(0, walk.steps)
        def _(step: jax.Array) -> None:
            slot, features, products = stream.step(step)
            z_s = of["z_s"].at[slot]
            if apart:
                of_z = scalar_gradients(core, features, jnp.zeros_like(products), z_s)
                of_products = scalar_gradients(plain, features, products, z_s)
                rows = [inner(features, products), *of_products, *of_z]
            else:
                rows = scalar_gradients(core, features, products, z_s)
            stream.write_rows(step, rows)

        plgpu.wait_smem_to_gmem(0)

    operands = {**named(tokens), "scalars": scalars, "y": y, "m": m, "z": z}
    rows = launch(dydila_gpu_row_sums, core, walk, operands, {"rows": walk.rows(row_count)})["rows"]
    return zeros_up(rows.sum(axis=1), covered(*y.shape))


def inner(features: Features, products: jax.Array) -> jax.Array:
    """F . G of a tile, (64,), F as it was multiplied forward."""
    return jnp.sum(rounded(features.values()[0]) * products, axis=1)


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
      m: (B H, *Tiles(d).padded) bfloat16.
      z: (B H, d) float32.
      den: (B H, covered) float32; None for the normalizer `none`.
    """
    d_tokens, d_den = None, None
    if core.one_pass:
        d_tokens, rows, d_den = query_gradients(core, tokens, scalars, d_output, m, z, den)
    elif den is None:
        rows = row_sums(core, tokens, scalars, d_output, m, z, apart=False)
    else:
        parts = row_sums(core, tokens, scalars, d_output, m, z, apart=True)
        d_den = denominator_gradient(core, den, parts[:, 0])
        of_products, of_z = parts[:, 1 : 1 + core.summed], parts[:, 1 + core.summed :]
        rows = of_products / den[:, None] + of_z * d_den[:, None]
    weights = None
    if den is not None:
        assert d_den is not None
        weights = jnp.stack([1.0 / den, d_den], axis=1)
    d_m, d_z = state(core, tokens, scalars, d_output, weights)
    return QuerySums(d_tokens, rows, None if core.one_pass else d_den, d_m, d_z)


def query_gradients(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    d_output: jax.Array,
    m: jax.Array,
    z: jax.Array,
    den: jax.Array | None,
) -> tuple[list[jax.Array], jax.Array | None, jax.Array | None]:
    """Gradients of Q, Q' of a core of one pass, of their scalars, and of the denominator.

    Arguments are those of `query_sums`.
    """
    sides, divided = len(tokens), den is not None
    walk = Walk(d_output.shape, rounds=1 + divided)
    row_count = core.summed + divided

    def dydila_gpu_query_gradients(of: dict[str, Any]) -> None:
        stream = Stream(core, walk, of)
        zeros = jnp.zeros((BLOCK,), jnp.float32)
        scale, d_den = None, None
        if divided:

            def project(step: jax.Array, known: tuple[Any, Any]) -> tuple[Any, Any]:
                slot, features, products = stream.step(step)
                return known[0] + inner(features, products), of["den_s"][slot]

            projected, den_row = lax.fori_loop(0, walk.tiles, project, (zeros, zeros))
            scale = 1.0 / den_row
            d_den = denominator_gradient(core, den_row, projected)

        def differentiate(step: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot, features, d_difference = stream.step(step)
            if scale is not None:
                d_difference = d_difference * rows_to_block(scale)
            d_features = through_denominator(core, d_difference, of["z_s"].at[slot], d_den)
            d_tokens, _ = features.token_gradients(features.d_phi(*d_features))
            for side, d_token in enumerate(d_tokens):
                stream.write_tokens(step, side, d_token)
            d_rows = features.scalar_gradients(*d_features)
            return tuple(total + row for total, row in zip(totals, d_rows, strict=True))

        first, last = walk.tiles * divided, walk.steps
        totals = lax.fori_loop(first, last, differentiate, (zeros,) * core.summed)
        if row_count:
            stream.write_rows(jnp.int32(0), [*totals, *([] if d_den is None else [d_den])])
        plgpu.wait_smem_to_gmem(0)

    operands = {**named(tokens), "scalars": scalars, "y": d_output, "m": m, "z": z}
    if den is not None:
        operands["den"] = den
    results: dict[str, Any] = {f"d_tokens{side}": walk.like_tokens for side in range(sides)}
    if row_count:
        results["rows"] = walk.rows(row_count)
    found = launch(dydila_gpu_query_gradients, core, walk, operands, results)
    d_tokens = [found[f"d_tokens{side}"] for side in range(sides)]
    if not row_count:
        return d_tokens, None, None
    rows = zeros_up(found["rows"][:, 0], covered(*d_output.shape))
    d_rows = rows[:, : core.summed] if core.summed else None
    return d_tokens, d_rows, rows[:, -1] if divided else None


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
      d_m: (B H, *Tiles(d).padded) bfloat16.
      d_z: (B H, d) float32; ignored by the normalizer `none`.

    Returns:
      (B H, core.summed, covered) float32.
    """
    return row_sums(core, tokens, scalars, value, d_m, d_z, apart=False)


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
      m: (B H, *Tiles(d).padded) bfloat16: M for queries, dM for keys.
      z: (B H, d) float32: z for queries, dz for keys; ignored by the normalizer `none`.
      with_value: whether F M is wanted: dV, for keys.
    """
    sides, walk = len(tokens), Walk(y.shape)
    row_count = core.summed if core.one_pass else core.powers
    operands = {**named(tokens), "y": y, "m": m, "z": z}
    operands |= {name: x for name, x in known._asdict().items() if x is not None}
    results: dict[str, Any] = {f"d_tokens{side}": walk.like_tokens for side in range(sides)}
    if row_count:
        results["rows"] = walk.rows(row_count)
    choices = 0
    if known.router is not None:
        choices = known.router.shape[2]
        added = walk.tiles * BLOCK - known.router.shape[3]
        operands["router"] = jnp.pad(known.router, ((0, 0), (0, 0), (0, 0), (0, added)))
        shape = (sides, *walk.grid, BLOCK, choices)
        results["d_router"] = jax.ShapeDtypeStruct(shape, jnp.float32)

    def dydila_gpu_token_gradients(of: dict[str, Any]) -> None:
        def go_through(*d_router: Any) -> list[jax.Array]:
            stream = Stream(core, walk, of)

            @pl.loop(0, walk.steps)
            def _(step: jax.Array) -> None:
                slot, features, d_difference = stream.step(step)
                weight = None
                if known.weights is not None:
                    scale, weight = of["weights_s"][slot, 0], of["weights_s"][slot, 1]
                    d_difference = d_difference * rows_to_block(scale)
                d_features = through_denominator(core, d_difference, of["z_s"].at[slot], weight)
                d_phi = features.d_phi(*d_features)
                d_rows = features.scalar_gradients(*d_features) if core.one_pass else []
                # One side after the other: registers have no room for the powers of both.
                for i, side in enumerate(features.sides):
                    if d_router:
                        d_logits = of["d_logits_s"].at[slot]
                        d_phi[i] = d_phi[i] + product(d_logits, of["router_s"].at[i])
                        of["features_s"][...] = side.value().astype(jnp.bfloat16)
                        plgpu.commit_smem()
                        plgpu.wgmma(d_router[i], of["features_s"].transpose((1, 0)), d_logits)
                    d_token, d_g = side.gradient(d_phi[i])
                    d_rows += d_g
                    if d_router:
                        plgpu.wgmma_wait(0)
                    stream.write_tokens(step, i, d_token)
                if row_count:
                    stream.write_rows(step, d_rows)

            plgpu.wait_smem_to_gmem(0)
            return [sums[...] for sums in d_router]

        if not choices:
            go_through()
            return
        accumulators = [plgpu.ACC((BLOCK, choices), jnp.float32)] * sides
        program = [lax.axis_index(name) for name in ("head", "tile", "chunk")]
        for side, total in enumerate(pl.run_scoped(go_through, *accumulators)):
            of["d_router_s"][...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(of["d_router_s"], of["d_router"].at[side, *program])
            plgpu.wait_smem_to_gmem(0)

    found = launch(dydila_gpu_token_gradients, core, walk, operands, results)
    value = None
    if with_value:
        plain = dataclasses.replace(core, normalizer="none")
        value, _ = apply(plain, tokens, known.scalars, m, z)
    rows, router = found.get("rows"), found.get("d_router")
    if rows is not None:
        rows = zeros_up(rows.sum(axis=1), covered(*y.shape))
    if router is not None:
        B, _, H, d = y.shape
        router = router.sum(axis=3).reshape(sides, B, H, -1, choices)[:, :, :, :d]
    return TokenGradients([found[f"d_tokens{side}"] for side in range(sides)], value, rows, router)
