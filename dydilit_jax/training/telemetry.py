"""From what a step measured to what is written: scalars for TensorBoard, everything for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def summarize(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Splits a step's metrics into scalars and histograms.

    Telemetry has a leading axis of layers. Of it become scalars: the mean over layers (the minimum
    for `denominator_min`), and for each router's usage (layers, choices) the share of the busiest
    choice and the entropy over its maximum, 1 when the choices are used alike.

    Returns:
      Scalars by name, and the routers' usage (layers, choices) by name.
    """
    scalars: dict[str, float] = {}
    usages: dict[str, np.ndarray] = {}
    for name, value in metrics.items():
        array = np.asarray(value, np.float64)
        if name.startswith("usage/"):
            router = name.removeprefix("usage/")
            usages[name] = array
            entropy = -np.sum(array * np.log(np.maximum(array, 1e-12)), axis=-1)
            scalars[f"router/{router}/busiest"] = float(array.max(axis=-1).mean())
            scalars[f"router/{router}/entropy"] = float(entropy.mean() / np.log(array.shape[-1]))
        elif name.endswith("_min"):
            scalars[name] = float(array.min())
        else:
            scalars[name] = float(array.mean())
    return scalars, usages
