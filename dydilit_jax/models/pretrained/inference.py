"""From the names and shapes in a file to the network it holds, and whether it holds all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from flax import traverse_util

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.config import SIZES, AttentionConfig, FeedForwardConfig, ModelConfig
from dydilit_jax.models.count import abstract_parameters
from dydilit_jax.models.embeddings import sincos_position
from dydilit_jax.models.pretrained.files import listed
from dydilit_jax.models.pretrained.layouts import DIFFUSERS, Layout, Tensors, to_theirs

T = TypeVar("T")
POSITION_TOLERANCE = 2e-3  # of a table that was saved in half precision

# Parameters whose shapes tell the network's.
TELLING = (
    "patch_embed/kernel",
    "time_embed/out/bias",
    "label_embed/table/embedding",
    "blocks/feedforward/hidden/bias",
    "final/linear/bias",
)
# What a diffusers config may say only one thing of.
DIFFUSERS_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}


def config_from(fields: Any, cls: type[T], section: str) -> T:
    """A config of `models` from a mapping that was read from JSON; missing fields take defaults.

    Raises:
      UserError: an unknown field (names the nearest), a wrong type, or values that do not fit.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{section} must be a section of fields, got {fields!r}")
    defaults: dict[str, Any] = {
        field.name: field.default
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
    }
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in defaults:
            raise unknown_name(f"field of {section}", name, defaults)
        default = defaults[name]
        if dataclasses.is_dataclass(default):
            values[name] = config_from(value, type(default), f"{section}.{name}")
        elif type(value) is type(default) or (isinstance(default, float) and type(value) is int):
            values[name] = type(default)(value)
        else:
            raise UserError(f"{section}.{name} expects {type(default).__name__}, got {value!r}")
    return cls(**values)


def infer_config(
    layout: Layout, tensors: Tensors, fields: dict[str, Any], heads: int | None, source: str
) -> tuple[ModelConfig, int]:
    """The network that a file of another project holds, and its output channels.

    Args:
      layout: of the file.
      tensors: of which the telling ones must be there; see `check_names`.
      fields: of diffusers' config.json; ignored in the official layout, which has none.
      heads: number of heads, which no shape tells; None for what `fields` or the sizes' table say.
      source: the file's name, for errors.

    Raises:
      UserError: shapes that no DiT has, or a number of heads or image size that nothing tells.
    """

    def dimension(path: str, axis: int, rank: int) -> int:
        name = layout.name_of(path)
        shape = tensors[name].shape
        if len(shape) != rank or 0 in shape:
            raise UserError(f"{source}: {name} has shape {shape}, expected {rank} axes")
        return shape[axis]

    width = dimension("time_embed/out/bias", 0, 1)
    patch = dimension("patch_embed/kernel", 2, 4)
    hidden = dimension("blocks/feedforward/hidden/bias", 0, 1)
    values = dimension("final/linear/bias", 0, 1)
    out_channels = values // patch**2
    if out_channels * patch**2 != values:
        raise UserError(
            f"{source}: {layout.name_of('final/linear/bias')} has shape ({values},), expected a "
            f"multiple of the {patch**2} pixels of a patch"
        )
    if layout is DIFFUSERS:
        image_size, heads = _diffusers_fields(fields, heads, source)
    else:
        image_size = patch * _table_side(tensors[layout.position], layout.position, source)
        heads = heads or _heads_by_width(width, source)
    config = ModelConfig(
        image_size=image_size,
        channels=dimension("patch_embed/kernel", 1, 4),
        patch_size=patch,
        num_classes=dimension("label_embed/table/embedding", 0, 2) - 1,
        depth=layout.depth(tensors),
        width=width,
        time_frequency_shift=layout.time_frequency_shift,
        attention=AttentionConfig(kind="softmax", heads=heads, depthwise=0),
        feedforward=FeedForwardConfig(
            kind="mlp", ratio=0.0 if hidden == 4 * width else hidden / width
        ),
    )
    if layout is DIFFUSERS:
        _check_diffusers_size(config, out_channels, fields, source)
    return config, out_channels


def _heads_by_width(width: int, source: str) -> int:
    for row in SIZES.values():
        if row.width == width:
            return row.softmax_heads
    raise UserError(f"{source} has width {width}, of none of DiT's sizes: give its --heads")


def _table_side(table: np.ndarray, name: str, source: str) -> int:
    tokens = table.shape[1] if table.ndim == 3 else 0
    side = round(tokens**0.5)
    if not tokens or side * side != tokens:
        raise UserError(
            f"{source}: {name} has shape {table.shape}, expected (1, N, D) with N a square"
        )
    return side


def _diffusers_fields(fields: dict[str, Any], heads: int | None, source: str) -> tuple[int, int]:
    """Image size and heads, which a diffusers file leaves to its config."""
    if "sample_size" not in fields or "num_attention_heads" not in fields:
        raise UserError(
            f"{source} needs diffusers' config.json beside it, with sample_size and "
            "num_attention_heads"
        )
    for name, must in DIFFUSERS_FIXED.items():
        if fields.get(name, must) != must:
            raise UserError(
                f"{source}: its config.json has {name} {fields[name]!r}, a DiT has {must!r}"
            )
    for name in ("sample_size", "num_attention_heads"):
        if type(fields[name]) is not int:
            raise UserError(
                f"{source}: {name} of its config.json expects int, got {fields[name]!r}"
            )
    return fields["sample_size"], heads or fields["num_attention_heads"]


def _check_diffusers_size(
    config: ModelConfig, out_channels: int, fields: dict[str, Any], source: str
) -> None:
    head_width = fields.get("attention_head_dim", config.width // config.attention.heads)
    said = {
        "depth": fields.get("num_layers"),
        "width": fields["num_attention_heads"] * head_width,
        "patch_size": fields.get("patch_size"),
        "channels": fields.get("in_channels"),
        "output channels": fields.get("out_channels"),
        "classes": fields.get("num_embeds_ada_norm"),
    }
    held = sizes_of(config, out_channels)
    check_sizes(held, {k: v for k, v in said.items() if v is not None}, source, "its config.json")


def sizes_of(config: ModelConfig, out_channels: int) -> dict[str, int]:
    """The sizes that tell one DiT from another, by the name a message gives them."""
    return {
        "depth": config.depth,
        "width": config.width,
        "patch_size": config.patch_size,
        "channels": config.channels,
        "output channels": out_channels,
        "classes": config.num_classes,
    }


def check_sizes(held: dict[str, int], said: dict[str, Any], source: str, other: str) -> None:
    """Raises UserError, with both sizes, if a file holds another size than `other` says."""
    if any(held[name] != value for name, value in said.items()):
        names = ["depth", "width", *(n for n in said if held[n] != said[n])]
        names = [name for name in dict.fromkeys(names) if name in said]
        raise UserError(
            f"{source} holds a network of {_sizes(held, names)}, {other} says {_sizes(said, names)}"
        )


def _sizes(sizes: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {sizes[name]}" for name in names)


def check_names(layout: Layout, tensors: Tensors, source: str) -> None:
    """Raises UserError, naming all that is missing or too much, if a telling tensor is missing."""
    if any(layout.name_of(path) not in tensors for path in TELLING) or (
        layout.position_saved and layout.position not in tensors
    ):
        expected = layout.names(layout.depth(tensors))
        raise mismatch(source, expected - tensors.keys(), _surplus(layout, tensors, expected), [])


def _surplus(layout: Layout, tensors: Tensors, expected: Iterable[str]) -> set[str]:
    return tensors.keys() - set(expected) - {layout.position}


def check_tensors(
    layout: Layout | None, tensors: Tensors, config: ModelConfig, out_channels: int, source: str
) -> None:
    """Raises UserError unless a file holds exactly the network's tensors, all finite.

    The message names every tensor that is missing, too much or of another shape.
    """
    abstract = abstract_parameters(config, out_channels)
    if layout is None:
        flat = traverse_util.flatten_dict(abstract, sep="/")
        shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
        surplus = tensors.keys() - shapes.keys()
    else:
        zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), abstract)
        theirs = to_theirs(layout, config, zeros)
        shapes = {name: array.shape for name, array in theirs.items()}
        surplus = _surplus(layout, tensors, shapes)
    misshapen = [
        f"{name} {tensors[name].shape} (expected {shape})"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    missing = shapes.keys() - tensors.keys()
    if missing or surplus or misshapen:
        raise mismatch(source, missing, surplus, misshapen)
    infinite = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if infinite:
        raise UserError(f"{source} holds values that are not finite, in {listed(infinite)}")
    if layout is not None and layout.position in tensors:
        table = sincos_position(config.grid, config.width)
        if not np.allclose(tensors[layout.position], table, atol=POSITION_TOLERANCE):
            raise UserError(
                f"{source}: {layout.position} is not the sine-cosine table of a "
                f"{config.grid[0]} x {config.grid[1]} grid, the only one this network has"
            )


def mismatch(
    source: str, missing: Iterable[str], surplus: Iterable[str], misshapen: Iterable[str]
) -> UserError:
    """The error that names every tensor that does not fit."""
    lists = {"missing": sorted(missing), "surplus": sorted(surplus), "misshapen": sorted(misshapen)}
    parts = [f"{kind}: {listed(names)}" for kind, names in lists.items() if names]
    return UserError(f"{source} does not hold the tensors of its network; {'; '.join(parts)}")
