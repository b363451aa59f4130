"""Depthwise convolution as shifted multiply-adds, with its own gradient.

With p the zero-padded input and p_ij its H x W window at offset (i, j):

    y         = bias + sum_ij p_ij kernel[i, j]                                    (1)
    dx        = (1) of dy with the kernel flipped in both directions               (2)
    dkernel_ij = sum_bhw p_ij dy,   dbias = sum_bhw dy                             (3)

XLA fuses (1) into one pass. (3) is one reduction with k * k (+ 1) results, so that a single pass
reads p and dy once; k * k separate sums, and what automatic differentiation makes of (1), read them
k * k times. It sums over each image first and over the batch after. Measured on CPU at
8 x 16 x 16 x 384, 5 x 5, against other forms of (3), whole gradient in ms: this 4.0, one sum over
all three axes 8.7, a loop over rows 5.6, k * k separate sums 18.

XLA for GPUs writes the k * k products of such a reduction to memory first (compiled for an H100,
5 x 5: 102 activations moved). There (3) is one sum over an array of all windows, which it never
writes: 2.4 moved, though every window is read through the caches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels.platform import target


@jax.custom_vjp
def shifted(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Equation (1); see `api.depthwise_conv` for arguments."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    k = kernel.shape[0]
    y = jnp.zeros((), acc) if bias is None else bias.astype(acc)
    for tap, window in enumerate(_windows(x, k)):
        y = y + window.astype(acc) * kernel[divmod(tap, k)].astype(acc)
    return y.astype(x.dtype)


def _shifted_forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return shifted(x, kernel, bias), (x, kernel, bias)


def _shifted_backward(
    inputs: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Equations (2) and (3), in the dtypes of x, kernel and bias."""
    x, kernel, bias = inputs
    k = kernel.shape[0]
    acc = jnp.promote_types(x.dtype, jnp.float32)
    dx = shifted(dy, kernel[::-1, ::-1], None)
    windows = _windows(x, k)
    if bias is not None:
        windows.append(jnp.ones_like(x))
    sums = jnp.sum(_image_sums(windows, dy, acc), axis=1)
    dkernel = sums[: k * k].reshape(kernel.shape).astype(kernel.dtype)
    dbias = None if bias is None else sums[k * k].astype(bias.dtype)
    return dx, dkernel, dbias


shifted.defvjp(_shifted_forward, _shifted_backward)


def _windows(x: jax.Array, k: int) -> list[jax.Array]:
    """Return the k * k shifted windows of x, each (B, H, W, C), row by row of the kernel."""
    _, H, W, _ = x.shape
    r = k // 2
    padded = jnp.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))
    return [padded[:, i : i + H, j : j + W] for i in range(k) for j in range(k)]


def _image_sums(windows: list[jax.Array], dy: jax.Array, acc: jnp.dtype) -> jax.Array:
    """Sums over each image of every window times dy, each (B, H, W, C): (windows, B, C)."""
    if target().platform == "gpu":
        products = jnp.stack(windows, axis=1).astype(acc) * dy.astype(acc)[:, None]
        return jnp.sum(products, axis=(2, 3)).swapaxes(0, 1)
    terms = [window.astype(acc) * dy.astype(acc) for window in windows]
    zeros = [jnp.zeros((), acc)] * len(terms)
    return jnp.stack(lax.reduce(terms, zeros, _add_each, dimensions=(1, 2)))


def _add_each(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
    return [a + b for a, b in zip(left, right, strict=True)]
