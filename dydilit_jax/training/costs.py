"""What a compiled program computes and moves: FLOPs of matrix products, bytes to and from memory.

XLA's own `cost_analysis` counts a loop's body once and knows nothing of what is inside a kernel, so
both are counted here from the text, instruction by instruction:

FLOPs  two for each multiply-add of a dot or a convolution; of a kernel, by the formula of what it
       computes. Elementwise work does not count.
bytes  operands and results of every fusion, kernel and copy that lie in the main memory, in logical
       sizes; of an operand that is only sliced the slice, of an update in place the update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dydilit_jax.training.collectives import kind_of
from dydilit_jax.training.hlo import Array, Computation, Instruction, Module, Schedule

# Instructions that name memory and move none of it.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "optimization-barrier", "async-start",
    "async-update", "async-done", "domain", "add-dependency",
}  # fmt: skip
KERNEL_CALLS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2")
LIBRARY_CALLS = ("__cublas", "__cudnn", "__triton")  # other custom calls are the compiler's marks
SLICES = ("dynamic-slice", "slice", "gather")
SAME_BYTES = ("bitcast", "reshape", "copy", "convert")  # what a slice may be seen through

KernelFlops = Callable[[Sequence[Array], Sequence[Array]], float]


def _state_products(products: int) -> KernelFlops:
    """Products of features (B, H, d, N), the first operand, with d x d states."""
    return lambda operands, _: 2.0 * products * operands[0].size * operands[0].dimensions[2]


def _head_products(products: int) -> KernelFlops:
    """Products of features (B, N, H, d), the first operand, with d x d states."""
    return lambda operands, _: 2.0 * products * operands[0].size * operands[0].dimensions[-1]


# FLOPs of a kernel's matrix products by its name, from its operands and results. A new kernel needs
# a line here; without one it counts as free of FLOPs and is named in the report.
KERNEL_FLOPS: dict[str, KernelFlops] = {
    "dydila_forward": _state_products(2),  # K^T V, Q S
    "dydila_state": _state_products(1),
    "dydila_apply": _state_products(1),
    "dydila_backward": _state_products(4),  # Q^T dO, dO S^T, K dS, V dS^T
    "dydila_query_gradient": _state_products(2),
    "dydila_key_gradient": _state_products(2),
    # On Hopper, of heads (B, N, H, d); those of wide heads compute dV by `apply`.
    "dydila_gpu_token_sums": lambda *_: 0.0,  # elementwise
    "dydila_gpu_state": _head_products(1),
    "dydila_gpu_apply": _head_products(1),
    "dydila_gpu_query_sums": _head_products(2),  # dO M^T, Q^T dO
    "dydila_gpu_key_sums": _head_products(1),  # V dM^T
    "dydila_gpu_row_sums": _head_products(1),
    "dydila_gpu_query_gradients": _head_products(1),
    "dydila_gpu_token_gradients": _head_products(1),
    "dydila_gpu_key_gradients": _head_products(2),  # V dM^T, K dM
    # Tokens (T, D) to (T, E): each by its own projector; by all n; and into the banks' gradient.
    "grouped_projection": lambda x, y: 2.0 * x[2].size * y[0].dimensions[-1],
    "grouped_projection_dx": lambda x, _: (
        2.0 * x[0].size * x[1].dimensions[-1] * x[3].dimensions[0]
    ),
    "grouped_projection_dbank": lambda x, _: 2.0 * x[2].size * x[3].dimensions[-1],
    # On Hopper: rows sorted by bank (P, D); all n; and into the banks' gradient.
    "grouped_projection_rows": lambda x, y: 2.0 * x[0].size * y[0].dimensions[-1],
    "grouped_projection_every_bank": lambda x, _: (
        2.0 * x[0].size * x[1].dimensions[-1] * x[2].dimensions[0]
    ),
    "grouped_projection_bank_gradient": lambda x, _: 2.0 * x[0].size * x[1].dimensions[-1],
    "depthwise": lambda *_: 0.0,  # elementwise
    "depthwise_backward": lambda *_: 0.0,
}


class Cost(NamedTuple):
    """FLOPs of matrix products, and bytes to and from the main memory, of a device."""

    flops: float
    bytes: float


class Work(NamedTuple):
    """What one instruction of a program costs.

    Attributes:
      name: of the instruction.
      cost: of one execution.
      times: executions.
    """

    name: str
    cost: Cost
    times: float


def work(module: Module, schedule: Schedule) -> list[Work]:
    """Every instruction of a program that computes or moves anything; collectives left out."""
    return [
        Work(instruction.name, cost, times)
        for computation, instruction, times in schedule.instructions(module)
        if any(cost := instruction_cost(module, computation, instruction))
    ]


def product_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions that a traced function asks for.

    Args:
      jaxpr: of it; without loops, whose trips are not counted.
    """
    flops = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            contracted = equation.params["dimension_numbers"][0][0]
            flops += 2.0 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            flops += 2.0 * equation.outvars[0].aval.size * kernel.size / outputs
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a closed one
            flops += product_flops(inner) if hasattr(inner, "eqns") else 0.0
    return flops


def unknown_kernels(module: Module) -> list[str]:
    """Names of kernels that KERNEL_FLOPS does not have."""
    names = {
        kernel_name(instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if _is_kernel(instruction)
    }
    return sorted(names - set(KERNEL_FLOPS))


def instruction_cost(module: Module, computation: Computation, instruction: Instruction) -> Cost:
    """FLOPs and bytes of one execution of an instruction."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or kind_of(instruction):
        return Cost(0.0, 0.0)
    if opcode == "custom-call" and not (_is_kernel(instruction) or _is_library(instruction)):
        return Cost(0.0, 0.0)
    operands = [
        computation.instructions[name].arrays
        for name in instruction.operands
        if name in computation.instructions
    ]
    if opcode == "fusion":
        body = module.computations[instruction.called("calls") or ""]
        if kernels := [each for each in body.instructions.values() if _is_kernel(each)]:
            # Of what is sliced around them; that itself moves nothing.
            costs = [instruction_cost(module, body, each) for each in kernels]
            return Cost(sum(cost.flops for cost in costs), sum(cost.bytes for cost in costs))
        return Cost(_fusion_flops(module, body), _fusion_bytes(module, body, instruction, operands))
    flops = _product_flops(computation, instruction)
    if _is_kernel(instruction):
        formula = KERNEL_FLOPS.get(kernel_name(instruction))
        flops = formula([o[0] for o in operands], instruction.arrays) if formula else 0.0
    return Cost(flops, _plain_bytes(instruction, operands))


def _is_kernel(instruction: Instruction) -> bool:
    return instruction.attribute(r'custom_call_target="([^"]*)"') in KERNEL_CALLS


def _is_library(instruction: Instruction) -> bool:
    return instruction.attribute(r'custom_call_target="([^"]*)"').startswith(LIBRARY_CALLS)


def kernel_name(instruction: Instruction) -> str:
    """The name that a Pallas call was given."""
    called = instruction.attribute(r'(\w+)\)*/(?:pallas_call|mpmd_map)"')  # by Pallas for TPU, GPU
    return called or instruction.name.strip("%")


def _in_memory(arrays: Sequence[Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_hbm)


def _plain_bytes(instruction: Instruction, operands: list[list[Array]]) -> float:
    """Bytes of an instruction that is no fusion."""
    opcode, result = instruction.opcode, instruction.arrays
    if opcode == "copy-start":  # its result: destination, source, a flag
        return _in_memory(result[:2])
    if opcode in SLICES or opcode in ("slice-start", "dynamic-slice-start"):
        part = result[1] if opcode.endswith("-start") else result[0]
        return part.bytes * (part.in_hbm + any(a.in_hbm for a in operands[0]))
    if opcode in ("dynamic-update-slice", "scatter"):
        update = operands[1 if opcode == "dynamic-update-slice" else 2]
        return 2 * sum(array.bytes for array in update) if result[0].in_hbm else 0
    return _in_memory(result) + sum(_in_memory(arrays) for arrays in operands)


def _fusion_bytes(
    module: Module, body: Computation, instruction: Instruction, operands: list[list[Array]]
) -> float:
    """Bytes that a fusion reads and writes: how its body uses each operand, makes each part."""
    total = 0.0
    by_number = {
        int(each.inner): each.name
        for each in body.instructions.values()
        if each.opcode == "parameter"
    }
    for number, arrays in enumerate(operands):
        if number in by_number and _in_memory(arrays):
            total += min(_read(module, body, by_number[number]), _in_memory(arrays))
    root = body.instructions[body.root]
    parts = root.operands if root.opcode == "tuple" else [body.root]
    results = instruction.arrays
    for name, array in zip(parts, results, strict=False):
        if array.in_hbm:
            total += _written(module, body, name, array)
    return total


def _read(module: Module, body: Computation, name: str) -> float:
    """Bytes that a fusion's body reads of a parameter."""
    whole = float(sum(array.bytes for array in body.instructions[name].arrays))
    total = 0.0
    for user in body.users(name):
        if user.opcode in SLICES and user.operands[0] == name:
            total += user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif kind_of(user) or user.opcode in ("tuple", "custom-call"):
            continue  # the collective's own account, or handed through
        elif user.opcode in ("bitcast", "reshape", "get-tuple-element"):
            total += _read(module, body, user.name)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls") or ""]
            for number, operand in enumerate(user.operands):
                parameter = _parameter(inner, number)
                if operand == name and parameter:
                    total += _read(module, inner, parameter)
        else:
            return whole
    return min(total, whole)


def _parameter(body: Computation, number: int) -> str | None:
    return next(
        (
            each.name
            for each in body.instructions.values()
            if each.opcode == "parameter" and each.inner == str(number)
        ),
        None,
    )


def _written(module: Module, body: Computation, name: str, array: Array) -> float:
    """Bytes that a fusion's body writes of one part of its result."""
    made = body.instructions[name]
    while made.opcode in SAME_BYTES and made.operands[0] in body.instructions:
        made = body.instructions[made.operands[0]]
    if made.opcode in ("parameter", "get-tuple-element", "custom-call") or kind_of(made):
        return 0.0  # handed through, or the collective's own account
    if made.opcode == "dynamic-update-slice":
        return float(body.instructions[made.operands[1]].arrays[0].bytes)
    if made.opcode == "fusion":
        inner = module.computations[made.called("calls") or ""]
        if inner.instructions[inner.root].opcode != "tuple":
            return _written(module, inner, inner.root, array)
    return float(array.bytes)


def _fusion_flops(module: Module, body: Computation) -> float:
    """FLOPs of the products in a fusion's body, and in the fusions within it."""
    total = 0.0
    for instruction in body.instructions.values():
        total += _product_flops(body, instruction)
        if instruction.opcode == "fusion" and (name := instruction.called("calls")):
            total += _fusion_flops(module, module.computations[name])
    return total


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a dot, a library's too, or of a convolution; 0 for anything else."""
    over = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    if _is_library(instruction):
        over = instruction.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]').replace('"', "")
    if over:
        left = computation.instructions[instruction.operands[0]].arrays[0]
        inner = math.prod(left.dimensions[int(d)] for d in over.split(",") if d)
        return 2.0 * instruction.arrays[0].size * inner
    if instruction.opcode == "convolution":
        left, right = (
            computation.instructions[name].arrays[0] for name in instruction.operands[:2]
        )
        return 2.0 * _convolution_products(instruction, left, right)
    return 0.0


def _convolution_products(instruction: Instruction, left: Array, right: Array) -> int:
    """Multiply-adds of a convolution: taps that fall on padding or between dilated values are none.

    A TPU's program has batched products as convolutions whose window goes over the batch, so that
    most of the taps are such.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    lhs, rhs, out = labels.groups()
    result = instruction.arrays[0]
    window = dict(re.findall(r"(\w+)=([\w-]+)", instruction.attribute(r"window=\{([^}]*)\}")))
    rank = sum(label.isdigit() for label in out)

    def field(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * rank

    products = result.dimensions[out.index("b")] * result.dimensions[out.index("f")]
    products *= right.dimensions[rhs.index("i")]
    for d in range(rank):
        products *= _taps(
            left.dimensions[lhs.index(str(d))],
            right.dimensions[rhs.index(str(d))],
            result.dimensions[out.index(str(d))],
            int(field("stride", "1")[d]),
            int(field("pad", "0_0")[d].split("_")[0]),
            int(field("lhs_dilate", "1")[d]),
            int(field("rhs_dilate", "1")[d]),
        )
    return products // int(instruction.attribute(r"batch_group_count=(\d+)") or 1)


def _taps(
    size: int, kernel: int, outputs: int, stride: int, pad: int, dilated: int, apart: int
) -> int:
    """Pairs of an output and a tap, along one dimension, that meet a value of the input."""
    at = np.arange(outputs)[:, None] * stride - pad + np.arange(kernel) * apart
    return int(np.sum((at >= 0) & (at % dilated == 0) & (at < size * dilated)))
