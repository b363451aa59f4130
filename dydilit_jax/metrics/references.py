"""What samples are compared with: a file of moments and images in ADM's layout, read or written.

ADM's reference batches (`VIRTUAL_imagenet256_labeled.npz` and its kin) hold

    mu, sigma        (2048,), (2048, 2048)    of the whole training set, for FID
    mu_s, sigma_s    (2023,), (2023, 2023)    likewise, for sFID
    arr_0            (10000, H, W, 3) uint8   some images, for precision and recall (and KID) alone

What is written here has the same arrays, so that ADM's evaluator reads it, and besides

    count            images that the moments are of
    extractor, extractor_checksum, description    what the features are of
    image_shape      (3,) height, width and channels of the images
    features         (n, D) float32 of arr_0's images, so that none need be computed again
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.lib.npyio import NpzFile

from dydilit_jax.agreement import raised_together
from dydilit_jax.autoencoders.weights import sha256_of
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import every_device
from dydilit_jax.metrics.features import Extractor, compile_extractor
from dydilit_jax.metrics.frechet import Moments
from dydilit_jax.metrics.npz import blocks, opened, shape_of, write_blocks
from dydilit_jax.metrics.rows import KeptRows, Lookup
from dydilit_jax.metrics.scoring import Scorer, add_images
from dydilit_jax.metrics.statistics import Reference, check_name

ROWS_AT_ONCE = 2048
MOMENTS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


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
    with opened(path) as file:
        names = set(file.files)
        texts = {
            name: str(file[name]) if name in names else ""
            for name in ("extractor", "extractor_checksum", "description")
        }
        if texts["extractor"]:  # Said before what follows from it, other numbers of features.
            check_name(texts["extractor"], extractor)
        count = int(file["count"]) if "count" in names else 0
        shape = _image_shape(file)
        pool = _moments(file, path, "pool", extractor.width, count)
        spatial = _moments(file, path, "spatial", extractor.spatial_width, count)
    checksum = sha256_of(path)
    if pool is None and "arr_0" not in names:
        raise UserError(
            f"{str(path)!r} holds neither moments (mu, sigma) nor images (arr_0), expected an .npz "
            "as ADM's references are"
        )
    reference = None
    if pool is not None:
        reference = Reference(
            **texts,
            pool=pool,
            spatial=spatial,
            count=count,
            rows=None,
            checksum=checksum,
            image_shape=shape,
        )
        reference.check(extractor)
        if not rows or names.isdisjoint({"features", "arr_0"}):
            return reference
    if reference is not None and "features" in names:
        kept: KeptRows | None = _kept_features(path, extractor.width, folder)
    else:
        made = make_reference(
            read_images(path, batch_size),
            extractor,
            mesh,
            spatial=reference is None,
            rows=rows,
            folder=folder,
        )
        reference, kept = reference or made, made.rows
    return dataclasses.replace(reference, rows=kept, checksum=checksum)


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

    Raises:
      UserError: fewer than two images.
    """
    scores = ["frechet"]
    scores += ["spatial_frechet"] if spatial else []
    scores += ["precision_recall"] if rows else []
    scorer = Scorer(extractor, scores=scores, folder=folder)
    batches = iter(batches)
    head = next(batches, None)
    if head is None:
        raise UserError("a reference needs images, got none")
    images = itertools.chain([head], batches)
    add_images(scorer, compile_extractor(extractor, mesh), images, mesh)
    return dataclasses.replace(scorer.reference(), image_shape=head.shape[1:])


def write_reference(path: Path, reference: Reference, images: Iterable[np.ndarray] = ()) -> None:
    """Writes a reference in ADM's layout (see above); a collective, the first process writes.

    Args:
      path: the .npz; it appears whole or not at all.
      reference: its rows are written as `features`, in the order of their indices.
      images: uint8 batches of the images of the rows in that order, written as `arr_0`, which
        ADM's evaluator needs; none: the file has no `arr_0`.

    Raises:
      UserError: images that are not uint8, or not as many as rows; a file that cannot be written.
        What one process raises, its rows or the images being unreadable, all raise.
    """
    lookup = None if reference.rows is None else Lookup(reference.rows, every_device())
    features = _features(lookup)
    with raised_together():
        try:
            if jax.process_index() == 0:
                _write(path, reference, lookup, features, images)
        finally:
            # What the first process writes comes from all of them, until it is told that it failed.
            for _ in features:
                pass


def _write(
    path: Path,
    reference: Reference,
    lookup: Lookup | None,
    features: Iterator[np.ndarray],
    images: Iterable[np.ndarray],
) -> None:
    """What the first process does of `write_reference`."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(unfinished, "w", allowZip64=True) as archive:
            for name, array in _small(reference).items():
                write_blocks(archive, name, array.shape, [array])
            if lookup is not None:
                shape: tuple[int, ...] = (len(lookup), lookup.rows.width)
                write_blocks(archive, "features", shape, features)
            written = iter(images)
            head = next(written, None)
            if head is not None:
                if head.dtype != np.uint8 or lookup is None:
                    raise UserError(
                        f"images of a reference must be uint8 and have rows, got {head.dtype} and "
                        f"{'no rows' if lookup is None else 'rows'}"
                    )
                shape = (len(lookup), *head.shape[1:])
                write_blocks(archive, "arr_0", shape, itertools.chain([head], written))
        unfinished.replace(path)
    except OSError as error:
        raise UserError(f"reference {str(path)!r} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _small(reference: Reference) -> dict[str, np.ndarray]:
    """The arrays of a reference but those of rows and images."""
    small = {
        "extractor": np.array(reference.extractor),
        "extractor_checksum": np.array(reference.extractor_checksum),
        "description": np.array(reference.description),
        "count": np.array(reference.count),
    }
    if reference.image_shape is not None:
        small["image_shape"] = np.array(reference.image_shape)
    for part, moments in (("pool", reference.pool), ("spatial", reference.spatial)):
        if moments is not None:
            mean, covariance = MOMENTS[part]
            small |= {mean: moments.mean, covariance: moments.covariance}
    return small


def _features(lookup: Lookup | None) -> Iterator[np.ndarray]:
    """Rows of all processes in the order of indices, block by block; a collective."""
    count = 0 if lookup is None else len(lookup)
    for start in range(0, count, ROWS_AT_ONCE):
        assert lookup is not None
        yield lookup.take(np.arange(start, min(start + ROWS_AT_ONCE, count)))


def image_shape_of(path: Path) -> tuple[int, ...] | None:
    """(H, W, C) of a reference's images; None where the file does not say.

    Raises:
      UserError: no such file, or no .npz.
    """
    with opened(path) as file:
        return _image_shape(file)


def _image_shape(file: NpzFile) -> tuple[int, ...] | None:
    if "image_shape" in file.files:
        return tuple(file["image_shape"].tolist())
    return shape_of(file, "arr_0")[1:] if "arr_0" in file.files else None


def _kept_features(path: Path, width: int, folder: Path | None) -> KeptRows:
    """This process's share of the array `features` of a file."""
    rows, first = KeptRows(width, folder), 0
    for number, block in enumerate(blocks(path, "features", ROWS_AT_ONCE)):
        if block.ndim != 2 or block.shape[1] != width:
            raise UserError(f"{str(path)!r}: features are {block.shape[1:]}, expected ({width},)")
        if number % jax.process_count() == jax.process_index():
            rows.add(block, np.arange(first, first + len(block)))
        first += len(block)
    return rows


def _moments(file: NpzFile, path: Path, part: str, width: int, count: int) -> Moments | None:
    """The moments `part` of a file; None where it has none, or the extractor no such features."""
    mean, covariance = MOMENTS[part]
    if mean not in file.files or width == 0:
        return None
    if covariance not in file.files:
        raise UserError(f"{str(path)!r} has an array {mean} but no {covariance}")
    result = Moments(
        np.asarray(file[mean], np.float64), np.asarray(file[covariance], np.float64), count
    )
    if result.mean.shape != (width,) or result.covariance.shape != (width, width):
        raise UserError(
            f"{str(path)!r}: {mean} {result.mean.shape} and {covariance} "
            f"{result.covariance.shape}, expected {width} features"
        )
    return result


def read_images(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """The images `arr_0` (n, H, W, C) uint8 of an .npz in batches, never all in memory.

    Raises:
      UserError: no such file, or no uint8 images in it.
    """
    with opened(path) as file:
        if "arr_0" not in file.files:
            raise UserError(f"{str(path)!r} has no array arr_0 of images")
    for batch in blocks(path, "arr_0", batch_size):
        if batch.dtype != np.uint8 or batch.ndim != 4:
            raise UserError(
                f"{str(path)!r}: arr_0 is {batch.dtype} with {batch.ndim} dimensions, expected "
                "images (n, H, W, C) uint8"
            )
        yield batch
