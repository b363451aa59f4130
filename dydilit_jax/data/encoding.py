"""Images to latents on disk: a shard at a time, over local devices and over processes.

A shard is the images of one range of indices, and no batch reaches from one into the next; so which
process writes it, and after how many interruptions, changes nothing in it. Processes share a folder
and nothing else: process p of P writes shards p, p + P, ..., and the one that ends last finds all
of them and writes the manifest.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.autoencoders import Pretrained
from dydilit_jax.data.latents import (
    LatentRecord,
    Moments,
    describe_shard,
    read_indices,
    write_shard,
)
from dydilit_jax.data.manifest import (
    MANIFEST_FILE,
    UNFINISHED_FILE,
    Manifest,
    read_manifest,
    write_atomically,
)
from dydilit_jax.data.sources import Example, Source
from dydilit_jax.errors import UserError

# Images (b, H, W, 3) to the moments of each, and of its mirror image where those are asked for.
Encode = Callable[[np.ndarray], list[tuple[Moments, Moments | None]]]


def plan(
    source: Source,
    pretrained: Pretrained,
    *,
    name: str,
    split: str,
    flips: bool,
    dtype: str,
    compute_dtype: str,
    shard_size: int,
) -> Manifest:
    """What will be written, without shards.

    Args:
      source: images (H, W, 3) of one size.
      pretrained: the autoencoder and its weights.
      name, split: of the source, for the manifest.
      flips: encode mirror images too.
      dtype: of the numbers on disk, `float32` or `bfloat16`.
      compute_dtype: that the autoencoder computes in.
      shard_size: images in a shard.

    Raises:
      UserError: an empty source, or images that the autoencoder cannot take.
    """
    autoencoder, weights = pretrained
    height, width, channels = source.image_shape
    expected = autoencoder.config.in_channels
    if not len(source):
        raise UserError(f"split {split!r} of {name!r} is empty")
    if channels != expected:
        raise UserError(
            f"{name!r} has images of {channels} channels, autoencoder {weights.name} takes "
            f"{expected}"
        )
    if height != width or height % autoencoder.downsampling:
        raise UserError(
            f"{name!r} has images of {height} x {width}, autoencoder {weights.name} takes squares "
            f"whose side is a multiple of {autoencoder.downsampling}"
        )
    side = height // autoencoder.downsampling
    return Manifest(
        source=name,
        split=split,
        image_size=height,
        crop="center",
        flips=flips,
        label_names=tuple(source.label_names),
        autoencoder=weights.name,
        weights_sha256=weights.sha256,
        scaling_factor=autoencoder.scaling_factor,
        latent_shape=(side, side, autoencoder.latent_channels),
        deterministic=autoencoder.deterministic,
        dtype=dtype,
        compute_dtype=compute_dtype,
        shard_size=shard_size,
        examples=len(source),
    )


def make_encoder(
    pretrained: Pretrained, *, flips: bool, batch_size: int, devices: Sequence[jax.Device]
) -> Encode:
    """A compiled encoder over devices of this process, which divide every batch among them.

    Args:
      pretrained: the autoencoder.
      flips: encode mirror images too.
      batch_size: images at once, rounded up to a multiple of the devices; fewer are filled up.
      devices: of this process.
    """
    mesh = Mesh(np.asarray(devices), ("batch",), axis_types=(AxisType.Auto,))
    graph, state = nnx.split(pretrained.autoencoder)
    parameters = jax.device_put(state, NamedSharding(mesh, P()))
    split = NamedSharding(mesh, P("batch"))
    size = -(-batch_size // len(devices)) * len(devices)

    @jax.jit
    def encode(parameters: nnx.State, images: jax.Array) -> list[jax.Array]:
        autoencoder = nnx.merge(graph, parameters)
        return [
            array
            for each in ((images, images[:, :, ::-1]) if flips else (images,))
            for array in autoencoder.encode(each)
        ]

    def call(images: np.ndarray) -> list[tuple[Moments, Moments | None]]:
        filled = images[np.minimum(np.arange(size), len(images) - 1)]
        arrays = [np.asarray(array) for array in encode(parameters, jax.device_put(filled, split))]
        return [
            (
                Moments(arrays[0][i], arrays[1][i]),
                Moments(arrays[2][i], arrays[3][i]) if flips else None,
            )
            for i in range(len(images))
        ]

    return call


def read_batches(
    source: Source,
    indices: range,
    *,
    batch_size: int,
    threads: ThreadPoolExecutor,
    skip: Callable[[int, UserError], None],
) -> Iterator[list[tuple[int, Example]]]:
    """Reads examples, two batches ahead of use; yields those that could be read with their index.

    Args:
      source: to read.
      indices: which.
      batch_size: at most so many at once.
      threads: that read.
      skip: called for an example that cannot be read; raises if that is one too many.
    """
    waiting: deque[list[tuple[int, Future[Example]]]] = deque()
    for first in range(0, len(indices), batch_size):
        numbers = indices[first : first + batch_size]
        waiting.append([(i, threads.submit(source.__getitem__, i)) for i in numbers])
        if len(waiting) > 2:
            yield _collect(waiting.popleft(), skip)
    while waiting:
        yield _collect(waiting.popleft(), skip)


def _collect(
    futures: list[tuple[int, Future[Example]]], skip: Callable[[int, UserError], None]
) -> list[tuple[int, Example]]:
    examples = []
    for index, future in futures:
        try:
            examples.append((index, future.result()))
        except UserError as error:
            skip(index, error)
    return examples


def encode_source(
    source: Source,
    encode: Encode,
    manifest: Manifest,
    folder: Path,
    *,
    batch_size: int,
    read_threads: int = 2,
    max_skipped: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    progress: Callable[[int], object] = lambda count: None,
    warn: Callable[[str], object] = lambda message: None,
) -> Manifest | None:
    """Writes this process's shards, those that are not there yet, and the manifest if it is last.

    Args:
      source: the images.
      encode: of `make_encoder`.
      manifest: of `plan`.
      folder: to write to; may hold the beginning of the same encoding.
      batch_size: images that are read and encoded at once.
      read_threads: threads that read ahead.
      max_skipped: images that may be unreadable, here in this run.
      process_index, process_count: p and P.
      progress: called with the number of images that are done, those found on disk too.
      warn: called with a line for every image that is skipped.

    Returns:
      The manifest with its shards; None while other processes are still at theirs.

    Raises:
      UserError: another encoding is in the folder, or too many images cannot be read.
    """
    own = range(process_index, manifest.shard_count, process_count)
    if (done := open_folder(folder, manifest)) is not None:
        progress(sum(len(manifest.shard_range(number)) for number in own))
        return done
    skipped = 0

    def skip(index: int, error: UserError) -> None:
        nonlocal skipped
        skipped += 1
        if skipped > max_skipped:
            raise UserError(
                f"{error} ({skipped - 1} skipped before it): repair the data set, or let "
                "data.on_error=skip and data.max_errors allow more"
            ) from error
        warn(f"skipped image {index}: {error}")
        progress(1)

    def records(indices: range) -> Iterator[LatentRecord]:
        batches = read_batches(source, indices, batch_size=batch_size, threads=threads, skip=skip)
        for batch in batches:
            if batch:
                moments = encode(np.stack([example["image"] for _, example in batch]))
                for (index, example), (own, flipped) in zip(batch, moments, strict=True):
                    yield LatentRecord(index, int(example["label"]), own, flipped)
            progress(len(batch))

    with ThreadPoolExecutor(read_threads) as threads:
        for number in own:
            indices = manifest.shard_range(number)
            path = folder / manifest.shard_file(number)
            if path.exists():
                progress(len(indices))
            else:
                write_shard(path, records(indices), manifest)
    return finish(folder, manifest)


def open_folder(folder: Path, manifest: Manifest) -> Manifest | None:
    """Prepares a folder, or finds that all is there already and returns its manifest.

    Raises:
      UserError: the folder holds another encoding, or other files.
    """
    finished = folder / MANIFEST_FILE
    unfinished = folder / UNFINISHED_FILE
    found = None
    if finished.is_file():
        found = read_manifest(folder)
        before = dataclasses.replace(found, shards=(), skipped=())
    elif unfinished.is_file():
        before = Manifest.from_json(unfinished.read_text(), unfinished)
    else:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--out={folder} is not an empty folder: choose another")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(unfinished, manifest.to_json())
        return None
    if differing := before.differences(dataclasses.asdict(manifest) | {"shards": ()}):
        raise UserError(
            f"{str(folder)!r} holds another encoding ({'; '.join(differing)}): delete it, or "
            "change --out"
        )
    return found


def finish(folder: Path, manifest: Manifest) -> Manifest | None:
    """Writes the manifest if all shards are there; None otherwise."""
    paths = [folder / manifest.shard_file(i) for i in range(manifest.shard_count)]
    if not all(path.is_file() for path in paths):
        return None
    shards = tuple(describe_shard(path) for path in paths)
    skipped: list[int] = []
    for number, shard in enumerate(shards):
        indices = manifest.shard_range(number)
        if shard.count < len(indices):
            skipped += sorted(set(indices) - set(read_indices(paths[number])))
    complete = dataclasses.replace(manifest, shards=shards, skipped=tuple(skipped))
    write_atomically(folder / MANIFEST_FILE, complete.to_json())
    (folder / UNFINISHED_FILE).unlink(missing_ok=True)
    return complete
