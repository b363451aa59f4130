"""One of two processes: python -m tests.metrics.processes ADDRESS COUNT ID FOLDER.

Scores the made features, each process with four devices, and writes what came out and what it was
told when one of the processes failed.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.references import read_reference, write_reference
from dydilit_jax.metrics.rows import KeptRows
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.metrics.statistics import Reference
from tests.metrics import made

DEVICES = 4
BATCH = 104


def scored(features: Features, mesh: Mesh, folder: Path, stop: int) -> Scorer:
    """Goes on from the state in the folder to image `stop`, and saves."""
    scorer = Scorer(made.FakeExtractor(), folder=folder / "rows")
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    for start in range(scorer.restore(folder), stop, BATCH):
        indices = np.arange(start, start + BATCH)
        indices[indices >= stop] = -1
        arrays = [np.asarray(each)[indices] for each in features]
        placed = [
            jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            for array in arrays
        ]
        scorer.add(Features(*placed), indices)
    scorer.save(folder)
    return scorer


class LostRows(KeptRows):
    """Rows that the second process cannot read any more."""

    def at(self, places: np.ndarray) -> np.ndarray:
        if jax.process_index() == 1:
            raise OSError("the disk is gone")
        return super().at(places)


def failures(reference: Reference, folder: Path) -> list[str]:
    """What this process is told where one of the two fails."""

    def unreadable():
        yield np.zeros((1, 4, 4, 3), np.uint8)
        raise UserError("image 7 cannot be read")

    (folder / "no_folder").touch()
    rows = LostRows(made.WIDTH)
    assert reference.rows is not None
    found = reference.rows.read(0, len(reference.rows))
    rows.add(found["row"], found["index"])
    lost = dataclasses.replace(reference, rows=rows)

    def not_finite() -> None:
        scorer = Scorer(made.FakeExtractor(), scores=["frechet"])
        features = made.samples()
        if jax.process_index() == 1:
            np.asarray(features.pool)[3] = np.nan
        scorer.add(features, np.arange(made.SAMPLES))
        scorer.count()

    def damaged() -> None:
        if jax.process_index() == 1:
            for path in (folder / "samples").glob("state-*-1-of-2.npz"):
                path.write_bytes(path.read_bytes()[:1000])
        Scorer(made.FakeExtractor(), folder=folder / "samples" / "rows").restore(folder / "samples")

    def told(attempt) -> str:
        try:
            attempt()
        except (UserError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return [
        told(lambda: write_reference(folder / "a.npz", reference, unreadable())),
        told(lambda: write_reference(folder / "no_folder" / "b.npz", reference)),
        told(lambda: write_reference(folder / "c.npz", lost)),
        told(not_finite),
        told(damaged),
    ]


def main() -> None:
    address, count, process, folder = sys.argv[1:]
    jax.distributed.initialize(address, int(count), int(process))
    out = Path(folder)
    # Rows change from process to process, with copies on the same one or (`across`) on both.
    devices, axes = np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor")
    mesh = Mesh(devices.transpose(1, 0, 2), axes)
    across = Mesh(devices.transpose(1, 2, 0), axes)
    reference = scored(made.reference(), across, out / "reference", made.REFERENCE).reference()
    write_reference(out / "reference.npz", reference)
    scored(made.samples(), mesh, out / "samples", 3 * BATCH)
    scorer = scored(made.samples(), mesh, out / "samples", made.SAMPLES)
    scores = scorer.scores(reference, mesh)
    again = scorer.scores(read_reference(out / "reference.npz", made.FakeExtractor(), mesh), mesh)
    result = [scores, again, len(scorer.rows or []), failures(scorer.reference(), out)]
    (out / f"scores-{process}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    )
    jax.config.update("jax_platforms", "cpu")
    main()
