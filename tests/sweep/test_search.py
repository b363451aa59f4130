"""A search: drawn runs, scores, verdicts, and going on after a kill at any point."""

import io
import sys
import threading

import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.driver import Sweep
from dydilit_jax.sweeps.local import LocalProcesses
from dydilit_jax.sweeps.notation import Score, log_uniform, search, uniform
from dydilit_jax.sweeps.observe import State, Status
from dydilit_jax.sweeps.runs import open_sweep, read_sweep
from dydilit_jax.sweeps.search import JOURNAL, Searched, drop_unfinished_line
from dydilit_jax.sweeps.table import Table
from tests.sweep.fakes import FAKE, starts
from tests.sweep.test_notation import sweep_file

optuna = pytest.importorskip("optuna")

RATE = "optimizer.learning_rate"
LOSS = Score("loss")


def plan_of(workdir, space, score=LOSS, **options):
    file = sweep_file(SEARCH=search(space, **options))
    plan = Searched(workdir, file, file.search, score)
    open_sweep(workdir, file, plan.known(), score)
    return plan


def run(workdir, plan, *, steps=4, seconds=0.0, max_parallel=1):
    """Runs the search with fakes whose loss at step n is the drawn rate over n."""

    def command(run):
        rate = run.overrides[RATE]
        options = [f"--steps={steps}", f"--rate={rate}", f"--seconds={seconds}"]
        return [sys.executable, "-S", str(FAKE), str(workdir / run.name), *options]

    backend = LocalProcesses(workdir, command)
    backend.interval = 0.02
    table = Table(LOSS, io.StringIO())
    sweep = Sweep(workdir, plan, backend, LOSS, table, max_parallel=max_parallel)
    return sweep, sweep.run(threading.Event())


def trials(workdir):
    """What the journal says, read by Optuna itself."""
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(workdir / JOURNAL))
    )
    return optuna.load_study(study_name="search", storage=storage).trials


def test_every_run_is_a_trial_with_its_scores_and_a_search_goes_on(tmp_path):
    space = {RATE: log_uniform(0.1, 10.0)}
    fixed = {"train.steps": 4}
    _, code = run(tmp_path, plan_of(tmp_path, space, trials=3, fields=fixed), max_parallel=2)
    assert code == 0
    _, code = run(tmp_path, plan_of(tmp_path, space, trials=5, fields=fixed, prune=False))
    assert code == 0
    found = trials(tmp_path)
    recorded = read_sweep(tmp_path)
    assert recorded is not None
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 5
    rates = [trial.params[RATE] for trial in found]
    assert len(set(rates)) == 5  # The second start did not draw again what the first had.
    for trial in found:
        rate = trial.params[RATE]
        assert trial.value == pytest.approx(rate / 4)
        assert trial.intermediate_values == pytest.approx({n: rate / n for n in (1, 2, 3, 4)})
        record = recorded["runs"][f"trial_{trial.number:04d}"]
        assert record["config"]["optimizer"]["learning_rate"] == rate
        assert record["config"]["train"]["steps"] == 4
        assert starts(tmp_path / f"trial_{trial.number:04d}") == [0]


def test_a_hopeless_run_saves_ends_and_stays_ended(tmp_path):
    options = {"trials": 2, "startup": 1, "warmup_steps": 2, "fields": {"train.steps": 400}}
    space = {RATE: [1.0, 9.0]}
    plan = plan_of(tmp_path, space, **options)
    for rate in space[RATE]:
        plan._study.enqueue_trial({RATE: rate})
    sweep, code = run(tmp_path, plan, steps=400, seconds=0.001)
    assert code == 0  # A pruned run is no failure.
    states = [each.state for each in sweep.statuses.values()]
    assert states == [State.FINISHED, State.PRUNED]
    pruned = tmp_path / "trial_0001"
    (saved,) = (pruned / "checkpoints").iterdir()
    assert 2 < int(saved.name) < 400
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "PRUNED"]

    # Started again, it is left alone; if the sweep was killed before the signal, it is sent now.
    sweep, code = run(tmp_path, plan_of(tmp_path, space, **options), steps=400)
    assert code == 0
    assert len(starts(pruned)) == 1
    alive = {"trial_0001": Status("trial_0001", 400, State.RUNNING, step=5)}
    plan_of(tmp_path, space, **options).tell(alive)
    assert alive["trial_0001"].hopeless


def test_a_space_that_is_used_up_ends_the_search(tmp_path):
    plan = plan_of(tmp_path, {RATE: [1.0, 2.0]}, trials=9, fields={"train.steps": 4})
    sweep, code = run(tmp_path, plan, max_parallel=3)
    assert code == 0
    assert len(sweep.statuses) == 2
    assert {trial.params[RATE] for trial in trials(tmp_path)} == {1.0, 2.0}


def test_a_draw_that_a_kill_cut_off_is_given_up_and_drawn_anew(tmp_path):
    space = {RATE: uniform(0.1, 1.0), "optimizer.warmup_steps": uniform(0, 5)}
    plan = plan_of(tmp_path, space, trials=1)
    plan._study.ask()  # A trial whose fields were not written yet,
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code": 5, "worker')  # and half a line.
    drop_unfinished_line(journal)
    assert journal.read_bytes() == whole
    again = plan_of(tmp_path, space, trials=1)
    assert again.known() == []
    (drawn,) = again.ask(None)
    assert drawn.name == "trial_0001"
    assert isinstance(drawn.overrides["optimizer.warmup_steps"], int)
    # Killed between the draw and the start: the run is known, and started then.
    assert [each.config for each in plan_of(tmp_path, space, trials=1).known()] == [drawn.config]
    assert again.ask(None) == []


def test_more_can_be_better_and_a_run_without_a_score_tells_nothing(tmp_path):
    plan = plan_of(tmp_path, {RATE: uniform(0.1, 1.0)}, Score("quality", True), trials=3)
    names = [run.name for run in plan.ask(None)]
    statuses = {name: Status(name, 4, State.FINISHED) for name in names}
    statuses[names[0]].score, statuses[names[1]].score = 0.3, 0.8
    plan.tell(statuses)
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert plan._study.best_trial.value == 0.8


def test_without_optuna_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        plan_of(tmp_path, {RATE: [1.0]}, trials=1)
