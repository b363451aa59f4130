"""What an autoencoder is to the rest of the program."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Moments(NamedTuple):
    """Mean and standard deviation of the latents' distribution, (B, h, w, c) float32, not scaled.

    A deterministic autoencoder's standard deviation is zero.
    """

    mean: jax.Array
    std: jax.Array

    def sample(self, key: jax.Array) -> jax.Array:
        """Draws latents, each example's noise from fold_in(key, its place in the batch)."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(self.mean)))
        noise = jax.vmap(lambda k: jax.random.normal(k, self.mean.shape[1:]))(keys)
        return self.mean + self.std * noise


class Autoencoder(Protocol):
    """Pixels to latents and back.

    Attributes:
      downsampling: pixels of an image's side for one of the latent's.
      latent_channels: of the latents.
      scaling_factor: what the network's latents are: this times the autoencoder's.
      deterministic: whether the standard deviation is zero by design.
    """

    downsampling: int
    latent_channels: int
    scaling_factor: float
    deterministic: bool

    def encode(self, images: jax.Array) -> Moments:
        """Images (B, H, W, 3) in [-1, 1], H and W multiples of `downsampling`, to moments."""
        ...

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B, h, w, c), not scaled, to images float32, nominally in [-1, 1]."""
        ...


def images_from(autoencoder: Autoencoder, latents: jax.Array) -> jax.Array:
    """Decodes the network's latents, which are scaled: (B, h, w, c) to images (B, H, W, 3)."""
    return autoencoder.decode(latents / autoencoder.scaling_factor)


def latents_from(
    autoencoder: Autoencoder, images: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    """Encodes images (B, H, W, 3) in [-1, 1] to the network's latents: scaled, (B, h, w, c).

    Args:
      autoencoder: with its scaling factor.
      images: to encode.
      key: to sample with; None for the mean.
    """
    moments = autoencoder.encode(images)
    latents = moments.mean if key is None else moments.sample(key)
    return autoencoder.scaling_factor * latents
