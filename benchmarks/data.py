"""What the data costs: images per second from JPEG and from latents, and how long a trainer waits.

    python -m benchmarks.data                                   # digits alone, nothing to prepare
    python -m benchmarks.data --data_dir=DIR --latents=FOLDER --weights=FOLDER

DIR holds cifar10 and imagenet2012 as tfds writes them in ArrayRecord form; FOLDER is what
`python -m dydilit_jax.encode --config=configs/imagenet256.py` wrote, with the autoencoder WEIGHTS.

Reading is done by one thread, and told twice: images per second of the clock, and of CPU time,
which is the rate of one core and hardly changes on a busy machine. The bytes are those on disk;
latents are held against the JPEGs they come from. Waiting is the time that a trainer spends in
`next(batches)` over the time of all, after the first step, for a network of size `tiny`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from dydilit_jax.config import Config, DataConfig
from dydilit_jax.data.latents import LatentSource
from dydilit_jax.data.load import load_data, load_images
from dydilit_jax.data.prefetch import DevicePrefetch
from dydilit_jax.data.sources import EncodedSource
from dydilit_jax.models.config import ModelConfig, size_fields

_DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of cifar10 and imagenet2012.")
_LATENTS = flags.DEFINE_string("latents", "", "Folder of imagenet2012's latents.")
_WEIGHTS = flags.DEFINE_string("weights", "", "The latents' autoencoder.")
_SECONDS = flags.DEFINE_float("seconds", 4.0, "Time of a measurement of reading.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps of a measurement of waiting.")


class Rate(NamedTuple):
    """Items per second of the clock and of CPU time."""

    clock: float
    cpu: float


def reading_rate(read: Callable[[int], object], count: int, seconds: float) -> Rate:
    """How fast read(index) goes, in a random order, warm."""
    order = np.random.default_rng(0).permutation(count)
    read(int(order[0]))
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        read(int(order[done % count]))
        done += 1
    return Rate(done / (time.perf_counter() - start), done / (time.process_time() - cpu))


def waiting_share(config: Config, steps: int) -> tuple[float, float]:
    """Share of the time a trainer waits for batches, and its images per second."""
    import jax

    from dydilit_jax.training.loop import to_mesh
    from dydilit_jax.training.sharding import make_mesh
    from dydilit_jax.training.state import Network, create_state
    from dydilit_jax.training.step import compile_step

    mesh = make_mesh(config.mesh)
    network = Network.create(config)
    _, batches = load_data(config)
    prefetch = DevicePrefetch(
        batches, lambda batch: to_mesh(batch, mesh), depth=config.data.prefetch
    )
    state = create_state(network, mesh)
    step = compile_step(network, mesh)
    state, metrics = step(state, next(prefetch))
    jax.block_until_ready(metrics)
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(prefetch)
        waited += time.perf_counter() - before
        previous = metrics
        state, metrics = step(state, batch)
        # As the trainer: freed before the next is asked for, and a step behind.
        del batch
        jax.block_until_ready(previous)
    jax.block_until_ready(metrics)
    total = time.perf_counter() - start
    prefetch.close()
    return waited / total, steps * config.data.batch_size / total


def encoded_row(name: str, image_size: int) -> tuple[Rate, float]:
    """Prints a row for a set of JPEGs; returns its rate and the mean size of a JPEG."""
    source = load_images(DataConfig(source=name, data_dir=_DATA_DIR.value), image_size=image_size)
    assert isinstance(source, EncodedSource)
    sizes = [len(source.read(i)[0]) for i in range(min(len(source), 500))]
    rate = reading_rate(source.__getitem__, len(source), _SECONDS.value)
    mean = float(np.mean(sizes))
    print_row(f"{name}, JPEG to {image_size} px", rate, mean)
    return rate, mean


def latents_row(jpeg: tuple[Rate, float] | None) -> None:
    """Prints a row for latents, and what they save over JPEGs."""
    source = LatentSource(_LATENTS.value)
    rng = np.random.default_rng(0)
    size = source.manifest.record_size
    rate = reading_rate(
        lambda index: source.transform(source[index], rng), len(source), _SECONDS.value
    )
    shape = "x".join(map(str, source.image_shape))
    print_row(f"{source.manifest.source}, {shape} latents, {source.manifest.dtype}", rate, size)
    if jpeg is not None:
        times = [f"{one / other:.1f} times" for one, other in zip(rate, jpeg[0], strict=True)]
        print(f"| latents over JPEG | {' | '.join(times)} | {size / jpeg[1]:.2f} times | |")


def print_row(name: str, rate: Rate, size: float) -> None:
    """Prints a row of the table of reading."""
    clock, cpu, kilobytes = f"{rate.clock:,.0f}", f"{rate.cpu:,.0f}", f"{size / 1e3:.1f}"
    print(f"| {name} | {clock} | {cpu} | {kilobytes} | {rate.cpu * size / 1e6:.1f} |", flush=True)


def waiting_configs() -> dict[str, Config]:
    """The runs whose waiting is measured."""

    def tiny(image_size: int, channels: int, classes: int) -> dict[str, Any]:
        model = ModelConfig(
            image_size=image_size,
            channels=channels,
            num_classes=classes,
            **size_fields("tiny", "dydila"),
        )
        return Config(model=model).to_dict().to_dict()

    configs = {"digits": tiny(8, 1, 10) | {"data": {"source": "digits", "batch_size": 128}}}
    base = {"data_dir": _DATA_DIR.value, "horizontal_flip": True, "batch_size": 64}
    if _DATA_DIR.value:
        configs["cifar10, pixels"] = tiny(32, 3, 10) | {"data": base | {"source": "cifar10"}}
    if _LATENTS.value:
        manifest = LatentSource(_LATENTS.value).manifest
        data = {"source": manifest.source, "split": manifest.split, "latents": _LATENTS.value}
        configs[f"{manifest.source}, latents"] = tiny(
            manifest.latent_shape[0], manifest.latent_shape[2], len(manifest.label_names)
        ) | {
            "data": base | data | {"horizontal_flip": manifest.flips},
            "autoencoder": {"weights": _WEIGHTS.value},
        }
    return {name: Config.from_dict(fields) for name, fields in configs.items()}


def main(argv: list[str]) -> None:
    """Prints both tables."""
    print("| reading, one thread | images/s | images per CPU s | kB on disk each | MB per CPU s |")
    print("|---|---|---|---|---|")
    jpeg = None
    if _DATA_DIR.value:
        encoded_row("cifar10", 32)
        jpeg = encoded_row("imagenet2012", 256)
    if _LATENTS.value:
        latents_row(jpeg)
    print("\n| training, size tiny | batch | images/s | share of time waiting |\n|---|---|---|---|")
    for name, config in waiting_configs().items():
        share, rate = waiting_share(config, _STEPS.value)
        print(f"| {name} | {config.data.batch_size} | {rate:,.1f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    app.run(main)
