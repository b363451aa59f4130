"""SANA's deep-compression autoencoder (DC-AE, arXiv 2410.10733), as diffusers' AutoencoderDC.

Downsampling 32, 32 channels, with the published sizes; deterministic. Convolutional residual blocks
at high resolutions, EfficientViT blocks (arXiv 2205.14756) with ReLU linear attention at several
scales at low ones. Shortcuts without parameters run past every change of resolution: squares of
pixels to channels and means of neighbouring channels on the way down, the inverse on the way up.
Modules have diffusers' names, by which its weights are read.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.autoencoders.interface import Moments
from dydilit_jax.autoencoders.layers import (
    ACTIVATIONS,
    RMSNorm,
    conv,
    group_mean,
    linear,
    pixel_shuffle,
    pixel_unshuffle,
    upsample_nearest,
)

RESIDUAL, EFFICIENT_VIT = "ResBlock", "EfficientViTBlock"
BLOCKS = (RESIDUAL, EFFICIENT_VIT)
DOWNSAMPLES, UPSAMPLES = ("Conv", "pixel_unshuffle"), ("interpolate", "pixel_shuffle")
_SANA_BLOCKS = (RESIDUAL,) * 3 + (EFFICIENT_VIT,) * 3
_SANA_WIDTHS = (128, 256, 512, 512, 1024, 1024)
_SANA_SCALES: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
# Of the linear attention's denominator, small enough to be lost beside any positive one.
ATTENTION_EPSILON = 1e-15


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCConfig:
    """Sizes, under the names of diffusers' config.json; the defaults are SANA's f32 c32.

    Attributes:
      in_channels: of the images.
      latent_channels: of the latents.
      attention_head_dim: width of an attention head.
      encoder_block_types, decoder_block_types: BLOCKS of each resolution, the highest first.
      encoder_block_out_channels, decoder_block_out_channels: width of each resolution.
      encoder_layers_per_block, decoder_layers_per_block: blocks of each resolution.
      encoder_qkv_multiscales, decoder_qkv_multiscales: kernel sizes of the further scales of
        attention at each resolution.
      downsample_block_type: `Conv` (strided) or `pixel_unshuffle` after the convolution.
      upsample_block_type: `interpolate` before the convolution, or `pixel_shuffle` after it.
      encoder_out_shortcut, decoder_in_shortcut: shortcuts past the latents' convolutions.
      decoder_act_fns: activation of the residual blocks of each resolution of the decoder.
      decoder_conv_act_fn: activation before the last convolution.
      scaling_factor: what the latents are multiplied with to have unit variance.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = _SANA_BLOCKS
    decoder_block_types: tuple[str, ...] = _SANA_BLOCKS
    encoder_block_out_channels: tuple[int, ...] = _SANA_WIDTHS
    decoder_block_out_channels: tuple[int, ...] = _SANA_WIDTHS
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SANA_SCALES
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _SANA_SCALES
    downsample_block_type: str = "Conv"
    upsample_block_type: str = "interpolate"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 0.41407


class ResBlock(nnx.Module):
    """Two convolutions with an activation between, a normalisation, a shortcut."""

    def __init__(self, channels: int, activation: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv1 = conv(channels, channels, 3, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels, channels, 3, bias=False, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(channels)
        self._activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        return x + self.norm(self.conv2(ACTIVATIONS[self._activation](self.conv1(x))))


class MultiscaleProjection(nnx.Module):
    """Queries, keys and values of a neighbourhood: a depthwise convolution, then one by heads."""

    def __init__(self, width: int, heads: int, size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        channels = 3 * width
        self.proj_in = conv(
            channels, channels, size, groups=channels, bias=False, dtype=dtype, rngs=rngs
        )
        self.proj_out = conv(
            channels, channels, 1, groups=3 * heads, bias=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, 3 width) to the same."""
        return self.proj_out(self.proj_in(x))


class MultiscaleAttention(nnx.Module):
    """ReLU linear attention over pixels, at the scale of one pixel and of `scales`; a shortcut."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        heads = channels // head_dim
        width = heads * head_dim
        self.to_q = linear(channels, width, bias=False, dtype=dtype, rngs=rngs)
        self.to_k = linear(channels, width, bias=False, dtype=dtype, rngs=rngs)
        self.to_v = linear(channels, width, bias=False, dtype=dtype, rngs=rngs)
        self.to_qkv_multiscale = nnx.List(
            MultiscaleProjection(width, heads, size, dtype=dtype, rngs=rngs) for size in scales
        )
        features = width * (1 + len(scales))
        self.to_out = linear(features, channels, bias=False, dtype=dtype, rngs=rngs)
        self.norm_out = RMSNorm(channels)
        self._head_dim = head_dim

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        qkv = jnp.concatenate([self.to_q(x), self.to_k(x), self.to_v(x)], axis=-1)
        scales = jnp.concatenate(
            [qkv, *(projection(qkv) for projection in self.to_qkv_multiscale)], axis=-1
        )
        # Each three neighbouring runs of head_dim channels are a head's query, key and value. So
        # the weights were trained, though to_q, to_k and to_v do not lie in that order.
        batch, height, width, _ = x.shape
        heads = scales.astype(jnp.float32).reshape(batch, height * width, -1, 3, self._head_dim)
        query, key = jax.nn.relu(heads[..., 0, :]), jax.nn.relu(heads[..., 1, :])
        mixed = linear_attention(query, key, heads[..., 2, :])
        mixed = mixed.reshape(batch, height, width, -1).astype(x.dtype)
        return x + self.norm_out(self.to_out(mixed))


def linear_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """q (sum_n k_n v_n) / (q . sum_n k_n) for each head, all (B, N, H, d) and not negative q, k."""
    highest = jax.lax.Precision.HIGHEST
    state = jnp.einsum("bnhk,bnhv->bhkv", key, value, precision=highest)
    numerator = jnp.einsum("bnhk,bhkv->bnhv", query, state, precision=highest)
    denominator = jnp.einsum("bnhk,bhk->bnh", query, key.sum(axis=1), precision=highest)
    return numerator / (denominator[..., None] + ATTENTION_EPSILON)


class GLUMBConv(nnx.Module):
    """SANA's gated feed-forward with a depthwise convolution, a normalisation, a shortcut."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        hidden = 4 * channels
        self.conv_inverted = conv(channels, 2 * hidden, 1, dtype=dtype, rngs=rngs)
        self.conv_depth = conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden, dtype=dtype, rngs=rngs)
        self.conv_point = conv(hidden, channels, 1, bias=False, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        hidden = self.conv_depth(jax.nn.silu(self.conv_inverted(x)))
        value, gate = jnp.split(hidden, 2, axis=-1)
        return x + self.norm(self.conv_point(value * jax.nn.silu(gate)))


class EfficientViTBlock(nnx.Module):
    """Attention, then feed-forward."""

    def __init__(
        self,
        channels: int,
        head_dim: int,
        scales: tuple[int, ...],
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.attn = MultiscaleAttention(channels, head_dim, scales, dtype=dtype, rngs=rngs)
        self.conv_out = GLUMBConv(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        return self.conv_out(self.attn(x))


class Downsample(nnx.Module):
    """Half the resolution: a convolution, beside it means over squares of pixels as channels."""

    def __init__(
        self, channels: int, features: int, kind: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self._unshuffle = kind == "pixel_unshuffle"
        self._features = features
        self.conv = conv(
            channels,
            features // 4 if self._unshuffle else features,
            3,
            stride=1 if self._unshuffle else 2,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, channels) to (B, H / 2, W / 2, features)."""
        y = self.conv(x)
        if self._unshuffle:
            y = pixel_unshuffle(y)
        return y + group_mean(pixel_unshuffle(x), self._features)


class Upsample(nnx.Module):
    """Twice the resolution: a convolution, beside it repeated channels as squares of pixels."""

    def __init__(
        self, channels: int, features: int, kind: str, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self._interpolate = kind == "interpolate"
        self._repeats = 4 * features // channels
        self.conv = conv(
            channels, features if self._interpolate else 4 * features, 3, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, channels) to (B, 2 H, 2 W, features)."""
        y = self.conv(upsample_nearest(x)) if self._interpolate else pixel_shuffle(self.conv(x))
        return y + pixel_shuffle(x.repeat(self._repeats, axis=-1))


def _block(
    kind: str,
    channels: int,
    head_dim: int,
    activation: str,
    scales: tuple[int, ...],
    *,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> ResBlock | EfficientViTBlock:
    if kind == RESIDUAL:
        return ResBlock(channels, activation, dtype=dtype, rngs=rngs)
    return EfficientViTBlock(channels, head_dim, scales, dtype=dtype, rngs=rngs)


class Encoder(nnx.Module):
    """Images (B, H, W, 3) to latents (B, h, w, c)."""

    def __init__(self, config: DCConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths = config.encoder_block_out_channels
        self._features = config.latent_channels
        self._shortcut = config.encoder_out_shortcut
        self.conv_in = conv(config.in_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        levels: list[nnx.List] = []
        for i, width in enumerate(widths):
            layers: list[nnx.Module] = [
                _block(
                    config.encoder_block_types[i],
                    width,
                    config.attention_head_dim,
                    "silu",
                    config.encoder_qkv_multiscales[i],
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(config.encoder_layers_per_block[i])
            ]
            if i < len(widths) - 1:
                kind = config.downsample_block_type
                layers.append(Downsample(width, widths[i + 1], kind, dtype=dtype, rngs=rngs))
            levels.append(nnx.List(layers))
        self.down_blocks = nnx.List(levels)
        self.conv_out = conv(widths[-1], self._features, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Latents, not scaled."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            for layer in level:
                x = layer(x)
        y = self.conv_out(x)
        return y + group_mean(x, self._features) if self._shortcut else y


class Decoder(nnx.Module):
    """Latents (B, h, w, c) to images (B, H, W, 3)."""

    def __init__(self, config: DCConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths = config.decoder_block_out_channels
        self._activation = config.decoder_conv_act_fn
        self._repeats = widths[-1] // config.latent_channels if config.decoder_in_shortcut else 0
        self.conv_in = conv(config.latent_channels, widths[-1], 3, dtype=dtype, rngs=rngs)
        levels: list[nnx.List] = []
        for i, width in enumerate(widths):
            layers: list[nnx.Module] = []
            if i < len(widths) - 1:
                kind = config.upsample_block_type
                layers.append(Upsample(widths[i + 1], width, kind, dtype=dtype, rngs=rngs))
            layers += [
                _block(
                    config.decoder_block_types[i],
                    width,
                    config.attention_head_dim,
                    config.decoder_act_fns[i],
                    config.decoder_qkv_multiscales[i],
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(config.decoder_layers_per_block[i])
            ]
            levels.append(nnx.List(layers))
        self.up_blocks = nnx.List(levels)
        self.norm_out = RMSNorm(widths[0])
        self.conv_out = conv(widths[0], config.in_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images, nominally in [-1, 1], not clipped."""
        y = self.conv_in(x)
        x = y + x.repeat(self._repeats, axis=-1) if self._repeats else y
        for level in reversed(list(self.up_blocks)):
            for layer in level:
                x = layer(x)
        return self.conv_out(ACTIVATIONS[self._activation](self.norm_out(x)))


class AutoencoderDC(nnx.Module):
    """The autoencoder; see interface.Autoencoder for what its methods promise.

    Args:
      config: sizes.
      dtype: that convolutions and products compute in; parameters are float32.
      rngs: of the initial weights.
    """

    deterministic = True

    def __init__(self, config: DCConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.downsampling = 2 ** (len(config.encoder_block_out_channels) - 1)
        self.latent_channels = config.latent_channels
        self.scaling_factor = config.scaling_factor
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)

    def encode(self, images: jax.Array) -> Moments:
        """Images (B, H, W, 3) in [-1, 1] to latents (B, H / 32, W / 32, 32); zero deviation."""
        latents = self.encoder(images).astype(jnp.float32)
        return Moments(latents, jnp.zeros_like(latents))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B, h, w, 32), not scaled, to images (B, 32 h, 32 w, 3)."""
        return self.decoder(latents).astype(jnp.float32)
