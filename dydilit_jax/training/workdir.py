"""What a run would find in its workdir and write to it; nothing is touched."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from dydilit_jax.config import Config, differing_fields, flatten
from dydilit_jax.errors import UserError
from dydilit_jax.training.checkpoint import CONFIG_FILE, Checkpointer, has_checkpoint, load_config
from dydilit_jax.training.memory import in_bytes, total_bytes
from dydilit_jax.training.state import Network, abstract_state


class WorkdirPlan(NamedTuple):
    """What a run would do in a workdir.

    Attributes:
      start: lines: a fresh start or the step it goes on from, and what changed since.
      written: lines: each file, and when it is written.
      problem: why it would not start; None if it would.
    """

    start: list[str]
    written: list[str]
    problem: str | None


def plan_workdir(network: Network, mesh: Mesh, workdir: Path | None) -> WorkdirPlan:
    """The plan of a run in this workdir; None for one that is not chosen yet."""
    config = network.config
    written = _written(config, total_bytes(abstract_state(network, mesh)))
    if workdir is None:
        return WorkdirPlan(["no --workdir is given"], written, None)
    try:
        return WorkdirPlan(_start(workdir, config), written, None)
    except UserError as error:
        return WorkdirPlan(["refused, see the error below"], written, str(error))


def _start(workdir: Path, config: Config) -> list[str]:
    """What the run starts from.

    Raises:
      UserError: the workdir cannot be written, or belongs to another config.
    """
    _check_writable(workdir)
    if not workdir.exists():
        return [f"afresh: {workdir} is made"]
    if not has_checkpoint(workdir):
        return [f"afresh: {workdir} holds no checkpoint"]
    saved = load_config(workdir)
    if fields := differing_fields(saved, config):
        raise UserError(
            f"workdir {str(workdir)!r} holds checkpoints of another config; differing fields: "
            f"{'; '.join(fields)}. Use another --workdir, or the old config"
        )
    step = Checkpointer(workdir).latest_step() or 0
    steps = config.train.steps
    left = max(steps - step, 0)
    lines = [f"resumes {workdir} at step {step:,}: {left:,} of {steps:,} steps are left"]
    if not left:
        lines = [f"{workdir} is finished: {step:,} steps"]
    before, now = (flatten(dataclasses.asdict(each)) for each in (saved, config))
    changed = [name for name in now if before.get(name) != now[name]]
    lines += [f"  {name}: {before.get(name)!r} -> {now[name]!r} since" for name in changed]
    return lines


def _check_writable(workdir: Path) -> None:
    nearest = workdir.absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"cannot write workdir {str(workdir)!r}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot write workdir {str(workdir)!r}: no permission in {nearest}")


def _written(config: Config, checkpoint_bytes: int) -> list[str]:
    train = config.train
    saved = "at the end"
    if train.checkpoint_every:
        saved = f"every {train.checkpoint_every:,} steps and {saved}"
    kept = f"the newest {train.keep_checkpoints}"
    if train.keep_every:
        kept += f" and every {train.keep_every:,} steps'"
    rows = [
        (CONFIG_FILE, "at the start"),
        ("metrics.jsonl, tensorboard/", f"every {train.log_every:,} steps"),
        ("checkpoints/STEP/", saved),
        ("", f"{kept} kept, {in_bytes(checkpoint_bytes)} each"),
    ]
    samples = []
    if train.sample_every:
        samples.append(f"every {train.sample_every:,} steps")
    if config.evaluation.num:
        samples.append("at the end")
    if samples:
        rows.append(("samples/step_STEP.png", " and ".join(samples)))
    if config.evaluation.num:
        rows.append(("scores", f"of {config.evaluation.num:,} samples at the end, to the metrics"))
    if train.profile_at:
        rows.append(("profiles/", f"of {train.profile_steps} steps from step {train.profile_at:,}"))
    rows.append(("goodput.json, run.lock", "while it runs"))
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {when}" for name, when in rows]
