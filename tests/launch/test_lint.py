"""Linters of the launch scripts and of the images, and what they do not look at."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import ROOT

LAUNCH = ROOT / "launch"
DOCKERFILES = sorted((LAUNCH / "docker").glob("*.Dockerfile"))


def test_shellcheck_is_content():
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("needs shellcheck: make test-launch")
    scripts = sorted(str(each.relative_to(ROOT)) for each in LAUNCH.glob("*.sh"))
    assert len(scripts) >= 8
    done = subprocess.run([tool, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_hadolint_is_content():
    tool = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/bin")
    if tool is None:
        pytest.skip("needs hadolint, of requirements-dev.txt")
    assert len(DOCKERFILES) == 2
    done = subprocess.run([tool, *map(str, DOCKERFILES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_get_all_that_their_dockerfiles_copy(file):
    """.dockerignore leaves out all but what it names, which must be there and be enough."""
    ignore = Path(f"{file}.dockerignore").read_text().splitlines()
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert ignore[1] == "*"
    for name in kept:
        assert (ROOT / name).exists(), name
    copied = [words.split()[0] for words in re.findall(r"^COPY (.*)$", file.read_text(), re.M)]
    assert copied == ["requirements.txt", "."]
    assert {"dydilit_jax", "configs", "requirements.txt"} <= set(kept)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_take_the_jax_of_requirements(file):
    pattern = r"jax(?:\[\w+\])?(>=[\d.]+,<[\d.]+)"
    (here,) = re.findall(pattern, file.read_text())
    (there,) = re.findall("^" + pattern, (ROOT / "requirements.txt").read_text(), re.M)
    assert here == there
