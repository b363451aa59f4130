"""Stand-ins for programs that launch scripts call: they record how they were called."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """\
#!{python} -SE
import json, os, sys
folder = os.environ["FAKES"]
said = sys.stdin.read() if sys.argv[-1] == "-" else ""
name = os.path.basename(sys.argv[0])
for each in sys.argv[1:]:
    if each.startswith("--metadata-from-file=startup-script="):
        with open(each.partition("script=")[2]) as script:
            said = script.read()
with open(os.path.join(folder, "calls"), "a") as calls:
    calls.write(json.dumps([[name, *sys.argv[1:]], said]) + "\\n")
for i in range(100):
    path = os.path.join(folder, "answers", str(i))
    if not os.path.exists(path):
        break
    with open(path) as file:
        words, answers = json.load(file)
    if answers and all(any(word in each for each in [name, *sys.argv[1:]]) for word in words):
        with open(path, "w") as file:
            json.dump([words, answers[1:] if len(answers) > 1 else answers], file)
        output, status = answers[0]
        (sys.stderr if status else sys.stdout).write(output)
        sys.exit(status)
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a stand-in.

    Attributes:
      argv: its name and arguments.
      input: what it was given on standard input, read only where the last argument is `-`; or
        the startup script it was to read.
    """

    argv: list[str]
    input: str


class Fakes:
    """Stand-ins in a folder of their own, which comes first on PATH.

    Args:
      folder: new.
      names: of the programs.
      environment: more variables.
    """

    def __init__(self, folder: Path, *names: str, **environment: str):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "answers").mkdir()
        for name in names:
            self.script(name, SCRIPT.format(python=sys.executable))
        self.environment = os.environ | {
            "FAKES": str(folder),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            **environment,
        }
        self.environment.pop("VIRTUAL_ENV", None)
        self._answers = 0

    def script(self, name: str, text: str) -> None:
        """Puts a script of the test's own on PATH."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def answer(self, words: list[str], *answers: tuple[str, int]) -> None:
        """Answers (output, status) to calls with all of the words, one after the other; the last
        one again and again. The first set that fits is taken."""
        (self.folder / "answers" / str(self._answers)).write_text(json.dumps([words, answers]))
        self._answers += 1

    def calls(self) -> list[Call]:
        """All calls since the last time this was asked."""
        path = self.folder / "calls"
        if not path.exists():
            return []
        lines = path.read_text().splitlines()
        path.unlink()
        return [Call(*json.loads(line)) for line in lines]

    def run(self, *command: object, cwd: Path | None = None) -> tuple[int, str, str]:
        """(exit status, standard output, standard error) of a command."""
        done = subprocess.run(
            [str(each) for each in command],
            env=self.environment,
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr
