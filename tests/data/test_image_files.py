"""Images made elsewhere: folders of PNG files, and .npz files."""

import numpy as np
import pytest
from PIL import Image

from dydilit_jax.data.image_files import NpzImages, open_images
from dydilit_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), np.uint8)


def write_folder(folder, images, modes=("RGB",)):
    folder.mkdir()
    for i, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        picture.convert(modes[i % len(modes)]).save(folder / f"{i:03d}.png")
    (folder / "labels.txt").write_text("0\n")


def write_npz(path, images, compressed):
    (np.savez_compressed if compressed else np.savez)(path, arr_0=images, arr_1=np.arange(7))


@pytest.mark.parametrize("kind", ["folder", "stored", "compressed"])
def test_images_come_by_index(tmp_path, kind):
    path = tmp_path / ("images" if kind == "folder" else "images.npz")
    if kind == "folder":
        write_folder(path, IMAGES, ("RGB", "RGBA"))
    else:
        write_npz(path, IMAGES, kind == "compressed")
    images = open_images(path)
    assert len(images) == 7
    assert images.image_shape == (5, 6, 3)
    which = np.array([4, 0, 4, 6])
    read = images.read(which)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, IMAGES[which])


def test_an_array_that_is_not_compressed_stays_in_its_file(tmp_path):
    write_npz(tmp_path / "a.npz", np.asfortranarray(IMAGES), compressed=False)
    images = open_images(tmp_path / "a.npz")
    assert isinstance(images, NpzImages)
    assert isinstance(images._images, np.memmap)
    np.testing.assert_array_equal(images.read(np.arange(7)), IMAGES)


def test_grey_images_have_one_channel(tmp_path):
    write_folder(tmp_path / "grey", IMAGES[..., :1], ("L",))
    images = open_images(tmp_path / "grey")
    assert images.image_shape == (5, 6, 1)
    np.testing.assert_array_equal(images.read(np.array([2])), IMAGES[2:3, ..., :1])


def test_folders_that_cannot_be_scored(tmp_path):
    with pytest.raises(UserError, match="does not exist: expected a folder of PNG files"):
        open_images(tmp_path / "none")
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match=r"is neither a folder nor an \.npz"):
        open_images(tmp_path / "file.txt")
    (tmp_path / "jpegs").mkdir()
    Image.fromarray(IMAGES[0]).save(tmp_path / "jpegs" / "a.jpg")
    with pytest.raises(UserError, match=r"holds no \.png files \(it has \.jpg files\)"):
        open_images(tmp_path / "jpegs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.png files: lossless"):
        open_images(tmp_path / "empty")


def test_another_size_and_damage_are_named(tmp_path):
    write_folder(tmp_path / "mixed", IMAGES)
    Image.fromarray(IMAGES[0, :4]).save(tmp_path / "mixed" / "003.png")
    images = open_images(tmp_path / "mixed")
    images.read(np.arange(3))
    with pytest.raises(UserError, match=r"003\.png' has 6 x 4 pixels, 000\.png before it 6 x 5"):
        images.read(np.arange(4))
    path = tmp_path / "mixed" / "003.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"003\.png' cannot be read: a damaged image"):
        images.read(np.arange(4))
    path.unlink()
    with pytest.raises(UserError, match=r"003\.png' cannot be read: No such file"):
        images.read(np.arange(4))


def test_files_that_are_no_images_are_refused(tmp_path):
    write_npz(tmp_path / "cut.npz", IMAGES, compressed=False)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:300])
    with pytest.raises(UserError, match=r"is no \.npz, or a damaged one"):
        open_images(tmp_path / "cut.npz")
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="has no array arr_0"):
        open_images(tmp_path / "moments.npz")
    np.savez(tmp_path / "floats.npz", arr_0=IMAGES / 255.0)
    with pytest.raises(UserError, match=r"is float64 \(7, 5, 6, 3\), expected images"):
        open_images(tmp_path / "floats.npz")
