"""Weights of DINOv2 in the layout of transformers' Dinov2Model and Dinov2WithRegistersModel.

A folder with config.json and model.safetensors, or a name in KNOWN, which is fetched from the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dydilit_jax.autoencoders.weights import HubWeights, fetch
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.metrics.dinov2 import Dinov2, Dinov2Config, Dinov2Extractor
from dydilit_jax.metrics.weights import check_tensors, checked
from dydilit_jax.models.pretrained.files import (
    CONFIG_FILE,
    OWN_FILE,
    find_weights,
    read_config,
    read_tensors,
)
from dydilit_jax.models.pretrained.layouts import Tensors

DEFAULT = "dinov2-large"  # FDD's
# An empty checksum is one that is not known here.
KNOWN = {
    name: HubWeights(repo=f"facebook/{name}", revision=revision, sha256=sha256, file=OWN_FILE)
    for name, revision, sha256 in (
        (
            "dinov2-small",
            "ed25f3a31f01632728cabb09d1542f84ab7b0056",
            "ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1",
        ),
        (
            "dinov2-base",
            "f9e44c814b77203eaa57a6bdbbd535f21ede1415",
            "",
        ),
        (
            "dinov2-large",
            "47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
            "399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23",
        ),
        (
            "dinov2-giant",
            "611a9d42f2335e0f921f1e313ad3c1b7178d206d",
            "917d3c470db999d32a312f8542149be91c7cbac61ee8fb4b67ae3d82b79ce21f",
        ),
        ("dinov2-with-registers-large", "e4c89a4e05589de9b3e188688a303d0f3c04d0f3", ""),
    )
}

# Of config.json, where it does not say: transformers' own defaults.
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "dinov2": {"num_register_tokens": 0},
    "dinov2_with_registers": {"num_register_tokens": 4, "patch_size": 16},
}

# Ours to theirs. A name with {} is one of each block.
NAMES: dict[tuple[str, ...], str] = {
    ("class_token",): "embeddings.cls_token",
    ("positions",): "embeddings.position_embeddings",
    ("register_tokens",): "embeddings.register_tokens",
    ("patch",): "embeddings.patch_embeddings.projection",
    ("norm",): "layernorm",
    ("blocks", "norm1"): "encoder.layer.{}.norm1",
    ("blocks", "query"): "encoder.layer.{}.attention.attention.query",
    ("blocks", "key"): "encoder.layer.{}.attention.attention.key",
    ("blocks", "value"): "encoder.layer.{}.attention.attention.value",
    ("blocks", "out"): "encoder.layer.{}.attention.output.dense",
    ("blocks", "scale1"): "encoder.layer.{}.layer_scale1.lambda1",
    ("blocks", "norm2"): "encoder.layer.{}.norm2",
    ("blocks", "enter"): "encoder.layer.{}.mlp.fc1",
    ("blocks", "leave"): "encoder.layer.{}.mlp.fc2",
    ("blocks", "scale2"): "encoder.layer.{}.layer_scale2.lambda1",
}
SWIGLU_NAMES = {
    ("blocks", "enter"): "encoder.layer.{}.mlp.weights_in",
    ("blocks", "leave"): "encoder.layer.{}.mlp.weights_out",
}
UNUSED = "embeddings.mask_token"  # Images are masked in training alone.
PARTS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def load_dinov2(
    weights: str = "", *, sha256: str = "", variant: str = "dgm_eval"
) -> Dinov2Extractor:
    """The network with the weights of a folder, or of a known name.

    Args:
      weights: a folder (or the file in it) in transformers' layout, or a name in KNOWN, with or
        without its owner; empty for DEFAULT (1.2 GB, fetched once).
      sha256: checksum that the file must have; default: the known one where it is fetched.
      variant: how positions are interpolated, of dinov2.VARIANTS.

    Raises:
      UserError: weights that are not there or cannot be fetched, another checksum, a config.json
        that is missing or of another network, or tensors that are not this network's.
    """
    path, checksum = locate(weights or DEFAULT, sha256)
    config = config_from(read_config(path), repr(str(path.parent)))
    return Dinov2Extractor(filled(read_tensors(path), config, repr(str(path))), checksum, variant)


def locate(weights: str, sha256: str = "") -> tuple[Path, str]:
    """The file of weights, and its checksum; see `load_dinov2`."""
    path, wanted = Path(weights).expanduser(), sha256.lower()
    if path.exists():
        file = find_weights(path)
    else:
        name = weights.removeprefix("facebook/")
        if name not in KNOWN:
            raise UserError(
                f"weights {weights!r}: no such file or folder, and "
                f"{unknown_name('DINOv2', name, KNOWN)}"
            )
        file = fetch(KNOWN[name], KNOWN[name].revision)
        wanted = wanted or KNOWN[name].sha256
    return file, checked(file, wanted)


def config_from(fields: dict[str, Any], source: str) -> Dinov2Config:
    """The shape that a config.json says.

    Raises:
      UserError: there is none, or it is of a network that this is not; names `source`.
    """
    if not fields:
        raise UserError(f"{source} has no {CONFIG_FILE}: it must lie beside the weights")
    kind = fields.get("model_type")
    if kind not in MODEL_TYPES:
        raise UserError(
            f"{CONFIG_FILE} of {source} has model_type {kind!r}, expected one of "
            f"{', '.join(MODEL_TYPES)}"
        )
    said = DEFAULTS | MODEL_TYPES[kind] | fields
    for name in ("hidden_act", "num_channels"):
        if said[name] != DEFAULTS[name]:
            raise UserError(
                f"{CONFIG_FILE} of {source} has {name} {said[name]!r}, expected {DEFAULTS[name]!r}"
            )
    try:
        width, heads = int(said["hidden_size"]), int(said["num_attention_heads"])
        patch, image = int(said["patch_size"]), int(said["image_size"])
        hidden = int(width * said["mlp_ratio"])
        if said["use_swiglu_ffn"]:  # Two thirds, up to a multiple of 8.
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        config = Dinov2Config(
            width=width,
            depth=int(said["num_hidden_layers"]),
            heads=heads,
            hidden=hidden,
            swiglu=bool(said["use_swiglu_ffn"]),
            patch_size=patch,
            grid=image // patch if patch > 0 else 0,
            registers=int(said["num_register_tokens"]),
            qkv_bias=bool(said["qkv_bias"]),
            epsilon=float(said["layer_norm_eps"]),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG_FILE} of {source} has a size that is no number: {error}") from (
            error
        )
    if min(width, heads, hidden, patch, config.depth, config.grid) < 1 or width % heads:
        raise UserError(
            f"{CONFIG_FILE} of {source} has sizes that make no network: width {width}, heads "
            f"{heads}, depth {config.depth}, patch {patch}, image {image}"
        )
    return config


def filled(tensors: Tensors, config: Dinov2Config, source: str = "these weights") -> Dinov2:
    """The network with tensors of transformers' names.

    Raises:
      UserError: tensors that are missing, too much or misshapen; names them and `source`.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Dinov2(config, rngs=nnx.Rngs(0))))
    shapes = {
        path: tuple(leaf.shape) for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items()
    }
    _check(tensors, shapes, config, source)
    arrays = {}
    for path in shapes:
        to_ours, names = _to_ours(path), _names(path, config)
        if path[0] == "blocks":
            arrays[path] = np.stack([to_ours(tensors[name]) for name in names])
        else:
            arrays[path] = to_ours(tensors[names[0]])
    nnx.replace_by_pure_dict(state, unflatten_dict(arrays))
    return nnx.merge(graph, state)


def _names(path: tuple[str, ...], config: Dinov2Config) -> list[str]:
    """Their tensors of one of our parameters: one, or one a block."""
    names = NAMES | SWIGLU_NAMES if config.swiglu else NAMES
    name = names[path] if path in names else f"{names[path[:-1]]}.{PARTS[path[-1]]}"
    return [name.format(i) for i in range(config.depth)] if path[0] == "blocks" else [name]


def _to_ours(path: tuple[str, ...]) -> Callable[[np.ndarray], np.ndarray]:
    if path == ("patch", "kernel"):
        return lambda tensor: tensor.transpose(2, 3, 1, 0)
    if path[-1] == "kernel":
        return lambda tensor: tensor.T
    return lambda tensor: tensor


def _check(
    tensors: Tensors,
    shapes: dict[tuple[str, ...], tuple[int, ...]],
    config: Dinov2Config,
    source: str,
) -> None:
    """Raises UserError for tensors that are not those of parameters of these shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in shapes.items():
        own = shape[1:] if path[0] == "blocks" else shape
        if path == ("patch", "kernel"):
            own = (own[3], own[2], own[0], own[1])
        elif path[-1] == "kernel":
            own = own[::-1]
        expected |= dict.fromkeys(_names(path, config), own)
    wanted = f"what its {CONFIG_FILE} says, in the layout of transformers' Dinov2Model"
    check_tensors(tensors, expected, source, wanted, (UNUSED,))
