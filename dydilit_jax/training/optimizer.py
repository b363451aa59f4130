"""AdamW with warm-up and decay, and the moving average of the parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dydilit_jax.config import OptimizerConfig

# Parameters that weight decay applies to: matrices and convolutions, not biases, routers' banks,
# exponents, lambdas, gains or the label table.
DECAYED = "kernel"


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then constant or decaying to zero.

    Args:
      config: schedule and its lengths.
      steps: steps of the run, where a decay ends that has no `decay_steps` of its own.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = max((config.decay_steps or steps) - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "linear": optax.linear_schedule(peak, 0.0, decay),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _decayed(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) == DECAYED, parameters
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Gradients to updates: clipping by global norm, then AdamW."""
    adamw = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
        mu_dtype=config.mu_dtype,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def updates_made(state: Any) -> jax.Array:
    """Updates that the optimizer has made, (): steps without the skipped ones; its rate's clock."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(state, "count")
    return count


def _ema_decay(config: OptimizerConfig) -> float:
    """The decay as float32 holds it.

    1 - 0.9999 is 1.7e-4 larger in float32 than the 0.0001 that new parameters would be weighted
    with, and the average smaller by that share; with this decay both are the same number.
    """
    return float(np.float32(config.ema_decay))


def make_ema(config: OptimizerConfig) -> optax.GradientTransformation:
    """The moving average, an optax transformation that is fed parameters in place of gradients."""
    return optax.ema(_ema_decay(config), debias=True)


def ema_parameters(ema: optax.EmaState, config: OptimizerConfig) -> Any:
    """The average with its start at zero corrected; zeros before the first step."""
    decay = _ema_decay(config)
    if decay == 0.0:
        return ema.ema
    # For the count 0 the correction would divide by zero. 1 - decay^count, without cancellation.
    weight = -jnp.expm1(jnp.maximum(ema.count, 1) * math.log(decay))
    return jax.tree.map(lambda leaf: leaf / weight.astype(leaf.dtype), ema.ema)
