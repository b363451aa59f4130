"""The sums that the DyDiLA core's Mosaic GPU kernels (Hopper) compute, and what they share.

With F the features of one side of one head, from blocks of Z, Z' and scalars of each token,

    (1) phi_ij = c_i u_ij^g_i,  u = (relu(z) + 1e-6) inv_i        base; the same of Z' is phi'
    (2) F_ij   = phi_ij - l_i phi'_ij                             difference

they compute, M (d, d) and z (d,) being one head's state or its gradient:

    state            M = sum_i w_i F_i^T Y_i,   z = sum_i x_i phi_i  (w, x: scalars of tokens, or 1)
    apply            Y_i = F_i M / den_i,       den_i = phi_i . z + eps
    token gradients  of Z and Z', from dF_i = w_i Y_i M^T (+ t_i z), dphi_i = dF_i + t_i z + a_i R^T

Forward: (M, z) = state(K, V), O = apply(Q, M, z). What a token's gradient needs of other channels
comes first, for the norms and the router read whole tokens: c has the gradient

    (3) dc_i = sum_j dphi_ij u_ij^g_i          over all heads, lambda likewise

and so backward has two passes over each side: query_sums leaves dM, dz, dc and dlambda, key_sums dc
and dlambda, and between them and token_gradients XLA goes through what is small: the routers'
choices and c. The gradient of z by way of c, and of R by the logits' gradients a, are

    (4) dz_ij += (dc_i c_i / A_i) u_ij inv_i - (dc_i c_i / P_i) g_i u_ij^(2 g_i) / (relu(z) + 1e-6)
    (5) dR = sum_i phi_i^T a_i                 A = sum_j u^2, P = sum_j u^(2 g)
    (6) dg_i = sum_j dphi_ij phi_ij (ln u_ij - W_i / P_i),     W = sum_j u^(2 g) ln u

A core without power and router has no such scalars: one pass a side. No atomics: results repeat
bitwise.

Blocks are 64 tokens by all channels of a head up to 128 of them (pallas_gpu_narrow.py), by 64 of a
wider one (pallas_gpu_wide.py). What a block has beyond N or d the TMA unit reads as zeros and does
not write. One warpgroup a program; the tensor core multiplies bfloat16 and adds in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dydilit_jax.kernels.dydila.features import RELU_OFFSET

BLOCK = 64  # tokens, and channels, of one block: the rows of one wgmma
PROGRAMS = 2 * 132  # at least as many as two for each multiprocessor of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Core:
    """Static part of one call.

    Attributes:
      heads: H.
      width: channels of a head before they were rounded up to blocks.
      tokens: of a whole sequence, which the sums are divided by.
      normalizer: `base`, `signed` or `none`.
      powered: whether (1) has a power; else phi = relu.
      differential: whether there are Z' and lambda.
      choices: n of lambda's routers; 0 for a lambda that is not routed.
      eps: of the denominator.
      sequence: mesh axis that the tokens are split over, or None.
      interpret: Pallas' interpreter parameters, or False.
    """

    heads: int
    width: int
    tokens: int
    normalizer: str
    powered: bool
    differential: bool
    eps: float
    choices: int = 0
    sequence: str | None = None
    interpret: Any = False

    @property
    def powers(self) -> int:
        """How many of Z and Z' have a power."""
        return (1 + self.differential) * self.powered

    @property
    def one_pass(self) -> bool:
        """Whether a head's token has gradients that no other head's channels have a part in."""
        return not self.powered and not self.choices

    @property
    def rows(self) -> int:
        """Scalars of a token: g, inv, c, then g', inv', c', then lambda; one unused if none."""
        return max(1, 3 * self.powers + self.differential)

    @property
    def summed(self) -> int:
        """Gradients of scalars that are sums over channels: of c, of c', then of lambda."""
        return self.powers + self.differential


def zeros_up(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """Zeros added along an axis up to a size."""
    added = [(0, 0)] * x.ndim
    added[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, added)


def rows_to_block(rows: jax.Array, channels: int = BLOCK) -> jax.Array:
    """A scalar for each token, (64,), as a block (64, channels)."""
    return lax.broadcast_in_dim(rows, (BLOCK, channels), (0,))


def columns_to_block(columns: jax.Array) -> jax.Array:
    """A scalar for each channel, (channels,), as a block (64, channels)."""
    return lax.broadcast_in_dim(columns, (BLOCK, *columns.shape), (1,))


def rounded(x: jax.Array) -> jax.Array:
    """float32 with the precision of bfloat16: as the tensor core takes it."""
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def guarded(product: jax.Array, core: Core) -> jax.Array:
    """The denominator: positive by eps, or kept eps away from zero."""
    if core.normalizer == "base":
        return product + core.eps
    eps = jnp.where(product < 0.0, -core.eps, core.eps)
    return jnp.where(jnp.abs(product) < core.eps, eps, product)


@dataclasses.dataclass(frozen=True)
class Power:
    """Equation (1) of one block, and its derivative.

    Attributes:
      z: (64, channels) float32.
      rows: (64,) float32 each: g, inv and c; None without a power.
      through_norms: (64,) float32 each: dc c inv^2 / A and dc c g / P, the factors of (4), and the
        mean of ln u that dg is about; None where they are not known yet, or without a power.
    """

    z: jax.Array
    rows: Sequence[jax.Array] | None
    through_norms: Sequence[jax.Array] | None = None

    def value(self) -> jax.Array:
        """Phi, (64, channels) float32."""
        if self.rows is None:
            return jnp.maximum(self.z, 0.0)
        return self._row(2) * self._unscaled()[0]

    def _row(self, row: int) -> jax.Array:
        assert self.rows is not None
        return rows_to_block(self.rows[row], self.z.shape[1])

    def _unscaled(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """u^g, ln u, and relu(z) + 1e-6."""
        assert self.rows is not None
        positive = jnp.maximum(self.z, 0.0) + RELU_OFFSET
        log = jnp.log(positive * self._row(1))
        return jnp.exp(self._row(0) * log), log, positive

    def scale_gradient(self, d_phi: jax.Array) -> list[jax.Array]:
        """Equation (3): the block's part of the gradient of c, (64,); none without a power."""
        if self.rows is None:
            return []
        return [jnp.sum(d_phi * self._unscaled()[0], axis=1)]

    def gradient(self, d_phi: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """Gradients of z, like z, and the block's part of that of g, (64,)."""
        if self.rows is None:
            return jnp.where(self.z > 0.0, d_phi, 0.0), []
        power, log, positive = self._unscaled()
        assert self.through_norms is not None
        a, b, mean = (rows_to_block(row, self.z.shape[1]) for row in self.through_norms)
        d_logged = self._row(2) * d_phi * power
        d_g = jnp.sum(d_logged * (log - mean), axis=1)
        d_z = (self._row(0) * d_logged - b * power * power) / positive + a * positive
        return jnp.where(self.z > 0.0, d_z, 0.0), [d_g]


@dataclasses.dataclass(frozen=True)
class Features:
    """Equations (1) and (2) of one block."""

    base: Power
    redundant: Power | None
    scale: jax.Array | None  # lambda, (64,)

    @classmethod
    def of(
        cls, core: Core, blocks: Sequence[jax.Array], rows: Any, through_norms: Any = None
    ) -> Features:
        """From blocks of Z (and Z'), and references to rows of scalars and of (4)'s factors."""
        powers = []
        for side, block in enumerate(blocks):
            scalars, factors = None, None
            if core.powered:
                scalars = [rows[3 * side + row] for row in range(3)]
                if through_norms is not None:
                    factors = [through_norms[3 * side + row] for row in range(3)]
            powers.append(Power(block.astype(jnp.float32), scalars, factors))
        if not core.differential:
            return cls(powers[0], None, None)
        return cls(powers[0], powers[1], rows[core.rows - 1])

    @property
    def sides(self) -> list[Power]:
        """Of Z, and of Z' if there is one."""
        return [self.base] if self.redundant is None else [self.base, self.redundant]

    def _scale(self) -> jax.Array:
        assert self.scale is not None
        return rows_to_block(self.scale, self.base.z.shape[1])

    def values(self) -> tuple[jax.Array, jax.Array]:
        """F and phi, (64, channels) float32."""
        base = self.base.value()
        if self.redundant is None:
            return base, base
        return base - self._scale() * self.redundant.value(), base

    def d_phi(self, d_difference: jax.Array, d_base: jax.Array) -> list[jax.Array]:
        """Gradients of phi (and phi') from those of F and phi."""
        of_base = d_difference + d_base
        return [of_base] if self.redundant is None else [of_base, -self._scale() * d_difference]

    def scalar_gradients(self, d_difference: jax.Array, d_base: jax.Array) -> list[jax.Array]:
        """The block's parts, (64,), of the sums that `Core.summed` counts."""
        d_phi = self.d_phi(d_difference, d_base)
        rows = [
            row for side, d in zip(self.sides, d_phi, strict=True) for row in side.scale_gradient(d)
        ]
        if self.redundant is None:
            return rows
        return [*rows, -jnp.sum(d_difference * self.redundant.value(), axis=1)]

    def token_gradients(
        self, d_phi: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Gradients of Z (and Z'), and the block's parts of their exponents', from those of phi."""
        pairs = [side.gradient(d) for side, d in zip(self.sides, d_phi, strict=True)]
        return [d_z for d_z, _ in pairs], [row for _, d_g in pairs for row in d_g]


def denominator_gradient(core: Core, den: jax.Array, inner_products: jax.Array) -> jax.Array:
    """t = -F . G / den^2; where den was held at eps (`signed`), it is a constant."""
    d_den = -inner_products / (den * den)
    if core.normalizer == "signed":
        return jnp.where(jnp.abs(den) <= core.eps, 0.0, d_den)
    return d_den


def through_denominator(
    core: Core, d_difference: jax.Array, z_s: Any, weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Gradients of F and phi, (64, channels): t_i z added to one of them, as `normalizer` says."""
    d_base = jnp.zeros_like(d_difference)
    if core.normalizer == "none":
        return d_difference, d_base
    d_den = columns_to_block(z_s[...])
    if weight is not None:
        d_den = d_den * rows_to_block(weight, d_difference.shape[1])
    if core.normalizer == "signed":
        return d_difference + d_den, d_base
    return d_difference, d_base + d_den


def scalar_gradients(
    core: Core, features: Features, d_difference: jax.Array, z_s: Any
) -> list[jax.Array]:
    """The block's parts, (64,) each, of the sums that `core.summed` counts, from its G or zero.

    Without a power there is dlambda only. What it does not need must not be computed in vain:
    Mosaic's search for layouts of values that nothing reads does not end.
    """
    if core.powered:
        return features.scalar_gradients(*through_denominator(core, d_difference, z_s, None))
    assert features.redundant is not None
    if core.normalizer == "signed":
        d_difference = d_difference + columns_to_block(z_s[...])
    return [-jnp.sum(d_difference * features.redundant.value(), axis=1)]


class QuerySums(NamedTuple):
    """What the first pass over queries leaves.

    Attributes:
      tokens: gradients of Q, Q' (B, N, H, d) bfloat16 of a core of one pass; else None.
      rows: (B H, core.summed, covered) float32; None if there are none.
      d_den: gradient of the denominator (B H, covered) float32; None without one, or in one pass.
      d_m, d_z: sums over the tokens for dM and dz, like M and z, float32.
    """

    tokens: list[jax.Array] | None
    rows: jax.Array | None
    d_den: jax.Array | None
    d_m: jax.Array
    d_z: jax.Array


class Known(NamedTuple):
    """What the pass that leaves tokens' gradients knows of each token and of the router.

    Attributes:
      scalars: (B, 1 or H, rows, covered) float32.
      through_norms: (B, 1 or H, 3 powers, covered) float32: for each power the factors of (4) and
        the mean of (6); None without a power.
      weights: (B H, 2, covered) float32, w and t; None for ones.
      d_logits: (B, N, n) bfloat16, n rounded up to a multiple of 16; None if lambda is not routed.
      router: (sides, H, n, d) bfloat16; None if lambda is not routed.
    """

    scalars: jax.Array
    through_norms: jax.Array | None = None
    weights: jax.Array | None = None
    d_logits: jax.Array | None = None
    router: jax.Array | None = None


class TokenGradients(NamedTuple):
    """What that pass leaves.

    Attributes:
      tokens: gradients of Z, Z' (B, N, H, d) bfloat16.
      value: Y_i = F_i M (B, N, H, d) bfloat16, the gradient of V; None where it was not wanted.
      rows: (B H, powers, covered) float32, (6) of a head's channels; in one pass
        (B H, core.summed, covered). None if there are none.
      router: (sides, B, H, d, n) float32, (5) of each sequence; None if lambda is not routed.
    """

    tokens: list[jax.Array]
    value: jax.Array | None
    rows: jax.Array | None
    router: jax.Array | None


def means(core: Core, m: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over all tokens, M's as the tensor core takes them, of this device's sums."""
    if core.sequence is not None:
        m, z = lax.psum((m, z), core.sequence)
    return (m / core.tokens).astype(jnp.bfloat16), z / core.tokens


def compiler_params() -> plgpu.CompilerParams:
    """Layouts of registers and shared memory are inferred for a warpgroup as a whole."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def head_index(heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch and head of this program, and a traced zero."""
    index = lax.axis_index("head")
    return lax.div(index, jnp.int32(heads)), lax.rem(index, jnp.int32(heads)), index * 0


def first_channel(width: int) -> jax.Array:
    """Zero, known to Mosaic as a multiple of what divides d: so it tiles memory, and no wider."""
    head = lax.axis_index("head")
    return lax.min(head, jnp.int32(0)) * math.gcd(width, BLOCK)
