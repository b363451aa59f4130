"""Whole runs: resumed, finished, and gone wrong."""

import dataclasses
import os
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from benchmarks.chaos import without_clock
from dydilit_jax.data import sources
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.data.sources import digits
from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.errors import UserError
from dydilit_jax.training import evaluation, loop
from dydilit_jax.training import state as state_module
from dydilit_jax.training.checkpoint import Checkpointer
from dydilit_jax.training.loop import train
from dydilit_jax.training.sharding import make_mesh
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.writers import read_metrics
from tests.tiny import full_config, plain_config, state_arrays

RESUMED = full_config()
STEPS = RESUMED.train.steps


class Recorder:
    """A batch iterator that keeps what it gave."""

    def __init__(self, batches, given):
        self.batches, self.given = batches, given
        self.get_state, self.set_state = batches.get_state, batches.set_state
        self.close = batches.close

    def __next__(self):
        batch = next(self.batches)
        self.given.append({name: np.array(value) for name, value in batch.items()})
        return batch


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run in one go and in two: workdir, last state's arrays and batches of each."""
    result = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, stops in (("straight", [None]), ("resumed", [20, None])):
            given: list[dict] = []
            patch.setattr(
                loop,
                "DevicePrefetch",
                lambda *args, given=given, **kwargs: Recorder(
                    DevicePrefetch(*args, **kwargs), given
                ),
            )
            workdir = tmp_path_factory.mktemp(name)
            for stop in stops:
                state = train(RESUMED, workdir, stop_step=stop).state
                assert int(state.step) == (stop or STEPS)
            result[name] = (workdir, state_arrays(state), given)
    return result


def test_a_resumed_run_ends_bit_for_bit_as_a_straight_one(runs):
    straight, resumed = runs["straight"][1], runs["resumed"][1]
    assert straight.keys() == resumed.keys()
    parts = {name.split("/")[0] for name in straight}
    assert parts == {"step", "parameters", "optimizer", "ema", "key"}
    for name, value in straight.items():
        assert value.dtype == resumed[name].dtype
        assert value.tobytes() == resumed[name].tobytes(), name
    # Training did something, to everything that learns.
    for name, value in straight.items():
        if name.startswith("parameters/"):
            assert np.any(value != 0), name


def test_a_resumed_run_sees_the_same_batches(runs):
    straight, resumed = runs["straight"][2], runs["resumed"][2]
    plain = make_batches(digits(), batch_size=16, seed=11, horizontal_flip=True)
    assert len(straight) == len(resumed) == STEPS
    for one, other in zip(straight, resumed, strict=True):
        expected = next(plain)
        for name in ("image", "label"):
            np.testing.assert_array_equal(one[name], other[name])
            np.testing.assert_array_equal(one[name], expected[name])
    assert not np.array_equal(straight[19]["label"], straight[20]["label"])


def test_a_resumed_run_logs_the_same_and_no_step_twice(runs):
    straight, resumed = (read_metrics(runs[name][0]) for name in ("straight", "resumed"))
    # The stopped run also logs the step it stops at, which here is due anyway.
    assert [record["step"] for record in straight] == list(range(4, STEPS + 1, 4))
    assert [record["step"] for record in resumed] == list(range(4, STEPS + 1, 4))
    for one, other in zip(straight, resumed, strict=True):
        assert without_clock(one) == without_clock(other)
    assert {"loss", "mse", "gradient_norm", "learning_rate", "denominator_min"} <= straight[
        0
    ].keys()
    assert any(name.startswith("usage/") for name in straight[0])


def test_logged_learning_rate_is_the_schedules(runs):
    for record in read_metrics(runs["straight"][0]):
        # Step n takes the rate of n - 1 steps done.
        expected = 1e-2 * (1 + np.cos(np.pi * (record["step"] - 1) / STEPS)) / 2
        assert record["learning_rate"] == pytest.approx(expected, rel=1e-4)


def test_no_more_checkpoints_are_kept_than_asked_for(runs):
    for name in ("straight", "resumed"):
        folder = runs[name][0] / "checkpoints"
        assert sorted(int(entry.name) for entry in folder.iterdir()) == [30, 40]


def saved_arrays(config, workdir):
    abstract = abstract_state(Network.create(config), make_mesh(config.mesh))
    state, position = Checkpointer(workdir).restore(abstract)
    return state_arrays(state), position


def test_the_last_checkpoint_is_the_last_state(runs):
    arrays, _ = saved_arrays(RESUMED, runs["resumed"][0])
    for name, value in runs["resumed"][1].items():
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


def assert_finite_checkpoint(config, workdir, step):
    arrays, _ = saved_arrays(config, workdir)
    assert int(arrays["step"]) == step
    for name, value in arrays.items():
        assert np.all(np.isfinite(value)), name


def spoilt_digits(index, value):
    def load():
        source = digits()
        images = source.images.copy()
        images[index, 0, 0, 0] = value
        return dataclasses.replace(source, images=images)

    return load


@pytest.mark.parametrize(
    ("step", "value", "every"), [(8, np.inf, 3), (7, np.nan, 1), (1, np.inf, 1)]
)
def test_a_loss_that_is_not_finite_stops(tmp_path, monkeypatch, step, value, every):
    # An image of this step's batch is spoilt; everything before it is sound.
    batches = make_batches(digits(), batch_size=16, seed=0)
    for _ in range(step):
        batch = next(batches)
    everything = digits().images
    index = next(
        i for i, image in enumerate(everything) if np.array_equal(image, batch["image"][5])
    )
    monkeypatch.setitem(sources.SOURCES, "digits", spoilt_digits(index, value))
    config = plain_config(
        train={"steps": 20, "checkpoint_every": every, "log_every": 100, "nonfinite": "stop"}
    )
    good = (step - 1) // every * every
    kept = f"checkpoint {good} is kept" if good else "no checkpoint was written"
    with pytest.raises(UserError, match=rf"loss is (nan|inf) at step {step}, .*{kept}"):
        train(config, tmp_path)
    if good:
        assert_finite_checkpoint(config, tmp_path, good)
        # With the data mended it goes on from there.
        monkeypatch.setitem(sources.SOURCES, "digits", digits)
        state = train(config, tmp_path, stop_step=good + 1).state
        assert int(state.step) == good + 1
    else:
        assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("rate", [1e30, 1e39])
def test_a_learning_rate_that_is_far_too_high_stops_and_saves_nothing_bad(tmp_path, rate):
    config = plain_config(
        optimizer={"learning_rate": rate},
        train={
            "steps": 20,
            "checkpoint_every": 1,
            "keep_checkpoints": 20,
            "nonfinite": "stop",
        },
    )
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d, training stops"):
        train(config, tmp_path)
    step = Checkpointer(tmp_path).latest_step()
    if step is not None:
        assert_finite_checkpoint(config, tmp_path, step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteepFlow(RectifiedFlow):
    """A loss that is finite with a gradient that is not: the square root at zero."""

    def loss(self, network, x_0, key):
        losses, terms = super().loss(network, x_0, key)
        return losses + jnp.sqrt(0.0 * losses), terms


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "make_process", lambda config: SteepFlow())
    config = plain_config(
        train={"steps": 20, "checkpoint_every": 1, "log_every": 1, "nonfinite": "stop"}
    )
    with pytest.raises(UserError, match=r"gradient_norm is nan at step 1, .*no checkpoint"):
        train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert read_metrics(tmp_path) == []


EVALUATED = plain_config(
    train={"steps": 3, "sample_every": 2},
    evaluation={"num": 20},
    sampling={"grid_rows": 2},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train(EVALUATED, workdir)
    return workdir


def test_a_run_ends_with_its_scores(finished):
    scores = read_metrics(finished)[-1]
    assert scores["step"] == 3
    assert 0.0 <= scores["label_agreement"] <= 1.0
    assert scores["pixel_frechet"] > scores["pixel_frechet_floor"] > 0.0


def test_sample_grids_are_drawn_at_intervals_and_at_the_end(finished):
    names = sorted(path.name for path in (finished / "samples").iterdir())
    assert names == ["step_000002.png", "step_000003.png"]
    with Image.open(finished / "samples" / names[0]) as picture:
        # Ten columns of 8 x 8 images enlarged to 64, two rows.
        assert picture.size == (4 + 10 * 68, 4 + 15 + 4 + 2 * (64 + 15 + 4))


def test_a_finished_run_ends_at_once_and_tells_its_scores_again(finished, capsys, monkeypatch):
    before = read_metrics(finished)

    def refuse(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(loop, "compile_step", refuse)
    monkeypatch.setattr(evaluation, "generate_images", refuse)
    outcome = train(EVALUATED, finished)
    assert int(outcome.state.step) == 3
    assert outcome.finished
    assert read_metrics(finished) == before
    told = capsys.readouterr().out
    assert "has all its 3 steps" in told
    assert f"label_agreement: {before[-1]['label_agreement']:.1%} of 20 samples" in told
    assert f"pixel_frechet: {before[-1]['pixel_frechet']:.3f}" in told
    assert str(finished / "samples" / "step_000003.png") in told


def test_a_finished_run_goes_on_when_it_gets_more_steps(finished, capsys):
    longer = dataclasses.replace(EVALUATED, train=dataclasses.replace(EVALUATED.train, steps=5))
    assert int(train(longer, finished).state.step) == 5
    assert "at step 3" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(finished)] == [1, 2, 3, 3, 4, 5, 5]


def test_a_run_stopped_at_once_keeps_its_place(tmp_path):
    config = plain_config(train={"steps": 5, "log_every": 100})
    assert int(train(config, tmp_path, stop_step=1).state.step) == 1
    assert int(train(config, tmp_path, stop_step=2).state.step) == 2
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"image_size": 16}, r"images \(8, 8, 1\), the network expects \(16, 16, 1\)"),
        ({"channels": 3}, r"the network expects \(8, 8, 3\)"),
        ({"num_classes": 11}, "10 classes, model.num_classes is 11"),
    ],
)
def test_a_network_that_does_not_fit_the_data_is_refused(tmp_path, model, message):
    with pytest.raises(UserError, match=message):
        train(plain_config(model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"data": {"source": "digit"}}, "data source 'digit' is not in .*: did you mean 'digits'"),
        ({"diffusion": {"process": "flaw"}}, "unknown diffusion process 'flaw'"),
        ({"sampling": {"sampler": "eular"}}, "unknown sampler 'eular': did you mean 'euler'"),
        ({"sampling": {"sampler": "ddim"}}, "sampler 'ddim' is not for a RectifiedFlow"),
        ({"data": {"batch_size": 12}}, "data.batch_size 12 is not divisible by 8 devices"),
    ],
)
def test_unknown_names_are_refused_before_anything_is_written(tmp_path, section, message):
    with pytest.raises(UserError, match=message):
        train(plain_config(**section), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sigint_stops_a_run_in_the_same_way(tmp_path, monkeypatch):
    reports = []

    def interrupt(self, step, loss):
        reports.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return {}

    monkeypatch.setattr(loop.Progress, "report", interrupt)
    before = signal.getsignal(signal.SIGINT)
    outcome = train(plain_config(train={"steps": 50}), tmp_path)
    assert int(outcome.state.step) == 3
    assert not outcome.finished
    assert reports == [1, 2, 3]
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert signal.getsignal(signal.SIGINT) is before
