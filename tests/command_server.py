"""Runs the entry points' commands, each in an interpreter of its own, without importing JAX anew.

    python -m tests.command_server

Reads a line of JSON for each command, ["module", "argument", ...], from standard input, forks, and
runs it in the child as `python -m module argument ...` would. The libraries are imported before the
fork, the entry points, which define the flags, after it; no backend of JAX is started before it.
Answers with a line of JSON: [exit code, standard output, standard error].
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
import warnings

PRELOADED = ("sklearn.datasets", "dydilit_jax.training.loop", "ml_collections.config_flags")


def run_child(command: list[str], output: int, errors: int) -> int:
    """What the interpreter does with `-m`; returns the exit code."""
    os.dup2(output, 1)
    os.dup2(errors, 2)
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def run(command: list[str]) -> tuple[int, str, str]:
    """Forks and waits."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = run_child(command, output.fileno(), errors.fileno())
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        errors.seek(0)
        code = os.waitstatus_to_exitcode(status)
        return code, output.read().decode(), errors.read().decode()


def main() -> None:
    """Serves until standard input ends."""
    for name in PRELOADED:
        __import__(name)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
