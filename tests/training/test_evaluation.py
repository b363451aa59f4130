"""Scores while training: what they are, that they are not lost, one process and two."""

import os
import signal

import numpy as np
import pytest
from scipy.linalg import sqrtm

from dydilit_jax.data.sources import digits
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.training import evaluation
from dydilit_jax.training.checkpoint import Checkpointer
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.loop import train
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.state import Network
from dydilit_jax.training.writers import read_metrics
from tests.tiny import mesh_of, plain_config
from tests.training.process_run import STOPPED, Processes

PATIENCE = 300.0  # seconds; of a machine that does much else
SCORED = plain_config(
    optimizer={"learning_rate": 1e-2},
    train={"steps": 5, "log_every": 100},
    evaluation={"num": 80, "every": 2, "features": "pixels"},
    sampling={"batch_size": 32},
)


def scores_of(workdir):
    """The records of scores, by step, and the report's."""
    records = read_metrics(workdir)
    return (
        {record["step"]: record for record in records if "num_images" in record},
        [record for record in records if "label_agreement" in record],
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that was left alone: its last state and its workdir."""
    workdir = tmp_path_factory.mktemp("scored")
    return train(SCORED, workdir).state, workdir


def vectors(images):
    return to_uint8(images).reshape(len(images), -1) / 127.5 - 1.0


def test_scores_come_at_intervals_and_at_the_end(straight):
    _, workdir = straight
    scores, report = scores_of(workdir)
    assert list(scores) == [2, 4, 5]
    assert scores[2].keys() == {
        "step",
        "num_images",
        "pixel_frechet",
        "pixel_kernel",
        "pixel_kernel_standard_error",
        "pixel_precision",
        "pixel_recall",
    }
    assert all(record["num_images"] == 80 for record in scores.values())
    assert len({record["pixel_frechet"] for record in scores.values()}) == 3
    assert [record["step"] for record in report] == [5]
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert events.count(b"pixel_recall") == 3


def test_scores_are_those_of_the_averaged_weights_samples(straight):
    state, workdir = straight
    images = np.concatenate(
        list(
            generate_images(
                Network.create(SCORED),
                ema_parameters(state.ema, SCORED.optimizer),
                np.arange(80) % 10,
                seed=0,
                config=SCORED.sampling,
                mesh=mesh_of(8),
            )
        )
    )
    first, second = vectors(images), vectors(digits().images)
    covariances = [np.cov(each, rowvar=False) for each in (first, second)]
    shift = first.mean(0) - second.mean(0)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root)
    scores, _ = scores_of(workdir)
    assert scores[5]["pixel_frechet"] == pytest.approx(expected, rel=1e-5)


def test_stopped_while_it_scores_a_run_scores_that_step_later(straight, tmp_path, monkeypatch):
    """At step 2, and at the last, which has its checkpoint then and is finished but for scores."""
    made = []

    class Interrupted(evaluation.Scorer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.batches_taken = 0
            made.append(self)

        def add(self, features, indices):
            super().add(features, indices)
            self.batches_taken += 1
            if len(made) in (1, 4):
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "Scorer", Interrupted)
        assert int(train(SCORED, tmp_path).state.step) == 2
        assert list(scores_of(tmp_path)[0]) == []
        outcome = train(SCORED, tmp_path)
        assert int(outcome.state.step) == 5
        assert not outcome.finished
    assert [scorer.batches_taken for scorer in made] == [1, 3, 3, 1]
    assert Checkpointer(tmp_path).latest_step() == 5
    scores, report = scores_of(tmp_path)
    assert list(scores) == [2, 4]
    assert not report
    assert train(SCORED, tmp_path).finished
    assert scores_of(tmp_path) == scores_of(straight[1])


class InterruptedAtTheEnd(evaluation.Scorer):
    """Asks its process to stop when it has taken a batch of the last step's samples."""

    made = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        type(self).made += 1

    def add(self, features, indices):
        super().add(features, indices)
        if self.made == 3:  # After those of steps 2 and 4.
            os.kill(os.getpid(), signal.SIGTERM)


def interrupt_one(index):
    if index == 1:
        setattr(evaluation, "Scorer", InterruptedAtTheEnd)  # noqa: B010


def test_two_processes_stop_together_while_they_score_and_score_as_one(
    straight, tmp_path, compiled_programs
):
    workdir = tmp_path / "run"
    for before, status, scored in ((interrupt_one, STOPPED, [2, 4]), (None, 0, [2, 4, 5])):
        processes = Processes(
            2, SCORED.to_json(), workdir, tmp_path / "log", compiled_programs / "processes", before
        )
        try:
            assert processes.join(PATIENCE) == [status] * 2, processes.said()
        finally:
            processes.end()
        assert Checkpointer(workdir).latest_step() == 5
        assert list(scores_of(workdir)[0]) == scored
    scores, report = scores_of(workdir)
    expected, _ = scores_of(straight[1])
    assert scores.keys() == expected.keys()
    for step, record in scores.items():
        assert record == pytest.approx(expected[step], rel=1e-3), step
    assert len(report) == 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"features": "inception"}, "a reference is missing .*evaluation.reference"),
        ({"features": "pixel"}, "unknown features 'pixel': did you mean 'pixels'"),
        ({"reference": "none.npz"}, r"reference 'none\.npz' does not exist"),
        ({"num": 3}, "3 images are too few"),
        ({"num": 0}, "evaluation.every needs samples to score: set evaluation.num"),
    ],
)
def test_mistakes_show_before_the_first_step(tmp_path, section, message):
    evaluated = {"num": 80, "every": 2, "features": "pixels", **section}

    def start():
        train(plain_config(evaluation=evaluated), tmp_path)

    with pytest.raises(UserError, match=message):
        start()
    assert read_metrics(tmp_path) == []
