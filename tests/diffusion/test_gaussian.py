import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.gaussian import (
    GaussianProcess,
    discretized_log_likelihood,
    noise_from_x_0,
    normal_kl,
    x_0_from_prediction,
)
from dydilit_jax.diffusion.samplers import integrate, make_sampler
from dydilit_jax.diffusion.schedules import make_betas, space_timesteps
from dydilit_jax.errors import UserError
from tests.diffusion.compiling import normal, quick_jit

GOLDEN = dict(np.load(Path(__file__).parent / "golden_gaussian.npz"))
"""What the published DiT computes, channels last; see shared/golden/README.md of the project."""


def assert_close(actual, expected, relative=1e-5):
    """Relative to each entry, or to a thousandth of the largest where an entry is near 0."""
    scale = np.maximum(np.abs(expected), 1e-3 * np.abs(expected).max())
    assert np.max(np.abs(np.asarray(actual) - expected) / scale) < relative


@pytest.mark.parametrize("spacing", ["", "250", "50", "ddim50"])
def test_schedule_is_the_published_one(spacing):
    process = GaussianProcess(spacing=spacing)
    name = spacing or "1000"
    np.testing.assert_array_equal(process.timesteps, GOLDEN[f"timesteps_{name}"])
    np.testing.assert_allclose(process.betas, GOLDEN[f"betas_{name}"], rtol=1e-12)
    np.testing.assert_allclose(process.alphas_cumprod, GOLDEN[f"alphas_cumprod_{name}"], rtol=1e-12)


def test_spacing_by_sections():
    assert space_timesteps(100, "2,3").tolist() == [0, 49, 50, 74, 99]
    # 7 steps in 3 sections: of 3, 2 and 2. Halves round to even.
    assert space_timesteps(7, "2,1,2").tolist() == [0, 2, 3, 5, 6]
    assert space_timesteps(4, "3").tolist() == [0, 2, 3]
    assert space_timesteps(10, "ddim5").tolist() == [0, 2, 4, 6, 8]
    assert space_timesteps(10, "1").tolist() == [0]


def test_squared_cosine_schedule():
    betas = make_betas("squared_cosine", 1000)

    def alpha_bar(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    np.testing.assert_allclose(betas[-1], 0.999)
    expected = alpha_bar(np.array([1, 500, 990]) / 1000) / alpha_bar(0)
    np.testing.assert_allclose(np.cumprod(1 - betas)[[0, 499, 989]], expected, rtol=1e-9)


def test_diffuse_and_reverse_step_are_the_published_ones():
    process = GaussianProcess()
    t = jnp.asarray(GOLDEN["t"])
    x_t = process.diffuse(jnp.asarray(GOLDEN["x_start"]), jnp.asarray(GOLDEN["noise"]), t)
    assert_close(x_t, GOLDEN["q_sample"])
    p = process.reverse_step(jnp.asarray(GOLDEN["model_output"]), x_t, t)
    assert_close(p.mean, GOLDEN["p_mean"])
    assert_close(p.variance, GOLDEN["p_variance"])
    assert_close(p.log_variance, GOLDEN["p_log_variance"])
    assert_close(p.x_0, GOLDEN["p_pred_xstart"])


@functools.cache
def golden_losses():
    """Loss, terms, and what the network was fed."""

    @quick_jit
    def losses(x_0, noise, t):
        fed = []

        def network(x, time):
            fed.append(time)
            return jnp.asarray(GOLDEN["model_output"])

        return *GaussianProcess().loss_at(network, x_0, noise, t), fed[0]

    return losses(GOLDEN["x_start"], GOLDEN["noise"], GOLDEN["t"])


def test_losses_are_the_published_ones():
    loss, terms, fed = golden_losses()
    np.testing.assert_array_equal(fed, GOLDEN["t"])
    np.testing.assert_allclose(terms["mse"], GOLDEN["training_losses_mse"], rtol=1e-5)
    np.testing.assert_allclose(loss, terms["mse"] + terms["vb"], rtol=1e-6)
    # The golden likelihood (t = 0, the first) has one pixel of probability 7e-9 rounded to 0.
    np.testing.assert_allclose(terms["vb"][1:], GOLDEN["training_losses_vb"][1:], rtol=1e-5)
    np.testing.assert_allclose(loss[1:], GOLDEN["training_losses_loss"][1:], rtol=1e-5)
    np.testing.assert_allclose(terms["vb"][0], GOLDEN["training_losses_vb"][0], rtol=0.02)


def published_log_likelihood(x, mean, log_std):
    """The published formula in float64, where its tails do not round away."""

    def cdf(z):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    above, below = (
        cdf((x - mean + half) * np.exp(-log_std)) for half in (np.float64(1 / 255), -1 / 255)
    )
    probability = np.where(x < -0.999, above, np.where(x > 0.999, 1 - below, above - below))
    return np.log(np.maximum(probability, 1e-12))


def test_likelihood_at_the_first_step_in_float32_equals_float64():
    inputs = [GOLDEN["x_start"][0], GOLDEN["p_mean"][0], 0.5 * GOLDEN["p_log_variance"][0]]
    expected = published_log_likelihood(*[array.astype(np.float64) for array in inputs])
    actual = discretized_log_likelihood(*[jnp.asarray(array) for array in inputs])
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-7)
    _, terms, _ = golden_losses()
    np.testing.assert_allclose(terms["vb"][0], -expected.mean() / np.log(2), rtol=1e-5)


def test_bins_of_the_likelihood_sum_to_one():
    bins = jnp.linspace(-1.0, 1.0, 256)
    total = jnp.sum(jnp.exp(discretized_log_likelihood(bins, jnp.array(0.3), jnp.array(-1.0))))
    np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_normal_kl():
    assert normal_kl(*jnp.array([0.3, -1.0, 0.3, -1.0])) == 0
    np.testing.assert_allclose(normal_kl(*jnp.array([1.0, 0.0, 0.0, 0.0])), 0.5, rtol=1e-6)
    np.testing.assert_allclose(
        normal_kl(*jnp.array([0.0, np.log(4.0), 0.0, 0.0])), 1.5 - np.log(2.0), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_sampling_is_the_published_one(name):
    options = {"spacing": "ddim50"} if name == "ddim" else {}
    sampler = make_sampler(name, GaussianProcess(), 50, **options)

    def network(x, time):
        return jnp.concatenate([GOLDEN["net_a"] * x, GOLDEN["net_b"] * x], axis=-1)

    noises = jnp.asarray(GOLDEN["ddpm50_noises"])
    run = quick_jit(lambda x: integrate(sampler, network, x, lambda step: noises[step]))
    actual, expected = run(jnp.asarray(GOLDEN["x_T"])), GOLDEN[f"{name}50_sample"]
    assert np.abs(actual - expected).max() / np.abs(expected).max() < 1e-5


def test_variational_bound_trains_the_variance_alone():
    process = GaussianProcess()
    x_0 = normal(0, (3, 2, 2, 2))
    noise = normal(1, (3, 2, 2, 2))
    t = jnp.array([0, 5, 700])

    def vb(gains):
        def network(x, time):
            return jnp.concatenate([gains[0] * x, gains[1] * x], axis=-1)

        return process.loss_at(network, x_0, noise, t)[1]["vb"].sum()

    prediction_gradient, variance_gradient = quick_jit(jax.grad(vb))(jnp.array([0.3, 0.2]))
    assert prediction_gradient == 0
    assert abs(variance_gradient) > 1e-3


@pytest.mark.parametrize("kind", ["noise", "x_0", "velocity"])
def test_predictions_describe_the_same_process(kind):
    process = GaussianProcess(prediction=kind)
    alpha, sigma = jnp.array(0.8), jnp.array(0.6)
    x_0, noise = normal(0, (2, 1, 2, 2, 3))
    x_t = alpha * x_0 + sigma * noise
    prediction = {"noise": noise, "x_0": x_0, "velocity": alpha * noise - sigma * x_0}[kind]
    np.testing.assert_allclose(
        x_0_from_prediction(kind, prediction, x_t, alpha, sigma), x_0, atol=1e-6
    )
    np.testing.assert_allclose(noise_from_x_0(x_0, x_t, alpha, sigma), noise, atol=1e-6)

    t = jnp.array([300])
    alpha = jnp.sqrt(GOLDEN["alphas_cumprod_1000"][300])
    sigma = jnp.sqrt(1 - alpha**2)
    target = {"noise": noise, "x_0": x_0, "velocity": alpha * noise - sigma * x_0}[kind]
    right = GaussianProcess(prediction=kind, learned_variance=False)
    loss, _ = right.loss_at(lambda x, time: target, x_0, noise, t)
    assert loss[0] < 1e-10
    mean = process.reverse_step(
        jnp.concatenate([target, target], -1), process.diffuse(x_0, noise, t), t
    ).mean
    posterior = process.posterior_mean(x_0, process.diffuse(x_0, noise, t), t)
    np.testing.assert_allclose(mean, posterior, atol=1e-5)


@pytest.mark.parametrize("t", [10, 300, 900])
def test_min_snr_weighs_every_prediction_alike(t):
    """The same error of x_0 costs the same, min(SNR, gamma), whatever is predicted."""
    gamma = 5.0
    a = GOLDEN["alphas_cumprod_1000"][t]
    snr = a / (1 - a)
    # An error e of x_0 is an error sqrt(SNR) e of the noise, e / sqrt(1 - A) of the velocity.
    errors = {"noise": np.sqrt(snr), "x_0": 1.0, "velocity": 1 / np.sqrt(1 - a)}
    x_0, noise = jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2))

    def constant(value, x, time):
        return jnp.full_like(x, value)

    for kind, error in errors.items():
        process = GaussianProcess(prediction=kind, learned_variance=False, min_snr_gamma=gamma)
        loss, terms = process.loss_at(
            functools.partial(constant, error), x_0, noise, jnp.array([t])
        )
        np.testing.assert_allclose(loss, min(snr, gamma), rtol=1e-4)
        np.testing.assert_allclose(terms["mse"], error**2, rtol=1e-4)


def test_posterior_by_bayes():
    """q(x_{t-1} | x_t, x_0) from products of the three normal densities it is made of."""
    process = GaussianProcess(spacing="20")
    t, x_0, x_t = 7, 0.4, -0.9
    beta, before = process.betas[t], process.alphas_cumprod[t - 1]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = (np.sqrt(1 - beta) * x_t / beta + np.sqrt(before) * x_0 / (1 - before)) / precision
    np.testing.assert_allclose(process.posterior_variance[t], 1 / precision, rtol=1e-10)
    actual = process.posterior_mean(
        jnp.full((1, 1, 1, 1), x_0), jnp.full((1, 1, 1, 1), x_t), jnp.array([t])
    )
    np.testing.assert_allclose(actual.item(), mean, rtol=1e-5)


def test_fixed_variances():
    process = GaussianProcess(learned_variance=False)
    x = jnp.zeros((2, 1, 1, 1))
    t = jnp.array([0, 500])
    small = process.reverse_step(x, x, t, variance="fixed_small").variance.ravel()
    large = process.reverse_step(x, x, t, variance="fixed_large").variance.ravel()
    np.testing.assert_allclose(small, process.posterior_variance[[1, 500]], rtol=1e-5)
    np.testing.assert_allclose(
        large, [process.posterior_variance[1], process.betas[500]], rtol=1e-5
    )


def test_loss_draws_every_step_and_feeds_the_full_chains():
    process = GaussianProcess(learned_variance=False, spacing="ddim10")

    @quick_jit
    def fed(key):
        seen = []

        def network(x, time):
            seen.append(time)
            return x

        process.loss(network, jnp.zeros((400, 1, 1, 1)), key)
        return seen[0]

    times = fed(jax.random.key(0))
    assert times.dtype == jnp.float32
    steps, counts = np.unique(times, return_counts=True)
    assert steps.tolist() == list(range(0, 1000, 100))
    assert counts.min() > 15


def test_output_channels():
    assert GaussianProcess().output_channels(4) == 8
    assert GaussianProcess(learned_variance=False).output_channels(4) == 4
    assert GaussianProcess().time_max == 999


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"schedule": "linaer"}, "did you mean 'linear'"),
        ({"prediction": "epsilon"}, "unknown prediction 'epsilon'"),
        ({"min_snr_gamma": -1.0}, "min_snr_gamma must be at least 0"),
        ({"train_steps": 0}, "train_steps must be at least 1"),
        ({"train_steps": 10}, "too few"),
        ({"spacing": "1001"}, "at most 1000"),
        ({"spacing": "10,600"}, "600 of the 500 steps of a section"),
        ({"spacing": "ddim300"}, "no whole stride"),
        ({"spacing": "ten"}, "'ten' is not understood"),
        ({"spacing": "0"}, "'0' is not understood"),
    ],
)
def test_errors(fields, says):
    with pytest.raises(UserError, match=says) as error:
        GaussianProcess(**fields)
    assert "\n" not in str(error.value)
