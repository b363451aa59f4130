"""What a run carries from step to step, and how it is created, sharded from the start."""

from __future__ import annotations

import ast
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dydilit_jax.config import Config, DiffusionConfig, SamplingConfig
from dydilit_jax.diffusion.process import Process
from dydilit_jax.diffusion.samplers import Sampler, make_sampler
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.count import abstract_parameters
from dydilit_jax.models.dydilit import DyDiLiT
from dydilit_jax.training.optimizer import make_ema, make_optimizer
from dydilit_jax.training.sharding import parameter_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: () int32, steps taken.
      parameters: nested dicts of float32 arrays.
      optimizer: optax's state.
      ema: optax's state of the moving average of the parameters.
      key: PRNG key that every step's randomness is folded from.
    """

    step: jax.Array
    parameters: Any
    optimizer: Any
    ema: optax.EmaState
    key: jax.Array


def make_process(config: DiffusionConfig) -> Process:
    """The process that a config names.

    Raises:
      UserError: unknown process.
    """
    processes: dict[str, Process] = {"flow": config.flow, "gaussian": config.gaussian}
    if config.process not in processes:
        raise unknown_name("diffusion process", config.process, processes)
    return processes[config.process]


OWN_SAMPLER = {"flow": "euler", "gaussian": "ddpm"}


def configured_sampler(config: SamplingConfig, diffusion: DiffusionConfig) -> Sampler:
    """The sampler that a config names, for its process.

    Raises:
      UserError: an unknown sampler or option, one of another process, or values that do not fit.
    """
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in config.options.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"sampler option {part!r} has the form name=value")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            options[name] = value
    name = config.sampler or OWN_SAMPLER[diffusion.process]
    try:
        return make_sampler(name, make_process(diffusion), config.steps, **options)
    except TypeError as error:
        raise UserError(f"sampler options {config.options!r} do not fit: {error}") from error


@dataclasses.dataclass(frozen=True)
class Network:
    """The network's structure apart from its parameters.

    Attributes:
      config: the run's.
      process: what it is trained for.
      graph: flax's description of the module, which with parameters makes the module.
    """

    config: Config
    process: Process
    graph: nnx.GraphDef

    @classmethod
    def create(cls, config: Config) -> Network:
        """Builds the structure; allocates nothing.

        Raises:
          UserError: an unknown process, or a sampler that is unknown or not for it.
        """
        process = make_process(config.diffusion)
        # Sampling comes late: its mistakes are to show before training.
        configured_sampler(config.sampling, config.diffusion)
        module = nnx.eval_shape(
            lambda: DyDiLiT(
                config.model,
                process.output_channels(config.model.channels),
                rngs=nnx.Rngs(0),
            )
        )
        return cls(config, process, nnx.split(module)[0])

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return self.process.output_channels(self.config.model.channels)

    def module(self, parameters: Any) -> DyDiLiT:
        """The module with these parameters."""
        return nnx.merge(self.graph, parameters)

    def initial_parameters(self, key: jax.Array) -> dict:
        """Parameters at the start; traceable."""
        module = DyDiLiT(self.config.model, self.out_channels, rngs=nnx.Rngs(key))
        parameters = nnx.to_pure_dict(nnx.split(module)[1])
        # A weak type, such as jnp.full's of a Python number, would have the step compiled twice:
        # what comes out of it is not weak.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), parameters)

    def abstract_parameters(self) -> dict:
        """Shapes and dtypes of the parameters."""
        return abstract_parameters(self.config.model, self.out_channels)


def initial_state(network: Network, key: jax.Array) -> TrainState:
    """The state at step 0; traceable."""
    config = network.config
    parameter_key, step_key = jax.random.split(key)
    parameters = network.initial_parameters(parameter_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=make_optimizer(config.optimizer, config.train.steps).init(parameters),
        ema=make_ema(config.optimizer).init(parameters),
        key=step_key,
    )


def state_shardings(network: Network, mesh: Mesh) -> Any:
    """The sharding of every array, as a TrainState: moments and average lie as parameters."""
    abstract = jax.eval_shape(lambda: initial_state(network, jax.random.key(0)))
    parameters = parameter_shardings(abstract.parameters, mesh)
    config = network.config
    everywhere = replicated(mesh)

    def like_parameters(transformation: optax.GradientTransformation, state: Any) -> Any:
        return optax.tree_utils.tree_map_params(
            transformation,
            lambda _, sharding: sharding,
            state,
            parameters,
            transform_non_params=lambda _: everywhere,
        )

    shardings: dict[str, Any] = {
        "step": everywhere,
        "parameters": parameters,
        "optimizer": like_parameters(
            make_optimizer(config.optimizer, config.train.steps), abstract.optimizer
        ),
        "ema": like_parameters(make_ema(config.optimizer), abstract.ema),
        "key": everywhere,
    }
    return TrainState(**shardings)


def create_state(network: Network, mesh: Mesh) -> TrainState:
    """The state at step 0 on the mesh; no array ever exists unsharded."""
    shardings = state_shardings(network, mesh)
    seed = network.config.seed
    return jax.jit(lambda: initial_state(network, jax.random.key(seed)), out_shardings=shardings)()


def abstract_state(network: Network, mesh: Mesh) -> TrainState:
    """The state's shapes, dtypes and shardings, for restoring."""
    shapes = jax.eval_shape(lambda: initial_state(network, jax.random.key(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(network, mesh),
    )
