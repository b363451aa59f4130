import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.features import Features
from dydilit_jax.metrics.frechet import SingularCovarianceWarning
from dydilit_jax.metrics.kernel_distance import kernel_distance
from dydilit_jax.metrics.precision_recall import precision_recall
from dydilit_jax.metrics.rows import KeptRows
from dydilit_jax.metrics.scoring import SCORES, Scorer
from tests.metrics import made
from tests.tiny import mesh_of

CHEAP = ("frechet", "spatial_frechet", "inception_score")
MESH = mesh_of(1)


def take(features, indices):
    return Features(*(np.asarray(each)[indices] for each in features))


def add(scorer, features, start, stop, batch=100):
    for first in range(start, stop, batch):
        indices = np.arange(first, min(first + batch, stop))
        scorer.add(take(features, indices), indices)


@pytest.fixture(scope="module")
def reference():
    scorer = Scorer(made.FakeExtractor(), scores=CHEAP)
    add(scorer, made.reference(), 0, made.REFERENCE)
    return scorer.reference()


@pytest.fixture(scope="module")
def straight(reference):
    scorer = Scorer(made.FakeExtractor(), scores=CHEAP)
    add(scorer, made.samples(), 0, made.SAMPLES)
    return scorer.scores(reference, MESH)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, reference, straight, on_disk):
    state, rows = tmp_path / "state", tmp_path / "rows" if on_disk else None
    scores = (*CHEAP, "precision_recall")

    def begin():
        scorer = Scorer(made.FakeExtractor(), scores=scores, folder=rows)
        return scorer, scorer.restore(state)

    scorer, start = begin()
    assert start == 0
    add(scorer, made.samples(), 0, 200)
    scorer.save(state)
    add(scorer, made.samples(), 200, 300)
    scorer.save(state)
    add(scorer, made.samples(), 300, 500)  # not saved, though rows may have been written
    if scorer.rows is not None:
        scorer.rows.flush()
    scorer, start = begin()
    assert start == 300
    assert len(list(state.glob("state-*.npz"))) == 1
    add(scorer, made.samples(), 300, made.SAMPLES)
    scorer.save(state)
    scorer, start = begin()
    assert start == made.SAMPLES
    assert scorer.scores(reference, MESH) == pytest.approx(straight, rel=1e-12)
    found = scorer.rows.read(0, 1000)
    order = np.argsort(found["index"])
    np.testing.assert_array_equal(found["index"][order], np.arange(made.SAMPLES))
    np.testing.assert_array_equal(found["row"][order], made.samples().pool)


def test_a_state_is_taken_up_by_other_numbers_of_processes(
    tmp_path, reference, straight, monkeypatch
):
    for process in range(3):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        monkeypatch.setattr("jax.process_count", lambda: 3)
        scorer = Scorer(made.FakeExtractor(), scores=(*CHEAP, "kernel"), folder=tmp_path / "rows")
        for first in range(0, made.SAMPLES, 100):
            indices = np.arange(first, first + 100)
            indices[indices % 3 != process] = -1
            scorer.add(take(made.samples(), indices), indices)
        scorer.save(tmp_path)
        if process < 2:
            monkeypatch.undo()
            assert Scorer(made.FakeExtractor(), scores=CHEAP).restore(tmp_path) == 0
    monkeypatch.undo()
    scorer = Scorer(made.FakeExtractor(), scores=(*CHEAP, "kernel"), folder=tmp_path / "rows")
    assert scorer.restore(tmp_path) == made.SAMPLES
    assert scorer.rows is not None
    assert scorer.count() == len(scorer.rows) == made.SAMPLES
    assert scorer.scores(reference, MESH) == pytest.approx(straight, rel=1e-12)


def test_a_state_of_other_weights_is_refused(tmp_path):
    scorer = Scorer(made.FakeExtractor(), scores=CHEAP)
    add(scorer, made.samples(), 0, 100)
    scorer.save(tmp_path)
    for other in (
        Scorer(made.FakeExtractor(checksum="1" * 64), scores=CHEAP),
        Scorer(made.FakeExtractor(), scores=["frechet"]),
    ):
        with pytest.raises(UserError, match="holds an evaluation of inception"):
            other.restore(tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    scorer = Scorer(made.FakeExtractor(), scores=["frechet"])
    add(scorer, made.samples(), 0, 100)
    scorer.save(tmp_path)
    (path,) = tmp_path.glob("state-*.npz")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"state-00000001-0-of-1.npz.*cannot be read"):
        Scorer(made.FakeExtractor(), scores=["frechet"]).restore(tmp_path)


def test_missing_rows_are_named(tmp_path):
    def begin():
        return Scorer(made.FakeExtractor(), scores=["kernel"], folder=tmp_path / "rows")

    scorer = begin()
    add(scorer, made.samples(), 0, 100)
    scorer.save(tmp_path)
    (tmp_path / "rows" / "rows-0-000000.npy").unlink()
    with pytest.raises(UserError, match=r"rows-0-000000.npy.*missing"):
        begin().restore(tmp_path)


def test_features_that_are_not_finite_name_the_image(reference):
    samples = take(made.samples(), np.arange(100))
    samples.pool[40, 3] = np.nan
    scorer = Scorer(made.FakeExtractor(), scores=["frechet"])
    scorer.add(samples, np.arange(1000, 1100))
    with pytest.raises(UserError, match="features of image 1040 are not finite"):
        scorer.count()


def test_filling_is_left_out_even_if_it_is_not_finite(straight, reference):
    scorer = Scorer(made.FakeExtractor(), scores=CHEAP)
    filling = take(made.samples(), np.zeros(5, int))
    for array in filling:
        array[:] = np.nan
    scorer.add(filling, np.full(5, -1))
    add(scorer, made.samples(), 0, made.SAMPLES)
    assert scorer.scores(reference, MESH) == pytest.approx(straight, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "dinov2"}, "reference holds features of inception.*dinov2"),
        ({"checksum": "1" * 64}, "of weights 000"),
        ({"description": "other"}, "of 'made'"),
    ],
)
def test_references_of_other_features_are_refused(reference, change, message):
    scorer = Scorer(made.FakeExtractor(**change), scores=["frechet"])
    add(scorer, made.samples(), 0, 200)
    with pytest.raises(UserError, match=message):
        scorer.scores(reference, MESH)


def test_only_inceptions_distance_is_called_fid(straight):
    extractor = made.FakeExtractor(name="classifier", spatial_width=0)
    scorer = Scorer(extractor, scores=SCORES)
    add(scorer, made.samples(), 0, made.SAMPLES)
    scores = scorer.scores(scorer.reference(), MESH)
    assert list(scores) == [
        "num_images",
        "classifier_frechet",
        "classifier_score",
        "classifier_score_std",
        "classifier_kernel",
        "classifier_kernel_standard_error",
        "classifier_precision",
        "classifier_recall",
    ]
    assert abs(scores["classifier_frechet"]) < 1e-9
    assert scores["classifier_precision"] == scores["classifier_recall"] == 1.0
    assert list(straight) == ["num_images", "fid", "sfid", "inception_score", "inception_score_std"]


def test_too_few_images_are_said_to_be_too_few(reference):
    scorer = Scorer(made.FakeExtractor(), scores=["frechet"])
    add(scorer, made.samples(), 0, made.WIDTH)
    with pytest.warns(SingularCovarianceWarning, match="of 128 images, in 128 dimensions"):
        scorer.scores(reference, MESH)


def test_an_unknown_score_is_named():
    with pytest.raises(UserError, match="unknown score 'fid'"):
        Scorer(made.FakeExtractor(), scores=["fid"])


def test_sets_too_small_for_neighbours_or_subsets_are_refused():
    one = KeptRows(4)
    one.add(np.ones((1, 4)), np.arange(1))
    with pytest.raises(UserError, match="needs four images in each set"):
        kernel_distance(one, one, MESH)
    with pytest.raises(UserError, match="more than 3 images in each set, got 1 and 1"):
        precision_recall(one, one, MESH)
