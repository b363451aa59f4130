"""The Inception network against pytorch-fid's and torch-fidelity's on the same random weights.

The fixtures are of tests/fixtures/make_inception_fixtures.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics import resizing
from dydilit_jax.metrics.features import Features, compile_extractor, to_levels
from dydilit_jax.metrics.inception import InceptionExtractor
from dydilit_jax.metrics.inception_weights import filled
from tests.metrics.weights import INCEPTION, inception_tensors
from tests.tiny import mesh_of


@pytest.fixture(scope="module")
def theirs():
    with np.load(INCEPTION) as file:
        return dict(file)


@pytest.fixture(scope="module")
def tensors():
    return inception_tensors()


@pytest.fixture(scope="module")
def features(tensors, theirs):
    """Of each variant, computed over two devices."""
    mesh = mesh_of(2)
    network = filled(tensors)
    return {
        variant: compile_extractor(InceptionExtractor(network, "", variant), mesh)(theirs["images"])
        for variant in ("adm", "pytorch_fid")
    }


def check(ours, theirs):
    assert ours.shape == theirs.shape
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("variant", ["adm", "pytorch_fid"])
@pytest.mark.parametrize("part", ["pool", "spatial", "logits"])
def test_features(features, theirs, variant, part):
    name = f"{variant}_{part}"
    if name in theirs:
        check(getattr(features[variant], part), theirs[name])


def test_the_fixture_tells_variants_images_and_channels_apart(theirs):
    """So that the comparison above could fail."""
    adm, other = theirs["adm_pool"], theirs["pytorch_fid_pool"]
    scale = np.abs(adm).max()
    assert np.abs(adm - other).max() > 1e-2 * scale
    assert np.abs(adm[0] - adm[1]).max() > 1e-2 * scale
    spatial = theirs["adm_spatial"].reshape(2, 17, 17, 7)
    assert np.abs(spatial - spatial.transpose(0, 2, 1, 3)).max() > 1e-2 * np.abs(spatial).max()


def test_features_lie_over_the_devices(features):
    pool = features["adm"].pool
    assert [shard.data.shape for shard in pool.addressable_shards] == [(1, 2048)] * 2


@pytest.mark.parametrize("name", ["tf1", "half_pixel", "cubic"])
@pytest.mark.parametrize("size", [26, 31, 32, 64, 400, 512])
def test_resizing(theirs, name, size):
    matrix = getattr(resizing, name)(size, 299).astype(np.float64)
    columns = np.arange(size)
    vectors = np.stack([np.cos(0.7 * columns), columns % 5 == 2])
    # PyTorch's bicubic weights are computed in float32, ours in float64.
    atol = 3e-5 if name == "cubic" else 3e-6
    np.testing.assert_allclose(vectors @ matrix.T, theirs[f"{name}/{size}/299"], atol=atol)


def test_resizing_is_by_rows_and_columns():
    images = np.random.default_rng(0).uniform(0, 255, (2, 5, 7, 3)).astype(np.float32)
    ours = resizing.resize(jnp.asarray(images), 11, resizing.tf1)
    rows, columns = resizing.tf1(5, 11), resizing.tf1(7, 11)
    for i in (0, 3, 10):
        for j in (0, 4, 10):
            wanted = rows[i] @ images[1, :, :, 2] @ columns[j]
            assert float(ours[1, i, j, 2]) == pytest.approx(float(wanted), rel=1e-6)


def test_levels_are_those_of_the_png():
    from dydilit_jax.drawing import to_uint8

    values = np.linspace(-1.2, 1.2, 3000, dtype=np.float32).reshape(1, 50, 60, 1)
    levels = jax.jit(to_levels)(values)
    assert levels.shape == (1, 50, 60, 3)
    wanted = to_uint8(values)
    # A value half between two levels may go to either.
    assert np.abs(np.asarray(levels)[..., 1] - wanted[..., 0]).max() <= 1
    assert np.mean(np.asarray(levels)[..., 1] != wanted[..., 0]) < 0.01
    np.testing.assert_array_equal(to_levels(jnp.asarray(wanted))[..., 0], wanted[..., 0])
    with pytest.raises(ValueError, match="uint8 or floating, got int32"):
        to_levels(jnp.zeros((1, 2, 2, 3), jnp.int32))
    with pytest.raises(ValueError, match="1 or 3"):
        to_levels(jnp.zeros((1, 2, 2, 4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), r"lacks fc\.bias"),
        (lambda t: t.update(extra=np.zeros(2)), "has too much: extra"),
        (
            lambda t: t.update({"fc.weight": np.zeros((1000, 2048))}),
            r"has fc.weight \(1000, 2048\) for \(1008, 2048\)",
        ),
    ],
)
def test_other_networks_are_refused(tensors, change, message):
    changed = dict(tensors)
    change(changed)
    with pytest.raises(UserError, match=message):
        filled(changed)


def test_an_unknown_variant_is_named(features):
    assert isinstance(features["adm"], Features)
    with pytest.raises(UserError, match=r"unknown variant 'amd'.*did you mean 'adm'"):
        InceptionExtractor(None, "", "amd")  # type: ignore[arg-type]
