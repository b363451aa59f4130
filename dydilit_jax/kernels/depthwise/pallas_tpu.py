"""The depthwise convolution on a TPU: every activation is read or written once.

With xla.py's equations: (1) forward; backward (2) and (3) together, for a group of images and 128
channels while they are in VMEM, where the sums of (3) stay until the last image. XLA moves as
little forward and more than half as much again backward, but both ways issues twice the
instructions (counted in programs compiled for v5e, 5 x 5), and those, not the memory, are what
bounds it there.

An image is copied, as float32 with a border of zeros, into scratch whose rows of 128 lanes follow
one another: a window shifted along the width is then a load at another row, at no cost.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dydilit_jax.kernels.platform import target

DTYPES = ("bfloat16", "float32")
LANES = 128
SUBLANES = 8
MIB = 2**20
# Of the 64 MiB of VMEM that a core of v5p and TPU7x has (v5e, v6e: 128).
VMEM_BUDGET = 52 * MIB
VMEM_RESERVE = 8 * MIB
# Pixels of a program's images: enough that starting a program costs little beside them.
PIXELS = 4096
# Rows of an image in one iteration of a loop: their sums do not wait for one another.
UNROLL = 4

Ref = Any


def unsupported(x: jax.Array, kernel: jax.Array) -> str | None:
    """Say why this kernel cannot run for x (B, H, W, C) and kernel (k, k, C); None if it can."""
    _, H, W, C = x.shape
    if x.dtype not in DTYPES:
        return f"images of {x.dtype}: it runs for {' and '.join(DTYPES)}"
    if C % LANES:
        return f"{C} channels: it runs for multiples of {LANES}"
    if 0 in x.shape:
        return f"there is nothing in x {x.shape}"
    if _vmem_bytes(1, H, W, kernel.shape[0], x.dtype.itemsize) > VMEM_BUDGET:
        return (
            f"images of {H} x {W} in {x.dtype} do not fit into {VMEM_BUDGET // MIB} MiB of VMEM: "
            "use smaller images"
        )
    return None


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Equation (1); see `api.depthwise_conv` for arguments."""
    B, H, W, C = x.shape
    k = kernel.shape[0]
    taps = kernel.astype(jnp.float32).reshape(k * k, C)
    last = jnp.zeros(C, jnp.float32) if bias is None else bias.astype(jnp.float32)
    images = _images(B, H, W, k, x.dtype.itemsize)
    block, parameters = _block(images, x), _parameters(k * k + 1)
    return pl.pallas_call(
        _forward,
        grid=(C // LANES, B // images),
        in_specs=[block, parameters],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(_padded_shape(H, W, k), jnp.float32)],
        compiler_params=_COMPILER_PARAMS,
        interpret=target().interpret,
        name="depthwise",
    )(x, jnp.concatenate([taps, last[None]]))


def gradient(
    x: jax.Array, kernel: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2) and (3).

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C).
      dy: (B, H, W, C) in `x.dtype`.

    Returns:
      dx (B, H, W, C) in `x.dtype`; dkernel (k, k, C) and dbias (C,) in float32.
    """
    B, H, W, C = x.shape
    k = kernel.shape[0]
    taps = k * k
    images = _images(B, H, W, k, x.dtype.itemsize)
    block = _block(images, x)
    padded = pltpu.VMEM(_padded_shape(H, W, k), jnp.float32)
    dx, sums = pl.pallas_call(
        _backward,
        grid=(C // LANES, B // images),
        in_specs=[block, block, _parameters(taps)],
        out_specs=[block, _parameters(taps + 1)],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((taps + 1, C), jnp.float32),
        ],
        scratch_shapes=[padded, padded, pltpu.VMEM((taps + 1, SUBLANES, LANES), jnp.float32)],
        compiler_params=_COMPILER_PARAMS,
        interpret=target().interpret,
        name="depthwise_backward",
    )(x, dy, kernel.astype(jnp.float32).reshape(taps, C))
    return dx, sums[:taps].reshape(kernel.shape), sums[taps]


_COMPILER_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET + VMEM_RESERVE
)


def _block(images: int, x: jax.Array) -> pl.BlockSpec:
    """A program's images and channels; the grid is (channels, images)."""
    return pl.BlockSpec((images, *x.shape[1:3], LANES), lambda c, b: (b, 0, 0, c))


def _parameters(count: int) -> pl.BlockSpec:
    """`count` numbers for each of a program's channels."""
    return pl.BlockSpec((count, LANES), lambda c, b: (0, c))


def _forward(x: Ref, parameters: Ref, y: Ref, padded: Ref) -> None:
    """One program of `convolution`.

    Args:
      x, y: (images, H, W, LANES).
      parameters: (k * k + 1, LANES) float32, kernel and bias.
      padded: scratch for one image with its border.
    """
    taps = parameters.shape[0] - 1
    k = math.isqrt(taps)

    @pl.when(pl.program_id(1) == 0)
    def clear() -> None:
        padded[...] = jnp.zeros(padded.shape, jnp.float32)

    weights = [parameters[pl.ds(tap, 1), :] for tap in range(taps)]
    bias = parameters[pl.ds(taps, 1), :]

    def of_image(image: jax.Array, _: None) -> None:
        _copy_inside(x, padded, image, k)
        _correlate(padded, weights, bias, y, image, k)

    lax.fori_loop(0, x.shape[0], of_image, None)


def _backward(
    x: Ref, dy: Ref, kernel: Ref, dx: Ref, sums: Ref, padded_x: Ref, padded_dy: Ref, total: Ref
) -> None:
    """One program of `gradient`.

    Args:
      x, dy, dx: (images, H, W, LANES).
      kernel: (k * k, LANES) float32.
      sums: (k * k + 1, LANES), the gradients of kernel and bias, written by the last program.
      padded_x, padded_dy: scratch for one image with its border.
      total: (k * k + 1, SUBLANES, LANES) scratch, `sums` before the sum over sublanes.
    """
    images, H, W, _ = x.shape
    k = math.isqrt(kernel.shape[0])
    step, last = pl.program_id(1), pl.num_programs(1) - 1

    @pl.when(step == 0)
    def clear() -> None:
        padded_x[...] = jnp.zeros(padded_x.shape, jnp.float32)
        padded_dy[...] = jnp.zeros(padded_dy.shape, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    flipped = [kernel[pl.ds(tap, 1), :] for tap in reversed(range(k * k))]
    no_bias = jnp.zeros((1, LANES), jnp.float32)

    def of_image(image: jax.Array, _: None) -> None:
        _copy_inside(x, padded_x, image, k)
        _copy_inside(dy, padded_dy, image, k)
        _add_kernel_gradient(padded_x, padded_dy, total, H, W, k)
        _correlate(padded_dy, flipped, no_bias, dx, image, k)

    lax.fori_loop(0, images, of_image, None)

    @pl.when(step == last)
    def write_sums() -> None:
        sums[...] = jnp.sum(total[...], axis=1)


def _copy_inside(block: Ref, padded: Ref, image: jax.Array, k: int) -> None:
    """Copies an image of a block into the inside of its padded form."""
    _, H, W, _ = block.shape

    def copy_row(h: jax.Array, _: None) -> None:
        start = (h + k // 2) * _stride(W, k) + k // 2
        padded[pl.ds(start, W), :] = block[image, h].astype(jnp.float32)

    lax.fori_loop(0, H, copy_row, None, unroll=UNROLL)


def _add_kernel_gradient(padded_x: Ref, padded_dy: Ref, total: Ref, H: int, W: int, k: int) -> None:
    """Adds an image's terms of (3). Columns past the width count nothing: dy is zero there."""
    stride, r = _stride(W, k), k // 2

    def add_row(h: jax.Array, terms: list[jax.Array]) -> list[jax.Array]:
        for w in range(0, W, SUBLANES):
            gradient = _lines(padded_dy, (h + r) * stride + w + r)
            windows = [
                _lines(padded_x, (h + i) * stride + w + j) for i in range(k) for j in range(k)
            ]
            products = [window * gradient for window in windows]
            terms = [term + new for term, new in zip(terms, [*products, gradient], strict=True)]
        return terms

    terms = [total[tap] for tap in range(k * k + 1)]
    terms = lax.fori_loop(0, H, add_row, terms, unroll=UNROLL)
    for tap, term in enumerate(terms):
        total[tap] = term


def _correlate(
    padded: Ref, weights: list[jax.Array], start: jax.Array, result: Ref, image: jax.Array, k: int
) -> None:
    """Writes an image's sum of windows times `weights`, k * k of (1, LANES), plus `start`."""
    _, H, W, _ = result.shape
    stride = _stride(W, k)
    taps = [jnp.broadcast_to(weight, (SUBLANES, LANES)) for weight in weights]

    def write_row(h: jax.Array, _: None) -> None:
        groups = []
        for w in range(0, W, SUBLANES):
            total = jnp.broadcast_to(start, (SUBLANES, LANES))
            for i in range(k):
                for j in range(k):
                    total += _lines(padded, (h + i) * stride + w + j) * taps[i * k + j]
            groups.append(total)
        result[image, h] = jnp.concatenate(groups, axis=0)[:W].astype(result.dtype)

    lax.fori_loop(0, H, write_row, None, unroll=UNROLL)


def _lines(padded: Ref, start: jax.Array) -> jax.Array:
    """Eight pixels of a row: (SUBLANES, LANES)."""
    return padded[pl.ds(start, SUBLANES), :]


def _stride(W: int, k: int) -> int:
    """Pixels from a row of a padded image to the next: whole groups of columns and the border."""
    return pl.cdiv(W, SUBLANES) * SUBLANES + k - 1


def _padded_shape(H: int, W: int, k: int) -> tuple[int, int]:
    """Shape of a padded image in scratch."""
    return ((H + k - 1) * _stride(W, k), LANES)


def _vmem_bytes(images: int, H: int, W: int, k: int, itemsize: int) -> int:
    """VMEM of a program: x, dy and dx, twice buffered, and two padded images."""
    block = images * H * pl.cdiv(W, SUBLANES) * SUBLANES * LANES * itemsize
    rows, lanes = _padded_shape(H, W, k)
    return 6 * block + 2 * rows * lanes * 4


def _images(B: int, H: int, W: int, k: int, itemsize: int) -> int:
    """Images of a program: the largest divisor of B that keeps it within PIXELS and VMEM."""
    return max(
        images
        for images in range(1, B + 1)
        if B % images == 0
        and (
            images == 1
            or (images * H * W <= PIXELS and _vmem_bytes(images, H, W, k, itemsize) <= VMEM_BUDGET)
        )
    )
