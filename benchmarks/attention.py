"""Time DyDiLA against the relu core and softmax attention, alternating within one run.

    python -m benchmarks.attention [--tokens 256 1024 --widths 72 288 --json FILE --plot FILE]

Rows: DyDiLA's core (all options of the default model: routed lambda, exponents of each token, base
normalizer) by each implementation that runs on this platform, the relu core, and
`jax.nn.dot_product_attention` (cuDNN on a GPU). Passes: forward; backward alone, from saved
residuals; forward and backward. bfloat16. On a CPU: small sizes, under two minutes.

Achieved bandwidth is the least traffic of a fused core over the measured time, against that of a
copy in the same run. In units X = B H N d 2 bytes: DyDiLA 6 forward, 11 backward; relu core and
softmax 4 and 7.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternating_medians, copy_bandwidth, file_name, hardware
from dydilit_jax.errors import UserError
from dydilit_jax.kernels.dydila import api
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas

RESULTS = Path(__file__).parent / "results"
PASSES = ("forward", "backward", "forward+backward")
LEAST = {"DyDiLA": (6, 11), "relu": (4, 7), "softmax": (4, 7)}  # X, forward and backward
SCORES_BYTES = 2**28  # of softmax's N x N scores on a CPU, beyond which it is left out

Attention = Callable[..., jax.Array]


def dydila(implementation: str, heads: int) -> Attention:
    """DyDiLA's core on a dict of arrays, by a named implementation."""

    def attend(arrays: dict[str, jax.Array]) -> jax.Array:
        inputs = CoreInputs(
            arrays["query"],
            arrays["key"],
            arrays["value"],
            Exponents(*arrays["exponents"]),
            arrays["query_redundant"],
            arrays["key_redundant"],
            Lambdas(arrays["bank"], arrays["query_router"], arrays["key_router"]),
        )
        options = CoreOptions(heads=heads)
        return api.dydila_core(inputs, options, implementation=implementation).output

    return attend


def relu(heads: int, implementation: str | None = None) -> Attention:
    """The relu core (LiT, SANA); by default by the implementation that the platform chooses."""

    def attend(arrays: dict[str, jax.Array]) -> jax.Array:
        inputs = CoreInputs(arrays["query"], arrays["key"], arrays["value"])
        options = CoreOptions(heads=heads)
        return api.dydila_core(inputs, options, implementation=implementation).output

    return attend


def softmax(heads: int) -> Attention:
    """Softmax attention as jax.nn has it; flash attention of cuDNN on a GPU."""
    implementation: Literal["cudnn"] | None = "cudnn" if jax.default_backend() == "gpu" else None

    def attend(arrays: dict[str, jax.Array]) -> jax.Array:
        batch, tokens, width = arrays["query"].shape
        shape = (batch, tokens, heads, width // heads)
        query, key, value = (arrays[name].reshape(shape) for name in ("query", "key", "value"))
        output = jax.nn.dot_product_attention(query, key, value, implementation=implementation)
        return output.reshape(batch, tokens, width)

    return attend


def make_arrays(batch: int, tokens: int, heads: int, width: int) -> dict[str, jax.Array]:
    """Random inputs: queries and so on (B, N, H d) bfloat16, scalars float32."""
    rng = np.random.default_rng(0)
    D, n = heads * width, 9
    names = ("query", "key", "value", "query_redundant", "key_redundant")
    arrays = {
        name: jnp.asarray(rng.standard_normal((batch, tokens, D), np.float32), jnp.bfloat16)
        for name in names
    }
    routers = rng.standard_normal((2, 2 * D, n), np.float32) / D**0.5
    return arrays | {
        "exponents": jnp.full((4, batch, tokens), 3.0),
        "bank": jnp.linspace(0.01, 0.5, n),
        "query_router": jnp.asarray(routers[0]),
        "key_router": jnp.asarray(routers[1]),
    }


def runnable(arrays: dict[str, jax.Array], heads: int, score_bytes: float) -> dict[str, Attention]:
    """Every row that this platform runs at this size."""
    rows = {}
    for name in api.IMPLEMENTATIONS:
        if name == "reference":
            continue
        attend = dydila(name, heads)
        try:
            jax.eval_shape(attend, arrays)
        except UserError as error:
            print(f"  without DyDiLA, {name}: {error}")
            continue
        rows[f"DyDiLA, {name}"] = attend
    rows["relu core"] = relu(heads)
    if jax.default_backend() == "cpu" and score_bytes > SCORES_BYTES:
        print(f"  without softmax: its scores would take {score_bytes / 1e9:.1f} GB")
    else:
        rows["softmax"] = softmax(heads)
    return rows


def measure(
    rows: dict[str, Attention], arrays: dict[str, jax.Array], repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds of every pass, by row."""
    d_output = arrays["value"]

    def both(attend: Attention, arrays: dict[str, jax.Array], d_output: jax.Array) -> Any:
        output, vjp = jax.vjp(attend, arrays)
        return output, vjp(d_output)

    # vjp's residuals are arrays of a pytree: a jitted function can return it and take it.
    residuals = {
        name: jax.jit(lambda arrays, attend=attend: jax.vjp(attend, arrays)[1])(arrays)
        for name, attend in rows.items()
    }
    backward = {
        name: lambda residuals, d_output, name=name: residuals[name](d_output) for name in rows
    }
    return {
        "forward": alternating_medians(rows, (arrays,), repeats),
        "backward": alternating_medians(backward, (residuals, d_output), repeats),
        "forward+backward": alternating_medians(
            {name: partial(both, attend) for name, attend in rows.items()},
            (arrays, d_output),
            repeats,
        ),
    }


def print_table(seconds: dict[str, dict[str, float]], unit: int, bandwidth: float) -> None:
    """One line a row: milliseconds, and the share of the copy's bandwidth."""
    names = list(seconds["forward"])
    width = max(len(name) for name in names)
    print(" " * width + "".join(f"{f'{name}, ms':>22}{'of copy':>9}" for name in PASSES))
    for name in names:
        cells = ""
        for name_of_pass in PASSES:
            took = seconds[name_of_pass][name]
            share = least_bytes(name, name_of_pass, unit) / took / bandwidth
            cells += f"{1e3 * took:22.3f}{share:9.1%}"
        print(f"{name:<{width}}{cells}")


def least_bytes(row: str, name_of_pass: str, unit: int) -> int:
    """Bytes that a fused core must move at least."""
    forward, backward = next(x for name, x in LEAST.items() if row.startswith(name))
    moved = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    return moved[name_of_pass] * unit


def draw(record: dict[str, Any], path: Path) -> None:
    """Milliseconds of forward and backward against tokens, a panel for each head width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = sorted({case["width"] for case in record["cases"]})
    figure, axes = plt.subplots(
        1, len(widths), figsize=(5 * len(widths), 4), sharey=True, squeeze=False
    )
    for axis, width in zip(axes[0], widths, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for case in record["cases"]:
            if case["width"] == width:
                for row, took in case["seconds"]["forward+backward"].items():
                    per_token = 1e6 * took / (case["batch"] * case["tokens"] * case["heads"])
                    lines.setdefault(row, []).append((case["tokens"], per_token))
        for row, points in lines.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=row)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", title=f"head width {width}", xlabel="tokens")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0][0].set_ylabel("forward + backward, µs a token and head")
    axes[0][0].legend()
    figure.suptitle(f"{record['device']}, JAX {record['jax']}, bfloat16")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tokens = [256, 1024, 2048] if on_cpu else [256, 1024, 4096, 16384, 65536]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens)
    parser.add_argument("--widths", type=int, nargs="+", default=[72, 288])
    parser.add_argument("--model_width", type=int, default=288 if on_cpu else 1152)
    parser.add_argument("--batch_tokens", type=int, default=2048 if on_cpu else 65536)
    parser.add_argument("--repeats", type=int, default=3 if on_cpu else 21)
    parser.add_argument("--json", type=Path, help="default: results/, named by the device")
    parser.add_argument("--plot", type=Path, help="default: beside the JSON; needs matplotlib")
    options = parser.parse_args(arguments)

    device = hardware()
    bandwidth = copy_bandwidth(2**28 if on_cpu else 2**31)
    print(f"{device}, JAX {jax.__version__}, copy {bandwidth / 1e9:.1f} GB/s, bfloat16")
    cases = []
    for width in options.widths:
        heads = options.model_width // width
        for count in options.tokens:
            batch = max(1, options.batch_tokens // count)
            print(f"B {batch}, N {count}, H {heads}, d {width}")
            arrays = make_arrays(batch, count, heads, width)
            rows = runnable(arrays, heads, 4.0 * batch * heads * count * count)
            seconds = measure(rows, arrays, options.repeats)
            unit = arrays["query"].nbytes
            print_table(seconds, unit, bandwidth)
            cases.append(
                {
                    "batch": batch,
                    "tokens": count,
                    "heads": heads,
                    "width": width,
                    "seconds": seconds,
                    "bytes_per_second": {
                        name_of_pass: {
                            row: least_bytes(row, name_of_pass, unit) / took
                            for row, took in column.items()
                        }
                        for name_of_pass, column in seconds.items()
                    },
                }
            )
    record = {
        "device": device,
        "jax": jax.__version__,
        "copy_bytes_per_second": bandwidth,
        "cases": cases,
    }
    path = options.json or RESULTS / f"attention_{file_name(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"wrote {path}")
    plot = options.plot or path.with_suffix(".png")
    try:
        draw(record, plot)
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(f"wrote {plot}")


if __name__ == "__main__":
    main()
