"""Scores for small images, straight from their pixels.

`pixel_frechet` is the Frechet distance of raw pixel vectors and is not FID. `label_agreement` is
the share of samples in which a support-vector machine, fitted on the real images, sees the label
that was asked for.
"""

from __future__ import annotations

import numpy as np

from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.frechet import frechet_distance, moments

FLOOR_SPLITS = 20


def read_all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source as vectors (n, H * W * C) float64, and labels (n,)."""
    examples = [source[i] for i in range(len(source))]
    images = np.stack([example["image"] for example in examples]).astype(np.float64)
    labels = np.asarray([example["label"] for example in examples])
    return images.reshape(len(images), -1), labels


def label_agreement(
    samples: np.ndarray, wanted: np.ndarray, images: np.ndarray, labels: np.ndarray
) -> float:
    """Share of samples (m, D) that an SVM fitted on (images (n, D), labels (n,)) sees as wanted."""
    from sklearn.svm import SVC

    classifier = SVC(kernel="rbf", gamma="scale", C=10.0).fit(images, labels)
    return float(np.mean(classifier.predict(samples) == wanted))


def frechet_floor(images: np.ndarray, *, seed: int = 0, splits: int = FLOOR_SPLITS) -> float:
    """Mean distance between two random halves of the images (n, D), over so many splits."""
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(splits):
        order = rng.permutation(len(images))
        half = len(images) // 2
        distances.append(
            frechet_distance(moments(images[order[:half]]), moments(images[order[half:]]))
        )
    return float(np.mean(distances))


def pixel_scores(samples: np.ndarray, wanted: np.ndarray, source: Source) -> dict[str, float]:
    """Scores samples (m, H, W, C) in [-1, 1] drawn for labels `wanted` (m,) against a source.

    Returns:
      `label_agreement` in [0, 1], `pixel_frechet` of samples and source, and
      `pixel_frechet_floor`, the same distance between two halves of the source.

    Raises:
      UserError: samples that are not finite or not of the source's shape.
    """
    if samples.shape[1:] != tuple(source.image_shape):
        raise UserError(f"samples have shape {samples.shape[1:]}, the data {source.image_shape}")
    if not np.all(np.isfinite(samples)):
        raise UserError("samples are not finite, so they cannot be scored")
    images, labels = read_all(source)
    vectors = np.clip(samples, -1.0, 1.0).reshape(len(samples), -1).astype(np.float64)
    return {
        "label_agreement": label_agreement(vectors, wanted, images, labels),
        "pixel_frechet": frechet_distance(moments(vectors), moments(images)),
        "pixel_frechet_floor": frechet_floor(images),
    }
