"""Our scores of made features against those of other implementations (fixtures/scores.json)."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.inception_score import RunningInceptionScore
from dydilit_jax.metrics.kernel_distance import kernel_distance, squared_discrepancy
from dydilit_jax.metrics.precision_recall import precision_recall
from dydilit_jax.metrics.rows import KeptRows
from dydilit_jax.metrics.scoring import Scorer
from tests.metrics import made
from tests.tiny import mesh_of

THEIRS = json.loads((Path(__file__).parent / "fixtures" / "scores.json").read_text())


def one_device() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("data",))


def kept(rows) -> KeptRows:
    result = KeptRows(rows.shape[1])
    result.add(rows, np.arange(len(rows)))
    return result


def scored(samples: Features, order: np.ndarray, batch: int, mesh: Mesh | None, folder=None):
    """A scorer that was given the samples in that order, on a mesh or (None) as numpy arrays."""
    scorer = Scorer(made.FakeExtractor(), folder=folder)
    for start in range(0, len(order), batch):
        indices = np.full(batch, -1)
        indices[: len(order[start : start + batch])] = order[start : start + batch]
        arrays = [np.asarray(each)[indices] for each in samples]
        if mesh is not None:
            sharding = NamedSharding(mesh, P(mesh.axis_names[:2]))  # copies along the others
            arrays = [jax.device_put(array, sharding) for array in arrays]
        scorer.add(Features(*arrays), indices)
    return scorer


@pytest.fixture(scope="module")
def reference():
    scorer = scored(made.reference(), np.arange(made.REFERENCE), 100, None)
    return scorer.reference()


@pytest.fixture(scope="module")
def scores(reference):
    scorer = scored(made.samples(), np.arange(made.SAMPLES), 100, None)
    return scorer.scores(reference, one_device())


@pytest.mark.parametrize("theirs", ["scipy", "pytorch-fid", "torch-fidelity", "adm"])
@pytest.mark.parametrize(("score", "name"), [("frechet", "fid"), ("spatial_frechet", "sfid")])
def test_frechet_distances(scores, score, name, theirs):
    assert scores[name] == pytest.approx(THEIRS[score][theirs], rel=1e-6)


@pytest.mark.parametrize(("theirs", "rel"), [("torch-fidelity", 1e-9), ("adm", 1e-5)])
def test_inception_score(theirs, rel):
    """ADM's is computed in float32."""
    running = RunningInceptionScore(made.CLASSES, made.SPLIT)
    running.add(np.asarray(made.samples().logits), np.arange(made.SAMPLES))
    score = running.reduced()
    assert score.splits == made.SAMPLES // made.SPLIT
    assert score[:2] == pytest.approx(THEIRS["inception_score"][theirs], rel=rel)


def test_kernel_distance():
    samples, reference = np.asarray(made.samples().pool), np.asarray(made.reference().pool)
    ours = kernel_distance(
        kept(reference),
        kept(samples),
        one_device(),
        subsets=made.SUBSETS,
        subset_size=made.SUBSET_SIZE,
    )
    mean, std = THEIRS["kernel"]["torch-fidelity"]
    assert ours.mean == pytest.approx(mean, rel=1e-4)
    # Theirs is the deviation itself, without Bessel's correction.
    assert ours.standard_error == pytest.approx(std / np.sqrt(made.SUBSETS - 1), rel=1e-4)


def test_subsets_of_small_sets_differ():
    """Of no more images than a subset has, halves are drawn: else the error would be none."""
    samples, reference = np.asarray(made.samples().pool), np.asarray(made.reference().pool)
    ours = kernel_distance(
        kept(reference), kept(samples), one_device(), subsets=20, subset_size=made.REFERENCE
    )
    halves = kernel_distance(
        kept(reference), kept(samples), one_device(), subsets=20, subset_size=made.REFERENCE // 2
    )
    assert ours == halves
    assert ours.standard_error > 0.0


def test_squared_discrepancy_by_its_definition():
    first, second = (np.asarray(made.features(n, n).pool)[:, :8] for n in (7, 9))

    def mean(xs, ys, same):
        values = [
            (float(x.astype(np.float64) @ y) / 8 + 1) ** 3
            for i, x in enumerate(xs)
            for j, y in enumerate(ys)
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    wanted = mean(first, first, True) + mean(second, second, True) - 2 * mean(first, second, False)
    assert squared_discrepancy(first, second) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("theirs", ["scikit-learn", "torch-fidelity"])
def test_precision_and_recall(scores, theirs):
    wanted = THEIRS["precision_recall"][theirs]
    assert [scores["precision"], scores["recall"]] == pytest.approx(wanted, rel=1e-6)


def test_a_vector_on_the_edge_of_a_ball_is_inside():
    """Points of a line; the reference's balls reach 3, 2, 2, 3 far."""
    reference, samples = ([[0.0], [1.0], [2.0], [3.0]], [[-3.0], [6.0], [-3.5], [100.0]])
    ours = precision_recall(kept(np.array(reference)), kept(np.array(samples)), one_device())
    assert ours == (0.5, 1.0)


def test_a_mean_far_from_zero_costs_no_digits():
    """float32 distances from zero would be rounded to some tenths here."""
    reference, samples = (
        np.asarray(each.pool) + np.float32(1000.0) for each in (made.reference(), made.samples())
    )
    radii, exact = [], [each.astype(np.float64) for each in (reference, samples)]
    between = ((exact[0][:, None] - exact[1]) ** 2).sum(axis=-1)
    for rows in exact:
        within = ((rows[:, None] - rows) ** 2).sum(axis=-1)
        radii.append(np.sort(within, axis=1)[:, 3])
    wanted = (
        (between <= radii[0][:, None]).any(axis=0).mean(),
        (between <= radii[1]).any(axis=1).mean(),
    )
    origin = exact[0].mean(axis=0)
    ours = precision_recall(kept(reference), kept(samples), one_device(), origin=origin)
    assert ours == pytest.approx(wanted, abs=1e-12)
    assert ours != precision_recall(kept(reference), kept(samples), one_device())


def test_precision_and_recall_of_adm_differ_by_its_float16_alone(scores):
    wanted = THEIRS["precision_recall"]["adm (float16)"]
    assert [scores["precision"], scores["recall"]] == pytest.approx(wanted, abs=2 / made.REFERENCE)


def test_order_sharding_and_blocks_change_rounding_alone(scores, reference, tmp_path):
    order = np.random.RandomState(3).permutation(made.SAMPLES)
    mesh = mesh_of(2, 2, 2)
    scorer = scored(made.samples(), order, 64, mesh, tmp_path)
    assert scorer.count() == made.SAMPLES
    assert scorer.scores(reference, mesh) == pytest.approx(scores, rel=1e-9)


def test_small_blocks_on_eight_devices(scores):
    """What fills the last blocks lies at the origin, here amid the vectors, and is no neighbour."""
    real = np.asarray(made.reference().pool)
    ours = precision_recall(
        kept(real),
        kept(np.asarray(made.samples().pool)),
        mesh_of(2, 2, 2),
        origin=real.mean(axis=0),
        rows_each=13,
        columns=150,
    )
    assert ours == (scores["precision"], scores["recall"])
