"""What a run would be, before it is one."""

from __future__ import annotations

import numpy as np

from dydilit_jax.config import Config
from dydilit_jax.data.load import load_data
from dydilit_jax.models.count import multiply_adds, parameter_table
from dydilit_jax.training.sharding import check_fits, make_mesh, parameter_spec, parameter_specs
from dydilit_jax.training.state import Network


def describe(config: Config) -> str:
    """The resolved config, the parameter table, the mesh and a batch's shapes, as text.

    Allocates no parameter and trains nothing, but reads one batch of the data.
    """
    mesh = make_mesh(config.mesh)
    check_fits(config, mesh)
    network = Network.create(config)
    parameter_specs(network.abstract_parameters(), mesh.shape)
    _, batches = load_data(config)
    batch = next(batches)
    rows = parameter_table(network.abstract_parameters())
    total = sum(count for *_, count in rows)
    table = [("parameter", "shape", "dtype", "count", "sharding")]
    table += [
        (path, str(shape), dtype, f"{count:,}", str(tuple(parameter_spec(path, shape, mesh.shape))))
        for path, shape, dtype, count in rows
    ]
    widths = [max(len(row[column]) for row in table) for column in range(5)]
    macs = multiply_adds(config.model, network.out_channels)
    by_part = ", ".join(f"{name} {value / 1e6:,.2f}" for name, value in macs.items())
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    accumulation = config.optimizer.accumulation_steps
    lines = [
        "config:",
        config.to_json(),
        "",
        "  ".join(cell.ljust(width) for cell, width in zip(table[0], widths, strict=True)),
        *(
            "  ".join(
                cell.rjust(width) if column == 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table[1:]
        ),
        "",
        f"parameters: {total:,}",
        f"multiply-adds per image: {sum(macs.values()) / 1e6:,.2f} M ({by_part})",
        f"mesh: {dict(mesh.shape)} of {mesh.size} {mesh.devices.flat[0].platform} devices",
        "batch of this process: "
        + ", ".join(
            f"{name} {np.shape(value)} {np.asarray(value).dtype}" for name, value in batch.items()
        ),
        f"batch on each device: {config.data.batch_size // parts} of {config.data.batch_size}"
        + (f", in {accumulation} steps" if accumulation > 1 else ""),
    ]
    return "\n".join(lines)
