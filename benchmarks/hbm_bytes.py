"""Count the HBM bytes of the DyDiLA core from programs compiled for a TPU that is not there.

    python -m benchmarks.hbm_bytes [--topologies v5e:2x2 v6e:2x2 --json FILE]

Needs libtpu (`pip install "jax[tpu]"`), no TPU. The unit is X = B H N d 2 bytes, one bfloat16
activation; a fused core with the difference inside moves at least 6 X forward and 11 X backward.
Counted are the bytes of the operands and results of every instruction of the compiled entry
computation, and of the bodies it calls; what is moved within a fusion or a kernel is not. A second
figure is XLA's own `bytes accessed`, which knows nothing of what custom calls move. Arguments and
results lie row by row here: copies to another layout are counted, and shown apart, because within a
model a neighbour may take them over.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.attention import Attention, dydila, relu
from dydilit_jax.errors import UserError
from dydilit_jax.kernels.dydila import api
from dydilit_jax.kernels.platform import tracing_for

RESULTS = Path(__file__).parent / "results"
ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2,
    "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
# Instructions that name memory without moving any of it.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "while", "conditional", "call",
}  # fmt: skip
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*)$")
OPCODE = re.compile(r"(?:^|[\s)}])([a-z][\w-]*)\(")


def shape_bytes(text: str) -> int:
    """Bytes in HBM of every array shape in a piece of HLO; those in space S(1), VMEM, are free."""
    total = 0
    for item, dimensions, layout in SHAPE.findall(text):
        if item not in ITEM_BYTES or "S(1)" in layout:
            continue
        size = ITEM_BYTES[item]
        for dimension in filter(None, dimensions.split(",")):
            size *= int(dimension)
        total += size
    return total


def wraps_kernel(hlo: str, instruction: str) -> bool:
    """Whether it is a fusion of a custom call with what only slices its operands or results."""
    called = re.search(r"\bcalls=(%[\w.-]+)", instruction)
    if called is None:
        return False
    body = hlo[hlo.index(f"\n{called[1]} (") :]
    return " custom-call(" in body[: body.index("\n}")]


def moved_bytes(hlo: str) -> tuple[int, dict[str, int]]:
    """Bytes of operands and results of the entry's instructions, and by opcode.

    Logical sizes: what a layout pads to tiles is not counted.
    """
    entry = hlo[hlo.index("\nENTRY ") :]
    entry = entry[: entry.index("\n}")]
    results: dict[str, str] = {}
    by_opcode: dict[str, int] = {}
    for line in entry.splitlines()[1:]:
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, rest = match.groups()
        opcode_match = OPCODE.search(rest)
        assert opcode_match is not None, line
        opcode = opcode_match.group(1)
        results[name] = rest[: opcode_match.start(1)]
        if opcode in FREE or opcode.endswith("-done"):
            if opcode in ("while", "conditional", "call"):
                raise ValueError(f"cannot count the bytes of a program with {opcode!r}")
            continue
        operands = rest[opcode_match.end() :].partition(")")[0]
        size = shape_bytes(results[name])
        size += sum(shape_bytes(results[x]) for x in re.findall(r"%[\w.-]+", operands))
        if opcode == "copy-start":  # its result names the destination, the source and a flag
            size = 2 * size // 3
        kind = "custom-call" if wraps_kernel(hlo, rest) else opcode.removesuffix("-start")
        by_opcode[kind] = by_opcode.get(kind, 0) + size
    return sum(by_opcode.values()), by_opcode


def arrays_on(
    device: Any, batch: int, tokens: int, heads: int, width: int, differential: bool
) -> dict[str, Any]:
    """Shapes of the core's arrays, placed on a device that need not exist, or (None) nowhere."""
    sharding = None if device is None else NamedSharding(Mesh([device], ("x",)), PartitionSpec())
    D, n = heads * width, 9

    def shape(*dimensions: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding)

    names = ["query", "key", "value"] + ["query_redundant", "key_redundant"] * differential
    arrays = {name: shape(batch, tokens, D, dtype=jnp.bfloat16) for name in names}
    if not differential:
        return arrays
    return arrays | {
        "exponents": shape(4, batch, tokens),
        "bank": shape(n),
        "query_router": shape(2 * D, n),
        "key_router": shape(2 * D, n),
    }


def programs(
    attend: Attention, arrays: dict[str, Any]
) -> dict[str, tuple[Callable[..., Any], Any]]:
    """Forward; backward alone, a function of vjp's residuals; and both; with arguments' shapes."""

    def saving(arrays: dict[str, jax.Array]) -> Any:
        return jax.vjp(attend, arrays)

    def backward(residuals: Any, d_output: jax.Array) -> Any:
        return residuals(d_output)

    def both(arrays: dict[str, jax.Array], d_output: jax.Array) -> Any:
        output, vjp = saving(arrays)
        return output, vjp(d_output)

    sharding = arrays["value"].sharding
    residuals = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(saving, arrays)[1],
    )
    return {
        "forward": (attend, (arrays,)),
        "backward": (backward, (residuals, arrays["value"])),
        "forward+backward": (both, (arrays, arrays["value"])),
    }


def count(function: Callable[..., Any], arguments: Any, unit: int) -> dict[str, Any]:
    """Units X of one compiled program."""
    traced = jax.jit(function).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    total, by_opcode = moved_bytes(compiled.as_text())
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    return {
        "moved": total / unit,
        "by_opcode": {name: size / unit for name, size in by_opcode.items()},
        "bytes_accessed_by_xla": cost.get("bytes accessed", 0.0) / unit,
        "temporary": memory.temp_size_in_bytes / unit,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[72, 288])
    parser.add_argument("--model_width", type=int, default=1152)
    parser.add_argument("--batch_tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path, default=RESULTS / "hbm_bytes_tpu.json")
    options = parser.parse_args(arguments)

    cases = []
    for topology in options.topologies:
        try:
            device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
        except Exception as error:  # whatever is wrong with libtpu, the remedy is one
            first_line = str(error).splitlines()[0]
            raise SystemExit(
                f"no compiler for {topology}: {first_line}. "
                'Install libtpu with: pip install "jax[tpu]"'
            ) from None
        for width in options.widths:
            for tokens in options.tokens:
                heads, batch = options.model_width // width, options.batch_tokens // tokens
                unit = 2 * batch * tokens * heads * width
                rows = {f"DyDiLA, {x}": (dydila(x, heads), True) for x in implementations()}
                rows |= {f"relu core, {x}": (relu(heads, x), False) for x in implementations()}
                for row, (attend, differential) in rows.items():
                    shape = (batch, tokens, heads, width)
                    arrays = arrays_on(device, *shape, differential)
                    try:
                        with tracing_for("tpu"):
                            counted = {
                                name: count(*program, unit)
                                for name, program in programs(attend, arrays).items()
                            }
                    except UserError as error:
                        print(f"{topology} d {width} N {tokens} {row}: left out, {error}")
                        continue
                    print(f"{topology} d {width} N {tokens} {row}:")
                    for name, x in counted.items():
                        copies = x["by_opcode"].get("copy", 0.0)
                        print(f"  {name:<18}{x['moved']:7.1f} X, {copies:.1f} of them copies")
                    cases.append(
                        {
                            "topology": topology,
                            "implementation": row,
                            "batch": batch,
                            "tokens": tokens,
                            "heads": heads,
                            "width": width,
                            "units": counted,
                        }
                    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"jax": jax.__version__, "cases": cases}, indent=2) + "\n")
    print(f"wrote {options.json}")


def implementations() -> list[str]:
    """What there is for a TPU: the XLA path, and the kernels where this version has them."""
    return [name for name in api.IMPLEMENTATIONS if name in ("xla", "pallas_tpu")]


if __name__ == "__main__":
    main()
