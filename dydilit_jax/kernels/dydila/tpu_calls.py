"""The calls of the TPU kernels on the arrays of one device, forward and backward.

Within a device a sequence is one call forward and one backward, at any length: two phases of one
grid, with the state in VMEM between them. When a sequence is split over devices, each phase is a
call of its own, with one psum of the state (S, z) or its gradient between.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from dydilit_jax.kernels.dydila import tpu_backward, tpu_forward
from dydilit_jax.kernels.dydila.tpu_blocks import SUBLANES, Plan, split_rows
from dydilit_jax.kernels.dydila.tpu_features import router_rows
from dydilit_jax.kernels.dydila.tpu_launch import Call, Layout, Spec, launch, vmem_bytes

Arrays = dict[str, jax.Array]


def _tensors(plan: Plan, side: str) -> tuple[str, ...]:
    return (side, f"{side}_redundant") if plan.differential else (side,)


def _side_inputs(plan: Plan, layout: Layout, side: str, phase: int) -> dict[str, Spec]:
    """What both directions read of the queries or of the keys."""
    tensors = _tensors(plan, side)
    specs = {name: layout.activations(phase) for name in tensors}
    if side == "key":
        specs["value"] = layout.activations(phase)
    if plan.measured:
        specs[f"{side}_exponents"] = layout.rows(phase, len(tensors))
    if plan.routed:
        specs[f"{side}_router_rows"] = layout.whole(*_router_rows_shape(plan), dtype=plan.dtype)
    if plan.noisy:
        specs[f"{side}_noise"] = layout.rows(phase, plan.choices)
    return specs


def _router_rows_shape(plan: Plan) -> tuple[int, ...]:
    router = (2, plan.heads * plan.chunks, plan.choices, plan.chunk)
    rounded = jax.ShapeDtypeStruct(router, jnp.float32)
    return jax.eval_shape(lambda r: router_rows(r, plan.dtype), rounded).shape


def _with_router_rows(plan: Plan, arrays: Arrays) -> Arrays:
    if not plan.routed:
        return arrays
    sides = ("query_router", "key_router")
    return arrays | {f"{side}_rows": router_rows(arrays[side], plan.dtype) for side in sides}


def _bank(plan: Plan, layout: Layout) -> dict[str, Spec]:
    return {"bank": layout.whole(plan.choices, 1)} if plan.differential else {}


def _measure_scratch(plan: Plan) -> dict[str, Any]:
    scratch: dict[str, Any] = {}
    if plan.measured:
        for row in range(2 if plan.differential else 1):
            scratch[f"power_{row}"] = pltpu.VMEM(
                (plan.heads, plan.head_width, plan.block), jnp.float32
            )
            scratch[f"stats_{row}"] = pltpu.VMEM((plan.groups, SUBLANES, plan.block), jnp.float32)
    return scratch


def _sum_scratch(plan: Plan) -> dict[str, Any]:
    """S and z, or their gradients, while they are summed."""
    scratch = {"state": pltpu.VMEM((plan.heads, plan.head_width, plan.head_width), jnp.float32)}
    if plan.divides:
        scratch["key_sum"] = pltpu.VMEM((plan.heads, SUBLANES, plan.head_width), jnp.float32)
    return scratch


def _mean_scratch(plan: Plan, *names: str, rows: str) -> dict[str, Any]:
    """What the second phase multiplies with."""
    shape = (plan.heads, plan.head_width, plan.head_width)
    scratch = {name: pltpu.VMEM(shape, plan.dtype) for name in names}
    if plan.divides:
        scratch[rows] = pltpu.VMEM((plan.heads, SUBLANES, plan.head_width), plan.dtype)
    return scratch


def _means(plan: Plan, layout: Layout, *names: str, rows: str) -> dict[str, Spec]:
    """The same as arrays in HBM, a block for a sequence."""
    specs = {name: layout.per_sequence(plan.head_width, plan.dtype) for name in names}
    if plan.divides:
        specs[rows] = layout.per_sequence(SUBLANES, plan.dtype)
    return specs


def _sums(plan: Plan, layout: Layout) -> dict[str, Spec]:
    specs = {"state_sum": layout.per_sequence(plan.head_width, jnp.float32)}
    if plan.divides:
        specs["key_sum_out"] = layout.per_sequence(SUBLANES, jnp.float32)
    return specs


def _apply_outputs(plan: Plan, layout: Layout, phase: int) -> dict[str, Spec]:
    specs = {"output": layout.activations(phase)}
    if plan.divides:
        specs["denominator"] = layout.head_rows(phase)
    if plan.routed:
        specs["query_logits"] = layout.rows(phase, plan.choices)
    return specs


def _logits(plan: Plan, layout: Layout, side: str, phase: int) -> dict[str, Spec]:
    return {f"{side}_logits": layout.rows(phase, plan.choices)} if plan.routed else {}


def _meant(plan: Plan, sums: Arrays, axis: str, *, state: str, rows: str) -> Arrays:
    """Sums of each device's tokens to means of the sequence, as the kernels round them."""
    summed = jax.lax.psum(sums, axis)
    means = {state: (summed["state_sum"] * (1.0 / plan.total_tokens)).astype(plan.dtype)}
    if plan.divides:
        row = summed["key_sum_out"].sum(axis=2, keepdims=True) * (1.0 / plan.total_tokens)
        split = jax.vmap(jax.vmap(lambda r: split_rows(r, plan.dtype)))
        means[rows] = split(row)
    return means


def forward_call(plan: Plan, *, save: bool) -> Call:
    """The one call of a forward pass."""
    layout = Layout(plan, 2)
    inputs = _side_inputs(plan, layout, "key", 0) | _side_inputs(plan, layout, "query", 1)
    outputs = _apply_outputs(plan, layout, 1) | _logits(plan, layout, "key", 0)
    saved = _means(plan, layout, "saved_state", rows="saved_key") if save else {}
    scratch = _measure_scratch(plan) | _sum_scratch(plan)
    scratch |= _mean_scratch(plan, "mean_state", rows="mean_key")
    return Call(layout, inputs | _bank(plan, layout), outputs | saved, scratch)


def vmem_needed(plan: Plan) -> int:
    """Bytes of VMEM of the larger of the two directions, without what the compiler adds."""
    calls = (forward_call(plan, save=True), backward_call(plan))
    return max(
        vmem_bytes([*call.inputs.values(), *call.outputs.values()], call.scratch) for call in calls
    )


def forward(
    plan: Plan, arrays: Arrays, *, save: bool, sequence_axis: str | None
) -> tuple[Arrays, Arrays]:
    """Output, denominator and logits by name; and, with `save`, what the backward pass reads."""
    arrays = _with_router_rows(plan, arrays)
    if sequence_axis is None:
        call = forward_call(plan, save=save)
        results = launch("dydila_forward", call, tpu_forward.fused_body, arrays)
        means = {"state_mean": results.pop("saved_state")} if save else {}
        if save and plan.divides:
            means["key_mean"] = results.pop("saved_key")
        return results, means
    layout = Layout(plan, 1)
    state_call = Call(
        layout,
        _side_inputs(plan, layout, "key", 0) | _bank(plan, layout),
        _sums(plan, layout) | _logits(plan, layout, "key", 0),
        _measure_scratch(plan) | _sum_scratch(plan),
    )
    sums = launch("dydila_state", state_call, tpu_forward.state_body, arrays)
    logits = {name: sums.pop(name) for name in _logits(plan, layout, "key", 0)}
    means = _meant(plan, sums, sequence_axis, state="state_mean", rows="key_mean")
    apply_call = Call(
        layout,
        _side_inputs(plan, layout, "query", 0)
        | _bank(plan, layout)
        | _means(plan, layout, "state_mean", rows="key_mean"),
        _apply_outputs(plan, layout, 0),
        _measure_scratch(plan),
    )
    results = launch("dydila_apply", apply_call, tpu_forward.apply_body, arrays | means)
    return results | logits, means


def _gradient_outputs(plan: Plan, layout: Layout, side: str, phase: int) -> dict[str, Spec]:
    names = [*_tensors(plan, side), *(["value"] if side == "key" else [])]
    specs = {f"{name}_gradient": layout.activations(phase) for name in names}
    if plan.measured:
        specs[f"{side}_exponents_gradient"] = layout.rows(phase, len(_tensors(plan, side)))
    if plan.routed:
        router = (2, plan.heads * plan.chunks, plan.choices, plan.chunk)
        specs[f"{side}_router_gradient"] = layout.per_core(*router)
    return specs


def _bank_gradient(plan: Plan, layout: Layout) -> dict[str, Spec]:
    return {"bank_gradient": layout.per_core(plan.choices, 1)} if plan.differential else {}


def _logits_gradient(plan: Plan, layout: Layout, side: str, phase: int) -> dict[str, Spec]:
    return {f"{side}_logits_gradient": layout.rows(phase, plan.choices)} if plan.routed else {}


def _gradient_scratch(plan: Plan) -> dict[str, Any]:
    block = (plan.heads, plan.head_width, plan.block)
    scratch = {"difference_gradient": pltpu.VMEM(block, jnp.float32)}
    if plan.differential and plan.measured:
        scratch["phi_gradient"] = pltpu.VMEM(block, jnp.float32)
    if plan.divides:
        scratch["base_weight"] = pltpu.VMEM((plan.heads, 1, plan.block), jnp.float32)
    if plan.groups > 1:
        scratch["exponent_sum"] = pltpu.VMEM((SUBLANES, plan.block), jnp.float32)
    return _measure_scratch(plan) | scratch


def _query_inputs(plan: Plan, layout: Layout) -> dict[str, Spec]:
    """What the query phase of the backward pass reads."""
    state = ["state_mean_transposed"] + (["state_mean"] if plan.normalizer == "rms" else [])
    return (
        {"output_gradient": layout.activations(0)}
        | _side_inputs(plan, layout, "query", 0)
        | _logits_gradient(plan, layout, "query", 0)
        | _bank(plan, layout)
        | _means(plan, layout, *state, rows="key_mean")
    )


def backward_call(plan: Plan) -> Call:
    """The one call of a backward pass."""
    layout = Layout(plan, 2)
    return Call(
        layout,
        _query_inputs(plan, layout)
        | _side_inputs(plan, layout, "key", 1)
        | _logits_gradient(plan, layout, "key", 1),
        _gradient_outputs(plan, layout, "query", 0)
        | _gradient_outputs(plan, layout, "key", 1)
        | _bank_gradient(plan, layout),
        _gradient_scratch(plan)
        | _sum_scratch(plan)
        | _mean_scratch(
            plan, "state_gradient", "state_gradient_transposed", rows="key_gradient_rows"
        ),
    )


def backward(plan: Plan, arrays: Arrays, *, sequence_axis: str | None) -> Arrays:
    """Gradients by the name of their input.

    Args:
      plan: as forward.
      arrays: the inputs, `state_mean` and `key_mean` of the forward pass, `output_gradient`, and
        `query_logits_gradient` and `key_logits_gradient`.
      sequence_axis: mesh axis that the tokens are split over.

    Returns:
      `<input>_gradient`; those of bank and routers with a leading axis of cores to sum over.
    """
    arrays = _with_router_rows(plan, arrays)
    arrays = arrays | {"state_mean_transposed": arrays["state_mean"].swapaxes(-1, -2)}
    if sequence_axis is None:
        return launch("dydila_backward", backward_call(plan), tpu_backward.fused_body, arrays)
    layout = Layout(plan, 1)
    query_call = Call(
        layout,
        _query_inputs(plan, layout),
        _gradient_outputs(plan, layout, "query", 0)
        | _bank_gradient(plan, layout)
        | _sums(plan, layout),
        _gradient_scratch(plan) | _sum_scratch(plan),
    )
    results = launch("dydila_query_gradient", query_call, tpu_backward.query_body, arrays)
    sums = {name: results.pop(name) for name in _sums(plan, layout)}
    means = _meant(
        plan, sums, sequence_axis, state="state_gradient_in", rows="key_gradient_rows_in"
    )
    means["state_gradient_transposed_in"] = means["state_gradient_in"].swapaxes(-1, -2)
    states = ("state_gradient_in", "state_gradient_transposed_in")
    key_call = Call(
        layout,
        _side_inputs(plan, layout, "key", 0)
        | _logits_gradient(plan, layout, "key", 0)
        | _bank(plan, layout)
        | _means(plan, layout, *states, rows="key_gradient_rows_in"),
        _gradient_outputs(plan, layout, "key", 0) | _bank_gradient(plan, layout),
        _gradient_scratch(plan),
    )
    key_results = launch("dydila_key_gradient", key_call, tpu_backward.key_body, arrays | means)
    if plan.differential:
        key_results["bank_gradient"] += results["bank_gradient"]
    return results | key_results
