"""Requests for many images: parts, going on where it stopped, the files they end in."""

import numpy as np
import pytest
from PIL import Image

from dydilit_jax.errors import UserError
from dydilit_jax.training.request import Parts, draw_parts, write_npz, write_pngs

IMAGES = np.linspace(-1.2, 1.2, 7 * 4 * 4 * 3).reshape(7, 4, 4, 3).astype(np.float32)
PIXELS = np.round((np.clip(IMAGES, -1, 1) + 1) * 127.5).astype(np.uint8)
LABELS = np.arange(7)


def interrupted(parts: Parts) -> None:
    """Draws two batches of two of the seven images, then dies."""

    def batches():
        yield IMAGES[:2]
        yield IMAGES[2:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(draw_parts(parts, batches(), 0))


def test_a_request_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "many.npz"
    interrupted(Parts(out, {"seed": 1, "interval": (0.0, 1.0)}))
    (tmp_path / "many.npz.parts" / "unfinished_00000004.npy").write_bytes(b"cut short")
    parts = Parts(out, {"seed": 1, "interval": (0.0, 1.0)})
    assert parts.done() == 4
    assert list(draw_parts(parts, [IMAGES[4:6], IMAGES[6:]], 4)) == [2, 1]
    write_npz(parts, LABELS, out)
    parts.delete()
    with np.load(out) as archive:
        np.testing.assert_array_equal(archive["arr_0"], PIXELS)
        np.testing.assert_array_equal(archive["arr_1"], LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["many.npz"]


def test_parts_after_a_gap_do_not_count(tmp_path):
    parts = Parts(tmp_path / "x.npz", {})
    parts.add(0, IMAGES[:2])
    parts.add(4, IMAGES[4:])
    assert parts.done() == 2


def test_another_request_is_refused_by_name(tmp_path):
    interrupted(Parts(tmp_path / "x.npz", {"seed": 1, "steps": 50}))
    with pytest.raises(UserError, match=r"with another seed: finish that one"):
        Parts(tmp_path / "x.npz", {"seed": 2, "steps": 50})
    assert Parts(tmp_path / "x.npz", {"seed": 1, "steps": 50}).done() == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_pngs(tmp_path, channels):
    parts = Parts(tmp_path / "folder", {})
    parts.add(0, IMAGES[..., :channels])
    write_pngs(parts, LABELS, tmp_path / "folder")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [*(f"{i:06d}.png" for i in range(7)), "labels.txt"]
    picture = np.asarray(Image.open(tmp_path / "folder" / "000003.png"))
    np.testing.assert_array_equal(picture.reshape(4, 4, channels), PIXELS[3, ..., :channels])
    assert (tmp_path / "folder" / "labels.txt").read_text().split() == list("0123456")
