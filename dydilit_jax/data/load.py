"""A config's data: its source by name, and this process's batches of it."""

from __future__ import annotations

import jax

from dydilit_jax.config import Config, DataConfig
from dydilit_jax.data.buckets import readable
from dydilit_jax.data.classes import ClassSubset, read_class_list
from dydilit_jax.data.folder import FolderSource
from dydilit_jax.data.latents import LatentSource, wanted_of
from dydilit_jax.data.pipeline import StepBatches, make_batches
from dydilit_jax.data.records import RecordSource
from dydilit_jax.data.sources import SOURCES, Source
from dydilit_jax.errors import UserError


def load_images(data: DataConfig, *, image_size: int, channels: int = 3) -> Source:
    """The data set of images that `data.source` names, with the classes of `data.classes`.

    Args:
      data: the config's section.
      image_size: side of the images, where the data set does not have one size of its own.
      channels: 3 for colour, 1 for grey levels.

    Raises:
      UserError: a data set that is missing, empty, truncated or not of images; unknown classes.
    """
    size = data.image_size or image_size
    if data.source in SOURCES:
        source: Source = SOURCES[data.source]()
    else:
        with readable():
            source = _open_images(data, size, channels)
    return of_classes(source, data.classes)


def _open_images(data: DataConfig, size: int, channels: int) -> Source:
    if data.source == "folder":
        return FolderSource(data.data_dir, split=data.split, image_size=size, channels=channels)
    return RecordSource(
        data.source, data_dir=data.data_dir, split=data.split, image_size=size, channels=channels
    )


def of_classes(source: Source, path: str) -> Source:
    """The examples of the classes named in a file; all of them if that is empty."""
    if not path:
        return source
    names = read_class_list(path)
    return source if names == tuple(source.label_names) else ClassSubset(source, names, path)


def load_source(config: Config) -> Source:
    """What the config's network is trained on: images, or latents if `data.latents` is set.

    Raises:
      UserError: as load_images; latents that are missing, damaged or of something else; or the
        network's input or classes are not the data's.
    """
    data, model = config.data, config.model
    if data.latents:
        with readable():
            source: Source = LatentSource(
                data.latents, wanted=wanted_of(config), flip=data.horizontal_flip
            )
    else:
        source = load_images(data, image_size=model.image_size, channels=model.channels)
    expected = (model.image_size, model.image_size, model.channels)
    if tuple(source.image_shape) != expected:
        raise UserError(
            f"data source {data.source!r} has images {source.image_shape}, the network "
            f"expects {expected}: set model.image_size and model.channels"
        )
    if len(source.label_names) != model.num_classes:
        raise UserError(
            f"data source {data.source!r} has {len(source.label_names)} classes, "
            f"model.num_classes is {model.num_classes}"
        )
    return source


def load_data(config: Config) -> tuple[Source, StepBatches]:
    """The config's data set, and this process's batches of it.

    Raises:
      UserError: as load_source; or a batch that the processes do not divide.
    """
    source = load_source(config)
    data = config.data
    batches = make_batches(
        source,
        batch_size=data.batch_size,
        seed=config.seed,
        horizontal_flip=data.horizontal_flip,
        read_threads=data.read_threads,
        workers=data.workers,
        on_error=data.on_error,
        max_errors=data.max_errors,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return source, batches


def label_names(config: Config) -> list[str]:
    """Names of the config's classes; numbers where the data set is not on this machine."""
    try:
        return list(load_source(config).label_names)
    except UserError:
        return [str(label) for label in range(config.model.num_classes)]
