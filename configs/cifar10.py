"""Class-conditional CIFAR-10 in pixels, 32 x 32.

Prepare:   tfds build cifar10 --file_format=array_record    (see docs/data.md)
Command:   python -m dydilit_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
Variants:  --config=configs/cifar10.py:size=B,attention=relu,process=flow
           --config=configs/cifar10.py:size=tiny,process=flow,recipe=short   (2 CPU cores)
           --config=configs/cifar10.py --config.model.patch_size=4
Hardware:  `recipe=dit` is made for one accelerator or more and has not been run at full length by
           this project; `recipe=short` for 2 CPU cores.
Time:      `recipe=short,size=tiny,process=flow`: 25 minutes on 2 cores of an x86-64 machine,
           which had other work to do as well. `recipe=dit`: not measured.
Result:    of that run, docs/results.md; of others, not measured.

`recipe=dit` is DiT's own: constant rate, batch 256, 400K steps, patch 2. `recipe=short` is for what
can be seen in little time: 3,000 steps of batch 64 (about four epochs), patch 4, a higher rate with
warm-up and cosine decay, a faster average, unrolled layers.
"""

import dataclasses

from ml_collections import ConfigDict

from dydilit_jax import config as c
from dydilit_jax.errors import unknown_name
from dydilit_jax.models.config import ModelConfig, size_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `recipe=...` chooses."""

    optimizer: c.OptimizerConfig
    train: c.TrainConfig
    batch_size: int
    patch_size: int
    scan_layers: bool
    sampling_steps: int


RECIPES = {
    "dit": Recipe(
        optimizer=c.OptimizerConfig(),
        train=c.TrainConfig(steps=400_000, checkpoint_every=10_000, sample_every=50_000),
        batch_size=256,
        patch_size=2,
        scan_layers=True,
        sampling_steps=250,
    ),
    "short": Recipe(
        optimizer=c.OptimizerConfig(
            learning_rate=1e-3,
            schedule="cosine",
            warmup_steps=200,
            clip_norm=1.0,
            ema_decay=0.998,
        ),
        train=c.TrainConfig(steps=3_000, log_every=50, checkpoint_every=500, sample_every=1_500),
        batch_size=64,
        patch_size=4,
        scan_layers=False,
        sampling_steps=50,
    ),
}


def get_config(argument: str = "") -> ConfigDict:
    """The config for `size=...,attention=...,feedforward=...,process=...,recipe=...`."""
    choice = c.parse_argument(
        argument,
        size="S",
        attention="dydila",
        feedforward="auto",
        process="gaussian",
        recipe="dit",
    )
    if choice["recipe"] not in RECIPES:
        raise unknown_name("recipe", choice["recipe"], RECIPES)
    recipe = RECIPES[choice["recipe"]]
    feedforward = c.feedforward_for(choice["attention"], choice["feedforward"])
    return c.Config(
        model=ModelConfig(
            image_size=32,
            channels=3,
            num_classes=10,
            patch_size=recipe.patch_size,
            scan_layers=recipe.scan_layers,
            **size_fields(choice["size"], choice["attention"], feedforward),
        ),
        data=c.DataConfig(source="cifar10", batch_size=recipe.batch_size, horizontal_flip=True),
        diffusion=c.DiffusionConfig(process=choice["process"]),
        optimizer=recipe.optimizer,
        train=recipe.train,
        sampling=c.SamplingConfig(steps=recipe.sampling_steps, batch_size=100),
        evaluation=c.EvaluationConfig(features="classifier"),
    ).to_dict()
