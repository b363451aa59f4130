"""How long a compiled program would take at best: its work against the chip's limits.

    compute = FLOPs / peak        memory = bytes / bandwidth        network = sent / links
    device  = sum over instructions of max(compute, memory)
    step    between max(device, network), all of it overlapped, and device + network, none of it

An estimate from a compiled program and a data sheet; nothing is timed. No kernel reaches a peak,
and elementwise work (exponents, norms) has no term, so real steps take longer than the lower end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dydilit_jax.training.chips import Chip
from dydilit_jax.training.collectives import Collective
from dydilit_jax.training.costs import Work

SECONDS_A_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one execution of a program, estimated.

    Attributes:
      flops: FLOPs of matrix products on a device.
      hbm_bytes: to and from its memory.
      compute: at the peak.
      memory: at the memory's bandwidth.
      device: instruction by instruction, the longer of both.
      network: of all collectives, one after the other.
    """

    flops: float
    hbm_bytes: float
    compute: float
    memory: float
    device: float
    network: float

    @property
    def overlapped(self) -> float:
        """Seconds if all collectives run beside computation."""
        return max(self.device, self.network)

    @property
    def serial(self) -> float:
        """Seconds if no collective does."""
        return self.device + self.network

    @property
    def bound(self) -> str:
        """What the lower end waits for most: `compute`, `memory` or `network`."""
        if self.network > self.device:
            return "network"
        return "compute" if self.compute > self.memory else "memory"


def roofline(
    work: Sequence[Work],
    collectives: Sequence[Collective],
    chip: Chip,
    bandwidth: Callable[[Sequence[int]], float],
) -> Roofline:
    """The estimate for a program.

    Args:
      work: its instructions.
      collectives: its collectives.
      chip: limits of a device.
      bandwidth: bytes a second that a device sends within a group of partitions.
    """
    flops = sum(each.cost.flops * each.times for each in work)
    moved = sum(each.cost.bytes * each.times for each in work)
    moved += sum(each.hbm_bytes * each.times for each in collectives)
    compute, memory = flops / chip.flops, moved / chip.hbm_bandwidth
    device = sum(
        max(each.cost.flops / chip.flops, each.cost.bytes / chip.hbm_bandwidth) * each.times
        for each in work
    )
    network = sum(each.sent * each.times / bandwidth(each.group) for each in collectives)
    return Roofline(flops, moved, compute, memory, max(device, memory), network)
