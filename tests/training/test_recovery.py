"""Steps gone bad: skipped within the step, counted, and, after too many, gone back from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.config import TrainConfig
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.errors import UserError
from dydilit_jax.training import loop
from dydilit_jax.training.checkpoint import Checkpointer
from dydilit_jax.training.loop import train
from dydilit_jax.training.recovery import Recovery, due
from dydilit_jax.training.sharding import make_mesh
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.step import make_step
from dydilit_jax.training.writers import read_metrics
from tests.tiny import mesh_of, plain_config, random_state, state_arrays

NAN, INF = float("nan"), float("inf")


def values(loss, gradient_norm=1.0, update_norm=1.0):
    return {"loss": loss, "gradient_norm": gradient_norm, "update_norm": update_norm}


def test_steps_that_are_not_finite_are_counted_and_the_row_ends_with_a_good_one():
    recovery, config = Recovery(), TrainConfig()
    assert recovery.review(values(1.0), config) is None
    assert recovery.review(values(NAN), config) == "loss is nan"
    assert recovery.review(values(1.0, gradient_norm=INF), config) == "gradient_norm is inf"
    assert (recovery.skipped, recovery.streak) == (2, 2)
    assert recovery.review(values(1.0, update_norm=NAN), config) == "update_norm is nan"
    assert recovery.review(values(1e9), config) is None  # No spike is looked for.
    assert (recovery.skipped, recovery.streak, recovery.losses) == (3, 0, [])


def test_a_spike_is_measured_against_the_median_of_good_losses():
    recovery, config = Recovery(), TrainConfig(spike_factor=3.0, spike_window=5)
    for loss in (9.0, 1.0, 2.0, 1.0, 2.0):
        assert recovery.review(values(loss), config) is None  # Not five yet.
    assert recovery.review(values(6.0), config) is None  # Exactly three times the median 2.
    assert recovery.losses == [1.0, 2.0, 1.0, 2.0, 6.0]
    problem = recovery.review(values(6.1), config)
    assert problem == "loss is 6.1, above 3 times its median 2"
    assert (recovery.streak, recovery.skipped) == (1, 0)
    assert recovery.losses == [1.0, 2.0, 1.0, 2.0, 6.0]  # A spike is no good loss.
    again = Recovery.from_json(recovery.to_json())
    assert again == recovery


@pytest.mark.parametrize(
    ("step", "every", "span", "expected"),
    [(8, 4, 0, True), (9, 4, 0, False), (9, 4, 1, True), (10, 4, 1, False), (4, 0, 3, False)],
)
def test_what_was_due_in_a_row_of_bad_steps_is_due_after_it(step, every, span, expected):
    assert due(step, every, span) is expected


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step_number(bad):
    optimizer = {"clip_norm": 1.0, "warmup_steps": 10, "learning_rate": 1.0}
    network = Network.create(plain_config(optimizer=optimizer))
    step = jax.jit(make_step(network))
    images = np.random.default_rng(0).standard_normal((16, 8, 8, 1)).astype(np.float32)
    labels = jnp.arange(16, dtype=jnp.int32) % 10
    good = {"image": jnp.asarray(images), "label": labels}
    before, _ = step(random_state(network, mesh_of(1)), good)
    spoilt = images.copy()
    spoilt[3, 0, 0, 0] = bad
    after, metrics = step(before, {"image": jnp.asarray(spoilt), "label": labels})
    assert not np.isfinite(metrics["loss"])
    old, new = state_arrays(before), state_arrays(after)
    assert int(new.pop("step")) == int(old.pop("step")) + 1
    for name, value in new.items():
        assert value.tobytes() == old[name].tobytes(), name
    # A good batch changes all that learns, and the optimizer's own count.
    learning, metrics = step(before, good)
    learned = state_arrays(learning)
    # The rate told is the one used: warm-up counts the updates made, not the steps.
    assert int(old["optimizer/1/0/count"]) == 1
    assert metrics["learning_rate"] == pytest.approx(0.1)
    assert step(after, good)[1]["learning_rate"] == pytest.approx(0.1)
    assert step(learning, good)[1]["learning_rate"] == pytest.approx(0.2)
    for name, value in learned.items():
        if name.startswith(("parameters/", "ema/ema")) or name.endswith("count"):
            assert not np.array_equal(value, old[name]), name


class Spoiler:
    """A batch iterator some of whose batches hold a number that is none, by their place."""

    def __init__(self, batches, spoilt, value, given):
        self.batches, self.spoilt, self.value, self.given = batches, spoilt, value, given
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        place = self.get_state()["next_index"] + 1
        self.given.append(place)
        batch = {name: np.array(array) for name, array in next(self.batches).items()}
        if place in self.spoilt:
            batch["image"][0, 0, 0, 0] = self.value
        return batch


def run(workdir, monkeypatch, spoilt, *, value=NAN, stops=(None,), **fields):
    """Trains with some batches spoilt, stopped at steps; the last state and batches' places."""
    given: list[int] = []
    monkeypatch.setattr(
        loop,
        "DevicePrefetch",
        lambda batches, place, depth: DevicePrefetch(
            Spoiler(batches, spoilt, value, given), place, depth=0
        ),
    )
    train_fields = {
        "steps": 20,
        "checkpoint_every": 4,
        "log_every": 1,
        "keep_checkpoints": 9,
        "rollback_after": 3,
    }
    config = plain_config(
        train=train_fields | fields, optimizer={"learning_rate": 1e-2, "ema_decay": 0.9}
    )
    for stop in stops:
        state = train(config, workdir, stop_step=stop).state
    return state, given


def last_data(workdir):
    config = plain_config()
    abstract = abstract_state(Network.create(config), make_mesh(config.mesh))
    return Checkpointer(workdir).restore(abstract)[1]


def assert_same(one, other):
    one, other = state_arrays(one), state_arrays(other)
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name


def test_a_bad_batch_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    state, given = run(tmp_path, monkeypatch, {6, 9})
    assert int(state.step) == 20
    assert given == list(range(1, 21))
    assert all(np.all(np.isfinite(v)) for v in state_arrays(state).values())
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 21))
    assert [r["step"] for r in records if r["loss"] is None] == [6, 9]
    assert [r["skipped_steps"] for r in records[4:10]] == [0, 1, 1, 1, 2, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "is skipped" in line]
    assert lines == [
        f"warning: step {step} is skipped: loss is nan (1 in a row)" for step in (6, 9)
    ]
    # The optimizer saw 18 batches.
    count = state_arrays(state)["optimizer/0/count"]
    assert int(count) == 18


def test_too_many_in_a_row_go_back_and_on_after_them(tmp_path, monkeypatch, capsys):
    state, given = run(tmp_path / "run", monkeypatch, {10, 11, 12})
    # Checkpoint 8, then batches 9 to 12 are left out: steps 9 to 20 take batches 13 to 24.
    assert int(state.step) == 20
    assert given[:12] == list(range(1, 13))
    assert given[-12:] == list(range(13, 25))
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 21))
    assert all(r["loss"] is not None for r in records)
    assert [r["rollbacks"] for r in records] == [0] * 8 + [1] * 12
    errors = capsys.readouterr().err
    assert "3 bad steps up to step 12: back to checkpoint 8, and on without the batches" in errors
    recovery = last_data(tmp_path / "run")["recovery"]
    assert recovery["rollbacks"] == [{"step": 8, "from_step": 12, "reason": "loss is nan"}]
    assert recovery["skipped"] == 3
    # Interrupted before, within and after the bad steps it ends the same.
    again, _ = run(tmp_path / "again", monkeypatch, {10, 11, 12}, stops=(7, 11, 14, None))
    assert_same(state, again)
    assert last_data(tmp_path / "again")["recovery"] == recovery


def test_a_checkpoint_due_within_bad_steps_is_written_after_them(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, {8, 9}, steps=11)
    names = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert names == [4, 10, 11]


def test_before_the_first_checkpoint_it_goes_back_to_the_start(tmp_path, monkeypatch, capsys):
    state, given = run(tmp_path, monkeypatch, {1, 2, 3}, steps=6)
    assert int(state.step) == 6
    assert given == [1, 2, 3, *range(4, 10)] or given == [1, 2, 3, 4, *range(4, 10)]
    assert "back to the start" in capsys.readouterr().err


def test_a_run_that_does_not_get_further_ends_in_a_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"loss is nan at step 7, after 2 returns") as error:
        run(tmp_path, monkeypatch, set(range(5, 99)), max_rollbacks=2)
    assert "to checkpoint 4: training stops" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoints" / "4").is_dir()


def test_a_spike_has_the_same_remedy_where_asked_for(tmp_path, monkeypatch, capsys):
    options = {"spike_factor": 10.0, "spike_window": 4, "rollback_after": 1}
    state, given = run(tmp_path / "on", monkeypatch, {11}, value=1e3, **options)
    assert int(state.step) == 20
    assert given[-12:] == list(range(12, 24))
    errors = capsys.readouterr().err
    assert "step 11 is bad: loss is" in errors
    assert "1 bad steps up to step 11: back to checkpoint 8" in errors
    again, _ = run(tmp_path / "again", monkeypatch, {11}, value=1e3, stops=(10, None), **options)
    assert_same(state, again)


def test_settings_that_make_no_sense_are_refused():
    for fields, message in (
        ({"nonfinite": "skp"}, "unknown train.nonfinite 'skp': did you mean 'skip'"),
        ({"spike_factor": 0.5}, "train.spike_factor must be 0, or above 1"),
        ({"rollback_after": 0}, "train.rollback_after must be at least 1"),
        ({"keep_every": -1}, "train.keep_every must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            plain_config(train=fields)
    assert dataclasses.asdict(TrainConfig())["nonfinite"] == "skip"
