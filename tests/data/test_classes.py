"""Some of the classes, from a file."""

import numpy as np
import pytest

from dydilit_jax.config import DataConfig
from dydilit_jax.data.classes import ClassSubset, read_class_list, read_labels
from dydilit_jax.data.load import load_images
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.data.sources import digits
from dydilit_jax.errors import UserError
from tests.data.pictures import images_of
from tests.tiny import ROOT


def write(tmp_path, text):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    return str(path)


def test_a_list_of_classes(tmp_path):
    path = write(tmp_path, "# pets\neel  # a fish\n\n  cat\n")
    assert read_class_list(path) == ("eel", "cat")


def test_a_subset_has_those_classes_in_that_order(data_dir, tmp_path):
    everything = images_of(data_dir)
    source = images_of(data_dir, classes=write(tmp_path, "eel\ncat\n"))
    kept = [i for i in range(23) if i % 3 != 1]
    assert source.label_names == ("eel", "cat")
    assert source.image_shape == everything.image_shape
    assert len(source) == len(kept)
    for place, index in enumerate(kept):
        np.testing.assert_array_equal(source[place]["image"], everything[index]["image"])
        assert source[place]["label"] == {2: 0, 0: 1}[index % 3]
    batch = next(make_batches(source, batch_size=len(kept), seed=0))
    assert sorted(batch["label"]) == [0] * 7 + [1] * 8


def test_all_classes_in_their_own_order_are_the_source_itself(data_dir, tmp_path):
    source = images_of(data_dir, classes=write(tmp_path, "cat\ndog\neel"))
    assert not isinstance(source, ClassSubset)


def test_classes_of_a_source_in_memory(tmp_path):
    path = write(tmp_path, "7\n3")
    source = load_images(DataConfig(source="digits", classes=path), image_size=8)
    labels = digits().labels
    assert len(source) == np.sum((labels == 7) | (labels == 3))
    np.testing.assert_array_equal(
        read_labels(source), np.where(labels[np.isin(labels, [3, 7])] == 7, 0, 1)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no class"),
        ("# nothing", "names no class"),
        ("cat\neel\ncat", "names 'cat' twice"),
        ("cat\ncta", r"names 'cta', which the data set has not: did you mean 'cat'\?"),
        ("xyz\nuvw", r"names 'xyz' and 1 more, which the data set has not: it has cat, dog, eel"),
    ],
)
def test_lists_that_do_not_fit_are_refused(data_dir, tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        images_of(data_dir, classes=write(tmp_path, text))
    assert "\n" not in str(error.value)


def test_a_list_that_is_not_there_is_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"cannot read data.classes .*: No such file"):
        images_of(data_dir, classes=str(tmp_path / "none.txt"))


def test_classes_without_examples_are_refused(data_dir, tmp_path):
    path = write(tmp_path, "dog")
    with pytest.raises(UserError, match="has no example of the classes"):
        images_of(data_dir, split="train[0:1]", classes=path)


def test_imagenet_100_is_a_hundred_wordnet_ids():
    names = read_class_list(str(ROOT / "configs" / "imagenet100.txt"))
    assert len(names) == 100
    assert list(names) == sorted(names)
    assert all(name[0] == "n" and len(name) == 9 and name[1:].isdigit() for name in names)
