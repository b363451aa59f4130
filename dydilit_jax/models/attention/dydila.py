"""Dynamic Differential Linear Attention (DyDiLA), arXiv 2601.13683.

    (1) dynamic projection    Q'_i = X_i W_Q^{u_i},  K'_i = X_i W_K^{v_i},  u, v routed top-1
    (2) dynamic measure       phi_g(z) = relu(z)^g ||relu(z)|| / ||relu(z)^g||, g_i routed top-1
    (3) token differential    Qd = phi(Q) - l_q phi(Q'),  Kd = phi(K) - l_k phi(K'), l routed
    (4) output                O = Qd (Kd^T V) / den + DWC(V)

(2) to (4) without the depthwise term are the operation kernels/dydila, (1) is
kernels/grouped_projection.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dydilit_jax.kernels import routing
from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas
from dydilit_jax.kernels.grouped_projection.api import grouped_projection
from dydilit_jax.models.attention.projections import (
    Context,
    SharedProjections,
    Telemetry,
    depthwise_term,
    fused_xavier,
    output_projection,
)
from dydilit_jax.models.config import AttentionConfig, ModelConfig
from dydilit_jax.models.linear import affine, kept
from dydilit_jax.models.placement import on_each_device

MEASURED = ("query", "key", "query_redundant", "key_redundant")
router_init = nnx.initializers.normal(0.02)


@jax.custom_vjp
def at_least_one(x: jax.Array) -> jax.Array:
    """max(x, 1), whose gradient also passes below 1 when a descent step would raise x again."""
    return jnp.maximum(x, 1.0)


def _at_least_one_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return at_least_one(x), x


def _at_least_one_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((x >= 1.0) | (gradient < 0.0), gradient, 0.0),)


at_least_one.defvjp(_at_least_one_forward, _at_least_one_backward)


def _split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


class ProjectorBank(nnx.Module):
    """Equation (1): n_P projectors D x D and their router; one alone is static."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, width = config.attention, config.width
        self.training = attention.router_training
        self.jitter = attention.router_jitter
        self.prefer = attention.backend
        count = attention.projectors
        self.kernel = nnx.Param(
            fused_xavier(rngs.params(), (count, width, width), jnp.dtype(jnp.float32))
        )
        self.router = (
            nnx.Param(router_init(rngs.params(), (width, count), jnp.float32))
            if count > 1
            else None
        )

    def __call__(
        self, x: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, routing.Routing | None]:
        """(B, N, D) to the redundancy Q' or K' (B, N, D), and what the router chose."""
        kernel = self.kernel[...]
        if self.router is None:
            return affine(x, kernel[0]), None
        jitter_key, choice_key = _split(key, 2)
        logits = kept(
            routing.router_logits(x, self.router[...], jitter=self.jitter, key=jitter_key)
        )
        chosen = routing.route(logits, self.training, key=choice_key)
        soft = self.training == "soft"

        def project(
            x: jax.Array, weights: jax.Array, choice: jax.Array, kernel: jax.Array
        ) -> jax.Array:
            return grouped_projection(
                x,
                kernel,
                weights,
                choice,
                straight_through=self.training != "switch",
                implementation="dense" if soft else None,
                prefer=self.prefer,
            )

        projected = on_each_device(
            project,
            (x, chosen.weights, chosen.choice, kernel),
            ("tokens", "tokens", "tokens", "columns"),
            "channels",
        )
        return kept(projected), chosen


class MeasureExponents(nnx.Module):
    """Equation (2)'s exponents: a bank of n_K scalars and a router for each measured tensor.

    `switch` scales what exceeds 1, so that exponents stay at 1 or above: g = 1 + p (g_j - 1).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, width = config.attention, config.width
        self.training = attention.router_training
        self.jitter = attention.router_jitter
        self.fixed = attention.exponent_init
        tensors = 4 if attention.projectors else 2
        count = attention.exponents
        self.bank = (
            nnx.Param(jnp.full((tensors, count), attention.exponent_init)) if count else None
        )
        self.routers = (
            nnx.Param(router_init(rngs.params(), (tensors, width, count), jnp.float32))
            if count > 1
            else None
        )

    def values(self) -> jax.Array:
        """The exponents as used, at 1 or above: (tensors, n_K)."""
        if self.bank is None:
            return jnp.full((1, 1), self.fixed)
        return at_least_one(self.bank[...])

    def __call__(
        self, tensors: list[jax.Array], key: jax.Array | None
    ) -> tuple[list[jax.Array], dict[str, routing.Routing]]:
        """Exponents (B, N), or scalars where nothing is routed, of each tensor (B, N, D)."""
        values = self.values()
        if self.routers is None:
            return [values[min(i, len(values) - 1), 0] for i in range(len(tensors))], {}
        exponents, routings = [], {}
        keys = _split(key, len(tensors))
        for i, tensor in enumerate(tensors):
            jitter_key, choice_key = _split(keys[i], 2)
            logits = kept(
                routing.router_logits(
                    tensor, self.routers[...][i], jitter=self.jitter, key=jitter_key
                )
            )
            chosen = routing.route(logits, self.training, key=choice_key)
            above_one = (values[i] - 1.0).astype(logits.dtype)
            weights = chosen.weights
            exponents.append(1.0 + jnp.sum(weights * above_one, axis=-1))
            routings[f"{MEASURED[i]}_exponent"] = chosen
        return exponents, routings


class LambdaBank(nnx.Module):
    """Equation (3)'s lambdas: one bank of n_D scalars, a router for queries and one for keys."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention, width = config.attention, config.width
        count = attention.lambdas
        self.fixed = attention.lambda_init
        self.bank = nnx.Param(jnp.full((count,), attention.lambda_init)) if count else None

        def router() -> nnx.Param | None:
            shape = (2 * width, count)
            return nnx.Param(router_init(rngs.params(), shape, jnp.float32)) if count > 1 else None

        self.query_router = router()
        self.key_router = router()

    def __call__(self) -> Lambdas:
        """The bank and its routers as the core takes them."""
        if self.bank is None:
            return Lambdas(jnp.float32(self.fixed))
        bank = self.bank[...]
        if self.query_router is None or self.key_router is None:
            return Lambdas(bank[0])
        return Lambdas(bank, self.query_router[...], self.key_router[...])


class DyDiLA(nnx.Module):
    """The attention: (B, N, D) to (B, N, D), with telemetry of its routers and learned scalars."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        attention = config.attention
        self.options = core_options(attention)
        self.implementation = attention.implementation or None
        self.qkv = SharedProjections(config, rngs=rngs)
        self.out = output_projection(config, rngs=rngs)
        differential = attention.projectors > 0
        self.query_bank = ProjectorBank(config, rngs=rngs) if differential else None
        self.key_bank = ProjectorBank(config, rngs=rngs) if differential else None
        self.lambdas = LambdaBank(config, rngs=rngs) if differential else None
        self.exponents = MeasureExponents(config, rngs=rngs)
        # The learned gain of RMSNorm, on the joined heads.
        self.gain = nnx.Param(jnp.ones((config.width,))) if attention.normalizer == "rms" else None
        self.depthwise = depthwise_term(config, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, Telemetry]:
        """Mixes tokens (B, N, D); also returns telemetry by name."""
        inputs, routings = self.core_inputs(x, context)
        output = dydila_core(inputs, self.options, implementation=self.implementation)
        mixed = output.output
        if self.gain is not None:
            # In the gain's dtype, in which its gradient is added up.
            mixed = (mixed * self.gain[...]).astype(mixed.dtype)
        if self.depthwise is not None:
            mixed = mixed + self.depthwise(inputs.value)
        telemetry = self.telemetry(routings | output.routings, output.denominator)
        return self.out(mixed), telemetry

    def core_inputs(
        self, x: jax.Array, context: Context
    ) -> tuple[CoreInputs, dict[str, routing.Routing]]:
        """Everything that the core reads for tokens (B, N, D), and what the routers chose."""
        query_key, key_key, exponent_key, lambda_key = _split(context.key, 4)
        query, key, value = self.qkv(x)
        x = x.astype(query.dtype)
        tensors, routings = [query, key], {}
        query_redundant = key_redundant = lambdas = None
        if self.query_bank is not None and self.key_bank is not None and self.lambdas is not None:
            query_redundant, chosen = self.query_bank(x, query_key)
            if chosen is not None:
                routings["query_projector"] = chosen
            key_redundant, chosen = self.key_bank(x, key_key)
            if chosen is not None:
                routings["key_projector"] = chosen
            tensors += [query_redundant, key_redundant]
            lambdas = self.lambdas()
        exponents, chosen_exponents = self.exponents(tensors, exponent_key)
        inputs = CoreInputs(
            query,
            key,
            value,
            exponents=Exponents(*exponents),
            query_redundant=query_redundant,
            key_redundant=key_redundant,
            lambdas=lambdas,
            rotation=context.rotation,
            noise_key=lambda_key,
        )
        return inputs, routings | chosen_exponents

    def telemetry(
        self, routings: dict[str, routing.Routing], denominator: jax.Array | None
    ) -> Telemetry:
        """Usage of each router, spread of the learned scalars, smallest denominator, balance."""
        values = self.exponents.values()
        telemetry = {"exponent_mean": values.mean(), "exponent_std": values.std()}
        if self.lambdas is not None:
            bank = self.lambdas().bank
            telemetry |= {"lambda_mean": bank.mean(), "lambda_std": bank.std()}
        if denominator is not None:
            telemetry["denominator_min"] = jnp.min(denominator)
        for name, chosen in routings.items():
            telemetry[f"usage/{name}"] = routing.usage(chosen)
        if routings:
            losses = [routing.load_balance_loss(chosen) for chosen in routings.values()]
            telemetry["load_balance"] = sum(losses) / jnp.float32(len(losses))
        return telemetry


def core_options(attention: AttentionConfig) -> CoreOptions:
    """The static options of the core that an attention's config stands for."""
    return CoreOptions(
        heads=attention.heads,
        normalizer=attention.normalizer,
        norm_scope=attention.norm_scope,
        router_training=attention.router_training,
        router_jitter=attention.router_jitter,
        eps=attention.eps,
    )
