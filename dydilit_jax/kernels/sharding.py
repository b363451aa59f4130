"""How the core's arrays (B, N, D) lie on a mesh: batch over some axes, tokens over another.

XLA partitions its own operations; a Pallas call has to be told. Channels are never split here: the
norms of equation (1) and the lambda routers need whole tokens.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
SEQUENCE_AXIS = "sequence"


@dataclasses.dataclass(frozen=True)
class CoreSharding:
    """Mesh axes of batch and tokens.

    Attributes:
      mesh: a Mesh or AbstractMesh; along its other axes the core's arrays are copies.
      batch: axes that B is split over, perhaps none.
      sequence: axis that N is split over, or None.
    """

    mesh: Any
    batch: tuple[str, ...] = ()
    sequence: str | None = None

    @property
    def batch_size(self) -> int:
        """Parts that B is split into."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch)

    @property
    def sequence_size(self) -> int:
        """Parts that N is split into."""
        return self.mesh.shape[self.sequence] if self.sequence else 1

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes that B or N is split over."""
        return self.batch if self.sequence is None else (*self.batch, self.sequence)

    def spec(self, name_of_rank: str) -> P:
        """Partition of an array whose dimensions are named by letters: b, n, any other is whole."""
        axes = {"b": self.batch or None, "n": self.sequence}
        return P(*(axes.get(letter) for letter in name_of_rank))


def ambient_sharding() -> CoreSharding | None:
    """The sharding that `jax.set_mesh` stands for; None without a mesh, or inside `shard_map`.

    Axes named as the trainer's count: `data` and `fsdp` split the batch, `sequence` the tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    ]
    if not automatic or mesh.size == 1:
        return None
    batch = tuple(axis for axis in BATCH_AXES if axis in automatic)
    sequence = SEQUENCE_AXIS if SEQUENCE_AXIS in automatic else None
    if sequence is not None and mesh.shape[sequence] == 1:
        sequence = None
    return CoreSharding(mesh, batch, sequence)


def placement_known(sharding: CoreSharding | None) -> bool:
    """Whether a kernel can tell how its arrays lie: a sharding, a `shard_map`, or one device."""
    inside = bool(jax.sharding.get_abstract_mesh().axis_names)
    return sharding is not None or inside or jax.device_count() == 1
