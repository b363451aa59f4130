"""A step that is not finite leaves the state as it was."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dydilit_jax.training.state import TrainState

WATCHED = ("loss", "gradient_norm", "update_norm")


def keep_if_not_finite(
    old: TrainState, new: TrainState, metrics: Mapping[str, jax.Array]
) -> TrainState:
    """The state after a step: `new`, or `old` with its step counted on; traceable.

    Parameters, moments (with the optimizer's own count) and average are kept together, so that a
    skipped step is as if its batch had not been there.

    Args:
      old: before the step.
      new: after it.
      metrics: of the step: loss and norms of gradients and updates, () each.
    """
    finite = jnp.all(jnp.stack([jnp.isfinite(metrics[name]) for name in WATCHED]))

    def choose(after: Any, before: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, before)

    return dataclasses.replace(
        new,
        parameters=choose(new.parameters, old.parameters),
        optimizer=choose(new.optimizer, old.optimizer),
        ema=choose(new.ema, old.ema),
    )


def not_finite(values: Mapping[str, float]) -> str | None:
    """`loss is nan`, of the first watched value that is not finite; None if all are."""
    for name in WATCHED:
        if not math.isfinite(values[name]):
            return f"{name} is {values[name]}"
    return None
