"""Scalars of tokens that the GPU kernels read, from their sums, and the way back.

With s, A, P, W, L the sums of one tensor's token that pallas_gpu_sums.py leaves, over all channels
or (`norm_scope` head) those of each head,

    (1) c = s sqrt(A / P)              A = sum u^2, P = sum u^(2 g), u = (relu(z) + 1e-6) / s
    (2) logits = sum c L               over Z, Z' and heads; L = sum u^g R, or sum relu(z) R
    (3) lambda = route(logits) bank

and from dc as far as it comes from the products, and dlambda, both summed over heads where they
belong to the whole token,

    (4) dlogits, dbank                 by (3)
    (5) t = c (dc + dlogits L)         all of dln c; its way to z is pallas_gpu_features' (4)

All of this is of the size of tokens, not of their channels, and XLA's.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila.pallas_gpu_features import Core
from dydilit_jax.kernels.dydila.pallas_gpu_sums import Sums

Tokens = tuple[jax.Array, ...]


class Side(NamedTuple):
    """What the core reads of the queries or of the keys.

    Attributes:
      tokens: Z, or Z and Z', (B, N, D) bfloat16.
      exponents: of each, (B, N) float32; empty without a power.
      router: (2 D, n) float32; None for a lambda that is not routed.
      noise: added to the logits (B, N, n) float32; None for none.
    """

    tokens: Tokens
    exponents: Tokens
    router: jax.Array | None
    noise: jax.Array | None


class Gradients(NamedTuple):
    """What (4) and (5) give of one side.

    Attributes:
      bank: of the lambdas, in their shape; None without them.
      logits: (B, N, n), or None.
      through_norms: (B, 1 or H, 3 powers, N), or None: pallas_gpu_features.Known has them.
    """

    bank: jax.Array | None
    logits: jax.Array | None
    through_norms: jax.Array | None


def scale(sums: Sums) -> jax.Array:
    """Equation (1): c, (B, 1 or H, N)."""
    return sums.largest * jnp.sqrt(sums.squares / sums.powers)


def router_logits(side: Side, sums: tuple[Sums, ...]) -> jax.Array | None:
    """Equation (2): (B, N, n) float32, noise included; None for a lambda that is not routed."""
    if side.router is None:
        return None
    logits = jnp.zeros((), jnp.float32) if side.noise is None else side.noise
    for each in sums:
        scaled = each.logits if each.largest is None else each.logits * scale(each)[:, :, None]
        logits = logits + scaled.sum(axis=1).swapaxes(1, 2)
    return logits


def routed_lambda(logits: jax.Array | None, bank: jax.Array, training: str) -> jax.Array:
    """Equation (3): (B, N), or () for a lambda that is not routed. Noise is in the logits."""
    if logits is None:
        return bank.reshape(())
    return jnp.sum(routing.route(logits, training).weights * bank, axis=-1)


def scalar_rows(
    core: Core, side: Side, sums: tuple[Sums, ...], chosen: jax.Array | None
) -> jax.Array:
    """The rows that `Core.rows` counts, (B, 1 or H, rows, N); `chosen` is lambda, (B, N) or ()."""
    batch, tokens = side.tokens[0].shape[:2]
    groups = 1 if sums[0].largest is None else sums[0].largest.shape[1]
    shape = (batch, groups, tokens)
    rows: list[jax.Array] = []
    if core.powered:
        for each, exponent in zip(sums, side.exponents, strict=True):
            rows += [jnp.broadcast_to(exponent[:, None], shape), 1.0 / each.largest, scale(each)]
    if chosen is not None:
        of_tokens = jnp.broadcast_to(chosen, (batch, tokens))
        rows.append(jnp.broadcast_to(of_tokens[:, None], shape))
    return jnp.stack(rows or [jnp.ones(shape, jnp.float32)], axis=2)


def scalar_gradients(
    core: Core,
    side: Side,
    sums: tuple[Sums, ...],
    bank: jax.Array | None,
    training: str,
    rows: jax.Array | None,
    d_logits: jax.Array | None,
) -> Gradients:
    """Equations (4) and (5).

    Args:
      core: static part.
      side, sums, bank: as they were forward.
      training: how the router is trained.
      rows: of each head, (B, H, core.summed, N) float32: dc, dc', dlambda; None if there are none.
      d_logits: (B, N, n), what the logits' gradient has from elsewhere.
    """
    d_bank = None
    if core.differential:
        assert rows is not None
        assert bank is not None
        logits = router_logits(side, sums)
        chosen, vjp = jax.vjp(lambda a, bank: routed_lambda(a, bank, training), logits, bank)
        d_chosen = rows[:, :, -1].sum(axis=1)
        more, d_bank = vjp(d_chosen if chosen.ndim else d_chosen.sum())
        d_logits = None if logits is None else d_logits + more
    if not core.powered:
        return Gradients(d_bank, d_logits, None)
    assert rows is not None
    through_norms: list[jax.Array] = []
    for i, (each, exponent) in enumerate(zip(sums, side.exponents, strict=True)):
        d_scale = rows[:, :, i]
        if each.largest.shape[1] == 1:
            d_scale = d_scale.sum(axis=1, keepdims=True)
        if d_logits is not None:
            d_scale = d_scale + jnp.einsum("bnj,bgjn->bgn", d_logits, each.logits)
        t = d_scale * scale(each)
        through_norms += [
            t / (each.squares * each.largest**2),
            t * exponent[:, None] / each.powers,
            each.logs / each.powers,
        ]
    return Gradients(d_bank, d_logits, jnp.stack(through_norms, axis=2))
