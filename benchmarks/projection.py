"""Time the top-1 routed projection against one plain product, alternating within one run.

    python -m benchmarks.projection [--tokens 4096 --width 384 --banks 3 --dtype float32]
                                    [--json FILE] [--plot FILE]

Rows: one plain product (the floor), the dense one-hot form, `jax.lax.ragged_dot` on sorted tokens,
the blocks, the kernels that this platform has, and what `implementation=None` chooses. Columns:
forward; forward and the gradients of x, bank and weights. Bytes per second are the least that the
pass must read and write (tokens and banks once) over its time, next to a copy's in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.timing import alternating_medians, copy_bandwidth, hardware, report
from dydilit_jax.kernels.grouped_projection import api
from dydilit_jax.kernels.grouped_projection.api import grouped_projection
from dydilit_jax.kernels.platform import target

Projection = Callable[..., jax.Array]


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw a report as bars: seconds of every row, a panel for each pass.

    Args:
      record: what `report` returned.
      path: image file; its suffix chooses the format.
    """
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = record["seconds"]
    figure, axes = pyplot.subplots(
        1, len(columns), figsize=(5 * len(columns), 3.5), squeeze=False, layout="constrained"
    )
    for axis, (name, column) in zip(axes[0], columns.items(), strict=True):
        rows = list(column)[::-1]
        axis.barh(rows, [1e3 * column[row] for row in rows])
        axis.axvline(1e3 * column[record["unit"]], color="black", linewidth=0.8)
        axis.set(title=name, xlabel="ms")
    figure.suptitle(f"{record['title']}; {record['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


def plain(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """One product for all tokens: what the projection would cost without routing."""
    return jnp.dot(x, bank[0].astype(x.dtype))


def ragged(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Tokens sorted by bank and `jax.lax.ragged_dot`; gradients by automatic differentiation."""
    order = jnp.argsort(index)
    sizes = jnp.sum(index[:, None] == jnp.arange(bank.shape[0]), axis=0, dtype=jnp.int32)
    product = lax.ragged_dot(x[order], bank.astype(x.dtype), sizes)[jnp.argsort(order)]
    weight = jnp.take_along_axis(weights, index[:, None], axis=1)
    return (weight * product).astype(x.dtype)


def routed(implementation: str | None, straight_through: bool) -> Projection:
    """Return `grouped_projection` with its options bound."""

    def project(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
        return grouped_projection(
            x,
            bank,
            weights,
            index,
            straight_through=straight_through,
            implementation=implementation,
        )

    return project


def with_gradients(project: Projection) -> Callable[..., Any]:
    """Return the output and the gradients of half its squared length."""

    def forward_and_backward(
        x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array
    ) -> Any:
        y, vjp = jax.vjp(lambda *inputs: project(*inputs, index), x, bank, weights)
        return y, vjp(y)

    return forward_and_backward


def kernels_here(x: jax.Array, bank: jax.Array) -> list[str]:
    """Names of the backends that run these arguments on this platform."""
    return [
        name
        for name, (platform, _) in api.BACKENDS.items()
        if platform == target().platform and api.load_backend(name).unsupported(x, bank) is None
    ]


def achieved(
    columns: dict[str, dict[str, float]], x: jax.Array, bank: jax.Array
) -> dict[str, dict[str, float]]:
    """Least bytes of every pass over its seconds, for a bank as wide as it is long.

    Forward reads x and the bank and writes y; the backward pass reads x, dy and the bank and writes
    dx and the bank's gradient. The bank counts in the dtype it is stored in.
    """
    least = {"forward": 2 * x.nbytes + bank.nbytes}
    least["with gradients"] = least["forward"] + 3 * x.nbytes + 2 * bank.nbytes
    return {
        name: {row: least[name] / seconds for row, seconds in column.items()}
        for name, column in columns.items()
    }


def print_bandwidths(record: dict[str, Any]) -> None:
    """Print a report's bytes per second, and the share of the copy's."""
    copy = record["copy_bytes_per_second"]
    print(f"\nLeast bytes over time, GB/s; share of a copy's {copy / 1e9:.1f} GB/s")
    for name, column in record["bytes_per_second"].items():
        for row, rate in column.items():
            print(f"{name:<16}{row:<28}{rate / 1e9:8.2f}{rate / copy:7.0%}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--banks", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (needs matplotlib)")
    options = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    T, D, n = options.tokens, options.width, options.banks
    x = jnp.asarray(rng.normal(size=(T, D)), options.dtype)
    bank = jnp.asarray(rng.normal(size=(n, D, D)) / D**0.5, jnp.float32)
    index = jnp.asarray(rng.integers(0, n, size=T), jnp.int32)
    inputs = (x, bank, jax.nn.one_hot(index, n), index)

    forward: dict[str, Projection] = {
        "plain product": plain,
        "dense": routed("dense", straight_through=False),
        "ragged_dot": ragged,
        "blocks": routed("blocks", straight_through=False),
    }
    for name in kernels_here(x, bank):
        forward[name] = routed(name, straight_through=False)
    forward["default"] = routed(None, straight_through=False)
    backward = forward | {
        f"{name}, straight-through": routed(implementation, straight_through=True)
        for name, implementation in {
            "dense": "dense",
            "blocks": "blocks",
            **{name: name for name in kernels_here(x, bank)},
            "default": None,
        }.items()
    }
    columns = {
        "forward": alternating_medians(forward, inputs, options.repeats),
        "with gradients": alternating_medians(
            {name: with_gradients(project) for name, project in backward.items()},
            inputs,
            options.repeats,
        ),
    }
    title = f"Routed projection, {T} tokens x {D}, {n} banks, {options.dtype}"
    record = report(title, columns, "plain product")
    record["device"] = hardware()
    record["copy_bytes_per_second"] = copy_bandwidth(2**26)
    record["bytes_per_second"] = achieved(columns, x, bank)
    print_bandwidths(record)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    if options.plot is not None:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
