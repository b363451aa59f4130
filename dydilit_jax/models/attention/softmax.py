"""Softmax attention, as DiT (arXiv 2212.09748) has it."""

from __future__ import annotations

import jax
from flax import nnx

from dydilit_jax.kernels.rotary import rotate
from dydilit_jax.models.attention.projections import (
    Context,
    SharedProjections,
    Telemetry,
    depthwise_term,
    output_projection,
)
from dydilit_jax.models.config import ModelConfig


class SoftmaxAttention(nnx.Module):
    """softmax(Q K^T / sqrt(d)) V: (B, N, D) to (B, N, D)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.heads = config.attention.heads
        self.qkv = SharedProjections(config, rngs=rngs)
        self.out = output_projection(config, rngs=rngs)
        self.depthwise = depthwise_term(config, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Telemetry]:
        """Mixes tokens (B, N, D); also returns telemetry by name."""
        shape = (*x.shape[:2], self.heads, x.shape[-1] // self.heads)
        query, key, value = self.qkv(x)
        q, k, v = query.reshape(shape), key.reshape(shape), value.reshape(shape)
        if context.rotation is not None:
            q, k = rotate(q, context.rotation), rotate(k, context.rotation)
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        if self.depthwise is not None:
            mixed = mixed + self.depthwise(value)
        return self.out(mixed), {}
