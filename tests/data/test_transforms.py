"""Decoding of every kind of image, and the crop against ADM's own."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dydilit_jax.data.transforms import center_crop, decode_image, normalize
from dydilit_jax.errors import UserError
from tests.data.pictures import encoded, picture

ADM = np.load(Path(__file__).with_name("adm_crops.npz"))


@pytest.mark.parametrize("case", ADM.files)
def test_the_crop_is_adms_pixel_for_pixel(case):
    sides, size = case.split("-")
    width, height = map(int, sides.split("x"))
    np.testing.assert_array_equal(center_crop(picture(width, height), int(size)), ADM[case])


def test_levels_become_minus_one_to_one():
    levels = np.arange(256, dtype=np.uint8)
    values = normalize(levels)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, levels.astype(np.float64) / 127.5 - 1, atol=1e-7)
    assert (values[0], values[255]) == (-1.0, 1.0)


def test_a_lossless_image_is_decoded_as_it_was():
    image = picture(9, 7)
    np.testing.assert_array_equal(decode_image(encoded(image)), np.asarray(image))
    np.testing.assert_array_equal(
        decode_image(encoded(image.convert("L")), 1), np.asarray(image.convert("L"))
    )


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("RGB", "WEBP"),
    ],
)
def test_every_mode_becomes_rgb(mode, form):
    # A colour that each of these modes can hold.
    pixels = np.full((16, 16), 255 if mode == "1" else 51, np.uint8)
    image = Image.fromarray(pixels).convert("RGB").convert(mode)
    options = {"lossless": True} if form == "WEBP" else {}
    result = np.asarray(decode_image(encoded(image, form, **options)))
    assert result.shape == (16, 16, 3)
    assert np.abs(result.astype(int) - pixels[..., None]).max() <= 2


def test_an_alpha_channel_is_dropped_as_adm_drops_it():
    image = picture(6, 5)
    image.putalpha(Image.fromarray(np.arange(30, dtype=np.uint8).reshape(5, 6)))
    np.testing.assert_array_equal(decode_image(encoded(image)), np.asarray(picture(6, 5)))


def test_sixteen_bits_keep_their_upper_eight():
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    result = np.asarray(decode_image(encoded(Image.fromarray(levels))))
    np.testing.assert_array_equal(result[..., 1], levels // 256)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes that are no image"),
        (b"not an image", "12 bytes that are no image"),
        (encoded(picture(64, 64), "JPEG")[:900], "a damaged image .*truncated"),
        (encoded(picture(64, 64))[:900], "a damaged image"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(UserError, match=message) as error:
        decode_image(data)
    assert "\n" not in str(error.value)


def test_orientation_in_exif_is_not_applied():
    image = picture(10, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_image(file.getvalue()), np.asarray(image))
