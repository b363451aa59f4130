"""The attention core in its explicit N x N form: the specification, for tests and for pictures.

A_im = Qd_i . Kd_m / (N den_i),     O = A V               arXiv 2601.13683; per head
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dydilit_jax.kernels.dydila.features import (
    CoreInputs,
    CoreOptions,
    accumulated,
    differential_features,
)
from dydilit_jax.kernels.dydila.xla import CoreOutput, denominator, normalize, rotated


def attention_weights(inputs: CoreInputs, options: CoreOptions) -> jax.Array:
    """The matrix A that the output is A V of: (B, H, N, N), float32 or better.

    For the normalizer `rms`, which is no function of queries and keys alone, A before it.
    """
    features = differential_features(inputs, options)
    query, key = rotated(features, inputs)
    weights = accumulated("bnhd,bmhd->bhnm", query, key) / query.shape[1]
    den = denominator(features, options, weights.dtype)
    return weights if den is None else weights / den.transpose(0, 2, 1)[..., None]


def explicit_attention(inputs: CoreInputs, options: CoreOptions) -> CoreOutput:
    """The core in O(N^2 d) multiply-adds a head; inputs and result as api.dydila_core has them."""
    features = differential_features(inputs, options)
    query, key = rotated(features, inputs)
    value = inputs.value.reshape(query.shape)
    weights = accumulated("bnhd,bmhd->bhnm", query, key) / query.shape[1]
    numerator = jnp.einsum("bhnm,bmhe->bnhe", weights, value.astype(weights.dtype))
    output, den = normalize(numerator, features, options)
    return CoreOutput(
        output.reshape(inputs.value.shape).astype(value.dtype), den, features.routings
    )
