"""The DyDiLA attention core: one operation, several implementations.

A backend is a module with two functions of (inputs, options, sharding): `unsupported`, which says
in a line why it cannot run these inputs, and `attention`, which runs them. It is imported when its
platform is the target, so that Pallas is not where it is of no use.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, check_inputs
from dydilit_jax.kernels.dydila.reference import explicit_attention
from dydilit_jax.kernels.dydila.xla import CoreOutput, linear_attention
from dydilit_jax.kernels.platform import record_choice, target
from dydilit_jax.kernels.sharding import (
    CoreSharding,
    ambient_sharding,
    placement_known,
)


class Backend(Protocol):
    """A kernel that runs on one platform."""

    def unsupported(
        self, inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None, /
    ) -> str | None:
        """Why these inputs cannot run, and what would; None when they can."""

    def attention(
        self, inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None, /
    ) -> CoreOutput:
        """The core."""


PLAIN = {"xla": linear_attention, "reference": explicit_attention}
# Platform and module of each backend.
BACKENDS = {
    "pallas_tpu": ("tpu", "dydilit_jax.kernels.dydila.pallas_tpu"),
    "pallas_gpu": ("gpu", "dydilit_jax.kernels.dydila.pallas_gpu"),
}
IMPLEMENTATIONS = (*PLAIN, *BACKENDS)

# Fewest tokens of a sequence from which a backend is chosen unasked; and, as a multiple of the head
# width, where the state (d / N activations written and read again) stops being small. Counted in
# bytes, not measured on a device. `pallas_gpu` has run on no GPU yet: it has to be asked for.
FEWEST_TOKENS = {"pallas_tpu": 128}
FEWEST_TOKENS_OF_HEAD_WIDTH = 0.5


def dydila_core(
    inputs: CoreInputs,
    options: CoreOptions,
    *,
    implementation: str | None = None,
    sharding: CoreSharding | None = None,
) -> CoreOutput:
    """Measure kernel, lambda choice, difference, the two products and the normalisation.

    Args:
      inputs: queries, keys, values (B, N, D) and what else the core reads.
      options: static options.
      implementation: `xla` (linear order), `reference` (explicit N x N) or one of BACKENDS; None
        chooses by the target platform and the shape.
      sharding: how the arrays lie on a mesh, for the kernels (XLA finds out by itself); None takes
        the mesh of `jax.set_mesh`, if one is set.

    Returns:
      The output (B, N, D) before the depthwise term, with the denominator and the routings.

    Raises:
      UserError: unknown implementation, one that cannot run these inputs, or inputs that do not
        belong together.
    """
    check_inputs(inputs, options)
    sharding = sharding or ambient_sharding()
    name = implementation or default_implementation(inputs, options, sharding)
    record_choice("attention core", name)
    if name in PLAIN:
        return PLAIN[name](inputs, options)
    if name not in BACKENDS:
        raise unknown_name("implementation", name, IMPLEMENTATIONS)
    platform, module = BACKENDS[name]
    if target().platform != platform:
        reason: str | None = f"it is for {platform}, this program is for {target().platform}"
    else:
        backend = load_backend(module)
        reason = backend.unsupported(inputs, options, sharding)
    if reason is not None:
        raise UserError(f"implementation {name!r} cannot run: {reason}")
    return backend.attention(inputs, options, sharding)


def load_backend(module: str) -> Backend:
    """The backend of this module name."""
    return cast(Backend, importlib.import_module(module))


def default_implementation(
    inputs: CoreInputs, options: CoreOptions, sharding: CoreSharding | None
) -> str:
    """The name that `implementation=None` stands for.

    A backend of the target platform, unless it cannot run, or sequences are so short that XLA is
    the better choice, or several devices are there and no mesh says how the arrays lie on them.
    In XLA (Q K^T) V, of 2 N^2 d multiply-adds a head, for sequences at most half as long as the
    head is wide (timed on a CPU), else Q (K^T V), of 2 N d^2; the latter too where a mesh
    splits the tokens, whose N x N weights would need every device's keys.
    """
    tokens, width = inputs.query.shape[1:]
    for name, fewest in FEWEST_TOKENS.items():
        platform, module = BACKENDS[name]
        if (
            platform == target().platform
            and tokens >= fewest
            and tokens >= FEWEST_TOKENS_OF_HEAD_WIDTH * (width // options.heads)
            and placement_known(sharding)
            and load_backend(module).unsupported(inputs, options, sharding) is None
        ):
            return name
    split = sharding is not None and sharding.sequence_size > 1
    return "reference" if 2 * tokens * options.heads <= width and not split else "xla"
