"""The GPU core as one operation with its own derivative, over a mesh or on one device."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from dydilit_jax.kernels.dydila.pallas_gpu_passes import (
    Arguments,
    Result,
    Saved,
    Static,
    local_backward,
    local_forward,
)
from dydilit_jax.kernels.dydila.pallas_gpu_scalars import Side
from dydilit_jax.kernels.dydila.pallas_gpu_sums import Sums
from dydilit_jax.kernels.sharding import CoreSharding


def specs(sharding: CoreSharding, arguments: Arguments) -> Arguments:
    """How the arguments, or their gradients, lie on the mesh: specs where arrays are declared."""

    def of_side(side: Side) -> Side:
        tokens = tuple(sharding.spec("bnd") for _ in side.tokens)
        exponents = tuple(sharding.spec("bn") for _ in side.exponents)
        router, noise = (
            None if x is None else sharding.spec(names)
            for x, names in ((side.router, "dj"), (side.noise, "bnj"))
        )
        return Side(tokens, exponents, router, noise)  # type: ignore[arg-type]

    query, key, _, bank = arguments
    of_bank = None if bank is None else sharding.spec("j" * bank.ndim)
    return of_side(query), of_side(key), sharding.spec("bnd"), of_bank  # type: ignore[return-value]


def result_specs(static: Static) -> tuple[Result, Saved]:
    """How `local_forward`'s results lie on the mesh: specs where arrays are declared."""
    sharding, core = static.sharding, static.core
    assert sharding is not None
    row = sharding.spec("bgn") if core.powered else None
    logits = sharding.spec("bgjn") if core.choices else None
    sums = Sums(row, row, row, row, logits)
    each = (sums,) * (1 + core.differential)
    den = None if core.normalizer == "none" else sharding.spec("bhn")
    of_logits = sharding.spec("bnj") if core.choices else None
    state = sharding.spec("bhde"), sharding.spec("bhd")
    result = Result(sharding.spec("bnd"), den, of_logits, of_logits)  # type: ignore[arg-type]
    return result, Saved(each, each, *state, den)  # type: ignore[arg-type]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(static: Static, *arguments: Any) -> Result:
    """The core of all devices' tokens.

    Args:
      static: fixed part.
      *arguments: `Arguments`; values (B, N, D) bfloat16, lambdas (n,) or () float32, or None.
    """
    return _run(static, arguments, saving=False)[0]


def _run(static: Static, arguments: Any, *, saving: bool) -> tuple[Result, Saved | None]:
    run = partial(local_forward, static, saving)
    sharding = static.sharding
    if sharding is not None:
        of_result, of_saved = result_specs(static)
        run = jax.shard_map(
            run,
            mesh=sharding.mesh,
            in_specs=(specs(sharding, arguments),),
            out_specs=(of_result, of_saved if saving else None),
            check_vma=False,
        )
    return run(arguments)


def _forward(static: Static, *arguments: Any) -> tuple[Result, tuple[Arguments, Saved | None]]:
    result, saved = _run(static, arguments, saving=True)
    return result, (arguments, saved)


def _backward(static: Static, known: tuple[Arguments, Saved], cotangents: Result) -> Arguments:
    arguments, saved = known
    run = partial(local_backward, static)
    sharding = static.sharding
    if sharding is not None:
        of_arguments = specs(sharding, arguments)
        of_result, of_saved = result_specs(static)
        query, key, *rest = of_arguments
        run = jax.shard_map(
            run,
            mesh=sharding.mesh,
            in_specs=(of_arguments, of_saved, of_result),
            out_specs=(query._replace(noise=None), key._replace(noise=None), *rest),
            check_vma=False,
        )
    return run(arguments, saved, cotangents)


fused.defvjp(_forward, _backward)
