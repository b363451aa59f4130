"""Where every array lies: the device mesh, and rules from a parameter's path to its axes.

data      copies of the parameters; parts of the batch; the outermost axis, over TPU slices
fsdp      parts of the parameters, gathered where they are used; parts of the batch
tensor    columns of the maps into heads and hidden channels, rows of the maps out of them
sequence  parts of each image's tokens
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.config import Config, MeshConfig
from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.placement import BATCH_AXES

AXES = ("data", "fsdp", "tensor", "sequence")


class Rule(NamedTuple):
    """How a parameter is cut.

    Attributes:
      pattern: regular expression of its path, all of it.
      tensor: the dimension that the tensor axis cuts; None: it is whole on that axis.
      fsdp: dimensions that the fsdp axis may cut; the first that it divides is taken.
    """

    pattern: str
    tensor: int | None = None
    fsdp: tuple[int, ...] = ()


# Arrays of blocks lead with the layer, which is never cut: the scan over layers would gather it.
RULES: tuple[Rule, ...] = (
    Rule(r"patch_embed/kernel", fsdp=(1, 0)),
    Rule(r"time_embed/(hidden|out)/kernel", fsdp=(1, 0)),
    Rule(r"label_embed/table/embedding", fsdp=(1, 0)),
    Rule(r"blocks/attention/qkv/kernel", tensor=3, fsdp=(1, 3)),
    Rule(r"blocks/attention/(query|key)_bank/kernel", tensor=3, fsdp=(2, 3)),
    Rule(r"blocks/attention/(query|key)_bank/router"),
    Rule(r"blocks/attention/exponents/(bank|routers)"),
    Rule(r"blocks/attention/lambdas/(bank|query_router|key_router)"),
    Rule(r"blocks/attention/gain"),
    Rule(r"blocks/(attention|feedforward)/depthwise/(kernel|bias)"),
    Rule(r"blocks/feedforward/hidden/kernel", tensor=2, fsdp=(1, 2)),
    Rule(r"blocks/(attention|feedforward)/out/kernel", tensor=1, fsdp=(1, 2)),
    Rule(r"blocks/modulation/linear/kernel", tensor=1, fsdp=(1, 2)),
    Rule(r"final/(modulation/)?linear/kernel", fsdp=(0, 1)),
    Rule(r"(patch_embed|time_embed/(hidden|out)|final/(modulation/)?linear)/bias"),
    Rule(r"blocks/(attention|feedforward)/(qkv|hidden|out)/bias|blocks/modulation/linear/bias"),
)


def axis_sizes(config: MeshConfig, devices: int, slices: int = 1) -> dict[str, int]:
    """The length of every axis, -1 filled in.

    Args:
      config: the axes asked for.
      devices: how many there are.
      slices: groups of devices that the axis `data` goes over.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `data` does not fit slices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    unknown = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(unknown) > 1 or known < 1 or min(sizes.values()) < -1 or 0 in sizes.values():
        raise UserError(f"mesh axes must be positive, at most one of them -1; got {sizes}")
    if unknown and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if int(np.prod(list(sizes.values()))) != devices:
        raise UserError(f"mesh {sizes} does not fit {devices} devices: their product must be that")
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data {sizes['data']} is not a multiple of {slices} slices: parameters are not "
            "cut over the network between slices; set mesh.data to a multiple of them"
        )
    return sizes


def slice_count(devices: Sequence[Any]) -> int:
    """Number of TPU slices that the devices belong to; 1 for other devices."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def arrange(devices: Sequence[Any], sizes: Mapping[str, int], slices: int) -> np.ndarray:
    """The devices as an array with the axes' lengths, near ones along the inner axes.

    With several slices the first axis is slice by slice. An axis may go along a part of a torus's
    dimension: fsdp=128, XL's most, on 16 x 16 chips goes along one and half of the other.
    """
    shape = [sizes[axis] for axis in AXES]
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inner = [shape[0] // slices, *shape[1:]]
    return mesh_utils.create_hybrid_device_mesh(
        inner, [slices, 1, 1, 1], devices, allow_split_physical_axes=True
    )


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh of all devices of all processes, with the axes AXES.

    Raises:
      UserError: as `axis_sizes`.
    """
    devices = jax.devices()
    slices = slice_count(devices)
    sizes = axis_sizes(config, len(devices), slices)
    return Mesh(arrange(devices, sizes, slices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_rule(path: str) -> Rule:
    """The rule of the parameter of this path.

    Raises:
      UserError: no rule, or more than one, matches.
    """
    matches = [rule for rule in RULES if re.fullmatch(rule.pattern, path)]
    if len(matches) != 1:
        raise UserError(f"{len(matches)} sharding rules match parameter {path!r}, expected one")
    return matches[0]


def parameter_spec(path: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> P:
    """The axes of every dimension of a parameter.

    Args:
      path: names joined by slashes.
      shape: its shape.
      axes: lengths of the mesh's axes; one that is missing has length 1.

    Raises:
      UserError: no rule for it, or an axis that divides none of the dimensions it may cut.
    """
    rule = parameter_rule(path)
    tensor, fsdp = axes.get("tensor", 1), axes.get("fsdp", 1)
    left = list(shape)
    cut: list[tuple[str, ...]] = [()] * len(shape)
    if rule.tensor is not None and tensor > 1:
        if left[rule.tensor] % tensor:
            raise UserError(
                f"mesh.tensor {tensor} does not divide dimension {rule.tensor} of {path} {shape}"
            )
        left[rule.tensor] //= tensor
        cut[rule.tensor] = ("tensor",)
    if rule.fsdp and fsdp > 1:
        # A dimension that is not cut yet, if one divides: its parts stay larger.
        choices = [d for d in rule.fsdp if not cut[d]] + [d for d in rule.fsdp if cut[d]]
        chosen = next((d for d in choices if left[d] % fsdp == 0), None)
        if chosen is None:
            dimensions = " or ".join(str(left[d]) for d in rule.fsdp)
            raise UserError(f"mesh.fsdp {fsdp} does not divide {dimensions}, of {path} {shape}")
        cut[chosen] = (*cut[chosen], "fsdp")
    entries = [names[0] if len(names) == 1 else (names or None) for names in cut]
    while entries and entries[-1] is None:
        entries.pop()
    return P(*entries)


def path_of(path: tuple[Any, ...]) -> str:
    """A pytree path as names joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def parameter_specs(parameters: Any, axes: Mapping[str, int]) -> Any:
    """The axes of every parameter, as a tree like `parameters` (arrays or shapes).

    Raises:
      UserError: an axis that does not fit a parameter; names the largest that fits all of them.
    """

    def specs(axes: Mapping[str, int]) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: parameter_spec(path_of(path), tuple(leaf.shape), axes), parameters
        )

    try:
        return specs(axes)
    except UserError as error:
        if "sharding rules match" in str(error):
            raise
        raise UserError(f"{error}: {_that_fits(specs, axes)}") from error


def _that_fits(specs: Any, axes: Mapping[str, int]) -> str:
    """What to set instead: the largest parts of fsdp and tensor that fit, the rest to data."""
    fsdp, tensor = axes.get("fsdp", 1), axes.get("tensor", 1)
    for parts in sorted(_divisors(fsdp * tensor), reverse=True):
        for t in sorted(_divisors(parts), key=lambda t: (t != tensor, -t)):
            f = parts // t
            if f > fsdp or t > tensor:
                continue
            try:
                specs({"fsdp": f, "tensor": t})
            except UserError:
                continue
            data = axes.get("data", 1) * fsdp * tensor // parts
            return f"mesh.fsdp={f}, mesh.tensor={t} and mesh.data={data} would fit"
    raise AssertionError("one part fits every parameter")


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def parameter_shardings(parameters: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every parameter, as a tree like `parameters` (arrays or shapes).

    Raises:
      UserError: as `parameter_specs`.
    """
    specs = parameter_specs(parameters, mesh.shape)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of a batch over the axes data and fsdp; every other device has a copy."""
    return NamedSharding(mesh, P(tuple(axis for axis in BATCH_AXES if axis in mesh.shape)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def to_mesh(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's part of a batch as part of one array over the mesh.

    Process p of P brings the p-th of P equal parts, whatever the mesh. Where the mesh wants other
    rows of a process (it may lie over the hosts in any order, and its axes tensor and sequence
    want the same rows on several of them), the devices exchange them.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {name: jax.device_put(np.asarray(value), sharding) for name, value in batch.items()}
    by_process = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    rows = np.array(by_process).reshape(jax.process_count(), -1)
    brought = NamedSharding(Mesh(rows, ("process", "local")), P("process"))
    return {
        name: jax.device_put(
            jax.make_array_from_process_local_data(brought, np.asarray(value)), sharding
        )
        for name, value in batch.items()
    }


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises UserError when batch, accumulation or network do not fit the mesh."""
    check_batch(config.data.batch_size, mesh, config.optimizer.accumulation_steps)
    check_model(config.model, mesh.shape)


def check_batch(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Raises UserError when the devices or the accumulation do not divide the batch."""
    devices = int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH_AXES]))
    if batch_size % devices:
        raise UserError(
            f"data.batch_size {batch_size} is not divisible by {devices} devices "
            f"(mesh {dict(mesh.shape)}): nearest that is, {max(1, batch_size // devices) * devices}"
        )
    if batch_size % (devices * accumulation_steps):
        fitting = [each for each in _divisors(batch_size // devices) if each < accumulation_steps]
        raise UserError(
            f"optimizer.accumulation_steps {accumulation_steps} does not divide the "
            f"{batch_size // devices} images of data.batch_size {batch_size} on each of {devices} "
            f"devices: the next smaller that does, {max(fitting)}"
        )


def check_model(model: ModelConfig, axes: Mapping[str, int]) -> None:
    """Raises UserError when the axes tensor and sequence do not divide heads and rows."""
    heads, rows = model.attention.heads, model.grid[0]
    tensor, sequence = axes.get("tensor", 1), axes.get("sequence", 1)
    if heads % tensor:
        raise UserError(
            f"mesh.tensor {tensor} does not divide model.attention.heads {heads}: a head lies on "
            f"one device; mesh.tensor can be {_listed(_divisors(heads))}"
        )
    if rows % sequence:
        raise UserError(
            f"mesh.sequence {sequence} does not divide the {rows} rows of tokens "
            f"(model.image_size {model.image_size}, patches of {model.patch_size}): "
            f"mesh.sequence can be {_listed(_divisors(rows))}"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
