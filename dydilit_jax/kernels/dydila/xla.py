"""The attention core in its linear order, in plain XLA.

    O_i = Qd_i (mean_m Kd_m^T V_m) / den_i                    arXiv 2601.13683; per head

with the features of features.py. The sums over tokens are means, so that they stay of the size of
one token at any length; the state and the denominator are accumulated in float32 or better.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dydilit_jax.kernels.dydila.features import (
    CoreInputs,
    CoreOptions,
    Features,
    accumulated,
    differential_features,
)
from dydilit_jax.kernels.rotary import rotate
from dydilit_jax.kernels.routing import Routing


class CoreOutput(NamedTuple):
    """Result of the attention core.

    Attributes:
      output: (B, N, D) in the values' dtype, before the depthwise term.
      denominator: (B, N, H) float32, or None for the normalizers that divide by nothing.
      routings: the lambda routers' decisions by name.
    """

    output: jax.Array
    denominator: jax.Array | None
    routings: dict[str, Routing]


def denominator(features: Features, options: CoreOptions, dtype: jnp.dtype) -> jax.Array | None:
    """den_i of the chosen normalizer, (B, N, H) in `dtype`; None for `none` and `rms`."""
    if options.normalizer == "base":
        query, key = features.base_query, features.base_key
    elif options.normalizer == "signed":
        query, key = features.query, features.key
    else:
        return None
    mean_key = jnp.mean(key.astype(dtype), axis=1)
    product = jnp.einsum("bnhd,bhd->bnh", query.astype(dtype), mean_key)
    if options.normalizer == "base":
        return product + options.eps
    return jnp.where(jnp.abs(product) < options.eps, jnp.copysign(options.eps, product), product)


def normalize(
    numerator: jax.Array, features: Features, options: CoreOptions
) -> tuple[jax.Array, jax.Array | None]:
    """Divides the numerator (B, N, H, d) by the denominator, or as the normalizer says."""
    den = denominator(features, options, numerator.dtype)
    if den is not None:
        return numerator / den[..., None], den
    if options.normalizer == "rms":
        mean_square = jnp.mean(numerator * numerator, axis=-1, keepdims=True)
        return numerator * jax.lax.rsqrt(mean_square + options.eps), None
    return numerator, None


def rotated(features: Features, inputs: CoreInputs) -> tuple[jax.Array, jax.Array]:
    """Qd and Kd as the numerator takes them: turned by their token's angles, if there are any."""
    if inputs.rotation is None:
        return features.query, features.key
    return rotate(features.query, inputs.rotation), rotate(features.key, inputs.rotation)


def linear_attention(inputs: CoreInputs, options: CoreOptions) -> CoreOutput:
    """The core in O(N d^2) multiply-adds a head; inputs and result as api.dydila_core has them."""
    features = differential_features(inputs, options)
    query, key = rotated(features, inputs)
    value = inputs.value.reshape(query.shape)
    state = accumulated("bnhd,bnhe->bhde", key, value) / query.shape[1]
    numerator = accumulated("bnhd,bhde->bnhe", query, state)
    output, den = normalize(numerator, features, options)
    return CoreOutput(
        output.reshape(inputs.value.shape).astype(value.dtype), den, features.routings
    )
