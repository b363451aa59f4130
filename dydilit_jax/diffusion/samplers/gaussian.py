"""Samplers of the Gaussian process, from its last step to x_0.

With x_t = alpha_t x_0 + sigma_t n, alpha_t = sqrt(A_t), sigma_t = sqrt(1 - A_t), s the step that
follows t on the way to data (alpha 1 and sigma 0 behind the last), x_0' and n' the estimates at t:

  (1)  DDPM   x_s ~ p(x_s | x_t), `GaussianProcess.reverse_step`
  (2)  DDIM   x_s = alpha_s x_0' + sqrt(sigma_s^2 - k^2) n' + k e,  e ~ N(0, I)
              k = eta sqrt((1 - A_s) / (1 - A_t)) sqrt(1 - A_t / A_s)
  (3)  DPM-Solver++(2M)   x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - exp(-h)) D,  h = l_s - l_t,
              l = log(alpha / sigma),  D = x_0' + (x_0' - x_0'_before) h / (2 h_before)
              and D = x_0' at first and last: with sigma_s = 0, x_s = x_0'

Sources: (1) Ho et al. 2006.11239, variances of Nichol & Dhariwal 2102.09672; (2) Song et al.
2010.02502, equations 12 and 16; (3) Lu et al. 2211.01095, algorithm 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dydilit_jax.diffusion.gaussian import (
    VARIANCES,
    GaussianProcess,
    noise_from_x_0,
    x_0_from_prediction,
)
from dydilit_jax.diffusion.process import Network
from dydilit_jax.diffusion.samplers.api import Noise, Row, State, Thresholding
from dydilit_jax.errors import UserError, unknown_name

TIMESTEP_SPACINGS = ("linspace", "trailing", "log_snr")


@dataclass(frozen=True, kw_only=True)
class GaussianSampler(Thresholding):
    """What the samplers of a Gaussian process share.

    Attributes:
      process: the process the network was trained on. Of a respaced one, the full chain is used.
      steps: number of steps, each one evaluation of the network; at most the chain's.

    Raises:
      UserError: for steps < 1 or above the chain's, and as `Thresholding`.
    """

    process_type: ClassVar[type] = GaussianProcess

    process: GaussianProcess
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= self.process.train_steps:
            raise UserError(
                f"steps must be 1 to {self.process.train_steps}, the schedule's length, "
                f"not {self.steps}."
            )

    def start(self, x: jax.Array) -> State:
        """Pure noise stands for x_T."""
        return State(x)

    def estimate(self, network: Network, x: jax.Array, row: Row) -> jax.Array:
        """The network's x_0 (B, H, W, C) at x, brought into range; row: time, alpha, sigma."""
        output = network(x, jnp.broadcast_to(row["time"], x.shape[:1])).astype(x.dtype)
        prediction = output[..., : x.shape[-1]]
        kind = self.process.prediction
        return self.restrict(x_0_from_prediction(kind, prediction, x, row["alpha"], row["sigma"]))


@dataclass(frozen=True, kw_only=True)
class RespacedSampler(GaussianSampler):
    """A sampler that walks the chain of some of the process's steps.

    Attributes:
      spacing: which, as `schedules.space_timesteps`: empty for `steps` even ones, from the first to
        the last step of the full chain (DiT's choice); `ddimN` for a whole stride.

    Raises:
      UserError: for a spacing that keeps another number than `steps`, and as `GaussianSampler`.
    """

    spacing: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain.steps != self.steps:
            raise UserError(
                f"spacing {self.spacing!r} keeps {self.chain.steps} steps, but steps is "
                f"{self.steps}: make them agree, or leave spacing empty."
            )

    @cached_property
    def chain(self) -> GaussianProcess:
        """The process, respaced."""
        return self.process.respaced(self.spacing or str(self.steps))


@dataclass(frozen=True, kw_only=True)
class DDPM(RespacedSampler):
    """Equation (1): the ancestral sampler, DiT's with 250 steps.

    Attributes:
      variance: `learned`, `fixed_small` (the posterior's) or `fixed_large` (beta). None: as
        the published DiT, the learned one if there is one, else `fixed_large`.

    Raises:
      UserError: for an unknown variance, a learned one of a process that has none, and as
        `RespacedSampler`.
    """

    variance: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variance is not None and self.variance not in VARIANCES:
            raise unknown_name("variance", self.variance, VARIANCES)
        if self.variance == "learned" and not self.process.learned_variance:
            raise UserError(
                "variance 'learned' needs a process with learned_variance: use 'fixed_small' or "
                "'fixed_large'."
            )

    def tables(self) -> dict[str, np.ndarray]:
        """Steps t of the chain, (steps,) int."""
        return {"t": np.arange(self.steps)[::-1]}

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step of the chain; the last adds no noise."""
        default = "learned" if self.process.learned_variance else "fixed_large"
        t = jnp.broadcast_to(row["t"], state.x.shape[:1])
        reverse = self.chain.reverse_step(
            self.chain.output(network, state.x, t),
            state.x,
            t,
            variance=self.variance or default,
            restrict=self.restrict,
        )
        added = jnp.exp(0.5 * reverse.log_variance) * noise()
        return State(reverse.mean + jnp.where(row["t"] > 0, added, 0.0))


@dataclass(frozen=True, kw_only=True)
class DDIM(RespacedSampler):
    """Equation (2): deterministic and first order at eta 0, as noisy as DDPM at eta 1.

    Attributes:
      eta: share of the noise, in [0, 1].

    Raises:
      UserError: for eta outside [0, 1], and as `RespacedSampler`.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(f"eta must be in [0, 1], not {self.eta}.")

    def tables(self) -> dict[str, np.ndarray]:
        """The network's time, alpha and sigma here and at the next step, and k; each (steps,)."""
        now, after = self.chain.alphas_cumprod, self.chain.alphas_cumprod_previous
        noise_scale = self.eta * np.sqrt((1.0 - after) / (1.0 - now) * (1.0 - now / after))
        columns = {
            "time": self.chain.timesteps.astype(np.float64),
            "alpha": np.sqrt(now),
            "sigma": np.sqrt(1.0 - now),
            "next_alpha": np.sqrt(after),
            "next_direction": np.sqrt(np.maximum(1.0 - after - noise_scale**2, 0.0)),
            "noise_scale": noise_scale,
        }
        return {name: column[::-1] for name, column in columns.items()}

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step of the chain."""
        x_0 = self.estimate(network, state.x, row)
        direction = noise_from_x_0(x_0, state.x, row["alpha"], row["sigma"])
        x = row["next_alpha"] * x_0 + row["next_direction"] * direction
        return State(x + row["noise_scale"] * noise() if self.eta else x)


@dataclass(frozen=True, kw_only=True)
class DPMSolverPP(GaussianSampler):
    """Equation (3): second order, one evaluation a step.

    Attributes:
      timestep_spacing: where the steps lie.
        `linspace`: evenly on [0, T - 1], rounded, without the last, 0.
        `trailing`: every T / steps back from T - 1, rounded.
        `log_snr`: evenly in log(alpha / sigma) from T - 1 to 0, both ends included (for one step:
        T - 1), where the network is fed the fraction of a timestep at which the schedule's
        log-SNR, interpolated linearly, has that value.

    Raises:
      UserError: for an unknown spacing, one that visits a timestep twice, and as `GaussianSampler`.
    """

    timestep_spacing: str = "linspace"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timestep_spacing not in TIMESTEP_SPACINGS:
            raise unknown_name("timestep spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if np.unique(self.log_snr_nodes()).size < self.steps:
            raise UserError(
                f"timestep_spacing {self.timestep_spacing!r} visits a timestep twice in "
                f"{self.steps} steps: take fewer, or 'trailing'."
            )

    @cached_property
    def log_snr(self) -> np.ndarray:
        """l = log(alpha / sigma) of the full chain, (train_steps,), decreasing."""
        alphas_cumprod = self.process.respaced("").alphas_cumprod
        return 0.5 * (np.log(alphas_cumprod) - np.log1p(-alphas_cumprod))

    def log_snr_nodes(self) -> np.ndarray:
        """l where the network is evaluated, (steps,), increasing."""
        last = self.process.train_steps - 1
        if self.timestep_spacing == "log_snr":
            return np.linspace(self.log_snr[last], self.log_snr[0], self.steps)
        if self.timestep_spacing == "linspace":
            return self.log_snr[np.linspace(0, last, self.steps + 1).round().astype(int)[:0:-1]]
        stride = self.process.train_steps / self.steps
        return self.log_snr[(last + 1 - stride * np.arange(self.steps)).round().astype(int) - 1]

    def tables(self) -> dict[str, np.ndarray]:
        """The network's time, alpha and sigma, and the coefficients of (3); each (steps,)."""
        now = self.log_snr_nodes()
        after = np.append(now[1:], np.inf)
        step_size = after - now
        extrapolation = np.zeros_like(now)
        extrapolation[1:-1] = 0.5 * step_size[1:-1] / step_size[:-2]
        sigma, next_sigma = _sigma(now), _sigma(after)
        return {
            "time": np.interp(-now, -self.log_snr, np.arange(self.process.train_steps)),
            "alpha": _sigma(-now),
            "sigma": sigma,
            "keep": next_sigma / sigma,
            "add": -_sigma(-after) * np.expm1(-step_size),
            "extrapolation": extrapolation,
        }

    def start(self, x: jax.Array) -> State:
        """The memory is the last step's x_0, of which the first step makes no use."""
        return State(x, jnp.zeros_like(x))

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step."""
        x_0 = self.estimate(network, state.x, row)
        extrapolated = x_0 + row["extrapolation"] * (x_0 - state.memory)
        return State(row["keep"] * state.x + row["add"] * extrapolated, x_0)


def _sigma(log_snr: np.ndarray) -> np.ndarray:
    """Sigma of the variance-preserving process at l; alpha is the sigma at -l."""
    return np.sqrt(1.0 / (1.0 + np.exp(2.0 * log_snr)))
