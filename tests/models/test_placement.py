"""Weights that are gathered where they are used, and what their gradients send."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.models.attention.dydila import ProjectorBank
from dydilit_jax.models.config import AttentionConfig, ModelConfig
from dydilit_jax.training import hlo
from dydilit_jax.training.collectives import collectives
from dydilit_jax.training.sharding import parameter_spec
from tests.tiny import mesh_of

BATCH, TOKENS, WIDTH, BANKS = 8, 40, 32, 3
# data, fsdp, tensor, sequence.
MESHES = [(2, 4), (2, 2, 2), (1, 4, 1, 2), (8, 1)]
NO_WHOLE_TILES = (1, 8)  # 4 rows of a bank a device


def arrays():
    """Bank, router, tokens, and the gradient of the projected tokens."""
    rng = np.random.default_rng(0)
    shapes = [(BANKS, WIDTH, WIDTH), (WIDTH, BANKS), *[(BATCH, TOKENS, WIDTH)] * 2]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def loss(bank, router, x, dy):
    """Of a ProjectorBank, linear in the bank."""
    attention = AttentionConfig(heads=2, projectors=BANKS, router_training="switch")
    config = ModelConfig(width=WIDTH, depth=1, attention=attention)
    graph, _ = nnx.split(nnx.eval_shape(lambda: ProjectorBank(config, rngs=nnx.Rngs(0))))
    module = nnx.merge(graph, {"kernel": bank, "router": router})
    return jnp.sum(module(x, None)[0] * dy)


@functools.cache
def compiled(mesh):
    """Loss and gradient of the bank, which is cut as the trainer cuts it, over the mesh."""
    spec = parameter_spec("blocks/attention/query_bank/kernel", (1, *arrays()[0].shape), mesh.shape)
    cut = NamedSharding(mesh, P(*spec[1:]))
    tokens = NamedSharding(mesh, P(("data", "fsdp"), "sequence"))
    shardings = (cut, NamedSharding(mesh, P()), tokens, tokens)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss), in_shardings=shardings, out_shardings=(shardings[1], cut)
        )
        return step.lower(*arrays()).compile(), shardings


@pytest.mark.parametrize("axes", [*MESHES, NO_WHOLE_TILES])
def test_a_banks_gradient_is_the_sum_over_all_tokens(axes):
    """In float64: dW_j = sum over tokens i routed to j of p_ij x_i^T dy_i."""
    step, shardings = compiled(mesh_of(*axes))
    value, gradient = step(*map(jax.device_put, arrays(), shardings))
    bank, router, x, dy = (each.astype(np.float64) for each in arrays())
    logits = x @ router
    routed = np.arange(BANKS) == logits.argmax(-1)[..., None]
    weights = routed * np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("btn,btd,bte->nde", weights, x, dy)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert value == pytest.approx(np.sum(bank * expected), rel=1e-4)


@pytest.mark.parametrize("axes", MESHES)
def test_a_banks_gradient_is_scattered_over_fsdp_and_the_parts_are_summed(axes):
    mesh = mesh_of(*axes)
    module = hlo.parse(compiled(mesh)[0].as_text())
    found = collectives(module, hlo.schedule(module), mesh.shape)
    sent = {(each.kind, each.axes): each.bytes for each in found}
    whole = arrays()[0].nbytes // mesh.shape["tensor"]
    part = whole // mesh.shape["fsdp"]
    expected: dict[tuple[str, tuple[str, ...]], int] = {}
    if mesh.shape["fsdp"] > 1:
        expected = {("all-gather", ("fsdp",)): part, ("reduce-scatter", ("fsdp",)): whole}
    if others := tuple(axis for axis in ("data", "sequence") if mesh.shape[axis] > 1):
        expected["all-reduce", others] = part
    large = {key: size for key, size in sent.items() if size >= part}
    assert large == pytest.approx(expected, abs=4)  # The loss may be summed along with a part.
    assert sum(each.bytes for each in found) == pytest.approx(sum(expected.values()), abs=8)


def test_a_gathered_bank_is_not_kept_for_the_backward_pass():
    mesh = mesh_of(2, 4)
    with jax.set_mesh(mesh):
        pullback = jax.eval_shape(lambda *given: jax.vjp(loss, *given)[1], *arrays())
    shapes = [leaf.shape for leaf in jax.tree.leaves(pullback)]
    bank = arrays()[0]
    large = [each for each in shapes if np.prod(each) >= bank.size and each[0] != BATCH]
    assert large == [bank.shape]


def test_parts_of_no_whole_tiles_are_summed_whole():
    mesh = mesh_of(*NO_WHOLE_TILES)
    module = hlo.parse(compiled(mesh)[0].as_text())
    found = collectives(module, hlo.schedule(module), mesh.shape)
    sent = {(each.kind, each.axes): each.bytes for each in found}
    assert ("reduce-scatter", ("fsdp",)) not in sent
    assert sent["all-reduce", ("fsdp",)] >= arrays()[0].nbytes
