"""What a training step takes of a device's memory, from shapes, before anything is allocated.

State: parameters, moments and average, exactly, from their shapes and shardings. Gradients: one
more copy of the parameters, and a second one where a batch is accumulated part by part.
Activations: what automatic differentiation keeps of the forward pass for the backward one, read off
the traced program for the images of one device, and with rematerialisation also what one block
computes again. The compiler fuses some of that away and adds buffers of its own: `compiled_memory`
asks it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dydilit_jax.training.inheritance import Teacher
from dydilit_jax.training.sharding import batch_sharding
from dydilit_jax.training.state import Network, TrainState, abstract_state
from dydilit_jax.training.step import jit_step, training_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, ema: the state's.
      teacher: its parameters; 0 without one.
      gradients: of the parameters.
      batch: images and labels.
      activations: kept from the forward pass for the backward pass.
      recomputed: what the backward pass computes again of one block, and holds meanwhile.
      host: of activations, what `offload` keeps in the host's memory instead.
    """

    parameters: int
    optimizer: int
    ema: int
    teacher: int
    gradients: int
    batch: int
    activations: int
    recomputed: int
    host: int

    @property
    def total(self) -> int:
        """The device's bytes."""
        return sum(dataclasses.astuple(self)) - self.host


def nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array; a typed PRNG key counts as its two 32-bit words."""
    size = 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
    return math.prod(shape) * size


def in_bytes(count: int) -> str:
    """A number of bytes in the unit that suits it: `1.23 GiB`."""
    amount, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{amount:,.2f} {units[0]}"


def total_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes, each whole."""
    return sum(nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of shapes with shardings."""
    return sum(
        nbytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree)
    )


def saved_activations(network: Network, images: int) -> int:
    """Bytes that differentiating the loss of so many images keeps for the backward pass.

    The arrays that the traced derivative hands from one pass to the other, each once, without the
    parameters and the batch themselves. Nothing is computed.
    """
    model = network.config.model
    shape = (images, model.image_size, model.image_size, model.channels)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, jnp.float32),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }

    def backward_pass(parameters: Any, batch: Any, key: jax.Array) -> Any:
        return jax.vjp(
            lambda parameters: training_loss(network, parameters, batch, key),
            parameters,
            has_aux=True,
        )[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.make_jaxpr(backward_pass)(network.abstract_parameters(), batch, key).jaxpr
    inputs = {id(variable) for variable in (*traced.invars, *traced.constvars)}
    kept = {
        id(variable): variable.aval for variable in traced.outvars if id(variable) not in inputs
    }
    return sum(nbytes(aval.shape, aval.dtype) for aval in kept.values())


def _with_rematerialisation(network: Network, policy: str) -> Network:
    config = network.config
    model = dataclasses.replace(config.model, rematerialisation=policy)
    return Network.create(dataclasses.replace(config, model=model))


def activation_bytes(network: Network, images: int) -> tuple[int, int, int]:
    """(kept on the device, computed again, kept on the host) for so many images."""
    model = network.config.model
    policy = model.rematerialisation
    everything = saved_activations(_with_rematerialisation(network, "none"), images)
    if policy == "none":
        return everything, 0, 0
    # `offload` keeps what `dots` does, on the host; on the device stays what `full` keeps.
    on_device = "full" if policy == "offload" else policy
    kept = saved_activations(_with_rematerialisation(network, on_device), images)
    host = 0
    if policy == "offload":
        host = saved_activations(_with_rematerialisation(network, "dots"), images) - kept
    return kept, max(everything - kept - host, 0) // model.depth, host


def estimate_memory(
    network: Network, mesh: Mesh, batch: dict[str, Any], teacher: Teacher | None = None
) -> Memory:
    """A training step's memory on one device.

    Args:
      network: structure and process.
      mesh: activations are cut by its axes data, fsdp and sequence; the part of them that `tensor`
        cuts too is counted whole.
      batch: the whole batch's shapes with shardings.
      teacher: with shapes with shardings for parameters.
    """
    config = network.config
    state = abstract_state(network, mesh)
    accumulation = config.optimizer.accumulation_steps
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    kept, recomputed, host = activation_bytes(network, config.data.batch_size // parts)
    sequence = mesh.shape["sequence"]
    parameters = device_bytes(state.parameters)
    return Memory(
        parameters=parameters,
        optimizer=device_bytes(state.optimizer),
        ema=device_bytes(state.ema),
        teacher=0 if teacher is None else device_bytes(teacher.parameters),
        gradients=parameters * (1 if accumulation == 1 else 2),
        batch=device_bytes(batch),
        activations=kept // sequence,
        recomputed=recomputed // sequence,
        host=host // sequence,
    )


def abstract_batch(network: Network, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a whole batch, and how they lie on the mesh."""
    model, size = network.config.model, network.config.data.batch_size
    sharding = batch_sharding(mesh)
    images = (size, model.image_size, model.image_size, model.channels)
    return {
        "image": jax.ShapeDtypeStruct(images, jnp.float32, sharding=sharding),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding),
    }


def compiled_memory(
    network: Network, mesh: Mesh, batch: dict[str, Any], teacher: Teacher | None = None
) -> dict[str, int] | None:
    """What the compiler plans for a step on one device of the mesh, in bytes by use.

    Compiles the step (half a minute and more on a CPU) and allocates nothing.

    Returns:
      `arguments` (the state and the batch), `results` that take no argument's place, `temporary`
      and `program`; None where the platform does not tell.
    """
    state: TrainState = abstract_state(network, mesh)
    parameters = None if teacher is None else teacher.parameters
    with jax.set_mesh(mesh):
        step = jit_step(network, mesh, teacher).lower(state, batch, parameters).compile()
    planned = step.memory_analysis()
    if planned is None:
        return None
    return {
        "arguments": planned.argument_size_in_bytes,
        "results": planned.output_size_in_bytes - planned.alias_size_in_bytes,
        "temporary": planned.temp_size_in_bytes,
        "program": planned.generated_code_size_in_bytes,
    }
