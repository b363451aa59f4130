"""What every token mixer has: projections into queries, keys, values, and out; DWC(V)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.kernels.rotary import Rotation
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.feedforward import DepthwiseConv
from dydilit_jax.models.linear import Linear, affine
from dydilit_jax.models.placement import place

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
        bias = None if self.bias is None else self.bias[...]
        joined = affine(x.astype(self.dtype), self.kernel[...], bias)
        query, key, value = (place(joined[..., part, :], "channels") for part in range(3))
        return query, key, value


def output_projection(config: ModelConfig, *, rngs: nnx.Rngs) -> Linear:
    """The linear map after the heads are joined."""
    return Linear(
        config.width,
        config.width,
        kernel_init=nnx.initializers.xavier_uniform(),
        dtype=jnp.dtype(config.dtype),
        rngs=rngs,
    )


def depthwise_term(config: ModelConfig, *, rngs: nnx.Rngs) -> DepthwiseConv | None:
    """The depthwise convolution of V that is added to the output, if the attention has one."""
    attention = config.attention
    if not attention.depthwise:
        return None
    return DepthwiseConv(
        config.width, attention.depthwise, config.grid, prefer=attention.backend, rngs=rngs
    )
