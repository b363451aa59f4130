"""From a config to batches: latents in the images' place."""

import numpy as np
import pytest

from dydilit_jax.data.encoding import finish
from dydilit_jax.data.latents import LatentRecord, Moments, write_shard
from dydilit_jax.data.load import label_names, load_data, load_source
from dydilit_jax.data.manifest import Manifest
from dydilit_jax.errors import UserError
from tests.tiny import tiny_config

COUNT, SHA = 10, "ab" * 32
NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latents 2 x 2 x 4 of ten images: image i has mean i, its mirror image -i, and no spread."""
    folder = tmp_path_factory.mktemp("latents")
    manifest = Manifest(
        source="pets",
        split="train",
        image_size=16,
        crop="center",
        flips=True,
        label_names=NAMES,
        autoencoder="unknown",
        weights_sha256=SHA,
        scaling_factor=0.5,
        latent_shape=(2, 2, 4),
        deterministic=False,
        dtype="float32",
        compute_dtype="float32",
        shard_size=6,
        examples=COUNT,
    )

    def moments(value):
        return Moments(np.full((2, 2, 4), value, np.float32), np.zeros((2, 2, 4), np.float32))

    for number in range(manifest.shard_count):
        records = [
            LatentRecord(i, i % 2, moments(i + 1), moments(-i - 1))
            for i in manifest.shard_range(number)
        ]
        write_shard(folder / manifest.shard_file(number), records, manifest)
    assert finish(folder, manifest) is not None
    return folder


def config_of(latents, model=None, **data):
    return tiny_config(
        model={"image_size": 2, "patch_size": 1, "channels": 4, "num_classes": 2} | (model or {}),
        data={
            "source": "pets",
            "image_size": 16,
            "latents": str(latents),
            "batch_size": 5,
            "horizontal_flip": True,
        }
        | data,
        autoencoder={"weights": "elsewhere", "sha256": SHA},
    )


def test_a_config_reads_latents_where_it_has_them(latents):
    config = config_of(latents)
    source, batches = load_data(config)
    assert len(source) == COUNT
    assert label_names(config) == list(NAMES)
    drawn = [next(batches) for _ in range(8)]
    assert drawn[0]["image"].shape == (5, 2, 2, 4)
    assert drawn[0]["image"].dtype == np.float32
    values = np.concatenate([batch["image"][:, 0, 0, 0] for batch in drawn]).reshape(4, COUNT)
    labels = np.concatenate([batch["label"] for batch in drawn]).reshape(4, COUNT)
    # Scaled, each once an epoch, mirrored here and there, with its own label.
    images = np.abs(values) / 0.5 - 1
    np.testing.assert_array_equal(np.sort(images), np.tile(np.arange(COUNT), (4, 1)))
    np.testing.assert_array_equal(images % 2, labels)
    assert 0 < np.sum(values < 0) < 4 * COUNT
    plain = next(load_data(config_of(latents, horizontal_flip=False))[1])
    assert np.all(plain["image"] > 0)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"split": "test"}, "split: the latents have 'train', the config 'test'"),
        ({}, {"image_size": 32}, "image_size: the latents have 16, the config 32"),
        ({"num_classes": 3}, {}, "classes"),
        ({"image_size": 4}, {}, "latent_shape"),
    ],
)
def test_latents_of_something_else_are_refused(latents, model, data, message):
    with pytest.raises(UserError, match=message) as error:
        load_source(config_of(latents, model, **data))
    assert "\n" not in str(error.value)


def test_a_damaged_latent_is_replaced_as_an_image_is(latents, tmp_path, capfd):
    for file in latents.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = next(tmp_path.glob("latents-00000*"))
    data = bytearray(shard.read_bytes())
    place = data.find(np.full(16, 3, np.float32).tobytes())
    data[place : place + 8] = bytes(range(8))
    shard.write_bytes(data)
    batches = load_data(config_of(tmp_path))[1]
    values = np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(2)])
    # Image 2, whose mean is 3, is gone; image 3 is there twice.
    assert sorted(np.abs(values) / 0.5) == [1, 2, 4, 4, 5, 6, 7, 8, 9, 10]
    assert "skipped: record 2 of" in capfd.readouterr().err
