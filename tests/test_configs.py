"""Every file in configs/ builds, counts its parameters and traces a step, for each attention."""

import importlib.util

import jax
import numpy as np
import pytest

from dydilit_jax.config import Config
from dydilit_jax.errors import UserError
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
    names = {path.stem for path in FILES}
    assert {"digits", "imagenet256", "imagenet512", "sub_in256", "cifar10"} <= names


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("imagenet256", (32, 4), 1000),
        ("imagenet512", (64, 4), 1000),
        ("sub_in256", (32, 4), 100),
        ("cifar10", (32, 3), 10),
    ],
)
def test_dits_recipe_is_the_default(name, shape, classes):
    config = Config.from_dict(get_config(ROOT / "configs" / f"{name}.py", ""))
    model, optimizer = config.model, config.optimizer
    assert (model.image_size, model.channels) == shape
    assert model.num_classes == classes
    assert (model.patch_size, model.label_dropout) == (2, 0.1)
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-4, "constant")
    assert (optimizer.warmup_steps, optimizer.weight_decay) == (0, 0.0)
    assert optimizer.ema_decay == 0.9999
    assert (config.data.batch_size, config.train.steps) == (256, 400_000)
    assert config.data.horizontal_flip
    assert config.diffusion.process == "gaussian"
    assert config.diffusion.gaussian.learned_variance
    assert config.sampling.steps == 250
    assert config.sampling.sampler in ("", "ddpm")
    assert config.autoencoder.weights == ("sd-vae-ft-ema" if model.channels == 4 else "")


def test_arguments_of_the_configs():
    folder = ROOT / "configs"
    flow = Config.from_dict(get_config(folder / "imagenet256.py", "process=flow,size=S"))
    assert flow.diffusion.process == "flow"
    assert (flow.model.depth, flow.model.width) == (12, 384)
    softmax = Config.from_dict(get_config(folder / "imagenet512.py", "attention=softmax"))
    assert (softmax.model.attention.heads, softmax.model.feedforward.kind) == (16, "mlp")
    short = Config.from_dict(get_config(folder / "cifar10.py", "recipe=short"))
    assert short.train.steps < 400_000
    with pytest.raises(UserError, match="unknown recipe 'shirt': did you mean 'short'"):
        get_config(folder / "cifar10.py", "recipe=shirt")


def test_the_classes_are_those_of_a_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("n01440764\nn02119789 # kit fox\n")
    config = Config.from_dict(get_config(ROOT / "configs" / "sub_in256.py", f"classes={path}"))
    assert config.model.num_classes == 2
    assert config.data.classes == str(path)
    with pytest.raises(UserError, match=r"cannot read data.classes 'none.txt'"):
        get_config(ROOT / "configs" / "sub_in256.py", "classes=none.txt")


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
