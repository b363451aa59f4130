"""Draws what a run wrote into its metrics.jsonl, one panel a field, one colour a run.

    python -m benchmarks.curves --workdir=runs/digits --out=docs/digits_loss.png
    python -m benchmarks.curves --workdir=runs/a --workdir=runs/b --fields=loss,gradient_norm \
        --out=curves.png

The line is a running mean over about a twentieth of the run, the raw values lie behind it. An axis
is logarithmic where its values are positive and the largest is several times the smallest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dydilit_jax.errors import UserError, unknown_name

SMOOTHING = 0.05  # of a curve's points are averaged
LOG_RATIO = 3.0  # largest over smallest value from which an axis is logarithmic
PLAIN_RATIO = 100.0  # below it the axis has plain numbers, not powers of ten alone
FLOOR_QUANTILE = 0.02  # a few values near zero do not decide about the axis

Curve = tuple[np.ndarray, np.ndarray]


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
      UserError: there is none, or a line that is no JSON object with a step.
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{str(path)!r} does not exist: --workdir takes the workdir of a run")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{str(path)!r}, line {number}: no JSON object with a step") from error
        rows.append(row)
    return rows


def curve(rows: list[dict[str, Any]], field: str) -> Curve:
    """Steps and values of a field, in order of steps; the last word counts where a step has two.

    Raises:
      UserError: no row has such a number (names the nearest that one has).
    """
    numbers = {
        name
        for row in rows
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }
    if field not in numbers:
        raise unknown_name("field", field, sorted(numbers))
    by_step = {row["step"]: float(row[field]) for row in rows if field in row}
    steps = sorted(by_step)
    return np.asarray(steps), np.asarray([by_step[step] for step in steps])


def smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """Mean over `half` points to each side; fewer, and as many on both, towards the ends.

    A window that shrank on one side alone would bend the ends of a falling curve. Values that are
    not finite are left out.
    """
    means = np.full(len(values), np.nan)
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        window = window[np.isfinite(window)]
        if window.size:
            means[i] = window.mean()
    return means


def wants_log(values: np.ndarray) -> bool:
    """Whether a logarithmic axis serves these values."""
    values = values[np.isfinite(values)]
    if values.size == 0 or values.min() <= 0:
        return False
    return bool(values.max() >= LOG_RATIO * np.quantile(values, FLOOR_QUANTILE))


def draw(runs: dict[str, list[dict[str, Any]]], fields: list[str], title: str, out: Path) -> None:
    """Draws a panel for each field with a curve for each run, to a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    curves = {field: {name: curve(rows, field) for name, rows in runs.items()} for field in fields}
    columns = min(len(fields), 2)
    lines = math.ceil(len(fields) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(6.4 * columns, 4.0 * lines), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(fields) :]:
        axes.remove()
    for axes, (field, by_run) in zip(panels.flat, curves.items(), strict=False):
        for i, (name, (steps, values)) in enumerate(by_run.items()):
            half = math.ceil(SMOOTHING / 2 * len(values))
            axes.plot(steps, values, color=f"C{i}", alpha=0.3, linewidth=1)
            axes.plot(steps, smoothed(values, half), color=f"C{i}", label=name)
        axes.set(xlabel="step", ylabel=field.replace("_", " "))
        if wants_log(np.concatenate([values for _, values in by_run.values()])):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < PLAIN_RATIO * low:
                axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
                axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
                axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(which="major", alpha=0.3)
        if len(runs) > 1:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--workdir", type=Path, action="append", required=True, help="of a run; may be repeated"
    )
    parser.add_argument("--fields", default="loss", help="like loss,gradient_norm")
    parser.add_argument("--title", default="", help="default: the runs' names")
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    arguments = parser.parse_args()
    try:
        if arguments.out.suffix != ".png" or not arguments.out.parent.is_dir():
            raise UserError(f"--out={arguments.out} must be a .png in a folder that exists")
        runs = {str(workdir): read_metrics(workdir) for workdir in arguments.workdir}
        fields = arguments.fields.split(",")
        draw(runs, fields, arguments.title or ", ".join(runs), arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
