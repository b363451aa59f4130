"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), as ADM's evaluator.

Around each vector of a set lies a ball that reaches to its k-th nearest other vector of the set,
k = 3; their union is the set's manifold.

    precision   share of samples inside the manifold of the reference
    recall      share of the reference inside the manifold of the samples

Distances |a|^2 - 2 a . b + |b|^2 are computed in float32, in blocks: a block of rows is cut over
all devices, a block of columns goes to each of them, so that no device ever holds a whole set.
ADM's evaluator computes them in float16 where those are finite; see docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.agreement import raised_together
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.collectives import ROWS, from_each_process, gather, row_mesh
from dydilit_jax.metrics.rows import KeptRows

NEIGHBOURS = 3
# A device holds distances of so many rows and columns at once.
ROWS_EACH, COLUMNS = 2048, 8192


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


class Block(NamedTuple):
    """Vectors over all devices.

    `rows` (n, D), `place` (n,) int32, -1 where there is none, and `radii` (n,), the squared radii
    of their balls where they are known.
    """

    rows: jax.Array
    place: jax.Array
    radii: jax.Array


class Blocks:
    """A set of vectors, block by block; each process brings as many of each, or fillings.

    Args:
      rows: this process's.
      origin: (D,) that is subtracted: distances do not change, but lose fewer digits.
      mesh: a row_mesh of all processes.
      size: vectors of a block, made a multiple of the devices.
      radii: squared radii of this process's vectors' balls; None where they are not known.
    """

    def __init__(
        self,
        rows: KeptRows,
        origin: np.ndarray,
        mesh: Mesh,
        size: int,
        radii: np.ndarray | None = None,
    ):
        self.rows, self.origin, self.mesh = rows, origin.astype(np.float32), mesh
        self.radii = np.zeros(len(rows), np.float32) if radii is None else radii
        counts = gather(np.array(len(rows)))
        self.total = int(counts.sum())
        # A small set needs no large block.
        size = min(size, int(counts.max()) * len(counts))
        self.each = math.ceil(size / mesh.size) * len(mesh.local_devices)
        self.number = math.ceil(int(counts.max()) / self.each)

    def __iter__(self) -> Iterator[Block]:
        """The blocks; a collective."""
        for start in range(0, self.number * self.each, self.each):
            with raised_together():
                found = self.rows.read(start, start + self.each)
            rows = np.zeros((self.each, self.rows.width), np.float32)
            index = np.full(self.each, -1, np.int32)
            radii = np.zeros(self.each, np.float32)
            rows[: len(found)] = found["row"] - self.origin
            index[: len(found)] = found["index"]
            radii[: len(found)] = self.radii[start : start + self.each]
            yield Block(*(from_each_process(each, self.mesh) for each in (rows, index, radii)))

    def full(self, shape: tuple[int, ...], value: Any, dtype: type) -> jax.Array:
        """An array over a block's vectors that starts with one value."""
        return from_each_process(np.full((self.each, *shape), value, dtype), self.mesh)

    def own(self, values: jax.Array) -> np.ndarray:
        """This process's part of an array over a block's vectors."""
        shards = sorted(values.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards])


def squared_distances(first: jax.Array, second: jax.Array) -> jax.Array:
    """Squared distances (m, n) of rows (m, D) and (n, D), float32."""
    products = jnp.matmul(first, second.T, precision=jax.lax.Precision.HIGHEST)
    norms = jnp.sum(first * first, axis=1)[:, None] + jnp.sum(second * second, axis=1)
    return jnp.maximum(norms - 2.0 * products, 0.0)


class _Programs:
    """The two compiled programs of blocks on a row_mesh."""

    def __init__(self, mesh: Mesh):
        everywhere = NamedSharding(mesh, P())
        by_row = NamedSharding(mesh, P(ROWS))

        def nearest(block: Block, others: Block, best: jax.Array) -> jax.Array:
            """The smallest squared distances `best` (n, k + 1), ascending, with `others` too."""
            others = jax.lax.with_sharding_constraint(others, everywhere)
            distances = squared_distances(block.rows, others.rows)
            # A vector is at no distance of itself, whatever rounding makes of it.
            itself = block.place[:, None] == others.place
            distances = jnp.where(itself, 0.0, distances)
            distances = jnp.where(others.place < 0, jnp.inf, distances)
            joint = jnp.concatenate([best, distances], axis=1)
            return -jax.lax.top_k(-joint, best.shape[1])[0]

        def inside(block: Block, others: Block, found: jax.Array) -> jax.Array:
            """(n,) whether a vector of the block was found inside a ball, or is in one of these."""
            others = jax.lax.with_sharding_constraint(others, everywhere)
            distances = squared_distances(block.rows, others.rows)
            within = (distances <= others.radii) & (others.place >= 0)
            return found | within.any(axis=1)

        self.nearest = jax.jit(nearest, out_shardings=by_row, donate_argnums=2)
        self.inside = jax.jit(inside, out_shardings=by_row, donate_argnums=2)


def _radii(rows: Blocks, columns: Blocks, programs: _Programs, neighbours: int) -> np.ndarray:
    """Squared radii of this process's balls; rows and columns are the same vectors."""
    radii = [np.empty(0, np.float32)]
    for block in rows:
        best = rows.full((neighbours + 1,), np.inf, np.float32)
        for others in columns:
            best.block_until_ready()  # Else all blocks would wait in memory for their turn.
            best = programs.nearest(block, others, best)
        radii.append(rows.own(best)[:, neighbours])
    return np.concatenate(radii)[: len(rows.rows)]


def _share_inside(rows: Blocks, columns: Blocks, programs: _Programs) -> float:
    """Share of the rows' vectors inside the balls of the columns'."""
    count = 0
    for block in rows:
        found = rows.full((), False, np.bool_)
        for others in columns:
            found.block_until_ready()
            found = programs.inside(block, others, found)
        count += int(np.sum(rows.own(found) & (rows.own(block.place) >= 0)))
    return float(gather(np.array(count)).sum() / rows.total)


def precision_recall(
    reference: KeptRows,
    samples: KeptRows,
    mesh: Mesh,
    *,
    origin: np.ndarray | None = None,
    neighbours: int = NEIGHBOURS,
    rows_each: int = ROWS_EACH,
    columns: int = COLUMNS,
) -> PrecisionRecall:
    """Precision and recall of samples against a reference; a collective.

    Args:
      reference, samples: this process's rows; indices below 2^31.
      mesh: devices of all processes that compute.
      origin: (D,) near the vectors, their mean; None for zero.
      neighbours: k.
      rows_each, columns: distances that a device holds at once.

    Raises:
      UserError: a set of no more than k vectors.
    """
    on = row_mesh(mesh)
    origin = np.zeros(reference.width) if origin is None else origin

    def cut(rows: KeptRows, radii: np.ndarray | None = None) -> tuple[Blocks, Blocks]:
        return (
            Blocks(rows, origin, on, rows_each * on.size),
            Blocks(rows, origin, on, columns, radii),
        )

    real, drawn = cut(reference), cut(samples)
    if min(real[0].total, drawn[0].total) <= neighbours:
        raise UserError(
            f"precision and recall need more than {neighbours} images in each set, got "
            f"{real[0].total} and {drawn[0].total}"
        )
    programs = _Programs(on)
    balls_of_real = cut(reference, _radii(*real, programs, neighbours))[1]
    balls_of_drawn = cut(samples, _radii(*drawn, programs, neighbours))[1]
    precision = _share_inside(drawn[0], balls_of_real, programs)
    recall = _share_inside(real[0], balls_of_drawn, programs)
    return PrecisionRecall(precision, recall)
