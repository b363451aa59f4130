"""An image depends on its seed, index and label alone."""

import dataclasses

import jax
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.training.generation import check_labels, generate_images
from dydilit_jax.training.state import Network
from tests.tiny import mesh_of, random_parameters, tiny_config

CONFIG = tiny_config(sampling={"steps": 3, "guidance_scale": 1.5})
LABELS = np.arange(40) % 10


@pytest.fixture(scope="module")
def draw():
    network = Network.create(CONFIG)
    parameters = random_parameters(network, spread=0.05)

    def images(labels=LABELS, devices=8, batch_size=64, seed=5):
        config = dataclasses.replace(CONFIG.sampling, batch_size=batch_size)
        return list(
            generate_images(
                network, parameters, labels, seed=seed, config=config, mesh=mesh_of(devices)
            )
        )

    return images


@pytest.fixture(scope="module")
def reference(draw):
    return np.concatenate(draw(devices=1))


def test_images_are_finite_and_all_different(reference):
    assert reference.shape == (40, 8, 8, 1)
    assert reference.dtype == np.float32
    assert np.all(np.isfinite(reference))
    assert len(np.unique(reference.reshape(40, -1), axis=0)) == 40
    assert np.std(reference) > 0.1


@pytest.mark.parametrize(
    ("devices", "batch_size", "sizes"), [(8, 64, [40]), (8, 16, [16, 16, 8]), (8, 3, [8] * 5)]
)
def test_the_same_images_in_any_batch_on_any_devices(draw, reference, devices, batch_size, sizes):
    parts = draw(devices=devices, batch_size=batch_size)
    assert [len(part) for part in parts] == sizes
    np.testing.assert_allclose(np.concatenate(parts), reference, atol=1e-5)


def test_an_image_follows_its_label_and_no_other(draw, reference):
    labels = LABELS.copy()
    labels[3] = 7
    changed = np.concatenate(draw(labels=labels, batch_size=16))
    others = np.arange(40) != 3
    np.testing.assert_allclose(changed[others], reference[others], atol=1e-5)
    assert np.max(np.abs(changed[3] - reference[3])) > 1e-3


def test_fewer_images_are_the_first_ones(draw, reference):
    images = np.concatenate(draw(labels=LABELS[:13], batch_size=16))
    np.testing.assert_allclose(images, reference[:13], atol=1e-5)


def test_another_seed_is_another_image(draw, reference):
    images = np.concatenate(draw(batch_size=16, seed=6))
    assert np.min(np.max(np.abs(images - reference), axis=(1, 2, 3))) > 1e-2


@pytest.mark.parametrize("label", [-1, 10, 99])
def test_a_label_outside_the_classes_is_refused(draw, label):
    with pytest.raises(UserError, match=rf"label {label} is outside the classes 0 to 9"):
        draw(labels=np.array([0, label]))
    check_labels(np.array([0, 9]), 10)


def test_keys_of_images_are_folded_from_the_seed(draw):
    # With guidance off and no steps but one, x_0 = noise - velocity(noise); noise is checked here.
    key = jax.random.fold_in(jax.random.key(5), 2)
    noise = jax.random.normal(jax.random.fold_in(key, 0), (8, 8, 1))
    network = Network.create(CONFIG)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), random_parameters(network))
    images = generate_images(
        network, zeros, LABELS[:8], seed=5, config=CONFIG.sampling, mesh=mesh_of(8)
    )
    # A network of zeros has no velocity: the image is its noise.
    np.testing.assert_allclose(next(images)[2], noise, rtol=1e-6)
