"""Files of weights: finding, reading and writing them. No pickle is ever executed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dydilit_jax.errors import UserError
from dydilit_jax.models.pretrained.layouts import Tensors
from dydilit_jax.models.pretrained.torch_files import read_torch

CONFIG_FILE = "config.json"
OWN_FILE, DIFFUSERS_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"
WEIGHT_FILES = (OWN_FILE, DIFFUSERS_FILE, "diffusion_pytorch_model.bin")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

SAFETENSORS_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
}


def find_weights(path: Path) -> Path:
    """The file of weights that a user points at, itself or by its folder.

    Raises:
      UserError: there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{str(path)!r} does not exist")
    for folder in (path, path / "transformer"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
            if (folder / f"{name}.index.json").is_file():
                raise UserError(
                    f"{str(folder)!r} holds weights in several files: save them as one, {name}"
                )
    raise UserError(
        f"folder {str(path)!r} holds no weights; expected one of {', '.join(WEIGHT_FILES)}"
    )


def read_config(weights: Path) -> dict[str, Any]:
    """The config.json beside a file of weights; empty if there is none.

    Raises:
      UserError: it is not a JSON object.
    """
    path = weights.parent / CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{str(path)!r} must hold a JSON object, got {type(fields).__name__}")
    return fields


def read_tensors(path: Path) -> Tensors:
    """All tensors of a file, by name, as float32 (from half and double precision too).

    Raises:
      UserError: a file that is damaged, that only pickle could read or that holds something other
        than floating-point tensors.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return read_torch(path)
    raise UserError(
        f"{str(path)!r} is neither .safetensors nor {', '.join(TORCH_SUFFIXES)}: other formats, "
        "like .ckpt and .pkl, are pickles that could run any code, and are not read"
    )


def _read_safetensors(path: Path) -> Tensors:
    import safetensors

    try:
        entries = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{str(path)!r} is truncated, or no safetensors file ({error}): fetch it again"
        ) from error
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{str(path)!r}: tensor {name} has dtype {entry['dtype']}, expected one of "
                f"{', '.join(SAFETENSORS_DTYPES)}"
            )
        array = np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"]).astype(np.float32)
    return tensors


def listed(names: list[str], most: int = 10) -> str:
    """Names in one line, shortened after the first `most`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises UserError where `write_folder` would not write."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file: weights are written to a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"folder {str(folder)!r} is not empty: choose another, or --overwrite")


def write_folder(
    folder: Path, weights: str, tensors: Tensors, fields: dict[str, Any], *, overwrite: bool
) -> None:
    """Writes a file of weights (float32) and config.json; they appear together or not at all.

    With `overwrite` they, and weights of any other layout, are replaced; other files stay.

    Raises:
      UserError: the folder is not empty and not to be overwritten, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    check_folder(folder, overwrite=overwrite)
    folder = folder.absolute()
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        try:
            contiguous = {
                name: np.ascontiguousarray(array, np.float32) for name, array in tensors.items()
            }
            config = unfinished / CONFIG_FILE
            config.write_text(json.dumps(fields, indent=2) + "\n")
            # The metadata is what Hugging Face's readers ask for.
            save_file(contiguous, unfinished / weights, metadata={"format": "pt"})
            # Readable by whom the user's umask says, not by the user alone, as safetensors has it.
            (unfinished / weights).chmod(stat.S_IMODE(config.stat().st_mode))
            if folder.is_dir() and any(folder.iterdir()):
                for name in (weights, CONFIG_FILE):
                    (unfinished / name).replace(folder / name)
                for name in set(WEIGHT_FILES) - {weights}:
                    (folder / name).unlink(missing_ok=True)
            else:
                unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {str(folder)!r}: {reason}") from error
