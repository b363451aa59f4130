"""Rectified flow: straight paths between data and noise.

Time t runs from 0 (data) to 1 (noise), n ~ N(0, I):

  (1)  x_t = (1 - t) x_0 + t n
  (2)  v   = dx_t / dt = n - x_0                      the velocity, what the network predicts
  (3)  x_0 = x_t - t v
  (4)  n   = x_t + (1 - t) v
  (5)  score = grad log p_t(x_t) = -n / t             with n the expectation of noise given x_t
  (6)  t  <- s t / (1 + (s - 1) t)                    the shift of time for resolution

Sources: (1), (2) Liu et al. 2209.03003; (5) Ma et al., SiT, 2401.08740, section 2; logit-normal
times and (6) Esser et al., SD3, 2403.03206, sections 3.1 and 5.3.2. SiT counts time the other way
round (its t is 1 - t here) and so predicts -v.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from dydilit_jax.errors import UserError, unknown_name

TIME_DISTRIBUTIONS = ("logit_normal", "uniform")


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """The rectified-flow process.

    Attributes:
      time_distribution: of t in training. `logit_normal`: t = sigmoid(logit_mean + logit_std z),
        z ~ N(0, 1); `uniform` on [0, 1).
      logit_mean, logit_std: of the logit-normal distribution. A larger mean is noisier.
      time_scale: the network is fed time_scale * t.
      shift: s of (6), in training and sampling alike; 1 for none. SD3: the square root of the ratio
        of token counts to the resolution the times were chosen at.

    Raises:
      UserError: for an unknown distribution, or a field that must be positive and is not.
    """

    time_distribution: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    time_scale: float = 1000.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.time_distribution not in TIME_DISTRIBUTIONS:
            raise unknown_name("time distribution", self.time_distribution, TIME_DISTRIBUTIONS)
        for name in ("logit_std", "time_scale", "shift"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}.")

    @property
    def time_max(self) -> float:
        """The `time` fed at pure noise."""
        return self.time_scale

    def output_channels(self, channels: int) -> int:
        """The velocity's channels: as many as the data's."""
        return channels

    def shift_time(self, t: jax.Array) -> jax.Array:
        """Shifted time, equation (6); t of any shape in [0, 1]."""
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def time_grid(self, steps: int, start: float = 1.0, end: float = 0.0) -> np.ndarray:
        """Times a sampler visits: (steps + 1,) float64, even before the shift, start to end."""
        t = np.linspace(start, end, steps + 1)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def draw_time(self, keys: jax.Array) -> jax.Array:
        """Training times t (B,) float32, each from its own key of (B,) keys."""
        if self.time_distribution == "uniform":
            t = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
        else:
            z = normal_each(keys, (), jnp.float32)
            t = jax.nn.sigmoid(self.logit_mean + self.logit_std * z)
        return self.shift_time(t)

    def interpolate(self, x_0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """x_t of equation (1); t (B,) or scalar."""
        t = like(t, x_0)
        return (1.0 - t) * x_0 + t * noise

    def velocity(self, network: Network, x_t: jax.Array, t: jax.Array) -> jax.Array:
        """The network's velocity (B, H, W, C) at x_t, in x_t's dtype; t (B,) or scalar.

        Channels beyond x_t's, such as the unused variance of published SiT weights, are ignored.

        Raises:
          ValueError: for an output of fewer channels than x_t's, at trace time.
        """
        time = jnp.broadcast_to(self.time_scale * t, x_t.shape[:1]).astype(x_t.dtype)
        output, channels = network(x_t, time), x_t.shape[-1]
        if output.shape[-1] < channels:
            raise ValueError(f"the network puts out {output.shape[-1]} channels, not {channels}.")
        return output[..., :channels].astype(x_t.dtype)

    def loss(
        self, network: Network, x_0: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean squared error of the velocity at random times; see `Process.loss`.

        The only term is `mse`, the loss itself.
        """
        x_0 = at_least_float32(x_0)
        time_keys, noise_keys = split_each(example_keys(key, x_0.shape[0]), 2)
        t = self.draw_time(time_keys)
        noise = normal_each(noise_keys, x_0.shape[1:], x_0.dtype)
        predicted = self.velocity(network, self.interpolate(x_0, noise, t), t)
        mse = mean_each(jnp.square(predicted - (noise - x_0))).astype(jnp.float32)
        return mse, {"mse": mse}


# Conversions at x_t and t ((B,) or scalar) between the four things a network may be said to know.


def x_0_from_velocity(velocity: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equation (3)."""
    return x_t - like(t, x_t) * velocity


def noise_from_velocity(velocity: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equation (4)."""
    return x_t + (1.0 - like(t, x_t)) * velocity


def score_from_velocity(velocity: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equations (4) and (5); t > 0."""
    return -noise_from_velocity(velocity, x_t, t) / like(t, x_t)


def velocity_from_x_0(x_0: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equation (3) solved for v; t > 0."""
    return (x_t - x_0) / like(t, x_t)


def velocity_from_noise(noise: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equation (4) solved for v; t < 1."""
    return (noise - x_t) / (1.0 - like(t, x_t))


def velocity_from_score(score: jax.Array, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Equations (5) and (4) solved for v; t < 1."""
    return velocity_from_noise(-like(t, x_t) * score, x_t, t)
