"""The Mosaic GPU kernels of the DyDiLA core: interpreted on a CPU, and lowered for CUDA.

Pallas' interpreter of Mosaic GPU kernels knows transposed operands, and what the TMA unit does
beyond an array, from JAX 0.12 on. On older JAX the kernels are lowered only.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.kernels.dydila import (
    pallas_gpu,
    pallas_gpu_blocks,
    pallas_gpu_passes,
    pallas_gpu_wide,
)
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas
from dydilit_jax.kernels.dydila.pallas_gpu_features import Core, Known, means
from dydilit_jax.kernels.dydila.xla import linear_attention
from dydilit_jax.kernels.routing import load_balance_loss
from dydilit_jax.kernels.sharding import CoreSharding

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="Mosaic GPU's interpreter is complete from JAX 0.12 on"
)
# Two roundings to bfloat16 more than XLA's path: M and dM are operands of the tensor core.
FACTOR, FLOOR = 3.0, 4e-3


def gpu_interpreter(**fields):
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**fields)


def leaves(N, d, H=2, *, B=1, bank=(0.2, 0.5, 1.3), negative=(), plain=False, seed=0):
    """Arrays that gradients are taken of, by name; bfloat16 values, and float32 scalars."""
    rng = np.random.default_rng(seed)

    def tokens():
        x = rng.normal(size=(B, N, H * d))
        x[:, list(negative)] = -np.abs(x[:, list(negative)])
        return jnp.asarray(x, jnp.bfloat16)

    arrays = {"query": tokens(), "key": tokens(), "value": tokens()}
    if plain:
        return arrays
    arrays |= {"query_redundant": tokens(), "key_redundant": tokens()}
    for name in Exponents._fields:
        arrays[f"exponent of {name}"] = jnp.asarray(rng.uniform(1, 4, (B, N)), jnp.float32)
    arrays["bank"] = jnp.asarray(bank, jnp.float32)
    for name in ("query_router", "key_router"):
        arrays[name] = jnp.asarray(rng.normal(size=(2 * H * d, len(bank))), jnp.float32)
    return arrays


def core_inputs(arrays, noise_key=None):
    """The inputs whose arrays are there, of those that `leaves` makes."""
    names = ("query", "key", "value", "query_redundant", "key_redundant")
    exponents, lambdas = None, None
    if "exponent of query" in arrays:
        found = (arrays.get(f"exponent of {name}") for name in Exponents._fields)
        exponents = Exponents(*found)
    if "bank" in arrays:
        lambdas = Lambdas(*(arrays.get(x) for x in ("bank", "query_router", "key_router")))
    tensors = {name: arrays[name] for name in names if name in arrays}
    return CoreInputs(**tensors, exponents=exponents, lambdas=lambdas, noise_key=noise_key)


@partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(core, options, arrays, d_output, noise_key=None):
    """Output, denominator, load balance and the gradient of every array, by name."""

    def output(arrays):
        result = core(core_inputs(arrays, noise_key), options)
        balance = sum(map(load_balance_loss, result.routings.values()), jnp.zeros(()))
        return (result.output, balance.astype(jnp.float32)), result.denominator

    (y, balance), vjp, denominator = jax.vjp(output, arrays, has_aux=True)
    d_balance = jnp.full((), 30.0, jnp.float32)  # so that it is as large as the output's part
    known = {"output": y, "balance": balance, "denominator": denominator}
    return known | vjp((d_output, d_balance))[0]


def close_to_reference(
    N,
    d,
    options,
    *,
    detect_races=False,
    without=(),
    noise_key=None,
    sharding=None,
    floor=FLOOR,
    **case,
):
    """Compares every array of the kernels with float64, within a few times XLA's own error."""
    arrays = leaves(N, d, options.heads, **case)
    arrays = {name: x for name, x in arrays.items() if not any(part in name for part in without)}
    rng = np.random.default_rng(1)
    d_output = jnp.asarray(rng.normal(size=arrays["value"].shape), jnp.bfloat16)
    interpreter = gpu_interpreter(detect_races=detect_races)
    kernels = partial(pallas_gpu.attention, sharding=sharding, interpret=interpreter)
    assert pallas_gpu.unsupported(core_inputs(arrays), options) is None
    got = value_and_gradients(kernels, options, arrays, d_output, noise_key)
    xla = value_and_gradients(linear_attention, options, arrays, d_output, noise_key)
    with jax.enable_x64(True):
        # Gumbel noise of another dtype is other noise.
        dtype = jnp.float64 if noise_key is None else jnp.float32
        wide = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        wanted = value_and_gradients(
            linear_attention, options, wide, jnp.asarray(d_output, dtype), noise_key
        )
    assert got.keys() == wanted.keys()
    # One token has one gradient of each exponent, small where much of it cancels.
    exponents = max(
        (np.abs(x).max() for name, x in wanted.items() if "exponent" in name), default=0
    )
    for name, reference in wanted.items():
        if reference is None:
            assert got[name] is None
            continue
        reference = np.asarray(reference)
        assert np.isfinite(np.asarray(got[name], np.float64)).all(), name
        size = exponents if "exponent" in name else max(np.abs(reference).max(), 1e-30)
        error, xla_error = (
            np.abs(np.asarray(x[name], np.float64) - reference).max() / size for x in (got, xla)
        )
        assert error <= FACTOR * xla_error + floor, f"{name}: {error} against XLA's {xla_error}"
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
@pytest.mark.parametrize("d", [24, 136])
def test_without_epsilon_tokens_that_are_not_there_do_no_harm(d):
    """Their denominator is zero. One sequence more, so that a sum over the batch is one."""
    close_to_reference(65, d, CoreOptions(heads=1, eps=0.0), B=2)


@interpreted
def test_one_token():
    """Seed 2: Qd . Kd, the one weight, does not cancel, which would enlarge every rounding.

    Its gradient comes from the routers above all, whose rows and the gradients of whose logits the
    tensor core takes in bfloat16 too: up to one unit of it.
    """
    close_to_reference(1, 72, CoreOptions(heads=1), seed=2, floor=2.0**-7)


@interpreted
@pytest.mark.parametrize(
    ("without", "case"),
    [
        (("redundant", "bank", "router"), {"norm_scope": "head"}),  # focused attention
        (("exponent",), {"router_training": "switch"}),
        (("router",), {"router_training": "soft"}),
        (("exponent", "router"), {}),
        ((), {"router_training": "soft", "norm_scope": "head"}),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, tuple) else None,
)
def test_parts_of_the_core(without, case):
    """What is not there costs nothing and breaks nothing; other ways to train the router."""
    bank = (0.3,) if "router" in without else (0.2, 0.5, 1.3)
    options = CoreOptions(heads=2, **case)
    close_to_reference(65, 24, options, bank=bank, without=without)


@interpreted
def test_gumbel_noise_and_a_mesh_of_one_device():
    """The noise is the one that XLA draws; `shard_map` gets every array where it belongs."""
    mesh = jax.make_mesh((1, 1), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = CoreSharding(mesh, ("data",), "sequence")
    options = CoreOptions(heads=2, router_training="gumbel")
    close_to_reference(65, 24, options, noise_key=jax.random.key(3), sharding=sharding)


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
    monkeypatch.setattr(pallas_gpu_wide, "PROGRAMS", 6)  # three are for parts of the head
    monkeypatch.setattr(pallas_gpu_wide, "FEWEST_BLOCKS", 1)


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
    assert pallas_gpu_passes.kernels_for(136) is pallas_gpu_passes.WIDE
    assert pallas_gpu_wide.token_splits(1, 130, 1, 144) == (2, 2)
    options = CoreOptions(heads=1)
    close_to_reference(130, 136, options, bank=(1.1, 1.5, 2.0), detect_races=True)


@interpreted
def test_sums_of_split_tokens_are_those_of_the_whole():
    """What a mesh does that splits the tokens; the interpreter knows one device only."""
    N, d = 144, 72
    options = CoreOptions(heads=1)
    core = Core(1, d, N, "base", False, False, options.eps, interpret=gpu_interpreter())
    arrays = leaves(N, d, 1, plain=True)
    d_output = leaves(N, d, 1, plain=True, seed=1)["value"]
    run = pallas_gpu_passes.NARROW

    @jax.jit
    def split(arrays, d_output):
        q, k, v, dy = (
            jnp.split(x.reshape(1, N, 1, d), 2, axis=1)
            for x in (arrays["query"], arrays["key"], arrays["value"], d_output)
        )
        ones = jnp.ones((1, 1, 1, run.covered(1, N // 2, 1, d)), jnp.float32)

        def summed(parts):
            return means(core, *(sum(x) for x in zip(*parts, strict=True)))

        m, z = summed([run.state(core, k[i : i + 1], ones, v[i]) for i in range(2)])
        y, den = zip(*(run.apply(core, q[i : i + 1], ones, m, z) for i in range(2)), strict=True)
        of_queries = [
            run.query_sums(core, q[i : i + 1], ones, dy[i], m, z, den[i]) for i in range(2)
        ]
        d_m, d_z = summed([(x.d_m, x.d_z) for x in of_queries])
        of_keys = [
            run.token_gradients(core, k[i : i + 1], Known(ones), v[i], d_m, d_z, with_value=True)
            for i in range(2)
        ]
        found = {
            "output": y,
            "query": [x.tokens[0] for x in of_queries if x.tokens],
            "key": [x.tokens[0] for x in of_keys],
            "value": [x.value for x in of_keys],
        }
        return {name: jnp.concatenate(x, axis=1).reshape(1, N, d) for name, x in found.items()}

    kernels = partial(pallas_gpu.attention, interpret=gpu_interpreter())
    whole = value_and_gradients(kernels, options, arrays, d_output)
    for name, got in split(arrays, d_output).items():
        wanted, got = (np.asarray(x, np.float32) for x in (whole[name], got))
        assert np.abs(got - wanted).max() <= 1e-2 * np.abs(wanted).max(), name
