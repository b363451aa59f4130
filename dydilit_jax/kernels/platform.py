"""The platform that programs are traced for: which kernels may be chosen, and whether to interpret.

A program may be compiled on a CPU for TPUs that are elsewhere; the kernels' choice then has to know
the target, not the machine that traces.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from dydilit_jax.errors import unknown_name


@dataclasses.dataclass(frozen=True)
class Target:
    """What is traced for.

    Attributes:
      platform: `cpu`, `gpu` or `tpu`.
      interpret: what Pallas calls it: True or pltpu.InterpretParams run kernels on a CPU.
    """

    platform: str
    interpret: Any = False


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


def target() -> Target:
    """The target that is set, else the platform of the default devices."""
    return _target.get() or Target(jax.default_backend())


@contextlib.contextmanager
def tracing_for(platform: str, *, interpret: Any = False) -> Iterator[None]:
    """Programs traced inside are for `platform`, whatever the devices of this process are.

    The target is no part of jit's cache key: trace for one target with one jitted function.
    """
    token = _target.set(Target(platform, interpret))
    try:
        yield
    finally:
        _target.reset(token)


_choices: contextvars.ContextVar[dict[str, set[str]] | None] = contextvars.ContextVar(
    "choices", default=None
)


@contextlib.contextmanager
def recording_choices() -> Iterator[dict[str, set[str]]]:
    """Collects, by operation, the implementations chosen while programs are traced inside."""
    choices: dict[str, set[str]] = {}
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def record_choice(operation: str, implementation: str) -> None:
    """Tells `recording_choices` what an operation will run."""
    if (choices := _choices.get()) is not None:
        choices.setdefault(operation, set()).add(implementation)


XLA_ALONE = "xla"  # the preference for no backend


def check_preference(prefer: str | None, backends: Iterable[str]) -> None:
    """Raises UserError for a preference that is neither None, nor `xla`, nor a backend's name."""
    known = (XLA_ALONE, *backends)
    if prefer is not None and prefer not in known:
        raise unknown_name("preferred implementation", prefer, known)


def preferred(prefer: str | None, fewest: Mapping[str, int]) -> dict[str, int]:
    """The backends that may be chosen, in order, each with the fewest rows it is chosen from.

    Args:
      prefer: a backend, which is then tried first and at any size; `xla` for none; or None.
      fewest: an operation's table of what it chooses unasked.
    """
    if prefer == XLA_ALONE:
        return {}
    first = {} if prefer is None else {prefer: 0}
    return first | {name: rows for name, rows in fewest.items() if name != prefer}


def not_hopper() -> str | None:
    """Why Mosaic GPU kernels that use wgmma cannot run on this process's GPU; None when they can.

    Only Hopper has these instructions. A program that is traced on another machine than its target
    is not judged.
    """
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability.split(".")[0] == "9":
        return None
    return (
        f"its instructions are those of Hopper (compute capability 9.0), "
        f"{device.device_kind} has {capability}"
    )
