"""Tables and a plot of what `python -m benchmarks.ladder` left in its folder.

    python -m benchmarks.ladder_report [--out runs/ladder] [--data_dir DIR]

Scores every run's samples, prints a table of means and standard errors over seeds in markdown for
each data set and budget, and writes all runs to --json and the plot to --plot.

Differences are paired: a run minus the run of the other variant with the same seed, which has seen
the same images in the same order, and is measured with the same times and noise.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ladder import read_costs
from benchmarks.ladder_variants import ABLATIONS, ALL_VARIANTS, TASKS, load_split, stack
from dydilit_jax.metrics.frechet import Moments, frechet_distance, moments
from dydilit_jax.metrics.pixels import label_agreement

METRICS = ("loss", "frechet", "agreement")
SIDE = 8  # images are averaged to this side before they are scored
REFERENCES = 2000  # real images that samples are scored against, at most
REFERENCE_SEED = 3
Rows = dict[tuple[str, int], dict[str, Any]]
"""By variant and seed, a run's metrics."""


def vectors(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) in [-1, 1], averaged to SIDE x SIDE, as vectors (n, D) float64.

    D is 64 for digits, as they are, and 192 for CIFAR-10, which few samples have a covariance for.
    """
    count, height, width, channels = images.shape
    blocks = images.astype(np.float64).reshape(
        count, SIDE, height // SIDE, SIDE, width // SIDE, channels
    )
    return blocks.mean(axis=(2, 4)).reshape(count, -1)


class Scorer:
    """Scores samples of a data set against its training images."""

    def __init__(self, task: str, data_dir: str):
        source, held = load_split(TASKS[task], data_dir)
        rng = np.random.default_rng(REFERENCE_SEED)
        order = rng.permutation(len(source))[:REFERENCES].tolist()
        reference = stack(source, order)
        self.images, self.labels = vectors(reference.images), reference.labels
        self.moments: Moments = moments(self.images)
        self.held = self.score(held.images, held.labels)

    def score(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Frechet distance of images (n, H, W, C) in [-1, 1], and agreement with labels (n,)."""
        drawn = vectors(images)
        return {
            "frechet": frechet_distance(moments(drawn), self.moments),
            "agreement": label_agreement(drawn, labels, self.images, self.labels),
        }

    def score_samples(self, samples: np.ndarray) -> dict[str, float]:
        """The same of samples (n, H, W, C) uint8 whose labels take turns."""
        classes = int(self.labels.max()) + 1
        return self.score(samples / 127.5 - 1.0, np.arange(len(samples)) % classes)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error; of a single value the error is not known, NaN."""
    array = np.asarray(list(values), np.float64)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))


def paired(rows: Rows, variant: str, other: str, metric: str) -> list[float]:
    """Variant minus other, seed by seed, for the seeds that both were run with."""
    seeds = sorted(seed for name, seed in rows if name == variant and (other, seed) in rows)
    return [rows[variant, seed][metric] - rows[other, seed][metric] for seed in seeds]


def read_runs(out: Path) -> list[dict[str, Any]]:
    """The records of all runs in the folder, with the path of each."""
    paths = sorted(out.glob("*-*-*.json"))
    return [{**json.loads(path.read_text()), "path": path} for path in paths]


def score_runs(runs: list[dict[str, Any]], scorers: Callable[[str], Scorer]) -> list[dict]:
    """A flat record for each run and budget: what it reached."""
    results = []
    for run in runs:
        samples = np.load(run["path"].with_suffix(".npz"))
        for budget, end in run["ends"].items():
            losses = end["loss"]
            results.append(
                {
                    "task": run["task"],
                    "variant": run["variant"],
                    "seed": run["seed"],
                    "budget": budget,
                    "step": end["step"],
                    "loss": float(np.mean(losses)),
                    "loss_measure_error": mean_and_error(losses)[1],
                    **scorers(run["task"]).score_samples(samples[budget]),
                    "skipped_steps": run["skipped_steps"],
                    "parameters": run["parameter_count"],
                    "multiply_adds": run["multiply_adds"],
                    "telemetry": end["telemetry"],
                    "curve": run["curve"],
                }
            )
    return results


def rows_of(results: list[dict], task: str, budget: str) -> Rows:
    """The metrics of a data set's runs at a budget."""
    return {
        (result["variant"], result["seed"]): result
        for result in results
        if result["task"] == task and result["budget"] == budget
    }


def variants_of(rows: Collection[tuple[str, int]]) -> list[str]:
    """Variants that have rows, from the ladder's foot to its top."""
    return [name for name in ALL_VARIANTS if any(name == variant for variant, _ in rows)]


def with_error(values: list[float], digits: int, *, sign: bool = False) -> str:
    """`mean ± standard error` for a table; a dash where there is nothing."""
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    shown = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    return shown if np.isnan(error) else f"{shown} ± {error:.{digits}f}"


def table(rows: Rows, references: Sequence[str], costs: dict[str, float]) -> str:
    """A table in markdown: a row for each variant, differences to the reference variants."""
    header = ["variant", "seeds", "steps", "ms a step", "loss"]
    header += [f"loss minus {name}'s" for name in references]
    header += ["Frechet distance", "agreement, %"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for variant in variants_of(rows):
        own = {seed: row for (name, seed), row in rows.items() if name == variant}
        cells = [
            variant,
            str(len(own)),
            "/".join(sorted({str(row["step"]) for row in own.values()})),
            f"{1e3 * costs[variant]:.0f}" if variant in costs else "-",
            with_error([row["loss"] for row in own.values()], 4),
        ]
        for name in references:
            same = variant == name
            cells.append(
                "" if same else with_error(paired(rows, variant, name, "loss"), 4, sign=True)
            )
        cells.append(with_error([row["frechet"] for row in own.values()], 2))
        cells.append(with_error([100 * row["agreement"] for row in own.values()], 1))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_table(rows: Mapping[tuple[str, int], Mapping[str, Any]], reference: str) -> str:
    """In markdown, by the steps that all runs were measured at: loss minus the reference's."""
    curves = {key: {int(k): v for k, v in row["curve"].items()} for key, row in rows.items()}
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    header = ["variant", *(f"{step} steps" for step in steps)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for variant in variants_of(rows):
        cells = [f"{variant}, loss" if variant == reference else variant]
        for step in steps:
            losses: Rows = {key: {"loss": curve[step]} for key, curve in curves.items()}
            if variant == reference:
                values = [row["loss"] for (name, _), row in losses.items() if name == variant]
            else:
                values = paired(losses, variant, reference, "loss")
            cells.append(with_error(values, 4, sign=variant != reference))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: list[dict], held: dict[str, dict[str, float]], path: Path) -> None:
    """Draws every metric by variant: mean and standard error, and each seed as a small dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = [task for task in TASKS if any(result["task"] == task for result in results)]
    figure, grid = pyplot.subplots(
        len(tasks),
        len(METRICS),
        figsize=(11, 3.6 * len(tasks)),
        layout="constrained",
        squeeze=False,
    )
    titles = {
        "loss": "loss on held-out images",
        "frechet": f"Frechet distance, {SIDE} x {SIDE} pixels",
        "agreement": "label agreement",
    }
    for axes_of_task, task in zip(grid, tasks, strict=True):
        variants = [
            name for name in variants_of(rows_of(results, task, "steps")) if name not in ABLATIONS
        ]
        for axes, metric in zip(axes_of_task, METRICS, strict=True):
            for offset, (budget, colour) in enumerate((("steps", "C0"), ("seconds", "C1"))):
                rows = rows_of(results, task, budget)
                for height, variant in enumerate(variants):
                    values = [row[metric] for (name, _), row in rows.items() if name == variant]
                    if not values:
                        continue
                    y = -height - 0.3 * offset
                    mean, error = mean_and_error(values)
                    axes.plot(values, [y] * len(values), ".", color=colour, alpha=0.4)
                    label = f"same {budget}" if height == 0 else None
                    spread = None if np.isnan(error) else error
                    axes.errorbar(mean, y, xerr=spread, fmt="s", ms=5, color=colour, label=label)
            if metric in held[task]:
                axes.axvline(held[task][metric], color="0.5", ls="--", label="held-out images")
            axes.set_title(f"{task}: {titles[metric]}", fontsize=10)
            axes.set_yticks([-i - 0.15 for i in range(len(variants))], variants)
            if metric != METRICS[0]:
                axes.set_yticklabels([])
            axes.grid(alpha=0.3)
        axes_of_task[-1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--data_dir", default="", help="tfds's folder, for cifar10")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/ladder.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/ladder.png"))
    options = parser.parse_args(arguments)
    scorers = functools.cache(lambda task: Scorer(task, options.data_dir))
    runs = read_runs(options.out)
    if not runs:
        raise SystemExit(f"error: no runs in {options.out}: run python -m benchmarks.ladder first")
    results = score_runs(runs, scorers)
    tasks = [task for task in TASKS if any(result["task"] == task for result in results)]
    held = {task: scorers(task).held for task in tasks}
    costs = {task: read_costs(options.out, task) for task in tasks}
    for task in tasks:
        print(f"\n{task}: held-out images have {held[task]}")
        everything = rows_of(results, task, "steps")
        rungs = {key: row for key, row in everything.items() if key[0] not in ABLATIONS}
        print(f"\nSame steps:\n\n{table(rungs, ('relu', 'softmax'), costs[task])}")
        timed = rows_of(results, task, "seconds")
        print(f"\nSame seconds:\n\n{table(timed, ('relu', 'softmax'), costs[task])}")
        if any(name == "depthwise" for name, _ in everything):
            print(f"\nLoss minus depthwise's, by step:\n\n{curve_table(everything, 'depthwise')}")
        changed = {k: row for k, row in everything.items() if k[0] in ABLATIONS or k[0] == "dydila"}
        if len(variants_of(changed)) > 1:
            print(f"\nOne field changed:\n\n{table(changed, ('dydila',), {})}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    record = {"held_out_images": held, "seconds_a_step": costs, "runs": results}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    plot(results, held, options.plot)
    print(f"\nwrote {options.json} and {options.plot}")


if __name__ == "__main__":
    main()
