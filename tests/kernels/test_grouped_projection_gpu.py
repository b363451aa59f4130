"""The Mosaic GPU kernels of the grouped projection: interpreted on a CPU, and lowered for CUDA.

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
from dydilit_jax.kernels.grouped_projection import gpu_kernels, pallas_gpu
from dydilit_jax.kernels.grouped_projection.api import grouped_projection
from dydilit_jax.kernels.platform import tracing_for
from tests.kernels.test_dydila_gpu import gpu_interpreter, interpreted
from tests.kernels.test_dydila_gpu_lowered import cuda
from tests.kernels.test_grouped_projection import (
    Case,
    assert_as_exact_as_dense,
    assert_close,
    project,
    value_and_vjp,
)


@interpreted
@pytest.mark.parametrize(
    ("banks", "tokens", "routing", "widths", "straight_through"),
    [
        (3, 200, "random", (136, 72), True),  # the second tile of channels is not whole
        (3, 200, "empty bank", (72, 136), False),
        (2, 1, "random", (8, 64), True),
        (4, 129, "one bank", (64, 8), False),
    ],
)
def test_kernels(banks, tokens, routing, widths, straight_through):
    case = Case("bfloat16", banks, tokens, routing, widths=widths)
    with tracing_for("gpu", interpret=gpu_interpreter()):
        results = assert_as_exact_as_dense(case, straight_through, "pallas_gpu")
    if routing != "random":
        unused = np.setdiff1d(np.arange(banks), case.index)
        assert len(unused)
        assert not np.any(np.asarray(results["dbank"])[unused])


@interpreted
def test_kernels_do_not_race_and_repeat_bitwise(monkeypatch):
    """Three steps of a product and two buffers: one is used again."""
    monkeypatch.setattr(gpu_kernels, "SLOTS", 2)
    case = Case("bfloat16", 2, 70, widths=(136, 136))
    with tracing_for("gpu", interpret=gpu_interpreter(detect_races=True)):
        first, second = (case.computed(True, "pallas_gpu") for _ in range(2))
    for name, value in first.items():
        assert np.asarray(value).tobytes() == np.asarray(second[name]).tobytes()
    assert_close(first, case.expected(True), "bfloat16")


def shapes(tokens, widths, dtype="bfloat16"):
    D, E = widths
    return (
        jax.ShapeDtypeStruct((*tokens, D), dtype),
        jax.ShapeDtypeStruct((3, D, E), jnp.float32),
        jax.ShapeDtypeStruct((*tokens, 3), jnp.float32),
        jax.ShapeDtypeStruct(tokens, jnp.int32),
        jax.ShapeDtypeStruct((*tokens, E), dtype),
    )


@pytest.mark.parametrize(
    ("tokens", "widths", "straight_through"),
    [
        (256, (1152, 1152), True),
        (1024, (1152, 288), False),  # XL's bank, its columns over four devices
        (1024, (1152, 576), True),
        (16384, (72, 72), True),
    ],
)
def test_lowers_for_cuda(tokens, widths, straight_through):
    """Three kernels with gradients, and no product of XLA's."""
    with cuda(), tracing_for("gpu"):
        traced = value_and_vjp.trace(*shapes((tokens,), widths), straight_through, "pallas_gpu")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "dot_general" not in text


def test_lowers_for_cuda_on_a_mesh():
    gpu = AbstractDevice("NVIDIA H200", 132, "gpu")
    auto = (AxisType.Auto,)
    mesh = AbstractMesh((2,), ("data",), axis_types=auto, abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh), tracing_for("gpu"):
        traced = value_and_vjp.trace(*shapes((4, 64), (128, 128)), True, "pallas_gpu")
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 3
    assert "tensor<128x128xbf16>" in text  # half of the 256 tokens
    assert "all_reduce" in text  # of the bank's gradient


def test_has_to_be_named():
    def program():
        def forward(x, bank, weights, index):
            return grouped_projection(x, bank, weights, index, straight_through=True)

        return str(jax.make_jaxpr(forward)(*shapes((4096,), (128, 128))[:4]))

    with cuda(), tracing_for("gpu"):
        assert "mosaic_gpu" not in program()


def test_what_the_kernels_cannot_run(monkeypatch):
    def message(tokens=4, dtype="bfloat16", banks=3):
        x, bank = jnp.ones((tokens, 64), dtype), jnp.ones((banks, 64, 64))
        weights, index = jnp.ones((tokens, banks)), jnp.zeros(tokens, jnp.int32)
        with pytest.raises(UserError) as error:
            project(x, bank, weights, index, True, "pallas_gpu")
        assert "\n" not in str(error.value)
        assert "'dense'" in str(error.value)
        return str(error.value)

    assert "traced for cpu" in message()
    with tracing_for("gpu"):
        assert "float32, which the tensor cores would round" in message(dtype="float32")
        assert "17 banks: it runs for up to 16" in message(banks=17)
        assert "no tokens" in message(tokens=0)

        class Blackwell:
            compute_capability, device_kind = "10.0", "NVIDIA B200"

        monkeypatch.setattr(platform.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(platform.jax, "devices", lambda: [Blackwell()])
        assert "Hopper" in message()
        assert "NVIDIA B200 has 10.0" in message()
        Blackwell.compute_capability = "9.0"
        assert pallas_gpu.unsupported(jnp.ones((4, 64), "bfloat16"), jnp.ones((3, 64, 64))) is None
