"""The Mosaic GPU kernels of the depthwise convolution: interpreted on a CPU, and lowered for CUDA.

As the core's (test_dydila_gpu.py), they are interpreted from JAX 0.12 on, lowered on any.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice, AbstractMesh
from jax.sharding import AxisType

from dydilit_jax.errors import UserError
from dydilit_jax.kernels import platform
from dydilit_jax.kernels.depthwise import pallas_gpu
from dydilit_jax.kernels.depthwise.api import depthwise_conv
from dydilit_jax.kernels.platform import recording_choices, tracing_for
from tests.kernels.test_depthwise import (
    assert_as_exact_as_shifted,
    assert_close,
    computed,
    expected,
    make_inputs,
    value_and_vjp,
)
from tests.kernels.test_dydila_gpu import gpu_interpreter, interpreted
from tests.kernels.test_dydila_gpu_lowered import cuda


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    """Loops that the interpreter and the lowering are through with quickly."""
    monkeypatch.setattr(pallas_gpu, "GROUP", 2)


@interpreted
@pytest.mark.parametrize(
    ("shape", "k", "dtype", "images", "rows"),
    [
        ((1, 3, 2, 136), 5, "float32", 1, 3),  # channels of two programs, the second not full
        ((2, 4, 2, 8), 3, "bfloat16", 2, 4),  # both images in one program
        ((1, 6, 2, 8), 3, "float32", 1, 3),  # an image in two programs
        ((2, 1, 1, 8), 1, "bfloat16", 1, 1),
    ],
)
def test_kernels(shape, k, dtype, images, rows, monkeypatch):
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 1 if images > 1 else 4)
    monkeypatch.setattr(pallas_gpu, "FEWEST_ROWS", 3)
    work = pallas_gpu.cut(shape, jnp.dtype(dtype), k)
    assert (work.images, work.rows) == (images, rows)
    with tracing_for("gpu", interpret=gpu_interpreter()):
        assert_as_exact_as_shifted(make_inputs(dtype, shape, k), "pallas_gpu")


@interpreted
def test_kernels_do_not_race_and_repeat_bitwise(monkeypatch):
    """Every row of shared memory is used again, in the second image too."""
    monkeypatch.setattr(pallas_gpu, "PROGRAMS", 1)
    monkeypatch.setattr(pallas_gpu, "MOST_AHEAD", 1)
    shape = (2, 6, 3, 8)
    work = pallas_gpu.cut(shape, jnp.dtype("float32"), 3)
    assert work.images == 2
    assert work.slots < work.rows
    inputs = make_inputs("float32", shape, 3)
    with tracing_for("gpu", interpret=gpu_interpreter(detect_races=True)):
        first, second = (computed(inputs, "pallas_gpu") for _ in range(2))
    for name, value in first.items():
        assert np.asarray(value).tobytes() == np.asarray(second[name]).tobytes()
    assert_close(first, expected(*inputs), "float32")


@pytest.mark.parametrize("k", [3, 5])
def test_shifted_form_for_gpus(k):
    """XLA is given another form of the kernel's gradient there; a size traced only here."""
    inputs = make_inputs("float32", (2, 4, 6, 2), k)
    with tracing_for("gpu"):
        assert_close(computed(inputs, "shifted"), expected(*inputs), "float32")


def shapes(shape, k, dtype="bfloat16"):
    x = jax.ShapeDtypeStruct(shape, dtype)
    channels = jax.ShapeDtypeStruct(shape[3:], jnp.float32)
    return x, jax.ShapeDtypeStruct((k, k, shape[3]), jnp.float32), channels, x


@pytest.mark.parametrize(
    ("shape", "k"),
    [((64, 16, 16, 1152), 5), ((8, 64, 64, 1152), 5), ((4, 32, 32, 5760), 3), ((1, 8, 8, 64), 5)],
)
def test_lowers_for_cuda(shape, k):
    """Two kernels with gradients, of which neither needs copies of an image."""
    with cuda(), tracing_for("gpu"):
        traced = value_and_vjp.trace(*shapes(shape, k), "pallas_gpu")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert "stablehlo.pad" not in text


def test_lowers_for_cuda_on_a_mesh():
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    auto = (AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh), tracing_for("gpu"):
        traced = value_and_vjp.trace(*shapes((4, 8, 8, 64), 3), "pallas_gpu")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 2
    assert "tensor<2x8x8x64xbf16>" in text  # half of the 4 images
    assert "all_reduce" in text  # of the kernel's gradient


def chosen(shape, k=3, dtype="bfloat16", **options):
    """Names of the implementations that `depthwise_conv` takes."""
    x, kernel, _, _ = shapes(shape, k, dtype)
    with recording_choices() as choices:
        jax.eval_shape(lambda x, kernel: depthwise_conv(x, kernel, **options), x, kernel)
    return choices["depthwise convolution"]


def test_has_to_be_named_or_preferred(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    with cuda(), tracing_for("gpu"):
        assert chosen((64, 16, 16, 128)) == {"shifted"}
        assert chosen((64, 16, 16, 128), implementation="pallas_gpu") == {"pallas_gpu"}
        assert chosen((1, 2, 2, 128), prefer="pallas_gpu") == {"pallas_gpu"}
        assert chosen((1, 2, 2, 4), prefer="pallas_gpu") == {"shifted"}, "it cannot run"
    with tracing_for("tpu"):
        assert chosen((64, 16, 16, 128)) == {"pallas_tpu"}
        assert chosen((64, 16, 16, 128), prefer="pallas_gpu") == {"pallas_tpu"}
        assert chosen((1, 2, 2, 128), prefer="pallas_tpu") == {"pallas_tpu"}
        assert chosen((64, 16, 16, 128), prefer="xla") == {"shifted"}
    with pytest.raises(UserError, match="did you mean 'pallas_gpu'"):
        chosen((1, 2, 2, 128), prefer="palas_gpu")


def test_what_the_kernels_cannot_run(monkeypatch):
    def message(shape=(2, 4, 4, 64), dtype="bfloat16", k=3):
        with pytest.raises(UserError) as error:
            chosen(shape, k, dtype, implementation="pallas_gpu")
        assert "\n" not in str(error.value)
        assert "'shifted'" in str(error.value)
        return str(error.value)

    assert "traced for cpu" in message()
    with tracing_for("gpu"):
        assert "bfloat16 and float32" in message(dtype="float16")
        assert "nothing" in message((0, 4, 4, 64))
        assert "12 channels of bfloat16: it runs for multiples of 8" in message((2, 4, 4, 12))
        assert "up to 7 x 7" in message(k=9)
        assert "rows of 192 pixels in float32" in message((1, 4, 192, 64), "float32")
        assert "rows of 300 pixels" in message((1, 4, 300, 64))

        class Blackwell:
            compute_capability, device_kind = "10.0", "NVIDIA B200"

        monkeypatch.setattr(platform.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(platform.jax, "devices", lambda: [Blackwell()])
        assert "NVIDIA B200 has 10.0" in message()
        Blackwell.compute_capability = "9.0"
        assert pallas_gpu.unsupported(jnp.ones((2, 4, 4, 64)), jnp.ones((3, 3, 64))) is None
