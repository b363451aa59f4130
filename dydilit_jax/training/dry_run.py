"""What a run would be, before it is one: all that the config decides, as a page of text.

Nothing is trained or written, and no parameter exists; one batch of the data is read, and weights
that the run starts from or learns from are read and checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dydilit_jax.config import Config, flatten
from dydilit_jax.data.load import load_data
from dydilit_jax.errors import UserError
from dydilit_jax.kernels.platform import recording_choices, target
from dydilit_jax.models.count import multiply_adds, parameter_table
from dydilit_jax.origins import DEFAULT, Origin
from dydilit_jax.training.inheritance import Teacher, make_teacher, read_inherited, read_teacher
from dydilit_jax.training.memory import (
    abstract_batch,
    compiled_memory,
    estimate_memory,
    in_bytes,
    nbytes,
)
from dydilit_jax.training.sharding import (
    check_fits,
    make_mesh,
    parameter_shardings,
    parameter_spec,
)
from dydilit_jax.training.state import Network
from dydilit_jax.training.step import training_loss
from dydilit_jax.training.workdir import plan_workdir

BACKWARD = 2  # multiply-adds of a backward pass, in units of the forward pass's
WIDEST_VALUE = 28  # of a config field, before its origin is pushed aside


class DryRun(NamedTuple):
    """What a run would be.

    Attributes:
      text: for a terminal; most of it within 80 columns.
      problems: each a line, why the run would not start.
    """

    text: str
    problems: list[str]


def describe(
    config: Config,
    *,
    origins: dict[str, Origin] | None = None,
    source: str = "",
    workdir: Path | None = None,
    compiled: bool = False,
) -> DryRun:
    """All that the config decides.

    Args:
      config: the run's.
      origins: of its fields; None where that is not known.
      source: what the config came from, for the heading.
      workdir: where the run would write; None if that is open yet.
      compiled: compile the step too, for the compiler's own account of memory.

    Raises:
      UserError: the config does not fit itself, the devices or the weights that it names.
    """
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    network = Network.create(config)
    taught = _abstract_teacher(network, mesh)
    plan = plan_workdir(network, mesh, workdir)
    data, problem = _data(config)
    sections = {
        f"config{source and ': ' + source}": _config(config, origins),
        "parameters": _parameters(network, mesh),
        "mesh": _mesh(mesh),
        "batch": _batch(config, mesh),
        "computation": _computation(network, taught),
        "memory on each device": _memory(network, mesh, taught, compiled=compiled),
        f"kernels, traced for {target().platform}": _kernels(network, mesh),
        "data": data,
        "start": [*plan.start, *_weights(network)],
        f"written to {workdir}" if workdir else "written to WORKDIR": plan.written,
    }
    text = "\n\n".join("\n".join([name, *_indented(lines)]) for name, lines in sections.items())
    problems = [each for each in (problem, plan.problem) if each]
    return DryRun(text, problems)


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}".rstrip() for line in lines]


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as aligned lines; columns in `right` are aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _config(config: Config, origins: dict[str, Origin] | None) -> list[str]:
    fields = flatten(dataclasses.asdict(config))
    if origins is None:
        return table([(name, repr(value)) for name, value in fields.items()])
    width = max(len(name) for name in fields)
    values = min(max(len(repr(value)) for value in fields.values()), WIDEST_VALUE)
    lines = [f"{'field'.ljust(width)}  {'value'.ljust(values)}  from (in place of)"]
    for name, value in fields.items():
        origin = origins[name]
        said = origin.source
        if origin.source != DEFAULT:
            below = "" if origin.beneath == DEFAULT else f"{origin.beneath}'s "
            said += f" ({below}{origin.value!r})"
        lines.append(f"{name.ljust(width)}  {repr(value).ljust(values)}  {said}")
    return lines


def _parameters(network: Network, mesh: Mesh) -> list[str]:
    parameters = network.abstract_parameters()
    # The whole tree first: where an axis does not fit, the error says which would.
    shardings = parameter_shardings(parameters, mesh)
    local = [
        sharding.shard_shape(leaf.shape)
        for leaf, sharding in zip(
            jax.tree.leaves(parameters), jax.tree.leaves(shardings), strict=True
        )
    ]
    rows = [("parameter", "shape, /axis that cuts it", "count", "a device's")]
    group, total, total_bytes = "", 0, 0
    for (path, shape, dtype, count), part in zip(parameter_table(parameters), local, strict=True):
        # Parameters of a block come under one heading, which keeps the lines short.
        parent, name = _grouped(path)
        if parent != group:
            rows.append((f"{parent}/", "", "", ""))
        group = parent
        cut = _cut_shape(shape, tuple(parameter_spec(path, shape, mesh.shape)))
        rows.append((f" {name}", cut, f"{count:,}", in_bytes(nbytes(part, dtype))))
        total, total_bytes = total + count, total_bytes + nbytes(part, dtype)
    rows.append(("total", "", f"{total:,}", in_bytes(total_bytes)))
    dtypes = sorted({dtype for _, _, dtype, _ in parameter_table(parameters)})
    return [*table(rows, right=(2, 3)), f"all {', '.join(dtypes)}"]


def _grouped(path: str) -> tuple[str, str]:
    names = path.split("/")
    depth = 2 if names[0] == "blocks" else 1
    return "/".join(names[:depth]), "/".join(names[depth:])


def _cut_shape(shape: tuple[int, ...], spec: tuple[Any, ...]) -> str:
    cuts = [*spec, *[None] * (len(shape) - len(spec))]
    return " ".join(
        "/".join([str(size), *([cut] if isinstance(cut, str) else cut or ())])
        for size, cut in zip(shape, cuts, strict=True)
    )


def _mesh(mesh: Mesh) -> list[str]:
    device = mesh.devices.flat[0]
    rows = [
        ("axes", ", ".join(f"{name} {size}" for name, size in mesh.shape.items())),
        ("devices", f"{mesh.size} of {device.platform} ({device.device_kind})"),
        ("processes", f"{jax.process_count()}"),
    ]
    return table(rows)


def _batch(config: Config, mesh: Mesh) -> list[str]:
    size, accumulation = config.data.batch_size, config.optimizer.accumulation_steps
    on_device = size // (mesh.shape["data"] * mesh.shape["fsdp"])
    rows = [
        ("images in a step", f"{size:,}"),
        ("read by each process", f"{size // jax.process_count():,}"),
        ("on each device", f"{on_device:,}"),
        ("accumulated over", f"{accumulation:,} parts, {on_device // accumulation:,} at once"),
    ]
    return table(rows)


class _Taught(NamedTuple):
    """A teacher without its weights, and the multiply-adds of its forward pass."""

    teacher: Teacher
    multiply_adds: int


def _computation(network: Network, taught: _Taught | None) -> list[str]:
    config = network.config
    macs = multiply_adds(config.model, network.out_channels)
    image, size = sum(macs.values()), config.data.batch_size
    rows = [("multiply-adds of an image, forward", f"{image / 1e6:,.2f} M")]
    rows += [(f"  {name}", f"{value / 1e6:,.2f} M") for name, value in macs.items()]
    step = (1 + BACKWARD) * image
    named = "of a step, forward and backward"
    if taught is not None:
        rows.append(("of the teacher, forward", f"{taught.multiply_adds / 1e6:,.2f} M"))
        step, named = step + taught.multiply_adds, f"{named}, with the teacher's"
    rows.append((named, f"{step * size / 1e9:,.2f} G"))
    rows.append(("of the run", f"{step * size * config.train.steps / 1e12:,.2f} T"))
    return [*table(rows, right=(1,)), "a multiply-add is two FLOPs"]


def _abstract_teacher(network: Network, mesh: Mesh) -> _Taught | None:
    pretrained = read_teacher(network)
    if pretrained is None:
        return None
    shardings = parameter_shardings(pretrained.parameters, mesh)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        pretrained.parameters,
        shardings,
    )
    macs = multiply_adds(pretrained.config, pretrained.out_channels)
    return _Taught(make_teacher(network, pretrained, shapes), sum(macs.values()))


def _memory(network: Network, mesh: Mesh, taught: _Taught | None, *, compiled: bool) -> list[str]:
    teacher = None if taught is None else taught.teacher
    batch = abstract_batch(network, mesh)
    memory = estimate_memory(network, mesh, batch, teacher)
    policy = network.config.model.rematerialisation
    accumulation = network.config.optimizer.accumulation_steps
    rows = [
        ("parameters", memory.parameters, "from shapes and shardings"),
        ("optimizer", memory.optimizer, "likewise"),
        ("average (EMA)", memory.ema, "likewise"),
        ("teacher", memory.teacher, "likewise"),
        (
            "gradients",
            memory.gradients,
            "as parameters" + (", a sum and a part" if accumulation > 1 else ""),
        ),
        ("batch", memory.batch, ""),
        ("activations", memory.activations, "estimate: kept for the backward pass"),
        ("recomputed", memory.recomputed, "estimate: a block's, made again in it"),
        ("total", memory.total, ""),
        ("on the host", memory.host, "estimate: offloaded activations"),
    ]
    shown = [row for row in rows if row[1] or row[0] == "activations"]
    lines = table([(name, in_bytes(size), how) for name, size, how in shown], right=(1,))
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        lines.append(f"of the device's {in_bytes(limit)}: {memory.total / limit:.0%}")
    lines.append(f"activations as differentiation keeps them, rematerialisation {policy};")
    lines.append("the compiler fuses some of them, and needs buffers of its own")
    if mesh.shape["tensor"] > 1:
        lines.append("what the axis tensor cuts of the activations is counted whole")
    if compiled:
        planned = compiled_memory(network, mesh, batch, teacher)
        if planned is None:
            return [*lines, "compiled: this platform does not tell"]
        lines.append("compiled, as XLA plans it:")
        rows_planned = [(f"  {name}", in_bytes(size)) for name, size in planned.items()]
        lines += table([*rows_planned, ("  total", in_bytes(sum(planned.values())))], right=(1,))
    return lines


def _kernels(network: Network, mesh: Mesh) -> list[str]:
    """Which implementation of each operation a step runs: the step's own choice, as it traces."""
    config = network.config
    size = config.data.batch_size // config.optimizer.accumulation_steps
    batch = {
        name: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in abstract_batch(network, mesh).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh), recording_choices() as choices:
        jax.eval_shape(
            lambda parameters, batch, key: training_loss(network, parameters, batch, key),
            network.abstract_parameters(),
            batch,
            key,
        )
    rows = [(operation, ", ".join(sorted(names))) for operation, names in choices.items()]
    if config.model.attention.kind == "softmax":
        rows.append(("softmax attention", "jax.nn.dot_product_attention"))
    return table(rows) if rows else ["XLA alone"]


def _data(config: Config) -> tuple[list[str], str | None]:
    """Facts of the data set with one batch of it, and why it cannot be read."""
    data, train = config.data, config.train
    images = train.steps * data.batch_size
    rows = [("source", f"{data.source}, split {data.split}")]
    if data.latents:
        rows.append(("latents", data.latents))
    rows.append(("steps", f"{train.steps:,} of {data.batch_size:,} images: {images:,} images"))
    try:
        source, batches = load_data(config)
        batch = next(batches)
    except UserError as error:
        return [*table(rows), "cannot be read, see the error below"], str(error)
    size = len(source)
    rows.append(("epochs", f"{images / size:,.2f}, {size / data.batch_size:,.2f} steps each"))
    rows.append(("examples", f"{size:,} of {len(source.label_names):,} classes"))
    for name, value in batch.items():
        array = np.asarray(value)
        rows.append((f"first {name}s", f"{array.shape} {array.dtype}, {_range(array)}"))
    return table(rows), None


def _range(values: np.ndarray) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"


def _weights(network: Network) -> list[str]:
    config, lines = network.config, []
    if config.inheritance.checkpoint:
        taken, new = read_inherited(network)
        lines.append(
            f"step 0 inherits {len(taken)} arrays of {config.inheritance.checkpoint}, {len(new)} "
            "start anew:"
        )
        lines += [f"  {path}" for path in new]
    if config.distillation.teacher:
        lines.append(f"learns from {config.distillation.teacher}")
    return lines
