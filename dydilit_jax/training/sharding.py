"""Where every array lies: the device mesh, and rules from a parameter's path to its axes."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.config import MeshConfig
from dydilit_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")

# Path of a parameter (all of it) -> axes of its dimensions. Arrays of blocks lead with the layer.
RULES: tuple[tuple[str, P], ...] = (
    (r"patch_embed/kernel", P(None, "fsdp")),
    (r"time_embed/(hidden|out)/kernel", P(None, "fsdp")),
    (r"label_embed/table/embedding", P(None, "fsdp")),
    (r"blocks/attention/qkv/kernel", P(None, "fsdp")),
    (r"blocks/attention/(query|key)_bank/kernel", P(None, None, "fsdp")),
    (r"blocks/attention/(query|key)_bank/router", P()),
    (r"blocks/attention/exponents/(bank|routers)", P()),
    (r"blocks/attention/lambdas/(bank|query_router|key_router)", P()),
    (r"blocks/attention/gain", P()),
    (r"blocks/(attention|feedforward)/depthwise/(kernel|bias)", P()),
    (r"blocks/(attention|feedforward)/(hidden|out)/kernel", P(None, "fsdp")),
    (r"blocks/modulation/linear/kernel", P(None, "fsdp")),
    (r"final/(modulation/)?linear/kernel", P("fsdp")),
    (r"(patch_embed|time_embed/(hidden|out)|final/(modulation/)?linear)/bias", P()),
    (r"blocks/(attention|feedforward)/(qkv|hidden|out)/bias|blocks/modulation/linear/bias", P()),
)


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh of all devices, with axes `data` and `fsdp`.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    sizes = {"data": config.data, "fsdp": config.fsdp}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) > 1 or known < 1 or min(sizes.values()) < -1:
        raise UserError(f"mesh axes must be positive, at most one of them -1; got {sizes}")
    if unknown and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if int(np.prod(list(sizes.values()))) != devices:
        raise UserError(f"mesh {sizes} does not fit {devices} devices: their product must be that")
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape))


def parameter_spec(path: str) -> P:
    """The axes of the parameter of this path.

    Raises:
      UserError: no rule, or more than one, matches.
    """
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        raise UserError(f"{len(matches)} sharding rules match parameter {path!r}, expected one")
    return matches[0]


def path_of(path: tuple[Any, ...]) -> str:
    """A pytree path as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_shardings(parameters: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter, as a tree like `parameters` (arrays or shapes).

    Raises:
      UserError: a dimension that its mesh axis does not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = parameter_spec(path_of(path))
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(
                    f"mesh.{axis} {mesh.shape[axis]} does not divide {size}, a dimension of "
                    f"{path_of(path)} {tuple(leaf.shape)}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, parameters)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of a batch over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises UserError when the devices do not divide the batch."""
    devices = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size % devices:
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {devices} devices "
            f"(mesh {dict(mesh.shape)}): nearest that is, {max(1, batch_size // devices) * devices}"
        )
