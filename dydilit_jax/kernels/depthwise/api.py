"""Depthwise convolution of token images: of V in the attention, and inside Mix-FFN.

Implementations of the same function: `convolution` (reference.py, XLA's grouped convolution),
`shifted` (xla.py, shifted multiply-adds with their own gradient: on CPU at least ten times faster
than `convolution`, and on TPU it moves half the memory forward), and backends, kernels for one
platform. A backend is a module with `unsupported`, which says in a line why it cannot run,
`convolution` and `gradient`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import jax
from jax import lax
from jax.sharding import PartitionSpec as P

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels.depthwise.reference import convolution
from dydilit_jax.kernels.depthwise.xla import shifted
from dydilit_jax.kernels.platform import check_preference, preferred, record_choice, target
from dydilit_jax.kernels.sharding import (
    CoreSharding,
    ambient_sharding,
    placement_known,
)

Convolution = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


class Backend(Protocol):
    """Kernels for one platform; shapes and dtypes as in pallas_tpu.py."""

    def unsupported(self, x: jax.Array, kernel: jax.Array, /) -> str | None:
        """Say why they cannot run, and what would; None when they can."""

    def convolution(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, /) -> jax.Array:
        """Return the convolution."""

    def gradient(
        self, x: jax.Array, kernel: jax.Array, dy: jax.Array, /
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the gradients of x, kernel and bias, the last two in float32."""


PLAIN: dict[str, Convolution] = {"shifted": shifted, "convolution": convolution}
# Platform and module of each backend.
BACKENDS = {
    "pallas_tpu": ("tpu", "dydilit_jax.kernels.depthwise.pallas_tpu"),
    "pallas_gpu": ("gpu", "dydilit_jax.kernels.depthwise.pallas_gpu"),
}
IMPLEMENTATIONS = (*PLAIN, *BACKENDS)

# Fewest pixels of a device from which a backend is chosen unasked: where starting the kernel costs
# little. Not timed on a device. pallas_gpu has run on no GPU yet: it has to be asked for.
FEWEST_PIXELS = {"pallas_tpu": 4096}


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: str | None = None,
    prefer: str | None = None,
    sharding: CoreSharding | None = None,
) -> jax.Array:
    """Convolve each channel with its own k x k kernel: stride 1, zero padding, same size.

    A correlation, as torch's Conv2d and lax.conv: kernel[0, 0] multiplies the pixel above and to
    the left. Products and sums run in float32 (float64 for float64). Differentiable (reverse mode).
    Source: LiT (arXiv 2501.12976) for V, SANA (arXiv 2410.10629) for Mix-FFN.

    Args:
      x: (B, H, W, C), any float dtype.
      kernel: (k, k, C) with odd k, any float dtype; its gradient has that dtype.
      bias: (C,) or None.
      implementation: `shifted`, `convolution`, `pallas_tpu`, `pallas_gpu`, or None for what
        `prefer` says, else a backend of the target platform where it is worth it, else `shifted`.
      prefer: a backend to take where it can run, whatever the size, or `xla` for none of them.
      sharding: how B lies on a mesh, for the backends (XLA finds out by itself); an image is whole
        on its device. None takes the mesh of `jax.set_mesh`, if one is set.

    Returns:
      (B, H, W, C) in `x.dtype`.

    Raises:
      UserError: an unknown implementation, one that cannot run these arguments, or shapes that do
        not fit.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise unknown_name("depthwise convolution implementation", implementation, IMPLEMENTATIONS)
    check_preference(prefer, BACKENDS)
    _check_shapes(x, kernel, bias)
    sharding = sharding or ambient_sharding()
    name = implementation or _default(x, kernel, sharding, prefer)
    record_choice("depthwise convolution", name)
    if name in PLAIN:
        return PLAIN[name](x, kernel, bias)
    reason = _unsupported(name, x, kernel, sharding)
    if reason is not None:
        raise UserError(
            f"depthwise convolution {name!r} cannot run: {reason}; 'shifted' runs everywhere."
        )
    return _by_backend(x, kernel, bias, _Options(name, sharding))


def load_backend(name: str) -> Backend:
    """Import a backend: when it is used, so that Pallas is not where it is of no use."""
    return cast(Backend, importlib.import_module(BACKENDS[name][1]))


def _default(
    x: jax.Array, kernel: jax.Array, sharding: CoreSharding | None, prefer: str | None
) -> str:
    """Return the implementation that None stands for."""
    pixels = x.shape[0] * x.shape[1] * x.shape[2] // (sharding.batch_size if sharding else 1)
    for name, fewest in preferred(prefer, FEWEST_PIXELS).items():
        if (
            pixels >= fewest
            and placement_known(sharding)
            and _unsupported(name, x, kernel, sharding) is None
        ):
            return name
    return "shifted"


def _unsupported(
    name: str, x: jax.Array, kernel: jax.Array, sharding: CoreSharding | None
) -> str | None:
    """Say why a backend cannot run these arguments here; None if it can."""
    platform, _ = BACKENDS[name]
    if target().platform != platform:
        return f"it is for {platform}, this program is traced for {target().platform}"
    if sharding is not None and x.shape[0] % sharding.batch_size:
        return f"{x.shape[0]} images do not divide over {sharding.batch_size} devices"
    return load_backend(name).unsupported(x, kernel)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static arguments of a backend's convolution."""

    implementation: str
    sharding: CoreSharding | None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_backend(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, options: _Options
) -> jax.Array:
    """`depthwise_conv` by a backend; on a mesh every device convolves its own images."""
    run = load_backend(options.implementation).convolution
    sharding = options.sharding
    if sharding is None:
        return run(x, kernel, bias)
    images = sharding.spec("bhwc")
    return jax.shard_map(
        run, mesh=sharding.mesh, in_specs=(images, P(), P()), out_specs=images, check_vma=False
    )(x, kernel, bias)


def _forward(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, options: _Options
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return _by_backend(x, kernel, bias, options), (x, kernel, bias)


def _backward(
    options: _Options, inputs: tuple[jax.Array, jax.Array, jax.Array | None], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, kernel, bias = inputs
    run = load_backend(options.implementation).gradient
    sharding = options.sharding
    batch = sharding.batch if sharding else ()

    def of_device(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        dx, dkernel, dbias = run(x, kernel, dy)
        return dx, *lax.psum((dkernel, dbias), batch)

    if sharding is None:
        dx, dkernel, dbias = run(x, kernel, dy)
    else:
        images = sharding.spec("bhwc")
        dx, dkernel, dbias = jax.shard_map(
            of_device,
            mesh=sharding.mesh,
            in_specs=(images, P(), images),
            out_specs=(images, P(), P()),
            check_vma=False,
        )(x, kernel, dy)
    return (
        dx,
        dkernel.astype(kernel.dtype),
        None if bias is None else dbias.astype(bias.dtype),
    )


_by_backend.defvjp(_forward, _backward)


def _check_shapes(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> None:
    """Raise UserError unless shapes are those of `depthwise_conv`."""
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[2] != x.shape[3]:
        raise UserError(
            f"depthwise convolution of x {x.shape} with a kernel {kernel.shape}: "
            "expected x (B, H, W, C) and kernel (k, k, C) with the same C."
        )
    if kernel.shape[0] != kernel.shape[1] or kernel.shape[0] % 2 == 0:
        raise UserError(
            f"depthwise convolution with a kernel {kernel.shape}: expected (k, k, C) with odd k, "
            "the only size that can be centred on a pixel."
        )
    if bias is not None and bias.shape != (x.shape[3],):
        raise UserError(
            f"depthwise convolution with a bias {bias.shape}: expected ({x.shape[3]},), "
            f"one for each channel of x {x.shape}."
        )
