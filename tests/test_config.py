"""Fields, their checks, and the ways a config travels."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from dydilit_jax.cli import required
from dydilit_jax.config import (
    Config,
    MeshConfig,
    TrainConfig,
    differing_fields,
    feedforward_for,
    flatten,
    parse_argument,
)
from dydilit_jax.errors import UserError, unknown_name
from tests.tiny import full_config, plain_config, tiny_config


@pytest.mark.parametrize("config", [Config(), tiny_config(), plain_config(), full_config()])
def test_a_config_survives_its_journeys(config):
    assert Config.from_json(config.to_json()) == config
    assert Config.from_dict(config.to_dict()) == config
    assert isinstance(config.to_dict(), ConfigDict)
    assert json.loads(config.to_json()) == dataclasses.asdict(config)
    assert hash(Config.from_json(config.to_json())) == hash(config)


def test_missing_fields_take_their_defaults():
    config = Config.from_dict({"train": {"steps": 5}})
    assert config == Config(train=TrainConfig(steps=5))
    assert Config.from_dict({}) == Config()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"train": {"stepz": 5}},
            r"unknown config field 'train.stepz': did you mean 'train.steps'",
        ),
        ({"sed": 5}, r"unknown config field 'sed': did you mean 'seed'"),
        ({"model": {"attention": {"head": 2}}}, r"did you mean 'model.attention.heads'"),
        ({"qqqq": 5}, r"unknown config field 'qqqq'\. Known: seed, model, "),
        ({"train": {"steps": "5"}}, r"train.steps expects int, got '5'"),
        ({"train": {"steps": 5.0}}, r"train.steps expects int, got 5.0"),
        ({"train": {"steps": True}}, r"train.steps expects int, got True"),
        ({"train": {"steps": None}}, r"train.steps expects int, got None"),
        ({"optimizer": {"b1": "x"}}, r"optimizer.b1 expects float, got 'x'"),
        ({"optimizer": {"b1": True}}, r"optimizer.b1 expects float, got True"),
        ({"data": {"source": 3}}, r"data.source expects str, got 3"),
        ({"data": {"horizontal_flip": 1}}, r"data.horizontal_flip expects bool, got 1"),
        ({"train": 5}, r"train must be a section of fields, got 5"),
        ({"train": {"steps": 0}}, r"train.steps must be at least 1, got 0"),
        ({"data": {"batch_size": 0}}, r"data.batch_size must be at least 1"),
        ({"optimizer": {"learning_rate": -1.0}}, r"learning_rate must be at least 0"),
        ({"optimizer": {"ema_decay": 1.0}}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"optimizer": {"schedule": "cosin"}}, r"'cosin': did you mean 'cosine'"),
        ({"optimizer": {"learning_rate": float("nan")}}, r"learning_rate must be finite, got nan"),
        ({"optimizer": {"clip_norm": float("inf")}}, r"optimizer.clip_norm must be finite"),
        ({"evaluation": {"num": 1}}, r"evaluation.num must be 0, or at least 2"),
        ({"seed": -1}, r"seed must be at least 0"),
        ({"model": {"width": 18}}, r"model.width 18 is not divisible by model.attention.heads 4"),
        ({"model": {"patch_size": 5}}, r"model.image_size 32 is not divisible by"),
        ({"model": {"attention": {"kind": "x"}}}, r"Known: dydila, relu, focused, softmax"),
        ({"diffusion": {"flow": {"shift": 0.0}}}, r"shift must be above 0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(UserError, match=message) as error:
        Config.from_dict(fields)
    assert "\n" not in str(error.value)


def test_whole_numbers_serve_as_fractions():
    config = Config.from_dict({"optimizer": {"learning_rate": 1}})
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)


def test_fields_that_make_two_runs_different():
    old = tiny_config()
    new = tiny_config(
        seed=1,
        model={"attention": {"heads": 4}},
        data={"read_threads": 5, "batch_size": 32},
        train={"steps": 100, "log_every": 7},
        mesh={"fsdp": 2},
        sampling={"steps": 9},
        evaluation={"num": 10},
    )
    assert differing_fields(old, new) == [
        "data.batch_size: 16 -> 32",
        "model.attention.heads: 2 -> 4",
        "seed: 0 -> 1",
    ]
    assert differing_fields(old, old) == []


def test_flatten():
    assert flatten({"a": 1, "b": {"c": 2, "d": {"e": 3}}}) == {"a": 1, "b.c": 2, "b.d.e": 3}
    flat = flatten(dataclasses.asdict(Config()))
    assert flat["mesh.data"] == MeshConfig().data
    assert flat["model.attention.kind"] == "dydila"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("", {"size": "tiny", "attention": "dydila"}),
        ("size=S", {"size": "S", "attention": "dydila"}),
        ("attention=relu, size=XL", {"size": "XL", "attention": "relu"}),
        ("size=S,size=B,", {"size": "B", "attention": "dydila"}),
        ("size=a=b", {"size": "a=b", "attention": "dydila"}),
    ],
)
def test_arguments(argument, expected):
    assert parse_argument(argument, size="tiny", attention="dydila") == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sise=S", "unknown config argument 'sise': did you mean 'size'"),
        ("zzz=S", r"unknown config argument 'zzz'\. Known: size, attention"),
        ("siz", r"'siz' has the form name=value; did you mean size=...\?"),
        ("relu", "'relu' has the form name=value; known: size, attention"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(argument, message):
    with pytest.raises(UserError, match=message):
        parse_argument(argument, size="tiny", attention="dydila")


def test_feedforward_that_goes_with_an_attention():
    assert feedforward_for("softmax", "auto") == "mlp"
    assert feedforward_for("dydila", "auto") == "mix"
    assert feedforward_for("softmax", "mix") == "mix"
    with pytest.raises(UserError, match="unknown feed-forward 'mux': did you mean 'mix'"):
        feedforward_for("dydila", "mux")


def test_unknown_names_and_missing_flags():
    assert "did you mean 'euler'" in str(unknown_name("sampler", "eulr", ["ddim", "euler"]))
    assert str(unknown_name("x", "qqq", ["a", "b"])) == "unknown x 'qqq'. Known: a, b."
    assert required("runs", "workdir") == "runs"
    for nothing in ("", None):
        with pytest.raises(UserError, match="--workdir is missing"):
            required(nothing, "workdir")
