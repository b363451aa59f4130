"""Files of weights of networks of features: given by a path, or fetched once and kept."""

from __future__ import annotations

import dataclasses
import os
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from pathlib import Path

from dydilit_jax.autoencoders.weights import sha256_of
from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained.files import TORCH_SUFFIXES, listed
from dydilit_jax.models.pretrained.layouts import Tensors

SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A file that anyone can fetch.

    Attributes:
      url: where it is.
      sha256: its checksum.
      names: that it is known by in a folder.
    """

    url: str
    sha256: str
    names: tuple[str, ...]


def cache_folder() -> Path:
    """Where fetched files are kept: dydilit_jax in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dydilit_jax"


def locate(weights: str, published: PublishedFile | None, sha256: str = "") -> tuple[Path, str]:
    """A file of weights, and its checksum.

    Args:
      weights: the file, or a folder that holds it; empty to fetch the published one.
      published: the known file; None where there is none.
      sha256: checksum that the file must have; default: the published one's where it is fetched.

    Raises:
      UserError: no file there, or one of another checksum; one that cannot be fetched.
    """
    wanted = sha256.lower()
    if weights:
        path = _in_folder(Path(weights).expanduser(), published)
    elif published is None:
        raise UserError("these weights are not fetched: give their file or folder")
    else:
        wanted = wanted or published.sha256
        path = cache_folder() / published.names[0]
        if not path.is_file():
            _fetch(published, path)
    return path, checked(path, wanted)


def checked(path: Path, wanted: str) -> str:
    """The checksum of a file of weights.

    Args:
      path: the file.
      wanted: checksum that it must have, in lower case; empty for any.

    Raises:
      UserError: it has another one.
    """
    found = sha256_of(path)
    if wanted and found != wanted:
        raise UserError(
            f"{str(path)!r} has the checksum {found}, expected {wanted}: it is damaged or other "
            "weights; fetch it again"
        )
    return found


def check_tensors(
    tensors: Tensors,
    expected: Mapping[str, tuple[int, ...]],
    source: str,
    wanted: str,
    unused: Collection[str] = (),
) -> None:
    """Looks for tensors that are not those of a network.

    Args:
      tensors: of a file.
      expected: shapes by name.
      source: of the tensors, for the message.
      wanted: what was expected, for the message.
      unused: names that may be there as well.

    Raises:
      UserError: tensors that are missing, too much or misshapen; names them.
    """
    missing = sorted(expected.keys() - tensors.keys())
    surplus = sorted(tensors.keys() - expected.keys() - set(unused))
    misshapen = sorted(
        f"{name} {tensors[name].shape} for {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    )
    for what, names in (("lacks", missing), ("has too much:", surplus), ("has", misshapen)):
        if names:
            raise UserError(f"{source} {what} {listed(names)}: expected {wanted}")


def _in_folder(path: Path, published: PublishedFile | None) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"weights {str(path)!r}: no such file or folder")
    names = published.names if published else ()
    known = [path / name for name in names if (path / name).is_file()]
    found = known or sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
    if len(found) != 1 and not known:
        raise UserError(
            f"folder {str(path)!r} holds {len(found)} files of weights ({', '.join(SUFFIXES)}), "
            f"expected {' or '.join(names) or 'one'}: give the file itself"
        )
    return found[0]


def _fetch(published: PublishedFile, path: Path) -> None:
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        urllib.request.urlretrieve(published.url, unfinished)
        found = sha256_of(unfinished)
        if found != published.sha256:
            raise UserError(
                f"{published.url} has the checksum {found}, expected {published.sha256}: it was "
                "damaged on the way or is another file"
            )
        unfinished.replace(path)
    except (OSError, urllib.error.ContentTooShortError) as error:
        raise UserError(
            f"cannot fetch {published.url} ({error}): get it where there is a connection, and give "
            "its path"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
