"""The manifest of a folder of latents: what they are of, and by which autoencoder.

`manifest.json` is written when all shards are there; until then `unfinished.json` says what is
being written, so that the same command goes on and another one is refused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dydilit_jax.data.buckets import AnyPath
from dydilit_jax.errors import UserError

FORMAT, VERSION = "dydilit_jax.latents", 1
MANIFEST_FILE, UNFINISHED_FILE = "manifest.json", "unfinished.json"
DTYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
HEADER = np.dtype("<i8")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of records: its name, its records, its size in bytes and its checksum."""

    file: str
    count: int
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of latents is.

    Attributes:
      source, split: the images, by their names in the config.
      image_size: side of the square images that were encoded, in pixels.
      crop: how they were made square: `center` is ADM's box-then-bicubic centre crop; `none` where
        the source has that size already.
      flips: whether each record has the mirror image too.
      label_names: names of the classes, in the order of their labels.
      autoencoder: name of the weights, `unknown` where their checksum is of no known ones.
      weights_sha256: checksum of the file of weights.
      scaling_factor: what the network's latents are multiplied with.
      latent_shape: height, width, channels.
      deterministic: whether the autoencoder has no standard deviation.
      dtype: of the numbers in a record, `float32` or `bfloat16`.
      compute_dtype: that the encoder computed in.
      shard_size: examples of the source in a shard, but for the last.
      examples: images in the source.
      skipped: source indices of images that could not be read, and have no record.
      shards: the files, in order; empty while they are being written.
    """

    source: str
    split: str
    image_size: int
    crop: str
    flips: bool
    label_names: tuple[str, ...]
    autoencoder: str
    weights_sha256: str
    scaling_factor: float
    latent_shape: tuple[int, int, int]
    deterministic: bool
    dtype: str
    compute_dtype: str
    shard_size: int
    examples: int
    skipped: tuple[int, ...] = ()
    shards: tuple[Shard, ...] = ()

    @property
    def count(self) -> int:
        """Number of records."""
        return sum(shard.count for shard in self.shards)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def shard_count(self) -> int:
        """Number of shards that the source fills."""
        return -(-self.examples // self.shard_size)

    @property
    def record_size(self) -> int:
        """Bytes of a record."""
        arrays = (1 if self.deterministic else 2) * (2 if self.flips else 1)
        numbers = arrays * int(np.prod(self.latent_shape))
        return 2 * HEADER.itemsize + numbers * DTYPES[self.dtype].itemsize

    def shard_file(self, number: int) -> str:
        """Name of a shard."""
        return f"latents-{number:05d}-of-{self.shard_count:05d}.array_record"

    def shard_range(self, number: int) -> range:
        """Indices in the source of a shard's images."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.examples))

    def to_json(self) -> str:
        """The manifest as indented JSON, with its format and count."""
        head = {"format": FORMAT, "version": VERSION, "count": self.count}
        return json.dumps(head | dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, path: AnyPath) -> Manifest:
        """The inverse of `to_json`; `path` is told in errors.

        Raises:
          UserError: it is no manifest of this version.
        """
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
                raise UserError(f"{str(path)!r} is no manifest of latents")
            if (version := fields.pop("version", None)) != VERSION:
                raise UserError(
                    f"{str(path)!r} has version {version}, expected {VERSION}: encode anew"
                )
            count = fields.pop("count")
            fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
            for name in ("label_names", "latent_shape", "skipped"):
                fields[name] = tuple(fields[name])
            manifest = cls(**fields)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(path)!r} is damaged ({type(error).__name__}: {error}): encode anew"
            ) from error
        if manifest.dtype not in DTYPES or manifest.count != count:
            raise UserError(f"{str(path)!r} contradicts itself (dtype or count): encode anew")
        return manifest

    def differences(self, wanted: Mapping[str, Any]) -> list[str]:
        """Lines "field: what the latents have, what was wanted" for fields that differ."""
        return [
            f"{name}: the latents have {getattr(self, name)!r}, the config {value!r}"
            for name, value in wanted.items()
            if getattr(self, name) != value
        ]


def read_manifest(folder: AnyPath) -> Manifest:
    """The manifest of a finished folder.

    Raises:
      UserError: there is none, the encoding is not finished, or the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    if path.is_file():
        return Manifest.from_json(path.read_text(), path)
    if (folder / UNFINISHED_FILE).is_file():
        raise UserError(
            f"{str(folder)!r}: encoding is not finished, run the same command again to go on"
        )
    raise UserError(
        f"{str(folder)!r} holds no latents: write them with python -m dydilit_jax.encode "
        f"--config=... --out={folder}"
    )


def write_atomically(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whichever process does so too."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
