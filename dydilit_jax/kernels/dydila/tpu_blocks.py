"""What all steps of the TPU kernels are made of: the static plan, products, chunks, masks.

A block holds all channels of some tokens, transposed: (H, d, block), channels on sublanes, tokens
on lanes, so that a head is a leading index, a norm over a token is a sum over sublanes, and a
token's scalars (exponent, lambda, denominator) are rows (1, block). Elementwise work goes through
a block in chunks of channels that fit in registers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Refs = dict[str, Any]  # references into VMEM by name
SUBLANES = 8

CONTRACT_LANES = (((1,), (1,)), ((), ()))  # (m, k), (n, k) -> (m, n)
CONTRACT_ROWS = (((0,), (0,)), ((), ()))  # (k, m), (k, n) -> (m, n)
MATRIX = (((1,), (0,)), ((), ()))  # (m, k), (k, n) -> (m, n)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call; its arrays are (B, H, d, N) with N tokens on this device.

    Attributes:
      batch, heads, head_width, tokens: B, H, d, N.
      total_tokens: tokens of the whole sequence, over which means are taken.
      block: tokens of a block.
      normalizer, training, eps: as in CoreOptions.
      groups: H where norms run over a head, 1 where over the token.
      measured: False means phi = relu.
      choices: n, lambdas to choose from; 0 without Q' and K', 1 for a single lambda.
      noisy: the routers' logits get noise from an input.
      dtype: of the activations, and of the operands of the large products.
    """

    batch: int
    heads: int
    head_width: int
    tokens: int
    total_tokens: int
    block: int
    normalizer: str
    training: str
    eps: float
    groups: int
    measured: bool
    choices: int
    noisy: bool
    dtype: Any

    @property
    def differential(self) -> bool:
        """Whether there are Q' and K'."""
        return self.choices > 0

    @property
    def routed(self) -> bool:
        """Whether lambdas are chosen by routers."""
        return self.choices > 1

    @property
    def divides(self) -> bool:
        """Whether the output is divided by a product with the keys' mean."""
        return self.normalizer in ("base", "signed")

    @property
    def blocks(self) -> int:
        """Blocks along the tokens."""
        return pl.cdiv(self.tokens, self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block reaches beyond the tokens."""
        return self.tokens % self.block != 0

    @property
    def chunk(self) -> int:
        """Channels of a chunk: d itself up to 96, else its largest divisor that tiles bfloat16."""
        if self.head_width <= 96:
            return self.head_width
        sizes = [c for c in range(16, 97, 16) if self.head_width % c == 0]
        return max(sizes, default=self.head_width)

    @property
    def chunks(self) -> int:
        """Chunks of a head."""
        return self.head_width // self.chunk


def dot(
    left: jax.Array, right: jax.Array, dimensions: Any = MATRIX, *, dtype: Any = jnp.float32
) -> jax.Array:
    """A product summed in float32 of operands rounded to `dtype`; float32 operands are exact."""
    exact = dtype == jnp.float32
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        dimensions,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def split_rows(row: jax.Array, dtype: Any) -> jax.Array:
    """A float32 row (1, n) as the sum of eight rows of `dtype`: an exact operand of a product."""
    index = lax.broadcasted_iota(jnp.int32, (SUBLANES, row.shape[1]), 0)
    rows = jnp.broadcast_to(row, index.shape)
    if dtype == jnp.float32:
        return jnp.where(index == 0, rows, 0.0)
    high = rows.astype(dtype).astype(jnp.float32)
    middle = (rows - high).astype(dtype).astype(jnp.float32)
    low = rows - high - middle
    parts = jnp.where(index == 0, high, jnp.where(index == 1, middle, low))
    return jnp.where(index < 3, parts, 0.0).astype(dtype)


def fold(x: jax.Array) -> jax.Array:
    """Sums over channels (c, n) into (8, n), without moving anything between sublanes."""
    return jnp.sum(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def fold_max(x: jax.Array) -> jax.Array:
    """Maximum over channels (c, n) into (8, n)."""
    return jnp.max(x.reshape(-1, SUBLANES, x.shape[-1]), axis=0)


def total(x: jax.Array) -> jax.Array:
    """Sum over sublanes: (8, n) to a row (1, n)."""
    return jnp.sum(x, axis=0, keepdims=True)


def valid_row(plan: Plan, step: jax.Array) -> jax.Array | None:
    """Which tokens of block `step` exist, (1, block); None when all of all blocks do."""
    if not plan.ragged:
        return None
    token = lax.broadcasted_iota(jnp.int32, (1, plan.block), 1) + step * plan.block
    return token < plan.tokens


def masked(x: jax.Array, valid: jax.Array | None, other: float = 0.0) -> jax.Array:
    """`x` with `other` in place of tokens that do not exist."""
    return x if valid is None else jnp.where(valid, x, other)


def channels(plan: Plan, part: int) -> Any:
    """The channels of a head's chunk."""
    return pl.ds(part * plan.chunk, plan.chunk)


def load(plan: Plan, ref: Any, head: Any, part: int, valid: jax.Array | None) -> jax.Array:
    """A chunk (c, block) of a block of activations (1, H, d, block), as float32."""
    return masked(ref[0, head, channels(plan, part), :].astype(jnp.float32), valid)


def load_head(plan: Plan, ref: Any, head: Any, valid: jax.Array | None) -> jax.Array:
    """A head (d, block) of a block of activations, in its dtype."""
    if valid is None:
        return ref[0, head]
    return masked(ref[0, head].astype(jnp.float32), valid).astype(plan.dtype)


def over_heads(plan: Plan, init: Any, body: Callable[[Any, Any], Any]) -> Any:
    """Folds `body(carry, head)` over the heads."""
    if plan.heads == 1:
        return body(init, 0)
    return lax.fori_loop(0, plan.heads, lambda head, carry: body(carry, head), init)


def over_chunks(plan: Plan, group: Any, init: Any, body: Callable[[Any, Any, int], Any]) -> Any:
    """Folds `body(carry, head, part)` over the chunks of a group of channels."""

    def one_head(carry: Any, head: Any) -> Any:
        for part in range(plan.chunks):
            carry = body(carry, head, part)
        return carry

    return one_head(init, group) if plan.groups > 1 else over_heads(plan, init, one_head)


def for_groups(plan: Plan, body: Callable[[Any], Any]) -> None:
    """Runs `body(group)` for every group of channels that a norm runs over."""
    if plan.groups == 1:
        body(0)
        return

    def step(group: Any, carry: None) -> None:
        body(group)

    lax.fori_loop(0, plan.groups, step, None)
