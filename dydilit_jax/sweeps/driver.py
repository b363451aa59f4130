"""The loop of a sweep: look, start what may start, show, until nothing is left.

It keeps nothing in memory that it needs: what has happened is in the runs' workdirs, in the locks
their processes hold, in the scheduler, and in a search's journal. WORKDIR/states.json repeats it
for those who look on, such as the report.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Protocol

from dydilit_jax.sweeps.local import STOPPED_STATUS, Backend, Ended
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.observe import ALIVE, Observer, State, Status
from dydilit_jax.sweeps.runs import Run, write_json
from dydilit_jax.sweeps.table import Table

STATES_FILE = "states.json"
USER_ERROR = 2  # what dydilit_jax.train exits with after a mistake; to repeat it is no use
GONE = "it is gone from the scheduler"


class Plan(Protocol):
    """Which runs there are, and which come next."""

    def known(self) -> Sequence[Run]:
        """All runs so far."""

    def ask(self, room: int | None) -> Sequence[Run]:
        """Further runs, at most so many, that were not known before."""

    def tell(self, statuses: dict[str, Status]) -> None:
        """Learns how the runs stand; may call some hopeless."""


class Listed:
    """The plan of a sweep whose runs are all known."""

    def __init__(self, runs: Sequence[Run]):
        self._runs = list(runs)

    def known(self) -> Sequence[Run]:
        """All runs."""
        return self._runs

    def ask(self, room: int | None) -> Sequence[Run]:
        """None: all are known."""
        del room
        return ()

    def tell(self, statuses: dict[str, Status]) -> None:
        """Learns nothing."""


class Sweep:
    """Brings all runs of a plan to their end.

    Args:
      workdir: the sweep's.
      plan: which runs there are.
      backend: where they run.
      score: what ranks them.
      table: where they are shown.
      max_parallel: runs alive at once; None for no limit of ours.
      max_restarts: how often a run that failed is started again, unless for a user's mistake.
    """

    def __init__(
        self,
        workdir: Path,
        plan: Plan,
        backend: Backend,
        score: Score,
        table: Table,
        *,
        max_parallel: int | None,
        max_restarts: int = 0,
    ):
        self._workdir, self._plan, self._backend = workdir, plan, backend
        self._score, self._table = score, table
        self._max_parallel, self._max_restarts = max_parallel, max_restarts
        self._runs: dict[str, Run] = {}
        self._observers: dict[str, Observer] = {}
        self._asked_to_stop: set[str] = set()
        self._written: dict[str, object] = {}
        self.statuses: dict[str, Status] = {}

    def run(self, stop: Event) -> int:
        """Until all runs have ended, or `stop` is set.

        Returns:
          The exit status: 0 if all runs finished or were pruned, 1 if not.
        """
        self.resume()
        while True:
            if not stop.is_set():
                self._start()
            elif not self._backend.outlives:
                for name in self._names(State.RUNNING):
                    self._stop(name)
            self._write_states()
            self._table.show(list(self.statuses.values()))
            alive = self._names(*ALIVE)
            waiting = self._names(State.WAITING)
            if not alive and (not waiting or stop.is_set()):
                break
            if stop.is_set() and self._backend.outlives:
                break
            # A stop must not make this loop spin while runs still save.
            (time.sleep if stop.is_set() else stop.wait)(self._backend.interval)
            self.look()
        self._table.close(list(self.statuses.values()))
        done = (State.FINISHED, State.PRUNED)
        return 0 if all(each.state in done for each in self.statuses.values()) else 1

    def resume(self) -> None:
        """Finds out how the runs stand that an earlier start of the sweep knew."""
        self._add(self._plan.known())
        for run in self._runs.values():
            self._observe(run.name)
            if self._observers[run.name].is_complete():
                self.statuses[run.name].state = State.FINISHED
        for name in self._backend.adopt(list(self._runs.values())):
            self.statuses[name].state = State.RUNNING
        self._tell()

    def look(self) -> None:
        """Brings all states up to date."""
        for name, found in self._backend.poll().items():
            status = self.statuses[name]
            self._observe(name)
            if isinstance(found, Ended):
                self._end(status, found.code)
            else:
                status.state = found
        self._tell()

    def _add(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self._runs[run.name] = run
            self._observers[run.name] = Observer(self._workdir / run.name, run.config, self._score)
            self.statuses[run.name] = Status(run.name, run.config.train.steps)

    def _observe(self, name: str) -> None:
        self._observers[name].observe(self.statuses[name])

    def _end(self, status: Status, code: int | None) -> None:
        """The state of a run that has ended."""
        asked = status.name in self._asked_to_stop
        self._asked_to_stop.discard(status.name)
        status.error = ""
        if status.hopeless:
            status.state = State.PRUNED
        elif self._observers[status.name].is_complete() or (code == 0 and self._has_ended(status)):
            status.state = State.FINISHED
        elif asked or code in (0, STOPPED_STATUS):
            status.state = State.STOPPED
        elif code is None and not self._backend.queues:
            # An earlier start of the sweep began it, and it has broken off: it goes on from its
            # last checkpoint, and this time we will see how it ends.
            status.state = State.WAITING
        else:
            word = self._backend.last_word(status.name)
            status.error = word or (GONE if code is None else _describe(code))
            again = status.restarts < self._max_restarts and code != USER_ERROR
            status.state = State.WAITING if again else State.FAILED
            status.restarts += again

    def _has_ended(self, status: Status) -> bool:
        """Whether a run that exits with 0 was at its end; a launcher tells the two apart."""
        return self._backend.queues or (self._observers[status.name].saved_step() >= status.total)

    def _tell(self) -> None:
        self._plan.tell(self.statuses)
        for name, status in self.statuses.items():
            if status.hopeless and status.state in ALIVE:
                self._stop(name)
            elif status.hopeless:
                status.state = State.PRUNED

    def _stop(self, name: str) -> None:
        """Asks a run to stop, once: a second signal would not let it save."""
        if name not in self._asked_to_stop:
            self._asked_to_stop.add(name)
            self._backend.stop(name)

    def _start(self) -> None:
        """Starts runs, as many as may."""
        room = None
        if self._max_parallel is not None:
            room = max(0, self._max_parallel - len(self._names(*ALIVE)))
        waiting = self._names(State.WAITING)
        if room is None or len(waiting) < room:
            self._add(self._plan.ask(None if room is None else room - len(waiting)))
            waiting = self._names(State.WAITING)
        chosen = waiting[:room]
        if chosen:
            self._backend.start([self._runs[name] for name in chosen])
            for name in chosen:
                queued = self._backend.queues
                self.statuses[name].state = State.QUEUED if queued else State.RUNNING

    def _names(self, *states: State) -> list[str]:
        return [name for name, status in self.statuses.items() if status.state in states]

    def _write_states(self) -> None:
        record: dict[str, object] = {
            name: {"state": str(status.state), "error": status.error}
            for name, status in self.statuses.items()
        }
        if record != self._written:
            write_json(self._workdir / STATES_FILE, record)
            self._written = record


def _describe(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
