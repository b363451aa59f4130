"""The DyDiLA core's GPU kernels in programs lowered for CUDA, and what they refuse."""

import contextlib
from types import SimpleNamespace
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice, AbstractMesh

from benchmarks import hbm_bytes, hbm_bytes_gpu
from benchmarks.attention import dydila, relu
from dydilit_jax.kernels.dydila import (
    pallas_gpu,
    pallas_gpu_passes,
)
from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreOptions
from dydilit_jax.kernels.dydila.pallas_gpu_blocks import Cut
from dydilit_jax.kernels.dydila.pallas_gpu_wide import Tiles
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.kernels.sharding import CoreSharding
from dydilit_jax.training.costs import KERNEL_FLOPS
from dydilit_jax.training.hlo import Array
from tests.kernels.test_dydila_gpu import core_inputs, leaves, value_and_gradients


def cuda():
    """What newer JAX wants to know of the GPU that programs are lowered for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu))


@pytest.mark.parametrize(
    ("N", "d", "normalizer", "kernels"),
    [
        (256, 72, "base", 10),
        (300, 64, "base", 10),
        (300, 24, "none", 10),
        (1024, 288, "signed", 12),
        (16384, 576, "base", 12),
    ],
)
def test_lowers_for_cuda(N, d, normalizer, kernels):
    """Six kernels forward, four of them for sums; four backward (wide heads: six)."""
    options = CoreOptions(heads=2, normalizer=normalizer)
    arrays = jax.eval_shape(lambda: leaves(1, d))
    arrays = {
        name: jax.ShapeDtypeStruct((1, N, *x.shape[2:]), x.dtype)
        if x.ndim > 2 or "exponent" in name
        else x
        for name, x in arrays.items()
    }
    with cuda():
        traced = value_and_gradients.trace(pallas_gpu.attention, options, arrays, arrays["value"])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels
    assert f"{N}x{N}" not in text


@pytest.mark.parametrize(("plain", "forward", "backward"), [(False, 10, 17), (True, 4, 7)])
def test_bytes_of_narrow_heads(plain, forward, backward):
    """XL/2's 16 heads: so many activations, the states and scalars, and nothing else."""
    B, N, H, d, padded, n = 64, 1024, 16, 72, 80, 9
    # M or dM is written once in float32 and read in bfloat16, z or dz in float32.
    written, read = (4 * padded * padded + 4 * d) * B * H, (2 * padded * padded + 4 * d) * B * H
    token = 4 * B * N  # one number of each
    den = H * token
    small: dict[str, float] = {"forward": 2 * token + den, "backward": 3 * token + den}
    if not plain:
        sums = 2 * 2 * (1 + 3 + n)  # an exponent read, three sums and the logits written
        of_heads = H * (2 * 3 + 1 + 2 * 2 + 2)  # dc and dlambda twice, dden, dg twice, w and t
        small = {
            "forward": (sums + 2 * 7) * token + den + 4 * 4 * H * d * n,
            "backward": (2 * 2 * 7 + 2 * 6 + 2 * 16 / 2 + of_heads) * token + den,
        }
        small["backward"] += 4 * 4 * B * H * 2 * 64 * 16  # sums of each head's part of dR
        small["backward"] += 2 * 4 * H * 16 * padded  # R
    bounds = {
        "forward": (forward, written + read + small["forward"]),
        "backward": (backward, written + (2 if plain else 4) * read + small["backward"]),
    }
    arrays = hbm_bytes.arrays_on(None, B, N, H, d, not plain)
    attend = relu(H, "pallas_gpu") if plain else dydila("pallas_gpu", H)
    programs = hbm_bytes_gpu.lowered(attend, arrays)
    assert programs.keys() == bounds.keys()
    for name, (activations, rest) in bounds.items():
        moved = hbm_bytes_gpu.moved_bytes(programs[name], B, N, H, d)
        assert moved["activations"] == activations * 2 * B * N * H * d, name
        assert moved["around the kernels"] == 0, name
        assert sum(moved.values()) <= activations * 2 * B * N * H * d + rest, name


@pytest.mark.parametrize(
    ("axis", "local", "sums"), [("data", "2x128x2x64", 0), ("sequence", "4x64x2x64", 2)]
)
def test_lowers_for_cuda_on_a_mesh(axis, local, sums):
    """With gradients, by the mesh in scope: every device gets kernels of its part of the arrays.

    Split tokens: one sum of the states over the axis forward, one backward.
    """
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = AbstractMesh((2,), (axis,), axis_types=auto, abstract_device=gpu)
    options = CoreOptions(heads=2)
    arrays = jax.eval_shape(lambda: leaves(128, 64))
    arrays = {
        name: jax.ShapeDtypeStruct((4, *x.shape[1:]), x.dtype) if x.shape[:1] == (1,) else x
        for name, x in arrays.items()
    }

    def loss(arrays):
        inputs = core_inputs(arrays)
        output = dydila_core(inputs, options, implementation="pallas_gpu").output
        return output.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh), tracing_for("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 10
    assert f"tensor<{local}xbf16>" in text
    # Of M and z, of dM and dz; and of the routers' and the lambdas' gradients, on any axis.
    assert text.count("stablehlo.all_reduce") == 2 * sums + 3


def test_what_a_mesh_does_not_divide_is_refused():
    mesh = AbstractMesh((2, 2), ("data", "sequence"))
    inputs = core_inputs(leaves(63, 16, plain=True))
    options = CoreOptions(heads=2)
    split = CoreSharding(mesh, (), "sequence")
    assert "63 tokens are not divisible" in str(pallas_gpu.unsupported(inputs, options, split))
    split = CoreSharding(mesh, ("data",))
    assert "batch 1 is not divisible" in str(pallas_gpu.unsupported(inputs, options, split))


def test_no_array_of_all_channels_is_saved_in_float32():
    """The backward pass computes the features again: it keeps bfloat16 arguments and scalars."""
    options = CoreOptions(heads=2)
    arrays = leaves(1024, 72)

    def saving(arrays):
        return jax.vjp(lambda x: pallas_gpu.attention(core_inputs(x), options).output, arrays)[1]

    saved = jax.tree.leaves(jax.eval_shape(saving, arrays))
    wide = [x for x in saved if x.size >= arrays["query"].size]
    assert wide
    assert all(x.dtype == jnp.bfloat16 for x in wide)


@pytest.mark.parametrize("d", [8, 64, 72, 128])
def test_a_program_holds_a_narrow_head(d):
    """The two largest kernels: registers that hold sums, and shared memory."""
    cut = Cut(64, 1024, 4, d)
    sums, under_way = 64 * cut.halves * cut.channels // 128, 64 * cut.channels // 128
    assert sums + under_way < 255 - 32
    block, operand = 64 * cut.channels * 2, 64 * 64 * cut.halves * 2
    state, small = cut.channels**2 * 2, 8 * 1024
    staged = 64 * cut.channels * 4
    query_sums = 6 * block + block + max(operand + block, staged) + state
    routers = 2 * pallas_gpu.most_lambdas(d) * (cut.channels + 64) * 2
    token_gradients = 6 * block + 2 * block + 2 * operand + state + routers
    assert max(query_sums, token_gradients) + small <= 227 * 1024


def test_shared_memory_holds_the_columns():
    for d in (16, 64, 72, 192, 256, 288, 576, 704):
        tiles = Tiles(64 * -(-d // 64))
        assert tiles.columns * tiles.parts >= tiles.width
        assert tiles.columns % 64 == 0
        assert 0 < tiles.columns <= 256
        assert 2 * tiles.width * tiles.columns <= 227 * 1024


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x._replace(query=x.query.astype(jnp.float32)), "query is float32"),
        (lambda x: x._replace(rotation=(x.value, x.value)), "rotary"),
        (lambda x: x._replace(lambdas=x.lambdas._replace(key_router=None)), "both lambda routers"),
        (
            lambda x: x._replace(lambdas=x.lambdas._replace(bank=jnp.zeros(33))),
            "33 lambdas to choose from do not fit in shared memory, 32 would",
        ),
        (
            lambda x: x._replace(exponents=x.exponents._replace(query_redundant=None)),
            "exponents of some of the tensors only",
        ),
    ],
)
def test_says_what_it_cannot_run(change, reason):
    inputs = change(core_inputs(leaves(4, 16)))
    assert reason in str(pallas_gpu.unsupported(inputs, CoreOptions(heads=2)))


def kernels_in(jaxpr):
    """Name and shape of the first operand of every GPU kernel of a traced function."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            yield equation.params["name"], equation.invars[0].aval.shape
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels_in(inner)


@pytest.mark.parametrize("d", [72, 136])
def test_kernels_are_known_to_the_count_of_flops(d):
    """By name: K^T V and Q M forward; backward G twice of each side, Q^T dO, K dM."""
    options, arrays = CoreOptions(heads=2), jax.eval_shape(lambda: leaves(128, d))
    with cuda():
        traced = value_and_gradients.trace(pallas_gpu.attention, options, arrays, arrays["value"])
    flops = 0.0
    for name, shape in kernels_in(traced.jaxpr.jaxpr):
        operand = SimpleNamespace(size=np.prod(shape), dimensions=shape)
        flops += KERNEL_FLOPS[name]([cast(Array, operand)], [])
    rounded = pallas_gpu_passes.rounded_sizes(d, 128)[0]
    assert flops == 8 * 2 * 128 * 2 * rounded**2


def test_jitter_is_refused_only_with_noise():
    options = CoreOptions(heads=2, router_jitter=0.1)
    arrays = leaves(4, 16)
    assert pallas_gpu.unsupported(core_inputs(arrays), options) is None
    inputs = core_inputs(arrays, jax.random.key(0))
    assert "router_jitter" in str(pallas_gpu.unsupported(inputs, options))


def test_too_wide_a_head_is_refused():
    inputs = core_inputs(leaves(2, 705, plain=True))
    assert "use more heads" in str(pallas_gpu.unsupported(inputs, CoreOptions(heads=2)))
