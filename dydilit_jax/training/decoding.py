"""The config's autoencoder, and the network's latents as images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.autoencoders import Autoencoder, Pretrained, images_from, load_autoencoder
from dydilit_jax.config import AutoencoderConfig
from dydilit_jax.errors import UserError

DECODED_AT_ONCE = 8  # latents on a device

Decode = Callable[[np.ndarray], np.ndarray]


def configured_autoencoder(config: AutoencoderConfig) -> Pretrained:
    """The autoencoder that a config names.

    Raises:
      UserError: as load_autoencoder.
    """
    return load_autoencoder(
        config.weights,
        scaling_factor=config.scaling_factor or None,
        revision=config.revision,
        sha256=config.sha256,
        dtype=config.dtype,
    )


def make_decoder(
    config: AutoencoderConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    channels: int | None = None,
) -> Decode:
    """What makes images of the network's outputs: latents (b, h, w, c) to pixels (b, H, W, 3).

    Args:
      config: the autoencoder; with no weights the network draws pixels, which stay as they are.
      devices: that share the work; default: all of this process.
      channels: of the network's outputs, to be checked against the autoencoder's; None for not.

    Raises:
      UserError: as load_autoencoder; or latents of another number of channels.
    """
    if not config.weights:
        return lambda images: images
    devices = devices or jax.local_devices()
    # One program over one host's devices is refused on v5e's slices of 8 x 16 chips and more.
    groups = [devices] if jax.process_count() == 1 else [[device] for device in devices]
    autoencoder = configured_autoencoder(config).autoencoder
    check_channels(config, autoencoder, channels)
    graph, state = nnx.split(autoencoder)
    meshes = [decoder_mesh(group) for group in groups]
    weights = [jax.device_put(state, NamedSharding(mesh, P())) for mesh in meshes]
    decode = jit_decoder(graph)

    def call(latents: np.ndarray) -> np.ndarray:
        size = min(DECODED_AT_ONCE, -(-len(latents) // len(devices))) * len(groups[0])
        images: list[np.ndarray] = []
        for first in range(0, len(latents), size * len(groups)):
            starts = range(first, min(first + size * len(groups), len(latents)), size)
            decoded = []
            for start, mesh, own in zip(starts, meshes, weights, strict=False):
                # The last ones are filled up with repetitions, which are cut off again.
                indices = np.minimum(np.arange(start, start + size), len(latents) - 1)
                rows = NamedSharding(mesh, P("batch"))
                decoded.append(decode(own, jax.device_put(latents[indices], rows)))
            images += map(np.asarray, decoded)  # when all groups have something to do
        return np.concatenate(images)[: len(latents)]

    return call


def decoder_mesh(devices: Sequence[Any]) -> Mesh:
    """Devices that share the images of a batch, each with all weights."""
    return Mesh(np.asarray(devices), ("batch",), axis_types=(AxisType.Auto,))


def jit_decoder(graph: nnx.GraphDef) -> Any:
    """A jitted function (weights, latents (b, h, w, c)) -> images (b, H, W, 3), laid out alike."""
    return jax.jit(lambda weights, latents: images_from(nnx.merge(graph, weights), latents))


def check_channels(
    config: AutoencoderConfig, autoencoder: Autoencoder, channels: int | None
) -> None:
    """Raises UserError where the autoencoder's latents have other channels than the network's."""
    if channels not in (None, autoencoder.latent_channels):
        raise UserError(
            f"autoencoder {config.weights!r} decodes latents of {autoencoder.latent_channels} "
            f"channels, the network draws {channels}"
        )
