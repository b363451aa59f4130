"""What the ladder compares: data sets, variants of the token mixer, and what all runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dydilit_jax.config import Config, DataConfig, OptimizerConfig, SamplingConfig, TrainConfig
from dydilit_jax.data.load import load_images
from dydilit_jax.data.sources import ArraySource, Source
from dydilit_jax.models.config import AttentionConfig, FeedForwardConfig, ModelConfig

HEADS, SOFTMAX_HEADS = 2, 4  # few heads for linear attention, as LiT; DiT's many for softmax
SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and how images of it are cut into tokens.

    Attributes:
      source, image_size, channels, flip: as DataConfig and ModelConfig have them.
      patch_size: side of a patch.
      held: images that are kept from training, to measure the loss on.
      scan_layers: as ModelConfig has it: scanned layers compile faster, unrolled ones run faster.
    """

    source: str
    image_size: int
    channels: int
    patch_size: int
    flip: bool
    held: int
    scan_layers: bool


TASKS = {
    "digits": Task(
        source="digits",
        image_size=8,
        channels=1,
        patch_size=1,
        flip=False,
        held=397,
        scan_layers=False,
    ),
    "cifar10": Task(
        source="cifar10",
        image_size=32,
        channels=3,
        patch_size=4,
        flip=True,
        held=400,
        scan_layers=True,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What all runs have in common.

    Attributes:
      steps: of the longest run.
      points: times at which the loss is measured, evenly over the steps.
      draws: times and noises that the loss of each held-out image is a mean of.
      samples: images drawn at the end of each budget.
      depth, width, batch_size, learning_rate, warmup_steps: of every network and its training.
    """

    steps: int = 400
    points: int = 5
    draws: int = 4
    samples: int = 500
    depth: int = 3
    width: int = 64
    batch_size: int = 16
    learning_rate: float = 2e-3
    warmup_steps: int = 33


def _linear(**fields: Any) -> AttentionConfig:
    return AttentionConfig(heads=HEADS, **fields)


# method.md's ladder. FLatten's focused attention is the rung `phi` under another name: the same
# function of the same parameters (a test says so), so it is not trained twice.
LADDER = {
    "relu": _linear(kind="relu", depthwise=0),
    "depthwise": _linear(kind="relu"),
    "phi": _linear(projectors=0, exponents=0),
    "routed exponent": _linear(projectors=0),
    "static differential": _linear(projectors=1, lambdas=1),
    "routed projectors": _linear(lambdas=1),
    "dydila": _linear(),
}
SOFTMAX = {
    "softmax": AttentionConfig(kind="softmax", heads=SOFTMAX_HEADS, depthwise=0),
    "softmax, depthwise": AttentionConfig(kind="softmax", heads=SOFTMAX_HEADS),
}
# One field of DyDiLA changed, or as many as the name lists: what the sources leave open. The weight
# of the load-balance loss is that of Switch Transformer (arXiv 2101.03961).
ABLATIONS = {
    "normalizer signed": _linear(normalizer="signed"),
    "normalizer none": _linear(normalizer="none"),
    "normalizer rms": _linear(normalizer="rms"),
    "norm_scope head": _linear(norm_scope="head"),
    "router switch": _linear(router_training="switch"),
    "router gumbel": _linear(router_training="gumbel"),
    "router soft": _linear(router_training="soft"),
    "exponent 1.5": _linear(exponent_init=1.5),
    "lambda 0.2": _linear(lambda_init=0.2),
    "lambda 0.8": _linear(lambda_init=0.8),
    "depthwise 0": _linear(depthwise=0),
    "eps 0.1": _linear(eps=0.1),
    "load balance 0.01": _linear(load_balance_weight=0.01),
    "router jitter 0.1": _linear(router_jitter=0.1),
    "router switch, exponent 1.5": _linear(router_training="switch", exponent_init=1.5),
}
VARIANTS = LADDER | SOFTMAX
ALL_VARIANTS = VARIANTS | ABLATIONS


def make_config(task: Task, variant: str, seed: int, budget: Budget, data_dir: str) -> Config:
    """The run's config; DiT's feed-forward, so that tokens meet in the token mixer alone."""
    return Config(
        seed=seed,
        model=ModelConfig(
            image_size=task.image_size,
            channels=task.channels,
            patch_size=task.patch_size,
            num_classes=10,
            depth=budget.depth,
            width=budget.width,
            scan_layers=task.scan_layers,
            attention=ALL_VARIANTS[variant],
            feedforward=FeedForwardConfig(kind="mlp"),
        ),
        data=DataConfig(
            source=task.source,
            data_dir=data_dir,
            batch_size=budget.batch_size,
            horizontal_flip=task.flip,
            read_threads=1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=budget.learning_rate,
            warmup_steps=budget.warmup_steps,
            clip_norm=1.0,
            ema_decay=0.99,
        ),
        train=TrainConfig(steps=budget.steps),
        sampling=SamplingConfig(steps=20, guidance_scale=1.0, batch_size=250),
    )


def stack(source: Source, indices: Sequence[int]) -> ArraySource:
    """These examples of a source, in memory."""
    examples = [source[i] for i in indices]
    return ArraySource(
        np.stack([example["image"] for example in examples]),
        np.asarray([example["label"] for example in examples], np.int32),
        tuple(source.label_names),
    )


def load_split(task: Task, data_dir: str) -> tuple[Source, ArraySource]:
    """The images to train on, and those held out: of the split `test`, where there is one."""
    data = DataConfig(source=task.source, data_dir=data_dir)
    sizes = {"image_size": task.image_size, "channels": task.channels}
    source = load_images(data, **sizes)
    rng = np.random.default_rng(SPLIT_SEED)
    if isinstance(source, ArraySource):
        order = rng.permutation(len(source)).tolist()
        return stack(source, order[task.held :]), stack(source, order[: task.held])
    test = load_images(dataclasses.replace(data, split="test"), **sizes)
    return source, stack(test, rng.permutation(len(test))[: task.held].tolist())
