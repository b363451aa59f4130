import numpy as np
import pytest
from sklearn.datasets import load_digits

from dydilit_jax.data.sources import SOURCES, load_source
from dydilit_jax.errors import UserError


def test_digits_are_scikit_learns():
    source = load_source("digits")
    assert len(source) == 1797
    assert source.image_shape == (8, 8, 1)
    assert list(source.label_names) == [str(i) for i in range(10)]
    data = load_digits()
    for index in (0, 1, 1796):
        example = source[index]
        assert example["image"].dtype == np.float32
        assert example["label"].dtype == np.int32
        assert example["label"] == data.target[index]
        # 0 to 16 become -1 to 1.
        np.testing.assert_allclose(8 * (example["image"][..., 0] + 1), data.images[index])
    values = np.stack([source[i]["image"] for i in range(len(source))])
    assert (values.min(), values.max()) == (-1.0, 1.0)
    assert len(np.unique(values)) == 17


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_keeps_its_promises(name):
    source = load_source(name)
    labels = {int(source[i]["label"]) for i in range(len(source))}
    assert labels == set(range(len(source.label_names)))
    assert source[0]["image"].shape == source.image_shape
    assert np.all(np.abs(source[0]["image"]) <= 1.0)


def test_an_unknown_source_lists_the_known():
    with pytest.raises(UserError, match=r"unknown data source 'digitz'.*'digits'.*Known: digits"):
        load_source("digitz")
