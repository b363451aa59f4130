"""Parameters and multiply-adds against the published figures and against the traced program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dydilit_jax.models.config import ModelConfig, size_fields
from dydilit_jax.models.count import (
    abstract_parameters,
    count_parameters,
    multiply_adds,
    parameter_table,
)
from dydilit_jax.models.dydilit import DyDiLiT

# DiT (arXiv 2212.09748), table 1 and table 4: parameters in millions, "Gflops" at 256 px, patch 2.
DIT = {"S": (32.9, 6.06), "B": (130, 23.0), "L": (458, 80.7), "XL": (675, 118.6)}


def network(size: str, attention: str, feedforward: str) -> ModelConfig:
    return ModelConfig(**size_fields(size, attention, feedforward))


@pytest.mark.parametrize("size", DIT)
def test_dit_figures(size):
    config = network(size, "softmax", "mlp")
    millions, gmacs = DIT[size]
    # DiT predicts noise and variance, and counts its fixed position table.
    parameters = count_parameters(config, 8) + config.tokens * config.width
    assert parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert sum(multiply_adds(config, 8).values()) / 1e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("size", "millions"), [("S", 44.0), ("B", 173.7), ("L", 611.4), ("XL", 901.1)]
)
def test_three_projectors_add_what_arithmetic_says(size, millions):
    config = network(size, "dydila", "mlp")
    parameters = count_parameters(config, 8) + config.tokens * config.width
    assert parameters / 1e6 == pytest.approx(millions, rel=0.005)


def test_every_projector_costs_its_product():
    config = network("S", "dydila", "mlp")
    routed, dense = (
        sum(multiply_adds(config, every_projector=every).values()) for every in (False, True)
    )
    assert dense - routed == 12 * 2 * 2 * 256 * 384 * 384


def dot_multiply_adds(jaxpr, times: int = 1) -> int:
    """Multiply-adds of all dot_generals in a jaxpr, those in scans counted for each turn."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            out = equation.outvars[0].aval.size
            depth = 1
            for axis in contracted:
                depth *= equation.invars[0].aval.shape[axis]
            total += times * out * depth
        inner_times = times * equation.params.get("length", 1)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += dot_multiply_adds(inner, inner_times)
    return total


@pytest.mark.parametrize(("attention", "feedforward"), [("softmax", "mlp"), ("relu", "mlp")])
def test_count_equals_the_traced_products(attention, feedforward):
    config = network("tiny", attention, feedforward)
    if attention == "relu":
        config = dataclasses.replace(
            config, attention=dataclasses.replace(config.attention, depthwise=0)
        )
    graph, _ = nnx.split(nnx.eval_shape(lambda: DyDiLiT(config, rngs=nnx.Rngs(0))))
    jaxpr = jax.make_jaxpr(lambda p, *a: nnx.merge(graph, p)(*a)[0])(
        abstract_parameters(config),
        jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert sum(multiply_adds(config).values()) == pytest.approx(
        dot_multiply_adds(jaxpr.jaxpr), rel=0.002
    )


def test_table_sums_to_the_count():
    config = network("XL", "dydila", "mix")
    rows = parameter_table(abstract_parameters(config))
    assert sum(count for *_, count in rows) == count_parameters(config)
    assert ("blocks/attention/query_bank/kernel", (28, 3, 1152, 1152), "float32") in [
        row[:3] for row in rows
    ]
