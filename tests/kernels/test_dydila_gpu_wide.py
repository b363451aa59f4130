"""The backward kernels of wide heads, each by itself: interpreted, and lowered for CUDA.

Wanted is what the equations of pallas_gpu_features.py say, written out in float64.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.kernels.dydila import pallas_gpu_wide, pallas_gpu_wide_stream
from dydilit_jax.kernels.dydila import pallas_gpu_wide_backward as backward
from dydilit_jax.kernels.dydila.pallas_gpu_features import Core, Known
from dydilit_jax.kernels.dydila.pallas_gpu_wide import Tiles, covered
from dydilit_jax.kernels.dydila.pallas_gpu_wide_stream import Walk
from tests.kernels.test_dydila_gpu import gpu_interpreter, interpreted
from tests.kernels.test_dydila_gpu_lowered import cuda

FLOAT32, BFLOAT16 = 1e-4, 8e-3  # of the largest value: sums in float32, and of rounded values


def core_of(d, *, heads=1, powered=True, routed=True, normalizer="base", differential=True):
    choices = 5 * (routed and differential)
    return Core(heads, d, 136, normalizer, powered, differential, 1e-6, choices)


def arrays_of(core, *, B=1, N=136, seed=0):
    """Arguments as the kernels take them: what is beyond the width, and beyond N, as promised."""
    rng = np.random.default_rng(seed)
    H, d = core.heads, core.width
    width, sides = 16 * -(-d // 16), 1 + core.differential
    tiles, size = Tiles(width), covered(B, N, H, width)

    def tokens():
        x = rng.normal(size=(B, N, H, d))
        return jnp.pad(jnp.asarray(x, jnp.bfloat16), ((0, 0), (0, 0), (0, 0), (0, width - d)))

    def rows(low, high, *shape, beyond=1.0):
        x = rng.uniform(low, high, size=(*shape, N))
        added = [(0, 0)] * len(shape) + [(0, size - N)]
        return jnp.pad(jnp.asarray(x, jnp.float32), added, constant_values=beyond)

    scalars, norms = [], []
    for _ in range(core.powers):
        scalars += [rows(1, 3, B, H), rows(0.3, 0.5, B, H), rows(0.5, 2, B, H, beyond=0.0)]
        norms += [rows(-1, 1, B, H, beyond=0.0) for _ in range(3)]
    scalars += [rows(0.2, 2, B, H)] if core.differential else []
    m = np.zeros((B * H, *tiles.padded))
    m[:, :d, :d] = rng.normal(size=(B * H, d, d))
    z = np.zeros((B * H, width))
    z[:, :d] = rng.normal(size=(B * H, d))
    den = rows(0.5, 2, B * H) * rng.choice([-1, 1], size=(B * H, size))
    if core.normalizer == "signed":
        den = den.at[:, 3].set(core.eps)  # as `guarded` holds it
    d_logits, router = None, None
    if core.choices:
        of_tokens, of_channels = np.zeros((B, N, 16)), np.zeros((sides, H, 16, width))
        of_tokens[..., : core.choices] = rng.normal(size=(B, N, core.choices))
        of_channels[:, :, : core.choices, :d] = rng.normal(size=(sides, H, core.choices, d))
        d_logits, router = (jnp.asarray(x, jnp.bfloat16) for x in (of_tokens, of_channels))
    return SimpleNamespace(
        tokens=[tokens() for _ in range(sides)],
        scalars=jnp.stack(scalars or [jnp.ones((B, H, size))], axis=2),
        norms=jnp.stack(norms, axis=2) if norms else None,
        y=tokens(),
        m=jnp.asarray(m, jnp.bfloat16),
        z=jnp.asarray(z, jnp.float32),
        den=None if core.normalizer == "none" else den,
        weights=None if core.normalizer == "none" else rows(-2, 2, B * H, 2, beyond=0.0),
        d_logits=d_logits,
        router=router,
    )


class Expected:
    """Equations (1) to (6) in float64, of arrays (B, H, N, d) without what was added to them."""

    def __init__(self, core, arrays):
        def wide(x, *shape):
            return np.asarray(x, np.float64).reshape(shape or x.shape)

        self.core, self.N = core, arrays.y.shape[1]
        B, N, H, _ = arrays.y.shape
        d = self.d = core.width

        def heads(x):
            return wide(x).swapaxes(1, 2)[..., :d]

        self.z_tokens = [heads(x) for x in arrays.tokens]
        scalars = wide(arrays.scalars)[..., :N]
        row = lambda i: scalars[:, :, i, :, None]  # noqa: E731
        self.phi, self.power, self.log, self.positive = [], [], [], []
        for side, z in enumerate(self.z_tokens):
            positive = np.maximum(z, 0)
            if not core.powered:
                self.phi.append(positive)
                continue
            g, inv, c = (row(3 * side + i) for i in range(3))
            u = (positive + 1e-6) * inv
            self.phi.append(c * u**g)
            self.power.append(u**g)
            self.log.append(np.log(u))
            self.positive.append(positive + 1e-6)
        self.row = row
        self.scale = row(core.rows - 1) if core.differential else 0.0
        self.F = self.phi[0] - (self.scale * self.phi[1] if core.differential else 0.0)
        self.Y = heads(arrays.y)
        self.M = wide(arrays.m, B, H, *arrays.m.shape[1:])[..., :d, :d]
        self.z = wide(arrays.z, B, H, 1, -1)[..., :d]
        self.G = self.Y @ self.M.swapaxes(2, 3)
        self.den = None
        if arrays.den is not None:
            self.den = wide(arrays.den, B, H, -1)[..., :N, None]
        self.arrays = arrays

    def d_den(self):
        assert self.den is not None
        held = (np.abs(self.den) <= 1.1e-6) & (self.core.normalizer == "signed")
        return np.where(held, 0, -np.sum(self.F * self.G, 3, keepdims=True) / self.den**2)

    def d_phi(self, w, t):
        """Gradients of F, and of phi and phi'."""
        signed, base = (self.core.normalizer == x for x in ("signed", "base"))
        d_F = w * self.G + (t * self.z if signed else 0)
        of_base = d_F + (t * self.z if base else 0)
        return d_F, [of_base, -self.scale * d_F][: 1 + self.core.differential]

    def sums(self, w=1.0, t=1.0):
        d_F, d_phi = self.d_phi(w, t)
        rows = [np.sum(d * p, 3) for d, p in zip(d_phi, self.power, strict=False)]
        if self.core.differential:
            rows.append(-np.sum(d_F * self.phi[1], 3))
        return np.stack(rows, 2) if rows else None

    def state(self, w, t):
        d_M = (w * self.F).swapaxes(2, 3) @ self.Y
        summed = self.F if self.core.normalizer == "signed" else self.phi[0]
        return d_M, np.sum(t * summed, 2)

    def tokens(self, w=1.0, t=1.0):
        """Gradients of Z and Z', of the exponents, and of the router."""
        _, d_phi = self.d_phi(w, t)
        d_z, d_g, d_router = [], [], []
        for side, d in enumerate(d_phi):
            if self.core.choices:
                d_logits = np.asarray(self.arrays.d_logits, np.float64)[:, None]
                router = np.asarray(self.arrays.router, np.float64)[side][None, ..., : self.d]
                d = d + d_logits @ router
                d_router.append(self.phi[side].swapaxes(2, 3) @ d_logits)
            if self.core.powered:
                norms = np.asarray(self.arrays.norms, np.float64)[..., : self.N, None]
                a, b, mean = (norms[:, :, 3 * side + i] for i in range(3))
                g = self.row(3 * side)
                d_g.append(np.sum(d * self.phi[side] * (self.log[side] - mean), 3))
                of_power = g * d * self.phi[side] - b * self.power[side] ** 2
                d = of_power / self.positive[side] + a * self.positive[side]
            d_z.append(np.where(self.z_tokens[side] > 0, d, 0))
        return d_z, np.stack(d_g, 2) if d_g else None, d_router


def close(got, wanted, tolerance, what):
    got = np.asarray(got, np.float64)
    assert got.shape == wanted.shape, what
    error, size = np.abs(got - wanted).max(), np.abs(wanted).max()
    assert error <= tolerance * size, f"{what}: {error} of {size}"


def all_kernels(core, arrays):
    """Every function of a backward pass; keys of the same arrays, without weights."""
    x = arrays
    given = core, x.tokens
    queries = backward.query_sums(*given, x.scalars, x.y, x.m, x.z, x.den)
    known = Known(x.scalars, x.norms, None, x.d_logits, x.router)
    gradients = partial(backward.token_gradients, *given)
    found: dict[str, Any] = {
        "queries": queries,
        "keys": gradients(known, x.y, x.m, x.z, with_value=True),
    }
    if not core.one_pass:
        weighted = known._replace(weights=x.weights)
        found["key sums"] = backward.key_sums(*given, x.scalars, x.y, x.m, x.z)
        found["of queries"] = gradients(weighted, x.y, x.m, x.z, with_value=False)
    return found


def check_query_sums(core, found, expected):
    B, H, N, d = expected.Y.shape

    def of_heads(x):
        return np.asarray(x)[..., :N].reshape(B, H, *x.shape[1:-1], N)

    w: Any = 1.0
    t: Any = 0.0
    if expected.den is not None:
        w, t = 1 / expected.den, expected.d_den()
    if core.one_pass:
        assert found.d_den is None
        for got, wanted in zip(found.tokens, expected.tokens(w, t)[0], strict=True):
            close(got.swapaxes(1, 2)[..., :d], wanted, BFLOAT16, "gradient of a query")
    else:
        assert found.tokens is None
        if expected.den is None:
            assert found.d_den is None
        else:
            close(of_heads(found.d_den), t[..., 0], FLOAT32 + 4e-3, "d_den")
            assert found.d_den.shape == expected.arrays.den.shape
    if core.summed:
        # 4e-3: d_den is of the rounded F that was multiplied forward.
        close(of_heads(found.rows), expected.sums(w, t), 4e-3, "sums of queries")
        assert found.rows.shape[-1] == expected.arrays.scalars.shape[-1]
    else:
        assert found.rows is None
    d_M, d_z = expected.state(w, t)
    close(found.d_m.reshape(B, H, *found.d_m.shape[1:])[..., :d, :d], d_M, BFLOAT16, "dM")
    if expected.den is not None:
        close(found.d_z.reshape(B, H, -1)[..., :d], d_z, BFLOAT16, "dz")


def check_token_gradients(core, found, expected, w, t, *, with_value):
    B, H, N, d = expected.Y.shape
    d_tokens, d_g, d_router = expected.tokens(w, t)
    for got, wanted in zip(found.tokens, d_tokens, strict=True):
        close(got.swapaxes(1, 2)[..., :d], wanted, BFLOAT16, "gradient of a token")
        assert not np.asarray(got[..., d:]).any()
    wanted = expected.sums(w, t) if core.one_pass else d_g
    if wanted is None:
        assert found.rows is None
    else:
        assert found.rows.shape[-1] == expected.arrays.scalars.shape[-1]
        close(found.rows[..., :N].reshape(B, H, -1, N), wanted, FLOAT32, "rows")
    if core.choices:
        for got, wanted in zip(found.router, d_router, strict=True):
            close(got[..., :d, :], wanted, BFLOAT16, "gradient of the router")
    else:
        assert found.router is None
    if with_value:
        close(found.value.swapaxes(1, 2)[..., :d], expected.F @ expected.M, BFLOAT16, "value")
    else:
        assert found.value is None


CASES = {
    "all parts": core_of(136, heads=2),
    "signed": core_of(192, normalizer="signed", routed=False),
    "no power, no denominator": core_of(192, powered=False, normalizer="none"),
    "no power, signed": core_of(136, powered=False, normalizer="signed"),
    "one pass, signed": core_of(136, powered=False, routed=False, normalizer="signed"),
    "relu": core_of(192, powered=False, differential=False),
}


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_backward_kernels(monkeypatch, name):
    """Three blocks of tokens, the last of 8 tokens, in two programs of two; three tiles."""
    core = CASES[name]
    monkeypatch.setattr(pallas_gpu_wide, "PROGRAMS", 2 * core.heads * 3)
    monkeypatch.setattr(pallas_gpu_wide, "FEWEST_BLOCKS", 1)
    assert Walk((1, 136, core.heads, core.width)).grid == (core.heads, 3, 2)
    if name != "all parts":  # two pieces of Y or M at a time, fewer than a step has
        monkeypatch.setattr(pallas_gpu_wide_stream, "PIECE", 70_000)
    races = name in ("signed", "one pass, signed")
    arrays = arrays_of(core)
    expected = Expected(core, arrays)
    interpreter = gpu_interpreter(detect_races=races)
    running = Core(**{**vars(core), "interpret": interpreter})
    found = jax.jit(lambda x: all_kernels(running, SimpleNamespace(**x)))(vars(arrays))
    check_query_sums(core, found["queries"], expected)
    check_token_gradients(core, found["keys"], expected, 1.0, 1.0, with_value=True)
    if core.one_pass:
        return
    sums = found["key sums"]
    N = arrays.y.shape[1]
    close(sums[..., :N].reshape(1, core.heads, -1, N), expected.sums(), FLOAT32, "sums of keys")
    w: Any = 1.0
    t: Any = 0.0
    if arrays.weights is not None:
        weights = np.asarray(arrays.weights, np.float64)[..., :N]
        w, t = (weights[:, i].reshape(1, core.heads, N, 1) for i in range(2))
    check_token_gradients(core, found["of queries"], expected, w, t, with_value=False)


@pytest.mark.parametrize(
    ("core", "kernels"),
    [
        (core_of(288, heads=2), 6),
        (core_of(576, powered=False, routed=False), 4),
        (core_of(704, heads=2, normalizer="signed"), 6),
        (core_of(704, powered=False, normalizer="none"), 6),
    ],
)
def test_lowers_for_cuda(core, kernels):
    """Mosaic finds layouts, and what a program holds fits in its shared memory."""
    arrays = vars(arrays_of(core))
    with cuda():
        traced = jax.jit(lambda x: all_kernels(core, SimpleNamespace(**x))).trace(arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == kernels


@pytest.mark.parametrize(
    ("d", "n", "pieces"), [(192, 16, 6), (288, 16, 10), (576, 16, 11), (704, 16, 9), (704, 64, 4)]
)
def test_shared_memory_holds_rows_of_m(d, n, pieces):
    """`token_gradients`, the largest: rows of M, and at least two pieces of Y."""
    core, walk = core_of(d, heads=2), Walk((1, 1024, 2, d))
    arrays = arrays_of(core)
    router = jnp.zeros((2, 2, n, 64 * walk.tiles), jnp.bfloat16)
    d_logits = jnp.zeros((1, 1024, n), jnp.bfloat16)
    operands = {"scalars": arrays.scalars, "weights": arrays.weights, "d_logits": d_logits}
    operands |= {"through_norms": arrays.norms, "router": router}
    types = pallas_gpu_wide_stream.scratch(core, walk, operands, {"rows": walk.rows(2)})
    held = [x for x in types.values() if isinstance(x, type(types["held_s"]))]
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in held]
    assert len(held) == len(types) - 3
    assert sum(1024 * -(-size // 1024) for size in sizes) + 2048 + 8 * 64 <= 227 * 1024
    assert types["copied_s"].shape == (pieces, 64, 64)


@pytest.mark.parametrize(
    "shape", [(1, 128, 1, 144), (4, 584, 4, 288), (1, 4104, 2, 576), (64, 256, 2, 704)]
)
def test_scalars_are_given_for_all_tokens_of_all_programs(shape):
    B, N, H, d = shape
    size = covered(*shape)
    assert size >= N
    for rounds in (0, 1):
        assert Walk(shape, rounds=rounds).covered <= size
    splits, blocks = pallas_gpu_wide.token_splits(*shape)
    assert 64 * splits * blocks <= size
    core = core_of(d, heads=H)
    m = jax.ShapeDtypeStruct((B * H, *Tiles(d).padded), jnp.bfloat16)
    z = jax.ShapeDtypeStruct((B * H, d), jnp.float32)
    tokens = [jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 2
    scalars = jax.ShapeDtypeStruct((B, 1, core.rows, size), jnp.float32)
    with cuda():
        run = partial(pallas_gpu_wide.apply, core)
        _, den = jax.eval_shape(run, tokens, scalars, m, z)
    assert den.shape == (B * H, size)
