"""The attention core's TPU kernels, compiled without the hardware.

One custom call a direction, at any length; activations of the layout that a projection gives them,
so nothing is copied or transposed in memory; no temporary but the state; bytes near the floors, 6
and 11 activations. Compilation fails where a kernel does not fit in a chip's VMEM.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: make test-tpu-compile")

from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas
from dydilit_jax.kernels.platform import tracing_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
WIDTH, CHOICES = 1152, 9
WHOLE = P()


class Program(NamedTuple):
    """Pallas calls by name with the bytes of their operands and results, copies, temporaries."""

    kernels: dict[str, int]
    copies: list[int]
    temporary: int


def shape_bytes(text: str) -> int:
    return sum(
        BYTES[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    )


def compiled(function: Callable[..., Any], arguments: Any) -> Program:
    with tracing_for("tpu"):
        traced = jax.jit(function).trace(*arguments)
    program = traced.lower(lowering_platforms=("tpu",)).compile()
    kernels, copies = {}, []
    for line in program.as_text().splitlines():
        name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
        if 'custom_call_target="tpu_custom_call"' in rest:
            operands = re.search(r"operand_layout_constraints=\{(.*?)\}, \w+=", rest)
            assert operands is not None, rest[:200]
            moved = shape_bytes(rest.partition(" custom-call(")[0]) + shape_bytes(operands[1])
            called = re.search(r"dydila_[a-z_]*[a-z]", name)  # jvp_dydila_forward_.1, say
            assert called is not None, name
            assert called[0] not in kernels, f"two calls of {called[0]}"
            kernels[called[0]] = moved
        elif re.match(r"\S+ (copy|transpose)\(", rest):
            copies.append(shape_bytes(rest.partition("(")[0]))
    return Program(kernels, copies, program.memory_analysis().temp_size_in_bytes)


def device_mesh(chip: str) -> Mesh:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    return Mesh(np.array(topology.devices[:1]), ("data",), axis_types=(AxisType.Auto,))


def inputs_for(
    mesh: Mesh, batch: int, tokens: int, *, split: P = WHOLE, transposed: bool = False
) -> CoreInputs:
    """Shapes of DyDi-LiT-XL's core: activations (B, N, D), or transposed (B, D, N)."""

    def array(*shape: int, dtype: Any = jnp.float32, spec: P = WHOLE) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shape = (batch, WIDTH, tokens) if transposed else (batch, tokens, WIDTH)
    activation = array(*shape, dtype=jnp.bfloat16, spec=split)
    exponent = array(batch, tokens, spec=split)
    router = array(2 * WIDTH, CHOICES)
    return CoreInputs(
        *(activation,) * 3,
        exponents=Exponents(*(exponent,) * 4),
        query_redundant=activation,
        key_redundant=activation,
        lambdas=Lambdas(array(CHOICES), router, router),
    )


def core(options: CoreOptions, inputs: CoreInputs) -> tuple[jax.Array, Any]:
    result = dydila_core(inputs, options, implementation="pallas_tpu")
    return result.output, (result.denominator, result.routings)


ACTIVATIONS = ("query", "key", "value", "query_redundant", "key_redundant")


def swapped(inputs: CoreInputs) -> CoreInputs:
    return inputs._replace(**{n: getattr(inputs, n).swapaxes(1, 2) for n in ACTIVATIONS})


@pytest.mark.parametrize("tokens", [256, 1024, 16384])
@pytest.mark.parametrize("heads", [16, 4, 2], ids=lambda heads: f"d{WIDTH // heads}")
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_one_call_a_direction_and_nothing_else(chip: str, heads: int, tokens: int):
    """Given and wanted in the kernels' layout, a step is two calls and little arrays' work."""
    options = CoreOptions(heads=heads)
    batch = max(2, 4096 // tokens)

    def step(inputs: CoreInputs, gradient: jax.Array) -> Any:
        def attend(inputs: CoreInputs) -> jax.Array:
            return core(options, swapped(inputs))[0].swapaxes(1, 2)

        output, backward = jax.vjp(attend, inputs)
        return output, backward(gradient)

    inputs = inputs_for(device_mesh(chip), batch, tokens, transposed=True)
    program = compiled(step, (inputs, inputs.query))
    activation = batch * tokens * WIDTH * 2
    state = batch * WIDTH * (WIDTH // heads) * 2
    assert set(program.kernels) == {"dydila_forward", "dydila_backward"}
    assert max(program.copies, default=0) <= max(state, activation // 64)
    # The state in both orientations, the denominators and logits, the routers in rows.
    small = 16e6 if tokens == 16384 else 6e6
    assert program.temporary <= 2.2 * state + small
    # Rows of scalars are a few hundredths of an activation; routers and their gradients, 1 MB.
    allowance = 0.25 * activation + 1.5e6
    assert program.kernels["dydila_forward"] <= 6 * activation + state + allowance
    assert program.kernels["dydila_backward"] <= 11 * activation + state + allowance


@pytest.mark.parametrize("heads", [16, 4], ids=lambda heads: f"d{WIDTH // heads}")
def test_projections_give_the_layout(heads: int):
    """Between the projections and the core nothing of an activation's size is moved."""
    options = CoreOptions(heads=heads)
    mesh = device_mesh("v5e")
    inputs = inputs_for(mesh, 4, 1024)
    square = jax.ShapeDtypeStruct(
        (6, WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P())
    )

    def loss(weights: jax.Array, x: jax.Array, inputs: CoreInputs) -> jax.Array:
        projected = {n: x @ w for n, w in zip(ACTIVATIONS, weights[:5], strict=True)}
        mixed = core(options, inputs._replace(**projected))[0] @ weights[5]
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    program = compiled(jax.grad(loss, argnums=(0, 1)), (square, inputs.query, inputs))
    assert set(program.kernels) == {"dydila_forward", "dydila_backward"}
    # What is copied are D x D matrices out of the stacked weights, which is this test's own doing.
    activation = 4 * 1024 * WIDTH * 2
    assert max(program.copies, default=0) <= WIDTH * WIDTH * 2 < activation / 2


@pytest.mark.parametrize("sequence", [1, 2])
def test_on_a_mesh(sequence: int):
    """Batch over two axes; with the tokens split too, a phase is a call and the state is summed."""
    options = CoreOptions(heads=4)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    devices: np.ndarray = np.array(topology.devices).reshape(2, 4 // sequence, sequence)
    mesh = Mesh(devices, ("data", "fsdp", "sequence"), axis_types=(AxisType.Auto,) * 3)
    inputs = inputs_for(mesh, 16, 1024, split=P(("data", "fsdp"), "sequence"))

    def loss(inputs: CoreInputs) -> jax.Array:
        return jnp.sum(core(options, inputs)[0].astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        program = compiled(jax.grad(loss), (inputs,))
    if sequence == 1:
        assert set(program.kernels) == {"dydila_forward", "dydila_backward"}
    else:
        phases = {"dydila_state", "dydila_apply", "dydila_query_gradient", "dydila_key_gradient"}
        assert set(program.kernels) == phases


def test_plain_relu_core():
    """Without Q', K' and exponents the same code is the baselines' core: 4 and 7 activations."""
    options = CoreOptions(heads=16)
    full = inputs_for(device_mesh("v5e"), 4, 1024, transposed=True)
    inputs = CoreInputs(full.query, full.key, full.value)

    def step(inputs: CoreInputs, gradient: jax.Array) -> Any:
        def attend(inputs: CoreInputs) -> jax.Array:
            back = [x.swapaxes(1, 2) for x in inputs[:3]]
            return core(options, CoreInputs(back[0], back[1], back[2]))[0].swapaxes(1, 2)

        output, backward = jax.vjp(attend, inputs)
        return output, backward(gradient)

    program = compiled(step, (inputs, inputs.query))
    activation = 4 * 1024 * WIDTH * 2
    assert program.kernels["dydila_forward"] <= 4.3 * activation
    assert program.kernels["dydila_backward"] <= 7.3 * activation
