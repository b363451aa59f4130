"""Two real processes with four devices each come to the scores of one."""

import json
import os
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


def test_two_processes(tmp_path):
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
    results = [json.loads((tmp_path / f"scores-{i}.json").read_text()) for i in range(COUNT)]
    alone = score_alone()
    for scores, again, rows in results:
        assert scores == pytest.approx(alone, rel=1e-7)
        assert again == pytest.approx(alone, rel=1e-7)
        assert 0 < rows < made.SAMPLES
    # Every process knows the same, to the last bit.
    assert results[0][:2] == results[1][:2]
    assert sum(rows for *_, rows in results) == made.SAMPLES
