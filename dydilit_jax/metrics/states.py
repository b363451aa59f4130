"""States of an evaluation on disk, one file a process, of which a kill may leave any half.

    state-BATCHES-PROCESS-of-PROCESSES.npz

A file appears whole or not at all, and a state is one when all its processes' files are there.
"""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from dydilit_jax.agreement import raised_together
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import gather

Arrays = dict[str, np.ndarray]

NAME = re.compile(r"state-(\d+)-(\d+)-of-(\d+)\.npz")


def write_state(folder: Path, batches: int, arrays: Arrays) -> None:
    """Writes this process's part of the state after so many batches."""
    folder.mkdir(parents=True, exist_ok=True)
    process, processes = jax.process_index(), jax.process_count()
    path = folder / f"state-{batches:08d}-{process}-of-{processes}.npz"
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    unfinished.replace(path)


def _states(folder: Path) -> dict[tuple[int, int], list[Path]]:
    """Files of the whole states, by (batches, processes), in the order of processes."""
    found: dict[tuple[int, int], dict[int, Path]] = defaultdict(dict)
    for path in folder.glob("state-*.npz"):
        if match := NAME.fullmatch(path.name):
            batches, process, processes = map(int, match.groups())
            found[batches, processes][process] = path
    return {
        key: [paths[i] for i in range(key[1])]
        for key, paths in found.items()
        if paths.keys() >= set(range(key[1]))
    }


def remove_older(folder: Path) -> None:
    """Deletes the files of states before the newest that is whole."""
    newest = max((batches for batches, _ in _states(folder)), default=-1)
    for path in folder.glob("state-*.npz"):
        if (match := NAME.fullmatch(path.name)) and int(match[1]) < newest:
            path.unlink(missing_ok=True)


def newest_state(folder: Path) -> tuple[int, list[Arrays]]:
    """The newest whole state: its batches, and the parts that this process takes up.

    A collective; part p goes to process p modulo the processes that there are now.

    Raises:
      UserError: a file of it cannot be read.
    """
    newest = max(_states(folder), default=(0, 0))
    batches, processes = (int(each) for each in gather(np.array(newest, np.int64))[0])
    if not processes:
        return 0, []
    parts = []
    with raised_together():
        for process in range(jax.process_index(), processes, jax.process_count()):
            path = folder / f"state-{batches:08d}-{process}-of-{processes}.npz"
            try:
                with np.load(path, allow_pickle=False) as file:
                    parts.append(dict(file))
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(
                    f"{str(path)!r}, the state of an evaluation that was begun, cannot be read "
                    f"({error}): delete its folder to begin anew"
                ) from error
    return batches, parts
