"""Low-precision computation, accumulation, rematerialisation, donated memory."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.models.linear import affine
from dydilit_jax.training.loop import load_data
from dydilit_jax.training.memory import activation_bytes
from dydilit_jax.training.sharding import to_mesh
from dydilit_jax.training.state import Network
from dydilit_jax.training.step import StepKeys, accumulated, compile_step, training_loss
from tests.tiny import (
    mesh_of,
    plain_config,
    random_parameters,
    random_state,
    state_arrays,
    tiny_config,
    to_numpy,
)

BATCH = 32


def one_batch(config):
    return next(load_data(config)[1])


def gradients_of(config, parts=1, mesh=(1,)):
    """Gradients and metrics of one batch of 32, in so many parts, over a mesh."""
    network, mesh = Network.create(config), mesh_of(*mesh)
    batch = to_mesh(one_batch(config), mesh)

    def whole(parameters, batch, keys):
        return jax.grad(lambda p: training_loss(network, p, batch, keys), has_aux=True)(parameters)

    def compute(parameters, batch, key):
        return accumulated(whole, parts)(parameters, batch, StepKeys.create(key, BATCH))

    with jax.set_mesh(mesh):
        gradients, metrics = jax.jit(compute)(random_parameters(network), batch, jax.random.key(3))
    return to_numpy(gradients), to_numpy(metrics)


@pytest.fixture(scope="module")
def whole_batch():
    return gradients_of(tiny_config(data={"batch_size": BATCH}))


def test_accumulated_gradients_are_those_of_the_whole_batch(whole_batch):
    # Each of four parts lies over all eight devices.
    gradients, metrics = gradients_of(tiny_config(data={"batch_size": BATCH}), 4, (2, 4))
    for name, value in whole_batch[0].items():
        scale = np.abs(value).max()
        assert scale > 0, name
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=2e-4 * scale, err_msg=name)
    assert metrics.keys() == whole_batch[1].keys()
    for name, value in whole_batch[1].items():
        if name != "load_balance":
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_a_step_in_parts_is_a_step():
    ends = []
    for parts in (1, 4):
        config = plain_config(
            data={"batch_size": BATCH}, optimizer={"accumulation_steps": parts, "eps": 1e-2}
        )
        network, mesh = Network.create(config), mesh_of(1)
        state = random_state(network, mesh)
        state, metrics = compile_step(network, mesh)(state, to_mesh(one_batch(config), mesh))
        ends.append((state_arrays(state), to_numpy(metrics)))
    for one, other in zip(*ends, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(other[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("policy", "scan"), [("dots", True), ("full", True), ("offload", True)])
def test_rematerialisation_changes_no_gradient(whole_batch, policy, scan):
    model = {"rematerialisation": policy, "scan_layers": scan}
    gradients, _ = gradients_of(tiny_config(data={"batch_size": BATCH}, model=model))
    for name, value in whole_batch[0].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=2e-4 * scale, err_msg=name)


def test_each_policy_keeps_less():
    sizes = {}
    for policy in ("none", "dots", "full"):
        config = tiny_config(model={"rematerialisation": policy, "patch_size": 1, "depth": 4})
        network = Network.create(config)
        batch = {name: jnp.asarray(value) for name, value in one_batch(config).items()}

        def kept(parameters, network=network, batch=batch):
            def loss(parameters):
                return training_loss(network, parameters, batch, jax.random.key(0))[0]

            return jax.vjp(loss, parameters)[1]

        pullback = jax.eval_shape(kept, random_parameters(network))
        sizes[policy] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))
    assert sizes["none"] > 1.5 * sizes["dots"]
    assert sizes["dots"] > 1.5 * sizes["full"]


def bytes_put_into_the_host(jaxpr):
    """What a program moves into the host's memory, loops times their trips."""
    moved = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        moved += times * sum(
            map(bytes_put_into_the_host, jax.extend.core.jaxprs_in_params(equation.params))
        )
        if equation.primitive.name == "device_put":
            moved += sum(
                each.aval.size * each.aval.dtype.itemsize
                for each in equation.outvars
                if "ost" in str(each.aval.memory_space)
            )
    return moved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan", [True, False])
def test_what_dots_keeps_is_put_into_the_hosts_memory(dtype, scan):
    model = {"rematerialisation": "offload", "dtype": dtype, "scan_layers": scan}
    config = tiny_config(model=model)
    network, batch = Network.create(config), one_batch(config)
    program = jax.make_jaxpr(
        jax.grad(lambda p: training_loss(network, p, batch, jax.random.key(0))[0])
    )(random_parameters(network))
    _, _, host = activation_bytes(network, config.data.batch_size)
    # The estimate takes the biases off that `full` keeps of unrolled layers.
    assert host > 0
    assert bytes_put_into_the_host(program.jaxpr) == pytest.approx(host, rel=0.02)


def is_bfloat16(array):
    return np.all(np.asarray(jnp.asarray(array).astype(jnp.bfloat16), np.float32) == array)


def test_affine_keeps_the_weights_gradients_in_float32():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(4, 50, 24)), jnp.bfloat16) for _ in range(2))
    dy = jnp.concatenate([dy, dy], axis=-1).reshape(4, 50, 2, 24)
    kernel = rng.normal(size=(24, 2, 24)).astype(np.float32)
    bias = rng.normal(size=(2, 24)).astype(np.float32)
    y, pullback = jax.vjp(affine, x, kernel, bias)
    dx, dkernel, dbias = pullback(dy)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    np.testing.assert_allclose(dkernel, np.einsum("bnd,bnce->dce", x64, dy64), atol=1e-4)
    np.testing.assert_allclose(dbias, dy64.sum((0, 1)), atol=1e-4)
    rounded = np.asarray(jnp.asarray(kernel).astype(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(
        np.asarray(dx, np.float64), np.einsum("bnce,dce->bnd", dy64, rounded), atol=0.2
    )
    assert not is_bfloat16(dkernel)
    assert not is_bfloat16(dbias)


def gradients_in_bfloat16(**model):
    attention = {"normalizer": "rms", "exponents": 1}
    model = {"dtype": "bfloat16", "attention": attention, **model}
    return gradients_of(tiny_config(data={"batch_size": BATCH}, model=model))


@pytest.fixture(scope="module")
def in_bfloat16():
    return gradients_in_bfloat16()


def test_dots_changes_no_gradient_in_bfloat16(in_bfloat16):
    gradients, _ = gradients_in_bfloat16(rematerialisation="dots")
    for name, value in in_bfloat16[0].items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(gradients[name], value, rtol=0, atol=2e-2 * scale, err_msg=name)


def test_a_network_in_bfloat16_has_gradients_that_are_not_rounded_to_it(in_bfloat16):
    # What is added up over devices and microbatches would be rounded by each of them.
    gradients, metrics = in_bfloat16
    assert np.isfinite(metrics["loss"])
    for name, value in gradients.items():
        assert value.dtype == np.float32, name
        if value.size > 16:
            assert not is_bfloat16(value), name


def test_an_unknown_moment_dtype_is_an_error():
    with pytest.raises(UserError, match="unknown moment dtype 'bfloat17': did you mean"):
        plain_config(optimizer={"mu_dtype": "bfloat17"})


def test_a_step_takes_over_the_memory_of_its_state_and_keeps_its_dtypes():
    config = plain_config(optimizer={"mu_dtype": "bfloat16"})
    network, mesh = Network.create(config), mesh_of(2, 4)
    state = random_state(network, mesh)
    addresses = {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(state.parameters)
        for shard in leaf.addressable_shards
    }
    given = jax.tree.leaves(dataclasses.replace(state, key=state.step))
    new, metrics = compile_step(network, mesh)(state, to_mesh(one_batch(config), mesh))
    assert np.isfinite(metrics["loss"])
    moments = new.optimizer[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(new.parameters)} == {jnp.dtype("float32")}
    assert all(leaf.is_deleted() for leaf in given if leaf.size > 1)
    reused = {
        shard.data.unsafe_buffer_pointer()
        for leaf in jax.tree.leaves(new.parameters)
        for shard in leaf.addressable_shards
    }
    assert len(reused & addresses) > 0.5 * len(addresses)
