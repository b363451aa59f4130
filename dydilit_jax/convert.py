"""Brings weights in and out, in a layout that is told by its names.

python -m dydilit_jax.convert --source=DiT-XL-2-256x256.pt --out=pretrained/dit-xl-2
python -m dydilit_jax.convert --workdir=runs/x --out=exported --layout=diffusers
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from absl import flags

from dydilit_jax import cli
from dydilit_jax.errors import UserError, unknown_name

KEPT = ("diffusion", "autoencoder", "sampling")  # sections that say how to draw, kept beside

_SOURCE = flags.DEFINE_string("source", None, "Weights to read: .safetensors, .pt or a folder.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a run, whose average is written.")
_OUT = flags.DEFINE_string("out", None, "Folder to write; new or empty.")
_LAYOUT = flags.DEFINE_string("layout", "own", "Layout to write: own, diffusers or dit.")
_HEADS = flags.DEFINE_integer(
    "heads", None, "Heads of an official DiT of an unknown width.", lower_bound=1
)
_SHIFT = flags.DEFINE_integer(
    "time_frequency_shift",
    None,
    "0 if the weights were trained with the official code, 1 if with diffusers; default: that "
    "of the layout they come in.",
)
_SIT = flags.DEFINE_bool("sit", False, "The weights are a SiT's: its time runs the other way.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the weights in --out.")


def main() -> None:
    """Reads weights, from a file or from a run, and writes them to a folder."""
    out = Path(cli.required(_OUT.value, "out"))
    if bool(_SOURCE.value) == bool(_WORKDIR.value):
        raise UserError("give either --source, weights to read, or --workdir, a run to export")
    if _WORKDIR.value and (_HEADS.value or _SIT.value or _SHIFT.value is not None):
        raise UserError(
            "--heads, --time_frequency_shift and --sit are for --source: a run knows its own"
        )

    from dydilit_jax.models.pretrained.api import LAYOUT_NAMES, other_frequencies, save_pretrained
    from dydilit_jax.models.pretrained.files import check_folder

    if _LAYOUT.value not in LAYOUT_NAMES:
        raise unknown_name("layout", _LAYOUT.value, LAYOUT_NAMES)
    check_folder(out, overwrite=_OVERWRITE.value)  # before the long reading
    read = read_source if _SOURCE.value else read_run
    config, parameters, extra, what = read()
    save_pretrained(
        out, config, parameters, extra, layout=_LAYOUT.value, overwrite=_OVERWRITE.value
    )
    if warning := other_frequencies(config, _LAYOUT.value):
        print(f"note: {warning}", file=sys.stderr)
    attention = config.attention
    print(
        f"wrote {what} to {out}: {attention.kind} attention, depth {config.depth}, width "
        f"{config.width}, {attention.heads} heads, patches of {config.patch_size}, "
        f"{config.image_size} x {config.image_size} x {config.channels}, "
        f"{config.num_classes} classes; layout {_LAYOUT.value}"
    )


def read_source() -> tuple[Any, dict, dict[str, Any], str]:
    """Network, parameters, what is kept beside them and a name, from --source."""
    from dydilit_jax.models.pretrained.api import read_pretrained
    from dydilit_jax.models.pretrained.sit import from_sit

    source = cli.required(_SOURCE.value, "source")
    pretrained = read_pretrained(source, heads=_HEADS.value)
    if _SIT.value:
        pretrained = from_sit(pretrained, source)
    config = pretrained.config
    if _SHIFT.value is not None:
        config = dataclasses.replace(config, time_frequency_shift=_SHIFT.value)
    what = f"{source} (layout {pretrained.layout})"
    return config, pretrained.parameters, {"source": source} | pretrained.extra, what


def read_run() -> tuple[Any, dict, dict[str, Any], str]:
    """Network, averaged parameters, what is kept beside them and a name, from --workdir."""
    from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint, load_config
    from dydilit_jax.training.optimizer import ema_parameters
    from dydilit_jax.training.sharding import make_mesh
    from dydilit_jax.training.state import Network, abstract_state

    workdir = Path(cli.required(_WORKDIR.value, "workdir"))
    config = load_config(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"workdir {str(workdir)!r} has no checkpoint yet: train first")
    network = Network.create(config)
    abstract = abstract_state(network, make_mesh(config.mesh))
    step, ema = Checkpointer(workdir).restore_ema(abstract)
    parameters = ema_parameters(ema, config.optimizer)
    extra: dict[str, Any] = {"step": step}
    extra |= {name: dataclasses.asdict(getattr(config, name)) for name in KEPT}
    return config.model, parameters, extra, f"the average of step {step} of {workdir}"


if __name__ == "__main__":
    cli.run(main)
