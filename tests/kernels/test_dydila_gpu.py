"""The Mosaic GPU kernels of the DyDiLA core: interpreted on a CPU, and lowered for CUDA.

Pallas' interpreter of Mosaic GPU kernels knows transposed operands, and what the TMA unit does
beyond an array, from JAX 0.12 on. On older JAX the kernels are lowered only.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice, AbstractMesh

from benchmarks import hbm_bytes_gpu
from dydilit_jax.kernels.dydila import pallas_gpu, pallas_gpu_blocks, pallas_gpu_kernels
from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas
from dydilit_jax.kernels.dydila.pallas_gpu_blocks import Cut
from dydilit_jax.kernels.dydila.pallas_gpu_kernels import Core, Tiles
from dydilit_jax.kernels.dydila.xla import linear_attention
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.kernels.sharding import CoreSharding

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="Mosaic GPU's interpreter is complete from JAX 0.12 on"
)
# Two roundings to bfloat16 more than XLA's path: M and dM are operands of the tensor core.
FACTOR, FLOOR = 3.0, 4e-3


def gpu_interpreter(**fields):
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**fields)


def leaves(N, d, H=2, *, bank=(0.2, 0.5, 1.3), negative=(), plain=False, seed=0):
    """Arrays that gradients are taken of, by name; bfloat16 values, and float32 scalars."""
    rng = np.random.default_rng(seed)

    def tokens():
        x = rng.normal(size=(1, N, H * d))
        x[:, list(negative)] = -np.abs(x[:, list(negative)])
        return jnp.asarray(x, jnp.bfloat16)

    arrays = {"query": tokens(), "key": tokens(), "value": tokens()}
    if plain:
        return arrays
    arrays |= {"query_redundant": tokens(), "key_redundant": tokens()}
    for name in Exponents._fields:
        arrays[f"exponent of {name}"] = jnp.asarray(rng.uniform(1, 4, (1, N)), jnp.float32)
    arrays["bank"] = jnp.asarray(bank, jnp.float32)
    for name in ("query_router", "key_router"):
        arrays[name] = jnp.asarray(rng.normal(size=(2 * H * d, len(bank))), jnp.float32)
    return arrays


def core_inputs(arrays):
    if "bank" not in arrays:
        return CoreInputs(**arrays)
    names = ("query", "key", "value", "query_redundant", "key_redundant")
    return CoreInputs(
        **{name: arrays[name] for name in names},
        exponents=Exponents(*(arrays[f"exponent of {name}"] for name in Exponents._fields)),
        lambdas=Lambdas(arrays["bank"], arrays["query_router"], arrays["key_router"]),
    )


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(core, options, arrays, d_output):
    """Output, denominator and the gradient of every array, by name."""

    def output(arrays):
        result = core(core_inputs(arrays), options)
        return result.output, result.denominator

    y, vjp, denominator = jax.vjp(output, arrays, has_aux=True)
    return {"output": y, "denominator": denominator} | vjp(d_output)[0]


def close_to_reference(N, d, options, *, detect_races=False, **case):
    """Compares every array of the kernels with float64, within a few times XLA's own error."""
    arrays = leaves(N, d, options.heads, **case)
    rng = np.random.default_rng(1)
    d_output = jnp.asarray(rng.normal(size=arrays["value"].shape), jnp.bfloat16)
    kernels = partial(pallas_gpu.attention, interpret=gpu_interpreter(detect_races=detect_races))
    assert pallas_gpu.unsupported(core_inputs(arrays), options) is None
    got = value_and_gradients(kernels, options, arrays, d_output)
    xla = value_and_gradients(linear_attention, options, arrays, d_output)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        wanted = value_and_gradients(
            linear_attention, options, wide, jnp.asarray(d_output, jnp.float64)
        )
    assert got.keys() == wanted.keys()
    for name, reference in wanted.items():
        if reference is None:
            assert got[name] is None
            continue
        reference = np.asarray(reference)
        assert np.isfinite(np.asarray(got[name], np.float64)).all(), name
        size = max(np.abs(reference).max(), 1e-30)
        error, xla_error = (
            np.abs(np.asarray(x[name], np.float64) - reference).max() / size for x in (got, xla)
        )
        assert error <= FACTOR * xla_error + FLOOR, f"{name}: {error} against XLA's {xla_error}"
    return kernels, arrays, d_output, got


@interpreted
def test_base_with_lambda_above_one():
    options = CoreOptions(heads=1)
    close_to_reference(300, 72, options, bank=(1.1, 1.5, 2.0), negative=(3, 80, 299))


@interpreted
@pytest.mark.parametrize("d", [64, 136])
def test_signed_with_norms_of_heads(d):
    options = CoreOptions(heads=2, normalizer="signed", norm_scope="head")
    close_to_reference(64, d, options, bank=(0.05, 0.1, 0.2))


@interpreted
def test_no_normalizer_and_lambda_zero():
    options = CoreOptions(heads=1, normalizer="none")
    close_to_reference(127, 16, options, bank=(0.0, 0.0, 0.0))


@interpreted
def test_one_token():
    """Seed 2: Qd . Kd, the one weight, does not cancel, which would enlarge every rounding."""
    close_to_reference(1, 72, CoreOptions(heads=1), seed=2)


@interpreted
@pytest.mark.parametrize("normalizer", ["base", "rms"])
def test_relu_core_repeats_bitwise(normalizer):
    options = CoreOptions(heads=2, normalizer=normalizer)
    kernels, arrays, d_output, first = close_to_reference(65, 16, options, plain=True)
    second = value_and_gradients(kernels, options, arrays, d_output)
    for name, x in first.items():
        assert np.asarray(x).tobytes() == np.asarray(second[name]).tobytes(), name


@pytest.fixture
def few_programs(monkeypatch):
    """Two programs, not two for each multiprocessor: each takes several blocks of tokens."""
    monkeypatch.setattr(pallas_gpu_blocks, "PROGRAMS", 2)
    monkeypatch.setattr(pallas_gpu_kernels, "PROGRAMS", 6)  # three are for parts of the head
    monkeypatch.setattr(pallas_gpu_kernels, "FEWEST_BLOCKS", 1)


@interpreted
@pytest.mark.parametrize("d", [64, 72])
def test_blocks_do_not_race(few_programs, d):
    """Two programs of two blocks, one of them beyond the tokens: every buffer is used again."""
    close_to_reference(130, d, CoreOptions(heads=1), plain=True, detect_races=True)


@interpreted
@pytest.mark.parametrize(("d", "normalizer"), [(20, "base"), (128, "signed")])
def test_narrow_heads_over_several_blocks(few_programs, d, normalizer):
    """A width that is no multiple of 8, which is padded, and the widest."""
    bank = (0.05, 0.1, 0.2) if normalizer == "signed" else (1.1, 1.5, 2.0)
    options = CoreOptions(heads=1, normalizer=normalizer)
    close_to_reference(139, d, options, bank=bank, negative=(3, 80, 138))


@interpreted
def test_wide_heads_with_programs_beyond_the_tokens(few_programs):
    """Three blocks of tokens in two programs of two; the fourth block must not count."""
    assert pallas_gpu.kernels_for(136) is pallas_gpu.WIDE
    assert pallas_gpu_kernels.token_splits(1, 130, 1, 144) == (2, 2)
    options = CoreOptions(heads=1)
    close_to_reference(130, 136, options, bank=(1.1, 1.5, 2.0), detect_races=True)


def cuda():
    """What newer JAX wants to know of the GPU that programs are lowered for."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu))


@pytest.mark.parametrize(
    ("N", "d", "normalizer", "kernels"),
    [
        (256, 72, "base", 4),
        (300, 64, "base", 4),
        (1024, 288, "signed", 6),
        (16384, 576, "base", 6),
    ],
)
def test_lowers_for_cuda(N, d, normalizer, kernels):
    """Forward is two kernels, backward two more (wide heads: four), and nothing of N x N."""
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


def test_bytes_of_narrow_heads():
    """XL/2's 16 heads: 6 activations forward, 11 backward, the states and scalars, nothing else."""
    B, N, H, d, padded = 64, 1024, 16, 72, 80
    core = Core(H, d, N, "base", True, True, 1e-6)
    # M or dM is written once in float32 and read once in bfloat16, z or dz in float32.
    written, read = (4 * padded * padded + 4 * d) * B * H, (2 * padded * padded + 4 * d) * B * H
    rows, den = 4 * B * 7 * N, 4 * B * H * N
    d_rows = 4 * B * H * 5 * N  # of each head, of all scalars but 1 / s of Q and Q' (K and K')
    bounds = {
        "forward": (6, written + read, 2 * rows + den),
        "backward": (11, written + 2 * read, 2 * (rows + d_rows) + den),
    }
    programs = hbm_bytes_gpu.lowered(core, B, N)
    assert programs.keys() == bounds.keys()
    for name, (activations, state, scalars) in bounds.items():
        moved = hbm_bytes_gpu.moved_bytes(programs[name], core, B, N)
        assert moved["activations"] == activations * 2 * B * N * H * d, name
        assert moved["around the kernels"] == 0, name
        assert sum(moved.values()) <= activations * 2 * B * N * H * d + state + scalars, name


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
    tokens = jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16)
    options = CoreOptions(heads=2)

    def loss(*tokens):
        inputs = CoreInputs(*tokens)
        output = dydila_core(inputs, options, implementation="pallas_gpu").output
        return output.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh), tracing_for("gpu"):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(tokens, tokens, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 4
    assert f"tensor<{local}xbf16>" in text
    assert text.count("stablehlo.all_reduce") == 2 * sums  # of M and of z, or of dM and of dz


@interpreted
def test_sums_of_split_tokens_are_those_of_the_whole():
    """What a mesh does that splits the tokens; the interpreter knows one device only."""
    N, d = 144, 72
    core = Core(1, d, N, "base", False, False, 1e-6, None, gpu_interpreter())
    query, key, value, d_output = (
        jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(0).normal(size=(4, 1, N, 1, d))
    )
    run, rows = pallas_gpu.NARROW, jnp.ones((1, 1, 1, N), jnp.float32)

    @jax.jit
    def whole(q, k, v, dy):
        y, vjp = jax.vjp(
            lambda *x: pallas_gpu.fused(core, x[:1], x[1:2], x[2], rows, rows)[0], q, k, v
        )
        return y, *vjp(dy)

    @jax.jit
    def split(q, k, v, dy):
        q, k, v, dy = (jnp.split(x, 2, axis=1) for x in (q, k, v, dy))
        ones = jnp.ones((1, 1, 1, run.covered(1, N // 2, 1, d)), jnp.float32)

        def summed(parts):
            return pallas_gpu.means(core, *(sum(x) for x in zip(*parts, strict=True)))

        m, z = summed([run.state(core, k[i : i + 1], ones, v[i]) for i in range(2)])
        y, den = zip(*(run.apply(core, q[i : i + 1], ones, m, z) for i in range(2)), strict=True)
        of_queries = [
            run.query_gradients(core, q[i : i + 1], ones, dy[i], m, z, den[i]) for i in range(2)
        ]
        d_m, d_z = summed([x[2:] for x in of_queries])
        of_keys = [run.key_gradients(core, k[i : i + 1], ones, v[i], d_m, d_z) for i in range(2)]
        d_q, d_k = ([x[0][0] for x in gradients] for gradients in (of_queries, of_keys))
        return [jnp.concatenate(x, axis=1) for x in (y, d_q, d_k, [x[2] for x in of_keys])]

    arrays = query, key, value, d_output
    for wanted, got in zip(whole(*arrays), split(*arrays), strict=True):
        wanted, got = np.asarray(wanted, np.float32), np.asarray(got, np.float32)
        assert np.abs(got - wanted).max() <= 1e-2 * np.abs(wanted).max()


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
    """`query_gradients`, the largest kernel: registers of a thread, and shared memory."""
    cut = Cut(64, 1024, 4, d)
    sums, under_way = 64 * cut.halves * cut.channels // 128, 64 * cut.channels // 128
    assert sums + under_way < 255 - 32
    blocks, operands = 2 * 3 * 64 * cut.channels * 2, 64 * (64 * cut.halves + cut.channels) * 2
    staged, state, small = 64 * cut.channels * 4, cut.channels**2 * 2, 8 * 1024
    assert blocks + max(operands, staged) + state + small <= 227 * 1024


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
    ],
)
def test_says_what_it_cannot_run(change, reason):
    inputs = change(core_inputs(leaves(4, 16)))
    assert reason in str(pallas_gpu.unsupported(inputs, CoreOptions(heads=2)))


def test_too_wide_a_head_is_refused():
    inputs = core_inputs(leaves(2, 705, plain=True))
    assert "use more heads" in str(pallas_gpu.unsupported(inputs, CoreOptions(heads=2)))
