"""Drawing images from a network's parameters, over the mesh, in batches of one compiled shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dydilit_jax.config import SamplingConfig
from dydilit_jax.diffusion.guidance import classifier_free
from dydilit_jax.diffusion.samplers import sample
from dydilit_jax.errors import UserError
from dydilit_jax.training.sharding import batch_sharding
from dydilit_jax.training.state import Network, configured_sampler

Generate = Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]


def compile_generator(network: Network, config: SamplingConfig, mesh: Mesh) -> Generate:
    """A jitted function (parameters, seed key, indices (B,), labels (B,)) -> images (B, H, W, C).

    All randomness of an image comes from fold_in(seed key, its index): it is the same image
    whatever batch it is drawn in and on however many devices.
    """
    compiled = jit_generator(network, config, mesh)

    def on_mesh(
        parameters: Any, key: jax.Array, indices: jax.Array, labels: jax.Array
    ) -> jax.Array:
        with jax.set_mesh(mesh):
            return compiled(parameters, key, indices, labels)

    return on_mesh


def jit_generator(network: Network, config: SamplingConfig, mesh: Mesh) -> Any:
    """The jitted function of `compile_generator`, to be called with the mesh set."""
    model = network.config.model
    sampler = configured_sampler(config, network.config.diffusion)

    def generate(
        parameters: Any, key: jax.Array, indices: jax.Array, labels: jax.Array
    ) -> jax.Array:
        module = network.module(parameters)
        guided = classifier_free(
            lambda x, time, condition: module(x, time, condition)[0],
            labels,
            model.null_label,
            config.guidance_scale,
            interval=(config.guidance_low, config.guidance_high),
            channels=config.guidance_channels or None,
            time_max=network.process.time_max,
        )
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, indices)
        shape = (model.image_size, model.image_size, model.channels)
        return sample(sampler, guided, keys, shape)

    batch = batch_sharding(mesh)
    return jax.jit(generate, in_shardings=(None, None, batch, batch), out_shardings=batch)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises UserError for a label outside 0 to num_classes - 1."""
    outside = [int(label) for label in labels if not 0 <= label < num_classes]
    if outside:
        raise UserError(f"label {outside[0]} is outside the classes 0 to {num_classes - 1}")


def generate_images(
    network: Network,
    parameters: Any,
    labels: np.ndarray,
    *,
    seed: int,
    config: SamplingConfig,
    mesh: Mesh,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Draws an image for each label, in order, and yields them batch by batch.

    Args:
      network: structure and process.
      parameters: usually the moving average.
      labels: (n,) int.
      seed: image i is drawn from fold_in(key(seed), i).
      config: sampler, steps, guidance and batch size.
      mesh: the batch lies over all its devices; it is rounded up to a multiple of them.
      first: index to start from; what comes before it is not drawn.

    Yields:
      (b, H, W, C) float32, nominally in [-1, 1], not clipped; b sums to n - first.

    Raises:
      UserError: a label outside the classes.
    """
    check_labels(labels, network.config.model.num_classes)
    devices = mesh.size
    batch = min(config.batch_size, len(labels))
    batch = -(-batch // devices) * devices
    generate = compile_generator(network, config, mesh)
    key = jax.random.key(seed)
    sharding = batch_sharding(mesh)
    for start in range(first, len(labels), batch):
        # The last batch is filled up with repetitions of its last image, which are cut off again.
        indices = np.minimum(np.arange(start, start + batch), len(labels) - 1).astype(np.int32)
        wanted = labels[indices].astype(np.int32)
        images = generate(
            parameters, key, jax.device_put(indices, sharding), jax.device_put(wanted, sharding)
        )
        if jax.process_count() > 1:
            images = multihost_utils.process_allgather(images, tiled=True)
        yield np.asarray(images)[: len(labels) - start]
