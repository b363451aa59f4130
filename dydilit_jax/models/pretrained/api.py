"""A network as a folder, model.safetensors and config.json, in our layout or another's.

    own         paths of the parameters joined by slashes, any network
    diffusers   DiTTransformer2DModel's, which its from_pretrained reads; a DiT alone
    dit         the official DiT's names; a DiT alone

Reading also takes the official .pt files. Which layout a file has is told by its names.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.pretrained import files
from dydilit_jax.models.pretrained.inference import (
    check_names,
    check_sizes,
    check_tensors,
    config_from,
    infer_config,
    sizes_of,
)
from dydilit_jax.models.pretrained.layouts import (
    DIFFUSERS,
    LAYOUTS,
    Tensors,
    detect_layout,
    representable,
    to_ours,
    to_theirs,
)

OWN = "own"
LAYOUT_NAMES = (OWN, *LAYOUTS)
FORMAT = "dydilit_jax"
PRIVATE = "_dydilit_jax"  # our section of diffusers' config.json; it skips names like this


class Pretrained(NamedTuple):
    """What a file holds.

    Attributes:
      config: the network.
      out_channels: of its output.
      parameters: nested dicts of float32 numpy arrays.
      layout: `own`, `diffusers` or `dit`.
      extra: what `save_pretrained` was given beside; empty for other projects' files.
    """

    config: ModelConfig
    out_channels: int
    parameters: dict
    layout: str
    extra: dict[str, Any]


def load_pretrained(path: Path | str, *, heads: int | None = None) -> tuple[ModelConfig, dict]:
    """The network in a file or folder; see `read_pretrained`."""
    pretrained = read_pretrained(path, heads=heads)
    return pretrained.config, pretrained.parameters


def read_pretrained(path: Path | str, *, heads: int | None = None) -> Pretrained:
    """Reads a network in any layout.

    Args:
      path: a .safetensors or .pt file, or the folder of one.
      heads: heads of an official DiT whose width is of none of its sizes.

    Raises:
      UserError: no such file, a damaged one, one that only pickle could read, or tensors that are
        missing, too much, misshapen, not finite or of another size than the config beside them.
    """
    weights = files.find_weights(Path(path))
    source = repr(str(weights))
    tensors = files.read_tensors(weights)
    fields = files.read_config(weights)
    ours = fields if fields.get("format") == FORMAT else fields.get(PRIVATE, {})
    layout = detect_layout(tensors, source)
    if layout is not None:
        check_names(layout, tensors, source)
    if ours:
        config, out_channels = _our_config(ours, source)
    elif layout is None:
        raise UserError(f"{source} needs the config.json it was written with beside it")
    else:
        config, out_channels = infer_config(layout, tensors, fields, heads, source)
    if layout is None:
        _check_own_size(tensors, config, source)
    elif ours:
        held = infer_config(layout, tensors, fields, config.attention.heads, source)
        check_sizes(sizes_of(*held), sizes_of(config, out_channels), source, "its config.json")
    check_tensors(layout, tensors, config, out_channels, source)
    parameters = (
        traverse_util.unflatten_dict(tensors, sep="/")
        if layout is None
        else to_ours(layout, tensors, config.depth)
    )
    extra = {name: ours[name] for name in ours if name not in ("format", "model", "out_channels")}
    return Pretrained(config, out_channels, parameters, layout.name if layout else OWN, extra)


def _our_config(ours: dict[str, Any], source: str) -> tuple[ModelConfig, int]:
    """Network and output channels of a config.json that `save_pretrained` wrote."""
    if not isinstance(ours, dict) or "model" not in ours:
        raise UserError(f"{source}: the config.json beside it has no section model")
    out_channels = ours.get("out_channels")
    if type(out_channels) is not int or out_channels < 1:
        raise UserError(
            f"{source}: out_channels of its config.json expects int, got {out_channels!r}"
        )
    return config_from(ours["model"], ModelConfig, "model"), out_channels


def _check_own_size(tensors: Tensors, config: ModelConfig, source: str) -> None:
    modulation = tensors.get("blocks/modulation/linear/kernel")
    if modulation is not None and modulation.ndim == 3:
        held = {"depth": modulation.shape[0], "width": modulation.shape[1]}
        said = {"depth": config.depth, "width": config.width}
        check_sizes(held, said, source, "its config.json")


def save_pretrained(
    folder: Path | str,
    config: ModelConfig,
    parameters: dict,
    extra: dict[str, Any] | None = None,
    *,
    layout: str = OWN,
    overwrite: bool = False,
) -> None:
    """Writes a network; what was there stays whole until the new is.

    Args:
      folder: to write to; new or empty, unless `overwrite`.
      config: the network.
      parameters: nested dicts of arrays, saved as float32.
      extra: what else to keep in config.json, such as process and step; JSON values.
      layout: one of LAYOUT_NAMES.
      overwrite: replace the weights and config in the folder.

    Raises:
      UserError: an unknown layout or one that cannot hold the network, values that are not finite,
        or a folder that is not empty or cannot be written.
    """
    if layout not in LAYOUT_NAMES:
        raise unknown_name("layout", layout, LAYOUT_NAMES)
    arrays = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parameters)
    out_channels = arrays["final"]["linear"]["bias"].size // config.patch_size**2
    flat = traverse_util.flatten_dict(arrays, sep="/")
    target = f"folder {str(folder)!r} cannot be written: the network"
    check_tensors(None, flat, config, out_channels, target)
    fields: dict[str, Any] = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "out_channels": out_channels,
        **(extra or {}),
    }
    weights = files.OWN_FILE
    if layout != OWN:
        representable(LAYOUTS[layout], config)
        flat = to_theirs(LAYOUTS[layout], config, arrays)
    if layout == DIFFUSERS.name:
        del fields["format"]
        weights = files.DIFFUSERS_FILE
        fields = diffusers_config(config, out_channels) | {PRIVATE: fields}
    files.write_folder(Path(folder), weights, flat, fields, overwrite=overwrite)


def diffusers_config(config: ModelConfig, out_channels: int) -> dict[str, Any]:
    """The config.json of diffusers' DiTTransformer2DModel."""
    heads = config.attention.heads
    return {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // heads,
        "dropout": 0.0,
        "in_channels": config.channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": out_channels,
        "patch_size": config.patch_size,
        "sample_size": config.image_size,
        "upcast_attention": False,
    }


def other_frequencies(config: ModelConfig, layout: str) -> str | None:
    """One line of warning where the layout's own code would compute something else."""
    if layout == OWN or LAYOUTS[layout].time_frequency_shift == config.time_frequency_shift:
        return None
    if layout == DIFFUSERS.name:
        return (
            "diffusers embeds time at slightly other frequencies than this network: after loading, "
            "set block.norm1.emb.time_proj.downscale_freq_shift = 0 for block in transformer_blocks"
        )
    return "the official DiT embeds time at slightly other frequencies than this network"
