"""How far a run is, from what it writes in its workdir."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from pathlib import Path
from typing import Any

from dydilit_jax.config import Config
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.training.checkpoint import CHECKPOINTS
from dydilit_jax.training.integrity import is_finished
from dydilit_jax.training.writers import METRICS_FILE

LOG_FILE = "log.txt"
LOG_TAIL = 16_384  # bytes of a log that are searched for what went wrong


class State(enum.StrEnum):
    """Where a run stands."""

    WAITING = "waiting"  # to be started
    QUEUED = "queued"  # with a scheduler
    RUNNING = "running"
    STOPPED = "stopped"  # it was asked to, and saved; it can go on
    FAILED = "failed"
    PRUNED = "pruned"  # stopped for good, by a search
    FINISHED = "finished"


ALIVE = (State.QUEUED, State.RUNNING)


@dataclasses.dataclass
class Status:
    """What is known of a run.

    Attributes:
      name: the run's.
      total: steps that it is to make.
      state: where it stands.
      step: steps that it has made, as far as it wrote.
      loss: the last one.
      score: the best value of what ranks runs.
      scores: that metric's values by step.
      rate: steps in a second, lately.
      error: its log's last word, where it failed.
      restarts: how often it was started again after it failed.
      hopeless: whether a search has given it up; it is stopped if it is alive.
    """

    name: str
    total: int
    state: State = State.WAITING
    step: int = 0
    loss: float | None = None
    score: float | None = None
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    rate: float | None = None
    error: str = ""
    restarts: int = 0
    hopeless: bool = False

    @property
    def seconds_left(self) -> float | None:
        """How long it will run at its rate; None if it does not run, or has told no rate."""
        if self.state is not State.RUNNING or not self.rate:
            return None
        return max(0, self.total - self.step) / self.rate


class Metrics:
    """The lines of a run's metrics.jsonl, of which only new ones are read."""

    def __init__(self, workdir: Path):
        self._path = workdir / METRICS_FILE
        self._read = 0
        self._identity: object = None
        self.records: list[dict[str, Any]] = []

    def refresh(self) -> list[dict[str, Any]]:
        """All records, oldest first; a last line cut short waits for its end."""
        try:
            status = self._path.stat()
            # A run that resumes replaces the file by a shorter one.
            identity = getattr(status, "st_ino", None)
            size = getattr(status, "st_size", None)
            if identity != self._identity or size is None or size < self._read:
                self._identity, self._read, self.records = identity, 0, []
            with self._path.open("rb") as file:
                file.seek(self._read)
                text = file.read()
        except OSError:
            return self.records
        complete = text[: text.rfind(b"\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                self.records.append(record)
        return self.records


def number(record: dict[str, Any], name: str) -> float | None:
    """A finite number of a record; None where there is none."""
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


class Observer:
    """Reads one run's workdir again and again.

    Args:
      workdir: the run's.
      config: the run's.
      score: what ranks runs.
    """

    def __init__(self, workdir: Path, config: Config, score: Score):
        self._workdir, self._config, self._score = workdir, config, score
        self._metrics = Metrics(workdir)

    def observe(self, status: Status) -> None:
        """Brings what can be read up to date; the state is left to others."""
        records = self._metrics.refresh()
        status.total = self._config.train.steps
        status.step = max((record["step"] for record in records), default=0)
        losses = [loss for record in records if (loss := number(record, "loss")) is not None]
        rates = [r for record in records if (r := number(record, "steps_per_second")) is not None]
        status.loss = losses[-1] if losses else None
        status.rate = rates[-1] if rates else None
        status.scores = {
            record["step"]: value
            for record in records
            if (value := number(record, self._score.name)) is not None
        }
        status.score = self._score.best(status.scores.values())

    def is_complete(self) -> bool:
        """Whether the run has its last checkpoint, and its scores if it is to have any."""
        steps = self._config.train.steps
        if self.saved_step() < steps:
            return False
        # Scores are written alone, beside the last step's losses.
        scored = any(
            record["step"] >= steps and "loss" not in record for record in self._metrics.refresh()
        )
        return scored or self._config.evaluation.num == 0

    def saved_step(self) -> int:
        """Step of the newest finished checkpoint, 0 if there is none."""
        folder = self._workdir / CHECKPOINTS
        try:
            steps = [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
        except OSError:
            return 0
        return max((step for step in steps if is_finished(folder / str(step))), default=0)


def last_word(log: str) -> str:
    """The line of a log that says what went wrong: a told error, an exception, or the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for pattern in (r"error: ", r"[\w.]*(Error|Exception|Interrupt)\b"):
        for line in reversed(lines):
            if re.match(pattern, line):
                return line
    return lines[-1] if lines else ""


def read_tail(path: Path) -> str:
    """The end of a text file; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL))
            return file.read().decode(errors="replace")
    except OSError:
        return ""
