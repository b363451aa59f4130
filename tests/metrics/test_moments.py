import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.moments import RunningMoments


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2500, 30)) @ rng.standard_normal((30, 30)) + 0.3


def in_parts(rows, ends):
    moments = RunningMoments(rows.shape[1])
    for part in np.split(rows, ends):
        moments.add(part)
    return moments


def check(moments, rows, rtol=1e-12):
    result = moments.reduced()
    scale = np.abs(np.cov(rows, rowvar=False)).max()
    np.testing.assert_allclose(result.mean, rows.mean(axis=0), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(
        result.covariance, np.cov(rows, rowvar=False), rtol=rtol, atol=rtol * scale
    )
    np.testing.assert_array_equal(result.covariance, result.covariance.T)
    assert result.num_images == len(rows)


@pytest.mark.parametrize("ends", [[], [1, 2, 3, 40], range(7, 2500, 7), [2400, 2400]])
def test_rows_in_parts(rows, ends):
    check(in_parts(rows, ends), rows)


def test_float32_rows_are_summed_in_float64(rows):
    rows = rows.astype(np.float32)
    check(in_parts(rows, range(100, 2500, 100)), rows.astype(np.float64))


def test_a_mean_far_from_zero_costs_no_digits(rows):
    """Sums of squares would lose them all: 1e16 of 1e16."""
    shifted = rows + 1e8
    near = np.cov(shifted - 1e8, rowvar=False)
    covariance = in_parts(shifted, range(64, 2500, 64)).reduced().covariance
    np.testing.assert_allclose(covariance, near, rtol=1e-6, atol=1e-6 * np.abs(near).max())


def test_joined_in_any_order(rows):
    parts = [in_parts(part, []) for part in np.split(rows, [3, 900, 901])]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        joined = RunningMoments(30)
        joined.merge(RunningMoments(30))
        for i in order:
            joined.merge(parts[i])
        check(joined, rows)


def test_state_is_all_there_is(rows):
    moments = RunningMoments.restored(in_parts(rows[:1000], [10]).state())
    moments.add(rows[1000:])
    check(moments, rows)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_are_refused(count):
    moments = RunningMoments(3)
    moments.add(np.ones((count, 3)))
    with pytest.raises(UserError, match=f"two images or more, got {count}"):
        moments.reduced()
