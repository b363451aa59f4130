"""Where activations lie on the ambient mesh (`jax.set_mesh`), by name.

These are all the network knows of meshes. Without an ambient mesh, or with one device, they do
nothing; an axis that the mesh lacks, or that does not divide its dimension, is left out. What is
not named here, XLA's partitioner derives from the parameters (training/sharding.py) and from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    # (n, D, E): matrices cut by columns, whole otherwise.
    "columns": P(None, None, "tensor"),
}


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
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        kept: list[str] = []
        for name in names:
            if name in mesh.shape and size % mesh.shape[name] == 0:
                kept.append(name)
                size //= mesh.shape[name]
        axes.append(tuple(kept) or None)
    return P(*axes)


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
        fitting(ACTIVATIONS[name], argument.shape, mesh)
        for name, argument in zip(names, arguments, strict=True)
    ]
    shape = (*arguments[0].shape[:-1], arguments[-1].shape[-1])
    mapped = jax.shard_map(
        function,
        in_specs=tuple(specs),
        out_specs=fitting(ACTIVATIONS[result], shape, mesh),
        # A gradient of what several devices hold alike is then their sum.
        check_vma=False,
    )
    return mapped(*arguments)
