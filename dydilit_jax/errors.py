"""The one exception that stands for a user's mistake."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake of the user's: one line saying what is wrong, what was expected, what to do.

    Entry points print the line without a traceback and exit with a non-zero status.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Error for a `name` that is none of `known`, naming the nearest one and listing all."""
    choices = [str(choice) for choice in known]
    nearest = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f": did you mean {nearest[0]!r}?" if nearest else "."
    return UserError(f"unknown {kind} {name!r}{hint} Known: {', '.join(choices)}.")
