"""Random weights of the Inception network that two programs can make alike."""

import ast
import zlib
from pathlib import Path

import numpy as np

INCEPTION = Path(__file__).parent / "fixtures" / "inception.npz"


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 tensor of pytorch-fid's layout, told by its name; activations keep their size."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith("bn.weight"):
        return rng.uniform(0.8, 1.2, shape).astype(np.float32)
    if len(shape) == 1:
        return (0.1 * rng.randn(*shape)).astype(np.float32)
    return (rng.randn(*shape) * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)


def inception_tensors() -> dict[str, np.ndarray]:
    """All of the network's, in pytorch-fid's layout."""
    with np.load(INCEPTION) as file:
        shapes = map(ast.literal_eval, map(str, file["shapes"]))
        names = map(str, file["names"])
        return {name: tensor(name, shape) for name, shape in zip(names, shapes, strict=True)}
