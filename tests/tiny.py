"""The smallest runs that still have every part, and what tests of training share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dydilit_jax.config import Config, flatten
from dydilit_jax.training.checkpoint import Checkpointer, open_workdir
from dydilit_jax.training.sharding import AXES, path_of
from dydilit_jax.training.state import Network, TrainState, initial_state, state_shardings

ROOT = Path(__file__).resolve().parent.parent

TINY: dict[str, Any] = {
    "model": {
        "image_size": 8,
        "channels": 1,
        "patch_size": 4,
        "num_classes": 10,
        "depth": 2,
        "width": 16,
        "attention": {"heads": 2, "depthwise": 3},
    },
    "data": {"batch_size": 16},
    "train": {"steps": 4, "log_every": 1, "checkpoint_every": 0, "sample_every": 0},
    "sampling": {"steps": 2, "batch_size": 16, "grid_rows": 1},
}

# A network that compiles several times faster, for what does not depend on the token mixer.
PLAIN: dict[str, Any] = {
    "model": {
        "depth": 1,
        "scan_layers": False,
        "attention": {"kind": "relu", "depthwise": 0},
        "feedforward": {"kind": "mlp"},
    }
}

# All that draws random numbers and all that is cut over devices. A large eps of Adam: its updates
# then are smooth in the gradient, and not its bare sign.
FULL: dict[str, Any] = {
    "seed": 11,
    "model": {
        "label_dropout": 0.3,
        "attention": {
            "router_training": "gumbel",
            "router_jitter": 0.1,
            "load_balance_weight": 0.01,
        },
    },
    "data": {"horizontal_flip": True},
    "mesh": {"data": 2, "fsdp": 4},
    "optimizer": {
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "eps": 1e-2,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
        "ema_decay": 0.9,
    },
    "train": {"steps": 40, "log_every": 4, "checkpoint_every": 10, "keep_checkpoints": 2},
}


def merged(base: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other, the last on top."""
    result = dict(base)
    for other in others:
        for name, value in other.items():
            below = result.get(name)
            both = isinstance(value, dict) and isinstance(below, dict)
            result[name] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def tiny_config(**overrides: Any) -> Config:
    """DyDi-LiT on the digits: two blocks of width 16, four tokens; sections are overridden."""
    return Config.from_dict(merged(TINY, overrides))


def plain_config(**overrides: Any) -> Config:
    """As tiny_config, with one block of plain linear attention."""
    return Config.from_dict(merged(TINY, PLAIN, overrides))


def full_config(**overrides: Any) -> Config:
    """As tiny_config, with every source of randomness, over a mesh of 2 x 4; 40 steps."""
    return Config.from_dict(merged(TINY, FULL, overrides))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh of these axes over as many devices."""
    shape = (data, fsdp, tensor, sequence)
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def random_parameters(network: Network, seed: int = 0, spread: float = 0.2) -> Any:
    """Parameters none of which is zero, so that each has a gradient, as numpy arrays."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        start = 3.0 if path_of(path).endswith("exponents/bank") else 0.0
        return (start + spread * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, network.abstract_parameters())


def random_state(network: Network, mesh: Mesh, seed: int = 0) -> TrainState:
    """A state at step 0 with random parameters, laid on the mesh."""
    shapes = jax.eval_shape(lambda: initial_state(network, jax.random.key(0)))
    state = dataclasses.replace(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _but_key(shapes)),
        parameters=random_parameters(network, seed),
        key=jax.random.key(seed),
    )
    return jax.device_put(state, state_shardings(network, mesh))


def save_run(workdir: Path, config: Config, step: int = 1) -> TrainState:
    """A workdir as a run leaves it, with random parameters whose average they are; the state."""
    state = random_state(Network.create(config), mesh_of(1))
    # An average over one step holds a share 1 - decay of the parameters until it is corrected.
    share = np.float32(1 - config.optimizer.ema_decay)
    average = jax.tree.map(lambda leaf: share * leaf, state.parameters)
    ema = state.ema._replace(count=state.ema.count + 1, ema=average)
    state = dataclasses.replace(state, step=state.step + step, ema=ema)
    open_workdir(workdir, config)
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, {})
    checkpointer.close()
    return state


def _but_key(state: TrainState) -> TrainState:
    return dataclasses.replace(state, key=state.step)


def to_numpy(tree: Any) -> dict[str, np.ndarray]:
    """A tree of arrays as numpy arrays by path; keys as their data."""

    def array(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_of(path): array(leaf) for path, leaf in leaves}


def state_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """All arrays of a state by path."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return to_numpy(fields)


def flatten_fields(config: Config) -> dict[str, Any]:
    """A config's fields by their dotted names, as flags override them."""
    return flatten(dataclasses.asdict(config))
