"""Gaussian data, of which the exact network, and the exact end of the ODE, are known.

Channel c of x_0 is N(MEAN_c, STD_c^2). At x = alpha x_0 + sigma n:

  E[x_0 | x] = MEAN + alpha STD^2 / (alpha^2 STD^2 + sigma^2) (x - alpha MEAN)

and the ODE carries (x - alpha MEAN) / sqrt(alpha^2 STD^2 + sigma^2) along unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.process import Network, like
from dydilit_jax.diffusion.samplers import Sampler, integrate
from tests.diffusion.compiling import quick_jit

MEAN = np.array([0.5, -0.3, 0.1])
STD = np.array([0.2, 0.5, 1.3])


def clean(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x_0 | x], with alpha and sigma ready to multiply x."""
    shrink = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return jnp.asarray(MEAN + shrink * (x - alpha * MEAN), x.dtype)


def flow_network(process: RectifiedFlow) -> Network:
    """The exact velocity."""

    def network(x: jax.Array, time: jax.Array) -> jax.Array:
        t = like(time / process.time_scale, x)
        # E[n - x_0 | x], written so that t = 0 divides by nothing.
        noise = t / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN)
        return (noise - clean(x, 1 - t, t)).astype(x.dtype)

    return network


def gaussian_network(process: GaussianProcess, variance: float = 0.0) -> Network:
    """The exact prediction of the process's kind, and a constant as its variance channels.

    At fractions of a timestep the log-SNR is interpolated, as DPM-Solver++ does.
    """
    alphas_cumprod = process.respaced("").alphas_cumprod
    log_snr = np.log(alphas_cumprod / (1 - alphas_cumprod))

    def network(x: jax.Array, time: jax.Array) -> jax.Array:
        value = jnp.interp(time, jnp.arange(len(log_snr), dtype=x.dtype), jnp.asarray(log_snr))
        alpha = like(jnp.sqrt(jax.nn.sigmoid(value)), x)
        sigma = like(jnp.sqrt(jax.nn.sigmoid(-value)), x)
        x_0 = clean(x, alpha, sigma)
        noise = (x - alpha * x_0) / sigma
        kinds = {"noise": noise, "x_0": x_0, "velocity": alpha * noise - sigma * x_0}
        outputs = [kinds[process.prediction]]
        if process.learned_variance:
            outputs.append(jnp.full_like(x, variance))
        return jnp.concatenate(outputs, axis=-1).astype(x.dtype)

    return network


def flow_end(noise: np.ndarray) -> np.ndarray:
    """x_0 of the flow's ODE that starts at `noise` (..., C)."""
    return MEAN + STD * noise


def gaussian_end(
    process: GaussianProcess, noise: np.ndarray, step: int | None = None
) -> np.ndarray:
    """x_0 of the ODE that starts at `noise` at the last step of the chain.

    With `step`, the ODE is left there, and E[x_0 | x] taken.
    """
    alphas_cumprod = process.respaced("").alphas_cumprod

    def spread(a: float) -> np.ndarray:
        return np.sqrt(a * STD**2 + 1.0 - a)

    first = alphas_cumprod[-1]
    unit = (noise - np.sqrt(first) * MEAN) / spread(first)
    if step is None:
        return MEAN + STD * unit
    a = alphas_cumprod[step]
    return MEAN + np.sqrt(a) * STD**2 / spread(a) * unit


def affine_map(
    sampler: Sampler, network: Network, steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a sampler does to Gaussian data, exactly, in the dtype JAX now defaults to.

    On this data the network, and so every sampler, is affine in the noise it starts from and in the
    noise it adds: x_0 = offset + gain x_T + sum_k share_k e_k. Starting at 0, at 1, and adding 1 at
    one step only tells every coefficient.

    Returns:
      offset (C,), gain (C,), shares (steps, C).
    """
    start = jnp.zeros(steps + 2).at[1].set(1.0)[:, None, None, None] * jnp.ones((1, 1, 3))

    def noise_of_step(step: jax.Array) -> jax.Array:
        return jnp.zeros_like(start).at[step + 2].set(1.0)

    ends = np.asarray(
        quick_jit(lambda x: integrate(sampler, network, x, noise_of_step))(start)[:, 0, 0]
    )
    return ends[0], ends[1] - ends[0], ends[2:] - ends[0]


def moments(sampler: Sampler, network: Network, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, (C,) each, of what a sampler draws; exact, as `affine_map`."""
    offset, gain, shares = affine_map(sampler, network, steps)
    return offset, np.sqrt(gain**2 + np.sum(shares**2, axis=0))
