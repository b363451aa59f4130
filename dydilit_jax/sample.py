"""Draws images, from a run or from weights.

python -m dydilit_jax.sample --workdir=runs/digits --labels=0,1,2 --num=30
python -m dydilit_jax.sample --weights=DiT-XL-2-256x256.pt --vae=sd-vae-ft-mse --labels=207,360
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from dydilit_jax import cli, sampling_flags
from dydilit_jax.errors import UserError, unknown_name

if TYPE_CHECKING:
    from dydilit_jax.training.trained import Trained

FORMATS = ("png", "npz")

_CONNECT = cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.")
_WEIGHTS = flags.DEFINE_string(
    "weights", None, "In place of --workdir: weights, .safetensors, .pt or a folder, in any layout."
)
_SIT = flags.DEFINE_bool("sit", False, "The weights are a SiT's, whose names are DiT's.")
_HEADS = flags.DEFINE_integer(
    "heads", None, "Heads of an official DiT of an unknown width.", lower_bound=1
)
_SHIFT = flags.DEFINE_integer(
    "time_frequency_shift",
    None,
    "0 if the weights were trained with the official code, 1 if with diffusers; default: that "
    "of the layout they come in.",
)
_VAE = flags.DEFINE_string(
    "vae",
    "",
    "What decodes the latents of --weights: sd-vae-ft-ema, sd-vae-ft-mse, dc-ae-f32c32-sana-1.0 or "
    "a folder in diffusers' layout; default: what the weights name.",
)
_LABELS = flags.DEFINE_string("labels", "", "Labels to draw, like 0,1,2; empty for all of them.")
_NUM = flags.DEFINE_integer("num", 30, "Images to draw; the labels take turns.", lower_bound=1)
_SAMPLING = sampling_flags.define()
_SEED = flags.DEFINE_integer("seed", 0, "Seed; an image depends on it, its index and label alone.")
_OUT = flags.DEFINE_string(
    "out", "samples.png", "A .png for one grid, a folder for a PNG each, or an .npz."
)
_FORMAT = flags.DEFINE_string("format", None, "png or npz; default: what --out ends in.")


def output_format(out: Path, name: str | None) -> str:
    """`png` or `npz`, from --format or the end of --out; checks that --out can be written.

    Raises:
      UserError: an unknown format, one that --out contradicts, a folder that does not exist or is
        not empty, or a file where a folder is to be or the other way round.
    """
    from dydilit_jax.training.request import parts_folder

    name = name or ("npz" if out.suffix == ".npz" else "png")
    if name not in FORMATS:
        raise unknown_name("format", name, FORMATS)
    if name == "npz" and out.suffix != ".npz":
        raise UserError(f"--format=npz writes an .npz file, --out={out} does not end in .npz")
    if name == "png" and out.suffix not in ("", ".png"):
        raise UserError(f"--format=png writes a .png file or a folder, --out={out} is neither")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: directory {str(out.parent)!r} does not exist")
    if out.suffix and out.is_dir():
        raise UserError(f"--out={out} is a folder: give a file, or a folder without a suffix")
    if out.is_dir() and any(out.iterdir()) and not parts_folder(out).is_dir():
        raise UserError(f"--out={out} is not empty: choose another folder")
    if not out.suffix and out.is_file():
        raise UserError(f"--out={out} is a file: give a folder, or a file that ends in .{name}")
    return name


def load() -> Trained:
    """The network that --workdir or --weights names.

    Raises:
      UserError: neither or both are given, flags that belong to the other, or as load_run and
        load_weights.
    """
    from dydilit_jax.training.trained import load_run, load_weights

    if _WORKDIR.value and _WEIGHTS.value:
        raise UserError("give either --workdir, of a run, or --weights, a file")
    sampling = _SAMPLING()
    if _WEIGHTS.value:
        return load_weights(
            _WEIGHTS.value,
            sit=_SIT.value,
            heads=_HEADS.value,
            time_frequency_shift=_SHIFT.value,
            autoencoder=_VAE.value,
            **sampling,
        )
    workdir = cli.required(_WORKDIR.value, "workdir")
    if _SIT.value or _HEADS.value or _SHIFT.value is not None or _VAE.value:
        raise UserError(
            "--sit, --heads, --time_frequency_shift, --vae are for --weights: a run knows its own"
        )
    return load_run(workdir, **sampling)


def main() -> None:
    """Draws images with a run's averaged parameters, or weights: a grid, a folder or an .npz."""
    if not _WEIGHTS.value:
        cli.required(_WORKDIR.value, "workdir")
    out = Path(_OUT.value)
    form = output_format(out, _FORMAT.value)
    _CONNECT()

    import jax
    from tqdm import tqdm

    from dydilit_jax.training import request

    trained = load()
    config = trained.config
    choices = sampling_flags.parse_labels(_LABELS.value, config.model.num_classes)
    labels = np.resize(choices, _NUM.value)
    decode = trained.decode
    asked = {
        **trained.identity,
        "seed": _SEED.value,
        "num": _NUM.value,
        "labels": choices.tolist(),
        # The size of a batch changes no image.
        **dataclasses.asdict(dataclasses.replace(config.sampling, batch_size=1, grid_rows=1)),
    }
    parts = request.Parts(out, asked)
    done = parts.done()
    if done and jax.process_index() == 0:
        print(f"{done} of {len(labels)} images are there already")
    batches = trained.batches(labels, seed=_SEED.value, first=done)
    if jax.process_index() > 0:  # It draws its part of each batch; process 0 writes them all.
        for _ in batches:
            pass
        return
    with tqdm(total=len(labels), initial=done, unit="image", desc="sampling") as bar:
        try:
            for count in request.draw_parts(parts, map(decode, batches), done):
                bar.update(count)
        except KeyboardInterrupt:
            bar.close()
            print(f"stopped at {bar.n} of {len(labels)} images; run again to go on", flush=True)
            sys.exit(130)
    if form == "npz":
        request.write_npz(parts, labels, out)
    elif out.suffix == ".png":
        title = f"{trained.title}, guidance {config.sampling.guidance_scale:g}, seed {_SEED.value}"
        names = [trained.labels[label] for label in labels]
        write_grid(np.concatenate(list(parts.read())), labels, out, names, title)
    else:
        request.write_pngs(parts, labels, out)
    parts.delete()
    print(f"wrote {_NUM.value} images of {trained.name} to {out}")


def write_grid(
    pixels: np.ndarray, labels: np.ndarray, out: Path, names: list[str], title: str
) -> None:
    """One picture of all images (n, H, W, C) uint8: about ten columns, each of one label."""
    from dydilit_jax.drawing import draw_grid, save_png

    distinct = len(np.unique(labels))
    picture = draw_grid(
        pixels / 127.5 - 1.0,
        columns=min(distinct * max(1, 10 // distinct), 10, len(labels)),
        title=title,
        labels=names,
    )
    save_png(picture, out)


if __name__ == "__main__":
    cli.run(main)
