"""Samplers of the rectified flow, from t = 1 (noise) to t = 0 (data).

  (1)  Euler            x_s = x_t - (t - s) v(x_t, t)
  (2)  Heun             x_s = x_t - (t - s) (v(x_t, t) + v(x'_s, s)) / 2,   x'_s from (1)
  (3)  Euler-Maruyama   x_s = x_t - (t - s) (v - w(t) score) + sqrt(2 w(t) (t - s)) e,  e ~ N(0, I)

(3) integrates an SDE with the marginals of the flow for any w(t) >= 0. Source: Ma et al., SiT,
2401.08740, section 2.2 and table 6 of its appendix, in the parametrisation of the published code,
whose w is half the paper's w_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from dydilit_jax.diffusion.flow import (
    RectifiedFlow,
    score_from_velocity,
    velocity_from_x_0,
    x_0_from_velocity,
)
from dydilit_jax.diffusion.process import Network
from dydilit_jax.diffusion.samplers.api import Noise, Row, State, Thresholding
from dydilit_jax.errors import UserError, unknown_name

LAST_STEPS = ("mean", "euler", "none")

DIFFUSIONS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "constant": lambda t, c: np.full_like(t, c),
    "SBDM": lambda t, c: c * t / (1.0 - t),
    "sigma": lambda t, c: c * t,
    "linear": lambda t, c: c * t,
    "decreasing": lambda t, c: 0.25 * (1.0 - c * np.cos(np.pi * t)) ** 2,
    "increasing-decreasing": lambda t, c: c * np.sin(np.pi * t) ** 2,
}
"""w(t, c) by SiT's names, in float64."""


@dataclass(frozen=True, kw_only=True)
class FlowSampler(Thresholding):
    """What the samplers of a rectified flow share.

    Attributes:
      process: the rectified flow the network was trained on.
      steps: number of steps; each evaluates the network once, but for Heun's.

    Raises:
      UserError: for steps < 1, and as `Thresholding`.
    """

    process_type: ClassVar[type] = RectifiedFlow

    process: RectifiedFlow
    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, not {self.steps}.")

    def tables(self) -> dict[str, np.ndarray]:
        """Times t and s of each step, both (steps,)."""
        t = self.process.time_grid(self.steps)
        return {"t": t[:-1], "s": t[1:]}

    def start(self, x: jax.Array) -> State:
        """Pure noise is the state at t = 1."""
        return State(x)

    def velocity(self, network: Network, x: jax.Array, t: jax.Array) -> jax.Array:
        """The network's velocity at x (B, H, W, C) and scalar t > 0, its x_0 brought into range."""
        velocity = self.process.velocity(network, x, t)
        if not self.thresholds:
            return velocity
        return velocity_from_x_0(self.restrict(x_0_from_velocity(velocity, x, t)), x, t)


@dataclass(frozen=True, kw_only=True)
class Euler(FlowSampler):
    """Equation (1): first order, one evaluation a step."""

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step from t to s."""
        velocity = self.velocity(network, state.x, row["t"])
        return State(state.x - (row["t"] - row["s"]) * velocity)


@dataclass(frozen=True, kw_only=True)
class Heun(FlowSampler):
    """Equation (2): second order, two evaluations a step, and one in the last.

    The last step is Euler's, as in EDM (Karras et al. 2206.00364, algorithm 1): networks are hardly
    trained at t = 0, and the order does not suffer.
    """

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step from t to s."""
        t, s = row["t"], row["s"]
        here = self.velocity(network, state.x, t)
        euler = state.x - (t - s) * here

        def corrected() -> jax.Array:
            return state.x - (t - s) * 0.5 * (here + self.velocity(network, euler, s))

        return State(jax.lax.cond(s > 0, corrected, lambda: euler))


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(FlowSampler):
    """Equation (3): the stochastic sampler of SiT, one evaluation a step.

    Attributes:
      diffusion: w(t), scaled by `diffusion_norm` = c. SiT's names, in the time used here:
        `constant` c; `SBDM` c t / (1 - t); `sigma` c t; `linear` c t (the same on straight paths);
        `decreasing` (1 - c cos(pi t))^2 / 4; `increasing-decreasing` c sin(pi t)^2.
      diffusion_norm: c.
      last_step: how the last `last_step_size` of time is crossed. `mean`: (3) without its noise,
        which needs a w(t) that is small there, and so not `constant`. `euler`: (1), which is
        Tweedie's estimate of x_0. `none`: no step apart, the others reach 0.
      last_step_size: in unshifted time; without meaning for `none`.
      start_epsilon: `SBDM` alone, whose w is infinite at t = 1, starts at 1 - start_epsilon (SiT's
        sample_eps). None: 1 / (steps + 1), about one step, which keeps w (t - s) near 1 or below:
        above 2, a step would amplify the noise.

    Raises:
      UserError: for an unknown name, sizes out of range, and as `FlowSampler`.
    """

    diffusion: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04
    start_epsilon: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.diffusion not in DIFFUSIONS:
            raise unknown_name("diffusion coefficient", self.diffusion, DIFFUSIONS)
        if self.last_step not in LAST_STEPS:
            raise unknown_name("last step", self.last_step, LAST_STEPS)
        if self.diffusion_norm < 0:
            raise UserError(f"diffusion_norm must be at least 0, not {self.diffusion_norm}.")
        if not 0.0 < self.last_step_size < 1.0:
            raise UserError(f"last_step_size must be within (0, 1), not {self.last_step_size}.")
        if self.start_epsilon is not None and not 0.0 < self.start_epsilon < 1.0:
            raise UserError(f"start_epsilon must be within (0, 1), not {self.start_epsilon}.")
        if not np.all(np.diff(self._times()) < 0):
            raise UserError(
                "start_epsilon and last_step_size leave no time between them: their sum must be "
                "below 1."
            )

    def tables(self) -> dict[str, np.ndarray]:
        """Times t and s, w(t), and the factor of the noise, each (steps,)."""
        t = self._times()
        t, s = t[:-1], t[1:]
        w = DIFFUSIONS[self.diffusion](t, self.diffusion_norm)
        noise_scale = np.sqrt(2.0 * w * (t - s))
        if self.last_step != "none":
            noise_scale[-1] = 0.0
        if self.last_step == "euler":
            w[-1] = 0.0
        return {"t": t, "s": s, "diffusion": w, "noise_scale": noise_scale}

    def _times(self) -> np.ndarray:
        start = 1.0
        if self.diffusion == "SBDM":
            start -= self.start_epsilon or 1.0 / (self.steps + 1)
        if self.last_step == "none":
            return self.process.time_grid(self.steps, start)
        until_last = self.process.time_grid(self.steps - 1, start, self.last_step_size)
        return np.append(until_last, 0.0)

    def step(self, network: Network, state: State, row: Row, noise: Noise) -> State:
        """One step from t to s."""
        velocity = self.velocity(network, state.x, row["t"])
        score = score_from_velocity(velocity, state.x, row["t"])
        drift = velocity - row["diffusion"] * score
        x = state.x - (row["t"] - row["s"]) * drift
        return State(x + row["noise_scale"] * noise())
