"""Rotary position encoding on a two-dimensional token grid (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dydilit_jax.errors import UserError


class Rotation(NamedTuple):
    """Cosine and sine of every token's angles: two (N, d / 2) arrays."""

    cos: jax.Array
    sin: jax.Array


def axial_rotation(grid: tuple[int, int], head_width: int, base: float = 10_000.0) -> Rotation:
    """Angles of a grid (rows, columns): the first half turns with the row, the second the column.

    Args:
      grid: rows and columns of tokens.
      head_width: d, a multiple of four.
      base: the longest period over 2 pi.

    Raises:
      UserError: `head_width` is not a multiple of four.
    """
    if head_width % 4:
        raise UserError(
            f"rotary position needs a head width divisible by 4, got {head_width}: "
            "change model.width or model.attention.heads"
        )
    quarter = head_width // 4
    frequency = base ** (-np.arange(quarter) / quarter)
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = np.concatenate(
        [rows.reshape(-1, 1) * frequency, columns.reshape(-1, 1) * frequency], axis=-1
    )
    return Rotation(
        jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    )


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns the pairs (x_j, x_{j + d/2}) of x (B, N, H, d) by their token's angles; same dtype."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos = rotation.cos[:, None, :].astype(dtype)
    sin = rotation.sin[:, None, :].astype(dtype)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.astype(x.dtype)
