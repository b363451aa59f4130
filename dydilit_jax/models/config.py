"""What the network can be: every field of `config.model`, its default, and the table of sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels.dydila.api import IMPLEMENTATIONS
from dydilit_jax.kernels.dydila.features import NORM_SCOPES, NORMALIZERS
from dydilit_jax.kernels.routing import ROUTER_TRAININGS

ATTENTIONS = ("dydila", "relu", "focused", "softmax")
FEEDFORWARDS = ("mix", "mlp")
POSITIONS = ("sincos", "none", "rope")
REMATERIALISATIONS = ("none", "dots", "full", "offload")
DTYPES = ("float32", "bfloat16", "float64")


def _one_of(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise unknown_name(kind, name, known)


def _at_least(field: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{field} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The token mixer. Fields below `depthwise` concern `dydila`, `eps` all but `softmax`.

    Attributes:
      kind: `dydila`; `relu` (plain linear attention: LiT with a depthwise term, SANA without);
        `focused` (FLatten, fixed exponent); `softmax` (DiT).
      heads: number of heads.
      qkv_bias: whether the shared projections of queries, keys and values have a bias.
      depthwise: side of the depthwise convolution of V on the token grid, odd; 0 for none.
      projectors: n_P, projectors in each of the two banks; 0 switches the difference off, 1 is a
        static projector without a router.
      exponents: n_K, learned exponents in each of the four banks; 1 is learned and not routed, 0
        is fixed at `exponent_init`.
      exponent_init: initial exponent; exponents are kept at 1 or above. Also `focused`'s exponent.
      lambdas: n_D, learned lambdas; 1 is learned and not routed, 0 is fixed at `lambda_init`.
      lambda_init: initial lambda.
      normalizer: `base`, `signed`, `none` or `rms`; see kernels/dydila/features.py.
      norm_scope: norms of the measure kernel over the whole `token` or each `head`.
      router_training: `ste`, `switch`, `gumbel` or `soft`; see kernels/routing.py.
      router_jitter: multiplicative uniform noise on what the routers read, while training.
      load_balance_weight: weight in the loss of the routers' load-balance term (Switch form).
      eps: added to the denominator.
      implementation: of attention's operations: the core, the routed projection and the depthwise
        convolution of V. Empty: each chooses by platform and shape (docs/kernels.md). `pallas_tpu`,
        `pallas_gpu`: the core runs in that kernel or says why it cannot; the other two in theirs
        wherever it can run, else as they choose by themselves. `xla`: no kernel in any of them.
        `reference`: as `xla`, with the core's explicit N x N form.
    """

    kind: str = "dydila"
    heads: int = 4
    qkv_bias: bool = True
    depthwise: int = 5
    projectors: int = 3
    exponents: int = 9
    exponent_init: float = 3.0
    lambdas: int = 9
    lambda_init: float = 0.01
    normalizer: str = "base"
    norm_scope: str = "token"
    router_training: str = "ste"
    router_jitter: float = 0.0
    load_balance_weight: float = 0.0
    eps: float = 1e-6
    implementation: str = ""

    @property
    def backend(self) -> str | None:
        """What `implementation` asks of the operations beside the core: their `prefer`."""
        return "xla" if self.implementation == "reference" else self.implementation or None

    def __post_init__(self) -> None:
        _one_of("attention", self.kind, ATTENTIONS)
        if self.implementation:
            _one_of("implementation", self.implementation, IMPLEMENTATIONS)
        _one_of("normalizer", self.normalizer, NORMALIZERS)
        _one_of("norm scope", self.norm_scope, NORM_SCOPES)
        _one_of("router training", self.router_training, ROUTER_TRAININGS)
        for field in ("projectors", "exponents", "lambdas", "load_balance_weight", "depthwise"):
            _at_least(f"model.attention.{field}", getattr(self, field), 0)
        _at_least("model.attention.heads", self.heads, 1)
        _at_least("model.attention.exponent_init", self.exponent_init, 1.0)
        if self.depthwise and self.depthwise % 2 == 0:
            raise UserError(f"model.attention.depthwise must be odd or 0, got {self.depthwise}")
        if not 0.0 <= self.router_jitter < 1.0:
            raise UserError(
                f"model.attention.router_jitter must be in [0, 1), got {self.router_jitter}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """The channel mixer.

    Attributes:
      kind: `mix` (SANA's Mix-FFN: gated, with a 3 x 3 depthwise convolution) or `mlp` (DiT's).
      ratio: hidden width over width; 0 for the kind's own: 2.5 for `mix`, 4 for `mlp`.
    """

    kind: str = "mix"
    ratio: float = 0.0

    def __post_init__(self) -> None:
        _one_of("feed-forward", self.kind, FEEDFORWARDS)
        _at_least("model.feedforward.ratio", self.ratio, 0.0)

    def hidden(self, width: int) -> int:
        """Hidden width for a network of this width."""
        return round(width * (self.ratio or {"mix": 2.5, "mlp": 4.0}[self.kind]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """DyDi-LiT. Images are (height, width, channels) in pixels or in latents.

    Attributes:
      image_size: height and width of what the network sees (32 for a 256 px image in f8 latents).
      channels: channels of what the network sees.
      patch_size: side of a patch; `image_size` must be a multiple of it.
      num_classes: number of labels; label `num_classes` is the dropped one.
      depth: number of blocks.
      width: D, channels of a token.
      position: `sincos` (fixed 2D sine-cosine table), `rope` (rotary) or `none`.
      time_frequency_shift: time's frequencies are 10000^(-i / (128 - shift)): 0 as the official DiT
        and SiT have them, 1 as diffusers has DiT's.
      label_dropout: share of labels dropped while training, for classifier-free guidance.
      dtype: dtype of the computation; parameters are float32.
      scan_layers: run the blocks in one scanned loop (compile time does not grow with depth) or
        unrolled. The parameters are stacked either way.
      rematerialisation: what the backward pass computes again instead of keeping: `none`, `dots`
        (all but linear maps' results), `full` (each block), or `offload` (as `dots`, with the
        results kept in the host's memory).
      attention: the token mixer.
      feedforward: the channel mixer.
    """

    image_size: int = 32
    channels: int = 4
    patch_size: int = 2
    num_classes: int = 1000
    depth: int = 12
    width: int = 384
    position: str = "sincos"
    time_frequency_shift: int = 0
    label_dropout: float = 0.1
    dtype: str = "float32"
    scan_layers: bool = True
    rematerialisation: str = "none"
    attention: AttentionConfig = AttentionConfig()
    feedforward: FeedForwardConfig = FeedForwardConfig()

    def __post_init__(self) -> None:
        _one_of("position", self.position, POSITIONS)
        _one_of("rematerialisation", self.rematerialisation, REMATERIALISATIONS)
        _one_of("dtype", self.dtype, DTYPES)
        for field in ("image_size", "channels", "patch_size", "num_classes", "depth", "width"):
            _at_least(f"model.{field}", getattr(self, field), 1)
        if self.time_frequency_shift not in (0, 1):
            raise UserError(
                f"model.time_frequency_shift must be 0 or 1, got {self.time_frequency_shift}"
            )
        if not 0.0 <= self.label_dropout < 1.0:
            raise UserError(f"model.label_dropout must be in [0, 1), got {self.label_dropout}")
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size {self.image_size} is not divisible by "
                f"model.patch_size {self.patch_size}"
            )
        if self.width % self.attention.heads:
            raise UserError(
                f"model.width {self.width} is not divisible by "
                f"model.attention.heads {self.attention.heads}"
            )
        if self.position == "sincos" and self.width % 4:
            raise UserError(
                f"model.position sincos needs model.width divisible by 4, got {self.width}"
            )
        if self.position == "rope" and self.width // self.attention.heads % 4:
            raise UserError(
                "model.position rope needs a head width divisible by 4, got "
                f"{self.width // self.attention.heads}: change model.width or model.attention.heads"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """N, tokens in an image."""
        return self.grid[0] * self.grid[1]

    @property
    def null_label(self) -> int:
        """The label that stands for no label."""
        return self.num_classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A row of the table of sizes: softmax takes many heads, linear attention few (as LiT)."""

    depth: int
    width: int
    softmax_heads: int
    linear_heads: int


SIZES = {
    "tiny": Size(depth=5, width=64, softmax_heads=4, linear_heads=2),
    "S": Size(depth=12, width=384, softmax_heads=6, linear_heads=2),
    "B": Size(depth=12, width=768, softmax_heads=12, linear_heads=3),
    "L": Size(depth=24, width=1024, softmax_heads=16, linear_heads=4),
    "XL": Size(depth=28, width=1152, softmax_heads=16, linear_heads=4),
}


def size_fields(size: str, attention: str, feedforward: str = "mix") -> dict[str, Any]:
    """Fields of ModelConfig that a named size and attention stand for.

    `softmax` gets DiT's heads and no depthwise term, the linear attentions few heads and one.

    Raises:
      UserError: unknown size, attention or feed-forward.
    """
    if size not in SIZES:
        raise unknown_name("size", size, SIZES)
    _one_of("attention", attention, ATTENTIONS)
    row = SIZES[size]
    softmax = attention == "softmax"
    return {
        "depth": row.depth,
        "width": row.width,
        "attention": AttentionConfig(
            kind=attention,
            heads=row.softmax_heads if softmax else row.linear_heads,
            depthwise=0 if softmax else AttentionConfig.depthwise,
        ),
        "feedforward": FeedForwardConfig(kind=feedforward),
    }
