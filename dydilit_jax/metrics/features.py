"""What images are compared by: features of a network, and what a network of features is here.

Every score is one of features: FID is the Frechet distance of `Features.pool` of the 2015
Inception network, sFID of `Features.spatial`, the Inception Score is one of `Features.logits`;
another network (DINOv2, a classifier) comes in by the same Protocol.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Features(NamedTuple):
    """Features of n images, each (n, ...) float32, on devices or (numpy) on the host.

    Attributes:
      pool: (n, D), one vector an image; 2048 of Inception's.
      spatial: (n, S) with places kept; Inception's 7 channels of 17 x 17, 2023; None without.
      logits: (n, K) over classes; Inception's 1008 without their bias; None without.
    """

    pool: jax.Array
    spatial: jax.Array | None = None
    logits: jax.Array | None = None


class FeatureSpace(Protocol):
    """What features are of, and how many: all that scores know of a network.

    Attributes:
      name: what scores are named after (names.score_name): `inception` alone makes `fid`.
      description: what was computed, for a report: network, resizing, dtype.
      checksum: sha256 of the file of weights, in hexadecimal digits; of what defines the features
        where there is no file.
      width: D of `Features.pool`.
      spatial_width: S of `Features.spatial`; 0 without.
      num_classes: K of `Features.logits`; 0 without.
    """

    name: str
    description: str
    checksum: str
    width: int
    spatial_width: int
    num_classes: int


class Extractor(FeatureSpace, Protocol):
    """A network from images to features.

    Attributes:
      parameters: tree of arrays that `apply` is given back.
    """

    parameters: Any

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Features of images, a pure function to be compiled.

        Args:
          parameters: as the attribute.
          images: (n, H, W, C), C 1 or 3, as `to_levels` takes them.
        """
        ...


def to_levels(images: jax.Array) -> jax.Array:
    """Images as float32 in [0, 255], whole numbers, in three channels.

    Args:
      images: (n, H, W, C), C 1 or 3; uint8, or floating in [-1, 1] and beyond, which is clipped and
        rounded as drawing.to_uint8 does it: a sample scores as the PNG of it would.

    Returns:
      (n, H, W, 3) float32; a single channel is repeated.

    Raises:
      ValueError: images of another dtype or number of channels.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (n, H, W, 1 or 3), got {images.shape}")
    if jnp.issubdtype(images.dtype, jnp.floating):
        levels = jnp.round((jnp.clip(images.astype(jnp.float32), -1.0, 1.0) + 1.0) * 127.5)
    elif images.dtype == jnp.uint8:
        levels = images.astype(jnp.float32)
    else:
        raise ValueError(f"images must be uint8 or floating, got {images.dtype}")
    return jnp.broadcast_to(levels, (*levels.shape[:-1], 3))


def compile_extractor(extractor: Extractor, mesh: Mesh) -> Callable[[Any], Features]:
    """A jitted function from images (n, H, W, C) to features, each device taking n / mesh.size.

    The parameters lie on every device. Images may be numpy's (with several processes the same on
    each, or global arrays); n must be a multiple of mesh.size.
    """
    everywhere = NamedSharding(mesh, P())
    by_device = NamedSharding(mesh, P(mesh.axis_names))
    parameters = jax.device_put(extractor.parameters, everywhere)

    def apply(parameters: Any, images: jax.Array) -> Features:
        images = jax.lax.with_sharding_constraint(images, by_device)
        return extractor.apply(parameters, images)

    compiled = jax.jit(apply, out_shardings=by_device)
    return lambda images: compiled(parameters, images)
