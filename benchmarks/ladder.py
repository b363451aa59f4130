"""Does each idea of DyDiLA help? From plain linear attention to all of it, rung by rung.

    python -m benchmarks.ladder --measure_cost --data digits cifar10 --data_dir=DIR
    python -m benchmarks.ladder --data digits cifar10 --data_dir=DIR --seeds 0 1 2
    python -m benchmarks.ladder_report

The first measures what a training step of each variant costs, all of them in turn in one process.
The second trains: one run for each data set, seed and variant, each with a JSON, samples and
weights in the folder --out; what is there is skipped, so it can be killed and started again.

The learning rate is constant after its warm-up, so the first n steps of a run are a run of n steps.
That is how one run serves two budgets: `steps`, where every variant takes the same number of them,
and `seconds`, where it takes as many as fit into the time that the cheapest variant needs for all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.ladder_variants import (
    ABLATIONS,
    ALL_VARIANTS,
    TASKS,
    VARIANTS,
    Budget,
    Task,
    load_split,
    make_config,
)
from benchmarks.train_step import alternating
from dydilit_jax.config import Config
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.sources import ArraySource, Source
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.models.count import count_parameters, multiply_adds
from dydilit_jax.models.pretrained import save_pretrained
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.sharding import make_mesh, to_mesh
from dydilit_jax.training.state import Network, create_state
from dydilit_jax.training.step import compile_step
from dydilit_jax.training.telemetry import summarize

LOSS_SEED, SAMPLE_SEED = 1, 2


def held_out_loss(network: Network, held: ArraySource, draws: int) -> Callable[[Any], list[float]]:
    """The process's loss on held-out images, with the same times and noise for every network.

    Labels are not dropped. The function takes parameters and returns the mean over images for each
    of so many draws of times and noise: their scatter is that of the measure itself.
    """
    images, labels = jnp.asarray(held.images), jnp.asarray(held.labels)
    keys = jax.random.split(jax.random.key(LOSS_SEED), draws)

    @jax.jit
    def draw(parameters: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        module = network.module(parameters)
        losses, _ = network.process.loss(lambda x, time: module(x, time, labels)[0], images, key)
        return jnp.mean(losses)

    return lambda parameters: [float(draw(parameters, images, labels, key)) for key in keys]


def steps_in_seconds(costs: dict[str, float], variant: str, steps: int) -> int:
    """Steps of a variant in the time that the cheapest rung needs for `steps`; never more.

    Args:
      costs: seconds a step by variant.
      variant: one of them.
      steps: of the longest run.
    """
    cheapest = min(costs[name] for name in costs if name in VARIANTS)
    return min(steps, int(steps * cheapest / costs[variant]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a variant on a data set, with a seed."""

    task: str
    variant: str
    seed: int

    def path(self, out: Path, suffix: str = "") -> Path:
        """Where its file of this suffix is; without one, the folder of its weights."""
        name = self.variant.replace(", ", "_").replace(" ", "_")
        # Not Path.with_suffix, which takes what follows the point of a number for one.
        return out / f"{self.task}-{name}-{self.seed}{suffix}"


def run_job(
    job: Job, split: tuple[Source, ArraySource], config: Config, budget: Budget, stops: dict
) -> dict[str, Any]:
    """Trains one network and measures it at its budgets.

    Args:
      job: which.
      split: images to train on, and held out.
      config: the run's.
      budget: what is measured.
      stops: step of each budget, by its name.

    Returns:
      A record: the loss by step, and for each budget the loss of every draw, telemetry, and the
      samples and averaged parameters as arrays.
    """
    network, mesh = Network.create(config), make_mesh(config.mesh)
    train, held = split
    batches = make_batches(
        train,
        batch_size=config.data.batch_size,
        seed=config.seed,
        horizontal_flip=config.data.horizontal_flip,
        read_threads=config.data.read_threads,
    )
    measure = held_out_loss(network, held, budget.draws)
    state, step = create_state(network, mesh), compile_step(network, mesh)
    every = budget.steps // budget.points
    curve: dict[int, float] = {}
    ends: dict[str, Any] = {}
    skipped = 0
    begin = time.perf_counter()
    for taken in range(1, budget.steps + 1):
        state, metrics = step(state, to_mesh(next(batches), mesh))
        skipped += not np.isfinite(float(metrics["loss"]))
        reached = [name for name, stop in stops.items() if stop == taken]
        if taken % every and not reached:
            continue
        average = ema_parameters(state.ema, config.optimizer)
        losses = measure(average)
        curve[taken] = float(np.mean(losses))
        drawn = draw(network, average, budget.samples, mesh) if reached else None
        for name in reached:
            telemetry = summarize(jax.device_get(metrics))[0]
            ends[name] = {
                "step": taken,
                "loss": losses,
                "telemetry": {key: float(value) for key, value in telemetry.items()},
                "samples": drawn,
            }
    batches.close()
    return {
        "curve": curve,
        "ends": ends,
        "skipped_steps": int(skipped),
        "wall_seconds": time.perf_counter() - begin,
        "parameters": average,
    }


def draw(network: Network, parameters: Any, count: int, mesh: Mesh) -> np.ndarray:
    """Class-balanced samples (count, H, W, C) uint8, from the same noise for every network."""
    labels = np.arange(count) % network.config.model.num_classes
    images = generate_images(
        network,
        parameters,
        labels,
        seed=SAMPLE_SEED,
        config=network.config.sampling,
        mesh=mesh,
    )
    return to_uint8(np.concatenate(list(images)))


def write(job: Job, out: Path, record: dict[str, Any], config: Config, settings: dict) -> None:
    """Writes a run's samples and weights, and its JSON last: with that it counts as done."""
    samples = {name: end.pop("samples") for name, end in record["ends"].items()}
    np.savez_compressed(job.path(out, ".npz"), **samples)
    parameters = jax.tree.map(np.asarray, record.pop("parameters"))
    save_pretrained(job.path(out), config.model, parameters, {}, overwrite=True)
    macs = multiply_adds(config.model)
    record |= {
        **dataclasses.asdict(job),
        "settings": settings,
        "parameter_count": count_parameters(config.model),
        "multiply_adds": sum(macs.values()),
        "jax": jax.__version__,
    }
    unfinished = job.path(out, ".unfinished")
    unfinished.write_text(json.dumps(record, indent=1))
    unfinished.replace(job.path(out, ".json"))


def is_done(job: Job, out: Path, settings: dict[str, Any]) -> bool:
    """Whether the run's JSON is there.

    Raises:
      UserError: it was made with other settings.
    """
    path = job.path(out, ".json")
    if not path.is_file():
        return False
    made = json.loads(path.read_text())["settings"]
    if made != settings:
        fields = sorted(name for name in settings if made.get(name) != settings[name])
        raise UserError(
            f"{path} was made with another {', '.join(fields)}: choose another folder for --out, "
            "or delete it"
        )
    return True


def measure_cost(
    task: Task, budget: Budget, variants: Sequence[str], data_dir: str, seconds: float
) -> dict[str, float]:
    """Seconds of a training step of each variant: the median, all of them taken in turn.

    On a CPU the process's own seconds, which other programs on the machine do not lengthen.
    """
    calls: dict[str, Callable[[], Any]] = {}
    split = load_split(task, data_dir)
    for variant in variants:
        config = make_config(task, variant, 0, budget, data_dir)
        network, mesh = Network.create(config), make_mesh(config.mesh)
        batches = make_batches(split[0], batch_size=budget.batch_size, seed=0, read_threads=1)
        batch = to_mesh(next(batches), mesh)
        batches.close()
        step, held = compile_step(network, mesh), [create_state(network, mesh)]

        def call(step: Any = step, held: list = held, batch: Any = batch) -> None:
            held[0], metrics = step(held[0], batch)
            jax.block_until_ready(metrics)

        calls[variant] = call
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    taken = alternating(calls, seconds, clock=clock)
    return {name: float(np.median(values)) for name, values in taken.items()}


def cost_path(out: Path, task: str) -> Path:
    """Where a task's costs are."""
    return out / f"cost-{task}.json"


def read_costs(out: Path, task: str) -> dict[str, float]:
    """Seconds a step by variant.

    Raises:
      UserError: they were not measured.
    """
    path = cost_path(out, task)
    if not path.is_file():
        raise UserError(f"{path} is missing: run with --measure_cost --out={out} first")
    return json.loads(path.read_text())["seconds"]


def run_all(options: argparse.Namespace, budget: Budget) -> None:
    """Trains what is asked for and not done yet: data set by data set, seed by seed."""
    for name in options.data:
        task, costs = TASKS[name], read_costs(options.out, name)
        split = None
        for seed in options.seeds:
            for variant in options.variants:
                job = Job(task=name, variant=variant, seed=seed)
                config = make_config(task, variant, seed, budget, options.data_dir)
                stops = {"steps": budget.steps}
                if variant in costs:
                    stops["seconds"] = steps_in_seconds(costs, variant, budget.steps)
                model = json.loads(json.dumps(dataclasses.asdict(config.model)))
                settings = {**dataclasses.asdict(budget), "stops": stops, "model": model}
                if is_done(job, options.out, settings):
                    continue
                split = split or load_split(task, options.data_dir)
                record = run_job(job, split, config, budget, stops)
                write(job, options.out, record, config, settings)
                loss = list(record["curve"].values())[-1]
                seconds = record["wall_seconds"]
                print(f"{job.path(options.out).name}: loss {loss:.4f}, {seconds:.0f} s", flush=True)
                # A program a variant and a run: what is not let go of fills the memory.
                jax.clear_caches()


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Budget]:
    """The command line, and the budget it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=TASKS, default=["digits"])
    parser.add_argument("--data_dir", default="", help="tfds's folder, for cifar10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=ALL_VARIANTS, default=list(VARIANTS))
    parser.add_argument("--ablations", action="store_true", help="the open choices instead")
    parser.add_argument("--measure_cost", action="store_true")
    parser.add_argument("--cost_seconds", type=float, default=60.0, help="of timing, a data set")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    for field in dataclasses.fields(Budget):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    options = parser.parse_args(arguments)
    if options.ablations:
        options.variants = list(ABLATIONS)
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(Budget)}
    return options, Budget(**fields)


def main(arguments: Sequence[str] | None = None) -> None:
    options, budget = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        if not options.measure_cost:
            run_all(options, budget)
            return
        for name in options.data:
            costs = measure_cost(
                TASKS[name], budget, options.variants, options.data_dir, options.cost_seconds
            )
            for variant, seconds in costs.items():
                print(f"{name}, {variant}: {1e3 * seconds:.1f} ms a step", flush=True)
            device = jax.devices()[0].device_kind
            record = {"seconds": costs, "device": device, "batch_size": budget.batch_size}
            cost_path(options.out, name).write_text(json.dumps(record, indent=1))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
