"""The commands: what they print, write, and answer to a mistake."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dydilit_jax.errors import UserError
from dydilit_jax.sampling_flags import parse_labels
from dydilit_jax.training.checkpoint import Checkpointer, open_workdir
from dydilit_jax.training.writers import read_metrics
from tests.autoencoders.test_diffusers import FIXTURES as AUTOENCODERS
from tests.commands import ENVIRONMENT, assert_one_line
from tests.models.test_pretrained import OFFICIAL
from tests.tiny import ROOT, mesh_of, plain_config, random_state

TRAIN, SAMPLE = "dydilit_jax.train", "dydilit_jax.sample"
CONFIG = "--config=configs/digits.py"


def start(*arguments, **options):
    """Starts a real `python -m ...`."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT | options,
    )


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Folders that stand for what a user may point at."""
    root = tmp_path_factory.mktemp("workdirs")
    config = plain_config()
    open_workdir(root / "untrained", config)
    open_workdir(root / "trained", config)
    checkpointer = Checkpointer(root / "trained")
    from dydilit_jax.training.state import Network

    checkpointer.save(random_state(Network.create(config), mesh_of(1)), {})
    checkpointer.close()
    (root / "file").write_text("precious")
    (root / "broken.py").write_text("def get_config(argument=''):\n    return 1 / 0\n")
    (root / "empty.py").write_text("")
    (root / "extra.py").write_text("def get_config(argument=''):\n    return {'sede': 1}\n")
    return root


# Arguments, and what the one line must hold. W is a folder of workdirs.
TRAIN_MISTAKES = {
    "workdir in a bucket": (
        [CONFIG, "--workdir=gs://bucket/runs/x"],
        [
            "--workdir=gs://bucket/runs/x",
            "gcsfuse bucket /gcs/bucket",
            "--workdir=/gcs/bucket/runs/x",
        ],
    ),
    "unknown field": ([CONFIG, "--config.train.stepz=5"], ["'train.stepz'", "'train.steps'"]),
    "unknown section": (
        [CONFIG, "--config.trian.steps=5"],
        ["field 'trian': did you mean 'train'?"],
    ),
    "unknown inner section": (
        [CONFIG, "--config.model.atention.heads=2"],
        ["field 'model.atention': did you mean 'model.attention'?", "model.width"],
    ),
    "section for a field": ([CONFIG, "--config.train=5"], ["--config.train=5"]),
    "unknown top field": ([CONFIG, "--config.sede=5"], ["'sede'", "'seed'"]),
    "unknown argument": (
        ["--config=configs/digits.py:atention=relu"],
        ["config argument 'atention'", "'attention'"],
    ),
    "argument without value": (["--config=configs/digits.py:relu"], ["'relu'", "name=value"]),
    "unknown attention": (
        ["--config=configs/digits.py:attention=dydilla"],
        ["attention 'dydilla'", "'dydila'", "dydila, relu, focused, softmax"],
    ),
    "unknown attention field": (
        [CONFIG, "--config.model.attention.kind=linear"],
        ["attention 'linear'", "dydila, relu, focused, softmax"],
    ),
    "unknown size": (
        ["--config=configs/digits.py:size=XXL"],
        ["size 'XXL'", "tiny, S, B, L, XL"],
    ),
    "unknown feed-forward": (
        ["--config=configs/digits.py:feedforward=mox"],
        ["feed-forward 'mox'", "auto, mix, mlp"],
    ),
    "wrong type": ([CONFIG, "--config.train.steps=abc"], ["train.steps expects int, got 'abc'"]),
    "fraction for a whole number": ([CONFIG, "--config.train.steps=1.5"], ["train.steps", "int"]),
    "word for a number": (
        [CONFIG, "--config.optimizer.learning_rate=fast"],
        ["optimizer.learning_rate expects float, got 'fast'"],
    ),
    "word for a truth": ([CONFIG, "--config.model.scan_layers=5"], ["model.scan_layers"]),
    "width and heads": (
        [CONFIG, "--config.model.attention.heads=3"],
        ["model.width 64 is not divisible by model.attention.heads 3"],
    ),
    "image and patch": (
        [CONFIG, "--config.model.patch_size=3"],
        ["model.image_size 8 is not divisible by model.patch_size 3"],
    ),
    "no such config": (["--config=configs/digit.py"], ["'configs/digit.py' does not exist"]),
    "no such config, apart": (["--config", "configs/digit.py"], ["does not exist"]),
    "config that fails": (["--config=W/broken.py"], ["config file fails", "ZeroDivisionError"]),
    "config that is none": (["--config=pyproject.toml"], ["config file fails", "SyntaxError"]),
    "config without get_config": (["--config=W/empty.py"], ["config file fails", "get_config"]),
    "config of another field": (["--config=W/extra.py"], ["unknown config field 'sede'", "'seed'"]),
    "negative seed": ([CONFIG, "--config.seed=-1"], ["seed must be at least 0, got -1"]),
    "no number": ([CONFIG, "--config.optimizer.learning_rate=nan"], ["must be finite, got nan"]),
    "no config": ([], ["--config is missing"]),
    "no workdir": ([CONFIG, "--workdir="], ["--workdir is missing"]),
    "workdir below a file": ([CONFIG, "--workdir=/dev/null/x"], ["workdir '/dev/null/x'"]),
    "workdir is a file": ([CONFIG, "--workdir=W/file"], ["cannot write workdir"]),
    "workdir of another config": (
        [CONFIG, "--workdir=W/trained"],
        ["another config", "model.width: 16 -> 64", "model.attention.kind: 'relu' -> 'dydila'"],
    ),
    "batch and devices": (
        [CONFIG, "--config.data.batch_size=12"],
        ["data.batch_size 12 is not divisible by 8 devices"],
    ),
    "mesh and devices": ([CONFIG, "--config.mesh.fsdp=3"], ["does not fit 8 devices"]),
    "unknown sampler": (
        [CONFIG, "--config.sampling.sampler=eular"],
        ["sampler 'eular'", "'euler'"],
    ),
    "unknown data": ([CONFIG, "--config.data.source=digit"], ["data source 'digit'", "'digits'"]),
    "unknown schedule": (
        [CONFIG, "--config.optimizer.schedule=cosin"],
        ["schedule 'cosin'", "'cosine'"],
    ),
    "no steps": ([CONFIG, "--config.train.steps=0"], ["train.steps must be at least 1, got 0"]),
    "unknown flag": ([CONFIG, "--wrkdir=x"], ["wrkdir"]),
    "compile alone": ([CONFIG, "--compile"], ["--compile is for --dry_run"]),
    "positional argument": ([CONFIG, "runs/digits"], ["unexpected argument 'runs/digits'"]),
}
SAMPLE_MISTAKES = {
    "no workdir": ([], ["--workdir is missing"]),
    "missing workdir": (["--workdir=W/missing"], ["is not a workdir"]),
    "untrained workdir": (["--workdir=W/untrained"], ["has no checkpoint yet"]),
    "label outside": (["--workdir=W/trained", "--labels=1,10"], ["label 10", "classes 0 to 9"]),
    "label below": (["--workdir=W/trained", "--labels=-1"], ["label -1", "classes 0 to 9"]),
    "label no number": (["--workdir=W/trained", "--labels=a"], ["--labels=a", "whole numbers"]),
    "label left out": (["--workdir=W/trained", "--labels=1,,2"], ["whole numbers"]),
    "no images": (["--workdir=W/trained", "--num=0"], ["num"]),
    "no steps": (["--workdir=W/trained", "--steps=0"], ["steps", "at least 1"]),
    "number no number": (["--workdir=W/trained", "--num=many"], ["num", "many"]),
    "unknown sampler": (
        ["--workdir=W/trained", "--sampler=eular"],
        ["sampler 'eular': did you mean 'euler'?", "ddpm, ddim, dpm_solver_pp"],
    ),
    "sampler of the other process": (
        ["--workdir=W/trained", "--sampler=ddpm"],
        ["sampler 'ddpm' is not for a RectifiedFlow: use euler, heun, euler_maruyama"],
    ),
    "interval outside": (
        ["--workdir=W/trained", "--guidance_interval=0.5,1.5"],
        ["guidance interval must be 0 <= low <= high <= 1, got (0.5, 1.5)"],
    ),
    "interval no numbers": (
        ["--workdir=W/trained", "--guidance_interval=all"],
        ["--guidance_interval=all expects two numbers, like 0.1,0.9"],
    ),
    "picture no png": (
        ["--workdir=W/trained", "--out=W/a.jpg"],
        ["a .png file or a folder", "a.jpg is neither"],
    ),
    "no folder for it": (["--workdir=W/trained", "--out=W/missing/a.png"], ["does not exist"]),
    "run and weights": (
        ["--workdir=W/trained", f"--weights={OFFICIAL}"],
        ["give either --workdir, of a run, or --weights, a file"],
    ),
    "autoencoder of a run": (
        ["--workdir=W/trained", "--vae=sd-vae-ft-mse"],
        ["--vae are for --weights: a run knows its own"],
    ),
    "no weights": (["--weights=W/missing.pt"], ["missing.pt' does not exist"]),
    "weights that are none": (["--weights=W/file"], ["neither .safetensors nor .pt"]),
    "weights of an unknown width": ([f"--weights={OFFICIAL}"], ["width 32", "give its --heads"]),
    "weights of latents": (
        [f"--weights={OFFICIAL}", "--heads=4"],
        ["draws latents of 4 channels", "--vae=sd-vae-ft-mse"],
    ),
    "no such autoencoder": (
        [f"--weights={OFFICIAL}", "--heads=4", "--vae=sd-vae"],
        ["'sd-vae'", "sd-vae-ft-mse"],
    ),
    "unknown flag": (["--workdir=W/trained", "--label=1"], ["label"]),
    "positional argument": (["W/trained"], ["unexpected argument"]),
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_a_mistake_in_train_is_one_line(command, workdirs, tmp_path, mistake):
    arguments, parts = TRAIN_MISTAKES[mistake]
    arguments = [argument.replace("=W/", f"={workdirs}/") for argument in arguments]
    if not any(argument.startswith("--workdir") for argument in arguments):
        arguments.append(f"--workdir={tmp_path}/run")
    code, output, errors = command(TRAIN, *arguments)
    assert_one_line(code, errors, *parts)
    assert output == ""
    assert list(tmp_path.iterdir()) == []
    assert (workdirs / "file").read_text() == "precious"


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_a_mistake_in_sample_is_one_line(command, workdirs, tmp_path, mistake):
    arguments, parts = SAMPLE_MISTAKES[mistake]
    arguments = [argument.replace("W/", f"{workdirs}/") for argument in arguments]
    if not any(argument.startswith("--out") for argument in arguments):
        arguments.append(f"--out={tmp_path}/a.png")
    code, output, errors = command(SAMPLE, *arguments)
    assert_one_line(code, errors, *parts)
    assert output == ""
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_answers_as_the_server_does(command, tmp_path):
    # The one server and a fresh interpreter are the same to a user.
    arguments = [TRAIN, CONFIG, "--config.train.stepz=5", f"--workdir={tmp_path}/run"]
    with start(*arguments) as process:
        output, errors = process.communicate(timeout=120)
    assert_one_line(process.returncode, errors, "'train.steps'")
    assert (process.returncode, output, errors) == command(*arguments)


def test_debug_shows_where_an_error_comes_from(command, tmp_path):
    arguments = [CONFIG, "--config.model.patch_size=3", f"--workdir={tmp_path}/run"]
    for flag in ("--debug", "--debug=true"):
        code, _, errors = command(TRAIN, *arguments, flag)
        assert code != 0
        assert "Traceback (most recent call last)" in errors
        assert "UserError: model.image_size 8" in errors
    code, _, errors = command(TRAIN, *arguments, "--debug=false")
    assert_one_line(code, errors, "model.image_size 8")


def test_help_names_the_flags(command):
    code, output, errors = command(TRAIN, "--help")
    assert code in (0, 1)
    assert "--workdir" in output
    assert "Traceback" not in output + errors


SMALL = [
    CONFIG,
    "--config.model.depth=1",
    "--config.model.width=16",
    "--config.model.patch_size=4",
    "--config.model.attention.depthwise=3",
    "--config.model.attention.exponents=1",
    "--config.model.attention.lambdas=1",
    "--config.data.batch_size=16",
    "--config.optimizer.schedule=constant",
    "--config.train.log_every=1",
    "--config.train.sample_every=0",
    "--config.sampling.steps=2",
    "--config.evaluation.num=20",
]


@pytest.fixture(scope="module")
def terminated(tmp_path_factory):
    """A run that is told to stop by SIGTERM: workdir, environment, its step, output and code."""
    workdir = tmp_path_factory.mktemp("terminated")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    arguments = [TRAIN, *SMALL, f"--workdir={workdir}/run", "--config.train.steps=1000000"]
    with start(*arguments, **cache) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        output = process.stdout.read()
        process.wait(timeout=60)
    return workdir / "run", cache, output, errors, process.returncode


def test_sigterm_ends_a_run_with_a_checkpoint(terminated):
    workdir, _, output, errors, code = terminated
    assert code == 0
    assert "Traceback" not in errors
    stopped = re.search(r"stopped at step (\d+) of 1000000; run again to go on", output)
    assert stopped, output + errors
    steps = [int(entry.name) for entry in (workdir / "checkpoints").iterdir()]
    assert steps == [int(stopped[1])]
    logged = [record["step"] for record in read_metrics(workdir)]
    assert logged == list(range(1, steps[0] + 1))


@pytest.fixture(scope="module")
def finished(terminated):
    """The same run, resumed and brought to its end: workdir, its step, output."""
    workdir, cache, *_ = terminated
    step = max(int(entry.name) for entry in (workdir / "checkpoints").iterdir())
    arguments = [TRAIN, *SMALL, f"--workdir={workdir}", f"--config.train.steps={step + 2}"]
    arguments.append("--stopped_status=75")
    told = ""
    for ends in (False, True):  # First it is told to stop when only its scores are left to do.
        with start(*arguments, **cache) as process:
            assert process.stderr is not None
            assert process.stdout is not None
            errors = ""
            for line in process.stderr:
                errors += line
                if not ends and line.startswith("drawing 20 samples"):
                    process.send_signal(signal.SIGTERM)
            told += process.stdout.read()
            process.wait(timeout=60)
        assert process.returncode == (0 if ends else 75), errors
    return workdir, step, told


def test_a_terminated_run_resumes_and_ends(finished):
    workdir, step, output = finished
    resumed = [f"resumed from {workdir} at step {each}\n" for each in (step, step + 2)]
    stopped = f"stopped after the last step, {step + 2}; run again to draw and score"
    assert output.index(resumed[0]) < output.index(stopped) < output.index(resumed[1])
    assert f"sample grid: {workdir}/samples/step_{step + 2:06d}.png" in output
    assert re.search(r"label_agreement: \d+\.\d% of 20 samples", output)
    assert re.search(r"pixel_frechet: [\d.]+, [\d.]+ times pixel_frechet_floor [\d.]+", output)
    records = read_metrics(workdir)
    logged = [record["step"] for record in records]
    assert logged == [*range(1, step + 3), step + 2]
    assert {"label_agreement", "pixel_frechet", "pixel_frechet_floor"} <= records[-1].keys()
    assert any((workdir / "tensorboard").iterdir())


def test_sample_draws_what_is_asked_for(finished, command, tmp_path):
    workdir, step, _ = finished
    out = tmp_path / "digits.png"
    asked = [f"--workdir={workdir}", "--labels=3,1,4", "--num=7", f"--out={out}"]
    code, output, errors = command(SAMPLE, *asked, "--guidance_scale=2", "--steps=3", "--seed=5")
    assert code == 0, errors
    assert "| 7/7 [" in errors.splitlines()[-1]
    assert output == f"wrote 7 images of step {step + 2} to {out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        # One row of seven 8 x 8 images enlarged to 64, with a word above each, and the title.
        assert width >= 4 + 7 * 68
        assert height == 4 + 15 + 4 + (64 + 15 + 4)
        first = np.asarray(picture)
    assert len(np.unique(first)) > 10
    command(SAMPLE, *asked, "--guidance_scale=2", "--steps=3", "--seed=5")
    np.testing.assert_array_equal(np.asarray(Image.open(out)), first)
    command(SAMPLE, *asked, "--guidance_scale=2", "--steps=3", "--seed=6")
    assert np.any(np.asarray(Image.open(out)) != first)


def test_sample_draws_from_weights(command, tmp_path):
    out = tmp_path / "dit.npz"
    asked = [f"--weights={OFFICIAL}", "--heads=4", f"--vae={AUTOENCODERS / 'kl'}", "--labels=7,1"]
    code, output, errors = command(SAMPLE, *asked, "--num=3", "--steps=2", f"--out={out}")
    assert code == 0, errors
    assert output == f"wrote 3 images of dit_official.pt to {out}\n"
    with np.load(out) as images:
        np.testing.assert_array_equal(images["arr_1"], [7, 1, 7])
        assert images["arr_0"].shape == (3, 64, 64, 3)
        assert len(np.unique(images["arr_0"])) > 10
    assert list(tmp_path.iterdir()) == [out]


def test_labels_of_the_command_line():
    np.testing.assert_array_equal(parse_labels("3, 1,3", 10), [3, 1, 3])
    np.testing.assert_array_equal(parse_labels("", 4), [0, 1, 2, 3])
    with pytest.raises(UserError, match=r"--labels=1\.5 expects whole numbers"):
        parse_labels("1.5", 10)
