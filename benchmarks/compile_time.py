"""Time to compile a training step against depth: the blocks are scanned, so it should not grow.

    python -m benchmarks.compile_time [--size XL --depths 4 28]

Lowers and compiles the step of a network of the given width, once for each depth, alternating, and
prints seconds and the ratio to the first depth. Allocates no parameter.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from dydilit_jax.config import Config, DataConfig, MeshConfig
from dydilit_jax.models.config import ATTENTIONS, FEEDFORWARDS, SIZES, ModelConfig, size_fields
from dydilit_jax.training.sharding import make_mesh
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.step import jit_step


def compile_seconds(config: Config) -> tuple[float, float]:
    """Seconds to trace and lower one step, and to compile it, with nothing cached."""
    jax.clear_caches()
    network, mesh = Network.create(config), make_mesh(config.mesh)
    model, batch_size = config.model, config.data.batch_size
    image = (batch_size, model.image_size, model.image_size, model.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(image, np.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }
    state = abstract_state(network, mesh)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        lowered = jit_step(network, mesh).lower(state, batch, None)
        middle = time.perf_counter()
        lowered.compile()
        return middle - start, time.perf_counter() - middle


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="XL")
    parser.add_argument("--attention", choices=ATTENTIONS, default="dydila")
    parser.add_argument("--feedforward", choices=FEEDFORWARDS, default="mix")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 28])
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args(arguments)

    fields = size_fields(options.size, options.attention, options.feedforward)
    model = ModelConfig(**fields)
    seconds: dict[int, list[tuple[float, float]]] = {depth: [] for depth in options.depths}
    for _ in range(options.repeats):
        for depth in options.depths:
            config = Config(
                model=dataclasses.replace(model, depth=depth),
                data=DataConfig(batch_size=8 * jax.device_count()),
                mesh=MeshConfig(),
            )
            seconds[depth].append(compile_seconds(config))
    device = jax.devices()[0].device_kind
    print(
        f"Training step of {options.size}'s width ({model.width}), {options.attention}, "
        f"{options.feedforward}; {jax.device_count()} x {device}, JAX {jax.__version__}"
    )
    first = None
    for depth, measured in seconds.items():
        lower, compile_ = np.median(np.array(measured), axis=0)
        first = first or lower + compile_
        print(
            f"{depth:3d} layers: lower {lower:6.1f} s, compile {compile_:6.1f} s, "
            f"together {lower + compile_:6.1f} s, ratio {(lower + compile_) / first:.2f}"
        )


if __name__ == "__main__":
    main()
