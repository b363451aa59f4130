"""One optimizer step, a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dydilit_jax.diffusion.process import example_keys
from dydilit_jax.models.attention.projections import Telemetry
from dydilit_jax.training.guard import keep_if_not_finite
from dydilit_jax.training.inheritance import Teacher
from dydilit_jax.training.optimizer import learning_rate_schedule, make_ema, make_optimizer
from dydilit_jax.training.sharding import batch_sharding, replicated
from dydilit_jax.training.state import Network, TrainState, state_shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""(state, batch) -> (next state, metrics); uncompiled, (state, batch, teacher's parameters)."""


def drop_labels(labels: jax.Array, key: jax.Array, share: float, null_label: int) -> jax.Array:
    """Replaces a random share of labels (B,) by the null label, each by its own key's draw."""
    keys = example_keys(key, labels.shape[0])
    dropped = jax.vmap(lambda each: jax.random.bernoulli(each, share))(keys)
    return jnp.where(dropped, null_label, labels)


def training_loss(
    network: Network,
    parameters: Any,
    batch: Batch,
    key: jax.Array,
    teacher: Teacher | None = None,
    teacher_parameters: Any = None,
) -> tuple[jax.Array, Metrics]:
    """Mean loss of a batch, and what to log of it.

    Args:
      network: structure and process.
      parameters: its parameters.
      batch: `image` (B, H, W, C) in [-1, 1] and `label` (B,).
      key: of times, noise, dropped labels and routers' noise.
      teacher: a network to learn from as well, and its parameters.

    Returns:
      The scalar loss; its terms and the routers' telemetry.
    """
    config = network.config.model
    module = network.module(parameters)
    label_key, process_key, router_key = jax.random.split(key, 3)
    labels = drop_labels(batch["label"], label_key, config.label_dropout, config.null_label)
    telemetry: Telemetry = {}
    distilled: dict[str, jax.Array] = {}

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
        output, layers = module(x, time, labels, key=router_key)
        telemetry.update(layers)
        if teacher is not None:
            distilled.update(teacher.terms(teacher_parameters, output, x, time, labels))
        return output

    losses, terms = network.process.loss(predict, batch["image"], process_key)
    loss = jnp.mean(losses)
    if teacher is not None:
        loss = loss + jnp.mean(teacher.loss(distilled))
    metrics = {name: jnp.mean(term) for name, term in (terms | distilled).items()}
    weight = config.attention.load_balance_weight
    if weight and "load_balance" in telemetry:
        loss = loss + weight * jnp.mean(telemetry["load_balance"])
    return loss, {"loss": loss, **metrics, **telemetry}


def make_step(network: Network, teacher: Teacher | None = None) -> TrainStep:
    """The step as a pure function, not yet compiled."""
    config = network.config
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    ema = make_ema(config.optimizer)

    def step(
        state: TrainState, batch: Batch, teacher_parameters: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def loss(parameters: Any) -> tuple[jax.Array, Metrics]:
            return training_loss(network, parameters, batch, key, teacher, teacher_parameters)

        gradients, metrics = jax.grad(loss, has_aux=True)(state.parameters)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        _, ema_state = ema.update(parameters, state.ema)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["update_norm"] = optax.global_norm(updates)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        new_state = TrainState(
            step=state.step + 1,
            parameters=parameters,
            optimizer=optimizer_state,
            ema=ema_state,
            key=state.key,
        )
        return keep_if_not_finite(state, new_state, metrics), metrics

    return step


def compile_step(network: Network, mesh: Mesh, teacher: Teacher | None = None) -> TrainStep:
    """The step jitted over the mesh; it takes over the memory of the state it is given."""
    shardings = state_shardings(network, mesh)
    batch = batch_sharding(mesh)
    compiled = jax.jit(
        make_step(network, teacher),
        in_shardings=(shardings, batch, None),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    parameters = None if teacher is None else teacher.parameters
    return lambda state, batch: compiled(state, batch, parameters)
