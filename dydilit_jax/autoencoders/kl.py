"""Stable Diffusion's variational autoencoder (arXiv 2112.10752), as diffusers' AutoencoderKL.

Downsampling 8, four channels, with the published sizes. The encoder puts out the mean and the
log-variance of a normal distribution; the modules have diffusers' names, by which its weights are
read.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.autoencoders.interface import Moments
from dydilit_jax.autoencoders.layers import GroupNorm, conv, linear, upsample_nearest

# The bounds between which the original code clips the log-variance.
LOG_VARIANCE_MIN, LOG_VARIANCE_MAX = -30.0, 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Sizes, under the names of diffusers' config.json and with its defaults but for the lists.

    Attributes:
      in_channels, out_channels: of the images.
      latent_channels: of the latents.
      block_out_channels: width of each resolution; all but the last halve it.
      layers_per_block: residual blocks of a resolution in the encoder, one more in the decoder.
      norm_num_groups: groups of every normalisation.
      use_quant_conv, use_post_quant_conv: 1 x 1 convolutions of the moments, of the latents.
      mid_block_add_attention: attention at the lowest resolution.
      scaling_factor: what the latents are multiplied with to have unit variance.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215


class ResnetBlock(nnx.Module):
    """Two convolutions, each after a normalisation and SiLU, and a shortcut."""

    def __init__(
        self, channels: int, features: int, groups: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(channels, groups, rngs=rngs)
        self.conv1 = conv(channels, features, 3, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(features, groups, rngs=rngs)
        self.conv2 = conv(features, features, 3, dtype=dtype, rngs=rngs)
        self.conv_shortcut = (
            conv(channels, features, 1, dtype=dtype, rngs=rngs) if channels != features else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, channels) to (B, H, W, features)."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Softmax attention of all pixels, one head, around it a shortcut."""

    def __init__(self, channels: int, groups: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, rngs=rngs)
        self.to_q = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        batch, height, width, channels = x.shape
        tokens = self.group_norm(x).reshape(batch, height * width, channels)
        query, key, value = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        precision = self.to_q.precision
        scores = jnp.einsum(
            "bqc,bkc->bqk", query, key, precision=precision, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores / channels**0.5, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bqk,bkc->bqc", weights, value, precision=precision)
        return x + self.to_out[0](mixed).reshape(x.shape)


class MidBlock(nnx.Module):
    """A residual block, attention and another residual block at the lowest resolution."""

    def __init__(self, config: KLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[-1], config.norm_num_groups

        def block() -> ResnetBlock:
            return ResnetBlock(channels, channels, groups, dtype=dtype, rngs=rngs)

        self.resnets = nnx.List([block(), block()])
        self.attentions = nnx.List(
            [Attention(channels, groups, dtype=dtype, rngs=rngs)]
            if config.mid_block_add_attention
            else []
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """Half the resolution by a strided convolution, with zeros to the right and below only."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to (B, H / 2, W / 2, C)."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the resolution by the nearest pixel, then a convolution."""

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) to (B, 2 H, 2 W, C)."""
        return self.conv(upsample_nearest(x))


class Level(nnx.Module):
    """Residual blocks of one resolution, and the way to the next."""

    def __init__(
        self,
        channels: int,
        features: int,
        layers: int,
        groups: int,
        resample: type[Downsample] | type[Upsample] | None,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            ResnetBlock(channels if i == 0 else features, features, groups, dtype=dtype, rngs=rngs)
            for i in range(layers)
        )
        # Two lists, one of them or both empty: the names of diffusers' weights.
        down, up = (
            [kind(features, dtype=dtype, rngs=rngs)] if resample is kind else []
            for kind in (Downsample, Upsample)
        )
        self.downsamplers, self.upsamplers = nnx.List(down), nnx.List(up)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, channels) to (B, H', W', features)."""
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Images (B, H, W, 3) to moments (B, h, w, 2 c)."""

    def __init__(self, config: KLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block,
                groups,
                Downsample if i < len(widths) - 1 else None,
                dtype=dtype,
                rngs=rngs,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mean and log-variance side by side, before the 1 x 1 convolution."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (B, h, w, c) to images (B, H, W, 3)."""

    def __init__(self, config: KLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], 3, dtype=dtype, rngs=rngs)
        self.mid_block = MidBlock(config, dtype=dtype, rngs=rngs)
        self.up_blocks = nnx.List(
            Level(
                widths[max(i - 1, 0)],
                width,
                config.layers_per_block + 1,
                groups,
                Upsample if i < len(widths) - 1 else None,
                dtype=dtype,
                rngs=rngs,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = conv(widths[-1], config.out_channels, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images, nominally in [-1, 1], not clipped."""
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The autoencoder; see interface.Autoencoder for what its methods promise.

    Args:
      config: sizes.
      dtype: that convolutions and products compute in; parameters are float32.
      rngs: of the initial weights.
    """

    deterministic = False

    def __init__(self, config: KLConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.config = config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = latents
        self.scaling_factor = config.scaling_factor
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, rngs=rngs)
        self.quant_conv = (
            conv(moments, moments, 1, dtype=dtype, rngs=rngs) if config.use_quant_conv else None
        )
        self.post_quant_conv = (
            conv(latents, latents, 1, dtype=dtype, rngs=rngs)
            if config.use_post_quant_conv
            else None
        )

    def encode(self, images: jax.Array) -> Moments:
        """Images (B, H, W, 3) in [-1, 1] to the posterior's moments (B, H / 8, W / 8, 4)."""
        x = self.encoder(images)
        if self.quant_conv is not None:
            x = self.quant_conv(x)
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        log_variance = jnp.clip(log_variance, LOG_VARIANCE_MIN, LOG_VARIANCE_MAX)
        return Moments(mean, jnp.exp(0.5 * log_variance))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B, h, w, 4), not scaled, to images (B, 8 h, 8 w, 3)."""
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)
