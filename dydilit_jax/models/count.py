"""Parameters and multiply-adds of a network, without allocating it.

Multiply-adds are what the literature on diffusion transformers calls "Gflops" (DiT, table 1): one
for each product that enters a sum. Norms, activations and the measure kernel's powers do not count.
"""

from __future__ import annotations

import functools

import jax
from flax import nnx

from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.dydilit import DyDiLiT, parameter_count
from dydilit_jax.models.embeddings import FREQUENCIES


@functools.lru_cache(maxsize=32)
def abstract_parameters(config: ModelConfig, out_channels: int | None = None) -> dict:
    """The tree of parameters as shapes and dtypes: nested dicts of jax.ShapeDtypeStruct."""
    model = nnx.eval_shape(lambda: DyDiLiT(config, out_channels, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.split(model)[1])


def count_parameters(config: ModelConfig, out_channels: int | None = None) -> int:
    """Number of trained parameters (DiT's counts also hold its fixed position table)."""
    return parameter_count(abstract_parameters(config, out_channels))


def attention_multiply_adds(config: ModelConfig, *, every_projector: bool = False) -> int:
    """Multiply-adds of one token mixer for one image."""
    attention = config.attention
    tokens, width = config.tokens, config.width
    square = tokens * width * width
    total = 4 * square + attention.depthwise**2 * tokens * width
    if attention.kind == "softmax":
        return total + 2 * tokens * tokens * width
    total += 2 * tokens * width * (width // attention.heads)
    if attention.normalizer in ("base", "signed"):
        total += tokens * width
    if attention.kind != "dydila":
        return total
    tensors = 4 if attention.projectors else 2
    if attention.exponents > 1:
        total += tensors * tokens * width * attention.exponents
    if attention.projectors:
        computed = attention.projectors if every_projector else 1
        total += 2 * computed * square
        if attention.projectors > 1:
            total += 2 * tokens * width * attention.projectors
        if attention.lambdas > 1:
            total += 2 * tokens * (2 * width) * attention.lambdas
    return total


def feedforward_multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of one channel mixer for one image."""
    hidden = config.feedforward.hidden(config.width)
    if config.feedforward.kind == "mlp":
        return 2 * config.tokens * config.width * hidden
    return config.tokens * (3 * config.width * hidden + 9 * 2 * hidden)


def multiply_adds(
    config: ModelConfig, out_channels: int | None = None, *, every_projector: bool = False
) -> dict[str, int]:
    """Multiply-adds of one forward pass for one image, by part; their sum is the network's.

    Args:
      config: the network.
      out_channels: as for DyDiLiT.
      every_projector: count all n_P projectors of a bank (the dense form) and not only the routed.
    """
    tokens, width, depth = config.tokens, config.width, config.depth
    patch = config.patch_size**2
    return {
        "embeddings": tokens * patch * config.channels * width + (FREQUENCIES + width) * width,
        "attention": depth * attention_multiply_adds(config, every_projector=every_projector),
        "feedforward": depth * feedforward_multiply_adds(config),
        "modulation": depth * 6 * width * width + 2 * width * width,
        "final": tokens * width * patch * (out_channels or config.channels),
    }


def parameter_table(parameters: dict) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Rows (path, shape, dtype, count) of a tree of arrays or shapes, in order of path."""
    leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
    return [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            tuple(leaf.shape),
            str(leaf.dtype),
            parameter_count(leaf),
        )
        for path, leaf in leaves
    ]
