"""Pixels to latents and back."""

from __future__ import annotations

from dydilit_jax.autoencoders.api import Pretrained, load_autoencoder, save_autoencoder
from dydilit_jax.autoencoders.interface import Autoencoder, Moments, images_from, latents_from
from dydilit_jax.autoencoders.tiling import decode_tiled

__all__ = [
    "Autoencoder",
    "Moments",
    "Pretrained",
    "decode_tiled",
    "images_from",
    "latents_from",
    "load_autoencoder",
    "save_autoencoder",
]
