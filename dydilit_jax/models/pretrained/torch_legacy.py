"""The order of things in a file of PyTorch's of before 1.6, which is no archive but a stream:

a pickle of a magic number, of a version, of the machine's byte order and sizes, and of the
structure, as in the later format but for the references, which end in a view's description; then a
pickle of the storages' keys, and for each key, in that order, how many numbers (int64) and these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

# Pickles, of protocol 2, of the magic number 0x1950a86a20f9469cfc6c and of the version 1001.
START = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


def is_legacy(path: Path) -> bool:
    """Whether a file begins as PyTorch before 1.6 began it."""
    with path.open("rb") as file:
        return file.read(len(START)) == START


def read_stream(
    file: IO[bytes], load: Callable[[IO[bytes]], Any], itemsizes: Callable[[], Mapping[str, int]]
) -> tuple[Any, dict[str, bytes]]:
    """The structure, and the numbers of each storage by its key.

    Args:
      file: at its beginning.
      load: unpickles what comes next.
      itemsizes: bytes of a number of each storage, known once the structure is loaded.

    Raises:
      EOFError: the file ends too early.
      ValueError: its numbers are big-endian, or the storages are not those of the structure.
    """
    file.read(len(START))
    if not load(file)["little_endian"]:
        raise ValueError("its numbers are big-endian")
    structure, keys = load(file), load(file)
    sizes = itemsizes()
    if set(keys) != set(sizes):
        raise ValueError("its storages are not those of its tensors")
    numbers = {}
    for key in keys:
        count = int.from_bytes(_exactly(file, 8), "little")
        numbers[key] = _exactly(file, count * sizes[key])
    return structure, numbers


def _exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise EOFError("it ends within a tensor")
    return content
