"""Weights of the 2015 Inception network, in the layout that pytorch-fid and torch-fidelity share.

Of every convolution the file has `conv.weight`, (features, channels, height, width), and of the
normalisation after it `bn.weight`, `bn.bias`, `bn.running_mean`, `bn.running_var`. Together:

    y = g (W * x - m) / sqrt(v + 0.001) + b  =  (s W) * x + (b - s m),   s = g / sqrt(v + 0.001)
"""

from __future__ import annotations

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dydilit_jax.metrics.inception import Inception, InceptionExtractor
from dydilit_jax.metrics.weights import PublishedFile, check_tensors, locate
from dydilit_jax.models.pretrained.files import read_tensors
from dydilit_jax.models.pretrained.layouts import Tensors

EPSILON = 0.001
NORMALISATION = ("weight", "bias", "running_mean", "running_var")
PUBLISHED = PublishedFile(
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    names=("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
)


def load_inception(
    weights: str = "", *, sha256: str = "", variant: str = "adm"
) -> InceptionExtractor:
    """The network with the weights of a file.

    Args:
      weights: pytorch-fid's file, or a folder with it; empty to fetch it (95.6 MB, once).
      sha256: checksum that the file must have.
      variant: how images are prepared, of inception.VARIANTS.

    Raises:
      UserError: no such file, another checksum, or tensors that are not this network's.
    """
    path, checksum = locate(weights, PUBLISHED, sha256)
    return InceptionExtractor(filled(read_tensors(path), repr(str(path))), checksum, variant)


def filled(tensors: Tensors, source: str = "these weights") -> Inception:
    """The network with tensors of pytorch-fid's names.

    Raises:
      UserError: tensors that are missing, too much or misshapen; names them and `source`.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
    shapes = {
        path: tuple(leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()
    }
    _check(tensors, shapes, source)
    arrays = {}
    for path in shapes:
        if path[:-1] == ("fc",):
            arrays[path] = tensors["fc.weight"].T
        else:
            kernel, bias = _folded(tensors, ".".join(path[:-2]))
            arrays[path] = kernel if path[-1] == "kernel" else bias
    nnx.replace_by_pure_dict(state, unflatten_dict(arrays))
    return nnx.merge(graph, state)


def _folded(tensors: Tensors, module: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (height, width, channels, features) and bias of a convolution, by the equation."""
    gain, shift, mean, variance = (
        tensors[f"{module}.bn.{name}"].astype(np.float64) for name in NORMALISATION
    )
    scale = gain / np.sqrt(variance + EPSILON)
    kernel = tensors[f"{module}.conv.weight"].astype(np.float64).transpose(2, 3, 1, 0) * scale
    return kernel.astype(np.float32), (shift - scale * mean).astype(np.float32)


def _check(tensors: Tensors, shapes: dict[tuple[str, ...], tuple[int, ...]], source: str) -> None:
    """Raises UserError for tensors that are not those of modules of these shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        if path[:-1] == ("fc",):
            expected |= {"fc.weight": shape[::-1], "fc.bias": shape[1:]}
        elif path[-1] == "kernel":
            module = ".".join(path[:-2])
            height, width, channels, features = shape
            expected[f"{module}.conv.weight"] = (features, channels, height, width)
            expected |= {f"{module}.bn.{name}": (features,) for name in NORMALISATION}
    wanted = "the Inception network of 2015, as pytorch-fid has it (torchvision's own is another)"
    check_tensors(tensors, expected, source, wanted)
