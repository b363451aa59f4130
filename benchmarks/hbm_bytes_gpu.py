"""Count the HBM bytes of the DyDiLA core's GPU kernels from programs lowered for CUDA.

    python -m benchmarks.hbm_bytes_gpu [--widths 72 288 --json FILE]

Needs neither a GPU nor its compiler: nothing is compiled and nothing is run. The unit is
X = B H N d 2 bytes, one bfloat16 activation. Counted are the operands and results of every Mosaic
GPU kernel in the lowered programs of the whole core, forward, and backward as a function of what
forward saves, and those of XLA's operations between them on arrays of all tokens and channels, such
as padding, as if none was fused. What a kernel reads again is counted once (programs that share a
head's tokens run side by side, and are served by the L2 cache).

With `--gpu_target FILE`, a GPU's description as XLA writes it, and jax[cuda12] installed, the whole
core is also compiled for that GPU, which need not be there, and counted, kernels and what XLA makes
apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax._src.mesh import AbstractDevice, AbstractMesh
from jax.experimental import topologies

from benchmarks import hbm_bytes
from benchmarks.attention import Attention, dydila, relu
from dydilit_jax.kernels.platform import tracing_for

RESULTS = Path(__file__).parent / "results"
ITEM_BYTES = {"bf16": 2, "f32": 4, "i32": 4, "i1": 1}
TENSOR = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
# Operations that name memory without moving any of it.
FREE = ("reshape", "constant", "iota")
KINDS = ("activations", "state", "scalars", "around the kernels")


def lowered(
    attend: Attention, arrays: dict[str, Any], *, multiprocessors: int = 132
) -> dict[str, str]:
    """StableHLO for CUDA of the forward and the backward program of a core.

    Args:
      attend: of a dict of arrays.
      arrays: their shapes.
      multiprocessors: of the GPU that newer JAX wants to know.
    """
    gpu = AbstractDevice("NVIDIA H200", multiprocessors, "gpu")
    scope: Any = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):
        scope = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=gpu))
    texts = {}
    with scope, tracing_for("gpu"):
        programs = hbm_bytes.programs(attend, arrays)
        for name in ("forward", "backward"):
            function, given = programs[name]
            traced = jax.jit(function).trace(*given)
            texts[name] = traced.lower(lowering_platforms=("cuda",)).as_text()
    return texts


def kind_of(shape: tuple[int, ...], batch: int, tokens: int, heads: int, width: int) -> str:
    """What an array is: of all tokens and channels, a head's d x d or d, or scalars of tokens."""
    if shape[:1] == (batch,) and math.prod(shape[1:]) >= tokens * heads * width:
        return "activations"
    if shape[:1] == (batch * heads,) and width <= shape[-1] < 2 * width + 64:
        return "state"
    return "scalars"


def moved_bytes(text: str, batch: int, tokens: int, heads: int, width: int) -> dict[str, int]:
    """Bytes of the kernels' operands and results by kind, and of what XLA does around them."""
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"\s*func\.func \w+ @(\w+)", line):
            functions[head[1]] = lines = []
        elif " = " in line:
            lines.append(line)

    def of(function: str) -> dict[str, int]:
        total = dict.fromkeys(KINDS, 0)
        for line in functions[function]:
            if called := re.search(r" = (?:func\.)?call @(\w+)", line):
                for kind, size in of(called[1]).items():
                    total[kind] += size
                continue
            operation = re.search(r" = \"?stablehlo\.(\w+)", line)
            if operation is None or operation[1] in FREE:
                continue
            if " : " not in line:
                raise ValueError(f"cannot count the bytes of {line.strip()}")
            kernel = "custom_call @mosaic_gpu" in line
            types = line[line.rindex(" : ") :]
            if not kernel and "->" not in types:  # one type for the operands and the result
                operands = line[: line.rindex(" : ")].partition(" = ")[2].count("%")
                types *= operands + 1
            for sizes, item in TENSOR.findall(types):
                shape = tuple(int(size) for size in sizes.split("x") if size)
                kind = kind_of(shape, batch, tokens, heads, width)
                size = ITEM_BYTES[item] * math.prod(shape)
                if kernel:
                    total[kind] += size
                elif kind == "activations":
                    total["around the kernels"] += size
        return total

    return of("main")


def compiled(
    target: str, batch: int, tokens: int, heads: int, width: int
) -> dict[str, dict[str, float]]:
    """Units X of the whole core compiled for a GPU: of kernels, and of everything XLA runs.

    Args:
      target: description of the GPU, text of XLA's GpuTargetConfigProto.
      batch, tokens, heads, width: B, N, H and d.
    """
    devices = topologies.get_topology_desc(
        platform="cuda", topology_name="cuda:1x1x1", topology="1x1x1", target_config=target
    ).devices
    arrays = hbm_bytes.arrays_on(devices[0], batch, tokens, heads, width, True)
    unit = 2 * batch * tokens * heads * width
    counted = {}
    mesh = arrays["value"].sharding.mesh.abstract_mesh
    for implementation in ("pallas_gpu", "xla"):
        with jax.sharding.use_abstract_mesh(mesh), tracing_for("gpu"):
            programs = hbm_bytes.programs(dydila(implementation, heads), arrays)
            for name in ("forward", "backward"):
                function, given = programs[name]
                traced = jax.jit(function).trace(*given)
                text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()
                total, by_opcode = hbm_bytes.moved_bytes(text)
                kernels = by_opcode.get("custom-call", 0)
                counted[f"{implementation} {name}"] = {
                    "kernels": kernels / unit,
                    "by XLA": (total - kernels) / unit,
                }
    return counted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[72, 288])
    parser.add_argument("--model_width", type=int, default=1152)
    parser.add_argument("--batch_tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path, default=RESULTS / "hbm_bytes_gpu.json")
    parser.add_argument("--gpu_target", type=Path, help="compile the whole core for this GPU")
    options = parser.parse_args(arguments)

    cases: list[dict[str, Any]] = []
    for width in options.widths:
        for tokens in options.tokens:
            heads, batch = options.model_width // width, options.batch_tokens // tokens
            unit = 2 * batch * tokens * heads * width
            shape = batch, tokens, heads, width
            rows = {"DyDiLA": dydila("pallas_gpu", heads), "relu core": relu(heads, "pallas_gpu")}
            for row, attend in rows.items():
                arrays = hbm_bytes.arrays_on(None, *shape, row == "DyDiLA")
                print(f"d {width} N {tokens} {row}, units X of kernel operands and results:")
                for name, text in lowered(attend, arrays).items():
                    moved = moved_bytes(text, *shape)
                    units = {kind: size / unit for kind, size in moved.items()}
                    parts_of = ", ".join(f"{x:.2f} {kind}" for kind, x in units.items())
                    print(f"  {name:<10}{sum(units.values()):6.2f}: {parts_of}")
                    cases.append(
                        {"core": row, "program": name, "batch": batch, "tokens": tokens}
                        | {"heads": heads, "width": width, "units": units}
                    )
            if options.gpu_target is not None:
                target = options.gpu_target.read_text()
                for name, units in compiled(target, *shape).items():
                    parts_of = ", ".join(f"{x:.2f} {kind}" for kind, x in units.items())
                    print(f"  compiled whole, {name:<20}{sum(units.values()):7.2f}: {parts_of}")
                    cases.append(
                        {"core": "DyDiLA, compiled whole", "program": name, "batch": batch}
                        | {"tokens": tokens, "heads": heads, "width": width, "units": units}
                    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "jax": jax.__version__,
        "counted": "operands and results in programs lowered, or compiled, for CUDA; no GPU",
        "cases": cases,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
