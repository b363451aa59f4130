"""Which meshes and rematerialisations fit a topology, and which of them is fastest by estimate.

Each candidate is compiled, which takes a minute or so; what cannot fit or cannot win is left out: a
mesh whose state alone exceeds the memory, a mesh that cuts the state less than one that did not fit
with the same rematerialisation, and any rematerialisation where there is room for none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dydilit_jax.config import Config, MeshConfig
from dydilit_jax.errors import UserError
from dydilit_jax.training.compile_report import mesh_text
from dydilit_jax.training.lowering import Program, compile_program
from dydilit_jax.training.sharding import check_fits, check_model, parameter_specs
from dydilit_jax.training.state import Network
from dydilit_jax.training.topology import Topology

REMATERIALISATIONS = ("none", "dots", "full")  # from most memory to most computation
LENGTHS_APART = 4  # between lengths of fsdp that are tried
PARTS_TRIED = 3  # of tensor times sequence
Compile = Callable[[Config, Topology, str], Program]


class Candidate(NamedTuple):
    """A mesh and a rematerialisation."""

    mesh: MeshConfig
    rematerialisation: str


def candidates(config: Config, topology: Topology, what: str) -> list[MeshConfig]:
    """Meshes worth trying, by their promise: few parts of tokens and channels, the state well cut.

    `tensor` times `sequence` is what it takes to give every device a part of an image, or one of
    the next two divisors of the devices. `fsdp` is the longest that fits; then such that go along
    whole dimensions of the network between the chips, which are rings of their own; then 1.
    """
    devices = len(topology.devices)
    batch = config.data.batch_size if what == "train" else devices
    needed = -(-devices // batch)
    found: list[MeshConfig] = []
    for parts in [each for each in _divisors(devices) if each >= needed][:PARTS_TRIED]:
        for tensor in _divisors(parts):
            rest = devices // parts
            fitting = [
                mesh
                for fsdp in reversed(_divisors(rest))
                if _is_valid(config, what, mesh := _mesh(rest, fsdp, tensor, parts // tensor))
            ]
            whole = _whole_dimensions(topology.shape)
            kept = fitting[:1]
            for mesh in fitting[1:]:
                apart = kept[-1].fsdp >= LENGTHS_APART * mesh.fsdp
                if mesh.fsdp == 1 or (apart and mesh.fsdp in whole):
                    kept.append(mesh)
            found += kept
    return found


def _whole_dimensions(shape: tuple[int, ...]) -> set[int]:
    """Products of some of the lengths."""
    products = {1}
    for length in shape:
        products |= {length * each for each in products}
    return products


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _mesh(rest: int, fsdp: int, tensor: int, sequence: int) -> MeshConfig:
    return MeshConfig(data=rest // fsdp, fsdp=fsdp, tensor=tensor, sequence=sequence)


class _Axes(NamedTuple):
    """What the checks read of a mesh."""

    shape: dict[str, int]


def _is_valid(config: Config, what: str, mesh: MeshConfig) -> bool:
    axes = dataclasses.asdict(mesh)
    try:
        if what == "train":
            check_fits(config, _Axes(axes))  # type: ignore[arg-type]
        check_model(config.model, axes)
        parameter_specs(Network.create(config).abstract_parameters(), axes)
    except UserError:
        return False
    return True


def search(
    config: Config,
    topology: Topology,
    what: str,
    limit: int,
    compile: Compile = compile_program,
) -> Iterator[Program]:
    """Compiles candidates, best promise first, and yields each as it is done.

    Args:
      config: the run's; its mesh and rematerialisation are replaced.
      topology: what to compile for.
      what: `train` or `sample`.
      limit: how many to compile at most.
      compile: what compiles one.

    Raises:
      UserError: no mesh of the topology's devices fits the config.
    """
    meshes = candidates(config, topology, what)
    if not meshes:
        raise UserError(
            f"no mesh of {len(topology.devices)} devices fits: data.batch_size "
            f"{config.data.batch_size} and the network's heads and rows allow none"
        )
    done = 0
    failed: list[Candidate] = []
    for mesh in meshes:
        fitted: list[str] = []
        for policy in _policies(config, what):
            tried = Candidate(mesh, policy)
            if fitted == ["none"] or any(_needs_as_much(tried, other) for other in failed):
                continue
            if done == limit:
                return
            model = dataclasses.replace(config.model, rematerialisation=policy)
            program = compile(dataclasses.replace(config, mesh=mesh, model=model), topology, what)
            done += program.seconds > 0  # its state alone may be too large
            yield program
            if program.fits:
                fitted.append(policy)
            else:
                failed.append(tried)


def _policies(config: Config, what: str) -> tuple[str, ...]:
    """Rematerialisations to try: none; where it does not fit, the most; then what is between."""
    return ("none", "full", "dots") if what == "train" else (config.model.rematerialisation,)


def _needs_as_much(tried: Candidate, failed: Candidate) -> bool:
    """Whether a candidate needs at least as much memory as one that did not fit."""
    same = (tried.mesh.tensor, tried.mesh.sequence) == (failed.mesh.tensor, failed.mesh.sequence)
    policies = (tried.rematerialisation, failed.rematerialisation)
    if not same or tried.mesh.fsdp > failed.mesh.fsdp:
        return False
    if not set(policies) <= set(REMATERIALISATIONS):
        return policies[0] == policies[1]
    return REMATERIALISATIONS.index(policies[0]) <= REMATERIALISATIONS.index(policies[1])


def ranked(programs: list[Program]) -> list[Program]:
    """Those that fit, fastest first by the estimate without overlap, the one meshes change most."""
    fitting = [program for program in programs if program.roofline is not None]
    return sorted(fitting, key=lambda each: each.roofline.serial if each.roofline else math.inf)


def line(program: Program) -> str:
    """A program in one line."""
    start = f"{mesh_text(program.mesh):<28}{program.config.model.rematerialisation:<9}"
    if program.roofline is None:
        state = f"state alone {program.memory.total / 2**30:.1f} GiB"
        short = program.shortage
        if short and short.needed:
            state += f", needs {short.needed / 2**30:.1f} of {(short.available or 0) / 2**30:.1f}"
        return f"{start}does not fit ({state})"
    memory = program.memory.total / 2**30
    low, high = program.roofline.overlapped * 1e3, program.roofline.serial * 1e3
    return f"{start}{memory:6.2f} GiB  {low:,.4g} to {high:,.4g} ms, {program.roofline.bound}"
