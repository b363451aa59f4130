"""What every token mixer has: the shared projections into queries, keys, values, and out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.kernels.rotary import Rotation
from dydilit_jax.models.config import ModelConfig

Telemetry = dict[str, jax.Array]


class Context(NamedTuple):
    """What a token mixer reads beside the tokens.

    Attributes:
      rotation: rotary angles, or None.
      key: PRNG key of the routers' noise; None when sampling.
    """

    rotation: Rotation | None = None
    key: jax.Array | None = None


def fused_xavier(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Xavier-uniform of a (D, 3 D) matrix, DiT's fused projection, for any (..., D, E) shape."""
    width = shape[-1]
    bound = (6.0 / (4 * width)) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class SharedProjections(nnx.Module):
    """The token-shared maps W^0 of queries, keys and values."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.dtype = jnp.dtype(config.dtype)
        self.kernel = nnx.Param(
            fused_xavier(rngs.params(), (width, 3, width), jnp.dtype(jnp.float32))
        )
        self.bias = nnx.Param(jnp.zeros((3, width))) if config.attention.qkv_bias else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(B, N, D) to queries, keys and values, each (B, N, D)."""
        width = x.shape[-1]
        kernel = self.kernel[...].astype(self.dtype).reshape(width, 3 * width)
        joined = x.astype(self.dtype) @ kernel
        if self.bias is not None:
            joined = joined + self.bias[...].astype(self.dtype).reshape(3 * width)
        query, key, value = jnp.split(joined, 3, axis=-1)
        return query, key, value


def output_projection(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Linear:
    """The linear map after the heads are joined."""
    return nnx.Linear(
        config.width,
        config.width,
        kernel_init=nnx.initializers.xavier_uniform(),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )
