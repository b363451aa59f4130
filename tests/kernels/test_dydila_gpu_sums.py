"""The Mosaic GPU kernel that sums a token's channels: interpreted on a CPU, lowered for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dydilit_jax.kernels.dydila.pallas_gpu_sums import Rows, token_sums
from tests.kernels.test_dydila_gpu import gpu_interpreter, interpreted
from tests.kernels.test_dydila_gpu_lowered import cuda

TOLERANCE = 3e-6  # of the sum of the magnitudes of what is summed: some fifty roundings to float32


def tokens(N, parts, channels, width):
    """Z (2, N, parts, channels), zero but in `width` channels anywhere, which are returned."""
    rng = np.random.default_rng(0)
    real = np.sort(rng.permutation(channels)[:width])
    values = rng.normal(size=(2, N, parts, width))
    ramp = np.linspace(1.0, 2.0, width)
    special = [
        -np.abs(values[0, 0]),  # no positive entry: s = 1e-6, all u = 1
        0.0 * values[0, 1],
        1e4 * values[0, 2],
        1e-5 * values[0, 3],
        np.where(np.arange(width) == 0, 9.0, values[0, 4]),  # the largest first
        np.where(np.arange(width) == width - 1, 9.0, values[0, 5]),  # the largest last
        np.broadcast_to(ramp, values[0, 6].shape),  # every tile raises the maximum
        np.broadcast_to(ramp[::-1], values[0, 7].shape),
    ]
    values[0, :8] = special
    values[1, 0] *= 1e-6  # so small that zeros count
    values[1, -1] = special[6]
    z = np.zeros((2, N, parts, channels))
    z[..., real] = values
    return jnp.asarray(z, jnp.bfloat16), real


def arguments(N, parts, channels, width, n, powered):
    """Z, g and R, and the channels that are real."""
    z, real = tokens(N, parts, channels, width)
    rng = np.random.default_rng(1)
    exponent = jnp.asarray(rng.uniform(1, 4, (2, 64 * -(-N // 64))), jnp.float32)
    router = np.zeros((parts, n, channels))
    router[..., real] = rng.normal(size=(parts, n, width))
    return (
        z,
        exponent if powered else None,
        jnp.asarray(router, jnp.float32) if n else None,
        real,
    )


def expected(z, exponent, router, real):
    """Pairs of each sum and the sum of magnitudes, float64, by name: (B, parts, [n,] N)."""
    positive = np.maximum(np.asarray(z, np.float64)[..., real].transpose(0, 2, 1, 3), 0.0)
    sums = {}
    features = positive
    if exponent is not None:
        g = np.asarray(exponent, np.float64)[:, None, : z.shape[1], None]
        largest = (positive + 1e-6).max(axis=-1)
        unit = (positive + 1e-6) / largest[..., None]
        features = unit**g
        squares, powers = np.sum(unit**2, axis=-1), np.sum(unit ** (2 * g), axis=-1)
        logs = np.sum(unit ** (2 * g) * np.log(unit), axis=-1)
        sums = {
            "largest": (largest, largest),
            "squares": (squares, squares),
            "powers": (powers, powers),
            # A rounding of u is one of ln u, as large as the entry's u^2g.
            "logs": (logs, powers - logs),
        }
    if router is not None:
        weights = np.asarray(router, np.float64)[..., real]
        sums["logits"] = tuple(
            np.einsum("bptc,pnc->bpnt", features, rows) for rows in (weights, np.abs(weights))
        )
    return sums


CASES = {
    "token": (8, 1, 1152, 1152, 9, True, True),
    "token without W and router": (8, 1, 384, 384, 0, True, False),
    "heads": (136, 2, 72, 72, 9, True, True),
    "padded heads": (8, 2, 24, 20, 1, True, True),
    "tile that overhangs": (72, 1, 136, 136, 16, True, True),
    "smaller tiles of wgmma": (8, 4, 144, 133, 2, True, True),
    "relu": (72, 2, 288, 288, 9, False, False),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_float64(case):
    N, parts, channels, width, n, powered, logs = CASES[case]
    z, exponent, router, real = arguments(N, parts, channels, width, n, powered)
    run = partial(token_sums, width=width, logs=logs, interpret=gpu_interpreter(detect_races=True))
    got = jax.jit(run)(z, exponent, router)
    rows = Rows(powered, logs, n)
    assert got.shape == (2, parts, rows.count, 64 * -(-N // 64))
    assert np.isfinite(np.asarray(got)).all()
    wanted = expected(z, exponent, router, real)
    for name, values in rows.split(got)._asdict().items():
        if values is None or not values.size:
            assert name == "logs" or name not in wanted, name
            continue
        reference, size = wanted[name]
        errors = np.abs(np.asarray(values, np.float64)[..., :N] - reference) / size.clip(1e-30)
        worst = np.unravel_index(errors.argmax(), errors.shape)
        assert errors.max() <= TOLERANCE, f"{name} {worst}: {errors.max()}"


@interpreted
def test_tokens_beyond_the_last_are_zeros():
    """Eight tokens of 64: the others' exponents are used, so that a caller may take any finite."""
    z, exponent, router, _ = arguments(8, 1, 72, 72, 2, True)
    run = partial(token_sums, width=72, logs=True, interpret=gpu_interpreter())
    sums = Rows(True, True, 2).split(jax.jit(run)(z, exponent, router))
    for values, size in zip(sums[:4], (1e-6, 72.0, 72.0, 0.0), strict=True):
        np.testing.assert_allclose(values[..., 8:], size, atol=TOLERANCE * max(size, 72e-6))
    total = np.asarray(router, np.float64).sum(axis=-1)[0, :, None]
    np.testing.assert_allclose(sums.logits[0, 0, :, 8:], np.tile(total, 56), atol=1e-4)


@pytest.mark.parametrize(
    ("N", "parts", "channels", "n", "powered", "logs"),
    [
        (1024, 1, 1152, 9, True, True),
        (1024, 16, 72, 9, True, False),
        (304, 1, 136, 16, True, True),
        (8, 4, 24, 1, True, True),
        (8, 4, 144, 0, True, True),
        (304, 4, 288, 9, False, False),
    ],
)
def test_lowers_for_cuda_to_one_kernel_and_nothing_else(N, parts, channels, n, powered, logs):
    """No copy, no padding: what is read is Z, g and R, what is written the sums."""
    z = jax.ShapeDtypeStruct((2, N, parts, channels), jnp.bfloat16)
    exponent = jax.ShapeDtypeStruct((2, 64 * -(-N // 64)), jnp.float32) if powered else None
    router = jax.ShapeDtypeStruct((parts, n, channels), jnp.float32) if n else None
    run = partial(token_sums, width=channels, logs=logs)
    with cuda():
        traced = jax.jit(run).trace(z, exponent, router)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.custom_call @mosaic_gpu") == 1
    assert text.count("stablehlo.") == 1


def test_what_cannot_be_summed_is_refused():
    z = jnp.zeros((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="nothing to sum"):
        token_sums(z, None, None, width=16, logs=False)
    with pytest.raises(ValueError, match="needs an exponent"):
        token_sums(z, None, jnp.zeros((1, 1, 16)), width=16, logs=True)
