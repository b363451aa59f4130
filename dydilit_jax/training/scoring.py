"""Images over the mesh, to be scored: drawn by a network, or read from files, batch by batch.

    indices --draw or read--> images uint8 (B, H, W, C) --extract--> features --> metrics' Scorer

Each arrow is a program over all devices, and every device has its rows of B throughout: images are
never gathered, and each process sums the features of its own devices.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.agreement import raised_together
from dydilit_jax.autoencoders import images_from
from dydilit_jax.config import SamplingConfig
from dydilit_jax.data.image_files import ImageFiles
from dydilit_jax.data.sources import Source
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.frechet import SingularCovarianceWarning
from dydilit_jax.metrics.precision_recall import NEIGHBOURS
from dydilit_jax.metrics.references import Reference
from dydilit_jax.metrics.scoring import SCORES, Scorer
from dydilit_jax.training.decoding import DECODED_AT_ONCE
from dydilit_jax.training.generation import check_labels, compile_generator
from dydilit_jax.training.sharding import batch_sharding
from dydilit_jax.training.state import Network

READ_THREADS = 4

Images = Callable[[np.ndarray], jax.Array]
"""Indices (B,), the same on every process, to images (B, H, W, C) uint8 that lie by_device."""


def check_count(num: int, wanted: Sequence[str] = SCORES) -> None:
    """Raises UserError where `num` images are too few for the wanted of metrics' SCORES."""
    if "precision_recall" in wanted and num <= NEIGHBOURS:
        raise UserError(
            f"{num} images are too few: precision and recall need at least {NEIGHBOURS + 1} "
            "(--scores=frechet does without)"
        )
    if num < 2:
        raise UserError(f"{num} images are too few: a covariance needs at least 2")


def by_device(mesh: Mesh) -> NamedSharding:
    """Rows over all devices of the mesh, whatever its axes."""
    return NamedSharding(mesh, P(mesh.axis_names))


class Drawing:
    """Draws images from parameters, decodes and quantises them, all on the devices.

    Args:
      network: structure and process.
      sampling: sampler, steps, guidance.
      mesh: what is drawn over.
      autoencoder: of the latents that the network draws; None where it draws pixels.
    """

    def __init__(self, network: Network, sampling: SamplingConfig, mesh: Mesh, autoencoder: Any):
        self._classes = network.config.model.num_classes
        self._rows = batch_sharding(mesh)
        self._generate = compile_generator(network, sampling, mesh)
        self._mesh, self._autoencoder = mesh, autoencoder
        model = network.config.model
        side = model.image_size * (autoencoder.downsampling if autoencoder else 1)
        self.image_shape = (side, side, 3 if autoencoder else model.channels)

    @functools.cached_property
    def _quantise(self) -> Callable[[jax.Array], jax.Array]:
        # Late: it lays the autoencoder's parameters on the devices.
        return _compile_quantiser(self._mesh, self._autoencoder)

    def images(self, parameters: Any, labels: np.ndarray, seed: int) -> Images:
        """Image i is that of fold_in(key(seed), i) and labels[i], as generation.py draws it.

        Raises:
          UserError: a label outside the classes.
        """
        check_labels(labels, self._classes)
        key = jax.random.key(seed)

        def draw(indices: np.ndarray) -> jax.Array:
            wanted = labels[indices].astype(np.int32)
            drawn = self._generate(
                parameters,
                key,
                jax.device_put(indices.astype(np.int32), self._rows),
                jax.device_put(wanted, self._rows),
            )
            return self._quantise(drawn)

        return draw


def _compile_quantiser(mesh: Mesh, autoencoder: Any) -> Callable[[jax.Array], jax.Array]:
    """A program from the network's output (B, ...) to images uint8, as drawing.to_uint8 rounds."""
    rows = by_device(mesh)

    def levels(images: jax.Array) -> jax.Array:
        return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)

    if autoencoder is None:
        return jax.jit(levels, out_shardings=rows)
    graph, state = nnx.split(autoencoder)
    parameters = jax.device_put(state, NamedSharding(mesh, P()))

    def decode(parameters: Any, latents: jax.Array) -> jax.Array:
        # A few at once: a decoder's activations are some hundred times its latents.
        parts = latents.reshape(-1, _decoded_at_once(len(latents)), *latents.shape[1:])
        images = jax.lax.map(
            lambda part: levels(images_from(nnx.merge(graph, parameters), part)), parts
        )
        return images.reshape(len(latents), *images.shape[2:])

    sharded = jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), P(mesh.axis_names)), out_specs=P(mesh.axis_names)
    )
    compiled = jax.jit(sharded, in_shardings=(None, rows), out_shardings=rows)
    # The network's outputs lie over the axes of the batch alone: the other devices had copies.
    spread = jax.jit(lambda latents: latents, out_shardings=rows)
    return lambda latents: compiled(parameters, spread(latents))


def _decoded_at_once(count: int) -> int:
    """The largest divisor of `count` that is at most DECODED_AT_ONCE."""
    return max(each for each in range(1, min(count, DECODED_AT_ONCE) + 1) if count % each == 0)


def read_images(files: ImageFiles, mesh: Mesh) -> Images:
    """Images of files, of which each process reads the rows of its own devices.

    The function raises, on every process, what reading raises on any.
    """
    rows = by_device(mesh)

    def read(indices: np.ndarray) -> jax.Array:
        shape = (len(indices), *files.image_shape)
        parts = []
        with raised_together():
            for device, place in rows.addressable_devices_indices_map(shape).items():
                assert place is not None
                parts.append(jax.device_put(files.read(indices[place[0]]), device))
        return jax.make_array_from_single_device_arrays(shape, rows, parts)

    return read


class SourceImages:
    """A data set's images as ImageFiles: the levels 0 to 255 that they are trained as."""

    def __init__(self, source: Source):
        self._source = source
        self._pool = ThreadPoolExecutor(READ_THREADS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self._source.image_shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C) uint8; UserError, naming it, for one that cannot be read."""
        return np.stack(list(self._pool.map(self._read, indices.tolist())))

    def _read(self, index: int) -> np.ndarray:
        return to_uint8(self._source[index]["image"])


def fitting_batch(wanted: int, num: int, mesh: Mesh) -> int:
    """A batch of about `wanted` of `num` images that all devices share evenly.

    With more than DECODED_AT_ONCE on a device, a multiple of that.
    """
    each = -(-min(wanted, num) // mesh.size)
    if each > DECODED_AT_ONCE:
        each = -(-each // DECODED_AT_ONCE) * DECODED_AT_ONCE
    return each * mesh.size


def batches(
    images: Images, num: int, *, batch_size: int, first: int = 0
) -> Iterator[tuple[np.ndarray, jax.Array]]:
    """Images first to num - 1 in order, each batch with its indices (batch_size,).

    The last batch is filled up with repetitions, whose index is -1.
    """
    for start in range(first, num, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < num, indices, -1), images(np.minimum(indices, num - 1))


def score_batches(
    images: Images,
    extract: Callable[[jax.Array], Features],
    scorer: Scorer,
    num: int,
    *,
    batch_size: int,
    stopped: Callable[[], bool],
) -> bool:
    """Adds the features of `num` images to a scorer; False if it was stopped meanwhile."""
    for indices, pixels in batches(images, num, batch_size=batch_size):
        features = extract(pixels)
        with raised_together():
            scorer.add(features, indices)
        if stopped():
            return False
    return True


def scores_of(
    scorer: Scorer, reference: Reference, mesh: Mesh
) -> tuple[dict[str, float], list[str]]:
    """The scores against a reference, and what is to be said of them; a collective."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SingularCovarianceWarning)
        scores = scorer.scores(reference, mesh)
    return scores, [str(each.message) for each in caught]
