"""How the kernels of a wide head's backward pass go through blocks of 64 tokens by 64 channels.

A step has a block of Z (and Z'), and Y M^T there: 64 tokens of Y with all channels, times 64 rows
of M. One of the two stays in shared memory for all steps of a program. The other is copied in
pieces of 64 channels, as many ahead as there is room for: at most two steps' worth, less than one
step's in heads of 704 channels.
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

from dydilit_jax.kernels.dydila.pallas_gpu_blocks import in_tiles
from dydilit_jax.kernels.dydila.pallas_gpu_features import (
    BLOCK,
    Core,
    Features,
    compiler_params,
    first_channel,
    head_index,
)
from dydilit_jax.kernels.dydila.pallas_gpu_wide import Tiles, chunks

SHARED_MEMORY = 227 * 1024  # bytes of one program
ALIGNMENT = 1024  # of every array in it
RESERVED = 3 * 1024  # for barriers, and for sums over registers of several warps
PIECE = 2 * BLOCK * BLOCK  # bytes
OF_TOKENS = ("scalars", "through_norms", "weights", "den")  # float32, copied for each step


@dataclasses.dataclass(frozen=True)
class Walk:
    """The steps of a program.

    Attributes:
      shape: B, N, H and d of the tokens.
      rounds: 0 to go through blocks of tokens, with M's rows of one tile held; else how many times
        to go through the tiles of one block of tokens, with Y held.
    """

    shape: tuple[int, ...]
    rounds: int = 0

    @property
    def tiles(self) -> int:
        """Of 64 channels."""
        return Tiles(self.shape[3]).count

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: heads, tiles, and parts of the tokens."""
        B, N, H, _ = self.shape
        if self.rounds:
            return B * H, 1, -(-N // BLOCK)
        return B * H, self.tiles, chunks(B, N, H, self.tiles)[0]

    @property
    def steps(self) -> int:
        """Of a program."""
        B, N, H, _ = self.shape
        return self.rounds * self.tiles or chunks(B, N, H, self.tiles)[1]

    @property
    def covered(self) -> int:
        """Tokens of all programs."""
        return BLOCK * self.grid[2] * (1 if self.rounds else self.steps)

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Block of tokens and tile of channels."""
        chunk = lax.axis_index("chunk")
        if self.rounds:
            return chunk, lax.rem(step, jnp.int32(self.tiles))
        return chunk * self.steps + step, lax.axis_index("tile")

    @property
    def like_tokens(self) -> jax.ShapeDtypeStruct:
        """Type of the tokens' gradients."""
        return jax.ShapeDtypeStruct(self.shape, jnp.bfloat16)

    def rows(self, count: int) -> jax.ShapeDtypeStruct:
        """Type of results of each token and program along the channels."""
        return jax.ShapeDtypeStruct((*self.grid[:2], count, self.covered), jnp.float32)


def launch(
    kernel: Callable[[dict[str, Any]], None],
    core: Core,
    walk: Walk,
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Runs a kernel of the references by name: `operands`, `results` and `scratch`."""
    memory = scratch(core, walk, operands, results)
    names = [*operands, *results, *memory]

    def of_references(*references: Any) -> None:
        kernel(dict(zip(names, references, strict=True)))

    of_references.__name__ = kernel.__name__  # by which profiles and compiled programs know it
    found = plgpu.kernel(
        of_references,
        out_type=list(results.values()),
        scratch_types=list(memory.values()),
        grid=walk.grid,
        grid_names=("head", "tile", "chunk"),
        compiler_params=compiler_params(),
        interpret=core.interpret,
    )(*operands.values())
    return dict(zip(results, found, strict=True))


def scratch(
    core: Core,
    walk: Walk,
    operands: dict[str, jax.Array],
    results: dict[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
    """A program's shared memory by name."""
    sides = 1 + core.differential
    types: dict[str, Any] = {
        "held_s": plgpu.SMEM((walk.tiles, BLOCK, BLOCK), jnp.bfloat16),
        "blocks_s": plgpu.SMEM((sides, 2, BLOCK, BLOCK), jnp.bfloat16),
        "z_s": plgpu.SMEM((2, BLOCK), jnp.float32),
    }
    for name in OF_TOKENS:
        if name in operands:
            rows = () if name == "den" else (operands[name].shape[-2],)
            types[f"{name}_s"] = plgpu.SMEM((2, *rows, BLOCK), jnp.float32)
    if "rows" in results:
        types["d_rows_s"] = plgpu.SMEM((results["rows"].shape[-2], BLOCK), jnp.float32)
    if "router" in operands:
        types |= router_scratch(sides, operands["router"].shape[2])
    room = SHARED_MEMORY - RESERVED - sum(map(aligned_bytes, types.values()))
    pieces = min(2 * walk.tiles, room // PIECE)
    types["copied_s"] = plgpu.SMEM((pieces, BLOCK, BLOCK), jnp.bfloat16)
    copies = sides + 1 + sum(name in operands for name in (*OF_TOKENS, "d_logits"))
    barriers = {
        "held": plgpu.Barrier(num_arrivals=walk.tiles + sides * ("router" in operands)),
        "copied": plgpu.Barrier(num_arrivals=1, num_barriers=pieces),
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=2),
    }
    return types | barriers


def router_scratch(sides: int, choices: int) -> dict[str, Any]:
    """What a router adds to `scratch`."""
    # The tensor core wants tiles of one width, 16 channels for 16 choices. Mosaic finds that out
    # by trial, and in some kernels not before it gives up.
    return {
        "features_s": in_tiles(16, BLOCK, BLOCK),
        "router_s": in_tiles(16, sides, choices, BLOCK),
        "d_logits_s": in_tiles(16, 2, BLOCK, choices),
        # Accumulators of its gradient are written by way of this.
        "d_router_s": plgpu.SMEM((BLOCK, choices), jnp.float32),
    }


def aligned_bytes(array: Any) -> int:
    """What an array takes of shared memory."""
    size = math.prod(array.shape) * jnp.dtype(array.dtype).itemsize
    return ALIGNMENT * -(-size // ALIGNMENT)


class Stream:
    """The copies of a program's steps, started ahead, and Y M^T of each.

    Results of a step take the place of its blocks of Z and Z'.

    Args:
      core: static part.
      walk: the steps.
      of: references by name, as `launch` has them.
    """

    def __init__(self, core: Core, walk: Walk, of: dict[str, Any]) -> None:
        self.core, self.walk, self.of = core, walk, of
        self.batch, self.head, self.zero = head_index(core.heads)
        self.sides = range(1 + core.differential)
        self.pieces = of["copied_s"].shape[0]
        held, self.copied = ("y", "m") if walk.rounds else ("m", "y")
        for part in range(walk.tiles):
            source = self._operand(held, self.zero, self.zero + part)
            plgpu.copy_gmem_to_smem(source, of["held_s"].at[part], of["held"])
        if "router" in of:
            _, channels = self._spans(self.zero)
            for side in self.sides:
                source = of["router"].at[side, self.head, :, channels]
                plgpu.copy_gmem_to_smem(source, of["router_s"].at[side], of["held"])
        for piece in range(min(self.pieces, walk.tiles * walk.steps)):
            self._fetch_piece(self.zero + piece)
        self._fetch_block(self.zero)
        plgpu.barrier_wait(of["held"])

    def _spans(self, step: jax.Array) -> tuple[Any, Any]:
        """A step's tokens, and its channels in arrays of whole tiles."""
        block, tile = self.walk.place(step)
        return pl.ds(block * BLOCK, BLOCK), pl.ds(self.zero + tile * BLOCK, BLOCK)

    def _in_memory(self, array: Any, step: jax.Array) -> Any:
        """A step's block of an array (B, N, H, d)."""
        span, (_, tile) = self._spans(step)[0], self.walk.place(step)
        channels = pl.ds(first_channel(self.walk.shape[3]) + tile * BLOCK, BLOCK)
        return array.at[self.batch, span, self.head, channels]

    def _operand(self, name: str, step: jax.Array, part: jax.Array) -> Any:
        """64 channels of a step's tokens of Y, or rows of M."""
        span, rows = self._spans(step)
        if name == "m":
            across = pl.ds(self.zero + part * BLOCK, BLOCK)
            return self.of["m"].at[lax.axis_index("head"), rows, across]
        across = pl.ds(first_channel(self.walk.shape[3]) + part * BLOCK, BLOCK)
        return self.of["y"].at[self.batch, span, self.head, across]

    def _fetch_piece(self, piece: jax.Array) -> None:
        """Starts the copy of a piece, counted from the program's first."""
        of, tiles = self.of, jnp.int32(self.walk.tiles)
        source = self._operand(self.copied, lax.div(piece, tiles), lax.rem(piece, tiles))
        slot = lax.rem(piece, jnp.int32(self.pieces))
        plgpu.copy_gmem_to_smem(source, of["copied_s"].at[slot], of["copied"].at[slot])

    def _fetch_block(self, step: jax.Array) -> None:
        """Starts the copies of a step's Z and Z', and of what belongs to its tokens or channels."""
        of, head = self.of, lax.axis_index("head")
        slot = lax.rem(step, jnp.int32(2))
        span, channels = self._spans(step)
        sources = {"z": of["z"].at[head, channels]}
        for name in ("scalars", "through_norms"):
            if name in of:
                group = self.head if of[name].shape[1] > 1 else 0
                sources[name] = of[name].at[self.batch, group, :, span]
        if "weights" in of:
            sources["weights"] = of["weights"].at[head, :, span]
        if "den" in of:
            sources["den"] = of["den"].at[head, span]
        if "d_logits" in of:
            sources["d_logits"] = of["d_logits"].at[self.batch, span]
        for name, source in sources.items():
            plgpu.copy_gmem_to_smem(source, of[f"{name}_s"].at[slot], of["ready"].at[slot])
        for side in self.sides:
            source = self._in_memory(of[f"tokens{side}"], step)
            plgpu.copy_gmem_to_smem(source, of["blocks_s"].at[side, slot], of["ready"].at[slot])

    def _multiply(self, step: jax.Array) -> jax.Array:
        """Y M^T, (64, 64) float32."""
        tiles = self.walk.tiles

        def multiply(sum_of_products: Any) -> jax.Array:
            @pl.loop(0, tiles)  # not unrolled: each piece's addresses would be kept in registers
            def _(part: jax.Array) -> None:
                piece = step * tiles + part
                slot = lax.rem(piece, jnp.int32(self.pieces))
                plgpu.barrier_wait(self.of["copied"].at[slot])
                held, copied = self.of["held_s"].at[part], self.of["copied_s"].at[slot]
                y, m = (held, copied) if self.walk.rounds else (copied, held)
                plgpu.wgmma(sum_of_products, y, m.transpose((1, 0)))
                if self.pieces < tiles:

                    @pl.when(part + self.pieces < tiles)
                    def _() -> None:
                        plgpu.wgmma_wait(0)
                        plgpu.commit_smem()  # every warp is done with it
                        self._fetch_piece(piece + self.pieces)

            plgpu.wgmma_wait(0)
            return sum_of_products[...]

        return pl.run_scoped(multiply, plgpu.ACC((BLOCK, BLOCK), jnp.float32))

    def _start_copies(self, step: jax.Array) -> None:
        """Of what takes the places that a step's product has left, and of the next block."""
        tiles = self.walk.tiles

        @pl.loop(max(0, tiles - self.pieces), tiles)
        def _(part: jax.Array) -> None:
            piece = step * tiles + part + self.pieces

            @pl.when(piece < tiles * self.walk.steps)
            def _() -> None:
                self._fetch_piece(piece)

        @pl.when(step + 1 < self.walk.steps)
        def _() -> None:
            self._fetch_block(step + 1)

    def step(self, step: jax.Array) -> tuple[jax.Array, Features, jax.Array]:
        """Waits for a step's copies and starts later ones.

        Returns the slot of what belongs to its tokens, the features of its block, and Y M^T.
        """
        products = self._multiply(step)
        # Results of the step before have left, and every warp is done with what it multiplied.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self._start_copies(step)
        of, slot = self.of, lax.rem(step, jnp.int32(2))
        plgpu.barrier_wait(of["ready"].at[slot])
        # Mosaic's search for layouts ends sooner where one is given.
        blocks = [
            plgpu.layout_cast(of["blocks_s"][side, slot], plgpu.Layout.WGMMA) for side in self.sides
        ]
        through_norms = of["through_norms_s"].at[slot] if "through_norms" in of else None
        return (
            slot,
            Features.of(self.core, blocks, of["scalars_s"].at[slot], through_norms),
            products,
        )

    def write_tokens(self, step: jax.Array, side: int, values: jax.Array) -> None:
        """Writes a step's block of the gradient of Z, or of Z'; every warp waits for the others."""
        block_s = self.of["blocks_s"].at[side, lax.rem(step, jnp.int32(2))]
        block_s[...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()
        target = self._in_memory(self.of[f"d_tokens{side}"], step)
        plgpu.copy_smem_to_gmem(block_s, target)

    def write_rows(self, step: jax.Array, rows: Sequence[jax.Array]) -> None:
        """Writes results of a step's tokens, (64,) each."""
        for row, values in enumerate(rows):
            self.of["d_rows_s"][row] = values
        plgpu.commit_smem()
        span, _ = self._spans(step)
        target = self.of["rows"].at[lax.axis_index("head"), lax.axis_index("tile"), :, span]
        plgpu.copy_smem_to_gmem(self.of["d_rows_s"], target)
