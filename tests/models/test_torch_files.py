"""PyTorch's files without PyTorch: every kind of tensor, and no code of a pickle is run.

The fixtures were written by PyTorch; see tests/fixtures/make_network_fixtures.py.
"""

import argparse
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained import read_pretrained
from dydilit_jax.models.pretrained.files import read_tensors
from tests.models.test_pretrained import OFFICIAL

TRAINING = OFFICIAL.parent / "training.pt"


def assert_refused(path, says):
    with pytest.raises(UserError, match=says) as error:
        read_pretrained(path)
    assert "\n" not in str(error.value)


def test_a_training_checkpoint_holds_its_average_in_float32():
    """Every precision and kind of view."""
    numbers = np.arange(24, dtype=np.float32).reshape(4, 6) / 8 - 1
    expected = {
        "whole": numbers,
        "transposed": numbers.T,
        "rows": numbers[1:3],
        "columns": numbers[:, 2::3],
        "half": numbers,
        "brain": numbers,
        "double": numbers,
        "parameter": -numbers,
        "single": np.array(3.0),
        "empty": np.zeros((0, 3)),
    }
    tensors = read_tensors(TRAINING)
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == np.float32
        assert tensors[name].shape == array.shape
        np.testing.assert_array_equal(tensors[name], array, name)


def rewritten(source, path, change, compression=zipfile.ZIP_STORED):
    """A copy of an archive; `change` takes and gives its entries' contents by name."""
    with zipfile.ZipFile(source) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in change(entries).items():
            archive.writestr(name, content)
    return path


def with_structure(path, structure):
    """A file of PyTorch's with another pickle in it."""
    data = structure if isinstance(structure, bytes) else pickle.dumps(structure, protocol=2)
    return rewritten(TRAINING, path, lambda entries: entries | {"training/data.pkl": data})


class Touch:
    """Something whose pickle runs code: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["top", "value", "beside"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, where):
    trap = tmp_path / "trapped"
    touch = Touch(trap)
    content = {"top": touch, "value": {"model": {"w": touch}}, "beside": {"args": touch}}[where]
    path = with_structure(tmp_path / "weights.pt", content)
    assert_refused(
        path, r"holds more than tensors \(\w+\.mkdir\), and reading it could run any code"
    )
    assert not trap.exists()
    # The trap works: whoever unpickles it is caught.
    with zipfile.ZipFile(path) as archive:
        pickle.loads(archive.read("training/data.pkl"))
    assert trap.exists()


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pkl", ".safetensors"])
def test_a_plain_pickle_is_refused_under_any_name(tmp_path, suffix):
    trap = tmp_path / "trapped"
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(pickle.dumps(Touch(trap)))
    says = {
        ".pt": "truncated, or no PyTorch checkpoint",
        ".safetensors": "truncated, or no safetensors file",
    }
    assert_refused(path, says.get(suffix, "are pickles that could run any code, and are not read"))
    assert not trap.exists()


def test_what_a_pickle_is_given_cannot_reach_the_interpreter(tmp_path):
    """Attributes set on an allowed name change neither the real one nor the next file's."""
    # argparse.Namespace, then BUILD with (None, {"leak": 1}), which sets attributes of a class.
    poisoned = b"\x80\x02cargparse\nNamespace\nN}X\x04\x00\x00\x00leakK\x01s\x86b."
    assert_refused(with_structure(tmp_path / "a.pt", poisoned), "expected a state dict")
    assert not hasattr(argparse.Namespace, "leak")
    # `getattr`, by way of a dotted name or of builtins, is no name of a state dict.
    for pickled in (b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.", b"cos\nsystem\n."):
        assert_refused(with_structure(tmp_path / "b.pt", pickled), "holds more than tensors")


def view(*, offset=0, shape=(4, 6), strides=(6, 1), kind="FloatStorage", key="1", count=24):
    """A pickle of {"w": tensor} with these numbers, written by hand."""

    class Parts:
        def __reduce__(self):
            return Rebuild, (Storage(), offset, shape, strides)

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", Kind, key, "cpu", count) if isinstance(obj, Storage) else None

    file = io.BytesIO()
    Pickler(file, protocol=2).dump({"w": Parts()})
    here = f"c{__name__}\n".encode()
    return (
        file.getvalue()
        .replace(here + b"Kind\n", f"ctorch\n{kind}\n".encode())
        .replace(here + b"Rebuild\n", b"ctorch._utils\n_rebuild_tensor_v2\n")
    )


class Kind:
    """Stands for the class of a storage."""


def Rebuild(*_):  # noqa: N802
    """Stands for PyTorch's function."""


DAMAGED = {
    "compressed": lambda path: rewritten(TRAINING, path, dict, zipfile.ZIP_DEFLATED),
    "no structure": lambda path: rewritten(
        TRAINING, path, lambda e: {k: v for k, v in e.items() if "pkl" not in k}
    ),
    "big-endian": lambda path: rewritten(
        TRAINING, path, lambda e: e | {"training/byteorder": b"big"}
    ),
    "storage of another size": lambda path: rewritten(
        TRAINING, path, lambda e: {k: v[:-4] if "/data/" in k else v for k, v in e.items()}
    ),
    "missing storage": lambda path: with_structure(path, view(key="999")),
    "past the end": lambda path: with_structure(path, view(offset=1)),
    "far past the end": lambda path: with_structure(path, view(strides=(6, 100))),
    "more than there is": lambda path: with_structure(path, view(shape=(10**9,), strides=(0,))),
    "before the start": lambda path: with_structure(path, view(offset=-1)),
    "shape and strides": lambda path: with_structure(path, view(strides=(1,))),
    "no size": lambda path: with_structure(path, view(shape=("4", 6))),
    "unknown storage": lambda path: with_structure(path, view(kind="DoubleStorage")),
    "pickle cut short": lambda path: with_structure(path, view()[:-20]),
    "empty pickle": lambda path: with_structure(path, b""),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_pytorch_file(tmp_path, damage):
    assert_refused(DAMAGED[damage](tmp_path / "w.pt"), "truncated, or no PyTorch checkpoint")


def test_the_hand_written_view_is_read_where_it_is_whole(tmp_path):
    with zipfile.ZipFile(TRAINING) as archive:
        numbers = np.frombuffer(archive.read("training/data/1"), np.float32).reshape(4, 6)
    path = with_structure(tmp_path / "w.pt", view())
    np.testing.assert_array_equal(read_tensors(path)["w"], numbers)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_pytorch_file(tmp_path, share):
    data = OFFICIAL.read_bytes()
    path = tmp_path / "weights.pt"
    path.write_bytes(data[: int(share * len(data))])
    assert_refused(path, "is truncated, or no PyTorch checkpoint .*fetch it again")


NO_STATE_DICT = [
    ([1, 2], "holds a list, expected a state dict"),
    ({"model": {"w": 1.5}}, "is no state dict: its 'w' is no tensor"),
    (view(kind="LongStorage"), "tensor w is of LongStorage, expected one of FloatStorage"),
    (view(kind="ComplexFloatStorage"), r"more than tensors \(torch.ComplexFloatStorage\)"),
]


@pytest.mark.parametrize(("structure", "says"), NO_STATE_DICT)
def test_a_pytorch_file_without_weights(tmp_path, structure, says):
    assert_refused(with_structure(tmp_path / "w.pt", structure), says)
