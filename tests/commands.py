"""Running the entry points' commands from tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tests.tiny import ROOT

# Eight devices as in conftest.py; compiled in a hurry.
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true",
}


class Command(Protocol):
    """Runs `python -m MODULE ARGUMENT ...` from the checkout."""

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""


@contextmanager
def command_server() -> Iterator[Command]:
    """A server that forks an interpreter for each command; see tests/command_server.py."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.command_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    ) as server:
        questions, answers = server.stdin, server.stdout
        assert questions is not None
        assert answers is not None

        def run(*arguments: object) -> tuple[int, str, str]:
            questions.write(json.dumps([str(each) for each in arguments]) + "\n")
            questions.flush()
            code, output, errors = json.loads(answers.readline())
            return code, output, errors

        yield run
        questions.close()


def assert_one_line(code: int, errors: str, *parts: str) -> None:
    """A user's mistake: exit status 2 and one line, which holds these parts."""
    assert code == 2
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]
