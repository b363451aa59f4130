"""The command: mistakes in one line, and two real runs with their report."""

import csv
import json

import pytest

from dydilit_jax.training.lock import WorkdirLock
from tests.commands import assert_one_line

CONFIG = """
from dydilit_jax.sweeps.notation import *
from tests.tiny import plain_config

def get_config(argument=""):
    return plain_config(train={"steps": 2}, mesh={"data": 8}).to_dict()

"""
SWEEP = "dydilit_jax.sweep"


def config_file(folder, text):
    path = folder / "config.py"
    path.write_text(CONFIG + text)
    return f"--config={path}"


@pytest.mark.parametrize(
    ("text", "flags", "part"),
    [
        ("SWEEP = chain(seeds(2), seeds(1))", [], "two runs of the sweep are named 'seed=0'"),
        ("SWEEP = values('train.stepz', [1])", [], "did you mean 'train.steps'"),
        ("", [], "describes no sweep"),
        ("SWEEP = seed(2)", [], "the config file fails: NameError"),
        ("SWEEP = seeds(2)", ["--config.seed=1"], "have the same config"),
        ("SWEEP = seeds(2)", ["--on=slrum"], "did you mean 'slurm'"),
        ("SWEEP = seeds(2)", ["--on=slurm", "--devices=0"], "--devices is for --on=local"),
        ("SWEEP = seeds(2)", ["--on=gke", "--max_parallel=2"], "not for --on=gke"),
        ("SWEEP = seeds(2)", ["--launch=--nodes=2"], "this is --on=local"),
        ("SWEEP = seeds(2)", ["--goal=least"], "unknown goal 'least'"),
        ("SWEEP = seeds(2)", ["--report=out.pdf"], "must end in .html"),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path, text, flags, part):
    config = config_file(tmp_path, text)
    workdir = tmp_path / "sweep"
    code, _, errors = command(SWEEP, config, f"--workdir={workdir}", *flags)
    assert_one_line(code, errors, part)
    assert not workdir.exists()


def test_mistakes_about_folders(command, tmp_path):
    config = config_file(tmp_path, "SWEEP = seeds(2)")
    assert_one_line(*command(SWEEP, config)[::2], "--workdir is missing")
    assert_one_line(*command(SWEEP, f"--workdir={tmp_path}")[::2], "--config is missing")
    report = f"--report={tmp_path / 'out.html'}"
    assert_one_line(*command(SWEEP, f"--workdir={tmp_path}", report)[::2], "holds no runs")
    assert_one_line(*command(SWEEP, "--workdir=nowhere", report)[::2], "does not exist")
    assert_one_line(
        *command(SWEEP, config, "--workdir=gs://bucket/x")[::2], "a --workdir of this machine"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "sweep.json").write_text(
        json.dumps({"config": "other.py", "space": None, "runs": {"relu": {}}})
    )
    code, _, errors = command(SWEEP, config, f"--workdir={other}")
    assert_one_line(code, errors, "holds another sweep, of other.py", "relu")
    lock = WorkdirLock(tmp_path)
    code, _, errors = command(SWEEP, config, f"--workdir={tmp_path}")
    lock.release()
    assert_one_line(code, errors, "is in use by a run on")


def test_real_runs_one_good_and_one_broken_with_their_report(command, tmp_path):
    text = "SWEEP = chain(fixed(name='good'), fixed({'data.source': 'folder'}, name='broken'))"
    config = config_file(tmp_path, text)
    workdir, page = tmp_path / "sweep", tmp_path / "out.html"
    code, output, errors = command(
        SWEEP, config, f"--workdir={workdir}", "--max_parallel=2", f"--report={page}",
        "--config.train.log_every=1",
    )  # fmt: skip
    assert code == 1, output + errors
    assert "2 runs: 1 failed, 1 finished" in output
    assert (workdir / "good" / "checkpoints" / "2" / "manifest.json").is_file()
    good, broken = csv.DictReader(page.with_suffix(".csv").open())
    lines = (workdir / "good" / "metrics.jsonl").read_text().splitlines()
    assert float(good["loss"]) == json.loads(lines[-1])["loss"]
    assert (good["state"], good["step"], good["data.source"]) == ("finished", "2", "digits")
    told = (workdir / "broken" / "log.txt").read_text().splitlines()[-1]
    assert told.startswith("error: ")
    assert f"broken: failed: {told}" in output
    assert (broken["state"], broken["error"]) == ("failed", told)
