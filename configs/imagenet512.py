"""Class-conditional ImageNet-1K at 512 x 512 in f8 latents, with DiT's recipe.

Prepare:   tfds build imagenet2012 --file_format=array_record    (see docs/data.md)
           python -m dydilit_jax.encode --config=configs/imagenet512.py --out=latents/imagenet512
Command:   python -m dydilit_jax.train --config=configs/imagenet512.py --workdir=runs/imagenet512
Variants:  --config=configs/imagenet512.py:size=S,attention=softmax        (DiT-S/2)
           --config=configs/imagenet512.py:size=XL,process=flow            (as SiT trains)
           --config=configs/imagenet512.py:size=B,attention=relu,feedforward=mlp   (as LiT)
An image has 1,024 tokens, four times as many as at 256 pixels.
Hardware:  made for 8 accelerators or more; has not been run at full length by this project.
Time:      not measured.
Result:    not measured.
"""

from ml_collections import ConfigDict

from dydilit_jax import config as c
from dydilit_jax.models.config import ModelConfig, size_fields


def get_config(argument: str = "") -> ConfigDict:
    """The config for `size=...,attention=...,feedforward=...,process=...`."""
    choice = c.parse_argument(
        argument, size="XL", attention="dydila", feedforward="auto", process="gaussian"
    )
    feedforward = c.feedforward_for(choice["attention"], choice["feedforward"])
    gaussian = choice["process"] == "gaussian"
    return c.Config(
        model=ModelConfig(
            image_size=64,
            channels=4,
            num_classes=1000,
            dtype="bfloat16",
            **size_fields(choice["size"], choice["attention"], feedforward),
        ),
        data=c.DataConfig(
            source="imagenet2012",
            image_size=512,
            latents="latents/imagenet512",
            batch_size=256,
            horizontal_flip=True,
            workers=4,
        ),
        autoencoder=c.AutoencoderConfig(weights="sd-vae-ft-ema"),
        diffusion=c.DiffusionConfig(process=choice["process"]),
        train=c.TrainConfig(steps=400_000, checkpoint_every=10_000, sample_every=50_000),
        sampling=c.SamplingConfig(steps=250, guidance_scale=1.5, guidance_channels=3 * gaussian),
    ).to_dict()
