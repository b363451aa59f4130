"""From images to latents on disk: the values, the bytes, interruptions and the command."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dydilit_jax.autoencoders import load_autoencoder, save_autoencoder
from dydilit_jax.autoencoders.kl import KLConfig
from dydilit_jax.autoencoders.layout import build, fill, tensors_of
from dydilit_jax.data.encoding import encode_source, make_encoder, plan
from dydilit_jax.data.latents import LatentSource
from dydilit_jax.data.sources import ArraySource, Example, digits
from dydilit_jax.errors import UserError
from tests.commands import assert_one_line

ENCODE = "dydilit_jax.encode"
BATCH, COUNT = 4, 14
# Digits of 8 x 8 grey levels to latents of 4 x 4 x 4.
SIZES = KLConfig(
    in_channels=1,
    out_channels=1,
    block_out_channels=(4, 8),
    layers_per_block=1,
    norm_num_groups=2,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of random weights in diffusers' layout."""
    folder = tmp_path_factory.mktemp("weights")
    rng = np.random.default_rng(1)
    autoencoder = build(SIZES, jnp.dtype("float32"))
    tensors = {
        name: rng.normal(0.1, 0.3, tensor.shape).astype(np.float32)
        for name, tensor in tensors_of(autoencoder).items()
    }
    save_autoencoder(folder, fill(SIZES, tensors, "here", jnp.dtype("float32")))
    return folder


class Pictures:
    """Digits that may be unreadable, or interrupt; notes which were read."""

    def __init__(self, unreadable=(), interrupt=None):
        whole = digits()
        self.images, self.labels = whole.images[:COUNT], whole.labels[:COUNT]
        self.image_shape, self.label_names = whole.image_shape, whole.label_names
        self.unreadable, self.interrupt = unreadable, interrupt
        self.read: list[int] = []

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.interrupt:
            raise KeyboardInterrupt
        if index in self.unreadable:
            raise UserError(f"picture {index} is torn")
        return Example(image=self.images[index], label=self.labels[index])


@pytest.fixture(scope="module")
def pretrained(weights):
    return load_autoencoder(str(weights))


@pytest.fixture(scope="module")
def encode(pretrained):
    """Two devices, batches of four."""
    return make_encoder(pretrained, flips=True, batch_size=BATCH, devices=jax.devices()[:2])


def manifest_of(pretrained, **changes):
    manifest = plan(
        Pictures(),
        pretrained,
        name="digits",
        split="train",
        flips=True,
        dtype="float32",
        compute_dtype="float32",
        shard_size=5,
    )
    return dataclasses.replace(manifest, **changes)


def run(folder, encode, manifest, source=None, **options):
    return encode_source(
        source or Pictures(), encode, manifest, folder, batch_size=BATCH, **options
    )


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pretrained, encode):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("out") / "whole"
    run(folder, encode, manifest_of(pretrained))
    return folder


def test_latents_are_the_autoencoders_own(whole, pretrained):
    """Against the module called on one image, no batch, no devices, no padding."""
    source, images = LatentSource(whole), Pictures().images
    assert len(source) == COUNT
    graph, state = nnx.split(pretrained.autoencoder)
    alone = jax.jit(lambda image: nnx.merge(graph, state).encode(image[None]))
    for index in (0, 4, 5, 13):
        record = source[index]
        assert (record.index, record.label) == (index, Pictures().labels[index])
        flipped = record.flipped
        assert flipped is not None
        pairs = ((record.moments, images[index]), (flipped, images[index][:, ::-1]))
        for found, image in pairs:
            mean, std = alone(image)
            np.testing.assert_allclose(found.mean, mean[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.std, std[0], rtol=1e-4, atol=1e-5)
        assert np.abs(record.moments.mean - flipped.mean).max() > 1e-2


def test_two_runs_and_two_processes_give_the_same_bytes(tmp_path, whole, pretrained, encode):
    manifest = manifest_of(pretrained)
    seen: list[int] = []
    run(tmp_path / "again", encode, manifest, progress=seen.append)
    assert sum(seen) == COUNT
    assert bytes_of(tmp_path / "again") == bytes_of(whole)
    parts = tmp_path / "parts"
    assert run(parts, encode, manifest, process_index=1, process_count=2) is None
    with pytest.raises(UserError, match="not finished"):
        LatentSource(parts)
    assert run(parts, encode, manifest, process_index=0, process_count=2) is not None
    assert bytes_of(parts) == bytes_of(whole)


def test_an_interrupted_run_goes_on(tmp_path, whole, pretrained, encode):
    folder, manifest = tmp_path / "out", manifest_of(pretrained)
    with pytest.raises(KeyboardInterrupt):
        run(folder, encode, manifest, Pictures(interrupt=9))
    left = set(bytes_of(folder))
    assert manifest.shard_file(0) in left
    assert f"unfinished-{manifest.shard_file(1)}" in left
    assert "manifest.json" not in left
    source = Pictures()
    seen: list[int] = []
    run(folder, encode, manifest, source, progress=seen.append)
    assert sorted(source.read) == list(range(5, COUNT))  # the first shard was done
    assert sum(seen) == COUNT
    assert bytes_of(folder) == bytes_of(whole)
    source = Pictures()
    again = run(folder, encode, manifest, source)
    assert again is not None
    assert (again.count, source.read) == (COUNT, [])


def test_one_folder_holds_one_encoding(tmp_path, whole, pretrained, encode):
    for change, part in (
        ({"dtype": "bfloat16"}, "dtype"),
        ({"weights_sha256": "00"}, "weights_sha256"),
        ({"examples": 10}, "examples"),
    ):
        with pytest.raises(UserError, match=f"another encoding .{part}: the latents have"):
            run(whole, encode, manifest_of(pretrained, **change))
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="is not an empty folder"):
        run(tmp_path, encode, manifest_of(pretrained))


def test_unreadable_images_are_skipped_and_counted(tmp_path, pretrained, encode):
    manifest = manifest_of(pretrained, dtype="bfloat16")
    broken = Pictures(unreadable=(2, 6, 5, 8, 7, 9))
    with pytest.raises(UserError, match=r"picture 5 is torn \(1 skipped before it\)"):
        run(tmp_path / "few", encode, manifest, broken, max_skipped=1)
    told: list[str] = []
    done = run(tmp_path / "out", encode, manifest, broken, max_skipped=6, warn=told.append)
    assert done is not None
    assert (done.count, done.skipped) == (COUNT - 6, (2, 5, 6, 7, 8, 9))
    assert told[0] == "skipped image 2: picture 2 is torn"
    source = LatentSource(tmp_path / "out")
    assert [source[i].index for i in range(len(source))] == [0, 1, 3, 4, 10, 11, 12, 13]


def test_images_that_do_not_fit_are_refused(pretrained):
    def refused(part, images):
        labels = np.zeros(len(images), np.int32)
        with pytest.raises(UserError, match=part):
            plan(
                ArraySource(images, labels, ("all",)),
                pretrained,
                name="x",
                split="train",
                flips=False,
                dtype="float32",
                compute_dtype="float32",
                shard_size=5,
            )

    refused("is empty", np.zeros((0, 8, 8, 1)))
    refused("3 channels, autoencoder unknown takes 1", np.zeros((2, 8, 8, 3)))
    refused("multiple of 2", np.zeros((2, 7, 7, 1)))
    refused("takes squares", np.zeros((2, 8, 6, 1)))


def arguments(weights, out, *more):
    return (
        ENCODE,
        "--config=configs/digits.py",
        f"--config.autoencoder.weights={weights}",
        "--config.model.image_size=4",
        "--config.model.channels=4",
        f"--out={out}",
        *more,
    )


def test_the_command_writes_what_a_run_can_read(command, weights, tmp_path):
    out = tmp_path / "latents"
    code, output, errors = command(*arguments(weights, out, "--shard_size=600", "--batch_size=256"))
    assert code == 0, errors
    assert output == f"1797 latents (4, 4, 4) of digits train in 3 shards in {out}\n"
    assert "1797/1797" in errors
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["count"], manifest["dtype"], manifest["flips"]) == (1797, "bfloat16", False)
    source = LatentSource(out, wanted={"classes": 10, "source": "digits", "image_size": 8})
    np.testing.assert_array_equal(
        [source[i].label for i in range(0, 1797, 100)], digits().labels[::100]
    )
    source.verify()
    # The same command again finds it done; another one is refused.
    code, again, _ = command(*arguments(weights, out, "--shard_size=600", "--batch_size=256"))
    assert (code, again) == (0, output)


MISTAKES = {
    "no weights": (["--config.autoencoder.weights="], ["autoencoder.weights is empty"]),
    "missing weights": (["--config.autoencoder.weights=nowhere"], ["nowhere", "sd-vae-ft-ema"]),
    "scaling": (["--config.autoencoder.scaling_factor=0.5"], ["0.5 does not belong", "0.18215"]),
    "checksum": (["--config.autoencoder.sha256=ab"], ["expected ab"]),
    "network": (["--config.model.image_size=8"], ["takes latents of (8, 8, 4)", "(4, 4, 4)"]),
    "dtype": (["--dtype=float16"], ["float16", "bfloat16, float32"]),
    "part": (["--part=2/2"], ["from 0 to 1"]),
    "no part": (["--part=two"], ["INDEX/COUNT"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(command, weights, tmp_path, name):
    more, parts = MISTAKES[name]
    code, _, errors = command(*arguments(weights, tmp_path / "out", *more))
    assert_one_line(code, errors, *parts)
    assert not (tmp_path / "out").exists()
