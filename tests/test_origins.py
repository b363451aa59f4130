"""Which of default, config file, argument and flag a field's value is from."""

import dataclasses

import pytest

from dydilit_jax.config import Config
from dydilit_jax.origins import Origin, field_origins

FILE = """
from dydilit_jax.config import parse_argument

def get_config(argument=""):
    choice = parse_argument(argument, size="8", steps="10")
    return {
        "seed": 0,
        "model": {"width": 64, "image_size": int(choice["size"])},
        "train": {"steps": int(choice["steps"]), "log_every": 5},
    }
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(FILE)
    return str(file)


def config_of(**fields):
    """What the file returns, with `section__field` over it."""
    values = {"model": {"width": 64, "image_size": 8}, "train": {"steps": 10, "log_every": 5}}
    for name, value in fields.items():
        section, field = name.split("__")
        values.setdefault(section, {})[field] = value
    return Config.from_dict(values)


def test_the_last_layer_that_changed_a_field_is_its_origin(path):
    config = config_of(model__image_size=16, train__steps=10, train__log_every=7, mesh__fsdp=1)
    overrides = {"train.log_every": 7, "mesh.fsdp": 1}
    origins = field_origins(config, f"{path}:size=16,steps=10", overrides)
    assert origins["model.width"] == Origin("file", "default", 384)
    assert origins["model.image_size"] == Origin("argument", "file", 8)
    # The argument repeats what the file has without it, and the file what the dataclass has.
    assert origins["train.steps"] == Origin("file", "default", 400_000)
    assert origins["seed"] == Origin("default")
    assert origins["train.log_every"] == Origin("flag", "file", 5)
    # A flag is one also where it changes nothing.
    assert origins["mesh.fsdp"] == Origin("flag", "default", 1)
    assert origins["data.batch_size"] == Origin("default")
    assert list(origins) == list(field_origins(config, path, {}))


def test_an_argument_that_returns_to_the_default_is_an_argument(path):
    config = config_of(model__image_size=32)
    origins = field_origins(config, f"{path}:size=32", {})
    assert origins["model.image_size"] == Origin("argument", "file", 8)


def test_a_flag_over_an_argument_names_the_argument(path):
    config = config_of(model__image_size=4)
    origins = field_origins(config, f"{path}:size=16", {"model.image_size": 4})
    assert origins["model.image_size"] == Origin("flag", "argument", 16)


def test_a_section_that_a_flag_gives_is_flags_of_its_fields(path):
    config = config_of(mesh__fsdp=2)
    origins = field_origins(config, path, {"mesh": {"fsdp": 2}})
    assert origins["mesh.fsdp"] == Origin("flag", "default", 1)
    assert origins["mesh.data"] == Origin("default")


def test_a_file_that_needs_its_argument_is_not_taken_apart(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("def get_config(size):\n    return {'model': {'width': int(size)}}\n")
    config = Config(model=dataclasses.replace(Config().model, width=64))
    origins = field_origins(config, f"{path}:64", {})
    assert origins["model.width"] == Origin("file/argument", "default", 384)
    assert origins["model.depth"] == Origin("default")
