"""Are the weights of linear attention over-smoothed, and what does DyDiLA change about it?

    python -m benchmarks.oversmoothing --out runs/ladder --task digits

Takes the networks that `python -m benchmarks.ladder` trained and feeds them held-out images with
the same noise at several times. For every layer it forms the explicit N x N matrix A of the
attention, the output of which is A V (without the depthwise term and before the last projection):

    entropy          of a row as a distribution p_m = |A_im| / sum |A_im|, over log N: 1 is uniform
    effective rank   exp of the entropy of A's normalised singular values (Roy and Vetterli 2007),
                     over N: 1 / N when all rows are alike
    negative         share of a row's absolute weight that is negative
    row weight       the sum |A_im| over m that 99% of all rows stay below: 1 where weights are
                     positive and normalised; the differential's rows have no bound
    token similarity mean cosine between two tokens that the token mixer puts out, depthwise term
                     and last projection included: 1 when all tokens are alike

Writes a JSON, a plot of these by layer and by time, and pictures of rows of A.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.ladder import Job
from benchmarks.ladder_report import mean_and_error
from benchmarks.ladder_variants import ALL_VARIANTS, TASKS, VARIANTS, load_split
from dydilit_jax.diffusion.flow import RectifiedFlow
from dydilit_jax.kernels.dydila.features import CoreInputs, Exponents
from dydilit_jax.kernels.dydila.reference import attention_weights
from dydilit_jax.kernels.rotary import rotate
from dydilit_jax.models.attention.dydila import DyDiLA
from dydilit_jax.models.attention.linear import LinearAttention
from dydilit_jax.models.attention.projections import Context, Telemetry
from dydilit_jax.models.attention.softmax import SoftmaxAttention
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT, layer_norm, modulate
from dydilit_jax.models.pretrained import load_pretrained

MEASURES = ("entropy", "effective_rank", "negative", "row_weight", "token_similarity")
NOISE_SEED = 4
SHOWN_HEADS = 2


def explicit_weights(mixer: nnx.Module, x: jax.Array, context: Context) -> jax.Array:
    """The matrix A (B, H, N, N) of a token mixer for its input x (B, N, D)."""
    if isinstance(mixer, DyDiLA):
        return attention_weights(mixer.core_inputs(x, context)[0], mixer.options)
    assert isinstance(mixer, LinearAttention | SoftmaxAttention)
    query, key, value = mixer.qkv(x)
    if isinstance(mixer, LinearAttention):
        fixed = None if mixer.exponent is None else jnp.float32(mixer.exponent)
        exponents = None if fixed is None else Exponents(query=fixed, key=fixed)
        inputs = CoreInputs(query, key, value, exponents=exponents, rotation=context.rotation)
        return attention_weights(inputs, mixer.options)
    shape = (*x.shape[:2], mixer.heads, x.shape[-1] // mixer.heads)
    q, k = query.reshape(shape), key.reshape(shape)
    if context.rotation is not None:
        q, k = rotate(q, context.rotation), rotate(k, context.rotation)
    logits = jnp.einsum("bnhd,bmhd->bhnm", q, k) / shape[-1] ** 0.5
    return jax.nn.softmax(logits, axis=-1)


def row_entropy(weights: jax.Array) -> jax.Array:
    """Entropy of each row of absolute weights (..., N, N) over log N: (..., N)."""
    absolute = jnp.abs(weights)
    share = absolute / jnp.maximum(jnp.sum(absolute, axis=-1, keepdims=True), 1e-30)
    terms = jnp.where(share > 0.0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)
    return -jnp.sum(terms, axis=-1) / jnp.log(weights.shape[-1])


def effective_rank(weights: jax.Array) -> jax.Array:
    """Effective rank of matrices (..., N, N) over N: (...)."""
    values = jnp.linalg.svd(weights, compute_uv=False)
    share = values / jnp.sum(values, axis=-1, keepdims=True)
    terms = jnp.where(share > 0.0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0)
    return jnp.exp(-jnp.sum(terms, axis=-1)) / weights.shape[-1]


def negative_share(weights: jax.Array) -> jax.Array:
    """Share of each row's absolute weight that is negative: (..., N, N) to (..., N)."""
    absolute = jnp.maximum(jnp.sum(jnp.abs(weights), axis=-1), 1e-30)
    return jnp.sum(jnp.maximum(-weights, 0.0), axis=-1) / absolute


def token_similarity(tokens: jax.Array) -> jax.Array:
    """Mean cosine between two different tokens of (B, N, D): (B,)."""
    lengths = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    unit = tokens / jnp.maximum(lengths, 1e-12)
    count = tokens.shape[1]
    total = jnp.sum(jnp.square(jnp.sum(unit, axis=1)), axis=-1)
    return (total - count) / (count * (count - 1))


class ObservedDyDiLiT(DyDiLiT):
    """The network, whose telemetry is what its token mixers do, with a leading axis of layers."""

    def run_blocks(
        self, x: jax.Array, condition: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Telemetry]:
        """Tokens (B, N, D) through all blocks, with each layer's weights and measures."""
        graph, layers = nnx.split(self.blocks)
        context = Context(self.rotation(), key)
        observed = []
        for layer in range(self.config.depth):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=layer: leaf[i], layers))
            shift, scale = block.modulation(condition)[:2]
            read = modulate(layer_norm(x), shift, scale)
            weights = explicit_weights(block.attention, read, context)
            mixed, _ = block.attention(read, context)
            observed.append(
                {
                    "weights": weights,
                    "entropy": jnp.mean(row_entropy(weights)),
                    "effective_rank": jnp.mean(effective_rank(weights)),
                    "negative": jnp.mean(negative_share(weights)),
                    "row_weight": jnp.quantile(jnp.sum(jnp.abs(weights), axis=-1), 0.99),
                    "token_similarity": jnp.mean(token_similarity(mixed)),
                }
            )
            x, _ = block(x, condition, context)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *observed)


@functools.lru_cache(maxsize=4)
def observer(config: ModelConfig) -> Any:
    """Jitted (parameters, images, time, labels) -> (prediction, measures by name)."""
    module = nnx.eval_shape(lambda: ObservedDyDiLiT(config, rngs=nnx.Rngs(0)))
    graph = nnx.split(module)[0]

    @jax.jit
    def observe(
        parameters: Any, images: jax.Array, time: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, Telemetry]:
        return nnx.merge(graph, parameters)(images, time, labels)

    return observe


def observe_run(
    folder: Path, images: np.ndarray, labels: np.ndarray, times: Sequence[float]
) -> tuple[dict[str, list[list[float]]], np.ndarray]:
    """Measures of one trained network.

    Args:
      folder: of its weights.
      images: (B, H, W, C) in [-1, 1].
      labels: (B,).
      times: of the flow, 0 data to 1 noise; the noise is the same at each.

    Returns:
      Each measure as lists (times, layers); and the first image's A, (times, layers, H, N, N).
    """
    config, parameters = load_pretrained(folder)
    observe, process = observer(config), RectifiedFlow()
    noise = jax.random.normal(jax.random.key(NOISE_SEED), images.shape)
    measures: dict[str, list[list[float]]] = {name: [] for name in MEASURES}
    weights = []
    for t in times:
        noisy = process.interpolate(jnp.asarray(images), noise, jnp.float32(t))
        time = jnp.full(len(images), process.time_scale * t)
        _, seen = observe(parameters, noisy, time, jnp.asarray(labels))
        for name in MEASURES:
            measures[name].append(np.asarray(seen[name], np.float64).tolist())
        weights.append(np.asarray(seen["weights"][:, 0]))
    return measures, np.stack(weights)


def plot(results: dict[str, list[dict]], times: Sequence[float], task: str, path: Path) -> None:
    """Draws every measure by layer (mean over times) and by time (mean over layers)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, len(MEASURES), figsize=(18, 7), layout="constrained")
    markers = "osv^<>DPX*"
    for column, name in enumerate(MEASURES):
        for number, (variant, runs) in enumerate(results.items()):
            values = np.asarray([run[name] for run in runs]).mean(axis=0)  # (times, layers)
            style = {"marker": markers[number % len(markers)], "ms": 5, "label": variant}
            layers = np.arange(1, values.shape[1] + 1)
            grid[0, column].plot(layers, values.mean(axis=0), **style)
            grid[1, column].plot(times, values.mean(axis=1), **style)
        grid[0, column].set(title=name.replace("_", " "), xlabel="layer", xticks=layers)
        grid[1, column].set(xlabel="time (0 data, 1 noise)")
        for axes in grid[:, column]:
            axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    seeds = "/".join(str(each) for each in sorted({len(runs) for runs in results.values()}))
    figure.suptitle(f"{task}: attention of trained networks, mean of {seeds} seed(s)")
    figure.savefig(path, dpi=100)


def draw_maps(
    maps: dict[str, np.ndarray], image: np.ndarray, grid: tuple[int, int], title: str, path: Path
) -> None:
    """Draws a row of A of each variant, layer and head (the first SHOWN_HEADS) on the token grid.

    Args:
      maps: A of one image by variant, (layers, H, N, N).
      image: (H, W, C) in [-1, 1], what the networks saw.
      grid: rows and columns of tokens.
      title: of the picture.
      path: to write to.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = grid
    token = (rows // 2) * columns + columns // 2
    maps = {variant: a[:, :SHOWN_HEADS] for variant, a in maps.items()}
    widest = max(a.shape[0] * a.shape[1] for a in maps.values())
    figure, panels = pyplot.subplots(
        len(maps),
        widest + 1,
        figsize=(1.05 * (widest + 2), 1.2 * len(maps)),
        layout="constrained",
        squeeze=False,
    )
    shown = np.clip((image + 1) / 2, 0, 1)
    size = image.shape[0] / rows
    for line, (variant, a) in zip(panels, maps.items(), strict=True):
        for axes in line:
            axes.axis("off")
        line[0].imshow(shown if image.shape[-1] == 3 else shown[..., 0], cmap="gray")
        line[0].plot((columns // 2 + 0.5) * size - 0.5, (rows // 2 + 0.5) * size - 0.5, "r+")
        line[0].set_title(variant, fontsize=7)
        for number in range(a.shape[0] * a.shape[1]):
            layer, head = divmod(number, a.shape[1])
            row = a[layer, head, token].reshape(grid)
            peak = np.abs(row).max()
            line[number + 1].imshow(row, cmap="RdBu_r", vmin=-peak, vmax=peak)
            line[number + 1].set_title(f"layer {layer + 1}, head {head + 1}", fontsize=6)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def table(results: dict[str, list[dict]]) -> str:
    """In markdown, every measure: mean over layers and times, standard error over seeds."""
    lines = ["| variant | " + " | ".join(name.replace("_", " ") for name in MEASURES) + " |"]
    lines.append("|" + "---|" * (len(MEASURES) + 1))
    for variant, runs in results.items():
        cells = []
        for name in MEASURES:
            mean, error = mean_and_error(float(np.mean(run[name])) for run in runs)
            cells.append(f"{mean:.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}"))
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="the ladder's folder")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data_dir", default="", help="tfds's folder, for cifar10")
    parser.add_argument("--variants", nargs="+", choices=ALL_VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--map_time", type=int, default=2, help="index of the time of the maps")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--name", default="", help="of the files; oversmoothing_TASK if empty")
    options = parser.parse_args(arguments)
    _, held = load_split(TASKS[options.task], options.data_dir)
    images, labels = held.images[: options.images], held.labels[: options.images]
    results: dict[str, list[dict]] = {}
    maps = {}
    for variant in options.variants:
        for seed in options.seeds:
            folder = Job(task=options.task, variant=variant, seed=seed).path(options.out)
            if not folder.is_dir():
                print(f"{folder} is not there: left out")
                continue
            measures, weights = observe_run(folder, images, labels, options.times)
            results.setdefault(variant, []).append({"seed": seed, **measures})
            if variant not in maps:
                maps[variant] = weights[options.map_time]
    if not results:
        raise SystemExit(f"error: no networks in {options.out}: run benchmarks.ladder first")
    print(table(results))
    name = options.name or f"oversmoothing_{options.task}"
    record = {"times": options.times, "images": options.images, "runs": results}
    (options.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(results, options.times, options.task, options.docs / f"{name}.png")
    t = options.times[options.map_time]
    noise = np.asarray(jax.random.normal(jax.random.key(NOISE_SEED), images.shape))[0]
    seen = (1.0 - t) * images[0] + t * noise
    side = TASKS[options.task].image_size // TASKS[options.task].patch_size
    draw_maps(
        maps,
        seen,
        (side, side),
        f"{options.task}, time {t:g}: how the marked token weighs all tokens (red +, blue -)",
        options.docs / f"{name}_maps.png",
    )


if __name__ == "__main__":
    main()
