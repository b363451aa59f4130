"""Other people's weights and ours, as files: reading, writing and inheriting them."""

from __future__ import annotations

from dydilit_jax.models.pretrained.api import (
    Pretrained,
    load_pretrained,
    read_pretrained,
    save_pretrained,
)
from dydilit_jax.models.pretrained.inherit import inherit

__all__ = ["Pretrained", "inherit", "load_pretrained", "read_pretrained", "save_pretrained"]
