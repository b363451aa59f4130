"""Images over the mesh, batch by batch, and the parts that they are kept in."""

import dataclasses

import jax
import numpy as np
import pytest

from dydilit_jax.autoencoders import load_autoencoder
from dydilit_jax.config import AutoencoderConfig
from dydilit_jax.data.sources import digits
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.training.comparison import ChosenRows
from dydilit_jax.training.decoding import make_decoder
from dydilit_jax.training.generation import generate_images
from dydilit_jax.training.image_parts import ImageParts
from dydilit_jax.training.scoring import (
    Drawing,
    SourceImages,
    batches,
    by_device,
    check_count,
    fitting_batch,
    read_images,
)
from dydilit_jax.training.state import Network
from tests.autoencoders.test_diffusers import FIXTURES
from tests.tiny import mesh_of, plain_config, random_parameters

LABELS = np.arange(40) % 10


@pytest.mark.parametrize("sizes", [(4, 1, 2), (2, 2, 1)])
def test_latents_are_drawn_and_decoded_as_sample_does_it(sizes):
    """On devices that share a row of tokens too; more on one than are decoded at once."""
    weights = str(FIXTURES / "kl")
    channels = load_autoencoder(weights).autoencoder.latent_channels
    config = plain_config(model={"channels": channels}, autoencoder={"weights": weights})
    network = Network.create(config)
    parameters = random_parameters(network, spread=0.05)
    mesh = mesh_of(*sizes)
    sampling = dataclasses.replace(config.sampling, batch_size=40)
    autoencoder = load_autoencoder(weights).autoencoder
    drawing = Drawing(network, sampling, mesh, autoencoder)
    size = fitting_batch(40, 40, mesh)
    drawn = list(batches(drawing.images(parameters, LABELS, 5), 40, batch_size=size))
    images = np.concatenate([np.asarray(pixels) for _, pixels in drawn])[:40]
    latents = generate_images(network, parameters, LABELS, seed=5, config=sampling, mesh=mesh)
    decode = make_decoder(AutoencoderConfig(weights=weights), jax.devices()[:1])
    expected = to_uint8(decode(np.concatenate(list(latents))))
    assert images.shape[1:] == drawing.image_shape == expected.shape[1:]
    assert images.dtype == np.uint8
    # Rounding of a level may fall the other way.
    difference = np.abs(images.astype(int) - expected)
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3
    rows = {shard.data.shape[0] for shard in drawn[0][1].addressable_shards}
    assert rows == {size // mesh.size}


def test_batches_go_on_and_fill_up_the_last():
    asked = []

    def images(indices):
        asked.append(indices.tolist())
        return indices

    marked = [indices.tolist() for indices, _ in batches(images, 10, batch_size=4, first=4)]
    assert marked == [[4, 5, 6, 7], [8, 9, -1, -1]]
    assert asked == [[4, 5, 6, 7], [8, 9, 9, 9]]


@pytest.mark.parametrize(
    ("wanted", "num", "devices", "batch"),
    [(250, 1000, 8, 256), (250, 1000, 1, 256), (13, 1000, 8, 16), (250, 5, 8, 8), (30, 30, 2, 32)],
)
def test_a_batch_fits_the_devices(wanted, num, devices, batch):
    assert fitting_batch(wanted, num, mesh_of(devices)) == batch


def test_each_device_reads_its_rows():
    source, mesh = digits(), mesh_of(2, 2, 2)
    files = SourceImages(source)
    read = []

    class Noted:
        image_shape = files.image_shape

        def __len__(self):
            return len(files)

        def read(self, indices):
            read.append(indices.tolist())
            return files.read(indices)

    which = np.arange(100, 124)
    images = read_images(Noted(), mesh)(which)
    assert sorted(read) == [list(range(start, start + 3)) for start in range(100, 124, 3)]
    assert images.sharding.is_equivalent_to(by_device(mesh), 4)
    np.testing.assert_array_equal(images, to_uint8(source.images[which]))


def test_images_are_kept_in_parts_and_read_in_order(tmp_path):
    mesh = mesh_of(8)
    images = np.random.default_rng(0).integers(0, 256, (20, 2, 2, 3), np.uint8)

    def placed(indices):
        return jax.device_put(images[np.maximum(indices, 0)], by_device(mesh))

    parts = ImageParts(tmp_path, 0)
    for indices in (np.arange(8), np.arange(8, 16)):
        parts.add(indices, placed(indices))
    # Killed after the second: its images were drawn, but are not in the sums that were saved.
    parts = ImageParts(tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["00000000.0.npz"]
    last = np.array([16, 17, 18, 19, -1, -1, -1, -1])
    parts.add(last, placed(last))
    with pytest.raises(UserError, match="images from 8 on are missing"):
        list(parts.read())
    parts.add(np.arange(8, 16), placed(np.arange(8, 16)))
    np.testing.assert_array_equal(np.concatenate(list(parts.read())), images)


def test_rows_of_some_images_alone_are_kept():
    rows = ChosenRows(2, np.array([1, 4, 9]), None)
    values = np.arange(20, dtype=np.float32).reshape(10, 2)
    rows.add(values[:5], np.array([0, 4, 1, 3, 2]))
    rows.add(values[5:], np.array([5, 9, 6, 7, 8]))
    assert len(rows) == 3
    kept = rows.read(0, 3)
    assert kept["index"].tolist() == [4, 1, 9]
    np.testing.assert_array_equal(kept["row"], values[[1, 2, 6]])


def test_too_few_images_are_refused():
    check_count(4)
    check_count(2, ("frechet", "kernel"))
    with pytest.raises(UserError, match="3 images are too few: precision and recall need at least"):
        check_count(3)
    with pytest.raises(UserError, match="1 images are too few: a covariance needs"):
        check_count(1, ("frechet",))
