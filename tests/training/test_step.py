"""A step on eight devices against the same step on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.data.load import load_data
from dydilit_jax.models.config import ATTENTIONS
from dydilit_jax.training.loop import to_mesh
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.sharding import make_mesh, path_of
from dydilit_jax.training.state import Network, create_state, initial_state
from dydilit_jax.training.step import compile_step, drop_labels, make_step
from tests.tiny import (
    full_config,
    mesh_of,
    plain_config,
    random_parameters,
    random_state,
    state_arrays,
    tiny_config,
    to_numpy,
)

STEPS = 5
# data, fsdp, tensor, sequence
MESHES = {
    "one": (1, 1, 1, 1),
    "data": (8, 1, 1, 1),
    "fsdp": (1, 8, 1, 1),
    "tensor": (1, 1, 8, 1),
    "sequence": (1, 1, 1, 8),
    "all": (1, 2, 2, 2),
}
# Eight heads and eight rows of tokens: each axis can take all devices.
CONFIG = full_config(model={"patch_size": 1, "attention": {"heads": 8}})


@pytest.fixture(scope="module")
def histories():
    """For each mesh: states before and after every step as numpy, metrics, and the last state.

    All in float64: a router near a tie may choose otherwise by float32's rounding, which differs
    between meshes, and a choice is not a rounding error.
    """
    with jax.enable_x64(True):
        return _histories()


def in_float64(leaf):
    return leaf.astype(np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _histories():
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="float64"))
    network = Network.create(config)
    _, batches = load_data(CONFIG)
    steps = [
        {name: np.asarray(value, np.float64 if name == "image" else None) for name, value in b}
        for b in (next(batches).items() for _ in range(STEPS))
    ]
    result = {}
    for name, sizes in MESHES.items():
        mesh = mesh_of(*sizes)
        state = jax.tree.map(in_float64, random_state(network, mesh, seed=1))
        train_step = compile_step(network, mesh)
        states, metrics = [state_arrays(state)], []
        for batch in steps:
            state, measured = train_step(state, to_mesh(batch, mesh))
            states.append(state_arrays(state))
            metrics.append(to_numpy(measured))
        result[name] = (states, metrics, state)
    return result


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != "one"])
def test_eight_devices_compute_what_one_does(histories, mesh):
    states, metrics, _ = histories[mesh]
    one_states, one_metrics, _ = histories["one"]
    losses = [float(step["loss"]) for step in metrics]
    np.testing.assert_allclose(losses, [float(s["loss"]) for s in one_metrics], rtol=1e-6)
    assert len(set(losses)) == STEPS
    assert metrics[0].keys() == one_metrics[0].keys()
    for name, value in metrics[-1].items():
        np.testing.assert_allclose(value, one_metrics[-1][name], rtol=1e-5, atol=1e-9, err_msg=name)
    for name, value in states[-1].items():
        np.testing.assert_allclose(value, one_states[-1][name], rtol=0, atol=1e-7, err_msg=name)


def test_every_parameter_is_moved_by_far_more_than_that_tolerance(histories):
    states, _, _ = histories["one"]
    for name, value in states[-1].items():
        if name.startswith("parameters/"):
            assert np.max(np.abs(value - states[0][name])) > 1e-4, name


def test_parameters_moments_and_average_are_cut_alike(histories):
    _, _, state = histories["all"]
    moments = [state.optimizer[1][0].mu, state.optimizer[1][0].nu, state.ema.ema]
    leaves = jax.tree_util.tree_flatten_with_path(state.parameters)[0]
    cut = 0
    for path, parameter in leaves:
        others = [_at(tree, path) for tree in moments]
        for other in others:
            assert other.shape == parameter.shape
            assert other.sharding.is_equivalent_to(parameter.sharding, parameter.ndim)
        for array in (parameter, *others):
            shards = {shard.data.shape for shard in array.addressable_shards}
            assert len(shards) == 1
            part = np.prod(shards.pop())
            assert len(array.addressable_shards) == 8
            if parameter.sharding.is_fully_replicated:
                assert part == parameter.size
            else:
                # fsdp and tensor cut into two each; the other axes copy.
                names = [name for name in jax.tree.leaves(tuple(parameter.sharding.spec)) if name]
                assert set(names) <= {"fsdp", "tensor"}
                assert part * 2 ** len(names) == parameter.size
        cut += 0 if parameter.sharding.is_fully_replicated else parameter.size
    assert cut > 0.7 * sum(parameter.size for _, parameter in leaves)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_batch_is_cut_over_all_devices():
    mesh = mesh_of(2, 4)
    _, batches = load_data(CONFIG)
    batch = next(batches)
    placed = to_mesh(batch, mesh)
    assert {shard.data.shape for shard in placed["image"].addressable_shards} == {(2, 8, 8, 1)}
    np.testing.assert_array_equal(placed["image"], batch["image"])
    np.testing.assert_array_equal(placed["label"], batch["label"])


def test_average_is_the_bias_corrected_mean_of_the_parameters(histories):
    states, _, state = histories["one"]
    decay = CONFIG.optimizer.ema_decay
    averages = to_numpy(ema_parameters(state.ema, CONFIG.optimizer))
    for name, average in averages.items():
        total, weights = np.zeros(average.shape), 0.0
        for i in range(1, STEPS + 1):
            weight = decay ** (STEPS - i)
            total += weight * states[i][f"parameters/{name}"].astype(np.float64)
            weights += weight
        np.testing.assert_allclose(average, total / weights, rtol=1e-5, atol=1e-6, err_msg=name)


def test_step_counts_and_keeps_its_key(histories):
    states, metrics, _ = histories["all"]
    assert [int(state["step"]) for state in states] == list(range(STEPS + 1))
    np.testing.assert_array_equal(states[0]["key"], states[-1]["key"])
    assert all(metric["gradient_norm"] > 0 for metric in metrics)


def test_steps_draw_different_noise_and_a_step_always_the_same():
    config = plain_config(optimizer={"learning_rate": 0.0})
    network, mesh = Network.create(config), mesh_of(1)
    _, batches = load_data(config)
    batch = to_mesh(next(batches), mesh)
    train_step = compile_step(network, mesh)
    losses = []
    for _ in range(2):
        state = random_state(network, mesh)
        for _ in range(2):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))
    assert losses[:2] == losses[2:]
    assert losses[0] != losses[1]


def test_states_are_created_alike_on_any_mesh():
    config = plain_config()
    network = Network.create(config)
    one = state_arrays(create_state(network, mesh_of(1)))
    state = create_state(network, mesh_of(2, 4))
    for name, value in state_arrays(state).items():
        np.testing.assert_allclose(value, one[name], rtol=1e-6, atol=1e-7, err_msg=name)
    kernel = state.parameters["patch_embed"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16, 4)
    assert float(np.std(kernel)) > 0


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_state_comes_out_of_a_step_as_it_goes_in(kind):
    # Shapes, dtypes or weak types that differ would have the second step compiled again.
    config = tiny_config(model={"attention": {"kind": kind}})
    network = Network.create(config)
    before = jax.eval_shape(lambda: initial_state(network, jax.random.key(0)))
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 1), np.float32),
        "label": jax.ShapeDtypeStruct((16,), np.int32),
    }
    after, _ = jax.eval_shape(make_step(network), before, batch)
    paths, others = (jax.tree_util.tree_flatten_with_path(each)[0] for each in (before, after))
    for (path, one), (other_path, other) in zip(paths, others, strict=True):
        where = path_of(path)
        assert where == path_of(other_path)
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
        assert one.weak_type == other.weak_type, where


def test_average_before_the_first_step_is_finite():
    config = plain_config()
    network = Network.create(config)
    state = random_state(network, make_mesh(config.mesh))
    for value in to_numpy(ema_parameters(state.ema, config.optimizer)).values():
        assert np.all(np.isfinite(value))


def test_labels_are_dropped_in_their_share():
    labels = jnp.arange(20_000) % 10
    dropped = np.asarray(drop_labels(labels, jax.random.key(0), 0.1, 10))
    gone = dropped == 10
    assert abs(gone.mean() - 0.1) < 0.01
    np.testing.assert_array_equal(dropped[~gone], labels[~gone])
    kept = np.asarray(drop_labels(labels, jax.random.key(0), 0.0, 10))
    np.testing.assert_array_equal(kept, labels)


def test_random_parameters_are_all_different_from_zero():
    for name, value in to_numpy(random_parameters(Network.create(CONFIG))).items():
        assert np.all(value != 0), name
