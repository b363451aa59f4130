"""Where a CPU's time goes in a block of DiT-S/2, part by part, and what PyTorch needs for the same.

    python -m benchmarks.cpu_parts [--batch 8 --repeats 15]

Forward and gradients in float32, 256 tokens of width 384, 6 heads. Each part is timed as the
network has it, then in variants that tell what slows it; the last rows are PyTorch's, where torch
is installed. Products of matrices alone set the floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import alternating_medians

TOKENS, WIDTH, HEADS = 256, 384, 6
HEAD = WIDTH // HEADS
Function = Callable[..., jax.Array]


def with_gradients(function: Function) -> Callable[..., Any]:
    """Gradients of all arguments but the last, which is that of the output."""
    return lambda *arguments: jax.vjp(function, *arguments[:-1])[1](arguments[-1])


def mlp(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ first, approximate=True) @ second


def mlp_of_rows(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """As the network has it: tokens on one axis."""
    return mlp(x.reshape(-1, WIDTH), first, second).reshape(x.shape)


def products(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    rows = x.reshape(-1, WIDTH)
    return ((rows @ first) @ second).reshape(x.shape)


def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """As the network has it."""
    return jax.nn.dot_product_attention(query, key, value)


def attention_by_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """The same, with heads moved to the front before the products."""
    q, k, v = (x.transpose(0, 2, 1, 3).reshape(-1, TOKENS, HEAD) for x in (query, key, value))
    weights = jax.nn.softmax(jnp.einsum("bnd,bmd->bnm", q, k) / HEAD**0.5, axis=-1)
    mixed = jnp.einsum("bnm,bmd->bnd", weights, v).reshape(-1, HEADS, TOKENS, HEAD)
    return mixed.transpose(0, 2, 1, 3)


def attention_products(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Its products alone, (B H, N, d): no softmax, nothing moved."""
    weights = jnp.einsum("bnd,bmd->bnm", query, key)
    return jnp.einsum("bnm,bmd->bnd", weights, value)


def torch_times(arrays: dict[str, np.ndarray], repeats: int) -> dict[str, float]:
    """Median seconds of PyTorch's MLP and attention; empty where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    import time

    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}

    def mlp_() -> Any:
        hidden = torch.nn.functional.gelu(tensors["x"] @ tensors["first"], approximate="tanh")
        return hidden @ tensors["second"]

    def attention_() -> Any:
        q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    medians = {}
    for name, call in {"MLP": mlp_, "attention": attention_}.items():
        seconds = []
        for _ in range(repeats + 2):
            start = time.perf_counter()
            output = call()
            output.backward(torch.ones_like(output))
            seconds.append(time.perf_counter() - start)
        medians[name] = float(np.median(seconds[2:]))
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    rng = np.random.default_rng(0)

    def array(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-2] ** 0.5).astype(np.float32)

    batch = options.batch
    names = ("query", "key", "value")
    arrays = {name: array(batch, TOKENS, HEADS, HEAD) for name in names}
    arrays |= {"x": array(batch, TOKENS, WIDTH), "first": array(WIDTH, 4 * WIDTH)}
    arrays |= {"second": array(4 * WIDTH, WIDTH)}
    feed = [jnp.asarray(arrays[name]) for name in ("x", "first", "second", "x")]
    mix = [jnp.asarray(arrays[name]) for name in (*names, "value")]
    flat = [x.transpose(0, 2, 1, 3).reshape(-1, TOKENS, HEAD) for x in mix]
    parts: list[tuple[str, dict[str, Function], list[jax.Array]]] = [
        (
            "MLP",
            {"ours": mlp_of_rows, "tokens on two axes": mlp, "its products alone": products},
            feed,
        ),
        ("attention", {"ours": attention, "heads moved first": attention_by_heads}, mix),
        ("attention", {"its products alone": attention_products}, flat),
    ]
    torch_medians = torch_times(arrays, options.repeats)
    print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}, batch {batch}, float32")
    for part, functions, arguments in parts:
        times = alternating_medians(
            {name: with_gradients(function) for name, function in functions.items()},
            arguments,
            options.repeats,
        )
        for name, seconds in times.items():
            print(f"{part:10s} {name:20s} {1e3 * seconds:8.1f} ms")
    for part, seconds in torch_medians.items():
        print(f"{part:10s} {'PyTorch':20s} {1e3 * seconds:8.1f} ms")


if __name__ == "__main__":
    main()
