"""The Inception-v3 network of 2015 (Szegedy et al., arXiv 1512.00567) that FID is defined on.

It is the graph `inception-2015-12-05`, and differs from later ones: 1008 classes; average pools
that leave the padding out of the mean; a maximum in the last block where the paper has an average;
images resized to 299 x 299 by TensorFlow 1's bilinear rule. The modules have the names of
torchvision and pytorch-fid, by which its weights are read:

    pool      mean of Mixed_7c over 8 x 8 places, pool_3 of the graph     2048
    spatial   first 7 channels of Mixed_6d.branch1x1, mixed_6/conv        17 x 17 x 7 = 2023
    logits    pool times fc.weight, without the bias, as ADM's evaluator  1008

A convolution and the batch normalisation after it are one here: the normalisation's scale goes into
the kernel and its shift into the bias when weights are read (metrics/inception_weights.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.errors import unknown_name
from dydilit_jax.metrics.features import Features, to_levels
from dydilit_jax.metrics.resizing import half_pixel, resize, tf1

SIZE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7

Padding = tuple[int, int]


class BasicConv2d(nnx.Module):
    """Convolution, its normalisation folded in, and ReLU."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: tuple[int, int],
        *,
        stride: int = 1,
        padding: Padding = (0, 0),
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            channels,
            features,
            kernel,
            strides=stride,
            padding=[(padding[0], padding[0]), (padding[1], padding[1])],
            # Features in less would be other features: neither bfloat16 on TPUs nor TF32 on GPUs.
            precision=jax.lax.Precision.HIGHEST,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, H, W, channels) to (n, h, w, features)."""
        return jax.nn.relu(self.conv(x))


def max_pool(x: jax.Array, stride: int) -> jax.Array:
    """Maximum over 3 x 3; with stride 1 of the same size."""
    return nnx.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


def average_pool(x: jax.Array) -> jax.Array:
    """Mean over 3 x 3, of the same size, over the places that are there."""
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of a branch: features, kernel's height and width, stride.

    With stride 1 the size stays, with stride 2 nothing is padded.
    """

    features: int
    height: int
    width: int
    stride: int = 1

    def build(self, channels: int, rngs: nnx.Rngs) -> BasicConv2d:
        """The module, of an input of so many channels."""
        padding = (self.height // 2, self.width // 2) if self.stride == 1 else (0, 0)
        return BasicConv2d(
            channels,
            self.features,
            (self.height, self.width),
            stride=self.stride,
            padding=padding,
            rngs=rngs,
        )


Branch = dict[str, Conv]


class Mixed(nnx.Module):
    """Branches side by side, joined by channels.

    Args:
      channels: of the input.
      branches: each a chain of named convolutions; where the last two names of a chain end in `a`
        and `b`, both are of what the chain came to before, and joined.
      pool: `average` or `max`, then a convolution `branch_pool`; `stride` a maximum of stride 2.
      pool_features: of `branch_pool`.
    """

    def __init__(
        self,
        channels: int,
        branches: tuple[Branch, ...],
        pool: str,
        pool_features: int = 0,
        *,
        rngs: nnx.Rngs,
    ):
        self.chains = tuple(tuple(branch) for branch in branches)
        self.pool = pool
        for branch in branches:
            width = channels
            for name, conv in branch.items():
                setattr(self, name, conv.build(width, rngs))
                if not name.endswith("a"):
                    width = conv.features
        if pool != "stride":
            self.branch_pool = Conv(pool_features, 1, 1).build(channels, rngs)

    def branch(self, name: str) -> BasicConv2d:
        """The convolution of that name."""
        return getattr(self, name)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(n, H, W, channels) to (n, h, w, features)."""
        outputs = []
        for chain in self.chains:
            y = x
            split = chain[-1].endswith("b")
            for name in chain[:-2] if split else chain:
                y = getattr(self, name)(y)
            outputs += [getattr(self, name)(y) for name in chain[-2:]] if split else [y]
        if self.pool == "stride":
            outputs.append(max_pool(x, 2))
        else:
            pooled = average_pool(x) if self.pool == "average" else max_pool(x, 1)
            outputs.append(self.branch_pool(pooled))
        return jnp.concatenate(outputs, axis=-1)


def block_a(channels: int, pool_features: int, rngs: nnx.Rngs) -> Mixed:
    """35 x 35: 1 x 1, 5 x 5, two 3 x 3, average."""
    branches: tuple[Branch, ...] = (
        {"branch1x1": Conv(64, 1, 1)},
        {"branch5x5_1": Conv(48, 1, 1), "branch5x5_2": Conv(64, 5, 5)},
        {
            "branch3x3dbl_1": Conv(64, 1, 1),
            "branch3x3dbl_2": Conv(96, 3, 3),
            "branch3x3dbl_3": Conv(96, 3, 3),
        },
    )
    return Mixed(channels, branches, "average", pool_features, rngs=rngs)


def block_b(channels: int, rngs: nnx.Rngs) -> Mixed:
    """35 x 35 to 17 x 17."""
    branches: tuple[Branch, ...] = (
        {"branch3x3": Conv(384, 3, 3, 2)},
        {
            "branch3x3dbl_1": Conv(64, 1, 1),
            "branch3x3dbl_2": Conv(96, 3, 3),
            "branch3x3dbl_3": Conv(96, 3, 3, 2),
        },
    )
    return Mixed(channels, branches, "stride", rngs=rngs)


def block_c(channels: int, width: int, rngs: nnx.Rngs) -> Mixed:
    """17 x 17: 1 x 1, 7 x 7 as 1 x 7 and 7 x 1, twice that, average."""
    branches: tuple[Branch, ...] = (
        {"branch1x1": Conv(192, 1, 1)},
        {
            "branch7x7_1": Conv(width, 1, 1),
            "branch7x7_2": Conv(width, 1, 7),
            "branch7x7_3": Conv(192, 7, 1),
        },
        {
            "branch7x7dbl_1": Conv(width, 1, 1),
            "branch7x7dbl_2": Conv(width, 7, 1),
            "branch7x7dbl_3": Conv(width, 1, 7),
            "branch7x7dbl_4": Conv(width, 7, 1),
            "branch7x7dbl_5": Conv(192, 1, 7),
        },
    )
    return Mixed(channels, branches, "average", 192, rngs=rngs)


def block_d(channels: int, rngs: nnx.Rngs) -> Mixed:
    """17 x 17 to 8 x 8."""
    branches: tuple[Branch, ...] = (
        {"branch3x3_1": Conv(192, 1, 1), "branch3x3_2": Conv(320, 3, 3, 2)},
        {
            "branch7x7x3_1": Conv(192, 1, 1),
            "branch7x7x3_2": Conv(192, 1, 7),
            "branch7x7x3_3": Conv(192, 7, 1),
            "branch7x7x3_4": Conv(192, 3, 3, 2),
        },
    )
    return Mixed(channels, branches, "stride", rngs=rngs)


def block_e(channels: int, pool: str, rngs: nnx.Rngs) -> Mixed:
    """8 x 8: branches that end in 1 x 3 and 3 x 1 side by side, and a pool."""
    branches: tuple[Branch, ...] = (
        {"branch1x1": Conv(320, 1, 1)},
        {
            "branch3x3_1": Conv(384, 1, 1),
            "branch3x3_2a": Conv(384, 1, 3),
            "branch3x3_2b": Conv(384, 3, 1),
        },
        {
            "branch3x3dbl_1": Conv(448, 1, 1),
            "branch3x3dbl_2": Conv(384, 3, 3),
            "branch3x3dbl_3a": Conv(384, 1, 3),
            "branch3x3dbl_3b": Conv(384, 3, 1),
        },
    )
    return Mixed(channels, branches, pool, 192, rngs=rngs)


class Inception(nnx.Module):
    """The network, from images of its own size and range to features."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, (3, 3), stride=2, rngs=rngs)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, (3, 3), rngs=rngs)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, (3, 3), padding=(1, 1), rngs=rngs)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, (1, 1), rngs=rngs)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, (3, 3), rngs=rngs)
        self.Mixed_5b = block_a(192, 32, rngs)
        self.Mixed_5c = block_a(256, 64, rngs)
        self.Mixed_5d = block_a(288, 64, rngs)
        self.Mixed_6a = block_b(288, rngs)
        self.Mixed_6b = block_c(768, 128, rngs)
        self.Mixed_6c = block_c(768, 160, rngs)
        self.Mixed_6d = block_c(768, 160, rngs)
        self.Mixed_6e = block_c(768, 192, rngs)
        self.Mixed_7a = block_d(768, rngs)
        self.Mixed_7b = block_e(1280, "average", rngs)
        self.Mixed_7c = block_e(2048, "max", rngs)
        self.fc = nnx.Linear(
            2048, CLASSES, use_bias=False, precision=jax.lax.Precision.HIGHEST, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> Features:
        """Images (n, 299, 299, 3) in about [-1, 1] (others of 75 or more too, but for spatial)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool(x, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool(x, 2))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch("branch1x1")(x)[..., :SPATIAL_CHANNELS]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = x.mean(axis=(1, 2))
        return Features(pool, spatial.reshape(len(x), -1), self.fc(pool))


def prepare_adm(levels: jax.Array) -> jax.Array:
    """Levels (n, H, W, 3) in [0, 255] to the network's input, as the graph itself does it."""
    return (resize(levels, SIZE, tf1) - 128.0) / 128.0


def prepare_pytorch_fid(levels: jax.Array) -> jax.Array:
    """The same as pytorch-fid does it, with half pixels and 2 x - 1 of levels / 255."""
    return 2.0 * resize(levels / 255.0, SIZE, half_pixel) - 1.0


VARIANTS = {"adm": prepare_adm, "pytorch_fid": prepare_pytorch_fid}


class InceptionExtractor:
    """The network with its weights; an `Extractor`.

    Args:
      network: filled with weights.
      checksum: of their file.
      variant: how images are prepared, of VARIANTS.

    Raises:
      UserError: an unknown variant.
    """

    name = "inception"
    width = 2048
    spatial_width = 17 * 17 * SPATIAL_CHANNELS
    num_classes = CLASSES

    def __init__(self, network: Inception, checksum: str, variant: str = "adm"):
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        self.checksum = checksum
        self.description = f"inception-2015-12-05, images as {variant}, float32"
        self._prepare = VARIANTS[variant]
        self._graph, self.parameters = nnx.split(network)

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Features of images (n, H, W, C)."""
        network = nnx.merge(self._graph, parameters)
        return network(self._prepare(to_levels(images)))
