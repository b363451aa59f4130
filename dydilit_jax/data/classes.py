"""Some of a data set's classes, named in a file.

One class a line, by the data set's own name of it (ImageNet: its WordNet id, such as n01440764);
empty lines and what follows a `#` are ignored. Labels are the lines' numbers, from 0.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dydilit_jax.data.buckets import open_path
from dydilit_jax.data.sources import Source
from dydilit_jax.errors import UserError


def read_class_list(path: str) -> tuple[str, ...]:
    """The names in a file, local or `gs://...`.

    Raises:
      UserError: no such file, no name in it, or one that stands there twice.
    """
    try:
        lines = open_path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read data.classes {path!r}: {reason}") from error
    names = tuple(filter(None, (line.partition("#")[0].strip() for line in lines)))
    if not names:
        raise UserError(f"data.classes {path!r} names no class")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"data.classes {path!r} names {twice[0]!r} twice")
    return names


class ClassSubset:
    """The examples of a source that are of the named classes, in their order.

    Args:
      source: all examples.
      names: classes to keep; their labels are their numbers here.
      path: the file they are from, for errors.

    Raises:
      UserError: a class that the source does not have, or no example of any.
    """

    def __init__(self, source: Source, names: Sequence[str], path: str):
        known = {name: label for label, name in enumerate(source.label_names)}
        if unknown := [name for name in names if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join([*known][:5])} ..."
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise UserError(
                f"data.classes {path!r} names {unknown[0]!r}{more}, which the data set has not: "
                f"{hint}"
            )
        self.source = source
        self.label_names = tuple(names)
        self._new_labels = np.full(len(known) + 1, -1, np.int32)
        self._new_labels[[known[name] for name in names]] = np.arange(len(names))
        # The last place stands for -1: a record that cannot be read, or has no class of the source.
        labels = read_labels(source)
        labels = self._new_labels[np.where(labels < len(known), labels, -1)]
        self._indices = np.flatnonzero(labels >= 0)
        self._labels = labels[self._indices]
        if not len(self._indices):
            raise UserError(f"the data set has no example of the classes in {path!r}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.source.image_shape

    @property
    def transform(self) -> Callable[[Any, np.random.Generator], Any] | None:
        """The source's own, if it has one."""
        return getattr(self.source, "transform", None)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        item, label = self.source[int(self._indices[index])], self._labels[index]
        return {**item, "label": label} if isinstance(item, dict) else item._replace(label=label)

    def read_labels(self) -> np.ndarray:
        """All labels (n,) int32."""
        return self._labels


def read_labels(source: Source) -> np.ndarray:
    """All labels (n,) int32 of a source; one that has no quicker way reads every item."""
    if (quick := getattr(source, "read_labels", None)) is not None:
        return quick()
    items = (source[i] for i in range(len(source)))
    return np.asarray(
        [item["label"] if isinstance(item, dict) else item.label for item in items], np.int32
    )
