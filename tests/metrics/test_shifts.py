"""Known changes of real images make every score worse: benchmarks.metric_shifts in small.

Inception has random weights and sees CIFAR-10's images at 96 x 96; fixtures/cifar10.npz is of
tests/fixtures/make_shift_fixtures.py.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.metric_shifts import BLUR, IMBALANCE, NOISE, Images, measure
from dydilit_jax.data.transforms import decode_image
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.inception import InceptionExtractor
from dydilit_jax.metrics.inception_weights import filled
from dydilit_jax.metrics.resizing import resize, tf1
from tests.metrics.weights import inception_tensors

FIXTURE = Path(__file__).parent / "fixtures" / "cifar10.npz"
SIDE, EVERY = 96, 8
LEVELS = {"blur": BLUR, "noise": NOISE, "one class": IMBALANCE}


class SmallInception(InceptionExtractor):
    """Inception of smaller images, and every eighth of its pool features alone."""

    name = "small_inception"
    width = InceptionExtractor.width // EVERY
    spatial_width = 4 * 4 * 7
    num_classes = 0

    def __init__(self):
        super().__init__(filled(inception_tensors()), "random")
        self._prepare = lambda levels: (resize(levels, SIDE, tf1) - 128.0) / 128.0

    def apply(self, parameters, images):
        """Features of images (n, H, W, 3)."""
        features = super().apply(parameters, images)
        return Features(features.pool[:, ::EVERY], features.spatial)


@pytest.fixture(scope="module")
def images():
    """Real ones: two balanced halves of 100, and 100 of one class."""
    with np.load(FIXTURE) as file:
        ends = np.cumsum(file["lengths"])
        files = np.split(file["jpeg"], ends[:-1])
    pixels = [np.asarray(decode_image(each.tobytes(), 3)) for each in files]
    return Images(*np.split(np.stack(pixels), 3))


@pytest.fixture(scope="module")
def rows(images):
    """Scores by shift and strength; strength 0 is the halves as they are."""
    found, _ = measure(images, SmallInception(), 100, 0)
    return {(row["shift"], row["strength"]): row for row in found}


def along(rows, shift, score):
    """A score of the halves, then of a shift's strengths."""
    keys = [("halves", 0.0), *((shift, strength) for strength in LEVELS[shift])]
    return np.array([rows[key][score] for key in keys])


def test_the_fixture_is_real_and_no_image_is_there_twice(images):
    joined = np.concatenate(images)
    assert joined.shape == (300, 32, 32, 3)
    assert len({image.tobytes() for image in joined}) == 300
    # Neighbouring pixels of photographs are alike.
    steps = np.abs(np.diff(joined.astype(float), axis=2)).mean()
    assert 2.0 < steps < 20.0
    assert joined.std() > 50.0


@pytest.mark.parametrize("shift", LEVELS)
@pytest.mark.parametrize("score", ["frechet", "spatial_frechet", "kernel"])
def test_distances_grow(rows, shift, score):
    values = along(rows, shift, score)
    print(shift, score, values)
    assert np.all(np.diff(values) > 0), values
