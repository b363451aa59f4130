"""What a config file says about a sweep: overrides per run, seeds, tags; a space to search.

    SWEEP = product(
        chain(
            fixed({"model.attention.kind": "relu"}, name="relu", tags=["linear"]),
            fixed(name="softmax", argument="attention=softmax"),
        ),
        zipped(values("optimizer.learning_rate", [1e-3, 3e-3]), values("train.steps", [2000, 700])),
        seeds(3),
    )

are twelve runs. In place of SWEEP a file may define `get_sweep(add)`, which calls `add` with runs
in this notation or with a mapping of fields. `SEARCH = search(...)` lets the next run depend on the
scores of those before it, and `SCORE` names the metric that ranks runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dydilit_jax.errors import UserError, unknown_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What one run, or one factor of it, changes.

    Attributes:
      fields: values by the config field's dotted name.
      labels: what the run's name is put together from.
      tags: words to group runs by.
      argument: the config file's argument in place of the command's; None to keep that.
    """

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    argument: str | None = None


Runs = tuple[Part, ...]
Add = Callable[..., None]


def fixed(
    fields: Mapping[str, Any] | None = None,
    *,
    name: str = "",
    tags: Iterable[str] = (),
    argument: str | None = None,
) -> Runs:
    """One run.

    Args:
      fields: overrides by the config field's dotted name.
      name: of the run; empty to put it together from the fields.
      tags: words to group runs by.
      argument: the config file's argument, as after the colon of --config.

    Raises:
      UserError: the fields are no mapping, or tags no list of words.
    """
    fields = {} if fields is None else fields
    if not isinstance(fields, Mapping):
        raise UserError(f"a run's overrides are a mapping of fields to values, got {fields!r}")
    if isinstance(tags, str):
        raise UserError(f"tags are a list of words, got the one word {tags!r}: write [{tags!r}]")
    labels = (name,) if name else tuple(f"{_leaf(key)}={fields[key]}" for key in fields)
    return (Part(fields=dict(fields), labels=labels, tags=tuple(tags), argument=argument),)


def values(field: str, options: Iterable[Any]) -> Runs:
    """A run for each value of a field."""
    return tuple(part for value in options for part in fixed({field: value}))


def seeds(count: int | Iterable[int]) -> Runs:
    """A run for each seed: so many from 0, or these."""
    return values("seed", range(count) if isinstance(count, int) else count)


def chain(*parts: Runs) -> Runs:
    """All runs of the parts, one part after the other."""
    return tuple(itertools.chain(*parts))


def product(*parts: Runs) -> Runs:
    """Each run of a part with each of the others.

    Raises:
      UserError: two parts set the same field, or the argument.
    """
    return tuple(_merged(combination) for combination in itertools.product(*parts))


def zipped(*parts: Runs) -> Runs:
    """The first runs of all parts as one, then the second ones, and so on.

    Raises:
      UserError: the parts differ in length, or set the same field.
    """
    if len({len(part) for part in parts}) > 1:
        raise UserError(
            f"zipped() takes parts of one length, got {', '.join(str(len(p)) for p in parts)} runs"
        )
    return tuple(_merged(combination) for combination in zip(*parts, strict=True))


def _leaf(field: str) -> str:
    return str(field).rpartition(".")[2]


def _merged(parts: Sequence[Part]) -> Part:
    fields: dict[str, Any] = {}
    argument = None
    for part in parts:
        if twice := fields.keys() & part.fields.keys():
            raise UserError(f"two parts of a sweep set {min(twice)}: a run takes it from one alone")
        if part.argument is not None and argument is not None:
            raise UserError(
                f"two parts of a sweep set the config's argument, {argument!r} and "
                f"{part.argument!r}: a run takes it from one alone"
            )
        argument = part.argument if argument is None else argument
        fields |= part.fields
    labels = tuple(itertools.chain(*(part.labels for part in parts)))
    tags = tuple(dict.fromkeys(itertools.chain(*(part.tags for part in parts))))
    return Part(fields=fields, labels=labels, tags=tags, argument=argument)


def collect(get_sweep: Callable[[Add], None]) -> Runs:
    """The runs that `get_sweep(add)` adds.

    `add(fields, name=..., tags=..., argument=...)` takes one run, `add(runs, tags=...)` several.
    """
    collected: list[Part] = []

    def add(
        runs: Runs | Mapping[str, Any] | None = None,
        *,
        name: str = "",
        tags: Iterable[str] = (),
        argument: str | None = None,
    ) -> None:
        if not isinstance(runs, tuple):
            collected.extend(fixed(runs, name=name, tags=tags, argument=argument))
            return
        around = fixed(name=name, tags=tags, argument=argument)
        collected.extend(product(around, runs))

    get_sweep(add)
    return tuple(collected)


@dataclasses.dataclass(frozen=True)
class Score:
    """The metric of metrics.jsonl that ranks runs, and whether more of it is better."""

    name: str
    maximize: bool = False

    def better(self, one: float, other: float) -> bool:
        """Whether the first value is better than the second."""
        return one > other if self.maximize else one < other

    def best(self, options: Iterable[float]) -> float | None:
        """The best of some values, None of none."""
        return (max if self.maximize else min)(options, default=None)


def minimize(name: str) -> Score:
    """Runs with less of this metric are better."""
    return Score(name)


def maximize(name: str) -> Score:
    """Runs with more of this metric are better."""
    return Score(name, maximize=True)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A range of numbers.

    Attributes:
      low, high: its ends, both included; two whole numbers make whole numbers.
      log: equal chances for equal ratios.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise UserError(f"a range needs low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise UserError(f"a logarithmic range starts above 0, got {self.low}")

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A space of configs, and how it is searched.

    Attributes:
      space: by field's dotted name a range, or the list of its possible values.
      trials: runs that are made.
      seed: of what the search draws.
      prune: runs whose best score is worse than the median of the others' at that step are stopped.
      startup: runs drawn at random, and not pruned, before the model is asked.
      warmup_steps: steps that every run makes before it can be pruned.
      fields: what all runs override.
      tags: of all runs.
    """

    space: Mapping[str, Uniform | Sequence[Any]]
    trials: int
    seed: int = 0
    prune: bool = True
    startup: int = 5
    warmup_steps: int = 0
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.space:
            raise UserError("search() needs a field to vary, its space is empty")
        if self.trials < 1:
            raise UserError(f"search() needs at least one trial, got {self.trials}")
        if twice := self.space.keys() & self.fields.keys():
            raise UserError(f"search() both varies and fixes {min(twice)}")
        for field, options in self.space.items():
            if not isinstance(options, Uniform) and (isinstance(options, str) or not options):
                raise UserError(
                    f"search() takes uniform(...), log_uniform(...) or a list of values for "
                    f"{field}, got {options!r}"
                )


def uniform(low: float, high: float) -> Uniform:
    """A range of a search; whole numbers if both ends are."""
    return Uniform(low, high)


def log_uniform(low: float, high: float) -> Uniform:
    """A range of a search, with equal chances for equal ratios."""
    return Uniform(low, high, log=True)


def search(space: Mapping[str, Uniform | Sequence[Any]], *, trials: int, **options: Any) -> Search:
    """A search; `options` are the further attributes of Search.

    Raises:
      UserError: an unknown option, an empty space or range.
    """
    known = [field.name for field in dataclasses.fields(Search)]
    for name in options:
        if name not in known:
            raise unknown_name("option of search()", name, known)
    options["tags"] = tuple(options.get("tags", ()))
    return Search(space=dict(space), trials=trials, **options)
