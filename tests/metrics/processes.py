"""One of two processes: python -m tests.metrics.processes ADDRESS COUNT ID FOLDER.

Scores the made features, each process with four devices; process 0 writes what came out.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.references import read_reference, write_reference
from dydilit_jax.metrics.scoring import Scorer
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
    again = scorer.scores(read_reference(out / "reference.npz", scorer.extractor, mesh), mesh)
    (out / f"scores-{process}.json").write_text(json.dumps([scores, again, len(scorer.rows or [])]))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    )
    jax.config.update("jax_platforms", "cpu")
    main()
