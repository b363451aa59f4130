"""Draws images: python -m dydilit_jax.sample --workdir=runs/digits --labels=0,1,2 --num=30."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
from absl import flags

from dydilit_jax import cli, sampling_flags
from dydilit_jax.config import Config
from dydilit_jax.errors import UserError, unknown_name

FORMATS = ("png", "npz")

_CONNECT = cli.define_process_flags()
_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.")
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


def main() -> None:
    """Draws images from a workdir's averaged parameters: a grid, a folder or an .npz."""
    workdir = Path(cli.required(_WORKDIR.value, "workdir"))
    out = Path(_OUT.value)
    form = output_format(out, _FORMAT.value)
    _CONNECT()

    import jax
    from tqdm import tqdm

    from dydilit_jax.training import request
    from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint, load_config
    from dydilit_jax.training.decoding import make_decoder
    from dydilit_jax.training.generation import generate_images
    from dydilit_jax.training.optimizer import ema_parameters
    from dydilit_jax.training.state import Network, abstract_state

    trained = load_config(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"workdir {str(workdir)!r} has no checkpoint yet: train first")
    config = _SAMPLING(trained)
    choices = sampling_flags.parse_labels(_LABELS.value, config.model.num_classes)
    labels = np.resize(choices, _NUM.value)
    decode = make_decoder(config.autoencoder)
    mesh = sampling_flags.drawing_mesh(config)
    network = Network.create(config)
    step, ema = Checkpointer(workdir).restore_ema(abstract_state(network, mesh))
    asked = {
        "workdir": str(workdir.resolve()),
        "step": step,
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
    batches = generate_images(
        network,
        ema_parameters(ema, config.optimizer),
        labels,
        seed=_SEED.value,
        config=config.sampling,
        mesh=mesh,
        first=done,
    )
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
        title = (
            f"{config.data.source}, step {step}, guidance {config.sampling.guidance_scale:g}, "
            f"seed {_SEED.value}"
        )
        write_grid(np.concatenate(list(parts.read())), labels, out, config, title)
    else:
        request.write_pngs(parts, labels, out)
    parts.delete()
    print(f"wrote {_NUM.value} images of step {step} to {out}")


def write_grid(
    pixels: np.ndarray, labels: np.ndarray, out: Path, config: Config, title: str
) -> None:
    """One picture of all images (n, H, W, C) uint8: about ten columns, each of one label."""
    from dydilit_jax.data.load import label_names
    from dydilit_jax.drawing import draw_grid, save_png

    names = label_names(config)
    distinct = len(np.unique(labels))
    picture = draw_grid(
        pixels / 127.5 - 1.0,
        columns=min(distinct * max(1, 10 // distinct), 10, len(labels)),
        title=title,
        labels=[names[label] for label in labels],
    )
    save_png(picture, out)


if __name__ == "__main__":
    cli.run(main)
