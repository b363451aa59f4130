"""Time the two forms of the depthwise convolution against each other, alternating within one run.

    python -m benchmarks.depthwise [--shape 8 16 16 384 --kernel 5 --dtype float32]

Without --shape and --kernel: two token images, each with 5 x 5 and 3 x 3. Rows: XLA's grouped
convolution, the shifted form as JAX differentiates it, the shifted form with its own gradient, and
on a platform that has them the kernels.
Columns: forward; forward and the gradients of x, kernel and bias.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternating_medians, report
from dydilit_jax.kernels.depthwise import api
from dydilit_jax.kernels.depthwise.reference import convolution
from dydilit_jax.kernels.depthwise.xla import shifted
from dydilit_jax.kernels.platform import target

Convolution = Callable[..., jax.Array]


def with_gradients(convolve: Convolution) -> Callable[..., Any]:
    """Return the output and the gradients of half its squared length."""

    def forward_and_backward(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Any:
        y, vjp = jax.vjp(convolve, x, kernel, bias)
        return y, vjp(y)

    return forward_and_backward


def kernels_here(x: jax.Array, kernel: jax.Array) -> dict[str, Convolution]:
    """The backends that run these arguments on this platform."""
    return {
        name: partial(api.depthwise_conv, implementation=name)
        for name, (platform, _) in api.BACKENDS.items()
        if platform == target().platform and api.load_backend(name).unsupported(x, kernel) is None
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("B", "H", "W", "C"))
    parser.add_argument("--kernel", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args(arguments)

    shapes = [tuple(options.shape)] if options.shape else [(128, 4, 4, 64), (8, 16, 16, 384)]
    kernels = [options.kernel] if options.kernel else [5, 3]
    forms: dict[str, Convolution] = {
        "convolution": convolution,
        "shifted, automatic": shifted.fun,
        "shifted": shifted,
    }
    records = []
    for shape in shapes:
        for k in kernels:
            rng = np.random.default_rng(0)
            x = jnp.asarray(rng.normal(size=shape), options.dtype)
            kernel = jnp.asarray(rng.normal(size=(k, k, shape[3])) / k, jnp.float32)
            inputs = (x, kernel, jnp.zeros(shape[3], jnp.float32))
            rows = forms | kernels_here(x, kernel)
            columns = {
                "forward": alternating_medians(rows, inputs, options.repeats),
                "with gradients": alternating_medians(
                    {name: with_gradients(form) for name, form in rows.items()},
                    inputs,
                    options.repeats,
                ),
            }
            size = " x ".join(str(length) for length in shape)
            title = f"Depthwise convolution {k} x {k} of {size}, {options.dtype}"
            records.append(report(title, columns, "shifted"))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
