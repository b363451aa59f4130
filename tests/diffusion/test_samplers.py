"""What all samplers share: keys, trajectories, thresholds, names and errors."""

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
from dydilit_jax.diffusion.samplers import SAMPLERS, integrate, make_sampler, sample
from dydilit_jax.errors import UserError

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
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(count))


def draw(name, keys, **options):
    options = {"eta": 0.5} | options if name == "ddim" else options
    sampler = make_sampler(name, process_of(name), 4, **options)
    return jax.jit(lambda keys: sample(sampler, network, keys, SHAPE))(keys)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    eight = draw(name, image_keys(8))
    assert np.isfinite(eight).all()
    assert np.unique(np.asarray(eight)[:, 0, 0, 0]).size == 8
    for keys, images in (
        (image_keys(1), eight[:1]),
        (image_keys(3), eight[:3]),
        (image_keys(8)[::-1], eight[::-1]),
    ):
        np.testing.assert_allclose(draw(name, keys), images, rtol=1e-5, atol=1e-5)


DEVICES = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from dydilit_jax.diffusion.samplers import SAMPLERS
from tests.diffusion.test_samplers import draw, image_keys

assert jax.device_count() == 8, jax.devices()
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
for name in SAMPLERS:
    keys = image_keys(8)
    split = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
    images = draw(name, split)
    assert len({shard.device for shard in images.addressable_shards}) == 8, name
    assert images.addressable_shards[0].data.shape[0] == 1, name
    alone = draw(name, jax.device_put(keys, jax.devices()[0]))
    np.testing.assert_allclose(images, alone, rtol=1e-5, atol=1e-5)
    print("same", name)
"""


def test_an_image_does_not_depend_on_the_number_of_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    run = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [word for name in SAMPLERS for word in ("same", name)]


def test_start_and_noise_come_from_the_key_alone():
    """fold_in(key, 0) is the start, fold_in(key, k) the k-th step's noise."""
    sampler = make_sampler("ddpm", GaussianProcess(), 3)
    key = jax.random.key(7)
    noises = [jax.random.normal(jax.random.fold_in(key, index), (1, *SHAPE)) for index in range(4)]
    expected = integrate(sampler, network, noises[0], lambda step: jnp.stack(noises)[step + 1])
    actual = sample(sampler, network, key[None], SHAPE)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_trajectory():
    sampler = make_sampler("euler", RectifiedFlow(), 4)
    keys = image_keys(2)
    trajectory = sample(sampler, network, keys, SHAPE, return_trajectory=True)
    assert trajectory.shape == (5, 2, *SHAPE)
    np.testing.assert_array_equal(trajectory[-1], sample(sampler, network, keys, SHAPE))
    step = trajectory[0] - 0.25 * network(trajectory[0], jnp.full(2, 1000.0))[..., :3]
    np.testing.assert_allclose(trajectory[1], step, rtol=1e-5, atol=1e-5)


def test_one_compilation_serves_a_shape():
    traces = []

    def counted(x, time):
        traces.append(x.shape)
        return network(x, time)

    sampler = make_sampler("dpm_solver_pp", GaussianProcess(), 20)
    draw = jax.jit(lambda keys: sample(sampler, counted, keys, SHAPE))
    draw(image_keys(2))
    first = len(traces)
    draw(image_keys(4)[2:])
    assert len(traces) == first <= 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step(name):
    sampler = make_sampler(name, process_of(name), 1)
    images = sample(sampler, lambda x, time: 0.1 * network(x, time), image_keys(1), SHAPE)
    assert np.isfinite(images).all()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("threshold", [{"clip_denoised": True}, {"dynamic_threshold": 90.0}])
def test_thresholds_keep_x_0_in_range(name, threshold):
    if name == "euler_maruyama":
        threshold = threshold | {"last_step": "euler"}
    assert np.abs(draw(name, image_keys(2))).max() > 1.1
    # Heun's last average is not an estimate of x_0 that a threshold bounds.
    bound = 1.5 if name == "heun" else 1.0 + 1e-5
    assert np.abs(draw(name, image_keys(2), **threshold)).max() <= bound


def test_dynamic_threshold_is_imagens():
    sampler = make_sampler("euler", RectifiedFlow(), 1, dynamic_threshold=75.0)
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
        sample(
            make_sampler("ddpm", without, 3, variance=variance),
            lambda x, time: 0.5 * x,
            image_keys(1),
            SHAPE,
        )
        for variance in ("fixed_large", None)
    )
    np.testing.assert_array_equal(large, default)


def test_malformed_calls():
    sampler = make_sampler("euler", RectifiedFlow(), 2)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        sample(sampler, network, jax.random.split(jax.random.PRNGKey(0), 2), SHAPE)
    with pytest.raises(ValueError, match="one image"):
        sample(sampler, network, image_keys(2), (2, *SHAPE))
    with pytest.raises(ValueError, match="one image"):
        sample(sampler, network, jax.random.key(0), SHAPE)
