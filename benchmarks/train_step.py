"""Time forward and backward of DyDi-LiT, LiT, a SANA-like network and DiT of one size, alternating.

    python -m benchmarks.train_step [--depth 2 --width 384 --tokens 256 1024 4096]
    python -m benchmarks.train_step --torch      # DiT-S/2 against diffusers' DiTTransformer2DModel

The first prints milliseconds and ratios to DiT at each number of tokens and draws them to --plot.
The second needs torch and diffusers, and compares 12 layers of width 384 in float32 on one machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dydilit_jax.models.config import AttentionConfig, FeedForwardConfig, ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT

Call = Callable[[], Any]


def networks(width: int) -> dict[str, dict[str, Any]]:
    """The token and channel mixers that are compared, by name, as fields of ModelConfig."""
    few, many = max(width // 192, 1), max(width // 64, 1)  # heads, as the size table has them
    mix, mlp = FeedForwardConfig(kind="mix"), FeedForwardConfig(kind="mlp")
    sana = AttentionConfig(kind="relu", heads=max(width // 32, 1), depthwise=0)
    return {
        "DyDi-LiT": {"attention": AttentionConfig(kind="dydila", heads=few), "feedforward": mix},
        "LiT": {"attention": AttentionConfig(kind="relu", heads=few), "feedforward": mlp},
        "SANA-like": {"attention": sana, "feedforward": mix},
        "DiT": {
            "attention": AttentionConfig(kind="softmax", heads=many, depthwise=0),
            "feedforward": mlp,
        },
    }


def gradient_call(config: ModelConfig, batch: int, out_channels: int | None = None) -> Call:
    """Compiles forward and backward of a mean square; the call runs it once and waits."""
    module = DyDiLiT(config, out_channels, rngs=nnx.Rngs(0))
    graph, parameters = nnx.split(module)
    rng = np.random.default_rng(0)
    # Not the initial zeros, with which half of the network would have no gradient.
    parameters = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype),
        nnx.to_pure_dict(parameters),
    )
    shape = (batch, config.image_size, config.image_size, config.channels)
    images = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    times = jnp.asarray(rng.uniform(0, 1000, batch), jnp.float32)
    labels = jnp.asarray(rng.integers(0, config.num_classes, batch), jnp.int32)

    @jax.jit
    def gradients(parameters: Any, images: jax.Array) -> Any:
        def loss(parameters: Any) -> jax.Array:
            output, _ = nnx.merge(graph, parameters)(images, times, labels)
            return jnp.mean(output * output)

        return jax.value_and_grad(loss)(parameters)

    return lambda: jax.block_until_ready(gradients(parameters, images))


def torch_call(batch: int) -> Call:
    """The same of diffusers' DiT-S/2 in PyTorch, as many threads as it takes by itself."""
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        dropout=0.0,
    )
    images = torch.randn(batch, 4, 32, 32)
    times = torch.randint(0, 1000, (batch,))
    labels = torch.randint(0, 1000, (batch,))

    def call() -> None:
        network.zero_grad(set_to_none=True)
        output = network(images, timestep=times, class_labels=labels).sample
        output.square().mean().backward()

    return call


def alternating(
    calls: dict[str, Call],
    seconds: float,
    least: int = 3,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Times the calls in turn, for about so many seconds; two turns before are not counted."""
    for _ in range(2):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def compare_sizes(options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Median seconds of every network at every number of tokens."""
    medians: dict[str, dict[int, float]] = {}
    for tokens in options.tokens:
        side = round(tokens**0.5)
        if side * side != tokens:
            raise SystemExit(f"--tokens {tokens} is not the square of a number of rows")
        batch = max(options.total_tokens // tokens, 1)
        calls = {}
        for name, fields in networks(options.width).items():
            config = ModelConfig(
                image_size=2 * side,
                depth=options.depth,
                width=options.width,
                dtype=options.dtype,
                **fields,
            )
            calls[name] = gradient_call(config, batch)
        measured = {
            name: float(np.median(values))
            for name, values in alternating(calls, options.seconds).items()
        }
        print(f"{tokens} tokens, batch {batch}")
        for name, seconds in measured.items():
            medians.setdefault(name, {})[tokens] = seconds
            print(
                f"  {name:<10}{1e3 * seconds:10.1f} ms{batch / seconds:10.2f} images/s, "
                f"{measured['DiT'] / seconds:6.2f} times DiT's rate",
                flush=True,
            )
    return medians


def compare_torch(options: argparse.Namespace) -> dict[str, float]:
    """Images per second of our DiT-S/2 and of PyTorch's."""
    import diffusers
    import torch

    config = ModelConfig(
        attention=AttentionConfig(kind="softmax", heads=6, depthwise=0),
        feedforward=FeedForwardConfig(kind="mlp"),
    )
    batch = options.batch
    calls = {"ours": gradient_call(config, batch, 8), "PyTorch": torch_call(batch)}
    times = alternating(calls, options.seconds)
    rates = {name: batch / float(np.median(values)) for name, values in times.items()}
    ratios = np.array(times["PyTorch"]) / np.array(times["ours"])
    print(f"DiT-S/2, forward and backward, float32, batch {batch}; PyTorch {torch.__version__}, ")
    print(f"diffusers {diffusers.__version__}, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        print(f"  {name:<10}{rate:8.2f} images/s")
    print(
        f"  ours / PyTorch: {np.median(ratios):.2f} "
        f"(turn by turn {ratios.min():.2f} to {ratios.max():.2f}, {len(ratios)} turns)"
    )
    return rates


def plot(medians: dict[str, dict[int, float]], options: argparse.Namespace) -> None:
    """Draws time per image against tokens to --plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4))
    for name, by_tokens in medians.items():
        batches = [max(options.total_tokens // tokens, 1) for tokens in by_tokens]
        each = [1e3 * s / b for s, b in zip(by_tokens.values(), batches, strict=True)]
        axes.plot(list(by_tokens), each, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms an image")
    axes.set_title(f"forward and backward, {options.depth} layers of {options.width}")
    axes.set_xticks(options.tokens, [str(tokens) for tokens in options.tokens])
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(options.plot, dpi=150)
    print(f"wrote {options.plot}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="store_true", help="compare with PyTorch's DiT-S/2")
    parser.add_argument("--batch", type=int, default=8, help="images, with --torch")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--total_tokens", type=int, default=4096, help="tokens in a batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing at each size")
    parser.add_argument("--plot", type=Path, help="draw time per image to this file")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    device = jax.devices()[0].device_kind
    print(f"device {device}, JAX {jax.__version__}, {options.dtype}")
    if options.torch:
        record: Any = compare_torch(options)
    else:
        record = compare_sizes(options)
        if options.plot is not None:
            plot(record, options)
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
