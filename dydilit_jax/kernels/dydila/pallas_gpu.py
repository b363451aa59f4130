"""The DyDiLA core on Hopper GPUs, by Mosaic GPU kernels, with a backward that recomputes.

    O_i = Qd_i M / den_i,   M = mean_m Kd_m^T V_m              arXiv 2601.13683; per head

What needs whole tokens (the norms of the measure kernel, the lambda routers) is a few scalars for
each token: XLA computes them, and differentiates them. With u = (relu(z) + 1e-6) / s, s = max z:

    (1) c = s ||u|| / ||u^g||,   so that phi(z) = c u^g

Everything of width d happens in the kernels (pallas_gpu_kernels.py), which read Q, Q', K, K', V and
the scalars and keep M, the mean of phi(K) and den for the backward pass. In units of one
activation, B N D bfloat16 values, they read and write 6 forward and 16 backward. The scalars' own
passes over Q, Q', K and K' are XLA's, and so is the padding of a head width that is no multiple of
64 (of DyDi-LiT's sizes only XL, 288 to 320).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila import pallas_gpu_kernels as kernels
from dydilit_jax.kernels.dydila import pallas_gpu_outputs as outputs
from dydilit_jax.kernels.dydila.features import (
    RELU_OFFSET,
    CoreInputs,
    CoreOptions,
    Exponents,
    check_inputs,
    choose_lambda,
    measure_kernel,
)
from dydilit_jax.kernels.dydila.pallas_gpu_kernels import BLOCK, Core
from dydilit_jax.kernels.dydila.xla import CoreOutput
from dydilit_jax.kernels.platform import not_hopper
from dydilit_jax.kernels.sharding import CoreSharding

Tokens = tuple[jax.Array, ...]


def unsupported(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None = None
) -> str | None:
    """Why the kernels cannot run these inputs and what would; None when they can."""
    if sharding is not None:
        if sharding.sequence_size > 1:
            return "tokens split over a mesh are not in the kernels: use the implementation 'xla'"
        if inputs.query.shape[0] % sharding.batch_size:
            return f"batch {inputs.query.shape[0]} is not divisible by mesh axes {sharding.batch}"
    width = inputs.query.shape[-1] // options.heads
    for name in ("query", "key", "value", "query_redundant", "key_redundant"):
        array = getattr(inputs, name)
        if array is not None and array.dtype != jnp.bfloat16:
            return (
                f"{name} is {array.dtype}, and the tensor cores would round it: "
                "use bfloat16, or the implementation 'xla'"
            )
    if inputs.rotation is not None:
        return "rotary position is not in the kernels: use the implementation 'xla'"
    if width > kernels.WIDEST:
        return (
            f"head width {width} does not fit in shared memory, {kernels.WIDEST} would: "
            "use more heads, or the implementation 'xla'"
        )
    reason = not_hopper()
    return None if reason is None else f"{reason}: use the implementation 'xla'"


def scale_of_power(z: jax.Array, exponent: jax.Array, groups: int) -> tuple[jax.Array, ...]:
    """Equation (1): g, 1 / s and c of each token, (B, groups, N) float32, for z (B, N, D)."""
    batch, tokens, width = z.shape
    positive = jax.nn.relu(z.astype(jnp.float32)) + RELU_OFFSET
    positive = positive.reshape(batch, tokens, groups, width // groups)
    largest = jax.lax.stop_gradient(positive.max(axis=-1))
    unit = positive / largest[..., None]
    exponent = jnp.broadcast_to(jnp.asarray(exponent, jnp.float32), (batch, tokens))[..., None]
    power = jnp.exp(exponent[..., None] * jnp.log(unit))
    ratio = jnp.sqrt(jnp.sum(unit * unit, axis=-1) / jnp.sum(power * power, axis=-1))
    rows = (jnp.broadcast_to(exponent, largest.shape), 1.0 / largest, ratio * largest)
    return tuple(row.transpose(0, 2, 1) for row in rows)


def token_scalars(
    z: jax.Array,
    redundant: jax.Array | None,
    exponents: tuple[jax.Array | None, jax.Array | None],
    router: jax.Array | None,
    inputs: CoreInputs,
    options: CoreOptions,
    key: jax.Array | None,
) -> tuple[jax.Array, routing.Routing | None]:
    """The scalars that the kernels read of one side, (B, 1 or H, rows, N), and lambda's routing."""
    groups = options.heads if options.norm_scope == "head" else 1
    rows: list[jax.Array] = []
    for tensor, exponent in zip((z, redundant), exponents, strict=True):
        if tensor is not None and exponent is not None:
            rows += scale_of_power(tensor, exponent, groups)
    chosen = None
    if redundant is not None:
        assert inputs.lambdas is not None  # check_inputs
        phi, phi_redundant = (
            measure_kernel(tensor, exponent, groups=groups)
            for tensor, exponent in zip((z, redundant), exponents, strict=True)
        )
        scale, chosen = choose_lambda(phi, phi_redundant, inputs.lambdas.bank, router, options, key)
        scale = jnp.broadcast_to(scale, (*z.shape[:2], 1)).astype(jnp.float32)
        rows.append(jnp.broadcast_to(scale.transpose(0, 2, 1), (z.shape[0], groups, z.shape[1])))
    if not rows:
        rows.append(jnp.ones((z.shape[0], 1, z.shape[1]), jnp.float32))
    return jnp.stack(rows, axis=2), chosen


def rounded_up(scalars: jax.Array, core: Core) -> jax.Array:
    """Scalars for tokens up to a whole block; those added have phi = 0, and finite logarithms."""
    added = -core.tokens % BLOCK
    if not added:
        return scalars
    row = jnp.ones((core.rows, 1), jnp.float32)
    if core.powered:
        row = row.at[jnp.arange(2, core.rows, 3)].set(0.0)
    tail = jnp.broadcast_to(row, (*scalars.shape[:2], core.rows, added))
    return jnp.concatenate([scalars, tail], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    core: Core,
    query: Tokens,
    key: Tokens,
    value: jax.Array,
    query_scalars: jax.Array,
    key_scalars: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """The products and the normalisation of all heads.

    Args:
      core: static part.
      query, key: (Q,) and (K,), or (Q, Q') and (K, K'), each (B, N, H, d) bfloat16, with N and d
        multiples of 64.
      value: (B, N, H, d) bfloat16.
      query_scalars, key_scalars: (B, 1 or H, rows, N) float32.

    Returns:
      The output (B, N, H, d) bfloat16, and den (B, H, N) float32 or None. den has no gradient of
      its own: it is for telemetry.
    """
    return _forward(core, query, key, value, query_scalars, key_scalars)[0]


def _forward(
    core: Core,
    query: Tokens,
    key: Tokens,
    value: jax.Array,
    query_scalars: jax.Array,
    key_scalars: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    B, N, H, _ = value.shape
    m, z = kernels.state(core, key, key_scalars, value)
    output, den = outputs.apply(core, query, query_scalars, m, z)
    saved = (query, key, value, query_scalars, key_scalars, m, z, den)
    return (output, None if den is None else den.reshape(B, H, N)), saved


def _backward(core: Core, saved: Any, cotangents: tuple[jax.Array, Any]) -> Any:
    query, key, value, query_scalars, key_scalars, m, z, den = saved
    d_output = cotangents[0]
    d_query, d_query_rows, d_den = outputs.gradient(core, query, query_scalars, d_output, m, z, den)
    weights = None if d_den is None else jnp.stack([1.0 / den, d_den], axis=1)
    d_m, d_z = kernels.state(core, query, query_scalars, d_output, weights)
    d_key, d_key_rows, _ = outputs.gradient(core, key, key_scalars, value, d_m, d_z, None)
    plain = dataclasses.replace(core, normalizer="none")
    d_value, _ = outputs.apply(plain, key, key_scalars, d_m, d_z)

    def of_tokens(d_rows: jax.Array | None, scalars: jax.Array) -> jax.Array:
        if d_rows is None:
            return jnp.zeros_like(scalars)
        B, groups, rows, N = scalars.shape
        d_rows = d_rows.reshape(B, core.heads, rows, N)
        return d_rows if groups > 1 else d_rows.sum(axis=1, keepdims=True)

    return (
        tuple(d_query),
        tuple(d_key),
        d_value,
        of_tokens(d_query_rows, query_scalars),
        of_tokens(d_key_rows, key_scalars),
    )


fused.defvjp(_forward, _backward)


def attention(
    inputs: CoreInputs,
    options: CoreOptions,
    sharding: CoreSharding | None = None,
    *,
    interpret: Any = False,
) -> CoreOutput:
    """The core, as api.dydila_core has it, for inputs that `unsupported` has nothing against.

    Args:
      inputs: bfloat16 queries, keys, values (B, N, D) and what else the core reads.
      options: static options.
      sharding: how the batch lies on a mesh; the kernels run on each device's part of it.
      interpret: `InterpretGPUParams` of Pallas' Mosaic GPU interpreter (JAX 0.12 and newer), to run
        on a CPU; False compiles for the GPU.
    """
    check_inputs(inputs, options)
    B, N, D = inputs.query.shape
    H = options.heads
    exponents = inputs.exponents or Exponents(None, None)  # type: ignore[arg-type]
    differential = inputs.query_redundant is not None
    normalizer = "none" if options.normalizer == "rms" else options.normalizer
    powered = exponents.query is not None
    core = Core(H, D // H, N, normalizer, powered, differential, options.eps, interpret)
    keys = (None, None) if inputs.noise_key is None else jax.random.split(inputs.noise_key)
    lambdas = inputs.lambdas
    query_scalars, query_chosen = token_scalars(
        inputs.query,
        inputs.query_redundant,
        (exponents.query, exponents.query_redundant),
        None if lambdas is None else lambdas.query_router,
        inputs,
        options,
        keys[0],
    )
    key_scalars, key_chosen = token_scalars(
        inputs.key,
        inputs.key_redundant,
        (exponents.key, exponents.key_redundant),
        None if lambdas is None else lambdas.key_router,
        inputs,
        options,
        keys[1],
    )

    def heads(*tensors: jax.Array | None) -> Tokens:
        added = ((0, 0), (0, -N % BLOCK), (0, 0), (0, -core.width % BLOCK))
        split = [x.reshape(B, N, H, core.width) for x in tensors if x is not None]
        return tuple(jnp.pad(x, added) if any(map(sum, added)) else x for x in split)

    kernels_of = partial(fused, core)
    if sharding is not None:
        rows = sharding.spec("b")
        kernels_of = jax.shard_map(
            kernels_of, mesh=sharding.mesh, in_specs=rows, out_specs=rows, check_vma=False
        )
    output, den = kernels_of(
        heads(inputs.query, inputs.query_redundant),
        heads(inputs.key, inputs.key_redundant),
        heads(inputs.value)[0],
        rounded_up(query_scalars, core),
        rounded_up(key_scalars, core),
    )
    output = output[:, :N, :, : core.width]
    if options.normalizer == "rms":
        numerator = output.astype(jnp.float32)
        mean_square = jnp.mean(numerator * numerator, axis=-1, keepdims=True)
        output = (numerator * jax.lax.rsqrt(mean_square + options.eps)).astype(output.dtype)
    chosen = {"query_lambda": query_chosen, "key_lambda": key_chosen}
    return CoreOutput(
        output.reshape(B, N, D),
        None if den is None else den[..., :N].transpose(0, 2, 1),
        {name: routed for name, routed in chosen.items() if routed is not None},
    )
