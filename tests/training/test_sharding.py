"""Rules from paths to axes: every parameter of every network has exactly one."""

import dataclasses
import itertools
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dydilit_jax.config import MeshConfig
from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ATTENTIONS, FEEDFORWARDS, SIZES, ModelConfig, size_fields
from dydilit_jax.models.count import abstract_parameters, parameter_table
from dydilit_jax.training import sharding
from dydilit_jax.training.sharding import (
    RULES,
    check_batch,
    make_mesh,
    parameter_shardings,
    parameter_spec,
)
from tests.tiny import mesh_of, tiny_config

# Networks that have parameters of other names or shapes than the named sizes.
OPTIONS = [
    {"projectors": 0, "exponents": 0, "lambdas": 0},
    {"projectors": 1, "exponents": 1, "lambdas": 1},
    {"normalizer": "rms", "depthwise": 0, "qkv_bias": False},
    {"normalizer": "signed", "norm_scope": "head"},
    {"router_training": "gumbel", "exponents": 1, "lambdas": 9},
]


def paths(config: ModelConfig, out_channels: int | None = None) -> list[tuple[str, tuple]]:
    rows = parameter_table(abstract_parameters(config, out_channels))
    return [(path, shape) for path, shape, *_ in rows]


def matching(path: str) -> list[P]:
    return [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]


@pytest.mark.parametrize(
    ("size", "attention", "feedforward"), itertools.product(SIZES, ATTENTIONS, FEEDFORWARDS)
)
def test_each_parameter_of_each_network_has_one_rule_that_fits(size, attention, feedforward):
    # The depth is only the length of the first axis.
    fields = size_fields(size, attention, feedforward)
    config = ModelConfig(**{**fields, "depth": 1})
    for path, shape in paths(config):
        assert len(matching(path)) == 1, path
        spec = parameter_spec(path)
        assert len(spec) <= len(shape), path
        for length, axis in zip(shape, spec, strict=False):
            assert axis is None or length % 8 == 0, path
    parameter_shardings(abstract_parameters(config), mesh_of(1, 8))


@pytest.mark.parametrize("options", OPTIONS)
def test_each_parameter_of_each_option_has_one_rule(options):
    model = tiny_config().model
    attention = dataclasses.replace(model.attention, **options)
    for position in ("rope", "none"):
        config = dataclasses.replace(model, attention=attention, position=position)
        for path, _ in paths(config, out_channels=2):
            assert len(matching(path)) == 1, path


def test_every_rule_has_a_parameter():
    seen = {
        path
        for attention, feedforward in itertools.product(ATTENTIONS, FEEDFORWARDS)
        for path, _ in paths(ModelConfig(**size_fields("tiny", attention, feedforward)))
    }
    options = dataclasses.replace(tiny_config().model.attention, normalizer="rms")
    seen |= {path for path, _ in paths(dataclasses.replace(tiny_config().model, attention=options))}
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, path) for path in seen), pattern


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="0 sharding rules match parameter 'blocks/new/kernel'"):
        parameter_spec("blocks/new/kernel")
    # A rule covers the whole path and no part of it.
    with pytest.raises(UserError, match="0 sharding rules"):
        parameter_spec("ema/patch_embed/kernel")
    tree = {"patch_embed": {"gain": jax.ShapeDtypeStruct((4,), "float32")}}
    with pytest.raises(UserError, match="patch_embed/gain"):
        parameter_shardings(tree, mesh_of(2, 4))


def test_a_parameter_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*RULES, (r"patch_embed/.*", P())))
    with pytest.raises(UserError, match="2 sharding rules match parameter 'patch_embed/kernel'"):
        parameter_spec("patch_embed/kernel")


def test_a_dimension_that_an_axis_does_not_divide_is_an_error():
    model = dataclasses.replace(tiny_config().model, width=12)
    with pytest.raises(UserError, match=r"mesh.fsdp 8 does not divide 12, a dimension of "):
        parameter_shardings(abstract_parameters(model), mesh_of(1, 8))


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [(-1, 1, (8, 1)), (2, -1, (2, 4)), (2, 4, (2, 4)), (-1, 8, (1, 8))],
)
def test_mesh_takes_all_devices(data, fsdp, shape):
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp")
    assert {device.id for device in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    ("data", "fsdp"), [(3, 1), (-1, 3), (-1, -1), (0, 1), (-1, 0), (16, 1), (-2, -4), (-2, 1)]
)
def test_a_mesh_that_does_not_fit_is_an_error(data, fsdp):
    with pytest.raises(UserError, match="mesh"):
        make_mesh(MeshConfig(data=data, fsdp=fsdp))


def test_a_batch_that_devices_do_not_divide_is_an_error():
    mesh = mesh_of(2, 4)
    check_batch(16, mesh)
    with pytest.raises(UserError, match=r"data.batch_size 12 is not divisible by 8 devices"):
        check_batch(12, mesh)
