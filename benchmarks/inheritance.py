"""Does a DyDi-LiT that starts from a DiT, and learns from it, need fewer steps?

Trains a softmax DiT on digits (the teacher), then DyDi-LiT with the same feed-forward from scratch,
with inherited weights, and with inherited weights and distillation. Prints the loss by step and the
steps to given losses, and draws docs/inheritance.png.

    python -m benchmarks.inheritance

The loss is that of rectified flow on 1,024 of the digits, with the same times and noise every time,
and the parameters as they are (no average): of the network alone, without the teacher's terms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from dydilit_jax.config import Config, DistillationConfig, InheritanceConfig
from dydilit_jax.data.load import load_data
from dydilit_jax.models.pretrained import save_pretrained
from dydilit_jax.training.inheritance import inherited_state, load_teacher
from dydilit_jax.training.loop import to_mesh
from dydilit_jax.training.optimizer import ema_parameters
from dydilit_jax.training.sharding import make_mesh
from dydilit_jax.training.state import Network, TrainState, create_state
from dydilit_jax.training.step import compile_step, training_loss

VARIANTS = ("from scratch", "inherited", "inherited and distilled")
HELD = 1024


def run(config: Config, steps: int, every: int) -> tuple[TrainState, list[float]]:
    """Trains `steps` steps; the state, and the loss every `every` steps, before the first too."""
    network, mesh = Network.create(config), make_mesh(config.mesh)
    source, batches = load_data(config)
    state = create_state(network, mesh)
    if config.inheritance.checkpoint:
        state = inherited_state(network, state, config.inheritance.checkpoint)
    step = compile_step(network, mesh, load_teacher(network, mesh))
    examples = [source[i] for i in range(HELD)]
    fixed = {
        name: jnp.stack([jnp.asarray(example[name]) for example in examples])
        for name in ("image", "label")
    }
    measure = jax.jit(lambda p: training_loss(network, p, fixed, jax.random.key(123))[1]["mse"])
    losses = []
    for i in range(steps + 1):
        if i % every == 0:
            losses.append(float(measure(state.parameters)))
        if i < steps:
            state, _ = step(state, to_mesh(next(batches), mesh))
    return state, losses


def steps_to(losses: list[float], goal: float, every: int) -> int | None:
    """The first measured step at which the loss is at most `goal`."""
    return next((i * every for i, loss in enumerate(losses) if loss <= goal), None)


def measure_all(
    teacher_steps: int, steps: int, every: int, seeds: int
) -> dict[str, list[list[float]]]:
    """Losses by variant and seed."""
    argument = "attention={},feedforward=mlp"
    results: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        dit = Config.from_dict(digits.get_config(argument.format("softmax")))
        dit = dataclasses.replace(
            dit, seed=100 + seed, train=dataclasses.replace(dit.train, steps=teacher_steps)
        )
        state, losses = run(dit, teacher_steps, teacher_steps)
        print(f"seed {seed}: the teacher's loss is {losses[-1]:.4f}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            weights = str(Path(folder) / "dit")
            average = jax.tree.map(np.asarray, ema_parameters(state.ema, dit.optimizer))
            save_pretrained(Path(weights), dit.model, average, {})
            student = Config.from_dict(digits.get_config(argument.format("dydila")))
            student = dataclasses.replace(
                student, seed=seed, train=dataclasses.replace(student.train, steps=steps)
            )
            inherited = dataclasses.replace(
                student, inheritance=InheritanceConfig(checkpoint=weights)
            )
            distilled = dataclasses.replace(
                inherited, distillation=DistillationConfig(teacher=weights)
            )
            for name, config in zip(VARIANTS, (student, inherited, distilled), strict=True):
                results[name].append(run(config, steps, every)[1])
                print(f"seed {seed}: {name}: {results[name][-1][-1]:.4f}", flush=True)
    return results


def report(results: dict[str, list[list[float]]], every: int) -> None:
    """Prints the table of means over seeds."""
    means = {name: np.mean(losses, axis=0) for name, losses in results.items()}
    count = len(next(iter(means.values())))
    shown = [i for i in range(count) if i % max(1, count // 8) == 0]
    print(f"\n{'loss at step':26s}" + "".join(f"{i * every:>9d}" for i in shown))
    for name, mean in means.items():
        print(f"{name:26s}" + "".join(f"{mean[i]:9.4f}" for i in shown))
    scratch = means["from scratch"]
    goals = [float(scratch[count // 2]), float(scratch[-1])]
    print(f"\n{'steps to a loss of':26s}" + "".join(f"{goal:9.4f}" for goal in goals))
    for name, mean in means.items():
        reached = [steps_to(list(mean), goal, every) for goal in goals]
        print(f"{name:26s}" + "".join(f"{'-' if r is None else r:>9}" for r in reached))


def draw(results: dict[str, list[list[float]]], every: int, path: Path) -> None:
    """Draws mean and every seed's curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for colour, (name, losses) in zip(("C0", "C1", "C2"), results.items(), strict=True):
        steps = np.arange(len(losses[0])) * every
        for loss in losses:
            axes.plot(steps, loss, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, np.mean(losses, axis=0), color=colour, label=name)
    axes.set(xlabel="step", ylabel="loss (fixed times and noise)", yscale="log")
    # Less than a decade: plain numbers along it, rather than one power of ten.
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_title(f"DyDi-LiT on digits, {len(losses)} seeds")
    axes.legend()
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--teacher_steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--plot", type=Path, default=Path("docs/inheritance.png"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/inheritance.json"))
    arguments = parser.parse_args()
    results = measure_all(
        arguments.teacher_steps, arguments.steps, arguments.every, arguments.seeds
    )
    report(results, arguments.every)
    draw(results, arguments.every, arguments.plot)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"every": arguments.every, "loss": results}, indent=1))


if __name__ == "__main__":
    main()
