"""Layers of the autoencoders, channels last, named and laid out so that PyTorch's weights fit.

Parameters are float32. `dtype` is what convolutions and products compute in; statistics of norms
and attention are float32 in any case. In float32 products have full precision on every platform:
the accelerators' faster forms (bfloat16 passes, TF32) would be off by more than 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision:
    """Full precision for float32, the platform's own for less."""
    float32 = dtype == jnp.dtype(jnp.float32)
    return jax.lax.Precision.HIGHEST if float32 else jax.lax.Precision.DEFAULT


def conv(
    channels: int,
    features: int,
    size: int,
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    groups: int = 1,
    bias: bool = True,
) -> nnx.Conv:
    """A convolution (B, H, W, channels) to (B, H', W', features) with a size x size kernel.

    Args:
      channels, features, size, stride, groups, bias: as PyTorch's Conv2d.
      dtype: to compute in.
      rngs: of the initial weights.
      padding: zeros before and after height and width; default: what keeps the size at stride 1.
    """
    before_after = padding if padding is not None else (size // 2, size // 2)
    return nnx.Conv(
        channels,
        features,
        (size, size),
        strides=stride,
        padding=(before_after, before_after),
        feature_group_count=groups,
        use_bias=bias,
        dtype=dtype,
        precision=precision_of(dtype),
        rngs=rngs,
    )


def linear(
    channels: int, features: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, bias: bool = True
) -> nnx.Linear:
    """A linear map of the last axis."""
    return nnx.Linear(
        channels,
        features,
        use_bias=bias,
        dtype=dtype,
        precision=precision_of(dtype),
        rngs=rngs,
    )


class GroupNorm(nnx.GroupNorm):
    """Group normalisation in float32, whatever the input's dtype, which the output has again."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(
            channels,
            num_groups=groups,
            epsilon=1e-6,
            dtype=jnp.float32,
            use_fast_variance=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises (B, H, W, C) over height, width and the channels of a group."""
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale + bias over channels, in float32 (arXiv 1910.07467, with a bias)."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-5)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


def upsample_nearest(x: jax.Array) -> jax.Array:
    """Each pixel as a 2 x 2 square: (B, H, W, C) to (B, 2 H, 2 W, C)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def pixel_unshuffle(x: jax.Array) -> jax.Array:
    """2 x 2 squares to channels: (B, H, W, C) to (B, H / 2, W / 2, 4 C).

    Channel 4 c + 2 i + j is channel c of row i, column j of the square, as PyTorch has it.
    """
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def pixel_shuffle(x: jax.Array) -> jax.Array:
    """The inverse of `pixel_unshuffle`: (B, H, W, 4 C) to (B, 2 H, 2 W, C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def group_mean(x: jax.Array, features: int) -> jax.Array:
    """Means of neighbouring channels: (..., C) to (..., features), which divides C."""
    return x.reshape(*x.shape[:-1], features, -1).mean(axis=-1)
