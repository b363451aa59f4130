"""Depthwise convolution as XLA's grouped convolution: the specification.

    y[b, h, w, c] = bias[c] + sum_ij x[b, h + i - r, w + j - r, c] kernel[i, j, c]

with r = (k - 1) / 2, x zero outside the image, and no flip of the kernel: what torch's
Conv2d(groups=C) and lax.conv compute.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Return the convolution of the arguments of `api.depthwise_conv`; JAX differentiates it.

    Operands are cast to float32 (float64 for float64) first: asking for float32 sums of bfloat16
    operands instead gives a convolution whose gradient JAX refuses.
    """
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = lax.conv_general_dilated(
        x.astype(acc),
        kernel.astype(acc)[:, :, None, :],
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    if bias is not None:
        y = y + bias.astype(acc)
    return y.astype(x.dtype)
