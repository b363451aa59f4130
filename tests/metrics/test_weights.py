"""Files of weights: PyTorch's older format, folders, fetching; nothing goes over a network."""

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.extractors import load_extractor
from dydilit_jax.metrics.weights import PublishedFile, locate
from dydilit_jax.models.pretrained.files import read_tensors
from dydilit_jax.models.pretrained.torch_legacy import START
from tests.metrics.weights import tensor

FOLDER = Path(__file__).parent / "fixtures"
LEGACY = FOLDER / "legacy.pth"


@pytest.mark.parametrize("name", ["legacy.pth", "archive.pth"])
def test_both_formats_of_pytorch(name):
    """Written by PyTorch, with a counter among them, which is left out."""
    tensors = read_tensors(FOLDER / name)
    module = "Conv2d_3b_1x1"
    parts = ("weight", "bias", "running_mean", "running_var")
    shapes = {f"{module}.conv.weight": (80, 64, 1, 1)} | {
        f"{module}.bn.{part}": (80,) for part in parts
    }
    assert tensors.keys() == shapes.keys()
    for key, shape in shapes.items():
        np.testing.assert_array_equal(tensors[key], tensor(key, shape))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.9999])
def test_a_truncated_file_of_the_older_format(tmp_path, share):
    path = tmp_path / "weights.pth"
    path.write_bytes(LEGACY.read_bytes()[: int(share * LEGACY.stat().st_size)])
    with pytest.raises(UserError, match="truncated, or no PyTorch checkpoint"):
        read_tensors(path)


class Touch:
    """Something whose pickle runs code: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["machine", "structure", "keys"])
def test_no_pickle_of_the_older_format_runs_code(tmp_path, where):
    trap = tmp_path / "trapped"
    contents: dict[str, Any] = {"machine": {"little_endian": True}, "structure": {}, "keys": []}
    contents[where] = Touch(trap)
    pickles = [pickle.dumps(each, protocol=2) for each in contents.values()]
    path = tmp_path / "weights.pth"
    path.write_bytes(START + b"".join(pickles))
    with pytest.raises(UserError, match=r"holds more than tensors \(\w+\.mkdir\)"):
        read_tensors(path)
    assert not trap.exists()
    # The trap works: whoever unpickles it is caught.
    with io.BytesIO(b"".join(pickles)) as file:
        for _ in pickles:
            pickle.load(file)
    assert trap.exists()


def test_big_endian_numbers_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(START + pickle.dumps({"little_endian": False}, protocol=2))
    with pytest.raises(UserError, match="big-endian"):
        read_tensors(path)


@pytest.fixture
def published(tmp_path):
    """A file that can be fetched, at a URL of this machine."""
    source = tmp_path / "published"
    source.write_bytes(b"weights")
    return PublishedFile(
        url=source.as_uri(), sha256=hashlib.sha256(b"weights").hexdigest(), names=("known.pth",)
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dydilit_jax"


def test_a_published_file_is_fetched_once(published, cache, tmp_path):
    path, checksum = locate("", published)
    assert (path, checksum) == (cache / "known.pth", published.sha256)
    (tmp_path / "published").unlink()
    assert locate("", published) == (path, checksum)
    assert [each.name for each in cache.iterdir()] == ["known.pth"]


def test_what_was_damaged_on_the_way_is_not_kept(published, cache, tmp_path):
    (tmp_path / "published").write_bytes(b"other")
    with pytest.raises(UserError, match="damaged on the way"):
        locate("", published)
    assert list(cache.iterdir()) == []


def test_what_was_damaged_later_is_noticed(published, cache):
    locate("", published)
    (cache / "known.pth").write_bytes(b"other")
    with pytest.raises(UserError, match=r"expected .* damaged or other weights"):
        locate("", published)


def test_without_a_connection_a_path_is_asked_for(published, tmp_path):
    (tmp_path / "published").unlink()
    with pytest.raises(UserError, match=r"cannot fetch file:.*give its path"):
        locate("", published)


def test_files_and_folders(published, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.pth", "b.pth"):
        (folder / name).write_bytes(b"weights")
    with pytest.raises(UserError, match=r"2 files of weights .*expected known\.pth"):
        locate(str(folder), published)
    (folder / "known.pth").write_bytes(b"weights")
    assert locate(str(folder), published)[0] == folder / "known.pth"
    assert locate(str(folder / "a.pth"), None)[0] == folder / "a.pth"
    with pytest.raises(UserError, match="has the checksum"):
        locate(str(folder), published, sha256="0" * 64)
    with pytest.raises(UserError, match="no such file or folder"):
        locate(str(tmp_path / "none"), published)
    with pytest.raises(UserError, match="not fetched"):
        locate("", None)


def test_unknown_extractors_are_named():
    with pytest.raises(UserError, match=r"unknown extractor 'incepton'.*did you mean 'inception'"):
        load_extractor("incepton")


def test_other_weights_are_not_inceptions():
    with pytest.raises(UserError, match=r"legacy\.pth' lacks .*expected the Inception network"):
        load_extractor("inception", str(LEGACY))
