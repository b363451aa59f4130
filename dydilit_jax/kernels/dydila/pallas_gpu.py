"""The DyDiLA core on Hopper GPUs, by Mosaic GPU kernels, with a backward that recomputes.

    O_i = Qd_i M / den_i,   M = mean_m Kd_m^T V_m              arXiv 2601.13683; per head

What needs whole tokens is a few sums for each of Q, Q', K and K'. With u = (relu(z) + 1e-6) / s,
s = max z, R a router's rows for this tensor and g its exponent, token_sums leaves s, A, P and L:

    (1) phi(z) = c u^g,  c = s sqrt(A / P),  A = sum u^2,  P = sum u^(2 g)
    (2) logits of lambda's router = sum c L,  L = sum u^g R     over both tensors (and their heads)

XLA computes c, the logits and lambda from them, arrays of a few numbers a token. All else happens
in kernels that read Q, Q', K, K', V and these scalars, and keep for the backward pass the sums, M,
the mean of phi(K) and den. In units of one activation, B N D bfloat16 values, and besides M and the
scalars, they read and write 10 forward (4 of them for the sums), and backward

    17  for heads of up to 128 channels (pallas_gpu_narrow.py),
    22  for wider ones (pallas_gpu_wide.py), of which a program does not hold all of M and its
        gradient.

A core without power and router needs no sums, nor a second pass over what is differentiated: 6 and
11, of wide heads 16; the relu core, without Q' and K', 4 and 7, 10.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila import pallas_gpu_narrow as narrow
from dydilit_jax.kernels.dydila import pallas_gpu_wide as wide
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, check_inputs
from dydilit_jax.kernels.dydila.pallas_gpu_features import Core
from dydilit_jax.kernels.dydila.pallas_gpu_fused import fused
from dydilit_jax.kernels.dydila.pallas_gpu_passes import Static
from dydilit_jax.kernels.dydila.pallas_gpu_scalars import Side, Tokens
from dydilit_jax.kernels.dydila.xla import CoreOutput
from dydilit_jax.kernels.platform import not_hopper
from dydilit_jax.kernels.sharding import CoreSharding


def most_lambdas(width: int) -> int:
    """Lambdas of a router, whose rows for a head are in shared memory beside all else."""
    return 16 if 112 < width <= narrow.WIDEST else 32


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
    exponents = inputs.exponents
    names = [name for name in Exponents._fields if getattr(inputs, name) is not None]
    if exponents is not None and len({getattr(exponents, name) is None for name in names}) > 1:
        return "exponents of some of the tensors only are not in the kernels: give all, or none"
    lambdas = inputs.lambdas
    if inputs.query_redundant is not None and lambdas is not None:
        if (lambdas.query_router is None) != (lambdas.key_router is None):
            return "both lambda routers or neither must be given"
        most = most_lambdas(width)
        if lambdas.query_router is not None and lambdas.bank.size > most:
            return (
                f"{lambdas.bank.size} lambdas to choose from do not fit in shared memory, {most} "
                "would: use fewer, or the implementation 'xla'"
            )
        noisy = inputs.noise_key is not None and options.router_jitter > 0.0
        if lambdas.query_router is not None and noisy:
            return (
                "router_jitter is not in the kernels: set it to 0 or use the implementation 'xla'"
            )
    if width > wide.WIDEST:
        return (
            f"head width {width} does not fit in shared memory, {wide.WIDEST} would: "
            "use more heads, or the implementation 'xla'"
        )
    reason = not_hopper()
    return None if reason is None else f"{reason}: use the implementation 'xla'"


def side_of(
    inputs: CoreInputs, side: str, core: Core, options: CoreOptions, key: jax.Array | None
) -> Side:
    """The queries' or keys' part of the inputs; `key` is for the noise of its router."""
    names = (side, f"{side}_redundant")[: 1 + core.differential]
    tokens = tuple(getattr(inputs, name) for name in names)
    B, N, _ = tokens[0].shape
    exponents: Tokens = ()
    if core.powered:
        exponents = tuple(
            jnp.broadcast_to(jnp.asarray(getattr(inputs.exponents, name), jnp.float32), (B, N))
            for name in names
        )
    router, noise = None, None
    if core.choices:
        router = getattr(inputs.lambdas, f"{side}_router").astype(jnp.float32)
        if options.router_training == "gumbel" and key is not None:
            noise_key = jax.random.split(key)[1]  # as features.choose_lambda draws it
            noise = jax.random.gumbel(noise_key, (B, N, core.choices), jnp.float32)
    return Side(tokens, exponents, router, noise)


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
    differential = inputs.query_redundant is not None
    bank, choices = None, 0
    if differential:
        assert inputs.lambdas is not None  # check_inputs
        bank = inputs.lambdas.bank.astype(jnp.float32)
        choices = 0 if inputs.lambdas.query_router is None else bank.size
    core = Core(
        heads=H,
        width=D // H,
        tokens=N,
        normalizer="none" if options.normalizer == "rms" else options.normalizer,
        powered=inputs.exponents is not None and inputs.exponents.query is not None,
        differential=differential,
        eps=options.eps,
        choices=choices,
        sequence=sharding.sequence if sharding is not None else None,
        interpret=interpret,
    )
    keys = (None, None) if inputs.noise_key is None else jax.random.split(inputs.noise_key)
    sides = [
        side_of(inputs, side, core, options, key)
        for side, key in zip(("query", "key"), keys, strict=True)
    ]
    result = fused(Static(core, options, sharding), *sides, inputs.value, bank)
    output = result.output
    if options.normalizer == "rms":
        numerator = output.reshape(B, N, H, -1).astype(jnp.float32)
        mean_square = jnp.mean(numerator * numerator, axis=-1, keepdims=True)
        output = (numerator * lax.rsqrt(mean_square + options.eps)).astype(output.dtype)
    logits = {"query_lambda": result.query_logits, "key_lambda": result.key_logits}
    return CoreOutput(
        output.reshape(B, N, D),
        None if result.den is None else result.den.transpose(0, 2, 1),
        {
            name: routing.route(x, options.router_training)
            for name, x in logits.items()
            if x is not None
        },
    )
