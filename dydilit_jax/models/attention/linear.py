"""Linear attention baselines: plain ReLU (LiT, SANA) and focused (FLatten)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents
from dydilit_jax.models.attention.projections import (
    Context,
    SharedProjections,
    Telemetry,
    depthwise_term,
    output_projection,
)
from dydilit_jax.models.config import ModelConfig


class LinearAttention(nnx.Module):
    """phi(Q) (phi(K)^T V) / (phi(Q) . sum phi(K)) + DWC(V): (B, N, D) to (B, N, D).

    `relu`: phi = relu (LiT, arXiv 2501.12976; SANA, arXiv 2410.10629, without the depthwise term).
    `focused`: phi is the norm-preserving power of fixed exponent (FLatten, arXiv 2308.00442).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention = config.attention
        self.options = CoreOptions(
            heads=attention.heads,
            normalizer=attention.normalizer,
            norm_scope=attention.norm_scope,
            eps=attention.eps,
        )
        self.implementation = attention.implementation or None
        self.exponent = attention.exponent_init if attention.kind == "focused" else None
        self.qkv = SharedProjections(config, rngs=rngs)
        self.out = output_projection(config, rngs=rngs)
        self.depthwise = depthwise_term(config, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Telemetry]:
        """Mixes tokens (B, N, D); also returns telemetry by name."""
        query, key, value = self.qkv(x)
        exponents = None
        if self.exponent is not None:
            fixed = jnp.float32(self.exponent)
            exponents = Exponents(query=fixed, key=fixed)
        inputs = CoreInputs(query, key, value, exponents=exponents, rotation=context.rotation)
        mixed, denominator, _ = dydila_core(
            inputs, self.options, implementation=self.implementation
        )
        if self.depthwise is not None:
            mixed = mixed + self.depthwise(value)
        telemetry = {} if denominator is None else {"denominator_min": jnp.min(denominator)}
        return self.out(mixed), telemetry
