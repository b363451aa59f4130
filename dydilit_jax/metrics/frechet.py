"""The Frechet distance between two Gaussians.

    d^2 = |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))       Dowson and Landau 1982

Heusel et al. (arXiv 1706.08500) take it between features of images; FID is that distance in the
features of one Inception network and nothing else is called so here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dydilit_jax.errors import UserError


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def moments(features: np.ndarray) -> Moments:
    """Mean and unbiased covariance of features (n, D), n at least 2."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"moments need features (n, D) with n > 1, got shape {features.shape}")
    width = features.shape[1]
    covariance = np.cov(features, rowvar=False).reshape(width, width)
    return Moments(features.mean(axis=0), covariance)


def frechet_distance(first: Moments, second: Moments) -> float:
    """d^2 of the equation above.

    The trace of the square root is the sum of the square roots of the eigenvalues of the symmetric
    S_1^(1/2) S_2 S_1^(1/2), which are real and, but for rounding, not negative.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    inner = root @ second.covariance @ root
    eigenvalues = np.linalg.eigvalsh((inner + inner.T) / 2)
    cross = np.sum(np.sqrt(np.maximum(eigenvalues, 0.0)))
    shift = first.mean - second.mean
    spread = np.trace(first.covariance) + np.trace(second.covariance)
    return float(shift @ shift + spread - 2.0 * cross)
