"""Sums over the channels of each token, by one Mosaic GPU kernel (Hopper) that reads Z once.

The measure kernel's norms and the logits of lambda's router need whole tokens (arXiv 2601.13683;
features.py). With u = (relu(z) + 1e-6) / s they are all made of sums over a part of a token, all
of it or one head,

    (1) s = max(relu(z) + 1e-6),   A = sum u^2,   P = sum u^2g,   W = sum u^2g ln u
    (2) L_j = sum u^g R_j,         or sum relu(z) R_j without a power

so that phi(z) = c u^g with c = s sqrt(A / P), and a logit is the sum over parts of c L_j. W is for
the gradient of g. A program takes 64 tokens of a part, a tile of channels at a time, with the
largest entry so far in place of s: a tile that raises it, from r s to s, changes the sums so far,

    (3) A by r^2,   P by r^2g,   L_j by r^g,   and W to r^2g (W + P ln r).

Channels of a tile beyond the part's are zeros to the TMA unit, as are those that a head was padded
with in memory: they are taken off A, P and W at the end, and multiply zeros of R in L.

All is float32. Logarithms and powers are those of the GPU's special function unit, within 2^-22 of
log2 u (of its size, below a half) and of 2^x: with g up to 4, 4e-6 of P. In full they would take
34 instructions more for an entry of z, which now takes 16, 2 more for W and 2 for each logit (PTX,
as compiled for an H100). So memory and instructions take about as long, and with a router it is
instructions that bound the kernel: 65,536 tokens of 1,152 channels, which 3.35 TB/s bring in 45 us,
take 132 multiprocessors of 128 lanes 41 us at 1.75 GHz, and 84 us with nine logits (arithmetic;
nothing was timed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.features import RELU_OFFSET
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    columns_to_block,
    compiler_params,
    first_channel,
    rows_to_block,
)


class Sums(NamedTuple):
    """Equations (1) and (2), of all tokens or of a block's; None what was not asked for.

    Attributes:
      largest: s.
      squares: A.
      powers: P.
      logs: W.
      logits: L_j, n of them.
    """

    largest: Any
    squares: Any
    powers: Any
    logs: Any
    logits: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows `token_sums` returns: those of `Sums`, in its order.

    Attributes:
      powered: whether there is an exponent, and s, A and P.
      logs: whether there is W; only with an exponent.
      logits: n, of lambda's router; 0 without one.
    """

    powered: bool
    logs: bool
    logits: int

    def __post_init__(self) -> None:
        if self.logs and not self.powered:
            raise ValueError("the sum of logarithms needs an exponent")
        if not self.count:
            raise ValueError("without an exponent and a router there is nothing to sum")

    @property
    def first_logit(self) -> int:
        """The row of L_0."""
        return 3 * self.powered + self.logs

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.first_logit + self.logits

    def named(self, rows: Sequence[Any]) -> Sums:
        """A list of rows by name; `logits` is a list."""
        first = rows[: self.first_logit]
        absent = [None] * (4 - len(first))
        return Sums._make([*first, *absent, rows[self.first_logit :]])

    def listed(self, sums: Sums) -> tuple[Any, ...]:
        """The inverse of `named`."""
        return (*(row for row in sums[:4] if row is not None), *sums.logits)

    def split(self, sums: jax.Array) -> Sums:
        """The result of `token_sums`: (B, parts, covered) each, logits (B, parts, n, covered)."""
        rows = self.named([sums[:, :, row] for row in range(self.count)])
        return rows._replace(logits=sums[:, :, self.first_logit :])


def tile_channels(channels: int) -> int:
    """How many channels a tile has.

    64, in the tiles that wgmma reads, which are of 64, 32 or 16 channels. Where none of these
    divides the channels a tile lies row by row, and has 72: a row is then 36 banks of shared
    memory, so that the 8 rows that a warp reads 4 banks of at once lie in different ones. (Rows of
    64 would collide: Mosaic refuses that, JAX 0.12's by a search for layouts that does not end.)
    """
    return 72 if channels % 16 else BLOCK


def with_tile(
    sums: Sums, z: jax.Array, exponent: jax.Array | None, router: Sequence[jax.Array]
) -> Sums:
    """The sums with one more tile, by equation (3).

    Args:
      sums: of the tiles before, (64,) each.
      z: (64, tile's channels) float32.
      exponent: (64,); None gives phi = relu.
      router: rows of R, n of (tile's channels,).
    """
    positive = jnp.maximum(z, 0.0)
    if exponent is None:
        return sums._replace(logits=with_products(sums.logits, positive, router))
    positive = positive + RELU_OFFSET
    largest = jnp.maximum(sums.largest, jnp.max(positive, axis=1))
    # Chosen: the GPU's quotient, and its logarithm, of two equal numbers may be off by a rounding.
    raised = largest > sums.largest
    shrink = jnp.where(raised, sums.largest / largest, 1.0)
    log_shrink = jnp.where(raised, jnp.log(shrink), 0.0)
    power_shrink = jnp.exp(exponent * log_shrink)
    squared_shrink = power_shrink * power_shrink

    unit = positive * rows_to_block(1.0 / largest, z.shape[1])
    log = jnp.log(unit)
    power = jnp.exp(rows_to_block(exponent, z.shape[1]) * log)
    squared = power * power
    logs = sums.logs
    if logs is not None:
        logs = squared_shrink * (logs + sums.powers * log_shrink) + jnp.sum(squared * log, axis=1)
    return Sums(
        largest,
        shrink * shrink * sums.squares + jnp.sum(unit * unit, axis=1),
        squared_shrink * sums.powers + jnp.sum(squared, axis=1),
        logs,
        with_products([power_shrink * logit for logit in sums.logits], power, router),
    )


def with_products(
    logits: Sequence[jax.Array], features: jax.Array, router: Sequence[jax.Array]
) -> list[jax.Array]:
    """Logits with a tile's products: float32, since the tensor core would round a near tie."""
    return [
        logit + jnp.sum(features * columns_to_block(row), axis=1)
        for logit, row in zip(logits, router, strict=True)
    ]


def without_zeros(sums: Sums, exponent: jax.Array | None, zeros: int) -> Sums:
    """Takes off A, P and W what zeros that are no channels have added to them."""
    if exponent is None:
        return sums
    unit = RELU_OFFSET * (1.0 / sums.largest)  # rounded as in `with_tile`
    log = jnp.log(unit)
    power = jnp.exp(exponent * log)
    squared = zeros * (power * power)
    return sums._replace(
        squares=sums.squares - zeros * (unit * unit),
        powers=sums.powers - squared,
        logs=None if sums.logs is None else sums.logs - squared * log,
    )


def token_sums(
    z: jax.Array,
    exponent: jax.Array | None,
    router: jax.Array | None,
    *,
    width: int,
    logs: bool,
    interpret: Any = False,
) -> jax.Array:
    """Equations (1) and (2) for every token and part.

    Args:
      z: (B, N, parts, channels) bfloat16; N and channels are multiples of 8.
      exponent: g, (B, covered) float32, covered = 64 ceil(N / 64), all finite; None: phi = relu.
      router: R, (parts, n, channels) float32, zero where z is padded; None for no logits.
      width: how many channels of a part are not padding; z is zero in the others.
      logs: whether W is wanted; needs an exponent.
      interpret: Pallas' interpreter parameters, or False.

    Returns:
      (B, parts, rows, covered) float32, rows as `Rows` has them. Tokens from N on are zeros' and
      finite.

    Raises:
      ValueError: neither exponent nor router, or W without an exponent.
    """
    B, N, parts, channels = z.shape
    powered, n = exponent is not None, 0 if router is None else router.shape[1]
    rows, columns = Rows(powered, logs, n), tile_channels(channels)
    blocks, tiles = -(-N // BLOCK), -(-channels // columns)

    def dydila_gpu_token_sums(z_ref: Any, *references: Any) -> None:
        rest = list(references)
        exponent_ref = rest.pop(0) if powered else None
        router_ref = rest.pop(0) if n else None
        sums_ref, z_s, exponent_s, router_s, sums_s, loaded, ready = rest
        batch, part = lax.axis_index("batch"), lax.axis_index("head")
        span = pl.ds(lax.axis_index("block") * BLOCK, BLOCK)
        origin = first_channel(channels)

        def fetch(tile: jax.Array) -> None:
            slot, across = lax.rem(tile, jnp.int32(2)), pl.ds(origin + tile * columns, columns)
            source = z_ref.at[batch, span, part, across]
            plgpu.copy_gmem_to_smem(source, z_s.at[slot], ready.at[slot])
            if router_ref is not None:
                into = router_s.at[slot, pl.ds(0, n)]
                plgpu.copy_gmem_to_smem(router_ref.at[part, :, across], into, ready.at[slot])

        fetch(part * 0)
        exponents = None
        if exponent_ref is not None:
            plgpu.copy_gmem_to_smem(exponent_ref.at[batch, span], exponent_s, loaded)
            plgpu.barrier_wait(loaded)
            exponents = exponent_s[...]

        def add_tile(tile: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            slot = lax.rem(tile, jnp.int32(2))
            plgpu.commit_smem()  # every warp has read the tile that the next one overwrites

            @pl.when(tile + 1 < tiles)
            def _() -> None:
                fetch(tile + 1)

            plgpu.barrier_wait(ready.at[slot])
            block = plgpu.layout_cast(z_s[slot], plgpu.Layout.WGMMA).astype(jnp.float32)
            router_rows = [router_s[slot, j] for j in range(n)]
            return rows.listed(with_tile(rows.named(sums), block, exponents, router_rows))

        zeros = jnp.zeros((BLOCK,), jnp.float32)
        start = rows.named([zeros] * rows.count)
        if powered:
            start = start._replace(largest=zeros + RELU_OFFSET)
        sums = rows.named(lax.fori_loop(0, tiles, add_tile, rows.listed(start)))
        sums = without_zeros(sums, exponents, tiles * columns - width)
        for row, values in enumerate(rows.listed(sums)):
            sums_s[row] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums_s, sums_ref.at[batch, part, :, span])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        dydila_gpu_token_sums,
        out_type=jax.ShapeDtypeStruct((B, parts, rows.count, blocks * BLOCK), jnp.float32),
        scratch_types=[
            plgpu.SMEM((2, BLOCK, columns), jnp.bfloat16),
            plgpu.SMEM((BLOCK,), jnp.float32),
            # The TMA unit writes to multiples of 128 bytes: four rows of 72 or 64 float32 are one.
            plgpu.SMEM((2, 4 * max(1, -(-n // 4)), columns), jnp.float32),
            plgpu.SMEM((rows.count, BLOCK), jnp.float32),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=1 + (n > 0), num_barriers=2),
        ],
        grid=(B, parts, blocks),
        grid_names=("batch", "head", "block"),
        compiler_params=compiler_params().replace(approx_math=True),
        interpret=interpret,
    )(z, *(x for x in (exponent, router) if x is not None))
