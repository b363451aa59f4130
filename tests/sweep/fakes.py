"""Where the stand-ins are, and what they left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

FAKE = Path(__file__).parent / "fake_train.py"


def fake_command(workdir: Path) -> Callable[..., list[str]]:
    """The command of a fake run: its overrides' flags are not for it, its name is."""

    def command(run):
        return [sys.executable, "-S", str(FAKE), str(workdir / run.name), *run.arguments]

    return command


def starts(workdir: Path) -> list[int]:
    """Steps that a run was started at."""
    path = workdir / "starts.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
