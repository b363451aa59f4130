"""PyTorch's files of weights, read without PyTorch, and without running what a pickle could.

What `torch.save` writes since PyTorch 1.6 is a zip archive, nothing in it compressed:

    NAME/data.pkl      a pickle of the structure, in which a tensor is a storage's key, an offset,
                       a shape and strides
    NAME/data/KEY      a storage: plain numbers
    NAME/byteorder     `little`, where it is said

and what it wrote before is a stream, read by torch_legacy.py, with the same pickle.

The pickle goes through an unpickler that imports nothing and knows the few names of a state dict,
the same restriction as `torch.load(weights_only=True)`. Any other name ends the reading before
anything is made of it.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained.torch_legacy import is_legacy, read_stream

FLOATING = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
# Counters and masks, which may lie beside the weights in a training checkpoint, and their bytes.
OTHERS = {
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
ITEMSIZES = {kind: dtype.itemsize for kind, dtype in FLOATING.items()} | OTHERS
# Batch normalisation counts its steps beside its weights, and nothing is computed of that.
COUNTER = "num_batches_tracked"
# Where PyTorch's training scripts put the weights among all else; the average first.
NESTED = ("ema", "model", "state_dict")


class Storage(NamedTuple):
    """Numbers that tensors are views of: the class's name, the key in the archive, how many."""

    kind: str
    key: str
    length: int


class Tensor(NamedTuple):
    """A tensor whose numbers are still in the archive; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The pickle asks for something that is not of a state dict."""


class _DamagedError(Exception):
    """The file is not as PyTorch writes it."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The state dict of a file, alone or in a training checkpoint, as float32 arrays by name.

    Counters of batch normalisations are left out.

    Raises:
      UserError: a damaged file, one that holds more than tensors and plain values, or one without a
        state dict of floating-point tensors.
    """
    try:
        if is_legacy(path):
            return _read_legacy(path)
        with zipfile.ZipFile(path) as archive:
            folder = _folder(archive)
            tensors = _state_dict(_structure(archive, folder), path)
            return {
                name: _numbers(each, _stored(archive, folder, each.storage))
                for name, each in tensors.items()
            }
    except _RefusedError as error:
        raise UserError(
            f"{str(path)!r} holds more than tensors ({error}), and reading it could run any code: "
            "load it where you trust it, and save its state dict alone"
        ) from error
    except (_DamagedError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"{str(path)!r} is truncated, or no PyTorch checkpoint ({error}): fetch it again"
        ) from error


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """The same of a file of before PyTorch 1.6."""
    kinds: dict[str, str] = {}

    def load(file: IO[bytes]) -> Any:
        unpickler = _Unpickler(file)
        content = _loaded(unpickler)
        kinds.update((storage.key, storage.kind) for storage in unpickler.storages)
        return content

    def itemsizes() -> dict[str, int]:
        return {key: ITEMSIZES[kind] for key, kind in kinds.items()}

    with path.open("rb") as file:
        try:
            content, numbers = read_stream(file, load, itemsizes)
        except (ValueError, TypeError, KeyError) as error:
            raise _DamagedError(str(error)) from error
    tensors = _state_dict(content, path)
    return {name: _numbers(each, numbers[each.storage.key]) for name, each in tensors.items()}


def _folder(archive: zipfile.ZipFile) -> str:
    """The folder in the archive that holds everything, with its slash."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _DamagedError("it is compressed")
    folders = [name[: -len("data.pkl")] for name in archive.namelist() if _is_structure(name)]
    if len(folders) != 1:
        raise _DamagedError("no data.pkl in it")
    order = f"{folders[0]}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise _DamagedError("its numbers are big-endian")
    return folders[0]


def _is_structure(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries, lists, plain values and `Tensor`s, and nothing else."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)
        self.storages: list[Storage] = []

        # A pickle may set attributes of what it is given: this file's own get no other's.
        class Namespace:
            """Command-line arguments, which training scripts save too; nobody reads them."""

        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("argparse", "Namespace"): Namespace,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *parts: _tensor(*parts[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            **{("torch", kind): kind for kind in (*FLOATING, *OTHERS)},
        }

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name of PyTorch's; nothing is imported."""
        if (module, name) not in self.known:
            raise _RefusedError(f"{module}.{name}")
        return self.known[module, name]

    def persistent_load(self, reference: Any) -> Storage:
        """The storage that a reference names."""
        typename, kind, key, _device, count, *view = reference
        if typename != "storage" or kind not in ITEMSIZES or any(view):
            raise _DamagedError(f"reference to a {typename}")
        self.storages.append(Storage(kind, str(key), _natural(count)))
        return self.storages[-1]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise _DamagedError("a tensor of nothing")
    return Tensor(
        storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, strides))
    )


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise _DamagedError(f"size {number!r}")
    return number


def _structure(archive: zipfile.ZipFile, folder: str) -> Any:
    with archive.open(f"{folder}data.pkl") as file:
        return _loaded(_Unpickler(file))


def _loaded(unpickler: _Unpickler) -> Any:
    try:
        return unpickler.load()
    except (_RefusedError, _DamagedError, zipfile.BadZipFile):
        raise
    except Exception as error:  # there is no end to what a damaged pickle raises
        raise _DamagedError(f"its pickle: {type(error).__name__}") from error


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name, of the whole content or of what is nested in it."""
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{str(path)!r} holds a {type(content).__name__}, expected a state dict")
    weights = {
        str(name): value for name, value in content.items() if not str(name).endswith(COUNTER)
    }
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{str(path)!r} is no state dict: its {name!r} is no tensor")
        if value.storage.kind not in FLOATING:
            raise UserError(
                f"{str(path)!r}: tensor {name} is of {value.storage.kind}, expected one of "
                f"{', '.join(FLOATING)}"
            )
    return weights


def _stored(archive: zipfile.ZipFile, folder: str, storage: Storage) -> bytes:
    """The numbers of a storage."""
    name = f"{folder}data/{storage.key}"
    return archive.read(name) if name in archive.namelist() else b""


def _numbers(tensor: Tensor, content: bytes) -> np.ndarray:
    """The tensor's numbers as float32, in memory of their own; `content` is its storage's."""
    storage, dtype = tensor.storage, FLOATING[tensor.storage.kind]
    last = tensor.offset + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    size = math.prod(tensor.shape)
    if size and (last >= storage.length or size > storage.length):
        raise _DamagedError(f"a tensor reaches past the end of storage {storage.key}")
    if len(content) != storage.length * dtype.itemsize:
        raise _DamagedError(f"storage {storage.key} is missing or of another size")
    if not size:
        return np.zeros(tensor.shape, np.float32)
    numbers = np.frombuffer(content, dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(numbers, tensor.shape, strides, writeable=False)
    return view.astype(np.float32, order="C")
