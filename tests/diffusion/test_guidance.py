import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.guidance import classifier_free
from dydilit_jax.errors import UserError
from tests.diffusion.compiling import normal, quick_jit

NULL = 10
X = normal(0, (3, 2, 2, 4))
TIME = jnp.array([100.0, 500.0, 900.0])
LABELS = jnp.array([1, 2, 3])


def network(x, time, labels):
    """A prediction of 4 channels and a variance of 4, all of which know label and time."""
    scale = (labels + time / 100)[:, None, None, None]
    return jnp.concatenate([scale * x, jnp.cos(scale) * x], axis=-1)


CONDITIONAL = network(X, TIME, LABELS)
UNCONDITIONAL = network(X, TIME, jnp.full(3, NULL))


def batches_of(scale, **options):
    """The batch sizes that the network is traced with."""
    seen = []

    def watched(x, time, labels):
        seen.append((len(x), len(time), len(labels)))
        return network(x, time, labels)

    output = quick_jit(classifier_free(watched, LABELS, NULL, scale, **options))(X, TIME)
    return output, seen


def test_scale_1_is_the_conditional_network_and_skips_the_null_half():
    output, seen = batches_of(1.0)
    np.testing.assert_allclose(output, CONDITIONAL, rtol=1e-5)
    assert seen == [(3, 3, 3)]


def test_scale_0_is_the_null_prediction():
    output, seen = batches_of(0.0)
    np.testing.assert_allclose(output[..., :4], UNCONDITIONAL[..., :4], rtol=1e-6)
    assert seen == [(6, 6, 6)]


def test_guided_prediction_and_conditional_variance():
    output, _ = batches_of(2.5)
    expected = UNCONDITIONAL + 2.5 * (CONDITIONAL - UNCONDITIONAL)
    np.testing.assert_allclose(output[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output[..., 4:], CONDITIONAL[..., 4:], rtol=1e-5)
    assert np.abs(CONDITIONAL - UNCONDITIONAL)[..., 4:].max() > 0.1


@pytest.mark.parametrize("channels", [3, 9])
def test_guided_channels(channels):
    output, _ = batches_of(2.5, channels=channels)
    expected = UNCONDITIONAL + 2.5 * (CONDITIONAL - UNCONDITIONAL)
    guided = min(channels, 4)
    np.testing.assert_allclose(output[..., :guided], expected[..., :guided], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(output[..., guided:], CONDITIONAL[..., guided:], rtol=1e-5)


def test_interval():
    guided, _ = batches_of(2.5)
    output, _ = batches_of(2.5, interval=(0.4, 0.5))
    np.testing.assert_allclose(output[1], guided[1], rtol=1e-5)
    np.testing.assert_allclose(output[::2], CONDITIONAL[::2], rtol=1e-5)
    output, _ = batches_of(2.5, interval=(0.4, 1.0), time_max=200.0)
    np.testing.assert_allclose(output[0], guided[0], rtol=1e-5)
    np.testing.assert_allclose(output[1:], CONDITIONAL[1:], rtol=1e-5)


def test_outside_the_interval_the_null_half_is_not_run():
    ran = []

    def counted(x, time, labels):
        jax.debug.callback(lambda _: ran.append(len(x)), x[0, 0, 0, 0])
        return network(x, time, labels)

    output = quick_jit(classifier_free(counted, LABELS, NULL, 2.5, interval=(0.2, 0.3)))(X, TIME)
    jax.effects_barrier()
    np.testing.assert_allclose(output, CONDITIONAL, rtol=1e-5)
    assert ran == [3]


def test_traced_scale_and_a_scale_for_each_example():
    traced = quick_jit(lambda scale: classifier_free(network, LABELS, NULL, scale)(X, TIME))
    for scale in (1.0, 4.0):
        expected = UNCONDITIONAL + scale * (CONDITIONAL - UNCONDITIONAL)
        np.testing.assert_allclose(traced(scale)[..., :4], expected[..., :4], rtol=1e-5, atol=1e-5)
    each = traced(jnp.array([1.0, 4.0, 2.0]))
    np.testing.assert_allclose(each[1], traced(4.0)[1], rtol=1e-6)
    np.testing.assert_allclose(each[2], traced(2.0)[2], rtol=1e-6)


def test_labels_may_be_a_tree_of_embeddings():
    labels = {"tokens": jnp.arange(6.0).reshape(3, 2), "mask": jnp.ones((3, 2), bool)}
    null = {"tokens": np.array([7.0, 8.0]), "mask": False}

    def embedded(x, time, labels):
        weight = jnp.where(labels["mask"], labels["tokens"], 0.0).sum(1)
        return weight[:, None, None, None] * x

    output = quick_jit(classifier_free(embedded, labels, null, 3.0))(X, TIME)
    weight = 3.0 * labels["tokens"].sum(1)[:, None, None, None]
    np.testing.assert_allclose(output, weight * X, rtol=1e-5)


def test_guidance_is_computed_in_float32():
    def half(x, time, labels):
        return network(x, time, labels).astype(jnp.bfloat16)

    for scale in (1.0, 2.0):
        for interval in ((0.0, 1.0), (0.0, 0.5)):
            guided = classifier_free(half, LABELS, NULL, scale, interval=interval)
            assert jax.eval_shape(guided, X, TIME).dtype == jnp.float32


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.5, 1.1), (0.6, 0.4)])
def test_wrong_interval(interval):
    with pytest.raises(UserError, match="guidance interval must be"):
        classifier_free(network, LABELS, NULL, 2.0, interval=interval)


def test_wrong_channels():
    with pytest.raises(UserError, match="guidance channels must be at least 1"):
        classifier_free(network, LABELS, NULL, 2.0, channels=0)
