"""Starting from another network's weights, and learning from its predictions.

LiT (arXiv 2501.12976), weight inheritance and hybrid distillation: the linear network starts from a
DiT's weights, all but the attention's own new parts, and its loss gains, at the same x_t and time,

    prediction_weight |prediction - teacher's|^2 + variance_weight |variance - teacher's|^2
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from dydilit_jax.config import DistillationConfig
from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.diffusion.process import Process
from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT
from dydilit_jax.models.pretrained import Pretrained, inherit, read_pretrained
from dydilit_jax.training.sharding import parameter_shardings
from dydilit_jax.training.state import Network, TrainState


def inherited_state(network: Network, state: TrainState, checkpoint: str) -> TrainState:
    """The state at step 0 with what a checkpoint has in common with the network; tells what.

    Raises:
      UserError: no such checkpoint, a damaged one, or one of another depth, width or scale of time.
    """
    pretrained = read_pretrained(checkpoint)
    _check_time_scale(pretrained, network.process, checkpoint)
    parameters, taken, new = inherit(
        state.parameters, network.config.model, pretrained.parameters, pretrained.config
    )
    placed = jax.tree.map(
        lambda value, old: jax.device_put(jnp.asarray(value, old.dtype), old.sharding),
        parameters,
        state.parameters,
    )
    print(
        f"inherited {len(taken)} arrays of {checkpoint}; {len(new)} start anew: {', '.join(new)}",
        flush=True,
    )
    return dataclasses.replace(state, parameters=placed)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network that another one learns from.

    Attributes:
      graph: its structure.
      parameters: its parameters on the mesh; they never change.
      config: weights of its terms.
      channels: channels of the prediction, before those of a learned variance.
    """

    graph: nnx.GraphDef
    parameters: Any
    config: DistillationConfig
    channels: int

    def terms(
        self,
        parameters: Any,
        output: jax.Array,
        x: jax.Array,
        time: jax.Array,
        labels: jax.Array,
    ) -> dict[str, jax.Array]:
        """Mean squared differences to the teacher at one x_t, each (B,) float32.

        Args:
          parameters: the teacher's, as an argument of the compiled step.
          output: the student's (B, H, W, C or 2C).
          x: (B, H, W, C), time: (B,), labels: (B,), as the student saw them.
        """
        wanted, _ = nnx.merge(self.graph, parameters)(x, time, labels)
        difference = jnp.square(output - jax.lax.stop_gradient(wanted).astype(output.dtype))
        split = self.channels
        terms = {"distilled_prediction": jnp.mean(difference[..., :split], axis=(1, 2, 3))}
        if difference.shape[-1] > split:
            terms["distilled_variance"] = jnp.mean(difference[..., split:], axis=(1, 2, 3))
        return terms

    def loss(self, terms: dict[str, jax.Array]) -> jax.Array:
        """The weighted sum of `terms`, (B,)."""
        loss = self.config.prediction_weight * terms["distilled_prediction"]
        if "distilled_variance" in terms:
            loss = loss + self.config.variance_weight * terms["distilled_variance"]
        return loss


def load_teacher(network: Network, mesh: Mesh) -> Teacher | None:
    """The teacher that the config names, on the mesh; None if it names none.

    Raises:
      UserError: as read_teacher.
    """
    pretrained = read_teacher(network)
    if pretrained is None:
        return None
    parameters = jax.device_put(
        pretrained.parameters, parameter_shardings(pretrained.parameters, mesh)
    )
    return make_teacher(network, pretrained, parameters)


def read_teacher(network: Network) -> Pretrained | None:
    """The teacher that the config names, in the host's memory; None if it names none.

    Raises:
      UserError: weights that cannot be read, or of a network for other images, classes or outputs.
    """
    source = network.config.distillation.teacher
    if not source:
        return None
    pretrained = read_pretrained(source)
    _check_teacher(pretrained, network.config.model, network.process, source)
    return pretrained


def make_teacher(network: Network, pretrained: Pretrained, parameters: Any) -> Teacher:
    """A teacher of these parameters, which are arrays or their shapes."""
    module = nnx.eval_shape(
        lambda: DyDiLiT(pretrained.config, pretrained.out_channels, rngs=nnx.Rngs(0))
    )
    config = network.config
    return Teacher(nnx.split(module)[0], parameters, config.distillation, config.model.channels)


def read_inherited(network: Network) -> tuple[list[str], list[str]]:
    """Paths that the config's run takes from its checkpoint, and those that start anew.

    Raises:
      UserError: as inherited_state.
    """
    source = network.config.inheritance.checkpoint
    pretrained = read_pretrained(source)
    _check_time_scale(pretrained, network.process, source)
    _, taken, new = inherit(
        network.abstract_parameters(),
        network.config.model,
        pretrained.parameters,
        pretrained.config,
    )
    return taken, new


def _check_teacher(
    teacher: Pretrained, student: ModelConfig, process: Process, source: str
) -> None:
    for field in ("image_size", "channels", "num_classes"):
        theirs, ours = getattr(teacher.config, field), getattr(student, field)
        if theirs != ours:
            raise UserError(f"teacher {source!r} has {field} {theirs}, the student {ours}")
    _check_time_scale(teacher, process, source)
    expected = process.output_channels(student.channels)
    if teacher.out_channels != expected:
        raise UserError(
            f"teacher {source!r} puts out {teacher.out_channels} channels, the process "
            f"{type(process).__name__} wants {expected}: it was trained for another process"
        )


def _check_time_scale(pretrained: Pretrained, process: Process, source: str) -> None:
    """A flow's network knows times on one scale alone, which `convert` keeps beside the weights."""
    diffusion = pretrained.extra.get("diffusion")
    if not isinstance(process, RectifiedFlow) or not isinstance(diffusion, dict):
        return
    flow = diffusion.get("flow")
    if diffusion.get("process") != "flow" or not isinstance(flow, dict):
        return
    scale = flow.get("time_scale", process.time_scale)
    if scale != process.time_scale:
        raise UserError(
            f"{source!r} was trained with diffusion.flow.time_scale {scale}, this run has "
            f"{process.time_scale}: set it to the same"
        )
