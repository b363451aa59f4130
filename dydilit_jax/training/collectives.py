"""What a compiled program sends between devices: each collective's bytes, and over which axes.

Bytes are counted as ring algorithms move them, which is the least that any can (Thakur et al.,
2005): with n devices in a group and an operand of b bytes on each, a device sends

    all-gather (n - 1) b      reduce-scatter, all-to-all (n - 1) b / n
    all-reduce 2 (n - 1) b / n      permute b

A group's partition numbers count devices in the mesh's order, so they are turned into the axes
along which the group's members differ.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dydilit_jax.training.hlo import Computation, Instruction, Module, Schedule

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Groups = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program, with how often it is executed.

    Attributes:
      kind: of KINDS; an all-reduce that keeps only a part of its result is a reduce-scatter.
      axes: the mesh axes that its groups go along, in the mesh's order; () for a lone device.
      group: partitions of the first group, in the mesh's order.
      bytes: of its operands on a device, once.
      sent: bytes that a device sends, once.
      times: executions in one run of the program.
      hbm_bytes: bytes of its operands and results that lie in the device's main memory, once.
    """

    kind: str
    axes: tuple[str, ...]
    group: tuple[int, ...]
    bytes: int
    sent: float
    times: float
    hbm_bytes: int


def replica_groups(text: str, devices: int) -> Groups:
    """The groups of partitions that an instruction's attributes name, in any of HLO's three forms.

    `{{0,1},{2,3}}`; iota, `[2,4]<=[4,2]T(1,0)`; and mesh, `mesh['x'=2,'y'=4] {'y'}`, whose axes may
    be parts of one, `'y':(2)2`, and which may name its devices, `, device_ids=([2,4]T(1,0))`. No
    group, `{}`, stands for all devices.

    Args:
      text: the instruction's attributes.
      devices: how many partitions there are.

    Raises:
      ValueError: a form that is none of these.
    """
    start = text.index("replica_groups=") + len("replica_groups=")
    rest = text[start:]
    if rest.startswith("mesh["):
        return _mesh_groups(rest)
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(match[1], match[2], match[3]).tolist()
    if rest.startswith("{{"):
        inner = rest[1 : rest.index("}}") + 1]
        return [_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", inner)]
    if rest.startswith("{}"):
        return [list(range(devices))]
    raise ValueError(f"replica groups of an unknown form: {rest[:80]!r}")


def _numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def _iota(shape: str, reshape: str, transpose: str | None) -> np.ndarray:
    """HLO's iota list: 0, 1, ... in one shape, transposed, read in another."""
    dimensions = _numbers(reshape)
    ids = np.arange(math.prod(dimensions)).reshape(dimensions)
    if transpose:
        ids = ids.transpose(_numbers(transpose))
    return ids.reshape(_numbers(shape))


def _mesh_groups(text: str) -> Groups:
    header, _, rest = text[len("mesh[") :].partition("]")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", header)}
    ids = np.arange(math.prod(sizes.values()))
    if match := re.match(r",?\s*device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\)", rest):
        listed = match[3] is not None
        ids = np.array(_numbers(match[3])) if listed else _iota(str(ids.size), match[1], match[2])
        rest = rest[match.end() :]
    axes = re.match(r"\s*\{([^}]*)\}", rest)
    if axes is None:
        raise ValueError(f"replica groups of an unknown form: {text[:80]!r}")
    # A part of an axis, 'x':(before)size, cuts it in three; those of one axis cut it further.
    wanted = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes[1])
    shape: list[int] = []
    inside: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        cuts = sorted(
            {1, size}
            | {int(before) for axis, before, _ in wanted if axis == name and before}
            | {int(b) * int(part) for axis, b, part in wanted if axis == name and b}
        )
        for low, high in itertools.pairwise(cuts):
            inside[name, low] = len(shape)
            shape.append(high // low)
    grouped = []
    for name, before, part in wanted:
        low, high = int(before or 1), int(before or 1) * int(part or sizes[name])
        grouped += [d for (axis, at), d in inside.items() if axis == name and low <= at < high]
    others = [d for d in range(len(shape)) if d not in grouped]
    size = math.prod(shape[d] for d in grouped)
    return ids.reshape(shape).transpose(others + grouped).reshape(-1, size).tolist()


def axes_of(members: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which partitions differ.

    Args:
      members: partitions, numbered in the mesh's order.
      mesh: lengths of its axes, outermost first.
    """
    places = np.array(np.unravel_index(np.asarray(members), tuple(mesh.values())))
    return tuple(
        axis for axis, place in zip(mesh, places, strict=True) if len(set(place.tolist())) > 1
    )


def _permuted(text: str) -> list[int]:
    """The partitions that a permute connects with the first of its pairs."""
    listed = re.search(r"source_target_pairs=\{(\{[^=]*\})\}", text)
    pairs = re.findall(r"\{(\d+),(\d+)\}", listed[1] if listed else "")
    ways: dict[int, set[int]] = {}
    for source, target in pairs:
        if source != target:
            ways.setdefault(int(source), set()).add(int(target))
            ways.setdefault(int(target), set()).add(int(source))
    if not ways:
        return [0]
    reached: set[int] = set()
    left = [next(iter(ways))]
    while left:
        at = left.pop()
        reached.add(at)
        left += ways[at] - reached
    return sorted(reached)


def _sent(kind: str, operand: int, n: int) -> float:
    """Bytes that a device sends for an operand of so many bytes, in a group of n."""
    if kind == "all-gather":
        return operand * (n - 1)
    if kind == "all-reduce":
        return 2 * operand * (n - 1) / n
    if kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
        return operand * (n - 1) / n
    return operand if n > 1 else 0


def kind_of(instruction: Instruction) -> str:
    """Its kind if it is a collective, or starts one; else empty."""
    name = instruction.opcode.removesuffix("-start")
    return name if name in KINDS else ""


def _within(module: Module, computation: Computation, times: float) -> list:
    """The collectives of a computation and of its fusions, with executions."""
    found = []
    for instruction in computation.instructions.values():
        if kind_of(instruction) and not _is_a_repetition(computation, instruction):
            found.append((computation, instruction, times))
        if instruction.opcode == "fusion" and (body := instruction.called("calls")):
            found += _within(module, module.computations[body], times)
    return found


def _is_a_repetition(computation: Computation, instruction: Instruction) -> bool:
    """Whether it stands for an operation that another fusion starts.

    A TPU's asynchronous collective is written into every fusion that runs while it is under way,
    all with its chain's number; only one of them has the start.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    return not any(
        '"AsyncCollectiveStart"' in x.attributes for x in computation.users(instruction.name)
    )


def collectives(module: Module, schedule: Schedule, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective that a program executes between different devices.

    Args:
      module: the program for one device of the mesh.
      schedule: its computations' executions.
      mesh: lengths of the mesh's axes, outermost first.
    """
    devices = math.prod(mesh.values())
    result = []
    for name, times in schedule.times.items():
        for computation, instruction, count in _within(module, module.computations[name], times):
            kind = kind_of(instruction)
            if kind == "collective-permute":
                group = _permuted(instruction.attributes)
            else:
                group = replica_groups(instruction.attributes, devices)[0]
            if len(group) < 2:
                continue
            users = computation.users(instruction.name)
            if kind == "all-reduce" and users and all(x.opcode == "dynamic-slice" for x in users):
                kind = "reduce-scatter"
            operands = [
                array
                for operand in instruction.operands
                if operand in computation.instructions
                for array in computation.instructions[operand].arrays
            ]
            size = sum(array.bytes for array in operands)
            moved = sum(array.bytes for array in [*operands, *instruction.arrays] if array.in_hbm)
            result.append(
                Collective(
                    kind,
                    axes_of(group, mesh),
                    tuple(group),
                    size,
                    _sent(kind, size, len(group)),
                    count,
                    moved,
                )
            )
    return result


def table(found: Sequence[Collective]) -> list[dict]:
    """Totals by kind and axes, most bytes first: `kind`, `axes`, `count`, `bytes`, `sent_bytes`."""
    rows: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for each in found:
        row = rows.setdefault((each.kind, each.axes), [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, each.bytes, each.sent)):
            row[i] += value * each.times
    return [
        {
            "kind": kind,
            "axes": list(axes),
            "count": round(count),
            "bytes": round(size),
            "sent_bytes": round(sent),
        }
        for (kind, axes), (count, size, sent) in sorted(rows.items(), key=lambda x: -x[1][2])
    ]
