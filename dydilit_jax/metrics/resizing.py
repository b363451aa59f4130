"""Resizing images as the libraries do it that features were defined with.

An output row is a weighted sum of input rows, so resizing is a product with a matrix from each
side. With s = in / out and output i:

    tf1          TensorFlow 1's ResizeBilinear, align_corners=False: source i s, between the rows
                 floor(i s) and the next; corners are not aligned, and nothing is averaged
    half_pixel   PyTorch's bilinear, align_corners=False: source (i + 1/2) s - 1/2, not below zero
    cubic        Keys' kernel, a = -1/2, made wider by s where the image shrinks: Pillow's bicubic
                 and PyTorch's with antialias=True; `resize_levels` rounds as Pillow does
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Weights = Callable[[int, int], np.ndarray]


def tf1(size: int, target: int) -> np.ndarray:
    """(target, size) float32; the sources are computed in float32, as TensorFlow does."""
    scale = np.float32(size) / np.float32(target)
    return _between(np.arange(target, dtype=np.float32) * scale, size)


def half_pixel(size: int, target: int) -> np.ndarray:
    """(target, size) float32; the sources are computed in float32, as PyTorch does."""
    scale = np.float32(size) / np.float32(target)
    half = np.float32(0.5)
    source = (np.arange(target, dtype=np.float32) + half) * scale - half
    return _between(np.maximum(source, np.float32(0.0)), size)


def _between(source: np.ndarray, size: int) -> np.ndarray:
    """Weights of the rows before and after each source."""
    lower = np.floor(source).astype(int)
    upper = np.minimum(lower + 1, size - 1)
    share = source - lower.astype(np.float32)
    weights = np.zeros((len(source), size), np.float32)
    rows = np.arange(len(source))
    np.add.at(weights, (rows, lower), 1.0 - share)
    np.add.at(weights, (rows, upper), share)
    return weights


def cubic(size: int, target: int) -> np.ndarray:
    """(target, size) float32."""
    scale = size / target
    wide = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    distance = np.abs((np.arange(size) + 0.5 - centre[:, None]) / wide)
    weights = keys_cubic(distance, -0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def keys_cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel of distances that are not negative (Keys 1981)."""
    x = distance
    near = (a + 2.0) * x**3 - (a + 3.0) * x**2 + 1.0
    far = a * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def resize(images: jax.Array, target: int, weights: Weights) -> jax.Array:
    """Images (n, H, W, C) float32 to (n, target, target, C), by one of the functions above."""
    height, width = images.shape[1:3]
    if height == width == target:
        return images
    return jnp.einsum(
        "ih,nhwc,jw->nijc",
        jnp.asarray(weights(height, target)),
        images,
        jnp.asarray(weights(width, target)),
        precision=jax.lax.Precision.HIGHEST,
    )


def resize_levels(levels: jax.Array, target: int) -> jax.Array:
    """Whole numbers (n, H, W, C) in [0, 255] to (n, target, target, C), as Pillow's bicubic does.

    Pillow resizes along the rows, then along the columns, and rounds to 8 bits after each. Its
    weights have 22 binary digits, so that a level may differ by one.
    """
    height, width = levels.shape[1:3]
    for axis, size in ((2, width), (1, height)):
        if size != target:
            matrix = jnp.asarray(cubic(size, target))
            summed = jnp.tensordot(levels, matrix, (axis, 1), precision=jax.lax.Precision.HIGHEST)
            levels = jnp.clip(jnp.floor(jnp.moveaxis(summed, -1, axis) + 0.5), 0.0, 255.0)
    return levels
