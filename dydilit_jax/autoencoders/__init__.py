"""Pixels to latents and back."""

from __future__ import annotations

from dydilit_jax.autoencoders.api import (
    Pretrained,
    abstract_autoencoder,
    load_autoencoder,
    save_autoencoder,
)
from dydilit_jax.autoencoders.interface import Autoencoder, Moments, images_from, latents_from
from dydilit_jax.autoencoders.tiling import decode_tiled

__all__ = [
    "Autoencoder",
    "Moments",
    "Pretrained",
    "abstract_autoencoder",
    "decode_tiled",
    "images_from",
    "latents_from",
    "load_autoencoder",
    "save_autoencoder",
]
