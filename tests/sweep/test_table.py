"""The table of all runs, and what it reads from their workdirs."""

import io
import json
import os

import pytest

from dydilit_jax.sweeps import table as table_module
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.observe import Metrics, Observer, State, Status, last_word
from dydilit_jax.sweeps.table import Table, rows, summary
from tests.sweep.fakes import finished_run
from tests.tiny import plain_config

SCORE = Score("quality", maximize=True)
STATUSES = [
    Status("a", 1000, State.RUNNING, step=250, loss=0.5, score=0.25, rate=2.5),
    Status("b", 1000, State.FAILED, step=10, error="error: no"),
    Status("c" * 60, 1000),
]


def test_rows():
    head, a, b, c = (line.split() for line in rows(STATUSES, SCORE))
    assert head == ["run", "state", "step", "loss", "best", "quality", "left"]
    assert a == ["a", "running", "250/1000", "0.5000", "0.25", "5m00s"]
    assert b == ["b", "failed", "10/1000", "error:", "no"]
    assert c == ["c" * 39 + "…", "waiting", "0/1000"]


def test_a_terminals_table_is_drawn_over_itself_and_a_file_gets_changes(monkeypatch):
    monkeypatch.setattr(
        table_module.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24))
    )
    terminal, file = io.StringIO(), io.StringIO()
    live, told = Table(SCORE, terminal, live=True), Table(SCORE, file)
    for _ in range(2):
        live.show(STATUSES)
        told.show(STATUSES)
    assert terminal.getvalue().count("\x1b[5F\x1b[J") == 1  # Five lines up, before the second.
    drawn = terminal.getvalue().split("\x1b[J")
    assert len(drawn) == 2
    assert all(len(line) < 60 for line in drawn[1].splitlines())
    assert file.getvalue().splitlines()[:2] == [
        "a: running at step 250/1000",
        "b: failed at step 10/1000: error: no",
    ]
    monkeypatch.setattr(table_module, "TOLD_EVERY", 0.0)
    told.show(STATUSES)
    assert file.getvalue().splitlines()[2:] == [*rows(STATUSES, SCORE), summary(STATUSES)]
    live.close(STATUSES)
    assert terminal.getvalue().splitlines()[-1] == "best quality: 0.25 of a"


def test_where_not_all_have_room_the_living_and_the_failed_come_first(monkeypatch):
    monkeypatch.setattr(table_module.shutil, "get_terminal_size", lambda: os.terminal_size((80, 5)))
    terminal = io.StringIO()
    done = [Status(f"done{i}", 10, State.FINISHED) for i in range(5)]
    Table(SCORE, terminal, live=True).show([*done, *STATUSES])
    lines = terminal.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["a", "b"]
    assert lines[-1] == "8 runs: 1 waiting, 1 running, 1 failed, 5 finished (6 not shown)"


def test_metrics_are_read_on_and_anew_where_a_run_replaced_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(tmp_path)
    assert metrics.refresh() == []
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    assert [each["step"] for each in metrics.refresh()] == [1]
    with path.open("a") as file:
        file.write('ss": 2.0}\nnonsense\n{"step": 3, "loss": null}\n')
    assert [each["step"] for each in metrics.refresh()] == [1, 2, 3]
    for name in ("", "x" * 200):  # Shorter than what was read, or longer.
        record = {"step": 1, "loss": 3.5, "name": name}
        replacement = tmp_path / "new"
        replacement.write_text(json.dumps(record) + "\n")
        replacement.replace(path)
        assert metrics.refresh() == [record]


def test_a_run_is_complete_with_its_last_checkpoint_and_its_scores(tmp_path):
    config = plain_config(train={"steps": 100}, evaluation={"num": 10})
    run = tmp_path / "run"
    finished_run(run, config)
    assert Observer(run, config, SCORE).is_complete()
    longer = plain_config(train={"steps": 101}, evaluation={"num": 10})
    assert not Observer(run, longer, SCORE).is_complete()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert "pixel_frechet" in json.loads(lines[-1])
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert not Observer(run, config, SCORE).is_complete()
    assert Observer(run, plain_config(train={"steps": 100}), SCORE).is_complete()
    (run / "checkpoints" / "100" / "manifest.json").unlink()
    assert Observer(run, plain_config(train={"steps": 100}), SCORE).saved_step() == 0


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("step 1\nerror: the batch is bad\nI0000 something", "error: the batch is bad"),
        (
            "Traceback\n  File x\njax.errors.JaxRuntimeError: no memory\nlast",
            "jax.errors.JaxRuntimeError: no memory",
        ),
        ("one\nSegmentation fault\n\n", "Segmentation fault"),
        ("", ""),
    ],
)
def test_the_last_word_of_a_log_is_what_went_wrong(log, word):
    assert last_word(log) == word
