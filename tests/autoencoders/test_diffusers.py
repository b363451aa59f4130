"""The autoencoders against what diffusers computed from the same random weights, and tiling."""

import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dydilit_jax.autoencoders import (
    Moments,
    decode_tiled,
    images_from,
    latents_from,
    load_autoencoder,
)
from dydilit_jax.autoencoders.layout import tensors_of
from dydilit_jax.autoencoders.tiling import ramp, tile_starts
from dydilit_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("kl", "dc", "dc_shuffle")
WEIGHTS = "diffusion_pytorch_model.safetensors"
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def arrays_of(name):
    return {
        key: value.astype(np.float32) for key, value in np.load(FIXTURES / name / "io.npz").items()
    }


@functools.cache
def jitted(name, dtype="float32"):
    """Compiled encode and decode of a fixture."""
    graph, state = nnx.split(load_autoencoder(str(FIXTURES / name), dtype=dtype).autoencoder)
    encode = jax.jit(lambda images: nnx.merge(graph, state).encode(images))
    decode = jax.jit(lambda latents: nnx.merge(graph, state).decode(latents))
    return encode, decode


@pytest.mark.parametrize("name", NAMES)
def test_encoder_agrees_with_diffusers(name):
    expected = arrays_of(name)
    moments = jitted(name)[0](expected["images"])
    np.testing.assert_allclose(moments.mean, expected["mean"], rtol=0, atol=1e-4)
    if "std" in expected:
        # The fixture's log-variances go beyond both bounds of the original.
        assert expected["std"].min() < np.exp(-14.9)
        assert expected["std"].max() > np.exp(9.9)
        np.testing.assert_allclose(moments.std, expected["std"], rtol=1e-4, atol=0)
    else:
        assert not np.any(moments.std)


@pytest.mark.parametrize("name", NAMES)
def test_decoder_agrees_with_diffusers(name):
    expected = arrays_of(name)
    images = jitted(name)[1](expected["latents"])
    np.testing.assert_allclose(images, expected["decoded"], rtol=0, atol=1e-4)


def test_bfloat16_computes_in_it_and_stays_near():
    expected = arrays_of("kl")
    moments = jitted("kl", "bfloat16")[0](expected["images"])
    difference = np.abs(np.asarray(moments.mean, np.float32) - expected["mean"])
    assert 1e-4 < difference.max() < 0.2  # 8 bits of mantissa through some twenty layers
    assert moments.mean.dtype == np.float32


def test_old_names_of_attention_are_the_same_weights(tmp_path):
    shutil.copytree(FIXTURES / "kl", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / WEIGHTS)
    for new, old in OLD.items():
        tensors = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): value
            for key, value in tensors.items()
        }
    assert sum("proj_attn" in key for key in tensors) == 4
    save_file(tensors, tmp_path / "old" / WEIGHTS)
    before = tensors_of(load_autoencoder(str(tmp_path / "old")).autoencoder)
    today = tensors_of(load_autoencoder(str(FIXTURES / "kl")).autoencoder)
    assert before.keys() == today.keys()
    for name in today:
        np.testing.assert_array_equal(before[name], today[name], err_msg=name)


def test_what_the_autoencoder_says_of_itself():
    for name, downsampling, channels, scaling in (
        ("kl", 8, 4, 0.18215),
        ("dc", 32, 8, 0.41407),
        ("dc_shuffle", 2, 4, 1.0),
    ):
        autoencoder = load_autoencoder(str(FIXTURES / name)).autoencoder
        assert autoencoder.downsampling == downsampling
        assert autoencoder.latent_channels == channels
        assert autoencoder.scaling_factor == scaling
        assert autoencoder.deterministic == (name != "kl")


def test_samples_have_the_moments_whatever_the_batch():
    moments = Moments(jnp.full((4, 32, 32, 1), 2.0), jnp.full((4, 32, 32, 1), 3.0))
    draws = np.asarray(moments.sample(jax.random.key(1)))
    assert abs(draws.mean() - 2.0) < 0.2
    assert abs(draws.std() - 3.0) < 0.2
    part = Moments(moments.mean[:2], moments.std[:2]).sample(jax.random.key(1))
    np.testing.assert_array_equal(part, draws[:2])


def test_scaled_latents_there_and_back():
    class Halves:
        """Means over pairs of rows as a latent; deviation 1."""

        downsampling, latent_channels, scaling_factor, deterministic = 2, 3, 0.25, False

        def encode(self, images):
            mean = images[:, ::2, ::2]
            return Moments(mean, jnp.ones_like(mean))

        def decode(self, latents):
            return latents.repeat(2, axis=1).repeat(2, axis=2)

    images = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    images = images[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2)
    latents = latents_from(Halves(), images)
    np.testing.assert_allclose(latents, 0.25 * images[:, ::2, ::2], rtol=1e-6)
    np.testing.assert_allclose(images_from(Halves(), latents), images, rtol=1e-6)
    noise = (latents_from(Halves(), images, jax.random.key(0)) - latents) / 0.25
    assert 0.6 < np.asarray(noise).std() < 1.4


def test_one_tile_is_the_decoder_itself():
    expected = arrays_of("kl")
    decode = jitted("kl")[1]
    tiled = decode_tiled(decode, expected["latents"], downsampling=8, tile=4, overlap=2)
    np.testing.assert_array_equal(tiled, decode(expected["latents"]))


@pytest.mark.parametrize(("height", "width"), [(5, 13), (7, 3), (4, 11)])
def test_a_decoder_of_each_latent_alone_is_tiled_exactly(height, width):
    latents = np.random.default_rng(height).standard_normal((2, height, width, 2))
    shapes = set()

    def decode(part):
        shapes.add(part.shape)
        return np.tanh(part).repeat(3, axis=1).repeat(3, axis=2)

    tiled = decode_tiled(decode, latents, downsampling=3, tile=4, overlap=2)
    assert len(shapes) == 1
    assert max(next(iter(shapes))[1:3]) == 4
    np.testing.assert_allclose(tiled, decode(latents), rtol=0, atol=1e-6)


def test_tiles_are_blended_linearly_where_they_overlap():
    """Each tile decodes to its own number: between two the image goes evenly from 1 to 2."""
    numbers = iter([1.0, 2.0])

    def decode(part):
        return np.full((1, 2 * part.shape[1], 2 * part.shape[2], 1), next(numbers))

    tiled = decode_tiled(decode, np.zeros((1, 4, 6, 1)), downsampling=2, tile=4, overlap=2)
    row = tiled[0, 0, :, 0]
    np.testing.assert_allclose(row, [1, 1, 1, 1, 1.125, 1.375, 1.625, 1.875, 2, 2, 2, 2], atol=1e-6)


def test_tiles_cover_the_image():
    assert tile_starts(4, 4, 2) == [0]
    assert tile_starts(9, 4, 2) == [0, 2, 4, 5]
    assert tile_starts(8, 4, 0) == [0, 4]
    assert np.all(ramp(2, 4, 9, 2) > 0)
    with pytest.raises(UserError, match="half the tile, 2"):
        decode_tiled(lambda x: x, np.zeros((1, 8, 8, 1)), downsampling=1, tile=4, overlap=3)
