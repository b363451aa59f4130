"""Data in a Google Cloud Storage bucket (gs://BUCKET/PATH), read where it lies.

Folders, metadata and images are read by gcsfs, record files by array_record, which has a reader of
its own for gs:// with Google's C++ client. Nothing here goes through etils, whose gs:// would
import TensorFlow. Only what a run reads may be in a bucket; what it writes wants a file system.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from dydilit_jax.errors import UserError

SCHEME = "gs://"
# Set, array_record's client wants no credentials.
EMULATOR = "CLOUD_STORAGE_EMULATOR_ENDPOINT"


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether this is a path of a bucket."""
    return os.fspath(path).startswith(SCHEME)


class BucketPath:
    """A gs:// path, with those of pathlib's methods that reading data needs.

    Failures are OSErrors with `strerror` and `filename`, as of local files.

    Args:
      path: `gs://BUCKET/...`.
    """

    def __init__(self, path: str):
        self._path = path.rstrip("/")

    def __truediv__(self, name: str) -> BucketPath:
        return BucketPath(f"{self._path}/{name}")

    def __str__(self) -> str:
        return self._path

    def __fspath__(self) -> str:
        return self._path

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self._path).name

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        with _failures_of(self._path):
            return _filesystem().exists(self._path)

    def is_dir(self) -> bool:
        """Whether there is an object below it."""
        with _failures_of(self._path):
            return _filesystem().isdir(self._path)

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        with _failures_of(self._path):
            return _filesystem().isfile(self._path)

    def iterdir(self) -> Iterator[BucketPath]:
        """What is directly below it. The listing also answers is_dir and is_file of each."""
        with _failures_of(self._path):
            entries = _filesystem().ls(self._path, detail=False)
        # A folder that was made by hand is an empty object with the folder's own name.
        paths = (BucketPath(SCHEME + entry.removeprefix(SCHEME)) for entry in entries)
        return (path for path in paths if str(path) != self._path)

    def read_bytes(self) -> bytes:
        """The object's content."""
        with _failures_of(self._path):
            return _filesystem().cat_file(self._path)

    def read_text(self) -> str:
        """The object's content, of UTF-8."""
        return self.read_bytes().decode()

    def size(self) -> int:
        """The object's size in bytes."""
        with _failures_of(self._path):
            return _filesystem().size(self._path)

    def open(self, mode: str = "rb") -> Any:
        """The object as a binary file to read."""
        with _failures_of(self._path):
            return _filesystem().open(self._path, mode)


AnyPath = Path | BucketPath


def open_path(path: str | os.PathLike[str]) -> AnyPath:
    """A local path, or one of a bucket.

    Raises:
      UserError: another scheme than gs://, or no gcsfs to read a bucket with.
    """
    text = os.fspath(path)
    if in_bucket(text):
        _filesystem()
        return BucketPath(text)
    if "://" in text:
        raise UserError(f"{text!r} cannot be read: data are local, or in a bucket at {SCHEME}")
    return Path(text)


def size_of(path: AnyPath) -> int:
    """Size of a file in bytes."""
    return path.size() if isinstance(path, BucketPath) else path.stat().st_size


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Tells in a line what cannot be read, and why."""
    try:
        yield
    except OSError as error:
        what = f"{os.fsdecode(error.filename)!r}" if error.filename else "the data"
        raise UserError(f"cannot read {what}: {error.strerror or error}") from error


def check_credentials(path: str | os.PathLike[str]) -> None:
    """Looks for what array_record's reader of gs:// needs, and waits for minutes without.

    gcsfs reads a public bucket without credentials; that reader does not. Asks the machine's
    metadata server where there is no file, for seconds. A local path needs nothing.

    Raises:
      UserError: no credentials.
    """
    if not in_bucket(path) or os.environ.get(EMULATOR):
        return
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    try:
        google.auth.default()
    except GoogleAuthError as error:
        raise UserError(
            f"record files in {os.fspath(path)!r} are read with Google's application default "
            "credentials, of which there are none: 'gcloud auth application-default login', or set "
            "GOOGLE_APPLICATION_CREDENTIALS; public buckets need them too"
        ) from error


def check_opened(reader: Any, path: str | os.PathLike[str]) -> None:
    """Of a bucket's file that array_record could not open, says why: it keeps that to itself.

    Raises:
      OSError: with the reader's reason.
    """
    if reader.ok() or not in_bucket(path):
        return
    try:
        reader.close()
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise OSError(errno.EIO, reason, os.fspath(path)) from error


@functools.cache
def _filesystem() -> Any:
    # fsspec's own cache has one for each thread, with its own session and listings.
    try:
        from gcsfs.core import GCSFileSystem
    except ImportError as error:
        raise UserError(
            f"reading {SCHEME} needs gcsfs: 'pip install gcsfs', or mount the bucket with gcsfuse "
            "and give the folder"
        ) from error
    # Not gcsfs.GCSFileSystem, which asks for each bucket's kind by gRPC before it reads.
    return GCSFileSystem()


@contextlib.contextmanager
def _failures_of(path: str) -> Iterator[None]:
    """Turns what gcsfs and what lies beneath it raise into OSErrors that name the path."""
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from error
    except (OSError, HttpError, ClientError, GoogleAuthError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(errno.EIO, reason, path) from error
