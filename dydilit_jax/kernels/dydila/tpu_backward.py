"""The backward TPU kernels: `query_step` over blocks of queries, `key_step` over keys and values.

With g = dO / den (the normalizers `base` and `signed`), and phi recomputed:

    dQd = S g,             dS = mean Qd^T g,          dden = -Qd . (S g) / den
    dphi(Q) = dden z,      dz = mean dden phi(Q)      (`base`; `signed`: on Qd in place of phi(Q))
    dKd = dS V,            dV = dS^T Kd,              dphi(K) = dz

then through the difference, the choice of lambda and the measure kernel (`side_gradients`). Sums
over tokens run in the order of the blocks: the result is the same bits every time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.tpu_blocks import (
    CONTRACT_LANES,
    CONTRACT_ROWS,
    SUBLANES,
    Plan,
    Refs,
    channels,
    dot,
    fold,
    for_groups,
    load,
    load_head,
    masked,
    over_chunks,
    over_heads,
    split_rows,
    total,
    valid_row,
)
from dydilit_jax.kernels.dydila.tpu_features import Choice, Measured, features, head_features
from dydilit_jax.kernels.dydila.tpu_forward import head_denominator


def outer(plan: Plan, rows: jax.Array, row: jax.Array) -> jax.Array:
    """Channels times tokens: the sum (d,) of rows (8, d) with a row (1, block), (d, block)."""
    row = jnp.broadcast_to(row, (SUBLANES, plan.block))
    return dot(rows, row, CONTRACT_ROWS, dtype=plan.dtype)


def query_step(plan: Plan, refs: Refs, step: jax.Array) -> None:
    """Writes the gradients of a block of Q and Q'; adds to those of S and z."""

    @pl.when(step == 0)
    def _() -> None:
        refs["state"][...] = jnp.zeros(refs["state"].shape, jnp.float32)
        if plan.divides:
            refs["key_sum"][...] = jnp.zeros(refs["key_sum"].shape, jnp.float32)

    valid = valid_row(plan, step)
    base, redundant, logits = features(plan, refs, "query", valid)
    choice = Choice(plan, refs["bank"][...], logits) if plan.differential else None
    value = None if choice is None else choice.value

    def head_step(carry: jax.Array, head: Any) -> jax.Array:
        query, phi = head_features(plan, head, base, redundant, value)
        gradient = load_head(plan, refs["output_gradient"], head, valid)
        if plan.normalizer == "rms":
            gradient = _rms_gradient(plan, refs["state_mean"][0, head], query, gradient)
        towards_query = dot(refs["state_mean_transposed"][0, head], gradient, dtype=plan.dtype)
        if plan.divides:
            operand = phi if plan.normalizer == "base" else query
            den = head_denominator(plan, refs["key_mean"][0, head], operand)
            inverse = 1.0 / den
            towards_query = towards_query * inverse
            den_gradient = -inverse * total(fold(query.astype(jnp.float32) * towards_query))
            gradient = gradient.astype(jnp.float32) * inverse
            rows = split_rows(den_gradient, plan.dtype)
            if plan.normalizer == "signed":
                # A denominator that was moved away from zero is a constant.
                rows = jnp.where(jnp.abs(den) <= plan.eps, jnp.zeros_like(rows), rows)
                den_gradient = jnp.where(jnp.abs(den) <= plan.eps, 0.0, den_gradient)
                towards_query += outer(plan, refs["key_mean"][0, head], den_gradient)
            refs["key_sum"][head] += dot(rows, operand, CONTRACT_LANES, dtype=plan.dtype)
            refs["base_weight"][head] = den_gradient
        refs["state"][head] += dot(gradient, query, CONTRACT_LANES, dtype=plan.dtype)
        return _store_difference_gradient(plan, refs, head, towards_query, redundant, carry)

    zeros = jnp.zeros((SUBLANES, plan.block), jnp.float32)
    value_gradient = -total(over_heads(plan, zeros, head_step))
    mean_key = refs["key_mean"].at[0] if plan.normalizer == "base" else None
    side_gradients(plan, refs, "query", base, redundant, choice, value_gradient, mean_key, valid)


def _rms_gradient(plan: Plan, state: jax.Array, query: jax.Array, gradient: jax.Array) -> jax.Array:
    """Gradient of the numerator from that of its division by its own root mean square."""
    numerator = dot(state, query, dtype=plan.dtype)
    mean_square = jnp.mean(numerator * numerator, axis=0, keepdims=True)
    inverse = lax.rsqrt(mean_square + plan.eps)
    unit = numerator * inverse
    gradient = gradient.astype(jnp.float32)
    along = jnp.mean(unit * gradient, axis=0, keepdims=True)
    return inverse * (gradient - along * unit)


def _store_difference_gradient(
    plan: Plan,
    refs: Refs,
    head: Any,
    gradient: jax.Array,
    redundant: Measured | None,
    carry: jax.Array,
) -> jax.Array:
    """Keeps the gradient of a head's Qd or Kd (d, block); adds its product with phi' to `carry`."""
    refs["difference_gradient"][head] = gradient
    if redundant is None:
        return carry
    for part in range(plan.chunks):
        piece = gradient[part * plan.chunk : (part + 1) * plan.chunk]
        carry += fold(piece * redundant.phi(head, part))
    return carry


def finish_query(plan: Plan, refs: Refs) -> None:
    """Turns the sums for dS and dz into the rounded means that `key_step` multiplies with."""

    def head_step(carry: None, head: Any) -> None:
        mean = refs["state"][head] * (1.0 / plan.total_tokens)
        refs["state_gradient"][head] = mean.astype(plan.dtype)
        refs["state_gradient_transposed"][head] = mean.T.astype(plan.dtype)
        if plan.divides:
            row = total(refs["key_sum"][head]) * (1.0 / plan.total_tokens)
            refs["key_gradient_rows"][head] = split_rows(row, plan.dtype)

    over_heads(plan, None, head_step)


def key_step(plan: Plan, refs: Refs, step: jax.Array) -> None:
    """Writes the gradients of a block of K, K' and V."""
    valid = valid_row(plan, step)
    base, redundant, logits = features(plan, refs, "key", valid)
    choice = Choice(plan, refs["bank"][...], logits) if plan.differential else None
    value = None if choice is None else choice.value
    weight = masked(jnp.ones((1, plan.block), jnp.float32), valid)

    def head_step(carry: jax.Array, head: Any) -> jax.Array:
        key, _ = head_features(plan, head, base, redundant, value)
        values = load_head(plan, refs["value"], head, valid)
        value_gradient = dot(refs["state_gradient"][head], key, dtype=plan.dtype)
        refs["value_gradient"][0, head] = value_gradient.astype(plan.dtype)
        towards_key = dot(refs["state_gradient_transposed"][head], values, dtype=plan.dtype)
        if plan.normalizer == "signed":
            towards_key += outer(plan, refs["key_gradient_rows"][head], weight)
        if plan.normalizer == "base":
            refs["base_weight"][head] = weight
        return _store_difference_gradient(plan, refs, head, towards_key, redundant, carry)

    zeros = jnp.zeros((SUBLANES, plan.block), jnp.float32)
    value_gradient = -total(over_heads(plan, zeros, head_step))
    rows = refs["key_gradient_rows"] if plan.normalizer == "base" else None
    side_gradients(plan, refs, "key", base, redundant, choice, value_gradient, rows, valid)


def side_gradients(
    plan: Plan,
    refs: Refs,
    side: str,
    base: Measured,
    redundant: Measured | None,
    choice: Choice | None,
    value_gradient: jax.Array,
    base_rows: Any,
    valid: jax.Array | None,
) -> None:
    """From the gradients of a side's difference and lambdas to those of its inputs.

    Reads `difference_gradient`; phi's gradient has `base_weight` times `base_rows` added where
    there are any. Adds to the gradients of the bank and of the side's router.
    """
    logits_gradient = None
    if choice is not None:
        refs["bank_gradient"][0] += choice.bank_gradient(value_gradient)
    if plan.routed:
        assert choice is not None
        logits_gradient = choice.logits_gradient(value_gradient)
        logits_gradient += masked(refs[f"{side}_logits_gradient"][0], valid)

    def router_part(index: int, head: Any, part: int, phi: jax.Array) -> jax.Array:
        """Gradient of phi by way of the logits; adds to the router's."""
        assert logits_gradient is not None
        chunk = head * plan.chunks + part
        refs[f"{side}_router_gradient"][0, index, chunk] += dot(
            logits_gradient, phi, CONTRACT_LANES, dtype=plan.dtype
        )
        rows = refs[f"{side}_router_rows"][index, chunk][: plan.choices]
        return dot(rows, logits_gradient, CONTRACT_ROWS, dtype=plan.dtype)

    def base_gradient(head: Any, part: int) -> jax.Array:
        gradient = refs["difference_gradient"][head, channels(plan, part), :]
        if base_rows is not None:
            rows = base_rows[head]
            if plan.chunks > 1:
                rows = rows[:, part * plan.chunk : (part + 1) * plan.chunk]
            gradient += outer(plan, rows, refs["base_weight"][head])
        if logits_gradient is not None:
            gradient += router_part(0, head, part, base.phi(head, part))
        return gradient

    def redundant_gradient(head: Any, part: int) -> jax.Array:
        assert redundant is not None
        assert choice is not None
        gradient = -choice.value * refs["difference_gradient"][head, channels(plan, part), :]
        if logits_gradient is not None:
            gradient += router_part(1, head, part, redundant.phi(head, part))
        return gradient

    # Q' and K' first: the gradients of Q and K take the place of the difference's.
    if redundant is not None:
        name = f"{side}_redundant"
        measure_gradient(plan, refs, redundant, redundant_gradient, name, side, 1, "phi_gradient")
    measure_gradient(plan, refs, base, base_gradient, side, side, 0, "difference_gradient")


def measure_gradient(
    plan: Plan,
    refs: Refs,
    measured: Measured,
    gradient: Any,
    name: str,
    side: str,
    row: int,
    kept: str,
) -> None:
    """Through equation (1): writes the gradients of z, and of its exponents.

    With u = relu(z) / max, p = u^g, phi = c p and c = max ||u|| / ||p||, and t = dphi . p:

        dp = c (dphi - t p / ||p||^2),    du = dp g p / u + c t u / ||u||^2,    dg = dp . (p log u)

    `gradient(head, part)` is called once for each chunk; `kept` names scratch for its results.
    """
    output = refs[f"{name}_gradient"]

    def write(head: Any, part: int, dz: jax.Array) -> None:
        positive = load(plan, measured.ref, head, part, None) > 0.0
        output[0, head, channels(plan, part), :] = jnp.where(positive, dz, 0.0).astype(plan.dtype)

    if measured.exponent is None:

        def through_relu(carry: None, head: Any) -> None:
            for part in range(plan.chunks):
                write(head, part, gradient(head, part))

        over_heads(plan, None, through_relu)
        return
    exponent = measured.exponent
    zeros = jnp.zeros((SUBLANES, plan.block), jnp.float32)

    def through_group(group: Any) -> jax.Array:
        def project(carry: jax.Array, head: Any, part: int) -> jax.Array:
            dphi = gradient(head, part)
            refs[kept][head, channels(plan, part), :] = dphi
            return carry + fold(dphi * measured.power[head, channels(plan, part), :])

        along = total(over_chunks(plan, group, zeros, project))
        stats = measured.stats[group]
        norm, inverse_scale = stats[0:1], stats[1:2]
        from_power, from_unit = along * stats[3:4], norm * along * stats[2:3]

        def finish(carry: jax.Array, head: Any, part: int) -> jax.Array:
            unit = measured.positive(head, part) * inverse_scale
            log = jnp.log(unit)
            slope = jnp.exp((exponent - 1.0) * log)
            power = slope * unit
            dphi = refs[kept][head, channels(plan, part), :]
            dpower = norm * (dphi - from_power * power)
            dunit = dpower * exponent * slope + from_unit * unit
            write(head, part, dunit * inverse_scale)
            return carry + fold(dpower * power * log)

        return over_chunks(plan, group, zeros, finish)

    if plan.groups == 1:
        exponents = through_group(0)
    else:
        refs["exponent_sum"][...] = zeros

        def add(group: Any) -> None:
            refs["exponent_sum"][...] += through_group(group)

        for_groups(plan, add)
        exponents = refs["exponent_sum"][...]
    refs[f"{side}_exponents_gradient"][0, row : row + 1, :] = total(exponents)


def clear_parameter_gradients(plan: Plan, refs: Refs, sides: tuple[str, ...]) -> None:
    """Zeroes the sums over all sequences of a core."""
    if plan.differential:
        refs["bank_gradient"][...] = jnp.zeros(refs["bank_gradient"].shape, jnp.float32)
    if plan.routed:
        for side in sides:
            ref = refs[f"{side}_router_gradient"]
            ref[...] = jnp.zeros(ref.shape, jnp.float32)


def fused_body(plan: Plan, refs: Refs) -> None:
    """Phase 0 takes the queries of a sequence, phase 1 its keys and values."""
    sequence, phase, step = pl.program_id(1), pl.program_id(2), pl.program_id(3)

    @pl.when((sequence == 0) & (phase == 0) & (step == 0))
    def _() -> None:
        clear_parameter_gradients(plan, refs, ("query", "key"))

    @pl.when(phase == 0)
    def _() -> None:
        query_step(plan, refs, step)

        @pl.when(step == plan.blocks - 1)
        def _() -> None:
            finish_query(plan, refs)

    @pl.when(phase == 1)
    def _() -> None:
        key_step(plan, refs, step)


def query_body(plan: Plan, refs: Refs) -> None:
    """Phase 0 alone; the sums for dS and dz of this device's tokens are outputs."""
    step = pl.program_id(3)

    @pl.when((pl.program_id(1) == 0) & (step == 0))
    def _() -> None:
        clear_parameter_gradients(plan, refs, ("query",))

    query_step(plan, refs, step)

    @pl.when(step == plan.blocks - 1)
    def _() -> None:
        refs["state_sum"][0] = refs["state"][...]
        if plan.divides:
            refs["key_sum_out"][0] = refs["key_sum"][...]


def key_body(plan: Plan, refs: Refs) -> None:
    """Phase 1 alone; the means dS and dz are inputs."""

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(3) == 0))
    def _() -> None:
        clear_parameter_gradients(plan, refs, ("key",))

    views = dict(
        refs,
        state_gradient=refs["state_gradient_in"].at[0],
        state_gradient_transposed=refs["state_gradient_transposed_in"].at[0],
    )
    if plan.divides:
        views["key_gradient_rows"] = refs["key_gradient_rows_in"].at[0]
    key_step(plan, views, pl.program_id(3))
