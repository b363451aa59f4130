"""From the bytes of an image to what the network sees, as ADM (arXiv 2105.05233) prepares images.

Pixel for pixel, with the same Pillow, what ADM, DiT and SiT train on: EXIF orientation is not
applied, and an alpha channel is dropped.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from dydilit_jax.errors import UserError

# The modes of images of one and of three channels.
MODES = {1: "L", 3: "RGB"}


def decode_image(data: bytes, channels: int = 3) -> Image.Image:
    """An encoded image (JPEG, PNG, ...) as RGB or, with one channel, as grey levels.

    Grey, CMYK, palette and alpha images are converted. Sixteen bits keep their upper eight.

    Raises:
      UserError: bytes that are no image, or a truncated one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of transparency in palettes, of broken EXIF data.
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert(MODES[channels])
    except UnidentifiedImageError as error:
        raise UserError(f"{len(data)} bytes that are no image") from error
    # What Pillow's decoders raise for damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"a damaged image ({error})") from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square, scaled to `size`: halved by box filters, then bicubic.

    While the shorter side is at least twice `size`, the image is halved with a box filter; the rest
    of the way, up or down, is bicubic; then the middle is cut out.

    Args:
      image: of any size.
      size: side of the result.

    Returns:
      (size, size, 3) uint8, or (size, size, 1) of grey levels.
    """
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size].reshape(size, size, -1)


def normalize(pixels: np.ndarray) -> np.ndarray:
    """Levels 0 to 255 (uint8) as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
