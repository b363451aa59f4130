"""The grouped projection against loops in float64, for every implementation and dtype."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from dydilit_jax.errors import UserError
from dydilit_jax.kernels.grouped_projection import api, pallas_tpu, tpu_kernels, xla
from dydilit_jax.kernels.grouped_projection.api import grouped_projection
from dydilit_jax.kernels.grouped_projection.reference import dense
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.kernels.sharding import CoreSharding

IMPLEMENTATIONS = ["dense", "blocks"]
# Unit roundoff of the dtype, times a few for the sums; errors are relative to the largest entry.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.2e-2, "float64": 1e-14}


class Case:
    """Inputs in float64 numpy, rounded to the dtypes that the projection will see."""

    def __init__(
        self,
        dtype="float32",
        banks=3,
        tokens=300,
        routing="random",
        one_hot=False,
        widths=(6, 5),
    ):
        rng = np.random.default_rng(0)
        D, E = widths
        self.dtype = dtype
        self.index = {
            "random": rng.integers(0, banks, size=tokens),
            "empty bank": rng.integers(0, max(banks - 1, 1), size=tokens),
            "one bank": np.full(tokens, banks - 1),
        }[routing].astype(np.int32)
        self.hot = np.eye(banks)[self.index]
        scale = np.ones((tokens, 1)) if one_hot else rng.uniform(0.3, 1.0, size=(tokens, 1))
        wide = np.float64 if dtype == "float64" else np.float32
        self.weights = (self.hot * scale).astype(wide)
        self.bank = rng.normal(size=(banks, D, E)).astype(wide)
        self.x = np.asarray(jnp.asarray(rng.normal(size=(tokens, D)), dtype))
        self.dy = np.asarray(jnp.asarray(rng.normal(size=(tokens, E)), dtype))

    def expected(self, straight_through):
        """Output and the gradients of x, bank and weights, token by token."""
        x, bank, w, dy = (
            np.asarray(a, np.float64) for a in (self.x, self.bank, self.weights, self.dy)
        )
        y, dx, dbank, dw = (np.zeros_like(a) for a in (dy, x, bank, w))
        for i, u in enumerate(self.index):
            y[i] = w[i, u] * (x[i] @ bank[u])
            dx[i] = w[i, u] * (bank[u] @ dy[i])
            dbank[u] += w[i, u] * np.outer(x[i], dy[i])
            for j in range(len(bank)):
                if straight_through or j == u:
                    dw[i, j] = dy[i] @ (x[i] @ bank[j])
        return {"y": y, "dx": dx, "dbank": dbank, "dweights": dw}

    def computed(self, straight_through, implementation):
        """The same four, by the projection and its vjp under jit."""
        results = value_and_vjp(
            self.x, self.bank, self.weights, self.index, self.dy, straight_through, implementation
        )
        return dict(zip(("y", "dx", "dbank", "dweights"), results, strict=True))


@partial(jax.jit, static_argnums=(4, 5))
def project(x, bank, weights, index, straight_through, implementation):
    return grouped_projection(
        x, bank, weights, index, straight_through=straight_through, implementation=implementation
    )


@partial(jax.jit, static_argnums=(5, 6))
def value_and_vjp(x, bank, weights, index, dy, straight_through, implementation):
    def of_inputs(x, bank, weights):
        return project(x, bank, weights, index, straight_through, implementation)

    y, vjp = jax.vjp(of_inputs, x, bank, weights)
    return y, *vjp(dy)


def assert_close(computed, expected, dtype):
    for name, value in expected.items():
        error = np.abs(np.asarray(computed[name], np.float64) - value).max()
        assert error <= TOLERANCE[dtype] * np.abs(value).max(), name


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_gradients(dtype, implementation, straight_through):
    case = Case(dtype)
    computed = case.computed(straight_through, implementation)
    assert_close(computed, case.expected(straight_through), dtype)
    assert computed["y"].dtype == computed["dx"].dtype == dtype
    assert computed["dbank"].dtype == computed["dweights"].dtype == "float32"


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_and_finite_differences(implementation, straight_through):
    with jax.enable_x64(True):
        case = Case("float64", tokens=260)
        computed = case.computed(straight_through, implementation)
        assert_close(computed, case.expected(straight_through), "float64")

        rng = np.random.default_rng(1)
        inputs = [case.x, case.bank, case.weights]
        for position, name in enumerate(["dx", "dbank", "dweights"]):
            direction = rng.normal(size=inputs[position].shape)
            if name == "dweights":
                direction *= case.hot
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(inputs)
                moved[position] = inputs[position] + step * direction
                y = project(*moved, case.index, straight_through, implementation)
                ends.append(float(np.sum(np.asarray(y) * case.dy)))
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(np.sum(np.asarray(computed[name]) * direction), rel=1e-6)


@pytest.mark.parametrize(
    ("banks", "tokens", "routing"),
    [
        (1, 300, "one bank"),
        (2, 1, "random"),
        (3, 129, "random"),
        (3, 129, "empty bank"),
        (3, 129, "one bank"),
        (5, 521, "random"),
        (5, 521, "empty bank"),
    ],
)
def test_blocks_of_every_shape(banks, tokens, routing):
    case = Case("float32", banks, tokens, routing)
    computed = case.computed(False, "blocks")
    assert_close(computed, case.expected(False), "float32")
    if routing == "empty bank":
        assert not np.any(np.asarray(computed["dbank"])[-1])


def test_plan_holds_every_token_once_in_a_block_of_its_bank():
    index = jnp.asarray(np.random.default_rng(0).integers(0, 4, size=77), jnp.int32)
    plan = xla.make_plan(index, 4, 8)
    token, owner = np.asarray(plan.token), np.asarray(plan.owner)
    held = token[token < 77]
    assert sorted(held) == list(range(77))
    for block, bank in zip(token[: int(plan.blocks)], owner, strict=False):
        assert np.all(np.asarray(index)[block[block < 77]] == bank)
        assert np.any(block < 77)
    assert np.all(token[int(plan.blocks) :] == 77)


def test_bfloat16_bank_gradient_sums_in_float32():
    """1,001 equal terms: bfloat16 cannot hold the sum, nor any odd number above 256."""
    tokens = 1_001
    x = jnp.ones((tokens, 2), jnp.bfloat16)
    index = jnp.zeros(tokens, jnp.int32)
    weights = jax.nn.one_hot(index, 2)
    bank, dy = jnp.ones((2, 2, 2)), jnp.ones((tokens, 2), jnp.bfloat16)
    for implementation in IMPLEMENTATIONS:
        _, _, gradient, _ = value_and_vjp(x, bank, weights, index, dy, False, implementation)
        np.testing.assert_array_equal(gradient[0], tokens)
        np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_jit_scan_and_checkpoint(implementation):
    """Three layers in a scan with checkpoints give the gradients of three layers in a loop."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 150, 4)), jnp.float32)
    banks = jnp.asarray(0.3 * rng.normal(size=(3, 3, 4, 4)), jnp.float32)
    router = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)

    def layer(x, bank, project):
        probability = jax.nn.softmax(x @ router)
        index = jnp.argmax(probability, axis=-1).astype(jnp.int32)
        weights = probability * jax.nn.one_hot(index, 3)
        return x + project(x, bank, weights, index)

    def by_scan(x, banks):
        def routed(*arguments):
            return project(*arguments, False, implementation)

        step = jax.checkpoint(lambda x, bank: (layer(x, bank, routed), None))
        return jnp.sum(jnp.sin(jax.lax.scan(step, x, banks)[0]))

    def by_loop(x, banks):
        def mixed(x, bank, weights, index):
            return jnp.einsum("bti,nio,btn->bto", x, bank, weights)

        for bank in banks:
            x = layer(x, bank, mixed)
        return jnp.sum(jnp.sin(x))

    computed = jax.jit(jax.grad(by_scan, (0, 1)))(x, banks)
    expected = jax.jit(jax.grad(by_loop, (0, 1)))(x, banks)
    for got, wanted in zip(computed, expected, strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_dense_mixes_banks_softly():
    case = Case(tokens=20)
    weights = np.random.default_rng(2).dirichlet(np.ones(3), size=20).astype(np.float32)
    y, *gradients = value_and_vjp(case.x, case.bank, weights, case.index, case.dy, True, "dense")
    expected = sum(weights[:, [j]] * (case.x @ case.bank[j]) for j in range(3))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    _, automatic = jax.vjp(dense, *map(jnp.asarray, (case.x, case.bank, weights)))
    for got, wanted in zip(gradients, automatic(jnp.asarray(case.dy)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_default_follows_the_platform_of_the_lowering():
    """Blocks (a loop) on CPU, one product without a loop when lowered for a TPU on this machine."""
    case = Case(one_hot=True)

    def loss(x, bank):
        y = grouped_projection(x, bank, case.weights, case.index, straight_through=False)
        return jnp.sum(y * y)

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(case.x, case.bank)
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert api._default(jnp.zeros((4096, 8)), jnp.zeros((1, 8, 8)), None, None) == "dense"


def test_default_equals_the_specification():
    case = Case()
    for straight_through in (True, False):
        computed, expected = case.computed(straight_through, None), case.expected(straight_through)
        assert_close(computed, expected, "float32")


def test_sharded_tokens_equal_unsharded():
    """In a process of its own, because the number of devices is fixed when JAX starts."""
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.kernels.test_grouped_projection import Case, assert_close, value_and_vjp
sharding = NamedSharding(Mesh(jax.devices(), ("data",)), P("data"))
case = Case(tokens=320)
put = lambda array: jax.device_put(array, sharding)
inputs = (put(case.x), case.bank, put(case.weights), put(case.index), put(case.dy))
names = ("y", "dx", "dbank", "dweights")
for straight_through in (True, False):
    out = value_and_vjp(*inputs, straight_through, "blocks")
    assert_close(dict(zip(names, out)), case.expected(straight_through), "float32")
print("devices", len(jax.devices()))
"""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.strip() == "devices 4", done.stderr


def test_errors_are_one_line():
    x, bank = jnp.ones((2, 5, 4)), jnp.ones((3, 4, 4))
    weights, index = jnp.ones((2, 5, 3)), jnp.zeros((2, 5), jnp.int32)

    def message(x, bank, weights, index, implementation=None):
        with pytest.raises(UserError) as error:
            project(x, bank, weights, index, True, implementation)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'blocks'" in message(x, bank, weights, index, "block")
    assert "same D" in message(x, jnp.ones((3, 5, 4)), weights, index)
    assert "same D" in message(x, bank[0], weights, index)
    assert "(2, 5, 3)" in message(x, bank, weights[..., :2], index)
    assert "(2, 5)" in message(x, bank, weights, index[0])
    assert "integers" in message(x, bank, weights, index.astype(jnp.float32))


@pytest.fixture
def tpu(monkeypatch):
    """Run the TPU kernels on this CPU, in blocks of 128 tokens; loops that compile quickly."""
    monkeypatch.setattr(pallas_tpu, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(tpu_kernels, "UNROLL", 1)
    with tracing_for("tpu", interpret=True):
        yield


def assert_as_exact_as_dense(case, straight_through, backend="pallas_tpu"):
    """Every result of the kernels errs no more than twice what the dense form's does."""
    kernels, dense = (case.computed(straight_through, name) for name in (backend, "dense"))
    for name, value in case.expected(straight_through).items():
        errors = [
            np.abs(np.asarray(result[name], np.float64) - value).max()
            for result in (kernels, dense)
        ]
        assert errors[0] <= 2 * errors[1] + 1e-6 * np.abs(value).max(), name
        assert kernels[name].dtype == dense[name].dtype
    return kernels


@pytest.mark.parametrize(
    ("tokens", "dtype", "straight_through", "routing"),
    [
        (1, "bfloat16", True, "random"),
        (7, "float32", False, "random"),
        (127, "float32", True, "empty bank"),
        (129, "bfloat16", False, "one bank"),
        (300, "float32", True, "one bank"),
        (300, "float32", False, "empty bank"),
        (300, "bfloat16", True, "random"),
    ],
)
def test_tpu_kernels(tpu, tokens, dtype, straight_through, routing):
    """300 tokens are three blocks for two cores, the last with rows that no token fills."""
    case = Case(dtype, 3, tokens, routing, widths=(256, 128))
    assert_as_exact_as_dense(case, straight_through)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 200),
    banks=st.integers(1, 5),
    widths=st.tuples(st.sampled_from([128, 384]), st.sampled_from([128, 256])),
    straight_through=st.booleans(),
)
def test_tpu_kernels_of_any_shape(tokens, banks, widths, straight_through):
    with pytest.MonkeyPatch.context() as patch, tracing_for("tpu", interpret=True):
        patch.setattr(pallas_tpu, "LARGEST_BLOCK", 128)
        patch.setattr(tpu_kernels, "UNROLL", 1)
        assert_as_exact_as_dense(Case("float32", banks, tokens, widths=widths), straight_through)


def test_tpu_kernels_repeat_bitwise(tpu):
    case = Case("float32", 3, 7, widths=(256, 128))
    first, second = (case.computed(False, "pallas_tpu") for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value)


def test_tpu_kernels_have_no_races(tpu, capfd):
    """On two cores, in memory that is NaN before it is written."""
    case = Case("float32", 3, 130, widths=(128, 128))
    inputs = (case.x, case.bank, case.weights, case.index)
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with tracing_for("tpu", interpret=interpret):
        y = jax.jit(pallas_tpu.projection)(*inputs)
        gradients = jax.jit(pallas_tpu.gradient, static_argnums=5)(*inputs, case.dy, True)
    assert "RACE" not in capfd.readouterr().out
    named = dict(zip(("y", "dx", "dbank", "dweights"), (y, *gradients), strict=True))
    assert_close(named, case.expected(True), "float32")


@pytest.mark.parametrize("ambient", [True, False])
def test_tpu_kernels_on_a_mesh(tpu, ambient):
    """Four batches by two halves of the sequence: every device routes its own tokens."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3)
    case = Case("float32", 3, 4 * 20, widths=(128, 128))
    x, weights, dy = (a.reshape(4, 20, -1) for a in (case.x, case.weights, case.dy))
    explicit = None if ambient else CoreSharding(mesh, ("data", "fsdp"), "sequence")

    @jax.jit
    def run(x, bank, weights, index, dy):
        def of_inputs(x, bank, weights):
            return grouped_projection(
                x,
                bank,
                weights,
                index,
                straight_through=True,
                implementation="pallas_tpu",
                sharding=explicit,
            )

        y, vjp = jax.vjp(of_inputs, x, bank, weights)
        return y, *vjp(dy)

    arguments = (x, case.bank, weights, case.index.reshape(4, 20), dy)
    if ambient:
        with jax.set_mesh(mesh):
            results = run(*arguments)
    else:
        results = run(*arguments)
    assert len(results[0].sharding.device_set) == 8
    expected = case.expected(True)
    named = dict(zip(expected, results, strict=True))
    shaped = {name: np.reshape(named[name], value.shape) for name, value in expected.items()}
    assert_close(shaped, expected, "float32")


def test_default_on_a_tpu():
    """The kernels, for enough bfloat16 tokens whose place is known; else the dense form."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def has_kernel(shape, dtype="bfloat16", banks=3):
        x, weights = jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], banks))
        bank, index = jnp.zeros((banks, shape[-1], 128)), jnp.zeros(shape[:-1], jnp.int32)
        jaxpr = jax.make_jaxpr(partial(grouped_projection, straight_through=True))(
            x, bank, weights, index
        )
        return "pallas_call" in str(jaxpr)

    with tracing_for("tpu"):
        assert not has_kernel((8, 1024, 128)), "eight devices and nothing said of them"
        with jax.set_mesh(mesh):
            assert has_kernel((8, 1024, 128))
            assert not has_kernel((8, 1024, 128), dtype="float32")
            assert not has_kernel((8, 1024, 128), banks=1)
            assert not has_kernel((8, 1024, 96))
            assert not has_kernel((8, 256, 128)), "too few tokens on each device"
            assert not has_kernel((6, 4096, 128)), "batch does not divide"
    with jax.set_mesh(mesh):
        assert not has_kernel((8, 1024, 128)), "traced for CPU"


def test_what_tpu_kernels_cannot_run():
    def message(x, bank):
        with pytest.raises(UserError) as error:
            project(
                x,
                bank,
                jnp.ones((len(x), len(bank))),
                jnp.zeros(len(x), jnp.int32),
                True,
                "pallas_tpu",
            )
        assert "\n" not in str(error.value)
        assert "'dense'" in str(error.value)
        return str(error.value)

    x, bank = jnp.ones((4, 128)), jnp.ones((3, 128, 128))
    assert "traced for cpu" in message(x, bank)
    with tracing_for("tpu"):
        assert "multiples of 128" in message(x[:, :96], bank[:, :96])
        assert "multiples of 128" in message(x, bank[..., :96])
        assert "bfloat16 and float32" in message(x.astype(jnp.float16), bank)
        assert "no tokens" in message(x[:0], bank)
        assert "VMEM" in message(jnp.ones((4, 4096)), jnp.ones((3, 4096, 128)).repeat(16, axis=2))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            assert "do not divide" in message(x, bank)
