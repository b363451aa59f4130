"""What known changes of real images do to the scores: CIFAR-10 against CIFAR-10.

    python -m benchmarks.metric_shifts --data_dir=DATA                      # random weights
    python -m benchmarks.metric_shifts --data_dir=DATA --weights=FILE.pth   # FID itself

Two halves of as many images, disjoint and balanced in their classes, are compared; then the second
one blurred, with noise, and with a growing share of its images replaced by others of one class. A
distance that can be trusted is near zero for the halves and grows with each step.

Without --weights the network of FID has random weights. Its distances then are in units of their
own and are NOT FIDs: they can be compared within one table of one seed, and with nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from scipy.ndimage import gaussian_filter

from benchmarks.timing import hardware
from dydilit_jax.config import MeshConfig
from dydilit_jax.data.records import RecordSource
from dydilit_jax.drawing import to_uint8
from dydilit_jax.metrics.extractors import load_extractor
from dydilit_jax.metrics.features import Extractor, Features, compile_extractor
from dydilit_jax.metrics.frechet import SingularCovarianceWarning
from dydilit_jax.metrics.inception import Inception, InceptionExtractor
from dydilit_jax.metrics.names import score_name
from dydilit_jax.metrics.scoring import Scorer
from dydilit_jax.metrics.statistics import Reference
from dydilit_jax.training.sharding import make_mesh

SIZE = 32
ONE = 0  # the one class: airplanes
STRENGTHS = {
    "blur": (0.5, 1.0, 2.0),  # standard deviation, pixels
    "noise": (8.0, 16.0, 32.0),  # standard deviation, of 255 levels
    "one class": (0.25, 0.5, 1.0),  # share that is replaced by images of one class
}
SCORES = ("frechet", "spatial_frechet", "kernel", "precision_recall")
COLUMNS = (
    "frechet",
    "spatial_frechet",
    "kernel",
    "kernel_standard_error",
    "precision",
    "recall",
)
UNITS = {"blur": "pixels", "noise": "levels of 255", "one class": "of the images"}


class Images(NamedTuple):
    """Images (n, 32, 32, 3) uint8: two balanced halves, and as many of one class."""

    first: np.ndarray
    second: np.ndarray
    of_one_class: np.ndarray


def random_inception(seed: int) -> InceptionExtractor:
    """The network of FID with random weights that keep the size of activations (He et al. 2015)."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Inception(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if leaf.ndim == 1:
            return np.zeros(leaf.shape, np.float32)
        spread = math.sqrt(2.0 / math.prod(leaf.shape[:-1]))
        return np.float32(spread) * rng.standard_normal(leaf.shape, np.float32)

    nnx.replace_by_pure_dict(state, jax.tree.map(draw, nnx.to_pure_dict(state)))
    extractor = InceptionExtractor(nnx.merge(graph, state), f"seed {seed}")
    extractor.name = "random_inception"
    extractor.description = f"Inception's graph with random weights of seed {seed}, not FID's"
    return extractor


def open_source(data_dir: str) -> RecordSource:
    """CIFAR-10's training set in tfds's folder."""
    return RecordSource("cifar10", data_dir=data_dir, split="train", image_size=SIZE, channels=3)


def choose(source: RecordSource, num: int, seed: int) -> tuple[np.ndarray, ...]:
    """Indices (num,) of two balanced halves and of images of one class, no image twice.

    Args:
      source: of ten classes.
      num: of each set; a multiple of ten.
      seed: of the choice.
    """
    rng = np.random.default_rng(seed)
    labels = source.read_labels()
    classes = len(source.label_names)
    each = num // classes
    by_class = [rng.permutation(np.flatnonzero(labels == label)) for label in range(classes)]
    return (
        np.concatenate([places[:each] for places in by_class]),
        np.concatenate([places[each : 2 * each] for places in by_class]),
        by_class[ONE][2 * each : 2 * each + num],
    )


def load_images(data_dir: str, num: int, seed: int) -> Images:
    """The images that `choose` chooses."""
    source = open_source(data_dir)
    return Images(
        *(
            np.stack([to_uint8(source[int(i)]["image"]) for i in indices])
            for indices in choose(source, num, seed)
        )
    )


def blurred(images: np.ndarray, sigma: float) -> np.ndarray:
    """Images (n, H, W, C) uint8 after a Gaussian of so many pixels."""
    smooth = gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))
    return np.round(smooth).astype(np.uint8)


def noisy(images: np.ndarray, deviation: float, seed: int) -> np.ndarray:
    """Images (n, H, W, C) uint8 with normal noise of so many levels."""
    noise = deviation * np.random.default_rng(seed).standard_normal(images.shape, np.float32)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def imbalance(count: int, share: float, seed: int) -> np.ndarray:
    """Which of (second, of one class) joined make a set of `count` with that share of one class."""
    order = np.random.default_rng(seed).permutation(count)
    replaced = order[: round(share * count)]
    chosen = np.arange(count)
    chosen[replaced] += count
    return chosen


def measure(
    images: Images,
    extractor: Extractor,
    batch: int,
    seed: int,
    strengths: Mapping[str, Sequence[float]] = STRENGTHS,
    wanted: Sequence[str] = SCORES,
) -> tuple[list[dict[str, Any]], float]:
    """The scores of every set against the first half, and images a second of the network."""
    mesh = make_mesh(MeshConfig())
    extract = compile_extractor(extractor, mesh)
    batch = -(-batch // mesh.size) * mesh.size
    seen, seconds = 0, 0.0

    def features(images: np.ndarray) -> Features:
        nonlocal seen, seconds
        start = time.perf_counter()
        parts = [_host(extract(padded)) for padded in _batches(images, batch)]
        joined = _map(lambda *each: np.concatenate(each)[: len(images)], *parts)
        seen, seconds = seen + len(images), seconds + time.perf_counter() - start
        print(f"{seen} images, {seen / seconds:.1f} a second", flush=True)
        return joined

    def scorer_of(found: Features) -> Scorer:
        scorer = Scorer(extractor, scores=wanted)
        scorer.add(found, np.arange(len(found.pool)))
        return scorer

    jax.block_until_ready(extract(next(_batches(images.first, batch))))  # compiles
    reference: Reference = scorer_of(features(images.first)).reference()
    second, one = features(images.second), features(images.of_one_class)
    both = _map(lambda *each: np.concatenate(each), second, one)

    def sets() -> Iterator[tuple[str, float, Features]]:
        yield "halves", 0.0, second
        for sigma in strengths["blur"]:
            yield "blur", sigma, features(blurred(images.second, sigma))
        for deviation in strengths["noise"]:
            yield "noise", deviation, features(noisy(images.second, deviation, seed))
        for share in strengths["one class"]:
            chosen = imbalance(len(images.second), share, seed)
            yield "one class", share, _map(lambda each, chosen=chosen: each[chosen], both)

    rows = []
    for shift, strength, found in sets():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SingularCovarianceWarning)
            scores = scorer_of(found).scores(reference, mesh)
        named = {name: score_name(extractor.name, name) for name in COLUMNS}
        values = {name: scores[key] for name, key in named.items() if key in scores}
        rows.append({"shift": shift, "strength": strength, **values})
        print(rows[-1], flush=True)
    return rows, seen / seconds


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of one size; the last is filled up."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])


def _host(features: Features) -> Features:
    """What the scores here need of features, as numpy arrays."""
    return Features(*(np.asarray(each) for each in (features.pool, features.spatial)))  # type: ignore[arg-type]


def _map(function: Callable[..., np.ndarray], *features: Features) -> Features:
    """What a function makes of the pool features, and of the spatial ones."""
    pool, spatial = (function(*each) for each in zip(*(each[:2] for each in features), strict=True))
    return Features(pool, spatial)  # type: ignore[arg-type]


def line(row: dict[str, Any]) -> str:
    """A line of a markdown table."""
    strength = f" {row['strength']:g} {UNITS[row['shift']]}" if row["shift"] in UNITS else ""
    return (
        f"| {row['shift']}{strength} | {row['frechet']:.4g} | {row['spatial_frechet']:.4g} "
        f"| {row['kernel']:.3g} +- {row['kernel_standard_error']:.1g} "
        f"| {row['precision']:.3f} | {row['recall']:.3f} |"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table of all."""
    head = (
        "| second set | Frechet distance | spatial Frechet | kernel distance | precision | recall |"
    )
    return "\n".join([head, "|---|--:|--:|--:|--:|--:|", *map(line, rows)])


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws every score over the strength of each shift; the halves are strength 0."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    halves = rows[0]
    figure, grid = pyplot.subplots(3, 3, figsize=(10, 7.5), layout="constrained", sharey="row")
    for column, (shift, unit) in zip(grid.T, UNITS.items(), strict=True):
        shown = [halves, *(row for row in rows if row["shift"] == shift)]
        x = [row["strength"] for row in shown]

        def values(name: str, shown: list[dict[str, Any]] = shown) -> list[float]:
            return [row[name] for row in shown]

        column[0].plot(x, values("frechet"), "o-", label="pool (FID's features)")
        column[0].plot(x, values("spatial_frechet"), "s--", label="spatial (sFID's)")
        column[1].errorbar(x, values("kernel"), yerr=values("kernel_standard_error"), fmt="o-")
        column[2].plot(x, values("precision"), "o-", label="precision")
        column[2].plot(x, values("recall"), "s--", label="recall")
        column[0].set(title=shift, yscale="log")
        column[1].set_yscale("symlog", linthresh=max(abs(halves["kernel"]), 1e-12))
        column[2].set(xlabel=f"strength, {unit}", ylim=(-0.03, 1.03))
        for axes in column:
            axes.grid(alpha=0.3)
            axes.set_xticks(x)
    grid[0, 0].set_ylabel("Frechet distance")
    grid[1, 0].set_ylabel("kernel distance")
    grid[2, 0].set_ylabel("share")
    grid[0, 0].legend(loc="upper left")
    grid[2, 0].legend(loc="lower left")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Prints a table, writes it as JSON, draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="tfds's; default: $TFDS_DATA_DIR")
    parser.add_argument("--num", type=int, default=1000, help="images of a set; a multiple of ten")
    parser.add_argument("--weights", default="", help="pytorch-fid's file; default: random weights")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    results = Path("benchmarks/results")
    parser.add_argument("--json", type=Path, default=results / "metric_shifts.json")
    parser.add_argument("--plot", type=Path, default=Path("docs/metric_shifts.png"))
    options = parser.parse_args()
    extractor: Extractor = (
        load_extractor("inception", options.weights)
        if options.weights
        else random_inception(options.seed)
    )
    print(f"{hardware()}, JAX {jax.__version__}; {extractor.description}", flush=True)
    images = load_images(options.data_dir, options.num, options.seed)
    rows, rate = measure(images, extractor, options.batch, options.seed)
    record = {
        "hardware": hardware(),
        "jax": jax.__version__,
        "features": extractor.description,
        "is_fid": bool(options.weights),
        "images_a_set": len(images.first),
        "images_per_second": rate,
        "rows": rows,
    }
    options.json.write_text(json.dumps(record, indent=2) + "\n")
    kind = "FID's weights" if options.weights else "random weights: not FID"
    plot(rows, f"CIFAR-10, {len(images.first)} images a set, {kind}", options.plot)
    print(f"{table(rows)}\n{rate:.1f} images a second\nwrote {options.json}, {options.plot}")


if __name__ == "__main__":
    main()
