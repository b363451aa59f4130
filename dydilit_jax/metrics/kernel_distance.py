"""The kernel distance of two sets of features: KID of Inception's (Binkowski et al., 1801.01401).

The unbiased estimate of the squared maximum mean discrepancy between sets x and y of m each, with
the kernel k(a, b) = (a . b / D + 1)^3:

    MMD^2 = sum_{i != j} k(x_i, x_j) / (m (m - 1)) + the same of y - 2 sum_{i, j} k(x_i, y_j) / m^2

The distance is its mean over subsets, drawn without replacement within each.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import gather, row_mesh
from dydilit_jax.metrics.rows import KeptRows, Lookup

SUBSETS = 100
SUBSET_SIZE = 1000
# torch-fidelity's, so that the same features give the same subsets and the same number.
SEED = 2020


class KernelDistance(NamedTuple):
    """Mean over subsets, and its standard error: their standard deviation / sqrt(subsets).

    The error is that of drawing subsets. The images are finite, and subsets share some of them, so
    a new set of images may differ by more.
    """

    mean: float
    standard_error: float


def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """k of the equations above, of rows (m, D) and (n, D) float64: (m, n)."""
    values = first @ second.T / first.shape[1] + 1.0
    return values * values * values


def squared_discrepancy(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased MMD^2 between rows (m, D) and (n, D), computed in float64; may be negative."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)

    def within(rows: np.ndarray) -> float:
        values = kernel(rows, rows)
        return (values.sum() - np.trace(values)) / (len(rows) * (len(rows) - 1))

    return float(within(first) + within(second) - 2.0 * kernel(first, second).mean())


def kernel_distance(
    reference: KeptRows,
    samples: KeptRows,
    mesh: Mesh,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> KernelDistance:
    """Kernel distance of two sets of rows; a collective, each process computes some subsets.

    Args:
      reference, samples: this process's rows.
      mesh: of all processes; rows pass over it.
      subsets: how many are drawn.
      subset_size: m; of a set no larger than that, half is drawn, so that subsets differ.
      seed: of the draws, which are torch-fidelity's for rows in the order of their indices.

    Raises:
      UserError: fewer than four rows in a set, or fewer than two subsets.
    """
    rows = row_mesh(mesh)
    real, drawn = Lookup(reference, rows), Lookup(samples, rows)
    smaller = min(len(real), len(drawn))
    size = subset_size if smaller > subset_size else smaller // 2
    if size < 2 or subsets < 2:
        raise UserError(
            f"a kernel distance needs four images in each set and two subsets, got {len(real)} and "
            f"{len(drawn)} images and {subsets} subsets"
        )
    rng = np.random.RandomState(seed)
    values = np.zeros(subsets)
    for subset in range(subsets):
        x = drawn.take(rng.choice(len(drawn), size, replace=False))
        y = real.take(rng.choice(len(real), size, replace=False))
        if subset % jax.process_count() == jax.process_index():
            values[subset] = squared_discrepancy(x, y)
    values = gather(values).sum(axis=0)
    return KernelDistance(float(values.mean()), float(values.std(ddof=1) / np.sqrt(subsets)))
