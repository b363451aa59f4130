"""Scores of many images from their features, summed where they are and reduced once.

    scorer = Scorer(extractor, scores=..., folder=workdir / "features")
    start = scorer.restore(state)                 # 0, or where a killed evaluation stopped
    for indices, images in batches from start:
        scorer.add(extract(images), indices)
        scorer.save(state)                        # now and then
    scorer.scores(reference, mesh)                # a collective

Each process keeps sums of the rows on its own devices, and adds them to the others' once, in
`scores` or `statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from dydilit_jax.metrics.features import Extractor, Features
from dydilit_jax.metrics.frechet import Moments
from dydilit_jax.metrics.references import Reference

# frechet            Frechet distance of Features.pool: FID of Inception's
# spatial_frechet    of Features.spatial: sFID
# inception_score    of Features.logits, in splits of 5,000 in the images' order, as ADM
# kernel             kernel distance of Features.pool with its standard error: KID
# precision_recall   improved precision and recall (k = 3) of Features.pool
SCORES = ("frechet", "spatial_frechet", "inception_score", "kernel", "precision_recall")


class Statistics(NamedTuple):
    """What all processes' rows come to: number of images, moments of pool and spatial features."""

    count: int
    pool: Moments
    spatial: Moments | None


class Scorer:
    """Sums features batch by batch; holds no more than sums, and rows where a score needs them.

    Args:
      extractor: where the features come from.
      scores: which of SCORES to compute; those that the extractor has no features for are left out.
      folder: where rows of `Features.pool` are kept that `kernel` and `precision_recall` need (4 D
        bytes an image; each process writes its own files); None keeps them in memory, which serves
        some thousand images.

    Raises:
      UserError: an unknown score.
    """

    def __init__(
        self,
        extractor: Extractor,
        *,
        scores: Sequence[str] = SCORES,
        folder: Path | None = None,
    ):
        raise NotImplementedError

    def add(self, features: Features, indices: np.ndarray) -> None:
        """Takes the features of a batch.

        Of arrays over several devices or processes each process takes the rows on its own devices,
        once where devices hold copies. The order of batches, and which device or process has which
        row, changes the scores by rounding only. The sums lag one batch behind, so that the host
        adds while the devices compute.

        Args:
          features: of n images; global arrays, or numpy arrays with this process's rows alone.
          indices: (n,) of the images in the whole evaluation, which decide the Inception Score's
            splits and the kernel distance's subsets; each image once; a row of a negative index is
            filling and left out.

        Raises:
          UserError: features that are not finite; names the image.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes the sums so far, so that `restore` finds them after a kill at any moment.

        Not a collective, but every process calls it after the same batches, with the same folder
        (which they share). Older states are deleted when no process needs them any more.
        """
        raise NotImplementedError

    def restore(self, folder: Path) -> int:
        """Takes up the newest state that all processes had written, of as many processes or others.

        A collective. The processes must share the folder, and the folder of rows.

        Returns:
          Number of images that were added before; 0 where no state is. Indices 0 to that number
          are taken to be in it: evaluate in the order of indices.

        Raises:
          UserError: a state of another extractor or of other scores.
        """
        raise NotImplementedError

    def count(self) -> int:
        """Number of images of all processes; a collective."""
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Sums of all processes, reduced; the same on each. A collective.

        Raises:
          UserError: fewer than two images.
        """
        raise NotImplementedError

    def reference(self) -> Reference:
        """The images so far as a reference for others, with their rows where they were kept.

        A collective.
        """
        raise NotImplementedError

    def scores(self, reference: Reference, mesh: Mesh) -> dict[str, float]:
        """The scores against a reference, by name. A collective; the same on every process.

        Args:
          reference: of the same extractor (its checksum is compared).
          mesh: devices that distances are computed on.

        Returns:
          `num_images` and, of an extractor named `inception`: `fid`, `sfid`, `inception_score`
          with `inception_score_std` over splits, `kid` with `kid_standard_error`, `precision`,
          `recall`; of another named NAME: `NAME_frechet`, `NAME_spatial_frechet`, `NAME_score`,
          `NAME_score_std`, `NAME_kernel`, `NAME_kernel_standard_error`, `NAME_precision`,
          `NAME_recall`. A score that the reference has nothing for (no spatial moments, no rows) is
          left out.

        Raises:
          UserError: a reference of another extractor or of other weights.

        Warns:
          SingularCovarianceWarning: no more images than features, so that the covariance is
            singular and the Frechet distance biased upwards.
        """
        raise NotImplementedError
