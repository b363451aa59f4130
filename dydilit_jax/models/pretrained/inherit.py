"""Weight inheritance (LiT, arXiv 2501.12976): a network starts from the weights of another.

All that both have is taken from the source; what only the target has, such as the linear
attention's routers, projector banks and depthwise convolution, starts as it would have.
"""

from __future__ import annotations

from typing import Any

from flax import traverse_util

from dydilit_jax.errors import UserError
from dydilit_jax.models.config import ModelConfig


def inherit(
    target: dict, target_config: ModelConfig, source: dict, source_config: ModelConfig
) -> tuple[dict, list[str], list[str]]:
    """Parameters to start the target from.

    Args:
      target: the target's initial parameters, or their shapes.
      target_config: the target's network.
      source: parameters of the source, usually a DiT.
      source_config: the source's network.

    Returns:
      The parameters, a tree like `target`; the paths that are the source's; those that stay.

    Raises:
      UserError: another depth or width, or other frequencies of time.
    """
    for field in ("depth", "width"):
        if getattr(source_config, field) != getattr(target_config, field):
            raise UserError(
                f"cannot inherit from a network of depth {source_config.depth} and width "
                f"{source_config.width}: this one has depth {target_config.depth} and width "
                f"{target_config.width}"
            )
    if source_config.time_frequency_shift != target_config.time_frequency_shift:
        raise UserError(
            "cannot inherit from a network with time_frequency_shift "
            f"{source_config.time_frequency_shift}: set model.time_frequency_shift to it, this one "
            f"has {target_config.time_frequency_shift}"
        )
    theirs: dict[str, Any] = traverse_util.flatten_dict(source, sep="/")
    ours: dict[str, Any] = traverse_util.flatten_dict(target, sep="/")
    different = _different_parts(target_config, source_config)
    inherited = [
        path
        for path, leaf in ours.items()
        if path in theirs
        and tuple(theirs[path].shape) == tuple(leaf.shape)
        and not path.startswith(different)
    ]
    parameters = ours | {path: theirs[path] for path in inherited}
    new = [path for path in ours if path not in set(inherited)]
    return traverse_util.unflatten_dict(parameters, sep="/"), inherited, new


def _different_parts(target: ModelConfig, source: ModelConfig) -> tuple[str, ...]:
    """Parts that mean something else in the two networks, though shapes might agree."""
    parts = []
    if target.feedforward.kind != source.feedforward.kind:
        parts.append("blocks/feedforward/")
    if (target.patch_size, target.channels) != (source.patch_size, source.channels):
        parts += ["patch_embed/", "final/linear/"]
    return tuple(parts)
