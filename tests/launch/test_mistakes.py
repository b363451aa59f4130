"""What a user may get wrong ends in one line and status 2, before anything is submitted."""

from __future__ import annotations

import shutil

import pytest

from tests.launch.fakes import Fakes
from tests.launch.test_places import GKE, TPU
from tests.tiny import ROOT

SLURM = ["--job=xl", "--code=here"]
TRAIN = ["--", "python", "-m", "dydilit_jax.train", "--config=configs/digits.py"]
TO_BUCKET = [*TRAIN, "--workdir=gs://bucket/r"]
V5E = "--topology=v5e:4x4"


def without(arguments, name):
    return [each for each in arguments if not each.startswith(f"--{name}=")]


@pytest.fixture
def fakes(tmp_path):
    names = ("gcloud", "kubectl", "sbatch", "docker")
    made = Fakes(tmp_path / "fakes", *names, XDG_STATE_HOME=str(tmp_path / "state"))
    made.answer(["buckets", "describe"], ("True\n", 0))
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    made.environment["VIRTUAL_ENV"] = str(tmp_path / "venv")
    return made


def refused(fakes, script, *arguments):
    """The one line of a refusal; with --dry-run it is the same."""
    lines = []
    for options in ([], ["--dry-run"]):
        command, *rest = arguments
        status, output, errors = fakes.run(script, command, *options, *rest)
        assert status == 2, output + errors
        assert output == ""
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: ")
        lines.append(errors)
    assert lines[0] == lines[1]
    made = [call.argv[:3] for call in fakes.calls()]
    assert not [each for each in made if each[0] != "gcloud" or each[1] != "storage"]
    return lines[0]


@pytest.mark.parametrize(
    ("place", "arguments", "message"),
    [
        # What is missing.
        ("tpu", [*without(TPU, "project"), V5E, *TO_BUCKET], "--project is missing"),
        ("tpu", [*without(TPU, "zone"), V5E, *TO_BUCKET], "--zone is missing"),
        ("tpu", [*TPU, *TO_BUCKET], "--topology is missing"),
        ("tpu", [*without(TPU, "job"), V5E, *TO_BUCKET], "--job is missing"),
        ("gke", [*without(GKE, "project"), V5E, *TO_BUCKET], "--project is missing"),
        ("gke", [*without(GKE, "cluster"), V5E, *TO_BUCKET], "--cluster is missing"),
        ("gke", [*without(GKE, "location"), V5E, *TO_BUCKET], "--location is missing"),
        ("gke", [*without(GKE, "image"), V5E, *TO_BUCKET], "--image is missing"),
        ("gke", [*GKE, *TO_BUCKET], "--topology or --gpu is missing"),
        ("slurm", SLURM, "nothing to run: end with -- python -m dydilit_jax.train"),
        ("slurm", [*SLURM, *TRAIN], "train needs --workdir"),
        ("slurm", [*SLURM, "--", "true"], "--folder is missing"),
        ("host", ["--", "true"], "--folder is missing"),
        # Accelerators that are not there.
        ("tpu", [*TPU, "--topology=v9e:4x4", *TO_BUCKET], "unknown accelerator type 'v9e:4x4'"),
        ("tpu", [*TPU, "--topology=v5e", *TO_BUCKET], "like v5e:16x16. Known generations: v4 v5e"),
        ("tpu", [*TPU, "--topology=v5e:3x4", *TO_BUCKET], "there is no slice 'v5e:3x4'"),
        ("tpu", [*TPU, "--topology=v5p:4x4x6", *TO_BUCKET], "there is no slice 'v5p:4x4x6'"),
        ("tpu", [*TPU, "--topology=v5p:8x4x4", *TO_BUCKET], "there is no slice 'v5p:8x4x4'"),
        ("tpu", [*TPU, "--topology=v5p:4x4x16", *TO_BUCKET], "v5p comes as v5p:4x8x8: use that"),
        ("tpu", [*TPU, "--topology=v5e:$(id)", *TO_BUCKET], "unknown slice 'v5e:$(id)'"),
        ("tpu", [*TPU, "--topology=tpu7x:2x2x1", *TO_BUCKET], "use launch/gke.sh"),
        ("gke", [*GKE, "--gpu=nvidia-h9000", *TO_BUCKET], "unknown accelerator type 'nvidia-h90"),
        ("gke", [*GKE, V5E, "--gpu=nvidia-l4", *TO_BUCKET], "either --topology (TPUs) or --gpu"),
        # Workdirs that not every host would see.
        (
            "tpu",
            [*TPU, V5E, *TRAIN, "--workdir=/home/me"],
            "'/home/me' is not visible to all hosts",
        ),
        ("tpu", [*TPU, V5E, "--shared=/a", *TRAIN, "--workdir=/ab"], "'/ab' is not visible to all"),
        ("gke", [*GKE, V5E, *TRAIN, "--workdir", "runs/xl"], "'runs/xl' is not visible to all"),
        ("gke", [*GKE, V5E, *TRAIN, "--workdir=gs:///r"], "names no bucket"),
        ("slurm", [*SLURM, *TRAIN, "--workdir=runs/xl"], "relative"),
        ("host", [*TRAIN, "--workdir=runs/xl"], "relative"),
        # Names and values.
        ("tpu", ["--job=My Run", *TPU[1:], V5E, *TO_BUCKET], "--job=My Run must be lower-case"),
        ("slurm", ["--job=$(id)", "--", "true"], "--job=$(id) must be lower-case"),
        ("slurm", [*SLURM, "--nodes=two", "--", "true"], "--nodes=two must be a whole number"),
        ("slurm", [*SLURM, "--nodes=0", "--", "true"], "at least 1"),
        (
            "slurm",
            [*SLURM, "--nods=2", "--", "true"],
            "unknown option --nods. Known: --job --nodes",
        ),
        ("slurm", [*SLURM, "true"], "unexpected argument 'true'"),
        ("slurm", [*SLURM, "--nodes"], "--nodes needs a value"),
        ("slurm", [*SLURM, "--container=lxc", "--image=x", "--folder=/f", "--", "true"], "pyxis"),
        ("slurm", [*SLURM, "--folder=/f", "--venv=/none", "--", "true"], "/none has no bin/python"),
        ("slurm", [*SLURM, "--max-parallel=2", "--folder=/f", "--", "true"], "is for --array"),
        ("gke", [*GKE, "--max-parallel=2", V5E, *TO_BUCKET], "unknown option --max-parallel"),
        ("tpu", [*TPU, V5E, "--spot", "--reserved", *TO_BUCKET], "either --spot or --reserved"),
        # Entry points and files.
        (
            "slurm",
            [*SLURM, "--", "python", "-m", "dydilit_jax.trian"],
            "is no entry point. Known: ",
        ),
        ("slurm", [*SLURM, "--array=/none", "--folder=/f"], "--array=/none is not a file"),
        ("slurm", [*SLURM, "--array=/dev/null", "--folder=/f", "--", "true"], "not both"),
    ],
)
def test_start_is_refused(fakes, checkout, place, arguments, message):
    assert message in refused(fakes, checkout.script(place), "start", *arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("python x\n\npython y\n", "line 2 of"),
        ("python x\npython 'y\n", "line 2 of"),
        ("python -m dydilit_jax.train --config=c\n", "train needs --workdir"),
        ("python -m dydilit_jax.train --config=c --workdir=r\n", "relative"),
    ],
)
def test_an_array_is_refused(fakes, checkout, tmp_path, text, message):
    file = tmp_path / "commands"
    file.write_text(text)
    arguments = [*SLURM, f"--array={file}", f"--folder={tmp_path}/f"]
    assert message in refused(fakes, checkout.script("slurm"), "start", *arguments)


def test_code_that_hosts_would_not_get_is_refused(fakes, checkout, tmp_path):
    tpu = [checkout.script("tpu"), "start", *TPU, V5E, *TO_BUCKET]
    slurm = [checkout.script("slurm"), "start", "--job=xl", f"--folder={tmp_path}/f", "--", "true"]
    train = checkout.root / "dydilit_jax" / "train.py"
    # A file that was changed, and one that git does not know.
    before = train.read_text()
    train.write_text(before + "# changed\n")
    for command in (tpu, slurm):
        line = refused(fakes, *command)
        assert f"differs from revision {checkout.revision[:12]} in 1 file(s)" in line
        assert "'dydilit_jax/train.py'" in line
    train.write_text(before)
    (checkout.root / "new.py").write_text("")
    assert "'new.py'" in refused(fakes, *slurm)
    # A revision that only this checkout has. Slurm's hosts get a copy, and need no remote.
    checkout.git("add", "--all")
    checkout.git("commit", "--quiet", "--message=new")
    assert "is on no branch of a remote" in refused(fakes, *tpu)
    assert fakes.run(*slurm)[0] == 0
    fakes.calls()
    checkout.git("remote", "remove", "origin")
    assert "no remote named origin" in refused(fakes, *tpu)


@pytest.mark.parametrize(
    ("place", "arguments"),
    [
        ("tpu", ["status", "--job=xl", "--project=p"]),
        ("tpu", ["delete", "--job=xl", "--zone=z"]),
        ("gke", ["logs", "--job=xl", "--project=p", "--cluster=c"]),
        ("slurm", ["logs", "--job=xl"]),
        ("slurm", ["logs", "--job=xl", "--folder=/none"]),
        ("host", ["status"]),
        ("host", ["delete", "--folder=/none"]),
        ("host", ["begin"]),
        ("gke", ["--dry-run"]),
    ],
)
def test_other_commands_are_refused(fakes, place, arguments):
    status, output, errors = fakes.run(ROOT / "launch" / f"{place}.sh", *arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")


def test_a_place_without_its_tools_says_so(fakes, checkout):
    path = fakes.folder / "bin"
    (path / "gcloud").unlink()
    for name in ("bash", "env", "dirname", "git", "grep", "sed", "tr"):
        (path / name).symlink_to(shutil.which(name))
    fakes.environment["PATH"] = str(path)
    status, _, errors = fakes.run(checkout.script("tpu"), "start", *TPU, V5E, *TO_BUCKET)
    assert status == 2
    assert errors.startswith("error: there is no gcloud on this machine")
