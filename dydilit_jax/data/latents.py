"""Precomputed latents on disk: what is written once per image and drawn from at every epoch.

A folder, written by `python -m dydilit_jax.encode`, read by `LatentSource`:

    manifest.json                          what the latents are of, and by which autoencoder
    latents-00000-of-00008.array_record    shards, one after the other

A record is a header of two little-endian int64, the example's index in its source and its label,
then the moments of the autoencoder's posterior, not scaled, each (h, w, c) in C order:

    mean, std                              of the image
    flipped mean, flipped std              of its mirror image, where the manifest says `flips`

A deterministic autoencoder has no standard deviation: its records hold the means alone. The
network sees scaling_factor (mean + std noise), the noise drawn anew for each (seed, epoch, index),
as where images are encoded while training. What is mirrored is the image, not its latent, because
an autoencoder does not commute with that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dydilit_jax.autoencoders.weights import KNOWN, identity
from dydilit_jax.config import Config
from dydilit_jax.data.buckets import (
    AnyPath,
    check_credentials,
    check_opened,
    open_path,
    readable,
    size_of,
)
from dydilit_jax.data.classes import read_class_list
from dydilit_jax.data.manifest import DTYPES, HEADER, Manifest, Shard, read_manifest
from dydilit_jax.data.sources import Example
from dydilit_jax.errors import UserError

# One record in a chunk, as random access wants it, and not compressed: the mantissas of latents are
# noise, and inflating them costs more than the bytes they save.
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class Moments(NamedTuple):
    """Mean and standard deviation (h, w, c) float32 of a posterior, not scaled."""

    mean: np.ndarray
    std: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class LatentRecord:
    """What is kept of one image; `flipped` is None where only the image itself was encoded."""

    index: int
    label: int
    moments: Moments
    flipped: Moments | None = None


def encode_record(record: LatentRecord, manifest: Manifest) -> bytes:
    """The bytes of a record.

    Raises:
      ValueError: moments that are not of the manifest's shape, or not finite.
    """
    arrays: list[np.ndarray] = []
    for moments in (record.moments, record.flipped):
        if moments is not None:
            arrays += moments[:1] if manifest.deterministic else moments
    for array in arrays:
        if array.shape != manifest.latent_shape:
            raise ValueError(f"moments of shape {array.shape}, expected {manifest.latent_shape}")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"the latent of example {record.index} is not finite")
    header = np.asarray([record.index, record.label], HEADER).tobytes()
    data = header + b"".join(array.astype(DTYPES[manifest.dtype]).tobytes() for array in arrays)
    if len(data) != manifest.record_size:
        raise ValueError(f"a record of {len(data)} bytes, expected {manifest.record_size}")
    return data


def decode_record(data: bytes, manifest: Manifest) -> LatentRecord:
    """The inverse of `encode_record`; moments as float32, a missing standard deviation as zero.

    Raises:
      UserError: a record of another size.
    """
    if len(data) != manifest.record_size:
        raise UserError(
            f"a record of {len(data)} bytes, the manifest says {manifest.record_size}: "
            "the latents are of another autoencoder, or damaged; encode anew"
        )
    index, label = np.frombuffer(data, HEADER, 2)
    numbers = np.frombuffer(data, DTYPES[manifest.dtype], offset=2 * HEADER.itemsize)
    arrays = numbers.astype(np.float32).reshape(-1, *manifest.latent_shape)
    if manifest.deterministic:
        pairs = [Moments(mean, np.zeros_like(mean)) for mean in arrays]
    else:
        pairs = [Moments(*arrays[i : i + 2]) for i in range(0, len(arrays), 2)]
    return LatentRecord(int(index), int(label), pairs[0], pairs[1] if manifest.flips else None)


def write_shard(path: Path, records: Iterable[LatentRecord], manifest: Manifest) -> None:
    """Writes a shard, whole or not at all; the same records give the same bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    unfinished = path.with_name("unfinished-" + path.name)
    writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(encode_record(record, manifest))
    finally:
        writer.close()
    unfinished.replace(path)


def describe_shard(path: Path) -> Shard:
    """Counts and checksums a shard."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    reader = _reader(path)
    count = reader.num_records()
    reader.close()
    return Shard(path.name, count, path.stat().st_size, digest)


def read_indices(path: Path) -> list[int]:
    """Indices in the source of a shard's records."""
    reader = _reader(path)
    records = reader.read_all()
    reader.close()
    return [int(np.frombuffer(record, HEADER, 1)[0]) for record in records]


def _reader(path: AnyPath) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), options=READER_OPTIONS, file_reader_buffer_size=32768)
    with readable():
        check_opened(reader, path)
    if not reader.ok():
        raise UserError(f"{str(path)!r} is damaged or no ArrayRecord file: encode anew")
    return reader


def example_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of all chance that one example sees in one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, index])))


def sample_latent(
    record: LatentRecord, rng: np.random.Generator, *, scaling_factor: float, flip: bool
) -> Example:
    """scaling_factor (mean + std noise) (h, w, c) float32, and the label.

    Args:
      record: of an image.
      rng: draws whether the mirror image is taken, and the noise.
      scaling_factor: the manifest's.
      flip: take the mirror image in half of the cases; its moments must be there.
    """
    moments = record.moments
    if flip and rng.random() < 0.5:
        assert record.flipped is not None
        moments = record.flipped
    noise = rng.standard_normal(moments.mean.shape, np.float32)
    latent = np.float32(scaling_factor) * (moments.mean + moments.std * noise)
    return Example(image=latent, label=np.int32(record.label))


def wanted_of(config: Config) -> dict[str, Any]:
    """The manifest's fields that a run's config decides, as LatentSource's `wanted`.

    Raises:
      UserError: the config has no autoencoder, or weights that are neither there nor known.
    """
    model, autoencoder = config.model, config.autoencoder
    if not autoencoder.weights:
        raise UserError(
            "data are latents, but autoencoder.weights is empty: set it to what they were encoded "
            f"with, a folder or one of {', '.join(KNOWN)}"
        )
    wanted: dict[str, Any] = {
        "source": config.data.source,
        "split": config.data.split,
        "latent_shape": (model.image_size, model.image_size, model.channels),
        "classes": model.num_classes,
    }
    wanted |= identity(autoencoder.weights, sha256=autoencoder.sha256)
    if config.data.image_size:
        wanted["image_size"] = config.data.image_size
    if config.data.classes:
        wanted["label_names"] = tuple(read_class_list(config.data.classes))
    if autoencoder.scaling_factor:
        wanted["scaling_factor"] = autoencoder.scaling_factor
    return wanted


class LatentSource:
    """A folder of latents, read by index.

    Args:
      folder: what `python -m dydilit_jax.encode` wrote, here or copied to `gs://...`.
      wanted: fields of the manifest and the values they must have, such as `weights_sha256`,
        `scaling_factor`, `latent_shape`, `image_size`.
      flip: whether mirror images will be asked for.

    Raises:
      UserError: latents of something else than wanted, without the mirror images asked for, or
        shards that are missing or truncated.
    """

    def __init__(
        self, folder: Path | str, *, wanted: Mapping[str, Any] | None = None, flip: bool = False
    ):
        self.folder = open_path(folder)
        self.manifest = read_manifest(self.folder)
        if differing := self.manifest.differences(wanted or {}):
            raise UserError(
                f"{str(folder)!r} does not fit the config ({'; '.join(differing)}): encode anew, "
                "or change the config"
            )
        if flip and not self.manifest.flips:
            raise UserError(
                f"{str(folder)!r} holds no mirror images: encode with --flips, or set "
                "data.horizontal_flip=False"
            )
        if not self.manifest.count:
            raise UserError(f"{str(folder)!r} holds no records")
        self._flip = flip
        self._readers: dict[int, Any] = {}
        self._first = np.cumsum([0, *(shard.count for shard in self.manifest.shards)])
        self._check_files()
        check_credentials(folder)

    def _check_files(self) -> None:
        for shard in self.manifest.shards:
            path = self.folder / shard.file
            if not path.is_file():
                raise UserError(f"{str(path)!r} is missing: copy it, or encode anew")
            if (size := size_of(path)) != shard.size:
                raise UserError(
                    f"{str(path)!r} has {size} bytes, the manifest says {shard.size}: it is "
                    "truncated or of another encoding; copy it again, or encode anew"
                )

    def __getstate__(self) -> dict[str, Any]:
        # Readers do not travel to worker processes; each opens its own.
        return self.__dict__ | {"_readers": {}}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every latent."""
        return self.manifest.latent_shape

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.manifest.label_names

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> LatentRecord:
        """The record of this index, 0 to len - 1.

        Raises:
          UserError: the record cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        path = self.folder / self.manifest.shards[number].file
        # Readers are shared by threads; two of them may open one file twice, which does no harm.
        reader = self._readers.get(number)
        if reader is None:
            reader = self._readers[number] = _reader(path)
        position = int(index - self._first[number])
        try:
            (data,) = reader.read([position])
        except (RuntimeError, ValueError, IndexError) as error:
            # A reader that failed once may not go on.
            self._readers.pop(number, None)
            raise UserError(f"record {position} of {str(path)!r} is damaged: {error}") from error
        return decode_record(data, self.manifest)

    def transform(self, record: LatentRecord, rng: np.random.Generator) -> Example:
        """What the network sees of a record, all chance from `rng`."""
        return sample_latent(
            record, rng, scaling_factor=self.manifest.scaling_factor, flip=self._flip
        )

    def draw(self, index: int, *, seed: int, epoch: int) -> Example:
        """What the network sees of this index in this epoch."""
        return self.transform(self[index], example_rng(seed, epoch, index))

    def verify(self) -> None:
        """Reads every shard and compares checksums.

        Raises:
          UserError: a shard whose bytes are not those that were written.
        """
        for shard in self.manifest.shards:
            with (self.folder / shard.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != shard.sha256:
                raise UserError(
                    f"{str(self.folder / shard.file)!r} has another checksum than the manifest "
                    "says: copy it again, or encode anew"
                )
