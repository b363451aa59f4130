"""One of several processes of a run: python -m tests.training.processes ADDRESS COUNT ID WORKDIR.

Trains TRAINED on its four devices and the others'; process 0 writes the last state to a file.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from dydilit_jax.training import distributed
from dydilit_jax.training.loop import load_data, train
from dydilit_jax.training.sharding import to_mesh
from tests.tiny import mesh_of, plain_config, to_numpy

TRAINED = plain_config(
    model={"label_dropout": 0.3},
    mesh={"data": 2, "fsdp": 2, "tensor": 2},
    optimizer={"eps": 1e-2, "learning_rate": 1e-2},
    train={"checkpoint_every": 2},
)
DEVICES = 4


def main() -> None:
    address, count, process, workdir = sys.argv[1:]
    distributed.start(address, int(count), int(process), 60.0)
    state = train(TRAINED, Path(workdir)).state
    parameters = multihost_utils.process_allgather(state.parameters, tiled=True)
    # Every process wants the whole batch here, and reads a part of it.
    mesh = mesh_of(1, 1, 2, 4)
    placed = to_mesh(next(load_data(TRAINED)[1]), mesh)
    assert {shard.data.shape[0] for shard in placed["label"].addressable_shards} == {16}
    arrays = to_numpy(parameters) | {
        f"batch/{name}": np.asarray(value.addressable_shards[0].data)
        for name, value in placed.items()
    }
    np.savez(Path(workdir) / f"process_{process}.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
    )
    jax.config.update("jax_platforms", "cpu")
    main()
