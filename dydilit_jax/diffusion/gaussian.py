"""The discrete Gaussian diffusion of DDPM, ADM and DiT.

With betas b_t, a_t = 1 - b_t, A_t = a_0 ... a_t, A_{-1} = 1 and noise n ~ N(0, I):

  (1)  x_t = sqrt(A_t) x_0 + sqrt(1 - A_t) n                      q(x_t | x_0)
  (2)  q(x_{t-1} | x_t, x_0) = N(c_0 x_0 + c_t x_t, B_t)
       c_0 = sqrt(A_{t-1}) b_t / (1 - A_t)      c_t = sqrt(a_t) (1 - A_{t-1}) / (1 - A_t)
       B_t = b_t (1 - A_{t-1}) / (1 - A_t)
  (3)  p(x_{t-1} | x_t) = N(c_0 x_0' + c_t x_t, V_t)              x_0' from the prediction
       V_t = exp(f log b_t + (1 - f) log B_t),  f = (o + 1) / 2   o the output's variance channels
  (4)  v = sqrt(A_t) n - sqrt(1 - A_t) x_0                        the velocity prediction
  (5)  L = |prediction - target|^2 + L_vb
       L_vb = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and -log p(x_0 | x_1) at t = 0, in bits
       a dimension, with the prediction in p held fixed
  (6)  Min-SNR: weights min(S, g) / S, min(S, g), min(S, g) / (S + 1) on the squared error of noise,
       x_0 and velocity, S = A_t / (1 - A_t)

Sources: (1), (2) Ho et al. 2006.11239; (3), (5) Nichol & Dhariwal 2102.09672, equations 15 and 16,
with the published DiT's weights (L_vb not scaled); (4) Salimans & Ho 2202.00512; (6) Hang et al.
2303.09556.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dydilit_jax.diffusion.process import (
    Network,
    at_least_float32,
    example_keys,
    like,
    mean_each,
    normal_each,
    split_each,
)
from dydilit_jax.diffusion.schedules import make_betas, space_timesteps
from dydilit_jax.errors import UserError, unknown_name

PREDICTIONS = ("noise", "x_0", "velocity")
VARIANCES = ("learned", "fixed_small", "fixed_large")
SMALLEST_VARIANCE = 1e-20  # in place of B_0 = 0, whose logarithm is wanted, in a chain of one step


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t), each (B, H, W, C)."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array
    x_0: jax.Array


@dataclass(frozen=True, kw_only=True)
class GaussianProcess:
    """The Gaussian process, or a chain of some of its steps.

    Attributes:
      schedule: `linear` or `squared_cosine` betas.
      train_steps: length of the full chain.
      prediction: what the network predicts: `noise`, `x_0` or `velocity`.
      learned_variance: the network puts out 2C channels, the variance's second.
      min_snr_gamma: g of (6), 0 for off.
      spacing: the steps kept, as `schedules.space_timesteps`; empty for all. Steps t below count
        the kept ones; the network is fed the step of the full chain.

    Raises:
      UserError: for an unknown name, or a value out of range.
    """

    schedule: str = "linear"
    train_steps: int = 1000
    prediction: str = "noise"
    learned_variance: bool = True
    min_snr_gamma: float = 0.0
    spacing: str = ""

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise unknown_name("prediction", self.prediction, PREDICTIONS)
        if self.train_steps < 1:
            raise UserError(f"train_steps must be at least 1, not {self.train_steps}.")
        if self.min_snr_gamma < 0:
            raise UserError(f"min_snr_gamma must be at least 0, not {self.min_snr_gamma}.")
        make_betas(self.schedule, self.train_steps)
        space_timesteps(self.train_steps, self.spacing)

    def respaced(self, spacing: str) -> GaussianProcess:
        """The chain of the steps that `spacing` keeps of the full one."""
        return dataclasses.replace(self, spacing=spacing)

    # The chain: float64 tables, (steps,) each.

    @cached_property
    def timesteps(self) -> np.ndarray:
        """Steps of the full chain, int64: what the network is fed."""
        return space_timesteps(self.train_steps, self.spacing)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """A_t: 1 - A_t is the noise's share of the variance."""
        return np.cumprod(1.0 - make_betas(self.schedule, self.train_steps))[self.timesteps]

    @cached_property
    def alphas_cumprod_previous(self) -> np.ndarray:
        """A_{t-1}, 1 at the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def betas(self) -> np.ndarray:
        """b_t, of the chain rather than of the full one."""
        return 1.0 - self.alphas_cumprod / self.alphas_cumprod_previous

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """B_t of (2), 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_previous) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """log B_t, the first replaced by the second as 0 has none."""
        later = self.posterior_variance[1:]
        return np.log(np.append(later[:1] if later.size else SMALLEST_VARIANCE, later))

    @property
    def steps(self) -> int:
        """Length of the chain."""
        return len(self.timesteps)

    @property
    def time_max(self) -> float:
        """The last step of the full chain, the largest `time` fed."""
        return float(max(self.train_steps - 1, 1))

    def output_channels(self, channels: int) -> int:
        """The prediction's channels and, if it is learned, as many of the variance."""
        return 2 * channels if self.learned_variance else channels

    # The forward process.

    def diffuse(self, x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t of (1); t (B,) int."""
        alpha, sigma = self._alpha_sigma(x_0, t)
        return alpha * x_0 + sigma * noise

    def posterior_mean(self, x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """Mean of q(x_{t-1} | x_t, x_0), (2); t (B,) int."""
        share = self.betas / (1.0 - self.alphas_cumprod)
        c_0 = np.sqrt(self.alphas_cumprod_previous) * share
        c_t = np.sqrt(1.0 - self.betas) * self.posterior_variance / self.betas
        return _at(c_0, x_t, t) * x_0 + _at(c_t, x_t, t) * x_t

    # The reverse process.

    def output(self, network: Network, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's output at x_t (B, H, W, C) and t (B,) int, in x_t's dtype.

        Raises:
          ValueError: for an output of other than `output_channels` channels, at trace time.
        """
        output = network(x_t, jnp.asarray(self.timesteps, x_t.dtype)[t]).astype(x_t.dtype)
        expected = self.output_channels(x_t.shape[-1])
        if output.shape[-1] != expected:
            raise ValueError(f"the network puts out {output.shape[-1]} channels, not {expected}.")
        return output

    def reverse_step(
        self,
        output: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        *,
        variance: str = "learned",
        restrict: Callable[[jax.Array], jax.Array] = lambda x_0: x_0,
    ) -> ReverseStep:
        """p(x_{t-1} | x_t) of (3).

        Args:
          output: (B, H, W, C), or 2C with the variance, of the network at x_t and t.
          x_t: (B, H, W, C).
          t: (B,) int.
          variance: `learned`; or, whatever the network says, `fixed_small` B_t or `fixed_large` b_t
            (with B_1 for either at t = 0, where no noise is added).
          restrict: what is done to the estimate of x_0 before the mean is made of it.
        """
        channels = x_t.shape[-1]
        alpha, sigma = self._alpha_sigma(x_t, t)
        x_0 = restrict(
            x_0_from_prediction(self.prediction, output[..., :channels], x_t, alpha, sigma)
        )
        small, large = self.posterior_log_variance, np.log(self.betas)
        if variance == "learned":
            fraction = (output[..., channels:] + 1.0) / 2.0
            log_variance = fraction * _at(large, x_t, t) + (1.0 - fraction) * _at(small, x_t, t)
        else:
            fixed = small if variance == "fixed_small" else np.append(small[0], large[1:])
            log_variance = jnp.broadcast_to(_at(fixed, x_t, t), x_t.shape)
        mean = self.posterior_mean(x_0, x_t, t)
        return ReverseStep(mean, jnp.exp(log_variance), log_variance, x_0)

    # Training.

    def loss(
        self, network: Network, x_0: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss (5) at a random step of each example; see `Process.loss`.

        Terms: `mse`, without the Min-SNR weight, and `vb` if the variance is learned.
        """
        x_0 = at_least_float32(x_0)
        time_keys, noise_keys = split_each(example_keys(key, x_0.shape[0]), 2)
        t = jax.vmap(lambda each: jax.random.randint(each, (), 0, self.steps))(time_keys)
        noise = normal_each(noise_keys, x_0.shape[1:], x_0.dtype)
        return self.loss_at(network, x_0, noise, t)

    def loss_at(
        self, network: Network, x_0: jax.Array, noise: jax.Array, t: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss (5) for given noise (B, H, W, C) and steps t (B,) int; returns as `loss`."""
        x_t = self.diffuse(x_0, noise, t)
        output = self.output(network, x_t, t)
        prediction, *variance = jnp.split(output, 2 if self.learned_variance else 1, axis=-1)
        alpha, sigma = self._alpha_sigma(x_0, t)
        target = {"noise": noise, "x_0": x_0, "velocity": alpha * noise - sigma * x_0}
        mse = mean_each(jnp.square(prediction - target[self.prediction])).astype(jnp.float32)
        loss = mse * _at(self._loss_weight(), mse, t)
        terms = {"mse": mse}
        if self.learned_variance:
            fixed = jnp.concatenate([jax.lax.stop_gradient(prediction), *variance], axis=-1)
            terms["vb"] = self._variational_bound(fixed, x_0, x_t, t).astype(jnp.float32)
            loss += terms["vb"]
        return loss, terms

    def _variational_bound(
        self, output: jax.Array, x_0: jax.Array, x_t: jax.Array, t: jax.Array
    ) -> jax.Array:
        """L_vb of (5), (B,), in bits a dimension."""
        p = self.reverse_step(output, x_t, t)
        q_log_variance = _at(self.posterior_log_variance, x_t, t)
        divergence = normal_kl(
            self.posterior_mean(x_0, x_t, t), q_log_variance, p.mean, p.log_variance
        )
        surprise = -discretized_log_likelihood(x_0, p.mean, 0.5 * p.log_variance)
        nats = jnp.where(t == 0, mean_each(surprise), mean_each(divergence))
        return nats / np.log(2.0)

    def _loss_weight(self) -> np.ndarray:
        """Weights (6), (steps,)."""
        if not self.min_snr_gamma:
            return np.ones(self.steps)
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        divisor = {"noise": snr, "x_0": np.ones_like(snr), "velocity": snr + 1.0}
        return np.minimum(snr, self.min_snr_gamma) / divisor[self.prediction]

    def _alpha_sigma(self, x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(A_t) and sqrt(1 - A_t), ready to multiply x."""
        alpha, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1.0 - self.alphas_cumprod)
        return _at(alpha, x, t), _at(sigma, x, t)


# Conversions at x_t = alpha x_0 + sigma n, (B, H, W, C), with alpha and sigma ready to multiply it.


def x_0_from_prediction(
    kind: str, prediction: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array
) -> jax.Array:
    """x_0 from a prediction of a kind in `PREDICTIONS`: (1) solved for x_0, or (4) and (1)."""
    if kind == "noise":
        return (x_t - sigma * prediction) / alpha
    if kind == "velocity":
        return alpha * x_t - sigma * prediction
    return prediction


def noise_from_x_0(x_0: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """n of (1); sigma > 0."""
    return (x_t - alpha * x_0) / sigma


# Likelihoods, elementwise and in nats.


def normal_kl(
    mean_q: jax.Array, log_variance_q: jax.Array, mean_p: jax.Array, log_variance_p: jax.Array
) -> jax.Array:
    """KL(q || p) of two normal distributions; shapes broadcast."""
    ratio = jnp.exp(log_variance_q - log_variance_p)
    distance = jnp.square(mean_q - mean_p) * jnp.exp(-log_variance_p)
    return 0.5 * (ratio + distance - 1.0 + log_variance_p - log_variance_q)


def discretized_log_likelihood(x: jax.Array, mean: jax.Array, log_std: jax.Array) -> jax.Array:
    """Log-probability of the bin of x, one of 256 on [-1, 1], under N(mean, exp(log_std)^2).

    The outermost bins reach to infinity (DDPM, 2006.11239, equation 13). Latents, which are no
    8-bit values, are treated as if they were, as the published DiT does. The upper tail is computed
    as its mirror image: near 1, float32 would round probabilities below 6e-8 away.
    """
    half_bin = 1.0 / 255.0
    upper = (x - mean + half_bin) * jnp.exp(-log_std)
    lower = (x - mean - half_bin) * jnp.exp(-log_std)
    mirror = x > mean
    inner = _normal_cdf(jnp.where(mirror, -lower, upper)) - _normal_cdf(
        jnp.where(mirror, -upper, lower)
    )
    lowest, highest = _normal_cdf(upper), _normal_cdf(-lower)
    probability = jnp.where(x < -0.999, lowest, jnp.where(x > 0.999, highest, inner))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    """The tanh approximation of the published losses, as (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    return jax.nn.sigmoid(2.0 * np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3))


def _at(table: np.ndarray, x: jax.Array, t: jax.Array) -> jax.Array:
    """Entries t (B,) of a float64 table, in x's dtype and ready to multiply x (B, ...)."""
    return like(jnp.asarray(table, x.dtype)[t], x)
