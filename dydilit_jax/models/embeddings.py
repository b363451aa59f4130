"""Embeddings of patches' positions, of time and of labels, as DiT (arXiv 2212.09748) has them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydilit_jax.models.linear import Linear

FREQUENCIES = 256  # width of the sinusoidal time embedding before its network
MAX_PERIOD = 10_000.0


def sincos_position(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed 2D sine-cosine table, (rows * columns, width) float32.

    The first half of the channels encodes the column, the second the row, each as sines then
    cosines (the order of DiT's and MAE's tables).
    """
    frequency = MAX_PERIOD ** (-np.arange(width // 4) / (width // 4))

    def encode(position: np.ndarray) -> np.ndarray:
        angles = position.reshape(-1, 1) * frequency
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    return np.concatenate([encode(columns), encode(rows)], axis=1).astype(np.float32)


def time_frequencies(frequencies: int = FREQUENCIES, shift: int = 0) -> np.ndarray:
    """Frequencies of `sinusoidal_time`, (frequencies / 2,) float64, from 1 downwards.

    The i-th is 10000^(-i / (frequencies / 2 - shift)); shift 1 reaches 1/10000, 0 not quite.
    """
    half = frequencies // 2
    return MAX_PERIOD ** (-np.arange(half) / (half - shift))


def sinusoidal_time(time: jax.Array, frequencies: int = FREQUENCIES, shift: int = 0) -> jax.Array:
    """Cosines then sines of time at geometric frequencies: (B,) to (B, frequencies) float32."""
    frequency = jnp.asarray(time_frequencies(frequencies, shift), jnp.float32)
    angles = time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids of time through a two-layer network: (B,) to (B, width)."""

    def __init__(self, width: int, frequency_shift: int = 0, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.frequency_shift = frequency_shift
        init = nnx.initializers.normal(0.02)
        self.hidden = Linear(FREQUENCIES, width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(self, time: jax.Array) -> jax.Array:
        """Embeds times (B,)."""
        sinusoids = sinusoidal_time(time, shift=self.frequency_shift)
        return self.out(jax.nn.silu(self.hidden(sinusoids)))


class LabelEmbedding(nnx.Module):
    """A table of num_classes + 1 rows, the last for the dropped label: (B,) int to (B, width)."""

    def __init__(self, num_classes: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.table = nnx.Embed(
            num_classes + 1,
            width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, labels: jax.Array) -> jax.Array:
        """Embeds labels (B,)."""
        # Rows first, then the dtype: their gradients are added up in the table's own.
        return self.table.embedding[...][labels].astype(self.table.dtype)
