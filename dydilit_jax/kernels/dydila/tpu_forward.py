"""The forward TPU kernels: `state_step` over blocks of keys and values, `apply_step` over queries.

    S_h = mean Kd_h^T V_h,   z_h = mean phi(K)_h (`base`) or mean Kd_h (`signed`)
    O   = Qd S / den

S is kept transposed, (e, d), z as eight rows whose sum it is (tpu_blocks.split_rows).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.tpu_blocks import (
    CONTRACT_LANES,
    Plan,
    Refs,
    dot,
    load_head,
    masked,
    over_heads,
    split_rows,
    total,
    valid_row,
)
from dydilit_jax.kernels.dydila.tpu_features import Choice, features, head_features


def state_step(plan: Plan, refs: Refs, step: jax.Array) -> None:
    """Adds a block of keys and values to the sums `state` (H, e, d) and `key_sum` (H, 8, d)."""

    @pl.when(step == 0)
    def _() -> None:
        refs["state"][...] = jnp.zeros(refs["state"].shape, jnp.float32)
        if plan.divides:
            refs["key_sum"][...] = jnp.zeros(refs["key_sum"].shape, jnp.float32)

    valid = valid_row(plan, step)
    base, redundant, logits = features(plan, refs, "key", valid)
    value = None
    if redundant is not None:
        value = Choice(plan, refs["bank"][...], logits).value
    if logits is not None:
        refs["key_logits"][0] = logits
    ones = split_rows(masked(jnp.ones((1, plan.block), jnp.float32), valid), plan.dtype)

    def head_step(carry: None, head: Any) -> None:
        key, phi = head_features(plan, head, base, redundant, value)
        values = load_head(plan, refs["value"], head, valid)
        refs["state"][head] += dot(values, key, CONTRACT_LANES, dtype=plan.dtype)
        if plan.divides:
            summed = phi if plan.normalizer == "base" else key
            refs["key_sum"][head] += dot(ones, summed, CONTRACT_LANES, dtype=plan.dtype)

    over_heads(plan, None, head_step)


def finish_state(plan: Plan, refs: Refs) -> None:
    """Turns the sums into the rounded means that `apply_step` multiplies with."""

    def head_step(carry: None, head: Any) -> None:
        mean = refs["state"][head] * (1.0 / plan.total_tokens)
        refs["mean_state"][head] = mean.astype(plan.dtype)
        if "saved_state" in refs:
            refs["saved_state"][0, head] = mean.astype(plan.dtype)
        if plan.divides:
            row = total(refs["key_sum"][head]) * (1.0 / plan.total_tokens)
            rows = split_rows(row, plan.dtype)
            refs["mean_key"][head] = rows
            if "saved_key" in refs:
                refs["saved_key"][0, head] = rows

    over_heads(plan, None, head_step)


def head_denominator(plan: Plan, mean_key: jax.Array, query: jax.Array) -> jax.Array:
    """den of one head, (1, block), from rows (8, d) and phi(Q) or Qd (d, block)."""
    product = total(dot(mean_key, query, dtype=plan.dtype))
    if plan.normalizer == "base":
        return product + plan.eps
    eps = jnp.where(product < 0.0, -plan.eps, plan.eps)
    return jnp.where(jnp.abs(product) < plan.eps, eps, product)


def apply_step(plan: Plan, refs: Refs, step: jax.Array) -> None:
    """Writes a block of the output, and of the denominator and the query router's logits."""
    valid = valid_row(plan, step)
    base, redundant, logits = features(plan, refs, "query", valid)
    value = None
    if redundant is not None:
        value = Choice(plan, refs["bank"][...], logits).value
    if logits is not None:
        refs["query_logits"][0] = logits

    def head_step(carry: None, head: Any) -> None:
        query, phi = head_features(plan, head, base, redundant, value)
        numerator = dot(refs["mean_state"][head], query, dtype=plan.dtype)
        if plan.divides:
            operand = phi if plan.normalizer == "base" else query
            den = head_denominator(plan, refs["mean_key"][head], operand)
            refs["denominator"][0, head] = den
            numerator = numerator * (1.0 / den)
        elif plan.normalizer == "rms":
            mean_square = jnp.mean(numerator * numerator, axis=0, keepdims=True)
            numerator = numerator * lax.rsqrt(mean_square + plan.eps)
        refs["output"][0, head] = numerator.astype(plan.dtype)

    over_heads(plan, None, head_step)


def fused_body(plan: Plan, refs: Refs) -> None:
    """Phase 0 sums the keys and values of a sequence, phase 1 applies the state to its queries."""
    phase, step = pl.program_id(2), pl.program_id(3)

    @pl.when(phase == 0)
    def _() -> None:
        state_step(plan, refs, step)

        @pl.when(step == plan.blocks - 1)
        def _() -> None:
            finish_state(plan, refs)

    @pl.when(phase == 1)
    def _() -> None:
        apply_step(plan, refs, step)


def state_body(plan: Plan, refs: Refs) -> None:
    """Phase 0 alone; the sums of this device's tokens are outputs."""
    step = pl.program_id(3)
    state_step(plan, refs, step)

    @pl.when(step == plan.blocks - 1)
    def _() -> None:
        refs["state_sum"][0] = refs["state"][...]
        if plan.divides:
            refs["key_sum_out"][0] = refs["key_sum"][...]


def apply_body(plan: Plan, refs: Refs) -> None:
    """Phase 1 alone; the means are inputs."""
    views = dict(refs, mean_state=refs["state_mean"].at[0])
    if plan.divides:
        views["mean_key"] = refs["key_mean"].at[0]
    apply_step(plan, views, pl.program_id(3))
