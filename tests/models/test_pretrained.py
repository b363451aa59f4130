"""Other people's networks: the same numbers from the same weights, and nothing lost on the way."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from dydilit_jax.errors import UserError
from dydilit_jax.models.attention.linear import LinearAttention
from dydilit_jax.models.attention.projections import Context
from dydilit_jax.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dydilit_jax.models.count import abstract_parameters
from dydilit_jax.models.dydilit import DyDiLiT
from dydilit_jax.models.feedforward import MixFFN
from dydilit_jax.models.pretrained import (
    inherit,
    load_pretrained,
    read_pretrained,
    save_pretrained,
)

FIXTURES = Path(__file__).parent / "fixtures"
DIT = dict(np.load(FIXTURES / "dit.npz"))
SANA = dict(np.load(FIXTURES / "sana.npz"))
DIFFUSERS, OFFICIAL = FIXTURES / "dit_diffusers", FIXTURES / "dit_official.pt"


def with_parameters(make, parameters):
    """The module that `make` builds, with these parameters."""
    return nnx.merge(nnx.split(nnx.eval_shape(make))[0], parameters)


def output(config, parameters, out_channels=8, time=DIT["time"]):
    """What the network puts out for the fixture's images, channels last."""

    @jax.jit
    def run(parameters):
        module = with_parameters(
            lambda: DyDiLiT(config, out_channels, rngs=nnx.Rngs(0)), parameters
        )
        return module(DIT["images"], time, DIT["labels"])[0]

    return np.asarray(run(parameters))


def random_tree(config, out_channels=None, seed=0):
    """Random parameters, with what a careless copy would change: -0, tiny and huge numbers."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        array = rng.standard_normal(leaf.shape).astype(np.float32)
        special = np.array([-0.0, 1e-42, 3e38, 1 / 3], np.float32)
        array.reshape(-1)[: len(special)] = special[: array.size]
        return array

    return jax.tree.map(draw, abstract_parameters(config, out_channels))


def assert_same_bits(actual, expected):
    actual, expected = (traverse_util.flatten_dict(tree, sep="/") for tree in (actual, expected))
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        assert actual[path].dtype == np.float32
        np.testing.assert_array_equal(actual[path].view(np.uint32), array.view(np.uint32), path)


# The same network. All of the fixture's outputs are diffusers' own. `output_default` has its
# default norm_eps, 1e-5, before the feed-forward, as the published config.json asks for: the
# official DiT has 1e-6 everywhere, as this network, and the two are this much apart.


@pytest.mark.parametrize(
    ("source", "heads", "expected"),
    [(DIFFUSERS, None, "output"), (OFFICIAL, 4, "output_official")],
    ids=["diffusers", "official"],
)
def test_softmax_with_mlp_is_dit(source, heads, expected):
    config, parameters = load_pretrained(source, heads=heads)
    assert (config.attention.kind, config.feedforward.kind) == ("softmax", "mlp")
    ours = output(config, parameters)
    assert ours.shape == (*DIT["images"].shape[:3], 8)
    assert np.std(ours) > 0.5
    np.testing.assert_allclose(ours, DIT[expected], atol=1e-4, rtol=0)
    # The comparison would tell the two frequencies of time apart.
    assert np.abs(DIT["output"] - DIT["output_official"]).max() > 1e-2


def test_official_weights_with_the_frequencies_of_diffusers():
    config, parameters = load_pretrained(OFFICIAL, heads=4)
    assert config.time_frequency_shift == 0
    shifted = dataclasses.replace(config, time_frequency_shift=1)
    np.testing.assert_allclose(output(shifted, parameters), DIT["output"], atol=1e-4, rtol=0)
    assert_same_bits(parameters, load_pretrained(DIFFUSERS)[1])


def test_the_default_epsilon_of_diffusers_changes_little():
    config, parameters = load_pretrained(DIFFUSERS)
    difference = np.abs(output(config, parameters) - DIT["output_default"]).max()
    assert 1e-6 < difference < 1e-3


def sana_config():
    return ModelConfig(
        image_size=10,
        patch_size=2,
        width=64,
        attention=AttentionConfig(kind="relu", heads=2, depthwise=0, qkv_bias=False),
        feedforward=FeedForwardConfig(kind="mix", ratio=2.5),
    )


def test_relu_attention_is_sanas():
    weights = {
        name.removeprefix("attention/"): array
        for name, array in SANA.items()
        if name.startswith("attention/")
    }
    parameters = {
        "qkv": {"kernel": np.stack([weights[f"to_{letter}.weight"].T for letter in "qkv"], 1)},
        "out": {"kernel": weights["to_out.0.weight"].T, "bias": weights["to_out.0.bias"]},
    }
    module = with_parameters(lambda: LinearAttention(sana_config(), rngs=nnx.Rngs(0)), parameters)
    mixed, _ = module(SANA["input"], Context())
    assert np.std(weights["output"]) > 0.1
    np.testing.assert_allclose(mixed, weights["output"], atol=1e-4, rtol=0)


def test_mix_ffn_is_sanas():
    weights = {
        name.removeprefix("feed/"): array
        for name, array in SANA.items()
        if name.startswith("feed/")
    }
    parameters = {
        "hidden": {
            "kernel": weights["conv_inverted.weight"][:, :, 0, 0].T,
            "bias": weights["conv_inverted.bias"],
        },
        "depthwise": {
            "kernel": weights["conv_depth.weight"][:, 0].transpose(1, 2, 0),
            "bias": weights["conv_depth.bias"],
        },
        "out": {"kernel": weights["conv_point.weight"][:, :, 0, 0].T},
    }
    module = with_parameters(lambda: MixFFN(sana_config(), rngs=nnx.Rngs(0)), parameters)
    assert np.std(weights["output"]) > 0.1
    np.testing.assert_allclose(module(SANA["input"]), weights["output"], atol=1e-4, rtol=0)


# Nothing is lost.


SMALL = ModelConfig(
    image_size=12,
    channels=3,
    patch_size=2,
    num_classes=5,
    depth=3,
    width=24,
    label_dropout=0.25,
    scan_layers=False,
    attention=AttentionConfig(kind="softmax", heads=3, depthwise=0),
    feedforward=FeedForwardConfig(kind="mlp"),
)


@pytest.mark.parametrize("layout", ["own", "diffusers", "dit"])
def test_a_dit_comes_back_from_every_layout(tmp_path, layout):
    parameters = random_tree(SMALL, 6)
    extra = {"step": 17, "diffusion": {"process": "gaussian"}}
    save_pretrained(tmp_path / "a", SMALL, parameters, extra, layout=layout)
    back = read_pretrained(tmp_path / "a")
    assert (back.config, back.out_channels, back.layout) == (SMALL, 6, layout)
    assert back.extra == extra
    assert_same_bits(back.parameters, parameters)


@pytest.mark.parametrize("layout", ["diffusers", "dit"])
def test_a_dit_comes_back_without_our_part_of_the_config(tmp_path, layout):
    """As another project's file: the network is told from shapes and diffusers' fields."""
    config = dataclasses.replace(SMALL, time_frequency_shift=int(layout == "diffusers"))
    parameters = random_tree(config, 6)
    save_pretrained(tmp_path / "a", config, parameters, layout=layout)
    path = tmp_path / "a" / "config.json"
    if layout == "dit":
        path.unlink()
    else:
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in fields.items() if not k.startswith("_")}))
    back = read_pretrained(tmp_path / "a", heads=3)
    trained = dataclasses.replace(back.config, label_dropout=0.25, scan_layers=False)
    assert (trained, back.out_channels, back.extra) == (config, 6, {})
    assert_same_bits(back.parameters, parameters)


def test_another_ratio_of_the_mlp_fits_the_official_layout(tmp_path):
    config = dataclasses.replace(SMALL, feedforward=FeedForwardConfig(kind="mlp", ratio=3.0))
    save_pretrained(tmp_path / "a", config, random_tree(config), layout="dit")
    (tmp_path / "a" / "config.json").unlink()
    back, _ = load_pretrained(tmp_path / "a", heads=3)
    assert back.feedforward == config.feedforward


def test_the_heads_of_dits_sizes_are_known(tmp_path):
    attention = AttentionConfig(kind="softmax", heads=6, depthwise=0)
    config = dataclasses.replace(SMALL, depth=1, width=384, attention=attention)
    save_pretrained(tmp_path / "a", config, random_tree(config), layout="dit")
    (tmp_path / "a" / "config.json").unlink()
    back, _ = load_pretrained(tmp_path / "a")
    assert (back.width, back.attention) == (384, attention)


NETWORKS: dict[str, dict[str, Any]] = {
    "dydila": {},
    "rms": {"attention": {"normalizer": "rms"}},
    "no difference": {"attention": {"projectors": 0}},
    "static projector": {"attention": {"projectors": 1, "lambdas": 1, "exponents": 1}},
    "nothing learned": {"attention": {"lambdas": 0, "exponents": 0}},
    "no bias": {"attention": {"qkv_bias": False, "depthwise": 0}},
    "relu": {"attention": {"kind": "relu"}, "position": "rope"},
    "focused": {"attention": {"kind": "focused", "exponent_init": 2.5}, "position": "none"},
    "mlp": {"feedforward": {"kind": "mlp", "ratio": 2.0}},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_comes_back_from_our_layout(tmp_path, name):
    fields = dict(NETWORKS[name])
    attention = AttentionConfig(**{"heads": 2, "depthwise": 3} | fields.pop("attention", {}))
    feedforward = FeedForwardConfig(**fields.pop("feedforward", {}))
    config = ModelConfig(
        image_size=8,
        depth=2,
        width=16,
        num_classes=4,
        attention=attention,
        feedforward=feedforward,
        **fields,
    )
    parameters = random_tree(config)
    save_pretrained(tmp_path / "a", config, parameters)
    back = read_pretrained(tmp_path / "a")
    assert (back.config, back.out_channels, back.layout) == (config, 4, "own")
    assert_same_bits(back.parameters, parameters)


# Inheritance.


def student(**fields):
    attention = AttentionConfig(heads=2, depthwise=3)
    return dataclasses.replace(SMALL, attention=attention, **fields)


NEW_IN_DYDILA = {
    f"blocks/attention/{part}"
    for part in (
        *("depthwise/bias", "depthwise/kernel", "exponents/bank", "exponents/routers"),
        *("key_bank/kernel", "key_bank/router", "query_bank/kernel", "query_bank/router"),
        *("lambdas/bank", "lambdas/key_router", "lambdas/query_router"),
    )
}


def test_dydila_inherits_all_but_the_attentions_own_new_parts():
    config = student()
    source, target = random_tree(SMALL, seed=1), random_tree(config, seed=2)
    parameters, taken, new = inherit(target, config, source, SMALL)
    assert set(new) == NEW_IN_DYDILA
    theirs = traverse_util.flatten_dict(source, sep="/")
    assert set(taken) == theirs.keys()
    ours = traverse_util.flatten_dict(target, sep="/")
    expected = theirs | {path: ours[path] for path in new}
    assert_same_bits(parameters, traverse_util.unflatten_dict(expected, sep="/"))


@pytest.mark.parametrize(
    ("fields", "starts_anew"),
    [
        ({"feedforward": FeedForwardConfig(kind="mix", ratio=4.0)}, {"blocks/feedforward/"}),
        # The bias of the patches' map too, though it has the same shape.
        ({"patch_size": 4}, {"patch_embed/", "final/linear/"}),
        ({"channels": 1}, {"patch_embed/", "final/linear/"}),
        ({"num_classes": 7}, {"label_embed/"}),
        ({"image_size": 16, "position": "none"}, set()),
    ],
)
def test_what_means_something_else_starts_anew(fields, starts_anew):
    config = student(**fields)
    target = random_tree(config, seed=2)
    _, taken, new = inherit(target, config, random_tree(SMALL, seed=1), SMALL)
    ours = traverse_util.flatten_dict(target, sep="/").keys()
    expected = {path for path in ours if path.startswith(tuple(starts_anew))}
    assert set(new) - NEW_IN_DYDILA == expected
    assert set(taken) == ours - set(new)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"depth": 4}, "depth 3 and width 24: this one has depth 4 and width 24"),
        ({"width": 48}, "depth 3 and width 24: this one has depth 3 and width 48"),
        ({"time_frequency_shift": 1}, "set model.time_frequency_shift to it, this one has 1"),
    ],
)
def test_no_inheritance_from_another_size(fields, says):
    config = student(**fields)
    with pytest.raises(UserError, match=says):
        inherit(abstract_parameters(config), config, random_tree(SMALL), SMALL)
