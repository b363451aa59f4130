"""What accelerators can do at most, by data sheet: one table for every figure derived from it.

A row is a device as JAX counts them: a TPU7x chip is two. Links are one way; a torus has two of a
chip along each of its dimensions, a GPU one to its host's switch.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30
TPU_PAGES = "Google Cloud, TPU documentation, page"
# Per port and one way: the pages' bidirectional bandwidth of a chip, over its ports, over two.


class Chip(NamedTuple):
    """A device's limits.

    Attributes:
      name: what this project calls it.
      kinds: parts of JAX's device_kind that name it.
      flops: peak dense bfloat16 FLOP/s.
      hbm: bytes of its main memory.
      hbm_bandwidth: bytes a second to and from it.
      link_bandwidth: bytes a second of one link between chips, one way.
      source: where the figures are from.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str


# The first whose kind is part of a device's is taken. GPUs are the SXM forms where none is named.
CHIPS: tuple[Chip, ...] = (
    # Its page gives 1,228 GB/s, and its links' width in Gbit/s.
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1228e9, 50e9, f"{TPU_PAGES} TPU v4"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 50e9, f"{TPU_PAGES} TPU v5e"),
    Chip("v5p", ("TPU v5p", "TPU v5"), 459e12, 95 * GIB, 2765e9, 100e9, f"{TPU_PAGES} TPU v5p"),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 100e9, f"{TPU_PAGES} TPU v6e"
    ),
    # Half a chip of 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and links of 100 GB/s.
    Chip(
        "tpu7x",
        ("TPU7x", "TPU v7"),
        1153.5e12,
        96 * GIB,
        3690e9,
        50e9,
        f"{TPU_PAGES} TPU7x (Ironwood)",
    ),
    Chip("A100", ("A100",), 312e12, 80e9, 2039e9, 300e9, "NVIDIA, A100 80GB data sheet"),
    Chip("H100 PCIe", ("H100 PCIe",), 756e12, 80e9, 2000e9, 300e9, "NVIDIA, H100 data sheet"),
    Chip("H100", ("H100",), 989e12, 80e9, 3350e9, 450e9, "NVIDIA, H100 data sheet"),
    Chip("H200", ("H200",), 989e12, 141e9, 4800e9, 450e9, "NVIDIA, H200 data sheet"),
    Chip("B200", ("B200",), 2250e12, 180e9, 8000e9, 900e9, "NVIDIA, DGX B200 data sheet"),
)
# Devices of other limits with names that would fit.
UNLIKE = ("TPU v4 lite", "H100 NVL", "GB200")


def chip_of(device_kind: str) -> Chip | None:
    """The row of a device; None for one that is not in the table."""
    if any(name in device_kind for name in UNLIKE):
        return None
    return next((chip for chip in CHIPS if any(kind in device_kind for kind in chip.kinds)), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device; None for one that is not in the table."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.flops
