"""The notation of sweeps, and the runs it stands for."""

import dataclasses
import itertools
import re
import types

import pytest

from dydilit_jax.config import Config
from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.notation import (
    Score,
    chain,
    collect,
    fixed,
    log_uniform,
    product,
    search,
    seeds,
    uniform,
    values,
    zipped,
)
from dydilit_jax.sweeps.runs import (
    NAME_LENGTH,
    SweepFile,
    check_collisions,
    load_sweep,
    open_sweep,
    read_sweep,
    run_name,
)
from tests.tiny import ROOT

RATE, KIND = "optimizer.learning_rate", "model.attention.kind"


def names(runs):
    return [run_name(part.labels) for part in runs]


def sweep_file(**contents):
    def get_config(argument=""):
        return Config(seed=int(argument or 0)).to_dict()

    module = types.ModuleType("config_of_test")
    module.__dict__.update({"get_config": get_config} | contents)
    return SweepFile(path="configs/test.py", argument="", module=module, given={})


def test_product_zip_and_chain():
    runs = product(
        chain(
            fixed({KIND: "relu"}, name="relu", tags=["linear"]),
            fixed(name="dit", argument="attention=softmax"),
        ),
        zipped(values(RATE, [1e-3, 3e-3]), values("train.steps", [20, 7])),
        seeds([4, 5]),
    )
    assert [dict(part.fields) for part in runs] == [
        {**kind, RATE: rate, "train.steps": steps, "seed": seed}
        for kind in ({KIND: "relu"}, {})
        for rate, steps in ((1e-3, 20), (3e-3, 7))
        for seed in (4, 5)
    ]
    assert names(runs)[0] == "relu-learning_rate=0.001-steps=20-seed=4"
    assert len(set(names(runs))) == 8
    assert [part.argument for part in runs] == [None] * 4 + ["attention=softmax"] * 4
    assert [part.tags for part in runs] == [("linear",)] * 4 + [()] * 4
    assert [part.fields["seed"] for part in seeds(3)] == [0, 1, 2]


def test_get_sweep_adds_runs_one_by_one_or_many_at_once():
    def get_sweep(add):
        add({RATE: 1.0})
        add({RATE: 2.0}, name="two", tags=["fast"])
        add(seeds(2), name="base", tags=["slow"])

    runs = collect(get_sweep)
    assert names(runs) == ["learning_rate=1.0", "two", "base-seed=0", "base-seed=1"]
    assert [part.tags for part in runs] == [(), ("fast",), ("slow",), ("slow",)]
    listed = sweep_file(get_sweep=get_sweep).runs()
    assert [run.config.optimizer.learning_rate for run in listed[:2]] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: product(seeds(2), seeds(3)), "two parts of a sweep set seed"),
        (lambda: zipped(seeds(2), values(RATE, [1.0])), "parts of one length, got 2, 1 runs"),
        (lambda: fixed({}, tags="word"), r"write \['word'\]"),
        (
            lambda: fixed(["seed"]),  # type: ignore[arg-type]
            "mapping of fields to values, got",
        ),
        (lambda: product(fixed(argument="a"), fixed(argument="b")), "'a' and 'b'"),
        (lambda: search({}, trials=1), "space is empty"),
        (lambda: search({RATE: uniform(0, 1)}, trials=0), "at least one trial"),
        (lambda: search({RATE: []}, trials=1), "or a list of values for optimizer.learning_rate"),
        (lambda: search({RATE: [1.0]}, trials=1, prun=True), "did you mean 'prune'"),
        (lambda: uniform(2, 1), "low < high, got 2 and 1"),
        (lambda: log_uniform(0, 1), "starts above 0"),
    ],
)
def test_what_does_not_fit_is_told(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_run_has_the_files_config_its_overrides_and_the_command_lines_last_word():
    file = dataclasses.replace(
        sweep_file(SWEEP=fixed({RATE: 1, "train.steps": 5, KIND: "relu"}, argument="7")),
        given={"train.steps": 9},
    )
    (run,) = file.runs()
    assert run.config.seed == 7
    assert run.config.optimizer.learning_rate == 1.0
    assert run.config.train.steps == 9
    assert run.config.model.attention.kind == "relu"
    assert run.arguments == (
        "--config=configs/test.py:7",
        "--config.optimizer.learning_rate=1",
        "--config.train.steps=5",
        "--config.model.attention.kind=relu",
        "--config.train.steps=9",
    )


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"SWEEP": values("optimizer.learning_rat", [1.0])}, "'optimizer.learning_rate'"),
        ({"SWEEP": values("optimiser.b1", [1.0])}, "did you mean 'optimizer'"),
        ({"SWEEP": values("optimizer", [1.0])}, "optimizer is a section, not a field"),
        ({"SWEEP": values("seed", ["a"])}, "run 'seed=a': config field seed expects int, got 'a'"),
        ({"SWEEP": ()}, "has no runs"),
        ({}, "describes no sweep"),
        ({"SWEEP": seeds(1), "SEARCH": search({RATE: [1.0]}, trials=1)}, "SWEEP and SEARCH"),
        ({"SWEEP": seeds([1, 1])}, "two runs of the sweep are named 'seed=1'"),
        (
            {"SWEEP": chain(fixed({"seed": 1}, name="a"), fixed(name="b", argument="1"))},
            "runs 'a' and 'b' of the sweep have the same config",
        ),
    ],
)
def test_runs_that_cannot_be_are_told(contents, message):
    file = sweep_file(**contents)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        _ = file.search or file.runs()
    assert "\n" not in str(error.value)


def test_names_are_folders_names_and_stay_apart():
    assert run_name(("data/dir=../x y",)) == "data-dir=..-x-y"
    assert run_name(("..",)) == "run"
    assert run_name(()) == "base"
    assert run_name(("launch",)).startswith("launch-")
    long = [run_name(("a" * 200, str(i))) for i in range(2)]
    assert long[0] != long[1]
    assert max(len(name) for name in long) == NAME_LENGTH


def test_a_workdir_belongs_to_one_sweep_which_may_grow(tmp_path):
    score = Score("loss")
    small, large = sweep_file(SWEEP=seeds(2)), sweep_file(SWEEP=seeds(3))
    open_sweep(tmp_path, small, small.runs(), score)
    open_sweep(tmp_path, large, large.runs(), score)
    longer = dataclasses.replace(large, given={"train.steps": 7})
    open_sweep(tmp_path, longer, longer.runs(), score)
    record = read_sweep(tmp_path)
    assert record is not None
    assert list(record["runs"]) == ["seed=0", "seed=1", "seed=2"]
    assert record["runs"]["seed=2"]["config"]["train"]["steps"] == 7
    other = dataclasses.replace(large, given={RATE: 0.5})
    with pytest.raises(UserError, match=r"holds another sweep.*'seed=0' has optimizer.learning_ra"):
        open_sweep(tmp_path, other, other.runs(), score)
    apart = sweep_file(SWEEP=values(RATE, [1.0]))
    with pytest.raises(UserError, match=r"holds another sweep.*none of these runs, but seed=0"):
        open_sweep(tmp_path, apart, apart.runs(), score)
    searching = sweep_file(SEARCH=search({RATE: [1.0, 2.0]}, trials=1))
    with pytest.raises(UserError, match=r"holds another sweep.*one is a search"):
        open_sweep(tmp_path, searching, [], score)
    assert read_sweep(tmp_path) == record
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run, not a sweep"):
        open_sweep(run, small, small.runs(), score)


def test_the_ladder_adds_one_thing_at_a_time():
    file = load_sweep(str(ROOT / "configs/sweeps/ladder.py"), {})
    runs = [run for run in file.runs() if run.config.seed == 0]
    check_collisions(runs)
    attention = [dataclasses.asdict(run.config.model.attention) for run in runs]
    changes = [
        {name for name in old if old[name] != new[name]}
        for old, new in itertools.pairwise(attention[:7])
    ]
    assert changes == [
        {"depthwise"},
        {"kind"},
        {"kind", "projectors"},
        {"projectors", "lambdas"},
        {"projectors"},
        {"lambdas"},
    ]
    rest = [
        dataclasses.replace(run.config.model, attention=runs[0].config.model.attention)
        for run in runs
    ]
    assert all(model == rest[0] for model in rest[:7])
    assert attention[6] == dataclasses.asdict(Config().model.attention) | {"heads": 2}
    assert runs[7].config.model.feedforward.kind == "mlp"
    assert len(file.runs()) == 3 * len(runs) == 24
