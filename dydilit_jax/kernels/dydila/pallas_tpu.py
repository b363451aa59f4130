"""The core as Pallas TPU kernels, forward and backward, with the difference inside.

HBM traffic, in units of one bfloat16 activation X: forward 6 (read Q, Q', K, K', V, write O),
backward 11 (the inputs again, dO, and five gradients), and what is small against X: exponents,
denominators, logits of the lambda routers, and for the backward pass the state S (d / N of X).
phi is recomputed, not saved.

The kernels take activations as (B, H, d, N): under jit XLA gives the projection that makes a tensor
(B, N, D) that layout, and nothing is transposed in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila import tpu_calls
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions
from dydilit_jax.kernels.dydila.tpu_blocks import Plan
from dydilit_jax.kernels.dydila.tpu_launch import VMEM_BUDGET
from dydilit_jax.kernels.dydila.xla import CoreOutput
from dydilit_jax.kernels.sharding import CoreSharding

Arrays = dict[str, jax.Array]
BLOCKS = (512, 256, 128)
ACTIVATIONS = ("query", "key", "value", "query_redundant", "key_redundant")


def unsupported(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None
) -> str | None:
    """Why these inputs cannot run here and what would, or None when they can."""
    batch, tokens, width = inputs.query.shape
    head_width = width // options.heads
    dtypes = {a.dtype for a in (getattr(inputs, n) for n in ACTIVATIONS) if a is not None}
    lambdas = inputs.lambdas
    if dtypes not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)}):
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        return f"activations must all be bfloat16 or all float32, got {names}"
    if head_width % 8 or (head_width > 96 and not _chunked(head_width)):
        return (
            f"head width {head_width}: must be a multiple of 8 up to 96, or have a divisor of up "
            "to 96 that is a multiple of 16"
        )
    if inputs.rotation is not None:
        return "rotary position is not built in: use position='sincos' or implementation='xla'"
    if inputs.query_redundant is not None and lambdas is not None:
        if (lambdas.query_router is None) != (lambdas.key_router is None):
            return "both lambda routers or neither must be given"
        if lambdas.query_router is not None and lambdas.bank.size < 2:
            return "lambda routers need at least two lambdas to choose from"
        noisy = inputs.noise_key is not None and options.router_jitter > 0.0
        if lambdas.query_router is not None and noisy:
            return "router_jitter is not built in: set it to 0 or use implementation='xla'"
    if sharding is not None:
        if batch % sharding.batch_size:
            return f"batch {batch} is not divisible by mesh axes {sharding.batch}"
        if tokens % sharding.sequence_size:
            return (
                f"{tokens} tokens are not divisible by mesh axis {sharding.sequence!r} of "
                f"{sharding.sequence_size}"
            )
    if _block(inputs, options, sharding) is None:
        return f"width {width} with head width {head_width} does not fit in VMEM: use more heads"
    return None


def _chunked(head_width: int) -> bool:
    return any(head_width % size == 0 for size in range(16, 97, 16))


def _plan(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None, block: int
) -> Plan:
    batch, tokens, width = inputs.query.shape
    lambdas, differential = inputs.lambdas, inputs.query_redundant is not None
    choices = lambdas.bank.size if differential and lambdas is not None else 0
    local = tokens // (sharding.sequence_size if sharding else 1)
    return Plan(
        batch=batch // (sharding.batch_size if sharding else 1),
        heads=options.heads,
        head_width=width // options.heads,
        tokens=local,
        total_tokens=tokens,
        block=min(block, local),
        normalizer=options.normalizer,
        training=options.router_training,
        eps=options.eps,
        groups=options.heads if options.norm_scope == "head" else 1,
        measured=inputs.exponents is not None,
        choices=choices,
        noisy=choices > 1 and options.router_training == "gumbel" and inputs.noise_key is not None,
        dtype=inputs.query.dtype,
    )


def _block(inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None) -> int | None:
    """Tokens of a block: the largest of BLOCKS with which both directions fit in VMEM.

    A block that leaves the last one less than half full is passed over for a smaller one.
    """
    for block in BLOCKS:
        plan = _plan(inputs, options, sharding, block)
        wasteful = plan.ragged and block != BLOCKS[-1] and plan.tokens % block <= block // 2
        if not wasteful and tpu_calls.vmem_needed(plan) <= VMEM_BUDGET:
            return block
    return None


def attention(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None
) -> CoreOutput:
    """The core; inputs and result as api.dydila_core has them, where `unsupported` is None.

    The denominator is for telemetry: no gradient flows through it.
    """
    block = _block(inputs, options, sharding)
    assert block is not None
    plan = _plan(inputs, options, sharding, block)
    batch, tokens, width = inputs.query.shape

    def transposed(x: jax.Array) -> jax.Array:
        split = x.reshape(batch, tokens, plan.heads, plan.head_width)
        return split.transpose(0, 2, 3, 1)

    arrays = {
        name: transposed(getattr(inputs, name))
        for name in ACTIVATIONS
        if getattr(inputs, name) is not None
    }
    arrays |= _exponents(inputs, plan) | _lambdas(inputs, plan)
    results = _core(plan, sharding, arrays)
    output = results["output"].transpose(0, 3, 1, 2).reshape(batch, tokens, width)
    denominator = None
    if plan.divides:
        rows = lax.stop_gradient(results["denominator"])
        denominator = rows.reshape(batch, plan.heads, tokens).transpose(0, 2, 1)
    routings = {}
    if plan.routed:
        for side in ("query", "key"):
            logits = results[f"{side}_logits"].transpose(0, 2, 1)
            routings[f"{side}_lambda"] = routing.route(logits, options.router_training)
    return CoreOutput(output, denominator, routings)


def _exponents(inputs: CoreInputs, plan: Plan) -> Arrays:
    """Exponents of a side's tensors as rows, (B, 1 or 2, N) float32."""
    if inputs.exponents is None:
        return {}
    batch, tokens, _ = inputs.query.shape

    def rows(*exponents: jax.Array | None) -> jax.Array:
        given = exponents[: 2 if plan.differential else 1]
        wide = [jnp.broadcast_to(jnp.asarray(e, jnp.float32), (batch, tokens)) for e in given]
        return jnp.stack(wide, axis=1)

    e = inputs.exponents
    return {
        "query_exponents": rows(e.query, e.query_redundant),
        "key_exponents": rows(e.key, e.key_redundant),
    }


def _lambdas(inputs: CoreInputs, plan: Plan) -> Arrays:
    """The bank as a column (n, 1), the routers by chunk of channels (2, D / c, n, c), the noise."""
    lambdas = inputs.lambdas
    if not plan.differential or lambdas is None:
        return {}
    arrays = {"bank": lambdas.bank.astype(jnp.float32).reshape(plan.choices, 1)}
    if not plan.routed:
        return arrays
    keys = (None, None) if inputs.noise_key is None else jax.random.split(inputs.noise_key)
    sides = (("query", lambdas.query_router, keys[0]), ("key", lambdas.key_router, keys[1]))
    for side, router, key in sides:
        assert router is not None
        chunks = (2, plan.heads * plan.chunks, plan.chunk, plan.choices)
        by_chunk = router.astype(jnp.float32).reshape(chunks)
        arrays[f"{side}_router"] = by_chunk.transpose(0, 1, 3, 2)
        if plan.noisy:
            # The keys and the shape of the XLA path: the same noise.
            batch, tokens, _ = inputs.query.shape
            assert key is not None
            choice_key = jax.random.split(key)[1]
            noise = jax.random.gumbel(choice_key, (batch, tokens, plan.choices), jnp.float32)
            arrays[f"{side}_noise"] = noise.transpose(0, 2, 1)
    return arrays


def _spec_name(name: str) -> str:
    """Dimensions of an array of the calls, for CoreSharding.spec."""
    name = name.removesuffix("_gradient")
    if name in (*ACTIVATIONS, "output", "denominator"):
        return "bhdn"
    if name in ("state_mean", "key_mean"):
        return "bhed"
    if name.endswith(("_exponents", "_noise", "_logits")):
        return "bkn"
    return ""  # bank, routers: whole everywhere


def _on_mesh(
    function: Callable[..., Any], sharding: CoreSharding | None, results: Any, *trees: Arrays
) -> Any:
    """`function` on each device's part; `results` are trees with the names of what it returns."""
    if sharding is None:
        return function(*trees)

    def specs(tree: Any) -> Any:
        if isinstance(tree, tuple):
            return tuple(specs(part) for part in tree)
        return {name: sharding.spec(_spec_name(name)) for name in tree}

    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=specs(trees),
        out_specs=specs(results),
        check_vma=False,  # a Pallas call does not say how its results vary over the mesh
    )(*trees)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _core(plan: Plan, sharding: CoreSharding | None, arrays: Arrays) -> Arrays:
    return _run_forward(plan, sharding, arrays, save=False)[0]


def _run_forward(
    plan: Plan, sharding: CoreSharding | None, arrays: Arrays, *, save: bool
) -> tuple[Arrays, Arrays]:
    """The results, and S and z for the backward pass."""
    axis = sharding.sequence if sharding else None
    results = ["output"]
    results += ["denominator"] if plan.divides else []
    results += ["query_logits", "key_logits"] if plan.routed else []
    saved = ["state_mean", "key_mean"] if plan.divides else ["state_mean"]

    def local(arrays: Arrays) -> tuple[Arrays, Arrays]:
        outputs, means = tpu_calls.forward(plan, arrays, save=save, sequence_axis=axis)
        return outputs, means if save else {}

    return _on_mesh(local, sharding, (results, saved if save else []), arrays)


def _core_forward(
    plan: Plan, sharding: CoreSharding | None, arrays: Arrays
) -> tuple[Arrays, tuple[Arrays, Arrays]]:
    results, means = _run_forward(plan, sharding, arrays, save=True)
    return results, (arrays, means)


def _core_backward(
    plan: Plan, sharding: CoreSharding | None, saved: tuple[Arrays, Arrays], gradients: Arrays
) -> tuple[Arrays]:
    arrays, means = saved
    axis = sharding.sequence if sharding else None
    cotangents = {f"{n}_gradient": g for n, g in gradients.items() if n != "denominator"}
    constant = [name for name in arrays if name.endswith("_noise")]
    learned = [name for name in arrays if not _spec_name(name)]

    def local(arrays: Arrays, means: Arrays, cotangents: Arrays) -> Arrays:
        results = tpu_calls.backward(plan, arrays | means | cotangents, sequence_axis=axis)
        for name in learned:
            results[f"{name}_gradient"] = results[f"{name}_gradient"].sum(axis=0)
        if sharding is not None and learned:
            axes = sharding.batch + ((axis,) if axis else ())
            sums = {f"{name}_gradient": results[f"{name}_gradient"] for name in learned}
            results |= lax.psum(sums, axes)
        return results

    names = [f"{name}_gradient" for name in arrays if name not in constant]
    results = _on_mesh(local, sharding, names, arrays, means, cotangents)
    zeros = {name: jnp.zeros_like(arrays[name]) for name in constant}
    return ({name: results[f"{name}_gradient"] for name in arrays if name not in constant} | zeros,)


_core.defvjp(_core_forward, _core_backward)
