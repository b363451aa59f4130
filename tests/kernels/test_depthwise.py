"""The depthwise convolution against loops in float64, for every implementation and dtype."""

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
from dydilit_jax.kernels.depthwise import pallas_tpu
from dydilit_jax.kernels.depthwise.api import PLAIN, depthwise_conv
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.kernels.sharding import CoreSharding

# Unit roundoff of the dtype, times a few for the sums; errors are relative to the largest entry.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float64": 1e-14}


def make_inputs(dtype, shape=(2, 5, 4, 3), k=3):
    """x, kernel, bias, dy; the kernel and bias are float32 parameters unless dtype is float64."""
    rng = np.random.default_rng(0)
    wide = "float64" if dtype == "float64" else "float32"
    dtypes = (dtype, wide, wide, dtype)
    shapes = (shape, (k, k, shape[3]), (shape[3],), shape)
    return [
        np.asarray(jnp.asarray(rng.normal(size=size), to))
        for size, to in zip(shapes, dtypes, strict=True)
    ]


def expected(x, kernel, bias, dy):
    """Output and the gradients of x, kernel and bias, pixel by pixel."""
    x, kernel, bias, dy = (np.asarray(a, np.float64) for a in (x, kernel, bias, dy))
    B, H, W, _ = x.shape
    k = len(kernel)
    r = k // 2
    y, dx, dkernel = np.zeros_like(x), np.zeros_like(x), np.zeros_like(kernel)
    for b, h, w in np.ndindex(B, H, W):
        y[b, h, w] += bias
        for i, j in np.ndindex(k, k):
            p, q = h + i - r, w + j - r
            if 0 <= p < H and 0 <= q < W:
                y[b, h, w] += x[b, p, q] * kernel[i, j]
                dx[b, p, q] += dy[b, h, w] * kernel[i, j]
                dkernel[i, j] += x[b, p, q] * dy[b, h, w]
    return {"y": y, "dx": dx, "dkernel": dkernel, "dbias": dy.sum((0, 1, 2))}


def computed(inputs, implementation):
    """The same four, by the convolution and its vjp under jit."""

    results = value_and_vjp(*inputs, implementation)
    return dict(zip(("y", "dx", "dkernel", "dbias"), results, strict=True))


@partial(jax.jit, static_argnums=3)
def convolve(x, kernel, bias, implementation):
    return depthwise_conv(x, kernel, bias, implementation=implementation)


@partial(jax.jit, static_argnums=4)
def value_and_vjp(x, kernel, bias, dy, implementation):
    def of_inputs(x, kernel, bias):
        return convolve(x, kernel, bias, implementation)

    y, vjp = jax.vjp(of_inputs, x, kernel, bias)
    return y, *vjp(dy)


def assert_close(computed, expected, dtype):
    for name, value in expected.items():
        error = np.abs(np.asarray(computed[name], np.float64) - value).max()
        assert error <= TOLERANCE[dtype] * np.abs(value).max(), name


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(
    ("k", "dtype"), [(1, "float32"), (3, "float32"), (5, "float32"), (3, "bfloat16")]
)
def test_output_and_gradients(k, dtype, implementation):
    inputs = make_inputs(dtype, k=k)
    result = computed(inputs, implementation)
    assert_close(result, expected(*inputs), dtype)
    assert result["y"].dtype == result["dx"].dtype == dtype
    assert result["dkernel"].dtype == result["dbias"].dtype == "float32"


@pytest.mark.parametrize("implementation", PLAIN)
def test_float64_and_finite_differences(implementation):
    with jax.enable_x64(True):
        inputs = make_inputs("float64")
        result = computed(inputs, implementation)
        assert_close(result, expected(*inputs), "float64")
        rng = np.random.default_rng(1)
        for position, name in enumerate(["dx", "dkernel", "dbias"]):
            direction = rng.normal(size=inputs[position].shape)
            ends = []
            for step in (1e-6, -1e-6):
                moved = list(inputs[:3])
                moved[position] = inputs[position] + step * direction
                y = convolve(*moved, implementation)
                ends.append(float(np.sum(np.asarray(y) * inputs[3])))
            slope = (ends[0] - ends[1]) / 2e-6
            assert slope == pytest.approx(np.sum(np.asarray(result[name]) * direction), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 7, 1), (1, 9, 1, 4)])
def test_images_smaller_than_the_kernel(shape):
    inputs = make_inputs("float32", shape, k=5)
    assert_close(computed(inputs, "shifted"), expected(*inputs), "float32")


def test_kernel_is_not_flipped():
    """A kernel that is 1 at its upper left copies the pixel above and to the left."""
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    kernel = jnp.zeros((3, 3, 1)).at[0, 0].set(1.0)
    for implementation in PLAIN:
        y = depthwise_conv(x, kernel, implementation=implementation)
        np.testing.assert_array_equal(y[0, 1:, 1:, 0], x[0, :-1, :-1, 0])
        np.testing.assert_array_equal(y[0, 0], 0)


@pytest.mark.parametrize("implementation", PLAIN)
def test_without_bias_inside_scan_and_checkpoint(implementation):
    x, kernel, _, dy = map(jnp.asarray, make_inputs("float32"))
    kernels = jnp.stack([kernel, 0.5 * kernel])

    def by_scan(x, kernels):
        def layer(x, kernel):
            return jnp.tanh(convolve(x, kernel, None, implementation)), None

        return jnp.sum(dy * jax.lax.scan(jax.checkpoint(layer), x, kernels)[0])

    def by_loop(x, kernels):
        zero = np.zeros(3)
        for kernel in kernels:
            x = np.tanh(expected(x, kernel, zero, dy)["y"])
        return np.sum(np.asarray(dy) * x)

    value, (dx, _) = jax.jit(jax.value_and_grad(by_scan, (0, 1)))(x, kernels)
    assert float(value) == pytest.approx(by_loop(x, kernels), rel=1e-4)
    direction = np.random.default_rng(3).normal(size=x.shape)
    moved = [by_loop(np.asarray(x) + step * direction, kernels) for step in (1e-5, -1e-5)]
    assert np.sum(np.asarray(dx) * direction) == pytest.approx(
        (moved[0] - moved[1]) / 2e-5, rel=1e-3
    )


def test_bfloat16_kernel_gradient_sums_in_float32():
    """1,050 equal terms: bfloat16 cannot hold the sum."""
    x = jnp.ones((5, 16, 15, 1), jnp.bfloat16)
    for implementation in PLAIN:
        _, _, gradient, _ = value_and_vjp(x, jnp.ones((3, 3, 1)), jnp.ones(1), x, implementation)
        assert float(gradient[0, 0, 0]) == 5 * 15 * 14


def test_default_is_shifted():
    inputs = make_inputs("float32")
    np.testing.assert_array_equal(convolve(*inputs[:3], None), convolve(*inputs[:3], "shifted"))


def test_errors_are_one_line():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3))

    def message(*arguments, **options):
        with pytest.raises(UserError) as error:
            depthwise_conv(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'shifted'" in message(x, kernel, implementation="shift")
    assert "same C" in message(x, jnp.ones((3, 3, 4)))
    assert "same C" in message(x[0], kernel)
    assert "odd k" in message(x, jnp.ones((2, 2, 3)))
    assert "odd k" in message(x, jnp.ones((3, 5, 3)))
    assert "bias (4,)" in message(x, kernel, jnp.ones(4))


@pytest.fixture
def tpu(monkeypatch):
    """Run the TPU kernels on this CPU, with loops that compile quickly."""
    monkeypatch.setattr(pallas_tpu, "UNROLL", 1)
    with tracing_for("tpu", interpret=True):
        yield


def assert_as_exact_as_shifted(inputs, name="pallas_tpu"):
    """Every result of the kernels errs no more than twice what the shifted form's does."""
    kernels, shifted = (computed(inputs, form) for form in (name, "shifted"))
    for name, value in expected(*inputs).items():
        errors = [
            np.abs(np.asarray(result[name], np.float64) - value).max()
            for result in (kernels, shifted)
        ]
        assert errors[0] <= 2 * errors[1] + 1e-6 * np.abs(value).max(), name
        assert kernels[name].dtype == shifted[name].dtype


@pytest.mark.parametrize(
    ("shape", "k", "dtype"),
    [
        ((3, 5, 7, 256), 5, "float32"),
        ((2, 16, 16, 128), 3, "bfloat16"),
        ((1, 1, 2, 128), 5, "bfloat16"),
        ((2, 9, 1, 128), 1, "float32"),
    ],
)
def test_tpu_kernels(tpu, shape, k, dtype, monkeypatch):
    """One image in a program, so that sums and borders live through several."""
    monkeypatch.setattr(pallas_tpu, "PIXELS", 1)
    assert_as_exact_as_shifted(make_inputs(dtype, shape, k))


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 10), st.integers(1, 18), st.just(128)),
    k=st.sampled_from([3, 5]),
)
def test_tpu_kernels_of_any_shape(shape, k):
    with pytest.MonkeyPatch.context() as patch, tracing_for("tpu", interpret=True):
        patch.setattr(pallas_tpu, "UNROLL", 1)
        assert_as_exact_as_shifted(make_inputs("float32", shape, k))


def test_tpu_kernels_have_no_races_and_repeat_bitwise(tpu, capfd, monkeypatch):
    """On two cores, in memory that is NaN before it is written."""
    monkeypatch.setattr(pallas_tpu, "PIXELS", 1)
    x, kernel, bias, dy = make_inputs("float32", (2, 3, 4, 256))
    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    with tracing_for("tpu", interpret=interpret):
        convolution, gradient = jax.jit(pallas_tpu.convolution), jax.jit(pallas_tpu.gradient)
        first, second = ((convolution(x, kernel, bias), *gradient(x, kernel, dy)) for _ in range(2))
    assert "RACE" not in capfd.readouterr().out
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    named = dict(zip(("y", "dx", "dkernel", "dbias"), first, strict=True))
    assert_close(named, expected(x, kernel, bias, dy), "float32")


@pytest.mark.parametrize("ambient", [True, False])
def test_tpu_kernels_on_a_mesh(tpu, ambient):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3)
    inputs = make_inputs("float32", (8, 3, 4, 128))
    explicit = None if ambient else CoreSharding(mesh, ("data", "fsdp"))

    @jax.jit
    def run(x, kernel, bias, dy):
        def of_inputs(x, kernel, bias):
            return depthwise_conv(x, kernel, bias, implementation="pallas_tpu", sharding=explicit)

        y, vjp = jax.vjp(of_inputs, x, kernel, bias)
        return y, *vjp(dy)

    if ambient:
        with jax.set_mesh(mesh):
            results = run(*inputs)
    else:
        results = run(*inputs)
    assert len(results[0].sharding.device_set) == 8
    named = dict(zip(("y", "dx", "dkernel", "dbias"), results, strict=True))
    assert_close(named, expected(*inputs), "float32")


def test_tpu_kernels_without_bias(tpu):
    x, kernel, _, dy = make_inputs("float32", (1, 3, 4, 128))
    y, vjp = jax.vjp(
        lambda x, kernel: depthwise_conv(x, kernel, implementation="pallas_tpu"), x, kernel
    )
    wanted = expected(x, kernel, np.zeros(128), dy)
    named = dict(zip(("y", "dx", "dkernel"), (y, *vjp(jnp.asarray(dy))), strict=True))
    assert_close(named, {name: wanted[name] for name in named}, "float32")


def test_default_on_a_tpu():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def has_kernel(shape):
        jaxpr = jax.make_jaxpr(lambda *a: depthwise_conv(*a))(
            jnp.zeros(shape), jnp.zeros((3, 3, shape[-1]))
        )
        return "pallas_call" in str(jaxpr)

    with tracing_for("tpu"):
        assert not has_kernel((128, 16, 16, 128)), "eight devices and nothing said of them"
        with jax.set_mesh(mesh):
            assert has_kernel((128, 16, 16, 128))
            assert not has_kernel((120, 16, 16, 128)), "too few pixels on each device"
            assert not has_kernel((12, 64, 64, 128)), "batch does not divide"
            assert not has_kernel((128, 16, 16, 96))
    with jax.set_mesh(mesh):
        assert not has_kernel((128, 16, 16, 128)), "traced for CPU"


def test_what_tpu_kernels_cannot_run():
    def message(x):
        with pytest.raises(UserError) as error:
            depthwise_conv(x, jnp.ones((3, 3, x.shape[-1])), implementation="pallas_tpu")
        assert "\n" not in str(error.value)
        assert "'shifted'" in str(error.value)
        return str(error.value)

    x = jnp.ones((2, 4, 4, 128))
    assert "traced for cpu" in message(x)
    with tracing_for("tpu"):
        assert "multiples of 128" in message(x[..., :96])
        assert "bfloat16 and float32" in message(x.astype(jnp.float16))
        assert "nothing" in message(x[:0])
        assert "VMEM" in message(jnp.ones((1, 256, 256, 128)))
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            assert "do not divide" in message(x)
