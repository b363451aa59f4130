"""The training run: from a config and a workdir to checkpoints, metrics and samples.

Step n is dispatched before the metrics of step n - 1 are read, so that the device never waits for
the host; a checkpoint is written only after its own step's metrics were seen to be finite.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dydilit_jax.config import Config
from dydilit_jax.data.pipeline import BatchIterator, make_batches
from dydilit_jax.data.sources import Source, load_source
from dydilit_jax.drawing import draw_grid, save_png
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.pixels import pixel_scores
from dydilit_jax.models.count import multiply_adds
from dydilit_jax.training.checkpoint import Checkpointer, open_workdir
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.inheritance import inherited_state, load_teacher
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.progress import Progress
from dydilit_jax.training.sharding import check_fits, make_mesh, to_mesh
from dydilit_jax.training.state import (
    Network,
    TrainState,
    abstract_state,
    create_state,
    state_shardings,
)
from dydilit_jax.training.step import Metrics, compile_step
from dydilit_jax.training.telemetry import summarize
from dydilit_jax.training.throughput import Profiler, Throughput
from dydilit_jax.training.writers import Writers, read_metrics, truncate_metrics

SAMPLE_SEED = 0
GRID_COLUMNS = 10


def load_data(config: Config) -> tuple[Source, BatchIterator]:
    """The config's data set, and this process's batches of it.

    Raises:
      UserError: the network's input or classes are not the data's.
    """
    source = load_source(config.data.source)
    model = config.model
    expected = (model.image_size, model.image_size, model.channels)
    if tuple(source.image_shape) != expected:
        raise UserError(
            f"data source {config.data.source!r} has images {source.image_shape}, the network "
            f"expects {expected}: set model.image_size and model.channels"
        )
    if len(source.label_names) != model.num_classes:
        raise UserError(
            f"data source {config.data.source!r} has {len(source.label_names)} classes, "
            f"model.num_classes is {model.num_classes}"
        )
    batches = make_batches(
        source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        horizontal_flip=config.data.horizontal_flip,
        read_threads=config.data.read_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return source, batches


def check_finite(step: int, metrics: Metrics, saved: int | None) -> None:
    """Waits for a step's metrics; raises UserError if loss, gradients or updates are not finite."""
    for name in ("loss", "gradient_norm", "update_norm"):
        value = float(metrics[name])
        if not math.isfinite(value):
            kept = "no checkpoint was written" if saved is None else f"checkpoint {saved} is kept"
            raise UserError(
                f"{name} is {value} at step {step}, training stops; {kept}. Lower "
                "optimizer.learning_rate, set optimizer.clip_norm, or compute in float32"
            )


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGTERM and SIGINT into a question, to be asked between steps; a second one kills."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    previous = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])

    for name in previous:
        signal.signal(name, handle)
    try:
        yield stop.is_set
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


class Run:
    """A training run's parts, built once.

    Args:
      config: the run's config.
      workdir: where everything is written.
    """

    def __init__(self, config: Config, workdir: Path):
        self.config = config
        self.workdir = workdir
        self.mesh = make_mesh(config.mesh)
        check_fits(config, self.mesh)
        self.network = Network.create(config)
        state_shardings(
            self.network, self.mesh
        )  # Its mistakes are to show before a file is written.
        self.source, self.batches = load_data(config)
        self.teacher = load_teacher(self.network, self.mesh)
        open_workdir(workdir, config)
        self.checkpointer = Checkpointer(workdir, keep=config.train.keep_checkpoints)

    def start(self) -> TrainState:
        """The newest checkpoint's state, with the batches moved to its position; or a new one."""
        step = self.checkpointer.latest_step()
        if step is None:
            truncate_metrics(self.workdir, 0)
            state = create_state(self.network, self.mesh)
            source = self.config.inheritance.checkpoint
            return inherited_state(self.network, state, source) if source else state
        state, position = self.checkpointer.restore(abstract_state(self.network, self.mesh))
        self.batches.set_state(position)
        truncate_metrics(self.workdir, step)
        print(f"resumed from {self.workdir} at step {step}", flush=True)
        return state

    def throughput(self, step: int) -> Throughput:
        """The measure of a run that goes on from `step`."""
        macs = multiply_adds(self.config.model, self.network.out_channels)
        return Throughput(
            self.workdir,
            step,
            batch_size=self.config.data.batch_size,
            multiply_adds=sum(macs.values()),
            devices=list(self.mesh.devices.flat),
        )

    def samples(self, state: TrainState, labels: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C) for labels (n,), drawn with the averaged parameters."""
        parameters = ema_parameters(state.ema, self.config.optimizer)
        batches = generate_images(
            self.network,
            parameters,
            labels,
            seed=SAMPLE_SEED,
            config=self.config.sampling,
            mesh=self.mesh,
        )
        return np.concatenate(list(batches))

    def grid_labels(self) -> np.ndarray:
        """Labels of the sample grid, row by row: up to ten classes, spread over all."""
        classes = self.config.model.num_classes
        columns = np.unique(np.linspace(0, classes - 1, min(GRID_COLUMNS, classes)).astype(int))
        return np.tile(columns, self.config.sampling.grid_rows)

    def draw_samples(
        self, step: int, images: np.ndarray, labels: np.ndarray, writers: Writers
    ) -> Path:
        """Writes the sample grid of a step to the workdir and TensorBoard."""
        path = self.workdir / "samples" / f"step_{step:06d}.png"
        scale = self.config.sampling.guidance_scale
        picture = draw_grid(
            images,
            columns=len(np.unique(labels)),
            title=f"{self.config.data.source}, step {step}, guidance {scale:g}, averaged weights",
            labels=[self.source.label_names[label] for label in labels],
        )
        if jax.process_index() == 0:
            path.parent.mkdir(exist_ok=True)
            save_png(picture, path)
        writers.image(step, "samples", picture)
        return path

    def evaluate(self, state: TrainState, writers: Writers) -> None:
        """Draws and scores class-balanced samples, and tells where the grid is and how good."""
        step = int(state.step)
        count = self.config.evaluation.num
        scores = next(
            (r for r in read_metrics(self.workdir) if r["step"] == step and "label_agreement" in r),
            None,
        )
        grid = self.workdir / "samples" / f"step_{step:06d}.png"
        if scores is None or not grid.is_file():
            print(f"drawing {count} samples to score ...", file=sys.stderr, flush=True)
            labels = np.arange(count) % self.config.model.num_classes
            images = self.samples(state, labels)
            grid_labels = self.grid_labels()
            self.draw_samples(step, self.samples(state, grid_labels), grid_labels, writers)
            scores = pixel_scores(images, labels, self.source)
            writers.scalars(step, scores)
        ratio = scores["pixel_frechet"] / scores["pixel_frechet_floor"]
        print(f"sample grid: {grid}")
        print(f"label_agreement: {scores['label_agreement']:.1%} of {count} samples")
        print(
            f"pixel_frechet: {scores['pixel_frechet']:.3f}, {ratio:.2f} times "
            f"pixel_frechet_floor {scores['pixel_frechet_floor']:.3f}",
            flush=True,
        )


def train(config: Config, workdir: Path, *, stop_step: int | None = None) -> TrainState:
    """Trains until config.train.steps, from where the workdir's newest checkpoint is.

    Args:
      config: the run's config.
      workdir: where checkpoints, metrics and samples go.
      stop_step: stop after this step, with a checkpoint, as a signal would.

    Returns:
      The last state.

    Raises:
      UserError: a config, workdir or data that do not fit; a loss that is not finite.
    """
    run = Run(config, workdir)
    writers = Writers(workdir)
    profiler = Profiler(workdir, config.train.profile_at, config.train.profile_steps)
    try:
        with stop_signals() as stop_requested:
            state = _loop(
                run,
                writers,
                profiler,
                stop_requested,
                min(stop_step or math.inf, config.train.steps),
            )
        if int(state.step) >= config.train.steps and config.evaluation.num:
            run.evaluate(state, writers)
    finally:
        profiler.close()
        run.checkpointer.close()
        writers.close()
    return state


def _loop(
    run: Run,
    writers: Writers,
    profiler: Profiler,
    stop_requested: Callable[[], bool],
    last_step: float,
) -> TrainState:
    config, intervals = run.config, run.config.train
    state = run.start()
    first = step = int(state.step)
    if step >= last_step:
        print(f"{run.workdir} is finished: {step} steps", flush=True)
        return state
    train_step = compile_step(run.network, run.mesh, run.teacher)
    progress = Progress(intervals.steps, config.data.batch_size)
    meter = run.throughput(step)
    previous: tuple[int, Metrics] | None = None
    while step < last_step:
        with meter.measure("data"):
            batch = to_mesh(next(run.batches), run.mesh)
        profiler.before_step(step + 1)
        with meter.measure("dispatch"):
            state, metrics = train_step(state, batch)
        step += 1
        profiler.after_step(step, metrics)
        if previous is not None:
            with meter.measure("device"):
                check_finite(*previous, run.checkpointer.latest_step())
        previous = (step, metrics)
        if step == first + 1:
            # Compilation is no part of the rate.
            jax.block_until_ready(metrics)
            progress.start(step)
            meter.compiled(step)
        stop = step >= last_step or stop_requested()
        if _due(step, intervals.log_every) or stop:
            with meter.measure("device"):
                scalars, usages = summarize(jax.device_get(metrics))
            check_finite(step, metrics, run.checkpointer.latest_step())
            scalars |= progress.report(step, scalars["loss"]) | meter.report(step)
            writers.scalars(step, scalars, usages)
        if _due(step, intervals.checkpoint_every) or stop:
            progress.pause()
            check_finite(step, metrics, run.checkpointer.latest_step())
            with meter.measure("checkpoint"):
                run.checkpointer.save(state, run.batches.get_state())
            progress.resume()
        finished = step >= intervals.steps and config.evaluation.num
        if _due(step, intervals.sample_every) and not finished:
            progress.pause()
            with meter.measure("samples"):
                labels = run.grid_labels()
                run.draw_samples(step, run.samples(state, labels), labels, writers)
            progress.resume()
        if stop:
            break
    if step < intervals.steps:
        print(f"stopped at step {step} of {intervals.steps}; run again to go on", flush=True)
    return state


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
