"""The training run: from a config and a workdir to checkpoints, metrics and samples.

Step n is dispatched before the metrics of step n - 1 are read, so that the device never waits for
the host. Where the state itself is used, to save it or to draw with it, its own step's metrics are
read first. A step gone bad is left to training/recovery.py, being asked to stop to interruption.py.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from pathlib import Path
from typing import Any

import jax

from dydilit_jax.agreement import common_text, raised_together
from dydilit_jax.config import Config
from dydilit_jax.data.load import load_data
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.errors import UserError
from dydilit_jax.models.count import multiply_adds
from dydilit_jax.training.checkpoint import Checkpointer, open_workdir
from dydilit_jax.training.evaluation import Evaluation
from dydilit_jax.training.guard import WATCHED, not_finite
from dydilit_jax.training.inheritance import inherited_state, load_teacher
from dydilit_jax.training.interruption import Interruption, stop_signals
from dydilit_jax.training.lock import WorkdirLock, locked
from dydilit_jax.training.progress import Progress
from dydilit_jax.training.recovery import Recovery, due
from dydilit_jax.training.sharding import check_fits, make_mesh, to_mesh
from dydilit_jax.training.state import (
    Network,
    TrainState,
    abstract_state,
    create_state,
    state_shardings,
)
from dydilit_jax.training.step import Metrics, compile_step
from dydilit_jax.training.storage import tolerated, warn
from dydilit_jax.training.telemetry import summarize
from dydilit_jax.training.throughput import Profiler, Throughput
from dydilit_jax.training.writers import Writers, truncate_metrics

LAST_ATTEMPTS, RETRY_SECONDS = 3, 2.0
RETRY_PARTS = 10  # tries again after this part of checkpoint_every


@dataclasses.dataclass(frozen=True)
class Dispatched:
    """A step that was handed to the devices.

    Attributes:
      step: its number; the first is 1.
      metrics: of it, not yet waited for.
      position: of the data after its batch.
    """

    step: int
    metrics: Metrics
    position: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a start of a run ended, the same on every process.

    Attributes:
      state: the last one.
      finished: whether every step, grid and score is there; not so after being asked to stop.
    """

    state: TrainState
    finished: bool


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
        # The rules' mistakes are to show before a file is written.
        state_shardings(self.network, self.mesh)
        self.source, batches = load_data(config)
        # With several processes placing may exchange rows between them, which every process has to
        # do at the same point of its program: not in a thread of its own.
        depth = config.data.prefetch if jax.process_count() == 1 else 0
        self.batches = DevicePrefetch(batches, lambda batch: to_mesh(batch, self.mesh), depth=depth)
        self.teacher = load_teacher(self.network, self.mesh)
        self.recovery = Recovery()

    def open(self, lock: WorkdirLock | None, requested: threading.Event) -> None:
        """Prepares the workdir, which the run holds from now on, and what writes to it."""
        train = self.config.train
        with raised_together():
            open_workdir(self.workdir, self.config)
        self.lock = lock
        self.interruption = Interruption(self.mesh, requested)
        self.checkpointer = Checkpointer(
            self.workdir, keep=train.keep_checkpoints, keep_every=train.keep_every
        )
        self.progress = Progress(train.steps, self.config.data.batch_size)
        self.writers = Writers(self.workdir)
        self.profiler = Profiler(self.workdir, train.profile_at, train.profile_steps)
        self.meter = self._throughput(0)
        self.evaluation = Evaluation(
            self.network, self.mesh, self.source, self.workdir, self.writers, self.interruption
        )

    def close(self) -> None:
        """Waits until all is written."""
        self.profiler.close()
        self.batches.close()
        try:
            self.checkpointer.close()
        finally:
            with tolerated("metrics"):
                self.writers.close()

    def start(self) -> TrainState:
        """The newest good checkpoint's state, with the data moved to its place; or a new one."""
        restored = self.checkpointer.resume(abstract_state(self.network, self.mesh))
        self.checkpointer.discard_unfinished()
        if restored is None:
            self._truncate_metrics(0)
            return self._new_state()
        state, saved = restored
        step = int(state.step)
        self.meter = self._throughput(step)
        self.batches.set_state(saved["position"])
        self.recovery = Recovery.from_json(saved["recovery"])
        self._truncate_metrics(step)
        print(f"resumed from {self.workdir} at step {step}", flush=True)
        return state

    def review(self, done: Dispatched, log: bool) -> str | None:
        """Waits for a step's metrics, judges and logs them; says what is bad, None if nothing is.

        Raises:
          UserError: the step is not finite, and the run is to stop at that.
        """
        train = self.config.train
        with self.meter.measure("device"):
            watched = jax.device_get({name: done.metrics[name] for name in WATCHED})
        values = {name: float(value) for name, value in watched.items()}
        problem = self.recovery.review(values, train)
        if train.nonfinite == "stop" and (bad := not_finite(values)):
            self.checkpointer.wait()
            saved = self.checkpointer.latest_step()
            kept = "no checkpoint was written" if saved is None else f"checkpoint {saved} is kept"
            raise UserError(
                f"{bad} at step {done.step}, training stops; {kept}. Lower "
                "optimizer.learning_rate, set optimizer.clip_norm, or compute in float32"
            )
        if problem is not None and jax.process_index() == 0:
            what = "skipped" if not_finite(values) else "bad"
            warn(f"step {done.step} is {what}: {problem} ({self.recovery.streak} in a row)")
        if log:
            scalars, usages = summarize(jax.device_get(done.metrics))
            scalars |= self.progress.report(done.step, scalars["loss"])
            scalars |= self.meter.report(done.step)
            scalars |= {
                "skipped_steps": self.recovery.skipped,
                "rollbacks": len(self.recovery.rollbacks),
            }
            with tolerated(f"metrics of step {done.step}"):
                self.writers.scalars(done.step, scalars, usages)
        return problem

    def go_back(self, bad: Dispatched, problem: str) -> TrainState:
        """The last good checkpoint's state, with the data after the last bad batch.

        Raises:
          UserError: it went back to there too often.
        """
        self.progress.pause()
        abstract = abstract_state(self.network, self.mesh)
        restored = self.checkpointer.resume(abstract, scheduled=True)
        restored = restored or self.checkpointer.resume(abstract)
        if restored is None:
            state, remembered = self._new_state(), Recovery()
        else:
            state, remembered = restored[0], Recovery.from_json(restored[1]["recovery"])
        step = int(state.step)
        self.recovery = self.recovery.rolled_back(
            remembered, step, bad.step, problem, self.config.train.max_rollbacks
        )
        self.checkpointer.discard_after(step)
        self.batches.set_state(bad.position)
        self._truncate_metrics(step)
        if jax.process_index() == 0:
            where = f"checkpoint {step}" if restored else "the start"
            warn(
                f"{self.config.train.rollback_after} bad steps up to step {bad.step}: back to "
                f"{where}, and on without the batches in between"
            )
        self.progress.start(step)
        self.meter = self._throughput(step)
        self.meter.compiled(step)
        return state

    def draw(self, state: TrainState) -> bool:
        """Draws the sample grid of the state's step; False if the run was asked to stop."""
        self.progress.pause()
        with self.meter.measure("samples"):
            drawn = self.evaluation.draw_grid(state)
        self.progress.resume()
        return drawn

    def measure(self, state: TrainState) -> bool:
        """Scores samples of the state's step; False if the run was asked to stop."""
        self.progress.pause()
        with self.meter.measure("samples"):
            measured = self.evaluation.measure(state)
        self.progress.resume()
        return measured

    def finish(self, state: TrainState) -> bool:
        """Shows what is still to be shown of the last step; False if asked to stop meanwhile."""
        step, shown, evaluation = int(state.step), self.evaluation, self.config.evaluation
        # With a report the last grid comes with it.
        drawn = evaluation.reports or not due(step, self.config.train.sample_every)
        done = (
            (drawn or shown.has_grid(step) or shown.draw_grid(state))
            and (not evaluation.every or shown.has_scores(step) or shown.measure(state))
            and (not evaluation.reports or shown.score(state))
        )
        if not done:
            print(f"stopped after the last step, {step}; run again to draw and score", flush=True)
        return done

    def save(self, state: TrainState, position: dict[str, Any], scheduled: bool) -> None:
        """Starts saving a checkpoint."""
        with raised_together():
            if self.lock is not None:
                self.lock.check()
        self.progress.pause()
        data = {"position": position, "recovery": self.recovery.to_json()}
        with self.meter.measure("checkpoint"):
            self.checkpointer.save(state, data, scheduled)
        self.progress.resume()

    def save_last(self, state: TrainState, position: dict[str, Any], scheduled: bool) -> None:
        """Saves the checkpoint that a run ends with, and waits until it is on disk.

        Raises:
          UserError: the storage takes nothing, several times.
        """
        for attempt in range(LAST_ATTEMPTS):
            if attempt:
                time.sleep(RETRY_SECONDS)
            self.save(state, position, scheduled)
            self.checkpointer.wait()
            failed = self.checkpointer.failed_step is not None
            if common_text("failed" if failed else None) is None:
                return
        saved = self.checkpointer.latest_step()
        raise UserError(
            f"the checkpoint of step {int(state.step)} could not be written to "
            f"{str(self.workdir)!r}; "
            + ("there is none" if saved is None else f"the last one is that of step {saved}")
        )

    def wants_retry(self, step: int) -> bool:
        """Whether to try again, between two checkpoints, what the storage did not take.

        Not with several processes: each learns of a failure at its own time, and saving is done
        together. They try again when the next checkpoint is due.
        """
        failed = self.checkpointer.failed_step
        wait = max(1, self.config.train.checkpoint_every // RETRY_PARTS)
        return failed is not None and jax.process_count() == 1 and step >= failed + wait

    def _throughput(self, step: int) -> Throughput:
        """The measure of a run that goes on from `step`."""
        macs = multiply_adds(self.config.model, self.network.out_channels)
        return Throughput(
            self.workdir,
            step,
            batch_size=self.config.data.batch_size,
            multiply_adds=sum(macs.values()),
            devices=list(self.mesh.devices.flat),
        )

    def _new_state(self) -> TrainState:
        state = create_state(self.network, self.mesh)
        source = self.config.inheritance.checkpoint
        return inherited_state(self.network, state, source) if source else state

    def _truncate_metrics(self, step: int) -> None:
        if jax.process_index() == 0:
            truncate_metrics(self.workdir, step)


def train(config: Config, workdir: Path, *, stop_step: int | None = None) -> Outcome:
    """Trains until config.train.steps, from where the workdir's newest checkpoint is.

    Args:
      config: the run's config.
      workdir: where everything is written; made if it does not exist.
      stop_step: stop when so many steps are done, as if interrupted.

    Returns:
      The last state, and whether the run is finished; if it is not, the next start goes on.

    Raises:
      UserError: a config, workdir or data that do not fit; a workdir in use; a run gone bad.
    """
    run = Run(config, workdir)
    with locked(workdir) as lock, stop_signals() as requested:
        run.open(lock, requested)
        try:
            run.evaluation.prepare()
            state = _loop(run, min(stop_step or math.inf, config.train.steps))
            finished = int(state.step) >= config.train.steps and run.finish(state)
        finally:
            run.close()
    return Outcome(state, finished)


def _loop(run: Run, last_step: float) -> TrainState:
    intervals = run.config.train
    state = run.start()
    first = step = int(state.step)
    if step >= last_step:
        print(f"{run.workdir} has all its {step} steps", flush=True)
        return state
    evaluation = run.config.evaluation
    stop = False
    if step and due(step, intervals.sample_every) and not run.evaluation.has_grid(step):
        stop = not run.evaluation.draw_grid(state)  # The run had ended before it was drawn.
    if step and not stop and due(step, evaluation.every) and not run.evaluation.has_scores(step):
        stop = not run.evaluation.measure(state)
    train_step = compile_step(run.network, run.mesh, run.teacher)
    previous: Dispatched | None = None
    while not stop:
        with run.meter.measure("data"):
            batch = next(run.batches)
        run.profiler.before_step(step + 1)
        with run.meter.measure("dispatch"):
            state, metrics = train_step(state, batch)
            # Freeing lets the reading threads have Python: not while data is waited for.
            del batch
        step += 1
        run.profiler.after_step(step, metrics)
        newest = Dispatched(step, metrics, run.batches.get_state())
        run.interruption.propose()
        if step == first + 1:
            # Compilation is no part of the rate.
            jax.block_until_ready(metrics)
            run.progress.start(step)
            run.meter.compiled(step)

        # Review the step before, and this one too if its state is about to be used.
        reviewed, problem = previous, None
        if previous is not None:
            problem = run.review(previous, log=due(previous.step, intervals.log_every))
        streak = run.recovery.streak
        stop = run.interruption.agreed() or step >= last_step
        shows = step != intervals.steps  # Of the last step, finish() does.
        draws = shows and due(step, intervals.sample_every)
        measures = shows and due(step, evaluation.every)
        saves = due(step, intervals.checkpoint_every, streak)
        retries = run.wants_retry(step)
        used = stop or draws or measures or saves or retries or streak > 0
        if used and not (problem and streak >= intervals.rollback_after):
            reviewed = newest
            problem = run.review(newest, log=stop or due(step, intervals.log_every))
        previous = None if used else newest
        if reviewed is not None and problem and run.recovery.streak >= intervals.rollback_after:
            del state
            state = run.go_back(reviewed, problem)
            step, stop, previous = int(state.step), False, None
            continue

        # Save, and show.
        scheduled = bool(saves and not run.recovery.streak)
        if scheduled or (retries and not stop):
            run.save(state, newest.position, scheduled)
        if draws and not (stop and step < last_step):
            stop = not run.draw(state) or stop
        if measures and not (stop and step < last_step):
            stop = not run.measure(state) or stop
        if stop:
            run.save_last(state, newest.position, scheduled)
    if step < intervals.steps:
        print(f"stopped at step {step} of {intervals.steps}; run again to go on", flush=True)
    return state
