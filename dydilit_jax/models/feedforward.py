"""Channel mixers: DiT's two-layer network and SANA's Mix-FFN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.kernels.depthwise.api import depthwise_conv
from dydilit_jax.models.config import ModelConfig
from dydilit_jax.models.linear import Linear, affine
from dydilit_jax.models.placement import is_cut, place

xavier = nnx.initializers.xavier_uniform()


def depthwise_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Uniform in +-1/sqrt(fan in), the fan in of a depthwise kernel being its k x k taps."""
    bound = 1.0 / (shape[0] * shape[1]) ** 0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def convolve(
    tokens: jax.Array,
    grid: tuple[int, int],
    kernel: jax.Array,
    bias: jax.Array,
    prefer: str | None = None,
) -> jax.Array:
    """Depthwise convolution of tokens (B, N, C) that lie row by row on their grid."""
    image = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
    return depthwise_conv(image, kernel, bias, prefer=prefer).reshape(tokens.shape)


class DepthwiseConv(nnx.Module):
    """Depthwise convolution of tokens on their grid, with bias: (B, N, C) to (B, N, C).

    `prefer` is depthwise_conv's: the backend to take where it can run.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        grid: tuple[int, int],
        *,
        prefer: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.grid = grid
        self.prefer = prefer
        self.kernel = nnx.Param(
            depthwise_init(rngs.params(), (size, size, channels), jnp.dtype(jnp.float32))
        )
        self.bias = nnx.Param(jnp.zeros((channels,)))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Convolves tokens (B, N, C), row by row on the grid."""
        return convolve(tokens, self.grid, self.kernel[...], self.bias[...], self.prefer)


class MLP(nnx.Module):
    """GELU (tanh form) between two linear maps, as DiT: (B, N, D) to (B, N, D)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden = config.feedforward.hidden(config.width)
        dtype = jnp.dtype(config.dtype)
        self.hidden = Linear(config.width, hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.out = Linear(hidden, config.width, kernel_init=xavier, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes channels of tokens (B, N, D)."""
        hidden = place(self.hidden(x), "channels")
        return self.out(jax.nn.gelu(hidden, approximate=True))


class MixFFN(nnx.Module):
    """SANA's gated feed-forward with a 3 x 3 depthwise convolution (arXiv 2410.10629).

    SiLU after the first map; the convolution's channels split into value and gate, value first.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        hidden = config.feedforward.hidden(config.width)
        dtype = jnp.dtype(config.dtype)
        self.hidden = Linear(config.width, 2 * hidden, kernel_init=xavier, dtype=dtype, rngs=rngs)
        self.depthwise = DepthwiseConv(2 * hidden, 3, config.grid, rngs=rngs)
        self.out = Linear(
            hidden, config.width, use_bias=False, kernel_init=xavier, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes channels of tokens (B, N, D)."""
        if is_cut("tensor"):
            value, gate = self.halves(x)
        else:
            value, gate = jnp.split(self.depthwise(jax.nn.silu(self.hidden(x))), 2, axis=-1)
        return self.out(value * jax.nn.silu(gate))

    def halves(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Value and gate, each from its own columns, so that a device has the same of both.

        Cut as one, value and gate of a channel would lie on two devices.
        """
        width = self.hidden.out_features // 2
        value, gate = (self._part(x, slice(start, start + width)) for start in (0, width))
        return value, gate

    def _part(self, x: jax.Array, part: slice) -> jax.Array:
        """The channels of one part after map, SiLU and convolution."""
        hidden, conv = self.hidden, self.depthwise
        assert hidden.bias is not None
        columns = affine(x.astype(hidden.dtype), hidden.kernel[..., part], hidden.bias[...][part])
        columns = jax.nn.silu(place(columns, "channels"))
        return convolve(columns, conv.grid, conv.kernel[..., part], conv.bias[...][part])


FEEDFORWARD_MODULES = {"mlp": MLP, "mix": MixFFN}
