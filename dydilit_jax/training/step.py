"""One optimizer step, a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dydilit_jax.diffusion.process import example_keys
from dydilit_jax.models.attention.projections import Telemetry
from dydilit_jax.training.guard import keep_if_not_finite
from dydilit_jax.training.inheritance import Teacher
from dydilit_jax.training.optimizer import (
    learning_rate_schedule,
    make_ema,
    make_optimizer,
    updates_made,
)
from dydilit_jax.training.sharding import batch_sharding, replicated
from dydilit_jax.training.state import Network, TrainState, state_shardings

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]
"""(state, batch) -> (next state, metrics); uncompiled, (state, batch, teacher's parameters)."""


class StepKeys(NamedTuple):
    """The randomness of a step.

    Attributes:
      label, process: (B,) keys, one an example: of dropped labels, and of times and noise.
      router: one key, of the routers' noise.
    """

    label: jax.Array
    process: jax.Array
    router: jax.Array

    @classmethod
    def create(cls, key: jax.Array, batch: int) -> StepKeys:
        """The keys that one key stands for; example i's come from fold_in(., i)."""
        label, process, router = jax.random.split(key, 3)
        return cls(example_keys(label, batch), example_keys(process, batch), router)


def drop_labels(labels: jax.Array, key: jax.Array, share: float, null_label: int) -> jax.Array:
    """Replaces a random share of labels (B,) by the null label, each by its own key's draw."""
    keys = example_keys(key, labels.shape[0])
    dropped = jax.vmap(lambda each: jax.random.bernoulli(each, share))(keys)
    return jnp.where(dropped, null_label, labels)


def training_loss(
    network: Network,
    parameters: Any,
    batch: Batch,
    keys: jax.Array | StepKeys,
    teacher: Teacher | None = None,
    teacher_parameters: Any = None,
) -> tuple[jax.Array, Metrics]:
    """Mean loss of a batch, and what to log of it.

    Args:
      network: structure and process.
      parameters: its parameters.
      batch: `image` (B, H, W, C) in [-1, 1] and `label` (B,).
      keys: of times, noise, dropped labels and routers' noise; or one key for all of them.
      teacher: a network to learn from as well, and its parameters.

    Returns:
      The scalar loss; its terms and the routers' telemetry.
    """
    config = network.config.model
    module = network.module(parameters)
    if not isinstance(keys, StepKeys):
        keys = StepKeys.create(keys, batch["label"].shape[0])
    router_key = keys.router
    labels = drop_labels(batch["label"], keys.label, config.label_dropout, config.null_label)
    telemetry: Telemetry = {}
    distilled: dict[str, jax.Array] = {}

    def predict(x: jax.Array, time: jax.Array) -> jax.Array:
        output, layers = module(x, time, labels, key=router_key)
        telemetry.update(layers)
        if teacher is not None:
            distilled.update(teacher.terms(teacher_parameters, output, x, time, labels))
        return output

    losses, terms = network.process.loss(predict, batch["image"], keys.process)
    loss = jnp.mean(losses)
    if teacher is not None:
        loss = loss + jnp.mean(teacher.loss(distilled))
    metrics = {name: jnp.mean(term) for name, term in (terms | distilled).items()}
    weight = config.attention.load_balance_weight
    if weight and "load_balance" in telemetry:
        loss = loss + weight * jnp.mean(telemetry["load_balance"])
    return loss, {"loss": loss, **metrics, **telemetry}


Gradients = Callable[[Any, Batch, StepKeys], tuple[Any, Metrics]]
"""(parameters, batch, keys) -> gradients of the mean loss, and metrics."""


def accumulated(gradients: Gradients, parts: int) -> Gradients:
    """The same function of a batch, computed part by part for less memory.

    Each part takes every `parts`-th example, so that it lies over the same devices as the batch,
    and each example keeps its own key. Gradients are added up in the parameters' dtype, float32.
    The result is that of the whole batch to rounding, but for two things that are no means over
    examples: the load-balance term is that of each part, and so is the routers' noise.

    Args:
      gradients: of a whole batch.
      parts: a divisor of the batch on each device.
    """
    if parts == 1:
        return gradients

    def split(array: jax.Array) -> jax.Array:
        return jnp.swapaxes(array.reshape(-1, parts, *array.shape[1:]), 0, 1)

    def compute(parameters: Any, batch: Batch, keys: StepKeys) -> tuple[Any, Metrics]:
        examples = jax.tree.map(split, (batch, keys.label, keys.process))
        routers = jax.vmap(jax.random.fold_in, (None, 0))(keys.router, jnp.arange(parts))

        def add(total: Any, part: Any) -> tuple[Any, Metrics]:
            (batch, label, process), router = part
            new, metrics = gradients(parameters, batch, StepKeys(label, process, router))
            return jax.tree.map(jnp.add, total, new), metrics

        zeros = jax.tree.map(jnp.zeros_like, parameters)
        total, metrics = jax.lax.scan(add, zeros, (examples, routers))
        mean = jax.tree.map(lambda leaf: leaf / parts, total)
        return mean, {name: _over_parts(name, value) for name, value in metrics.items()}

    return compute


def _over_parts(name: str, values: jax.Array) -> jax.Array:
    """A metric of the whole batch from its parts' (parts, ...)."""
    return jnp.min(values, axis=0) if name.endswith("_min") else jnp.mean(values, axis=0)


def make_step(network: Network, teacher: Teacher | None = None) -> TrainStep:
    """The step as a pure function, not yet compiled."""
    config = network.config
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    ema = make_ema(config.optimizer)

    def step(
        state: TrainState, batch: Batch, teacher_parameters: Any = None
    ) -> tuple[TrainState, Metrics]:
        def of_a_batch(parameters: Any, batch: Batch, keys: StepKeys) -> tuple[Any, Metrics]:
            def loss(parameters: Any) -> tuple[jax.Array, Metrics]:
                return training_loss(network, parameters, batch, keys, teacher, teacher_parameters)

            return jax.grad(loss, has_aux=True)(parameters)

        keys = StepKeys.create(jax.random.fold_in(state.key, state.step), batch["label"].shape[0])
        compute = accumulated(of_a_batch, config.optimizer.accumulation_steps)
        gradients, metrics = compute(state.parameters, batch, keys)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        _, ema_state = ema.update(parameters, state.ema)
        metrics["gradient_norm"] = optax.global_norm(gradients)
        metrics["update_norm"] = optax.global_norm(updates)
        metrics["learning_rate"] = jnp.asarray(schedule(updates_made(state.optimizer)), jnp.float32)
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
    compiled = jit_step(network, mesh, teacher)
    parameters = None if teacher is None else teacher.parameters

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.set_mesh(mesh):
            return compiled(state, batch, parameters)

    return step


def jit_step(network: Network, mesh: Mesh, teacher: Teacher | None = None) -> Any:
    """The jitted step of (state, batch, teacher's parameters), to be called with the mesh set."""
    shardings = state_shardings(network, mesh)
    return jax.jit(
        make_step(network, teacher),
        in_shardings=(shardings, batch_sharding(mesh), None),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
