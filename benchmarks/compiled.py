"""Compile the projection and the depthwise convolution for TPUs that are not there; count bytes.

    pip install "jax[tpu]" && python -m benchmarks.compiled [--json FILE] [--chips v5e v5p v6e]

For a program compiled ahead of time, bytes are what its kernels and fusions read from and write to
memory: of a Pallas call its operands and results, of the rest the compiler's own account. Rows: the
kernels, and the best XLA form on a TPU. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Read when libtpu is loaded: no metadata server is asked, and several processes may compile.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dydilit_jax.kernels.depthwise.api import depthwise_conv
from dydilit_jax.kernels.grouped_projection.api import grouped_projection
from dydilit_jax.kernels.platform import tracing_for

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

Operation = Callable[..., Any]


class Program(NamedTuple):
    """What a compiled program consists of.

    Attributes:
      kernels: names of its Pallas calls.
      kernel_bytes: operands and results of each.
      other_bytes: read and written by everything else, as the compiler counts.
      copies: bytes of each copy of an array in memory.
      temporary_bytes: memory besides arguments and results.
    """

    kernels: list[str]
    kernel_bytes: list[int]
    other_bytes: int
    copies: list[int]
    temporary_bytes: int

    @property
    def gigabytes(self) -> float:
        """Everything read or written, in 10^9 bytes."""
        return (sum(self.kernel_bytes) + self.other_bytes) / 1e9


def compile_for(chip: str, operation: Operation, shapes: Sequence[jax.ShapeDtypeStruct]) -> Program:
    """Compile a function of arrays for one device of a chip that is not attached.

    Args:
      chip: a key of TOPOLOGIES.
      operation: the function; implementations are chosen as on a TPU.
      shapes: its arguments.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    sharding = NamedSharding(Mesh(np.array(topology.devices[:1]), ("data",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    with tracing_for("tpu"):
        # A function of its own, so that nothing traced for another platform is found again.
        traced = jax.jit(lambda *arrays: operation(*arrays)).trace(*arguments)
    return read_program(traced.lower(lowering_platforms=("tpu",)).compile())


def read_program(compiled: Any) -> Program:
    """Count a compiled program."""
    kernels, kernel_bytes, copies = [], [], []
    for line in compiled.as_text().splitlines():
        rest = line.partition(" = ")[2]
        if 'custom_call_target="tpu_custom_call"' in rest:
            result, _, operands = rest.partition(" custom-call(")
            kernels.append(_group(r'(\w+)\)*/pallas_call"', operands))
            operands = _group(r"operand_layout_constraints=\{(.*?)\}, \w+=", operands)
            kernel_bytes.append(_shape_bytes(result) + _shape_bytes(operands))
        elif re.match(r"\S+ copy\(", rest):
            copies.append(_shape_bytes(rest.partition(" copy(")[0]))
    analysis = compiled.cost_analysis() or {}
    return Program(
        kernels,
        kernel_bytes,
        round(analysis.get("bytes accessed", 0)),
        copies,
        compiled.memory_analysis().temp_size_in_bytes,
    )


def _group(pattern: str, text: str) -> str:
    """The first group of a pattern that a Pallas call's HLO has."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} is not in the HLO of a kernel: {text[:200]}")
    return match[1]


def _shape_bytes(text: str) -> int:
    """Bytes of all shapes such as bf16[8,128] in a piece of HLO."""
    return sum(
        ITEMSIZE[kind] * math.prod(int(size) for size in sizes.split(",") if size)
        for kind, sizes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    )


def projection(straight_through: bool, implementation: str | None) -> tuple[Operation, Operation]:
    """The projection of (x, bank, weights, index), and its gradients of (..., dy)."""

    def project(x: Any, bank: Any, weights: Any, index: Any) -> Any:
        return grouped_projection(
            x,
            bank,
            weights,
            index,
            straight_through=straight_through,
            implementation=implementation,
        )

    def gradients(x: Any, bank: Any, weights: Any, index: Any, dy: Any) -> Any:
        return jax.vjp(lambda x, bank, w: project(x, bank, w, index), x, bank, weights)[1](dy)

    return project, gradients


def depthwise(implementation: str | None) -> tuple[Operation, Operation]:
    """The convolution of (x, kernel, bias), and its gradients of (..., dy)."""
    convolve = partial(depthwise_conv, implementation=implementation)

    def gradients(x: Any, kernel: Any, bias: Any, dy: Any) -> Any:
        return jax.vjp(convolve, x, kernel, bias)[1](dy)

    return convolve, gradients


def projection_shapes(tokens: int, width: int, banks: int) -> list[jax.ShapeDtypeStruct]:
    """Arguments x, bank, weights, index, dy."""
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    return [
        x,
        jax.ShapeDtypeStruct((banks, width, width), jnp.float32),
        jax.ShapeDtypeStruct((tokens, banks), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        x,
    ]


def depthwise_shapes(shape: tuple[int, ...], k: int) -> list[jax.ShapeDtypeStruct]:
    """Arguments x, kernel, bias, dy."""
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return [
        x,
        jax.ShapeDtypeStruct((k, k, shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
        x,
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=list(TOPOLOGIES), default=["v5e"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)

    tokens = projection_shapes(65_536, 1152, 3)
    images = depthwise_shapes((256, 16, 16, 1152), 5)
    rows: dict[str, tuple[Operation, list[jax.ShapeDtypeStruct]]] = {}
    for name in ("pallas_tpu", "dense"):
        project, gradients = projection(True, name)
        rows[f"projection forward, {name}"] = (project, tokens[:-1])
        rows[f"projection backward, straight-through, {name}"] = (gradients, tokens)
        rows[f"projection backward, switch, {name}"] = (projection(False, name)[1], tokens)
    for name in ("pallas_tpu", "shifted"):
        convolve, gradients = depthwise(name)
        rows[f"depthwise forward, {name}"] = (convolve, images[:-1])
        rows[f"depthwise backward, {name}"] = (gradients, images)

    print("65,536 tokens x 1152, 3 banks; 256 x 16 x 16 x 1152 by 5 x 5; bfloat16; GB moved")
    figures: dict[str, dict[str, float]] = {}
    for name, (operation, shapes) in rows.items():
        programs = {chip: compile_for(chip, operation, shapes) for chip in options.chips}
        figures[name] = {chip: round(program.gigabytes, 3) for chip, program in programs.items()}
        print(f"{name:<52}" + "".join(f"{c:>6}{figures[name][c]:8.3f}" for c in options.chips))
    if options.json is not None:
        record = {"jax": jax.__version__, "unit": "GB", "moved": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
