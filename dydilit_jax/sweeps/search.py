"""Runs that depend on the scores of those before them, through Optuna.

WORKDIR/search.journal is Optuna's journal: every draw, every score and every verdict is a line of
it, written before anything follows from it. A search that starts again reads it and goes on; a
trial is the run of its number, `trial_0007`.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.notation import Part, Score, Search, Uniform
from dydilit_jax.sweeps.observe import ALIVE, State, Status
from dydilit_jax.sweeps.runs import Run, SweepFile, add_run

JOURNAL = "search.journal"
STUDY = "search"
SAME_AS = "same_as"
DUPLICATES = 30  # draws in a row that were all there before, after which the space is used up

Key = tuple[tuple[str, Any], ...]


class _SweepsLock:
    """The journal's lock: none, for the sweep holds its workdir. Optuna's own outlives a kill."""

    def acquire(self) -> bool:
        """Always."""
        return True

    def release(self) -> None:
        """Nothing was taken."""


class Searched:
    """The plan of a sweep whose runs are drawn, one after the other.

    Args:
      workdir: the sweep's, on this machine.
      file: what a run's config is made from.
      search: the space.
      score: what is searched for; where it is logged while a run trains, hopeless runs are stopped.

    Raises:
      UserError: Optuna is missing, or a run of the journal does not fit the config any more.
    """

    def __init__(self, workdir: Path, file: SweepFile, search: Search, score: Score):
        self._workdir, self._file, self._search = workdir, file, search
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "SEARCH needs Optuna: pip install optuna, or dydilit_jax with its extra `sweep`"
            ) from error
        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = optuna.storages.journal
        path = workdir / JOURNAL
        drop_unfinished_line(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That the journal is experimental.
            storage = journal.JournalStorage(
                journal.JournalFileBackend(str(path), lock_obj=_SweepsLock())
            )
        self._study = optuna.create_study(
            storage=storage,
            study_name=STUDY,
            direction="maximize" if score.maximize else "minimize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(
                n_startup_trials=search.startup, n_warmup_steps=search.warmup_steps
            ),
        )
        self._distributions = {
            field: self._distribution(options) for field, options in search.space.items()
        }
        self._used_up = False
        self._runs: dict[str, Run] = {}
        for trial in self._trials():
            if trial.params.keys() != search.space.keys():
                # The sweep was killed while it drew this one; nothing came of it.
                if not trial.state.is_finished():
                    self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            elif SAME_AS not in trial.user_attrs:
                run = self._run(trial)
                self._runs[run.name] = run

    def known(self) -> Sequence[Run]:
        """All runs drawn so far."""
        return list(self._runs.values())

    def ask(self, room: int | None) -> Sequence[Run]:
        """Draws further runs."""
        drawn: list[Run] = []
        duplicates = 0
        while not self._used_up and len(self._runs) < self._search.trials:
            if room is not None and len(drawn) >= room:
                break
            before = {_key(trial.params): trial for trial in self._trials()}
            # A sampler that starts again with the seed it had would draw the same again.
            self._study.sampler = self._sampler(self._search.seed + len(before) + duplicates)
            trial = self._study.ask(self._distributions)
            same = before.get(_key(trial.params))
            if same is not None:
                self._skip(trial, same)
                duplicates += 1
                self._used_up = not self._enqueue_new(before) or duplicates >= DUPLICATES
                continue
            duplicates = 0
            run = self._run(trial)
            self._runs[run.name] = run
            add_run(self._workdir, run)
            drawn.append(run)
        return drawn

    def tell(self, statuses: dict[str, Status]) -> None:
        """Reports scores; calls those hopeless that are worse than the median at their step."""
        finished = self._optuna.trial.TrialState
        for trial in self._trials():
            status = statuses.get(_name(trial.number))
            if status is None or SAME_AS in trial.user_attrs:
                continue
            if trial.state == finished.PRUNED:
                status.hopeless = True
            if trial.state.is_finished():
                continue
            living = self._optuna.trial.Trial(self._study, trial._trial_id)
            new = sorted(status.scores.keys() - trial.intermediate_values.keys())
            for step in new:
                living.report(status.scores[step], step)
            if status.state is State.FINISHED:
                if status.score is None:
                    self._study.tell(trial.number, state=finished.FAIL)
                else:
                    self._study.tell(trial.number, status.score)
            elif new and self._search.prune and status.state in ALIVE and living.should_prune():
                # The verdict comes before the signal: who is killed in between sends it later.
                self._study.tell(trial.number, state=finished.PRUNED)
                status.hopeless = True

    def _skip(self, trial: Any, same: Any) -> None:
        """Ends a trial that repeats another, with what is known of that."""
        complete = self._optuna.trial.TrialState.COMPLETE
        trial.set_user_attr(SAME_AS, same.number)
        if same.state == complete:
            self._study.tell(trial, same.value)
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _enqueue_new(self, before: Container[Key]) -> bool:
        """Lets the next draw be one that was not there, if the space is lists; False if all were.

        A model that likes one corner of a small space draws from that alone.
        """
        space = self._search.space
        lists = [each for each in space.values() if not isinstance(each, Uniform)]
        if len(lists) < len(space):
            return True
        for values in itertools.product(*lists):
            parameters = dict(zip(space, values, strict=True))
            if _key(parameters) not in before:
                self._study.enqueue_trial(parameters)
                return True
        return False

    def _run(self, trial: Any) -> Run:
        fields = {**self._search.fields, **trial.params}
        part = Part(fields=fields, tags=self._search.tags)
        return self._file.run(part, name=_name(trial.number))

    def _trials(self) -> list[Any]:
        return self._study.get_trials(deepcopy=False)

    def _sampler(self, seed: int) -> Any:
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._search.startup)

    def _distribution(self, options: Uniform | Sequence[Any]) -> Any:
        kinds = self._optuna.distributions
        if not isinstance(options, Uniform):
            return kinds.CategoricalDistribution(list(options))
        if options.whole:
            return kinds.IntDistribution(int(options.low), int(options.high), log=options.log)
        return kinds.FloatDistribution(float(options.low), float(options.high), log=options.log)


def drop_unfinished_line(path: Path) -> None:
    """Cuts off what a killed writer left of the last line, so that the next one stands alone."""
    if not path.is_file():
        return
    text = path.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        os.truncate(path, len(complete))


def _name(trial: int) -> str:
    return f"trial_{trial:04d}"


def _key(parameters: dict[str, Any]) -> Key:
    return tuple(sorted(parameters.items()))
