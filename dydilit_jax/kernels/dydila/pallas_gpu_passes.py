"""The GPU core's forward and backward pass: which kernels run, and what XLA does between them.

Each pass runs on one device's part of the batch and of the tokens; over a mesh that splits tokens
the states and their gradients are summed, once forward and once backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels.dydila import pallas_gpu_narrow as narrow
from dydilit_jax.kernels.dydila import pallas_gpu_narrow_backward as narrow_backward
from dydilit_jax.kernels.dydila import pallas_gpu_narrow_tokens as narrow_tokens
from dydilit_jax.kernels.dydila import pallas_gpu_wide as wide
from dydilit_jax.kernels.dydila import pallas_gpu_wide_backward as wide_backward
from dydilit_jax.kernels.dydila.features import CoreOptions
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    Known,
    QuerySums,
    TokenGradients,
    means,
    zeros_up,
)
from dydilit_jax.kernels.dydila.pallas_gpu_scalars import (
    Gradients,
    Side,
    Tokens,
    routed_lambda,
    router_logits,
    scalar_gradients,
    scalar_rows,
)
from dydilit_jax.kernels.dydila.pallas_gpu_sums import Rows, Sums, token_sums
from dydilit_jax.kernels.sharding import CoreSharding

NOTHING = Sums(None, None, None, None, None)


class HeadKernels(NamedTuple):
    """Kernels for heads of some widths, of the same arguments and results."""

    state: Callable[..., Any]
    apply: Callable[..., Any]
    query_sums: Callable[..., QuerySums]
    key_sums: Callable[..., jax.Array]
    token_gradients: Callable[..., TokenGradients]
    covered: Callable[[int, int, int, int], int]


NARROW = HeadKernels(
    narrow.state,
    narrow.apply,
    narrow_backward.query_sums,
    narrow_backward.key_sums,
    narrow_tokens.token_gradients,
    narrow.covered,
)
WIDE = HeadKernels(
    wide.state,
    wide.apply,
    wide_backward.query_sums,
    wide_backward.key_sums,
    wide_backward.token_gradients,
    wide.covered,
)


def kernels_for(width: int) -> HeadKernels:
    """The kernels for heads of a width: those that hold a whole head wherever one fits."""
    return NARROW if width <= narrow.WIDEST else WIDE


def rounded_sizes(width: int, tokens: int) -> tuple[int, int]:
    """Channels and tokens that arrays of heads are padded to in memory, few if any.

    The TMA unit wants rows of a multiple of 16 bytes, and whole tiles of 8 tokens. Heads whose
    channels are whole tiles of 16 need none added, nor, where a block may overhang them, narrow
    ones: not those of 24, 56, 88 and 120, for which Mosaic's search for layouts does not end.
    """
    to_8, to_16 = -(-width // 8) * 8, -(-width // 16) * 16
    overhangs = width <= narrow.WIDEST and to_16 % 32
    return to_8 if overhangs else to_16, -(-tokens // 8) * 8


class Static(NamedTuple):
    """What is fixed for one call.

    Attributes:
      core: of the kernels.
      options: of the operation.
      sharding: how the arrays lie on a mesh, or None.
    """

    core: Core
    options: CoreOptions
    sharding: CoreSharding | None

    @property
    def groups(self) -> int:
        """Norms of a token: one, or one for each head."""
        by_head = self.options.norm_scope == "head" and self.core.powered
        return self.core.heads if by_head else 1

    def as_heads(self, x: jax.Array) -> jax.Array:
        """(B, N, D) as (B, N, H, d), N and d as `rounded_sizes` has them."""
        heads, width = self.core.heads, self.core.width
        tokens = x.shape[1]
        rounded_width, rounded_tokens = rounded_sizes(width, tokens)
        x = x.reshape(*x.shape[:2], heads, width)
        added = ((0, 0), (0, rounded_tokens - tokens), (0, 0), (0, rounded_width - width))
        return jnp.pad(x, added) if any(map(sum, added)) else x

    def as_tokens(self, x: jax.Array, tokens: int) -> jax.Array:
        """The way back."""
        return x[:, :tokens, :, : self.core.width].reshape(x.shape[0], tokens, -1)

    def of_tensors(self, router: jax.Array, *, choices: int, width: int) -> jax.Array:
        """A router (2 D, n) as (2, H, choices, width): for Z, Z' and their heads, zeros added."""
        n = router.shape[1]
        rows = router.reshape(2, self.core.heads, self.core.width, n).swapaxes(2, 3)
        return jnp.pad(rows, ((0, 0), (0, 0), (0, choices - n), (0, width - self.core.width)))


def rounded_up(core: Core, scalars: jax.Array, covered: int) -> jax.Array:
    """Scalars for all tokens that programs cover; those added have phi = 0, finite logarithms."""
    added = covered - scalars.shape[-1]
    if not added:
        return scalars
    is_scale = core.powered and (jnp.arange(core.rows) % 3 == 2)
    row = jnp.where(is_scale, 0.0, 1.0).astype(jnp.float32).reshape(-1, 1)
    tail = jnp.broadcast_to(row, (*scalars.shape[:2], core.rows, added))
    return jnp.concatenate([scalars, tail], axis=-1)


def sums_of(
    static: Static, side: Side, heads: Sequence[jax.Array], *, logs: bool
) -> tuple[Sums, ...]:
    """Sums of each tensor of a side, which `heads` are as (B, N, H, d); `logs`: with W."""
    core = static.core
    if core.one_pass:
        return (NOTHING,) * len(heads)
    batch, rounded_tokens, _, width = heads[0].shape
    tokens, channels = side.tokens[0].shape[1:]
    shape = (batch, rounded_tokens, static.groups, core.heads * width // static.groups)
    routers: list[jax.Array | None] = [None] * len(heads)
    if side.router is not None:
        of_tensors = static.of_tensors(side.router, choices=core.choices, width=width)
        # (H, n, d) as (groups, n, channels of a group)
        routers = [
            x.reshape(static.groups, -1, core.choices, width)
            .swapaxes(1, 2)
            .reshape(static.groups, core.choices, -1)
            for x in of_tensors
        ]
    found = []
    for i, array in enumerate(heads):
        exponent = None
        if core.powered:
            exponent = zeros_up(side.exponents[i], BLOCK * -(-tokens // BLOCK))
        rows = token_sums(
            array.reshape(shape),
            exponent,
            routers[i],
            width=channels // static.groups,
            logs=logs and core.powered,
            interpret=core.interpret,
        )
        sums = Rows(core.powered, logs and core.powered, core.choices).split(rows[..., :tokens])
        found.append(sums if core.choices else sums._replace(logits=None))
    return tuple(found)


class Saved(NamedTuple):
    """What the forward pass leaves for the backward pass, besides its arguments.

    Attributes:
      query_sums, key_sums: of each tensor.
      m: (B, H, ...) bfloat16.
      z: (B, H, d) float32.
      den: (B, H, covered) float32, or None.
    """

    query_sums: tuple[Sums, ...]
    key_sums: tuple[Sums, ...]
    m: jax.Array
    z: jax.Array
    den: jax.Array | None


class Result(NamedTuple):
    """Of the core.

    Attributes:
      output: (B, N, D) bfloat16.
      den: (B, H, N) float32, or None. It has no gradient of its own: it is for telemetry.
      query_logits, key_logits: of lambda's routers with their noise, (B, N, n) float32, or None.
    """

    output: jax.Array
    den: jax.Array | None
    query_logits: jax.Array | None
    key_logits: jax.Array | None


Arguments = tuple[Side, Side, jax.Array, jax.Array | None]  # queries, keys, values, lambdas


def local_forward(
    static: Static, saving: bool, arguments: Arguments
) -> tuple[Result, Saved | None]:
    """The forward pass of one device's tokens; `saving` for a backward pass, or not."""
    core = static.core
    query, key, value, _ = arguments
    queries, keys = (tuple(map(static.as_heads, side.tokens)) for side in (query, key))
    query_sums, key_sums = (
        sums_of(static, side, heads, logs=saving) for side, heads in ((query, queries), (key, keys))
    )
    values = static.as_heads(value)
    B, _, H, _ = values.shape
    N = value.shape[1]
    run = kernels_for(core.width)
    covered = run.covered(*values.shape)
    query_rows, key_rows = rows_of(static, arguments, query_sums, key_sums, covered)
    m, z = means(core, *run.state(core, keys, key_rows, values))
    output, den = run.apply(core, queries, query_rows, m, z)
    m, z = (x.reshape(B, H, *x.shape[1:]) for x in (m, z))
    if den is not None:
        # Of tokens that are not there it may be zero, and its inverse times nothing no number.
        den = jnp.where(jnp.arange(den.shape[-1]) < N, den, 1.0).reshape(B, H, -1)
    result = Result(
        static.as_tokens(output, N),
        None if den is None else den[..., :N],
        router_logits(query, query_sums),
        router_logits(key, key_sums),
    )
    return result, Saved(query_sums, key_sums, m, z, den) if saving else None


def rows_of(
    static: Static,
    arguments: Arguments,
    query_sums: tuple[Sums, ...],
    key_sums: tuple[Sums, ...],
    covered: int,
) -> tuple[jax.Array, jax.Array]:
    """The scalars of queries and keys that kernels read, (B, 1 or H, rows, covered)."""
    query, key, _, bank = arguments
    training = static.options.router_training
    found = []
    for side, sums in ((query, query_sums), (key, key_sums)):
        scale = None if bank is None else routed_lambda(router_logits(side, sums), bank, training)
        rows = scalar_rows(static.core, side, sums, scale)
        found.append(rounded_up(static.core, rows, covered))
    return found[0], found[1]


def local_backward(
    static: Static, arguments: Arguments, saved: Saved, cotangents: Result
) -> Arguments:
    """Gradients of one device's arguments; of routers and lambdas, summed over the mesh."""
    core = static.core
    query, key, value, bank = arguments
    queries, keys = (tuple(map(static.as_heads, side.tokens)) for side in (query, key))
    values, d_output = static.as_heads(value), static.as_heads(cotangents.output)
    B, rounded_tokens, H, width = values.shape
    N = value.shape[1]
    run = kernels_for(core.width)
    covered = run.covered(*values.shape)
    m, z = (x.reshape(B * H, *x.shape[2:]) for x in (saved.m, saved.z))
    den = None if saved.den is None else saved.den.reshape(B * H, -1)
    query_rows, key_rows = rows_of(static, arguments, saved.query_sums, saved.key_sums, covered)

    first = run.query_sums(core, queries, query_rows, d_output, m, z, den)
    d_m, d_z = means(core, first.d_m, first.d_z)
    if core.one_pass:
        assert first.tokens is not None
        of_keys = run.token_gradients(
            core, keys, Known(key_rows), values, d_m, d_z, with_value=True
        )
        d_tokens, d_rows = (first.tokens, of_keys.tokens), (first.rows, of_keys.rows)
    else:
        d_rows = first.rows, run.key_sums(core, keys, key_rows, values, d_m, d_z)

    def small(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else x[..., :N].reshape(B, H, -1, N)

    sums = saved.query_sums, saved.key_sums
    d_logits = cotangents.query_logits, cotangents.key_logits
    training = static.options.router_training
    back = [
        scalar_gradients(core, side, each, bank, training, small(rows), d)
        for side, each, rows, d in zip((query, key), sums, d_rows, d_logits, strict=True)
    ]
    d_bank = None
    if back[0].bank is not None and back[1].bank is not None:
        d_bank = back[0].bank + back[1].bank

    def known(side: Side, rows: jax.Array, gradients: Gradients, weights: Any = None) -> Known:
        through_norms, d_logits, router = gradients.through_norms, gradients.logits, None
        if through_norms is not None:
            through_norms = zeros_up(through_norms, covered)
        if d_logits is not None and side.router is not None:
            choices = 16 * -(-core.choices // 16)
            d_logits = zeros_up(zeros_up(d_logits, choices), rounded_tokens, 1)
            router = static.of_tensors(side.router, choices=choices, width=width)
            d_logits, router = d_logits.astype(jnp.bfloat16), router.astype(jnp.bfloat16)
        return Known(rows, through_norms, weights, d_logits, router)

    d_router: list[jax.Array | None] = [None, None]
    d_exponents: list[Tokens] = [(), ()]
    if not core.one_pass:
        weights = None
        if den is not None and first.d_den is not None:
            weights = jnp.stack([1.0 / den, first.d_den], axis=1)
        of_queries = run.token_gradients(
            core,
            queries,
            known(query, query_rows, back[0], weights),
            d_output,
            m,
            z,
            with_value=False,
        )
        of_keys = run.token_gradients(
            core, keys, known(key, key_rows, back[1]), values, d_m, d_z, with_value=True
        )
        d_tokens = of_queries.tokens, of_keys.tokens
        for i, found in enumerate((of_queries, of_keys)):
            rows = small(found.rows)
            if rows is not None:
                d_exponents[i] = tuple(rows[:, :, row].sum(axis=1) for row in range(core.powers))
            if found.router is not None:
                d = found.router.sum(axis=1)[:, :, : core.width, : core.choices]
                d_router[i] = d.reshape(-1, core.choices)
    axes = () if static.sharding is None else static.sharding.axes
    if axes:
        d_router, d_bank = lax.psum((d_router, d_bank), axes)
    sides = [
        Side(tuple(static.as_tokens(d, N) for d in tokens), exponents, router, None)
        for tokens, exponents, router in zip(d_tokens, d_exponents, d_router, strict=True)
    ]
    assert of_keys.value is not None
    return sides[0], sides[1], static.as_tokens(of_keys.value, N), d_bank
