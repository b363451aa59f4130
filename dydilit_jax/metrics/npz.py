"""Arrays of an .npz that are larger than memory, read and written in blocks of their first axis."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.npyio import NpzFile

from dydilit_jax.errors import UserError


@contextmanager
def opened(path: Path) -> Iterator[NpzFile]:
    """The file, its arrays read when they are asked for.

    Raises:
      UserError: no such file, or no .npz.
    """
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read as an .npz: {_line(error)}") from error
    if not isinstance(file, NpzFile):
        raise UserError(f"{str(path)!r} is one array, expected an .npz of several")
    with file:
        try:
            yield file
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{str(path)!r} is damaged: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def blocks(path: Path, name: str, size: int) -> Iterator[np.ndarray]:
    """Blocks (m, ...) of an array of an .npz, m = `size` but for the last.

    An array in Fortran's order, which lies otherwise, is read whole.

    Raises:
      UserError: no such file, no such array, or a truncated one.
    """
    with opened(path) as file:
        if name not in file.files:
            raise UserError(f"{str(path)!r} has no array {name}")
        assert file.zip is not None
        with file.zip.open(f"{name}.npy") as stream:
            shape, fortran, dtype = _header(stream)
            if not fortran and shape and not dtype.hasobject:
                for start in range(0, shape[0], size):
                    block = (min(size, shape[0] - start), *shape[1:])
                    yield _read(stream, block, dtype)
                return
        array = file[name]
        for start in range(0, len(array), size):
            yield array[start : start + size]


def shape_of(file: NpzFile, name: str) -> tuple[int, ...]:
    """The shape of an array of an opened .npz, of which no more is read."""
    assert file.zip is not None
    with file.zip.open(f"{name}.npy") as stream:
        return _header(stream)[0]


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _read(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    content = bytearray()
    while len(content) < count:
        piece = stream.read(count - len(content))
        if not piece:
            raise EOFError("it ends within an array")
        content += piece
    return np.frombuffer(content, dtype).reshape(shape)


def write_blocks(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Writes an array of that shape, given part by part, into an .npz that is being written.

    Raises:
      UserError: the parts do not come to the shape.
    """
    missing = math.prod(shape)
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        header_written = False
        for part in parts:
            if not header_written:
                description = np.lib.format.dtype_to_descr(part.dtype)
                header = {"descr": description, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                header_written = True
            missing -= part.size
            file.write(np.ascontiguousarray(part).tobytes())
    if missing:
        raise UserError(
            f"array {name} was to be {shape}, but {abs(missing)} numbers are "
            + ("missing" if missing > 0 else "too many")
        )
