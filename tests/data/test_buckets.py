"""Data in a bucket are read as local data are, from a server with Google Cloud Storage's API."""

import shutil
import sys
import uuid

import numpy as np
import pytest
from PIL import Image

from dydilit_jax.config import DataConfig
from dydilit_jax.data import buckets
from dydilit_jax.data.classes import read_class_list
from dydilit_jax.data.latents import LatentSource
from dydilit_jax.data.load import load_images
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.errors import UserError
from tests.data.gcs_server import emulator, make_bucket, upload
from tests.data.pictures import NAMES, encoded, images_of, picture, write_data_set
from tests.data.test_latents import write as write_latents


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gcsfs")
    with emulator() as address:
        buckets._filesystem.cache_clear()
        yield address
    buckets._filesystem.cache_clear()


@pytest.fixture
def bucket(server):
    """Uploads a folder to a bucket of the test's own; returns its gs:// path."""
    name = f"bucket-{uuid.uuid4().hex}"
    make_bucket(server, name)

    def put(folder, prefix="data"):
        upload(server, name, folder, prefix)
        return f"gs://{name}/{prefix}"

    return put


def noisy(count):
    """Pairs of an image and a label; each too large for one read ahead to hold the next ones."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 120, 130, 3), np.uint8)
    return [(encoded(Image.fromarray(each), "PNG"), i % 3) for i, each in enumerate(pixels)]


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Data set `noise`: 23 images of 47 kB in two shards, several MB."""
    root = tmp_path_factory.mktemp("noise")
    shards = noisy(23)
    write_data_set(root, "noise", {"train": [shards[:12], shards[12:]]})
    return root


@pytest.fixture
def no_tensorflow(monkeypatch):
    """What etils would read a bucket with, and import TensorFlow for, fails."""
    from etils.epath import backend

    monkeypatch.setattr(backend, "tf_backend", None)
    monkeypatch.setattr(backend, "fsspec_backend", None)


def test_records_are_those_of_the_local_files(noise, bucket, no_tensorflow):
    there = bucket(noise)
    local, remote = images_of(noise, "noise"), images_of(there, "noise")
    assert remote.label_names == NAMES
    assert len(remote) == 23
    for i in np.random.default_rng(1).permutation(23):
        np.testing.assert_array_equal(remote[i]["image"], local[i]["image"])
        assert remote[i]["label"] == local[i]["label"]
    assert remote.name(13) == (
        f"record 1 of '{there}/noise/1.0.0/noise-train.array_record-00001-of-00002'"
    )
    np.testing.assert_array_equal(remote.read_labels(), np.arange(23) % 3)
    # A part of a split, and the batches of several threads.
    part = {"split": "train[9:17]"}
    batches = [
        make_batches(images_of(root, "noise", **part), batch_size=4, seed=0, read_threads=4)
        for root in (noise, there)
    ]
    for _ in range(4):
        expected, found = map(next, batches)
        np.testing.assert_array_equal(found["image"], expected["image"])


def test_what_is_wrong_with_records_is_told(data_dir, tmp_path, bucket):
    there = bucket(data_dir)
    with pytest.raises(UserError, match=rf"is not in '{there}': did you mean 'pets'"):
        images_of(there, "pest")
    folder = tmp_path / "pets" / "1.0.0"
    shutil.copytree(data_dir / "pets" / "1.0.0", folder)
    shard = folder / "pets-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-100])
    damaged = bucket(tmp_path, "damaged")
    with pytest.raises(UserError, match=r"cannot read 'gs://.*00001-of-00002': \w+") as error:
        images_of(damaged)
    assert "\n" not in str(error.value)
    shard.unlink()
    missing = bucket(tmp_path, "missing")
    with pytest.raises(UserError, match=r"gs://.*00001-of-00002' is missing; copy"):
        images_of(missing)


def test_a_folder_of_images(tmp_path, bucket, no_tensorflow):
    for i, path in enumerate(["b/1.png", "b/2.png", "a/deep/3.png", "c/4.png"]):
        file = tmp_path / "train" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(20, 16 + i, i)))
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    there = bucket(tmp_path)
    local, remote = images_of(tmp_path, "folder"), images_of(there, "folder")
    assert remote.label_names == local.label_names == ("a", "b", "c")
    names = [remote.name(i).removeprefix(f"{there}/train/") for i in range(4)]
    assert names == ["a/deep/3.png", "b/1.png", "b/2.png", "c/4.png"]
    for i in range(4):
        np.testing.assert_array_equal(remote[i]["image"], local[i]["image"])
        assert remote[i]["label"] == local[i]["label"]
    with pytest.raises(UserError, match=rf"'{there}' has no folder 'test'"):
        images_of(there, "folder", split="test")
    with pytest.raises(UserError, match="is no folder: expected CLASS/IMAGE"):
        images_of(f"{there}/none", "folder")
    # A file that vanished is an example that cannot be read, as on a disk.
    remote._files = np.asarray([b"a/deep/gone.png"])
    with pytest.raises(UserError, match=r"train/a/deep/gone.png: No such file"):
        remote[0]


def test_latents(tmp_path, bucket):
    write_latents(tmp_path / "latents")
    there = bucket(tmp_path / "latents")
    local, remote = LatentSource(tmp_path / "latents", flip=True), LatentSource(there, flip=True)
    assert remote.manifest == local.manifest
    for i in (9, 0, 4, 3):
        expected, found = (each.draw(i, seed=0, epoch=0) for each in (local, remote))
        np.testing.assert_array_equal(found["image"], expected["image"])
    remote.verify()
    shard = tmp_path / "latents" / local.manifest.shards[1].file
    data = shard.read_bytes()
    for content, message in [(data[:-1], "it is truncated"), (bytes(len(data)), "cannot read")]:
        shard.write_bytes(content)
        changed = bucket(tmp_path / "latents", f"of-{len(content)}")
        with pytest.raises(UserError, match=message):
            LatentSource(changed)[4]
    with pytest.raises(UserError, match=r"'gs://.*/none' holds no latents"):
        LatentSource(f"{there}/none")


def test_a_list_of_classes(tmp_path, bucket, data_dir):
    (tmp_path / "mine.txt").write_text("eel\ncat\n")
    there = bucket(tmp_path)
    assert read_class_list(f"{there}/mine.txt") == ("eel", "cat")
    config = DataConfig(source="pets", data_dir=str(data_dir), classes=f"{there}/mine.txt")
    assert load_images(config, image_size=8).label_names == ("eel", "cat")
    with pytest.raises(
        UserError, match=r"cannot read data.classes 'gs://.*none.txt': No such file"
    ):
        read_class_list(f"{there}/none.txt")


def test_a_bucket_that_does_not_answer_is_told(server, monkeypatch):
    from gcsfs.retry import HttpError

    def refuse(*args, **kwargs):
        raise HttpError({"code": 403, "message": "no permission"})

    monkeypatch.setattr(buckets._filesystem(), "isdir", refuse)
    for source in ("pets", "folder"):
        with pytest.raises(UserError, match=r"cannot read 'gs://secret.*': no permission"):
            images_of("gs://secret/data", source)


def test_records_without_credentials_are_refused_at_once(data_dir, bucket, monkeypatch):
    from google.auth.exceptions import DefaultCredentialsError

    there = bucket(data_dir)
    monkeypatch.delenv(buckets.EMULATOR)

    def nothing():
        raise DefaultCredentialsError("none")

    monkeypatch.setattr("google.auth.default", nothing)
    with pytest.raises(UserError, match="'gcloud auth application-default login'"):
        images_of(there)
    buckets.check_credentials(data_dir)  # local files need none


def test_without_gcsfs_the_line_says_what_to_do(monkeypatch):
    buckets._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    for read in (
        lambda: images_of("gs://bucket/data"),
        lambda: images_of("gs://bucket/data", "folder"),
        lambda: LatentSource("gs://bucket/latents"),
        lambda: read_class_list("gs://bucket/mine.txt"),
    ):
        with pytest.raises(
            UserError, match="'pip install gcsfs', or mount the bucket with gcsfuse"
        ):
            read()


def test_other_schemes_are_refused():
    with pytest.raises(UserError, match="'s3://bucket/data' cannot be read"):
        images_of("s3://bucket/data", "folder")
