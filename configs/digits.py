"""DyDi-LiT on scikit-learn's handwritten digits: 1,797 real 8 x 8 images, class-conditional.

Command:   python -m dydilit_jax.train --config=configs/digits.py --workdir=runs/digits
Variants:  --config=configs/digits.py:attention=relu,size=tiny,feedforward=mlp
           --config=configs/digits.py:process=gaussian
"""

from ml_collections import ConfigDict

from dydilit_jax import config as c
from dydilit_jax.models.config import ModelConfig, size_fields


def get_config(argument: str = "") -> ConfigDict:
    """The config for `attention=...,size=...,feedforward=...,process=...`."""
    choice = c.parse_argument(
        argument, attention="dydila", size="tiny", feedforward="auto", process="flow"
    )
    feedforward = c.feedforward_for(choice["attention"], choice["feedforward"])
    return c.Config(
        model=ModelConfig(
            image_size=8,
            channels=1,
            num_classes=10,
            scan_layers=False,
            **size_fields(choice["size"], choice["attention"], feedforward),
        ),
        data=c.DataConfig(source="digits", batch_size=128),
        diffusion=c.DiffusionConfig(process=choice["process"]),
        optimizer=c.OptimizerConfig(
            learning_rate=3e-3,
            schedule="cosine",
            warmup_steps=100,
            clip_norm=1.0,
            ema_decay=0.995,
        ),
        train=c.TrainConfig(steps=1_400, log_every=50, checkpoint_every=350, sample_every=700),
        sampling=c.SamplingConfig(steps=50, guidance_scale=1.5, batch_size=250),
        evaluation=c.EvaluationConfig(num=1_000, features="classifier"),
    ).to_dict()
