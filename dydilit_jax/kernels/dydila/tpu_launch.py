"""Blocks, grids and scratch of the TPU kernels: how the arrays of a call reach VMEM.

Grid (cores, sequences of a core, phases, blocks). The first axis is parallel: chips whose two cores
act as one (v4, v5p) split it, others run it in order. A tensor that only one phase reads keeps one
block index through the other, so it is fetched once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dydilit_jax.kernels.dydila.tpu_blocks import SUBLANES, Plan, Refs
from dydilit_jax.kernels.platform import target

MIB = 2**20
# Of the 64 MiB of VMEM that v5p and TPU7x have a core (v5e, v6e: 128).
VMEM_BUDGET = 44 * MIB

Spec = tuple[jax.ShapeDtypeStruct, pl.BlockSpec]


class Layout:
    """Shapes and block specifications of a launch of `phases` phases."""

    def __init__(self, plan: Plan, phases: int):
        self.plan, self.phases = plan, phases
        self.cores = 2 if plan.batch % 2 == 0 else 1
        self.grid = (self.cores, plan.batch // self.cores, phases, plan.blocks)

    def sequence(self, core: Any, index: Any) -> Any:
        """Which of the B sequences."""
        return core * (self.plan.batch // self.cores) + index

    def block(self, phase: int) -> Callable[[Any, Any], Any]:
        """Index of a block along the tokens for a tensor that is used in `phase`."""
        last = self.plan.blocks - 1
        if self.phases == 1:
            return lambda p, i: i
        if phase == 0:
            return lambda p, i: i + p * (last - i)
        return lambda p, i: p * i

    def activations(self, phase: int, dtype: Any = None) -> Spec:
        """(B, H, d, N)."""
        plan, block = self.plan, self.block(phase)
        return (
            jax.ShapeDtypeStruct(
                (plan.batch, plan.heads, plan.head_width, plan.tokens), dtype or plan.dtype
            ),
            pl.BlockSpec(
                (1, plan.heads, plan.head_width, plan.block),
                lambda c, b, p, i: (self.sequence(c, b), 0, 0, block(p, i)),
            ),
        )

    def rows(self, phase: int, count: int) -> Spec:
        """(B, count, N) float32."""
        plan, block = self.plan, self.block(phase)
        return (
            jax.ShapeDtypeStruct((plan.batch, count, plan.tokens), jnp.float32),
            pl.BlockSpec(
                (1, count, plan.block), lambda c, b, p, i: (self.sequence(c, b), 0, block(p, i))
            ),
        )

    def head_rows(self, phase: int) -> Spec:
        """(B, H, 1, N) float32."""
        plan, block = self.plan, self.block(phase)
        return (
            jax.ShapeDtypeStruct((plan.batch, plan.heads, 1, plan.tokens), jnp.float32),
            pl.BlockSpec(
                (1, plan.heads, 1, plan.block),
                lambda c, b, p, i: (self.sequence(c, b), 0, 0, block(p, i)),
            ),
        )

    def per_sequence(self, rows: int, dtype: Any) -> Spec:
        """(B, H, rows, d): one block for a sequence."""
        shape = (self.plan.heads, rows, self.plan.head_width)
        return (
            jax.ShapeDtypeStruct((self.plan.batch, *shape), dtype),
            pl.BlockSpec((1, *shape), lambda c, b, p, i: (self.sequence(c, b), 0, 0, 0)),
        )

    def per_core(self, *shape: int) -> Spec:
        """(cores, *shape) float32: a sum over the sequences of a core."""
        zeros = (0,) * len(shape)
        return (
            jax.ShapeDtypeStruct((self.cores, *shape), jnp.float32),
            pl.BlockSpec((1, *shape), lambda c, b, p, i: (c, *zeros)),
        )

    def whole(self, *shape: int, dtype: Any = jnp.float32) -> Spec:
        """A small array, all of it."""
        zeros = (0,) * len(shape)
        return (
            jax.ShapeDtypeStruct(shape, dtype),
            pl.BlockSpec(shape, lambda c, b, p, i: zeros),
        )


class Call(NamedTuple):
    """Everything of a launch but its arrays."""

    layout: Layout
    inputs: dict[str, Spec]
    outputs: dict[str, Spec]
    scratch: dict[str, Any]


def padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM, whose last two dimensions are tiled."""
    size = jnp.dtype(dtype).itemsize
    rows, lanes = shape[-2:]
    tile = SUBLANES * (4 // size)
    padded = pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, 128) * 128
    return math.prod(shape[:-2]) * padded * size


def vmem_bytes(specs: list[Spec], scratch: dict[str, Any]) -> int:
    """VMEM of a launch: two buffers of each block, and scratch."""
    total = 0
    for array, spec in specs:
        assert spec.block_shape is not None
        shape = tuple(int(size) for size in spec.block_shape)  # type: ignore[arg-type]
        total += 2 * padded_bytes(shape, array.dtype)
    return total + sum(padded_bytes(s.shape, s.dtype) for s in scratch.values())


def launch(
    name: str, call: Call, body: Callable[[Plan, Refs], None], arrays: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Runs a kernel on those of `arrays` that it names; `body` finds its references by name."""
    layout, inputs, outputs, scratch = call
    names = [*inputs, *outputs, *scratch]

    def kernel(*refs: Any) -> None:
        body(layout.plan, dict(zip(names, refs, strict=True)))

    needed = vmem_bytes([*inputs.values(), *outputs.values()], scratch)
    results = pl.pallas_call(
        kernel,
        grid=layout.grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
            # What the compiler adds (spilled registers, its own scratch) is not known beforehand.
            vmem_limit_bytes=needed + 12 * MIB,
        ),
        interpret=target().interpret,
        name=name,
    )(*(arrays[key] for key in inputs))
    return dict(zip(outputs, results, strict=True))
