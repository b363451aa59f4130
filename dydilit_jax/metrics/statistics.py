"""What the features of many images come to, of samples or of what they are compared with."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import FeatureSpace
from dydilit_jax.metrics.frechet import Moments
from dydilit_jax.metrics.names import INCEPTION
from dydilit_jax.metrics.rows import KeptRows


class Statistics(NamedTuple):
    """What all processes' rows come to: number of images, moments of pool and spatial features."""

    num_images: int
    pool: Moments
    spatial: Moments | None


def check_name(name: str, extractor: FeatureSpace) -> None:
    """Raises UserError where a reference's features are of another network than the extractor."""
    if name != extractor.name:
        raise UserError(
            f"the reference holds features of {name}, the samples are seen by {extractor.name}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    Attributes:
      extractor: name of the extractor; empty where the file does not say (ADM's: `inception`).
      extractor_checksum: of its weights; empty where the file does not say.
      description: the extractor's, which tells how images were prepared; likewise.
      pool: moments of pool features.
      spatial: of spatial features; None without.
      count: images that the moments are of; 0 where the file does not say.
      rows: this process's pool features of images, for precision, recall and kernel distance;
        None without.
      checksum: sha256 of the file that it was read from; empty where it was computed.
      image_shape: (H, W, C) of the images; None where it is not known (moments alone, made
        elsewhere).
    """

    extractor: str
    extractor_checksum: str
    description: str
    pool: Moments
    spatial: Moments | None
    count: int
    rows: KeptRows | None
    checksum: str = ""
    image_shape: tuple[int, ...] | None = None

    def check(self, extractor: FeatureSpace) -> None:
        """Raises UserError where another extractor made the features."""
        check_name(self.extractor or INCEPTION, extractor)
        if self.extractor_checksum not in ("", extractor.checksum):
            raise UserError(
                f"the reference's features are of weights {self.extractor_checksum}, the samples' "
                f"of {extractor.checksum}: make the reference again, or use its weights"
            )
        if self.description not in ("", extractor.description):
            raise UserError(
                f"the reference's features are of {self.description!r}, the samples' of "
                f"{extractor.description!r}: make the reference again, or use its variant"
            )
