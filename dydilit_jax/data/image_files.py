"""Images made elsewhere: a folder of PNG files, or the .npz that ADM's evaluator reads.

Read by index and never all at once, so that each process reads the rows it scores. JPEG is refused:
its losses are part of a score.
"""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from dydilit_jax.data.transforms import decode_image
from dydilit_jax.errors import UserError

ARRAY = "arr_0.npy"
LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a member in a zip file


class ImageFiles(Protocol):
    """A finite stack of images of one shape."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C) uint8; UserError, naming it, for one that cannot be read."""
        ...


def open_images(path: Path) -> ImageFiles:
    """The images of a folder of PNG files, in the order of their names, or of an .npz.

    Raises:
      UserError: nothing there, no PNG in it, or an .npz without uint8 images.
    """
    if path.is_dir():
        return PngFolder(path)
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path)
    what = "is neither a folder nor an .npz" if path.exists() else "does not exist"
    raise UserError(f"{str(path)!r} {what}: expected a folder of PNG files, or an .npz of arr_0")


class PngFolder:
    """The PNG files of a folder, of one size.

    Args:
      folder: searched at its top alone.

    Raises:
      UserError: no PNG file in it, or a first one that cannot be read.
    """

    def __init__(self, folder: Path):
        self._files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".png")
        if not self._files:
            others = sorted({entry.suffix.lower() for entry in folder.iterdir() if entry.is_file()})
            there = f" (it has {', '.join(filter(None, others))} files)" if any(others) else ""
            raise UserError(
                f"{str(folder)!r} holds no .png files{there}: lossless images of one size, as "
                "python -m dydilit_jax.sample writes them, can be scored"
            )
        self._channels = 1 if _mode(self._files[0]) in ("1", "L") else 3
        self._shape = _pixels(self._files[0], self._channels).shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self._shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C) uint8."""
        return np.stack([self._read(int(index)) for index in indices])

    def _read(self, index: int) -> np.ndarray:
        path = self._files[index]
        pixels = _pixels(path, self._channels)
        if pixels.shape != self._shape:
            raise UserError(
                f"{str(path)!r} has {_size(pixels.shape)} pixels, {self._files[0].name} before it "
                f"{_size(self._shape)}: all must be of one size"
            )
        return pixels


class NpzImages:
    """`arr_0` (n, H, W, C) uint8 of an .npz; read where it lies in the file if not compressed.

    Raises:
      UserError: no .npz, or no such array in it.
    """

    def __init__(self, path: Path):
        try:
            with zipfile.ZipFile(path) as archive:
                member = archive.getinfo(ARRAY)
            if member.compress_type == zipfile.ZIP_STORED:
                self._images = _mapped(path, member.header_offset)
            else:
                with np.load(path) as arrays:
                    self._images = arrays["arr_0"]
        except KeyError:
            raise UserError(
                f"{str(path)!r} has no array arr_0, the images (n, H, W, C) uint8"
            ) from None
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise UserError(f"{str(path)!r} is no .npz, or a damaged one ({error})") from error
        if self._images.dtype != np.uint8 or self._images.ndim != 4 or not len(self._images):
            raise UserError(
                f"arr_0 of {str(path)!r} is {self._images.dtype} {self._images.shape}, expected "
                "images (n, H, W, C) uint8"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self._images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Images (n, H, W, C) uint8."""
        return np.asarray(self._images[indices])


def _mapped(path: Path, offset: int) -> np.ndarray:
    """An array that is stored as it is in a zip file, mapped into memory."""
    with path.open("rb") as file:
        file.seek(offset)
        fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        file.seek(fields[-2] + fields[-1], 1)  # the name, and what was written with it
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in read:
            raise ValueError(f"an array of format {version}")
        shape, fortran_order, dtype = read[version](file)
        return np.memmap(path, dtype, "r", file.tell(), shape, order="F" if fortran_order else "C")


def _mode(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return image.mode
    except OSError as error:
        raise UserError(f"{str(path)!r} is no image, or a damaged one") from error


def _pixels(path: Path, channels: int) -> np.ndarray:
    try:
        image = decode_image(path.read_bytes(), channels)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{str(path)!r} cannot be read: {reason}") from error
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
