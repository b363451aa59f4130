"""Devices that are not there: a slice of TPUs, or GPUs, by name, for compiling alone.

A TPU's compiler is libtpu, which needs no TPU. A topology is `CHIP:AxB` or `CHIP:AxBxC`, in chips.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.training.chips import Chip, chip_of

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16",
    "16x16x16",
)  # fmt: skip
# The shapes that Google Cloud's pages on each generation list.
TOPOLOGIES = {"v5e": _FLAT, "v6e": _FLAT, "v5p": _CUBES, "tpu7x": _CUBES}
GPU = "cuda"
GPU_COMPILERS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


class Topology(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      platform: `tpu` or `gpu`, as kernels are chosen for.
      devices: compile-only devices.
      chip: what each can do.
      chips: how many chips they are, as they are rented.
      shape: chips along each dimension of the network between them.
    """

    name: str
    platform: str
    devices: Sequence[Any]
    chip: Chip
    chips: int
    shape: tuple[int, ...]


def set_environment() -> None:
    """Settings for compiling alone, to be made before JAX looks for devices.

    JAX takes no accelerator of this machine. libtpu, when it is loaded, asks no metadata server,
    may be loaded by several processes, and is given a host's name, lest it complain of none.
    """
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_ID", "0")


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """Generation and shape of `v5e:16x16`, or of `cuda:1x1x8`.

    Raises:
      UserError: not of that form, or none that is known; lists those that are.
    """
    generation, colon, text = name.partition(":")
    if generation == GPU:
        if not re.fullmatch(r"\d+x\d+x\d+", text):
            raise UserError(f"topology {name!r} must be cuda:SLICESxHOSTSxGPUS, such as cuda:1x1x8")
        return generation, tuple(int(each) for each in text.split("x"))
    if not colon or generation not in TOPOLOGIES:
        known = [f"{each}:{shape}" for each, shapes in TOPOLOGIES.items() for shape in shapes]
        raise unknown_name("topology", name, [*known, "cuda:1x1x8"])
    if text not in TOPOLOGIES[generation]:
        known = [f"{generation}:{shape}" for shape in TOPOLOGIES[generation]]
        raise unknown_name(f"topology of {generation}", name, known)
    return generation, tuple(int(each) for each in text.split("x"))


def open_topology(name: str, gpu_target: Path | None = None) -> Topology:
    """The devices of a topology.

    Args:
      name: as for `parse_topology`.
      gpu_target: for `cuda`, a file with XLA's GpuTargetConfig as text.

    Raises:
      UserError: an unknown topology, or no compiler for it.
    """
    generation, shape = parse_topology(name)
    set_environment()
    if generation == GPU:
        return _gpus(name, shape, gpu_target)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs libtpu, the TPU's compiler, which is not installed: "
            "pip install -r requirements-tpu.txt, in an environment of its own (no TPU is needed)"
        )
    # A host has four chips or more, except where there is one chip alone.
    hosts = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
    try:
        devices = _compile_only("tpu", name, hosts)
    except Exception as error:  # whatever is wrong with libtpu: its own words
        raise UserError(f"libtpu has no compiler for {name}: {_one_line(error)}") from error
    chip = chip_of(devices[0].device_kind)
    assert chip is not None, devices[0].device_kind
    return Topology(name, "tpu", devices, chip, math.prod(shape), shape)


def _gpus(name: str, shape: tuple[int, ...], gpu_target: Path | None) -> Topology:
    options = {"topology": "x".join(str(each) for each in shape)}
    if gpu_target is not None:
        if not gpu_target.is_file():
            raise UserError(f"--gpu_target={gpu_target} is no file")
        options["target_config"] = gpu_target.read_text()
    if not any(importlib.util.find_spec(each) for each in GPU_COMPILERS):
        version = importlib.metadata.version("jax")
        raise UserError(
            f"--topology={name} needs JAX's compiler for GPUs, which is not installed: pip install "
            f"jax-cuda12-plugin=={version} jax-cuda12-pjrt=={version} (no GPU is needed), and give "
            "--gpu_target=FILE"
        )
    try:
        devices = _compile_only(GPU, name, options)
    except Exception as error:
        target = f"--gpu_target={gpu_target}" if gpu_target else "no --gpu_target and no GPU here"
        raise UserError(
            f"this JAX does not compile for {name} with {target}: {_one_line(error)}. It takes "
            "--gpu_target=FILE, XLA's description of the GPU"
        ) from error
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise UserError(f"no figures are known of {devices[0].device_kind!r} (training/chips.py)")
    return Topology(name, "gpu", devices, chip, len(devices), shape)


def _compile_only(platform: str, name: str, options: dict[str, Any]) -> Sequence[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")


def group_bandwidth(topology: Topology, devices: Sequence[Any]) -> float:
    """Bytes a second that each device of a group can send to the rest of it.

    Along each dimension of the torus in which the group's chips lie apart, a ring uses a link each
    way where the dimension is closed to a ring, and one where it is not. Closed is a dimension that
    the group goes along in full and that is 16 long on v5e and v6e, a multiple of 4 on v5p and
    TPU7x (their pages). A group of GPUs has one link to its switch.
    """
    link = topology.chip.link_bandwidth
    if topology.platform != "tpu":
        return link
    links = 0
    for dimension, length in enumerate(topology.shape):
        spread = len({device.coords[dimension] for device in devices})
        closed = length % 4 == 0 if len(topology.shape) == 3 else length == 16
        if spread > 1:
            links += 2 if closed and spread == length else 1
    return link * max(links, 1)  # two devices of one chip: at least as fast
