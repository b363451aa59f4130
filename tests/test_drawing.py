import numpy as np
import pytest
from PIL import Image

from dydilit_jax.drawing import MARGIN, TEXT, draw_grid, save_png, to_uint8

WHITE = np.array([255, 255, 255])


def test_pixel_values():
    values = np.array([-1.0, 0.0, 1.0, -2.0, 5.0, -0.5, 0.99999])
    np.testing.assert_array_equal(to_uint8(values), [0, 128, 255, 0, 255, 64, 255])
    assert to_uint8(values).dtype == np.uint8
    # Every one of 256 levels is hit, at equal steps.
    levels = to_uint8(np.arange(256) / 127.5 - 1.0)
    np.testing.assert_array_equal(levels, np.arange(256))


def corner(i: int, columns: int, side: int, top: int, word: int = 0) -> tuple[int, int]:
    row, column = divmod(i, columns)
    return top + row * (side + word + MARGIN) + word, MARGIN + column * (side + MARGIN)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_land_where_they_belong(channels):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (5, 4, 4, channels))
    picture = draw_grid(images, columns=3, tile=12)
    side = 12
    assert picture.dtype == np.uint8
    assert picture.shape == (MARGIN + 2 * (side + MARGIN), MARGIN + 3 * (side + MARGIN), 3)
    rest = np.ones(picture.shape[:2], bool)
    for i, image in enumerate(images):
        upper, left = corner(i, 3, side, MARGIN)
        drawn = picture[upper : upper + side, left : left + side]
        expected = np.kron(
            np.broadcast_to(np.rint((image + 1) * 127.5), (4, 4, 3)), np.ones((3, 3, 1))
        )
        np.testing.assert_array_equal(drawn, expected)
        rest[upper : upper + side, left : left + side] = False
    # Nothing else is drawn, and the sixth place is empty.
    assert np.all(picture[rest] == WHITE)


def test_large_images_keep_their_size():
    picture = draw_grid(np.zeros((1, 70, 100, 3)), columns=1, tile=64)
    assert picture.shape == (70 + 2 * MARGIN, 100 + 2 * MARGIN, 3)


def test_a_title_is_drawn_above():
    images = np.ones((2, 8, 8, 1))
    plain = draw_grid(images, columns=2)
    titled = draw_grid(images, columns=2, title="step 7")
    above = TEXT + MARGIN
    assert titled.shape[0] == plain.shape[0] + above
    dark = np.argwhere(titled.min(axis=-1) < 128)
    assert len(dark) > 10
    assert dark[:, 0].max() < MARGIN + above
    # A long one widens the picture rather than being cut off.
    long = draw_grid(images, columns=2, title="m" * 60)
    assert long.shape[1] > titled.shape[1]
    assert np.all(long[:, -MARGIN:] == 255)
    assert np.any(long[: MARGIN + above, -6 * MARGIN :] < 128)


def test_labels_are_drawn_above_their_images():
    images = np.ones((4, 8, 8, 1))
    picture = draw_grid(images, columns=2, labels=["1", "", "", "8"])
    for i, drawn in enumerate([True, False, False, True]):
        upper, left = corner(i, 2, 64, MARGIN, TEXT)
        word = picture[upper - TEXT : upper, left : left + 64]
        assert np.any(word < 128) == drawn
        assert np.all(picture[upper : upper + 64, left : left + 64] == 255)
    one = picture[MARGIN : MARGIN + TEXT, MARGIN : MARGIN + 64]
    upper, left = corner(3, 2, 64, MARGIN, TEXT)
    assert not np.array_equal(one, picture[upper - TEXT : upper, left : left + 64])


def test_a_picture_is_written_as_it_is(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    save_png(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), picture)
