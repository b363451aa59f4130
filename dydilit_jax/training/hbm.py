"""Where a device's memory goes in a compiled program, and what is said when it is too little."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax

from dydilit_jax.training.hlo import Computation, Instruction, Module, Schedule

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What hands values through without making any.
TRANSPARENT = (
    "tuple", "get-tuple-element", "bitcast", "copy", "copy-start", "copy-done", "reshape",
    "optimization-barrier",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory while a program runs.

    Attributes:
      parameters, optimizer, ema: the state's, as their shardings cut them.
      other_arguments: batch, counters, and what layouts pad of all arguments.
      activations: written by the forward pass for the backward one.
      temporaries: the rest of what the program needs besides arguments.
      outputs: results that do not take an argument's place.
      code: the program itself.
      host: in the host's memory.
    """

    parameters: int
    optimizer: int = 0
    ema: int = 0
    other_arguments: int = 0
    activations: int = 0
    temporaries: int = 0
    outputs: int = 0
    code: int = 0
    host: int = 0

    @property
    def state(self) -> int:
        """Bytes of the state alone: what there is before a program is compiled."""
        return self.parameters + self.optimizer + self.ema

    @property
    def total(self) -> int:
        """Bytes of the device's memory."""
        return sum(dataclasses.astuple(self)) - self.host


def bytes_on_device(tree: Any) -> int:
    """Bytes that a device holds of a tree of shapes with shardings, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def compiled_memory(state: Memory, stats: Any, module: Module, schedule: Schedule) -> Memory:
    """The memory of a compiled program.

    Args:
      state: the state's part.
      stats: what `memory_analysis` of the program gives.
      module, schedule: the program.
    """
    kept = min(activation_bytes(module, schedule), stats.temp_size_in_bytes)
    return dataclasses.replace(
        state,
        other_arguments=max(stats.argument_size_in_bytes - state.state, 0),
        activations=kept,
        temporaries=stats.temp_size_in_bytes - kept,
        outputs=max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
        code=stats.generated_code_size_in_bytes,
        host=stats.host_temp_size_in_bytes + stats.host_argument_size_in_bytes,
    )


def activation_bytes(module: Module, schedule: Schedule) -> int:
    """Bytes that the forward pass leaves in memory for the backward one.

    JAX names each instruction by where it comes from: `jvp` is the forward pass, `transpose` the
    backward one. Counted are arrays in the main memory that the first writes and the second reads
    within one computation: with scanned blocks the loop's stacked results, without each array.
    """
    return sum(_kept(module, module.computations[name]) for name in schedule.times)


def _kept(module: Module, computation: Computation) -> int:
    users: dict[str, list[str]] = {}
    for instruction in computation.instructions.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction.name)

    def is_read_backward(name: str) -> bool:
        for user in users.get(name, ()):
            instruction = computation.instructions[user]
            if instruction.opcode in TRANSPARENT:
                if is_read_backward(user):
                    return True
            elif _is_backward(instruction):
                return True
        return False

    total = 0
    for instruction in computation.instructions.values():
        if instruction.opcode == "while" and _is_forward(instruction):
            changed = _changed(module, instruction)
            for name in users.get(instruction.name, ()):
                element = computation.instructions[name]
                index = element.attribute(r"index=(\d+)")
                if index and int(index) in changed and is_read_backward(name):
                    total += _in_memory(element)
        elif (
            _is_forward(instruction)
            and instruction.opcode not in (*TRANSPARENT, "parameter", "constant", "broadcast")
            and is_read_backward(instruction.name)
        ):
            total += _in_memory(instruction)
    return total


def _in_memory(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if array.in_hbm)


def _is_forward(instruction: Instruction) -> bool:
    name = instruction.attribute(r'op_name="([^"]*)"')
    return "jvp(" in name and "transpose(" not in name


def _is_backward(instruction: Instruction) -> bool:
    return "transpose(" in instruction.attribute(r'op_name="([^"]*)"')


def _changed(module: Module, loop: Instruction) -> set[int]:
    """Elements of a loop's tuple that its body does not hand through as they are."""
    body = module.computations[loop.called("body") or ""]
    root = body.instructions[body.root]
    changed = set()
    for i, name in enumerate(root.operands):
        made = body.instructions[name]
        while made.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            made = body.instructions[made.operands[0]]
        if not (made.opcode == "get-tuple-element" and made.attribute(r"index=(\d+)") == str(i)):
            changed.add(i)
    return changed


@dataclasses.dataclass(frozen=True)
class Shortage:
    """What a compiler says of a program that does not fit.

    Attributes:
      message: in its words, one line.
      needed, available: bytes, where it names them.
    """

    message: str
    needed: int | None
    available: int | None


def shortage(error: Exception) -> Shortage | None:
    """What an error of the compiler says about memory; None if it is about something else.

    libtpu: `... HLO temporaries (31.76G) exceeds available HBM (15.75G)`, or `Used 21.0G of 15.75G
    hbm`; a kernel that needs too much VMEM is no shortage of memory.
    """
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" not in text or "vmem" in text.lower().split("hbm")[0]:
        return None
    number = r"([\d.]+)([KMGT]?)i?B?"
    match = re.search(rf"\({number}\) exceeds available \w+ \({number}\)", text) or re.search(
        rf"Used {number} of {number} hbm", text
    )
    needed = available = None
    if match:
        needed, available = (round(float(match[i]) * UNITS[match[i + 1]]) for i in (1, 3))
    sentence = re.sub(r"^.*?RESOURCE_EXHAUSTED: ", "", text)
    return Shortage(sentence[:400], needed, available)
