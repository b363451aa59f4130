"""What samples are scored by and against: a network of features, and a reference in them.

The features `pixels` and `classifier` need no file. Their reference is made of the run's own images
where none is given, and kept with the classifier beside it:

    FOLDER/pixels.npz, FOLDER/classifier.npz, FOLDER/classifier.classifier.safetensors
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from dydilit_jax.agreement import of_first_process, raised_together
from dydilit_jax.config import Config
from dydilit_jax.data.image_files import ImageFiles
from dydilit_jax.data.load import load_images
from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.metrics.classifier import STEPS, load_classifier, train_classifier
from dydilit_jax.metrics.extractors import EXTRACTORS, load_extractor
from dydilit_jax.metrics.features import Extractor, compile_extractor
from dydilit_jax.metrics.pixels import PixelFeatures, check_small
from dydilit_jax.metrics.references import (
    Reference,
    image_shape_of,
    read_reference,
    write_reference,
)
from dydilit_jax.metrics.rows import KeptRows
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.training.scoring import (
    SourceImages,
    batches,
    check_count,
    fitting_batch,
    read_images,
)

SMALL = ("pixels", "classifier")
FEATURES = (*EXTRACTORS, *SMALL)

REFERENCES = "references"  # of a workdir, where its own are kept
REFERENCE_IMAGES = 10_000  # kept in a reference for precision and recall, as in ADM's
REFERENCE_BATCH = 128
KEPT_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The features that are asked for.

    Attributes:
      features: one of FEATURES.
      weights: file of inception's, or folder or name of dinov2's; empty to fetch them.
      sha256: checksum that the file must have; empty for the known one.
      variant: how the network prepares images or positions; see metrics/extractors.py.
    """

    features: str
    weights: str = ""
    sha256: str = ""
    variant: str = ""

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise unknown_name("features", self.features, FEATURES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What samples are compared by and with.

    Attributes:
      extractor: the network of features.
      reference: of the real images.
      path: its file.
    """

    extractor: Extractor
    reference: Reference
    path: Path

    @property
    def warnings(self) -> list[str]:
        """What could not be checked of them, a line each."""
        if self.reference.image_shape is not None:
            return []
        return [
            f"reference {str(self.path)!r} does not say of which size its images are: scores mean "
            "something only if they are as large as the samples"
        ]


def real_images(config: Config, image_shape: tuple[int, int, int]) -> Source:
    """The images of a config's data set, of the shape of its samples.

    Raises:
      UserError: as load_images; or the data set has images of another shape.
    """
    data = dataclasses.replace(config.data, image_size=0)
    source = load_images(data, image_size=image_shape[0], channels=image_shape[-1])
    if tuple(source.image_shape) != image_shape:
        raise UserError(
            f"data source {config.data.source!r} has images {source.image_shape}, the samples are "
            f"{image_shape}"
        )
    return source


def classifier_beside(reference: Path) -> Path:
    """Where the classifier of a reference is."""
    return reference.with_name(reference.stem + ".classifier.safetensors")


def open_comparison(
    choice: Choice,
    reference: Path | None,
    *,
    image_shape: tuple[int, int, int],
    own: Callable[[], Source] | None,
    folder: Path,
    mesh: Mesh,
    rows: bool = True,
    row_folder: Path | None = None,
) -> Comparison:
    """Features and reference; both are made where they may be and are not there. A collective.

    Args:
      choice: the features.
      reference: an .npz; None for the run's own, which is made if it is not there.
      image_shape: of the samples, (H, W, C).
      own: opens the run's own images; None where there is no run.
      folder: where an own reference is kept.
      mesh: what features are computed over.
      rows: whether precision, recall or kernel distance will be asked for.
      row_folder: where computed feature rows are kept; None for memory.

    Raises:
      UserError: weights or a reference that are missing, damaged, or do not fit each other or the
        samples.
    """
    if choice.features in SMALL:
        check_small(choice.features, image_shape)
    path = reference or folder / f"{choice.features}.npz"
    there = bool(of_first_process(path.is_file()))
    if reference is not None and not there:
        raise UserError(f"reference {str(path)!r} does not exist: {_how_to_make(choice, path)}")
    if not there and (choice.features not in SMALL or own is None):
        raise UserError(
            f"a reference is missing (--reference, evaluation.reference): an .npz in ADM's layout; "
            f"{_how_to_make(choice, Path('REFERENCE.npz'))}"
        )
    if there:
        _check_image_shape(path, image_shape)
    source = None if there or own is None else own()
    extractor = load_features(
        choice, image_shape=image_shape, classifier=classifier_beside(path), source=source
    )
    if source is not None:
        make_reference(path, SourceImages(source), extractor, mesh)
    read = read_reference(path, extractor, mesh, rows=rows, folder=row_folder)
    return Comparison(extractor=extractor, reference=read, path=path)


def _how_to_make(choice: Choice, path: Path) -> str:
    return (
        f"python -m dydilit_jax.evaluate --make_reference={path} --features={choice.features} "
        "--config=... makes one"
    )


def _check_image_shape(path: Path, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where a reference's images are of another size than the samples."""
    found = image_shape_of(path)
    if found is not None and found[:2] != image_shape[:2]:
        raise UserError(
            f"reference {str(path)!r} is of images {found[0]} x {found[1]}, the samples are "
            f"{image_shape[0]} x {image_shape[1]}: use a reference of their size"
        )


def load_features(
    choice: Choice,
    *,
    image_shape: tuple[int, int, int],
    classifier: Path,
    source: Source | None,
) -> Extractor:
    """The network of features. A collective.

    Args:
      choice: which.
      image_shape: of the images, (H, W, C).
      classifier: its file, if it is one.
      source: what a classifier is trained on if that file is not there; None for an error.

    Raises:
      UserError: weights that are missing, damaged or of other images.
    """
    if choice.features == "pixels":
        return PixelFeatures(image_shape)
    if choice.features != "classifier":
        with raised_together():
            return load_extractor(
                choice.features, choice.weights, sha256=choice.sha256, variant=choice.variant
            )
    if source is not None and not of_first_process(classifier.is_file()):
        with raised_together():
            if jax.process_index() == 0:
                with told(STEPS, "step", "training a classifier, once") as update:
                    train_classifier(source, classifier, progress=update)
    with raised_together():
        return load_classifier(classifier, image_shape)


class ChosenRows(KeptRows):
    """The feature rows of some images alone.

    Args:
      width: of a row.
      chosen: indices of the images.
      folder: as KeptRows.
    """

    def __init__(self, width: int, chosen: np.ndarray, folder: Path | None):
        super().__init__(width, folder)
        self._chosen = chosen

    def add(self, rows: np.ndarray, indices: np.ndarray) -> None:
        """Takes what of the rows (m, D) of images (m,) is chosen."""
        wanted = np.isin(indices, self._chosen)
        super().add(rows[wanted], indices[wanted])


def make_reference(
    path: Path,
    files: ImageFiles,
    extractor: Extractor,
    mesh: Mesh,
    *,
    num: int = 0,
    kept: int = REFERENCE_IMAGES,
    batch_size: int = REFERENCE_BATCH,
    row_folder: Path | None = None,
    state: Path | None = None,
    save: Callable[[Scorer, int], object] = lambda scorer, done: None,
) -> None:
    """Writes a reference of images. A collective.

    Args:
      path: the .npz; it appears whole or not at all.
      files: the images.
      extractor: of the features.
      mesh: what computes them.
      num: of the images, the first so many; 0 for all.
      kept: so many images, drawn at random, are kept for precision and recall.
      batch_size: images at once.
      row_folder: where their features are kept meanwhile; None for memory.
      state: where a stopped one left its sums; None to start anew.
      save: told of the sums and the number of images done after every batch.

    Raises:
      UserError: too few images, or one that cannot be read.
    """
    num = num or len(files)
    check_count(min(num, kept))
    rng = np.random.default_rng(KEPT_SEED)
    chosen = np.sort(rng.choice(num, min(kept, num), replace=False))
    scorer = Scorer(
        extractor,
        scores=("frechet", "spatial_frechet", "precision_recall"),
        folder=row_folder,
    )
    scorer.rows = ChosenRows(extractor.width, chosen, row_folder)
    first = scorer.restore(state) if state is not None else 0
    extract = compile_extractor(extractor, mesh)
    images = read_images(files, mesh)
    batch_size = fitting_batch(batch_size, num, mesh)
    with told(num, "image", "computing a reference", first) as update:
        for indices, pixels in batches(images, num, batch_size=batch_size, first=first):
            features = extract(pixels)
            with raised_together():
                scorer.add(features, indices)
            update(int(np.sum(indices >= 0)))
            save(scorer, int(indices.max()) + 1)
    parts = (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    reference = dataclasses.replace(scorer.reference(), image_shape=files.image_shape)
    write_reference(path, reference, map(files.read, parts))


@contextmanager
def told(total: int, unit: str, what: str, first: int = 0) -> Iterator[Callable[[int], Any]]:
    """A progress bar of the first process, while something long is done."""
    with tqdm(
        total=total, initial=first, unit=unit, desc=what, disable=jax.process_index() > 0
    ) as bar:
        yield bar.update


def wants_rows(scores: tuple[str, ...]) -> bool:
    """Whether any of these scores needs feature rows of the reference."""
    return "kernel" in scores or "precision_recall" in scores
