"""A checkpoint's record of itself: what files it is made of, and which arrays they hold.

STEP/manifest.json is written last, in one step, when all else of the checkpoint is on disk. Without
it a checkpoint is unfinished; with it, a file that is missing, cut short or changed shows.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

from dydilit_jax.training.sharding import path_of

MANIFEST = "manifest.json"
FORMAT = 1

Arrays = dict[str, dict[str, str]]
"""By item and path of the array, its dtype and shape, as `float32[4,16]`."""


def describe_arrays(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array of a tree (arrays or ShapeDtypeStructs) by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        path_of(path): f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in leaves
    }


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step and makes it last: it is never seen half written."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="." + path.name)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_manifest(folder: Path, arrays: Arrays, *, scheduled: bool) -> None:
    """Records the files of a finished checkpoint, after bringing them to disk.

    Args:
      folder: the checkpoint's directory, to which nothing is written any more.
      arrays: what it holds.
      scheduled: whether an uninterrupted run would have written it too.
    """
    files = {}
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = {
            "bytes": path.stat().st_size,
            "sha256": digest,
        }
    record = {"format": FORMAT, "scheduled": scheduled, "files": files, "arrays": arrays}
    manifest = {"sha256": _digest(record), "record": record}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1))


def is_finished(folder: Path) -> bool:
    """Whether a checkpoint was written to its end, which says nothing of what became of it."""
    return (folder / MANIFEST).is_file()


def recorded_arrays(folder: Path) -> Arrays:
    """The arrays of a checkpoint that has no damage."""
    return _read(folder)["arrays"]


def is_scheduled(folder: Path) -> bool:
    """Whether a checkpoint is one that an uninterrupted run would have written too."""
    try:
        return bool(_read(folder)["scheduled"])
    except (OSError, ValueError):
        return False


def find_damage(
    folder: Path, items: Collection[str] | None = None, share: tuple[int, int] = (0, 1)
) -> str | None:
    """What is wrong with a finished checkpoint's files; None if nothing is.

    Args:
      folder: the checkpoint's directory.
      items: the items to look at, and what lies beside all items; None for all.
      share: (i, n): every n-th file from the i-th on, for n processes that share the work.

    Raises:
      OSError: a file that is there cannot be read.
    """
    try:
        files = _read(folder)["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} was changed"
    chosen = [
        (name, file["bytes"], file["sha256"])
        for name, file in files.items()
        if items is None or "/" not in name or name.split("/")[0] in items
    ]
    for name, size, digest in chosen[share[0] :: share[1]]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return f"{name} was changed"
    return None


def differing_arrays(recorded: Arrays, expected: Arrays) -> str | None:
    """In words, the first array that a checkpoint does not hold as expected; None if none.

    Only the items of `expected` are compared.
    """
    differing = []
    for item, arrays in expected.items():
        there = recorded.get(item, {})
        for path in sorted(arrays.keys() | there.keys()):
            if (old := there.get(path)) != (new := arrays.get(path)):
                differing.append(
                    f"{item}/{path} is {old or 'missing'} there, {new or 'absent'} in the config"
                )
    if not differing:
        return None
    more = f" ({len(differing) - 1} more)" if len(differing) > 1 else ""
    return differing[0] + more


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint; ValueError if it is not as it was written."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or _digest(manifest.get("record", {})) != manifest.get(
        "sha256"
    ):
        raise ValueError("the record was changed")
    return manifest["record"]


def _files(folder: Path) -> list[Path]:
    """Every file of a checkpoint but the manifest, in a fixed order."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST and not path.name.startswith("." + MANIFEST)
    )
