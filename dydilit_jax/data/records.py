"""Data sets that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow.

The layout is tfds's: DATA_DIR/NAME/VERSION/ or DATA_DIR/NAME/CONFIG/VERSION/ with features.json,
dataset_info.json and the shards. A data set is found by its files, whether or not the installed
tfds knows its name; nothing is downloaded. Records are tf.train.Example protocol buffers.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dydilit_jax.data.buckets import (
    AnyPath,
    check_credentials,
    check_opened,
    in_bucket,
    open_path,
    size_of,
)
from dydilit_jax.data.sources import SOURCES, EncodedSource
from dydilit_jax.errors import UserError

CHECK_THREADS = 16
SCAN_BLOCK = 256
READER_OPTIONS = "readahead_buffer_size:0"


def prepare_command(name: str, data_dir: str) -> str:
    """How to prepare a data set."""
    where = f" --data_dir={data_dir}" if data_dir else ""
    return f"tfds build {name} --file_format=array_record{where}"


def default_data_dir() -> str:
    """Where tfds keeps data sets: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return os.environ.get("TFDS_DATA_DIR") or str(Path.home() / "tensorflow_datasets")


def find_version(name: str, data_dir: str) -> AnyPath:
    """The folder of a data set's newest version, or of the one that `NAME:VERSION` names.

    Raises:
      UserError: it is not there (says how to prepare it).
    """
    name, _, wanted = name.partition(":")
    root = open_path(data_dir or default_data_dir())
    folder = root / name
    versions = {}
    if folder.is_dir():
        for entry in folder.iterdir():
            if re.fullmatch(r"\d+\.\d+\.\d+", entry.name) and (entry / "features.json").exists():
                versions[tuple(map(int, entry.name.split(".")))] = entry
    if wanted:
        versions = {number: path for number, path in versions.items() if path.name == wanted}
    if versions:
        return versions[max(versions)]
    there = (
        sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    )
    others = [other for other in (*there, *SOURCES, "folder") if other != name]
    if near := difflib.get_close_matches(name, others, n=1):
        hint = f"did you mean {near[0]!r}? Or prepare"
    else:
        hint = "prepare"
    version = f" version {wanted}" if wanted else ""
    raise UserError(
        f"data source {name!r}{version} is not in {os.fspath(root)!r}: {hint} it with "
        f"'{prepare_command(name, data_dir)}', or set data.data_dir"
    )


class RecordSource(EncodedSource):
    """A split of an image-classification data set in tfds's layout.

    Args:
      name: `cifar10`, `imagenet2012`, `NAME/CONFIG`, with `:VERSION` for another than the newest.
      data_dir: local, or `gs://...` where gcsfs is installed; empty for tfds's own default.
      split: in tfds's language: `train`, `train[:90%]`, `train+validation`.
      image_size: side that images are scaled and cropped to.
      channels: 3 for colour, 1 for grey levels.

    Raises:
      UserError: no such data set or split, an empty split, another file format, no image and label
        among the features, or shards that are missing or truncated.
    """

    def __init__(self, name: str, *, data_dir: str, split: str, image_size: int, channels: int):
        folder = find_version(name, data_dir)
        check_credentials(folder)
        info = _read_info(folder)
        kind = info.file_format.value
        if kind != "array_record":
            raise UserError(
                f"data set {name!r} in {os.fspath(folder)!r} is stored as {kind}: prepare it in "
                f"another folder with '{prepare_command(name, 'FOLDER')}'"
            )
        self._image_key, self._label_key = _feature_names(info, name)
        self._name = name
        self._split = split
        files = _split_files(info, name, split, folder)
        self._check_shards(info, files)
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records = ArrayRecordDataSource(files)
        self._files = [(os.fspath(file.filename), file.skip, file.take) for file in files]
        names = _label_names(info.features[self._label_key])
        super().__init__(names, image_size=image_size, channels=channels)

    def __len__(self) -> int:
        return len(self._records)

    def name(self, index: int) -> str:
        """The record and its file."""
        for file, skip, take in self._files:
            if index < take:
                return f"record {skip + index} of {file!r}"
            index -= take
        raise IndexError(f"record {index} of {len(self)}")

    def read(self, index: int) -> tuple[bytes, int]:
        """An encoded image and its label; UserError if it cannot be read."""
        # array_record and protobuf raise what they please for damaged bytes, and nothing else here
        # raises at all.
        try:
            return self._parse(self._records[index])
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"a damaged record ({type(error).__name__}: {reason})") from error

    def read_labels(self) -> np.ndarray:
        """All labels (n,) int32, -1 where a record cannot be read.

        Every record has to be read for it, once: the labels are kept in $XDG_CACHE_HOME/dydilit_jax
        (by default ~/.cache).
        """
        path = self._label_cache()
        if path.is_file():
            return np.load(path)
        blocks = [range(i, min(i + SCAN_BLOCK, len(self))) for i in range(0, len(self), SCAN_BLOCK)]
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            parts = tqdm(
                threads.map(self._block_labels, blocks),
                desc=f"reading the labels of {self._name}, once",
                total=len(blocks),
                disable=len(self) < 10_000 and not sys.stderr.isatty(),
            )
            labels = np.concatenate(list(parts))
        _save_atomically(path, labels)
        return labels

    def _parse(self, record: bytes) -> tuple[bytes, int]:
        from tensorflow_datasets.proto import tf_example_pb2

        features = tf_example_pb2.Example.FromString(record).features.feature
        (image,) = features[self._image_key].bytes_list.value
        (label,) = features[self._label_key].int64_list.value
        return image, label

    def _block_labels(self, block: Sequence[int]) -> np.ndarray:
        labels = np.full(len(block), -1, np.int32)
        for i, index in enumerate(block):
            try:
                labels[i] = self.read(index)[1]
            except UserError as error:
                print(f"{self.name(index)}: {error}", file=sys.stderr, flush=True)
        return labels

    def _label_cache(self) -> Path:
        sizes = [size_of(open_path(file)) for file, _, _ in self._files]
        key = hashlib.sha256(repr((self._files, sizes)).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = re.sub(r"\W+", "-", f"{self._name}-{self._split}")
        return cache / "dydilit_jax" / f"labels-{name}-{key}.npy"

    def _check_shards(self, info: Any, files: Sequence[Any]) -> None:
        """Opens every shard once: a truncated one would otherwise fail record by record."""
        expected = {
            path.name: length
            for split in info.splits.values()
            for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
        }
        paths = sorted({os.fspath(file.filename) for file in files})
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            counts = list(threads.map(_count_records, paths))
        for path, count in zip(paths, counts, strict=True):
            wanted = expected[Path(path).name]
            if count != wanted:
                found = (
                    "is missing"
                    if count is None
                    else f"has {count} records instead of {wanted}: it is truncated or damaged"
                )
                raise UserError(
                    f"{path!r} {found}; copy the data set again, or prepare it with "
                    f"'{prepare_command(self._name, '')}'"
                )


def _read_info(folder: AnyPath) -> Any:
    """tfds's description of a data set, from its metadata alone."""
    import tensorflow_datasets as tfds

    if not in_bucket(folder):
        return tfds.builder_from_directory(folder).info
    # tfds would read a bucket with TensorFlow; the metadata is a few small files.
    with tempfile.TemporaryDirectory() as copy:
        for path in folder.iterdir():
            if path.name.endswith((".json", ".txt")):
                (Path(copy) / path.name).write_bytes(path.read_bytes())
        return tfds.builder_from_directory(copy).info


def _count_records(path: str) -> int | None:
    """Records of a shard, 0 if its end cannot be read; None if there is no such file."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not open_path(path).exists():
        return None
    reader = ArrayRecordReader(path, options=READER_OPTIONS, file_reader_buffer_size=32768)
    check_opened(reader, path)
    count = reader.num_records() if reader.ok() else 0
    # A reader of a damaged file raises once more when it is closed.
    if reader.ok():
        reader.close()
    return count


def _split_files(info: Any, name: str, split: str, folder: AnyPath) -> list[Any]:
    known = ", ".join(sorted(info.splits)) or "none"
    try:
        files = info.splits[split].file_instructions
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"data set {name!r} has no split {split!r} (data.split). Known: {known}"
        ) from error
    if not sum(file.take for file in files):
        raise UserError(f"split {split!r} of data set {name!r} is empty (data.split)")
    # The metadata may be read elsewhere than the shards lie.
    return [
        dataclasses.replace(file, filename=os.fspath(folder / Path(file.filename).name))
        for file in files
    ]


def _feature_names(info: Any, name: str) -> tuple[str, str]:
    """Names of the image and of the label: the supervised pair, or the only ones of their kind."""
    from tensorflow_datasets.core import features

    found = []
    for kind in (features.Image, features.ClassLabel):
        names = [key for key, feature in info.features.items() if isinstance(feature, kind)]
        supervised = [key for key in info.supervised_keys or () if key in names]
        if len(supervised or names) != 1:
            raise UserError(
                f"data set {name!r} is not one of labelled images: it has "
                f"{len(names)} {kind.__name__} features ({', '.join(info.features)})"
            )
        found += supervised or names
    return found[0], found[1]


def _label_names(feature: Any) -> list[str]:
    try:
        return list(feature.names)
    except (AttributeError, ValueError):
        return [str(i) for i in range(feature.num_classes)]


def _save_atomically(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, labels)
    Path(file.name).replace(path)
