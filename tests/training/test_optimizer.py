"""Schedules, clipping and weight decay against what their formulas give."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dydilit_jax.config import OptimizerConfig
from dydilit_jax.training.optimizer import (
    ema_parameters,
    learning_rate_schedule,
    make_ema,
    make_optimizer,
)
from dydilit_jax.training.state import Network
from tests.tiny import tiny_config, to_numpy

PEAK, WARMUP, STEPS = 2e-3, 10, 50


def expected_rate(schedule: str, step: int, warmup: int, end: int) -> float:
    if step < warmup:
        return PEAK * step / warmup
    done = min((step - warmup) / (end - warmup), 1.0)
    after = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": (1.0 + math.cos(math.pi * done)) / 2,
    }
    return PEAK * after[schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "decay_steps"), [(0, 0), (WARMUP, 0), (WARMUP, 30)])
def test_learning_rate(schedule, warmup, decay_steps):
    config = OptimizerConfig(
        learning_rate=PEAK, schedule=schedule, warmup_steps=warmup, decay_steps=decay_steps
    )
    rate = learning_rate_schedule(config, STEPS)
    for step in (0, 1, 5, 9, 10, 11, 29, 30, 31, 49, 50, 80):
        expected = expected_rate(schedule, step, warmup, decay_steps or STEPS)
        np.testing.assert_allclose(float(rate(step)), expected, rtol=1e-5, atol=1e-9)


def test_updates_follow_the_schedule():
    config = OptimizerConfig(
        learning_rate=PEAK, schedule="cosine", warmup_steps=WARMUP, clip_norm=0.0
    )
    optimizer = make_optimizer(config, STEPS)
    parameters = {"bias": jnp.zeros(2)}
    state = optimizer.init(parameters)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        # Of a constant gradient Adam's update is the learning rate.
        updates, state = update({"bias": jnp.full(2, 0.5)}, state, parameters)
        expected = -expected_rate("cosine", step, WARMUP, STEPS)
        np.testing.assert_allclose(updates["bias"], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("clip_norm", "scale"), [(1.0, 0.1), (20.0, 1.0), (0.0, 1.0)])
def test_clipping_is_by_global_norm(clip_norm, scale):
    # eps as large as gradients, or Adam would hide their scale.
    config = OptimizerConfig(learning_rate=1.0, eps=1.0, clip_norm=clip_norm)
    optimizer = make_optimizer(config, STEPS)
    gradients = {"bias": jnp.array([6.0]), "other": {"kernel": jnp.array([[-8.0]])}}
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    for update, gradient in ((updates["bias"], 6.0), (updates["other"]["kernel"], -8.0)):
        clipped = gradient * scale
        np.testing.assert_allclose(np.ravel(update), -clipped / (abs(clipped) + 1.0), rtol=1e-5)


def test_weight_decay_shrinks_kernels_alone():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    network = Network.create(tiny_config())
    parameters = jax.tree.map(lambda leaf: np.ones(leaf.shape), network.abstract_parameters())
    optimizer = make_optimizer(config, STEPS)
    zeros = jax.tree.map(np.zeros_like, parameters)
    updates, _ = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p))(parameters)
    decayed = set()
    for name, update in to_numpy(updates).items():
        if np.any(update != 0):
            np.testing.assert_allclose(update, -0.05, rtol=1e-5)
            decayed.add(name)
    block = "blocks/attention"
    assert decayed == {
        "patch_embed/kernel",
        "time_embed/hidden/kernel",
        "time_embed/out/kernel",
        f"{block}/qkv/kernel",
        f"{block}/query_bank/kernel",
        f"{block}/key_bank/kernel",
        f"{block}/depthwise/kernel",
        f"{block}/out/kernel",
        "blocks/feedforward/hidden/kernel",
        "blocks/feedforward/depthwise/kernel",
        "blocks/feedforward/out/kernel",
        "blocks/modulation/linear/kernel",
        "final/linear/kernel",
        "final/modulation/linear/kernel",
    }
    kept = to_numpy(updates).keys() - decayed
    assert any("router" in name for name in kept)
    assert any("exponents" in name for name in kept)
    assert any("embedding" in name for name in kept)


def test_average_against_float64_over_many_steps():
    config = OptimizerConfig(ema_decay=0.99)
    ema = make_ema(config)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 3)).astype(np.float32)
    state = ema.init({"w": jnp.zeros(3)})
    assert isinstance(state, optax.EmaState)
    update = jax.jit(ema.update)
    total, weights = np.zeros(3), 0.0
    for step, value in enumerate(values, start=1):
        _, state = update({"w": jnp.asarray(value)}, state)
        total = 0.99 * total + value.astype(np.float64)
        weights = 0.99 * weights + 1.0
        if step in (1, 2, 10, 200):
            average = ema_parameters(state, config)["w"]
            np.testing.assert_allclose(average, total / weights, rtol=2e-5, atol=1e-6)


def test_the_average_of_what_does_not_change_is_that():
    """With a decay that float32 does not hold: the weights of all parameters sum to one."""
    config = OptimizerConfig(ema_decay=0.9999)
    ema = make_ema(config)
    parameters = {"w": jnp.asarray([1.0, -3.0, 0.1])}
    state = ema.init(parameters)
    for _ in range(3):
        _, state = ema.update(parameters, state)
        average = ema_parameters(state, config)["w"]
        np.testing.assert_allclose(average, parameters["w"], rtol=2e-6)
