"""Equations (1) to (3) of features.py inside the TPU kernels: phi, lambda, difference."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.features import RELU_OFFSET
from dydilit_jax.kernels.dydila.tpu_blocks import (
    SUBLANES,
    Plan,
    Refs,
    channels,
    dot,
    fold,
    fold_max,
    for_groups,
    load,
    masked,
    over_chunks,
    over_heads,
    total,
)


def router_rows(router: jax.Array, dtype: Any) -> jax.Array:
    """A router (..., n, c) float32 as rows that `router_product` takes.

    For bfloat16, n rows rounded and n rows of what rounding lost, each padded to whole registers.
    """
    if dtype == jnp.float32:
        return router
    choices = router.shape[-2]
    padding = [(0, 0)] * router.ndim
    padding[-2] = (0, pl.cdiv(choices, SUBLANES) * SUBLANES - choices)
    router = jnp.pad(router, padding)
    high = router.astype(dtype)
    # Behind a barrier, or XLA takes the rounding and widening for nothing.
    low = router - lax.optimization_barrier(high).astype(jnp.float32)
    return jnp.concatenate([high, low.astype(dtype)], axis=-2)


def router_product(plan: Plan, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits (n, block) of tokens (c, block) float32: three bfloat16 products make it nearly exact.

    One rounded product would now and then choose another lambda than float32 does.
    """
    if plan.dtype == jnp.float32:
        return dot(rows, tokens)
    high = tokens.astype(plan.dtype)
    low = tokens - high.astype(jnp.float32)
    half = rows.shape[0] // 2
    both = dot(rows, high, dtype=plan.dtype)
    logits = both[:half] + both[half:] + dot(rows[:half], low, dtype=plan.dtype)
    return logits[: plan.choices]


class Measured:
    """phi of one tensor's block, equation (1) of features.py.

    Attributes:
      ref: activations (1, H, d, block).
      exponent: (1, block) float32, or None for relu.
      power: scratch (H, d, block) float32 for u^g, u = relu(z) / max relu(z).
      stats: scratch (groups, 8, block) float32; a row each for ||u|| max / ||u^g||, 1 / max,
        1 / ||u||^2 and 1 / ||u^g||^2.
    """

    def __init__(self, plan: Plan, refs: Refs, name: str, row: int, valid: jax.Array | None):
        self.plan, self.valid = plan, valid
        self.ref = refs[name]
        self.exponent = None
        if plan.measured:
            side = "query" if name.startswith("query") else "key"
            self.exponent = masked(refs[f"{side}_exponents"][0, row : row + 1, :], valid, 1.0)
            self.power, self.stats = refs[f"power_{row}"], refs[f"stats_{row}"]

    def positive(self, head: Any, part: int) -> jax.Array:
        """relu(z) of a chunk, with the offset of a measured one."""
        relu = jnp.maximum(load(self.plan, self.ref, head, part, self.valid), 0.0)
        return relu if self.exponent is None else relu + RELU_OFFSET

    def prepare(self, router: Any = None) -> jax.Array | None:
        """Computes powers and norms, and the product of phi with `router`, (n, block).

        `router` refers to rows by chunk, (D / c, rows, c); see `router_rows`.
        """
        if self.exponent is None:
            return None if router is None else self._relu_logits(router)
        plan, exponent = self.plan, self.exponent * (1.0 / math.log(2.0))

        def group_norms(group: Any) -> jax.Array | None:
            zeros = jnp.zeros((SUBLANES, plan.block), jnp.float32)

            def largest(carry: jax.Array, head: Any, part: int) -> jax.Array:
                return jnp.maximum(carry, fold_max(load(plan, self.ref, head, part, self.valid)))

            top = jnp.max(over_chunks(plan, group, zeros, largest), axis=0, keepdims=True)
            scale = top + RELU_OFFSET
            inverse_scale = 1.0 / scale

            def powers(carry: Any, head: Any, part: int) -> Any:
                unit = self.positive(head, part) * inverse_scale
                power = jnp.exp2(exponent * jnp.log(unit))
                self.power[head, channels(plan, part), :] = power
                units, squares, logits = carry
                if router is not None:
                    logits += router_product(plan, router[head * plan.chunks + part], power)
                return units + fold(unit * unit), squares + fold(power * power), logits

            logits = None if router is None else jnp.zeros((plan.choices, plan.block), jnp.float32)
            units, squares, logits = over_chunks(plan, group, (zeros, zeros, logits), powers)
            units, squares = total(units), total(squares)
            factor = jnp.sqrt(units / squares) * scale
            self.stats[group, 0:1, :] = factor
            self.stats[group, 1:2, :] = inverse_scale
            self.stats[group, 2:3, :] = 1.0 / units
            self.stats[group, 3:4, :] = 1.0 / squares
            return None if logits is None else logits * factor

        if plan.groups == 1:
            return group_norms(0)
        if router is None:
            for_groups(plan, group_norms)
            return None
        zeros = jnp.zeros((plan.choices, plan.block), jnp.float32)
        return lax.fori_loop(0, plan.groups, lambda g, carry: carry + group_norms(g), zeros)

    def _relu_logits(self, router: Any) -> jax.Array:
        """The product of relu(z) with the router, (n, block)."""
        plan = self.plan

        def accumulate(carry: jax.Array, head: Any) -> jax.Array:
            for part in range(plan.chunks):
                rows = router[head * plan.chunks + part]
                carry += router_product(plan, rows, self.positive(head, part))
            return carry

        return over_heads(plan, jnp.zeros((plan.choices, plan.block), jnp.float32), accumulate)

    def stat(self, head: Any, row: int) -> jax.Array:
        """A row (1, block) of the statistics of the group that `head` belongs to."""
        return self.stats[head if self.plan.groups > 1 else 0, row : row + 1, :]

    def phi(self, head: Any, part: int, times: jax.Array | None = None) -> jax.Array:
        """phi of a chunk, (c, block) float32, once `prepare` has run; times a row (1, block)."""
        if self.exponent is None:
            positive = self.positive(head, part)
            return positive if times is None else positive * times
        factor = self.stat(head, 0)
        if times is not None:
            factor = factor * times
        return self.power[head, channels(self.plan, part), :] * factor


class Choice:
    """Lambda of each token, equation (2), and the derivative of the choice.

    With logits a_i of token i as columns (n, block), the weights are those of routing.route.
    """

    def __init__(self, plan: Plan, bank: jax.Array, logits: jax.Array | None):
        self.plan, self.bank = plan, bank
        if logits is None:
            self.probabilities = None
            self.value = jnp.broadcast_to(bank, (1, plan.block))
            return
        exponentials = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
        self.probabilities = exponentials / jnp.sum(exponentials, axis=0, keepdims=True)
        index = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        largest = jnp.max(logits, axis=0, keepdims=True)
        first = jnp.min(jnp.where(logits == largest, index, plan.choices), axis=0, keepdims=True)
        self.onehot = (index == first).astype(jnp.float32)
        if plan.training == "soft":
            self.weights = self.probabilities
        elif plan.training == "switch":
            self.weights = self.onehot * self.probabilities
        else:
            self.weights = self.onehot
        self.value = jnp.sum(self.weights * bank, axis=0, keepdims=True)

    def bank_gradient(self, gradient: jax.Array) -> jax.Array:
        """Gradient of the bank (n, 1) from that of the lambdas (1, block)."""
        if self.probabilities is None:
            return jnp.sum(gradient, axis=1, keepdims=True)
        return jnp.sum(self.weights * gradient, axis=1, keepdims=True)

    def logits_gradient(self, gradient: jax.Array) -> jax.Array:
        """Gradient of the logits (n, block) from that of the lambdas (1, block)."""
        assert self.probabilities is not None
        gradient = gradient * self.bank
        if self.plan.training == "switch":
            gradient = gradient * self.onehot
        mean = jnp.sum(self.probabilities * gradient, axis=0, keepdims=True)
        return self.probabilities * (gradient - mean)


def features(
    plan: Plan, refs: Refs, side: str, valid: jax.Array | None
) -> tuple[Measured, Measured | None, jax.Array | None]:
    """phi of a side's tensors, prepared, and its lambda routers' logits (n, block)."""
    router = refs[f"{side}_router_rows"] if plan.routed else None
    base = Measured(plan, refs, side, 0, valid)
    logits = base.prepare(None if router is None else router.at[0])
    if not plan.differential:
        return base, None, None
    redundant = Measured(plan, refs, f"{side}_redundant", 1, valid)
    more = redundant.prepare(None if router is None else router.at[1])
    if logits is None or more is None:
        return base, redundant, None
    logits = logits + more
    if plan.noisy:
        logits += masked(refs[f"{side}_noise"][0], valid)
    return base, redundant, logits


def head_features(
    plan: Plan, head: Any, base: Measured, redundant: Measured | None, value: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Equation (3) for one head, rounded: the difference and phi, both (d, block).

    `value` is lambda of each token, (1, block).
    """
    differences, bases = [], []
    for part in range(plan.chunks):
        phi = base.phi(head, part)
        bases.append(phi.astype(plan.dtype))
        if redundant is not None:
            phi = phi - redundant.phi(head, part, value)
        differences.append(phi.astype(plan.dtype))
    if plan.chunks == 1:
        return differences[0], bases[0]
    return jnp.concatenate(differences, axis=0), jnp.concatenate(bases, axis=0)
