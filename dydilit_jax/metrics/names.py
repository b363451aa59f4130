"""The scores, and what they are called."""

from __future__ import annotations

# frechet            Frechet distance of Features.pool: FID of Inception's
# spatial_frechet    of Features.spatial: sFID
# inception_score    of Features.logits, in splits of 5,000 in the images' order, as ADM
# kernel             kernel distance of Features.pool with its standard error: KID
# precision_recall   improved precision and recall (k = 3) of Features.pool
SCORES = ("frechet", "spatial_frechet", "inception_score", "kernel", "precision_recall")

# What is called FID is one network's; another's scores bear its name: `dinov2_frechet` is what
# papers call FDD or FD-DINOv2, `dinov2_kernel` the same in place of KID.
INCEPTION = "inception"
INCEPTION_NAMES = {
    "frechet": "fid",
    "spatial_frechet": "sfid",
    "score": "inception_score",
    "score_std": "inception_score_std",
    "kernel": "kid",
    "kernel_standard_error": "kid_standard_error",
    "precision": "precision",
    "recall": "recall",
}


def score_name(extractor: str, score: str) -> str:
    """What a score, a key of INCEPTION_NAMES, is called with the features of an extractor."""
    return INCEPTION_NAMES[score] if extractor == INCEPTION else f"{extractor}_{score}"
