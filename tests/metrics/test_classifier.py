"""A small classifier and the pixels as networks of features."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.ndimage import gaussian_filter

from dydilit_jax.data.sources import ArraySource, digits
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.metrics import classifier as module
from dydilit_jax.metrics.classifier import (
    Classifier,
    Network,
    load_classifier,
    read_pixels,
    train_classifier,
)
from dydilit_jax.metrics.frechet import frechet_distance, moments
from dydilit_jax.metrics.pixels import PixelFeatures
from tests.tiny import to_numpy

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier of the digits, and its file."""
    path = tmp_path_factory.mktemp("classifier") / "digits.safetensors"
    return train_classifier(digits(), path, steps=250), path


@pytest.fixture(scope="module")
def extract(trained):
    classifier, _ = trained
    apply = jax.jit(classifier.apply)
    return lambda images: apply(classifier.parameters, images)


def by_hand(parameters, images):
    """Features and logits in float64, convolution by convolution; GELU is the tanh form."""
    p = {name: value.astype(np.float64) for name, value in to_numpy(parameters).items()}
    x = images.astype(np.float64) / 127.5 - 1.0
    count = len({name for name in p if name.startswith("convolutions")}) // 2
    for i in range(count):
        kernel, bias = p[f"convolutions/{i}/kernel"], p[f"convolutions/{i}/bias"]
        stride = 1 if i == count - 1 else 2
        # "SAME": as many places as strides, what is left of the padding comes last.
        places = -(-x.shape[1] // stride)
        padding = max((places - 1) * stride + 3 - x.shape[1], 0)
        before = padding // 2
        padded = np.pad(x, [(0, 0), *[(before, padding - before)] * 2, (0, 0)])
        y = np.empty((len(x), places, places, kernel.shape[-1]))
        for row in range(places):
            for column in range(places):
                top, left = row * stride, column * stride
                window = padded[:, top : top + 3, left : left + 3]
                y[:, row, column] = np.einsum("bhwc,hwcd->bd", window, kernel) + bias
        mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
        y = (y - mean) / np.sqrt(variance + 1e-6)
        y = y * p[f"norms/{i}/scale"] + p[f"norms/{i}/bias"]
        x = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    features = x.mean((1, 2))
    return features, features @ p["head/kernel"] + p["head/bias"]


@pytest.mark.parametrize("shape", [SHAPE, (16, 16, 3)])
def test_features_and_logits_are_those_computed_by_hand(shape):
    network = Network(shape, 10, rngs=nnx.Rngs(0))
    parameters = nnx.to_pure_dict(nnx.split(network)[1])
    rng = np.random.default_rng(1)
    # Biases and scales that are not zero and one.
    parameters = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.1 * rng.standard_normal(leaf.shape), np.float32),
        parameters,
    )
    classifier = Classifier(parameters, shape, 10, 0.5)
    images = rng.integers(0, 256, (3, *shape), np.uint8)
    features = jax.jit(classifier.apply)(parameters, images)
    pool, logits = by_hand(parameters, images)
    np.testing.assert_allclose(features.pool, pool, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features.logits, logits, rtol=1e-4, atol=1e-4)
    assert features.pool.shape == (3, classifier.width)
    assert features.spatial is None


def test_it_learns_and_says_how_well(trained, extract):
    classifier, _ = trained
    images, labels = read_pixels(digits())
    held_out = np.arange(len(images)) % 10 == 9
    right = np.argmax(extract(images).logits, axis=-1) == labels
    assert np.mean(right[held_out]) == pytest.approx(classifier.accuracy)
    assert classifier.accuracy > 0.9
    assert f"{classifier.accuracy:.1%} right" in classifier.description


def test_levels_and_pixels_are_the_same_images(extract):
    source = digits()
    levels = extract(to_uint8(source.images[:20]))
    np.testing.assert_allclose(extract(source.images[:20]).pool, levels.pool, rtol=1e-5, atol=1e-5)


def test_distances_grow_with_noise_blur_and_imbalance(extract):
    images, labels = read_pixels(digits())
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], labels[order]
    half = len(images) // 2

    def distance(changed):
        first, second = (np.asarray(extract(each).pool) for each in (images[half:], changed))
        return frechet_distance(moments(first), moments(second))

    rng = np.random.default_rng(1)

    def noisy(levels):
        noise = levels * rng.standard_normal(images[:half].shape)
        return np.clip(images[:half] + noise, 0, 255).astype(np.uint8)

    def blurred(sigma):
        return gaussian_filter(images[:half], (0, sigma, sigma, 0))

    nothing = distance(images[:half])
    assert nothing < distance(noisy(20)) < distance(noisy(60))
    assert nothing < distance(blurred(0.5)) < distance(blurred(1.0))
    assert nothing < distance(images[:half][labels[:half] < 8])
    assert distance(images[:half][labels[:half] < 3]) > 5 * nothing


def test_the_same_images_and_seed_give_the_same_file(tmp_path):
    for name in ("a", "b", "c"):
        train_classifier(digits(), tmp_path / name, steps=3, seed=int(name == "c"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_what_was_trained_is_read_again(trained, extract):
    classifier, path = trained
    again = load_classifier(path, SHAPE)
    assert again.checksum == classifier.checksum
    assert again.description == classifier.description
    images = read_pixels(digits())[0][:5]
    np.testing.assert_array_equal(
        jax.jit(again.apply)(again.parameters, images).pool, extract(images).pool
    )


def test_files_that_are_not_as_they_were_written_are_refused(trained, tmp_path):
    _, path = trained
    with pytest.raises(UserError, match="there is no classifier"):
        load_classifier(tmp_path / "none", SHAPE)
    with pytest.raises(UserError, match=r"is of images \(8, 8, 1\), these are \(16, 16, 1\)"):
        load_classifier(path, (16, 16, 1))
    data = bytearray(path.read_bytes())
    (tmp_path / "short").write_bytes(data[:-100])
    with pytest.raises(UserError, match="is damaged"):
        load_classifier(tmp_path / "short", SHAPE)
    data[-1] ^= 1
    (tmp_path / "changed").write_bytes(data)
    with pytest.raises(UserError, match="was changed since it was written"):
        load_classifier(tmp_path / "changed", SHAPE)


def test_large_images_and_few_are_refused(tmp_path):
    large = ArraySource(np.zeros((40, 65, 65, 1), np.float32), np.zeros(40, np.int32), ("a",))
    with pytest.raises(UserError, match=r"up to 64 pixels a side, these have 65"):
        train_classifier(large, tmp_path / "x")
    with pytest.raises(UserError, match=r"--features=pixels is for images of up to 64"):
        PixelFeatures((65, 65, 3))
    few = dataclasses.replace(digits(), images=digits().images[:5], labels=digits().labels[:5])
    with pytest.raises(UserError, match="5 images are too few"):
        train_classifier(few, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [SHAPE, (4, 6, 3)])
def test_pixels_are_features(shape):
    features = PixelFeatures(shape)
    images = np.random.default_rng(0).integers(0, 256, (5, *shape), np.uint8)
    pool = jax.jit(features.apply)({}, images).pool
    assert pool.shape == (5, features.width)
    np.testing.assert_allclose(pool, images.reshape(5, -1) / 127.5 - 1.0, atol=1e-6)
    assert features.checksum != PixelFeatures((9, 9, 1)).checksum
    with pytest.raises(UserError, match="not one size"):
        features.apply({}, jnp.zeros((5, 9, 9, shape[-1]), jnp.uint8))


def test_progress_is_told(tmp_path):
    told: list[int] = []
    train_classifier(digits(), tmp_path / "x", steps=2, progress=told.append)
    assert told == [1, 1]
    assert module.STEPS > 2
