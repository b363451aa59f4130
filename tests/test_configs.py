"""Every file in configs/ builds, counts its parameters and traces a step, for each attention."""

import importlib.util

import jax
import numpy as np
import pytest

from dydilit_jax.config import Config
from dydilit_jax.models.config import ATTENTIONS
from dydilit_jax.models.count import count_parameters
from dydilit_jax.training.state import Network, initial_state
from dydilit_jax.training.step import make_step
from tests.tiny import ROOT

FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def get_config(path, argument):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def test_there_are_configs():
    assert "digits" in {path.stem for path in FILES}


@pytest.mark.parametrize("attention", [None, *ATTENTIONS])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_builds_counts_and_traces_a_step(path, attention):
    fields = get_config(path, f"attention={attention}" if attention else "")
    config = Config.from_dict(fields)
    assert Config.from_json(config.to_json()) == config
    if attention:
        assert config.model.attention.kind == attention

    network = Network.create(config)
    state = jax.eval_shape(lambda: initial_state(network, jax.random.key(0)))
    sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.parameters)]
    assert count_parameters(config.model, network.out_channels) == sum(sizes)

    model, batch_size = config.model, config.data.batch_size
    shape = (batch_size, model.image_size, model.image_size, model.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    after, metrics = jax.eval_shape(make_step(network), state, batch)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert metrics["loss"].shape == ()
    assert {"gradient_norm", "learning_rate"} <= metrics.keys()
    if model.attention.kind == "dydila":
        for name, value in metrics.items():
            if name.startswith("usage/"):
                assert value.shape[0] == model.depth
