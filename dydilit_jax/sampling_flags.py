"""What the entry points that draw images share: flags of the sampler, labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from dydilit_jax.errors import UserError


def define() -> Callable[[], dict[str, Any]]:
    """Defines the flags of sampling; returns what reads those that are given.

    That is a dict of fields of a config's section `sampling`, for `trained.with_sampling`.
    """
    fields = {
        "sampler": flags.DEFINE_string(
            "sampler", None, "Name of a sampler; default: the config's."
        ),
        "steps": flags.DEFINE_integer(
            "steps", None, "Steps of the sampler; default: the config's."
        ),
        "options": flags.DEFINE_string("options", None, "Fields of the sampler, like eta=0.5."),
        "guidance_scale": flags.DEFINE_float(
            "guidance_scale", None, "1 for none; default: the config's."
        ),
        "guidance_channels": flags.DEFINE_integer(
            "guidance_channels", None, "Guide the first so many channels; 0 for all."
        ),
        "batch_size": flags.DEFINE_integer(
            "batch_size", None, "Images at once; default: the config's."
        ),
    }
    interval = flags.DEFINE_string(
        "guidance_interval", None, "Times LOW,HIGH within which guidance acts: 0 data, 1 noise."
    )

    def given() -> dict[str, Any]:
        values: dict[str, Any] = {name: flag.value for name, flag in fields.items()}
        if interval.value is not None:
            low, high = parse_interval(interval.value)
            values |= {"guidance_low": low, "guidance_high": high}
        return {name: value for name, value in values.items() if value is not None}

    return given


def parse_labels(text: str, num_classes: int) -> np.ndarray:
    """Labels of a comma-separated list, all of them for an empty one.

    Raises:
      UserError: a part that is no whole number, or outside 0 to num_classes - 1.
    """
    from dydilit_jax.training.generation import check_labels

    if not text:
        return np.arange(num_classes)
    try:
        labels = np.asarray([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UserError(f"--labels={text} expects whole numbers, like 0,1,2") from error
    check_labels(labels, num_classes)
    return labels


def parse_interval(text: str) -> tuple[float, float]:
    """LOW,HIGH as numbers; their range is checked where they are used."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--guidance_interval={text} expects two numbers, like 0.1,0.9") from error
    return low, high
