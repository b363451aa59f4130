"""Networks of features by name."""

from __future__ import annotations

from dydilit_jax.errors import unknown_name
from dydilit_jax.metrics.dinov2_weights import load_dinov2
from dydilit_jax.metrics.features import Extractor
from dydilit_jax.metrics.inception_weights import load_inception

EXTRACTORS = ("inception", "dinov2")


def load_extractor(
    name: str, weights: str = "", *, sha256: str = "", variant: str = ""
) -> Extractor:
    """An extractor with its weights.

    Args:
      name: one of EXTRACTORS.
      weights: a file, or a folder with one; empty: fetched (a pinned file with a known checksum,
        kept in the user's cache). Inception's is pytorch-fid's .pth; DINOv2's a folder in
        transformers' layout, or a name like `dinov2-base` (default: `dinov2-large`).
      sha256: checksum that the file must have; default: the known one where it is fetched.
      variant: how images are prepared: of `inception` `adm` (default: TensorFlow's resizing, as
        ADM's evaluator, torch-fidelity and the first FID) or `pytorch_fid`; how positions are
        interpolated, of `dinov2`: `dgm_eval` (default: as torch.hub's networks) or `transformers`.

    Raises:
      UserError: an unknown name or variant; weights that cannot be found, fetched or read, or have
        another checksum.
    """
    if name == "inception":
        return load_inception(weights, sha256=sha256, variant=variant or "adm")
    if name == "dinov2":
        return load_dinov2(weights, sha256=sha256, variant=variant or "dgm_eval")
    raise unknown_name("extractor", name, EXTRACTORS)
