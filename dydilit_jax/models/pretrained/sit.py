"""SiT's weights (arXiv 2401.08740), whose names are the official DiT's.

SiT counts time the other way round: its network, at time 1 - t, predicts -v of diffusion/flow.py,
and is fed times between 0 and 1. Both are undone in the weights. With frequencies w, the first map
of the time's embedding, K_c for cosines and K_s for sines, becomes

    cos((1 - t) w) K_c + sin((1 - t) w) K_s
        = cos(t w) (cos(w) K_c + sin(w) K_s) + sin(t w) (sin(w) K_c - cos(w) K_s)

and the last map changes its sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dydilit_jax.errors import UserError
from dydilit_jax.models.embeddings import time_frequencies
from dydilit_jax.models.pretrained.api import Pretrained


def from_sit(pretrained: Pretrained, source: str) -> Pretrained:
    """A SiT, read as a DiT, as a network of our rectified flow with `time_scale` 1.

    The channels of a variance, which SiT's networks put out and SiT ignores, are left out.

    Raises:
      UserError: an output of neither the input's channels nor twice as many.
    """
    config = pretrained.config
    channels = config.channels
    if pretrained.out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{source} is no SiT: it puts out {pretrained.out_channels} channels for {channels}"
        )
    parameters = dict(pretrained.parameters)
    embed = dict(parameters["time_embed"])
    embed["hidden"] = embed["hidden"] | {
        "kernel": _reversed_time(embed["hidden"]["kernel"], config.time_frequency_shift)
    }
    final = dict(parameters["final"])
    final["linear"] = {
        name: -array.reshape(*array.shape[:-1], config.patch_size**2, -1)[..., :channels].reshape(
            *array.shape[:-1], -1
        )
        for name, array in final["linear"].items()
    }
    parameters |= {"time_embed": embed, "final": final}
    flow: dict[str, Any] = {"process": "flow", "flow": {"time_scale": 1.0}}
    return pretrained._replace(
        out_channels=channels,
        parameters=parameters,
        extra=pretrained.extra | {"diffusion": flow},
    )


def _reversed_time(kernel: np.ndarray, shift: int) -> np.ndarray:
    cosines, sines = np.split(kernel.astype(np.float64), 2)
    frequency = time_frequencies(len(kernel), shift)[:, None]
    turned = [
        np.cos(frequency) * cosines + np.sin(frequency) * sines,
        np.sin(frequency) * cosines - np.cos(frequency) * sines,
    ]
    return np.concatenate(turned).astype(np.float32)
