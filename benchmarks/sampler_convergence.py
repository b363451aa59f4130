"""Error against steps of every sampler, on data where the right answer is known.

    python -m benchmarks.sampler_convergence --output docs/sampler_convergence.png

The data are Gaussian and the network is exact (tests/diffusion/toy.py), so that what is left is the
sampler's own error. For a deterministic sampler it is the distance of an image from the exact
solution of the ODE that starts at the same noise (root mean square over images and channels), for a
stochastic one the distance between the standard deviations of its images and the data's (root mean
square over channels); both are computed without drawing images, in float64. Takes a minute on two
CPU cores.

Two floors are no errors of a solver. DPM-Solver++ ends with E[x_0 | x] at its last timestep, at
best the schedule's first (sigma 0.01). Euler-Maruyama's last step `mean` crosses 0.04 of time at
once, however many steps there are.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.gaussian import GaussianProcess
from dydilit_jax.diffusion.samplers import make_sampler
from tests.diffusion import toy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS = (5, 10, 20, 40, 80, 160, 320)


@dataclass(frozen=True)
class Curve:
    """A sampler, as it is drawn."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


GAUSSIAN = (
    Curve("DDPM, learned variance", "ddpm"),
    Curve("DDIM, eta 1", "ddim", {"eta": 1.0}),
    Curve("DDIM", "ddim"),
    Curve("DPM-Solver++(2M), linspace", "dpm_solver_pp"),
    Curve("DPM-Solver++(2M), trailing", "dpm_solver_pp", {"timestep_spacing": "trailing"}),
    Curve("DPM-Solver++(2M), log-SNR", "dpm_solver_pp", {"timestep_spacing": "log_snr"}),
)
FLOW = (
    Curve("Euler-Maruyama, sigma, mean", "euler_maruyama"),
    Curve("Euler-Maruyama, sigma, none", "euler_maruyama", {"last_step": "none"}),
    Curve("Euler", "euler"),
    Curve("Heun", "heun"),
)


def error_of(curve: Curve, process: RectifiedFlow | GaussianProcess, steps: int) -> float:
    """Error of a sampler, as the module says."""
    sampler = make_sampler(curve.name, process, steps, **curve.options)
    if isinstance(process, RectifiedFlow):
        network = toy.flow_network(process)
        exact_offset, exact_end = (toy.flow_end(np.full(3, start)) for start in (0.0, 1.0))
    else:
        network = toy.gaussian_network(process)
        exact_offset, exact_end = (
            toy.gaussian_end(process, np.full(3, start)) for start in (0.0, 1.0)
        )
    offset, gain, shares = toy.affine_map(sampler, network, steps)
    if np.abs(shares).max() > 1e-9:
        std = np.sqrt(gain**2 + np.sum(shares**2, axis=0))
        return float(np.sqrt(np.mean((std - toy.STD) ** 2)))
    off, unit = offset - exact_offset, gain - (exact_end - exact_offset)
    return float(np.sqrt(np.mean(off**2 + unit**2)))


def draw(axes: Any, title: str, errors: dict[str, list[float]]) -> None:
    """One process's curves, over network evaluations, with lines of slope 1 and 2."""
    for label, values in errors.items():
        steps = np.array(STEPS)
        axes.loglog(2 * steps - 1 if label == "Heun" else steps, values, "o-", ms=4, label=label)
    guide = np.array([20.0, 640.0])
    for order, height in ((1, 0.5), (2, 0.15)):
        axes.loglog(guide, height * (guide / guide[0]) ** -order, "k:", lw=1)
        axes.annotate(f"order {order}", (guide[0] * 1.1, height), fontsize=8)
    axes.set(title=title, xlabel="network evaluations", ylabel="error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/sampler_convergence.png"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)

    figure, both = plt.subplots(1, 2, figsize=(12, 5), sharex=True, sharey=True)
    print(f"{'sampler':30}" + "".join(f"{steps:>10}" for steps in STEPS) + "     order")
    for axes, title, process, samplers in (
        (both[0], "Gaussian process, 1000 linear steps", GaussianProcess(), GAUSSIAN),
        (both[1], "Rectified flow", RectifiedFlow(), FLOW),
    ):
        drawn = {}
        for curve in samplers:
            errors = [error_of(curve, process, steps) for steps in STEPS]
            order = np.log2(errors[-3] / errors[-2])
            print(f"{curve.label:30}" + "".join(f"{e:10.2e}" for e in errors) + f"{order:10.2f}")
            drawn[curve.label] = errors
        draw(axes, title, drawn)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=120)
    print(f"order: from {STEPS[-3]} to {STEPS[-2]} steps. Wrote {arguments.output}")


if __name__ == "__main__":
    main()
