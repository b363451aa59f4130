"""Samplers by name, and the loop that runs them.

`make_sampler(name, process, steps, **options)` builds one, `sample` draws images with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dydilit_jax.diffusion.process import Process
from dydilit_jax.diffusion.samplers.api import Sampler, State, integrate, sample
from dydilit_jax.diffusion.samplers.flow import Euler, EulerMaruyama, Heun
from dydilit_jax.diffusion.samplers.gaussian import DDIM, DDPM, DPMSolverPP
from dydilit_jax.errors import UserError, unknown_name

__all__ = [
    "DDIM",
    "DDPM",
    "SAMPLERS",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Sampler",
    "State",
    "integrate",
    "make_sampler",
    "sample",
]

SAMPLERS: dict[str, type[Any]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "dpm_solver_pp": DPMSolverPP,
    "euler": Euler,
    "heun": Heun,
    "euler_maruyama": EulerMaruyama,
}


def make_sampler(name: str, process: Process, steps: int, **options: Any) -> Sampler:
    """The sampler of a name.

    Args:
      name: one of `SAMPLERS`.
      process: the process the network was trained on; it must be the one the sampler is made for.
      steps: number of steps.
      **options: further fields of the sampler's class.

    Raises:
      UserError: for an unknown name or option, a sampler of another process, or values that the
        sampler refuses.
    """
    if name not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    sampler_class = SAMPLERS[name]
    if not isinstance(process, sampler_class.process_type):
        right = [key for key, kind in SAMPLERS.items() if isinstance(process, kind.process_type)]
        raise UserError(
            f"sampler {name!r} is not for a {type(process).__name__}: use {', '.join(right)}."
        )
    fields = [
        field.name
        for field in dataclasses.fields(sampler_class)
        if field.name not in ("process", "steps")
    ]
    for option in options:
        if option not in fields:
            raise unknown_name(f"option of sampler {name}", option, fields)
    return sampler_class(process=process, steps=steps, **options)
