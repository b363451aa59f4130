"""A checkout of the launch scripts in a git repository of its own, with a remote."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny import ROOT


@dataclasses.dataclass(frozen=True)
class Checkout:
    """A clone that tests may change.

    Attributes:
      root: its folder.
      revision: HEAD, which the remote has.
    """

    root: Path
    revision: str

    def git(self, *arguments: object) -> str:
        command = ["git", "-C", str(self.root), *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def script(self, name: str) -> Path:
        return self.root / "launch" / f"{name}.sh"


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "check out's $root"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "dydilit_jax").mkdir()
    for entry in ("train", "sample", "encode"):
        shutil.copy(ROOT / "dydilit_jax" / f"{entry}.py", root / "dydilit_jax")
    made = Checkout(root, "")
    made.git("init", "--quiet", "--initial-branch=main")
    made.git("config", "user.email", "tests@example.com")
    made.git("config", "user.name", "tests")
    made.git("add", "--all")
    made.git("commit", "--quiet", "--message=all")
    remote = tmp_path / "remote.git"
    subprocess.run(["git", "init", "--quiet", "--bare", str(remote)], check=True)
    made.git("remote", "add", "origin", remote)
    made.git("push", "--quiet", "--set-upstream", "origin", "main")
    made.git("remote", "set-url", "origin", "git@example.com:group/dydilit-jax.git")
    return dataclasses.replace(made, revision=made.git("rev-parse", "HEAD"))
