"""Noise schedules of the Gaussian process, and which of their steps a shorter chain keeps.

All in float64 numpy: a product of a thousand factors is not left to float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dydilit_jax.errors import UserError, unknown_name


def linear_betas(steps: int) -> np.ndarray:
    """Evenly growing betas (steps,), 1e-4 to 0.02 at 1000 steps (DDPM, 2006.11239, section 4)."""
    scale = 1000.0 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def squared_cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> np.ndarray:
    """Betas (steps,) whose alpha_bar is a squared cosine (Nichol & Dhariwal 2102.09672, eq. 17)."""
    t = np.linspace(0.0, 1.0, steps + 1)
    alpha_bar = np.cos((t + offset) / (1.0 + offset) * np.pi / 2) ** 2
    return np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], largest)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "squared_cosine": squared_cosine_betas,
}


def make_betas(schedule: str, steps: int) -> np.ndarray:
    """The betas (steps,) of a schedule in `SCHEDULES`; unknown: UserError."""
    if schedule not in SCHEDULES:
        raise unknown_name("noise schedule", schedule, SCHEDULES)
    betas = SCHEDULES[schedule](steps)
    if not (betas.min() > 0.0 and betas.max() < 1.0):
        raise UserError(f"{steps} steps are too few for schedule {schedule!r}: a beta reaches 1.")
    return betas


def space_timesteps(steps: int, spacing: str) -> np.ndarray:
    """The steps that a shorter chain keeps, as in the published code of ADM and DiT.

    Args:
      steps: length T of the full chain.
      spacing: `"250"`: so many steps, from 0 to T - 1, as even as rounding allows.
        `"10,15,20"`: the chain is cut into as many sections of (nearly) equal length as there are
        numbers, and each keeps so many steps. `"ddim50"`: so many steps, from 0, at one whole
        stride (DDIM, 2010.02502, appendix D.2). `""`: every step.

    Returns:
      Increasing steps (kept,), int64, in [0, T).

    Raises:
      UserError: for text of another form, more steps than a section has, or no whole stride.
    """
    if not spacing:
        return np.arange(steps)
    if spacing.startswith("ddim"):
        return _constant_stride(steps, _count(spacing.removeprefix("ddim"), spacing))
    counts = [_count(part, spacing) for part in spacing.split(",")]
    shortest, longer = divmod(steps, len(counts))
    kept = []
    start = 0
    for section, count in enumerate(counts):
        length = shortest + (section < longer)
        if count > length:
            raise UserError(
                f"spacing {spacing!r} asks for {count} of the {length} steps"
                f"{' of a section' if len(counts) > 1 else ''}: at most {length} are there."
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # A running sum, and rounding to even: what the published steps come from.
        positions = np.cumsum(np.concatenate([[0.0], np.full(count - 1, stride)]))
        kept.append(start + np.round(positions).astype(np.int64))
        start += length
    return np.concatenate(kept)


def _constant_stride(steps: int, count: int) -> np.ndarray:
    for stride in range(1, steps):
        timesteps = np.arange(0, steps, stride)
        if len(timesteps) == count:
            return timesteps
    raise UserError(
        f"spacing 'ddim{count}' has no whole stride in {steps} steps: "
        f"choose a count that divides {steps}, or spacing '{count}'."
    )


def _count(text: str, spacing: str) -> int:
    if not (text.strip().isdecimal() and int(text) > 0):
        raise UserError(
            f"spacing {spacing!r} is not understood: write '250', 'ddim50' or '10,15,20'."
        )
    return int(text)
