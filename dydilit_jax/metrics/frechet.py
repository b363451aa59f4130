"""The Frechet distance between two Gaussians.

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))       Dowson and Landau 1982

Heusel et al. (arXiv 1706.08500) take it between features of images; FID is that distance in the
features of one Inception network and nothing else is called so here.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from dydilit_jax.errors import UserError


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64.

    `num_images` is the number of features that they are estimated from; 0 where it is not known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    num_images: int = 0


class SingularCovarianceWarning(UserWarning):
    """A covariance of too few features: the distance between estimates is biased upwards."""


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features (n, D), n at least 2."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"moments need features (n, D) with n > 1, got shape {features.shape}")
    width = features.shape[1]
    covariance = np.cov(features, rowvar=False).reshape(width, width)
    return Moments(features.mean(axis=0), covariance, len(features))


def frechet_distance(first: Moments, second: Moments) -> float:
    """d^2 of the equation above.

    The trace of the square root is the sum of the square roots of the eigenvalues of the symmetric
    S_1^(1/2) S_2 S_1^(1/2), which are real and, but for rounding, not negative. Nothing is added to
    a diagonal: a singular covariance has a square root as well.

    Raises:
      UserError: moments of different widths.

    Warns:
      SingularCovarianceWarning: a covariance of no more features than its width, or, where their
        number is not known, one that has no full rank.
    """
    if first.mean.shape != second.mean.shape:
        raise UserError(
            f"moments of {len(first.mean)} and {len(second.mean)} features cannot be compared: "
            "they are of different networks"
        )
    if second.num_images == 0:  # The rank of the first is known below without further cost.
        first, second = second, first
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = root @ second.covariance @ root
    eigenvalues = np.linalg.eigvalsh((inner + inner.T) / 2)
    cross = np.sum(np.sqrt(np.maximum(eigenvalues, 0.0)))
    shift = first.mean - second.mean
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    _warn_if_singular(first, values)
    unknown = second.num_images == 0
    _warn_if_singular(second, np.linalg.eigvalsh(second.covariance) if unknown else None)
    return float(shift @ shift + spread - 2.0 * cross)


def _warn_if_singular(moments: Moments, eigenvalues: np.ndarray | None) -> None:
    width = len(moments.mean)
    if 0 < moments.num_images <= width:
        reason = f"of {moments.num_images} images, in {width} dimensions, is"
    elif moments.num_images == 0 and eigenvalues is not None and _deficient(eigenvalues):
        reason = f"in {width} dimensions is"
    else:
        return
    warnings.warn(
        f"a covariance {reason} singular: the Frechet distance is far above that of many images, "
        "and compares with none of another number of images",
        SingularCovarianceWarning,
        stacklevel=3,
    )


def _deficient(eigenvalues: np.ndarray) -> bool:
    """Whether a covariance of these eigenvalues (ascending) has no full rank, but for rounding."""
    return bool(eigenvalues[0] <= eigenvalues[-1] * len(eigenvalues) * np.finfo(np.float64).eps)
