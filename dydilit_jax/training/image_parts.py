"""Images that were drawn over several devices, kept in parts on disk until one .npz is made.

    FOLDER/00000000.2.npz    process 2's rows of the batch from that index on

Each process writes its own rows; the first one joins them. Nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dydilit_jax.errors import UserError


class ImageParts:
    """The images so far.

    Args:
      folder: shared by all processes; made if it is not there.
      first: index to go on from; what lies beyond it is of a run that was killed, and is removed.
    """

    def __init__(self, folder: Path, first: int):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for path in folder.glob("*.npz"):
                if not path.name[0].isdigit() or _start(path) >= first:
                    path.unlink(missing_ok=True)

    def add(self, indices: np.ndarray, images: jax.Array) -> None:
        """Keeps this process's rows of a batch.

        Args:
          indices: (B,) of the images, the same on every process; negative ones are filling.
          images: (B, H, W, C) uint8, over the devices.
        """
        shards = [shard for shard in images.addressable_shards if shard.replica_id == 0]
        own = np.concatenate([indices[shard.index[0]] for shard in shards])
        rows = np.concatenate([np.asarray(shard.data) for shard in shards])
        path = self._folder / f"{indices[0]:08d}.{jax.process_index()}.npz"
        unfinished = path.with_name("unfinished_" + path.name)
        np.savez(unfinished, indices=own[own >= 0], images=rows[own >= 0])
        unfinished.replace(path)

    def read(self) -> Iterator[np.ndarray]:
        """The images batch by batch, in the order of their indices.

        Raises:
          UserError: some are missing.
        """
        done = 0
        paths = sorted(self._folder.glob("[0-9]*.npz"))
        for start in sorted({_start(path) for path in paths}):
            indices, images = [], []
            for path in paths:
                if _start(path) == start:
                    with np.load(path) as part:
                        indices.append(part["indices"])
                        images.append(part["images"])
            order = np.argsort(joined := np.concatenate(indices))
            if not np.array_equal(joined[order], np.arange(done, done + len(joined))):
                raise UserError(
                    f"images from {done} on are missing in {str(self._folder)!r}, which all "
                    "processes must share: delete it and run again"
                )
            done += len(joined)
            yield np.concatenate(images)[order]


def _start(path: Path) -> int:
    return int(path.name.split(".")[0])
