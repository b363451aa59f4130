"""Runs that are stopped, killed, moved to other devices; they end as if nothing had been."""

import os
import signal
from typing import Any

import numpy as np
import pytest

from benchmarks.chaos import MODES, chaos
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.data.sources import digits
from dydilit_jax.training import evaluation, loop
from dydilit_jax.training.checkpoint import Checkpointer
from dydilit_jax.training.loop import train
from dydilit_jax.training.writers import METRICS_FILE, read_metrics
from tests.tiny import flatten_fields, mesh_of, plain_config, state_arrays


class Recorder:
    """A batch iterator that keeps the images it gave."""

    def __init__(self, batches, given):
        self.batches, self.given = batches, given
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        batch = next(self.batches)
        self.given.append(np.array(batch["image"]))
        return batch


def test_on_other_devices_losses_are_the_same_to_rounding_and_batches_to_the_bit(
    tmp_path, monkeypatch
):
    config = plain_config(
        model={"label_dropout": 0.3},
        data={"horizontal_flip": True},
        optimizer={"learning_rate": 1e-2, "eps": 1e-2},
        train={"steps": 6},
    )
    losses, parameters, given = {}, {}, {}
    moves: dict[str, list[tuple[Any, int | None]]] = {
        "straight": [(mesh_of(8), None)],
        "moved": [(mesh_of(8), 2), (mesh_of(4), 4), (mesh_of(2, 4), None)],
    }
    for name, parts in moves.items():
        seen: list[np.ndarray] = []
        monkeypatch.setattr(
            loop,
            "DevicePrefetch",
            lambda batches, place, depth, seen=seen: DevicePrefetch(
                Recorder(batches, seen), place, depth=0
            ),
        )
        for mesh, stop in parts:
            monkeypatch.setattr(loop, "make_mesh", lambda _, mesh=mesh: mesh)
            state = train(config, tmp_path / name, stop_step=stop).state
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name)]
        parameters[name], given[name] = state_arrays(state), seen
    assert len(losses["straight"]) == len(losses["moved"]) == 6
    np.testing.assert_allclose(losses["moved"], losses["straight"], rtol=2e-5)
    np.testing.assert_array_equal(given["moved"], given["straight"])
    for name, value in parameters["straight"].items():
        if name.startswith("parameters/"):
            np.testing.assert_allclose(parameters["moved"][name], value, atol=2e-5, err_msg=name)


def test_another_number_of_processes_reads_on_and_an_epoch_holds_every_example_once():
    source, size = digits(), 32
    index = {image.tobytes(): i for i, image in enumerate(source.images)}
    assert len(source) - len(index) <= 1  # Hardly any two digits are alike.
    seen: list[bytes] = []
    position = None
    epoch = -(-len(source) // size)
    for count, steps in ((1, 20), (4, 15), (2, epoch - 35)):
        parts = [
            make_batches(source, batch_size=size, seed=3, process_index=i, process_count=count)
            for i in range(count)
        ]
        for part in parts:
            if position is not None:
                part.set_state(position)
        for _ in range(steps):
            seen += [image.tobytes() for part in parts for image in next(part)["image"]]
        position = parts[0].get_state()
        assert all(part.get_state() == position for part in parts)
    assert sorted(seen[: len(source)]) == sorted(image.tobytes() for image in source.images)


GRIDS = plain_config(
    train={"steps": 6, "checkpoint_every": 4, "sample_every": 2, "keep_checkpoints": 9},
    sampling={"batch_size": 8},
)


@pytest.fixture(scope="module")
def grids(tmp_path_factory):
    """Sample grids and records of a run that was left alone."""
    workdir = tmp_path_factory.mktemp("straight")
    train(GRIDS, workdir)
    return contents(workdir)


def contents(workdir):
    return {path.name: path.read_bytes() for path in (workdir / "samples").iterdir()}


def test_a_run_that_is_stopped_while_it_draws_stops_there_and_draws_later(
    tmp_path, monkeypatch, grids
):
    assert sorted(grids) == [f"step_{step:06d}.png" for step in (2, 4, 6)]
    real, drawn = evaluation.generate_images, []

    def interrupted(*arguments, **options):
        for images in real(*arguments, **options):
            drawn.append(len(images))
            os.kill(os.getpid(), signal.SIGTERM)
            yield images

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate_images", interrupted)
        assert int(train(GRIDS, tmp_path).state.step) == 2
    assert drawn == [8]  # Of ten: the second batch is not drawn.
    assert Checkpointer(tmp_path).latest_step() == 2
    assert not (tmp_path / "samples").exists()
    assert train(GRIDS, tmp_path, stop_step=5).state.step == 5
    # At the last step too, after which there is nothing left to train.
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "generate_images", interrupted)
        outcome = train(GRIDS, tmp_path)
    assert (int(outcome.state.step), outcome.finished) == (6, False)
    assert Checkpointer(tmp_path).latest_step() == 6
    assert sorted(contents(tmp_path)) == sorted(grids)[:2]
    assert train(GRIDS, tmp_path).finished
    assert contents(tmp_path) == grids


def test_what_a_killed_run_left_half_written_is_written_again(tmp_path, grids):
    train(GRIDS, tmp_path, stop_step=4)
    (tmp_path / "samples" / "step_000004.png").unlink()
    (tmp_path / "samples" / "unfinished_step_000004.png").write_bytes(b"half")
    path = tmp_path / METRICS_FILE
    lines = path.read_text()
    path.write_text(lines + '{"step": 5, "loss": 9.0}\n{"step": 6, "loss": 9.0}\n{"step": 7, "lo')
    train(GRIDS, tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().startswith(lines)
    assert all(record["loss"] < 9.0 for record in read_metrics(tmp_path))
    assert {name: grid for name, grid in contents(tmp_path).items() if "un" not in name} == grids


def test_killed_in_every_way_a_run_ends_bit_for_bit_as_one_left_alone(tmp_path):
    config = plain_config(
        data={"horizontal_flip": True},
        train={"steps": 24, "checkpoint_every": 2, "log_every": 1},
    )
    arguments = [
        "--config=configs/digits.py",
        *(f"--config.{name}={value}" for name, value in flatten_fields(config).items()),
    ]
    report = chaos(
        tmp_path, arguments, kills=3, steps=24, every=2, damages=1, seed=1, warm_up=False
    )
    assert report["equal"], report["differing"]
    assert report["arrays_compared"] > 20
    assert report["damaged_checkpoints"] == 1
    assert {kill["mode"] for kill in report["kills"]} == set(MODES) - {"starting"}
    assert report["kills_in_a_save"] >= 2
    lines = [line for kill in report["kills"] for line in kill["told"]]
    assert sum("resumed from" in line for line in lines) == 3
    assert any("is damaged and skipped" in line for line in lines)
    assert any("was not finished and is skipped" in line for line in lines)
