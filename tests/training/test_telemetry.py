import numpy as np
import pytest

from dydilit_jax.training.progress import Progress, duration
from dydilit_jax.training.telemetry import summarize


def test_what_is_told_of_a_step():
    usage = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    scalars, usages = summarize(
        {
            "loss": np.float32(1.5),
            "denominator_min": np.array([3.0, 1e-6]),
            "exponent_mean": np.array([2.0, 4.0]),
            "usage/query": usage,
        }
    )
    entropy = (0.5 * np.log(2) + 0.5 * np.log(4)) / np.log(3) / 2
    assert scalars == pytest.approx(
        {
            "loss": 1.5,
            "denominator_min": 1e-6,
            "exponent_mean": 3.0,
            "router/query/busiest": 0.75,
            "router/query/entropy": entropy,
        }
    )
    assert list(usages) == ["usage/query"]
    np.testing.assert_array_equal(usages["usage/query"], usage)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7620, "2h07m"),
        (100800, "1d04h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_rate_leaves_out_pauses(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(total=30, batch_size=16)
    assert progress.report(1, 2.0) == {}
    now[0] += 2.0
    progress.pause()
    now[0] += 50.0
    progress.resume()
    now[0] += 3.0
    rates = progress.report(11, 0.25)
    assert rates == pytest.approx({"steps_per_second": 2.0, "images_per_second": 32.0})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/30  loss 2.0000"
    assert second == "step 11/30  loss 0.2500  32 images/s  10s left"
