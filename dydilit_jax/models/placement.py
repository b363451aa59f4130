"""Where activations lie on the ambient mesh (`jax.set_mesh`), by name.

These are all the network knows of meshes. Without an ambient mesh, or with one device, they do
nothing; an axis that the mesh lacks, or that does not divide its dimension, is left out. What is
not named here, XLA's partitioner derives from the parameters (training/sharding.py) and from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")

ACTIVATIONS = {
    # (B, D): time and label.
    "condition": P(BATCH_AXES),
    # (B, N, D) between blocks: whole tokens.
    "tokens": P(BATCH_AXES, "sequence"),
    # (B, N, C) between two maps, the first cut by columns and the second by rows (Megatron-LM,
    # arXiv 1909.08053): a part of each token's channels.
    "channels": P(BATCH_AXES, "sequence", "tensor"),
    # (n, D, E): matrices cut by columns, and by rows as their parameters lie.
    "columns": P(None, "fsdp", "tensor"),
}

# The axis that arrays of a name are gathered over where a device uses them, if its part is of whole
# tiles: of other rows TPUs' compiler makes a sum for all again (seen of 9, not of 72).
GATHERED = {"columns": "fsdp"}
TILE_ROWS = 8


def ambient_mesh() -> AbstractMesh | None:
    """The ambient mesh; None without one, with one device, or where each device runs its own."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    return mesh


def fitting(spec: P, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """`spec` without the axes that the mesh lacks or that do not divide their dimension."""
    axes: list[tuple[str, ...] | None] = []
    for size, entry in zip(shape, tuple(spec) + (None,) * len(shape), strict=False):
        kept: list[str] = []
        for name in _axes(entry):
            if name in mesh.shape and size % mesh.shape[name] == 0:
                kept.append(name)
                size //= mesh.shape[name]
        axes.append(tuple(kept) or None)
    return P(*axes)


def _axes(entry: Any) -> tuple[str, ...]:
    """The axes of a dimension, an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def is_cut(axis: str) -> bool:
    """Whether the ambient mesh has this axis over more than one device."""
    mesh = ambient_mesh()
    return mesh is not None and mesh.shape.get(axis, 1) > 1


def place(x: jax.Array, name: str) -> jax.Array:
    """`x` as it is, laid as ACTIVATIONS has it for `name`."""
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(ACTIVATIONS[name], x.shape, mesh))


def on_each_device(
    function: Callable[..., jax.Array],
    arguments: Sequence[jax.Array],
    names: Sequence[str],
    result: str,
) -> jax.Array:
    """Calls a function of tokens that are independent of each other, on each device's tokens.

    For a function that flattens batch and tokens, or sorts tokens: the partitioner cannot cut
    those, and would have every device compute all of them.

    What GATHERED names is gathered within where its parts are whole tiles, so that its gradient
    leaves each device as the sum of its own part alone: the transpose of gathering is
    reduce-scatter, which sends half of what a sum for all sends (ZeRO, arXiv 1910.02054; then
    `data` sums the parts). The whole is gathered again for the backward pass, not kept.

    Args:
      function: of `arguments`, differentiable in reverse mode.
      arguments: arrays, whole.
      names: where each of them lies, in ACTIVATIONS.
      result: where the result lies; it is shaped as the first argument up to its last dimension,
        which is the last argument's.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return function(*arguments)
    specs = [
        _entering(name, argument.shape, mesh)
        for name, argument in zip(names, arguments, strict=True)
    ]
    shape = (*arguments[0].shape[:-1], arguments[-1].shape[-1])
    mapped = jax.shard_map(
        _gathering(function, specs, names, mesh),
        in_specs=tuple(specs),
        out_specs=fitting(ACTIVATIONS[result], shape, mesh),
        # A gradient of what several devices hold alike is then their sum.
        check_vma=False,
    )
    return mapped(*arguments)


def _entering(name: str, shape: tuple[int, ...], mesh: AbstractMesh) -> P:
    """Where an array of this name lies as it enters `on_each_device`."""
    spec = fitting(ACTIVATIONS[name], shape, mesh)
    gathered = GATHERED.get(name)
    entries = []
    for size, entry in zip(shape, spec, strict=True):
        axes = _axes(entry)
        part = size // math.prod(mesh.shape[axis] for axis in axes)
        whole = gathered in axes and part % TILE_ROWS != 0
        entries.append(tuple(axis for axis in axes if not (whole and axis == gathered)))
    return P(*entries)


def _gathering(
    function: Callable[..., jax.Array],
    specs: Sequence[P],
    names: Sequence[str],
    mesh: AbstractMesh,
) -> Callable[..., jax.Array]:
    """`function`, of a device's parts of arrays, of which it gathers those that GATHERED names."""
    gathers = [
        (argument, dimension, axis)
        for argument, (spec, name) in enumerate(zip(specs, names, strict=True))
        for dimension, entry in enumerate(spec)
        for axis in _axes(entry)
        if axis == GATHERED.get(name) and mesh.shape[axis] > 1
    ]
    if not gathers:
        return function

    def of_device(*parts: jax.Array) -> jax.Array:
        wholes = list(parts)
        for argument, dimension, axis in gathers:
            wholes[argument] = jax.lax.all_gather(parts[argument], axis, axis=dimension, tiled=True)
        return function(*wholes)

    return jax.checkpoint(of_device, policy=_all_but_gathered)


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """The policy of `jax.checkpoint` that keeps everything but gathered arrays."""
    return primitive.name != "all_gather"
