"""Grids of images with a title and labels, as PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN = 4
TEXT = 15


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Images (..., C) in [-1, 1] as 0 to 255; what lies outside is clipped."""
    return np.round((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def draw_grid(
    images: np.ndarray,
    *,
    columns: int,
    title: str = "",
    labels: list[str] | None = None,
    tile: int = 64,
) -> np.ndarray:
    """Draws images row by row, enlarged to about `tile` pixels where they are smaller.

    Args:
      images: (n, H, W, C) in [-1, 1]; of any C but 3 the first channel is drawn, in grey.
      columns: images in a row.
      title: a line above the grid.
      labels: (n,) a word above each image; None for no words.
      tile: side to enlarge to, by a whole factor.

    Returns:
      (height, width, 3) uint8.
    """
    count, height, width, channels = images.shape
    pixels = to_uint8(images if channels == 3 else np.repeat(images[..., :1], 3, axis=-1))
    factor = max(1, tile // max(height, width))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    rows = -(-count // columns)
    word = TEXT if labels else 0
    top = MARGIN + (TEXT + MARGIN if title else 0)
    font = ImageFont.load_default(size=12)
    needed = int(font.getlength(title)) + 2 * MARGIN
    canvas = Image.new(
        "RGB",
        (
            max(needed, MARGIN + columns * (width + MARGIN)),
            top + rows * (height + word + MARGIN),
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, MARGIN), title, fill="black", font=font)
    for i in range(count):
        left = MARGIN + (i % columns) * (width + MARGIN)
        upper = top + (i // columns) * (height + word + MARGIN)
        if labels:
            draw.text((left, upper), labels[i], fill="black", font=font)
        canvas.paste(Image.fromarray(pixels[i]), (left, upper + word))
    return np.asarray(canvas)


def save_png(picture: np.ndarray, path: Path) -> None:
    """Writes a picture (H, W, 3) uint8."""
    Image.fromarray(picture).save(path)
