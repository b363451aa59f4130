"""DINOv2 against transformers' on the same random weights (make_dinov2_fixtures.py)."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics import dinov2_weights
from dydilit_jax.metrics.dinov2 import VARIANTS, Dinov2Config, Dinov2Extractor, prepare
from dydilit_jax.metrics.dinov2_weights import KNOWN, config_from, filled, load_dinov2
from dydilit_jax.metrics.extractors import load_extractor
from dydilit_jax.metrics.features import compile_extractor
from dydilit_jax.metrics.resizing import resize_levels
from dydilit_jax.models.pretrained.files import read_config, read_tensors
from tests.tiny import mesh_of

FOLDER = Path(__file__).parent / "fixtures" / "dinov2"
SIZES = {"same": (70, 70), "smaller": (42, 42), "oblong": (98, 56)}


@pytest.fixture(scope="module")
def plain():
    with np.load(FOLDER / "plain" / "io.npz") as file:
        return dict(file)


def network(name):
    file = FOLDER / name / "model.safetensors"
    return filled(read_tensors(file), config_from(read_config(file), name))


@pytest.mark.parametrize("name", ["plain", "swiglu", "registers"])
def test_features_are_transformers(plain, name):
    ours = network(name)
    with np.load(FOLDER / name / "io.npz") as theirs:
        for size, (height, width) in SIZES.items():
            images = plain["images"][:, :height, :width].astype(np.float32)
            np.testing.assert_allclose(ours(images), theirs[size], atol=1e-4, err_msg=size)


def test_positions_of_torch_hub_are_shifted(plain):
    images = plain["images"][:, :42, :42].astype(np.float32)
    ours = network("plain")(images, VARIANTS["dgm_eval"])
    np.testing.assert_allclose(ours, plain["hub"], atol=1e-4)
    # The fixture tells the two apart.
    assert np.abs(plain["hub"] - plain["smaller"]).max() > 1e-3


@pytest.mark.parametrize("size", [224, 30])
def test_levels_are_resized_as_pillow_does(plain, size):
    ours = resize_levels(jnp.asarray(plain["pictures"], jnp.float32), size)
    assert ours.shape == (2, size, size, 3)
    difference = np.abs(np.asarray(ours)[:, ::5, ::3] - plain[f"resized/{size}"])
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 0.01


def test_extractor_over_devices(plain):
    """Each of two devices takes one image; resized and normalised before the network."""
    extractor = load_extractor("dinov2", str(FOLDER / "plain"), variant="transformers")
    assert (extractor.name, extractor.width, extractor.spatial_width) == ("dinov2", 16, 0)
    features = compile_extractor(extractor, mesh_of(2))(plain["pictures"])
    assert [shard.data.shape for shard in features.pool.addressable_shards] == [(1, 16)] * 2
    levels = np.asarray(resize_levels(jnp.asarray(plain["pictures"], jnp.float32), 224))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    images = ((levels / 255 - mean) / deviation).astype(np.float32)
    np.testing.assert_allclose(
        prepare(jnp.asarray(plain["pictures"], jnp.float32)), images, atol=1e-5
    )
    np.testing.assert_allclose(features.pool, jax.jit(network("plain"))(images), atol=1e-4)
    assert "positions as transformers" in extractor.description


PUBLISHED = {
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "giant": (1536, 40, 24, 4096),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name):
    """Sizes of the four networks; g's gated layer is 2/3 of 4 widths."""
    width, depth, heads, hidden = PUBLISHED[name]
    fields = {
        "model_type": "dinov2",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "mlp_ratio": 4,
        "image_size": 518,
        "use_swiglu_ffn": name == "giant",
    }
    swiglu = name == "giant"
    assert config_from(fields, name) == Dinov2Config(
        width=width, depth=depth, heads=heads, hidden=hidden, swiglu=swiglu, patch_size=14, grid=37
    )
    assert KNOWN[f"dinov2-{name}"].repo == f"facebook/dinov2-{name}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layernorm.bias"), r"lacks layernorm\.bias: expected"),
        (lambda t: t.update(head=np.zeros(2)), "has too much: head"),
        (
            lambda t: t.update({"encoder.layer.1.mlp.fc1.weight": np.zeros((8, 16))}),
            r"has encoder\.layer\.1\.mlp\.fc1\.weight \(8, 16\) for \(32, 16\)",
        ),
    ],
)
def test_other_tensors_are_refused(change, message):
    file = FOLDER / "plain" / "model.safetensors"
    tensors = read_tensors(file)
    change(tensors)
    with pytest.raises(UserError, match=message):
        filled(tensors, config_from(read_config(file), "plain"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "has no config.json"),
        ({"model_type": "vit"}, r"model_type 'vit', expected one of dinov2, dinov2_with_registers"),
        ({"model_type": "dinov2", "hidden_act": "relu"}, "hidden_act 'relu', expected 'gelu'"),
        ({"model_type": "dinov2", "patch_size": [14, 14]}, "a size that is no number"),
        ({"model_type": "dinov2", "num_attention_heads": 7}, "sizes that make no network"),
        ({"model_type": "dinov2", "patch_size": 0}, "sizes that make no network"),
    ],
)
def test_other_configs_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        config_from(fields, "'folder'")


def test_weights_are_located(tmp_path, monkeypatch):
    copied = tmp_path / "copied"
    shutil.copytree(FOLDER / "plain", copied)
    with pytest.raises(UserError, match="has the checksum"):
        load_dinov2(str(copied), sha256="0" * 64)
    with pytest.raises(UserError, match=r"no such file or folder.*did you mean 'dinov2-large'"):
        load_dinov2("dinov2-lage")
    with pytest.raises(UserError, match="unknown variant 'adm'"):
        load_extractor("dinov2", str(copied), variant="adm")
    asked = []

    def fetched(known, revision):
        asked.append((known.repo, revision))
        return copied / "model.safetensors"

    monkeypatch.setattr(dinov2_weights, "fetch", fetched)
    with pytest.raises(UserError, match=f"expected {KNOWN['dinov2-large'].sha256}"):
        load_dinov2()
    assert asked == [("facebook/dinov2-large", KNOWN["dinov2-large"].revision)]
    assert isinstance(load_dinov2("dinov2-with-registers-large"), Dinov2Extractor)
    fields = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(fields | {"hidden_size": 32}))
    with pytest.raises(UserError, match=r"expected what its config\.json says"):
        load_dinov2(str(copied))
