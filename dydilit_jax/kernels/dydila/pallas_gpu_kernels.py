"""Three Mosaic GPU kernels (Hopper) that the DyDiLA core is made of, forward and backward.

With F the features of one side of one head, from blocks of Z, Z' and scalars of each token,

    (1) phi_ij = c_i u_ij^g_i,  u = (relu(z) + 1e-6) inv_i        base; the same of Z' is phi'
    (2) F_ij   = phi_ij - l_i phi'_ij                             difference

they compute, M (d, d) and z (d,) being one head's state or its gradient:

    state     M = sum_i w_i F_i^T Y_i,   z = sum_i x_i phi_i      (w, x: scalars of tokens, or 1)
    apply     Y_i = F_i M / den_i,       den_i = phi_i . z + eps
    gradient  of Z, Z' and the scalars, from dF_i = w_i Y_i M^T + t_i z

Forward: (M, z) = state(K, V), O = apply(Q, M, z). Backward: gradient(Q, dO, M, z),
(dM, dz) = state(Q, dO; 1 / den, t), gradient(K, V, dM, dz), dV = apply(K, dM). No atomics: results
repeat bitwise.

Blocks are 64 tokens by 64 channels, in the tiles that wgmma reads: 8 tokens by 64, 32 or 16
channels, of which N and d are multiples. What a block has beyond N or d the TMA unit reads as
zeros and does not write. One warpgroup a program; the tensor core multiplies bfloat16 and adds in
float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.features import RELU_OFFSET

BLOCK = 64  # tokens, and channels, of one block: the rows of one wgmma
WIDEST = 704  # channels of a head: `gradient` keeps 64 tokens of Y and 64 rows of M, 227 KB in all
STATE_BYTES = 150_000  # of a program's 227 KB of shared memory, for `apply`'s columns of M
PROGRAMS = 2 * 132  # at least as many as two for each multiprocessor of an H100 or H200
FEWEST_BLOCKS = 4  # of tokens that one program of `state` sums


@dataclasses.dataclass(frozen=True)
class Core:
    """Static part of one call.

    Attributes:
      heads: H.
      width: channels of a head before they were rounded up to blocks.
      tokens: of a whole sequence, which the sums are divided by.
      normalizer: `base`, `signed` or `none`.
      powered: whether (1) has a power; else phi = relu.
      differential: whether there are Z' and lambda.
      eps: of the denominator.
      sequence: mesh axis that the tokens are split over, or None.
      interpret: Pallas' interpreter parameters, or False.
    """

    heads: int
    width: int
    tokens: int
    normalizer: str
    powered: bool
    differential: bool
    eps: float
    sequence: str | None = None
    interpret: Any = False

    @property
    def rows(self) -> int:
        """Scalars of a token: g, inv, c, then g', inv', c', then lambda; one unused if none."""
        sides = 1 + self.differential
        return max(1, 3 * sides * self.powered + self.differential)

    @property
    def learned(self) -> tuple[int, ...]:
        """Which of them have gradients: all but inv, a constant."""
        powers = range(3 * (1 + self.differential) * self.powered)
        last = (self.rows - 1,) * self.differential
        return (*(row for row in powers if row % 3 != 1), *last)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a head of d channels is cut: `count` blocks of 64, and `columns` of M at a time."""

    width: int

    @property
    def count(self) -> int:
        """Blocks of 64 channels."""
        return -(-self.width // BLOCK)

    @property
    def columns(self) -> int:
        """At most 256 (one wgmma), as many as leave M's columns room; 0 for too wide a head."""
        if self.width > WIDEST:
            return 0
        for parts in range(1, self.count + 1):
            columns = BLOCK * -(-self.count // parts)
            if columns <= 256 and 2 * columns * self.count * BLOCK <= STATE_BYTES:
                return columns
        return 0

    @property
    def parts(self) -> int:
        """How many times `columns` cover a head."""
        return -(-self.width // self.columns)

    @property
    def padded(self) -> tuple[int, int]:
        """Shape of M in memory: whole blocks, zero beyond d."""
        return self.count * BLOCK, self.parts * self.columns


def rows_to_block(rows: jax.Array, channels: int = BLOCK) -> jax.Array:
    """A scalar for each token, (64,), as a block (64, channels)."""
    return lax.broadcast_in_dim(rows, (BLOCK, channels), (0,))


def columns_to_block(columns: jax.Array) -> jax.Array:
    """A scalar for each channel, (channels,), as a block (64, channels)."""
    return lax.broadcast_in_dim(columns, (BLOCK, *columns.shape), (1,))


def guarded(product: jax.Array, core: Core) -> jax.Array:
    """The denominator: positive by eps, or kept eps away from zero."""
    if core.normalizer == "base":
        return product + core.eps
    eps = jnp.where(product < 0.0, -core.eps, core.eps)
    return jnp.where(jnp.abs(product) < core.eps, eps, product)


@dataclasses.dataclass(frozen=True)
class Power:
    """Equation (1) of one block, and its derivative.

    Attributes:
      z: (64, channels) float32.
      rows: (64,) float32 each: g, inv and c; None without a power.
    """

    z: jax.Array
    rows: Sequence[jax.Array] | None

    def value(self) -> jax.Array:
        """Phi, (64, channels) float32."""
        if self.rows is None:
            return jnp.maximum(self.z, 0.0)
        return self._row(2) * self._unscaled()[0]

    def _row(self, row: int) -> jax.Array:
        assert self.rows is not None
        return rows_to_block(self.rows[row], self.z.shape[1])

    def _unscaled(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """u^g, ln u, and relu(z) + 1e-6."""
        assert self.rows is not None
        positive = jnp.maximum(self.z, 0.0) + RELU_OFFSET
        log = jnp.log(positive * self._row(1))
        return jnp.exp(self._row(0) * log), log, positive

    def gradient(self, d_phi: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Gradients of z, like z, and of g and c, (64,) each."""
        if self.rows is None:
            return jnp.where(self.z > 0.0, d_phi, 0.0), []
        power, log, positive = self._unscaled()
        d_power = d_phi * power
        d_logged = self._row(2) * d_power
        d_z = self._row(0) * d_logged / positive
        d_g = jnp.sum(d_logged * log, axis=1)
        d_c = jnp.sum(d_power, axis=1)
        return jnp.where(self.z > 0.0, d_z, 0.0), [d_g, d_c]


@dataclasses.dataclass(frozen=True)
class Features:
    """Equations (1) and (2) of one block."""

    base: Power
    redundant: Power | None
    scale: jax.Array | None  # lambda, (64,)

    @classmethod
    def of(cls, core: Core, blocks: Sequence[jax.Array], rows: Any) -> Features:
        """From blocks of Z (and Z'), and a reference to rows of scalars."""
        scalars = [rows[row] for row in range(core.rows)]
        z = [block.astype(jnp.float32) for block in blocks]
        base = Power(z[0], scalars[:3] if core.powered else None)
        if not core.differential:
            return cls(base, None, None)
        return cls(base, Power(z[1], scalars[3:6] if core.powered else None), scalars[-1])

    def values(self) -> tuple[jax.Array, jax.Array]:
        """F and phi, (64, channels) float32."""
        base = self.base.value()
        if self.redundant is None or self.scale is None:
            return base, base
        return base - rows_to_block(self.scale, self.base.z.shape[1]) * self.redundant.value(), base

    def gradients(
        self, d_difference: jax.Array, d_base: jax.Array
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Gradients of Z (and Z'), and of the learned scalars, from those of F and phi."""
        d_z, d_rows = self.base.gradient(d_difference + d_base)
        if self.redundant is None or self.scale is None:
            return [d_z], d_rows
        d_scale = -jnp.sum(d_difference * self.redundant.value(), axis=1)
        d_redundant, d_rows_redundant = self.redundant.gradient(
            -rows_to_block(self.scale, self.base.z.shape[1]) * d_difference
        )
        return [d_z, d_redundant], [*d_rows, *d_rows_redundant, d_scale]


def compiler_params() -> plgpu.CompilerParams:
    """Layouts of registers and shared memory are inferred for a warpgroup as a whole."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def head_index(heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch and head of this program, and a traced zero."""
    index = lax.axis_index("head")
    return lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads)), index * 0


def first_channel(width: int) -> jax.Array:
    """Zero, known to Mosaic as a multiple of what divides d: so it tiles memory, and no wider."""
    head = lax.axis_index("head")
    return lax.min(head, jnp.int32(0)) * math.gcd(width, BLOCK)


def block_copier(
    core: Core,
    tokens: Sequence[Any],
    scalars: Any,
    into: Sequence[Any],
    rows_into: Any,
    barrier: Any,
) -> Callable[[jax.Array, jax.Array, jax.Array], None]:
    """Starts the copies of one block of Z, Z' and of the tokens' scalars: (block, tile, slot)."""
    b, h, _ = head_index(core.heads)
    group = h if scalars.shape[1] > 1 else 0
    origin = first_channel(tokens[0].shape[-1])

    def start(block: jax.Array, tile: jax.Array, slot: jax.Array) -> None:
        for source, target in zip(tokens, into, strict=True):
            span, channels = pl.ds(block * BLOCK, BLOCK), pl.ds(origin + tile * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(
                source.at[b, span, h, channels], target.at[slot], barrier.at[slot]
            )
        rows = scalars.at[b, group, :, pl.ds(block * BLOCK, BLOCK)]
        plgpu.copy_gmem_to_smem(rows, rows_into.at[slot], barrier.at[slot])

    return start


def state(
    core: Core,
    tokens: Sequence[jax.Array],
    scalars: jax.Array,
    value: jax.Array,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sums over tokens M and z of each head.

    Args:
      core: static part; `normalizer` says whether z sums phi (`base`) or F (`signed`).
      tokens: Z, or Z and Z', each (B, N, H, d) bfloat16.
      scalars: (B, 1 or H, rows, N) float32.
      value: (B, N, H, d) bfloat16.
      weights: (B H, 2, N) float32, w and x; None for ones.

    Returns:
      M (B H, *Tiles(d).padded) and z (B H, d) float32, zero beyond the head's width.
    """
    B, N, H, d = value.shape
    tiles = Tiles(d)
    columns, (padded_rows, padded_columns) = tiles.columns, tiles.padded
    splits, steps = token_splits(B, N, H, d)

    def kernel(*references: Any) -> None:
        sources, (scalars_ref, value_ref, *rest) = (
            references[: len(tokens)],
            references[len(tokens) :],
        )
        weights_ref = rest.pop(0) if weights is not None else None
        m_ref, z_ref, blocks_s, value_s, rows_s, weights_s, features_s, m_s, z_s, ready = rest
        b, h, _ = head_index(core.heads)
        head, split = lax.axis_index("head"), lax.axis_index("split")
        tile = lax.div(lax.axis_index("tile"), jnp.int32(tiles.parts))
        part = lax.rem(lax.axis_index("tile"), jnp.int32(tiles.parts))
        start_blocks = block_copier(
            core, sources, scalars_ref, [blocks_s.at[i] for i in range(len(tokens))], rows_s, ready
        )

        def fetch(step: jax.Array, slot: jax.Array) -> None:
            block = split * steps + step
            start_blocks(block, tile, slot)
            span = pl.ds(block * BLOCK, BLOCK)
            channels = pl.ds(first_channel(d) + part * columns, columns)
            plgpu.copy_gmem_to_smem(
                value_ref.at[b, span, h, channels], value_s.at[slot], ready.at[slot]
            )
            if weights_ref is not None:
                rows = weights_ref.at[head, :, pl.ds(block * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(rows, weights_s.at[slot], ready.at[slot])

        fetch(jnp.int32(0), jnp.int32(0))

        def accumulate(m: Any) -> tuple[jax.Array, jax.Array]:
            def body(step: jax.Array, total: jax.Array) -> jax.Array:
                slot = lax.rem(step, jnp.int32(2))

                @pl.when(step + 1 < steps)
                def _() -> None:
                    fetch(step + 1, lax.rem(step + 1, jnp.int32(2)))

                plgpu.barrier_wait(ready.at[slot])
                blocks_in = [blocks_s[i, slot] for i in range(len(tokens))]
                features = Features.of(core, blocks_in, rows_s.at[slot])
                difference, base = features.values()
                summed = difference if core.normalizer == "signed" else base
                summed = summed.astype(jnp.bfloat16).astype(jnp.float32)
                if weights_ref is not None:
                    difference = difference * rows_to_block(weights_s[slot, 0])
                    summed = summed * rows_to_block(weights_s[slot, 1])
                features_s[slot] = difference.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.wgmma(m, features_s.at[slot].transpose((1, 0)), value_s.at[slot])
                plgpu.wgmma_wait(0)
                return total + summed

            total = lax.fori_loop(0, steps, body, jnp.zeros((BLOCK, BLOCK), jnp.float32))
            return m[...], jnp.sum(total, axis=0)

        m_s[...], z_s[...] = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, columns), jnp.float32))
        plgpu.commit_smem()
        channels, span = pl.ds(tile * BLOCK, BLOCK), pl.ds(part * columns, columns)
        plgpu.copy_smem_to_gmem(m_s, m_ref.at[head, split, channels, span])
        # Every part computes the same z; they write it to places of their own.
        plgpu.copy_smem_to_gmem(z_s, z_ref.at[head, split, part, channels])
        plgpu.wait_smem_to_gmem(0)

    copies = len(tokens) + 2 + (weights is not None)
    m, z = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((B * H, splits, padded_rows, padded_columns), jnp.float32),
            jax.ShapeDtypeStruct((B * H, splits, tiles.parts, padded_rows), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((len(tokens), 2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((2, BLOCK, columns), jnp.bfloat16),
            plgpu.SMEM((2, core.rows, BLOCK), jnp.float32),
            plgpu.SMEM((2, 2, BLOCK), jnp.float32),
            plgpu.SMEM((2, BLOCK, BLOCK), jnp.bfloat16),
            plgpu.SMEM((BLOCK, columns), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            plgpu.Barrier(num_arrivals=copies, num_barriers=2),
        ],
        grid=(B * H, tiles.count * tiles.parts, splits),
        grid_names=("head", "tile", "split"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*tokens, scalars, value, *(() if weights is None else (weights,)))
    # Channels beyond the width hold zeros, whose phi is not quite zero.
    inside = jnp.arange(padded_rows) < core.width
    m = jnp.where(inside[:, None], m.sum(axis=1), 0.0)
    return m, jnp.where(inside, z[:, :, 0].sum(axis=1), 0.0)


def means(core: Core, m: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over all tokens, M's as the tensor core takes them, of this device's sums."""
    if core.sequence is not None:
        m, z = lax.psum((m, z), core.sequence)
    return (m / core.tokens).astype(jnp.bfloat16), z / core.tokens


def token_splits(B: int, N: int, H: int, d: int) -> tuple[int, int]:
    """Programs of `state` along the tokens, and blocks of tokens for each."""
    tiles, blocks = Tiles(d), -(-N // BLOCK)
    wanted = -(-PROGRAMS // (B * H * tiles.count * tiles.parts))
    splits = max(1, min(wanted, blocks // FEWEST_BLOCKS))
    return splits, -(-blocks // splits)


def chunks(B: int, N: int, H: int, parts: int) -> tuple[int, int]:
    """Programs along the tokens, and blocks of tokens for each: M is read once by a program."""
    blocks = -(-N // BLOCK)
    count = min(blocks, max(1, -(-PROGRAMS // (B * H * parts)), -(-blocks // 16)))
    steps = math.ceil(blocks / count)
    return -(-blocks // steps), steps
