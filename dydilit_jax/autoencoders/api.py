"""Autoencoders by name or folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from dydilit_jax.autoencoders.dc import AutoencoderDC
from dydilit_jax.autoencoders.kl import AutoencoderKL
from dydilit_jax.autoencoders.layout import (
    Sizes,
    abstract,
    config_fields,
    fill,
    parse_config,
    tensors_of,
)
from dydilit_jax.autoencoders.weights import KNOWN, WeightsFile, known_name, locate
from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.models.pretrained.files import (
    CONFIG_FILE,
    DIFFUSERS_FILE,
    read_config,
    read_tensors,
    write_folder,
)

DTYPES = ("float32", "bfloat16")


class Pretrained(NamedTuple):
    """An autoencoder (an interface.Autoencoder) and the file that its weights are of."""

    autoencoder: AutoencoderKL | AutoencoderDC
    weights: WeightsFile


def load_autoencoder(
    weights: str,
    *,
    scaling_factor: float | None = None,
    revision: str = "",
    sha256: str = "",
    dtype: str = "float32",
) -> Pretrained:
    """Reads an autoencoder in diffusers' layout.

    Args:
      weights: a folder (or the .safetensors file in it) with config.json, or a name of KNOWN:
        `sd-vae-ft-ema`, `sd-vae-ft-mse`, `dc-ae-f32c32-sana-1.0`, fetched through huggingface_hub
        at its pinned revision and checked against its checksum.
      scaling_factor: that the network was or will be trained with; None for the weights' own.
      revision: to fetch in place of the pinned one.
      sha256: checksum that the file of weights must have.
      dtype: that the autoencoder computes in, `float32` or `bfloat16`; its norms and attention
        sums are float32 in both.

    Raises:
      UserError: weights that cannot be found or read, or have another checksum; tensors that do not
        fit config.json; a scaling factor that does not belong to the weights.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    file = locate(weights, revision=revision, sha256=sha256)
    config = _sizes_beside(file.path)
    check_scaling(config.scaling_factor, scaling_factor, file)
    source = repr(str(file.path))
    autoencoder = fill(config, read_tensors(file.path), source, jnp.dtype(dtype))
    return Pretrained(autoencoder, file)


def abstract_autoencoder(weights: str, *, dtype: str = "float32") -> AutoencoderKL | AutoencoderDC:
    """An autoencoder with shapes in place of its weights; a known one is not fetched for it.

    Args:
      weights, dtype: as `load_autoencoder`'s.

    Raises:
      UserError: an unknown name, or a folder that does not tell the sizes.
    """
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    name = known_name(weights)
    if name is not None and not Path(weights).expanduser().exists():
        return abstract(KNOWN[name].sizes, jnp.dtype(dtype))
    return abstract(_sizes_beside(locate(weights).path), jnp.dtype(dtype))


def _sizes_beside(file: Path) -> Sizes:
    """What config.json beside a file of weights says."""
    fields = read_config(file)
    if not fields:
        raise UserError(f"{str(file)!r} has no {CONFIG_FILE} beside it, which tells its sizes")
    return parse_config(fields, repr(str(file.parent / CONFIG_FILE)))


def check_scaling(own: float, wanted: float | None, file: WeightsFile) -> None:
    """Raises UserError where weights and scaling factor do not belong together.

    Args:
      own: config.json's, or diffusers' default for the class where that is silent.
      wanted: the run's; None to take the weights' own.
      file: the weights; known ones have a known factor.
    """
    if not (math.isfinite(own) and own > 0):
        raise UserError(
            f"{str(file.path)!r}: the scaling factor {own} of its config.json is no scale"
        )
    if file.name in KNOWN and not math.isclose(known := KNOWN[file.name].scaling_factor, own):
        raise UserError(
            f"{str(file.path)!r} is {file.name}, whose scaling factor is {known:g}, but its "
            f"config.json has {own:g}: restore the config.json that belongs to it"
        )
    if wanted is not None and not math.isclose(wanted, own):
        raise UserError(
            f"scaling factor {wanted:g} does not belong to {str(file.path)!r} ({file.name}), which "
            f"has {own:g}: latents scaled by another factor are another data set"
        )


def save_autoencoder(
    folder: Path | str, autoencoder: AutoencoderKL | AutoencoderDC, *, overwrite: bool = False
) -> None:
    """Writes an autoencoder as diffusers would: config.json and the weights in float32.

    Raises:
      UserError: the folder is not empty and not to be overwritten, or cannot be written.
    """
    write_folder(
        Path(folder),
        DIFFUSERS_FILE,
        tensors_of(autoencoder),
        config_fields(autoencoder.config),
        overwrite=overwrite,
    )
