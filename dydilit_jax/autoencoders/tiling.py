"""Decoding large latents tile by tile, so that memory depends on the tile and not on the image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dydilit_jax.errors import UserError


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start: steps of tile - overlap, the last one moved back to end at `size`."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def ramp(start: int, length: int, size: int, overlap: int) -> np.ndarray:
    """Weights of a tile's pixels: 1, falling linearly to the edges it shares with other tiles.

    Never zero, so that a pixel of one tile alone is that tile's.
    """
    weights = np.ones(length, np.float32)
    slope = (np.arange(overlap, dtype=np.float32) + 0.5) / max(overlap, 1)
    if start > 0:
        weights[:overlap] = slope
    if start + length < size:
        weights[length - overlap :] = np.minimum(weights[length - overlap :], slope[::-1])
    return weights


def decode_tiled(
    decode: Callable[[np.ndarray], np.ndarray],
    latents: np.ndarray,
    *,
    downsampling: int,
    tile: int = 64,
    overlap: int = 16,
) -> np.ndarray:
    """Decodes in overlapping tiles of one shape and blends them linearly where they overlap.

    Latents that fit one tile give exactly `decode(latents)`. Larger ones give something close to it
    but not the same: normalisation and attention see a tile in place of the image. Where a decoder
    looks at each latent alone, the result is the same.

    Args:
      decode: latents (B, h, w, c) to images (B, downsampling h, downsampling w, C), jitted; it is
        compiled for one shape, because all tiles have it.
      latents: (B, h, w, c).
      downsampling: the autoencoder's.
      tile: side of a tile in latents; 64 is an image of 512 pixels at downsampling 8.
      overlap: latents that neighbouring tiles share, less than half of `tile`.

    Returns:
      Images (B, H, W, C) float32, in the host's memory.

    Raises:
      UserError: an overlap that leaves tiles no room.
    """
    if not 0 <= overlap <= tile // 2 or tile < 1:
        raise UserError(f"tile overlap {overlap} must be from 0 to half the tile, {tile // 2}")
    batch, height, width, _ = latents.shape
    tall, wide = min(tile, height), min(tile, width)
    if (tall, wide) == (height, width):
        return np.asarray(decode(latents), np.float32)
    total: np.ndarray | None = None
    weight = np.zeros((height * downsampling, width * downsampling, 1), np.float32)
    for top in tile_starts(height, tile, overlap):
        rows = ramp(*(downsampling * n for n in (top, tall, height, overlap)))
        for left in tile_starts(width, tile, overlap):
            columns = ramp(*(downsampling * n for n in (left, wide, width, overlap)))
            part = decode(latents[:, top : top + tall, left : left + wide])
            image = np.asarray(part, np.float32)
            if total is None:
                total = np.zeros((batch, *weight.shape[:2], image.shape[-1]), np.float32)
            place = np.s_[
                top * downsampling : (top + tall) * downsampling,
                left * downsampling : (left + wide) * downsampling,
            ]
            share = rows[:, None, None] * columns[None, :, None]
            total[:, *place] += share * image
            weight[place] += share
    assert total is not None
    return total / weight
