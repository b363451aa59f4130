"""What a step takes of a device, against arrays that exist and what the compiler plans."""

import collections
import dataclasses

import jax
import jax.extend.core
import numpy as np
import pytest

from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.training import memory
from dydilit_jax.training.state import Network
from dydilit_jax.training.step import training_loss
from tests.tiny import (
    full_config,
    mesh_of,
    plain_config,
    random_parameters,
    random_state,
    tiny_config,
)


def bytes_on(device, tree):
    """Of the parts of arrays that lie on a device."""
    return sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == device
    )


def test_state_and_batch_take_what_their_arrays_take():
    network = Network.create(full_config(optimizer={"mu_dtype": "bfloat16"}))
    mesh = mesh_of(2, 4)
    state = random_state(network, mesh)
    batch = memory.abstract_batch(network, mesh)
    estimate = memory.estimate_memory(network, mesh, batch)
    device = jax.devices()[0]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert memory.device_bytes(batch) == 16 // 8 * (8 * 8 * 4 + 4)
    assert estimate.parameters == bytes_on(device, state.parameters)
    assert estimate.parameters < sum(leaf.nbytes for leaf in jax.tree.leaves(state.parameters))
    assert estimate.ema == bytes_on(device, state.ema)
    assert estimate.optimizer == bytes_on(device, state.optimizer)
    # float32 and bfloat16 of as many numbers as parameters, but for counters.
    assert bytes_on(device, moments) == estimate.parameters * 6 // 4
    assert estimate.gradients == estimate.parameters
    assert estimate.host == 0
    parts = dataclasses.asdict(estimate)
    assert estimate.total == sum(parts.values())


def test_the_activations_are_those_that_differentiation_holds():
    """Run step by step, the backward pass's arrays exist: each is counted once by its buffer."""
    network = Network.create(plain_config())
    parameters = jax.tree.map(jax.numpy.asarray, random_parameters(network))
    batch = {
        "image": jax.numpy.ones((16, 8, 8, 1)),
        "label": jax.numpy.arange(16) % 10,
    }
    _, backward, _ = jax.vjp(
        lambda p: training_loss(network, p, batch, jax.random.key(0)), parameters, has_aux=True
    )
    own = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((parameters, batch))}
    held = {}
    for leaf in jax.tree.leaves(backward):
        if isinstance(leaf, jax.Array) and leaf.unsafe_buffer_pointer() not in own:
            held[leaf.unsafe_buffer_pointer()] = leaf.nbytes
    measured = sum(held.values())
    assert memory.saved_activations(network, 16) == pytest.approx(measured, rel=0.02)


def test_rematerialisation_keeps_a_tensor_a_block():
    """`full` keeps a block's input, N x D for an image, and makes the rest of one block again."""

    def activations(depth, policy):
        model = {"depth": depth, "rematerialisation": policy, "scan_layers": True}
        return memory.activation_bytes(Network.create(tiny_config(model=model)), 16)

    tokens, width, images = 4, 16, 16
    (two, again, host), (four, again_of_four, _) = (activations(d, "full") for d in (2, 4))
    assert four - two == 2 * images * tokens * width * 4
    assert host == 0
    everything = [activations(depth, "none")[0] for depth in (2, 4)]
    one_block = (everything[1] - everything[0]) // 2
    assert again == pytest.approx(one_block, rel=0.05)
    assert again_of_four == pytest.approx(one_block, rel=0.05)
    dots = activations(2, "dots")
    assert two < dots[0] < everything[0]
    offload = activations(2, "offload")
    assert offload[0] == two
    assert offload[2] == dots[0] - two


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scan", [True, False])
def test_dots_keeps_what_linear_maps_and_routers_give_in_every_dtype(dtype, scan):
    """Beside a block's input, which `full` keeps too; nothing of the core or of convolutions."""
    images, depth = 16, 2
    model = tiny_config().model
    N, D, hidden = 4, model.width, model.feedforward.hidden(model.width)
    maps = N * (3 * D + 2 * D + D) + N * (2 * hidden + D)  # qkv, projectors, out; Mix-FFN
    modulation = 6 * D
    routers = N * (2 * model.attention.projectors + 4 * model.attention.exponents)
    size = np.dtype(jax.numpy.dtype(dtype)).itemsize
    kept = {}
    for policy in ("dots", "full"):
        changes = {"rematerialisation": policy, "scan_layers": scan, "dtype": dtype}
        network = Network.create(tiny_config(model={"depth": depth, **changes}))
        kept[policy] = memory.saved_activations(network, images)
    expected = depth * images * ((maps + modulation) * size + routers * 4)
    if not scan and dtype == "float32":
        # Layers' biases are cut out of their stack, and `full` keeps those to add them again.
        expected -= depth * 4 * (3 * D + D + 2 * hidden + modulation)
    assert kept["dots"] - kept["full"] == expected


def kernels(jaxpr):
    """Names of the kernels in a program, each as often as it stands there."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params["name"])
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                found += kernels(inner)
    return found


@pytest.mark.parametrize(("policy", "projections"), [("dots", 2), ("full", 4)])
def test_dots_runs_the_core_again_but_no_routed_projection(policy, projections):
    """On a TPU, where both are kernels: one of the core and two projections, of Q' and K'."""
    model = {"rematerialisation": policy, "dtype": "bfloat16", "depth": 1}
    config = tiny_config(model={**model, "width": 128, "image_size": 32, "patch_size": 2})
    network = Network.create(config)
    images = jax.ShapeDtypeStruct((4, 32, 32, 1), np.float32)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((4,), np.int32)}

    def gradients(parameters, batch):
        return jax.grad(lambda p: training_loss(network, p, batch, jax.random.key(0))[0])(
            parameters
        )

    one = jax.sharding.AbstractMesh((1,), ("data",))
    with jax.sharding.use_abstract_mesh(one), tracing_for("tpu"):
        program = jax.make_jaxpr(gradients)(network.abstract_parameters(), batch)
    found = collections.Counter(kernels(program.jaxpr))
    assert found["dydila_forward"] == 2
    assert found["grouped_projection"] == projections
    assert found["grouped_projection_dbank"] == 2


def test_accumulation_keeps_the_images_of_a_part_and_two_sums():
    mesh = mesh_of(2, 1)
    whole, parts = (
        Network.create(plain_config(optimizer={"accumulation_steps": steps})) for steps in (1, 4)
    )
    estimate = [
        memory.estimate_memory(each, mesh, memory.abstract_batch(each, mesh))
        for each in (whole, parts)
    ]
    assert estimate[1].activations == memory.saved_activations(parts, 2)
    assert estimate[0].activations == memory.saved_activations(parts, 8)
    assert estimate[1].gradients == 2 * estimate[1].parameters == 2 * estimate[0].gradients


def test_the_compiler_plans_what_was_counted():
    network, mesh = Network.create(plain_config(data={"batch_size": 256})), mesh_of(2, 4)
    batch = memory.abstract_batch(network, mesh)
    estimate = memory.estimate_memory(network, mesh, batch)
    planned = memory.compiled_memory(network, mesh, batch)
    assert planned is not None
    # The state's step and key come to the parameters, moments and average; all else is counted.
    counted = estimate.parameters + estimate.optimizer + estimate.ema + estimate.batch
    assert planned["arguments"] == counted + 4 + 8
    assert planned["results"] < 1024  # the metrics: the new state lies in the old one's place
    rest = estimate.gradients + estimate.activations
    assert 0.5 * rest < planned["temporary"] < 2 * rest


def test_bytes_are_told_in_their_unit():
    told = [memory.in_bytes(count) for count in (0, 1023, 1024, 3 * 2**19, 5 * 2**40, 2**52)]
    assert told == ["0 B", "1023 B", "1.00 KiB", "1.50 MiB", "5.00 TiB", "4,096.00 TiB"]
    assert memory.nbytes((), jax.random.key(0).dtype) == 8
    assert memory.nbytes((3, 5), np.dtype(np.float16)) == 30
