"""What a run shows of itself: sample grids and scores on the way, a report at the end."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.agreement import of_first_process
from dydilit_jax.data.sources import Source
from dydilit_jax.drawing import draw_grid, save_png
from dydilit_jax.metrics.features import Features, compile_extractor
from dydilit_jax.metrics.pixels import pixel_scores
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.training.comparison import (
    REFERENCES,
    Choice,
    Comparison,
    open_comparison,
    real_images,
)
from dydilit_jax.training.decoding import Decode, configured_autoencoder, make_decoder
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.interruption import Interruption
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.scoring import (
    Drawing,
    check_count,
    fitting_batch,
    score_batches,
    scores_of,
)
from dydilit_jax.training.state import Network, TrainState
from dydilit_jax.training.storage import tolerated, warn
from dydilit_jax.training.writers import Writers, read_metrics

SAMPLE_SEED = 0
GRID_COLUMNS = 10


class Evaluation:
    """Draws and scores samples of the averaged parameters.

    Every method is a collective: the processes of a run draw together.

    Args:
      network: structure and process.
      mesh: what images are drawn over.
      source: the data that they are compared with.
      workdir: where they are written.
      writers: where scores and grids go as well.
      interruption: drawing ends early when it says so.
    """

    def __init__(
        self,
        network: Network,
        mesh: Mesh,
        source: Source,
        workdir: Path,
        writers: Writers,
        interruption: Interruption,
    ):
        self.config = network.config
        self.network, self.mesh, self.source = network, mesh, source
        self.workdir, self.writers, self.interruption = workdir, writers, interruption
        self._warned = False

    @functools.cached_property
    def _decode(self) -> Decode:
        """Pixels of the network's output; latents stay as they are without an autoencoder."""
        return make_decoder(self.config.autoencoder)

    def prepare(self) -> None:
        """Opens, or makes, what samples are compared with on the way; a collective.

        Raises:
          UserError: as comparison.open_comparison.
        """
        if self.config.evaluation.every:
            check_count(self.config.evaluation.num)
            _ = self._comparison

    @functools.cached_property
    def _drawing(self) -> Drawing:
        section = self.config.autoencoder
        autoencoder = configured_autoencoder(section).autoencoder if section.weights else None
        return Drawing(self.network, self.config.sampling, self.mesh, autoencoder)

    @functools.cached_property
    def _comparison(self) -> Comparison:
        section = self.config.evaluation
        shape = self._drawing.image_shape
        return open_comparison(
            Choice(features=section.features, weights=section.weights),
            Path(section.reference) if section.reference else None,
            image_shape=shape,
            own=lambda: real_images(self.config, shape),
            folder=self.workdir / REFERENCES,
            mesh=self.mesh,
        )

    @functools.cached_property
    def _extract(self) -> Callable[[jax.Array], Features]:
        return compile_extractor(self._comparison.extractor, self.mesh)

    def has_scores(self, step: int) -> bool:
        """Whether the scores of a step are written."""
        return bool(of_first_process(self._written(step, "num_images") is not None))

    def measure(self, state: TrainState) -> bool:
        """Scores samples by the config's features; False if stopped meanwhile."""
        step, num = int(state.step), self.config.evaluation.num
        images = self._drawing.images(
            ema_parameters(state.ema, self.config.optimizer), self._balanced(num), SAMPLE_SEED
        )
        scorer = Scorer(self._comparison.extractor)
        if not score_batches(
            images,
            self._extract,
            scorer,
            num,
            batch_size=fitting_batch(self.config.sampling.batch_size, num, self.mesh),
            stopped=self.interruption.agreed_now,
        ):
            return False
        scores, warned = scores_of(scorer, self._comparison.reference, self.mesh)
        if jax.process_index() == 0:
            for line in self._comparison.warnings + warned if not self._warned else ():
                warn(line)
            told = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            print(f"step {step}  {told}", file=sys.stderr, flush=True)
        self._warned = True
        with tolerated(f"scores of step {step}"):
            self.writers.scalars(step, scores)
        return True

    def samples(self, state: TrainState, labels: np.ndarray) -> np.ndarray | None:
        """Images (n, H, W, C) for labels (n,); None if the run was asked to stop meanwhile."""
        parameters = ema_parameters(state.ema, self.config.optimizer)
        batches = []
        for images in generate_images(
            self.network,
            parameters,
            labels,
            seed=SAMPLE_SEED,
            config=self.config.sampling,
            mesh=self.mesh,
        ):
            batches.append(images)
            if self.interruption.agreed_now():
                return None
        return np.concatenate(batches)

    def grid_path(self, step: int) -> Path:
        """Where the sample grid of a step is."""
        return self.workdir / "samples" / f"step_{step:06d}.png"

    def has_grid(self, step: int) -> bool:
        """Whether the sample grid of a step is there."""
        return bool(of_first_process(self.grid_path(step).is_file()))

    def draw_grid(self, state: TrainState) -> bool:
        """Draws and writes the sample grid of the state's step; False if stopped meanwhile."""
        step = int(state.step)
        labels = self._grid_labels()
        images = self.samples(state, labels)
        if images is None:
            return False
        if jax.process_index() > 0:
            return True
        scale = self.config.sampling.guidance_scale
        picture = draw_grid(
            self._decode(images),
            columns=len(np.unique(labels)),
            title=f"{self.config.data.source}, step {step}, guidance {scale:g}, averaged weights",
            labels=[self.source.label_names[label] for label in labels],
        )
        path = self.grid_path(step)
        unfinished = path.with_name("unfinished_" + path.name)
        with tolerated(f"the sample grid of step {step}"):
            path.parent.mkdir(exist_ok=True)
            save_png(picture, unfinished)
            unfinished.replace(path)
        self.writers.image(step, "samples", picture)
        return True

    def score(self, state: TrainState) -> bool:
        """Scores class-balanced samples and says how good they are; False if stopped meanwhile."""
        step = int(state.step)
        scores = self._written(step, "label_agreement")
        if not of_first_process(scores is not None and self.grid_path(step).is_file()):
            scores = self._new_scores(state)
            if scores is None:
                return False
        if scores is not None:  # Only the first process is sure to find what was written.
            ratio = scores["pixel_frechet"] / scores["pixel_frechet_floor"]
            print(f"sample grid: {self.grid_path(step)}")
            print(
                f"label_agreement: {scores['label_agreement']:.1%} of "
                f"{self.config.evaluation.num} samples"
            )
            print(
                f"pixel_frechet: {scores['pixel_frechet']:.3f}, {ratio:.2f} times "
                f"pixel_frechet_floor {scores['pixel_frechet_floor']:.3f}",
                flush=True,
            )
        return True

    def _written(self, step: int, name: str) -> dict[str, float] | None:
        """The record of a step that has a value of this name."""
        records = read_metrics(self.workdir)
        return next((r for r in records if r["step"] == step and name in r), None)

    def _balanced(self, count: int) -> np.ndarray:
        return np.arange(count) % self.config.model.num_classes

    def _new_scores(self, state: TrainState) -> dict[str, float] | None:
        """Draws and writes scores and grid of the state; None if stopped meanwhile."""
        count = self.config.evaluation.num
        print(f"drawing {count} samples to score ...", file=sys.stderr, flush=True)
        labels = self._balanced(count)
        images = self.samples(state, labels)
        if images is None or not self.draw_grid(state):
            return None
        scores = pixel_scores(images, labels, self.source)
        with tolerated("scores"):
            self.writers.scalars(int(state.step), scores)
        return scores

    def _grid_labels(self) -> np.ndarray:
        """Labels of the sample grid, row by row: up to ten classes, spread over all."""
        classes = self.config.model.num_classes
        columns = np.unique(np.linspace(0, classes - 1, min(GRID_COLUMNS, classes)).astype(int))
        return np.tile(columns, self.config.sampling.grid_rows)
