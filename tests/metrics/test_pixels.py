import numpy as np
import pytest

from dydilit_jax.data import sources
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.pixels import frechet_floor, label_agreement, pixel_scores, read_all


@pytest.fixture(scope="module")
def digits():
    return sources.digits()


@pytest.fixture(scope="module")
def real(digits):
    images, labels = read_all(digits)
    return images.reshape(-1, 8, 8, 1), labels


@pytest.fixture(scope="module")
def scores(digits, real):
    return pixel_scores(real[0].astype(np.float32), real[1], digits)


def test_everything_is_read_in_order(digits, real):
    images, labels = real
    assert images.shape == (1797, 8, 8, 1)
    for index in (0, 7, 1796):
        np.testing.assert_array_equal(images[index], digits[index]["image"])
        assert labels[index] == digits[index]["label"]


def test_real_images_agree_with_their_labels_and_lie_at_no_distance(scores):
    assert scores["label_agreement"] == 1.0
    assert abs(scores["pixel_frechet"]) < 1e-6
    assert scores.keys() == {"label_agreement", "pixel_frechet", "pixel_frechet_floor"}


def test_images_that_were_not_fitted_agree_too(real):
    images, labels = real[0].reshape(1797, -1), real[1]
    assert label_agreement(images[1::2], labels[1::2], images[::2], labels[::2]) > 0.97


def test_shuffled_labels_agree_by_chance(real):
    images, labels = real[0].reshape(1797, -1), real[1]
    wanted = np.random.default_rng(0).permutation(labels)
    assert 0.07 < label_agreement(images, wanted, images, labels) < 0.13


def test_floor_is_what_halves_of_the_real_images_differ_by(scores, real):
    floor = scores["pixel_frechet_floor"]
    images = real[0].reshape(1797, -1)
    variance = np.trace(np.cov(images, rowvar=False))
    assert 0.0 < floor < 0.05 * variance
    # It is an average, which one seed or another hardly changes, and larger for fewer images.
    assert frechet_floor(images, seed=1) == pytest.approx(floor, rel=0.1)
    assert frechet_floor(images[:400]) > 2 * floor
    assert frechet_floor(images) == floor


def test_worse_images_score_worse(digits, real, scores):
    images, labels = real
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1.0, 1.0, images.shape)
    noisy = pixel_scores(0.5 * images + 0.5 * noise, labels, digits)
    random = pixel_scores(noise, labels, digits)
    assert 1.0 >= noisy["label_agreement"] > random["label_agreement"]
    floor = scores["pixel_frechet_floor"]
    assert floor < noisy["pixel_frechet"] < random["pixel_frechet"]


def test_what_lies_outside_the_range_is_clipped(digits, real, scores):
    # Black and white pixels pushed outwards: clipping brings them back.
    beyond = np.where(np.abs(real[0]) == 1.0, 3.0 * real[0], real[0])
    assert pixel_scores(beyond, real[1], digits) == pytest.approx(scores, abs=1e-9)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(digits, real, value):
    samples = real[0][:20].copy()
    samples[3, 2, 2, 0] = value
    with pytest.raises(UserError, match="not finite"):
        pixel_scores(samples, real[1][:20], digits)


def test_samples_of_another_shape_are_refused(digits):
    with pytest.raises(UserError, match=r"samples have shape \(8, 8, 3\)"):
        pixel_scores(np.zeros((4, 8, 8, 3)), np.arange(4), digits)
