"""Linear maps in a lower precision whose weights' gradients are summed in the weights' own.

With bfloat16 computation automatic differentiation rounds each device's share of dW to bfloat16
before the shares are added up over the mesh, because dW has the dtype of the rounded W. Here

    y  = x W + b                                 in x.dtype
    dx = dy W^T                                  in x.dtype
    dW = sum over tokens of x^T dy,  db = sum over tokens of dy      in W's dtype, float32

so what crosses the mesh, and what gradient accumulation adds up, is float32.

The rule that does so hides the product from those of `jax.checkpoint`'s policies that look for
`dot_general`; results carry a name (`kept`) instead, in every dtype.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dydilit_jax.models.placement import is_cut

KEPT = "linear map"


def kept(y: jax.Array) -> jax.Array:
    """`y` as it is, marked as the result of a linear map, for models/rematerialisation.py."""
    return checkpoint_name(y, KEPT)


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x W + b with gradients of W and b in their own dtype.

    Args:
      x: (..., D) of any floating dtype, which is the products'.
      kernel: (D, *E).
      bias: (*E,) or None.

    Returns:
      (..., *E) in `x.dtype`.
    """
    if kernel.dtype == x.dtype:  # Automatic differentiation does the same, in both modes.
        y = jnp.tensordot(_rows(x), kernel, 1).reshape(*x.shape[:-1], *kernel.shape[1:])
        return kept(y if bias is None else y + bias)
    y = _product(x, kernel)
    return kept(y if bias is None else _add(y, bias))


def _rows(x: jax.Array) -> jax.Array:
    """x (..., D) as (T, D), where no mesh cuts the tokens, which could not be joined then.

    Of more than one axis of tokens XLA's CPU back end makes a transposed copy for dW, into which it
    fuses what dy is computed from, at strides: with GELU before it, MLP's forward and backward at
    8 x 256 x 384 takes 122 ms with two axes and 54 ms with one (2 cores of an x86-64 machine).
    """
    return x if is_cut("sequence") else x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), 1)


def _product_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return _product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    outputs, leading = kernel.ndim - 1, x.ndim - 1
    over_outputs = (range(leading, dy.ndim), range(1, kernel.ndim))
    dx = lax.dot_general(dy, kernel.astype(x.dtype), (over_outputs, ((), ())))
    over_tokens = (range(leading), range(dy.ndim - outputs))
    dkernel = lax.dot_general(x, dy, (over_tokens, ((), ())), preferred_element_type=kernel.dtype)
    return dx, dkernel


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + bias.astype(y.dtype)


def _add_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _add(y, bias), bias


def _add_backward(bias: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    tokens = tuple(range(dy.ndim - bias.ndim))
    return dy, jnp.sum(dy, axis=tokens, dtype=bias.dtype)


_add.defvjp(_add_forward, _add_backward)


class Linear(nnx.Linear):
    """flax's Linear, same parameters and initialisation, computed by `affine`."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Maps the last axis: (..., in_features) to (..., out_features) in the module's dtype."""
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype or self.param_dtype
        return affine(inputs.astype(dtype), self.kernel[...], bias)
