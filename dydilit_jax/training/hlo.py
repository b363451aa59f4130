"""Reading a compiled program's text (HLO): computations, and how often each is executed.

The compiler writes each computation once, whatever loop it is the body of; a count of anything has
to multiply by the loops' trips. A backend may name them (`known_trip_count`); where it does not,
they follow from a condition `counter < limit`, the counter's start and its step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

ITEM_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
    "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?(%?[\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?(%?[\w.-]+) \(.*\{$")
# What an asynchronous operation or a loop may hand a scalar through unchanged.
_PASSED_ON = ("copy", "bitcast", "copy-done", "copy-start", "convert", "reshape")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape.

    Attributes:
      item: its type, as HLO has it.
      dimensions: their lengths.
      in_hbm: whether it lies in the device's main memory: no memory space is named in its layout.
    """

    item: str
    dimensions: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dimensions)

    @property
    def bytes(self) -> int:
        """Bytes without what a layout pads."""
        return self.size * ITEM_BITS.get(self.item, 0) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO.

    Attributes:
      name: with its %.
      shape: text of the result's shape.
      opcode: `fusion`, `all-reduce`, ...
      inner: text within the operation's parentheses: operands, or a constant's value.
      attributes: text after them.
    """

    name: str
    shape: str
    opcode: str
    inner: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%[\w.-]+", self.inner)

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, a tuple's in order."""
        return arrays_of(self.shape)

    def called(self, attribute: str) -> str | None:
        """Name of the computation that an attribute such as `body` names."""
        match = re.search(rf"\b{attribute}=(%[\w.-]+)", self.attributes)
        return match and match[1]

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes; empty where it is not."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions by name, in order, and the root's name."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def users(self, name: str) -> list[Instruction]:
        """Instructions that `name` is an operand of."""
        return [each for each in self.instructions.values() if name in each.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the entry's name."""

    computations: dict[str, Computation]
    entry: str


def arrays_of(shape: str) -> list[Array]:
    """The arrays in a shape's text, such as `(bf16[8,128]{1,0:T(8,128)S(1)}, u32[])`."""
    return [
        Array(
            item,
            tuple(int(each) for each in dimensions.split(",") if each),
            not re.search(r"S\([1-9]\d*\)", layout),
        )
        for item, dimensions, layout in _SHAPE.findall(shape)
        if item in ITEM_BITS
    ]


def parse(text: str) -> Module:
    """A compiled program's text as a module.

    Raises:
      ValueError: it holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    lines: dict[str, Instruction] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, lines, root = _percent(head[2]), {}, ""
            entry = name if head[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, lines, root or next(reversed(lines), ""))
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(_percent(match[2]), match[3])
            lines[instruction.name] = instruction
            root = instruction.name if match[1] else root
    if not entry:
        raise ValueError("the text holds no entry computation")
    return Module(computations, entry)


def _percent(name: str) -> str:
    return name if name.startswith("%") else "%" + name


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inner = rest[opening + 1 : closing]
    return Instruction(name, shape, rest[:opening], inner, rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often computations run.

    Attributes:
      times: executions of each computation that runs as a sequence of instructions, by name;
        fusions' bodies are part of their instruction.
      unknown_loops: loops whose trips could not be found; they count once.
    """

    times: dict[str, float]
    unknown_loops: tuple[str, ...]

    def instructions(self, module: Module) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that is executed, with its computation and how often."""
        for name, times in self.times.items():
            computation = module.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times


def schedule(module: Module) -> Schedule:
    """Executions of each computation in one run of the program.

    All branches of a conditional count, which is the most that can be executed.
    """
    times: dict[str, float] = {}
    unknown: list[str] = []

    def visit(name: str, count: float) -> None:
        times[name] = times.get(name, 0.0) + count
        computation = module.computations[name]
        for instruction in computation.instructions.values():
            for callee, trips in _callees(module, computation, instruction):
                if trips is None:
                    unknown.append(instruction.name)
                visit(callee, count * (1 if trips is None else trips))

    visit(module.entry, 1.0)
    return Schedule(times, tuple(dict.fromkeys(unknown)))


def _callees(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[str, float | None]]:
    """Computations that an instruction runs as sequences, and how often each."""
    if instruction.opcode == "while":
        body = instruction.called("body")
        assert body is not None
        return [(body, trip_count(module, computation, instruction))]
    if instruction.opcode in ("call", "async-start"):
        callee = instruction.called("to_apply") or instruction.called("calls")
        return [(callee, 1)] if callee in module.computations else []
    if instruction.opcode == "conditional":
        listed = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        names = re.findall(r"%[\w.-]+", listed) or [
            name
            for attribute in ("true_computation", "false_computation")
            if (name := instruction.called(attribute))
        ]
        return [(name, 1) for name in names]
    return []


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a `while`; None where they cannot be told from the text."""
    if known := loop.attribute(r'known_trip_count"?[:=]\s*\{"?n"?[:=]\s*"?(\d+)'):
        return int(known)
    condition = module.computations[loop.called("condition") or ""]
    compare = condition.instructions[condition.root]
    direction = compare.attribute(r"direction=(\w+)")
    if compare.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    sides = [condition.instructions[name] for name in compare.operands]
    index = [each.attribute(r"index=(\d+)") for each in sides]
    limits = [_constant(condition, each.name) for each in sides]
    if not (index[0] and limits[1] is not None):
        return None  # only counter against limit, the form that scans have
    body = module.computations[loop.called("body") or ""]
    counter = int(index[0])
    start = _element(computation, loop.operands[0], counter)
    step = _step(body, counter)
    if start is None or not step:
        return None
    distance = limits[1] - start
    if direction in ("LE", "GE"):
        distance += int(math.copysign(1, step))
    return max(0, math.ceil(distance / step))


def _constant(computation: Computation, name: str) -> int | None:
    """The integer that an instruction stands for, through copies."""
    seen = 0
    while (instruction := computation.instructions.get(name)) and seen < 20:
        if instruction.opcode == "constant":
            match = re.fullmatch(r"\s*(-?\d+)\s*", instruction.inner)
            return int(match[1]) if match else None
        if instruction.opcode not in _PASSED_ON or not instruction.operands:
            return None
        name, seen = instruction.operands[0], seen + 1
    return None


def _element(computation: Computation, name: str, index: int) -> int | None:
    """The integer that the element of a tuple starts as."""
    made = computation.instructions.get(name)
    if made is None or made.opcode != "tuple" or index >= len(made.operands):
        return None
    return _constant(computation, made.operands[index])


def _step(body: Computation, index: int) -> int | None:
    """What the body adds to the element of its tuple."""
    root = body.instructions[body.root]
    if root.opcode != "tuple" or index >= len(root.operands):
        return None
    change = body.instructions[root.operands[index]]
    while change.opcode in _PASSED_ON:
        change = body.instructions[change.operands[0]]
    if change.opcode not in ("add", "subtract"):
        return None
    amount = _constant(body, change.operands[1])
    if amount is None and change.opcode == "add":
        amount = _constant(body, change.operands[0])
    return None if amount is None else amount if change.opcode == "add" else -amount
