"""The attention core: every backend against the explicit N x N form in float64."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from dydilit_jax.errors import UserError
from dydilit_jax.kernels.dydila import pallas_tpu
from dydilit_jax.kernels.dydila.api import default_implementation, dydila_core
from dydilit_jax.kernels.dydila.features import (
    CoreInputs,
    CoreOptions,
    Exponents,
    Lambdas,
    choose_lambda,
)
from dydilit_jax.kernels.platform import tracing_for
from dydilit_jax.kernels.rotary import axial_rotation
from dydilit_jax.kernels.sharding import CoreSharding


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and parts of a problem; `options` are those of CoreOptions but heads."""

    batch: int = 2
    tokens: int = 37
    heads: int = 2
    head_width: int = 16
    choices: int = 5
    differential: bool = True
    measured: bool = True
    routed: bool = True
    noise: bool = False
    balance: float = 0.0
    options: tuple[tuple[str, Any], ...] = ()

    def core_options(self) -> CoreOptions:
        return CoreOptions(heads=self.heads, **dict(self.options))


def make(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> CoreInputs:
    random = np.random.default_rng(seed)
    width = case.heads * case.head_width
    shape = (case.batch, case.tokens, width)

    def tensor(shift: float = 0.0) -> jax.Array:
        return jnp.asarray(random.normal(shift, 1.0, shape), jnp.float32).astype(dtype)

    def exponent() -> jax.Array:
        return jnp.asarray(random.uniform(1.0, 4.0, shape[:2]), jnp.float32)

    inputs = CoreInputs(tensor(), tensor(), tensor())
    # What is not used is left out: a gradient of zero would tell nothing.
    if case.measured:
        pair = Exponents(exponent(), exponent())
        if case.differential:
            pair = pair._replace(query_redundant=exponent(), key_redundant=exponent())
        inputs = inputs._replace(exponents=pair)
    if case.differential:
        signed = dict(case.options).get("normalizer") == "signed"
        high = 0.2 if signed else 1.3  # above 1, but `signed` then divides by nearly nothing
        bank = jnp.asarray(np.linspace(0.0, high, case.choices), jnp.float32)
        routers = [
            jnp.asarray(random.normal(0.0, 0.5, (2 * width, case.choices)), jnp.float32)
            for _ in range(2)
        ]
        lambdas = Lambdas(bank, *routers) if case.routed else Lambdas(jnp.float32(0.4))
        inputs = inputs._replace(query_redundant=tensor(), key_redundant=tensor(), lambdas=lambdas)
    if case.noise:
        inputs = inputs._replace(noise_key=jax.random.key(3))
    return inputs


def named(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def run(
    case: Case, inputs: CoreInputs, implementation: str | None, sharding: CoreSharding | None = None
) -> dict[str, np.ndarray]:
    """Output, denominator, choices and every gradient, by name, in float64."""
    options = case.core_options()
    key = inputs.noise_key
    cotangent = np.random.default_rng(7).normal(size=inputs.query.shape)

    def loss(arrays: CoreInputs) -> Any:
        result = dydila_core(
            arrays._replace(noise_key=key),
            options,
            implementation=implementation,
            sharding=sharding,
        )
        total = jnp.sum(result.output * cotangent.astype(result.output.dtype))
        for chosen in result.routings.values():
            total += case.balance * jnp.sum(chosen.probabilities**2).astype(total.dtype)
        choices = {name: chosen.choice for name, chosen in result.routings.items()}
        return total, {"output": result.output, "den": result.denominator, "choice": choices}

    compiled = jax.jit(jax.grad(loss, has_aux=True))
    gradients, results = compiled(inputs._replace(noise_key=None))
    return named(results) | {f"d{name}": leaf for name, leaf in named(gradients).items()}


def kernel(case: Case, inputs: CoreInputs, **keywords: Any) -> dict[str, np.ndarray]:
    with tracing_for("tpu", interpret=True):
        return run(case, inputs, "pallas_tpu", **keywords)


def exact(case: Case, inputs: CoreInputs) -> dict[str, np.ndarray]:
    """The explicit N x N form in float64, from the same numbers."""
    with jax.enable_x64(True):
        return run(
            case,
            jax.tree.map(
                lambda x: jnp.asarray(np.asarray(x, np.float64), jnp.float64),
                inputs._replace(noise_key=None),
            )._replace(noise_key=inputs.noise_key),
            "reference",
        )


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30))


FLOOR = {"float32": 3e-6, "bfloat16": 2.0**-8}  # a rounding of bfloat16: the kernels' operands


def check(case: Case, inputs: CoreInputs) -> None:
    """Every result of the kernel is as near to float64 as XLA's of the same dtype, or nearly."""
    expected = exact(case, inputs)
    plain, actual = run(case, inputs, "xla"), kernel(case, inputs)
    assert set(actual) == set(expected)
    bad = {}
    for name, value in expected.items():
        assert np.isfinite(actual[name]).all(), name
        if "choice" in name:
            np.testing.assert_array_equal(actual[name], value, err_msg=name)
            continue
        allowed = 4 * error(plain[name], value) + FLOOR[str(inputs.query.dtype)]
        found = error(actual[name], value)
        if not found <= allowed:
            bad[name] = (found, allowed)
    assert not bad, bad


CASES = {
    "base": Case(),
    "two heads of two chunks": Case(batch=1, tokens=24, head_width=112),
    "balanced, gumbel off": Case(balance=0.5, options=(("router_training", "gumbel"),)),
    "signed, per head": Case(options=(("normalizer", "signed"), ("norm_scope", "head"))),
    "rms, switch": Case(options=(("normalizer", "rms"), ("router_training", "switch"))),
    "none, soft": Case(options=(("normalizer", "none"), ("router_training", "soft"))),
    "one lambda": Case(routed=False, options=(("norm_scope", "head"),)),
    "relu with a difference": Case(measured=False),
    "focused": Case(differential=False),
    "relu": Case(differential=False, measured=False),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_each_gradient_are_as_near_float64_as_xlas(name: str, dtype: str):
    check(CASES[name], make(CASES[name], jnp.dtype(dtype)))


@pytest.mark.parametrize("tokens", [1, 7, 127, 128, 129, 300, 1024])
def test_any_number_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pallas_tpu, "BLOCKS", (128,))
    case = Case(batch=1, tokens=tokens, head_width=8)
    inputs = make(case)
    expected, actual = run(case, inputs, "xla"), kernel(case, inputs)
    for name, value in expected.items():
        assert error(actual[name], value) < 2e-4, name


def test_padding_of_the_last_block_adds_nothing(monkeypatch: pytest.MonkeyPatch):
    """With mean keys in the difference (`signed`) and per-head norms, where padding could leak."""
    monkeypatch.setattr(pallas_tpu, "BLOCKS", (128,))
    case = Case(tokens=150, options=(("normalizer", "signed"), ("norm_scope", "head")))
    check(case, make(case, jnp.bfloat16))


@pytest.mark.parametrize(("heads", "head_width"), [(3, 24), (2, 72), (1, 288)])
def test_head_widths(heads: int, head_width: int):
    case = Case(batch=1, tokens=16, heads=heads, head_width=head_width)
    check(case, make(case, jnp.bfloat16))


def test_tokens_without_a_positive_entry():
    case = Case(tokens=12)
    inputs = make(case)
    dead = np.ones((case.batch, case.tokens, 1), np.float32)
    dead[:, ::3] = 0.0
    inputs = inputs._replace(
        query=jnp.where(dead > 0, inputs.query, -jnp.abs(inputs.query) - 0.1),
        key=jnp.where(dead > 0, inputs.key, -jnp.abs(inputs.key) - 0.1),
        key_redundant=-jnp.abs(inputs.value) - 0.1,
    )
    check(case, inputs)


def test_gumbel_noise_is_that_of_the_plain_path():
    case = Case(noise=True, options=(("router_training", "gumbel"),))
    inputs = make(case)
    quiet = run(case, inputs._replace(noise_key=None), "xla")
    expected, actual = run(case, inputs, "xla"), kernel(case, inputs)
    assert (expected["['choice']['key_lambda']"] != quiet["['choice']['key_lambda']"]).any()
    for name, value in expected.items():
        assert error(actual[name], value) < 1e-4, name


def test_twice_the_same_bits():
    case = CASES["base"]
    inputs = make(case, jnp.bfloat16)
    first, second = kernel(case, inputs), kernel(case, inputs)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_no_races(monkeypatch: pytest.MonkeyPatch):
    """The TPU interpreter finds reads and writes that no order of the grid's steps excuses."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    monkeypatch.setattr(pallas_tpu, "BLOCKS", (128,))
    case = Case(tokens=130, heads=1, head_width=8, choices=2)
    inputs = make(case)
    expected = run(case, inputs, "xla")
    with tracing_for("tpu", interpret=pltpu.InterpretParams(detect_races=True)):
        actual = run(case, inputs, "pallas_tpu")
    for name, value in expected.items():
        assert error(actual[name], value) < 2e-4, name
    races = interpret_pallas_call.races
    assert races is not None
    assert not races.races_found


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    eighths=st.integers(1, 4),
    normalizer=st.sampled_from(["base", "none", "rms"]),
    norm_scope=st.sampled_from(["token", "head"]),
    training=st.sampled_from(["ste", "switch", "soft"]),
    measured=st.booleans(),
)
def test_any_shape(
    batch: int,
    tokens: int,
    heads: int,
    eighths: int,
    normalizer: str,
    norm_scope: str,
    training: str,
    measured: bool,
):
    options = (
        ("normalizer", normalizer),
        ("norm_scope", norm_scope),
        ("router_training", training),
    )
    case = Case(batch, tokens, heads, 8 * eighths, measured=measured, options=options)
    check(case, make(case, seed=tokens))


def mesh_of(**axes: int) -> Any:
    kinds = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


@pytest.mark.parametrize(
    "options",
    [(("norm_scope", "token"),), (("normalizer", "rms"), ("norm_scope", "head"))],
    ids=["base", "rms"],
)
def test_split_over_a_mesh_equals_unsplit(options: Any):
    case = Case(batch=4, tokens=32, head_width=8, balance=0.1, options=options)
    inputs = make(case)
    expected = kernel(case, inputs)
    sharding = CoreSharding(mesh_of(data=2, fsdp=1, sequence=4), ("data", "fsdp"), "sequence")
    actual = kernel(case, inputs, sharding=sharding)
    for name, value in expected.items():
        assert error(actual[name], value) < 2e-5, name


def test_the_mesh_that_is_set_is_used():
    """Batch over two axes, without a sequence axis: one kernel for each device's sequences."""
    case = Case(batch=8, tokens=16, head_width=8)
    inputs = make(case)
    expected = run(case, inputs, "xla")
    with jax.set_mesh(mesh_of(data=4, fsdp=2)):
        actual = kernel(case, inputs)
    for name, value in expected.items():
        assert error(actual[name], value) < 2e-5, name


def test_a_long_sequence_over_eight_devices_equals_the_unsplit_one():
    """65,536 tokens: XLA partitions its own path, and the sums over tokens stay exact enough."""
    case = Case(batch=1, tokens=65536, heads=1, head_width=8, choices=2)
    inputs = make(case)
    options = case.core_options()
    core = jax.jit(lambda i: dydila_core(i, options, implementation="xla").output)
    expected = core(inputs)
    mesh = mesh_of(data=1, sequence=8)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = inputs._replace(lambdas=jax.device_put(inputs.lambdas, whole))
    split = {"query", "key", "value", "query_redundant", "key_redundant", "exponents"}
    placed = placed._replace(**{n: jax.device_put(getattr(placed, n), spec) for n in split})
    actual = core(placed)
    assert len(actual.sharding.device_set) == 8
    # Sums of 65,536 in another order; without the sum over devices it would be of order one.
    assert error(np.asarray(actual), np.asarray(expected)) < 5e-4


BASE = Case(tokens=160, head_width=8)
MISTAKES: dict[str, tuple[CoreInputs, dict[str, Any], str]] = {
    "float16": (make(BASE, jnp.float16), {}, "bfloat16 or all float32, got float16"),
    "narrow": (make(Case(head_width=12)), {}, "head width 12: must be a multiple of 8"),
    "rotary": (
        make(Case(tokens=16))._replace(rotation=axial_rotation((4, 4), 16)),
        {},
        "rotary position is not built in",
    ),
    "jitter": (
        make(Case(noise=True)),
        {"router_jitter": 0.1},
        "router_jitter is not built in",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_named_backend_says_why_it_cannot_run(name: str):
    inputs, keywords, message = MISTAKES[name]
    options = CoreOptions(heads=2, **keywords)
    with tracing_for("tpu"), pytest.raises(UserError, match=message):
        dydila_core(inputs, options, implementation="pallas_tpu")
    with tracing_for("tpu"):
        assert default_implementation(inputs, options, None) == "xla"


def test_shapes_that_do_not_belong_together_are_named():
    inputs, options = make(Case(tokens=4)), CoreOptions(heads=2)
    exponents, lambdas = inputs.exponents, inputs.lambdas
    assert exponents is not None
    assert lambdas is not None
    mistakes: dict[str, dict[str, Any]] = {
        r"value has shape \(2, 3, 32\)": {"value": inputs.value[:, :3]},
        r"exponent of key has shape \(2,\), expected a scalar or \(2, 4\)": {
            "exponents": exponents._replace(key=jnp.ones(2))
        },
        r"key_router has shape \(32, 5\), expected \(64, 5\)": {
            "lambdas": lambdas._replace(key_router=jnp.ones((32, 5)))
        },
        "need lambdas": {"lambdas": None},
        "or neither": {"key_redundant": None},
    }
    for message, fields in mistakes.items():
        with pytest.raises(UserError, match=message):
            dydila_core(inputs._replace(**fields), options)
    with pytest.raises(UserError, match="not divisible by 3 heads"):
        dydila_core(inputs, CoreOptions(heads=3))


def test_a_sequence_that_the_mesh_does_not_divide():
    sharding = CoreSharding(mesh_of(data=1, sequence=8), ("data",), "sequence")
    run = partial(dydila_core, make(Case()), CoreOptions(heads=2), sharding=sharding)
    with tracing_for("tpu"), pytest.raises(UserError, match="37 tokens are not divisible by mesh"):
        run(implementation="pallas_tpu")


def test_a_backend_of_another_platform():
    with pytest.raises(UserError, match="it is for tpu, this program is for cpu"):
        dydila_core(make(BASE), CoreOptions(heads=2), implementation="pallas_tpu")


def test_what_is_chosen_unasked():
    inputs, options = make(BASE), CoreOptions(heads=2)
    on_mesh = CoreSharding(mesh_of(data=2, fsdp=4), ("data",))
    assert default_implementation(inputs, options, on_mesh) == "xla"  # this is a CPU
    with tracing_for("tpu"):
        assert default_implementation(inputs, options, on_mesh) == "pallas_tpu"
        # Eight devices, and nothing says how the arrays lie on them.
        assert default_implementation(inputs, options, None) == "xla"
        short = make(Case(tokens=16))
        assert default_implementation(short, options, on_mesh) == "xla"
    fewer_than_wide = make(Case(batch=8, tokens=8))
    assert default_implementation(fewer_than_wide, options, on_mesh) == "reference"
    split = CoreSharding(mesh_of(data=1, sequence=8), ("data",), "sequence")
    assert default_implementation(fewer_than_wide, options, split) == "xla"


@pytest.mark.parametrize("normalizer", ["base", "signed"])
def test_the_order_for_few_tokens_equals_the_linear_one(normalizer: str):
    """7 tokens, heads of 16: unasked (Q K^T) V, which differs by rounding in float64."""
    case = Case(tokens=7, options=(("normalizer", normalizer),))
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), make(case))
        options = case.core_options()
        program = jax.make_jaxpr(lambda i: dydila_core(i, options).output)(inputs)
        assert "2,2,7,7" in str(program)
        actual, expected = run(case, inputs, None), run(case, inputs, "xla")
    for name, value in expected.items():
        assert error(actual[name], value) < 1e-9, name


def test_the_lambda_router_reads_phi_and_phi_of_the_redundancy():
    """Against numpy; and tokens whose channels a mesh splits stay where they are."""
    inputs = make(Case())
    assert inputs.lambdas is not None
    bank, router, _ = inputs.lambdas
    assert router is not None
    phi, redundant = jnp.abs(inputs.query), jnp.abs(inputs.value)
    choose = partial(choose_lambda, options=CoreOptions(heads=2), key=None)
    value, chosen = choose(phi, redundant, bank, router)
    joined = np.concatenate([phi, redundant], axis=-1).astype(np.float64)
    choice = (joined @ np.asarray(router, np.float64)).argmax(axis=-1)
    assert chosen is not None
    np.testing.assert_array_equal(chosen.choice, choice)
    np.testing.assert_allclose(value[..., 0], np.asarray(bank)[choice], rtol=1e-6)

    sharding = jax.sharding.NamedSharding(
        mesh_of(tensor=8), jax.sharding.PartitionSpec(None, None, "tensor")
    )
    split = [jax.device_put(x, sharding) for x in (phi, redundant)]
    text = jax.jit(lambda *x: choose(*x)[0]).lower(*split, bank, router).compile().as_text()
    assert text is not None
    assert "all-reduce" in text
    # Rows of the small router move; joined, phi and phi' were gathered on every device.
    assert not re.search(r"\[2,37,\d+\]\S* (all-to-all|collective-permute|all-gather)", text)
