"""The network: layers scanned or not, rematerialised or not, and every option of the method."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT, patchify, unpatchify
from dydilit_jax.models.embeddings import sincos_position, sinusoidal_time

SMALL = ModelConfig(image_size=4, channels=2, patch_size=2, num_classes=3, depth=2, width=8)
SMALL = dataclasses.replace(SMALL, attention=dataclasses.replace(SMALL.attention, heads=2))


def changed(base: ModelConfig = SMALL, **fields) -> ModelConfig:
    """`base` with fields replaced; names of the attention's fields go to the attention."""
    of_model = {f.name for f in dataclasses.fields(ModelConfig)}
    attention = {name: fields.pop(name) for name in list(fields) if name not in of_model}
    return dataclasses.replace(
        base, attention=dataclasses.replace(base.attention, **attention), **fields
    )


def random_parameters(config: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, dict]:
    """Structure and parameters without a zero among them, so that every part has a say."""
    graph, state = nnx.split(DyDiLiT(config, rngs=nnx.Rngs(seed)))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return graph, jax.tree.map(
        lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape),
        nnx.to_pure_dict(state),
    )


def example(config: ModelConfig, batch: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (batch, config.image_size, config.image_size, config.channels)
    images = jax.random.normal(jax.random.key(5), shape)
    return images, jnp.linspace(0.0, 900.0, batch), jnp.arange(batch) % (config.num_classes + 1)


def loss_and_gradients(config: ModelConfig, parameters: dict, key: jax.Array | None = None):
    graph, _ = nnx.split(nnx.eval_shape(lambda: DyDiLiT(config, rngs=nnx.Rngs(0))))
    images, time, labels = example(config)

    def loss(parameters):
        output, telemetry = nnx.merge(graph, parameters)(images, time, labels, key=key)
        return jnp.mean((output - images) ** 2), (output, telemetry)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters)


def assert_trees_close(first, second, **tolerance):
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, err_msg=str(path), **tolerance),
        first,
        second,
    )


def test_patches_hold_rows_columns_channels_in_order():
    image = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(image, 2)
    assert patches.shape == (2, 6, 12)
    # The second patch of the first row: rows 0 to 1, columns 2 to 3.
    np.testing.assert_array_equal(patches[1, 1].reshape(2, 2, 3), image[1, :2, 2:4])
    np.testing.assert_array_equal(unpatchify(patches, 2, (2, 3)), image)


def test_position_table_is_that_of_dit():
    """Spot values from DiT's definition, by hand: width 8 has frequencies 1 and 1/100."""
    table = sincos_position((2, 3), 8)
    row, column = 1, 2
    expected = [
        *np.sin([column, column / 100]),
        *np.cos([column, column / 100]),
        *np.sin([row, row / 100]),
        *np.cos([row, row / 100]),
    ]
    np.testing.assert_allclose(table[row * 3 + column], expected, rtol=1e-6)


def test_time_embedding_is_cosines_then_sines():
    frequencies = [1.0, 10_000.0**-0.5]
    expected = [*np.cos(np.multiply(7.0, frequencies)), *np.sin(np.multiply(7.0, frequencies))]
    np.testing.assert_allclose(sinusoidal_time(jnp.asarray([7.0]), 4)[0], expected, rtol=1e-5)


def test_output_starts_at_zero():
    output, _ = DyDiLiT(SMALL, rngs=nnx.Rngs(0))(*example(SMALL))
    np.testing.assert_array_equal(output, jnp.zeros_like(output))


@pytest.mark.parametrize("kind", ["dydila", "softmax"])
def test_scanned_and_unrolled_layers_agree(kind):
    config = changed(kind=kind, router_training="gumbel", router_jitter=0.1)
    _, parameters = random_parameters(config)
    key = jax.random.key(2)
    scanned = loss_and_gradients(config, parameters, key)
    unrolled = loss_and_gradients(changed(config, scan_layers=False), parameters, key)
    assert_trees_close(scanned, unrolled, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("rematerialisation", ["dots", "full"])
def test_rematerialised_gradients_agree(rematerialisation, scan_layers):
    config = changed(scan_layers=scan_layers)
    _, parameters = random_parameters(config)
    plain = loss_and_gradients(config, parameters)
    again = loss_and_gradients(changed(config, rematerialisation=rematerialisation), parameters)
    assert_trees_close(plain, again, rtol=2e-4, atol=2e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "heads": {"heads": 4},
    "no bias": {"qkv_bias": False},
    "depthwise 3": {"depthwise": 3},
    "no depthwise": {"depthwise": 0},
    "no projectors": {"projectors": 0},
    "one projector": {"projectors": 1},
    "five projectors": {"projectors": 5},
    "fixed exponent": {"exponents": 0},
    "one exponent": {"exponents": 1},
    "exponent 5": {"exponent_init": 5.0},
    "fixed lambda": {"lambdas": 0},
    "one lambda": {"lambdas": 1},
    "lambda 0.5": {"lambda_init": 0.5},
    "signed": {"normalizer": "signed"},
    "unnormalised": {"normalizer": "none"},
    "rms": {"normalizer": "rms"},
    "norm over heads": {"norm_scope": "head"},
    "switch": {"router_training": "switch"},
    "gumbel": {"router_training": "gumbel"},
    "soft": {"router_training": "soft"},
    "jitter": {"router_jitter": 0.5},
    "load balance": {"load_balance_weight": 0.1},
    "rope": {"position": "rope"},
    "no position": {"position": "none"},
    "eps": {"eps": 0.5},
    "relu": {"kind": "relu"},
    "focused": {"kind": "focused"},
    "softmax": {"kind": "softmax"},
    "patch 4": {"patch_size": 4},
    "mlp": {"feedforward": dataclasses.replace(SMALL.feedforward, kind="mlp")},
    "ratio": {"feedforward": dataclasses.replace(SMALL.feedforward, ratio=1.0)},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def default_losses():
    return ten_steps(SMALL)


def ten_steps(config: ModelConfig) -> list[float]:
    """Losses of ten steps, as the trainer's: the load-balance term with its weight included."""
    config = changed(config, scan_layers=False, depth=1)
    graph, parameters = random_parameters(config)
    images, time, labels = example(config)
    optimizer = optax.adam(1e-2)
    weight = config.attention.load_balance_weight

    def loss(parameters, key):
        output, telemetry = nnx.merge(graph, parameters)(images, time, labels, key=key)
        total = jnp.mean((output - images) ** 2)
        if weight:
            total = total + weight * jnp.mean(telemetry["load_balance"])
        return total, telemetry

    # Not compiled as a whole: operation by operation, what one option compiled serves the next.
    state = optimizer.init(parameters)
    losses = []
    for key in jax.random.split(jax.random.key(0), 10):
        (value, telemetry), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, key)
        updates, state = optimizer.update(gradients, state)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(float(value))
    for leaf in jax.tree.leaves((parameters, telemetry)):
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32))))
    return losses


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_has_an_effect_and_trains(name, default_losses):
    losses = ten_steps(changed(**OPTIONS[name]))
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    assert not np.allclose(losses[0], default_losses[0], rtol=1e-6, atol=0)


def test_telemetry_tells_of_every_router():
    images, time, labels = example(SMALL)
    _, telemetry = DyDiLiT(SMALL, rngs=nnx.Rngs(0))(images, time, labels)
    usages = {name: value for name, value in telemetry.items() if name.startswith("usage/")}
    assert {name.removeprefix("usage/"): value.shape for name, value in usages.items()} == {
        "query_projector": (2, 3),
        "key_projector": (2, 3),
        "query_exponent": (2, 9),
        "key_exponent": (2, 9),
        "query_redundant_exponent": (2, 9),
        "key_redundant_exponent": (2, 9),
        "query_lambda": (2, 9),
        "key_lambda": (2, 9),
    }
    for usage in usages.values():
        np.testing.assert_allclose(usage.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(telemetry["exponent_mean"], 3.0)
    np.testing.assert_allclose(telemetry["lambda_mean"], 0.01, rtol=1e-6)
    assert bool(jnp.all(telemetry["denominator_min"] > 0))


def test_labels_and_time_matter():
    graph, parameters = random_parameters(SMALL)
    images, time, labels = example(SMALL)
    model = nnx.merge(graph, parameters)
    output = model(images, time, labels)[0]
    assert float(jnp.abs(model(images, time, labels[::-1])[0] - output).max()) > 1e-3
    assert float(jnp.abs(model(images, time + 50.0, labels)[0] - output).max()) > 1e-3


BAD: dict[str, dict[str, Any]] = {
    "width 10 is not divisible by": {"width": 10, "heads": 4},
    "image_size 6 is not divisible by": {"image_size": 6, "patch_size": 4},
    "unknown attention 'dydla': did you mean 'dydila'": {"kind": "dydla"},
    "unknown normalizer": {"normalizer": "l2"},
    "must be odd": {"depthwise": 4},
    "rope needs a head width divisible by 4": {"position": "rope", "heads": 4},
    "exponent_init must be at least 1": {"exponent_init": 0.5},
    "router_jitter must be in": {"router_jitter": 1.0},
    "projectors must be at least 0": {"projectors": -1},
    "unknown dtype": {"dtype": "float16"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs_say_what_is_wrong(message):
    with pytest.raises(UserError, match=message.split("'")[0]) as error:
        changed(**BAD[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_images_of_another_shape_are_refused():
    images, time, labels = example(SMALL)
    with pytest.raises(UserError, match="the network expects"):
        DyDiLiT(SMALL, rngs=nnx.Rngs(0))(images[:, :2], time, labels)
