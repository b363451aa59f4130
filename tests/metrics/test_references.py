import numpy as np
import pytest

from dydilit_jax.errors import UserError
from dydilit_jax.metrics.frechet import moments
from dydilit_jax.metrics.references import (
    image_shape_of,
    make_reference,
    read_images,
    read_reference,
    write_reference,
)
from tests.metrics import made
from tests.tiny import mesh_of

MESH = mesh_of(2, 2)
EXTRACTOR = made.FakeExtractor(width=20, spatial_width=12, num_classes=10)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (150, 4, 4, 3), np.uint8)


@pytest.fixture(scope="module")
def wanted(images):
    pixels = images.reshape(150, -1).astype(np.float64) / 255
    return moments(pixels[:, :20]), moments(pixels[:, :12]), pixels[:, :20]


def check(reference, wanted, rtol=1e-6):
    for ours, theirs in ((reference.pool, wanted[0]), (reference.spatial, wanted[1])):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=rtol)
        np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=rtol, atol=1e-9)


def check_rows(reference, wanted):
    found = reference.rows.read(0, 1000)
    order = np.argsort(found["index"])
    np.testing.assert_array_equal(found["index"][order], np.arange(150))
    np.testing.assert_allclose(found["row"][order], wanted[2], rtol=1e-6)


@pytest.fixture
def batches(images):
    return [images[:64], images[64:128], images[128:]]


def test_computed_written_and_read(tmp_path, images, batches, wanted):
    reference = make_reference(batches, EXTRACTOR, MESH)
    check(reference, wanted)
    check_rows(reference, wanted)
    path = tmp_path / "folder" / "reference.npz"
    write_reference(path, reference, images=batches)
    assert [each.name for each in path.parent.iterdir()] == ["reference.npz"]
    # What numpy, and so ADM's evaluator, reads of it.
    with np.load(path, allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_allclose(file["mu"], wanted[0].mean, rtol=1e-6)
        np.testing.assert_allclose(file["sigma_s"], wanted[1].covariance, rtol=1e-6, atol=1e-9)
    again = read_reference(path, EXTRACTOR, MESH)
    check(again, wanted)
    check_rows(again, wanted)
    assert again.count == again.pool.num_images == 150
    assert len(again.checksum) == 64
    assert reference.image_shape == again.image_shape == (4, 4, 3)
    assert [len(batch) for batch in read_images(path, 40)] == [40, 40, 40, 30]
    np.testing.assert_array_equal(np.concatenate(list(read_images(path, 40))), images)


def test_adms_layout(tmp_path, images, wanted):
    """Moments of other images than arr_0's, which serve for rows alone."""
    path = tmp_path / "adm.npz"
    pool, spatial, _ = wanted
    np.savez(
        path,
        arr_0=images,
        mu=pool.mean + 1.0,
        sigma=2 * pool.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )
    reference = read_reference(path, EXTRACTOR, MESH, batch_size=64, folder=tmp_path / "rows")
    np.testing.assert_array_equal(reference.pool.mean, pool.mean + 1.0)
    np.testing.assert_array_equal(reference.pool.covariance, 2 * pool.covariance)
    assert reference.spatial is not None
    np.testing.assert_array_equal(reference.spatial.mean, spatial.mean)
    check_rows(reference, wanted)
    assert reference.count == 0
    assert reference.image_shape == image_shape_of(path) == (4, 4, 3)
    assert read_reference(path, EXTRACTOR, MESH, rows=False).rows is None


def test_a_bare_batch_of_images(tmp_path, images, wanted):
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, images, np.arange(150))
    reference = read_reference(path, EXTRACTOR, MESH, batch_size=64)
    check(reference, wanted)
    check_rows(reference, wanted)


def test_moments_alone(tmp_path, wanted):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=wanted[0].mean, sigma=wanted[0].covariance)
    reference = read_reference(path, EXTRACTOR, MESH)
    assert reference.spatial is reference.rows is None
    assert reference.image_shape is image_shape_of(path) is None


def test_a_file_without_images_says_how_large_they_were(tmp_path, batches):
    path = tmp_path / "reference.npz"
    write_reference(path, make_reference(batches, EXTRACTOR, MESH, spatial=False, rows=False))
    assert image_shape_of(path) == (4, 4, 3)
    assert read_reference(path, EXTRACTOR, MESH).image_shape == (4, 4, 3)


def test_arrays_in_other_orders_are_read(tmp_path, images):
    path = tmp_path / "fortran.npz"
    np.savez(path, np.asfortranarray(images))
    np.testing.assert_array_equal(np.concatenate(list(read_images(path, 64))), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "neither moments .* nor images"),
        ({"mu": np.zeros(20)}, "an array mu but no sigma"),
        ({"mu": np.zeros(2048), "sigma": np.eye(2048)}, "expected 20 features"),
        ({"arr_0": np.zeros((5, 4, 4, 3))}, "expected images .* uint8"),
        ({"mu": np.zeros(20), "sigma": np.eye(20), "extractor": "dinov2"}, "features of dinov2"),
        (
            {"mu": np.zeros(20), "sigma": np.eye(20), "features": np.zeros((9, 7), "f4")},
            r"features are \(7,\)",
        ),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path, arrays, message):
    path = tmp_path / "file.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=message):
        read_reference(path, EXTRACTOR, MESH)


def test_damaged_files_are_named(tmp_path, images):
    path = tmp_path / "file.npz"
    with pytest.raises(UserError, match=r"cannot be read as an \.npz"):
        read_reference(path, EXTRACTOR, MESH)
    np.savez(path, images)
    content = bytearray(path.read_bytes())
    content[3000:3100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_reference(path, EXTRACTOR, MESH)


def test_images_that_are_not_those_of_the_rows_are_refused(tmp_path, batches):
    reference = make_reference(batches, EXTRACTOR, MESH, spatial=False)
    with pytest.raises(UserError, match="array arr_0"):
        write_reference(tmp_path / "file.npz", reference, images=batches[:2])
    assert list(tmp_path.iterdir()) == []
