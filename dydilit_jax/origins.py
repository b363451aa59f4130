"""Where each field of a run's config has its value from.

    default   the dataclass (dydilit_jax/config.py, models/config.py)
    file      the config file, called without an argument
    argument  what follows the colon of --config=FILE:ARGUMENT
    flag      --config.FIELD=VALUE

A field's origin is the last of these that changed it, found by building the config without what
came after: nothing in a config file says it. A flag counts also where it gives the value that was
there.
"""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from dydilit_jax.config import Config, flatten

DEFAULT, FILE, ARGUMENT, FLAG = "default", "file", "argument", "flag"
# Of a file that cannot be called without its argument, the two cannot be told apart.
FILE_OR_ARGUMENT = "file/argument"


class Origin(NamedTuple):
    """Where a field's value is from.

    Attributes:
      source: one of the names above.
      beneath: the source whose value this one took the place of; empty for a default.
      value: that value.
    """

    source: str
    beneath: str = ""
    value: Any = None


def field_origins(config: Config, spec: str, overrides: Mapping[str, Any]) -> dict[str, Origin]:
    """The origin of every field, by its dotted name, in the config's order.

    Args:
      config: the config as it is used.
      spec: FILE or FILE:ARGUMENT, as --config had it. The file is run again, without what follows.
      overrides: dotted names of fields, or of sections, that flags gave, and what they gave.
    """
    path, colon, argument = spec.partition(":")
    given = set(flatten({name: _plain(value) for name, value in overrides.items()}))
    used = flatten(dataclasses.asdict(config))
    plain = _built(path, None)
    unflagged = _built(path, argument) if colon else plain
    origins = {}
    for name, value in used.items():
        layers = [(DEFAULT, _DEFAULTS[name])]
        if plain is not None:
            layers.append((FILE, plain.get(name, _DEFAULTS[name])))
        if colon and unflagged is not None:
            layer = ARGUMENT if plain is not None else FILE_OR_ARGUMENT
            layers.append((layer, unflagged.get(name, _DEFAULTS[name])))
        if name in given:
            below, before = _last_change(layers)
            origins[name] = Origin(FLAG, below, before)
            continue
        layers[-1] = (layers[-1][0], value)
        changed = _last_change(layers)[0]
        if changed == DEFAULT:
            origins[name] = Origin(DEFAULT)
        else:
            index = [layer for layer, _ in layers].index(changed)
            origins[name] = Origin(changed, *_last_change(layers[:index]))
    return origins


_DEFAULTS = flatten(dataclasses.asdict(Config()))


def _last_change(layers: list[tuple[str, Any]]) -> tuple[str, Any]:
    """The last layer whose value differs from the one beneath, and its value."""
    last = layers[0]
    for layer, value in layers[1:]:
        if value != last[1]:
            last = (layer, value)
    return last


def _built(path: str, argument: str | None) -> dict[str, Any] | None:
    """The fields that a config file returns; None where it wants what it is not given."""
    try:
        get_config = runpy.run_path(path)["get_config"]
        return flatten(_plain(get_config() if argument is None else get_config(argument)))
    except Exception:  # A config file is a program: whatever it raises, it told when it was parsed.
        return None


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
