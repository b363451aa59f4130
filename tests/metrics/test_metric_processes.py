"""Two real processes with four devices each: one's scores, and what both are told of a failure."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from dydilit_jax.metrics.scoring import Scorer
from tests.metrics import made
from tests.tiny import mesh_of

COUNT = 2


def score_alone():
    scorers = []
    for features, count in ((made.reference(), made.REFERENCE), (made.samples(), made.SAMPLES)):
        scorer = Scorer(made.FakeExtractor())
        scorer.add(features, np.arange(count))
        scorers.append(scorer)
    return scorers[1].scores(scorers[0].reference(), mesh_of(1))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two processes wrote, and the folder that they did it in."""
    tmp_path = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.metrics.processes",
                address,
                str(COUNT),
                str(i),
                tmp_path,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(COUNT)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * COUNT, "\n".join(said)
    found = [json.loads((tmp_path / f"scores-{i}.json").read_text()) for i in range(COUNT)]
    return found, tmp_path


def test_two_processes_come_to_the_scores_of_one(results):
    results, _ = results
    alone = score_alone()
    for scores, again, rows, _ in results:
        assert scores == pytest.approx(alone, rel=1e-7)
        assert again == pytest.approx(alone, rel=1e-7)
        assert 0 < rows < made.SAMPLES
    # Every process knows the same, to the last bit.
    assert results[0][:2] == results[1][:2]
    assert sum(rows for _, _, rows, _ in results) == made.SAMPLES


def test_what_fails_in_one_process_fails_in_both(results):
    """Otherwise one would wait for the other until the run is killed."""
    results, folder = results
    first, second = (told for *_, told in results)
    for i, message in (
        (0, "UserError: image 7 cannot be read"),
        (1, "UserError: reference '.*b.npz' cannot be written: .*no_folder"),
        (3, "UserError: features of image 3 are not finite"),
        (4, "UserError: '.*state-.*-1-of-2.npz', .*cannot be read"),
    ):
        assert re.match(message, first[i]), first
        assert first[i] == second[i]
    assert first[2] == "UserError: process 1 has failed: OSError: the disk is gone"
    assert second[2] == "OSError: the disk is gone"
    # The reference of the scores is there, and nothing of those that failed.
    assert [path.name for path in folder.glob("*.npz*")] == ["reference.npz"]
