"""Data sets of labelled images, as random-access sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict

import numpy as np

from dydilit_jax.errors import unknown_name


class Example(TypedDict):
    """An image (H, W, C) float32 in [-1, 1] and its label, int32."""

    image: np.ndarray
    label: np.ndarray


class Source(Protocol):
    """A finite data set, read by index."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    @property
    def label_names(self) -> Sequence[str]:
        """Names of the classes, in the order of their labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """A data set held in memory.

    Attributes:
      images: (n, H, W, C) float32 in [-1, 1].
      labels: (n,) int32.
      label_names: names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(image=self.images[index], label=self.labels[index])


def digits() -> ArraySource:
    """scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): 1,797 images 8 x 8 x 1.

    Its 17 grey levels, 0 to 16, are mapped to [-1, 1].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8.0 - 1.0).astype(np.float32)[..., None]
    return ArraySource(images, data.target.astype(np.int32), tuple(map(str, range(10))))


SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}


def load_source(name: str) -> Source:
    """The data set of this name.

    Raises:
      UserError: unknown name.
    """
    if name not in SOURCES:
        raise unknown_name("data source", name, SOURCES)
    return SOURCES[name]()
