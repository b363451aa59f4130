"""Every sampler, step by step, against diffusers' schedulers.

The numbers come from tests/fixtures/make_scheduler_fixtures.py, which says what a case holds.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.samplers import integrate, make_sampler
from tests.diffusion.compiling import quick_jit

FIXTURES = dict(np.load(Path(__file__).parent / "diffusers_schedulers.npz"))
STRIDE = {"spacing": "ddim10"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddpm_fixed_small": ("ddpm", {"learned_variance": False}, {"variance": "fixed_small"} | STRIDE),
    "ddpm_fixed_large": ("ddpm", {"learned_variance": False}, {"variance": "fixed_large"} | STRIDE),
    "ddpm_learned": ("ddpm", {}, STRIDE),
    "ddim": ("ddim", {}, STRIDE),
    "ddim_eta": ("ddim", {}, {"eta": 0.7} | STRIDE),
    "ddim_cosine_velocity": (
        "ddim",
        {"schedule": "squared_cosine", "prediction": "velocity"},
        STRIDE,
    ),
    "ddim_x_0": ("ddim", {"prediction": "x_0"}, STRIDE),
    "ddim_clip": ("ddim", {}, {"clip_denoised": True} | STRIDE),
    "ddim_dynamic": ("ddim", {}, {"dynamic_threshold": 90.0} | STRIDE),
    "dpm_linspace": ("dpm_solver_pp", {}, {}),
    "dpm_trailing_velocity": (
        "dpm_solver_pp",
        {"prediction": "velocity"},
        {"timestep_spacing": "trailing"},
    ),
    "dpm_cosine_x_0": (
        "dpm_solver_pp",
        {"schedule": "squared_cosine", "prediction": "x_0"},
        {},
    ),
    "flow_euler": ("euler", {}, {}),
    "flow_euler_shift": ("euler", {"shift": 3.0}, {}),
}


def test_every_case_is_compared():
    assert set(CASES) == {name.split("/")[0] for name in FIXTURES}


@pytest.mark.parametrize("case", CASES)
def test_trajectory(case):
    name, fields, options = CASES[case]
    trajectory, noises = FIXTURES[f"{case}/trajectory"], jnp.asarray(FIXTURES[f"{case}/noises"])
    process = RectifiedFlow(**fields) if name == "euler" else GaussianProcess(**fields)
    sampler = make_sampler(name, process, len(noises), **options)
    fed = []

    def network(x, time):
        jax.debug.callback(lambda value: fed.append(float(value)), time[0], ordered=True)
        prediction = 0.7 * x + 0.2 * jnp.sin(time)[:, None, None, None]
        output = jnp.concatenate([prediction, 0.4 * x], axis=-1)
        return output[..., : process.output_channels(x.shape[-1])]

    run = quick_jit(
        lambda x: integrate(sampler, network, x, lambda step: noises[step], return_trajectory=True)
    )
    actual = run(jnp.asarray(trajectory[0]))
    jax.effects_barrier()
    np.testing.assert_allclose(fed, FIXTURES[f"{case}/times"], rtol=1e-5, atol=1e-4)
    assert actual.shape == trajectory.shape
    for step, (ours, theirs) in enumerate(zip(actual, trajectory, strict=True)):
        difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert difference < 2e-5, f"step {step}: {difference}"
