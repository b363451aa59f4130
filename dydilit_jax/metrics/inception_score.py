"""The Inception Score (Salimans et al., arXiv 1606.03498), as ADM's evaluator computes it.

Over a split of the images, in their order, with p(y|x) the softmax of the logits (without bias):

    score = exp( mean_x KL(p(y|x) | p(y)) ),   p(y) = mean_x p(y|x)

and the score is the mean over splits of 5,000: ten of 50,000 images, the last one shorter where
5,000 does not divide the number. With KL = sum p log p - sum p log p(y), a split is told by three
sums, so that images may come in any order, on any process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.special

from dydilit_jax.metrics.collectives import gather

SPLIT_SIZE = 5000


class InceptionScore(NamedTuple):
    """Mean over splits, standard deviation over them (of the population), and how many."""

    mean: float
    std: float
    splits: int


class RunningInceptionScore:
    """Sums of the logits added so far, split by split, float64.

    Args:
      num_classes: K of the logits.
      split_size: images of a split; image i belongs to split i // split_size.
    """

    def __init__(self, num_classes: int, split_size: int = SPLIT_SIZE):
        self.split_size = split_size
        self.counts = np.zeros(0, np.int64)
        self.negative_entropies = np.zeros(0)
        self.probabilities = np.zeros((0, num_classes))

    def add(self, logits: np.ndarray, indices: np.ndarray) -> None:
        """Takes logits (m, K) of the images of these indices (m,), none negative."""
        if not len(indices):
            return
        splits = indices // self.split_size
        self._grow(int(splits.max()) + 1)
        logits = np.asarray(logits, np.float64)
        log_probabilities = scipy.special.log_softmax(logits, axis=1)
        probabilities = np.exp(log_probabilities)
        entropies = np.sum(probabilities * log_probabilities, axis=1)
        for split in np.unique(splits):
            inside = splits == split
            self.counts[split] += inside.sum()
            self.negative_entropies[split] += entropies[inside].sum()
            self.probabilities[split] += probabilities[inside].sum(axis=0)

    def merge(self, other: RunningInceptionScore) -> None:
        """Takes the images of another."""
        self._grow(len(other.counts))
        known = len(other.counts)
        self.counts[:known] += other.counts
        self.negative_entropies[:known] += other.negative_entropies
        self.probabilities[:known] += other.probabilities

    def _grow(self, splits: int) -> None:
        more = max(0, splits - len(self.counts))
        self.counts = np.pad(self.counts, (0, more))
        self.negative_entropies = np.pad(self.negative_entropies, (0, more))
        self.probabilities = np.pad(self.probabilities, ((0, more), (0, 0)))

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restored` makes it again."""
        return {
            "split_size": np.array(self.split_size),
            "counts": self.counts,
            "negative_entropies": self.negative_entropies,
            "probabilities": self.probabilities,
        }

    @classmethod
    def restored(cls, state: Mapping[str, np.ndarray]) -> RunningInceptionScore:
        """What `state` was made of."""
        score = cls(state["probabilities"].shape[1], int(state["split_size"]))
        score.counts = np.array(state["counts"])
        score.negative_entropies = np.array(state["negative_entropies"])
        score.probabilities = np.array(state["probabilities"])
        return score

    def reduced(self) -> InceptionScore:
        """The score over the images of all processes; a collective."""
        self._grow(int(gather(np.array(len(self.counts))).max()))
        counts = gather(self.counts).sum(axis=0)
        entropies = gather(self.negative_entropies).sum(axis=0)
        probabilities = gather(self.probabilities).sum(axis=0)
        filled = counts > 0
        counts = counts[filled]
        marginal = probabilities[filled] / counts[:, None]
        cross = np.sum(scipy.special.xlogy(marginal, marginal), axis=1)
        scores = np.exp(entropies[filled] / counts - cross)
        return InceptionScore(float(scores.mean()), float(scores.std()), len(scores))
