"""DyDiLA against independent computations in float64, and method's exact identities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dydilit_jax.errors import UserError
from dydilit_jax.kernels.dydila.api import dydila_core
from dydilit_jax.kernels.dydila.features import CoreInputs, CoreOptions, Exponents, Lambdas
from dydilit_jax.kernels.dydila.reference import attention_weights
from dydilit_jax.kernels.platform import recording_choices, tracing_for
from dydilit_jax.models.attention.dydila import DyDiLA, at_least_one
from dydilit_jax.models.attention.projections import Context
from dydilit_jax.models.attention.registry import ATTENTION_MODULES
from dydilit_jax.models.config import AttentionConfig, ModelConfig

BATCH, WIDTH = 2, 16


def config(**attention) -> ModelConfig:
    fields = {"heads": 2, **attention}
    return ModelConfig(
        image_size=8,
        patch_size=2,
        width=WIDTH,
        depth=2,
        position="none",
        attention=AttentionConfig(**fields),
    )


def build(model: ModelConfig, seed: int = 0, spread: float = 0.25) -> nnx.Module:
    """A token mixer whose every parameter, learned scalars and biases too, is drawn at random.

    Queries and keys are shifted so that no head of a token is all negative, whose denominator is
    next to nothing and makes every comparison one of rounding; other tests are about those.
    """
    module = ATTENTION_MODULES[model.attention.kind](model, rngs=nnx.Rngs(seed))
    graph, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    parameters = jax.tree.map(
        lambda leaf: leaf + spread * jax.random.normal(next(keys), leaf.shape),
        nnx.to_pure_dict(state),
    )
    parameters["qkv"]["bias"] = parameters["qkv"]["bias"].at[:2].add(1.5)
    return nnx.merge(graph, parameters)


def tokens(model: ModelConfig, scale: float = 1.0, seed: int = 7) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (BATCH, model.tokens, model.width))


# An independent DyDiLA: float64, one token at a time, straight from the equations.


def numpy_measure(z: np.ndarray, exponent: float) -> np.ndarray:
    positive = np.maximum(z, 0.0) + 1e-6
    power = positive**exponent
    return power * np.linalg.norm(positive) / np.linalg.norm(power)


def numpy_depthwise(v: np.ndarray, kernel: np.ndarray, bias: np.ndarray, side: int) -> np.ndarray:
    size, width = kernel.shape[0], v.shape[-1]
    padded = np.zeros((side + size - 1, side + size - 1, width))
    padded[size // 2 : size // 2 + side, size // 2 : size // 2 + side] = v.reshape(side, side, -1)
    out = np.zeros((side, side, width))
    for row in range(side):
        for column in range(side):
            window = padded[row : row + size, column : column + size]
            out[row, column] = (window * kernel).sum((0, 1)) + bias
    return out.reshape(-1, width)


def numpy_dydila(x: np.ndarray, p: dict, model: ModelConfig) -> np.ndarray:
    heads, side = model.attention.heads, model.grid[0]
    width = x.shape[-1] // heads
    out = np.zeros_like(x)
    for b, image in enumerate(x):
        query, key, value = (
            image @ p["qkv"]["kernel"][:, i] + p["qkv"]["bias"][i] for i in range(3)
        )
        features = {name: np.zeros_like(query) for name in ("q", "k", "base_q", "base_k")}
        for n, token in enumerate(image):
            for i, (name, z) in enumerate((("q", query[n]), ("k", key[n]))):
                bank = p["query_bank" if name == "q" else "key_bank"]
                redundant = token @ bank["kernel"][np.argmax(token @ bank["router"])]
                exponents = p["exponents"]
                chosen = [
                    max(exponents["bank"][j][np.argmax(t @ exponents["routers"][j])], 1.0)
                    for j, t in ((i, z), (i + 2, redundant))
                ]
                base = numpy_measure(z, chosen[0])
                other = numpy_measure(redundant, chosen[1])
                router = p["lambdas"]["query_router" if name == "q" else "key_router"]
                lam = p["lambdas"]["bank"][np.argmax(np.concatenate([base, other]) @ router)]
                features[name][n] = base - lam * other
                features[f"base_{name}"][n] = base
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            weights = features["q"][:, part] @ features["k"][:, part].T
            base_weights = features["base_q"][:, part] @ features["base_k"][:, part].T
            den = base_weights.sum(1, keepdims=True) / len(image) + model.attention.eps
            out[b][:, part] = (weights @ value[:, part]) / len(image) / den
        depthwise = p["depthwise"]
        out[b] += numpy_depthwise(value, depthwise["kernel"], depthwise["bias"], side)
    return out @ p["out"]["kernel"] + p["out"]["bias"]


def test_dydila_equals_the_equations_token_by_token():
    model = config()
    module = build(model)
    x = tokens(model)
    parameters = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.split(module)[1])
    )
    expected = numpy_dydila(np.asarray(x, np.float64), parameters, model)
    actual, _ = module(x, Context())
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-5)


def core_inputs(seed: int = 0, count: int = 13, width: int = 12, exponent: float = 2.5):
    keys = jax.random.split(jax.random.key(seed), 8)
    q, k, v, q2, k2 = (jax.random.normal(key, (BATCH, count, width)) for key in keys[:5])
    exponents = 1.0 + exponent * jax.random.uniform(keys[5], (4, BATCH, count))
    routers = jax.random.normal(keys[6], (2, 2 * width, 4))
    lambdas = Lambdas(jax.random.uniform(keys[7], (4,)), routers[0], routers[1])
    return CoreInputs(q, k, v, Exponents(*exponents), q2, k2, lambdas)


@pytest.mark.parametrize("normalizer", ["base", "signed", "none", "rms"])
@pytest.mark.parametrize("norm_scope", ["token", "head"])
def test_linear_order_equals_the_explicit_form(normalizer, norm_scope):
    options = CoreOptions(heads=3, normalizer=normalizer, norm_scope=norm_scope)
    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), core_inputs())
        linear = dydila_core(inputs, options, implementation="xla")
        explicit = dydila_core(inputs, options, implementation="reference")
        np.testing.assert_allclose(linear.output, explicit.output, rtol=1e-9, atol=1e-9)
        if normalizer != "rms":
            weights = attention_weights(inputs, options)
            value = inputs.value.reshape(BATCH, -1, 3, 4)
            product = jnp.einsum("bhnm,bmhe->bnhe", weights, value).reshape(inputs.value.shape)
            np.testing.assert_allclose(product, explicit.output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalizer", ["base", "signed", "none", "rms"])
def test_gradients_of_both_orders_agree(normalizer):
    options = CoreOptions(heads=3, normalizer=normalizer)

    def loss(inputs, implementation):
        output = dydila_core(inputs, options, implementation=implementation).output
        return jnp.sum(output * jnp.cos(jnp.arange(output.size).reshape(output.shape)))

    with jax.enable_x64(True):
        inputs = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), core_inputs())
        linear = jax.grad(loss)(inputs, "xla")
        explicit = jax.grad(loss)(inputs, "reference")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(linear), jax.tree.leaves(explicit), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9, err_msg=str(path))


def without_difference(inputs: CoreInputs) -> CoreInputs:
    return inputs._replace(query_redundant=None, key_redundant=None, lambdas=None)


def test_lambda_zero_is_focused_attention():
    options = CoreOptions(heads=3)
    inputs = core_inputs()
    zero = inputs._replace(lambdas=inputs.lambdas._replace(bank=jnp.zeros(4)))
    expected = dydila_core(without_difference(inputs), options).output
    np.testing.assert_allclose(dydila_core(zero, options).output, expected, rtol=1e-6, atol=1e-6)


def test_lambda_zero_and_exponent_one_is_relu_attention():
    options = CoreOptions(heads=3)
    inputs = core_inputs()
    ones = Exponents(*(jnp.ones_like(e) for e in inputs.exponents))
    plain = inputs._replace(exponents=ones, lambdas=inputs.lambdas._replace(bank=jnp.zeros(4)))
    q, k, v = (
        np.asarray(a, np.float64).reshape(BATCH, -1, 3, 4)
        for a in (inputs.query, inputs.key, inputs.value)
    )
    q, k = np.maximum(q, 0), np.maximum(k, 0)
    weights = np.einsum("bnhd,bmhd->bhnm", q, k)
    total = weights.sum(-1, keepdims=True) + options.eps * weights.shape[-1]
    expected = np.einsum("bhnm,bmhe->bnhe", weights / total, v)
    actual = dydila_core(plain, options).output.reshape(expected.shape)
    # Where a head sees no positive entry at all, relu gives zero and phi the mean of the values.
    alive = weights.sum(-1).transpose(0, 2, 1) > 1e-2
    assert alive.mean() > 0.8
    np.testing.assert_allclose(actual[alive], expected[alive], rtol=2e-3, atol=2e-4)


def test_modules_without_their_parts_are_the_baselines():
    """DyDiLA with no projectors and a fixed exponent is `focused`, on the same weights."""
    model = config(projectors=0, exponents=0)
    dydila = build(model)
    focused_model = dataclasses.replace(model, attention=AttentionConfig(kind="focused", heads=2))
    graph, _ = nnx.split(ATTENTION_MODULES["focused"](focused_model, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(nnx.split(dydila)[1])
    parameters.pop("exponents", None)
    focused = nnx.merge(graph, parameters)
    x = tokens(model)
    np.testing.assert_allclose(dydila(x, Context())[0], focused(x, Context())[0], rtol=1e-5)


@pytest.mark.parametrize("training", ["ste", "switch", "gumbel"])
def test_grouped_projection_equals_dense_in_the_module(training, monkeypatch):
    """Output and every gradient, with the module's own router in the loop."""
    from dydilit_jax.models.attention import dydila

    model = config(router_training=training)
    graph, state = nnx.split(build(model))
    parameters = nnx.to_pure_dict(state)
    x = tokens(model)

    def loss(parameters, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, parameters)(x, Context(key=jax.random.key(3)))[0]))

    results = {}
    plain = dydila.grouped_projection
    for implementation in ("dense", "blocks"):
        monkeypatch.setattr(
            dydila,
            "grouped_projection",
            lambda *a, implementation, forced=implementation, **k: plain(
                *a, implementation=forced, **k
            ),
        )
        results[implementation] = jax.value_and_grad(loss, argnums=(0, 1))(parameters, x)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=2e-4, atol=2e-5, err_msg=str(path)
        ),
        results["blocks"],
        results["dense"],
    )
    gradients = results["blocks"][1][0]
    assert float(jnp.abs(gradients["query_bank"]["router"]).max()) > 0


def test_permuting_tokens_permutes_the_output():
    model = config(depthwise=0)
    module = build(model)
    x = tokens(model)
    order = np.random.default_rng(0).permutation(model.tokens)
    permuted = module(x[:, order], Context())[0]
    np.testing.assert_allclose(permuted, module(x, Context())[0][:, order], rtol=2e-4, atol=2e-5)


def central_difference(function, x: np.ndarray, direction: np.ndarray, step: float) -> float:
    return float((function(x + step * direction) - function(x - step * direction)) / (2 * step))


@pytest.mark.parametrize("normalizer", ["base", "signed", "none", "rms"])
@pytest.mark.parametrize("training", ["switch", "soft"])
def test_gradients_against_finite_differences(normalizer, training):
    """In float64, along random directions, with routers whose output is continuous in them.

    Only directions that leave every argmax and every relu where it is are comparable; the step is
    small enough for that here, and `ste` has no finite difference by construction.
    """
    with jax.enable_x64(True):
        model = dataclasses.replace(
            config(normalizer=normalizer, router_training=training, projectors=2, exponents=3),
            dtype="float64",
        )
        graph, state = nnx.split(build(model, spread=0.3))
        parameters = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.to_pure_dict(state)
        )
        # Away from the kink at 1, and a difference large enough to be seen.
        parameters["exponents"]["bank"] = jnp.abs(parameters["exponents"]["bank"]) + 1.5
        x = jnp.asarray(tokens(model), jnp.float64)
        weight = jnp.cos(jnp.arange(x.size, dtype=jnp.float64)).reshape(x.shape)

        @jax.jit
        def loss(parameters, x):
            return jnp.sum(weight * nnx.merge(graph, parameters)(x, Context())[0])

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(parameters, x)
        leaves = [
            *jax.tree_util.tree_leaves_with_path((parameters, x)),
        ]
        rng = np.random.default_rng(0)
        for (path, leaf), gradient in zip(leaves, jax.tree.leaves(gradients), strict=True):
            direction = rng.standard_normal(leaf.shape)

            def along(moved, path=path):
                changed = jax.tree_util.tree_map_with_path(
                    lambda p, old: moved if p == path else old, (parameters, x)
                )
                return loss(*changed)

            numeric = central_difference(along, np.asarray(leaf), direction, 1e-7)
            analytic = float(np.sum(direction * np.asarray(gradient)))
            np.testing.assert_allclose(
                analytic, numeric, rtol=1e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path)
            )


def test_straight_through_gradient_is_that_of_the_soft_mixture_at_the_choice():
    """ste: d/dlogits of (onehot + p - sg(p)) . g is the softmax Jacobian times g."""
    from dydilit_jax.kernels.routing import route

    logits = jnp.asarray([[0.3, -0.2, 0.9]])
    g = jnp.asarray([2.0, 5.0, 3.0])
    gradient = jax.grad(lambda a: jnp.sum(route(a, "ste").weights * g))(logits)
    p = np.exp(np.asarray(logits[0])) / np.exp(np.asarray(logits[0])).sum()
    expected = (np.diag(p) - np.outer(p, p)) @ np.asarray(g)
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)
    np.testing.assert_allclose(route(logits, "ste").weights, [[0.0, 0.0, 1.0]], atol=1e-7)


def test_exponents_stay_at_one_and_can_rise_again():
    x = jnp.asarray([0.5, 0.5, 2.0])
    np.testing.assert_array_equal(at_least_one(x), [1.0, 1.0, 2.0])
    upward, downward = jnp.asarray([-1.0, 1.0, 1.0]), jnp.asarray([0.0, 0.0, 0.0])
    gradient = jax.vjp(at_least_one, x)[1](upward)[0]
    np.testing.assert_array_equal(gradient, [-1.0, 0.0, 1.0])
    np.testing.assert_array_equal(jax.vjp(at_least_one, x)[1](downward)[0], downward)


EXTREMES = {
    "zero": lambda shape: np.zeros(shape),
    "all_negative": lambda shape: -np.ones(shape),
    "large": lambda shape: 30.0 * np.sign(np.random.default_rng(0).standard_normal(shape)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extreme", EXTREMES)
@pytest.mark.parametrize("kind", ["dydila", "relu", "focused"])
def test_extreme_tokens_give_finite_values_and_gradients(kind, extreme, dtype):
    """The projected tokens themselves are the extreme ones: the projections are the identity."""
    model = dataclasses.replace(config(kind=kind), dtype=dtype)
    graph, state = nnx.split(ATTENTION_MODULES[kind](model, rngs=nnx.Rngs(0)))
    parameters = nnx.to_pure_dict(state)
    eye = jnp.eye(WIDTH)
    parameters["qkv"]["kernel"] = jnp.stack([eye] * 3, axis=1)
    if kind == "dydila":
        parameters["query_bank"]["kernel"] = jnp.stack([eye] * 3)
        parameters["key_bank"]["kernel"] = jnp.stack([eye] * 3)
    x = jnp.asarray(EXTREMES[extreme]((BATCH, model.tokens, WIDTH)), dtype)

    def loss(parameters, x):
        output, _ = nnx.merge(graph, parameters)(x, Context())
        return jnp.sum(output.astype(jnp.float32) ** 2), output

    (value, output), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        parameters, x
    )
    assert output.dtype == jnp.dtype(dtype)
    for name, leaf in [("loss", value), *jax.tree_util.tree_leaves_with_path(gradients)]:
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))), name


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_projections_of_the_core(extreme):
    """Every one of Q, K, Q', K', with exponents up to 20 and lambda above 1."""
    shape = (BATCH, 9, 12)
    array = jnp.asarray(EXTREMES[extreme](shape), jnp.float32)
    inputs = core_inputs(count=9)._replace(
        query=array, key=array, query_redundant=array, key_redundant=-array
    )
    inputs = inputs._replace(exponents=Exponents(*(20.0 * jnp.ones((BATCH, 9)) for _ in range(4))))
    inputs = inputs._replace(lambdas=inputs.lambdas._replace(bank=jnp.full((4,), 1.5)))
    for normalizer in ("base", "signed", "none", "rms"):
        options = CoreOptions(heads=3, normalizer=normalizer)
        gradients = jax.grad(lambda i, o=options: jnp.sum(dydila_core(i, o).output ** 2))(inputs)
        for leaf in jax.tree.leaves(gradients):
            assert bool(jnp.all(jnp.isfinite(leaf))), normalizer


def test_bfloat16_is_close_to_float32():
    model = config()
    module = build(model, spread=0.05)
    graph, _ = nnx.split(DyDiLA(dataclasses.replace(model, dtype="bfloat16"), rngs=nnx.Rngs(0)))
    half = nnx.merge(graph, nnx.to_pure_dict(nnx.split(module)[1]))
    x = tokens(model)
    exact, rounded = module(x, Context())[0], half(x, Context())[0]
    # A token whose routing is a near tie may differ; most must not.
    error = jnp.abs(exact - rounded).max(axis=-1) / jnp.abs(exact).max()
    assert float(jnp.median(error)) < 0.02


def test_rotation_turns_relative_positions_only():
    """With rotary angles, weights depend on positions through their difference."""
    from dydilit_jax.kernels.rotary import axial_rotation, rotate

    rotation = axial_rotation((4, 4), 8)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turned_q = rotate(jnp.tile(q, (1, 16, 1, 1)), rotation)[0, :, 0]
    turned_k = rotate(jnp.tile(k, (1, 16, 1, 1)), rotation)[0, :, 0]
    weights = np.asarray(turned_q @ turned_k.T).reshape(4, 4, 4, 4)
    np.testing.assert_allclose(weights[0, 0, 1, 2], weights[2, 1, 3, 3], rtol=1e-4)
    np.testing.assert_allclose(weights[1, 1, 1, 1], weights[3, 2, 3, 2], rtol=1e-4)
    assert abs(weights[0, 0, 1, 2] - weights[0, 0, 2, 1]) > 1e-3


def chosen_by(implementation: str, platform: str, width: int = WIDTH, dtype: str = "bfloat16"):
    """What core, routed projection and depthwise term run in, on one device of a platform."""
    model = config(implementation=implementation)
    model = dataclasses.replace(model, width=width, dtype=dtype)
    x = jax.ShapeDtypeStruct((BATCH, model.tokens, width), dtype)
    module = nnx.eval_shape(lambda: DyDiLA(model, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    with recording_choices() as choices, tracing_for(platform):
        jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x, Context())[0], state, x)
    operations = ("attention core", "routed projection", "depthwise convolution")
    return tuple(name for operation in operations for name in choices[operation])


def test_implementation_names_the_kernels_of_all_operations(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert chosen_by("pallas_gpu", "gpu") == ("pallas_gpu",) * 3
    assert chosen_by("pallas_tpu", "tpu", width=128) == ("pallas_tpu",) * 3
    narrow = chosen_by("pallas_tpu", "tpu", width=64)
    assert narrow == ("pallas_tpu", "dense", "shifted"), "the other two take multiples of 128"
    for platform in ("gpu", "tpu"):
        assert chosen_by("xla", platform, width=128) == ("xla", "dense", "shifted")
        assert chosen_by("reference", platform, width=128) == ("reference", "dense", "shifted")
        assert chosen_by("", platform)[1:] == ("dense", "shifted")


@pytest.mark.parametrize(
    ("platform", "dtype", "reason"),
    [
        ("cpu", "bfloat16", "'pallas_gpu' cannot run: it is for gpu"),
        ("gpu", "float32", "'pallas_gpu' cannot run: query is float32"),
    ],
)
def test_an_implementation_that_the_core_cannot_run(platform, dtype, reason):
    with pytest.raises(UserError) as error:
        chosen_by("pallas_gpu", platform, dtype=dtype)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
