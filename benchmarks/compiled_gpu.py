"""Compile the depthwise convolution and the projection for a GPU that is not there; count bytes.

    pip install jax-cuda12-plugin jax-cuda12-pjrt     # of JAX's version; no GPU, no CUDA
    python -m benchmarks.compiled_gpu --gpu_target h100_sxm.txtpb [--json FILE]

The target is XLA's own description of the GPU (docs/compile.md). The unit is an activation, the
convolution's x or the projection's tokens in bfloat16. Counted are operands and results of every
fusion, kernel and library call of the compiled program, each once: what a fusion reads again comes
from a cache at best. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported: no GPU is looked for

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.compiled import depthwise, depthwise_shapes, projection, projection_shapes
from dydilit_jax.errors import UserError
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.training.costs import work
from dydilit_jax.training.hlo import parse, schedule
from dydilit_jax.training.topology import Topology, open_topology

IMAGES = {"64 x 16 x 16 x 1152": (64, 16, 16, 1152), "8 x 64 x 64 x 1152": (8, 64, 64, 1152)}
Row = tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]


def rows() -> dict[str, Row]:
    """The programs, each a function and its arguments' shapes, by name."""
    programs: dict[str, Row] = {}
    for size, shape in IMAGES.items():
        images = depthwise_shapes(shape, 5)
        for name in ("pallas_gpu", "shifted", "convolution"):
            convolve, gradients = depthwise(name)
            programs[f"depthwise {size} forward, {name}"] = (convolve, images[:-1])
            programs[f"depthwise {size} backward, {name}"] = (gradients, images)
    tokens = projection_shapes(65_536, 1152, 3)
    for name in ("pallas_gpu", "dense"):
        project, gradients = projection(True, name)
        programs[f"projection forward, {name}"] = (project, tokens[:-1])
        programs[f"projection backward, {name}"] = (gradients, tokens)
    return programs


def count(topology: Topology, row: Row) -> dict[str, float]:
    """Activations that the compiled program of a row moves, and that it needs room for besides."""
    function, shapes = row
    mesh = Mesh(topology.devices[:1], ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes]
    unit = math.prod(shapes[0].shape) * 2
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tracing_for("gpu"):
        # A function of its own, so that nothing traced for another platform is found again.
        traced = jax.jit(lambda *arrays: function(*arrays)).trace(*arguments)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
    module = parse(compiled.as_text())
    moved = sum(item.cost.bytes * item.times for item in work(module, schedule(module)))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"moved": round(moved / unit, 2), "temporary": round(temporary / unit, 2)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu_target", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)
    try:
        topology = open_topology("cuda:1x1x1", options.gpu_target)
    except UserError as error:
        raise SystemExit(str(error)) from None
    chip = topology.devices[0].device_kind
    print(f"compiled for {chip}; activations moved, and temporary ones")
    figures = {}
    for name, row in rows().items():
        if options.only in name:
            figures[name] = count(topology, row)
            print(f"{name:<52}{figures[name]['moved']:9.2f}{figures[name]['temporary']:9.2f}")
    if options.json is not None:
        record = {"jax": jax.__version__, "gpu": chip, "unit": "activations", "programs": figures}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
