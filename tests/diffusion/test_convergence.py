"""Every sampler on Gaussian data, where the right answer is known: see toy.py.

`toy.moments` gives the mean and the standard deviation of a sampler's images without drawing any,
so that orders of convergence are seen well below what Monte Carlo would resolve.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.samplers import SAMPLERS, make_sampler, sample
from dydilit_jax.diffusion.samplers.flow import DIFFUSIONS
from tests.diffusion import toy
from tests.diffusion.compiling import quick_jit

FLOW = RectifiedFlow()
SHIFTED = RectifiedFlow(shift=1.5, time_scale=1.0)
GAUSSIAN = GaussianProcess()
ENDS = np.array([[0.0] * 3, [1.0] * 3])  # where the ODE's map is compared


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def exact_network(process):
    if isinstance(process, RectifiedFlow):
        return toy.flow_network(process)
    return toy.gaussian_network(process)


def map_of(name, process, steps, **options):
    sampler = make_sampler(name, process, steps, **options)
    offset, gain, shares = toy.affine_map(sampler, exact_network(process), steps)
    assert np.abs(shares).max() < 1e-12
    return offset + gain * ENDS


def moments_of(name, process, steps, **options):
    sampler = make_sampler(name, process, steps, **options)
    return toy.moments(sampler, exact_network(process), steps)


def assert_order(order, steps, errors):
    """The slope of log error over log steps, first to last."""
    slope = -np.log(errors[-1] / errors[0]) / np.log(steps[-1] / steps[0])
    assert abs(slope - order) < 0.15, (slope, errors)


@pytest.mark.parametrize(
    ("name", "process", "order", "last_error"),
    [
        ("euler", FLOW, 1, 0.03),
        ("euler", SHIFTED, 1, 0.03),
        ("heun", FLOW, 2, 4e-4),
        ("heun", SHIFTED, 2, 9e-4),
    ],
)
def test_order_of_flow_odes(name, process, order, last_error):
    steps = [40, 80]
    exact = toy.flow_end(ENDS)
    errors = [np.abs(map_of(name, process, count) - exact).max() for count in steps]
    assert_order(order, steps, errors)
    assert errors[-1] < last_error


def test_order_of_ddim():
    steps = [40, 80]
    exact = toy.gaussian_end(GAUSSIAN, ENDS)
    errors = [np.abs(map_of("ddim", GAUSSIAN, count) - exact).max() for count in steps]
    assert_order(1, steps, errors)
    assert errors[-1] < 0.03


def test_order_of_dpm_solver():
    """Up to its last step, which by design takes E[x_0 | x] at the first timestep."""
    steps = [80, 160]
    exact = toy.gaussian_end(GAUSSIAN, ENDS, step=0)
    errors = [
        np.abs(map_of("dpm_solver_pp", GAUSSIAN, count, timestep_spacing="log_snr") - exact).max()
        for count in steps
    ]
    assert_order(2, steps, errors)
    assert errors[-1] < 4e-4


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_dpm_solver_on_whole_timesteps(spacing):
    exact = toy.gaussian_end(GAUSSIAN, ENDS)
    ours = map_of("dpm_solver_pp", GAUSSIAN, 100, timestep_spacing=spacing)
    ddim = map_of("ddim", GAUSSIAN, 100)
    assert np.abs(ours - exact).max() < 0.2 * np.abs(ddim - exact).max()


@pytest.mark.parametrize("process", [FLOW, SHIFTED])
@pytest.mark.parametrize("diffusion", ["constant", "SBDM", "sigma"])
def test_sde_of_the_flow_has_its_marginals_whatever_the_diffusion(diffusion, process):
    options = {"diffusion": diffusion, "last_step": "none", "diffusion_norm": 0.8}
    mean, std = moments_of("euler_maruyama", process, 200, **options)
    np.testing.assert_allclose(mean, toy.MEAN, atol=1e-4)
    np.testing.assert_allclose(std, toy.STD, atol=0.012)


def test_order_of_the_flow_sde():
    steps = [80, 160]
    options = {"diffusion": "sigma", "last_step": "none"}
    moments = [moments_of("euler_maruyama", FLOW, count, **options) for count in steps]
    assert_order(1, steps, [np.abs(std - toy.STD).max() for _, std in moments])


SIT_DIFFUSIONS = {
    "constant": lambda s: 1.0,
    "SBDM": lambda s: (1 - s) / s,
    "sigma": lambda s: 1 - s,
    "linear": lambda s: 1 - s,
    "decreasing": lambda s: 0.25 * (np.cos(np.pi * s) + 1) ** 2,
    "increasing-decreasing": lambda s: np.sin(np.pi * s) ** 2,
}
"""w in SiT's time s = 1 - t."""


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_diffusions_are_sits(diffusion):
    table = make_sampler("euler_maruyama", FLOW, 9, diffusion=diffusion).tables()
    expected = [SIT_DIFFUSIONS[diffusion](1 - t) for t in table["t"]]
    np.testing.assert_allclose(table["diffusion"], expected, rtol=1e-12, atol=1e-30)
    np.testing.assert_allclose(
        table["noise_scale"][:-1],
        np.sqrt(2 * np.array(expected) * (table["t"] - table["s"]))[:-1],
        rtol=1e-12,
        atol=1e-15,
    )
    assert table["noise_scale"][-1] == 0
    np.testing.assert_allclose([table["t"][-1], table["s"][-1]], [0.04, 0.0], atol=1e-12)
    start = {"SBDM": 0.9}.get(diffusion, 1.0)
    np.testing.assert_allclose(table["t"][0], start)


@pytest.mark.parametrize("last_step", ["mean", "euler"])
@pytest.mark.parametrize("diffusion", ["sigma", "decreasing"])
def test_last_step_of_the_flow_sde(diffusion, last_step):
    """On the exact marginal at the last step's time, its result is known too."""
    size = 0.1
    w = SIT_DIFFUSIONS[diffusion](1 - size) if last_step == "mean" else 0.0
    variance = (1 - size) ** 2 * toy.STD**2 + size**2
    expected = np.abs((1 - size) * toy.STD**2 - size * w) / np.sqrt(variance)
    options = {"diffusion": diffusion, "last_step": last_step, "last_step_size": size}
    mean, std = moments_of("euler_maruyama", FLOW, 400, **options)
    np.testing.assert_allclose(mean, toy.MEAN, atol=1e-10)
    np.testing.assert_allclose(std, expected, rtol=0.01)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddpm", {}),
        ("ddpm", {"variance": "fixed_small"}),
        ("ddpm", {"variance": "fixed_large"}),
        ("ddim", {"eta": 0.7}),
    ],
)
def test_order_of_ancestral_samplers(name, options):
    steps = [160, 320]
    errors = []
    for count in steps:
        mean, std = moments_of(name, GAUSSIAN, count, **options)
        np.testing.assert_allclose(mean, toy.MEAN, atol=2e-3)
        errors.append(np.abs(std - toy.STD).max())
    assert_order(1, steps, errors)
    assert errors[-1] < 0.02


def test_ddim_at_eta_1_is_ddpm_with_the_posterior_variance():
    ddim = make_sampler("ddim", GAUSSIAN, 20, eta=1.0)
    ddpm = make_sampler("ddpm", GAUSSIAN, 20, variance="fixed_small")
    ours, theirs = (toy.affine_map(s, exact_network(GAUSSIAN), 20) for s in (ddim, ddpm))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ddpm", "euler", "euler_maruyama"])
def test_images_have_the_data_s_moments(name):
    """The whole way, noise and all, by Monte Carlo."""
    process = FLOW if SAMPLERS[name].process_type is RectifiedFlow else GAUSSIAN
    options = {"diffusion": "SBDM", "last_step": "none"} if name == "euler_maruyama" else {}
    sampler = make_sampler(name, process, 100, **options)
    keys = jax.random.split(jax.random.key(0), 64)
    draw = quick_jit(lambda keys: sample(sampler, exact_network(process), keys, (16, 16, 3)))
    images = np.asarray(draw(keys)).reshape(-1, 3)
    assert images.dtype == jnp.float32
    covariance = np.cov(images.T)
    mean, std = toy.moments(sampler, exact_network(process), 100)
    error = 4 / np.sqrt(len(images))
    np.testing.assert_allclose(images.mean(0), mean, atol=error * toy.STD.max())
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), std, rtol=error)
    spread = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs((covariance / spread)[~np.eye(3, dtype=bool)]).max() < error
