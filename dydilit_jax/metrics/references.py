"""What samples are compared with: a file of moments and images in ADM's layout, read or written.

ADM's reference batches (`VIRTUAL_imagenet256_labeled.npz` and its kin) hold

    mu, sigma        (2048,), (2048, 2048)    of the whole training set, for FID
    mu_s, sigma_s    (2023,), (2023, 2023)    likewise, for sFID
    arr_0            (10000, H, W, 3) uint8   some images, for precision and recall (and KID) alone

What is written here has the same arrays, so that ADM's evaluator reads it, and besides

    count            images that the moments are of
    extractor, extractor_checksum             what the features are of
    features         (n, D) float32 of arr_0's images, so that none need be computed again
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from dydilit_jax.metrics.features import Extractor
from dydilit_jax.metrics.frechet import Moments


class Rows(Protocol):
    """Feature rows of which each process holds some; read in blocks."""

    def count(self) -> int:
        """Number of rows that this process holds."""
        ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (m,) int64 and rows (m, D) float32 of this process from `start` to `stop`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
      extractor: name of the extractor; empty where the file does not say (ADM's: `inception`).
      extractor_checksum: of its weights; empty where the file does not say.
      pool: moments of pool features.
      spatial: of spatial features; None without.
      count: images that the moments are of; 0 where the file does not say.
      rows: pool features of images, for precision, recall and kernel distance; None without.
      checksum: sha256 of the file that it was read from; empty where it was computed.
    """

    extractor: str
    extractor_checksum: str
    pool: Moments
    spatial: Moments | None
    count: int
    rows: Rows | None
    checksum: str = ""


def read_reference(
    path: Path,
    extractor: Extractor,
    mesh: Mesh,
    *,
    rows: bool = True,
    batch_size: int = 128,
    folder: Path | None = None,
) -> Reference:
    """Reads a reference; a collective.

    A file without `mu` (a bare batch of images, as ADM's evaluator takes too) gets its moments from
    its images. Features of `arr_0` are computed over the mesh where they are needed and not in the
    file; images are read batch by batch.

    Args:
      path: the .npz, which every process reads.
      extractor: computes what the file lacks.
      mesh: where it is computed.
      rows: whether precision, recall or kernel distance will be asked for.
      batch_size: images at once.
      folder: where computed rows are kept; None for memory.

    Raises:
      UserError: no such file, no .npz, arrays that are missing or of other shapes than the
        extractor's, or moments of other weights.
    """
    raise NotImplementedError


def make_reference(
    batches: Iterable[np.ndarray],
    extractor: Extractor,
    mesh: Mesh,
    *,
    spatial: bool = True,
    rows: bool = True,
    folder: Path | None = None,
) -> Reference:
    """Computes a reference from images; a collective.

    Args:
      batches: images (n, H, W, C) uint8 or in [-1, 1], the same on every process; n may differ but
        each shape is compiled once; it is filled up to a multiple of the devices.
      extractor, mesh: what computes.
      spatial: whether spatial moments are wanted.
      rows: whether pool features are kept.
      folder: where they are kept; None for memory.
    """
    raise NotImplementedError


def write_reference(path: Path, reference: Reference, images: Iterable[np.ndarray] = ()) -> None:
    """Writes a reference in ADM's layout (see above); a collective, the first process writes.

    Args:
      path: the .npz; it appears whole or not at all.
      reference: its rows are written as `features`, in the order of their indices.
      images: uint8 batches of the images of the rows in that order, written as `arr_0`, which
        ADM's evaluator needs; none: the file has no `arr_0`.
    """
    raise NotImplementedError


def read_images(path: Path, batch_size: int) -> Iterable[np.ndarray]:
    """The images `arr_0` (n, H, W, C) uint8 of an .npz in batches, never all in memory.

    Raises:
      UserError: no such file, or no uint8 images in it.
    """
    raise NotImplementedError
