"""A run's programs, training step, sampler and decoder, compiled for devices that are not there."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.autoencoders import abstract_autoencoder
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.models.count import multiply_adds
from dydilit_jax.training.collectives import Collective, collectives
from dydilit_jax.training.costs import product_flops, unknown_kernels, work
from dydilit_jax.training.decoding import (
    DECODED_AT_ONCE,
    check_channels,
    decoder_mesh,
    jit_decoder,
)
from dydilit_jax.training.generation import jit_generator
from dydilit_jax.training.hbm import (
    Memory,
    Shortage,
    bytes_on_device,
    compiled_memory,
    shortage,
)
from dydilit_jax.training.hlo import parse, schedule
from dydilit_jax.training.roofline import Roofline, roofline
from dydilit_jax.training.sharding import (
    AXES,
    arrange,
    axis_sizes,
    batch_sharding,
    check_fits,
    check_model,
    replicated,
    slice_count,
)
from dydilit_jax.training.state import Network, abstract_state
from dydilit_jax.training.step import jit_step
from dydilit_jax.training.throughput import FLOPS_PER_MULTIPLY_ADD
from dydilit_jax.training.topology import Topology, group_bandwidth

PROGRAMS = ("train", "sample", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """What is known of a program on a topology.

    Attributes:
      config: the run's, whose program it is.
      what: of PROGRAMS.
      topology: what it was compiled for.
      mesh: lengths of the mesh's axes.
      memory: of a device; only the state's part where the program does not fit.
      shortage: what the compiler said when it did not.
      images: of one execution.
      model_flops: that the model asks for, of one execution on all devices.
      roofline, collectives: of the compiled program; None and () where there is none.
      seconds: that lowering and compiling took; 0 where the state alone is too large.
      notes: what the figures leave out.
    """

    config: Config
    what: str
    topology: Topology
    mesh: dict[str, int]
    memory: Memory
    shortage: Shortage | None
    images: int
    model_flops: float
    roofline: Roofline | None
    collectives: tuple[Collective, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def devices(self) -> int:
        """How many execute it: all of the topology, or a host's."""
        return self.mesh["batch"] if self.what == "decode" else len(self.topology.devices)

    @property
    def fits(self) -> bool:
        """Whether it was compiled."""
        return self.shortage is None


def mesh_of(config: Config, topology: Topology) -> Mesh:
    """The run's mesh over a topology's devices.

    Raises:
      UserError: as `sharding.axis_sizes`.
    """
    devices = topology.devices
    slices = slice_count(devices)
    sizes = axis_sizes(config.mesh, len(devices), slices)
    placed = arrange(devices, sizes, slices)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_program(config: Config, topology: Topology, what: str) -> Program:
    """Compiles a run's program for a topology and accounts for it.

    Args:
      config: the run's config, with its mesh, batch and rematerialisation.
      topology: the devices.
      what: `train`, the whole optimizer step; `sample`, the sampler's whole loop; or `decode`, what
        the autoencoder makes images of its latents with, on each device of one host.

    Raises:
      UserError: an unknown program, or a config that does not fit the devices.
    """
    if what not in PROGRAMS:
        raise unknown_name("program", what, PROGRAMS)
    if config.distillation.teacher:
        raise UserError(
            "a teacher (distillation.teacher) is not accounted for: set it to '' and add its "
            "forward pass"
        )
    first = topology.devices[0]
    mesh = decoder_mesh([first]) if what == "decode" else mesh_of(config, topology)
    prepare = {"train": _train, "sample": _sample, "decode": _decode}[what]
    jitted, arguments, memory, images, model_flops = prepare(config, mesh)
    sizes = dict(mesh.shape)
    if what == "decode":  # Every device of the host has the program, and images of its own.
        host = sum(each.process_index == first.process_index for each in topology.devices)
        sizes, images, model_flops = {"batch": host}, host * images, host * model_flops
    start = time.perf_counter()
    program = Program(
        config=config,
        what=what,
        topology=topology,
        mesh=sizes,
        memory=memory,
        shortage=None,
        images=images,
        model_flops=model_flops,
        roofline=None,
        collectives=(),
        seconds=0.0,
    )
    if memory.state > topology.chip.hbm:
        return dataclasses.replace(program, shortage=_state_shortage(memory, topology))
    platform = {"gpu": "cuda"}.get(topology.platform, topology.platform)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), tracing_for(topology.platform):
        lowered = jitted.trace(*arguments).lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            short = shortage(error)
            if short is None:
                raise
            seconds = time.perf_counter() - start
            return dataclasses.replace(program, shortage=short, seconds=seconds)
    seconds = time.perf_counter() - start
    return _account(dataclasses.replace(program, seconds=seconds), compiled, mesh)


def _state_shortage(memory: Memory, topology: Topology) -> Shortage:
    needed, available = memory.state, round(topology.chip.hbm)
    message = (
        f"parameters, optimizer and average alone take {needed / 2**30:.2f} of "
        f"{available / 2**30:.4g} GiB on each device; nothing was compiled"
    )
    return Shortage(message, needed, available)


def _account(program: Program, compiled: Any, mesh: Mesh) -> Program:
    """The figures of a program that was compiled."""
    module = parse(compiled.as_text())
    executed = schedule(module)
    devices = list(mesh.devices.flat)
    found = collectives(module, executed, program.mesh)
    topology = program.topology

    def bandwidth(group: Any) -> float:
        return group_bandwidth(topology, [devices[i] for i in group])

    memory = compiled_memory(program.memory, compiled.memory_analysis(), module, executed)
    if topology.platform == "gpu" and memory.total > topology.chip.hbm:
        # Its compiler lays memory out and does not ask how much there is.
        needed, available = memory.total, round(topology.chip.hbm)
        message = f"the compiled program takes {needed / 2**30:.2f} GiB on each device"
        short = Shortage(message, needed, available)
        return dataclasses.replace(program, memory=memory, shortage=short)
    notes = [f"the FLOPs of kernel {name} are not known" for name in unknown_kernels(module)]
    if executed.unknown_loops:
        notes.append(f"{len(executed.unknown_loops)} loops count once: their trips are not known")
    return dataclasses.replace(
        program,
        memory=memory,
        roofline=roofline(work(module, executed), found, topology.chip, bandwidth),
        collectives=tuple(found),
        notes=tuple(notes),
    )


def _train(config: Config, mesh: Mesh) -> tuple[Any, tuple, Memory, int, float]:
    """The step's jitted function, its arguments, the state's memory, images, model FLOPs."""
    check_fits(config, mesh)
    network = Network.create(config)
    state = abstract_state(network, mesh)
    model, images = config.model, config.data.batch_size
    rows = batch_sharding(mesh)
    shape = (images, model.image_size, model.image_size, model.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows),
    }
    memory = Memory(
        parameters=bytes_on_device(state.parameters),
        optimizer=bytes_on_device(state.optimizer),
        ema=bytes_on_device(state.ema),
    )
    macs = sum(multiply_adds(model, network.out_channels).values())
    flops = float(FLOPS_PER_MULTIPLY_ADD * macs * images)
    return jit_step(network, mesh), (state, batch, None), memory, images, flops


def _sample(config: Config, mesh: Mesh) -> tuple[Any, tuple, Memory, int, float]:
    """As `_train`, of the sampler; the batch is rounded up to the devices, as `sample` does."""
    check_model(config.model, mesh.shape)
    network = Network.create(config)
    parameters = abstract_state(network, mesh).parameters
    sampling = config.sampling
    images = -(-sampling.batch_size // mesh.size) * mesh.size
    rows = batch_sharding(mesh)
    integers = jax.ShapeDtypeStruct((images,), jnp.int32, sharding=rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))
    macs = sum(multiply_adds(config.model, network.out_channels).values())
    passes = sampling.steps * (2 if sampling.guidance_scale != 1.0 else 1)
    arguments = (parameters, key, integers, integers)
    memory = Memory(parameters=bytes_on_device(parameters))
    flops = 2.0 * macs * images * passes
    return jit_generator(network, sampling, mesh), arguments, memory, images, flops


def _decode(config: Config, mesh: Mesh) -> tuple[Any, tuple, Memory, int, float]:
    """As `_train`, of the autoencoder's decoder, for as many latents as it takes at once."""
    model, weights = config.model, config.autoencoder.weights
    if not weights:
        raise UserError(
            "there is nothing to decode: the network draws pixels (autoencoder.weights is empty)"
        )
    autoencoder = abstract_autoencoder(weights, dtype=config.autoencoder.dtype)
    check_channels(config.autoencoder, autoencoder, model.channels)
    graph, state = nnx.split(autoencoder)
    state = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=replicated(mesh)), state
    )
    images = DECODED_AT_ONCE * mesh.size
    shape = (images, model.image_size, model.image_size, model.channels)
    rows = NamedSharding(mesh, P("batch"))
    arguments = (state, jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows))
    jitted = jit_decoder(graph)
    flops = product_flops(jitted.trace(*arguments).jaxpr.jaxpr)
    return jitted, arguments, Memory(parameters=bytes_on_device(state)), images, flops
