"""Random weights of the Inception network that two programs can make alike."""

import zlib

import numpy as np


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
