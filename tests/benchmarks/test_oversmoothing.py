"""The explicit attention matrices and what is measured of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import oversmoothing
from dydilit_jax.models.attention.projections import Context
from dydilit_jax.models.attention.registry import ATTENTION_MODULES
from dydilit_jax.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT

ATTENTIONS = {
    "softmax": AttentionConfig(kind="softmax", heads=2, depthwise=0),
    "relu": AttentionConfig(kind="relu", heads=2, depthwise=0),
    "focused": AttentionConfig(kind="focused", heads=2, depthwise=0),
    "dydila": AttentionConfig(heads=2, depthwise=0, lambda_init=0.4),
}


def model(attention: AttentionConfig) -> ModelConfig:
    return ModelConfig(
        image_size=8,
        channels=1,
        patch_size=2,
        num_classes=10,
        depth=2,
        width=16,
        scan_layers=False,
        attention=attention,
        feedforward=FeedForwardConfig(kind="mlp"),
    )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_explicit_matrix_gives_the_mixers_output(name):
    mixer: Any = ATTENTION_MODULES[ATTENTIONS[name].kind](model(ATTENTIONS[name]), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 16, 16))
    weights = np.asarray(oversmoothing.explicit_weights(mixer, x, Context()), np.float64)
    value = np.asarray(mixer.qkv(x)[2], np.float64).reshape(2, 16, 2, 8)
    joined = np.einsum("bhnm,bmhd->bnhd", weights, value).reshape(2, 16, 16)
    expected = joined @ np.asarray(mixer.out.kernel[...], np.float64)
    output = np.asarray(mixer(x, Context())[0])
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_observed_network_is_the_network():
    config = model(ATTENTIONS["relu"])
    network = DyDiLiT(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(network)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    parameters = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape),
        nnx.to_pure_dict(state),
    )
    images = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    time, labels = jnp.array([100.0, 900.0]), jnp.array([3, 10])
    observed, seen = oversmoothing.observer(config)(parameters, images, time, labels)
    own, _ = jax.jit(lambda p: nnx.merge(graph, p)(images, time, labels))(parameters)
    np.testing.assert_allclose(observed, own, rtol=1e-5, atol=1e-5)
    assert seen["weights"].shape == (2, 2, 2, 16, 16)
    assert all(seen[name].shape == (2,) for name in oversmoothing.MEASURES)
    np.testing.assert_allclose(seen["row_weight"], 1.0, rtol=1e-4)  # a mean over the values


def test_entropy_rank_and_sign_of_known_matrices():
    count = 8
    uniform, diagonal = jnp.full((count, count), 1 / count), jnp.eye(count)
    np.testing.assert_allclose(oversmoothing.row_entropy(uniform), 1.0, rtol=1e-5)
    np.testing.assert_allclose(oversmoothing.row_entropy(diagonal), 0.0, atol=1e-5)
    # Two equal weights, one of them negative: log 2 / log 8.
    signed = diagonal - jnp.roll(diagonal, 1, axis=1)
    np.testing.assert_allclose(oversmoothing.row_entropy(signed), 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(oversmoothing.negative_share(signed), 0.5, rtol=1e-5)
    np.testing.assert_allclose(oversmoothing.negative_share(uniform), 0.0)
    np.testing.assert_allclose(oversmoothing.effective_rank(uniform), 1 / count, rtol=1e-3)
    np.testing.assert_allclose(oversmoothing.effective_rank(diagonal), 1.0, rtol=1e-5)
    # Singular values 3 and 1 of four: exp(-(3/4 log 3/4 + 1/4 log 1/4)) / 4.
    values = jnp.diag(jnp.array([3.0, 1.0, 0.0, 0.0]))
    expected = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))) / 4
    np.testing.assert_allclose(oversmoothing.effective_rank(values), expected, rtol=1e-5)


def test_token_similarity_is_the_mean_cosine_of_pairs():
    tokens = np.random.default_rng(0).standard_normal((3, 5, 4))
    expected = []
    for each in tokens:
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        expected.append(
            np.mean(
                [
                    each[i] @ each[j] / np.linalg.norm(each[i]) / np.linalg.norm(each[j])
                    for i, j in pairs
                ]
            )
        )
    np.testing.assert_allclose(
        oversmoothing.token_similarity(jnp.asarray(tokens)), expected, rtol=1e-4, atol=1e-6
    )
