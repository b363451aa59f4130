"""Workdirs and checkpoints."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.training.checkpoint import (
    Checkpointer,
    has_checkpoint,
    load_config,
    open_workdir,
)
from dydilit_jax.training.loop import train
from dydilit_jax.training.state import Network, abstract_state
from tests.tiny import mesh_of, plain_config, random_state, state_arrays

CONFIG = plain_config(train={"steps": 2}, optimizer={"clip_norm": 1.0})


@pytest.fixture
def network():
    return Network.create(CONFIG)


def test_what_is_saved_is_restored_on_another_mesh(tmp_path, network):
    open_workdir(tmp_path, CONFIG)
    state = random_state(network, mesh_of(2, 4), seed=3)
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(state, {"position": 7})
    checkpointer.close()
    for mesh in (mesh_of(2, 4), mesh_of(1), mesh_of(4, 2)):
        abstract = abstract_state(network, mesh)
        restored, position = Checkpointer(tmp_path).restore(abstract)
        assert position == {"position": 7}
        expected = state_arrays(state)
        arrays = state_arrays(restored)
        assert arrays.keys() == expected.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=name)
        kernel = restored.parameters["patch_embed"]["kernel"]
        assert kernel.sharding.is_equivalent_to(
            abstract.parameters["patch_embed"]["kernel"].sharding, kernel.ndim
        )
        assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    step, ema = Checkpointer(tmp_path).restore_ema(abstract)
    assert step == 0
    for name, value in state_arrays(restored).items():
        if name.startswith("ema/ema/"):
            node = ema.ema
            for part in name.split("/")[2:]:
                node = node[part]
            np.testing.assert_array_equal(node, value)


def test_a_workdir_without_a_finished_checkpoint_has_none(tmp_path):
    assert not has_checkpoint(tmp_path)
    open_workdir(tmp_path, CONFIG)
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    assert not has_checkpoint(tmp_path)
    assert load_config(tmp_path) == CONFIG


def test_a_workdir_of_another_config_is_refused_and_left_alone(tmp_path, network):
    open_workdir(tmp_path, CONFIG)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(random_state(network, mesh_of(1)), {})
    checkpointer.close()
    before = (tmp_path / "config.json").read_text()
    other = plain_config(
        seed=1, model={"width": 32}, optimizer={"learning_rate": 1e-3, "clip_norm": 1.0}
    )
    with pytest.raises(UserError) as error:
        train(other, tmp_path)
    line = str(error.value)
    for part in ("seed: 0 -> 1", "model.width: 16 -> 32", "learning_rate: 0.0001 -> 0.001"):
        assert part in line
    assert "clip_norm" not in line
    assert "\n" not in line
    assert (tmp_path / "config.json").read_text() == before
    # Where and for how long a run goes on may change.
    longer = plain_config(
        train={"steps": 9, "log_every": 3, "keep_checkpoints": 1},
        optimizer={"clip_norm": 1.0},
        mesh={"data": 2, "fsdp": 4},
        sampling={"guidance_scale": 3.0},
        evaluation={"num": 10},
        data={"read_threads": 1},
    )
    open_workdir(tmp_path, longer)
    assert load_config(tmp_path) == longer


def test_a_workdir_without_checkpoints_takes_any_config(tmp_path):
    open_workdir(tmp_path, CONFIG)
    other = plain_config(seed=5)
    open_workdir(tmp_path, other)
    assert load_config(tmp_path) == other


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    # The superuser ignores permission bits, but no one makes a directory below a file.
    file = tmp_path / "file"
    file.write_text("precious")
    for workdir in (file, file / "runs" / "digits", Path("/dev/null/x")):
        with pytest.raises(UserError, match="cannot write workdir") as error:
            train(CONFIG, workdir)
        assert str(workdir) in str(error.value)
        assert "\n" not in str(error.value)
    assert file.read_text() == "precious"


def test_what_is_no_workdir_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is not a workdir"):
        load_config(tmp_path / "missing")
    with pytest.raises(UserError, match="is not a workdir"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1,')
    with pytest.raises(UserError, match="is not valid JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 1, "sede": 2}))
    with pytest.raises(UserError, match="'sede': did you mean 'seed'"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="section of fields"):
        load_config(tmp_path)
