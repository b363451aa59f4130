"""DINOv2's vision transformer (Oquab et al., arXiv 2304.07193) as a network of features.

Stein et al. (arXiv 2306.04675) measure generated images by it in place of Inception; the Frechet
distance of ViT-L/14's features is what papers call FDD or FD-DINOv2, `dinov2_frechet` here. With
tokens x_0 = class token, (register tokens, which have no position,) patches of p x p pixels:

    x = tokens + positions                        the learned grid, interpolated to the input's
    x = x + lambda_1 attention(norm(x)),  x = x + lambda_2 mlp(norm(x))       in every block
    feature = norm(x)[0], the class token                                     S 384, B 768, L 1024,
                                                                              g 1536

The feed-forward layer is W2 gelu(W1 x), in g it is W2 (silu(a) b) with (a, b) = W1 x. Blocks are
stacked along a leading axis and scanned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydilit_jax.errors import unknown_name
from dydilit_jax.metrics.features import Features, to_levels
from dydilit_jax.metrics.resizing import cubic, keys_cubic, resize_levels

SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of levels / 255
EXACT = jax.lax.Precision.HIGHEST  # Neither bfloat16 on TPUs nor TF32 on GPUs, as Inception.

# What is added to the target size when positions are interpolated: the original's guard against
# rounding (torch.hub's models, so dgm-eval and every published FDD), which shifts them a little;
# transformers asks for the size itself. Networks with registers do so in both.
VARIANTS = {"dgm_eval": 0.1, "transformers": 0.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config:
    """Shape of a network.

    Attributes:
      width: of a token.
      depth: number of blocks.
      heads: of the attention.
      hidden: width inside the feed-forward layer.
      swiglu: whether that is gated.
      patch_size: pixels a side.
      grid: side of the grid of learned positions, in patches.
      registers: number of register tokens.
      qkv_bias: whether queries, keys and values have a bias.
      epsilon: of the normalisations.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    swiglu: bool = False
    patch_size: int = 14
    grid: int = 37
    registers: int = 0
    qkv_bias: bool = True
    epsilon: float = 1e-6


def interpolation(grid: int, target: int, offset: float = 0.0) -> np.ndarray:
    """(target, grid) float32: PyTorch's bicubic without antialiasing, a = -3/4, edges repeated.

    Args:
      grid, target: sizes.
      offset: the scale is (target + offset) / grid, as with PyTorch's `scale_factor`.
    """
    source = (np.arange(target) + 0.5) * (grid / (target + offset)) - 0.5
    first = np.floor(source).astype(int) - 1
    weights = np.zeros((target, grid))
    rows = np.arange(target)
    for tap in range(4):
        place = first + tap
        taken = keys_cubic(np.abs(source - place), -0.75)
        np.add.at(weights, (rows, np.clip(place, 0, grid - 1)), taken)
    return weights.astype(np.float32)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = True) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, precision=EXACT, rngs=rngs)


def _norm(config: Dinov2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
    """Attention and feed-forward layer, each scaled by channel."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden
        self.heads, self.swiglu = config.heads, config.swiglu
        self.norm1 = _norm(config, rngs)
        self.query = _linear(width, width, rngs, config.qkv_bias)
        self.key = _linear(width, width, rngs, config.qkv_bias)
        self.value = _linear(width, width, rngs, config.qkv_bias)
        self.out = _linear(width, width, rngs)
        self.scale1 = nnx.Param(jnp.ones(width))
        self.norm2 = _norm(config, rngs)
        self.enter = _linear(width, 2 * hidden if config.swiglu else hidden, rngs)
        self.leave = _linear(hidden, width, rngs)
        self.scale2 = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Tokens (n, N, D)."""
        x = x + self.scale1[...] * self.attention(self.norm1(x))
        return x + self.scale2[...] * self.feedforward(self.norm2(x))

    def attention(self, x: jax.Array) -> jax.Array:
        """softmax(q k^T / sqrt(d)) v by heads."""
        split = (*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        q, k, v = (each(x).reshape(split) for each in (self.query, self.key, self.value))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k, precision=EXACT) / split[-1] ** 0.5
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v, precision=EXACT)
        return self.out(mixed.reshape(x.shape))

    def feedforward(self, x: jax.Array) -> jax.Array:
        """Gated by SiLU, or with the exact GELU."""
        x = self.enter(x)
        if self.swiglu:
            gate, value = jnp.split(x, 2, axis=-1)
            return self.leave(jax.nn.silu(gate) * value)
        return self.leave(jax.nn.gelu(x, approximate=False))


class Dinov2(nnx.Module):
    """The network, from normalised images to the class token."""

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch = nnx.Conv(
            3,
            width,
            (patch, patch),
            strides=patch,
            padding="VALID",
            precision=EXACT,
            rngs=rngs,
        )
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 1 + config.grid**2, width)))
        if config.registers:
            self.register_tokens = nnx.Param(jnp.zeros((1, config.registers, width)))
        make = nnx.vmap(lambda layer: Block(config, rngs=layer), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(config.depth))
        self.norm = _norm(config, rngs)

    def __call__(self, images: jax.Array, offset: float = 0.0) -> jax.Array:
        """Images (n, H, W, 3), normalised, of at least a patch, to (n, D); `offset` of VARIANTS."""
        patches = self.patch(images)
        n, rows, columns, width = patches.shape
        first, others = self.position(rows, columns, offset)
        parts = [
            jnp.broadcast_to(self.class_token[...] + first, (n, 1, width)),
            patches.reshape(n, -1, width) + others,
        ]
        if self.config.registers:
            registers = (n, self.config.registers, width)
            parts.insert(1, jnp.broadcast_to(self.register_tokens[...], registers))
        graph, layers = nnx.split(self.blocks)

        def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x), None

        x, _ = jax.lax.scan(block, jnp.concatenate(parts, axis=1), layers)
        return self.norm(x[:, 0])

    def position(self, rows: int, columns: int, offset: float) -> tuple[jax.Array, jax.Array]:
        """Positions of the class token (1, 1, D) and of rows x columns patches (1, N, D)."""
        positions, grid = self.positions[...], self.config.grid
        first, others = positions[:, :1], positions[:, 1:]
        if rows == columns == grid:
            return first, others
        if self.config.registers:  # These were trained with antialiasing.
            vertical, horizontal = cubic(grid, rows), cubic(grid, columns)
        else:
            vertical, horizontal = (interpolation(grid, each, offset) for each in (rows, columns))
        others = jnp.einsum(
            "ih,hwc,jw->ijc",
            jnp.asarray(vertical),
            others.reshape(grid, grid, -1),
            jnp.asarray(horizontal),
            precision=EXACT,
        )
        return first, others.reshape(1, rows * columns, -1)


def prepare(levels: jax.Array) -> jax.Array:
    """Levels (n, H, W, 3) in [0, 255] to the network's input, as dgm-eval prepares a PNG."""
    resized = resize_levels(levels, SIZE) / 255.0
    return (resized - jnp.array(MEAN)) / jnp.array(DEVIATION)


class Dinov2Extractor:
    """The network with its weights; an `Extractor`.

    Args:
      network: filled with weights.
      checksum: of their file.
      variant: how positions are interpolated, of VARIANTS.

    Raises:
      UserError: an unknown variant.
    """

    name = "dinov2"
    spatial_width = 0
    num_classes = 0

    def __init__(self, network: Dinov2, checksum: str, variant: str = "dgm_eval"):
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        config = network.config
        self.width = config.width
        self.checksum = checksum
        self.description = (
            f"DINOv2 of width {config.width}, depth {config.depth}, {config.heads} heads, patches "
            f"of {config.patch_size}, {config.registers} registers, class token, {SIZE} x {SIZE}, "
            f"positions as {variant}, float32"
        )
        self._offset = VARIANTS[variant]
        self._graph, self.parameters = nnx.split(network)

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Features of images (n, H, W, C)."""
        network = nnx.merge(self._graph, parameters)
        return Features(network(prepare(to_levels(images)), self._offset))
