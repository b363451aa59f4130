"""Blocks of tokens with all channels of a head: what the kernels of narrow heads are made of.

A block is 64 tokens by d channels, rounded up to what a product sums over at a time, 16: the TMA
unit reads zeros beyond d and beyond N, and writes nothing there, so that nothing is padded in
memory. Where d is a multiple of 16, blocks lie in the tiles that the tensor core reads. Else (72)
they lie row by row, since tiles of 16 channels do not divide a row of memory, and are read with
bank conflicts; what the tensor core multiplies is copied to tiles in any case.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    PROGRAMS,
    Core,
    Features,
    compiler_params,
    head_index,
)

LOAD_WITHOUT_INDEX = "idx" not in inspect.signature(plgpu.load).parameters  # JAX 0.12


def in_tiles(columns: int, *shape: int) -> Any:
    """Shared memory for bfloat16 in tiles of 8 rows and some columns, that the tensor core reads.

    Mosaic finds such tiles by itself in small kernels; in large ones its search may not end.
    """
    transforms = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How arrays (B, N, H, d) are cut into programs and blocks of 64 tokens."""

    batch: int
    tokens: int
    heads: int
    width: int

    @classmethod
    def of(cls, tokens: jax.Array) -> Cut:
        """The cut of an array (B, N, H, d)."""
        return cls(*tokens.shape)

    @property
    def channels(self) -> int:
        """d, rounded up to what a product sums over at a time."""
        return 16 * -(-self.width // 16)

    @property
    def overhangs(self) -> bool:
        """Whether a block reaches beyond d: memory then has no whole tiles of 16 channels."""
        return self.channels != self.width

    def first_channel(self) -> jax.Array:
        """Zero. Where blocks overhang Mosaic must not see that: it would have the TMA unit tile."""
        head = lax.axis_index("head")
        return lax.min(head, jnp.int32(0)) if self.overhangs else head * 0

    @property
    def pieces(self) -> list[Any]:
        """Spans of channels, few enough that registers hold what a gradient needs of them.

        They are whole tiles of shared memory, whose width has to divide the block's.
        """
        return [pl.ds(first, self.tile) for first in range(0, self.channels, self.tile)]

    @property
    def tile(self) -> int:
        """Channels of a tile of shared memory, and of a piece."""
        return 16 if self.channels % 32 else 32

    @property
    def no_sums(self) -> tuple[jax.Array, ...]:
        """Zeros for sums of each channel, in pieces."""
        return tuple(jnp.zeros((piece.size,), jnp.float32) for piece in self.pieces)

    @property
    def halves(self) -> int:
        """Products of 64 rows that make up a state."""
        return -(-self.channels // BLOCK)

    @property
    def programs(self) -> int:
        """Along the tokens of a head."""
        blocks = -(-self.tokens // BLOCK)
        wanted = min(blocks, max(1, -(-PROGRAMS // (self.batch * self.heads))))
        return -(-blocks // math.ceil(blocks / wanted))

    @property
    def steps(self) -> int:
        """Blocks of a program."""
        return math.ceil(-(-self.tokens // BLOCK) / self.programs)

    @property
    def covered(self) -> int:
        """Tokens of all programs: what the arrays of scalars are rounded up to."""
        return self.programs * self.steps * BLOCK

    def block(self, arrays: int) -> Any:
        """Shared memory for two blocks of each of some arrays."""
        shape = arrays, 2, BLOCK, self.channels
        return plgpu.SMEM(shape, jnp.bfloat16) if self.overhangs else in_tiles(self.tile, *shape)

    def operand(self, columns: int) -> Any:
        """Shared memory for 64 tokens that the tensor core reads."""
        return in_tiles(self.tile, BLOCK, columns)

    @property
    def state(self) -> Any:
        """Shared memory for M or dM."""
        return in_tiles(self.tile, self.channels, self.channels)


def load(reference: Any, *, optimized: bool) -> jax.Array:
    """Reads shared memory to registers, with bank conflicts if not `optimized`."""
    whole = () if LOAD_WITHOUT_INDEX else ((slice(None),) * len(reference.shape),)
    return plgpu.load(reference, *whole, optimized=optimized)


class Stream:
    """Copies the blocks of a program, one ahead of the one in use.

    Args:
      cut: how the arrays are cut.
      tokens: references to arrays (B, N, H, d).
      rows: pairs of a function from a span of tokens to a reference, and where it is copied to.
      blocks: references (arrays, 2, 64, channels); results may be written over them.
      ready: barriers of the two slots.
    """

    def __init__(
        self,
        cut: Cut,
        tokens: Sequence[Any],
        rows: Sequence[tuple[Callable[[Any], Any], Any]],
        blocks: Any,
        ready: Any,
    ) -> None:
        self.cut, self.tokens, self.rows, self.blocks, self.ready = cut, tokens, rows, blocks, ready
        self.batch, self.head, self.zero = head_index(cut.heads)
        if cut.overhangs:
            # JAX 0.10 would tile by (8, 1), which TMA cannot, what is read only; a write of the
            # products' layout, here of nothing, forbids it.
            nothing = jnp.zeros((BLOCK, cut.channels), jnp.bfloat16)
            blocks[0, 0] = plgpu.layout_cast(nothing, plgpu.Layout.WGMMA)
            plgpu.commit_smem()
        self._fetch(self.zero)

    def span(self, step: jax.Array) -> Any:
        """The tokens of a step."""
        first = lax.axis_index("chunk") * self.cut.steps
        return pl.ds((first + step) * BLOCK, BLOCK)

    def memory(self, array: Any, step: jax.Array) -> Any:
        """A step's block of an array (B, N, H, d), reaching beyond d."""
        channels = pl.ds(self.cut.first_channel(), self.cut.channels)
        return array.at[self.batch, self.span(step), self.head, channels]

    def _fetch(self, step: jax.Array) -> None:
        slot = lax.rem(step, jnp.int32(2))
        for i, array in enumerate(self.tokens):
            target = self.blocks.at[i, slot]
            plgpu.copy_gmem_to_smem(self.memory(array, step), target, self.ready.at[slot])
        for reference, into in self.rows:
            source = reference(self.span(step))
            plgpu.copy_gmem_to_smem(source, into.at[slot], self.ready.at[slot])

    def step(self, step: jax.Array) -> jax.Array:
        """Waits for a step's copies and starts those of the next; returns the slot."""
        slot = lax.rem(step, jnp.int32(2))
        # The results of the step before have left, and every warp has done with what it read.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(step + 1 < self.cut.steps)
        def _() -> None:
            self._fetch(step + 1)

        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def read(self, array: int, slot: jax.Array, piece: Any = None) -> jax.Array:
        """A block (64, channels), or a piece of it."""
        block = self.blocks.at[array, slot]
        block = block if piece is None else block.at[:, piece]
        return load(block, optimized=not self.cut.overhangs)

    def features(
        self, core: Core, slot: jax.Array, rows: Any, piece: Any, through_norms: Any = None
    ) -> Features:
        """Of a piece of the first arrays, Z and perhaps Z'."""
        blocks = [self.read(i, slot, piece) for i in range(1 + core.differential)]
        factors = None if through_norms is None else through_norms.at[slot]
        return Features.of(core, blocks, rows.at[slot], factors)

    def write(self, array: int, slot: jax.Array, values: jax.Array, piece: Any = None) -> None:
        """Puts values in an array's block, or a piece of it, which `send` copies to memory."""
        piece = pl.ds(0, self.cut.channels) if piece is None else piece
        self.blocks[array, slot, :, piece] = values.astype(jnp.bfloat16)

    def send(self, array: int, slot: jax.Array, to: Any, step: jax.Array) -> None:
        """Copies a block to its place in an array (B, N, H, d)."""
        plgpu.copy_smem_to_gmem(self.blocks.at[array, slot], self.memory(to, step))


def product(a: Any, b: Any) -> jax.Array:
    """The product of two references to shared memory, (64, b's columns) float32."""

    def multiply(sum_of_products: Any) -> jax.Array:
        plgpu.wgmma(sum_of_products, a, b)
        plgpu.wgmma_wait(0)
        return sum_of_products[...]

    return pl.run_scoped(multiply, plgpu.ACC((BLOCK, b.shape[1]), jnp.float32))


def scalars_of(scalars: Any, heads: int) -> Callable[[Any], Any]:
    """Reference to the tokens' scalars (B, 1 or H, rows, N) of a span."""
    b, h, _ = head_index(heads)
    group = h if scalars.shape[1] > 1 else 0
    return lambda span: scalars.at[b, group, :, span]


class State:
    """Sums over a program's tokens of F^T Y, for one or more F that share a Y.

    Args:
      cut: how the arrays are cut.
      sums: for each F, accumulators of 64 rows each.
      features: for each F, shared memory (64, 64 halves).
      values: shared memory for Y (64, columns), or None where `add` is given one.
    """

    def __init__(
        self, cut: Cut, sums: Sequence[Sequence[Any]], features: Sequence[Any], values: Any = None
    ) -> None:
        self.cut, self.sums, self.features, self.values = cut, sums, features, values
        if cut.channels < BLOCK * cut.halves:  # its last columns are multiplied, and cut off
            for each in features:
                each[...] = jnp.zeros(each.shape, jnp.bfloat16)

    @staticmethod
    def while_summing(cut: Cut, body: Callable[[State], Any]) -> Any:
        """Calls a function of a new State of one F and a Y of all channels.

        Its shared memory is free again afterwards.
        """

        def with_memory(features: Any, values: Any) -> Any:
            sums = [plgpu.ACC((BLOCK, cut.channels), jnp.float32)] * cut.halves
            return pl.run_scoped(lambda *sums: body(State(cut, [sums], [features], values)), *sums)

        return pl.run_scoped(
            with_memory, cut.operand(BLOCK * cut.halves), cut.operand(cut.channels)
        )

    @staticmethod
    def while_summing_each(cut: Cut, count: int, columns: int, body: Callable[[State], Any]) -> Any:
        """Likewise, of several F and a Y of some columns, which `add` is given."""

        def with_memory(*features: Any) -> Any:
            def with_sums(*sums: Any) -> Any:
                each = [sums[i * cut.halves : (i + 1) * cut.halves] for i in range(count)]
                return body(State(cut, each, features))

            accumulators = [plgpu.ACC((BLOCK, columns), jnp.float32)] * (count * cut.halves)
            return pl.run_scoped(with_sums, *accumulators)

        # Both factors of a product want tiles of one width, and Y has few columns.
        return pl.run_scoped(with_memory, *[in_tiles(16, BLOCK, BLOCK * cut.halves)] * count)

    def put(self, features: jax.Array, piece: Any, which: int = 0) -> None:
        """Writes a piece of an F to memory."""
        self.features[which][:, piece] = features.astype(jnp.bfloat16)

    def add(self, values: Any = None) -> None:
        """Adds F^T Y, as they are in memory; wait for wgmma before writing to either."""
        values = self.values if values is None else values
        plgpu.commit_smem()
        for each, halves in zip(self.features, self.sums, strict=True):
            for half, sums in enumerate(halves):
                rows = each.at[:, pl.ds(half * BLOCK, BLOCK)]
                plgpu.wgmma(sums, rows.transpose((1, 0)), values)

    def results(self, which: int = 0) -> list[jax.Array]:
        """The sums of an F, (64, columns) each."""
        return [sums[...] for sums in self.sums[which]]


def write_sums(halves: Sequence[jax.Array], reference: Any) -> None:
    """Writes sums, (64, columns) each, to rows of a reference (rows, columns), cut off there."""
    zero = lax.axis_index("head") * 0
    plgpu.wait_smem_to_gmem(0)  # every warp's products have read what m_s takes the place of
    columns = halves[0].shape[1]

    def write(m_s: Any) -> None:
        for half, values in enumerate(halves):
            m_s[...] = values
            plgpu.commit_smem()
            rows = pl.ds(zero + half * BLOCK, BLOCK)
            plgpu.copy_smem_to_gmem(m_s, reference.at[rows, pl.ds(zero, columns)])
            plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(write, plgpu.SMEM((BLOCK, columns), jnp.float32))


def write_state(
    cut: Cut,
    sums: Sequence[jax.Array],
    row: Sequence[jax.Array],
    m_ref: Any,
    z_ref: Any,
    z_s: Any,
) -> None:
    """Writes a program's sums to (B H, programs, channels, channels) and (B H, programs, d).

    The row is in pieces; without any, nothing is written.
    """
    head, chunk = lax.axis_index("head"), lax.axis_index("chunk")
    write_sums(sums, m_ref.at[head, chunk])
    if row:
        for piece, values in zip(cut.pieces, row, strict=True):
            z_s[piece] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(z_s, z_ref.at[head, chunk, pl.ds(head * 0, cut.channels)])
        plgpu.wait_smem_to_gmem(0)


def load_state(cut: Cut, m_ref: Any, z_ref: Any, m_s: Any, z_s: Any, loaded: Any) -> None:
    """Brings a head's M and z to shared memory; z's channels beyond d are zero."""
    head = lax.axis_index("head")
    plgpu.copy_gmem_to_smem(m_ref.at[head], m_s, loaded)
    plgpu.copy_gmem_to_smem(z_ref.at[head, pl.ds(cut.first_channel(), cut.channels)], z_s, loaded)
    plgpu.barrier_wait(loaded)


def launch(
    kernel: Callable[..., None],
    core: Core,
    cut: Cut,
    operands: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    copies: int,
) -> Sequence[jax.Array]:
    """Runs a program for each head and part of the tokens; `copies` a step signal a barrier."""
    return plgpu.kernel(
        kernel,
        out_type=list(results),
        scratch_types=[*scratch, plgpu.Barrier(num_arrivals=copies, num_barriers=2)],
        grid=(cut.batch * cut.heads, cut.programs),
        grid_names=("head", "chunk"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*operands)


def state_types(cut: Cut) -> list[jax.ShapeDtypeStruct]:
    """Sums of each program; those of M are of all channels, whole tiles of memory."""
    programs = cut.batch * cut.heads, cut.programs
    shapes = (*programs, cut.channels, cut.channels), (*programs, cut.width)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def total(core: Core, m: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over programs; zero beyond the head's width, where phi of zeros is not quite zero."""
    rows, channels = (jnp.arange(x.shape[2]) < core.width for x in (m, z))
    return jnp.where(rows[:, None], m.sum(axis=1), 0.0), jnp.where(channels, z.sum(axis=1), 0.0)


def write_rows(rows: Sequence[jax.Array], rows_s: Any, reference: Any, span: Any) -> None:
    """Writes scalars of a block's tokens to (B H, rows, covered)."""
    for row, values in enumerate(rows):
        rows_s[row] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(rows_s, reference.at[lax.axis_index("head"), :, span])


def added(rows: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Sums of the rows that pieces of channels have parts of."""
    return [sum(parts[1:], parts[0]) for parts in zip(*rows, strict=True)]
