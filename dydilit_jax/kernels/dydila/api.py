"""The DyDiLA attention core: one operation, several implementations."""

from __future__ import annotations

from dydilit_jax.errors import unknown_name
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions
from dydilit_jax.kernels.dydila.reference import explicit_attention
from dydilit_jax.kernels.dydila.xla import CoreOutput, linear_attention

IMPLEMENTATIONS = {"xla": linear_attention, "reference": explicit_attention}


def dydila_core(
    inputs: CoreInputs, options: CoreOptions, *, implementation: str | None = None
) -> CoreOutput:
    """Measure kernel, lambda choice, difference, the two products and the normalisation.

    Args:
      inputs: queries, keys, values (B, N, D) and what else the core reads.
      options: static options.
      implementation: `xla` (linear order) or `reference` (explicit N x N); None chooses `xla`.

    Returns:
      The output (B, N, D) before the depthwise term, with the denominator and the routings.

    Raises:
      UserError: unknown implementation, or inputs that do not belong together.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise unknown_name("implementation", name, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name](inputs, options)
