"""Rules from paths to axes: every parameter of every network has exactly one."""

import dataclasses
import itertools
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from dydilit_jax.config import MeshConfig
from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ATTENTIONS, FEEDFORWARDS, SIZES, ModelConfig, size_fields
from dydilit_jax.models.count import abstract_parameters, parameter_table
from dydilit_jax.training import sharding
from dydilit_jax.training.loop import train
from dydilit_jax.training.sharding import (
    AXES,
    RULES,
    Rule,
    axis_sizes,
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


def matching(path: str) -> list[Rule]:
    return [rule for rule in RULES if re.fullmatch(rule.pattern, path)]


@pytest.mark.parametrize(
    ("size", "attention", "feedforward"), itertools.product(SIZES, ATTENTIONS, FEEDFORWARDS)
)
def test_each_parameter_of_each_network_has_one_rule_that_fits(size, attention, feedforward):
    # The depth is only the length of the first axis.
    fields = size_fields(size, attention, feedforward)
    config = ModelConfig(**{**fields, "depth": 1})
    tensor = config.attention.heads
    for path, shape in paths(config):
        assert len(matching(path)) == 1, path
        for axes in ({"fsdp": 8}, {"tensor": tensor}, {"fsdp": 4, "tensor": tensor}):
            spec = parameter_spec(path, shape, axes)
            assert len(spec) <= len(shape), path
            for length, names in zip(shape, spec, strict=False):
                names = (names,) if isinstance(names, str) else names or ()
                assert length % np.prod([axes[name] for name in names], dtype=int) == 0, path
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
    for rule in RULES:
        assert any(re.fullmatch(rule.pattern, path) for path in seen), rule.pattern


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="0 sharding rules match parameter 'blocks/new/kernel'"):
        parameter_spec("blocks/new/kernel", (4,), {})
    # A rule covers the whole path and no part of it.
    with pytest.raises(UserError, match="0 sharding rules"):
        parameter_spec("ema/patch_embed/kernel", (4, 4), {})
    tree = {"patch_embed": {"gain": jax.ShapeDtypeStruct((4,), "float32")}}
    with pytest.raises(UserError, match="patch_embed/gain"):
        parameter_shardings(tree, mesh_of(2, 4))


def test_a_parameter_with_two_rules_is_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*RULES, Rule(r"patch_embed/.*")))
    with pytest.raises(UserError, match="2 sharding rules match parameter 'patch_embed/kernel'"):
        parameter_spec("patch_embed/kernel", (4, 4), {})


XL = {
    kind: abstract_parameters(ModelConfig(**size_fields("XL", kind, feedforward)))
    for kind, feedforward in (("dydila", "mix"), ("softmax", "mlp"))
}


@pytest.mark.parametrize("kind", XL)
@pytest.mark.parametrize("fsdp", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_xl_on_256_devices_is_cut_where_a_dimension_divides(kind, fsdp, tensor):
    if fsdp * tensor > 256:
        pytest.skip("more than 256 devices")
    mesh = AbstractMesh((256 // fsdp // tensor, fsdp, tensor, 1), AXES)
    shardings = parameter_shardings(XL[kind], mesh)
    leaves = jax.tree_util.tree_flatten_with_path(XL[kind])[0]
    largest = 0
    for (path, leaf), laid in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shard = laid.shard_shape(leaf.shape)  # raises where a dimension is not divided
        rule = sharding.parameter_rule(sharding.path_of(path))
        parts = (fsdp if rule.fsdp else 1) * (tensor if rule.tensor is not None else 1)
        assert np.prod(shard) * parts == np.prod(leaf.shape), path
        largest = max(largest, np.prod(shard) * (parts == 1))
    # What every device has whole is small.
    assert largest < 28 * 2 * 5760 * 9


def test_xl_over_256_parts_says_which_mesh_would_fit():
    mesh = AbstractMesh((1, 256, 1, 1), AXES)
    with pytest.raises(UserError) as raised:
        parameter_shardings(XL["dydila"], mesh)
    message = str(raised.value)
    assert "mesh.fsdp 256 does not divide" in message
    assert "mesh.fsdp=128, mesh.tensor=1 and mesh.data=2 would fit" in message
    assert "\n" not in message
    # A dimension of 6 x 1152 takes 256 parts: the rule goes past one that does not.
    spec = parameter_spec("blocks/modulation/linear/kernel", (28, 1152, 6912), {"fsdp": 256})
    assert spec == P(None, None, "fsdp")


def test_known_parameters_are_cut_as_megatron_does():
    axes = {"fsdp": 2, "tensor": 2}

    def spec(path):
        return parameter_spec(path, dict(paths(tiny_config().model))[path], axes)

    assert spec("blocks/attention/qkv/kernel") == P(None, "fsdp", None, "tensor")
    assert spec("blocks/attention/query_bank/kernel") == P(None, None, "fsdp", "tensor")
    assert spec("blocks/attention/out/kernel") == P(None, "tensor", "fsdp")
    assert spec("blocks/feedforward/hidden/kernel") == P(None, "fsdp", "tensor")
    assert spec("blocks/feedforward/out/kernel") == P(None, "tensor", "fsdp")
    assert spec("label_embed/table/embedding") == P(None, "fsdp")
    assert spec("blocks/attention/exponents/routers") == P()


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({"data": -1, "fsdp": 1}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1, 1)),
        ({"data": -1, "tensor": 8}, (1, 1, 8, 1)),
        ({"data": 1, "tensor": 2, "sequence": -1}, (1, 1, 2, 4)),
    ],
)
def test_mesh_takes_all_devices(axes, shape):
    mesh = make_mesh(MeshConfig(**axes))
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence")
    assert {device.id for device in mesh.devices.flat} == {d.id for d in jax.devices()}


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 3},
        {"fsdp": 3},
        {"fsdp": -1},
        {"data": 0},
        {"fsdp": 0},
        {"data": 16},
        {"data": -2, "fsdp": -4},
        {"data": -2},
        {"tensor": 16},
        {"sequence": 5},
        {"data": 8, "sequence": 0},
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(axes):
    with pytest.raises(UserError, match="mesh") as raised:
        make_mesh(MeshConfig(**axes))
    assert "\n" not in str(raised.value)


class FakeDevice(NamedTuple):
    """What mesh_utils reads of a TPU."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def process_index(self):
        return self.id // 4


def two_slices() -> list[FakeDevice]:
    """Two slices of 2 x 2 x 2 chips, in an order that mixes them."""
    places = list(itertools.product(range(2), range(2), range(2)))
    devices = [
        FakeDevice(8 * part + i, part, place) for part in range(2) for i, place in enumerate(places)
    ]
    return devices[::2] + devices[1::2]


@pytest.mark.parametrize("sizes", [(2, 8, 1, 1), (4, 2, 2, 1), (16, 1, 1, 1), (2, 2, 1, 4)])
def test_data_is_outermost_over_slices(sizes):
    devices = two_slices()
    assert sharding.slice_count(devices) == 2
    grid = sharding.arrange(devices, dict(zip(AXES, sizes, strict=True)), 2)
    assert grid.shape == sizes
    assert len({device.id for device in grid.flat}) == 16
    for i, part in enumerate(grid):
        assert {device.slice_index for device in part.flat} == {i // (sizes[0] // 2)}


def test_parameters_are_not_cut_over_slices():
    with pytest.raises(UserError, match=r"mesh.data 1 is not a multiple of 2 slices"):
        axis_sizes(MeshConfig(data=1, fsdp=16), 16, slices=2)
    assert axis_sizes(MeshConfig(fsdp=4), 16, slices=2)["data"] == 4


def test_a_batch_that_devices_do_not_divide_is_an_error():
    mesh = mesh_of(2, 4)
    check_batch(16, mesh)
    # The devices of the other axes have the same part.
    check_batch(2, mesh_of(2, 1, 2, 2))
    with pytest.raises(UserError, match=r"data.batch_size 12 is not divisible by 8 devices"):
        check_batch(12, mesh)


def test_an_accumulation_that_does_not_divide_is_an_error():
    mesh = mesh_of(2, 4)
    check_batch(64, mesh, 4)
    message = r"accumulation_steps 3 does not divide the 8 images .* next smaller that does, 2"
    with pytest.raises(UserError, match=message):
        check_batch(64, mesh, 3)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 8}, "mesh.tensor 8 does not divide model.attention.heads 2.* can be 1, 2"),
        ({"sequence": 4}, "mesh.sequence 4 does not divide the 2 rows of tokens .* can be 1, 2"),
        ({"fsdp": 8, "data": 1}, "mesh.fsdp 8 does not divide 12 .*fsdp=4, .* mesh.data=2 would"),
    ],
)
def test_a_mesh_that_does_not_fit_the_network_is_refused_before_a_file_is_written(
    tmp_path, axes, message
):
    config = tiny_config(model={"width": 12}, mesh=axes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
