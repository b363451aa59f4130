"""From a config file's notation to runs with a name, a config and a workdir; checked, and recorded.

WORKDIR/sweep.json says what a sweep's workdir is for, so that another sweep does not move in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dydilit_jax.cli import unknown_field
from dydilit_jax.config import Config, differing_fields, flatten
from dydilit_jax.errors import UserError
from dydilit_jax.sweeps.notation import Part, Runs, Score, Search, collect
from dydilit_jax.training.checkpoint import CHECKPOINTS, CONFIG_FILE

SWEEP_FILE = "sweep.json"
LAUNCH_FOLDER = "launch"
NAME_LENGTH = 80
DEFAULT_SCORE = Score("loss")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of a sweep.

    Attributes:
      name: of its folder in the sweep's workdir, and in tables.
      config: what it trains with.
      overrides: what of it the sweep says, by field's dotted name.
      tags: words to group runs by.
      arguments: of dydilit_jax.train, but for --workdir.
    """

    name: str
    config: Config
    overrides: Mapping[str, Any]
    tags: tuple[str, ...]
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A config file that describes a sweep, and what the command line adds to it.

    Attributes:
      path: of the file.
      argument: what followed it after a colon.
      module: the file, executed.
      given: fields that flags set in all runs, by dotted name.
    """

    path: str
    argument: str
    module: ModuleType
    given: Mapping[str, Any]

    @property
    def source(self) -> str:
        """FILE or FILE:ARGUMENT."""
        return f"{self.path}:{self.argument}" if self.argument else self.path

    @property
    def score(self) -> Score:
        """What ranks the runs, unless a flag says otherwise."""
        return getattr(self.module, "SCORE", DEFAULT_SCORE)

    @property
    def search(self) -> Search | None:
        """The search that the file defines, None if it lists its runs.

        Raises:
          UserError: it defines neither, or both.
        """
        found = getattr(self.module, "SEARCH", None)
        listed = [name for name in ("get_sweep", "SWEEP") if hasattr(self.module, name)]
        if found is None and not listed:
            raise UserError(
                f"config file {self.path!r} describes no sweep: define SWEEP, get_sweep(add) or "
                "SEARCH in it (docs/sweeps.md)"
            )
        if len(listed) + (found is not None) > 1:
            names = " and ".join([*listed, *(["SEARCH"] if found is not None else [])])
            raise UserError(f"config file {self.path!r} defines {names}: one of them is a sweep")
        return found

    def runs(self) -> list[Run]:
        """All runs that the file lists, checked.

        Raises:
          UserError: there is none, two collide, or one cannot be.
        """
        if hasattr(self.module, "get_sweep"):
            parts: Runs = collect(self.module.get_sweep)
        else:
            parts = self.module.SWEEP
        if not parts:
            raise UserError(f"the sweep of {self.path!r} has no runs")
        runs = [self.run(part) for part in parts]
        check_collisions(runs)
        return runs

    def run(self, part: Part, name: str = "") -> Run:
        """One run, under its own name or another.

        Raises:
          UserError: an override that no config has (names the nearest), or that does not fit.
        """
        name = name or run_name(part.labels)
        argument = self.argument if part.argument is None else part.argument
        fields = flatten(self.module.get_config(argument).to_dict())
        for field in part.fields:
            if field not in fields:
                error = unknown_field(field) or UserError(f"{field} is a section, not a field")
                raise UserError(f"run {name!r} overrides what no run's config has: {error}")
        overrides = dict(part.fields)
        fields |= overrides
        fields |= self.given
        try:
            config = Config.from_dict(_nested(fields))
        except UserError as error:
            raise UserError(f"run {name!r}: {error}") from error
        # Flags of the command line come last: what a user types has the last word.
        flags = [f"--config.{field}={_text(value)}" for field, value in overrides.items()]
        flags += [f"--config.{field}={_text(value)}" for field, value in self.given.items()]
        source = f"{self.path}:{argument}" if argument else self.path
        return Run(
            name=name,
            config=config,
            overrides=overrides,
            tags=part.tags,
            arguments=(f"--config={source}", *flags),
        )


def load_module(path: Path | str) -> ModuleType:
    """A Python file by its path, executed: how one config file builds on another.

    Raises:
      UserError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_sweep(source: str, given: Mapping[str, Any]) -> SweepFile:
    """The sweep of `--config=SOURCE`, FILE or FILE:ARGUMENT.

    Args:
      source: as the flag gave it.
      given: fields that flags set in all runs, by dotted name.
    """
    path, _, argument = source.partition(":")
    try:
        module = load_module(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the config file fails: {type(error).__name__}: {error}") from error
    return SweepFile(path=path, argument=argument, module=module, given=given)


def run_name(labels: Sequence[str]) -> str:
    """A folder's name out of labels; one that would be too long ends in a hash of the rest."""
    text = "-".join(labels) or "base"
    name = re.sub(r"[^\w.=+-]", "-", text, flags=re.ASCII).lstrip(".-") or "run"
    if len(name) <= NAME_LENGTH and name not in (LAUNCH_FOLDER, SWEEP_FILE):
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9]}-{digest}"


def check_collisions(runs: Sequence[Run]) -> None:
    """Raises UserError for two runs of one name, or that would compute the same."""
    names: set[str] = set()
    configs: dict[str, str] = {}
    for run in runs:
        if run.name in names:
            raise UserError(
                f"two runs of the sweep are named {run.name!r}, and would share a workdir: give "
                "them names, or leave one out"
            )
        names.add(run.name)
        other = configs.setdefault(run.config.to_json(), run.name)
        if other != run.name:
            raise UserError(
                f"runs {other!r} and {run.name!r} of the sweep have the same config: leave one "
                "out, or let them differ, in seed for example"
            )


def open_sweep(workdir: Path, file: SweepFile, runs: Sequence[Run], score: Score) -> None:
    """Makes the sweep's workdir, or checks that it belongs to this sweep; writes sweep.json.

    A sweep may get more runs, or longer ones, between two starts; a run's config stays what it was.

    Raises:
      UserError: it holds another sweep, or a run's files; it cannot be written.
    """
    search = file.search
    space = None if search is None else {k: repr(v) for k, v in search.space.items()}
    old = read_sweep(workdir)
    if old is None and ((workdir / CONFIG_FILE).is_file() or (workdir / CHECKPOINTS).is_dir()):
        raise UserError(f"workdir {str(workdir)!r} holds a run, not a sweep: use another --workdir")
    if old is not None and (reason := _difference(old, runs, space)):
        raise UserError(
            f"workdir {str(workdir)!r} holds another sweep, of {old['config']}: {reason}. Use "
            "another --workdir"
        )
    record = {
        "config": file.source,
        "score": dataclasses.asdict(score),
        "space": space,
        "runs": {run.name: _record(run) for run in runs},
    }
    if space is not None and old is not None:
        record["runs"] = old["runs"] | record["runs"]
    write_json(workdir / SWEEP_FILE, record)


def add_run(workdir: Path, run: Run) -> None:
    """Records a run that a search made up."""
    record = read_sweep(workdir) or {}
    record["runs"][run.name] = _record(run)
    write_json(workdir / SWEEP_FILE, record)


def read_sweep(workdir: Path) -> dict[str, Any] | None:
    """What sweep.json says; None if there is none.

    Raises:
      UserError: it is not one of ours.
    """
    path = workdir / SWEEP_FILE
    record = read_json(path)
    if record is not None and not isinstance(record.get("runs"), dict):
        raise UserError(f"{str(path)!r} is not a sweep's record: use another --workdir")
    return record


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None if there is no file.

    Raises:
      UserError: it holds something else.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} is not a JSON object")
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces a file in one step.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {str(path)!r}: {reason}") from error


def open_path(text: str) -> Path:
    """A workdir's path: this machine's, or a bucket's (gs://...)."""
    if "://" not in text:
        return Path(text)
    from etils import epath

    return epath.Path(text)


def command_path(path: str, root: Path) -> str:
    """A config file's path as a command that starts in a copy of `root` finds it."""
    full = Path(path).resolve()
    return os.path.relpath(full, root) if full.is_relative_to(root) else str(full)


Command = Callable[[Run], list[str]]


def _record(run: Run) -> dict[str, Any]:
    return {
        "tags": list(run.tags),
        "overrides": dict(run.overrides),
        "config": dataclasses.asdict(run.config),
    }


def _difference(old: dict[str, Any], runs: Sequence[Run], space: dict[str, str] | None) -> str:
    """What makes a recorded sweep another one than these runs; empty for nothing."""
    if old["space"] != space:
        return "its search space is another" if space and old["space"] else "one is a search"
    shared = [run for run in runs if run.name in old["runs"]]
    for run in shared:
        before = Config.from_dict(old["runs"][run.name]["config"])
        if fields := differing_fields(before, run.config):
            return f"run {run.name!r} has {'; '.join(fields)}"
    if old["runs"] and not shared and space is None:
        return f"it has none of these runs, but {', '.join(list(old['runs'])[:3])}"
    return ""


def _nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in fields.items():
        section = nested
        *sections, leaf = name.split(".")
        for each in sections:
            section = section.setdefault(each, {})
        section[leaf] = value
    return nested


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
