"""Feature vectors that are needed one by one: each process keeps those of its own devices.

In a folder they lie in files, which hold one record an image:

    rows-PROCESS-NUMBER.npy    index () int64, row (D,) float32
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.agreement import raised_together
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import first_filled, gather

FILE_BYTES = 1 << 24  # a file is begun anew when it has so many


def record(width: int) -> np.dtype:
    """dtype of an image's row and index."""
    return np.dtype([("index", np.int64), ("row", np.float32, (width,))])


def records(rows: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Records of rows (m, D) and their indices (m,)."""
    result = np.empty(len(rows), record(rows.shape[1]))
    result["index"], result["row"] = indices, rows
    return result


class KeptRows:
    """A process's rows, in files of a folder or in memory.

    Args:
      width: D.
      folder: where the files are; all processes may share it; None for memory.
    """

    def __init__(self, width: int, folder: Path | None = None):
        self.width, self.folder = width, folder
        self._parts: list[np.ndarray] = []  # on disk and in memory, in order
        self._files: list[str] = []
        self._loose: list[np.ndarray] = []  # to be written when they fill a file
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, rows: np.ndarray, indices: np.ndarray) -> None:
        """Takes rows (m, D) of the images of these indices (m,)."""
        if not len(rows):
            return
        self._loose.append(records(np.asarray(rows, np.float32), indices))
        if self.folder is None or sum(part.nbytes for part in self._loose) >= FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what is not in a file yet."""
        if not self._loose:
            return
        part = np.concatenate(self._loose)
        self._loose = []
        if self.folder is not None:
            process = jax.process_index()
            own = [name for name in self._files if name.startswith(f"rows-{process}-")]
            number = 1 + max((int(Path(name).stem.split("-")[2]) for name in own), default=-1)
            path = self.folder / f"rows-{process}-{number:06d}.npy"
            unfinished = path.with_suffix(".unfinished")
            with unfinished.open("wb") as file:
                np.save(file, part)
            unfinished.replace(path)
            self._files.append(path.name)
            part = np.load(path, mmap_mode="r")
        self._parts.append(part)

    def __len__(self) -> int:
        """Number of rows that this process holds."""
        return sum(len(part) for part in self._parts) + sum(len(part) for part in self._loose)

    def read(self, start: int, stop: int) -> np.ndarray:
        """This process's records from `start` to `stop`."""
        pieces, first = [np.empty(0, record(self.width))], 0
        for part in (*self._parts, *self._loose):
            pieces.append(part[max(0, start - first) : max(0, stop - first)])
            first += len(part)
        return np.concatenate(pieces)

    def at(self, places: np.ndarray) -> np.ndarray:
        """This process's rows (m, D) at these places (m,) of its own."""
        result, first = np.empty((len(places), self.width), np.float32), 0
        for part in (*self._parts, *self._loose):
            inside = np.flatnonzero((places >= first) & (places < first + len(part)))
            result[inside] = part[places[inside] - first]["row"]
            first += len(part)
        return result

    def state(self) -> dict[str, np.ndarray]:
        """Names of the files, all written, or the records themselves where there is no folder."""
        self.flush()
        if self.folder is None:
            return {"records": self.read(0, len(self))}
        return {"files": np.array(self._files, dtype=np.str_)}

    def take_up(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes the rows of a `state`, further to those that are there.

        Raises:
          UserError: a file of it is missing.
        """
        if "records" in state:
            self._parts.append(state["records"])
            return
        for name in map(str, state["files"]):
            path = self.folder / name if self.folder is not None else Path(name)
            if not path.is_file():
                raise UserError(
                    f"{str(path)!r}, features of an evaluation that was begun, is missing: delete "
                    "the evaluation's folder to begin anew"
                )
            self._files.append(name)
            self._parts.append(np.load(path, mmap_mode="r"))


class Lookup:
    """Rows of all processes by their place in the order of indices; made together, a collective.

    Args:
      rows: this process's.
      mesh: a row_mesh of all processes.
    """

    def __init__(self, rows: KeptRows, mesh: Mesh):
        self.rows, self.mesh = rows, mesh
        step = max(1, FILE_BYTES // (4 * rows.width))
        with raised_together():
            # Copied: a field of the records would keep all of them.
            blocks = [rows.read(i, i + step)["index"].copy() for i in range(0, len(rows), step)]
        own = np.concatenate([np.empty(0, np.int64), *blocks])
        counts = gather(np.array(len(rows)))
        padded = np.full(int(counts.max()), -1, np.int64)
        padded[: len(own)] = own
        gathered = gather(padded)
        self.indices = np.sort(gathered[gathered >= 0])
        self._order = np.argsort(own)
        self._own = own[self._order]

    def __len__(self) -> int:
        """Number of rows of all processes."""
        return len(self.indices)

    def take(self, places: np.ndarray) -> np.ndarray:
        """(m, D) float32 rows at these places (m,), on every process; a collective."""
        with raised_together():
            own = self._own_rows(places)
        return first_filled(own, self.mesh)

    def _own_rows(self, places: np.ndarray) -> np.ndarray:
        """The same, zero where another process has the row."""
        wanted = self.indices[places]
        found = np.searchsorted(self._own, wanted)
        found = np.minimum(found, max(0, len(self._own) - 1))
        result = np.zeros((len(places), self.rows.width), np.float32)
        if len(self._own):
            here = self._own[found] == wanted
            result[here] = self.rows.at(self._order[found[here]])
        return result
