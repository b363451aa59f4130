"""Token mixers by name."""

from __future__ import annotations

from dydilit_jax.models.attention.dydila import DyDiLA
from dydilit_jax.models.attention.linear import LinearAttention
from dydilit_jax.models.attention.softmax import SoftmaxAttention

ATTENTION_MODULES = {
    "dydila": DyDiLA,
    "relu": LinearAttention,
    "focused": LinearAttention,
    "softmax": SoftmaxAttention,
}
