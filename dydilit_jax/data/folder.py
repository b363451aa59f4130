"""A folder of images, one subfolder for each class."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dydilit_jax.data.buckets import AnyPath, open_path
from dydilit_jax.data.sources import EncodedSource
from dydilit_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LIST_THREADS = 16


class FolderSource(EncodedSource):
    """The images below FOLDER/CLASS/, at any depth, in the order of their paths.

    Classes are the subfolders in the order of their names, as torchvision's ImageFolder has them.

    Args:
      folder: local, or `gs://...` where gcsfs is installed.
      split: FOLDER/SPLIT is read where it exists, else, if the split is `train`, FOLDER.
      image_size: side that images are scaled and cropped to.
      channels: 3 for colour, 1 for grey levels.

    Raises:
      UserError: no such folder or split, or no images in it.
    """

    def __init__(self, folder: str, *, split: str, image_size: int, channels: int):
        if not folder:
            raise UserError("data source 'folder' needs data.data_dir, the folder of images")
        root = open_path(folder)
        if (root / split).is_dir():
            root = root / split
        elif not root.is_dir():
            raise UserError(f"data.data_dir {folder!r} is no folder: expected CLASS/IMAGE files")
        elif split != "train":
            raise UserError(f"data.data_dir {folder!r} has no folder {split!r} (data.split)")
        self._root = os.fspath(root)
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        files: list[str] = []
        labels: list[int] = []
        # A bucket answers one listing after the other slowly, many at once well.
        with ThreadPoolExecutor(LIST_THREADS) as threads:
            listings = list(threads.map(lambda name: _images_below(root / name, name), names))
        for label, found in enumerate(listings):
            files += sorted(found)
            labels += [label] * len(found)
        if not files:
            raise UserError(
                f"{self._root!r} holds no images: expected CLASS/IMAGE files with one of the "
                f"endings {' '.join(EXTENSIONS)}"
            )
        # Bytes of one width: a million paths travel to workers as one array.
        self._files = np.asarray([os.fsencode(file) for file in files])
        self._labels = np.asarray(labels, np.int32)
        super().__init__(names, image_size=image_size, channels=channels)

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """The file."""
        return os.path.join(self._root, os.fsdecode(self._files[index]))  # noqa: PTH118

    def read(self, index: int) -> tuple[bytes, int]:
        """An encoded image and its label; UserError if it cannot be read."""
        try:
            return open_path(self.name(index)).read_bytes(), int(self._labels[index])
        except OSError as error:
            raise UserError(error.strerror or str(error)) from error

    def read_labels(self) -> np.ndarray:
        """All labels (n,) int32."""
        return self._labels


def _images_below(folder: AnyPath, prefix: str) -> list[str]:
    """Paths of images at any depth, relative to the folder's parent."""
    found = []
    for entry in folder.iterdir():
        path = f"{prefix}/{entry.name}"
        # Endings first: asking a bucket whether a name is a folder is slow.
        if entry.name.lower().endswith(EXTENSIONS):
            found.append(path)
        elif entry.is_dir():
            found += _images_below(entry, path)
    return found
