"""Known changes of real images make every score worse: benchmarks.metric_shifts in small.

Inception has random weights and sees CIFAR-10's images at 75 x 75; fixtures/cifar10.npz is of
tests/fixtures/make_shift_fixtures.py.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.metric_shifts import Images, measure
from dydilit_jax.data.transforms import decode_image
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.inception import InceptionExtractor
from dydilit_jax.metrics.inception_weights import filled
from dydilit_jax.metrics.resizing import resize, tf1
from tests.metrics.weights import inception_tensors

FIXTURE = Path(__file__).parent / "fixtures" / "cifar10.npz"
SIDE, EVERY = 75, 8
STRENGTHS = {"blur": (0.5, 1.0), "noise": (12.0, 32.0), "one class": (0.5, 1.0)}
SCORES = ("frechet", "spatial_frechet", "kernel")
MARGIN = 1.2  # of a Frechet distance to the one before


class SmallInception(InceptionExtractor):
    """Inception of smaller images, and every eighth of its pool features alone."""

    name = "small_inception"
    width = InceptionExtractor.width // EVERY
    spatial_width = 3 * 3 * 7
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
    """Real ones: two balanced halves of 200, and 200 of one class."""
    with np.load(FIXTURE) as file:
        ends = np.cumsum(file["lengths"])
        files = np.split(file["jpeg"], ends[:-1])
    pixels = [np.asarray(decode_image(each.tobytes(), 3)) for each in files]
    return Images(*np.split(np.stack(pixels), 3))


@pytest.fixture(scope="module")
def rows(images):
    """Scores by shift and strength; strength 0 is the halves as they are."""
    found, _ = measure(images, SmallInception(), 200, 0, STRENGTHS, SCORES)
    return {(row["shift"], row["strength"]): row for row in found}


def along(rows, shift, score):
    """A score of the halves, then of a shift's strengths."""
    keys = [("halves", 0.0), *((shift, strength) for strength in STRENGTHS[shift])]
    return np.array([rows[key][score] for key in keys])


def test_the_fixture_is_real_and_no_image_is_there_twice(images):
    joined = np.concatenate(images)
    assert joined.shape == (600, 32, 32, 3)
    assert len({image.tobytes() for image in joined}) == 600
    # Neighbouring pixels of photographs are alike.
    steps = np.abs(np.diff(joined.astype(float), axis=2)).mean()
    assert 2.0 < steps < 20.0
    assert joined.std() > 50.0


@pytest.mark.parametrize("shift", STRENGTHS)
@pytest.mark.parametrize("score", ["frechet", "spatial_frechet"])
def test_frechet_distances_grow(rows, shift, score):
    values = along(rows, shift, score)
    assert np.all(values[1:] > MARGIN * values[:-1]), values


@pytest.mark.parametrize("shift", STRENGTHS)
def test_kernel_distances_grow(rows, shift):
    """By more than what drawing subsets leaves open."""
    values, errors = (along(rows, shift, score) for score in ("kernel", "kernel_standard_error"))
    assert np.all(np.diff(values) > 2.0 * np.hypot(errors[1:], errors[:-1])), values


def test_halves_are_near_zero(rows):
    """Beside the strongest of each shift; the kernel distance, which has no bias, the more so."""
    halves = rows["halves", 0.0]
    for shift in STRENGTHS:
        for score in ("frechet", "spatial_frechet"):
            assert halves[score] < 0.4 * along(rows, shift, score)[-1]
        assert abs(halves["kernel"]) < 0.2 * along(rows, shift, "kernel")[-1]
