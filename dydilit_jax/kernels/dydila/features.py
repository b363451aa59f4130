"""From projected tokens to the features that linear attention multiplies.

DyDiLA, arXiv 2601.13683. With z one of Q, K, Q', K' and i a token:

    (1) measure kernel     phi_g(z) = relu(z)^g ||relu(z)|| / ||relu(z)^g||
    (2) lambda             l_i = sum_j w_ij l_j,   w_i = route([phi(Q)_i ; phi(Q')_i] R)
    (3) difference         Qd_i = phi(Q)_i - l_i phi(Q')_i,   Kd_i likewise

Powers, norms and all that follows are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels import routing
from dydilit_jax.kernels.rotary import Rotation

NORMALIZERS = ("base", "signed", "none", "rms")
NORM_SCOPES = ("token", "head")
RELU_OFFSET = 1e-6  # added after relu, so that 0^g has a gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreOptions:
    """Static options of the attention core.

    Attributes:
      heads: H; the width must be a multiple of it.
      normalizer: what the output is divided by, one of NORMALIZERS:
        `base` phi(Q)_i . mean_m phi(K)_m + eps; `signed` Qd_i . mean_m Kd_m, kept eps away from
        zero; `none` nothing (the sums over tokens are means in every case); `rms` its own root
        mean square per head.
      norm_scope: whether the norms of equation (1) run over the whole `token` or each `head`.
      router_training: see kernels/routing.py.
      router_jitter: noise on the lambda routers' input while training.
      eps: added to the denominator.
    """

    heads: int
    normalizer: str = "base"
    norm_scope: str = "token"
    router_training: str = "ste"
    router_jitter: float = 0.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.normalizer not in NORMALIZERS:
            raise unknown_name("normalizer", self.normalizer, NORMALIZERS)
        if self.norm_scope not in NORM_SCOPES:
            raise unknown_name("norm scope", self.norm_scope, NORM_SCOPES)
        if self.router_training not in routing.ROUTER_TRAININGS:
            raise unknown_name("router training", self.router_training, routing.ROUTER_TRAININGS)


class Exponents(NamedTuple):
    """Exponent of each token of Q, K, Q' and K': (B, N) or scalars; Q', K' may be None."""

    query: jax.Array
    key: jax.Array
    query_redundant: jax.Array | None = None
    key_redundant: jax.Array | None = None


class Lambdas(NamedTuple):
    """The lambda bank and its routers.

    Attributes:
      bank: (n,) scalars l_j, or () for a single fixed lambda.
      query_router: (2 D, n), or None when there is nothing to choose.
      key_router: (2 D, n), or None.
    """

    bank: jax.Array
    query_router: jax.Array | None = None
    key_router: jax.Array | None = None


class CoreInputs(NamedTuple):
    """Arrays that the attention core reads.

    Attributes:
      query, key, value: (B, N, D), one dtype.
      exponents: exponents of the measure kernel; None means phi = relu.
      query_redundant, key_redundant: (B, N, D), Q' and K'; None switches the difference off.
      lambdas: needed with Q' and K'.
      rotation: rotary angles; they turn the features of the numerator and leave the denominator.
      noise_key: PRNG key of the lambda routers' noise; None means no noise.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    exponents: Exponents | None = None
    query_redundant: jax.Array | None = None
    key_redundant: jax.Array | None = None
    lambdas: Lambdas | None = None
    rotation: Rotation | None = None
    noise_key: jax.Array | None = None


def accumulated(equation: str, first: jax.Array, second: jax.Array) -> jax.Array:
    """An einsum of two arrays whose products are summed in float32 (float64 for float64).

    Operands are widened rather than the product's dtype named: XLA's CPU back end has no batched
    bfloat16 product into float32, and a TPU takes widened operands in one bfloat16 pass anyway.
    """
    dtype = jnp.promote_types(first.dtype, jnp.float32)
    return jnp.einsum(equation, first.astype(dtype), second.astype(dtype))


class Features(NamedTuple):
    """What the two products and the denominator need, all (B, N, H, d) in the inputs' dtype.

    `query` and `key` are Qd and Kd; `base_query` and `base_key` are phi(Q) and phi(K).
    `routings` holds the lambda routers' decisions by name.
    """

    query: jax.Array
    key: jax.Array
    base_query: jax.Array
    base_key: jax.Array
    routings: dict[str, routing.Routing]


def check_inputs(inputs: CoreInputs, options: CoreOptions) -> None:
    """Raises UserError, in one line, when shapes or parts do not belong together."""
    shape = inputs.query.shape
    if len(shape) != 3:
        raise UserError(f"queries must have shape (B, N, D), got {shape}")
    if shape[-1] % options.heads:
        raise UserError(f"width {shape[-1]} is not divisible by {options.heads} heads")
    for name in ("key", "value", "query_redundant", "key_redundant"):
        array = getattr(inputs, name)
        if array is not None and array.shape != shape:
            raise UserError(f"{name} has shape {array.shape}, the queries have {shape}")
    if (inputs.query_redundant is None) != (inputs.key_redundant is None):
        raise UserError("give both query_redundant and key_redundant, or neither")
    if inputs.query_redundant is not None and inputs.lambdas is None:
        raise UserError("query_redundant and key_redundant need lambdas")
    for name, exponent in zip(Exponents._fields, inputs.exponents or (), strict=False):
        if exponent is not None and jnp.shape(exponent) not in ((), shape[:2]):
            raise UserError(
                f"exponent of {name} has shape {jnp.shape(exponent)}, expected a scalar or "
                f"{shape[:2]}, one for each token"
            )
    if inputs.lambdas is not None:
        bank, *routers = inputs.lambdas
        for name, router in zip(("query_router", "key_router"), routers, strict=True):
            expected = (2 * shape[-1], bank.size)
            if router is not None and router.shape != expected:
                raise UserError(f"{name} has shape {router.shape}, expected {expected}: (2 D, n)")


def measure_kernel(z: jax.Array, exponent: jax.Array | None, *, groups: int = 1) -> jax.Array:
    """Equation (1): a power that sharpens a token's direction and keeps its norm.

    The map is positively homogeneous, so the token is divided by its largest entry before the
    power and multiplied back after: nothing overflows, and the norms are at least one.

    Args:
      z: (B, N, D) of any floating dtype.
      exponent: (B, N) or a scalar; None gives relu(z).
      groups: the norms run over D / groups channels: 1 for the token, H for the head.

    Returns:
      (B, N, D) float32 (float64 for float64 z).
    """
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    positive = jax.nn.relu(z.astype(dtype))
    if exponent is None:
        return positive
    batch, tokens, width = z.shape
    positive = (positive + RELU_OFFSET).reshape(batch, tokens, groups, width // groups)
    # A constant for the derivative: phi(c u) = c phi(u) for every constant c > 0.
    scale = jax.lax.stop_gradient(positive.max(axis=-1, keepdims=True))
    unit = positive / scale
    exponent = jnp.asarray(exponent, dtype)
    if exponent.ndim:
        exponent = exponent[:, :, None, None]
    power = jnp.exp(exponent * jnp.log(unit))
    norm_ratio = jnp.sqrt(
        jnp.sum(unit * unit, axis=-1, keepdims=True) / jnp.sum(power * power, -1, keepdims=True)
    )
    return (power * (norm_ratio * scale)).reshape(batch, tokens, width)


def choose_lambda(
    base: jax.Array,
    redundant: jax.Array,
    bank: jax.Array,
    router: jax.Array | None,
    options: CoreOptions,
    key: jax.Array | None,
) -> tuple[jax.Array, routing.Routing | None]:
    """Equation (2): lambda of each token, (B, N, 1) or broadcastable, and what the router chose."""
    bank = bank.astype(base.dtype)
    if router is None:
        return bank.reshape(()), None
    jitter_key, choice_key = (None, None) if key is None else jax.random.split(key)
    jitter_keys = (None, None) if jitter_key is None else jax.random.split(jitter_key)
    # [phi ; phi'] R as two products: joined, channels that a mesh splits would change places.
    logits, more = (
        routing.router_logits(phi, rows, jitter=options.router_jitter, key=noise)
        for phi, rows, noise in zip(
            (base, redundant), jnp.split(router, 2), jitter_keys, strict=True
        )
    )
    logits = logits + more
    chosen = routing.route(logits, options.router_training, key=choice_key)
    return jnp.sum(chosen.weights * bank, axis=-1, keepdims=True), chosen


def differential_features(inputs: CoreInputs, options: CoreOptions) -> Features:
    """Equations (1) to (3): the features of queries and keys, split into heads."""
    check_inputs(inputs, options)
    batch, tokens, width = inputs.query.shape
    groups = options.heads if options.norm_scope == "head" else 1
    exponents = inputs.exponents or Exponents(None, None)  # type: ignore[arg-type]
    base_query = measure_kernel(inputs.query, exponents.query, groups=groups)
    base_key = measure_kernel(inputs.key, exponents.key, groups=groups)
    query, key, routings = base_query, base_key, {}
    if inputs.query_redundant is not None:
        assert inputs.key_redundant is not None  # check_inputs
        assert inputs.lambdas is not None
        redundant_query = measure_kernel(
            inputs.query_redundant, exponents.query_redundant, groups=groups
        )
        redundant_key = measure_kernel(inputs.key_redundant, exponents.key_redundant, groups=groups)
        bank, query_router, key_router = inputs.lambdas
        keys = (None, None) if inputs.noise_key is None else jax.random.split(inputs.noise_key)
        query_lambda, chosen = choose_lambda(
            base_query, redundant_query, bank, query_router, options, keys[0]
        )
        if chosen is not None:
            routings["query_lambda"] = chosen
        key_lambda, chosen = choose_lambda(
            base_key, redundant_key, bank, key_router, options, keys[1]
        )
        if chosen is not None:
            routings["key_lambda"] = chosen
        query = base_query - query_lambda * redundant_query
        key = base_key - key_lambda * redundant_key

    def heads(x: jax.Array) -> jax.Array:
        split = x.reshape(batch, tokens, options.heads, width // options.heads)
        return split.astype(inputs.value.dtype)

    return Features(heads(query), heads(key), heads(base_query), heads(base_key), routings)
