import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion import flow
from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.process import example_keys
from dydilit_jax.errors import UserError
from tests.diffusion import toy
from tests.diffusion.compiling import normal, quick_jit


def times(process, count=4000):
    return np.asarray(process.draw_time(example_keys(jax.random.key(0), count)))


def test_uniform_times():
    t = times(RectifiedFlow(time_distribution="uniform"))
    np.testing.assert_allclose(np.quantile(t, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)


def test_logit_normal_times():
    t = times(RectifiedFlow(logit_mean=-0.5, logit_std=0.7))
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [-0.5, 0.7], atol=0.03)


def test_shift():
    process = RectifiedFlow(time_distribution="uniform", shift=3.0)
    plain = times(RectifiedFlow(time_distribution="uniform"))
    np.testing.assert_allclose(times(process), 3 * plain / (1 + 2 * plain), rtol=1e-5)
    np.testing.assert_allclose(process.time_grid(2), [1.0, 0.75, 0.0])
    # SD3 (equation 23): the shift by s keeps the times of an s^2 times larger image's noise.
    t = np.linspace(0.1, 0.9, 5)
    shifted = np.asarray(process.shift_time(jnp.asarray(t)))
    np.testing.assert_allclose(shifted / (1 - shifted), 3.0 * t / (1 - t), rtol=1e-5)


def test_conversions_invert_each_other():
    x_0, noise = normal(0, (2, 3, 2, 2, 2))
    t = jnp.array([0.2, 0.5, 0.9])
    velocity = noise - x_0
    score = -noise / t[:, None, None, None]

    @quick_jit
    def conversions():
        x_t = RectifiedFlow().interpolate(x_0, noise, t)
        return [
            (flow.x_0_from_velocity(velocity, x_t, t), x_0),
            (flow.noise_from_velocity(velocity, x_t, t), noise),
            (flow.score_from_velocity(velocity, x_t, t), score),
            (flow.velocity_from_x_0(x_0, x_t, t), velocity),
            (flow.velocity_from_noise(noise, x_t, t), velocity),
            (flow.velocity_from_score(score, x_t, t), velocity),
        ]

    for converted, expected in conversions():
        np.testing.assert_allclose(converted, expected, rtol=1e-4, atol=1e-5)


def test_score_is_the_gradient_of_the_density():
    process = RectifiedFlow()
    t = jnp.array([0.3])
    x = jnp.array([[[[0.7, -0.4, 1.0]]]])

    def log_density(x):
        variance = (1 - t) ** 2 * toy.STD**2 + t**2
        return -0.5 * jnp.sum((x - (1 - t) * toy.MEAN) ** 2 / variance)

    velocity = process.velocity(toy.flow_network(process), x, t)
    np.testing.assert_allclose(
        flow.score_from_velocity(velocity, x, t), jax.grad(log_density)(x), rtol=1e-5
    )


def test_loss_is_least_at_the_exact_velocity():
    process = RectifiedFlow(time_distribution="uniform")
    exact = toy.flow_network(process)
    unit = normal(3, (500, 2, 2, 3))
    x_0 = toy.MEAN + toy.STD * unit

    def loss(gain, offset):
        return process.loss(lambda x, time: gain * exact(x, time) + offset, x_0, jax.random.key(0))[
            0
        ].mean()

    # The gradient in gain and offset; it is larger than 0.2 where either is off by 0.2.
    gradient = quick_jit(jax.grad(loss, argnums=(0, 1)))
    np.testing.assert_allclose(gradient(1.0, 0.0), [0, 0], atol=0.05)
    for off, component, sign in ((0.8, 0, -1), (1.2, 0, 1)):
        assert sign * gradient(off, 0.0)[component] > 0.2
    assert gradient(1.0, 0.2)[1] > 0.2


def test_the_network_is_fed_scaled_time_and_its_spare_channels_are_ignored():
    process = RectifiedFlow(time_scale=10.0)
    x = jnp.ones((2, 1, 1, 2))
    velocity = process.velocity(
        lambda x, time: jnp.concatenate([x * time[:, None, None, None], 99 * x], -1),
        x,
        jnp.array([0.1, 0.5]),
    )
    np.testing.assert_allclose(velocity[:, 0, 0], [[1, 1], [5, 5]], rtol=1e-6)
    assert process.output_channels(4) == 4
    assert process.time_max == 10.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"time_distribution": "logitnormal"}, "did you mean 'logit_normal'"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
        ({"shift": -1.0}, "shift must be above 0"),
        ({"time_scale": float("nan")}, "time_scale must be above 0"),
    ],
)
def test_errors(fields, says):
    with pytest.raises(UserError, match=says):
        RectifiedFlow(**fields)
