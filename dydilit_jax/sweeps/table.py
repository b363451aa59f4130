"""The table of all runs: drawn over itself on a terminal; elsewhere a line for each change."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Sequence
from typing import TextIO

from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.observe import ALIVE, State, Status
from dydilit_jax.training.progress import duration

_FIRST = {State.RUNNING: 0, State.FAILED: 1, State.QUEUED: 2, State.WAITING: 3}
MOST_NAME = 40
TOLD_EVERY = 600.0  # seconds after which a file gets the whole table again


def rows(statuses: Sequence[Status], score: Score) -> list[str]:
    """Lines of the table, the first is its head.

    Args:
      statuses: a line for each, in this order.
      score: what the column of the best score is named after.
    """
    cells = [("run", "state", "step", "loss", f"best {score.name}", "left", "")]
    for each in statuses:
        left = each.seconds_left
        name = each.name if len(each.name) <= MOST_NAME else each.name[: MOST_NAME - 1] + "…"
        cells.append(
            (
                name,
                str(each.state) + (f" ({each.restarts} restarts)" if each.restarts else ""),
                f"{each.step}/{each.total}",
                "" if each.loss is None else f"{each.loss:.4f}",
                "" if each.score is None else f"{each.score:.4g}",
                "" if left is None else duration(left),
                each.error,
            )
        )
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = []
    for row in cells:
        left_aligned = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[2:6], widths[2:6], strict=True)]
        lines.append("  ".join([*left_aligned, *right, row[6]]).rstrip())
    return lines


def summary(statuses: Sequence[Status]) -> str:
    """How many runs are in which state."""
    counts = Counter(each.state for each in statuses)
    return f"{len(statuses)} runs: " + ", ".join(
        f"{counts[state]} {state}" for state in State if counts[state]
    )


class Table:
    """Shows how the runs of a sweep stand.

    Args:
      score: what ranks them.
      file: where to; a terminal gets a table that changes in place.
      live: whether that is a terminal; None to ask it.
    """

    def __init__(self, score: Score, file: TextIO, live: bool | None = None):
        self._score, self._file = score, file
        self._live = file.isatty() if live is None else live
        self._drawn = 0
        self._told: dict[str, tuple[State, str]] = {}
        self._told_at = time.monotonic()

    def show(self, statuses: Sequence[Status]) -> None:
        """Shows the runs as they stand now."""
        if self._live:
            self._draw(statuses)
            return
        for each in statuses:
            if self._told.get(each.name, (State.WAITING, "")) != (each.state, each.error):
                at = f" at step {each.step}/{each.total}" if each.step else ""
                error = f": {each.error}" if each.error else ""
                print(f"{each.name}: {each.state}{at}{error}", file=self._file, flush=True)
            self._told[each.name] = (each.state, each.error)
        if time.monotonic() > self._told_at + TOLD_EVERY:
            self._told_at = time.monotonic()
            lines = [*rows(statuses, self._score), summary(statuses)]
            print("\n".join(lines), file=self._file, flush=True)

    def close(self, statuses: Sequence[Status]) -> None:
        """Shows them for the last time, all of them."""
        if self._live:
            self._erase()
        lines = [*rows(statuses, self._score), summary(statuses)]
        scored = {each.name: each.score for each in statuses if each.score is not None}
        best = self._score.best(scored.values())
        if best is not None:
            names = [name for name, score in scored.items() if score == best]
            lines.append(f"best {self._score.name}: {best:.4g} of {', '.join(names)}")
        print("\n".join(lines), file=self._file, flush=True)

    def _draw(self, statuses: Sequence[Status]) -> None:
        size = shutil.get_terminal_size()
        room = max(1, size.lines - 3)
        shown = list(statuses)
        if len(shown) > room:
            # What moves, and what is wrong, comes first where not all have room.
            shown = sorted(shown, key=lambda each: _FIRST.get(each.state, 9))[:room]
        lines = [*rows(shown, self._score), summary(statuses)]
        alive = [each for each in statuses if each.state in ALIVE]
        if len(shown) < len(statuses):
            lines[-1] += f" ({len(statuses) - len(shown)} not shown)"
        elif not alive:
            lines[-1] += " (nothing runs)"
        self._erase()
        self._file.write("".join(line[: size.columns - 1] + "\n" for line in lines))
        self._file.flush()
        self._drawn = len(lines)

    def _erase(self) -> None:
        if self._drawn:
            self._file.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0
