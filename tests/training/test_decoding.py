"""The network's latents as images."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dydilit_jax.autoencoders import abstract_autoencoder
from dydilit_jax.config import AutoencoderConfig
from dydilit_jax.errors import UserError
from dydilit_jax.training import decoding
from dydilit_jax.training.decoding import make_decoder
from tests.autoencoders.test_diffusers import FIXTURES, arrays_of


def test_latents_become_the_images_that_diffusers_decodes(monkeypatch):
    """The network's latents are scaled; five of them over two devices, two at once."""
    monkeypatch.setattr(decoding, "DECODED_AT_ONCE", 1)
    expected = arrays_of("kl")
    decode = make_decoder(AutoencoderConfig(weights=str(FIXTURES / "kl")), jax.devices()[:2])
    which = [0, 1, 1, 0, 1]
    images = decode(0.18215 * expected["latents"][which])
    np.testing.assert_allclose(images, expected["decoded"][which], rtol=0, atol=1e-4)


def test_a_host_of_several_decodes_by_a_program_on_each_device(monkeypatch):
    """Five latents on three devices, one at once: two rounds, the second of two devices."""
    monkeypatch.setattr(decoding, "DECODED_AT_ONCE", 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    devices = jax.devices()[1:4]
    shapes = []
    jit_decoder = decoding.jit_decoder

    def watched(graph):
        decode = jit_decoder(graph)

        def call(weights, latents):
            shapes.append((latents.shape[0], latents.devices()))
            return decode(weights, latents)

        return call

    monkeypatch.setattr(decoding, "jit_decoder", watched)
    expected = arrays_of("kl")
    decode = make_decoder(AutoencoderConfig(weights=str(FIXTURES / "kl")), devices)
    which = [0, 1, 1, 0, 1]
    images = decode(0.18215 * expected["latents"][which])
    np.testing.assert_allclose(images, expected["decoded"][which], rtol=0, atol=1e-4)
    assert shapes == [(1, {devices[i]}) for i in (0, 1, 2, 0, 1)]


def test_pixels_stay_pixels():
    images = np.ones((2, 8, 8, 1), np.float32)
    assert make_decoder(AutoencoderConfig())(images) is images


def test_a_scaling_factor_of_another_autoencoder_is_refused():
    config = AutoencoderConfig(weights=str(FIXTURES / "kl"), scaling_factor=0.41407)
    with pytest.raises(UserError, match=r"0\.41407 does not belong"):
        make_decoder(config)


def test_sizes_are_known_without_the_weights():
    """A published one by its name, with Stable Diffusion's number of parameters; a folder's."""

    def parameters(weights):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract_autoencoder(weights))))

    assert parameters("stabilityai/sd-vae-ft-mse") == 83_653_863
    folder = FIXTURES / "kl"
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert parameters(str(folder)) == sum(tensor.size for tensor in tensors.values())
    with pytest.raises(UserError, match="did you mean 'sd-vae-ft-mse'"):
        abstract_autoencoder("sd-vae-ft-mze")
