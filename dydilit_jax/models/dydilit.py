"""DyDi-LiT: the diffusion transformer around a token mixer (arXiv 2601.13683; DiT, 2212.09748).

    tokens = patches W + position;   c = embed(time) + embed(label)
    block: x += gate_1 * mix(modulate(norm(x), c));  x += gate_2 * feed(modulate(norm(x), c))
    output = linear(modulate(norm(x), c)), folded back into an image

Shifts, scales and gates come from c through a linear map that starts at zero (adaLN-zero).
Blocks are stacked along a leading axis and scanned.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydilit_jax.errors import UserError
from dydilit_jax.kernels.rotary import Rotation, axial_rotation
from dydilit_jax.models.attention.projections import Context, Telemetry
from dydilit_jax.models.attention.registry import ATTENTION_MODULES
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.embeddings import LabelEmbedding, TimeEmbedding, sincos_position
from dydilit_jax.models.feedforward import FEEDFORWARD_MODULES
from dydilit_jax.models.linear import Linear
from dydilit_jax.models.placement import place
from dydilit_jax.models.rematerialisation import POLICIES

NORM_EPS = 1e-6


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """(B, H, W, C) to (B, H/p * W/p, p * p * C), a patch's values in row, column, channel order."""
    batch, height, width, channels = images.shape
    split = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of `patchify` for a grid (rows, columns) of tokens."""
    batch = tokens.shape[0]
    split = tokens.reshape(batch, *grid, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(batch, grid[0] * patch, grid[1] * patch, -1)


def layer_norm(x: jax.Array) -> jax.Array:
    """Normalises the last axis to mean 0 and variance 1 without gain or bias; same dtype."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    centred = x.astype(dtype) - jnp.mean(x.astype(dtype), axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + NORM_EPS)).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift, with shift and scale (B, D) for x (B, N, D)."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


class Modulation(nnx.Module):
    """adaLN-zero: `parts` vectors (B, D) from the conditioning (B, D), all zero at the start."""

    def __init__(self, width: int, parts: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.parts = parts
        zeros = nnx.initializers.zeros
        self.linear = Linear(width, parts * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        """Shifts, scales and gates for a conditioning (B, D), each (B, D)."""
        return jnp.split(self.linear(jax.nn.silu(condition)), self.parts, axis=-1)


class Block(nnx.Module):
    """A transformer block, modulated by the conditioning."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.attention = ATTENTION_MODULES[config.attention.kind](config, rngs=rngs)
        self.feedforward = FEEDFORWARD_MODULES[config.feedforward.kind](config, rngs=rngs)
        self.modulation = Modulation(config.width, 6, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, condition: jax.Array, context: Context
    ) -> tuple[jax.Array, Telemetry]:
        """Tokens (B, N, D) and conditioning (B, D) to tokens (B, N, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition)
        mixed, telemetry = self.attention(modulate(layer_norm(x), shift_1, scale_1), context)
        x = x + gate_1[:, None] * mixed
        x = x + gate_2[:, None] * self.feedforward(modulate(layer_norm(x), shift_2, scale_2))
        return x, telemetry


class FinalLayer(nnx.Module):
    """From tokens to the values of their patches; zero at the start."""

    def __init__(self, config: ModelConfig, out_channels: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        zeros = nnx.initializers.zeros
        self.modulation = Modulation(config.width, 2, dtype=dtype, rngs=rngs)
        self.linear = Linear(
            config.width,
            config.patch_size**2 * out_channels,
            kernel_init=zeros,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Tokens (B, N, D) and conditioning (B, D) to patches (B, N, p * p * out_channels)."""
        shift, scale = self.modulation(condition)
        return self.linear(modulate(layer_norm(x), shift, scale))


class DyDiLiT(nnx.Module):
    """The network: noisy images, their times and labels to the process's prediction.

    Args:
      config: what to build.
      out_channels: channels of the output; the config's `channels`, or twice as many for a
        process with learned variance.
    """

    def __init__(self, config: ModelConfig, out_channels: int | None = None, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.patch_embed = Linear(
            config.patch_size**2 * config.channels,
            config.width,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=dtype,
            rngs=rngs,
        )
        self.time_embed = TimeEmbedding(
            config.width, config.time_frequency_shift, dtype=dtype, rngs=rngs
        )
        self.label_embed = LabelEmbedding(config.num_classes, config.width, dtype=dtype, rngs=rngs)
        make = nnx.vmap(lambda layer: Block(config, rngs=layer), in_axes=0, out_axes=0)
        self.blocks = make(rngs.split(config.depth))
        self.final = FinalLayer(config, out_channels or config.channels, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        labels: jax.Array,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Telemetry]:
        """Predicts for noisy images.

        Args:
          images: (B, H, W, C) of any floating dtype.
          time: (B,), as the process feeds it (DiT: 0 to 1000).
          labels: (B,) int; `config.null_label` for no label.
          key: PRNG key of the routers' noise while training; None when sampling.

        Returns:
          The prediction (B, H, W, out_channels) in float32 (float64 for float64 computation), and
          telemetry with a leading axis of layers.

        Raises:
          UserError: images of another shape than the config's.
        """
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != expected:
            raise UserError(f"images have shape {images.shape[1:]}, the network expects {expected}")
        dtype = jnp.dtype(config.dtype)
        x = self.patch_embed(patchify(images.astype(dtype), config.patch_size))
        if config.position == "sincos":
            x = x + jnp.asarray(sincos_position(config.grid, config.width), dtype)
        condition = place(self.time_embed(time) + self.label_embed(labels), "condition")
        x, telemetry = self.run_blocks(x, condition, key)
        tokens = self.final(x, condition)
        tokens = tokens.astype(jnp.promote_types(dtype, jnp.float32))
        return unpatchify(tokens, config.patch_size, config.grid), telemetry

    def rotation(self) -> Rotation | None:
        """Rotary angles of the token grid, if the config asks for them."""
        if self.config.position != "rope":
            return None
        return axial_rotation(self.config.grid, self.config.width // self.config.attention.heads)

    def run_blocks(
        self, x: jax.Array, condition: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Telemetry]:
        """Tokens (B, N, D) through all blocks, scanned or unrolled, rematerialised or not."""
        config = self.config
        graph, layers = nnx.split(self.blocks)
        rotation = self.rotation()
        keys = None if key is None else jax.random.split(key, config.depth)

        def block(x: jax.Array, layer: tuple) -> tuple[jax.Array, Telemetry]:
            parameters, layer_key = layer
            context = Context(rotation, layer_key)
            x, telemetry = nnx.merge(graph, parameters)(place(x, "tokens"), condition, context)
            return place(x, "tokens"), telemetry

        if config.rematerialisation != "none":
            policy = POLICIES[config.rematerialisation]
            block = jax.checkpoint(block, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:
            return jax.lax.scan(block, x, (layers, keys))
        collected = []
        for i in range(config.depth):
            x, telemetry = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], (layers, keys)))
            collected.append(telemetry)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)


def parameter_count(parameters: object) -> int:
    """Number of parameters in a tree of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
