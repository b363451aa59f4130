"""Top-1 routed projection: every token is multiplied by the one matrix of a bank it is routed to.

Implementations of the same function:

- `dense` (reference.py): all banks, weighted. 3n products, forward and backward.
- `blocks` (xla.py): the routed bank only. 3 products, or n + 2 with straight-through gradients.
- backends, kernels for one platform: the products of `blocks`, without its moving of rows.

`blocks` moves rows instead of multiplying more, which pays on CPU; an accelerator under plain XLA
is faster with `dense` (forward at 65,536 tokens of width 1152 on a TPU v5e the compiler estimates
2.7 ms, against 6.7 ms for a padded-block form).

A backend is a module with `unsupported`, which says in a line why it cannot run, `projection` and
`gradient`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from functools import partial
from typing import Protocol, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from dydilit_jax.errors import UserError, unknown_name
from dydilit_jax.kernels.grouped_projection import reference, xla
from dydilit_jax.kernels.platform import check_preference, preferred, record_choice, target
from dydilit_jax.kernels.sharding import (
    CoreSharding,
    ambient_sharding,
    placement_known,
)

Gradients = tuple[jax.Array, jax.Array, jax.Array]


class Backend(Protocol):
    """Kernels for one platform; shapes and dtypes as in pallas_tpu.py."""

    def unsupported(self, x: jax.Array, bank: jax.Array, /) -> str | None:
        """Say why x (..., D) and bank (n, D, E) cannot run, and what would; None when they can."""

    def projection(
        self, x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array, /
    ) -> jax.Array:
        """Return the projection of x (T, D): (T, E)."""

    def gradient(
        self,
        x: jax.Array,
        bank: jax.Array,
        weights: jax.Array,
        index: jax.Array,
        dy: jax.Array,
        straight_through: bool,
        /,
    ) -> Gradients:
        """Return the gradients of x, bank and weights."""


PLAIN = ("dense", "blocks")
# Platform and module of each backend.
BACKENDS = {
    "pallas_tpu": ("tpu", "dydilit_jax.kernels.grouped_projection.pallas_tpu"),
    "pallas_gpu": ("gpu", "dydilit_jax.kernels.grouped_projection.pallas_gpu"),
}
IMPLEMENTATIONS = (*PLAIN, *BACKENDS)

# Fewest tokens of a device from which a backend is chosen unasked. pallas_tpu: where its schedule,
# counted in the program compiled for v5e, is well below that of all banks; not timed on a device.
# pallas_gpu has run on no GPU yet: it has to be asked for.
FEWEST_TOKENS = {"pallas_tpu": 512}


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static arguments; implementation None is `blocks` or `dense`, by the lowering's platform."""

    straight_through: bool
    implementation: str | None
    sharding: CoreSharding | None


def grouped_projection(
    x: jax.Array,
    bank: jax.Array,
    weights: jax.Array,
    index: jax.Array,
    *,
    straight_through: bool,
    implementation: str | None = None,
    prefer: str | None = None,
    sharding: CoreSharding | None = None,
) -> jax.Array:
    """y_i = sum_j w_ij x_i W_j for weights that are zero off the routed bank `index_i`.

    Differentiable in x, bank and weights (reverse mode). Products run in `x.dtype` and sum in
    float32 (float64 for float64); the gradient of a float32 bank is not rounded to `x.dtype`.
    Source: arXiv 2601.13683, dynamic projection module.

    Args:
      x: (..., D) tokens, any leading dimensions.
      bank: (n, D, E), one matrix for each bank, in any float dtype.
      weights: (..., n) float32, zero off `index`: one-hot, or one-hot times the router's
        probability. For soft routing (all weights in use) name `implementation="dense"` and
        straight_through=True; `blocks` is only right for weights that are zero off `index`.
      index: (...,) integers in [0, n), the routed bank. A value out of range is not detected.
      straight_through: with True the gradient of the weights is dy_i . (x_i W_j) for every j, as if
        every bank had been computed; with False it is zero off `index`, and cheaper.
      implementation: `dense`, `blocks`, `pallas_tpu`, `pallas_gpu`, or None to choose by platform
        and shape: what `prefer` says; else a backend of the target platform where it is worth it;
        else `blocks` on CPU (unless the input is tiny), and `dense` elsewhere.
      prefer: a backend to take where it can run, whatever the size, or `xla` for none of them.
      sharding: how tokens (B, N, D) or (B, D) lie on a mesh, for the backends (XLA finds out by
        itself): each device routes its own tokens. None takes the mesh of `jax.set_mesh`, if one
        is set.

    Returns:
      (..., E) in `x.dtype`.

    Raises:
      UserError: an unknown implementation, one that cannot run these arguments, or shapes or dtypes
        that do not fit.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise unknown_name("grouped projection implementation", implementation, IMPLEMENTATIONS)
    check_preference(prefer, BACKENDS)
    _check_arguments(x, bank, weights, index)
    sharding = sharding or ambient_sharding()
    if implementation in BACKENDS:
        reason = _unsupported(implementation, x, bank, sharding)
        if reason is not None:
            raise UserError(
                f"grouped projection {implementation!r} cannot run: {reason}; "
                "'dense' and 'blocks' run everywhere."
            )
    name = implementation or _default(x, bank, sharding, prefer)
    by_platform = "blocks" if target().platform == "cpu" else "dense"  # as _projection chooses
    record_choice("routed projection", name or by_platform)
    options = _Options(straight_through, name, sharding if name in BACKENDS else None)
    return _projection(x, bank, weights, index, options)


def load_backend(name: str) -> Backend:
    """Import a backend: when it is used, so that Pallas is not where it is of no use."""
    return cast(Backend, importlib.import_module(BACKENDS[name][1]))


def _default(
    x: jax.Array, bank: jax.Array, sharding: CoreSharding | None, prefer: str | None = None
) -> str | None:
    """Return the implementation for None; None again to let the platform of the lowering decide.

    With one bank there is nothing to route; below 256 tokens sorting costs what it saves. Measured
    on CPU, three banks, forward and gradients, dense / blocks in units of the plain product's:
    width 64: 128 tokens 1.6 / 1.9, 512 tokens 1.9 / 1.5, 2,048 tokens 3.0 / 2.0;
    width 384: 256 tokens 2.3 / 2.1, 1,024 tokens 3.1 / 1.7, 4,096 tokens 3.8 / 1.5.

    Backends multiply float32 without rounding it, which takes a TPU six times as long as XLA's
    product of rounded operands: unless preferred they are chosen for bfloat16 only.
    """
    tokens = math.prod(x.shape[:-1])
    shards = 1 if sharding is None else sharding.batch_size * sharding.sequence_size
    for name, fewest in preferred(prefer, FEWEST_TOKENS).items():
        worthwhile = x.dtype == jnp.bfloat16 and bank.shape[0] > 1 and tokens >= fewest * shards
        if (
            (name == prefer or worthwhile)
            and placement_known(sharding)
            and _unsupported(name, x, bank, sharding) is None
        ):
            return name
    return "dense" if bank.shape[0] == 1 or tokens < 256 else None


def _unsupported(
    name: str, x: jax.Array, bank: jax.Array, sharding: CoreSharding | None
) -> str | None:
    """Say why a backend cannot run these arguments here; None if it can."""
    platform, _ = BACKENDS[name]
    if target().platform != platform:
        return f"it is for {platform}, this program is traced for {target().platform}"
    if sharding is not None:
        if x.ndim not in (2, 3):
            return f"tokens {x.shape} on a mesh: it takes (B, N, D) or (B, D)"
        parts = (sharding.batch_size, sharding.sequence_size)
        for size, count in zip(x.shape[:-1], parts, strict=False):
            if size % count:
                return f"tokens {x.shape} do not divide over {parts[: x.ndim - 1]} devices"
    return load_backend(name).unsupported(x, bank)


def _check_arguments(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> None:
    """Raise UserError unless shapes and dtypes are those of `grouped_projection`."""
    if bank.ndim != 3 or x.ndim < 1 or x.shape[-1] != bank.shape[1]:
        raise UserError(
            f"grouped projection of x {x.shape} by a bank {bank.shape}: "
            "expected x (..., D) and bank (n, D, E) with the same D."
        )
    if weights.shape != (*x.shape[:-1], bank.shape[0]) or index.shape != x.shape[:-1]:
        raise UserError(
            f"grouped projection with weights {weights.shape} and index {index.shape}: expected "
            f"{(*x.shape[:-1], bank.shape[0])} and {x.shape[:-1]}, to fit x {x.shape} and "
            f"bank {bank.shape}."
        )
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise UserError(f"grouped projection with index of {index.dtype}: expected integers.")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _projection(
    x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array, options: _Options
) -> jax.Array:
    """`grouped_projection` with everything decided."""

    def project(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
        arguments = (_flat(x), bank, _flat(weights), index.reshape(-1))
        match options.implementation:
            case None:
                y = lax.platform_dependent(*arguments, cpu=xla.blocks, default=_dense)
            case "dense":
                y = _dense(*arguments)
            case "blocks":
                y = xla.blocks(*arguments)
            case name:
                y = load_backend(name).projection(*arguments)
        return y.reshape(*x.shape[:-1], bank.shape[2])

    sharding = options.sharding
    if sharding is None:
        return project(x, bank, weights, index)
    tokens, choices = _specs(x, sharding)
    return jax.shard_map(
        project,
        mesh=sharding.mesh,
        in_specs=(tokens, P(), tokens, choices),
        out_specs=tokens,
        check_vma=False,
    )(x, bank, weights, index)


def _dense(x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Return `reference.dense` with the signature of `xla.blocks`."""
    return reference.dense(x, bank, weights).astype(x.dtype)


def _projection_forward(
    x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array, options: _Options
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
    return _projection(x, bank, weights, index, options), (x, bank, weights, index)


def _projection_backward(
    options: _Options, inputs: tuple[jax.Array, jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    sharding = options.sharding
    dense = partial(reference.dense_gradient, straight_through=options.straight_through)
    blocks = partial(xla.blocks_gradient, straight_through=options.straight_through)

    def differentiate(
        x: jax.Array, bank: jax.Array, weights: jax.Array, index: jax.Array, dy: jax.Array
    ) -> Gradients:
        arguments = (_flat(x), bank, _flat(weights), index.reshape(-1), _flat(dy))
        match options.implementation:
            case None:
                gradients = lax.platform_dependent(*arguments, cpu=blocks, default=dense)
            case "dense":
                gradients = dense(*arguments)
            case "blocks":
                gradients = blocks(*arguments)
            case name:
                gradients = load_backend(name).gradient(*arguments, options.straight_through)
        dx, dbank, dweights = gradients
        if sharding is not None:
            dbank = lax.psum(dbank, _token_axes(x, sharding))
        return dx.reshape(x.shape), dbank, dweights.reshape(weights.shape)

    if sharding is None:
        return (*differentiate(*inputs, dy), None)
    tokens, choices = _specs(inputs[0], sharding)
    gradients = jax.shard_map(
        differentiate,
        mesh=sharding.mesh,
        in_specs=(tokens, P(), tokens, choices, tokens),
        out_specs=(tokens, P(), tokens),
        check_vma=False,
    )(*inputs, dy)
    return (*gradients, None)


_projection.defvjp(_projection_forward, _projection_backward)


def _flat(tokens: jax.Array) -> jax.Array:
    """Tokens (..., D) as (T, D)."""
    return tokens.reshape(-1, tokens.shape[-1])


def _token_axes(x: jax.Array, sharding: CoreSharding) -> tuple[str, ...]:
    """Mesh axes that tokens (B, [N,] D) are split over."""
    sequence = sharding.sequence if x.ndim == 3 else None
    return (*sharding.batch, *([sequence] if sequence else []))


def _specs(x: jax.Array, sharding: CoreSharding) -> tuple[P, P]:
    """Partitions of x, weights or dy (B, [N,] D), and of index (B, [N])."""
    letters = "bn"[: x.ndim - 1]
    return sharding.spec(letters + "d"), sharding.spec(letters)
