"""The projection's and the depthwise convolution's TPU kernels, compiled without the hardware.

What the compiler makes of them is looked at: the kernels and nothing else of the activations' size,
the bytes they move, and that they fit into the memory of every chip.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-tpu-compile")

from benchmarks.compiled import (
    compile_for,
    depthwise,
    depthwise_shapes,
    projection,
    projection_shapes,
    read_program,
)
from dydilit_jax.kernels.platform import tracing_for

CHIPS = ["v5e", "v5p", "v6e"]
TOKENS, WIDTH, BANKS = 65_536, 1152, 3
ROWS = TOKENS * WIDTH * 2  # bytes of the tokens
BANK = BANKS * WIDTH * WIDTH * 4


def assert_nothing_but_kernels(program, kernels, activation):
    """The kernels, and no copy, fusion or temporary of the size of an activation."""
    assert sorted(program.kernels) == sorted(kernels)
    assert max(program.copies, default=0) < activation / 8
    assert program.other_bytes < activation
    assert program.temporary_bytes < activation


@pytest.mark.parametrize("chip", CHIPS)
def test_projection_forward(chip):
    project, _ = projection(True, "pallas_tpu")
    program = compile_for(chip, project, projection_shapes(TOKENS, WIDTH, BANKS)[:-1])
    assert_nothing_but_kernels(program, ["grouped_projection"], ROWS)
    assert program.kernel_bytes[0] <= 2 * ROWS + BANK / 2 + 2e6
    assert program.gigabytes < 0.35


@pytest.mark.parametrize(
    ("chip", "straight_through"), [*((chip, True) for chip in CHIPS), ("v5p", False)]
)
def test_projection_backward(chip, straight_through):
    """dx and the weights' gradient in one kernel, the bank's in the other: both read x and dy."""
    _, gradients = projection(straight_through, "pallas_tpu")
    program = compile_for(chip, gradients, projection_shapes(TOKENS, WIDTH, BANKS))
    first = "grouped_projection_dx" if straight_through else "grouped_projection"
    assert_nothing_but_kernels(program, [first, "grouped_projection_dbank"], ROWS)
    assert sum(program.kernel_bytes) <= 5 * ROWS + 2.5 * BANK + 4e6
    assert program.gigabytes < 0.9


@pytest.mark.parametrize(
    ("tokens", "width", "banks"), [(300, 384, 2), (4096, 1024, 3), (2048, 1152, 5)]
)
def test_projection_of_other_sizes(tokens, width, banks):
    """Also a last block that is not full, and the smallest memory of the three."""
    project, gradients = projection(True, "pallas_tpu")
    shapes = projection_shapes(tokens, width, banks)
    assert compile_for("v5p", project, shapes[:-1]).kernels == ["grouped_projection"]
    assert len(compile_for("v5p", gradients, shapes).kernels) == 2


@pytest.mark.parametrize("chip", CHIPS)
def test_depthwise(chip):
    """Forward x read and y written; backward x and dy read, dx written, each once."""
    convolve, gradients = depthwise("pallas_tpu")
    shape = (256, 16, 16, 1152)
    image = 2 * 256 * 16 * 16 * 1152
    forward = compile_for(chip, convolve, depthwise_shapes(shape, 5)[:-1])
    assert_nothing_but_kernels(forward, ["depthwise"], image)
    assert sum(forward.kernel_bytes) <= 2 * image + 1e6
    backward = compile_for(chip, gradients, depthwise_shapes(shape, 5))
    assert_nothing_but_kernels(backward, ["depthwise_backward"], image)
    assert sum(backward.kernel_bytes) <= 3 * image + 1e6


@pytest.mark.parametrize(
    ("shape", "k"), [((8, 32, 32, 5760), 3), ((2, 128, 128, 256), 5), ((3, 9, 7, 128), 5)]
)
def test_depthwise_of_other_sizes(shape, k):
    """Mix-FFN's hidden width, the largest grid, and sizes that no tile divides."""
    convolve, gradients = depthwise("pallas_tpu")
    assert compile_for("v5p", convolve, depthwise_shapes(shape, k)[:-1]).kernels == ["depthwise"]
    backward = compile_for("v5p", gradients, depthwise_shapes(shape, k))
    assert backward.kernels == ["depthwise_backward"]


def test_float32_compiles():
    project, gradients = projection(False, "pallas_tpu")
    shapes = [
        s if s.dtype != jnp.bfloat16 else s.update(dtype=jnp.float32)
        for s in projection_shapes(1024, 256, 3)
    ]
    assert compile_for("v5e", project, shapes[:-1]).kernels == ["grouped_projection"]
    assert len(compile_for("v5e", gradients, shapes).kernels) == 2


def test_the_default_on_a_mesh_of_eight():
    """Tokens split over batch and sequence, banks over fsdp: each device runs its own tokens."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    axes = ("data", "fsdp", "sequence")
    devices: np.ndarray = np.array(topology.devices).reshape(2, 2, 2)
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 3)

    def split(array, *partition):
        sharding = NamedSharding(mesh, P(*partition))
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

    x, bank, weights, index, dy = (
        s if len(s.shape) == 3 else s.update(shape=(16, 1024, *s.shape[1:]))
        for s in projection_shapes(16_384, 384, 3)
    )
    batch = ("data", "fsdp")
    tokens = [split(a, batch, "sequence") for a in (x, weights, index, dy)]
    _, gradients = projection(True, None)
    with jax.set_mesh(mesh), tracing_for("tpu"):
        traced = jax.jit(lambda *a: gradients(*a)).trace(
            tokens[0], split(bank, None, "fsdp"), *tokens[1:]
        )
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    program = read_program(compiled)
    assert sorted(program.kernels) == ["grouped_projection_dbank", "grouped_projection_dx"]
    text = compiled.as_text()
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-to-all" not in text
