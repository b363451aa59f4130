"""Digits, data sets in tfds's layout, folders of images; and what is wrong with them."""

import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dydilit_jax.config import Config, DataConfig
from dydilit_jax.data import records
from dydilit_jax.data.classes import read_labels
from dydilit_jax.data.load import label_names, load_images, load_source
from dydilit_jax.errors import UserError
from tests.data.pictures import NAMES, encoded, examples, images_of, picture, write_data_set
from tests.tiny import ROOT, tiny_config


def test_digits_are_scikit_learns():
    source = load_source(tiny_config())
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


def test_records_are_what_tfds_reads(data_dir):
    import tensorflow_datasets as tfds

    reference = tfds.builder_from_directory(data_dir / "pets" / "1.0.0").as_data_source("train")
    source = load_images(DataConfig(source="pets", data_dir=str(data_dir)), image_size=12)
    assert len(source) == len(reference) == 23
    assert source.label_names == NAMES
    assert source.image_shape == (12, 12, 3)
    for i in range(23):
        # As high as the crop, and wider by an even or odd number of columns.
        image = reference[i]["image"]
        left = (image.shape[1] - 12) // 2
        expected = image[:, left : left + 12] / 127.5 - 1
        np.testing.assert_allclose(source[i]["image"], expected, atol=1e-6)
        assert source[i]["label"] == reference[i]["label"] == i % 3
        assert source[i]["image"].dtype == np.float32
        assert source[i]["label"].dtype == np.int32
    np.testing.assert_array_equal(read_labels(source), np.arange(23) % 3)


@pytest.mark.parametrize(
    ("split", "first", "count"), [("test", 23, 4), ("train[10:14]", 10, 4), ("train+test", 0, 27)]
)
def test_splits_are_tfdss(data_dir, split, first, count):
    source = images_of(data_dir, split=split)
    assert [int(source[i]["label"]) for i in range(len(source))] == [
        i % 3 for i in range(first, first + count)
    ]


def test_a_record_is_named_by_its_place(data_dir):
    source = images_of(data_dir, split="train[10:14]")
    assert source.name(0).startswith("record 10 of '")
    assert source.name(1).endswith("pets-train.array_record-00000-of-00002'")
    assert source.name(2).startswith("record 0 of '")
    assert source.name(2).endswith("pets-train.array_record-00001-of-00002'")


def test_grey_levels_where_the_network_has_one_channel(data_dir):
    source = load_images(
        DataConfig(source="pets", data_dir=str(data_dir)), image_size=6, channels=1
    )
    assert source[0]["image"].shape == source.image_shape == (6, 6, 1)
    with pytest.raises(UserError, match=r"images have 1 or 3 channels, model.channels is 4"):
        load_images(DataConfig(source="pets", data_dir=str(data_dir)), image_size=6, channels=4)


def test_the_newest_version_is_read_or_the_named_one(tmp_path):
    for version, count in [("1.9.0", 2), ("1.10.0", 3)]:
        write_data_set(tmp_path, "pets", {"train": [examples(count)]}, version=version)
    assert len(images_of(tmp_path)) == 3
    assert len(images_of(tmp_path, "pets:1.9.0")) == 2
    with pytest.raises(UserError, match=r"'pets' version 2.0.0 is not in .*tfds build pets"):
        images_of(tmp_path, "pets:2.0.0")


def test_classes_without_names_are_numbered(tmp_path):
    write_data_set(tmp_path, "pets", {"train": [examples(3)]}, names=None)
    assert images_of(tmp_path).label_names == ("0", "1", "2")


def test_reading_needs_no_tensorflow(data_dir):
    code = (
        "import sys; from tests.data.pictures import images_of; "
        f"source = images_of({str(data_dir)!r}); source[0]; source.read_labels(); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_data_set_that_is_not_there_says_how_to_prepare_it(data_dir, monkeypatch):
    with pytest.raises(UserError, match=r"is not in .*did you mean 'pets'") as error:
        images_of(data_dir, "pest")
    command = f"tfds build pest --file_format=array_record --data_dir={data_dir}"
    assert command in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load_images(DataConfig(source="pets"), image_size=8)) == 23
    with pytest.raises(UserError, match="'tfds build mnist --file_format=array_record'"):
        load_images(DataConfig(source="mnist"), image_size=8)


def test_another_file_format_is_refused(tmp_path):
    folder = write_data_set(tmp_path, "pets", {"train": [examples(3)]})
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match=r"is stored as tfrecord: prepare it in another folder"):
        images_of(tmp_path)


def test_unknown_and_empty_splits_are_refused(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"'pets' has no split 'val' .*Known: test, train"):
        images_of(data_dir, split="val")
    with pytest.raises(UserError, match=r"has no split 'train\[:' "):
        images_of(data_dir, split="train[:")
    with pytest.raises(UserError, match=r"split 'train\[:0\]' of data set 'pets' is empty"):
        images_of(data_dir, split="train[:0]")
    write_data_set(tmp_path, "pets", {"train": [[]], "test": [examples(1)]})
    with pytest.raises(UserError, match="split 'train' of data set 'pets' is empty"):
        images_of(tmp_path)


@pytest.mark.parametrize("keep", [0, 1000, 0.5, -100])
def test_a_truncated_shard_is_found_before_training(data_dir, tmp_path, keep):
    shutil.copytree(data_dir / "pets", tmp_path / "pets")
    shard = tmp_path / "pets" / "1.0.0" / "pets-train.array_record-00001-of-00002"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
    message = r"00001-of-00002' has 0 records instead of 11: it is truncated"
    with pytest.raises(UserError, match=message):
        images_of(tmp_path)
    # What does not touch that shard is not concerned.
    assert len(images_of(tmp_path, split="test")) == 4
    shard.unlink()
    with pytest.raises(UserError, match="00001-of-00002' is missing; copy"):
        images_of(tmp_path)


def test_labels_outside_the_range_and_damaged_images_are_named(tmp_path):
    good = examples(3)
    bad = [(good[0][0], 7), (good[1][0][:200], 1), (b"junk", 0)]
    write_data_set(tmp_path, "pets", {"train": [good + bad]})
    source = images_of(tmp_path)
    messages = [r"label 7 is outside 0 to 2", r"a damaged image", r"4 bytes that are no image"]
    for i, message in enumerate(messages, 3):
        with pytest.raises(UserError, match=rf"record {i} of '.*00000-of-00001': {message}"):
            source[i]


def test_a_record_with_flipped_bits_is_named(data_dir, tmp_path):
    shutil.copytree(data_dir / "pets", tmp_path / "pets")
    shard = tmp_path / "pets" / "1.0.0" / "pets-train.array_record-00000-of-00002"
    data = bytearray(shard.read_bytes())
    place = data.find(b"JFIF", data.find(b"JFIF") + 1)
    data[place + 50 : place + 60] = bytes(10)
    shard.write_bytes(data)
    source = images_of(tmp_path)
    errors = {}
    for i in range(len(source)):
        try:
            source[i]
        except UserError as error:
            errors[i] = str(error)
    ((index, message),) = errors.items()
    assert f"record {index} of '{shard}': a damaged record (" in message
    assert "\n" not in message
    labels = np.arange(23) % 3
    labels[index] = -1
    np.testing.assert_array_equal(source.read_labels(), labels)


def test_labels_are_read_once(data_dir, monkeypatch):
    source = images_of(data_dir, split="train[:20]")
    expected = source.read_labels()
    monkeypatch.setattr(records.RecordSource, "read", None)
    np.testing.assert_array_equal(images_of(data_dir, split="train[:20]").read_labels(), expected)


@pytest.fixture
def folder(tmp_path):
    for i, path in enumerate(["b/1.png", "b/2.JPG", "a/deep/down/3.webp", "c/4.jpeg", "a/5.png"]):
        file = tmp_path / "train" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        form = {".png": "PNG", ".webp": "WEBP"}.get(file.suffix, "JPEG")
        file.write_bytes(encoded(picture(20, 16 + i, i), form))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "val" / "a").mkdir(parents=True)
    return tmp_path


def test_a_folder_of_images(folder):
    source = images_of(folder, "folder")
    assert source.label_names == ("a", "b", "c")
    labels = [int(source[i]["label"]) for i in range(len(source))]
    assert labels == [0, 0, 1, 1, 2]
    assert list(source.read_labels()) == labels
    names = [source.name(i).removeprefix(f"{folder}/train/") for i in range(5)]
    assert names == ["a/5.png", "a/deep/down/3.webp", "b/1.png", "b/2.JPG", "c/4.jpeg"]
    # The images are those of the files: number 4 is 20 x 20, and lossless.
    exact = load_images(DataConfig(source="folder", data_dir=str(folder)), image_size=20)
    expected = np.asarray(picture(20, 20, 4)) / 127.5 - 1
    np.testing.assert_allclose(exact[0]["image"], expected, atol=1e-6)
    # The folder itself, where it has no folder of the split.
    assert len(images_of(folder / "train", "folder")) == 5


def test_folders_that_do_not_fit_are_refused(folder, tmp_path):
    for root, split, message in [
        ("", "train", "needs data.data_dir"),
        (tmp_path / "none", "train", "is no folder: expected CLASS/IMAGE files"),
        (folder, "test", r"has no folder 'test' \(data.split\)"),
        (folder, "val", "val' holds no images"),
    ]:
        with pytest.raises(UserError, match=message):
            images_of(root, "folder", split=split)
    source = images_of(folder, "folder")
    (folder / "train" / "b" / "1.png").unlink()
    with pytest.raises(UserError, match=r"train/b/1.png: No such file"):
        source[2]


def test_a_network_that_does_not_fit_the_images_is_refused(data_dir):
    model = {"image_size": 8, "channels": 3, "num_classes": 3}
    data: dict[str, Any] = {"source": "pets", "data_dir": str(data_dir)}
    fitting = tiny_config(model=model, data=data)
    assert len(load_source(fitting)) == 23
    assert label_names(fitting) == list(NAMES)
    base: dict[str, Any] = {"model": model, "data": data}
    for fields, message in [
        ({"model": model | {"num_classes": 4}}, r"'pets' has 3 classes, model.num_classes is 4"),
        ({"data": data | {"image_size": 12}}, r"images \(12, 12, 3\), the network expects \(8, 8"),
        ({"data": {"source": "digits"}}, r"'digits' has images \(8, 8, 1\)"),
    ]:
        with pytest.raises(UserError, match=message):
            load_source(Config.from_dict(base | fields))


def test_without_the_data_labels_are_numbers(tmp_path):
    config = tiny_config(data={"source": "pets", "data_dir": str(tmp_path)})
    assert label_names(config) == [str(i) for i in range(10)]
