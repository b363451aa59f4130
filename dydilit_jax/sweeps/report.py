"""A page about a sweep's runs, one HTML file that needs nothing else, and a table (CSV)."""

from __future__ import annotations

import base64
import csv
import dataclasses
import datetime
import html
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dydilit_jax.config import Config, flatten
from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.driver import STATES_FILE
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.observe import Metrics, Observer, State, Status, number
from dydilit_jax.sweeps.runs import DEFAULT_SCORE, read_json, read_sweep
from dydilit_jax.training.checkpoint import CONFIG_FILE, load_config

PAGE = Path(__file__).parent / "page"
MOST_POINTS = 500  # of a curve; more are thinned out evenly
HIDDEN = (
    "time/",
    "throughput/",
    "usage/",
)  # metrics without a curve: of the machine, or no numbers
SEED = "seed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reported:
    """A run as the report shows it.

    Attributes:
      status: how it stands.
      tags: words it is grouped by.
      fields: all of its config's, by dotted name.
      curves: (step, value) by metric.
      final: the metrics that were written beside its last step's, its scores.
      grid: its newest sample grid, None if there is none.
    """

    status: Status
    tags: tuple[str, ...]
    fields: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]
    final: dict[str, float]
    grid: Path | None


def check_output(out: Path) -> None:
    """Raises UserError unless a page can be written there."""
    if out.suffix != ".html":
        raise UserError(f"--report={out} must end in .html; a .csv file of that name comes with it")
    if not out.parent.is_dir():
        raise UserError(f"--report={out}: directory {str(out.parent)!r} does not exist")


def write_report(workdir: Path, out: Path, score: Score | None = None) -> tuple[Path, Path]:
    """Writes the page and the table about all runs in a folder.

    Args:
      workdir: a sweep's, or any folder of training runs' workdirs.
      out: the page; the table has its name and ends in .csv.
      score: what ranks the runs; None for what the sweep said, or the loss.

    Raises:
      UserError: there are no runs, or a file cannot be written.
    """
    sweep = read_sweep(workdir) or {}
    if score is None:
        score = Score(**sweep["score"]) if sweep else DEFAULT_SCORE
    runs = collect_runs(workdir, sweep, score)
    table = out.with_suffix(".csv")
    data = page_data(workdir.resolve().name, sweep, runs, score)
    try:
        out.write_text(render(data), encoding="utf-8")
        with table.open("w", newline="", encoding="utf-8") as file:
            write_table(file, runs, score)
    except OSError as error:
        raise UserError(f"cannot write {str(out)!r}: {error.strerror or error}") from error
    return out, table


def collect_runs(workdir: Path, sweep: dict[str, Any], score: Score) -> list[Reported]:
    """All runs of a folder, in the sweep's order, then by name.

    Raises:
      UserError: there is none.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist")
    known = sweep.get("runs", {})
    states = read_json(workdir / STATES_FILE) or {}
    others = sorted(
        each.name
        for each in workdir.iterdir()
        if each.name not in known and (each / CONFIG_FILE).is_file()
    )
    runs = [
        _reported(workdir / name, known.get(name), states.get(name, {}), score)
        for name in [*known, *others]
    ]
    if not runs:
        raise UserError(
            f"there is nothing to report: {str(workdir)!r} holds no runs (folders with "
            f"{CONFIG_FILE}); give the --workdir of a sweep, or a folder of runs"
        )
    return runs


def _reported(
    folder: Path, record: dict[str, Any] | None, told: dict[str, str], score: Score
) -> Reported:
    if (folder / CONFIG_FILE).is_file():
        config = load_config(folder)
    else:  # It has not started yet.
        assert record is not None
        config = Config.from_dict(record["config"])
    observer, metrics = Observer(folder, config, score), Metrics(folder)
    status = Status(folder.name, config.train.steps)
    observer.observe(status)
    if observer.is_complete():
        status.state = State.FINISHED
    elif told:
        status.state, status.error = State(told["state"]), told["error"]
    elif status.step:
        status.state = State.STOPPED
    curves: dict[str, list[tuple[int, float]]] = {}
    final: dict[str, float] = {}
    for each in metrics.refresh():
        for name in each:
            value = number(each, name)
            if name == "step" or value is None or name.startswith(HIDDEN):
                continue
            curves.setdefault(name, []).append((each["step"], value))
            if "loss" not in each:
                final[name] = value
    grids = sorted((folder / "samples").glob("step_*.png"))
    return Reported(
        status=status,
        tags=tuple(record["tags"]) if record else (),
        fields=flatten(dataclasses.asdict(config)),
        curves=curves,
        final=final,
        grid=grids[-1] if grids else None,
    )


def differing(runs: Sequence[Reported]) -> list[str]:
    """Fields in which any two runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.fields)
    return [name for name in names if len({repr(run.fields.get(name)) for run in runs}) > 1]


def groups(runs: Sequence[Reported], fields: Sequence[str]) -> list[int]:
    """For each run the number of its group: runs that differ in nothing but the seed."""
    numbers: dict[str, int] = {}
    keys = [repr([run.fields.get(name) for name in fields if name != SEED]) for run in runs]
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of a curve, the last one among them."""
    stride = -(-len(curve) // MOST_POINTS)
    return curve[len(curve) - 1 :: -stride][::-1] if stride > 1 else curve


def page_data(
    title: str, sweep: dict[str, Any], runs: Sequence[Reported], score: Score
) -> dict[str, Any]:
    """What the page's script draws."""
    fields = differing(runs)
    members = groups(runs, fields)
    names = sorted({name for run in runs for name in run.curves})
    first = [name for name in ("loss", score.name) if name in names]
    return {
        "title": title,
        "config": sweep.get("config", ""),
        "created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "score": dataclasses.asdict(score),
        "fields": fields,
        "metrics": list(dict.fromkeys(first + names)),
        "most_points": MOST_POINTS,
        "seeds": over_seeds(runs, members, score),
        "runs": [
            {
                "name": run.status.name,
                "state": str(run.status.state),
                "error": run.status.error,
                "tags": list(run.tags),
                "group": group,
                "step": run.status.step,
                "total": run.status.total,
                "loss": run.status.loss,
                "score": run.status.score,
                "fields": {name: run.fields.get(name) for name in fields},
                "curves": {name: thinned(curve) for name, curve in run.curves.items()},
                "grid": _embedded(run.grid),
            }
            for run, group in zip(runs, members, strict=True)
        ],
    }


def over_seeds(
    runs: Sequence[Reported], members: Sequence[int], score: Score
) -> list[dict[str, Any]]:
    """Mean and standard deviation of the score over the seeds of each group, best first."""
    scored: dict[int, list[float]] = {}
    names: dict[int, str] = {}
    for run, group in zip(runs, members, strict=True):
        names.setdefault(group, _without_seed(run))
        if run.status.score is not None:
            scored.setdefault(group, []).append(run.status.score)
    rows = [
        {
            "name": names[group],
            "group": group,
            "runs": len(values),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
        }
        for group, values in scored.items()
    ]
    return sorted(rows, key=lambda row: row["mean"], reverse=score.maximize)


def _without_seed(run: Reported) -> str:
    ending = f"-seed={run.fields[SEED]}"
    return run.status.name.replace(ending, "") or run.status.name


def _embedded(grid: Path | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    picture = base64.b64encode(grid.read_bytes()).decode("ascii")
    return {
        "step": int(grid.stem.removeprefix("step_")),
        "source": f"data:image/png;base64,{picture}",
    }


def render(data: dict[str, Any]) -> str:
    """The page: the template with style, script and data in their places."""
    # Within a script element only "<" could end it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (PAGE / "report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": (PAGE / "report.css").read_text(encoding="utf-8"),
        "DATA": text,
        "TABLES": (PAGE / "tables.js").read_text(encoding="utf-8"),
        "CHARTS": (PAGE / "charts.js").read_text(encoding="utf-8"),
    }
    for name, part in parts.items():
        before, mark, after = page.partition(f"<!--{name}-->")
        assert mark, name
        page = before + part + after
    return page


def write_table(file: Any, runs: Sequence[Reported], score: Score) -> None:
    """A row for each run: its state, the fields that differ, its loss and scores."""
    fields = differing(runs)
    finals = list(dict.fromkeys(name for run in runs for name in run.final))
    writer = csv.writer(file)
    head = ["run", "state", "tags", *fields, "step", "steps", "loss", f"best {score.name}"]
    writer.writerow([*head, *(f"final {name}" for name in finals), "error"])
    for run in runs:
        status = run.status
        writer.writerow(
            [
                status.name,
                status.state,
                " ".join(run.tags),
                *(run.fields.get(name) for name in fields),
                status.step,
                status.total,
                status.loss,
                status.score,
                *(run.final.get(name) for name in finals),
                status.error,
            ]
        )
