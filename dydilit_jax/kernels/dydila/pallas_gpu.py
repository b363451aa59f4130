"""The DyDiLA core on Hopper GPUs, by Mosaic GPU kernels, with a backward that recomputes.

    O_i = Qd_i M / den_i,   M = mean_m Kd_m^T V_m              arXiv 2601.13683; per head

What needs whole tokens (the norms of the measure kernel, the lambda routers) is a few scalars for
each token: XLA computes them, and differentiates them. With u = (relu(z) + 1e-6) / s, s = max z:

    (1) c = s ||u|| / ||u^g||,   so that phi(z) = c u^g

The products, and all that only they need, happen in kernels, which read Q, Q', K, K', V and the
scalars and keep M, the mean of phi(K) and den for the backward pass. In units of one activation,
B N D bfloat16 values, and besides M and the scalars, they read and write 6 forward, and backward

    11  for heads of up to 128 channels (pallas_gpu_narrow.py), nothing padded,
    16  for wider ones (pallas_gpu_kernels.py, pallas_gpu_outputs.py), where a program does not hold
        all of M and its gradient.

The scalars' own passes are XLA's and come on top. They move several times as much: XLA writes the
features of all channels in float32 for lambda's routers (docs/kernels.md has the bytes).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila import pallas_gpu_kernels as kernels
from dydilit_jax.kernels.dydila import pallas_gpu_narrow as narrow
from dydilit_jax.kernels.dydila import pallas_gpu_narrow_backward as narrow_backward
from dydilit_jax.kernels.dydila import pallas_gpu_outputs as wide
from dydilit_jax.kernels.dydila.features import (
    RELU_OFFSET,
    CoreInputs,
    CoreOptions,
    Exponents,
    check_inputs,
    choose_lambda,
    measure_kernel,
)
from dydilit_jax.kernels.dydila.pallas_gpu_kernels import Core, means
from dydilit_jax.kernels.dydila.xla import CoreOutput
from dydilit_jax.kernels.platform import not_hopper
from dydilit_jax.kernels.sharding import CoreSharding

Tokens = tuple[jax.Array, ...]


class HeadKernels(NamedTuple):
    """Kernels for heads of some widths, of the same arguments and results."""

    state: Callable[..., Any]
    apply: Callable[..., Any]
    query_gradients: Callable[..., Any]
    key_gradients: Callable[..., Any]
    covered: Callable[[int, int, int, int], int]


NARROW = HeadKernels(
    narrow.state,
    narrow.apply,
    narrow_backward.query_gradients,
    narrow_backward.key_gradients,
    narrow.covered,
)
WIDE = HeadKernels(
    kernels.state, wide.apply, wide.query_gradients, wide.key_gradients, wide.covered
)


def kernels_for(width: int) -> HeadKernels:
    """The kernels for heads of a width: those that hold a whole head wherever one fits."""
    return NARROW if width <= narrow.WIDEST else WIDE


def rounded_sizes(width: int, tokens: int) -> tuple[int, int]:
    """Channels and tokens that arrays of heads are padded to in memory, few if any.

    The TMA unit wants rows of a multiple of 16 bytes, and whole tiles of 8 tokens (and, for wide
    heads, of 16 channels).
    """
    granule = narrow.ALIGNMENT if width <= narrow.WIDEST else 16
    return -(-width // granule) * granule, -(-tokens // 8) * 8


def unsupported(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None = None
) -> str | None:
    """Why the kernels cannot run these inputs and what would; None when they can."""
    if sharding is not None:
        tokens = inputs.query.shape[1]
        if tokens % sharding.sequence_size:
            return (
                f"{tokens} tokens are not divisible by mesh axis {sharding.sequence!r} of "
                f"{sharding.sequence_size}"
            )
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


def rounded_up(scalars: jax.Array, core: Core, covered: int) -> jax.Array:
    """Scalars for all tokens that programs cover; those added have phi = 0, finite logarithms."""
    added = covered - scalars.shape[-1]
    if not added:
        return scalars
    is_scale = core.powered and (jnp.arange(core.rows) % 3 == 2)
    row = jnp.where(is_scale, 0.0, 1.0).astype(jnp.float32).reshape(-1, 1)
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
        as `rounded_sizes` has them.
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
    B, N, H, d = value.shape
    run = kernels_for(core.width)
    query_scalars, key_scalars = (
        rounded_up(scalars, core, run.covered(B, N, H, d))
        for scalars in (query_scalars, key_scalars)
    )
    m, z = means(core, *run.state(core, key, key_scalars, value))
    output, den = run.apply(core, query, query_scalars, m, z)
    saved = (query, key, value, query_scalars, key_scalars, m, z, den)
    return (output, None if den is None else den[:, :N].reshape(B, H, N)), saved


def _backward(core: Core, saved: Any, cotangents: tuple[jax.Array, Any]) -> Any:
    query, key, value, query_scalars, key_scalars, m, z, den = saved
    N = value.shape[1]
    run = kernels_for(core.width)
    d_query, d_query_rows, d_m, d_z = run.query_gradients(
        core, query, query_scalars, cotangents[0], m, z, den
    )
    d_m, d_z = means(core, d_m, d_z)
    d_key, d_key_rows, d_value = run.key_gradients(core, key, key_scalars, value, d_m, d_z)

    def of_tokens(d_rows: jax.Array | None, scalars: jax.Array) -> jax.Array:
        B, groups, rows, _ = scalars.shape
        d_scalars = [jnp.zeros((B, groups, N), jnp.float32)] * rows
        if d_rows is not None:
            d_rows = d_rows[..., :N].reshape(B, core.heads, -1, N)
            if groups == 1:
                d_rows = d_rows.sum(axis=1, keepdims=True)
            for place, row in enumerate(core.learned):
                d_scalars[row] = d_rows[:, :, place]
        return jnp.stack(d_scalars, axis=2)

    return (
        tuple(d_query),
        tuple(d_key),
        d_value,
        of_tokens(d_query_rows, query_scalars),
        of_tokens(d_key_rows, key_scalars),
    )


fused.defvjp(_forward, _backward)


def all_heads(
    core: Core,
    query: Tokens,
    key: Tokens,
    value: jax.Array,
    query_scalars: jax.Array,
    key_scalars: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """`fused` for arrays as the network has them, on one device.

    Args:
      core: static part.
      query, key, value: as for `fused`, but each (B, N, D).
      query_scalars, key_scalars: (B, 1 or H, rows, N) float32.

    Returns:
      The output (B, N, H, d) bfloat16, and den (B, H, N) float32 or None.
    """
    N = value.shape[1]
    width, tokens = rounded_sizes(core.width, N)

    def heads(x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], core.heads, core.width)
        added = ((0, 0), (0, tokens - N), (0, 0), (0, width - core.width))
        return jnp.pad(x, added) if any(map(sum, added)) else x

    output, den = fused(
        core,
        tuple(map(heads, query)),
        tuple(map(heads, key)),
        heads(value),
        rounded_up(query_scalars, core, tokens),
        rounded_up(key_scalars, core, tokens),
    )
    return output[:, :N, :, : core.width], None if den is None else den[..., :N]


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
    axis = sharding.sequence if sharding is not None else None
    core = Core(H, D // H, N, normalizer, powered, differential, options.eps, axis, interpret)
    keys = (None, None) if inputs.noise_key is None else jax.random.split(inputs.noise_key)
    lambdas = inputs.lambdas

    def scalars_of(side: str, noise_key: jax.Array | None) -> tuple[jax.Array, Any]:
        """Scalars and lambda's routing of the queries or keys, computed again for the gradients."""
        names = side, f"{side}_redundant"
        router = None if lambdas is None else getattr(lambdas, f"{side}_router")
        run = partial(token_scalars, inputs=inputs, options=options, key=noise_key)
        return jax.checkpoint(run)(
            *(getattr(inputs, name) for name in names),
            tuple(getattr(exponents, name) for name in names),
            router,
        )

    query_scalars, query_chosen = scalars_of("query", keys[0])
    key_scalars, key_chosen = scalars_of("key", keys[1])
    run = partial(all_heads, core)
    if sharding is not None:
        of_tokens, of_rows = sharding.spec("bn"), sharding.spec("bgrn")
        run = jax.shard_map(
            run,
            mesh=sharding.mesh,
            in_specs=(of_tokens, of_tokens, of_tokens, of_rows, of_rows),
            out_specs=(of_tokens, sharding.spec("bhn")),
            check_vma=False,
        )

    def side(*tensors: jax.Array | None) -> Tokens:
        return tuple(x for x in tensors if x is not None)

    output, den = run(
        side(inputs.query, inputs.query_redundant),
        side(inputs.key, inputs.key_redundant),
        inputs.value,
        query_scalars,
        key_scalars,
    )
    if options.normalizer == "rms":
        numerator = output.astype(jnp.float32)
        mean_square = jnp.mean(numerator * numerator, axis=-1, keepdims=True)
        output = (numerator * jax.lax.rsqrt(mean_square + options.eps)).astype(output.dtype)
    chosen = {"query_lambda": query_chosen, "key_lambda": key_chosen}
    return CoreOutput(
        output.reshape(B, N, D),
        None if den is None else den.transpose(0, 2, 1),
        {name: routed for name, routed in chosen.items() if routed is not None},
    )
