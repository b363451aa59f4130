"""A small classifier of a data set, whose features small images are compared by.

Its Frechet distance is `classifier_frechet`, and is not FID: the network is trained here, on the
images that samples are compared with, and numbers of two classifiers cannot be compared. So it is
trained once, and kept beside the reference with its checksum.

Stride-2 convolutions down to 4 x 4 places, one more, and the mean over places: the features.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dydilit_jax.data.sources import Source
from dydilit_jax.drawing import to_uint8
from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.pixels import check_small, levels_of

WIDTHS = (32, 64, 128, 128)
FEATURES = 64
LAST_SIDE = 4
STEPS, BATCH_SIZE = 800, 128
LEARNING_RATE, WEIGHT_DECAY, WARMUP_SHARE = 3e-3, 0.05, 0.1
HELD_OUT = 10  # every tenth image says how good it is, and is not trained on
PREDICTED_AT_ONCE = 500
FORMAT = 1


class Network(nnx.Module):
    """The classifier; images (B, H, W, C) in [-1, 1] to logits (B, K)."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs):
        side, channels = max(image_shape[:2]), image_shape[-1]
        convolutions: list[nnx.Conv] = []
        norms: list[nnx.LayerNorm] = []
        for width in WIDTHS:
            if side <= LAST_SIDE and convolutions:
                break
            convolutions.append(nnx.Conv(channels, width, (3, 3), strides=2, rngs=rngs))
            norms.append(nnx.LayerNorm(width, rngs=rngs))
            side, channels = -(-side // 2), width
        convolutions.append(nnx.Conv(channels, FEATURES, (3, 3), rngs=rngs))
        norms.append(nnx.LayerNorm(FEATURES, rngs=rngs))
        self.convolutions, self.norms = nnx.List(convolutions), nnx.List(norms)
        self.head = nnx.Linear(FEATURES, num_classes, rngs=rngs)

    def features(self, images: jax.Array) -> jax.Array:
        """(B, FEATURES) of images (B, H, W, C) in [-1, 1]."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.gelu(norm(convolution(x)))
        return x.mean(axis=(1, 2))

    def __call__(self, images: jax.Array) -> jax.Array:
        """(B, K) of images (B, H, W, C) in [-1, 1]."""
        return self.head(self.features(images))


class Classifier:
    """A trained classifier as a network of features (features.Extractor).

    Args:
      parameters: nested dicts of float32 arrays.
      image_shape: (H, W, C) of the images.
      num_classes: K.
      accuracy: on the images that were held out.
    """

    name = "classifier"
    width = FEATURES
    spatial_width = 0

    def __init__(
        self,
        parameters: Any,
        image_shape: tuple[int, int, int],
        num_classes: int,
        accuracy: float,
    ):
        self.parameters, self.image_shape = parameters, image_shape
        self.num_classes, self.accuracy = num_classes, accuracy
        self.checksum = _digest(_flat(parameters))
        height, width, channels = image_shape
        self.description = (
            f"classifier of {num_classes} classes of images {height} x {width} x {channels}, "
            f"trained here, {accuracy:.1%} right on held-out images"
        )
        self._graph = _structure(image_shape, num_classes)[0]

    def apply(self, parameters: Any, images: jax.Array) -> Features:
        """Features (n, 64) and logits (n, K) of images (n, H, W, C)."""
        module = nnx.merge(self._graph, parameters)
        features = module.features(levels_of(images, self.image_shape) / 127.5 - 1.0)
        return Features(features, logits=module.head(features))


def load_classifier(path: Path, image_shape: tuple[int, int, int]) -> Classifier:
    """A classifier that `train_classifier` wrote.

    Raises:
      UserError: no such file, a damaged one, one of another program, or of other images.
    """
    try:
        with safe_open(path, "numpy") as file:
            fields = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(fields.get("classifier", "{}"))
        if described.get("format") != FORMAT:
            raise UserError(f"{str(path)!r} is no classifier of ours: delete it, it is made again")
        shape, num_classes = tuple(described["image_shape"]), described["num_classes"]
    except FileNotFoundError:
        raise UserError(f"there is no classifier {str(path)!r}") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"classifier {str(path)!r} is damaged ({error}): delete it") from error
    if _digest(arrays) != described["sha256"]:
        raise UserError(f"classifier {str(path)!r} was changed since it was written: delete it")
    if shape != tuple(image_shape):
        raise UserError(
            f"classifier {str(path)!r} is of images {shape}, these are {tuple(image_shape)}"
        )
    parameters = _structure(shape, num_classes)[1]
    filled = jax.tree_util.tree_map_with_path(lambda key, _: arrays[_name(key)], parameters)
    return Classifier(filled, shape, num_classes, described["accuracy"])


def train_classifier(
    source: Source,
    path: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int], object] = lambda steps: None,
) -> Classifier:
    """Trains a classifier on a source's images, all but every tenth, and writes it to a file.

    The same images, seed and machine give the same file, byte for byte.

    Args:
      source: labelled images, at most LARGEST_SIDE pixels a side.
      path: a .safetensors to write; it appears whole or not at all.
      seed: of the initial parameters and of the order of images.
      steps: of BATCH_SIZE images.
      progress: told of every step.

    Raises:
      UserError: images that are too large, or too few to hold some out.
    """
    height, width, channels = source.image_shape
    shape, num_classes = (height, width, channels), len(source.label_names)
    check_small("classifier", shape)
    if len(source) < 2 * HELD_OUT:
        raise UserError(f"{len(source)} images are too few for a classifier")
    images, labels = read_pixels(source)
    held_out = np.arange(len(images)) % HELD_OUT == HELD_OUT - 1
    parameters = _train(images[~held_out], labels[~held_out], num_classes, seed, steps, progress)
    predict = _predictor(shape, num_classes)
    tested = images[held_out]
    predicted = np.concatenate(
        [
            np.asarray(predict(parameters, tested[start : start + PREDICTED_AT_ONCE]))
            for start in range(0, len(tested), PREDICTED_AT_ONCE)
        ]
    )
    accuracy = float(np.mean(predicted == labels[held_out]))
    classifier = Classifier(parameters, shape, num_classes, accuracy)
    _save(path, classifier)
    return classifier


def read_pixels(source: Source, threads: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source (n, H, W, C) uint8, and their labels (n,) int32."""
    with ThreadPoolExecutor(threads) as pool:
        examples = list(
            pool.map(
                lambda index: (to_uint8(source[index]["image"]), int(source[index]["label"])),
                range(len(source)),
            )
        )
    images, labels = zip(*examples, strict=True)
    return np.stack(images), np.asarray(labels, np.int32)


def _structure(image_shape: tuple[int, int, int], num_classes: int) -> tuple[Any, Any]:
    """Flax's description of the network, and its parameters' shapes as nested dicts."""
    module = nnx.eval_shape(lambda: Network(image_shape, num_classes, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def _train(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    seed: int,
    steps: int,
    progress: Callable[[int], object],
) -> Any:
    """Parameters after so many steps of AdamW with a cosine schedule, as numpy arrays."""
    graph, state = nnx.split(Network(images.shape[1:], num_classes, rngs=nnx.Rngs(seed)))
    parameters = nnx.to_pure_dict(state)
    warmup = max(1, round(WARMUP_SHARE * steps))
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    def loss(parameters: Any, pixels: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, parameters)(_normalized(pixels))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(parameters: Any, moments: Any, pixels: jax.Array, labels: jax.Array) -> tuple:
        gradients = jax.grad(loss)(parameters, pixels, labels)
        updates, moments = optimizer.update(gradients, moments, parameters)
        return optax.apply_updates(parameters, updates), moments

    moments = optimizer.init(parameters)
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        while len(order) < BATCH_SIZE:
            order = np.concatenate([order, rng.permutation(len(images))])
        batch, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        parameters, moments = step(parameters, moments, images[batch], labels[batch])
        progress(1)
    return jax.device_get(parameters)


def _predictor(image_shape: tuple[int, int, int], num_classes: int) -> Callable:
    graph = _structure(image_shape, num_classes)[0]
    return jax.jit(
        lambda parameters, pixels: jnp.argmax(
            nnx.merge(graph, parameters)(_normalized(pixels)), axis=-1
        )
    )


def _normalized(pixels: jax.Array) -> jax.Array:
    return pixels.astype(jnp.float32) / 127.5 - 1.0


def _name(key: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _flat(parameters: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return {_name(key): np.asarray(leaf) for key, leaf in leaves}


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 of the parameters' names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _save(path: Path, classifier: Classifier) -> None:
    described = {
        "format": FORMAT,
        "image_shape": classifier.image_shape,
        "num_classes": classifier.num_classes,
        "accuracy": classifier.accuracy,
        "sha256": classifier.checksum,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix="." + path.name)
    os.close(descriptor)
    # One entry: safetensors writes several in any order, and the same file is to come out.
    save_file(_flat(classifier.parameters), name, {"classifier": json.dumps(described)})
    Path(name).chmod(0o644)
    Path(name).replace(path)
