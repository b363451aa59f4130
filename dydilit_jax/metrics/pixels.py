"""Scores for small images, straight from their pixels.

`pixel_frechet` is the Frechet distance of raw pixel vectors and is not FID. `label_agreement` is
the share of samples in which a support-vector machine, fitted on the real images, sees the label
that was asked for.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Features, to_levels
from dydilit_jax.metrics.frechet import frechet_distance, moments

FLOOR_SPLITS = 20
LARGEST_SIDE = 64  # of images whose pixels are features; a covariance is of (H W C)^2 numbers


class PixelFeatures:
    """The pixels themselves, in [-1, 1], as features of small images (features.Extractor).

    Args:
      image_shape: (H, W, C).

    Raises:
      UserError: images of more than LARGEST_SIDE pixels a side.
    """

    name = "pixel"
    spatial_width = 0
    num_classes = 0

    def __init__(self, image_shape: tuple[int, int, int]):
        check_small("pixels", image_shape)
        height, width, channels = self.image_shape = image_shape
        self.width = height * width * channels
        self.description = f"pixels of images {height} x {width} x {channels} in [-1, 1]"
        self.checksum = hashlib.sha256(self.description.encode()).hexdigest()
        self.parameters: Any = {}

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Features (n, H W C) of images (n, H, W, C)."""
        pixels = levels_of(images, self.image_shape) / 127.5 - 1.0
        return Features(pixels.reshape(len(images), -1))


def check_small(features: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UserError where images are too large for features of this name."""
    if max(image_shape[:2]) > LARGEST_SIDE:
        raise UserError(
            f"--features={features} is for images of up to {LARGEST_SIDE} pixels a side, these "
            f"have {image_shape[0]}: use --features=inception"
        )


def levels_of(images: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
    """Images as features.to_levels has them, but with their own channels; checks their shape."""
    if images.shape[1:] != image_shape:
        raise UserError(f"images of {images.shape[1:]}, features of {image_shape}: not one size")
    return to_levels(images)[..., : image_shape[-1]]


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
