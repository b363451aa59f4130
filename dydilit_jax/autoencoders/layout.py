"""diffusers' config.json and tensors of an autoencoder, as ours.

Our modules carry diffusers' names, so a parameter's path is its name there, with `kernel` and
`scale` for its `weight`. Kernels are (in, out) and (height, width, in, out) here, (out, in) and
(out, in, height, width) there.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydilit_jax.autoencoders.dc import (
    BLOCKS,
    DOWNSAMPLES,
    UPSAMPLES,
    AutoencoderDC,
    DCConfig,
)
from dydilit_jax.autoencoders.kl import AutoencoderKL, KLConfig
from dydilit_jax.autoencoders.layers import ACTIVATIONS
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.pretrained.files import listed

KL, DC = "AutoencoderKL", "AutoencoderDC"
Sizes = KLConfig | DCConfig
# What diffusers takes where config.json is silent, if it is not the default of our dataclass.
SILENT: dict[str, dict[str, Any]] = {
    KL: {"block_out_channels": (64,), "layers_per_block": 1},
    DC: {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "downsample_block_type": "pixel_unshuffle",
        "upsample_block_type": "pixel_shuffle",
        "decoder_act_fns": "silu",
        "scaling_factor": 1.0,
    },
}
# Fields of which one value (for each resolution) is supported.
FIXED: dict[str, dict[str, Any]] = {
    KL: {
        "down_block_types": "DownEncoderBlock2D",
        "up_block_types": "UpDecoderBlock2D",
        "act_fn": "silu",
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
    DC: {"decoder_norm_types": "rms_norm"},
}
# Fields that change nothing of what is computed here.
IRRELEVANT = ("sample_size", "force_upcast")
# Names of the attention's tensors before diffusers 0.15, in which sd-vae-ft-* are published.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def parse_config(fields: Mapping[str, Any], source: str) -> Sizes:
    """The config in diffusers' fields.

    Args:
      fields: of config.json.
      source: the file, for errors.

    Raises:
      UserError: another class, an unknown field, a value that is not supported, of a wrong type, or
        sizes that do not fit together.
    """
    kind = fields.get("_class_name")
    if kind not in (KL, DC):
        raise UserError(f"{source} is of class {kind!r}, expected {KL} or {DC}")
    cls = KLConfig if kind == KL else DCConfig
    values: dict[str, Any] = dict(SILENT[kind])
    hints = typing.get_type_hints(cls)
    for name, value in fields.items():
        if name.startswith("_") or name in IRRELEVANT:
            continue
        if name in FIXED[kind]:
            _check_fixed(name, value, FIXED[kind][name], source)
        elif name not in hints:
            raise UserError(f"{source} has a field that is not known here: {name}={value!r}")
        else:
            values[name] = value
    levels = len(values.get("encoder_block_out_channels", DCConfig().encoder_block_out_channels))
    config = cls(
        **{
            name: _converted(name, value, hints[name], levels, source)
            for name, value in values.items()
        }
    )
    check = _check_kl if isinstance(config, KLConfig) else _check_dc
    check(config, source)  # type: ignore[arg-type]
    return config


def _check_fixed(name: str, value: Any, only: Any, source: str) -> None:
    each = value if isinstance(value, list) else [value]
    if any(part != only for part in each):
        raise UserError(f"{source}: {name}={value!r} is not supported, only {only!r}")


def _converted(name: str, value: Any, hint: Any, levels: int, source: str) -> Any:
    """JSON's value as the type of a field; one value for all resolutions as one for each."""
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [value] * levels
        item = typing.get_args(hint)[0]
        if isinstance(value, list | tuple):
            return tuple(_converted(name, part, item, levels, source) for part in value)
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{source}: {name}={value!r} has another type than expected")


def _check_kl(config: KLConfig, source: str) -> None:
    for width in config.block_out_channels:
        if width % config.norm_num_groups:
            raise UserError(
                f"{source}: norm_num_groups {config.norm_num_groups} does not divide the "
                f"block_out_channels {width}"
            )


def _check_dc(config: DCConfig, source: str) -> None:
    for part in ("encoder", "decoder"):
        widths = getattr(config, f"{part}_block_out_channels")
        for name in ("block_types", "layers_per_block", "qkv_multiscales"):
            if len(getattr(config, f"{part}_{name}")) != len(widths):
                raise UserError(f"{source}: {part}_{name} has not one entry for each resolution")
        if min(getattr(config, f"{part}_layers_per_block")) < 1:
            raise UserError(f"{source}: a resolution without blocks is not supported ({part})")
        for kind in getattr(config, f"{part}_block_types"):
            if kind not in BLOCKS:
                raise unknown_name("block type", kind, BLOCKS)
        if widths[-1] % config.latent_channels or any(
            4 * a % b or 4 * b % a for a, b in itertools.pairwise(widths)
        ):
            raise UserError(f"{source}: {part}_block_out_channels {widths} allow no shortcuts")
    if len(config.encoder_block_out_channels) != len(config.decoder_block_out_channels):
        raise UserError(f"{source}: encoder and decoder have another number of resolutions")
    if len(config.decoder_act_fns) != len(config.decoder_block_out_channels):
        raise UserError(f"{source}: decoder_act_fns has not one entry for each resolution")
    for kind, name, known in (
        ("activation", config.decoder_conv_act_fn, tuple(ACTIVATIONS)),
        *(("activation", name, tuple(ACTIVATIONS)) for name in config.decoder_act_fns),
        ("downsample_block_type", config.downsample_block_type, DOWNSAMPLES),
        ("upsample_block_type", config.upsample_block_type, UPSAMPLES),
    ):
        if name not in known:
            raise unknown_name(kind, name, known)


def build(config: Sizes, dtype: jnp.dtype) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder with initial weights."""
    if isinstance(config, KLConfig):
        return AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0))
    return AutoencoderDC(config, dtype=dtype, rngs=nnx.Rngs(0))


def abstract(config: Sizes, dtype: jnp.dtype) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder without weights: shapes in their place."""
    return nnx.eval_shape(lambda: build(config, dtype))


def their_name(path: tuple[Any, ...]) -> str:
    """diffusers' name of the parameter of this path."""
    *modules, leaf = path
    return ".".join(map(str, [*modules, LEAVES[leaf]]))


def their_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that our array of this shape has there."""
    if len(shape) == 4:
        height, width, channels, features = shape
        return features, channels, height, width
    return shape[::-1]


def to_ours(tensor: np.ndarray) -> np.ndarray:
    """Their tensor as ours."""
    return np.ascontiguousarray(
        tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T, np.float32
    )


def to_theirs(array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def today_name(name: str) -> str:
    """The name that a tensor has in today's diffusers."""
    return re.sub(
        r"(attentions\.\d+)\.(query|key|value|proj_attn)\.",
        lambda match: f"{match[1]}.{OLD_ATTENTION[match[2]]}.",
        name,
    )


def fill(
    config: Sizes, tensors: Mapping[str, np.ndarray], source: str, dtype: jnp.dtype
) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder with a file's weights.

    Args:
      config: its sizes.
      tensors: by diffusers' names, older or newer.
      source: the file, for errors.
      dtype: to compute in.

    Raises:
      UserError: tensors that are missing, surplus or of another shape, by name.
    """
    graph, state = nnx.split(abstract(config, dtype))
    flat = nnx.to_flat_state(state)
    names = {path: their_name(path) for path, _ in flat}
    renamed = {today_name(name): tensor for name, tensor in tensors.items()}
    _check_names(set(renamed), set(names.values()), source)
    shapes = {names[path]: their_shape(leaf.shape) for path, leaf in flat}
    wrong = [
        f"{name} {tensor.shape} (expected {shapes[name]})"
        for name, tensor in sorted(renamed.items())
        if tensor.shape != shapes[name]
    ]
    if wrong:
        raise UserError(f"{source} does not fit its config.json: {listed(wrong)} of another shape")
    filled = [
        (path, leaf.replace(jnp.asarray(to_ours(renamed[names[path]])))) for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _check_names(held: set[str], expected: set[str], source: str) -> None:
    parts = [
        f"{what} {listed(sorted(names))}"
        for what, names in (("missing", expected - held), ("surplus", held - expected))
        if names
    ]
    if parts:
        raise UserError(f"{source} holds another autoencoder than config.json: {'; '.join(parts)}")


def tensors_of(autoencoder: AutoencoderKL | AutoencoderDC) -> dict[str, np.ndarray]:
    """An autoencoder's weights by diffusers' names."""
    flat = nnx.to_flat_state(nnx.split(autoencoder)[1])
    return {their_name(path): to_theirs(np.asarray(leaf[...])) for path, leaf in flat}


def config_fields(config: Sizes) -> dict[str, Any]:
    """The fields that diffusers' config.json has for this autoencoder."""
    fields: dict[str, Any] = dataclasses.asdict(config)
    if isinstance(config, KLConfig):
        levels = len(config.block_out_channels)
        return fields | {
            "_class_name": KL,
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    return fields | {"_class_name": DC, "decoder_norm_types": "rms_norm"}
