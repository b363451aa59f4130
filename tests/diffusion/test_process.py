import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.process import example_keys, mean_each, normal_each
from tests.diffusion.compiling import normal, quick_jit

PROCESSES = [RectifiedFlow(), GaussianProcess(min_snr_gamma=5.0)]


def network(x, time):
    prediction = 0.5 * x + jnp.sin(time)[:, None, None, None]
    return jnp.concatenate([prediction, 0.1 * x], axis=-1)


def network_for(process):
    return lambda x, time: network(x, time)[..., : process.output_channels(x.shape[-1])]


@pytest.mark.parametrize("process", PROCESSES)
def test_loss_of_an_example_does_not_depend_on_its_batch(process):
    x_0 = normal(1, (8, 4, 4, 2))
    key = jax.random.key(2)
    compiled = quick_jit(lambda x_0, key: process.loss(network_for(process), x_0, key))
    loss, terms = compiled(x_0, key)
    assert loss.shape == (8,)
    assert loss.dtype == jnp.float32
    assert all(term.shape == (8,) and term.dtype == jnp.float32 for term in terms.values())
    assert np.unique(loss).size == 8

    first, _ = compiled(x_0[:3], key)
    np.testing.assert_allclose(first, loss[:3], rtol=2e-6)
    keys = example_keys(key, 8)
    parts = [compiled(x_0[i : i + 4], keys[i : i + 4])[0] for i in (0, 4)]
    np.testing.assert_allclose(jnp.concatenate(parts), loss, rtol=2e-6)


@pytest.mark.parametrize("process", PROCESSES)
def test_loss_is_computed_in_float32(process):
    x_0 = normal(1, (4, 4, 4, 2)).astype(jnp.bfloat16)

    def half_precision(x, time):
        assert x.dtype == jnp.float32
        return network_for(process)(x, time).astype(jnp.bfloat16)

    @quick_jit
    def losses(key):
        half, _ = process.loss(half_precision, x_0, key)
        full, _ = process.loss(network_for(process), x_0.astype(jnp.float32), key)
        return half, full

    half, full = losses(jax.random.key(0))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, rtol=0.02)


@pytest.mark.parametrize("process", PROCESSES)
def test_loss_is_differentiable_under_jit(process):
    x_0 = normal(1, (4, 4, 4, 2))

    @quick_jit
    def gradient(gain):
        def loss(gain):
            return process.loss(
                lambda x, time: gain * network_for(process)(x, time), x_0, jax.random.key(0)
            )[0].mean()

        return jax.grad(loss)(gain)

    value = gradient(0.9)
    assert np.isfinite(value)
    assert value != 0


def test_keys():
    keys = example_keys(jax.random.key(0), 5)
    assert keys.shape == (5,)
    assert keys[3] == jax.random.fold_in(jax.random.key(0), 3)
    assert example_keys(keys, 5) is keys
    noise = normal_each(keys, (3,), jnp.float32)
    assert np.unique(noise).size == 15
    with pytest.raises(ValueError, match="batch of 4"):
        example_keys(keys, 4)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        example_keys(jax.random.PRNGKey(0), 2)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_network_of_too_few_channels_is_refused(process):
    """Rather than broadcast to a loss that means nothing."""
    with pytest.raises(ValueError, match="puts out 1 channels"):
        process.loss(lambda x, time: x[..., :1], jnp.zeros((2, 1, 1, 2)), jax.random.key(0))


def test_mean_each():
    np.testing.assert_array_equal(mean_each(jnp.arange(8.0).reshape(2, 2, 2)), [1.5, 5.5])
