"""Mean and covariance of rows that pass by, in float64, in memory that does not grow with them.

For n rows with mean m and scatter M = sum (x - m)(x - m)^T, and a further set (n', m', M'), with
d = m' - m (Chan, Golub and LeVeque 1979):

    m  <-  m + d n' / (n + n')
    M  <-  M + M' + d d^T n n' / (n + n')

Nothing is subtracted that was summed before, so no digits are lost however far the mean lies from
zero, and sets may be joined in any order.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.linalg import blas

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import gather
from dydilit_jax.metrics.frechet import Moments

BLOCK = 1024  # rows that are centred at once
CHUNK = 1 << 18  # numbers of a process that are gathered at once


class RunningMoments:
    """Count, mean and scatter of the rows added so far.

    The scatter is symmetric; its lower triangle alone is kept up to date.

    Args:
      width: D of the rows.
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self._scatter = np.zeros((width, width), order="F")

    def add(self, rows: np.ndarray) -> None:
        """Takes rows (m, D) of any floating dtype."""
        for start in range(0, len(rows), BLOCK):
            block = np.asarray(rows[start : start + BLOCK], np.float64)
            mean = block.mean(axis=0)
            self._join(len(block), mean, block - mean)

    def merge(self, other: RunningMoments) -> None:
        """Takes the rows of another."""
        if other.count:
            self._scatter += other._scatter
            self._join(other.count, other.mean, np.empty((0, len(self.mean))))

    def _join(self, count: int, mean: np.ndarray, centred: np.ndarray) -> None:
        """Takes a set of that count and mean; its scatter is that of rows `centred`."""
        total = self.count + count
        shift = mean - self.mean
        # The equation's last term is the scatter of one more row.
        joint = np.vstack([centred, shift * np.sqrt(self.count * count / total)])
        self._scatter = blas.dsyrk(
            1.0, joint.T, beta=1.0, c=self._scatter, lower=True, overwrite_c=True
        )
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that `restored` takes: count (), mean (D,), lower scatter (D (D + 1) / 2,)."""
        rows = [self._scatter[i, : i + 1] for i in range(len(self.mean))]
        return {
            "count": np.array(self.count),
            "mean": self.mean,
            "scatter": np.concatenate(rows),
        }

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> RunningMoments:
        """What `state` was made of."""
        moments = cls(len(state["mean"]))
        moments.count, moments.mean = int(state["count"]), np.array(state["mean"])
        moments._scatter[np.tril_indices(len(moments.mean))] = state["scatter"]
        return moments

    def reduced(self) -> Moments:
        """Mean and unbiased covariance of the rows of all processes; a collective.

        The processes' scatters are gathered in parts of `CHUNK` numbers and joined in the order of
        processes, so that all get the same.

        Raises:
          UserError: fewer than two rows.
        """
        counts = gather(np.array(self.count))
        count = int(counts.sum())
        if count < 2:
            raise UserError(f"a covariance needs two images or more, got {count}")
        means = gather(self.mean)
        mean = (counts / count) @ means
        shifts = np.sqrt(counts)[:, None] * (means - mean)
        width = len(mean)
        covariance = np.empty((width, width))
        step = max(1, CHUNK // width)
        for start in range(0, width, step):
            rows = slice(start, min(start + step, width))
            own = np.ascontiguousarray(self._scatter[rows, : rows.stop])
            scatter = gather(own).sum(axis=0) + shifts[:, rows].T @ shifts[:, : rows.stop]
            covariance[rows, : rows.stop] = scatter / (count - 1)
        lower = np.tril(covariance)
        return Moments(mean, lower + np.tril(lower, -1).T, count)
