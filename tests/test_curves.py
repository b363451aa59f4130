"""benchmarks/curves.py: what is read of metrics.jsonl, how it is smoothed, and the picture."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import curves
from dydilit_jax.errors import UserError


@pytest.fixture
def workdir(tmp_path):
    steps = np.arange(10, 410, 10)
    rows = [{"step": int(s), "loss": float(2.0 * 0.99**s + 0.3), "usage": [[1]]} for s in steps]
    rows.append({"step": 400, "score": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_curve_holds_the_rows_that_have_the_field(workdir):
    rows = curves.read_metrics(workdir)
    steps, values = curves.curve(rows, "loss")
    np.testing.assert_array_equal(steps, np.arange(10, 410, 10))
    np.testing.assert_allclose(values, 2.0 * 0.99**steps + 0.3)
    assert [list(each) for each in curves.curve(rows, "score")] == [[400], [0.5]]


def test_smoothing_is_a_centred_mean_that_keeps_a_line_a_line():
    values = np.random.default_rng(0).normal(size=41)
    expected = np.convolve(values, np.ones(5) / 5, mode="valid")
    np.testing.assert_allclose(curves.smoothed(values, 2)[2:-2], expected)
    np.testing.assert_allclose(curves.smoothed(np.arange(9.0), 3), np.arange(9.0))
    gap = np.array([1.0, np.nan, 3.0])
    np.testing.assert_allclose(curves.smoothed(gap, 1), [1.0, 2.0, 3.0])


def test_axis_is_logarithmic_where_that_serves():
    assert curves.wants_log(np.geomspace(1.0, 0.1, 50))
    assert not curves.wants_log(np.linspace(1.0, 0.9, 50))
    assert not curves.wants_log(np.linspace(-1.0, 9.0, 50))
    assert not curves.wants_log(np.full(3, np.nan))


def test_command_draws_raw_and_smoothed(workdir, tmp_path, monkeypatch):
    out = tmp_path / "loss.png"
    monkeypatch.setattr(
        "sys.argv", ["curves", f"--workdir={workdir}", f"--out={out}", "--title=a run"]
    )
    curves.main()
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    line, raw = np.array([31, 119, 180]), np.array([188, 214, 232])  # C0, and C0 at 0.3 on white
    assert (np.abs(pixels - line).sum(-1) < 12).sum() > 200
    assert (np.abs(pixels - raw).sum(-1) < 12).sum() > 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--fields": "los"}, "did you mean 'loss'"),
        ({"--fields": "usage"}, "unknown field 'usage'"),
        ({"--workdir": "nowhere"}, "does not exist"),
        ({"--out": "nowhere/x.png"}, "folder that exists"),
    ],
)
def test_mistakes_end_in_one_line(workdir, tmp_path, monkeypatch, capsys, change, words):
    flags = {"--workdir": str(workdir), "--out": str(tmp_path / "x.png")} | change
    monkeypatch.setattr("sys.argv", ["curves", *(f"{k}={v}" for k, v in flags.items())])
    with pytest.raises(SystemExit) as end:
        curves.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


def test_damaged_line_is_named(workdir):
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5')
    with pytest.raises(UserError, match=r"metrics.jsonl', line 42: no JSON object with a step"):
        curves.read_metrics(workdir)
