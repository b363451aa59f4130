"""Scores of many images from their features, summed where they are and reduced once.

    scorer = Scorer(extractor, scores=..., folder=workdir / "features")
    start = scorer.restore(state)                 # 0, or where a killed evaluation stopped
    for indices, images in batches from start:
        scorer.add(extract(images), indices)
        scorer.save(state)                        # now and then
    scorer.scores(reference, mesh)                # a collective

Each process keeps sums of the rows on its own devices, and adds them to the others' once, in
`scores`, `statistics` or `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.agreement import raised_together
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.metrics.collectives import gather
from dydilit_jax.metrics.features import Features, FeatureSpace
from dydilit_jax.metrics.frechet import frechet_distance
from dydilit_jax.metrics.inception_score import RunningInceptionScore
from dydilit_jax.metrics.kernel_distance import kernel_distance
from dydilit_jax.metrics.moments import RunningMoments
from dydilit_jax.metrics.names import SCORES, score_name
from dydilit_jax.metrics.precision_recall import precision_recall
from dydilit_jax.metrics.rows import KeptRows
from dydilit_jax.metrics.states import Arrays, newest_state, remove_older, write_state
from dydilit_jax.metrics.statistics import Reference, Statistics


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
        extractor: FeatureSpace,
        *,
        scores: Sequence[str] = SCORES,
        folder: Path | None = None,
    ):
        for score in scores:
            if score not in SCORES:
                raise unknown_name("score", score, SCORES)
        self.extractor = extractor
        without = {
            "spatial_frechet": extractor.spatial_width == 0,
            "inception_score": extractor.num_classes == 0,
        }
        self.wanted = tuple(score for score in scores if not without.get(score, False))
        self.pool = RunningMoments(extractor.width)
        self.spatial = (
            RunningMoments(extractor.spatial_width) if "spatial_frechet" in self.wanted else None
        )
        self.logits = (
            RunningInceptionScore(extractor.num_classes)
            if "inception_score" in self.wanted
            else None
        )
        keeps_rows = "kernel" in self.wanted or "precision_recall" in self.wanted
        self.rows = KeptRows(extractor.width, folder) if keeps_rows else None
        self.batches = 0
        self.done = 0  # images: one more than the largest index
        self._pending: tuple[Features, np.ndarray] | None = None

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
          UserError: features that are not finite; names the image. It may be one of the batch
            before, and comes from the call that reads the sums for the last. It comes on the
            process that has the image: several processes call `add` within `raised_together`.
        """
        used = Features(
            features.pool,
            None if self.spatial is None else features.spatial,
            None if self.logits is None else features.logits,
        )
        for array in used:
            for shard in array.addressable_shards if isinstance(array, jax.Array) else ():
                if shard.replica_id == 0:
                    shard.data.copy_to_host_async()
        self._settle()
        self._pending = (used, np.asarray(indices))
        self.batches += 1
        self.done = max(self.done, int(np.max(indices, initial=-1)) + 1)

    def _settle(self) -> None:
        """Adds the batch that waits to the sums."""
        if self._pending is None:
            return
        features, indices = self._pending
        self._pending = None
        for rows, own in _own_rows(features.pool, indices):
            self.pool.add(rows)
            if self.rows is not None:
                self.rows.add(rows, own)
        if self.spatial is not None and features.spatial is not None:
            for rows, _ in _own_rows(features.spatial, indices):
                self.spatial.add(rows)
        if self.logits is not None and features.logits is not None:
            for rows, own in _own_rows(features.logits, indices):
                self.logits.add(rows, own)

    def save(self, folder: Path) -> None:
        """Writes the sums so far, so that `restore` finds them after a kill at any moment.

        Not a collective, but every process calls it after the same batches, with the same folder
        (which they share). Older states are deleted when no process needs them any more.
        """
        self._settle()
        arrays: Arrays = {
            "identity": np.array(self._identity()),
            "done": np.array(self.done),
        }
        for part, sums in (("pool", self.pool), ("spatial", self.spatial), ("logits", self.logits)):
            if sums is not None:
                arrays |= {f"{part}/{name}": array for name, array in sums.state().items()}
        if self.rows is not None:
            arrays |= {f"rows/{name}": array for name, array in self.rows.state().items()}
        write_state(folder, self.batches, arrays)
        if jax.process_index() == 0:
            remove_older(folder)

    def restore(self, folder: Path) -> int:
        """Takes up the newest state that all processes had written, of as many processes or others.

        A collective, of a scorer that nothing was added to. The processes share the folder, and
        the folder of rows.

        Returns:
          Number of images that were added before; 0 where no state is. Indices 0 to that number
          are taken to be in it: evaluate in the order of indices.

        Raises:
          UserError: a state of another extractor or of other scores.
        """
        self.batches, states = newest_state(folder)
        with raised_together():
            for arrays in states:
                self._take_up(arrays, folder)
        self.done = int(gather(np.array(self.done)).max())
        return self.done

    def _take_up(self, arrays: Arrays, folder: Path) -> None:
        """Takes up a part of a state."""
        if str(arrays["identity"]) != self._identity():
            raise UserError(
                f"{str(folder)!r} holds an evaluation of {arrays['identity']}, this is one of "
                f"{self._identity()}: delete the folder to begin anew"
            )
        self.done = max(self.done, int(arrays["done"]))
        self.pool.merge(RunningMoments.restored(_part(arrays, "pool")))
        if self.spatial is not None:
            self.spatial.merge(RunningMoments.restored(_part(arrays, "spatial")))
        if self.logits is not None:
            self.logits.merge(RunningInceptionScore.restored(_part(arrays, "logits")))
        if self.rows is not None:
            self.rows.take_up(_part(arrays, "rows"))

    def _identity(self) -> str:
        """What a state must agree in."""
        extractor = self.extractor
        what = (extractor.name, extractor.description, extractor.checksum, ", ".join(self.wanted))
        return "; ".join(what)

    def count(self) -> int:
        """Number of images of all processes; a collective."""
        with raised_together():
            self._settle()
        return int(gather(np.array(self.pool.count)).sum())

    def statistics(self) -> Statistics:
        """Sums of all processes, reduced; the same on each. A collective.

        Raises:
          UserError: fewer than two images.
        """
        count = self.count()
        spatial = None if self.spatial is None else self.spatial.reduced()
        return Statistics(count, self.pool.reduced(), spatial)

    def reference(self) -> Reference:
        """The images so far as a reference for others, with their rows where they were kept.

        A collective.
        """
        statistics = self.statistics()
        return Reference(
            extractor=self.extractor.name,
            extractor_checksum=self.extractor.checksum,
            description=self.extractor.description,
            pool=statistics.pool,
            spatial=statistics.spatial,
            count=statistics.num_images,
            rows=self.rows,
        )

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
          UserError: a reference of another extractor or of other weights; fewer than two images.

        Warns:
          SingularCovarianceWarning: no more images than features, so that the covariance is
            singular and the Frechet distance biased upwards.
        """
        reference.check(self.extractor)
        statistics = self.statistics()
        named = {
            score_name(self.extractor.name, score): value
            for score, value in self._values(statistics, reference, mesh)
        }
        return {"num_images": float(statistics.num_images), **named}

    def _values(
        self, statistics: Statistics, reference: Reference, mesh: Mesh
    ) -> Iterator[tuple[str, float]]:
        if "frechet" in self.wanted:
            yield "frechet", frechet_distance(reference.pool, statistics.pool)
        if statistics.spatial is not None and reference.spatial is not None:
            distance = frechet_distance(reference.spatial, statistics.spatial)
            yield "spatial_frechet", distance
        if self.logits is not None:
            score = self.logits.reduced()
            yield "score", score.mean
            yield "score_std", score.std
        if self.rows is None or reference.rows is None:
            return
        if "kernel" in self.wanted:
            kernel = kernel_distance(reference.rows, self.rows, mesh)
            yield "kernel", kernel.mean
            yield "kernel_standard_error", kernel.standard_error
        if "precision_recall" in self.wanted:
            shares = precision_recall(reference.rows, self.rows, mesh, origin=reference.pool.mean)
            yield "precision", shares.precision
            yield "recall", shares.recall


def add_images(
    scorer: Scorer,
    extract: Callable[[Any], Features],
    batches: Iterable[np.ndarray],
    mesh: Mesh,
    first: int = 0,
) -> int:
    """Adds images to a scorer, indices rising from `first`; returns the next index. A collective.

    Args:
      scorer: to add to.
      extract: of `compile_extractor`.
      batches: (n, H, W, C), the same on every process; each is filled up to a multiple of the
        devices, and each size of batch is compiled once.
      mesh: the extractor's.
      first: index of the first image.
    """
    for images in batches:
        filled = -(-len(images) // mesh.size) * mesh.size
        padding = [(0, filled - len(images))] + [(0, 0)] * (images.ndim - 1)
        indices = np.full(filled, -1)
        indices[: len(images)] = np.arange(first, first + len(images))
        scorer.add(extract(np.pad(images, padding)), indices)
        first += len(images)
    return first


def _own_rows(
    array: jax.Array | np.ndarray, indices: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows (m, D) on this process's devices and their indices (m,), each once, no filling."""
    if len(array) != len(indices):
        raise ValueError(f"{len(indices)} indices for {len(array)} rows")
    if isinstance(array, jax.Array):
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        parts = [(np.asarray(shard.data), indices[shard.index[0]]) for shard in shards]
    else:
        parts = [(np.asarray(array), indices)]
    for rows, own in parts:
        rows, own = rows[own >= 0], own[own >= 0]
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            raise UserError(
                f"features of image {own[~finite][0]} are not finite, so it cannot be scored"
            )
        yield rows, own


def _part(arrays: Arrays, part: str) -> Arrays:
    """The arrays of a state whose names begin with `part`, without it."""
    start = f"{part}/"
    return {
        name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)
    }
