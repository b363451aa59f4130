"""A request for many images: drawn batch by batch, kept in parts, gone on with where it stopped.

    OUT.parts/request.json    what was asked for
    OUT.parts/00000000.npy    images from that index on, (b, H, W, C) uint8

The parts become one .npz, or a folder of PNG files, when all are there.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError


def parts_folder(out: Path) -> Path:
    """Where the parts of a request that ends in `out` are kept."""
    return out.with_name(out.name + ".parts")


class Parts:
    """The parts of a request on disk.

    Args:
      out: the file or folder that the request ends in.
      request: all that decides what the images are; plain values.

    Raises:
      UserError: parts of another request are there (names what differs).
    """

    def __init__(self, out: Path, request: dict[str, Any]):
        self.folder = parts_folder(out)
        claim(self.folder, request)

    def files(self) -> list[Path]:
        """Finished parts, in order, as far as they follow on one another."""
        files, done = [], 0
        for path in sorted(self.folder.glob("[0-9]*.npy")):
            if int(path.stem) != done:
                break
            files.append(path)
            done += len(np.load(path, mmap_mode="r"))
        return files

    def done(self) -> int:
        """Number of images that are there."""
        return sum(len(np.load(path, mmap_mode="r")) for path in self.files())

    def add(self, first: int, images: np.ndarray) -> None:
        """Keeps images (b, H, W, C) in [-1, 1], the first of them of index `first`."""
        pixels = to_uint8(images)

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, pixels)

        _atomically(self.folder / f"{first:08d}.npy", write)

    def read(self) -> Iterator[np.ndarray]:
        """The images, part by part, uint8."""
        for path in self.files():
            yield np.load(path)

    def delete(self) -> None:
        """Removes the parts, when what they became is on disk."""
        shutil.rmtree(self.folder)


class Readable(Protocol):
    """What images are read from."""

    def read(self) -> Iterator[np.ndarray]:
        """The images (b, H, W, C) uint8 in order, part by part."""
        ...


def claim(folder: Path, request: dict[str, Any]) -> None:
    """Makes the folder of a request, or checks that it is this one's.

    Args:
      folder: of unfinished work.
      request: all that decides what the work is; plain values.

    Raises:
      UserError: it holds part of another request (names what differs).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "request.json"
    request = json.loads(json.dumps(request))
    if not path.is_file():
        _atomically(path, lambda file: file.write_text(json.dumps(request, indent=2)))
    elif differing := differing_names(json.loads(path.read_text()), request):
        raise UserError(
            f"{str(folder)!r} holds part of another request, with another "
            f"{', '.join(differing)}: finish that one, delete the folder, or change --out"
        )


def differing_names(before: dict[str, Any], request: dict[str, Any]) -> list[str]:
    """Names of the fields in which two requests differ."""
    return sorted(
        name for name in before.keys() | request.keys() if before.get(name) != request.get(name)
    )


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    unfinished = path.with_name("unfinished_" + path.name)
    write(unfinished)
    unfinished.replace(path)


def draw_parts(parts: Parts, batches: Iterable[np.ndarray], first: int) -> Iterator[int]:
    """Keeps batches as parts, starting at index `first`; yields each one's size."""
    for images in batches:
        parts.add(first, images)
        first += len(images)
        yield len(images)


def write_npz(parts: Readable, labels: np.ndarray, out: Path) -> None:
    """One .npz with `arr_0` (n, H, W, C) uint8 and `arr_1` (n,) labels, as ADM's evaluator reads.

    Written part by part: the images are never in memory together.
    """
    shape = (len(labels), *next(parts.read()).shape[1:])

    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts.read():
                    file.write(np.ascontiguousarray(part).tobytes())
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, labels)

    _atomically(out, write)


def write_pngs(parts: Parts, labels: np.ndarray, out: Path) -> None:
    """A folder of PNG files, 000000.png and so on, and labels.txt, a label a line."""
    out.mkdir(parents=True, exist_ok=True)
    index = 0
    for part in parts.read():
        for image in part:
            pixels = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(pixels).save(out / f"{index:06d}.png")
            index += 1
    (out / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
