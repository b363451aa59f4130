"""Hard top-1 routing with four ways to train the router.

A router is a linear map from a token to n logits. Written with a_i for the logits of token i,
p_i = softmax(a_i) and u_i = argmax_j a_ij, the weights w_i that a routed choice is made with are

    (1) ste      w_i = onehot(u_i) + p_i - stop_gradient(p_i)
    (2) gumbel   (1) with a_i + Gumbel noise in place of a_i (training only)
    (3) switch   w_i = p_iu onehot(u_i)                     Switch Transformer, arXiv 2101.03961
    (4) soft     w_i = p_i
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dydilit_jax.errors import unknown_name

ROUTER_TRAININGS = ("ste", "switch", "gumbel", "soft")


class Routing(NamedTuple):
    """What a router decided for each token.

    Attributes:
      weights: (..., n) float32, the weight of every choice; its gradient trains the router.
      choice: (...,) int32, the choice with the largest logit.
      probabilities: (..., n) float32, softmax of the logits.
    """

    weights: jax.Array
    choice: jax.Array
    probabilities: jax.Array


def router_logits(
    tokens: jax.Array, router: jax.Array, *, jitter: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Logits of a linear router, in float32 or better, so that its gradient is not rounded.

    Args:
      tokens: (..., D) of any floating dtype.
      router: (D, n).
      jitter: each component of a token is multiplied by uniform noise in [1 - jitter, 1 + jitter]
        before it is routed (Switch Transformer, section 2.4). Only with a key.
      key: PRNG key of the noise; None means no noise.

    Returns:
      (..., n) float32 (float64 for float64 tokens).
    """
    dtype = jnp.promote_types(tokens.dtype, jnp.float32)
    if jitter > 0.0 and key is not None:
        noise = jax.random.uniform(key, tokens.shape, dtype, 1.0 - jitter, 1.0 + jitter)
        tokens = (tokens.astype(dtype) * noise).astype(tokens.dtype)
    return jnp.matmul(tokens.astype(dtype), router.astype(dtype))


def route(logits: jax.Array, training: str, *, key: jax.Array | None = None) -> Routing:
    """Chooses one of n for each token; the equations are at the top of this file.

    Args:
      logits: (..., n) float32 or float64.
      training: one of ROUTER_TRAININGS.
      key: PRNG key of `gumbel`'s noise; None (sampling) means no noise.

    Raises:
      UserError: `training` is unknown.
    """
    if training not in ROUTER_TRAININGS:
        raise unknown_name("router training", training, ROUTER_TRAININGS)
    if training == "gumbel" and key is not None:
        logits = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    probabilities = jax.nn.softmax(logits, axis=-1)
    choice = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    onehot = jax.nn.one_hot(choice, logits.shape[-1], dtype=logits.dtype)
    if training == "soft":
        weights = probabilities
    elif training == "switch":
        weights = onehot * probabilities
    else:
        weights = onehot + (probabilities - jax.lax.stop_gradient(probabilities))
    return Routing(weights, choice, probabilities)


def usage(routing: Routing) -> jax.Array:
    """Share of the tokens that went to each choice: (n,), sums to one."""
    choices = routing.probabilities.shape[-1]
    onehot = jax.nn.one_hot(routing.choice, choices, dtype=routing.probabilities.dtype)
    return onehot.reshape(-1, choices).mean(axis=0)


def load_balance_loss(routing: Routing) -> jax.Array:
    """Switch Transformer's auxiliary loss, equation 4: n sum_j f_j P_j; 1 when balanced. Scalar."""
    choices = routing.probabilities.shape[-1]
    mean_probability = routing.probabilities.reshape(-1, choices).mean(axis=0)
    return choices * jnp.sum(jax.lax.stop_gradient(usage(routing)) * mean_probability)
