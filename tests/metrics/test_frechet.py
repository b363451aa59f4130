"""The Frechet distance against scipy's matrix square root and against closed forms."""

import warnings

import numpy as np
import pytest
import scipy.linalg

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.frechet import (
    Moments,
    SingularCovarianceWarning,
    frechet_distance,
    moments,
)
from dydilit_jax.metrics.moments import RunningMoments


def random_moments(rng: np.random.Generator, width: int, rank: int) -> Moments:
    factor = rng.standard_normal((width, rank))
    return Moments(rng.standard_normal(width), factor @ factor.T)


def by_scipy(first: Moments, second: Moments) -> float:
    root = np.real(scipy.linalg.sqrtm(first.covariance @ second.covariance))
    shift = first.mean - second.mean
    return float(
        shift @ shift + np.trace(first.covariance + second.covariance) - 2 * np.trace(root)
    )


@pytest.mark.parametrize("width", [1, 3, 20])
def test_against_scipy(width):
    rng = np.random.default_rng(width)
    for _ in range(5):
        first, second = (random_moments(rng, width, width + 2) for _ in range(2))
        np.testing.assert_allclose(
            frechet_distance(first, second), by_scipy(first, second), rtol=1e-6, atol=1e-8
        )


def test_moments_are_numpys_and_unbiased():
    features = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    result = moments(features)
    centred = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(result.mean, features.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(result.covariance, centred.T @ centred / 49)
    assert result.covariance.dtype == np.float64


def test_the_same_features_are_at_distance_zero():
    features = np.random.default_rng(1).standard_normal((100, 8))
    assert abs(frechet_distance(moments(features), moments(features))) < 1e-10


def test_a_shift_costs_its_square():
    features = np.random.default_rng(2).standard_normal((200, 5))
    shift = np.array([1.0, -2.0, 0.5, 0.0, 3.0])
    distance = frechet_distance(moments(features), moments(features + shift))
    np.testing.assert_allclose(distance, shift @ shift, rtol=1e-9)


def test_a_scale_costs_its_excess_squared_times_the_variance():
    features = np.random.default_rng(3).standard_normal((200, 5))
    centred = features - features.mean(axis=0)
    distance = frechet_distance(moments(centred), moments(3.0 * centred))
    np.testing.assert_allclose(distance, 4.0 * np.trace(np.cov(centred, rowvar=False)), rtol=1e-9)


def test_diagonal_gaussians():
    first = Moments(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    second = Moments(np.array([1.0, 0.0, 0.0]), np.diag([4.0, 4.0, 1.0]))
    # 1 + (1 - 2)^2 + 0 + (3 - 1)^2
    np.testing.assert_allclose(frechet_distance(first, second), 6.0, rtol=1e-12)


def test_singular_covariances():
    rng = np.random.default_rng(4)
    low = random_moments(rng, 10, 3)
    full = random_moments(rng, 10, 20)
    point = Moments(np.zeros(10), np.zeros((10, 10)))
    assert abs(frechet_distance(low, low)) < 1e-5
    np.testing.assert_allclose(
        frechet_distance(point, full), full.mean @ full.mean + np.trace(full.covariance)
    )
    # A limit of regular covariances.
    near = Moments(low.mean, low.covariance + 1e-12 * np.eye(10))
    np.testing.assert_allclose(frechet_distance(low, full), by_scipy(near, full), rtol=1e-4)
    np.testing.assert_allclose(frechet_distance(low, full), frechet_distance(full, low), rtol=1e-7)


def test_a_singular_covariance_of_unknown_origin_is_told_by_its_rank():
    rng = np.random.default_rng(5)
    low, full = random_moments(rng, 10, 9), random_moments(rng, 10, 20)
    known = full._replace(num_images=20)
    for pair in ((low, full), (low, known), (known, low)):
        with pytest.warns(SingularCovarianceWarning, match="in 10 dimensions is singular"):
            frechet_distance(*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(full, full)
        frechet_distance(known, full)


WIDTH = 2048


@pytest.fixture(scope="module")
def wide():
    """Correlated positive features of Inception's width, and as many as the test says of them."""
    rng = np.random.default_rng(6)
    mixing = rng.standard_normal((64, WIDTH)).astype(np.float32)
    return [
        np.maximum(
            rng.standard_normal((count, 64), np.float32) @ mixing / 8
            + 0.3 * rng.standard_normal((count, WIDTH), np.float32)
            + shift,
            0.0,
        )
        for count, shift in ((2500, 0.0), (300, 0.1))
    ]


def test_statistics_at_full_width(wide):
    """More images than features, and fewer, against numpy's; the distance by singular values.

    With A and B the centred rows over sqrt(n - 1), the trace of (A^T A B^T B)^(1/2) is the sum of
    the singular values of A B^T. (scipy's sqrtm takes minutes here: benchmarks.metrics --check.)
    """
    ours, centred = [], []
    for rows in wide:
        running = RunningMoments(WIDTH)
        for start in range(0, len(rows), 128):
            running.add(rows[start : start + 128])
        ours.append(running.reduced())
        exact = rows.astype(np.float64)
        np.testing.assert_allclose(ours[-1].mean, exact.mean(axis=0), rtol=1e-12)
        covariance = np.cov(exact, rowvar=False)
        np.testing.assert_allclose(
            ours[-1].covariance, covariance, rtol=0, atol=1e-12 * np.abs(covariance).max()
        )
        centred.append((exact - exact.mean(axis=0)) / np.sqrt(len(rows) - 1))
    with pytest.warns(SingularCovarianceWarning, match="of 300 images, in 2048 dimensions"):
        distance = frechet_distance(*ours)
    first, second = centred
    shift = wide[0].mean(axis=0, dtype=np.float64) - wide[1].mean(axis=0, dtype=np.float64)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    wanted = shift @ shift + np.sum(first**2) + np.sum(second**2) - 2.0 * cross
    assert distance == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 4), (0, 4), (5,), (2, 3, 4)])
def test_features_without_moments_are_refused(shape):
    with pytest.raises(UserError, match="moments need features"):
        moments(np.zeros(shape))
