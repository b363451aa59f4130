"""Latents on disk: what is written is what is read, and what does not fit is refused."""

import dataclasses
import pickle

import numpy as np
import pytest

from dydilit_jax.autoencoders.weights import KNOWN
from dydilit_jax.config import Config
from dydilit_jax.data.encoding import finish, open_folder
from dydilit_jax.data.latents import (
    LatentRecord,
    LatentSource,
    Moments,
    decode_record,
    encode_record,
    example_rng,
    sample_latent,
    wanted_of,
    write_shard,
)
from dydilit_jax.data.manifest import MANIFEST_FILE, Manifest
from dydilit_jax.data.pipeline import make_batches
from dydilit_jax.errors import UserError

SHAPE = (3, 2, 4)
MANIFEST = Manifest(
    source="pictures",
    split="train",
    image_size=24,
    crop="center",
    flips=True,
    label_names=("cat", "dog"),
    autoencoder="sd-vae-ft-ema",
    weights_sha256="ab" * 32,
    scaling_factor=0.5,
    latent_shape=SHAPE,
    deterministic=False,
    dtype="float32",
    compute_dtype="float32",
    shard_size=4,
    examples=10,
)


def record(index, manifest=MANIFEST):
    rng = np.random.default_rng(index)

    def moments():
        mean, std = rng.standard_normal((2, *manifest.latent_shape), np.float32)
        return Moments(mean, np.zeros_like(std) if manifest.deterministic else np.abs(std))

    return LatentRecord(index, index % 2, moments(), moments() if manifest.flips else None)


def write(folder, manifest=MANIFEST, skip=()):
    open_folder(folder, manifest)
    for number in range(manifest.shard_count):
        indices = [i for i in manifest.shard_range(number) if i not in skip]
        write_shard(
            folder / manifest.shard_file(number), [record(i, manifest) for i in indices], manifest
        )
    return finish(folder, manifest)


def refused(*parts, folder, **options):
    with pytest.raises(UserError) as error:
        LatentSource(folder, **options)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_records_come_back(dtype, flips, deterministic):
    manifest = dataclasses.replace(MANIFEST, dtype=dtype, flips=flips, deterministic=deterministic)
    before = record(7, manifest)
    data = encode_record(before, manifest)
    numbers = 24 * (1 if deterministic else 2) * (2 if flips else 1)
    assert len(data) == 16 + numbers * (4 if dtype == "float32" else 2)
    after = decode_record(data, manifest)
    assert (after.index, after.label) == (7, 1)
    relative = 0 if dtype == "float32" else 2**-8
    np.testing.assert_allclose(after.moments.mean, before.moments.mean, rtol=relative)
    np.testing.assert_allclose(after.moments.std, before.moments.std, rtol=relative)
    if not flips:
        assert after.flipped is None
    else:
        assert after.flipped is not None
        assert before.flipped is not None
        np.testing.assert_allclose(after.flipped.mean, before.flipped.mean, rtol=relative)
        np.testing.assert_allclose(after.flipped.std, before.flipped.std, rtol=relative)


def test_what_is_no_latent_is_not_written():
    bad = Moments(np.zeros((2, 3, 4)), np.zeros(SHAPE))
    with pytest.raises(ValueError, match="of shape"):
        encode_record(dataclasses.replace(record(0), moments=bad), MANIFEST)
    bad = Moments(np.full(SHAPE, np.nan), np.zeros(SHAPE))
    with pytest.raises(ValueError, match="example 0 is not finite"):
        encode_record(dataclasses.replace(record(0), flipped=bad), MANIFEST)


def test_a_folder_is_read_by_index(tmp_path):
    manifest = write(tmp_path, skip=(5, 9))
    assert (manifest.count, manifest.skipped) == (8, (5, 9))
    source = LatentSource(tmp_path)
    assert len(source) == 8
    assert (source.image_shape, source.label_names) == (SHAPE, ("cat", "dog"))
    source = pickle.loads(pickle.dumps(source))  # as workers get it
    for position, index in enumerate([0, 1, 2, 3, 4, 6, 7, 8]):
        found = source[position]
        assert (found.index, found.label) == (index, index % 2)
        np.testing.assert_array_equal(found.moments.std, record(index).moments.std)
    for index in (-1, 8):
        with pytest.raises(IndexError):
            source[index]
    source.verify()


def test_draws_have_the_moments_and_the_chance_of_seed_epoch_and_index(tmp_path):
    write(tmp_path)
    source = LatentSource(tmp_path, flip=True)
    one = source.draw(3, seed=5, epoch=2)
    np.testing.assert_array_equal(one["image"], source.draw(3, seed=5, epoch=2)["image"])
    assert one["image"].dtype == np.float32
    assert one["label"] == 1
    for seed, epoch in ((6, 2), (5, 3)):
        assert np.all(one["image"] != source.draw(3, seed=seed, epoch=epoch)["image"])
    known = record(3)
    assert known.flipped is not None
    standard: dict[str, list[np.ndarray]] = {"own": [], "flipped": []}
    for epoch in range(600):
        image = source.draw(3, seed=0, epoch=epoch)["image"] / 0.5
        noises = {
            "own": (image - known.moments.mean) / known.moments.std,
            "flipped": (image - known.flipped.mean) / known.flipped.std,
        }
        # Of the right moments it is standard normal; of the wrong ones, far from it.
        best = min(noises, key=lambda name: np.abs(noises[name]).max())
        standard[best].append(noises[best])
    for name, noise in standard.items():
        assert 240 < len(noise) < 360, name
        assert abs(np.mean(noise)) < 0.05
        assert abs(np.std(noise) - 1) < 0.05


def test_without_flip_the_image_itself_is_drawn():
    rng = example_rng(0, 0, 0)
    moments = Moments(np.full(SHAPE, 2.0, np.float32), np.zeros(SHAPE))
    flat = dataclasses.replace(record(2), moments=moments)
    for _ in range(20):
        drawn = sample_latent(flat, rng, scaling_factor=0.25, flip=False)
        np.testing.assert_array_equal(drawn["image"], np.full(SHAPE, 0.5))


def test_batches_are_the_same_for_one_and_two_processes(tmp_path):
    write(tmp_path)
    source = LatentSource(tmp_path, flip=True)

    def batches(index, count):
        reader = make_batches(
            source, batch_size=4, seed=3, process_index=index, process_count=count
        )
        return [next(reader)["image"] for _ in range(6)]

    whole = batches(0, 1)
    parts = zip(batches(0, 2), batches(1, 2), strict=True)
    for one, both in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, np.concatenate(both))
    # Two epochs of ten: no latent is drawn twice alike.
    flat = np.concatenate(whole)[:20].reshape(20, -1)
    assert len(np.unique(flat, axis=0)) == 20


def test_a_manifest_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path)
    config = Config.from_dict(
        {
            "data": {"source": "pictures", "image_size": 24},
            "autoencoder": {"weights": "nowhere", "sha256": "AB" * 32, "scaling_factor": 0.5},
            "model": {"image_size": 4, "channels": 4, "num_classes": 2},
        }
    )
    wanted = wanted_of(config)
    assert wanted["latent_shape"] == (4, 4, 4)
    wanted["latent_shape"] = SHAPE
    LatentSource(tmp_path, wanted=wanted)
    for field, value in (
        ("weights_sha256", KNOWN["sd-vae-ft-mse"].sha256),
        ("scaling_factor", 1.0),
        ("latent_shape", (32, 32, 4)),
        ("classes", 1000),
        ("split", "validation"),
        ("image_size", 256),
    ):
        assert field in wanted
        refused(
            "does not fit the config",
            f"{field}: the latents have",
            repr(value),
            folder=tmp_path,
            wanted=wanted | {field: value},
        )
    with pytest.raises(UserError, match=r"autoencoder\.weights is empty"):
        wanted_of(Config())


def test_mirror_images_that_are_not_there_are_told(tmp_path):
    write(tmp_path, dataclasses.replace(MANIFEST, flips=False))
    LatentSource(tmp_path)
    refused("no mirror images", "--flips", folder=tmp_path, flip=True)


def test_damage_is_named(tmp_path):
    write(tmp_path)
    second = tmp_path / MANIFEST.shard_file(1)
    data = second.read_bytes()
    second.write_bytes(data[:-7])
    refused("00001-of-00003", "truncated", folder=tmp_path)
    second.unlink()
    refused("00001-of-00003", "is missing", folder=tmp_path)
    damaged = bytearray(data)
    position = data.find(record(5).moments.mean.tobytes())
    damaged[position] ^= 255
    second.write_bytes(damaged)
    source = LatentSource(tmp_path)
    with pytest.raises(UserError, match=r"record 1 of .*00001-of-00003.* is damaged"):
        source[5]
    assert source[6].index == 6  # and the rest is still read
    with pytest.raises(UserError, match="another checksum"):
        source.verify()


def test_what_is_no_folder_of_latents_is_told(tmp_path):
    refused("holds no latents", "dydilit_jax.encode", folder=tmp_path / "nowhere")
    open_folder(tmp_path / "begun", MANIFEST)
    refused("not finished", "run the same command again", folder=tmp_path / "begun")
    write(tmp_path / "whole")
    path = tmp_path / "whole" / MANIFEST_FILE
    text = path.read_text()
    for before, after, part in (
        ('"format": "dydilit_jax.latents"', '"format": "other"', "no manifest"),
        ('"version": 1', '"version": 2', "version 2, expected 1"),
        ('"count": 10', '"count": 11', "contradicts itself"),
        ('"split": "train",', "", "is damaged"),
        ("{", "", "is damaged"),
    ):
        path.write_text(text.replace(before, after, 1))
        refused(part, folder=tmp_path / "whole")
