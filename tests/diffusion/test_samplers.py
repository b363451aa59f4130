"""What all samplers share: keys, trajectories, thresholds, names and errors."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.samplers import SAMPLERS, Euler, integrate, make_sampler, sample
from dydilit_jax.errors import UserError
from tests.diffusion.compiling import normal, quick_jit

SHAPE = (4, 4, 3)


def process_of(name):
    return {
        RectifiedFlow: RectifiedFlow(),
        GaussianProcess: GaussianProcess(),
    }[SAMPLERS[name].process_type]


def network(x, time):
    """Mixes positions and channels of an image, and nothing between images."""
    prediction = 0.6 * x + 0.1 * jnp.roll(x, 1, axis=(1, 3)) + jnp.sin(time)[:, None, None, None]
    return jnp.concatenate([prediction, 0.1 * x], axis=-1)


def image_keys(count):
    data = jnp.stack([jnp.full(count, 3), jnp.arange(count)], axis=1)
    return jax.random.wrap_key_data(data.astype(jnp.uint32))


@functools.cache
def sampling(name, **options):
    """A compiled function from keys (B,) to images."""
    options = {"eta": 0.5} | options if name == "ddim" else options
    sampler = make_sampler(name, process_of(name), 4, **options)
    return quick_jit(lambda keys: sample(sampler, network, keys, SHAPE))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    eight = sampling(name)(image_keys(8))
    assert np.isfinite(eight).all()
    assert np.unique(np.asarray(eight)[:, 0, 0, 0]).size == 8
    for keys, images in (
        (image_keys(8)[::-1], eight[::-1]),
        (image_keys(3), eight[:3]),
        (image_keys(1), eight[:1]),
    ):
        np.testing.assert_allclose(sampling(name)(keys), images, rtol=1e-5, atol=1e-5)


ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dydilit_jax.diffusion.samplers import SAMPLERS
from tests.diffusion.test_samplers import image_keys, sampling

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
keys = jax.device_put(image_keys(8), NamedSharding(mesh, PartitionSpec("data")))
images = {name: sampling(name)(keys) for name in SAMPLERS}
for image in images.values():
    assert len(image.sharding.device_set) == 8 and not image.is_fully_replicated
np.savez(sys.argv[1], **images)
"""


def test_an_image_does_not_depend_on_the_number_of_devices(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    images = tmp_path / "images.npz"
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, images],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    for name, eight in np.load(images).items():
        np.testing.assert_allclose(sampling(name)(image_keys(8)), eight, rtol=1e-5, atol=1e-5)


def test_start_and_noise_come_from_the_key_alone():
    """fold_in(key, 0) is the start, fold_in(key, k) the k-th step's noise."""
    sampler = make_sampler("ddpm", GaussianProcess(), 4)

    @quick_jit
    def from_noise(key):
        noises = jnp.stack(
            [jax.random.normal(jax.random.fold_in(key, index), (1, *SHAPE)) for index in range(5)]
        )
        return integrate(sampler, network, noises[0], lambda step: noises[step + 1])

    expected = from_noise(image_keys(8)[5])
    actual = sampling("ddpm")(image_keys(8))[5:6]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_trajectory():
    sampler = make_sampler("euler", RectifiedFlow(), 4)
    trajectory = quick_jit(
        lambda keys: sample(sampler, network, keys, SHAPE, return_trajectory=True)
    )(image_keys(8))
    assert trajectory.shape == (5, 8, *SHAPE)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(trajectory[-1], sampling("euler")(image_keys(8)))
    step = 0.25 * network(trajectory[0], jnp.full(8, 1000.0))[..., :3]
    close(trajectory[1], trajectory[0] - step)


def test_one_compilation_serves_a_shape():
    traces = []

    def counted(x, time):
        traces.append(x.shape)
        return network(x, time)

    sampler = make_sampler("dpm_solver_pp", GaussianProcess(), 20)
    draw = quick_jit(lambda keys: sample(sampler, counted, keys, SHAPE))
    draw(image_keys(2))
    first = len(traces)
    draw(image_keys(4)[2:])
    assert len(traces) == first <= 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step(name):
    sampler = make_sampler(name, process_of(name), 1)
    x = jnp.ones((1, *SHAPE))
    run = quick_jit(lambda x: integrate(sampler, network, x, lambda step: 1e3 * x))
    # The one step is the last, and no noise is left in an image.
    assert np.abs(run(x)).max() < 200


@pytest.mark.parametrize("name", SAMPLERS)
def test_thresholds_keep_x_0_in_range(name):
    options = {"last_step": "euler"} if name == "euler_maruyama" else {}
    clipped = make_sampler(name, process_of(name), 4, clip_denoised=True, **options)
    dynamic = make_sampler(name, process_of(name), 4, dynamic_threshold=90.0, **options)
    noise = 3 * normal(0, (2, *SHAPE))

    @quick_jit
    def ends(noise):
        return [
            integrate(sampler, network, noise, lambda step: noise) for sampler in (clipped, dynamic)
        ]

    assert np.abs(sampling(name, **options)(image_keys(8))).max() > 1.1
    for images in ends(noise):
        assert 0.5 < np.abs(images).max() <= 1.0 + 1e-5


def test_dynamic_threshold_is_imagens():
    sampler = Euler(process=RectifiedFlow(), steps=1, dynamic_threshold=75.0)
    inside, outside = jnp.linspace(-0.8, 0.8, 5), jnp.array([-4.0, -2.0, 0.0, 1.0, 3.0])
    restricted = sampler.restrict(jnp.stack([inside, outside])[:, None, None, :])[:, 0, 0]
    np.testing.assert_allclose(restricted[0], inside)
    np.testing.assert_allclose(restricted[1], np.clip(outside, -3, 3) / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "process", "steps", "options", "says"),
    [
        ("dpm_solver", GaussianProcess(), 5, {}, "did you mean 'dpm_solver_pp'"),
        ("ddpm", RectifiedFlow(), 5, {}, "RectifiedFlow: use euler, heun, euler_maruyama"),
        ("heun", GaussianProcess(), 5, {}, "GaussianProcess: use ddpm, ddim, dpm_solver_pp"),
        ("ddim", GaussianProcess(), 5, {"etta": 1.0}, "did you mean 'eta'"),
        ("ddim", GaussianProcess(), 1001, {}, "steps must be 1 to 1000"),
        ("dpm_solver_pp", GaussianProcess(), 0, {}, "steps must be 1 to 1000"),
        ("dpm_solver_pp", GaussianProcess(), 1000, {}, "visits a timestep twice"),
        ("euler", RectifiedFlow(), 0, {}, "steps must be at least 1"),
        ("ddim", GaussianProcess(), 5, {"eta": 2.0}, "eta must be in"),
        ("ddpm", GaussianProcess(), 5, {"spacing": "ddim10"}, "keeps 10 steps, but steps is 5"),
        ("ddpm", GaussianProcess(), 5, {"variance": "fixed"}, "unknown variance"),
        (
            "ddpm",
            GaussianProcess(learned_variance=False),
            5,
            {"variance": "learned"},
            "needs a process with learned_variance",
        ),
        ("dpm_solver_pp", GaussianProcess(), 5, {"timestep_spacing": "log"}, "timestep spacing"),
        ("euler_maruyama", RectifiedFlow(), 5, {"diffusion": "sbdm"}, "diffusion coefficient"),
        ("euler_maruyama", RectifiedFlow(), 5, {"last_step": "Mean"}, "did you mean 'mean'"),
        ("euler_maruyama", RectifiedFlow(), 5, {"last_step_size": 0.0}, "last_step_size"),
        ("euler_maruyama", RectifiedFlow(), 5, {"diffusion_norm": -1.0}, "diffusion_norm"),
        (
            "euler_maruyama",
            RectifiedFlow(),
            5,
            {"diffusion": "SBDM", "start_epsilon": 0.97},
            "leave no time",
        ),
        ("euler", RectifiedFlow(), 5, {"dynamic_threshold": 101.0}, "percentile"),
        (
            "euler",
            RectifiedFlow(),
            5,
            {"dynamic_threshold": 99.5, "clip_denoised": True},
            "exclude each other",
        ),
    ],
)
def test_errors(name, process, steps, options, says):
    with pytest.raises(UserError, match=says) as error:
        make_sampler(name, process, steps, **options)
    assert "\n" not in str(error.value)


def test_a_learned_variance_is_the_default_only_where_there_is_one():
    without = GaussianProcess(learned_variance=False)
    large, default = (
        make_sampler("ddpm", without, 3, variance=variance) for variance in ("fixed_large", None)
    )
    noise = normal(0, (1, *SHAPE))

    @quick_jit
    def ends(noise):
        return [
            integrate(sampler, lambda x, time: 0.5 * x, noise, lambda step: noise)
            for sampler in (large, default)
        ]

    np.testing.assert_array_equal(*ends(noise))


def test_malformed_calls():
    sampler = make_sampler("euler", RectifiedFlow(), 2)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        sample(sampler, network, jax.random.split(jax.random.PRNGKey(0), 2), SHAPE)
    with pytest.raises(ValueError, match="one image"):
        sample(sampler, network, image_keys(2), (2, *SHAPE))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one image"):
        sample(sampler, network, jax.random.key(0), SHAPE)
