"""What keeps tests quick, which compile much and run little."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles several times as fast as jax.jit, to slower code."""


def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal float32 numbers, drawn by numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
