"""Features that tests and tests/fixtures/make_score_fixtures.py make alike, and who they are of."""

import dataclasses
from typing import Any

import numpy as np

from dydilit_jax.metrics.features import Features

WIDTH, SPATIAL, CLASSES = 128, 63, 20
SAMPLES, REFERENCE = 700, 500
SPLIT, SUBSETS, SUBSET_SIZE = 100, 20, 150


def features(count: int, seed: int, shift: float = 0.0) -> Features:
    """Positive, skewed, correlated features as a network's are, and logits; numpy, float32."""
    # RandomState's streams never change, Generator's may.
    rng = np.random.RandomState(seed)
    mixing = np.random.RandomState(0).randn(WIDTH, WIDTH) / np.sqrt(WIDTH)
    latent = rng.randn(count, WIDTH) * np.linspace(0.05, 2.0, WIDTH)
    arrays = (
        np.maximum(latent @ mixing + 0.4 + shift, 0.0),
        np.abs(rng.randn(count, SPATIAL)) * (1.0 + shift),
        3.0 * rng.randn(count, CLASSES),
    )
    return Features(*(array.astype(np.float32) for array in arrays))  # type: ignore[arg-type]


def samples() -> Features:
    """Features of the samples."""
    return features(SAMPLES, 1, 0.1)


def reference() -> Features:
    """Features of the reference."""
    return features(REFERENCE, 2)


@dataclasses.dataclass
class FakeExtractor:
    """Says what the features above are of; its `apply` takes pixels for features."""

    name: str = "inception"
    description: str = "made"
    checksum: str = "0" * 64
    width: int = WIDTH
    spatial_width: int = SPATIAL
    num_classes: int = CLASSES
    parameters: Any = None

    def apply(self, parameters: Any, images: Any) -> Features:
        """The first pixels of each image, as float32 in [0, 1]."""
        pixels = images.reshape(len(images), -1).astype("float32") / 255.0
        return Features(
            pixels[:, : self.width],
            pixels[:, : self.spatial_width] if self.spatial_width else None,
            pixels[:, : self.num_classes] if self.num_classes else None,
        )
