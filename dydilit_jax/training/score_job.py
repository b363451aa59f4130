"""An evaluation from its first batch to its report, which goes on where it stopped.

OUT                             the report, when all is done
OUT.unfinished/request.json     what was asked for
OUT.unfinished/sums, rows       what metrics' Scorer has of the images so far
OUT.unfinished/images           the images themselves, where an .npz of them is wanted
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.agreement import of_first_process, raised_together
from dydilit_jax.config import Config
from dydilit_jax.metrics.features import compile_extractor
from dydilit_jax.metrics.scoring import SCORES, Scorer
from dydilit_jax.training import score_report
from dydilit_jax.training.comparison import Comparison, told
from dydilit_jax.training.image_parts import ImageParts
from dydilit_jax.training.interruption import Interruption, stop_signals
from dydilit_jax.training.request import claim, write_npz
from dydilit_jax.training.scoring import Images, batches, fitting_batch, scores_of
from dydilit_jax.training.storage import warn

SAVE_EVERY = 5_000  # images


class Stopped(Exception):  # noqa: N818
    """The evaluation was asked to stop, and has saved what it had.

    Attributes:
      done, num: images that were scored, of how many.
    """

    def __init__(self, done: int, num: int):
        super().__init__(f"stopped at {done} of {num} images; run again to go on")
        self.done, self.num = done, num


class Saving:
    """Told of every batch: saves the sums at intervals, and ends the evaluation if it is to stop.

    Args:
      folder: where they are saved.
      interruption: whether to stop.
      num: images in all.
      every: images between two saves.
    """

    def __init__(self, folder: Path, interruption: Interruption, num: int, every: int):
        self._folder, self._interruption = folder, interruption
        self._num, self._every, self._saved = num, every, 0

    def __call__(self, scorer: Scorer, done: int) -> None:
        """`done` images are in the sums; raises Stopped when the evaluation is to stop."""
        stop = self._interruption.agreed_now() and done < self._num
        if stop or done - self._saved >= self._every:
            with raised_together():
                scorer.save(self._folder)
            self._saved = done
        if stop:
            raise Stopped(done, self._num)


@contextlib.contextmanager
def saving(folder: Path, mesh: Mesh, num: int, every: int = SAVE_EVERY) -> Iterator[Saving]:
    """What saves the sums; in its scope SIGTERM and SIGINT to any process stop all."""
    with stop_signals() as requested:
        yield Saving(folder, Interruption(mesh, requested), num, every)


def unfinished_folder(out: Path) -> Path:
    """Where the work on a file is kept until it is done."""
    return out.with_name(out.name + ".unfinished")


@dataclasses.dataclass(kw_only=True)
class ScoreJob:
    """Images that are scored, and what is written of it.

    Attributes:
      comparison: features and reference.
      settings: all else that decides the scores; plain values.
      config: of the run that is scored; None for images made elsewhere.
      out: the report.
      mesh: the devices.
      wanted: of metrics.scoring.SCORES.
      save_every: images between two saves.
      save_npz: where the images are written too, as ADM's evaluator reads them; None for nowhere.
      labels: (n,) of the images, for that file.
    """

    comparison: Comparison
    settings: dict[str, Any]
    config: Config | None
    out: Path
    mesh: Mesh
    wanted: tuple[str, ...] = SCORES
    save_every: int = SAVE_EVERY
    save_npz: Path | None = None
    labels: np.ndarray | None = None

    def run(self, images: Images, num: int, batch_size: int) -> dict[str, float] | None:
        """Scores images and writes the report, or reads it if it is there; a collective.

        Args:
          images: by their indices.
          num: how many, in the order of their indices.
          batch_size: about so many at once; it changes no score but by rounding.

        Returns:
          The scores on the first process; elsewhere None if they were there.

        Raises:
          UserError: a report, or unfinished work, of other settings.
          Stopped: it was asked to stop.
        """
        settings = {
            **self.settings,
            "scores": list(self.wanted),
            **score_report.extractor_fields(self.comparison.extractor),
            **score_report.reference_fields(self.comparison.path, self.comparison.reference),
        }
        state = unfinished_folder(self.out)
        scores = None
        with raised_together():
            if jax.process_index() == 0:
                scores = score_report.finished(self.out, settings)
                if scores is None:
                    claim(state, settings)
        if of_first_process(scores is not None):
            return scores
        scores, warned = self._score(images, num, batch_size, state)
        if jax.process_index() == 0:
            report = {
                "scores": scores,
                "warnings": warned,
                "settings": settings,
                "environment": score_report.environment(self.mesh),
                "config": self.config and dataclasses.asdict(self.config),
            }
            score_report.write_report(self.out, report)
            shutil.rmtree(state)
        return scores

    def _score(
        self, images: Images, num: int, batch_size: int, state: Path
    ) -> tuple[dict[str, float], list[str]]:
        """The scores, and what is to be said of them."""
        extractor = self.comparison.extractor
        scorer = Scorer(extractor, scores=self.wanted, folder=state / "rows")
        first = scorer.restore(state / "sums")
        if first and jax.process_index() == 0:
            print(f"{first} of {num} images are scored already", flush=True)
        parts = ImageParts(state / "images", first) if self.save_npz else None
        of_first_process(0)  # It has cleared that folder.
        extract = compile_extractor(extractor, self.mesh)
        size = fitting_batch(batch_size, num, self.mesh)
        with (
            told(num, "image", "scoring", first) as update,
            saving(state / "sums", self.mesh, num, self.save_every) as save,
        ):
            for indices, pixels in batches(images, num, batch_size=size, first=first):
                features = extract(pixels)
                if parts is not None:
                    parts.add(indices, pixels)
                with raised_together():
                    scorer.add(features, indices)
                update(int(np.sum(indices >= 0)))
                save(scorer, int(indices.max()) + 1)
        scores, warned = scores_of(scorer, self.comparison.reference, self.mesh)
        warned = self.comparison.warnings + warned
        if jax.process_index() == 0:
            for line in warned:
                warn(line)
            if self.save_npz and parts is not None and self.labels is not None:
                write_npz(parts, self.labels, self.save_npz)
        return scores, warned
