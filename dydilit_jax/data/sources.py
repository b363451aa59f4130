"""Data sets of labelled images, as random-access sources."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypedDict

import numpy as np

from dydilit_jax.data.transforms import center_crop, decode_image, normalize
from dydilit_jax.errors import UserError


class Example(TypedDict):
    """An image (H, W, C) float32 in [-1, 1] and its label, int32."""

    image: np.ndarray
    label: np.ndarray | np.int32


class Source(Protocol):
    """A finite data set, read by index.

    What it gives is an Example; or something else, which a further method `transform(item, rng)`
    makes an Example of, drawing all chance from `rng` (precomputed latents do so).
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    @property
    def label_names(self) -> Sequence[str]:
        """Names of the classes, in the order of their labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The item of this index; UserError, naming it, if it cannot be read."""
        ...


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

    def read_labels(self) -> np.ndarray:
        """All labels (n,) int32."""
        return self.labels


class EncodedSource(abc.ABC):
    """Encoded images of any size, decoded and cropped when they are read.

    Args:
      label_names: names of the classes.
      image_size: side that images are scaled and cropped to.
      channels: 3 for colour, 1 for grey levels.

    Raises:
      UserError: another number of channels.
    """

    def __init__(self, label_names: Sequence[str], *, image_size: int, channels: int):
        if channels not in (1, 3):
            raise UserError(
                f"images have 1 or 3 channels, model.channels is {channels}: for a network of "
                "latents encode the images first (python -m dydilit_jax.encode) and set "
                "data.latents to their folder"
            )
        self.label_names = tuple(label_names)
        self._image_size = image_size
        self._channels = channels

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def read(self, index: int) -> tuple[bytes, int]:
        """An encoded image and its label; UserError if it cannot be read."""

    @abc.abstractmethod
    def name(self, index: int) -> str:
        """Where the image is, for messages."""

    @abc.abstractmethod
    def read_labels(self) -> np.ndarray:
        """All labels (n,) int32, -1 where a record cannot be read."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self._image_size, self._image_size, self._channels

    def __getitem__(self, index: int) -> Example:
        try:
            data, label = self.read(index)
            if not 0 <= label < len(self.label_names):
                raise UserError(f"label {label} is outside 0 to {len(self.label_names) - 1}")
            image = decode_image(data, self._channels)
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error
        pixels = center_crop(image, self._image_size)
        return Example(image=normalize(pixels), label=np.int32(label))


def digits() -> ArraySource:
    """scikit-learn's handwritten digits (UCI, Alpaydin and Kaynak 1998): 1,797 images 8 x 8 x 1.

    Its 17 grey levels, 0 to 16, are mapped to [-1, 1].
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8.0 - 1.0).astype(np.float32)[..., None]
    return ArraySource(images, data.target.astype(np.int32), tuple(map(str, range(10))))


# Data sets that are here without any file.
SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}
