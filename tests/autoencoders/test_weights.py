"""Finding, checking and refusing weights."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dydilit_jax.autoencoders import load_autoencoder, save_autoencoder
from dydilit_jax.autoencoders import weights as module
from dydilit_jax.autoencoders.dc import DCConfig
from dydilit_jax.autoencoders.kl import KLConfig
from dydilit_jax.autoencoders.layout import abstract, config_fields, parse_config, their_name
from dydilit_jax.autoencoders.weights import KNOWN, identity, locate, sha256_of
from dydilit_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A copy of the small fixture that a test may spoil."""
    shutil.copytree(FIXTURES / "dc_shuffle", tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def known(monkeypatch):
    """The fixture as if its file were published weights."""
    entry = dataclasses.replace(
        KNOWN["sd-vae-ft-ema"],
        sha256=sha256_of(FIXTURES / "dc_shuffle" / WEIGHTS),
        scaling_factor=1.0,
    )
    monkeypatch.setitem(module.KNOWN, "sd-vae-ft-ema", entry)


def refused(path, *parts, **options):
    with pytest.raises(UserError) as error:
        load_autoencoder(str(path), **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_published_sizes_are_those_of_the_published_networks():
    """Parameter counts of sd-vae-ft-* and dc-ae-f32c32-sana-1.0, as their files' sizes say."""

    def count(config):
        leaves = nnx.to_flat_state(nnx.state(abstract(config, jnp.dtype("float32"))))
        return sum(int(np.prod(leaf.shape)) for _, leaf in leaves)

    assert count(KLConfig()) == 83_653_863  # 334,643,276 bytes of float32 and a header
    assert count(DCConfig()) == 312_250_275


def test_names_are_diffusers_own():
    state = nnx.to_flat_state(nnx.state(abstract(KLConfig(), jnp.dtype("float32"))))
    names = {their_name(path) for path, _ in state}
    assert "decoder.up_blocks.2.resnets.0.conv_shortcut.weight" in names
    assert "encoder.down_blocks.0.downsamplers.0.conv.bias" in names
    assert "encoder.mid_block.attentions.0.to_out.0.weight" in names


def test_config_survives_its_json():
    for config in (
        KLConfig(block_out_channels=(32, 64), layers_per_block=1),
        DCConfig(latent_channels=16, downsample_block_type="pixel_unshuffle"),
    ):
        assert parse_config(json.loads(json.dumps(config_fields(config))), "here") == config


def test_what_is_saved_is_what_diffusers_saved(tmp_path):
    """The file of weights has the same tensors; they were rounded to half precision there."""
    save_autoencoder(tmp_path / "kl", load_autoencoder(str(FIXTURES / "kl")).autoencoder)
    ours, theirs = load_file(tmp_path / "kl" / WEIGHTS), load_file(FIXTURES / "kl" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor.astype(np.float32), err_msg=name)
    fields = [json.loads((f / "kl" / "config.json").read_text()) for f in (tmp_path, FIXTURES)]
    assert fields[0].items() <= fields[1].items()
    with pytest.raises(UserError, match="is not empty"):
        save_autoencoder(tmp_path / "kl", load_autoencoder(str(FIXTURES / "kl")).autoencoder)


def test_a_pipelines_folder_is_entered(folder, tmp_path):
    (tmp_path / "pipeline").mkdir()
    folder.rename(tmp_path / "pipeline" / "vae")
    assert load_autoencoder(str(tmp_path / "pipeline")).autoencoder.downsampling == 2


def test_missing_weights_are_told(tmp_path, folder):
    refused(tmp_path / "nowhere", "no such file or folder", "sd-vae-ft-ema")
    refused("sd-vae-ft-emma", "did you mean 'sd-vae-ft-ema'")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / WEIGHTS).unlink()
    refused(folder, "holds no weights")


def test_truncated_and_other_tensors_are_named(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    refused(folder, "is truncated")
    (folder / WEIGHTS).write_bytes(data)
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {key: v for key, v in tensors.items() if key != "decoder.conv_in.bias"}, folder / WEIGHTS
    )
    refused(folder, "missing decoder.conv_in.bias")
    save_file(tensors | {"quant_conv.weight": np.zeros(3, np.float32)}, folder / WEIGHTS)
    refused(folder, "surplus quant_conv.weight")
    save_file(tensors | {"encoder.conv_in.bias": np.zeros(5, np.float32)}, folder / WEIGHTS)
    refused(folder, "encoder.conv_in.bias (5,) (expected (8,))")


def test_unsupported_configs_are_refused(folder):
    for fields, part in (
        ({"_class_name": "VQModel"}, "'VQModel'"),
        ({"decoder_norm_types": ["rms_norm", "batch_norm"]}, "decoder_norm_types"),
        ({"encoder_layers_per_block": [0, 1]}, "without blocks"),
        ({"encoder_block_types": ["ResBlock", "ViT"]}, "'ViT'"),
        ({"decoder_conv_act_fn": "gelu"}, "'gelu'"),
        ({"latent_channels": "4"}, "latent_channels='4'"),
        ({"sparkle": 1}, "sparkle=1"),
    ):
        before = (folder / "config.json").read_text()
        change_config(folder, **fields)
        refused(folder, part)
        (folder / "config.json").write_text(before)
    with pytest.raises(UserError, match=r"shift_factor=0\.1 is not supported"):
        parse_config({"_class_name": "AutoencoderKL", "shift_factor": 0.1}, "here")
    refused(folder, "unknown dtype 'float16'", dtype="float16")


def test_the_checksum_is_checked(folder):
    digest = sha256_of(folder / WEIGHTS)
    assert load_autoencoder(str(folder), sha256=digest.upper()).weights.sha256 == digest
    wrong = KNOWN["sd-vae-ft-mse"].sha256
    refused(folder, digest, f"expected {wrong} (of sd-vae-ft-mse)", sha256=wrong)


def test_the_checksum_tells_which_weights_they_are(folder, known):
    assert load_autoencoder(str(folder)).weights.name == "sd-vae-ft-ema"
    other = folder.rename(folder.with_name("sd-vae-ft-mse"))
    refused(other, "holds sd-vae-ft-ema by its checksum", "named sd-vae-ft-mse")


def test_scaling_factors_that_do_not_belong_are_told(folder, known):
    assert load_autoencoder(str(folder), scaling_factor=1.0).autoencoder.scaling_factor == 1.0
    refused(folder, "scaling factor 0.18215 does not belong", "has 1", scaling_factor=0.18215)
    change_config(folder, scaling_factor=0.5)
    refused(folder, "is sd-vae-ft-ema, whose scaling factor is 1", "has 0.5")
    change_config(folder, scaling_factor=0.0)
    refused(folder, "is no scale")


def test_identity_needs_no_fetching(folder):
    assert identity("stabilityai/sd-vae-ft-mse") == {
        "weights_sha256": KNOWN["sd-vae-ft-mse"].sha256
    }
    assert identity("dc-ae-f32c32-sana-1.0") == {"autoencoder": "dc-ae-f32c32-sana-1.0"}
    assert identity("dc-ae-f32c32-sana-1.0", sha256="AB") == {"weights_sha256": "ab"}
    assert identity(str(folder)) == {"weights_sha256": sha256_of(folder / WEIGHTS)}


def test_without_the_hub_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("sd-vae-ft-ema", "pip install huggingface_hub", "config.json")


def test_the_hub_is_asked_for_the_pinned_revision(tmp_path, monkeypatch, known):
    """The hub's own cache, laid out by hand, and no connection."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    entry = module.KNOWN["sd-vae-ft-ema"]
    cache = tmp_path / "models--stabilityai--sd-vae-ft-ema" / "snapshots"
    shutil.copytree(FIXTURES / "dc_shuffle", cache / entry.revision)
    shutil.copytree(FIXTURES / "dc", cache / ("0" * 40))
    found = load_autoencoder("stabilityai/sd-vae-ft-ema")
    assert found.weights.path.parent == cache / entry.revision
    assert found.weights.name == "sd-vae-ft-ema"
    other = locate("sd-vae-ft-ema", revision="0" * 40)
    assert other.name == "unknown"
    refused("sd-vae-ft-ema", "expected", revision="0" * 40, sha256=entry.sha256)
    refused("sd-vae-ft-mse", "cannot fetch stabilityai/sd-vae-ft-mse at revision 31f26fd")
    shutil.copyfile(FIXTURES / "dc" / WEIGHTS, cache / entry.revision / WEIGHTS)
    refused("sd-vae-ft-ema", f"expected {entry.sha256}", "fetch it again")
