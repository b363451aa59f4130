"""Images, folders and data sets in tfds's own layout, written small."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from dydilit_jax.config import DataConfig
from dydilit_jax.data.load import load_images

NAMES = ("cat", "dog", "eel")


def picture(width: int, height: int, number: int = 0) -> Image.Image:
    """An RGB image with detail at every scale, from integers alone."""
    y, x, c = np.indices((height, width, 3))
    levels = x * x * 7 + y * 13 * (number + 1) + x * y + c * 29 + number * 31
    return Image.fromarray((levels % 256).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def examples(count: int, size: int = 12, classes: int = 3) -> list[tuple[bytes, int]]:
    """Pairs of a JPEG, none like another, and its label."""
    return [
        (encoded(picture(size + i % 5, size, i), "JPEG", quality=95), i % classes)
        for i in range(count)
    ]


def write_data_set(
    root: Path,
    name: str,
    splits: dict[str, list[list[tuple[bytes, int]]]],
    version: str = "1.0.0",
    names: tuple[str, ...] | None = NAMES,
    filetype: str = "array_record",
) -> Path:
    """A data set of shards of (encoded image, label), with tfds's serialisation and metadata."""
    import tensorflow_datasets as tfds

    folder = root / name / version
    folder.mkdir(parents=True)
    label = tfds.features.ClassLabel(names=names, num_classes=None if names else 3)
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": label, "id": np.int64}
    )
    infos = []
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            file = f"{name}-{split}.{filetype}-{i:05d}-of-{len(shards):05d}"
            writer = ArrayRecordWriter(str(folder / file), "group_size:1")
            for number, (image, value) in enumerate(shard):
                # As ClassLabel itself refuses a label outside its range.
                example = {"image": io.BytesIO(image), "label": 0, "id": number}
                record = features.serialize_example(features.encode_example(example))
                writer.write(_with_label(record, value))
            writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix=filetype
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard) for shard in shards],
                num_bytes=1,
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=infos,
        version=version,
        supervised_keys=("image", "label"),
        check_data=False,
    )
    return folder


def _with_label(record: bytes, label: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)
    example.features.feature["label"].int64_list.value[:] = [label]
    return example.SerializeToString()


def images_of(root: Path | str, source: str = "pets", **fields: Any) -> Any:
    """The source of a data set below `root`, of 8 x 8 images."""
    return load_images(DataConfig(source=source, data_dir=str(root), **fields), image_size=8)
