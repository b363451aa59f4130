"""Draws images: python -m dydilit_jax.sample --workdir=runs/digits --labels=0,1,2 --num=30."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags

from dydilit_jax import cli
from dydilit_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of a training run.")
_LABELS = flags.DEFINE_string("labels", "", "Labels to draw, like 0,1,2; empty for all of them.")
_NUM = flags.DEFINE_integer("num", 30, "Images to draw; the labels take turns.", lower_bound=1)
_GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "1 for none; default: the config's.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of the sampler; default: the config's.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed; an image depends on it, its index and label alone.")
_OUT = flags.DEFINE_string("out", "samples.png", "PNG file to write the grid to.")


def parse_labels(text: str, num_classes: int) -> np.ndarray:
    """Labels of a comma-separated list, all of them for an empty one.

    Raises:
      UserError: a part that is no whole number, or outside 0 to num_classes - 1.
    """
    from dydilit_jax.training.generation import check_labels

    if not text:
        return np.arange(num_classes)
    try:
        labels = np.asarray([int(part) for part in text.split(",")])
    except ValueError as error:
        raise UserError(f"--labels={text} expects whole numbers, like 0,1,2") from error
    check_labels(labels, num_classes)
    return labels


def main() -> None:
    """Draws a grid of images from a workdir's averaged parameters."""
    workdir = Path(cli.required(_WORKDIR.value, "workdir"))
    out = Path(_OUT.value)
    if out.suffix != ".png":
        raise UserError(f"--out={out} must end in .png")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: directory {str(out.parent)!r} does not exist")

    from dydilit_jax.data.sources import load_source
    from dydilit_jax.drawing import draw_grid, save_png
    from dydilit_jax.training.checkpoint import Checkpointer, has_checkpoint, load_config
    from dydilit_jax.training.generation import generate_images
    from dydilit_jax.training.optimizer import ema_parameters
    from dydilit_jax.training.sharding import make_mesh
    from dydilit_jax.training.state import Network, abstract_state

    config = load_config(workdir)
    if not has_checkpoint(workdir):
        raise UserError(f"workdir {str(workdir)!r} has no checkpoint yet: train first")
    choices = parse_labels(_LABELS.value, config.model.num_classes)
    overrides = {"guidance_scale": _GUIDANCE_SCALE.value, "steps": _STEPS.value}
    sampling = dataclasses.replace(
        config.sampling, **{name: value for name, value in overrides.items() if value is not None}
    )
    mesh = make_mesh(config.mesh)
    network = Network.create(config)
    step, ema = Checkpointer(workdir).restore_ema(abstract_state(network, mesh))
    labels = np.resize(choices, _NUM.value)
    images = generate_images(
        network,
        ema_parameters(ema, config.optimizer),
        labels,
        seed=_SEED.value,
        config=sampling,
        mesh=mesh,
    )
    names = load_source(config.data.source).label_names
    picture = draw_grid(
        np.concatenate(list(images)),
        columns=min(len(choices), 10) if len(choices) > 2 else min(_NUM.value, 10),
        title=f"{config.data.source}, step {step}, guidance {sampling.guidance_scale:g}",
        labels=[names[label] for label in labels],
    )
    save_png(picture, out)
    print(f"wrote {_NUM.value} images of step {step} to {out}")


if __name__ == "__main__":
    cli.run(main)
